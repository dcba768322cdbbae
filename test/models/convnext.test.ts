import { afterAll, describe, expect, test } from 'vitest'
import { convNextGeometry } from '../../lib/checkpoint/weights.ts'
import { Device } from '../../lib/device.ts'
import { ConvNext, ConvNextBlock, ConvNextDownsample, convNextConfig } from '../../lib/models/convnext.ts'
import { Loader } from '../../lib/models/loader.ts'
import { resizeBilinear } from '../../lib/ops.ts'
import type { Tensor } from '../../lib/tensor.ts'
import { assertClose, toNhwc } from '../helpers/safetensors.ts'
import { operatorCase, upload } from './support.ts'

// The oracle is timm's ConvNeXt; tolerances are those of the goldens' table.
const TOLERANCE = 1e-4
const EPS = 1e-6

const device = Device.open('cpu')
afterAll(() => device.close())

interface Forward {
  forward(x: Tensor): Tensor
}
type Case = ReturnType<typeof operatorCase>

async function check(file: string, load: (loader: Loader, c: Case) => Forward | Promise<Forward>) {
  const operator = operatorCase(`convnext/${file}.safetensors`)
  const loader = new Loader(device)
  const layer = await load(loader, operator)
  const expected = toNhwc(operator.golden('output'))
  const output = device.scope(() => layer.forward(upload(device, toNhwc(operator.golden('input')))))
  expect(output.shape).toEqual(expected.shape)
  assertClose(file, await output.readF32(), expected.data, TOLERANCE)
  operator.weights.finish([/^(input|output)$/])
  output.dispose()
  loader.dispose()
}

describe('ConvNeXt parts', () => {
  test('stem', () =>
    check('stem', (loader, c) =>
      ConvNextDownsample.stem(loader, c.weights, c.golden('0.bias').data.length, EPS),
    ))

  test.each([1, 2, 3])('downsample_stage%i (stage 2 has an odd size)', stage =>
    check(`downsample_stage${stage}`, (loader, c) => {
      const [to, from] = c.golden('1.weight').shape as [number, number]
      return ConvNextDownsample.between(loader, c.weights, from, to, EPS)
    }),
  )

  test.each(['block_stage0', 'block_stage1', 'block_stage2', 'block_stage3', 'block_c192'])('%s', file =>
    check(file, (loader, c) => ConvNextBlock.load(loader, c.weights, c.golden('gamma').data.length, EPS)),
  )
})

describe('ConvNext', () => {
  test('the trunk: four maps that concatenate to the reference, geometry from the weights', async () => {
    const { golden, weights } = operatorCase('convnext/trunk.safetensors')
    const config = convNextConfig(convNextGeometry(weights))
    expect(config).toEqual({ dims: [16, 32, 64, 128], depths: expect.anything(), eps: EPS })
    const loader = new Loader(device)
    const trunk = await ConvNext.load(loader, weights, config)
    const expected = toNhwc(golden('aux_cat'))
    const [, height, width, channels] = expected.shape as [number, number, number, number]
    const maps = device.scope(() =>
      trunk.forward(upload(device, toNhwc(golden('input')))).map(map => resizeBilinear(map, height, width)),
    )
    let first = 0
    for (const [stage, map] of maps.entries()) {
      const c = map.shape[3]!
      const part = new Float32Array(height * width * c)
      for (let p = 0; p < height * width; p++)
        part.set(expected.data.subarray(p * channels + first, p * channels + first + c), p * c)
      assertClose(`stage ${stage}`, await map.readF32(), part, TOLERANCE)
      first += c
    }
    expect(first).toBe(channels)
    for (const map of maps) map.dispose()
    loader.dispose()
  })

  test('the largest release has its own epsilon', () => {
    expect(convNextConfig({ dims: [384, 768, 1536, 3072], depths: [3, 4, 30, 3] }).eps).toBe(1e-5)
  })
})
