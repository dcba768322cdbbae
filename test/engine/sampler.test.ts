import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { Device } from '../../lib/device.ts'
import { greedy, readSampled, type Sampling, sampleRows } from '../../lib/engine/sampler.ts'
import { random } from '../helpers/random.ts'

let device: Device
beforeAll(() => {
  device = Device.open('cpu', { threads: 1 })
})
afterAll(() => device.close())

async function draw(logits: number[][], rows: { sampling: Partial<Sampling>; tokens?: number[] }[]) {
  const full = rows.map(({ sampling, tokens = [] }) => ({ sampling: { ...greedy, ...sampling }, tokens }))
  const tensor = device.tensor(logits.flat(), [logits.length, logits[0]!.length])
  const sampled = sampleRows(device, tensor, full)
  const drawn = await readSampled(sampled, full)
  for (const one of [tensor, sampled.ids, sampled.logprobs, sampled.topIds]) one?.dispose()
  return drawn
}

describe('sampling', () => {
  it('gives each row its own options', async () => {
    const logits = [4, 3, 2, 1]
    const drawn = await draw(
      [logits, logits, logits, [Number.NaN, 0, 0, 0]],
      [
        { sampling: {} },
        { sampling: { presencePenalty: 2 }, tokens: [0] },
        { sampling: { frequencyPenalty: 0.9 }, tokens: [0, 0, 0, 1, 1] },
        { sampling: {} },
      ],
    )
    expect(drawn.map(({ id }) => id)).toEqual([0, 1, 2, -1])
  })

  it('reports log-probabilities of the raw logits, as many as each row wants', async () => {
    const rng = random(1)
    const logits = [0, 1, 2].map(() => Array.from({ length: 11 }, () => rng(1000) / 100))
    const drawn = await draw(logits, [
      { sampling: { logprobs: 2 } },
      { sampling: {} },
      { sampling: { logprobs: 4, presencePenalty: 5 }, tokens: [3] },
    ])
    expect(drawn.map(({ top }) => top.length)).toEqual([2, 0, 4])
    for (const [r, { id, logprob, top }] of drawn.entries()) {
      const row = logits[r]!
      const norm = Math.log(row.reduce((sum, value) => sum + Math.exp(value), 0))
      expect(logprob).toBeCloseTo(row[id]! - norm, 4)
      const order = row.map((_, i) => i).sort((a, b) => row[b]! - row[a]!)
      expect(top.map(entry => row[entry.id])).toEqual(order.slice(0, top.length).map(i => row[i]))
      for (const entry of top) expect(entry.logprob).toBeCloseTo(row[entry.id]! - norm, 4)
    }
  })

  it('depends on all 64 bits of the seed and on the place, and follows the distribution', async () => {
    const logits = [Math.log(0.5), Math.log(0.3), Math.log(0.2)]
    const of = async (seed: bigint, places: number) => {
      const rows = Array.from({ length: places }, (_, place) => ({
        sampling: { temperature: 1, seed },
        tokens: new Array<number>(place).fill(0),
      }))
      return (await draw(new Array(places).fill(logits), rows)).map(({ id }) => id)
    }
    const first = await of(5n, 200)
    expect(await of(5n, 200)).toEqual(first)
    for (const seed of [6n, 5n + (1n << 32n), 5n + (1n << 63n), -5n])
      expect(await of(seed, 200)).not.toEqual(first)
    // Standard deviation of a share over 3000 draws: below 0.0092.
    const many = await of(99n, 3000)
    for (const [id, share] of [0.5, 0.3, 0.2].entries())
      expect(Math.abs(many.filter(drawn => drawn === id).length / 3000 - share)).toBeLessThan(0.04)
  })
})
