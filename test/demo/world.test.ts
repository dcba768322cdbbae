import { createHash } from 'node:crypto'
import { describe, expect, it } from 'vitest'
import { COLOUR_NAMES, COLOURS } from '../../lib/demo/colours.ts'
import { FONTS, GLYPHS, textPath, textWidth } from '../../lib/demo/glyphs.ts'
import { KINDS } from '../../lib/demo/kinds.ts'
import { Random } from '../../lib/demo/random.ts'
import { checkScene, type Scene } from '../../lib/demo/scene.ts'
import {
  DRAWN_WORLD,
  generateScene,
  heldOutPairs,
  isHeldOut,
  LEAST_STEP,
  SIGN_WORDS,
  SPLITS,
  sceneSeed,
  splitOf,
} from '../../lib/demo/world.ts'

const scenes = (split: (typeof SPLITS)[number], count: number, options = {}) =>
  Array.from({ length: count }, (_, i) => generateScene(sceneSeed(split, i), options))

describe('random numbers', () => {
  it('are those of sfc32', () => {
    // The published algorithm in 64-bit integers.
    let [a, b, c, counter] = [5n, 1n, 0x811c9dc5n, 1n]
    const mask = 0xffffffffn
    const next = () => {
      const result = (a + b + counter) & mask
      counter = (counter + 1n) & mask
      a = b ^ (b >> 9n)
      b = (c + (c << 3n)) & mask
      c = (((c << 21n) & mask) + (c >> 11n) + result) & mask
      return Number(result)
    }
    for (let i = 0; i < 15; i++) next()
    const random = new Random(2 ** 32 + 5, '')
    for (let i = 0; i < 100; i++) expect(random.unit()).toBe(next() / 2 ** 32)
  })

  it('are weighted as asked', () => {
    const random = new Random(3, 'weights')
    const counts = [0, 0, 0]
    for (let i = 0; i < 8000; i++) counts[random.weighted([1, 0, 3])]! += 1
    expect(counts[1]).toBe(0)
    // Five standard deviations of a binomial.
    expect(Math.abs(counts[0]! - 2000)).toBeLessThan(5 * Math.sqrt(8000 * 0.25 * 0.75))
  })
})

describe('kinds', () => {
  it('have names of one or two words that are told apart from all other names', () => {
    const names = KINDS.flatMap(({ name, plural }) => [name, plural])
    expect(KINDS.length).toBeGreaterThanOrEqual(120)
    expect(new Set(names).size).toBe(2 * KINDS.length)
    for (const name of names) expect(name).toMatch(/^[a-z]+( [a-z]+)?$/)
    // "a car key" must not read as "a car".
    expect(names.filter(name => names.includes(name.split(' ')[0]!) && name.includes(' '))).toEqual([])
  })

  it('each can be shown on some background in both styles', () => {
    for (const { name, hiddenOn } of KINDS)
      for (const style of ['noto', 'fluent'] as const)
        expect(hiddenOn[style].length, `${name}, ${style}`).toBeLessThan(COLOUR_NAMES.length / 2)
  })
})

describe('glyphs', () => {
  it('are letters and digits, each unlike the others but O and 0', () => {
    for (const font of FONTS) {
      const paths = new Map(GLYPHS.map(glyph => [textPath(glyph, font, 1000, 'black'), glyph]))
      expect(paths.size).toBe(35)
    }
    expect(GLYPHS.join('')).toBe('0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ')
  })

  it('stay inside of their box', () => {
    for (const font of FONTS)
      for (const text of [...GLYPHS, 'WWWW', '1234']) {
        const [, data] = / d="([^"]+)"/.exec(textPath(text, font, 1, 'black'))!
        const points = [...data!.matchAll(/(-?[\d.]+) (-?[\d.]+)/g)].map(([, x, y]) => [Number(x), Number(y)])
        expect(Math.min(...points.flat())).toBeGreaterThanOrEqual(0)
        expect(Math.max(...points.map(([x]) => x!))).toBeLessThanOrEqual(textWidth(text, font))
        expect(Math.max(...points.map(([, y]) => y!))).toBeLessThanOrEqual(1)
      }
  })

  it('refuse what they cannot draw', () => {
    expect(() => textPath('a', 'plain', 1, 'black')).toThrow('no glyph for "a"')
  })
})

describe('generated scenes', () => {
  const many = scenes('train', 2000)

  it('are the same for a seed on every machine', () => {
    const text = JSON.stringify(SPLITS.flatMap(split => scenes(split, 20)))
    expect(createHash('sha256').update(text).digest('hex').slice(0, 16)).toBe('d2a789805ba8c378')
  })

  it('differ from seed to seed', () => {
    expect(new Set(many.map(scene => JSON.stringify(scene))).size).toBe(many.length)
  })

  it('hold what they promise', () => {
    for (const scene of many) {
      expect(checkScene(JSON.parse(JSON.stringify(scene)))).toEqual(scene)
      expect(scene.objects.length).toBeGreaterThanOrEqual(1)
      for (const { kind, style } of scene.objects)
        expect(KINDS.find(({ name }) => name === kind)!.hiddenOn[style]).not.toContain(
          scene.background.colour,
        )
      for (const { text } of scene.signs) {
        expect(text).toMatch(/^([A-Z]{2,4}|0|[1-9]\d{0,3})$/)
        if (/[A-Z]/.test(text)) expect(SIGN_WORDS).toContain(text)
      }
    }
  })

  it('keep everything inside and apart, and in an order from left to right', () => {
    for (const scene of many) {
      const shapes = corners(scene)
      const values = shapes.flat(2)
      expect(Math.min(...values)).toBeGreaterThan(0)
      expect(Math.max(...values)).toBeLessThan(1)
      const overlaps = shapes.some((a, i) => shapes.slice(i + 1).some(b => overlap(a, b)))
      expect(overlaps, JSON.stringify(scene.signs)).toBe(false)
      const columns = [...scene.objects, ...scene.signs].map(({ x }) => x).sort((a, b) => a - b)
      const steps = columns.slice(1).map((x, i) => x - columns[i]!)
      expect(Math.min(1, ...steps)).toBeGreaterThanOrEqual(LEAST_STEP - 1e-9)
      for (const items of [scene.objects, scene.signs])
        expect(items.map(({ x }) => x)).toEqual(items.map(({ x }) => x).sort((a, b) => a - b))
    }
  })

  it('are spread as the options say', () => {
    const share = (test: (scene: Scene) => boolean) => many.filter(test).length / many.length
    // Four standard deviations of a share of 2000: 0.045 at the most.
    expect(share(({ objects }) => objects.length === 1)).toBeCloseTo(0.2, 1)
    expect(share(({ objects }) => objects.length === 4)).toBeCloseTo(0.2, 1)
    expect(share(({ signs }) => signs.length === 0)).toBeCloseTo(0.5, 1)
    expect(share(({ background }) => background.colour === 'blue')).toBeCloseTo(1 / 12, 1)
    expect(
      share(({ objects }) => new Set(objects.map(({ kind }) => kind)).size < objects.length),
    ).toBeGreaterThan(0.15)
    const kinds = new Set(many.flatMap(({ objects }) => objects.map(({ kind }) => kind)))
    expect(kinds.size).toBe(KINDS.length)
  })

  it('obey their options', () => {
    for (const scene of scenes('train', 50, {
      kinds: ['fox', 'boat'],
      colours: ['blue'],
      signs: [1],
      fluent: 1,
    })) {
      expect(scene.background.colour).toBe('blue')
      expect(scene.signs).toEqual([])
      for (const object of scene.objects) {
        expect(['fox', 'boat']).toContain(object.kind)
        expect(object.style).toBe('fluent')
      }
    }
    for (const scene of scenes('train', 50, { include: ['fox', 'cow'], colours: ['green'] }))
      expect(scene.objects.map(({ kind }) => kind)).toEqual(expect.arrayContaining(['fox', 'cow']))
    for (const { signs, objects } of scenes('train', 50, DRAWN_WORLD)) {
      expect(signs).toEqual([])
      for (const { size, rotation } of objects) {
        expect(size).toBeGreaterThan(0.2)
        expect(rotation).toBe(0)
      }
    }
    expect(() => generateScene(0, { objects: [0, 0, 0, 1], signs: [0, 0, 1], signSize: [0.3, 0.4] })).toThrow(
      'do not fit',
    )
    expect(() => generateScene(0, { kinds: ['fox', 'gryphon'] })).toThrow(
      'the name of a kind of emoji for kind but received "gryphon"',
    )
    expect(() => generateScene(-1)).toThrow('expected an integer of at least 0 for seed but received -1')
  })
})

describe('splits', () => {
  it('share no seed', () => {
    const seeds = SPLITS.map(split => Array.from({ length: 1000 }, (_, i) => sceneSeed(split, i)))
    expect(new Set(seeds.flat()).size).toBe(3000)
    for (const [i, split] of SPLITS.entries()) for (const seed of seeds[i]!) expect(splitOf(seed)).toBe(split)
  })

  it('keep a tenth of all pairs out of training, and put them into half of the other scenes', () => {
    const names = KINDS.map(({ name }) => name)
    const pairs = names.flatMap((a, i) => names.slice(i + 1).map(b => isHeldOut(a, b)))
    expect(pairs.filter(Boolean).length / pairs.length).toBeCloseTo(0.1, 1.5)
    for (const [a, b] of [['fox', 'boat'] as const, ['cat', 'dog'] as const])
      expect(isHeldOut(a, b)).toBe(isHeldOut(b, a))

    expect(scenes('train', 2000).flatMap(heldOutPairs)).toEqual([])
    for (const split of ['validation', 'test'] as const) {
      const several = scenes(split, 600).filter(({ objects }) => objects.length > 1)
      const held = several.filter(scene => heldOutPairs(scene).length > 0)
      expect(held.length / several.length).toBeGreaterThan(0.45)
      expect(held.length / several.length).toBeLessThan(0.75)
    }
  })
})

describe('checkScene', () => {
  const scene = generateScene(sceneSeed('train', 1))
  const [object] = scene.objects
  const sign = { ...scene.signs[0]! }

  it.each([
    [null, 'expected an object for scene but received null'],
    [{ ...scene, version: 2 }, 'expected 1 for scene.version but received 2'],
    [
      { ...scene, more: 1 },
      'expected only the keys version, background, objects, signs for scene but received "more"',
    ],
    [
      { ...scene, objects: [{ ...object, kind: 'toString' }] },
      'scene.objects[0].kind but received "toString"',
    ],
    [
      { ...scene, objects: [{ ...object, size: Number.NaN }] },
      'a number from 0.01 to 1 for scene.objects[0].size',
    ],
    [{ ...scene, objects: Array(5).fill(object) }, 'expected an array of at most 4 for scene.objects'],
    [
      { ...scene, signs: [{ ...sign, text: '<b/>' }] },
      'one to four capital letters or digits for scene.signs[0].text',
    ],
    [{ ...scene, signs: [{ ...sign, plate: '#fff' }] }, 'for scene.signs[0].plate but received "#fff"'],
    [{ ...scene, background: { ...scene.background, colour: 'mauve' } }, 'for scene.background.colour'],
  ])('refuses, number %#', (value, message) => {
    expect(() => checkScene(value)).toThrow(message)
  })
})

type Point = readonly [number, number]

/** The corners of every object's turned square, and of every sign's text. */
function corners({ objects, signs }: Scene): Point[][] {
  const around = (x: number, y: number, w: number, h: number, degrees: number): Point[] => {
    const [sin, cos] = [Math.sin((degrees * Math.PI) / 180), Math.cos((degrees * Math.PI) / 180)]
    return [
      [-w, -h],
      [w, -h],
      [w, h],
      [-w, h],
    ].map(([dx, dy]) => [x + dx! * cos - dy! * sin, y + dx! * sin + dy! * cos])
  }
  return [
    ...objects.map(({ x, y, size, rotation }) => around(x, y, size / 2, size / 2, rotation)),
    ...signs.map(({ x, y, size, text, font }) =>
      around(x, y, (textWidth(text, font) * size) / 2, size / 2, 0),
    ),
  ]
}

/** Whether two convex shapes overlap: no edge of either separates them. */
function overlap(a: Point[], b: Point[]): boolean {
  for (const shape of [a, b])
    for (const [i, [x, y]] of shape.entries()) {
      const [nextX, nextY] = shape[(i + 1) % shape.length]!
      const side = (points: Point[]) =>
        points.map(([px, py]) => (px - x) * (nextY - y) - (py - y) * (nextX - x))
      if (Math.max(...side(a)) < Math.min(...side(b)) || Math.max(...side(b)) < Math.min(...side(a)))
        return false
    }
  return true
}

it('colours are far enough apart to be told by name', () => {
  for (const a of COLOUR_NAMES)
    for (const b of COLOUR_NAMES)
      if (a !== b)
        expect(
          Math.hypot(...COLOURS[a].map((value, i) => value - COLOURS[b][i]!)),
          `${a}, ${b}`,
        ).toBeGreaterThan(60)
})
