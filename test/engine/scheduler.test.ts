import { describe, expect, it } from 'vitest'
import { BlockManager } from '../../lib/engine/block-manager.ts'
import { Scheduler, type StepItem } from '../../lib/engine/scheduler.ts'
import { Sequence } from '../../lib/engine/sequence.ts'
import { MgmError } from '../../lib/errors.ts'
import { random } from '../helpers/random.ts'

function setup(
  options: Partial<{
    pages: number
    pageSize: number
    tokenBudget: number
    maxSequences: number
    maxQueue: number
    maxContext: number
  }> = {},
) {
  const { pages = 64, pageSize = 4, ...rest } = options
  const blocks = new BlockManager(pages, pageSize)
  const scheduler = new Scheduler<Sequence>(blocks, {
    tokenBudget: 16,
    maxSequences: 4,
    maxQueue: 100,
    maxContext: 200,
    ...rest,
  })
  return { blocks, scheduler }
}

const brief = (items: StepItem<Sequence>[]) =>
  items.map(({ sequence, start, count, samples }) => [sequence.arrival, start, count, samples])

/** Plays the runner: computes the items, draws an id where one is due, ends what is complete. */
function play(scheduler: Scheduler<Sequence>, items: StepItem<Sequence>[]): Sequence[] {
  const ended: Sequence[] = []
  for (const item of items) {
    scheduler.advance(item)
    if (!item.samples || item.sequence.state !== 'running') continue
    item.sequence.tokens.push(1)
    if (item.sequence.tokens.length === item.sequence.maxTokens) {
      scheduler.remove(item.sequence)
      ended.push(item.sequence)
    }
  }
  return ended
}

const codeOf = (body: () => unknown): string => {
  try {
    body()
  } catch (error) {
    if (error instanceof MgmError) return `${error.code}: ${error.message}`
    throw error
  }
  return 'no error'
}

describe('Scheduler', () => {
  it('cuts prefill into chunks of the budget and draws after the last one', () => {
    const { scheduler } = setup()
    const sequence = new Sequence(37, 2)
    scheduler.add(sequence)
    const seen: unknown[] = []
    while (!scheduler.isIdle) {
      const items = scheduler.schedule()
      seen.push(...brief(items))
      play(scheduler, items)
    }
    expect(seen).toEqual([
      [0, 0, 16, false],
      [0, 16, 16, false],
      [0, 32, 5, true],
      [0, 37, 1, true],
    ])
  })

  it('serves decodes before prefill, oldest first, within the budget', () => {
    const { scheduler } = setup()
    for (const length of [3, 30, 20]) scheduler.add(new Sequence(length, 50))
    expect(brief(scheduler.schedule())).toEqual([
      [0, 0, 3, true],
      [1, 0, 13, false],
    ])
    play(scheduler, scheduler.schedule())
    expect(brief(scheduler.schedule())).toEqual([
      [0, 3, 1, true],
      [1, 13, 15, false],
    ])
    play(scheduler, scheduler.schedule())
    expect(brief(scheduler.schedule())).toEqual([
      [0, 4, 1, true],
      [1, 28, 2, true],
      [2, 0, 13, false],
    ])
  })

  it('runs a prompt that fills its pages exactly, and one that fills the whole pool but one position', () => {
    const { scheduler, blocks } = setup({ pages: 4, pageSize: 4 })
    for (const [prompt, tokens] of [
      [4, 5],
      [8, 8],
      [15, 1],
      [12, 4],
    ] as const) {
      const sequence = new Sequence(prompt, tokens)
      scheduler.add(sequence)
      let steps = 0
      while (!scheduler.isIdle && steps++ < 100) play(scheduler, scheduler.schedule())
      expect(sequence.tokens.length).toBe(tokens)
      expect(blocks.free).toBe(4)
    }
  })

  it('preempts the newest at a page border and computes it again from the start', () => {
    const { scheduler, blocks } = setup({ pages: 5, pageSize: 4 })
    const [old, young] = [new Sequence(6, 10), new Sequence(7, 5)]
    scheduler.add(old)
    scheduler.add(young)
    for (let i = 0; i < 3; i++) play(scheduler, scheduler.schedule())
    expect([old.length, young.length]).toEqual([9, 10])
    // The young one took the last page; now the old one's ninth position needs one.
    const items = scheduler.schedule()
    expect(brief(items)).toEqual([[0, 8, 1, true]])
    expect([young.state, young.computed, young.pages, young.preemptions]).toEqual(['waiting', 0, [], 1])
    const ended = play(scheduler, items)
    let steps = 0
    while (!scheduler.isIdle && steps++ < 100) ended.push(...play(scheduler, scheduler.schedule()))
    expect(ended).toEqual([old, young])
    expect([old.tokens.length, young.tokens.length]).toEqual([10, 5])
    expect(blocks.free).toBe(5)
  })

  it('refuses what can never fit, with the numbers', () => {
    const { scheduler } = setup({ pages: 4, pageSize: 4, maxContext: 200 })
    expect(codeOf(() => scheduler.add(new Sequence(16, 1)))).toMatch(
      /^CONTEXT_OVERFLOW: expected a prompt of at most 15 positions .* received one of 16: the KV cache holds 16 \(4 pages of 4/,
    )
    expect(codeOf(() => scheduler.add(new Sequence(10, 7)))).toMatch(
      /^CONTEXT_OVERFLOW: expected at most 6 new/,
    )
    const wide = setup({ maxContext: 20 }).scheduler
    expect(codeOf(() => wide.roomFor(20))).toMatch(/received one of 20: the model's context is 20/)
    expect(wide.roomFor(19)).toBe(1)
    expect(scheduler.isIdle).toBe(true)
  })

  it('refuses more than the queue holds', () => {
    const { scheduler } = setup({ maxSequences: 2, maxQueue: 3 })
    for (let i = 0; i < 5; i++) scheduler.add(new Sequence(4, 4))
    expect(codeOf(() => scheduler.add(new Sequence(4, 4)))).toMatch(/^QUEUE_FULL/)
    scheduler.remove(scheduler.waiting[1]!)
    scheduler.add(new Sequence(4, 4))
  })

  it('refuses a budget that could starve prefill', () => {
    expect(codeOf(() => setup({ tokenBudget: 4, maxSequences: 4 }))).toMatch(
      /expected more than maxSequences \(4\) for tokenBudget but received 4/,
    )
  })

  it('ignores the results of a sequence that was removed or preempted meanwhile', () => {
    const { scheduler, blocks } = setup()
    const sequence = new Sequence(20, 5)
    scheduler.add(sequence)
    const items = scheduler.schedule()
    scheduler.remove(sequence)
    scheduler.remove(sequence)
    scheduler.advance(items[0]!)
    expect([sequence.state, sequence.computed, blocks.used]).toEqual(['finished', 0, 0])
  })

  it.each(Array.from({ length: 60 }, (_, seed) => seed))(
    'finishes every request once and loses no page, whatever comes (seed %i)',
    seed => {
      const rng = random(seed)
      const pageSize = 1 + rng(6)
      const pages = 2 + rng(12)
      const maxSequences = 1 + rng(6)
      const { scheduler, blocks } = setup({
        pages,
        pageSize,
        maxSequences,
        tokenBudget: maxSequences + 1 + rng(12),
        maxQueue: rng(10),
        maxContext: 4 + rng(80),
      })
      const open = new Set<Sequence>()
      const ended: Sequence[] = []
      const aborted: Sequence[] = []
      let toCome = 60
      for (let step = 0; toCome > 0 || open.size > 0; step++) {
        expect(step).toBeLessThan(100_000)
        while (toCome > 0 && rng(3) === 0) {
          toCome--
          const promptLength = 1 + rng(pages * pageSize + 4)
          const room = scheduler.capacity - promptLength
          const sequence = new Sequence(promptLength, 1 + rng(Math.max(1, room)))
          const refusal = codeOf(() => scheduler.add(sequence)).split(':')[0]
          if (room < 1) expect(refusal).toBe('CONTEXT_OVERFLOW')
          else if (refusal !== 'QUEUE_FULL') {
            expect(refusal).toBe('no error')
            open.add(sequence)
          }
        }
        const items = scheduler.schedule()

        const positions = items.reduce((sum, item) => sum + item.count, 0)
        expect(positions).toBeLessThanOrEqual(scheduler.options.tokenBudget)
        expect(new Set(items.map(item => item.sequence)).size).toBe(items.length)
        expect(scheduler.running.length).toBeLessThanOrEqual(maxSequences)
        const held = scheduler.running.flatMap(sequence => sequence.pages)
        expect(new Set(held).size).toBe(held.length)
        expect(held.length).toBe(blocks.used)
        for (const { sequence, start, count } of items) {
          expect(count).toBeGreaterThan(0)
          expect(start).toBe(sequence.computed)
          expect(start + count).toBeLessThanOrEqual(sequence.pages.length * pageSize)
        }
        // First come, first served: whoever runs is older than whoever waits.
        const arrivals = [...scheduler.running, ...scheduler.waiting].map(sequence => sequence.arrival)
        expect(arrivals).toEqual([...arrivals].sort((a, b) => a - b))
        // Work there is means work done, and always for the oldest.
        if (!scheduler.isIdle) expect(items.map(item => item.sequence)).toContain(scheduler.running[0])

        if (rng(12) === 0 && open.size > 0) {
          const victim = [...open][rng(open.size)]!
          scheduler.remove(victim)
          open.delete(victim)
          aborted.push(victim)
        }
        for (const sequence of play(scheduler, items)) {
          expect(open.delete(sequence)).toBe(true)
          ended.push(sequence)
        }
      }
      expect(scheduler.isIdle).toBe(true)
      expect(blocks.free).toBe(pages)
      expect(new Set([...ended, ...aborted]).size).toBe(ended.length + aborted.length)
      for (const sequence of ended) expect(sequence.tokens.length).toBe(sequence.maxTokens)
    },
  )
})
