import { expect, it } from 'vitest'
import type { MgmError } from '../../../lib/errors.ts'
import { groupedLinear, moeRoute, packLinear } from '../../../lib/ops.ts'
import type { DType } from '../../../lib/tensor.ts'
import { Random } from '../../ops/helpers.ts'
import { cudaTests, floats, HALVES, type Inputs } from '../helpers.ts'

interface Case {
  tokens: number
  experts: number
  k: number
  n: number
  width: number
}

const cases: Case[] = [
  { tokens: 1, experts: 8, k: 2, n: 40, width: 64 },
  { tokens: 5, experts: 3, k: 1, n: 33, width: 100 },
  { tokens: 7, experts: 1, k: 1, n: 1, width: 1 },
  { tokens: 90, experts: 4, k: 2, n: 72, width: 129 },
  { tokens: 60, experts: 9, k: 3, n: 64, width: 32 },
]

interface Data {
  x: Float32Array
  w: Float32Array[]
  ids: Int32Array
  weights: Float32Array
  residual: Float32Array
}

/** Distinct experts for each token. */
function draw(c: Case, rows: number, xRows: number, random: Random): Data {
  const choose = () => {
    const left = Array.from({ length: c.experts }, (_, e) => e)
    return Array.from({ length: c.k }, () => left.splice(random.integer(0, left.length - 1), 1)[0]!)
  }
  return {
    x: random.normals(xRows * c.width),
    w: Array.from({ length: c.experts }, () => random.normals(rows * c.width, 1 / Math.sqrt(c.width))),
    ids: Int32Array.from(Array.from({ length: c.tokens }, choose).flat()),
    weights: random.normals(c.tokens * c.k),
    residual: random.normals(c.tokens * c.n),
  }
}

function gather(t: Inputs, c: Case, data: Data, pack: { dtype?: DType; gated?: boolean }) {
  const rows = pack.gated ? 2 * c.n : c.n
  return groupedLinear(
    t.a(data.x, [c.tokens, c.width]),
    data.w.map(w => t.packed(w, [rows, c.width], pack)),
    t.plain(data.ids, [c.tokens, c.k]),
    { activation: 'silu' },
  )
}

function scatter(t: Inputs, c: Case, data: Data, dtype: DType, residual: boolean) {
  return groupedLinear(
    t.a(data.x, [c.tokens * c.k, c.width]),
    data.w.map(w => t.packed(w, [c.n, c.width], { dtype })),
    t.plain(data.ids, [c.tokens, c.k]),
    {
      weights: t.plain(data.weights, [c.tokens, c.k]),
      ...(residual && { residual: t.a(data.residual, [c.tokens, c.n]) }),
    },
  )
}

/**
 * What sums of products of numbers about 1 and 1/√width may differ by: f32 sums in another order, and for quantized
 * weights, which the CPU takes as they are, their rounding to the type of the activations (errors of about u/√3 of
 * each product, and four times their deviation). Gates and a token's weights multiply that by up to 5 or so.
 */
function limitOf(width: number, dtype: 'bf16' | 'f16', weights: DType) {
  const quantized = weights === 'int8' || weights === 'int4'
  const sum = 2e-6 * Math.sqrt(width) + (quantized ? 4 * (dtype === 'bf16' ? 2 ** -8 : 2 ** -11) : 0)
  return { absolute: 8 * sum, relative: 1e-5 }
}

function withTile<R>(tile: 'large' | 'small' | 'thin', body: () => R): R {
  process.env.MGM_CUDA_TILE = tile
  try {
    return body()
  } finally {
    delete process.env.MGM_CUDA_TILE
  }
}

const storages = HALVES.flatMap(dtype => ([dtype, 'int8', 'int4'] as const).map(w => ({ dtype, w })))

cudaTests('mixtures of experts on the GPU', cuda => {
  it.each(storages)("applies each token's experts, $dtype by $w", async ({ dtype, w }) => {
    const random = new Random()
    for (const [i, c] of cases.entries())
      for (const gated of [false, true]) {
        const data = draw(c, gated ? 2 * c.n : c.n, c.tokens, random)
        const what = `${w} [${Object.values(c)}]${gated ? ' gated' : ''}, seed ${random.seed}`
        const tile = (['large', 'small', 'thin'] as const)[(i + Number(gated)) % 3]!
        await cuda.same({ dtype, limit: limitOf(c.width, dtype, w), what: `${tile} ${what}` }, t =>
          withTile(tile, () => gather(t, c, data, { dtype: w, gated })),
        )
      }
  })

  it.each(storages)("adds a token's weighted rows to the residual, $dtype by $w", async ({ dtype, w }) => {
    const random = new Random()
    for (const [i, c] of cases.entries()) {
      const data = draw(c, c.n, c.tokens * c.k, random)
      const what = `${w} [${Object.values(c)}], seed ${random.seed}`
      await cuda.same({ dtype, limit: limitOf(c.width, dtype, w), what }, t =>
        scatter(t, c, data, w, i % 2 === 0),
      )
    }
  })

  it('gives a token the same bits alone and among many, in every tile', async () => {
    const random = new Random()
    const c: Case = { tokens: 70, experts: 3, k: 2, n: 24, width: 72 }
    const data = draw(c, c.n, c.tokens * c.k, random)
    const t = cuda.inputs(cuda.gpu, 'bf16')
    const what = `seed ${random.seed}`
    const all = await floats(withTile('large', () => scatter(t, c, data, 'bf16', true)))
    for (const tile of ['small', 'thin'] as const)
      expect(await floats(withTile(tile, () => scatter(t, c, data, 'bf16', true))), what).toEqual(all)
    const at = random.integer(0, c.tokens - 1)
    const part = <A extends Float32Array | Int32Array>(values: A, width: number) =>
      values.slice(at * width, (at + 1) * width) as A
    const one: Data = {
      ...data,
      x: part(data.x, c.k * c.width),
      ids: part(data.ids, c.k),
      weights: part(data.weights, c.k),
      residual: part(data.residual, c.n),
    }
    expect(await floats(scatter(t, { ...c, tokens: 1 }, one, 'bf16', true)), what).toEqual(part(all, c.n))
  })

  it('takes strided rows, and experts that a token names twice', async () => {
    const random = new Random()
    const [x, w] = [random.normals(6 * 50), random.normals(2 * 16 * 40, 0.2)]
    for (const first of [0, 3])
      await cuda.same({ dtype: 'f16', limit: limitOf(40, 'f16', 'f16'), what: `seed ${random.seed}` }, t =>
        groupedLinear(
          t.a(x, [6, 50]).narrow(1, first, 40),
          [0, 1].map(e => t.packed(w.subarray(e * 640, (e + 1) * 640), [16, 40])),
          t.plain(
            Int32Array.from({ length: 12 }, (_, i) => Number(i % 3 === 0)),
            [6, 2],
          ),
        ),
      )
  })

  it.skipIf(!process.env.MGM_TEST_FULL)(
    'takes tokens in chunks where products would be too many',
    async () => {
      const random = new Random()
      const c: Case = { tokens: 65, experts: 64, k: 64, n: 8200, width: 1 }
      const data = draw(c, c.n, c.tokens * c.k, random)
      const limit = limitOf(64, 'bf16', 'bf16')
      await cuda.same({ dtype: 'bf16', limit, what: `seed ${random.seed}` }, t =>
        scatter(t, c, data, 'bf16', true),
      )
    },
    300_000,
  )

  it('reports an expert that does not exist, then goes on', async () => {
    const t = cuda.inputs(cuda.gpu, 'bf16')
    const w = [0, 1].map(() => packLinear(t.a(new Float32Array(32), [4, 8]), { dtype: 'bf16' }))
    const x = t.a(new Float32Array(8), [1, 8])
    for (const id of [2, -1]) {
      groupedLinear(x, w, t.plain(Int32Array.of(0, id), [1, 2]))
      await expect(cuda.gpu.synchronize()).rejects.toThrow(`an expert from 0 to 1 but received ${id}`)
    }
    const out = groupedLinear(x, w, t.plain(Int32Array.of(1, 0), [1, 2]))
    expect([...(await floats(out))]).toEqual(new Array(8).fill(0))
  })

  it('refuses more experts than a launch can name', () => {
    const t = cuda.inputs(cuda.gpu, 'bf16')
    const w = packLinear(t.a(new Float32Array(32), [4, 8]), { dtype: 'bf16' })
    const ids = t.plain(Int32Array.of(0), [1, 1])
    try {
      groupedLinear(t.a(new Float32Array(8), [1, 8]), new Array(65).fill(w), ids)
      expect.unreachable()
    } catch (error) {
      expect((error as MgmError).code).toBe('UNSUPPORTED')
      expect((error as MgmError).message).toMatch(/at most 64 experts on CUDA but received 65/)
    }
  })

  // The softmax of at most 64 numbers: exponentials to 2 ulp on either side, then one sum and one division.
  const limit = { absolute: 1e-6 }

  it('picks the k largest, the lowest index first on ties, and renormalizes', async () => {
    const random = new Random()
    for (const [experts, k, tokens] of [
      [1, 1, 3],
      [8, 2, 41],
      [20, 17, 6],
      [64, 64, 5],
      [100, 3, 5],
    ] as const) {
      // A coarse grid makes ties.
      const logits = Float32Array.from({ length: tokens * experts }, () =>
        random.next() < 0.5 ? random.integer(-3, 3) : random.normal() * 4,
      )
      await cuda.same({ limit, what: `${experts} experts, seed ${random.seed}` }, t => {
        const route = moeRoute(t.plain(logits, [tokens, experts]), k)
        return [route.ids, route.weights]
      })
    }
  })

  it('keeps ids valid and shows NaN in the weights', async () => {
    const { NaN: nan, NEGATIVE_INFINITY: low, POSITIVE_INFINITY: high } = Number
    const rows = [
      [nan, nan, nan, nan],
      [1, nan, 3, nan],
      [low, low, low, low],
      [low, 2, low, 2],
      [1e38, -1e38, 0, 1e38],
      [0, -0, 0, -0],
      [1, high, 2, high],
    ]
    await cuda.same({ limit, what: 'extremes' }, t => {
      const route = moeRoute(t.plain(Float32Array.from(rows.flat()), [rows.length, 4]), 3)
      return [route.ids, route.weights]
    })
  })
})
