import type { ClipTextConfig } from '../checkpoint/diffusers.ts'
import { expected } from '../errors.ts'
import { cast, embedding, layerNorm, linear } from '../ops.ts'
import { scope, type Tensor } from '../tensor.ts'
import { ClipEncoderLayer, loadNorm } from './clip-encoder.ts'
import { advance, type Loader, type Observe, under, type Weights } from './loader.ts'

export interface ClipTextOptions {
  /** Whether it has the pooled output; without, nothing that comes after `penultimate` is loaded. */
  projection: boolean
}

export interface ClipTextStates {
  /** A [B·T, C] the input of the last layer, which no norm follows. */
  penultimate: Tensor
  /** A [B, P] the state at each prompt's end token, normed and projected. */
  pooled?: Tensor
}

/**
 * CLIP's text encoder as SDXL uses it. Padding is attended to like any other token. Source: `CLIPTextModel` and
 * `CLIPTextModelWithProjection` of transformers.
 */
export class ClipText {
  readonly config: ClipTextConfig
  private readonly loader: Loader
  private readonly w: Awaited<ReturnType<typeof loadWeights>>

  private constructor(loader: Loader, config: ClipTextConfig, w: Awaited<ReturnType<typeof loadWeights>>) {
    this.loader = loader
    this.config = config
    this.w = w
  }

  /** `weights` holds the names of the release: `text_model.…` and, with projection, `text_projection.weight`. */
  static async load(
    loader: Loader,
    weights: Weights,
    config: ClipTextConfig,
    options: ClipTextOptions,
  ): Promise<ClipText> {
    return new ClipText(loader, config, await loadWeights(loader, weights, config, options))
  }

  /** ids [B·T], where T is `max_position_embeddings`, each prompt with its start, end and padding. */
  forward(ids: Int32Array, observe?: Observe): ClipTextStates {
    const length = this.config.max_position_embeddings
    const batch = ids.length / length
    if (!Number.isInteger(batch) || batch === 0)
      throw expected(`a multiple of ${length} ids`, 'ids', `${ids.length} of them`)
    return scope(() => {
      const { w } = this
      const { device, activations: out } = this.loader
      const i32 = (values: Int32Array) => device.tensor(values, [values.length])
      const cu = i32(Int32Array.from({ length: batch + 1 }, (_, b) => b * length))

      const tokens = embedding(w.token_embedding, i32(ids), { out }) // [B·T, C]
      const positions = embedding(w.position_embedding, i32(ids.map((_, i) => i % length)), { out })
      let x = w.first.forward(tokens, cu, positions)
      observe?.('hidden_1', x)
      for (const [i, layer] of w.layers.entries()) {
        x = advance(x, x => layer.forward(x, cu))
        observe?.(`hidden_${i + 2}`, x)
      }
      if (!w.pooler) return { penultimate: x }

      const { last, norm, projection } = w.pooler
      const ends = embedding(last.forward(x, cu), i32(this.endRows(ids)), { out }) // [B, C]
      const normed = layerNorm(ends, norm.weight, norm.bias, { eps: this.config.layer_norm_eps })
      return { penultimate: x, pooled: linear(normed, projection) }
    })
  }

  /** Rows of the prompts' end tokens. */
  private endRows(ids: Int32Array): Int32Array {
    const { max_position_embeddings: length, eos_token_id: eos } = this.config
    return Int32Array.from({ length: ids.length / length }, (_, b) => {
      const prompt = ids.subarray(b * length, (b + 1) * length)
      // Configs of before the right id was written there say 2, and mean the largest.
      const end = prompt.indexOf(eos === LEGACY_EOS ? Math.max(...prompt) : eos)
      return b * length + Math.max(end, 0)
    })
  }
}

const LEGACY_EOS = 2

async function loadWeights(
  loader: Loader,
  weights: Weights,
  config: ClipTextConfig,
  { projection }: ClipTextOptions,
) {
  const { hidden_size: c, vocab_size, max_position_embeddings, num_hidden_layers: count } = config
  const model = under(weights, 'text_model.')
  const table = (name: string, rows: number) => {
    const entry = model.take(`embeddings.${name}.weight`, [rows, c])
    return loader.build(() => cast(loader.tensor(entry), loader.storage(entry)))
  }
  const layer = (i: number) =>
    ClipEncoderLayer.load(loader, under(model, `encoder.layers.${i}.`), config, { causal: true })

  const embeddings = {
    token_embedding: table('token_embedding', vocab_size),
    position_embedding: table('position_embedding', max_position_embeddings),
  }
  const first = await layer(0)
  const layers: ClipEncoderLayer[] = []
  for (let i = 1; i < count - 1; i++) layers.push(await layer(i))
  const pooler = projection
    ? {
        last: await layer(count - 1),
        norm: loadNorm(loader, under(model, 'final_layer_norm.'), c),
        projection: loader.linear(
          weights.take('text_projection.weight', [config.projection_dim, c], { permuted: true }),
        ),
      }
    : undefined
  return { ...embeddings, first, layers, pooler }
}
