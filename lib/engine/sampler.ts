import { getRandomValues } from 'node:crypto'
import type { Device } from '../device.ts'
import * as ops from '../ops.ts'
import type { Tensor } from '../tensor.ts'

/** How the next id is drawn. Penalties see the ids generated so far, as the reference's do. */
export interface Sampling {
  /** 0: the most likely id. */
  readonly temperature: number
  /** 0: off. */
  readonly topK: number
  /** 1: off. */
  readonly topP: number
  /** 0: off. */
  readonly minP: number
  /** 1: off. */
  readonly repetitionPenalty: number
  /** 0: off. */
  readonly presencePenalty: number
  /** 0: off. */
  readonly frequencyPenalty: number
  /** 64 bits. An id depends on the seed and on how many ids came before it, never on what it was batched with. */
  readonly seed: bigint
  /** How many of the most likely ids to report with each id; undefined: no log-probabilities at all. */
  readonly logprobs: number | undefined
}

export const greedy: Sampling = {
  temperature: 0,
  topK: 0,
  topP: 1,
  minP: 0,
  repetitionPenalty: 1,
  presencePenalty: 0,
  frequencyPenalty: 0,
  seed: 0n,
  logprobs: undefined,
}

export function randomSeed(): bigint {
  return getRandomValues(new BigUint64Array(1))[0]!
}

/** A row of the batch: how to draw, and what was drawn before. */
export interface SamplingRow {
  readonly sampling: Sampling
  readonly tokens: readonly number[]
}

/** An id with its log-probabilities: of itself, and of the most likely ones in descending order. */
export interface Drawn {
  /** -1: the logits held NaN, or nothing was allowed. */
  readonly id: number
  readonly logprob: number
  readonly top: readonly { readonly id: number; readonly logprob: number }[]
}

/** What `read` takes back from the device; to be disposed afterwards. */
export interface SampledTensors {
  ids: Tensor
  logprobs: Tensor
  topIds: Tensor | undefined
}

/** What `ops.sample` takes, on the host: options [rows, 6], state [rows, 5], history [rows, width]. */
export interface PackedSampling {
  options: Float32Array
  state: Int32Array
  history: Int32Array
  width: number
}

/** The rows' settings as `ops.sample` takes them; rows beyond them, up to `count`, are greedy. */
export function packSampling(rows: readonly SamplingRow[], count = rows.length): PackedSampling {
  const options = new Float32Array(count * 6)
  const state = new Int32Array(count * 5)
  const hasPenalty = rows.map(({ sampling }) => usesHistory(sampling))
  const width = Math.max(0, ...rows.map((row, r) => (hasPenalty[r] ? row.tokens.length : 0)))
  const history = new Int32Array(count * width)

  for (let r = 0; r < count; r++) {
    const { sampling, tokens } = rows[r] ?? { sampling: greedy, tokens: [] }
    options.set(
      [
        sampling.temperature,
        sampling.topP,
        sampling.minP,
        sampling.repetitionPenalty,
        sampling.presencePenalty,
        sampling.frequencyPenalty,
      ],
      r * 6,
    )
    const seed = BigInt.asUintN(64, sampling.seed)
    const historyLength = hasPenalty[r] ? tokens.length : 0
    state.set(
      [
        sampling.topK,
        Number(BigInt.asIntN(32, seed)),
        Number(BigInt.asIntN(32, seed >> 32n)),
        tokens.length,
        historyLength,
      ],
      r * 5,
    )
    if (historyLength > 0) history.set(tokens, r * width)
  }
  return { options, state, history, width }
}

/** Enqueues the draw of one id a row. logits f32 [rows, V]. */
export function sampleRows(device: Device, logits: Tensor, rows: readonly SamplingRow[]): SampledTensors {
  const { options, state, history, width } = packSampling(rows)
  return ops.sample(logits, {
    options: device.tensor(options, [rows.length, 6]),
    state: device.tensor(state, [rows.length, 5]),
    history: width > 0 ? device.tensor(history, [rows.length, width]) : undefined,
    topLogprobs: Math.min(logits.shape[1]!, Math.max(...rows.map(row => row.sampling.logprobs ?? 0))),
  })
}

/** Waits for the draws and reads them, one a row. */
export async function readSampled(sampled: SampledTensors, rows: readonly SamplingRow[]): Promise<Drawn[]> {
  const wanted = rows.some(({ sampling }) => sampling.logprobs !== undefined)
  const [ids, logprobs, topIds] = await Promise.all([
    sampled.ids.read(),
    wanted ? sampled.logprobs.read() : undefined,
    wanted ? sampled.topIds?.read() : undefined,
  ])
  const stride = sampled.logprobs.shape[1]!
  return rows.map(({ sampling }, r) => {
    const count = Math.min(sampling.logprobs ?? 0, stride - 1)
    return {
      id: ids[r]!,
      logprob: logprobs?.[r * stride] ?? Number.NaN,
      top: Array.from({ length: count }, (_, i) => ({
        id: topIds![r * (stride - 1) + i]!,
        logprob: logprobs![r * stride + 1 + i]!,
      })),
    }
  })
}

/** Whether the draw depends on the ids before it. */
export function usesHistory({ repetitionPenalty, presencePenalty, frequencyPenalty }: Sampling): boolean {
  return repetitionPenalty !== 1 || presencePenalty !== 0 || frequencyPenalty !== 0
}
