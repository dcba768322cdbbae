import { invalid, shapeText, unsupported } from './errors.ts'
import { elementCount, type TensorEntry } from './source.ts'

/** Dtypes that weights may have when they are used. */
export type WeightDType = 'f32' | 'bf16' | 'f16'

/** A tensor that the model uses, ready for `device.tensorFromFile`. */
export interface WeightEntry extends TensorEntry {
  readonly dtype: WeightDType
}

/** How to read a tensor stored with permuted axes: map `shape` row-major, then permute by `dims`. */
export interface Permuted {
  readonly shape: readonly number[]
  readonly dims: readonly number[]
}

/** Tensors by name, each handed out once and counted, so that nothing is forgotten or misread in silence. */
export class TensorMap {
  /** What the tensors belong to, for error messages. */
  readonly label: string
  readonly #entries: ReadonlyMap<string, TensorEntry>
  readonly #taken = new Set<string>()

  constructor(label: string, entries: Iterable<readonly [string, TensorEntry]>) {
    this.label = label
    this.#entries = new Map(entries)
  }

  get size(): number {
    return this.#entries.size
  }
  /** Bytes of all tensors in their files. */
  get byteLength(): number {
    let bytes = 0
    for (const entry of this.#entries.values()) bytes += entry.byteLength
    return bytes
  }
  names(): string[] {
    return [...this.#entries.keys()]
  }
  entries(): TensorEntry[] {
    return [...this.#entries.values()]
  }
  has(name: string): boolean {
    return this.#entries.has(name)
  }
  /** The entry, without checks and without counting it as used. */
  peek(name: string): TensorEntry | undefined {
    return this.#entries.get(name)
  }

  /**
   * The tensor of that name, marked as used. An entry of `shape` that is null may have any size.
   * Tensors whose elements are not in row-major order are refused unless `permuted` is set, which hands out those
   * that `permutation` can describe.
   * @throws MgmError `CHECKPOINT_INVALID` if it is missing or of another shape, `CHECKPOINT_UNSUPPORTED` for a dtype
   *   other than f32, bf16 and f16 and for strides as above.
   */
  take(name: string, shape: readonly (number | null)[], options: { permuted?: boolean } = {}): WeightEntry {
    const entry = this.#entries.get(name)
    if (entry === undefined) {
      throw invalid(`expected tensor "${name}" of shape ${shapeText(shape)} in ${this.label} but found none`)
    }
    if (entry.shape.length !== shape.length || !shape.every((n, i) => n === null || n === entry.shape[i])) {
      throw invalid(
        `expected tensor "${name}" of shape ${shapeText(shape)} in ${entry.file} but found ${shapeText(entry.shape)}`,
      )
    }
    const { dtype } = entry
    if (dtype !== 'f32' && dtype !== 'bf16' && dtype !== 'f16') {
      throw unsupported(`expected f32, bf16 or f16 for tensor "${name}" in ${entry.file} but found ${dtype}`)
    }
    if (entry.strides && !(options.permuted && permutation(entry))) {
      throw unsupported(
        `expected tensor "${name}" of shape ${shapeText(entry.shape)} in ${entry.file} to be contiguous but it has ` +
          `strides ${shapeText(entry.strides)}; save it again with .contiguous(), or convert the file to safetensors`,
      )
    }
    this.#taken.add(name)
    return { ...entry, dtype }
  }

  /**
   * Checks that every tensor has been taken, apart from those whose name matches one of `ignored`.
   * @throws MgmError `CHECKPOINT_INVALID` naming the first of the rest.
   */
  finish(ignored: readonly RegExp[] = []): void {
    const left = this.names().filter(
      name => !this.#taken.has(name) && !ignored.some(pattern => pattern.test(name)),
    )
    if (left.length === 0) return
    const shown = left.slice(0, 5).map(name => `"${name}"`)
    const more = left.length > 5 ? ` and ${left.length - 5} more` : ''
    throw invalid(
      `expected only the tensors of the config in ${this.label} but found also ${shown.join(', ')}${more}`,
    )
  }
}

/** The axis order in which a strided tensor fills its memory without gaps, or undefined if there is none. */
export function permutation(entry: TensorEntry): Permuted | undefined {
  const { shape, strides } = entry
  if (!strides) return { shape, dims: shape.map((_, i) => i) }
  // Axes of size one may stand anywhere; sorted to the end they cannot break the chain of the others.
  const key = (axis: number) => (shape[axis] === 1 ? 0 : strides[axis]!)
  const order = shape.map((_, i) => i).sort((a, b) => key(b) - key(a) || a - b)
  let stride = 1
  for (const axis of order.toReversed()) {
    if (shape[axis] !== 1 && strides[axis] !== stride) return undefined
    stride *= shape[axis]!
  }
  return { shape: order.map(axis => shape[axis]!), dims: shape.map((_, axis) => order.indexOf(axis)) }
}

export interface ConvNextGeometry {
  /** Channels of each stage. */
  dims: number[]
  /** Blocks of each stage. */
  depths: number[]
}

/**
 * Widths and depths of a ConvNeXt trunk from the shapes of `stages.<s>.blocks.<b>.conv_dw.weight` [C, 1, 7, 7]: the
 * config file of a release names an architecture but does not state them.
 * @throws MgmError `CHECKPOINT_INVALID` if stages or blocks are missing or of uneven width.
 */
export function convNextGeometry(map: TensorMap): ConvNextGeometry {
  const stages: number[][] = []
  for (const name of map.names()) {
    const match = /^stages\.(\d{1,2})\.blocks\.(\d{1,3})\.conv_dw\.weight$/.exec(name)
    if (!match) continue
    const stage = Number(match[1])
    const blocks = stages[stage] ?? []
    stages[stage] = blocks
    const entry = map.peek(name)!
    if (entry.shape.length !== 4 || elementCount(entry.shape) === 0) {
      throw invalid(
        `expected tensor "${name}" of shape [*, 1, *, *] in ${entry.file} but found ${shapeText(entry.shape)}`,
      )
    }
    blocks[Number(match[2])] = entry.shape[0]!
  }
  if (stages.length === 0) throw invalid(`expected ConvNeXt stages in ${map.label} but found none`)
  const dims = Array.from(stages, (blocks, stage) => {
    const widths = new Set(Array.from(blocks ?? []))
    const [width] = widths
    if (widths.size !== 1 || width === undefined) {
      throw invalid(
        `expected blocks 0, 1, … of one width in stage ${stage} of ${map.label} but found widths ${[...widths].join(', ') || 'of none'}`,
      )
    }
    return width
  })
  return { dims, depths: stages.map(blocks => blocks.length) }
}
