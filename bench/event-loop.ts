// How long the event loop is held up while requests run. Prints JSON.
//   npx tsx bench/event-loop.ts <checkpoint> [image] [requests]
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { MiniGemini } from '../lib/index.ts'

const [checkpoint, image, count = '4'] = process.argv.slice(2)
if (!checkpoint) throw new Error('usage: event-loop.ts <checkpoint> [image] [requests]')

const mgm = await MiniGemini.load(checkpoint)
const content = [
  ...(image ? [{ type: 'image' as const, image }] : []),
  { type: 'text' as const, text: 'Describe what you see, in detail.' },
]
const request = { messages: [{ role: 'user' as const, content }], maxTokens: 128 }
await mgm.chat({ ...request, maxTokens: 2 })

const delay = monitorEventLoopDelay({ resolution: 1 })
delay.enable()
const start = performance.now()
const answers = await Promise.all(
  Array.from({ length: Number(count) }, (_, seed) => mgm.chat({ ...request, temperature: 1, seed })),
)
const seconds = (performance.now() - start) / 1000
delay.disable()
await mgm.close()

const ms = (nanoseconds: number) => Math.round(nanoseconds / 1e4) / 100
console.log(
  JSON.stringify({
    requests: answers.length,
    tokens: answers.reduce((sum, answer) => sum + answer.usage.completionTokens, 0),
    seconds: Math.round(seconds * 100) / 100,
    // The timer itself waits 1 ms.
    eventLoopDelayMs: {
      p50: ms(delay.percentile(50)),
      p99: ms(delay.percentile(99)),
      max: ms(delay.max),
    },
  }),
)
