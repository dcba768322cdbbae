import type { Device, Graph } from '../device.ts'
import type { KvCache } from '../models/decoder.ts'
import { sample } from '../ops.ts'
import type { Tensor } from '../tensor.ts'
import type { RunnableSequence, RunnerModel } from './runner.ts'
import { packSampling, type SampledTensors, usesHistory } from './sampler.ts'
import type { StepItem } from './scheduler.ts'

interface Recorded {
  readonly ids: Tensor
  readonly positions: Tensor
  readonly slots: Tensor
  readonly blockTable: Tensor
  readonly cuQ: Tensor
  readonly contextLens: Tensor
  readonly options: Tensor
  readonly state: Tensor
  readonly inputs: readonly Tensor[]
  readonly graph: Graph<SampledTensors>
}

/**
 * Decode steps, one new token for each of some sequences, recorded once for every power of two of sequences and then
 * replayed: a step costs one launch instead of hundreds. Rows beyond the sequences are padding: they read no page, write
 * none, and nobody reads what is drawn for them. A sequence's ids are those of a step that was not recorded, bit for bit,
 * since no op's row depends on the others.
 */
export class DecodeGraphs {
  readonly #device: Device
  readonly #model: RunnerModel
  readonly #cache: KvCache
  readonly #maxBlocks: number
  readonly #recorded = new Map<number, Recorded>()

  /** `maxContext`: positions of the longest sequence there can be. */
  constructor(device: Device, model: RunnerModel, cache: KvCache, maxContext: number) {
    this.#device = device
    this.#model = model
    this.#cache = cache
    this.#maxBlocks = Math.ceil(maxContext / cache.pageSize)
  }

  /** Whether a step consists of nothing but decodes that need no more than ids. */
  static covers(items: readonly StepItem<RunnableSequence>[]): boolean {
    return items.every(
      ({ sequence: { sampling, promptLength }, start, count, samples }) =>
        samples &&
        count === 1 &&
        start >= promptLength &&
        sampling.logprobs === undefined &&
        !usesHistory(sampling),
    )
  }

  /** Enqueues the step; the results hold until the next one. Rows beyond the items' are padding. */
  run(items: readonly StepItem<RunnableSequence>[]): SampledTensors {
    const rows = 2 ** Math.ceil(Math.log2(items.length))
    let recorded = this.#recorded.get(rows)
    if (!recorded) {
      recorded = this.#record(rows)
      this.#recorded.set(rows, recorded)
    }
    const { pageSize } = this.#cache
    const ids = new Int32Array(rows).fill(-1)
    const positions = new Int32Array(rows)
    const slots = new Int32Array(rows).fill(-1)
    const contextLens = new Int32Array(rows)
    const blockTable = new Int32Array(rows * this.#maxBlocks)
    items.forEach(({ sequence, start }, row) => {
      ids[row] = sequence.tokens[start - sequence.promptLength]!
      positions[row] = start
      slots[row] = sequence.pages[Math.floor(start / pageSize)]! * pageSize + (start % pageSize)
      contextLens[row] = start + 1
      blockTable.set(sequence.pages.slice(0, Math.ceil((start + 1) / pageSize)), row * this.#maxBlocks)
    })
    const { options, state } = packSampling(
      items.map(item => item.sequence),
      rows,
    )
    recorded.ids.write(ids)
    recorded.positions.write(positions)
    recorded.slots.write(slots)
    // Rows behind the last sequence belong to none.
    recorded.cuQ.write(Int32Array.from({ length: rows + 1 }, (_, i) => Math.min(i, items.length)))
    recorded.contextLens.write(contextLens)
    recorded.blockTable.write(blockTable)
    recorded.options.write(options)
    recorded.state.write(state)
    recorded.graph.replay()
    return recorded.graph.outputs
  }

  #record(rows: number): Recorded {
    const device = this.#device
    const inputs: Tensor[] = []
    const i32 = (shape: number[], data?: Int32Array) => {
      const tensor = data ? device.tensor(data, shape) : device.zeros(shape, 'i32')
      inputs.push(tensor)
      return tensor
    }
    try {
      const ids = i32([rows])
      const positions = i32([rows])
      const slots = i32([rows])
      const blockTable = i32([rows, this.#maxBlocks])
      const contextLens = i32([rows])
      const state = i32([rows, 5])
      const options = device.zeros([rows, 6])
      inputs.push(options)
      const cuQ = i32([rows + 1])
      const logitRows = i32(
        [rows],
        Int32Array.from({ length: rows }, (_, i) => i),
      )
      const graph = device.capture(() => {
        const logits = this.#model.forward(
          { embeds: this.#model.embed(ids), positions, slots, blockTable, cuQ, contextLens, logitRows },
          this.#cache,
        )
        return sample(logits, { options, state })
      })
      return { ids, positions, slots, blockTable, cuQ, contextLens, options, state, inputs, graph }
    } catch (error) {
      for (const tensor of inputs) tensor.dispose()
      throw error
    }
  }

  dispose(): void {
    for (const { graph, inputs } of this.#recorded.values()) {
      graph.dispose()
      for (const tensor of [graph.outputs.ids, graph.outputs.logprobs, ...inputs]) tensor.dispose()
    }
    this.#recorded.clear()
  }
}
