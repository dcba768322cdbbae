import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { type Answer, type ChatRequest, MiniGemini, type ProgressEvent } from '../../lib/index.ts'
import { cases, gemma, messagesOf, sample, small, vicuna } from './cases.ts'

async function collect(events: AsyncIterable<{ type: string; delta?: string; answer?: Answer }>) {
  const deltas: string[] = []
  let answer: Answer | undefined
  for await (const event of events) {
    expect(answer).toBeUndefined()
    if (event.type === 'text') deltas.push(event.delta!)
    else answer = event.answer
  }
  return { deltas, answer: answer! }
}

describe.each(cases)('$name, as the reference', of => {
  let mgm: MiniGemini
  beforeAll(async () => {
    mgm = await MiniGemini.load(of.folder, small)
  })
  afterAll(() => mgm.close())

  it.each(of.samples)('$name', async golden => {
    const answer = await mgm.chat({ messages: messagesOf(of, golden), maxTokens: 24 })
    expect(answer.tokens).toEqual(golden.generated_ids)
    expect(answer.text).toBe(golden.text)
    expect(answer.finishReason).toBe('length')
    expect(answer.usage.promptTokens).toBe(golden.n_embeds)
    expect(answer.usage.completionTokens).toBe(24)
    expect(answer.usage.imageTokens).toBe(golden.images.length * mgm.info.tokensPerImage)
  })

  it('all samples at once give the same ids as alone', async () => {
    const answers = await Promise.all(
      of.samples.map(golden => mgm.chat({ messages: messagesOf(of, golden), maxTokens: 24 })),
    )
    expect(answers.map(answer => answer.tokens)).toEqual(of.samples.map(golden => golden.generated_ids))
    expect(mgm.metrics.kvCache.usedPages).toBe(0)
  })

  it('streams exactly the text', async () => {
    for (const golden of of.samples) {
      const { deltas, answer } = await collect(
        mgm.stream({ messages: messagesOf(of, golden), maxTokens: 24 }),
      )
      expect(deltas.join('')).toBe(golden.text)
      expect(deltas.every(delta => delta !== '')).toBe(true)
      expect(answer.text).toBe(golden.text)
      expect(answer.tokens).toEqual(golden.generated_ids)
    }
  })

  it('ends at an end id, which is among the tokens', async () => {
    const { eos_token_id, expected_ids } = of.eosStop
    const answer = await mgm.chat({
      messages: messagesOf(of, sample(of, of.eosStop.sample)),
      maxTokens: 24,
      stopTokenIds: [eos_token_id],
    })
    expect(answer.tokens).toEqual(expected_ids)
    expect(answer.finishReason).toBe('stop')
  })
})

describe('MiniGemini', () => {
  let mgm: MiniGemini
  const golden = sample(vicuna, 'single')
  const request = (more: Partial<ChatRequest> = {}): ChatRequest => ({
    messages: messagesOf(vicuna, golden),
    maxTokens: 24,
    ...more,
  })
  beforeAll(async () => {
    mgm = await MiniGemini.load(vicuna.folder, small)
  })
  afterAll(() => mgm.close())

  it('takes pictures as paths, URLs and bytes alike, and encodes equal ones once', async () => {
    const path = join(vicuna.root, golden.images[0]!)
    const bytes = await readFile(path)
    const before = mgm.metrics.visionCache.misses
    const forms = [
      path,
      pathToFileURL(path),
      pathToFileURL(path).href,
      bytes,
      new Uint8Array(bytes),
      `data:image/png;base64,${bytes.toString('base64')}`,
    ]
    for (const image of forms) {
      const content = [
        { type: 'image' as const, image },
        { type: 'text' as const, text: golden.turns[0]! },
      ]
      const answer = await mgm.chat(request({ messages: [{ role: 'user', content }] }))
      expect(answer.tokens).toEqual(golden.generated_ids)
    }
    expect(mgm.metrics.visionCache.misses - before).toBeLessThanOrEqual(1)
  })

  it('builds OCR hint and <GEN> as the reference', async () => {
    const ocr = sample(vicuna, 'ocr_gen_image')
    const messages = messagesOf(vicuna, ocr)
    const content = messages[0]!.content as { type: 'text'; text: string }[]
    content[content.length - 1]!.text = 'How many shapes are there?\nAnswer briefly.'
    const answer = await mgm.chat({ messages, maxTokens: 24, gen: true, ocrHint: ['MGM 12', 'rings'] })
    expect(answer.tokens).toEqual(ocr.generated_ids)
  })

  it('obeys another template', async () => {
    const plain = await mgm.chat(request({ maxTokens: 1 }))
    const other = await mgm.chat(request({ maxTokens: 1, conversation: 'llava_v0' }))
    expect(other.usage.promptTokens).not.toBe(plain.usage.promptTokens)
  })

  it('cuts the text before a stop string, streamed or not', async () => {
    const whole = golden.text
    const stop = whole.slice(5, 8)
    const cut = whole.slice(0, whole.indexOf(stop)).trimEnd()
    const answer = await mgm.chat(request({ stop }))
    expect(answer.text).toBe(cut)
    expect(answer.finishReason).toBe('stop')
    expect(answer.tokens).toEqual(golden.generated_ids.slice(0, answer.tokens.length))
    const streamed = await collect(mgm.stream(request({ stop: ['never there', stop] })))
    expect(streamed.deltas.join('')).toBe(cut)
    expect(streamed.answer.tokens).toEqual(answer.tokens)
  })

  it('stops where the context ends', async () => {
    const tight = await MiniGemini.load(vicuna.folder, { ...small, kvMemory: 8 * 24 * 2 ** 10 })
    try {
      const positions = tight.metrics.kvCache.pages * tight.metrics.kvCache.pageSize
      expect(positions).toBeLessThan(golden.n_embeds + 24)
      expect(positions).toBeGreaterThan(golden.n_embeds)
      const answer = await tight.chat(request())
      expect(answer.finishReason).toBe('length')
      expect(answer.tokens).toEqual(golden.generated_ids.slice(0, positions - golden.n_embeds))
    } finally {
      await tight.close()
    }
  })

  it('reports log-probabilities that agree with the choice', async () => {
    const answer = await mgm.chat(request({ logprobs: 3 }))
    expect(answer.logprobs!.map(entry => entry.id)).toEqual(golden.generated_ids)
    for (const { id, logprob, top } of answer.logprobs!) {
      expect(top.length).toBe(3)
      expect(top[0]!.id).toBe(id)
      expect(top[0]!.logprob).toBe(logprob)
      expect(logprob).toBeLessThanOrEqual(0)
      expect(top[0]!.logprob).toBeGreaterThanOrEqual(top[1]!.logprob)
      expect(top[1]!.logprob).toBeGreaterThanOrEqual(top[2]!.logprob)
    }
    expect((await mgm.chat(request({ maxTokens: 1 }))).logprobs).toBeUndefined()
  })

  it('draws by its seed alone, whatever runs beside it', async () => {
    const drawn = { temperature: 1.5, topP: 0.95, seed: 1234 }
    const alone = await mgm.chat(request(drawn))
    const [again, ...others] = await Promise.all([
      mgm.chat(request(drawn)),
      ...[1, 2, 3, 2n ** 63n].map(seed => mgm.chat(request({ ...drawn, seed }))),
    ])
    expect(again.tokens).toEqual(alone.tokens)
    for (const other of others) expect(other.tokens).not.toEqual(alone.tokens)
    const unseeded = await Promise.all([1, 2].map(() => mgm.chat(request({ temperature: 1.5 }))))
    expect(unseeded[0]!.tokens).not.toEqual(unseeded[1]!.tokens)
  })

  it('lets only the most likely id through with topK 1', async () => {
    const answer = await mgm.chat(request({ temperature: 2, topK: 1, seed: 5 }))
    expect(answer.tokens).toEqual(golden.generated_ids)
  })

  it('penalizes what was generated', async () => {
    const repeating = sample(gemma, 'text_only')
    const other = await MiniGemini.load(gemma.folder, small)
    try {
      const messages = messagesOf(gemma, repeating)
      expect(new Set(repeating.generated_ids).size).toBeLessThan(24)
      const answer = await other.chat({ messages, maxTokens: 24, presencePenalty: 100 })
      expect(new Set(answer.tokens).size).toBe(24)
      const first = repeating.generated_ids.findIndex((id, i, ids) => ids.indexOf(id) < i)
      expect(answer.tokens.slice(0, first)).toEqual(repeating.generated_ids.slice(0, first))
    } finally {
      await other.close()
    }
  })

  it('measures times that add up', async () => {
    const { timings } = await mgm.chat(request())
    const { queueMs, imageMs, visionMs, prefillMs, decodeMs, totalMs, timeToFirstTokenMs } = timings
    for (const value of Object.values(timings)) expect(value).toBeGreaterThanOrEqual(0)
    expect(queueMs + imageMs + visionMs + prefillMs).toBeCloseTo(timeToFirstTokenMs, 3)
    expect(timeToFirstTokenMs + decodeMs).toBeLessThanOrEqual(totalMs)
    expect(timings.tokensPerSecond).toBeCloseTo(23_000 / decodeMs, 3)
  })

  it('keeps order in a batch and settles each request by itself', async () => {
    const seen: number[] = []
    const results = await mgm.batch(
      [
        request({ maxTokens: 5 }),
        request({ messages: [{ role: 'user', content: [{ type: 'image', image: '/not/there.png' }] }] }),
        { messages: [] },
        ...vicuna.samples.map(other => ({ messages: messagesOf(vicuna, other), maxTokens: 24 })),
      ],
      {
        onProgress: ({ done, total }) => {
          expect(total).toBe(13)
          seen.push(done)
        },
      },
    )
    expect(seen).toEqual(Array.from({ length: 13 }, (_, i) => i + 1))
    const [short, missing, empty, ...rest] = results
    expect(short!.ok && short!.answer.tokens).toEqual(golden.generated_ids.slice(0, 5))
    expect(!missing!.ok && missing!.error.code).toBe('IMAGE_INVALID')
    expect(!empty!.ok && empty!.error.code).toBe('INVALID_ARGUMENT')
    expect(rest.map(result => result.ok && result.answer.tokens)).toEqual(
      vicuna.samples.map(other => other.generated_ids),
    )
    expect(await mgm.batch([])).toEqual([])
  })

  it('gives the same ids from bf16 and f16 storage, and other memory', async () => {
    for (const dtype of ['bf16', 'f16', 'f32'] as const) {
      const other = await MiniGemini.load(vicuna.folder, { ...small, dtype })
      try {
        expect((await other.chat(request())).tokens).toEqual(golden.generated_ids)
      } finally {
        await other.close()
      }
    }
  })

  it('tells how far loading is, up to the whole', async () => {
    const events: ProgressEvent[] = []
    const other = await MiniGemini.load(vicuna.folder, { ...small, onProgress: event => events.push(event) })
    await other.close()
    const last = events.at(-1)!
    expect(last).toMatchObject({ phase: 'load', loaded: last.total })
    for (let i = 1; i < events.length; i++)
      expect(events[i]!.loaded).toBeGreaterThanOrEqual(events[i - 1]!.loaded)
  })

  it('falls back to the CPU by itself and says so', async () => {
    const { device: _, ...rest } = small
    const other = await MiniGemini.load(vicuna.folder, rest)
    expect([other.device, other.notes.length]).toEqual(['cpu', 1])
    expect(other.notes[0]).toMatch(/^running on the CPU: /)
    await other.close()
    expect([mgm.device, mgm.notes]).toEqual(['cpu', []])
  })
})
