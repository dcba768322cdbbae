import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { openDiffusion } from '../../lib/checkpoint/diffusers.ts'
import { Device } from '../../lib/device.ts'
import { diffusionBytes } from '../../lib/engine/memory.ts'
import { type DenoiseItem, type DenoisePlan, type Denoising, Sdxl } from '../../lib/models/sdxl.ts'
import { NEGATIVE_PROMPT } from '../../lib/processing/image-prompt.ts'
import { FIXTURES, readSafetensors, toNhwc } from '../helpers/safetensors.ts'
import { expectClose, floats, openDevice } from '../ops/helpers.ts'

const root = join(FIXTURES, 'sdxl-tiny')
const golden = (file: string) => {
  const numbers = readSafetensors(join(root, 'tensors', `${file}.safetensors`))
  return (name: string) => numbers.get(name)!
}
const pipeline = golden('pipeline')
const text = golden('text')
const prompt = 'A small red house by the sea, with a boat and two trees'

// goldens/README.md: f32 against f32, largest difference seen 2e-6; latents (deviation about 10) 4e-5 after eight steps.
const NETWORK = { absolute: 1e-4 }
const LATENTS = { absolute: 2e-3 }

describe('SDXL as the reference', () => {
  const device = openDevice()
  let sdxl: Sdxl
  beforeAll(async () => {
    sdxl = await Sdxl.load(device, openDiffusion(join(root, 'pipeline')))
  })
  afterAll(() => sdxl.dispose())

  const item = (more: Partial<DenoiseItem> = {}): DenoiseItem => ({
    prompt,
    negativePrompt: NEGATIVE_PROMPT,
    guidance: 5,
    seed: 1n,
    ...more,
  })
  const plan = (more: Partial<DenoisePlan> & { steps?: number } = {}): DenoisePlan => ({
    height: 96,
    width: 128,
    guided: true,
    schedule: sdxl.schedule({ steps: more.steps ?? 8 }),
    ...more,
  })
  const noise = () => {
    const { data, shape } = toNhwc(pipeline('latents_in'))
    return device.tensor(data, shape)
  }
  const latentsOf = async (run: Denoising) => {
    const seen: Float32Array[] = []
    while (!run.done) {
      run.step()
      seen.push(await floats(run.latents))
    }
    return seen
  }

  it('encodes prompts', async () => {
    const { prompt: states, pooled } = sdxl.encodePrompts([prompt, NEGATIVE_PROMPT, null, prompt])
    const rows = await floats(states)
    const zeros = new Float32Array(77 * 80)
    const expected = [text('prompt_embeds').data, text('negative_prompt_embeds').data, zeros]
    ;[...expected, expected[0]!].forEach((want, i) => {
      expectClose(rows.subarray(i * 77 * 80, (i + 1) * 77 * 80), want as Float32Array, NETWORK, `prompt ${i}`)
    })
    const wanted = ['pooled_prompt_embeds', 'negative_pooled_prompt_embeds'].flatMap(name => [
      ...(text(name).data as Float32Array),
    ])
    expectClose((await floats(pooled)).subarray(0, 96), wanted, NETWORK, 'pooled')
    expect((await floats(pooled)).subarray(96, 144)).toEqual(new Float32Array(48))
    states.dispose()
    pooled.dispose()
  })

  it('denoises, step by step, and decodes to the same picture', async () => {
    const run = sdxl.denoise(plan(), [item()], noise())
    const seen = await latentsOf(run)
    for (const [i, latents] of seen.entries())
      expectClose(latents, toNhwc(pipeline(`latents_step_${i}`)).data, LATENTS, `latents after step ${i}`)
    const pixels = sdxl.decode(run.latents)
    expect(pixels.shape).toEqual([1, 96, 128, 3])
    const bytes = (await pixels.read()) as Uint8Array
    const expected = pipeline('image_u8').data as ArrayLike<number>
    let worst = 0
    for (const [i, byte] of bytes.entries()) worst = Math.max(worst, Math.abs(byte - expected[i]!))
    expect(worst).toBeLessThanOrEqual(1)
    pixels.dispose()
    run.dispose()
  })

  it('takes no negative prompt for zeros', async () => {
    const run = sdxl.denoise(
      plan({ schedule: sdxl.schedule({ steps: 2 }) }),
      [item({ negativePrompt: null })],
      noise(),
    )
    for (const [i, latents] of (await latentsOf(run)).entries())
      expectClose(latents, toNhwc(pipeline(`no_negative.latents_step_${i}`)).data, LATENTS, `step ${i}`)
    run.dispose()
  })

  it('leaves the unconditional half out without guidance', async () => {
    const run = sdxl.denoise(
      plan({ schedule: sdxl.schedule({ steps: 2 }), guided: false }),
      [item()],
      noise(),
    )
    for (const [i, latents] of (await latentsOf(run)).entries())
      expectClose(latents, toNhwc(pipeline(`guidance_1.latents_step_${i}`)).data, LATENTS, `step ${i}`)
    run.dispose()
  })

  it.each(['euler', 'euler_ancestral', 'dpmpp_2m', 'ddim', 'lcm'] as const)(
    'gives an image the same latents alone, in a batch, and after others have left (%s)',
    async sampler => {
      const options = plan({ schedule: sdxl.schedule({ steps: 4, sampler }) })
      const items = [
        item({ seed: 5n, prompt: 'one', guidance: 3 }),
        item({ seed: 2n ** 63n + 6n, prompt: 'two of them' }),
        item({ seed: 7n, prompt: '', negativePrompt: null, guidance: 7.5 }),
      ]
      const alone: Float32Array[] = []
      for (const one of items) {
        const run = sdxl.denoise(options, [one])
        alone.push((await latentsOf(run)).at(-1)!)
        run.dispose()
      }
      const together = sdxl.denoise(options, items)
      const size = alone[0]!.length
      const all = (await latentsOf(together)).at(-1)!
      for (const [i, latents] of alone.entries())
        expect(all.subarray(i * size, (i + 1) * size), `image ${i}`).toEqual(latents)
      together.dispose()

      const fewer = sdxl.denoise(options, items)
      fewer.step()
      fewer.keep([0, 2])
      fewer.step()
      fewer.keep([1])
      expect(fewer.length).toBe(1)
      expect((await latentsOf(fewer)).at(-1)).toEqual(alone[2])
      fewer.dispose()
    },
  )

  it('other seeds give other latents', async () => {
    const starts = [1n, 2n, 2n ** 32n + 1n].map(seed => sdxl.denoise(plan(), [item({ seed })]))
    const numbers = await Promise.all(starts.map(run => floats(run.latents)))
    expect(numbers[0]).not.toEqual(numbers[1])
    expect(numbers[0]).not.toEqual(numbers[2])
    for (const run of starts) run.dispose()
  })

  it('starts from a picture, the nearer the smaller the strength', async () => {
    const [height, width] = [96, 128]
    const image = Float32Array.from(
      { length: height * width * 3 },
      (_, i) => Math.sin(i / 700) * Math.cos((i % (width * 3)) / 90),
    )
    const clean = device.tensor(image, [1, height, width, 3])
    const latents = sdxl.encode(clean)
    const start = await floats(latents)
    const distances: number[] = []
    for (const strength of [0.2, 0.6, 1]) {
      const schedule = sdxl.schedule({ steps: 10, strength })
      const run = sdxl.denoise(plan({ schedule, guided: false }), [item({ image })])
      expect(run.steps).toBe(Math.round(10 * strength))
      const first = await floats(run.latents)
      distances.push(Math.hypot(...first.map((x, i) => x - start[i]!)))
      run.dispose()
    }
    expect(distances[0]!).toBeLessThan(distances[1]!)
    expect(distances[1]!).toBeLessThan(distances[2]!)
    clean.dispose()
    latents.dispose()
  })

  it('starts each image of a batch from its own picture, which some share', async () => {
    const pictures = [1, 2].map(k =>
      Float32Array.from({ length: 96 * 128 * 3 }, (_, i) => Math.sin(i / (99 * k))),
    )
    const schedule = sdxl.schedule({ steps: 4, strength: 0.5 })
    const options = plan({ schedule, guided: false })
    const items = [0, 1, 0].map((which, i) => item({ image: pictures[which]!, seed: BigInt(i) }))
    const startOf = async (some: typeof items) => {
      const run = sdxl.denoise(options, some)
      const latents = await floats(run.latents)
      run.dispose()
      return latents
    }
    const alone = await Promise.all(items.map(one => startOf([one])))
    expect(await startOf(items)).toEqual(Float32Array.from(alone.flatMap(latents => [...latents])))
  })

  it('frees what a run held', async () => {
    await device.synchronize()
    const before = device.memory().used
    for (let i = 0; i < 3; i++) {
      const run = sdxl.denoise(plan(), [item(), item({ seed: 3n })])
      run.step()
      run.keep([1])
      run.step()
      run.dispose()
    }
    await device.synchronize()
    expect(device.memory().used).toBe(before)
  })

  it('needs about what was planned for it', async () => {
    const checkpoint = openDiffusion(join(root, 'pipeline'))
    const planned = diffusionBytes(checkpoint)
    // Panels of packed matrices are filled up to whole vectors, which shows where matrices are this small.
    expect(sdxl.byteLength / planned).toBeGreaterThan(1)
    expect(sdxl.byteLength / planned).toBeLessThan(1.3)
    const fresh = Device.open('cpu')
    const own = await Sdxl.load(fresh, checkpoint)
    await fresh.synchronize()
    const before = fresh.memory()
    const run = own.denoise(plan({ height: 128, width: 128 }), [
      item(),
      item({ prompt: 'another', seed: 2n }),
    ])
    run.step()
    own.decode(run.latents.narrow(0, 0, 1)).dispose()
    await fresh.synchronize()
    const { used, peak } = fresh.memory()
    expect(peak).toBeGreaterThan(before.peak)
    // The text encoders' work and the latents are not in the estimate, and memory is pooled in steps of up to a quarter.
    const share = (peak - before.used) / Sdxl.bytesAt(checkpoint, 'f32', { images: 2 })
    expect(share).toBeGreaterThan(0.9)
    expect(share).toBeLessThan(1.5)
    run.dispose()
    await fresh.synchronize()
    expect(fresh.memory().used).toBeLessThan(used)
    own.dispose()
    await fresh.close()
  })

  it('refuses sizes that are no multiple of 8', () => {
    expect(() => sdxl.denoise(plan({ height: 100 }), [item()])).toThrow(
      'expected a positive multiple of 8 for height but received 100',
    )
  })
})
