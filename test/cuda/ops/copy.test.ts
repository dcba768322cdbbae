import { expect, it } from 'vitest'
import { cast, permute, scaleColumns } from '../../../lib/ops.ts'
import type { Tensor } from '../../../lib/tensor.ts'
import { Random } from '../../ops/helpers.ts'
import { ACTIVATIONS, cudaTests } from '../helpers.ts'

/** Numbers that round, overflow and vanish in the smaller types, among ordinary ones. */
function numbers(random: Random, count: number): Float32Array {
  const data = random.normals(count, 300)
  data.set([Number.POSITIVE_INFINITY, -0, 1e-40, 70000, 6e-8, 3.4e38, Number.NaN].slice(0, count))
  return data
}

cudaTests('copies on CUDA', cuda => {
  it.each(ACTIVATIONS)('casts %s bit for bit, in vectors and not', async dtype => {
    const random = new Random()
    const data = numbers(random, 6 * 7 * 40)
    await cuda.same({ dtype, limit: 'exact', what: `seed ${random.seed}` }, t => {
      const x = t.plain(data, [6, 7, 40])
      const from = t.device === cuda.gpu ? cast(x, dtype) : cast(cast(x, dtype), 'f32')
      const views = [
        from,
        from.narrow(2, 8, 16),
        from.narrow(2, 1, 16),
        from.narrow(1, 2, 3),
        from.narrow(2, 3, 5),
      ]
      const types = t.device === cuda.gpu ? ACTIVATIONS : (['f32', 'f32', 'f32'] as const)
      return views.flatMap(view => types.map(type => cast(view, type)))
    })
  })

  it('copies bytes and integers from any view', async () => {
    const random = new Random()
    const bytes = Uint8Array.from({ length: 5 * 48 }, () => random.integer(0, 255))
    const integers = Int32Array.from({ length: 5 * 48 }, () => random.integer(-(2 ** 31), 2 ** 31 - 1))
    await cuda.same({ limit: 'exact', what: `seed ${random.seed}` }, t =>
      [t.plain(bytes, [5, 48]), t.plain(integers, [5, 48])].flatMap(x =>
        [x, x.narrow(1, 16, 16), x.narrow(1, 5, 20), x.narrow(0, 1, 3)].map(view => cast(view, view.dtype)),
      ),
    )
  })

  // Tiles that are full, cut on either side, batched; runs too short for tiles; an innermost dimension that stays.
  it.each([
    { shape: [64, 96], dims: [1, 0] },
    { shape: [33, 70], dims: [1, 0] },
    { shape: [3, 41, 2, 34], dims: [2, 3, 0, 1] },
    { shape: [9, 8, 5, 5], dims: [0, 2, 3, 1] },
    { shape: [4, 3, 5, 5], dims: [0, 2, 3, 1] },
    { shape: [5, 6, 32], dims: [1, 0, 2] },
    { shape: [5, 6, 7], dims: [1, 0, 2] },
    { shape: [2, 3, 4, 5, 16], dims: [4, 2, 0, 3, 1] },
    { shape: [1, 40, 1], dims: [2, 1, 0] },
  ])('permutes $shape by $dims', async ({ shape, dims }) => {
    const random = new Random()
    const count = shape.reduce((a, b) => a * b)
    const halves = Uint16Array.from({ length: count }, () => random.integer(0, 0x7bff))
    const bytes = Uint8Array.from({ length: count }, () => random.integer(0, 255))
    const data = random.normals(count)
    await cuda.same({ limit: 'exact', what: `seed ${random.seed}` }, t => {
      const half = t.device.tensor(halves, shape, 'f16')
      const views = (x: Tensor) => (shape[1]! > 2 ? [x, x.narrow(1, 1, shape[1]! - 1)] : [x])
      return [t.plain(data, shape), half, t.plain(bytes, shape)].flatMap(x =>
        views(x).map(view => permute(view, dims)),
      )
    })
  })

  it.each(ACTIVATIONS)('scales columns of %s', async dtype => {
    const random = new Random()
    const [rows, columns] = [130, 48]
    const [data, scale] = [numbers(random, rows * columns), random.normals(columns)]
    await cuda.same({ dtype, limit: 'exact', what: `seed ${random.seed}` }, t => {
      const w = t.a(data, [rows, columns])
      const part = (start: number, length: number) =>
        scaleColumns(w.narrow(1, start, length), t.plain(scale.slice(start, start + length), [length]))
      return [part(0, columns), part(16, 24), part(1, 24), part(0, 13)]
    })
  })

  it('gives nothing for nothing', async () => {
    expect((await cast(cuda.gpu.empty([0, 4]), 'bf16').read()).length).toBe(0)
    expect((await permute(cuda.gpu.empty([3, 0]), [1, 0]).read()).length).toBe(0)
  })
})
