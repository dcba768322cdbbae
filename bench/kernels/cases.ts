// Mini-Gemini's ops at the sizes of its models, each with the least work it can be done with. The report runs them on the
// emulator, `npm run gpu:verify` on a GPU.
import type { Device } from '../../lib/device.ts'
import * as ops from '../../lib/ops.ts'
import { scope, type Tensor } from '../../lib/tensor.ts'
import { randomF32 } from '../harness.ts'

/** What an op cannot do without: every byte of operands and results once, and the products of the formula. */
export interface Work {
  bytes: number
  /** Of those, what every block of a kernel that deals rows out to blocks has to read for itself: weights of channels. */
  sharedBytes?: number
  /** On the tensor cores. */
  tensorFlops: number
}

export interface KernelCase {
  op: ops.OpName
  name: string
  work: Work
  /** A sample of the grid stands for all of it. Otherwise blocks differ, or later kernels follow what earlier ones wrote. */
  sampled: boolean
  /** The operation of one kernel of Triton's that stands beside this one, as tools/triton_kernels.py names it. */
  peers?: readonly string[]
  /** What bench/peers/torch_cuda.py times beside it on a GPU. */
  torch?: Readonly<Record<string, string | number | boolean>>
  /** Makes the operands; what it returns enqueues the op once. */
  prepare(make: Make): () => unknown
}

const BYTES = { f32: 4, bf16: 2 } as const
/** Bytes a weight: quantized ones come in blocks of 32, with an f16 scale, and a minimum for int4. */
const WEIGHT_BYTES = { bf16: 2, int8: 1 + 2 / 32, int4: 0.5 + 4 / 32 } as const
type Storage = keyof typeof WEIGHT_BYTES

/** Makes operands on a device. Numbers are uniform in ±scale; large tensors repeat the same 64 Ki of them. */
export class Make {
  readonly device: Device
  constructor(device: Device) {
    this.device = device
  }
  /** An activation. */
  a(shape: readonly number[], scale = 1): Tensor {
    // The upper halves of floats are the same numbers in bf16, cut off.
    const halves = new Uint16Array(numbers(scale).buffer).filter((_, i) => i % 2 === 1)
    return this.device.tensor(repeated(new Uint16Array(size(shape)), halves), shape, 'bf16')
  }
  f32(shape: readonly number[], scale = 1): Tensor {
    return this.device.tensor(repeated(new Float32Array(size(shape)), numbers(scale)), shape)
  }
  i32(values: Iterable<number>): Tensor {
    const data = Int32Array.from(values)
    return this.device.tensor(data, [data.length])
  }
  /** A packed matrix [n, k]; gated: [2n, k]. */
  weight(n: number, k: number, storage: Storage = 'bf16', gated = false): Tensor {
    const part = () => this.a([n, k], 0.03)
    return scope(() => ops.packLinear(gated ? [part(), part()] : part(), { dtype: storage, gated }))
  }
}

function size(shape: readonly number[]): number {
  return shape.reduce((a, b) => a * b, 1)
}

function numbers(scale: number): Float32Array {
  return randomF32(1 << 16, 7).map(value => value * scale)
}

function repeated<T extends Float32Array | Uint16Array>(data: T, unit: T): T {
  for (let at = 0; at < data.length; at += unit.length) data.set(unit.subarray(0, data.length - at), at)
  return data
}

/** Bytes of tensors of a dtype (activations if none is named). */
function bytes(shapes: readonly (readonly number[])[], dtype: keyof typeof BYTES = 'bf16'): number {
  return shapes.reduce((sum, shape) => sum + size(shape) * BYTES[dtype], 0)
}

interface LinearOptions {
  storage?: Storage
  gated?: boolean
  activation?: ops.Activation
  bias?: boolean
  scale?: boolean
  residual?: boolean
  out?: 'f32'
  peers?: readonly string[]
}

/** x [m, k] by a matrix of n result columns. */
function linear(
  name: string,
  [m, n, k]: readonly [number, number, number],
  options: LinearOptions = {},
): KernelCase {
  const { storage = 'bf16', gated = false, activation = 'none', out, peers } = options
  const columns = gated ? 2 * n : n
  return {
    op: 'linear',
    name: `${name} ${m}×${n}×${k}${storage === 'bf16' ? '' : ` ${storage}`}`,
    work: {
      bytes:
        bytes([[m, k]]) +
        columns * k * WEIGHT_BYTES[storage] +
        bytes([[m, n]], out ?? 'bf16') +
        (options.residual ? bytes([[m, n]]) : 0) +
        (options.bias ? 4 * columns : 0) +
        (options.scale ? 4 * n : 0),
      tensorFlops: 2 * m * columns * k,
    },
    sampled: true,
    ...(peers ? { peers } : {}),
    ...(storage === 'bf16' ? { torch: { kind: 'linear', m, n: columns, k } } : {}),
    prepare(make) {
      const x = make.a([m, k])
      const w = make.weight(n, k, storage, gated)
      const epilogue = {
        activation,
        bias: options.bias ? make.f32([columns]) : undefined,
        scale: options.scale ? make.f32([n]) : undefined,
        residual: options.residual ? make.a([m, n]) : undefined,
        ...(out ? { out } : {}),
      }
      return () => ops.linear(x, w, epilogue)
    },
  }
}

const MATMULS = ['matmul_128x128x32', 'matmul_128x128x32_8w', 'matmul_128x64x32', 'matmul_64x64x32']

function linears(): KernelCase[] {
  const decode = [1, 8].flatMap(batch =>
    (['bf16', 'int8', 'int4'] as const).flatMap(storage => [
      linear(`Gemma-2B gate·up, decode ${batch},`, [batch, 16384, 2048], {
        storage,
        gated: true,
        activation: 'gelu_tanh',
        ...(storage === 'bf16' ? { peers: ['matmul_16x64x128'] } : {}),
      }),
      linear(`Gemma-2B down, decode ${batch},`, [batch, 2048, 16384], { storage, residual: true }),
    ]),
  )
  return [
    linear('CLIP qkv', [577, 3072, 1024], { bias: true }),
    linear('CLIP fc1', [577, 4096, 1024], { bias: true, activation: 'quick_gelu' }),
    linear('CLIP fc2', [577, 1024, 4096], { bias: true, residual: true, peers: ['matmul_64x64x32'] }),
    linear('ConvNeXt pw1, stage 1,', [36864, 768, 192], { bias: true, activation: 'gelu' }),
    linear('ConvNeXt pw2, stage 1,', [36864, 192, 768], { bias: true, scale: true, residual: true }),
    linear('ConvNeXt pw1, stage 3,', [2304, 3072, 768], { bias: true, activation: 'gelu' }),
    linear('Gemma-2B qkv, prefill', [1024, 2560, 2048]),
    linear('Gemma-2B gate·up, prefill', [1024, 16384, 2048], {
      gated: true,
      activation: 'gelu_tanh',
      peers: MATMULS,
    }),
    linear('Gemma-2B gate·up, prefill', [1024, 16384, 2048], {
      gated: true,
      activation: 'gelu_tanh',
      storage: 'int8',
    }),
    linear('Gemma-2B gate·up, prefill', [1024, 16384, 2048], {
      gated: true,
      activation: 'gelu_tanh',
      storage: 'int4',
    }),
    linear('Gemma-2B down, prefill', [1024, 2048, 16384], { residual: true }),
    linear('Vicuna-7B gate·up, prefill', [1024, 11008, 4096], { gated: true, activation: 'silu' }),
    linear('Vicuna-7B down, prefill', [1024, 4096, 11008], { residual: true }),
    linear('SDXL qkv, 64×64,', [4096, 1920, 640]),
    linear('SDXL GEGLU, 64×64,', [4096, 2560, 640], { gated: true, activation: 'gelu', bias: true }),
    linear('SDXL GEGLU, 32×32,', [1024, 5120, 1280], { gated: true, activation: 'gelu', bias: true }),
    linear('SDXL feed-forward out, 32×32,', [1024, 1280, 5120], { bias: true, residual: true }),
    linear('SDXL keys·values of a prompt,', [77, 2560, 2048]),
    ...decode,
    linear('Vicuna-7B head, decode 8,', [8, 32000, 4096], { out: 'f32' }),
  ]
}

/** One sequence; `keys` of another than the queries' (cross-attention) are as many as said. */
function attention(
  name: string,
  [tokens, heads, kvHeads, d]: readonly [number, number, number, number],
  { causal = false, keys, peers }: { causal?: boolean; keys?: number; peers?: readonly string[] } = {},
): KernelCase {
  const pairs = causal ? (tokens * (tokens + 1)) / 2 : tokens * (keys ?? tokens)
  const [queries, context] = [`${tokens} tokens`, keys === undefined ? '' : ` to ${keys} keys`]
  return {
    op: 'attention',
    name: `${name} ${queries}${context}, ${heads}/${kvHeads} heads of ${d}${causal ? ', causal' : ''}`,
    work: {
      bytes: bytes([
        [2 * tokens, heads, d],
        [2 * (keys ?? tokens), kvHeads, d],
      ]),
      tensorFlops: 4 * pairs * heads * d,
    },
    // Blocks of whole tiles all do the same.
    sampled: !causal && tokens % 128 === 0,
    ...(peers ? { peers } : {}),
    torch: { kind: 'attention', tokens, keys: keys ?? tokens, heads, kvHeads, d, causal },
    prepare(make) {
      // Parts of packed projections, as the models have them.
      const part = (packed: Tensor, first: number, count: number) =>
        packed.narrow(1, first * d, count * d).reshape(packed.shape[0]!, count, d)
      const own = make.a([tokens, (heads + (keys === undefined ? 2 * kvHeads : 0)) * d])
      const [kv, before] = keys === undefined ? [own, heads] : [make.a([keys, 2 * kvHeads * d]), 0]
      const [q, k, v] = [part(own, 0, heads), part(kv, before, kvHeads), part(kv, before + kvHeads, kvHeads)]
      const cuQ = make.i32([0, tokens])
      const cuK = keys === undefined ? cuQ : make.i32([0, keys])
      return () => ops.attention(q, k, v, { cuQ, cuK, causal })
    },
  }
}

const PAGE = 16

/** `batch` sequences of `context` positions, the last `tokens` of which are new. */
function paged(
  name: string,
  [batch, tokens, context]: readonly [number, number, number],
  [heads, kvHeads, d]: readonly [number, number, number],
): KernelCase {
  const pairs = batch * (tokens * context - (tokens * (tokens - 1)) / 2)
  return {
    op: 'pagedAttention',
    name: `${name} ${batch}×${tokens} at ${context}, ${heads}/${kvHeads} heads of ${d}`,
    work: {
      bytes: bytes([
        [2 * batch * tokens, heads, d],
        [2 * batch * context, kvHeads, d],
      ]),
      tensorFlops: 4 * pairs * heads * d,
    },
    sampled: false,
    prepare(make) {
      const blocks = context / PAGE
      const q = make.a([batch * tokens, heads, d])
      const pages = [batch * blocks, kvHeads, PAGE, d]
      const [kPages, vPages] = [make.a(pages), make.a(pages)]
      // Pages of a sequence lie apart, as after some time of serving.
      const blockTable = make
        .i32(Array.from({ length: batch * blocks }, (_, i) => (i % blocks) * batch + Math.floor(i / blocks)))
        .reshape(batch, blocks)
      const cuQ = make.i32(Array.from({ length: batch + 1 }, (_, b) => b * tokens))
      const contextLens = make.i32(Array.from({ length: batch }, () => context))
      return () => ops.pagedAttention(q, kPages, vPages, { blockTable, cuQ, contextLens })
    },
  }
}

function rope(name: string, tokens: number, heads: number, kvHeads: number, d: number): KernelCase {
  const pages = [Math.ceil(tokens / PAGE), kvHeads, PAGE, d]
  return {
    op: 'ropeAndCache',
    name: `${name} ${tokens} tokens, ${heads}/${kvHeads} heads of ${d}`,
    work: { bytes: 2 * bytes([[tokens, heads + 2 * kvHeads, d]]) + 8 * tokens, tensorFlops: 0 },
    sampled: true,
    prepare(make) {
      const qkv = make.a([tokens, (heads + 2 * kvHeads) * d])
      const positions = make.i32(Array.from({ length: tokens }, (_, t) => t))
      const slots = make.i32(Array.from({ length: tokens }, (_, t) => t))
      const invFreq = make.f32([d / 2])
      const [kPages, vPages] = [make.a(pages), make.a(pages)]
      return () => ops.ropeAndCache(qkv, { positions, slots, invFreq, kPages, vPages })
    },
  }
}

function norms(): KernelCase[] {
  const norm = (
    op: 'rmsNorm' | 'layerNorm',
    name: string,
    tokens: number,
    channels: number,
    sum: boolean,
    peers?: readonly string[],
  ): KernelCase => ({
    op,
    name: `${name} ${tokens}×${channels}`,
    work: {
      bytes: bytes([[tokens * (sum ? 4 : 2), channels]]) + (op === 'layerNorm' ? 8 : 4) * channels,
      sharedBytes: (op === 'layerNorm' ? 8 : 4) * channels,
      tensorFlops: 0,
    },
    sampled: true,
    ...(peers ? { peers } : {}),
    ...(sum ? {} : { torch: { kind: op, tokens, channels } }),
    prepare(make) {
      const [x, residual] = [make.a([tokens, channels]), make.a([tokens, channels])]
      const [weight, bias] = [make.f32([channels]), make.f32([channels])]
      if (op === 'layerNorm')
        return () =>
          sum
            ? ops.addLayerNorm(x, residual, weight, bias, { eps: 1e-5 })
            : ops.layerNorm(x, weight, bias, { eps: 1e-5 })
      return () =>
        sum ? ops.addRmsNorm(x, residual, weight, { eps: 1e-6 }) : ops.rmsNorm(x, weight, { eps: 1e-6 })
    },
  })
  return [
    norm('layerNorm', 'CLIP', 577, 1024, false, ['layer_norm_1024']),
    norm('layerNorm', 'CLIP, with sum,', 577, 1024, true),
    norm('layerNorm', 'SDXL, 64×64,', 4096, 640, false),
    norm('rmsNorm', 'Gemma-2B, with sum,', 1024, 2048, true),
    norm('rmsNorm', 'Vicuna-7B, with sum,', 1024, 4096, true),
    norm('rmsNorm', 'Vicuna-7B, decode 8,', 8, 4096, true),
  ]
}

/** Of `more` further channels, as a UNet's decoder sees them. */
function groupNorm(
  name: string,
  [batch, side, channels, more]: readonly [number, number, number, number],
): KernelCase {
  const [x, rest] = [channels, more].map(c => [batch, side, side, c]) as [number[], number[]]
  return {
    op: 'groupNorm',
    name: `${name} ${batch}×${side}×${side}×${more ? `(${channels}+${more})` : channels}, SiLU`,
    work: { bytes: 2 * bytes([x, rest]) + 8 * (channels + more), tensorFlops: 0 },
    sampled: true,
    torch: { kind: 'groupNorm', batch, side, channels: channels + more },
    prepare(make) {
      const [a, b] = [make.a(x), more ? make.a(rest) : undefined]
      const [weight, bias] = [make.f32([channels + more]), make.f32([channels + more])]
      return () => ops.groupNorm(a, weight, bias, { groups: 32, eps: 1e-5, more: b, activation: 'silu' })
    },
  }
}

function mining(): KernelCase {
  const grid = 24
  const stages = [
    [1, 192, 192, 192],
    [1, 96, 96, 384],
    [1, 48, 48, 768],
    [1, 24, 24, 1536],
  ]
  const channels = 2880
  return {
    op: 'patchMining',
    name: `${grid}×${grid} queries over 192×192×${channels}`,
    work: {
      bytes: bytes([...stages, [grid * grid, channels]]) + 4 * grid * grid * (channels + 1),
      tensorFlops: 0,
    },
    sampled: false,
    prepare(make) {
      const g = make.f32([grid * grid, channels + 1])
      const maps = stages.map(shape => make.a(shape))
      return () => ops.patchMining(g, maps, { grid, scale: channels ** -0.5, eps: 1e-6 })
    },
  }
}

function depthwise(side: number, channels: number): KernelCase {
  const shape = [1, side, side, channels]
  return {
    op: 'depthwiseConvNorm',
    name: `ConvNeXt ${side}×${side}×${channels}, 7×7`,
    work: { bytes: 2 * bytes([shape]) + 4 * 52 * channels, tensorFlops: 0 },
    sampled: true,
    torch: { kind: 'depthwise', side, channels },
    prepare(make) {
      const x = make.a(shape)
      const w = make.f32([7, 7, channels])
      const [bias, normWeight, normBias] = [make.f32([channels]), make.f32([channels]), make.f32([channels])]
      return () => ops.depthwiseConvNorm(x, w, { bias, normWeight, normBias, eps: 1e-6 })
    },
  }
}

interface ConvShape {
  batch?: number
  side: number
  c: number
  o: number
  kernel: number
  stride?: number
  /** Before and after. */
  pad?: readonly [number, number]
  /** Nearest neighbour, in both directions, first. */
  times?: number
}

function conv(
  name: string,
  { batch = 1, side, c, o, kernel, stride = 1, pad = [0, 0], times = 1 }: ConvShape,
): KernelCase {
  const outSide = Math.floor((side * times + pad[0] + pad[1] - kernel) / stride) + 1
  const [rows, k] = [batch * outSide * outSide, kernel * kernel * c]
  const by = stride === 1 ? '' : ` by ${stride}`
  return {
    op: 'conv2d',
    name: `${name} ${batch > 1 ? `${batch}×` : ''}${side}×${side}×${c}${times > 1 ? ` ×${times}` : ''} → ${o}, ${kernel}×${kernel}${by}`,
    work: {
      bytes: bytes([
        [batch, side, side, c],
        [o, k],
        [rows, o],
      ]),
      tensorFlops: 2 * rows * o * k,
    },
    sampled: true,
    torch: { kind: 'conv2d', batch, side, c, o, kernel, stride, before: pad[0], after: pad[1], times },
    prepare(make) {
      const x = make.a([batch, side, side, c])
      const w = make.weight(o, k)
      const bias = make.f32([batch, o])
      const resize = times > 1 ? ([side * times, side * times] as const) : undefined
      return () => ops.conv2d(x, w, { bias, kernel: [kernel, kernel], stride, pad, resize })
    },
  }
}

/** 3×3, and as many pixels as there were. */
function convSame(name: string, shape: Omit<ConvShape, 'kernel' | 'pad'>): KernelCase {
  return conv(name, { ...shape, kernel: 3, pad: [1, 1] })
}

function mixtral(tokens: number): KernelCase {
  const [experts, k, hidden, intermediate] = [8, 2, 4096, 14336]
  const used = Math.min(experts, tokens * k)
  return {
    op: 'groupedLinear',
    name: `Mixtral-8x7B gate·up, ${tokens} tokens, ${k} of ${experts}`,
    work: {
      bytes: bytes([
        [tokens, hidden],
        [used * 2 * intermediate, hidden],
        [tokens * k, intermediate],
      ]),
      tensorFlops: 2 * tokens * k * 2 * intermediate * hidden,
    },
    sampled: false,
    prepare(make) {
      const x = make.a([tokens, hidden])
      // One matrix stands for all experts: what is counted is the same, and it fits in memory.
      const w = make.weight(intermediate, hidden, 'bf16', true)
      const ids = make.i32(Array.from({ length: tokens * k }, (_, i) => (i * 5) % experts)).reshape(tokens, k)
      return () =>
        ops.groupedLinear(
          x,
          Array.from({ length: experts }, () => w),
          ids,
          { activation: 'silu' },
        )
    },
  }
}

function sample(
  name: string,
  rows: number,
  vocab: number,
  settings: readonly number[],
  topK: number,
): KernelCase {
  return {
    op: 'sample',
    name: `${name} ${rows}×${vocab}`,
    work: { bytes: bytes([[rows, vocab]], 'f32'), tensorFlops: 0 },
    sampled: false,
    prepare(make) {
      const logits = make.f32([rows, vocab], 4)
      const options = make.device.tensor(
        Float32Array.from({ length: rows * 6 }, (_, i) => settings[i % 6]!),
        [rows, 6],
      )
      const state = make
        .i32(Array.from({ length: rows * 5 }, (_, i) => [topK, 1, 2, 3, 0][i % 5]!))
        .reshape(rows, 5)
      return () => ops.sample(logits, { options, state })
    },
  }
}

function simple(
  op: ops.OpName,
  name: string,
  least: number,
  prepare: (make: Make) => () => unknown,
): KernelCase {
  return { op, name, work: { bytes: least, tensorFlops: 0 }, sampled: true, prepare }
}

function streams(): KernelCase[] {
  const shape = [1024, 4096]
  const all = (dtype: keyof typeof BYTES) => bytes([shape], dtype)
  return [
    simple('cast', 'f32 → bf16 1024×4096', all('f32') + all('bf16'), make => {
      const x = make.f32(shape)
      return () => ops.cast(x, 'bf16')
    }),
    simple('permute', 'bf16 4096×1024 transposed', 2 * all('bf16'), make => {
      const x = make.a(shape)
      return () => ops.permute(x, [1, 0])
    }),
    simple('embedding', 'Vicuna-7B 1024 ids of 32000×4096', 2 * all('bf16') + 4096, make => {
      const table = make.a([32000, 4096])
      const ids = make.i32(Array.from({ length: 1024 }, (_, i) => (i * 7919) % 32000))
      return () => ops.embedding(table, ids, { out: 'bf16' })
    }),
    simple('spliceEmbeddings', 'Vicuna-7B 576 image tokens among 1024', 2 * all('bf16') + 4096, make => {
      const [text, image] = [make.a(shape), make.a([576, 4096])]
      const index = make.i32(Array.from({ length: 1024 }, (_, p) => (p >= 40 && p < 616 ? 39 - p : p)))
      return () => ops.spliceEmbeddings(text, image, index)
    }),
    simple(
      'resizeBilinear',
      '768×768×3 → 336×336',
      bytes([
        [768, 768, 3],
        [336, 336, 3],
      ]),
      make => {
        const x = make.a([1, 768, 768, 3])
        return () => ops.resizeBilinear(x, 336, 336)
      },
    ),
    simple('moeRoute', 'Mixtral-8x7B 1024 tokens, 2 of 8', 1024 * 4 * (8 + 2 + 2), make => {
      const logits = make.f32([1024, 8])
      return () => ops.moeRoute(logits, 2)
    }),
    simple('packLinear', 'bf16 4096×4096', 2 * bytes([[4096, 4096]]), make => {
      const w = make.a([4096, 4096])
      return () => ops.packLinear(w)
    }),
    simple('packLinear', 'int4 4096×4096', 4096 * 4096 * (2 + WEIGHT_BYTES.int4), make => {
      const w = make.a([4096, 4096])
      return () => ops.packLinear(w, { dtype: 'int4' })
    }),
  ]
}

/** What goes on around a UNet's step and a VAE at 1024×1024. */
function images(): KernelCase[] {
  const latents = [2, 128, 128, 4]
  const [image, tile] = [
    [1, 1024, 1024, 3],
    [1, 512, 512, 3],
  ] as const
  const half = bytes([latents])
  return [
    // x, out and predicted; both halves of the model's result and of its next input.
    simple('schedulerStep', `${latents.join('×')}, guided`, 3 * bytes([latents], 'f32') + 4 * half, make => {
      const x = make.f32(latents)
      const model = make.a([4, ...latents.slice(1)])
      const coefficients = make.f32([2, 8])
      return () => ops.schedulerStep(x, { coefficients, model, halves: 2, input: 'bf16' })
    }),
    simple('randomNormal', latents.join('×'), bytes([latents], 'f32'), make => {
      const seeds = make.i32([1, 2, 3, 4, 5, 6]).reshape(2, 3)
      return () => ops.randomNormal(seeds, latents.slice(1))
    }),
    simple('toUint8', '1024×1024×3', bytes([image]) + size(image), make => {
      const x = make.a(image)
      return () => ops.toUint8(x, { scale: 127.5, offset: 127.5 })
    }),
    simple('addTile', '512×512×3', 2 * bytes([tile], 'f32') + bytes([tile]), make => {
      const [canvas, x] = [make.f32(image), make.a(tile)]
      const [rows, columns] = [make.f32([512]), make.f32([512])]
      return () => ops.addTile(canvas, x, { rows, columns, y: 256, x: 384 })
    }),
  ]
}

export const CASES: readonly KernelCase[] = [
  ...linears(),
  attention('CLIP', [577, 16, 16, 64], { peers: ['flash_attention_64'] }),
  attention('Vicuna-7B prefill', [1024, 32, 32, 128], { causal: true, peers: ['flash_attention_128'] }),
  attention('Gemma-2B prefill', [1024, 8, 1, 256], { causal: true, peers: ['flash_attention_256'] }),
  attention('SDXL, 64×64,', [4096, 10, 10, 64], { peers: ['flash_attention_64'] }),
  attention('SDXL, 32×32,', [1024, 20, 20, 64]),
  attention('SDXL, 64×64, prompt,', [4096, 10, 10, 64], { keys: 77 }),
  attention('SDXL, 32×32, prompt,', [1024, 20, 20, 64], { keys: 77 }),
  attention('SDXL VAE, 128×128,', [16384, 1, 1, 512], { peers: ['flash_attention_512'] }),
  paged('Gemma-2B decode', [1, 1, 1024], [8, 1, 256]),
  paged('Gemma-2B decode', [8, 1, 1024], [8, 1, 256]),
  paged('Vicuna-7B decode', [8, 1, 1024], [32, 32, 128]),
  paged('Gemma-2B chunk', [1, 256, 1024], [8, 1, 256]),
  mining(),
  depthwise(192, 192),
  depthwise(96, 384),
  depthwise(48, 768),
  depthwise(24, 1536),
  conv('CLIP patches', { side: 336, c: 3, o: 1024, kernel: 14, stride: 14 }),
  conv('ConvNeXt stem', { side: 768, c: 3, o: 192, kernel: 4, stride: 4 }),
  conv('ConvNeXt downsampling', { side: 192, c: 192, o: 384, kernel: 2, stride: 2 }),
  convSame('SDXL first layer', { batch: 2, side: 128, c: 4, o: 320 }),
  convSame('SDXL', { batch: 2, side: 128, c: 320, o: 320 }),
  convSame('SDXL downsampling', { batch: 2, side: 128, c: 320, o: 320, stride: 2 }),
  convSame('SDXL', { batch: 2, side: 64, c: 640, o: 640 }),
  convSame('SDXL', { batch: 2, side: 32, c: 1280, o: 1280 }),
  convSame('SDXL upsampling', { batch: 2, side: 32, c: 1280, o: 1280, times: 2 }),
  convSame('SDXL last layer', { batch: 2, side: 128, c: 320, o: 4 }),
  convSame('VAE', { side: 128, c: 512, o: 512 }),
  convSame('VAE upsampling', { side: 256, c: 512, o: 512, times: 2 }),
  convSame('VAE', { side: 1024, c: 128, o: 128 }),
  convSame('VAE last layer', { side: 1024, c: 128, o: 3 }),
  mixtral(1),
  mixtral(64),
  ...norms(),
  groupNorm('SDXL', [2, 128, 320, 0]),
  groupNorm('SDXL', [2, 128, 640, 320]),
  groupNorm('SDXL', [2, 64, 640, 0]),
  groupNorm('SDXL', [2, 32, 1280, 1280]),
  groupNorm('SDXL', [2, 16, 1280, 0]),
  groupNorm('VAE', [1, 1024, 128, 0]),
  rope('Gemma-2B', 1024, 8, 1, 256),
  rope('Vicuna-7B', 1024, 32, 32, 128),
  ...streams(),
  ...images(),
  sample('greedy', 1, 256000, [0, 1, 0, 1, 0, 0], 0),
  sample('top-p 0.9, top-k 40', 8, 32000, [0.8, 0.9, 0, 1, 0, 0], 40),
]

/** Names are what a run is asked for by, so they must differ. */
export function caseKey(kernelCase: KernelCase): string {
  return `${kernelCase.op}: ${kernelCase.name}`
}
