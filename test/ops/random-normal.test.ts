import { describe, expect, it } from 'vitest'
import { randomNormal } from '../../lib/ops.ts'
import { expectClose, f32, openDevice, Random } from './helpers.ts'

const device = openDevice()

/** Philox4x32-10 in plain integers. */
function philox(counter: readonly number[], key: readonly number[]): number[] {
  let [c0, c1, c2, c3] = counter.map(BigInt) as [bigint, bigint, bigint, bigint]
  let [k0, k1] = key.map(BigInt) as [bigint, bigint]
  const low = 0xffffffffn
  for (let round = 0; round < 10; round++) {
    const a = c0 * 0xd2511f53n
    const b = c2 * 0xcd9e8d57n
    ;[c0, c1, c2, c3] = [(b >> 32n) ^ c1 ^ k0, b & low, (a >> 32n) ^ c3 ^ k1, a & low]
    k0 = (k0 + 0x9e3779b9n) & low
    k1 = (k1 + 0xbb67ae85n) & low
  }
  return [c0, c1, c2, c3].map(Number)
}

/** The uniform numbers are f32 by contract; what follows from them is f64. */
function normals(seed: readonly number[], count: number): number[] {
  const uniform = (word: number) => Math.fround(Math.fround(word) + 0.5) / 2 ** 32
  const key = [seed[0]! >>> 0, seed[1]! >>> 0]
  return Array.from({ length: Math.ceil(count / 4) }, (_, i) => {
    const words = philox([i, 0, seed[2]! >>> 0, 0], key)
    return [0, 2].flatMap(pair => {
      const radius = Math.sqrt(-2 * Math.log(uniform(words[pair]!)))
      const angle = 2 * Math.PI * uniform(words[pair + 1]!)
      return [radius * Math.cos(angle), radius * Math.sin(angle)]
    })
  })
    .flat()
    .slice(0, count)
}

async function draw(seeds: readonly number[][], shape: readonly number[]): Promise<Float32Array> {
  return f32(randomNormal(device.tensor(seeds.flat(), [seeds.length, 3], 'i32'), shape))
}

// Radii reach 6.7, whose half ulp is 2.4e-7; logarithm, root, cosine and product round once or twice each.
const limit = { absolute: 1e-6 }

describe('randomNormal', () => {
  it('is held against the published answers of Philox4x32-10', async () => {
    // Random123, tests/kat_vectors: zeros, ones, and digits of pi.
    const ones = 0xffffffff
    expect(philox([0, 0, 0, 0], [0, 0])).toEqual([0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8])
    expect(philox([ones, ones, ones, ones], [ones, ones])).toEqual([
      0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd,
    ])
    expect(philox([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0])).toEqual([
      0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1,
    ])
    // The first of them, as normal numbers: words / 2^32 = 0.3990, 0.8805, 0.7357, 0.6055.
    expectClose(await draw([[0, 0, 0]], [4]), normals([0, 0, 0], 4), limit)
  })

  it('follows the formula for any seed, stream and length', async () => {
    const random = new Random()
    for (const count of [1, 2, 3, 4, 5, 255, 256, 257, 1021, 5000]) {
      const seed = [0, 1, 2].map(() => random.integer(-(2 ** 31), 2 ** 31 - 1))
      expectClose(await draw([seed], [count]), normals(seed, count), limit, `seed ${seed} count ${count}`)
    }
  })

  it('has the moments and the tails of the normal distribution', async () => {
    const n = 1_000_000
    const x = await draw([[1, 2, 3]], [n])
    const moments = [1, 2, 3, 4].map(power => x.reduce((sum, value) => sum + value ** power, 0) / n)
    // Five standard errors of each mean: sqrt(var(x^p) / n), var = 1, 2, 15, 96.
    for (const [i, [mean, variance]] of (
      [
        [0, 1],
        [1, 2],
        [0, 15],
        [3, 96],
      ] as const
    ).entries())
      expect(Math.abs(moments[i]! - mean), `moment ${i + 1}`).toBeLessThan(5 * Math.sqrt(variance / n))
    const beyond = (limit: number) => x.reduce((count, value) => count + (Math.abs(value) > limit ? 1 : 0), 0)
    for (const [sigma, share] of [
      [1, 0.31731],
      [2, 0.0455],
      [3, 0.0027],
      [4, 6.334e-5],
    ] as const)
      expect(Math.abs(beyond(sigma) - share * n), `${sigma} sigma`).toBeLessThan(5 * Math.sqrt(share * n))
    // Neighbours, one word's pair and one counter's, are not correlated.
    for (const lag of [1, 2, 4]) {
      let sum = 0
      for (let i = lag; i < n; i++) sum += x[i]! * x[i - lag]!
      expect(Math.abs(sum / n), `lag ${lag}`).toBeLessThan(5 / Math.sqrt(n))
    }
  })

  it('gives a row the same bits alone and in a batch, and its beginning to a shorter one', async () => {
    const seeds = [
      [7, 0, 0],
      [7, 0, 1],
      [7, 1, 0],
      [8, 0, 0],
      [-1, -1, -1],
    ]
    const shape = [9, 5, 7]
    const size = 9 * 5 * 7
    const all = await draw(seeds, shape)
    for (const [b, seed] of seeds.entries()) {
      const row = all.slice(b * size, (b + 1) * size)
      expect(await draw([seed], shape)).toEqual(row)
      expect(await draw([seed], [33])).toEqual(row.slice(0, 33))
      expect((await draw([seed], [3 * size])).slice(0, size)).toEqual(row)
    }
    const firsts = new Set(seeds.map((_, b) => all[b * size]))
    expect(firsts.size).toBe(seeds.length)
  })

  it('makes tensors of the given shape, empty ones too', async () => {
    const seeds = device.tensor([1, 2, 3, 4, 5, 6], [2, 3], 'i32')
    expect(randomNormal(seeds, [3, 4]).shape).toEqual([2, 3, 4])
    expect(randomNormal(seeds, []).shape).toEqual([2])
    expect(randomNormal(seeds, [0, 4]).shape).toEqual([2, 0, 4])
  })

  it('refuses what does not fit', () => {
    expect(() => randomNormal(device.zeros([2, 3]), [4])).toThrow(/i32.* for seeds but received/)
    expect(() => randomNormal(device.tensor([1, 2], [1, 2], 'i32'), [4])).toThrow(/for seeds but received/)
    const seeds = device.tensor([1, 2, 3], [1, 3], 'i32')
    expect(() => randomNormal(seeds, [-1])).toThrow(/for shape but received -1/)
    expect(() => randomNormal(seeds, [1, 2, 3, 4, 5])).toThrow(/at most 4 sizes for shape/)
  })
})
