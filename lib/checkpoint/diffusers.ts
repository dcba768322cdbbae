import { existsSync } from 'node:fs'
import { basename, join } from 'node:path'
import * as z from 'zod'
import { describe } from '../errors.ts'
import {
  type ClipTextConfig,
  parseClipTextConfig,
  parseSchedulerConfig,
  parseUnetConfig,
  parseVaeConfig,
  type SchedulerConfig,
  type UnetConfig,
  type VaeConfig,
} from './diffusers-config.ts'
import { invalid, invalidValue, unsupported } from './errors.ts'
import { isFolder, openTensorFolder, TRANSFORMERS_STEMS } from './files.ts'
import { flag, parseWith, text } from './schema.ts'
import { readJson, type TensorEntry } from './source.ts'
import { TensorMap } from './tensor-map.ts'

export {
  type ClipTextConfig,
  SAMPLERS,
  type Sampler,
  type SchedulerConfig,
  type UnetConfig,
  type VaeConfig,
} from './diffusers-config.ts'

export interface OpenDiffusionOptions {
  /**
   * Which of the weights to take where a folder has several: `fp16` for `model.fp16.safetensors`, null for
   * `model.safetensors`. A component without that variant gives its plain weights. Default: `fp16` where there is one.
   */
  variant?: string | null | undefined
}

export interface TextEncoderFiles {
  readonly config: ClipTextConfig
  /** `text_model.*`, and `text_projection.weight` of an encoder with projection. */
  readonly weights: TensorMap
  /** Whether it gives a pooled output. */
  readonly projection: boolean
  /** Folder of its tokenizer. */
  readonly tokenizer: string
}

/** Everything an SDXL pipeline is built from, found and checked; no tensor data has been read. */
export interface DiffusionCheckpoint {
  readonly folder: string
  readonly scheduler: SchedulerConfig
  readonly textEncoders: readonly [TextEncoderFiles, TextEncoderFiles]
  readonly unet: { readonly config: UnetConfig; readonly weights: TensorMap }
  /** `encoder.*`, `decoder.*`, `quant_conv.*` and `post_quant_conv.*`, by today's names. */
  readonly vae: { readonly config: VaeConfig; readonly weights: TensorMap }
  /** Whether no negative prompt means embeddings of zeros, instead of those of an empty prompt. */
  readonly forceZerosForEmptyPrompt: boolean
  /** Weight files. */
  readonly files: readonly string[]
  /** Bytes of all tensors in their files. */
  readonly totalBytes: number
}

/** Leftovers of a text encoder: a buffer, and without projection what comes after the penultimate hidden state. */
export function textIgnored({
  config,
  projection,
}: Pick<TextEncoderFiles, 'config' | 'projection'>): RegExp[] {
  const patterns = [/^text_model\.embeddings\.position_ids$/]
  if (!projection) {
    const last = config.num_hidden_layers - 1
    patterns.push(
      new RegExp(`^text_model\\.encoder\\.layers\\.${last}\\.`),
      /^text_model\.final_layer_norm\./,
    )
  }
  return patterns
}

/** Leftovers of a VAE: without `encoder`, that half. */
export function vaeIgnored({ encoder }: { encoder: boolean }): RegExp[] {
  return encoder ? [] : [/^(encoder|quant_conv)\./]
}

const PIPELINES = ['StableDiffusionXLPipeline', 'StableDiffusionXLImg2ImgPipeline']

const component = z.tuple([text.nullable(), text.nullable()]).nullish()
const indexSchema = z.object({
  _class_name: text,
  scheduler: component,
  text_encoder: component,
  text_encoder_2: component,
  tokenizer: component,
  tokenizer_2: component,
  unet: component,
  vae: component,
  force_zeros_for_empty_prompt: flag(true),
  requires_aesthetics_score: flag(false),
})

/** What `model_index.json` says; the classes of the other components are always the same. */
export interface PipelineIndex {
  /** Class of the pipeline. */
  readonly pipeline: string
  /** Class of the scheduler. */
  readonly scheduler: string
  readonly forceZerosForEmptyPrompt: boolean
}

/** The `model_index.json` of a pipeline folder, which must be SDXL's. */
export function readPipelineIndex(folder: string): PipelineIndex {
  if (!isFolder(folder)) throw invalid(`expected a pipeline folder at ${folder} but found none`)
  const file = join(folder, 'model_index.json')
  if (!existsSync(file))
    throw invalid(
      `expected an SDXL pipeline in the layout of diffusers at ${folder} but found no model_index.json there`,
    )
  const index = parseWith(indexSchema, readJson(file), file)
  if (!PIPELINES.includes(index._class_name)) {
    throw unsupported(
      `expected ${PIPELINES.join(' or ')} for "_class_name" in ${file} but received ${describe(index._class_name)}`,
    )
  }
  // The refiner: one text encoder, and an aesthetic score in the place of the target size.
  if (index.requires_aesthetics_score || !index.text_encoder?.[1]) {
    throw unsupported(`expected a base model in ${file} but received a refiner, which is not run`)
  }
  const classOf = (name: keyof typeof index & string, ...classes: string[]) => {
    const received = (index[name] as z.output<typeof component>)?.[1] ?? null
    if (received === null) throw invalidValue(file, 'a library and a class', `"${name}"`, index[name])
    if (classes.length > 0 && !classes.includes(received)) {
      throw unsupported(
        `expected ${classes.join(' or ')} for "${name}" in ${file} but received ${describe(received)}`,
      )
    }
    return received
  }
  classOf('text_encoder', 'CLIPTextModel')
  classOf('text_encoder_2', 'CLIPTextModelWithProjection')
  classOf('tokenizer', 'CLIPTokenizer', 'CLIPTokenizerFast')
  classOf('tokenizer_2', 'CLIPTokenizer', 'CLIPTokenizerFast')
  classOf('unet', 'UNet2DConditionModel')
  classOf('vae', 'AutoencoderKL')
  return {
    pipeline: index._class_name,
    scheduler: classOf('scheduler'),
    forceZerosForEmptyPrompt: index.force_zeros_for_empty_prompt,
  }
}

const DIFFUSERS_STEMS = ['diffusion_pytorch_model.safetensors', 'diffusion_pytorch_model.bin']

/** The components that hold weights, by the names of their folders. */
export const COMPONENTS = {
  text_encoder: { parse: parseClipTextConfig, stems: TRANSFORMERS_STEMS },
  text_encoder_2: { parse: parseClipTextConfig, stems: TRANSFORMERS_STEMS },
  unet: { parse: parseUnetConfig, stems: DIFFUSERS_STEMS },
  vae: { parse: parseVaeConfig, stems: DIFFUSERS_STEMS },
} as const
export type Component = keyof typeof COMPONENTS
export type ComponentConfig<C extends Component> = ReturnType<(typeof COMPONENTS)[C]['parse']>

/** The `config.json` of a component. */
export function readComponentConfig<C extends Component>(folder: string, name: C): ComponentConfig<C> {
  const file = join(folder, name, 'config.json')
  return COMPONENTS[name].parse(readJson(file), file) as ComponentConfig<C>
}

/** The headers of a component's weights. */
export function openComponentWeights(
  folder: string,
  name: Component,
  { variant }: OpenDiffusionOptions = {},
): { weights: TensorMap; files: readonly string[] } {
  const path = join(folder, name)
  const { tensors, files } = openTensorFolder(path, stemsOf(COMPONENTS[name].stems, variant))
  return { weights: new TensorMap(path, name === 'vae' ? vaeTensors(tensors) : tensors), files }
}

/** The `scheduler_config.json` of a pipeline folder, read as the class that `index` names. */
export function readSchedulerConfig(folder: string, index: PipelineIndex): SchedulerConfig {
  const file = join(folder, 'scheduler/scheduler_config.json')
  return parseSchedulerConfig(readJson(file), file, index.scheduler)
}

/**
 * Finds and checks everything an SDXL pipeline consists of, a folder as diffusers writes it. Only headers are read.
 * @throws MgmError `CHECKPOINT_INVALID` or `CHECKPOINT_UNSUPPORTED`, naming the file and what would fix it.
 */
export function openDiffusion(folder: string, options: OpenDiffusionOptions = {}): DiffusionCheckpoint {
  const index = readPipelineIndex(folder)
  const allFiles: string[] = []
  const open = <C extends Component>(name: C) => {
    const config = readComponentConfig(folder, name)
    const { weights, files } = openComponentWeights(folder, name, options)
    allFiles.push(...files)
    return { config, weights }
  }
  const textEncoders = [
    { ...open('text_encoder'), projection: false, tokenizer: join(folder, 'tokenizer') },
    { ...open('text_encoder_2'), projection: true, tokenizer: join(folder, 'tokenizer_2') },
  ] as const
  const unet = open('unet')
  const vae = open('vae')
  checkWidths(folder, textEncoders[0].config, textEncoders[1].config, unet.config, vae.config)
  const { variant } = options
  if (variant && !allFiles.some(file => basename(file).includes(`.${variant}.`)))
    throw invalid(`expected weights of the variant ${describe(variant)} in ${folder} but found none`)

  return {
    folder,
    scheduler: readSchedulerConfig(folder, index),
    textEncoders,
    unet,
    vae,
    forceZerosForEmptyPrompt: index.forceZerosForEmptyPrompt,
    files: allFiles,
    totalBytes: [...textEncoders, unet, vae].reduce((sum, part) => sum + part.weights.byteLength, 0),
  }
}

/** Safetensors before archives; of each, the variant before the plain file. */
function stemsOf(stems: readonly string[], variant: string | null = 'fp16'): string[] {
  return stems.flatMap(stem =>
    variant === null ? [stem] : [stem.replace(/\.(\w+)$/, `.${variant}.$1`), stem],
  )
}

/** Names of the VAE's attention before diffusers 0.18. */
const OLD_ATTENTION: Readonly<Record<string, string>> = {
  query: 'to_q',
  key: 'to_k',
  value: 'to_v',
  proj_attn: 'to_out.0',
}

/** The VAE's tensors by today's names, attention's 1×1 convolutions [O, C, 1, 1] as the matrices that they are. */
function vaeTensors(tensors: ReadonlyMap<string, TensorEntry>): Map<string, TensorEntry> {
  return new Map(
    [...tensors].map(([name, entry]) => {
      const match =
        /^(.*\.attentions\.\d+\.)(query|key|value|proj_attn|to_q|to_k|to_v|to_out\.0)(\.\w+)$/.exec(name)
      if (!match) return [name, entry]
      const [, attention, projection, parameter] = match as unknown as [string, string, string, string]
      const today = `${attention}${OLD_ATTENTION[projection] ?? projection}${parameter}`
      return [today, { ...asMatrix(entry), name: today }]
    }),
  )
}

function asMatrix(entry: TensorEntry): TensorEntry {
  const { shape, strides } = entry
  if (shape.length !== 4 || shape[2] !== 1 || shape[3] !== 1) return entry
  return { ...entry, shape: shape.slice(0, 2), ...(strides && { strides: strides.slice(0, 2) }) }
}

/** The parts must have been trained together; a component of another model shows here first. */
export function checkWidths(
  folder: string,
  first: ClipTextConfig,
  second: ClipTextConfig,
  unet: UnetConfig,
  vae: VaeConfig,
): void {
  const file = join(folder, 'unet/config.json')
  const expectEqual = (key: string, received: number, wanted: number, of: string) => {
    if (received !== wanted) throw invalidValue(file, `${wanted}, ${of},`, `"${key}"`, received)
  }
  if (unet.in_channels !== vae.latent_channels) {
    throw unsupported(
      `expected ${vae.latent_channels}, the VAE's latent_channels, for "in_channels" in ${file} but received ` +
        `${unet.in_channels}: models that take a mask or a picture besides are not run`,
    )
  }
  expectEqual('out_channels', unet.out_channels, vae.latent_channels, "the VAE's latent_channels")
  expectEqual(
    'cross_attention_dim',
    unet.cross_attention_dim,
    first.hidden_size + second.hidden_size,
    "the text encoders' hidden_size together",
  )
  expectEqual(
    'projection_class_embeddings_input_dim',
    unet.projection_class_embeddings_input_dim,
    second.projection_dim + 6 * unet.addition_time_embed_dim,
    "the second text encoder's projection_dim and six addition_time_embed_dim",
  )
}
