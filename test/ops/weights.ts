import type { Activation } from '../../lib/ops.ts'
import type { Random } from './helpers.ts'

export const storageTypes = ['f32', 'bf16', 'f16', 'int8', 'int4'] as const
export type StorageType = (typeof storageTypes)[number]

/** Nearest number with `bits` significant bits and exponents from `least` (below: subnormal), ties to even. */
export function roundTo(value: number, bits: number, least: number): number {
  if (value === 0 || !Number.isFinite(value)) return value
  const ulp = 2 ** (Math.max(Math.floor(Math.log2(Math.abs(value))), least) - bits + 1)
  const steps = Math.abs(value) / ulp
  const down = Math.floor(steps)
  const rest = steps - down
  const up = rest > 0.5 || (rest === 0.5 && down % 2 !== 0)
  return Math.sign(value) * (up ? down + 1 : down) * ulp
}

export function roundHalf(value: number, dtype: 'bf16' | 'f16'): number {
  return dtype === 'bf16' ? roundTo(value, 8, -126) : roundTo(value, 11, -14)
}

/** Bits of a number that the type holds exactly. */
export function halfBits(value: number, dtype: 'bf16' | 'f16'): number {
  if (dtype === 'bf16') return new Uint32Array(Float32Array.of(value).buffer)[0]! >>> 16
  const sign = value < 0 || Object.is(value, -0) ? 0x8000 : 0
  const size = Math.abs(value)
  if (size === Number.POSITIVE_INFINITY) return sign | 0x7c00
  if (size < 2 ** -14) return sign | (size * 2 ** 24)
  const exponent = Math.floor(Math.log2(size))
  return sign | ((exponent + 15) << 10) | ((size / 2 ** exponent - 1) * 1024)
}

/**
 * Random weights [n, k] that `dtype` stores without error, quantized types included: in every block of 32 they are
 * multiples of a power of two whose extremes make the quantizer choose just that step.
 */
export function exactWeights(random: Random, dtype: StorageType, n: number, k: number): Float32Array {
  const w = new Float32Array(n * k)
  for (let row = 0; row < n; row++)
    for (let block = 0; block < k; block += 32) {
      const length = Math.min(32, k - block)
      const step = 2 ** -random.integer(5, 7)
      const least = -random.integer(0, 15)
      for (let i = 0; i < length; i++) {
        let value = random.normal()
        if (dtype === 'bf16' || dtype === 'f16') value = roundHalf(value, dtype)
        if (dtype === 'int8') value = step * (i === 0 ? 127 : random.integer(-127, 127))
        if (dtype === 'int4')
          value = 8 * step * (least + (i === 0 ? 0 : i === length - 1 ? 15 : random.integer(0, 15)))
        w[row * k + block + i] = value
      }
    }
  return w
}

/** The complementary error function in f64: Taylor series of erf, or Lentz's continued fraction. */
function erfc(x: number): number {
  if (x < 0) return 2 - erfc(-x)
  if (x < 2.5) {
    let term = x
    let sum = x
    for (let i = 1; i < 100; i++) {
      term *= (-x * x) / i
      sum += term / (2 * i + 1)
    }
    return 1 - (2 / Math.sqrt(Math.PI)) * sum
  }
  let fraction = 0
  for (let i = 60; i > 0; i--) fraction = i / 2 / (x + fraction)
  return Math.exp(-x * x) / Math.sqrt(Math.PI) / (x + fraction)
}

export const activations: Record<Activation, (x: number) => number> = {
  none: x => x,
  gelu: x => 0.5 * x * erfc(-x / Math.SQRT2),
  gelu_tanh: x => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
  quick_gelu: x => x / (1 + Math.exp(-1.702 * x)),
  silu: x => x / (1 + Math.exp(-x)),
}

/** x [m, k] times the transpose of w [n, k], in f64. */
export function matmul(x: ArrayLike<number>, w: ArrayLike<number>, m: number, n: number, k: number) {
  const out = new Float64Array(m * n)
  for (let i = 0; i < m; i++)
    for (let j = 0; j < n; j++) {
      let sum = 0
      for (let l = 0; l < k; l++) sum += x[i * k + l]! * w[j * k + l]!
      out[i * n + j] = sum
    }
  return out
}
