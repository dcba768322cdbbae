import { expect, it } from 'vitest'
import { LatentPreview } from '../../lib/models/latent-preview.ts'
import { linear, packLinear, resizeBilinear, toUint8 } from '../../lib/ops.ts'
import { scope, type Tensor } from '../../lib/tensor.ts'
import { openDevice, Random } from '../ops/helpers.ts'

const device = openDevice()

it('finds the colours of latents from the decoder alone', async () => {
  const random = new Random(7)
  const seed = `seed ${random.seed}`
  // A decoder whose colours are a linear map, blurred as it enlarges by 8.
  const weight = Float32Array.from({ length: 12 }, () => 30 * random.normal())
  const bias = Float32Array.from([120, 128, 140])
  const w = scope(() => packLinear(device.tensor(weight, [3, 4])))
  const b = device.tensor(bias, [3])
  const colours = (latents: Tensor) => linear(latents, w, { bias: b })
  const decode = (latents: Tensor) => {
    const [, height, width] = latents.shape as [number, number, number]
    return toUint8(resizeBilinear(colours(latents), 8 * height, 8 * width), { scale: 1, offset: 0 })
  }
  const preview = await LatentPreview.fit(device, 4, 'f32', decode)
  const latents = device.tensor(
    Float32Array.from({ length: 5 * 6 * 4 }, () => 0.5 * random.normal()),
    [1, 5, 6, 4],
  )
  const seen = scope(() => preview.forward(latents, 'f32'))
  expect(seen.shape).toEqual([1, 5, 6, 3])
  const expected = scope(() => toUint8(colours(latents), { scale: 1, offset: 0 }))
  const [got, want] = (await Promise.all([seen.read(), expected.read()])) as [Uint8Array, Uint8Array]
  const off = got.map((byte, i) => Math.abs(byte - want[i]!))
  // Blocks of 2 x 2 latents lose about a fifth of their contrast to the blur; nothing else stands between the maps.
  const contrast = Math.sqrt(want.reduce((sum, byte, i) => sum + (byte - bias[i % 3]!) ** 2, 0) / want.length)
  expect(Math.max(...off), seed).toBeLessThan(contrast)
  expect(off.reduce((a, c) => a + c, 0) / off.length, seed).toBeLessThan(0.3 * contrast)
  for (const tensor of [w, b, latents, seen, expected]) tensor.dispose()
  preview.dispose()
})
