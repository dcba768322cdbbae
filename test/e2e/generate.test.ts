import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import sharp from 'sharp'
import { afterAll, beforeAll, beforeEach, describe, expect, it, vi } from 'vitest'
import type { Drawn } from '../../lib/engine/sampler.ts'
import { type GenerateEvent, type ImageStep, MiniGemini } from '../../lib/index.ts'
import { loadTokenizer } from '../../lib/processing/tokenizer.ts'
import { cases, gemma, messagesOf, rejection, sample, small, vicuna } from './cases.ts'

/** What the stub of the sampler makes the model say; null: what it would say by itself. */
const planted = vi.hoisted(() => ({ ids: null as number[] | null }))

vi.mock('../../lib/engine/sampler.ts', async original => {
  const module = await original<typeof import('../../lib/engine/sampler.ts')>()
  return {
    ...module,
    readSampled: async (...args: Parameters<typeof module.readSampled>): Promise<Drawn[]> => {
      const drawn = await module.readSampled(...args)
      const rows = args[1] as readonly { tokens: readonly number[] }[]
      return drawn.map((one, r) => ({ ...one, id: planted.ids?.[rows[r]!.tokens.length] ?? one.id }))
    },
  }
})

const diffusion = join(vicuna.root, '..', 'sdxl-tiny', 'pipeline')
const quick = { width: 48, height: 40, steps: 3, seed: 11 } as const
const ask = messagesOf(vicuna, sample(vicuna, 'text_only'))

describe('images', () => {
  let mgm: MiniGemini
  let say: (text: string) => void
  beforeAll(async () => {
    mgm = await MiniGemini.load(vicuna.folder, { ...small, diffusion })
    const tokenizer = await loadTokenizer(vicuna.folder, { family: 'llama' })
    say = text => {
      const ids = tokenizer.encode(text)
      planted.ids = [...ids, tokenizer.eosId]
    }
  })
  beforeEach(() => {
    planted.ids = null
  })
  afterAll(() => mgm.close())

  const pixels = async (data: Uint8Array) =>
    sharp(data).removeAlpha().raw().toBuffer({ resolveWithObject: true })

  describe('generate', () => {
    it('draws what the model says between <h> and </h>', async () => {
      say('Here: <h>A small red house.</h>')
      const result = await mgm.generate({ messages: ask, ...quick })
      expect(result.text).toBe('Here: <h>A small red house.</h>')
      expect(result.prompt).toBe('A small red house.')
      expect(result.reason).toBeUndefined()
      expect(result.answer.finishReason).toBe('stop')
      expect(result.images).toHaveLength(1)
      const [image] = result.images
      expect(image).toMatchObject({ format: 'png', width: 48, height: 40, seed: 11 })
      expect((await pixels(image!.data)).info).toMatchObject({ width: 48, height: 40, channels: 3 })
      // The same as drawing it directly, since MGM's negative prompt is the default of both.
      const direct = await mgm.imagine({ prompt: 'A small red house.', ...quick })
      expect(Buffer.compare(direct.images[0]!.data, image!.data)).toBe(0)
    })

    it('asks with <GEN>', async () => {
      // Of the golden samples `gen` ends in " <GEN>"; the option writes it.
      const golden = sample(vicuna, 'gen')
      const messages = messagesOf(vicuna, golden)
      const last = messages.at(-1)!
      const strip = (text: string) => text.replace(/ ?<GEN>$/, '')
      if (typeof last.content === 'string') last.content = strip(last.content)
      else {
        const part = last.content.at(-1)!
        if (part.type === 'text') part.text = strip(part.text)
      }
      const result = await mgm.generate({ messages, maxTokens: 24, ...quick })
      expect(result.answer.tokens).toEqual(golden.generated_ids)
      expect(result).toMatchObject({ prompt: null, reason: 'missing', images: [] })
    })

    it.each([
      ['no marks at all', 'missing'],
      ['<h>unclosed', 'unclosed'],
      ['<h></h>', 'empty'],
      ['</h><h>', 'unclosed'],
    ])('an answer like %j is a result without images', async (text, reason) => {
      say(text)
      const result = await mgm.generate({ messages: ask, ...quick })
      expect(result).toMatchObject({ text, prompt: null, reason, images: [], warnings: [] })
    })

    it('streams text, prompt, steps and the result', async () => {
      say('Yes. <h>Two trees</h>')
      const events: GenerateEvent[] = []
      for await (const event of mgm.streamGenerate({ messages: ask, ...quick, count: 2, previews: true }))
        events.push(event)
      const text = events.flatMap(event => (event.type === 'text' ? [event.delta] : [])).join('')
      expect(text).toBe('Yes. <h>Two trees</h>')
      const kinds = events.map(event => event.type).filter((type, i, all) => type !== all[i - 1])
      expect(kinds).toEqual(['text', 'prompt', 'step', 'done'])
      const steps = events.filter(event => event.type === 'step')
      expect(steps.map(({ image, step, steps }) => [image, step, steps])).toEqual([
        [0, 1, 3],
        [1, 1, 3],
        [0, 2, 3],
        [1, 2, 3],
        [0, 3, 3],
        [1, 3, 3],
      ])
      expect(steps[0]!.preview).toMatchObject({ width: 6, height: 5 })
      const done = events.at(-1)!
      expect(done.type === 'done' && done.result.images.map(image => image.seed)).toEqual([11, 12])
    })

    it('leaving the stream ends the drawing', async () => {
      say('<h>Two trees</h>')
      const before = mgm.metrics.images!
      for await (const event of mgm.streamGenerate({ messages: ask, ...quick, steps: 500 }))
        if (event.type === 'step' && event.step === 2) break
      const { steps, running, waiting, failed } = mgm.metrics.images!
      expect(steps - before.steps).toBeLessThan(6)
      expect({ running, waiting, failed: failed - before.failed }).toEqual({
        running: 0,
        waiting: 0,
        failed: 1,
      })
    })
  })

  describe('imagine', () => {
    const prompt = 'A small red house by the sea'

    it('gives an image of a seed the same bytes, alone or beside others', async () => {
      const [alone] = (await mgm.imagine({ prompt, ...quick })).images
      const before = mgm.metrics.images!
      const [many, other, larger] = await Promise.all([
        mgm.imagine({ prompt, ...quick, seed: 10, count: 3 }),
        mgm.imagine({ prompt: 'something else', ...quick, guidance: 2, negativePrompt: null }),
        mgm.imagine({ prompt, ...quick, width: 64 }),
      ])
      const after = mgm.metrics.images!
      expect(many.images.map(image => image.seed)).toEqual([10, 11, 12])
      expect(Buffer.compare(many.images[1]!.data, alone!.data)).toBe(0)
      expect(Buffer.compare(many.images[0]!.data, alone!.data)).not.toBe(0)
      expect(Buffer.compare(other.images[0]!.data, alone!.data)).not.toBe(0)
      expect(larger.images[0]!.width).toBe(64)
      // Four images of one size shared their calls; the larger one had its own.
      expect([after.steps - before.steps, after.imageSteps - before.imageSteps]).toEqual([6, 15])
    })

    it.each(['png', 'jpeg', 'webp'] as const)('writes %s', async format => {
      const [image] = (await mgm.imagine({ prompt, ...quick, format })).images
      expect((await sharp(image!.data).metadata()).format).toBe(format)
    })

    it('gives raw RGB, which PNG keeps exactly', async () => {
      const [raw] = (await mgm.imagine({ prompt, ...quick, format: 'raw' })).images
      const [png] = (await mgm.imagine({ prompt, ...quick })).images
      expect(raw!.data).toHaveLength(48 * 40 * 3)
      expect(Buffer.compare((await pixels(png!.data)).data, raw!.data)).toBe(0)
    })

    it('warns of a prompt that is cut', async () => {
      const long = `${'many words '.repeat(80)}the end`
      const { warnings } = await mgm.imagine({ prompt: long, ...quick })
      expect(warnings).toHaveLength(1)
      expect(warnings[0]).toMatch(
        /^the prompt is longer than the text encoders take: ".*the end" was left out$/,
      )
      expect((await mgm.imagine({ prompt, ...quick })).warnings).toEqual([])
    })

    it('starts from a picture, in its own size', async () => {
      const image = await readFile(join(vicuna.root, sample(vicuna, 'single').images[0]!))
      const { width, height } = await sharp(image).metadata()
      const results = await Promise.all(
        [0.1, 0.9].map(strength =>
          mgm.imagine({ prompt, image, strength, steps: 10, seed: 3, guidance: 1, format: 'raw' }),
        ),
      )
      for (const { images } of results)
        expect(images[0]).toMatchObject({ width: width! - (width! % 8), height: height! - (height! % 8) })
      expect(Buffer.compare(results[0]!.images[0]!.data, results[1]!.images[0]!.data)).not.toBe(0)
    })

    it('is aborted within a step', async () => {
      const stop = new AbortController()
      const steps: ImageStep[] = []
      const request = mgm.imagine({
        prompt,
        ...quick,
        steps: 500,
        signal: stop.signal,
        onStep: step => {
          steps.push(step)
          if (step.step === 3) stop.abort()
        },
      })
      expect(await rejection(request)).toMatchObject({ code: 'ABORTED' })
      expect(steps).toHaveLength(3)
      expect(mgm.metrics.images).toMatchObject({ running: 0, waiting: 0 })
    })

    it('takes turns with text', async () => {
      const order: string[] = []
      const drawing = mgm.imagine({ prompt, ...quick, steps: 30, onStep: () => order.push('step') })
      const talking = (async () => {
        for await (const event of mgm.stream({ messages: ask, maxTokens: 20 })) order.push(event.type)
      })()
      await Promise.all([drawing, talking])
      // The text did not have to wait for the last step.
      expect(order.indexOf('text')).toBeLessThan(order.lastIndexOf('step'))
    })

    it.each([
      [{ prompt: '' }, 'expected a non-empty string for prompt but received ""'],
      [{ prompt, width: 100 }, 'expected a multiple of 8 from 8 to 8192 for width but received 100'],
      [{ prompt, steps: 0 }, 'expected an integer from 1 to 1000 for steps but received 0'],
      [
        { prompt, sampler: 'heun' },
        "expected one of 'euler', 'euler_ancestral', 'dpmpp_2m', 'ddim', 'lcm' for sampler",
      ],
      [{ prompt, strength: 0.5 }, 'expected an image to start from for strength but received 0.5'],
      [{ prompt, size: 64 }, 'expected only the keys prompt'],
    ])('refuses %j', async (request, message) => {
      const { code, message: found } = await rejection(mgm.imagine(request as { prompt: string }))
      expect(code).toBe('INVALID_ARGUMENT')
      expect(found).toContain(message)
    })

    it('refuses an image that memory cannot hold, and draws the next', async () => {
      const tight = await MiniGemini.load(vicuna.folder, { ...small, diffusion, memoryLimit: 64 * 2 ** 20 })
      try {
        const { code, message } = await rejection(
          tight.imagine({ prompt, width: 2048, height: 2048, steps: 1 }),
        )
        expect(code).toBe('OUT_OF_MEMORY')
        expect(message).toMatch(
          /^an image of 2048 x 2048 needs [\d.]+ MiB but [\d.]+ MiB are available; ask for a smaller one$/,
        )
        expect((await tight.imagine({ prompt, ...quick })).images).toHaveLength(1)
      } finally {
        await tight.close()
      }
    })

    it('says what is wrong with a picture to start from', async () => {
      expect(await rejection(mgm.imagine({ prompt, image: 'nowhere.png' }))).toMatchObject({
        code: 'IMAGE_INVALID',
      })
      const dot = await sharp({ create: { width: 4, height: 4, channels: 3, background: 'red' } })
        .png()
        .toBuffer()
      const { message } = await rejection(mgm.imagine({ prompt, image: dot }))
      expect(message).toBe('expected a picture of at least 8 x 8 pixels to draw over but received 4 x 4')
    })
  })

  it('says what is wrong with a request to stream, as with any other', async () => {
    const signal = {} as AbortSignal
    for (const events of [
      mgm.stream({ messages: ask, signal }),
      mgm.streamGenerate({ messages: ask, signal }),
      mgm.streamGenerate(null as never),
    ])
      expect((await rejection(events.next())).code).toBe('INVALID_ARGUMENT')
  })

  it('without a generator, says so before the model speaks', async () => {
    const plain = await MiniGemini.load(gemma.folder, small)
    try {
      expect(plain.metrics.images).toBeNull()
      for (const request of [plain.imagine({ prompt: 'a' }), plain.generate({ messages: ask })])
        expect(await rejection(request)).toEqual({
          code: 'UNSUPPORTED',
          message:
            'expected a model with an image generator but none was loaded: give load() the option diffusion',
        })
      expect(plain.metrics.completionTokens).toBe(0)
    } finally {
      await plain.close()
    }
  })

  it('refuses before loading what memory cannot hold beside the model', async () => {
    const progress: number[] = []
    const { code, message } = await rejection(
      MiniGemini.load(vicuna.folder, {
        ...small,
        diffusion,
        memoryLimit: 2 ** 20,
        onProgress: ({ loaded }) => progress.push(loaded),
      }),
    )
    expect(code).toBe('OUT_OF_MEMORY')
    // 1.7 MiB of the language model, the rest the generator's.
    expect(Number(/weights ([\d.]+) MiB/.exec(message)?.[1])).toBeGreaterThan(5)
    expect(progress).toEqual([])
  })

  it('loads both in one go, and says what it has', async () => {
    const progress: { loaded: number; total: number }[] = []
    const own = await MiniGemini.load(vicuna.folder, {
      ...small,
      diffusion,
      onProgress: ({ loaded, total }) => progress.push({ loaded, total }),
    })
    const { total } = progress[0]!
    expect(
      progress.every((event, i) => event.total === total && event.loaded >= (progress[i - 1]?.loaded ?? 0)),
    ).toBe(true)
    expect(progress.at(-1)).toEqual({ loaded: total, total })
    expect(own.info.diffusion).toEqual({ checkpoint: diffusion, size: 128 })
    await own.close()
  })

  it('closing ends what is being drawn', async () => {
    const own = await MiniGemini.load(cases[0]!.folder, { ...small, diffusion })
    const drawing = rejection(own.imagine({ prompt: 'a', ...quick, steps: 500 }))
    await new Promise(resolve => setTimeout(resolve, 50))
    await own.close()
    expect((await drawing).code).toBe('CLOSED')
    expect((await rejection(own.imagine({ prompt: 'a' }))).code).toBe('CLOSED')
  })
})
