import { setImmediate } from 'node:timers/promises'
import type { Device } from '../device.ts'
import { MgmError } from '../errors.ts'
import type { KvCache } from '../models/decoder.ts'
import type { Tokenizer } from '../processing/tokenizer.ts'
import type { Tensor } from '../tensor.ts'
import { type Answer, AnswerBuilder, type Timings } from './answer.ts'
import { BlockManager } from './block-manager.ts'
import { Gate } from './gate.ts'
import {
  type FinishedImage,
  type ImageMetrics,
  type ImageModel,
  ImageQueue,
  type ImageRequest,
} from './image-queue.ts'
import { ModelRunner, type RunnableSequence, type RunnerModel } from './runner.ts'
import type { Drawn, Sampling } from './sampler.ts'
import { Scheduler, type StepItem } from './scheduler.ts'
import { Sequence } from './sequence.ts'
import { type Picture, VisionEncoder, type VisionLease, type VisionModel } from './vision.ts'

/** What the engine needs of a model; `MgmModel` is one. */
export interface EngineModel extends RunnerModel, VisionModel {
  readonly maxContext: number
  splice(ids: Int32Array, images: readonly Tensor[]): Tensor
  newCache(pages: number, pageSize: number): KvCache
  bytesPerPage(pageSize: number): number
}

export interface EngineOptions {
  /** KV cache: number of pages, and positions a page. */
  pages: number
  pageSize: number
  /** Most positions computed in one step. */
  tokenBudget: number
  /** Most requests that generate at once. */
  maxSequences: number
  /** Most requests that wait beyond those. */
  maxQueue: number
  /** Most pictures encoded in one go. */
  visionBatch: number
  /** Most bytes of embeddings kept for pictures that may come again. */
  visionCacheBytes: number
  /** Whether decode steps are recorded once and replayed. Default false. */
  decodeGraphs?: boolean
  /** Most images denoised together. Default 1. */
  maxImages?: number
}

/** A request as the engine takes it: everything checked, the prompt tokenized. */
export interface EngineRequest {
  /** `IMAGE_TOKEN_INDEX` stands for a picture. */
  readonly ids: Int32Array
  /** Read when the request's turn is near. */
  readonly pictures: readonly ((signal: AbortSignal) => Promise<Picture>)[]
  readonly sampling: Sampling
  /** Cut to what the context has room for. */
  readonly maxTokens: number
  readonly stopStrings: readonly string[]
  readonly stopIds: ReadonlySet<number>
  readonly signal?: AbortSignal | undefined
  /** Gets the text as it becomes certain; must not throw. */
  readonly onText?: ((delta: string) => void) | undefined
}

export interface EngineMetrics {
  /** Requests that generate, and that wait for it (pictures being prepared included). */
  readonly running: number
  readonly waiting: number
  readonly kvCache: {
    readonly pages: number
    readonly usedPages: number
    readonly pageSize: number
    readonly bytes: number
  }
  readonly visionCache: { readonly bytes: number; readonly hits: number; readonly misses: number }
  /** Null where no image generator is loaded. */
  readonly images: ImageMetrics | null
  /** Since the engine started. */
  readonly steps: number
  readonly preemptions: number
  readonly finished: number
  readonly failed: number
  readonly promptTokens: number
  readonly completionTokens: number
}

/** A request from its arrival to its end. */
class Job {
  readonly request: EngineRequest
  readonly controller = new AbortController()
  readonly start = performance.now()
  generation: Generation | undefined

  constructor(request: EngineRequest) {
    this.request = request
  }
  get signal(): AbortSignal {
    return this.controller.signal
  }
}

/** The part of a job that the scheduler and the runner see. */
class Generation extends Sequence implements RunnableSequence {
  readonly embeds: Tensor
  readonly sampling: Sampling
  readonly answer: AnswerBuilder
  readonly onText: ((delta: string) => void) | undefined
  readonly done: Promise<void>
  settle!: (error?: unknown) => void
  readonly queued = performance.now()
  started = 0
  firstToken = 0
  lastToken = 0

  constructor(embeds: Tensor, tokenizer: Tokenizer, request: EngineRequest, maxTokens: number) {
    super(embeds.shape[0]!, maxTokens)
    this.embeds = embeds
    this.sampling = request.sampling
    this.onText = request.onText
    this.answer = new AnswerBuilder(
      tokenizer,
      { ids: request.stopIds, strings: request.stopStrings, maxTokens },
      { tokens: this.tokens, logprobs: request.sampling.logprobs !== undefined },
    )
    this.done = new Promise<void>((resolve, reject) => {
      this.settle = error => (error === undefined ? resolve() : reject(error))
    })
  }
}

/**
 * Runs all requests over one model: whatever has arrived shares each step. The loop runs only while there is work, and
 * every step waits for the device without holding the event loop.
 */
export class Engine {
  readonly options: Readonly<EngineOptions>
  readonly #model: EngineModel
  readonly #tokenizer: Tokenizer
  readonly #cache: KvCache
  readonly #blocks: BlockManager
  readonly #scheduler: Scheduler<Generation>
  readonly #runner: ModelRunner
  readonly #vision: VisionEncoder
  readonly #images: ImageQueue | undefined
  /** Only requests inside hold pixels and embeddings, so that a long queue costs no memory. */
  readonly #gate: Gate
  readonly #jobs = new Map<Job, Promise<Answer>>()
  readonly #drawings = new Map<AbortController, Promise<FinishedImage[]>>()
  #loop: Promise<void> | undefined
  #closing: Promise<void> | undefined
  readonly #counts = { steps: 0, finished: 0, failed: 0, promptTokens: 0, completionTokens: 0 }

  constructor(
    device: Device,
    model: EngineModel,
    tokenizer: Tokenizer,
    options: EngineOptions,
    imageModel?: ImageModel,
  ) {
    this.options = { ...options }
    this.#model = model
    this.#tokenizer = tokenizer
    this.#blocks = new BlockManager(options.pages, options.pageSize)
    this.#scheduler = new Scheduler(this.#blocks, { ...options, maxContext: model.maxContext })
    this.#gate = new Gate(2 * options.maxSequences)
    this.#vision = new VisionEncoder(device, model, {
      maxBatch: options.visionBatch,
      cacheBytes: options.visionCacheBytes,
      onWork: () => this.#wake(),
    })
    if (imageModel)
      this.#images = new ImageQueue(device, imageModel, {
        maxImages: options.maxImages ?? 1,
        maxQueue: options.maxQueue,
        onWork: () => this.#wake(),
      })
    this.#cache = model.newCache(options.pages, options.pageSize)
    this.#runner = new ModelRunner(
      device,
      model,
      this.#cache,
      options.decodeGraphs ? model.maxContext : undefined,
    )
  }

  /** Answers a request. A failure or abort of one request leaves the others as they are. */
  generate(request: EngineRequest): Promise<Answer> {
    const job = new Job(request)
    const answer = this.#run(job)
    this.#jobs.set(job, answer)
    const forget = () => this.#jobs.delete(job)
    answer.then(forget, forget)
    return answer
  }

  /** Draws images, in turns with the text of other requests. Throws UNSUPPORTED where no image generator is loaded. */
  draw(
    request: Omit<ImageRequest, 'signal'> & { signal?: AbortSignal | undefined },
  ): Promise<FinishedImage[]> {
    const controller = new AbortController()
    const drawing = this.#draw({ ...request, signal: controller.signal }, controller, request.signal)
    this.#drawings.set(controller, drawing)
    const forget = () => this.#drawings.delete(controller)
    drawing.then(forget, forget)
    return drawing
  }

  get metrics(): EngineMetrics {
    const running = this.#scheduler.running.length
    return {
      running,
      waiting: this.#jobs.size - running,
      kvCache: {
        pages: this.#blocks.pages,
        usedPages: this.#blocks.used,
        pageSize: this.#blocks.pageSize,
        bytes: this.#blocks.pages * this.#model.bytesPerPage(this.#blocks.pageSize),
      },
      visionCache: {
        bytes: this.#vision.bytes,
        hits: this.#vision.hits,
        misses: this.#vision.misses,
      },
      images: this.#images?.metrics ?? null,
      preemptions: this.#scheduler.preemptions,
      ...this.#counts,
    }
  }

  /** Rejects what runs with CLOSED, waits for the device's current step, and frees the caches. */
  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close(): Promise<void> {
    const open = [...this.#jobs.values(), ...this.#drawings.values()]
    const controllers = [...[...this.#jobs.keys()].map(job => job.controller), ...this.#drawings.keys()]
    for (const controller of controllers)
      controller.abort(new MgmError('CLOSED', 'the model was closed while the request ran'))
    await Promise.allSettled(open)
    await this.#loop
    this.#vision.dispose()
    this.#images?.dispose()
    this.#runner.dispose()
    this.#cache.dispose()
  }

  async #run(job: Job): Promise<Answer> {
    const { request, controller } = job
    const onAbort = () => controller.abort(aborted(request.signal))
    try {
      this.#checkOpen()
      if (request.signal?.aborted) onAbort()
      job.signal.throwIfAborted()
      request.signal?.addEventListener('abort', onAbort, { once: true })
      return await this.#answer(job)
    } catch (error) {
      this.#counts.failed++
      throw job.signal.aborted ? job.signal.reason : asMgmError(error)
    } finally {
      request.signal?.removeEventListener('abort', onAbort)
      if (job.generation) {
        this.#scheduler.remove(job.generation)
        job.generation.embeds.dispose()
      }
    }
  }

  async #draw(
    request: ImageRequest,
    controller: AbortController,
    outer: AbortSignal | undefined,
  ): Promise<FinishedImage[]> {
    const onAbort = () => controller.abort(aborted(outer))
    try {
      if (this.#closing) throw new MgmError('CLOSED', 'the model is closed')
      if (!this.#images) throw noGenerator()
      if (outer?.aborted) onAbort()
      request.signal.throwIfAborted()
      outer?.addEventListener('abort', onAbort, { once: true })
      return await this.#images.draw(request)
    } catch (error) {
      throw request.signal.aborted ? request.signal.reason : asMgmError(error)
    } finally {
      outer?.removeEventListener('abort', onAbort)
    }
  }

  #checkOpen(): void {
    if (this.#closing) throw new MgmError('CLOSED', 'the model is closed')
    const { maxSequences, maxQueue } = this.options
    if (this.#jobs.size >= maxSequences + maxQueue)
      throw new MgmError(
        'QUEUE_FULL',
        `expected at most ${maxSequences + maxQueue} requests at once but ${this.#jobs.size} are open ` +
          `(${maxSequences} may run, ${maxQueue} wait: maxSequences, maxQueue); try again later`,
      )
  }

  async #answer(job: Job): Promise<Answer> {
    const { request, signal } = job
    const imageTokens = request.pictures.length * this.#model.tokensPerImage
    const promptTokens = request.ids.length - request.pictures.length + imageTokens
    const room = this.#scheduler.roomFor(promptTokens)

    const leave = await this.#gate.enter(signal)
    try {
      const entered = performance.now()
      const leases: VisionLease[] = []
      let imageMs = 0
      try {
        const pictures = await all(request.pictures.map(read => read(signal)))
        signal.throwIfAborted()
        const timed = pictures.map(picture => ({
          key: picture.key,
          pixels: async () => {
            const pixels = await picture.pixels()
            imageMs = performance.now() - entered
            return pixels
          },
        }))
        imageMs = performance.now() - entered
        const encoded = await all(
          timed.map(async picture => {
            const lease = await this.#vision.encode(picture, signal)
            leases.push(lease)
            return lease
          }),
        )
        const embeds = this.#model.splice(
          request.ids,
          encoded.map(lease => lease.embeds),
        )
        job.generation = new Generation(embeds, this.#tokenizer, request, Math.min(request.maxTokens, room))
      } finally {
        for (const lease of leases) lease.release()
      }
      const { generation } = job
      const visionMs = generation.queued - entered - imageMs

      const onAbort = () => {
        this.#scheduler.remove(generation)
        generation.settle(signal.reason)
      }
      signal.throwIfAborted()
      signal.addEventListener('abort', onAbort, { once: true })
      this.#scheduler.add(generation)
      this.#counts.promptTokens += promptTokens
      this.#wake()
      await generation.done

      this.#counts.finished++
      return {
        text: generation.answer.text,
        tokens: generation.tokens,
        finishReason: generation.answer.finishReason!,
        usage: { promptTokens, imageTokens, completionTokens: generation.tokens.length },
        timings: timings(job.start, entered, imageMs, visionMs, generation),
        ...(generation.answer.logprobs && { logprobs: generation.answer.logprobs }),
      }
    } finally {
      leave()
    }
  }

  #wake(): void {
    this.#loop ??= this.#work().then(() => {
      this.#loop = undefined
      // Work may have come between the loop's last look and now.
      if (this.#hasWork) this.#wake()
    })
  }

  get #hasWork(): boolean {
    return this.#vision.hasWork || !this.#scheduler.isIdle || (this.#images?.hasWork ?? false)
  }

  async #work(): Promise<void> {
    // Requests that arrive in the same turn of the event loop share the first step.
    await setImmediate()
    // In turns, so that neither pictures nor text wait for the other to run dry.
    let imageTime = 0
    let textTime = 0
    while (this.#hasWork) {
      const start = performance.now()
      if (this.#vision.hasWork) await this.#vision.step()
      const items = this.#scheduler.schedule()
      if (items.length > 0) await this.#step(items)
      const end = performance.now()
      textTime += end - start
      // A UNet call may take as long as a hundred steps of text: each side gets the time that the other one took.
      if (!this.#images?.hasWork || (items.length > 0 && textTime < imageTime)) continue
      await this.#images.step()
      imageTime = performance.now() - end
      textTime = 0
    }
  }

  /** Runs a step. If it fails, its items run one by one, so that only the one at fault is lost. */
  async #step(items: readonly StepItem<Generation>[]): Promise<void> {
    const now = performance.now()
    for (const { sequence } of items) sequence.started ||= now
    this.#counts.steps++
    let drawn: (Drawn | undefined)[]
    try {
      drawn = await this.#runner.run(items)
    } catch (error) {
      if (items.length === 1) return this.#end(items[0]!.sequence, asMgmError(error))
      for (const item of items) if (item.sequence.state === 'running') await this.#step([item])
      return
    }
    items.forEach((item, i) => {
      try {
        this.#collect(item, drawn[i])
      } catch (error) {
        this.#end(item.sequence, asMgmError(error))
      }
    })
  }

  #collect(item: StepItem<Generation>, drawn: Drawn | undefined): void {
    const { sequence } = item
    // Aborted while the device worked.
    if (sequence.state !== 'running') return
    this.#scheduler.advance(item)
    if (!drawn) return
    if (drawn.id < 0) {
      const place = sequence.tokens.length
      const reason = `the model's logits for token ${place} of the answer hold NaN; the checkpoint's weights or the storage type (dtype, quantize) are to blame`
      this.#end(sequence, new MgmError('NUMERIC', reason))
      return
    }
    const now = performance.now()
    sequence.firstToken ||= now
    sequence.lastToken = now
    this.#counts.completionTokens++
    const delta = sequence.answer.push(drawn)
    if (delta !== '') sequence.onText?.(delta)
    if (sequence.answer.finishReason) this.#end(sequence)
  }

  #end(sequence: Generation, error?: MgmError): void {
    this.#scheduler.remove(sequence)
    sequence.settle(error)
  }
}

function timings(
  start: number,
  entered: number,
  imageMs: number,
  visionMs: number,
  generation: Generation,
): Timings {
  const { queued, started, firstToken, lastToken, tokens } = generation
  const decodeMs = lastToken - firstToken
  return {
    queueMs: entered - start + (started - queued),
    imageMs,
    visionMs,
    prefillMs: firstToken - started,
    decodeMs,
    totalMs: performance.now() - start,
    timeToFirstTokenMs: firstToken - start,
    tokensPerSecond: decodeMs > 0 ? ((tokens.length - 1) * 1000) / decodeMs : 0,
  }
}

/** `Promise.all` that waits for every promise, so that nothing goes on behind a rejection. */
async function all<T>(promises: readonly Promise<T>[]): Promise<T[]> {
  const results = await Promise.allSettled(promises)
  return results.map(result => {
    if (result.status === 'rejected') throw result.reason
    return result.value
  })
}

/** For requests for images to a model that was loaded without an image generator. */
export function noGenerator(): MgmError {
  return new MgmError(
    'UNSUPPORTED',
    'expected a model with an image generator but none was loaded: give load() the option diffusion',
  )
}

function aborted(signal: AbortSignal | undefined): MgmError {
  return new MgmError('ABORTED', 'the request was aborted', { cause: signal?.reason })
}

function asMgmError(error: unknown): MgmError {
  if (error instanceof MgmError) return error
  const message = error instanceof Error ? error.message : String(error)
  return new MgmError('INTERNAL', `the engine failed: ${message}`, { cause: error })
}
