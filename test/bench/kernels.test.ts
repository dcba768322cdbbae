import { describe, expect, it } from 'vitest'
import { CASES, caseKey } from '../../bench/kernels/cases.ts'
import { conflictsWithin, type Launch, leastSectors, totals } from '../../bench/kernels/counters.ts'
import { GPUS, occupancy, roofline } from '../../bench/kernels/gpus.ts'
import { parseBounds, parseHotLines } from '../../bench/kernels/images.ts'
import {
  caseRow,
  kernelRow,
  picture,
  type Report,
  sharedReads,
  shortfalls,
  table,
} from '../../bench/kernels/report.ts'
import { innermostLoop, localAccesses, loops, parseSass } from '../../bench/kernels/sass.ts'
import { parseUsage } from '../../scripts/ptxas.mjs'

/** A line of nvdisasm -hex -c and the second word below it, with its stall count where the hardware has it. */
function instruction(address: number, text: string, stall: number): string {
  const second = (0x000f_c000_0000_0000n & ~(0xfn << 41n)) | (BigInt(stall) << 41n)
  return [
    `        /*${address.toString(16).padStart(4, '0')}*/   ${text} ;   /* 0x0000000000007919 */`,
    `                                    /* 0x${second.toString(16).padStart(16, '0')} */`,
  ].join('\n')
}

const HMMA = 'HMMA.16816.F32.BF16 R4, R8, R12, R4'
const SASS = [
  '\t.section\t.text.product,"ax",@progbits',
  'product:',
  '.text.product:',
  instruction(0x00, 'S2R R0, SR_CTAID.X', 2),
  instruction(0x10, '@!P0 BRA `(.L_x_3)', 5),
  '.L_x_0:', // outer loop
  instruction(0x20, 'BAR.SYNC 0x0', 6),
  '.L_x_1:', // inner, with a mask
  instruction(0x30, HMMA, 8),
  instruction(0x40, HMMA, 8),
  instruction(0x50, 'ISETP.GE.AND P0, PT, R1, R2, PT', 12),
  instruction(0x60, '@P0 BRA `(.L_x_1)', 5),
  '.L_x_2:', // inner, without
  instruction(0x70, 'LDSM.16.M88.4 R8, [R1]', 4),
  instruction(0x80, HMMA, 8),
  instruction(0x90, HMMA, 8),
  instruction(0xa0, '@P1 BRA `(.L_x_2)', 5),
  instruction(0xb0, '@P2 BRA `(.L_x_0)', 5),
  '.L_x_3:',
  instruction(0xc0, 'STL [R1], R2', 1),
  '.L_x_4:',
  instruction(0xd0, 'BRA `(.L_x_4)', 0),
  '\t.section\t.text.sum,"ax",@progbits',
  '.text.sum:',
  '.L_x_5:',
  ...Array.from({ length: 8 }, (_, i) => instruction(i * 16, 'FFMA R0, R1, R2, R0', 2)),
  instruction(0x80, '@P0 BRA `(.L_x_5)', 5),
].join('\n')

describe('machine code', () => {
  const functions = parseSass(SASS)
  it('is read with stall counts and branch targets', () => {
    expect([...functions.keys()]).toEqual(['product', 'sum'])
    const code = functions.get('product')!
    expect(code.length).toBe(14)
    expect(code[5]).toEqual({ address: 0x50, opcode: 'ISETP.GE.AND', stall: 12 })
    expect(code[1]).toMatchObject({ opcode: 'BRA', stall: 5, target: 0xc0 })
    expect(localAccesses(code)).toBe(1)
  })
  it('shows the innermost loop that does the arithmetic, the shortest of equals', () => {
    const code = functions.get('product')!
    expect(loops(code).length).toBe(3)
    expect(innermostLoop(code)).toEqual({
      first: 0x70,
      last: 0xa0,
      instructions: 4,
      stall: 25,
      tensor: 2,
      tensorCycles: 16,
      fma: 0,
      mufu: 0,
      sharedLoads: 1,
      barriers: 0,
    })
    expect(innermostLoop(functions.get('sum')!)).toMatchObject({ tensor: 0, fma: 8, stall: 21 })
  })
})

describe('occupancy', () => {
  // As NVIDIA's occupancy calculator has them.
  it.each([
    ['sm_80', { threads: 256, registers: 32, shared: 0 }, { blocks: 8, warps: 64, limit: 'warps' }],
    ['sm_80', { threads: 256, registers: 64, shared: 0 }, { blocks: 4, warps: 32, limit: 'registers' }],
    ['sm_80', { threads: 256, registers: 94, shared: 0 }, { blocks: 2, warps: 16, limit: 'registers' }],
    ['sm_80', { threads: 128, registers: 255, shared: 0 }, { blocks: 2, warps: 8, limit: 'registers' }],
    ['sm_80', { threads: 32, registers: 16, shared: 0 }, { blocks: 32, warps: 32, limit: 'blocks' }],
    [
      'sm_80',
      { threads: 128, registers: 32, shared: 65536 },
      { blocks: 2, warps: 8, limit: 'shared memory' },
    ],
    ['sm_86', { threads: 1024, registers: 32, shared: 0 }, { blocks: 1, warps: 32, limit: 'warps' }],
    [
      'sm_86',
      { threads: 128, registers: 32, shared: 65536 },
      { blocks: 1, warps: 4, limit: 'shared memory' },
    ],
    [
      'sm_86',
      { threads: 128, registers: 32, shared: 101377 },
      { blocks: 0, warps: 0, limit: 'shared memory' },
    ],
    [
      'sm_90',
      { threads: 128, registers: 32, shared: 65536 },
      { blocks: 3, warps: 12, limit: 'shared memory' },
    ],
  ] as const)('on %s of %o', (target, kernel, expected) => {
    expect(occupancy(target, kernel)).toEqual(expected)
  })
})

describe('what the assembler says', () => {
  it('is read a kernel at a time', () => {
    const text = `ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'plain' for 'sm_80'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 94 registers, used 1 barriers, 1024 bytes smem, 464 bytes cmem[0]
ptxas info    : Compiling entry function 'spilling' for 'sm_80'
ptxas info    : Function properties for helper
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for spilling
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, 464 bytes cmem[0]`
    expect(Object.fromEntries(parseUsage(text))).toEqual({
      plain: { registers: 94, shared: 1024, stack: 0, spills: 0 },
      spilling: { registers: 255, shared: 0, stack: 24, spills: 32 },
    })
  })
  it('has launch bounds where the PTX has them', () => {
    const ptx =
      '.visible .entry one(\n)\n.maxntid 128, 2, 1\n{\n}\n.entry two()\n{\n}\n.entry three()\n.reqntid 64\n'
    expect(Object.fromEntries(parseBounds(ptx))).toEqual({ one: 256, three: 64 })
  })
})

describe('PTX', () => {
  it('has innermost loops with the arithmetic', () => {
    const product = 'mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1};'
    const ptx = [
      '.visible .entry one(', // 1
      '$L__BB0_1:',
      '$L__BB0_2:', // 3
      `\t${product}`,
      '\t@%p1 bra \t$L__BB0_2;', // 5
      '\tbra.uni \t$L__BB0_1;',
      '$L__BB0_3:', // 7
      '\t@%p2 bra \t$L__BB0_3;',
      '.visible .entry two(', // 9
      '$L__BB1_1:',
      ...Array.from({ length: 8 }, () => '\tfma.rn.f32 \t%f1, %f2, %f3, %f1;'),
      '\t@%p1 bra \t$L__BB1_1;', // 19
      '.visible .entry three(',
      `\t${product}`,
    ].join('\n')
    expect(Object.fromEntries(parseHotLines(ptx))).toEqual({ one: [[3, 5]], two: [[10, 19]], three: [] })
  })
})

const LAUNCH: Launch = {
  kernel: 'copy',
  grid: [10, 2, 1],
  block: [256, 1, 1],
  dynamicShared: 0,
  error: 0,
  blocksRun: 5,
  warpInstructions: 100,
  byClass: { bar: 3 },
  tensorFlops: 10,
  globalSectorsRequested: 20,
  globalSectorsTouched: 30,
  sharedAccesses: 40,
  sharedConflictCycles: 4,
  conflictsByLine: { 7: 3, 20: 1 },
  barriers: 1,
}

describe('counters', () => {
  it('of a sample stand for the grid', () => {
    const whole = { ...LAUNCH, blocksRun: 20 }
    expect(totals([LAUNCH, whole])).toEqual({
      warpInstructions: 500,
      byClass: { bar: 15 },
      tensorFlops: 50,
      sectorsRequested: 100,
      sectorsTouched: 150,
      sharedAccesses: 200,
      conflictCycles: 20,
    })
    expect(leastSectors(33)).toBe(2)
    expect(conflictsWithin(LAUNCH, [[5, 10]])).toBe(3 / 44)
  })
})

describe('cases', () => {
  it('have names of their own and some work', () => {
    expect(new Set(CASES.map(caseKey)).size).toBe(CASES.length)
    for (const { work } of CASES) expect(work.bytes).toBeGreaterThan(0)
  })
  it('count bytes and FLOP of the formula', () => {
    const down = CASES.find(one => one.name.startsWith('Gemma-2B down, decode 8, 8×2048×16384'))!
    expect(down.work).toEqual({
      bytes: 2 * (8 * 16384 + 2048 * 16384 + 2 * 8 * 2048),
      tensorFlops: 2 * 8 * 2048 * 16384,
    })
    const clip = CASES.find(one => one.op === 'attention')!
    expect(clip.work).toEqual({ bytes: 4 * 2 * 577 * 1024, tensorFlops: 4 * 577 * 577 * 1024 })
  })
})

describe('the report', () => {
  it('bounds an operation by memory or by arithmetic, whichever takes longer', () => {
    const a100 = GPUS[0]!
    expect(roofline(a100, { bytes: 2039e9, tensorFlops: 312e9 })).toEqual({ seconds: 1, bound: 'memory' })
    expect(roofline(a100, { bytes: 2039e3, tensorFlops: 312e12 })).toEqual({ seconds: 1, bound: 'tensor' })
  })

  const usage = { registers: 32, shared: 0, stack: 0, spills: 0 }
  const made = (kernel: string, stall: number) => ({
    family: 'linear',
    kernel,
    maxThreads: 256,
    hotLines: [[5, 10] as const],
    usage: { sm_80: usage },
    code: {
      instructions: 4,
      localAccesses: 0,
      loop: { ...innermostLoop(parseSass(SASS).get('product')!)!, stall },
    },
  })
  const [product] = CASES.filter(one => one.peers?.includes('matmul_128x128x32'))
  const launch: Launch = { ...LAUNCH, kernel: 'ours', conflictsByLine: { 20: 4 } }
  const report = (ours: Parameters<typeof kernelRow>[0], launches = [launch]): Report => ({
    date: '2026-01-01T00:00:00Z',
    commit: 'abc',
    triton: '3',
    sample: 5,
    disassembler: true,
    kernels: [kernelRow(ours, launches)],
    cases: [caseRow(product!, { key: caseKey(product!), launches }, [ours])],
    peers: [
      {
        name: 'matmul_128x128x32',
        op: 'linear',
        work: product!.work,
        kernel: kernelRow(made('matmul', 20), [LAUNCH]),
        launch: LAUNCH,
        totals: totals([LAUNCH]),
      },
    ],
  })

  it('names what falls short, and only that', () => {
    expect(shortfalls(report(made('ours', 20)))).toEqual([])
    expect(shortfalls(report(made('ours', 25)))).toEqual([
      `${caseKey(product!)}: 12.5 stall cycles a tensor core instruction in ours, 10.0 in Triton's matmul_128x128x32`,
    ])
    const spilling = { ...made('ours', 20), usage: { sm_80: { ...usage, spills: 8 } } }
    expect(shortfalls(report(spilling))).toEqual(['ours spills 8 bytes (sm_80)'])
    const [conflict] = shortfalls(report(made('ours', 20), [{ ...launch, conflictsByLine: { 6: 11 } }]))
    expect(conflict).toMatch(/conflicts in the inner loop of ours, 25 % of its shared memory cycles/)
    const [streaming] = CASES.filter(one => one.op === 'cast')
    const row = caseRow(streaming!, { key: 'cast', launches: [{ ...LAUNCH, globalSectorsTouched: 1e6 }] }, [])
    expect(shortfalls({ ...report(made('ours', 20)), cases: [row] })[0]).toMatch(/times the least sectors/)
    const failed = caseRow(product!, { key: 'x', launches: [], error: 'no kernel yet' }, [])
    expect(shortfalls({ ...report(made('ours', 20)), cases: [failed] })[0]).toMatch(/no kernel yet/)
  })

  it('holds norms to the least for their number of blocks, and says how many would meet the other', () => {
    const norm = {
      ...CASES.find(one => one.op === 'layerNorm')!,
      work: { bytes: 64000, sharedBytes: 1600, tensorFlops: 0 },
    }
    const of = (sectors: number) => {
      const launches = [
        { ...LAUNCH, grid: [5, 1, 1] as [number, number, number], globalSectorsTouched: sectors },
      ]
      return { ...report(made('ours', 20)), cases: [caseRow(norm, { key: 'norm', launches }, [])] }
    }
    // 2000 sectors at least, 2200 for five blocks.
    expect(sharedReads(of(2200))).toEqual([
      `${caseKey(norm)}: 1.100 times the least sectors, 1.000 times the least for 5 blocks; ` +
        'to stay within 1.05 of the former it would have to run on 3 multiprocessors instead of 5',
    ])
    expect(shortfalls(of(2200))).toEqual([])
    expect(sharedReads(of(2350))).toEqual([])
    expect(shortfalls(of(2350))[0]).toMatch(/1\.175 times the least sectors/)
    expect(sharedReads(of(2050))).toEqual([])
  })

  it('draws bars of both', () => {
    const svg = picture(report(made('ours', 20)))
    expect(svg).toContain('Triton matmul_128x128x32')
    expect(svg).toContain('>10.00<')
  })

  it('aligns its tables', () => {
    expect(table(['name', 'n'], [['a', '12.5']], 1)).toBe('| name |    n |\n| ---- | ---: |\n| a    | 12.5 |')
  })
})
