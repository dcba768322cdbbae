import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { Device } from '../../lib/device.ts'
import { Engine, type EngineModel, type EngineOptions, type EngineRequest } from '../../lib/engine/engine.ts'
import { greedy } from '../../lib/engine/sampler.ts'
import type { Picture } from '../../lib/engine/vision.ts'
import { MgmError } from '../../lib/errors.ts'
import type { KvCache } from '../../lib/models/decoder.ts'
import { IMAGE_TOKEN_INDEX } from '../../lib/processing/prompt.ts'
import type { Tokenizer } from '../../lib/processing/tokenizer.ts'

const HIDDEN = 4
const BYTES_PER_PICTURE = HIDDEN * 4
const tokenizer = {
  createStream: () => ({ push: (id: number) => String.fromCharCode(97 + id), flush: () => '' }),
  decode: (ids: number[]) => String.fromCharCode(...ids.map(id => 97 + id)),
} as unknown as Tokenizer

let device: Device
beforeAll(() => {
  device = Device.open('cpu', { threads: 1 })
})
afterAll(() => device.close())

/** A model without weights: it always answers 1, and writes down what it was asked. */
function fakeModel() {
  const log = { forward: [] as number[], encode: [] as number[] }
  const hooks = {
    forward: (_rows: number) => {},
    encode: (_pictures: number) => {},
  }
  const model: EngineModel = {
    hiddenSize: HIDDEN,
    imageSize: 2,
    tokensPerImage: 1,
    maxContext: 4096,
    embed: ids => device.zeros([ids.shape[0]!, HIDDEN]),
    splice: (ids, images) => {
      expect(images.length).toBe(ids.filter(id => id === IMAGE_TOKEN_INDEX).length)
      for (const image of images) image.alive()
      return device.zeros([ids.length, HIDDEN])
    },
    newCache: (pages, pageSize) => ({ pages, pageSize, layers: [], dispose: () => {} }) as unknown as KvCache,
    bytesPerPage: () => 1,
    encodeImages: pixels => {
      log.encode.push(pixels.shape[0]!)
      hooks.encode(pixels.shape[0]!)
      return device.zeros([pixels.shape[0]!, HIDDEN])
    },
    forward: batch => {
      const rows = batch.embeds.shape[0]!
      expect(batch.positions.shape).toEqual([rows])
      log.forward.push(rows)
      hooks.forward(rows)
      const logits = new Float32Array(batch.logitRows.shape[0]! * 3)
      for (let i = 1; i < logits.length; i += 3) logits[i] = 1
      return device.tensor(logits, [logits.length / 3, 3])
    },
  }
  return { model, log, hooks }
}

const ids = (length: number, pictures = 0) =>
  Int32Array.from({ length }, (_, i) => (i < pictures ? IMAGE_TOKEN_INDEX : 0))

function picture(key: string, pixels = async () => new Float32Array(12)): () => Promise<Picture> {
  return async () => ({ key, pixels })
}

describe('Engine', () => {
  let engine: Engine
  let fake: ReturnType<typeof fakeModel>
  const start = (options: Partial<EngineOptions> = {}) => {
    fake = fakeModel()
    engine = new Engine(device, fake.model, tokenizer, {
      pages: 64,
      pageSize: 16,
      tokenBudget: 256,
      maxSequences: 8,
      maxQueue: 64,
      visionBatch: 4,
      visionCacheBytes: 1000,
      ...options,
    })
  }
  const generate = (length: number, more: Partial<EngineRequest> = {}) =>
    engine.generate({
      ids: ids(length, more.pictures?.length),
      pictures: [],
      sampling: greedy,
      maxTokens: 3,
      stopStrings: [],
      stopIds: new Set(),
      ...more,
    })
  const codeOf = (promise: Promise<unknown>) =>
    promise.then(
      () => 'ok',
      (error: unknown) => (error instanceof MgmError ? error.code : `not an MgmError: ${error}`),
    )
  let usedBefore = 0
  beforeEach(() => {
    usedBefore = device.memory().used
  })
  afterEach(async () => {
    await engine.close()
    expect(device.memory().used).toBe(usedBefore)
  })

  it('steps all requests together', async () => {
    start()
    const answers = await Promise.all([5, 6, 7].map(length => generate(length)))
    expect(answers.map(answer => [answer.text, answer.tokens])).toEqual(answers.map(() => ['bbb', [1, 1, 1]]))
    expect(fake.log.forward).toEqual([18, 3, 3])
    expect(engine.metrics).toMatchObject({ steps: 3, finished: 3, promptTokens: 18, completionTokens: 9 })
  })

  it('loses only the request that is at fault when a step fails', async () => {
    start()
    fake.hooks.forward = rows => {
      if (rows >= 100) throw new MgmError('OUT_OF_MEMORY', 'too many rows')
    }
    const outcomes = [generate(4), generate(100), generate(6)].map(codeOf)
    expect(await Promise.all(outcomes)).toEqual(['ok', 'OUT_OF_MEMORY', 'ok'])
    expect(await codeOf(generate(5))).toBe('ok')
    expect(engine.metrics).toMatchObject({ running: 0, waiting: 0, finished: 3, failed: 1 })
  })

  it('says INTERNAL for errors that are not its own', async () => {
    start()
    fake.hooks.forward = () => {
      throw new TypeError('broken')
    }
    await expect(generate(4)).rejects.toThrow(/the engine failed: broken/)
  })

  it('encodes pictures that wait together, and equal ones once', async () => {
    start()
    const pictures = ['a', 'b', 'a', 'c', 'd', 'e'].map(key => picture(key))
    await generate(8, { pictures })
    expect(fake.log.encode).toEqual([4, 1])
    await generate(8, { pictures: ['e', 'a'].map(key => picture(key)) })
    expect(fake.log.encode).toEqual([4, 1])
    expect(engine.metrics.visionCache).toMatchObject({ hits: 3, misses: 5, bytes: 5 * BYTES_PER_PICTURE })
  })

  it('forgets the pictures used longest ago', async () => {
    start({ visionCacheBytes: 2 * BYTES_PER_PICTURE })
    for (const key of ['a', 'b', 'a', 'c']) await generate(2, { pictures: [picture(key)] })
    expect(fake.log.encode.length).toBe(3)
    await generate(2, { pictures: [picture('a')] })
    expect(fake.log.encode.length).toBe(3)
    await generate(2, { pictures: [picture('b')] })
    expect(fake.log.encode.length).toBe(4)
    expect(engine.metrics.visionCache.bytes).toBe(2 * BYTES_PER_PICTURE)
  })

  it('tries pictures one by one when their batch fails', async () => {
    start()
    let calls = 0
    fake.hooks.encode = pictures => {
      calls++
      // The batch, and the second picture by itself.
      if (pictures > 1 || calls === 3) throw new MgmError('OUT_OF_MEMORY', 'too many pictures')
    }
    const outcomes = ['a', 'b', 'c'].map(key => codeOf(generate(3, { pictures: [picture(key)] })))
    expect((await Promise.all(outcomes)).sort()).toEqual(['OUT_OF_MEMORY', 'ok', 'ok'])
    // What failed is not remembered.
    expect(await codeOf(generate(3, { pictures: ['a', 'b', 'c'].map(key => picture(key)) }))).toBe('ok')
  })

  it('fails the request whose picture cannot be read, and no other', async () => {
    start()
    const broken = picture('x', async () => {
      throw new MgmError('IMAGE_INVALID', 'no picture')
    })
    const outcomes = [
      generate(3, { pictures: [picture('a'), broken] }),
      generate(3, { pictures: [picture('a')] }),
    ].map(codeOf)
    expect(await Promise.all(outcomes)).toEqual(['IMAGE_INVALID', 'ok'])
  })

  it('does not encode a picture that nobody waits for any more', async () => {
    start({ visionBatch: 1 })
    const controller = new AbortController()
    fake.hooks.encode = () => controller.abort()
    const outcomes = [
      generate(2, { pictures: [picture('a')] }),
      generate(2, { pictures: [picture('b')], signal: controller.signal }),
    ].map(codeOf)
    expect(await Promise.all(outcomes)).toEqual(['ok', 'ABORTED'])
    expect(fake.log.encode).toEqual([1])
  })

  it('reads pictures only of requests whose turn is near', async () => {
    start({ maxSequences: 1 })
    let open = 0
    let most = 0
    const pictures = [
      async () => {
        most = Math.max(most, ++open)
        return { key: String(Math.random()), pixels: async () => new Float32Array(12) }
      },
    ]
    const all = Array.from({ length: 12 }, () =>
      generate(2, { pictures }).then(() => {
        open--
      }),
    )
    await Promise.all(all)
    expect(most).toBeLessThanOrEqual(3)
  })

  it('lets nothing of an aborted request live on', async () => {
    start()
    const controller = new AbortController()
    let texts = 0
    const outcome = codeOf(
      generate(10, {
        maxTokens: 1000,
        signal: controller.signal,
        onText: () => {
          if (++texts === 5) controller.abort()
        },
      }),
    )
    expect(await outcome).toBe('ABORTED')
    expect(engine.metrics).toMatchObject({ running: 0, waiting: 0 })
    expect(engine.metrics.kvCache.usedPages).toBe(0)
    expect(texts).toBe(5)
  })
})
