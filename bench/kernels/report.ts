// The report as data, as Markdown tables that read as text too, and as a picture.
import { caseKey, type KernelCase, type Work } from './cases.ts'
import {
  blocksOf,
  conflictsWithin,
  type Launch,
  leastSectors,
  type Outcome,
  type Totals,
  threadsOf,
  totals,
} from './counters.ts'
import { GPUS, type Occupancy, occupancy, type Roofline, roofline, TARGETS, type Target } from './gpus.ts'
import type { StaticKernel } from './images.ts'

/** A kernel as it is launched: what the compiler says, with the block and the shared memory of its launches. */
export interface KernelRow extends StaticKernel {
  /** Undefined where no case launches it. */
  threads: number | undefined
  dynamicShared: number
  occupancy: Partial<Record<Target, Occupancy>>
}

export interface CaseRow {
  key: string
  op: string
  name: string
  work: Work
  launches: Launch[]
  error?: string
  totals?: Totals
  /** The launch that does most of the work. */
  main?: Launch
  /** Sectors touched over the fewest that could be. */
  sectors?: number
  /** The same over the fewest for so many blocks, each of which reads the work's sharedBytes; undefined if it has none. */
  sectorsOfBlocks?: number
  /** Of the main launch's shared memory cycles, those that conflicts cost in its innermost loops. */
  innerConflicts?: number
  peers: readonly string[]
  roofline: Record<string, Roofline>
}

export interface Peer {
  name: string
  op: string
  work: { bytes: number; tensorFlops: number }
  kernel: KernelRow
  launch: Launch
  totals: Totals
}

export interface Report {
  date: string
  commit: string
  triton: string
  sample: number
  disassembler: boolean
  kernels: KernelRow[]
  cases: CaseRow[]
  peers: Peer[]
}

export function kernelRow(kernel: StaticKernel, launches: readonly Launch[]): KernelRow {
  const threads = launches.length > 0 ? Math.max(...launches.map(threadsOf)) : undefined
  const dynamicShared = Math.max(0, ...launches.map(launch => launch.dynamicShared))
  const size = threads ?? kernel.maxThreads
  const row: KernelRow = { ...kernel, threads, dynamicShared, occupancy: {} }
  if (size !== undefined)
    for (const target of TARGETS) {
      const usage = kernel.usage[target]
      if (usage)
        row.occupancy[target] = occupancy(target, {
          threads: size,
          registers: usage.registers,
          shared: usage.shared + dynamicShared,
        })
    }
  return row
}

export function caseRow(kernelCase: KernelCase, outcome: Outcome, kernels: readonly StaticKernel[]): CaseRow {
  const { op, name, work, peers = [] } = kernelCase
  const row: CaseRow = {
    key: caseKey(kernelCase),
    op,
    name,
    work,
    peers,
    launches: outcome.launches,
    roofline: Object.fromEntries(GPUS.map(gpu => [gpu.name, roofline(gpu, work)])),
  }
  if (outcome.error !== undefined) return { ...row, error: outcome.error }
  const all = totals(outcome.launches)
  const heaviest = (launch: Launch) => totals([launch]).tensorFlops * 1e6 + totals([launch]).warpInstructions
  const main = outcome.launches.reduce((a, b) => (heaviest(b) > heaviest(a) ? b : a))
  const hotLines = kernels.find(kernel => kernel.kernel === main.kernel)?.hotLines ?? []
  return {
    ...row,
    totals: all,
    main,
    sectors: all.sectorsTouched / leastSectors(work.bytes),
    ...(work.sharedBytes === undefined
      ? {}
      : {
          sectorsOfBlocks:
            all.sectorsTouched / leastSectors(work.bytes + (blocksOf(main) - 1) * work.sharedBytes),
        }),
    innerConflicts: conflictsWithin(main, hotLines),
  }
}

/** Ops that only move data: nothing excuses a second read. */
const STREAMING = new Set([
  'cast',
  'rmsNorm',
  'layerNorm',
  'ropeAndCache',
  'embedding',
  'spliceEmbeddings',
  'packLinear',
  'toUint8',
])
/** Kernels whose inner loops must not spill or wait for banks. */
const TILED = new Set([
  'linear',
  'groupedLinear',
  'conv2d',
  'attention',
  'pagedAttention',
  'patchMining',
  'depthwiseConvNorm',
])

/** Sectors over the least that streaming ops may touch. */
const MOST_SECTORS = 1.05

/** In words, whatever falls short of what this project asks of its kernels. */
export function shortfalls(report: Report): string[] {
  const found: string[] = []
  const failed = report.cases.filter(row => row.error !== undefined)
  for (const row of failed) found.push(`${row.key}: ${row.error}`)
  for (const kernel of report.kernels) {
    const spilling = TARGETS.filter(target => (kernel.usage[target]?.spills ?? 0) > 0)
    if (spilling.length > 0)
      found.push(
        `${kernel.kernel} spills ${kernel.usage[spilling[0]!]!.spills} bytes (${spilling.join(', ')})`,
      )
    for (const target of TARGETS)
      if (kernel.occupancy[target]?.blocks === 0) found.push(`${kernel.kernel} does not fit on ${target}`)
  }
  for (const row of report.cases) {
    if (!row.totals) continue
    if (STREAMING.has(row.op) && (row.sectorsOfBlocks ?? row.sectors!) > MOST_SECTORS)
      found.push(
        `${row.key}: ${row.sectors!.toFixed(3)} times the least sectors; asked for are ${MOST_SECTORS}`,
      )
    if (TILED.has(row.op) && row.innerConflicts! > 0)
      found.push(
        `${row.key}: bank conflicts in the inner loop of ${row.main!.kernel}, ${percent(row.innerConflicts!)} of its shared memory cycles`,
      )
    // Where memory is the limit, the tensor cores have time.
    if (row.roofline[GPUS[0]!.name]!.bound !== 'tensor') continue
    const ours = row.main && report.kernels.find(kernel => kernel.kernel === row.main!.kernel)?.code?.loop
    if (!ours || ours.tensor === 0) continue
    const stalls = row.peers.flatMap(name => {
      const loop = report.peers.find(peer => peer.name === name)?.kernel.code?.loop
      return loop ? [{ name, stall: loop.stall / loop.tensor }] : []
    })
    const best = stalls.sort((a, b) => a.stall - b.stall)[0]
    if (best && ours.stall / ours.tensor > best.stall * 1.005)
      found.push(
        `${row.key}: ${(ours.stall / ours.tensor).toFixed(1)} stall cycles a tensor core instruction in ${row.main!.kernel}, ` +
          `${best.stall.toFixed(1)} in Triton's ${best.name}`,
      )
  }
  return [...new Set(found)]
}

/** In words, the streaming ops that touch more than asked for only because each of their blocks reads what all share. */
export function sharedReads(report: Report): string[] {
  return report.cases.flatMap(({ key, op, work, main, sectors, sectorsOfBlocks }) => {
    if (!STREAMING.has(op) || !main || sectorsOfBlocks === undefined) return []
    if (sectors! <= MOST_SECTORS || sectorsOfBlocks > MOST_SECTORS) return []
    const few = 1 + Math.floor(((MOST_SECTORS - 1) * work.bytes) / work.sharedBytes!)
    return [
      `${key}: ${sectors!.toFixed(3)} times the least sectors, ${sectorsOfBlocks.toFixed(3)} times the least for ${blocksOf(main)} blocks; ` +
        `to stay within ${MOST_SECTORS} of the former it would have to run on ${few} multiprocessor${few === 1 ? '' : 's'} instead of ${blocksOf(main)}`,
    ]
  })
}

function conflictShare(all: Totals): number {
  return all.conflictCycles / Math.max(1, all.sharedAccesses + all.conflictCycles)
}

function percent(share: number): string {
  return `${(share * 100).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`
}

const ceilKiB = (bytes: number) => (bytes === 0 ? '' : (bytes / 1024).toFixed(bytes % 1024 === 0 ? 0 : 1))

/** A Markdown table with its columns aligned; `right`: those of numbers. */
export function table(head: readonly string[], rows: readonly (readonly string[])[], right: number): string {
  const widths = head.map((title, i) =>
    Math.max(3, ...[title, ...rows.map(row => row[i]!)].map(text => text.length)),
  )
  const line = (cells: readonly string[]) =>
    `| ${cells.map((cell, i) => (i < right ? cell.padEnd(widths[i]!) : cell.padStart(widths[i]!))).join(' | ')} |`
  const rule = `| ${widths.map((width, i) => (i < right ? '-'.repeat(width) : `${'-'.repeat(width - 1)}:`)).join(' | ')} |`
  return [line(head), rule, ...rows.map(line)].join('\n')
}

function loopCells(kernel: StaticKernel): string[] {
  const loop = kernel.code?.loop
  if (!loop) return ['', '', '']
  const work = loop.tensor || loop.fma
  const unit = loop.tensor ? 'HMMA' : 'FFMA'
  return [`${work} ${unit}`, (loop.instructions / work).toFixed(2), (loop.stall / work).toFixed(2)]
}

function resourceCells(kernel: KernelRow): string[] {
  const { sm_80 } = kernel.usage
  const spills = Math.max(...TARGETS.map(target => kernel.usage[target]?.spills ?? 0))
  return [
    String(kernel.threads ?? kernel.maxThreads ?? ''),
    String(sm_80?.registers ?? ''),
    ceilKiB((sm_80?.shared ?? 0) + kernel.dynamicShared),
    spills === 0 ? '' : String(spills),
    ...TARGETS.map(target => String(kernel.occupancy[target]?.warps ?? '')),
  ]
}

const RESOURCES = ['threads', 'registers', 'shared KiB', 'spills', 'sm_80', 'sm_86', 'sm_89', 'sm_90']
const LOOP = ['loop', 'instr.', 'stall']

export function kernelTable(report: Report): string {
  const launched = report.kernels.filter(kernel => kernel.threads !== undefined)
  return table(
    ['kernel', ...RESOURCES, ...LOOP],
    launched.map(kernel => [kernel.kernel, ...resourceCells(kernel), ...loopCells(kernel)]),
    1,
  )
}

function launchNames(row: CaseRow): string {
  return row.launches.map(launch => launch.kernel).join(' + ')
}

export function caseTable(report: Report): string {
  const rows = report.cases.map(row => {
    const all = row.totals
    if (!all || !row.main) return [row.op, row.name, row.error ?? '', ...Array<string>(8).fill('')]
    return [
      row.op,
      row.name,
      launchNames(row),
      `${blocksOf(row.main)}`,
      row.sectors!.toFixed(2),
      row.sectorsOfBlocks?.toFixed(2) ?? '',
      percent(all.sectorsRequested / all.sectorsTouched),
      all.sharedAccesses === 0 ? '' : percent(conflictShare(all)),
      all.sharedAccesses === 0 ? '' : percent(row.innerConflicts!),
      row.work.tensorFlops === 0 ? '' : (all.tensorFlops / row.work.tensorFlops).toFixed(2),
      (all.warpInstructions / 1e6).toPrecision(3),
    ]
  })
  return table(
    [
      'op',
      'case',
      'kernels',
      'blocks',
      'sectors / least',
      'of blocks',
      'coalesced',
      'conflicts',
      'inner',
      'FLOP / least',
      'M instr.',
    ],
    rows,
    3,
  )
}

export function peerTable(report: Report): string {
  const cells = (who: string, kernel: KernelRow, work: CaseRow['work'], all: Totals) => [
    who,
    kernel.kernel,
    ...resourceCells(kernel).slice(0, 5),
    ...loopCells(kernel),
    (all.sectorsTouched / leastSectors(work.bytes)).toFixed(2),
    all.sharedAccesses === 0 ? '' : percent(conflictShare(all)),
    (all.warpInstructions / 1e6).toPrecision(3),
  ]
  const rows: string[][] = []
  const shown = new Set<string>()
  for (const row of report.cases.filter(one => one.peers.length > 0 && one.totals)) {
    const kernel = report.kernels.find(one => one.kernel === row.main!.kernel)
    if (kernel) rows.push(cells(`ours, ${row.name}`, kernel, row.work, row.totals!))
    for (const peer of report.peers.filter(one => row.peers.includes(one.name))) {
      shown.add(peer.name)
      rows.push(cells(`Triton, ${peer.name}`, peer.kernel, peer.work, peer.totals))
    }
  }
  for (const peer of report.peers.filter(one => !shown.has(one.name)))
    rows.push(cells(`Triton, ${peer.name}`, peer.kernel, peer.work, peer.totals))
  const head = [
    'whose',
    'kernel',
    ...RESOURCES.slice(0, 4),
    'warps sm_80',
    ...LOOP,
    'sectors / least',
    'conflicts',
    'M instr.',
  ]
  return table(head, rows, 2)
}

export function rooflineTable(report: Report): string {
  const microseconds = (estimate: Roofline) =>
    `${(estimate.seconds * 1e6).toPrecision(3)} ${estimate.bound === 'memory' ? 'm' : 't'}`
  return table(
    ['op', 'case', 'MB', 'GFLOP', ...GPUS.map(gpu => gpu.name)],
    report.cases.map(row => [
      row.op,
      row.name,
      (row.work.bytes / 1e6).toPrecision(3),
      row.work.tensorFlops === 0 ? '' : (row.work.tensorFlops / 1e9).toPrecision(3),
      ...GPUS.map(gpu => microseconds(row.roofline[gpu.name]!)),
    ]),
    2,
  )
}

export function markdown(report: Report): string {
  const short = shortfalls(report)
  const shared = sharedReads(report)
  const rest = report.kernels.filter(kernel => kernel.threads === undefined).length
  return `# Kernels

What can be said of the CUDA kernels' speed without a GPU, at the sizes of Mini-Gemini's models. No number here is a time that was
measured: they are counts, of the compiler, of the machine code and of the emulated GPU (docs/architecture.md) that runs the shipped PTX.
Triton's kernels stand beside ours, compiled for the same sizes and counted the same way. Times on hardware: \`npm run gpu:verify\`.

Written by \`npm run bench:kernels -- --write-docs\` on ${report.date.slice(0, 10)} at commit ${report.commit}; Triton ${report.triton}. Other runs print the same tables.

![Stall cycles for each tensor core instruction, and sectors over the least](kernels.png)

## Where they fall short

${short.length === 0 ? 'Nothing that this project asks of its kernels is missed.' : short.map(text => `- ${text}`).join('\n')}

Asked for: no spills; no bank conflicts in the inner loops of GEMM, attention, mining and depthwise kernels; at most 1.05 times the least
sectors where data only streams; and where the tensor cores are the limit, no more stall cycles for each of their instructions than
Triton's best kernel for the size.
${
  shared.length === 0
    ? ''
    : `
Norms deal rows out to blocks, one to a multiprocessor, and every block reads the f32 weights, once: what is more than the least comes from
L2 and is the price of using the whole GPU, as the operands that tiles share are. So these are held to the least for their number of blocks:

${shared.map(text => `- ${text}`).join('\n')}
`
}
## Ours and Triton's

${peerTable(report)}

## Kernels

Those that the cases launch; ${rest} more were compiled, and count for "where they fall short". _Loop_: the innermost loop that holds the
arithmetic, in sm_80's machine code; instructions and stall cycles are for each HMMA (m16n8k16; an A100 is busy with one for 8 cycles), or
each FFMA. _sm_80_ and so on: warps resident on a multiprocessor.

${kernelTable(report)}

## Operations

${caseTable(report)}

- _sectors / least_: 32-byte sectors of global memory that the launches touch, a request at a time, over those of operands and results
  once. Tiled kernels read operands once for every tile that needs them, mostly from L2; streaming ones should stand at 1.
- _of blocks_: the same over the least for so many blocks, where each of them has to read weights that all rows share.
- _coalesced_: the distinct bytes that the lanes asked for, over the sectors that hold them.
- _conflicts_: cycles lost to bank conflicts, of all cycles of shared memory; _inner_: those lost in the innermost loops that hold the
  arithmetic.
- _FLOP / least_: tensor core work over that of the formula; above 1 is padding, below 1 sums that the formula counts and the kernel saves.
- _M instr._: millions of warp instructions.

Grids of more than ${report.sample} blocks ran as a sample of ${report.sample}, spread over the grid, and their counts are scaled: expect a few percent of
error. Attention, mining, mixtures of experts and sampling, whose blocks differ, ran whole.

## Roofline: an ESTIMATE

Microseconds that no kernel can beat: least bytes at the published memory bandwidth (m) or least FLOP at the published dense bf16 rate
(t), whichever is longer. What real kernels reach of it, this does not say; H100's rate needs wgmma, of which mma.sync reaches about 60 %.

${rooflineTable(report)}

## Method

- Registers, shared memory and spills are what \`ptxas -v\` reports for each target, of the PTX that ships. Resident warps follow from
  them and from the launches' blocks and dynamic shared memory, by the limits of the CUDA programming guide (bench/kernels/gpus.ts).
- Machine code: \`nvdisasm -hex -c\`. Bits 41–44 of an instruction's second word are the cycles before the warp's next instruction; their
  sum over a loop is the least time of a turn for one warp, and the tensor core's cycles over it bound how busy one warp keeps it.
  Several warps share a tensor core and fill each other's gaps.
- Triton: tools/triton_kernels.py compiles its tutorial's matmul, softmax and layer norm, and a flash attention whose inner loop has no
  masks; bench/kernels/triton holds the PTX, so that no Python is needed here.
- Peaks are those of NVIDIA's data sheets: ${GPUS.map(gpu => `${gpu.name} ${gpu.tensor / 1e12} TFLOP/s, ${gpu.memory / 1e9} GB/s`).join('; ')}.
`
}

const FONT = 'font-family="DejaVu Sans, Liberation Sans, Arial, sans-serif"'
const OURS = '#2563a8'
const THEIRS = '#b8b8b8'

function escaped(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;')
}

interface Bar {
  label: string
  value: number
  colour: string
}

/** Horizontal bars from (x, y); `mark`: a line across them. Returns the SVG and the height. */
function bars(
  title: string,
  list: readonly Bar[],
  x: number,
  y: number,
  mark: { value: number; text: string },
): [string, number] {
  const [labels, width, step] = [330, 330, 22]
  const most = Math.max(mark.value, ...list.map(bar => bar.value))
  const scale = (value: number) => (value / most) * width
  const parts = [`<text x="${x}" y="${y}" ${FONT} font-size="16" font-weight="bold">${escaped(title)}</text>`]
  list.forEach((bar, i) => {
    const top = y + 14 + i * step
    parts.push(
      `<text x="${x + labels - 8}" y="${top + 14}" text-anchor="end" ${FONT} font-size="12">${escaped(bar.label)}</text>`,
      `<rect x="${x + labels}" y="${top + 2}" width="${scale(bar.value).toFixed(1)}" height="${step - 6}" fill="${bar.colour}"/>`,
      `<text x="${(x + labels + scale(bar.value) + 5).toFixed(1)}" y="${top + 14}" ${FONT} font-size="12">${bar.value.toFixed(2)}</text>`,
    )
  })
  const height = 14 + list.length * step
  const at = (x + labels + scale(mark.value)).toFixed(1)
  parts.push(
    `<line x1="${at}" y1="${y + 10}" x2="${at}" y2="${y + height + 4}" stroke="#c0392b" stroke-dasharray="4 3"/>`,
    `<text x="${at}" y="${y + height + 18}" text-anchor="middle" ${FONT} font-size="11" fill="#c0392b">${escaped(mark.text)}</text>`,
  )
  return [parts.join('\n'), height + 24]
}

/** Two panels: the inner loops beside Triton's, and how often each byte is moved. */
export function picture(report: Report): string {
  const stalls: Bar[] = []
  const add = (label: string, kernel: KernelRow | undefined, colour: string) => {
    const loop = kernel?.code?.loop
    if (loop && loop.tensor > 0 && !stalls.some(bar => bar.label === label))
      stalls.push({ label, value: loop.stall / loop.tensor, colour })
  }
  for (const row of report.cases)
    if (row.main)
      add(
        row.main.kernel,
        report.kernels.find(kernel => kernel.kernel === row.main!.kernel),
        OURS,
      )
  for (const peer of report.peers) add(`Triton ${peer.name}`, peer.kernel, THEIRS)
  const moved: Bar[] = report.cases
    .filter(row => row.sectors !== undefined && (row.work.tensorFlops === 0 || /decode/.test(row.name)))
    .map(row => ({ label: `${row.op} ${row.name}`.slice(0, 52), value: row.sectors!, colour: OURS }))
  const [left, leftHeight] = bars('Stall cycles a tensor core instruction, inner loop', stalls, 20, 64, {
    value: 8,
    text: 'tensor core busy (A100)',
  })
  const [right, rightHeight] = bars('Sectors over the least', moved, 790, 64, { value: 1, text: 'least' })
  const height = 80 + Math.max(leftHeight, rightHeight)
  return `<svg xmlns="http://www.w3.org/2000/svg" width="1560" height="${height}" viewBox="0 0 1560 ${height}">
<rect width="100%" height="100%" fill="white"/>
<text x="20" y="30" ${FONT} font-size="18" font-weight="bold">CUDA kernels, counted without a GPU (blue: ours, grey: Triton ${escaped(report.triton)})</text>
${left}
${right}
</svg>
`
}
