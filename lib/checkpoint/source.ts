import { closeSync, constants, fstatSync, openSync, readSync } from 'node:fs'
import { MgmError } from '../errors.ts'
import { invalid } from './errors.ts'

/** Random access to the bytes of a file. Parsers read headers through it, never tensor data. */
export interface ByteSource {
  /** Bytes in the file. */
  readonly size: number
  /** Exactly `length` bytes from `offset`; throws `CHECKPOINT_INVALID` where the file ends before that. */
  read(offset: number, length: number): Uint8Array
}

/** Element types as files store them. Only `f32`, `bf16` and `f16` are run; the rest may lie in a file unused. */
export type StoredDType = keyof typeof STORED_BITS

/** Bits per element. */
export const STORED_BITS = {
  f64: 64,
  f32: 32,
  f16: 16,
  bf16: 16,
  i64: 64,
  i32: 32,
  i16: 16,
  i8: 8,
  u64: 64,
  u32: 32,
  u16: 16,
  u8: 8,
  bool: 8,
  c64: 64,
  c128: 128,
  f8_e4m3: 8,
  f8_e5m2: 8,
  f8_e4m3fnuz: 8,
  f8_e5m2fnuz: 8,
  f8_e8m0: 8,
  f6_e2m3: 6,
  f6_e3m2: 6,
  f4: 4,
} as const

/** Where a tensor lies. Its bytes are little-endian and need not be aligned. */
export interface TensorEntry {
  readonly name: string
  readonly dtype: StoredDType
  readonly shape: readonly number[]
  /** Absolute byte offset in `file`. */
  readonly offset: number
  /** Bytes from the first to the last element, both included. */
  readonly byteLength: number
  readonly file: string
  /** In elements; present only when the elements are not in row-major order without gaps. */
  readonly strides?: readonly number[]
}

/** Reads a file through `readSync`; `Symbol.dispose` closes it. Symbolic links are followed. */
export class FileSource implements ByteSource {
  readonly size: number
  readonly #fd: number
  readonly #file: string

  /** @throws MgmError `CHECKPOINT_INVALID` if `file` cannot be opened or is not a regular file. */
  constructor(file: string) {
    this.#file = file
    try {
      // Without O_NONBLOCK, opening a named pipe would wait for a writer.
      this.#fd = openSync(file, constants.O_RDONLY | constants.O_NONBLOCK)
    } catch (error) {
      throw invalid(`expected a readable file at ${file} but ${(error as Error).message}`, error)
    }
    const stat = fstatSync(this.#fd)
    if (!stat.isFile()) {
      closeSync(this.#fd)
      throw invalid(
        `expected a regular file at ${file} but found ${stat.isDirectory() ? 'a folder' : 'a special file'}`,
      )
    }
    this.size = stat.size
  }

  read(offset: number, length: number): Uint8Array {
    checkRange(this.#file, this.size, offset, length)
    const bytes = new Uint8Array(length)
    for (let done = 0; done < length; ) {
      const count = this.#readSome(bytes, done, offset + done)
      if (count === 0) throw invalid(`${this.#file} became shorter while it was read`)
      done += count
    }
    return bytes
  }

  #readSome(bytes: Uint8Array, done: number, position: number): number {
    try {
      return readSync(this.#fd, bytes, done, Math.min(bytes.length - done, 1 << 30), position)
    } catch (error) {
      throw invalid(`${this.#file} cannot be read: ${(error as Error).message}`, error)
    }
  }

  [Symbol.dispose](): void {
    closeSync(this.#fd)
  }
}

/** A file that is already in memory. */
export class BytesSource implements ByteSource {
  readonly #bytes: Uint8Array
  readonly #file: string

  constructor(bytes: Uint8Array, file: string) {
    this.#bytes = bytes
    this.#file = file
  }

  get size(): number {
    return this.#bytes.length
  }

  read(offset: number, length: number): Uint8Array {
    checkRange(this.#file, this.size, offset, length)
    return this.#bytes.subarray(offset, offset + length)
  }
}

/** Opens `file`, hands it to `parse` and closes it, whatever happens. */
export function withFile<T>(file: string, parse: (source: ByteSource, file: string) => T): T {
  const source = new FileSource(file)
  try {
    return parse(source, file)
  } finally {
    source[Symbol.dispose]()
  }
}

/** Reads and parses a JSON file of at most `limit` bytes. */
export function readJson(file: string, limit = 16 * 2 ** 20): unknown {
  return withFile(file, source => {
    if (source.size > limit) {
      throw invalid(`expected at most ${limit} bytes for ${file} but received ${source.size}`)
    }
    return parseJson(source.read(0, source.size), file)
  })
}

/** Parses UTF-8 JSON, naming the file in the error. */
export function parseJson(bytes: Uint8Array, file: string): unknown {
  try {
    return JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(bytes))
  } catch (error) {
    const hint = isLfsPointer(bytes) ? LFS_HINT : ''
    throw invalid(`expected UTF-8 JSON in ${file} but ${(error as Error).message}${hint}`, error)
  }
}

/** A clone without `git lfs` leaves small text files in the place of weights; worth saying so. */
export function isLfsPointer(head: Uint8Array): boolean {
  return new TextDecoder('latin1').decode(head.subarray(0, 23)) === 'version https://git-lfs'
}
export const LFS_HINT = '; it is a Git LFS pointer: fetch the real file with `git lfs pull`'

/**
 * The product of `shape`, or `undefined` unless every entry is a non-negative integer and the product (zero
 * sizes counted as one, as an overflow must not hide behind a zero) is a safe integer.
 */
export function elementCount(shape: readonly unknown[]): number | undefined {
  let product = 1
  let empty = false
  for (const n of shape) {
    if (!isCount(n)) return undefined
    if (n === 0) empty = true
    else product *= n
    if (!Number.isSafeInteger(product)) return undefined
  }
  return empty ? 0 : product
}

/** A non-negative safe integer: the only kind of size and offset that is believed. */
export function isCount(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 0
}

function checkRange(file: string, size: number, offset: number, length: number): void {
  if (!isCount(offset) || !isCount(length)) {
    throw new MgmError('INTERNAL', `expected a range within ${file} but received ${offset} + ${length}`)
  }
  if (length > size - offset) {
    throw invalid(`expected ${length} bytes at offset ${offset} of ${file} but the file ends at ${size}`)
  }
}
