import { expected } from '../errors.ts'
import { COLOUR_NAMES, COLOURS, type Colour, luma } from './colours.ts'
import { FONTS } from './glyphs.ts'
import { KINDS, type Kind } from './kinds.ts'
import { fnv1a, Random } from './random.ts'
import {
  areApart,
  type Background,
  type Box,
  isInside,
  kindOf,
  objectBox,
  PATTERNS,
  type Pattern,
  SCENE_VERSION,
  type Scene,
  type SceneObject,
  type Sign,
  STYLES,
  signBox,
} from './scene.ts'

/** What signs say where it is no number: short, and together with all letters of the alphabet. */
export const SIGN_WORDS: readonly string[] = (
  'AIR ART BAG BAKE BANK BAR BAY BIKE BOX BUS BUZZ CAFE CAMP CITY CLUB COLD DEEP DOCK DOOR DRY EAST ECHO ' +
  'EXIT FARM FAST FISH FIX FREE FUN GATE GO GOLD GYM HALL HELP HERE HIGH HOME HOT HUB ICE INFO INN JAM ' +
  'JAZZ JOB KEY KIDS KING LAKE LEFT LIVE LOW LUCK MAIN MAP MAX MENU MILK NEW NEXT NO OFF OIL OK ON OPEN ' +
  'OUT PARK PAY PIER POST PUSH QUAY QUIZ RAIN ROAD ROOM SALE SHOP SLOW STOP SUN TAXI TEA TIME TOWN UP VAN ' +
  'VIEW WALK WAY WEST WIFI YARD YES ZERO ZONE ZOO'
).split(' ')

// What is kept for training, and for looking at while training, and for the numbers that are published.
export const SPLITS = ['train', 'validation', 'test'] as const
export type Split = (typeof SPLITS)[number]

/** The seed of scene `index` (an integer from 0) of a split: no two splits share one. */
export function sceneSeed(split: Split, index: number): number {
  return index * SPLITS.length + SPLITS.indexOf(split)
}

export function splitOf(seed: number): Split {
  return SPLITS[seed % SPLITS.length]!
}

/** Two kinds of which one in ten such pairs, told by hash, is never seen together in a training scene. */
export function isHeldOut(a: string, b: string): boolean {
  return a !== b && fnv1a(a < b ? `${a}+${b}` : `${b}+${a}`) % 10 === 0
}

/** The held-out pairs of a scene: none in scenes for training. */
export function heldOutPairs(scene: Scene): [string, string][] {
  const kinds = [...new Set(scene.objects.map(object => object.kind))]
  return kinds.flatMap((a, i) =>
    kinds.slice(i + 1).flatMap(b => (isHeldOut(a, b) ? [[a, b] as [string, string]] : [])),
  )
}

/** What scenes are like. Weights need not sum to 1. */
export interface WorldOptions {
  /** Weights of 1, 2, 3 and 4 objects. */
  readonly objects: readonly number[]
  /** Least and greatest size of objects where there are 1, 2, 3 and 4. */
  readonly objectSize: readonly (readonly [number, number])[]
  /** How likely each further object is of the kind of one that is there. */
  readonly repeat: number
  /** The share of fluent emoji. */
  readonly fluent: number
  /** Degrees to either side. */
  readonly rotation: number
  /** Weights of 0, 1 and 2 signs. */
  readonly signs: readonly number[]
  /** Least and greatest height of letters. */
  readonly signSize: readonly [number, number]
  /** The share of signs that say a number. */
  readonly numbers: number
  readonly patterns: readonly Pattern[]
  readonly colours: readonly Colour[]
  /** Names of the kinds to draw from; all if empty. */
  readonly kinds: readonly string[]
  /** Kinds that are put in first; those that the background would hide are left out. Whoever asks for a held-out pair gets it. */
  readonly include: readonly string[]
  /** The share of scenes of more than one kind with a held-out pair, outside of the training split. */
  readonly heldOut: number
  /** Names another scene of the same seed. */
  readonly variant: string
}

export const WORLD: WorldOptions = {
  objects: [2, 3, 3, 2],
  objectSize: [
    [0.28, 0.5],
    [0.22, 0.4],
    [0.19, 0.32],
    [0.18, 0.27],
  ],
  repeat: 0.2,
  fluent: 0.35,
  rotation: 20,
  signs: [5, 4, 1],
  signSize: [0.027, 0.03],
  numbers: 0.6,
  patterns: PATTERNS,
  colours: COLOUR_NAMES,
  kinds: [],
  include: [],
  heldOut: 0.5,
  variant: '',
}

/** Scenes to be drawn at 96 to 128 px, where no sign could be read: fewer and larger objects, calm backgrounds. */
export const DRAWN_WORLD: WorldOptions = {
  ...WORLD,
  objects: [5, 4, 1, 0],
  objectSize: [
    [0.45, 0.7],
    [0.34, 0.45],
    [0.28, 0.34],
    [0.24, 0.28],
  ],
  repeat: 0.1,
  rotation: 0,
  signs: [1],
  patterns: ['plain', 'gradient'],
}

/** The scene of a seed: the same for the same seed and options, on every machine. */
export function generateScene(seed: number, options: Partial<WorldOptions> = {}): Scene {
  if (!Number.isSafeInteger(seed) || seed < 0) throw expected('an integer of at least 0', 'seed', seed)
  const world = { ...WORLD, ...options }
  const stream = (name: string) => new Random(seed, world.variant + name)
  const background = drawBackground(stream('background'), world)
  const objects = drawObjects(stream('objects'), world, background.colour, splitOf(seed))
  const signs = drawSigns(stream('signs'), world, background)
  return place(stream('places'), { version: SCENE_VERSION, background, objects, signs })
}

function drawBackground(random: Random, world: WorldOptions): Background {
  return {
    colour: random.pick(world.colours),
    pattern: random.pick(world.patterns),
    repeat: 5 + random.below(8),
    shade: thousandths(random.between(-1, 1)),
  }
}

function drawObjects(random: Random, world: WorldOptions, background: Colour, split: Split): SceneObject[] {
  const styles = (kind: Kind) => STYLES.filter(style => !kind.hiddenOn[style].includes(background))
  const named = world.kinds.length > 0 ? world.kinds.map(knownKind) : KINDS
  const kinds = named.filter(kind => styles(kind).length > 0)
  const chosen: Kind[] = world.include.map(knownKind).filter(kind => styles(kind).length > 0)
  const mayJoin = (kind: Kind) =>
    !chosen.includes(kind) && (split !== 'train' || !chosen.some(other => isHeldOut(kind.name, other.name)))

  const count = Math.max(chosen.length, random.weighted(world.objects) + 1)
  const wantsHeldOut = split !== 'train' && random.chance(world.heldOut)
  while (chosen.length < count) {
    const others = kinds.filter(mayJoin)
    const unseen =
      wantsHeldOut && chosen.length === 1 ? others.filter(kind => isHeldOut(kind.name, chosen[0]!.name)) : []
    if (unseen.length > 0) chosen.push(random.pick(unseen))
    else if (chosen.length > 0 && (others.length === 0 || random.chance(world.repeat)))
      chosen.push(random.pick(chosen))
    else chosen.push(random.pick(others))
  }

  const [least, greatest] = world.objectSize[count - 1]!
  return chosen.map(kind => {
    const allowed = styles(kind)
    const style = random.chance(world.fluent) ? 'fluent' : 'noto'
    return {
      kind: kind.name,
      style: allowed.includes(style) ? style : allowed[0]!,
      x: 0,
      y: 0,
      size: random.between(least, greatest),
      rotation: Math.floor(random.between(-world.rotation, world.rotation + 1)),
      flip: random.chance(0.5),
    }
  })
}

function knownKind(name: string): Kind {
  const kind = kindOf(name)
  if (!kind) throw expected('the name of a kind of emoji', 'kind', name)
  return kind
}

/** The least difference in luma between letters and what they stand on. */
const LETTER_CONTRAST = 0.45
/** The least distance in RGB between a plate and the background. */
const PLATE_CONTRAST = 110

function drawSigns(random: Random, world: WorldOptions, background: Background): Sign[] {
  const texts: string[] = []
  for (let count = random.weighted(world.signs); texts.length < count; ) {
    const digits = 1 + random.below(4)
    const least = digits === 1 ? 0 : 10 ** (digits - 1)
    const number = String(least + random.below(10 ** digits - least))
    const text = random.chance(world.numbers) ? number : random.pick(SIGN_WORDS)
    if (!texts.includes(text)) texts.push(text)
  }
  return texts.map(text => {
    const plated = background.pattern !== 'plain' || random.chance(0.75)
    const plate = plated ? random.pick(COLOUR_NAMES.filter(name => standsOut(name, background.colour))) : null
    const under = COLOURS[plate ?? background.colour]
    return {
      text,
      font: random.pick(FONTS),
      colour: random.pick(
        COLOUR_NAMES.filter(name => Math.abs(luma(COLOURS[name]) - luma(under)) >= LETTER_CONTRAST),
      ),
      x: 0,
      y: 0,
      size: random.between(...world.signSize),
      plate,
      post: plate !== null && random.chance(0.5),
    }
  })
}

function standsOut(plate: Colour, background: Colour): boolean {
  const squares = COLOURS[plate].map((value, i) => (value - COLOURS[background][i]!) ** 2)
  return squares.reduce((sum, square) => sum + square, 0) >= PLATE_CONTRAST ** 2
}

/** The least distance in x between centres, so that "from left to right" is an order. */
export const LEAST_STEP = 0.05

/** Gives everything a place where nothing touches; sizes of objects shrink if there is none. */
function place(random: Random, scene: Scene): Scene {
  let scale = 1
  for (let attempt = 0; attempt < 1000; attempt++) {
    if (attempt > 10) scale *= 0.98
    const boxes: Box[] = []
    const columns: number[] = []
    const settle = <T extends SceneObject | Sign>(item: T, box: (item: T) => Box): T | undefined => {
      for (let attempts = 0; attempts < 30; attempts++) {
        const moved = { ...item, x: thousandths(random.unit()), y: thousandths(random.unit()) }
        const own = box(moved)
        const free =
          isInside(own) &&
          columns.every(x => Math.abs(x - moved.x) >= LEAST_STEP) &&
          boxes.every(other => areApart(own, other))
        if (!free) continue
        boxes.push(own)
        columns.push(moved.x)
        return moved
      }
      return undefined
    }
    const objects = scene.objects.map(object =>
      settle({ ...object, size: thousandths(object.size * scale) }, objectBox),
    )
    const signs = scene.signs.map(sign => settle({ ...sign, size: thousandths(sign.size) }, signBox))
    if ([...objects, ...signs].includes(undefined)) continue
    return {
      ...scene,
      objects: fromLeft(objects.filter(object => object !== undefined)),
      signs: fromLeft(signs.filter(sign => sign !== undefined)),
    }
  }
  throw new RangeError('objects and signs of these options do not fit into a picture')
}

const fromLeft = <T extends { readonly x: number }>(items: T[]): T[] => items.sort((a, b) => a.x - b.x)

const thousandths = (value: number) => Math.round(value * 1000) / 1000
