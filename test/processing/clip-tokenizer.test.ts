import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, test } from 'vitest'
import { ClipTokenizer } from '../../lib/processing/clip-tokenizer.ts'
import { FIXTURES } from '../helpers/safetensors.ts'

const PIPELINE = join(FIXTURES, 'sdxl-tiny/pipeline')
const readJson = (file: string) => JSON.parse(readFileSync(file, 'utf8'))
const START = 811
const END = 812

const scratch = mkdtempSync(join(tmpdir(), 'mgm-clip-tokenizer-'))
afterAll(() => rmSync(scratch, { recursive: true }))

let copies = 0
/** A writable copy of the first tokenizer's folder, without `files`. */
function copy(...without: string[]): string {
  const folder = join(scratch, `copy-${copies++}`)
  cpSync(join(PIPELINE, 'tokenizer'), folder, { recursive: true })
  for (const file of without) rmSync(join(folder, file))
  return folder
}

// The first pads with its end token, the second with `!`, which is thereby a token of its own in the text too.
const tokenizers = await Promise.all(
  ['tokenizer', 'tokenizer_2'].map(name => ClipTokenizer.load(join(PIPELINE, name))),
)
const [first, second] = tokenizers as [ClipTokenizer, ClipTokenizer]
const pads = [END, 0]
const padded = (ids: readonly number[], pad: number) => [...ids, ...Array(77 - ids.length).fill(pad)]

describe('ClipTokenizer', () => {
  const goldens: { text: string; input_ids: number[]; input_ids_2: number[] }[] = readJson(
    join(FIXTURES, 'sdxl-tiny/tokenizer_goldens.json'),
  ).items
  test.each(goldens)('gives the ids of the reference for $text', golden => {
    expect([...first.encode(golden.text).ids]).toEqual(golden.input_ids)
    expect([...second.encode(golden.text).ids]).toEqual(golden.input_ids_2)
  })

  // Recorded by generate.py beside the file.
  test("gives transformers' ids and cuts for random prompts", () => {
    const cases: { text: string; encoded: { ids: number[]; cut: string }[] }[] = readJson(
      join(FIXTURES, 'clip-tokenizer/cases.json'),
    )
    expect(cases.some(({ encoded }) => encoded[0]!.cut !== '')).toBe(true)
    for (const { text, encoded } of cases) {
      for (const [i, { ids, cut }] of encoded.entries()) {
        const result = tokenizers[i]!.encode(text)
        expect({ text, ids: [...result.ids], cut: result.truncated }).toEqual({
          text,
          ids: padded(ids, pads[i]!),
          cut,
        })
      }
    }
  })

  test('cuts at 75 tokens and says what is lost', () => {
    const fits = first.encode(Array(75).fill('a').join(' '))
    expect([fits.ids[0], fits.ids[75], fits.ids[76], fits.truncated]).toEqual([START, 320, END, ''])
    const cut = first.encode(`${Array(75).fill('a').join(' ')} Red House`)
    expect([cut.ids[75], cut.ids[76], cut.truncated]).toEqual([320, END, 'red house'])
  })

  test('takes lone surrogates for U+FFFD', () => {
    expect(first.encode('a\ud800b').ids).toEqual(first.encode('a\ufffdb').ids)
  })

  test('reads tokenizer.json in the place of vocab.json and merges.txt', async () => {
    const folder = copy('vocab.json', 'merges.txt')
    const vocab = readJson(join(PIPELINE, 'tokenizer/vocab.json'))
    const merges = readFileSync(join(PIPELINE, 'tokenizer/merges.txt'), 'utf8').trim().split('\n').slice(1)
    for (const list of [merges, merges.map(line => line.split(' '))]) {
      const model = { type: 'BPE', vocab, merges: list }
      writeFileSync(join(folder, 'tokenizer.json'), JSON.stringify({ model }))
      const tokenizer = await ClipTokenizer.load(folder)
      for (const { text } of goldens) expect(tokenizer.encode(text)).toEqual(first.encode(text))
    }
  })

  test('reads the layout of special_tokens_map.json alone', async () => {
    const folder = copy('tokenizer_config.json')
    const tokenizer = await ClipTokenizer.load(folder)
    for (const { text } of goldens) expect(tokenizer.encode(text)).toEqual(first.encode(text))
    writeFileSync(join(folder, 'special_tokens_map.json'), JSON.stringify({ pad_token: '!' }))
    const padsWithBang = await ClipTokenizer.load(folder)
    for (const { text } of goldens) expect(padsWithBang.encode(text)).toEqual(second.encode(text))
  })

  test('refuses folders that are no tokenizer', async () => {
    await expect(ClipTokenizer.load(join(scratch, 'none'))).rejects.toThrow(
      /^expected vocab.json and merges.txt, or tokenizer.json for .*none but received neither$/,
    )
    await expect(ClipTokenizer.load(copy('merges.txt'))).rejects.toMatchObject({ code: 'TOKENIZER_INVALID' })
    const folder = copy()
    const file = join(folder, 'tokenizer_config.json')
    const { added_tokens_decoder: _, ...config } = readJson(file)
    writeFileSync(file, JSON.stringify({ ...config, pad_token: '<pad>' }))
    rmSync(join(folder, 'special_tokens_map.json'))
    await expect(ClipTokenizer.load(folder)).rejects.toThrow(
      /^expected a token of the vocabulary for pad_token of .* but received "<pad>"$/,
    )
    writeFileSync(join(folder, 'vocab.json'), '{"a": -1}')
    await expect(ClipTokenizer.load(folder)).rejects.toMatchObject({ code: 'TOKENIZER_INVALID' })
  })

  test('refuses prompts that are not text', () => {
    expect(() => first.encode(undefined as unknown as string)).toThrow(/^expected a string for prompt /)
  })
})
