import type { Tokenizer } from '../processing/tokenizer.ts'
import type { Drawn } from './sampler.ts'
import { AnswerText } from './text.ts'

/** Why an answer ended: an end id or stop string, or the limit of tokens or context. */
export type FinishReason = 'stop' | 'length'

/** An id of the answer with its log-probability, and those of the most likely ids at its place. */
export interface TokenLogprob {
  readonly id: number
  /** The id's own text; a part of a character shows as U+FFFD. */
  readonly token: string
  readonly logprob: number
  readonly top: readonly { readonly id: number; readonly token: string; readonly logprob: number }[]
}

/** Times in milliseconds. */
export interface Timings {
  /** Waiting for a place, before the pictures and after them. */
  readonly queueMs: number
  /** Reading, decoding and resizing pictures. */
  readonly imageMs: number
  /** Encoding pictures, from when they were ready. */
  readonly visionMs: number
  /** From the first step to the first id. */
  readonly prefillMs: number
  /** From the first id to the last. */
  readonly decodeMs: number
  readonly totalMs: number
  readonly timeToFirstTokenMs: number
  /** Ids after the first per second of `decodeMs`; 0 where there is only one. */
  readonly tokensPerSecond: number
}

export interface Answer {
  /** The ids decoded without special tokens and stripped; ends before the end id or stop string. */
  readonly text: string
  /** Generated ids, the end id included when it ended the answer. */
  readonly tokens: readonly number[]
  readonly finishReason: FinishReason
  readonly usage: {
    /** Positions of the prompt, those of pictures included. */
    readonly promptTokens: number
    readonly imageTokens: number
    readonly completionTokens: number
  }
  readonly timings: Timings
  /** One for each of `tokens`, where asked for. */
  readonly logprobs?: readonly TokenLogprob[]
}

export interface StopConditions {
  /** Ids that end the answer and have no text in it. */
  readonly ids: ReadonlySet<number>
  /** The text ends before the first of these. */
  readonly strings: readonly string[]
  readonly maxTokens: number
}

/** An answer as it grows id by id. */
export class AnswerBuilder {
  readonly #tokenizer: Tokenizer
  readonly #stop: StopConditions
  readonly #tokens: number[]
  readonly #text: AnswerText
  readonly #logprobs: TokenLogprob[] | undefined
  #finishReason: FinishReason | undefined

  /** `tokens` is the list to append the ids to. */
  constructor(tokenizer: Tokenizer, stop: StopConditions, options: { tokens: number[]; logprobs: boolean }) {
    this.#tokenizer = tokenizer
    this.#stop = stop
    this.#tokens = options.tokens
    this.#text = new AnswerText(tokenizer.createStream({ skipSpecialTokens: true }), stop.strings)
    this.#logprobs = options.logprobs ? [] : undefined
  }

  /** Undefined while the answer goes on. */
  get finishReason(): FinishReason | undefined {
    return this.#finishReason
  }
  get text(): string {
    return this.#text.text
  }
  get logprobs(): readonly TokenLogprob[] | undefined {
    return this.#logprobs
  }

  /** Takes the next id; returns the text that has become certain. */
  push(drawn: Drawn): string {
    const { id } = drawn
    this.#tokens.push(id)
    const name = (token: number) => this.#tokenizer.decode([token])
    this.#logprobs?.push({
      id,
      token: name(id),
      logprob: drawn.logprob,
      top: drawn.top.map(entry => ({ ...entry, token: name(entry.id) })),
    })
    if (this.#stop.ids.has(id)) {
      this.#finishReason = 'stop'
      return this.#text.finish()
    }
    const delta = this.#text.push(id)
    if (!this.#text.isStopped && this.#tokens.length < this.#stop.maxTokens) return delta
    const last = this.#text.finish()
    this.#finishReason = this.#text.isStopped ? 'stop' : 'length'
    return delta + last
  }
}
