/**
 * What a kernel takes on a target; bytes, but for registers.
 * @typedef {{ registers: number, shared: number, stack: number, spills: number }} Usage
 */

/**
 * { kernel: usage } of what `ptxas -v` printed.
 * @param {string} said
 * @returns {Map<string, Usage>}
 */
export function parseUsage(said) {
  const kernels = new Map()
  let usage = { registers: 0, shared: 0, stack: 0, spills: 0 }
  for (const line of said.split('\n')) {
    const entry = /Compiling entry function '(\w+)'/.exec(line)
    if (entry) {
      usage = { registers: 0, shared: 0, stack: 0, spills: 0 }
      kernels.set(entry[1], usage)
    }
    // One such line for the kernel, and one for each function that was not inlined.
    const frame = /(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads/.exec(line)
    if (frame) {
      usage.stack += Number(frame[1])
      usage.spills += Number(frame[2]) + Number(frame[3])
    }
    const registers = /Used (\d+) registers/.exec(line)
    if (registers) {
      usage.registers = Number(registers[1])
      usage.shared = Number(/(\d+) bytes smem/.exec(line)?.[1] ?? 0)
    }
  }
  return kernels
}
