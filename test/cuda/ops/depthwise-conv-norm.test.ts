import { expect, it } from 'vitest'
import { depthwiseConvNorm } from '../../../lib/ops.ts'
import { type Case, type Inputs as Data, inputs as draw } from '../../ops/depthwise.ts'
import { Random } from '../../ops/helpers.ts'
import { cudaTests, floats, HALVES, type Inputs } from '../helpers.ts'

function run(t: Inputs, data: Data, x = t.a(data.x, data.shape)) {
  const c = data.shape[3]
  return depthwiseConvNorm(x, t.plain(data.w, [...data.kernel, c]), {
    bias: t.plain(data.bias, [c]),
    normWeight: t.plain(data.normWeight, [c]),
    normBias: t.plain(data.normBias, [c]),
    eps: 1e-6,
  })
}

/** By the largest tiles, or by the kernel that has none. */
function withTile<T>(tile: 'large' | 'plain', body: () => T): T {
  process.env.MGM_CUDA_TILE = tile
  try {
    return body()
  } finally {
    delete process.env.MGM_CUDA_TILE
  }
}

// Sums of 49 f32 products of unit normals, then a division by their deviation: a few 1e-6 on either side, times weights
// up to 4.
const limit = { absolute: 3e-5, relative: 1e-5 }

const cases: Case[] = [
  { shape: [1, 5, 9, 192], kernel: [7, 7] },
  { shape: [2, 3, 20, 64], kernel: [7, 7] },
  { shape: [1, 4, 70, 8], kernel: [7, 7] },
  { shape: [1, 1, 1, 72], kernel: [7, 7] },
  { shape: [1, 2, 17, 768], kernel: [7, 7] },
  { shape: [1, 3, 5, 1536], kernel: [7, 7] },
  { shape: [1, 2, 3, 1544], kernel: [7, 7] },
  { shape: [1, 1, 9, 3072], kernel: [7, 7] },
  // Without tiles: what is no multiple of 8, no 7x7, or wider.
  { shape: [2, 9, 11, 37], kernel: [7, 7] },
  { shape: [1, 1, 1, 1], kernel: [7, 7] },
  { shape: [1, 3, 33, 130], kernel: [3, 3] },
  { shape: [1, 6, 9, 20], kernel: [3, 7] },
  { shape: [1, 2, 3, 5], kernel: [1, 1] },
  { shape: [1, 2, 1, 3100], kernel: [5, 3] },
]

cudaTests('depthwiseConvNorm on the GPU', cuda => {
  for (const c of cases)
    it(`agrees with the CPU: [${c.shape}], kernel ${c.kernel.join('x')}`, async () => {
      const random = new Random()
      for (const dtype of HALVES) {
        const data = draw(c, random)
        const what = `seed ${random.seed}`
        await cuda.same({ dtype, limit, what }, t => run(t, data))
        if (c.shape[3] % 8 === 0)
          await cuda.same({ dtype, limit, what: `large, ${what}` }, t =>
            withTile('large', () => run(t, data)),
          )
      }
    })

  it('agrees on random shapes', async () => {
    const random = new Random()
    for (let i = 0; i < 8; i++) {
      const c: Case = {
        shape: [random.integer(1, 2), random.integer(1, 6), random.integer(1, 30), random.integer(2, 30) * 8],
        kernel: [7, 7],
      }
      const data = draw(c, random)
      const what = `[${c.shape}], seed ${random.seed}`
      await cuda.same({ dtype: HALVES[i % 2]!, limit, what }, t => withTile('large', () => run(t, data)))
    }
  })

  it.each([
    [2, 5, 21, 40],
    [1, 3, 10, 200],
    [1, 1, 9, 1544],
  ])('gives a pixel of [%i, %i, %i, %i] the same bits in every tile and without', async (...shape) => {
    const random = new Random()
    const data = draw({ shape: shape as Case['shape'], kernel: [7, 7] }, random)
    const t = cuda.inputs(cuda.gpu, 'bf16')
    const plain = await floats(withTile('plain', () => run(t, data)))
    expect(await floats(run(t, data)), `seed ${random.seed}`).toEqual(plain)
    expect(await floats(withTile('large', () => run(t, data))), `seed ${random.seed}`).toEqual(plain)
  })

  it('gives a picture the same bits whatever shares the call', async () => {
    const random = new Random()
    const data = draw({ shape: [3, 5, 19, 48], kernel: [7, 7] }, random)
    const t = cuda.inputs(cuda.gpu, 'f16')
    const x = t.a(data.x, data.shape)
    const all = await floats(run(t, data, x))
    const size = all.length / 3
    for (let b = 0; b < 3; b++)
      expect(await floats(run(t, data, x.narrow(0, b, 1))), `seed ${random.seed}`).toEqual(
        all.slice(b * size, (b + 1) * size),
      )
    // At an address that the tiles' copies cannot take.
    const odd = t
      .a([0, ...data.x], [data.x.length + 1])
      .narrow(0, 1, data.x.length)
      .reshape(...data.shape)
    expect(await floats(run(t, data, odd)), `seed ${random.seed}`).toEqual(all)
  })

  it('keeps its digits when channels share a large offset', async () => {
    const random = new Random()
    const data = draw({ shape: [1, 3, 9, 64], kernel: [7, 7] }, random)
    data.bias.fill(4096)
    // The sums are rounded to f32 near 4096 (2.4e-4 each) on either side.
    const wide = { absolute: 1e-2 }
    await cuda.same({ dtype: 'bf16', limit: wide, what: `seed ${random.seed}` }, t => run(t, data))
  })

  it('gives the norm bias where all channels are equal', async () => {
    const data = draw({ shape: [1, 4, 4, 32], kernel: [7, 7] }, new Random())
    data.w.fill(0)
    data.bias.fill(3)
    await cuda.same({ dtype: 'f16', limit: { absolute: 0 }, what: 'no deviation' }, t => run(t, data))
  })

  it('keeps what is not a number to the pixels that see it', async () => {
    const random = new Random()
    const data = draw({ shape: [1, 9, 20, 64], kernel: [7, 7] }, random)
    data.x[(0 * 20 + 4) * 64 + 5] = Number.POSITIVE_INFINITY
    data.x[(8 * 20 + 18) * 64 + 50] = Number.NaN
    await cuda.same({ dtype: 'bf16', limit, what: `seed ${random.seed}` }, t => run(t, data))
  })
})
