import { existsSync } from 'node:fs'
import { join } from 'node:path'
import type { ClipConfig, MgmConfig, MgmFamily } from './config.ts'
import {
  COMPONENTS,
  type Component,
  type ComponentConfig,
  checkWidths,
  openComponentWeights,
  readComponentConfig,
  readPipelineIndex,
  readSchedulerConfig,
  type SchedulerConfig,
  textIgnored,
} from './diffusers.ts'
import { OPEN_CLIP_STEMS, openTensorFolder } from './files.ts'
import { elementCount, type StoredDType, type TensorEntry } from './source.ts'
import { TensorMap } from './tensor-map.ts'
import {
  bringsConvNext,
  CONVNEXT_IGNORED,
  type ConvNextGeometry,
  clipIgnored,
  clipTensors,
  convNextGeometry,
  convNextTensors,
  findTower,
  languageIgnored,
  type OpenCheckpointOptions,
  PARTS,
  type Part,
  readClipFolder,
  readMgmConfig,
  splitTensors,
} from './weights.ts'

/** How weights may be held in memory. */
export type StorageDType = 'f32' | 'bf16' | 'f16' | 'int8' | 'int4'

/** Bits per weight of a matrix, block scales included. */
const MATRIX_BITS: Readonly<Record<StorageDType, number>> = { f32: 32, bf16: 16, f16: 16, int8: 8.5, int4: 5 }
/** Bits of everything that is not a matrix (norms, biases, convolutions), which is never quantized. */
const OTHER_BITS: Readonly<Record<StorageDType, number>> = { f32: 32, bf16: 16, f16: 16, int8: 16, int4: 16 }

export interface PartSummary {
  tensors: number
  parameters: number
  /** Bytes in the files. */
  bytes: number
  /** Number of tensors by dtype. */
  dtypes: Partial<Record<StoredDType, number>>
}

/** What `mgm info` shows of a checkpoint. Only tensors that the model uses are counted. */
export interface CheckpointSummary {
  folder: string
  family: MgmFamily
  config: MgmConfig
  /** Null if the CLIP folder is missing or unreadable. */
  clip: ClipConfig | null
  /** Null if the ConvNeXt weights are missing or unreadable. */
  convnext: ConvNextGeometry | null
  /** Embeddings a picture becomes; null without CLIP's geometry. */
  imageTokens: number | null
  /** Rows of the embedding table; null if it is missing. */
  embeddingRows: number | null
  parts: Record<Part, PartSummary>
  total: PartSummary
  /** Memory for the weights, in bytes: matrices at 32, 16, 16, 8.5 and 5 bits, the rest at 32 or 16. */
  bytesNeeded: Record<StorageDType, number>
  files: string[]
  /** What keeps the checkpoint from loading, in words; empty if nothing was found. */
  missing: string[]
}

/**
 * Summarises a checkpoint from its headers. Towers, shards or parts that are missing or damaged are listed in `missing`.
 * @throws MgmError only if `config.json` itself is missing, invalid or of another model type.
 */
export function inspectCheckpoint(folder: string, options: OpenCheckpointOptions = {}): CheckpointSummary {
  const config = readMgmConfig(folder)
  const missing: string[] = []
  const attempt = attempts(missing)
  const tower = (
    key: 'mm_vision_tower' | 'mm_vision_tower_aux',
    override: string | undefined,
    needed: boolean,
  ) => {
    const { path, tried } = findTower(folder, config[key], override)
    if (path === undefined && needed)
      missing.push(`no folder for ${key} at ${tried.join(', ') || 'any place: config.json names none'}`)
    return path
  }
  const empty: ReadonlyMap<string, TensorEntry> = new Map()

  const own = splitTensors(attempt(() => openTensorFolder(folder))?.tensors ?? empty, config)
  const clipPath = tower('mm_vision_tower', options.visionTower, true)
  const clipConfig = clipPath === undefined ? undefined : attempt(() => readClipFolder(clipPath).config)
  const clipOwn = clipPath === undefined ? undefined : attempt(() => openTensorFolder(clipPath).tensors)
  const auxPath = tower('mm_vision_tower_aux', options.visionTowerAux, !bringsConvNext(own))
  const auxOwn =
    auxPath === undefined ? undefined : attempt(() => openTensorFolder(auxPath, OPEN_CLIP_STEMS).tensors)

  const convnextMap = new TensorMap(auxPath ?? folder, convNextTensors(auxOwn ?? empty, own))
  const convnext = convnextMap.size > 0 ? attempt(() => convNextGeometry(convnextMap)) : undefined
  const clipSkip = clipConfig
    ? (attempt(() => clipIgnored(clipConfig, config.mm_vision_select_layer)) ?? [])
    : []
  const used: Record<Part, TensorEntry[]> = {
    language: without([...own.language.values()], languageIgnored(config)),
    clip: without([...clipTensors(clipOwn ?? empty, own).values()], clipSkip),
    convnext: without(convnextMap.entries(), CONVNEXT_IGNORED),
    mining: [...own.mining.values()],
    projector: [...own.projector.values()],
  }
  for (const part of ['language', 'mining', 'projector'] as const) {
    const none = used[part].length === 0
    if (none && !(part === 'projector' && config.mm_projector_type === 'identity')) {
      missing.push(`no ${part} tensors in ${folder}`)
    }
  }

  const all = PARTS.flatMap(part => used[part])
  const rows = own.language.get('model.embed_tokens.weight')?.shape[0]
  return {
    folder,
    family: config.family,
    config,
    clip: clipConfig ?? null,
    convnext: convnext ?? null,
    imageTokens: clipConfig ? imageTokens(config, clipConfig) : null,
    embeddingRows: rows ?? null,
    parts: Object.fromEntries(PARTS.map(part => [part, summarize(used[part])])) as Record<Part, PartSummary>,
    total: summarize(all),
    bytesNeeded: {
      f32: bytesNeeded(all, 'f32'),
      bf16: bytesNeeded(all, 'bf16'),
      f16: bytesNeeded(all, 'f16'),
      int8: bytesNeeded(all, 'int8'),
      int4: bytesNeeded(all, 'int4'),
    },
    files: [...new Set(all.map(entry => entry.file))],
    missing,
  }
}

/** What `mgm info` shows of an SDXL pipeline. Only tensors that image generation uses are counted. */
export interface DiffusionSummary {
  folder: string
  /** Class of the pipeline that wrote it. */
  pipeline: string
  /** Null, as the configs below, if it is missing, invalid or of a kind that is not run. */
  scheduler: SchedulerConfig | null
  configs: { [C in Component]: ComponentConfig<C> | null }
  parts: Record<Component, PartSummary>
  total: PartSummary
  /** Memory for the weights, in bytes. */
  bytesNeeded: Record<'f32' | 'bf16' | 'f16', number>
  files: string[]
  /** What keeps the pipeline from loading, in words; empty if nothing was found. */
  missing: string[]
}

/**
 * Summarises an SDXL pipeline from its headers. Components that are missing or damaged are listed in `missing`.
 * @throws MgmError only if `model_index.json` itself is missing, invalid or of another pipeline.
 */
export function inspectDiffusion(folder: string): DiffusionSummary {
  const index = readPipelineIndex(folder)
  const missing: string[] = []
  const attempt = attempts(missing)
  const names = Object.keys(COMPONENTS) as Component[]
  const each = <T>(of: (name: Component) => T) =>
    Object.fromEntries(names.map(name => [name, of(name)])) as Record<Component, T>

  const configs = each(
    name => attempt(() => readComponentConfig(folder, name)) ?? null,
  ) as DiffusionSummary['configs']
  const { text_encoder: first, text_encoder_2: second, unet, vae } = configs
  if (first && second && unet && vae) attempt(() => checkWidths(folder, first, second, unet, vae))
  const scheduler = attempt(() => readSchedulerConfig(folder, index)) ?? null
  for (const name of ['tokenizer', 'tokenizer_2']) {
    const has = (file: string) => existsSync(join(folder, name, file))
    if (!(has('vocab.json') && has('merges.txt')) && !has('tokenizer.json'))
      missing.push(`no vocab.json and merges.txt, nor tokenizer.json, in ${join(folder, name)}`)
  }

  const files: string[] = []
  const used = each(name => {
    const found = attempt(() => openComponentWeights(folder, name))
    files.push(...(found?.files ?? []))
    const ignored = name === 'text_encoder' && first ? textIgnored({ config: first, projection: false }) : []
    return without(found?.weights.entries() ?? [], ignored)
  })
  const all = names.flatMap(name => used[name])
  return {
    folder,
    pipeline: index.pipeline,
    scheduler,
    configs,
    parts: each(name => summarize(used[name])),
    total: summarize(all),
    bytesNeeded: {
      f32: bytesNeeded(all, 'f32'),
      bf16: bytesNeeded(all, 'bf16'),
      f16: bytesNeeded(all, 'f16'),
    },
    files,
    missing,
  }
}

/** Runs an action; what it throws is noted in `missing`. */
function attempts(missing: string[]) {
  return <T>(action: () => T): T | undefined => {
    try {
      return action()
    } catch (error) {
      missing.push((error as Error).message)
      return undefined
    }
  }
}

function without(entries: TensorEntry[], ignored: readonly RegExp[]): TensorEntry[] {
  return entries.filter(entry => !ignored.some(pattern => pattern.test(entry.name)))
}

function summarize(entries: readonly TensorEntry[]): PartSummary {
  const summary: PartSummary = { tensors: entries.length, parameters: 0, bytes: 0, dtypes: {} }
  for (const entry of entries) {
    summary.parameters += elementCount(entry.shape) ?? 0
    summary.bytes += entry.byteLength
    summary.dtypes[entry.dtype] = (summary.dtypes[entry.dtype] ?? 0) + 1
  }
  return summary
}

function bytesNeeded(entries: readonly TensorEntry[], dtype: StorageDType): number {
  let bits = 0
  for (const entry of entries) {
    bits += (elementCount(entry.shape) ?? 0) * (entry.shape.length === 2 ? MATRIX_BITS : OTHER_BITS)[dtype]
  }
  return Math.ceil(bits / 8)
}

/** Patches of one view, times the crops and the global view of an HD model. */
function imageTokens(config: MgmConfig, clip: ClipConfig): number {
  const patches =
    Math.floor(clip.image_size / clip.patch_size) ** 2 +
    (config.mm_vision_select_feature === 'cls_patch' ? 1 : 0)
  return patches * (config.image_grid > 1 ? config.image_grid ** 2 + (config.image_global ? 1 : 0) : 1)
}
