import { COLOURS, type Colour, luma, type Rgb } from './colours.ts'
import { EMOJI, EMOJI_SIZE } from './emoji.ts'
import { textPath, textWidth } from './glyphs.ts'
import {
  type Background,
  PLATE_MARGIN,
  POST_LENGTH,
  type Scene,
  type SceneObject,
  type Sign,
} from './scene.ts'

/** A scene as an SVG document of `pixels` by `pixels`. */
export function sceneSvg(scene: Scene, pixels: number): string {
  const parts = [
    ...backgroundSvg(scene.background),
    ...scene.objects.map(objectSvg),
    ...scene.signs.flatMap(signSvg),
  ]
  return (
    `<svg xmlns="http://www.w3.org/2000/svg" width="${pixels}" height="${pixels}" viewBox="0 0 ${SIDE} ${SIDE}">` +
    `${parts.join('')}</svg>`
  )
}

/** The picture's side in the document's units. */
const SIDE = 1000

function backgroundSvg({ colour, pattern, repeat, shade }: Background): string[] {
  const base = mix(COLOURS[colour], shade < 0 ? [0, 0, 0] : [255, 255, 255], Math.abs(shade) * 0.08)
  const second = css(mix(base, luma(base) < 0.5 ? [255, 255, 255] : [0, 0, 0], 0.14))
  const fill = (paint: string) => `<rect width="${SIDE}" height="${SIDE}" fill="${paint}"/>`
  const tile = SIDE / repeat
  const tiled = (shape: string) => [
    `<defs><pattern id="pattern" width="${tile}" height="${tile}" patternUnits="userSpaceOnUse">${shape}</pattern></defs>`,
    fill(css(base)),
    fill('url(#pattern)'),
  ]
  const half = tile / 2
  switch (pattern) {
    case 'plain':
      return [fill(css(base))]
    case 'gradient':
      return [
        `<defs><linearGradient id="pattern" x1="0" y1="0" x2="0" y2="1"><stop stop-color="${css(base)}"/>` +
          `<stop offset="1" stop-color="${second}"/></linearGradient></defs>`,
        fill('url(#pattern)'),
      ]
    case 'dots':
      return tiled(`<circle cx="${half}" cy="${half}" r="${tile * 0.22}" fill="${second}"/>`)
    case 'stripes':
      return tiled(`<rect width="${tile}" height="${half}" fill="${second}"/>`)
    case 'checks':
      return tiled(`<path d="M0 0H${half}V${tile}H${tile}V${half}H0Z" fill="${second}"/>`)
  }
}

function objectSvg({ kind, style, x, y, size, rotation, flip }: SceneObject): string {
  const emoji = EMOJI[kind]
  if (!emoji) throw new RangeError(`no emoji is called ${JSON.stringify(kind)}`)
  const scale = (size * SIDE) / EMOJI_SIZE[style]
  const half = EMOJI_SIZE[style] / 2
  return (
    `<g transform="translate(${x * SIDE} ${y * SIDE}) rotate(${rotation}) scale(${flip ? -scale : scale} ${scale}) ` +
    `translate(${-half} ${-half})">${emoji[style]}</g>`
  )
}

function signSvg({ text, font, colour, x, y, size, plate, post }: Sign): string[] {
  const height = size * SIDE
  const width = textWidth(text, font) * height
  const left = x * SIDE - width / 2
  const top = y * SIDE - height / 2
  const margin = PLATE_MARGIN * height
  const bottom = top + height + margin
  const parts = []
  if (post)
    parts.push(
      `<rect x="${x * SIDE - height * 0.2}" y="${bottom}" width="${height * 0.4}" height="${POST_LENGTH * height}" ` +
        `fill="#6b4a2b"/>`,
    )
  if (plate)
    parts.push(
      `<rect x="${left - margin}" y="${top - margin}" width="${width + 2 * margin}" height="${height + 2 * margin}" ` +
        `rx="${height * 0.3}" fill="${named(plate)}"/>`,
    )
  const letters = textPath(text, font, height, named(colour))
  return [...parts, `<g transform="translate(${left} ${top})">${letters}</g>`]
}

const named = (colour: Colour) => css(COLOURS[colour])

function mix(from: Rgb, to: Rgb, part: number): Rgb {
  const at = (i: 0 | 1 | 2) => from[i] + (to[i] - from[i]) * part
  return [at(0), at(1), at(2)]
}

function css(colour: Rgb): string {
  return `#${colour.map(value => Math.round(value).toString(16).padStart(2, '0')).join('')}`
}
