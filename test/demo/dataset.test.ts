import { mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import sharp from 'sharp'
import { afterEach, beforeEach, expect, it } from 'vitest'
import { type DatasetLine, makeDataset } from '../../lib/demo/dataset.ts'
import { renderScene } from '../../lib/demo/render.ts'
import { drillsOf, generateLesson } from '../../lib/demo/tasks.ts'
import { sceneSeed } from '../../lib/demo/world.ts'

let folder: string
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'mgm-dataset-'))
})
afterEach(async () => {
  await rm(folder, { recursive: true })
})

const options = { split: 'validation', first: 7, count: 5, shard: 2, pixels: 48, drawnPixels: 32 } as const
const linesOf = async (shard: string): Promise<DatasetLine[]> =>
  (await readFile(join(folder, `${shard}.jsonl`), 'utf8'))
    .trimEnd()
    .split('\n')
    .map(line => JSON.parse(line))

it.each(['raw', 'png'] as const)('writes %s pictures where the lines say', async format => {
  await makeDataset(folder, { ...options, format })
  expect((await readdir(folder)).sort()).toEqual([
    '00000.images',
    '00000.jsonl',
    '00001.images',
    '00001.jsonl',
    '00002.images',
    '00002.jsonl',
    'dataset.json',
  ])
  const lines = await linesOf('00001')
  const images = await readFile(join(folder, '00001.images'))
  expect(lines.length).toBe(2)
  for (const [i, line] of lines.entries()) {
    const seed = sceneSeed('validation', 7 + 2 + i)
    expect(line.seed).toBe(seed)
    const lesson = generateLesson(seed)
    expect({ scenes: line.scenes, examples: line.examples }).toEqual(lesson)
    expect(line.drills).toEqual(drillsOf(lesson, seed))
    for (const [k, { offset, bytes, pixels }] of line.images.entries()) {
      const part = images.subarray(offset, offset + bytes)
      const rgb = format === 'raw' ? part : await sharp(part).raw().toBuffer()
      expect(pixels).toBe(k < 2 ? 48 : 32)
      expect(rgb.equals(await renderScene(line.scenes[k]!, pixels))).toBe(true)
    }
  }
  expect(lines.at(-1)!.images.at(-1)!.offset + lines.at(-1)!.images.at(-1)!.bytes).toBe(images.length)
  expect((await linesOf('00002')).length).toBe(1)
})

it('goes on where it was stopped, and redoes a shard that was not finished', async () => {
  await makeDataset(folder, options)
  const whole = await readFile(join(folder, '00001.images'))
  const before = await stat(join(folder, '00000.images'))
  await rm(join(folder, '00001.jsonl'))
  await writeFile(join(folder, '00001.images'), 'half a shard')
  await makeDataset(folder, options)
  expect((await readFile(join(folder, '00001.images'))).equals(whole)).toBe(true)
  expect((await stat(join(folder, '00000.images'))).mtimeMs).toBe(before.mtimeMs)
})

it('refuses to go on with other options', async () => {
  await makeDataset(folder, options)
  await expect(makeDataset(folder, { ...options, pixels: 64 })).rejects.toThrow('started with other options')
})
