import { readFileSync } from 'node:fs'
import { join } from 'node:path'

export const FIXTURES = join(import.meta.dirname, '..', 'fixtures')

/** A tensor of a golden file: floats of any width as Float32Array, integers as Int32Array, bytes as they are. */
export interface Golden {
  dtype: string
  shape: number[]
  data: Float32Array
}

/** Reads a whole safetensors file, every number widened (or, for F64 and I64, narrowed) to f32. */
export function readSafetensors(path: string): Map<string, Golden> {
  const bytes = readFileSync(path)
  const headerLength = Number(bytes.readBigUInt64LE(0))
  const header = JSON.parse(bytes.toString('utf8', 8, 8 + headerLength)) as Record<
    string,
    { dtype: string; shape: number[]; data_offsets: [number, number] }
  >
  const goldens = new Map<string, Golden>()
  for (const [name, entry] of Object.entries(header)) {
    if (name === '__metadata__') continue
    const [begin, end] = entry.data_offsets.map(offset => 8 + headerLength + offset) as [number, number]
    const buffer = new Uint8Array(bytes.subarray(begin, end)).buffer
    goldens.set(name, { dtype: entry.dtype, shape: entry.shape, data: widen(entry.dtype, buffer) })
  }
  return goldens
}

function widen(dtype: string, buffer: ArrayBuffer): Float32Array {
  switch (dtype) {
    case 'F32':
      return new Float32Array(buffer)
    case 'F64':
      return Float32Array.from(new Float64Array(buffer))
    case 'BF16':
      return new Float32Array(Uint32Array.from(new Uint16Array(buffer), bits => bits << 16).buffer)
    case 'F16':
      return Float32Array.from(new Uint16Array(buffer), f16ToNumber)
    case 'I64':
      return Float32Array.from(new BigInt64Array(buffer), Number)
    case 'I32':
      return Float32Array.from(new Int32Array(buffer))
    case 'U8':
      return Float32Array.from(new Uint8Array(buffer))
    default:
      throw new Error(`no reader for ${dtype}`)
  }
}

export function f16ToNumber(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1
  const exponent = (bits >> 10) & 31
  const fraction = bits & 1023
  if (exponent === 31) return fraction ? Number.NaN : sign * Infinity
  return sign * (exponent === 0 ? fraction * 2 ** -24 : (1024 + fraction) * 2 ** (exponent - 25))
}

/** [B, C, H, W] → [B, H, W, C]. */
export function toNhwc({ shape, data }: Golden): Golden {
  const [b, c, h, w] = shape as [number, number, number, number]
  const out = new Float32Array(data.length)
  for (let i = 0; i < b; i++)
    for (let ch = 0; ch < c; ch++)
      for (let p = 0; p < h * w; p++) out[(i * h * w + p) * c + ch] = data[(i * c + ch) * h * w + p]!
  return { dtype: 'F32', shape: [b, h, w, c], data: out }
}

/** Throws unless |actual − expected| ≤ atol + rtol·|expected| everywhere; says where it is worst. */
export function assertClose(
  name: string,
  actual: Float32Array,
  expected: Float32Array,
  atol: number,
  rtol = 0,
): void {
  if (actual.length !== expected.length)
    throw new Error(`${name}: expected ${expected.length} numbers but received ${actual.length}`)
  let worst = 0
  let at = -1
  let bad = 0
  for (let i = 0; i < expected.length; i++) {
    const share = Math.abs(actual[i]! - expected[i]!) / (atol + rtol * Math.abs(expected[i]!))
    if (!(share <= 1)) bad++
    if (!(share <= worst)) {
      worst = share
      at = i
      if (Number.isNaN(share)) break
    }
  }
  if (bad > 0)
    throw new Error(
      `${name}: ${bad} of ${expected.length} differ; worst at ${at}: received ${actual[at]}, expected ${expected[at]} ` +
        `(${worst.toPrecision(3)} of the limit); first received ${actual.slice(0, 4).join(', ')}, expected ${expected.slice(0, 4).join(', ')}`,
    )
}
