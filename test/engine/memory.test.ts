import { describe, expect, it } from 'vitest'
import { openCheckpoint } from '../../lib/checkpoint/weights.ts'
import {
  availableMemory,
  formatBytes,
  type MemoryPlan,
  placeLayers,
  planPages,
  weightBytes,
} from '../../lib/engine/memory.ts'
import { MiniGemini } from '../../lib/index.ts'
import { cases, small } from '../e2e/cases.ts'

const plan = (more: Partial<MemoryPlan>): MemoryPlan => ({
  weights: 1000,
  work: 100,
  bytesPerPage: 10,
  pageSize: 16,
  pagesPerSequence: 8,
  maxSequences: 4,
  available: 100_000,
  ...more,
})

describe('planPages', () => {
  it('has pages for every sequence, or fewer where memory is short, at least for one', () => {
    expect(planPages(plan({}))).toBe(32)
    expect(planPages(plan({ available: 1100 + 400 }))).toBe(20)
    expect(planPages(plan({ available: 1100 + 100 }))).toBe(8)
    expect(planPages(plan({ kvMemory: 55 }))).toBe(5)
    expect(planPages(plan({ kvMemory: 1e9 }))).toBe(32)
  })

  it('refuses what does not fit and names both amounts', () => {
    expect(() => planPages(plan({ available: 1100 + 79 }))).toThrow(
      /needs 1.2 KiB \(weights 1000 B, KV cache 80 B, work 100 B\) but 1.2 KiB are available/,
    )
    expect(() => planPages(plan({ kvMemory: 9 }))).toThrow(/expected at least 10 bytes .* received 9/)
  })
})

describe('placeLayers', () => {
  const layers = Array<number>(8).fill(10)

  it('gives each device its share by what is free there, in order', () => {
    expect(placeLayers({ layers, rest: 0, available: [1000] })).toEqual([0, 0, 0, 0, 0, 0, 0, 0])
    expect(placeLayers({ layers, rest: 0, available: [100, 100] })).toEqual([0, 0, 0, 0, 1, 1, 1, 1])
    expect(placeLayers({ layers, rest: 0, available: [50, 150] })).toEqual([0, 0, 1, 1, 1, 1, 1, 1])
    // The first one has the vision towers too.
    expect(placeLayers({ layers, rest: 40, available: [100, 100] })).toEqual([0, 0, 1, 1, 1, 1, 1, 1])
    expect(placeLayers({ layers, rest: 0, available: [100, 100, 100, 100] })).toEqual([
      0, 0, 1, 1, 2, 2, 3, 3,
    ])
  })

  it('refuses what does not fit, naming the device and both amounts', () => {
    expect(() => placeLayers({ layers, rest: 200, available: [150, 1000] })).toThrow(
      /part for GPU 0 of 2 needs 200 B but 150 B are available there/,
    )
  })
})

it.each(cases)('weightBytes comes near to what $name takes', async of => {
  for (const options of [{}, { dtype: 'f32' }, { quantize: 'int8' }] as const) {
    const estimate = weightBytes(openCheckpoint(of.folder), options).total
    const mgm = await MiniGemini.load(of.folder, { ...small, ...options })
    const { weightBytes: real } = mgm.info
    await mgm.close()
    // Panels are padded, which shows at this size.
    expect(estimate / real).toBeGreaterThan(0.6)
    expect(estimate / real).toBeLessThan(1.15)
  }
})

it('availableMemory is a sane number of bytes', () => {
  expect(availableMemory()).toBeGreaterThan(2 ** 20)
  expect(availableMemory()).toBeLessThan(2 ** 50)
})

it('formatBytes', () => {
  expect([0, 1023, 1024, 1.5 * 2 ** 30].map(formatBytes)).toEqual(['0 B', '1023 B', '1.0 KiB', '1.5 GiB'])
})
