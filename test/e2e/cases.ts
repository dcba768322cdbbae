import { readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import type { ChatMessage, LoadOptions } from '../../lib/index.ts'

const FIXTURES = join(dirname(fileURLToPath(import.meta.url)), '..', 'fixtures')

/** Enough for every sample at once, and little memory beside other tests. */
export const small: LoadOptions = { device: 'cpu', threads: 2, maxSequences: 16, kvMemory: 16 * 2 ** 20 }

export interface Sample {
  name: string
  images: string[]
  turns: string[]
  prompt: string
  n_embeds: number
  generated_ids: number[]
  text: string
}

export interface Case {
  name: string
  root: string
  folder: string
  samples: Sample[]
  eosStop: { sample: string; eos_token_id: number; expected_ids: number[] }
}

function readCase(name: string): Case {
  const root = join(FIXTURES, name)
  const goldens = JSON.parse(readFileSync(join(root, 'samples.json'), 'utf8')) as {
    model_dir: string
    samples: Sample[]
    eos_stop: Case['eosStop']
  }
  return {
    name,
    root,
    folder: join(root, goldens.model_dir),
    samples: goldens.samples,
    eosStop: goldens.eos_stop,
  }
}

export const cases: readonly Case[] = [
  'mgm-gemma-tiny',
  'mgm-vicuna-tiny',
  'mgm-llama3-tiny',
  'mgm-mixtral-tiny',
  'mgm-yi-tiny',
  'mgm-hd-tiny',
].map(readCase)

export const gemma = cases[0]!
export const vicuna = cases[1]!

export function sample(of: Case, name: string): Sample {
  const found = of.samples.find(candidate => candidate.name === name)
  if (!found) throw new Error(`no sample ${name}`)
  return found
}

/** The sample as messages; its turns have OCR hint and `<GEN>` written out already. */
export function messagesOf(of: Case, { turns, images }: Sample): ChatMessage[] {
  return turns.map((text, i) => ({
    role: i % 2 === 0 ? 'user' : 'assistant',
    content:
      i === 0
        ? [
            ...images.map(image => ({ type: 'image' as const, image: join(of.root, image) })),
            { type: 'text' as const, text },
          ]
        : text,
  }))
}

/** The code and message of what a promise rejects with. */
export async function rejection(promise: Promise<unknown>): Promise<{ code: string; message: string }> {
  try {
    await promise
  } catch (error) {
    const { name, code, message } = error as { name: string; code: string; message: string }
    return name === 'MgmError' ? { code, message } : { code: `not an MgmError: ${name}`, message }
  }
  return { code: 'no error', message: '' }
}
