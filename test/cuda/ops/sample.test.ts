import { it } from 'vitest'
import * as ops from '../../../lib/ops.ts'
import { Random } from '../../ops/helpers.ts'
import { cudaTests } from '../helpers.ts'

cudaTests('sample on CUDA', cuda => {
  it('chooses the same tokens as the CPU', async () => {
    const random = new Random()
    const [rows, vocab] = [6, 1003]
    const logits = random.normals(rows * vocab, 3)
    // temperature, top_p, min_p, repetition, presence, frequency
    const options = [
      [0, 1, 0, 1, 0, 0],
      [0.7, 0.9, 0, 1, 0, 0],
      [1, 1, 0.05, 1.3, 0.2, 0.1],
      [1.5, 0.5, 0, 1, 0, 0],
      [1, 1, 0, 1, 0, 0],
      [0, 1, 0, 1.5, 0, 0],
    ].flat()
    const state = Array.from({ length: rows }, (_, b) => [b === 3 ? 40 : 0, b * 77 + 1, b, b * 3, 4]).flat()
    const history = Int32Array.from({ length: rows * 4 }, () => random.integer(0, vocab - 1))
    const mask = Uint8Array.from({ length: rows * Math.ceil(vocab / 8) }, () => random.integer(0, 255))
    await cuda.same({ limit: { absolute: 2e-5 }, what: `seed ${random.seed}` }, ({ plain: make }) => {
      const common = {
        options: make(Float32Array.from(options), [rows, 6]),
        state: make(Int32Array.from(state), [rows, 5]),
      }
      const x = make(logits, [rows, vocab])
      const free = ops.sample(x, common)
      const bound = ops.sample(x, {
        ...common,
        history: make(history, [rows, 4]),
        mask: make(mask, [rows, Math.ceil(vocab / 8)]),
        topLogprobs: 3,
      })
      return [free.ids, free.logprobs, bound.ids, bound.logprobs, bound.topIds!]
    })
  })
})
