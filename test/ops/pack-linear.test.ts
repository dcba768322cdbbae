import { describe, expect, it } from 'vitest'
import { embedding, linear, packLinear } from '../../lib/ops.ts'
import type { Tensor } from '../../lib/tensor.ts'
import { expectClose, f32, openDevice, Random } from './helpers.ts'
import { exactWeights, halfBits, roundHalf, type StorageType, storageTypes } from './weights.ts'

const device = openDevice({ threads: 2 })

/** The stored values, row by row. */
async function unpack(packed: Tensor): Promise<Float32Array> {
  const ids = Int32Array.from({ length: packed.shape[0]! }, (_, i) => i)
  return f32(embedding(packed, device.tensor(ids, [ids.length])))
}

/** |stored - value| that each storage type may have, for every weight of [n, k]. */
function errorBounds(w: Float32Array, k: number, dtype: StorageType): Float64Array {
  return Float64Array.from(w, (value, i) => {
    if (dtype === 'f32') return 0
    if (dtype === 'bf16' || dtype === 'f16') return Math.abs(roundHalf(value, dtype) - value)
    const start = i - (i % k) + 32 * Math.floor((i % k) / 32)
    const block = w.subarray(start, Math.min(start + 32, i - (i % k) + k))
    const [least, most] = [Math.min(...block), Math.max(...block)]
    // Half a step; the f16 step may exceed the ideal one by an ulp (2^-10, or 2^-24 if subnormal).
    const step = dtype === 'int8' ? Math.max(-least, most) / 127 : (most - least) / 15
    const half = (step * (1 + 2 ** -10) + 2 ** -24) / 2
    // int4 also rounds the minimum to f16, which can widen the range by as much.
    return half * 1.0001 + (dtype === 'int4' ? Math.max(Math.abs(least) * 2 ** -11, 2 ** -25) * 1.1 : 0)
  })
}

describe('packLinear', () => {
  for (const dtype of storageTypes)
    it(`stores ${dtype} as near as the type allows`, async () => {
      const random = new Random()
      for (const size of [1, 1e-3, 1e-6, 1e4])
        for (const [n, k] of [
          [1, 1],
          [33, 31],
          [64, 64],
          [70, 333],
        ] as const) {
          const w = random.normals(n * k, size)
          w.fill(0, 0, Math.min(k, 40))
          const bounds = errorBounds(w, k, dtype)
          const stored = await unpack(packLinear(device.tensor(w, [n, k]), { dtype }))
          for (let i = 0; i < w.length; i++) {
            const error = Math.abs(stored[i]! - w[i]!)
            if (!(error <= bounds[i]!))
              expect.fail(
                `seed ${random.seed} ${n}x${k} size ${size}: [${i}] ${w[i]} became ${stored[i]}, allowed ${bounds[i]}`,
              )
          }
        }
    })

  it('needs 8.5 bits a weight for int8 and 5 for int4', () => {
    const w = device.zeros([128, 256])
    expect(packLinear(w, { dtype: 'int8' }).byteLength).toBe((128 * 256 * 8.5) / 8)
    expect(packLinear(w, { dtype: 'int4' }).byteLength).toBe((128 * 256 * 5) / 8)
    expect(packLinear(w, { dtype: 'bf16' }).byteLength).toBe(128 * 256 * 2)
    expect(packLinear(w).byteLength).toBe(128 * 256 * 4)
  })

  it('stacks matrices of different types and strided rows', async () => {
    const random = new Random()
    const k = 45
    const parts = (['f32', 'bf16', 'f16'] as const).map(dtype => {
      const n = random.integer(1, 50)
      const values = exactWeights(random, dtype === 'f32' ? 'bf16' : dtype, n, k)
      const wide = new Float32Array(n * (k + 3)).fill(Number.NaN)
      for (let r = 0; r < n; r++) wide.set(values.subarray(r * k, (r + 1) * k), r * (k + 3))
      const data = dtype === 'f32' ? wide : Uint16Array.from(wide, v => halfBits(v, dtype))
      return { n, values, tensor: device.tensor(data, [n, k + 3], dtype).narrow(1, 0, k) }
    })
    const tensors = parts.map(part => part.tensor)
    const packed = packLinear(tensors, { dtype: 'f32' })
    expect(packed.shape).toEqual([parts.reduce((sum, part) => sum + part.n, 0), k])
    const expected = Float32Array.from(parts.flatMap(part => Array.from(part.values)))
    expect(await unpack(packed), `seed ${random.seed}`).toEqual(expected)
    expect(packLinear(tensors.slice(1)).dtype).toBe('bf16')
  })

  it('pairs gate and up rows', async () => {
    const random = new Random()
    for (const n of [1, 16, 33, 100]) {
      const k = 50
      const [gate, up] = [random.normals(n * k), random.normals(n * k)]
      const x = device.tensor(random.normals(3 * k), [3, k])
      const pair = [device.tensor(gate, [n, k]), device.tensor(up, [n, k])] as const
      const gated = await f32(linear(x, packLinear(pair, { gated: true })))
      const [a, b] = [await f32(linear(x, packLinear(pair[0]))), await f32(linear(x, packLinear(pair[1])))]
      expect(gated, `seed ${random.seed} n ${n}`).toEqual(a.map((value, i) => value * b[i]!))
    }
  })

  it('shows a broken block as NaN and leaves the others alone', async () => {
    const w = new Float32Array(2 * 96).fill(0.5)
    w[40] = Number.NaN
    w[96 + 95] = Number.POSITIVE_INFINITY
    for (const dtype of ['int8', 'int4'] as const) {
      const stored = await unpack(packLinear(device.tensor(w, [2, 96]), { dtype }))
      const broken = Array.from(stored, (v, i) => (Number.isNaN(v) ? i : -1)).filter(i => i >= 0)
      const block = (from: number) => Array.from({ length: 32 }, (_, i) => from + i)
      expect(broken, dtype).toEqual([...block(32), ...block(96 + 64)])
      const rest = stored.filter(v => !Number.isNaN(v))
      expectClose(rest, new Float32Array(rest.length).fill(0.5), { absolute: 5e-4 }, dtype)
    }
  })

  it('is the same on any number of threads', async () => {
    const random = new Random()
    const many = openDevice({ threads: 5 })
    const [n, k] = [300, 77]
    const w = random.normals(n * k)
    const ids = Int32Array.from({ length: n }, (_, i) => i)
    for (const dtype of storageTypes) {
      const one = await unpack(packLinear(device.tensor(w, [n, k]), { dtype }))
      const packed = packLinear(many.tensor(w, [n, k]), { dtype })
      expect(await f32(embedding(packed, many.tensor(ids, [n]))), `seed ${random.seed}`).toEqual(one)
    }
  })

  it('refuses what cannot be packed', () => {
    const w = device.zeros([4, 2])
    expect(() => packLinear([])).toThrow()
    expect(() => packLinear([w, device.zeros([4, 3])])).toThrow(/expected matrices \[any, 2\] for weights/)
    expect(() => packLinear(device.zeros([3, 2]), { gated: true })).toThrow(/an even number of rows/)
    expect(() => packLinear(device.zeros([2, 2], 'i32'))).toThrow(/expected f32, bf16, f16/)
  })
})
