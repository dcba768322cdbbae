import { describe, expect, it } from 'vitest'
import { Device } from '../../lib/device.ts'
import { MiniGemini } from '../../lib/index.ts'
import { messagesOf, rejection, sample, vicuna } from '../e2e/cases.ts'
import { testDriver } from './helpers.ts'

// The first launch that splices embeddings and the first replay of a graph fail, each once.
const library = testDriver({
  MGM_EMULATOR_DEVICES: '80:96M,80:2M',
  MGM_EMULATOR_FAIL: 'splice=700,cuGraphLaunch=719',
})

const request = { messages: messagesOf(vicuna, sample(vicuna, 'single')), maxTokens: 4 }
const load = (options = {}) =>
  MiniGemini.load(vicuna.folder, {
    device: 'cuda',
    dtype: 'f16',
    maxSequences: 2,
    kvMemory: 2 ** 20,
    ...options,
  })

describe.skipIf(library === null)('serving from a GPU', { timeout: 300_000 }, () => {
  it('fails the requests of a dead context, says so to the later ones, and starts again after another load', async () => {
    for (let failure = 0; failure < 2; failure++) {
      const mgm = await load()
      const [first, second] = await Promise.all([rejection(mgm.chat(request)), rejection(mgm.chat(request))])
      expect(first).toMatchObject({ code: 'DEVICE_LOST' })
      expect(second).toMatchObject({ code: 'DEVICE_LOST' })
      const later = await rejection(mgm.chat(request))
      expect(later).toMatchObject({
        code: 'DEVICE_LOST',
        message: expect.stringContaining('close the device and open it again'),
      })
      await mgm.close()
    }
    const mgm = await load()
    expect((await mgm.chat(request)).tokens.length).toBe(4)
    await mgm.close()
  })

  it('refuses a request that memory is too short for, and answers the next', async () => {
    const mgm = await load()
    const expected = (await mgm.chat(request)).tokens
    // Somebody else takes all there is.
    const other = Device.open('cuda')
    const taken = []
    for (let size = 64 << 20; size >= 1 << 12; size >>= 1)
      for (;;)
        try {
          taken.push(other.empty([size], 'u8'))
        } catch {
          break
        }
    expect(taken.length).toBeGreaterThan(0)
    const long = { ...request, messages: messagesOf(vicuna, sample(vicuna, 'two_images')) }
    expect(await rejection(mgm.chat(long))).toMatchObject({
      code: 'OUT_OF_MEMORY',
      message: expect.stringMatching(/expected \d+ free bytes for a tensor but received \d+/),
    })
    for (const tensor of taken) tensor.dispose()
    expect((await mgm.chat(request)).tokens).toEqual(expected)
    await other.close()
    await mgm.close()
  })

  it('plans memory before it loads anything', async () => {
    expect(await rejection(load({ device: 'cuda:1' }))).toMatchObject({
      code: 'OUT_OF_MEMORY',
      message: expect.stringMatching(
        /the model needs .* \(weights .*, KV cache .*, work .*\) but .* are available/,
      ),
    })
    expect(await rejection(load({ memoryLimit: 1000 }))).toMatchObject({ code: 'OUT_OF_MEMORY' })
  })

  it('refuses too long a prompt, and types that a GPU does not compute in', async () => {
    const mgm = await load()
    const words = Array.from({ length: 5000 }, () => 'word').join(' ')
    expect(await rejection(mgm.chat({ messages: [{ role: 'user', content: words }] }))).toMatchObject({
      code: 'CONTEXT_OVERFLOW',
    })
    expect((await mgm.chat(request)).tokens.length).toBe(4)
    await mgm.close()
    expect(await rejection(load({ dtype: 'f32' }))).toMatchObject({ code: 'UNSUPPORTED' })
    expect(await rejection(load({ kvDtype: 'f32' }))).toMatchObject({ code: 'UNSUPPORTED' })
  })
})
