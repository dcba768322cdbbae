import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { Decoder, type DecoderConfig, KvCache } from '../lib/models/decoder.ts'
import { Loader } from '../lib/models/loader.ts'
import { sample } from '../lib/ops.ts'
import { scope } from '../lib/tensor.ts'
import {
  assertFinite,
  bandwidthLimit,
  CACHE,
  fmaLimit,
  Peer,
  RandomWeights,
  type Row,
  race,
  type Settings,
  versusLimit,
  versusPeer,
} from './harness.ts'

const GEMMA_2B: DecoderConfig = {
  family: 'gemma',
  hidden_size: 2048,
  intermediate_size: 16384,
  num_hidden_layers: 18,
  num_attention_heads: 8,
  num_key_value_heads: 1,
  head_dim: 256,
  hidden_act: 'gelu_pytorch_tanh',
  rms_norm_eps: 1e-6,
  rope_theta: 10000,
  rope_scaling: null,
  tie_word_embeddings: true,
}
const VOCABULARY = 256000
const PAGE = 32

/** Packed weights [out, in] of all layers, without the vocabulary. */
function layerWeights(config: DecoderConfig): number {
  const { hidden_size: c, num_attention_heads: h, num_key_value_heads: kv, head_dim: d } = config
  return config.num_hidden_layers * (c * (h + 2 * kv) * d + h * d * c + 3 * c * config.intermediate_size)
}

/** One sequence over its own pages. */
class Session {
  readonly decoder: Decoder
  readonly loader: Loader
  readonly cache: KvCache
  readonly pages: number
  position = 0

  constructor(loader: Loader, decoder: Decoder, capacity: number) {
    this.loader = loader
    this.decoder = decoder
    this.pages = Math.ceil(capacity / PAGE)
    this.cache = new KvCache(decoder.devices, decoder.config, this.pages, PAGE, 'f32')
  }

  /** Runs `ids` after what came before and returns the likeliest next id. */
  async step(ids: readonly number[], check = false): Promise<number> {
    const { device } = this.loader
    const i32 = (values: readonly number[], shape = [values.length]) =>
      device.tensor(Int32Array.from(values), shape)
    const positions = ids.map((_, i) => this.position + i)
    const { next, logits } = scope(() => {
      const logits = this.decoder.forward(
        {
          embeds: this.decoder.embed(i32(ids)),
          positions: i32(positions),
          slots: i32(positions), // page i of the sequence is page i of the cache
          blockTable: i32(
            Array.from({ length: this.pages }, (_, i) => i),
            [1, this.pages],
          ),
          cuQ: i32([0, ids.length]),
          contextLens: i32([this.position + ids.length]),
          logitRows: i32([ids.length - 1]),
        },
        this.cache,
      )
      const options = device.tensor(Float32Array.of(0, 1, 0, 1, 0, 0), [1, 6])
      const { ids: next } = sample(logits, { options, state: i32([0, 0, 0, 0, 0], [1, 5]) })
      return { next, logits }
    })
    this.position += ids.length
    if (check) await assertFinite('logits', logits)
    const [id] = await next.read()
    next.dispose()
    logits.dispose()
    return id!
  }

  dispose(): void {
    this.cache.dispose()
  }
}

/** Prefill and decode of a Gemma-2B-shaped decoder with random weights, one sequence. */
export async function decode(settings: Settings): Promise<Row[]> {
  const { device, quick, log } = settings
  const config = quick ? { ...GEMMA_2B, num_hidden_layers: 2 } : GEMMA_2B
  const vocabulary = quick ? 32000 : VOCABULARY
  using weights = new RandomWeights('bf16', vocabulary * config.hidden_size, vocabulary)
  const rows: Row[] = []
  for (const storage of ['bf16', 'int8', 'int4'] as const) {
    const loader = new Loader(device, storage === 'bf16' ? {} : { quantize: storage })
    log(`  loading ${storage}`)
    const decoder = await Decoder.load(loader, weights, config, vocabulary)
    await loader.finish()
    rows.push(...(await measure(settings, storage, loader, decoder)))
    loader.dispose()
    device.trim()
  }
  return rows
}

async function measure(
  settings: Settings,
  storage: 'bf16' | 'int8' | 'int4',
  loader: Loader,
  decoder: Decoder,
): Promise<Row[]> {
  const { device, quick } = settings
  const { config, vocabSize } = decoder
  const [prompt, steps, rounds] = quick ? [64, 4, 2] : [256, 8, 5]
  const session = new Session(loader, decoder, prompt + (rounds + 2) * steps)
  const ids = Array.from({ length: prompt }, (_, i) => (300 + i * 37) % vocabSize)
  let next = await session.step(ids.slice(0, 16), true)

  const peer = quick ? undefined : await llama(settings, storage)
  const fma = fmaLimit(device)
  const bandwidth = bandwidthLimit(device)

  const prefill = await race(
    [
      {
        name: 'mgm',
        run: async () => {
          session.position = 0
          next = await session.step(ids)
          return undefined
        },
      },
      ...(peer ? [{ name: peer.name, run: () => peer.run(`prefill ${prompt}`) }] : []),
    ],
    { rounds: quick ? 2 : 3, limits: [fma] },
  )
  // Each round goes on where the last ended, so the context grows a little; its bytes are counted below.
  const decoding = await race(
    [
      {
        name: 'mgm',
        run: async () => {
          for (let i = 0; i < steps; i++) next = await session.step([next])
          return undefined
        },
      },
      ...(peer ? [{ name: peer.name, run: () => peer.run(`decode ${steps}`) }] : []),
    ],
    { rounds, limits: [bandwidth] },
  )
  peer?.stop()
  session.dispose()

  const attention = 2 * 2 * prompt * (prompt / 2) * config.num_attention_heads * config.head_dim
  const flop =
    2 * prompt * layerWeights(config) +
    2 * vocabSize * config.hidden_size +
    config.num_hidden_layers * attention
  // Weights (a tied table is read once, by the head) and the keys and values so far.
  const context = prompt + (steps * (rounds + 1)) / 2
  const bytes = steps * (loader.byteLength + context * KvCache.bytesPerPage(config, 1, 'f32'))

  const rows: Row[] = []
  const add = (kind: 'prefill' | 'decode', result: typeof prefill, tokens: number, target?: number) => {
    const timing = result.timings.get('mgm')!
    const name = `${kind} ${storage}: ${(tokens / timing.seconds.min).toFixed(2)} tok/s`
    const [limit, work, unit] =
      kind === 'prefill' ? ([fma, flop, 'GFLOP/s'] as const) : ([bandwidth, bytes, 'GB/s'] as const)
    const rates = result.limits.get(limit.name)!
    rows.push(
      versusLimit(
        'decode',
        name,
        timing,
        work,
        { name: limit.name, rates, threads: device.threads },
        unit,
        target,
      ),
    )
    if (peer) {
      const theirs = { name: peer.name, timing: result.timings.get(peer.name)! }
      rows.push(versusPeer('decode', name, timing, theirs))
    }
  }
  add('prefill', prefill, prompt)
  add('decode', decoding, steps, storage === 'int4' ? undefined : 0.8)
  settings.log(`  ${storage}: ${(bytes / steps / 1e9).toFixed(2)} GB read per token`)
  return rows
}

/** llama.cpp through node-llama-cpp, from the folder that MGM_BENCH_LLAMA names. */
async function llama(settings: Settings, storage: 'bf16' | 'int8' | 'int4'): Promise<Peer | undefined> {
  const folder = process.env.MGM_BENCH_LLAMA
  const type = { bf16: 'bf16', int8: 'q8_0', int4: 'q4_0' }[storage]
  const file = join(CACHE, `gemma-2b-random-${type}.gguf`)
  if (settings.peers === 'none') return undefined
  if (!folder || !existsSync(file)) {
    const missing = folder ? `${file} (peers/gguf_gemma.py makes it)` : 'MGM_BENCH_LLAMA'
    if (settings.peers === 'all') throw new Error(`a peer is missing: llama.cpp: no ${missing}`)
    settings.log(`  left out: llama.cpp: no ${missing}`)
    return undefined
  }
  return Peer.start(settings, 'llama_peer.mjs', [file, String(settings.device.threads)], {
    MGM_BENCH_LLAMA: folder,
  })
}
