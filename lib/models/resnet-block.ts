import { conv2d, groupNorm, linear, packLinear } from '../ops.ts'
import { scope, type Tensor } from '../tensor.ts'
import { advance, type Loader, under, type Weights } from './loader.ts'

/** A 3×3 convolution that keeps the image's size. */
export const SAME = { kernel: [3, 3], pad: 1 } as const

export interface ResnetConfig {
  in: number
  /** Channels of the skip connection that is concatenated to the input. Default 0. */
  skip?: number
  out: number
  groups: number
  eps: number
}

/**
 * x ↦ shortcut(x) + conv(silu(norm(conv(silu(norm x)) + bias))), where x may be two images whose concatenation is never
 * built. Source: `ResnetBlock2D` of diffusers.
 */
export class ResnetBlock {
  private readonly w: ReturnType<typeof loadResnet>
  private readonly norm: { groups: number; eps: number; activation: 'silu' }

  /** Takes everything but `conv1.bias` and `time_emb_proj`, which `forward` is given the sum of. */
  constructor(loader: Loader, weights: Weights, config: ResnetConfig) {
    this.w = loadResnet(loader, weights, config)
    this.norm = { groups: config.groups, eps: config.eps, activation: 'silu' }
  }

  /** x [B, H, W, C], skip [B, H, W, C2]; bias f32 [O] or [B, O] of the first convolution → [B, H, W, O]. */
  forward(x: Tensor, bias: Tensor, skip?: Tensor): Tensor {
    const { w, norm } = this
    return scope(() => {
      let h = groupNorm(x, w.norm1.weight, w.norm1.bias, { ...norm, more: skip }) // [B, H, W, C + C2]
      h = advance(h, h => conv2d(h, w.conv1, { ...SAME, bias })) // [B, H, W, O]
      h = advance(h, h => groupNorm(h, w.norm2.weight, w.norm2.bias, norm))
      return conv2d(h, w.conv2.weight, { ...SAME, bias: w.conv2.bias, residual: this.shortcut(x, skip) })
    })
  }

  /** [B·H·W, O] */
  private shortcut(x: Tensor, skip?: Tensor): Tensor {
    const { conv_shortcut: w } = this.w
    const rows = x.reshape(-1, x.shape[3]!)
    if (!w) return rows
    const projected = linear(rows, w.input, { bias: w.bias })
    if (!skip || !w.skip) return projected
    const { skip: weight } = w
    return advance(projected, residual => linear(skip.reshape(-1, skip.shape[3]!), weight, { residual }))
  }
}

function loadResnet(loader: Loader, weights: Weights, { in: c, skip = 0, out }: ResnetConfig) {
  return {
    norm1: loadNorm(loader, under(weights, 'norm1.'), c + skip),
    conv1: loader.conv(weights.take('conv1.weight', [out, c + skip, 3, 3])),
    norm2: loadNorm(loader, under(weights, 'norm2.'), out),
    conv2: loadConv(loader, under(weights, 'conv2.'), out, out),
    conv_shortcut:
      c + skip === out ? undefined : loadShortcut(loader, under(weights, 'conv_shortcut.'), c, skip, out),
  }
}

/** The 1×1 convolution of a concatenation is two, of its parts. */
function loadShortcut(loader: Loader, weights: Weights, c: number, skip: number, out: number) {
  const entry = weights.take('weight', [out, c + skip, 1, 1])
  const columns = (first: number, count: number) =>
    loader.build(() =>
      packLinear(
        loader
          .tensor(entry)
          .reshape(out, c + skip)
          .narrow(1, first, count),
        { dtype: loader.storage(entry) },
      ),
    )
  return {
    input: columns(0, c),
    skip: skip > 0 ? columns(c, skip) : undefined,
    bias: loader.f32(weights.take('bias', [out])),
  }
}

/** Weight and bias of a norm over `channels`. */
export function loadNorm(loader: Loader, weights: Weights, channels: number) {
  return {
    weight: loader.f32(weights.take('weight', [channels])),
    bias: loader.f32(weights.take('bias', [channels])),
  }
}

/** A 3×3 convolution with bias. */
export function loadConv(loader: Loader, weights: Weights, input: number, out: number) {
  return {
    weight: loader.conv(weights.take('weight', [out, input, 3, 3])),
    bias: loader.f32(weights.take('bias', [out])),
  }
}

/** A linear layer with bias. */
export function loadLinear(loader: Loader, weights: Weights, input: number, out: number) {
  return {
    weight: loader.linear(weights.take('weight', [out, input])),
    bias: loader.f32(weights.take('bias', [out])),
  }
}
