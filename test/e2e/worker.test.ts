import { spawn } from 'node:child_process'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Worker } from 'node:worker_threads'
import { describe, expect, it } from 'vitest'
import { MiniGemini } from '../../lib/index.ts'
import { gemma, messagesOf, sample, small, vicuna } from './cases.ts'

const program = fileURLToPath(new URL('./program.mts', import.meta.url))
const checkout = join(fileURLToPath(new URL('.', import.meta.url)), '..', '..')

/** Runs program.mts in a thread; resolves to the ids it generated once the thread has ended by itself. */
function inWorker(folder: string, mode: string): Promise<{ tokens: number[]; exitCode: number }> {
  return new Promise((resolve, reject) => {
    // The loader for TypeScript has to be in place before the thread's first module.
    const code = `import('tsx/esm/api').then(tsx => tsx.tsImport(${JSON.stringify(program)}, ${JSON.stringify(`${checkout}package.json`)}))`
    const worker = new Worker(code, { eval: true, workerData: { folder, mode } })
    let tokens: number[] = []
    worker.on('message', message => {
      tokens = message
    })
    worker.on('error', reject)
    worker.on('exit', exitCode => resolve({ tokens, exitCode }))
  })
}

/** Runs program.mts as a process of its own; it must end by itself. */
function inProcess(folder: string, mode: string): Promise<{ tokens: number[]; exitCode: number | null }> {
  return new Promise((resolve, reject) => {
    const child = spawn(process.execPath, ['--import', 'tsx', program, folder, mode], {
      cwd: checkout,
      stdio: ['ignore', 'pipe', 'inherit'],
      timeout: 40_000,
    })
    let output = ''
    child.stdout.on('data', chunk => {
      output += chunk
    })
    child.on('error', reject)
    child.on('close', exitCode => resolve({ tokens: JSON.parse(output || '[]') as number[], exitCode }))
  })
}

const ids = (of: typeof vicuna) => sample(of, 'single').generated_ids

describe('worker threads', () => {
  it('two of them and the main thread load and answer at once', async () => {
    const main = (async () => {
      const mgm = await MiniGemini.load(vicuna.folder, small)
      const answer = await mgm.chat({ messages: messagesOf(vicuna, sample(vicuna, 'single')), maxTokens: 24 })
      await mgm.close()
      return answer.tokens
    })()
    const [first, second] = await Promise.all([
      inWorker(vicuna.folder, 'close'),
      inWorker(gemma.folder, 'close'),
    ])
    expect(await main).toEqual(ids(vicuna))
    expect(first).toEqual({ tokens: ids(vicuna), exitCode: 0 })
    expect(second).toEqual({ tokens: ids(gemma), exitCode: 0 })
  })

  it('one that ends without closing, or in the middle of an answer, harms nobody', async () => {
    expect(await inWorker(vicuna.folder, 'leave')).toEqual({ tokens: ids(vicuna), exitCode: 0 })
    expect((await inWorker(vicuna.folder, 'exit')).exitCode).toBe(3)
    const mgm = await MiniGemini.load(vicuna.folder, small)
    const answer = await mgm.chat({ messages: messagesOf(vicuna, sample(vicuna, 'single')), maxTokens: 24 })
    expect(answer.tokens).toEqual(ids(vicuna))
    await mgm.close()
  })
})

describe('a process', () => {
  it('ends by itself after close', async () => {
    expect(await inProcess(vicuna.folder, 'close')).toEqual({ tokens: ids(vicuna), exitCode: 0 })
  })

  it('ends by itself without close', async () => {
    expect(await inProcess(vicuna.folder, 'leave')).toEqual({ tokens: ids(vicuna), exitCode: 0 })
  })

  it('may exit in the middle of an answer', async () => {
    expect((await inProcess(vicuna.folder, 'exit')).exitCode).toBe(3)
  })
})
