import { it } from 'vitest'
import { moeRoute } from '../../../lib/ops.ts'
import { Random } from '../../ops/helpers.ts'
import { cudaTests } from '../helpers.ts'

// The softmax of at most 64 numbers: exponentials to 2 ulp on either side, then one sum and one division.
const limit = { absolute: 1e-6 }

cudaTests('mixtures of experts on the GPU', cuda => {
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
