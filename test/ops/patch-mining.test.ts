import { describe, expect, it } from 'vitest'
import { Device } from '../../lib/device.ts'
import { patchMining } from '../../lib/ops.ts'
import { expectClose, f32, openDevice, Random } from './helpers.ts'
import { CASES, EPS, type Inputs, inputs, oracle, SMALL } from './mining.ts'

const device = openDevice()

function run(on: Device, c: Inputs): Promise<Float32Array> {
  const total = c.channels.reduce((a, b) => a + b)
  const { batch, grid, downscale = 1, scale } = c
  return f32(
    patchMining(
      on.tensor(c.g, [batch * grid ** 2, total]),
      c.stages.map((stage, s) => on.tensor(stage, [batch, ...c.sizes[s]!, c.channels[s]!])),
      { grid, downscale, scale, eps: EPS },
    ),
  )
}

// Results are averages of normalised values. f32 sums over the channels are good to about 1e-6 of the largest score
// (below 10 here) and value (below 15).
const LIMIT = { absolute: 2e-5, relative: 1e-5 }

async function check(c: Inputs, random: Random, limit: { absolute: number; relative?: number } = LIMIT) {
  const out = await run(device, c)
  expectClose(out, oracle(c), limit, `seed ${random.seed}`)
  return out
}

describe('patchMining', () => {
  it.each(CASES)('agrees with the reference formula in f64: $name', async c => {
    const random = new Random()
    await check(inputs(c, random), random)
  })

  it('agrees at the proportions of the real tower', async () => {
    const random = new Random()
    const real = inputs(
      {
        batch: 1,
        sizes: [
          [16, 16],
          [8, 8],
          [4, 4],
          [2, 2],
        ],
        channels: [192, 384, 768, 1536],
        grid: 2,
      },
      random,
    )
    await check(real, random)
  })

  it('keeps its digits on a large offset, where the variance must not be a difference of squares', async () => {
    const random = new Random()
    const c = inputs(SMALL, random, () => Math.fround(1e4 + random.normal()))
    await check(c, random, { absolute: 1e-4 })
  })

  it('gives zeros where all channels are equal: variance 0, and nothing but rounding to amplify', async () => {
    const random = new Random()
    const out = await run(
      device,
      inputs(SMALL, random, () => 12345.678),
    )
    expectClose(out, new Float32Array(out.length), { absolute: 1e-6 })
  })

  it('does not cancel where neighbouring cells are opposite', async () => {
    const random = new Random()
    const c = inputs({ ...SMALL, downscale: 2 }, random)
    c.stages.forEach((stage, s) => {
      const [, width] = c.sizes[s]!
      const n = c.channels[s]!
      stage.forEach((_, i) => {
        const cell = Math.floor(i / n)
        stage[i] = stage[i % n]! * ((Math.floor(cell / width) + (cell % width)) % 2 ? -100 : 100)
      })
    })
    await check(c, random, { absolute: 1e-4, relative: 1e-5 })
  })

  it.each([1e-4, 1e5, 1e15])('agrees on maps of magnitude %d', async magnitude => {
    const random = new Random()
    await check(
      inputs(SMALL, random, () => random.normal() * magnitude),
      random,
    )
  })

  it('agrees with one outlier channel in each stage', async () => {
    const random = new Random()
    const c = inputs(SMALL, random)
    c.stages.forEach((stage, s) => {
      for (let i = 1; i < stage.length; i += c.channels[s]!) stage[i]! *= 1e4
    })
    await check(c, random, { absolute: 1e-4 })
  })

  it.each([1e36, 1e-38])(
    'agrees with queries of magnitude %d: scores saturate with their sign, or vanish',
    async magnitude => {
      const random = new Random()
      const c = inputs(SMALL, random)
      c.g.forEach((value, i) => {
        c.g[i] = value * magnitude
      })
      c.scale = magnitude > 1 ? 1000 : c.scale
      await check(c, random)
    },
  )

  it('turns a score that is not a number into 0', async () => {
    const random = new Random()
    const c = inputs(SMALL, random)
    c.g[0] = Number.NaN
    const flat = { ...c, g: c.g.map((value, i) => (i < c.g.length / 4 ? 0 : value)) }
    expectClose(await run(device, c), oracle(flat), LIMIT, `seed ${random.seed}`)
  })

  it('gives a query the same bits whatever shares the call', async () => {
    const random = new Random()
    const c = inputs({ ...SMALL, batch: 2 }, random)
    const both = await run(device, c)
    const second = {
      ...c,
      batch: 1,
      g: c.g.slice(c.g.length / 2),
      stages: c.stages.map(stage => stage.slice(stage.length / 2)),
    }
    expect(await run(device, second)).toEqual(both.slice(both.length / 2))
    const single = Device.open('cpu', { threads: 1 })
    try {
      expect(await run(single, c)).toEqual(both)
    } finally {
      await single.close()
    }
  })

  it('accepts pictures out of a larger batch', async () => {
    const random = new Random()
    const c = inputs(SMALL, random)
    const out = patchMining(
      device.tensor(c.g, [c.grid ** 2, c.g.length / c.grid ** 2]),
      c.stages.map((stage, s) => {
        const three = new Float32Array(3 * stage.length).fill(Number.NaN)
        three.set(stage, stage.length)
        return device.tensor(three, [3, ...c.sizes[s]!, c.channels[s]!]).narrow(0, 1, 1)
      }),
      { grid: c.grid, scale: c.scale, eps: EPS },
    )
    expectClose(await f32(out), await run(device, c), { absolute: 0 })
  })
})
