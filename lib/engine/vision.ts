import type { Device } from '../device.ts'
import { MgmError } from '../errors.ts'
import { cast } from '../ops.ts'
import { scope, type Tensor } from '../tensor.ts'
import { abortable } from './abort.ts'

/** What the encoder needs of a model. */
export interface VisionModel {
  readonly imageSize: number
  readonly tokensPerImage: number
  /** pixels f32 [B, S, S, 3] → [B·tokensPerImage, hidden]. */
  encodeImages(pixels: Tensor): Tensor
}

/** A picture by its content: equal keys, equal pixels. */
export interface Picture {
  readonly key: string
  /** f32 [S, S, 3], normalised; called only if the embeddings are not at hand. */
  pixels(): Promise<Float32Array>
}

/** A picture's embeddings [tokensPerImage, hidden], alive until released. */
export interface VisionLease {
  readonly embeds: Tensor
  release(): void
}

interface Entry {
  readonly key: string
  pixels: Float32Array | undefined
  embeds: Tensor | undefined
  /** Requests that wait for it or read it. */
  users: number
  readonly ready: Promise<void>
  readonly settle: (error?: unknown) => void
}

/**
 * Turns pictures into embeddings: those that wait are encoded together, equal ones once, and the results are kept by
 * content, least recently used out first.
 */
export class VisionEncoder {
  readonly #device: Device
  readonly #model: VisionModel
  readonly #maxBatch: number
  readonly #cacheBytes: number
  readonly #onWork: () => void
  /** By key, least recently used first. */
  readonly #entries = new Map<string, Entry>()
  #queue: Entry[] = []
  #hits = 0
  #misses = 0

  constructor(
    device: Device,
    model: VisionModel,
    options: { maxBatch: number; cacheBytes: number; onWork: () => void },
  ) {
    this.#device = device
    this.#model = model
    this.#maxBatch = options.maxBatch
    this.#cacheBytes = options.cacheBytes
    this.#onWork = options.onWork
  }

  get hasWork(): boolean {
    return this.#queue.length > 0
  }
  get hits(): number {
    return this.#hits
  }
  get misses(): number {
    return this.#misses
  }
  /** Bytes of the embeddings at hand. */
  get bytes(): number {
    let bytes = 0
    for (const { embeds } of this.#entries.values()) bytes += embeds?.byteLength ?? 0
    return bytes
  }

  /** The embeddings of a picture, from the cache or by the next `step`. A rejection concerns this picture only. */
  async encode(picture: Picture, signal: AbortSignal): Promise<VisionLease> {
    let entry = this.#entries.get(picture.key)
    if (!entry) {
      const pixels = await picture.pixels()
      signal.throwIfAborted()
      entry = this.#entries.get(picture.key)
      if (!entry) {
        this.#misses++
        entry = createEntry(picture.key, pixels)
        this.#entries.set(entry.key, entry)
        this.#queue.push(entry)
        this.#onWork()
      } else this.#hits++
    } else this.#hits++

    const held = entry
    held.users++
    try {
      await abortable(held.ready, signal)
    } catch (error) {
      this.#release(held)
      throw error
    }
    // The most recently used goes last.
    if (this.#entries.get(held.key) === held) {
      this.#entries.delete(held.key)
      this.#entries.set(held.key, held)
    }
    let released = false
    return {
      embeds: held.embeds!,
      release: () => {
        if (!released) this.#release(held)
        released = true
      },
    }
  }

  /** Encodes one batch of what waits. Never rejects: a failure goes to the pictures it concerns. */
  async step(): Promise<void> {
    const batch = this.#queue.splice(0, this.#maxBatch)
    try {
      await this.#encode(batch)
      for (const entry of batch) entry.settle()
    } catch (error) {
      // Together they failed; alone each stands or falls by itself.
      for (const entry of batch) {
        try {
          if (batch.length === 1) throw error
          await this.#encode([entry])
          entry.settle()
        } catch (reason) {
          this.#forget(entry)
          entry.settle(reason)
        }
      }
    }
    this.#evict()
  }

  /** Frees everything; pictures that still wait are rejected. */
  dispose(): void {
    for (const entry of this.#queue) entry.settle(new MgmError('CLOSED', 'the engine was closed'))
    this.#queue = []
    for (const entry of this.#entries.values()) entry.embeds?.dispose()
    this.#entries.clear()
  }

  async #encode(entries: readonly Entry[]): Promise<void> {
    const { imageSize: size, tokensPerImage: tokens } = this.#model
    const embeds = scope(() => {
      const pixels = this.#device.empty([entries.length, size, size, 3])
      entries.forEach((entry, i) => {
        pixels.narrow(0, i, 1).write(entry.pixels!)
      })
      const features = this.#model.encodeImages(pixels)
      if (entries.length === 1) return [features]
      // Copies, so that each is freed by itself.
      return entries.map((_, i) => cast(features.narrow(0, i * tokens, tokens), features.dtype))
    })
    try {
      await this.#device.synchronize()
    } catch (error) {
      for (const tensor of embeds) tensor.dispose()
      throw error
    }
    entries.forEach((entry, i) => {
      entry.embeds = embeds[i]!
      entry.pixels = undefined
    })
  }

  #release(entry: Entry): void {
    entry.users--
    if (entry.users > 0) return
    const at = this.#queue.indexOf(entry)
    if (at >= 0) {
      this.#queue.splice(at, 1)
      this.#forget(entry)
    }
    this.#evict()
  }

  #forget(entry: Entry): void {
    if (this.#entries.get(entry.key) === entry) this.#entries.delete(entry.key)
    entry.pixels = undefined
    entry.embeds?.dispose()
    entry.embeds = undefined
  }

  #evict(): void {
    let bytes = this.bytes
    for (const entry of this.#entries.values()) {
      if (bytes <= this.#cacheBytes) return
      if (!entry.embeds || entry.users > 0) continue
      bytes -= entry.embeds.byteLength
      this.#forget(entry)
    }
  }
}

function createEntry(key: string, pixels: Float32Array): Entry {
  let settle!: (error?: unknown) => void
  const ready = new Promise<void>((resolve, reject) => {
    settle = error => (error === undefined ? resolve() : reject(error))
  })
  // Whoever waits sees the rejection; nobody waiting is no fault.
  ready.catch(() => {})
  return { key, pixels, embeds: undefined, users: 0, ready, settle }
}
