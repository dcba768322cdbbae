// Times the cases on a GPU and prints a line of JSON for each: a child process of `npm run gpu:verify`. With --survey it only
// says what GPU there is. On the emulator every case runs, and no time is given.
import { parseArgs } from 'node:util'
import { Device } from '../../lib/device.ts'
import { type CudaSurvey, native } from '../../lib/native.ts'
import * as ops from '../../lib/ops.ts'
import { scope } from '../../lib/tensor.ts'
import { type Statistics, statistics } from '../harness.ts'
import { CASES, caseKey, type KernelCase, Make } from './cases.ts'

/** Seconds of one call; null on an emulated device. */
export type Timed =
  | { key: string; seconds: Statistics | null; cold: boolean }
  | { key: string; error: string }

/** What this process prints, a line each. */
export type Line = { survey: CudaSurvey } | { limit: 'copy' | 'gemm'; rate: number | null } | { timed: Timed }

/** Calls in one graph: launches then follow each other as in a captured decode step. */
const REPEATS = 32
const ROUNDS = 9
/** Operands that are used in turn should exceed any L2 cache. */
const COLD_BYTES = 192e6
const LIMIT_SIZE = 8192

function say(line: Line): void {
  console.log(JSON.stringify(line))
}

/** Seconds of one call of what `prepare` returns. */
async function measure(
  device: Device,
  { work, prepare }: Pick<KernelCase, 'work' | 'prepare'>,
): Promise<{ seconds: Statistics; cold: boolean }> {
  const copies = Math.min(REPEATS, Math.ceil(COLD_BYTES / work.bytes))
  // The graph holds the operands' memory; the scope frees it after the measurement.
  const operands: (() => unknown)[] = []
  const graph = scope(() => {
    for (let i = 0; i < copies; i++) operands.push(prepare(new Make(device)))
    return device.capture(() => {
      for (let i = 0; i < REPEATS; i++) scope(() => void operands[i % copies]!())
    })
  })
  try {
    const lap = async (replays: number) => {
      const begin = performance.now()
      for (let i = 0; i < replays; i++) graph.replay()
      await device.synchronize()
      return (performance.now() - begin) / 1000
    }
    await lap(2)
    const replays = Math.max(1, Math.floor(0.05 / (await lap(1))))
    const rounds: number[] = []
    for (let round = 0; round < ROUNDS; round++) rounds.push((await lap(replays)) / replays / REPEATS)
    return { seconds: statistics(rounds), cold: copies * work.bytes >= COLD_BYTES }
  } finally {
    graph.dispose()
    device.trim()
  }
}

async function main(): Promise<void> {
  const { values, positionals } = parseArgs({
    options: { survey: { type: 'boolean', default: false } },
    allowPositionals: true,
  })
  const survey = native().cudaSurvey()
  say({ survey })
  if (values.survey || survey.error !== null) return
  const device = Device.open('cuda')
  const real = <T>(value: T): T | null => (survey.emulated ? null : value)

  const n = LIMIT_SIZE
  const copy = {
    work: { bytes: 2 * 4 * n * n, tensorFlops: 0 },
    prepare: (make: Make) => {
      const x = make.f32([n, n])
      return () => ops.cast(x, 'f32')
    },
  }
  say({ limit: 'copy', rate: real(copy.work.bytes / (await measure(device, copy)).seconds.min) })
  const gemm = {
    work: { bytes: 3 * 2 * n * n, tensorFlops: 2 * n ** 3 },
    prepare: (make: Make) => {
      const [x, w] = [make.a([n, n]), make.weight(n, n)]
      return () => ops.linear(x, w)
    },
  }
  say({ limit: 'gemm', rate: real(gemm.work.tensorFlops / (await measure(device, gemm)).seconds.min) })

  for (const kernelCase of CASES.filter(one => positionals.includes(caseKey(one)))) {
    const key = caseKey(kernelCase)
    try {
      const { seconds, cold } = await measure(device, kernelCase)
      say({ timed: { key, seconds: real(seconds), cold } })
    } catch (error) {
      say({ timed: { key, error: error instanceof Error ? error.message : String(error) } })
    }
  }
  await device.close()
}

await main()
