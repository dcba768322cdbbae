import { expect, it } from 'vitest'
import { randomNormal } from '../../../lib/ops.ts'
import { expectClose, Random } from '../../ops/helpers.ts'
import { cudaTests, floats } from '../helpers.ts'

const MASK = 0xffffffffn

/** Philox4x32-10 in whole numbers of any size. */
function philox(counter: number[], key: number[]): number[] {
  let [a, b, c, d] = counter.map(word => BigInt(word >>> 0)) as [bigint, bigint, bigint, bigint]
  let [low, high] = key.map(word => BigInt(word >>> 0)) as [bigint, bigint]
  for (let round = 0; round < 10; round++) {
    const [first, second] = [a * 0xd2511f53n, c * 0xcd9e8d57n]
    ;[a, b, c, d] = [(second >> 32n) ^ b ^ low, second & MASK, (first >> 32n) ^ d ^ high, first & MASK]
    low = (low + 0x9e3779b9n) & MASK
    high = (high + 0xbb67ae85n) & MASK
  }
  return [a, b, c, d].map(Number)
}

/** The op's formula: sums of a word and 0.5 in f32, all else in f64. */
function normals([low, high, stream]: readonly number[], count: number): number[] {
  const uniform = (word: number) => Math.fround(Math.fround(word) + 0.5) * 2 ** -32
  return Array.from({ length: Math.ceil(count / 4) }, (_, quad) => {
    const words = philox([quad, 0, stream!, 0], [low!, high!])
    return [0, 2].flatMap(at => {
      const radius = Math.sqrt(-2 * Math.log(uniform(words[at]!)))
      const angle = 2 * Math.PI * uniform(words[at + 1]!)
      return [radius * Math.cos(angle), radius * Math.sin(angle)]
    })
  })
    .flat()
    .slice(0, count)
}

// f32: a logarithm and a root of 1 ulp each, and a sine of 2 ulp, times radii up to 6.7.
const limit = { absolute: 1e-6, relative: 5e-7 }

cudaTests('randomNormal on CUDA', cuda => {
  it('has the reference words of Philox4x32-10', () => {
    // Random123's kat_vectors.
    expect(philox([0, 0, 0, 0], [0, 0])).toEqual([0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8])
  })

  it.each([1, 3, 4, 1022, 1024, 4099])('draws rows of %i by the formula', async count => {
    const random = new Random()
    const seeds = [
      [0, 0, 0],
      [random.integer(0, 2 ** 31 - 1), -random.integer(1, 2 ** 31), random.integer(0, 1000)],
      [-1, -1, -1],
    ]
    const t = cuda.inputs(cuda.gpu)
    const drawn = await floats(randomNormal(t.plain(Int32Array.from(seeds.flat()), [3, 3]), [count]))
    const expected = seeds.flatMap(seed => normals(seed, count))
    expectClose(drawn, expected, limit, `seed ${random.seed}`)
  })

  it('draws what the CPU draws, in any shape', async () => {
    const random = new Random()
    const seeds = Int32Array.from({ length: 6 }, () => random.integer(-(2 ** 31), 2 ** 31 - 1))
    await cuda.same({ limit, what: `seed ${random.seed}` }, t =>
      randomNormal(t.plain(seeds, [2, 3]), [9, 7, 4]),
    )
  })

  it('gives a row the same bits alone and among others', async () => {
    const random = new Random()
    const seeds = Int32Array.from({ length: 9 }, () => random.integer(-(2 ** 31), 2 ** 31 - 1))
    const t = cuda.inputs(cuda.gpu)
    const all = await floats(randomNormal(t.plain(seeds, [3, 3]), [1500]))
    for (let b = 0; b < 3; b++) {
      const alone = randomNormal(t.plain(seeds.slice(b * 3, b * 3 + 3), [1, 3]), [1500])
      expect(await floats(alone), `seed ${random.seed}`).toEqual(all.slice(b * 1500, (b + 1) * 1500))
    }
    // Fewer numbers are the first ones.
    const few = await floats(randomNormal(t.plain(seeds.slice(0, 3), [1, 3]), [7]))
    expect(few).toEqual(all.slice(0, 7))
  })
})
