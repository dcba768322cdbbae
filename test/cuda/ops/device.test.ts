import { expect, it } from 'vitest'
import { copyTo, Device } from '../../../lib/device.ts'
import type { MgmError } from '../../../lib/errors.ts'
import { native } from '../../../lib/native.ts'
import * as ops from '../../../lib/ops.ts'
import type { Tensor } from '../../../lib/tensor.ts'
import { Random } from '../../ops/helpers.ts'
import { cudaTests, floats, type Inputs } from '../helpers.ts'

type Make = Inputs['plain']

cudaTests('the CUDA backend', cuda => {
  const gpu = () => cuda.gpu
  const cpu = cuda.cpu
  const same = (
    body: (make: Make, device: Device) => Tensor | Tensor[],
    limit: { absolute: number; relative?: number },
    what: string,
  ) => cuda.same({ limit, what }, t => body(t.plain, t.device))

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

  it('casts and permutes bit for bit', async () => {
    const random = new Random()
    const data = random.normals(6 * 7 * 5, 300)
    data.set([Number.POSITIVE_INFINITY, -0, 1e-40, 70000, 6e-8, 3.4e38])
    await same(
      make => {
        const x = make(data, [6, 7, 5])
        const half = ops.cast(x, 'f16')
        const brain = ops.cast(x.narrow(2, 1, 3), 'bf16')
        return [
          half,
          brain,
          ops.cast(half, 'f32'),
          ops.cast(brain, 'f16'),
          ops.permute(x, [2, 0, 1]),
          ops.permute(half, [1, 2, 0]),
          ops.scaleColumns(x.reshape(42, 5), make(data.slice(20, 25), [5])),
        ]
      },
      { absolute: 0 },
      `seed ${random.seed}`,
    )
  })

  it.each([1, 3, 100, 1027])('normalizes rows of %i', async width => {
    const random = new Random()
    const rows = 3
    for (const scale of [1, 1e30]) {
      const x = random.normals(rows * width, scale)
      const residual = random.normals(rows * width, scale)
      const [w, b] = [random.normals(width), random.normals(width)]
      await same(
        make => {
          const [gx, gr] = [make(x, [rows, width]), make(residual, [rows, width])]
          const [gw, gb] = [make(w, [width]), make(b, [width])]
          const rms = ops.addRmsNorm(gx, gr, gw, { eps: 1e-6, weightOffset: 1 })
          const layer = ops.addLayerNorm(gx, gr, gw, gb, { eps: 1e-5 })
          return [rms.normed, rms.sum, layer.normed, layer.sum, ops.rmsNorm(gx, gw, { eps: 1e-6 })]
        },
        { absolute: 4e-6, relative: 4e-6 },
        `seed ${random.seed} scale ${scale}`,
      )
    }
  })

  it.each(['f32', 'bf16', 'f16'] as const)('rotates and writes %s pages', async dtype => {
    const random = new Random()
    const [heads, kvHeads, d, pageSize, tokens] = [6, 2, 10, 3, 9]
    const width = (heads + 2 * kvHeads) * d
    const qkv = random.normals(tokens * width)
    await same(
      (make, device) => {
        const shape = [5, kvHeads, pageSize, d]
        const [kPages, vPages] = [device.zeros(shape, dtype), device.zeros(shape, dtype)]
        const q = ops.ropeAndCache(make(qkv, [tokens, width]), {
          positions: make(
            Int32Array.from({ length: tokens }, (_, t) => t * 5000),
            [tokens],
          ),
          slots: make(
            Int32Array.from({ length: tokens }, (_, t) => (t === 4 ? -1 : (t * 4) % 15)),
            [tokens],
          ),
          invFreq: make(
            Float32Array.from({ length: d / 2 }, (_, i) => 10000 ** ((-2 * i) / d)),
            [d / 2],
          ),
          kPages,
          vPages,
        })
        // Rotated keys may round to the neighbouring half; values are only rounded.
        return [q, vPages, ...(dtype === 'f32' ? [kPages] : [])]
      },
      { absolute: 2e-6 },
      `seed ${random.seed}`,
    )
  })

  it('gathers, splices and resizes', async () => {
    const random = new Random()
    const [table, image, pixels] = [random.normals(9 * 33), random.normals(4 * 33), random.normals(90)]
    await same(
      make => {
        const ids = make(Int32Array.of(8, 0, -1, 3), [4])
        const plain = make(table, [9, 33])
        const text = ops.embedding(plain, ids, { scale: 5.5 })
        const packed = ops.packLinear(plain, { dtype: 'bf16' })
        const index = make(Int32Array.of(0, -1, -4, 3, 1), [5])
        return [
          text,
          ops.embedding(packed, ids, { scale: 2 }),
          ops.embedding(ops.cast(plain, 'f16'), ids),
          ops.spliceEmbeddings(text, make(image, [4, 33]), index),
          ops.resizeBilinear(make(pixels, [2, 5, 3, 3]), 7, 2),
          ops.resizeBilinear(make(pixels, [1, 3, 3, 10]), 8, 9),
        ]
      },
      { absolute: 2e-6 },
      `seed ${random.seed}`,
    )
  })

  it('chooses the same tokens as the CPU', async () => {
    const random = new Random()
    const [rows, vocab] = [6, 1003]
    const logits = random.normals(rows * vocab, 3)
    // temperature, top_p, min_p, repetition, presence, frequency
    const options = [
      [0, 1, 0, 1, 0, 0],
      [0.7, 0.9, 0, 1, 0, 0],
      [1, 1, 0.05, 1.3, 0.2, 0.1],
      [1.5, 0.5, 0, 1, 0, 0],
      [1, 1, 0, 1, 0, 0],
      [0, 1, 0, 1.5, 0, 0],
    ].flat()
    const state = Array.from({ length: rows }, (_, b) => [b === 3 ? 40 : 0, b * 77 + 1, b, b * 3, 4]).flat()
    const history = Int32Array.from({ length: rows * 4 }, () => random.integer(0, vocab - 1))
    const mask = Uint8Array.from({ length: rows * Math.ceil(vocab / 8) }, () => random.integer(0, 255))
    await same(
      make => {
        const common = {
          options: make(Float32Array.from(options), [rows, 6]),
          state: make(Int32Array.from(state), [rows, 5]),
        }
        const x = make(logits, [rows, vocab])
        const free = ops.sample(x, common)
        const bound = ops.sample(x, {
          ...common,
          history: make(history, [rows, 4]),
          mask: make(mask, [rows, Math.ceil(vocab / 8)]),
          topLogprobs: 3,
        })
        return [free.ids, free.logprobs, bound.ids, bound.logprobs, bound.topIds!]
      },
      { absolute: 2e-5 },
      `seed ${random.seed}`,
    )
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
