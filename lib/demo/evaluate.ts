import type { MiniGemini } from '../mini-gemini.ts'
import { userMessage } from '../request.ts'
import { Random } from './random.ts'
import { renderPng } from './render.ts'
import {
  drawingTurn,
  generateLesson,
  type Lesson,
  type Message,
  messagesOf,
  readFacts,
  scoreAnswer,
  type Turn,
} from './tasks.ts'
import { heldOutPairs, type Split, sceneSeed } from './world.ts'

/** What is right, of all that was asked for. */
export interface Share {
  readonly right: number
  readonly of: number
}

/** What is measured of answers about pictures, and how it is called in tables. */
export const MEASURES = {
  caption: 'captions, word for word',
  captionObject: 'objects of captions, kind and number',
  captionObjectUnseen: '… where two were never seen together',
  captionSign: 'signs of captions',
  captionBackground: 'backgrounds of captions',
  relation: 'left of, right of, above, below',
  count: 'counts',
  background: 'color of the background',
  sign: 'signs, read exactly',
  noSign: 'no sign, and said so',
  yesno: 'yes or no',
  difference: 'two pictures: what only one shows',
  which: 'two pictures: which one shows it',
  captionOfTwo: 'two pictures: captions of one or both, word for word',
  oneOfTwo: 'two pictures: all else',
  followUp: 'second to fourth questions',
  conversation: 'whole conversations of several turns',
  typed: 'questions in small letters, without a mark',
  prompt: 'prompts of drawings, word for word',
  talk: 'about itself, word for word',
  talkBeside: '… with pictures in the conversation',
} as const
export type Measure = keyof typeof MEASURES

export type Understanding = ReadonlyMap<Measure, Share>

/** Answers the last message; `pictures` are the scenes that the conversation is about, in their order. */
export type Ask = (
  messages: readonly Message[],
  pictures: readonly number[],
  lesson: Lesson,
) => Promise<string>

export interface EvaluateOptions {
  /** Default 'test': nothing that the demo checkpoint was trained or chosen on. */
  readonly split?: Split
  /** The index of the first lesson of the split, default 0, and how many follow. */
  readonly first?: number
  readonly count: number
  /** Lessons that are asked about at the same time. Default 8. */
  readonly concurrency?: number
  readonly onLesson?: (done: number) => void
}

/**
 * Asks everything that `generateLesson` asks about fresh scenes, and counts what is right. In a conversation the model's own
 * answers stand before its next question, as they would for a user. One question of each lesson is asked again as people type.
 */
export async function evaluate(ask: Ask, options: EvaluateOptions): Promise<Understanding> {
  const counts = new Map<Measure, Count>()
  const add = (measure: Measure, right: number, of = 1): void => {
    const share = counts.get(measure) ?? { right: 0, of: 0 }
    counts.set(measure, share)
    count(share, right, of)
  }
  await forEach(options, async seed => {
    const lesson = generateLesson(seed)
    for (const { pictures, turns } of lesson.examples) {
      const said: Turn[] = []
      let allExact = true
      for (const turn of turns) {
        const text = await ask(messagesOf({ pictures, turns: [...said, turn] }), pictures, lesson)
        const { exact } = scoreAnswer(turn, text)
        allExact &&= exact
        if (said.length > 0) add('followUp', Number(exact))
        const measure = measureOf(turn, pictures.length)
        add(measure, Number(exact))
        said.push({ ...turn, answer: text })
        if (measure !== 'caption') continue
        const objects = facts(turn, text, 'object ')
        add('captionObject', ...objects)
        if (heldOutPairs(lesson.scenes[pictures[0]!]!).length > 0) add('captionObjectUnseen', ...objects)
        add('captionSign', ...facts(turn, text, 'sign '))
        add('captionBackground', ...facts(turn, text, 'background'))
      }
      if (turns.length > 1) add('conversation', Number(allExact))
    }
    const { pictures, turns } = lesson.examples[seed % lesson.examples.length]!
    const turn = { ...turns[0]!, question: typed(turns[0]!.question) }
    const text = await ask(messagesOf({ pictures, turns: [turn] }), pictures, lesson)
    add('typed', Number(scoreAnswer(turn, text).exact))
  })
  return new Map(
    (Object.keys(MEASURES) as Measure[]).flatMap(key => {
      const share = counts.get(key)
      return share ? [[key, share] as const] : []
    }),
  )
}

/** A question as many people type it. */
function typed(question: string): string {
  const small = question.replace(/(^|[.?] )[A-Z](?![A-Z])/g, start => start.toLowerCase())
  return small.replace(/[.?]$/, '')
}

/** Under which measure an answer counts as a whole, in a conversation about so many pictures. */
function measureOf({ task, facts }: Turn, pictures: number): Measure {
  if (task === 'draw') return 'prompt'
  if (task === 'talk') return pictures > 0 ? 'talkBeside' : 'talk'
  if (task === 'difference' || task === 'which') return task
  if (pictures === 2) return task === 'caption' ? 'captionOfTwo' : 'oneOfTwo'
  return task === 'sign' && facts.answer === 'nothing' ? 'noSign' : task
}

/** Of the facts whose names begin so, how many are right, of all that are expected or claimed. */
function facts({ task, facts }: Turn, text: string, prefix: string): [right: number, of: number] {
  const claimed = readFacts(task, text)
  const keys = [...new Set([...Object.keys(facts), ...Object.keys(claimed)])].filter(key =>
    key.startsWith(prefix),
  )
  return [keys.filter(key => facts[key] === claimed[key]).length, keys.length]
}

/** Draws what is asked for. Null where the model's answer holds no prompt. */
export type Draw = (question: string, seed: number) => Promise<Uint8Array | null>

export interface Drawings {
  /** Kinds that were asked for and are found in the drawing, in the right number. */
  readonly objects: Share
  readonly backgrounds: Share
  /** Drawings of which everything is right. */
  readonly whole: Share
}

/** Asks for drawings of fresh scenes and lets `look` describe them: how much of what was asked for is found again. */
export async function evaluateDrawings(
  draw: Draw,
  look: (picture: Uint8Array) => Promise<string>,
  options: EvaluateOptions,
): Promise<Drawings> {
  const [objects, backgrounds, whole] = [0, 1, 2].map(() => ({ right: 0, of: 0 })) as [Count, Count, Count]
  await forEach({ concurrency: 4, ...options }, async seed => {
    const turn = drawingTurn(generateLesson(seed).scenes[2], new Random(seed, 'evaluation'))
    const picture = await draw(turn.question, seed)
    const seen = picture === null ? {} : readFacts('caption', await look(picture))
    const asked = Object.entries(turn.facts)
    const found = asked.filter(([key, value]) => seen[key] === value)
    const isBackground = ([key]: [string, string]) => key === 'background'
    count(backgrounds, found.filter(isBackground).length, 1)
    count(objects, found.length - found.filter(isBackground).length, asked.length - 1)
    count(whole, Number(found.length === asked.length && Object.keys(seen).length === asked.length), 1)
  })
  return { objects, backgrounds, whole }
}

const SCENE_PIXELS = 256

/** Asks a loaded model, with pictures as a user would have them: PNG files. */
export function asker(mgm: MiniGemini): Ask {
  const files = new WeakMap<Lesson, Promise<Buffer>[]>()
  return async (messages, pictures, lesson) => {
    const own = files.get(lesson) ?? lesson.scenes.map(scene => renderPng(scene, SCENE_PIXELS))
    files.set(lesson, own)
    const images = await Promise.all(pictures.map(i => own[i]!))
    const [question, ...others] = messages
    const { text } = await mgm.chat({
      messages: [
        userMessage(images, question!.content),
        ...others.map(({ role, content }) => ({ role, content })),
      ],
      maxTokens: MOST_TOKENS,
      ...(messages.at(-1)!.gen ? { gen: true } : {}),
    })
    return text
  }
}

/** Lets a loaded model draw what it is asked for, by the prompt it writes itself. */
export function drawer(mgm: MiniGemini, options: { steps: number; guidance: number }): Draw {
  return async (question, seed) => {
    const { images } = await mgm.generate({
      messages: [{ role: 'user', content: question }],
      seed,
      ...options,
    })
    return images[0]?.data ?? null
  }
}

/** Lets a loaded model say what is in a picture. */
export function describer(mgm: MiniGemini): (image: Uint8Array) => Promise<string> {
  return async image => {
    const messages = [userMessage([image], 'What is in the picture?')]
    return (await mgm.chat({ messages, maxTokens: MOST_TOKENS })).text
  }
}

const MOST_TOKENS = 96

type Count = { right: number; of: number }

function count(share: Count, right: number, of: number): void {
  share.right += right
  share.of += of
}

/** Calls `visit` for each seed, several at the same time. The first error ends it. */
async function forEach(
  { split = 'test', first = 0, count, concurrency = 8, onLesson }: EvaluateOptions,
  visit: (seed: number) => Promise<void>,
): Promise<void> {
  let next = 0
  let done = 0
  await Promise.all(
    Array.from({ length: Math.min(concurrency, count) }, async () => {
      while (next < count) {
        await visit(sceneSeed(split, first + next++))
        onLesson?.(++done)
      }
    }),
  )
}
