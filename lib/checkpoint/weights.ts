import { existsSync } from 'node:fs'
import { basename, dirname, isAbsolute, join, resolve } from 'node:path'
import {
  type ClipConfig,
  type GenerationConfig,
  type MgmConfig,
  type OpenClipConfig,
  type PreprocessorConfig,
  parseClipConfig,
  parseGenerationConfig,
  parseMgmConfig,
  parseOpenClipConfig,
  parsePreprocessorConfig,
} from './config.ts'
import { invalid } from './errors.ts'
import { isFolder, OPEN_CLIP_STEMS, openTensorFolder, type TensorFolder } from './files.ts'
import { readJson, type TensorEntry } from './source.ts'
import { convNextGeometry, TensorMap } from './tensor-map.ts'

export { openTensorFile, openTensorFolder } from './files.ts'
export {
  type ConvNextGeometry,
  convNextGeometry,
  type Permuted,
  permutation,
  TensorMap,
  type WeightDType,
  type WeightEntry,
} from './tensor-map.ts'

export interface OpenCheckpointOptions {
  /** Folder of the CLIP tower, instead of the config's `mm_vision_tower`. */
  visionTower?: string
  /** Folder of the OpenCLIP ConvNeXt tower, instead of the config's `mm_vision_tower_aux`. */
  visionTowerAux?: string
}

/** Everything a model is built from, found and checked; no tensor data has been read. */
export interface Checkpoint {
  readonly folder: string
  readonly config: MgmConfig
  readonly generation: GenerationConfig
  readonly clipConfig: ClipConfig
  readonly preprocessor: PreprocessorConfig
  /** Null where the folder has none, or the checkpoint brings its own ConvNeXt and there is no folder. */
  readonly openClip: OpenClipConfig | null
  /** `model.embed_tokens.weight`, `model.layers.*`, `model.norm.weight`, `lm_head.weight`. */
  readonly language: TensorMap
  /** `vision_model.*`. */
  readonly clip: TensorMap
  /** `stem.*` and `stages.*`. */
  readonly convnext: TensorMap
  /** `vlm_uni_{query,aux,val}_projector.{0,1}.*`. */
  readonly mining: TensorMap
  /** `mm_projector.*`. */
  readonly projector: TensorMap
  /** Weight files that tensors above lie in. */
  readonly files: readonly string[]
  /** Bytes of the tensors above in their files. */
  readonly totalBytes: number
}

export const PARTS = ['language', 'clip', 'convnext', 'mining', 'projector'] as const
export type Part = (typeof PARTS)[number]

const CLIP_PREFIX = 'model.vision_tower.vision_tower.'
const AUX_PREFIX = 'model.vision_tower_aux.vision_'
/** Of a whole OpenCLIP only the trunk is used; a timm file holds the trunk alone. */
const TRUNK_PREFIX = 'visual.trunk.'

/** Leftovers of an OpenCLIP file: its text side, projection, and what the trunk has after its stages. */
export const CONVNEXT_IGNORED: readonly RegExp[] = [
  /^visual\.(trunk\.)?(head|norm_pre)\b/,
  /^(head|norm_pre)\./,
  /^(text|transformer|token_embedding|ln_final)\./,
  /^(positional_embedding|text_projection|logit_scale|logit_bias|attn_mask)\b/,
]

/** How many encoder layers are needed for `hidden_states[selectLayer]`, of which entry 0 comes before the first layer. */
export function clipLayersUsed(config: ClipConfig, selectLayer: number): number {
  const used = selectLayer < 0 ? config.num_hidden_layers + 1 + selectLayer : selectLayer
  if (used < 0 || used > config.num_hidden_layers) {
    throw invalid(
      `expected a layer of a CLIP tower with ${config.num_hidden_layers} for "mm_vision_select_layer" but received ${selectLayer}`,
    )
  }
  return used
}

/** Leftovers of a CLIP file: its text side, buffers, the norm after the last layer, and layers past the selected one. */
export function clipIgnored(config: ClipConfig, selectLayer: number): RegExp[] {
  const patterns = [
    /^(text_model|text_projection|visual_projection)\b/,
    /^logit_scale$/,
    /^vision_model\.embeddings\.position_ids$/,
    /^vision_model\.post_layernorm\./,
  ]
  for (let layer = clipLayersUsed(config, selectLayer); layer < config.num_hidden_layers; layer++) {
    patterns.push(new RegExp(`^vision_model\\.encoder\\.layers\\.${layer}\\.`))
  }
  return patterns
}

/** Leftovers of a language model: rotary buffers of early transformers, and a head that is the embedding table. */
export function languageIgnored(config: MgmConfig): RegExp[] {
  const patterns = [/\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$/]
  if (config.tie_word_embeddings) patterns.push(/^lm_head\.weight$/)
  return patterns
}

/** Where a tower was looked for, and the first place that is a folder. */
export interface TowerSearch {
  readonly path: string | undefined
  readonly tried: readonly string[]
}

/**
 * Looks for a vision tower's folder: `override` alone if given; else `name`, absolute, or relative to the checkpoint, its
 * parent and the working directory; last, a folder of the same last name in or beside the checkpoint.
 */
export function findTower(folder: string, name: string | null, override?: string): TowerSearch {
  const root = resolve(folder)
  const parent = dirname(root)
  const tried: string[] = []
  if (override !== undefined) tried.push(resolve(override))
  else if (name) {
    const bases = [root, parent, process.cwd()]
    tried.push(
      ...(isAbsolute(name) ? [name] : bases.map(base => join(base, name))),
      join(root, basename(name)),
      join(parent, basename(name)),
    )
  }
  const places = [...new Set(tried)]
  return { path: places.find(isFolder), tried: places }
}

/** The `config.json` of a checkpoint folder. */
export function readMgmConfig(folder: string): MgmConfig {
  if (!isFolder(folder)) throw invalid(`expected a checkpoint folder at ${folder} but found none`)
  const file = join(folder, 'config.json')
  return parseMgmConfig(readJson(file), file)
}

/** The `generation_config.json` of a checkpoint folder; all defaults if there is none. */
export function readGenerationConfig(folder: string): GenerationConfig {
  const file = join(folder, 'generation_config.json')
  return parseGenerationConfig(existsSync(file) ? readJson(file) : {}, file)
}

export interface ClipFolder {
  readonly config: ClipConfig
  readonly preprocessor: PreprocessorConfig
}

/** The configs of a CLIP folder; without `preprocessor_config.json`, CLIP's own values at the tower's size. */
export function readClipFolder(folder: string): ClipFolder {
  const configFile = join(folder, 'config.json')
  const config = parseClipConfig(readJson(configFile), configFile)
  const file = join(folder, 'preprocessor_config.json')
  const json = existsSync(file) ? readJson(file) : { size: config.image_size, crop_size: config.image_size }
  return { config, preprocessor: parsePreprocessorConfig(json, file) }
}

/** A checkpoint's own tensors, sorted by what they belong to. */
export interface OwnTensors {
  readonly language: Map<string, TensorEntry>
  /** `vision_model.*`, tuned with the model. */
  readonly clip: Map<string, TensorEntry>
  /** `stem.*` and `stages.*`, tuned with the model; empty unless `optimize_vision_tower_aux`. */
  readonly convnext: Map<string, TensorEntry>
  readonly mining: Map<string, TensorEntry>
  readonly projector: Map<string, TensorEntry>
}

/** Sorts a checkpoint's tensors by their names. */
export function splitTensors(tensors: ReadonlyMap<string, TensorEntry>, config: MgmConfig): OwnTensors {
  const own: OwnTensors = {
    language: new Map(),
    clip: new Map(),
    convnext: new Map(),
    mining: new Map(),
    projector: new Map(),
  }
  const put = (map: Map<string, TensorEntry>, name: string, entry: TensorEntry) =>
    map.set(name, { ...entry, name })
  for (const [name, entry] of tensors) {
    if (name.startsWith(CLIP_PREFIX)) put(own.clip, name.slice(CLIP_PREFIX.length), entry)
    else if (name.startsWith(AUX_PREFIX)) {
      if (config.optimize_vision_tower_aux) put(own.convnext, name.slice(AUX_PREFIX.length), entry)
    } else if (name.startsWith('model.vlm_uni_')) put(own.mining, name.slice('model.'.length), entry)
    else if (name.startsWith('model.mm_projector.')) put(own.projector, name.slice('model.'.length), entry)
    else own.language.set(name, entry)
  }
  return own
}

/**
 * The tower's tensors: the folder's, with each module that the checkpoint brings replaced as a whole. Modules are the
 * reference's units of loading (`get_w` in mgm_arch.py): the CLIP tower, and ConvNeXt's stem and stages.
 */
export function overrideModules(
  folder: ReadonlyMap<string, TensorEntry>,
  own: ReadonlyMap<string, TensorEntry>,
  modules: readonly string[],
): Map<string, TensorEntry> {
  const result = new Map(folder)
  for (const module of modules) {
    const tuned = [...own].filter(([name]) => name.startsWith(module))
    if (tuned.length === 0) continue
    for (const name of result.keys()) if (name.startsWith(module)) result.delete(name)
    for (const [name, entry] of tuned) result.set(name, entry)
  }
  return result
}

/** The CLIP tower: folder and checkpoint merged. */
export function clipTensors(
  folder: ReadonlyMap<string, TensorEntry>,
  own: OwnTensors,
): Map<string, TensorEntry> {
  return overrideModules(folder, own.clip, ['vision_model.'])
}

/** The ConvNeXt trunk: folder (with OpenCLIP's prefix removed) and checkpoint merged. */
export function convNextTensors(
  folder: ReadonlyMap<string, TensorEntry>,
  own: OwnTensors,
): Map<string, TensorEntry> {
  const trunk = new Map<string, TensorEntry>()
  for (const [name, entry] of folder) {
    const short = name.startsWith(TRUNK_PREFIX) ? name.slice(TRUNK_PREFIX.length) : name
    const key = /^(stem|stages)\./.test(short) ? short : name
    trunk.set(key, { ...entry, name: key })
  }
  return overrideModules(trunk, own.convnext, ['stem.', 'stages.'])
}

/** Whether the checkpoint brings a whole ConvNeXt, so that its folder is not needed. */
export function bringsConvNext(own: OwnTensors): boolean {
  const names = [...own.convnext.keys()]
  return ['stem.', 'stages.'].every(module => names.some(name => name.startsWith(module)))
}

const NO_TENSORS: TensorFolder = { tensors: new Map(), files: [] }

/**
 * Finds and checks everything an MGM checkpoint consists of: configs, its own weights, and the two vision towers it
 * refers to. Only headers are read.
 * @throws MgmError `CHECKPOINT_INVALID` or `CHECKPOINT_UNSUPPORTED`, naming the file and what would fix it.
 */
export function openCheckpoint(folder: string, options: OpenCheckpointOptions = {}): Checkpoint {
  const config = readMgmConfig(folder)
  const own = openTensorFolder(folder)
  const parts = splitTensors(own.tensors, config)

  const clipPath = requireTower(
    folder,
    'mm_vision_tower',
    config.mm_vision_tower,
    options.visionTower,
    'visionTower',
  )
  const { config: clipConfig, preprocessor } = readClipFolder(clipPath)
  const clipFolder = openTensorFolder(clipPath)

  const auxSearch = findTower(folder, config.mm_vision_tower_aux, options.visionTowerAux)
  const auxPath =
    auxSearch.path === undefined && options.visionTowerAux === undefined && bringsConvNext(parts)
      ? undefined
      : requireTower(
          folder,
          'mm_vision_tower_aux',
          config.mm_vision_tower_aux,
          options.visionTowerAux,
          'visionTowerAux',
        )
  const auxFolder = auxPath === undefined ? NO_TENSORS : openTensorFolder(auxPath, OPEN_CLIP_STEMS)

  const maps = {
    language: new TensorMap(folder, parts.language),
    clip: new TensorMap(clipPath, clipTensors(clipFolder.tensors, parts)),
    convnext: new TensorMap(auxPath ?? folder, convNextTensors(auxFolder.tensors, parts)),
    mining: new TensorMap(folder, parts.mining),
    projector: new TensorMap(folder, parts.projector),
  }
  checkWidths(config, clipConfig, maps.convnext, folder)

  const files = new Set<string>()
  let totalBytes = 0
  for (const part of PARTS) {
    for (const entry of maps[part].entries()) files.add(entry.file)
    totalBytes += maps[part].byteLength
  }
  return {
    folder,
    config,
    generation: readGenerationConfig(folder),
    clipConfig,
    preprocessor,
    openClip: auxPath === undefined ? null : readOpenClipConfig(auxPath),
    ...maps,
    files: [...files],
    totalBytes,
  }
}

function requireTower(
  folder: string,
  key: string,
  name: string | null,
  override: string | undefined,
  option: string,
): string {
  const { path, tried } = findTower(folder, name, override)
  if (path !== undefined) return path
  if (tried.length === 0) {
    throw invalid(
      `expected a folder for "${key}" in ${join(folder, 'config.json')} but received null; give it as the option ${option}`,
    )
  }
  throw invalid(
    `expected the folder of ${key} ${JSON.stringify(override ?? name)} but found none at ${tried.join(', ')}; ` +
      `put it at one of these places or give it as the option ${option}`,
  )
}

function readOpenClipConfig(folder: string): OpenClipConfig | null {
  const file = join(folder, 'open_clip_config.json')
  return existsSync(file) ? parseOpenClipConfig(readJson(file), file) : null
}

/** The towers must be those the mining weights were trained with; a wrong folder shows here first. */
function checkWidths(config: MgmConfig, clip: ClipConfig, convnext: TensorMap, folder: string): void {
  const file = join(folder, 'config.json')
  if (clip.hidden_size !== config.mm_hidden_size) {
    throw invalid(
      `expected a CLIP tower of width ${config.mm_hidden_size} (mm_hidden_size in ${file}) but received ${clip.hidden_size}`,
    )
  }
  const { dims } = convNextGeometry(convnext)
  const width = dims.reduce((a, b) => a + b, 0)
  if (width !== config.mm_hidden_size_aux) {
    throw invalid(
      `expected ConvNeXt stages of ${config.mm_hidden_size_aux} channels in all (mm_hidden_size_aux in ${file}) in ` +
        `${convnext.label} but received ${dims.join(' + ')} = ${width}`,
    )
  }
}
