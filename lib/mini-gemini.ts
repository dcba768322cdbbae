import { availableParallelism } from 'node:os'
import { basename, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { type DiffusionCheckpoint, openDiffusion } from './checkpoint/diffusers.ts'
import { type ResolveOptions, resolveCheckpoint } from './checkpoint/hub.ts'
import { type Checkpoint, openCheckpoint, readMgmConfig } from './checkpoint/weights.ts'
import { Device } from './device.ts'
import type { Answer } from './engine/answer.ts'
import { Engine, type EngineMetrics, type EngineRequest, noGenerator } from './engine/engine.ts'
import { follow } from './engine/follow.ts'
import type { ImageStep, ImageTimings } from './engine/image-queue.ts'
import {
  availableMemory,
  diffusionBytes,
  formatBytes,
  placeLayers,
  planPages,
  weightBytes,
} from './engine/memory.ts'
import { PictureReader } from './engine/pictures.ts'
import { randomSeed } from './engine/sampler.ts'
import { expected, MgmError, throwIfAborted } from './errors.ts'
import { KvCache } from './models/decoder.ts'
import type { LoadProgress } from './models/loader.ts'
import { activationsOn, kvDtypeFor, MgmModel } from './models/mgm.ts'
import type { Schedule } from './models/schedulers.ts'
import { Sdxl, type Truncated } from './models/sdxl.ts'
import { native } from './native.ts'
import { type ConversationName, conversationFor } from './processing/conversation.ts'
import { encodeImage, type ImageFormat, readCanvas } from './processing/encode.ts'
import { type ImageInput, ImageProcessor } from './processing/image.ts'
import { imagePromptOf, type MissingPrompt, NEGATIVE_PROMPT } from './processing/image-prompt.ts'
import { buildPrompt, type Message, tokenizePrompt } from './processing/prompt.ts'
import { loadTokenizer, type Tokenizer, type TokenizerFamily } from './processing/tokenizer.ts'
import {
  type ChatRequest,
  type DrawOptions,
  type GenerateRequest,
  type ImagineRequest,
  type LoadOptions,
  parseChatRequest,
  parseGenerateRequest,
  parseImagineRequest,
  parseLoadOptions,
} from './request.ts'

/** What `stream` yields: text as it becomes certain, at last the whole answer. */
export type StreamEvent = { type: 'text'; delta: string } | { type: 'done'; answer: Answer }

export interface GeneratedImage {
  /** A file of the asked format; of 'raw' RGB bytes [height, width, 3]. */
  readonly data: Uint8Array
  readonly format: ImageFormat
  readonly width: number
  readonly height: number
  /** Draws this very image again. */
  readonly seed: number | bigint
  readonly timings: ImageTimings
}

export interface ImagineResult {
  readonly prompt: string
  readonly images: readonly GeneratedImage[]
  /** What the caller should know, such as a prompt that was cut. */
  readonly warnings: readonly string[]
}

export interface GenerateResult extends Omit<ImagineResult, 'prompt'> {
  /** Everything that the model said. */
  readonly text: string
  /** What was drawn; null if the text holds no prompt, and then there are no images. */
  readonly prompt: string | null
  /** Why there is no prompt. */
  readonly reason?: MissingPrompt
  readonly answer: Answer
}

/** What `streamGenerate` yields: the text, what is drawn, each step, at last everything. */
export type GenerateEvent =
  | { type: 'text'; delta: string }
  | { type: 'prompt'; prompt: string }
  | ({ type: 'step' } & ImageStep)
  | { type: 'done'; result: GenerateResult }

/** One request's outcome in a batch. */
export type BatchResult = { ok: true; answer: Answer } | { ok: false; error: MgmError }

export interface BatchOptions {
  /** Called after each request. */
  onProgress?: ((progress: { done: number; failed: number; total: number }) => void) | undefined
  /** Aborts what has not been answered yet. */
  signal?: AbortSignal | undefined
}

/** The model as it was loaded. */
export interface ModelInfo {
  /** Folder of the checkpoint. */
  readonly checkpoint: string
  readonly family: string
  /** Template used where a request names none. */
  readonly conversation: ConversationName
  /** Longest sequence, prompt, pictures and answer together. */
  readonly maxContext: number
  readonly tokensPerImage: number
  /** Folder of the image generator, and the side of its images in pixels; null where none is loaded. */
  readonly diffusion: { readonly checkpoint: string; readonly size: number } | null
  /** Bytes of the weights on the device, the image generator's included. */
  readonly weightBytes: number
  readonly threads: number
  /** Instruction set of the CPU kernels. */
  readonly isa: string
}

/** The demo model of the package. */
const DEMO = fileURLToPath(new URL('../demo', import.meta.url))
const PAGE_SIZE = 16
const DEFAULT_MAX_TOKENS = 512
const DEFAULT_TOKEN_BUDGET = 512
// Of `StableDiffusionXLPipeline` and `StableDiffusionXLImg2ImgPipeline`.
const DEFAULT_STEPS = 50
const DEFAULT_GUIDANCE = 5
const DEFAULT_STRENGTH = 0.3
const DEFAULT_MAX_IMAGES = 4
const MIB = 2 ** 20

const TOKENIZER_OF: Record<Checkpoint['config']['family'], TokenizerFamily> = {
  llama: 'llama',
  gemma: 'gemma',
  mixtral: 'mixtral',
  mistral: 'mixtral',
}

/** Where the releases' towers live on the hub, by the folder names that their configs use. */
const TOWERS_ON_HUB: Record<string, string> = {
  'clip-vit-large-patch14-336': 'openai/clip-vit-large-patch14-336',
  'openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup':
    'laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup',
}

/** A Mini-Gemini model, loaded. All requests share it; every method may be called at any time, also concurrently. */
export class MiniGemini {
  /** The device it runs on: `'cpu'`, `'cuda:0'`; several separated by commas. */
  readonly device: string
  /** What the library decided where options left it a choice. */
  readonly notes: readonly string[]
  readonly info: ModelInfo
  readonly #devices: readonly Device[]
  readonly #model: MgmModel
  readonly #sdxl: Sdxl | undefined
  readonly #tokenizer: Tokenizer
  readonly #engine: Engine
  readonly #pictures: PictureReader
  #closing: Promise<void> | undefined

  private constructor(parts: {
    devices: readonly Device[]
    notes: readonly string[]
    info: ModelInfo
    model: MgmModel
    sdxl: Sdxl | undefined
    tokenizer: Tokenizer
    engine: Engine
    pictures: PictureReader
  }) {
    this.device = parts.devices.map(device => device.name).join(', ')
    this.notes = parts.notes
    this.info = parts.info
    this.#devices = parts.devices
    this.#model = parts.model
    this.#sdxl = parts.sdxl
    this.#tokenizer = parts.tokenizer
    this.#engine = parts.engine
    this.#pictures = parts.pictures
  }

  /**
   * Loads a checkpoint in its released form.
   *
   * @param checkpoint a folder, or a hub repository `owner/name`, which is downloaded once. Without one: the demo model that
   *   comes with the package, its image generator included, which sees and draws emoji and little else (docs/demo-model.md)
   * @throws MgmError INVALID_ARGUMENT, CHECKPOINT_INVALID, CHECKPOINT_UNSUPPORTED, TOKENIZER_INVALID, DOWNLOAD_FAILED,
   *   OUT_OF_MEMORY (checked before anything is loaded), DEVICE_UNAVAILABLE, NATIVE_UNAVAILABLE, UNSUPPORTED, ABORTED.
   *   A load that fails leaves nothing behind.
   */
  static async load(checkpoint: string = DEMO, options: LoadOptions = {}): Promise<MiniGemini> {
    const given = parseLoadOptions(options)
    const checked = checkpoint === DEMO ? { diffusion: join(DEMO, 'sdxl'), ...given } : given
    if (typeof checkpoint !== 'string' || checkpoint === '')
      throw expected('a folder or a hub repository owner/name', 'checkpoint', checkpoint)
    const { signal } = checked
    throwIfAborted(signal)

    const opened = await openFiles(checkpoint, checked)
    const diffusion =
      checked.diffusion === undefined ? undefined : await openDiffusionFiles(checked.diffusion, checked)
    const { config, preprocessor } = opened
    const tokenizer = await loadTokenizer(opened.folder, {
      family: TOKENIZER_OF[config.family],
      extraTokens: [
        ...(config.mm_use_im_patch_token ? ['<im_patch>'] : []),
        ...(config.mm_use_im_start_end ? ['<im_start>', '<im_end>'] : []),
      ],
      signal,
    })
    throwIfAborted(signal)

    const maxSequences = checked.maxSequences ?? 8
    const tokenBudget = Math.max(checked.tokenBudget ?? DEFAULT_TOKEN_BUDGET, maxSequences + 1)
    const visionBatch = visionBatchFor(config.image_size_aux)
    const maxContext = Math.min(
      config.tokenizer_model_max_length,
      config.max_position_embeddings,
      config.sliding_window ?? Number.POSITIVE_INFINITY,
    )
    const totalBytes = opened.totalBytes + (diffusion?.totalBytes ?? 0)
    const progressFrom = (before: number) => (event: LoadProgress) =>
      checked.onProgress?.({ ...event, loaded: before + event.loaded, total: totalBytes })
    const notes: string[] = []
    const devices = openDevices(checked, notes)
    const device = devices[0]!
    let model: MgmModel | undefined
    let sdxl: Sdxl | undefined
    try {
      const activations = activationsOn(device.name, opened, checked.dtype)
      const kvDtype = kvDtypeFor(activations, checked.kvDtype)
      const onCpu = activations === 'f32'
      const weights = weightBytes(opened, {
        dtype: onCpu ? checked.dtype : activations,
        quantize: checked.quantize,
      })
      const generator = diffusion ? diffusionBytes(diffusion, onCpu ? checked.dtype : activations) : 0
      const sizes = { tokenBudget, maxSequences, visionBatch, vocabSize: tokenizer.size }
      const textWork = workBytes(config, sizes, onCpu)
      const available = devices.map(one =>
        Math.min(one.memory().available, onCpu ? availableMemory() : Number.POSITIVE_INFINITY),
      )
      // Text and images take turns, so the larger of the two is what there must be.
      const workFor = (images: number) =>
        Math.max(textWork, diffusion ? Sdxl.bytesAt(diffusion, activations, { images }) : 0)
      let maxImages = checked.maxImages ?? DEFAULT_MAX_IMAGES
      const room = available[0]! - weights.total - generator
      if (checked.maxImages === undefined) while (maxImages > 1 && workFor(maxImages) > room / 2) maxImages--
      const work = workFor(maxImages)
      const bytesPerPage = KvCache.bytesPerPage(config, PAGE_SIZE, kvDtype)
      const pages = planPages({
        weights: weights.total + generator,
        work: work + textWork * (devices.length - 1),
        bytesPerPage,
        pageSize: PAGE_SIZE,
        pagesPerSequence: Math.ceil(maxContext / PAGE_SIZE),
        maxSequences,
        kvMemory: checked.kvMemory,
        available: available.reduce((a, b) => a + b, 0),
      })
      const cacheOfLayer = (pages * bytesPerPage) / config.num_hidden_layers
      const placed = placeLayers({
        layers: weights.layers.map(bytes => bytes + cacheOfLayer),
        rest: weights.total - weights.layers.reduce((a, b) => a + b, 0) + generator,
        available: available.map((bytes, i) => bytes - (i === 0 ? work : textWork)),
      })
      model = await MgmModel.load(device, opened, {
        dtype: checked.dtype,
        quantize: checked.quantize,
        kvDtype,
        layerDevices: placed.map(index => devices[index]!),
        vocabSize: tokenizer.size,
        onProgress: progressFrom(0),
        signal,
      })
      throwIfAborted(signal)
      if (diffusion)
        sdxl = await Sdxl.load(device, diffusion, {
          dtype: checked.dtype,
          activations,
          onProgress: progressFrom(opened.totalBytes),
          signal,
        })
      const engineOptions = {
        pages,
        pageSize: PAGE_SIZE,
        tokenBudget,
        maxSequences,
        maxQueue: checked.maxQueue ?? 256,
        visionBatch,
        visionCacheBytes: checked.visionCacheBytes ?? 256 * MIB,
        decodeGraphs: (checked.decodeGraphs ?? true) && !onCpu && devices.length === 1,
        maxImages,
      }
      const engine = new Engine(device, model, tokenizer, engineOptions, sdxl)
      const processor = new ImageProcessor({
        size: config.image_size_aux,
        mean: preprocessor.image_mean,
        std: preprocessor.image_std,
        pad: config.image_aspect_ratio === 'pad',
      })
      return new MiniGemini({
        devices,
        notes,
        info: {
          checkpoint: opened.folder,
          family: config.family,
          conversation: conversationFor(config),
          maxContext: model.maxContext,
          tokensPerImage: model.tokensPerImage,
          diffusion: sdxl ? { checkpoint: sdxl.checkpoint.folder, size: sdxl.defaultSize } : null,
          weightBytes: model.byteLength + (sdxl?.byteLength ?? 0),
          threads: device.threads,
          isa: device.isa,
        },
        model,
        sdxl,
        tokenizer,
        engine,
        pictures: new PictureReader(processor, Math.min(4, availableParallelism())),
      })
    } catch (error) {
      model?.dispose()
      sdxl?.dispose()
      for (const one of devices) await one.close()
      throw error
    }
  }

  /**
   * Answers a conversation.
   *
   * @throws MgmError INVALID_ARGUMENT, IMAGE_INVALID, DOWNLOAD_FAILED, CONTEXT_OVERFLOW, QUEUE_FULL, NUMERIC, ABORTED, CLOSED;
   *   other requests go on as if nothing had been
   */
  async chat(request: ChatRequest): Promise<Answer> {
    return this.#engine.generate(this.#prepare(request))
  }

  /** `chat`, with the text as it comes; the deltas joined are `answer.text`. Leaving the loop aborts the request. */
  async *stream(request: ChatRequest): AsyncGenerator<StreamEvent, void, undefined> {
    const prepared = this.#prepare(request)
    yield* follow<StreamEvent>(
      prepared.signal,
      async (emit, signal) => {
        const onText = (delta: string) => emit({ type: 'text', delta })
        return { type: 'done', answer: await this.#engine.generate({ ...prepared, signal, onText }) }
      },
      mergeText,
    )
  }

  /**
   * Lets the model write a prompt (` <GEN>` behind the last user message) and draws it. An answer that holds no prompt is
   * no error: `prompt` is null, and `reason` says why. (MGM paper, section 3.4; mgm/serve/cli.py)
   *
   * @throws MgmError as `chat` and `imagine`
   */
  async generate(request: GenerateRequest): Promise<GenerateResult> {
    return this.#generate(parseGenerateRequest(request), {})
  }

  /** `generate`, with text and steps as they come. Leaving the loop aborts the request. */
  async *streamGenerate(request: GenerateRequest): AsyncGenerator<GenerateEvent, void, undefined> {
    const checked = parseGenerateRequest(request)
    yield* follow<GenerateEvent>(
      checked.signal,
      async (emit, signal) => {
        const result = await this.#generate(checked, {
          signal,
          onText: delta => emit({ type: 'text', delta }),
          onPrompt: prompt => emit({ type: 'prompt', prompt }),
          onStep: step => emit({ type: 'step', ...step }),
        })
        return { type: 'done', result }
      },
      mergeText,
    )
  }

  /**
   * Draws a prompt with SDXL.
   *
   * @throws MgmError INVALID_ARGUMENT, UNSUPPORTED (no `diffusion` was loaded), IMAGE_INVALID, DOWNLOAD_FAILED, OUT_OF_MEMORY,
   *   NUMERIC, QUEUE_FULL, ABORTED, CLOSED; other requests go on as if nothing had been
   */
  async imagine(request: ImagineRequest): Promise<ImagineResult> {
    const { prompt, ...options } = parseImagineRequest(request)
    return { prompt, ...(await this.#draw(prompt, options)) }
  }

  /** Answers many requests; results in the order of the requests, each an answer or an error. */
  async batch(requests: readonly ChatRequest[], options: BatchOptions = {}): Promise<BatchResult[]> {
    if (!Array.isArray(requests)) throw expected('an array of requests', 'requests', requests)
    const { onProgress, signal } = options
    const total = requests.length
    const results: BatchResult[] = new Array(total)
    let next = 0
    let done = 0
    let failed = 0
    const worker = async () => {
      while (next < total) {
        const at = next++
        results[at] = await this.#settle(requests[at]!, signal)
        done++
        if (!results[at].ok) failed++
        onProgress?.({ done, failed, total })
      }
    }
    // Twice what can run: while some generate, the next ones' pictures are prepared.
    const workers = Math.min(total, 2 * this.#engine.options.maxSequences)
    await Promise.all(Array.from({ length: workers }, worker))
    return results
  }

  /** Requests, caches and counts as they are now. */
  get metrics(): EngineMetrics & { readonly memory: { readonly used: number; readonly peak: number } } {
    const memory = this.#devices.map(device => device.memory())
    const used = memory.reduce((sum, one) => sum + one.used, 0)
    const peak = memory.reduce((sum, one) => sum + one.peak, 0)
    return { ...this.#engine.metrics, memory: { used, peak } }
  }

  /** Rejects what runs with CLOSED, waits until the device is idle and frees everything. */
  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  async #close(): Promise<void> {
    await this.#engine.close()
    this.#model.dispose()
    this.#sdxl?.dispose()
    for (const device of this.#devices) await device.close()
  }

  async #settle(request: ChatRequest, signal: AbortSignal | undefined): Promise<BatchResult> {
    const controller = new AbortController()
    const abort = (event: Event) => controller.abort((event.target as AbortSignal).reason)
    try {
      const prepared = this.#prepare(request)
      const signals = [signal, prepared.signal].filter(one => one !== undefined)
      for (const one of signals) {
        throwIfAborted(one)
        one.addEventListener('abort', abort, { once: true })
      }
      try {
        return {
          ok: true,
          answer: await this.#engine.generate({ ...prepared, signal: controller.signal }),
        }
      } finally {
        for (const one of signals) one.removeEventListener('abort', abort)
      }
    } catch (error) {
      if (error instanceof MgmError) return { ok: false, error }
      throw error
    }
  }

  async #generate(
    request: GenerateRequest,
    watch: {
      signal?: AbortSignal
      onText?: (delta: string) => void
      onPrompt?: (prompt: string) => void
      onStep?: (step: ImageStep) => void
    },
  ): Promise<GenerateResult> {
    const { messages, negativePrompt, width, height, steps, guidance, sampler, karras, ...rest } = request
    const { count, image, strength, format, quality, previews, onStep, ...chat } = rest
    const signal = watch.signal ?? request.signal
    const draw = { negativePrompt, width, height, steps, guidance, sampler, karras, seed: request.seed }
    const options = { ...draw, count, image, strength, format, quality, previews, signal }
    // Before the model speaks, so that a mistake costs nothing.
    this.#generator(options)
    const prepared = this.#prepare({ ...chat, messages, gen: true })
    const answer = await this.#engine.generate({ ...prepared, signal, onText: watch.onText })
    const found = imagePromptOf(answer.text)
    const said = { text: answer.text, answer }
    if (found.prompt === null)
      return { ...said, prompt: null, reason: found.reason, images: [], warnings: [] }
    watch.onPrompt?.(found.prompt)
    const watching = (step: ImageStep) => {
      watch.onStep?.(step)
      onStep?.(step)
    }
    const watched = onStep !== undefined || watch.onStep !== undefined
    const drawn = await this.#draw(found.prompt, { ...options, ...(watched && { onStep: watching }) })
    return { ...said, prompt: found.prompt, ...drawn }
  }

  /** The image generator, with the schedule of a request. */
  #generator(options: DrawOptions): {
    sdxl: Sdxl
    schedule: Schedule
    steps: number
    strength: number | undefined
  } {
    if (this.#closing) throw new MgmError('CLOSED', 'the model is closed')
    const sdxl = this.#sdxl
    if (!sdxl) throw noGenerator()
    const { steps = DEFAULT_STEPS, sampler, karras } = options
    const strength = options.image === undefined ? undefined : (options.strength ?? DEFAULT_STRENGTH)
    return { sdxl, schedule: sdxl.schedule({ steps, sampler, karras, strength }), steps, strength }
  }

  /** Before the system would run out, which no error can tell of. */
  #checkRoom(sdxl: Sdxl, width: number, height: number): void {
    const needed = Sdxl.bytesAt(sdxl.checkpoint, sdxl.activations, { images: 1, height, width })
    const { available, reserved } = sdxl.device.memory()
    const room = sdxl.device.name === 'cpu' ? Math.min(available, availableMemory() + reserved) : available
    if (needed > room)
      throw new MgmError(
        'OUT_OF_MEMORY',
        `an image of ${width} x ${height} needs ${formatBytes(needed)} but ${formatBytes(room)} are available; ask for a smaller one`,
      )
  }

  async #draw(prompt: string, options: DrawOptions): Promise<Omit<ImagineResult, 'prompt'>> {
    const { sdxl, schedule, steps, strength } = this.#generator(options)
    const { signal, count = 1, format = 'png', guidance = DEFAULT_GUIDANCE, previews = false } = options
    throwIfAborted(signal)
    const canvas =
      options.image === undefined
        ? undefined
        : await readCanvas(
            options.image,
            { width: options.width, height: options.height, step: sdxl.scale },
            { signal },
          )
    const { width = sdxl.defaultSize, height = sdxl.defaultSize } = canvas ?? options
    this.#checkRoom(sdxl, width, height)
    if (previews && options.onStep) await sdxl.preparePreviews()
    const guided = guidance > 1
    const first = options.seed ?? Math.floor(Math.random() * 2 ** 48)
    const seeds = Array.from({ length: count }, (_, i) => seedAfter(first, i))
    const negativePrompt = options.negativePrompt === undefined ? NEGATIVE_PROMPT : options.negativePrompt
    const images = await this.#engine.draw({
      plan: { width, height, schedule, guided },
      key: JSON.stringify([width, height, guided, steps, options.sampler, options.karras, strength]),
      items: seeds.map(seed => ({
        prompt,
        negativePrompt,
        guidance,
        seed: BigInt(seed),
        image: canvas?.pixels,
      })),
      // What was planned for so many images of the default size.
      together: Math.max(
        1,
        Math.floor((this.#engine.options.maxImages! * sdxl.defaultSize ** 2) / (width * height)),
      ),
      previews,
      onStep: options.onStep,
      signal,
    })
    return {
      images: await Promise.all(
        images.map(async ({ timings, ...image }, i) => ({
          data: await encodeImage(image, format, options.quality),
          format,
          width,
          height,
          seed: seeds[i]!,
          timings,
        })),
      ),
      warnings: [
        ...cutWarning('prompt', sdxl.truncated(prompt)),
        // MGM's own is longer than the encoders take, and known to be.
        ...(guided && typeof options.negativePrompt === 'string'
          ? cutWarning('negativePrompt', sdxl.truncated(options.negativePrompt))
          : []),
      ],
    }
  }

  /** Checks a request and turns it into ids and settings. */
  #prepare(value: ChatRequest): EngineRequest {
    if (this.#closing) throw new MgmError('CLOSED', 'the model is closed')
    const request = parseChatRequest(value)
    const prompt = buildPrompt<ImageInput>(
      request.messages.map(
        ({ role, content, ocrHint, gen }): Message<ImageInput> => ({
          role,
          content,
          ocrHint,
          generateImage: gen,
        }),
      ),
      {
        conversation: request.conversation ?? this.info.conversation,
        ocrHint: request.ocrHint,
        generateImage: request.gen,
        forbidden: request.allowSpecialTokens === false ? this.#tokenizer.specialTokens : [],
      },
    )
    const wrong = request.stopTokenIds?.findIndex(id => id >= this.#model.vocabSize) ?? -1
    if (wrong >= 0)
      throw expected(
        `an id from 0 to ${this.#model.vocabSize - 1}`,
        `stopTokenIds[${wrong}]`,
        request.stopTokenIds![wrong],
      )
    return {
      ids: Int32Array.from(tokenizePrompt(this.#tokenizer, prompt)),
      pictures: prompt.images.map(image => signal => this.#pictures.read(image, signal)),
      sampling: {
        temperature: request.temperature ?? 0,
        topK: request.topK ?? 0,
        topP: request.topP ?? 1,
        minP: request.minP ?? 0,
        repetitionPenalty: request.repetitionPenalty ?? 1,
        presencePenalty: request.presencePenalty ?? 0,
        frequencyPenalty: request.frequencyPenalty ?? 0,
        seed: request.seed === undefined ? randomSeed() : BigInt(request.seed),
        logprobs: request.logprobs,
      },
      maxTokens: request.maxTokens ?? DEFAULT_MAX_TOKENS,
      stopStrings: typeof request.stop === 'string' ? [request.stop] : (request.stop ?? []),
      stopIds: new Set([this.#tokenizer.eosId, ...(request.stopTokenIds ?? [])]),
      signal: request.signal,
    }
  }
}

/** Text deltas that nobody has taken yet are joined. */
function mergeText<E extends { type: string; delta?: string }>(last: E, next: E): E | undefined {
  return last.type === 'text' && next.type === 'text'
    ? { ...last, delta: last.delta! + next.delta! }
    : undefined
}

function seedAfter(seed: number | bigint, i: number): number | bigint {
  if (typeof seed === 'number' && Number.isSafeInteger(seed + i)) return seed + i
  return BigInt.asUintN(64, BigInt(seed) + BigInt(i))
}

function cutWarning(name: string, [first, second]: Truncated): string[] {
  const cut = first || second
  return cut === ''
    ? []
    : [`the ${name} is longer than the text encoders take: ${JSON.stringify(cut)} was left out`]
}

/** Finds the checkpoint and its towers, downloading what was named by hub id, and reads all headers. */
async function openFiles(checkpoint: string, options: LoadOptions): Promise<Checkpoint> {
  const { signal } = options
  const shared = hubOptions(options)
  const folder = await resolveCheckpoint(checkpoint, { ...shared, revision: options.revision })
  const config = readMgmConfig(folder)
  const tower = async (given: string | undefined, configured: string | null) => {
    // A local checkpoint has its towers beside it; one from the hub comes alone.
    const onHub = folder !== checkpoint && configured ? TOWERS_ON_HUB[basename(configured)] : undefined
    const source = given ?? onHub
    return source === undefined ? undefined : resolveCheckpoint(source, shared)
  }
  const visionTower = await tower(options.visionTower, config.mm_vision_tower)
  const visionTowerAux = await tower(options.visionTowerAux, config.mm_vision_tower_aux)
  throwIfAborted(signal)
  return openCheckpoint(folder, {
    ...(visionTower !== undefined && { visionTower }),
    ...(visionTowerAux !== undefined && { visionTowerAux }),
  })
}

/** Finds the image generator, downloading it if it was named by hub id, and reads all headers. */
async function openDiffusionFiles(source: string, options: LoadOptions): Promise<DiffusionCheckpoint> {
  const folder = await resolveCheckpoint(source, hubOptions(options))
  throwIfAborted(options.signal)
  return openDiffusion(folder)
}

function hubOptions({ cacheDir, token, endpoint, offline, onProgress, signal }: LoadOptions): ResolveOptions {
  return { cacheDir, token, endpoint, offline, onProgress, signal }
}

/**
 * Opens the asked device, with `deviceMap: 'auto'` the other GPUs behind it. With 'auto' the CPU stands in for a GPU that
 * cannot be used, and a note says why.
 */
function openDevices(options: LoadOptions, notes: string[]): Device[] {
  const { device = 'auto', threads, memoryLimit, deviceMap } = options
  const settings = {
    ...(threads !== undefined && { threads }),
    ...(memoryLimit !== undefined && { memoryLimit }),
  }
  if (deviceMap && device === 'cpu')
    throw expected("'auto', 'cuda' or 'cuda:N'", 'device with deviceMap', device)
  let first: Device
  try {
    first = Device.open(device === 'auto' ? 'cuda' : device, settings)
  } catch (error) {
    if (device !== 'auto' || !(error instanceof MgmError) || error.code !== 'DEVICE_UNAVAILABLE') throw error
    notes.push(`running on the CPU: ${error.message}`)
    return [Device.open('cpu', settings)]
  }
  const devices = [first]
  if (!deviceMap) return devices
  try {
    const own = Number(/\d+$/.exec(first.name)?.[0] ?? 0)
    for (const index of native().cudaSurvey().devices.keys())
      if (index !== own) devices.push(Device.open(`cuda:${index}`, settings))
    return devices
  } catch (error) {
    for (const one of devices) void one.close()
    throw error
  }
}

/** Pictures encoded in one go: as many as make the pixels of two at the releases' size, at most eight. */
function visionBatchFor(imageSize: number): number {
  return Math.min(8, Math.max(1, Math.floor((2 * 768 ** 2) / imageSize ** 2)))
}

/** Bytes of the activations that live at once in the largest steps, from above. */
function workBytes(
  config: Checkpoint['config'],
  sizes: { tokenBudget: number; maxSequences: number; visionBatch: number; vocabSize: number },
  onCpu: boolean,
): number {
  const bytes = onCpu ? 4 : 2
  // ConvNeXt's first stage: a quarter-size map with its input, norm and four-fold inner layer; and the pixels.
  const map = (config.image_size_aux / 4) ** 2
  const channels = Math.ceil(config.mm_hidden_size_aux / 15)
  const vision = sizes.visionBatch * (map * channels * 7 + config.image_size_aux ** 2 * 3) * bytes
  const text = sizes.tokenBudget * (6 * config.hidden_size + 2 * config.intermediate_size) * bytes
  const logits = 2 * sizes.maxSequences * sizes.vocabSize * 4
  if (onCpu) return vision + text + logits
  // A GPU's draw works on lists of candidates, and every recorded step (1, 2, 4, … sequences) keeps its own.
  const candidates = sizes.maxSequences * sizes.vocabSize * 24
  const experts = (config.num_experts_per_tok ?? 0) * sizes.tokenBudget * config.hidden_size * 4
  return vision + text + 3 * (logits + candidates) + Math.min(experts, 128 * MIB)
}
