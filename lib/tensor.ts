import { expected, MgmError } from './errors.ts'
import type { NativeTensor } from './native.ts'

/** Element types. `int8` and `int4` are block-quantized storage of packed weights, never of activations. */
export type DType = 'f32' | 'bf16' | 'f16' | 'i32' | 'u8' | 'int8' | 'int4'
/** `panels` and `gated_panels`: a weight matrix in the backend's own order, made by `packLinear`. */
export type Layout = 'strided' | 'panels' | 'gated_panels'
export type TensorData = Float32Array | Int32Array | Uint16Array | Uint8Array

let currentScope: Set<Tensor> | undefined

/**
 * Memory of a device with a shape. Operations on it are enqueued on its device and return at once; only `read` waits.
 *
 * A tensor made inside `device.scope` is freed at the scope's end unless it is returned; any other is freed by
 * `dispose`. Freeing is ordered with the device's work: what has been enqueued still sees the data.
 */
export class Tensor {
  readonly handle: NativeTensor
  readonly shape: readonly number[]
  readonly dtype: DType
  readonly layout: Layout
  #disposed = false

  /** Wraps a native handle and enters it in the current scope. For use by device.ts and ops.ts. */
  constructor(handle: NativeTensor) {
    this.handle = handle
    this.shape = handle.shape
    this.dtype = handle.dtype
    this.layout = handle.layout
    currentScope?.add(this)
  }

  get rank(): number {
    return this.shape.length
  }
  /** Number of elements. */
  get size(): number {
    return this.shape.reduce((a, b) => a * b, 1)
  }
  /** Bytes of this tensor's own elements (of the packed form, for packed weights). */
  get byteLength(): number {
    return this.handle.byteLength
  }
  get disposed(): boolean {
    return this.#disposed
  }

  /** A view of `length` entries from `start` along `dim` (negative counts from the end). Shares memory. */
  narrow(dim: number, start: number, length: number): Tensor {
    return new Tensor(this.alive().handle.narrow(dim < 0 ? dim + this.rank : dim, start, length))
  }

  /** A view with another shape of the same size; one entry may be -1. Throws if strides make that impossible. */
  reshape(...shape: number[]): Tensor {
    return new Tensor(this.alive().handle.reshape(shape))
  }

  /** Resolves to a copy of the data after all work enqueued so far. bf16 and f16 come as raw bits in a Uint16Array. */
  async read(): Promise<TensorData> {
    return this.alive().handle.read()
  }

  /** `read` for f32 tensors. */
  async readF32(): Promise<Float32Array> {
    if (this.dtype !== 'f32') throw expected('an f32 tensor', 'readF32', this.dtype)
    return (await this.read()) as Float32Array
  }

  /** Overwrites the (contiguous) tensor after all work enqueued so far; `data` is copied before the call returns. */
  write(data: TensorData): void {
    this.alive().handle.write(data)
  }

  dispose(): void {
    if (this.#disposed) return
    this.#disposed = true
    currentScope?.delete(this)
    this.handle.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  /** This tensor, or an error if it has been disposed. */
  alive(): this {
    if (this.#disposed)
      throw new MgmError(
        'INVALID_ARGUMENT',
        `expected a live tensor but received a disposed one of shape [${this.shape}]`,
      )
    return this
  }
}

/**
 * Runs `body` and frees every tensor made inside it except those in what it returns (tensors, or arrays and plain
 * objects of them, at any depth). Scopes nest; what is returned belongs to the enclosing scope.
 */
export function scope<T>(body: () => T): T {
  const outer = currentScope
  const mine = new Set<Tensor>()
  currentScope = mine
  let result: T
  try {
    result = body()
    if (result instanceof Promise)
      throw new MgmError(
        'INVALID_ARGUMENT',
        'expected a synchronous function for scope but received one that returns a promise',
      )
    keep(result, mine, outer)
  } finally {
    currentScope = outer
    for (const tensor of mine) tensor.dispose()
  }
  return result
}

function keep(value: unknown, mine: Set<Tensor>, outer: Set<Tensor> | undefined): void {
  if (value instanceof Tensor) {
    if (mine.delete(value)) outer?.add(value)
  } else if (Array.isArray(value)) {
    for (const item of value) keep(item, mine, outer)
  } else if (value !== null && typeof value === 'object') {
    const prototype = Object.getPrototypeOf(value)
    if (prototype === Object.prototype || prototype === null)
      for (const item of Object.values(value)) keep(item, mine, outer)
  }
}
