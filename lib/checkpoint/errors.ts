import { describe, MgmError } from '../errors.ts'

/** A checkpoint file that is missing, truncated, malformed or contradicts its config. */
export function invalid(message: string, cause?: unknown): MgmError {
  return new MgmError('CHECKPOINT_INVALID', message, cause === undefined ? undefined : { cause })
}

/** A well-formed file of a kind that is not run. */
export function unsupported(message: string, cause?: unknown): MgmError {
  return new MgmError('CHECKPOINT_UNSUPPORTED', message, cause === undefined ? undefined : { cause })
}

/** `expected … for … in <file> but received …`, the form of every complaint about a value in a file. */
export function invalidValue(file: string, what: string, name: string, received: unknown): MgmError {
  return invalid(`expected ${what} for ${name} in ${file} but received ${describe(received)}`)
}

/** `[2, 3]`, with `*` for a dimension that may have any size. */
export function shapeText(shape: readonly (number | null)[]): string {
  return `[${shape.map(n => n ?? '*').join(', ')}]`
}
