import type { IncrementalDecoder } from '../processing/tokenizer.ts'

/** What Python's `str.strip()` removes; JavaScript's `trim` differs in six characters. */
const SPACE = '[\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]'
const LEADING = new RegExp(`^${SPACE}+`)

const isSpace = new RegExp(`^${SPACE}$`)

/** Length of the text without the spaces at its end. Linear, unlike a `+$` pattern. */
function trimmedLength(text: string): number {
  let end = text.length
  while (end > 0 && isSpace.test(text[end - 1]!)) end--
  return end
}

/**
 * Finds stop strings in a growing text. The match that ends first counts, of those the longest, so that the result does
 * not depend on how the text was cut into pieces.
 */
export class StopStrings {
  readonly #stops: readonly string[]
  #held = ''
  #isStopped = false

  constructor(stops: readonly string[]) {
    this.#stops = stops.filter(stop => stop !== '')
  }

  get isStopped(): boolean {
    return this.#isStopped
  }

  /** The text that is certain to stand before any stop string; what could be the start of one is held back. */
  push(delta: string): string {
    if (this.#isStopped) return ''
    const text = this.#held + delta
    let start = -1
    let end = Number.POSITIVE_INFINITY
    for (const stop of this.#stops) {
      const at = text.indexOf(stop)
      if (at < 0) continue
      if (at + stop.length < end || (at + stop.length === end && at < start)) {
        start = at
        end = at + stop.length
      }
    }
    if (start >= 0) {
      this.#isStopped = true
      this.#held = ''
      return text.slice(0, start)
    }
    const hold = Math.max(0, ...this.#stops.map(stop => overlap(text, stop)))
    this.#held = text.slice(text.length - hold)
    return text.slice(0, text.length - hold)
  }

  /** What was held back, once nothing more comes. */
  flush(): string {
    const text = this.#held
    this.#held = ''
    return text
  }
}

/** Length of the longest end of `text` that is a proper beginning of `stop`. */
function overlap(text: string, stop: string): number {
  for (let length = Math.min(text.length, stop.length - 1); length > 0; length--)
    if (text.endsWith(stop.slice(0, length))) return length
  return 0
}

/** `strip()` of a growing text: spaces at the start vanish, others come when something follows them. */
class Strip {
  #started = false
  #spaces = ''

  push(delta: string): string {
    const text = this.#started ? this.#spaces + delta : delta.replace(LEADING, '')
    if (text === '') return ''
    this.#started = true
    const end = trimmedLength(text)
    this.#spaces = text.slice(end)
    return text.slice(0, end)
  }
}

/** An answer's text as it grows: ids decoded, cut before a stop string, stripped. The deltas joined are `text`. */
export class AnswerText {
  readonly #decoder: IncrementalDecoder
  readonly #stops: StopStrings
  readonly #strip = new Strip()
  #text = ''

  constructor(decoder: IncrementalDecoder, stops: readonly string[]) {
    this.#decoder = decoder
    this.#stops = new StopStrings(stops)
  }

  get text(): string {
    return this.#text
  }
  /** A stop string has come. */
  get isStopped(): boolean {
    return this.#stops.isStopped
  }

  /** The text that one more id makes certain. */
  push(id: number): string {
    return this.#emit(this.#stops.push(this.#decoder.push(id)))
  }

  /** The text that was held back, once no more ids come. */
  finish(): string {
    const last = this.#stops.push(this.#decoder.flush())
    return this.#emit(last + this.#stops.flush())
  }

  #emit(text: string): string {
    const delta = this.#strip.push(text)
    this.#text += delta
    return delta
  }
}
