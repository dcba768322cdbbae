import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { describe, expect, it } from 'vitest'
import { loadTokenizer, type TokenizerFamily } from '../../lib/processing/tokenizer.ts'

const cases: [string, string, TokenizerFamily][] = [
  ['gemma', 'MGM-2B', 'gemma'],
  ['vicuna', 'MGM-7B', 'llama'],
  ['llama3', 'MGM-8B', 'llama'],
  ['mixtral', 'MGM-8x7B', 'mixtral'],
  ['yi', 'MGM-34B', 'llama'],
  ['hd', 'MGM-7B-HD', 'llama'],
]
describe.each(cases)('tokenizer of mgm-%s-tiny', (name, model, family) => {
  const folder = new URL(`../fixtures/mgm-${name}-tiny/`, import.meta.url)
  const tokenizer = loadTokenizer(fileURLToPath(new URL(model, folder)), { family })
  const golden: {
    len: number
    items: { text: string; input_ids: number[]; decoded: string; decoded_skip_special: string }[]
  } = JSON.parse(readFileSync(new URL('tokenizer_goldens.json', folder), 'utf8'))
  it('agrees with the reference', async () => {
    const t = await tokenizer
    expect(t.size).toBe(golden.len)
    for (const item of golden.items) {
      expect([item.text, t.encode(item.text)]).toEqual([item.text, item.input_ids])
      expect(t.decode(item.input_ids)).toBe(item.decoded)
      expect(t.decode(item.input_ids, { skipSpecialTokens: true })).toBe(item.decoded_skip_special)
    }
  })
})
