// `npm run gpu:verify`: what only a real GPU can show. Builds, runs the CUDA tests on the system's driver, times the cases,
// and writes a dated report.
import { execFileSync, spawn, spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import type { CudaSurvey } from '../../lib/native.ts'
import { host, PYTHON, statistics, time } from '../harness.ts'
import { CASES, caseKey, type KernelCase } from './cases.ts'
import { GPUS } from './gpus.ts'
import { table } from './report.ts'
import type { Line, Timed } from './timings.ts'

const USAGE = `usage: npm run gpu:verify -- [--only WORD,...] [--skip-build] [--skip-tests] [--rehearse]
  --only      times cases whose op or name holds one of the words
  --rehearse  runs every step on the emulated GPU, to see that the steps work; gives no times and writes no report under bench/reports
Ends with 0 only if a real GPU was there, every test passed on it and every case was timed.`

const root = fileURLToPath(new URL('../..', import.meta.url))
const EMULATOR = join(root, 'build', 'emulator', 'libcuda.so.1')

/** Why this machine cannot answer: printed alone, without a stack. */
class Refusal extends Error {}

export interface Tests {
  passed: number
  failed: number
  skipped: number
  failures: string[]
}

export interface Verification {
  date: string
  commit: string
  /** Uncommitted changes. */
  dirty: boolean
  rehearsal: boolean
  machine: ReturnType<typeof host>
  survey: CudaSurvey
  /** What nvidia-smi says of clocks and temperature, before and after. */
  smi: (string | null)[]
  tests: Tests | null
  limits: { copy: number | null; gemm: number | null }
  timed: Timed[]
  torch: {
    about: string
    limits: { copy: number; gemm: number } | null
    timed: Record<string, number[] | string>
  } | null
}

async function main(): Promise<number> {
  const { values } = parseArgs({
    options: {
      only: { type: 'string' },
      'skip-build': { type: 'boolean', default: false },
      'skip-tests': { type: 'boolean', default: false },
      rehearse: { type: 'boolean', default: false },
      help: { type: 'boolean', default: false },
    },
  })
  if (values.help) {
    console.log(USAGE)
    return 0
  }
  const words = values.only?.split(',')
  const cases = CASES.filter(one => words === undefined || words.some(word => caseKey(one).includes(word)))
  if (cases.length === 0)
    throw new Refusal(`expected a word of a case for --only but received ${values.only}`)

  if (!values.rehearse && !process.env.MGM_LIBCUDA && !hasDevice())
    throw new Refusal('there is no NVIDIA GPU on this machine: nothing was verified')
  if (!values['skip-build']) step('build', process.execPath, ['scripts/build-native.mjs'])
  if (values.rehearse) {
    step('emulator', 'cmake', ['-S', 'native/emulator', '-B', 'build/emulator'])
    step('emulator', 'cmake', ['--build', 'build/emulator', '-j2'])
  }
  const survey = await findGpu(values.rehearse)
  console.log(
    `${survey.emulated ? 'EMULATED: ' : ''}${survey.devices[0]!.name}, sm_${survey.devices[0]!.capability}, ` +
      `driver for CUDA ${cudaVersion(survey)}, ${survey.library}, runs ${survey.devices[0]!.image}`,
  )

  const verification: Verification = {
    date: new Date().toISOString(),
    commit: git('rev-parse', '--short', 'HEAD'),
    dirty: git('status', '--porcelain', '--untracked-files=no') !== '',
    rehearsal: survey.emulated,
    machine: host(),
    survey,
    smi: [smi(survey)],
    tests: values['skip-tests'] ? null : test(survey),
    limits: { copy: null, gemm: null },
    timed: [],
    torch: null,
  }
  await timings(survey, cases, verification)
  verification.torch = survey.emulated ? null : await torch(cases)
  verification.smi.push(smi(survey))

  const folder = join(root, 'bench', survey.emulated ? 'results' : 'reports')
  mkdirSync(folder, { recursive: true })
  const name = survey.emulated
    ? 'rehearsal'
    : `${verification.date.slice(0, 10)}-${slug(survey.devices[0]!.name)}`
  writeFileSync(join(folder, `${name}.json`), `${JSON.stringify(verification, undefined, 2)}\n`)
  const text = markdown(verification)
  writeFileSync(join(folder, `${name}.md`), text)
  console.log(`\n${text}\nwritten to ${join(folder, name)}.md and .json`)
  const good =
    verification.tests?.failed === 0 &&
    verification.tests.passed > 0 &&
    verification.timed.every(one => 'seconds' in one)
  if (survey.emulated) console.log('an emulated device: nothing was verified, and no time is claimed')
  return good && !survey.emulated ? 0 : 1
}

/** Whether it is worth building: the device files of the driver, of WSL too. */
function hasDevice(): boolean {
  return ['/dev/nvidiactl', '/dev/nvidia0', '/dev/nvhost-ctrl', '/dev/dxg'].some(existsSync)
}

async function findGpu(rehearse: boolean): Promise<CudaSurvey> {
  const library = rehearse ? { MGM_LIBCUDA: EMULATOR } : {}
  let survey: CudaSurvey | undefined
  await child(['--survey'], library, line => {
    if ('survey' in line) survey = line.survey
  })
  if (!survey) throw new Refusal('the addon did not load: see above')
  if (survey.error !== null || survey.devices.length === 0)
    throw new Refusal(
      `there is no usable GPU: ${survey.error ?? 'the driver found none'}. Nothing was verified`,
    )
  if (survey.emulated && !rehearse)
    throw new Refusal(
      `${survey.library} is the emulator: it shows no times and verifies nothing. Unset MGM_LIBCUDA, or rehearse with --rehearse`,
    )
  return survey
}

function step(name: string, command: string, args: string[]): void {
  console.log(`${name} …`)
  const { status, error } = spawnSync(command, args, { cwd: root, stdio: ['ignore', 'ignore', 'inherit'] })
  if (status !== 0) throw new Refusal(`${name} failed${error ? `: ${error.message}` : ''}`)
}

function git(...args: string[]): string {
  try {
    return execFileSync('git', args, { cwd: root, encoding: 'utf8' }).trim()
  } catch {
    return 'unknown'
  }
}

function smi(survey: CudaSurvey): string | null {
  if (survey.emulated) return null
  const fields =
    'name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,clocks_throttle_reasons.active'
  const { status, stdout } = spawnSync(
    'nvidia-smi',
    ['-i', '0', `--query-gpu=${fields}`, '--format=csv,noheader'],
    {
      encoding: 'utf8',
    },
  )
  return status === 0 ? stdout.trim() : null
}

/** 12040 is 12.4. */
function cudaVersion({ driverVersion }: CudaSurvey): string {
  return `${Math.floor(driverVersion / 1000)}.${(driverVersion % 1000) / 10}`
}

/** The CUDA tests against the driver that was found, not the emulator of this checkout. */
function test(survey: CudaSurvey): Tests {
  console.log('tests …')
  const folder = mkdtempSync(join(tmpdir(), 'mgm-verify-'))
  const file = join(folder, 'tests.json')
  // One schedule: on a GPU the others change nothing.
  const projects = ['--project', 'main', '--project', 'cuda, schedule 1']
  const args = [
    'node_modules/vitest/vitest.mjs',
    'run',
    ...projects,
    'test/cuda',
    '--reporter=json',
    `--outputFile=${file}`,
  ]
  try {
    const { stderr } = spawnSync(process.execPath, args, {
      cwd: root,
      env: { ...process.env, MGM_LIBCUDA: survey.library! },
      encoding: 'utf8',
      maxBuffer: 1 << 28,
    })
    if (!existsSync(file)) throw new Refusal(`the tests did not run:\n${stderr.slice(-4000)}`)
    return summarize(JSON.parse(readFileSync(file, 'utf8')) as VitestResult)
  } finally {
    rmSync(folder, { recursive: true })
  }
}

/** What this needs of vitest's JSON report. */
export interface VitestResult {
  testResults: {
    name: string
    status: string
    message?: string
    assertionResults: { fullName: string; status: string; failureMessages?: string[] | null }[]
  }[]
}

export function summarize(result: VitestResult): Tests {
  const tests: Tests = { passed: 0, failed: 0, skipped: 0, failures: [] }
  for (const file of result.testResults) {
    for (const one of file.assertionResults) {
      if (one.status === 'passed') tests.passed++
      else if (one.status === 'failed') {
        tests.failed++
        tests.failures.push(`${one.fullName}: ${one.failureMessages?.[0]?.split('\n')[0] ?? ''}`)
      } else tests.skipped++
    }
    // A file that fails before its first test has none to count.
    if (file.status === 'failed' && !file.assertionResults.some(one => one.status === 'failed')) {
      tests.failed++
      tests.failures.push(`${file.name}: ${file.message?.split('\n')[0] ?? ''}`)
    }
  }
  return tests
}

/** Runs timings.ts; its standard error goes through. */
async function child(
  args: string[],
  env: Record<string, string>,
  each: (line: Line) => void,
): Promise<number> {
  const script = fileURLToPath(new URL('./timings.ts', import.meta.url))
  const process_ = spawn(process.execPath, ['--import', 'tsx', script, ...args], {
    cwd: root,
    env: { ...process.env, ...env },
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  const ended = new Promise<number>(resolve => process_.once('close', code => resolve(code ?? 1)))
  for await (const line of createInterface(process_.stdout))
    if (line.startsWith('{')) each(JSON.parse(line) as Line)
  return ended
}

async function timings(survey: CudaSurvey, cases: readonly KernelCase[], into: Verification): Promise<void> {
  console.log('timings …')
  // A rehearsal runs one block of each grid: it shows that the steps work.
  const env: Record<string, string> = survey.emulated
    ? {
        MGM_EMULATOR_SAMPLE: '1',
        MGM_EMULATOR_CHECKS: '0',
        MGM_EMULATOR_DEVICES: '80:8G',
        MGM_LIBCUDA: EMULATOR,
      }
    : { MGM_LIBCUDA: survey.library! }
  let left = cases.map(caseKey)
  while (left.length > 0) {
    const before = left.length
    const status = await child(left, env, line => {
      if ('limit' in line) into.limits[line.limit] = line.rate
      if (!('timed' in line)) return
      into.timed.push(line.timed)
      left = left.filter(key => key !== line.timed.key)
      console.log(`${line.timed.key} … ${'error' in line.timed ? line.timed.error : seconds(line.timed)}`)
    })
    // The process may die of one case; the others are still worth timing.
    if (left.length === before) {
      into.timed.push({ key: left[0]!, error: `the process ended with status ${status}` })
      left = left.slice(1)
    }
  }
}

function seconds(timed: Extract<Timed, { cold: boolean }>): string {
  return timed.seconds === null ? 'emulated' : time(timed.seconds.median)
}

/** PyTorch's times for the cases that it has; null, after saying why, where it is not. */
async function torch(cases: readonly KernelCase[]): Promise<Verification['torch']> {
  console.log('PyTorch …')
  const script = join(root, 'bench', 'peers', 'torch_cuda.py')
  const python = spawn(PYTHON, [script], { stdio: ['pipe', 'pipe', 'pipe'] })
  const errors: string[] = []
  python.once('error', error => errors.push(error.message))
  python.stdin.on('error', () => {}) // an early death shows as the end of its output
  createInterface(python.stderr).on('line', line => errors.push(line))
  const wanted = cases.flatMap(one => (one.torch ? [{ key: caseKey(one), ...one.torch }] : []))
  python.stdin.end(JSON.stringify({ cases: wanted }))
  let result: Verification['torch'] = null
  for await (const line of createInterface(python.stdout)) {
    if (!line.startsWith('{')) continue
    const said = JSON.parse(line)
    if ('about' in said) result = { about: said.about, limits: null, timed: {} }
    else if (result && 'limits' in said) result.limits = said.limits
    else if (result && 'key' in said) result.timed[said.key] = said.seconds ?? String(said.error)
  }
  if (!result) console.log(`left out: ${errors.slice(-3).join(' | ') || 'it said nothing'}`)
  return result
}

export function slug(name: string): string {
  return name
    .toLowerCase()
    .replace(/[^a-z0-9]+/g, '-')
    .replace(/^-|-$/g, '')
}

const rate = (value: number | null | undefined, unit: string, per: number) =>
  value == null ? '–' : `${(value / per).toFixed(1)} ${unit}`

export function markdown(v: Verification): string {
  const device = v.survey.devices[0]!
  const best = (ours: number | null, theirs: number | undefined) =>
    ours === null ? null : Math.max(ours, theirs ?? 0)
  const copy = best(v.limits.copy, v.torch?.limits?.copy)
  const gemm = best(v.limits.gemm, v.torch?.limits?.gemm)
  const rows = v.timed.map(one => {
    const work = CASES.find(other => caseKey(other) === one.key)!.work
    if ('error' in one) return [one.key, one.error, '', '', '', '', '', '']
    if (one.seconds === null) return [one.key, 'emulated', '', '', '', '', '', '']
    const { median, min } = one.seconds
    const limit = copy === null || gemm === null ? 0 : Math.max(work.bytes / copy, work.tensorFlops / gemm)
    const theirs = v.torch?.timed[one.key]
    const torchMedian = Array.isArray(theirs) ? statistics(theirs).median : undefined
    return [
      `${one.key}${one.cold ? '' : ' (in L2)'}`,
      time(median),
      time(min),
      rate(work.bytes / median, 'GB/s', 1e9),
      work.tensorFlops === 0 ? '' : rate(work.tensorFlops / median, 'TFLOP/s', 1e12),
      limit === 0 ? '' : `${((limit / median) * 100).toFixed(0)} %`,
      torchMedian === undefined ? (typeof theirs === 'string' ? theirs : '') : time(torchMedian),
      torchMedian === undefined ? '' : (torchMedian / median).toFixed(2),
    ]
  })
  const known = GPUS.find(gpu => new RegExp(`\\b${/^(RTX )?\w+/.exec(gpu.name)![0]}\\b`).test(device.name))
  const { tests } = v
  return `# ${v.rehearsal ? 'REHEARSAL on an emulated device: no times, nothing verified' : `${device.name}, ${v.date.slice(0, 10)}`}

| | |
| --- | --- |
| GPU | ${device.name}, sm_${device.capability}, ${(device.memory / 2 ** 30).toFixed(0)} GiB; runs ${device.image} |
| driver | CUDA ${cudaVersion(v.survey)}, ${v.survey.library} |
| nvidia-smi before | ${v.smi[0] ?? '–'} |
| nvidia-smi after | ${v.smi[1] ?? '–'} |
| commit | ${v.commit}${v.dirty ? ', with uncommitted changes' : ''} |
| machine | ${v.machine.cpu}, ${v.machine.cores} cores, ${v.machine.system}, Node ${v.machine.node} |
| peer | ${v.torch?.about ?? (v.rehearsal ? 'not asked' : 'none: PyTorch with CUDA was not found')} |
| copy | ours ${rate(v.limits.copy, 'GB/s', 1e9)}, PyTorch ${rate(v.torch?.limits?.copy, 'GB/s', 1e9)}${known ? `; published of ${known.name}: ${rate(known.memory, 'GB/s', 1e9)}` : ''} |
| GEMM 8192 | ours ${rate(v.limits.gemm, 'TFLOP/s', 1e12)}, PyTorch ${rate(v.torch?.limits?.gemm, 'TFLOP/s', 1e12)}${known ? `; published of ${known.name}: ${rate(known.tensor, 'TFLOP/s', 1e12)}` : ''} |

## Tests on this device

${
  tests === null
    ? 'Not run.'
    : `${tests.passed} passed, ${tests.failed} failed, ${tests.skipped} skipped.${tests.failures.map(text => `\n- ${text}`).join('')}`
}

## Times

Of one call in a CUDA graph of 32, operands in turn so that they come from memory where 32 sets exceed 192 MB (else "in L2"); median and best of
9 rounds by the host's clock. _Of the limit_: the least bytes at the best measured copy rate, or the least FLOP at the best measured GEMM rate,
whichever takes longer, over the median. PyTorch: the same operation in eager mode without our epilogues, in a CUDA graph too; above 1 we are
faster.

${table(['case', 'median', 'best', 'bytes', 'FLOP', 'of the limit', 'PyTorch', 'ratio'], rows, 1)}
`
}

// Imported by its test, run by npm.
if (process.argv[1] === fileURLToPath(import.meta.url))
  try {
    process.exitCode = await main()
  } catch (error) {
    if (!(error instanceof Refusal)) throw error
    console.error(`gpu:verify: ${error.message}`)
    process.exitCode = 1
  }
