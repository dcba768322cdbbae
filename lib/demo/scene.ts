import { expected } from '../errors.ts'
import { COLOUR_NAMES, type Colour } from './colours.ts'
import { FONTS, type Font, GLYPHS, textWidth } from './glyphs.ts'
import { KINDS, type Kind } from './kinds.ts'

export const SCENE_VERSION = 1

export const STYLES = ['noto', 'fluent'] as const
export type Style = (typeof STYLES)[number]

export const PATTERNS = ['plain', 'gradient', 'dots', 'stripes', 'checks'] as const
export type Pattern = (typeof PATTERNS)[number]

/** Lengths are in sides of the square picture; x grows to the right, y downwards, from the top left corner. */
export interface Scene {
  readonly version: typeof SCENE_VERSION
  readonly background: Background
  /** One to four, from left to right. */
  readonly objects: readonly SceneObject[]
  /** None to two, from left to right. */
  readonly signs: readonly Sign[]
}

export interface Background {
  /** What the background is called, whatever the pattern. */
  readonly colour: Colour
  readonly pattern: Pattern
  /** Repeats of the pattern along a side. */
  readonly repeat: number
  /** -1 to 1: how much darker or lighter than the named colour. */
  readonly shade: number
}

export interface SceneObject {
  /** The `name` of one of `KINDS`. */
  readonly kind: string
  readonly style: Style
  /** The centre. */
  readonly x: number
  readonly y: number
  /** The side of the emoji's square before it is turned. */
  readonly size: number
  /** Degrees, clockwise. */
  readonly rotation: number
  /** Mirrored left to right, before it is turned. */
  readonly flip: boolean
}

export interface Sign {
  /** One to four characters: a word of `SIGN_WORDS` or a number. */
  readonly text: string
  readonly font: Font
  /** Of the letters. */
  readonly colour: Colour
  /** The centre of the text. */
  readonly x: number
  readonly y: number
  /** The height of the letters. */
  readonly size: number
  /** What the text stands on; null: on the background itself. */
  readonly plate: Colour | null
  /** A post that carries the plate. */
  readonly post: boolean
}

const BY_NAME = new Map(KINDS.map(kind => [kind.name, kind]))

/** The kind of a name; undefined if there is none. */
export function kindOf(name: string): Kind | undefined {
  return BY_NAME.get(name)
}

/** A plate reaches this far beyond its text, in heights of a letter. */
export const PLATE_MARGIN = 0.8
/** The length of a post below its plate, in heights of a letter. */
export const POST_LENGTH = 3

export interface Box {
  readonly left: number
  readonly top: number
  readonly right: number
  readonly bottom: number
}

/** A box that holds all of an object, however it is turned: sin t + cos t is at most 1 + t. */
export function objectBox({ x, y, size, rotation }: SceneObject): Box {
  const half = (size / 2) * Math.min(1 + Math.abs(rotation) * 0.0175, 1.4143)
  return { left: x - half, top: y - half, right: x + half, bottom: y + half }
}

/** The box of a sign with its plate and post. */
export function signBox({ x, y, size, text, font, plate, post }: Sign): Box {
  const margin = plate === null ? 0 : PLATE_MARGIN * size
  const halfWidth = (textWidth(text, font) * size) / 2 + margin
  const bottom = y + size / 2 + margin
  return {
    left: x - halfWidth,
    top: y - size / 2 - margin,
    right: x + halfWidth,
    bottom: post ? bottom + POST_LENGTH * size : bottom,
  }
}

/** The least distance between boxes, and between a box and the edge. */
export const CLEARANCE = 0.01
export function isInside({ left, top, right, bottom }: Box): boolean {
  return left >= CLEARANCE && top >= CLEARANCE && right <= 1 - CLEARANCE && bottom <= 1 - CLEARANCE
}

export function areApart(a: Box, b: Box): boolean {
  return (
    a.left >= b.right + CLEARANCE ||
    b.left >= a.right + CLEARANCE ||
    a.top >= b.bottom + CLEARANCE ||
    b.top >= a.bottom + CLEARANCE
  )
}

/** Takes a scene from outside apart and puts it together again, checked. Throws INVALID_ARGUMENT. */
export function checkScene(value: unknown): Scene {
  const scene = fields(value, 'scene', ['version', 'background', 'objects', 'signs'])
  if (scene.version !== SCENE_VERSION) throw expected(String(SCENE_VERSION), 'scene.version', scene.version)
  const background = fields(scene.background, 'scene.background', ['colour', 'pattern', 'repeat', 'shade'])
  return {
    version: SCENE_VERSION,
    background: {
      colour: oneOf(COLOUR_NAMES, background.colour, 'scene.background.colour'),
      pattern: oneOf(PATTERNS, background.pattern, 'scene.background.pattern'),
      repeat: number(background.repeat, 1, 50, 'scene.background.repeat'),
      shade: number(background.shade, -1, 1, 'scene.background.shade'),
    },
    objects: list(scene.objects, MOST_OBJECTS, 'scene.objects').map(checkObject),
    signs: list(scene.signs, MOST_SIGNS, 'scene.signs').map(checkSign),
  }
}

export const MOST_OBJECTS = 4
const MOST_SIGNS = 2

function checkObject(value: unknown, i: number): SceneObject {
  const at = `scene.objects[${i}]`
  const object = fields(value, at, ['kind', 'style', 'x', 'y', 'size', 'rotation', 'flip'])
  const kind = typeof object.kind === 'string' ? kindOf(object.kind) : undefined
  if (!kind) throw expected('the name of a kind of emoji', `${at}.kind`, object.kind)
  return {
    kind: kind.name,
    style: oneOf(STYLES, object.style, `${at}.style`),
    x: number(object.x, 0, 1, `${at}.x`),
    y: number(object.y, 0, 1, `${at}.y`),
    size: number(object.size, 0.01, 1, `${at}.size`),
    rotation: number(object.rotation, -180, 180, `${at}.rotation`),
    flip: boolean(object.flip, `${at}.flip`),
  }
}

function checkSign(value: unknown, i: number): Sign {
  const at = `scene.signs[${i}]`
  const sign = fields(value, at, ['text', 'font', 'colour', 'x', 'y', 'size', 'plate', 'post'])
  const { text } = sign
  if (
    typeof text !== 'string' ||
    text.length < 1 ||
    text.length > 4 ||
    ![...text].every(c => GLYPHS.includes(c))
  )
    throw expected('one to four capital letters or digits', `${at}.text`, text)
  return {
    text,
    font: oneOf(FONTS, sign.font, `${at}.font`),
    colour: oneOf(COLOUR_NAMES, sign.colour, `${at}.colour`),
    x: number(sign.x, 0, 1, `${at}.x`),
    y: number(sign.y, 0, 1, `${at}.y`),
    size: number(sign.size, 0.001, 0.5, `${at}.size`),
    plate: sign.plate === null ? null : oneOf(COLOUR_NAMES, sign.plate, `${at}.plate`),
    post: boolean(sign.post, `${at}.post`),
  }
}

function fields<K extends string>(value: unknown, name: string, keys: readonly K[]): Record<K, unknown> {
  if (typeof value !== 'object' || value === null || Array.isArray(value))
    throw expected('an object', name, value)
  const surplus = Object.keys(value).find(key => !keys.some(known => known === key))
  if (surplus !== undefined) throw expected(`only the keys ${keys.join(', ')}`, name, surplus)
  return value as Record<K, unknown>
}

function list(value: unknown, most: number, name: string): unknown[] {
  if (!Array.isArray(value) || value.length > most) throw expected(`an array of at most ${most}`, name, value)
  return value
}

function oneOf<T extends string>(values: readonly T[], value: unknown, name: string): T {
  const found = values.find(known => known === value)
  if (found === undefined) throw expected(`one of ${values.join(', ')}`, name, value)
  return found
}

function number(value: unknown, least: number, most: number, name: string): number {
  if (typeof value !== 'number' || !(value >= least && value <= most))
    throw expected(`a number from ${least} to ${most}`, name, value)
  return value
}

function boolean(value: unknown, name: string): boolean {
  if (typeof value !== 'boolean') throw expected('true or false', name, value)
  return value
}
