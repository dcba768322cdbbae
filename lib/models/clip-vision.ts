import type { ClipConfig } from '../checkpoint/config.ts'
import { clipLayersUsed } from '../checkpoint/weights.ts'
import { cast, conv2d, layerNorm, linear, packLinear, spliceEmbeddings } from '../ops.ts'
import { scope, type Tensor } from '../tensor.ts'
import { ClipEncoderLayer, loadNorm } from './clip-encoder.ts'
import { advance, type Loader, type Observe, under, type Weights } from './loader.ts'

export interface ClipSelect {
  /** Index into the hidden states; negative counts from the end, 0 is the input of the first layer. MGM: -2. */
  layer: number
  /** 'patch' drops the class token. */
  feature: 'patch' | 'cls_patch'
}

/**
 * CLIP's image encoder up to the selected layer: the layers after it, `post_layernorm` and the text side are neither
 * loaded nor run. Source: `CLIPVisionModel` of transformers, `CLIPVisionTower` of MGM.
 */
export class ClipVision {
  readonly config: ClipConfig
  readonly select: ClipSelect
  /** Patches on a side of the picture. */
  readonly grid: number
  private readonly loader: Loader
  private readonly w: Awaited<ReturnType<typeof loadEmbeddings>>
  private readonly layers: readonly ClipEncoderLayer[]

  private constructor(
    loader: Loader,
    config: ClipConfig,
    select: ClipSelect,
    w: Awaited<ReturnType<typeof loadEmbeddings>>,
    layers: readonly ClipEncoderLayer[],
  ) {
    this.loader = loader
    this.config = config
    this.select = select
    this.grid = Math.floor(config.image_size / config.patch_size)
    this.w = w
    this.layers = layers
  }

  /** `weights` holds the names of the release: `vision_model.…`. */
  static async load(
    loader: Loader,
    weights: Weights,
    config: ClipConfig,
    select: ClipSelect,
  ): Promise<ClipVision> {
    const model = under(weights, 'vision_model.')
    const embeddings = await loadEmbeddings(loader, model, config)
    const layers: ClipEncoderLayer[] = []
    for (let i = 0; i < clipLayersUsed(config, select.layer); i++)
      layers.push(await ClipEncoderLayer.load(loader, under(model, `encoder.layers.${i}.`), config))
    return new ClipVision(loader, config, select, embeddings, layers)
  }

  /** Rows a picture gives. */
  get tokens(): number {
    return this.grid ** 2 + (this.select.feature === 'cls_patch' ? 1 : 0)
  }

  /** pixels [B, S, S, 3], normalised → [B·tokens, C], row-major patches (after the class token, if selected). */
  forward(pixels: Tensor, observe?: Observe): Tensor {
    return scope(() => {
      const batch = pixels.shape[0]!
      const patches = this.grid ** 2
      const length = patches + 1
      const channels = this.config.hidden_size
      const cu = this.loader.device.tensor(
        Int32Array.from({ length: batch + 1 }, (_, b) => b * length),
        [batch + 1],
      )

      let x = this.embed(pixels, observe) // [B·(1+P), C]
      observe?.('hidden_0', x)
      this.layers.forEach((layer, i) => {
        x = advance(x, x => layer.forward(x, cu))
        observe?.(`hidden_${i + 1}`, x)
      })
      if (this.select.feature === 'cls_patch') return x
      return cast(x.reshape(batch, length, channels).narrow(1, 1, patches), x.dtype).reshape(-1, channels)
    })
  }

  private embed(pixels: Tensor, observe?: Observe): Tensor {
    return scope(() => {
      const { w } = this
      const { patch_size: size, hidden_size: channels, layer_norm_eps: eps } = this.config
      const batch = pixels.shape[0]!
      const patches = this.grid ** 2
      const patchRows = conv2d(pixels, w.patch_embedding, {
        kernel: [size, size],
        stride: size,
        residual: w.patch_positions,
      }).reshape(batch * patches, channels)

      // The class token goes in front of each picture's patches.
      const index = new Int32Array(batch * (patches + 1))
      for (let b = 0; b < batch; b++)
        for (let p = 0; p < patches; p++) index[b * (patches + 1) + 1 + p] = -1 - (b * patches + p)
      const embedded = spliceEmbeddings(
        w.class_row,
        patchRows,
        this.loader.device.tensor(index, [index.length]),
      )
      observe?.('embeddings', embedded)
      return layerNorm(embedded, w.pre_layrnorm.weight, w.pre_layrnorm.bias, { eps })
    })
  }
}

async function loadEmbeddings(loader: Loader, weights: Weights, config: ClipConfig) {
  const { hidden_size: c, patch_size: size, image_size } = config
  const patches = Math.floor(image_size / size) ** 2
  const embeddings = under(weights, 'embeddings.')
  const classEmbedding = embeddings.take('class_embedding', [c])
  const positions = embeddings.take('position_embedding.weight', [patches + 1, c])
  const classRow = await loader.fold((f32, host) => {
    const column = packLinear(f32(classEmbedding).reshape(c, 1), { dtype: 'f32' })
    return linear(host.tensor([1], [1, 1]), column, { residual: f32(positions).narrow(0, 0, 1) })
  })
  return {
    patch_embedding: loader.conv(embeddings.take('patch_embedding.weight', [c, 3, size, size])),
    /** [P, C] */
    patch_positions: loader.build(() =>
      cast(loader.tensor(positions).narrow(0, 1, patches), loader.activations),
    ),
    /** [1, C] the class token with its position. */
    class_row: loader.build(() => cast(classRow(), loader.activations)),
    pre_layrnorm: loadNorm(loader, under(weights, 'pre_layrnorm.'), c),
  }
}
