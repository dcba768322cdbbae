import { describe, expect, it } from 'vitest'
import { schedulerStep } from '../../lib/ops.ts'
import { expectClose, f32, openDevice, Random } from './helpers.ts'

const device = openDevice()

interface Given {
  model: boolean
  previous: boolean
  noise: boolean
  halves: 1 | 2
}

interface Step {
  x: Float32Array
  model: Float32Array[]
  previous: Float32Array
  noise: Float32Array
  coefficients: Float32Array
}

const shape = [5, 3, 4]
const size = 5 * 3 * 4

/** One image's share of everything; `model` has a half for each of two. */
function step(random: Random, length = size): Step {
  return {
    x: random.normals(length),
    model: [random.normals(length), random.normals(length)],
    previous: random.normals(length),
    noise: random.normals(length),
    coefficients: random.normals(8),
  }
}

async function run(steps: readonly Step[], given: Given, dims: readonly number[] = shape) {
  const batch = steps.length
  const tensor = (parts: readonly Float32Array[]) =>
    device.tensor(
      parts.flatMap(part => [...part]),
      [parts.length, ...dims],
    )
  const { out, input, predicted } = schedulerStep(tensor(steps.map(s => s.x)), {
    coefficients: device.tensor(
      steps.flatMap(s => [...s.coefficients]),
      [batch, 8],
    ),
    model: given.model
      ? tensor([0, 1].slice(0, given.halves).flatMap(half => steps.map(s => s.model[half]!)))
      : undefined,
    previous: given.previous ? tensor(steps.map(s => s.previous)) : undefined,
    noise: given.noise ? tensor(steps.map(s => s.noise)) : undefined,
    halves: given.halves,
    input: 'f32',
  })
  expect(out.shape).toEqual([batch, ...dims])
  expect(input.shape).toEqual([batch * given.halves, ...dims])
  expect(predicted?.shape).toEqual(given.model ? [batch, ...dims] : undefined)
  return { out: await f32(out), input: await f32(input), predicted: predicted && (await f32(predicted)) }
}

function oracle(steps: readonly Step[], given: Given) {
  const results = steps.flatMap(s => {
    const [g, px, pm, cx, cm, cp, cn, scale] = s.coefficients as unknown as number[]
    return Array.from(s.x, (x, i) => {
      const [a, b] = [s.model[0]![i]!, s.model[1]![i]!]
      const m = given.model ? (given.halves === 2 ? a + g! * (b - a) : a) : 0
      const y =
        cx! * x +
        cm! * m +
        (given.previous ? cp! * s.previous[i]! : 0) +
        (given.noise ? cn! * s.noise[i]! : 0)
      return { out: y, input: scale! * y, predicted: px! * x + pm! * m }
    })
  })
  const input = results.map(r => r.input)
  return {
    out: results.map(r => r.out),
    input: given.halves === 2 ? [...input, ...input] : input,
    predicted: given.model ? results.map(r => r.predicted) : undefined,
  }
}

// At most six f32 roundings of terms below 60 (products of three normals).
const limit = { absolute: 1e-5 }

const combinations = [false, true].flatMap(model =>
  [false, true].flatMap(previous =>
    [false, true].flatMap(noise => ([1, 2] as const).map(halves => ({ model, previous, noise, halves }))),
  ),
)

describe('schedulerStep', () => {
  it.each(combinations)(
    'follows the formula: model $model, previous $previous, noise $noise, halves $halves',
    async given => {
      const random = new Random()
      const steps = Array.from({ length: 3 }, () => step(random))
      const [actual, expected] = [await run(steps, given), oracle(steps, given)]
      expectClose(actual.out, expected.out, limit, `seed ${random.seed} out`)
      expectClose(actual.input, expected.input, { absolute: 5e-5 }, `seed ${random.seed} input`)
      if (expected.predicted)
        expectClose(actual.predicted!, expected.predicted, limit, `seed ${random.seed} predicted`)
    },
  )

  it('gives an image the same bits alone and in a batch, however many parts it is cut into', async () => {
    const random = new Random()
    const dims = [61, 47, 7]
    const steps = Array.from({ length: 3 }, () => step(random, 61 * 47 * 7))
    const given = { model: true, previous: true, noise: true, halves: 2 } as const
    const all = await run(steps, given, dims)
    expectClose(all.out, oracle(steps, given).out, limit, `seed ${random.seed}`)
    const length = 61 * 47 * 7
    for (const [b, one] of steps.entries()) {
      const alone = await run([one], given, dims)
      const own = (values: Float32Array, half = 0) =>
        values.slice((half * 3 + b) * length, (half * 3 + b + 1) * length)
      expect(alone.out).toEqual(own(all.out))
      expect(alone.predicted).toEqual(own(all.predicted!))
      expect(alone.input.slice(0, length)).toEqual(own(all.input))
      expect(alone.input.slice(length)).toEqual(own(all.input, 1))
    }
  })

  it('guides by the difference of the halves: factor 0 gives the first, factor 1 the second', async () => {
    const random = new Random()
    const one = step(random)
    for (const g of [0, 1]) {
      one.coefficients = Float32Array.of(g, 0, 1, 0, 1, 0, 0, 1)
      const { out } = await run([one], { model: true, previous: false, noise: false, halves: 2 })
      // One rounding of the difference, one of the sum.
      expectClose(out, one.model[g]!, { absolute: g * 1e-6 })
    }
  })

  it('does not hide NaN or infinities', async () => {
    const random = new Random()
    const one = step(random)
    one.coefficients = Float32Array.of(2, 1, 1, 1, 1, 1, 1, 1)
    one.x[0] = Number.NaN
    one.model[1]![1] = Infinity
    one.noise[2] = -Infinity
    const result = await run([one], { model: true, previous: true, noise: true, halves: 2 })
    expect([...result.out.slice(0, 3)]).toEqual([Number.NaN, Infinity, -Infinity])
    expect([...result.predicted!.slice(0, 2)]).toEqual([Number.NaN, Infinity])
    expect([...result.out.slice(3)].every(Number.isFinite)).toBe(true)
  })

  it('refuses what does not fit', () => {
    const x = device.zeros([2, 4, 4, 4])
    const coefficients = device.zeros([2, 8])
    const refused = (options: Partial<Parameters<typeof schedulerStep>[1]>) =>
      expect(() => schedulerStep(x, { coefficients, halves: 2, input: 'f32', ...options }))
    refused({ halves: 3 as 2 }).toThrow(/for halves but received 3/)
    refused({ model: x }).toThrow(/for model but received/)
    refused({ noise: device.zeros([2, 4, 4, 3]) }).toThrow(/for noise but received/)
    refused({ previous: device.zeros([1, 4, 4, 4]) }).toThrow(/for previous but received/)
    refused({ coefficients: device.zeros([2, 7]) }).toThrow(/for coefficients but received/)
    refused({ input: 'f16' }).toThrow(/a type of activations for input but received f16/)
  })
})
