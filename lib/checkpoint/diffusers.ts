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
