import { createHash } from 'node:crypto'
import { describe, expect, it } from 'vitest'
import { COLOUR_NAMES } from '../../lib/demo/colours.ts'
import { KINDS } from '../../lib/demo/kinds.ts'
import type { Scene } from '../../lib/demo/scene.ts'
import {
  captionOf,
  drawingPromptOf,
  drillsOf,
  type Example,
  generateLesson,
  type Lesson,
  messagesOf,
  readFacts,
  scoreAnswer,
  splitWords,
  TASKS,
  type Turn,
  VOCABULARY,
  withArticle,
} from '../../lib/demo/tasks.ts'
import { heldOutPairs, sceneSeed } from '../../lib/demo/world.ts'
import { imagePromptOf } from '../../lib/processing/image-prompt.ts'

const seeds = Array.from({ length: 1200 }, (_, i) => sceneSeed('train', i))
const lessons = seeds.map(seed => generateLesson(seed))
const drills = lessons.map((lesson, i) => drillsOf(lesson, seeds[i]!))

const turns = lessons.flatMap((lesson, k) =>
  [...lesson.examples, ...drills[k]!].flatMap(example =>
    example.turns.map((turn, i) => ({ lesson, example, turn, i })),
  ),
)
const turnsOf = (task: Turn['task']) => turns.filter(({ turn }) => turn.task === task)

interface At {
  readonly lesson: Lesson
  readonly example: Example
  readonly turn: Turn
  readonly i: number
}

/** The scenes that a question is about: of two the one that it names, but where it compares them. */
function pictured({ lesson, example, turn }: At): Scene[] {
  const scenes = example.pictures.map(picture => lesson.scenes[picture]!)
  const named = ['difference', 'which'].includes(turn.task) ? null : /\b(first|second)\b/.exec(turn.question)
  return named ? [scenes[['first', 'second'].indexOf(named[0])]!] : scenes
}

const scene: Scene = {
  version: 1,
  background: { colour: 'blue', pattern: 'plain', repeat: 5, shade: 0 },
  objects: [object('boat', 0.2, 0.2), object('fox', 0.4, 0.8), object('boat', 0.8, 0.25)],
  signs: [
    { text: '42', font: 'plain', colour: 'black', x: 0.6, y: 0.5, size: 0.02, plate: null, post: false },
  ],
}

function object(kind: string, x: number, y: number) {
  return { kind, style: 'noto', x, y, size: 0.2, rotation: 0, flip: false } as const
}

describe('captions', () => {
  it('name kinds once, with their number, and signs, from left to right', () => {
    expect(captionOf(scene)).toBe('two boats, a fox and a sign that says 42 on a blue background')
    expect(drawingPromptOf(scene)).toBe('two boats and a fox on a blue background')
    const orange = { ...scene, objects: [object('umbrella', 0.5, 0.5)], signs: [] }
    expect(captionOf({ ...orange, background: { ...scene.background, colour: 'orange' } })).toBe(
      'an umbrella on an orange background',
    )
  })

  it('take the article that is spoken', () => {
    expect(['unicorn', 'ufo', 'owl', 'hourglass', 'house', 'ice cream'].map(withArticle)).toEqual([
      'a unicorn',
      'a ufo',
      'an owl',
      'an hourglass',
      'a house',
      'an ice cream',
    ])
    const odd = KINDS.map(({ name }) => withArticle(name)).filter(name => /^a u|^an h/.test(name))
    expect(odd).toEqual(['an hourglass', 'a ufo', 'a unicorn'])
  })
})

describe('lessons', () => {
  it('are the same for a seed on every machine', () => {
    const hash = createHash('sha256').update(JSON.stringify(lessons.slice(0, 30)))
    expect(hash.digest('hex').slice(0, 16)).toBe('7ae2297a2f3823a2')
  })

  it('teach every task', () => {
    for (const task of TASKS) expect(turnsOf(task).length, task).toBeGreaterThan(100)
  })

  it('are drilled on both scenes, on the two together and on none, no question twice', () => {
    for (const [i, examples] of drills.entries()) {
      expect(examples).toEqual(drillsOf(lessons[i]!, seeds[i]!))
      expect(new Set(examples.map(({ pictures }) => pictures.join()))).toEqual(new Set(['0', '1', '0,1', '']))
      for (const { turns } of examples) {
        expect(turns.length).toBeGreaterThan(0)
        expect(new Set(turns.map(({ question }) => question)).size).toBe(turns.length)
      }
    }
  })

  it('show no held-out pair in training, in none of their scenes', () => {
    for (const { scenes } of lessons) for (const shown of scenes) expect(heldOutPairs(shown)).toEqual([])
  })

  it('use the words of the vocabulary, all of them', () => {
    const used = new Set(turns.flatMap(({ turn }) => splitWords(`${turn.question} ${turn.answer}`)))
    const known = new Set(VOCABULARY)
    expect([...used].filter(word => !known.has(word))).toEqual([])
    expect(VOCABULARY.filter(word => !used.has(word) && word !== '<GEN>')).toEqual([])
    expect(VOCABULARY.length).toBeLessThan(700)
  })

  it('become messages, with <GEN> as a mark on the request', () => {
    const { example } = turns.find(({ example }) => example.turns.length > 2)!
    const messages = messagesOf(example, 1)
    expect(messages.map(({ role }) => role)).toEqual(['user', 'assistant', 'user'])
    expect(messages.map(({ content }) => content)).toEqual([
      example.turns[0]!.question,
      example.turns[0]!.answer,
      example.turns[1]!.question,
    ])
    expect(messagesOf(turnsOf('draw')[0]!.example)).toMatchObject([{ role: 'user', gen: true }])
  })

  it('talk and draw beside pictures, at the start and later', () => {
    const places = (task: Turn['task']) =>
      new Set(
        turnsOf(task)
          .filter(({ example }) => example.pictures.length > 0)
          .map(({ example, i }) => `${example.pictures.length} pictures, turn ${i}`),
      )
    const everywhere = [1, 2].flatMap(count => [0, 1].map(i => `${count} pictures, turn ${i}`))
    expect(places('talk')).toEqual(new Set(everywhere))
    expect(places('draw')).toEqual(new Set(everywhere))
    const answers = turnsOf('talk').filter(({ example }) => example.pictures.length > 0)
    expect(answers.filter(({ turn }) => /see no picture|show me a picture/i.test(turn.answer))).toEqual([])
  })

  it('ask about one of two pictures by its number, and only then', () => {
    for (const { turn, example } of turns) {
      const named = turn.question.match(/\b(first|second)\b/g) ?? []
      if (turn.task === 'difference') expect(named.length, turn.question).toBeGreaterThan(0)
      else expect(named.length, turn.question).toBeLessThan(example.pictures.length === 2 ? 2 : 1)
      if (['relation', 'count', 'background', 'sign'].includes(turn.task) && example.pictures.length === 2)
        expect(named.length, turn.question).toBe(1)
    }
  })

  it('answer yes as often as no', () => {
    const yesno = turnsOf('yesno').filter(
      ({ lesson, example }) => example.pictures.length === 1 && lesson.examples.includes(example),
    )
    const yes = yesno.filter(({ turn }) => turn.facts.answer === 'yes').length
    // Five standard deviations of a fair coin.
    expect(Math.abs(yes - yesno.length / 2)).toBeLessThan((5 * Math.sqrt(yesno.length)) / 2)
  })
})

// Answers are checked here from the scene, by other means than those that wrote them.
describe('answers are true', () => {
  it('captions', () => {
    for (const at of turnsOf('caption')) {
      const [shown, second] = pictured(at)
      const facts = second
        ? { ...under('first', factsOf(shown!)), ...under('second', factsOf(second)) }
        : factsOf(shown!)
      expect(at.turn.facts, at.turn.question).toEqual(facts)
    }
  })

  it('counts', () => {
    for (const at of turnsOf('count')) {
      const [{ objects, signs }] = pictured(at) as [Scene]
      const truth = /\bemoji\b/.test(at.turn.question)
        ? objects.length
        : /\bsigns\b/.test(at.turn.question)
          ? signs.length
          : objects.filter(({ kind }) => kind === nameIn(at.turn.question)).length
      expect(at.turn.answer, at.turn.question).toBe(['None.', 'One.', 'Two.', 'Three.', 'Four.'][truth])
    }
  })

  it('neighbours lie within 40 degrees of the direction, and all else within 45 degrees is a quarter farther', () => {
    let checked = 0
    for (const at of turnsOf('relation')) {
      const [shown] = pictured(at) as [Scene]
      const { question, answer, facts } = at.turn
      if (/\bits?\b/.test(question) && !question.startsWith('Look at')) continue
      const from = nameIn(question)
      const things = thingsOf(shown)
      if (facts.answer === 'absent') {
        expect(things.some(({ name }) => name === from)).toBe(false)
        expect(answer).toBe(`There is no ${from}.`)
        continue
      }
      const [origin, ...same] = things.filter(({ name }) => name === from)
      expect(same).toEqual([])
      const towards = seen(things, origin!, question)
      const near = towards.filter(({ angle }) => angle <= 45)
      if (facts.answer === 'nothing') expect(near, question).toEqual([])
      else {
        expect(near[0]!.name).toBe(facts.answer)
        expect(near[0]!.angle).toBeLessThan(40)
        const next = near[1]?.distance ?? 2
        expect(next).toBeGreaterThanOrEqual(1.25 * near[0]!.distance - 1e-9)
        checked += 1
      }
    }
    expect(checked).toBeGreaterThan(500)
  })

  it('follow-ups speak of what was answered last', () => {
    let checked = 0
    for (const at of turnsOf('relation')) {
      const before = at.example.turns[at.i - 1]
      if (!/\bits?\b/.test(at.turn.question) || at.turn.question.startsWith('Look at')) continue
      const [shown] = pictured(at) as [Scene]
      const things = thingsOf(shown)
      expect(['relation', 'yesno']).toContain(before!.task)
      const meant = before!.task === 'relation' ? before!.facts.answer : nameIn(before!.question)
      const candidates = things.filter(({ name }) => name === meant)
      expect(candidates.length).toBeGreaterThan(0)
      const answers = candidates.map(
        origin => seen(things, origin, at.turn.question).find(({ angle }) => angle <= 45)?.name ?? 'nothing',
      )
      expect(answers).toContain(at.turn.facts.answer)
      checked += 1
    }
    expect(checked).toBeGreaterThan(300)
  })

  it('backgrounds and signs', () => {
    for (const at of turnsOf('background'))
      expect(at.turn.answer.toLowerCase()).toBe(`${pictured(at)[0]!.background.colour}.`)
    for (const at of turnsOf('sign')) {
      const texts = pictured(at)[0]!.signs.map(({ text }) => text)
      expect(at.turn.answer).toBe(texts.length === 0 ? 'There is no sign.' : `${texts.join(' and ')}.`)
    }
  })

  it('yes and no', () => {
    for (const at of turnsOf('yesno')) {
      const [shown, second] = pictured(at) as [Scene, Scene?]
      expect(at.turn.answer, at.turn.question).toBe(isTrue(at.turn.question, shown, second) ? 'Yes.' : 'No.')
    }
  })

  it('comparisons', () => {
    for (const at of turnsOf('difference')) {
      const [first, second] = pictured(at).map(({ objects }) => objects.map(({ kind }) => kind))
      const wanted = /(first|second)/.exec(at.turn.question)![1]
      const [has, lacks] = wanted === 'first' ? [first!, second!] : [second!, first!]
      const only = has.filter(kind => !lacks.includes(kind))
      const claimed = Object.entries(at.turn.facts).flatMap(([key, count]) =>
        key === 'answer' ? [] : Array<string>(Number(count)).fill(key.slice('object '.length)),
      )
      expect(claimed.sort()).toEqual(only.sort())
    }
    for (const at of turnsOf('which')) {
      const kind = nameIn(at.turn.question)
      const [first, second] = pictured(at).map(({ objects }) => objects.some(object => object.kind === kind))
      const truth = first ? (second ? 'Both.' : 'The first.') : second ? 'The second.' : 'Neither.'
      expect(at.turn.answer).toBe(truth)
    }
  })

  it('drawings: what was asked for is what the prompt says', () => {
    for (const at of turnsOf('draw')) {
      const { prompt } = imagePromptOf(at.turn.answer)
      const isCopy = /\b(this|same)\b/.test(at.turn.question)
      const drawnScene = isCopy ? pictured(at)[0]! : at.lesson.scenes[2]
      expect(readFacts('caption', prompt!)).toEqual({ ...factsOf({ ...drawnScene, signs: [] }) })
      if (isCopy) continue
      const words = at.turn.question.replace(/^[A-Z]/, letter => letter.toLowerCase())
      const asked = readFacts('caption', words)
      expect({
        ...asked,
        background: COLOUR_NAMES.find(name => at.turn.question.includes(` ${name}`)),
      }).toEqual(at.turn.facts)
    }
  })
})

describe('scores', () => {
  it('are full for every expected answer', () => {
    for (const { turn } of turns) {
      const { exact, right, total } = scoreAnswer(turn, turn.answer)
      expect(exact && right === total && (total > 0 || turn.task === 'talk'), turn.answer).toBe(true)
    }
  })

  it('are not full for the answer to another question', () => {
    for (const [i, { turn }] of turns.entries()) {
      const other = turns[(i * 7919 + 13) % turns.length]!.turn
      if (other.answer === turn.answer) continue
      const { exact, right, total } = scoreAnswer(turn, other.answer)
      expect(exact).toBe(false)
      const sameFacts =
        JSON.stringify(readFacts(turn.task, other.answer)) ===
        JSON.stringify(readFacts(turn.task, turn.answer))
      if (turn.task !== 'talk' && !sameFacts)
        expect(right, `${turn.answer} ${other.answer}`).toBeLessThan(total)
    }
  })

  const turn = (task: Turn['task'], answer: string, facts: Turn['facts']): Turn => ({
    task,
    question: '',
    answer,
    facts,
  })
  const caption = turn(
    'caption',
    'Two boats, a fox and a sign that says 42 on a blue background.',
    factsOf(scene),
  )

  it.each([
    ['Two boats, a fox and a sign that says 42 on a red background.', 3, 4],
    ['A boat, a fox and a sign that says 42 on a blue background.', 3, 4],
    ['Two boats, a palm tree and a sign that says 42 on a blue background.', 3, 5],
    ['Two boats, a fox and a sign that says 43 on a blue background.', 3, 5],
    ['A fox, two boats and a sign that says 42 on a blue background.', 4, 4],
    ['boats fox 42 blue', 0, 4],
    ['', 0, 4],
  ])('count facts: %j', (text, right, total) => {
    expect(scoreAnswer(caption, text)).toEqual({ exact: false, right, total })
  })

  it('read what is claimed, whatever the task', () => {
    expect(readFacts('relation', 'A palm tree.')).toEqual({ answer: 'palm tree' })
    expect(readFacts('difference', 'A palm tree and two trees.')).toEqual({
      'object palm tree': '1',
      'object tree': '2',
    })
    expect(readFacts('difference', 'A fox, two boats and a fox.')).toEqual({
      'object fox': '2',
      'object boat': '2',
    })
    expect(readFacts('relation', 'There is no fox.')).toEqual({ answer: 'absent' })
    expect(
      readFacts(
        'caption',
        'The first: a fox and a sign that says GO on a red background; the second: two boats.',
      ),
    ).toEqual({
      'first object fox': '1',
      'first sign GO': 'seen',
      'first background': 'red',
      'second object boat': '2',
    })
    expect(readFacts('sign', 'GO and 42.')).toEqual({ 'sign GO': 'seen', 'sign 42': 'seen' })
    expect(readFacts('count', '3')).toEqual({ count: '3' })
    expect(readFacts('yesno', 'Nothing')).toEqual({})
  })
})

/** What is true of a scene, as facts. */
function factsOf({ objects, signs, background }: Scene): Record<string, string> {
  const facts: Record<string, string> = { background: background.colour }
  for (const { kind } of objects) facts[`object ${kind}`] = String(Number(facts[`object ${kind}`] ?? 0) + 1)
  for (const { text } of signs) facts[`sign ${text}`] = 'seen'
  return facts
}

function under(name: string, facts: Readonly<Record<string, string>>): Record<string, string> {
  return Object.fromEntries(Object.entries(facts).map(([key, value]) => [`${name} ${key}`, value]))
}

const WORDS = KINDS.flatMap(({ name, plural }) =>
  [name, plural].map(word => ({ name, word, pattern: new RegExp(`\\b${word}\\b`) })),
)

/** The kind that a text names first, in singular or plural, the longer one of two; else `sign`. */
function nameIn(text: string): string {
  const named = WORDS.map(({ name, word, pattern }) => ({ name, word, at: text.search(pattern) }))
  const [found] = named
    .filter(({ at }) => at >= 0)
    .sort((a, b) => a.at - b.at || b.word.length - a.word.length)
  return found?.name ?? 'sign'
}

const thingsOf = ({ objects, signs }: Scene) => [
  ...objects.map(({ kind, x, y }) => ({ name: kind, x, y })),
  ...signs.map(({ x, y }) => ({ name: 'sign', x, y })),
]

/** Everything else, the nearest first, with its angle to the direction that a question names. */
function seen(things: ReturnType<typeof thingsOf>, origin: { x: number; y: number }, question: string) {
  const headings = { left: 180, right: 0, above: -90, below: 90 }
  const heading = Object.entries(headings).find(([word]) => new RegExp(`\\b${word}\\b`).test(question))![1]
  return things
    .filter(({ x, y }) => x !== origin.x || y !== origin.y)
    .map(({ name, x, y }) => {
      const turned = (Math.atan2(y - origin.y, x - origin.x) * 180) / Math.PI - heading
      const angle = Math.abs(((turned + 540) % 360) - 180)
      return { name, angle, distance: Math.hypot(x - origin.x, y - origin.y) }
    })
    .sort((a, b) => a.distance - b.distance)
}

function isTrue(question: string, shown: Scene, second?: Scene): boolean {
  if (second) return shown.background.colour === second.background.colour
  if (/\bsay|\bread\b/.test(question)) return shown.signs.some(({ text }) => question.includes(text))
  const colour = /background|color/.test(question) && COLOUR_NAMES.find(name => question.includes(name))
  if (colour) return shown.background.colour === colour
  const number = ['two', 'three', 'four'].findIndex(word => question.includes(` ${word} `)) + 2
  const count = shown.objects.filter(({ kind }) => kind === nameIn(question)).length
  if (number > 1) return count === number
  const direction = /to the left of|to the right of|above|below/.exec(question)
  if (!direction) return count > 0
  const things = thingsOf(shown)
  const [a, b] = [nameIn(question.slice(0, direction.index)), nameIn(question.slice(direction.index))]
  const origin = things.find(({ name }) => name === b)!
  return seen(things, origin, direction[0]).find(({ name }) => name === a)!.angle < 45
}
