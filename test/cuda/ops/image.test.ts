import { expect, it } from 'vitest'
import { addTile, toUint8 } from '../../../lib/ops.ts'
import { Random } from '../../ops/helpers.ts'
import { ACTIVATIONS, cudaTests, floats } from '../helpers.ts'

cudaTests('images on their way out, on CUDA', cuda => {
  it.each(ACTIVATIONS)('toUint8 rounds %s to bytes as the CPU does', async dtype => {
    const random = new Random()
    // Halves between bytes, beyond either end, and what is no number: exact in every type, whether fused or not.
    const edges = [0, -0, 0.5, 1.5, 2.5, 254.5, 255, 255.5, 256, -0.5, -1, 1e30, -1e30, 3e-5]
    const none = [Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY]
    for (const count of [1, 7, 16, 5003]) {
      const x = Float32Array.from(
        { length: count },
        (_, i) => [...edges, ...none][i] ?? random.integer(-300, 600) / 2,
      )
      await cuda.same({ dtype, limit: 'exact', what: `seed ${random.seed}` }, t => [
        toUint8(t.a(x, [count]), { scale: 1, offset: 0 }),
        toUint8(t.a(x, [count]), { scale: 0.5, offset: 64 }),
      ])
    }
    // At an address that vectors cannot be loaded from.
    const t = cuda.inputs(cuda.gpu, dtype)
    const x = t.a([0, 3, 7, 250, 1, 2, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [19])
    const bytes = await toUint8(x.narrow(0, 1, 18), { scale: 1, offset: 0 }).read()
    expect([...bytes]).toEqual([3, 7, 250, 1, 2, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17])
  })

  it.each(ACTIVATIONS)('addTile adds weighted %s tiles as the CPU does', async dtype => {
    const random = new Random()
    for (const { canvas, tile, at } of [
      { canvas: [1, 1, 1, 1], tile: [1, 1], at: [0, 0] },
      { canvas: [2, 9, 12, 3], tile: [5, 7], at: [4, 2] },
      { canvas: [1, 6, 200, 3], tile: [6, 190], at: [0, 10] },
      { canvas: [2, 4, 70, 4], tile: [4, 70], at: [0, 0] },
    ]) {
      const [b, , , c] = canvas as [number, number, number, number]
      const [h, w] = tile as [number, number]
      const background = random.normals(canvas.reduce((x, y) => x * y))
      const pixels = random.normals(b * h * w * c)
      const [rows, columns] = [random.normals(h), random.normals(w)]
      // A product of three and a sum, of numbers of a handful.
      const limit = { absolute: 2e-6, relative: 1e-6 }
      await cuda.same({ dtype, limit, what: `[${canvas}], seed ${random.seed}` }, t => {
        const result = t.plain(background, canvas)
        const weights = { rows: t.plain(rows, [h]), columns: t.plain(columns, [w]) }
        addTile(result, t.a(pixels, [b, h, w, c]), { ...weights, y: at[0]!, x: at[1]! })
        return result
      })
    }
  })

  it('addTile leaves alone what lies around the tile', async () => {
    const t = cuda.inputs(cuda.gpu, 'f16')
    const canvas = t.plain(new Float32Array(2 * 4 * 5).fill(7), [2, 4, 5, 1])
    const one = t.plain(Float32Array.of(1, 1), [2])
    addTile(canvas, t.a(new Float32Array(8).fill(1), [2, 2, 2, 1]), { rows: one, columns: one, y: 1, x: 2 })
    const image = [7, 7, 7, 7, 7, 7, 7, 8, 8, 7, 7, 7, 8, 8, 7, 7, 7, 7, 7, 7]
    expect([...(await floats(canvas))]).toEqual([...image, ...image])
  })
})
