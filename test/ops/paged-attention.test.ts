import { describe, expect, it } from 'vitest'
import { Device } from '../../lib/device.ts'
import { cast, pagedAttention } from '../../lib/ops.ts'
import { expectClose, f32, fromHalf, openDevice, Random } from './helpers.ts'
import { inputs, offsets, type Setup as Sequences } from './paging.ts'

const device = openDevice()

type PageType = 'f32' | 'bf16' | 'f16'

interface Setup extends Sequences {
  dtype: PageType
}

async function world(random: Random, setup: Setup, on: Device = device) {
  const { heads, kvHeads, headDim, dtype } = setup
  const { k, v, pageShape: shape, blockTable, tableShape, queries, slot, newest } = inputs(setup, random)
  const [kPages, vPages] = [k, v].map(data => cast(on.tensor(data, shape), dtype))
  // What the pages really hold, after rounding to their type.
  const held = async (tensor: typeof kPages) =>
    dtype === 'f32' ? await f32(tensor!) : fromHalf((await tensor!.read()) as Uint16Array, dtype)
  const [kHeld, vHeld] = [await held(kPages), await held(vPages)]

  /** The op on the newest `counts[b]` of the first `contexts[b]` tokens. */
  const run = (counts: readonly number[], contexts: readonly number[]) => {
    const { data, shape } = newest(counts, contexts)
    return pagedAttention(on.tensor(data, shape).narrow(1, 0, heads), kPages!, vPages!, {
      blockTable: on.tensor(blockTable, tableShape),
      cuQ: on.tensor(offsets(counts), [counts.length + 1], 'i32'),
      contextLens: on.tensor([...contexts], [contexts.length], 'i32'),
    })
  }

  /** One query in f64. */
  const oracle = (b: number, position: number) => {
    const q = queries[b]![position]!
    const out = new Float64Array(heads * headDim)
    for (let h = 0; h < heads; h++) {
      const kv = Math.floor(h / (heads / kvHeads))
      const weights = Array.from({ length: position + 1 }, (_, j) => {
        let dot = 0
        for (let c = 0; c < headDim; c++) dot += q[h * headDim + c]! * kHeld[slot(b, j, kv) + c]!
        return Math.exp(dot / Math.sqrt(headDim))
      })
      const total = weights.reduce((x, y) => x + y)
      for (let c = 0; c < headDim; c++)
        out[h * headDim + c] =
          weights.reduce((sum, weight, j) => sum + weight * vHeld[slot(b, j, kv) + c]!, 0) / total
    }
    return out
  }
  return { run, oracle, width: heads * headDim }
}

// The pages' rounding is in the oracle too, so what is left is f32 arithmetic.
const limit = { absolute: 1e-5, relative: 1e-5 }

const setups: Setup[] = [
  { heads: 4, kvHeads: 4, headDim: 64, pageSize: 16, dtype: 'f32', lengths: [577, 1, 64] },
  { heads: 8, kvHeads: 1, headDim: 32, pageSize: 32, dtype: 'bf16', lengths: [300, 33] },
  { heads: 6, kvHeads: 2, headDim: 20, pageSize: 3, dtype: 'f16', lengths: [257, 256, 255] },
  { heads: 2, kvHeads: 1, headDim: 130, pageSize: 100, dtype: 'bf16', lengths: [70] },
  { heads: 3, kvHeads: 3, headDim: 8, pageSize: 1, dtype: 'f32', lengths: [65, 2] },
]

describe('pagedAttention', () => {
  for (const setup of setups) {
    const random = new Random()
    const name = JSON.stringify(setup)
    it(`decode equals f64 attention over the pages: ${name}`, async () => {
      const { run, oracle } = await world(random, setup)
      const result = run(
        setup.lengths.map(() => 1),
        setup.lengths,
      )
      const expected = setup.lengths.flatMap((length, b) => [...oracle(b, length - 1)])
      expectClose(await f32(result), expected, limit, `seed ${random.seed}`)
    })

    it(`prefill in any chunks, decode and any batch give the same bits: ${name}`, async () => {
      const { run, oracle, width } = await world(random, setup)
      const whole = await f32(run(setup.lengths, setup.lengths))
      const starts = offsets(setup.lengths)
      for (const [b, length] of setup.lengths.entries())
        for (const position of [0, Math.floor(length / 2), length - 1]) {
          const at = (starts[b]! + position) * width
          expectClose(whole.slice(at, at + width), oracle(b, position), limit, `seed ${random.seed}`)
        }
      for (let round = 0; round < 10; round++) {
        const contexts = setup.lengths.map(length => random.integer(1, length))
        const counts = contexts.map(context =>
          random.integer(0, round < 4 ? 1 : round < 7 ? Math.min(8, context) : context),
        )
        if (counts.every(n => n === 0)) continue
        const part = await f32(run(counts, contexts))
        const from = offsets(counts)
        counts.forEach((n, b) => {
          const at = (starts[b]! + contexts[b]! - n) * width
          expect(
            part.slice(from[b]! * width, (from[b]! + n) * width),
            `seed ${random.seed} sequence ${b}: ${n} of ${contexts[b]}`,
          ).toEqual(whole.slice(at, at + n * width))
        })
      }
    })
  }

  it('decodes a long context to the same bits whatever the number of threads', async () => {
    const seed = new Random().seed
    const setup: Setup = { heads: 2, kvHeads: 1, headDim: 16, pageSize: 16, dtype: 'bf16', lengths: [3001] }
    const results: Float32Array[] = []
    for (const threads of [1, 2, 5]) {
      const own = Device.open('cpu', { threads })
      const { run, oracle } = await world(new Random(seed), setup, own)
      results.push(await f32(run([1], [3001])))
      expectClose(results.at(-1)!, oracle(0, 3000), limit, `seed ${seed} threads ${threads}`)
      await own.close()
    }
    expect(results[1], `seed ${seed}`).toEqual(results[0])
    expect(results[2], `seed ${seed}`).toEqual(results[0])
  })

  it('refuses pages, lengths and offsets that point outside', async () => {
    const call = async (table: number[], cu: number[], lens: number[]) => {
      const own = Device.open('cpu', { threads: 1 })
      const pages = own.zeros([3, 1, 4, 8])
      pagedAttention(own.zeros([2, 1, 8]), pages, pages, {
        blockTable: own.tensor(table, [1, 2], 'i32'),
        cuQ: own.tensor(cu, [2], 'i32'),
        contextLens: own.tensor(lens, [1], 'i32'),
      })
      try {
        await own.synchronize()
      } finally {
        await own.close().catch(() => {})
      }
    }
    await expect(call([0, 3], [0, 2], [5])).rejects.toThrow(/a page below 3 for block_table entry 1/)
    await expect(call([-1, 0], [0, 2], [4])).rejects.toThrow(/a page below 3 for block_table entry 0/)
    await expect(call([0, 1], [0, 2], [9])).rejects.toThrow(/2 \(its queries\) to 8 \(its pages\)/)
    await expect(call([0, 1], [0, 2], [1])).rejects.toThrow(/context_lens of sequence 0 but received 1/)
    await expect(call([0, 1], [0, 3], [4])).rejects.toThrow(/non-decreasing offsets from 0 to 2 for cu_q/)
    // Entries past the context are never looked at.
    await call([0, 99], [0, 2], [4])
  })
})
