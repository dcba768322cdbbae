import { execFileSync, spawnSync } from 'node:child_process'
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import sharp from 'sharp'
import { CASES, caseKey } from './cases.ts'
import { emulate, emulateForeign, type Launch, type Outcome, totals } from './counters.ts'
import { builtFamilies, findDisassembler, inspect, type StaticKernel } from './images.ts'
import {
  caseRow,
  caseTable,
  kernelRow,
  kernelTable,
  markdown,
  type Peer,
  peerTable,
  picture,
  type Report,
  rooflineTable,
  sharedReads,
  shortfalls,
} from './report.ts'

const USAGE = `usage: npm run bench:kernels -- [--only WORD,...] [--sample N] [--write-docs] [--strict]
  --only        cases whose op or name holds one of the words
  --sample      blocks of a grid that run on the emulator, 32 by default; 0: all
  --write-docs  docs/kernels.md and docs/kernels.png
  --strict      exit with 1 where a kernel falls short of what is asked for
Needs CMake, ptxas on the PATH and an addon built with nvcc; nvdisasm from MGM_NVDISASM, the PATH, or Triton's wheel (MGM_BENCH_PYTHON).`

const root = fileURLToPath(new URL('../..', import.meta.url))
const PEERS = join(root, 'bench', 'kernels', 'triton')

interface PeerIndex {
  triton: string
  cases: { name: string; op: string; bytes: number; tensorFlops: number; ptx: string }[]
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      only: { type: 'string' },
      sample: { type: 'string', default: '32' },
      'write-docs': { type: 'boolean', default: false },
      strict: { type: 'boolean', default: false },
      help: { type: 'boolean', default: false },
    },
  })
  if (values.help) return console.log(USAGE)
  const sample = Number(values.sample)
  if (!Number.isInteger(sample) || sample < 0)
    throw new Error(`expected a number of blocks for --sample but received ${values.sample}`)
  const words = values.only?.split(',')
  const cases = CASES.filter(one => words === undefined || words.some(word => caseKey(one).includes(word)))
  if (cases.length === 0) throw new Error(`expected a word of a case for --only but received ${values.only}`)

  buildEmulator()
  const disassembler = await findDisassembler()
  if (!disassembler && values['write-docs'])
    throw new Error('expected nvdisasm for --write-docs: set MGM_NVDISASM')
  if (!disassembler) console.error('no nvdisasm: the columns of the inner loops stay empty')
  const inspection = { cache: join(root, 'build', 'kernels', 'inspected'), disassembler }
  console.error('compiled kernels …')
  const compiled: StaticKernel[] = []
  for (const source of builtFamilies(root)) compiled.push(...(await inspect(source, inspection)))

  const outcomes = new Map<string, Outcome>()
  const done = (outcome: Outcome) => {
    outcomes.set(outcome.key, outcome)
    console.error(`${outcome.key} …${outcome.error === undefined ? '' : ` ${outcome.error}`}`)
  }
  for (const sampled of [true, false])
    await emulate(cases.filter(one => one.sampled === sampled).map(caseKey), sampled ? sample : 0, done)

  const index = JSON.parse(readFileSync(join(PEERS, 'index.json'), 'utf8')) as PeerIndex
  const peers: Peer[] = []
  for (const { name, op, bytes, tensorFlops, ptx } of index.cases) {
    if (words && !cases.some(one => one.op === op || one.peers?.includes(name))) continue
    console.error(`Triton's ${name} …`)
    const [kernel] = await inspect({ family: name, ptx: join(PEERS, ptx) }, inspection)
    const launch = emulateForeign(PEERS, name, op === 'attention' ? 0 : sample)
    peers.push({
      name,
      op,
      work: { bytes, tensorFlops },
      kernel: kernelRow(kernel!, [launch]),
      launch,
      totals: totals([launch]),
    })
  }

  const rows = cases.map(one => caseRow(one, outcomes.get(caseKey(one))!, compiled))
  const launches = (kernel: string): Launch[] =>
    rows.flatMap(row => row.launches.filter(launch => launch.kernel === kernel))
  const report: Report = {
    date: new Date().toISOString(),
    commit: execFileSync('git', ['rev-parse', '--short', 'HEAD'], { cwd: root, encoding: 'utf8' }).trim(),
    triton: index.triton,
    sample,
    disassembler: disassembler !== undefined,
    kernels: compiled.map(kernel => kernelRow(kernel, launches(kernel.kernel))),
    cases: rows,
    peers,
  }

  console.log(`an emulated device and a compiler: counts, no times\n\n${peerTable(report)}\n`)
  console.log(`${kernelTable(report)}\n\n${caseTable(report)}\n`)
  console.log(
    `ESTIMATE, microseconds at the roofline (m: memory, t: tensor cores)\n${rooflineTable(report)}\n`,
  )
  const short = shortfalls(report)
  console.log(short.length === 0 ? 'nothing falls short' : `falls short:\n- ${short.join('\n- ')}`)
  const shared = sharedReads(report)
  if (shared.length > 0) console.log(`every block reads what all share:\n- ${shared.join('\n- ')}`)

  const results = join(root, 'bench', 'results')
  mkdirSync(results, { recursive: true })
  const file = join(results, `kernels-${report.date.replaceAll(':', '-').slice(0, 19)}`)
  writeFileSync(`${file}.json`, `${JSON.stringify({ ...report, shortfalls: short }, undefined, 2)}\n`)
  const image = await sharp(Buffer.from(picture(report)))
    .png({ palette: true })
    .toBuffer()
  writeFileSync(`${file}.png`, image)
  console.log(`written to ${file}.json and .png`)
  if (values['write-docs']) {
    writeFileSync(join(root, 'docs', 'kernels.md'), markdown(report))
    writeFileSync(join(root, 'docs', 'kernels.png'), image)
    console.log('written to docs/kernels.md and docs/kernels.png')
  }
  if (values.strict && short.length > 0) process.exitCode = 1
}

function buildEmulator(): void {
  for (const args of [
    ['-S', 'native/emulator', '-B', 'build/emulator'],
    ['--build', 'build/emulator', '-j2'],
  ]) {
    const { status, error, stderr } = spawnSync('cmake', args, { cwd: root, encoding: 'utf8' })
    if (status !== 0) throw new Error(`the emulator did not build: ${error?.message ?? stderr}`)
  }
}

await main()
