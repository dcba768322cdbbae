import { cp, mkdtemp, open, readFile, rm, truncate, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import sharp from 'sharp'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { type ChatRequest, type LoadOptions, MiniGemini } from '../../lib/index.ts'
import { gemma, messagesOf, rejection, sample, small, vicuna } from './cases.ts'

let scratch: string
beforeAll(async () => {
  scratch = await mkdtemp(join(tmpdir(), 'mgm-errors-'))
})
afterAll(() => rm(scratch, { recursive: true }))

/** A copy of a case's folders to be damaged; gives the checkpoint's own. */
async function copyCase(name: string): Promise<string> {
  const root = join(scratch, name)
  await cp(vicuna.root, root, { recursive: true, filter: path => !path.endsWith('/tensors') })
  return join(root, 'MGM-7B')
}

/** Overwrites bf16 elements of a tensor with NaN, in whichever shard it lies. */
async function poison(folder: string, tensor: string, start: number, count: number): Promise<void> {
  const index = JSON.parse(await readFile(join(folder, 'model.safetensors.index.json'), 'utf8')) as {
    weight_map: Record<string, string>
  }
  const file = await open(join(folder, index.weight_map[tensor]!), 'r+')
  try {
    const head = Buffer.alloc(8)
    await file.read(head, 0, 8, 0)
    const length = Number(head.readBigUInt64LE())
    const header = Buffer.alloc(length)
    await file.read(header, 0, length, 8)
    const { dtype, data_offsets } = JSON.parse(header.toString())[tensor] as {
      dtype: string
      data_offsets: [number, number]
    }
    expect(dtype).toBe('BF16')
    const nan = Buffer.from(new Uint16Array(count).fill(0x7fc0).buffer)
    await file.write(nan, 0, nan.length, 8 + length + data_offsets[0] + 2 * start)
  } finally {
    await file.close()
  }
}

const load = (folder: string, options: LoadOptions = {}) =>
  rejection(
    MiniGemini.load(folder, { ...small, ...options }).then(async mgm => {
      await mgm.close()
    }),
  )

describe('loading', () => {
  it('names what is wrong with options', async () => {
    const cases: [unknown, RegExp][] = [
      [{ dtyp: 'f32' }, /^expected only the keys device, .* for options but received "dtyp"$/],
      [{ dtype: 'int3' }, /^expected one of 'f32', 'bf16', 'f16' for dtype but received "int3"$/],
      [{ threads: 0 }, /^expected an integer from 1 to 1024 for threads but received 0$/],
      [{ maxQueue: 1.5 }, /^expected an integer from 0 to 1000000 for maxQueue but received 1.5$/],
      [{ onProgress: 'yes' }, /^expected a function for onProgress but received "yes"$/],
      [{ signal: {} }, /^expected an AbortSignal for signal but received an instance of Object$/],
      [null, /^expected an object for options but received null$/],
      [{ device: 'tpu' }, /^expected 'cpu', 'cuda' or 'cuda:N' for device but received "tpu"$/],
    ]
    for (const [options, message] of cases) {
      const error = await rejection(MiniGemini.load(vicuna.folder, options as LoadOptions))
      expect(error).toMatchObject({ code: 'INVALID_ARGUMENT', message: expect.stringMatching(message) })
    }
    for (const checkpoint of ['', 7, null])
      expect((await rejection(MiniGemini.load(checkpoint as unknown as string))).message).toMatch(
        /^expected a folder or a hub repository owner\/name for checkpoint but received/,
      )
  })

  it('says what this version does not do', async () => {
    expect((await load(vicuna.folder, { deviceMap: 'auto', device: 'cpu' })).code).toBe('INVALID_ARGUMENT')
    expect(await load(vicuna.folder, { diffusion: vicuna.folder })).toMatchObject({
      code: 'CHECKPOINT_INVALID',
      message: expect.stringMatching(
        /^expected an SDXL pipeline in the layout of diffusers at .* no model_index\.json there$/,
      ),
    })
    expect(await load(vicuna.folder, { device: 'cuda:1' })).toMatchObject({
      code: 'DEVICE_UNAVAILABLE',
      message: expect.stringContaining('"cuda:1"'),
    })
  })

  it('refuses before loading what memory cannot hold, naming both amounts', async () => {
    const { kvMemory: _, ...options } = small
    const error = await rejection(MiniGemini.load(vicuna.folder, { ...options, memoryLimit: 2 ** 20 }))
    expect(error.code).toBe('OUT_OF_MEMORY')
    expect(error.message).toMatch(/needs \d+\.\d MiB \(weights 1\.\d MiB, .* but 1\.0 MiB are available/)
    expect(await load(vicuna.folder, { kvMemory: 100 })).toMatchObject({
      code: 'OUT_OF_MEMORY',
      message: expect.stringContaining('expected at least 24576 bytes'),
    })
  })

  it('names the file and tensor of a damaged checkpoint', async () => {
    expect((await load(join(scratch, 'nowhere'))).code).toBe('INVALID_ARGUMENT')

    const cut = await copyCase('cut')
    await truncate(join(cut, 'model-00001-of-00002.safetensors'), 5000)
    expect(await load(cut)).toMatchObject({
      code: 'CHECKPOINT_INVALID',
      message: expect.stringContaining('model-00001-of-00002.safetensors'),
    })

    const garbled = await copyCase('garbled')
    await writeFile(join(garbled, 'config.json'), '{"model_type": ')
    expect(await load(garbled)).toMatchObject({
      code: 'CHECKPOINT_INVALID',
      message: expect.stringContaining('config.json'),
    })

    const reshaped = await copyCase('reshaped')
    const config = JSON.parse(await readFile(join(reshaped, 'config.json'), 'utf8'))
    await writeFile(join(reshaped, 'config.json'), JSON.stringify({ ...config, intermediate_size: 160 }))
    expect(await load(reshaped)).toMatchObject({
      code: 'CHECKPOINT_INVALID',
      message: expect.stringMatching(/expected tensor "model.layers.0.mlp.*160.*but found.*176/),
    })

    const mute = await copyCase('mute')
    await rm(join(mute, 'tokenizer.model'))
    expect((await load(mute)).code).toBe('TOKENIZER_INVALID')

    const blind = await copyCase('blind')
    await rm(join(scratch, 'blind', 'model_zoo'), { recursive: true })
    expect(await load(blind)).toMatchObject({
      code: expect.stringMatching(/^CHECKPOINT/),
      message: expect.stringContaining('clip-vit-large-patch14-336'),
    })
  })

  it('stops when aborted, before and while it works', async () => {
    expect((await load(vicuna.folder, { signal: AbortSignal.abort() })).code).toBe('ABORTED')
    const controller = new AbortController()
    const error = await load(vicuna.folder, {
      signal: controller.signal,
      onProgress: () => controller.abort(),
    })
    expect(error.code).toBe('ABORTED')
  })
})

describe('requests', () => {
  let mgm: MiniGemini
  const golden = sample(vicuna, 'single')
  const good = (): ChatRequest => ({ messages: messagesOf(vicuna, golden), maxTokens: 24 })
  const chat = (more: object) => rejection(mgm.chat({ ...good(), ...more } as ChatRequest))
  const withImage = (image: unknown) =>
    chat({ messages: [{ role: 'user', content: [{ type: 'image', image }] }] })

  beforeAll(async () => {
    mgm = await MiniGemini.load(vicuna.folder, small)
  })
  afterAll(() => mgm.close())

  it('name what is wrong with them', async () => {
    const cases: [object, RegExp][] = [
      [{ maxToken: 5 }, /^expected only the keys messages, .* for request but received "maxToken"$/],
      [
        { messages: [] },
        /^expected a non-empty array of messages for messages but received an array of 0$|\[\]$/,
      ],
      [{ messages: 'hi' }, /^expected a non-empty array of messages for messages but received "hi"$/],
      [
        { messages: [{ role: 'robot', content: 'hi' }] },
        /^expected one of 'system', 'user', 'assistant' for messages\[0\]\.role but received "robot"$/,
      ],
      [
        { messages: [{ role: 'user', content: 5 }] },
        /^expected a string or an array of parts for messages\[0\]\.content but received 5$/,
      ],
      [
        { messages: [{ role: 'user', content: [{ type: 'text', text: 5 }] }] },
        /^expected a string for messages\[0\]\.content\[0\]\.text but received 5$/,
      ],
      [
        { messages: [{ role: 'user', content: [{ type: 'video', video: 'x' }] }] },
        /^expected a text part or an image part for messages\[0\]\.content\[0\]/,
      ],
      [
        { messages: [{ role: 'user', content: [{ type: 'image', image: 5 }] }] },
        /^expected a path, URL, Buffer or Uint8Array for messages\[0\]\.content\[0\]\.image but received 5$/,
      ],
      [
        { messages: [{ role: 'user', content: [{ type: 'text', text: 'a', size: 1 }] }] },
        /^expected only the keys type, text for messages\[0\]\.content\[0\] but received "size"$/,
      ],
      [{ messages: [{ role: 'assistant', content: 'hi' }] }, /expected "user" for messages\[0\]\.role/],
      [{ temperature: -1 }, /^expected a number from 0 to 100 for temperature but received -1$/],
      [{ temperature: Number.NaN }, /^expected a number from 0 to 100 for temperature but received NaN$/],
      [{ topP: 0 }, /^expected a number above 0, up to 1 for topP but received 0$/],
      [{ maxTokens: 0 }, /^expected an integer of at least 1 for maxTokens but received 0$/],
      [{ seed: 0.5 }, /^expected an integer of 64 bits for seed but received 0.5$/],
      [{ seed: 2n ** 64n }, /^expected an integer of 64 bits for seed but received 18446744073709551616$/],
      [{ stop: [''] }, /^expected a non-empty string for stop\[0\] but received ""$/],
      [{ stop: 5 }, /^expected a non-empty string or an array of them for stop but received 5$/],
      [{ stopTokenIds: [480] }, /^expected an id from 0 to 479 for stopTokenIds\[0\] but received 480$/],
      [{ logprobs: 21 }, /^expected an integer from 0 to 20 for logprobs but received 21$/],
      [{ conversation: 'none' }, /^expected one of 'default', .* for conversation but received "none"$/],
      [{ ocrHint: 'EXIT' }, /^expected an array of strings for ocrHint but received "EXIT"$/],
    ]
    for (const [more, message] of cases) {
      expect(await chat(more)).toMatchObject({
        code: 'INVALID_ARGUMENT',
        message: expect.stringMatching(message),
      })
    }
    expect((await rejection(mgm.chat(undefined as unknown as ChatRequest))).message).toBe(
      'expected an object for request but received undefined',
    )
  })

  it('are refused with special tokens in texts where that is asked for', async () => {
    const messages = [{ role: 'user', content: 'a</s>b' }]
    expect(await chat({ messages, allowSpecialTokens: false })).toMatchObject({
      code: 'INVALID_ARGUMENT',
      message: expect.stringContaining('</s>'),
    })
    expect((await chat({ messages, maxTokens: 1 })).code).toBe('no error')
  })

  it('survive bad pictures', async () => {
    const empty = join(scratch, 'empty.png')
    await writeFile(empty, '')
    const picture = await readFile(join(vicuna.root, golden.images[0]!))
    for (const image of [
      empty,
      Buffer.alloc(0),
      Buffer.from('not a picture at all'),
      picture.subarray(0, picture.length >> 1),
      scratch,
      join(scratch, 'nothing.png'),
    ])
      expect((await withImage(image)).code).toBe('IMAGE_INVALID')
    expect((await withImage('ftp://somewhere/a.png')).code).toBe('INVALID_ARGUMENT')
    expect((await mgm.chat(good())).tokens).toEqual(golden.generated_ids)
  })

  it('take a picture of 30000 x 1', async () => {
    const wide = await sharp({ create: { width: 30000, height: 1, channels: 3, background: 'red' } })
      .png()
      .toBuffer()
    const content = [{ type: 'image' as const, image: wide }]
    const answer = await mgm.chat({ messages: [{ role: 'user', content }], maxTokens: 4 })
    expect(answer.tokens.length).toBe(4)
  })

  it('that could never fit are refused at once, with the numbers', async () => {
    const messages = [{ role: 'user', content: 'word '.repeat(3000) }]
    const error = await chat({ messages })
    expect(error.code).toBe('CONTEXT_OVERFLOW')
    expect(error.message).toMatch(
      /^expected a prompt of at most 2047 positions .* received one of \d{4,}: the model's context is 2048/,
    )
    const images = Array.from({ length: 200 }, () => ({ type: 'image', image: '/not/there.png' }))
    expect(await chat({ messages: [{ role: 'user', content: images }] })).toMatchObject({
      code: 'CONTEXT_OVERFLOW',
    })
  })

  it('that were aborted beforehand do not start', async () => {
    const before = mgm.metrics.steps
    expect((await chat({ signal: AbortSignal.abort('why') })).code).toBe('ABORTED')
    expect(mgm.metrics.steps).toBe(before)
  })

  it('fail in a stream as they do in a chat', async () => {
    const run = async (request: object) => {
      for await (const _ of mgm.stream({ ...good(), ...request } as ChatRequest));
    }
    expect((await rejection(run({ maxTokens: 'many' }))).code).toBe('INVALID_ARGUMENT')
    expect((await rejection(run({ signal: AbortSignal.abort() }))).code).toBe('ABORTED')
    const content = [{ type: 'image', image: '/not/there.png' }]
    expect((await rejection(run({ messages: [{ role: 'user', content }] }))).code).toBe('IMAGE_INVALID')
  })
})

describe('NaN', () => {
  it('in all logits fails the request and leaves the model usable', async () => {
    const folder = await copyCase('nan-head')
    await poison(folder, 'lm_head.weight', 5 * 64, 64)
    const mgm = await MiniGemini.load(folder, small)
    try {
      const request = { messages: messagesOf(vicuna, sample(vicuna, 'single')), maxTokens: 3 }
      for (let i = 0; i < 2; i++)
        expect(await rejection(mgm.chat(request))).toMatchObject({
          code: 'NUMERIC',
          message: expect.stringContaining('NaN'),
        })
      expect(mgm.metrics.kvCache.usedPages).toBe(0)
    } finally {
      await mgm.close()
    }
  })

  it('in one request leaves its neighbours and its successors in the same pages alone', async () => {
    const golden = sample(vicuna, 'single')
    const folder = await copyCase('nan-row')
    // "ž" is no piece of its own: it comes as byte tokens, which no other prompt or answer here holds.
    const poisoned = 3 + 0xc5
    const clean = vicuna.samples.filter(other => !other.generated_ids.includes(poisoned))
    expect(clean.length).toBeGreaterThan(3)
    await poison(folder, 'model.embed_tokens.weight', poisoned * 64, 64)
    // So few pages that every one is used again.
    const mgm = await MiniGemini.load(folder, { ...small, kvMemory: 24 * 24 * 2 ** 10 })
    try {
      for (let round = 0; round < 2; round++) {
        const bad = rejection(mgm.chat({ messages: [{ role: 'user', content: 'ž'.repeat(150) }] }))
        const answers = await Promise.all(
          clean.map(other => mgm.chat({ messages: messagesOf(vicuna, other), maxTokens: 24 })),
        )
        expect((await bad).code).toBe('NUMERIC')
        expect(answers.map(answer => answer.tokens)).toEqual(clean.map(other => other.generated_ids))
      }
      expect((await mgm.chat({ messages: messagesOf(vicuna, golden), maxTokens: 1 })).tokens[0]).toBe(
        golden.generated_ids[0],
      )
    } finally {
      await mgm.close()
    }
  })
})

it('a closed model refuses everything, and closing again is fine', async () => {
  const mgm = await MiniGemini.load(gemma.folder, small)
  await Promise.all([mgm.close(), mgm.close()])
  await mgm[Symbol.asyncDispose]()
  const request: ChatRequest = { messages: [{ role: 'user', content: 'hi' }] }
  expect((await rejection(mgm.chat(request))).code).toBe('CLOSED')
  expect((await rejection(mgm.stream(request).next())).code).toBe('CLOSED')
  const results = await mgm.batch([request])
  expect(results[0]!.ok === false && results[0]!.error.code).toBe('CLOSED')
})
