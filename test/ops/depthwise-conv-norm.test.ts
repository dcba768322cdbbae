import { describe, expect, it } from 'vitest'
import { Device } from '../../lib/device.ts'
import { depthwiseConvNorm } from '../../lib/ops.ts'
import { type Case, type Inputs, inputs } from './depthwise.ts'
import { expectClose, f32, openDevice, Random } from './helpers.ts'

const device = openDevice()

/** Tap by tap with bounds checks, then mean and variance, all in f64. */
function oracle(a: Inputs, eps: number): Float64Array {
  const [batch, height, width, channels] = a.shape
  const [kh, kw] = a.kernel
  const out = new Float64Array(a.x.length)
  const row = new Float64Array(channels)
  for (let b = 0; b < batch; b++)
    for (let y = 0; y < height; y++)
      for (let x = 0; x < width; x++) {
        for (let c = 0; c < channels; c++) {
          let sum = a.bias[c]!
          for (let i = 0; i < kh; i++)
            for (let j = 0; j < kw; j++) {
              const [v, u] = [y + i - (kh >> 1), x + j - (kw >> 1)]
              if (v < 0 || v >= height || u < 0 || u >= width) continue
              sum += a.x[((b * height + v) * width + u) * channels + c]! * a.w[(i * kw + j) * channels + c]!
            }
          row[c] = sum
        }
        const mean = row.reduce((s, v) => s + v) / channels
        const variance = row.reduce((s, v) => s + (v - mean) ** 2, 0) / channels
        for (let c = 0; c < channels; c++)
          out[((b * height + y) * width + x) * channels + c] =
            ((row[c]! - mean) / Math.sqrt(variance + eps)) * a.normWeight[c]! + a.normBias[c]!
      }
  return out
}

function run(on: Device, a: Inputs, eps: number) {
  const channels = a.shape[3]
  return f32(
    depthwiseConvNorm(on.tensor(a.x, a.shape), on.tensor(a.w, [...a.kernel, channels]), {
      bias: on.tensor(a.bias, [channels]),
      normWeight: on.tensor(a.normWeight, [channels]),
      normBias: on.tensor(a.normBias, [channels]),
      eps,
    }),
  )
}

describe('depthwiseConvNorm', () => {
  const cases: Case[] = [
    { shape: [1, 5, 5, 16], kernel: [7, 7] },
    { shape: [2, 9, 11, 37], kernel: [7, 7] },
    { shape: [1, 1, 1, 1], kernel: [7, 7] },
    { shape: [1, 20, 70, 24], kernel: [7, 7] },
    { shape: [1, 6, 24, 384], kernel: [7, 7] },
    { shape: [1, 3, 33, 130], kernel: [3, 3] },
    { shape: [1, 6, 9, 20], kernel: [5, 5] },
    { shape: [1, 6, 9, 20], kernel: [3, 7] },
    { shape: [1, 2, 3, 5], kernel: [1, 1] },
    { shape: [1, 12, 10, 20], kernel: [11, 9] },
  ]
  it.each(cases)('agrees with f64: $shape, kernel $kernel', async c => {
    const random = new Random()
    const a = inputs(c, random)
    // 49 f32 products with unit normals, then a division by their deviation: a few 1e-6, times weights up to 4. One
    // channel has variance 0 and is the bias exactly.
    expectClose(
      await run(device, a, 1e-6),
      oracle(a, 1e-6),
      { absolute: 3e-5, relative: 1e-5 },
      `seed ${random.seed}`,
    )
  })

  it('agrees on random shapes', async () => {
    const random = new Random()
    for (let i = 0; i < 12; i++) {
      const a = inputs(
        {
          shape: [random.integer(1, 2), random.integer(1, 14), random.integer(1, 40), random.integer(2, 70)],
          kernel: [7, 7],
        },
        random,
      )
      expectClose(
        await run(device, a, 1e-5),
        oracle(a, 1e-5),
        { absolute: 1e-4, relative: 1e-4 },
        `seed ${random.seed}`,
      )
    }
  })

  it('keeps its digits when channels share a large offset', async () => {
    const random = new Random()
    const a = inputs({ shape: [1, 6, 9, 48], kernel: [7, 7] }, random)
    a.bias.fill(4096)
    // The sums are rounded to f32 near 4096 (2.4e-4 each); a variance by E[x²] − E[x]² would be off by far more.
    expectClose(await run(device, a, 1e-6), oracle(a, 1e-6), { absolute: 1e-2 }, `seed ${random.seed}`)
  })

  it('gives the norm bias where all channels are equal', async () => {
    const a = inputs({ shape: [1, 4, 4, 32], kernel: [7, 7] }, new Random())
    a.w.fill(0)
    a.bias.fill(3)
    const out = await run(device, a, 1e-6)
    expectClose(
      out,
      Float32Array.from(out, (_, i) => a.normBias[i % 32]!),
      { absolute: 0 },
    )
  })

  it('gives a position the same bits whatever shares the call', async () => {
    const random = new Random()
    const a = inputs({ shape: [2, 13, 29, 40], kernel: [7, 7] }, random)
    const both = await run(device, a, 1e-6)
    const half = a.x.length / 2
    const alone = await run(device, { ...a, shape: [1, 13, 29, 40], x: a.x.slice(half) }, 1e-6)
    expect(alone).toEqual(both.slice(half))
    const single = Device.open('cpu', { threads: 1 })
    try {
      expect(await run(single, a, 1e-6)).toEqual(both)
    } finally {
      await single.close()
    }
  })

  it('accepts a view of some pictures of a batch', async () => {
    const a = inputs({ shape: [3, 5, 6, 20], kernel: [7, 7] }, new Random())
    const size = 5 * 6 * 20
    const weights = {
      bias: device.tensor(a.bias, [20]),
      normWeight: device.tensor(a.normWeight, [20]),
      normBias: device.tensor(a.normBias, [20]),
      eps: 1e-6,
    }
    const out = depthwiseConvNorm(
      device.tensor(a.x, a.shape).narrow(0, 1, 1),
      device.tensor(a.w, [7, 7, 20]),
      weights,
    )
    expectClose(await f32(out), (await run(device, a, 1e-6)).slice(size, 2 * size), { absolute: 0 })
  })
})
