// What the machine code says about speed without a GPU: the stall counts that the assembler wrote into every
// instruction, summed over the innermost loop that holds the tensor core work (or, without any, the FMAs).

/** One machine instruction of `nvdisasm -hex -c`. */
export interface Instruction {
  address: number
  /** With modifiers: HMMA.16816.F32.BF16. */
  opcode: string
  /** Cycles before the warp's next instruction may issue, at least. */
  stall: number
  /** Of a branch: where it leads. */
  target?: number
}

/** The instructions of every kernel, by name. */
export function parseSass(text: string): Map<string, Instruction[]> {
  const functions = new Map<string, Instruction[]>()
  let current: { label: string; instruction: Instruction }[] = []
  let labels = new Map<string, number>()
  let waiting: string[] = []
  let name: string | undefined
  const finish = () => {
    if (name === undefined) return
    for (const { label, instruction } of current) {
      const target = labels.get(label)
      if (target !== undefined) instruction.target = target
    }
    functions.set(
      name,
      current.map(({ instruction }) => instruction),
    )
  }
  let last: Instruction | undefined
  for (const line of text.split('\n')) {
    const section = /^\.text\.(\w+):/.exec(line)
    if (section) {
      finish()
      name = section[1]!
      current = []
      labels = new Map()
      waiting = []
      last = undefined
      continue
    }
    const label = /^(\.L_\w+):/.exec(line)
    if (label) waiting.push(label[1]!)
    const code =
      /^\s+\/\*([0-9a-f]{4,})\*\/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);\s+\/\* 0x[0-9a-f]{16} \*\//.exec(
        line,
      )
    if (code) {
      const [, address, opcode, operands] = code
      last = { address: Number.parseInt(address!, 16), opcode: opcode!, stall: 0 }
      for (const at of waiting) labels.set(at, last.address)
      waiting = []
      const to =
        opcode === 'BRA' || opcode!.startsWith('BRA.') ? /`\((\.L_\w+)\)/.exec(operands!)?.[1] : undefined
      current.push({ label: to ?? '', instruction: last })
      continue
    }
    const second = /^\s+\/\* 0x([0-9a-f]{16}) \*\/\s*$/.exec(line)
    if (second && last) {
      last.stall = Number((BigInt(`0x${second[1]}`) >> 41n) & 0xfn)
      last = undefined
    }
  }
  finish()
  return functions
}

/** A loop's body: from the target of a backward branch to that branch. */
export interface Loop {
  first: number
  last: number
  instructions: number
  /** Sum of the stall counts: the fewest cycles that one warp needs for a turn. */
  stall: number
  /** Tensor core instructions, and how long they occupy the tensor core of an A100's sub-core. */
  tensor: number
  tensorCycles: number
  fma: number
  mufu: number
  sharedLoads: number
  barriers: number
}

const TENSOR = /^[HIQ]MMA\b/
const FMA = /^(FFMA|HFMA2|DFMA)\b/

/** Cycles of a sub-core's tensor core on sm_80, at 1024 FLOP (2048 of integers) a cycle and multiprocessor quarter. */
function tensorCycles(opcode: string): number {
  const shape = /^[HIQ]MMA\.(?:SP\.)?(\d+)/.exec(opcode)?.[1]
  const cycles = { '16816': 8, '1688': 4, '16832': 8, '8816': 4 }[shape ?? '']
  if (cycles === undefined)
    throw new Error(`expected a known shape of tensor core instruction but received ${opcode}`)
  return cycles
}

/** Every loop of a kernel, as spans between backward branches and their targets. */
export function loops(code: readonly Instruction[]): Loop[] {
  const spans = code
    .filter(({ target, address }) => target !== undefined && target < address)
    .map(({ target, address }) => body(code, target!, address))
  // Several branches back to one head are one loop.
  const byHead = new Map<number, Loop>()
  for (const span of spans) {
    const other = byHead.get(span.first)
    if (!other || other.last < span.last) byHead.set(span.first, span)
  }
  return [...byHead.values()]
}

function body(code: readonly Instruction[], first: number, last: number): Loop {
  const inside = code.filter(({ address }) => address >= first && address <= last)
  const count = (pattern: RegExp) => inside.filter(({ opcode }) => pattern.test(opcode)).length
  const tensor = inside.filter(({ opcode }) => TENSOR.test(opcode))
  return {
    first,
    last,
    instructions: inside.length,
    stall: inside.reduce((sum, { stall }) => sum + stall, 0),
    tensor: tensor.length,
    tensorCycles: tensor.reduce((sum, { opcode }) => sum + tensorCycles(opcode), 0),
    fma: count(FMA),
    mufu: count(/^MUFU\b/),
    sharedLoads: count(/^LDSM?\b/),
    barriers: count(/^BAR\b/),
  }
}

/**
 * The innermost loop that does the kernel's arithmetic: of those that hold tensor core instructions and no smaller loop
 * that does, the one with most of them, and of equals the shortest (the path without masks). Kernels without any: the
 * same with FMAs, at least eight.
 */
export function innermostLoop(code: readonly Instruction[]): Loop | undefined {
  const all = loops(code)
  const hot = (work: (loop: Loop) => number, least: number) =>
    all
      .filter(loop => work(loop) >= least)
      .filter(
        loop =>
          !all.some(
            inner =>
              inner !== loop && inner.first >= loop.first && inner.last <= loop.last && work(inner) >= least,
          ),
      )
      .sort((a, b) => work(b) - work(a) || a.stall - b.stall)[0]
  return hot(loop => loop.tensor, 1) ?? hot(loop => loop.fma, 8)
}

/** Local memory instructions: what spills and indexed arrays become. */
export function localAccesses(code: readonly Instruction[]): number {
  return code.filter(({ opcode }) => /^(LDL|STL)\b/.test(opcode)).length
}
