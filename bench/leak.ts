// Memory before and after many short chats. Prints JSON. Questions repeat: the tokenizer keeps those it has seen.
//   npx tsx --expose-gc bench/leak.ts <checkpoint> [image] [chats]
import { MiniGemini } from '../lib/index.ts'

const [checkpoint, image, count = '1000'] = process.argv.slice(2)
if (!checkpoint) throw new Error('usage: leak.ts <checkpoint> [image] [chats]')

const mgm = await MiniGemini.load(checkpoint, { visionCacheBytes: 0 })
const collect = (globalThis as { gc?: () => void }).gc

async function chats(from: number, to: number): Promise<void> {
  for (let i = from; i < to; i++) {
    const content = [
      ...(image ? [{ type: 'image' as const, image }] : []),
      { type: 'text' as const, text: `Question ${i % 50}: what is this?` },
    ]
    // Some are aborted, some fail: those must leak no more than the others.
    const controller = new AbortController()
    const chat = mgm.chat({
      messages: [{ role: 'user', content }],
      maxTokens: 8,
      temperature: 1,
      seed: i,
      signal: controller.signal,
    })
    if (i % 10 === 0) setTimeout(() => controller.abort(), 3)
    await chat.catch(() => {})
  }
}

function measure() {
  collect?.()
  const { rss, heapUsed, external, arrayBuffers } = process.memoryUsage()
  return { rss, heapUsed, external, arrayBuffers, device: mgm.metrics.memory.used }
}

// Pools and caches fill first.
await chats(0, 100)
const before = measure()
await chats(100, 100 + Number(count))
const after = measure()
await mgm.close()
console.log(
  JSON.stringify({
    chats: Number(count),
    before,
    after,
    growth: Object.fromEntries(
      Object.entries(after).map(([key, value]) => [key, value - before[key as keyof typeof before]]),
    ),
  }),
)
