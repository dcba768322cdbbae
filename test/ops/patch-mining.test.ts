import { describe, expect, it } from 'vitest'
import { Device } from '../../lib/device.ts'
import { patchMining } from '../../lib/ops.ts'
import { bilinear, type Grid, gridOf } from './bilinear.ts'
import { expectClose, f32, openDevice, Random } from './helpers.ts'

const device = openDevice()
const EPS = 1e-5

interface Case {
  batch: number
  sizes: [number, number][]
  channels: number[]
  grid: number
  downscale?: number
}

interface Inputs extends Case {
  stages: Float32Array[]
  g: Float32Array
  scale: number
}

function inputs(c: Case, random: Random, value: (stage: number) => number = () => random.normal()): Inputs {
  const total = c.channels.reduce((a, b) => a + b)
  return {
    ...c,
    stages: c.channels.map((n, s) =>
      Float32Array.from({ length: c.batch * c.sizes[s]![0] * c.sizes[s]![1] * n }, () => value(s)),
    ),
    g: random.normals(c.batch * c.grid ** 2 * total),
    scale: 1 / Math.sqrt(total),
  }
}

/** The concatenated map is built, normalised and attended to position by position, in f64. */
function oracle({ batch, sizes, channels, grid, downscale = 1, stages, g, scale }: Inputs): Float64Array {
  const total = channels.reduce((a, b) => a + b)
  const out = new Float64Array(batch * grid ** 2 * total)
  const largest = 3.4028234663852886e38
  for (let b = 0; b < batch; b++) {
    const [fullH, fullW] = sizes[0]!
    const [h, w] = [Math.floor(fullH / downscale), Math.floor(fullW / downscale)]
    const maps: Grid[] = stages.map((stage, s) => {
      const [sh, sw] = sizes[s]!
      const map = gridOf(stage, b, sh, sw, channels[s]!)
      const full = sh === fullH && sw === fullW ? map : bilinear(map, fullH, fullW)
      return downscale === 1 ? full : bilinear(full, h, w, downscale)
    })
    const [my, mx] = [Math.floor(h / grid), Math.floor(w / grid)]
    for (let q = 0; q < grid ** 2; q++) {
      const at = (b * grid ** 2 + q) * total
      const normed: Float64Array[] = []
      const scores: number[] = []
      for (let y = 0; y < my; y++)
        for (let x = 0; x < mx; x++) {
          const row = Math.floor(q / grid) * my + y
          const column = (q % grid) * mx + x
          const v = new Float64Array(total)
          let first = 0
          for (const m of maps) {
            for (let c = 0; c < m.channels; c++)
              v[first + c] = m.data[(row * m.width + column) * m.channels + c]!
            first += m.channels
          }
          const mean = v.reduce((s, e) => s + e) / total
          const deviation = Math.sqrt(v.reduce((s, e) => s + (e - mean) ** 2, 0) / total + EPS)
          const n = v.map(e => (e - mean) / deviation)
          const score = n.reduce((s, e, c) => s + e * g[at + c]!, 0) * scale
          normed.push(n)
          scores.push(Number.isNaN(score) ? 0 : Math.min(Math.max(score, -largest), largest))
        }
      const top = Math.max(...scores)
      const weights = scores.map(score => Math.exp(score - top))
      const sum = weights.reduce((s, e) => s + e)
      normed.forEach((n, p) => {
        for (let c = 0; c < total; c++) out[at + c]! += (weights[p]! / sum) * n[c]!
      })
    }
  }
  return out
}

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

const SMALL: Case = {
  batch: 1,
  sizes: [
    [16, 16],
    [8, 8],
    [4, 4],
    [2, 2],
  ],
  channels: [12, 24, 33, 50],
  grid: 2,
}

describe('patchMining', () => {
  const cases: (Case & { name: string })[] = [
    { name: 'two pictures', ...SMALL, batch: 2, grid: 4 },
    { name: 'a whole map for one query', ...SMALL, grid: 1 },
    { name: 'one position for a query', ...SMALL, grid: 16 },
    {
      name: 'odd sizes and channels',
      batch: 2,
      sizes: [
        [15, 21],
        [7, 10],
        [3, 5],
        [1, 2],
      ],
      channels: [5, 17, 33, 65],
      grid: 3,
    },
    {
      name: 'a grid that leaves a rest',
      batch: 1,
      sizes: [
        [17, 19],
        [9, 10],
        [5, 5],
        [3, 3],
      ],
      channels: [7, 13, 19, 37],
      grid: 3,
    },
    { name: 'the global view of HD', ...SMALL, downscale: 2 },
    {
      name: 'the global view of an odd map',
      ...SMALL,
      sizes: [
        [17, 21],
        [8, 10],
        [4, 5],
        [2, 2],
      ],
      downscale: 2,
    },
    { name: 'a third', ...SMALL, downscale: 3 },
    {
      name: 'single cells',
      batch: 1,
      sizes: [
        [3, 3],
        [1, 1],
        [1, 1],
        [1, 1],
      ],
      channels: [1, 1, 1, 1],
      grid: 3,
    },
    {
      name: 'stages of any size',
      batch: 1,
      sizes: [
        [8, 8],
        [20, 20],
        [13, 9],
        [1, 8],
      ],
      channels: [16, 16, 16, 17],
      grid: 2,
    },
  ]
  it.each(cases)('agrees with the reference formula in f64: $name', async c => {
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
