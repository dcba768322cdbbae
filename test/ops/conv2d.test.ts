import { describe, expect, it } from 'vitest'
import { type Activation, conv2d, packLinear } from '../../lib/ops.ts'
import { expectClose, f32, openDevice, Random } from './helpers.ts'
import { activations, exactWeights, storageTypes } from './weights.ts'

const device = openDevice({ threads: 2 })
const limit = { absolute: 1e-5, relative: 1e-5 } // sums of order 1 to 10 in f32

interface Case {
  batch: number
  height: number
  width: number
  channels: number
  outputs: number
  kernel: [number, number]
  stride: number
  pad: number
}

/** Every output is a sum over the kernel's taps that meet the image. w: [O, kh, kw, C]. */
function oracle(c: Case, x: Float32Array, w: Float32Array) {
  const [kh, kw] = c.kernel
  const oh = Math.floor((c.height + 2 * c.pad - kh) / c.stride) + 1
  const ow = Math.floor((c.width + 2 * c.pad - kw) / c.stride) + 1
  const out: number[] = []
  for (let b = 0; b < c.batch; b++)
    for (let oy = 0; oy < oh; oy++)
      for (let ox = 0; ox < ow; ox++)
        for (let o = 0; o < c.outputs; o++) {
          let sum = 0
          for (let ky = 0; ky < kh; ky++)
            for (let kx = 0; kx < kw; kx++) {
              const [y, z] = [oy * c.stride - c.pad + ky, ox * c.stride - c.pad + kx]
              if (y < 0 || y >= c.height || z < 0 || z >= c.width) continue
              for (let i = 0; i < c.channels; i++)
                sum +=
                  x[((b * c.height + y) * c.width + z) * c.channels + i]! *
                  w[((o * kh + ky) * kw + kx) * c.channels + i]!
            }
          out.push(sum)
        }
  return { shape: [c.batch, oh, ow, c.outputs], values: out }
}

const base = { batch: 1, height: 9, width: 11, channels: 5, outputs: 7, stride: 1, pad: 0 }
const cases: Record<string, Case> = {
  'CLIP patches': { ...base, height: 42, width: 42, channels: 3, outputs: 33, kernel: [14, 14], stride: 14 },
  'ConvNeXt stem': { ...base, batch: 2, height: 16, width: 20, channels: 3, kernel: [4, 4], stride: 4 },
  'downsampling by 2': { ...base, batch: 2, channels: 70, outputs: 40, kernel: [2, 2], stride: 2 },
  '3x3 with padding': { ...base, channels: 40, outputs: 65, kernel: [3, 3], pad: 1 },
  '3x3 with stride 2': { ...base, batch: 3, kernel: [3, 3], stride: 2, pad: 1 },
  '1x1': { ...base, channels: 33, kernel: [1, 1] },
  'an uneven kernel': { ...base, kernel: [5, 2], stride: 3, pad: 2 },
  'a kernel wider than the image': { ...base, height: 2, width: 1, kernel: [4, 5], pad: 2 },
  'only padding under most taps': { ...base, height: 1, width: 1, channels: 1, kernel: [3, 3], pad: 3 },
}

describe('conv2d', () => {
  for (const [name, c] of Object.entries(cases))
    it(`equals the sum over taps: ${name}`, async () => {
      const random = new Random()
      for (const dtype of storageTypes) {
        const k = c.kernel[0] * c.kernel[1] * c.channels
        const w = exactWeights(random, dtype, c.outputs, k)
        const x = random.normals(c.batch * c.height * c.width * c.channels, 1 / Math.sqrt(k))
        const expected = oracle(c, x, w)
        const out = conv2d(
          device.tensor(x, [c.batch, c.height, c.width, c.channels]),
          packLinear(device.tensor(w, [c.outputs, k]), { dtype }),
          c,
        )
        expect(out.shape).toEqual(expected.shape)
        expectClose(await f32(out), expected.values, limit, `seed ${random.seed} ${dtype}`)
      }
    })

  it('fuses bias, activation, scale and a residual that repeats over the batch', async () => {
    const random = new Random()
    const c: Case = { ...base, batch: 3, kernel: [3, 3], pad: 1 }
    const w = random.normals(c.outputs * 45, 0.2)
    const x = random.normals(c.batch * 99 * 5)
    const [bias, scale] = [random.normals(c.outputs), random.normals(c.outputs)]
    const residual = random.normals(99 * c.outputs) // one image's positions: CLIP's position embedding
    const sums = oracle(c, x, w).values
    for (const activation of Object.keys(activations) as Activation[]) {
      const expected = sums.map((sum, i) => {
        const o = i % c.outputs
        return activations[activation](sum + bias[o]!) * scale[o]! + residual[i % residual.length]!
      })
      const out = conv2d(device.tensor(x, [3, 9, 11, 5]), packLinear(device.tensor(w, [c.outputs, 45])), {
        ...c,
        bias: device.tensor(bias, [c.outputs]),
        scale: device.tensor(scale, [c.outputs]),
        residual: device.tensor(residual, [99, c.outputs]),
        activation,
      })
      expectClose(await f32(out), expected, limit, `seed ${random.seed} ${activation}`)
    }
  })

  it('gives an image the same bits in every batch', async () => {
    const random = new Random()
    const x = random.normals(4 * 8 * 8 * 6)
    const w = packLinear(device.tensor(random.normals(20 * 54), [20, 54]))
    const all = await f32(conv2d(device.tensor(x, [4, 8, 8, 6]), w, { kernel: [3, 3], pad: 1 }))
    for (let b = 0; b < 4; b++) {
      const one = device.tensor(x.subarray(b * 384, (b + 1) * 384), [1, 8, 8, 6])
      const out = await f32(conv2d(one, w, { kernel: [3, 3], pad: 1 }))
      expect(out, `seed ${random.seed}`).toEqual(all.subarray(b * out.length, (b + 1) * out.length))
    }
  })

  it('refuses what does not fit', () => {
    const x = device.zeros([1, 4, 4, 2])
    const w = packLinear(device.zeros([3, 18]))
    expect(() => conv2d(x, w, { kernel: [2, 2] })).toThrow(
      /\[conv2d\] expected packed weights \[any, 8\] for w/,
    )
    expect(() => conv2d(device.zeros([1, 2, 2, 2]), w, { kernel: [3, 3] })).toThrow(/at least 3 x 3 pixels/)
    expect(() => conv2d(x, w, { kernel: [3, 3], stride: 0 })).toThrow(/for stride but received 0/)
  })
})
