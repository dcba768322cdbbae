import { afterAll, expect } from 'vitest'
import { Device } from '../../lib/device.ts'
import type { Tensor } from '../../lib/tensor.ts'

export { Random } from '../helpers/random.ts'

/** The CPU for a test file, closed after its tests. */
export function openDevice(options: { threads?: number; memoryLimit?: number } = {}): Device {
  const device = Device.open('cpu', options)
  afterAll(() => device.close())
  return device
}

/** The numbers of a tensor; of floats as f32. */
export async function floats(tensor: Tensor): Promise<Float32Array> {
  const data = await tensor.read()
  if (data instanceof Float32Array) return data
  if (tensor.dtype !== 'bf16' && tensor.dtype !== 'f16') return Float32Array.from(data)
  return Float32Array.from(fromHalf(data as Uint16Array, tensor.dtype))
}

export async function f32(tensor: Tensor): Promise<Float32Array> {
  return tensor.readF32()
}

/**
 * Every |actual − expected| ≤ absolute + relative·|expected|; NaN only where expected. The message names the worst pair
 * and the share of the limit that was used.
 */
export function expectClose(
  actual: ArrayLike<number>,
  expected: ArrayLike<number>,
  limit: { absolute: number; relative?: number },
  what = 'values',
): void {
  expect(actual.length, `${what}: length`).toBe(expected.length)
  let worst = 0
  let where = -1
  for (let i = 0; i < expected.length; i++) {
    const a = actual[i]!
    const e = expected[i]!
    if (Object.is(a, e) || a === e) continue
    const share = Math.abs(a - e) / (limit.absolute + (limit.relative ?? 0) * Math.abs(e))
    if (!(share <= worst)) {
      worst = Number.isNaN(share) ? Number.POSITIVE_INFINITY : share
      where = i
    }
  }
  if (worst > 1)
    expect.fail(
      `${what}: [${where}] is ${actual[where]}, expected ${expected[where]}: ${worst.toPrecision(3)} times the limit ` +
        `(absolute ${limit.absolute}, relative ${limit.relative ?? 0}); first ${Array.from({ length: Math.min(6, actual.length) }, (_, i) => `${actual[i]} vs ${expected[i]}`).join(', ')}`,
    )
}

/** bf16 or f16 bits to numbers. */
export function fromHalf(bits: Uint16Array, dtype: 'bf16' | 'f16'): Float64Array {
  return Float64Array.from(bits, h => {
    if (dtype === 'bf16') {
      const view = new DataView(new ArrayBuffer(4))
      view.setUint32(0, h << 16)
      return view.getFloat32(0)
    }
    const sign = h & 0x8000 ? -1 : 1
    const exponent = (h >> 10) & 31
    const mantissa = h & 1023
    if (exponent === 31) return mantissa ? Number.NaN : sign * Number.POSITIVE_INFINITY
    return sign * (exponent ? (1 + mantissa / 1024) * 2 ** (exponent - 15) : mantissa * 2 ** -24)
  })
}
