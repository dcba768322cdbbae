import { describe, expect, it } from 'vitest'
import { type Ask, evaluate, evaluateDrawings, MEASURES, type Measure } from '../../lib/demo/evaluate.ts'
import { captionOf, type Example, generateLesson, type Lesson, messagesOf } from '../../lib/demo/tasks.ts'
import { isHeldOut, sceneSeed } from '../../lib/demo/world.ts'

const COUNT = 60

/** The turn that a conversation has come to, and its example. */
function turnOf(lesson: Lesson, questions: readonly string[], pictures: readonly number[]) {
  const plain = (question?: string) => question?.replace(/[.?]$/, '').toLowerCase()
  const example = lesson.examples.find(
    ({ turns, pictures: own }) =>
      own.join() === pictures.join() &&
      questions.every((question, i) => plain(turns[i]?.question) === plain(question)),
  ) as Example
  return { example, turn: example.turns[questions.length - 1]! }
}

/** Answers as expected, but for what `change` makes of it. */
const asker =
  (change: (answer: string, task: string, position: number) => string): Ask =>
  async (messages, pictures, lesson) => {
    const questions = messages.filter(({ role }) => role === 'user').map(({ content }) => content)
    const { turn } = turnOf(lesson, questions, pictures)
    return change(turn.answer, turn.task, questions.length - 1)
  }

describe('evaluate', () => {
  it('finds everything right in right answers, of every measure', async () => {
    const shares = await evaluate(
      asker(answer => answer),
      { count: COUNT },
    )
    expect([...shares.keys()]).toEqual(Object.keys(MEASURES))
    for (const [measure, { right, of }] of shares)
      expect([measure, right, of > 0]).toEqual([measure, of, true])
  })

  it('counts a wrong answer where it belongs, and nowhere else', async () => {
    const wrong: Partial<Record<string, Measure[]>> = {
      relation: ['relation'],
      yesno: ['yesno'],
      sign: ['sign', 'noSign'],
      draw: ['prompt'],
    }
    for (const [task, measures] of Object.entries(wrong)) {
      const shares = await evaluate(
        asker((answer, own) => (own === task ? 'A teapot that nobody asked for.' : answer)),
        { count: COUNT },
      )
      const touched = [...shares].filter(([, { right, of }]) => right < of).map(([measure]) => measure)
      for (const measure of measures!) expect(shares.get(measure)!.right).toBe(0)
      for (const measure of touched)
        expect([...measures!, 'oneOfTwo', 'followUp', 'conversation', 'typed'], task).toContain(measure)
    }
  })

  it('counts the facts of captions one by one', async () => {
    const shares = await evaluate(
      asker((answer, task) =>
        task === 'caption' ? answer.replace(/on an? \w+ background/g, 'on a silver background') : answer,
      ),
      { count: COUNT },
    )
    for (const measure of ['captionBackground', 'caption', 'captionOfTwo'] as const)
      expect(shares.get(measure)!.right).toBe(0)
    expect(shares.get('captionObject')!.right).toBe(shares.get('captionObject')!.of)
    expect(shares.get('captionSign')!.right).toBe(shares.get('captionSign')!.of)
  })

  it('asks one question of each lesson again, in small letters and without a mark', async () => {
    const questions: string[] = []
    const shares = await evaluate(
      async (messages, pictures, lesson) => {
        questions.push(messages.at(-1)!.content)
        return asker(answer => answer)(messages, pictures, lesson)
      },
      { count: COUNT },
    )
    expect(shares.get('typed')).toEqual({ right: COUNT, of: COUNT })
    const small = questions.filter(question => /^[a-z]/.test(question))
    expect(small.length).toBe(COUNT)
    expect(small.filter(question => /[.?]$|[.?] [A-Z]/.test(question))).toEqual([])
    expect(new Set(small.map(question => question.split(' ')[0])).size).toBeGreaterThan(5)
  })

  it('puts the own answers of the model before the next question', async () => {
    const histories: string[][] = []
    await evaluate(
      async (messages, pictures, lesson) => {
        histories.push(messages.filter(({ role }) => role === 'assistant').map(({ content }) => content))
        return asker((_, task, position) => `${task} ${position}`)(messages, pictures, lesson)
      },
      { count: 5 },
    )
    const longest = histories.reduce((a, b) => (b.length > a.length ? b : a))
    expect(longest.length).toBeGreaterThan(1)
    for (const [i, text] of longest.entries()) expect(text).toMatch(new RegExp(`^\\w+ ${i}$`))
  })

  it('asks about scenes of the split, each once, with pairs that training never shows', async () => {
    const seeds = new Set<string>()
    let unseen = 0
    await evaluate(
      async (messages, pictures, lesson) => {
        seeds.add(JSON.stringify(lesson.scenes))
        const kinds = [...new Set(lesson.scenes[0].objects.map(({ kind }) => kind))]
        if (kinds.some((a, i) => kinds.slice(i + 1).some(b => isHeldOut(a, b)))) unseen++
        return asker(answer => answer)(messages, pictures, lesson)
      },
      { count: COUNT, first: 7 },
    )
    const expected = Array.from({ length: COUNT }, (_, i) =>
      JSON.stringify(generateLesson(sceneSeed('test', 7 + i)).scenes),
    )
    expect(seeds).toEqual(new Set(expected))
    expect(unseen).toBeGreaterThan(0)
  })

  it('ends with the error of a question', async () => {
    const ask: Ask = async (messages, _pictures, lesson) => {
      if (messages[0]!.content === messagesOf(lesson.examples[2]!)[0]!.content) throw new Error('gone')
      return ''
    }
    await expect(evaluate(ask, { count: 20 })).rejects.toThrow('gone')
  })
})

describe('evaluateDrawings', () => {
  /** A picture that is nothing but its caption. */
  const encode = (text: string) => new TextEncoder().encode(text)
  const look = async (picture: Uint8Array) => new TextDecoder().decode(picture)
  const right = async (_: string, seed: number) => encode(captionOf(generateLesson(seed).scenes[2]))

  it('finds again what was drawn', async () => {
    const { objects, backgrounds, whole } = await evaluateDrawings(right, look, { count: COUNT })
    expect([backgrounds, whole]).toEqual([
      { right: COUNT, of: COUNT },
      { right: COUNT, of: COUNT },
    ])
    expect(objects.right).toBe(objects.of)
    expect(objects.of).toBeGreaterThanOrEqual(COUNT)
  })

  it('misses what is not there: no prompt, another background, an object too many', async () => {
    const nothing = await evaluateDrawings(async () => null, look, { count: COUNT })
    expect([nothing.objects.right, nothing.backgrounds.right, nothing.whole.right]).toEqual([0, 0, 0])
    expect(nothing.objects.of).toBeGreaterThanOrEqual(COUNT)
    const silver = await evaluateDrawings(
      right,
      async picture => (await look(picture)).replace(/on an? \w+ background/, 'on a silver background'),
      { count: COUNT },
    )
    expect([silver.objects.right, silver.backgrounds.right, silver.whole.right]).toEqual([
      silver.objects.of,
      0,
      0,
    ])
    const crowded = await evaluateDrawings(right, async picture => `${await look(picture)} And four foxes.`, {
      count: COUNT,
    })
    expect(crowded.backgrounds.right).toBe(COUNT)
    expect(crowded.whole.right).toBe(0)
  })
})
