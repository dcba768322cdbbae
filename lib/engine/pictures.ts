import { webcrypto } from 'node:crypto'
import { decodeImage, type ImageInput, type ImageProcessor } from '../processing/image.ts'
import { Gate } from './gate.ts'
import type { Picture } from './vision.ts'

/** Decodes pictures on native threads, a few at a time, and names them by their content. */
export class PictureReader {
  readonly #processor: ImageProcessor
  readonly #gate: Gate

  constructor(processor: ImageProcessor, atOnce: number) {
    this.#processor = processor
    this.#gate = new Gate(atOnce)
  }

  async read(image: ImageInput, signal: AbortSignal): Promise<Picture> {
    const leave = await this.#gate.enter(signal)
    try {
      const decoded = await decodeImage(image, { signal })
      const { size } = this.#processor.config
      // The smaller of the two is kept and hashed: hashing copies on the event loop's thread.
      if (decoded.data.byteLength <= size * size * 12)
        return {
          key: `${decoded.width}x${decoded.height}:${await digest(decoded.data)}`,
          pixels: () => this.#processor.process(decoded, { signal }),
        }
      const pixels = await this.#processor.process(decoded, { signal })
      return { key: `pixels:${await digest(pixels)}`, pixels: async () => pixels }
    } finally {
      leave()
    }
  }
}

async function digest(data: Uint8Array | Float32Array): Promise<string> {
  const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength) as Uint8Array<ArrayBuffer>
  return Buffer.from(await webcrypto.subtle.digest('SHA-256', bytes)).toString('hex')
}
