import { existsSync, statSync } from 'node:fs'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import {
  assertFinite,
  lap,
  met,
  RandomWeights,
  type Row,
  race,
  randomF32,
  randomTensor,
  statistics,
  table,
  time,
  versusLimit,
  versusPeer,
} from '../../bench/harness.ts'
import { Device } from '../../lib/device.ts'
import { Loader } from '../../lib/models/loader.ts'

const timing = (seconds: number[], cpu: number[]) => ({ seconds: statistics(seconds), cpu: statistics(cpu) })

describe('statistics', () => {
  it('takes the middle of an odd count and the mean of the middle two of an even one', () => {
    expect(statistics([5, 1, 9])).toEqual({ median: 5, min: 1, max: 9, count: 3 })
    expect(statistics([4, 1, 9, 6])).toEqual({ median: 5, min: 1, max: 9, count: 4 })
    expect(statistics([2])).toEqual({ median: 2, min: 2, max: 2, count: 1 })
  })
  it('orders numbers as numbers and leaves its input alone', () => {
    const values = [10, 9, 100]
    expect(statistics(values).median).toBe(10)
    expect(values).toEqual([10, 9, 100])
  })
  it('refuses an empty list', () => {
    expect(() => statistics([])).toThrow('at least one value')
  })
})

describe('race', () => {
  it('lets everyone take turns, samples limits once a round and does not count warm-ups', async () => {
    const order: string[] = []
    const step = (name: string, laps: number[]) => ({
      name,
      run: async () => {
        order.push(name)
        const seconds = laps.shift()!
        return { seconds, cpu: 2 * seconds }
      },
    })
    const { timings, limits } = await race([step('a', [100, 1, 3, 2]), step('b', [200, 5, 5, 8])], {
      rounds: 3,
      warmup: 1,
      limits: [{ name: 'limit', sample: async () => order.push('limit') }],
    })
    expect(order.join(' ')).toBe('a b limit a b limit a b limit a b')
    expect(timings.get('a')).toEqual(timing([1, 3, 2], [2, 6, 4]))
    expect(timings.get('b')!.seconds).toEqual({ median: 5, min: 5, max: 8, count: 3 })
    expect(limits.get('limit')).toEqual(statistics([3, 6, 9]))
  })
  it('stops at its budget, but not before two rounds', async () => {
    let runs = 0
    const subject = {
      name: 'slow',
      run: async () => {
        runs++
        return undefined
      },
    }
    await race([subject], { rounds: 50, warmup: 0, budget: 0 })
    expect(runs).toBe(2)
  })
  it('measures the wall and the CPU time of what does not measure itself', async () => {
    const [, waiting] = await lap(() => new Promise(resolve => setTimeout(resolve, 60)))
    expect(waiting.seconds).toBeGreaterThan(0.05)
    const [, working] = await lap(async () => {
      const end = process.cpuUsage().user + 30_000
      while (process.cpuUsage().user < end);
    })
    expect(working.cpu).toBeGreaterThan(0.025)
  })
})

describe('rows', () => {
  it('compare with a limit by the best, the median and the CPU time', () => {
    const limit = { name: 'peak', rates: statistics([100e9, 80e9, 60e9]), threads: 2 }
    const row = versusLimit('gemm', 'case', timing([2, 4, 8], [4, 5, 6]), 160e9, limit, 'GFLOP/s', 0.8)
    expect(row.rate).toEqual({ value: 80, unit: 'GFLOP/s' })
    expect(row.against!.best).toBeCloseTo(0.8) // 80 of 100
    expect(row.against!.median).toBeCloseTo(0.5) // 40 of 80
    expect(row.against!.cpu).toBeCloseTo(0.8) // 4 s of two cores
    expect(met(row)).toBe(true)
    expect(met({ ...row, target: 0.81 })).toBe(false)
    expect(met({ bench: 'gemm', case: 'case', timing: row.timing })).toBeUndefined()
  })
  it('compare with a peer by how many times faster ours is', () => {
    const peer = { name: 'peer', timing: timing([9, 12], [18, 18]) }
    const row = versusPeer('vision', 'case', timing([3, 4], [3, 6]), peer, { work: 6e9 })
    expect(row.against).toEqual({ name: 'peer 9.00 s', best: 3, median: 3, cpu: 6 })
    expect(row.rate!.value).toBe(2)
  })
})

describe('table', () => {
  it('aligns its columns and marks what falls short', () => {
    const rows: Row[] = [
      { bench: 'a', case: 'short', timing: timing([0.001], [0.002]) },
      {
        bench: 'longer',
        case: 'c',
        timing: timing([1.5], [3]),
        rate: { value: 12.34, unit: 'GB/s' },
        against: { name: 'limit', best: 0.5, median: 0.4, cpu: 0.45 },
        target: 0.8,
      },
    ]
    const lines = table(rows).split('\n')
    expect(lines).toHaveLength(4)
    const column = lines[0]!.indexOf('best')
    expect(lines[2]!.slice(column)).toMatch(/^1\.00 ms /)
    expect(lines[3]!.slice(column)).toMatch(/^1\.50 s .*12\.3 GB\/s +limit +0\.50 +0\.40 +0\.45 +≥ 0\.8 +NO$/)
    expect(lines[2]).toMatch(/2\.0$/) // cores, and nothing to compare with
  })
  it('picks units by size', () => {
    expect([2e-6, 0.0123, 0.5, 12].map(time)).toEqual(['2.0 µs', '12.30 ms', '500.0 ms', '12.00 s'])
  })
})

describe('random inputs', () => {
  let device: Device
  beforeAll(() => {
    device = Device.open('cpu', { threads: 1 })
  })
  afterAll(() => device.close())

  it('are spread over [-1, 1) and the same every time', () => {
    const values = randomF32(10_000)
    const mean = values.reduce((a, b) => a + b, 0) / values.length
    expect(Math.abs(mean)).toBeLessThan(0.03)
    expect(Math.min(...values)).toBeLessThan(-0.99)
    expect(Math.max(...values)).toBeGreaterThan(0.99)
    expect(values.every(value => value >= -1 && value < 1)).toBe(true)
    expect(randomF32(10_000)).toEqual(values)
  })

  it.each(['f32', 'bf16', 'f16'] as const)(
    'load as %s weights of any shape, and leave no file behind',
    async dtype => {
      let file: string
      {
        using weights = new RandomWeights(dtype, 256 * 64, 256)
        const entry = weights.take('table', [null, 64])
        file = entry.file
        expect(entry.shape).toEqual([256, 64])
        expect(statSync(file).size).toBeGreaterThanOrEqual(entry.offset + entry.byteLength)
        const loader = new Loader(device)
        const values = await loader.f32(entry).readF32()
        expect(values.every(value => Math.abs(value) <= 0.03)).toBe(true)
        expect(Math.max(...values)).toBeGreaterThan(0.029)
        expect(Math.min(...values)).toBeLessThan(-0.029)
        expect(new Set(values).size).toBeGreaterThan(1000)
        await loader.finish()
        loader.dispose()
      }
      expect(existsSync(file)).toBe(false)
    },
  )

  it('are checked to give finite results', async () => {
    const good = randomTensor(device, [3, 5])
    await assertFinite('good', good)
    const bad = device.tensor(Float32Array.of(1, Number.NaN), [2])
    await expect(assertFinite('bad', bad)).rejects.toThrow('finite results for bad but received NaN at 1')
    good.dispose()
    bad.dispose()
  })
})
