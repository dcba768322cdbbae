/**
 * Letters of signs, drawn as strokes, because what a machine's fonts look like is not ours to decide. One skeleton serves
 * all fonts. A stroke is a list of points `xy` on a grid 4 wide and 6 high, y downwards; `~` behind a point marks a corner
 * that fonts round off or cut; a stroke that ends in `z` is closed.
 */
const SKELETONS: Readonly<Record<string, string>> = {
  A: '06 20 46,14 34',
  B: '00 06,00 30~ 33~ 03,03 43~ 46~ 06',
  C: '41 40~ 00~ 06~ 46~ 45',
  D: '00 40~ 46~ 06z',
  E: '40 00 06 46,03 33',
  F: '40 00 06,03 33',
  G: '41 40~ 00~ 06~ 46~ 43 23',
  H: '00 06,40 46,03 43',
  I: '20 26,10 30,16 36',
  J: '40 46~ 06~ 04',
  K: '00 06,40 03 46',
  L: '00 06 46',
  M: '06 00 23 40 46',
  N: '06 00 46 40',
  O: '00~ 40~ 46~ 06~z',
  P: '06 00 40~ 43~ 03',
  Q: '00~ 40~ 46~ 06~z,24 46',
  R: '06 00 40~ 43~ 03,23 46',
  S: '41 40~ 00~ 03~ 43~ 46~ 06~ 05',
  T: '00 40,20 26',
  U: '00 06~ 46~ 40',
  V: '00 26 40',
  W: '00 16 22 36 40',
  X: '00 46,40 06',
  Y: '00 23 40,23 26',
  Z: '00 40 06 46',
  0: '00~ 40~ 46~ 06~z',
  1: '11 20 26,16 36',
  2: '01 00~ 40~ 43~ 06 46',
  3: '01 00~ 40~ 43~ 13,13 43~ 46~ 06~ 05',
  4: '36 30 04 44',
  5: '40 00 02 42~ 46~ 06~ 05',
  6: '41 40~ 00~ 06~ 46~ 43~ 03',
  7: '00 40 16',
  8: '00~ 40~ 43~ 03~z,03~ 43~ 46~ 06~z',
  9: '43 03~ 00~ 40~ 46~ 06~ 05',
}

/** What signs can say, a character each. `O` and `0` look alike: no sign mixes letters and digits. */
export const GLYPHS = Object.keys(SKELETONS)

interface FontStyle {
  /** Width of a letter, thickness of its strokes and the gap to the next, in heights of a letter. */
  readonly width: number
  readonly weight: number
  readonly gap: number
  /** Rightward shift of a letter's top, in heights. */
  readonly slant: number
  readonly corners: 'round' | 'cut'
}

const STYLES = {
  plain: { width: 0.64, weight: 0.15, gap: 0.2, slant: 0, corners: 'round' },
  bold: { width: 0.74, weight: 0.22, gap: 0.16, slant: 0, corners: 'round' },
  slanted: { width: 0.6, weight: 0.14, gap: 0.2, slant: 0.2, corners: 'round' },
  block: { width: 0.64, weight: 0.17, gap: 0.2, slant: 0, corners: 'cut' },
} as const satisfies Record<string, FontStyle>

export type Font = keyof typeof STYLES

export const FONTS = Object.keys(STYLES) as Font[]

/** The width of a text, in heights of a letter. */
export function textWidth(text: string, font: Font): number {
  const { width, gap, slant } = STYLES[font]
  return text.length * (width + gap) - gap + slant
}

/**
 * An SVG `path` of a text whose letters are `height` high, its top left corner at the origin.
 * Characters outside of `GLYPHS` are refused.
 */
export function textPath(text: string, font: Font, height: number, colour: string): string {
  const { width, weight, gap, slant, corners } = STYLES[font]
  const place = ([x, y]: Point, letter: number): Point => {
    const down = weight / 2 + (y / 6) * (1 - weight)
    const across = letter * (width + gap) + weight / 2 + (x / 4) * (width - weight)
    return [(across + slant * (1 - down)) * height, down * height]
  }
  const data = [...text].map((character, letter) => {
    const skeleton = SKELETONS[character]
    if (skeleton === undefined) throw new RangeError(`no glyph for ${JSON.stringify(character)}`)
    return skeleton.split(',').map(stroke => outline(stroke, corners, point => place(point, letter)))
  })
  const [ends, joins] = corners === 'round' ? ['round', 'round'] : ['butt', 'miter']
  return (
    `<path d="${data.flat().join('')}" fill="none" stroke="${colour}" stroke-width="${round(weight * height)}" ` +
    `stroke-linecap="${ends}" stroke-linejoin="${joins}"/>`
  )
}

type Point = readonly [x: number, y: number]

/** How far from its corner a rounded or cut stroke leaves the straight line, in units of the grid. */
const CORNER = 1.5

function outline(stroke: string, corners: FontStyle['corners'], place: (point: Point) => Point): string {
  const closed = stroke.endsWith('z')
  const points = stroke
    .replace('z', '')
    .split(' ')
    .map(text => ({ at: [Number(text[0]), Number(text[1])] as Point, soft: text.endsWith('~') }))
  const text = (point: Point) => place(point).map(round).join(' ')
  let path = ''
  for (const [i, { at, soft }] of points.entries()) {
    const before = points[i - 1] ?? points.at(-1)!
    const after = points[i + 1] ?? points[0]!
    const command = path === '' ? 'M' : 'L'
    if (!soft) path += command + text(at)
    else {
      const end = text(toward(at, after.at))
      path +=
        command + text(toward(at, before.at)) + (corners === 'round' ? `Q${text(at)} ${end}` : `L${end}`)
    }
  }
  return closed ? `${path}Z` : path
}

/** The point CORNER away from a corner on the way to its neighbour, half way at the most. */
function toward(corner: Point, neighbour: Point): Point {
  const length = Math.sqrt((neighbour[0] - corner[0]) ** 2 + (neighbour[1] - corner[1]) ** 2)
  const part = Math.min(CORNER / length, 0.5)
  return [corner[0] + (neighbour[0] - corner[0]) * part, corner[1] + (neighbour[1] - corner[1]) * part]
}

const round = (value: number) => Math.round(value * 1000) / 1000
