// A program that uses the library once: in a process of its own (folder and mode as arguments), or in a thread.
import { dirname } from 'node:path'
import { parentPort, workerData } from 'node:worker_threads'
import { MiniGemini } from '../../lib/index.ts'
import { cases, messagesOf, sample, small } from './cases.ts'

const given = workerData as { folder: string; mode: string } | null
const folder = given?.folder ?? process.argv[2]!
const mode = given?.mode ?? process.argv[3]!

const golden = cases.find(candidate => candidate.root === dirname(folder))!
const mgm = await MiniGemini.load(folder, small)
const messages = messagesOf(golden, sample(golden, 'single'))
if (mode === 'exit') {
  for await (const event of mgm.stream({ messages, maxTokens: 1000 }))
    if (event.type === 'text') process.exit(3)
}
const { tokens } = await mgm.chat({ messages, maxTokens: 24 })
if (parentPort) parentPort.postMessage(tokens)
else process.stdout.write(JSON.stringify(tokens))
if (mode === 'close') await mgm.close()
