import { expected, MgmError } from '../errors.ts'
import { cast, permute, resizeBilinear, spliceEmbeddings } from '../ops.ts'
import { scope, type Tensor } from '../tensor.ts'
import type { ClipVision } from './clip-vision.ts'
import type { ConvNext } from './convnext.ts'
import type { Loader, Observe } from './loader.ts'
import type { PatchMining } from './patch-mining.ts'

export interface VisionConfig {
  /** Side of the picture that comes in. */
  image_size_aux: number
  /** Crops on a side: 1, or 2 in the -HD releases. */
  image_grid: number
  /** With crops: also mine the whole picture. */
  image_global: boolean
}

/**
 * The dual encoder: CLIP sees the picture small, ConvNeXt sees it large, and each CLIP token mines its own window of
 * ConvNeXt's maps. Source: `encode_images` of MGM.
 */
export class DualVisionEncoder {
  readonly config: VisionConfig
  readonly clip: ClipVision
  readonly convnext: ConvNext
  readonly mining: PatchMining
  private readonly loader: Loader

  constructor(
    loader: Loader,
    config: VisionConfig,
    clip: ClipVision,
    convnext: ConvNext,
    mining: PatchMining,
  ) {
    this.loader = loader
    this.config = config
    this.clip = clip
    this.convnext = convnext
    this.mining = mining
    const { image_size_aux: size, image_grid: crops } = config
    if (clip.select.feature !== 'patch')
      throw new MgmError(
        'CHECKPOINT_UNSUPPORTED',
        `expected "patch" for mm_vision_select_feature but received "${clip.select.feature}": a class token has no window to mine`,
      )
    const queries = clip.grid * crops
    const side = Math.floor(size / 4)
    if (side % queries !== 0)
      throw new MgmError(
        'CHECKPOINT_UNSUPPORTED',
        `expected a multiple of ${4 * queries} (${queries} windows of a quarter-size map) for image_size_aux but received ${size}`,
      )
  }

  /** Rows that `forward` gives for a picture. */
  get tokens(): number {
    const { image_grid: crops, image_global } = this.config
    return this.clip.tokens * (crops === 1 ? 1 : crops ** 2 + (image_global ? 1 : 0))
  }

  /**
   * pixels [B, S, S, 3] f32, normalised, S = image_size_aux → [B·tokens, C]: CLIP tokens with what they mined added.
   * With crops, a picture's rows are the global view (if any), then the crops row by row.
   */
  forward(pixels: Tensor, observe?: Observe): Tensor {
    const { image_size_aux: size, image_grid: crops } = this.config
    if (pixels.rank !== 4 || pixels.shape[1] !== size || pixels.shape[2] !== size || pixels.shape[3] !== 3)
      throw expected(`a tensor of shape [B, ${size}, ${size}, 3]`, 'pixels', `one of [${pixels.shape}]`)
    return scope(() => {
      const stages = scope(() => this.convnext.forward(this.activations(pixels), observe)) // [B, S/4, S/4, c_0] …
      return crops === 1 ? this.plain(pixels, stages, observe) : this.cropped(pixels, stages, observe)
    })
  }

  /** Pixels are resized in f32 and rounded once. */
  private activations(pixels: Tensor): Tensor {
    const { activations } = this.loader
    return pixels.dtype === activations ? pixels : cast(pixels, activations)
  }

  private plain(pixels: Tensor, stages: Tensor[], observe?: Observe): Tensor {
    const side = this.clip.config.image_size
    const images = resizeBilinear(pixels, side, side)
    observe?.('images', images)
    const clipFeat = this.clip.forward(this.activations(images)) // [B·N, C]
    observe?.('clip_feat', clipFeat)
    if (observe) observe('embed_feat', this.mining.forward(clipFeat, stages, { grid: this.clip.grid }))
    const mined = this.mining.forward(clipFeat, stages, { grid: this.clip.grid, residual: clipFeat })
    observe?.('projector_in', mined)
    return mined
  }

  private cropped(pixels: Tensor, stages: Tensor[], observe?: Observe): Tensor {
    const { image_grid: crops, image_global } = this.config
    const { grid } = this.clip
    const side = this.clip.config.image_size
    const batch = pixels.shape[0]!
    const channels = this.mining.channels

    // The crops' tokens, laid out over the whole picture, mine its maps in one go.
    const large = resizeBilinear(pixels, side * crops, side * crops)
    const images = toCrops(large, batch, crops, side).reshape(-1, side, side, 3)
    observe?.('images', images)
    const clipFeat = this.clip.forward(this.activations(images)) // [B·crops²·N, C]
    observe?.('clip_feat', clipFeat)
    const raster = fromCrops(clipFeat, batch, crops, grid)
    const whole = { grid: crops * grid }
    if (observe)
      observe('embed_feat', toCrops(this.mining.forward(raster, stages, whole), batch, crops, grid))
    const mined = this.mining.forward(raster, stages, { ...whole, residual: raster })
    const local = toCrops(mined, batch, crops, grid).reshape(-1, channels) // [B·crops²·N, C]
    if (!image_global) {
      observe?.('projector_in', local)
      return local
    }

    // The global view is made from the enlarged tensor, not from the pixels.
    const small = resizeBilinear(large, side, side)
    observe?.('images_global', small)
    const globalFeat = this.clip.forward(this.activations(small)) // [B·N, C]
    observe?.('clip_feat_global', globalFeat)
    const scaled = { grid, downscale: crops }
    if (observe) observe('embed_feat_global', this.mining.forward(globalFeat, stages, scaled))
    const global = this.mining.forward(globalFeat, stages, { ...scaled, residual: globalFeat })

    const tokens = grid ** 2
    const index = new Int32Array(batch * this.tokens)
    for (let b = 0; b < batch; b++)
      for (let row = 0; row < this.tokens; row++)
        index[b * this.tokens + row] =
          row < tokens ? -1 - (b * tokens + row) : b * crops ** 2 * tokens + row - tokens
    const all = spliceEmbeddings(local, global, this.loader.device.tensor(index, [index.length]))
    observe?.('projector_in', all)
    return all
  }
}

/** Rows of [B, G·n, G·n, C] in raster order (any shape) → [B·G²·n², C]: crop after crop, row by row, each row-major. */
function toCrops(x: Tensor, batch: number, crops: number, side: number): Tensor {
  return permute(x.reshape(batch * crops, side, crops, -1), [0, 2, 1, 3]).reshape(-1, x.shape.at(-1)!)
}

/** The inverse of {@link toCrops}: [B·G²·n², C] → [B·G²·n², C] in raster order. */
function fromCrops(x: Tensor, batch: number, crops: number, side: number): Tensor {
  return permute(x.reshape(batch * crops, crops, side, -1), [0, 2, 1, 3]).reshape(-1, x.shape.at(-1)!)
}
