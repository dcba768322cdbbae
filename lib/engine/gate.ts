import { abortable } from './abort.ts'

/** A counted gate: at most `places` are inside, the others wait in order of arrival. */
export class Gate {
  #places: number
  readonly #waiting: (() => void)[] = []

  constructor(places: number) {
    this.#places = places
  }

  get waiting(): number {
    return this.#waiting.length
  }

  /** Resolves to the function that gives the place back; calling it again does nothing. */
  async enter(signal: AbortSignal): Promise<() => void> {
    signal.throwIfAborted()
    if (this.#places > 0) this.#places--
    else {
      let open!: () => void
      const turn = new Promise<void>(resolve => {
        open = resolve
      })
      this.#waiting.push(open)
      try {
        await abortable(turn, signal)
      } catch (error) {
        const at = this.#waiting.indexOf(open)
        if (at >= 0) this.#waiting.splice(at, 1)
        // The turn had come at the same moment: pass it on.
        else this.#leave()
        throw error
      }
    }
    let left = false
    return () => {
      if (!left) this.#leave()
      left = true
    }
  }

  #leave(): void {
    const next = this.#waiting.shift()
    if (next) next()
    else this.#places++
  }
}
