import { setTimeout as sleep } from 'node:timers/promises'
import { describe, expect, it } from 'vitest'
import { type Answer, type ChatRequest, type LoadOptions, MiniGemini } from '../../lib/index.ts'
import { type Case, cases, gemma, messagesOf, rejection, sample, small, vicuna } from './cases.ts'

async function withModel(
  of: Case,
  options: LoadOptions,
  body: (mgm: MiniGemini) => Promise<void>,
): Promise<void> {
  const mgm = await MiniGemini.load(of.folder, { ...small, ...options })
  try {
    await body(mgm)
    expect(mgm.metrics).toMatchObject({ running: 0, waiting: 0 })
    expect(mgm.metrics.kvCache.usedPages).toBe(0)
  } finally {
    await mgm.close()
  }
}

const requests = (of: Case): ChatRequest[] =>
  of.samples.map(golden => ({ messages: messagesOf(of, golden), maxTokens: 24 }))
const idsOf = (answers: Answer[]) => answers.map(answer => answer.tokens)
const golden = (of: Case) => of.samples.map(({ generated_ids }) => generated_ids)
/** One that would go on for long. */
const long = (of: Case): ChatRequest => ({
  messages: messagesOf(of, sample(of, 'text_only')),
  maxTokens: 1500,
})

describe('the same ids, however requests are batched:', () => {
  it.each(cases)('$name with prompts in small chunks', of =>
    withModel(of, { tokenBudget: 17 }, async mgm => {
      expect(idsOf(await Promise.all(requests(of).map(request => mgm.chat(request))))).toEqual(golden(of))
    }),
  )

  it.each(cases)('$name with so few pages that requests are preempted', of => {
    // Two of the longest requests do not fit at full length.
    const positions = Math.max(...of.samples.map(({ n_embeds }) => n_embeds)) + 32
    const pages = Math.ceil((positions * 1.5) / 16)
    return withModel(of, { maxSequences: 4 }, async mgm => {
      const { bytes, pages: all } = mgm.metrics.kvCache
      await withModel(of, { maxSequences: 4, kvMemory: (pages * bytes) / all }, async tight => {
        expect(tight.metrics.kvCache.pages).toBe(pages)
        const answers = await Promise.all(
          [...requests(of), ...requests(of)].map(request => tight.chat(request)),
        )
        expect(idsOf(answers)).toEqual([...golden(of), ...golden(of)])
        expect(tight.metrics.finished).toBe(20)
      })
    })
  })

  it('preemption really happens, and seeded draws survive it', () =>
    withModel(gemma, { maxSequences: 4, kvMemory: 12 * 12 * 2 ** 10 }, async mgm => {
      const drawn = { ...long(gemma), maxTokens: 110, temperature: 1.2, presencePenalty: 0.5 }
      const alone = await mgm.chat({ ...drawn, seed: 7 })
      expect(mgm.metrics.preemptions).toBe(0)
      const answers = await Promise.all([5, 6, 7, 8].map(seed => mgm.chat({ ...drawn, seed })))
      expect(mgm.metrics.preemptions).toBeGreaterThan(0)
      expect(answers[2]!.tokens).toEqual(alone.tokens)
      for (const answer of answers) expect(answer.usage.completionTokens).toBeGreaterThan(0)
    }))

  it('one at a time, and without the picture cache', () =>
    withModel(vicuna, { maxSequences: 1, visionCacheBytes: 0 }, async mgm => {
      expect(idsOf(await Promise.all(requests(vicuna).map(request => mgm.chat(request))))).toEqual(
        golden(vicuna),
      )
      expect(mgm.metrics.visionCache.bytes).toBe(0)
    }))

  it('arriving at random times, some of them leaving again', () =>
    withModel(vicuna, { maxSequences: 3 }, async mgm => {
      const leaving: Promise<unknown>[] = []
      const staying = requests(vicuna).map(async (request, i) => {
        await sleep(i * 7)
        const controller = new AbortController()
        leaving.push(rejection(mgm.chat({ ...long(vicuna), signal: controller.signal })))
        sleep(5 + ((i * 13) % 40)).then(() => controller.abort())
        return mgm.chat(request)
      })
      expect(idsOf(await Promise.all(staying))).toEqual(golden(vicuna))
      expect(await Promise.all(leaving)).toEqual(
        leaving.map(() => ({ code: 'ABORTED', message: 'the request was aborted' })),
      )
    }))
})

describe('aborting', () => {
  it('in the middle of an answer leaves the neighbours alone', () =>
    withModel(vicuna, {}, async mgm => {
      const controller = new AbortController()
      let seen = 0
      const read = async () => {
        for await (const event of mgm.stream({ ...long(vicuna), signal: controller.signal }))
          if (event.type === 'text' && ++seen === 3) controller.abort('enough')
      }
      const aborted = rejection(read())
      const answers = await Promise.all(requests(vicuna).map(request => mgm.chat(request)))
      expect((await aborted).code).toBe('ABORTED')
      expect(idsOf(answers)).toEqual(golden(vicuna))
    }))

  it('by leaving the loop ends the request', () =>
    withModel(vicuna, {}, async mgm => {
      for await (const event of mgm.stream(long(vicuna))) {
        expect(mgm.metrics.running).toBe(1)
        if (event.type === 'text') break
      }
      expect(mgm.metrics).toMatchObject({ running: 0, waiting: 0, finished: 0, failed: 1 })
    }))

  it('while pictures are read or wait for their turn', () =>
    withModel(vicuna, { maxSequences: 1 }, async mgm => {
      const controllers = requests(vicuna).map(() => new AbortController())
      const outcomes = requests(vicuna).map((request, i) =>
        rejection(mgm.chat({ ...request, signal: controllers[i]!.signal })),
      )
      for (const controller of controllers) controller.abort()
      for (const outcome of outcomes) expect((await outcome).code).toBe('ABORTED')
      expect((await mgm.chat(requests(vicuna)[0]!)).tokens).toEqual(golden(vicuna)[0])
    }))

  it('a batch keeps what was answered', () =>
    withModel(vicuna, { maxSequences: 1 }, async mgm => {
      const controller = new AbortController()
      const results = await mgm.batch([...requests(vicuna).slice(0, 2), long(vicuna), long(vicuna)], {
        signal: controller.signal,
        onProgress: ({ done }) => {
          if (done === 2) controller.abort()
        },
      })
      expect(results.map(result => result.ok || result.error.code)).toEqual([
        true,
        true,
        'ABORTED',
        'ABORTED',
      ])
    }))
})

describe('a stream', () => {
  it('does not hold the model up when its reader is slow', () =>
    withModel(vicuna, {}, async mgm => {
      const events = mgm.stream(requests(vicuna)[0]!)
      const first = (await events.next()).value!
      expect(first.type).toBe('text')
      expect(idsOf(await Promise.all(requests(vicuna).map(request => mgm.chat(request))))).toEqual(
        golden(vicuna),
      )
      let text = first.type === 'text' ? first.delta : ''
      let pieces = 1
      for await (const event of events) {
        if (event.type === 'text') {
          text += event.delta
          pieces++
        }
      }
      expect(text).toBe(sample(vicuna, 'single').text)
      expect(pieces).toBeLessThanOrEqual(3)
    }))

  it('starts nothing before it is read', () =>
    withModel(vicuna, {}, async mgm => {
      mgm.stream(requests(vicuna)[0]!)
      await sleep(20)
      expect(mgm.metrics.steps).toBe(0)
    }))
})

describe('limits', () => {
  it('refuses what the queue does not hold, and only that', () =>
    withModel(vicuna, { maxSequences: 2, maxQueue: 3 }, async mgm => {
      const outcomes = await Promise.allSettled(requests(vicuna).map(request => mgm.chat(request)))
      const refused = outcomes.filter(outcome => outcome.status === 'rejected')
      expect(refused.map(({ reason }) => reason.code)).toEqual(new Array(5).fill('QUEUE_FULL'))
      const answers = outcomes.filter(outcome => outcome.status === 'fulfilled').map(({ value }) => value)
      expect(idsOf(answers)).toEqual(golden(vicuna).slice(0, 5))
      expect((await mgm.chat(requests(vicuna)[7]!)).tokens).toEqual(golden(vicuna)[7])
    }))

  it('a batch larger than the queue goes through', () =>
    withModel(vicuna, { maxSequences: 2, maxQueue: 2 }, async mgm => {
      const results = await mgm.batch(requests(vicuna))
      expect(results.map(result => result.ok && result.answer.tokens)).toEqual(golden(vicuna))
    }))

  it('a prompt that fills the pool but for one position still gets its id', () =>
    withModel(vicuna, { kvMemory: 7 * 24 * 2 ** 10 }, async mgm => {
      // 7 pages hold 112 positions; the prompt is 107 long.
      const answer = await mgm.chat(requests(vicuna)[0]!)
      expect(answer.tokens).toEqual(golden(vicuna)[0]!.slice(0, 5))
      expect((await rejection(mgm.chat(requests(vicuna)[5]!))).message).toMatch(
        /expected a prompt of at most 111 positions .* the KV cache holds 112 \(7 pages of 16/,
      )
    }))
})

describe('closing', () => {
  it('while requests run rejects them and frees the device', async () => {
    const mgm = await MiniGemini.load(vicuna.folder, { ...small, maxSequences: 2 })
    const stream = mgm.stream(long(vicuna))
    await stream.next()
    const running = requests(vicuna).map(request => rejection(mgm.chat({ ...request, maxTokens: 1000 })))
    const closing = mgm.close()
    const outcomes = await Promise.all(running)
    expect((await rejection(stream.next())).code).toBe('CLOSED')
    await closing
    expect(outcomes.map(({ code }) => code)).toEqual(outcomes.map(() => 'CLOSED'))
    expect((await rejection(mgm.chat(requests(vicuna)[0]!))).code).toBe('CLOSED')
  })

  it('at once after the first request is fine too', async () => {
    const mgm = await MiniGemini.load(vicuna.folder, small)
    const outcome = rejection(mgm.chat(requests(vicuna)[0]!))
    await mgm.close()
    expect((await outcome).code).toBe('CLOSED')
  })
})

it('two models at once do not disturb each other', async () => {
  const models = await Promise.all([vicuna, vicuna, gemma].map(of => MiniGemini.load(of.folder, small)))
  try {
    const answers = await Promise.all(
      models.map((mgm, i) => Promise.all(requests(i < 2 ? vicuna : gemma).map(request => mgm.chat(request)))),
    )
    expect(answers.map(idsOf)).toEqual([golden(vicuna), golden(vicuna), golden(gemma)])
    await models[0]!.close()
    expect((await models[1]!.chat(requests(vicuna)[1]!)).tokens).toEqual(golden(vicuna)[1])
  } finally {
    await Promise.all(models.map(mgm => mgm.close()))
  }
})
