import { readFileSync } from 'node:fs'
import { describe, expect, it } from 'vitest'
import { MgmError } from '../../lib/errors.ts'
import { createEncoder, parseSentencePiece, SPACE_SYMBOL } from '../../lib/processing/sentencepiece.ts'

const NORMAL = 1
const UNKNOWN = 2
const CONTROL = 3
const USER = 4
const BYTE = 6
type Entry = [text: string, score: number, type: number]

// A protobuf writer, just enough for sentencepiece_model.proto.
const varint = (n: number): number[] => (n < 128 ? [n] : [(n % 128) | 128, ...varint(Math.floor(n / 128))])
const int = (field: number, n: number) => [...varint(field * 8), ...varint(n)]
const bytes = (field: number, data: ArrayLike<number>) => [
  ...varint(field * 8 + 2),
  ...varint(data.length),
  ...Array.from(data),
]
const text = (field: number, value: string) => bytes(field, new TextEncoder().encode(value))
const float = (field: number, value: number) => [
  ...varint(field * 8 + 5),
  ...new Uint8Array(new Float32Array([value]).buffer),
]
const piece = ([value, score, type]: Entry) =>
  bytes(1, [...text(1, value), ...float(2, score), ...int(3, type)])

function model(
  entries: Entry[],
  { type = 2, byteFallback = false, dummyPrefix = false, removeExtra = false, trainer = [] as number[] } = {},
): Uint8Array {
  return Uint8Array.from([
    ...entries.flatMap(piece),
    ...bytes(2, [...int(3, type), ...int(35, byteFallback ? 1 : 0), ...trainer]),
    ...bytes(3, [...text(1, 'identity'), ...int(3, dummyPrefix ? 1 : 0), ...int(4, removeExtra ? 1 : 0)]),
  ])
}
const base: Entry[] = [
  ['<unk>', 0, UNKNOWN],
  ['<s>', 0, CONTROL],
  ['</s>', 0, CONTROL],
]
const byteToken = (byte: number) => `<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`
const allBytes = Array.from({ length: 256 }, (_, byte): Entry => [byteToken(byte), 0, BYTE])

/** A seeded generator: numbers in [0, 1). */
function random(seed: number): () => number {
  let state = seed
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return state / 2 ** 32
  }
}
const pick = <T>(rng: () => number, list: readonly T[]): T => list[Math.floor(rng() * list.length)]!
const strings = (rng: () => number, alphabet: string, count: number, longest: number) =>
  Array.from({ length: count }, () =>
    Array.from({ length: 1 + Math.floor(rng() * longest) }, () => pick(rng, [...alphabet])).join(''),
  )

/** SentencePiece's BPE by the book: while two neighbours make a piece, join the best of them, leftmost first. */
function naiveBpe(entries: Entry[], input: string): number[] {
  const find = (value: string) => entries.findIndex(([p, , type]) => p === value && type === NORMAL)
  const symbols: { value: string; frozen: boolean }[] = []
  for (let rest = input; rest !== ''; ) {
    const user = entries
      .filter(([p, , type]) => type === USER && rest.startsWith(p))
      .sort((a, b) => b[0].length - a[0].length)[0]
    const value = user?.[0] ?? [...rest][0]!
    symbols.push({ value, frozen: user !== undefined })
    rest = rest.slice(value.length)
  }
  for (;;) {
    let best = -1
    let bestScore = Number.NEGATIVE_INFINITY
    for (let i = 0; i + 1 < symbols.length; i++) {
      if (symbols[i]!.frozen || symbols[i + 1]!.frozen) continue
      const id = find(symbols[i]!.value + symbols[i + 1]!.value)
      if (id >= 0 && entries[id]![1] > bestScore) {
        best = i
        bestScore = entries[id]![1]
      }
    }
    if (best < 0) break
    symbols.splice(best, 2, { value: symbols[best]!.value + symbols[best + 1]!.value, frozen: false })
  }
  const hasBytes = entries.some(([, , type]) => type === BYTE)
  const ids: number[] = []
  let lastUnknown = false
  for (const { value, frozen } of symbols) {
    const id = frozen ? entries.findIndex(([p]) => p === value) : find(value)
    if (id < 0 && hasBytes) {
      for (const byte of new TextEncoder().encode(value))
        ids.push(entries.findIndex(([p]) => p === byteToken(byte)))
    } else if (id >= 0 || !lastUnknown) ids.push(Math.max(id, 0))
    lastUnknown = id < 0 && !hasBytes
  }
  return ids
}

/** The best segmentation by trying all of them. */
function naiveUnigram(entries: Entry[], input: string): number[] {
  const normal = entries.filter(([, , type]) => type === NORMAL)
  const unknownScore = Math.min(...normal.map(([, score]) => score)) - 10
  const solve = (rest: string[]): { score: number; ids: number[] } => {
    if (rest.length === 0) return { score: 0, ids: [] }
    let best = { score: Number.NEGATIVE_INFINITY, ids: [] as number[] }
    for (let n = 1; n <= rest.length; n++) {
      const value = rest.slice(0, n).join('')
      const id = entries.findIndex(([p, , type]) => p === value && type === NORMAL)
      if (id < 0 && n > 1) continue
      const tail = solve(rest.slice(n))
      const score = (id < 0 ? unknownScore : entries[id]![1]) + tail.score
      if (score > best.score) best = { score, ids: [Math.max(id, 0), ...tail.ids] }
    }
    return best
  }
  return solve([...input]).ids.filter((id, i, ids) => id !== 0 || ids[i - 1] !== 0)
}

describe('SentencePiece encoding', () => {
  it.each([1, 2, 3, 4, 5, 6, 7, 8])('BPE equals joining the best pair by hand (seed %i)', seed => {
    const rng = random(seed)
    const hasTies = seed % 2 === 0
    const words = [...new Set(strings(rng, 'abcé😀', 40, 5))]
    const entries: Entry[] = [
      ...base,
      ...(seed % 3 === 0 ? allBytes : []),
      ...words.map(
        (word, i): Entry => [
          word,
          hasTies ? -Math.floor(i / 8) : -i,
          seed % 4 === 3 && i < 3 ? USER : NORMAL,
        ],
      ),
    ]
    const parsed = parseSentencePiece(model(entries, { byteFallback: seed % 3 === 0 }))
    const encode = createEncoder(parsed)
    for (const input of strings(rng, 'abcdé😀', 200, 14)) {
      expect([input, encode(input)]).toEqual([input, naiveBpe(entries, input)])
    }
  })

  it.each([1, 2, 3, 4])('unigram equals the best of all segmentations (seed %i)', seed => {
    const rng = random(seed * 77)
    const words = [...new Set(strings(rng, 'abcé', 30, 4))]
    const entries: Entry[] = [...base, ...words.map((word): Entry => [word, -1 - rng() * 9, NORMAL])]
    const encode = createEncoder(parseSentencePiece(model(entries, { type: 1 })))
    for (const input of strings(rng, 'abcdé', 200, 9)) {
      expect([input, encode(input)]).toEqual([input, naiveUnigram(entries, input)])
    }
  })

  it('does not find control, unknown and byte pieces in a text', () => {
    for (const type of [1, 2]) {
      const entries = [...base, ...allBytes, ['<', -5, NORMAL] as Entry, ['a', -1, NORMAL] as Entry]
      const encode = createEncoder(parseSentencePiece(model(entries, { type, byteFallback: true })))
      const byte = (c: string) => 3 + c.charCodeAt(0)
      expect(encode('<s>')).toEqual([259, byte('s'), byte('>')])
      expect(encode('<0x0A>a')).toEqual([259, ...[...'0x0A>'].map(byte), 260])
      expect(encode('<unk>a')).toEqual([259, ...[...'unk>'].map(byte), 260])
    }
  })

  it('writes spaces as the model asks', () => {
    const entries: Entry[] = [
      ...base,
      [SPACE_SYMBOL, -1, NORMAL],
      ['a', -2, NORMAL],
      [`${SPACE_SYMBOL}a`, -0.5, NORMAL],
    ]
    const encode = (input: string, options: object) =>
      createEncoder(parseSentencePiece(model(entries, options)))(input)
    expect(encode('a  a ', {})).toEqual([4, 3, 5, 3])
    expect(encode('a', { dummyPrefix: true })).toEqual([5])
    expect(encode(' a', { dummyPrefix: true })).toEqual([3, 5])
    expect(encode('', { dummyPrefix: true })).toEqual([])
    expect(encode('  a   a  ', { dummyPrefix: true, removeExtra: true })).toEqual([5, 5])
    expect(encode('   ', { dummyPrefix: true, removeExtra: true })).toEqual([])
  })
})

describe('parseSentencePiece', () => {
  const good = model([...base, ['a', -1, NORMAL]])

  it('reads a released file', () => {
    const file = readFileSync(new URL('../fixtures/mgm-vicuna-tiny/MGM-7B/tokenizer.model', import.meta.url))
    const parsed = parseSentencePiece(file)
    expect(parsed).toMatchObject({
      algorithm: 'bpe',
      byteFallback: true,
      addDummyPrefix: true,
      removeExtraWhitespaces: false,
      escapeWhitespaces: true,
      unkId: 0,
    })
    expect(parsed.pieces).toHaveLength(480)
    expect(parsed.pieces[13]).toEqual({ text: '<0x0A>', score: 0, type: 'byte' })
  })

  it.each<[string, Uint8Array, RegExp]>([
    ['an empty file', new Uint8Array(0), /it has no pieces/],
    [
      'text',
      new TextEncoder().encode('version https://git-lfs'),
      /expected a SentencePiece model for t\.model but/,
    ],
    ['a word model', model(base, { type: 3 }), /model type is 3/],
    ['spaces as suffixes', model(base, { trainer: int(24, 1) }), /writes spaces as suffixes/],
    ['a normalisation table', Uint8Array.from([...good, ...bytes(3, bytes(2, [1]))]), /normalisation table/],
    [
      'two equal pieces',
      model([...base, ['a', 0, NORMAL], ['a', 0, NORMAL]]),
      /"a" occurs twice \(ids 3 and 4\)/,
    ],
    ['two unknown pieces', model([...base, ['?', 0, UNKNOWN]]), /two unknown pieces \(ids 0 and 3\)/],
    ['no unknown piece', model([['a', 0, NORMAL]]), /no unknown piece/],
    ['an unused piece', model([...base, ['a', 0, 5]]), /piece 3 is marked unused/],
    ['an unheard-of type', model([...base, ['a', 0, 9]]), /type of piece 3 is unknown/],
    [
      'an endless score',
      model([...base, ['a', Number.POSITIVE_INFINITY, NORMAL]]),
      /score of piece 3 is Infinity/,
    ],
    ['an empty piece', model([...base, ['', 0, NORMAL]]), /piece 3 is empty/],
    ['a wrong byte piece', model([...base, ['<0xZZ>', 0, BYTE]]), /byte piece 3 is "<0xZZ>"/],
    ['too few bytes', model([...base, ...allBytes.slice(1)], { byteFallback: true }), /255 byte pieces/],
    ['bytes that are not UTF-8', Uint8Array.from(bytes(1, bytes(1, [0xff]))), /not UTF-8/],
    ['a field past the end', Uint8Array.from([10, 200, 1, 1]), /200 bytes runs past its end/],
    ['a group', Uint8Array.from([11]), /wire type 3/],
    ['the field 0', Uint8Array.from([0, 1]), /field number 0/],
    ['an endless number', Uint8Array.from(Array(20).fill(0xff)), /longer than 10 bytes/],
  ])('refuses %s', (_, file, message) => {
    expect(() => parseSentencePiece(file, 't.model')).toThrow(message)
    expect(() => parseSentencePiece(file, 't.model')).toThrow(
      expect.objectContaining({ code: 'TOKENIZER_INVALID' }),
    )
  })

  it('answers damage with a typed error or a model, never another way', () => {
    const file = model([...base, ...allBytes, ['a', -1, NORMAL]], { byteFallback: true })
    const rng = random(9)
    let refused = 0
    for (let round = 0; round < 3000; round++) {
      let damaged = Uint8Array.from(file)
      for (let n = 0; n <= rng() * 3; n++)
        damaged[Math.floor(rng() * damaged.length)] = Math.floor(rng() * 256)
      if (round % 3 === 0) damaged = damaged.slice(0, Math.floor(rng() * damaged.length))
      try {
        parseSentencePiece(damaged)
      } catch (error) {
        expect(error).toBeInstanceOf(MgmError)
        refused++
      }
    }
    expect(refused).toBeGreaterThan(1000)
  })
})
