import { describe, expect, it } from 'vitest'
import { Device } from '../../lib/device.ts'
import { native } from '../../lib/native.ts'
import * as ops from '../../lib/ops.ts'
import type { Tensor } from '../../lib/tensor.ts'
import { testDriver } from './helpers.ts'

// What is left after the GPU failed. The emulator provokes each failure once, at the launch or call named here.
const library = testDriver({
  MGM_EMULATOR_DEVICES: '80:64M,90:64M',
  MGM_EMULATOR_FAIL: 'cast=700,rms_norm=719,layer_norm=716,embedding=715,resize=700',
})

const lost = (message: RegExp) => ({ code: 'DEVICE_LOST', message: expect.stringMatching(message) })

/** What `body` throws. */
function thrown(body: () => unknown): unknown {
  try {
    body()
  } catch (error) {
    return error
  }
  return undefined
}

/** Computes something and compares it. */
async function works(device: Device) {
  const x = device.tensor([1, 2, 3, 4], [2, 2])
  expect([...(await ops.scaleColumns(x, device.tensor([2, 3], [2])).read())]).toEqual([2, 6, 6, 12])
}

describe.skipIf(library === null || !native().cudaSurvey().emulated)('a GPU that fails', () => {
  it('rejects every call after a fault until it is opened again', async () => {
    const device = Device.open('cuda')
    const other = Device.open('cuda:1')
    const x = device.tensor([1, 2, 3, 4], [4])
    const y = ops.cast(x, 'bf16')
    const sibling = ops.cast(x, 'f32')
    await expect(y.read()).rejects.toMatchObject(
      lost(/^the GPU's work failed: CUDA_ERROR_ILLEGAL_ADDRESS \(700\)/),
    )
    const dead = lost(
      /^the GPU's context died of CUDA_ERROR_ILLEGAL_ADDRESS \(700\).*; close the device and open it again$/,
    )
    await expect(sibling.read()).rejects.toMatchObject(dead)
    await expect(device.synchronize()).rejects.toMatchObject(dead)
    expect(thrown(() => ops.cast(x, 'f32'))).toMatchObject(dead)
    expect(thrown(() => device.empty([1]))).toMatchObject(dead)
    expect(thrown(() => x.write(new Float32Array(4)))).toMatchObject(dead)
    expect(thrown(() => device.capture(() => x))).toMatchObject(dead)
    expect(device.memory().used).toBeGreaterThan(0)
    device.trim()
    await works(other)

    await device.close()
    expect(thrown(() => device.empty([1]))).toMatchObject({ code: 'CLOSED' })
    const again = Device.open('cuda')
    await works(again)
    await ops.cast(again.tensor([1], [1]), 'bf16').read()
    // What is left of the dead device names memory that is gone, or the new one's.
    for (const tensor of [x, y, sibling]) tensor.dispose()
    await works(again)
    await again.close()
    await other.close()
  })

  it('is lost to all devices on it, and opened again after the last was closed', async () => {
    const [first, second] = [Device.open('cuda'), Device.open('cuda')]
    const x = second.tensor([1], [1])
    const y = first.tensor([1], [1, 1])
    const normed = ops.rmsNorm(y, first.tensor([1], [1]), { eps: 0 })
    await expect(normed.read()).rejects.toMatchObject(lost(/LAUNCH_FAILED \(719\)/))
    expect(thrown(() => ops.cast(x, 'bf16'))).toMatchObject(lost(/context died of CUDA_ERROR_LAUNCH_FAILED/))
    await expect(x.read()).rejects.toMatchObject(lost(/context died/))
    await first.close()
    expect(thrown(() => Device.open('cuda'))).toMatchObject(
      lost(/^the context of GPU 0 died of .*719.*; close all devices on it before it is opened again$/),
    )
    await second.close()
    const again = Device.open('cuda')
    await works(again)
    await again.close()
  })

  it('may fail while a graph replays', async () => {
    const device = Device.open('cuda')
    const record = (on: Device) => {
      const [x, weight, bias] = [on.tensor([5], [1, 1]), on.tensor([1], [1]), on.tensor([3], [1])]
      return on.capture(() => ops.layerNorm(x, weight, bias, { eps: 1 }))
    }
    const graph = record(device)
    graph.replay()
    await expect(graph.outputs.read()).rejects.toMatchObject(lost(/MISALIGNED_ADDRESS \(716\)/))
    expect(thrown(() => graph.replay())).toMatchObject(lost(/context died/))
    graph.dispose()
    await device.close()
    const again = Device.open('cuda')
    const second = record(again)
    second.replay()
    expect([...(await second.outputs.read())]).toEqual([3])
    await again.close()
  })

  it('may be closed before anybody knows, with reads under way', async () => {
    const device = Device.open('cuda')
    const x = device.tensor([1, 2], [2, 1])
    const reads = [x.read(), ops.embedding(x, device.tensor([1], [1], 'i32')).read(), x.read()]
    const closed = device.close()
    const ends = await Promise.allSettled(reads)
    for (const end of ends.slice(1))
      expect(end).toMatchObject({ status: 'rejected', reason: { code: 'DEVICE_LOST' } })
    await closed
    const again = Device.open('cuda')
    await works(again)
    await again.close()
  })

  it('loses a capture with it', async () => {
    const device = Device.open('cuda')
    const x = device.tensor([1], [1, 1, 1, 1])
    const larger = ops.resizeBilinear(x, 2, 2)
    await expect(async () => {
      device.capture(() => {
        // The context is found dead somewhere in here.
        for (let i = 0; i < 1000; i++) ops.cast(x, 'bf16')
      })
      await larger.read()
    }).rejects.toMatchObject({ code: 'DEVICE_LOST' })
    await device.close()
    const again = Device.open('cuda')
    await works(again)
    await again.close()
  })
})

describe.skipIf(library === null || !native().cudaSurvey().emulated)('a GPU whose memory runs out', () => {
  it('refuses one tensor and serves the next', async () => {
    const device = Device.open('cuda')
    const held = Array.from({ length: 3 }, () => device.empty([5 << 20], 'u8'))
    const most: Tensor[] = []
    const refused = thrown(() => {
      for (;;) most.push(device.empty([12 << 20], 'u8'))
    })
    expect(refused).toMatchObject({
      code: 'OUT_OF_MEMORY',
      message: expect.stringMatching(
        /^expected 12582912 free bytes for a tensor but received \d+ \(in use \d+, limit 0\)$/,
      ),
    })
    expect(most.length).toBeGreaterThan(1)
    await works(device)
    for (const tensor of [...most, ...held]) tensor.dispose()
    device.empty([40 << 20], 'u8').dispose()
    await works(device)
    await device.close()
  })

  it('is not kept by a request that failed half way', async () => {
    const device = Device.open('cuda')
    const before = device.memory().used
    expect(
      thrown(() =>
        device.scope(() => {
          for (let size = 1 << 20; ; size *= 2) device.zeros([size], 'u8')
        }),
      ),
    ).toMatchObject({ code: 'OUT_OF_MEMORY' })
    expect(device.memory().used).toBe(before)
    await works(device)
    await device.close()
  })
})
