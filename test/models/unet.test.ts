import { afterAll, describe, expect, test } from 'vitest'
import type { UnetConfig } from '../../lib/checkpoint/diffusers.ts'
import { Device } from '../../lib/device.ts'
import { Loader, under } from '../../lib/models/loader.ts'
import { Unet, type UnetInputs } from '../../lib/models/unet.ts'
import { Random } from '../helpers/random.ts'
import { assertClose, type Golden, toNhwc } from '../helpers/safetensors.ts'
import { operatorCase, recorder, upload } from './support.ts'
import { activations, golden, images, openUnet, withInputs } from './unet-case.ts'

// The oracle is diffusers' UNet2DConditionModel; the tolerance is that of the goldens' table.
const TOLERANCE = 1e-4

const device = Device.open('cpu')
const loader = new Loader(device)
const { weights, config } = openUnet()
const unet = await Unet.load(loader, weights, config)
afterAll(async () => {
  loader.dispose()
  await device.close()
})

const cpu = { device, dtype: 'f32' } as const

/** What the model predicts at a step. */
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
    const condition = withInputs(cpu, [0, 2], [timestep!], inputs => unet.condition(inputs, observe))
    const latents = toNhwc(golden('latent'))
    const out = device.scope(() => unet.forward(upload(device, latents), condition, 0, observe))
    for (const name of ['time_proj', 'add_time_proj'])
      assertClose(name, await get(name), golden(`act.${name}`).data, TOLERANCE)
    const time = golden('act.time_embedding').data
    const silu = golden('act.add_embedding').data.map(
      (x, i) => (x + time[i]!) / (1 + Math.exp(-x - time[i]!)),
    )
    assertClose('embedding', await get('embedding'), silu, TOLERANCE)
    for (const name of activations) {
      const reference = golden(`act.${name}`)
      const expected = reference.shape.length === 4 ? toNhwc(reference) : reference
      assertClose(name, await get(name), expected.data, TOLERANCE)
    }
    expect(out.shape).toEqual(latents.shape)
    assertClose('out', await out.readF32(), toNhwc(golden('out')).data, TOLERANCE)
    out.dispose()
    condition.dispose()
  })

  // Recorded with the inputs of the second image.
  test('latents whose size does not halve evenly', async () => {
    const [timestep] = golden('odd.timestep').data
    const condition = withInputs(cpu, [1, 1], [timestep!], inputs => unet.condition(inputs))
    assertClose(
      'out',
      await run(toNhwc(golden('odd.latent')), condition),
      toNhwc(golden('odd.out')).data,
      TOLERANCE,
    )
    condition.dispose()
  })

  test('an image is the same bit for bit alone, in a batch, and in what is left of it', async () => {
    const timesteps = [999, 741, 1]
    // Neither side halves evenly.
    const latents = { dtype: 'F32', shape: [2, 7, 5, 4], data: new Random(3).normals(2 * 7 * 5 * 4) }
    const both = withInputs(cpu, [0, 2], timesteps, inputs => unet.condition(inputs))
    for (const [step, timestep] of timesteps.entries()) {
      const [a, b] = await Promise.all(
        [0, 1].map(async i => {
          const alone = withInputs(cpu, [i, 1], [timestep], inputs => unet.condition(inputs))
          const out = await run(images(latents, i, 1), alone)
          alone.dispose()
          return out
        }),
      )
      expect(await run(latents, both, step)).toEqual(Float32Array.of(...a!, ...b!))
      const left = both.select([1, 0, 1])
      const mixed = {
        ...latents,
        shape: [3, 7, 5, 4],
        data: Float32Array.of(...[1, 0, 1].flatMap(i => [...images(latents, i, 1).data])),
      }
      expect(await run(mixed, left, step)).toEqual(Float32Array.of(...b!, ...a!, ...b!))
      left.dispose()
    }
    both.dispose()
  })

  // tools/unet_fixture.py
  test('levels of all kinds, a guidance scale, five numbers of size and crop', async () => {
    const uneven = operatorCase('sdxl-unet/uneven.safetensors')
    const config: UnetConfig = {
      in_channels: 4,
      out_channels: 3,
      block_out_channels: [8, 16, 12],
      down_block_types: ['CrossAttnDownBlock2D', 'DownBlock2D', 'CrossAttnDownBlock2D'],
      up_block_types: ['UpBlock2D', 'CrossAttnUpBlock2D', 'CrossAttnUpBlock2D'],
      layers_per_block: [1, 3, 2],
      transformer_layers_per_block: [2, 1, 3],
      attention_heads: [2, 4, 3],
      cross_attention_dim: 20,
      norm_num_groups: 4,
      norm_eps: 1e-5,
      addition_time_embed_dim: 6,
      projection_class_embeddings_input_dim: 40,
      time_cond_proj_dim: 14,
      flip_sin_to_cos: false,
      freq_shift: 1,
      sample_size: 16,
    }
    const own = new Loader(device)
    const model = await Unet.load(own, under(uneven.weights, 'unet.'), config)
    uneven.weights.finish([/^(?!unet\.)/])
    const [prompt, timeIds] = [uneven.golden('encoder_hidden_states').data, uneven.golden('time_ids').data]
    const inputs = {
      prompt: device.tensor(prompt, [22, 20]),
      pooled: upload(device, uneven.golden('text_embeds')),
      timeIds: [[...timeIds.subarray(0, 5)], [...timeIds.subarray(5)]],
      timesteps: [...uneven.golden('timestep').data],
    }
    const condition = model.condition({ ...inputs, guidance: [...uneven.golden('guidance').data] })
    const out = device.scope(() =>
      model.forward(upload(device, toNhwc(uneven.golden('latent'))), condition, 0),
    )
    assertClose('out', await out.readF32(), toNhwc(uneven.golden('out')).data, TOLERANCE)
    expect(() => model.condition(inputs)).toThrow(
      'expected a guidance scale for each of 2 images for guidance but received undefined',
    )
    for (const tensor of [inputs.prompt, inputs.pooled, out, condition]) tensor.dispose()
    own.dispose()
  })

  test.each([
    [24, 40, 2],
    [33, 17, 1],
  ])(
    '%i × %i latents: the activations of %i images need the memory that was estimated',
    async (height, width, n) => {
      const fresh = Device.open('cpu')
      const own = new Loader(fresh)
      const model = await Unet.load(own, openUnet().weights, config)
      const condition = model.condition({
        prompt: fresh.zeros([n * 77, 80]),
        pooled: fresh.zeros([n, 48]),
        timeIds: Array.from({ length: n }, () => [0, 0, 0, 0, 0, 0]),
        timesteps: [1],
      })
      const latents = fresh.zeros([n, height, width, 4])
      const { used, peak } = fresh.memory()
      const out = fresh.scope(() => model.forward(latents, condition, 0))
      const needed = fresh.memory().peak - used
      expect(fresh.memory().peak, 'loading does not hide it').toBeGreaterThan(peak)
      // Blocks of memory are up to a quarter larger than what was asked for.
      const estimate = Unet.bytesAt(config, 'f32', { images: n, height, width })
      expect(needed / estimate).toBeGreaterThan(1)
      expect(needed / estimate).toBeLessThan(1.25)
      await out.read()
      own.dispose()
      await fresh.close()
    },
  )

  test('says what does not fit', () => {
    const condition = withInputs(cpu, [0, 2], [741], inputs => unet.condition(inputs))
    const forward = (shape: number[], step: number) => () =>
      device.scope(() => unet.forward(device.zeros(shape), condition, step))
    const change = (changed: Partial<UnetInputs>) => () =>
      withInputs(cpu, [0, 2], [741], inputs => unet.condition({ ...inputs, ...changed }))
    expect(forward([1, 8, 8, 4], 0)).toThrow(
      'expected [2, height, width, 4] for latents but received [1, 8, 8, 4]',
    )
    expect(forward([2, 8, 8, 9], 0)).toThrow(
      'expected [2, height, width, 4] for latents but received [2, 8, 8, 9]',
    )
    expect(forward([2, 8, 8, 4], 1)).toThrow('expected an integer from 0 to 0 for step but received 1')
    expect(change({ timesteps: [] })).toThrow('expected at least one for timesteps but received []')
    expect(change({ timeIds: [[1, 2, 3, 4, 5, 6]] })).toThrow(
      'expected 6 numbers for each of 2 images for timeIds but received [6]',
    )
    expect(() => device.scope(change({ prompt: device.zeros([154, 81]) }))).toThrow(
      'expected [2·tokens, 80] for prompt but received [154, 81]',
    )
    expect(() => condition.select([2])).toThrow('expected integers from 0 to 1 for images but received [2]')
    expect(() => condition.select([])).toThrow('expected integers from 0 to 1 for images but received []')
    condition.dispose()
  })

  test('frees everything but its results', () => {
    const before = device.memory().used
    const condition = withInputs(cpu, [0, 2], [741], inputs => unet.condition(inputs))
    expect(device.memory().used - before).toBeGreaterThanOrEqual(condition.byteLength)
    device.scope(() => void unet.forward(upload(device, toNhwc(golden('latent'))), condition, 0))
    condition.dispose()
    expect(device.memory().used).toBe(before)
  })
})
