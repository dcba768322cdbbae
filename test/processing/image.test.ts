import { execFileSync } from 'node:child_process'
import { copyFileSync, mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { createServer, type RequestListener, type Server } from 'node:http'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { crc32, deflateSync } from 'node:zlib'
import sharp from 'sharp'
import { afterAll, afterEach, describe, expect, it } from 'vitest'
import { native } from '../../lib/native.ts'
import { decodeImage, type ImageInput, ImageProcessor } from '../../lib/processing/image.ts'
import { assertClose, FIXTURES, type Golden, readSafetensors, toNhwc } from '../helpers/safetensors.ts'
import { expectClose, Random } from '../ops/helpers.ts'

const folder = join(FIXTURES, 'preprocess')
const index = JSON.parse(readFileSync(join(folder, 'index.json'), 'utf8')) as {
  images: { name: string; file: string; width: number; height: number; mode_on_disk: string }[]
}
const config = JSON.parse(readFileSync(join(folder, 'preprocessor_config.json'), 'utf8')) as {
  image_mean: [number, number, number]
  image_std: [number, number, number]
}
const [mean, std] = [config.image_mean, config.image_std]
const scratch = mkdtempSync(join(tmpdir(), 'mgm-image-'))
afterAll(() => rmSync(scratch, { recursive: true }))

const file = (name: string) => join(folder, 'images', name)
const batched = (g: Golden): Golden => (g.shape.length === 3 ? { ...g, shape: [1, ...g.shape] } : g)

/** A PNG of one IDAT, written by hand; `data` are unfiltered samples, big-endian where 16-bit. */
function png(width: number, height: number, depth: number, colorType: number, data: Uint8Array): Buffer {
  const chunk = (type: string, body: Uint8Array) => {
    const typed = Buffer.concat([Buffer.from(type, 'latin1'), body])
    const [length, crc] = [Buffer.alloc(4), Buffer.alloc(4)]
    length.writeUInt32BE(body.length)
    crc.writeUInt32BE(crc32(typed))
    return Buffer.concat([length, typed, crc])
  }
  const header = Buffer.alloc(13)
  header.writeUInt32BE(width)
  header.writeUInt32BE(height, 4)
  header.set([depth, colorType], 8)
  const stride = data.length / height
  const rows = Buffer.alloc(data.length + height)
  for (let y = 0; y < height && data.length > 0; y++)
    rows.set(data.subarray(y * stride, (y + 1) * stride), y * (stride + 1) + 1)
  const magic = Buffer.from('\x89PNG\r\n\x1a\n', 'latin1')
  return Buffer.concat([
    magic,
    chunk('IHDR', header),
    chunk('IDAT', deflateSync(rows)),
    chunk('IEND', Buffer.alloc(0)),
  ])
}

function bytes(random: Random, count: number): Uint8Array {
  return Uint8Array.from({ length: count }, () => random.integer(0, 255))
}

describe('decodeImage', () => {
  it.each(index.images)('decodes as the official program does: $name ($mode_on_disk)', async image => {
    const golden = readSafetensors(join(folder, `${image.name}.safetensors`)).get('decoded')!
    const { data, width, height } = await decodeImage(join(folder, image.file))
    expect([height, width, 3]).toEqual(golden.shape)
    // JPEG decoders may differ by a rounding in the inverse transform and one in the colours.
    expectClose(data, golden.data, { absolute: image.file.endsWith('.jpg') ? 2 : 0 }, image.name)
  })

  it('takes a path, URLs and bytes alike', async () => {
    const path = file('pal.png')
    const encoded = readFileSync(path)
    const base64 = encoded.toString('base64')
    const percent = [...encoded].map(byte => `%${byte.toString(16).padStart(2, '0')}`).join('')
    const inputs: ImageInput[] = [
      path,
      pathToFileURL(path),
      pathToFileURL(path).href,
      encoded,
      new Uint8Array(encoded),
      `data:image/png;base64,${base64}`,
      `data:;base64,${base64.replaceAll('+', '-').replaceAll('/', '_')}`,
      `data:image/png,${percent}`,
    ]
    const first = await decodeImage(inputs[0]!)
    for (const input of inputs.slice(1)) expect(await decodeImage(input)).toEqual(first)
  })

  it('drops alpha without blending, expands palettes and replicates gray', async () => {
    const random = new Random()
    const rgba = bytes(random, 5 * 4 * 4)
    const rgb = rgba.filter((_, i) => i % 4 < 3)
    expect((await decodeImage(png(5, 4, 8, 6, rgba))).data, `seed ${random.seed}`).toEqual(rgb)
    const gray = bytes(random, 6)
    expect((await decodeImage(png(3, 2, 8, 0, gray))).data).toEqual(
      Uint8Array.from({ length: 18 }, (_, i) => gray[Math.floor(i / 3)]!),
    )
    expect((await decodeImage(png(8, 1, 1, 0, Uint8Array.of(0b10100000)))).data).toEqual(
      Uint8Array.from({ length: 24 }, (_, i) => (i < 3 || (i >= 6 && i < 9) ? 255 : 0)),
    )
  })

  it('keeps the high byte of 16-bit samples', async () => {
    const random = new Random()
    for (const [type, channels] of [
      [2, 3],
      [6, 4],
      [0, 1],
      [4, 2],
    ] as const) {
      const samples = bytes(random, 3 * 2 * channels * 2)
      const expected = Uint8Array.from({ length: 18 }, (_, i) => {
        const c = channels < 3 ? 0 : i % 3
        return samples[(Math.floor(i / 3) * channels + c) * 2]!
      })
      expect(
        (await decodeImage(png(3, 2, 16, type, samples))).data,
        `type ${type}, seed ${random.seed}`,
      ).toEqual(expected)
    }
  })

  it("converts CMYK by Pillow's formula, without profiles", async () => {
    const random = new Random()
    const cmyk = bytes(random, 9 * 7 * 4)
    const out = await native().cmykToRgb(cmyk, 9, 7)
    for (let i = 0; i < 9 * 7; i++)
      for (let c = 0; c < 3; c++) {
        const white = 255 - cmyk[4 * i + 3]!
        // Rounded c·white/255, as integers.
        expect(out[3 * i + c]).toBe(white - Math.round((cmyk[4 * i + c]! * white) / 255))
      }
    const flat = await sharp({
      create: { width: 16, height: 16, channels: 3, background: { r: 200, g: 40, b: 90 } },
    })
      .toColourspace('cmyk')
      .tiff({ compression: 'none' })
      .toBuffer()
    const { data } = await decodeImage(flat)
    const raw = await sharp(flat).pipelineColourspace('cmyk').toColourspace('cmyk').raw().toBuffer()
    expect(data).toEqual(new Uint8Array(await native().cmykToRgb(new Uint8Array(raw), 16, 16)))
  })

  it.each(['gif', 'webp'] as const)('gives the first picture of an animated %s', async format => {
    const frames = new Uint8Array(8 * 16 * 3).fill(20, 0, 8 * 8 * 3).fill(230, 8 * 8 * 3)
    const animated = sharp(frames, { raw: { width: 8, height: 16, channels: 3, pageHeight: 8 } })
    const encoded = await (format === 'gif' ? animated.gif() : animated.webp({ lossless: true })).toBuffer()
    expect((await sharp(encoded).metadata()).pages).toBe(2)
    const { data, width, height } = await decodeImage(encoded)
    expect([width, height]).toEqual([8, 8])
    expect(new Set(data)).toEqual(new Set([20]))
  })

  const refusals: [string, () => ImageInput, RegExp][] = [
    ['no bytes', () => new Uint8Array(0), /no bytes at all/],
    ['garbage', () => Buffer.from('this is not an image at all'), /no known image format/],
    ['one byte', () => Uint8Array.of(0xff), /no known image format/],
    [
      'SVG',
      () =>
        Buffer.from('<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
      /SVG or XML/,
    ],
    ['SVG with a byte order mark', () => Buffer.from('\ufeff  <svg width="9" height="9"/>'), /SVG or XML/],
    ['PDF', () => Buffer.from('%PDF-1.7\n'), /PDF/],
    ['HTML', () => Buffer.from('<!DOCTYPE html><html></html>'), /HTML/],
    ['BMP', () => Buffer.from('BM000000'), /BMP/],
    ['a bare PNG signature', () => Buffer.from('\x89PNG\r\n\x1a\n', 'latin1'), /could not be decoded/],
    [
      'a PNG that claims JPEG data',
      () => Buffer.concat([Buffer.from([0xff, 0xd8, 0xff]), Buffer.alloc(64)]),
      /could not be decoded/,
    ],
    ['a missing file', () => join(scratch, 'missing.png'), /no such file/],
    ['a directory', () => scratch, /regular file/],
    ['a device', () => '/dev/zero', /regular file/],
    ['broken base64', () => 'data:image/png;base64,%%%', /base64/],
    ['a data URL without data', () => 'data:image/png', /comma/],
  ]
  it.each(refusals)('refuses %s', async (_, input, message) => {
    await expect(decodeImage(input())).rejects.toMatchObject({
      name: 'MgmError',
      code: 'IMAGE_INVALID',
      message: expect.stringMatching(message),
    })
  })

  it('does not hang on a pipe that nobody writes to', async () => {
    const pipe = join(scratch, 'pipe')
    execFileSync('mkfifo', [pipe])
    await expect(decodeImage(pipe)).rejects.toMatchObject({ code: 'IMAGE_INVALID' })
  })

  it.each(['land.png', 'jpeg.jpg'])('refuses %s cut anywhere', async name => {
    const whole = readFileSync(file(name))
    for (const share of [0.05, 0.3, 0.6, 0.95]) {
      const path = join(scratch, name)
      copyFileSync(file(name), path)
      truncateSync(path, Math.floor(whole.length * share))
      await expect(decodeImage(path), `cut at ${share}`).rejects.toMatchObject({ code: 'IMAGE_INVALID' })
    }
  })

  it('survives random damage: an answer or IMAGE_INVALID, never anything else', async () => {
    const random = new Random()
    for (const name of ['pal.png', 'jpeg.jpg', 'strip.png'])
      for (let i = 0; i < 15; i++) {
        const damaged = readFileSync(file(name))
        for (let k = 0; k < 8; k++) damaged[random.integer(0, damaged.length - 1)] = random.integer(0, 255)
        const outcome = await decodeImage(damaged).catch((error: unknown) => error)
        if (outcome instanceof Error)
          expect(outcome, `seed ${random.seed}`).toMatchObject({ code: 'IMAGE_INVALID' })
      }
  })

  it('refuses too many pixels before decoding them', async () => {
    const bomb = png(30000, 30000, 8, 2, new Uint8Array(0))
    const start = performance.now()
    await expect(decodeImage(bomb)).rejects.toMatchObject({
      code: 'IMAGE_INVALID',
      message: expect.stringMatching(/at most 100000000 pixels .* 30000 x 30000/),
    })
    expect(performance.now() - start).toBeLessThan(5000)
    await expect(decodeImage(file('land.png'), { maxPixels: 157 * 91 - 1 })).rejects.toMatchObject({
      code: 'IMAGE_INVALID',
    })
    expect((await decodeImage(file('land.png'), { maxPixels: 157 * 91 })).width).toBe(157)
    await expect(decodeImage(png(65537, 1, 8, 0, new Uint8Array(65537)))).rejects.toThrow(
      /sides of at most 65536/,
    )
  })

  it('refuses too many bytes, wherever they come from', async () => {
    const encoded = readFileSync(file('land.png'))
    for (const input of [encoded, file('land.png'), `data:image/png;base64,${encoded.toString('base64')}`]) {
      await expect(decodeImage(input, { maxBytes: encoded.length - 1 })).rejects.toMatchObject({
        code: 'IMAGE_INVALID',
        message: expect.stringMatching(/bytes/),
      })
      expect((await decodeImage(input, { maxBytes: encoded.length })).width).toBe(157)
    }
  })

  it('refuses sources that the caller did not allow, and inputs of other types', async () => {
    await expect(decodeImage('/etc/hostname', { sources: ['data', 'https'] })).rejects.toThrow(
      /data or https .* file/,
    )
    await expect(decodeImage(readFileSync(file('pal.png')), { sources: ['data'] })).rejects.toThrow(/bytes/)
    for (const input of [
      '',
      3,
      null,
      undefined,
      {},
      'ftp://example.org/a.png',
      new URL('blob:x'),
    ] as ImageInput[])
      await expect(decodeImage(input), String(input)).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' })
    await expect(decodeImage(file('pal.png'), { maxPixels: -1 })).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
    })
    await expect(decodeImage('a\0b')).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' })
    await expect(decodeImage('file://elsewhere/a.png')).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' })
  })

  it('stops when it is aborted', async () => {
    await expect(decodeImage(file('land.png'), { signal: AbortSignal.abort() })).rejects.toMatchObject({
      code: 'ABORTED',
    })
    const controller = new AbortController()
    const pending = decodeImage(file('land.png'), { signal: controller.signal })
    controller.abort()
    await expect(pending).rejects.toMatchObject({ code: 'ABORTED' })
  })
})

describe('downloads', () => {
  const servers: Server[] = []
  afterEach(() => {
    for (const server of servers.splice(0)) {
      server.closeAllConnections()
      server.close()
    }
  })
  async function serve(listener: RequestListener): Promise<string> {
    const server = createServer(listener)
    servers.push(server)
    await new Promise<void>(resolve => server.listen(0, '127.0.0.1', resolve))
    return `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  }
  const body = readFileSync(file('pal.png'))

  it('reads from this machine over http, through redirects', async () => {
    const base = await serve((request, response) => {
      const hops = Number(request.url!.slice(1))
      if (hops > 0) response.writeHead(302, { location: `/${hops - 1}` }).end()
      else response.end(body)
    })
    expect(await decodeImage(`${base}/0`)).toEqual(await decodeImage(body))
    expect((await decodeImage(new URL(`${base}/5`))).width).toBe(50)
    await expect(decodeImage(`${base}/6`)).rejects.toMatchObject({
      code: 'DOWNLOAD_FAILED',
      message: expect.stringMatching(/redirects/),
    })
  })

  it('refuses plain http elsewhere, also behind a redirect', async () => {
    await expect(decodeImage('http://example.org/a.png')).rejects.toThrow(/https/)
    await expect(decodeImage('http://localhost.example.org/a.png')).rejects.toThrow(/https/)
    const base = await serve((_, response) =>
      response.writeHead(301, { location: 'http://example.org/a.png' }).end(),
    )
    await expect(decodeImage(base)).rejects.toThrow(/https/)
    const away = await serve((_, response) =>
      response.writeHead(301, { location: 'file:///etc/hostname' }).end(),
    )
    await expect(decodeImage(away)).rejects.toThrow(/https/)
  })

  it('stops at the limit whether the length is announced or not', async () => {
    const announced = await serve((_, response) => {
      response.writeHead(200, { 'content-length': 1e9 })
      response.write(body)
    })
    await expect(decodeImage(announced, { maxBytes: 1000 })).rejects.toMatchObject({ code: 'IMAGE_INVALID' })
    const endless = await serve((_, response) => {
      const more = (): boolean => response.destroyed || (response.write(Buffer.alloc(4096)) && more())
      response.on('drain', more)
      more()
    })
    await expect(decodeImage(endless, { maxBytes: 100_000 })).rejects.toMatchObject({ code: 'IMAGE_INVALID' })
  })

  it('reports a status, a dropped connection, a timeout and an abort, each by its code', async () => {
    const missing = await serve((_, response) => response.writeHead(404).end('no'))
    await expect(decodeImage(`${missing}/secret.png?token=abc`)).rejects.toMatchObject({
      code: 'DOWNLOAD_FAILED',
      message: expect.not.stringMatching(/token/),
    })
    const dropped = await serve((_, response) => {
      response.writeHead(200, { 'content-length': body.length })
      response.write(body.subarray(0, 10), () => response.destroy())
    })
    await expect(decodeImage(dropped)).rejects.toMatchObject({ code: 'DOWNLOAD_FAILED' })
    const silent = await serve(() => {})
    await expect(decodeImage(silent, { timeout: 100 })).rejects.toMatchObject({
      code: 'DOWNLOAD_FAILED',
      message: expect.stringMatching(/100 ms/),
    })
    const controller = new AbortController()
    setTimeout(() => controller.abort(), 50)
    await expect(decodeImage(silent, { signal: controller.signal })).rejects.toMatchObject({
      code: 'ABORTED',
    })
  })
})

describe('ImageProcessor', () => {
  it.each(index.images)('resizes bit for bit and normalises as the official program: $name', async image => {
    const goldens = readSafetensors(join(folder, `${image.name}.safetensors`))
    const golden = goldens.get('decoded')!
    const data = Uint8Array.from(golden.data)
    const [height, width] = golden.shape as [number, number]
    let seen = 0
    for (const [key, pixels] of goldens) {
      const match = /^(pad|default)\.(\d+)\.pixel_values$/.exec(key)
      if (!match) continue
      seen++
      const processor = new ImageProcessor({ size: Number(match[2]), mean, std, pad: match[1] === 'pad' })
      const out = await processor.process({ data, width, height })
      assertClose(key, out, toNhwc(batched(pixels)).data, 1e-6)

      const resized = goldens.get(`${match[1]}.${match[2]}.resized_u8`)
      if (!resized) continue
      const [h, w] = resized.shape as [number, number]
      const geometry = processor.geometry(width, height)
      expect([geometry.width, geometry.height]).toEqual([w, h])
      const whole = { ...geometry, cropX: 0, cropY: 0, cropWidth: w, cropHeight: h }
      expect(await native().resizeBicubic(data, width, height, whole), key).toEqual(
        Uint8Array.from(resized.data),
      )
    }
    expect(seen).toBeGreaterThan(0)
  })

  it.each([64, 96])('prepares the high-resolution picture of HD at %d', async size => {
    const golden = readSafetensors(join(folder, `hd_${size}.safetensors`)).get('images_aux')!
    const processor = new ImageProcessor({ size, mean, std, pad: true })
    assertClose('images_aux', await processor.process(file('land.png')), toNhwc(batched(golden)).data, 1e-6)
  })

  it('gives the same pixels as a picture that was padded before it came', async () => {
    const random = new Random()
    for (const [width, height] of [
      [31, 7],
      [6, 29],
      [40, 39],
      [1, 50],
    ] as const) {
      const data = bytes(random, width * height * 3)
      const side = Math.max(width, height)
      const square = new Uint8Array(side * side * 3)
      const color = mean.map(value => Math.trunc(value * 255))
      const [left, top] = [(side - width) >> 1, (side - height) >> 1]
      for (let y = 0; y < side; y++)
        for (let x = 0; x < side; x++)
          for (let c = 0; c < 3; c++) {
            const inside = x >= left && x < left + width && y >= top && y < top + height
            square[(y * side + x) * 3 + c] = inside
              ? data[((y - top) * width + x - left) * 3 + c]!
              : color[c]!
          }
      const padded = await new ImageProcessor({ size: 17, mean, std, pad: true }).process({
        data,
        width,
        height,
      })
      const before = await new ImageProcessor({ size: 17, mean, std, pad: false }).process({
        data: square,
        width: side,
        height: side,
      })
      expect(padded, `seed ${random.seed}`).toEqual(before)
    }
  })

  it('keeps a constant picture constant and handles extreme shapes in bounded time and memory', async () => {
    const before = process.memoryUsage.rss()
    for (const [width, height] of [
      [30000, 1],
      [1, 30000],
      [1, 1],
      [65536, 2],
    ] as const)
      for (const pad of [false, true]) {
        const data = new Uint8Array(width * height * 3).fill(200)
        const out = await new ImageProcessor({ size: 96, mean: [0, 0, 0], std: [1, 1, 1], pad }).process({
          data,
          width,
          height,
        })
        expect(out.length).toBe(96 * 96 * 3)
        if (!pad) expect(out.every(value => value === Math.fround(200 / 255))).toBe(true)
      }
    expect(process.memoryUsage.rss() - before).toBeLessThan(200e6)
  })

  it('runs off the event loop', async () => {
    const data = new Uint8Array(4000 * 3000 * 3)
    let ticks = 0
    const timer = setInterval(() => ticks++, 2)
    await new ImageProcessor({ size: 768, mean, std, pad: true }).process({ data, width: 4000, height: 3000 })
    clearInterval(timer)
    expect(ticks).toBeGreaterThan(2)
  })

  it('refuses what does not fit together', async () => {
    const processor = new ImageProcessor({ size: 8, mean, std, pad: true })
    const data = new Uint8Array(12)
    for (const [width, height] of [
      [2, 3],
      [0, 2],
      [-2, -2],
      [1.5, 2],
      [1e9, 1e9],
    ] as const)
      await expect(processor.process({ data, width, height }), `${width} x ${height}`).rejects.toMatchObject({
        code: 'INVALID_ARGUMENT',
      })
    await expect(processor.process({} as ImageInput)).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' })
    expect(() => new ImageProcessor({ size: 0, mean, std, pad: true })).toThrow(/size/)
    expect(() => new ImageProcessor({ size: 8, mean, std: [1, 1, 0], pad: true })).toThrow(/std/)
    const crop = { width: 8, height: 8, cropX: 1, cropY: 0, cropWidth: 8, cropHeight: 8 }
    await expect(native().resizeBicubic(data, 2, 2, crop)).rejects.toThrow(/crop/)
  })

  it('reads a file end to end', async () => {
    const path = join(scratch, 'copy.jpg')
    writeFileSync(path, readFileSync(file('jpeg.jpg')))
    const processor = new ImageProcessor({ size: 64, mean, std, pad: true })
    const golden = readSafetensors(join(folder, 'jpeg.safetensors')).get('pad.64.pixel_values')!
    // Two levels of decoder difference.
    assertClose(
      'pixel_values',
      await processor.process(path),
      toNhwc(batched(golden)).data,
      (2 / 255 / 0.26) * 1.01,
    )
  })
})
