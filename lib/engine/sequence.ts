export type SequenceState = 'new' | 'waiting' | 'running' | 'finished'

/** One request as the scheduler knows it: how long it is, how much of it lies in the KV cache, which pages it holds. */
export class Sequence {
  /** Positions of the prompt, pictures expanded. */
  readonly promptLength: number
  /** Most ids that may be generated. */
  readonly maxTokens: number
  /** Ids generated so far. */
  readonly tokens: number[] = []
  /** Pages in order of position; owned by the scheduler. */
  pages: number[] = []
  /** Positions whose keys and values lie in the pages. */
  computed = 0
  state: SequenceState = 'new'
  /** Order of admission to the queue: smaller is older. */
  arrival = -1
  /** How often the pages were taken away. */
  preemptions = 0

  constructor(promptLength: number, maxTokens: number) {
    this.promptLength = promptLength
    this.maxTokens = maxTokens
  }

  /** Positions known: the prompt and what was generated. */
  get length(): number {
    return this.promptLength + this.tokens.length
  }
  /** Positions still to be computed before the next id can be drawn. */
  get remaining(): number {
    return this.length - this.computed
  }
  /** Everything but the newest id lies in the cache. */
  get isDecoding(): boolean {
    return this.tokens.length > 0 && this.remaining === 1
  }
}
