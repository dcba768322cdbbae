import { expected } from '../errors.ts'
import {
  type ActivationType,
  layerNorm,
  linear,
  packLinear,
  patchMining,
  permute,
  scaleColumns,
} from '../ops.ts'
import { scope, type Tensor } from '../tensor.ts'
import { type Loader, stackRows, under, type Weights } from './loader.ts'

/** torch's default, which the reference's LayerNorms keep. */
const EPS = 1e-5
/**
 * Keys are stored this much smaller, and scores scaled back, so that g stays finite where the reference's scores overflow.
 * In f16, which has no room for it, scores overflow earlier than the f32 that g is in.
 */
const keyScale = (storage: ActivationType) => (storage === 'f16' ? 1 : 2 ** -64)

/**
 * Patch info mining: each low-resolution token attends to the high-resolution positions of its own window (MGM paper,
 * section 3.2; `unified_resampler` of MGM, names `vlm_uni_*`).
 *
 * With one query for a window both projections move to the query side, so that keys and values are never formed:
 *
 *     Q = W_q LN(q) + b_q          g = Q (W_k diag γ_k)        z = Σ_p a(p) (x(p) − μ(p)) r(p),  a = softmax of g·x
 *     out = (W_v diag γ_v) z + (W_v β_v + b_v)
 *
 * What β_k and b_k add to a score is the same for all positions of a window. Softmax ignores it, but it decides the sign of a
 * score that overflows, so it travels as one more column of g.
 */
export class PatchMining {
  /** Channels of the query and of the result. */
  readonly channels: number
  /** Channels of the four maps together. */
  readonly mapChannels: number
  private readonly w: Awaited<ReturnType<typeof loadWeights>>

  private constructor(channels: number, mapChannels: number, w: Awaited<ReturnType<typeof loadWeights>>) {
    this.channels = channels
    this.mapChannels = mapChannels
    this.w = w
  }

  static async load(
    loader: Loader,
    weights: Weights,
    channels: number,
    mapChannels: number,
  ): Promise<PatchMining> {
    const w = await loadWeights(loader, weights, channels, mapChannels)
    await loader.pause()
    return new PatchMining(channels, mapChannels, w)
  }

  /**
   * query [B·grid², C], row-major over a grid × grid; stages are the four maps [B, H_s, W_s, c_s] → the mined features
   * [B·grid², C], plus `residual` if given. `downscale` n mines the maps bilinearly scaled by 1/n.
   */
  forward(
    query: Tensor,
    stages: readonly Tensor[],
    options: { grid: number; downscale?: number; residual?: Tensor },
  ): Tensor {
    const { grid, downscale = 1, residual } = options
    const side = Math.floor(stages[0]!.shape[1]! / downscale)
    if (side < grid || side % grid !== 0)
      throw expected(`a multiple of the ${grid} × ${grid} queries`, 'the side of the map to mine', side)
    return scope(() => {
      const { w } = this
      const normed = layerNorm(query, w.query_norm.weight, w.query_norm.bias, { eps: EPS })
      const q = linear(normed, w.query, { bias: w.query_bias }) // [B·grid², C]
      const g = linear(q, w.key, { out: 'f32' }) // [B·grid², ΣC_s + 1]
      const z = patchMining(g, stages, {
        grid,
        downscale,
        scale: 1 / Math.sqrt(this.channels) / w.key_scale,
        eps: EPS,
      })
      return linear(z, w.value, { bias: w.value_bias, residual }) // [B·grid², C]
    })
  }
}

async function loadWeights(loader: Loader, weights: Weights, c: number, mapC: number) {
  const part = (name: string, input: number) => {
    const [norm, dense] = [under(weights, `${name}.0.`), under(weights, `${name}.1.`)]
    return {
      gamma: norm.take('weight', [input]),
      beta: norm.take('bias', [input]),
      weight: dense.take('weight', [c, input]),
      bias: dense.take('bias', [c]),
    }
  }
  const query = part('vlm_uni_query_projector', c)
  const aux = part('vlm_uni_aux_projector', mapC)
  const val = part('vlm_uni_val_projector', mapC)
  // Products with γ need more bits than the factors have: what is stored beside f32 activations stays f32.
  const storage = loader.activations
  const scale = keyScale(storage)
  const packed = (matrix: () => Tensor) => loader.build(() => packLinear(matrix(), { dtype: storage }))

  /** W β + b [1, C] */
  const constant = ({ beta, weight, bias }: typeof aux, f32: (entry: typeof beta) => Tensor) =>
    linear(f32(beta).reshape(1, mapC), packLinear(f32(weight), { dtype: 'f32' }), { bias: f32(bias) })
  const key = await loader.fold((f32, host) => {
    const small = (n: number) => host.tensor(new Float32Array(n).fill(scale), [n])
    const gamma = scaleColumns(f32(aux.gamma).reshape(1, mapC), small(mapC)).reshape(mapC)
    const matrix = permute(scaleColumns(f32(aux.weight), gamma), [1, 0])
    return stackRows(host, [matrix, scaleColumns(constant(aux, f32), small(c))])
  })
  const value = await loader.fold(f32 => scaleColumns(f32(val.weight), f32(val.gamma)))
  const valueBias = await loader.fold(f32 => constant(val, f32).reshape(c))
  return {
    query_norm: { weight: loader.f32(query.gamma), bias: loader.f32(query.beta) },
    query: loader.linear(query.weight),
    query_bias: loader.f32(query.bias),
    /** [(W_k diag γ_k)ᵀ; (W_k β_k + b_k)ᵀ] · key_scale, packed [ΣC_s + 1, C]. */
    key: packed(key),
    key_scale: scale,
    /** W_v diag γ_v, packed [C, ΣC_s]. */
    value: packed(value),
    /** W_v β_v + b_v. */
    value_bias: loader.build(valueBias),
  }
}
