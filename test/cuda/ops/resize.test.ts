import { it } from 'vitest'
import { resizeBilinear } from '../../../lib/ops.ts'
import { Random } from '../../ops/helpers.ts'
import { ACTIVATIONS, cudaTests } from '../helpers.ts'

// Three blends, in either order of rows and columns: a few roundings of f32.
const limit = { absolute: 1e-6, relative: 1e-6 }

cudaTests('bilinear resizing on CUDA', cuda => {
  it.each([
    { shape: [2, 5, 3, 3], to: [7, 2] },
    { shape: [1, 3, 3, 10], to: [8, 9] },
    { shape: [2, 6, 5, 16], to: [12, 10] },
    { shape: [1, 7, 4, 24], to: [3, 3] },
    { shape: [1, 1, 1, 8], to: [5, 4] },
    { shape: [1, 33, 31, 3], to: [14, 14] },
  ])('resizes $shape to $to', async ({ shape, to }) => {
    const random = new Random()
    const data = random.normals(shape.reduce((a, b) => a * b))
    for (const dtype of ACTIVATIONS)
      await cuda.same({ dtype, limit, what: `seed ${random.seed}` }, t =>
        resizeBilinear(t.a(data, shape), to[0]!, to[1]!),
      )
  })
})
