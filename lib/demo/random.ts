/**
 * Numbers for the demo world, the same on every machine: sfc32, keyed by a seed and the name of what is drawn, so that
 * drawing more for one purpose never moves another. Only integer arithmetic and exact division are used.
 */
export class Random {
  #a: number
  #b: number
  #c: number
  #counter = 1

  /** seed: an integer from 0 to 2^53 - 1. */
  constructor(seed: number, stream: string) {
    this.#a = seed >>> 0
    this.#b = Math.floor(seed / 2 ** 32)
    this.#c = fnv1a(stream)
    // sfc32's author mixes a fresh key this often.
    for (let i = 0; i < 15; i++) this.#bits()
  }

  #bits(): number {
    const result = (this.#a + this.#b + this.#counter) | 0
    this.#counter = (this.#counter + 1) | 0
    this.#a = this.#b ^ (this.#b >>> 9)
    this.#b = (this.#c + (this.#c << 3)) | 0
    this.#c = (((this.#c << 21) | (this.#c >>> 11)) + result) | 0
    return result >>> 0
  }

  /** Uniform in [0, 1), a multiple of 2^-32. */
  unit(): number {
    return this.#bits() / 2 ** 32
  }

  /** Uniform in [least, most). */
  between(least: number, most: number): number {
    return least + (most - least) * this.unit()
  }

  /** A uniform integer in [0, count). */
  below(count: number): number {
    return Math.floor(this.unit() * count)
  }

  chance(probability: number): boolean {
    return this.unit() < probability
  }

  pick<T>(values: readonly T[]): T {
    if (values.length === 0) throw new RangeError('nothing to pick from')
    return values[this.below(values.length)]!
  }

  /** An index, drawn in proportion to the weights. */
  weighted(weights: readonly number[]): number {
    let left = this.unit() * weights.reduce((sum, weight) => sum + weight, 0)
    for (const [i, weight] of weights.entries()) {
      left -= weight
      if (left < 0) return i
    }
    return weights.findLastIndex(weight => weight > 0)
  }

  shuffle<T>(values: readonly T[]): T[] {
    const result = [...values]
    for (let i = result.length - 1; i > 0; i--) {
      const j = this.below(i + 1)
      ;[result[i], result[j]] = [result[j]!, result[i]!]
    }
    return result
  }
}

/** The 32-bit FNV-1a hash of an ASCII string. */
export function fnv1a(text: string): number {
  let hash = 0x811c9dc5
  for (let i = 0; i < text.length; i++) hash = Math.imul(hash ^ text.charCodeAt(i), 0x01000193)
  return hash >>> 0
}
