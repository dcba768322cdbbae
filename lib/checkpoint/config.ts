import * as z from 'zod'
import { describe } from '../errors.ts'
import { invalidValue, unsupported } from './errors.ts'
import { flag, int, optional, orNull, parseWith, positive, size, text, withDefault } from './schema.ts'

/** The kind of language model, after `model_type`: `mgm` (Llama, Vicuna, Yi), `mgm_gemma`, `mgm_mixtral`, `mgm_mistral`. */
export type MgmFamily = 'llama' | 'gemma' | 'mixtral' | 'mistral'
/** Names of `hidden_act`; `gelu` is the exact one, with erf. */
export type HiddenAct = 'silu' | 'gelu' | 'gelu_pytorch_tanh' | 'quick_gelu'

/** `config.json` of an MGM checkpoint: its known keys under their own names, with the reference's defaults filled in. */
export interface MgmConfig {
  family: MgmFamily
  model_type: string

  vocab_size: number
  hidden_size: number
  intermediate_size: number
  num_hidden_layers: number
  num_attention_heads: number
  num_key_value_heads: number
  head_dim: number
  hidden_act: HiddenAct
  rms_norm_eps: number
  rope_theta: number
  /** Positions are divided by `factor`. */
  rope_scaling: { type: 'linear'; factor: number } | null
  max_position_embeddings: number
  /** Whether `lm_head` is the embedding table. */
  tie_word_embeddings: boolean
  sliding_window: number | null
  /** Present for Mixtral only. */
  num_local_experts?: number
  /** Present for Mixtral only. */
  num_experts_per_tok?: number
  bos_token_id: number | null
  eos_token_id: number | number[] | null
  pad_token_id: number | null
  torch_dtype: string | null

  /** CLIP folder or hub id; null in a checkpoint without vision. */
  mm_vision_tower: string | null
  /** OpenCLIP ConvNeXt folder or hub id. */
  mm_vision_tower_aux: string | null
  mm_hidden_size: number
  mm_hidden_size_aux: number
  mm_projector_type: string
  mm_vision_select_layer: number
  mm_vision_select_feature: 'patch' | 'cls_patch'
  mm_use_im_start_end: boolean
  mm_use_im_patch_token: boolean
  optimize_vision_tower: boolean
  optimize_vision_tower_aux: boolean
  /** The high-resolution view is a grid of `image_grid` x `image_grid` crops. */
  image_grid: number
  image_global: boolean
  /** Pixels a side of the high-resolution input. */
  image_size_aux: number
  /** `pad` pads to a square; anything else resizes and crops. */
  image_aspect_ratio: string | null
  /** Longest sequence, image embeddings included. */
  tokenizer_model_max_length: number
  tokenizer_padding_side: 'left' | 'right'
}

/** `vision_config` of a CLIP checkpoint. */
export interface ClipConfig {
  hidden_size: number
  intermediate_size: number
  num_hidden_layers: number
  num_attention_heads: number
  num_channels: number
  /** Pixels a side. */
  image_size: number
  /** Pixels a side. */
  patch_size: number
  hidden_act: HiddenAct
  layer_norm_eps: number
}

/** `preprocessor_config.json` of a CLIP checkpoint. */
export interface PreprocessorConfig {
  image_mean: [number, number, number]
  image_std: [number, number, number]
  size: { shortest_edge: number } | { height: number; width: number }
  crop_size: { height: number; width: number }
  /** Pillow's number of the filter: 0 nearest, 1 lanczos, 2 bilinear, 3 bicubic, 4 box, 5 hamming. */
  resample: number
  rescale_factor: number
  do_resize: boolean
  do_center_crop: boolean
  do_rescale: boolean
  do_normalize: boolean
  do_convert_rgb: boolean
}

/** The part of `open_clip_config.json` that says anything about the image tower. */
export interface OpenClipConfig {
  timm_model_name: string | null
  image_size: number | null
}

/** `generation_config.json`; every field may be absent there. */
export interface GenerationConfig {
  bos_token_id: number | null
  eos_token_id: number | number[] | null
  pad_token_id: number | null
  do_sample: boolean
  temperature: number | null
  top_p: number | null
  top_k: number | null
  max_length: number | null
  max_new_tokens: number | null
}

interface FamilyDefaults {
  family: MgmFamily
  vocab_size: number
  hidden_size: number
  intermediate_size: number
  num_hidden_layers: number
  num_attention_heads: number
  /** null: as many as attention heads. */
  num_key_value_heads: number | null
  /** null: hidden_size / num_attention_heads. */
  head_dim: number | null
  hidden_act: HiddenAct
  rms_norm_eps: number
  rope_theta: number
  max_position_embeddings: number
  tie_word_embeddings: boolean
  sliding_window: number | null
  bos_token_id: number
  eos_token_id: number
  pad_token_id: number | null
}

// Defaults of transformers' LlamaConfig, GemmaConfig, MixtralConfig and MistralConfig.
const LLAMA: FamilyDefaults = {
  family: 'llama',
  vocab_size: 32000,
  hidden_size: 4096,
  intermediate_size: 11008,
  num_hidden_layers: 32,
  num_attention_heads: 32,
  num_key_value_heads: null,
  head_dim: null,
  hidden_act: 'silu',
  rms_norm_eps: 1e-6,
  rope_theta: 1e4,
  max_position_embeddings: 2048,
  tie_word_embeddings: false,
  sliding_window: null,
  bos_token_id: 1,
  eos_token_id: 2,
  pad_token_id: null,
}
const GEMMA: FamilyDefaults = {
  ...LLAMA,
  family: 'gemma',
  vocab_size: 256000,
  hidden_size: 3072,
  intermediate_size: 24576,
  num_hidden_layers: 28,
  num_attention_heads: 16,
  num_key_value_heads: 16,
  head_dim: 256,
  hidden_act: 'gelu_pytorch_tanh',
  max_position_embeddings: 8192,
  tie_word_embeddings: true,
  bos_token_id: 2,
  eos_token_id: 1,
  pad_token_id: 0,
}
const MISTRAL: FamilyDefaults = {
  ...LLAMA,
  family: 'mistral',
  intermediate_size: 14336,
  num_key_value_heads: 8,
  max_position_embeddings: 4096 * 32,
  sliding_window: 4096,
}
const MIXTRAL: FamilyDefaults = {
  ...MISTRAL,
  family: 'mixtral',
  rms_norm_eps: 1e-5,
  rope_theta: 1e6,
  sliding_window: null,
}

/** `mini_gemini*` are the names the first release used for the same classes. */
const FAMILIES: ReadonlyMap<string, FamilyDefaults> = new Map([
  ['mgm', LLAMA],
  ['mgm_gemma', GEMMA],
  ['mgm_mixtral', MIXTRAL],
  ['mgm_mistral', MISTRAL],
  ['mini_gemini', LLAMA],
  ['mini_gemini_gemma', GEMMA],
  ['mini_gemini_mixtral', MIXTRAL],
  ['mini_gemini_mistral', MISTRAL],
])

const tokenId = int(0, 2 ** 31 - 1)
const tokenIds = z.union([tokenId, z.array(tokenId).max(64)])
const act = z.enum(['silu', 'gelu', 'gelu_pytorch_tanh', 'quick_gelu'])

/** Limits are far above any released model; they stop absurd allocations and overflow, nothing else. */
const mgmSchema = z.object({
  model_type: text,
  vocab_size: optional(size(2 ** 24)),
  hidden_size: optional(size(2 ** 17)),
  intermediate_size: optional(size(2 ** 20)),
  num_hidden_layers: optional(size(1024)),
  num_attention_heads: optional(size(1024)),
  num_key_value_heads: optional(size(1024)),
  head_dim: optional(size(1024)),
  hidden_act: optional(act),
  rms_norm_eps: optional(z.number().positive().max(1)),
  rope_theta: optional(positive),
  rope_scaling: optional(z.looseObject({})),
  // transformers 5 writes theta and scaling together.
  rope_parameters: optional(z.looseObject({ rope_theta: optional(positive) })),
  max_position_embeddings: optional(size(2 ** 26)),
  tie_word_embeddings: optional(z.boolean()),
  sliding_window: z.union([size(2 ** 26), z.null()]).optional(),
  num_local_experts: withDefault(size(1024), 8),
  num_experts_per_tok: withDefault(size(64), 2),
  bos_token_id: z.union([tokenId, z.null()]).optional(),
  eos_token_id: z.union([tokenIds, z.null()]).optional(),
  pad_token_id: z.union([tokenId, z.null()]).optional(),
  torch_dtype: optional(text),
  dtype: optional(text),
  attention_bias: flag(false),
  mlp_bias: flag(false),
  quantization_config: z.unknown().optional(),
  mm_vision_tower: orNull(text),
  mm_vision_tower_aux: orNull(text),
  mm_hidden_size: withDefault(size(2 ** 17), 1024),
  mm_hidden_size_aux: withDefault(size(2 ** 17), 2880),
  mm_projector_type: withDefault(text, 'linear'),
  mm_vision_select_layer: withDefault(int(-1024, 1024), -2),
  mm_vision_select_feature: withDefault(z.enum(['patch', 'cls_patch']), 'patch'),
  mm_use_im_start_end: flag(false),
  mm_use_im_patch_token: flag(true),
  optimize_vision_tower: flag(false),
  optimize_vision_tower_aux: flag(false),
  image_grid: withDefault(size(16), 1),
  image_global: flag(false),
  image_size_aux: withDefault(size(2 ** 14), 320),
  image_aspect_ratio: orNull(text),
  tokenizer_model_max_length: withDefault(size(2 ** 26), 2048),
  tokenizer_padding_side: withDefault(z.enum(['left', 'right']), 'right'),
})

/**
 * Validates the `config.json` of an MGM checkpoint and fills in the defaults of transformers' config of its family.
 * @throws MgmError `CHECKPOINT_UNSUPPORTED` for another model type, biases, quantized weights or an unknown rope
 *   scaling; `CHECKPOINT_INVALID` for a value of the wrong type or out of range.
 */
export function parseMgmConfig(json: unknown, file: string): MgmConfig {
  const modelType = z.looseObject({ model_type: text }).safeParse(json).data?.model_type
  const defaults = FAMILIES.get(modelType ?? '')
  if (modelType !== undefined && defaults === undefined) {
    throw unsupported(
      `expected one of ${[...FAMILIES.keys()].join(', ')} for "model_type" in ${file} but received ${describe(modelType)}`,
    )
  }
  const raw = parseWith(mgmSchema, json, file)
  const base = defaults!
  if (raw.attention_bias || raw.mlp_bias)
    throw unsupported(`expected no attention_bias or mlp_bias in ${file} but they are set`)
  if (raw.quantization_config !== undefined && raw.quantization_config !== null) {
    throw unsupported(
      `expected unquantized weights in ${file} but it has a quantization_config; use the original checkpoint`,
    )
  }
  const hidden = raw.hidden_size ?? base.hidden_size
  const heads = raw.num_attention_heads ?? base.num_attention_heads
  const kvHeads = raw.num_key_value_heads ?? base.num_key_value_heads ?? heads
  if (heads % kvHeads !== 0)
    throw invalidValue(file, `a divisor of num_attention_heads (${heads})`, '"num_key_value_heads"', kvHeads)
  const headDim = raw.head_dim ?? base.head_dim ?? hidden / heads
  if (!Number.isInteger(headDim))
    throw invalidValue(file, `a multiple of num_attention_heads (${heads})`, '"hidden_size"', hidden)
  if (headDim % 2 !== 0 || headDim > 1024)
    throw invalidValue(file, 'an even number up to 1024', '"head_dim"', headDim)
  if (!/^(linear|mlp\d{1,2}x_gelu|identity)$/.test(raw.mm_projector_type)) {
    throw unsupported(
      `expected linear, mlp<n>x_gelu or identity for "mm_projector_type" in ${file} but received ${describe(raw.mm_projector_type)}`,
    )
  }
  const mixture = base.family === 'mixtral'
  if (mixture && raw.num_experts_per_tok > raw.num_local_experts) {
    throw invalidValue(
      file,
      `at most num_local_experts (${raw.num_local_experts})`,
      '"num_experts_per_tok"',
      raw.num_experts_per_tok,
    )
  }
  return {
    family: base.family,
    model_type: raw.model_type,
    vocab_size: raw.vocab_size ?? base.vocab_size,
    hidden_size: hidden,
    intermediate_size: raw.intermediate_size ?? base.intermediate_size,
    num_hidden_layers: raw.num_hidden_layers ?? base.num_hidden_layers,
    num_attention_heads: heads,
    num_key_value_heads: kvHeads,
    head_dim: headDim,
    hidden_act: raw.hidden_act ?? base.hidden_act,
    rms_norm_eps: raw.rms_norm_eps ?? base.rms_norm_eps,
    rope_theta: raw.rope_theta ?? raw.rope_parameters?.rope_theta ?? base.rope_theta,
    rope_scaling: ropeScaling(raw.rope_scaling ?? raw.rope_parameters, file),
    max_position_embeddings: raw.max_position_embeddings ?? base.max_position_embeddings,
    tie_word_embeddings: raw.tie_word_embeddings ?? base.tie_word_embeddings,
    sliding_window: raw.sliding_window === undefined ? base.sliding_window : raw.sliding_window,
    ...(mixture
      ? { num_local_experts: raw.num_local_experts, num_experts_per_tok: raw.num_experts_per_tok }
      : {}),
    bos_token_id: raw.bos_token_id === undefined ? base.bos_token_id : raw.bos_token_id,
    eos_token_id: raw.eos_token_id === undefined ? base.eos_token_id : raw.eos_token_id,
    pad_token_id: raw.pad_token_id === undefined ? base.pad_token_id : raw.pad_token_id,
    torch_dtype: raw.torch_dtype ?? raw.dtype ?? null,
    mm_vision_tower: raw.mm_vision_tower,
    mm_vision_tower_aux: raw.mm_vision_tower_aux,
    mm_hidden_size: raw.mm_hidden_size,
    mm_hidden_size_aux: raw.mm_hidden_size_aux,
    mm_projector_type: raw.mm_projector_type,
    mm_vision_select_layer: raw.mm_vision_select_layer,
    mm_vision_select_feature: raw.mm_vision_select_feature,
    mm_use_im_start_end: raw.mm_use_im_start_end,
    mm_use_im_patch_token: raw.mm_use_im_patch_token,
    optimize_vision_tower: raw.optimize_vision_tower,
    optimize_vision_tower_aux: raw.optimize_vision_tower_aux,
    image_grid: raw.image_grid,
    image_global: raw.image_global,
    image_size_aux: raw.image_size_aux,
    image_aspect_ratio: raw.image_aspect_ratio,
    tokenizer_model_max_length: raw.tokenizer_model_max_length,
    tokenizer_padding_side: raw.tokenizer_padding_side,
  }
}

function ropeScaling(
  value: Record<string, unknown> | null | undefined,
  file: string,
): MgmConfig['rope_scaling'] {
  if (value === null || value === undefined) return null
  const type = value.rope_type ?? value.type ?? 'default'
  if (type === 'default') return null
  if (type !== 'linear')
    throw unsupported(`expected linear or no rope scaling in ${file} but received ${describe(type)}`)
  const factor = value.factor
  if (typeof factor !== 'number' || !(factor >= 1 && factor <= 1024)) {
    throw invalidValue(file, 'a number from 1 to 1024', '"rope_scaling.factor"', factor)
  }
  return { type, factor }
}

const clipSchema = z.object({
  hidden_size: withDefault(size(2 ** 15), 768),
  intermediate_size: withDefault(size(2 ** 17), 3072),
  num_hidden_layers: withDefault(size(256), 12),
  num_attention_heads: withDefault(size(256), 12),
  num_channels: withDefault(size(4), 3),
  image_size: withDefault(size(2 ** 13), 224),
  patch_size: withDefault(size(2 ** 10), 32),
  hidden_act: withDefault(act, 'quick_gelu'),
  layer_norm_eps: withDefault(z.number().positive().max(1), 1e-5),
})

/**
 * Validates the `config.json` of a CLIP checkpoint: a whole CLIP's, whose `vision_config` is taken, or a bare
 * CLIPVisionConfig. Defaults are transformers' CLIPVisionConfig's.
 */
export function parseClipConfig(json: unknown, file: string): ClipConfig {
  const outer = parseWith(
    z.looseObject({
      model_type: optional(text),
      vision_config: optional(z.looseObject({})),
      // Early files repeat the vision config under this name, and transformers lets it win.
      vision_config_dict: optional(z.looseObject({})),
    }),
    json,
    file,
  )
  const type = outer.model_type
  if (type !== null && type !== undefined && type !== 'clip' && type !== 'clip_vision_model') {
    throw unsupported(
      `expected clip or clip_vision_model for "model_type" in ${file} but received ${describe(type)}`,
    )
  }
  const nested = outer.vision_config || outer.vision_config_dict || type === 'clip'
  const config = parseWith(
    clipSchema,
    nested ? { ...outer.vision_config, ...outer.vision_config_dict } : outer,
    file,
  )
  if (config.hidden_size % config.num_attention_heads !== 0) {
    throw invalidValue(
      file,
      `a divisor of hidden_size (${config.hidden_size})`,
      '"num_attention_heads"',
      config.num_attention_heads,
    )
  }
  if (config.patch_size > config.image_size) {
    throw invalidValue(file, `at most image_size (${config.image_size})`, '"patch_size"', config.patch_size)
  }
  return config
}

const pixels = size(2 ** 14)
const triple = (min: number) => z.tuple([z.number().min(min), z.number().min(min), z.number().min(min)])
const rectangle = z.object({ height: pixels, width: pixels })
const preprocessorSchema = z.object({
  image_mean: withDefault(triple(-1e3), [0.48145466, 0.4578275, 0.40821073]),
  image_std: withDefault(triple(1e-6), [0.26862954, 0.26130258, 0.27577711]),
  size: withDefault(z.union([pixels, z.object({ shortest_edge: pixels }), rectangle]), 224),
  crop_size: withDefault(z.union([pixels, rectangle]), 224),
  resample: withDefault(int(0, 5), 3),
  rescale_factor: withDefault(positive, 1 / 255),
  do_resize: flag(true),
  do_center_crop: flag(true),
  do_rescale: flag(true),
  do_normalize: flag(true),
  do_convert_rgb: flag(true),
})

/** Validates `preprocessor_config.json`; sizes may be numbers or objects. Defaults are CLIPImageProcessor's. */
export function parsePreprocessorConfig(json: unknown, file: string): PreprocessorConfig {
  const { size, crop_size, ...rest } = parseWith(preprocessorSchema, json, file)
  return {
    ...rest,
    size: typeof size === 'number' ? { shortest_edge: size } : size,
    crop_size: typeof crop_size === 'number' ? { height: crop_size, width: crop_size } : crop_size,
  }
}

const openClipSchema = z.object({
  model_cfg: optional(
    z.object({
      vision_cfg: optional(
        z.object({
          timm_model_name: optional(text),
          image_size: optional(z.union([pixels, z.array(pixels).min(1)])),
        }),
      ),
    }),
  ),
})

/** Validates `open_clip_config.json`. Widths and depths are not in it: see `convNextGeometry`. */
export function parseOpenClipConfig(json: unknown, file: string): OpenClipConfig {
  const vision = parseWith(openClipSchema, json, file).model_cfg?.vision_cfg
  const size = vision?.image_size
  return {
    timm_model_name: vision?.timm_model_name ?? null,
    image_size: (Array.isArray(size) ? size[0] : size) ?? null,
  }
}

const generationSchema = z.object({
  bos_token_id: orNull(tokenId),
  eos_token_id: orNull(tokenIds),
  pad_token_id: orNull(tokenId),
  do_sample: flag(false),
  temperature: orNull(z.number().min(0).max(1e3)),
  top_p: orNull(z.number().min(0).max(1)),
  top_k: orNull(int(0, 2 ** 31 - 1)),
  max_length: orNull(int(0, 2 ** 31 - 1)),
  max_new_tokens: orNull(int(0, 2 ** 31 - 1)),
})

/** Validates `generation_config.json`. */
export function parseGenerationConfig(json: unknown, file: string): GenerationConfig {
  return parseWith(generationSchema, json, file)
}
