import { wireError } from './errors.ts'

/**
 * Server-sent events of what `start` yields. The reply begins with the first one, so that what is wrong before it is an
 * error reply; what goes wrong later is an event of type `error`. A client that leaves aborts the signal that `start` gets.
 *
 * @param outer aborts it too
 * @param report gets every error that comes after the first event
 */
export async function eventStream<Event>(
  outer: AbortSignal,
  start: (signal: AbortSignal) => AsyncGenerator<Event, void, undefined>,
  report: (error: unknown) => void,
): Promise<Response> {
  const left = new AbortController()
  const events = start(AbortSignal.any([outer, left.signal]))
  const encoder = new TextEncoder()
  const encode = (event: unknown) => encoder.encode(`data: ${JSON.stringify(event)}\n\n`)
  const first = await events.next()
  const body = new ReadableStream<Uint8Array>({
    start(controller) {
      if (!first.done) controller.enqueue(encode(first.value))
    },
    async pull(controller) {
      try {
        const { value, done } = await events.next()
        if (left.signal.aborted) return
        if (done) controller.close()
        else controller.enqueue(encode(value))
      } catch (error) {
        if (left.signal.aborted) return
        report(error)
        controller.enqueue(encode({ type: 'error', error: wireError(error).error }))
        controller.close()
      }
    },
    async cancel() {
      left.abort()
      await events.return()
    },
  })
  const headers = { 'Content-Type': 'text/event-stream; charset=utf-8', 'Cache-Control': 'no-store' }
  return new Response(body, { headers })
}
