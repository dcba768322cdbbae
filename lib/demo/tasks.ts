import { COLOUR_NAMES } from './colours.ts'
import { GLYPHS } from './glyphs.ts'
import { KINDS } from './kinds.ts'
import { Random } from './random.ts'
import { kindOf, type Scene } from './scene.ts'
import { DRAWN_WORLD, generateScene, type WorldOptions } from './world.ts'

export const TASKS = [
  'caption', // what is in the picture, in one of two, or in each
  'relation', // what is to the left of, to the right of, above, below something
  'count',
  'background',
  'sign', // what signs say
  'yesno',
  'difference', // two pictures: which emoji one has and the other has not
  'which', // two pictures: which one shows something
  'draw',
  'talk', // about itself
] as const
export type Task = (typeof TASKS)[number]

/**
 * What an answer claims, as scorers compare it. `object <kind>`: how many; `sign <text>`: `seen`; `background`: a colour;
 * `answer`: a kind, `sign`, `nothing`, `absent`, `yes`, `no`, `first`, `second`, `both`, `neither`; `count`: a number. Where both
 * of two pictures are described, `first ` or `second ` stands before each.
 */
export type Facts = Readonly<Record<string, string>>

/** A question and its answer. */
export interface Turn {
  readonly task: Task
  readonly question: string
  readonly answer: string
  readonly facts: Facts
}

/** A conversation about pictures, which all stand in front of its first question. */
export interface Example {
  /** Positions in the list of scenes that the example came with: none, one or two. */
  readonly pictures: readonly number[]
  readonly turns: readonly Turn[]
}

export interface Message {
  readonly role: 'user' | 'assistant'
  readonly content: string
  /** The message asks for a drawing: the prompt carries ` <GEN>`. */
  readonly gen?: true
}

/** The messages of an example up to the question of a turn, in the form that `chat` takes them. */
export function messagesOf({ turns }: Example, turn = turns.length - 1): Message[] {
  return turns.slice(0, turn + 1).flatMap(({ task, question, answer }, i): Message[] => {
    const user: Message = { role: 'user', content: question, ...(task === 'draw' ? { gen: true } : {}) }
    return i < turn ? [user, { role: 'assistant', content: answer }] : [user]
  })
}

// Phrasings. {a}: a kind with its article, {x}: a kind, {xs}: its plural, {d}: a direction, {c}: a colour, {list}: a list,
// {this}, {that}: first or second.

const PHRASES = {
  caption: [
    'Describe the picture.',
    'What is in the picture?',
    'What do you see?',
    'What does this image show?',
    'Tell me what is in this picture.',
    'Please describe this image.',
    'Write a caption.',
    'What is this?',
  ],
  captionBoth: ['Describe the pictures.', 'What is in the pictures?', 'What do both pictures show?'],
  captionOther: [
    'And the {this}?',
    'And the {this} picture?',
    'What about the {this}?',
    'And in the {this}?',
  ],
  relation: [
    'What is {d} the {x}?',
    'What do you see {d} the {x}?',
    'What can be seen {d} the {x}?',
    'Tell me what is {d} the {x}.',
    'What stands {d} the {x}?',
    'Look at the {x}. What is {d} it?',
  ],
  relationFollowUp: ['And what is {d} it?', 'What is {d} it?', 'And {d} it?', 'What do you see {d} it?'],
  itsSide: ['And what is to its {side}?', 'What is to its {side}?', 'And to its {side}?'],
  countAll: [
    'How many emoji are in the picture?',
    'How many emoji are there?',
    'How many emoji do you see?',
    'Count the emoji.',
  ],
  countKind: [
    'How many {xs} are there?',
    'How many {xs} are in the picture?',
    'How many {xs} do you see?',
    'Count the {xs}.',
  ],
  countFollowUp: ['And how many {xs}?', 'And how many {xs} are there?', 'How many {xs}?'],
  background: [
    'What color is the background?',
    'What colour is the background?',
    'Which color does the background have?',
    'Tell me the color of the background.',
    'On what color is it drawn?',
  ],
  backgroundFollowUp: [
    'And the background?',
    'And what color is the background?',
    'What about the background?',
  ],
  sign: [
    'What does the sign say?',
    'Read the sign.',
    'What is written on the sign?',
    'Please read the sign.',
    'What can you read?',
  ],
  signs: ['What do the signs say?', 'Read the signs.', 'What is written on the signs?', 'What can you read?'],
  present: [
    'Is there {a}?',
    'Is there {a} in the picture?',
    'Do you see {a}?',
    'Does the picture show {a}?',
    'Can you see {a}?',
  ],
  isBackground: [
    'Is the background {c}?',
    'Is it on a background that is {c}?',
    'Is {c} the color of the background?',
  ],
  isRelated: [
    'Is the {x} {d} the {y}?',
    'Do you see the {x} {d} the {y}?',
    'Is it true that the {x} is {d} the {y}?',
  ],
  saysText: [
    'Does the sign say {text}?',
    'Is it true that the sign says {text}?',
    'Can you read {text} on the sign?',
  ],
  hasCount: ['Are there {n} {xs}?', 'Do you see {n} {xs}?', 'Does the picture show {n} {xs}?'],
  difference: [
    'Which emoji are in the {this} picture but not in the {that}?',
    'Which emoji does the {this} picture show that the {that} does not?',
    'Which emoji are only in the {this} picture?',
    'Compare the pictures. Which emoji are only in the {this}?',
  ],
  sameBackground: [
    'Do both pictures have the same background?',
    'Is the background the same in both pictures?',
    'Do the two pictures have the same color behind them?',
    'Are both on the same color?',
  ],
  which: [
    'Which picture shows {a}?',
    'In which picture is there {a}?',
    'Which of the two pictures has {a}?',
    'Where do you see {a}?',
  ],
  draw: [
    'Draw {list} on {c}.',
    'Please draw {list} on a background that is {c}.',
    'Can you draw {list}? Make the background {c}.',
    'I would like a picture of {list} on {c}.',
    'Paint {list} with the background {c}.',
    'Make an image of {list} on {c}.',
    'A picture of {list} on {c}, please.',
    'Show me {list} on {c}.',
  ],
  drawPair: [
    '{a} next to {b}',
    '{a} and {b}',
    '{a} with {b} beside it',
    '{a} to the left of {b}',
    '{b} to the right of {a}',
  ],
  drawAgain: [
    'Draw this picture again.',
    'Please draw the same picture.',
    'Make a picture like this.',
    'Can you draw this?',
  ],
} as const

interface Talk {
  readonly questions: readonly string[]
  readonly answer: string
  /** The answer where there are pictures, if that is another. */
  readonly beside?: string
}

const TALK: readonly Talk[] = [
  {
    questions: ['Who are you?', 'What are you?', 'Tell me about you.'],
    answer: 'I am a small demo model. I describe simple pictures of emoji and draw them.',
  },
  {
    questions: ['What can you do?', 'How can you help me?', 'What do you know?', 'Help.'],
    answer: 'I can describe a picture of emoji, answer questions about it and draw a new one.',
  },
  {
    questions: ['Hello.', 'Hi.', 'Good day.', 'Hello there.'],
    answer: 'Hello. Show me a picture of emoji, or tell me what to draw.',
    beside: 'Hello. What would you like to know?',
  },
  { questions: ['Thank you.', 'Thanks.', 'Very good.', 'Well done.'], answer: 'You are welcome.' },
  {
    questions: ['Are you a person?', 'Are you alive?', 'Do you feel?', 'Do you think?'],
    answer: 'No. I am a small demo model.',
  },
  {
    questions: [
      'Can you see photos?',
      'Can I show you a photo?',
      'Do you know real things?',
      'Can you see me?',
    ],
    answer: 'I only know drawn scenes of emoji. I will be wrong about photos.',
  },
  {
    questions: [
      'Tell me a story.',
      'What is the time?',
      'Who made the world?',
      'What should I eat?',
      'Write a poem.',
    ],
    answer: 'I do not know. I only know pictures of emoji.',
  },
]

/** The answer to a question about a picture where there is none. */
const NO_PICTURE = 'I see no picture. Please show me one.'

const DIRECTIONS = ['left', 'right', 'above', 'below'] as const
export type Direction = (typeof DIRECTIONS)[number]

const DIRECTION_WORDS: Record<Direction, string> = {
  left: 'to the left of',
  right: 'to the right of',
  above: 'above',
  below: 'below',
}
const OPPOSITE: Record<Direction, Direction> = {
  left: 'right',
  right: 'left',
  above: 'below',
  below: 'above',
}

const NUMBER_WORDS = ['none', 'one', 'two', 'three', 'four']

/** `a` or `an` in front of a name. */
export function withArticle(name: string): string {
  return `${/^([aeio]|umbrella|hourglass)/.test(name) ? 'an' : 'a'} ${name}`
}

function counted(kind: string, count: number): string {
  return count === 1 ? withArticle(kind) : `${NUMBER_WORDS[count]} ${kindOf(kind)!.plural}`
}

function listed(parts: readonly string[]): string {
  return parts.length < 2 ? parts.join('') : `${parts.slice(0, -1).join(', ')} and ${parts.at(-1)}`
}

const sentence = (text: string) => `${text[0]!.toUpperCase()}${text.slice(1)}.`

function fill(phrase: string, values: Readonly<Record<string, string>>): string {
  return phrase.replace(/\{(\w+)\}/g, (_, name: string) => values[name]!)
}

/** Something that stands in a picture: an object or a sign. */
interface Item {
  /** Its kind, or `sign`. */
  readonly name: string
  readonly x: number
  readonly y: number
  readonly text?: string
}

/** Objects and signs from left to right. */
function itemsOf({ objects, signs }: Scene): Item[] {
  const items: Item[] = [
    ...objects.map(({ kind, x, y }) => ({ name: kind, x, y })),
    ...signs.map(({ text, x, y }) => ({ name: 'sign', x, y, text })),
  ]
  return items.sort((a, b) => a.x - b.x)
}

/** How many there are of each kind, in the order in which the kinds first appear from left to right. */
function countsOf({ objects }: Scene): Map<string, number> {
  const counts = new Map<string, number>()
  for (const { kind } of objects) counts.set(kind, (counts.get(kind) ?? 0) + 1)
  return counts
}

/**
 * The caption of a scene: kinds and signs in the order of their first appearance from left to right, each kind once with
 * its number. `a fox, two boats and a sign that says 42 on a blue background`
 */
export function captionOf(scene: Scene): string {
  const counts = countsOf(scene)
  const parts: string[] = []
  for (const { name, text } of itemsOf(scene)) {
    if (text !== undefined) parts.push(`a sign that says ${text}`)
    else if (counts.has(name)) parts.push(counted(name, counts.get(name)!))
    counts.delete(name)
  }
  return `${listed(parts)} on ${withArticle(scene.background.colour)} background`
}

/** The prompt that draws a scene: its caption without signs, which are too small to be drawn. */
export function drawingPromptOf(scene: Scene): string {
  return captionOf({ ...scene, signs: [] })
}

function captionFacts(scene: Scene): Facts {
  const facts: Record<string, string> = { background: scene.background.colour }
  for (const [kind, count] of countsOf(scene)) facts[`object ${kind}`] = String(count)
  for (const { text } of scene.signs) facts[`sign ${text}`] = 'seen'
  return facts
}

/** How far `to` lies from `from` in a direction, and to the side of that. */
function offset(from: Item, to: Item, direction: Direction): { along: number; across: number } {
  const dx = to.x - from.x
  const dy = to.y - from.y
  const along = { left: -dx, right: dx, above: -dy, below: dy }[direction]
  return { along, across: Math.abs(direction === 'left' || direction === 'right' ? dy : dx) }
}

/** Nobody would doubt that `to` lies in that direction. */
function liesClearly(from: Item, to: Item, direction: Direction): boolean {
  const { along, across } = offset(from, to, direction)
  return along >= 0.08 && along >= 1.3 * across
}

/** Somebody might say that `to` lies in that direction. */
function mayLie(from: Item, to: Item, direction: Direction): boolean {
  const { along, across } = offset(from, to, direction)
  return along >= 0.02 && along >= 0.7 * across
}

const squaredDistance = (a: Item, b: Item) => (a.x - b.x) * (a.x - b.x) + (a.y - b.y) * (a.y - b.y)

/** All that may lie in a direction, the nearest first. */
function candidatesOf(items: readonly Item[], from: Item, direction: Direction): Item[] {
  return items
    .filter(item => item !== from && mayLie(from, item, direction))
    .sort((a, b) => squaredDistance(from, a) - squaredDistance(from, b))
}

/**
 * The nearest item in a direction; null if there is none; undefined if one could argue: the nearest that may lie there does
 * not lie there clearly, or another one is less than a quarter farther away.
 */
export function neighbourOf(
  items: readonly Item[],
  from: Item,
  direction: Direction,
): Item | null | undefined {
  const [nearest, next] = candidatesOf(items, from, direction)
  if (!nearest) return null
  if (!liesClearly(from, nearest, direction)) return undefined
  const margin = 1.25 * 1.25
  return next && squaredDistance(from, next) < margin * squaredDistance(from, nearest) ? undefined : nearest
}

/** A turn, and what `it` would mean in the next one. */
interface Asked {
  readonly turn: Turn
  readonly focus?: Item
}

const yesNo = (question: string, yes: boolean): Turn => ({
  task: 'yesno',
  question,
  answer: yes ? 'Yes.' : 'No.',
  facts: { answer: yes ? 'yes' : 'no' },
})

/** Items whose name stands for one thing only. */
function uniqueItems(items: readonly Item[]): Item[] {
  return items.filter(item => items.filter(other => other.name === item.name).length === 1)
}

/** A kind that the scene does not show. */
function absentKind(random: Random, ...scenes: readonly Scene[]): string {
  const shown = new Set(scenes.flatMap(({ objects }) => objects.map(({ kind }) => kind)))
  return random.pick(KINDS.filter(({ name }) => !shown.has(name))).name
}

/** The phrasings that suit two pictures: all but one that asks for a single text. */
const ABOUT_BOTH = [
  ...PHRASES.captionBoth,
  ...PHRASES.caption.filter(phrase => phrase !== 'Write a caption.'),
]

/** What is in each of two pictures. */
function askBoth(scenes: readonly [Scene, Scene], random: Random): Turn {
  const [first, second] = scenes.map(captionOf)
  return {
    task: 'caption',
    question: random.pick(ABOUT_BOTH),
    answer: `The first: ${first}; the second: ${second}.`,
    facts: bothFacts(scenes.map(captionFacts)),
  }
}

const ORDINALS = ['first', 'second'] as const

function bothFacts(facts: readonly Facts[]): Facts {
  const named = facts.flatMap((own, i) =>
    Object.entries(own).map(([key, value]) => [`${ORDINALS[i]} ${key}`, value]),
  )
  return Object.fromEntries(named)
}

/** A question on one picture, asked where there are two: "Is there a fox in the second picture?" */
function askedOfTwo({ turn }: Asked, which: 0 | 1): Turn {
  const { question } = turn
  const named = question.replace(/\b(?:the|this) (picture|image)\b/, `the ${ORDINALS[which]} $1`)
  const preposition = /(background|caption).$/.test(question) ? 'of' : 'in'
  const added = question.replace(/.$/, mark => ` ${preposition} the ${ORDINALS[which]} picture${mark}`)
  return { ...turn, question: named === question ? added : named }
}

/** A question on the first or the second of two pictures. */
function askOneOfTwo(scenes: readonly [Scene, Scene], random: Random): Turn | undefined {
  const which = random.chance(0.5) ? 1 : 0
  const scene = scenes[which]
  const asked = [
    () => askCaption(scene, random),
    () => askRelation(scene, random),
    () => askCount(scene, random),
    () => askBackground(scene, random),
    () => askSign(scene, random),
    () => askYesNo(scene, random),
  ][random.weighted([1, 4, 2, 1, 2, 3])]!()
  return asked && askedOfTwo(asked, which)
}

/** What is in one of two pictures, and then in the other. */
function oneByOne(scenes: readonly [Scene, Scene], random: Random): Turn[] {
  const which = random.chance(0.5) ? 1 : 0
  const other = which === 0 ? 1 : 0
  const { turn } = askCaption(scenes[other], random)
  const question = fill(random.pick(PHRASES.captionOther), { this: ORDINALS[other] })
  return [askedOfTwo(askCaption(scenes[which], random), which), { ...turn, question }]
}

function askCaption(scene: Scene, random: Random): Asked {
  const answer = sentence(captionOf(scene))
  return {
    turn: { task: 'caption', question: random.pick(PHRASES.caption), answer, facts: captionFacts(scene) },
  }
}

/**
 * The neighbour of something, asked by name, or as `it` after `focus`; `crowded`: only where another thing lies farther that
 * way. Undefined where every answer could be argued with.
 */
function askRelation(
  scene: Scene,
  random: Random,
  { focus, crowded = false }: { focus?: Item | undefined; crowded?: boolean } = {},
): Asked | undefined {
  const items = itemsOf(scene)
  const turn = (question: string, answer: string, fact: string): Turn => ({
    task: 'relation',
    question,
    answer,
    facts: { answer: fact },
  })
  if (!focus && !crowded && random.chance(0.06)) {
    const x = absentKind(random, scene)
    const question = fill(random.pick(PHRASES.relation), { d: DIRECTION_WORDS[random.pick(DIRECTIONS)], x })
    return { turn: turn(question, `There is no ${x}.`, 'absent') }
  }
  const from = focus ? items.filter(({ x, y }) => x === focus.x && y === focus.y) : uniqueItems(items)
  const pairs = from.flatMap(item => DIRECTIONS.map(direction => ({ item, direction })))
  const clear = pairs.flatMap(({ item, direction }) => {
    if (crowded && candidatesOf(items, item, direction).length < 2) return []
    const to = neighbourOf(items, item, direction)
    return to === undefined ? [] : [{ item, direction, to }]
  })
  const found = clear.filter(({ to }) => to !== null)
  // Where there is only one thing, nothing lies anywhere: asked now and then.
  if (found.length === 0 && !random.chance(0.25)) return undefined
  const choices = found.length > 0 && random.chance(0.88) ? found : clear.filter(({ to }) => to === null)
  if (choices.length === 0) return undefined
  const { item, direction, to } = random.pick(choices)
  const sideways = direction === 'left' || direction === 'right'
  const question = !focus
    ? fill(random.pick(PHRASES.relation), { d: DIRECTION_WORDS[direction], x: item.name })
    : sideways && random.chance(0.5)
      ? fill(random.pick(PHRASES.itsSide), { side: direction })
      : fill(random.pick(PHRASES.relationFollowUp), { d: DIRECTION_WORDS[direction] })
  if (to === null) return { turn: turn(question, 'Nothing.', 'nothing') }
  return { turn: turn(question, sentence(withArticle(to.name)), to.name), focus: to }
}

function askCount(scene: Scene, random: Random, followsUp = false): Asked {
  const counts = countsOf(scene)
  const turn = (question: string, count: number): Asked => ({
    turn: {
      task: 'count',
      question,
      answer: sentence(NUMBER_WORDS[count]!),
      facts: { count: String(count) },
    },
  })
  const ofKind = (kind: string, count: number) => {
    const phrases = followsUp ? PHRASES.countFollowUp : PHRASES.countKind
    return turn(fill(random.pick(phrases), { xs: kind === 'sign' ? 'signs' : kindOf(kind)!.plural }), count)
  }
  const choice = random.weighted([6, 8, 1, 1])
  if (choice === 0 && !followsUp) return turn(random.pick(PHRASES.countAll), scene.objects.length)
  if (choice === 2) return ofKind('sign', scene.signs.length)
  if (choice === 3) return ofKind(absentKind(random, scene), 0)
  const several = [...counts].filter(([, count]) => count > 1)
  const [kind, count] = random.pick(several.length > 0 && random.chance(0.7) ? several : [...counts])
  return ofKind(kind, count)
}

function askBackground({ background: { colour } }: Scene, random: Random, followsUp = false): Asked {
  const question = random.pick(followsUp ? PHRASES.backgroundFollowUp : PHRASES.background)
  return { turn: { task: 'background', question, answer: sentence(colour), facts: { background: colour } } }
}

/** Undefined, most of the time, where there is no sign. */
function askSign({ signs }: Scene, random: Random): Asked | undefined {
  if (signs.length === 0) {
    if (!random.chance(0.1)) return undefined
    const question = random.pick(PHRASES.sign)
    return { turn: { task: 'sign', question, answer: 'There is no sign.', facts: { answer: 'nothing' } } }
  }
  const facts = Object.fromEntries(signs.map(({ text }) => [`sign ${text}`, 'seen']))
  const question = random.pick(signs.length === 1 ? PHRASES.sign : PHRASES.signs)
  return { turn: { task: 'sign', question, answer: `${listed(signs.map(({ text }) => text))}.`, facts } }
}

const YES_NO = { present: 0, background: 1, related: 2, text: 3, count: 4 }

/** A question, of a random sort or of one of `YES_NO` where the scene has it, whose answer is `yes` as often as `no`. */
function askYesNo(scene: Scene, random: Random, only?: number): Asked | undefined {
  const yes = random.chance(0.5)
  const items = itemsOf(scene)
  const counts = countsOf(scene)
  const several = [...counts].filter(([, count]) => count > 1)
  const single = uniqueItems(items)
  const related = single.flatMap(a =>
    single.flatMap(b => DIRECTIONS.filter(d => a !== b && liesClearly(b, a, d)).map(d => ({ a, b, d }))),
  )
  const sorts = [
    4, // is it there
    2, // is that the background
    related.length > 0 ? 4 : 0,
    scene.signs.length === 1 ? 2 : 0,
    several.length > 0 ? 3 : 0, // are there so many
  ]
  if (only !== undefined && sorts[only] === 0) return undefined
  switch (only ?? random.weighted(sorts)) {
    case YES_NO.present: {
      const object = random.pick(scene.objects)
      const kind = yes ? object.kind : absentKind(random, scene)
      const turn = yesNo(fill(random.pick(PHRASES.present), { a: withArticle(kind) }), yes)
      return yes && counts.get(kind) === 1
        ? { turn, focus: { name: kind, x: object.x, y: object.y } }
        : { turn }
    }
    case YES_NO.background: {
      const { colour } = scene.background
      const c = yes ? colour : random.pick(COLOUR_NAMES.filter(name => name !== colour))
      return { turn: yesNo(fill(random.pick(PHRASES.isBackground), { c }), yes) }
    }
    case YES_NO.related: {
      const { a, b, d } = random.pick(related)
      const direction = DIRECTION_WORDS[yes ? d : OPPOSITE[d]]
      const question = fill(random.pick(PHRASES.isRelated), { x: a.name, y: b.name, d: direction })
      return { turn: yesNo(question, yes) }
    }
    case YES_NO.text: {
      const { text } = scene.signs[0]!
      const asked = yes ? text : alteredText(text, random)
      return { turn: yesNo(fill(random.pick(PHRASES.saysText), { text: asked }), yes) }
    }
    default: {
      const [kind, count] = random.pick(several)
      const asked = yes ? count : random.pick([2, 3, 4].filter(other => other !== count))
      const values = { n: NUMBER_WORDS[asked]!, xs: kindOf(kind)!.plural }
      return { turn: yesNo(fill(random.pick(PHRASES.hasCount), values), yes) }
    }
  }
}

/** Another text of the same length and sort: one character is changed. */
function alteredText(text: string, random: Random): string {
  const at = random.below(text.length)
  const alike = GLYPHS.filter(glyph => /\d/.test(glyph) === /\d/.test(text[at]!) && glyph !== text[at])
  const first = at === 0 && text.length > 1 ? alike.filter(glyph => glyph !== '0') : alike
  return text.slice(0, at) + random.pick(first) + text.slice(at + 1)
}

/** Two to four questions on one picture; where there is something to refer to, half of them do. */
function chain(scene: Scene, random: Random): Turn[] {
  const turns: Turn[] = []
  let focus: Item | undefined
  for (const length = 2 + random.below(3); turns.length < length; ) {
    const followsUp = turns.length > 0
    const asked =
      (focus && random.chance(0.6) ? askRelation(scene, random, { focus }) : undefined) ??
      [
        () => (followsUp ? undefined : askCaption(scene, random)),
        () => askRelation(scene, random),
        () => askCount(scene, random, followsUp && turns.at(-1)!.task === 'count'),
        () => askBackground(scene, random, followsUp),
        () => askSign(scene, random),
        () => askYesNo(scene, random),
      ][random.weighted([1, turns.some(({ task }) => task === 'relation') ? 1 : 4, 2, 1, 1, 3])]!()
    if (!asked || wasAsked(turns, asked.turn)) continue
    turns.push(asked.turn)
    focus = asked.focus
  }
  return turns
}

/** A question on two pictures. */
function compare(first: Scene, second: Scene, random: Random): Turn {
  switch (random.below(4)) {
    case 0: {
      const same = first.background.colour === second.background.colour
      return yesNo(random.pick(PHRASES.sameBackground), same)
    }
    case 1: {
      const kinds = [first, second].map(scene => new Set(scene.objects.map(({ kind }) => kind)))
      const where = (kind: string) =>
        kinds[0]!.has(kind)
          ? kinds[1]!.has(kind)
            ? 'both'
            : 'first'
          : kinds[1]!.has(kind)
            ? 'second'
            : 'neither'
      const shown = [...new Set([...kinds[0]!, ...kinds[1]!])]
      const kind = random.chance(0.15) ? absentKind(random, first, second) : random.pick(shown)
      const answer = where(kind)
      return {
        task: 'which',
        question: fill(random.pick(PHRASES.which), { a: withArticle(kind) }),
        answer: sentence(answer === 'first' || answer === 'second' ? `the ${answer}` : answer),
        facts: { answer },
      }
    }
    default: {
      const [has, lacks, names] = random.chance(0.5)
        ? [second, first, { this: 'second', that: 'first' }]
        : [first, second, { this: 'first', that: 'second' }]
      const other = countsOf(lacks)
      const only = [...countsOf(has)].filter(([kind]) => !other.has(kind))
      return {
        task: 'difference',
        question: fill(random.pick(PHRASES.difference), names),
        answer: sentence(
          only.length > 0 ? listed(only.map(([kind, count]) => counted(kind, count))) : 'none',
        ),
        facts:
          only.length > 0
            ? Object.fromEntries(only.map(([kind, count]) => [`object ${kind}`, String(count)]))
            : { answer: 'nothing' },
      }
    }
  }
}

/** A request for a drawing of a scene. The answer is the prompt between `<h>` and `</h>`. */
export function drawingTurn(scene: Scene, random: Random): Turn {
  const kinds = [...countsOf(scene)].map(([kind, count]) => counted(kind, count))
  const list =
    kinds.length === 2 ? fill(random.pick(PHRASES.drawPair), { a: kinds[0]!, b: kinds[1]! }) : listed(kinds)
  const filled = fill(random.pick(PHRASES.draw), { list, c: scene.background.colour })
  return drawn(scene, filled[0]!.toUpperCase() + filled.slice(1))
}

function drawn(scene: Scene, question: string): Turn {
  const answer = `<h>${drawingPromptOf(scene)}</h>`
  return { task: 'draw', question, answer, facts: captionFacts({ ...scene, signs: [] }) }
}

/** Small talk, with pictures in the conversation or without any. */
function talk(random: Random, pictures: readonly number[]): Turn {
  const turn = (question: string, answer: string): Turn => ({ task: 'talk', question, answer, facts: {} })
  if (pictures.length === 0 && random.chance(0.15)) {
    const about = [PHRASES.caption, PHRASES.background, PHRASES.countAll, PHRASES.sign]
    return turn(random.pick(random.pick(about)), NO_PICTURE)
  }
  const { questions, answer, beside = answer } = random.pick(TALK)
  return turn(random.pick(questions), pictures.length > 0 ? beside : answer)
}

/** The scene of a seed, a second one that shares some of it, one to be drawn, and examples of every task about them. */
export interface Lesson {
  /** [0] `generateScene(seed)`, [1] the one to compare it with, [2] one of `DRAWN_WORLD`. */
  readonly scenes: readonly [Scene, Scene, Scene]
  readonly examples: readonly Example[]
}

/** Everything that is taught or asked about a seed: the same for the same seed and options, on every machine. */
export function generateLesson(seed: number, options: Partial<WorldOptions> = {}): Lesson {
  const random = new Random(seed, 'lesson')
  const scene = generateScene(seed, options)
  const kinds = [...new Set(scene.objects.map(({ kind }) => kind))]
  const second = generateScene(seed, {
    ...options,
    variant: 'second ',
    include: random.shuffle(kinds).slice(0, random.below(Math.min(kinds.length, 2) + 1)),
    ...(random.chance(0.4) ? { colours: [scene.background.colour] } : {}),
  })
  const drawing = generateScene(seed, { ...DRAWN_WORLD, variant: 'drawn ' })

  const one = (asked: Asked | undefined): Example[] => (asked ? [{ pictures: [0], turns: [asked.turn] }] : [])
  const examples = [
    ...one(askCaption(scene, random)),
    ...one(askRelation(scene, random)),
    ...one(askCount(scene, random)),
    ...one(askBackground(scene, random)),
    ...one(askSign(scene, random)),
    ...one(askYesNo(scene, random)),
    { pictures: [0], turns: chain(scene, random) },
    { pictures: [0, 1], turns: [compare(scene, second, random)] },
    { pictures: [], turns: [drawingTurn(drawing, random)] },
    ...(random.chance(0.1) ? [{ pictures: [0], turns: [drawn(scene, random.pick(PHRASES.drawAgain))] }] : []),
    ...(random.chance(0.3)
      ? [{ pictures: [], turns: distinct(1 + random.below(3), () => talk(random, [])) }]
      : []),
    ...aside([0], drawing, random, askYesNo(scene, random)?.turn),
    ...ofTwo([scene, second], random),
    ...aside([0, 1], drawing, random, compare(scene, second, random)),
  ]
  return { scenes: [scene, second, drawing], examples }
}

/** Now and then, what is not about the pictures that are there: small talk or a drawing, before or after a question on them. */
function aside(pictures: readonly number[], drawing: Scene, random: Random, question?: Turn): Example[] {
  if (!random.chance(0.3)) return []
  const turn = random.chance(0.7) ? talk(random, pictures) : drawingTurn(drawing, random)
  if (!question || random.chance(0.4)) return [{ pictures, turns: [turn] }]
  return [{ pictures, turns: random.chance(0.5) ? [turn, question] : [question, turn] }]
}

/** Now and then, two pictures described or one of them asked about. */
function ofTwo(scenes: readonly [Scene, Scene], random: Random): Example[] {
  const pictures = [0, 1]
  const asked = askOneOfTwo(scenes, random)
  return [
    ...(random.chance(0.2) ? [{ pictures, turns: [askBoth(scenes, random)] }] : []),
    ...(random.chance(0.2) ? [{ pictures, turns: oneByOne(scenes, random) }] : []),
    ...(asked && random.chance(0.5) ? [{ pictures, turns: [asked] }] : []),
  ]
}

/**
 * More questions on the first two scenes of a lesson, for training: conversations of one sort of question each, up to `each`
 * turns long, captions, what signs say, and small talk and drawings beside them. To find in a picture what a question
 * names, or to compare places, is learnt from many such questions at once within minutes, and from those of lessons, among all
 * others, hardly ever.
 */
export function drillsOf({ scenes: [first, second, drawing] }: Lesson, seed: number, each = 10): Example[] {
  const random = new Random(seed, 'drills')
  const several = (pictures: readonly number[], turns: readonly Turn[]): Example[] =>
    turns.length > 0 ? [{ pictures, turns }] : []
  const drill = (pictures: readonly number[], ask: () => Turn | undefined): Example[] =>
    several(pictures, distinct(each, ask))
  return [
    ...[first, second].flatMap((scene, picture) => [
      { pictures: [picture], turns: presence(scene, random) },
      ...drill([picture], () => askYesNo(scene, random)?.turn),
      ...drill([picture], () => askYesNo(scene, random, YES_NO.related)?.turn),
      ...drill([picture], () => askRelation(scene, random, { crowded: random.chance(0.7) })?.turn),
      ...drill([picture], () => askCount(scene, random).turn),
    ]),
    ...drill([0, 1], () => compare(first, second, random)),
    ...[first, second].flatMap((scene, picture) => [
      { pictures: [picture], turns: [askCaption(scene, random).turn] },
      ...(scene.signs.length > 0 ? [{ pictures: [picture], turns: [askSign(scene, random)!.turn] }] : []),
      ...several([picture], walk(scene, random, each)),
    ]),
    ...drill([0, 1], () => askOneOfTwo([first, second], random)),
    { pictures: [0, 1], turns: [askBoth([first, second], random)] },
    { pictures: [0, 1], turns: oneByOne([first, second], random) },
    ...[[0], [1], [0, 1]].flatMap(pictures => [
      { pictures, turns: [talk(random, pictures)] },
      { pictures, turns: [drawingTurn(drawing, random)] },
    ]),
    ...drill([], () => talk(random, [])),
  ]
}

/** What is next to something, what is next to that, and so on. */
function walk(scene: Scene, random: Random, most: number): Turn[] {
  const turns: Turn[] = []
  let focus: Item | undefined
  for (let tries = 0; tries < 2 * most && turns.length < most; tries++) {
    const asked = askRelation(scene, random, { focus })
    if (asked && wasAsked(turns, asked.turn)) continue
    focus = asked?.focus
    if (asked) turns.push(asked.turn)
  }
  return turns
}

/** Whether kinds are there: all that are, and as many others. */
function presence(scene: Scene, random: Random): Turn[] {
  const there = [...countsOf(scene).keys()]
  const absent = new Set(there.map(() => absentKind(random, scene)))
  return random
    .shuffle([...there, ...absent])
    .map(kind => yesNo(fill(random.pick(PHRASES.present), { a: withArticle(kind) }), !absent.has(kind)))
}

/** Up to `count` turns, no question twice. */
function distinct(count: number, ask: () => Turn | undefined): Turn[] {
  const turns: Turn[] = []
  for (let tries = 0; tries < 2 * count && turns.length < count; tries++) {
    const turn = ask()
    if (turn && !wasAsked(turns, turn)) turns.push(turn)
  }
  return turns
}

function wasAsked(turns: readonly Turn[], { question }: Turn): boolean {
  return turns.some(turn => turn.question === question)
}

export interface Score {
  /** The answer is the expected one, apart from white space. */
  readonly exact: boolean
  /** Facts that are right, of all that were expected or claimed. */
  readonly right: number
  readonly total: number
}

/** Compares a model's answer with the expected one. */
export function scoreAnswer({ task, answer, facts }: Turn, text: string): Score {
  const plain = (words: string) => words.trim().replace(/\s+/g, ' ')
  const claimed = readFacts(task, text)
  const keys = new Set([...Object.keys(facts), ...Object.keys(claimed)])
  const right = [...keys].filter(key => facts[key] === claimed[key]).length
  return { exact: plain(text) === plain(answer), right, total: keys.size }
}

const NAMES = new Map(KINDS.flatMap(({ name, plural }) => [[name, name] as const, [plural, name] as const]))
const NAME_PATTERN = [...NAMES.keys()].join('|')
const COUNTED = new RegExp(`\\b(an?|one|two|three|four) (${NAME_PATTERN})\\b`, 'gi')
const COLOURED = new RegExp(`\\bon an? (${COLOUR_NAMES.join('|')}) background\\b`, 'i')
const COLOUR = new RegExp(`\\b(${COLOUR_NAMES.join('|')})\\b`, 'i')

/** What an answer to a task claims. Nothing that it does not say, and nothing where it says nothing readable. */
export function readFacts(task: Task, text: string): Facts {
  const words = text.replace(/\s+/g, ' ')
  const answer = (...patterns: readonly (readonly [RegExp, string])[]): Facts => {
    const found = patterns.find(([pattern]) => pattern.test(words))
    return found ? { answer: found[1] } : {}
  }
  switch (task) {
    case 'caption': {
      const [, ...both] = /^\W*the first: (.*); the second: (.*)$/i.exec(words) ?? []
      return both.length > 0 ? bothFacts(both.map(sceneFacts)) : sceneFacts(words)
    }
    case 'draw':
      return sceneFacts(words)
    case 'difference':
      return /^ ?none\b/i.test(words) ? { answer: 'nothing' } : objectFacts(words)
    case 'relation': {
      const [, , name] = words.matchAll(COUNTED).next().value ?? []
      if (name) return { answer: NAMES.get(name.toLowerCase())! }
      return answer([/\ba sign\b/i, 'sign'], [/\bnothing\b/i, 'nothing'], [/\bthere is no\b/i, 'absent'])
    }
    case 'count': {
      const found = /\b(none|one|two|three|four|[0-4])\b/i.exec(words)?.[1]?.toLowerCase()
      if (found === undefined) return {}
      return { count: /\d/.test(found) ? found : String(NUMBER_WORDS.indexOf(found)) }
    }
    case 'background': {
      const colour = COLOUR.exec(words)?.[1]?.toLowerCase()
      return colour ? { background: colour } : {}
    }
    case 'sign': {
      if (/\bno sign\b/i.test(words)) return { answer: 'nothing' }
      return Object.fromEntries(
        [...words.matchAll(/\b([A-Z]{2,4}|\d{1,4})\b/g)].map(([said]) => [`sign ${said}`, 'seen']),
      )
    }
    case 'yesno':
      return answer([/^ ?yes\b/i, 'yes'], [/^ ?no\b/i, 'no'])
    case 'which':
      return answer(
        [/\bboth\b/i, 'both'],
        [/\bneither\b/i, 'neither'],
        [/\bfirst\b/i, 'first'],
        [/\bsecond\b/i, 'second'],
      )
    case 'talk':
      return {}
  }
}

/** What a caption claims. */
function sceneFacts(words: string): Facts {
  const colour = COLOURED.exec(words)?.[1]?.toLowerCase()
  const signs = [...words.matchAll(/\bsign that says ([A-Z]{2,4}|\d{1,4})\b/g)].map(([, said]) => [
    `sign ${said}`,
    'seen',
  ])
  return {
    ...objectFacts(words),
    ...Object.fromEntries(signs),
    ...(colour ? { background: colour } : {}),
  }
}

/** How many of each kind are named: "a fox, a boat and a fox" are two foxes. */
function objectFacts(words: string): Facts {
  const facts: Record<string, string> = {}
  for (const [, number, name] of words.matchAll(COUNTED)) {
    const key = `object ${NAMES.get(name!.toLowerCase())}`
    const count = Math.max(1, NUMBER_WORDS.indexOf(number!.toLowerCase()))
    facts[key] = String(Number(facts[key] ?? 0) + count)
  }
  return facts
}

/** Cuts a text into the words of `VOCABULARY`; what signs say is spelled. */
export function splitWords(text: string): string[] {
  const words = text.match(/<\/?h>|<GEN>|[A-Za-z]+|[^\sA-Za-z]/g) ?? []
  return words.flatMap(word => (/^[A-Z]{2,}$/.test(word) ? [...word] : [word]))
}

/** Every word and mark that occurs in questions and answers, sorted; letters and digits of signs one by one. */
export const VOCABULARY: readonly string[] = vocabulary()

function vocabulary(): string[] {
  const nouns = KINDS.flatMap(({ name, plural }) => [name, plural])
  const inside = [...COLOUR_NAMES, ...NUMBER_WORDS.slice(1)]
  const alone = [...inside, 'none', 'nothing', 'both', 'neither', 'the first', 'the second', 'yes', 'no']
  const texts = [
    ...Object.values(PHRASES).flat(),
    ...TALK.flatMap(({ questions, answer, beside = answer }) => [...questions, answer, beside]),
    NO_PICTURE,
    ...nouns,
    ...inside,
    ...alone.map(sentence),
    ...Object.values(DIRECTION_WORDS),
    'A An a an There is no sign, and signs that says. on background in picture The first: the second; left right first second <h> </h> <GEN>',
  ]
  const words = texts.flatMap(text => splitWords(text.replace(/\{\w+\}/g, ' ')))
  return [...new Set([...words, ...GLYPHS])].sort()
}
