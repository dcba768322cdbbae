import type { Sampler, SchedulerConfig } from '../checkpoint/diffusers.ts'
import { expected, MgmError } from '../errors.ts'

export interface ScheduleOptions {
  /** Steps from pure noise to the image: an integer from 1 to the timesteps of training (LCM: the steps of distillation). */
  readonly steps: number
  /** Default: the config's. */
  readonly sampler?: Sampler | undefined
  /** Noise levels of Karras et al. (2022), for 'euler' and 'dpmpp_2m' only. Default: the config's, where the sampler has them. */
  readonly karras?: boolean | undefined
  /** Image-to-image: only the last ⌊strength · steps⌋ steps are taken. Above 0 and at most 1, the default. */
  readonly strength?: number | undefined
}

/**
 * Factors of one step, as `schedulerStep` of ops.ts takes them:
 *
 *     predicted = predictedX·x + predictedM·model          the denoised image
 *     next = x·x + model·model + previous·(predicted of the step before) + noise·(standard normal)
 */
export interface Coefficients {
  readonly predictedX: number
  readonly predictedM: number
  readonly x: number
  readonly model: number
  readonly previous: number
  readonly noise: number
}

/** How noisy latents are: they equal image·x0 + noise·(standard normal). */
export interface Level {
  readonly image: number
  readonly noise: number
}

/** A sampler as numbers: everything of it that does not depend on the image. */
export interface Schedule {
  /** What the network is told at each step, the noisiest first; not always whole numbers. */
  readonly timesteps: readonly number[]
  /** Text-to-image starts at a standard normal times this. */
  readonly initNoiseSigma: number
  /** Image-to-image starts here. */
  readonly start: Level
  /** Some step adds fresh noise. */
  readonly usesNoise: boolean
  /** Some step looks at `predicted` of the step before. */
  readonly usesPrevious: boolean
  /** What latents are multiplied by before the network sees them at step i; 1 after the last step. */
  inputScale(i: number): number
  coefficients(i: number): Coefficients
}

/** One step: to level `to` without noise of its own, to which `fresh` times a standard normal is added. */
interface Step {
  readonly timestep: number
  readonly from: Level
  readonly to: Level
  readonly fresh?: number
  /** What is taken for the denoised image: skip·x + out·x0 (consistency models), where x0 is what the model predicts. */
  readonly boundary?: { readonly skip: number; readonly out: number }
}

/**
 * What `sampler` does in `steps` steps. Latents are kept in its own scale: x0 + σ·noise for the Euler samplers,
 * √ᾱ·x0 + √(1 − ᾱ)·noise for the others.
 *
 * Source: `EulerDiscreteScheduler`, `EulerAncestralDiscreteScheduler`, `DPMSolverMultistepScheduler` (dpmsolver++ of order
 * 2, midpoint), `DDIMScheduler` (η 0) and `LCMScheduler` of diffusers; strength as in its image-to-image pipelines.
 * @throws MgmError `INVALID_ARGUMENT` for steps or strength out of range, for a strength that leaves no step and for Karras
 *   levels of a sampler that has none; `UNSUPPORTED` for DDIM and LCM from a timestep without any signal (a config with
 *   `rescale_betas_zero_snr`) where the model predicts the noise, which says nothing about the image there.
 */
export function createSchedule(config: SchedulerConfig, options: ScheduleOptions): Schedule {
  const { steps, sampler = config.sampler, strength = 1 } = options
  const takesKarras = sampler === 'euler' || sampler === 'dpmpp_2m'
  if (options.karras && !takesKarras) throw expected("the sampler 'euler' or 'dpmpp_2m'", 'karras', sampler)
  const karras = takesKarras && (options.karras ?? config.use_karras_sigmas)
  const most = mostSteps(config, sampler, karras)
  if (!Number.isInteger(steps) || steps < 1 || steps > most)
    throw expected(`an integer from 1 to ${most}`, `steps of ${sampler}`, steps)
  if (!(strength > 0 && strength <= 1)) throw expected('a number above 0 and at most 1', 'strength', strength)
  const taken = Math.trunc(steps * strength)
  if (taken === 0) throw expected(`at least 1/${steps} (one of the steps)`, 'strength', strength)

  const whole = PATHS[sampler](config, steps, karras)
  const path = whole.slice(-taken)
  const coefficients = path.map((step, i) =>
    coefficientsOf(step, config.prediction_type, sampler === 'dpmpp_2m' ? path[i - 1] : undefined),
  )
  if (!Object.values(coefficients[0]!).every(Number.isFinite))
    throw new MgmError(
      'UNSUPPORTED',
      `expected a model that predicts v or the sample for ${sampler} with rescale_betas_zero_snr but received one that ` +
        `predicts ${config.prediction_type}`,
    )

  const { image, noise } = whole[0]!.from
  const sigmaSpace = sampler === 'euler' || sampler === 'euler_ancestral'
  return {
    timesteps: path.map(({ timestep }) => timestep),
    initNoiseSigma: sigmaSpace && config.timestep_spacing !== 'leading' ? noise : Math.hypot(image, noise),
    start: path[0]!.from,
    usesNoise: coefficients.some(({ noise }) => noise !== 0),
    usesPrevious: coefficients.some(({ previous }) => previous !== 0),
    inputScale: i => {
      const level = path[i]?.from ?? path.at(-1)!.to
      return 1 / Math.hypot(level.image, level.noise)
    },
    coefficients: i => coefficients[i]!,
  }
}

/**
 * Latents stay on a line: next = (s'/s)·x + (α' − α·s'/s)·x0 for levels (α, s) → (α', s'). `before` is given to samplers of
 * order 2, which carry on how x0 changed since the step before.
 */
function coefficientsOf(
  { from, to, fresh = 0, boundary }: Step,
  prediction: SchedulerConfig['prediction_type'],
  before: Step | undefined,
): Coefficients {
  const x0 = predictionOf(from, prediction)
  const { skip, out } = boundary ?? { skip: 0, out: 1 }
  const predictedX = skip + out * x0.x
  const predictedM = out * x0.model

  const kept = to.noise / from.noise
  const added = to.image - from.image * kept
  const slope = before ? slopeOf(before.from, from, to) : 0
  return {
    predictedX,
    predictedM,
    x: kept + added * (1 + slope) * predictedX,
    model: added * (1 + slope) * predictedM,
    previous: -added * slope,
    noise: fresh,
  }
}

/** x0 as a combination of latents and the model's output. */
function predictionOf(
  { image, noise }: Level,
  prediction: SchedulerConfig['prediction_type'],
): { x: number; model: number } {
  const norm = Math.hypot(image, noise)
  switch (prediction) {
    case 'epsilon':
      return { x: 1 / image, model: -noise / image }
    case 'v_prediction':
      return { x: image / norm ** 2, model: -noise / norm }
    case 'sample':
      return { x: 0, model: 1 }
  }
}

/** Half the ratio of this step to the one before in log(image / noise); 0 where either has no finite length. */
function slopeOf(before: Level, from: Level, to: Level): number {
  const lambda = ({ image, noise }: Level) => Math.log(image / noise)
  const slope = (lambda(to) - lambda(from)) / (lambda(from) - lambda(before)) / 2
  return Number.isFinite(slope) ? slope : 0
}

function mostSteps(config: SchedulerConfig, sampler: Sampler, karras: boolean): number {
  if (sampler === 'lcm') return config.original_inference_steps
  // It asks for one timestep more than it uses, and leading ones are at least 1 apart.
  const spare = sampler === 'dpmpp_2m' && !karras && config.timestep_spacing === 'leading' ? 1 : 0
  return config.num_train_timesteps - spare
}

const PATHS: Record<Sampler, (config: SchedulerConfig, steps: number, karras: boolean) => Step[]> = {
  euler(config, steps, karras) {
    const table = sigmasOf(alphasCumprod(config, { finite: true }))
    let timesteps = spaced(config, steps)
    let sigmas = timesteps.map(t => interpolate(table, t))
    if (karras) {
      sigmas = karrasSigmas(sigmas[0]!, sigmas.at(-1)!, steps)
      timesteps = sigmas.map(sigma => timestepOf(table, sigma))
    }
    return along(
      timesteps,
      [...sigmas, 0].map(sigma => ({ image: 1, noise: sigma })),
    )
  },

  euler_ancestral(config, steps) {
    return PATHS.euler(config, steps, false).map(step => {
      const [sigma, next] = [step.from.noise, step.to.noise]
      const fresh = Math.sqrt((next ** 2 * (sigma ** 2 - next ** 2)) / sigma ** 2)
      return { ...step, to: { image: 1, noise: Math.sqrt(next ** 2 - fresh ** 2) }, fresh }
    })
  },

  dpmpp_2m(config, steps, karras) {
    const table = sigmasOf(alphasCumprod(config, { finite: true }))
    let timesteps = spaced(config, steps, { spare: 1 }).map(roundHalfEven)
    let sigmas = timesteps.map(t => interpolate(table, t))
    if (karras) {
      sigmas = karrasSigmas(table.at(-1)!, table[0]!, steps)
      timesteps = sigmas.map(sigma => roundHalfEven(timestepOf(table, sigma)))
    }
    const levels = sigmas.map(sigma => ({
      image: 1 / Math.hypot(1, sigma),
      noise: sigma / Math.hypot(1, sigma),
    }))
    return along(timesteps, [...levels, CLEAN])
  },

  ddim(config, steps) {
    const alphas = alphasCumprod(config)
    const last = config.num_train_timesteps - 1
    const stride = Math.floor(config.num_train_timesteps / steps)
    return spaced(config, steps)
      .map(roundHalfEven)
      .map(timestep => {
        const next = timestep - stride
        return {
          timestep,
          from: levelOf(alphas[Math.min(timestep, last)]!),
          to: next < 0 && config.set_alpha_to_one ? CLEAN : levelOf(alphas[Math.max(next, 0)]!),
        }
      })
  },

  lcm(config, steps) {
    const alphas = alphasCumprod(config)
    const { num_train_timesteps, original_inference_steps } = config
    const stride = Math.floor(num_train_timesteps / original_inference_steps)
    const timesteps = Array.from({ length: steps }, (_, i) => {
      const skipped = Math.floor(i * (original_inference_steps / steps))
      return (original_inference_steps - skipped) * stride - 1
    })
    return timesteps.map((timestep, i) => {
      const next = timesteps[i + 1]
      const level = next === undefined ? CLEAN : levelOf(alphas[next]!)
      const scaled = timestep * LCM_TIMESTEP_SCALING
      const norm = Math.hypot(scaled, LCM_SIGMA_DATA)
      return {
        timestep,
        from: levelOf(alphas[timestep]!),
        to: { image: level.image, noise: 0 },
        fresh: level.noise,
        boundary: { skip: (LCM_SIGMA_DATA / norm) ** 2, out: scaled / norm },
      }
    })
  },
}

const CLEAN: Level = { image: 1, noise: 0 }

// The defaults of `LCMScheduler`, which no released config changes.
const LCM_TIMESTEP_SCALING = 10
const LCM_SIGMA_DATA = 0.5

/** Steps from each level to the next. */
function along(timesteps: readonly number[], levels: readonly Level[]): Step[] {
  return timesteps.map((timestep, i) => ({ timestep, from: levels[i]!, to: levels[i + 1]! }))
}

/**
 * Timesteps from high to low, table 2 of "Common Diffusion Noise Schedules and Sample Steps are Flawed". `spare` more of
 * them are spaced out and the lowest left out, except from trailing ones.
 */
function spaced(config: SchedulerConfig, steps: number, { spare = 0 } = {}): number[] {
  const { num_train_timesteps: total, timestep_spacing, steps_offset } = config
  const upwards = Array.from({ length: steps + spare }, (_, i) => i)
  switch (timestep_spacing) {
    case 'linspace': {
      const stride = (total - 1) / Math.max(1, upwards.length - 1)
      return upwards
        .map(i => i * stride)
        .reverse()
        .slice(0, steps)
    }
    case 'leading': {
      const stride = Math.floor(total / upwards.length)
      return upwards
        .map(i => i * stride + steps_offset)
        .reverse()
        .slice(0, steps)
    }
    case 'trailing': {
      // The stride as numpy's arange has it, since its error decides which way a half is rounded.
      const stride = total - (total - total / steps)
      return upwards.slice(0, steps).map(i => roundHalfEven(total - i * stride) - 1)
    }
  }
}

function roundHalfEven(x: number): number {
  const floor = Math.floor(x)
  const isHalf = x - floor === 0.5
  return isHalf ? floor + (floor % 2) : Math.round(x)
}

/** ᾱ of each timestep of training. `finite` keeps the last above 0 where the config rescales it to 0. */
function alphasCumprod(config: SchedulerConfig, { finite = false } = {}): number[] {
  let product = 1
  const alphas = betasOf(config).map(beta => {
    product *= 1 - beta
    return product
  })
  if (!config.rescale_betas_zero_snr) return alphas

  const roots = alphas.map(Math.sqrt)
  const [first, last] = [roots[0]!, roots.at(-1)!]
  const rescaled = roots.map(root => (((root - last) * first) / (first - last)) ** 2)
  return finite ? rescaled.with(-1, 2 ** -24) : rescaled
}

function betasOf({
  beta_schedule,
  beta_start,
  beta_end,
  num_train_timesteps: total,
}: SchedulerConfig): number[] {
  const linspace = (start: number, end: number) =>
    Array.from({ length: total }, (_, i) => start + ((end - start) * i) / (total - 1))
  switch (beta_schedule) {
    case 'linear':
      return linspace(beta_start, beta_end)
    case 'scaled_linear':
      return linspace(Math.sqrt(beta_start), Math.sqrt(beta_end)).map(root => root ** 2)
    case 'squaredcos_cap_v2': {
      const bar = (i: number) => Math.cos(((i / total + 0.008) / 1.008) * (Math.PI / 2)) ** 2
      return Array.from({ length: total }, (_, i) => Math.min(1 - bar(i + 1) / bar(i), 0.999))
    }
  }
}

function levelOf(alpha: number): Level {
  return { image: Math.sqrt(alpha), noise: Math.sqrt(1 - alpha) }
}

/** Noise over image, from the least noisy timestep upwards. */
function sigmasOf(alphas: readonly number[]): number[] {
  return alphas.map(alpha => Math.sqrt((1 - alpha) / alpha))
}

/** The table at a fractional place, its ends beyond them. */
function interpolate(table: readonly number[], at: number): number {
  const place = Math.min(at, table.length - 1)
  const low = Math.min(Math.floor(place), table.length - 2)
  return table[low]! + (table[low + 1]! - table[low]!) * (place - low)
}

/** The fractional place of sigma in the table, by its logarithm. */
function timestepOf(table: readonly number[], sigma: number): number {
  const above = table.findIndex(entry => entry > sigma)
  const low = above < 0 ? table.length - 2 : Math.max(0, above - 1)
  const [below, next] = [Math.log(table[low]!), Math.log(table[low + 1]!)]
  return low + Math.min(1, Math.max(0, (Math.log(sigma) - below) / (next - below)))
}

/** From `most` down to `least`, evenly spaced in σ^(1/7). */
function karrasSigmas(most: number, least: number, steps: number): number[] {
  const rho = 7
  const [high, low] = [most ** (1 / rho), least ** (1 / rho)]
  return Array.from({ length: steps }, (_, i) => (high + (i / Math.max(1, steps - 1)) * (low - high)) ** rho)
}
