import { createServer, request } from 'node:http'
import type { AddressInfo } from 'node:net'
import { afterAll, beforeAll, describe, expect, it, vi } from 'vitest'
import type { MiniGemini } from '../../lib/index.ts'
import { serve, type WebServer } from '../../lib/web/index.ts'
import { rejection } from '../e2e/cases.ts'
import { linger, loadTiny } from './planted.ts'

let mgm: MiniGemini
let server: WebServer
beforeAll(async () => {
  linger(20)
  mgm = await loadTiny()
  server = await serve(mgm)
})
afterAll(async () => {
  await server.close()
  await mgm.close()
})

const body = JSON.stringify({ messages: [{ role: 'user', content: 'Tell me everything.' }], maxTokens: 512 })
const busy = () => mgm.metrics.running + mgm.metrics.waiting

function chat(to: WebServer, signal?: AbortSignal): Promise<Response> {
  const headers = { 'content-type': 'application/json' }
  return fetch(new URL('api/chat', to.url), { method: 'POST', body, headers, ...(signal && { signal }) })
}

describe('serve', () => {
  it('listens on this machine only, on a free port', async () => {
    expect(server.url).toMatch(/^http:\/\/127\.0\.0\.1:\d+\/$/)
    expect((await fetch(server.url)).status).toBe(200)
    expect((await fetch(new URL('nowhere', server.url))).status).toBe(404)
  })

  it('says so where the port is taken', async () => {
    const other = createServer()
    await new Promise<void>(resolve => {
      other.listen(0, '127.0.0.1', resolve)
    })
    const { port } = other.address() as AddressInfo
    expect(await rejection(serve(mgm, { port }))).toEqual({
      code: 'INVALID_ARGUMENT',
      message: `cannot listen on port ${port} of 127.0.0.1: it is in use; take another one, or 0 for any that is free`,
    })
    other.close()
  })

  it.each([
    [{ port: 70000 }, /an integer from 0 to 65535 for port/],
    [{ port: 1.5 }, /an integer from 0 to 65535 for port/],
    [{ host: '0.0.0.0' }, /a local address, or the names .* for host but received "0\.0\.0\.0"/],
    [{ host: '::' }, /for host/],
  ])('refuses %j', async (options, message) => {
    expect(await rejection(serve(mgm, options))).toMatchObject({
      code: 'INVALID_ARGUMENT',
      message: expect.stringMatching(message),
    })
  })

  it('refuses a foreign Host', async () => {
    const status = await new Promise(resolve => {
      request(server.url, { headers: { host: 'example.com' } }, response =>
        resolve(response.statusCode),
      ).end()
    })
    expect(status).toBe(403)
  })

  it('ends the request of a client that disconnects, in the middle of it or before it began', async () => {
    const middle = new AbortController()
    const reader = (await chat(server, middle.signal)).body!.getReader()
    expect((await reader.read()).done).toBe(false)
    expect(busy()).toBe(1)
    middle.abort()
    await vi.waitFor(() => expect(busy()).toBe(0))
    expect(mgm.metrics.finished).toBe(0)

    const before = new AbortController()
    const refused = rejection(chat(server, before.signal))
    await vi.waitFor(() => expect(busy()).toBe(1), { interval: 1 })
    before.abort()
    await refused
    await vi.waitFor(() => expect(busy()).toBe(0))
    expect(mgm.metrics.finished).toBe(0)
  })

  it('close ends its requests; the model stays', async () => {
    const other = await serve(mgm)
    const reader = (await chat(other)).body!.getReader()
    await reader.read()
    await other.close()
    await vi.waitFor(() => expect(busy()).toBe(0))
    expect(await rejection(fetch(other.url))).toMatchObject({ message: 'fetch failed' })
    expect(
      (await mgm.chat({ messages: [{ role: 'user', content: 'Hello' }], maxTokens: 4 })).tokens,
    ).toHaveLength(4)
  })
})
