import { expect, it } from 'vitest'
import { schedulerStep } from '../../../lib/ops.ts'
import type { Tensor } from '../../../lib/tensor.ts'
import { Random } from '../../ops/helpers.ts'
import { ACTIVATIONS, cudaTests, floats, type Inputs } from '../helpers.ts'

// Five f32 products and sums of normals, fused or not.
const limit = { absolute: 2e-6, relative: 1e-6 }

interface Terms {
  halves: 1 | 2
  model: boolean
  previous: boolean
  noise: boolean
}

const TERMS: Terms[] = [1, 2].flatMap(halves =>
  Array.from({ length: 8 }, (_, bits) => ({
    halves: halves as 1 | 2,
    model: (bits & 1) > 0,
    previous: (bits & 2) > 0,
    noise: (bits & 4) > 0,
  })),
)

interface Data extends Terms {
  shape: [number, number, number, number]
  x: Float32Array
  eps: Float32Array
  coefficients: Float32Array
  before: Float32Array
  drawn: Float32Array
}

function draw(terms: Terms, shape: Data['shape'], random: Random): Data {
  const count = shape.reduce((a, b) => a * b)
  return {
    ...terms,
    shape,
    x: random.normals(count),
    eps: random.normals(terms.halves * count),
    coefficients: random.normals(shape[0] * 8),
    before: random.normals(count),
    drawn: random.normals(count),
  }
}

/** Of the images from `first` on. */
function run(t: Inputs, data: Data, first = 0, count = data.shape[0]): Tensor[] {
  const [batch, ...image] = data.shape
  const numbers = image.reduce((a, b) => a * b)
  const rows = (values: Float32Array, at = first) => values.slice(at * numbers, (at + count) * numbers)
  const plain = (values: Float32Array) => t.plain(rows(values), [count, ...image])
  const eps = [...rows(data.eps), ...(data.halves === 2 ? rows(data.eps, batch + first) : [])]
  const { out, input, predicted } = schedulerStep(plain(data.x), {
    coefficients: t.plain(data.coefficients.slice(first * 8, (first + count) * 8), [count, 8]),
    model: data.model ? t.a(eps, [data.halves * count, ...image]) : undefined,
    previous: data.previous ? plain(data.before) : undefined,
    noise: data.noise ? plain(data.drawn) : undefined,
    halves: data.halves,
    input: t.out,
  })
  return [out, input, ...(predicted ? [predicted] : [])]
}

cudaTests('schedulerStep on CUDA', cuda => {
  it.each(TERMS)(
    'agrees with the CPU: $halves halves, model $model, previous $previous, noise $noise',
    async terms => {
      const random = new Random()
      for (const dtype of ACTIVATIONS)
        for (const shape of [
          [3, 9, 11, 4],
          [1, 1, 1, 1],
        ] as Data['shape'][]) {
          const data = draw(terms, shape, random)
          await cuda.same({ dtype, limit, what: `[${shape}], seed ${random.seed}` }, t => run(t, data))
        }
    },
  )

  it('gives an image the same bits alone and among others', async () => {
    const random = new Random()
    const data = draw({ halves: 2, model: true, previous: true, noise: true }, [3, 9, 11, 4], random)
    const t = cuda.inputs(cuda.gpu, 'bf16')
    const size = 9 * 11 * 4
    const [out, input, predicted] = await Promise.all(run(t, data).map(floats))
    for (let b = 0; b < 3; b++) {
      const alone = await Promise.all(run(t, data, b, 1).map(floats))
      const part = (values: Float32Array, at = b) => [...values.slice(at * size, (at + 1) * size)]
      const expected = [part(out!), [...part(input!), ...part(input!, 3 + b)], part(predicted!)]
      expect(
        alone.map(values => [...values]),
        `seed ${random.seed}`,
      ).toEqual(expected)
    }
  })
})
