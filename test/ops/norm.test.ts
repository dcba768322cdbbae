import { describe, expect, it } from 'vitest'
import { addLayerNorm, addRmsNorm, layerNorm, rmsNorm } from '../../lib/ops.ts'
import type { Tensor } from '../../lib/tensor.ts'
import { expectClose, f32, openDevice, Random } from './helpers.ts'

const device = openDevice()

function strided(rows: Float32Array[], extra: number): Tensor {
  const width = rows[0]!.length
  const all = new Float32Array(rows.length * (width + extra)).fill(Number.NaN)
  rows.forEach((row, t) => {
    all.set(row, t * (width + extra))
  })
  return device.tensor(all, [rows.length, width + extra]).narrow(1, 0, width)
}

/** Both norms in f64: centered is LayerNorm. */
function oracle(rows: ArrayLike<number>[], weight: ArrayLike<number>, eps: number, bias?: ArrayLike<number>) {
  return rows.flatMap(row => {
    const x = Array.from(row)
    const mean = bias ? x.reduce((a, b) => a + b) / x.length : 0
    const variance = x.reduce((sum, value) => sum + (value - mean) ** 2, 0) / x.length
    return x.map((v, i) => ((v - mean) / Math.sqrt(variance + eps)) * weight[i]! + (bias?.[i] ?? 0))
  })
}

const eps = Math.fround(1e-6)
// f32 sums of up to some thousand terms; the results are of order 1.
const limit = { absolute: 4e-6, relative: 4e-6 }

type Row = (random: Random, width: number) => Float32Array
const kinds: Record<string, Row> = {
  normal: (random, width) => random.normals(width),
  'small values, where eps counts': (random, width) => random.normals(width, 1e-3),
  'values whose squares overflow': (random, width) => random.normals(width, 1e30),
  'values whose sum overflows': (random, width) =>
    Float32Array.from({ length: width }, () => 3e38 * (random.next() < 0.9 ? 1 : 0.5)),
  'a mean far above the deviation': (random, width) => random.normals(width).map(x => 30_000 + x),
  'equal values': (random, width) => new Float32Array(width).fill(1e9 * random.normal()),
  'equal largest values': (_, width) => new Float32Array(width).fill(3.4e38),
  zeros: (_, width) => new Float32Array(width),
}
const widths = [1, 3, 16, 100, 1024, 2051]

describe('rmsNorm and layerNorm', () => {
  for (const [kind, make] of Object.entries(kinds)) {
    const random = new Random()
    it(`equal f64 arithmetic for rows of ${kind}`, async () => {
      for (const width of widths) {
        const rows = Array.from({ length: random.integer(1, 5) }, () => make(random, width))
        const weight = random.normals(width)
        const bias = random.normals(width)
        const what = `seed ${random.seed} width ${width}`
        const [w, b] = [device.tensor(weight, [width]), device.tensor(bias, [width])]
        const x = strided(rows, 3)
        expectClose(await f32(rmsNorm(x, w, { eps })), oracle(rows, weight, eps), limit, `rms, ${what}`)
        const gemma = weight.map(value => value + 1)
        expectClose(
          await f32(rmsNorm(x, w, { eps, weightOffset: 1 })),
          oracle(rows, gemma, eps),
          limit,
          `rms with 1 + weight, ${what}`,
        )
        expectClose(
          await f32(layerNorm(x, w, b, { eps })),
          oracle(rows, weight, eps, bias),
          limit,
          `layer norm, ${what}`,
        )
      }
    })
  }

  it('adds the residual first and returns the sum', async () => {
    const random = new Random()
    for (const width of widths) {
      const rows = Array.from({ length: 4 }, () => random.normals(width))
      const residual = rows.map(() => random.normals(width))
      const sums = rows.map((row, t) => row.map((value, i) => value + residual[t]![i]!))
      const weight = random.normals(width)
      const bias = random.normals(width)
      const [w, b] = [device.tensor(weight, [width]), device.tensor(bias, [width])]
      const what = `seed ${random.seed} width ${width}`
      const rms = addRmsNorm(strided(rows, 1), strided(residual, 4), w, { eps, weightOffset: 0 })
      const layer = addLayerNorm(strided(rows, 1), strided(residual, 4), w, b, { eps })
      expect([...(await f32(rms.sum))], what).toEqual(sums.flatMap(row => [...row]))
      expect([...(await f32(layer.sum))], what).toEqual(sums.flatMap(row => [...row]))
      expectClose(await f32(rms.normed), oracle(sums, weight, eps), limit, `rms, ${what}`)
      expectClose(await f32(layer.normed), oracle(sums, weight, eps, bias), limit, `layer norm, ${what}`)
    }
  })

  it('gives a row the same bits alone and among others', async () => {
    const random = new Random()
    const width = 1003
    const rows = Array.from({ length: 37 }, () => random.normals(width))
    const w = device.tensor(random.normals(width), [width])
    const b = device.tensor(random.normals(width), [width])
    for (const norm of [(x: Tensor) => rmsNorm(x, w, { eps }), (x: Tensor) => layerNorm(x, w, b, { eps })]) {
      const all = await f32(norm(strided(rows, 0)))
      for (const t of [0, 17, 36])
        expect(await f32(norm(strided([rows[t]!], 0))), `seed ${random.seed} row ${t}`).toEqual(
          all.slice(t * width, (t + 1) * width),
        )
    }
  })

  it('keeps a NaN or infinity to its own row', async () => {
    const random = new Random()
    const rows = Array.from({ length: 3 }, () => random.normals(40))
    rows[1]![7] = Number.NaN
    rows[2]![7] = Number.POSITIVE_INFINITY
    const [w, b] = [device.tensor(random.normals(40), [40]), device.zeros([40])]
    for (const result of [
      await f32(rmsNorm(strided(rows, 0), w, { eps })),
      await f32(layerNorm(strided(rows, 0), w, b, { eps })),
    ]) {
      expect([...result.slice(0, 40)].every(Number.isFinite)).toBe(true)
      expect([...result.slice(40, 80)].every(Number.isNaN)).toBe(true)
      expect([...result.slice(80)].some(Number.isNaN)).toBe(true)
    }
  })
})
