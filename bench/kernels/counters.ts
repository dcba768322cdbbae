// What the emulator counted of launches, and what follows from it. Counts are exact for the code and the addresses; they
// are no times.
import { spawn, spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'

/** A launch, as MGM_EMULATOR_LAUNCHES spells it. Counts are of the blocks that ran. */
export interface Launch {
  kernel: string
  grid: [number, number, number]
  block: [number, number, number]
  dynamicShared: number
  error: number
  blocksRun: number
  warpInstructions: number
  byClass: Record<string, number>
  tensorFlops: number
  globalSectorsRequested: number
  globalSectorsTouched: number
  sharedAccesses: number
  sharedConflictCycles: number
  /** Of those, how many at each line of the PTX that has any. */
  conflictsByLine: Record<string, number>
  barriers: number
}

/** A case on the emulator: its launches in order, or why there are none. */
export interface Outcome {
  key: string
  launches: Launch[]
  error?: string
  /** The op has no kernel for it yet. */
  unsupported?: boolean
  seconds?: number
}

export function blocksOf({ grid }: Launch): number {
  return grid[0] * grid[1] * grid[2]
}
export function threadsOf({ block }: Launch): number {
  return block[0] * block[1] * block[2]
}

/** Counts of whole grids: those of a sample times how many such samples the grid has. */
export interface Totals {
  warpInstructions: number
  byClass: Record<string, number>
  tensorFlops: number
  sectorsRequested: number
  sectorsTouched: number
  sharedAccesses: number
  conflictCycles: number
}

export function totals(launches: readonly Launch[]): Totals {
  const sum: Totals = {
    warpInstructions: 0,
    byClass: {},
    tensorFlops: 0,
    sectorsRequested: 0,
    sectorsTouched: 0,
    sharedAccesses: 0,
    conflictCycles: 0,
  }
  for (const launch of launches) {
    const times = blocksOf(launch) / launch.blocksRun
    sum.warpInstructions += times * launch.warpInstructions
    sum.tensorFlops += times * launch.tensorFlops
    sum.sectorsRequested += times * launch.globalSectorsRequested
    sum.sectorsTouched += times * launch.globalSectorsTouched
    sum.sharedAccesses += times * launch.sharedAccesses
    sum.conflictCycles += times * launch.sharedConflictCycles
    for (const [name, count] of Object.entries(launch.byClass))
      sum.byClass[name] = (sum.byClass[name] ?? 0) + times * count
  }
  return sum
}

/** Of a launch's shared memory cycles, those lost to bank conflicts within some lines of its PTX. */
export function conflictsWithin(launch: Launch, lines: readonly (readonly [number, number])[]): number {
  const lost = Object.entries(launch.conflictsByLine)
    .filter(([line]) => lines.some(([first, last]) => Number(line) >= first && Number(line) <= last))
    .reduce((sum, [, cycles]) => sum + cycles, 0)
  return lost / Math.max(1, launch.sharedAccesses + launch.sharedConflictCycles)
}

const root = fileURLToPath(new URL('../..', import.meta.url))
const SECTOR = 32

/** Sectors that move at least so many bytes. */
export function leastSectors(bytes: number): number {
  return Math.ceil(bytes / SECTOR)
}

/** One device with room for real sizes; counters on, checks off: a sample leaves much unwritten. */
function environment(launches: string, sample: number): NodeJS.ProcessEnv {
  return {
    ...process.env,
    MGM_LIBCUDA: join(root, 'build', 'emulator', 'libcuda.so.1'),
    MGM_EMULATOR_DEVICES: '80:8G',
    MGM_EMULATOR_COUNTERS: '1',
    MGM_EMULATOR_CHECKS: '0',
    MGM_EMULATOR_ORDER: 'eager',
    MGM_EMULATOR_SEED: '1',
    MGM_EMULATOR_WATCHDOG: '600',
    MGM_EMULATOR_SAMPLE: String(sample),
    MGM_EMULATOR_LAUNCHES: launches,
  }
}

/** Runs cases in child processes, another one after each that failed; `done` hears of every one. */
export async function emulate(
  keys: readonly string[],
  sample: number,
  done: (outcome: Outcome) => void,
): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), 'mgm-kernels-'))
  try {
    let left = [...keys]
    while (left.length > 0) {
      const script = fileURLToPath(new URL('./emulate.ts', import.meta.url))
      const child = spawn(process.execPath, ['--import', 'tsx', script, ...left], {
        cwd: root,
        env: environment(join(folder, 'launches.jsonl'), sample),
        stdio: ['ignore', 'pipe', 'pipe'],
      })
      const errors: string[] = []
      createInterface(child.stderr).on('line', line => errors.push(line))
      const before = left.length
      for await (const line of createInterface(child.stdout)) {
        if (!line.startsWith('{')) continue
        const outcome = JSON.parse(line) as Outcome
        left = left.filter(key => key !== outcome.key)
        done(outcome)
      }
      if (left.length === before) {
        done({ key: left[0]!, launches: [], error: `the process ended: ${errors.slice(-3).join(' | ')}` })
        left = left.slice(1)
      }
    }
  } finally {
    rmSync(folder, { recursive: true })
  }
}

/** The counters of one kernel of a folder with an index.json, launched by native/emulator/test/foreign_test.cpp. */
export function emulateForeign(folder: string, name: string, sample: number): Launch {
  const scratch = mkdtempSync(join(tmpdir(), 'mgm-kernels-'))
  const file = join(scratch, 'launches.jsonl')
  try {
    const program = join(root, 'build', 'emulator', 'foreign_test')
    const env = environment(file, sample)
    const { status, stdout, error } = spawnSync(program, [env.MGM_LIBCUDA!, folder, name], {
      env,
      encoding: 'utf8',
    })
    if (status !== 0) throw new Error(`${name} did not run: ${error?.message ?? stdout.trim()}`)
    return JSON.parse(readFileSync(file, 'utf8').split('\n')[0]!) as Launch
  } finally {
    rmSync(scratch, { recursive: true })
  }
}
