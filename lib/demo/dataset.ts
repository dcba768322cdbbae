import { mkdir, open, readFile, rename, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { isDeepStrictEqual } from 'node:util'
import { MgmError } from '../errors.ts'
import { renderPng, renderScene } from './render.ts'
import type { Scene } from './scene.ts'
import { drillsOf, type Example, generateLesson } from './tasks.ts'
import { type Split, sceneSeed } from './world.ts'

export interface DatasetOptions {
  readonly split: Split
  /** The index of the first lesson, and how many follow. */
  readonly first: number
  readonly count: number
  /** Side of the pictures that are looked at, and of those that are drawn. */
  readonly pixels: number
  readonly drawnPixels: number
  /** `raw`: bytes of RGB, row by row; `png`: files, about 5 % of the size. */
  readonly format: 'raw' | 'png'
  /** Lessons in a shard. */
  readonly shard: number
}

export const DATASET: DatasetOptions = {
  split: 'train',
  first: 0,
  count: 1000,
  pixels: 256,
  drawnPixels: 128,
  format: 'png',
  shard: 1000,
}

/** A line of a shard's `.jsonl`. */
export interface DatasetLine {
  readonly seed: number
  readonly scenes: readonly Scene[]
  /** Where each scene's picture lies in the shard's `.images`, and the length of its side. */
  readonly images: readonly { readonly offset: number; readonly bytes: number; readonly pixels: number }[]
  readonly examples: readonly Example[]
  /** `drillsOf` the lesson. */
  readonly drills: readonly Example[]
}

/**
 * Writes lessons as shards: `00000.images`, pictures one behind the other, and `00000.jsonl`, a `DatasetLine` a lesson.
 * A shard is there with its `.jsonl` or not at all, so that a run that was stopped goes on where it was when it is started
 * again. `dataset.json` holds the options; going on with others is refused.
 */
export async function makeDataset(
  folder: string,
  options: Partial<DatasetOptions> = {},
  onShard?: (shard: number, shards: number) => void,
): Promise<void> {
  const settings: DatasetOptions = { ...DATASET, ...options }
  await mkdir(folder, { recursive: true })
  await claim(join(folder, 'dataset.json'), settings)
  const shards = Math.ceil(settings.count / settings.shard)
  for (let shard = 0; shard < shards; shard++) {
    const path = join(folder, String(shard).padStart(5, '0'))
    if (!(await exists(`${path}.jsonl`))) await writeShard(path, settings, shard)
    onShard?.(shard + 1, shards)
  }
}

async function writeShard(path: string, settings: DatasetOptions, shard: number): Promise<void> {
  const { split, first, count, format, pixels, drawnPixels } = settings
  const render = format === 'raw' ? renderScene : renderPng
  const lines: string[] = []
  const file = await open(`${path}.images`, 'w')
  try {
    let offset = 0
    const end = Math.min((shard + 1) * settings.shard, count)
    for (let index = shard * settings.shard; index < end; index++) {
      const seed = sceneSeed(split, first + index)
      const lesson = generateLesson(seed)
      const { scenes, examples } = lesson
      const sides = [pixels, pixels, drawnPixels]
      const pictures = await Promise.all(scenes.map((scene, i) => render(scene, sides[i]!)))
      const images: DatasetLine['images'][number][] = []
      for (const [i, picture] of pictures.entries()) {
        await file.write(picture)
        images.push({ offset, bytes: picture.length, pixels: sides[i]! })
        offset += picture.length
      }
      const line: DatasetLine = { seed, scenes, images, examples, drills: drillsOf(lesson, seed) }
      lines.push(`${JSON.stringify(line)}\n`)
    }
  } finally {
    await file.close()
  }
  await writeFile(`${path}.jsonl.partial`, lines.join(''))
  await rename(`${path}.jsonl.partial`, `${path}.jsonl`)
}

async function claim(path: string, settings: DatasetOptions): Promise<void> {
  if (!(await exists(path))) return await writeFile(path, `${JSON.stringify(settings, null, 2)}\n`)
  if (!isDeepStrictEqual(JSON.parse(await readFile(path, 'utf8')), settings))
    throw new MgmError('INVALID_ARGUMENT', `${path} was started with other options: choose another folder`)
}

async function exists(path: string): Promise<boolean> {
  return await stat(path).then(
    () => true,
    (error: NodeJS.ErrnoException) => {
      if (error.code === 'ENOENT') return false
      throw error
    },
  )
}
