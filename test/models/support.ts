import { join } from 'node:path'
import { TensorMap } from '../../lib/checkpoint/tensor-map.ts'
import { openTensorFile } from '../../lib/checkpoint/weights.ts'
import type { Device } from '../../lib/device.ts'
import type { Observe } from '../../lib/models/loader.ts'
import type { MgmModel } from '../../lib/models/mgm.ts'
import { cast } from '../../lib/ops.ts'
import { scope, type Tensor } from '../../lib/tensor.ts'
import { FIXTURES, type Golden, readSafetensors } from '../helpers/safetensors.ts'
import { floats } from '../ops/helpers.ts'

/** An operator case: its numbers, and its parameters as a checkpoint's weights. */
export function operatorCase(path: string): { golden: (name: string) => Golden; weights: TensorMap } {
  const file = join(FIXTURES, path)
  const numbers = readSafetensors(file)
  return {
    golden: name => {
      const tensor = numbers.get(name)
      if (!tensor) throw new Error(`${path} has no tensor ${name}`)
      return tensor
    },
    weights: new TensorMap(path, openTensorFile(file)),
  }
}

export function upload(device: Device, { data, shape }: Golden): Tensor {
  return device.tensor(data, shape)
}

/** Collects what a forward pass shows. */
export function recorder(): { observe: Observe; get: (name: string) => Promise<Float32Array> } {
  const reads = new Map<string, Promise<Float32Array>>()
  return {
    observe: (name, x) => void reads.set(name, floats(x)),
    get: name => {
      const read = reads.get(name)
      if (!read) throw new Error(`nothing was observed as ${name}, only ${[...reads.keys()]}`)
      return read
    },
  }
}

export function argmax(row: Float32Array): number {
  return row.reduce((best, value, i) => (value > row[best]! ? i : best), 0)
}

export interface Greedy {
  ids: number[]
  /** The logits that each id was taken from. */
  logits: Float32Array[]
}

/**
 * The plainest possible engine: all prompts (each [P, hidden] embeddings) step together, in prefill chunks of at most
 * `chunk` tokens, over pages handed out in a scattered order. With `forced`, those ids are fed instead of the most likely.
 */
export async function greedy(
  model: MgmModel,
  prompts: readonly Float32Array[],
  steps: number,
  {
    chunk = Infinity,
    pageSize = 16,
    forced,
  }: { chunk?: number; pageSize?: number; forced?: readonly (readonly number[])[] } = {},
): Promise<Greedy[]> {
  const { device, hiddenSize: hidden } = model
  const lengths = prompts.map(prompt => prompt.length / hidden)
  const blocks = Math.ceil((Math.max(...lengths) + steps) / pageSize)
  const pages = blocks * prompts.length
  // A permutation of all pages: 7 and the count are made coprime.
  const stride = [7, 11, 13, 17, 1].find(n => n === 1 || pages % n !== 0)!
  const table = Int32Array.from({ length: pages }, (_, i) => (i * stride + 3) % pages)
  const cache = model.newCache(pages, pageSize)
  const results: Greedy[] = prompts.map(() => ({ ids: [], logits: [] }))
  const done = prompts.map(() => 0)

  try {
    for (let finished = false; !finished; ) {
      // Each sequence gives its next prompt chunk, or its newest id.
      const news = prompts.map((_, s) =>
        done[s]! < lengths[s]! ? Math.min(chunk, lengths[s]! - done[s]!) : 1,
      )
      const total = news.reduce((a, b) => a + b, 0)
      const embeds = new Float32Array(total * hidden)
      const [positions, slots, cu]: number[][] = [[], [], [0]]
      for (const [s, count] of news.entries()) {
        const prompt = prompts[s]!.subarray(done[s]! * hidden, (done[s]! + count) * hidden)
        const row = cu!.at(-1)! * hidden
        if (prompt.length > 0) embeds.set(prompt, row)
        else {
          const last = results[s]!.ids.length - 1
          const id = device.tensor(Int32Array.of(forced?.[s]?.[last] ?? results[s]!.ids[last]!), [1])
          const embedded = model.embed(id)
          embeds.set(await floats(embedded), row)
          id.dispose()
          embedded.dispose()
        }
        for (let i = 0; i < count; i++) {
          const position = done[s]! + i
          positions!.push(position)
          slots!.push(table[s * blocks + Math.floor(position / pageSize)]! * pageSize + (position % pageSize))
        }
        cu!.push(cu!.at(-1)! + count)
        done[s]! += count
      }
      const i32 = (values: ArrayLike<number>, ...shape: number[]) =>
        device.tensor(Int32Array.from(values), shape.length > 0 ? shape : [values.length])
      const logits = scope(() =>
        model.forward(
          {
            embeds: cast(device.tensor(embeds, [total, hidden]), model.activations),
            positions: i32(positions!),
            slots: i32(slots!),
            blockTable: i32(table, prompts.length, blocks),
            cuQ: i32(cu!),
            contextLens: i32(done),
            logitRows: i32(cu!.slice(1).map(end => end - 1)),
          },
          cache,
        ),
      )
      const numbers = await logits.readF32()
      logits.dispose()
      for (const [s, result] of results.entries()) {
        if (done[s]! < lengths[s]! || result.ids.length >= steps) continue
        const row = numbers.slice(s * model.vocabSize, (s + 1) * model.vocabSize)
        result.logits.push(row)
        result.ids.push(argmax(row))
      }
      finished = results.every(result => result.ids.length >= steps)
    }
  } finally {
    cache.dispose()
  }
  return results
}
