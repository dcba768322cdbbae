// Limits of multiprocessors and published peaks of cards: what the report's arithmetic rests on.

/** Per multiprocessor. CUDA C++ Programming Guide, "Features and Technical Specifications per Compute Capability". */
export interface Multiprocessor {
  warps: number
  blocks: number
  registers: number
  /** Bytes in all, and the most that one block may have. */
  shared: number
  sharedPerBlock: number
}

const KIB = 1024
export const MULTIPROCESSORS = {
  sm_80: { warps: 64, blocks: 32, registers: 65536, shared: 164 * KIB, sharedPerBlock: 163 * KIB },
  sm_86: { warps: 48, blocks: 16, registers: 65536, shared: 100 * KIB, sharedPerBlock: 99 * KIB },
  sm_89: { warps: 48, blocks: 24, registers: 65536, shared: 100 * KIB, sharedPerBlock: 99 * KIB },
  sm_90: { warps: 64, blocks: 32, registers: 65536, shared: 228 * KIB, sharedPerBlock: 227 * KIB },
} as const satisfies Record<string, Multiprocessor>

export type Target = keyof typeof MULTIPROCESSORS
export const TARGETS = Object.keys(MULTIPROCESSORS) as Target[]

const SUB_CORES = 4
/** Registers are given to a warp in units of 256; shared memory in units of 128 bytes, and every block costs 1 KiB more. */
const REGISTER_UNIT = 256
const SHARED_UNIT = 128
const SHARED_OF_SYSTEM = 1024

export interface Occupancy {
  blocks: number
  warps: number
  /** What there would have to be more of for another block. */
  limit: 'warps' | 'blocks' | 'registers' | 'shared memory'
}

/** Blocks and warps of a kernel that fit on a multiprocessor at once; none where a block does not fit at all. */
export function occupancy(
  target: Target,
  kernel: { threads: number; registers: number; shared: number },
): Occupancy {
  const sm = MULTIPROCESSORS[target]
  const warps = Math.ceil(kernel.threads / 32)
  const registersOfWarp = roundUp(Math.max(1, kernel.registers) * 32, REGISTER_UNIT)
  const warpsByRegisters = Math.floor(sm.registers / SUB_CORES / registersOfWarp) * SUB_CORES
  const limits: [Occupancy['limit'], number][] = [
    ['warps', Math.floor(sm.warps / warps)],
    ['blocks', sm.blocks],
    ['registers', Math.floor(warpsByRegisters / warps)],
    [
      'shared memory',
      kernel.shared > sm.sharedPerBlock
        ? 0
        : Math.floor(sm.shared / roundUp(kernel.shared + SHARED_OF_SYSTEM, SHARED_UNIT)),
    ],
  ]
  const [limit, blocks] = limits.reduce((least, next) => (next[1] < least[1] ? next : least))
  return { blocks, warps: blocks * warps, limit }
}

function roundUp(value: number, unit: number): number {
  return Math.ceil(value / unit) * unit
}

/** A card's peaks as its maker publishes them. */
export interface Gpu {
  name: string
  target: Target
  /** FLOP/s of dense bf16 with f32 accumulation on the tensor cores, and of f32 FMAs. */
  tensor: number
  fma: number
  /** Bytes/s of device memory. */
  memory: number
}

/** NVIDIA's data sheets and architecture papers (GA100, GA102, AD102, H100); boost clocks, no sparsity. */
export const GPUS: readonly Gpu[] = [
  { name: 'A100 SXM 80 GB', target: 'sm_80', tensor: 312e12, fma: 19.5e12, memory: 2039e9 },
  { name: 'A10', target: 'sm_86', tensor: 125e12, fma: 31.2e12, memory: 600e9 },
  { name: 'RTX 3090', target: 'sm_86', tensor: 71e12, fma: 35.6e12, memory: 936e9 },
  { name: 'L4', target: 'sm_89', tensor: 121e12, fma: 30.3e12, memory: 300e9 },
  { name: 'RTX 4090', target: 'sm_89', tensor: 165.2e12, fma: 82.6e12, memory: 1008e9 },
  { name: 'H100 SXM', target: 'sm_90', tensor: 989.4e12, fma: 66.9e12, memory: 3350e9 },
]

export interface Roofline {
  /** No kernel is faster: the larger of the two. */
  seconds: number
  bound: 'memory' | 'tensor' | 'fma'
}

/** Least time of an operation: its least bytes at the memory's peak against its FLOP at the arithmetic's. */
export function roofline(
  gpu: Gpu,
  work: { bytes: number; tensorFlops: number; fmaFlops?: number },
): Roofline {
  const times: [Roofline['bound'], number][] = [
    ['memory', work.bytes / gpu.memory],
    ['tensor', work.tensorFlops / gpu.tensor],
    ['fma', (work.fmaFlops ?? 0) / gpu.fma],
  ]
  const [bound, seconds] = times.reduce((most, next) => (next[1] > most[1] ? next : most))
  return { seconds, bound }
}
