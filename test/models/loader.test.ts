import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeEach, describe, expect, test } from 'vitest'
import { TensorMap, type WeightEntry } from '../../lib/checkpoint/tensor-map.ts'
import { Device } from '../../lib/device.ts'
import { activationOf, advance, iota, Loader, under } from '../../lib/models/loader.ts'
import { conv2d, linear } from '../../lib/ops.ts'
import { assertClose } from '../helpers/safetensors.ts'

const device = Device.open('cpu')
const folder = mkdtempSync(join(tmpdir(), 'mgm-loader-'))
afterAll(async () => {
  await device.close()
  rmSync(folder, { recursive: true })
})

// One file of numbers, at an odd offset so that nothing is aligned by luck.
const numbers = Float32Array.from({ length: 256 }, (_, i) => Math.fround(Math.sin(i * 1.7) * 2))
const file = join(folder, 'numbers.bin')
const FIRST = 3
writeFileSync(file, Buffer.concat([Buffer.alloc(FIRST), Buffer.from(numbers.buffer)]))

let entries: Map<string, WeightEntry>
beforeEach(() => {
  entries = new Map()
})
function entry(name: string, start: number, shape: number[], strides?: number[]): WeightEntry {
  const size = shape.reduce((a, b) => a * b, 1)
  const made: WeightEntry = {
    name,
    dtype: 'f32',
    shape,
    offset: FIRST + 4 * start,
    byteLength: 4 * size,
    file,
    ...(strides ? { strides } : {}),
  }
  entries.set(name, made)
  return made
}

describe('Loader', () => {
  test('reads from any offset', async () => {
    const loader = new Loader(device)
    const tensor = loader.f32(entry('x', 5, [3, 4]))
    expect(tensor.shape).toEqual([3, 4])
    expect(await tensor.readF32()).toEqual(numbers.slice(5, 17))
    loader.dispose()
    expect(tensor.disposed).toBe(true)
  })

  test('puts the axes of a permuted tensor right', async () => {
    // Element (i, j, k) of [2, 3, 4] lies at i + 2·k + 8·j.
    const x = entry('x', 0, [2, 3, 4], [1, 8, 2])
    const loader = new Loader(device)
    const taken = under(new TensorMap('test', entries), '').take('x', [2, 3, 4])
    const expected = new Float32Array(24)
    for (let i = 0; i < 2; i++)
      for (let j = 0; j < 3; j++)
        for (let k = 0; k < 4; k++) expected[(i * 3 + j) * 4 + k] = numbers[i + 2 * k + 8 * j]!
    expect(await loader.f32(taken).readF32()).toEqual(expected)
    expect(() => loader.f32({ ...x, strides: [1, 8, 1] })).toThrow(/expected a dense tensor for "x"/)
    loader.dispose()
  })

  test('joins biases, and stacks matrices to match', async () => {
    const loader = new Loader(device)
    const bias = await loader.concat([entry('a', 0, [2]), entry('b', 7, [1]), entry('c', 20, [3])])
    const expected = [0, 1, 7, 20, 21, 22].map(i => numbers[i]!)
    expect(Array.from(await bias.readF32())).toEqual(expected)

    const starts = [30, 50, 70]
    const rows = [2, 1, 3]
    const w = loader.linear(starts.map((start, i) => entry(`w${i}`, start, [rows[i]!, 5])))
    const y = device.scope(() => linear(device.tensor(numbers.slice(100, 105), [1, 5]), w, { bias }))
    const flat = starts.flatMap((start, i) => Array.from({ length: rows[i]! }, (_, r) => start + 5 * r))
    const naive = flat.map(
      (at, n) =>
        expected[n]! +
        Array.from({ length: 5 }, (_, k) => numbers[at + k]! * numbers[100 + k]!).reduce((a, b) => a + b),
    )
    assertClose('linear', await y.readF32(), Float32Array.from(naive), 1e-5)
    y.dispose()
    loader.dispose()
  })

  test('turns a convolution of the checkpoint into the one of the op', async () => {
    const [o, c, k] = [3, 2, 2]
    const loader = new Loader(device)
    const w = loader.conv(entry('w', 0, [o, c, k, k]))
    const x = numbers.slice(100, 100 + 4 * 4 * c) // [1, 4, 4, 2]
    const y = device.scope(() => conv2d(device.tensor(x, [1, 4, 4, c]), w, { kernel: [k, k], stride: 2 }))
    expect(y.shape).toEqual([1, 2, 2, o])
    const expected = new Float32Array(2 * 2 * o)
    for (let oy = 0; oy < 2; oy++)
      for (let ox = 0; ox < 2; ox++)
        for (let out = 0; out < o; out++)
          for (let ch = 0; ch < c; ch++)
            for (let ky = 0; ky < k; ky++)
              for (let kx = 0; kx < k; kx++)
                expected[(oy * 2 + ox) * o + out]! +=
                  numbers[((out * c + ch) * k + ky) * k + kx]! *
                  x[((oy * 2 + ky) * 4 + ox * 2 + kx) * c + ch]!
    assertClose('conv2d', await y.readF32(), expected, 1e-5)
    y.dispose()
    loader.dispose()
  })

  test('storage: the file’s, the chosen one, and quantized only where allowed', () => {
    const x = entry('x', 0, [2, 32])
    expect(new Loader(device).storage(x)).toBe('f32')
    expect(new Loader(device, { dtype: 'bf16' }).storage(x, true)).toBe('bf16')
    const quantizing = new Loader(device, { dtype: 'f16', quantize: 'int4' })
    expect(quantizing.storage(x)).toBe('f16')
    expect(quantizing.storage(x, true)).toBe('int4')
    expect(quantizing.linear(x, { quantizable: true }).dtype).toBe('int4')
    quantizing.dispose()
  })

  test('a missing file is an error of the library, and nothing stays behind', async () => {
    await device.synchronize()
    const before = device.memory().used
    const loader = new Loader(device)
    loader.f32(entry('x', 0, [64]))
    const gone = { ...entry('y', 0, [4]), file: join(folder, 'gone.bin') }
    expect(() => loader.f32(gone)).toThrow(expect.objectContaining({ name: 'MgmError' }))
    expect(() => loader.f32({ ...entry('z', 0, [4]), offset: 1e6 })).toThrow(
      expect.objectContaining({ name: 'MgmError' }),
    )
    loader.dispose()
    await device.synchronize()
    expect(device.memory().used).toBe(before)
  })

  test('pause obeys the signal', async () => {
    const controller = new AbortController()
    const loader = new Loader(device, { signal: controller.signal })
    await loader.pause()
    controller.abort()
    await expect(loader.pause()).rejects.toMatchObject({ code: 'ABORTED' })
  })

  test('progress counts a tensor once however often it is read', async () => {
    const events: number[] = []
    const loader = new Loader(device, { onProgress: ({ loaded }) => events.push(loaded) })
    const x = entry('x', 0, [8])
    loader.f32(x)
    loader.f32(x)
    await loader.finish()
    expect(events).toEqual([32])
    loader.dispose()
  })
})

test('advance frees what it moves on from', () => {
  device.scope(() => {
    const x = iota(device, 4)
    const y = advance(x, x => x.narrow(0, 1, 2))
    expect(x.disposed).toBe(true)
    expect(y.shape).toEqual([2])
    expect(advance(y, y => y)).toBe(y)
    expect(y.disposed).toBe(false)
  })
})

test('activations by their names in a config', () => {
  expect(activationOf('gelu_pytorch_tanh')).toBe('gelu_tanh')
  expect(activationOf('gelu')).toBe('gelu')
})
