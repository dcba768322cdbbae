import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { openDiffusion } from '../../lib/checkpoint/diffusers.ts'
import type { TensorMap } from '../../lib/checkpoint/tensor-map.ts'
import { Device } from '../../lib/device.ts'
import { Loader, type Observe } from '../../lib/models/loader.ts'
import { tilesAlong, tileWeights } from '../../lib/models/tiles.ts'
import { Vae } from '../../lib/models/vae.ts'
import { cast, toUint8 } from '../../lib/ops.ts'
import { assertClose, FIXTURES, readSafetensors, toNhwc } from '../helpers/safetensors.ts'
import { openDevice, Random } from '../ops/helpers.ts'
import { upload } from './support.ts'

// The oracle is diffusers' AutoencoderKL; the tolerance is that of the goldens' table.
const TOLERANCE = 1e-4

const device = openDevice()
const folder = join(FIXTURES, 'sdxl-tiny')
const goldens = readSafetensors(join(folder, 'tensors/pipeline.safetensors'))
const golden = (name: string) => goldens.get(name)!

interface Loaded {
  vae: Vae
  weights: TensorMap
  dispose(): void
}

async function load({ encoder = false, config = {}, on = device } = {}): Promise<Loaded> {
  const { vae: files } = openDiffusion(join(folder, 'pipeline'))
  const { weights } = files
  const loader = new Loader(on)
  const vae = await Vae.load(loader, weights, { ...files.config, ...config }, { encoder })
  await loader.finish()
  return { vae, weights, dispose: () => loader.dispose() }
}

/** latents [h, w, 4] by a formula → pixels [8h · 8w · 3]. */
async function decode(
  vae: Vae,
  [h, w]: readonly [number, number],
  latent: (y: number, x: number, c: number) => number,
  options: { tile?: number } = {},
): Promise<Float32Array> {
  const data = Float32Array.from({ length: h * w * 4 }, (_, i) =>
    latent(Math.floor(i / 4 / w), Math.floor(i / 4) % w, i % 4),
  )
  const pixels = device.scope(() => vae.decode(device.tensor(data, [1, h, w, 4]), options))
  try {
    expect(pixels.shape).toEqual([1, 8 * h, 8 * w, 3])
    return await pixels.readF32()
  } finally {
    pixels.dispose()
  }
}

const wave = (y: number, x: number, c: number) =>
  Math.sin((y * Math.PI) / 4 + c) + Math.cos((x * Math.PI) / 4 + c)

describe('decode', () => {
  test('the golden image, to the level', async () => {
    const { vae, weights, dispose } = await load()
    const { pixels, levels } = device.scope(() => {
      const pixels = vae.decode(upload(device, toNhwc(golden('vae_in'))))
      return { pixels, levels: toUint8(pixels, { scale: 127.5, offset: 127.5 }) }
    })
    assertClose('decoded', await pixels.readF32(), toNhwc(golden('decoded')).data, TOLERANCE)
    assertClose('image', Float32Array.from(await levels.read()), golden('image_u8').data, 1)
    weights.finish([/^(encoder|quant_conv)\./])
    pixels.dispose()
    levels.dispose()
    dispose()
  })

  test('an image beside others is the image alone', async () => {
    const { vae, dispose } = await load()
    const [h, w] = [5, 7]
    const latents = new Random(1).normals(3 * h * w * 4)
    const run = async (first: number, count: number) => {
      const data = latents.slice(first * h * w * 4, (first + count) * h * w * 4)
      const pixels = device.scope(() => vae.decode(device.tensor(data, [count, h, w, 4])))
      const numbers = await pixels.readF32()
      pixels.dispose()
      return numbers
    }
    const together = await run(0, 3)
    const alone = [await run(0, 1), await run(1, 1), await run(2, 1)]
    expect(together).toEqual(Float32Array.from(alone.flatMap(image => [...image])))
    dispose()
  })

  test('shows its blocks', async () => {
    const { vae, dispose } = await load()
    const shapes: Record<string, readonly number[]> = {}
    const observe: Observe = (name, x) => {
      shapes[name] = x.shape
    }
    const latents = device.zeros([1, 2, 3, 4])
    vae.decode(latents, {}, observe).dispose()
    latents.dispose()
    expect(shapes).toEqual({
      mid_block: [1, 2, 3, 48],
      'up_blocks.0': [1, 4, 6, 48],
      'up_blocks.1': [1, 8, 12, 48],
      'up_blocks.2': [1, 16, 24, 32],
      'up_blocks.3': [1, 16, 24, 16],
    })
    dispose()
  })
})

describe('tiles', () => {
  test('cover each side, meet by a quarter and weigh one everywhere', () => {
    for (const limit of [8, 9, 16, 31, 128])
      for (const length of [1, 7, 8, 9, 15, 16, 17, 23, 32, 33, 40, 97, 129, 144, 200, 256, 511]) {
        const what = `${length} by ${limit}`
        const tiles = tilesAlong(length, limit)
        const sum = new Float64Array(length * 8)
        for (const [i, { start, length: size }] of tiles.entries()) {
          expect(size, what).toBeLessThanOrEqual(limit)
          const weights = tileWeights(tiles, i, 8)
          expect(weights.length, what).toBe(size * 8)
          expect(Math.min(...weights), what).toBeGreaterThan(0)
          for (const [j, weight] of weights.entries()) sum[start * 8 + j]! += weight
          const next = tiles[i + 1]
          if (next) expect(start + size - next.start, what).toBeGreaterThanOrEqual(Math.floor(limit / 4))
        }
        expect(tiles.at(-1)!.start + tiles.at(-1)!.length, what).toBe(length)
        expect(Math.max(...sum.map(weight => Math.abs(weight - 1))), what).toBeLessThan(1e-6)
      }
  })

  test('as large as the image are the whole image', async () => {
    const { vae, dispose } = await load()
    const whole = await decode(vae, [12, 20], wave, { tile: 64 })
    expect(await decode(vae, [12, 20], wave)).toEqual(whole) // 16 × 16 latents by default
    expect(await decode(vae, [12, 20], wave, { tile: 15 })).not.toEqual(whole)
    dispose()
  })

  test('are blended linearly where they meet', async () => {
    const { vae, dispose } = await load()
    const [height, width] = [24, 16]
    const latent = (y: number, x: number, c: number) => Math.sin(3 * y + 5 * x + c)
    const blended = await decode(vae, [height, width], latent, { tile: 16 })
    // Two tiles of 14 rows, from 0 and from 10, have 4 in common.
    const upper = await decode(vae, [14, width], latent)
    const lower = await decode(vae, [14, width], (y, x, c) => latent(y + 10, x, c))
    const row = width * 8 * 3
    const expected = Float32Array.from({ length: height * 8 * row }, (_, i) => {
      const y = Math.floor(i / row)
      const share = Math.min(1, Math.max(0, (y - 80 + 0.5) / 32))
      return (1 - share) * (upper[i] ?? 0) + share * (lower[i - 80 * row] ?? 0)
    })
    assertClose('blended', blended, expected, 1e-5)
    dispose()
  })

  test('come near the whole image where all look alike, the nearer the larger', async () => {
    const { vae, dispose } = await load()
    const size = [48, 48] as const
    const whole = await decode(vae, size, wave, { tile: 64 })
    const rms = (x: Float32Array) => Math.sqrt(x.reduce((sum, v) => sum + v * v, 0) / x.length)
    const distance = async (tile: number) => {
      const tiled = await decode(vae, size, wave, { tile })
      return rms(tiled.map((v, i) => v - whole[i]!)) / rms(whole)
    }
    // What remains are the zeros around a tile, which reach into it and into its norms: 0.52 and 0.23 of the image seen.
    expect(await distance(12)).toBeLessThan(0.6)
    expect(await distance(24)).toBeLessThan(0.28)
    dispose()
  })

  test('leave no seam', async () => {
    const { vae, dispose } = await load()
    const [h, w, tile] = [24, 40, 24]
    const row = w * 8 * 3
    /** Mean difference of the pixels left and right of column x. */
    const jump = (image: Float32Array, x: number) => {
      let sum = 0
      for (let y = 0; y < h * 8; y++)
        for (let c = 0; c < 3; c++)
          sum += Math.abs(image[y * row + x * 3 + c]! - image[y * row + (x - 1) * 3 + c]!)
      return sum / (h * 8 * 3)
    }
    const image = await decode(vae, [h, w], wave, { tile })
    const tiles = tilesAlong(w, tile)
    const edges = [tiles[1]!.start * 8, (tiles[0]!.start + tiles[0]!.length) * 8]
    for (const x of edges) {
      const around = [-12, -8, -4, 4, 8, 12].map(offset => jump(image, x + offset))
      expect(jump(image, x), `column ${x}`).toBeLessThan(1.5 * Math.max(...around))
    }
    // The measure sees a seam: the same tiles, one cut off where the other begins.
    const [left, right] = await Promise.all(
      tiles.map(({ start, length }) => decode(vae, [h, length], (y, x, c) => wave(y, x + start, c))),
    )
    const cut = image.map((_, i) => {
      const [y, x] = [Math.floor(i / row), Math.floor((i % row) / 3)]
      const [tile, piece] = x < edges[0]! ? [tiles[0]!, left!] : [tiles[1]!, right!]
      return piece[(y * tile.length * 8 + x - tile.start * 8) * 3 + (i % 3)]!
    })
    const around = [-12, -8, -4, 4, 8, 12].map(offset => jump(cut, edges[0]! + offset))
    expect(jump(cut, edges[0]!)).toBeGreaterThan(1.5 * Math.max(...around))
    dispose()
  })

  test.each([0, 7, 8.5, Number.NaN])('refuses tiles of %d', async tile => {
    const { vae, dispose } = await load()
    const latents = device.zeros([1, 2, 2, 4])
    expect(() => vae.decode(latents, { tile })).toThrow(
      `expected an integer of at least 8 for tile but received ${tile}`,
    )
    latents.dispose()
    dispose()
  })
})

describe('encode', () => {
  const [means, unmixed] = (
    JSON.parse(readFileSync(join(FIXTURES, 'sdxl-vae/means.json'), 'utf8')) as number[][][]
  ).map(rows => Float32Array.from(rows.flat())) as [Float32Array, Float32Array]
  const picture = () => {
    const { data, shape } = golden('image_u8')
    return device.tensor(
      data.map(level => level / 127.5 - 1),
      [1, ...shape],
    )
  }

  test.each([
    ['the means of the golden image', {}, means],
    ['means that no convolution mixes', { use_quant_conv: false }, unmixed],
  ] as const)('%s', async (_, config, expected) => {
    const { vae, weights, dispose } = await load({ encoder: true, config })
    const latents = device.scope(() => vae.encode(picture()))
    expect(latents.shape).toEqual([1, 12, 16, 4])
    assertClose('means', await latents.readF32(), expected, TOLERANCE)
    weights.finish(vae.config.use_quant_conv ? [] : [/^quant_conv\./])
    latents.dispose()
    dispose()
  })

  test('blends tiles where they meet', async () => {
    const { vae, dispose } = await load({ encoder: true })
    const encode = async (first: number, width: number, options: { tile?: number } = {}) => {
      const latents = device.scope(() => vae.encode(cast(picture().narrow(2, first, width), 'f32'), options))
      expect(latents.shape).toEqual([1, 12, width / 8, 4])
      const numbers = await latents.readF32()
      latents.dispose()
      return numbers
    }
    expect(await encode(0, 128, { tile: 14 })).toEqual(await encode(0, 128))
    // Two tiles of 10 columns, from 0 and from 6, have 4 in common.
    const [blended, left, right] = [
      await encode(0, 128, { tile: 12 }),
      await encode(0, 80),
      await encode(48, 80),
    ]
    const expected = blended.map((_, i) => {
      const [y, x, c] = [Math.floor(i / 64), Math.floor(i / 4) % 16, i % 4]
      const share = Math.min(1, Math.max(0, (x - 6 + 0.5) / 4))
      const at = (piece: Float32Array, column: number) => piece[(y * 10 + column) * 4 + c]!
      return (x < 10 ? (1 - share) * at(left, x) : 0) + (x >= 6 ? share * at(right, x - 6) : 0)
    })
    assertClose('blended', blended, expected, 1e-5)
    dispose()
  })

  test('takes whole latents only', async () => {
    const { vae, dispose } = await load({ encoder: true })
    const pixels = device.zeros([1, 16, 12, 3])
    expect(() => vae.encode(pixels)).toThrow(
      'expected a height and a width that 8 divides for pixels but received [1, 16, 12, 3]',
    )
    pixels.dispose()
    dispose()
  })

  test('needs the encoder', async () => {
    const { vae, dispose } = await load()
    const pixels = picture()
    expect(() => vae.encode(pixels)).toThrow(
      expect.objectContaining({
        code: 'INVALID_ARGUMENT',
        message: 'expected one loaded with its encoder for encode but received "a Vae without"',
      }),
    )
    pixels.dispose()
    dispose()
  })
})

describe('bytesAt', () => {
  const { config } = openDiffusion(join(folder, 'pipeline')).vae

  test.each([
    [12, 16, 1, undefined],
    [32, 24, 1, 64],
    [12, 16, 2, undefined],
    [48, 48, 1, 16],
    [48, 40, 1, 32],
  ])('of %i × %i latents, batch %i, tile %o', async (h, w, batch, tile) => {
    const fresh = Device.open('cpu', { threads: 1 })
    const { vae, dispose } = await load({ on: fresh })
    const latents = fresh.zeros([batch, h, w, 4])
    const held = fresh.memory().used
    const pixels = vae.decode(latents, { tile })
    await pixels.read()
    // Latents, weights of tiles and rounded block sizes come on top.
    const share =
      (fresh.memory().peak - held) / Vae.bytesAt(config, 'f32', { height: 8 * h, width: 8 * w, batch, tile })
    expect(share).toBeGreaterThan(0.95)
    expect(share).toBeLessThan(1.15)
    pixels.dispose()
    latents.dispose()
    dispose()
    await fresh.close()
  })

  test('is enough for encode', async () => {
    const fresh = Device.open('cpu', { threads: 1 })
    const { vae, dispose } = await load({ on: fresh, encoder: true })
    for (const tile of [16, 32]) {
      const pixels = fresh.zeros([1, 256, 192, 3])
      const held = fresh.memory().used
      const latents = vae.encode(pixels, { tile })
      await latents.read()
      expect(fresh.memory().peak - held).toBeLessThan(
        Vae.bytesAt(config, 'f32', { height: 256, width: 192, tile }),
      )
      latents.dispose()
      pixels.dispose()
    }
    dispose()
    await fresh.close()
  })
})
