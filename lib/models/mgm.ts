import type { MgmConfig } from '../checkpoint/config.ts'
import type { WeightDType } from '../checkpoint/tensor-map.ts'
import {
  type Checkpoint,
  CONVNEXT_IGNORED,
  clipIgnored,
  convNextGeometry,
  languageIgnored,
} from '../checkpoint/weights.ts'
import type { Device } from '../device.ts'
import { expected, MgmError } from '../errors.ts'
import { type ActivationType, spliceEmbeddings } from '../ops.ts'
import { IMAGE_TOKEN_INDEX } from '../processing/prompt.ts'
import { scope, type Tensor } from '../tensor.ts'
import { ClipVision } from './clip-vision.ts'
import { ConvNext, convNextConfig } from './convnext.ts'
import { Decoder, type DecoderBatch, KvCache, type KvDType } from './decoder.ts'
import { Loader, type LoadProgress, type Observe } from './loader.ts'
import { PatchMining } from './patch-mining.ts'
import { Projector } from './projector.ts'
import { DualVisionEncoder } from './vision.ts'

export interface LoadModelOptions {
  /** Storage of weight matrices. Default: each as its file stores it. On a GPU also what is computed in: bf16 or f16. */
  dtype?: WeightDType | undefined
  /** Quantizes the decoder's matrices on loading: all but routers and an embedding table that is not lm_head too. */
  quantize?: 'int8' | 'int4' | undefined
  /** Storage of the KV cache. Default 'f32'; on a GPU always what is computed in. */
  kvDtype?: KvDType | undefined
  /** Where each layer of the decoder goes. Default: all where the rest is. */
  layerDevices?: readonly Device[] | undefined
  /** Length of the tokenizer, to which embeddings and lm_head are cut or grown. */
  vocabSize: number
  onProgress?: ((progress: LoadProgress) => void) | undefined
  signal?: AbortSignal | undefined
}

/**
 * Mini-Gemini: a dual vision encoder, a projector and a decoder. Every method but `load` enqueues its work and returns.
 * Source: `MGMMetaForCausalLM` of MGM.
 */
export class MgmModel {
  readonly device: Device
  readonly config: MgmConfig
  readonly kvDtype: KvDType
  readonly vision: DualVisionEncoder
  readonly projector: Projector
  readonly decoder: Decoder
  private readonly loader: Loader

  private constructor(
    loader: Loader,
    config: MgmConfig,
    kvDtype: KvDType,
    parts: { vision: DualVisionEncoder; projector: Projector; decoder: Decoder },
  ) {
    this.loader = loader
    this.device = loader.device
    this.config = config
    this.kvDtype = kvDtype
    this.vision = parts.vision
    this.projector = parts.projector
    this.decoder = parts.decoder
  }

  /** Loads all parts; each tensor of the checkpoint is used or known to be needless. On failure everything is freed. */
  static async load(device: Device, checkpoint: Checkpoint, options: LoadModelOptions): Promise<MgmModel> {
    const { config } = checkpoint
    const activations = activationsOn(device.name, checkpoint, options.dtype)
    const kvDtype = kvDtypeFor(activations, options.kvDtype)
    const loader = new Loader(device, { ...options, activations, totalBytes: checkpoint.totalBytes })
    try {
      const vision = await loadVision(loader, checkpoint)
      const projector = await Projector.load(
        loader,
        checkpoint.projector,
        config.mm_projector_type,
        config.mm_hidden_size,
        config.hidden_size,
      )
      checkpoint.projector.finish([])
      const decoder = await Decoder.load(
        loader,
        checkpoint.language,
        config,
        options.vocabSize,
        options.layerDevices && loadersFor(loader, options.layerDevices),
      )
      checkpoint.language.finish(languageIgnored(config))
      await loader.finish()
      return new MgmModel(loader, config, kvDtype, { vision, projector, decoder })
    } catch (error) {
      loader.dispose()
      throw error
    }
  }

  /** What is computed in. */
  get activations(): ActivationType {
    return this.loader.activations
  }
  get hiddenSize(): number {
    return this.config.hidden_size
  }
  get vocabSize(): number {
    return this.decoder.vocabSize
  }
  /** Longest sequence, image embeddings included: the tokenizer's limit, the positions', and a sliding window's. */
  get maxContext(): number {
    const { tokenizer_model_max_length, max_position_embeddings, sliding_window } = this.config
    // Within the window sliding attention is plain attention.
    return Math.min(tokenizer_model_max_length, max_position_embeddings, sliding_window ?? Infinity)
  }
  /** Embeddings that stand for a picture. */
  get tokensPerImage(): number {
    return this.vision.tokens
  }
  /** Pixels a side of what `encodeImages` takes. */
  get imageSize(): number {
    return this.config.image_size_aux
  }
  /** Bytes of the weights on the device. */
  get byteLength(): number {
    return this.loader.byteLength
  }

  /** pixels [B, S, S, 3] f32, normalised → [B·tokensPerImage, hidden]. */
  encodeImages(pixels: Tensor, observe?: Observe): Tensor {
    return scope(() => {
      const features = this.projector.forward(this.vision.forward(pixels, observe))
      observe?.('image_features', features)
      return features
    })
  }

  /** ids i32 [T] → [T, hidden]. */
  embed(ids: Tensor): Tensor {
    return this.decoder.embed(ids)
  }

  /**
   * The prompt's embeddings [P, hidden]: those of the ids, with the rows of `images` (each [M, hidden]) in the places of
   * the `IMAGE_TOKEN_INDEX` slots, in order. Source: `prepare_inputs_labels_for_multimodal` of MGM.
   */
  splice(ids: Int32Array, images: readonly Tensor[]): Tensor {
    const wrong = ids.find(id => id !== IMAGE_TOKEN_INDEX && (id < 0 || id >= this.vocabSize))
    if (wrong !== undefined)
      throw expected(`ids from 0 to ${this.vocabSize - 1} or ${IMAGE_TOKEN_INDEX}`, 'ids', wrong)
    const text = ids.filter(id => id !== IMAGE_TOKEN_INDEX)
    if (ids.length === 0) throw expected('at least one id', 'ids', ids)
    if (ids.length - text.length !== images.length)
      throw expected(`${ids.length - text.length} (the image slots in ids)`, 'images', images.length)
    const { device } = this
    return scope(() => {
      // Place by place: ≥ 0 a row of the text, −1 − row one of image number `source`.
      const index: number[] = []
      const source: number[] = []
      let [textRow, image] = [0, 0]
      for (const id of ids) {
        if (id !== IMAGE_TOKEN_INDEX) {
          index.push(textRow++)
          source.push(-1)
          continue
        }
        for (let row = 0; row < images[image]!.shape[0]!; row++) {
          index.push(-1 - row)
          source.push(image)
        }
        image++
      }
      const embeds = this.embed(
        text.length > 0 ? device.tensor(text, [text.length]) : device.tensor(Int32Array.of(-1), [1]),
      )
      // The first pass spreads the text out; each image then fills its own places.
      let spliced = embeds
      const passes = Math.max(images.length, 1)
      for (let pass = 0; pass < passes; pass++) {
        const places = index.map((row, p) => {
          if (source[p] === pass) return row
          return pass === 0 ? Math.max(row, 0) : p
        })
        const indexTensor = device.tensor(Int32Array.from(places), [places.length])
        spliced = spliceEmbeddings(spliced, images[pass] ?? embeds, indexTensor)
      }
      return spliced
    })
  }

  /** An empty cache of `pages` pages of `pageSize` positions; the caller disposes it. */
  newCache(pages: number, pageSize: number): KvCache {
    return new KvCache(this.decoder.devices, this.config, pages, pageSize, this.kvDtype)
  }

  /** Bytes that each page of `newCache` takes. */
  bytesPerPage(pageSize: number): number {
    return KvCache.bytesPerPage(this.config, pageSize, this.kvDtype)
  }

  /** Logits f32 [R, vocabSize] of the wanted rows. See {@link Decoder.forward}. */
  forward(batch: DecoderBatch, cache: KvCache, observe?: Observe): Tensor {
    return this.decoder.forward(batch, cache, observe)
  }

  /** Frees the weights. */
  dispose(): void {
    this.loader.dispose()
  }
}

/**
 * What a model computes in: f32 on the CPU; on a GPU the `dtype` asked for, or the decoder's own where it is a half type,
 * or bf16. Throws UNSUPPORTED for f32 on a GPU.
 */
export function activationsOn(
  device: string,
  checkpoint: Checkpoint,
  dtype: WeightDType | undefined,
): ActivationType {
  if (device === 'cpu') return 'f32'
  if (dtype === 'f32')
    throw new MgmError(
      'UNSUPPORTED',
      `expected bf16 or f16 for dtype on ${device} but received f32: its matrix units multiply nothing wider`,
    )
  const stored = checkpoint.language.entries().find(({ shape }) => shape.length === 2)?.dtype
  return dtype ?? (stored === 'f16' ? 'f16' : 'bf16')
}

/** Storage of keys and values beside such activations. Throws UNSUPPORTED where a GPU has no kernel for the mixture. */
export function kvDtypeFor(activations: ActivationType, asked: KvDType | undefined): KvDType {
  if (activations === 'f32') return asked ?? 'f32'
  if (asked !== undefined && asked !== activations)
    throw new MgmError(
      'UNSUPPORTED',
      `expected ${activations}, the type of the activations, for kvDtype on a GPU but received ${asked}`,
    )
  return activations
}

function loadersFor(loader: Loader, devices: readonly Device[]): Loader[] {
  const loaders = new Map([[loader.device, loader]])
  return devices.map(device => {
    const own = loaders.get(device) ?? loader.beside(device)
    loaders.set(device, own)
    return own
  })
}

async function loadVision(loader: Loader, checkpoint: Checkpoint): Promise<DualVisionEncoder> {
  const { config, clipConfig } = checkpoint
  const select = { layer: config.mm_vision_select_layer, feature: config.mm_vision_select_feature }
  const clip = await ClipVision.load(loader, checkpoint.clip, clipConfig, select)
  checkpoint.clip.finish(clipIgnored(clipConfig, select.layer))

  const geometry = convNextConfig(convNextGeometry(checkpoint.convnext))
  const convnext = await ConvNext.load(loader, checkpoint.convnext, geometry)
  checkpoint.convnext.finish(CONVNEXT_IGNORED)

  const mapChannels = geometry.dims.reduce((sum, dim) => sum + dim, 0)
  const mining = await PatchMining.load(loader, checkpoint.mining, clipConfig.hidden_size, mapChannels)
  checkpoint.mining.finish([])
  return new DualVisionEncoder(loader, config, clip, convnext, mining)
}
