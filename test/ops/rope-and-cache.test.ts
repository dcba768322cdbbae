import { describe, expect, it } from 'vitest'
import { Device } from '../../lib/device.ts'
import { ropeAndCache } from '../../lib/ops.ts'
import { expectClose, f32, fromHalf, openDevice, Random } from './helpers.ts'

const device = openDevice()

/** The nearest value with `bits` bits of mantissa (the leading one included), ties to even; normal range only. */
function rounded(x: number, bits: number): number {
  if (x === 0) return 0
  const unit = 2 ** (Math.floor(Math.log2(Math.abs(x))) - bits + 1)
  const scaled = x / unit
  const low = Math.floor(scaled)
  const rest = scaled - low
  return (rest > 0.5 || (rest === 0.5 && low % 2 !== 0) ? low + 1 : low) * unit
}

const cases = [
  { heads: 4, kvHeads: 4, headDim: 64, pageSize: 16, tokens: 9, dtype: 'f32', positions: 50 },
  { heads: 8, kvHeads: 1, headDim: 256, pageSize: 4, tokens: 5, dtype: 'bf16', positions: 4000 },
  { heads: 6, kvHeads: 2, headDim: 10, pageSize: 3, tokens: 23, dtype: 'f16', positions: 40 },
  { heads: 1, kvHeads: 1, headDim: 2, pageSize: 1, tokens: 1, dtype: 'f32', positions: 1_000_000 },
  { heads: 2, kvHeads: 1, headDim: 72, pageSize: 7, tokens: 14, dtype: 'bf16', positions: 1_000_000 },
] as const

describe('ropeAndCache', () => {
  for (const { heads, kvHeads, headDim, pageSize, tokens, dtype, positions } of cases) {
    const random = new Random()
    it(`rotates halves and writes the slots: H ${heads} KV ${kvHeads} D ${headDim} ${dtype} positions to ${positions}`, async () => {
      const width = (heads + 2 * kvHeads) * headDim
      const pages = Math.ceil(tokens / pageSize) + 2
      const rows = Array.from({ length: tokens }, () => random.normals(width))
      const all = new Float32Array(tokens * (width + 5)).fill(Number.NaN)
      rows.forEach((row, t) => {
        all.set(row, t * (width + 5) + 2)
      })
      const invFreq = Float32Array.from({ length: headDim / 2 }, (_, i) => 10000 ** ((-2 * i) / headDim))
      const position = Int32Array.from({ length: tokens }, () => random.integer(0, positions))
      const free = Array.from({ length: pages * pageSize }, (_, i) => i)
      const slot = Int32Array.from({ length: tokens }, (_, t) =>
        t % 4 === 3 ? -1 - t : free.splice(random.integer(0, free.length - 1), 1)[0]!,
      )
      const shape = [pages, kvHeads, pageSize, headDim]
      const kPages = device.zeros(shape, dtype)
      const vPages = device.zeros(shape, dtype)
      const q = ropeAndCache(device.tensor(all, [tokens, width + 5]).narrow(1, 2, width), {
        positions: device.tensor(position, [tokens]),
        slots: device.tensor(slot, [tokens]),
        invFreq: device.tensor(invFreq, [headDim / 2]),
        kPages,
        vPages,
      })

      /** Rotation as the definition has it: pairs (i, i + D/2) are complex numbers times e^(i·angle). */
      const turned = (t: number, head: number) => {
        const x = rows[t]!.subarray(head * headDim, (head + 1) * headDim)
        const out = new Float64Array(headDim)
        for (let i = 0; i < headDim / 2; i++) {
          const angle = Math.fround(position[t]! * invFreq[i]!)
          const [a, b] = [x[i]!, x[i + headDim / 2]!]
          out[i] = a * Math.cos(angle) - b * Math.sin(angle)
          out[i + headDim / 2] = b * Math.cos(angle) + a * Math.sin(angle)
        }
        return out
      }
      // Two products and a sum of numbers below 5, in f32.
      const exact = { absolute: 2e-6 }
      expect(q.shape).toEqual([tokens, heads, headDim])
      const expectedQ = rows.flatMap((_, t) =>
        Array.from({ length: heads }, (_, h) => [...turned(t, h)]).flat(),
      )
      expectClose(await f32(q), expectedQ, exact, `q, seed ${random.seed}`)

      const read = async (tensor: typeof kPages) =>
        dtype === 'f32' ? f32(tensor) : fromHalf((await tensor.read()) as Uint16Array, dtype)
      const [k, v] = [await read(kPages), await read(vPages)]
      const bits = { f32: 24, bf16: 8, f16: 11 }[dtype]
      const expectedK = new Float64Array(k.length)
      const expectedV = new Float64Array(v.length)
      rows.forEach((row, t) => {
        if (slot[t]! < 0) return
        for (let h = 0; h < kvHeads; h++) {
          const page = Math.floor(slot[t]! / pageSize)
          const at = ((page * kvHeads + h) * pageSize + (slot[t]! % pageSize)) * headDim
          expectedK.set(turned(t, heads + h), at)
          const value = row.subarray((heads + kvHeads + h) * headDim, (heads + kvHeads + h + 1) * headDim)
          // f16 has subnormals below 2^-14, which `rounded` does not know.
          expectedV.set(
            Float64Array.from(value, x =>
              dtype === 'f16' && Math.abs(x) < 2 ** -14
                ? Math.round(x * 2 ** 24) / 2 ** 24
                : rounded(x, bits),
            ),
            at,
          )
        }
      })
      expectClose(
        k,
        expectedK,
        { absolute: 2e-6, relative: dtype === 'f32' ? 0 : 2 ** -bits },
        `k, seed ${random.seed}`,
      )
      // Values are only rounded: to the nearest, bit for bit. Slots nobody wrote stay zero.
      expect(
        Array.from(v, x => x + 0),
        `v, seed ${random.seed}`,
      ).toEqual(Array.from(expectedV, x => x + 0))
    })
  }

  it('rounds ties to even', async () => {
    const pages = () => device.zeros([1, 1, 1, 2], 'bf16')
    const [kPages, vPages] = [pages(), pages()]
    ropeAndCache(device.tensor([0, 0, 0, 0, 1 + 2 ** -8, 1 + 3 * 2 ** -8], [1, 6]), {
      positions: device.tensor([0], [1], 'i32'),
      slots: device.tensor([0], [1], 'i32'),
      invFreq: device.tensor([1], [1]),
      kPages,
      vPages,
    })
    expect([...fromHalf((await vPages.read()) as Uint16Array, 'bf16')]).toEqual([1, 1 + 2 ** -6])
  })

  it('refuses a slot past the last page', async () => {
    const own = Device.open('cpu', { threads: 1 })
    const pages = own.zeros([2, 1, 4, 2])
    ropeAndCache(own.zeros([1, 6]), {
      positions: own.tensor([0], [1], 'i32'),
      slots: own.tensor([8], [1], 'i32'),
      invFreq: own.tensor([1], [1]),
      kPages: pages,
      vPages: pages,
    })
    await expect(own.synchronize()).rejects.toThrow(/a slot below 8 .* for token 0 but received 8/)
    await own.close().catch(() => {})
  })
})
