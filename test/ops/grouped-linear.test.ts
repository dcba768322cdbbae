import { describe, expect, it } from 'vitest'
import { groupedLinear, moeRoute, packLinear } from '../../lib/ops.ts'
import { expectClose, f32, openDevice, Random } from './helpers.ts'
import { activations, exactWeights, matmul, storageTypes } from './weights.ts'

const device = openDevice({ threads: 2 })
const limit = { absolute: 4e-5, relative: 2e-5 } // as for gated linear; sums are of order 1 to 10

/** Distinct experts for each token. */
function draw(random: Random, tokens: number, experts: number, k: number): Int32Array {
  return Int32Array.from(
    Array.from({ length: tokens }, () => {
      const left = Array.from({ length: experts }, (_, e) => e)
      return Array.from({ length: k }, () => left.splice(random.integer(0, left.length - 1), 1)[0]!)
    }).flat(),
  )
}

const sizes = [
  { tokens: 1, experts: 8, k: 2, n: 40, width: 65 },
  { tokens: 5, experts: 3, k: 1, n: 33, width: 300 },
  { tokens: 7, experts: 1, k: 1, n: 1, width: 1 },
  { tokens: 100, experts: 4, k: 2, n: 70, width: 129 },
  { tokens: 60, experts: 9, k: 3, n: 64, width: 32 },
]

describe('groupedLinear', () => {
  for (const gated of [false, true])
    it(`applies each token's experts${gated ? ', gated' : ''}`, async () => {
      const random = new Random()
      for (const { tokens, experts, k, n, width } of sizes) {
        const dtype = storageTypes[random.integer(0, 4)]!
        const rows = gated ? 2 * n : n
        const weights = Array.from({ length: experts }, () => exactWeights(random, dtype, rows, width))
        const x = random.normals(tokens * width, 1 / Math.sqrt(width))
        const ids = draw(random, tokens, experts, k)
        const expected = Array.from(ids).flatMap((id, i) => {
          const t = Math.floor(i / k)
          const y = matmul(x.subarray(t * width, (t + 1) * width), weights[id]!, 1, rows, width)
          return Array.from({ length: n }, (_, c) => activations.silu(y[c]!) * (gated ? y[n + c]! : 1))
        })
        const out = groupedLinear(
          device.tensor(x, [tokens, width]),
          weights.map(w => packLinear(device.tensor(w, [rows, width]), { dtype, gated })),
          device.tensor(ids, [tokens, k]),
          { activation: 'silu' },
        )
        expect(out.shape).toEqual([tokens * k, n])
        expectClose(await f32(out), expected, limit, `seed ${random.seed}, ${tokens} tokens ${dtype}`)
      }
    })

  it("adds a token's weighted rows to the residual", async () => {
    const random = new Random()
    for (const { tokens, experts, k, n, width } of sizes)
      for (const withResidual of [false, true]) {
        const dtype = storageTypes[random.integer(0, 4)]!
        const matrices = Array.from({ length: experts }, () => exactWeights(random, dtype, n, width))
        const x = random.normals(tokens * k * width, 1 / Math.sqrt(width))
        const ids = draw(random, tokens, experts, k)
        const weights = random.normals(tokens * k)
        const residual = random.normals(tokens * n)
        const expected = new Float64Array(tokens * n)
        if (withResidual) expected.set(residual)
        ids.forEach((id, i) => {
          const y = matmul(x.subarray(i * width, (i + 1) * width), matrices[id]!, 1, n, width)
          y.forEach((value, c) => {
            expected[Math.floor(i / k) * n + c]! += weights[i]! * value
          })
        })
        const packed = matrices.map(w => packLinear(device.tensor(w, [n, width]), { dtype }))
        const run = (from: number, count: number) =>
          f32(
            groupedLinear(
              device.tensor(x.subarray(from * k * width, (from + count) * k * width), [count * k, width]),
              packed,
              device.tensor(ids.subarray(from * k, (from + count) * k), [count, k]),
              {
                weights: device.tensor(weights.subarray(from * k, (from + count) * k), [count, k]),
                ...(withResidual && {
                  residual: device.tensor(residual.subarray(from * n, (from + count) * n), [count, n]),
                }),
              },
            ),
          )
        const out = await run(0, tokens)
        const what = `seed ${random.seed}, ${tokens} tokens ${dtype}`
        expectClose(out, expected, limit, what)
        // A token alone gets the same bits.
        const t = random.integer(0, tokens - 1)
        expect(await run(t, 1), what).toEqual(out.subarray(t * n, (t + 1) * n))
      }
  })

  it('takes no tokens', () => {
    const w = [packLinear(device.zeros([4, 3]))]
    expect(groupedLinear(device.empty([0, 3]), w, device.empty([0, 2], 'i32')).shape).toEqual([0, 4])
  })

  it('refuses an expert that does not exist', async () => {
    const own = openDevice({ threads: 2 })
    const w = [0, 1].map(() => packLinear(own.zeros([4, 3])))
    for (const id of [2, -1]) {
      groupedLinear(own.zeros([1, 3]), w, own.tensor(Int32Array.of(0, id), [1, 2]))
      await expect(own.synchronize()).rejects.toThrow(`an expert from 0 to 1 but received ${id}`)
    }
  })
})

describe('moeRoute', () => {
  /** Sorts all experts, softmax in f64 over all of them, then renormalizes. */
  function oracle(logits: ArrayLike<number>, k: number) {
    const order = Array.from(logits, (_, e) => e).sort((a, b) => logits[b]! - logits[a]! || a - b)
    const top = logits[order[0]!]!
    const sum = Array.from(logits).reduce((s, l) => s + Math.exp(l - top), 0)
    const p = order.slice(0, k).map(e => Math.exp(logits[e]! - top) / sum)
    const total = p.reduce((a, b) => a + b)
    return { ids: order.slice(0, k), weights: p.map(v => v / total) }
  }

  it('picks the k largest, the lowest index first on ties, and renormalizes', async () => {
    const random = new Random()
    for (const [experts, k] of [
      [1, 1],
      [8, 2],
      [20, 17],
      [64, 64],
    ] as const) {
      const tokens = 50
      // A coarse grid makes ties.
      const logits = Float32Array.from({ length: tokens * experts }, () =>
        random.next() < 0.5 ? random.integer(-3, 3) : random.normal() * 4,
      )
      const route = moeRoute(device.tensor(logits, [tokens, experts]), k)
      const [ids, weights] = [(await route.ids.read()) as Int32Array, await f32(route.weights)]
      for (let t = 0; t < tokens; t++) {
        const expected = oracle(logits.subarray(t * experts, (t + 1) * experts), k)
        const what = `seed ${random.seed}, token ${t} of ${experts} experts`
        expect(Array.from(ids.subarray(t * k, (t + 1) * k)), what).toEqual(expected.ids)
        expectClose(weights.subarray(t * k, (t + 1) * k), expected.weights, { absolute: 1e-6 }, what)
      }
    }
  })

  it('keeps ids valid and shows NaN in the weights', async () => {
    const { NaN: nan, NEGATIVE_INFINITY: low } = Number
    const rows = [
      [nan, nan, nan, nan],
      [1, nan, 3, nan],
      [low, low, low, low],
      [low, 2, low, 2],
      [1e38, -1e38, 0, 1e38],
    ]
    const route = moeRoute(device.tensor(rows.flat(), [rows.length, 4]), 3)
    const [ids, weights] = [Array.from((await route.ids.read()) as Int32Array), await f32(route.weights)]
    expect(ids).toEqual([0, 1, 2, 2, 0, 1, 0, 1, 2, 1, 3, 0, 0, 3, 2])
    expect(weights.subarray(0, 9).every(Number.isNaN)).toBe(true)
    expect(Array.from(weights.subarray(9))).toEqual([0.5, 0.5, 0, 0.5, 0.5, 0])
  })

  it('refuses more choices than experts', () => {
    expect(() => moeRoute(device.zeros([1, 4]), 5)).toThrow(/expected an integer from 1 to 4 for topK/)
  })
})
