import type { Answer } from '../engine/answer.ts'
import { follow } from '../engine/follow.ts'
import type { ImageStep } from '../engine/image-queue.ts'
import type { GeneratedImage, MiniGemini } from '../mini-gemini.ts'
import { encodeImage } from '../processing/encode.ts'
import type { ChatRequest, DrawOptions, ImagineRequest } from '../request.ts'
import type { WireEvent, WireImage, WireTimings } from './wire.ts'

type Events = AsyncGenerator<WireEvent, void, undefined>

/** An answer as it comes. */
export async function* answerEvents(mgm: MiniGemini, request: ChatRequest): Events {
  for await (const event of mgm.stream(request)) {
    if (event.type === 'text') yield event
    else {
      const { text, finishReason } = event.answer
      yield { type: 'done', text, finishReason, timings: timingsOf(event.answer) }
    }
  }
}

/** A prompt that the model writes, and its drawing. */
export async function* generateEvents(mgm: MiniGemini, request: ChatRequest, draw: DrawOptions): Events {
  for await (const event of mgm.streamGenerate({ ...request, ...draw, previews: true })) {
    if (event.type === 'step') yield await stepEvent(event)
    else if (event.type !== 'done') yield event
    else {
      const { text, prompt, images, warnings, answer } = event.result
      yield {
        type: 'drawn',
        text,
        prompt,
        timings: timingsOf(answer),
        images: images.map(wireImage),
        warnings,
      }
    }
  }
}

/** The drawing of a prompt. */
export async function* drawEvents(mgm: MiniGemini, request: ImagineRequest): Events {
  type Event = { step: ImageStep } | { result: Awaited<ReturnType<MiniGemini['imagine']>> }
  const events = follow<Event>(request.signal, async (emit, signal) => ({
    result: await mgm.imagine({ ...request, previews: true, onStep: step => emit({ step }), signal }),
  }))
  for await (const event of events) {
    if ('step' in event) yield await stepEvent(event.step)
    else {
      const { prompt, images, warnings } = event.result
      yield { type: 'drawn', text: '', prompt, timings: null, images: images.map(wireImage), warnings }
    }
  }
}

function timingsOf({ timings }: Answer): WireTimings {
  const { timeToFirstTokenMs, tokensPerSecond, visionMs, totalMs } = timings
  return { timeToFirstTokenMs, tokensPerSecond, visionMs, totalMs }
}

async function stepEvent({ step, steps, preview }: ImageStep): Promise<WireEvent> {
  const file = preview && (await encodeImage(preview, 'png'))
  return { type: 'step', step, steps, preview: file ? pngUrl(file) : null }
}

function wireImage({ data, width, height, seed, timings }: GeneratedImage): WireImage {
  const drawMs = timings.denoiseMs + timings.decodeMs
  return { url: pngUrl(data), width, height, seed: Number(seed), drawMs }
}

function pngUrl(file: Uint8Array): string {
  return `data:image/png;base64,${Buffer.from(file.buffer, file.byteOffset, file.length).toString('base64')}`
}
