import { availableParallelism } from 'node:os'
import { expected, MgmError } from './errors.ts'
import {
  type NativeDevice,
  type NativeGraph,
  type NativeMappedFile,
  type NativeMemory,
  native,
} from './native.ts'
import { type DType, scope, Tensor, type TensorData } from './tensor.ts'

export interface DeviceOptions {
  /** Threads that compute, the calling one not counted. Default: the cores this process may use. */
  threads?: number
  /** Most bytes that tensors may occupy; 0 (default): no limit. */
  memoryLimit?: number
}

const arrayOf = {
  f32: Float32Array,
  i32: Int32Array,
  bf16: Uint16Array,
  f16: Uint16Array,
  u8: Uint8Array,
} as const

/** A recorded sequence of ops; its results are written into the tensors that the recording returned. */
export class Graph<T> {
  readonly outputs: T
  readonly #graph: NativeGraph
  constructor(graph: NativeGraph, outputs: T) {
    this.#graph = graph
    this.outputs = outputs
  }
  /** Enqueues the recorded ops again, over the same memory. */
  replay(): void {
    this.#graph.replay()
  }
  /** Number of ops recorded. */
  get length(): number {
    return this.#graph.length
  }
  dispose(): void {
    this.#graph.dispose()
  }
}

/** Where tensors live and ops run, in the order they are called. Belongs to the thread (environment) that opened it. */
export class Device {
  readonly name: string
  readonly #native: NativeDevice
  #closing: Promise<void> | undefined

  private constructor(name: string, device: NativeDevice) {
    this.name = name
    this.#native = device
  }

  /**
   * Opens `'cpu'`, `'cuda'` (the first GPU) or `'cuda:N'`. Throws DEVICE_UNAVAILABLE, saying what was found and what is
   * required, where there is no such GPU, no driver, or a build without CUDA.
   */
  static open(name = 'cpu', options: DeviceOptions = {}): Device {
    const { threads = availableParallelism(), memoryLimit = 0 } = options
    if (!Number.isInteger(threads) || threads < 1 || threads > 1024)
      throw expected('an integer from 1 to 1024', 'threads', threads)
    if (!Number.isFinite(memoryLimit) || memoryLimit < 0)
      throw expected('a number of bytes', 'memoryLimit', memoryLimit)
    const gpu = /^cuda(?::(\d{1,3}))?$/.exec(name)
    if (gpu) return new Device(name, openCuda(name, Number(gpu[1] ?? 0), memoryLimit))
    if (name !== 'cpu') throw expected("'cpu', 'cuda' or 'cuda:N'", 'device', name)
    return new Device(name, native().openCpu({ threads, memoryLimit }))
  }

  /** Threads that compute; on a GPU its multiprocessors. */
  get threads(): number {
    return this.#native.threads
  }
  /** Instruction set the kernels were chosen for: avx2, ... on the CPU, sm_80, ... on a GPU. */
  get isa(): string {
    return this.#native.isa
  }
  get closed(): boolean {
    return this.#closing !== undefined
  }

  /** A tensor with a copy of `data`. dtype defaults to the array's (Uint16Array needs one: 'bf16' or 'f16'). */
  tensor(data: TensorData | readonly number[], shape: readonly number[], dtype?: DType): Tensor {
    const type = dtype ?? (data instanceof Int32Array ? 'i32' : data instanceof Uint8Array ? 'u8' : 'f32')
    const tensor = this.empty(shape, type)
    if (tensor.size > 0)
      tensor.write(
        Array.isArray(data) ? new arrayOf[type as keyof typeof arrayOf](data) : (data as TensorData),
      )
    else if (data.length > 0) throw expected('no data', `a tensor of shape [${shape}]`, data)
    return tensor
  }

  /** A tensor of undefined contents. */
  empty(shape: readonly number[], dtype: DType = 'f32'): Tensor {
    return new Tensor(this.#native.empty([...shape], dtype))
  }

  zeros(shape: readonly number[], dtype: 'f32' | 'bf16' | 'f16' | 'i32' | 'u8' = 'f32'): Tensor {
    const tensor = this.empty(shape, dtype)
    if (tensor.size > 0) tensor.write(new arrayOf[dtype](tensor.size))
    return tensor
  }

  /** A tensor over bytes of a mapped file; no copy is made where the offset is aligned for its dtype. */
  fromFile(file: MappedFile, offset: number, shape: readonly number[], dtype: DType): Tensor {
    return new Tensor(this.#native.fromFile(file.handle, offset, [...shape], dtype))
  }

  /** See {@link scope}. */
  scope<T>(body: () => T): T {
    return scope(body)
  }

  /**
   * Records the ops that `body` calls, without running them. `replay` runs them over the same memory: inputs are
   * updated with `write` before a replay. Reading and writing inside `body` throws.
   */
  capture<T>(body: () => T): Graph<T> {
    this.#native.beginCapture()
    let outputs: T
    try {
      outputs = scope(body)
    } catch (error) {
      this.#native.abortCapture()
      throw error
    }
    return new Graph(this.#native.endCapture(), outputs)
  }

  /** Resolves when all work enqueued so far is done; rejects with the first error among it. */
  async synchronize(): Promise<void> {
    await this.#native.synchronize()
  }

  memory(): NativeMemory {
    return this.#native.memory()
  }

  /** Gives pooled memory that no tensor uses back to the system. */
  trim(): void {
    this.#native.trim()
  }

  /** Finishes the enqueued work and frees everything; tensors of the device become unusable. */
  close(): Promise<void> {
    this.#closing ??= this.#native.close()
    return this.#closing
  }
}

function openCuda(name: string, index: number, memoryLimit: number): NativeDevice {
  try {
    return native().openCuda({ index, memoryLimit })
  } catch (cause) {
    if (!(cause instanceof MgmError) || cause.code !== 'DEVICE_UNAVAILABLE') throw cause
    throw new MgmError(
      'DEVICE_UNAVAILABLE',
      `device ${JSON.stringify(name)} is not available: ${cause.message}`,
      { cause },
    )
  }
}

/**
 * `source` (contiguous) on another GPU: a new tensor on `device`, ordered with the work of both devices.
 * Throws INVALID_ARGUMENT unless both are CUDA devices.
 */
export function copyTo(source: Tensor, device: Device): Tensor {
  const copy = device.empty(source.shape, source.dtype)
  try {
    native().copyBetween(source.alive().handle, copy.handle)
  } catch (error) {
    copy.dispose()
    throw error
  }
  return copy
}

/** A read-only memory mapping of a file. */
export class MappedFile {
  readonly handle: NativeMappedFile
  readonly path: string
  constructor(path: string) {
    this.path = path
    this.handle = native().mapFile(path)
  }
  get size(): number {
    return this.handle.size
  }
  /** Drops this handle; the mapping lives on while tensors use it. */
  close(): void {
    this.handle.close()
  }
}
