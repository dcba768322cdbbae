import { spawn } from 'node:child_process'
import { closeSync, mkdtempSync, openSync, rmSync, writeSync } from 'node:fs'
import { availableParallelism, cpus, loadavg, release, tmpdir, totalmem } from 'node:os'
import { join } from 'node:path'
import { performance } from 'node:perf_hooks'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import type { WeightDType, WeightEntry } from '../lib/checkpoint/tensor-map.ts'
import type { Device } from '../lib/device.ts'
import type { Weights } from '../lib/models/loader.ts'
import { native } from '../lib/native.ts'
import type { Tensor } from '../lib/tensor.ts'

export interface Statistics {
  median: number
  min: number
  max: number
  count: number
}

export function statistics(values: readonly number[]): Statistics {
  if (values.length === 0) throw new Error('expected at least one value for statistics but received none')
  const sorted = [...values].sort((a, b) => a - b)
  const middle = sorted.length >> 1
  const median = sorted.length % 2 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2
  return { median, min: sorted[0]!, max: sorted.at(-1)!, count: sorted.length }
}

export interface Lap {
  /** By the clock. */
  seconds: number
  /** Of all cores. */
  cpu: number
}

/** Something to time. A peer that runs elsewhere measures itself. */
export interface Subject {
  name: string
  run(): Promise<Lap | undefined>
}

/** What the machine can do at most; `sample` returns a rate in units a second. */
export interface Limit {
  name: string
  sample(): Promise<number>
}

export interface Timing {
  /** By the clock. */
  seconds: Statistics
  /** Seconds of all cores together. */
  cpu: Statistics
}

export interface Race {
  timings: Map<string, Timing>
  limits: Map<string, Statistics>
}

/**
 * Times all subjects in turn, round after round, with the limits sampled before each: whatever else the machine does
 * falls on all of them. Warm-up rounds are not counted. Ends early once `budget` seconds are spent and every subject
 * has been timed twice.
 */
export async function race(
  subjects: readonly Subject[],
  options: { rounds: number; warmup?: number; limits?: readonly Limit[]; budget?: number },
): Promise<Race> {
  const { rounds, warmup = 1, limits = [], budget = Infinity } = options
  const start = performance.now()
  const seconds = new Map(subjects.map(subject => [subject.name, [] as number[]]))
  const cpu = new Map(subjects.map(subject => [subject.name, [] as number[]]))
  const rates = new Map(limits.map(limit => [limit.name, [] as number[]]))
  for (let round = -warmup; round < rounds; round++) {
    if (round >= 2 && performance.now() - start > budget * 1000) break
    if (round >= 0) for (const limit of limits) rates.get(limit.name)!.push(await limit.sample())
    for (const subject of subjects) {
      const [own, here] = await lap(() => subject.run())
      const { seconds: wall, cpu: used } = own ?? here
      if (round < 0) continue
      seconds.get(subject.name)!.push(wall)
      cpu.get(subject.name)!.push(used)
    }
  }
  return {
    timings: new Map(
      subjects.map(({ name }) => [
        name,
        { seconds: statistics(seconds.get(name)!), cpu: statistics(cpu.get(name)!) },
      ]),
    ),
    limits: new Map(limits.map(({ name }) => [name, statistics(rates.get(name)!)])),
  }
}

/** Runs `body` once; the time is that of the whole process. */
export async function lap<T>(body: () => Promise<T>): Promise<[T, Lap]> {
  const before = process.cpuUsage()
  const begin = performance.now()
  const result = await body()
  const seconds = (performance.now() - begin) / 1000
  const used = process.cpuUsage(before)
  return [result, { seconds, cpu: (used.user + used.system) / 1e6 }]
}

export interface Settings {
  device: Device
  /** Fewer rounds and smaller sizes: to see that everything runs. */
  quick: boolean
  /** 'auto': those that are installed. 'all': a missing one is an error. */
  peers: 'none' | 'auto' | 'all'
  /** Progress and what was left out; the table goes elsewhere. */
  log(line: string): void
}

/** One line of the table. */
export interface Row {
  bench: string
  case: string
  timing: Timing
  /** Work done per second at the best time, e.g. 312.4 and 'GFLOP/s'. */
  rate?: { value: number; unit: string }
  /** What it is compared with. Ratios above one: we are faster, or beyond the limit. */
  against?: Comparison
  /** The ratio that is asked for. */
  target?: number
}

export interface Comparison {
  name: string
  /** Of the best times. */
  best: number
  median: number
  /** Of the least CPU times: what the best would be with the cores to ourselves, if no core ever waits. */
  cpu?: number
}

/** Work per second against a limit of `threads` cores. */
export function versusLimit(
  bench: string,
  name: string,
  timing: Timing,
  work: number,
  limit: { name: string; rates: Statistics; threads: number },
  unit: string,
  target?: number,
): Row {
  const { rates, threads } = limit
  return {
    bench,
    case: name,
    timing,
    rate: { value: work / timing.seconds.min / 1e9, unit },
    against: {
      name: `${limit.name} ${(rates.max / 1e9).toFixed(rates.max < 1e11 ? 1 : 0)} ${unit}`,
      best: work / timing.seconds.min / rates.max,
      median: work / timing.seconds.median / rates.median,
      cpu: (work / timing.cpu.min) * (threads / rates.max),
    },
    ...(target === undefined ? {} : { target }),
  }
}

/** How many times faster than a peer. */
export function versusPeer(
  bench: string,
  name: string,
  timing: Timing,
  peer: { name: string; timing: Timing },
  options: { work?: number; unit?: string; target?: number } = {},
): Row {
  const { work, unit = 'GFLOP/s', target } = options
  return {
    bench,
    case: name,
    timing,
    ...(work === undefined ? {} : { rate: { value: work / timing.seconds.min / 1e9, unit } }),
    against: {
      name: `${peer.name} ${time(peer.timing.seconds.min)}`,
      best: peer.timing.seconds.min / timing.seconds.min,
      median: peer.timing.seconds.median / timing.seconds.median,
      cpu: peer.timing.cpu.min / timing.cpu.min,
    },
    ...(target === undefined ? {} : { target }),
  }
}

export function time(seconds: number): string {
  if (seconds < 1e-3) return `${(seconds * 1e6).toFixed(1)} µs`
  if (seconds < 1) return `${(seconds * 1e3).toFixed(seconds < 0.1 ? 2 : 1)} ms`
  return `${seconds.toFixed(2)} s`
}

/** Whether a row reaches its target, if it has one. */
export function met(row: Row): boolean | undefined {
  return row.target === undefined ? undefined : (row.against?.best ?? 0) >= row.target
}

const HEAD = ['bench', 'case', 'best', 'median', 'max', 'n', 'cores', 'rate', 'against'] as const
const RATIOS = ['ratio', '(median)', '(by CPU time)', 'target', 'met'] as const

/** The rows as aligned text. `cores`: how many were busy with it, by CPU time; less than the threads on a shared machine. */
export function table(rows: readonly Row[]): string {
  const ratio = (value: number | undefined) => value?.toFixed(2) ?? ''
  const cells = rows.map(row => {
    const { seconds, cpu } = row.timing
    const reached = met(row)
    return [
      row.bench,
      row.case,
      time(seconds.min),
      time(seconds.median),
      time(seconds.max),
      String(seconds.count),
      (cpu.median / seconds.median).toFixed(1),
      row.rate ? `${row.rate.value.toFixed(1)} ${row.rate.unit}` : '',
      row.against?.name ?? '',
      ratio(row.against?.best),
      ratio(row.against?.median),
      ratio(row.against?.cpu),
      row.target === undefined ? '' : `≥ ${row.target}`,
      reached === undefined ? '' : reached ? 'yes' : 'NO',
    ]
  })
  const lines: string[][] = [[...HEAD, ...RATIOS], ...cells]
  const widths = lines[0]!.map((_, column) => Math.max(...lines.map(line => line[column]!.length)))
  const text = lines.map(line =>
    line
      .map((cell, column) => cell.padEnd(widths[column]!))
      .join('  ')
      .trimEnd(),
  )
  return [text[0], '-'.repeat(widths.reduce((a, b) => a + b + 2, -2)), ...text.slice(1)].join('\n')
}

/** The machine around a device. */
export function host() {
  return {
    date: new Date().toISOString(),
    cpu: cpus()[0]?.model.trim() ?? 'unknown',
    cores: cpus().length,
    usable: availableParallelism(),
    memoryGiB: Math.round(totalmem() / 2 ** 30),
    loadAverage: loadavg().map(load => Math.round(load * 100) / 100),
    system: `${process.platform} ${release()} ${process.arch}`,
    node: process.version,
  }
}

export function machine(device: Device) {
  return { ...host(), threads: device.threads, isa: device.isa }
}

/** FLOP a second of fused multiply-adds in registers, on the device's threads. */
export function fmaLimit(device: Device): Limit {
  return { name: 'FMA peak', sample: () => native().fmaPeak(device.threads, 0.15) }
}

/** Bytes a second read from main memory, on the device's threads. */
export function bandwidthLimit(device: Device): Limit {
  return { name: 'read bandwidth', sample: () => native().readBandwidth(device.threads, 0.25) }
}

const UNIT_BLOCK = 2 ** 22

/** Uniform in [-1, 1); the same numbers in every run. */
export function randomF32(length: number, seed = 1): Float32Array {
  let state = seed >>> 0 || 1
  return Float32Array.from({ length }, () => {
    state ^= state << 13
    state ^= state >>> 17
    state ^= state << 5
    return (state | 0) / 2 ** 31
  })
}

/** A tensor of random numbers in [-scale, scale). */
export function randomTensor(device: Device, shape: readonly number[], scale = 1): Tensor {
  const size = shape.reduce((a, b) => a * b, 1)
  const block = randomF32(Math.min(size, UNIT_BLOCK)).map(value => value * scale)
  if (size <= UNIT_BLOCK) return device.tensor(block, shape)
  const data = new Float32Array(size)
  for (let i = 0; i < size; i += UNIT_BLOCK) data.set(block.subarray(0, Math.min(UNIT_BLOCK, size - i)), i)
  return device.tensor(data, shape)
}

/** The bits of an f32 below 2 as f16, cut off; what would be subnormal becomes 0. */
function f16Bits(word: number): number {
  const exponent = ((word >>> 23) & 255) - 127 + 15
  return ((word >>> 16) & 0x8000) | (exponent > 0 ? (exponent << 10) | ((word >>> 13) & 1023) : 0)
}

/**
 * Weights of any name and shape, for models at real sizes without a checkpoint: every tensor lies somewhere in one
 * temporary file of random numbers in ±0.03, as large as the largest of them.
 */
export class RandomWeights implements Weights {
  readonly #folder = mkdtempSync(join(tmpdir(), 'mgm-bench-'))
  readonly #file = join(this.#folder, 'weights.bin')
  readonly #dtype: WeightDType
  readonly #bytes: number
  readonly #rows: number
  #taken = 0

  /** `largest`: elements of the largest tensor. `rows` stands in for dimensions that the model leaves open. */
  constructor(dtype: WeightDType, largest: number, rows = 0) {
    this.#dtype = dtype
    this.#rows = rows
    const numbers = randomF32(UNIT_BLOCK).map(value => value * 0.03)
    const block = dtype === 'f32' ? numbers : new Uint16Array(numbers.length)
    const bits = new Uint32Array(numbers.buffer)
    if (dtype === 'bf16') for (const [i, word] of bits.entries()) block[i] = word >>> 16
    if (dtype === 'f16') for (const [i, word] of bits.entries()) block[i] = f16Bits(word)
    const chunk = new Uint8Array(block.buffer, block.byteOffset, block.byteLength)
    const descriptor = openSync(this.#file, 'w')
    const wanted = largest * (dtype === 'f32' ? 4 : 2)
    let written = 0
    while (written < wanted) written += writeSync(descriptor, chunk)
    closeSync(descriptor)
    this.#bytes = written
  }

  take(name: string, shape: readonly (number | null)[]): WeightEntry {
    const known = shape.map(n => n ?? this.#rows)
    const byteLength = known.reduce((a, b) => a * b, 1) * (this.#dtype === 'f32' ? 4 : 2)
    const room = this.#bytes - byteLength
    if (room < 0)
      throw new Error(`expected at most ${this.#bytes} bytes for "${name}" but received [${known}]`)
    const offset = room < 4096 ? 0 : (this.#taken++ * 4096) % (room - (room % 4096))
    return { name, dtype: this.#dtype, shape: known, offset, byteLength, file: this.#file }
  }

  [Symbol.dispose](): void {
    rmSync(this.#folder, { recursive: true, force: true })
  }
}

/** Throws if a result that was timed is not made of finite numbers: speed of nonsense is not worth reporting. */
export async function assertFinite(name: string, tensor: Tensor): Promise<void> {
  const values = await tensor.readF32()
  const bad = values.findIndex(value => !Number.isFinite(value))
  if (bad >= 0) throw new Error(`expected finite results for ${name} but received ${values[bad]} at ${bad}`)
}

/** The interpreter for Python peers. */
export const PYTHON = process.env.MGM_BENCH_PYTHON ?? 'python3'
/** Where peers keep what they need between runs: exported ONNX graphs, GGUF files. */
export const CACHE = process.env.MGM_BENCH_CACHE ?? join(tmpdir(), 'mgm-bench-cache')

/**
 * A peer as a child process: it gets ready, says so in a line of JSON, and then answers every line on its standard
 * input with a `Lap`. So ours and theirs can take turns.
 */
export class Peer implements Subject {
  readonly name: string
  readonly #child: ReturnType<typeof spawn>
  readonly #lines: AsyncIterator<string>
  readonly #errors: string[]

  private constructor(
    name: string,
    child: ReturnType<typeof spawn>,
    lines: AsyncIterator<string>,
    errors: string[],
  ) {
    this.name = name
    this.#child = child
    this.#lines = lines
    this.#errors = errors
  }

  /** Undefined, after saying why, if the peer is not wanted or not installed; throws if it must be there and is not. */
  static async start(
    settings: Settings,
    script: string,
    args: readonly string[],
    environment: Record<string, string> = {},
  ): Promise<Peer | undefined> {
    if (settings.peers === 'none') return undefined
    const path = fileURLToPath(new URL(`./peers/${script}`, import.meta.url))
    const command = script.endsWith('.py') ? PYTHON : process.execPath
    const child = spawn(command, [path, ...args], {
      stdio: ['pipe', 'pipe', 'pipe'],
      env: { ...process.env, ...environment },
    })
    const errors: string[] = []
    child.once('error', error => errors.push(error.message))
    child.stdin.on('error', () => {}) // an early death shows as the end of its output
    createInterface(child.stderr).on('line', line => errors.push(line))
    const lines = createInterface(child.stdout)[Symbol.asyncIterator]()
    const peer = new Peer('', child, lines, errors)
    try {
      const { name } = (await peer.#answer()) as { name: string }
      return new Peer(name, child, lines, errors)
    } catch (error) {
      peer.stop()
      const reason = `${script} ${args.join(' ')}: ${error instanceof Error ? error.message : error}`
      if (settings.peers === 'all') throw new Error(`a peer is missing: ${reason}`)
      settings.log(`  left out: ${reason}`)
      return undefined
    }
  }

  async #answer(): Promise<unknown> {
    for (;;) {
      const { value, done } = await this.#lines.next()
      if (done)
        throw new Error(`${this.name} ended: ${this.#errors.slice(-12).join(' | ') || 'without a word'}`)
      if (value.startsWith('{')) return JSON.parse(value)
    }
  }

  async run(request = 'run'): Promise<Lap> {
    this.#child.stdin!.write(`${request}\n`)
    return (await this.#answer()) as Lap
  }

  stop(): void {
    this.#child.stdin?.end()
    this.#child.kill()
  }
}
