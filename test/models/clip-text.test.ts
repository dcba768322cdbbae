import { join } from 'node:path'
import { afterAll, describe, expect, test } from 'vitest'
import { openDiffusion, textIgnored } from '../../lib/checkpoint/diffusers.ts'
import { Device } from '../../lib/device.ts'
import { ClipText } from '../../lib/models/clip-text.ts'
import { Loader } from '../../lib/models/loader.ts'
import { assertClose, FIXTURES, readSafetensors } from '../helpers/safetensors.ts'
import { recorder } from './support.ts'

// The oracle is transformers' CLIPTextModel; the tolerance is that of the goldens' table.
const TOLERANCE = 1e-4
const LENGTH = 77

const { textEncoders } = openDiffusion(join(FIXTURES, 'sdxl-tiny/pipeline'))
const numbers = readSafetensors(join(FIXTURES, 'sdxl-tiny/tensors/text.safetensors'))
const golden = (name: string) => numbers.get(name)!.data
const PROMPTS = ['prompt', 'negative', 'short']

const device = Device.open('cpu')
const loader = new Loader(device)
const encoders = await Promise.all(
  textEncoders.map(({ weights, config, projection }) =>
    ClipText.load(loader, weights, config, { projection }),
  ),
)
afterAll(async () => {
  loader.dispose()
  await device.close()
})

async function run(encoder: ClipText, ids: Int32Array) {
  const { penultimate, pooled } = encoder.forward(ids)
  const states = { penultimate: await penultimate.readF32(), pooled: await pooled?.readF32() }
  penultimate.dispose()
  pooled?.dispose()
  return states
}

/** The second encoder with another end token. */
async function withEnd(eos_token_id: number, ids: Int32Array): Promise<Float32Array> {
  const { weights, config } = textEncoders[1]
  const own = new Loader(device)
  const encoder = await ClipText.load(own, weights, { ...config, eos_token_id }, { projection: true })
  const { pooled } = await run(encoder, ids)
  own.dispose()
  return pooled!
}

describe.each([1, 2])('ClipText, encoder %d', n => {
  const encoder = encoders[n - 1]!
  const files = textEncoders[n - 1]!
  const ids = (name: string) => Int32Array.from(golden(`${name}.ids_${n}`))

  test('takes every tensor but those it leaves out by name', () => {
    files.weights.finish(textIgnored(files))
  })

  test.each(PROMPTS)('%s', async name => {
    const { penultimate, pooled } = await run(encoder, ids(name))
    assertClose('penultimate', penultimate, golden(`${name}.penultimate_${n}`), TOLERANCE)
    if (files.projection) assertClose('pooled', pooled!, golden(`${name}.pooled`), TOLERANCE)
    else expect(pooled).toBeUndefined()
  })

  test('a prompt gives the same beside others, bit for bit', async () => {
    const together = await run(encoder, Int32Array.from(PROMPTS.flatMap(name => [...ids(name)])))
    for (const [i, name] of PROMPTS.entries()) {
      const alone = await run(encoder, ids(name))
      const part = (all: Float32Array, size: number) => all.slice(i * size, (i + 1) * size)
      expect(part(together.penultimate, alone.penultimate.length)).toEqual(alone.penultimate)
      if (alone.pooled) expect(part(together.pooled!, alone.pooled.length)).toEqual(alone.pooled)
    }
  })

  test('shows the state after every layer', async () => {
    const { observe, get } = recorder()
    const result = device.scope(() => encoder.forward(ids('prompt'), observe).penultimate)
    const last = await get(`hidden_${files.config.num_hidden_layers - 1}`)
    expect(last).toEqual(await result.readF32())
    result.dispose()
  })

  test('refuses ids of another length', () => {
    expect(() => encoder.forward(new Int32Array(LENGTH + 1))).toThrow(
      /^expected a multiple of 77 ids for ids but received/,
    )
    expect(() => encoder.forward(new Int32Array(0))).toThrow(/^expected a multiple of 77 ids/)
  })
})

describe('the end token', () => {
  // Token 320 is the largest, at position 2; token 30 comes first at position 4.
  const ids = Int32Array.from({ length: LENGTH }, (_, i) => [10, 20, 320, 7, 30, 8][i] ?? 30 - (i % 2))

  test('is the largest for a config that says 2, else the first of its id', async () => {
    const legacy = await withEnd(2, ids)
    expect(await withEnd(320, ids)).toEqual(legacy)
    const pooled = await withEnd(30, ids)
    expect(pooled).not.toEqual(legacy)

    // Tokens see only those before them, which shows where the pooled state was taken.
    const changed = (at: number) => ids.map((id, i) => (i === at ? 11 : id))
    expect(await withEnd(30, changed(5))).toEqual(pooled)
    expect(await withEnd(30, changed(3))).not.toEqual(pooled)
  })
})
