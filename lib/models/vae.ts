import type { VaeConfig } from '../checkpoint/diffusers.ts'
import type { Device } from '../device.ts'
import { expected } from '../errors.ts'
import {
  type ActivationType,
  attention,
  type Conv2dOptions,
  cast,
  conv2d,
  groupNorm,
  linear,
  packLinear,
  permute,
  scaleColumns,
} from '../ops.ts'
import { scope, type Tensor } from '../tensor.ts'
import { advance, type Loader, type Observe, under, type Weights } from './loader.ts'
import { blendTiles, tilesAlong } from './tiles.ts'

/** Of every GroupNorm. */
const EPS = 1e-6
const SMALLEST_TILE = 8

/** What the layers of either half have in common. */
interface Build {
  readonly loader: Loader
  readonly groups: number
  /**
   * What norms read is stored times this: sums that f16 cannot hold. Norms undo it, with an epsilon to fit, and a power of
   * two changes no digit.
   */
  readonly gain: number
}

// The sums of SDXL's VAE pass f16's largest number, 65504; stable-diffusion.cpp gets by with 1/32 of them.
const F16_GAIN = 2 ** -8

/** GroupNorm, with SiLU unless an attention follows. */
class Norm {
  private readonly weight: Tensor
  private readonly bias: Tensor
  private readonly options: { groups: number; eps: number }

  constructor({ loader, groups, gain }: Build, weights: Weights, channels: number) {
    this.weight = loader.f32(weights.take('weight', [channels]))
    this.bias = loader.f32(weights.take('bias', [channels]))
    this.options = { groups, eps: EPS * gain ** 2 }
  }

  /** x [B, H, W, C] → [B, H, W, C]. */
  forward(x: Tensor, activation: 'none' | 'silu' = 'silu'): Tensor {
    return groupNorm(x, this.weight, this.bias, { ...this.options, activation })
  }
}

interface ConvGeometry {
  readonly from: number
  readonly to: number
  readonly kernel: number
  /** How many of the output channels are ever computed. Default: all. */
  readonly used?: number
  /** What its input and its output are stored times. Default 1. */
  readonly gains?: { readonly input?: number; readonly output?: number }
}

/** A square convolution that keeps height and width unless its options say otherwise. */
class Conv {
  private readonly weight: Tensor
  private readonly bias: Tensor
  private readonly scale: Tensor | undefined
  private readonly kernel: number

  constructor({ loader }: Build, weights: Weights, geometry: ConvGeometry) {
    const { from, to, kernel, used = to } = geometry
    const { input = 1, output = 1 } = geometry.gains ?? {}
    const weight = weights.take('weight', [to, from, kernel, kernel])
    const bias = weights.take('bias', [to])
    this.weight = loader.build(() => {
      const rows = permute(loader.tensor(weight), [0, 2, 3, 1]).reshape(to, -1)
      return packLinear(rows.narrow(0, 0, used), { dtype: loader.storage(weight) })
    })
    this.bias = loader.build(() => {
      const row = cast(loader.tensor(bias).narrow(0, 0, used), 'f32').reshape(1, used)
      return scaleColumns(row, constant(loader.device, used, input)).reshape(used)
    })
    this.scale = gainOf(loader, used, output / input)
    this.kernel = kernel
  }

  /** x [B, H, W, C] → [B, H, W, O]. */
  forward(x: Tensor, options: Omit<Conv2dOptions, 'kernel' | 'bias' | 'scale'> = {}): Tensor {
    const { weight, bias, scale, kernel } = this
    return conv2d(x, weight, { bias, scale, kernel: [kernel, kernel], pad: kernel >> 1, ...options })
  }
}

function constant(device: Device, length: number, value: number): Tensor {
  return device.tensor(new Float32Array(length).fill(value), [length])
}

/** The `scale` of an op whose results are to be stored times `gain`. */
function gainOf(loader: Loader, channels: number, gain: number): Tensor | undefined {
  return gain === 1 ? undefined : loader.build(() => constant(loader.device, channels, gain))
}

/** Two normed convolutions and the input, through a 1×1 convolution where widths differ. Source: `ResnetBlock2D` of diffusers. */
class ResnetBlock {
  private readonly norm1: Norm
  private readonly conv1: Conv
  private readonly norm2: Norm
  private readonly conv2: Conv
  private readonly shortcut: Conv | undefined

  private constructor(build: Build, weights: Weights, from: number, to: number) {
    const { gain } = build
    const gains = { output: gain }
    this.norm1 = new Norm(build, under(weights, 'norm1.'), from)
    this.conv1 = new Conv(build, under(weights, 'conv1.'), { from, to, kernel: 3, gains })
    this.norm2 = new Norm(build, under(weights, 'norm2.'), to)
    this.conv2 = new Conv(build, under(weights, 'conv2.'), { from: to, to, kernel: 3, gains })
    if (from !== to) {
      const gains = { input: gain, output: gain }
      this.shortcut = new Conv(build, under(weights, 'conv_shortcut.'), { from, to, kernel: 1, gains })
    }
  }

  static async load(build: Build, weights: Weights, from: number, to: number): Promise<ResnetBlock> {
    const block = new ResnetBlock(build, weights, from, to)
    await build.loader.pause()
    return block
  }

  /** x [B, H, W, from] → [B, H, W, to]. */
  forward(x: Tensor): Tensor {
    return scope(() => {
      let h = scope(() => this.conv1.forward(this.norm1.forward(x)))
      h = advance(h, h => this.norm2.forward(h))
      const residual = this.shortcut?.forward(x) ?? x
      return this.conv2.forward(h, { residual: residual.reshape(-1, residual.shape[3]!) })
    })
  }
}

/** Attention of one head over all pixels of an image. Source: `Attention` of diffusers, as `UNetMidBlock2D` makes it. */
class AttentionBlock {
  private readonly norm: Norm
  private readonly w: Awaited<ReturnType<typeof loadAttention>>
  private readonly loader: Loader

  private constructor(loader: Loader, norm: Norm, w: Awaited<ReturnType<typeof loadAttention>>) {
    this.loader = loader
    this.norm = norm
    this.w = w
  }

  static async load(build: Build, weights: Weights, channels: number): Promise<AttentionBlock> {
    const norm = new Norm(build, under(weights, 'group_norm.'), channels)
    return new AttentionBlock(build.loader, norm, await loadAttention(build, weights, channels))
  }

  /** x [B, H, W, C] → [B, H, W, C]. */
  forward(x: Tensor): Tensor {
    return scope(() => {
      const { w, norm } = this
      const [batch, height, width, channels] = x.shape as [number, number, number, number]
      const ends = Int32Array.from({ length: batch + 1 }, (_, b) => b * height * width)
      const cuQ = this.loader.device.tensor(ends, [batch + 1])

      const qkv = scope(() =>
        linear(norm.forward(x, 'none').reshape(-1, channels), w.qkv, { bias: w.qkv_bias }),
      ).reshape(-1, 3, channels)
      const [q, k, v] = [0, 1, 2].map(i => qkv.narrow(1, i, 1)) as [Tensor, Tensor, Tensor]
      const attended = attention(q, k, v, { cuQ }).reshape(-1, channels) // [B·H·W, C]
      return linear(attended, w.to_out, {
        bias: w.to_out_bias,
        scale: w.to_out_scale,
        residual: x.reshape(-1, channels),
      }).reshape(...x.shape)
    })
  }
}

async function loadAttention({ loader, gain }: Build, weights: Weights, c: number) {
  const qkv = ['to_q.', 'to_k.', 'to_v.'].map(name => under(weights, name))
  return {
    qkv: loader.linear(qkv.map(part => part.take('weight', [c, c]))),
    qkv_bias: await loader.concat(qkv.map(part => part.take('bias', [c]))),
    to_out: loader.linear(weights.take('to_out.0.weight', [c, c])),
    to_out_bias: loader.f32(weights.take('to_out.0.bias', [c])),
    to_out_scale: gainOf(loader, c, gain),
  }
}

type Layer = (x: Tensor) => Tensor

interface Block {
  /** As the checkpoint names it. */
  readonly name: string
  readonly layers: readonly Layer[]
}

/** Resnet, attention, resnet at the lowest resolution. Source: `UNetMidBlock2D` of diffusers. */
async function loadMidBlock(build: Build, weights: Weights, config: VaeConfig): Promise<Block> {
  const channels = config.block_out_channels.at(-1)!
  const names = under(weights, 'mid_block.')
  const resnet = (i: number) => ResnetBlock.load(build, under(names, `resnets.${i}.`), channels, channels)
  const [first, last] = [await resnet(0), await resnet(1)]
  const layers: Layer[] = [x => first.forward(x), x => last.forward(x)]
  if (config.mid_block_add_attention) {
    const attention = await AttentionBlock.load(build, under(names, 'attentions.0.'), channels)
    layers.splice(1, 0, x => attention.forward(x))
  }
  return { name: 'mid_block', layers }
}

/** `count` resnets, the first of which changes the width. */
async function loadResnets(
  build: Build,
  weights: Weights,
  { from, to, count }: { from: number; to: number; count: number },
): Promise<Layer[]> {
  const layers: Layer[] = []
  for (let i = 0; i < count; i++) {
    const names = under(weights, `resnets.${i}.`)
    const resnet = await ResnetBlock.load(build, names, i === 0 ? from : to, to)
    layers.push(x => resnet.forward(x))
  }
  return layers
}

/** Either half of the autoencoder: a convolution, blocks, and a normed convolution. */
class Coder {
  private readonly convIn: Conv
  private readonly blocks: readonly Block[]
  private readonly normOut: Norm
  private readonly convOut: Conv

  private constructor(convIn: Conv, blocks: readonly Block[], normOut: Norm, convOut: Conv) {
    this.convIn = convIn
    this.blocks = blocks
    this.normOut = normOut
    this.convOut = convOut
  }

  /** Source: `Decoder` of diffusers. */
  static async decoder(build: Build, weights: Weights, config: VaeConfig): Promise<Coder> {
    const { gain } = build
    const gains = { input: gain, output: gain }
    const widths = config.block_out_channels.toReversed()
    const [deepest, outermost] = [widths[0]!, widths.at(-1)!]
    const convIn = new Conv(build, under(weights, 'conv_in.'), {
      from: config.latent_channels,
      to: deepest,
      kernel: 3,
      gains: { output: gain },
    })
    const blocks = [await loadMidBlock(build, weights, config)]
    for (const [i, to] of widths.entries()) {
      const name = `up_blocks.${i}`
      const names = under(weights, `${name}.`)
      const from = widths[i - 1] ?? deepest
      const layers = await loadResnets(build, names, { from, to, count: config.layers_per_block + 1 })
      if (i < widths.length - 1) {
        const conv = new Conv(build, under(names, 'upsamplers.0.conv.'), { from: to, to, kernel: 3, gains })
        layers.push(x => conv.forward(x, { resize: [2 * x.shape[1]!, 2 * x.shape[2]!] }))
      }
      blocks.push({ name, layers })
    }
    const normOut = new Norm(build, under(weights, 'conv_norm_out.'), outermost)
    const convOut = new Conv(build, under(weights, 'conv_out.'), {
      from: outermost,
      to: config.out_channels,
      kernel: 3,
    })
    return new Coder(convIn, blocks, normOut, convOut)
  }

  /** Its output holds means, and log-variances only if a `quant_conv` follows that mixes them. Source: `Encoder` of diffusers. */
  static async encoder(build: Build, weights: Weights, config: VaeConfig): Promise<Coder> {
    const { gain } = build
    const gains = { input: gain, output: gain }
    const { block_out_channels: widths, latent_channels } = config
    const [outermost, deepest] = [widths[0]!, widths.at(-1)!]
    const convIn = new Conv(build, under(weights, 'conv_in.'), {
      from: config.in_channels,
      to: outermost,
      kernel: 3,
      gains: { output: gain },
    })
    const blocks: Block[] = []
    for (const [i, to] of widths.entries()) {
      const name = `down_blocks.${i}`
      const names = under(weights, `${name}.`)
      const from = widths[i - 1] ?? outermost
      const layers = await loadResnets(build, names, { from, to, count: config.layers_per_block })
      if (i < widths.length - 1) {
        const conv = new Conv(build, under(names, 'downsamplers.0.conv.'), { from: to, to, kernel: 3, gains })
        layers.push(x => conv.forward(x, { stride: 2, pad: [0, 1] }))
      }
      blocks.push({ name, layers })
    }
    blocks.push(await loadMidBlock(build, weights, config))
    const normOut = new Norm(build, under(weights, 'conv_norm_out.'), deepest)
    const convOut = new Conv(build, under(weights, 'conv_out.'), {
      from: deepest,
      to: 2 * latent_channels,
      kernel: 3,
      used: config.use_quant_conv ? 2 * latent_channels : latent_channels,
    })
    return new Coder(convIn, blocks, normOut, convOut)
  }

  /** x [B, H, W, C] → [B, H', W', C']. */
  forward(x: Tensor, observe?: Observe): Tensor {
    return scope(() => {
      let h = this.convIn.forward(x)
      for (const { name, layers } of this.blocks) {
        for (const layer of layers) h = advance(h, layer)
        observe?.(name, h)
      }
      h = advance(h, h => this.normOut.forward(h))
      return this.convOut.forward(h)
    })
  }
}

/**
 * The autoencoder between images and the latents that are denoised. `force_upcast` in its config says that f16 cannot hold its
 * activations as they are; with activations of f16 they are scaled then, which changes no result.
 * Source: `AutoencoderKL` of diffusers.
 */
export class Vae {
  readonly config: VaeConfig
  /** Pixels on a side of what one latent stands for. */
  readonly scale: number
  private readonly loader: Loader
  private readonly parts: Awaited<ReturnType<typeof loadParts>>

  private constructor(loader: Loader, config: VaeConfig, parts: Awaited<ReturnType<typeof loadParts>>) {
    this.loader = loader
    this.config = config
    this.scale = vaeScale(config)
    this.parts = parts
  }

  /** `weights` holds diffusers' names. Without `encoder`, `encoder.…` and `quant_conv.…` are not asked for. */
  static async load(
    loader: Loader,
    weights: Weights,
    config: VaeConfig,
    options: { encoder: boolean },
  ): Promise<Vae> {
    return new Vae(loader, config, await loadParts(loader, weights, config, options))
  }

  /**
   * latents A [B, h, w, 4], divided by the scaling factor → pixels [B, 8h, 8w, 3], about −1…1; of type A, or f32 where tiles
   * were blended. More than `tile`² latents are decoded in overlapping tiles of at most `tile` × `tile`, each normed by
   * itself: colours may differ a little from those of the whole. Default: the side of what the model was trained on.
   */
  decode(latents: Tensor, options: { tile?: number | undefined } = {}, observe?: Observe): Tensor {
    const { postQuantConv, decoder } = this.parts
    const [, height, width] = latents.shape as [number, number, number, number]
    const tile = tileFor(this.config, height, width, options.tile)
    const whole = (latents: Tensor) =>
      scope(() => decoder.forward(postQuantConv?.forward(latents) ?? latents, observe))
    if (!tile) return whole(latents)
    const channels = this.config.out_channels
    return blendTiles(this.loader.device, latents, { tile, from: 1, to: this.scale, channels }, whole)
  }

  /**
   * pixels A [B, 8h, 8w, 3] in −1…1 → the means of their latents A [B, h, w, 4], not scaled. In tiles as `decode`.
   * @throws MgmError `INVALID_ARGUMENT` if it was loaded without its encoder, or for another height or width.
   */
  encode(pixels: Tensor, options: { tile?: number | undefined } = {}, observe?: Observe): Tensor {
    const { encoder, quantConv } = this.parts
    if (!encoder) throw expected('one loaded with its encoder', 'encode', 'a Vae without')
    const { scale } = this
    const [height, width] = pixels.shape.slice(1, 3).map(n => n / scale) as [number, number]
    if (!Number.isInteger(height) || !Number.isInteger(width))
      throw expected(`a height and a width that ${scale} divides`, 'pixels', pixels.shape)
    const tile = tileFor(this.config, height, width, options.tile)
    const whole = (pixels: Tensor) =>
      scope(() => {
        const moments = encoder.forward(pixels, observe)
        return quantConv?.forward(moments) ?? moments
      })
    if (!tile) return whole(pixels)
    const channels = this.config.latent_channels
    return scope(() => {
      const means = blendTiles(this.loader.device, pixels, { tile, from: scale, to: 1, channels }, whole)
      return cast(means, pixels.dtype)
    })
  }

  /**
   * About the most bytes of activations that `decode` holds at a time, its result included; `encode` holds fewer. Height and
   * width in pixels.
   */
  static bytesAt(
    config: VaeConfig,
    activations: ActivationType,
    image: { height: number; width: number; batch?: number; tile?: number | undefined },
  ): number {
    const { height, width, batch = 1 } = image
    const scale = vaeScale(config)
    const [h, w] = [height / scale, width / scale]
    const tile = tileFor(config, h, w, image.tile)
    const latents = tile ? tilesAlong(h, tile)[0]!.length * tilesAlong(w, tile)[0]!.length : h * w
    const canvas = tile ? height * width * config.out_channels * 4 : 0

    // Channels held for a latent: input, queries, keys, values, result and sum of the attention; then for each resolution
    // input, norm and output of a resnet's first convolution, or input, norm, shortcut and output of its second.
    const widths = config.block_out_channels.toReversed()
    const held = widths.map((to, i) => {
      const from = widths[i - 1] ?? to
      return 4 ** i * (from === to ? 3 * to : Math.max(2 * from + to, from + 3 * to))
    })
    const channels = Math.max(6 * widths[0]!, ...held)
    const bytes = activations === 'f32' ? 4 : 2
    return batch * (latents * channels * bytes + canvas)
  }
}

/** Pixels on a side of what one latent stands for. */
export function vaeScale(config: VaeConfig): number {
  return 2 ** (config.block_out_channels.length - 1)
}

/** The most latents on a side of a tile, or undefined where all of them fit into the area of one. */
function tileFor(config: VaeConfig, height: number, width: number, asked?: number): number | undefined {
  const tile = asked ?? Math.max(SMALLEST_TILE, Math.floor(config.sample_size / vaeScale(config)))
  if (!Number.isInteger(tile) || tile < SMALLEST_TILE)
    throw expected(`an integer of at least ${SMALLEST_TILE}`, 'tile', tile)
  return height * width > tile ** 2 ? tile : undefined
}

async function loadParts(loader: Loader, weights: Weights, config: VaeConfig, options: { encoder: boolean }) {
  const { latent_channels: channels, use_post_quant_conv, use_quant_conv } = config
  const gain = loader.activations === 'f16' && config.force_upcast ? F16_GAIN : 1
  const build: Build = { loader, groups: config.norm_num_groups, gain }
  const conv = (name: string, from: number, to: number, used = to) =>
    new Conv(build, under(weights, name), { from, to, kernel: 1, used })
  return {
    postQuantConv: use_post_quant_conv ? conv('post_quant_conv.', channels, channels) : undefined,
    decoder: await Coder.decoder(build, under(weights, 'decoder.'), config),
    encoder: options.encoder ? await Coder.encoder(build, under(weights, 'encoder.'), config) : undefined,
    quantConv:
      options.encoder && use_quant_conv
        ? conv('quant_conv.', 2 * channels, 2 * channels, channels)
        : undefined,
  }
}
