import { describe, expect, it } from 'vitest'
import { Device } from '../../lib/device.ts'
import { groupNorm } from '../../lib/ops.ts'
import { expectClose, f32, openDevice, Random } from './helpers.ts'

const device = openDevice()

interface Case {
  batch: number
  pixels: [number, number]
  /** Of x, and of `more`. */
  channels: [number] | [number, number]
  groups: number
  silu?: boolean
  eps?: number
}

type Fill = (random: Random, count: number) => Float32Array
const normal: Fill = (random, count) => random.normals(count)

/** Images of one case, each with its own numbers: parts[b][0] is x [H, W, C], parts[b][1] is more. */
function images(c: Case, random: Random, fill: Fill = normal): Float32Array[][] {
  return Array.from({ length: c.batch }, () =>
    c.channels.map(n => fill(random, c.pixels[0] * c.pixels[1] * n)),
  )
}

function join(arrays: readonly Float32Array[]): Float32Array {
  const all = new Float32Array(arrays.reduce((sum, array) => sum + array.length, 0))
  let at = 0
  for (const array of arrays) {
    all.set(array, at)
    at += array.length
  }
  return all
}

async function run(c: Case, parts: Float32Array[][], weight: Float32Array, bias: Float32Array, on = device) {
  const tensors = c.channels.map((n, i) =>
    on.tensor(join(parts.map(part => part[i]!)), [parts.length, ...c.pixels, n]),
  )
  const out = groupNorm(tensors[0]!, on.tensor(weight, [weight.length]), on.tensor(bias, [bias.length]), {
    groups: c.groups,
    eps: c.eps ?? 1e-5,
    more: tensors[1],
    activation: c.silu ? 'silu' : 'none',
  })
  expect(out.shape).toEqual([parts.length, ...c.pixels, weight.length])
  return f32(out)
}

/** The definition in f64: the channels of a pixel written side by side, then a mean and a variance for each group. */
function oracle(c: Case, parts: Float32Array[][], weight: Float32Array, bias: Float32Array): Float64Array {
  const pixels = c.pixels[0] * c.pixels[1]
  const channels = weight.length
  const width = channels / c.groups
  const eps = Math.fround(c.eps ?? 1e-5)
  const out = new Float64Array(parts.length * pixels * channels)
  parts.forEach((part, b) => {
    const y = out.subarray(b * pixels * channels, (b + 1) * pixels * channels)
    let first = 0
    part.forEach((values, i) => {
      const n = c.channels[i]!
      for (let j = 0; j < values.length; j++) y[Math.floor(j / n) * channels + first + (j % n)] = values[j]!
      first += n
    })
    for (let g = 0; g < c.groups; g++) {
      const places = Array.from({ length: pixels * width }, (_, i) => {
        return Math.floor(i / width) * channels + g * width + (i % width)
      })
      // About the first number: f64 alone would make 1e9 ± 1e-7 of equal ones, which eps lets through 300 times larger.
      const origin = y[places[0]!]!
      const mean = origin + places.reduce((sum, at) => sum + (y[at]! - origin), 0) / places.length
      const variance = places.reduce((sum, at) => sum + (y[at]! - mean) ** 2, 0) / places.length
      for (const at of places) {
        const z =
          ((y[at]! - mean) / Math.sqrt(variance + eps)) * weight[at % channels]! + bias[at % channels]!
        y[at] = c.silu ? z / (1 + Math.exp(-z)) : z
      }
    }
  })
  return out
}

// Scale and difference are rounded once each, their product with the bias once more, of numbers up to some 10; SiLU
// adds the 2 ulp of its exponential.
const limit = { absolute: 1e-6, relative: 1e-6 }

async function check(c: Case, random: Random, fill?: Fill, limits = limit) {
  const channels = c.channels.reduce((a, b) => a + b, 0)
  const parts = images(c, random, fill)
  const [weight, bias] = [random.normals(channels), random.normals(channels)]
  const what = `seed ${random.seed} ${JSON.stringify(c)}`
  expectClose(await run(c, parts, weight, bias), oracle(c, parts, weight, bias), limits, what)
}

describe('groupNorm', () => {
  const cases: (Case & { why: string })[] = [
    { batch: 1, pixels: [1, 1], channels: [1], groups: 1, why: 'one of everything' },
    { batch: 2, pixels: [7, 5], channels: [96], groups: 32, silu: true, why: 'groups of 3' },
    { batch: 1, pixels: [13, 11], channels: [37], groups: 1, why: 'one group' },
    { batch: 2, pixels: [9, 9], channels: [33], groups: 33, silu: true, why: 'a channel a group' },
    { batch: 1, pixels: [20, 20], channels: [12], groups: 4, why: 'two blocks of pixels' },
    { batch: 2, pixels: [15, 21], channels: [320], groups: 32, silu: true, why: 'blocks with a rest' },
    { batch: 1, pixels: [1, 3], channels: [33_000], groups: 3, why: 'a pixel a block' },
    { batch: 2, pixels: [8, 6], channels: [20, 10], groups: 6, silu: true, why: 'two images' },
    { batch: 1, pixels: [8, 6], channels: [20, 13], groups: 3, why: 'a group over the border' },
    {
      batch: 2,
      pixels: [33, 9],
      channels: [64, 32],
      groups: 32,
      silu: true,
      why: 'groups beside the border',
    },
    { batch: 1, pixels: [17, 5], channels: [1, 62], groups: 7, silu: true, why: 'one channel, then many' },
    { batch: 1, pixels: [17, 5], channels: [62, 1], groups: 7, why: 'many channels, then one' },
  ]
  it.each(cases)('equals f64 arithmetic: $why', c => check(c, new Random()))

  it('equals f64 arithmetic for random shapes', async () => {
    const random = new Random()
    for (let round = 0; round < 25; round++) {
      const groups = random.integer(1, 12)
      const channels = groups * random.integer(1, 12)
      const more = random.integer(0, channels - 1)
      await check(
        {
          batch: random.integer(1, 3),
          pixels: [random.integer(1, 24), random.integer(1, 24)],
          channels: more ? [channels - more, more] : [channels],
          groups,
          silu: random.next() < 0.5,
        },
        random,
      )
    }
  })

  const c: Case = { batch: 2, pixels: [19, 21], channels: [24, 8], groups: 8, silu: true }
  const kinds: Record<string, Fill> = {
    'small numbers, where eps counts': (random, n) => random.normals(n, 1e-3),
    'numbers whose squares vanish': (random, n) => random.normals(n, 1e-20),
    'numbers whose squares overflow': (random, n) => random.normals(n, 1e18),
    'numbers whose sum overflows': (random, n) => random.normals(n, 5e37).map(x => x + 1e38),
    'a mean far above the deviation': (random, n) => random.normals(n).map(x => 30_000 + x),
    'a mean of 2^24 and a deviation of a few units': (random, n) =>
      random.normals(n, 5).map(x => 2 ** 24 + x),
    'blocks far apart': (random, n) => random.normals(n).map((x, i) => x + (i < n / 2 ? 1000 : -1000)),
    'a first pixel unlike all others': (random, n) => random.normals(n).map((x, i) => (i < 8 ? 1e4 : x)),
    'equal numbers': (random, n) => new Float32Array(n).fill(1e9 * random.normal()),
    'equal largest numbers': (_, n) => new Float32Array(n).fill(3.4e38),
    zeros: (_, n) => new Float32Array(n),
  }
  for (const [kind, fill] of Object.entries(kinds))
    it(`equals f64 arithmetic for ${kind}`, async () => {
      const random = new Random()
      await check(c, random, fill)
      await check({ ...c, channels: [32], silu: false, eps: 1e-3 }, random, fill)
    })

  it('equals f64 arithmetic where eps is next to nothing', async () => {
    const random = new Random()
    await check({ ...c, eps: 1e-38 }, random, kinds['numbers whose squares vanish'])
  })

  it('sums two million numbers around 1000 as precisely as a few', async () => {
    const random = new Random()
    const large: Case = { batch: 1, pixels: [256, 256], channels: [32], groups: 4 }
    await check(large, random, (r, n) => Float32Array.from({ length: n }, () => 1000 + r.next()))
  })

  it('gives an image the same bits alone, in a batch and with one thread', async () => {
    const random = new Random()
    const batch: Case = { batch: 5, pixels: [31, 29], channels: [48, 16], groups: 16, silu: true }
    const parts = images(batch, random)
    const [weight, bias] = [random.normals(64), random.normals(64)]
    const all = await run(batch, parts, weight, bias)
    const size = all.length / batch.batch
    for (const b of [0, 2, 4])
      expect(await run(batch, [parts[b]!], weight, bias), `seed ${random.seed} image ${b}`).toEqual(
        all.slice(b * size, (b + 1) * size),
      )
    const single = Device.open('cpu', { threads: 1 })
    try {
      expect(await run(batch, parts, weight, bias, single), `seed ${random.seed}`).toEqual(all)
    } finally {
      await single.close()
    }
  })

  it('gives two images the bits of the one that they make', async () => {
    const random = new Random()
    const [h, w, c1, c2] = [10, 12, 48, 16]
    const split: Case = { batch: 1, pixels: [h, w], channels: [c1, c2], groups: 8 }
    const parts = images(split, random)
    const whole = new Float32Array(h * w * (c1 + c2))
    for (let p = 0; p < h * w; p++) {
      whole.set(parts[0]![0]!.subarray(p * c1, (p + 1) * c1), p * (c1 + c2))
      whole.set(parts[0]![1]!.subarray(p * c2, (p + 1) * c2), p * (c1 + c2) + c1)
    }
    const [weight, bias] = [random.normals(c1 + c2), random.normals(c1 + c2)]
    expect(await run(split, parts, weight, bias), `seed ${random.seed}`).toEqual(
      await run({ ...split, channels: [c1 + c2] }, [[whole]], weight, bias),
    )
  })

  it.each([Number.NaN, Infinity, -Infinity])('keeps %d to its own group of its own image', async bad => {
    const random = new Random()
    const three: Case = { batch: 3, pixels: [5, 7], channels: [24], groups: 4 }
    const parts = images(three, random)
    const [weight, bias] = [random.normals(24), random.normals(24)]
    const clean = await run(three, parts, weight, bias)
    parts[1]![0]![3 * 24 + 13] = bad
    const spoiled = await run(three, parts, weight, bias)
    const size = 5 * 7 * 24
    spoiled.forEach((value, i) => {
      const hit = Math.floor(i / size) === 1 && Math.floor((i % 24) / 6) === 2
      if (!Object.is(value, hit ? Number.NaN : clean[i]))
        expect.fail(`seed ${random.seed}: [${i}] is ${value}, expected ${hit ? Number.NaN : clean[i]}`)
    })
  })

  it('takes images without pixels', async () => {
    const out = groupNorm(device.zeros([2, 0, 5, 4]), device.zeros([4]), device.zeros([4]), {
      groups: 2,
      eps: 1e-5,
    })
    expect(out.shape).toEqual([2, 0, 5, 4])
  })

  it('refuses what does not fit', () => {
    const x = device.zeros([1, 2, 2, 6])
    const w = device.zeros([6])
    const refused = (options: Partial<Parameters<typeof groupNorm>[3]>, weight = w) =>
      expect(() => groupNorm(x, weight, w, { groups: 2, eps: 1e-5, ...options }))
    refused({ groups: 4 }).toThrow(/a divisor of 6 channels for groups but received 4/)
    refused({ groups: 0 }).toThrow(/for groups but received 0/)
    refused({ eps: 0 }).toThrow(/a positive number for eps but received 0/)
    refused({ more: device.zeros([1, 2, 3, 6]) }).toThrow(/for more but received/)
    refused({ more: device.zeros([1, 2, 2, 2]) }).toThrow(/for weight but received/)
    refused({}, device.zeros([5])).toThrow(/for weight but received/)
    refused({ activation: 'gelu' as 'silu' }).toThrow(/none or silu for activation/)
  })
})
