// Peer: llama.cpp through node-llama-cpp, a random Gemma-2B-shaped GGUF.
// usage: MGM_BENCH_LLAMA=folder node llama_peer.mjs model.gguf THREADS
// MGM_BENCH_LLAMA holds node_modules/node-llama-cpp. Answers the lines `prefill N` and `decode N` with {"seconds": ..., "cpu": ...}.
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { pathToFileURL } from 'node:url'

const [, , file, threads] = process.argv
const resolve = createRequire(join(process.env.MGM_BENCH_LLAMA, 'package.json')).resolve
const { getLlama } = await import(pathToFileURL(resolve('node-llama-cpp')).href)
const llama = await getLlama({ gpu: false, build: 'never', logLevel: 'error', maxThreads: Number(threads) })
const model = await llama.loadModel({ modelPath: file })
const context = await model.createContext({
  contextSize: 2048,
  batchSize: 512,
  threads: { ideal: Number(threads), min: Number(threads) },
  flashAttention: true,
})
const sequence = context.getSequence()

const work = {
  async prefill(count) {
    await sequence.clearHistory()
    const ids = Array.from({ length: count }, (_, i) => 300 + ((i * 37) % 200000))
    return async () => void (await sequence.evaluateWithoutGeneratingNewTokens(ids))
  },
  async decode(count) {
    return async () => {
      let left = count
      for await (const _ of sequence.evaluate([42], { temperature: 0, yieldEogToken: true }))
        if (--left === 0) break
    }
  },
}

console.log(JSON.stringify({ name: 'llama.cpp' }))
for await (const line of createInterface(process.stdin)) {
  const [kind, count] = line.split(' ')
  const run = await work[kind](Number(count))
  const [begin, cpu] = [performance.now(), process.cpuUsage()]
  await run()
  const { user, system } = process.cpuUsage(cpu)
  console.log(JSON.stringify({ seconds: (performance.now() - begin) / 1000, cpu: (user + system) / 1e6 }))
}
process.exit(0)
