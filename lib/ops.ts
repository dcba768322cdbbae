import { native } from './native.ts'
import { type DType, Tensor } from './tensor.ts'

/** What activations are stored as: f32 on the CPU; bf16 or f16 on a GPU, whose ops without matrix products take f32 too. */
export type ActivationType = 'f32' | 'bf16' | 'f16'

export type Activation = 'none' | 'gelu' | 'gelu_tanh' | 'quick_gelu' | 'silu'

/**
 * The op table: parameter names in the addon's order, with their types. A test holds it against native/ops.cpp, and
 * `call` refuses to run an op whose row differs.
 */
export const OPS = {
  cast: 'x:tensor dtype:dtype',
  permute: 'x:tensor dims:int[]',
  scaleColumns: 'w:tensor scale:tensor',
  packLinear: 'weights:tensor[] dtype:dtype gated:bool',
  linear: 'x:tensor w:tensor bias:tensor? scale:tensor? residual:tensor? activation:activation out:dtype',
  moeRoute: 'logits:tensor topK:int',
  groupedLinear: 'x:tensor w:tensor[] ids:tensor weights:tensor? residual:tensor? activation:activation',
  conv2d:
    'x:tensor w:tensor bias:tensor? scale:tensor? residual:tensor? kernel:int[] stride:int pad:int[] resize:int[] activation:activation',
  depthwiseConvNorm: 'x:tensor w:tensor bias:tensor normWeight:tensor normBias:tensor eps:float',
  rmsNorm: 'x:tensor weight:tensor residual:tensor? eps:float weightOffset:float',
  layerNorm: 'x:tensor weight:tensor bias:tensor residual:tensor? eps:float',
  groupNorm: 'x:tensor more:tensor? weight:tensor bias:tensor groups:int eps:float activation:activation',
  attention: 'q:tensor k:tensor v:tensor cuQ:tensor cuK:tensor scale:float causal:bool',
  pagedAttention:
    'q:tensor kPages:tensor vPages:tensor blockTable:tensor cuQ:tensor contextLens:tensor scale:float',
  ropeAndCache: 'qkv:tensor positions:tensor slots:tensor invFreq:tensor kPages:tensor vPages:tensor',
  patchMining: 'g:tensor stages:tensor[] grid:int downscale:int eps:float scale:float',
  resizeBilinear: 'x:tensor height:int width:int',
  embedding: 'table:tensor ids:tensor scale:float out:dtype',
  spliceEmbeddings: 'text:tensor image:tensor index:tensor',
  sample: 'logits:tensor options:tensor state:tensor history:tensor? mask:tensor? topLogprobs:int',
  schedulerStep:
    'x:tensor model:tensor? coefficients:tensor previous:tensor? noise:tensor? halves:int input:dtype',
  randomNormal: 'seeds:tensor shape:int[]',
  toUint8: 'x:tensor scale:float offset:float',
  addTile: 'canvas:tensor tile:tensor rows:tensor columns:tensor y:int x:int',
} as const

export type OpName = keyof typeof OPS

let indexOf: Map<string, number> | undefined

function call(
  name: OpName,
  ...args: (Tensor | readonly Tensor[] | undefined | number | string | boolean | readonly number[])[]
): Tensor[] {
  const addon = native()
  indexOf ??= new Map(addon.opTable().map((op, index) => [op.name, index]))
  const handles = args.map(arg =>
    arg instanceof Tensor
      ? arg.alive().handle
      : Array.isArray(arg) && arg[0] instanceof Tensor
        ? (arg as Tensor[]).map(tensor => tensor.alive().handle)
        : arg,
  )
  return addon.call(indexOf.get(name)!, handles).map(handle => new Tensor(handle))
}

function one(results: Tensor[]): Tensor {
  return results[0]!
}

/** A contiguous copy of `x` (any strides) as `dtype`; f32, bf16 and f16 convert to each other, others copy only. */
export function cast(x: Tensor, dtype: DType): Tensor {
  return one(call('cast', x, dtype))
}

/** A contiguous copy of `x` with dimension i taken from `dims[i]` of `x`. */
export function permute(x: Tensor, dims: readonly number[]): Tensor {
  return one(call('permute', x, dims))
}

/** `w[n, k] * scale[k]`, [N, K] of w's type. */
export function scaleColumns(w: Tensor, scale: Tensor): Tensor {
  return one(call('scaleColumns', w, scale))
}

export interface PackOptions {
  /** Storage type, default that of the first weight; int8 and int4 are quantized in blocks of 32 along K. */
  dtype?: DType
  /** The stacked matrix is [gate; up] and its `linear` computes act(x gateᵀ) ⊙ (x upᵀ). */
  gated?: boolean
}

/**
 * Stacks weight matrices [N_i, K] (f32, bf16, f16) along N and stores them in the backend's order for `linear`,
 * `groupedLinear`, `conv2d` and `embedding`. The result has shape [ΣN_i, K].
 */
export function packLinear(weights: Tensor | readonly Tensor[], options: PackOptions = {}): Tensor {
  const list = weights instanceof Tensor ? [weights] : weights
  return one(call('packLinear', list, options.dtype ?? list[0]!.dtype, options.gated ?? false))
}

export interface Epilogue {
  /** [N] (gated: [2N]). */
  bias?: Tensor | undefined
  /** [N], multiplied after the activation: ConvNeXt's layer scale. */
  scale?: Tensor | undefined
  /** [R, N] with M a multiple of R; row m gets row m mod R added. */
  residual?: Tensor | undefined
  /** Default 'none'. 'gelu' is the exact one (erf). */
  activation?: Activation | undefined
}

/**
 * residual + scale ⊙ act(x Wᵀ + bias). x [M, K] (rows may be strided), w packed [N, K] → [M, N] of x's type, or f32 where
 * `out` says so.
 */
export function linear(x: Tensor, w: Tensor, epilogue: Epilogue & { out?: 'f32' } = {}): Tensor {
  const { bias, scale, residual, activation = 'none', out = x.dtype } = epilogue
  return one(call('linear', x, w, bias, scale, residual, activation, out))
}

/** Softmax over the experts, the k largest renormalized to sum 1. logits [T, E] → weights f32 [T, k], ids i32 [T, k]. (Mixtral) */
export function moeRoute(logits: Tensor, topK: number): { weights: Tensor; ids: Tensor } {
  const [weights, ids] = call('moeRoute', logits, topK)
  return { weights: weights!, ids: ids! }
}

/**
 * One linear an expert. Without `weights`: x [T, K] → [T·k, N], row t·k+j by expert ids[t, j]. With `weights` [T, k]:
 * x [T·k, K] → [T, N], row t the weighted sum of its k rows, plus `residual`.
 */
export function groupedLinear(
  x: Tensor,
  w: readonly Tensor[],
  ids: Tensor,
  options: { weights?: Tensor; residual?: Tensor; activation?: Activation } = {},
): Tensor {
  return one(
    call('groupedLinear', x, w, ids, options.weights, options.residual, options.activation ?? 'none'),
  )
}

export interface Conv2dOptions extends Epilogue {
  /** [O], or [B, O] with a row for each image (a UNet's time embedding); rows may be strided. */
  bias?: Tensor | undefined
  kernel: readonly [number, number]
  /** Default 1. */
  stride?: number
  /** Zeros around the image: one number, or those above and left, then those below and right. Default 0. */
  pad?: number | readonly [number, number]
  /** Height and width that x is resized to first, by nearest neighbour; the resized image is never stored. */
  resize?: readonly [number, number] | undefined
}

/**
 * 2-D convolution. x [B, H, W, C]; w packed [O, kh·kw·C], i.e. `permute(weight, [0, 2, 3, 1])` flattened → [B, OH, OW, O].
 * residual [R, O] is added to output position r (over B·OH·OW) from row r mod R.
 */
export function conv2d(x: Tensor, w: Tensor, options: Conv2dOptions): Tensor {
  const { bias, scale, residual, activation = 'none', kernel, stride = 1, pad = 0, resize = [] } = options
  const zeros = typeof pad === 'number' ? [pad, pad] : pad
  return one(call('conv2d', x, w, bias, scale, residual, kernel, stride, zeros, resize, activation))
}

/**
 * GroupNorm of each image, with SiLU if asked for: mean and variance over all pixels and the channels of a group.
 * x [B, H, W, C] and `more` [B, H, W, C2] are taken as one image of C + C2 channels; weight and bias f32 [C + C2] →
 * [B, H, W, C + C2].
 */
export function groupNorm(
  x: Tensor,
  weight: Tensor,
  bias: Tensor,
  options: { groups: number; eps: number; more?: Tensor | undefined; activation?: 'none' | 'silu' },
): Tensor {
  const { groups, eps, more, activation = 'none' } = options
  return one(call('groupNorm', x, more, weight, bias, groups, eps, activation))
}

/** LayerNorm over channels of a depthwise convolution with "same" zero padding. x [B, H, W, C], w [kh, kw, C] f32. (ConvNeXt block) */
export function depthwiseConvNorm(
  x: Tensor,
  w: Tensor,
  options: { bias: Tensor; normWeight: Tensor; normBias: Tensor; eps: number },
): Tensor {
  return one(call('depthwiseConvNorm', x, w, options.bias, options.normWeight, options.normBias, options.eps))
}

/** x / rms(x) ⊙ (weight + weightOffset) over the last dimension. x [T, C]. Gemma: weightOffset 1. */
export function rmsNorm(x: Tensor, weight: Tensor, options: { eps: number; weightOffset?: number }): Tensor {
  return one(call('rmsNorm', x, weight, undefined, options.eps, options.weightOffset ?? 0))
}

/** `rmsNorm(x + residual)` and the sum itself. */
export function addRmsNorm(
  x: Tensor,
  residual: Tensor,
  weight: Tensor,
  options: { eps: number; weightOffset?: number },
): { normed: Tensor; sum: Tensor } {
  const [normed, sum] = call('rmsNorm', x, weight, residual, options.eps, options.weightOffset ?? 0)
  return { normed: normed!, sum: sum! }
}

/** LayerNorm over the last dimension. x [T, C]. */
export function layerNorm(x: Tensor, weight: Tensor, bias: Tensor, options: { eps: number }): Tensor {
  return one(call('layerNorm', x, weight, bias, undefined, options.eps))
}

/** `layerNorm(x + residual)` and the sum itself. */
export function addLayerNorm(
  x: Tensor,
  residual: Tensor,
  weight: Tensor,
  bias: Tensor,
  options: { eps: number },
): { normed: Tensor; sum: Tensor } {
  const [normed, sum] = call('layerNorm', x, weight, bias, residual, options.eps)
  return { normed: normed!, sum: sum! }
}

/**
 * Varlen softmax attention. q [Tq, H, D], k and v [Tk, KV, D] (rows may be strided), cuQ and cuK i32 [B+1] → [Tq, H, D].
 * scale defaults to 1/√D. Causal masks align the ends of queries and keys.
 */
export function attention(
  q: Tensor,
  k: Tensor,
  v: Tensor,
  options: { cuQ: Tensor; cuK?: Tensor; scale?: number; causal?: boolean },
): Tensor {
  const scale = options.scale ?? 1 / Math.sqrt(q.shape[2]!)
  return one(
    call('attention', q, k, v, options.cuQ, options.cuK ?? options.cuQ, scale, options.causal ?? false),
  )
}

/**
 * Causal attention of each sequence's newest queries over its KV pages. q [T, H, D], pages [P, KV, pageSize, D],
 * blockTable i32 [B, maxBlocks], cuQ i32 [B+1], contextLens i32 [B] (new tokens included) → [T, H, D].
 */
export function pagedAttention(
  q: Tensor,
  kPages: Tensor,
  vPages: Tensor,
  options: { blockTable: Tensor; cuQ: Tensor; contextLens: Tensor; scale?: number },
): Tensor {
  const scale = options.scale ?? 1 / Math.sqrt(q.shape[2]!)
  return one(
    call('pagedAttention', q, kPages, vPages, options.blockTable, options.cuQ, options.contextLens, scale),
  )
}

/**
 * Rotary embedding (halves rotated) of the q and k parts of qkv [T, (H+2·KV)·D]; k and v are written to their slots of
 * the pages (slot = page · pageSize + offset, negative: nowhere). positions, slots i32 [T]; invFreq f32 [D/2] → q [T, H, D].
 */
export function ropeAndCache(
  qkv: Tensor,
  options: { positions: Tensor; slots: Tensor; invFreq: Tensor; kPages: Tensor; vPages: Tensor },
): Tensor {
  return one(
    call(
      'ropeAndCache',
      qkv,
      options.positions,
      options.slots,
      options.invFreq,
      options.kPages,
      options.vPages,
    ),
  )
}

/**
 * The fused middle of patch info mining (docs/architecture.md, section 4; MGM paper, section 3.2).
 * g [B·grid², C] are the queries carried through both projections and γ_k; stages are the four ConvNeXt maps
 * [B, H_s, W_s, c_s] with Σc_s = C. g may have one more column, a bias that is added to the scores of
 * its row. Result [B·grid², C]: Σ_p a(p) r(p) (x(p) − μ(p)) for each query's window.
 * `downscale` > 1 mines the map bilinearly scaled by 1/downscale (the HD global view).
 */
export function patchMining(
  g: Tensor,
  stages: readonly Tensor[],
  options: { grid: number; scale: number; eps: number; downscale?: number },
): Tensor {
  return one(call('patchMining', g, stages, options.grid, options.downscale ?? 1, options.eps, options.scale))
}

/** Bilinear resize, align_corners=false, no antialias (torch.nn.functional.interpolate). x [B, H, W, C] → [B, height, width, C]. */
export function resizeBilinear(x: Tensor, height: number, width: number): Tensor {
  return one(call('resizeBilinear', x, height, width))
}

/**
 * scale · table[ids]; a negative id gives a row of zeros. table [V, C] (any float dtype, or packed), ids i32 [T] →
 * [T, C] of type `out`, which on the CPU is f32.
 */
export function embedding(
  table: Tensor,
  ids: Tensor,
  options: { scale?: number; out?: ActivationType } = {},
): Tensor {
  return one(call('embedding', table, ids, options.scale ?? 1, options.out ?? 'f32'))
}

/** Row p is text[index[p]], or image[−1 − index[p]] where index[p] is negative. text [T, C], image [M, C], index i32 [P] → [P, C]. */
export function spliceEmbeddings(text: Tensor, image: Tensor, index: Tensor): Tensor {
  return one(call('spliceEmbeddings', text, image, index))
}

/**
 * One next token a row. logits f32 [B, V]; options f32 [B, 6]: temperature, top_p, min_p, repetition, presence, frequency
 * penalties (off: 0, 1, 0, 1, 0, 0); state i32 [B, 5]: top_k (0 off), seed low and high, step, history length;
 * history i32 [B, H]; mask u8 [B, ⌈V/8⌉]. ids i32 [B] (−1: NaN logits, or nothing allowed), logprobs f32 [B, 1+n], topIds i32 [B, n].
 */
export function sample(
  logits: Tensor,
  options: {
    options: Tensor
    state: Tensor
    history?: Tensor | undefined
    mask?: Tensor | undefined
    topLogprobs?: number
  },
): { ids: Tensor; logprobs: Tensor; topIds: Tensor | undefined } {
  const [ids, logprobs, topIds] = call(
    'sample',
    logits,
    options.options,
    options.state,
    options.history,
    options.mask,
    options.topLogprobs ?? 0,
  )
  return { ids: ids!, logprobs: logprobs!, topIds }
}

/**
 * One step of a diffusion sampler, as a linear combination. Row b of `coefficients` f32 [B, 8]: guidance g, then p_x, p_m,
 * c_x, c_m, c_p, c_n, s. x f32 [B, H, W, C]; model [halves·B, H, W, C] of type `input`, of two halves the first without
 * the prompt; previous and noise f32 like x. Absent terms are zero.
 *
 *     m = model, or model[b] + g · (model[B + b] − model[b])
 *     predicted = p_x·x + p_m·m          f32, if there is a model
 *     out = c_x·x + c_m·m + c_p·previous + c_n·noise          f32
 *     input = s·out          [halves·B, H, W, C] of type `input`, both halves equal
 */
export function schedulerStep(
  x: Tensor,
  options: {
    coefficients: Tensor
    model?: Tensor | undefined
    previous?: Tensor | undefined
    noise?: Tensor | undefined
    halves: 1 | 2
    input: ActivationType
  },
): { out: Tensor; input: Tensor; predicted: Tensor | undefined } {
  const { model, coefficients, previous, noise, halves } = options
  const [out, input, predicted] = call(
    'schedulerStep',
    x,
    model,
    coefficients,
    previous,
    noise,
    halves,
    options.input,
  )
  return { out: out!, input: input!, predicted }
}

/**
 * Standard normal numbers, f32 [B, ...shape]; a row depends on its seed alone. seeds i32 [B, 3]: key low, key high,
 * stream. (Philox4x32-10 and Box-Muller; native/ops.h has the formula.)
 */
export function randomNormal(seeds: Tensor, shape: readonly number[]): Tensor {
  return one(call('randomNormal', seeds, shape))
}

/** scale · x + offset, clamped to 0…255 and rounded (ties to even) → u8 of x's shape. NaN gives 0. */
export function toUint8(x: Tensor, options: { scale: number; offset: number }): Tensor {
  return one(call('toUint8', x, options.scale, options.offset))
}

/**
 * Adds a weighted tile to a canvas in place: canvas[b, y+i, x+j] += rows[i] · columns[j] · tile[b, i, j]. canvas f32
 * [B, H, W, C], tile [B, h, w, C], rows f32 [h], columns f32 [w].
 */
export function addTile(
  canvas: Tensor,
  tile: Tensor,
  options: { rows: Tensor; columns: Tensor; y: number; x: number },
): void {
  call('addTile', canvas, tile, options.rows, options.columns, options.y, options.x)
}
