import { expect, it } from 'vitest'
import { copyTo, Device } from '../../../lib/device.ts'
import type { MgmError } from '../../../lib/errors.ts'
import { native } from '../../../lib/native.ts'
import * as ops from '../../../lib/ops.ts'
import type { Tensor } from '../../../lib/tensor.ts'
import { Random } from '../../ops/helpers.ts'
import { cudaTests, floats } from '../helpers.ts'

cudaTests('the CUDA backend', cuda => {
  const gpu = () => cuda.gpu
  const cpu = cuda.cpu
  it('copies to the GPU and back, views included', async () => {
    const random = new Random()
    const data = random.normals(7 * 5 * 3)
    const x = gpu().tensor(data, [7, 5, 3])
    expect(await x.read()).toEqual(data)
    const view = await x.narrow(1, 1, 2).read()
    const expected = [...data].filter((_, i) => [1, 2].includes(Math.floor(i / 3) % 5))
    expect([...view]).toEqual(expected)
    expect((await gpu().empty([0, 3]).read()).length).toBe(0)
  })

  it('replays a captured step over the same memory', async () => {
    const device = gpu()
    const x = ops.cast(device.tensor([1, 2], [1, 2]), 'bf16')
    const w = ops.packLinear(device.tensor([1, 1, 0, 2], [2, 2]), { dtype: 'bf16' })
    const graph = device.capture(() => ops.linear(ops.linear(x, w), w))
    w.dispose()
    expect(graph.length).toBe(2)
    graph.replay()
    expect([...(await floats(graph.outputs))]).toEqual([7, 8])
    for (let i = 0; i < 5; i++) device.tensor(new Float32Array(2).fill(1e9), [1, 2]).dispose()
    x.write(Uint16Array.of(0x4000, 0x4040)) // 2, 3
    graph.replay()
    expect([...(await floats(graph.outputs))]).toEqual([11, 12])
    graph.dispose()
    expect(() => device.capture(() => x.write(new Uint16Array(2)))).toThrow(/received write/)
    expect([...(await ops.cast(x, 'f32').read())]).toEqual([2, 3])
  })

  it('replays bit for bit what it does eagerly', async () => {
    const random = new Random()
    const device = gpu()
    const [tokens, heads, d] = [37, 4, 32]
    const inputs = () =>
      ops.cast(device.tensor(random.normals(tokens * heads * d), [tokens, heads * d]), 'f16')
    const w = ops.packLinear(
      ops.cast(device.tensor(random.normals(3 * (heads * d) ** 2), [3 * heads * d, heads * d]), 'f16'),
    )
    const norm = device.tensor(random.normals(heads * d), [heads * d])
    const cuQ = device.tensor(Int32Array.of(0, 20, tokens), [3])
    const layer = (x: Tensor) => {
      const qkv = ops.linear(ops.rmsNorm(x, norm, { eps: 1e-5 }), w).reshape(tokens, 3 * heads, d)
      const [q, k, v] = [0, 1, 2].map(i => qkv.narrow(1, i * heads, heads)) as [Tensor, Tensor, Tensor]
      return ops.attention(q, k, v, { cuQ, causal: true })
    }
    const x = inputs()
    const graph = device.capture(() => layer(x))
    for (let turn = 0; turn < 3; turn++) {
      if (turn > 0) x.write(await inputs().read())
      graph.replay()
      expect(await graph.outputs.read(), `seed ${random.seed}`).toEqual(await layer(x).read())
    }
    graph.dispose()
  })

  it('reports what only data shows to the next read, then goes on', async () => {
    const device = gpu()
    const table = device.tensor([0, 1, 2, 3, 4, 5], [3, 2])
    const bad = ops.embedding(table, device.tensor([7], [1], 'i32'))
    await expect(bad.read()).rejects.toThrow(/expected an id below 3 but received 7/)
    expect([...(await ops.embedding(table, device.tensor([2], [1], 'i32')).read())]).toEqual([4, 5])
  })

  it('refuses in words what it cannot do', async () => {
    const device = gpu()
    const x = device.zeros([2, 4])
    const code = (body: () => unknown) => {
      try {
        body()
      } catch (error) {
        return (error as MgmError).code
      }
      return 'none'
    }
    const w = ops.packLinear(x, { dtype: 'bf16' })
    expect(() => ops.linear(x, w)).toThrow('[linear] expected bf16 or f16 activations for x but received f32')
    expect(() => ops.linear(ops.cast(x, 'f16'), w)).toThrow('expected f16, int8 or int4 weights with f16')
    expect(code(() => ops.packLinear(x, { dtype: 'f32' }))).toBe('UNSUPPORTED')
    expect(code(() => device.empty([2 ** 40]))).toBe('OUT_OF_MEMORY')
    expect(code(() => Device.open('cuda:999'))).toBe('DEVICE_UNAVAILABLE')
    const small = Device.open('cuda', { memoryLimit: 1 << 20 })
    expect(() => small.empty([1 << 20])).toThrow(/expected 4194304 free bytes .* limit 1048576/)
    await small.close()
    expect(code(() => small.empty([1]))).toBe('CLOSED')
  })

  it('copies between two GPUs', async ctx => {
    if (native().cudaSurvey().devices.length < 2) return ctx.skip()
    const other = Device.open('cuda:1')
    const x = gpu().tensor([1, 2, 3], [3])
    const y = copyTo(ops.cast(x, 'f32'), other)
    x.write(new Float32Array(3))
    expect([...(await ops.cast(y, 'f32').read())]).toEqual([1, 2, 3])
    expect(() => copyTo(cpu.zeros([2]), other)).toThrow(/two GPUs/)
    await other.close()
  })
})
