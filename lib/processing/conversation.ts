import { expected, MgmError } from '../errors.ts'

/** How a template joins its parts; the names are those of the reference's `SeparatorStyle`. */
export type SeparatorStyle = 'SINGLE' | 'TWO' | 'MPT' | 'PLAIN' | 'LLAMA_2' | 'LLAMA_3' | 'GEMMA'

/** One conversation template. Source: `mgm/conversation.py` of MGM. */
export interface Conversation {
  /** Marker that belongs in front of the system text whatever that text is. */
  readonly systemPrefix: string
  /** The system text; a caller's system message replaces it and keeps `systemPrefix`. */
  readonly system: string
  /** What introduces a user's and an assistant's turn. */
  readonly roles: readonly [user: string, assistant: string]
  readonly style: SeparatorStyle
  readonly sep: string
  readonly sep2: string | null
  /** Turns (user, assistant, …) that stand before the caller's own. */
  readonly preset: readonly string[]
}

/** A turn's text, or null for the answer that is still to be written. */
export type Turn = string | null

const GUIDE_HUMAN =
  'A chat between a curious human and an artificial intelligence assistant. ' +
  "The assistant gives helpful, detailed, and polite answers to the human's questions."
const GUIDE_USER =
  'A chat between a curious user and an artificial intelligence assistant. ' +
  "The assistant gives helpful, detailed, and polite answers to the user's questions."
const GUIDE_MMTAG =
  'A chat between a curious user and an artificial intelligence assistant. ' +
  'The assistant is able to understand the visual content that the user provides, ' +
  'and assist the user with a variety of tasks using natural language.' +
  'The visual content will be provided with the following format: <Image>visual content</Image>.'
const GUIDE_VISION =
  'You are a helpful language and vision assistant. ' +
  'You are able to understand the visual content that the user provides, ' +
  'and assist the user with a variety of tasks using natural language.'
const GUIDE_LLAMA_2 =
  'You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  ' +
  'Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. ' +
  'Please ensure that your responses are socially unbiased and positive in nature.\n\n' +
  'If a question does not make any sense, or is not factually coherent, explain why instead of answering something not correct. ' +
  "If you don't know the answer to a question, please don't share false information."

const ENERGY_EXAMPLE = [
  'What are the key differences between renewable and non-renewable energy sources?',
  'Renewable energy sources are those that can be replenished naturally in a relatively ' +
    'short amount of time, such as solar, wind, hydro, geothermal, and biomass. ' +
    'Non-renewable energy sources, on the other hand, are finite and will eventually be ' +
    'depleted, such as coal, oil, and natural gas. Here are some key differences between ' +
    'renewable and non-renewable energy sources:\n' +
    '1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable ' +
    'energy sources are finite and will eventually run out.\n' +
    '2. Environmental impact: Renewable energy sources have a much lower environmental impact ' +
    'than non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, ' +
    'and other negative effects.\n' +
    '3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically ' +
    'have lower operational costs than non-renewable sources.\n' +
    '4. Reliability: Renewable energy sources are often more reliable and can be used in more remote ' +
    'locations than non-renewable sources.\n' +
    '5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different ' +
    'situations and needs, while non-renewable sources are more rigid and inflexible.\n' +
    '6. Sustainability: Renewable energy sources are more sustainable over the long term, while ' +
    'non-renewable sources are not, and their depletion can lead to economic and social instability.\n',
] as const

type Fields = Partial<Conversation> & Pick<Conversation, 'system'>

const single = (fields: Fields): Conversation => ({
  systemPrefix: '',
  roles: ['Human', 'Assistant'],
  style: 'SINGLE',
  sep: '###',
  sep2: null,
  preset: [],
  ...fields,
})
const two = (fields: Fields): Conversation => ({
  ...single(fields),
  roles: ['USER', 'ASSISTANT'],
  style: 'TWO',
  sep: ' ',
  sep2: fields.sep2 ?? '</s>',
})
const llama2 = (fields: Fields): Conversation => ({ ...two(fields), style: 'LLAMA_2', sep: '<s>' })
const chatml = (fields: Fields): Conversation => ({
  ...single(fields),
  systemPrefix: '<|im_start|>system\n',
  roles: ['<|im_start|>user\n', '<|im_start|>assistant\n'],
  style: 'MPT',
  sep: '<|im_end|>',
})
const plain = (): Conversation => ({ ...single({ system: '' }), roles: ['', ''], style: 'PLAIN', sep: '\n' })

/** Every template of the reference under the reference's names. */
export const conversations = {
  default: single({ system: GUIDE_HUMAN, preset: ENERGY_EXAMPLE }),
  v0: single({ system: GUIDE_HUMAN, preset: ENERGY_EXAMPLE }),
  v1: two({ system: GUIDE_USER }),
  vicuna_v1: two({ system: GUIDE_USER }),
  phi_2: two({ system: GUIDE_USER, sep2: '<|endoftext|>' }),
  gemma: { ...single({ system: '' }), roles: ['user', 'model'], style: 'GEMMA', sep: '', sep2: '<eos>' },
  llama_2: llama2({ system: GUIDE_LLAMA_2 }),
  llama_3: {
    ...single({ system: GUIDE_VISION }),
    systemPrefix: '<|start_header_id|>system<|end_header_id|>\n\n',
    // The assistant's header says "system": so the reference trained it.
    roles: ['<|start_header_id|>user<|end_header_id|>\n\n', '<|start_header_id|>system<|end_header_id|>\n\n'],
    style: 'LLAMA_3',
    sep: '<|eot_id|>',
  },
  imgsp_v1: two({ system: GUIDE_USER }),
  mistral_instruct: llama2({ system: '' }),
  chatml_direct: chatml({ system: 'Answer the questions.' }),
  mistral_direct: chatml({ system: 'Answer the questions.' }),
  plain: plain(),
  v0_plain: plain(),
  llava_v0: single({ system: GUIDE_HUMAN }),
  v0_mmtag: single({ system: GUIDE_MMTAG }),
  llava_v1: two({ system: GUIDE_HUMAN }),
  v1_mmtag: two({ system: GUIDE_MMTAG }),
  llava_llama_2: llama2({ system: GUIDE_VISION }),
  mpt: chatml({
    system:
      'A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers.',
  }),
} as const satisfies Record<string, Conversation>

export type ConversationName = keyof typeof conversations

/** Looks a template up by name. Throws INVALID_ARGUMENT with the list of names for an unknown one. */
export function getConversation(name: string): Conversation {
  if (!Object.hasOwn(conversations, name)) {
    throw expected(`one of ${Object.keys(conversations).join(', ')}`, 'conversation', name)
  }
  return conversations[name as ConversationName]
}

/** The fields of a checkpoint's `config.json` that tell the families apart. */
export interface ConversationHints {
  readonly model_type?: unknown
  readonly _name_or_path?: unknown
  readonly vocab_size?: unknown
  readonly rope_theta?: unknown
}

/**
 * The template a released checkpoint was trained with.
 *
 * @param model its `config.json`, or its name (folder, hub id)
 * @param override a template name that wins over the guess
 *
 * `model_type` names Gemma and Mixtral. The Llama family (`mgm`) is told apart by the base model's RoPE theta and
 * vocabulary (Llama-3: 5e5, 128256; Yi: 5e6, 64000), then by name; what is left is Vicuna. Unlike the reference's
 * command line, which picks `vicuna_v1` for MGM-8B unless told otherwise, MGM-8B gets the `llama_3` it was trained with.
 */
export function conversationFor(model: ConversationHints | string, override?: string): ConversationName {
  if (override !== undefined) {
    getConversation(override)
    return override as ConversationName
  }
  if (typeof model === 'string') return fromName(model) ?? 'vicuna_v1'
  switch (model.model_type) {
    case 'mgm_gemma':
    case 'gemma':
      return 'gemma'
    case 'mgm_mixtral':
    case 'mgm_mistral':
    case 'mixtral':
    case 'mistral':
      return 'mistral_instruct'
  }
  if (model.rope_theta === 500_000 || model.vocab_size === 128_256) return 'llama_3'
  if (model.rope_theta === 5_000_000 || model.vocab_size === 64_000) return 'chatml_direct'
  return (typeof model._name_or_path === 'string' && fromName(model._name_or_path)) || 'vicuna_v1'
}

function fromName(path: string): ConversationName | undefined {
  const name = path
    .replace(/[\\/]+$/, '')
    .split(/[\\/]/)
    .at(-1)!
    .toLowerCase()
  // A size stands alone: the 8b of "mgm-8b" but neither of "mgm-8x7b" nor of "mgm-18b".
  const has = (size: string) => new RegExp(`(?<![a-z0-9.])${size}(?![a-z0-9])`).test(name)
  if (has('8x7b')) return 'mistral_instruct'
  if (has('34b')) return 'chatml_direct'
  if (has('2b')) return 'gemma'
  if (has('8b')) return 'llama_3'
  if (has('7b') || has('13b')) return 'vicuna_v1'
  return undefined
}

/**
 * Renders turns (user, assistant, user, …) into the prompt, as `Conversation.get_prompt` of the reference: an empty or
 * null turn leaves the role's header open for an answer.
 *
 * @param system replaces the template's system text
 * @throws INVALID_ARGUMENT for a null turn that is not the last one or an empty first turn where the template needs one;
 *   UNSUPPORTED for an answer in `plain` and `v0_plain`, which have no separator after it
 */
export function renderConversation(
  template: Conversation,
  turns: readonly Turn[],
  system: string = template.system,
): string {
  turns.forEach((turn, i) => {
    if (turn === null && i < turns.length - 1) {
      throw expected('null only as the last turn', 'turns', `null at ${i} of ${turns.length}`)
    }
  })
  const { roles, sep, style } = template
  const seps = [sep, template.sep2]
  const head = template.systemPrefix + system
  const all = [...template.preset, ...turns]
  const role = (i: number) => roles[i % 2]!

  switch (style) {
    case 'SINGLE':
      return head + sep + all.map((turn, i) => (turn ? `${role(i)}: ${turn}${sep}` : `${role(i)}:`)).join('')
    case 'TWO':
      return (
        head +
        sep +
        all.map((turn, i) => (turn ? `${role(i)}: ${turn}${seps[i % 2]}` : `${role(i)}:`)).join('')
      )
    case 'MPT':
    case 'LLAMA_3':
      return head + sep + all.map((turn, i) => (turn ? role(i) + turn + sep : role(i))).join('')
    case 'GEMMA':
      return (
        head +
        sep +
        all
          .map((turn, i) => {
            const header = `<start_of_turn>${role(i)}\n`
            return turn ? `${header}${turn}<end_of_turn>\n${seps[i % 2]}` : header
          })
          .join('')
      )
    case 'LLAMA_2': {
      if (all.length > 0 && !all[0]) throw expected('a non-empty text', 'the first turn', all[0])
      const prompt = all
        .map((turn, i) => {
          if (!turn) return ''
          if (i % 2 === 1) return ` ${turn} ${template.sep2}`
          const wrapped = i === 0 && head ? `<<SYS>>\n${head}\n<</SYS>>\n\n${turn}` : turn
          return `${sep}[INST] ${wrapped} [/INST]`
        })
        .join('')
      // Python's lstrip(sep): it drops characters of the set, here the leading `<s>` that the tokenizer adds itself.
      let start = 0
      while (start < prompt.length && sep.includes(prompt[start]!)) start++
      return prompt.slice(start)
    }
    case 'PLAIN':
      return (
        head +
        all
          .map((turn, i) => {
            if (!turn) return ''
            const end = seps[i % 2]
            if (end == null) {
              throw new MgmError(
                'UNSUPPORTED',
                'expected one unanswered turn for a plain conversation but received an answer',
              )
            }
            return turn + end
          })
          .join('')
      )
  }
}

/**
 * The reference's rule for several pictures: with two or more marks in the prompt each becomes `Image k:` + mark.
 *
 * @param mark what stands for a picture; default `<image>`
 */
export function numberImages(prompt: string, mark: string | RegExp = '<image>', written = '<image>'): string {
  const parts = prompt.split(mark)
  if (parts.length < 3) return parts.join(written)
  return parts.map((part, i) => (i < parts.length - 1 ? `${part}Image ${i + 1}:${written}` : part)).join('')
}
