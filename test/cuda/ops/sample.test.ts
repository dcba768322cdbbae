import { expect, it } from 'vitest'
import { sample } from '../../../lib/ops.ts'
import { Random } from '../../ops/helpers.ts'
import { cudaTests, type Inputs } from '../helpers.ts'

/** temperature, top_p, min_p, repetition, presence, frequency; top_k. */
const SETTINGS = [
  [0, 1, 0, 1, 0, 0, 0],
  [0.7, 0.9, 0, 1, 0, 0, 0],
  [1, 1, 0.05, 1.3, 0.2, 0.1, 0],
  [1.5, 0.5, 0, 1, 0, 0, 40],
  [1, 1, 0, 1, 0, 0, 0],
  [0, 1, 0, 1.5, 0, 0, 0],
  [1, 1, 0, 0.8, -1, 0, 50],
  [2, 0.99, 0.001, 1, 0, 0, 0],
  [1e-8, 0, 0, 1, 0, 0, 3],
  [1e30, 0.7, 0, 1, 0, 0, 0],
]

interface Batch {
  logits: Float32Array
  vocab: number
  /** Elements between rows. */
  stride?: number
  history?: Int32Array[]
  mask?: Uint8Array
  settings?: number[][]
  listed?: number
}

function run(t: Inputs, batch: Batch) {
  const { vocab, stride = vocab, settings = SETTINGS, history } = batch
  const rows = settings.length
  const room = Math.max(0, ...(history ?? []).map(row => row.length))
  const ids = new Int32Array(rows * room).fill(-1)
  for (const [b, row] of (history ?? []).entries()) ids.set(row, b * room)
  const state = settings.flatMap((row, b) => [row[6]!, b * 77 + 1, b, b * 3, history?.[b]?.length ?? 0])
  const result = sample(t.plain(batch.logits, [rows, stride]).narrow(1, 0, vocab), {
    options: t.plain(Float32Array.from(settings.flatMap(row => row.slice(0, 6))), [rows, 6]),
    state: t.plain(Int32Array.from(state), [rows, 5]),
    history: history && t.plain(ids, [rows, room]),
    mask: batch.mask && t.plain(batch.mask, [rows, Math.ceil(vocab / 8)]),
    topLogprobs: batch.listed ?? 0,
  })
  return [result.ids, result.logprobs, ...(result.topIds ? [result.topIds] : [])]
}

cudaTests('sample on CUDA', cuda => {
  // Log-probabilities: f32 exponentials within two units in the last place, of numbers up to a few tens.
  const same = (batch: Batch, what: string) =>
    cuda.same({ limit: { absolute: 2e-5 }, what }, t => run(t, batch))

  // One chunk and several, rows that start on 16 bytes and that do not.
  it.each([
    { vocab: 1, stride: 1 },
    { vocab: 1003, stride: 1003 },
    { vocab: 4096, stride: 4096 },
    { vocab: 4097, stride: 4100 },
    { vocab: 9001, stride: 9001 },
    { vocab: 32000, stride: 32000 },
  ])('chooses among $vocab logits as the CPU does', async ({ vocab, stride }) => {
    const random = new Random()
    const rows = SETTINGS.length
    const logits = random.normals(rows * stride, 3)
    const what = `seed ${random.seed}`
    const ids = (count: number) => Int32Array.from({ length: count }, () => random.integer(-1, vocab - 1))
    const history = SETTINGS.map((_, b) => ids(b === 2 ? 0 : 40))
    const mask = Uint8Array.from({ length: rows * Math.ceil(vocab / 8) }, () => random.integer(0, 255))
    // Something is allowed in every row.
    for (let b = 0; b < rows; b++) mask[b * Math.ceil(vocab / 8)] = 255
    await same({ logits, vocab, stride }, what)
    await same({ logits, vocab, stride, history }, `history, ${what}`)
    await same({ logits, vocab, stride, mask, listed: Math.min(vocab, 7) }, `mask, ${what}`)
    await same({ logits, vocab, stride, mask, history, listed: Math.min(vocab, 20) }, `all, ${what}`)
  })

  it('chooses among logits that are equal, infinite, or of a handful of values', async () => {
    const random = new Random()
    const vocab = 9000
    const rows = SETTINGS.length
    const fill = (of: (b: number, i: number) => number) =>
      Float32Array.from({ length: rows * vocab }, (_, i) => of(Math.floor(i / vocab), i % vocab))
    const cases = {
      equal: fill(() => 2),
      negative: fill(() => -1e30),
      levels: fill(() => random.integer(-3, 3)),
      zeros: fill((_, i) => (i % 2 ? 0 : -0)),
      onlyLast: fill((_, i) => (i === vocab - 1 ? 0 : Number.NEGATIVE_INFINITY)),
      certain: fill((_, i) => (i === 4500 || i === 8999 ? Number.POSITIVE_INFINITY : i)),
      huge: fill((_, i) => (i % 1000) * 3e35),
      none: fill(() => Number.NEGATIVE_INFINITY),
      nan: fill((b, i) => (b % 2 && i === 8191 ? Number.NaN : Math.sin(i * 37))),
    }
    for (const [name, logits] of Object.entries(cases))
      await same({ logits, vocab, listed: 5 }, `${name}, seed ${random.seed}`)
  })

  it('answers -1 where the mask allows nothing', async () => {
    const vocab = 5000
    const rows = SETTINGS.length
    const mask = new Uint8Array(rows * (vocab / 8))
    const [ids, logprobs] = run(cuda.inputs(cuda.gpu), {
      logits: new Random(1).normals(rows * vocab),
      vocab,
      mask,
    })
    expect([...(await ids!.read())]).toEqual(SETTINGS.map(() => -1))
    expect([...(await logprobs!.read())].every(Number.isNaN)).toBe(true)
  })

  it('draws a row the same, bit for bit, alone and in any batch', async () => {
    const random = new Random()
    const vocab = 8500
    const rows = SETTINGS.length
    const logits = random.normals(rows * vocab, 2)
    const t = cuda.inputs(cuda.gpu)
    const read = async (batch: Batch) => Promise.all(run(t, batch).map(tensor => tensor.read()))
    const together = await read({ logits, vocab, listed: 3 })
    for (const [b, setting] of SETTINGS.entries()) {
      // The row's seed is that of its place in the batch: ask for the same by going through the rows before it.
      const settings = [...SETTINGS.slice(0, b).map(() => SETTINGS[0]!), setting]
      const alone = await read({ logits: logits.slice(0, (b + 1) * vocab), vocab, settings, listed: 3 })
      for (const [i, width] of [1, 4, 3].entries())
        expect(alone[i]!.slice(b * width, (b + 1) * width), `row ${b}, seed ${random.seed}`).toEqual(
          together[i]!.slice(b * width, (b + 1) * width),
        )
    }
  })

  it('reports what cannot be in a history to the next read', async () => {
    const settings = [[0, 1, 0, 1.5, 0, 0, 0]]
    const t = cuda.inputs(cuda.gpu)
    const [ids] = run(t, { logits: new Float32Array(5), vocab: 5, settings, history: [Int32Array.of(2, 7)] })
    await expect(ids!.read()).rejects.toThrow(/id below 5 for a history entry of row 0 but received 7/)
    const tooLong = sample(t.plain(new Float32Array(5), [1, 5]), {
      options: t.plain(Float32Array.of(0, 1, 0, 1.5, 0, 0), [1, 6]),
      state: t.plain(Int32Array.of(0, 1, 2, 0, 3), [1, 5]),
      history: t.plain(Int32Array.of(2, 1), [1, 2]),
    })
    await expect(tooLong.ids.read()).rejects.toThrow(/history length up to 2 for row 0 but received 3/)
  })
})
