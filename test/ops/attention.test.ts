import { describe, expect, it } from 'vitest'
import { Device } from '../../lib/device.ts'
import { attention } from '../../lib/ops.ts'
import { expectClose, f32, openDevice, Random } from './helpers.ts'

const device = openDevice()

interface Heads {
  heads: number
  kvHeads: number
  headDim: number
}

/** Plain softmax attention of one sequence in f64, every score and weight written out. Rows are [T, width]. */
function oracle(
  q: Float32Array[],
  k: Float32Array[],
  v: Float32Array[],
  { heads, kvHeads, headDim }: Heads,
  causal: boolean,
  scale = 1 / Math.sqrt(headDim),
): Float64Array {
  const out = new Float64Array(q.length * heads * headDim)
  for (let i = 0; i < q.length; i++)
    for (let h = 0; h < heads; h++) {
      const at = Math.floor(h / (heads / kvHeads)) * headDim
      const seen = causal ? Math.min(k.length, i + k.length - q.length + 1) : k.length
      if (seen <= 0) continue
      const scores = Array.from({ length: seen }, (_, j) => {
        let dot = 0
        for (let c = 0; c < headDim; c++) dot += q[i]![h * headDim + c]! * k[j]![at + c]!
        return dot * scale
      })
      const top = scores.reduce((a, b) => Math.max(a, b))
      const weights = scores.map(score => Math.exp(score - top))
      const total = weights.reduce((a, b) => a + b)
      for (let c = 0; c < headDim; c++) {
        let sum = 0
        for (let j = 0; j < seen; j++) sum += weights[j]! * v[j]![at + c]!
        out[(i * heads + h) * headDim + c] = sum / total
      }
    }
  return out
}

/** Tensor over rows of a wider matrix, so that its row stride is larger than a row. */
function strided(on: Device, rows: Float32Array[], heads: number, headDim: number) {
  const extra = 3
  const all = new Float32Array(rows.length * (heads + extra) * headDim).fill(Number.NaN)
  rows.forEach((row, t) => {
    all.set(row, t * (heads + extra) * headDim + headDim)
  })
  return on.tensor(all, [rows.length, heads + extra, headDim]).narrow(1, 1, heads)
}

function rowsOf(random: Random, count: number, width: number, scale = 1): Float32Array[] {
  return Array.from({ length: count }, () => random.normals(width, scale))
}

function offsets(lengths: readonly number[]): number[] {
  const cu = [0]
  for (const length of lengths) cu.push(cu.at(-1)! + length)
  return cu
}

// One f32 sum of at most a few hundred normals, weighted by probabilities: 1e-5 is some forty times the rounding seen.
const limit = { absolute: 1e-5, relative: 1e-5 }

const cases: (Heads & { q: number[]; k: number[]; causal: boolean; why: string })[] = [
  { heads: 1, kvHeads: 1, headDim: 1, q: [1], k: [1], causal: false, why: 'one of everything' },
  { heads: 2, kvHeads: 2, headDim: 64, q: [577], k: [577], causal: false, why: 'the CLIP length' },
  { heads: 3, kvHeads: 3, headDim: 17, q: [13, 1, 65], k: [64, 63, 65], causal: false, why: 'odd head size' },
  { heads: 6, kvHeads: 2, headDim: 40, q: [5, 0, 70], k: [130, 9, 1], causal: false, why: 'grouped heads' },
  { heads: 8, kvHeads: 1, headDim: 80, q: [66, 3], k: [66, 90], causal: true, why: 'one kv head, causal' },
  { heads: 2, kvHeads: 1, headDim: 128, q: [129], k: [129], causal: true, why: 'causal over tile borders' },
  {
    heads: 1,
    kvHeads: 1,
    headDim: 511,
    q: [7, 2],
    k: [20, 0],
    causal: false,
    why: 'large odd head, no keys',
  },
  { heads: 3, kvHeads: 3, headDim: 64, q: [300, 5], k: [77, 77], causal: false, why: 'pixels and a prompt' },
  { heads: 1, kvHeads: 1, headDim: 512, q: [131], k: [200], causal: false, why: "the VAE's head" },
  { heads: 2, kvHeads: 2, headDim: 24, q: [9], k: [4], causal: true, why: 'queries before the first key' },
]

describe('attention', () => {
  for (const { q, k, causal, why, ...heads } of cases) {
    const random = new Random()
    const shape = `${why}: H ${heads.heads} KV ${heads.kvHeads} D ${heads.headDim} q ${q} k ${k}`
    it(`equals softmax(q kᵀ) v in f64 (${shape}${causal ? ' causal' : ''})`, async () => {
      const { heads: h, kvHeads, headDim } = heads
      const qs = q.map(n => rowsOf(random, n, h * headDim))
      const ks = k.map(n => rowsOf(random, n, kvHeads * headDim))
      const vs = k.map(n => rowsOf(random, n, kvHeads * headDim))
      const result = attention(
        strided(device, qs.flat(), h, headDim),
        strided(device, ks.flat(), kvHeads, headDim),
        strided(device, vs.flat(), kvHeads, headDim),
        {
          cuQ: device.tensor(offsets(q), [q.length + 1], 'i32'),
          cuK: device.tensor(offsets(k), [k.length + 1], 'i32'),
          causal,
        },
      )
      expect(result.shape).toEqual([q.reduce((a, b) => a + b), h, headDim])
      const expected = qs.flatMap((_, b) => [...oracle(qs[b]!, ks[b]!, vs[b]!, heads, causal)])
      expectClose(await f32(result), expected, limit, `seed ${random.seed}`)
    })
  }

  it('random shapes', async () => {
    const random = new Random()
    for (let round = 0; round < 12; round++) {
      const kvHeads = random.integer(1, 3)
      const heads = { kvHeads, heads: kvHeads * random.integer(1, 3), headDim: random.integer(1, 150) }
      const causal = random.next() < 0.5
      const q = random.integer(1, 100)
      const k = random.integer(1, 150)
      const [qs, ks, vs] = [
        rowsOf(random, q, heads.heads * heads.headDim),
        rowsOf(random, k, kvHeads * heads.headDim),
        rowsOf(random, k, kvHeads * heads.headDim),
      ]
      const scale = random.next()
      const result = attention(
        strided(device, qs, heads.heads, heads.headDim),
        strided(device, ks, kvHeads, heads.headDim),
        strided(device, vs, kvHeads, heads.headDim),
        {
          cuQ: device.tensor([0, q], [2], 'i32'),
          cuK: device.tensor([0, k], [2], 'i32'),
          causal,
          scale,
        },
      )
      const what = `seed ${random.seed} round ${round} ${JSON.stringify({ ...heads, q, k, causal, scale })}`
      // Without 1/√D the scores reach some 40, whose own rounding the exponential magnifies.
      expectClose(
        await f32(result),
        oracle(qs, ks, vs, heads, causal, scale),
        { absolute: 5e-5, relative: 5e-5 },
        what,
      )
    }
  })

  it('is exact for scores so large that one key has all the weight, and for equal scores', async () => {
    const heads = { heads: 1, kvHeads: 1, headDim: 16 }
    const keys = 200
    const random = new Random()
    const values = rowsOf(random, keys, 16)
    const ks = Array.from({ length: keys }, (_, j) =>
      new Float32Array(16).fill(j === 131 ? 100 : -100 + (j % 7)),
    )
    const make = (q: number) =>
      attention(
        device.tensor(new Float32Array(16).fill(q), [1, 1, 16]),
        strided(device, ks, 1, 16),
        strided(device, values, 1, 16),
        { cuQ: device.tensor([0, 1], [2], 'i32'), cuK: device.tensor([0, keys], [2], 'i32') },
      )
    expect([...(await f32(make(50)))]).toEqual([...values[131]!])
    const mean = Array.from({ length: 16 }, (_, c) => values.reduce((sum, row) => sum + row[c]!, 0) / keys)
    expectClose(await f32(make(0)), mean, limit, `seed ${random.seed}`)
    expectClose(
      await f32(make(0)),
      oracle([new Float32Array(16)], ks, values, heads, false),
      limit,
      `seed ${random.seed}`,
    )
  })

  it('gives a query the same bits alone, in a batch, and with fewer or more threads', async () => {
    const random = new Random()
    const { heads, kvHeads, headDim } = { heads: 4, kvHeads: 2, headDim: 72 }
    const lengths = [70, 133, 1]
    const rows = [heads, kvHeads, kvHeads].map(n =>
      lengths.map(length => rowsOf(random, length, n * headDim)),
    ) as [Float32Array[][], Float32Array[][], Float32Array[][]]
    const other = Device.open('cpu', { threads: 1 })
    try {
      const run = async (on: Device, q: Float32Array[][], k: Float32Array[][], v: Float32Array[][]) => {
        const cu = (parts: Float32Array[][]) =>
          on.tensor(offsets(parts.map(part => part.length)), [parts.length + 1], 'i32')
        return f32(
          attention(
            strided(on, q.flat(), heads, headDim),
            strided(on, k.flat(), kvHeads, headDim),
            strided(on, v.flat(), kvHeads, headDim),
            { cuQ: cu(q), cuK: cu(k), causal: true },
          ),
        )
      }
      const [q, k, v] = rows
      const batch = await run(device, q, k, v)
      expect(await run(other, q, k, v), `seed ${random.seed}`).toEqual(batch)
      const width = heads * headDim
      for (const [b, i] of [
        [0, 0],
        [0, 64],
        [1, 5],
        [1, 132],
        [2, 0],
      ] as const) {
        const before = lengths.slice(0, b).reduce((x, y) => x + y, 0) + i
        const alone = await run(device, [[q[b]![i]!]], [k[b]!.slice(0, i + 1)], [v[b]!.slice(0, i + 1)])
        expect(alone, `seed ${random.seed} sequence ${b} query ${i}`).toEqual(
          batch.slice(before * width, (before + 1) * width),
        )
      }
    } finally {
      await other.close()
    }
  })

  it('gives zeros to queries that belong to no sequence', async () => {
    const random = new Random()
    const x = device.tensor(random.normals(5 * 8), [5, 1, 8])
    const cu = device.tensor([1, 3], [2], 'i32')
    const result = await f32(attention(x, x, x, { cuQ: cu }))
    expect([...result.slice(0, 8), ...result.slice(24)].every(value => value === 0)).toBe(true)
    expect([...result.slice(8, 24)].some(value => value === 0)).toBe(false)
  })

  it('refuses offsets that decrease or point outside', async () => {
    for (const cu of [
      [0, 3, 2],
      [0, 2, 5],
      [-1, 2, 4],
    ]) {
      const own = Device.open('cpu', { threads: 1 })
      const x = own.tensor(new Float32Array(32), [4, 1, 8])
      attention(x, x, x, { cuQ: own.tensor(cu, [3], 'i32') })
      await expect(own.synchronize()).rejects.toThrow(/non-decreasing offsets from 0 to 4 for cu_q/)
      await own.close().catch(() => {})
    }
  })
})
