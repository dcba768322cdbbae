import { expect, it } from 'vitest'
import * as ops from '../../../lib/ops.ts'
import type { DType, Tensor } from '../../../lib/tensor.ts'
import { Random } from '../../ops/helpers.ts'
import { cudaTests, floats, HALVES } from '../helpers.ts'

const ACTIVATIONS = ['none', 'gelu', 'gelu_tanh', 'quick_gelu', 'silu'] as const
const TILES = ['large', 'small', 'thin', 'few'] as const

/** Runs `body` with the kernel's tile chosen; 'few' is the choice of its own for up to 16 rows. */
function withTile<R>(tile: (typeof TILES)[number] | undefined, body: () => R): R {
  if (tile !== undefined) process.env.MGM_CUDA_TILE = tile
  try {
    return body()
  } finally {
    delete process.env.MGM_CUDA_TILE
  }
}

/**
 * What sums of k products of numbers about 1 and 1/√k may differ by: f32 sums in another order, and for quantized
 * weights, which the CPU takes as they are, their rounding to the type of the activations (k errors of about
 * u/√(3k), and four times their deviation).
 */
function limitOf(k: number, dtype: 'bf16' | 'f16', weights: DType): number {
  const quantized = weights === 'int8' || weights === 'int4'
  return 2e-6 * Math.sqrt(k) + (quantized ? 4 * (dtype === 'bf16' ? 2 ** -8 : 2 ** -11) : 0)
}

cudaTests('linear on CUDA', cuda => {
  const cases = [
    { m: 1, n: 64, k: 64 },
    { m: 5, n: 3, k: 7 },
    { m: 16, n: 40, k: 168 },
    { m: 67, n: 129, k: 100 },
    { m: 130, n: 72, k: 33 },
    // Few rows whose x takes more than one buffer.
    { m: 13, n: 24, k: 1320 },
    { m: 16, n: 8, k: 1024 },
  ]
  it.each(
    cases.flatMap(size => HALVES.flatMap(dtype => [dtype, 'int8', 'int4'].map(w => ({ ...size, dtype, w })))),
  )('multiplies $m x $k by $n x $k, $dtype by $w', async ({ m, n, k, dtype, w }) => {
    const random = new Random()
    const weights = w as DType
    const x = random.normals(m * k)
    const matrix = random.normals(2 * n * k, 1 / Math.sqrt(k))
    const bias = random.normals(2 * n)
    const scale = random.normals(n)
    const residual = random.normals(m * n)
    const divisor = [5, 2, 1].find(r => m % r === 0)!
    for (const tile of TILES) {
      if (tile === 'few' && m > 16) continue
      for (const activation of tile === 'small' ? ACTIVATIONS : (['gelu'] as const))
        await cuda.same(
          {
            dtype,
            // Gates multiply numbers up to 5.
            limit: { absolute: 8 * limitOf(k, dtype, weights), relative: 1e-5 },
            what: `${w} ${m}x${n}x${k} ${tile} ${activation}, seed ${random.seed}`,
          },
          ({ a, plain, packed }) =>
            withTile(tile, () => {
              const gx = a(x, [m, k])
              const one = packed(matrix.subarray(0, n * k), [n, k], { dtype: weights })
              const gated = packed(matrix, [2 * n, k], { dtype: weights, gated: true })
              const half = plain(bias.subarray(0, n), [n])
              return [
                ops.linear(gx, one),
                ops.linear(gx, one, {
                  bias: half,
                  scale: plain(scale, [n]),
                  residual: a(residual, [m, n]).narrow(0, 0, m / divisor),
                  activation,
                }),
                ops.linear(gx, one, { bias: half, residual: a(residual, [m, n]), out: 'f32' }),
                ops.linear(gx, gated, { bias: plain(bias, [2 * n]), activation }),
                ops.linear(gx, gated, { residual: a(residual, [m, n]), activation, out: 'f32' }),
              ]
            }),
        )
    }
  })

  it.each(HALVES)('takes %s rows of any stride and alignment', async dtype => {
    const random = new Random()
    const [m, n, k] = [19, 24, 72]
    const x = random.normals(m * 100)
    const w = random.normals(n * k, 1 / Math.sqrt(k))
    for (const tile of TILES)
      for (const width of [k, k - 5])
        await cuda.same(
          {
            dtype,
            limit: { absolute: limitOf(k, dtype, dtype) },
            what: `${tile} ${width}, seed ${random.seed}`,
          },
          ({ a, packed }) =>
            withTile(tile, () => {
              const rows = tile === 'few' ? 9 : m
              const matrix = packed(w.subarray(0, n * width), [n, width])
              return [8, 3, 28].map(start =>
                ops.linear(a(x, [m, 100]).narrow(1, start, width).narrow(0, 0, rows), matrix),
              )
            }),
        )
  })

  it.each(HALVES.flatMap(dtype => [dtype, 'int8', 'int4'].map(w => ({ dtype, w }))))(
    'keeps every weight: $dtype by $w',
    async ({ dtype, w }) => {
      const random = new Random()
      const [n, k] = [21, 77]
      const matrix = random.normals(n * k, 3)
      matrix.fill(0, 32, 64) // a block of zeros
      matrix.fill(5, k, k + 32) // and of equal numbers
      const identity = Float32Array.from({ length: k * k }, (_, i) => (i % (k + 1) === 0 ? 1 : 0))
      // One rounding of each weight to the activations' type.
      const roundoff = dtype === 'bf16' ? 2 ** -8 : 2 ** -11
      await cuda.same(
        {
          dtype,
          limit: { absolute: 1e-5, relative: w === dtype ? 0 : roundoff },
          what: `seed ${random.seed}`,
        },
        ({ a, packed }) => {
          const one = packed(matrix, [n, k], { dtype: w as DType })
          const x = a(identity, [k, k])
          return [ops.linear(x, one, { out: 'f32' }), ops.linear(x.narrow(0, 60, 16), one, { out: 'f32' })]
        },
      )
    },
  )

  it.each(HALVES)('packs stacked %s matrices from every type, and gives their rows back', async dtype => {
    const random = new Random()
    const [n, k] = [13, 45]
    const data = [random.normals(n * k), random.normals(2 * k, 30), random.normals(n * k)]
    await cuda.same(
      { dtype, limit: { absolute: 0 }, what: `seed ${random.seed}` },
      ({ a, plain, device, out }) => {
        const matrices = [
          ops.cast(plain(data[0]!, [n, k]), 'bf16'),
          a(data[1]!, [2, k]),
          ops.cast(plain(data[2]!, [n, k]), 'f16').narrow(0, 1, 4),
        ]
        const ids = device.tensor(Int32Array.of(0, 12, -1, 13, 14, 15, 18), [7])
        return ([dtype, 'int8', 'int4'] as const).map(w =>
          ops.embedding(ops.packLinear(matrices, { dtype: w }), ids, { scale: 1.5, out }),
        )
      },
    )
  })

  it.each(['bf16', 'int8', 'int4'] as const)(
    'packs gate and up in parts as it packs them whole: %s',
    async w => {
      const random = new Random()
      const [n, k] = [13, 45]
      const { a } = cuda.inputs(cuda.gpu, 'bf16')
      const x = a(random.normals(3 * k), [3, k])
      const whole = a(random.normals(2 * n * k), [2 * n, k])
      const run = (weights: Tensor | Tensor[]) =>
        floats(ops.linear(x, ops.packLinear(weights, { dtype: w, gated: true }), { out: 'f32' }))
      const expected = await run(whole)
      for (const cuts of [[n], [5, n, 19]]) {
        const edges = [0, ...cuts, 2 * n]
        const parts = edges.slice(1).map((end, i) => whole.narrow(0, edges[i]!, end - edges[i]!))
        expect(await run(parts), `${cuts}, seed ${random.seed}`).toEqual(expected)
      }
    },
  )

  it.each(HALVES.flatMap(dtype => [dtype, 'int8', 'int4'].map(w => ({ dtype, w }))))(
    'gives a row the same bits alone and among many, in every tile: $dtype by $w',
    async ({ dtype, w }) => {
      const random = new Random()
      const [m, n, k] = [150, 136, 200]
      const { a, packed } = cuda.inputs(cuda.gpu, dtype)
      const x = a(random.normals(m * k), [m, k])
      const results = (matrix: Tensor) => async (rows: Tensor, tile: (typeof TILES)[number] | undefined) =>
        floats(withTile(tile, () => ops.linear(rows, matrix, { activation: 'silu', out: 'f32' })))
      for (const gated of [false, true]) {
        const run = results(packed(random.normals(n * k), [n, k], { dtype: w as DType, gated }))
        const outputs = gated ? n / 2 : n
        const all = await run(x, 'large')
        expect(all.some(Number.isNaN)).toBe(false)
        for (const tile of ['small', 'thin', undefined] as const)
          expect(await run(x, tile), `${tile}, seed ${random.seed}`).toEqual(all)
        for (const [first, count] of [
          [141, 1],
          [3, 8],
          [100, 16],
          [57, 33],
        ] as const)
          for (const tile of [undefined, 'thin'] as const)
            expect(await run(x.narrow(0, first, count), tile), `${count} rows, seed ${random.seed}`).toEqual(
              all.slice(first * outputs, (first + count) * outputs),
            )
      }
    },
  )

  it.each(HALVES)('carries infinities, NaN and overflow of %s as the CPU does', async dtype => {
    const random = new Random()
    const [m, n, k] = [7, 16, 64]
    const x = random.normals(m * k)
    const w = random.normals(n * k)
    x[k + 3] = Number.POSITIVE_INFINITY
    x[2 * k + 5] = Number.NaN
    x[3 * k + 7] = dtype === 'bf16' ? 3e38 : 6e4 // overflows by itself, or not at all
    x.fill(0, 4 * k, 5 * k)
    const bad = Float32Array.from(w)
    bad[4 * k + 40] = Number.NEGATIVE_INFINITY
    bad[9 * k] = Number.NaN
    for (const tile of ['small', 'few'] as const)
      await cuda.same(
        { dtype, limit: { absolute: 1e-4, relative: 1e-4 }, what: `${tile}, seed ${random.seed}` },
        ({ a, packed }) =>
          withTile(tile, () => {
            const gx = a(x, [m, k])
            return [
              ...ACTIVATIONS.map(activation => ops.linear(gx, packed(w, [n, k]), { activation })),
              ops.linear(gx, packed(bad, [n, k])),
            ]
          }),
      )
    // A block with a NaN or an infinity cannot be quantized: it is NaN, its row's results too.
    await cuda.same(
      { dtype, limit: { absolute: 8 * limitOf(k, dtype, 'int8') }, what: `quantized, seed ${random.seed}` },
      ({ a, packed }) => {
        const ones = a(
          x.map(() => 1 / 8),
          [m, k],
        )
        return (['int8', 'int4'] as const).map(w => ops.linear(ones, packed(bad, [n, k], { dtype: w })))
      },
    )
  })

  it.skipIf(!process.env.MGM_TEST_FULL)('multiplies at the sizes of a model', async () => {
    const random = new Random()
    const [m, n, k] = [577, 1024, 1024]
    const x = random.normals(m * k)
    const w = random.normals(n * k, 1 / Math.sqrt(k))
    for (const weights of ['bf16', 'int8', 'int4'] as const)
      await cuda.same(
        {
          dtype: 'bf16',
          limit: { absolute: limitOf(k, 'bf16', weights) },
          what: `${weights}, seed ${random.seed}`,
        },
        ({ a, packed }) => {
          const matrix = packed(w, [n, k], { dtype: weights })
          return [ops.linear(a(x, [m, k]), matrix), ops.linear(a(x, [m, k]).narrow(0, 5, 3), matrix)]
        },
      )
  })
})
