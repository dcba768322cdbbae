import {
  type DiffusionCheckpoint,
  type TextEncoderFiles,
  textIgnored,
  vaeIgnored,
} from '../checkpoint/diffusers.ts'
import type { WeightDType } from '../checkpoint/tensor-map.ts'
import type { Device } from '../device.ts'
import { expected } from '../errors.ts'
import { type ActivationType, cast, embedding, randomNormal, schedulerStep, toUint8 } from '../ops.ts'
import { CLIP_TOKENS, ClipTokenizer } from '../processing/clip-tokenizer.ts'
import { scope, Tensor } from '../tensor.ts'
import { ClipText } from './clip-text.ts'
import { LatentPreview } from './latent-preview.ts'
import { Loader, type LoadProgress } from './loader.ts'
import { createSchedule, type Schedule, type ScheduleOptions } from './schedulers.ts'
import { sideBySide, Unet, type UnetCondition } from './unet.ts'
import { Vae, vaeScale } from './vae.ts'

export interface LoadSdxlOptions {
  /** Storage of weight matrices. Default: each as its file stores it. */
  dtype?: WeightDType | undefined
  /** What the networks compute in. Default 'f32'. The VAE takes f16 instead of bf16 where its config says `force_upcast`. */
  activations?: ActivationType | undefined
  onProgress?: ((progress: LoadProgress) => void) | undefined
  signal?: AbortSignal | undefined
}

/** What images that are denoised together have in common. */
export interface DenoisePlan {
  /** Pixels. */
  readonly height: number
  readonly width: number
  readonly schedule: Schedule
  /** Whether each image has an unconditional half beside it. */
  readonly guided: boolean
}

export interface DenoiseItem {
  readonly prompt: string
  /** Null: none, which the pipeline takes for zeros where its config says so. */
  readonly negativePrompt: string | null
  /** Factor of classifier-free guidance; used only if the plan is guided. */
  readonly guidance: number
  /** Of the starting noise and of that of each step. 64 bits. */
  readonly seed: bigint
  /** Where image-to-image starts: f32 [height, width, 3] in −1…1. All items of a run have one, or none has. */
  readonly image?: Float32Array | undefined
}

/** The cut-off ends of a prompt, one an encoder, '' where it was not cut. */
export type Truncated = readonly [string, string]

/**
 * The SDXL pipeline: two text encoders, a UNet, a VAE. Every method but `load` enqueues its work and returns.
 * Source: `StableDiffusionXLPipeline` and `StableDiffusionXLImg2ImgPipeline` of diffusers.
 */
export class Sdxl {
  readonly device: Device
  readonly checkpoint: DiffusionCheckpoint
  readonly activations: ActivationType
  /** Pixels a latent position stands for, on a side. */
  readonly scale: number
  /** Side in pixels that the UNet was trained for. */
  readonly defaultSize: number
  readonly unet: Unet
  readonly vae: Vae
  private readonly tokenizers: readonly [ClipTokenizer, ClipTokenizer]
  private readonly encoders: readonly [ClipText, ClipText]
  private readonly loader: Loader
  private readonly vaeType: ActivationType
  private previews: LatentPreview | undefined
  private previewReady: Promise<void> | undefined

  private constructor(
    checkpoint: DiffusionCheckpoint,
    loader: Loader,
    vaeType: ActivationType,
    parts: {
      tokenizers: readonly [ClipTokenizer, ClipTokenizer]
      encoders: readonly [ClipText, ClipText]
      unet: Unet
      vae: Vae
    },
  ) {
    this.checkpoint = checkpoint
    this.loader = loader
    this.device = loader.device
    this.activations = loader.activations
    this.vaeType = vaeType
    this.tokenizers = parts.tokenizers
    this.encoders = parts.encoders
    this.unet = parts.unet
    this.vae = parts.vae
    this.scale = this.vae.scale
    this.defaultSize = defaultSize(checkpoint)
  }

  /** Loads all parts; each tensor of the checkpoint is used or known to be needless. On failure everything is freed. */
  static async load(
    device: Device,
    checkpoint: DiffusionCheckpoint,
    options: LoadSdxlOptions = {},
  ): Promise<Sdxl> {
    const { activations = 'f32' } = options
    const { textEncoders, unet, vae } = checkpoint
    const loader = new Loader(device, { ...options, activations, totalBytes: checkpoint.totalBytes })
    const vaeType = vaeActivations(checkpoint, activations)
    const vaeLoader = vaeType === activations ? loader : loader.beside(device, vaeType)
    try {
      const [first, second] = textEncoders
      const parts = {
        encoders: [await loadEncoder(loader, first), await loadEncoder(loader, second)] as const,
        tokenizers: [
          await ClipTokenizer.load(first.tokenizer),
          await ClipTokenizer.load(second.tokenizer),
        ] as const,
        unet: await Unet.load(loader, unet.weights, unet.config),
        vae: await Vae.load(vaeLoader, vae.weights, vae.config, { encoder: true }),
      }
      unet.weights.finish([])
      vae.weights.finish(vaeIgnored({ encoder: true }))
      await loader.finish()
      return new Sdxl(checkpoint, loader, vaeType, parts)
    } catch (error) {
      loader.dispose()
      throw error
    }
  }

  /**
   * Bytes of activations that drawing `images` together takes at most, guided, of the default size if none is given (pixels):
   * beside what a UNet call or the decoding of one image needs, the keys and values of all prompts.
   */
  static bytesAt(
    checkpoint: DiffusionCheckpoint,
    activations: ActivationType,
    { images, height, width }: { images: number; height?: number; width?: number },
  ): number {
    const { unet, vae } = checkpoint
    const scale = vaeScale(vae.config)
    const [high, wide] = [height ?? defaultSize(checkpoint), width ?? defaultSize(checkpoint)]
    const halves = 2 * images
    const widths = unet.weights
      .entries()
      .filter(({ name }) => /\.attn2\.to_[kv]\.weight$/.test(name))
      .reduce((sum, { shape }) => sum + shape[0]!, 0)
    const prompts = halves * CLIP_TOKENS * widths * (activations === 'f32' ? 4 : 2)
    const latents = { images: halves, height: high / scale, width: wide / scale }
    const image = { height: high, width: wide }
    return (
      prompts +
      Math.max(
        Unet.bytesAt(unet.config, activations, latents),
        Vae.bytesAt(vae.config, vaeActivations(checkpoint, activations), image),
      )
    )
  }

  /** Bytes of the weights on the device. */
  get byteLength(): number {
    return this.loader.byteLength
  }

  /** The steps from noise to an image by the checkpoint's own scheduler, or by another. Throws INVALID_ARGUMENT. */
  schedule(options: ScheduleOptions): Schedule {
    return createSchedule(this.checkpoint.scheduler, options)
  }

  /** What of a prompt does not fit the encoders. */
  truncated(prompt: string): Truncated {
    const [first, second] = this.tokenizers
    return [first.encode(prompt).truncated, second.encode(prompt).truncated]
  }

  /**
   * Prompts → prompt A [N·77, D] (both encoders' penultimate hidden states side by side) and pooled A [N, P]. A null prompt
   * is zeros.
   */
  encodePrompts(prompts: readonly (string | null)[]): { prompt: Tensor; pooled: Tensor } {
    return scope(() => {
      const texts = [...new Set(prompts.filter(text => text !== null))]
      const chosen = prompts.map(text => (text === null ? -1 : texts.indexOf(text)))
      // Something must be encoded, if only to give zeros their widths.
      const sources = texts.length > 0 ? texts : ['']
      const [first, second] = this.encoders.map((encoder, i) => {
        const ids = sources.map(text => this.tokenizers[i]!.encode(text).ids)
        return encoder.forward(Int32Array.from(ids.flatMap(row => [...row])))
      }) as [ReturnType<ClipText['forward']>, ReturnType<ClipText['forward']>]
      const states = sideBySide(this.device, first.penultimate, second.penultimate)
      const length = states.shape[0]! / sources.length
      return {
        prompt: this.rows(states, chosen, length),
        pooled: this.rows(second.pooled!, chosen, 1),
      }
    })
  }

  /**
   * Starts images that are denoised together. `noise` f32 [B, h, w, C], of unit deviation, instead of that of the seeds.
   * The caller disposes the run.
   */
  denoise(plan: DenoisePlan, items: readonly DenoiseItem[], noise?: Tensor): Denoising {
    return new Denoising(this, plan, items, noise)
  }

  /** Latents f32 [B, h, w, C] → pixels u8 [B, H, W, 3]. */
  decode(latents: Tensor): Tensor {
    return scope(() => toUint8(this.vae.decode(this.unscaled(latents)), { scale: 127.5, offset: 127.5 }))
  }

  /** Pixels f32 [B, H, W, 3] in −1…1 → latents f32 [B, h, w, C], the mean of the VAE's distribution. */
  encode(pixels: Tensor): Tensor {
    return scope(() => {
      const mean = cast(this.vae.encode(cast(pixels, this.vaeType)), 'f32')
      const factor = this.checkpoint.vae.config.scaling_factor
      return this.combine(mean, { x: factor }).out
    })
  }

  /** To be awaited once before `preview`. */
  preparePreviews(): Promise<void> {
    this.previewReady ??= LatentPreview.fit(
      this.device,
      this.checkpoint.vae.config.latent_channels,
      this.activations,
      latents => this.decode(latents),
    ).then(
      preview => {
        this.previews = preview
      },
      error => {
        this.previewReady = undefined
        throw error
      },
    )
    return this.previewReady
  }

  /** Latents f32 [B, h, w, C] → a rough picture u8 [B, h, w, 3]. */
  preview(latents: Tensor): Tensor {
    return scope(() => this.previews!.forward(latents, this.activations))
  }

  /** Frees the weights. */
  dispose(): void {
    this.previews?.dispose()
    this.loader.dispose()
  }

  /** Latents as the VAE takes them. */
  private unscaled(latents: Tensor): Tensor {
    const input = 1 / this.checkpoint.vae.config.scaling_factor
    return this.combine(latents, { x: 1, input }, this.vaeType).input
  }

  private combine(
    x: Tensor,
    factors: { x: number; input?: number },
    type: ActivationType = this.activations,
  ): { out: Tensor; input: Tensor } {
    const row = [0, 0, 0, factors.x, 0, 0, 0, factors.input ?? 1]
    const images = x.shape[0]!
    const coefficients = this.device.tensor(Float32Array.from(Array(images).fill(row).flat()), [images, 8])
    return schedulerStep(x, { coefficients, halves: 1, input: type })
  }

  /** Blocks of `length` rows in the order of `blocks`; −1 is a block of zeros. */
  private rows(table: Tensor, blocks: readonly number[], length: number): Tensor {
    const ids = Int32Array.from(
      blocks.flatMap(block => Array.from({ length }, (_, i) => (block < 0 ? -1 : block * length + i))),
    )
    return embedding(table, this.device.tensor(ids, [ids.length]), { out: this.activations })
  }
}

/** Images on their way from noise, in step with one another. */
export class Denoising {
  readonly plan: DenoisePlan
  private readonly sdxl: Sdxl
  private items: readonly DenoiseItem[]
  private condition: UnetCondition
  private state: { latents: Tensor; input: Tensor; predicted: Tensor | undefined }
  private taken = 0

  constructor(sdxl: Sdxl, plan: DenoisePlan, items: readonly DenoiseItem[], noise?: Tensor) {
    this.sdxl = sdxl
    this.plan = plan
    this.items = items
    const { height, width, schedule, guided } = plan
    for (const [name, size] of Object.entries({ height, width }))
      if (!Number.isInteger(size) || size < sdxl.scale || size % sdxl.scale !== 0)
        throw expected(`a positive multiple of ${sdxl.scale}`, name, size)
    const prompts = items.map(item => item.prompt)
    const { forceZerosForEmptyPrompt } = sdxl.checkpoint
    const negative = items.map(item => item.negativePrompt ?? (forceZerosForEmptyPrompt ? null : ''))
    const texts = guided ? [...negative, ...prompts] : prompts
    const encoded = sdxl.encodePrompts(texts)
    try {
      this.condition = sdxl.unet.condition({
        ...encoded,
        timeIds: texts.map(() => [height, width, 0, 0, height, width]),
        timesteps: schedule.timesteps,
        guidance: (guided ? [...items, ...items] : items).map(item => item.guidance),
      })
    } finally {
      encoded.prompt.dispose()
      encoded.pooled.dispose()
    }
    try {
      this.state = scope(() => this.start(noise))
    } catch (error) {
      this.condition.dispose()
      throw error
    }
  }

  /** Images in the run. */
  get length(): number {
    return this.items.length
  }
  get stepsDone(): number {
    return this.taken
  }
  get steps(): number {
    return this.plan.schedule.timesteps.length
  }
  get done(): boolean {
    return this.taken >= this.steps
  }
  /** f32 [B, h, w, C] in the scheduler's scale; at the end that of the VAE's latents times its scaling factor. */
  get latents(): Tensor {
    return this.state.latents
  }
  /** What the last step took the undisturbed latents for, f32 [B, h, w, C]; undefined before the first. */
  get predicted(): Tensor | undefined {
    return this.state.predicted
  }

  /** Enqueues the next step. */
  step(): void {
    const { schedule } = this.plan
    const step = this.taken
    const { x, model, previous, noise, predictedX, predictedM } = schedule.coefficients(step)
    this.advance(() => {
      const output = this.sdxl.unet.forward(this.state.input, this.condition, step)
      const next = this.combine(this.state.latents, {
        factors: [predictedX, predictedM, x, model, previous, noise, schedule.inputScale(step + 1)],
        model: output,
        previous: schedule.usesPrevious ? this.state.predicted : undefined,
        noise: schedule.usesNoise ? this.noise(step + 1) : undefined,
      })
      return { latents: next.out, input: next.input, predicted: next.predicted }
    })
    this.taken++
  }

  /** Goes on with some of the images only. */
  keep(images: readonly number[]): void {
    const halves = this.plan.guided ? 2 : 1
    const all = Array.from({ length: halves }, (_, half) => images.map(i => half * this.length + i)).flat()
    const condition = this.condition.select(all)
    this.condition.dispose()
    this.condition = condition
    this.advance(() => ({
      latents: this.select(this.state.latents, images),
      input: this.select(this.state.input, all),
      predicted: this.state.predicted && this.select(this.state.predicted, images),
    }))
    this.items = images.map(i => this.items[i]!)
  }

  dispose(): void {
    this.condition.dispose()
    for (const tensor of Object.values(this.state)) tensor?.dispose()
  }

  private start(given: Tensor | undefined): Denoising['state'] {
    const { schedule, height, width } = this.plan
    const noise = given ?? this.noise(0)
    const pictures = this.items.map(item => item.image).filter(image => image !== undefined)
    const scale = schedule.inputScale(0)
    if (pictures.length === 0) {
      const factors = [0, 0, schedule.initNoiseSigma, 0, 0, 0, scale]
      const { out, input } = this.combine(noise, { factors })
      return { latents: out, input, predicted: undefined }
    }
    // Several images of one request start from the same picture.
    const distinct = [...new Set(pictures)]
    const pixels = this.sdxl.device.empty([distinct.length, height, width, 3])
    distinct.forEach((picture, i) => {
      pixels.narrow(0, i, 1).write(picture)
    })
    const encoded = this.select(
      this.sdxl.encode(pixels),
      pictures.map(picture => distinct.indexOf(picture)),
    )
    const factors = [0, 0, schedule.start.image, 0, 0, schedule.start.noise, scale]
    const { out, input } = this.combine(encoded, { factors, noise })
    return { latents: out, input, predicted: undefined }
  }

  /** Unit noise f32 [B, h, w, C]: stream 0 to start from, n for step n − 1. */
  private noise(stream: number): Tensor {
    const { height, width } = this.plan
    const { scale, device, checkpoint } = this.sdxl
    const seeds = this.items.flatMap(({ seed }) => [
      Number(BigInt.asIntN(32, seed)),
      Number(BigInt.asIntN(32, seed >> 32n)),
      stream,
    ])
    return randomNormal(device.tensor(Int32Array.from(seeds), [this.length, 3]), [
      height / scale,
      width / scale,
      checkpoint.unet.config.in_channels,
    ])
  }

  private combine(
    x: Tensor,
    terms: {
      factors: readonly number[]
      model?: Tensor
      previous?: Tensor | undefined
      noise?: Tensor | undefined
    },
  ): ReturnType<typeof schedulerStep> {
    const { factors, ...tensors } = terms
    const rows = this.items.flatMap(item => [item.guidance, ...factors])
    return schedulerStep(x, {
      ...tensors,
      coefficients: this.sdxl.device.tensor(Float32Array.from(rows), [this.length, 8]),
      halves: this.plan.guided ? 2 : 1,
      input: this.sdxl.activations,
    })
  }

  /** Rows of a batch, in the order of `which`. */
  private select(x: Tensor, which: readonly number[]): Tensor {
    const [count, ...sizes] = x.shape as [number, ...number[]]
    const ids = this.sdxl.device.tensor(Int32Array.from(which), [which.length])
    return embedding(x.reshape(count, -1), ids, { out: x.dtype as ActivationType }).reshape(
      which.length,
      ...sizes,
    )
  }

  private advance(body: () => Denoising['state']): void {
    const old = this.state
    this.state = scope(body)
    for (const tensor of Object.values(old)) if (tensor instanceof Tensor) tensor.dispose()
  }
}

async function loadEncoder(loader: Loader, files: TextEncoderFiles): Promise<ClipText> {
  const encoder = await ClipText.load(loader, files.weights, files.config, { projection: files.projection })
  files.weights.finish(textIgnored(files))
  return encoder
}

/** Side in pixels that the UNet was trained for. */
function defaultSize({ unet, vae }: DiffusionCheckpoint): number {
  return unet.config.sample_size * vaeScale(vae.config)
}

/** `Vae` scales what f16 cannot hold where its config says so, and f16 is the finer of the half types. */
function vaeActivations({ vae }: DiffusionCheckpoint, activations: ActivationType): ActivationType {
  return activations !== 'f32' && vae.config.force_upcast ? 'f16' : activations
}
