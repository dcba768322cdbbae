// `npm start`: builds what is missing, loads the demo model, serves its page, and prints one worked example.
// usage: npm start [-- [--port N] [--once] [<checkpoint> [picture ...]]]
import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, readdirSync, statSync, writeFileSync } from 'node:fs'
import { basename, dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'

const USAGE = `usage: npm start [-- [--port N] [--once] [<checkpoint> [picture ...]]]
  --port      of the web page; default: any that is free
  --once      prints the example and ends, without the page
  checkpoint  folder of an MGM checkpoint or its hub id, instead of the demo model; it is asked about the pictures`

const root = join(dirname(fileURLToPath(import.meta.url)), '..')
const started = performance.now()

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

const { values, positionals } = parseArgs({
  options: {
    port: { type: 'string', default: '0' },
    once: { type: 'boolean', default: false },
    help: { type: 'boolean', default: false },
  },
  allowPositionals: true,
})
if (values.help) {
  console.log(USAGE)
  process.exit()
}
if (!existsSync(join(root, 'node_modules', 'sharp'))) {
  console.error('the dependencies are not installed: run `npm ci` first')
  process.exit(1)
}
build('build:native', 'build/native/Release/mgm.node', ['native'])
build('build:ts', 'dist/index.js', ['lib'])

const { MiniGemini } = await import('../dist/index.js')
const [checkpoint, ...pictures] = positionals

const seconds = since => `${((performance.now() - since) / 1000).toFixed(1)} s`
const mgm = await MiniGemini.load(checkpoint, { device: 'auto' })
console.log(`loaded ${checkpoint ?? 'the demo model'} on ${mgm.device}, ${seconds(started)} after the start`)
for (const note of mgm.notes) console.log(`note: ${note}`)

let server
if (!values.once) {
  const { serve } = await import('../dist/web/index.js')
  const about = checkpoint && `This is ${basename(checkpoint)}.`
  server = await serve(mgm, { port: Number(values.port), about })
  console.log(`\n  page: ${server.url}   (Ctrl-C ends)\n`)
}

if (checkpoint) for (const picture of pictures) await converse([picture], ['What is in this picture?'])
else await example()

if (server) {
  process.once('SIGINT', async () => {
    await server.close()
    await mgm.close()
  })
} else await mgm.close()

/** A picture that the demo model was not trained on, questions about it, and a drawing. */
async function example() {
  const { renderPng } = await import('../dist/demo/render.js')
  const { generateLesson } = await import('../dist/demo/tasks.js')
  const { sceneSeed } = await import('../dist/demo/world.js')
  const folder = join(root, 'build', 'demo')
  mkdirSync(folder, { recursive: true })
  const file = name => join(folder, name)

  // The first scene of the test split that has a sign and a question about directions.
  const asks = ({ examples }, task) =>
    examples.find(({ turns }) => turns.length === 1 && turns[0].task === task)
  let lesson
  for (let i = 0; !lesson; i++) {
    const candidate = generateLesson(sceneSeed('test', i))
    if (candidate.scenes[0].signs.length > 0 && asks(candidate, 'relation')) lesson = candidate
  }
  writeFileSync(file('picture.png'), await renderPng(lesson.scenes[0], 256))
  await converse(
    [file('picture.png')],
    ['caption', 'sign', 'relation', 'yesno'].flatMap(task => asks(lesson, task)?.turns[0].question ?? []),
  )

  const question = asks(lesson, 'draw').turns[0].question
  const before = performance.now()
  const { text, prompt, images } = await mgm.generate({
    messages: [{ role: 'user', content: question }],
    steps: 16,
    guidance: 4,
    seed: 1,
  })
  console.log(`  > ${question}\n    ${text}`)
  if (prompt === null) return
  writeFileSync(file('drawing.png'), images[0].data)
  const { width, height } = images[0]
  console.log(`    ${relative(root, file('drawing.png'))}, ${width} x ${height}, after ${seconds(before)}`)
}

/** Asks one question after the other about pictures. */
async function converse(images, questions) {
  console.log(images.map(image => (image.startsWith(root) ? relative(root, image) : image)).join(', '))
  const messages = []
  for (const question of questions) {
    const content = images.map(image => ({ type: 'image', image }))
    messages.push({
      role: 'user',
      content: messages.length > 0 ? question : [...content, { type: 'text', text: question }],
    })
    const { text, timings } = await mgm.chat({ messages, maxTokens: 96 })
    console.log(
      `  > ${question}\n    ${text}\n    (first token after ${timings.timeToFirstTokenMs.toFixed(0)} ms, ` +
        `${timings.tokensPerSecond.toFixed(0)} tokens/s; ${seconds(started)} after the start)`,
    )
    messages.push({ role: 'assistant', content: text })
  }
}
