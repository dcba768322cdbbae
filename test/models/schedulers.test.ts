import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { SAMPLERS, type Sampler, type SchedulerConfig } from '../../lib/checkpoint/diffusers.ts'
import { createSchedule, type Schedule } from '../../lib/models/schedulers.ts'
import { schedulerStep } from '../../lib/ops.ts'
import { FIXTURES, readSafetensors } from '../helpers/safetensors.ts'
import { expectClose, floats, openDevice } from '../ops/helpers.ts'

/** The scheduler_config.json of SDXL. */
const SDXL: SchedulerConfig = {
  sampler: 'euler',
  num_train_timesteps: 1000,
  beta_start: 0.00085,
  beta_end: 0.012,
  beta_schedule: 'scaled_linear',
  prediction_type: 'epsilon',
  timestep_spacing: 'leading',
  steps_offset: 1,
  use_karras_sigmas: false,
  rescale_betas_zero_snr: false,
  set_alpha_to_one: true,
  original_inference_steps: 50,
}

/** A run of diffusers, by tools/sdxl_fixtures.py: two latents and the formulas below. */
interface Recorded {
  sampler: Sampler
  steps: number
  config: Partial<SchedulerConfig>
  karras?: boolean
  strength?: number
  timesteps: number[]
  start: number[]
  /** Of the first step; diffusers does not tell it for DPM++. */
  predicted?: number[]
  /** After each step, or after the last of a long run. */
  latents: number[][]
}
const recorded: Recorded[] = JSON.parse(
  readFileSync(join(FIXTURES, 'sdxl-schedulers/trajectories.json'), 'utf8'),
)
const START = [0.4, -1.3]
const IMAGE = [0.9, -0.5]
const model = (x: number, timestep: number, j: number) =>
  0.8 * Math.tanh(0.7 * x + 0.3 * j) + 0.2 * Math.cos(timestep / 150 + j)
const noise = (i: number) => [Math.sin(3 * i + 1), Math.cos(2 * i + 0.5)]

interface StepInputs {
  x: number[]
  model: number[]
  previous: number[]
  noise: number[]
}
interface StepResults {
  next: number[]
  predicted: number[]
}

/** The step of `schedulerStep`, in f64. */
function evaluate(schedule: Schedule, i: number, { x, model, previous, noise }: StepInputs): StepResults {
  const c = schedule.coefficients(i)
  return {
    next: x.map((x, j) => c.x * x + c.model * model[j]! + c.previous * previous[j]! + c.noise * noise[j]!),
    predicted: x.map((x, j) => c.predictedX * x + c.predictedM * model[j]!),
  }
}

function scheduleOf({ config, steps, sampler, karras, strength }: Recorded): Schedule {
  return createSchedule({ ...SDXL, ...config }, { steps, sampler, karras, strength })
}

/** Goes the recorded way and holds each place of it against the record. */
async function follow(
  run: Recorded,
  schedule: Schedule,
  step: (i: number, inputs: StepInputs) => StepResults | Promise<StepResults>,
  limit: { absolute: number; relative: number },
) {
  const { image, noise: sigma } = schedule.start
  let x =
    run.strength === undefined
      ? START.map(z => z * schedule.initNoiseSigma)
      : START.map((z, j) => image * IMAGE[j]! + sigma * z)
  expectClose(x, run.start, limit, 'start')
  let previous = [0, 0]
  for (const [i, timestep] of schedule.timesteps.entries()) {
    const output = x.map((x, j) => model(x * schedule.inputScale(i), timestep, j))
    const { next, predicted } = await step(i, { x, model: output, previous, noise: noise(i) })
    if (i === 0 && run.predicted) expectClose(predicted, run.predicted, limit, 'predicted')
    x = next
    previous = predicted
    const place = i - (schedule.timesteps.length - run.latents.length)
    if (place >= 0) expectClose(x, run.latents[place]!, limit, `after step ${i}`)
  }
}

describe('the goldens (Euler, SDXL)', () => {
  const goldens = readSafetensors(join(FIXTURES, 'sdxl-tiny/tensors/scheduler.safetensors'))
  const golden = (name: string) => goldens.get(name)!.data
  // diffusers computes its tables in f32: about 2.4e-6 of a sigma (seen), held to twice that.
  const limit = { absolute: 0, relative: 5e-6 }

  test.each([8, 30, 50])('timesteps, sigmas and initial noise of %i steps', steps => {
    const schedule = createSchedule(SDXL, { steps })
    const sigmas = [...golden(`sigmas_${steps}`)]
    expect(schedule.timesteps).toEqual([...golden(`timesteps_${steps}`)])
    expectClose([schedule.initNoiseSigma], golden(`init_noise_sigma_${steps}`), limit, 'initNoiseSigma')
    const scales = sigmas.map(sigma => 1 / Math.sqrt(sigma ** 2 + 1))
    expectClose(
      sigmas.map((_, i) => schedule.inputScale(i)),
      scales,
      limit,
      'inputScale',
    )
    expectClose(
      schedule.timesteps.map((_, i) => -schedule.coefficients(i).predictedM),
      sigmas.slice(0, -1),
      limit,
      'sigmas',
    )
  })

  test('steps with a given prediction', () => {
    const schedule = createSchedule(SDXL, { steps: 30 })
    let latents = [...golden('step30.sample')]
    const eps = [...golden('step30.eps')]
    for (let i = 0; i < 3; i++) {
      const scaled = latents.map(x => x * schedule.inputScale(i))
      expectClose(scaled, golden(`step30.${i}.scaled_input`), { absolute: 1e-5 }, `input of step ${i}`)
      const nothing = latents.map(() => 0)
      latents = evaluate(schedule, i, { x: latents, model: eps, previous: nothing, noise: nothing }).next
      expectClose(latents, golden(`step30.${i}.prev_sample`), { absolute: 1e-4 }, `step ${i}`)
    }
  })
})

describe('the ways of diffusers', () => {
  // Its tables and steps are f32 ones: 2.6e-6 seen. Its sigmas of 4096 with a signal-to-noise ratio of zero are differences: 1.1e-5.
  const limitOf = ({ config }: Recorded) =>
    config.rescale_betas_zero_snr ? { absolute: 3e-5, relative: 3e-5 } : { absolute: 6e-6, relative: 6e-6 }

  test.each(SAMPLERS)('%s', async sampler => {
    const runs = recorded.filter(run => run.sampler === sampler)
    expect(runs.length).toBeGreaterThan(15)
    for (const run of runs) {
      const schedule = scheduleOf(run)
      const what = JSON.stringify({ ...run, latents: undefined })
      // Euler's Karras timesteps are no whole numbers: the steepest part of the table turns f32 sigmas into 1.3e-3 of one.
      const timestep = { absolute: run.karras && sampler === 'euler' ? 2e-3 : run.steps * 1e-5 }
      expectClose(schedule.timesteps, run.timesteps, timestep, what)
      try {
        await follow(run, schedule, (i, inputs) => evaluate(schedule, i, inputs), limitOf(run))
      } catch (error) {
        throw new Error(what, { cause: error })
      }
    }
  })

  const device = openDevice()
  test.each(SAMPLERS)('%s by schedulerStep', async sampler => {
    const run = recorded.find(
      run => run.sampler === sampler && run.steps === 8 && run.config.prediction_type === 'v_prediction',
    )!
    const schedule = scheduleOf(run)
    const step = async (i: number, inputs: StepInputs): Promise<StepResults> => {
      const c = schedule.coefficients(i)
      const row = [
        1,
        c.predictedX,
        c.predictedM,
        c.x,
        c.model,
        c.previous,
        c.noise,
        schedule.inputScale(i + 1),
      ]
      const tensor = (data: number[]) => device.tensor(data, [1, 1, 2, 1])
      const { out, input, predicted } = device.scope(() =>
        schedulerStep(tensor(inputs.x), {
          coefficients: device.tensor(row, [1, 8]),
          model: tensor(inputs.model),
          previous: schedule.usesPrevious ? tensor(inputs.previous) : undefined,
          noise: schedule.usesNoise ? tensor(inputs.noise) : undefined,
          halves: 1,
          input: 'f32',
        }),
      )
      const next = [...(await floats(out))]
      const scaled = next.map(x => x * schedule.inputScale(i + 1))
      expectClose(await floats(input), scaled, { absolute: 0, relative: 2 ** -22 }, 'input')
      return { next, predicted: [...(await floats(predicted!))] }
    }
    await follow(run, schedule, step, limitOf(run))
  })
})

describe('createSchedule', () => {
  const steps = (schedule: Schedule) => schedule.timesteps.map((_, i) => schedule.coefficients(i))

  test('takes sampler and Karras levels from the config unless told otherwise', () => {
    const config: SchedulerConfig = { ...SDXL, sampler: 'dpmpp_2m', use_karras_sigmas: true }
    const plain = createSchedule(config, { steps: 8, karras: false })
    const karras = createSchedule(config, { steps: 8 })
    expect(karras.timesteps).not.toEqual(plain.timesteps)
    expect(steps(karras)).toEqual(
      steps(createSchedule(SDXL, { steps: 8, sampler: 'dpmpp_2m', karras: true })),
    )
    // Where a sampler has no such levels, the config's wish for them is no error.
    expect(createSchedule(config, { steps: 8, sampler: 'ddim' }).timesteps).toEqual(
      createSchedule(SDXL, { steps: 8, sampler: 'ddim' }).timesteps,
    )
  })

  test('says what a step needs besides the model', () => {
    const needs = (sampler: Sampler, count: number) => {
      const { usesNoise, usesPrevious } = createSchedule(SDXL, { steps: count, sampler })
      return { usesNoise, usesPrevious }
    }
    expect(needs('euler', 8)).toEqual({ usesNoise: false, usesPrevious: false })
    expect(needs('ddim', 8)).toEqual({ usesNoise: false, usesPrevious: false })
    expect(needs('dpmpp_2m', 8)).toEqual({ usesNoise: false, usesPrevious: true })
    expect(needs('dpmpp_2m', 2)).toEqual({ usesNoise: false, usesPrevious: false })
    expect(needs('euler_ancestral', 8)).toEqual({ usesNoise: true, usesPrevious: false })
    expect(needs('lcm', 4)).toEqual({ usesNoise: true, usesPrevious: false })
    expect(needs('lcm', 1)).toEqual({ usesNoise: false, usesPrevious: false })
  })

  test.each(SAMPLERS)(
    '%s: every step is finite and the last leads to what is predicted, from 1 step to all',
    sampler => {
      for (const timestep_spacing of ['leading', 'trailing', 'linspace'] as const)
        for (const count of [1, 2, 3, 16, 49, 50, 333, 999, 1000]) {
          if (sampler === 'lcm' && count > 50) continue
          if (sampler === 'dpmpp_2m' && timestep_spacing === 'leading' && count === 1000) continue
          const schedule = createSchedule({ ...SDXL, timestep_spacing }, { steps: count, sampler })
          const what = `${count} steps, ${timestep_spacing}`
          expect(schedule.timesteps.length, what).toBe(count)
          expect(steps(schedule).flatMap(Object.values).every(Number.isFinite), what).toBe(true)
          const last = schedule.coefficients(count - 1)
          if (sampler === 'ddim') continue // Its stride may end short of the image.
          expectClose([last.x, last.model], [last.predictedX, last.predictedM], { absolute: 1e-12 }, what)
          expect(schedule.inputScale(count)).toBe(1)
        }
    },
  )

  test('image-to-image takes the end of the steps, with their levels', () => {
    const whole = createSchedule(SDXL, { steps: 10 })
    const part = createSchedule(SDXL, { steps: 10, strength: 0.35 })
    expect(part.timesteps).toEqual(whole.timesteps.slice(-3))
    expect(steps(part)).toEqual(steps(whole).slice(-3))
    expect(part.start.image).toBe(1)
    expect(part.start.noise).toBe(-whole.coefficients(7).predictedM)
    expect(part.initNoiseSigma).toBe(whole.initNoiseSigma)
    expect(part.inputScale(0)).toBe(whole.inputScale(7))
    // DPM++ 2M begins anew: there is no step before the first.
    expect(
      createSchedule(SDXL, { steps: 10, strength: 0.35, sampler: 'dpmpp_2m' }).coefficients(0).previous,
    ).toBeCloseTo(0, 15)
  })

  test.each([
    [{ steps: 0 }, 'expected an integer from 1 to 1000 for steps of euler but received 0'],
    [{ steps: 2.5 }, 'expected an integer from 1 to 1000 for steps of euler but received 2.5'],
    [{ steps: 1001 }, 'expected an integer from 1 to 1000 for steps of euler but received 1001'],
    [
      { steps: 1000, sampler: 'dpmpp_2m' },
      'expected an integer from 1 to 999 for steps of dpmpp_2m but received 1000',
    ],
    [{ steps: 51, sampler: 'lcm' }, 'expected an integer from 1 to 50 for steps of lcm but received 51'],
    [{ steps: 8, strength: 0 }, 'expected a number above 0 and at most 1 for strength but received 0'],
    [{ steps: 8, strength: 1.01 }, 'expected a number above 0 and at most 1 for strength but received 1.01'],
    [
      { steps: 8, strength: Number.NaN },
      'expected a number above 0 and at most 1 for strength but received NaN',
    ],
    [{ steps: 8, strength: 0.12 }, 'expected at least 1/8 (one of the steps) for strength but received 0.12'],
    [
      { steps: 8, sampler: 'ddim', karras: true },
      `expected the sampler 'euler' or 'dpmpp_2m' for karras but received "ddim"`,
    ],
  ] as const)('refuses %o', (options, message) => {
    expect(() => createSchedule(SDXL, options)).toThrow(
      expect.objectContaining({ code: 'INVALID_ARGUMENT', message }),
    )
  })

  test.each(['ddim', 'lcm'] as const)('%s refuses to take an image out of noise alone', sampler => {
    const config: SchedulerConfig = { ...SDXL, rescale_betas_zero_snr: true, timestep_spacing: 'trailing' }
    expect(() => createSchedule(config, { steps: 4, sampler })).toThrow(
      expect.objectContaining({
        code: 'UNSUPPORTED',
        message: `expected a model that predicts v or the sample for ${sampler} with rescale_betas_zero_snr but received one that predicts epsilon`,
      }),
    )
    expect(
      createSchedule({ ...config, prediction_type: 'v_prediction' }, { steps: 4, sampler }).start,
    ).toEqual({
      image: 0,
      noise: 1,
    })
  })
})
