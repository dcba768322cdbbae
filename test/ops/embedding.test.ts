import { describe, expect, it } from 'vitest'
import { embedding, packLinear, spliceEmbeddings } from '../../lib/ops.ts'
import { f32, openDevice, Random } from './helpers.ts'
import { exactWeights, halfBits, storageTypes } from './weights.ts'

const device = openDevice({ threads: 2 })

describe('embedding', () => {
  const shapes = [
    [1, 1, 1],
    [5, 33, 4],
    [100, 65, 70],
    [40, 512, 9],
  ] as const

  for (const dtype of storageTypes)
    it(`gathers and scales rows of packed ${dtype}`, async () => {
      const random = new Random()
      for (const [vocab, width, tokens] of shapes) {
        const table = exactWeights(random, dtype, vocab, width)
        const ids = Int32Array.from({ length: tokens }, () => random.integer(-1, vocab - 1))
        const scale = Math.fround(Math.sqrt(width))
        const packed = packLinear(device.tensor(table, [vocab, width]), { dtype })
        const out = embedding(packed, device.tensor(ids, [tokens]), { scale })
        expect(out.shape).toEqual([tokens, width])
        const expected = Float32Array.from({ length: tokens * width }, (_, i) => {
          const id = ids[Math.floor(i / width)]!
          return id < 0 ? 0 : scale * table[id * width + (i % width)]!
        })
        expect(await f32(out), `seed ${random.seed}, ${vocab}x${width}`).toEqual(expected)
      }
    })

  for (const dtype of ['f32', 'bf16', 'f16'] as const)
    it(`gathers rows of a plain strided ${dtype} table`, async () => {
      const random = new Random()
      for (const [vocab, width, tokens] of shapes) {
        const values = exactWeights(random, dtype, vocab, width + 2)
        const data = dtype === 'f32' ? values : Uint16Array.from(values, v => halfBits(v, dtype))
        const table = device.tensor(data, [vocab, width + 2], dtype).narrow(1, 1, width)
        const ids = Int32Array.from({ length: tokens }, () => random.integer(-1, vocab - 1))
        const expected = Float32Array.from({ length: tokens * width }, (_, i) => {
          const id = ids[Math.floor(i / width)]!
          return id < 0 ? 0 : 3 * values[id * (width + 2) + 1 + (i % width)]!
        })
        const out = await f32(embedding(table, device.tensor(ids, [tokens]), { scale: 3 }))
        expect(out, `seed ${random.seed}, ${vocab}x${width}`).toEqual(expected)
      }
    })

  it('refuses ids beyond the table', async () => {
    const own = openDevice({ threads: 2 })
    for (const table of [own.zeros([7, 4]), packLinear(own.zeros([7, 4]))]) {
      embedding(table, own.tensor(Int32Array.of(6, -1, 7), [3]))
      await expect(own.synchronize()).rejects.toThrow('[embedding] expected an id below 7 but received 7')
    }
  })
})

describe('spliceEmbeddings', () => {
  it('takes text rows for positive and image rows for negative indices', async () => {
    const random = new Random()
    for (const width of [1, 40, 129]) {
      const [text, image] = [random.normals(9 * width), random.normals(5 * width)]
      const index = Int32Array.from({ length: 50 }, () => random.integer(-5, 8))
      const expected = Float32Array.from({ length: 50 * width }, (_, i) => {
        const at = index[Math.floor(i / width)]!
        return at >= 0 ? text[at * width + (i % width)]! : image[(-1 - at) * width + (i % width)]!
      })
      const out = spliceEmbeddings(
        device.tensor(text, [9, width]),
        device.tensor(image, [5, width]),
        device.tensor(index, [50]),
      )
      expect(await f32(out), `seed ${random.seed}`).toEqual(expected)
    }
  })

  it('refuses rows that do not exist', async () => {
    const own = openDevice({ threads: 2 })
    for (const at of [3, -3]) {
      spliceEmbeddings(own.zeros([3, 2]), own.zeros([2, 2]), own.tensor(Int32Array.of(0, at), [2]))
      await expect(own.synchronize()).rejects.toThrow(`expected an index from -2 to 2 but received ${at}`)
    }
  })
})
