import { describe, expect, it } from 'vitest'
import { addTile } from '../../lib/ops.ts'
import { expectClose, f32, openDevice, Random } from './helpers.ts'

const device = openDevice()

describe('addTile', () => {
  it('adds weighted tiles where they belong and touches nothing else', async () => {
    const random = new Random()
    for (let round = 0; round < 20; round++) {
      const [batch, h, w, channels] = [1, 1, 1, 1].map((low, i) =>
        random.integer(low, [3, 20, 40, 5][i]!),
      ) as [number, number, number, number]
      const [height, width] = [random.integer(h, h + 9), random.integer(w, w + 9)]
      const [y, x] = [random.integer(0, height - h), random.integer(0, width - w)]
      const start = random.normals(batch * height * width * channels)
      const tile = random.normals(batch * h * w * channels)
      const [rows, columns] = [random.normals(h), random.normals(w)]
      const expected = Float64Array.from(start)
      let at = 0
      for (let b = 0; b < batch; b++)
        for (let i = 0; i < h; i++)
          for (let j = 0; j < w; j++)
            for (let c = 0; c < channels; c++)
              expected[((b * height + y + i) * width + x + j) * channels + c]! +=
                rows[i]! * columns[j]! * tile[at++]!
      const canvas = device.tensor(start, [batch, height, width, channels])
      addTile(canvas, device.tensor(tile, [batch, h, w, channels]), {
        rows: device.tensor(rows, [h]),
        columns: device.tensor(columns, [w]),
        y,
        x,
      })
      const what = `seed ${random.seed} round ${round}`
      const actual = await f32(canvas)
      // Three roundings of products of three normals.
      expectClose(actual, expected, { absolute: 1e-5 }, what)
      actual.forEach((value, i) => {
        const [column, row] = [Math.floor(i / channels) % width, Math.floor(i / channels / width) % height]
        const inside = row >= y && row < y + h && column >= x && column < x + w
        if (!inside && value !== start[i]) expect.fail(`${what}: [${i}] outside the tile changed`)
      })
    }
  })

  it('blends overlapping tiles of one image into that image', async () => {
    const random = new Random()
    const [size, tile, overlap] = [24, 16, 8]
    const image = random.normals(size * size * 3)
    const whole = device.tensor(image, [1, size, size, 3])
    const canvas = device.zeros([1, size, size, 3])
    const ramp = (first: boolean) =>
      device.tensor(
        Float32Array.from({ length: tile }, (_, i) =>
          first ? Math.min(1, (tile - i - 0.5) / overlap) : Math.min(1, (i + 0.5) / overlap),
        ),
        [tile],
      )
    for (const y of [0, tile - overlap])
      for (const x of [0, tile - overlap]) {
        const part = new Float32Array(tile * tile * 3)
        for (let i = 0; i < tile; i++)
          part.set(image.subarray(((y + i) * size + x) * 3, ((y + i) * size + x + tile) * 3), i * tile * 3)
        addTile(canvas, device.tensor(part, [1, tile, tile, 3]), {
          rows: ramp(y === 0),
          columns: ramp(x === 0),
          y,
          x,
        })
      }
    expectClose(await f32(canvas), await f32(whole), { absolute: 1e-6 }, `seed ${random.seed}`)
  })

  it('refuses what does not fit', () => {
    const canvas = device.zeros([1, 8, 8, 3])
    const weights = device.zeros([4])
    const refused = (
      options: { y?: number; x?: number },
      tile = device.zeros([1, 4, 4, 3]),
      rows = weights,
    ) => expect(() => addTile(canvas, tile, { rows, columns: weights, y: 0, x: 0, ...options }))
    refused({ y: 5 }).toThrow(/for y but received 5/)
    refused({ x: -1 }).toThrow(/for x but received -1/)
    refused({}, device.zeros([1, 9, 4, 3]), device.zeros([9])).toThrow(/at most 8 x 8 pixels for tile/)
    refused({}, device.zeros([2, 4, 4, 3])).toThrow(/for tile but received/)
    refused({}, device.zeros([1, 4, 4, 4])).toThrow(/for tile but received/)
    refused({}, device.zeros([1, 4, 4, 3]), device.zeros([3])).toThrow(/for rows but received/)
  })
})
