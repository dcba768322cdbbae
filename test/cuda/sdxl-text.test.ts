import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { openDiffusion } from '../../lib/checkpoint/diffusers.ts'
import { ClipText } from '../../lib/models/clip-text.ts'
import { Loader } from '../../lib/models/loader.ts'
import { FIXTURES, readSafetensors } from '../helpers/safetensors.ts'
import { expectClose } from '../ops/helpers.ts'
import { cudaTests, floats, HALVES } from './helpers.ts'

// In units of the type's roundoff of the largest number: what a half type costs PyTorch itself here (transformers' CLIP,
// these weights and prompts), 3.9 worst and 1.3 root mean square. Measured: 2.7 and 1.1.
const U = { bf16: 2 ** -8, f16: 2 ** -11 }
const BOUND = { worst: 4, rms: 1.5 }
const PROMPTS = ['prompt', 'negative', 'short']

cudaTests('the text encoders of SDXL on a GPU', cuda => {
  const { textEncoders } = openDiffusion(join(FIXTURES, 'sdxl-tiny/pipeline'))
  const numbers = readSafetensors(join(FIXTURES, 'sdxl-tiny/tensors/text.safetensors'))
  const golden = (name: string) => numbers.get(name)!.data

  describe.each(HALVES)('in %s', dtype => {
    const close = (actual: Float32Array, expected: Float32Array, what: string) => {
      const unit = U[dtype] * Math.max(...expected.map(Math.abs))
      expectClose(actual, expected, { absolute: BOUND.worst * unit }, what)
      const squares = actual.reduce((sum, x, i) => sum + (x - expected[i]!) ** 2, 0)
      expect(Math.sqrt(squares / actual.length), `${what}: rms`).toBeLessThan(BOUND.rms * unit)
    }

    it.each([1, 2])('encoder %d agrees with the goldens, alone and beside others', async n => {
      const { weights, config, projection } = textEncoders[n - 1]!
      const loader = new Loader(cuda.gpu, { activations: dtype })
      const encoder = await ClipText.load(loader, weights, config, { projection })
      const run = async (names: string[]) => {
        const ids = Int32Array.from(names.flatMap(name => [...golden(`${name}.ids_${n}`)]))
        const { penultimate, pooled } = encoder.forward(ids)
        const result = { penultimate: await floats(penultimate), pooled: pooled && (await floats(pooled)) }
        penultimate.dispose()
        pooled?.dispose()
        return result
      }
      const together = await run(PROMPTS)
      for (const [i, name] of PROMPTS.entries()) {
        const alone = await run([name])
        close(alone.penultimate, golden(`${name}.penultimate_${n}`), `${name}, penultimate`)
        if (alone.pooled) close(alone.pooled, golden(`${name}.pooled`), `${name}, pooled`)
        const part = (all: Float32Array, size: number) => all.slice(i * size, (i + 1) * size)
        expect(part(together.penultimate, alone.penultimate.length)).toEqual(alone.penultimate)
        expect(together.pooled && part(together.pooled, config.projection_dim)).toEqual(alone.pooled)
      }
      loader.dispose()
    })
  })
})
