import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { availableParallelism, cpus, freemem, release, totalmem } from 'node:os'
import { join } from 'node:path'
import { formatBytes } from '../engine/memory.ts'
import { addonPath, type CudaSurvey, native } from '../native.ts'
import { errorText, table } from './terminal.ts'

/** What `mgm doctor` found. Absent things are null. */
export interface Diagnosis {
  version: string
  node: string
  platform: string
  /** The C library's version; null if it is another one. */
  glibc: string | null
  addon: { path: string | null; error: string | null }
  cpu: {
    model: string
    /** Those of the instruction sets that matter here. */
    features: string[]
    /** Instruction sets the kernels can run with, the one in use, and why. */
    available: string[]
    isa: string | null
    reason: string
    cores: number
    /** Cores this process may use; as many threads compute unless told otherwise. */
    threads: number
  }
  memory: { total: number; free: number; limit: number | null }
  gpu: {
    devices: string[]
    driver: string | null
    libcuda: string | null
    /** What the addon sees through the CUDA driver; null if the addon did not load. */
    cuda: CudaSurvey | null
  }
  backend: { name: 'cpu' | 'cuda' | null; reason: string }
}

const FEATURES =
  /^(sse4_2|avx|avx2|fma|f16c|avx512(f|bw|dq|vl|_bf16|_fp16|_vnni)|amx_(bf16|int8|tile)|asimd|sve)$/

const LIBCUDA_FOLDERS = [
  '/usr/lib/x86_64-linux-gnu',
  '/usr/lib/aarch64-linux-gnu',
  '/usr/lib64',
  '/usr/lib',
  '/usr/lib/wsl/lib',
  '/usr/local/nvidia/lib64',
  '/usr/local/cuda/compat',
]

/** Looks at the machine and at this installation; throws nothing. */
export function diagnose(version: string): Diagnosis {
  const addon: Diagnosis['addon'] = { path: null, error: null }
  let chosen: { isa: string; best: string; available: string[] } | undefined
  const gpu = findGpu()
  try {
    addon.path = addonPath()
    chosen = native().cpuFeatures()
    gpu.cuda = native().cudaSurvey()
  } catch (error) {
    addon.error = errorText(error, false).replace(/^mgm: /, '')
  }
  const asked = process.env.MGM_CPU_ISA
  return {
    version,
    node: process.version,
    platform: `${process.platform}-${process.arch}, kernel ${release()}`,
    glibc: glibcVersion(),
    addon,
    cpu: {
      model: cpus()[0]?.model ?? 'unknown',
      features: cpuFlags(),
      available: chosen?.available ?? [],
      isa: chosen?.isa ?? null,
      reason: !chosen
        ? 'the addon did not load'
        : asked
          ? `MGM_CPU_ISA asks for it (the best here is ${chosen.best})`
          : 'the widest that this processor has',
      cores: cpus().length,
      threads: availableParallelism(),
    },
    memory: { total: totalmem(), free: freemem(), limit: memoryLimit() },
    gpu,
    backend: chosen
      ? gpu.cuda?.error === null
        ? { name: 'cuda', reason: "what device: 'auto' takes" }
        : { name: 'cpu', reason: "what device: 'auto' takes where there is no usable GPU (see cuda)" }
      : { name: null, reason: 'the addon did not load, so nothing can run' },
  }
}

/** A line a GPU: capability, memory, the kernels' image that would run. */
function cudaLines(cuda: CudaSurvey | null): string {
  if (cuda === null) return 'unknown'
  if (cuda.error !== null && cuda.devices.length === 0) return cuda.error
  const version = `CUDA ${Math.floor(cuda.driverVersion / 1000)}.${(cuda.driverVersion % 1000) / 10}`
  return [
    `${version} through ${cuda.library}${cuda.emulated ? ', emulated: there is no real GPU behind it' : ''}`,
    ...cuda.devices.map(
      ({ name, capability, memory, image }, index) =>
        `cuda:${index} ${name}, compute capability ${Math.floor(capability / 10)}.${capability % 10}, ` +
        `${formatBytes(memory)}, kernels: ${image}`,
    ),
  ].join('\n')
}

/** The diagnosis for people. */
export function renderDiagnosis(found: Diagnosis): string {
  const { cpu, memory, gpu } = found
  return table([
    ['mgm-node', found.version],
    ['node', `${found.node} on ${found.platform}`],
    ['glibc', found.glibc ?? 'none'],
    ['addon', found.addon.error ?? found.addon.path ?? 'none'],
    ['processor', `${cpu.model}, ${cpu.cores} cores`],
    ['features', cpu.features.join(' ') || 'unknown'],
    [
      'instruction set',
      cpu.isa === null ? cpu.reason : `${cpu.isa}: ${cpu.reason} (of ${cpu.available.join(', ')})`,
    ],
    ['threads', String(cpu.threads)],
    [
      'memory',
      `${formatBytes(memory.total)}, ${formatBytes(memory.free)} free` +
        (memory.limit === null ? '' : `, this process may use ${formatBytes(memory.limit)}`),
    ],
    ['gpu', gpu.devices.join('\n') || 'none found (no /dev/nvidia*)'],
    ['gpu driver', gpu.driver ?? 'none found'],
    ['libcuda', gpu.libcuda ?? 'none found'],
    ['cuda', cudaLines(gpu.cuda)],
    [
      'backend',
      found.backend.name === null ? found.backend.reason : `${found.backend.name}: ${found.backend.reason}`,
    ],
  ])
}

function read(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8')
  } catch {
    return undefined
  }
}

function list(folder: string): string[] {
  try {
    return readdirSync(folder)
  } catch {
    return []
  }
}

function glibcVersion(): string | null {
  // The report would otherwise look up host names of open sockets.
  Object.assign(process.report, { excludeNetwork: true })
  const report = process.report.getReport() as unknown as { header: { glibcVersionRuntime?: string } }
  return report.header.glibcVersionRuntime ?? null
}

function cpuFlags(): string[] {
  const line = read('/proc/cpuinfo')?.match(/^(?:flags|Features)\s*:\s*(.*)$/m)?.[1]
  return line?.split(/\s+/).filter(flag => FEATURES.test(flag)) ?? []
}

/** The limit that the system sets this process (its cgroup's), where it is lower than the machine's memory. */
function memoryLimit(): number | null {
  const bytes = process.constrainedMemory()
  return bytes > 0 && bytes < totalmem() ? bytes : null
}

function findGpu(): Diagnosis['gpu'] {
  const nodes = list('/dev').filter(name => /^nvidia\d+$/.test(name))
  const models = list('/proc/driver/nvidia/gpus').map(
    bus => read(join('/proc/driver/nvidia/gpus', bus, 'information'))?.match(/^Model:\s*(.*)$/m)?.[1],
  )
  const driver = read('/proc/driver/nvidia/version')?.match(/Kernel Module(?: for \S+)?\s+(\S+)/)?.[1] ?? null
  const asked = process.env.MGM_LIBCUDA
  const folders = [...(process.env.LD_LIBRARY_PATH?.split(':').filter(Boolean) ?? []), ...LIBCUDA_FOLDERS]
  const libcuda = [...(asked ? [asked] : []), ...folders.map(folder => join(folder, 'libcuda.so.1'))].find(
    existsSync,
  )
  return {
    devices: nodes.map((name, index) => `/dev/${name}${models[index] ? ` (${models[index]})` : ''}`),
    driver,
    libcuda: libcuda ?? null,
    cuda: null,
  }
}
