import { afterEach, expect, it } from 'vitest'
import { pagedAttention } from '../../../lib/ops.ts'
import { Random } from '../../ops/helpers.ts'
import { inputs, offsets, type Setup } from '../../ops/paging.ts'
import { cudaTests, floats, HALVES, type Inputs } from '../helpers.ts'

/** Ways to compute the same: MGM_CUDA_PAGED. */
const SHAPES = ['wide', 'narrow', 'split'] as const

function world(random: Random, setup: Setup, huge = 1) {
  const { heads, headDim } = setup
  // Now and then one of huge scores, which take a path of their own.
  const { k, v, pageShape, blockTable, tableShape, newest } = inputs(setup, random, i =>
    i % 61 === 50 ? huge : 1,
  )
  /** The op on the newest `counts[b]` of the first `contexts[b]` tokens of each sequence. */
  const run = (t: Inputs, counts: readonly number[], contexts: readonly number[], scale?: number) => {
    const { data, shape } = newest(counts, contexts)
    return pagedAttention(t.a(data, shape).narrow(1, 0, heads), t.a(k, pageShape), t.a(v, pageShape), {
      blockTable: t.plain(blockTable, tableShape),
      cuQ: t.plain(Int32Array.from(offsets(counts)), [counts.length + 1]),
      contextLens: t.plain(Int32Array.from(contexts), [contexts.length]),
      ...(scale === undefined ? {} : { scale }),
    })
  }
  const greatest = v.reduce((most, x) => (Math.abs(x) > most ? Math.abs(x) : most), 0)
  return { run, greatest, width: heads * headDim }
}

// The weights are rounded to the activations' type: the result, their mean of the values, is off by at most that
// rounding times the greatest value. All else is f32.
const ROUNDOFF = { bf16: 2 ** -8, f16: 2 ** -11 }

const setups: Setup[] = [
  { heads: 2, kvHeads: 2, headDim: 64, pageSize: 16, lengths: [530, 1, 64] },
  { heads: 8, kvHeads: 1, headDim: 32, pageSize: 32, lengths: [300, 33] },
  { heads: 6, kvHeads: 2, headDim: 16, pageSize: 3, lengths: [257, 256, 255] },
  { heads: 4, kvHeads: 1, headDim: 128, pageSize: 16, lengths: [270, 5] },
  { heads: 2, kvHeads: 1, headDim: 136, pageSize: 100, lengths: [70] },
  { heads: 8, kvHeads: 1, headDim: 256, pageSize: 16, lengths: [259, 2] },
  { heads: 1, kvHeads: 1, headDim: 400, pageSize: 16, lengths: [33] },
  { heads: 3, kvHeads: 3, headDim: 8, pageSize: 1, lengths: [65, 2] },
]
if (process.env.MGM_TEST_FULL)
  setups.push(
    { heads: 32, kvHeads: 32, headDim: 128, pageSize: 16, lengths: [700, 300] },
    { heads: 32, kvHeads: 8, headDim: 128, pageSize: 16, lengths: [1100] },
    { heads: 8, kvHeads: 1, headDim: 256, pageSize: 16, lengths: [1300, 17] },
  )

cudaTests('pagedAttention', cuda => {
  afterEach(() => {
    delete process.env.MGM_CUDA_PAGED
  })

  for (const setup of setups)
    it(`equals the CPU's: ${JSON.stringify(setup)}`, async () => {
      const random = new Random()
      const { run, greatest } = world(random, setup)
      const ones = setup.lengths.map(() => 1)
      const some = setup.lengths.map(length => random.integer(0, Math.min(length, 9)))
      for (const dtype of HALVES)
        for (const [counts, scale] of [
          [ones, undefined],
          [some, -0.2],
        ] as const) {
          if (counts.every(n => n === 0)) continue
          const what = `${counts}, seed ${random.seed}`
          const limit = { absolute: ROUNDOFF[dtype] * greatest + 2e-5 }
          await cuda.same({ dtype, limit, what }, t => run(t, counts, setup.lengths, scale))
        }
    })

  for (const [i, setup] of setups.entries())
    it(`prefill in any chunks, decode and any batch give the same bits: ${JSON.stringify(setup)}`, async () => {
      const random = new Random()
      const dtype = HALVES[i % 2]!
      const { run, greatest, width } = world(random, setup, dtype === 'bf16' ? 2 ** 30 : 1)
      const t = cuda.inputs(cuda.gpu, dtype)
      const whole = await floats(run(t, setup.lengths, setup.lengths))
      const starts = offsets(setup.lengths)
      expect(whole.every(x => Math.abs(x) <= greatest * (1 + ROUNDOFF.bf16))).toBe(true)
      for (let round = 0; round < 9; round++) {
        const contexts = setup.lengths.map(length => random.integer(1, length))
        const counts = contexts.map(context =>
          random.integer(0, round < 3 ? 1 : round < 6 ? Math.min(8, context) : Math.min(70, context)),
        )
        if (counts.every(n => n === 0)) continue
        const shape = SHAPES[round % 3]!
        process.env.MGM_CUDA_PAGED = shape
        const part = await floats(run(t, counts, contexts))
        const from = offsets(counts)
        counts.forEach((n, b) => {
          const at = (starts[b]! + contexts[b]! - n) * width
          expect(
            part.slice(from[b]! * width, (from[b]! + n) * width),
            `seed ${random.seed} ${shape} sequence ${b}: ${n} of ${contexts[b]}`,
          ).toEqual(whole.slice(at, at + n * width))
        })
      }
    })

  it.each(SHAPES)('gives zeros to padding, in a recorded step too: %s', async shape => {
    process.env.MGM_CUDA_PAGED = shape
    const device = cuda.gpu
    const t = cuda.inputs(device, 'bf16')
    const random = new Random()
    const [d, heads, pageSize] = [32, 2, 16]
    const pages = t.a(random.normals(20 * pageSize * d), [20, 1, pageSize, d])
    const q = t.a(random.normals(5 * heads * d), [5, heads, d])
    const lengths = t.plain(Int32Array.of(280, 0, 0), [3])
    const cuQ = t.plain(Int32Array.of(0, 2, 3, 3), [4])
    const table = new Int32Array(3 * 20).fill(-1)
    for (let i = 0; i < 18; i++) table[i] = 19 - i
    const options = { blockTable: t.plain(table, [3, 20]), cuQ, contextLens: lengths }
    const graph = device.capture(() => pagedAttention(q, pages, pages, options))
    graph.replay()
    const first = await floats(graph.outputs)
    expect(first.subarray(0, 2 * heads * d).every(x => x !== 0)).toBe(true)
    expect(first.subarray(2 * heads * d).every(x => x === 0)).toBe(true)
    // The next step: fewer keys, nothing of it decided by the host.
    lengths.write(Int32Array.of(100, 0, 0))
    graph.replay()
    const second = await floats(graph.outputs)
    expect(second).toEqual(await floats(pagedAttention(q, pages, pages, options)))
    expect(second).not.toEqual(first)
    graph.dispose()
  })

  it('reports lengths and pages that cannot be, and refuses odd head sizes', async () => {
    const t = cuda.inputs(cuda.gpu, 'f16')
    const pages = t.a(new Float32Array(4 * 16 * 8), [4, 1, 16, 8])
    const q = t.a(new Float32Array(2 * 8), [2, 1, 8])
    const run = (context: number, cu: number[], table: number[]) =>
      pagedAttention(q, pages, pages, {
        blockTable: t.plain(Int32Array.from(table), [1, table.length]),
        cuQ: t.plain(Int32Array.from(cu), [2]),
        contextLens: t.plain(Int32Array.of(context), [1]),
      })
    for (const shape of SHAPES) {
      process.env.MGM_CUDA_PAGED = shape
      for (const [context, cu, table, message] of [
        [33, [0, 2], [0, 1], /expected 2 .* to 32 .* for context_lens of sequence 0 but received 33/],
        [1, [0, 2], [0, 1], /for context_lens of sequence 0 but received 1/],
        [20, [0, 3], [0, 1], /non-decreasing offsets from 0 to 2 for cu_q but received 3 after 0/],
        [20, [0, 2], [0, 4], /a page below 4 for block_table entry 1 of sequence 0 but received 4/],
        [20, [0, 2], [-1, 0], /block_table entry 0 of sequence 0 but received -1/],
      ] as const) {
        run(context, [...cu], [...table])
        await expect(cuda.gpu.synchronize(), shape).rejects.toThrow(message)
      }
    }
    const odd = t.a(new Float32Array(12), [1, 1, 1, 12])
    expect(() =>
      pagedAttention(odd.reshape(1, 1, 12), odd, odd, {
        blockTable: t.plain(Int32Array.of(0), [1, 1]),
        cuQ: t.plain(Int32Array.of(0, 1), [2]),
        contextLens: t.plain(Int32Array.of(1), [1]),
      }),
    ).toThrow(/multiple of 8 for the head dimension/)
  })
})
