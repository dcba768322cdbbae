import { describe, expect, it } from 'vitest'
import { type Activation, conv2d, packLinear } from '../../lib/ops.ts'
import { expectClose, f32, openDevice, Random } from './helpers.ts'
import { activations, exactWeights, storageTypes } from './weights.ts'

const device = openDevice({ threads: 2 })
const limit = { absolute: 1e-5, relative: 1e-5 } // sums of order 1 to 10 in f32
// Winograd: about 1.6e-6 rms and 1e-5 at most are seen on sums of variance 1
const winogradLimit = { absolute: 3e-5 }

interface Case {
  batch: number
  height: number
  width: number
  channels: number
  outputs: number
  kernel: [number, number]
  stride: number
  pad: number | [number, number]
  resize?: [number, number]
}

/** Height and width of the result. */
function outSize({ kernel, height, width, stride, pad, resize = [height, width] }: Case) {
  const zeros = typeof pad === 'number' ? 2 * pad : pad[0] + pad[1]
  return resize.map((size, i) => Math.floor((size + zeros - kernel[i]!) / stride) + 1) as [number, number]
}

/** One output: the sum over the kernel's taps that meet the resized image. w: [O, kh, kw, C]. */
function at(c: Case, x: Float32Array, w: Float32Array, b: number, oy: number, ox: number, o: number) {
  const [kh, kw] = c.kernel
  const [height, width] = c.resize ?? [c.height, c.width]
  const before = typeof c.pad === 'number' ? c.pad : c.pad[0]
  let sum = 0
  for (let ky = 0; ky < kh; ky++)
    for (let kx = 0; kx < kw; kx++) {
      const [y, z] = [oy * c.stride - before + ky, ox * c.stride - before + kx]
      if (y < 0 || y >= height || z < 0 || z >= width) continue
      const [from, tap] = [Math.floor((y * c.height) / height), Math.floor((z * c.width) / width)]
      const pixel = ((b * c.height + from) * c.width + tap) * c.channels
      const weights = ((o * kh + ky) * kw + kx) * c.channels
      for (let i = 0; i < c.channels; i++) sum += x[pixel + i]! * w[weights + i]!
    }
  return sum
}

function oracle(c: Case, x: Float32Array, w: Float32Array) {
  const [oh, ow] = outSize(c)
  const values: number[] = []
  for (let b = 0; b < c.batch; b++)
    for (let oy = 0; oy < oh; oy++)
      for (let ox = 0; ox < ow; ox++)
        for (let o = 0; o < c.outputs; o++) values.push(at(c, x, w, b, oy, ox, o))
  return { shape: [c.batch, oh, ow, c.outputs], values }
}

const base = { batch: 1, height: 9, width: 11, channels: 5, outputs: 7, stride: 1, pad: 0 }
const cases: Record<string, Case> = {
  'CLIP patches': { ...base, height: 42, width: 42, channels: 3, outputs: 33, kernel: [14, 14], stride: 14 },
  'ConvNeXt stem': { ...base, batch: 2, height: 16, width: 20, channels: 3, kernel: [4, 4], stride: 4 },
  'downsampling by 2': { ...base, batch: 2, channels: 70, outputs: 40, kernel: [2, 2], stride: 2 },
  '3x3 with padding': { ...base, channels: 40, outputs: 65, kernel: [3, 3], pad: 1 },
  '3x3 with stride 2': { ...base, batch: 3, kernel: [3, 3], stride: 2, pad: 1 },
  '3x3 with zeros below and right only': { ...base, batch: 2, kernel: [3, 3], stride: 2, pad: [0, 1] },
  'zeros above and left only': { ...base, kernel: [3, 3], pad: [2, 0] },
  '1x1': { ...base, channels: 33, kernel: [1, 1] },
  '1x1 with stride 2': { ...base, batch: 2, channels: 33, kernel: [1, 1], stride: 2 },
  'an uneven kernel': { ...base, kernel: [5, 2], stride: 3, pad: 2 },
  'a kernel wider than the image': { ...base, height: 2, width: 1, kernel: [4, 5], pad: 2 },
  'only padding under most taps': { ...base, height: 1, width: 1, channels: 1, kernel: [3, 3], pad: 3 },
  'twice the size': { ...base, batch: 2, resize: [18, 22], kernel: [3, 3], pad: 1 },
  'odd sizes': { ...base, height: 3, width: 4, channels: 33, resize: [5, 7], kernel: [3, 3], pad: 1 },
  'a smaller size and stride 2': { ...base, resize: [4, 7], kernel: [3, 3], stride: 2, pad: [0, 1] },
  '1x1 of a larger size': { ...base, height: 2, width: 3, resize: [7, 5], kernel: [1, 1] },
}

// From 32 tiles of 4x4 outputs and 32 channels on, 3x3 with stride 1 is computed by Winograd's algorithm.
const large = { ...base, height: 32, width: 32, channels: 32, outputs: 32, kernel: [3, 3], pad: 1 } as Case
const winograd: Record<string, Case> = {
  'whole tiles': { ...large, batch: 2 },
  'tiles that hang over': { ...large, height: 30, width: 41, channels: 64, outputs: 71 },
  'no padding': { ...large, height: 35, width: 36, outputs: 40, pad: 0 },
  'uneven padding': { ...large, height: 33, width: 32, pad: [0, 2] },
  'twice the size': { ...large, batch: 2, height: 16, width: 17, resize: [32, 34] },
  'twice the size, uneven padding': { ...large, height: 16, width: 17, resize: [32, 34], pad: [3, 0] },
  'twice the size, tiles that begin with a pair': {
    ...large,
    height: 18,
    width: 16,
    resize: [36, 32],
    pad: 0,
  },
  'twice the height alone': { ...large, height: 16, resize: [32, 32] },
  'odd sizes': { ...large, height: 13, width: 20, resize: [30, 31] },
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

  for (const [name, c] of Object.entries(winograd))
    it(`equals the sum over taps: many pixels, ${name}`, async () => {
      const random = new Random()
      const k = 9 * c.channels
      const [oh, ow] = outSize(c)
      const residual = random.normals(oh * ow * c.outputs)
      const bias = random.normals(c.batch * c.outputs)
      const scale = Float32Array.from({ length: c.outputs }, () => 2 * random.next() - 1)
      for (const dtype of storageTypes) {
        const w = exactWeights(random, dtype, c.outputs, k)
        const row = Math.sqrt(w.reduce((sum, value) => sum + value * value, 0) / c.outputs)
        const x = random.normals(c.batch * c.height * c.width * c.channels, 1 / row)
        const expected = oracle(c, x, w).values.map((sum, i) => {
          const [image, o] = [Math.floor(i / (oh * ow * c.outputs)), i % c.outputs]
          return (
            activations.silu(sum + bias[image * c.outputs + o]!) * scale[o]! + residual[i % residual.length]!
          )
        })
        const out = conv2d(
          device.tensor(x, [c.batch, c.height, c.width, c.channels]),
          packLinear(device.tensor(w, [c.outputs, k]), { dtype }),
          {
            ...c,
            bias: device.tensor(bias, [c.batch, c.outputs]),
            scale: device.tensor(scale, [c.outputs]),
            residual: device.tensor(residual, [oh * ow, c.outputs]),
            activation: 'silu',
          },
        )
        expect(out.shape).toEqual([c.batch, oh, ow, c.outputs])
        expectClose(await f32(out), expected, winogradLimit, `seed ${random.seed} ${dtype}`)
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

  it('takes a bias for each image, in strided rows', async () => {
    const random = new Random()
    for (const c of [{ ...base, batch: 3, kernel: [3, 3], pad: 1 } as Case, { ...large, batch: 2 }]) {
      const k = 9 * c.channels
      const w = random.normals(c.outputs * k)
      const x = random.normals(c.batch * c.height * c.width * c.channels, 1 / Math.sqrt(k))
      const bias = random.normals(c.batch * (c.outputs + 9))
      const image = c.height * c.width * c.outputs
      const expected = oracle(c, x, w).values.map(
        (sum, i) => sum + bias[Math.floor(i / image) * (c.outputs + 9) + 4 + (i % c.outputs)]!,
      )
      const out = conv2d(
        device.tensor(x, [c.batch, c.height, c.width, c.channels]),
        packLinear(device.tensor(w, [c.outputs, k])),
        { ...c, bias: device.tensor(bias, [c.batch, c.outputs + 9]).narrow(1, 4, c.outputs) },
      )
      expectClose(await f32(out), expected, winogradLimit, `seed ${random.seed}`)
    }
  })

  it('gives an image the same bits in every batch', async () => {
    const random = new Random()
    for (const c of [
      { ...base, height: 8, width: 8, channels: 6, outputs: 20, kernel: [3, 3], pad: 1 } as Case,
      { ...base, height: 3, width: 4, outputs: 40, resize: [5, 7], kernel: [3, 3], pad: 1 } as Case,
      { ...large, height: 33 },
      { ...large, height: 16, width: 17, resize: [32, 34] } as Case,
    ]) {
      const size = c.height * c.width * c.channels
      const x = random.normals(4 * size)
      const k = 9 * c.channels
      const w = packLinear(device.tensor(random.normals(c.outputs * k), [c.outputs, k]))
      const all = await f32(conv2d(device.tensor(x, [4, c.height, c.width, c.channels]), w, c))
      for (let b = 0; b < 4; b++) {
        const one = device.tensor(x.subarray(b * size, (b + 1) * size), [1, c.height, c.width, c.channels])
        const out = await f32(conv2d(one, w, c))
        expect(out, `seed ${random.seed}`).toEqual(all.subarray(b * out.length, (b + 1) * out.length))
      }
    }
  })

  it('errs by a few roundings of the largest number around, whatever channels and range', async () => {
    const random = new Random()
    for (const c of [
      { ...large, channels: 1280, outputs: 64 },
      { ...large, height: 16, width: 16, channels: 640, outputs: 64, resize: [32, 32] } as Case,
    ]) {
      const k = 9 * c.channels
      const w = random.normals(c.outputs * k)
      // Channels differ by up to 2^12, as in the residual stream of a VAE, and some pixels stand out by as much.
      const x = random
        .normals(c.height * c.width * c.channels)
        .map((v, i) => v * 2 ** (i % 13) * (Math.floor(i / c.channels) % 97 ? 1 : 4096))
      const out = await f32(
        conv2d(
          device.tensor(x, [1, c.height, c.width, c.channels]),
          packLinear(device.tensor(w, [c.outputs, k])),
          c,
        ),
      )
      const [squaresOfX, squaresOfW] = [x.map(v => v * v), w.map(v => v * v)]
      let worst = 0
      for (let n = 0; n < 40; n++) {
        const [ty, tx, o] = [random.integer(0, 7), random.integer(0, 7), random.integer(0, 63)]
        let error = 0
        let size = 0 // the root of the sum of squares of the products, at the largest of the tile's outputs
        for (let p = 0; p < 16; p++) {
          const [oy, ox] = [4 * ty + (p >> 2), 4 * tx + (p & 3)]
          error = Math.max(error, Math.abs(out[(oy * 32 + ox) * c.outputs + o]! - at(c, x, w, 0, oy, ox, o)))
          size = Math.max(size, Math.sqrt(at(c, squaresOfX, squaresOfW, 0, oy, ox, o)))
        }
        worst = Math.max(worst, error / size)
      }
      expect(worst, `seed ${random.seed}`).toBeLessThan(2e-5)
    }
  })

  it('stays finite up to 2^110', async () => {
    for (const c of [large, { ...large, height: 16, width: 16, resize: [32, 32] } as Case]) {
      const k = 9 * c.channels
      const x = new Float32Array(c.height * c.width * c.channels).fill(2 ** 110 / k)
      const w = packLinear(device.tensor(new Float32Array(c.outputs * k).fill(1), [c.outputs, k]))
      const out = await f32(conv2d(device.tensor(x, [1, c.height, c.width, c.channels]), w, c))
      expect(out.every(Number.isFinite)).toBe(true)
      expect(Math.max(...out) / 2 ** 110).toBeCloseTo(1, 4)
    }
  })

  it('shows a NaN of the image near it and nowhere else', async () => {
    const c = large
    const k = 9 * c.channels
    const x = new Float32Array(c.height * c.width * c.channels)
    x[(13 * c.width + 13) * c.channels] = Number.NaN
    const w = packLinear(device.tensor(new Float32Array(c.outputs * k).fill(1), [c.outputs, k]))
    const out = await f32(conv2d(device.tensor(x, [1, c.height, c.width, c.channels]), w, c))
    for (let p = 0; p < c.height * c.width; p++) {
      const far = Math.max(Math.abs(Math.floor(p / c.width) - 13), Math.abs((p % c.width) - 13))
      if (far <= 1) expect(out[p * c.outputs]).toBeNaN()
      if (far >= 5) expect(out[p * c.outputs]).toBe(0)
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
    expect(() => conv2d(x, w, { kernel: [3, 3], pad: [1, -1] })).toThrow(/for pad but received -1/)
    expect(() => conv2d(x, w, { kernel: [3, 3], resize: [0, 4] })).toThrow(/for resize but received 0/)
    expect(() => conv2d(x, w, { kernel: [3, 3], bias: device.zeros([2, 3]) })).toThrow(
      /\[conv2d\] expected .*for bias/,
    )
    expect(() => conv2d(device.zeros([1, 0, 4, 2]), w, { kernel: [3, 3], resize: [4, 4] })).toThrow(
      /at least one pixel for x/,
    )
  })
})
