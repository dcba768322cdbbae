import { execFileSync } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Worker } from 'node:worker_threads'
import { afterAll, describe, expect, it } from 'vitest'
import { Device, MappedFile } from '../lib/device.ts'
import { MgmError } from '../lib/errors.ts'
import * as ops from '../lib/ops.ts'
import { scope, type Tensor } from '../lib/tensor.ts'
import { openDevice } from './ops/helpers.ts'

const device = openDevice()
const folder = mkdtempSync(join(tmpdir(), 'mgm-device-'))
afterAll(() => rmSync(folder, { recursive: true }))
const iota = (n: number) => Float32Array.from({ length: n }, (_, i) => i)

function refusal(body: () => unknown): MgmError {
  try {
    body()
  } catch (error) {
    expect(error).toBeInstanceOf(MgmError)
    return error as MgmError
  }
  return expect.fail('expected an error')
}

describe('tensors', () => {
  it.each(['f32', 'i32', 'u8', 'bf16', 'f16'] as const)(
    '%s data comes back as it was written',
    async dtype => {
      const array = {
        f32: Float32Array,
        i32: Int32Array,
        u8: Uint8Array,
        bf16: Uint16Array,
        f16: Uint16Array,
      }[dtype]
      const data = array.from([1, 2, 3, 4, 250, 6])
      expect(await device.tensor(data, [2, 3], dtype).read()).toEqual(data)
    },
  )

  it('views share memory and read through their strides', async () => {
    const x = device.tensor(iota(24), [2, 3, 4])
    expect([...(await x.narrow(1, 1, 2).read())]).toEqual([
      4, 5, 6, 7, 8, 9, 10, 11, 16, 17, 18, 19, 20, 21, 22, 23,
    ])
    expect([...(await x.narrow(-1, 2, 1).read())]).toEqual([2, 6, 10, 14, 18, 22])
    const row = x.narrow(0, 1, 1).reshape(-1)
    expect(row.shape).toEqual([12])
    row.write(new Float32Array(12).fill(7))
    expect([...(await x.read()).slice(10, 14)]).toEqual([10, 11, 7, 7])
  })

  it('reshapes strided views where strides allow it, and refuses elsewhere', async () => {
    const x = device.tensor(iota(24), [4, 6])
    const heads = x.narrow(1, 2, 4).reshape(4, 2, 2)
    expect([...(await heads.read())]).toEqual([2, 3, 4, 5, 8, 9, 10, 11, 14, 15, 16, 17, 20, 21, 22, 23])
    expect(refusal(() => x.narrow(1, 2, 4).reshape(16)).message).toMatch(
      /expected strides that allow reshape/,
    )
    expect(refusal(() => x.reshape(5, -1)).message).toBe(
      'expected a shape of 24 elements for reshape of f32 [4, 6] but received [5, -1]',
    )
  })

  it('handles zero elements and scalars', async () => {
    expect((await device.empty([0, 3]).read()).length).toBe(0)
    expect((await ops.linear(device.empty([0, 2]), ops.packLinear(device.zeros([3, 2]))).read()).length).toBe(
      0,
    )
    expect([...(await device.tensor([5], []).read())]).toEqual([5])
  })

  it('says what is wrong with shapes, data and dtypes', () => {
    expect(refusal(() => device.empty([2 ** 40, 2 ** 40])).code).toBe('INVALID_ARGUMENT')
    expect(refusal(() => device.empty([-1])).message).toMatch(/expected a representable shape/)
    expect(refusal(() => device.empty([1.5])).message).toMatch(
      /expected an integer for shape but received 1.5/,
    )
    expect(refusal(() => device.empty([1, 1, 1, 1, 1, 1])).message).toMatch(/at most 5 dimensions/)
    expect(refusal(() => device.tensor(iota(5), [2, 3])).message).toMatch(
      /expected 6 elements for write of f32 \[2, 3\] but received 5/,
    )
    expect(refusal(() => device.tensor(new Float64Array(6) as never, [2, 3])).code).toBe('INVALID_ARGUMENT')
    expect(refusal(() => device.empty([1], 'int8')).message).toMatch(/dtype/)
    expect(refusal(() => device.zeros([3]).narrow(0, 2, 2)).message).toMatch(/range within 3/)
  })

  it('refuses a disposed tensor', async () => {
    const x = device.zeros([2, 2])
    x.dispose()
    x.dispose()
    await expect(x.read()).rejects.toThrow('expected a live tensor')
    expect(refusal(() => ops.cast(x, 'bf16')).message).toMatch(/expected a live tensor/)
  })
})

describe('ops', () => {
  it('name themselves, the argument, and what was expected', () => {
    const x = device.zeros([2, 3])
    expect(refusal(() => ops.linear(x, device.zeros([4, 3]))).message).toBe(
      '[linear] expected weights packed by packLinear for w but received f32 [4, 3]',
    )
    expect(refusal(() => ops.linear(x, ops.packLinear(device.zeros([4, 5])))).message).toBe(
      '[linear] expected packed weights [any, 3] for w but received f32 [4, 5] (panels)',
    )
    expect(
      refusal(() => ops.linear(x, ops.packLinear(device.zeros([4, 3])), { bias: device.zeros([5]) })).message,
    ).toBe('[linear] expected f32 [4] for bias but received f32 [5]')
    expect(refusal(() => ops.rmsNorm(x, device.zeros([3]), { eps: Number.NaN })).message).toMatch(
      /a finite number for eps/,
    )
  })

  it('refuse tensors of two devices', async () => {
    const other = Device.open('cpu', { threads: 1 })
    const w = ops.packLinear(other.zeros([4, 3]))
    expect(refusal(() => ops.linear(device.zeros([2, 3]), w)).message).toMatch(/tensors of one device/)
    await other.close()
  })

  it('run in the order they were called', async () => {
    const x = device.tensor(iota(4), [2, 2])
    const before = ops.cast(x, 'f32')
    x.write(new Float32Array(4).fill(9))
    const after = ops.cast(x, 'f32')
    expect([...(await before.read())]).toEqual([0, 1, 2, 3])
    expect([...(await after.read())]).toEqual([9, 9, 9, 9])
  })

  it('report a failure that only data shows to the next read, then go on', async () => {
    const table = device.tensor(iota(6), [3, 2])
    const bad = ops.embedding(table, device.tensor([3], [1], 'i32'))
    await expect(bad.read()).rejects.toThrow(/expected an id below 3 but received 3/)
    expect([...(await ops.embedding(table, device.tensor([2], [1], 'i32')).read())]).toEqual([4, 5])
  })
})

describe('scope', () => {
  it('frees what is not returned, at any depth of the result', () => {
    const made: Tensor[] = []
    const used = device.memory().used
    const result = scope(() => {
      const a = device.zeros([1000])
      const b = device.zeros([1000])
      const inner = scope(() => {
        const c = device.zeros([1000])
        made.push(device.zeros([1000]))
        return { list: [c] }
      })
      made.push(a, inner.list[0]!)
      return { b, nested: { list: inner.list } }
    })
    expect(made.map(t => t.disposed)).toEqual([true, true, false])
    expect(result.b.disposed).toBe(false)
    result.b.dispose()
    result.nested.list[0]!.dispose()
    expect(device.memory().used).toBe(used)
  })

  it('frees everything when the body throws, and refuses promises', () => {
    let leaked: Tensor | undefined
    expect(() =>
      scope(() => {
        leaked = device.zeros([3])
        throw new Error('mine')
      }),
    ).toThrow('mine')
    expect(leaked!.disposed).toBe(true)
    expect(refusal(() => scope(async () => 1)).message).toMatch(/synchronous function/)
  })

  it('reuses freed memory without breaking work under way', async () => {
    // Each round frees its input at once; the next allocates the same block while the op may still be waiting.
    const results: Tensor[] = []
    for (let round = 0; round < 200; round++)
      results.push(scope(() => ops.cast(device.tensor(new Float32Array(4096).fill(round), [4096]), 'f32')))
    for (const [round, result] of results.entries()) {
      const data = await result.readF32()
      expect(data.every(v => v === round)).toBe(true)
      result.dispose()
    }
  })
})

describe('capture', () => {
  it('records without running, then replays over the same memory', async () => {
    const x = device.tensor([1, 2], [1, 2])
    const w = ops.packLinear(device.tensor([1, 1, 0, 2], [2, 2]))
    const graph = device.capture(() => ops.linear(ops.linear(x, w), w))
    expect(graph.length).toBe(2)
    graph.replay()
    expect([...(await graph.outputs.read())]).toEqual([7, 8])
    // Memory of the graph's inner tensors must not be handed to others between replays.
    for (let i = 0; i < 20; i++) device.tensor(new Float32Array(2).fill(1e9), [1, 2]).dispose()
    x.write(Float32Array.of(2, 3))
    graph.replay()
    expect([...(await graph.outputs.read())]).toEqual([11, 12])
    graph.replay()
    graph.dispose()
    expect([...(await graph.outputs.read())]).toEqual([11, 12])
    expect(refusal(() => graph.replay()).message).toMatch(/disposed/)
  })

  it('keeps weights that were disposed after recording', async () => {
    const x = device.tensor([1, 2], [1, 2])
    const w = ops.packLinear(device.tensor([3, 0, 0, 3], [2, 2]))
    const graph = device.capture(() => ops.linear(x, w))
    w.dispose()
    const other = ops.packLinear(device.tensor([9, 9, 9, 9], [2, 2]))
    graph.replay()
    expect([...(await graph.outputs.read())]).toEqual([3, 6])
    other.dispose()
    graph.dispose()
  })

  it('refuses reads, writes and nesting inside, and recovers from a throw', async () => {
    const x = device.zeros([2])
    expect(refusal(() => device.capture(() => x.write(new Float32Array(2)))).message).toMatch(
      /only ops during a capture but received write/,
    )
    expect(refusal(() => device.capture(() => device.capture(() => x))).message).toMatch(/received capture/)
    expect([...(await ops.cast(x, 'f32').read())]).toEqual([0, 0])
  })
})

describe('mapped files', () => {
  it('give tensors over their bytes, aligned or not, that outlive the handle', async () => {
    const path = join(folder, 'data.bin')
    const bytes = new Uint8Array(40)
    bytes.set(new Uint8Array(iota(4).buffer), 8)
    bytes.set(new Uint8Array(iota(3).buffer), 25)
    writeFileSync(path, bytes)
    const file = new MappedFile(path)
    expect(file.size).toBe(40)
    const aligned = device.fromFile(file, 8, [2, 2], 'f32')
    const unaligned = device.fromFile(file, 25, [3], 'f32')
    expect(refusal(() => device.fromFile(file, 32, [3], 'f32')).message).toMatch(
      /expected 12 bytes at offset 32 of .*data.bin but received a file of 40/,
    )
    file.close()
    expect([...(await aligned.read())]).toEqual([0, 1, 2, 3])
    expect([...(await unaligned.read())]).toEqual([0, 1, 2])
    expect(refusal(() => file.size).code).toBe('CLOSED')
    expect(refusal(() => new MappedFile(join(folder, 'missing'))).message).toMatch(/missing.*No such file/)
    expect(refusal(() => new MappedFile(folder)).message).toMatch(/not a regular file/)
  })
})

describe('devices', () => {
  it('refuse unknown names and options', () => {
    expect(refusal(() => Device.open('tpu')).message).toMatch(
      /expected 'cpu', 'cuda' or 'cuda:N' for device but received "tpu"/,
    )
    expect(refusal(() => Device.open('cuda:1')).code).toBe('DEVICE_UNAVAILABLE')
    expect(refusal(() => Device.open('cpu', { threads: 0 })).message).toMatch(/threads/)
  })

  it('enforce a memory limit and recover when memory is freed', async () => {
    const small = Device.open('cpu', { threads: 1, memoryLimit: 1 << 20 })
    const held = small.zeros([1 << 17])
    const error = refusal(() => small.empty([1 << 18]))
    expect(error.code).toBe('OUT_OF_MEMORY')
    expect(error.message).toMatch(/expected 1048576 free bytes/)
    held.dispose()
    small.empty([1 << 18]).dispose()
    await small.close()
  })

  it('finish enqueued work on close, then refuse', async () => {
    const own = Device.open('cpu', { threads: 2 })
    const x = own.tensor(new Float32Array(512 * 512).fill(1), [512, 512])
    const w = ops.packLinear(x)
    let y = x
    for (let i = 0; i < 10; i++) y = ops.linear(y, w)
    const pending = y.read()
    const closed = own.close()
    expect((await pending).length).toBe(512 * 512)
    await closed
    await own.close()
    expect(refusal(() => own.zeros([1])).code).toBe('CLOSED')
    await expect(y.read()).rejects.toThrow('closed')
    y.dispose()
  })

  it('return all memory over thousands of ops', async () => {
    const start = device.memory()
    for (let i = 0; i < 3000; i++) scope(() => ops.cast(device.zeros([100 + (i % 50)]), 'bf16'))
    const left = scope(() => [])
    expect(left).toEqual([])
    await device.synchronize()
    expect(device.memory().reserved - start.reserved).toBeLessThan(1 << 20)
  })
})

describe('environments', () => {
  const addon = fileURLToPath(new URL('../build/native/Release/mgm.node', import.meta.url))
  // Plain CommonJS against the addon, so that worker threads and children need no TypeScript.
  const busy = `
    const native = require(${JSON.stringify(addon)})
    const op = name => native.opTable().findIndex(o => o.name === name)
    const device = native.openCpu({ threads: 2, memoryLimit: 0 })
    const x = device.empty([256, 256], 'f32')
    x.write(new Float32Array(256 * 256).fill(1))
    const w = native.call(op('packLinear'), [[x], 'f32', false])[0]
    let y = x
    for (let i = 0; i < 300; i++) y = native.call(op('linear'), [y, w, undefined, undefined, undefined, 'none', 'f32'])[0]
  `

  it('compute in several worker threads at once and exit cleanly', async () => {
    const run = () =>
      new Worker(`${busy}; y.read().then(d => require('worker_threads').parentPort.postMessage(d.length))`, {
        eval: true,
      })
    const workers = [run(), run(), run()]
    const exits = workers.map(worker => once(worker, 'exit'))
    const lengths = await Promise.all(workers.map(async worker => (await once(worker, 'message'))[0]))
    expect(lengths).toEqual([65536, 65536, 65536])
    expect((await Promise.all(exits)).flat()).toEqual([0, 0, 0])
  })

  it('survive the termination of a worker that is busy', async () => {
    for (let i = 0; i < 3; i++) {
      const worker = new Worker(`${busy}; y.read(); require('worker_threads').parentPort.postMessage(1)`, {
        eval: true,
      })
      await once(worker, 'message')
      await worker.terminate()
    }
    expect([...(await device.tensor([1], [1]).read())]).toEqual([1])
  })

  it.each([
    ['waits for a pending read', `${busy}; y.read().then(d => console.log(d.length))`, '65536'],
    ['exits with work enqueued that nobody waits for', `${busy}; console.log('out')`, 'out'],
    ['exits from process.exit while busy', `${busy}; y.read(); console.log('bye'); process.exit(0)`, 'bye'],
  ])('a process %s', (_, code, output) => {
    expect(execFileSync(process.execPath, ['-e', code], { encoding: 'utf8', timeout: 30_000 }).trim()).toBe(
      output,
    )
  })
})
