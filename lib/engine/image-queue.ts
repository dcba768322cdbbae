import type { Device } from '../device.ts'
import { MgmError } from '../errors.ts'
import type { DenoiseItem, DenoisePlan } from '../models/sdxl.ts'
import type { DecodedImage } from '../processing/image.ts'
import { scope, type Tensor } from '../tensor.ts'

/** Images being denoised together, as the queue sees them; `Denoising` is one. */
export interface ImageRun {
  readonly length: number
  readonly stepsDone: number
  readonly steps: number
  readonly done: boolean
  /** f32 [B, h, w, C]. */
  readonly latents: Tensor
  readonly predicted: Tensor | undefined
  step(): void
  /** Goes on with some of the images only. */
  keep(images: readonly number[]): void
  dispose(): void
}

/** What the queue needs of a model; `Sdxl` is one. */
export interface ImageModel {
  denoise(plan: DenoisePlan, items: readonly DenoiseItem[]): ImageRun
  /** Latents f32 [1, h, w, C] → pixels u8 [1, H, W, 3]. */
  decode(latents: Tensor): Tensor
  /** The same small and rough: u8 [1, h, w, 3]. */
  preview(latents: Tensor): Tensor
}

export interface ImageQueueOptions {
  /** Most images denoised together. */
  maxImages: number
  /** Most images that wait beyond those. */
  maxQueue: number
  onWork: () => void
}

/** Images to draw that differ in their seeds only. */
export interface ImageRequest {
  readonly plan: DenoisePlan
  /** Requests with equal keys have equal plans, and may be denoised together. */
  readonly key: string
  /** One for each image. */
  readonly items: readonly DenoiseItem[]
  /** Most images of this plan to be denoised together, if fewer than the queue's. */
  readonly together?: number | undefined
  readonly signal: AbortSignal
  /** After each step of an image. If it throws, the request ends with that error. */
  readonly onStep?: ((step: ImageStep) => void) | undefined
  readonly previews?: boolean | undefined
}

export interface ImageStep {
  /** Of the request's images. */
  readonly image: number
  /** Steps done, and of how many. */
  readonly step: number
  readonly steps: number
  /** The image as far as it can be guessed, one pixel for each latent. */
  readonly preview?: DecodedImage
}

/** Times in milliseconds. */
export interface ImageTimings {
  /** Waiting for the first step. */
  readonly queueMs: number
  /** From the first step to the last, other work between them included. */
  readonly denoiseMs: number
  readonly decodeMs: number
}

export interface FinishedImage extends DecodedImage {
  readonly timings: ImageTimings
}

export interface ImageMetrics {
  /** Images being denoised or decoded, and waiting. */
  readonly running: number
  readonly waiting: number
  /** UNet calls since the engine started, and the images in them. */
  readonly steps: number
  readonly imageSteps: number
  readonly finished: number
  readonly failed: number
}

/** An image from its request to its pixels. */
interface Entry {
  readonly request: ImageRequest
  readonly image: number
  readonly promise: Promise<FinishedImage>
  readonly resolve: (image: FinishedImage) => void
  readonly reject: (error: unknown) => void
  state: 'waiting' | 'running' | 'settled'
  /** Failed in company: the next try is without. */
  alone: boolean
  readonly queued: number
  started: number
}

/**
 * Draws images: those of equal size and steps are denoised together, in the order of their arrival. A `step` is one
 * UNet call or the decoding of one image, so that other work can go between.
 */
export class ImageQueue {
  readonly #device: Device
  readonly #model: ImageModel
  readonly #options: ImageQueueOptions
  #waiting: Entry[] = []
  #entries: Entry[] = []
  #run: ImageRun | undefined
  readonly #counts = { steps: 0, imageSteps: 0, finished: 0, failed: 0 }

  constructor(device: Device, model: ImageModel, options: ImageQueueOptions) {
    this.#device = device
    this.#model = model
    this.#options = options
  }

  get hasWork(): boolean {
    return this.#waiting.length > 0 || this.#entries.length > 0
  }

  get metrics(): ImageMetrics {
    const running = this.#entries.filter(entry => entry.state === 'running').length
    return { running, waiting: this.#waiting.length, ...this.#counts }
  }

  /** Draws the images of a request. A failure or abort leaves other requests as they are. */
  async draw(request: ImageRequest): Promise<FinishedImage[]> {
    const { signal, items } = request
    const { maxImages, maxQueue } = this.#options
    signal.throwIfAborted()
    const open = this.#waiting.length + this.#entries.length
    if (open > 0 && open + items.length > maxImages + maxQueue)
      throw new MgmError(
        'QUEUE_FULL',
        `expected at most ${maxImages + maxQueue} images at once but ${open} are open and ${items.length} more were asked for ` +
          `(${maxImages} may run, ${maxQueue} wait: maxImages, maxQueue); try again later`,
      )
    const entries = items.map((_, image) => createEntry(request, image))
    const onAbort = () => {
      for (const entry of entries) this.#fail(entry, signal.reason)
    }
    signal.addEventListener('abort', onAbort, { once: true })
    this.#waiting.push(...entries)
    this.#options.onWork()
    try {
      return await Promise.all(entries.map(entry => entry.promise))
    } catch (error) {
      for (const entry of entries) this.#fail(entry, error)
      throw error
    } finally {
      signal.removeEventListener('abort', onAbort)
    }
  }

  /** One UNet call, or the decoding of one image. Never rejects: failures go to the images they concern. */
  async step(): Promise<void> {
    try {
      this.#drop()
      if (this.#entries.length === 0) {
        this.#begin()
        if (this.#entries.length === 0) return
      }
      const run = this.#run!
      if (!run.done) await this.#denoise(run)
      else await this.#decode(run)
    } catch (error) {
      this.#failed(error)
    }
    if (this.#entries.length === 0) this.#end()
  }

  /** Frees everything; to be called when no image is open. */
  dispose(): void {
    this.#end()
  }

  #begin(): void {
    const first = this.#waiting[0]
    if (!first) return
    const fits = (entry: Entry) => entry === first || (!first.alone && !entry.alone && matches(entry, first))
    const most = Math.min(this.#options.maxImages, first.request.together ?? Number.POSITIVE_INFINITY)
    const chosen = this.#waiting.filter(fits).slice(0, most)
    this.#waiting = this.#waiting.filter(entry => !chosen.includes(entry))
    const now = performance.now()
    for (const entry of chosen) {
      entry.state = 'running'
      entry.started ||= now
    }
    this.#entries = chosen
    const items = chosen.map(({ request, image }) => request.items[image]!)
    this.#run = this.#model.denoise(first.request.plan, items)
  }

  async #denoise(run: ImageRun): Promise<void> {
    run.step()
    this.#counts.steps++
    this.#counts.imageSteps += run.length
    const watched = this.#entries.map(({ request }) => request.onStep && request.previews)
    const previews = scope(() =>
      watched.map((wanted, i) =>
        wanted ? this.#model.preview((run.predicted ?? run.latents).narrow(0, i, 1)) : undefined,
      ),
    )
    try {
      await this.#device.synchronize()
      for (const [i, entry] of [...this.#entries.entries()]) {
        const preview = previews[i]
        const [, height, width] = preview?.shape ?? []
        const data = preview && ((await preview.read()) as Uint8Array)
        if (entry.state !== 'running') continue
        try {
          entry.request.onStep?.({
            image: entry.image,
            step: run.stepsDone,
            steps: run.steps,
            ...(data && { preview: { data, height: height!, width: width! } }),
          })
        } catch (error) {
          this.#fail(entry, error)
        }
      }
    } finally {
      for (const preview of previews) preview?.dispose()
    }
  }

  async #decode(run: ImageRun): Promise<void> {
    // Images leave the run from its end, so that the others keep their places.
    const at = this.#entries.length - 1
    const entry = this.#entries[at]!
    const start = performance.now()
    let pixels: Tensor | undefined
    try {
      const latents = run.latents.narrow(0, at, 1)
      pixels = scope(() => this.#model.decode(latents))
      const finite = (await latents.readF32()).every(Number.isFinite)
      latents.dispose()
      if (!finite)
        throw new MgmError(
          'NUMERIC',
          "the image's latents hold NaN or infinity; the checkpoint's weights or the storage type (dtype) are to blame",
        )
      const data = (await pixels.read()) as Uint8Array
      const [, height, width] = pixels.shape as [number, number, number, number]
      const end = performance.now()
      const timings = {
        queueMs: entry.started - entry.queued,
        denoiseMs: start - entry.started,
        decodeMs: end - start,
      }
      if (entry.state === 'settled') return
      entry.state = 'settled'
      this.#counts.finished++
      entry.resolve({ data, width, height, timings })
    } catch (error) {
      // What went wrong with this one's pixels says nothing about the others.
      this.#fail(entry, error)
    } finally {
      this.#entries.pop()
      pixels?.dispose()
    }
  }

  /** Takes images that have been settled meanwhile out of the run. */
  #drop(): void {
    const left = this.#entries.map((_, i) => i).filter(i => this.#entries[i]!.state === 'running')
    if (left.length === this.#entries.length) return
    if (left.length > 0) this.#run!.keep(left)
    this.#entries = left.map(i => this.#entries[i]!)
    if (left.length === 0) this.#end()
  }

  /** Together they failed; alone each stands or falls by itself. */
  #failed(error: unknown): void {
    const entries = this.#entries.filter(entry => entry.state === 'running')
    this.#entries = []
    if (entries.length === 1) this.#fail(entries[0]!, error)
    else {
      for (const entry of entries) {
        entry.alone = true
        entry.state = 'waiting'
      }
      this.#waiting.unshift(...entries)
    }
  }

  #fail(entry: Entry, error: unknown): void {
    if (entry.state === 'settled') return
    if (entry.state === 'waiting') this.#waiting = this.#waiting.filter(other => other !== entry)
    entry.state = 'settled'
    this.#counts.failed++
    entry.reject(error)
  }

  #end(): void {
    this.#run?.dispose()
    this.#run = undefined
  }
}

function matches(a: Entry, b: Entry): boolean {
  return a.request.key === b.request.key
}

function createEntry(request: ImageRequest, image: number): Entry {
  let resolve!: Entry['resolve']
  let reject!: Entry['reject']
  const promise = new Promise<FinishedImage>((onResolve, onReject) => {
    resolve = onResolve
    reject = onReject
  })
  // Whoever waits sees the rejection; an image that fails beside another one has nobody waiting.
  promise.catch(() => {})
  const queued = performance.now()
  return { request, image, promise, resolve, reject, state: 'waiting', alone: false, queued, started: 0 }
}
