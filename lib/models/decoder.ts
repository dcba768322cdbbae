import type { MgmConfig } from '../checkpoint/config.ts'
import { copyTo, type Device } from '../device.ts'
import { expected, MgmError } from '../errors.ts'
import {
  type Activation,
  type ActivationType,
  embedding,
  groupedLinear,
  linear,
  moeRoute,
  packLinear,
  pagedAttention,
  rmsNorm,
  ropeAndCache,
  scaleColumns,
} from '../ops.ts'
import { scope, type Tensor } from '../tensor.ts'
import { activationOf, advance, type Loader, type Observe, under, type Weights } from './loader.ts'

/** What a decoder needs of the checkpoint's `config.json`. */
export type DecoderConfig = Pick<
  MgmConfig,
  | 'family'
  | 'hidden_size'
  | 'intermediate_size'
  | 'num_hidden_layers'
  | 'num_attention_heads'
  | 'num_key_value_heads'
  | 'head_dim'
  | 'hidden_act'
  | 'rms_norm_eps'
  | 'rope_theta'
  | 'rope_scaling'
  | 'tie_word_embeddings'
  | 'num_local_experts'
  | 'num_experts_per_tok'
>

export type KvDType = 'f32' | 'bf16' | 'f16'

/** Keys and values of all layers, in pages that sequences share out among them. */
export class KvCache {
  readonly pages: number
  readonly pageSize: number
  readonly layers: readonly { kPages: Tensor; vPages: Tensor }[]

  /** `pages` pages of `pageSize` positions, each layer's on its device; contents are undefined until written. */
  constructor(
    devices: readonly Device[],
    config: DecoderConfig,
    pages: number,
    pageSize: number,
    dtype: KvDType,
  ) {
    if (!Number.isInteger(pages) || pages < 1) throw expected('a positive integer', 'pages', pages)
    if (!Number.isInteger(pageSize) || pageSize < 1)
      throw expected('a positive integer', 'pageSize', pageSize)
    this.pages = pages
    this.pageSize = pageSize
    const shape = [pages, config.num_key_value_heads, pageSize, config.head_dim]
    const layers: { kPages: Tensor; vPages: Tensor }[] = []
    try {
      for (const [i, device] of devices.entries()) {
        const kPages = device.empty(shape, dtype)
        layers.push({ kPages, vPages: kPages }) // so that kPages is freed if vPages cannot be had
        layers[i] = { kPages, vPages: device.empty(shape, dtype) }
      }
    } catch (error) {
      for (const { kPages, vPages } of layers) for (const page of [kPages, vPages]) page.dispose()
      throw error
    }
    this.layers = layers
  }

  /** Bytes of one page in all layers, keys and values. */
  static bytesPerPage(config: DecoderConfig, pageSize: number, dtype: KvDType): number {
    const { num_hidden_layers, num_key_value_heads, head_dim } = config
    return 2 * num_hidden_layers * num_key_value_heads * pageSize * head_dim * (dtype === 'f32' ? 4 : 2)
  }

  dispose(): void {
    for (const { kPages, vPages } of this.layers) {
      kPages.dispose()
      vPages.dispose()
    }
  }
}

/** One step of several sequences: their new tokens packed one after the other. */
export interface DecoderBatch {
  /** [T, hidden], as embedded (Gemma: before the scale). */
  embeds: Tensor
  /** i32 [T] position of each token in its own sequence. */
  positions: Tensor
  /** i32 [T] page · pageSize + offset where its key and value go. */
  slots: Tensor
  /** i32 [B, maxBlocks] pages of each sequence. */
  blockTable: Tensor
  /** i32 [B+1] where each sequence's new tokens end. */
  cuQ: Tensor
  /** i32 [B] tokens of each sequence, the new ones included. */
  contextLens: Tensor
  /** i32 [R] rows of T whose logits are wanted. */
  logitRows: Tensor
}

/** x ↦ x + down(act(gate x) ⊙ up x). Source: `LlamaMLP`, `GemmaMLP` of transformers. */
class GatedMlp {
  private readonly activation: Activation
  private readonly gateUp: Tensor
  private readonly down: Tensor

  constructor(loader: Loader, weights: Weights, config: DecoderConfig) {
    const { hidden_size: hidden, intermediate_size: inner } = config
    this.activation = activationOf(config.hidden_act)
    const gateUp = ['gate_proj', 'up_proj'].map(name => weights.take(`mlp.${name}.weight`, [inner, hidden]))
    this.gateUp = loader.linear(gateUp, { gated: true, quantizable: true })
    this.down = loader.linear(weights.take('mlp.down_proj.weight', [hidden, inner]), { quantizable: true })
  }

  forward(normed: Tensor, residual: Tensor): Tensor {
    const inner = linear(normed, this.gateUp, { activation: this.activation }) // [T, I]
    return linear(inner, this.down, { residual })
  }
}

/** The same with k of E experts for each token. Source: `MixtralSparseMoeBlock` of transformers. */
class MixtureMlp {
  private readonly activation: Activation
  private readonly topK: number
  private readonly gate: Tensor
  private readonly w13: readonly Tensor[]
  private readonly w2: readonly Tensor[]

  constructor(loader: Loader, weights: Weights, config: DecoderConfig) {
    const { hidden_size: hidden, intermediate_size: inner, num_local_experts: count = 8 } = config
    this.activation = activationOf(config.hidden_act)
    this.topK = config.num_experts_per_tok ?? 2
    const moe = under(weights, 'block_sparse_moe.')
    const experts = Array.from({ length: count }, (_, e) => under(moe, `experts.${e}.`))
    // Near ties decide which expert runs, so the router is never quantized.
    this.gate = loader.linear(moe.take('gate.weight', [count, hidden]))
    this.w13 = experts.map(expert =>
      loader.linear(
        ['w1', 'w3'].map(name => expert.take(`${name}.weight`, [inner, hidden])),
        { gated: true, quantizable: true },
      ),
    )
    this.w2 = experts.map(expert =>
      loader.linear(expert.take('w2.weight', [hidden, inner]), { quantizable: true }),
    )
  }

  forward(normed: Tensor, residual: Tensor): Tensor {
    const { weights, ids } = moeRoute(linear(normed, this.gate, { out: 'f32' }), this.topK) // [T, k]
    const inner = groupedLinear(normed, this.w13, ids, { activation: this.activation }) // [T·k, I]
    return groupedLinear(inner, this.w2, ids, { weights, residual }) // [T, hidden]
  }
}

class DecoderLayer {
  readonly device: Device
  private readonly invFreq: Tensor
  private readonly norm: { eps: number; weightOffset: number }
  private readonly inputNorm: Tensor
  private readonly qkv: Tensor
  private readonly out: Tensor
  private readonly postAttentionNorm: Tensor
  private readonly mlp: GatedMlp | MixtureMlp

  constructor(loader: Loader, weights: Weights, config: DecoderConfig) {
    const { hidden_size: hidden, head_dim, num_attention_heads, num_key_value_heads } = config
    const [q, kv] = [num_attention_heads * head_dim, num_key_value_heads * head_dim]
    const attention = under(weights, 'self_attn.')
    this.device = loader.device
    this.invFreq = inverseFrequencies(loader, config)
    this.norm = normOptions(config)
    this.inputNorm = loader.f32(weights.take('input_layernorm.weight', [hidden]))
    this.qkv = loader.linear(
      [
        attention.take('q_proj.weight', [q, hidden]),
        attention.take('k_proj.weight', [kv, hidden]),
        attention.take('v_proj.weight', [kv, hidden]),
      ],
      { quantizable: true },
    )
    this.out = loader.linear(attention.take('o_proj.weight', [hidden, q]), { quantizable: true })
    this.postAttentionNorm = loader.f32(weights.take('post_attention_layernorm.weight', [hidden]))
    this.mlp =
      config.family === 'mixtral'
        ? new MixtureMlp(loader, weights, config)
        : new GatedMlp(loader, weights, config)
  }

  /** x [T, hidden] → [T, hidden]; writes the new keys and values to the pages. */
  forward(x: Tensor, batch: DecoderBatch, pages: { kPages: Tensor; vPages: Tensor }): Tensor {
    const { invFreq } = this
    const tokens = x.shape[0]!

    // Attention.
    const qkv = linear(rmsNorm(x, this.inputNorm, this.norm), this.qkv) // [T, (H + 2·KV)·D]
    const q = ropeAndCache(qkv, { ...batch, ...pages, invFreq }) // [T, H, D]
    const attended = pagedAttention(q, pages.kPages, pages.vPages, batch).reshape(tokens, -1)
    const h = linear(attended, this.out, { residual: x })

    // MLP.
    return this.mlp.forward(rmsNorm(h, this.postAttentionNorm, this.norm), h)
  }
}

/** Gemma stores its norm weights as differences from one. */
function normOptions(config: DecoderConfig): { eps: number; weightOffset: number } {
  return { eps: config.rms_norm_eps, weightOffset: config.family === 'gemma' ? 1 : 0 }
}

/**
 * The language model: Llama (Vicuna, Yi), Mistral, Gemma or Mixtral by config. Source: `LlamaModel`, `GemmaModel`,
 * `MixtralModel` of transformers.
 */
export class Decoder {
  readonly config: DecoderConfig
  /** Rows of the embedding table and of the logits. */
  readonly vocabSize: number
  private readonly embedTokens: Tensor
  private readonly layers: readonly DecoderLayer[]
  private readonly finalNorm: Tensor
  private readonly lmHead: Tensor
  private readonly embedScale: Tensor | undefined
  private readonly activations: ActivationType
  private readonly device: Device

  private constructor(
    loader: Loader,
    config: DecoderConfig,
    vocabSize: number,
    w: { embedTokens: Tensor; layers: readonly DecoderLayer[]; finalNorm: Tensor; lmHead: Tensor },
  ) {
    const { family, hidden_size: hidden } = config
    this.config = config
    this.vocabSize = vocabSize
    this.activations = loader.activations
    this.device = loader.device
    this.embedTokens = w.embedTokens
    this.layers = w.layers
    this.finalNorm = w.finalNorm
    this.lmHead = w.lmHead
    this.embedScale =
      family === 'gemma'
        ? loader.build(() => loader.device.tensor(new Float32Array(hidden).fill(Math.sqrt(hidden)), [hidden]))
        : undefined
  }

  /**
   * `weights` holds the names of the release: `model.…` and `lm_head.weight`. The embedding table and lm_head are cut
   * or grown to `vocabSize` rows, as the reference does for the tokenizer's length; grown rows, which no release has,
   * are zeros here (the reference leaves them random). `layerLoaders` brings each layer to its device; default: all to
   * that of `loader`, where embeddings, the last norm and lm_head always are.
   */
  static async load(
    loader: Loader,
    weights: Weights,
    config: DecoderConfig,
    vocabSize: number,
    layerLoaders: readonly Loader[] = Array<Loader>(config.num_hidden_layers).fill(loader),
  ): Promise<Decoder> {
    if (!Number.isInteger(vocabSize) || vocabSize < 1)
      throw expected('a positive integer', 'vocabSize', vocabSize)
    const model = under(weights, 'model.')
    const tied = config.tie_word_embeddings
    const embedTokens = loadVocabulary(loader, model, 'embed_tokens.weight', config, vocabSize, tied)
    await loader.pause()
    const layers: DecoderLayer[] = []
    for (const [i, own] of layerLoaders.entries()) {
      layers.push(new DecoderLayer(own, under(model, `layers.${i}.`), config))
      await own.pause()
    }
    const finalNorm = loader.f32(model.take('norm.weight', [config.hidden_size]))
    // A packed matrix serves lookups by row as well, so a tied head costs nothing.
    const lmHead = tied
      ? embedTokens
      : loadVocabulary(loader, weights, 'lm_head.weight', config, vocabSize, true)
    await loader.pause()
    return new Decoder(loader, config, vocabSize, { embedTokens, layers, finalNorm, lmHead })
  }

  /** ids i32 [T] → [T, hidden]; a negative id gives zeros. */
  embed(ids: Tensor): Tensor {
    return embedding(this.embedTokens, ids, { out: this.activations })
  }

  /** The device of each layer. */
  get devices(): Device[] {
    return this.layers.map(layer => layer.device)
  }

  /** Logits f32 [R, vocabSize] of the wanted rows; the batch's keys and values are in the cache afterwards. */
  forward(batch: DecoderBatch, cache: KvCache, observe?: Observe): Tensor {
    if (cache.layers.length !== this.layers.length)
      throw expected(`a cache of ${this.layers.length} layers`, 'cache', cache.layers.length)
    return scope(() => {
      const norm = normOptions(this.config)
      let x = this.embedScale ? scaleColumns(batch.embeds, this.embedScale) : batch.embeds // [T, hidden]
      observe?.('hidden_0', x)
      let at = this.device
      const copies = new Map([[at, batch]])
      this.layers.forEach((layer, i) => {
        const { device } = layer
        const local = copies.get(device) ?? copyBatch(batch, device)
        copies.set(device, local)
        const body = (x: Tensor) =>
          layer.forward(device === at ? x : copyTo(x, device), local, cache.layers[i]!)
        x = x === batch.embeds ? scope(() => body(x)) : advance(x, body)
        at = device
        if (i + 1 < this.layers.length) observe?.(`hidden_${i + 1}`, x)
      })
      if (at !== this.device) x = advance(x, x => copyTo(x, this.device))
      if (observe) observe(`hidden_${this.layers.length}`, rmsNorm(x, this.finalNorm, norm))
      const last = embedding(x, batch.logitRows, { out: this.activations }) // [R, hidden]
      return linear(rmsNorm(last, this.finalNorm, norm), this.lmHead, { out: 'f32' }) // [R, V]
    })
  }
}

/** What layers read of a batch, on another GPU. */
function copyBatch(batch: DecoderBatch, device: Device): DecoderBatch {
  const [positions, slots, blockTable, cuQ, contextLens] = [
    batch.positions,
    batch.slots,
    batch.blockTable,
    batch.cuQ,
    batch.contextLens,
  ].map(tensor => copyTo(tensor, device)) as [Tensor, Tensor, Tensor, Tensor, Tensor]
  return { ...batch, positions, slots, blockTable, cuQ, contextLens }
}

/** [vocabSize, hidden] packed, from a table of any height. */
function loadVocabulary(
  loader: Loader,
  weights: Weights,
  name: string,
  config: DecoderConfig,
  vocabSize: number,
  quantizable: boolean,
): Tensor {
  const entry = weights.take(name, [null, config.hidden_size])
  const rows = entry.shape[0]!
  if (rows < 1)
    throw new MgmError('CHECKPOINT_INVALID', `expected at least one row for "${entry.name}" in ${entry.file}`)
  return loader.build(() => {
    const table = loader.tensor(entry).narrow(0, 0, Math.min(rows, vocabSize))
    const grown =
      vocabSize > rows
        ? [loader.device.zeros([vocabSize - rows, config.hidden_size], table.dtype as KvDType)]
        : []
    return packLinear([table, ...grown], { dtype: loader.storage(entry, quantizable) })
  })
}

/** f32 [D/2] theta^(−2i/D), each step rounded to f32 as the reference's tensors are. */
function inverseFrequencies(loader: Loader, config: DecoderConfig): Tensor {
  const { head_dim, rope_theta, rope_scaling } = config
  const frequencies = Float32Array.from({ length: head_dim / 2 }, (_, i) => {
    const power = Math.fround(rope_theta ** Math.fround((2 * i) / head_dim))
    return Math.fround(1 / power) / (rope_scaling?.factor ?? 1)
  })
  return loader.build(() => loader.device.tensor(frequencies, [head_dim / 2]))
}
