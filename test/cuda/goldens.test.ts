import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { openCheckpoint } from '../../lib/checkpoint/weights.ts'
import { type LoadOptions, MiniGemini } from '../../lib/index.ts'
import { MgmModel } from '../../lib/models/mgm.ts'
import { native } from '../../lib/native.ts'
import { cases, messagesOf } from '../e2e/cases.ts'
import { readSafetensors, toNhwc } from '../helpers/safetensors.ts'
import { argmax, greedy, upload } from '../models/support.ts'
import { expectClose } from '../ops/helpers.ts'
import { cudaTests, floats, HALVES } from './helpers.ts'

// The goldens are f32 results. A half type rounds each activation by up to u of it, some ten times a layer, and the
// roundings add up like a random walk: a few u of the largest number there is. Measured: up to 3.4 u for image features.
const U = { bf16: 2 ** -8, f16: 2 ** -11 }
const FEATURES = 6
const LOGITS = 6

const largest = (numbers: Float32Array) => numbers.reduce((most, x) => Math.max(most, Math.abs(x)), 0)

const small: LoadOptions = { device: 'cuda', maxSequences: 16, kvMemory: 16 * 2 ** 20 }

cudaTests('the goldens on a GPU', cuda => {
  describe.each(cases)('$name', of => {
    const goldens = (file: string) => {
      const numbers = readSafetensors(join(of.root, 'tensors', `${file}.safetensors`))
      return (tensor: string) => numbers.get(tensor)!
    }
    const samples = of.samples.map(sample => ({ ...sample, golden: goldens(`sample_${sample.name}`) }))
    const vocabSize = samples[0]!.golden('prefill_logits_last').shape.at(-1)!

    describe.each(HALVES)('in %s', dtype => {
      it('sees the picture and says what the reference says, wherever that is no near tie', async () => {
        const model = await MgmModel.load(cuda.gpu, openCheckpoint(of.folder), { vocabSize, dtype })
        try {
          const image = goldens('image_a_land')
          const features = cuda.gpu.scope(() =>
            model.encodeImages(upload(cuda.gpu, toNhwc(image('images_aux')))),
          )
          const expectedFeatures = image('image_features').data as Float32Array
          const limit = { absolute: FEATURES * U[dtype] * largest(expectedFeatures) }
          expectClose(await floats(features), expectedFeatures, limit, 'image_features')
          features.dispose()

          const prompts = samples.map(({ golden }) => golden('inputs_embeds').data as Float32Array)
          const forced = samples.map(sample => sample.generated_ids)
          const results = await greedy(model, prompts, 24, { chunk: 37, forced })
          let clear = 0
          for (const [s, { name, golden, generated_ids }] of samples.entries()) {
            const expected = golden('step_logits').data as Float32Array
            const bound = LOGITS * U[dtype] * largest(expected)
            for (const [step, row] of results[s]!.logits.entries()) {
              const reference = expected.subarray(step * vocabSize, (step + 1) * vocabSize)
              expectClose(row, reference, { absolute: bound }, `${name}, step ${step}`)
              const best = reference[generated_ids[step]!]!
              const second = reference.reduce(
                (most, x, id) => (id === generated_ids[step] ? most : Math.max(most, x)),
                Number.NEGATIVE_INFINITY,
              )
              if (best - second <= 2 * bound) continue
              clear++
              expect(argmax(row), `${name}, step ${step}`).toBe(generated_ids[step])
            }
          }
          // Otherwise the bound above would be too wide to say anything.
          expect(clear).toBeGreaterThan(samples.length * 8)

          // What a sequence is batched with, its chunks and its pages do not change a bit.
          for (const s of [0, 3]) {
            const alone = await greedy(model, [prompts[s]!], 24, { pageSize: 32, forced: [forced[s]!] })
            expect(alone).toEqual([results[s]])
          }
        } finally {
          model.dispose()
        }
      })

      it('answers alike alone and beside others, recorded or not, on one GPU or two', async () => {
        const answers = async (options: LoadOptions, together: boolean) => {
          const mgm = await MiniGemini.load(of.folder, { ...small, dtype, ...options })
          try {
            const ask = (sample: (typeof samples)[number]) =>
              mgm.chat({ messages: messagesOf(of, sample), maxTokens: 24 })
            const tokens: number[][] = []
            if (together)
              for (const answer of await Promise.all(samples.map(ask))) tokens.push([...answer.tokens])
            else for (const sample of samples) tokens.push([...(await ask(sample)).tokens])
            return tokens
          } finally {
            await mgm.close()
          }
        }
        const alone = await answers({}, false)
        expect(await answers({}, true)).toEqual(alone)
        expect(await answers({ decodeGraphs: false }, true)).toEqual(alone)
        if (native().cudaSurvey().devices.length > 1)
          expect(await answers({ deviceMap: 'auto' }, true)).toEqual(alone)
        // Most answers begin as the reference's; which of the near ties falls otherwise is not ours to say.
        const first = samples.filter((sample, s) => sample.generated_ids[0] === alone[s]![0])
        expect(first.length).toBeGreaterThan(samples.length / 2)
      })
    })
  })
})
