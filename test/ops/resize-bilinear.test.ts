import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { resizeBilinear } from '../../lib/ops.ts'
import { assertClose, FIXTURES, readSafetensors, toNhwc } from '../helpers/safetensors.ts'
import { bilinear, gridOf } from './bilinear.ts'
import { expectClose, f32, openDevice, Random } from './helpers.ts'

const device = openDevice()

interface Case {
  batch: number
  size: [number, number]
  channels: number
  to: [number, number]
}

async function check({ batch, size: [h, w], channels, to: [oh, ow] }: Case, random = new Random()) {
  const x = random.normals(batch * h * w * channels)
  const expected = new Float64Array(batch * oh * ow * channels)
  for (let b = 0; b < batch; b++)
    expected.set(bilinear(gridOf(x, b, h, w, channels), oh, ow).data, b * oh * ow * channels)
  const out = resizeBilinear(device.tensor(x, [batch, h, w, channels]), oh, ow)
  expect(out.shape).toEqual([batch, oh, ow, channels])
  // Three roundings of values below 5.
  expectClose(await f32(out), expected, { absolute: 2e-6 }, `seed ${random.seed}`)
}

describe('resizeBilinear', () => {
  const cases: Case[] = [
    { batch: 1, size: [5, 7], channels: 3, to: [3, 9] },
    { batch: 2, size: [96, 96], channels: 3, to: [42, 42] },
    { batch: 1, size: [24, 24], channels: 96, to: [48, 48] },
    { batch: 2, size: [7, 5], channels: 37, to: [31, 33] },
    { batch: 1, size: [33, 31], channels: 5, to: [1, 1] },
    { batch: 1, size: [1, 1], channels: 17, to: [4, 6] },
    { batch: 1, size: [192, 192], channels: 3, to: [84, 84] },
    { batch: 3, size: [4, 4], channels: 16, to: [8, 2] },
  ]
  it.each(cases)("agrees with PyTorch's rule in f64: $batch x $size x $channels to $to", c => check(c))

  it('agrees on random sizes', async () => {
    const random = new Random()
    for (let i = 0; i < 20; i++)
      await check(
        {
          batch: random.integer(1, 3),
          size: [random.integer(1, 40), random.integer(1, 40)],
          channels: random.integer(1, 70),
          to: [random.integer(1, 60), random.integer(1, 60)],
        },
        random,
      )
  })

  it('leaves a picture of the same size as it is, extremes included', async () => {
    const x = Float32Array.from([0, -0, 1e38, -3.4e38, 1e-40, 5, 6, 7, 8])
    const out = await f32(resizeBilinear(device.tensor(x, [1, 3, 3, 1]), 3, 3))
    expectClose(out, x, { absolute: 0 })
  })

  it('does not mix channels or pictures: an infinity stays in its neighbourhood', async () => {
    const x = new Float32Array(2 * 4 * 4 * 20)
    x[4 * 4 * 20 + 3] = Number.POSITIVE_INFINITY // picture 1, corner, channel 3
    const out = await f32(resizeBilinear(device.tensor(x, [2, 4, 4, 20]), 8, 8))
    out.forEach((value, i) => {
      if (i < 8 * 8 * 20 || i % 20 !== 3) expect(value).toBe(0)
    })
    expect(out[8 * 8 * 20 + 3]).toBe(Number.POSITIVE_INFINITY)
  })

  it('accepts a view with strided rows', async () => {
    const random = new Random()
    const x = random.normals(9 * 6 * 10 * 4)
    const view = device.tensor(x, [9, 6, 10, 4]).narrow(0, 3, 2)
    const copy = device.tensor(x.slice(3 * 6 * 10 * 4, 5 * 6 * 10 * 4), [2, 6, 10, 4])
    expectClose(await f32(resizeBilinear(view, 5, 13)), await f32(resizeBilinear(copy, 5, 13)), {
      absolute: 0,
    })
  })

  it.each(['land', 'port', 'tiny', 'square', 'rgba'])(
    'makes the low-resolution input of the official program: %s',
    async name => {
      const goldens = readSafetensors(join(FIXTURES, 'preprocess', `${name}.safetensors`))
      let seen = 0
      for (const [key, golden] of goldens) {
        const match = /^(pad|default)\.(\d+)\.lr_(\d+)$/.exec(key)
        if (!match) continue
        seen++
        const batched = (g: typeof golden) => (g.shape.length === 3 ? { ...g, shape: [1, ...g.shape] } : g)
        const x = toNhwc(batched(goldens.get(`${match[1]}.${match[2]}.pixel_values`)!))
        const side = Number(match[3])
        const out = resizeBilinear(device.tensor(x.data, x.shape), side, side)
        assertClose(key, await f32(out), toNhwc(batched(golden)).data, 1e-5)
      }
      expect(seen).toBeGreaterThan(0)
    },
  )
})
