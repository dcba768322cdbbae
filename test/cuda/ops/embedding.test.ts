import { expect, it } from 'vitest'
import { cast, embedding, spliceEmbeddings } from '../../../lib/ops.ts'
import { Random } from '../../ops/helpers.ts'
import { ACTIVATIONS, cudaTests, HALVES } from '../helpers.ts'

cudaTests('row gathers on CUDA', cuda => {
  it.each(ACTIVATIONS)('looks tokens up for %s activations, in tables of every type', async dtype => {
    const random = new Random()
    for (const width of [33, 64, 2056]) {
      const table = random.normals(9 * (width + 16), 2)
      const ids = Int32Array.of(8, 0, -1, 3, 3)
      for (const stored of ACTIVATIONS)
        await cuda.same(
          { dtype, limit: 'exact', what: `${stored}, width ${width}, seed ${random.seed}` },
          t => {
            const x = t.plain(table, [9, width + 16])
            const all = stored === 'f32' ? x : cast(x, stored)
            const gids = t.plain(ids, [5])
            const parts = [all.narrow(1, 0, width), all.narrow(1, 16, width), all.narrow(1, 3, width)]
            return parts.map(part => embedding(part, gids, { scale: 5.5, out: t.out }))
          },
        )
      for (const stored of [...HALVES, 'int8', 'int4'] as const)
        await cuda.same(
          { dtype, limit: 'exact', what: `packed ${stored}, width ${width}, seed ${random.seed}` },
          t => {
            const packed = t.packed(table.slice(0, 9 * width), [9, width], { dtype: stored })
            return [
              embedding(packed, t.plain(ids, [5]), { out: t.out }),
              embedding(packed, t.plain(ids, [5]), { scale: 3 }),
            ]
          },
        )
    }
  })

  it.each(ACTIVATIONS)('splices %s images among text', async dtype => {
    const random = new Random()
    for (const width of [33, 34, 64, 2056]) {
      const [text, image] = [random.normals(5 * (width + 16)), random.normals(4 * (width + 16))]
      const index = Int32Array.of(0, -1, -4, 3, 1, 4)
      await cuda.same({ dtype, limit: 'exact', what: `width ${width}, seed ${random.seed}` }, t => {
        const [gt, gi] = [t.a(text, [5, width + 16]), t.a(image, [4, width + 16])]
        return [0, 16, 1, 2].map(start =>
          spliceEmbeddings(gt.narrow(1, start, width), gi.narrow(1, 16 - start, width), t.plain(index, [6])),
        )
      })
    }
  })

  it('reports ids and indices beyond the range to the next read', async () => {
    const t = cuda.inputs(cuda.gpu, 'bf16')
    const table = t.a([0, 1, 2, 3, 4, 5], [3, 2])
    const bad = embedding(table, t.plain(Int32Array.of(7), [1]), { out: 'bf16' })
    await expect(bad.read()).rejects.toThrow(/expected an id below 3 but received 7/)
    const spliced = spliceEmbeddings(table, table, t.plain(Int32Array.of(0, -4), [2]))
    await expect(spliced.read()).rejects.toThrow(/from -3 to 2 .* received -4/)
  })
})
