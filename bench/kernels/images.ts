// What the assembler and the disassembler say of compiled kernels, ours and others'. Nothing here needs a GPU.
import { execFile } from 'node:child_process'
import { createHash } from 'node:crypto'
import { existsSync, mkdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs'
import { delimiter, join } from 'node:path'
import { promisify } from 'node:util'
import { parseUsage, type Usage } from '../../scripts/ptxas.mjs'
import { TARGETS, type Target } from './gpus.ts'
import { innermostLoop, type Loop, localAccesses, parseSass } from './sass.ts'

const run = promisify(execFile)
const BIG = { maxBuffer: 1 << 28 }

/** One kernel before it is launched. */
export interface StaticKernel {
  family: string
  kernel: string
  /** Of its launch bounds; undefined if it has none. */
  maxThreads: number | undefined
  usage: Partial<Record<Target, Usage>>
  /** Lines of the PTX file that its innermost loops span. */
  hotLines: readonly Lines[]
  /** Of sm_80's machine code; undefined without a disassembler. */
  code: { instructions: number; localAccesses: number; loop: Loop | undefined } | undefined
}

/** { kernel: most threads a block may have } of PTX with launch bounds. */
export function parseBounds(ptx: string): Map<string, number> {
  const bounds = new Map<string, number>()
  let kernel: string | undefined
  for (const line of ptx.split('\n')) {
    kernel = /^(?:\.visible )?\.entry (\w+)/.exec(line)?.[1] ?? kernel
    const limit = /^\.(?:max|req)ntid ([\d, ]+)/.exec(line)
    if (limit && kernel !== undefined)
      bounds.set(
        kernel,
        limit[1]!.split(',').reduce((product, n) => product * Number(n), 1),
      )
  }
  return bounds
}

/** First and last of a span of lines, counted from one. */
export type Lines = readonly [number, number]

/**
 * { kernel: innermost loops } of PTX: spans between a label and a branch back to it that hold matrix products and no such
 * span. Kernels without any: the same with eight multiply-adds.
 */
export function parseHotLines(ptx: string): Map<string, Lines[]> {
  const hot = new Map<string, Lines[]>()
  const lines = ptx.split('\n')
  const innermost = (from: number, to: number): Lines[] => {
    const labels = new Map<string, number>()
    const loops: Lines[] = []
    for (let at = from; at < to; at++) {
      const label = /^\s*([$\w]+):/.exec(lines[at]!)?.[1]
      if (label !== undefined) labels.set(label, at + 1)
      const target = /\bbra(?:\.uni)?\s+([$\w]+);/.exec(lines[at]!)?.[1]
      const back = target === undefined ? undefined : labels.get(target)
      if (back !== undefined) loops.push([back, at + 1])
    }
    const holds = ([first, last]: Lines, pattern: RegExp, least: number) =>
      lines.slice(first - 1, last).filter(line => pattern.test(line)).length >= least
    for (const [pattern, least] of [[/\bmma\.sync\b/, 1] as const, [/\bfma\.rn\.f32\b/, 8] as const]) {
      const working = loops.filter(loop => holds(loop, pattern, least))
      if (working.length > 0)
        return working.filter(
          outer => !working.some(inner => inner !== outer && inner[0] >= outer[0] && inner[1] <= outer[1]),
        )
    }
    return []
  }
  const entries = lines.flatMap((line, at) => {
    const kernel = /^(?:\.visible )?\.entry (\w+)/.exec(line)?.[1]
    return kernel === undefined ? [] : [{ kernel, at }]
  })
  entries.forEach(({ kernel, at }, i) => {
    hot.set(kernel, innermost(at, entries[i + 1]?.at ?? lines.length))
  })
  return hot
}

/** PTX to look at, with the cubins that there are of it; beside each lies what ptxas said. */
export interface Source {
  family: string
  ptx: string
  cubins?: Partial<Record<Target, string>>
}

/** Families of the last build, as its addon carries them. */
export function builtFamilies(root: string): Source[] {
  const index = join(root, 'build', 'kernels', 'images.json')
  if (!existsSync(index))
    throw new Error(`expected ${index}: run \`npm run build:native\` with nvcc on the PATH first`)
  const sources = JSON.parse(readFileSync(index, 'utf8')) as Source[]
  // What runs there.
  for (const { cubins } of sources) if (cubins?.sm_86) cubins.sm_89 = cubins.sm_86
  return sources
}

/** A disassembler that takes `-hex -c`: MGM_NVDISASM, the PATH, or the one inside Triton's wheel in MGM_BENCH_PYTHON's environment. */
export async function findDisassembler(): Promise<string | undefined> {
  if (process.env.MGM_NVDISASM) return process.env.MGM_NVDISASM
  for (const folder of (process.env.PATH ?? '').split(delimiter))
    if (folder && existsSync(join(folder, 'nvdisasm'))) return join(folder, 'nvdisasm')
  const code = 'import triton.backends.nvidia as n, os; print(list(n.__path__)[0])'
  try {
    const { stdout } = await run(process.env.MGM_BENCH_PYTHON ?? 'python3', ['-c', code])
    const inside = join(stdout.trim(), 'bin', 'nvdisasm')
    return existsSync(inside) ? inside : undefined
  } catch {
    return undefined
  }
}

// The lowest .version that knows a target; the code stays the same.
const VERSION_OF_TARGET: Partial<Record<Target, number>> = { sm_86: 7.1, sm_89: 7.8, sm_90: 7.8 }

/** Assembles PTX for the targets that it has no cubin of, and disassembles sm_80's; results are kept under the hash of the PTX. */
export async function inspect(
  { family, ptx, cubins = {} }: Source,
  options: { cache: string; disassembler: string | undefined },
): Promise<StaticKernel[]> {
  const text = readFileSync(ptx, 'utf8')
  mkdirSync(options.cache, { recursive: true })
  const hash = createHash('sha256').update(text).digest('hex').slice(0, 20)
  const base = join(options.cache, `${family}-${hash}`)
  const usages = await Promise.all(
    TARGETS.map(async target => {
      const cubin = cubins[target] ?? `${base}.${target}.cubin`
      if (!existsSync(`${cubin}.txt`)) await assemble(text, target, cubin)
      return { target, cubin, kernels: parseUsage(readFileSync(`${cubin}.txt`, 'utf8')) }
    }),
  )
  const sass = options.disassembler
    ? parseSass((await run(options.disassembler, ['-hex', '-c', usages[0]!.cubin], BIG)).stdout)
    : undefined
  const bounds = parseBounds(text)
  const hotLines = parseHotLines(text)
  return [...usages[0]!.kernels.keys()].map(kernel => {
    const code = sass?.get(kernel)
    return {
      family,
      kernel,
      maxThreads: bounds.get(kernel),
      hotLines: hotLines.get(kernel) ?? [],
      usage: Object.fromEntries(usages.map(({ target, kernels }) => [target, kernels.get(kernel)!])),
      code: code && {
        instructions: code.length,
        localAccesses: localAccesses(code),
        loop: innermostLoop(code),
      },
    }
  })
}

async function assemble(text: string, target: Target, cubin: string): Promise<void> {
  const version = Number(/^\.version (\d+\.\d+)/m.exec(text)?.[1])
  const wanted = Math.max(version, VERSION_OF_TARGET[target] ?? 0).toFixed(1)
  const input = `${cubin}.${process.pid}.ptx`
  writeFileSync(input, text.replace(/^\.version .*$/m, `.version ${wanted}`))
  const { stdout, stderr } = await run('ptxas', ['-v', '-O3', `-arch=${target}`, input, '-o', cubin], BIG)
  writeFileSync(input, stdout + stderr)
  renameSync(input, `${cubin}.txt`)
}
