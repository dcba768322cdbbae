import type { Scene } from '../../demo/scene.ts'
import type { ChatBody, DrawBody, InfoReply, SceneReply, WireError, WireEvent } from '../wire.ts'

/** What the server refused, in its words. */
export class ApiError extends Error {
  readonly code: string
  constructor({ code, message }: WireError) {
    super(message)
    this.code = code
  }
}

export async function getInfo(): Promise<InfoReply> {
  return (await ask('api/info')).json()
}

/** A scene that training never showed. */
export async function getScene(): Promise<SceneReply> {
  return (await ask('api/scene')).json()
}

/** The scene as a PNG file: what the model sees of it. */
export async function renderScene(scene: Scene): Promise<Blob> {
  return (await post('api/scene', scene)).blob()
}

/** The events of an answer. Ends with `done` or `drawn`, or throws. */
export async function* chat(body: ChatBody, signal: AbortSignal): AsyncGenerator<WireEvent> {
  yield* events(await post('api/chat', body, signal))
}

/** The events of a drawing. */
export async function* draw(body: DrawBody, signal: AbortSignal): AsyncGenerator<WireEvent> {
  yield* events(await post('api/draw', body, signal))
}

async function* events(response: Response): AsyncGenerator<WireEvent> {
  const decoder = new TextDecoder()
  const reader = response.body!.getReader()
  let rest = ''
  let ended = false
  for (let chunk = await reader.read(); !chunk.done; chunk = await reader.read()) {
    const blocks = (rest + decoder.decode(chunk.value, { stream: true })).split('\n\n')
    rest = blocks.pop()!
    for (const block of blocks) {
      const event = JSON.parse(block.replace(/^data: /, '')) as WireEvent
      if (event.type === 'error') throw new ApiError(event.error)
      ended = event.type === 'done' || event.type === 'drawn'
      yield event
    }
  }
  if (!ended) throw new ApiError({ code: 'DISCONNECTED', message: 'the server stopped in the middle of it' })
}

function post(path: string, body: unknown, signal?: AbortSignal): Promise<Response> {
  return ask(path, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify(body),
    ...(signal && { signal }),
  })
}

async function ask(path: string, init: RequestInit = {}): Promise<Response> {
  let response: Response
  try {
    response = await fetch(path, init)
  } catch (error) {
    if (init.signal?.aborted) throw error
    throw new ApiError({
      code: 'DISCONNECTED',
      message: 'the server cannot be reached; is it still running?',
    })
  }
  if (response.ok) return response
  const { error } = (await response.json()) as { error: WireError }
  throw new ApiError(error)
}
