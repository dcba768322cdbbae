import { describe } from '../errors.ts'
import { invalid, invalidValue, shapeText, unsupported } from './errors.ts'
import { PickleDict, PickleGlobal, PickleTuple, unpickle } from './pickle.ts'
import type { TensorFile } from './safetensors.ts'
import {
  type ByteSource,
  elementCount,
  isCount,
  isLfsPointer,
  LFS_HINT,
  STORED_BITS,
  type StoredDType,
  type TensorEntry,
  withFile,
} from './source.ts'
import { ZipDirectory, type ZipEntry } from './zip.ts'

const MAX_PICKLE_BYTES = 16 * 2 ** 20
const MAX_RANK = 32

/** The names a state dict is made of; a pickle that refers to anything else is refused. */
const STORAGES: ReadonlyMap<string, StoredDType | 'untyped'> = new Map<string, StoredDType | 'untyped'>([
  ['torch.DoubleStorage', 'f64'],
  ['torch.FloatStorage', 'f32'],
  ['torch.HalfStorage', 'f16'],
  ['torch.BFloat16Storage', 'bf16'],
  ['torch.LongStorage', 'i64'],
  ['torch.IntStorage', 'i32'],
  ['torch.ShortStorage', 'i16'],
  ['torch.CharStorage', 'i8'],
  ['torch.ByteStorage', 'u8'],
  ['torch.BoolStorage', 'bool'],
  ['torch.ComplexFloatStorage', 'c64'],
  ['torch.ComplexDoubleStorage', 'c128'],
  ['torch.storage.UntypedStorage', 'untyped'],
])
const DTYPES: ReadonlyMap<string, StoredDType> = new Map<string, StoredDType>([
  ['torch.float64', 'f64'],
  ['torch.float32', 'f32'],
  ['torch.float16', 'f16'],
  ['torch.bfloat16', 'bf16'],
  ['torch.int64', 'i64'],
  ['torch.int32', 'i32'],
  ['torch.int16', 'i16'],
  ['torch.int8', 'i8'],
  ['torch.uint64', 'u64'],
  ['torch.uint32', 'u32'],
  ['torch.uint16', 'u16'],
  ['torch.uint8', 'u8'],
  ['torch.bool', 'bool'],
  ['torch.float8_e4m3fn', 'f8_e4m3'],
  ['torch.float8_e5m2', 'f8_e5m2'],
  ['torch.float8_e4m3fnuz', 'f8_e4m3fnuz'],
  ['torch.float8_e5m2fnuz', 'f8_e5m2fnuz'],
  ['torch.float8_e8m0fnu', 'f8_e8m0'],
])
const CALLABLES: ReadonlySet<string> = new Set([
  'collections.OrderedDict',
  'torch.Size',
  'torch.device',
  'torch._utils._rebuild_parameter',
  'torch._utils._rebuild_tensor_v2',
  'torch._utils._rebuild_tensor_v3',
])
/** Where training programs put the state dict. */
const NESTED_KEYS = ['state_dict', 'model_state_dict', 'model', 'module']

class Storage {
  readonly dtype: StoredDType | 'untyped'
  readonly entry: ZipEntry
  readonly offset: number
  constructor(dtype: StoredDType | 'untyped', entry: ZipEntry, offset: number) {
    this.dtype = dtype
    this.entry = entry
    this.offset = offset
  }
}

class Rebuilt {
  readonly dtype: StoredDType
  readonly shape: readonly number[]
  readonly strides: readonly number[] | undefined
  readonly offset: number
  readonly byteLength: number
  constructor(
    dtype: StoredDType,
    shape: readonly number[],
    strides: readonly number[] | undefined,
    offset: number,
    byteLength: number,
  ) {
    this.dtype = dtype
    this.shape = shape
    this.strides = strides
    this.offset = offset
    this.byteLength = byteLength
  }
}

/**
 * Reads what a PyTorch `.bin` / `.pt` zip archive says about its tensors. The pickle inside is interpreted by a reader
 * that knows dicts and tensors and executes nothing. A state dict under `state_dict`, `model_state_dict`, `model` or
 * `module` is found; entries that are not tensors are skipped; a `module.` prefix common to all names is removed.
 * @throws MgmError `CHECKPOINT_UNSUPPORTED` for pre-1.6 pickles, TorchScript, big-endian or compressed archives and
 *   names outside a state dict; `CHECKPOINT_INVALID` for anything malformed.
 */
export function parseTorchArchive(source: ByteSource, file: string): TensorFile {
  const head = source.read(0, Math.min(source.size, 64))
  if (!(head[0] === 0x50 && head[1] === 0x4b)) throw notAnArchive(head, file)
  const zip = new ZipDirectory(source, file)
  const pickles = [...zip.entries.values()].filter(entry => /^[^/]+\/data\.pkl$/.test(entry.name))
  const pickle = pickles[0]
  if (pickle === undefined || pickles.length > 1) {
    throw invalid(`expected one data.pkl in ${file} but found ${pickles.length}`)
  }
  const root = pickle.name.slice(0, -'data.pkl'.length)
  if (zip.entries.has(`${root}constants.pkl`)) {
    throw unsupported(`${file} is a TorchScript archive; save its state_dict() or convert it to safetensors`)
  }
  const byteOrder = zip.entries.get(`${root}byteorder`)
  if (byteOrder) {
    const order = new TextDecoder().decode(zip.read(byteOrder, 64)).trim()
    if (order === 'big')
      throw unsupported(`expected little-endian tensors in ${file} but received big-endian ones`)
    if (order !== 'little') throw invalidValue(file, '"little"', 'the byteorder record', order)
  }

  const host = new TorchHost(zip, root, file)
  const dict = findStateDict(unpickle(zip.read(pickle, MAX_PICKLE_BYTES), host, file), file)
  const named = [...dict].filter((pair): pair is [string | number, Rebuilt] => pair[1] instanceof Rebuilt)
  const wrapped = named.every(([key]) => String(key).startsWith('module.'))
  const tensors = new Map<string, TensorEntry>()
  for (const [key, { dtype, shape, strides, offset, byteLength }] of named) {
    const name = wrapped ? String(key).slice('module.'.length) : String(key)
    tensors.set(name, { name, dtype, shape, offset, byteLength, file, ...(strides ? { strides } : {}) })
  }
  return { tensors, metadata: new Map() }
}

/** `parseTorchArchive` of a file on disk; tensor data is not read. */
export function openTorchArchive(file: string): TensorFile {
  return withFile(file, parseTorchArchive)
}

class TorchHost {
  readonly #zip: ZipDirectory
  readonly #root: string
  readonly #file: string
  readonly #storages = new Map<string, Storage>()

  constructor(zip: ZipDirectory, root: string, file: string) {
    this.#zip = zip
    this.#root = root
    this.#file = file
  }

  allows(name: string): boolean {
    return CALLABLES.has(name) || STORAGES.has(name) || DTYPES.has(name)
  }

  call(name: string, args: readonly unknown[]): unknown {
    switch (name) {
      case 'collections.OrderedDict':
        return orderedDict(args, this.#file)
      case 'torch.Size':
        return args[0] instanceof PickleTuple ? args[0] : new PickleTuple([])
      case 'torch.device':
        return null
      case 'torch._utils._rebuild_parameter':
        if (!(args[0] instanceof Rebuilt)) throw invalidValue(this.#file, 'a tensor', 'a parameter', args[0])
        return args[0]
      case 'torch._utils._rebuild_tensor_v2':
        return this.#tensor(args, undefined)
      case 'torch._utils._rebuild_tensor_v3':
        return this.#tensor(args, args[6])
      default:
        throw unsupported(`expected no call of ${name} in ${this.#file}`)
    }
  }

  /** The id is `('storage', type, key, location, numel)`; numel counts bytes for an untyped storage. */
  load(id: unknown): Storage {
    const [tag, type, key, , numel] = id instanceof PickleTuple ? id.items : []
    const dtype = type instanceof PickleGlobal ? STORAGES.get(type.name) : undefined
    if (tag !== 'storage' || dtype === undefined || typeof key !== 'string' || !isCount(numel)) {
      throw invalidValue(this.#file, 'a storage reference', 'a persistent id', id)
    }
    const known = this.#storages.get(key)
    if (known) {
      if (known.dtype !== dtype)
        throw invalid(`expected one dtype for storage ${describe(key)} of ${this.#file}`)
      return known
    }
    const entry = this.#zip.entries.get(`${this.#root}data/${key}`)
    if (entry === undefined)
      throw invalid(`expected storage ${describe(key)} in ${this.#file} but found none`)
    const bytes = numel * (dtype === 'untyped' ? 1 : STORED_BITS[dtype] / 8)
    if (entry.size !== bytes) {
      throw invalid(
        `expected ${bytes} bytes for storage ${describe(key)} of ${this.#file} but received ${entry.size}`,
      )
    }
    const storage = new Storage(dtype, entry, this.#zip.dataOffset(entry))
    this.#storages.set(key, storage)
    return storage
  }

  /** `(storage, storage_offset, size, stride, …)`, offsets and strides in elements. */
  #tensor(args: readonly unknown[], dtypeGlobal: unknown): Rebuilt {
    const file = this.#file
    const [storage, start, size, stride] = args
    if (!(storage instanceof Storage)) throw invalidValue(file, 'a storage', 'a tensor', storage)
    const dtype =
      storage.dtype !== 'untyped'
        ? storage.dtype
        : dtypeGlobal instanceof PickleGlobal
          ? DTYPES.get(dtypeGlobal.name)
          : undefined
    if (dtype === undefined) throw invalidValue(file, 'a dtype', 'a tensor of untyped storage', dtypeGlobal)
    if (!(size instanceof PickleTuple) || !(stride instanceof PickleTuple) || !isCount(start)) {
      throw invalid(`expected an offset, a size and strides for a tensor in ${file}`)
    }
    const shape = size.items as readonly number[]
    const strides = stride.items as readonly number[]
    const count = shape.length <= MAX_RANK ? elementCount(shape) : undefined
    if (count === undefined) throw invalidValue(file, 'a shape', 'a tensor', shape)
    if (strides.length !== shape.length || !strides.every(isCount)) {
      throw invalid(
        `expected ${shape.length} strides for a tensor in ${file} but received ${shapeText(strides)}`,
      )
    }
    const width = STORED_BITS[dtype] / 8
    const span = count === 0 ? 0 : shape.reduce((last, n, i) => last + (n - 1) * strides[i]!, 1)
    // In doubles a sum beyond 2^53 may be rounded but stays far above any file size.
    if ((start + span) * width > storage.entry.size) {
      throw invalid(
        `expected a tensor of shape ${shapeText(shape)} and strides ${shapeText(strides)} from element ${start} within ` +
          `${describe(storage.entry.name)} of ${file} but received only ${storage.entry.size} bytes`,
      )
    }
    const contiguous = count === 0 || isRowMajor(shape, strides)
    return new Rebuilt(
      dtype,
      shape,
      contiguous ? undefined : strides,
      storage.offset + start * width,
      span * width,
    )
  }
}

function orderedDict(args: readonly unknown[], file: string): PickleDict {
  const dict = new PickleDict()
  const pairs = args[0] ?? []
  if (!Array.isArray(pairs)) throw invalidValue(file, 'a list of pairs', 'an OrderedDict', pairs)
  for (const pair of pairs) {
    const items: readonly unknown[] =
      pair instanceof PickleTuple ? pair.items : Array.isArray(pair) ? pair : []
    const [key, value] = items
    if (items.length !== 2 || (typeof key !== 'string' && typeof key !== 'number')) {
      throw invalidValue(file, 'a key and a value', 'an OrderedDict', pair)
    }
    dict.set(key, value)
  }
  return dict
}

function findStateDict(value: unknown, file: string): PickleDict {
  const hasTensors = (v: unknown): v is PickleDict =>
    v instanceof PickleDict && [...v.values()].some(x => x instanceof Rebuilt)
  if (value instanceof PickleDict) {
    // First the nested ones: a training state may hold a loose tensor, such as a random state, beside its model.
    for (const key of NESTED_KEYS) {
      const nested = value.get(key)
      if (hasTensors(nested)) return nested
    }
    if (hasTensors(value)) return value
  }
  throw invalidValue(file, 'a dict of tensors', 'the archive', value)
}

function isRowMajor(shape: readonly number[], strides: readonly number[]): boolean {
  let stride = 1
  for (let i = shape.length - 1; i >= 0; i--) {
    if (shape[i] !== 1 && strides[i] !== stride) return false
    stride *= shape[i]!
  }
  return true
}

function notAnArchive(head: Uint8Array, file: string): Error {
  if (head[0] === 0x80) {
    return unsupported(
      `${file} is a pickle from before PyTorch 1.6, which cannot be read without executing it; ` +
        'load it with torch.load and save it again, or convert it to safetensors',
    )
  }
  return invalid(
    `expected a PyTorch zip archive for ${file}${isLfsPointer(head) ? LFS_HINT : ''} but its head is ${describe([...head.subarray(0, 4)])}`,
  )
}
