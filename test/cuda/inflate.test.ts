import { execFileSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { constants, deflateRawSync, inflateRawSync } from 'node:zlib'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { Random } from '../helpers/random.ts'
import { root } from './helpers.ts'

interface Stream {
  deflated: Buffer
  /** Bytes that it is said to hold. */
  bytes: number
}

describe('inflate', () => {
  const folder = mkdtempSync(join(tmpdir(), 'mgm-inflate-'))
  afterAll(() => rmSync(folder, { recursive: true }))
  const program = join(folder, 'inflate')
  beforeAll(() => {
    const sources = ['inflate.cpp', join('test', 'inflate.cpp')].map(name =>
      join(root, 'native', 'cuda', name),
    )
    const checks = ['-fsanitize=address,undefined', '-fno-sanitize-recover=all']
    execFileSync('c++', ['-std=c++20', '-O1', ...checks, '-o', program, ...sources])
  })

  /** The contents of each stream, null where it is refused. */
  function inflated(streams: readonly Stream[]): (Buffer | null)[] {
    const input = streams.flatMap(({ deflated, bytes }) => {
      const sizes = Buffer.alloc(8)
      sizes.writeUInt32LE(deflated.length, 0)
      sizes.writeUInt32LE(bytes, 4)
      return [sizes, deflated]
    })
    const said = execFileSync(program, { input: Buffer.concat(input), maxBuffer: 1 << 28 })
    let at = 0
    return streams.map(({ bytes }) => {
      if (said[at++] === 0) return null
      at += bytes
      return said.subarray(at - bytes, at)
    })
  }

  const random = new Random()
  const noise = (length: number) => Buffer.from(Array.from({ length }, () => random.integer(0, 255)))
  // Byte b about 2^-b of the time: the longest words that a code may have.
  const skewed = Buffer.from(
    Array.from({ length: 200_000 }, () => Math.min(40, -Math.log2(1 - random.next()))),
  )
  const contents: Record<string, Buffer> = {
    nothing: Buffer.alloc(0),
    'a byte': Buffer.from('x'),
    zeros: Buffer.alloc(100_000),
    noise: noise(70_000),
    'noise again and again, as far back as matches reach': Buffer.concat(
      Array.from({ length: 3 }, () => noise(32_768)).flatMap(part => [part, part]),
    ),
    skewed,
    source: readFileSync(join(root, 'native', 'cuda', 'inflate.cpp')),
  }

  it.each(Object.entries(contents))('gives back %s, whatever deflated it', (_, data) => {
    const { Z_DEFAULT_STRATEGY, Z_FIXED, Z_HUFFMAN_ONLY, Z_RLE } = constants
    const streams = [0, 1, 9].flatMap(level =>
      [Z_DEFAULT_STRATEGY, Z_FIXED, Z_HUFFMAN_ONLY, Z_RLE].map(strategy => ({
        deflated: deflateRawSync(data, { level, strategy }),
        bytes: data.length,
      })),
    )
    for (const result of inflated(streams)) expect(result?.equals(data), `seed ${random.seed}`).toBe(true)
  })

  it('refuses what is cut short or of another size', () => {
    const data = contents.source!
    const deflated = deflateRawSync(data)
    const wrong = [
      ...Array.from({ length: deflated.length }, (_, length) => ({
        deflated: deflated.subarray(0, length),
        bytes: data.length,
      })),
      { deflated, bytes: data.length - 1 },
      { deflated, bytes: data.length + 1 },
    ]
    expect(inflated(wrong).filter(result => result !== null)).toEqual([])
  })

  it('reads and writes nothing out of bounds, whichever bit is wrong', () => {
    const data = Buffer.concat([contents.source!.subarray(0, 600), noise(20), Buffer.alloc(300)])
    for (const strategy of [constants.Z_DEFAULT_STRATEGY, constants.Z_FIXED]) {
      const deflated = deflateRawSync(data, { strategy })
      const streams = Array.from({ length: deflated.length * 8 }, (_, bit) => {
        const flipped = Buffer.from(deflated)
        flipped[bit >> 3]! ^= 1 << (bit & 7)
        return { deflated: flipped, bytes: data.length }
      })
      let accepted = 0
      inflated(streams).forEach((result, bit) => {
        const expected = zlibs(streams[bit]!)
        if (expected === null) return
        accepted++
        expect(result?.equals(expected), `bit ${bit}, seed ${random.seed}`).toBe(true)
      })
      expect(accepted).toBeGreaterThan(10)
    }
  })
})

/** What zlib makes of a stream; null where it refuses it or the size differs. */
function zlibs({ deflated, bytes }: Stream): Buffer | null {
  try {
    const result = inflateRawSync(deflated)
    return result.length === bytes ? result : null
  } catch {
    return null
  }
}
