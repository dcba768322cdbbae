import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { openCheckpoint } from '../../lib/checkpoint/weights.ts'
import { Device } from '../../lib/device.ts'
import { type LoadModelOptions, MgmModel } from '../../lib/models/mgm.ts'
import { resizeBilinear } from '../../lib/ops.ts'
import { assertClose, FIXTURES, type Golden, readSafetensors, toNhwc } from '../helpers/safetensors.ts'
import { argmax, greedy, recorder, upload } from './support.ts'

// The oracle is the official program in f32 (test/fixtures); tolerances are those of the goldens' table, where one's own
// low-resolution picture allows the second figure.
const TOLERANCE = {
  images: 1e-4,
  stages: 1e-4,
  clip: 3e-4,
  mined: 5e-4,
  features: 5e-4,
  hidden: 2e-3,
  logits: 2e-3,
}
// Through one's own image features.
const LOOSE = { hidden: 1e-2, logits: 4e-3 }

interface Sample {
  name: string
  images: string[]
  n_embeds: number
  generated_ids: number[]
}
interface Case {
  model_dir: string
  samples: Sample[]
  report: { tokenizer_len?: number; logits_dim: number }
}

const device = Device.open('cpu')
afterAll(() => device.close())

function openCase(name: string) {
  const folder = join(FIXTURES, name)
  const { model_dir, samples, report } = JSON.parse(
    readFileSync(join(folder, 'samples.json'), 'utf8'),
  ) as Case
  const goldens = (file: string) => {
    const numbers = readSafetensors(join(folder, 'tensors', `${file}.safetensors`))
    return (tensor: string): Golden => {
      const golden = numbers.get(tensor)
      if (!golden) throw new Error(`${name}/${file} has no tensor ${tensor}`)
      return golden
    }
  }
  const image = (path: string) => goldens(`image_${path.replace(/^images\/|\.png$/g, '')}`)
  const load = (options: Partial<LoadModelOptions> = {}) =>
    MgmModel.load(device, openCheckpoint(join(folder, model_dir)), {
      vocabSize: report.logits_dim,
      ...options,
    })
  return { folder, samples, goldens, image, load, modelFolder: join(folder, model_dir) }
}

const names = readdirSync(FIXTURES).filter(name => /^mgm-.*-tiny$/.test(name))

describe.each(names)('%s', name => {
  const { samples, goldens, image, load } = openCase(name)
  const isHd = name.includes('hd')
  let model: MgmModel
  beforeAll(async () => {
    model = await load()
  })
  afterAll(() => model.dispose())

  const sampleEmbeds = samples.map(sample => goldens(`sample_${sample.name}`)('inputs_embeds').data)

  test('a picture: every step of the dual encoder', async () => {
    const golden = image('images/a_land.png')
    const { observe, get } = recorder()
    const features = device.scope(() =>
      model.encodeImages(upload(device, toNhwc(golden('images_aux'))), observe),
    )
    const check = async (tensor: string, expected: Float32Array, atol: number) =>
      assertClose(tensor, await get(tensor), expected, atol)

    // images [1, (crops, global,) 3, s, s]
    const images = golden('images')
    const side = images.shape.at(-1)!
    const views = toNhwc({ ...images, shape: [images.data.length / (3 * side * side), 3, side, side] }).data
    const oneView = 3 * side * side
    const clipFeat = golden('clip_feat').data
    if (isHd) {
      const crops = views.length / oneView - 1
      const rows = clipFeat.length / (crops + 1)
      await check('images', views.subarray(0, crops * oneView), TOLERANCE.images)
      await check('images_global', views.subarray(crops * oneView), TOLERANCE.images)
      await check('clip_feat', clipFeat.subarray(0, crops * rows), TOLERANCE.clip)
      await check('clip_feat_global', clipFeat.subarray(crops * rows), TOLERANCE.clip)
      await check('embed_feat_global', golden('embed_feat_global').data, TOLERANCE.mined)
    } else {
      await check('images', views, TOLERANCE.images)
      await check('clip_feat', clipFeat, TOLERANCE.clip)
    }
    for (const stage of [0, 1, 2, 3])
      await check(`stage_${stage}`, toNhwc(golden(`stage_${stage}`)).data, TOLERANCE.stages)
    await check('embed_feat', golden('embed_feat').data, TOLERANCE.mined)
    await check('projector_in', golden('projector_in').data, TOLERANCE.mined)
    await check('image_features', golden('image_features').data, TOLERANCE.features)
    expect(features.shape).toEqual([model.tokensPerImage, model.hiddenSize])
    features.dispose()
  })

  test('two pictures in a batch give what each gives alone, bit for bit', async () => {
    const pixels = toNhwc(image('images/a_land.png')('images_aux'))
    const flipped = { ...pixels, data: pixels.data.toReversed() }
    const both = new Float32Array(2 * pixels.data.length)
    both.set(pixels.data)
    both.set(flipped.data, pixels.data.length)
    const encode = async (data: Float32Array, count: number) => {
      const features = device.scope(() =>
        model.encodeImages(device.tensor(data, [count, ...pixels.shape.slice(1)])),
      )
      const numbers = await features.readF32()
      features.dispose()
      return numbers
    }
    const together = await encode(both, 2)
    const half = together.length / 2
    expect(together.subarray(0, half)).toEqual(await encode(pixels.data, 1))
    expect(together.subarray(half)).toEqual(await encode(flipped.data, 1))
  })

  test.each(samples)('$name: inputs_embeds', async sample => {
    const golden = goldens(`sample_${sample.name}`)
    const embeds = device.scope(() =>
      model.splice(
        Int32Array.from(golden('input_ids').data),
        sample.images.map(path => {
          const features = image(path)('image_features')
          return upload(device, features).reshape(-1, model.hiddenSize)
        }),
      ),
    )
    expect(embeds.shape).toEqual([sample.n_embeds, model.hiddenSize])
    assertClose('inputs_embeds', await embeds.readF32(), golden('inputs_embeds').data, 1e-9)
    embeds.dispose()
  })

  test('the hidden states and logits of every prompt position', async () => {
    const golden = goldens('sample_single')
    const { hidden, logits, layers } = await prefill(model, golden('inputs_embeds').data)
    for (let i = 0; i <= layers; i++)
      assertClose(`hidden_${i}`, await hidden(`hidden_${i}`), golden(`hidden_${i}`).data, TOLERANCE.hidden)
    assertClose('prefill_logits', logits, golden('prefill_logits').data, TOLERANCE.logits)
  })

  test.each(samples)('$name: summary of the logits of every prompt position', async sample => {
    const golden = goldens(`sample_${sample.name}`)
    const { logits } = await prefill(model, golden('inputs_embeds').data)
    const vocab = model.vocabSize
    const logsumexp = golden('prefill_logsumexp').data
    const received = logsumexp.map((_, p) => {
      const row = logits.subarray(p * vocab, (p + 1) * vocab)
      const top = row.reduce((a, b) => Math.max(a, b))
      return top + Math.log(row.reduce((sum, x) => sum + Math.exp(x - top), 0))
    })
    assertClose('logsumexp', received, logsumexp, TOLERANCE.logits)
    assertClose('last', logits.subarray(-vocab), golden('prefill_logits_last').data, TOLERANCE.logits)
    const ids = Array.from(logsumexp, (_, p) => argmax(logits.subarray(p * vocab, (p + 1) * vocab)))
    // A near tie among the positions that no one generates from may fall either way.
    for (const [p, id] of golden('prefill_argmax').data.entries()) {
      const gap = logits[p * vocab + ids[p]!]! - logits[p * vocab + id]!
      expect(gap).toBeLessThan(2 * TOLERANCE.logits)
    }
  })

  test('24 greedy ids and their logits, all samples batched, prompts in chunks', async () => {
    const results = await greedy(model, sampleEmbeds, 24, { chunk: 37 })
    for (const [s, sample] of samples.entries()) {
      expect(results[s]!.ids, sample.name).toEqual(sample.generated_ids)
      const expected = goldens(`sample_${sample.name}`)('step_logits').data
      const received = Float32Array.from(results[s]!.logits.flatMap(row => Array.from(row)))
      assertClose(`${sample.name} step_logits`, received, expected, TOLERANCE.logits)
    }
    // What a sequence is batched with, its chunks and its pages do not change a bit.
    for (const s of [0, 3]) {
      const [alone] = await greedy(model, [sampleEmbeds[s]!], 24, { pageSize: 32 })
      expect(alone).toEqual(results[s])
    }
  })

  test('from the pixels to the ids', async () => {
    const sample = samples.find(({ name }) => name === 'single')!
    const golden = goldens('sample_single')
    const embeds = device.scope(() => {
      const pixels = upload(device, toNhwc(image('images/a_land.png')('images_aux')))
      return model.splice(Int32Array.from(golden('input_ids').data), [model.encodeImages(pixels)])
    })
    const numbers = await embeds.readF32()
    embeds.dispose()
    assertClose('inputs_embeds', numbers, golden('inputs_embeds').data, TOLERANCE.features)
    const { hidden, layers } = await prefill(model, numbers)
    assertClose('hidden', await hidden(`hidden_${layers}`), golden(`hidden_${layers}`).data, LOOSE.hidden)
    const [result] = await greedy(model, [numbers], 24)
    expect(result!.ids).toEqual(sample.generated_ids)
    const received = Float32Array.from(result!.logits.flatMap(row => Array.from(row)))
    assertClose('step_logits', received, golden('step_logits').data, LOOSE.logits)
  })

  test.each(['f32', 'bf16', 'f16'] as const)('%s storage holds the weights exactly', async dtype => {
    const stored = await load({ dtype })
    const expected = goldens('sample_single')
    const { logits } = await prefill(stored, sampleEmbeds[0]!)
    assertClose('prefill_logits', logits, expected('prefill_logits').data, TOLERANCE.logits)
    stored.dispose()
  })

  // Random weights and a flat attention amplify what rounding does (about eightfold over three layers; a router that
  // turns to another expert adds to it), so the first layer is held to more than the logits are.
  test.each([
    { quantize: 'int8', layer: 0.04, logits: 0.2 },
    { quantize: 'int4', layer: 0.4, logits: 0.85 },
  ] as const)('$quantize: bounded relative error of hidden states and logits', async limits => {
    const { quantize } = limits
    const quantized = await load({ quantize })
    expect(quantized.byteLength).toBeLessThan(model.byteLength)
    const golden = goldens('sample_single')
    const { logits, hidden } = await prefill(quantized, sampleEmbeds[0]!)
    const layer = relativeError(await hidden('hidden_1'), golden('hidden_1').data)
    const all = relativeError(logits, golden('prefill_logits').data)
    expect(layer).toBeGreaterThan(1e-4)
    expect(layer).toBeLessThan(limits.layer)
    expect(all).toBeLessThan(limits.logits)
    quantized.dispose()
  })

  test.each(['bf16', 'f16'] as const)('a KV cache in %s: bounded error', async kvDtype => {
    const other = await load({ kvDtype })
    expect(other.bytesPerPage(16)).toBe(model.bytesPerPage(16) / 2)
    const { logits } = await prefill(other, sampleEmbeds[0]!)
    const expected = goldens('sample_single')('prefill_logits').data
    expect(relativeError(logits, expected)).toBeLessThan(kvDtype === 'bf16' ? 0.02 : 0.003)
    other.dispose()
  })
})

/** ‖a − b‖ / ‖b‖. */
function relativeError(actual: Float32Array, expected: Float32Array): number {
  const square = (x: Float32Array) => x.reduce((sum, v) => sum + v * v, 0)
  return Math.sqrt(square(actual.map((x, i) => x - expected[i]!)) / square(expected))
}

/** All positions of one prompt in one step. */
async function prefill(model: MgmModel, embeds: Float32Array) {
  const length = embeds.length / model.hiddenSize
  const pageSize = 8
  const pages = Math.ceil(length / pageSize)
  const cache = model.newCache(pages, pageSize)
  const { observe, get } = recorder()
  const count = (n: number, at: (i: number) => number) => Int32Array.from({ length: n }, (_, i) => at(i))
  const i32 = (data: Int32Array, ...shape: number[]) => device.tensor(data, shape)
  const logits = device.scope(() =>
    model.forward(
      {
        embeds: device.tensor(embeds, [length, model.hiddenSize]),
        positions: i32(
          count(length, i => i),
          length,
        ),
        // Pages in falling order.
        slots: i32(
          count(length, i => (pages - 1 - Math.floor(i / pageSize)) * pageSize + (i % pageSize)),
          length,
        ),
        blockTable: i32(
          count(pages, i => pages - 1 - i),
          1,
          pages,
        ),
        cuQ: i32(Int32Array.of(0, length), 2),
        contextLens: i32(Int32Array.of(length), 1),
        logitRows: i32(
          count(length, i => i),
          length,
        ),
      },
      cache,
      observe,
    ),
  )
  const numbers = await logits.readF32()
  logits.dispose()
  cache.dispose()
  return { logits: numbers, hidden: get, layers: model.config.num_hidden_layers }
}

describe('MgmModel', () => {
  const vicuna = openCase('mgm-vicuna-tiny')

  test('stages 1 to 3 resized to stage 0 are the map that the reference concatenates', async () => {
    const model = await vicuna.load()
    const golden = vicuna.image('images/a_land.png')
    const expected = toNhwc(golden('aux_cat'))
    const [, height, width, channels] = expected.shape as [number, number, number, number]
    const maps = device.scope(() =>
      model.vision.convnext
        .forward(upload(device, toNhwc(golden('images_aux'))))
        .map(map => resizeBilinear(map, height, width)),
    )
    let first = 0
    for (const map of maps) {
      const c = map.shape[3]!
      const numbers = await map.readF32()
      for (let p = 0; p < height * width; p++)
        assertClose(
          `position ${p}`,
          numbers.subarray(p * c, (p + 1) * c),
          expected.data.subarray(p * channels + first, p * channels + first + c),
          TOLERANCE.stages,
        )
      first += c
      map.dispose()
    }
    model.dispose()
  })

  test('a vocabulary longer than the table gets rows of zeros; a shorter one is cut', async () => {
    const embeds = vicuna.goldens('sample_text_only')('inputs_embeds').data
    const expected = vicuna.goldens('sample_text_only')('prefill_logits_last').data
    const grown = await vicuna.load({ vocabSize: expected.length + 5 })
    const longer = (await prefill(grown, embeds)).logits.subarray(-grown.vocabSize)
    assertClose('old rows', longer.subarray(0, expected.length), expected, TOLERANCE.logits)
    expect(Array.from(longer.subarray(expected.length))).toEqual([0, 0, 0, 0, 0])
    const cut = await vicuna.load({ vocabSize: 100 })
    const shorter = (await prefill(cut, embeds)).logits.subarray(-100)
    assertClose('first rows', shorter, expected.subarray(0, 100), TOLERANCE.logits)
    expect(() => cut.splice(Int32Array.of(1, 100), [])).toThrow(
      'expected ids from 0 to 99 or -200 for ids but received 100',
    )
    grown.dispose()
    cut.dispose()
  })

  test('splice counts the slots', async () => {
    const model = await vicuna.load()
    expect(() => model.splice(Int32Array.of(1, -200), [])).toThrow(
      'expected 1 (the image slots in ids) for images but received 0',
    )
    expect(() => model.splice(new Int32Array(0), [])).toThrow('expected at least one id')
    const rows = device.tensor(new Float32Array(2 * model.hiddenSize).fill(3), [2, model.hiddenSize])
    const alone = model.splice(Int32Array.of(-200), [rows])
    expect(await alone.readF32()).toEqual(new Float32Array(2 * model.hiddenSize).fill(3))
    rows.dispose()
    alone.dispose()
    model.dispose()
  })

  test('pixels of another size are refused', async () => {
    const model = await vicuna.load()
    const pixels = device.zeros([1, 64, 64, 3])
    expect(() => model.encodeImages(pixels)).toThrow(/expected a tensor of shape \[B, 128, 128, 3\]/)
    pixels.dispose()
    model.dispose()
  })

  test('progress grows to the total', async () => {
    const events: { loaded: number; total: number }[] = []
    const model = await vicuna.load({ onProgress: event => events.push(event) })
    expect(events.at(-1)!.loaded).toBe(events.at(-1)!.total)
    expect(events.map(e => e.loaded)).toEqual(events.map(e => e.loaded).toSorted((a, b) => a - b))
    model.dispose()
  })

  test('an aborted load frees everything', async () => {
    await device.synchronize()
    const before = device.memory().used
    const controller = new AbortController()
    const loading = vicuna.load({ signal: controller.signal })
    controller.abort()
    await expect(loading).rejects.toMatchObject({ code: 'ABORTED' })
    await device.synchronize()
    expect(device.memory().used).toBe(before)
  })

  test('load, run, dispose leaves nothing behind', async () => {
    await device.synchronize()
    const before = device.memory().used
    const model = await vicuna.load()
    const golden = vicuna.image('images/a_land.png')
    device.scope(() => model.encodeImages(upload(device, toNhwc(golden('images_aux'))))).dispose()
    await prefill(model, vicuna.goldens('sample_single')('inputs_embeds').data)
    model.dispose()
    await device.synchronize()
    expect(device.memory().used).toBe(before)
  })
})
