import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import type { SchedulerConfig } from '../../lib/checkpoint/diffusers.ts'
import { createSchedule, type Schedule } from '../../lib/models/schedulers.ts'
import { FIXTURES, readSafetensors } from '../helpers/safetensors.ts'
import { expectClose } from '../ops/helpers.ts'

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

/** The step of `schedulerStep`, in f64. */
function advance(
  schedule: Schedule,
  i: number,
  { x, model, previous, noise }: Record<'x' | 'model' | 'previous' | 'noise', number>,
): { next: number; predicted: number } {
  const c = schedule.coefficients(i)
  return {
    next: c.x * x + c.model * model + c.previous * previous + c.noise * noise,
    predicted: c.predictedX * x + c.predictedM * model,
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
    const eps = golden('step30.eps')
    for (let i = 0; i < 3; i++) {
      const scaled = latents.map(x => x * schedule.inputScale(i))
      expectClose(scaled, golden(`step30.${i}.scaled_input`), { absolute: 1e-5 }, `input of step ${i}`)
      latents = latents.map((x, j) => advance(schedule, i, { x, model: eps[j]!, previous: 0, noise: 0 }).next)
      expectClose(latents, golden(`step30.${i}.prev_sample`), { absolute: 1e-4 }, `step ${i}`)
    }
  })
})
