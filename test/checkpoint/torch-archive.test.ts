import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { openSafetensors } from '../../lib/checkpoint/safetensors.ts'
import { BytesSource, FileSource, type TensorEntry } from '../../lib/checkpoint/source.ts'
import { permutation } from '../../lib/checkpoint/tensor-map.ts'
import { openTorchArchive, parseTorchArchive } from '../../lib/checkpoint/torch-archive.ts'
import { failure } from '../helpers/failure.ts'
import { fuzz } from './fuzz.ts'

const FIXTURES = join(import.meta.dirname, '../fixtures')

/*
 * test/fixtures/torch-archive was written by PyTorch 2.13:
 *   strides.bin: w = arange(24.).reshape(2, 3, 4); transposed w.permute(2, 0, 1), row w[1, 2], slice w[:, :, 1:3], expanded
 *     ones(1).expand(5), channels_last arange(24.).reshape(2, 3, 2, 2) and depthwise arange(18.).reshape(2, 1, 3, 3), both
 *     contiguous(memory_format=channels_last), scalar tensor(2.5), empty zeros(0, 3)
 *   dtypes.bin: OrderedDict of arange(4).to(dtype) under this library's dtype names, pickle protocol 4
 *   m = Sequential(Linear(2, 3), LayerNorm(3)), parameter i filled with i + 1:
 *     parameters.bin m.state_dict(keep_vars=True), legacy.bin m.state_dict() in the pre-1.6 format, module.bin m itself,
 *     script.bin TorchScript of m, training.bin {epoch, rng: zeros(3), size, device, lr, name, state_dict: with `module.` in front}
 *   proto.bin: {'__proto__': ones(1), 'constructor': ones(2)}
 */
const fixture = (name: string) => join(FIXTURES, 'torch-archive', name)

const ELEMENTS: Partial<Record<TensorEntry['dtype'], new (b: ArrayBuffer) => ArrayLike<number | bigint>>> = {
  f64: Float64Array,
  f32: Float32Array,
  i64: BigInt64Array,
  i32: Int32Array,
  i16: Int16Array,
  i8: Int8Array,
  u16: Uint16Array,
  u8: Uint8Array,
}

/** The tensor's elements in row-major order, gathered one by one through its strides. */
function elements(entry: TensorEntry): number[] {
  using source = new FileSource(entry.file)
  const data = new ELEMENTS[entry.dtype]!(source.read(entry.offset, entry.byteLength).slice().buffer)
  if (!entry.strides) return Array.from(data, Number)
  const values: number[] = []
  const walk = (axis: number, at: number) => {
    if (axis === entry.shape.length) values.push(Number(data[at]))
    else for (let i = 0; i < entry.shape[axis]!; i++) walk(axis + 1, at + i * entry.strides![axis]!)
  }
  walk(0, 0)
  return values
}

const range = (n: number) => Array.from({ length: n }, (_, i) => i)

describe('released archives', () => {
  const archives = (readdirSync(FIXTURES, { recursive: true }) as string[])
    .filter(name => /^mgm-.*model_zoo.*\.bin$/.test(name))
    .map(name => join(FIXTURES, name))

  it('are all here', () => {
    expect(archives.length).toBe(8)
  })

  it.each(archives)('%s equals the safetensors file beside it, byte for byte', file => {
    const theirs = openSafetensors(
      file.replace(
        'pytorch_model.bin',
        file.includes('open_clip') ? 'pytorch_model.safetensors' : 'model.safetensors',
      ),
    ).tensors
    const ours = openTorchArchive(file).tensors
    expect([...ours.keys()].sort()).toEqual([...theirs.keys()].sort())
    using source = new FileSource(file)
    for (const entry of ours.values()) {
      const twin = theirs.get(entry.name)!
      expect({ name: entry.name, dtype: entry.dtype, shape: entry.shape, strides: entry.strides }).toEqual({
        name: twin.name,
        dtype: twin.dtype,
        shape: twin.shape,
        strides: undefined,
      })
      using other = new FileSource(twin.file)
      const same = Buffer.compare(
        source.read(entry.offset, entry.byteLength),
        other.read(twin.offset, twin.byteLength),
      )
      expect([entry.name, same]).toEqual([entry.name, 0])
    }
  })
})

describe('parseTorchArchive', () => {
  it('reports views by offset and strides', () => {
    const tensors = openTorchArchive(fixture('strides.bin')).tensors
    const get = (name: string) => tensors.get(name)!
    // w[i, j, k] = 12 i + 4 j + k; transposed[k, i, j] = w[i, j, k].
    const transposed = range(4).flatMap(k => range(2).flatMap(i => range(3).map(j => 12 * i + 4 * j + k)))
    expect(get('transposed').shape).toEqual([4, 2, 3])
    expect(elements(get('transposed'))).toEqual(transposed)
    expect(get('row').strides).toBeUndefined()
    expect(elements(get('row'))).toEqual([20, 21, 22, 23])
    expect(elements(get('slice'))).toEqual([1, 2, 5, 6, 9, 10, 13, 14, 17, 18, 21, 22])
    expect(elements(get('expanded'))).toEqual([1, 1, 1, 1, 1])
    expect(elements(get('channels_last'))).toEqual(range(24))
    expect(get('depthwise').strides).toBeUndefined() // A single channel makes both orders the same.
    expect(elements(get('depthwise'))).toEqual(range(18))
    expect(get('scalar').shape).toEqual([])
    expect(elements(get('scalar'))).toEqual([2.5])
    expect(get('empty')).toMatchObject({ shape: [0, 3], byteLength: 0 })
  })

  it('describes permuted tensors as a contiguous one and an axis order, others not', () => {
    const tensors = openTorchArchive(fixture('strides.bin')).tensors
    for (const name of ['transposed', 'channels_last', 'row']) {
      const entry = tensors.get(name)!
      const { shape, dims } = permutation(entry)!
      expect(dims.map(dim => shape[dim])).toEqual(entry.shape)
      // Permuting a row-major tensor of `shape` by `dims`, as the ops define it, must give the same strides.
      const rowMajor = shape.map((_, i) => shape.slice(i + 1).reduce((a, b) => a * b, 1))
      expect(dims.map(dim => rowMajor[dim])).toEqual(entry.strides ?? rowMajor)
    }
    expect(permutation(tensors.get('channels_last')!)).toEqual({ shape: [2, 2, 2, 3], dims: [0, 3, 1, 2] })
    expect(permutation(tensors.get('slice')!)).toBeUndefined()
    expect(permutation(tensors.get('expanded')!)).toBeUndefined()
  })

  it('knows every dtype, typed and untyped storages, and protocol 4', () => {
    const tensors = openTorchArchive(fixture('dtypes.bin')).tensors
    expect(tensors.size).toBe(14)
    for (const entry of tensors.values()) {
      expect(entry.dtype).toBe(entry.name)
      expect(entry.shape).toEqual([4])
      if (ELEMENTS[entry.dtype] && entry.dtype !== 'bool') expect(elements(entry)).toEqual([0, 1, 2, 3])
    }
    using source = new FileSource(fixture('dtypes.bin'))
    const bf16 = tensors.get('bf16')!
    expect(Buffer.from(source.read(bf16.offset, 8)).toString('hex')).toBe('0000803f00404040')
  })

  it('finds the state dict of a training checkpoint and drops the wrapper from its names', () => {
    const tensors = openTorchArchive(fixture('training.bin')).tensors
    expect([...tensors.values()].map(e => [e.name, e.shape, elements(e)])).toEqual([
      ['0.weight', [3, 2], [1, 1, 1, 1, 1, 1]],
      ['0.bias', [3], [2, 2, 2]],
      ['1.weight', [3], [3, 3, 3]],
      ['1.bias', [3], [4, 4, 4]],
    ])
  })

  it('reads parameters and attributes of the dict', () => {
    expect([...openTorchArchive(fixture('parameters.bin')).tensors.keys()]).toEqual([
      '0.weight',
      '0.bias',
      '1.weight',
      '1.bias',
    ])
  })

  it('is not led astray by names of JavaScript', () => {
    const { tensors } = openTorchArchive(fixture('proto.bin'))
    expect([...tensors.keys()]).toEqual(['__proto__', 'constructor'])
    expect(({} as Record<string, unknown>).shape).toBeUndefined()
  })

  it.each([
    ['legacy.bin', /pickle from before PyTorch 1\.6.*convert/],
    ['module.bin', /refers to "torch\.nn\.modules\.container\.Sequential".*not executed; convert/],
    ['script.bin', /TorchScript/],
  ])('refuses %s with advice', (name, message) => {
    expect(failure(() => openTorchArchive(fixture(name)))).toMatch(/^CHECKPOINT_UNSUPPORTED: /)
    expect(failure(() => openTorchArchive(fixture(name)))).toMatch(message)
  })

  it('refuses every truncation of a real file', () => {
    const bytes = new Uint8Array(readFileSync(fixture('strides.bin')))
    for (const length of [0, 3, 21, 22, 500, bytes.length - 22, bytes.length - 1]) {
      expect(failure(() => parseTorchArchive(new BytesSource(bytes.subarray(0, length), 'x'), 'x'))).toMatch(
        /^CHECKPOINT_INVALID/,
      )
    }
  })
})

interface Member {
  name: string
  data: Uint8Array
  method?: number
  flags?: number
  localName?: string
}

/** A zip archive written by hand; `zip64` puts sizes and offsets into zip64 fields, as archives above 4 GB have them. */
function zip(members: Member[], zip64 = false): Uint8Array {
  const chunks: Buffer[] = []
  const central: Buffer[] = []
  let offset = 0
  const add = (list: Buffer[], ...buffers: Buffer[]) => list.push(...buffers)
  for (const { name, data, method = 0, flags = 0, localName = name } of members) {
    const local = Buffer.alloc(30)
    local.writeUInt32LE(0x04034b50)
    local.writeUInt16LE(method, 8)
    local.writeUInt32LE(data.length, 18)
    local.writeUInt32LE(data.length, 22)
    local.writeUInt16LE(localName.length, 26)
    local.writeUInt16LE(5, 28) // An extra field in the local header only, as PyTorch pads with.
    const entry = Buffer.alloc(46)
    entry.writeUInt32LE(0x02014b50)
    entry.writeUInt16LE(flags, 8)
    entry.writeUInt16LE(method, 10)
    entry.writeUInt32LE(zip64 ? 0xffffffff : data.length, 20)
    entry.writeUInt32LE(zip64 ? 0xffffffff : data.length, 24)
    entry.writeUInt16LE(name.length, 28)
    entry.writeUInt16LE(zip64 ? 33 : 0, 30)
    entry.writeUInt32LE(zip64 ? 0xffffffff : offset, 42)
    add(central, entry, Buffer.from(name))
    if (zip64) {
      const extra = Buffer.alloc(33) // First some other field of one byte.
      extra.writeUInt16LE(0x4246, 0)
      extra.writeUInt16LE(1, 2)
      extra.writeUInt16LE(1, 5)
      extra.writeUInt16LE(24, 7)
      for (const [i, value] of [data.length, data.length, offset].entries())
        extra.writeBigUInt64LE(BigInt(value), 9 + 8 * i)
      add(central, extra)
    }
    add(chunks, local, Buffer.from(localName), Buffer.alloc(5), Buffer.from(data))
    offset += 30 + localName.length + 5 + data.length
  }
  const size = central.reduce((n, b) => n + b.length, 0)
  const end = Buffer.alloc(22)
  end.writeUInt32LE(0x06054b50)
  end.writeUInt16LE(zip64 ? 0xffff : members.length, 10)
  end.writeUInt32LE(zip64 ? 0xffffffff : size, 12)
  end.writeUInt32LE(zip64 ? 0xffffffff : offset, 16)
  if (!zip64) return Buffer.concat([...chunks, ...central, end])
  const record = Buffer.alloc(56 + 20)
  record.writeUInt32LE(0x06064b50)
  for (const [at, value] of [
    [4, 44],
    [24, members.length],
    [32, members.length],
    [40, size],
    [48, offset],
  ] as const) {
    record.writeBigUInt64LE(BigInt(value), at)
  }
  record.writeUInt32LE(0x07064b50, 56)
  record.writeBigUInt64LE(BigInt(offset + size), 64)
  return Buffer.concat([...chunks, ...central, record, end])
}

const text = (value: string) => new TextEncoder().encode(value)
const unicode = (value: string) => [0x58, value.length, 0, 0, 0, ...text(value)]
const global = (module: string, name: string) => [0x63, ...text(`${module}\n${name}\n`)]

interface TensorSpec {
  numel?: number
  start?: number
  size?: number[]
  stride?: number[]
  storage?: [string, string]
}

/** `{'w': _rebuild_tensor_v2(storage '0', start, size, stride, False, OrderedDict())}` in protocol 2. */
function pickled({
  numel = 6,
  start = 0,
  size = [2, 3],
  stride = [3, 1],
  storage = ['torch', 'FloatStorage'],
}: TensorSpec = {}): Uint8Array {
  const tuple = (items: number[]) => [0x28, ...items.flatMap(n => [0x8a, 8, ...bytes64(n)]), 0x74]
  return Uint8Array.from([
    ...[0x80, 2, 0x7d, ...unicode('w')],
    ...global('torch._utils', '_rebuild_tensor_v2'),
    ...[
      0x28,
      0x28,
      ...unicode('storage'),
      ...global(...storage),
      ...unicode('0'),
      ...unicode('cpu'),
      0x8a,
      8,
      ...bytes64(numel),
      0x74,
      0x51,
    ],
    ...[
      0x8a,
      8,
      ...bytes64(start),
      ...tuple(size),
      ...tuple(stride),
      0x89,
      ...global('collections', 'OrderedDict'),
      0x29,
      0x52,
      0x74,
      0x52,
    ],
    ...[0x73, 0x2e],
  ])
}

function bytes64(n: number): number[] {
  const buffer = Buffer.alloc(8)
  buffer.writeBigInt64LE(BigInt(n))
  return [...buffer]
}

const member = (name: string, data: Uint8Array, more: Partial<Member> = {}): Member => ({
  name: `archive/${name}`,
  data,
  ...more,
})
const floats = new Uint8Array(Float32Array.from(range(6)).buffer)
const parse = (bytes: Uint8Array) => parseTorchArchive(new BytesSource(bytes, 'x.bin'), 'x.bin').tensors
const archive = (spec?: TensorSpec, ...extra: Member[]) =>
  zip([member('data.pkl', pickled(spec)), member('data/0', floats), ...extra])

describe('archives written by hand', () => {
  it.each([false, true])('are read, zip64: %s', zip64 => {
    const bytes = zip([member('data.pkl', pickled()), member('data/0', floats)], zip64)
    const entry = parse(bytes).get('w')!
    expect(entry).toMatchObject({ dtype: 'f32', shape: [2, 3], byteLength: 24 })
    expect(Buffer.compare(bytes.subarray(entry.offset, entry.offset + 24), floats)).toBe(0)
  })

  it('may have a comment', () => {
    const bytes = Buffer.concat([archive(), text('PK\x05\x06 a comment')])
    bytes.writeUInt16LE(bytes.length - archive().length, archive().length - 2)
    expect(parse(bytes).size).toBe(1)
  })

  it.each<[string, Uint8Array, RegExp]>([
    ['big-endian', archive({}, member('byteorder', text('big'))), /UNSUPPORTED: .*little-endian/],
    [
      'an unknown byte order',
      archive({}, member('byteorder', text('pdp'))),
      /INVALID: .*byteorder record .* "pdp"/,
    ],
    [
      'a compressed storage',
      zip([member('data.pkl', pickled()), member('data/0', floats, { method: 8 })]),
      /UNSUPPORTED: .*"archive\/data\/0" .* compressed \(method 8\)/,
    ],
    [
      'encryption',
      zip([member('data.pkl', pickled(), { flags: 1 }), member('data/0', floats)]),
      /UNSUPPORTED: .*encrypted/,
    ],
    [
      'two names for an entry',
      zip([member('data.pkl', pickled()), member('data/0', floats, { localName: 'archive/data/1' })]),
      /INVALID: .*local header/,
    ],
    [
      'the same name twice',
      zip([member('data.pkl', pickled()), member('data/0', floats), member('data/0', floats)]),
      /INVALID: .*found two/,
    ],
    [
      'no storage',
      zip([member('data.pkl', pickled())]),
      /INVALID: expected storage "0" in x\.bin but found none/,
    ],
    ['no data.pkl', zip([member('data/0', floats)]), /INVALID: expected one data\.pkl .* found 0/],
    [
      'a short storage',
      archive({ numel: 7 }),
      /INVALID: expected 28 bytes for storage "0" of x\.bin but received 24/,
    ],
    [
      'a tensor past its storage',
      archive({ start: 1 }),
      /INVALID: .*shape \[2, 3\].* from element 1 .* only 24 bytes/,
    ],
    ['strides past the storage', archive({ stride: [4, 1] }), /INVALID: .*strides \[4, 1\]/],
    ['a negative stride', archive({ stride: [-3, 1] }), /INVALID: expected 2 strides/],
    ['a stride too few', archive({ stride: [1] }), /INVALID: expected 2 strides/],
    ['a negative offset', archive({ start: -1 }), /INVALID: expected an offset/],
    [
      'an overflowing shape',
      archive({ size: [2 ** 40, 2 ** 40], stride: [0, 0] }),
      /INVALID: expected a shape/,
    ],
    [
      'an unlisted storage',
      archive({ storage: ['os', 'system'] }),
      /UNSUPPORTED: .*"os\.system".*not executed/,
    ],
    [
      'a function for a storage',
      archive({ storage: ['torch._utils', '_rebuild_tensor_v2'] }),
      /INVALID: expected a storage reference/,
    ],
    [
      'an untyped storage without dtype',
      archive({ numel: 24, storage: ['torch.storage', 'UntypedStorage'] }),
      /INVALID: expected a dtype/,
    ],
  ])('are refused for %s', (_, bytes, message) => {
    expect(failure(() => parse(bytes))).toMatch(message)
  })

  it.each<[string, number[], RegExp]>([
    [
      'a call of os.system',
      [...global('posix', 'system'), ...unicode('true'), 0x85, 0x52, 0x2e],
      /UNSUPPORTED: .*"posix\.system"/,
    ],
    [
      'STACK_GLOBAL of builtins',
      [...unicode('builtins'), ...unicode('eval'), 0x93, 0x2e],
      /UNSUPPORTED: .*"builtins\.eval"/,
    ],
    [
      'torch.storage._load_from_bytes',
      [...global('torch.storage', '_load_from_bytes'), 0x2e],
      /UNSUPPORTED: .*_load_from_bytes/,
    ],
    ['NEWOBJ', [...global('torch', 'Size'), 0x29, 0x81, 0x2e], /UNSUPPORTED: .*0x81/],
    ['INST', [0x69, ...text('os\nsystem\n')], /UNSUPPORTED: .*0x69/],
    ['an extension code', [0x82, 1], /UNSUPPORTED: .*0x82/],
    [
      'a call of a dtype',
      [...global('torch', 'float32'), 0x29, 0x52, 0x2e],
      /UNSUPPORTED: expected no call of torch\.float32/,
    ],
    ['a call of text', [...unicode('x'), 0x29, 0x52, 0x2e], /INVALID: .*a call of a value/],
    ['no stop', [0x7d], /INVALID: .*bytes missing/],
    ['an empty stack', [0x2e], /INVALID: .*an operand missing/],
    ['text of 4 GB', [0x58, 0xff, 0xff, 0xff, 0xff, 0x2e], /INVALID: .*bytes missing/],
    ['text of 2^63 bytes', [0x8d, 0, 0, 0, 0, 0, 0, 0, 0x80, 0x2e], /INVALID: .*bytes missing/],
    [
      'a long of 255 bytes',
      [0x8a, 255, ...new Array<number>(255).fill(1), 0x2e],
      /INVALID: .*integer of 255 bytes/,
    ],
    ['an unset memo', [0x68, 3, 0x2e], /INVALID: .*no memo entry 3/],
    ['a dict as key', [0x7d, 0x7d, 0x4e, 0x73, 0x2e], /UNSUPPORTED: .*keys/],
    ['a list on top', [0x5d, 0x2e], /INVALID: expected a dict of tensors/],
    [
      'a dict of numbers',
      [0x7d, ...unicode('a'), 0x4b, 1, 0x73, 0x2e],
      /INVALID: expected a dict of tensors/,
    ],
    ['objects left over', [0x7d, 0x7d, 0x2e], /INVALID: .*left on the stack/],
    ['protocol 6', [0x80, 6], /UNSUPPORTED: .*protocol/],
  ])('are refused for a pickle with %s', (_, body, message) => {
    const pickle = Uint8Array.from(body[0] === 0x80 ? body : [0x80, 2, ...body])
    expect(failure(() => parse(zip([member('data.pkl', pickle), member('data/0', floats)])))).toMatch(message)
  })

  it('are read in linear time when deeply nested, and never recursed into', () => {
    const depth = 300_000
    const nested = Uint8Array.from([
      0x80,
      2,
      ...new Array<number>(depth).fill(0x5d),
      ...new Array<number>(depth - 1).fill(0x61),
      0x2e,
    ])
    expect(failure(() => parse(zip([member('data.pkl', nested)])))).toMatch(
      /INVALID: expected a dict of tensors/,
    )
  })
})

describe('mutated archives', () => {
  it.each(['strides.bin', 'dtypes.bin', 'training.bin'])('%s never breaks the reader', name => {
    const bytes = new Uint8Array(readFileSync(fixture(name)))
    const latin1 = Buffer.from(bytes).toString('latin1')
    const pickleEnd = latin1.indexOf('PK\x03\x04', 4)
    const directory = latin1.indexOf('PK\x01\x02')
    const regions = [
      [0, 64],
      [64, pickleEnd],
      [64, pickleEnd],
      [directory, bytes.length],
      [pickleEnd, directory],
    ] as const
    const result = fuzz(parseTorchArchive, bytes, regions, 4000, 7)
    expect(result.bugs).toEqual([])
    expect(result.refused).toBeGreaterThan(1500)
    expect(result.accepted).toBeGreaterThan(100)
    expect(result.slowest).toBeLessThan(500)
  })

  it('never breaks the zip64 reader', () => {
    const bytes = zip([member('data.pkl', pickled()), member('data/0', floats)], true)
    const result = fuzz(
      parseTorchArchive,
      bytes,
      [
        [0, bytes.length],
        [bytes.length - 250, bytes.length],
      ],
      4000,
      9,
    )
    expect(result.bugs).toEqual([])
    expect(result.refused).toBeGreaterThan(1000)
    expect(result.slowest).toBeLessThan(500)
  })
})
