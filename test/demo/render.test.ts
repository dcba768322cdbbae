import { readFileSync } from 'node:fs'
import sharp from 'sharp'
import { describe, expect, it } from 'vitest'
import { EMOJI } from '../../lib/demo/emoji.ts'
import { KINDS } from '../../lib/demo/kinds.ts'
import { renderPng, renderScene } from '../../lib/demo/render.ts'
import type { Scene } from '../../lib/demo/scene.ts'
import { sceneSvg } from '../../lib/demo/svg.ts'
import { generateScene, sceneSeed } from '../../lib/demo/world.ts'

const SIDE = 128

/** How far each pixel of two pictures differs, as distance in RGB. */
function differences(a: Buffer, b: Buffer): number[] {
  return Array.from({ length: a.length / 3 }, (_, i) =>
    Math.hypot(a[3 * i]! - b[3 * i]!, a[3 * i + 1]! - b[3 * i + 1]!, a[3 * i + 2]! - b[3 * i + 2]!),
  )
}

describe('emoji', () => {
  it('are there for every kind and no other', () => {
    expect(Object.keys(EMOJI)).toEqual(KINDS.map(({ name }) => name))
  })

  it('share no id, refer to nothing outside of themselves and hold no script', () => {
    const seen = new Set<string>()
    for (const [kind, styles] of Object.entries(EMOJI))
      for (const body of [styles.noto, styles.fluent]) {
        const ids = [...body.matchAll(/\bid="([^"]+)"/g)].map(([, id]) => id!)
        for (const id of ids) {
          expect(seen.has(id), `${kind}: ${id}`).toBe(false)
          seen.add(id)
        }
        for (const [, id] of body.matchAll(/url\(#([^)]+)\)|href="#([^"]+)"/g))
          if (id) expect(ids).toContain(id)
        expect(body).not.toMatch(/<script|<image|<foreignObject|\bon\w+=|href="[^#]|url\([^#]/)
      }
    expect(seen.size).toBeGreaterThan(50)
  })
})

describe('pictures', () => {
  it('look as they did', async () => {
    // Four scenes side by side. Another librsvg may smooth edges another way: few pixels, none of the flat ones.
    const fixture = new URL('../fixtures/demo/scenes.png', import.meta.url)
    const expected = await sharp(readFileSync(fixture))
      .removeAlpha()
      .raw()
      .toBuffer({ resolveWithObject: true })
    expect(expected.info.width).toBe(4 * SIDE)
    for (let i = 0; i < 4; i++) {
      const picture = await renderScene(generateScene(sceneSeed('train', i)), SIDE)
      const tile = await sharp(expected.data, { raw: { width: 4 * SIDE, height: SIDE, channels: 3 } })
        .extract({ left: i * SIDE, top: 0, width: SIDE, height: SIDE })
        .raw()
        .toBuffer()
      const far = differences(picture, tile)
      expect(far.reduce((sum, value) => sum + value, 0) / far.length).toBeLessThan(1)
      expect(far.filter(value => value > 24).length).toBeLessThan(0.01 * far.length)
    }
  })

  it('show every object, inside of its square, and nothing on their edge', async () => {
    for (let i = 0; i < 40; i++) {
      const scene = generateScene(sceneSeed('train', 100 + i))
      const full = await renderScene(scene, SIDE)
      for (const [k, { x, y, size, kind }] of scene.objects.entries()) {
        const without: Scene = { ...scene, objects: scene.objects.filter((_, other) => other !== k) }
        const far = differences(full, await renderScene(without, SIDE))
        const changed = far.flatMap((value, at) => (value > 40 ? [[at % SIDE, Math.floor(at / SIDE)]] : []))
        // Thin things like a paper clip cover a seventh of their square.
        expect(changed.length, `${i}: ${kind}`).toBeGreaterThan(0.07 * (size * SIDE) ** 2)
        // Half a diagonal, and a pixel of smoothing.
        const reach = (size * SIDE * Math.SQRT2) / 2 + 1
        const outside = changed.filter(
          ([px, py]) => Math.hypot(px! + 0.5 - x * SIDE, py! + 0.5 - y * SIDE) > reach,
        )
        expect(outside).toEqual([])
      }
      const bare = await renderScene({ ...scene, objects: [], signs: [] }, SIDE)
      const edge = differences(full, bare).filter(
        (_, at) => at % SIDE === 0 || at < SIDE || at >= SIDE * (SIDE - 1),
      )
      expect(Math.max(...edge)).toBe(0)
    }
  })

  it('show signs at 256 px that differ by one digit, and hardly at 112 px', async () => {
    const scene = generateScene(sceneSeed('train', 1), {
      signs: [0, 1],
      numbers: 1,
      colours: ['green'],
      patterns: ['plain'],
    })
    const saying = (text: string): Scene => ({ ...scene, signs: [{ ...scene.signs[0]!, text }] })
    const shrunk = async (text: string, side: number) =>
      await sharp(await renderScene(saying(text), 256), { raw: { width: 256, height: 256, channels: 3 } })
        .resize(side, side)
        .raw()
        .toBuffer()
    const strong = async (side: number) =>
      differences(await shrunk('3', side), await shrunk('8', side)).filter(value => value > 40).length
    expect(await strong(256)).toBeGreaterThanOrEqual(6)
    expect(await strong(112)).toBeLessThanOrEqual(2)
  })

  it('turn clockwise and flip before they turn', async () => {
    const at = (object: object): Scene => ({
      version: 1,
      background: { colour: 'white', pattern: 'plain', repeat: 5, shade: 0 },
      objects: [
        { kind: 'boot', style: 'noto', x: 0.5, y: 0.5, size: 0.6, rotation: 0, flip: false, ...object },
      ],
      signs: [],
    })
    const size = { raw: { width: SIDE, height: SIDE, channels: 3 } } as const
    const upright = await renderScene(at({}), SIDE)
    const turned = await sharp(upright, size).rotate(90).raw().toBuffer()
    const mirrored = await sharp(upright, size).flop().rotate(90).raw().toBuffer()
    const mean = (a: Buffer, b: Buffer) =>
      differences(a, b).reduce((sum, value) => sum + value, 0) / (SIDE * SIDE)
    // Smoothing differs a little where edges were turned.
    expect(mean(await renderScene(at({ rotation: 90 }), SIDE), turned)).toBeLessThan(1)
    expect(mean(await renderScene(at({ rotation: 90, flip: true }), SIDE), mirrored)).toBeLessThan(1)
    expect(mean(turned, mirrored)).toBeGreaterThan(5)
  })

  it('come as PNG files with the same pixels', async () => {
    const scene = generateScene(5)
    const { data, info } = await sharp(await renderPng(scene, 96))
      .raw()
      .toBuffer({ resolveWithObject: true })
    expect([info.width, info.height, info.channels]).toEqual([96, 96, 3])
    expect(data.equals(await renderScene(scene, 96))).toBe(true)
  })

  it('refuse emoji that are none', () => {
    const scene = generateScene(0)
    const broken = { ...scene, objects: [{ ...scene.objects[0]!, kind: 'toString"' }] }
    expect(() => sceneSvg(broken, 64)).toThrow('no emoji is called')
  })
})
