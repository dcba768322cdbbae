import type { ClipConfig } from '../checkpoint/config.ts'
import { type Activation, addLayerNorm, attention, layerNorm, linear } from '../ops.ts'
import type { Tensor } from '../tensor.ts'
import { activationOf, type Loader, under, type Weights } from './loader.ts'

/** What CLIP's two encoders have in common. */
export type ClipEncoderConfig = Pick<
  ClipConfig,
  'hidden_size' | 'intermediate_size' | 'num_attention_heads' | 'hidden_act' | 'layer_norm_eps'
>

export interface ClipEncoderOptions {
  /** Whether a token sees only itself and those before it. Default false. */
  causal?: boolean
}

/** One pre-norm encoder layer. Source: `CLIPEncoderLayer` of transformers. */
export class ClipEncoderLayer {
  private readonly w: Awaited<ReturnType<typeof loadLayer>>
  private readonly heads: number
  private readonly eps: number
  private readonly activation: Activation
  private readonly causal: boolean

  private constructor(
    w: Awaited<ReturnType<typeof loadLayer>>,
    config: ClipEncoderConfig,
    options: ClipEncoderOptions,
  ) {
    this.w = w
    this.heads = config.num_attention_heads
    this.eps = config.layer_norm_eps
    this.activation = activationOf(config.hidden_act)
    this.causal = options.causal ?? false
  }

  /** `weights` holds the names of the release: `self_attn.…`, `mlp.…`, `layer_norm1.…`, `layer_norm2.…`. */
  static async load(
    loader: Loader,
    weights: Weights,
    config: ClipEncoderConfig,
    options: ClipEncoderOptions = {},
  ): Promise<ClipEncoderLayer> {
    return new ClipEncoderLayer(await loadLayer(loader, weights, config), config, options)
  }

  /** x [T, C], plus `added` [T, C] if given, whose sequences end at cu i32 [B+1] → [T, C]. */
  forward(x: Tensor, cu: Tensor, added?: Tensor): Tensor {
    const { w, heads, eps, causal } = this
    const [tokens, channels] = x.shape as [number, number]

    // Attention.
    const { weight, bias } = w.layer_norm1
    const { normed, sum } = added
      ? addLayerNorm(x, added, weight, bias, { eps })
      : { normed: layerNorm(x, weight, bias, { eps }), sum: x }
    const qkv = linear(normed, w.qkv.weight, { bias: w.qkv.bias }).reshape(
      tokens,
      3 * heads,
      channels / heads,
    )
    const [q, k, v] = [0, 1, 2].map(i => qkv.narrow(1, i * heads, heads)) as [Tensor, Tensor, Tensor]
    const attended = attention(q, k, v, { cuQ: cu, causal }).reshape(tokens, channels)
    const h = linear(attended, w.out_proj.weight, { bias: w.out_proj.bias, residual: sum })

    // MLP.
    const inner = linear(layerNorm(h, w.layer_norm2.weight, w.layer_norm2.bias, { eps }), w.fc1.weight, {
      bias: w.fc1.bias,
      activation: this.activation,
    }) // [T, 4C]
    return linear(inner, w.fc2.weight, { bias: w.fc2.bias, residual: h })
  }
}

async function loadLayer(loader: Loader, weights: Weights, config: ClipEncoderConfig) {
  const { hidden_size: c, intermediate_size: inner } = config
  const dense = (name: string, out: number, input: number) => ({
    weight: loader.linear(weights.take(`${name}.weight`, [out, input])),
    bias: loader.f32(weights.take(`${name}.bias`, [out])),
  })
  const qkv = ['q_proj', 'k_proj', 'v_proj'].map(name => under(weights, `self_attn.${name}.`))
  const layer = {
    layer_norm1: loadNorm(loader, under(weights, 'layer_norm1.'), c),
    qkv: {
      weight: loader.linear(qkv.map(part => part.take('weight', [c, c]))),
      bias: await loader.concat(qkv.map(part => part.take('bias', [c]))),
    },
    out_proj: dense('self_attn.out_proj', c, c),
    layer_norm2: loadNorm(loader, under(weights, 'layer_norm2.'), c),
    fc1: dense('mlp.fc1', inner, c),
    fc2: dense('mlp.fc2', c, inner),
  }
  await loader.pause()
  return layer
}

export function loadNorm(loader: Loader, weights: Weights, channels: number) {
  return {
    weight: loader.f32(weights.take('weight', [channels])),
    bias: loader.f32(weights.take('bias', [channels])),
  }
}
