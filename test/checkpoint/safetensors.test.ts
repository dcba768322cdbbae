import { mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
// @ts-expect-error The package has no types.
import { SafeTensor } from 'safetensors'
import { afterAll, describe, expect, it } from 'vitest'
import { openTensorFolder } from '../../lib/checkpoint/files.ts'
import { openSafetensors, parseSafetensors } from '../../lib/checkpoint/safetensors.ts'
import { BytesSource, FileSource } from '../../lib/checkpoint/source.ts'
import { failure } from '../helpers/failure.ts'
import { fuzz } from './fuzz.ts'

const FIXTURES = join(import.meta.dirname, '../fixtures')
const SHARD = join(FIXTURES, 'mgm-gemma-tiny/MGM-2B/model-00002-of-00002.safetensors')

const scratch = mkdtempSync(join(tmpdir(), 'mgm-safetensors-'))
afterAll(() => rmSync(scratch, { recursive: true }))

type Header = Record<string, { dtype: unknown; shape: unknown; data_offsets: unknown } | unknown>

/** A file of that header and `dataBytes` zeros; `headerText` and `headerLength` replace what would be written. */
function build(
  header: Header,
  dataBytes: number,
  headerText = JSON.stringify(header),
  headerLength?: bigint,
): Uint8Array {
  const text = new TextEncoder().encode(headerText)
  const bytes = new Uint8Array(8 + text.length + dataBytes)
  new DataView(bytes.buffer).setBigUint64(0, headerLength ?? BigInt(text.length), true)
  bytes.set(text, 8)
  return bytes
}

function parse(bytes: Uint8Array) {
  return parseSafetensors(new BytesSource(bytes, 'x.safetensors'), 'x.safetensors')
}

const tensor = (dtype: string, shape: number[], begin: number, end: number) => ({
  dtype,
  shape,
  data_offsets: [begin, end],
})

describe('parseSafetensors', () => {
  it.each([SHARD, join(FIXTURES, 'clip/tower.safetensors'), join(FIXTURES, 'preprocess/land.safetensors')])(
    'agrees with the npm reader on dtype, shape and bytes of %s',
    file => {
      const bytes = new Uint8Array(readFileSync(file))
      // The npm reader stumbles over metadata: blank it, keeping every offset.
      const blanked = Buffer.from(bytes)
      const metadata = /"__metadata__":\{[^}]*\},/.exec(blanked.toString('latin1'))
      if (metadata) blanked.fill(' ', metadata.index, metadata.index + metadata[0].length)
      const oracle = new SafeTensor(Uint8Array.from(blanked))
      const { tensors } = openSafetensors(file)
      const names = [...oracle.metadata.keys()]
      expect([...tensors.keys()].sort()).toEqual(names.sort())
      using source = new FileSource(file)
      for (const entry of tensors.values()) {
        const theirs = oracle.metadata.get(entry.name)!
        expect(entry.dtype).toBe(theirs.dtype.toLowerCase())
        expect(entry.shape).toEqual(theirs.shape)
        expect(
          Buffer.compare(source.read(entry.offset, entry.byteLength), oracle.getTensor(entry.name)),
        ).toBe(0)
      }
    },
  )

  it('keeps odd names, empty tensors, scalars and metadata', () => {
    const header = `{"__metadata__":{"format":"pt"},"__proto__":${JSON.stringify(tensor('F32', [], 0, 4))},"e":${JSON.stringify(tensor('BF16', [0, 7], 4, 4))},"b":${JSON.stringify(tensor('F4', [3, 2], 4, 7))}}`
    const { tensors, metadata } = parse(build({}, 7, header))
    expect(metadata.get('format')).toBe('pt')
    expect([...tensors.keys()]).toEqual(['__proto__', 'e', 'b'])
    expect(tensors.get('__proto__')).toMatchObject({
      dtype: 'f32',
      shape: [],
      offset: 8 + header.length,
      byteLength: 4,
    })
    expect(tensors.get('b')).toMatchObject({ dtype: 'f4', byteLength: 3 })
  })

  it.each<[string, Uint8Array, RegExp]>([
    ['no bytes', new Uint8Array(0), /at least 8 bytes for x\.safetensors but received 0/],
    ['a header past the end', build({}, 0, '{}', 3n), /at most 2 for the header length .* received 3/],
    ['a header length of 2^63', build({}, 0, '{}', 1n << 63n), /received 9223372036854775808/],
    [
      'a Git LFS pointer',
      new TextEncoder().encode('version https://git-lfs.github.com/spec/v1\noid sha256:0\n'),
      /git lfs pull/,
    ],
    ['no JSON', build({}, 0, '{"a":'), /expected UTF-8 JSON in x\.safetensors/],
    ['bad UTF-8', Uint8Array.of(1, 0, 0, 0, 0, 0, 0, 0, 0xff), /expected UTF-8 JSON/],
    ['an array', build({}, 0, '[]'), /expected a JSON object for the header/],
    [
      'an unknown dtype',
      build({ w: tensor('F33', [1], 0, 4) }, 4),
      /known dtype for tensor "w" .* received "F33"/,
    ],
    ['a dtype from the prototype', build({ w: tensor('constructor', [1], 0, 4) }, 4), /known dtype/],
    [
      'a negative size',
      build({ w: tensor('F32', [-1], 0, 4) }, 4),
      /a shape for tensor "w" .* received \[-1\]/,
    ],
    ['a fraction', build({ w: tensor('F32', [1.5], 0, 6) }, 6), /a shape for tensor "w"/],
    [
      'a product beyond 2^53',
      build({ w: tensor('F32', [2 ** 31, 2 ** 31], 0, 0) }, 0),
      /a shape for tensor "w"/,
    ],
    [
      'an overflow behind a zero',
      build({ w: tensor('F32', [0, 2 ** 52, 2 ** 52], 0, 0) }, 0),
      /a shape for tensor "w"/,
    ],
    [
      'no shape',
      build({ w: { dtype: 'F32', data_offsets: [0, 4] } }, 4),
      /a shape for tensor "w" .* received undefined/,
    ],
    ['a null entry', build({ w: null }, 0), /a JSON object for tensor "w" .* received null/],
    [
      'offsets that are not two',
      build({ w: { dtype: 'F32', shape: [1], data_offsets: [0] } }, 4),
      /two byte offsets for tensor "w"/,
    ],
    [
      'fewer bytes than the shape',
      build({ w: tensor('F32', [2, 2], 0, 12) }, 12),
      /16 bytes for tensor "w" of shape \[2, 2\] .* \[0, 12\]/,
    ],
    ['a range backwards', build({ w: tensor('F32', [1], 4, 0) }, 4), /4 bytes for tensor "w"/],
    [
      'an overlap',
      build({ a: tensor('U8', [4], 0, 4), b: tensor('U8', [4], 2, 6) }, 6),
      /"b" at offset \d+ .* overlaps the one before/,
    ],
    [
      'a hole',
      build({ a: tensor('U8', [4], 0, 4), b: tensor('U8', [4], 5, 9) }, 9),
      /"b" at offset .* leaves a hole/,
    ],
    [
      'a truncated file',
      build({ a: tensor('U8', [4], 0, 4) }, 3),
      /the end of its last tensor "a", but it has \d+ bytes/,
    ],
    ['trailing bytes', build({ a: tensor('U8', [4], 0, 4) }, 5), /the end of its last tensor "a"/],
    [
      'a name given twice',
      build(
        {},
        8,
        `{"a":${JSON.stringify(tensor('U8', [4], 0, 4))},"a":${JSON.stringify(tensor('U8', [4], 4, 8))}}`,
      ),
      /leaves a hole/,
    ],
  ])('refuses %s', (_, bytes, message) => {
    const text = failure(() => parse(bytes))
    expect(text).toMatch(/^CHECKPOINT_INVALID: /)
    expect(text).toMatch(message)
    expect(text).toContain('x.safetensors')
  })

  it('refuses every truncation of a real file', () => {
    const bytes = new Uint8Array(readFileSync(SHARD))
    for (const length of [0, 7, 8, 9, 500, bytes.length >> 1, bytes.length - 1]) {
      expect(failure(() => parse(bytes.subarray(0, length)))).toMatch(/^CHECKPOINT_INVALID/)
    }
  })

  it('survives mutated headers', () => {
    const bytes = new Uint8Array(readFileSync(SHARD))
    const headerEnd = 8 + Number(new DataView(bytes.buffer).getBigUint64(0, true))
    const regions = [
      [0, 8],
      [8, headerEnd],
      [8, headerEnd],
      [8, headerEnd],
    ] as const
    const result = fuzz(parseSafetensors, bytes, regions, 4000, 1)
    expect(result.bugs).toEqual([])
    expect(result.refused).toBeGreaterThan(2000)
    expect(result.accepted).toBeGreaterThan(10) // Changes inside a name are valid files.
    expect(result.slowest).toBeLessThan(500)
  })
})

describe('files', () => {
  it('must be regular; links to them are followed', () => {
    expect(failure(() => openSafetensors(scratch))).toMatch(
      /^CHECKPOINT_INVALID: expected a regular file .* a folder/,
    )
    expect(failure(() => openSafetensors('/dev/null'))).toMatch(/a special file/)
    expect(failure(() => openSafetensors(join(scratch, 'none')))).toMatch(/^CHECKPOINT_INVALID: .*ENOENT/)
    const link = join(scratch, 'link.safetensors')
    symlinkSync(SHARD, link)
    expect(openSafetensors(link).tensors.size).toBe(openSafetensors(SHARD).tensors.size)
    expect(openSafetensors(link).tensors.get('model.norm.weight')!.file).toBe(link)
  })
})

describe('sharded folders', () => {
  let count = 0
  /** Two shards, `a` in the first and `b` in the second, and an index as given. */
  function folder(weightMap: unknown, shards = 2): string {
    const path = join(scratch, `shards-${count++}`)
    mkdirSync(path)
    ;['a', 'b'].slice(0, shards).forEach((name, i) => {
      writeFileSync(join(path, `s${i}.safetensors`), build({ [name]: tensor('U8', [4], 0, 4) }, 4))
    })
    writeFileSync(join(path, 'model.safetensors.index.json'), JSON.stringify({ weight_map: weightMap }))
    return path
  }

  it('are merged', () => {
    const path = folder({ a: 's0.safetensors', b: 's1.safetensors' })
    const { tensors, files } = openTensorFolder(path)
    expect([...tensors.values()].map(e => [e.name, e.file])).toEqual([
      ['a', join(path, 's0.safetensors')],
      ['b', join(path, 's1.safetensors')],
    ])
    expect(files).toHaveLength(2)
  })

  it.each<[string, unknown, number, RegExp]>([
    [
      'a missing shard',
      { a: 's0.safetensors', b: 's1.safetensors' },
      1,
      /1 of them are missing: s1\.safetensors/,
    ],
    [
      'a tensor not in its shard',
      { a: 's0.safetensors', b: 's1.safetensors', c: 's1.safetensors' },
      2,
      /tensor "c" in .*s1\.safetensors/,
    ],
    ['a tensor not in the index', { a: 's0.safetensors', c: 's1.safetensors' }, 2, /tensor "c" in .*s1/],
    [
      'a tensor listed for another shard',
      { a: 's1.safetensors', b: 's1.safetensors' },
      2,
      /tensor "a" in .*s1/,
    ],
    [
      'a path',
      { a: '../s0.safetensors' },
      2,
      /name of a \.safetensors or \.bin file for tensor "a" .* "\.\.\/s0/,
    ],
    ['a number', { a: 3 }, 2, /for tensor "a" .* received 3/],
    ['no weight_map', undefined, 2, /an object for "weight_map"/],
  ])('refuse %s', (_, weightMap, shards, message) => {
    const text = failure(() => openTensorFolder(folder(weightMap, shards)))
    expect(text).toMatch(/^CHECKPOINT_INVALID: /)
    expect(text).toMatch(message)
  })

  it('name an unlisted tensor', () => {
    const path = folder({ a: 's0.safetensors', b: 's1.safetensors' })
    writeFileSync(
      join(path, 's1.safetensors'),
      build({ b: tensor('U8', [4], 0, 4), extra: tensor('U8', [1], 4, 5) }, 5),
    )
    expect(failure(() => openTensorFolder(path))).toMatch(/expected no tensor "extra" in .*s1\.safetensors/)
  })

  it('say what an empty folder lacks', () => {
    const path = join(scratch, 'empty')
    mkdirSync(path)
    expect(failure(() => openTensorFolder(path))).toMatch(
      /one of model\.safetensors, pytorch_model\.bin .* an empty folder/,
    )
    expect(failure(() => openTensorFolder(join(scratch, 'none')))).toMatch(/no such folder/)
  })
})
