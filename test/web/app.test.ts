import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import type { Hono } from 'hono'
import sharp from 'sharp'
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { generateScene } from '../../lib/demo/world.ts'
import type { MiniGemini } from '../../lib/index.ts'
import { type AppOptions, createApp } from '../../lib/web/index.ts'
import type { ChatBody, InfoReply, SceneReply, WireEvent } from '../../lib/web/wire.ts'
import { sample, vicuna } from '../e2e/cases.ts'
import { linger, loadTiny, say } from './planted.ts'

let mgm: MiniGemini
let app: Hono
beforeAll(async () => {
  mgm = await loadTiny()
  app = createApp(mgm)
})
beforeEach(() => {
  linger(0)
  return say(null)
})
afterAll(() => mgm.close())

const single = sample(vicuna, 'single')
const dataUrl = (bytes: Uint8Array) => `data:image/png;base64,${Buffer.from(bytes).toString('base64')}`
const picture = dataUrl(readFileSync(join(vicuna.root, single.images[0]!)))
const asking = (image: string, text = single.turns[0]!): ChatBody => ({
  messages: [
    {
      role: 'user',
      content: [
        { type: 'image', image },
        { type: 'text', text },
      ],
    },
  ],
  maxTokens: 24,
})

function post(path: string, body: unknown, init: RequestInit & { to?: Hono } = {}): Promise<Response> {
  const { to = app, headers, ...rest } = init
  return Promise.resolve(
    to.request(path, {
      method: 'POST',
      body: typeof body === 'string' ? body : JSON.stringify(body),
      headers: { 'content-type': 'application/json', ...headers },
      ...rest,
    }),
  )
}

async function eventsOf(response: Response): Promise<WireEvent[]> {
  expect(response.headers.get('content-type')).toMatch('text/event-stream')
  const text = await response.text()
  return text
    .split('\n\n')
    .filter(block => block !== '')
    .map(block => JSON.parse(block.replace(/^data: /, '')))
}

async function refusal(response: Response): Promise<{ status: number; code: string; message: string }> {
  const body = (await response.json()) as { error: { code: string; message: string } }
  expect(Object.keys(body)).toEqual(['error'])
  expect(body.error.message).not.toMatch(/node_modules|\n\s+at /)
  return { status: response.status, ...body.error }
}

describe('the page', () => {
  it.each([
    ['/', 'text/html'],
    ['/main.js', 'text/javascript'],
    ['/style.css', 'text/css'],
    ['/licences.txt', 'text/plain'],
  ])('%s is %s', async (path, type) => {
    const response = await app.request(path)
    expect(response.status).toBe(200)
    expect(response.headers.get('content-type')).toMatch(type)
    expect((await response.text()).length).toBeGreaterThan(500)
  })

  it('lets nothing run in it but its own files', async () => {
    for (const path of ['/', '/api/info', '/nowhere']) {
      const { headers } = await app.request(path)
      const policy = headers.get('content-security-policy')
      expect(policy).toMatch("default-src 'none'")
      expect(policy).toMatch("script-src 'self'")
      expect(policy).not.toMatch('unsafe')
      expect(headers.get('x-content-type-options')).toBe('nosniff')
      expect(headers.get('x-frame-options')).toBe('DENY')
      expect(headers.get('referrer-policy')).toBe('no-referrer')
    }
  })
})

describe('GET /api/info', () => {
  it('tells what the page needs to know', async () => {
    const info = (await (await app.request('/api/info')).json()) as InfoReply
    expect(info).toMatchObject({ family: 'llama', device: 'cpu', canDraw: true, scenePixels: 256 })
    expect(info.about).toMatch('small demo model')
    // Where a checkpoint lies is nobody's business.
    expect(JSON.stringify(info)).not.toMatch(vicuna.root)
  })
})

describe('POST /api/chat', () => {
  it('answers about a picture, with text as it comes', async () => {
    const events = await eventsOf(await post('/api/chat', asking(picture)))
    const done = events.at(-1)!
    expect(done).toMatchObject({ type: 'done', text: single.text, finishReason: 'length' })
    expect(events.map(event => (event.type === 'text' ? event.delta : '')).join('')).toBe(single.text)
    expect(done.type === 'done' && done.timings.totalMs).toBeGreaterThan(0)
  })

  it.each([
    ['a path', join(vicuna.root, single.images[0]!)],
    ['a relative path', 'package.json'],
    ['a file: URL', `file://${join(vicuna.root, single.images[0]!)}`],
    ['an https: URL', 'https://example.com/a.png'],
    ['an http: URL to this machine', 'http://127.0.0.1:1/a.png'],
  ])('refuses %s', async (_, image) => {
    expect(await refusal(await post('/api/chat', asking(image)))).toMatchObject({
      status: 400,
      code: 'INVALID_ARGUMENT',
      message: expect.stringContaining('expected a data: URL for messages[0].content[0].image'),
    })
  })

  it.each([
    ['no JSON', '{', /expected JSON for the request body/],
    ['no object', '7', /expected an object for request/],
    ['no messages', { messages: [] }, /expected a non-empty array of messages/],
    ['an unknown key', { messages: [{ role: 'user', content: 'hi' }], device: 'cuda' }, /only the keys/],
    ['a signal', { messages: [{ role: 'user', content: 'hi' }], signal: {} }, /only the keys/],
    ['too many tokens', { messages: [{ role: 'user', content: 'hi' }], maxTokens: 1e9 }, /from 1 to 512/],
    ['too many steps', { messages: [{ role: 'user', content: 'hi' }], draw: { steps: 999 } }, /from 1 to 50/],
    [
      'a picture as a number',
      { messages: [{ role: 'user', content: [{ type: 'image', image: 7 }] }] },
      /a path/,
    ],
    ['an assistant last', { messages: [{ role: 'assistant', content: 'hi' }] }, /user/],
    ['special tokens', { messages: [{ role: 'user', content: 'hi </s>' }] }, /special token/],
  ])('refuses %s', async (_, body, message) => {
    expect(await refusal(await post('/api/chat', body))).toMatchObject({
      status: 400,
      code: 'INVALID_ARGUMENT',
      message: expect.stringMatching(message),
    })
  })

  it('refuses what is no picture', async () => {
    for (const bytes of ['hello', '<svg xmlns="http://www.w3.org/2000/svg"/>', ''])
      expect(await refusal(await post('/api/chat', asking(dataUrl(Buffer.from(bytes)))))).toMatchObject({
        status: 400,
        code: 'IMAGE_INVALID',
      })
  })

  it('refuses a large picture by its header', async () => {
    const black = { width: 5000, height: 4000, channels: 3 as const, background: 'black' }
    const file = await sharp({ create: black }).png().toBuffer()
    // Not one pixel of it could be decoded.
    const cut = dataUrl(file.subarray(0, 200))
    expect(await refusal(await post('/api/chat', asking(cut)))).toMatchObject({
      status: 413,
      code: 'TOO_LARGE',
      message: expect.stringContaining(
        '16000000 pixels for messages[0].content[0].image but received 5000 x 4000',
      ),
    })
  })

  it('refuses more than four pictures', async () => {
    const content = Array.from({ length: 5 }, () => ({ type: 'image' as const, image: picture }))
    expect(await refusal(await post('/api/chat', { messages: [{ role: 'user', content }] }))).toMatchObject({
      status: 400,
      message: expect.stringContaining('at most 4 pictures'),
    })
  })

  it('refuses a body that is too large, announced or not', async () => {
    const body = JSON.stringify(asking(`data:image/png;base64,${'A'.repeat(9 * 2 ** 20)}`))
    const announced = await post('/api/chat', body, { headers: { 'content-length': String(body.length) } })
    expect(await refusal(announced)).toMatchObject({ status: 413, code: 'TOO_LARGE' })
    expect(await refusal(await post('/api/chat', body))).toMatchObject({ status: 413, code: 'TOO_LARGE' })
  })

  it('refuses a question that does not fit the context', async () => {
    const messages = [{ role: 'user', content: 'one two three '.repeat(3000) }]
    expect(await refusal(await post('/api/chat', { messages }))).toMatchObject({
      status: 400,
      code: 'CONTEXT_OVERFLOW',
    })
  })

  it('draws what the model says', async () => {
    await say('Here: <h>A small red house.</h>')
    const body = { messages: [{ role: 'user', content: 'Draw a house.' }], draw: { steps: 3, seed: 11 } }
    const events = await eventsOf(await post('/api/chat', body))
    const kinds = events.map(event => event.type).filter((type, i, all) => type !== all[i - 1])
    expect(kinds).toEqual(['text', 'prompt', 'step', 'drawn'])
    expect(events.filter(event => event.type === 'step')).toMatchObject(
      [1, 2, 3].map(step => ({ step, steps: 3, preview: expect.stringMatching(/^data:image\/png;base64,/) })),
    )
    const drawn = events.at(-1)!
    expect(drawn).toMatchObject({ type: 'drawn', prompt: 'A small red house.', images: [{ seed: 11 }] })
    const { url, width, height } = (drawn as Extract<WireEvent, { type: 'drawn' }>).images[0]!
    const { info } = await sharp(Buffer.from(url.split(',')[1]!, 'base64')).toBuffer({
      resolveWithObject: true,
    })
    expect(info).toMatchObject({ format: 'png', width, height })

    const again = await eventsOf(
      await post('/api/draw', { prompt: 'A small red house.', steps: 3, seed: 11 }),
    )
    expect(again.at(-1)).toMatchObject({ type: 'drawn', images: [{ url }] })
  })

  it('says so where there is nothing to draw', async () => {
    await say('I would rather not.')
    const body = { messages: [{ role: 'user', content: 'Draw a house.' }], draw: {} }
    const events = await eventsOf(await post('/api/chat', body))
    expect(events.at(-1)).toMatchObject({
      type: 'drawn',
      text: 'I would rather not.',
      prompt: null,
      images: [],
    })
  })

  it('a request that fails does not hurt its neighbours', async () => {
    const replies = await Promise.all([
      post('/api/chat', asking(picture)).then(eventsOf),
      post('/api/chat', asking('nowhere.png')).then(refusal),
      post('/api/chat', asking(picture)).then(eventsOf),
      post('/api/chat', asking(dataUrl(Buffer.from('hello')))).then(refusal),
    ])
    expect(replies[0].at(-1)).toMatchObject({ text: single.text })
    expect(replies[2].at(-1)).toMatchObject({ text: single.text })
  })

  it('ends a request whose client has gone', async () => {
    linger(20)
    const running = () => mgm.metrics.running + mgm.metrics.waiting
    const gone = new AbortController()
    const body = { messages: [{ role: 'user', content: 'Tell me everything.' }], maxTokens: 512 }
    const early = post('/api/chat', body, { signal: gone.signal })
    gone.abort()
    expect(await refusal(await early)).toMatchObject({ code: 'ABORTED' })

    const reader = (await post('/api/chat', body)).body!.getReader()
    expect((await reader.read()).done).toBe(false)
    expect(running()).toBe(1)
    await reader.cancel()
    expect(running()).toBe(0)
  })
})

describe('POST /api/draw', () => {
  it.each([
    ['no prompt', {}, /non-empty string for prompt/],
    ['a size', { prompt: 'a house', width: 8192 }, /only the keys/],
    ['a picture to draw over', { prompt: 'a house', image: '/etc/passwd' }, /only the keys/],
  ])('refuses %s', async (_, body, message) => {
    expect(await refusal(await post('/api/draw', body))).toMatchObject({
      status: 400,
      code: 'INVALID_ARGUMENT',
      message: expect.stringMatching(message),
    })
  })
})

describe('/api/scene', () => {
  it('gives the scene of a seed, and what to ask about it', async () => {
    const reply = (await (await app.request('/api/scene?seed=5')).json()) as SceneReply
    expect(reply.seed).toBe(5)
    expect(reply.scenes[0]).toEqual(generateScene(5))
    expect(reply.questions.first.length).toBeGreaterThan(2)
    expect(reply.questions.both).toHaveLength(1)
    expect(reply.questions.draw).toHaveLength(1)
  })

  it('without a seed gives one that training never showed', async () => {
    const seeds = await Promise.all(
      [1, 2, 3].map(async () => ((await (await app.request('/api/scene')).json()) as SceneReply).seed),
    )
    expect(new Set(seeds).size).toBe(3)
    expect(seeds.map(seed => seed % 3)).toEqual([2, 2, 2])
  })

  it.each(['-1', '1.5', 'many', '', '9007199254740993'])('refuses the seed %j', async seed => {
    expect(await refusal(await app.request(`/api/scene?seed=${seed}`))).toMatchObject({
      status: 400,
      code: 'INVALID_ARGUMENT',
    })
  })

  it('draws a scene', async () => {
    const response = await post('/api/scene', generateScene(5))
    expect(response.headers.get('content-type')).toBe('image/png')
    const { info } = await sharp(await response.arrayBuffer()).toBuffer({ resolveWithObject: true })
    expect(info).toMatchObject({ format: 'png', width: 256, height: 256 })
  })

  it('refuses what is no scene', async () => {
    const scene = generateScene(5)
    for (const body of [{}, [], { ...scene, objects: [{ ...scene.objects[0], kind: 'dragon' }] }])
      expect(await refusal(await post('/api/scene', body))).toMatchObject({
        status: 400,
        code: 'INVALID_ARGUMENT',
        message: expect.stringContaining('scene'),
      })
  })
})

describe('strangers', () => {
  const to = (host: string, init: RequestInit = {}) =>
    app.request('/api/info', { ...init, headers: { host, ...init.headers } })

  it.each(['localhost', 'localhost:8080', '127.0.0.1:1', '[::1]:8080', '127.1.2.3'])(
    '%s is us',
    async host => {
      expect((await to(host)).status).toBe(200)
    },
  )

  it.each([
    'example.com',
    'localhost.example.com',
    '127.0.0.1.example.com',
    'localhost:80:80',
    '10.0.0.1',
    '',
  ])('the host %j is not', async host => {
    expect(await refusal(await to(host))).toMatchObject({ status: 403, code: 'FORBIDDEN' })
  })

  it('other hosts are ours if we say so', async () => {
    const named = createApp(mgm, { hosts: ['Demo.example'] } satisfies AppOptions)
    const ask = (host: string) => named.request('/api/info', { headers: { host } })
    expect((await ask('demo.example:80')).status).toBe(200)
    expect((await ask('other.example')).status).toBe(403)
  })

  it.each([
    ['another origin', { origin: 'https://example.com' }],
    ['another port', { origin: 'http://localhost:8080' }],
    ['no origin at all', { origin: 'null' }],
    ['another site', { 'sec-fetch-site': 'cross-site' }],
  ])('a write from %s is refused', async (_, headers) => {
    const reply = await refusal(await post('/api/scene', generateScene(5), { headers }))
    expect(reply).toMatchObject({ status: 403, code: 'FORBIDDEN' })
  })

  it('a write from our own page is not', async () => {
    const headers = { origin: 'http://localhost', 'sec-fetch-site': 'same-origin' }
    expect((await post('/api/scene', generateScene(5), { headers })).status).toBe(200)
  })

  it('a form cannot write', async () => {
    const headers = { 'content-type': 'text/plain' }
    expect(await refusal(await post('/api/scene', generateScene(5), { headers }))).toMatchObject({
      status: 415,
      code: 'UNSUPPORTED_MEDIA_TYPE',
    })
  })
})

describe('errors', () => {
  it('are a page for browsers, JSON for others', async () => {
    const path = '/<script>alert(1)</script>'
    const page = await app.request(path, { headers: { accept: 'text/html,*/*;q=0.8' } })
    expect(page.status).toBe(404)
    const text = await page.text()
    expect(text).toMatch('NOT_FOUND')
    expect(text).not.toMatch('<script')
    expect(await refusal(await app.request(path))).toMatchObject({ status: 404, code: 'NOT_FOUND' })
    const refused = await app.request('/', { headers: { host: 'example.com', accept: 'text/html' } })
    expect(refused.status).toBe(403)
    expect(await refused.text()).toMatch('FORBIDDEN')
  })

  it('name the methods that there are', async () => {
    const response = await app.request('/api/chat')
    expect(response.headers.get('allow')).toBe('POST')
    expect(await refusal(response)).toMatchObject({ status: 405, code: 'METHOD_NOT_ALLOWED' })
  })

  it('that are bugs are told to the log only', async () => {
    const seen: unknown[] = []
    const broken = createApp(mgm, { onError: error => seen.push(error) })
    const bug = new TypeError('secret: cannot read /home/someone/file')
    broken.get('/broken', () => {
      throw bug
    })
    const reply = await refusal(await broken.request('/broken'))
    expect(reply).toMatchObject({ status: 500, code: 'INTERNAL' })
    expect(reply.message).not.toMatch('secret')
    expect(seen).toEqual([bug])
    expect(await refusal(await broken.request('/nowhere'))).toMatchObject({ status: 404 })
    expect(seen).toHaveLength(1)
  })

  it('of the engine keep their codes: a full queue, a closed model', async () => {
    linger(20)
    const busy = await loadTiny({ maxSequences: 1, maxQueue: 0 })
    const to = createApp(busy)
    const body = { messages: [{ role: 'user', content: 'Tell me everything.' }], maxTokens: 512 }
    const reader = (await post('/api/chat', body, { to })).body!.getReader()
    const full = await post('/api/chat', body, { to })
    expect(full.headers.get('retry-after')).toBe('1')
    expect(await refusal(full)).toMatchObject({ status: 429, code: 'QUEUE_FULL' })

    await busy.close()
    let rest = ''
    for (let chunk = await reader.read(); !chunk.done; chunk = await reader.read())
      rest += new TextDecoder().decode(chunk.value)
    expect(rest).toMatch(/data: \{"type":"error","error":\{"code":"CLOSED"[^\n]*\n\n$/)
    expect(await refusal(await post('/api/chat', body, { to }))).toMatchObject({
      status: 503,
      code: 'CLOSED',
    })
  })
})
