import * as z from 'zod'
import { SAMPLERS, type Sampler } from './checkpoint/diffusers.ts'
import type { ImageStep } from './engine/image-queue.ts'
import { describe, expected, MgmError } from './errors.ts'
import { conversations } from './processing/conversation.ts'
import { IMAGE_FORMATS, type ImageFormat } from './processing/encode.ts'

/** A picture: a path, a file:, https: or data: URL, or the bytes of an image file. */
export type ImageSource = string | URL | Uint8Array

// Every schema carries its own words for `expected … for <path>`.
const words = (error: string) => ({ error })

export const integer = (least: number, most = Number.MAX_SAFE_INTEGER) => {
  const text = words(
    most === Number.MAX_SAFE_INTEGER
      ? `an integer of at least ${least}`
      : `an integer from ${least} to ${most}`,
  )
  return z.int(text).min(least, text).max(most, text)
}
export const number = (least: number, most: number) => {
  const text = words(`a number from ${least} to ${most}`)
  return z.number(text).min(least, text).max(most, text)
}
const boolean = z.boolean(words('true or false'))
export const string = (least = 1) => {
  const text = words(least > 0 ? 'a non-empty string' : 'a string')
  return z.string(text).min(least, text)
}
const oneOf = <const T extends readonly string[]>(values: T) =>
  z.enum(values, words(`one of ${values.map(value => `'${value}'`).join(', ')}`))
const signal = z.custom<AbortSignal>(
  value =>
    typeof value === 'object' &&
    value !== null &&
    typeof (value as AbortSignal).aborted === 'boolean' &&
    typeof (value as AbortSignal).addEventListener === 'function',
  words('an AbortSignal'),
)
const callback = <F>() => z.custom<F>(value => typeof value === 'function', words('a function'))
export const object = <T extends z.core.$ZodLooseShape>(shape: T) =>
  z.strictObject(shape, {
    error: issue =>
      issue.code === 'unrecognized_keys' ? `only the keys ${Object.keys(shape).join(', ')}` : 'an object',
  })

const image = z.custom<ImageSource>(
  value => (typeof value === 'string' && value !== '') || value instanceof URL || value instanceof Uint8Array,
  words('a path, URL, Buffer or Uint8Array'),
)
const part = z.discriminatedUnion(
  'type',
  [object({ type: z.literal('text'), text: string(0) }), object({ type: z.literal('image'), image })],
  words('a text part or an image part'),
)
const ocrHint = z.array(string(0), words('an array of strings'))
export const message = object({
  role: oneOf(['system', 'user', 'assistant']),
  content: z.union([z.string(), z.array(part)], words('a string or an array of parts')),
  ocrHint: ocrHint.optional(),
  gen: boolean.optional(),
})

const SEED_WORDS = words('an integer of 64 bits')

const seed = z.union(
  [
    z.int(SEED_WORDS),
    z
      .bigint(SEED_WORDS)
      .min(-(2n ** 63n), SEED_WORDS)
      .lt(2n ** 64n, SEED_WORDS),
  ],
  SEED_WORDS,
)

const chatShape = {
  messages: z
    .array(message, words('a non-empty array of messages'))
    .min(1, words('a non-empty array of messages')),
  conversation: oneOf(Object.keys(conversations) as (keyof typeof conversations)[]).optional(),
  ocrHint: ocrHint.optional(),
  gen: boolean.optional(),
  allowSpecialTokens: boolean.optional(),
  maxTokens: integer(1).optional(),
  temperature: number(0, 100).optional(),
  topK: integer(0, 2 ** 31 - 1).optional(),
  topP: number(0, 1).gt(0, words('a number above 0, up to 1')).optional(),
  minP: number(0, 1).optional(),
  repetitionPenalty: number(0.01, 100).optional(),
  presencePenalty: number(-100, 100).optional(),
  frequencyPenalty: number(-100, 100).optional(),
  seed: seed.optional(),
  stop: z
    .union(
      [string(), z.array(string()).max(64, words('at most 64 strings'))],
      words('a non-empty string or an array of them'),
    )
    .optional(),
  stopTokenIds: z.array(integer(0), words('an array of token ids')).optional(),
  logprobs: integer(0, 20).optional(),
  signal: signal.optional(),
}
const chatRequest = object(chatShape)

const side = integer(8, 8192).multipleOf(8, words('a multiple of 8 from 8 to 8192'))
const drawShape = {
  negativePrompt: z.string().nullable().optional(),
  width: side.optional(),
  height: side.optional(),
  steps: integer(1, 1000).optional(),
  guidance: number(0, 100).optional(),
  sampler: oneOf(SAMPLERS).optional(),
  karras: boolean.optional(),
  seed: seed.optional(),
  count: integer(1, 64).optional(),
  image: image.optional(),
  strength: number(0, 1).gt(0, words('a number above 0, up to 1')).optional(),
  format: oneOf(IMAGE_FORMATS).optional(),
  quality: integer(1, 100).optional(),
  previews: boolean.optional(),
  onStep: callback<(step: ImageStep) => void>().optional(),
  signal: signal.optional(),
}
const imagineRequest = object({ prompt: string(), ...drawShape })
const { gen: _, ...chatWithoutGen } = chatShape
const generateRequest = object({ ...chatWithoutGen, ...drawShape })

/** A conversation to be continued, and how. Plain JSON apart from image bytes and the signal. */
export interface ChatRequest {
  messages: ChatMessage[]
  /** Template to use instead of the one the checkpoint was trained with. */
  conversation?: keyof typeof conversations | undefined
  /** Words read in the picture by OCR, given to the last user message. */
  ocrHint?: string[] | undefined
  /** Asks the model to write a prompt for the image generator: ` <GEN>` after the last user message. */
  gen?: boolean | undefined
  /**
   * Whether special tokens written out in texts are those tokens, as in the reference (default). Set it to false where
   * texts come from strangers: such a text is then refused.
   */
  allowSpecialTokens?: boolean | undefined
  /** Most ids to generate. Default 512; never more than the context has room for. */
  maxTokens?: number | undefined
  /** 0 (default): always the most likely id. */
  temperature?: number | undefined
  /** Draw among the k most likely ids; 0 (default): all. */
  topK?: number | undefined
  /** Draw among the most likely ids that make up this share of the probability. Default 1. */
  topP?: number | undefined
  /** Leave out ids less likely than this share of the most likely one. Default 0. */
  minP?: number | undefined
  /** Divides positive and multiplies negative logits of ids already generated. Default 1. */
  repetitionPenalty?: number | undefined
  /** Subtracted from logits of ids already generated. Default 0. */
  presencePenalty?: number | undefined
  /** Subtracted for each time an id was generated. Default 0. */
  frequencyPenalty?: number | undefined
  /** 64 bits. Default: random. */
  seed?: number | bigint | undefined
  /** The text ends before the first of these. */
  stop?: string | string[] | undefined
  /** Ids that end the answer besides the tokenizer's end id. */
  stopTokenIds?: number[] | undefined
  /** Reports log-probabilities, with those of the n most likely ids at each place (0 to 20). */
  logprobs?: number | undefined
  signal?: AbortSignal | undefined
}

export interface ChatMessage {
  role: 'system' | 'user' | 'assistant'
  content: string | ({ type: 'text'; text: string } | { type: 'image'; image: ImageSource })[]
  /** For an earlier user message, what `ChatRequest.ocrHint` was then. */
  ocrHint?: string[] | undefined
  /** For an earlier user message, what `ChatRequest.gen` was then. */
  gen?: boolean | undefined
}

/** How images are drawn. Source of the defaults: MGM's use of `StableDiffusionXLPipeline`. */
export interface DrawOptions {
  /** What the images shall not show. Default: MGM's own; null: nothing, which is not the same as ''. */
  negativePrompt?: string | null | undefined
  /** Pixels, multiples of 8. Default: what the model was trained for (SDXL: 1024), or the size of `image`. */
  width?: number | undefined
  height?: number | undefined
  /** Default 50. */
  steps?: number | undefined
  /** Weight of the prompt (classifier-free guidance), default 5. 1 or less: the negative prompt is not used, at half the work. */
  guidance?: number | undefined
  /** Default: the checkpoint's own (SDXL: 'euler'). */
  sampler?: Sampler | undefined
  /** Noise levels spaced as Karras et al. (2022), for 'euler' and 'dpmpp_2m'. Default: the checkpoint's own. */
  karras?: boolean | undefined
  /** 64 bits; image i is drawn from seed + i. Equal seeds give equal images, whatever is drawn beside them. Default: random. */
  seed?: number | bigint | undefined
  /** Default 1. */
  count?: number | undefined
  /** A picture to start from (image-to-image). */
  image?: ImageSource | undefined
  /** How far to depart from `image`: the share of the steps that are taken, above 0, up to 1. Default 0.3. */
  strength?: number | undefined
  /** Of `GeneratedImage.data`. Default 'png'. */
  format?: ImageFormat | undefined
  /** Of JPEG and WebP, 1 to 100. Default 90. */
  quality?: number | undefined
  /** Whether each `ImageStep` holds a small picture of what is to come. */
  previews?: boolean | undefined
  /** After each step of each image. */
  onStep?: ((step: ImageStep) => void) | undefined
  signal?: AbortSignal | undefined
}

/** Images of a prompt. */
export interface ImagineRequest extends DrawOptions {
  /** At most 75 tokens; what is longer is cut, with a warning. */
  prompt: string
}

/** A conversation whose answer says what to draw. `seed` serves both. */
export interface GenerateRequest extends Omit<ChatRequest, 'gen'>, DrawOptions {}

/** Download: bytes of a file. Load: bytes of all weights brought to the device. */
export type ProgressEvent =
  | { phase: 'download'; file: string; loaded: number; total: number }
  | { phase: 'load'; loaded: number; total: number }

const loadOptions = object({
  device: string().optional(),
  deviceMap: z.literal('auto', words("'auto'")).optional(),
  decodeGraphs: boolean.optional(),
  diffusion: string().optional(),
  maxImages: integer(1, 64).optional(),
  dtype: oneOf(['f32', 'bf16', 'f16']).optional(),
  quantize: oneOf(['int8', 'int4']).optional(),
  kvDtype: oneOf(['f32', 'bf16', 'f16']).optional(),
  visionTower: string().optional(),
  visionTowerAux: string().optional(),
  memoryLimit: integer(1).optional(),
  threads: integer(1, 1024).optional(),
  maxSequences: integer(1, 4096).optional(),
  maxQueue: integer(0, 1_000_000).optional(),
  tokenBudget: integer(2, 1_000_000).optional(),
  kvMemory: integer(1).optional(),
  visionCacheBytes: integer(0).optional(),
  cacheDir: string().optional(),
  revision: string().optional(),
  token: string().optional(),
  endpoint: string().optional(),
  offline: boolean.optional(),
  onProgress: callback<(event: ProgressEvent) => void>().optional(),
  signal: signal.optional(),
})

export interface LoadOptions {
  /** `'cpu'`, `'cuda'`, `'cuda:N'`, or `'auto'` (default): the GPU if there is a usable one, else the CPU. */
  device?: string | undefined
  /** `'auto'`: spreads the decoder's layers over all GPUs by their free memory; `device` names the one that does the rest. */
  deviceMap?: 'auto' | undefined
  /** Whether decode steps on a GPU are recorded as graphs and replayed. Default true; never over several GPUs. */
  decodeGraphs?: boolean | undefined
  /** Folder or hub id of an SDXL checkpoint in diffusers' layout, for `generate` and `imagine`. Default: none. */
  diffusion?: string | undefined
  /** Most images denoised together. Default 4, fewer where memory is short. */
  maxImages?: number | undefined
  /**
   * Storage of weight matrices. Default: as the checkpoint stores them. On a GPU bf16 or f16, which is also what it
   * computes in; default the decoder's own, or bf16.
   */
  dtype?: 'f32' | 'bf16' | 'f16' | undefined
  /** Quantizes the language model's matrices on loading, in blocks of 32. */
  quantize?: 'int8' | 'int4' | undefined
  /** Storage of the KV cache. Default 'f32'; on a GPU always as `dtype`. */
  kvDtype?: 'f32' | 'bf16' | 'f16' | undefined
  /** Folder or hub id of the CLIP tower. Default: where the checkpoint's config says. */
  visionTower?: string | undefined
  /** Folder or hub id of the OpenCLIP ConvNeXt tower. Default: where the checkpoint's config says. */
  visionTowerAux?: string | undefined
  /** Most bytes for weights, caches and work together. Default: what is available. */
  memoryLimit?: number | undefined
  /** Threads that compute. Default: the cores this process may use. */
  threads?: number | undefined
  /** Most requests that generate at once. Default 8. */
  maxSequences?: number | undefined
  /** Most requests that wait beyond those; more are refused with QUEUE_FULL. Default 256. */
  maxQueue?: number | undefined
  /** Most positions computed in one step; a longer prompt is taken in chunks. Default 512. */
  tokenBudget?: number | undefined
  /** Bytes of the KV cache. Default: `maxSequences` full contexts, or fewer where memory is short. */
  kvMemory?: number | undefined
  /** Bytes of picture embeddings kept for pictures that come again. Default 256 MiB. */
  visionCacheBytes?: number | undefined
  /** Hub downloads: cache folder, branch or commit, access token, hub to ask, and whether to use the cache only. */
  cacheDir?: string | undefined
  revision?: string | undefined
  token?: string | undefined
  endpoint?: string | undefined
  offline?: boolean | undefined
  onProgress?: ((event: ProgressEvent) => void) | undefined
  signal?: AbortSignal | undefined
}

/** A question, after the pictures it is about. */
export function userMessage(images: readonly ImageSource[], text: string): ChatMessage {
  return {
    role: 'user',
    content: [...images.map(image => ({ type: 'image' as const, image })), { type: 'text', text }],
  }
}

/** Checks a request. Throws INVALID_ARGUMENT; unknown keys are refused. */
export function parseChatRequest(value: unknown): ChatRequest {
  return parse(chatRequest, value, 'request')
}

/** Checks a request for images. Throws INVALID_ARGUMENT. */
export function parseImagineRequest(value: unknown): ImagineRequest {
  return checkStrength(parse(imagineRequest, value, 'request'))
}

/** Checks a request for an answer and its images. Throws INVALID_ARGUMENT. */
export function parseGenerateRequest(value: unknown): GenerateRequest {
  return checkStrength(parse(generateRequest, value, 'request'))
}

function checkStrength<T extends DrawOptions>(request: T): T {
  if (request.strength !== undefined && request.image === undefined)
    throw expected('an image to start from', 'strength', request.strength)
  return request
}

/** Checks load options. Throws INVALID_ARGUMENT. */
export function parseLoadOptions(value: unknown): LoadOptions {
  return parse(loadOptions, value, 'options')
}

/** Checks a value; `name` is what a message calls it. Throws INVALID_ARGUMENT. */
export function parse<T>(schema: z.ZodType<T>, value: unknown, name: string): T {
  const result = schema.safeParse(value)
  if (result.success) return result.data
  const issue = deepest(result.error.issues)
  let at = value
  for (const key of issue.path) at = (at as Record<PropertyKey, unknown> | null | undefined)?.[key]
  const path = issue.path.reduce<string>(
    (text, key) => (typeof key === 'number' ? `${text}[${key}]` : `${text}.${String(key)}`),
    '',
  )
  const where = path === '' ? name : path.replace(/^\./, '')
  if (issue.code === 'unrecognized_keys')
    throw new MgmError(
      'INVALID_ARGUMENT',
      `expected ${issue.message} for ${where} but received ${issue.keys.map(key => describe(key)).join(', ')}`,
    )
  throw expected(issue.message, where, at)
}

type Issue = z.core.$ZodIssue

/** The issue that says most: of a union's branches the one that got furthest. */
function deepest(issues: readonly Issue[]): Issue {
  const issue = issues[0]!
  if (issue.code !== 'invalid_union' || issue.errors.length === 0) return issue
  const inner = issue.errors
    .map(branch => (branch.length > 0 ? deepest(branch) : undefined))
    .filter(candidate => candidate !== undefined)
    .sort((a, b) => b.path.length - a.path.length)[0]
  if (!inner || (inner.path.length === 0 && inner.code !== 'unrecognized_keys')) return issue
  return { ...inner, path: [...issue.path, ...inner.path] } as Issue
}
