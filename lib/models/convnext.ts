import { cast, conv2d, depthwiseConvNorm, layerNorm, linear, permute } from '../ops.ts'
import { scope, type Tensor } from '../tensor.ts'
import { advance, type Loader, type Observe, under, type Weights } from './loader.ts'

/** Widths and block counts of the four stages, as the weights have them. */
export interface ConvNextConfig {
  dims: readonly number[]
  depths: readonly number[]
  /** Of every LayerNorm. */
  eps: number
}

/** timm gives `convnext_xxlarge` (first width 384) another epsilon than the smaller ones. */
export function convNextConfig(geometry: Pick<ConvNextConfig, 'dims' | 'depths'>): ConvNextConfig {
  return { dims: geometry.dims, depths: geometry.depths, eps: geometry.dims[0] === 384 ? 1e-5 : 1e-6 }
}

/** 7×7 depthwise convolution, norm, MLP, layer scale, residual. Source: `ConvNeXtBlock` of timm. */
export class ConvNextBlock {
  private readonly w: ReturnType<typeof loadBlock>
  private readonly eps: number

  private constructor(w: ReturnType<typeof loadBlock>, eps: number) {
    this.w = w
    this.eps = eps
  }

  static async load(loader: Loader, weights: Weights, channels: number, eps: number): Promise<ConvNextBlock> {
    const block = new ConvNextBlock(loadBlock(loader, weights, channels), eps)
    await loader.pause()
    return block
  }

  /** x [B, H, W, C] → [B, H, W, C]. */
  forward(x: Tensor): Tensor {
    const { w, eps } = this
    const channels = x.shape[3]!
    const normed = depthwiseConvNorm(x, w.conv_dw, {
      bias: w.conv_dw_bias,
      normWeight: w.norm_weight,
      normBias: w.norm_bias,
      eps,
    }).reshape(-1, channels)
    const inner = linear(normed, w.fc1, { bias: w.fc1_bias, activation: 'gelu' }) // [B·H·W, 4C]
    return linear(inner, w.fc2, {
      bias: w.fc2_bias,
      scale: w.gamma,
      residual: x.reshape(-1, channels),
    }).reshape(...x.shape)
  }
}

function loadBlock(loader: Loader, weights: Weights, c: number) {
  const depthwise = weights.take('conv_dw.weight', [c, 1, 7, 7])
  return {
    conv_dw: loader.build(() =>
      permute(cast(loader.tensor(depthwise), 'f32'), [2, 3, 0, 1]).reshape(7, 7, c),
    ),
    conv_dw_bias: loader.f32(weights.take('conv_dw.bias', [c])),
    norm_weight: loader.f32(weights.take('norm.weight', [c])),
    norm_bias: loader.f32(weights.take('norm.bias', [c])),
    fc1: loader.linear(weights.take('mlp.fc1.weight', [4 * c, c])),
    fc1_bias: loader.f32(weights.take('mlp.fc1.bias', [4 * c])),
    fc2: loader.linear(weights.take('mlp.fc2.weight', [c, 4 * c])),
    fc2_bias: loader.f32(weights.take('mlp.fc2.bias', [c])),
    gamma: loader.f32(weights.take('gamma', [c])),
  }
}

/** Convolution with stride = kernel (the last odd row or column is left out), before or after a LayerNorm over channels. */
export class ConvNextDownsample {
  private readonly w: ReturnType<typeof loadDownsample>
  private readonly kind: 'stem' | 'downsample'
  private readonly eps: number

  private constructor(w: ReturnType<typeof loadDownsample>, kind: 'stem' | 'downsample', eps: number) {
    this.w = w
    this.kind = kind
    this.eps = eps
  }

  /** `stem`: 4×4 convolution, then norm. */
  static stem(loader: Loader, weights: Weights, channels: number, eps: number): ConvNextDownsample {
    const w = loadDownsample(
      loader,
      under(weights, '0.'),
      under(weights, '1.'),
      [channels, 3, 4, 4],
      channels,
    )
    return new ConvNextDownsample(w, 'stem', eps)
  }

  /** `stages.N.downsample`: norm, then 2×2 convolution. */
  static between(
    loader: Loader,
    weights: Weights,
    from: number,
    to: number,
    eps: number,
  ): ConvNextDownsample {
    const w = loadDownsample(loader, under(weights, '1.'), under(weights, '0.'), [to, from, 2, 2], from)
    return new ConvNextDownsample(w, 'downsample', eps)
  }

  /** x [B, H, W, C] → [B, ⌊H/k⌋, ⌊W/k⌋, C']. */
  forward(x: Tensor): Tensor {
    const { w, eps } = this
    if (this.kind === 'stem')
      return norm(conv2d(x, w.conv, { bias: w.bias, kernel: [4, 4], stride: 4 }), w, eps)
    return conv2d(norm(x, w, eps), w.conv, { bias: w.bias, kernel: [2, 2], stride: 2 })
  }
}

function loadDownsample(loader: Loader, conv: Weights, norm: Weights, shape: number[], normChannels: number) {
  return {
    conv: loader.conv(conv.take('weight', shape)),
    bias: loader.f32(conv.take('bias', [shape[0]!])),
    norm_weight: loader.f32(norm.take('weight', [normChannels])),
    norm_bias: loader.f32(norm.take('bias', [normChannels])),
  }
}

function norm(x: Tensor, w: { norm_weight: Tensor; norm_bias: Tensor }, eps: number): Tensor {
  const [b, h, width, c] = x.shape as [number, number, number, number]
  return layerNorm(x.reshape(-1, c), w.norm_weight, w.norm_bias, { eps }).reshape(b, h, width, c)
}

interface Stage {
  downsample: ConvNextDownsample
  blocks: ConvNextBlock[]
}

/**
 * The trunk of OpenCLIP's ConvNeXt, whose four stages feed patch info mining; its head is never used. Runs as in
 * evaluation: no stochastic depth. Source: `ConvNeXt` of timm, `OpenCLIPVisionTower` of MGM.
 */
export class ConvNext {
  readonly config: ConvNextConfig
  private readonly stages: readonly Stage[]

  private constructor(config: ConvNextConfig, stages: readonly Stage[]) {
    this.config = config
    this.stages = stages
  }

  /** `weights` holds timm's names: `stem.…`, `stages.N.…`. */
  static async load(loader: Loader, weights: Weights, config: ConvNextConfig): Promise<ConvNext> {
    const { dims, depths, eps } = config
    const stages: Stage[] = []
    for (const [s, channels] of dims.entries()) {
      const names = under(weights, `stages.${s}.`)
      const downsample =
        s === 0
          ? ConvNextDownsample.stem(loader, under(weights, 'stem.'), channels, eps)
          : ConvNextDownsample.between(loader, under(names, 'downsample.'), dims[s - 1]!, channels, eps)
      const blocks: ConvNextBlock[] = []
      for (let b = 0; b < depths[s]!; b++)
        blocks.push(await ConvNextBlock.load(loader, under(names, `blocks.${b}.`), channels, eps))
      stages.push({ downsample, blocks })
    }
    return new ConvNext(config, stages)
  }

  /** pixels [B, S, S, 3] f32, normalised → the four stage maps, [B, S/4, S/4, dims[0]] to [B, S/32, S/32, dims[3]]. */
  forward(pixels: Tensor, observe?: Observe): Tensor[] {
    return scope(() => {
      const maps: Tensor[] = []
      for (const { downsample, blocks } of this.stages) {
        let x = scope(() => downsample.forward(maps.at(-1) ?? pixels))
        for (const block of blocks) x = advance(x, x => block.forward(x))
        observe?.(`stage_${maps.length}`, x)
        maps.push(x)
      }
      return maps
    })
  }
}
