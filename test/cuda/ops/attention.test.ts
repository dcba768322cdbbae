import { expect, it } from 'vitest'
import { attention } from '../../../lib/ops.ts'
import { Random } from '../../ops/helpers.ts'
import { cudaTests, floats, HALVES, type Inputs } from '../helpers.ts'

interface Case {
  heads: number
  kvHeads: number
  headDim: number
  q: readonly number[]
  k: readonly number[]
  causal?: boolean
  scale?: number
}

const offsets = (lengths: readonly number[]) =>
  Int32Array.from([0, ...lengths.map((_, i) => lengths.slice(0, i + 1).reduce((a, b) => a + b))])
const total = (lengths: readonly number[]) => lengths.reduce((a, b) => a + b, 0)

/** Heads of a tensor that has more of them: rows are further apart than they are long. */
function heads(t: Inputs, data: Float32Array, count: number, headDim: number, extra = 2) {
  return t
    .a(data, [data.length / ((count + extra) * headDim), count + extra, headDim])
    .narrow(1, Math.min(1, extra), count)
}

/** Random q, k and v of a case, with room for `extra` heads. */
function draw(random: Random, c: Case, extra = 2) {
  const make = (rows: number, count: number) => random.normals(rows * (count + extra) * c.headDim)
  return {
    q: make(total(c.q), c.heads),
    k: make(total(c.k), c.kvHeads),
    v: make(total(c.k), c.kvHeads),
  }
}

function run(t: Inputs, c: Case, data: ReturnType<typeof draw>, extra = 2) {
  return attention(
    heads(t, data.q, c.heads, c.headDim, extra),
    heads(t, data.k, c.kvHeads, c.headDim, extra),
    heads(t, data.v, c.kvHeads, c.headDim, extra),
    {
      cuQ: t.plain(offsets(c.q), [c.q.length + 1]),
      cuK: t.plain(offsets(c.k), [c.k.length + 1]),
      causal: c.causal ?? false,
      ...(c.scale === undefined ? {} : { scale: c.scale }),
    },
  )
}

// The weights are rounded to the activations' type: the result, their mean of the values, is off by at most that
// rounding times the greatest value. All else is f32.
const ROUNDOFF = { bf16: 2 ** -8, f16: 2 ** -11 }
const limit = (dtype: 'bf16' | 'f16', values: Float32Array) => ({
  absolute: ROUNDOFF[dtype] * values.reduce((most, x) => Math.max(most, Math.abs(x)), 0) + 1e-5,
})

const cases: Case[] = [
  { heads: 1, kvHeads: 1, headDim: 1, q: [1], k: [1] },
  { heads: 2, kvHeads: 2, headDim: 17, q: [13, 1, 65], k: [64, 63, 65] },
  { heads: 3, kvHeads: 1, headDim: 24, q: [9, 43], k: [4, 100], causal: true },
  { heads: 4, kvHeads: 2, headDim: 32, q: [64, 0, 3], k: [65, 7, 0] },
  { heads: 6, kvHeads: 2, headDim: 40, q: [5, 0, 70], k: [130, 9, 1] },
  { heads: 1, kvHeads: 1, headDim: 64, q: [193], k: [193], scale: -0.3 },
  { heads: 2, kvHeads: 1, headDim: 64, q: [129, 1], k: [129, 200], causal: true },
  { heads: 8, kvHeads: 1, headDim: 80, q: [66, 3], k: [66, 90], causal: true },
  { heads: 2, kvHeads: 2, headDim: 96, q: [77], k: [77], causal: true },
  { heads: 1, kvHeads: 1, headDim: 100, q: [40], k: [33] },
  { heads: 2, kvHeads: 1, headDim: 128, q: [70, 60], k: [130, 60], causal: true },
  { heads: 1, kvHeads: 1, headDim: 160, q: [17], k: [40] },
  { heads: 1, kvHeads: 1, headDim: 256, q: [65], k: [97], causal: true },
  { heads: 1, kvHeads: 1, headDim: 511, q: [7, 2], k: [20, 0] },
  { heads: 1, kvHeads: 1, headDim: 512, q: [33], k: [33] },
  // SDXL: pixels by the 77 places of a prompt, two images; the VAE's pixels by each other.
  { heads: 2, kvHeads: 2, headDim: 64, q: [150, 150], k: [77, 77] },
  { heads: 1, kvHeads: 1, headDim: 512, q: [70, 1], k: [70, 150] },
  { heads: 2, kvHeads: 1, headDim: 512, q: [40, 9], k: [45, 60], causal: true },
]
if (process.env.MGM_TEST_FULL)
  cases.push(
    { heads: 16, kvHeads: 16, headDim: 64, q: [577, 577], k: [577, 577] },
    { heads: 8, kvHeads: 8, headDim: 64, q: [77, 77], k: [77, 77], causal: true },
    { heads: 4, kvHeads: 1, headDim: 256, q: [300], k: [500], causal: true },
  )

cudaTests('attention', cuda => {
  for (const dtype of HALVES)
    for (const c of cases)
      it(`equals the CPU's in ${dtype}: ${JSON.stringify(c)}`, async () => {
        const random = new Random()
        const data = draw(random, c)
        await cuda.same({ dtype, limit: limit(dtype, data.v), what: `seed ${random.seed}` }, t =>
          run(t, c, data),
        )
      })

  it('takes random shapes', async () => {
    const random = new Random()
    for (let round = 0; round < 8; round++) {
      const kvHeads = random.integer(1, 2)
      const sequences = random.integer(1, 4)
      const lengths = (most: number) => Array.from({ length: sequences }, () => random.integer(0, most))
      const c: Case = {
        kvHeads,
        heads: kvHeads * random.integer(1, 4),
        headDim: random.integer(1, 130),
        q: lengths(70),
        k: lengths(150),
        causal: random.next() < 0.5,
        scale: random.next(),
      }
      if (total(c.q) === 0) continue
      const data = draw(random, c)
      // Scores reach some 40 here; their own rounding is magnified by the exponential.
      const { absolute } = limit('f16', data.v)
      const what = `seed ${random.seed} round ${round} ${JSON.stringify(c)}`
      await cuda.same({ dtype: 'f16', limit: { absolute: absolute + 5e-5 }, what }, t => run(t, c, data))
    }
  })

  it('is exact where one key has all the weight, and for equal scores', async () => {
    const random = new Random()
    const [d, keys] = [64, 200]
    const v = random.normals(keys * d)
    // Scores of ±2^e, one of them the greatest: whatever their size, its value is the result.
    const scores = [
      (j: number) => (j === 131 ? 2 : [1, -1, -2][j % 3]!),
      (j: number) => (j === 131 ? -1 : -2),
    ]
    for (const dtype of HALVES)
      for (const exponent of dtype === 'bf16' ? [6, 12, 24, 40, 100, 120] : [6, 12, 25])
        for (const score of scores)
          await cuda.same(
            { dtype, limit: { absolute: 0 }, what: `2^${exponent}, seed ${random.seed}` },
            t => {
              const q = new Float32Array(d).fill(2 ** Math.floor(exponent / 2))
              const k = new Float32Array(keys * d)
              for (let j = 0; j < keys; j++) k[j * d + (j % d)] = score(j) * 2 ** Math.ceil(exponent / 2)
              const make = (data: Float32Array, rows: number) => t.a(data, [rows, 1, d])
              return attention(make(q, 1), make(k, keys), make(v, keys), {
                cuQ: t.plain(Int32Array.of(0, 1), [2]),
                cuK: t.plain(Int32Array.of(0, keys), [2]),
                scale: 1,
              })
            },
          )
    const even = { heads: 1, kvHeads: 1, headDim: d, q: [3], k: [128], scale: 0 }
    const data = draw(random, even, 0)
    await cuda.same({ dtype: 'f16', limit: { absolute: 1e-5 }, what: `seed ${random.seed}` }, t =>
      run(t, even, data, 0),
    )
  })

  it('keeps what is not finite to the rows and columns that see it', async () => {
    const random = new Random()
    const c = { heads: 2, kvHeads: 1, headDim: 32, q: [70, 5], k: [70, 66], causal: true }
    const data = draw(random, c, 0)
    data.q[(3 * 2 + 0) * 32 + 7] = Number.NaN
    data.v[20 * 32 + 5] = Number.POSITIVE_INFINITY
    const result = await floats(run(cuda.inputs(cuda.gpu, 'bf16'), c, data, 0))
    const at = (query: number, head: number, column: number) => result[(query * 2 + head) * 32 + column]!
    for (let column = 0; column < 32; column++) {
      expect(at(3, 0, column)).toBeNaN()
      for (const query of [20, 59, 69])
        expect(Number.isFinite(at(query, 1, column)), `${query} ${column}`).toBe(column !== 5)
      for (const query of [70, 74]) expect(Number.isFinite(at(query, 0, column))).toBe(true)
      if (column !== 5) expect(Number.isFinite(at(3, 1, column))).toBe(true)
    }
  })

  it('leaves rows beside one of huge scores as they are', async () => {
    const random = new Random()
    const c = { heads: 1, kvHeads: 1, headDim: 64, q: [140], k: [200] }
    const data = draw(random, c, 0)
    const t = cuda.inputs(cuda.gpu, 'bf16')
    const before = await floats(run(t, c, data, 0))
    const row = data.q.subarray(9 * 64, 10 * 64)
    row.forEach((x, i) => {
      row[i] = x * 2 ** 40
    })
    const after = await floats(run(t, c, data, 0))
    expect(after.subarray(0, 9 * 64), `seed ${random.seed}`).toEqual(before.subarray(0, 9 * 64))
    expect(after.subarray(10 * 64), `seed ${random.seed}`).toEqual(before.subarray(10 * 64))
    expect(after.every(Number.isFinite)).toBe(true)
  })

  it('gives keys of score -inf no weight; NaN where a row has no others', async () => {
    const random = new Random()
    const [keys, d] = [70, 16]
    const v = random.normals(keys * d)
    await cuda.same({ dtype: 'f16', limit: limit('f16', v), what: `seed ${random.seed}` }, t => {
      const k = new Float32Array(keys * d)
      for (let j = 0; j < 66; j++) k[j * d] = Number.NEGATIVE_INFINITY
      const q = new Float32Array(4 * d).fill(1)
      return attention(t.a(q, [4, 1, d]), t.a(k, [keys, 1, d]), t.a(v, [keys, 1, d]), {
        cuQ: t.plain(Int32Array.of(0, 2, 4), [3]),
        cuK: t.plain(Int32Array.of(0, 60, 70), [3]),
      })
    })
  })

  it.each([32, 64, 96, 256, 512])(
    'gives a query the same bits alone and in a batch, head size %i',
    async headDim => {
      const random = new Random()
      const c = { heads: 4, kvHeads: 2, headDim, q: [70, 133, 1], k: [70, 133, 40], causal: true }
      const data = draw(random, c, 0)
      const t = cuda.inputs(cuda.gpu, 'bf16')
      const batch = await floats(run(t, c, data, 0))
      const [width, kvWidth] = [c.heads * headDim, c.kvHeads * headDim]
      const pairs = [
        [0, 0],
        [0, 64],
        [1, 5],
        [1, 132],
        [2, 0],
      ] as const
      for (const [b, i] of pairs) {
        const [queries, keys] = [total(c.q.slice(0, b)) + i, total(c.k.slice(0, b))]
        const seen = c.k[b]! - c.q[b]! + i + 1
        const part = (x: Float32Array) => x.slice(keys * kvWidth, (keys + seen) * kvWidth)
        const alone = {
          q: data.q.slice(queries * width, (queries + 1) * width),
          k: part(data.k),
          v: part(data.v),
        }
        expect(
          await floats(run(t, { ...c, q: [1], k: [seen] }, alone, 0)),
          `seed ${random.seed}, sequence ${b}, query ${i}`,
        ).toEqual(batch.slice(queries * width, (queries + 1) * width))
      }
    },
  )

  it('gives zeros to queries that belong to no sequence', async () => {
    const random = new Random()
    const x = random.normals(5 * 8)
    for (const cu of [[1, 3], [2], [5, 5, 5], [0, 0]])
      await cuda.same({ dtype: 'f16', limit: limit('f16', x), what: `${cu}, seed ${random.seed}` }, t => {
        const all = t.a(x, [5, 1, 8])
        return attention(all, all, all, { cuQ: t.plain(Int32Array.from(cu), [cu.length]) })
      })
  })

  it('reports offsets that decrease or point outside', async () => {
    const t = cuda.inputs(cuda.gpu, 'bf16')
    const x = t.a(new Float32Array(32), [4, 1, 8])
    for (const cu of [
      [0, 3, 2],
      [0, 2, 5],
      [-1, 2, 4],
    ]) {
      attention(x, x, x, { cuQ: t.plain(Int32Array.from(cu), [3]) })
      await expect(cuda.gpu.synchronize()).rejects.toThrow(/non-decreasing offsets from 0 to 4 for cu_q/)
    }
    attention(x, x, x, {
      cuQ: t.plain(Int32Array.of(0, 4), [2]),
      cuK: t.plain(Int32Array.of(0, 6), [2]),
    })
    await expect(cuda.gpu.synchronize()).rejects.toThrow(/for cu_k but received 6/)
  })
})
