import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, describe, expect, test } from 'vitest'
import type { ClipConfig } from '../../lib/checkpoint/config.ts'
import { Device } from '../../lib/device.ts'
import { ClipEncoderLayer } from '../../lib/models/clip-encoder.ts'
import { ClipVision } from '../../lib/models/clip-vision.ts'
import { Loader } from '../../lib/models/loader.ts'
import { assertClose, FIXTURES, toNhwc } from '../helpers/safetensors.ts'
import { operatorCase, recorder, upload } from './support.ts'

// The oracle is transformers' CLIPVisionModel; tolerances are those of the goldens' table.
const TOLERANCE = 1e-4

interface LayerCase {
  file: string
  hidden: number
  heads: number
  intermediate: number
  tokens: number
}
const index = JSON.parse(readFileSync(join(FIXTURES, 'clip/index.json'), 'utf8')) as LayerCase[]
const device = Device.open('cpu')
afterAll(() => device.close())

const base: ClipConfig = {
  hidden_size: 32,
  intermediate_size: 64,
  num_hidden_layers: 4,
  num_attention_heads: 2,
  num_channels: 3,
  image_size: 56,
  patch_size: 14,
  hidden_act: 'quick_gelu',
  layer_norm_eps: 1e-5,
}

describe('ClipEncoderLayer', () => {
  test.each(index.filter(c => c.file.startsWith('layer')))('$file', async layerCase => {
    const { golden, weights } = operatorCase(`clip/${layerCase.file}`)
    const loader = new Loader(device)
    const layer = await ClipEncoderLayer.load(loader, weights, {
      ...base,
      hidden_size: layerCase.hidden,
      intermediate_size: layerCase.intermediate,
      num_attention_heads: layerCase.heads,
    })
    const input = golden('input')
    const [batch, tokens, channels] = input.shape as [number, number, number]
    const output = device.scope(() =>
      layer.forward(
        upload(device, input).reshape(batch * tokens, channels),
        device.tensor(
          Array.from({ length: batch + 1 }, (_, b) => b * tokens),
          [batch + 1],
          'i32',
        ),
      ),
    )
    assertClose('output', await output.readF32(), golden('output').data, TOLERANCE)
    output.dispose()
    loader.dispose()
  })
})

describe('ClipVision', () => {
  const { golden, weights } = operatorCase('clip/tower.safetensors')
  const pixels = toNhwc(golden('pixel_values'))

  test('every hidden state up to the selected one', async () => {
    const loader = new Loader(device)
    const tower = await ClipVision.load(loader, weights, base, { layer: -1, feature: 'cls_patch' })
    const { observe, get } = recorder()
    const output = device.scope(() => tower.forward(upload(device, pixels), observe))
    assertClose('embeddings', await get('embeddings'), golden('embeddings').data, TOLERANCE)
    for (let i = 0; i <= 4; i++)
      assertClose(`hidden_${i}`, await get(`hidden_${i}`), golden(`hidden_${i}`).data, TOLERANCE)
    assertClose('all rows', await output.readF32(), golden('hidden_4').data, TOLERANCE)
    output.dispose()
    loader.dispose()
  })

  test('the patches of the selected layer, and no layer beyond it', async () => {
    const loader = new Loader(device)
    const { weights } = operatorCase('clip/tower.safetensors')
    const tower = await ClipVision.load(loader, weights, base, { layer: -2, feature: 'patch' })
    const { observe, get } = recorder()
    const output = device.scope(() => tower.forward(upload(device, pixels), observe))
    expect(output.shape).toEqual([2 * tower.tokens, 32])
    assertClose('selected', await output.readF32(), golden('selected').data, TOLERANCE)
    expect(() => get('hidden_4')).toThrow('nothing was observed as hidden_4')
    expect(() =>
      weights.finish([/post_layernorm|layers\.3\.|pixel|embeddings$|hidden|selected/]),
    ).not.toThrow()
    output.dispose()
    loader.dispose()
  })

  test('a picture gives the same rows whatever it is batched with', async () => {
    const loader = new Loader(device)
    const tower = await ClipVision.load(loader, operatorCase('clip/tower.safetensors').weights, base, {
      layer: -2,
      feature: 'patch',
    })
    const both = device.scope(() => tower.forward(upload(device, pixels)))
    const second = device.scope(() => tower.forward(upload(device, pixels).narrow(0, 1, 1)))
    const rows = await both.readF32()
    expect(await second.readF32()).toEqual(rows.slice(rows.length / 2))
    for (const tensor of [both, second]) tensor.dispose()
    loader.dispose()
  })

  test('refuses a layer that is not there', async () => {
    const loader = new Loader(device)
    const load = ClipVision.load(loader, weights, base, { layer: -6, feature: 'patch' })
    await expect(load).rejects.toThrow(/mm_vision_select_layer/)
    loader.dispose()
  })

  test('disposing the loader frees everything', async () => {
    await device.synchronize()
    const before = device.memory().used
    const loader = new Loader(device)
    const tower = await ClipVision.load(loader, weights, base, { layer: -2, feature: 'patch' })
    expect(loader.byteLength).toBeGreaterThan(0)
    device.scope(() => tower.forward(upload(device, pixels))).dispose()
    loader.dispose()
    await device.synchronize()
    expect(device.memory().used).toBe(before)
  })
})
