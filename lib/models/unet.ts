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
  loadBiasSum,
  MidBlock,
  type StepCondition,
  timeWidth,
  UpBlock,
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
  /** For each image the guidance scale that a distilled model is to imitate; required if the model has `time_cond_proj`. */
  guidance?: readonly number[] | undefined
}

/** What a request's steps share, computed once: keys and values of the prompts, time embeddings of all ResNets and steps. */
export class UnetCondition {
  /** N. */
  readonly images: number
  readonly steps: number
  private readonly device: Device
  private readonly w: ConditionTensors

  /** Made by `Unet.condition`. */
  constructor(device: Device, images: number, steps: number, w: ConditionTensors) {
    this.device = device
    this.images = images
    this.steps = steps
    this.w = w
  }

  /** A condition of its own for these images, in this order, of the batch. */
  select(images: readonly number[]): UnetCondition {
    for (const image of images)
      if (!Number.isInteger(image) || image < 0 || image >= this.images)
        throw expected(`integers from 0 to ${this.images - 1}`, 'images', images)
    const { device, steps, w } = this
    const tokens = w.keysAndValues.length > 0 ? w.keysAndValues[0]!.shape[0]! / this.images : 0
    const selected = scope(() => {
      const rows = (groups: number, perGroup: number, pick: (group: number, row: number) => number) =>
        device.tensor(
          Int32Array.from({ length: groups * perGroup }, (_, i) =>
            pick(Math.floor(i / perGroup), i % perGroup),
          ),
          [groups * perGroup],
        )
      const times = rows(steps, images.length, (step, i) => step * this.images + images[i]!)
      const prompts = rows(images.length, tokens, (i, token) => images[i]! * tokens + token)
      return {
        time: embedding(w.time, times, { out: 'f32' }),
        keysAndValues: w.keysAndValues.map(table =>
          embedding(table, prompts, { out: table.dtype as ActivationType }),
        ),
        cuPrompt: cumulative(device, images.length, tokens),
      }
    })
    return new UnetCondition(device, images.length, steps, selected)
  }

  /** As blocks see it at step `index`; a view, for use inside a scope. */
  at(index: number): StepCondition {
    if (!Number.isInteger(index) || index < 0 || index >= this.steps)
      throw expected(`an integer from 0 to ${this.steps - 1}`, 'step', index)
    return { ...this.w, time: this.w.time.narrow(0, index * this.images, this.images) }
  }

  get byteLength(): number {
    return [this.w.time, ...this.w.keysAndValues].reduce((sum, tensor) => sum + tensor.byteLength, 0)
  }

  dispose(): void {
    for (const tensor of [this.w.time, this.w.cuPrompt, ...this.w.keysAndValues]) tensor.dispose()
  }
}

/** `StepCondition` of all steps: `time` is f32 [steps·N, ΣO]. */
type ConditionTensors = StepCondition

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

  /** Runs the layers that depend on prompt or timestep only, for all steps. The result belongs to the caller, outside of any scope. */
  condition(inputs: UnetInputs, observe?: Observe): UnetCondition {
    const { prompt, pooled, timesteps } = inputs
    const images = this.checkInputs(inputs)
    const { device } = this.loader
    const tensors = scope(() => {
      const embedded = this.embedTime(inputs, observe)
      return {
        time: linear(embedded, this.w.time.weight, { bias: this.w.time.bias, out: 'f32' }), // [steps·N, ΣO]
        keysAndValues: this.w.keysAndValues.map(weight => linear(prompt, weight)), // [N·T, 2C]
        cuPrompt: cumulative(device, images, prompt.shape[0]! / images),
      }
    })
    return new UnetCondition(device, pooled.shape[0]!, timesteps.length, tensors)
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

  /** latents A [N, h, w, in_channels], scaled as the schedule says → what the model predicts at step `index`, A [N, h, w, out_channels]. */
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

async function loadUnet(loader: Loader, weights: Weights, config: UnetConfig) {
  const {
    in_channels,
    out_channels,
    block_out_channels,
    layers_per_block,
    down_block_types,
    up_block_types,
  } = config
  const { transformer_layers_per_block, attention_heads, time_cond_proj_dim } = config
  const [first, last] = [block_out_channels[0]!, block_out_channels.at(-1)!]
  const levels = block_out_channels.length
  const width = timeWidth(config)
  const condition = new ConditionLayers()
  const source = { loader, config, condition }
  const attentionAt = (level: number, type: string): BlockShape['attention'] =>
    type.startsWith('CrossAttn')
      ? { depth: transformer_layers_per_block[level]!, heads: attention_heads[level]! }
      : undefined

  const conv_in = loadConv(loader, under(weights, 'conv_in.'), in_channels, first)
  // Channels of the skip connections, in the order they are pushed.
  const skips = [first]
  const down_blocks: DownBlock[] = []
  for (const [level, out] of block_out_channels.entries()) {
    const [layers, downsample] = [layers_per_block[level]!, level < levels - 1]
    const attention = attentionAt(level, down_block_types[level]!)
    const shape = { in: skips.at(-1)!, out, attention, layers, downsample }
    down_blocks.push(await DownBlock.load(source, under(weights, `down_blocks.${level}.`), shape))
    skips.push(...Array<number>(layers + (downsample ? 1 : 0)).fill(out))
  }

  const mid = { in: last, out: last, attention: attentionAt(levels - 1, 'CrossAttn') }
  const mid_block = await MidBlock.load(source, under(weights, 'mid_block.'), mid)

  const up_blocks: UpBlock[] = []
  for (let i = 0; i < levels; i++) {
    const level = levels - 1 - i
    up_blocks.push(
      await UpBlock.load(source, under(weights, `up_blocks.${i}.`), {
        in: block_out_channels[Math.min(level + 1, levels - 1)]!,
        out: block_out_channels[level]!,
        attention: attentionAt(level, up_block_types[i]!),
        skips: skips.splice(-layers_per_block[level]! - 1).reverse(),
        upsample: level > 0,
      }),
    )
  }

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
function sideBySide(device: Device, a: Tensor, b: Tensor): Tensor {
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
