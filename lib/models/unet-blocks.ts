import type { UnetConfig } from '../checkpoint/diffusers.ts'
import type { WeightEntry } from '../checkpoint/tensor-map.ts'
import type { Device } from '../device.ts'
import { attention, conv2d, embedding, groupNorm, layerNorm, linear, packLinear } from '../ops.ts'
import { scope, type Tensor } from '../tensor.ts'
import { advance, type Loader, type Observe, stackRows, under, type Weights } from './loader.ts'
import { loadConv, loadLinear, loadNorm, ResnetBlock, type ResnetConfig, SAME } from './resnet-block.ts'

/** What depends on prompt or timestep only, as blocks see it in one step. N images, T tokens of each prompt. */
export interface StepCondition {
  /** f32 [N, ΣO] time embedding and bias of the first convolution of every ResNet; rows are strided. */
  readonly time: Tensor
  /** A [N·T, 2C] keys and values of each cross-attention. */
  readonly keysAndValues: readonly Tensor[]
  /** i32 [N+1] where each prompt ends. */
  readonly cuPrompt: Tensor
}

/**
 * Collects, while blocks are loaded, the layers that depend on prompt or timestep only: they run once for a request and
 * blocks find the results in `StepCondition` at the places given here.
 */
export class ConditionLayers {
  readonly #timeWeights: WeightEntry[] = []
  readonly #timeBiases: WeightEntry[] = []
  readonly #convBiases: WeightEntry[] = []
  #columns = 0
  /** Packed [2C, D], one a cross-attention. */
  readonly keysAndValues: Tensor[] = []

  /** A ResNet's `time_emb_proj` and `conv1.bias`; the columns of `StepCondition.time` that will hold their sum. */
  addTime(weights: Weights, out: number, width: number): { start: number; length: number } {
    this.#timeWeights.push(weights.take('time_emb_proj.weight', [out, width]))
    this.#timeBiases.push(weights.take('time_emb_proj.bias', [out]))
    this.#convBiases.push(weights.take('conv1.bias', [out]))
    const start = this.#columns
    this.#columns += out
    return { start, length: out }
  }

  /** A cross-attention's `to_k` and `to_v`; its index in `StepCondition.keysAndValues`. */
  addKeysAndValues(loader: Loader, weights: Weights, channels: number, width: number): number {
    const matrices = ['to_k', 'to_v'].map(name => weights.take(`${name}.weight`, [channels, width]))
    return this.keysAndValues.push(loader.linear(matrices)) - 1
  }

  /** The projections of all ResNets as one layer [ΣO, E]. */
  async loadTime(loader: Loader): Promise<{ weight: Tensor; bias: Tensor }> {
    return {
      weight: loader.linear(this.#timeWeights),
      bias: await loadBiasSum(loader, this.#timeBiases, this.#convBiases),
    }
  }
}

/** Vectors `a` one after the other plus vectors `b` likewise, f32. */
export async function loadBiasSum(
  loader: Loader,
  a: readonly WeightEntry[],
  b: readonly WeightEntry[],
): Promise<Tensor> {
  const sum = await loader.fold((f32, host) => {
    const column = (entry: WeightEntry) => f32(entry).reshape(-1, 1)
    const bias = stackRows(host, b.map(column)).reshape(-1)
    return linear(host.tensor([1], [1, 1]), packLinear(a.map(column)), { bias }).reshape(-1)
  })
  return loader.build(sum)
}

/** What blocks are built from. */
interface Source {
  readonly loader: Loader
  readonly config: UnetConfig
  readonly condition: ConditionLayers
}

/** Width of the time embedding. */
export function timeWidth(config: UnetConfig): number {
  return 4 * config.block_out_channels[0]!
}

type ResnetChannels = Pick<ResnetConfig, 'in' | 'skip' | 'out'>

/** A ResNet whose first convolution's bias is that image's time embedding. */
class TimedResnet {
  private readonly resnet: ResnetBlock
  private readonly columns: { start: number; length: number }

  constructor({ loader, config, condition }: Source, weights: Weights, channels: ResnetChannels) {
    this.columns = condition.addTime(weights, channels.out, timeWidth(config))
    this.resnet = new ResnetBlock(loader, weights, {
      ...channels,
      groups: config.norm_num_groups,
      eps: config.norm_eps,
    })
  }

  forward(x: Tensor, step: StepCondition, skip?: Tensor): Tensor {
    const { start, length } = this.columns
    return scope(() => this.resnet.forward(x, step.time.narrow(1, start, length), skip))
  }
}

// Both are constants of the reference, whatever `norm_eps` says.
const LAYER_NORM = { eps: 1e-5 }
const TRANSFORMER_GROUP_NORM_EPS = 1e-6

/** Self-attention, cross-attention and MLP, each after a LayerNorm. Source: `BasicTransformerBlock` of diffusers. */
class TransformerBlock {
  private readonly w: ReturnType<typeof loadTransformerBlock>
  private readonly heads: number

  constructor(source: Source, weights: Weights, channels: number, heads: number) {
    this.w = loadTransformerBlock(source, weights, channels)
    this.heads = heads
  }

  /** x [N·H·W, C], whose images end at cu i32 [N+1] → [N·H·W, C]. */
  forward(x: Tensor, cu: Tensor, step: StepCondition): Tensor {
    let h = scope(() => this.selfAttention(x, cu))
    h = advance(h, h => this.crossAttention(h, cu, step))
    return advance(h, h => this.feedForward(h))
  }

  private selfAttention(x: Tensor, cu: Tensor): Tensor {
    const { norm1, qkv, out1 } = this.w
    const fused = scope(() => linear(layerNorm(x, norm1.weight, norm1.bias, LAYER_NORM), qkv)) // [N·H·W, 3C]
    const [q, k, v] = this.split(fused, 3) as [Tensor, Tensor, Tensor]
    const attended = attention(q, k, v, { cuQ: cu }).reshape(...x.shape)
    return linear(attended, out1.weight, { bias: out1.bias, residual: x })
  }

  private crossAttention(x: Tensor, cu: Tensor, step: StepCondition): Tensor {
    const { norm2, to_q, keysAndValues, out2 } = this.w
    const projected = scope(() => linear(layerNorm(x, norm2.weight, norm2.bias, LAYER_NORM), to_q))
    const [q] = this.split(projected, 1) as [Tensor]
    const [k, v] = this.split(step.keysAndValues[keysAndValues]!, 2) as [Tensor, Tensor]
    const attended = attention(q, k, v, { cuQ: cu, cuK: step.cuPrompt }).reshape(...x.shape)
    return linear(attended, out2.weight, { bias: out2.bias, residual: x })
  }

  private feedForward(x: Tensor): Tensor {
    const { norm3, geglu, out3 } = this.w
    const inner = scope(() =>
      linear(layerNorm(x, norm3.weight, norm3.bias, LAYER_NORM), geglu.weight, {
        bias: geglu.bias,
        activation: 'gelu',
      }),
    ) // [N·H·W, 4C]
    return linear(inner, out3.weight, { bias: out3.bias, residual: x })
  }

  /** [R, parts·C] → `parts` views [R, heads, C/heads]. */
  private split(x: Tensor, parts: number): Tensor[] {
    const heads = x.reshape(x.shape[0]!, parts * this.heads, -1)
    return Array.from({ length: parts }, (_, i) => heads.narrow(1, i * this.heads, this.heads))
  }
}

function loadTransformerBlock({ loader, config, condition }: Source, weights: Weights, c: number) {
  const [self, cross, ff] = ['attn1.', 'attn2.', 'ff.net.'].map(name => under(weights, name)) as [
    Weights,
    Weights,
    Weights,
  ]
  return {
    norm1: loadNorm(loader, under(weights, 'norm1.'), c),
    qkv: loader.linear(['to_q', 'to_k', 'to_v'].map(name => self.take(`${name}.weight`, [c, c]))),
    out1: loadLinear(loader, under(self, 'to_out.0.'), c, c),
    norm2: loadNorm(loader, under(weights, 'norm2.'), c),
    to_q: loader.linear(cross.take('to_q.weight', [c, c])),
    keysAndValues: condition.addKeysAndValues(loader, cross, c, config.cross_attention_dim),
    out2: loadLinear(loader, under(cross, 'to_out.0.'), c, c),
    norm3: loadNorm(loader, under(weights, 'norm3.'), c),
    geglu: loadGeglu(loader, under(ff, '0.proj.'), c),
    out3: loadLinear(loader, under(ff, '2.'), 4 * c, c),
  }
}

/** The release stacks [up; gate], a gated `linear` [gate; up]. */
function loadGeglu(loader: Loader, weights: Weights, c: number) {
  const inner = 4 * c
  const matrix = weights.take('weight', [2 * inner, c])
  const bias = weights.take('bias', [2 * inner])
  return {
    weight: loader.build(() => {
      const halves = [inner, 0].map(first => loader.tensor(matrix).narrow(0, first, inner))
      return packLinear(halves, { dtype: loader.storage(matrix), gated: true })
    }),
    bias: loader.build(() => {
      const order = loader.device.tensor(Int32Array.of(1, 0), [2])
      return embedding(loader.tensor(bias).reshape(2, inner), order, { out: 'f32' }).reshape(-1)
    }),
  }
}

/** Transformer blocks over the pixels of an image, added to it. Source: `Transformer2DModel` of diffusers. */
class SpatialTransformer {
  private readonly device: Device
  private readonly groups: number
  private readonly w: ReturnType<typeof loadSpatialTransformer>
  private readonly blocks: readonly TransformerBlock[]

  private constructor(
    { loader, config }: Source,
    w: ReturnType<typeof loadSpatialTransformer>,
    blocks: readonly TransformerBlock[],
  ) {
    this.device = loader.device
    this.groups = config.norm_num_groups
    this.w = w
    this.blocks = blocks
  }

  /** `depth` blocks of `heads` heads. */
  static async load(
    source: Source,
    weights: Weights,
    { channels, depth, heads }: { channels: number; depth: number; heads: number },
  ): Promise<SpatialTransformer> {
    const w = loadSpatialTransformer(source.loader, weights, channels)
    const blocks: TransformerBlock[] = []
    for (let i = 0; i < depth; i++) {
      blocks.push(new TransformerBlock(source, under(weights, `transformer_blocks.${i}.`), channels, heads))
      await source.loader.pause()
    }
    return new SpatialTransformer(source, w, blocks)
  }

  /** x [N, H, W, C] → [N, H, W, C]. */
  forward(x: Tensor, step: StepCondition, observe?: Observe): Tensor {
    const { norm, proj_in, proj_out } = this.w
    const [images, height, width, channels] = x.shape as [number, number, number, number]
    const cu = cumulative(this.device, images, height * width)
    let h = scope(() => {
      const normed = groupNorm(x, norm.weight, norm.bias, {
        groups: this.groups,
        eps: TRANSFORMER_GROUP_NORM_EPS,
      })
      return linear(normed.reshape(-1, channels), proj_in.weight, { bias: proj_in.bias })
    }) // [N·H·W, C]
    for (const [i, block] of this.blocks.entries()) {
      h = advance(h, h => block.forward(h, cu, step))
      observe?.(`transformer_blocks.${i}`, h)
    }
    const residual = x.reshape(-1, channels)
    return linear(h, proj_out.weight, { bias: proj_out.bias, residual }).reshape(...x.shape)
  }
}

function loadSpatialTransformer(loader: Loader, weights: Weights, c: number) {
  return {
    norm: loadNorm(loader, under(weights, 'norm.'), c),
    proj_in: loadLinear(loader, under(weights, 'proj_in.'), c, c),
    proj_out: loadLinear(loader, under(weights, 'proj_out.'), c, c),
  }
}

/** i32 [n+1]: where each of `n` sequences of `length` tokens ends. */
export function cumulative(device: Device, n: number, length: number): Tensor {
  const ends = Int32Array.from({ length: n + 1 }, (_, i) => i * length)
  return device.tensor(ends, [n + 1])
}

export interface BlockShape {
  /** Channels of the input. */
  in: number
  /** Channels of the ResNets. */
  out: number
  /** Blocks and heads of each transformer; undefined: there are none. */
  attention: { depth: number; heads: number } | undefined
}

export interface DownShape extends BlockShape {
  layers: number
  downsample: boolean
}

export interface UpShape extends BlockShape {
  /** Channels of the skip connection that each layer takes. */
  skips: readonly number[]
  upsample: boolean
}

/** A ResNet and, in a block that attends to the prompt, a transformer. */
class Layer {
  private readonly index: number
  private readonly resnet: TimedResnet
  private readonly transformer: SpatialTransformer | undefined

  private constructor(index: number, resnet: TimedResnet, transformer: SpatialTransformer | undefined) {
    this.index = index
    this.resnet = resnet
    this.transformer = transformer
  }

  /** `resnets.<index>` and `attentions.<index>` of a block. */
  static async load(
    source: Source,
    weights: Weights,
    index: number,
    channels: ResnetChannels,
    attention: BlockShape['attention'],
  ): Promise<Layer> {
    const resnet = new TimedResnet(source, under(weights, `resnets.${index}.`), channels)
    const transformer =
      attention &&
      (await SpatialTransformer.load(source, under(weights, `attentions.${index}.`), {
        channels: channels.out,
        ...attention,
      }))
    await source.loader.pause()
    return new Layer(index, resnet, transformer)
  }

  /** x [N, H, W, C], skip [N, H, W, C2] → [N, H, W, out]. With a skip connection, that is on the way up, frees both. */
  forward(x: Tensor, step: StepCondition, observe?: Observe, skip?: Tensor): Tensor {
    const { index, transformer } = this
    const h = this.resnet.forward(x, step, skip)
    if (skip) for (const used of [x, skip]) used.dispose()
    observe?.(`resnets.${index}`, h)
    if (!transformer) return h
    const attended = advance(h, h => transformer.forward(h, step, within(observe, `attentions.${index}.`)))
    observe?.(`attentions.${index}`, attended)
    return attended
  }
}

/** Names of a part, with those of the whole before them. */
export function within(observe: Observe | undefined, prefix: string): Observe | undefined {
  return observe && ((name, x) => observe(`${prefix}${name}`, x))
}

/** Source: `DownBlock2D`, `CrossAttnDownBlock2D` of diffusers. */
export class DownBlock {
  private readonly layers: readonly Layer[]
  private readonly downsampler: ReturnType<typeof loadConv> | undefined

  private constructor(layers: readonly Layer[], downsampler: ReturnType<typeof loadConv> | undefined) {
    this.layers = layers
    this.downsampler = downsampler
  }

  static async load(source: Source, weights: Weights, shape: DownShape): Promise<DownBlock> {
    const { out } = shape
    const layers: Layer[] = []
    for (let i = 0; i < shape.layers; i++) {
      const channels = { in: i === 0 ? shape.in : out, out }
      layers.push(await Layer.load(source, weights, i, channels, shape.attention))
    }
    const downsampler = shape.downsample
      ? loadConv(source.loader, under(weights, 'downsamplers.0.conv.'), out, out)
      : undefined
    return new DownBlock(layers, downsampler)
  }

  /**
   * x [N, H, W, in] → [N, ⌈H/2⌉, ⌈W/2⌉, out], or of x's size without a downsampler. The result of each layer goes to
   * `skips`, the last too.
   */
  forward(x: Tensor, skips: Tensor[], step: StepCondition, observe?: Observe): Tensor {
    let h = x
    for (const layer of this.layers) {
      h = layer.forward(h, step, observe)
      skips.push(h)
    }
    if (this.downsampler) {
      const { weight, bias } = this.downsampler
      h = conv2d(h, weight, { ...SAME, bias, stride: 2 })
      skips.push(h)
    }
    return h
  }
}

/** Source: `UNetMidBlock2DCrossAttn` of diffusers. */
export class MidBlock {
  private readonly first: Layer
  private readonly last: TimedResnet

  private constructor(first: Layer, last: TimedResnet) {
    this.first = first
    this.last = last
  }

  static async load(source: Source, weights: Weights, shape: BlockShape): Promise<MidBlock> {
    const channels = { in: shape.in, out: shape.out }
    const first = await Layer.load(source, weights, 0, channels, shape.attention)
    return new MidBlock(first, new TimedResnet(source, under(weights, 'resnets.1.'), channels))
  }

  /** x [N, H, W, C] → [N, H, W, C]. */
  forward(x: Tensor, step: StepCondition, observe?: Observe): Tensor {
    const h = this.first.forward(x, step, observe)
    return advance(h, h => this.last.forward(h, step))
  }
}

/** Source: `UpBlock2D`, `CrossAttnUpBlock2D` of diffusers. */
export class UpBlock {
  private readonly layers: readonly Layer[]
  private readonly upsampler: ReturnType<typeof loadConv> | undefined

  private constructor(layers: readonly Layer[], upsampler: ReturnType<typeof loadConv> | undefined) {
    this.layers = layers
    this.upsampler = upsampler
  }

  static async load(source: Source, weights: Weights, shape: UpShape): Promise<UpBlock> {
    const { out } = shape
    const layers: Layer[] = []
    for (const [i, skip] of shape.skips.entries()) {
      const channels = { in: i === 0 ? shape.in : out, skip, out }
      layers.push(await Layer.load(source, weights, i, channels, shape.attention))
    }
    const upsampler = shape.upsample
      ? loadConv(source.loader, under(weights, 'upsamplers.0.conv.'), out, out)
      : undefined
    return new UpBlock(layers, upsampler)
  }

  /**
   * x [N, H, W, in] → [N, H', W', out]: of the next skip's size if there is an upsampler, else of x's. Frees x and the
   * skips it takes.
   */
  forward(x: Tensor, skips: Tensor[], step: StepCondition, observe?: Observe): Tensor {
    let h = x
    for (const layer of this.layers) h = layer.forward(h, step, observe, skips.pop()!)
    if (!this.upsampler) return h
    const { weight, bias } = this.upsampler
    const [, height, width] = skips.at(-1)!.shape as [number, number, number]
    return advance(h, h => conv2d(h, weight, { ...SAME, bias, resize: [height, width] }))
  }
}
