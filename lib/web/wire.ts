import type { Scene } from '../demo/scene.ts'

// What the page and the server say to each other. Plain JSON, so that the page needs none of the library's types.

/** `GET /api/info`. */
export interface InfoReply {
  readonly about: string
  readonly family: string
  readonly device: string
  readonly threads: number
  readonly weightBytes: number
  readonly canDraw: boolean
  /** Side of drawn images in pixels; null without a generator. */
  readonly drawnPixels: number | null
  /** Side of the scenes that `POST /api/scene` draws. */
  readonly scenePixels: number
  readonly limits: { readonly bodyBytes: number; readonly pixels: number }
}

/** `GET /api/scene`: two scenes of a seed and what one may ask about them. */
export interface SceneReply {
  readonly seed: number
  readonly scenes: readonly [Scene, Scene]
  readonly questions: {
    readonly first: readonly string[]
    readonly both: readonly string[]
    readonly draw: readonly string[]
  }
}

export type WirePart =
  | { readonly type: 'text'; readonly text: string }
  /** A `data:` URL. */
  | { readonly type: 'image'; readonly image: string }

export interface WireMessage {
  readonly role: 'system' | 'user' | 'assistant'
  readonly content: string | readonly WirePart[]
  readonly gen?: boolean
}

export interface WireDraw {
  readonly steps?: number
  readonly guidance?: number
  readonly seed?: number
}

/** `POST /api/chat`. With `draw` the model is asked for a prompt, which is then drawn. */
export interface ChatBody {
  readonly messages: readonly WireMessage[]
  readonly maxTokens?: number
  readonly temperature?: number
  readonly seed?: number
  readonly draw?: WireDraw
}

/** `POST /api/draw`: draws a prompt as it is. */
export interface DrawBody extends WireDraw {
  readonly prompt: string
}

/** Times of an answer in milliseconds. */
export interface WireTimings {
  readonly timeToFirstTokenMs: number
  readonly tokensPerSecond: number
  readonly visionMs: number
  readonly totalMs: number
}

export interface WireImage {
  /** A `data:` URL of a PNG file. */
  readonly url: string
  readonly width: number
  readonly height: number
  readonly seed: number
  readonly drawMs: number
}

export interface WireError {
  readonly code: string
  readonly message: string
}

/** The data of an event of `POST /api/chat` and `POST /api/draw`. The last one is `done` or `error`. */
export type WireEvent =
  | { readonly type: 'text'; readonly delta: string }
  | { readonly type: 'prompt'; readonly prompt: string }
  | { readonly type: 'step'; readonly step: number; readonly steps: number; readonly preview: string | null }
  | {
      readonly type: 'done'
      readonly text: string
      readonly timings: WireTimings
      readonly finishReason: string
    }
  | {
      readonly type: 'drawn'
      readonly text: string
      /** Null where the model wrote none; then there are no images. */
      readonly prompt: string | null
      readonly timings: WireTimings | null
      readonly images: readonly WireImage[]
      readonly warnings: readonly string[]
    }
  | { readonly type: 'error'; readonly error: WireError }
