import { describe } from '../errors.ts'
import { invalid, invalidValue, shapeText } from './errors.ts'
import {
  type ByteSource,
  elementCount,
  isCount,
  isLfsPointer,
  LFS_HINT,
  parseJson,
  STORED_BITS,
  type StoredDType,
  type TensorEntry,
  withFile,
} from './source.ts'

/** The reference reader's limit on the JSON header, in bytes. */
const MAX_HEADER_BYTES = 100_000_000
const MAX_RANK = 32

const DTYPES: ReadonlyMap<unknown, StoredDType> = new Map<unknown, StoredDType>([
  ['F64', 'f64'],
  ['F32', 'f32'],
  ['F16', 'f16'],
  ['BF16', 'bf16'],
  ['I64', 'i64'],
  ['I32', 'i32'],
  ['I16', 'i16'],
  ['I8', 'i8'],
  ['U64', 'u64'],
  ['U32', 'u32'],
  ['U16', 'u16'],
  ['U8', 'u8'],
  ['BOOL', 'bool'],
  ['C64', 'c64'],
  ['F8_E4M3', 'f8_e4m3'],
  ['F8_E5M2', 'f8_e5m2'],
  ['F8_E4M3FNUZ', 'f8_e4m3fnuz'],
  ['F8_E5M2FNUZ', 'f8_e5m2fnuz'],
  ['F8_E8M0', 'f8_e8m0'],
  ['F6_E2M3', 'f6_e2m3'],
  ['F6_E3M2', 'f6_e3m2'],
  ['F4', 'f4'],
])

export interface TensorFile {
  readonly tensors: ReadonlyMap<string, TensorEntry>
  /** The free text of the header, such as `format: pt`. */
  readonly metadata: ReadonlyMap<string, string>
}

/**
 * Reads the header of a safetensors file: 8 bytes of length, JSON, then the tensors without holes or overlaps up to
 * the end of the file (the rules of `SafeTensors::read_metadata` in the reference).
 * @throws MgmError `CHECKPOINT_INVALID` naming file, tensor, what was expected and what was found.
 */
export function parseSafetensors(source: ByteSource, file: string): TensorFile {
  if (source.size < 8) throw invalid(`expected at least 8 bytes for ${file} but received ${source.size}`)
  const lengthBytes = source.read(0, 8)
  const length = new DataView(lengthBytes.buffer, lengthBytes.byteOffset).getBigUint64(0, true)
  const limit = Math.min(MAX_HEADER_BYTES, source.size - 8)
  if (length > BigInt(limit)) {
    const hint = isLfsPointer(source.read(0, Math.min(source.size, 64))) ? LFS_HINT : ''
    throw invalid(`expected at most ${limit} for the header length of ${file} but received ${length}${hint}`)
  }
  const dataStart = 8 + Number(length)
  const header = parseJson(source.read(8, Number(length)), file)
  if (!isRecord(header)) throw invalidValue(file, 'a JSON object', 'the header', header)

  const metadata = new Map<string, string>()
  const entries: TensorEntry[] = []
  for (const [name, value] of Object.entries(header)) {
    if (name === '__metadata__') {
      for (const [key, text] of Object.entries(isRecord(value) ? value : {})) metadata.set(key, String(text))
    } else entries.push(parseEntry(name, value, dataStart, file))
  }
  entries.sort((a, b) => a.offset - b.offset || a.byteLength - b.byteLength)
  let end = dataStart
  for (const entry of entries) {
    if (entry.offset !== end) {
      const what = entry.offset < end ? 'overlaps the one before' : 'leaves a hole before it'
      throw invalid(
        `expected tensor "${entry.name}" at offset ${end} of ${file} but found it at ${entry.offset}: it ${what}`,
      )
    }
    end += entry.byteLength
  }
  if (end !== source.size) {
    const last = entries.at(-1)
    const where = last ? `the end of its last tensor "${last.name}"` : 'the end of its empty header'
    throw invalid(`expected ${file} to end at ${end}, ${where}, but it has ${source.size} bytes`)
  }
  return { tensors: new Map(entries.map(entry => [entry.name, entry])), metadata }
}

/** `parseSafetensors` of a file on disk; only its header is read. */
export function openSafetensors(file: string): TensorFile {
  return withFile(file, parseSafetensors)
}

function parseEntry(name: string, value: unknown, dataStart: number, file: string): TensorEntry {
  const label = `tensor ${describe(name)}`
  if (!isRecord(value)) throw invalidValue(file, 'a JSON object', label, value)
  const dtype = DTYPES.get(value.dtype)
  if (dtype === undefined) throw invalidValue(file, 'a known dtype', label, value.dtype)
  const shape = value.shape
  const count = Array.isArray(shape) && shape.length <= MAX_RANK ? elementCount(shape) : undefined
  if (!Array.isArray(shape) || count === undefined) throw invalidValue(file, 'a shape', label, shape)
  const offsets = value.data_offsets
  if (!Array.isArray(offsets) || offsets.length !== 2 || !isCount(offsets[0]) || !isCount(offsets[1])) {
    throw invalidValue(file, 'two byte offsets', label, offsets)
  }
  const [begin, end] = offsets
  const byteLength = (count * STORED_BITS[dtype]) / 8
  if (!isCount(byteLength) || end - begin !== byteLength) {
    throw invalid(
      `expected ${byteLength} bytes for ${label} of shape ${shapeText(shape)} and dtype ${dtype} in ${file} ` +
        `but received data_offsets [${begin}, ${end}]`,
    )
  }
  return { name, dtype, shape, offset: dataStart + begin, byteLength, file }
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}
