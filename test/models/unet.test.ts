import { join } from 'node:path'
import { afterAll, describe, expect, test } from 'vitest'
import type { UnetConfig } from '../../lib/checkpoint/diffusers.ts'
import { TensorMap } from '../../lib/checkpoint/tensor-map.ts'
import { openTensorFile } from '../../lib/checkpoint/weights.ts'
import { Device } from '../../lib/device.ts'
import { Loader } from '../../lib/models/loader.ts'
import { Unet, type UnetInputs } from '../../lib/models/unet.ts'
import { Random } from '../helpers/random.ts'
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
  const embedded = images(golden('encoder_hidden_states'), first, count)
  const prompt = device.tensor(embedded.data, [count * 77, config.cross_attention_dim])
  const pooled = upload(device, images(golden('text_embeds'), first, count))
  const ids = images(golden('time_ids_2'), first, count).data
  const timeIds = Array.from({ length: count }, (_, i) => [...ids.subarray(6 * i, 6 * i + 6)])
  try {
    return body({ prompt, pooled, timeIds, timesteps })
  } finally {
    prompt.dispose()
    pooled.dispose()
  }
}

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

  // Recorded with the inputs of the second image.
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

  test('an image is the same bit for bit alone, in a batch, and in what is left of it', async () => {
    const timesteps = [999, 741, 1]
    // Neither side halves evenly.
    const latents = { dtype: 'F32', shape: [2, 7, 5, 4], data: new Random(3).normals(2 * 7 * 5 * 4) }
    const both = withInputs(0, 2, timesteps, inputs => unet.condition(inputs))
    for (const [step, timestep] of timesteps.entries()) {
      const [a, b] = await Promise.all(
        [0, 1].map(async i => {
          const alone = withInputs(i, 1, [timestep], inputs => unet.condition(inputs))
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

  test('a distilled model embeds its guidance scale', async () => {
    // Any matrix [16, width] of the release serves as the projection.
    const width = 64
    const projection = 'down_blocks.0.resnets.0.time_emb_proj.weight'
    const entries = openTensorFile(file)
    const distilled = new TensorMap('a distilled unet', [
      ...entries,
      ['time_embedding.cond_proj.weight', entries.get(projection)!],
    ])
    const own = new Loader(device)
    const model = await Unet.load(own, distilled, { ...config, time_cond_proj_dim: width })
    distilled.finish()
    const { observe, get } = recorder()
    const guidance = [1, 8.5]
    const condition = withInputs(0, 2, [741], inputs => model.condition({ ...inputs, guidance }, observe))

    const stored = readSafetensors(file)
    const dense = (name: string, x: number[]) => {
      const [out, input] = stored.get(`${name}.weight`)!.shape as [number, number]
      const { data } = stored.get(`${name}.weight`)!
      const bias = stored.get(`${name}.bias`)!.data
      return Array.from({ length: out }, (_, o) =>
        x.reduce((sum, value, i) => sum + value * data[o * input + i]!, bias[o]!),
      )
    }
    const silu = (x: number) => x / (1 + Math.exp(-x))
    const reference = guidance.flatMap((scale, image) => {
      const frequencies = Array.from({ length: width / 2 }, (_, i) => 10000 ** (-i / (width / 2 - 1)))
      const angles = frequencies.map(frequency => 1000 * (scale - 1) * frequency)
      const embedded = [...angles.map(Math.sin), ...angles.map(Math.cos)]
      const matrix = stored.get(projection)!.data
      const time = [...golden('act.time_proj').data.subarray(0, 16)].map((t, o) =>
        embedded.reduce((sum, value, i) => sum + value * matrix[o * width + i]!, t),
      )
      const added = golden('act.add_embedding').data.subarray(image * 64, image * 64 + 64)
      const h = dense('time_embedding.linear_1', time).map(silu)
      return dense('time_embedding.linear_2', h).map((x, i) => silu(x + added[i]!))
    })
    assertClose('embedding', await get('embedding'), Float32Array.from(reference), TOLERANCE)
    condition.dispose()
    expect(() => withInputs(0, 2, [741], inputs => model.condition(inputs))).toThrow(
      'expected a guidance scale for each of 2 images for guidance but received undefined',
    )
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
      const model = await Unet.load(own, new TensorMap('the unet', openTensorFile(file)), config)
      const condition = model.condition({
        prompt: fresh.zeros([n * 77, 80]),
        pooled: fresh.zeros([n, 48]),
        timeIds: Array.from({ length: n }, () => [0, 0, 0, 0, 0, 0]),
        timesteps: [1],
      })
      const latents = fresh.zeros([n, height, width, 4])
      const { used, peak } = fresh.memory()
      const out = fresh.scope(() => model.forward(latents, condition, 0))
      const activations = fresh.memory().peak - used
      expect(fresh.memory().peak, 'loading does not hide it').toBeGreaterThan(peak)
      // Blocks of memory are up to a quarter larger than what was asked for.
      const estimate = model.bytesAt(height, width, n)
      expect(activations / estimate).toBeGreaterThan(1)
      expect(activations / estimate).toBeLessThan(1.25)
      await out.read()
      own.dispose()
      await fresh.close()
    },
  )

  test('says what does not fit', () => {
    const condition = withInputs(0, 2, [741], inputs => unet.condition(inputs))
    const forward = (shape: number[], step: number) => () =>
      device.scope(() => unet.forward(device.zeros(shape), condition, step))
    const change = (changed: Partial<UnetInputs>) => () =>
      withInputs(0, 2, [741], inputs => unet.condition({ ...inputs, ...changed }))
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
    const condition = withInputs(0, 2, [741], inputs => unet.condition(inputs))
    expect(device.memory().used - before).toBeGreaterThanOrEqual(condition.byteLength)
    device.scope(() => void unet.forward(upload(device, toNhwc(golden('latent'))), condition, 0))
    condition.dispose()
    expect(device.memory().used).toBe(before)
  })
})
