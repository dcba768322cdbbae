/** Seeded random numbers (mulberry32). Print `seed` in a test's name or message so that a failure can be repeated. */
export class Random {
  readonly seed: number
  #state: number
  constructor(seed = (Math.random() * 2 ** 32) >>> 0) {
    this.seed = seed
    this.#state = seed
  }
  /** Uniform in [0, 1). */
  next(): number {
    this.#state = (this.#state + 0x6d2b79f5) | 0
    let t = Math.imul(this.#state ^ (this.#state >>> 15), 1 | this.#state)
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32
  }
  /** An integer in [low, high]. */
  integer(low: number, high: number): number {
    return low + Math.floor(this.next() * (high - low + 1))
  }
  /** Standard normal (Box-Muller). */
  normal(): number {
    return Math.sqrt(-2 * Math.log(1 - this.next())) * Math.cos(2 * Math.PI * this.next())
  }
  /** f32 normals times `scale`. */
  normals(count: number, scale = 1): Float32Array {
    return Float32Array.from({ length: count }, () => this.normal() * scale)
  }
}

/** Seeded integers in [0, n). */
export function random(seed: number): (n: number) => number {
  const numbers = new Random(seed)
  return n => Math.floor(numbers.next() * n)
}
