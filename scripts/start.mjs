// `npm start`: builds what is missing, then asks the tiny checkpoint of the tests about its pictures.
// usage: npm start [-- <checkpoint> [picture ...]]
import { spawnSync } from 'node:child_process'
import { existsSync, readdirSync, statSync } from 'node:fs'
import { basename, dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = join(dirname(fileURLToPath(import.meta.url)), '..')
const tiny = join(root, 'test', 'fixtures', 'mgm-gemma-tiny')

function newest(folder) {
  return Math.max(
    ...readdirSync(folder, { recursive: true, withFileTypes: true })
      .filter(entry => entry.isFile())
      .map(entry => statSync(join(entry.parentPath, entry.name)).mtimeMs),
  )
}

/** Runs an npm script if its output is missing or older than its sources. */
function build(script, output, sources) {
  const changed = Math.max(...sources.map(source => newest(join(root, source))))
  if (existsSync(join(root, output)) && statSync(join(root, output)).mtimeMs >= changed) return
  console.log(`building (npm run ${script}) ...`)
  const { status } = spawnSync('npm', ['run', '--silent', script], { cwd: root, stdio: 'inherit' })
  if (status !== 0) process.exit(status ?? 1)
}

if (!existsSync(join(root, 'node_modules', 'sharp'))) {
  console.error('the dependencies are not installed: run `npm ci` first')
  process.exit(1)
}
build('build:native', 'build/native/Release/mgm.node', ['native'])
build('build:ts', 'dist/index.js', ['lib'])

const [checkpoint = join(tiny, 'MGM-2B'), ...given] = process.argv.slice(2)
const isTiny = checkpoint.startsWith(join(root, 'test', 'fixtures'))
const images =
  given.length > 0
    ? given
    : readdirSync(join(tiny, 'images'))
        .filter(name => name.endsWith('.png'))
        .sort()
        .map(name => join(tiny, 'images', name))

const { MiniGemini } = await import('../dist/index.js')

const ms = value => `${value.toFixed(1)} ms`
const started = performance.now()
const mgm = await MiniGemini.load(checkpoint, { device: 'auto' })
const shown = checkpoint.startsWith(root) ? relative(root, checkpoint) : checkpoint
console.log(`loaded ${shown} in ${ms(performance.now() - started)} on ${mgm.device}`)
for (const note of mgm.notes) console.log(`note: ${note}`)
if (isTiny)
  console.log(
    'NOTE: the weights of this checkpoint are random, so the text of its answers is noise. It shows that the whole path runs.',
  )

for (const image of images) {
  const question = 'What is in this picture?'
  console.log(`\n${basename(image)}: ${question}`)
  const { text, usage, timings, finishReason } = await mgm.chat({
    messages: [
      {
        role: 'user',
        content: [
          { type: 'image', image },
          { type: 'text', text: question },
        ],
      },
    ],
    maxTokens: 32,
  })
  console.log(`  answer    ${JSON.stringify(text)} (ended by ${finishReason})`)
  console.log(
    `  tokens    ${usage.promptTokens} in the prompt, ${usage.imageTokens} of them image; ${usage.completionTokens} generated`,
  )
  console.log(`  speed     ${timings.tokensPerSecond.toFixed(1)} tokens/s`)
  console.log(
    `  stages    queue ${ms(timings.queueMs)}, image ${ms(timings.imageMs)}, vision ${ms(timings.visionMs)}, ` +
      `prefill ${ms(timings.prefillMs)}, decode ${ms(timings.decodeMs)}; ` +
      `first token after ${ms(timings.timeToFirstTokenMs)}, total ${ms(timings.totalMs)}`,
  )
}
await mgm.close()
