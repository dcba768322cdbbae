import { expect, it } from 'vitest'
import { openCheckpoint } from '../../lib/checkpoint/weights.ts'
import { Device } from '../../lib/device.ts'
import { DecodeGraphs } from '../../lib/engine/decode-graph.ts'
import { ModelRunner, type RunnableSequence } from '../../lib/engine/runner.ts'
import { greedy, type Sampling } from '../../lib/engine/sampler.ts'
import { Sequence } from '../../lib/engine/sequence.ts'
import { MgmModel } from '../../lib/models/mgm.ts'
import type { Tensor } from '../../lib/tensor.ts'
import { gemma } from '../e2e/cases.ts'
import { Random } from '../helpers/random.ts'

class Prompt extends Sequence implements RunnableSequence {
  readonly embeds: Tensor
  readonly sampling: Sampling
  constructor(embeds: Tensor, sampling: Sampling) {
    super(embeds.shape[0]!, 100)
    this.embeds = embeds
    this.sampling = sampling
  }
}

it('a recorded decode step draws what an eager one does, with padding and in any number of sequences', async () => {
  const device = Device.open('cpu', { threads: 2 })
  const model = await MgmModel.load(device, openCheckpoint(gemma.folder), { vocabSize: 300 })
  const random = new Random()
  const prompts = Array.from({ length: 5 }, () =>
    Int32Array.from({ length: random.integer(1, 20) }, () => random.integer(0, 299)),
  )

  const run = async (maxContext?: number) => {
    const cache = model.newCache(20, 16)
    const runner = new ModelRunner(device, model, cache, maxContext)
    const sequences = prompts.map((ids, i) => {
      const embeds = model.splice(ids, [])
      const sampling = { ...greedy, temperature: i % 2, seed: BigInt(i) }
      const sequence = new Prompt(embeds, sampling)
      sequence.pages.push(4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3)
      return sequence
    })
    for (let step = 0; step < 30; step++) {
      // One sequence after the other comes to its end.
      const items = sequences.slice(0, 5 - Math.floor(step / 8)).map(sequence => ({
        sequence,
        start: step === 0 ? 0 : sequence.promptLength + step - 1,
        count: step === 0 ? sequence.promptLength : 1,
        samples: true,
      }))
      expect(DecodeGraphs.covers(items)).toBe(step > 0)
      const drawn = await runner.run(items)
      for (const [i, { sequence }] of items.entries()) sequence.tokens.push(drawn[i]!.id)
    }
    for (const { embeds } of sequences) embeds.dispose()
    runner.dispose()
    cache.dispose()
    return sequences.map(sequence => sequence.tokens)
  }

  const before = device.memory().used
  const eager = await run()
  expect(await run(64), `seed ${random.seed}`).toEqual(eager)
  await device.synchronize()
  expect(device.memory().used).toBe(before)
  model.dispose()
  await device.close()
})
