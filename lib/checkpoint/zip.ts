import { describe } from '../errors.ts'
import { invalid, unsupported } from './errors.ts'
import { type ByteSource, isCount } from './source.ts'

const MAX_DIRECTORY_BYTES = 64 * 2 ** 20
const END_BYTES = 22
const LOCAL_BYTES = 30
const CENTRAL_BYTES = 46

/** A stored (uncompressed) member of a zip archive. */
export interface ZipEntry {
  readonly name: string
  readonly size: number
  readonly headerOffset: number
  readonly method: number
  readonly encrypted: boolean
}

/** The directory of a zip or zip64 archive. Every number in it is checked against the file before it is used. */
export class ZipDirectory {
  readonly entries: ReadonlyMap<string, ZipEntry>
  readonly #source: ByteSource
  readonly #file: string
  readonly #dataEnd: number

  /** @throws MgmError `CHECKPOINT_INVALID` for a truncated or inconsistent directory. */
  constructor(source: ByteSource, file: string) {
    this.#source = source
    this.#file = file
    const { count, size, offset } = readEnd(source, file)
    if (size > MAX_DIRECTORY_BYTES || count * CENTRAL_BYTES > size) {
      throw invalid(`expected a sane directory in ${file} but received ${count} entries in ${size} bytes`)
    }
    this.#dataEnd = offset
    this.entries = readDirectory(source.read(offset, size), count, file)
  }

  /** Absolute offset of a member's bytes, after checking its local header. */
  dataOffset(entry: ZipEntry): number {
    const label = `${describe(entry.name)} in ${this.#file}`
    if (entry.encrypted) throw unsupported(`${label} is encrypted`)
    if (entry.method !== 0) {
      throw unsupported(`expected ${label} to be stored but it is compressed (method ${entry.method})`)
    }
    const header = view(this.#source.read(entry.headerOffset, LOCAL_BYTES))
    if (header.getUint32(0, true) !== 0x04034b50) throw invalid(`expected a zip local header for ${label}`)
    const nameBytes = header.getUint16(26, true)
    const name = decode(this.#source.read(entry.headerOffset + LOCAL_BYTES, nameBytes))
    if (name !== entry.name) {
      throw invalid(`expected the local header of ${label} to carry its name but received ${describe(name)}`)
    }
    const start = entry.headerOffset + LOCAL_BYTES + nameBytes + header.getUint16(28, true)
    if (start + entry.size > this.#dataEnd) {
      throw invalid(`expected ${label} to end before ${this.#dataEnd} but it ends at ${start + entry.size}`)
    }
    return start
  }

  /** The bytes of a small member. */
  read(entry: ZipEntry, limit: number): Uint8Array {
    if (entry.size > limit) {
      throw invalid(
        `expected at most ${limit} bytes for ${describe(entry.name)} in ${this.#file} but received ${entry.size}`,
      )
    }
    return this.#source.read(this.dataOffset(entry), entry.size)
  }
}

/** Finds the end record (which a comment may follow) and, for zip64, the larger record it stands for. */
function readEnd(source: ByteSource, file: string): { count: number; size: number; offset: number } {
  const tailStart = Math.max(0, source.size - END_BYTES - 0xffff)
  const tail = view(source.read(tailStart, source.size - tailStart))
  let at = tail.byteLength - END_BYTES
  while (
    at >= 0 &&
    !(
      tail.getUint32(at, true) === 0x06054b50 &&
      at + END_BYTES + tail.getUint16(at + 20, true) === tail.byteLength
    )
  ) {
    at--
  }
  if (at < 0) throw invalid(`expected a zip directory at the end of ${file}; the file is probably truncated`)
  let end = {
    count: tail.getUint16(at + 10, true),
    size: tail.getUint32(at + 12, true),
    offset: tail.getUint32(at + 16, true),
  }
  let limit = tailStart + at
  let disks = tail.getUint16(at + 4, true) + tail.getUint16(at + 6, true)
  if (at >= 20 && tail.getUint32(at - 20, true) === 0x07064b50) {
    const offset = u64(tail, at - 12, file)
    const record = view(source.read(offset, 56))
    if (record.getUint32(0, true) !== 0x06064b50)
      throw invalid(`expected a zip64 end record at offset ${offset} of ${file}`)
    end = { count: u64(record, 32, file), size: u64(record, 40, file), offset: u64(record, 48, file) }
    disks = record.getUint32(16, true) + record.getUint32(20, true)
    limit = Math.min(limit, offset)
  }
  if (disks !== 0) throw unsupported(`${file} is a zip archive of several parts`)
  if (end.offset + end.size > limit) {
    throw invalid(
      `expected the zip directory of ${file} to end before ${limit} but it ends at ${end.offset + end.size}`,
    )
  }
  return end
}

function readDirectory(bytes: Uint8Array, count: number, file: string): Map<string, ZipEntry> {
  const directory = view(bytes)
  const entries = new Map<string, ZipEntry>()
  let at = 0
  for (let i = 0; i < count; i++) {
    if (at + CENTRAL_BYTES > bytes.length || directory.getUint32(at, true) !== 0x02014b50) {
      throw invalid(`expected ${count} entries in the zip directory of ${file} but entry ${i} is malformed`)
    }
    const nameEnd = at + CENTRAL_BYTES + directory.getUint16(at + 28, true)
    const extraEnd = nameEnd + directory.getUint16(at + 30, true)
    const end = extraEnd + directory.getUint16(at + 32, true)
    if (end > bytes.length) throw invalid(`entry ${i} of the zip directory of ${file} is cut off`)
    const name = decode(bytes.subarray(at + CENTRAL_BYTES, nameEnd))
    const method = directory.getUint16(at + 10, true)
    const [size, compressed, headerOffset] = wide(directory, at, nameEnd, extraEnd, file)
    if (method === 0 && size !== compressed) {
      throw invalid(
        `expected one size for stored ${describe(name)} in ${file} but received ${size} and ${compressed}`,
      )
    }
    if (entries.has(name)) throw invalid(`expected one entry ${describe(name)} in ${file} but found two`)
    entries.set(name, {
      name,
      size,
      headerOffset,
      method,
      encrypted: (directory.getUint16(at + 8, true) & 1) !== 0,
    })
    at = end
  }
  return entries
}

/** Size, compressed size and header offset of an entry; saturated 32-bit fields continue in the zip64 extra field. */
function wide(
  directory: DataView,
  at: number,
  extraStart: number,
  extraEnd: number,
  file: string,
): [number, number, number] {
  const fields: [number, number, number] = [
    directory.getUint32(at + 24, true),
    directory.getUint32(at + 20, true),
    directory.getUint32(at + 42, true),
  ]
  if (!fields.includes(0xffffffff)) return fields
  for (let p = extraStart; p + 4 <= extraEnd; ) {
    const end = p + 4 + directory.getUint16(p + 2, true)
    if (directory.getUint16(p, true) !== 1 || end > extraEnd) {
      p = end
      continue
    }
    p += 4
    for (const i of [0, 1, 2] as const) {
      if (fields[i] !== 0xffffffff) continue
      if (p + 8 > end) throw invalid(`the zip64 field of an entry in ${file} is cut off`)
      fields[i] = u64(directory, p, file)
      p += 8
    }
    return fields
  }
  throw invalid(`expected a zip64 field for a large entry in ${file} but found none`)
}

function u64(data: DataView, at: number, file: string): number {
  const value = Number(data.getBigUint64(at, true))
  if (!isCount(value)) throw invalid(`expected a 53-bit size or offset in ${file} but received ${value}`)
  return value
}

function view(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
}

function decode(bytes: Uint8Array): string {
  return new TextDecoder().decode(bytes)
}
