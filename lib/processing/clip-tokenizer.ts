import { join } from 'node:path'
import { Tokenizer as LibraryTokenizer } from '@huggingface/tokenizers'
import { describe, expected } from '../errors.ts'
import { wellFormed } from './prompt.ts'
import {
  ByteLevelStream,
  cleanUp,
  invalid,
  isObject,
  matcher,
  parseJson,
  plainToken,
  readIfThere,
  readSettings,
  readVocab,
  splitAdded,
} from './tokenizer.ts'

/** Positions of CLIP's text side: every prompt becomes that many ids. */
export const CLIP_TOKENS = 77

export interface ClipEncoding {
  /** [77] the start token, the prompt, the end token, padding. */
  readonly ids: Int32Array
  /** The end of the prompt that had no room, decoded; empty if all of it is in `ids`. */
  readonly truncated: string
}

/** Prompts to ids, equal to what transformers' `CLIPTokenizer` with ftfy makes of them; `fixText` says where not. */
export class ClipTokenizer {
  private readonly parts: Awaited<ReturnType<typeof loadParts>>

  private constructor(parts: Awaited<ReturnType<typeof loadParts>>) {
    this.parts = parts
  }

  /**
   * Reads `vocab.json` and `merges.txt`, or `tokenizer.json` where they are missing, and the settings beside them.
   * @throws TOKENIZER_INVALID when files are missing or malformed; ABORTED
   */
  static async load(
    folder: string,
    options: { signal?: AbortSignal | undefined } = {},
  ): Promise<ClipTokenizer> {
    return new ClipTokenizer(await loadParts(folder, options.signal))
  }

  /** Lone surrogates count as U+FFFD. A special token written out in the text becomes that token. */
  encode(text: string): ClipEncoding {
    if (typeof text !== 'string') throw expected('a string', 'prompt', text)
    const { bos, eos, pad } = this.parts
    const body = this.encodeBody(wellFormed(text))
    const room = CLIP_TOKENS - 2
    const ids = new Int32Array(CLIP_TOKENS).fill(pad)
    ids.set([bos, ...body.slice(0, room), eos])
    return { ids, truncated: this.decode(body.slice(room)) }
  }

  private encodeBody(text: string): number[] {
    const { added, addedIds, pattern, controlIds, library } = this.parts
    return splitAdded(text, pattern, addedIds, added).flatMap(section =>
      typeof section === 'number'
        ? [section]
        : wordsOf(section).flatMap((word): number[] => controlIds.get(word) ?? library.encode(word).ids),
    )
  }

  private decode(ids: readonly number[]): string {
    const { texts, clean } = this.parts
    const stream = new ByteLevelStream(id => texts.get(id))
    const text = (ids.map(id => stream.push(id)).join('') + stream.flush()).replaceAll('</w>', ' ').trim()
    return clean ? cleanUp(text) : text
  }
}

const START = '<|startoftext|>'
const END = '<|endoftext|>'

/** The words that BPE sees. Source: `CLIPTokenizer._tokenize` of transformers, the slow one. */
function wordsOf(text: string): string[] {
  const cleaned = fixText(text).replaceAll(/\s+/g, ' ').toLowerCase()
  return cleaned.match(WORDS) ?? []
}

const WORDS = /<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+/giu

const FIXES: readonly (readonly [RegExp, string | ((match: string) => string)])[] = [
  // Latin ligatures and digraphs, half- and full-width forms.
  [/ﬅ/g, 'ſt'],
  [/[ĲĳŉǄ-ǌǱ-ǳﬀ-ﬄﬆ\u3000\uff01-\uffef]/g, char => char.normalize('NFKC')],
  [/[\u02bc\u2018-\u201b]/g, "'"],
  [/[\u201c-\u201f]/g, '"'],
  // Colours of a terminal, control characters.
  // biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is looked for
  [/\x1b\[[\d;]*[a-zA-Z]/g, ''],
  // biome-ignore lint/suspicious/noControlCharactersInRegex: as above
  [/[\0-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]/g, ''],
]

/**
 * What `ftfy.fix_text` does to text in the right encoding: the reference's environment has ftfy, on which OpenCLIP depends.
 * Left out are its guesses at text decoded from the wrong encoding, and HTML entities.
 */
function fixText(text: string): string {
  let fixed = text
  for (let before = ''; before !== fixed; ) {
    before = fixed
    for (const [pattern, replacement] of FIXES) fixed = fixed.replaceAll(pattern, replacement as string)
    fixed = fixed.normalize('NFC')
  }
  return fixed
}

async function loadParts(folder: string, signal: AbortSignal | undefined) {
  const read = (name: string) => readIfThere(join(folder, name), signal)
  const readJson = async (name: string) => parseJson(await read(name), join(folder, name))
  const settings = readSettings(
    folder,
    (await readJson('tokenizer_config.json')) ?? {},
    (await readJson('special_tokens_map.json')) ?? {},
    await readJson('added_tokens.json'),
    [],
  )

  let file = join(folder, 'vocab.json')
  let vocab: unknown = await readJson('vocab.json')
  let merges: unknown = parseMerges(await read('merges.txt'))
  if (vocab === undefined || merges === undefined) {
    file = join(folder, 'tokenizer.json')
    const json = await readJson('tokenizer.json')
    if (json === undefined) throw invalid(folder, 'vocab.json and merges.txt, or tokenizer.json', 'neither')
    ;({ vocab, merges } = isObject(json.model) ? json.model : {})
  }
  const ids = new Map(readVocab({ type: 'BPE', vocab, merges }, file))

  const added = new Map(settings.added)
  const addedIds = new Map([...added].map(([id, token]) => [token.content, id]))
  for (const [content, id] of addedIds) ids.set(content, id)
  const roles = {
    bos_token: settings.bos ?? START,
    eos_token: settings.eos ?? END,
    pad_token: settings.pad ?? END,
  }
  for (const [role, token] of Object.entries(roles)) {
    if (!ids.has(token)) throw invalid(`${role} of ${folder}`, 'a token of the vocabulary', describe(token))
  }
  for (const token of [...settings.named, ...Object.values(roles).map(role => plainToken(role, true))]) {
    if (addedIds.has(token.content)) continue
    const id = ids.get(token.content) ?? ids.size
    ids.set(token.content, id)
    addedIds.set(token.content, id)
    added.set(id, token)
  }
  const [bos, eos, pad] = Object.values(roles).map(token => ids.get(token)!) as [number, number, number]
  return {
    bos,
    eos,
    pad,
    added,
    addedIds,
    pattern: matcher(addedIds.keys())!,
    /** Words that BPE leaves alone: the text may have got them from upper case. */
    controlIds: new Map([
      [START, [bos]],
      [END, [eos]],
    ]),
    texts: new Map([...ids].map(([text, id]) => [id, text])),
    clean: settings.cleanUp,
    library: new LibraryTokenizer(
      {
        model: { type: 'BPE', vocab, merges, unk_token: roles.eos_token, end_of_word_suffix: '</w>' },
        normalizer: null,
        pre_tokenizer: { type: 'ByteLevel', add_prefix_space: false, use_regex: false },
        post_processor: null,
        decoder: null,
        added_tokens: [],
      },
      {},
    ),
  }
}

// CLIP's merges.txt may hold more than its vocabulary of 49408 tokens does.
const MAX_MERGES = 49152 - 256 - 2

/** The lines after the first, which says the version, as pairs. */
function parseMerges(bytes: Uint8Array | undefined): string[][] | undefined {
  if (bytes === undefined) return undefined
  const lines = new TextDecoder().decode(bytes).trim().split('\n')
  return lines.slice(1, MAX_MERGES + 1).map(line => line.trim().split(/\s+/))
}
