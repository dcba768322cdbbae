import { constants, type Stats } from 'node:fs'
import { type FileHandle, open } from 'node:fs/promises'
import { fileURLToPath } from 'node:url'
import sharp, { type Metadata, type Sharp, type SharpOptions } from 'sharp'
import { describe, expected, MgmError, throwIfAborted } from '../errors.ts'
import { type NativeResize, native } from '../native.ts'

/** A path; a `file:`, `https:` or `data:` URL; or the bytes of an image file. */
export type ImageInput = string | URL | Uint8Array

/** Where an image may come from; `https` includes plain http to this very machine (localhost, 127.0.0.0/8, ::1). */
export type ImageSource = 'file' | 'https' | 'data' | 'bytes'

export interface DecodeOptions {
  signal?: AbortSignal | undefined
  /** Width times height, default 100e6. */
  maxPixels?: number | undefined
  /** Bytes of the encoded file, default 64 MiB. */
  maxBytes?: number | undefined
  /** Milliseconds for a whole download, redirects included, default 30 000. */
  timeout?: number | undefined
  /** Default: all. A server that takes requests from strangers should leave out `file` (and `https`, or filter it). */
  sources?: readonly ImageSource[] | undefined
}

export interface DecodedImage {
  /** RGB, [height, width, 3]. Leave it alone while it is being processed. */
  readonly data: Uint8Array
  readonly width: number
  readonly height: number
}

const MAX_REDIRECTS = 5
/** The native resize's own limit (native/processing/image.h). */
const MAX_SIDE = 65536
const DECODE_SECONDS = 60
const FORMATS = ['jpeg', 'png', 'gif', 'webp', 'tiff', 'avif'] as const
type Format = (typeof FORMATS)[number]
const FORMAT_NAMES = 'a JPEG, PNG, GIF, WebP, TIFF or AVIF image'

/**
 * Decodes an image as Pillow's `Image.open(…).convert('RGB')` does: EXIF orientation and colour profiles are ignored,
 * alpha is dropped (not blended), palettes are expanded, gray is replicated, CMYK goes by Pillow's formula, animations
 * and multi-page files give their first picture. Samples of 16 bits keep their high byte; Pillow does so too except
 * for 16-bit gray, which it clips to white. Transparent GIF pixels are black, not their palette entry.
 *
 * Decoding runs on native threads. The kind of file is told by its first bytes; SVG, PDF and everything else but JPEG,
 * PNG, GIF, WebP, TIFF and AVIF is refused before a decoder sees it. Downloads are https only, except to this machine,
 * and follow at most 5 redirects, never to http.
 *
 * @throws MgmError IMAGE_INVALID for what cannot be read, decoded or is over a limit; DOWNLOAD_FAILED; ABORTED.
 */
export async function decodeImage(input: ImageInput, options: DecodeOptions = {}): Promise<DecodedImage> {
  const { signal } = options
  const { maxPixels, maxBytes } = limitsOf(options)
  throwIfAborted(signal)
  const { bytes, name } = await readInput(input, { ...options, maxBytes })
  throwIfAborted(signal)
  return abortable(decode(bytes, name, maxPixels), signal)
}

/**
 * Reads an image as far as its header: the bytes, and the size that `decodeImage` would find.
 *
 * @throws MgmError as `decodeImage`
 */
export async function readImage(
  input: ImageInput,
  options: DecodeOptions = {},
): Promise<{ bytes: Uint8Array; width: number; height: number }> {
  const { maxPixels, maxBytes } = limitsOf(options)
  const { bytes, name } = await readInput(input, { ...options, maxBytes })
  return decoding(bytes, name, async () => {
    const { width, height } = (await openImage(bytes, name, maxPixels)).header
    return { bytes, width, height }
  })
}

function limitsOf(options: DecodeOptions): { maxPixels: number; maxBytes: number } {
  return {
    maxPixels: positive(options.maxPixels ?? 100e6, 'maxPixels'),
    maxBytes: positive(options.maxBytes ?? 64 * 2 ** 20, 'maxBytes'),
  }
}

async function decode(bytes: Uint8Array, name: string, maxPixels: number): Promise<DecodedImage> {
  return decoding(bytes, name, async () => {
    const { image, header } = await openImage(bytes, name, maxPixels)
    const cmyk = header.space === 'cmyk'
    const plain = cmyk
      ? image.pipelineColourspace('cmyk').toColourspace('cmyk').removeAlpha()
      : image.toColourspace('srgb').removeAlpha()
    const { data, info } = await plain
      .timeout({ seconds: DECODE_SECONDS })
      .raw({ depth: 'uchar' })
      .toBuffer({ resolveWithObject: true })
    const channels = cmyk ? 4 : 3
    if (info.channels !== channels || data.length !== info.width * info.height * channels)
      throw invalid(
        `expected gray, RGB or CMYK samples for ${name} but received ${header.channels} ${header.space} channels`,
      )
    const pixels = new Uint8Array(data.buffer, data.byteOffset, data.length)
    return {
      data: cmyk ? await native().cmykToRgb(pixels, info.width, info.height) : pixels,
      width: info.width,
      height: info.height,
    }
  })
}

/** Runs `work` on the bytes of an image of a known format; what the decoder says becomes IMAGE_INVALID. */
async function decoding<T>(bytes: Uint8Array, name: string, work: () => Promise<T>): Promise<T> {
  if (bytes.length === 0) throw invalid(`expected ${FORMAT_NAMES} for ${name} but received no bytes at all`)
  const found = sniff(bytes)
  if (!FORMATS.includes(found as Format))
    throw invalid(`expected ${FORMAT_NAMES} for ${name} but received ${found}`)
  try {
    return await work()
  } catch (cause) {
    if (cause instanceof MgmError) throw cause
    const reason = (cause instanceof Error ? cause.message : String(cause)).trim().split('\n')[0]
    throw new MgmError(
      'IMAGE_INVALID',
      `expected a complete ${found} file for ${name} but its ${bytes.length} bytes could not be decoded: ${reason}`,
      { cause },
    )
  }
}

async function openImage(
  bytes: Uint8Array,
  name: string,
  maxPixels: number,
): Promise<{ image: Sharp; header: Metadata }> {
  // The pixel limit is checked here, with a better message.
  const settings: SharpOptions = {
    failOn: 'error',
    limitInputPixels: false,
    ignoreIcc: true,
    autoOrient: false,
    pages: 1,
  }
  const image: Sharp = sharp(bytes, settings)
  const header: Metadata = await image.metadata()
  const { width, height } = header
  if (!(width >= 1 && height >= 1)) throw invalid(`expected at least one pixel for ${name} but received none`)
  if (width * height > maxPixels)
    throw invalid(
      `expected at most ${maxPixels} pixels for ${name} but received ${width} x ${height} = ${width * height}; ` +
        'shrink the image or raise maxPixels',
    )
  if (Math.max(width, height) > MAX_SIDE)
    throw invalid(
      `expected sides of at most ${MAX_SIDE} pixels for ${name} but received ${width} x ${height}`,
    )
  return { image, header }
}

/** The format by magic bytes: one of FORMATS, or words for an error message. */
function sniff(bytes: Uint8Array): string {
  const text = Buffer.from(bytes.buffer, bytes.byteOffset, Math.min(bytes.length, 512)).toString('latin1')
  if (text.startsWith('\xff\xd8\xff')) return 'jpeg'
  if (text.startsWith('\x89PNG\r\n\x1a\n')) return 'png'
  if (/^GIF8[79]a/.test(text)) return 'gif'
  if (text.startsWith('RIFF') && text.slice(8, 12) === 'WEBP') return 'webp'
  if (/^(II[*+]\0|MM\0[*+])/.test(text)) return 'tiff'
  if (text.slice(4, 8) === 'ftyp') {
    const brands = text.slice(
      8,
      Math.max(16, Math.min(64, new DataView(bytes.buffer, bytes.byteOffset).getUint32(0))),
    )
    return /avi[fs]/.test(brands) ? 'avif' : `a file of kind ${JSON.stringify(text.slice(8, 12))}`
  }
  const words = text.replace(/^\xef\xbb\xbf/, '').trimStart()
  if (words.startsWith('%PDF')) return 'a PDF document'
  if (/^<(svg|\?xml|!doctype svg|!--)/i.test(words)) return 'an SVG or XML document'
  if (/^<(!doctype html|html)/i.test(words)) return 'an HTML page'
  if (text.startsWith('BM')) return 'a BMP image, which is not supported'
  if (/^P[1-7]\s/.test(text)) return 'a Netpbm image, which is not supported'
  return 'bytes of no known image format'
}

type ReadOptions = DecodeOptions & { maxBytes: number }

async function readInput(input: unknown, options: ReadOptions): Promise<{ bytes: Uint8Array; name: string }> {
  if (input instanceof Uint8Array) {
    allow('bytes', options)
    checkBytes(input.length, 'the image bytes', options.maxBytes)
    return { bytes: input, name: 'the image bytes' }
  }
  if (!(input instanceof URL) && (typeof input !== 'string' || input === ''))
    throw expected('a path, a file:, https: or data: URL, or bytes', 'an image', input)
  const text = String(input)
  const scheme = /^([a-z][a-z0-9+.-]+):/i.exec(text)?.[1]?.toLowerCase()
  switch (scheme) {
    case 'data':
      allow('data', options)
      return { bytes: readDataUrl(text, options.maxBytes), name: 'the image in a data: URL' }
    case 'http':
    case 'https': {
      allow('https', options)
      const url = parseUrl(text)
      const name = `the image at ${url.origin}${url.pathname}`
      return { bytes: await download(url, name, options), name }
    }
    case 'file': {
      allow('file', options)
      return readPath(filePath(text), options)
    }
    default:
      if (input instanceof URL || /^[a-z][a-z0-9+.-]+:\/\//i.test(text))
        throw expected('a path, a file:, https: or data: URL, or bytes', 'an image', text)
      allow('file', options)
      return readPath(text, options)
  }
}

function allow(source: ImageSource, options: DecodeOptions): void {
  if (options.sources && !options.sources.includes(source))
    throw new MgmError(
      'INVALID_ARGUMENT',
      `expected an image from ${options.sources.join(' or ') || 'nowhere'} but received one from ${source}`,
    )
}

function readDataUrl(text: string, maxBytes: number): Uint8Array {
  const comma = text.indexOf(',')
  if (comma < 0) throw invalid('expected "data:[type][;base64],…" for a data: URL but received no comma')
  const base64 = /;\s*base64\s*$/i.test(text.slice(0, comma))
  const length = text.length - comma - 1
  // Percent-encoding takes up to 3 characters a byte.
  checkBytes(
    base64 ? Math.floor(length * 0.75) - 2 : Math.ceil(length / 3),
    'the image in a data: URL',
    maxBytes,
  )
  const body = text.slice(comma + 1)
  if (!base64) {
    const bytes = Buffer.from(
      body.replace(/%([0-9a-f]{2})/gi, (_, hex: string) => String.fromCharCode(Number.parseInt(hex, 16))),
      'latin1',
    )
    checkBytes(bytes.length, 'the image in a data: URL', maxBytes)
    return bytes
  }
  const clean = body.includes('%')
    ? body.replace(/%(2b|2f|3d)/gi, unescaped => decodeURIComponent(unescaped))
    : body
  if (!/^[A-Za-z0-9+/_\-\s]*={0,2}\s*$/.test(clean))
    throw invalid('expected base64 for the image in a data: URL')
  const bytes = Buffer.from(clean, 'base64')
  checkBytes(bytes.length, 'the image in a data: URL', maxBytes)
  return bytes
}

function filePath(text: string): string {
  try {
    return fileURLToPath(text)
  } catch (cause) {
    throw new MgmError(
      'INVALID_ARGUMENT',
      `expected a local file: URL for an image but received ${describe(text)}`,
      {
        cause,
      },
    )
  }
}

async function readPath(path: string, options: ReadOptions): Promise<{ bytes: Uint8Array; name: string }> {
  const name = `the image ${describe(path)}`
  let file: FileHandle | undefined
  try {
    if (path.includes('\0')) throw expected('a path without NUL characters', 'an image', path)
    // Non-blocking: opening a pipe that nobody writes to must not hang a thread.
    file = await open(path, constants.O_RDONLY | constants.O_NONBLOCK)
    const stats: Stats = await file.stat()
    if (!stats.isFile()) throw invalid(`expected a regular file for ${name} but received something else`)
    checkBytes(stats.size, name, options.maxBytes)
    const bytes = await file.readFile({ signal: options.signal })
    checkBytes(bytes.length, name, options.maxBytes)
    return { bytes, name }
  } catch (cause) {
    throwIfAborted(options.signal)
    if (cause instanceof MgmError) throw cause
    const code = (cause as NodeJS.ErrnoException).code
    const reason = code === 'ENOENT' ? 'there is no such file' : (cause as Error).message
    throw new MgmError('IMAGE_INVALID', `expected a readable file for ${name}: ${reason}`, { cause })
  } finally {
    await file?.close()
  }
}

function parseUrl(text: string, base?: URL): URL {
  try {
    return new URL(text, base)
  } catch (cause) {
    throw new MgmError('INVALID_ARGUMENT', `expected a URL for an image but received ${describe(text)}`, {
      cause,
    })
  }
}

function isLoopback(url: URL): boolean {
  return /^(localhost|127(\.\d+){3}|\[::1\])$/.test(url.hostname)
}

async function download(start: URL, name: string, options: ReadOptions): Promise<Uint8Array> {
  const timer = AbortSignal.timeout(positive(options.timeout ?? 30_000, 'timeout'))
  const signal = options.signal ? AbortSignal.any([options.signal, timer]) : timer
  let url = start
  try {
    for (let hop = 0; hop <= MAX_REDIRECTS; hop++) {
      if (url.protocol !== 'https:' && !(url.protocol === 'http:' && isLoopback(url) && isLoopback(start)))
        throw new MgmError(
          'INVALID_ARGUMENT',
          `expected an https: URL for ${name} but received ${url.protocol}//${url.host}; plain http works for this machine only`,
        )
      const response = await fetch(url, {
        redirect: 'manual',
        signal,
        headers: { accept: 'image/avif,image/webp,image/png,image/jpeg,image/*;q=0.8' },
      })
      const location = response.headers.get('location')
      if (response.status >= 300 && response.status < 400 && location) {
        await response.body?.cancel()
        url = parseUrl(location, url)
        continue
      }
      if (!response.ok) {
        await response.body?.cancel()
        throw new MgmError(
          'DOWNLOAD_FAILED',
          `expected an image for ${name} but received HTTP status ${response.status}`,
        )
      }
      return await readBody(response, name, options.maxBytes)
    }
    throw new MgmError(
      'DOWNLOAD_FAILED',
      `expected at most ${MAX_REDIRECTS} redirects for ${name} but received more`,
    )
  } catch (cause) {
    throwIfAborted(options.signal)
    if (cause instanceof MgmError) throw cause
    if (timer.aborted)
      throw new MgmError(
        'DOWNLOAD_FAILED',
        `expected ${name} within ${options.timeout ?? 30_000} ms but it took longer`,
        {
          cause,
        },
      )
    const inner = (cause as Error).cause
    const reason = inner instanceof Error ? inner.message : (cause as Error).message
    throw new MgmError('DOWNLOAD_FAILED', `${name} could not be downloaded: ${reason}`, { cause })
  }
}

async function readBody(response: Response, name: string, maxBytes: number): Promise<Uint8Array> {
  const announced = Number(response.headers.get('content-length') ?? 0)
  if (announced > maxBytes) {
    await response.body?.cancel()
    checkBytes(announced, name, maxBytes)
  }
  const chunks: Uint8Array[] = []
  let length = 0
  // Leaving the loop by an error cancels the body.
  for await (const chunk of response.body ?? []) {
    length += chunk.length
    checkBytes(length, name, maxBytes)
    chunks.push(chunk)
  }
  return Buffer.concat(chunks, length)
}

function checkBytes(length: number, name: string, maxBytes: number): void {
  if (length > maxBytes)
    throw invalid(
      `expected at most ${maxBytes} bytes for ${name} but received ${length}; raise maxBytes to allow it`,
    )
}

function positive(value: number, name: string): number {
  if (!(typeof value === 'number' && value > 0)) throw expected('a positive number', name, value)
  return value
}

function invalid(message: string): MgmError {
  return new MgmError('IMAGE_INVALID', message)
}

/** The promise's outcome, or ABORTED as soon as the signal fires; the work itself runs out unobserved. */
async function abortable<T>(work: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (!signal) return work
  let stop: (() => void) | undefined
  const aborted = new Promise<never>((_, reject) => {
    stop = () => reject(new MgmError('ABORTED', 'the operation was aborted', { cause: signal.reason }))
    if (signal.aborted) stop()
    else signal.addEventListener('abort', stop, { once: true })
  })
  try {
    return await Promise.race([work, aborted])
  } finally {
    signal.removeEventListener('abort', stop!)
    work.catch(() => {})
  }
}

export interface ImageProcessorConfig {
  /** Side of the result: `image_size_aux`. */
  size: number
  /** Per channel, on the scale 0 to 1. */
  mean: readonly [number, number, number]
  std: readonly [number, number, number]
  /** `image_aspect_ratio === 'pad'`: centre on a square of the mean colour; otherwise crop the middle square. */
  pad: boolean
}

/**
 * Pictures to pixels for the high-resolution tower, as MGM's `process_images` with transformers' CLIPImageProcessor:
 * pad to a square of `int(mean * 255)` or not, shorter side to S with Pillow's antialiased bicubic on 8 bits (equal
 * bit for bit), centre crop S x S, then (x / 255 − mean) / std.
 */
export class ImageProcessor {
  readonly config: ImageProcessorConfig

  constructor(config: ImageProcessorConfig) {
    const { size, mean, std } = config
    if (!(Number.isInteger(size) && size >= 1 && size <= 16384))
      throw expected('an integer from 1 to 16384', 'size', size)
    if (!(mean.length === 3 && mean.every(Number.isFinite))) throw expected('three numbers', 'mean', mean)
    if (!(std.length === 3 && std.every(value => value > 0)))
      throw expected('three positive numbers', 'std', std)
    this.config = config
  }

  /** f32 [S, S, 3]. Takes whatever `decodeImage` takes, or what it gave. */
  async process(image: ImageInput | DecodedImage, options: DecodeOptions = {}): Promise<Float32Array> {
    const { mean, std } = this.config
    const { data, width, height } = await decoded(image, options)
    return abortable(
      native().preprocessImage(data, width, height, this.geometry(width, height), mean, std),
      options.signal,
    )
  }

  /** How a picture of this size is padded, resized and cropped. */
  geometry(width: number, height: number): NativeResize {
    const { size, mean, pad } = this.config
    const crop = { cropWidth: size, cropHeight: size }
    if (pad) {
      const color = mean.map(value => Math.min(Math.max(Math.trunc(value * 255), 0), 255))
      return { ...crop, width: size, height: size, cropX: 0, cropY: 0, pad: color }
    }
    const long = Math.trunc((size * Math.max(width, height)) / Math.min(width, height))
    const [w, h] = width <= height ? [size, long] : [long, size]
    return {
      ...crop,
      width: w,
      height: h,
      cropX: Math.floor((w - size) / 2),
      cropY: Math.floor((h - size) / 2),
    }
  }
}

async function decoded(image: ImageInput | DecodedImage, options: DecodeOptions): Promise<DecodedImage> {
  if (typeof image === 'string' || image instanceof Uint8Array || image instanceof URL)
    return decodeImage(image, options)
  if (image === null || typeof image !== 'object' || !(image.data instanceof Uint8Array))
    throw expected('a path, a URL, bytes or a decoded image', 'an image', image)
  return image
}
