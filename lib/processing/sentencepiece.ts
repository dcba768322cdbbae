import { Tokenizer as LibraryTokenizer } from '@huggingface/tokenizers'
import { MgmError } from '../errors.ts'

/** What SentencePiece writes for a space. */
export const SPACE_SYMBOL = '\u2581'

export type PieceType = 'normal' | 'unknown' | 'control' | 'user-defined' | 'unused' | 'byte'

/** One entry of the vocabulary; its index is its id. */
export interface Piece {
  readonly text: string
  readonly score: number
  readonly type: PieceType
}

/** What this library needs of a `tokenizer.model`. Source: `sentencepiece_model.proto`. */
export interface SentencePieceModel {
  /** [vocabulary] */
  readonly pieces: readonly Piece[]
  readonly algorithm: 'unigram' | 'bpe'
  readonly byteFallback: boolean
  /** A space is put in front of each text. */
  readonly addDummyPrefix: boolean
  /** Leading, trailing and repeated spaces are dropped. */
  readonly removeExtraWhitespaces: boolean
  /** Spaces are written as U+2581. */
  readonly escapeWhitespaces: boolean
  /** What the unknown piece decodes to. */
  readonly unkSurface: string
  readonly unkId: number
}

const MAX_PIECES = 4_000_000
const MAX_PIECE_BYTES = 65_536
const TYPES: Record<number, PieceType> = {
  1: 'normal',
  2: 'unknown',
  3: 'control',
  4: 'user-defined',
  5: 'unused',
  6: 'byte',
}

/**
 * Parses a SentencePiece `tokenizer.model`. Nothing in the file is trusted: every length is checked before it is used.
 *
 * @param name the file's name for messages
 * @throws TOKENIZER_INVALID for a malformed file, or one of a kind that is not supported (word and char models, custom
 *   normalisation tables, whitespace as suffix, unused pieces)
 */
export function parseSentencePiece(bytes: Uint8Array, name = 'tokenizer.model'): SentencePieceModel {
  const fail = (what: string): never => {
    throw new MgmError('TOKENIZER_INVALID', `expected a SentencePiece model for ${name} but ${what}`)
  }
  const pieces: Piece[] = []
  let modelType = 1
  let byteFallback = false
  let whitespaceAsSuffix = false
  let addDummyPrefix = true
  let removeExtraWhitespaces = true
  let escapeWhitespaces = true
  let unkSurface = ' \u2047 '
  let hasTable = false

  const readNormalizer = (message: Uint8Array, isDenormalizer: boolean) => {
    for (const field of readMessage(message, fail)) {
      if (field.number === 2 && field.wire === 2 && field.bytes.length > 0) hasTable = true
      else if (isDenormalizer) continue
      else if (field.number === 3) addDummyPrefix = readBool(field, fail)
      else if (field.number === 4) removeExtraWhitespaces = readBool(field, fail)
      else if (field.number === 5) escapeWhitespaces = readBool(field, fail)
    }
  }
  for (const field of readMessage(bytes, fail)) {
    if (field.number > 5 || field.number < 1) continue
    if (field.wire !== 2) fail(`field ${field.number} is not a message`)
    if (field.number === 1) {
      if (pieces.length >= MAX_PIECES) fail(`it has more than ${MAX_PIECES} pieces`)
      pieces.push(readPiece(field.bytes, pieces.length, fail))
    } else if (field.number === 2) {
      for (const spec of readMessage(field.bytes, fail)) {
        if (spec.number === 3) modelType = readInt(spec, fail)
        else if (spec.number === 24) whitespaceAsSuffix = readBool(spec, fail)
        else if (spec.number === 35) byteFallback = readBool(spec, fail)
        else if (spec.number === 44) unkSurface = readText(spec, fail)
      }
    } else if (field.number === 3) readNormalizer(field.bytes, false)
    else if (field.number === 5) readNormalizer(field.bytes, true)
  }

  if (pieces.length === 0) fail('it has no pieces')
  if (modelType !== 1 && modelType !== 2)
    fail(`its model type is ${modelType}, neither unigram (1) nor BPE (2)`)
  if (whitespaceAsSuffix) fail('it writes spaces as suffixes, which is not supported')
  if (hasTable) fail('it has a character normalisation table, which is not supported')
  const ids = new Map<string, number>()
  let unkId = -1
  pieces.forEach(({ text, type }, id) => {
    if (ids.has(text)) fail(`the piece ${JSON.stringify(text)} occurs twice (ids ${ids.get(text)} and ${id})`)
    ids.set(text, id)
    if (type === 'unused') fail(`piece ${id} is marked unused, which is not supported`)
    if (type === 'unknown') {
      if (unkId >= 0) fail(`it has two unknown pieces (ids ${unkId} and ${id})`)
      unkId = id
    }
    if (type === 'byte' && !/^<0x[0-9A-F]{2}>$/.test(text))
      fail(`byte piece ${id} is ${JSON.stringify(text)}`)
  })
  if (unkId < 0) fail('it has no unknown piece')
  const byteCount = pieces.reduce((n, { type }) => n + (type === 'byte' ? 1 : 0), 0)
  if (byteFallback && byteCount !== 256) fail(`it falls back to bytes but has ${byteCount} byte pieces`)
  return {
    pieces,
    algorithm: modelType === 2 ? 'bpe' : 'unigram',
    byteFallback,
    addDummyPrefix,
    removeExtraWhitespaces,
    escapeWhitespaces,
    unkSurface,
    unkId,
  }
}

type Fail = (what: string) => never

interface Field {
  readonly number: number
  readonly wire: number
  /** The value of a varint (wire 0), modulo 2^53. */
  readonly int: number
  /** The payload of wire types 1, 2 and 5. */
  readonly bytes: Uint8Array
}

const NO_BYTES = new Uint8Array(0)

function* readMessage(bytes: Uint8Array, fail: Fail): Generator<Field> {
  let at = 0
  const readVarint = (): number => {
    let value = 0
    for (let shift = 0; shift < 70; shift += 7) {
      if (at >= bytes.length) fail('it is truncated')
      const byte = bytes[at++]!
      // Bits past 53 belong to negative numbers, which no field read here may hold.
      if (shift < 49) value += (byte & 0x7f) * 2 ** shift
      else if ((byte & 0x7f) !== 0) value = Number.NaN
      if (byte < 0x80) return value
    }
    return fail('a number in it is longer than 10 bytes')
  }
  while (at < bytes.length) {
    const key = readVarint()
    const wire = key % 8
    const number = Math.floor(key / 8)
    if (!(number >= 1 && number < 2 ** 29)) fail(`it has the field number ${number}`)
    if (wire === 0) yield { number, wire, int: readVarint(), bytes: NO_BYTES }
    else {
      const length =
        wire === 1 ? 8 : wire === 5 ? 4 : wire === 2 ? readVarint() : fail(`it has the wire type ${wire}`)
      if (!(length <= bytes.length - at)) fail(`a field of ${length} bytes runs past its end`)
      yield { number, wire, int: 0, bytes: bytes.subarray(at, at + length) }
      at += length
    }
  }
}

function readInt(field: Field, fail: Fail): number {
  if (field.wire !== 0 || Number.isNaN(field.int)) fail(`field ${field.number} is not a small whole number`)
  return field.int
}

function readBool(field: Field, fail: Fail): boolean {
  return readInt(field, fail) !== 0
}

const utf8Encoder = new TextEncoder()
const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true })

function readText(field: Field, fail: Fail): string {
  if (field.wire !== 2) fail(`field ${field.number} is not a string`)
  if (field.bytes.length > MAX_PIECE_BYTES) fail(`it has a string of ${field.bytes.length} bytes`)
  try {
    return utf8.decode(field.bytes)
  } catch {
    return fail('a string in it is not UTF-8')
  }
}

function readPiece(message: Uint8Array, id: number, fail: Fail): Piece {
  let text = ''
  let score = 0
  let type: PieceType | undefined = 'normal'
  for (const field of readMessage(message, fail)) {
    if (field.number === 1) text = readText(field, fail)
    else if (field.number === 2) {
      if (field.wire !== 5) fail(`the score of piece ${id} is not a float`)
      score = new DataView(field.bytes.buffer, field.bytes.byteOffset, 4).getFloat32(0, true)
    } else if (field.number === 3) type = TYPES[readInt(field, fail)]
  }
  if (text === '') fail(`piece ${id} is empty`)
  if (!Number.isFinite(score)) fail(`the score of piece ${id} is ${score}`)
  if (type === undefined) fail(`the type of piece ${id} is unknown`)
  return { text, score, type: type! }
}

/**
 * The model as a `tokenizer.json` object: the vocabulary, and for BPE every merge that leads to a piece, best score
 * first. User-defined pieces become added tokens, which match before the model runs, as in SentencePiece. Control,
 * unknown and byte pieces cannot be written out in a text, so no merge makes them.
 */
export function toTokenizerJson(model: SentencePieceModel): {
  model: Record<string, unknown>
  added_tokens: object[]
  [key: string]: unknown
} {
  const { pieces } = model
  const added_tokens = pieces.flatMap(({ text, type }, id) =>
    type === 'user-defined' ? [{ id, content: text, normalized: false, special: false }] : [],
  )
  const rest = {
    version: '1.0',
    added_tokens,
    normalizer: null,
    pre_tokenizer: null,
    post_processor: null,
    decoder: null,
  }
  if (model.algorithm === 'unigram') {
    // Ids are those of this list, not the model's: see createEncoder. The library would find the unknown piece's name in a
    // text, so it gets one that no well-formed text holds.
    const vocab: [string, number][] = [['\uD800', 0]]
    for (const { text, score, type } of pieces) if (type === 'normal') vocab.push([text, score])
    return { ...rest, model: { type: 'Unigram', unk_id: 0, vocab } }
  }
  const vocab: Record<string, number> = Object.create(null)
  pieces.forEach(({ text }, id) => {
    vocab[text] = id
  })
  return {
    ...rest,
    model: {
      type: 'BPE',
      unk_token: pieces[model.unkId]!.text,
      fuse_unk: true,
      byte_fallback: model.byteFallback,
      vocab,
      merges: listMerges(model).map(merge => merge.pair),
    },
  }
}

interface Merge {
  readonly pair: readonly [string, string]
  /** 0 is merged first; pairs that make the same piece, or pieces of the same score, share a rank. */
  readonly rank: number
}

function listMerges({ pieces }: SentencePieceModel): Merge[] {
  const normal = new Set<string>()
  for (const { text, type } of pieces) if (type === 'normal') normal.add(text)
  const byScore = pieces.filter(({ type }) => type === 'normal').sort((a, b) => b.score - a.score)
  const merges: Merge[] = []
  let rank = -1
  let lastScore = Number.NaN
  for (const { text, score } of byScore) {
    if (score !== lastScore) rank++
    lastScore = score
    const points = Array.from(text)
    let left = ''
    for (let i = 1; i < points.length; i++) {
      left += points[i - 1]
      const right = text.slice(left.length)
      // A single character may be merged though it is no piece itself.
      if ((i === 1 || normal.has(left)) && (i === points.length - 1 || normal.has(right))) {
        merges.push({ pair: [left, right], rank })
      }
    }
  }
  return merges
}

/**
 * Makes the function that turns one text into ids, as `SentencePieceProcessor::Encode`.
 *
 * @param dummyPrefix overrides the model's own `addDummyPrefix`
 * @returns a function of the text and of `keepLeadingSpace`, which spares the text's first space where the model removes
 *   extra ones (default false)
 */
export function createEncoder(
  model: SentencePieceModel,
  dummyPrefix: boolean = model.addDummyPrefix,
): (text: string, keepLeadingSpace?: boolean) => number[] {
  const library = new LibraryTokenizer(toTokenizerJson(model), {})
  // The library's BPE has made byte pieces and unknown pieces of what it does not know; its unigram model hands that on as
  // it is, where it must not be taken for the piece of that name.
  const byText = new Map<string, number>()
  model.pieces.forEach(({ text, type }, id) => {
    if (model.algorithm === 'bpe' || type === 'normal' || type === 'user-defined') byText.set(text, id)
  })
  const byteIds = new Map<number, number>()
  model.pieces.forEach(({ text, type }, id) => {
    if (type === 'byte') byteIds.set(Number.parseInt(text.slice(3, 5), 16), id)
  })
  const trailingSpaces = model.escapeWhitespaces ? /\u2581+$/ : / +$/
  if (model.algorithm === 'bpe') {
    // The library ranks merges by their place in the list, which cannot say "equal"; SentencePiece merges pairs of equal
    // score from left to right, so the shared ranks are put in afterwards.
    const ranks = (library.model as unknown as { bpe_ranks: Map<string, number> }).bpe_ranks
    for (const { pair, rank } of listMerges(model)) ranks.set(JSON.stringify(pair), rank)
  }
  return (text, keepLeadingSpace = false) => {
    let normalized = text
    if (model.removeExtraWhitespaces) {
      normalized = normalized.replace(/ {2,}/g, ' ')
      if (!keepLeadingSpace) normalized = normalized.replace(/^ /, '')
    }
    if (normalized === '') return []
    if (dummyPrefix) normalized = ` ${normalized}`
    if (model.escapeWhitespaces) normalized = normalized.replaceAll(' ', SPACE_SYMBOL)
    if (model.removeExtraWhitespaces) normalized = normalized.replace(trailingSpaces, '')
    return library.tokenize(normalized).flatMap((token: string) => {
      const id = byText.get(token)
      if (id !== undefined) return [id]
      return model.byteFallback
        ? Array.from(utf8Encoder.encode(token), byte => byteIds.get(byte)!)
        : [model.unkId]
    })
  }
}
