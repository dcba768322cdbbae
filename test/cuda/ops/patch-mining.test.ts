import { expect, it } from 'vitest'
import { Device } from '../../../lib/device.ts'
import { native } from '../../../lib/native.ts'
import { type ActivationType, patchMining } from '../../../lib/ops.ts'
import type { Tensor } from '../../../lib/tensor.ts'
import { expectClose, Random } from '../../ops/helpers.ts'
import { CASES, EPS, type Inputs, inputs, oracle, SMALL } from '../../ops/mining.ts'
import { cudaTests, floats, HALVES, type Inputs as Tensors } from '../helpers.ts'

/** Whole windows of 8 × 8 over halved maps, as the real tower's: the tensor-core kernel. */
const WINDOWS = {
  batch: 1,
  sizes: [
    [24, 24],
    [12, 12],
    [6, 6],
    [3, 3],
  ] as [number, number][],
  channels: [8, 24, 72, 136],
  grid: 3,
}

/** One rounding of a result to its type; the rest is f32 sums over channels, scores below 10 and values below 15. */
const UNIT = { f32: 2 ** -24, bf16: 2 ** -8, f16: 2 ** -11 }
const LIMIT = { absolute: 2e-5, relative: 1e-5 }

function mine(t: Tensors, c: Inputs): Tensor {
  const { batch, grid, downscale = 1, scale } = c
  const queries = batch * grid ** 2
  return patchMining(
    t.plain(c.g, [queries, c.g.length / queries]),
    c.stages.map((stage, s) => t.a(stage, [batch, ...c.sizes[s]!, c.channels[s]!])),
    { grid, downscale, scale, eps: EPS },
  )
}

/** Picture `b` of a batch. */
function pictureOf(c: Inputs, b: number): Inputs {
  const part = (x: Float32Array) => x.slice((x.length / c.batch) * b, (x.length / c.batch) * (b + 1))
  return { ...c, batch: 1, g: part(c.g), stages: c.stages.map(part) }
}

cudaTests('patchMining on CUDA', cuda => {
  const run = (device: Device, dtype: ActivationType, c: Inputs) =>
    floats(device.scope(() => mine(cuda.inputs(device, dtype), c)))
  const same = (c: Inputs, dtype: ActivationType, what: string, limit = LIMIT) =>
    cuda.same({ dtype, limit, what }, t => mine(t, c))
  /** Against the reference formula in f64, of the maps as the GPU gets them. */
  async function check(c: Inputs, dtype: ActivationType, what: string, limit = LIMIT): Promise<Float32Array> {
    const t = cuda.inputs(cuda.cpu, dtype)
    const stages = await Promise.all(c.stages.map(stage => floats(t.a(stage, [stage.length]))))
    const out = await run(cuda.gpu, dtype, c)
    expectClose(
      out,
      oracle({ ...c, stages }),
      { ...limit, relative: limit.relative + UNIT[dtype] },
      `${dtype}, ${what}`,
    )
    return out
  }

  const cases = [
    ...CASES,
    { name: 'whole windows', ...WINDOWS },
    { name: 'whole windows of two pictures', ...WINDOWS, batch: 2 },
    {
      name: 'whole windows that leave a rest',
      batch: 1,
      sizes: [
        [72, 80],
        [36, 40],
        [18, 20],
        [9, 10],
      ] as [number, number][],
      channels: [8, 8, 8, 8],
      grid: 9,
    },
  ]
  it.each(cases)('agrees with the reference formula in f64 and the CPU: $name', async c => {
    for (const dtype of HALVES) {
      const random = new Random()
      const drawn = inputs(c, random)
      await check(drawn, dtype, `seed ${random.seed}`)
      await same(drawn, dtype, `seed ${random.seed}`)
    }
  })

  it.each(HALVES)('agrees at the proportions of the real tower: %s', async dtype => {
    const random = new Random()
    const channels = [192, 384, 768, 1536]
    await check(inputs({ ...SMALL, channels }, random), dtype, `seed ${random.seed}`)
  })

  it.each([
    ['what a multiprocessor holds of the real tower', [192, 384, 768, 1536]],
    ['more slices than a warp keeps', [8, 64, 200, 2000]],
  ])('gives the same bits however much stays in shared memory: %s', async (_, channels) => {
    const random = new Random()
    const c = inputs({ ...SMALL, channels }, random)
    const out = await check(c, 'bf16', `seed ${random.seed}`)
    if (native().cudaSurvey().devices.length < 2) return
    const other = Device.open('cuda:1')
    expect(await run(other, 'bf16', c)).toEqual(out)
    await other.close()
  })

  for (const [kind, shape] of [
    ['any geometry', SMALL],
    ['whole windows', WINDOWS],
  ] as const) {
    it(`keeps its digits on a large offset: ${kind}`, async () => {
      const random = new Random()
      const c = inputs(shape, random, () => 1000 + 16 * random.normal())
      for (const dtype of HALVES)
        await check(c, dtype, `seed ${random.seed}`, { absolute: 1e-4, relative: 1e-5 })
    })

    it(`gives zeros where all channels are equal: ${kind}`, async () => {
      const c = inputs(shape, new Random(), () => 12345.678)
      for (const dtype of HALVES) {
        const out = await run(cuda.gpu, dtype, c)
        expectClose(out, new Float32Array(out.length), { absolute: 1e-6 })
      }
    })

    it(`does not cancel where neighbouring cells are opposite: ${kind}`, async () => {
      const random = new Random()
      const c = inputs(shape, random)
      c.stages.forEach((stage, s) => {
        const [, width] = c.sizes[s]!
        const n = c.channels[s]!
        stage.forEach((_, i) => {
          const cell = Math.floor(i / n)
          stage[i] = stage[i % n]! * ((Math.floor(cell / width) + (cell % width)) % 2 ? -100 : 100)
        })
      })
      for (const dtype of HALVES)
        await check(c, dtype, `seed ${random.seed}`, { absolute: 1e-4, relative: 1e-5 })
    })

    it(`agrees on maps of any magnitude: ${kind}`, async () => {
      for (const [dtype, magnitude] of [
        ['bf16', 1e-4],
        ['bf16', 1e15],
        ['f16', 1e-2],
        ['f16', 1e4],
      ] as const) {
        const random = new Random()
        const c = inputs(shape, random, () => random.normal() * magnitude)
        await check(c, dtype, `seed ${random.seed}, magnitude ${magnitude}`)
      }
    })

    it(`agrees with one outlier channel in each stage: ${kind}`, async () => {
      const random = new Random()
      const c = inputs(shape, random)
      c.stages.forEach((stage, s) => {
        for (let i = 1; i < stage.length; i += c.channels[s]!) stage[i]! *= 1e4
      })
      await check(c, 'bf16', `seed ${random.seed}`, { absolute: 1e-4, relative: 1e-5 })
    })

    it.each([1e36, 1e-38])(
      `agrees with queries of magnitude %d: scores saturate with their sign, or vanish: ${kind}`,
      async magnitude => {
        const random = new Random()
        const c = inputs(shape, random)
        c.g.forEach((value, i) => {
          c.g[i] = value * magnitude
        })
        c.scale = magnitude > 1 ? 1000 : c.scale
        for (const dtype of HALVES) await check(c, dtype, `seed ${random.seed}`)
      },
    )

    it(`turns a score that is not a number into 0: ${kind}`, async () => {
      const random = new Random()
      const c = inputs(shape, random)
      const width = c.channels.reduce((a, b) => a + b)
      const flat = { ...c, g: c.g.map((value, i) => (i < width ? 0 : value)) }
      for (const bad of [Number.NaN, Number.POSITIVE_INFINITY]) {
        c.g[0] = bad
        const out = await run(cuda.gpu, 'bf16', c)
        if (Number.isNaN(bad)) expect(out).toEqual(await run(cuda.gpu, 'bf16', flat))
        else expect(out.slice(width)).toEqual((await run(cuda.gpu, 'bf16', flat)).slice(width))
      }
    })

    it(`keeps what is not finite in the map to the windows that see it: ${kind}`, async () => {
      const random = new Random()
      const c = inputs(shape, random)
      for (const bad of [Number.NaN, Number.POSITIVE_INFINITY]) {
        c.stages[0]![3] = bad
        await same(c, 'bf16', `seed ${random.seed}`)
      }
    })

    it(`adds the bias column where it decides the sign of a score: ${kind}`, async () => {
      const random = new Random()
      const c = inputs(shape, random)
      const width = c.channels.reduce((a, b) => a + b)
      const queries = c.g.length / width
      const g = new Float32Array(queries * (width + 1))
      for (let q = 0; q < queries; q++) {
        g.set(c.g.subarray(q * width, (q + 1) * width), q * (width + 1))
        g[q * (width + 1) + width] = 1e3 * random.normal()
      }
      for (const scale of [c.scale, 1e38]) await same({ ...c, g, scale }, 'bf16', `seed ${random.seed}`)
    })

    it(`gives a query the same bits whatever shares the call: ${kind}`, async () => {
      const random = new Random()
      const c = inputs({ ...shape, batch: 3 }, random)
      for (const dtype of HALVES) {
        const all = await run(cuda.gpu, dtype, c)
        const second = await run(cuda.gpu, dtype, pictureOf(c, 1))
        expect(second).toEqual(all.slice(all.length / 3, (all.length / 3) * 2))
      }
    })
  }
})
