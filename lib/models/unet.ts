import type { UnetConfig } from '../checkpoint/diffusers.ts'
import type { Device } from '../device.ts'
import { expected } from '../errors.ts'
import {
  type ActivationType,
  cast,
  conv2d,
  embedding,
  groupNorm,
  linear,
  packLinear,
  spliceEmbeddings,
} from '../ops.ts'
import { scope, type Tensor } from '../tensor.ts'
import { advance, type Loader, type Observe, under, type Weights } from './loader.ts'
import { loadConv, loadLinear, loadNorm, SAME } from './resnet-block.ts'
import {
  type BlockShape,
  ConditionLayers,
  cumulative,
  DownBlock,
  type DownShape,
  loadBiasSum,
  MidBlock,
  type StepCondition,
  timeWidth,
  UpBlock,
  type UpShape,
  within,
} from './unet-blocks.ts'

/** What a UNet is told of its N images: everything but the latents. */
export interface UnetInputs {
  /** A [N·T, D] embedded prompts of T tokens each. */
  prompt: Tensor
  /** A [N, P] pooled prompts. */
  pooled: Tensor
  /** For each image its numbers of size and crop: height, width, top, left, target height, target width. */
  timeIds: readonly (readonly number[])[]
  /** What the schedule gives the model at each step. */
  timesteps: readonly number[]
  /** For each image the guidance scale that a distilled model is to imitate; required if it has `time_cond_proj_dim`. */
  guidance?: readonly number[] | undefined
}

/**
 * What a request's steps share, computed once by `Unet.condition`: the prompts' keys and values, and the time
 * embeddings of all ResNets for all steps. Belongs to whoever asked for it, until `dispose`.
 */
export class UnetCondition {
  /** N. */
  readonly images: number
  readonly steps: number
  private readonly device: Device
  /** Its `time` is that of all steps: f32 [steps·N, ΣO]. */
  private readonly tables: StepCondition

  constructor(device: Device, images: number, steps: number, tables: StepCondition) {
    this.device = device
    this.images = images
    this.steps = steps
    this.tables = tables
  }

  /** A condition for these images of the batch, in this order: for the rest of a batch of which some have ended. */
  select(images: readonly number[]): UnetCondition {
    const { device, steps, tables } = this
    if (images.length === 0 || images.some(i => !Number.isInteger(i) || i < 0 || i >= this.images))
      throw expected(`integers from 0 to ${this.images - 1}`, 'images', images)
    const tokens = tables.keysAndValues[0]!.shape[0]! / this.images
    const selected = scope(() => {
      const range = (n: number) => Array.from({ length: n }, (_, i) => i)
      const ids = (rows: number[]) => device.tensor(rows, [rows.length], 'i32')
      const times = ids(range(steps).flatMap(step => images.map(image => step * this.images + image)))
      const prompts = ids(images.flatMap(image => range(tokens).map(token => image * tokens + token)))
      return {
        time: embedding(tables.time, times, { out: 'f32' }),
        keysAndValues: tables.keysAndValues.map(table =>
          embedding(table, prompts, { out: table.dtype as ActivationType }),
        ),
        cuPrompt: cumulative(device, images.length, tokens),
      }
    })
    return new UnetCondition(device, images.length, steps, selected)
  }

  /** What blocks see at step `index`: views, to be made inside a scope. */
  at(index: number): StepCondition {
    if (!Number.isInteger(index) || index < 0 || index >= this.steps)
      throw expected(`an integer from 0 to ${this.steps - 1}`, 'step', index)
    return { ...this.tables, time: this.tables.time.narrow(0, index * this.images, this.images) }
  }

  /** Bytes on the device. */
  get byteLength(): number {
    return this.tensors.reduce((sum, tensor) => sum + tensor.byteLength, 0)
  }

  dispose(): void {
    for (const tensor of this.tensors) tensor.dispose()
  }

  private get tensors(): Tensor[] {
    return [this.tables.time, this.tables.cuPrompt, ...this.tables.keysAndValues]
  }
}

/** SDXL's denoising network. Source: `UNet2DConditionModel` of diffusers with `addition_embed_type` text_time. */
export class Unet {
  readonly config: UnetConfig
  private readonly loader: Loader
  private readonly w: Awaited<ReturnType<typeof loadUnet>>

  private constructor(loader: Loader, config: UnetConfig, w: Awaited<ReturnType<typeof loadUnet>>) {
    this.loader = loader
    this.config = config
    this.w = w
  }

  /** `weights` holds diffusers' names: `conv_in.…`, `down_blocks.…`, … */
  static async load(loader: Loader, weights: Weights, config: UnetConfig): Promise<Unet> {
    return new Unet(loader, config, await loadUnet(loader, weights, config))
  }

  /**
   * Runs the layers that depend on prompt or timestep only, for all steps. Not to be called inside a scope, which would
   * free the result's tensors at its end.
   */
  condition(inputs: UnetInputs, observe?: Observe): UnetCondition {
    const { prompt, timesteps } = inputs
    const images = this.checkInputs(inputs)
    const { device } = this.loader
    const tables = scope(() => {
      const embedded = this.embedTime(inputs, observe)
      return {
        time: linear(embedded, this.w.time.weight, { bias: this.w.time.bias, out: 'f32' }), // [steps·N, ΣO]
        keysAndValues: this.w.keysAndValues.map(weight => linear(prompt, weight)), // [N·T, 2C]
        cuPrompt: cumulative(device, images, prompt.shape[0]! / images),
      }
    })
    return new UnetCondition(device, images, timesteps.length, tables)
  }

  /** N, if everything fits together. */
  private checkInputs({ prompt, pooled, timeIds, timesteps, guidance }: UnetInputs): number {
    const {
      cross_attention_dim,
      addition_time_embed_dim,
      projection_class_embeddings_input_dim,
      time_cond_proj_dim,
    } = this.config
    const images = pooled.shape[0]!
    if (pooled.rank !== 2 || images === 0) throw expected('[images, channels]', 'pooled', pooled.shape)
    if (prompt.rank !== 2 || prompt.shape[0]! % images !== 0 || prompt.shape[1] !== cross_attention_dim)
      throw expected(`[${images}·tokens, ${cross_attention_dim}]`, 'prompt', prompt.shape)
    const ids = (projection_class_embeddings_input_dim - pooled.shape[1]!) / addition_time_embed_dim
    if (timeIds.length !== images || timeIds.some(numbers => numbers.length !== ids))
      throw expected(
        `${ids} numbers for each of ${images} images`,
        'timeIds',
        timeIds.map(numbers => numbers.length),
      )
    if (timesteps.length === 0) throw expected('at least one', 'timesteps', timesteps)
    if (time_cond_proj_dim !== null && guidance?.length !== images)
      throw expected(`a guidance scale for each of ${images} images`, 'guidance', guidance)
    return images
  }

  /** silu(time_embedding(t) + add_embedding(pooled, timeIds)), A [steps·N, E]. */
  private embedTime({ pooled, timeIds, timesteps, guidance }: UnetInputs, observe?: Observe): Tensor {
    const { w, config } = this
    const { device } = this.loader
    const { addition_time_embed_dim, block_out_channels, flip_sin_to_cos, freq_shift, time_cond_proj_dim } =
      config
    const images = timeIds.length
    const rows = timesteps.flatMap(t => Array<number>(images).fill(t))
    const order = { cosFirst: flip_sin_to_cos, freqShift: freq_shift }

    let time = this.activation(sinusoids(rows, block_out_channels[0]!, order)) // [steps·N, C]
    observe?.('time_proj', time)
    if (w.cond_proj && time_cond_proj_dim !== null && guidance) {
      const scales = timesteps.flatMap(() => guidance.map(scale => 1000 * (scale - 1)))
      const embedded = sinusoids(scales, time_cond_proj_dim, { cosFirst: false, freqShift: 1 })
      time = linear(this.activation(embedded), w.cond_proj, { residual: time })
    }
    const sizes = this.activation(sinusoids(timeIds.flat(), addition_time_embed_dim, order)) // [N·ids, dim]
    observe?.('add_time_proj', sizes)
    const added = sideBySide(device, pooled, sizes.reshape(images, -1))

    const [h, a] = [
      linear(time, w.time_linear_1.weight, { bias: w.time_linear_1.bias, activation: 'silu' }), // [steps·N, E]
      linear(added, w.add_linear_1.weight, { bias: w.add_linear_1.bias, activation: 'silu' }), // [N, E]
    ]
    const embedded = linear(sideBySide(device, h, a), w.linear_2.weight, {
      bias: w.linear_2.bias,
      activation: 'silu',
    })
    observe?.('embedding', embedded)
    return embedded
  }

  private activation({ data, shape }: { data: Float32Array; shape: number[] }): Tensor {
    return cast(this.loader.device.tensor(data, shape), this.loader.activations)
  }

  /**
   * Bytes of activations that `forward` has at once at most, of latents [images, height, width]. Skip connections fill up
   * on the way down and are used on the way up, so that is where the most is: beside them, a ResNet has its input, the
   * normalised concatenation and a result; a transformer its input, tokens, q, k, v, what they attend to and a result.
   */
  static bytesAt(
    config: UnetConfig,
    activations: ActivationType,
    latents: { images: number; height: number; width: number },
  ): number {
    const { images, height, width } = latents
    const { down, up } = blockShapes(config)
    const pixels = down.map((_, level) => Math.ceil(height / 2 ** level) * Math.ceil(width / 2 ** level))
    const transformer = (channels: number) => 7 * channels

    let skips = config.block_out_channels[0]! * pixels[0]!
    for (const [level, { out, layers, downsample }] of down.entries())
      skips += out * (layers * pixels[level]! + (downsample ? pixels[level + 1]! : 0))
    let most = skips + transformer(down.at(-1)!.out) * pixels.at(-1)!
    for (const [i, block] of up.entries()) {
      const here = pixels.at(-1 - i)!
      for (const [layer, skip] of block.skips.entries()) {
        const input = layer === 0 ? block.in : block.out
        most = Math.max(most, skips + (input + (input + skip) + block.out) * here)
        skips -= skip * here
        if (block.attention) most = Math.max(most, skips + transformer(block.out) * here)
      }
      if (block.upsample) most = Math.max(most, skips + block.out * (here + pixels.at(-2 - i)!))
    }
    return images * most * (activations === 'f32' ? 4 : 2)
  }

  /**
   * latents A [N, h, w, in_channels], scaled as the schedule says → the prediction at step `index` of the condition,
   * A [N, h, w, out_channels].
   */
  forward(latents: Tensor, condition: UnetCondition, index: number, observe?: Observe): Tensor {
    const { w, config } = this
    const { images } = condition
    if (latents.rank !== 4 || latents.shape[0] !== images || latents.shape[3] !== config.in_channels)
      throw expected(`[${images}, height, width, ${config.in_channels}]`, 'latents', latents.shape)
    return scope(() => {
      const step = condition.at(index)
      let x = conv2d(latents, w.conv_in.weight, { ...SAME, bias: w.conv_in.bias })
      observe?.('conv_in', x)
      const skips = [x]
      for (const [i, block] of w.down_blocks.entries()) {
        x = block.forward(x, skips, step, within(observe, `down_blocks.${i}.`))
        observe?.(`down_blocks.${i}`, x)
      }
      x = w.mid_block.forward(x, step, within(observe, 'mid_block.'))
      observe?.('mid_block', x)
      for (const [i, block] of w.up_blocks.entries()) {
        x = block.forward(x, skips, step, within(observe, `up_blocks.${i}.`))
        observe?.(`up_blocks.${i}`, x)
      }
      const { norm_num_groups: groups, norm_eps: eps } = config
      x = advance(x, x =>
        groupNorm(x, w.conv_norm_out.weight, w.conv_norm_out.bias, { groups, eps, activation: 'silu' }),
      )
      return conv2d(x, w.conv_out.weight, { ...SAME, bias: w.conv_out.bias })
    })
  }
}

/** The blocks in the order they run. */
function blockShapes(config: UnetConfig) {
  const {
    block_out_channels: widths,
    layers_per_block,
    transformer_layers_per_block,
    attention_heads,
  } = config
  const last = widths.length - 1
  const attentionOf = (type: string, level: number) =>
    type.startsWith('CrossAttn')
      ? { depth: transformer_layers_per_block[level]!, heads: attention_heads[level]! }
      : undefined

  // Channels of the skip connections, in the order they are made.
  const skips = [widths[0]!]
  const down = widths.map((out, level): DownShape => {
    const [layers, downsample] = [layers_per_block[level]!, level < last]
    const shape = { in: skips.at(-1)!, out, layers, downsample }
    skips.push(...Array<number>(layers + (downsample ? 1 : 0)).fill(out))
    return { ...shape, attention: attentionOf(config.down_block_types[level]!, level) }
  })
  const mid: BlockShape = { in: widths[last]!, out: widths[last]!, attention: attentionOf('CrossAttn', last) }
  const up = config.up_block_types.map((type, i): UpShape => {
    const level = last - i
    return {
      in: widths[Math.min(level + 1, last)]!,
      out: widths[level]!,
      skips: skips.splice(-layers_per_block[level]! - 1).reverse(),
      upsample: level > 0,
      attention: attentionOf(type, level),
    }
  })
  return { down, mid, up }
}

async function loadUnet(loader: Loader, weights: Weights, config: UnetConfig) {
  const { in_channels, out_channels, block_out_channels, time_cond_proj_dim } = config
  const first = block_out_channels[0]!
  const width = timeWidth(config)
  const condition = new ConditionLayers()
  const source = { loader, config, condition }
  const shapes = blockShapes(config)

  const conv_in = loadConv(loader, under(weights, 'conv_in.'), in_channels, first)
  const down_blocks: DownBlock[] = []
  for (const [i, shape] of shapes.down.entries())
    down_blocks.push(await DownBlock.load(source, under(weights, `down_blocks.${i}.`), shape))
  const mid_block = await MidBlock.load(source, under(weights, 'mid_block.'), shapes.mid)
  const up_blocks: UpBlock[] = []
  for (const [i, shape] of shapes.up.entries())
    up_blocks.push(await UpBlock.load(source, under(weights, `up_blocks.${i}.`), shape))

  const [time, add] = ['time_embedding.', 'add_embedding.'].map(name => under(weights, name)) as [
    Weights,
    Weights,
  ]
  return {
    conv_in,
    down_blocks,
    mid_block,
    up_blocks,
    conv_norm_out: loadNorm(loader, under(weights, 'conv_norm_out.'), first),
    conv_out: loadConv(loader, under(weights, 'conv_out.'), first, out_channels),
    cond_proj:
      time_cond_proj_dim === null
        ? undefined
        : loader.linear(time.take('cond_proj.weight', [first, time_cond_proj_dim])),
    time_linear_1: loadLinear(loader, under(time, 'linear_1.'), first, width),
    add_linear_1: loadLinear(
      loader,
      under(add, 'linear_1.'),
      config.projection_class_embeddings_input_dim,
      width,
    ),
    linear_2: await loadSum(loader, under(time, 'linear_2.'), under(add, 'linear_2.'), width),
    time: await condition.loadTime(loader),
    keysAndValues: condition.keysAndValues,
  }
}

/** A x + a + B y + b as one layer of [x | y]: [A | B] and a + b. */
async function loadSum(loader: Loader, a: Weights, b: Weights, width: number) {
  const [wa, wb] = [a.take('weight', [width, width]), b.take('weight', [width, width])]
  const [ba, bb] = [a.take('bias', [width]), b.take('bias', [width])]
  return {
    weight: loader.build(() => {
      const [left, right] = [wa, wb].map(entry => cast(loader.tensor(entry), loader.activations)) as [
        Tensor,
        Tensor,
      ]
      return packLinear(sideBySide(loader.device, left, right), { dtype: loader.storage(wa) })
    }),
    bias: await loadBiasSum(loader, [ba], [bb]),
  }
}

/** [a | b]: row r of a [R, K] is followed by row r mod S of b [S, L]; [R, K + L]. */
export function sideBySide(device: Device, a: Tensor, b: Tensor): Tensor {
  const [rows, k] = a.shape as [number, number]
  const [period, l] = b.shape as [number, number]
  // Pieces of a common width, so that pieces of both can be spliced.
  const piece = greatestCommonDivisor(k, l)
  const [fromA, fromB] = [k / piece, l / piece]
  const index = new Int32Array(rows * (fromA + fromB))
  for (let r = 0, at = 0; r < rows; r++) {
    for (let i = 0; i < fromA; i++) index[at++] = r * fromA + i
    for (let i = 0; i < fromB; i++) index[at++] = -1 - ((r % period) * fromB + i)
  }
  return spliceEmbeddings(
    a.reshape(-1, piece),
    b.reshape(-1, piece),
    device.tensor(index, [index.length]),
  ).reshape(rows, k + l)
}

function greatestCommonDivisor(a: number, b: number): number {
  return b === 0 ? a : greatestCommonDivisor(b, a % b)
}

/**
 * f32 [R, width]: sines and cosines of each of R positions at frequencies falling geometrically from 1 to 1/10000, each
 * step rounded to f32 as the reference's tensors are. Source: `get_timestep_embedding` of diffusers.
 */
export function sinusoids(
  positions: readonly number[],
  width: number,
  { cosFirst, freqShift }: { cosFirst: boolean; freqShift: number },
): { data: Float32Array; shape: number[] } {
  const half = Math.floor(width / 2)
  const data = new Float32Array(positions.length * width)
  for (let i = 0; i < half; i++) {
    const exponent = Math.fround(Math.fround(Math.fround(-Math.log(10000)) * i) / (half - freqShift))
    const frequency = Math.fround(Math.exp(exponent))
    for (const [row, position] of positions.entries()) {
      const angle = Math.fround(Math.fround(position) * frequency)
      data[row * width + i] = cosFirst ? Math.cos(angle) : Math.sin(angle)
      data[row * width + half + i] = cosFirst ? Math.sin(angle) : Math.cos(angle)
    }
  }
  return { data, shape: [positions.length, width] }
}
