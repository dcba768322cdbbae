import sharp from 'sharp'
import { MgmError, throwIfAborted } from '../errors.ts'
import { native } from '../native.ts'
import { type DecodedImage, type DecodeOptions, decodeImage, type ImageInput } from './image.ts'

/** File formats of drawn images; `raw` is RGB bytes, [height, width, 3]. */
export const IMAGE_FORMATS = ['png', 'jpeg', 'webp', 'raw'] as const
export type ImageFormat = (typeof IMAGE_FORMATS)[number]

/** An image as a file, made on native threads. `quality` (1 to 100, default 90) is that of JPEG and WebP. */
export async function encodeImage(
  picture: DecodedImage,
  format: ImageFormat,
  quality = 90,
): Promise<Uint8Array> {
  const { data, width, height } = picture
  if (format === 'raw') return data
  const image = sharp(data, { raw: { width, height, channels: 3 } })
  const file = await image.toFormat(format, format === 'png' ? {} : { quality }).toBuffer()
  return new Uint8Array(file.buffer, file.byteOffset, file.length)
}

/** A picture to draw over: f32 [height, width, 3] in −1…1. */
export interface Canvas {
  readonly pixels: Float32Array
  readonly width: number
  readonly height: number
}

/**
 * Reads a picture for image-to-image and scales it to the given size, or to its own, rounded down to multiples of `step`:
 * Pillow's bicubic (diffusers: Lanczos), aspect ratio not kept. Source: `VaeImageProcessor.preprocess` of diffusers.
 *
 * @throws MgmError as `decodeImage`; IMAGE_INVALID where the picture is smaller than `step`
 */
export async function readCanvas(
  input: ImageInput,
  size: { width?: number | undefined; height?: number | undefined; step: number },
  options: DecodeOptions = {},
): Promise<Canvas> {
  const decoded = await decodeImage(input, options)
  const { step } = size
  const width = size.width ?? Math.floor(decoded.width / step) * step
  const height = size.height ?? Math.floor(decoded.height / step) * step
  if (width < step || height < step)
    throw new MgmError(
      'IMAGE_INVALID',
      `expected a picture of at least ${step} x ${step} pixels to draw over but received ${decoded.width} x ${decoded.height}`,
    )
  const geometry = { width, height, cropX: 0, cropY: 0, cropWidth: width, cropHeight: height }
  const half = [0.5, 0.5, 0.5]
  const pixels = await native().preprocessImage(
    decoded.data,
    decoded.width,
    decoded.height,
    geometry,
    half,
    half,
  )
  throwIfAborted(options.signal)
  return { pixels, width, height }
}
