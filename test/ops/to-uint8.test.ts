import { describe, expect, it } from 'vitest'
import { toUint8 } from '../../lib/ops.ts'
import { openDevice, Random } from './helpers.ts'

const device = openDevice()

async function bytes(values: ArrayLike<number>, scale = 1, offset = 0): Promise<number[]> {
  const x = device.tensor(Float32Array.from(values), [values.length])
  const out = toUint8(x, { scale, offset })
  expect(out.dtype).toBe('u8')
  return [...((await out.read()) as Uint8Array)]
}

describe('toUint8', () => {
  it('rounds to the nearest byte, ties to even', async () => {
    const values = [0, 0.49, 0.5, 0.51, 1.49, 1.5, 2.5, 3.5, 126.5, 127.5, 254.49, 254.5, 254.51]
    expect(await bytes(values)).toEqual([0, 0, 0, 1, 1, 2, 2, 4, 126, 128, 254, 254, 255])
  })

  it('clamps what lies outside, infinities too; NaN gives 0', async () => {
    const values = [-1e-30, -0.7, -300, -3e38, -Infinity, 255, 255.4, 255.6, 1000, 3e38, Infinity, Number.NaN]
    expect(await bytes(values)).toEqual([0, 0, 0, 0, 0, 255, 255, 255, 255, 255, 255, 0])
  })

  it('scales and shifts first', async () => {
    expect(await bytes([-1, -0.5, 0, 0.5, 1, 2, -2], 127.5, 127.5)).toEqual([0, 64, 128, 191, 255, 255, 0])
    expect(await bytes([0, 1, 2], -100, 250)).toEqual([250, 150, 50])
  })

  it.each([1, 3, 15, 16, 17, 1000, 16_384, 50_003])('converts %d numbers', async count => {
    const random = new Random()
    const x = random.normals(count)
    const expected = x.map(value => Math.min(255, Math.max(0, 127.5 * value + 127.5)))
    const actual = await bytes(x, 127.5, 127.5)
    actual.forEach((byte, i) => {
      // A rounding of the product away from a tie may go either way.
      if (Math.abs(byte - expected[i]!) > 0.5 + 2e-5)
        expect.fail(`seed ${random.seed}: [${i}] is ${byte}, expected ${expected[i]}`)
    })
  })

  it('keeps the shape', () => {
    expect(toUint8(device.zeros([2, 3, 4, 3]), { scale: 1, offset: 0 }).shape).toEqual([2, 3, 4, 3])
    expect(toUint8(device.zeros([0, 3]), { scale: 1, offset: 0 }).shape).toEqual([0, 3])
  })

  it('refuses what does not fit', () => {
    const x = device.zeros([4, 4])
    expect(() => toUint8(x.narrow(1, 0, 2), { scale: 1, offset: 0 })).toThrow(/a contiguous tensor for x/)
    expect(() => toUint8(x, { scale: Number.NaN, offset: 0 })).toThrow(/a finite number for scale/)
    expect(() => toUint8(x, { scale: 1, offset: Infinity })).toThrow(/a finite number for offset/)
    expect(() => toUint8(device.tensor([1], [1], 'i32'), { scale: 1, offset: 0 })).toThrow(
      /for x but received/,
    )
  })
})
