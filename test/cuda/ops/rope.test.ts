import { expect, it } from 'vitest'
import { ropeAndCache } from '../../../lib/ops.ts'
import { Random } from '../../ops/helpers.ts'
import { ACTIVATIONS, cudaTests } from '../helpers.ts'

// Cosines and sines of f32 angles within two units in the last place, times values of a handful.
const limit = { absolute: 2e-6 }

cudaTests('ropeAndCache on CUDA', cuda => {
  it.each(ACTIVATIONS.flatMap(dtype => ACTIVATIONS.map(pages => ({ dtype, pages }))))(
    'rotates $dtype rows and writes $pages pages',
    async ({ dtype, pages }) => {
      const random = new Random()
      for (const [heads, kvHeads, d] of [
        [6, 2, 10],
        [3, 3, 16],
        [4, 1, 64],
        [2, 2, 512],
      ] as const) {
        const [pageSize, tokens, pad] = [3, 9, 16]
        const width = (heads + 2 * kvHeads) * d
        const qkv = random.normals(tokens * (width + pad))
        for (const start of [0, 16, 3])
          await cuda.same(
            { dtype, limit, what: `${heads} heads of ${d}, start ${start}, seed ${random.seed}` },
            t => {
              const shape = [5, kvHeads, pageSize, d]
              const [kPages, vPages] = [t.device.zeros(shape, pages), t.device.zeros(shape, pages)]
              const q = ropeAndCache(t.a(qkv, [tokens, width + pad]).narrow(1, start, width), {
                positions: t.plain(
                  Int32Array.from({ length: tokens }, (_, token) => token * 5000),
                  [tokens],
                ),
                slots: t.plain(
                  Int32Array.from({ length: tokens }, (_, token) => (token === 4 ? -1 : (token * 4) % 15)),
                  [tokens],
                ),
                invFreq: t.plain(
                  Float32Array.from({ length: d / 2 }, (_, i) => 10000 ** ((-2 * i) / d)),
                  [d / 2],
                ),
                kPages,
                vPages,
              })
              return [q, kPages, vPages]
            },
          )
      }
    },
  )

  it('reports a slot beyond the pages to the next read', async () => {
    const t = cuda.inputs(cuda.gpu, 'bf16')
    const q = ropeAndCache(t.a(new Float32Array(3 * 16), [1, 48]), {
      positions: t.plain(Int32Array.of(1), [1]),
      slots: t.plain(Int32Array.of(6), [1]),
      invFreq: t.plain(new Float32Array(8), [8]),
      kPages: cuda.gpu.zeros([2, 1, 3, 16], 'bf16'),
      vPages: cuda.gpu.zeros([2, 1, 3, 16], 'bf16'),
    })
    await expect(q.read()).rejects.toThrow(/slot below 6 .* received 6/)
  })
})
