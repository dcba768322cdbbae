import type { TensorFile } from '../../lib/checkpoint/safetensors.ts'
import { type ByteSource, BytesSource } from '../../lib/checkpoint/source.ts'
import { MgmError } from '../../lib/errors.ts'
import { random } from '../helpers/random.ts'

export interface FuzzResult {
  accepted: number
  refused: number
  /** Milliseconds of processor time of the slowest input. */
  slowest: number
  /** Outcomes that must never be: other exceptions, and tensors outside the file. */
  bugs: string[]
}

/** Parses `rounds` mutations of `bytes`; mutations fall between the offsets of one of `regions`. */
export function fuzz(
  parse: (source: ByteSource, file: string) => TensorFile,
  bytes: Uint8Array,
  regions: readonly (readonly [number, number])[],
  rounds: number,
  seed: number,
): FuzzResult {
  const next = random(seed)
  const original = Uint8Array.from(bytes) // A Buffer's slice() would share its memory.
  const result: FuzzResult = { accepted: 0, refused: 0, slowest: 0, bugs: [] }
  for (let round = 0; round < rounds; round++) {
    let mutant: Uint8Array = original
    for (let edits = 1 + next(3); edits > 0; edits--)
      mutant = mutate(mutant, regions[next(regions.length)]!, next)
    const start = process.cpuUsage()
    try {
      for (const entry of parse(new BytesSource(mutant, 'mutant'), 'mutant').tensors.values()) {
        const inside =
          entry.offset >= 0 && entry.byteLength >= 0 && entry.offset + entry.byteLength <= mutant.length
        if (!inside)
          result.bugs.push(
            `round ${round}: ${entry.name} at ${entry.offset} + ${entry.byteLength} of ${mutant.length}`,
          )
      }
      result.accepted++
    } catch (error) {
      if (error instanceof MgmError && /^CHECKPOINT_/.test(error.code)) result.refused++
      else result.bugs.push(`round ${round}: ${(error as Error).stack}`)
    }
    const { user, system } = process.cpuUsage(start)
    result.slowest = Math.max(result.slowest, (user + system) / 1000)
  }
  return result
}

const EXTREMES = [0, 1, 0x7f, 0x80, 0xff]

function mutate(
  bytes: Uint8Array,
  [from, to]: readonly [number, number],
  next: (below: number) => number,
): Uint8Array {
  const at = Math.min(from + next(Math.max(1, to - from)), bytes.length)
  switch (next(6)) {
    case 0: {
      const copy = bytes.slice()
      if (at < copy.length) copy[at]! ^= 1 << next(8)
      return copy
    }
    case 1: {
      const copy = bytes.slice()
      copy[at] = next(256)
      return copy
    }
    case 2: {
      const copy = bytes.slice()
      copy.fill(EXTREMES[next(EXTREMES.length)]!, at, at + 1 + next(8))
      return copy
    }
    case 3: // Insert.
      return splice(
        bytes,
        at,
        0,
        Uint8Array.from({ length: 1 + next(8) }, () => next(256)),
      )
    case 4: // Delete.
      return splice(bytes, at, 1 + next(8), new Uint8Array(0))
    default: // Repeat a piece somewhere else, or cut off the end now and then.
      if (next(8) === 0) return bytes.slice(0, at)
      return splice(
        bytes,
        at,
        0,
        bytes.slice(from + next(Math.max(1, to - from)), from + next(Math.max(1, to - from)) + 8),
      )
  }
}

function splice(bytes: Uint8Array, at: number, remove: number, insert: Uint8Array): Uint8Array {
  const end = Math.min(bytes.length, at + remove)
  const result = new Uint8Array(at + insert.length + bytes.length - end)
  result.set(bytes.subarray(0, at))
  result.set(insert, at)
  result.set(bytes.subarray(end), at + insert.length)
  return result
}
