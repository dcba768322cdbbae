import { readFile, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { Tokenizer as LibraryTokenizer } from '@huggingface/tokenizers'
import { expected, MgmError, throwIfAborted } from '../errors.ts'
import { wellFormed } from './prompt.ts'
import { createEncoder, parseSentencePiece, type SentencePieceModel, SPACE_SYMBOL } from './sentencepiece.ts'

/** Which of a checkpoint's tokenizers counts: the reference loads the slow one for Llama, the fast one for the others. */
export type TokenizerFamily = 'llama' | 'gemma' | 'mixtral'

export interface LoadTokenizerOptions {
  readonly family: TokenizerFamily
  /** Special tokens to append where the files lack them (`<im_patch>`, `<im_start>`, `<im_end>`). */
  readonly extraTokens?: readonly string[] | undefined
  readonly signal?: AbortSignal | undefined
}

export interface EncodeOptions {
  /** Adds BOS (and EOS) where the tokenizer is set to. Default true. */
  readonly addSpecialTokens?: boolean | undefined
}

export interface DecodeOptions {
  /** Leaves special tokens out of the text. */
  readonly skipSpecialTokens?: boolean | undefined
}

/** Text to ids and back, equal to the reference's Hugging Face tokenizer. */
export interface Tokenizer {
  /** Lone surrogates count as U+FFFD. A special token written out in the text becomes that token. */
  encode(text: string, options?: EncodeOptions): number[]
  /** `skipSpecialTokens` is false by default. Ids without a token are left out. */
  decode(ids: Iterable<number>, options?: DecodeOptions): string
  /** Decodes id by id; `skipSpecialTokens` is true by default. */
  createStream(options?: DecodeOptions): IncrementalDecoder
  /** The token string of an id. */
  token(id: number): string | undefined
  readonly bosId: number | undefined
  readonly eosId: number
  readonly padId: number | undefined
  /** Whether `encode` begins with `bosId`. */
  readonly addsBos: boolean
  /** Ids that `skipSpecialTokens` leaves out. */
  readonly specialIds: ReadonlySet<number>
  /** Every string that `encode` turns into one token wherever it stands. */
  readonly specialTokens: readonly string[]
  /** Number of tokens, added ones included: Hugging Face's `len(tokenizer)`. */
  readonly size: number
}

/**
 * Decodes a growing list of ids. The texts that `push` and `flush` return, joined, are `decode` of all the ids; none of
 * them ends within a character. U+FFFD comes only for bytes that no later id can complete.
 */
export interface IncrementalDecoder {
  push(id: number): string
  /** The text that was held back. The decoder is then ready for another list. */
  flush(): string
}

const MAX_FILE_BYTES = 256 * 2 ** 20

/**
 * Loads the tokenizer of a checkpoint folder.
 *
 * Llama: `tokenizer.model` with the semantics of transformers' slow `LlamaTokenizer` if there is one, else
 * `tokenizer.json`. Gemma and Mixtral: `tokenizer.json`, else `tokenizer.model`.
 *
 * @throws TOKENIZER_INVALID when files are missing, malformed or of an unsupported kind; ABORTED
 */
export async function loadTokenizer(folder: string, options: LoadTokenizerOptions): Promise<Tokenizer> {
  if (!['llama', 'gemma', 'mixtral'].includes(options.family)) {
    throw expected('"llama", "gemma" or "mixtral"', 'family', options.family)
  }
  const { signal } = options
  const read = (name: string) => readIfThere(join(folder, name), signal)
  const readJson = async (name: string) => parseJson(await read(name), join(folder, name))

  const config = (await readJson('tokenizer_config.json')) ?? {}
  const specialMap = (await readJson('special_tokens_map.json')) ?? {}
  const addedMap = await readJson('added_tokens.json')
  const settings = readSettings(folder, config, specialMap, addedMap, options.extraTokens ?? [])

  const slowFirst = options.family === 'llama'
  for (const kind of slowFirst ? ['slow', 'fast'] : ['fast', 'slow']) {
    if (kind === 'slow') {
      const bytes = await read('tokenizer.model')
      if (bytes)
        return createSlow(folder, parseSentencePiece(bytes, join(folder, 'tokenizer.model')), settings)
    } else {
      const json = await readJson('tokenizer.json')
      if (json) return createFast(folder, json, settings)
    }
  }
  throw new MgmError(
    'TOKENIZER_INVALID',
    `expected tokenizer.model or tokenizer.json in ${folder} but found neither; download the checkpoint again`,
  )
}

export async function readIfThere(
  path: string,
  signal: AbortSignal | undefined,
): Promise<Uint8Array | undefined> {
  throwIfAborted(signal)
  try {
    const { size } = await stat(path)
    if (size > MAX_FILE_BYTES)
      throw invalid(path, `a file of at most ${MAX_FILE_BYTES} bytes`, `${size} bytes`)
    return await readFile(path, { signal })
  } catch (error) {
    throwIfAborted(signal)
    if (error instanceof MgmError) throw error
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined
    throw new MgmError('TOKENIZER_INVALID', `${path} cannot be read: ${(error as Error).message}`, {
      cause: error,
    })
  }
}

type Json = Record<string, unknown>

export const isObject = (value: unknown): value is Json =>
  typeof value === 'object' && value !== null && !Array.isArray(value)

export function invalid(where: string, what: string, received: string): MgmError {
  return new MgmError('TOKENIZER_INVALID', `expected ${what} for ${where} but received ${received}`)
}

export function parseJson(bytes: Uint8Array | undefined, path: string): Json | undefined {
  if (bytes === undefined) return undefined
  let value: unknown
  try {
    value = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(bytes))
  } catch (error) {
    throw new MgmError('TOKENIZER_INVALID', `${path} is not JSON: ${(error as Error).message}`, {
      cause: error,
    })
  }
  if (!isObject(value)) throw invalid(path, 'an object', Array.isArray(value) ? 'an array' : String(value))
  return value
}

/** A token that matches as a whole before the model runs. Source: `AddedToken` of transformers. */
export interface AddedToken {
  readonly content: string
  readonly lstrip: boolean
  readonly rstrip: boolean
  readonly singleWord: boolean
  readonly normalized: boolean
  readonly special: boolean
}

/** What tokenizer_config.json, special_tokens_map.json and added_tokens.json say together. */
export interface Settings {
  readonly tokenizerClass: string
  readonly addBos: boolean
  readonly addEos: boolean
  readonly addPrefixSpace: boolean
  readonly legacy: boolean
  readonly cleanUp: boolean
  readonly added: ReadonlyMap<number, AddedToken>
  readonly bos: string | undefined
  readonly eos: string | undefined
  readonly pad: string | undefined
  /** Every named special token, in the order in which missing ones are appended. */
  readonly named: readonly AddedToken[]
  /** The subset of `named` that stands in `additional_special_tokens`. */
  readonly additional: ReadonlySet<string>
  readonly extra: readonly string[]
}

const SPECIAL_ROLES = [
  'bos_token',
  'eos_token',
  'unk_token',
  'sep_token',
  'pad_token',
  'cls_token',
  'mask_token',
]

export function readSettings(
  folder: string,
  config: Json,
  specialMap: Json,
  addedMap: Json | undefined,
  extra: readonly string[],
): Settings {
  const where = join(folder, 'tokenizer_config.json')
  const bool = (key: string, byDefault: boolean): boolean => {
    const value = config[key] ?? byDefault
    if (typeof value !== 'boolean') throw invalid(`${key} in ${where}`, 'true or false', String(value))
    return value
  }
  const added = new Map<number, AddedToken>()
  const roles: Json = { ...config }
  if (config.added_tokens_decoder !== undefined) {
    if (!isObject(config.added_tokens_decoder))
      throw invalid(`added_tokens_decoder in ${where}`, 'an object', 'another')
    for (const [id, token] of Object.entries(config.added_tokens_decoder)) {
      added.set(readId(Number(id), where), readAdded(token, where, false))
    }
  } else {
    // The layout before transformers 4.34: the two other files count, special_tokens_map.json wins.
    Object.assign(roles, specialMap)
    const special = new Set([
      ...SPECIAL_ROLES.map(role => tokenText(roles[role])),
      ...(Array.isArray(roles.additional_special_tokens)
        ? roles.additional_special_tokens.map(tokenText)
        : []),
    ])
    for (const [content, id] of Object.entries(addedMap ?? {})) {
      added.set(readId(id, join(folder, 'added_tokens.json')), plainToken(content, special.has(content)))
    }
  }

  const known = new Map([...added.values()].map(token => [token.content, token]))
  const named = new Map<string, AddedToken>()
  const additional = new Set<string>()
  const addNamed = (value: unknown) => {
    const content = tokenText(value)
    if (content === undefined || content === '') return
    const token =
      known.get(content) ?? (isObject(value) ? readAdded(value, where, true) : plainToken(content, true))
    if (!named.has(content)) named.set(content, token)
  }
  for (const role of SPECIAL_ROLES) addNamed(roles[role])
  if (Array.isArray(roles.additional_special_tokens)) {
    for (const value of roles.additional_special_tokens) {
      addNamed(value)
      additional.add(tokenText(value) ?? '')
    }
  }
  return {
    tokenizerClass: typeof config.tokenizer_class === 'string' ? config.tokenizer_class : '',
    addBos: bool('add_bos_token', true),
    addEos: bool('add_eos_token', false),
    addPrefixSpace: bool('add_prefix_space', true),
    legacy: bool('legacy', true),
    cleanUp: bool('clean_up_tokenization_spaces', false),
    added,
    bos: tokenText(roles.bos_token),
    eos: tokenText(roles.eos_token),
    pad: tokenText(roles.pad_token),
    named: [...named.values()],
    additional,
    extra,
  }
}

function tokenText(value: unknown): string | undefined {
  if (typeof value === 'string') return value
  return isObject(value) && typeof value.content === 'string' ? value.content : undefined
}

export function plainToken(content: string, special: boolean): AddedToken {
  return { content, lstrip: false, rstrip: false, singleWord: false, normalized: !special, special }
}

function readAdded(value: unknown, where: string, special: boolean): AddedToken {
  if (!isObject(value) || typeof value.content !== 'string' || value.content === '') {
    throw invalid(
      `an added token in ${where}`,
      'an object with a content',
      JSON.stringify(value) ?? 'nothing',
    )
  }
  const isSpecial = special || value.special === true
  return {
    content: value.content,
    lstrip: value.lstrip === true,
    rstrip: value.rstrip === true,
    singleWord: value.single_word === true,
    normalized: typeof value.normalized === 'boolean' ? value.normalized : !isSpecial,
    special: isSpecial,
  }
}

function readId(id: unknown, where: string): number {
  if (typeof id !== 'number' || !Number.isInteger(id) || id < 0 || id >= 2 ** 24) {
    throw invalid(`a token id in ${where}`, 'a whole number below 16777216', String(id))
  }
  return id
}

/** Both kinds: an id table, special ids, an encoder of bare text and a maker of streams. */
interface Parts {
  readonly folder: string
  readonly settings: Settings
  readonly texts: ReadonlyMap<number, string>
  readonly ids: ReadonlyMap<string, number>
  readonly specialIds: ReadonlySet<number>
  readonly specialTokens: readonly string[]
  readonly size: number
  readonly addsBos: boolean
  readonly encode: (text: string, addSpecialTokens: boolean) => number[]
  readonly createStream: (skipSpecialTokens: boolean) => IncrementalDecoder
}

function assemble(parts: Parts): Tokenizer {
  const { settings, ids } = parts
  const idOf = (text: string | undefined) => (text === undefined ? undefined : ids.get(text))
  const eosId = idOf(settings.eos)
  if (eosId === undefined) {
    throw invalid(
      `eos_token in ${join(parts.folder, 'tokenizer_config.json')}`,
      'a token of the vocabulary',
      JSON.stringify(settings.eos) ?? 'nothing',
    )
  }
  const createStream = (skip: boolean) => {
    const stream = parts.createStream(skip)
    return settings.cleanUp ? new CleanUpStream(stream) : stream
  }
  return {
    encode: (text, { addSpecialTokens = true } = {}) => {
      if (typeof text !== 'string') throw expected('a string', 'text', text)
      return parts.encode(wellFormed(text), addSpecialTokens)
    },
    decode: (list, { skipSpecialTokens = false } = {}) => {
      const stream = createStream(skipSpecialTokens)
      let text = ''
      for (const id of list) text += stream.push(id)
      return text + stream.flush()
    },
    createStream: ({ skipSpecialTokens = true } = {}) => createStream(skipSpecialTokens),
    token: id => parts.texts.get(id),
    bosId: idOf(settings.bos),
    eosId,
    padId: idOf(settings.pad),
    addsBos: parts.addsBos,
    specialIds: parts.specialIds,
    specialTokens: parts.specialTokens,
    size: parts.size,
  }
}

/** The text of decoded ids before clean-up, one id at a time. */
interface Decoder extends IncrementalDecoder {}

// ---------------------------------------------------------------------------------------------------------------------
// tokenizer.json, as transformers' fast tokenizers

const FAST_LLAMA_CLASSES = /^(Code)?(Llama|Gemma)Tokenizer(Fast)?$/

function createFast(folder: string, json: Json, settings: Settings): Tokenizer {
  const path = join(folder, 'tokenizer.json')
  const { model } = json
  if (!isObject(model)) throw invalid(`model in ${path}`, 'an object', typeof model)
  const added = readFastAdded(json, path)
  const vocab = readVocab(model, path)
  const ids = new Map(vocab)
  for (const [id, token] of added) ids.set(token.content, id)

  // As PreTrainedTokenizerFast: tokens that only the configuration names are added, named ones are made special.
  const append = (token: AddedToken, wanted?: number) => {
    const id = ids.get(token.content) ?? nextId(ids)
    if (wanted !== undefined && wanted !== id) {
      throw invalid(
        `the id of ${JSON.stringify(token.content)} in ${join(folder, 'tokenizer_config.json')}`,
        `${id} as in tokenizer.json`,
        String(wanted),
      )
    }
    ids.set(token.content, id)
    added.set(id, token)
  }
  const contents = new Set([...added.values()].map(token => token.content))
  for (const [id, token] of settings.added) if (!contents.has(token.content)) append(token, id)
  for (const token of settings.named) if (!contents.has(token.content)) append({ ...token, special: true })
  for (const content of settings.extra) append(plainToken(content, true))

  const config: Json = { ...json, added_tokens: [...added].map(([id, token]) => toLibraryToken(id, token)) }
  for (const key of ['normalizer', 'pre_tokenizer', 'post_processor', 'decoder']) config[key] ??= null
  // These classes rebuild the post-processor from add_bos_token and add_eos_token.
  if (FAST_LLAMA_CLASSES.test(settings.tokenizerClass)) config.post_processor = template(settings)

  const streamOf = readFastDecoder(config.decoder, path)
  let library: LibraryTokenizer
  try {
    library = new LibraryTokenizer(config, {})
  } catch (error) {
    throw new MgmError('TOKENIZER_INVALID', `${path} cannot be used: ${(error as Error).message}`, {
      cause: error,
    })
  }
  const texts = new Map([...ids].map(([text, id]) => [id, text]))
  const specialIds = new Set([...added].flatMap(([id, token]) => (token.special ? [id] : [])))
  const encode = (text: string, addSpecialTokens: boolean) => {
    const list: (number | undefined)[] = library.encode(text, { add_special_tokens: addSpecialTokens }).ids
    return list.map(id => {
      if (id !== undefined) return id
      throw new MgmError(
        'TOKENIZER_INVALID',
        `${path} has no token for a part of the text, nor an unknown token`,
      )
    })
  }
  const prefix = encode('', true)
  return assemble({
    folder,
    settings,
    texts,
    ids,
    specialIds,
    specialTokens: [...added.values()].flatMap(token => (token.special ? [token.content] : [])),
    size: ids.size,
    addsBos: prefix.length > 0 && settings.bos !== undefined && prefix[0] === ids.get(settings.bos),
    encode,
    createStream: skip => streamOf(id => (skip && specialIds.has(id) ? undefined : texts.get(id))),
  })
}

function nextId(ids: ReadonlyMap<string, number>): number {
  let next = 0
  for (const id of ids.values()) next = Math.max(next, id + 1)
  return next
}

function readFastAdded(json: Json, path: string): Map<number, AddedToken> {
  const list = json.added_tokens ?? []
  if (!Array.isArray(list)) throw invalid(`added_tokens in ${path}`, 'an array', typeof list)
  return new Map(list.map(token => [readId(token?.id, path), readAdded(token, path, false)]))
}

function toLibraryToken(id: number, token: AddedToken): Json {
  return {
    id,
    content: token.content,
    lstrip: token.lstrip,
    rstrip: token.rstrip,
    single_word: token.singleWord,
    normalized: token.normalized,
    special: token.special,
  }
}

export function readVocab(model: Json, path: string): [string, number][] {
  if (isObject(model.vocab) && model.type === 'BPE') {
    if (!Array.isArray(model.merges))
      throw invalid(`model.merges in ${path}`, 'an array', typeof model.merges)
    return Object.entries(model.vocab).map(([text, id]) => [text, readId(id, path)])
  }
  if (Array.isArray(model.vocab) && model.type === 'Unigram') {
    return model.vocab.map((entry, id) => {
      if (!Array.isArray(entry) || typeof entry[0] !== 'string' || typeof entry[1] !== 'number') {
        throw invalid(`model.vocab[${id}] in ${path}`, 'a pair of text and score', JSON.stringify(entry))
      }
      return [entry[0], id]
    })
  }
  throw invalid(
    `model in ${path}`,
    'a BPE or Unigram model with its vocabulary',
    JSON.stringify(model.type) ?? 'none',
  )
}

function template({ addBos, addEos, bos, eos }: Settings): Json {
  const special = (token: string) => ({ SpecialToken: { id: token, type_id: 0 } })
  return {
    type: 'TemplateProcessing',
    single: [
      ...(addBos && bos !== undefined ? [special(bos)] : []),
      { Sequence: { id: 'A', type_id: 0 } },
      ...(addEos && eos !== undefined ? [special(eos)] : []),
    ],
  }
}

type TokenOf = (id: number) => string | undefined

/**
 * Reads the decoder of a tokenizer.json. Decoding is done here and not by the library because its byte fallback differs
 * from the Rust original for invalid UTF-8 (one U+FFFD per byte there), and because streams need it id by id.
 */
function readFastDecoder(config: unknown, path: string): (tokenOf: TokenOf) => Decoder {
  const refuse = () =>
    invalid(
      `decoder in ${path}`,
      'ByteLevel, or Replace, ByteFallback, Fuse and Strip',
      JSON.stringify(config),
    )
  if (!isObject(config)) throw refuse()
  if (config.type === 'ByteLevel') return tokenOf => new ByteLevelStream(tokenOf)
  if (config.type !== 'Sequence' || !Array.isArray(config.decoders)) throw refuse()

  const replacements: [string, string][] = []
  let byteFallback = false
  let fused = false
  let strip = { content: ' ', start: 0 }
  for (const step of config.decoders) {
    if (!isObject(step)) throw refuse()
    const pattern = isObject(step.pattern) ? step.pattern.String : undefined
    if (step.type === 'Replace' && !byteFallback && !fused) {
      if (typeof pattern !== 'string' || pattern === '' || typeof step.content !== 'string') throw refuse()
      replacements.push([pattern, step.content])
    } else if (step.type === 'ByteFallback' && !fused) byteFallback = true
    else if (step.type === 'Fuse') fused = true
    else if (step.type === 'Strip' && fused && strip.start === 0) {
      const { content, start } = step
      if (typeof content !== 'string' || content === '' || typeof start !== 'number' || step.stop !== 0)
        throw refuse()
      strip = { content, start }
    } else throw refuse()
  }
  return tokenOf => new ByteFallbackStream(tokenOf, replacements, byteFallback, strip)
}

// The byte-level alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 and up.
const BYTE_OF_CHAR = (() => {
  const table = new Map<string, number>()
  let next = 256
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174
    table.set(String.fromCharCode(printable ? byte : next++), byte)
  }
  return table
})()

/** Source: `ByteLevel` of the Rust tokenizers: a token outside the alphabet stands for its own UTF-8. */
export class ByteLevelStream implements Decoder {
  readonly #tokenOf: TokenOf
  #decoder = new TextDecoder('utf-8', { ignoreBOM: true })

  constructor(tokenOf: TokenOf) {
    this.#tokenOf = tokenOf
  }

  push(id: number): string {
    const token = this.#tokenOf(id)
    if (token === undefined) return ''
    const bytes = Array.from(token, char => BYTE_OF_CHAR.get(char))
    const isMapped = bytes.every(byte => byte !== undefined)
    return this.#decoder.decode(isMapped ? Uint8Array.from(bytes) : new TextEncoder().encode(token), {
      stream: true,
    })
  }

  flush(): string {
    return this.#decoder.decode()
  }
}

const strictUtf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true })

function decodeStrict(bytes: readonly number[]): string | undefined {
  try {
    return strictUtf8.decode(Uint8Array.from(bytes))
  } catch {
    return undefined
  }
}

function parseByteToken(token: string): number | undefined {
  const match = /^<0x([0-9A-Fa-f]{2})>$/.exec(token)
  return match ? Number.parseInt(match[1]!, 16) : undefined
}

/**
 * Source: Replace, ByteFallback, Fuse, Strip of the Rust tokenizers. A run of byte tokens is held until it ends, since
 * one wrong byte makes every byte of the run a U+FFFD.
 */
class ByteFallbackStream implements Decoder {
  readonly #tokenOf: TokenOf
  readonly #replacements: readonly (readonly [string, string])[]
  readonly #byteFallback: boolean
  readonly #strip: { readonly content: string; readonly start: number }
  #bytes: number[] = []
  #toStrip: number

  constructor(
    tokenOf: TokenOf,
    replacements: readonly (readonly [string, string])[],
    byteFallback: boolean,
    strip: { readonly content: string; readonly start: number },
  ) {
    this.#tokenOf = tokenOf
    this.#replacements = replacements
    this.#byteFallback = byteFallback
    this.#strip = strip
    this.#toStrip = strip.start
  }

  push(id: number): string {
    let token = this.#tokenOf(id)
    if (token === undefined) return ''
    for (const [from, to] of this.#replacements) token = token.replaceAll(from, to)
    const byte = this.#byteFallback ? parseByteToken(token) : undefined
    if (byte === undefined) return this.#stripped(this.#endRun() + token)
    this.#bytes.push(byte)
    return ''
  }

  flush(): string {
    const text = this.#stripped(this.#endRun())
    this.#toStrip = this.#strip.start
    return text
  }

  #endRun(): string {
    if (this.#bytes.length === 0) return ''
    const text = decodeStrict(this.#bytes) ?? '\uFFFD'.repeat(this.#bytes.length)
    this.#bytes = []
    return text
  }

  #stripped(text: string): string {
    let rest = text
    while (this.#toStrip > 0 && rest !== '') {
      if (rest.startsWith(this.#strip.content)) {
        rest = rest.slice(this.#strip.content.length)
        this.#toStrip--
      } else this.#toStrip = 0
    }
    return rest
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// tokenizer.model, as transformers' slow LlamaTokenizer

function createSlow(folder: string, model: SentencePieceModel, settings: Settings): Tokenizer {
  const ids = new Map(model.pieces.map(({ text }, id) => [text, id]))
  const vocabSize = model.pieces.length
  const added = new Map(settings.added)
  const addedIds = new Map([...added].map(([id, token]) => [token.content, id]))
  for (const [content, id] of addedIds) ids.set(content, id)
  const additional = new Set(settings.additional)
  const append = (token: AddedToken) => {
    if (addedIds.has(token.content)) return
    const id = ids.get(token.content) ?? ids.size
    ids.set(token.content, id)
    addedIds.set(token.content, id)
    added.set(id, token)
  }
  for (const token of settings.named) append(token)
  for (const content of settings.extra) {
    append(plainToken(content, true))
    if (!settings.named.some(token => token.content === content)) additional.add(content)
  }

  const texts = new Map<number, string>()
  model.pieces.forEach(({ text }, id) => {
    texts.set(id, text)
  })
  for (const [id, token] of added) texts.set(id, token.content)
  const allSpecial = new Set([...settings.named.map(token => token.content), ...settings.extra])
  const specialIds = new Set([...allSpecial].map(text => ids.get(text)!))
  // Tokens of this set are decoded apart from their neighbours, with a space on either side.
  const apart = new Set([...addedIds.keys()].filter(text => !allSpecial.has(text)))
  for (const text of additional) if ((ids.get(text) ?? 0) >= vocabSize) apart.add(text)

  const dummyPrefix = settings.legacy && model.addDummyPrefix
  const encodePieces = createEncoder(model, dummyPrefix)
  const pattern = matcher(addedIds.keys())
  const spaceId = ids.get(SPACE_SYMBOL)
  const bosId = settings.bos === undefined ? undefined : ids.get(settings.bos)
  const eosId = settings.eos === undefined ? undefined : ids.get(settings.eos)

  const encodeBody = (text: string): number[] => {
    if (text === '') return []
    let prepared = text
    if (!settings.legacy) {
      prepared = prepared.replaceAll(SPACE_SYMBOL, ' ')
      if (settings.addPrefixSpace) prepared = SPACE_SYMBOL + prepared
    }
    const sections = pattern ? splitAdded(prepared, pattern, addedIds, added) : [prepared]
    const lists = sections.map(section =>
      typeof section === 'number' ? [section] : encodePieces(section, !settings.legacy),
    )
    // The prefix is not wanted in front of a special token.
    const [first, second] = sections
    const isBarePrefix = lists[0]!.length === 1 && lists[0]![0] === spaceId && typeof first === 'string'
    if (!settings.legacy && isBarePrefix && typeof second === 'number' && specialIds.has(second))
      lists.shift()
    return lists.flat()
  }
  const addsBos = settings.addBos && bosId !== undefined
  return assemble({
    folder,
    settings,
    texts,
    ids,
    specialIds,
    specialTokens: [...addedIds.keys()],
    size: ids.size,
    addsBos,
    encode: (text, addSpecialTokens) => {
      const body = encodeBody(text)
      if (!addSpecialTokens) return body
      return [
        ...(addsBos ? [bosId] : []),
        ...body,
        ...(settings.addEos && eosId !== undefined ? [eosId] : []),
      ]
    },
    createStream: skip =>
      new SlowLlamaStream(model, settings, skip, { texts, ids, specialIds, apart, dummyPrefix, allSpecial }),
  })
}

/** Finds added tokens: leftmost first, at one place the longest. */
export function matcher(tokens: Iterable<string>): RegExp | undefined {
  const sorted = [...tokens].sort((a, b) => b.length - a.length)
  if (sorted.length === 0) return undefined
  return new RegExp(sorted.map(token => token.replace(/[.*+?^${}()|[\]\\]/g, '\\$&')).join('|'), 'g')
}

// What Python's str.strip drops; JavaScript's trim differs by U+FEFF and the separators U+001C to U+001F.
const PYTHON_SPACE =
  '[\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]+'
const LEADING_SPACE = new RegExp(`^${PYTHON_SPACE}`)
const TRAILING_SPACE = new RegExp(`${PYTHON_SPACE}$`)

/** Source: `PreTrainedTokenizer.tokenize` of transformers. An added token comes out as its id. */
export function splitAdded(
  text: string,
  pattern: RegExp,
  addedIds: ReadonlyMap<string, number>,
  added: ReadonlyMap<number, AddedToken>,
): (string | number)[] {
  const parts: string[] = []
  let at = 0
  for (const match of text.matchAll(pattern)) {
    if (match.index > at) parts.push(text.slice(at, match.index))
    parts.push(match[0])
    at = match.index + match[0].length
  }
  if (at < text.length) parts.push(text.slice(at))

  for (let i = 0; i < parts.length; i++) {
    const token = added.get(addedIds.get(parts[i]!) ?? -1)
    if (token === undefined) continue
    const left = parts[i - 1]
    const right = parts[i + 1]
    if (token.rstrip && right) parts[i + 1] = right.replace(LEADING_SPACE, '')
    if (token.lstrip && left) parts[i - 1] = left.replace(TRAILING_SPACE, '')
    if (token.singleWord && left && !left.endsWith(' ')) {
      parts[i - 1] += token.content
      parts[i] = ''
    } else if (token.singleWord && right && !right.startsWith(' ')) {
      parts[i + 1] = token.content + parts[i + 1]
      parts[i] = ''
    }
  }
  return parts.filter(part => part !== '').map(part => addedIds.get(part) ?? part)
}

interface SlowTables {
  readonly texts: ReadonlyMap<number, string>
  readonly ids: ReadonlyMap<string, number>
  readonly specialIds: ReadonlySet<number>
  readonly allSpecial: ReadonlySet<string>
  readonly apart: ReadonlySet<string>
  readonly dummyPrefix: boolean
}

/**
 * Source: `PreTrainedTokenizer._decode`, `LlamaTokenizer.convert_tokens_to_string` and
 * `SentencePieceProcessor::Decode`, oddities included: added tokens that are not named special ones are joined with
 * spaces, and with `legacy` the space before a special token is put before the text that precedes it.
 */
class SlowLlamaStream implements Decoder {
  readonly #model: SentencePieceModel
  readonly #settings: Settings
  readonly #skip: boolean
  readonly #tables: SlowTables
  readonly #pieceIds: ReadonlyMap<string, number>

  // Stretches between tokens that stand apart, joined by spaces.
  #hasStretch = false
  #tokensInStretch = 0
  #stretchHasText = false
  #previousIsSpecial = false
  // Runs between special tokens, each a decode call of SentencePiece.
  #runHasText = false
  #runSawSpace = false
  #runAtStart = true
  #runHeld = ''
  #bytes: number[] = []

  constructor(model: SentencePieceModel, settings: Settings, skip: boolean, tables: SlowTables) {
    this.#model = model
    this.#settings = settings
    this.#skip = skip
    this.#tables = tables
    this.#pieceIds = tables.ids
  }

  push(id: number): string {
    const token = this.#tables.texts.get(id)
    if (token === undefined || (this.#skip && this.#tables.specialIds.has(id))) return ''
    if (!this.#tables.apart.has(token)) return this.#inStretch(token)
    const text = this.#endStretch(false) + (this.#hasStretch ? ' ' : '') + token
    this.#hasStretch = true
    return text
  }

  flush(): string {
    const text = this.#endStretch(true)
    this.#hasStretch = false
    return text
  }

  #inStretch(whole: string): string {
    const { legacy, addPrefixSpace } = this.#settings
    const i = this.#tokensInStretch++
    const isPrefixed = addPrefixSpace && whole.startsWith(SPACE_SYMBOL)
    const token = i === 0 && isPrefixed ? whole.slice(1) : whole
    let text = ''
    if (this.#tables.allSpecial.has(token)) {
      const run = this.#endRun()
      text = (!this.#previousIsSpecial && i !== 0 && legacy ? ' ' : '') + run + token
      this.#previousIsSpecial = true
    } else {
      if (this.#previousIsSpecial && i === 1 && addPrefixSpace && !isPrefixed) text = ' '
      const run = this.#decodePiece(token)
      // Whether a space goes before this run depends on what ends it.
      if (legacy && !this.#skip) this.#runHeld += run
      else text += run
      this.#previousIsSpecial = false
    }
    return this.#emit(text)
  }

  /** Puts the joining space before the first text of a stretch. */
  #emit(text: string): string {
    if (text === '') return ''
    const joined = !this.#stretchHasText && this.#hasStretch ? ` ${text}` : text
    this.#stretchHasText = true
    return joined
  }

  #endStretch(isLast: boolean): string {
    if (this.#tokensInStretch === 0) return ''
    let text = this.#emit(this.#endRun())
    // The last stretch counts even if it is empty.
    if (isLast && !this.#stretchHasText && this.#hasStretch) text = ' '
    if (this.#stretchHasText) this.#hasStretch = true
    this.#tokensInStretch = 0
    this.#stretchHasText = false
    this.#previousIsSpecial = false
    return text
  }

  #endRun(): string {
    const text = this.#runHeld + this.#decodeBytes(true)
    this.#runHeld = ''
    this.#runHasText = false
    this.#runSawSpace = false
    this.#runAtStart = true
    return text
  }

  #decodePiece(token: string): string {
    const id = this.#pieceIds.get(token)
    const piece = id === undefined ? undefined : this.#model.pieces[id]
    if (piece?.type === 'byte') {
      this.#bytes.push(parseByteToken(token)!)
      return this.#decodeBytes(false)
    }
    const before = this.#decodeBytes(true)
    if (this.#runSawSpace || this.#runHasText) this.#runAtStart = false
    this.#runSawSpace = false
    let text = token
    if (piece?.type === 'control') text = ''
    else if (piece?.type === 'unknown') text = this.#model.unkSurface
    else if (piece !== undefined) {
      const { removeExtraWhitespaces } = this.#model
      if (
        this.#runAtStart &&
        (this.#tables.dummyPrefix || removeExtraWhitespaces) &&
        text.startsWith(SPACE_SYMBOL)
      ) {
        text = text.slice(1)
        this.#runSawSpace = !removeExtraWhitespaces
      }
      text = text.replaceAll(SPACE_SYMBOL, ' ')
    }
    if (text !== '') this.#runHasText = true
    return before + text
  }

  /** Decodes the characters that are complete; with `all` the rest too, one U+FFFD per byte. */
  #decodeBytes(all: boolean): string {
    let text = ''
    let at = 0
    while (at < this.#bytes.length) {
      const lead = this.#bytes[at]!
      const length =
        lead < 0x80 ? 1 : lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0
      const sequence = this.#bytes.slice(at, at + length)
      const isOpen = sequence.length < length && sequence.slice(1).every(byte => byte >= 0x80 && byte < 0xc0)
      if (isOpen && !all) break
      const char = length > 0 && sequence.length === length ? decodeStrict(sequence) : undefined
      text += char ?? '\uFFFD'
      at += char === undefined ? 1 : length
    }
    this.#bytes = this.#bytes.slice(at)
    if (text !== '') this.#runHasText = true
    return text
  }
}

// ---------------------------------------------------------------------------------------------------------------------

/** Source: `clean_up_tokenization` of transformers. */
export function cleanUp(text: string): string {
  return text
    .replaceAll(' .', '.')
    .replaceAll(' ?', '?')
    .replaceAll(' !', '!')
    .replaceAll(' ,', ',')
    .replaceAll(" ' ", "'")
    .replaceAll(" n't", "n't")
    .replaceAll(" 'm", "'m")
    .replaceAll(" 's", "'s")
    .replaceAll(" 've", "'ve")
    .replaceAll(" 're", "'re")
}

/**
 * Cleans spaces up while streaming. Text is let go only at places that no replacement can span, nor any made possible by
 * an earlier one: not after a space or an apostrophe, nor after an n, v or r that follows one of them.
 */
class CleanUpStream implements IncrementalDecoder {
  readonly #source: Decoder
  #held = ''

  constructor(source: Decoder) {
    this.#source = source
  }

  push(id: number): string {
    this.#held += this.#source.push(id)
    const held = this.#held
    let end = held.length
    while (end > 0 && /(?:[ ']|[ '][nvr])$/.test(held.slice(Math.max(0, end - 2), end))) end--
    this.#held = held.slice(end)
    return cleanUp(held.slice(0, end))
  }

  flush(): string {
    const text = cleanUp(this.#held + this.#source.flush())
    this.#held = ''
    return text
  }
}
