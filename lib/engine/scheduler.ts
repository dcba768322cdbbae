import { expected, MgmError } from '../errors.ts'
import type { BlockManager } from './block-manager.ts'
import type { Sequence } from './sequence.ts'

export interface SchedulerOptions {
  /** Most positions computed in one step; more than `maxSequences`, so that prefill always advances. */
  tokenBudget: number
  /** Most sequences that run at once. */
  maxSequences: number
  /** Most sequences that wait. */
  maxQueue: number
  /** Most positions of one sequence, besides what the pages allow. */
  maxContext: number
}

/** Positions `start .. start + count` of a sequence, to be computed in this step. */
export interface StepItem<S extends Sequence> {
  readonly sequence: S
  readonly start: number
  readonly count: number
  /** These are the last known positions: the next id is drawn from the last one's logits. */
  readonly samples: boolean
}

/**
 * Decides what each step computes. First come, first served; every step fills its budget of positions with decodes
 * first, then with chunks of prefill, oldest first.
 *
 * A sequence gets the pages of all its known positions when it starts to run, so only a decode can run out of pages;
 * then the newest running sequence gives its pages back, waits at the front and is computed again. Therefore every
 * running sequence is older than every waiting one, the oldest always advances and none starves.
 */
export class Scheduler<S extends Sequence> {
  readonly options: Readonly<SchedulerOptions>
  readonly #blocks: BlockManager
  /** Both by arrival, oldest first. */
  #waiting: S[] = []
  #running: S[] = []
  #arrivals = 0
  #preemptions = 0

  constructor(blocks: BlockManager, options: SchedulerOptions) {
    for (const key of ['tokenBudget', 'maxSequences', 'maxQueue', 'maxContext'] as const) {
      const value = options[key]
      if (!Number.isSafeInteger(value) || value < (key === 'maxQueue' ? 0 : 1))
        throw expected('a positive integer', key, value)
    }
    if (options.tokenBudget <= options.maxSequences)
      throw expected(`more than maxSequences (${options.maxSequences})`, 'tokenBudget', options.tokenBudget)
    this.#blocks = blocks
    this.options = { ...options }
  }

  get waiting(): readonly S[] {
    return this.#waiting
  }
  get running(): readonly S[] {
    return this.#running
  }
  get isIdle(): boolean {
    return this.#waiting.length === 0 && this.#running.length === 0
  }
  get preemptions(): number {
    return this.#preemptions
  }

  /** Most positions, prompt and answer together, that one sequence can have. */
  get capacity(): number {
    return Math.min(this.options.maxContext, this.#blocks.capacity)
  }

  /** How many ids can follow a prompt. Throws CONTEXT_OVERFLOW if not even one can. */
  roomFor(promptLength: number): number {
    const room = this.capacity - promptLength
    if (room < 1) {
      const { maxContext } = this.options
      const cause =
        maxContext <= this.#blocks.capacity
          ? `the model's context is ${maxContext}`
          : `the KV cache holds ${this.#blocks.capacity} (${this.#blocks.pages} pages of ${this.#blocks.pageSize}; see kvMemory)`
      throw new MgmError(
        'CONTEXT_OVERFLOW',
        `expected a prompt of at most ${this.capacity - 1} positions for messages but received one of ${promptLength}: ${cause}, and the answer needs at least one`,
      )
    }
    return room
  }

  /** Queues a new sequence. Throws CONTEXT_OVERFLOW for what could never fit, QUEUE_FULL when too many wait. */
  add(sequence: S): void {
    if (sequence.state !== 'new')
      throw new MgmError('INTERNAL', `expected a new sequence but received a ${sequence.state} one`)
    if (sequence.promptLength < 1)
      throw expected('at least one position', 'the prompt', sequence.promptLength)
    const room = this.roomFor(sequence.promptLength)
    if (sequence.maxTokens > room)
      throw new MgmError(
        'CONTEXT_OVERFLOW',
        `expected at most ${room} new tokens after ${sequence.promptLength} positions but received ${sequence.maxTokens}`,
      )
    // What can run at once is not queueing.
    const places = Math.max(0, this.options.maxSequences - this.#running.length)
    if (this.#waiting.length >= this.options.maxQueue + places)
      throw new MgmError(
        'QUEUE_FULL',
        `${this.#waiting.length} requests wait already (maxQueue ${this.options.maxQueue}); try again later`,
      )
    sequence.arrival = this.#arrivals++
    sequence.state = 'waiting'
    this.#waiting.push(sequence)
  }

  /** What to compute next; empty if there is nothing to do. Each item must be followed by `advance` (or `remove`). */
  schedule(): StepItem<S>[] {
    const items: StepItem<S>[] = []
    let budget = this.options.tokenBudget

    for (const sequence of [...this.#running]) {
      if (sequence.state !== 'running' || !sequence.isDecoding) continue
      if (!this.#growOne(sequence)) continue
      items.push(item(sequence, 1))
      budget--
    }

    for (const sequence of this.#running) {
      if (budget === 0) break
      if (sequence.isDecoding) continue
      const next = item(sequence, Math.min(sequence.remaining, budget))
      items.push(next)
      budget -= next.count
    }

    while (budget > 0 && this.#running.length < this.options.maxSequences) {
      const sequence = this.#waiting[0]
      if (!sequence || !this.#admit(sequence)) break
      this.#waiting.shift()
      const next = item(sequence, Math.min(sequence.remaining, budget))
      items.push(next)
      budget -= next.count
    }
    return items
  }

  /** The item has been computed: its positions lie in the cache. */
  advance({ sequence, start, count }: StepItem<S>): void {
    if (sequence.state !== 'running' || sequence.computed !== start) return
    sequence.computed = start + count
  }

  /** Ends a sequence, finished or not, and frees its pages. Does nothing for one that has ended. */
  remove(sequence: S): void {
    if (sequence.state === 'finished') return
    const queue = sequence.state === 'running' ? this.#running : this.#waiting
    const at = queue.indexOf(sequence)
    if (at >= 0) queue.splice(at, 1)
    this.#drop(sequence)
    sequence.state = 'finished'
  }

  /** Takes a waiting sequence's pages and lets it run, if as many are left as the running decodes may soon want. */
  #admit(sequence: S): boolean {
    const needed = this.#blocks.pagesFor(sequence.length + 1)
    if (needed + this.#running.length > this.#blocks.free && this.#running.length > 0) return false
    const pages = this.#blocks.allocate(this.#blocks.pagesFor(sequence.length))
    if (!pages) return false
    sequence.pages = pages
    sequence.state = 'running'
    this.#running.push(sequence)
    return true
  }

  /** Makes room for one more position, taking it from the newest if need be. False if that was this sequence itself. */
  #growOne(sequence: S): boolean {
    while (sequence.pages.length * this.#blocks.pageSize < sequence.length) {
      const page = this.#blocks.allocate(1)
      if (page) {
        sequence.pages.push(page[0]!)
        continue
      }
      const newest = this.#running[this.#running.length - 1]!
      this.#preempt(newest)
      if (newest === sequence) return false
    }
    return true
  }

  #preempt(sequence: S): void {
    this.#running.splice(this.#running.indexOf(sequence), 1)
    this.#drop(sequence)
    sequence.state = 'waiting'
    sequence.preemptions++
    this.#preemptions++
    this.#waiting.unshift(sequence)
  }

  #drop(sequence: S): void {
    this.#blocks.release(sequence.pages)
    sequence.pages = []
    sequence.computed = 0
  }
}

function item<S extends Sequence>(sequence: S, count: number): StepItem<S> {
  const start = sequence.computed
  return { sequence, start, count, samples: start + count === sequence.length }
}
