import { copyFileSync, existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, describe, expect, it } from 'vitest'
import { loadTokenizer, type Tokenizer, type TokenizerFamily } from '../../lib/processing/tokenizer.ts'

type Name = 'gemma' | 'vicuna' | 'llama3' | 'mixtral' | 'yi' | 'hd'
const cases: Record<Name, { model: string; family: TokenizerFamily }> = {
  gemma: { model: 'MGM-2B', family: 'gemma' },
  vicuna: { model: 'MGM-7B', family: 'llama' },
  llama3: { model: 'MGM-8B', family: 'llama' },
  mixtral: { model: 'MGM-8x7B', family: 'mixtral' },
  yi: { model: 'MGM-34B', family: 'llama' },
  hd: { model: 'MGM-7B-HD', family: 'llama' },
}
const names = Object.keys(cases) as Name[]
const caseFolder = (name: Name) => fileURLToPath(new URL(`../fixtures/mgm-${name}-tiny`, import.meta.url))
const modelFolder = (name: Name) => join(caseFolder(name), cases[name].model)
const readJson = (path: string) => JSON.parse(readFileSync(path, 'utf8'))
const load = (name: Name) => loadTokenizer(modelFolder(name), { family: cases[name].family })

const temporary: string[] = []
afterAll(() => {
  for (const folder of temporary) rmSync(folder, { recursive: true })
})
const FILES = ['tokenizer_config.json', 'special_tokens_map.json', 'tokenizer.model', 'tokenizer.json']

/** A copy of a case's tokenizer files with other settings; a null file is left out. */
function variant(name: Name, config: object, files: Record<string, string | object | null> = {}): string {
  const folder = mkdtempSync(join(tmpdir(), 'mgm-tokenizer-'))
  temporary.push(folder)
  for (const file of FILES) {
    const source = join(modelFolder(name), file)
    if (existsSync(source) && files[file] !== null) copyFileSync(source, join(folder, file))
  }
  const path = join(folder, 'tokenizer_config.json')
  writeFileSync(path, JSON.stringify({ ...readJson(path), ...config }))
  for (const [file, content] of Object.entries(files)) {
    if (content !== null) {
      writeFileSync(join(folder, file), typeof content === 'string' ? content : JSON.stringify(content))
    }
  }
  return folder
}

describe.each(names)('tokenizer of mgm-%s-tiny', name => {
  const golden: {
    len: number
    items: { text: string; input_ids: number[]; decoded: string; decoded_skip_special: string }[]
  } = readJson(join(caseFolder(name), 'tokenizer_goldens.json'))

  it.each(golden.items.map(item => [item.text, item] as const))(
    'agrees with the reference on %j',
    async (_, item) => {
      const tokenizer = await load(name)
      expect(tokenizer.encode(item.text)).toEqual(item.input_ids)
      expect(tokenizer.decode(item.input_ids)).toBe(item.decoded)
      expect(tokenizer.decode(item.input_ids, { skipSpecialTokens: true })).toBe(item.decoded_skip_special)
      const bare = tokenizer.addsBos ? item.input_ids.slice(1) : item.input_ids
      expect(tokenizer.encode(item.text, { addSpecialTokens: false })).toEqual(bare)
    },
  )

  it('knows its size and special ids', async () => {
    const tokenizer = await load(name)
    const config = readJson(join(modelFolder(name), 'config.json'))
    expect(tokenizer.size).toBe(golden.len)
    expect([tokenizer.bosId, tokenizer.eosId]).toEqual([config.bos_token_id, config.eos_token_id])
    expect(tokenizer.addsBos).toBe(name !== 'yi')
    expect(tokenizer.specialIds).toContain(tokenizer.eosId)
  })

  it('decodes the generated ids of the samples', async () => {
    const tokenizer = await load(name)
    for (const sample of readJson(join(caseFolder(name), 'samples.json')).samples) {
      expect(tokenizer.decode(sample.generated_ids)).toBe(sample.text_raw)
      expect(tokenizer.decode(sample.generated_ids, { skipSpecialTokens: true }).trim()).toBe(sample.text)
    }
  })
})

// Written down from transformers 4.57.6 (LlamaTokenizer, slow) over the same model files with these settings.
const TEXTS = ['  <s> a</s>b ▁c', '<|im_start|>hi<|im_end|> .x', "the <im_patch>, it ' s [PAD]"]
const IM_VICUNA = [407, 63, 127, 413, 422, 98, 368, 287, 410, 127, 65, 415, 413]
const IM_VICUNA_END = [63, 127, 413, 422, 98, 269, 419, 127, 65, 407, 424, 436]
const PATCH_VICUNA = [
  407, 63, 413, 422, 98, 426, 267, 421, 415, 65, 425, 394, 407, 438, 265, 407, 473, 458, 441, 469, 474,
]
const PATCH_YI = [
  270, 407, 69, 413, 422, 104, 426, 273, 421, 415, 71, 425, 400, 407, 438, 271, 407, 473, 458, 441, 469, 474,
]
const S_YI = [407, 407, 407, 69, 411, 71, 265, 69, 56, 411, 71, 430, 407, 281]
const variants: [Name, object, number, [number[], string, string][]][] = [
  [
    'vicuna',
    { legacy: true },
    480,
    [
      [[1, 407, 407, 407, 1, 407, 259, 2, 281, 407, 275], '<s>   <s>  a</s>b  c', '   a b  c'],
      [[1, ...IM_VICUNA, ...IM_VICUNA_END], '<s><|im_start|>hi<|im_end|> .x', '<|im_start|>hi<|im_end|> .x'],
      [[1, 264, ...PATCH_VICUNA], "<s>the <im_patch>, it ' s [PAD]", "the <im_patch>, it ' s [PAD]"],
    ],
  ],
  [
    'yi',
    { legacy: false },
    480,
    [
      [S_YI, '  <s> a</s>b  c', '  <s> a</s>b  c'],
      [[407, 6, 415, 413, 7, 407, 424, 436], '<|im_start|> hi<|im_end|> .x', '<|im_start|> hi .x'],
      [PATCH_YI, "the <im_patch>, it ' s [PAD]", "the <im_patch>, it ' s [PAD]"],
    ],
  ],
  [
    'vicuna',
    { add_prefix_space: false },
    480,
    [
      [[1, 407, 407, 1, 259, 2, 430, 407, 275], '<s>  <s> a</s>b  c', '   ab  c'],
      [
        [1, ...IM_VICUNA.slice(1), ...IM_VICUNA_END],
        '<s><|im_start|>hi<|im_end|> .x',
        '<|im_start|>hi<|im_end|> .x',
      ],
      [[1, 410, 261, ...PATCH_VICUNA], "<s>the <im_patch>, it ' s [PAD]", "the <im_patch>, it ' s [PAD]"],
    ],
  ],
  [
    'yi',
    { clean_up_tokenization_spaces: true },
    480,
    [
      [S_YI, ' <s> a</s>b  c', ' <s> a</s>b  c'],
      [[6, 384, 413, 7, 407, 407, 424, 436], '<|im_start|>  hi<|im_end|>.x', '<|im_start|> hi .x'],
      [PATCH_YI, "the <im_patch>, it's [PAD]", "the <im_patch>, it's [PAD]"],
    ],
  ],
  [
    'vicuna',
    { additional_special_tokens: ['<im_patch>'], pad_token: '[PAD]' },
    482,
    [
      [[1, 407, 407, 407, 1, 259, 2, 430, 407, 275], '<s>   <s> a</s>b  c', '   ab  c'],
      [[1, ...IM_VICUNA, ...IM_VICUNA_END], '<s> <|im_start|>hi<|im_end|> .x', '<|im_start|>hi<|im_end|> .x'],
      [
        [1, 264, 407, 481, 425, 394, 407, 438, 265, 407, 480],
        "<s> the  <im_patch> , it ' s [PAD]",
        "the , it ' s ",
      ],
    ],
  ],
]

describe('settings of tokenizer_config.json', () => {
  it.each(variants)('%s with %j', async (name, config, size, rows) => {
    const tokenizer = await loadTokenizer(variant(name, config), cases[name])
    expect(tokenizer.size).toBe(size)
    rows.forEach(([ids, text, skipped], i) => {
      expect([TEXTS[i], tokenizer.encode(TEXTS[i]!)]).toEqual([TEXTS[i], ids])
      expect(tokenizer.decode(ids)).toBe(text)
      expect(tokenizer.decode(ids, { skipSpecialTokens: true })).toBe(skipped)
    })
  })

  it.each(['gemma', 'vicuna', 'mixtral'] as const)('switches BOS and EOS of %s', async name => {
    const tokenizer = await loadTokenizer(
      variant(name, { add_bos_token: false, add_eos_token: true }),
      cases[name],
    )
    const { encode } = await load(name)
    expect(tokenizer.addsBos).toBe(false)
    expect(tokenizer.encode('Hello')).toEqual([
      ...encode('Hello', { addSpecialTokens: false }),
      tokenizer.eosId,
    ])
  })

  it.each(['vicuna', 'llama3'] as const)('appends extra tokens to %s', async name => {
    const { size, encode } = await load(name)
    const extraTokens = ['<im_start>', '<im_end>']
    const tokenizer = await loadTokenizer(modelFolder(name), { ...cases[name], extraTokens })
    expect(tokenizer.size).toBe(size + 2)
    expect(tokenizer.encode('a<im_start>')).toEqual([...encode('a'), size])
    expect(tokenizer.decode([size + 1])).toBe('<im_end>')
    expect(tokenizer.decode([size + 1], { skipSpecialTokens: true })).toBe('')
  })

  it('reads added_tokens.json where the configuration lists no added tokens', async () => {
    const folder = variant(
      'vicuna',
      { added_tokens_decoder: undefined },
      { 'added_tokens.json': { '<extra>': 480 } },
    )
    const tokenizer = await loadTokenizer(folder, { family: 'llama' })
    expect(tokenizer.size).toBe(481)
    expect(tokenizer.encode('<extra>', { addSpecialTokens: false })).toEqual([407, 480])
    expect(tokenizer.decode([407, 480], { skipSpecialTokens: true })).toBe('<extra>')
  })
})

// ---- decoding, written out over whole lists after the Python and Rust originals --------------------------------------

const isByte = (token: string) => /^<0x[0-9A-F]{2}>$/.test(token)
const byteOf = (token: string) => Number.parseInt(token.slice(3, 5), 16)

function wholeByteLevel(tokens: string[]): string {
  const shown = [...range(33, 127), ...range(161, 173), ...range(174, 256)]
  const hidden = range(0, 256).filter(byte => !shown.includes(byte))
  const table = new Map([...shown.map(b => [b, b]), ...hidden.map((b, i) => [256 + i, b])] as [
    number,
    number,
  ][])
  const data = tokens.flatMap(token => [...token].map(char => table.get(char.codePointAt(0)!)!))
  return Buffer.from(data).toString('utf8')
}
const range = (from: number, to: number) => Array.from({ length: to - from }, (_, i) => from + i)

function wholeByteFallback(tokens: string[], strip: boolean): string {
  let text = ''
  for (let i = 0; i < tokens.length; ) {
    let end = i
    while (end < tokens.length && isByte(tokens[end]!)) end++
    if (end === i) text += tokens[i++]!.replaceAll('▁', ' ')
    else {
      const data = Buffer.from(tokens.slice(i, end).map(byteOf))
      const decoded = data.toString('utf8')
      text += Buffer.from(decoded).equals(data) ? decoded : '\uFFFD'.repeat(data.length)
      i = end
    }
  }
  return strip ? text.replace(/^ /, '') : text
}

/** `PreTrainedTokenizer._decode` and `LlamaTokenizer.convert_tokens_to_string`. */
function wholeSlow(tokens: string[], special: Set<string>, apart: Set<string>, legacy: boolean): string {
  const spDecode = (run: string[]): string => {
    let text = ''
    let atStart = true
    for (let i = 0; i < run.length; ) {
      if (!isByte(run[i]!)) {
        const strips = legacy && atStart && run[i]!.startsWith('▁')
        text += (strips ? run[i]!.slice(1) : run[i]!).replaceAll('▁', ' ')
        if (text !== '' || strips) atStart = false
        i++
        continue
      }
      let data: number[] = []
      for (; i < run.length && isByte(run[i]!); i++) data.push(byteOf(run[i]!))
      while (data.length > 0) {
        const length = [1, 2, 3, 4].find(n => {
          const head = Buffer.from(data.slice(0, n))
          return Buffer.from(head.toString('utf8')).equals(head)
        })
        text += length ? Buffer.from(data.slice(0, length)).toString('utf8') : '\uFFFD'
        data = data.slice(length ?? 1)
      }
      atStart = false
    }
    return text
  }
  const toText = (part: string[]): string => {
    const list = [...part]
    if (list[0]!.startsWith('▁')) list[0] = list[0]!.slice(1)
    let out = ''
    let run: string[] = []
    let previousIsSpecial = false
    list.forEach((token, i) => {
      if (special.has(token)) {
        if (!previousIsSpecial && i !== 0 && legacy) out += ' '
        out += spDecode(run) + token
        run = []
        previousIsSpecial = true
      } else {
        if (previousIsSpecial && i === 1 && !token.startsWith('▁')) out += ' '
        run.push(token)
        previousIsSpecial = false
      }
    })
    return out + spDecode(run)
  }
  const texts: string[] = []
  let part: string[] = []
  for (const token of tokens) {
    if (!apart.has(token)) {
      part.push(token)
      continue
    }
    if (part.length > 0 && toText(part) !== '') texts.push(toText(part))
    part = []
    texts.push(token)
  }
  if (part.length > 0) texts.push(toText(part))
  return texts.join(' ')
}

const wholeCleanUp = (text: string) => {
  const pairs: [string, string][] = ['.', '?', '!', ',', "n't", "'m", "'s", "'ve", "'re"].map(s => [
    ` ${s}`,
    s,
  ])
  pairs.splice(4, 0, [" ' ", "'"])
  return pairs.reduce((result, [from, to]) => result.split(from).join(to), text)
}

function whole(name: Name, tokenizer: Tokenizer, ids: number[], skip: boolean): string {
  const kept = ids.filter(id => !skip || !tokenizer.specialIds.has(id)).map(id => tokenizer.token(id)!)
  const special = new Set([...tokenizer.specialIds].map(id => tokenizer.token(id)!))
  switch (name) {
    case 'llama3':
      return wholeCleanUp(wholeByteLevel(kept))
    case 'gemma':
    case 'mixtral':
      return wholeByteFallback(kept, name === 'mixtral')
    default: {
      const apart = new Set(tokenizer.specialTokens.filter(token => !special.has(token)))
      return wholeSlow(kept, special, apart, name === 'yi')
    }
  }
}

describe.each(names)('stream of mgm-%s-tiny', name => {
  it.each([true, false])('equals decoding at once (skipSpecialTokens %s)', async skipSpecialTokens => {
    const tokenizer = await load(name)
    const all = range(0, tokenizer.size)
    // Ordinary ids, and those where decoders go wrong: bytes, special tokens, spaces, marks that clean-up moves.
    const pools = [
      all,
      all.filter(id => isByte(tokenizer.token(id)!) || (name === 'llama3' && id >= 94 && id < 256)),
      [
        ...tokenizer.specialIds,
        ...tokenizer.specialTokens.map(t => tokenizer.encode(t, { addSpecialTokens: false }).at(-1)!),
      ],
      all.filter(id => /^[▁Ġ]*([.?!,']|[nstvr]|'?(ve|re|s|m)|n't)?$/.test(tokenizer.token(id)!)),
    ]
    const characters = ['é', '中', '😀', '\u0800', '\uFEFF'].map(c =>
      tokenizer.encode(c, { addSpecialTokens: false }),
    )
    let state = 12345
    const rng = (n: number) => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0
      return Math.floor((state / 2 ** 32) * n)
    }
    const stream = tokenizer.createStream({ skipSpecialTokens })
    let replaced = 0
    for (let round = 0; round < 1500; round++) {
      const ids: number[] = []
      for (let n = rng(8); n >= 0; n--) {
        const pool = pools[rng(pools.length + 1)]
        if (pool) ids.push(pool[rng(pool.length)]!)
        else {
          const character = characters[rng(characters.length)]!
          ids.push(...character.slice(0, rng(4) === 0 ? -1 : undefined))
        }
      }
      const deltas = ids.map(id => stream.push(id))
      deltas.push(stream.flush())
      const expected = whole(name, tokenizer, ids, skipSpecialTokens)
      expect([ids, deltas.join('')]).toEqual([ids, expected])
      expect(tokenizer.decode(ids, { skipSpecialTokens })).toBe(expected)
      for (const delta of deltas) expect(/\p{Surrogate}/u.test(delta)).toBe(false)
      if (expected.includes('\uFFFD')) replaced++
    }
    expect(replaced).toBeGreaterThan(50)
  })

  it('lets text go as soon as it is certain', async () => {
    const tokenizer = await load(name)
    const stream = tokenizer.createStream()
    const ids = tokenizer.encode('The largest shape is blue 😀 and', { addSpecialTokens: false })
    let shown = ''
    let longestWait = 0
    for (const id of ids) {
      shown += stream.push(id)
      const wait =
        tokenizer.decode(ids.slice(0, ids.indexOf(id) + 1)).replace(/\uFFFD+$/, '').length - shown.length
      longestWait = Math.max(longestWait, wait)
    }
    expect(shown + stream.flush()).toBe(tokenizer.decode(ids, { skipSpecialTokens: true }))
    // Clean-up holds a space and a letter, byte fallback a character of two UTF-16 units.
    expect(longestWait).toBeLessThanOrEqual(2)
  })

  it('keeps the marks of drawing prompts as text', async () => {
    const tokenizer = await load(name)
    const ids = tokenizer.encode('<h>a cat</h> <GEN>', { addSpecialTokens: false })
    expect(tokenizer.decode(ids, { skipSpecialTokens: true }).trim()).toBe('<h>a cat</h> <GEN>')
  })

  it('takes lone surrogates for U+FFFD', async () => {
    const tokenizer = await load(name)
    expect(tokenizer.encode('a\uD800b\uDC00')).toEqual(tokenizer.encode('a\uFFFDb\uFFFD'))
  })
})

describe('loadTokenizer', () => {
  const failing: [string, Name, object, Record<string, string | object | null>, RegExp][] = [
    [
      'no vocabulary',
      'vicuna',
      {},
      { 'tokenizer.model': null },
      /expected tokenizer\.model or tokenizer\.json in/,
    ],
    [
      'a cut tokenizer.json',
      'llama3',
      {},
      { 'tokenizer.json': '{"model": {' },
      /tokenizer\.json is not JSON/,
    ],
    ['an array', 'llama3', {}, { 'tokenizer.json': '[]' }, /expected an object for .*tokenizer\.json/],
    ['no model', 'llama3', {}, { 'tokenizer.json': {} }, /expected an object for model in/],
    [
      'a WordPiece model',
      'llama3',
      {},
      { 'tokenizer.json': { model: { type: 'WordPiece' } } },
      /BPE or Unigram model/,
    ],
    [
      'an id that is no number',
      'llama3',
      {},
      { 'tokenizer.json': { model: { type: 'BPE', vocab: { a: 'x' }, merges: [] } } },
      /whole number below/,
    ],
    [
      'an unknown decoder',
      'llama3',
      { added_tokens_decoder: {} },
      { 'tokenizer.json': { model: { type: 'BPE', vocab: { a: 0 }, merges: [] }, decoder: { type: 'CTC' } } },
      /expected ByteLevel, or .* but received \{"type":"CTC"\}/,
    ],
    [
      'an unknown normalizer',
      'llama3',
      { added_tokens_decoder: {} },
      {
        'tokenizer.json': {
          model: { type: 'BPE', vocab: { a: 0 }, merges: [] },
          decoder: { type: 'ByteLevel' },
          normalizer: { type: 'Magic' },
        },
      },
      /cannot be used: Unknown Normalizer type: Magic/,
    ],
    [
      'a model that is text',
      'vicuna',
      {},
      { 'tokenizer.model': 'version https://git-lfs' },
      /SentencePiece model/,
    ],
    ['no end token', 'gemma', { eos_token: null }, {}, /expected a token of the vocabulary for eos_token/],
    [
      'a wrong flag',
      'vicuna',
      { legacy: 'no' },
      {},
      /expected true or false for legacy in .* but received no/,
    ],
    ['a wrong added token', 'vicuna', { added_tokens_decoder: { 1: 7 } }, {}, /an object with a content/],
    ['a wrong added id', 'vicuna', { added_tokens_decoder: { x: { content: 'a' } } }, {}, /but received NaN/],
    [
      'an id that tokenizer.json contradicts',
      'llama3',
      { added_tokens_decoder: { 495: { content: '<new>', special: true } } },
      {},
      /expected 490 as in tokenizer\.json for the id of "<new>" .* but received 495/,
    ],
  ]
  it.each(failing)('refuses %s', async (_, name, config, files, message) => {
    const loading = loadTokenizer(variant(name, config, files), cases[name])
    await expect(loading).rejects.toThrow(message)
    await expect(loading).rejects.toMatchObject({ code: 'TOKENIZER_INVALID' })
  })

  it('uses the other kind of file when the preferred one is missing', async () => {
    const tokenizer = await loadTokenizer(variant('mixtral', {}, { 'tokenizer.json': null }), {
      family: 'mixtral',
    })
    expect(tokenizer.encode('Hello world')).toEqual((await load('mixtral')).encode('Hello world'))
  })

  it('refuses a wrong family and an aborted signal', async () => {
    await expect(loadTokenizer(modelFolder('yi'), { family: 'bert' as 'llama' })).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
    })
    const loading = loadTokenizer(modelFolder('yi'), { family: 'llama', signal: AbortSignal.abort() })
    await expect(loading).rejects.toMatchObject({ code: 'ABORTED' })
  })
})
