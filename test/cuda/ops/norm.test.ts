import { expect, it } from 'vitest'
import { addLayerNorm, addRmsNorm, layerNorm, rmsNorm } from '../../../lib/ops.ts'
import { Random } from '../../ops/helpers.ts'
import { ACTIVATIONS, cudaTests, floats } from '../helpers.ts'

// f32 sums of up to 8200 terms in trees of depth < 40, which are then divided and rooted: a few units of 2^-24 each,
// times normalized values of a handful.
const limit = { absolute: 8e-6, relative: 8e-6 }
// Both sides of every change of kernel.
const WIDTHS = [1, 3, 100, 192, 1024, 1027, 4096, 4099, 8192, 8200]

cudaTests('norms on CUDA', cuda => {
  it.each(WIDTHS.flatMap(width => ACTIVATIONS.map(dtype => ({ width, dtype }))))(
    'normalizes $dtype rows of $width',
    async ({ width, dtype }) => {
      const random = new Random()
      const rows = width > 1024 ? 2 : 19
      for (const scale of [1, 1e30, 1e-20]) {
        const [x, residual] = [random.normals(rows * width, scale), random.normals(rows * width, scale)]
        const [w, b] = [random.normals(width), random.normals(width)]
        await cuda.same({ dtype, limit, what: `seed ${random.seed}, scale ${scale}` }, t => {
          const [gx, gr] = [t.a(x, [rows, width]), t.a(residual, [rows, width])]
          const [gw, gb] = [t.plain(w, [width]), t.plain(b, [width])]
          const rms = addRmsNorm(gx, gr, gw, { eps: 1e-6, weightOffset: 1 })
          const layer = addLayerNorm(gx, gr, gw, gb, { eps: 1e-5 })
          return [
            rms.normed,
            rms.sum,
            layer.normed,
            layer.sum,
            rmsNorm(gx, gw, { eps: 1e-6 }),
            layerNorm(gx, gw, gb, { eps: 1e-5 }),
          ]
        })
      }
    },
  )

  it.each(ACTIVATIONS)('normalizes %s rows that are constant, nearly so, or not finite', async dtype => {
    const random = new Random()
    const width = 72
    const row = (of: (i: number) => number) => Array.from({ length: width }, (_, i) => of(i))
    const x = [
      row(() => 0),
      row(() => 5),
      row(i => 1000 + (i === 7 ? 8 : 0)),
      row(i => (i === 3 ? Number.POSITIVE_INFINITY : 1)),
      row(i => (i === 71 ? Number.NaN : 1)),
      row(() => 60000),
    ].flat()
    const [w, b] = [random.normals(width), random.normals(width)]
    await cuda.same({ dtype, limit, what: `seed ${random.seed}` }, t => {
      const [gx, gw, gb] = [t.a(x, [6, width]), t.plain(w, [width]), t.plain(b, [width])]
      return [rmsNorm(gx, gw, { eps: 1e-6 }), layerNorm(gx, gw, gb, { eps: 1e-5 })]
    })
  })

  it.each(ACTIVATIONS)(
    'gives a %s row the same bits alone, among many, and wherever it lies',
    async dtype => {
      const random = new Random()
      for (const width of [200, 1500]) {
        const rows = 2100
        const t = cuda.inputs(cuda.gpu, dtype)
        const few = random.normals(5 * (width + 16))
        const padded = t.a(few, [5, width + 16])
        const [w, b] = [t.plain(random.normals(width), [width]), t.plain(random.normals(width), [width])]
        const norms = (x: typeof padded) => [rmsNorm(x, w, { eps: 1e-6 }), layerNorm(x, w, b, { eps: 1e-5 })]
        const offsets = [0, 3, 8]
        for (const offset of offsets) {
          const x = padded.narrow(1, offset, width)
          const together = await Promise.all(norms(x).map(floats))
          for (let row = 0; row < 5; row++) {
            const alone = await Promise.all(norms(x.narrow(0, row, 1)).map(floats))
            for (const [i, values] of alone.entries())
              expect(values, `seed ${random.seed}`).toEqual(
                together[i]!.slice(row * width, (row + 1) * width),
              )
          }
          // The same numbers where vectors can be loaded.
          const copied = t.a(await floats(x), [5, width])
          expect(await Promise.all(norms(copied).map(floats)), `seed ${random.seed}`).toEqual(together)
        }
        // More rows than blocks take at once.
        if (width > 1024) continue
        const line = few.slice(0, width)
        const many = new Float32Array(rows * width)
        for (let row = 0; row < rows; row++) many.set(line, row * width)
        const result = await floats(rmsNorm(t.a(many, [rows, width]), w, { eps: 1e-6 }))
        for (const row of [0, 1, 1727, 1728, rows - 1])
          expect(result.slice(row * width, (row + 1) * width), `row ${row}`).toEqual(result.slice(0, width))
      }
    },
  )
})
