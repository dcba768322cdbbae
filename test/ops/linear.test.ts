import { describe, expect, it } from 'vitest'
import { type Activation, linear, packLinear } from '../../lib/ops.ts'
import type { Tensor } from '../../lib/tensor.ts'
import { expectClose, f32, openDevice, Random } from './helpers.ts'
import { activations, exactWeights, matmul, storageTypes } from './weights.ts'

const device = openDevice({ threads: 2 })

// Inputs are scaled so that sums are of order 1 to 10; f32 chains of at most 256 terms, then a sum per block, err
// by a few 1e-7 of the sum of magnitudes.
const limit = { absolute: 1e-5, relative: 1e-5 }

/** Rows with NaN between them. */
function strided(values: Float32Array, rows: number, width: number, gap: number): Tensor {
  const all = new Float32Array(rows * (width + gap)).fill(Number.NaN)
  for (let r = 0; r < rows; r++) all.set(values.subarray(r * width, (r + 1) * width), r * (width + gap))
  return device.tensor(all, [rows, width + gap]).narrow(1, 0, width)
}

function pack(w: Float32Array, n: number, k: number, dtype: (typeof storageTypes)[number], gated = false) {
  return packLinear(device.tensor(w, [n, k]), { dtype, gated })
}

describe('linear', () => {
  // Both regimes (streaming up to 8 rows, tiles above), both sides of register tiles, vectors, and K blocks of 256.
  const shapes: [number, number, number][] = [
    [1, 1, 1],
    [1, 33, 65],
    [1, 200, 2051],
    [2, 129, 31],
    [3, 64, 512],
    [4, 97, 300],
    [5, 40, 257],
    [6, 31, 256],
    [7, 70, 96],
    [8, 130, 513],
    [9, 65, 129],
    [14, 32, 40],
    [15, 96, 255],
    [29, 17, 768],
    [61, 259, 77],
    [180, 40, 33],
  ]
  for (const dtype of storageTypes)
    it(`equals f64 products with ${dtype} weights`, async () => {
      const random = new Random()
      for (const [m, n, k] of shapes) {
        const w = exactWeights(random, dtype, n, k)
        const x = random.normals(m * k, 1 / Math.sqrt(k))
        const out = linear(strided(x, m, k, random.integer(0, 3)), pack(w, n, k, dtype))
        expect(out.shape).toEqual([m, n])
        expectClose(await f32(out), matmul(x, w, m, n, k), limit, `seed ${random.seed}, ${m}x${n}x${k}`)
      }
    })

  for (const gated of [false, true])
    for (const name of Object.keys(activations) as Activation[])
      it(`fuses bias, ${name}${gated ? ' of the gate' : ''}, scale and residual`, async () => {
        const random = new Random()
        const act = activations[name]
        for (const m of [1, 6, 8, 30])
          for (const parts of [0, 1, 2, 3, 4, 5, 6, 7]) {
            const [n, k] = [random.integer(1, 90), random.integer(1, 400)]
            const rows = gated ? 2 * n : n
            const dtype = storageTypes[random.integer(0, 4)]!
            const w = exactWeights(random, dtype, rows, k)
            const x = random.normals(m * k, 1 / Math.sqrt(k))
            const bias = parts & 1 ? random.normals(rows) : undefined
            const scale = parts & 2 ? random.normals(n) : undefined
            const period = [m, 1, m % 2 ? m : m / 2][random.integer(0, 2)]!
            const residual = parts & 4 ? random.normals(period * n) : undefined
            const sums = matmul(x, w, m, rows, k)
            const expected = Array.from({ length: m * n }, (_, i) => {
              const [row, column] = [Math.floor(i / n), i % n]
              let y = act(sums[row * rows + column]! + (bias?.[column] ?? 0))
              if (gated) y *= sums[row * rows + n + column]! + (bias?.[n + column] ?? 0)
              return y * (scale?.[column] ?? 1) + (residual?.[(row % period) * n + column] ?? 0)
            })
            const out = linear(device.tensor(x, [m, k]), pack(w, rows, k, dtype, gated), {
              bias: bias && device.tensor(bias, [rows]),
              scale: scale && device.tensor(scale, [n]),
              residual: residual && strided(residual, period, n, random.integer(0, 2)),
              activation: name,
            })
            // A product of two sums doubles the error.
            const wide = { absolute: 4e-5, relative: 2e-5 }
            const what = `seed ${random.seed}, ${m}x${n}x${k} ${dtype}, parts ${parts}`
            expectClose(await f32(out), expected, gated ? wide : limit, what)
          }
      })

  it('computes activations to 1e-6, with their limits at large values', async () => {
    const random = new Random()
    const x = Float32Array.from({ length: 40_000 }, () => (random.next() - 0.5) * 40)
    x.set([0, -0, 1e-30, 1e4, -1e4, 1e19, -1e19, 3e38, -3e38], 0)
    const one = packLinear(device.tensor([1], [1, 1]))
    for (const name of Object.keys(activations) as Activation[]) {
      const out = await f32(linear(device.tensor(x, [x.length, 1]), one, { activation: name }))
      // Results near x cannot be closer than their own rounding.
      const expected = Array.from(x, v => activations[name](v))
      expectClose(out, expected, { absolute: 1e-6, relative: 2 ** -22 }, `seed ${random.seed}, ${name}`)
    }
  })

  it('gives a row the same bits in every batch and on any number of threads', async () => {
    const random = new Random()
    const single = openDevice({ threads: 1 })
    const many = openDevice({ threads: 5 })
    for (const dtype of storageTypes)
      for (const gated of [false, true]) {
        const [m, n, k] = [40, 2 * random.integer(1, 80), random.integer(1, 1200)]
        const w = random.normals(n * k)
        const x = random.normals(m * k)
        const run = async (on: typeof device, from: number, count: number) => {
          const packed = packLinear(on.tensor(w, [n, k]), { dtype, gated })
          const part = x.subarray(from * k, (from + count) * k)
          return f32(linear(on.tensor(part, [count, k]), packed, { activation: 'silu' }))
        }
        const all = await run(device, 0, m)
        const width = all.length / m
        const what = `seed ${random.seed} ${dtype} gated ${gated} ${n}x${k}`
        expect(await run(single, 0, m), what).toEqual(all)
        expect(await run(many, 0, m), what).toEqual(all)
        for (const count of [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 14, 15, 27]) {
          const from = random.integer(0, m - count)
          const part = await run(count % 2 ? many : device, from, count)
          expect(part, `${what}, rows ${from}+${count}`).toEqual(
            all.subarray(from * width, (from + count) * width),
          )
        }
      }
  })

  it('keeps NaN and infinity in their rows', async () => {
    const random = new Random()
    for (const m of [5, 20]) {
      const [n, k] = [50, 300]
      const w = random.normals(n * k)
      const x = random.normals(m * k)
      const clean = await f32(linear(device.tensor(x, [m, k]), pack(w, n, k, 'bf16')))
      x[1 * k + 299] = Number.NaN
      x[3 * k] = Number.POSITIVE_INFINITY
      const out = await f32(linear(device.tensor(x, [m, k]), pack(w, n, k, 'bf16')))
      for (let row = 0; row < m; row++) {
        const got = out.subarray(row * n, (row + 1) * n)
        if (row === 1) expect(got.every(Number.isNaN)).toBe(true)
        else if (row === 3) expect(got.some(Number.isFinite)).toBe(false)
        else expect(got).toEqual(clean.subarray(row * n, (row + 1) * n))
      }
    }
  })

  it('carries NaN through every activation', async () => {
    const one = packLinear(device.tensor([1], [1, 1]))
    const x = device.tensor(new Float32Array(20).fill(Number.NaN), [20, 1])
    for (const activation of Object.keys(activations) as Activation[])
      expect((await f32(linear(x, one, { activation }))).every(Number.isNaN), activation).toBe(true)
  })

  it('takes leading dimensions and no rows', async () => {
    const w = packLinear(device.tensor([1, 2, 3, 4, 5, 6], [3, 2]))
    const x = device.tensor([1, 0, 0, 1, 1, 1, 2, 2], [2, 2, 2])
    const out = linear(x, w)
    expect(out.shape).toEqual([2, 2, 3])
    expect(Array.from(await f32(out))).toEqual([1, 3, 5, 2, 4, 6, 3, 7, 11, 6, 14, 22])
    expect(linear(device.empty([0, 2]), w).shape).toEqual([0, 3])
  })

  it('refuses what does not fit', () => {
    const w = packLinear(device.zeros([3, 2]))
    const x = device.zeros([4, 2])
    expect(() => linear(device.zeros([4, 3]), w)).toThrow(
      /\[linear\] expected packed weights \[any, 3\] for w/,
    )
    expect(() => linear(x, device.zeros([3, 2]))).toThrow(/expected weights packed by packLinear for w/)
    expect(() => linear(x, w, { bias: device.zeros([4]) })).toThrow(/expected f32 \[3\] for bias/)
    expect(() => linear(x, w, { residual: device.zeros([3, 3]) })).toThrow(
      /expected a divisor of 4 rows for residual/,
    )
  })
})
