import { bilinear, type Grid, gridOf } from './bilinear.ts'
import type { Random } from './helpers.ts'

export const EPS = 1e-5

export interface Case {
  batch: number
  sizes: [number, number][]
  channels: number[]
  grid: number
  downscale?: number
}

export interface Inputs extends Case {
  stages: Float32Array[]
  g: Float32Array
  scale: number
}

export function inputs(
  c: Case,
  random: Random,
  value: (stage: number) => number = () => random.normal(),
): Inputs {
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
export function oracle({
  batch,
  sizes,
  channels,
  grid,
  downscale = 1,
  stages,
  g,
  scale,
}: Inputs): Float64Array {
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

export const SMALL: Case = {
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

export const CASES: readonly (Case & { name: string })[] = [
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
