import type { HiddenAct } from '../checkpoint/config.ts'
import { permutation, type TensorMap, type WeightDType, type WeightEntry } from '../checkpoint/tensor-map.ts'
import { Device, MappedFile } from '../device.ts'
import { MgmError, throwIfAborted } from '../errors.ts'
import { type Activation, type ActivationType, cast, embedding, packLinear, permute } from '../ops.ts'
import { scope, type Tensor } from '../tensor.ts'

/** Where a network asks for its weights: a `TensorMap`, or a part of one. */
export type Weights = Pick<TensorMap, 'take'>

export interface LoadProgress {
  phase: 'load'
  /** Bytes of the checkpoint that are in the device's own form. */
  loaded: number
  total: number
}

export interface LoaderOptions {
  /** Storage of matrices. Default: each as its file stores it. */
  dtype?: WeightDType | undefined
  /** What the networks compute in. Default 'f32'; another type is the storage of matrices too, as matrix units want it. */
  activations?: ActivationType | undefined
  /** Storage of the matrices that a network marks as quantizable. Default: like the others. */
  quantize?: 'int8' | 'int4' | undefined
  /** Bytes of everything that may be loaded, for `onProgress`. */
  totalBytes?: number | undefined
  onProgress?: ((progress: LoadProgress) => void) | undefined
  signal?: AbortSignal | undefined
}

/** What loaders beside each other have opened together. */
interface Counts {
  readonly seen: WeakSet<WeightEntry>
  loaded: number
  sinceLastPause: number
}

// A pause costs one turn of the event loop; work between two is bounded by it.
const BYTES_BETWEEN_PAUSES = 64 * 2 ** 20

/**
 * Brings tensors of a checkpoint into the form that models compute with, and owns the results: `dispose` frees all of
 * them. Data goes from the mapped file to the device; only folded weights (`fold`) pass through JavaScript.
 */
export class Loader {
  readonly device: Device
  readonly dtype: WeightDType | undefined
  readonly activations: ActivationType
  readonly quantize: 'int8' | 'int4' | undefined
  readonly #options: LoaderOptions
  readonly #files = new Map<string, MappedFile>()
  readonly #owned: Tensor[] = []
  #host: Device | undefined
  readonly #beside: Loader[] = []
  readonly #counts: Counts

  constructor(
    device: Device,
    options: LoaderOptions = {},
    counts: Counts = { seen: new WeakSet(), loaded: 0, sinceLastPause: 0 },
  ) {
    this.#counts = counts
    this.device = device
    this.dtype = options.dtype
    this.activations = options.activations ?? 'f32'
    this.quantize = options.quantize
    this.#options = options
  }

  /** A loader for another device or type of activations, whose progress, end and tensors are a part of this one's. */
  beside(device: Device, activations = this.activations): Loader {
    const loader = new Loader(device, { ...this.#options, activations }, this.#counts)
    this.#beside.push(loader)
    return loader
  }

  /** Bytes on the device (or devices) of everything loaded so far. */
  get byteLength(): number {
    const own = this.#owned.reduce((sum, tensor) => sum + tensor.byteLength, 0)
    return this.#beside.reduce((sum, loader) => sum + loader.byteLength, own)
  }

  /** The tensor in its file's own type, over the mapped file where alignment allows. Call it inside `build`. */
  tensor(entry: WeightEntry): Tensor {
    return this.#open(entry, this.device)
  }

  #open(entry: WeightEntry, device: Device): Tensor {
    const { dtype, shape, strides } = entry
    let file = this.#files.get(entry.file)
    if (!file) {
      file = new MappedFile(entry.file)
      this.#files.set(entry.file, file)
    }
    const counts = this.#counts
    if (!counts.seen.has(entry)) {
      counts.seen.add(entry)
      counts.loaded += entry.byteLength
      counts.sinceLastPause += entry.byteLength
    }
    if (!strides) return device.fromFile(file, entry.offset, shape, dtype)

    const stored = permutation(entry)
    if (!stored)
      throw new MgmError(
        'CHECKPOINT_UNSUPPORTED',
        `expected a dense tensor for "${entry.name}" in ${entry.file} but found strides [${strides}] of shape [${shape}]`,
      )
    return permute(device.fromFile(file, entry.offset, stored.shape, dtype), stored.dims)
  }

  /** What `body` returns, kept until `dispose`; everything else made in it is freed. */
  build(body: () => Tensor): Tensor {
    const tensor = scope(body)
    this.#owned.push(tensor)
    return tensor
  }

  /** As f32: norms, biases and other small vectors. */
  f32(entry: WeightEntry): Tensor {
    return this.build(() => cast(this.tensor(entry), 'f32'))
  }

  /** As an activation: position embeddings and other rows that are added or spliced in. */
  activation(entry: WeightEntry): Tensor {
    return this.build(() => cast(this.tensor(entry), this.activations))
  }

  /**
   * A weight that is a product of others, computed in f32 on the CPU whatever the device is: `body` gets each factor as
   * f32 there. The result is an ordinary f32 tensor of this loader's device, to be used inside `build`.
   */
  async fold(body: (f32: (entry: WeightEntry) => Tensor, host: Device) => Tensor): Promise<() => Tensor> {
    const host = this.#cpu()
    const folded = host.scope(() => body(entry => cast(this.#open(entry, host), 'f32'), host))
    const { shape } = folded
    const data = await folded.readF32()
    folded.dispose()
    return () => this.device.tensor(data, shape)
  }

  #cpu(): Device {
    if (this.device.name === 'cpu') return this.device
    this.#host ??= Device.open('cpu')
    return this.#host
  }

  /** Several vectors [N_i] as one f32 [ΣN_i]: the bias of a fused matrix. */
  async concat(entries: readonly WeightEntry[]): Promise<Tensor> {
    if (entries.length === 1) return this.f32(entries[0]!)
    const stacked = await this.fold((f32, host) =>
      stackRows(
        host,
        entries.map(entry => f32(entry).reshape(-1, 1)),
      ).reshape(-1),
    )
    return this.build(stacked)
  }

  /** Matrices [N_i, K] stacked along N and packed for `linear`, in the storage type. */
  linear(
    entries: WeightEntry | readonly WeightEntry[],
    options: { gated?: boolean; quantizable?: boolean } = {},
  ): Tensor {
    const list = Array.isArray(entries) ? (entries as readonly WeightEntry[]) : [entries as WeightEntry]
    return this.build(() =>
      packLinear(
        list.map(entry => this.tensor(entry)),
        { dtype: this.storage(list[0]!, options.quantizable), gated: options.gated ?? false },
      ),
    )
  }

  /** A convolution's [O, C, kh, kw] packed for `conv2d`. */
  conv(entry: WeightEntry): Tensor {
    return this.build(() => {
      const w = permute(this.tensor(entry), [0, 2, 3, 1]) // [O, kh, kw, C]
      return packLinear(w.reshape(w.shape[0]!, -1), { dtype: this.storage(entry) })
    })
  }

  /** The type that `entry` is to be stored in. */
  storage(entry: WeightEntry, quantizable = false): WeightDType | 'int8' | 'int4' {
    if (quantizable && this.quantize) return this.quantize
    if (this.activations !== 'f32') return this.activations
    return this.dtype ?? entry.dtype
  }

  /** To be awaited between layers: now and then waits for the device, reports progress and obeys the signal. */
  async pause(): Promise<void> {
    throwIfAborted(this.#options.signal)
    if (this.#counts.sinceLastPause < BYTES_BETWEEN_PAUSES) return
    this.#counts.sinceLastPause = 0
    await this.device.synchronize()
    throwIfAborted(this.#options.signal)
    this.#report(this.#counts.loaded)
  }

  /** Waits for everything, unmaps the files and reports the end. */
  async finish(): Promise<void> {
    for (const loader of [this, ...this.#beside]) {
      await loader.device.synchronize()
      await loader.#release()
    }
    throwIfAborted(this.#options.signal)
    this.#report(this.#options.totalBytes ?? this.#counts.loaded)
  }

  #report(loaded: number): void {
    const total = this.#options.totalBytes ?? loaded
    this.#options.onProgress?.({ phase: 'load', loaded: Math.min(loaded, total), total })
  }

  /** Drops what only loading needs. */
  async #release(): Promise<void> {
    for (const file of this.#files.values()) file.close()
    this.#files.clear()
    const host = this.#host
    this.#host = undefined
    await host?.close()
  }

  /** Frees every tensor built here. Idempotent. */
  dispose(): void {
    for (const loader of this.#beside) loader.dispose()
    void this.#release()
    for (const tensor of this.#owned.splice(0)) tensor.dispose()
  }
}

/** 0, 1, … n−1 as i32 [n]. */
export function iota(device: Device, n: number): Tensor {
  return device.tensor(
    Int32Array.from({ length: n }, (_, i) => i),
    [n],
  )
}

/** f32 matrices [N_i, K] of the CPU, one below the other: [ΣN_i, K]. */
export function stackRows(host: Device, matrices: readonly Tensor[]): Tensor {
  // Packing stacks rows, and `embedding` reads them back in order.
  const packed = packLinear(matrices, { dtype: 'f32' })
  return embedding(packed, iota(host, packed.shape[0]!))
}

/** The weights whose names begin with `prefix`, by the rest of their names; permuted ones too, which `Loader` puts right. */
export function under(weights: Weights, prefix: string): Weights {
  return { take: (name, shape) => weights.take(`${prefix}${name}`, shape, { permuted: true }) }
}

const ACTIVATIONS: Record<HiddenAct, Activation> = {
  silu: 'silu',
  gelu: 'gelu',
  gelu_pytorch_tanh: 'gelu_tanh',
  quick_gelu: 'quick_gelu',
}

/** The op's name of a config's `hidden_act`. Source: `ACT2FN` of transformers. */
export function activationOf(hiddenAct: HiddenAct): Activation {
  return ACTIVATIONS[hiddenAct]
}

/** `body(x)` with everything else that it made, and `x` itself, freed: one layer of a deep network. */
export function advance(x: Tensor, body: (x: Tensor) => Tensor): Tensor {
  const y = scope(() => body(x))
  if (y !== x) x.dispose()
  return y
}

/** Sees an activation by its name while it lives; to keep the data, call its `read` at once. For tests. */
export type Observe = (name: string, x: Tensor) => void
