import { existsSync, readdirSync, statSync } from 'node:fs'
import { join } from 'node:path'
import * as z from 'zod'
import { describe } from '../errors.ts'
import { invalid, invalidValue } from './errors.ts'
import { openSafetensors } from './safetensors.ts'
import { readJson, type TensorEntry } from './source.ts'
import { openTorchArchive } from './torch-archive.ts'

/** Names of the weights of a language model or CLIP, the preferred one first. */
export const TRANSFORMERS_STEMS = ['model.safetensors', 'pytorch_model.bin'] as const
/** Names of the weights of an OpenCLIP or timm model, the preferred one first. */
export const OPEN_CLIP_STEMS = [
  'open_clip_model.safetensors',
  'open_clip_pytorch_model.safetensors',
  'open_clip_pytorch_model.bin',
  ...TRANSFORMERS_STEMS,
] as const

export interface TensorFolder {
  readonly tensors: ReadonlyMap<string, TensorEntry>
  readonly files: readonly string[]
}

/** Reads the headers of one weight file, safetensors or PyTorch archive by its name. */
export function openTensorFile(file: string): ReadonlyMap<string, TensorEntry> {
  return (file.endsWith('.safetensors') ? openSafetensors(file) : openTorchArchive(file)).tensors
}

/**
 * Reads the headers of all weights of a folder: the first of `stems` for which there is an index (and its shards) or the
 * file itself.
 * @throws MgmError `CHECKPOINT_INVALID` if there are none, a shard is missing, or index and shards disagree.
 */
export function openTensorFolder(
  folder: string,
  stems: readonly string[] = TRANSFORMERS_STEMS,
): TensorFolder {
  for (const stem of stems) {
    const index = indexNames(stem)
      .map(name => join(folder, name))
      .find(existsSync)
    if (index) return openShards(folder, index)
    const file = join(folder, stem)
    if (existsSync(file)) return { tensors: openTensorFile(file), files: [file] }
  }
  throw invalid(`expected one of ${stems.join(', ')} in ${folder} but found ${listing(folder)}`)
}

/** Names of the index of `stem`. Hugging Face's libraries put a variant last: `model.safetensors.index.fp16.json`. */
export function indexNames(stem: string): string[] {
  const names = [`${stem}.index.json`]
  const variant = /^(\w+)\.(\w+)\.(safetensors|bin)$/.exec(stem)
  if (variant) names.push(`${variant[1]}.${variant[3]}.index.${variant[2]}.json`)
  return names
}

export function isFolder(path: string): boolean {
  return statSync(path, { throwIfNoEntry: false })?.isDirectory() ?? false
}

const indexSchema = z.looseObject({ weight_map: z.unknown() })

function openShards(folder: string, index: string): TensorFolder {
  const json = readJson(index, 64 * 2 ** 20)
  const map = indexSchema.safeParse(json).data?.weight_map
  if (typeof map !== 'object' || map === null || Array.isArray(map)) {
    throw invalidValue(index, 'an object', '"weight_map"', map)
  }
  const byShard = new Map<string, Set<string>>()
  for (const [name, shard] of Object.entries(map)) {
    // A name with a separator could lead out of the folder.
    if (typeof shard !== 'string' || !/^[\w][\w.-]*\.(safetensors|bin)$/.test(shard)) {
      throw invalidValue(index, 'the name of a .safetensors or .bin file', `tensor ${describe(name)}`, shard)
    }
    const names = byShard.get(shard) ?? new Set()
    byShard.set(shard, names.add(name))
  }
  const missing = [...byShard.keys()].filter(shard => !existsSync(join(folder, shard)))
  if (missing.length > 0) {
    throw invalid(
      `expected ${byShard.size} weight files in ${folder} but ${missing.length} of them are missing: ${missing.slice(0, 8).join(', ')}`,
    )
  }
  const tensors = new Map<string, TensorEntry>()
  const files: string[] = []
  for (const [shard, names] of byShard) {
    const file = join(folder, shard)
    const found = openTensorFile(file)
    for (const name of names) {
      const entry = found.get(name)
      if (entry === undefined)
        throw invalid(`expected tensor "${name}" in ${file}, as ${index} says, but found none`)
      tensors.set(name, entry)
    }
    for (const name of found.keys()) {
      if (!names.has(name))
        throw invalid(`expected no tensor "${name}" in ${file}: ${index} does not list it there`)
    }
    files.push(file)
  }
  return { tensors, files }
}

function listing(folder: string): string {
  if (!existsSync(folder)) return 'no such folder'
  if (!isFolder(folder)) return 'a file'
  const names = readdirSync(folder)
  return names.length > 0
    ? `only ${names.slice(0, 10).join(', ')}${names.length > 10 ? ', …' : ''}`
    : 'an empty folder'
}
