import type { Random } from './helpers.ts'

/** Sequences of some lengths and the pages that hold their keys and values. */
export interface Setup {
  heads: number
  kvHeads: number
  headDim: number
  pageSize: number
  lengths: readonly number[]
}

export interface Inputs {
  /** Of k and v: [pages, kvHeads, pageSize, headDim]. */
  pageShape: number[]
  k: Float32Array
  v: Float32Array
  /** [sequences, most pages of one]. */
  blockTable: Int32Array
  tableShape: number[]
  /** Of each sequence's tokens, [heads, headDim]. */
  queries: Float32Array[][]
  /** Where in k and v the KV head of a token lies. */
  slot(sequence: number, token: number, kvHead: number): number
  /** Queries of the newest `counts[b]` of the first `contexts[b]` tokens, [rows, heads + 1, headDim]: the last head is NaN. */
  newest(counts: readonly number[], contexts: readonly number[]): { data: Float32Array; shape: number[] }
}

/** Every token's query, key and value, in shuffled pages whose unused slots hold NaN. `scale`: of the query at a position. */
export function inputs(
  { heads, kvHeads, headDim, pageSize, lengths }: Setup,
  random: Random,
  scale: (position: number) => number = () => 1,
): Inputs {
  const blocks = lengths.map(length => Math.ceil(length / pageSize))
  const pages = blocks.reduce((a, b) => a + b) + 2
  const order = Array.from({ length: pages }, (_, i) => i)
  for (let i = pages - 1; i > 0; i--) {
    const j = random.integer(0, i)
    ;[order[i], order[j]] = [order[j]!, order[i]!]
  }
  const maxBlocks = Math.max(...blocks)
  const blockTable = new Int32Array(lengths.length * maxBlocks).fill(-1)
  const pool = () => new Float32Array(pages * kvHeads * pageSize * headDim).fill(Number.NaN)
  const [k, v] = [pool(), pool()]
  const slot = (b: number, j: number, h: number) =>
    ((blockTable[b * maxBlocks + Math.floor(j / pageSize)]! * kvHeads + h) * pageSize + (j % pageSize)) *
    headDim
  let next = 0
  lengths.forEach((length, b) => {
    for (let i = 0; i < blocks[b]!; i++) blockTable[b * maxBlocks + i] = order[next++]!
    for (let j = 0; j < length; j++)
      for (let h = 0; h < kvHeads; h++) {
        k.set(random.normals(headDim), slot(b, j, h))
        v.set(random.normals(headDim), slot(b, j, h))
      }
  })
  const queries = lengths.map(length =>
    Array.from({ length }, (_, i) => random.normals(heads * headDim, scale(i))),
  )
  return {
    pageShape: [pages, kvHeads, pageSize, headDim],
    k,
    v,
    blockTable,
    tableShape: [lengths.length, maxBlocks],
    queries,
    slot,
    newest(counts, contexts) {
      const rows = counts.flatMap((n, b) => queries[b]!.slice(contexts[b]! - n, contexts[b]!))
      const data = new Float32Array(rows.length * (heads + 1) * headDim).fill(Number.NaN)
      rows.forEach((row, i) => {
        data.set(row, i * (heads + 1) * headDim)
      })
      return { data, shape: [rows.length, heads + 1, headDim] }
    },
  }
}

/** Where each of `counts` begins, and the end: [0, counts[0], counts[0] + counts[1], ...]. */
export function offsets(counts: readonly number[]): number[] {
  const cu = [0]
  for (const n of counts) cu.push(cu.at(-1)! + n)
  return cu
}
