import { expected, MgmError } from '../errors.ts'

/**
 * Owns the pages of the KV cache: who holds which, and which are free. Knows numbers only, never a tensor.
 *
 * A page may have several holders (`retain`); it is free again when the last one has released it.
 */
export class BlockManager {
  readonly pages: number
  /** Positions a page holds. */
  readonly pageSize: number
  readonly #refs: Uint32Array
  readonly #free: number[]

  constructor(pages: number, pageSize: number) {
    if (!Number.isSafeInteger(pages) || pages < 1) throw expected('a positive integer', 'pages', pages)
    if (!Number.isSafeInteger(pageSize) || pageSize < 1)
      throw expected('a positive integer', 'pageSize', pageSize)
    this.pages = pages
    this.pageSize = pageSize
    this.#refs = new Uint32Array(pages)
    this.#free = Array.from({ length: pages }, (_, i) => pages - 1 - i)
  }

  get free(): number {
    return this.#free.length
  }
  get used(): number {
    return this.pages - this.#free.length
  }
  /** Positions that all pages together hold. */
  get capacity(): number {
    return this.pages * this.pageSize
  }

  /** Pages that `positions` positions take. */
  pagesFor(positions: number): number {
    return Math.ceil(positions / this.pageSize)
  }

  /** Takes `count` free pages, each with one holder; undefined, and nothing taken, if there are fewer. */
  allocate(count: number): number[] | undefined {
    if (count > this.#free.length) return undefined
    const pages = this.#free.splice(this.#free.length - count, count).reverse()
    for (const page of pages) this.#refs[page] = 1
    return pages
  }

  /** Adds a holder to each of the pages. */
  retain(pages: readonly number[]): void {
    for (const page of pages) this.#refs[this.#held(page)]!++
  }

  /** Drops a holder of each of the pages. */
  release(pages: readonly number[]): void {
    for (const page of pages) if (--this.#refs[this.#held(page)]! === 0) this.#free.push(page)
  }

  /** Number of holders of a page. */
  holders(page: number): number {
    return this.#refs[page] ?? 0
  }

  #held(page: number): number {
    if (!this.#refs[page]) throw new MgmError('INTERNAL', `expected a page in use but received page ${page}`)
    return page
  }
}
