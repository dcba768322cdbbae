import { readFileSync } from 'node:fs'
import { describe, expect, it } from 'vitest'
import {
  conversationFor,
  conversations,
  getConversation,
  numberImages,
  renderConversation,
} from '../../lib/processing/conversation.ts'

interface Golden {
  templates: Record<
    string,
    { system: string; roles: [string, string]; sep_style: string; sep: string; sep2: string | null }
  >
  mgm_models: Record<string, string>
  cases: {
    template: string
    list: string
    turns: (string | null)[]
    prompt: string | null
    prompt_numbered?: string
    error?: string
  }[]
}
const golden: Golden = JSON.parse(
  readFileSync(new URL('../fixtures/conversation/conversation.json', import.meta.url), 'utf8'),
)

describe('conversation templates', () => {
  it('are all of the reference and hold its parts', () => {
    expect(Object.keys(conversations).sort()).toEqual(Object.keys(golden.templates).sort())
    for (const [name, parts] of Object.entries(golden.templates)) {
      const ours = getConversation(name)
      expect([name, ours.systemPrefix + ours.system, ours.roles, ours.style, ours.sep, ours.sep2]).toEqual([
        name,
        parts.system,
        parts.roles,
        parts.sep_style,
        parts.sep,
        // The reference leaves sep2 of the styles that have none unset.
        parts.sep2,
      ])
    }
  })

  it.each(golden.cases.map(c => [`${c.template}/${c.list}`, c] as const))('renders %s', (_, c) => {
    const render = () => renderConversation(getConversation(c.template), c.turns)
    if (c.error) return expect(render).toThrow(expect.objectContaining({ code: 'UNSUPPORTED' }))
    expect(render()).toBe(c.prompt)
    expect(numberImages(render())).toBe(c.prompt_numbered ?? c.prompt)
  })

  it('keeps the system marker when the system text is replaced', () => {
    expect(renderConversation(conversations.llama_3, ['q', null], 'Be brief.')).toBe(
      '<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>' +
        '<|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|><|start_header_id|>system<|end_header_id|>\n\n',
    )
    expect(renderConversation(conversations.mistral_instruct, ['q', null], 'Be brief.')).toBe(
      '[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nq [/INST]',
    )
  })

  it('refuses unknown names and open turns in the middle', () => {
    expect(() => getConversation('toString')).toThrow(/expected one of default, .* but received "toString"/)
    expect(() => renderConversation(conversations.gemma, ['a', null, 'b'])).toThrow(
      /null only as the last turn/,
    )
    expect(() => renderConversation(conversations.llama_2, ['', null])).toThrow(/expected a non-empty text/)
  })
})

describe('conversationFor', () => {
  it('knows the released models by name', () => {
    for (const [name, template] of Object.entries(golden.mgm_models)) {
      for (const path of [name, `YanweiLi/${name}`, `/models/${name}/`, `${name}-HD`.toLowerCase()]) {
        expect([path, conversationFor(path)]).toEqual([path, template])
      }
    }
    expect(conversationFor('my-model-18b')).toBe('vicuna_v1')
  })

  it.each(['gemma', 'vicuna', 'llama3', 'mixtral', 'yi', 'hd'])('reads the config of mgm-%s-tiny', name => {
    const folder = new URL(`../fixtures/mgm-${name}-tiny/`, import.meta.url)
    const samples = JSON.parse(readFileSync(new URL('samples.json', folder), 'utf8'))
    const config = JSON.parse(readFileSync(new URL(`${samples.model_dir}/config.json`, folder), 'utf8'))
    expect(conversationFor({ ...config, _name_or_path: undefined })).toBe(samples.conv_mode)
    expect(conversationFor(config)).toBe(samples.conv_mode)
    expect(conversationFor(config, 'v1')).toBe('v1')
    expect(() => conversationFor(config, 'v9')).toThrow(expect.objectContaining({ code: 'INVALID_ARGUMENT' }))
  })
})
