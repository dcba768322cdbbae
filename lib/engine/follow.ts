/**
 * The events of `run` as they come, then the one that it resolves to. Leaving the loop, or `outer`, aborts the signal that
 * `run` gets; either way the generator ends when `run` has. `merge` joins an event to the last one that waits: a slow
 * reader gets what has come meanwhile in one piece.
 */
export async function* follow<Event>(
  outer: AbortSignal | undefined,
  run: (emit: (event: Event) => void, signal: AbortSignal) => Promise<Event>,
  merge: (last: Event, next: Event) => Event | undefined = () => undefined,
): AsyncGenerator<Event, void, undefined> {
  const controller = new AbortController()
  const forward = () => controller.abort(outer?.reason)
  if (outer?.aborted) forward()
  outer?.addEventListener('abort', forward, { once: true })
  const events: Event[] = []
  let wake: () => void = () => {}
  let end: { error?: unknown } | undefined
  const emit = (event: Event) => {
    const last = events.at(-1)
    const merged = last !== undefined && merge(last, event)
    if (merged) events[events.length - 1] = merged
    else events.push(event)
    wake()
  }
  const running = run(emit, controller.signal).then(
    last => {
      end = {}
      emit(last)
    },
    (error: unknown) => {
      end = { error }
      wake()
    },
  )
  try {
    while (true) {
      const event = events.shift()
      if (event !== undefined) yield event
      else if (!end)
        await new Promise<void>(resolve => {
          wake = resolve
        })
      else if ('error' in end) throw end.error
      else return
    }
  } finally {
    outer?.removeEventListener('abort', forward)
    controller.abort()
    await running
  }
}
