import { describe, expected, MgmError } from '../errors.ts'
import {
  type Conversation,
  getConversation,
  numberImages,
  renderConversation,
  type Turn,
} from './conversation.ts'
import type { Tokenizer } from './tokenizer.ts'

/** Stands in the ids where a picture's embeddings go. Source: `IMAGE_TOKEN_INDEX` of MGM. */
export const IMAGE_TOKEN_INDEX = -200

export interface TextPart {
  readonly type: 'text'
  readonly text: string
}
export interface ImagePart<Image> {
  readonly type: 'image'
  readonly image: Image
}

/** One message of the API. Pictures belong to users; several text parts are joined by a newline. */
export interface Message<Image = unknown> {
  readonly role: 'system' | 'user' | 'assistant'
  readonly content: string | readonly (TextPart | ImagePart<Image>)[]
  /** Words read in the picture, for an earlier user turn; for the last one the request's own option is meant. */
  readonly ocrHint?: readonly string[] | undefined
  /** That an earlier user turn asked for a picture to be drawn. */
  readonly generateImage?: boolean | undefined
}

export interface PromptOptions {
  /** Template or its name. */
  readonly conversation: Conversation | string
  /** Words read in the picture by OCR, given to the last user turn. */
  readonly ocrHint?: readonly string[] | undefined
  /** Appends ` <GEN>` to the last user turn, which asks the model to write a prompt for the image generator. */
  readonly generateImage?: boolean | undefined
  /**
   * Strings that message texts must not contain, e.g. `tokenizer.specialTokens` where the texts come from strangers.
   * Default none: as in the reference, a special token written out in a text is that token.
   */
  readonly forbidden?: readonly string[] | undefined
}

/** A rendered prompt. */
export interface Prompt<Image = unknown> {
  /** The whole prompt as the reference writes it, with `<image>` at the picture slots. For display and logs. */
  readonly text: string
  /** [images + 1] the texts between the picture slots; what is tokenized. */
  readonly chunks: readonly string[]
  /** The pictures in slot order. */
  readonly images: readonly Image[]
}

// A lone surrogate cannot occur in sanitised text, so no message can forge a picture slot.
const SLOT = '\uD800'
const SLOT_PATTERN = /\uD800/u

/**
 * Builds the prompt of a conversation as the reference's command line does: to each user turn its text, then
 * `\nReference OCR Token: a, b\n`, then ` <GEN>`; all pictures of the conversation go in front of the first user turn
 * (`<image>\n` each) and are numbered `Image k:` when there are two or more.
 *
 * A literal `<image>` in a text stays text: picture slots come from image parts alone and are kept apart in `chunks`.
 *
 * @throws INVALID_ARGUMENT when messages are malformed, out of order (an optional system message first, then user and
 *   assistant in turn, a user last), a user message is empty, or a text holds a forbidden string
 */
export function buildPrompt<Image>(
  messages: readonly Message<Image>[],
  options: PromptOptions,
): Prompt<Image> {
  const template =
    typeof options.conversation === 'string' ? getConversation(options.conversation) : options.conversation
  if (!Array.isArray(messages) || messages.length === 0)
    throw expected('a non-empty array', 'messages', messages)

  let system: string | undefined
  const turns: string[] = []
  const images: Image[] = []
  messages.forEach((message: Message<Image>, i) => {
    const name = `messages[${i}]`
    const content = readContent(message, name, options.forbidden ?? [])
    if (message.role === 'system') {
      if (i > 0) throw expected('the system message first', `${name}.role`, 'system')
      if (content.images.length > 0) throw expected('text only', `${name}.content`, 'an image part')
      system = content.text
      return
    }
    const role = turns.length % 2 === 0 ? 'user' : 'assistant'
    if (message.role !== role) throw expected(`"${role}"`, `${name}.role`, message.role)
    if (role === 'assistant') {
      if (content.images.length > 0) throw expected('text only', `${name}.content`, 'an image part')
      turns.push(content.text)
      return
    }
    if (content.text === '' && content.images.length === 0)
      throw expected('a text or an image', `${name}.content`, '')
    images.push(...content.images)
    const isLast = i === messages.length - 1
    const hint = (isLast ? options.ocrHint : undefined) ?? message.ocrHint ?? []
    const generate = (isLast ? options.generateImage : undefined) ?? message.generateImage ?? false
    turns.push(content.text + ocrSuffix(hint, name) + (generate ? ' <GEN>' : ''))
  })
  if (turns.length % 2 === 0) {
    throw expected(
      'a user message last',
      'messages',
      turns.length === 0 ? 'a system message' : 'an assistant message',
    )
  }
  turns[0] = `${SLOT}\n`.repeat(images.length) + turns[0]

  const rendered = numberImages(
    renderConversation(template, [...turns, null] as Turn[], system),
    SLOT_PATTERN,
    SLOT,
  )
  const chunks = rendered.split(SLOT_PATTERN)
  if (chunks.length !== images.length + 1) {
    throw new MgmError(
      'INTERNAL',
      `expected ${images.length} picture slots but rendered ${chunks.length - 1}`,
    )
  }
  return { text: chunks.join('<image>'), chunks, images }
}

function readContent<Image>(
  message: Message<Image>,
  name: string,
  forbidden: readonly string[],
): { text: string; images: Image[] } {
  if (typeof message !== 'object' || message === null) throw expected('an object', name, message)
  if (message.role !== 'system' && message.role !== 'user' && message.role !== 'assistant') {
    throw expected('"system", "user" or "assistant"', `${name}.role`, message.role)
  }
  const { content } = message
  const texts: string[] = []
  const images: Image[] = []
  if (typeof content === 'string') texts.push(content)
  else if (Array.isArray(content)) {
    content.forEach((part: TextPart | ImagePart<Image>, j: number) => {
      if (part?.type === 'text' && typeof part.text === 'string') texts.push(part.text)
      else if (part?.type === 'image' && part.image !== undefined && part.image !== null)
        images.push(part.image)
      else throw expected('a text part or an image part', `${name}.content[${j}]`, part)
    })
  } else throw expected('a string or an array of parts', `${name}.content`, content)
  const text = wellFormed(texts.join('\n'))
  for (const token of forbidden) {
    if (token !== '' && text.includes(token)) {
      throw new MgmError(
        'INVALID_ARGUMENT',
        `expected text without special tokens for ${name}.content but received one with ${describe(token)}`,
      )
    }
  }
  return { text, images }
}

function ocrSuffix(hint: readonly string[], name: string): string {
  if (!Array.isArray(hint) || hint.some(word => typeof word !== 'string')) {
    throw expected('an array of strings', `${name} ocrHint`, hint)
  }
  return hint.length > 0 ? `\nReference OCR Token: ${wellFormed(hint.join(', '))}\n` : ''
}

/** The text with every lone surrogate replaced by U+FFFD. */
export function wellFormed(text: string): string {
  return text.replace(/\p{Surrogate}/gu, '\uFFFD')
}

/**
 * The prompt's ids with `IMAGE_TOKEN_INDEX` at the picture slots. Source: `tokenizer_image_token` of MGM: every chunk is
 * tokenized on its own with BOS; if the first chunk begins with BOS it is kept once and dropped from every chunk. So a
 * SentencePiece dummy prefix comes again after each picture.
 */
export function tokenizePrompt(tokenizer: Tokenizer, prompt: Pick<Prompt, 'chunks'>): number[] {
  const chunks = prompt.chunks.map(chunk => tokenizer.encode(chunk))
  const first = chunks[0]?.[0]
  const hasBos = first !== undefined && first === tokenizer.bosId
  const ids: number[] = hasBos ? [first] : []
  chunks.forEach((chunk, i) => {
    if (i > 0) ids.push(IMAGE_TOKEN_INDEX)
    for (let j = hasBos ? 1 : 0; j < chunk.length; j++) ids.push(chunk[j]!)
  })
  return ids
}
