import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, describe, test } from 'vitest'
import type { VaeConfig } from '../../lib/checkpoint/diffusers.ts'
import { TensorMap } from '../../lib/checkpoint/tensor-map.ts'
import { openTensorFile } from '../../lib/checkpoint/weights.ts'
import { Loader } from '../../lib/models/loader.ts'
import { Vae } from '../../lib/models/vae.ts'
import { toUint8 } from '../../lib/ops.ts'
import { assertClose, FIXTURES, readSafetensors, toNhwc } from '../helpers/safetensors.ts'
import { openDevice } from '../ops/helpers.ts'
import { upload } from './support.ts'

// The oracle is diffusers' AutoencoderKL; the tolerance is that of the goldens' table.
const TOLERANCE = 1e-4

const device = openDevice()
const folder = join(FIXTURES, 'sdxl-tiny')
const config: VaeConfig = JSON.parse(readFileSync(join(folder, 'pipeline/vae/config.json'), 'utf8'))
const goldens = readSafetensors(join(folder, 'tensors/pipeline.safetensors'))
const golden = (name: string) => goldens.get(name)!

function weights(): TensorMap {
  return new TensorMap(
    'vae',
    openTensorFile(join(folder, 'pipeline/vae/diffusion_pytorch_model.fp16.safetensors')),
  )
}

async function load(options: { encoder?: boolean; config?: Partial<VaeConfig> } = {}): Promise<Vae> {
  const loader = new Loader(device)
  afterAll(() => loader.dispose())
  const { encoder = false } = options
  return Vae.load(loader, weights(), { ...config, ...options.config }, { encoder })
}

describe('decode', () => {
  test('the golden image, to the level', async () => {
    const vae = await load()
    const { pixels, levels } = device.scope(() => {
      const pixels = vae.decode(upload(device, toNhwc(golden('vae_in'))))
      return { pixels, levels: toUint8(pixels, { scale: 127.5, offset: 127.5 }) }
    })
    assertClose('decoded', await pixels.readF32(), toNhwc(golden('decoded')).data, TOLERANCE)
    assertClose('image', Float32Array.from(await levels.read()), golden('image_u8').data, 1)
    pixels.dispose()
    levels.dispose()
  })
})
