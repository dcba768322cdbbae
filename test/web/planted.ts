import { join } from 'node:path'
import { vi } from 'vitest'
import type { Drawn } from '../../lib/engine/sampler.ts'
import { MiniGemini } from '../../lib/index.ts'
import { loadTokenizer } from '../../lib/processing/tokenizer.ts'
import type { LoadOptions } from '../../lib/request.ts'
import { small, vicuna } from '../e2e/cases.ts'

/** What the stub of the sampler makes the model say (null: what it would say by itself), and how long a token takes. */
const planted = vi.hoisted(() => ({ ids: null as number[] | null, delay: 0 }))

vi.mock('../../lib/engine/sampler.ts', async original => {
  const module = await original<typeof import('../../lib/engine/sampler.ts')>()
  return {
    ...module,
    readSampled: async (...args: Parameters<typeof module.readSampled>): Promise<Drawn[]> => {
      const drawn = await module.readSampled(...args)
      if (planted.delay > 0) await new Promise(resolve => setTimeout(resolve, planted.delay))
      const rows = args[1] as readonly { tokens: readonly number[] }[]
      return drawn.map((one, r) => ({ ...one, id: planted.ids?.[rows[r]!.tokens.length] ?? one.id }))
    },
  }
})

/** The tiny checkpoint with the tiny generator. */
export function loadTiny(options: LoadOptions = {}): Promise<MiniGemini> {
  const diffusion = join(vicuna.root, '..', 'sdxl-tiny', 'pipeline')
  return MiniGemini.load(vicuna.folder, { ...small, diffusion, ...options })
}

/** Makes the model say a text from now on; null: what comes to its mind. */
export async function say(text: string | null): Promise<void> {
  const tokenizer = await loadTokenizer(vicuna.folder, { family: 'llama' })
  planted.ids = text === null ? null : [...tokenizer.encode(text), tokenizer.eosId]
}

/** Makes each token take so many milliseconds longer from now on, so that a request is sure to be running when it is looked at. */
export function linger(ms: number): void {
  planted.delay = ms
}
