import { join } from 'node:path'
import { afterAll, describe, expect, test } from 'vitest'
import type { UnetConfig } from '../../lib/checkpoint/diffusers.ts'
import { TensorMap } from '../../lib/checkpoint/tensor-map.ts'
import { openTensorFile } from '../../lib/checkpoint/weights.ts'
import { Device } from '../../lib/device.ts'
import { Loader } from '../../lib/models/loader.ts'
import { Unet, type UnetInputs } from '../../lib/models/unet.ts'
import { assertClose, FIXTURES, type Golden, readSafetensors, toNhwc } from '../helpers/safetensors.ts'
import { recorder, upload } from './support.ts'

// The oracle is diffusers' UNet2DConditionModel; the tolerance is that of the goldens' table.
const TOLERANCE = 1e-4

const config: UnetConfig = {
  in_channels: 4,
  out_channels: 4,
  block_out_channels: [16, 32, 64],
  down_block_types: ['DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'],
  up_block_types: ['CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'],
  layers_per_block: [2, 2, 2],
  transformer_layers_per_block: [1, 2, 3],
  attention_heads: [2, 4, 4],
  cross_attention_dim: 80,
  norm_num_groups: 8,
  norm_eps: 1e-5,
  addition_time_embed_dim: 8,
  projection_class_embeddings_input_dim: 96,
  time_cond_proj_dim: null,
  flip_sin_to_cos: true,
  freq_shift: 0,
  sample_size: 16,
}
const file = join(FIXTURES, 'sdxl-tiny/pipeline/unet/diffusion_pytorch_model.fp16.safetensors')
const numbers = readSafetensors(join(FIXTURES, 'sdxl-tiny/tensors/unet.safetensors'))
const golden = (name: string) => numbers.get(name)!

const device = Device.open('cpu')
const loader = new Loader(device)
const weights = new TensorMap('the unet', openTensorFile(file))
const unet = await Unet.load(loader, weights, config)
afterAll(async () => {
  loader.dispose()
  await device.close()
})

/** Rows `first`… of the images of a tensor [N, …]. */
function images({ data, shape, dtype }: Golden, first: number, count: number): Golden {
  const each = data.length / shape[0]!
  return { dtype, shape: [count, ...shape.slice(1)], data: data.slice(first * each, (first + count) * each) }
}

/** The inputs of images `first`…, and `body` with them. */
function withInputs<T>(
  first: number,
  count: number,
  timesteps: number[],
  body: (inputs: UnetInputs) => T,
): T {
  const prompt = upload(device, images(golden('encoder_hidden_states'), first, count))
  const pooled = upload(device, images(golden('text_embeds'), first, count))
  const ids = images(golden('time_ids_2'), first, count).data
  const timeIds = Array.from({ length: count }, (_, i) => [...ids.subarray(6 * i, 6 * i + 6)])
  try {
    return body({ prompt: prompt.reshape(-1, config.cross_attention_dim), pooled, timeIds, timesteps })
  } finally {
    prompt.dispose()
    pooled.dispose()
  }
}

async function run(latents: Golden, condition: ReturnType<Unet['condition']>, step = 0) {
  const out = device.scope(() => unet.forward(upload(device, latents), condition, step))
  const data = await out.readF32()
  out.dispose()
  return data
}

describe('Unet', () => {
  test('takes every tensor of the release', () => weights.finish())

  test('the reference, block by block', async () => {
    const { observe, get } = recorder()
    const [timestep] = golden('timestep').data
    const condition = withInputs(0, 2, [timestep!], inputs => unet.condition(inputs, observe))
    const latents = toNhwc(golden('latent'))
    const out = device.scope(() => unet.forward(upload(device, latents), condition, 0, observe))
    for (const name of ['time_proj', 'add_time_proj'])
      assertClose(name, await get(name), golden(`act.${name}`).data, TOLERANCE)
    const time = golden('act.time_embedding').data
    const silu = golden('act.add_embedding').data.map(
      (x, i) => (x + time[i]!) / (1 + Math.exp(-x - time[i]!)),
    )
    assertClose('embedding', await get('embedding'), silu, TOLERANCE)
    const blocks = [...numbers.keys()].filter(name => /^act\.(conv_in|(down|up)_blocks|mid_block)/.test(name))
    expect(blocks.length).toBe(11)
    for (const name of blocks) {
      const reference = golden(name)
      const expected = reference.shape.length === 4 ? toNhwc(reference) : reference
      assertClose(name, await get(name.slice(4)), expected.data, TOLERANCE)
    }
    expect(out.shape).toEqual(latents.shape)
    assertClose('out', await out.readF32(), toNhwc(golden('out')).data, TOLERANCE)
    out.dispose()
    condition.dispose()
  })

  test('latents whose size does not halve evenly', async () => {
    const [timestep] = golden('odd.timestep').data
    const condition = withInputs(1, 1, [timestep!], inputs => unet.condition(inputs))
    assertClose(
      'out',
      await run(toNhwc(golden('odd.latent')), condition),
      toNhwc(golden('odd.out')).data,
      TOLERANCE,
    )
    condition.dispose()
  })
})
