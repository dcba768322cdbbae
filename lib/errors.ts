/** Stable identifiers of everything that can go wrong; messages may change, codes do not. */
export type MgmErrorCode =
  | 'INVALID_ARGUMENT' // a value handed to the API is of the wrong type, range or shape
  | 'CHECKPOINT_INVALID' // a checkpoint file is missing, truncated, malformed or does not fit its config
  | 'CHECKPOINT_UNSUPPORTED' // a well-formed checkpoint of a kind this version does not run
  | 'IMAGE_INVALID' // an image cannot be read, decoded or is over a limit
  | 'TOKENIZER_INVALID' // tokenizer files are missing, malformed or of an unsupported kind
  | 'DOWNLOAD_FAILED' // a hub or https download failed
  | 'CONTEXT_OVERFLOW' // the prompt does not fit the model's context or the KV cache
  | 'OUT_OF_MEMORY' // memory needed exceeds what is free or allowed
  | 'DEVICE_UNAVAILABLE' // no usable device of the asked kind
  | 'DEVICE_LOST' // the GPU's context died; close the device and open it again
  | 'NATIVE_UNAVAILABLE' // the addon cannot be loaded on this platform
  | 'NUMERIC' // the model produced NaN where a number is required
  | 'UNSUPPORTED' // a valid request for something this version does not do
  | 'ABORTED' // cancelled by the caller's AbortSignal
  | 'QUEUE_FULL' // backpressure: try again later
  | 'CLOSED' // the object was closed
  | 'INTERNAL' // a bug in this library

/** The one error class of the library. `code` is stable, `message` says what was wrong, where, and what would fix it. */
export class MgmError extends Error {
  readonly code: MgmErrorCode
  constructor(code: MgmErrorCode, message: string, options?: ErrorOptions) {
    super(message, options)
    this.name = 'MgmError'
    this.code = code
  }
}

/** Builds the message used at every edge: `expected … for … but received …`. */
export function expected(what: string, name: string, received: unknown): MgmError {
  return new MgmError('INVALID_ARGUMENT', `expected ${what} for ${name} but received ${describe(received)}`)
}

/** A short, safe rendering of any value for an error message. */
export function describe(value: unknown): string {
  if (typeof value === 'string') return JSON.stringify(value.length > 80 ? `${value.slice(0, 77)}...` : value)
  if (value === null || value === undefined || typeof value !== 'object') return String(value)
  if (Array.isArray(value))
    return value.length <= 8 && value.every(v => typeof v === 'number')
      ? `[${value.join(', ')}]`
      : `an array of ${value.length}`
  return `an instance of ${value.constructor?.name ?? 'Object'}`
}

/** Throws the `ABORTED` error if the signal has fired. */
export function throwIfAborted(signal: AbortSignal | undefined): void {
  if (signal?.aborted) throw new MgmError('ABORTED', 'the operation was aborted', { cause: signal.reason })
}
