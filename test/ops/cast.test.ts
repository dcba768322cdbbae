import { describe, expect, it } from 'vitest'
import { cast, permute, scaleColumns } from '../../lib/ops.ts'
import { f32, fromHalf, openDevice, Random } from './helpers.ts'
import { halfBits, roundHalf } from './weights.ts'

const device = openDevice({ threads: 2 })
const { NaN: nan, POSITIVE_INFINITY: inf } = Number

/** Numbers of all sizes, subnormals of both half types included. */
function spread(random: Random, count: number): Float32Array {
  return Float32Array.from({ length: count }, () => random.normal() * 2 ** random.integer(-30, 15))
}

describe('cast', () => {
  for (const dtype of ['bf16', 'f16'] as const) {
    it(`rounds f32 to the nearest ${dtype}, ties to even`, async () => {
      const random = new Random()
      for (const n of [1, 15, 16, 37, 20_000]) {
        const x = spread(random, n)
        const bits = (await cast(device.tensor(x, [n]), dtype).read()) as Uint16Array
        // Results at or past the f16 limit are tested below.
        const expected = Array.from(x, v => {
          const r = roundHalf(v, dtype)
          return dtype === 'f16' && Math.abs(r) > 65504 ? inf * Math.sign(v) : r
        })
        expect(Array.from(fromHalf(bits, dtype)), `seed ${random.seed}`).toEqual(expected)
      }
    })

    it(`reads every ${dtype} exactly, in vectors and one by one`, async () => {
      const all = Uint16Array.from({ length: 65536 }, (_, i) => i)
      const expected = Float32Array.from(fromHalf(all, dtype))
      const tensor = device.tensor(all, [65536], dtype)
      expect(await f32(cast(tensor, 'f32'))).toEqual(expected)
      // Columns of a [n, 2] tensor are strided: the scalar path.
      const wide = device.tensor(all, [32768, 2], dtype)
      expect(await f32(cast(wide.narrow(1, 1, 1), 'f32'))).toEqual(expected.filter((_, i) => i % 2 === 1))
    })

    it(`handles the ends of ${dtype}`, async () => {
      const ends = [nan, inf, -inf, 0, -0, 65504, 65519.99, 65520, -65520, 1e38, 2 ** -24, 2 ** -25, 2 ** -26]
      const wanted = ends.map(v => {
        const r = roundHalf(Math.fround(v), dtype)
        return dtype === 'f16' && Math.abs(r) > 65504 ? inf * Math.sign(r) : r
      })
      for (const repeat of [1, 16]) {
        const x = Float32Array.from(ends.flatMap(v => new Array<number>(repeat).fill(v)))
        const bits = (await cast(device.tensor(x, [x.length]), dtype).read()) as Uint16Array
        const got = Array.from(fromHalf(bits, dtype)).filter((_, i) => i % repeat === 0)
        got.forEach((v, i) => {
          expect(Object.is(v, wanted[i]), `${ends[i]} became ${v}, expected ${wanted[i]}`).toBe(true)
        })
      }
    })
  }

  it('converts bf16 and f16 to each other', async () => {
    const random = new Random()
    const values = Float64Array.from(spread(random, 1000), v => roundHalf(v / 2 ** 4, 'bf16'))
    const bits = Uint16Array.from(values, v => halfBits(v, 'bf16'))
    const out = (await cast(device.tensor(bits, [1000], 'bf16'), 'f16').read()) as Uint16Array
    expect(Array.from(fromHalf(out, 'f16'))).toEqual(Array.from(values, v => roundHalf(v, 'f16')))
    const back = (await cast(device.tensor(out, [1000], 'f16'), 'bf16').read()) as Uint16Array
    const expected = Array.from(fromHalf(out, 'f16'), v => roundHalf(v, 'bf16'))
    expect(Array.from(fromHalf(back, 'bf16'))).toEqual(expected)
  })

  it('copies views of any type', async () => {
    const data = Int32Array.from({ length: 60 }, (_, i) => i)
    const view = device.tensor(data, [3, 4, 5]).narrow(1, 1, 2).narrow(2, 2, 3)
    const expected = [0, 1, 2].flatMap(i => [1, 2].flatMap(j => [2, 3, 4].map(k => i * 20 + j * 5 + k)))
    const out = cast(view, 'i32')
    expect(out.shape).toEqual([3, 2, 3])
    expect(Array.from((await out.read()) as Int32Array)).toEqual(expected)
    expect(cast(device.empty([0, 4]), 'f16').shape).toEqual([0, 4])
  })

  it('refuses integers as numbers', () => {
    expect(() => cast(device.zeros([2], 'i32'), 'f32')).toThrow(/\[cast\] expected f32, bf16 or f16 for x/)
    expect(() => cast(device.zeros([2]), 'int8')).toThrow(/expected f32, bf16 or f16 for dtype/)
  })
})

describe('permute', () => {
  /** Walks the output and looks every element up by its coordinates. */
  function oracle<T>(x: ArrayLike<T>, shape: number[], dims: number[]): T[] {
    const outShape = dims.map(d => shape[d]!)
    return Array.from({ length: x.length }, (_, i) => {
      const at = new Array<number>(shape.length)
      for (let d = dims.length - 1, rest = i; d >= 0; d--) {
        at[dims[d]!] = rest % outShape[d]!
        rest = Math.floor(rest / outShape[d]!)
      }
      return x[at.reduce((offset, index, d) => offset * shape[d]! + index, 0)]!
    })
  }

  it('moves dimensions of tensors of 1, 2 and 4 bytes', async () => {
    const random = new Random()
    for (let round = 0; round < 60; round++) {
      const rank = random.integer(1, 5)
      let count = 1
      const shape = Array.from({ length: rank }, () => {
        // One or two long dimensions: with five of them a comparison takes a minute.
        const length = random.integer(1, random.next() < 0.3 && count <= 40 ? 40 : 6)
        count *= length
        return length
      })
      const left = shape.map((_, d) => d)
      const dims = shape.map(() => left.splice(random.integer(0, left.length - 1), 1)[0]!)
      const numbers = Array.from({ length: count }, () => random.integer(0, 255))
      for (const [data, dtype] of [
        [Uint8Array.from(numbers), 'u8'],
        [Uint16Array.from(numbers), 'f16'],
        [Float32Array.from(numbers), 'f32'],
      ] as const) {
        const out = permute(device.tensor(data, shape, dtype), dims)
        expect(out.shape).toEqual(dims.map(d => shape[d]!))
        const what = `seed ${random.seed} [${shape}] by [${dims}] ${dtype}`
        expect(Array.from(await out.read()), what).toEqual(oracle(data, shape, dims))
      }
    }
  })

  it('takes views', async () => {
    const x = device.tensor(
      Array.from({ length: 24 }, (_, i) => i),
      [4, 6],
    )
    expect(Array.from(await f32(permute(x.narrow(1, 2, 2).narrow(0, 1, 3), [1, 0])))).toEqual([
      8, 14, 20, 9, 15, 21,
    ])
  })

  it('refuses what is not a permutation', () => {
    for (const dims of [[0], [0, 0], [0, 2], [-1, 0]])
      expect(() => permute(device.zeros([2, 3]), dims)).toThrow(
        /expected a permutation of 2 dimensions for dims/,
      )
  })
})

describe('scaleColumns', () => {
  it('multiplies each column', async () => {
    const random = new Random()
    for (const [n, k] of [
      [1, 1],
      [7, 33],
      [3, 20_000],
    ] as const) {
      const [w, scale] = [random.normals(n * (k + 1)), random.normals(k)]
      const out = scaleColumns(device.tensor(w, [n, k + 1]).narrow(1, 1, k), device.tensor(scale, [k]))
      const expected = Float32Array.from({ length: n * k }, (_, i) => {
        const column = i % k
        return w[Math.floor(i / k) * (k + 1) + 1 + column]! * scale[column]!
      })
      expect(await f32(out), `seed ${random.seed}`).toEqual(expected)
    }
  })
})
