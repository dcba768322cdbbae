import * as z from 'zod'
import { describe } from '../errors.ts'
import { invalidValue, unsupported } from './errors.ts'
import { flag, int, optional, orNull, parseWith, size, withDefault } from './schema.ts'

/** One of the pipeline's two text encoders. Source: `CLIPTextConfig` of transformers. */
export interface ClipTextConfig {
  readonly vocab_size: number
  readonly hidden_size: number
  readonly intermediate_size: number
  readonly num_hidden_layers: number
  readonly num_attention_heads: number
  readonly max_position_embeddings: number
  readonly layer_norm_eps: number
  readonly hidden_act: 'quick_gelu' | 'gelu'
  readonly eos_token_id: number
  /** Width of the pooled output of an encoder with projection. */
  readonly projection_dim: number
}

/** Lists hold one entry a block, from the full resolution downwards. Source: `UNet2DConditionModel` of diffusers. */
export interface UnetConfig {
  readonly in_channels: number
  readonly out_channels: number
  readonly block_out_channels: readonly number[]
  readonly down_block_types: readonly ('DownBlock2D' | 'CrossAttnDownBlock2D')[]
  /** From the lowest resolution upwards. */
  readonly up_block_types: readonly ('UpBlock2D' | 'CrossAttnUpBlock2D')[]
  readonly layers_per_block: readonly number[]
  readonly transformer_layers_per_block: readonly number[]
  /** Number of heads, which the release calls `attention_head_dim`. */
  readonly attention_heads: readonly number[]
  readonly cross_attention_dim: number
  readonly norm_num_groups: number
  readonly norm_eps: number
  readonly addition_time_embed_dim: number
  readonly projection_class_embeddings_input_dim: number
  /** Width of the guidance embedding of a distilled (LCM) UNet. */
  readonly time_cond_proj_dim: number | null
  readonly flip_sin_to_cos: boolean
  readonly freq_shift: number
  /** Side of the latent that the model was trained for. */
  readonly sample_size: number
}

/** Source: `AutoencoderKL` of diffusers. */
export interface VaeConfig {
  readonly in_channels: number
  readonly out_channels: number
  readonly latent_channels: number
  readonly block_out_channels: readonly number[]
  readonly layers_per_block: number
  readonly norm_num_groups: number
  readonly sample_size: number
  readonly scaling_factor: number
  readonly shift_factor: number
  /** Its activations overflow f16. */
  readonly force_upcast: boolean
  readonly use_quant_conv: boolean
  readonly use_post_quant_conv: boolean
  readonly mid_block_add_attention: boolean
}

export const SAMPLERS = ['euler', 'euler_ancestral', 'dpmpp_2m', 'ddim', 'lcm'] as const
export type Sampler = (typeof SAMPLERS)[number]

/** Source: `scheduler_config.json` of diffusers. */
export interface SchedulerConfig {
  readonly sampler: Sampler
  readonly num_train_timesteps: number
  readonly beta_start: number
  readonly beta_end: number
  readonly beta_schedule: 'linear' | 'scaled_linear' | 'squaredcos_cap_v2'
  readonly prediction_type: 'epsilon' | 'v_prediction' | 'sample'
  readonly timestep_spacing: 'leading' | 'trailing' | 'linspace'
  readonly steps_offset: number
  readonly use_karras_sigmas: boolean
  readonly rescale_betas_zero_snr: boolean
  /** DDIM, LCM: the last step goes to the undiffused image, not to timestep 0. */
  readonly set_alpha_to_one: boolean
  /** LCM: steps of the schedule it was distilled from. */
  readonly original_inference_steps: number
}

/**
 * Keys of which only some values are run: what diffusers takes for an absent one, then the values that are run. A list
 * counts entry by entry.
 */
type Runs = Readonly<Record<string, readonly [byDefault: unknown, ...runs: unknown[]]>>

function refuseOthers(runs: Runs, json: unknown, file: string): void {
  const config = parseWith(z.looseObject({}), json, file)
  for (const [key, [byDefault, ...values]] of Object.entries(runs)) {
    const received = config[key] ?? byDefault
    if (![received].flat().every(value => values.includes(value))) {
      throw unsupported(
        `expected ${values.map(describe).join(' or ')} for "${key}" in ${file} but received ${describe(received)}`,
      )
    }
  }
}

const width = size(2 ** 15)
const eps = z.number().positive().max(1)
const oneOrMore = <T extends z.ZodType>(schema: T) => z.union([schema, z.array(schema).min(1).max(16)])

const clipTextSchema = z.object({
  vocab_size: withDefault(size(2 ** 24), 49408),
  hidden_size: withDefault(width, 512),
  intermediate_size: withDefault(size(2 ** 17), 2048),
  num_hidden_layers: withDefault(int(2, 256), 12),
  num_attention_heads: withDefault(size(256), 8),
  max_position_embeddings: withDefault(size(2 ** 16), 77),
  layer_norm_eps: withDefault(eps, 1e-5),
  hidden_act: withDefault(z.enum(['quick_gelu', 'gelu']), 'quick_gelu'),
  eos_token_id: withDefault(int(0, 2 ** 31 - 1), 49407),
  projection_dim: withDefault(width, 512),
})

/**
 * Validates the `config.json` of a text encoder. Defaults are transformers' CLIPTextConfig's.
 * @throws MgmError `CHECKPOINT_UNSUPPORTED` for another length than 77 tokens; `CHECKPOINT_INVALID` for a value of the
 *   wrong type or out of range. So do the other parsers here.
 */
export function parseClipTextConfig(json: unknown, file: string): ClipTextConfig {
  refuseOthers(
    { model_type: ['clip_text_model', 'clip_text_model'], max_position_embeddings: [77, 77] },
    json,
    file,
  )
  const config = parseWith(clipTextSchema, json, file)
  checkDivides(file, 'num_attention_heads', config.num_attention_heads, 'hidden_size', config.hidden_size)
  return config
}

const UNET_RUNS: Runs = {
  // Other conditions than SDXL's: classes, hints, image embeddings, other projections of the prompt.
  addition_embed_type: [null, 'text_time'],
  class_embed_type: [null, null],
  num_class_embeds: [null, null],
  encoder_hid_dim: [null, null],
  encoder_hid_dim_type: [null, null],
  attention_type: ['default', 'default'],
  // Other transformers: convolutions as projections, no self-attention, two prompts, normed keys.
  use_linear_projection: [false, true],
  only_cross_attention: [false, false],
  mid_block_only_cross_attention: [null, null, false],
  dual_cross_attention: [false, false],
  cross_attention_norm: [null, null],
  reverse_transformer_layers_per_block: [null, null],
  // Other timestep embeddings.
  time_embedding_type: ['positional', 'positional'],
  time_embedding_dim: [null, null],
  time_embedding_act_fn: [null, null],
  timestep_post_act: [null, null],
  // Other ResNets and convolutions.
  act_fn: ['silu', 'silu', 'swish'],
  mid_block_type: ['UNetMidBlock2DCrossAttn', 'UNetMidBlock2DCrossAttn'],
  resnet_time_scale_shift: ['default', 'default'],
  resnet_skip_time_act: [false, false],
  resnet_out_scale_factor: [1, 1],
  mid_block_scale_factor: [1, 1],
  downsample_padding: [1, 1],
  conv_in_kernel: [3, 3],
  conv_out_kernel: [3, 3],
  center_input_sample: [false, false],
  down_block_types: [null, 'DownBlock2D', 'CrossAttnDownBlock2D'],
  up_block_types: [null, 'UpBlock2D', 'CrossAttnUpBlock2D'],
}

const unetSchema = z.object({
  in_channels: withDefault(size(64), 4),
  out_channels: withDefault(size(64), 4),
  block_out_channels: z.array(width).min(1).max(8),
  down_block_types: z.array(z.enum(['DownBlock2D', 'CrossAttnDownBlock2D'])),
  up_block_types: z.array(z.enum(['UpBlock2D', 'CrossAttnUpBlock2D'])),
  layers_per_block: withDefault(oneOrMore(size(64)), 2),
  transformer_layers_per_block: withDefault(oneOrMore(size(256)), 1),
  attention_head_dim: withDefault(oneOrMore(size(1024)), 8),
  num_attention_heads: optional(oneOrMore(size(1024))),
  cross_attention_dim: withDefault(oneOrMore(width), 1280),
  norm_num_groups: withDefault(size(1024), 32),
  norm_eps: withDefault(eps, 1e-5),
  addition_time_embed_dim: int(2, 2 ** 15),
  projection_class_embeddings_input_dim: size(2 ** 17),
  time_cond_proj_dim: orNull(width),
  flip_sin_to_cos: flag(true),
  freq_shift: withDefault(z.number().min(0).max(1), 0),
  sample_size: withDefault(size(2 ** 12), 128),
})

/** Validates the `config.json` of a UNet; entries for each block may be one number for all. */
export function parseUnetConfig(json: unknown, file: string): UnetConfig {
  refuseOthers(UNET_RUNS, json, file)
  const { attention_head_dim, num_attention_heads, cross_attention_dim, ...raw } = parseWith(
    unetSchema,
    json,
    file,
  )
  const blocks = raw.block_out_channels.length
  const forBlocks = <T>(key: string, value: T | T[]): T[] => {
    const list = Array.isArray(value) ? value : Array.from({ length: blocks }, () => value)
    if (list.length !== blocks)
      throw invalidValue(file, `${blocks} entries, as "block_out_channels" has,`, `"${key}"`, value)
    return list
  }
  const widths = new Set([cross_attention_dim].flat())
  if (widths.size > 1)
    throw unsupported(
      `expected one width for "cross_attention_dim" in ${file} but received ${describe(cross_attention_dim)}`,
    )
  const [promptWidth] = widths as Set<number>
  const heads = forBlocks('attention_head_dim', num_attention_heads ?? attention_head_dim)
  for (const [i, channels] of raw.block_out_channels.entries()) {
    checkDivides(file, 'norm_num_groups', raw.norm_num_groups, 'block_out_channels', channels)
    checkDivides(file, 'attention_head_dim', heads[i]!, 'block_out_channels', channels)
  }
  if (raw.addition_time_embed_dim % 2 !== 0)
    throw invalidValue(file, 'an even number', '"addition_time_embed_dim"', raw.addition_time_embed_dim)
  return {
    ...raw,
    down_block_types: forBlocks('down_block_types', raw.down_block_types),
    up_block_types: forBlocks('up_block_types', raw.up_block_types),
    layers_per_block: forBlocks('layers_per_block', raw.layers_per_block),
    transformer_layers_per_block: forBlocks('transformer_layers_per_block', raw.transformer_layers_per_block),
    attention_heads: heads,
    cross_attention_dim: promptWidth!,
  }
}

const VAE_RUNS: Runs = {
  act_fn: ['silu', 'silu', 'swish'],
  down_block_types: ['DownEncoderBlock2D', 'DownEncoderBlock2D'],
  up_block_types: ['UpDecoderBlock2D', 'UpDecoderBlock2D'],
  // Latents of other models, normalised channel by channel.
  latents_mean: [null, null],
  latents_std: [null, null],
}

const vaeSchema = z.object({
  in_channels: withDefault(size(64), 3),
  out_channels: withDefault(size(64), 3),
  latent_channels: withDefault(size(64), 4),
  block_out_channels: z.array(width).min(1).max(8),
  layers_per_block: withDefault(size(64), 1),
  norm_num_groups: withDefault(size(1024), 32),
  sample_size: withDefault(size(2 ** 14), 32),
  scaling_factor: withDefault(z.number().positive().max(1e6), 0.18215),
  shift_factor: withDefault(z.number().min(-1e6).max(1e6), 0),
  force_upcast: flag(true),
  use_quant_conv: flag(true),
  use_post_quant_conv: flag(true),
  mid_block_add_attention: flag(true),
})

/** Validates the `config.json` of a VAE; early ones lack the keys that came later. */
export function parseVaeConfig(json: unknown, file: string): VaeConfig {
  refuseOthers(VAE_RUNS, json, file)
  const config = parseWith(vaeSchema, json, file)
  for (const channels of config.block_out_channels)
    checkDivides(file, 'norm_num_groups', config.norm_num_groups, 'block_out_channels', channels)
  return config
}

const SIGMAS: Runs = {
  trained_betas: [null, null],
  use_exponential_sigmas: [false, false],
  use_beta_sigmas: [false, false],
  final_sigmas_type: ['zero', 'zero'],
}
/** Bounds on the predicted image, which models of latents do without. */
const UNBOUNDED: Runs = { trained_betas: [null, null], thresholding: [false, false] }

/** diffusers' classes: what of them is run, and where their defaults are not Euler's. */
const SCHEDULERS: Readonly<
  Record<string, { sampler: Sampler; runs: Runs; defaults?: Partial<SchedulerConfig> }>
> = {
  EulerDiscreteScheduler: {
    sampler: 'euler',
    runs: {
      ...SIGMAS,
      interpolation_type: ['linear', 'linear'],
      timestep_type: ['discrete', 'discrete'],
      sigma_min: [null, null],
      sigma_max: [null, null],
    },
  },
  EulerAncestralDiscreteScheduler: { sampler: 'euler_ancestral', runs: { trained_betas: [null, null] } },
  DPMSolverMultistepScheduler: {
    sampler: 'dpmpp_2m',
    runs: {
      ...SIGMAS,
      ...UNBOUNDED,
      algorithm_type: ['dpmsolver++', 'dpmsolver++'],
      solver_order: [2, 2],
      solver_type: ['midpoint', 'midpoint'],
      lower_order_final: [true, true],
      euler_at_final: [false, false],
      use_lu_lambdas: [false, false],
      use_flow_sigmas: [false, false],
      use_dynamic_shifting: [false, false],
      variance_type: [null, null],
    },
  },
  DDIMScheduler: {
    sampler: 'ddim',
    runs: { ...UNBOUNDED, clip_sample: [true, false] },
    defaults: { timestep_spacing: 'leading' },
  },
  LCMScheduler: {
    sampler: 'lcm',
    runs: { ...UNBOUNDED, clip_sample: [false, false], timestep_scaling: [10, 10] },
    defaults: {
      timestep_spacing: 'leading',
      beta_start: 0.00085,
      beta_end: 0.012,
      beta_schedule: 'scaled_linear',
    },
  },
}

const schedulerSchema = z.object({
  num_train_timesteps: withDefault(int(2, 2 ** 20), 1000),
  beta_start: withDefault(z.number().positive().max(1), 0.0001),
  beta_end: withDefault(z.number().positive().max(1), 0.02),
  beta_schedule: withDefault(z.enum(['linear', 'scaled_linear', 'squaredcos_cap_v2']), 'linear'),
  prediction_type: withDefault(z.enum(['epsilon', 'v_prediction', 'sample']), 'epsilon'),
  timestep_spacing: withDefault(z.enum(['leading', 'trailing', 'linspace']), 'linspace'),
  steps_offset: withDefault(int(0, 2 ** 20), 0),
  use_karras_sigmas: flag(false),
  rescale_betas_zero_snr: flag(false),
  set_alpha_to_one: flag(true),
  original_inference_steps: withDefault(size(2 ** 20), 50),
})

/** Validates `scheduler_config.json`; `className` is the scheduler that `model_index.json` names. */
export function parseSchedulerConfig(json: unknown, file: string, className: string): SchedulerConfig {
  const scheduler = Object.hasOwn(SCHEDULERS, className) ? SCHEDULERS[className] : undefined
  if (scheduler === undefined) {
    throw unsupported(
      `expected one of ${Object.keys(SCHEDULERS).join(', ')} for the scheduler of ${file} but received ${describe(className)}`,
    )
  }
  refuseOthers(scheduler.runs, json, file)
  const config = parseWith(z.looseObject({}), json, file)
  return {
    sampler: scheduler.sampler,
    ...parseWith(schedulerSchema, { ...scheduler.defaults, ...config }, file),
  }
}

function checkDivides(file: string, key: string, value: number, ofKey: string, of: number): void {
  if (of % value !== 0) throw invalidValue(file, `a divisor of ${ofKey} (${of})`, `"${key}"`, value)
}
