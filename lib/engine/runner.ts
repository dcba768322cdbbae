import type { Device } from '../device.ts'
import type { DecoderBatch, KvCache } from '../models/decoder.ts'
import { spliceEmbeddings } from '../ops.ts'
import type { Tensor } from '../tensor.ts'
import { DecodeGraphs } from './decode-graph.ts'
import { type Drawn, readSampled, type SampledTensors, type Sampling, sampleRows } from './sampler.ts'
import type { StepItem } from './scheduler.ts'
import type { Sequence } from './sequence.ts'

/** What the runner needs of a model. */
export interface RunnerModel {
  readonly hiddenSize: number
  /** ids i32 [T] → [T, hidden]. */
  embed(ids: Tensor): Tensor
  /** Logits f32 [R, V] of the wanted rows. */
  forward(batch: DecoderBatch, cache: KvCache): Tensor
}

/** A sequence with what computing it takes. */
export interface RunnableSequence extends Sequence {
  /** f32 [promptLength, hidden]. */
  readonly embeds: Tensor
  readonly sampling: Sampling
}

/** Builds the tensors of a step and runs it: prefill chunks and decodes side by side in one forward pass. */
export class ModelRunner {
  readonly #device: Device
  readonly #model: RunnerModel
  readonly #cache: KvCache
  readonly #graphs: DecodeGraphs | undefined

  /** `maxContext` given: decode steps are recorded and replayed, for sequences up to that length. */
  constructor(device: Device, model: RunnerModel, cache: KvCache, maxContext?: number) {
    this.#device = device
    this.#model = model
    this.#cache = cache
    if (maxContext !== undefined) this.#graphs = new DecodeGraphs(device, model, cache, maxContext)
  }

  /** Computes the items; resolves to the id drawn for each, undefined for those that draw none. */
  async run(items: readonly StepItem<RunnableSequence>[]): Promise<(Drawn | undefined)[]> {
    const drawing = items.filter(item => item.samples).map(item => item.sequence)
    if (this.#graphs && DecodeGraphs.covers(items)) return readSampled(this.#graphs.run(items), drawing)
    const sampled = this.#device.scope(() => this.#enqueue(items, drawing))
    if (!sampled) {
      await this.#device.synchronize()
      return items.map(() => undefined)
    }
    try {
      const drawn = await readSampled(sampled, drawing)
      let next = 0
      return items.map(item => (item.samples ? drawn[next++] : undefined))
    } finally {
      sampled.ids.dispose()
      sampled.logprobs.dispose()
      sampled.topIds?.dispose()
    }
  }

  dispose(): void {
    this.#graphs?.dispose()
  }

  #enqueue(
    items: readonly StepItem<RunnableSequence>[],
    drawing: readonly RunnableSequence[],
  ): SampledTensors | undefined {
    const { pageSize } = this.#cache
    const total = items.reduce((sum, item) => sum + item.count, 0)
    const positions = new Int32Array(total)
    const slots = new Int32Array(total)
    const cuQ = new Int32Array(items.length + 1)
    const contextLens = new Int32Array(items.length)
    const logitRows: number[] = []
    const maxBlocks = Math.max(...items.map(({ start, count }) => Math.ceil((start + count) / pageSize)))
    const blockTable = new Int32Array(items.length * maxBlocks)

    let row = 0
    items.forEach(({ sequence, start, count, samples }, b) => {
      const end = start + count
      for (let position = start; position < end; position++, row++) {
        positions[row] = position
        slots[row] = sequence.pages[Math.floor(position / pageSize)]! * pageSize + (position % pageSize)
      }
      blockTable.set(sequence.pages.slice(0, Math.ceil(end / pageSize)), b * maxBlocks)
      contextLens[b] = end
      cuQ[b + 1] = row
      if (samples) logitRows.push(row - 1)
    })

    const i32 = (data: Int32Array, shape: number[]) => this.#device.tensor(data, shape)
    const logits = this.#model.forward(
      {
        embeds: this.#embeds(items, total),
        positions: i32(positions, [total]),
        slots: i32(slots, [total]),
        blockTable: i32(blockTable, [items.length, maxBlocks]),
        cuQ: i32(cuQ, [items.length + 1]),
        contextLens: i32(contextLens, [items.length]),
        // None where only chunks of prompts run: the head is then skipped.
        logitRows: i32(Int32Array.from(logitRows), [logitRows.length]),
      },
      this.#cache,
    )
    return drawing.length > 0 ? sampleRows(this.#device, logits, drawing) : undefined
  }

  /** [total, hidden]: rows of the prompts' embeddings, and embeddings of the generated ids. */
  #embeds(items: readonly StepItem<RunnableSequence>[], total: number): Tensor {
    const parts: Tensor[] = []
    const ids: number[] = []
    const index = new Int32Array(total)
    let row = 0
    let promptRows = 0
    for (const { sequence, start, count } of items) {
      const { promptLength, tokens } = sequence
      const end = start + count
      const fromPrompt = Math.max(0, Math.min(end, promptLength) - start)
      if (fromPrompt > 0) parts.push(sequence.embeds.narrow(0, start, fromPrompt))
      for (let i = 0; i < fromPrompt; i++) index[row++] = -1 - promptRows++
      for (let position = start + fromPrompt; position < end; position++) {
        index[row++] = ids.length
        ids.push(tokens[position - promptLength]!)
      }
    }
    const prompts = parts.length > 0 ? this.#concat(parts) : undefined
    if (ids.length === 0) return prompts!
    const generated = this.#model.embed(this.#device.tensor(Int32Array.from(ids), [ids.length]))
    return prompts ? spliceEmbeddings(generated, prompts, this.#device.tensor(index, [total])) : generated
  }

  /** The parts one below the other, joined pairwise so that no row is copied more than log₂ times. */
  #concat(parts: Tensor[]): Tensor {
    if (parts.length === 1) return parts[0]!
    const half = parts.length >> 1
    const top = this.#concat(parts.slice(0, half))
    const bottom = this.#concat(parts.slice(half))
    const [a, b] = [top.shape[0]!, bottom.shape[0]!]
    const index = Int32Array.from({ length: a + b }, (_, i) => (i < a ? i : a - 1 - i))
    return spliceEmbeddings(top, bottom, this.#device.tensor(index, [a + b]))
  }
}
