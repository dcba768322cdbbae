import { describe, expect, it } from 'vitest'
import { Device } from '../../lib/device.ts'
import { sample } from '../../lib/ops.ts'
import { expectClose, f32, openDevice, Random } from './helpers.ts'

const device = openDevice()

interface Row {
  logits: Float32Array
  temperature?: number
  topP?: number
  minP?: number
  repetition?: number
  presence?: number
  frequency?: number
  topK?: number
  seed?: [number, number]
  step?: number
  history?: number[]
  /** Token v may be chosen. */
  allowed?: (v: number) => boolean
}

async function run(rows: Row[], topLogprobs = 0, on: Device = device) {
  const vocab = rows[0]!.logits.length
  const pad = 3
  const all = new Float32Array(rows.length * (vocab + pad)).fill(Number.NaN)
  rows.forEach((row, b) => {
    all.set(row.logits, b * (vocab + pad))
  })
  const longest = Math.max(...rows.map(row => row.history?.length ?? 0))
  const history = new Int32Array(rows.length * longest).fill(vocab + 7)
  const bytes = Math.ceil(vocab / 8)
  const mask = new Uint8Array(rows.length * bytes).fill(255)
  rows.forEach((row, b) => {
    history.set(row.history ?? [], b * longest)
    for (let v = 0; v < vocab; v++)
      if (row.allowed && !row.allowed(v)) mask[b * bytes + (v >> 3)]! &= ~(1 << (v & 7))
  })
  const options = rows.flatMap(row => [
    row.temperature ?? 0,
    row.topP ?? 1,
    row.minP ?? 0,
    row.repetition ?? 1,
    row.presence ?? 0,
    row.frequency ?? 0,
  ])
  const state = rows.flatMap(row => [
    row.topK ?? 0,
    (row.seed?.[0] ?? 0) | 0,
    (row.seed?.[1] ?? 0) | 0,
    row.step ?? 0,
    row.history?.length ?? 0,
  ])
  const result = sample(on.tensor(all, [rows.length, vocab + pad]).narrow(1, 0, vocab), {
    options: on.tensor(options, [rows.length, 6]),
    state: on.tensor(state, [rows.length, 5], 'i32'),
    history: longest > 0 ? on.tensor(history, [rows.length, longest]) : undefined,
    mask: rows.some(row => row.allowed) ? on.tensor(mask, [rows.length, bytes]) : undefined,
    topLogprobs,
  })
  return {
    ids: [...((await result.ids.read()) as Int32Array)],
    logprobs: await f32(result.logprobs),
    topIds: result.topIds ? [...((await result.topIds.read()) as Int32Array)] : [],
  }
}

/** Words 0 and 1 of Philox4x32-10 in big integers, as a number in [0, 1) with 53 bits. */
function uniform(step: number, seed: readonly [number, number]): number {
  const low = 0xffffffffn
  let counter = [BigInt(step >>> 0), 0n, 0n, 0n]
  let key = seed.map(word => BigInt(word >>> 0)) as [bigint, bigint]
  for (let round = 0; round < 10; round++) {
    const a = 0xd2511f53n * counter[0]!
    const b = 0xcd9e8d57n * counter[2]!
    counter = [(b >> 32n) ^ counter[1]! ^ key[0], b & low, (a >> 32n) ^ counter[3]! ^ key[1], a & low]
    key = [(key[0] + 0x9e3779b9n) & low, (key[1] + 0xbb67ae85n) & low]
  }
  return Number(((counter[0]! << 32n) | counter[1]!) >> 11n) / 2 ** 53
}

/** The token by sorting, and whether a decision was closer than f32 arithmetic can be trusted with. */
function oracle(row: Row): { id: number; close: boolean } {
  const counts = new Map<number, number>()
  for (const id of row.history ?? []) if (id >= 0) counts.set(id, (counts.get(id) ?? 0) + 1)
  const scores = Array.from(row.logits, (logit, v) => {
    if (row.allowed && !row.allowed(v)) return Number.NEGATIVE_INFINITY
    const count = counts.get(v)
    if (!count || !Number.isFinite(logit)) return logit
    const penalty = Math.fround(row.repetition ?? 1)
    const repeated = Math.fround(logit > 0 ? logit / penalty : logit * penalty)
    const present = Math.fround(repeated - Math.fround(row.presence ?? 0))
    return Math.fround(present - Math.fround(Math.fround(row.frequency ?? 0) * count))
  })
  if (row.logits.some(Number.isNaN)) return { id: -1, close: false }
  const order = scores
    .map((_, v) => v)
    .sort((a, b) => (scores[b] === scores[a] ? a - b : scores[b]! > scores[a]! ? 1 : -1))
  const top = scores[order[0]!]!
  if (top === Number.NEGATIVE_INFINITY) return { id: -1, close: false }
  if (!row.temperature) {
    const runnerUp = order.find(v => scores[v] !== top)
    return {
      id: order[0]!,
      close: runnerUp !== undefined && counts.size > 0 && top - scores[runnerUp]! < 1e-6,
    }
  }
  const weight = (v: number) =>
    top === Number.POSITIVE_INFINITY
      ? Number(scores[v] === top)
      : Math.exp((scores[v]! - top) / Math.fround(row.temperature!))
  let kept = row.topK ? order.slice(0, row.topK) : order
  let close = false
  const topP = Math.fround(row.topP ?? 1)
  if (topP < 1) {
    const total = kept.reduce((sum, v) => sum + weight(v), 0)
    let mass = 0
    let size = 0
    while (size < kept.length && (size === 0 || mass < topP * total)) {
      if (size > 0) close ||= Math.abs(mass - topP * total) < 1e-5 * total
      mass += weight(kept[size++]!)
    }
    close ||= Math.abs(mass - topP * total) < 1e-5 * total
    kept = kept.slice(0, size)
  }
  const minP = Math.fround(row.minP ?? 0)
  close ||= minP > 0 && kept.some(v => v !== order[0] && Math.abs(weight(v) - minP) < 1e-5)
  kept = kept.filter(v => weight(v) >= minP).sort((a, b) => a - b)
  const target = uniform(row.step ?? 0, row.seed ?? [0, 0]) * kept.reduce((sum, v) => sum + weight(v), 0)
  let sum = 0
  for (const v of kept) {
    sum += weight(v)
    close ||= Math.abs(sum - target) < 1e-5 * (sum + target)
    if (sum > target) return { id: v, close }
  }
  return { id: kept.at(-1)!, close: true }
}

function logSoftmax(logits: Float32Array): number[] {
  const top = logits.reduce((a, b) => Math.max(a, b))
  const total = logits.reduce((sum, x) => sum + Math.exp(x - top), 0)
  return Array.from(logits, x => x - top - Math.log(total))
}

describe('sample', () => {
  it('knows the published Philox vectors (so the oracle is right)', () => {
    // Random123's kat_vectors: philox4x32 10, counter and key 0, gives 6627e8d5 e169c58d …
    expect(uniform(0, [0, 0])).toBe(Number((0x6627e8d5e169c58dn >> 11n).toString()) / 2 ** 53)
  })

  it('chooses what sorting everything in f64 chooses', async () => {
    const random = new Random()
    let compared = 0
    let skipped = 0
    for (let round = 0; round < 250; round++) {
      const vocab = round % 3 === 0 ? random.integer(1, 40) : random.integer(41, 3000)
      const spread = [0.3, 3, 10][round % 3]!
      const maybe = <T>(value: T) => (random.next() < 0.5 ? value : undefined)
      const masked = random.next() < 0.3
      const rows = Array.from({ length: random.integer(1, 4) }, (): Row => {
        const logits = random.normals(vocab, spread)
        if (round % 5 === 0) for (let v = 0; v < vocab; v++) logits[v] = Math.round(logits[v]!)
        if (round % 7 === 0)
          for (let v = 0; v < vocab; v++) if (random.next() < 0.6) logits[v] = Number.NEGATIVE_INFINITY
        if (round % 11 === 0) logits[random.integer(0, vocab - 1)] = Number.POSITIVE_INFINITY
        if (round % 13 === 0 && random.next() < 0.5) logits[random.integer(0, vocab - 1)] = Number.NaN
        const salt = random.integer(2, 5)
        const row: Record<string, unknown> = {
          logits,
          temperature: random.next() < 0.8 ? 0.1 + 2 * random.next() : 0,
          topP: maybe(random.next()),
          minP: maybe(random.next() * 0.5),
          topK: maybe(random.integer(1, 60)),
          repetition: maybe(1.3),
          presence: maybe(0.7),
          frequency: maybe(-0.4),
          seed: [random.integer(0, 2 ** 32 - 1), random.integer(0, 2 ** 32 - 1)],
          step: random.integer(0, 2 ** 31 - 1),
          history: Array.from({ length: random.integer(0, 30) }, () =>
            random.next() < 0.1 ? -1 : random.integer(0, Math.min(vocab, round % 2 ? vocab : 6) - 1),
          ),
          allowed: masked ? (v: number) => v % salt !== 0 : undefined,
        }
        for (const key of Object.keys(row)) if (row[key] === undefined) delete row[key]
        return row as unknown as Row
      })
      const { ids } = await run(rows)
      rows.forEach((row, b) => {
        const { id, close } = oracle(row)
        if (close) skipped++
        else {
          compared++
          expect(
            ids[b],
            `seed ${random.seed} round ${round} row ${b}: ${JSON.stringify({ ...row, logits: vocab })}`,
          ).toBe(id)
        }
      })
    }
    expect(compared).toBeGreaterThan(5 * skipped)
  })

  it('draws with the probabilities of the softmax', async () => {
    const random = new Random()
    const probabilities = [0.4, 0, 0.3, 0.2, 0.1]
    const logits = Float32Array.from(probabilities, p => Math.log(p) + 3)
    const draws = 20_000
    const counts = probabilities.map(() => 0)
    for (let first = 0; first < draws; first += 2000) {
      const rows = Array.from({ length: 2000 }, (_, i) => ({
        logits,
        temperature: 1,
        seed: [random.seed, 5] as [number, number],
        step: first + i,
      }))
      for (const id of (await run(rows)).ids) counts[id]!++
    }
    // Five standard deviations of a binomial count.
    probabilities.forEach((p, v) => {
      expect(
        Math.abs(counts[v]! - p * draws),
        `seed ${random.seed} token ${v}: ${counts}`,
      ).toBeLessThanOrEqual(5 * Math.sqrt(draws * p * (1 - p)))
    })
  })

  it('keeps exactly the smallest set that reaches top_p, and exactly top_k, lowest ids first among equals', async () => {
    const spread = async (row: Row) => {
      const rows = Array.from({ length: 400 }, (_, step) => ({ ...row, temperature: 1, step }))
      return [...new Set((await run(rows)).ids)].sort((a, b) => a - b)
    }
    const equal = new Float32Array(8)
    expect(await spread({ logits: equal, topP: 0.5 })).toEqual([0, 1, 2, 3])
    expect(await spread({ logits: equal, topP: 0.51 })).toEqual([0, 1, 2, 3, 4])
    expect(await spread({ logits: equal, topP: 0 })).toEqual([0])
    expect(await spread({ logits: equal, topK: 3 })).toEqual([0, 1, 2])
    const steps = Float32Array.from([1, 3, 2, 3, 1, 2, 3, -50])
    expect(await spread({ logits: steps, topK: 2 })).toEqual([1, 3])
    expect(await spread({ logits: steps, topK: 4 })).toEqual([1, 2, 3, 6])
    // top_p is of the mass that top_k left: 4 · 0.6 = 2.4 of 4 equal weights.
    expect(await spread({ logits: equal, topK: 4, topP: 0.6 })).toEqual([0, 1, 2])
    expect(await spread({ logits: steps, minP: 0.3 })).toEqual([1, 2, 3, 5, 6])
    expect(await spread({ logits: steps, minP: 0.5 })).toEqual([1, 3, 6])
    expect(await spread({ logits: steps, minP: 1 })).toEqual([1, 3, 6])
  })

  it('penalizes as Hugging Face (repetition) and OpenAI (presence, frequency) do', async () => {
    const logits = Float32Array.from([2, 1.9, -1, -1.1])
    const pick = async (row: Partial<Row>) => (await run([{ logits, ...row }])).ids[0]
    expect(await pick({ history: [0] })).toBe(0)
    expect(await pick({ history: [0], repetition: 1.2 })).toBe(1)
    expect(await pick({ history: [0, 0, 0], repetition: 1.04 })).toBe(0) // once an id, not once an occurrence
    expect(await pick({ history: [2], repetition: 1.2, allowed: v => v > 1 })).toBe(3) // below zero: multiplied
    expect(await pick({ history: [0], presence: 0.2 })).toBe(1)
    expect(await pick({ history: [0, 0, 0], presence: 0.05 })).toBe(0)
    expect(await pick({ history: [0, 0, 0], frequency: 0.05 })).toBe(1)
    expect(await pick({ history: [0], frequency: 0.05 })).toBe(0)
    expect(await pick({ history: [-1, -1], frequency: 5 })).toBe(0) // image slots count for nothing
  })

  it('takes the lowest id among equal maxima and answers -1 where nothing can be chosen', async () => {
    const none = new Float32Array(70).fill(Number.NEGATIVE_INFINITY)
    const tie = new Float32Array(70).fill(1)
    tie[33] = tie[34] = tie[69] = 4
    const bad = new Float32Array(70)
    bad[69] = Number.NaN
    const certain = tie.slice()
    certain[68] = Number.POSITIVE_INFINITY
    for (const temperature of [0, 1]) {
      const { ids, logprobs, topIds } = await run(
        [
          { logits: tie, temperature: 0 },
          { logits: none, temperature },
          { logits: bad, temperature },
          { logits: tie, temperature, allowed: () => false },
          { logits: certain, temperature },
        ],
        1,
      )
      expect(ids).toEqual([33, -1, -1, -1, 68])
      expect(topIds[2]).toBe(-1)
      expect([...logprobs.slice(4, 6)]).toEqual([Number.NaN, Number.NaN])
      expect([...logprobs.slice(8, 10)]).toEqual([0, 0])
    }
  })

  it('reports log_softmax of the raw logits, the largest first', async () => {
    const random = new Random()
    for (const vocab of [1, 7, 64, 1000, 32_003]) {
      const listed = Math.min(vocab, 20)
      const rows = Array.from({ length: 3 }, (_, b) => {
        const logits = random.normals(vocab, 4)
        if (b === 1) for (let v = 0; v < vocab; v++) logits[v] = Math.round(logits[v]!)
        return {
          logits,
          temperature: 1.5,
          topK: 5,
          seed: [b, vocab] as [number, number],
          history: [0],
          presence: 2,
        }
      })
      const { ids, logprobs, topIds } = await run(rows, listed)
      rows.forEach((row, b) => {
        const expected = logSoftmax(row.logits)
        const order = expected
          .map((_, v) => v)
          .sort((x, y) => row.logits[y]! - row.logits[x]! || x - y)
          .slice(0, listed)
        const what = `seed ${random.seed} vocabulary ${vocab} row ${b}`
        expect(topIds.slice(b * listed, (b + 1) * listed), what).toEqual(order)
        expectClose(
          logprobs.slice(b * (listed + 1), (b + 1) * (listed + 1)),
          [ids[b]!, ...order].map(v => expected[v]!),
          // f32 exponentials summed in lanes, then f64; log probabilities reach -30.
          { absolute: 2e-6, relative: 2e-7 },
          what,
        )
      })
    }
  })

  it('draws the same token whatever else is in the batch and however many threads there are', async () => {
    const random = new Random()
    const rows = Array.from({ length: 9 }, (_, b) => ({
      logits: random.normals(5000, 2),
      temperature: 0.8,
      topP: 0.95,
      topK: 200,
      seed: [b, random.seed] as [number, number],
      step: b,
    }))
    const together = await run(rows, 4)
    const single = Device.open('cpu', { threads: 1 })
    expect(await run(rows, 4, single), `seed ${random.seed}`).toEqual(together)
    await single.close()
    for (const [b, row] of rows.entries()) {
      const alone = await run([row], 4)
      expect(alone.ids[0], `seed ${random.seed}`).toBe(together.ids[b])
      expect(alone.logprobs, `seed ${random.seed}`).toEqual(together.logprobs.slice(b * 5, b * 5 + 5))
    }
  })

  it('stands a temperature near zero and one near infinity', async () => {
    const logits = Float32Array.from([1, 5, 4.999, -3])
    expect((await run([{ logits, temperature: 1e-30 }])).ids).toEqual([1])
    expect((await run([{ logits, temperature: 1e-44 }])).ids).toEqual([1])
    const rows = Array.from({ length: 200 }, (_, step) => ({ logits, temperature: 3e38, step }))
    expect(new Set((await run(rows)).ids).size).toBe(4)
  })

  it('refuses ids outside the vocabulary and impossible history lengths', async () => {
    const call = async (history: number[], length: number) => {
      const own = Device.open('cpu', { threads: 1 })
      sample(own.zeros([1, 8]), {
        options: own.tensor([0, 1, 0, 1.1, 0, 0], [1, 6]),
        state: own.tensor([0, 0, 0, 0, length], [1, 5], 'i32'),
        history: own.tensor(history, [1, history.length], 'i32'),
      })
      try {
        await own.synchronize()
      } finally {
        await own.close().catch(() => {})
      }
    }
    await expect(call([1, 8], 2)).rejects.toThrow(/an id below 8 for history entry 1 of row 0 but received 8/)
    await expect(call([1, 2], 3)).rejects.toThrow(/a history length up to 2 for row 0 but received 3/)
    await expect(call([1, 2], -1)).rejects.toThrow(/received -1/)
    await call([1, 8], 1)
  })
})
