import { expect, it } from 'vitest'
import { groupNorm } from '../../../lib/ops.ts'
import { expectClose, Random } from '../../ops/helpers.ts'
import { ACTIVATIONS, cudaTests, floats, type Inputs } from '../helpers.ts'

interface Case {
  shape: [batch: number, height: number, width: number, channels: number]
  more?: number
  groups: number
}

interface Data extends Case {
  x: Float32Array
  rest: Float32Array
  weight: Float32Array
  bias: Float32Array
}

function draw({ shape, more = 0, groups }: Case, random: Random, mean = 0, scale = 1): Data {
  const [b, h, w, c] = shape
  const around = (count: number) => random.normals(count, scale).map(value => value + mean)
  return {
    shape,
    more,
    groups,
    x: around(b * h * w * c),
    rest: around(b * h * w * more),
    weight: random.normals(c + more),
    bias: random.normals(c + more),
  }
}

function run(
  t: Inputs,
  data: Data,
  activation: 'none' | 'silu' = 'silu',
  x = t.a(data.x, data.shape),
  more = data.more ? t.a(data.rest, [...data.shape.slice(0, 3), data.more]) : undefined,
) {
  const channels = data.shape[3] + (data.more ?? 0)
  const [weight, bias] = [t.plain(data.weight, [channels]), t.plain(data.bias, [channels])]
  return groupNorm(x, weight, bias, { groups: data.groups, eps: 1e-5, more, activation })
}

// Moments are sums of up to 1e5 f32 terms, added by threads of some tens of them and then in trees; results are a handful,
// times weights up to 4. SiLU's exponential: 2 ulp, and 2^-24 of its argument.
const limit = { absolute: 1e-5, relative: 1e-5 }

const cases: Case[] = [
  // One kernel: a block for all groups, for each of them, for the four that fill a sector.
  { shape: [2, 3, 5, 37], groups: 1 },
  { shape: [1, 1, 1, 1], groups: 1 },
  { shape: [1, 1, 1, 8], groups: 8 },
  { shape: [3, 4, 4, 64], groups: 32 },
  { shape: [2, 8, 9, 320], groups: 32 },
  { shape: [1, 7, 9, 128], groups: 2 },
  { shape: [1, 16, 16, 64], groups: 1 },
  { shape: [1, 5, 3, 21], more: 9, groups: 5 },
  { shape: [2, 4, 6, 64], more: 32, groups: 8 },
  { shape: [1, 3, 3, 40], more: 8, groups: 3 },
  // Three: chunks of pixels, the last one ragged.
  { shape: [2, 33, 31, 64], groups: 1 },
  { shape: [1, 40, 41, 48], groups: 3 },
  { shape: [1, 76, 64, 64], groups: 32 },
  { shape: [1, 29, 23, 37], groups: 37 },
  { shape: [1, 30, 40, 40], more: 24, groups: 2 },
  { shape: [1, 31, 37, 11], more: 22, groups: 3 },
  { shape: [1, 37, 4, 960], more: 320, groups: 1 },
  // And slices of the channels, which cut groups.
  { shape: [1, 2, 3, 3080], groups: 5 },
  { shape: [1, 2, 5, 1601], more: 1599, groups: 4 },
]

cudaTests('groupNorm on CUDA', cuda => {
  it.each(cases)('agrees with the CPU: $shape, $more more, $groups groups', async c => {
    const random = new Random()
    for (const dtype of ACTIVATIONS) {
      const data = draw(c, random)
      await cuda.same({ dtype, limit, what: `seed ${random.seed}` }, t => [
        run(t, data),
        run(t, data, 'none'),
      ])
    }
  })

  it.each([
    { shape: [1, 4, 4, 64], groups: 4 },
    { shape: [1, 40, 41, 48], groups: 2 },
  ] as Case[])('keeps its digits for numbers of any size, and far from zero: $shape', async c => {
    const random = new Random()
    const what = `seed ${random.seed}`
    for (const scale of [1e-20, 1e-4, 1e4, 1e15]) {
      const data = draw(c, random, 0, scale)
      await cuda.same({ dtype: 'f32', limit, what: `${what}, scale ${scale}` }, t => run(t, data))
      await cuda.same({ dtype: 'bf16', limit, what: `${what}, scale ${scale}` }, t => run(t, data))
    }
    // The f32 mean is good to 2^-24 of 1000 deviations: 6e-5 of a deviation, and again in its difference to x.
    const far = draw(c, random, 1000)
    await cuda.same({ dtype: 'f32', limit: { absolute: 5e-4 }, what }, t => run(t, far, 'none'))
    await cuda.same({ dtype: 'f16', limit: { absolute: 5e-4 }, what }, t => run(t, far, 'none'))
    // One pixel far off, where the sums start: only those of one thread are of differences to it.
    const spike = draw(c, random)
    spike.x.fill(3e4, 0, c.shape[3])
    await cuda.same({ dtype: 'f32', limit, what: `${what}, spike` }, t => run(t, spike))
  })

  it('is what f64 arithmetic gives', async () => {
    const random = new Random()
    const data = draw({ shape: [1, 31, 40, 40], more: 24, groups: 4 }, random, 3, 2)
    const [pixels, own, more, width] = [31 * 40, 40, 24, 16]
    const channels = own + more
    const value = (p: number, c: number) => (c < own ? data.x[p * own + c]! : data.rest[p * more + c - own]!)
    const expected = new Float64Array(pixels * channels)
    for (let first = 0; first < channels; first += width) {
      const group = Array.from({ length: pixels * width }, (_, i) =>
        value(Math.floor(i / width), first + (i % width)),
      )
      const mean = group.reduce((a, b) => a + b) / group.length
      const deviation = Math.sqrt(group.reduce((a, b) => a + (b - mean) ** 2, 0) / group.length + 1e-5)
      for (let p = 0; p < pixels; p++)
        for (let c = first; c < first + width; c++) {
          const y = ((value(p, c) - mean) / deviation) * data.weight[c]! + data.bias[c]!
          expected[p * channels + c] = y / (1 + Math.exp(-y))
        }
    }
    const t = cuda.inputs(cuda.gpu, 'f32')
    expectClose(await floats(run(t, data)), expected, limit, `seed ${random.seed}`)
  })

  it.each(ACTIVATIONS)('gives the bias where a %s group is constant', async dtype => {
    for (const shape of [
      [1, 4, 4, 32],
      [1, 50, 50, 32],
    ] as [number, number, number, number][]) {
      const data = draw({ shape, groups: 4 }, new Random())
      // Numbers that every type holds; none divides evenly.
      data.x.fill(59904)
      const t = cuda.inputs(cuda.gpu, dtype)
      const result = await floats(run(t, data, 'none'))
      const bias = await floats(t.a(data.bias, [32]))
      expect([...result]).toEqual(Array.from(result, (_, i) => bias[i % 32]))
    }
  })

  it.each(ACTIVATIONS)('keeps what is not finite to its %s group', async dtype => {
    for (const shape of [
      [2, 4, 4, 32],
      [2, 50, 50, 32],
    ] as [number, number, number, number][]) {
      const random = new Random()
      const data = draw({ shape, groups: 4 }, random)
      data.x[9] = Number.POSITIVE_INFINITY
      data.x[data.x.length - 1] = Number.NaN
      await cuda.same({ dtype, limit, what: `seed ${random.seed}` }, t => run(t, data))
    }
  })

  it.each([
    { shape: [3, 6, 5, 64], more: 32, groups: 4 },
    { shape: [3, 31, 37, 40], more: 24, groups: 4 },
    { shape: [3, 41, 37, 21], groups: 3 },
  ] as Case[])('gives an image of $shape the same bits alone and wherever it lies', async c => {
    const random = new Random()
    const data = draw(c, random)
    for (const dtype of ACTIVATIONS) {
      const t = cuda.inputs(cuda.gpu, dtype)
      const x = t.a(data.x, data.shape)
      const more = c.more ? t.a(data.rest, [...c.shape.slice(0, 3), c.more]) : undefined
      const all = await floats(run(t, data, 'silu', x, more))
      const size = all.length / 3
      for (let b = 0; b < 3; b++)
        expect(
          await floats(run(t, data, 'silu', x.narrow(0, b, 1), more?.narrow(0, b, 1))),
          `${dtype}, seed ${random.seed}`,
        ).toEqual(all.slice(b * size, (b + 1) * size))
      // Where vectors cannot be loaded.
      const odd = t
        .a([0, ...data.x], [data.x.length + 1])
        .narrow(0, 1, data.x.length)
        .reshape(...c.shape)
      expect(await floats(run(t, data, 'silu', odd, more)), `${dtype}, seed ${random.seed}`).toEqual(all)
    }
  })
})
