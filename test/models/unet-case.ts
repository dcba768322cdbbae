import { join } from 'node:path'
import { openDiffusion } from '../../lib/checkpoint/diffusers.ts'
import type { Device } from '../../lib/device.ts'
import type { UnetInputs } from '../../lib/models/unet.ts'
import { type ActivationType, cast } from '../../lib/ops.ts'
import type { Tensor } from '../../lib/tensor.ts'
import { FIXTURES, type Golden, readSafetensors } from '../helpers/safetensors.ts'

// The UNet of goldens/sdxl-tiny and what diffusers' UNet2DConditionModel made of two images.

/** Its config and weights, none of them taken yet. */
export const openUnet = () => openDiffusion(join(FIXTURES, 'sdxl-tiny/pipeline')).unet

const numbers = readSafetensors(join(FIXTURES, 'sdxl-tiny/tensors/unet.safetensors'))
export const golden = (name: string): Golden => numbers.get(name)!
/** Activations of `forward` on the way to `out`, by the names under which the model shows them. */
export const activations = [...numbers.keys()].flatMap(
  name => /^act\.((?:conv_in|down_blocks|mid_block|up_blocks).*)/.exec(name)?.[1] ?? [],
)

/** `count` images from image `first` of a tensor [N, …]. */
export function images({ data, shape, dtype }: Golden, first: number, count: number): Golden {
  const each = data.length / shape[0]!
  return { dtype, shape: [count, ...shape.slice(1)], data: data.slice(first * each, (first + count) * each) }
}

/** `body` with the inputs of `count` images from image `first`. */
export function withInputs<T>(
  { device, dtype }: { device: Device; dtype: ActivationType },
  [first, count]: readonly [number, number],
  timesteps: readonly number[],
  body: (inputs: UnetInputs) => T,
): T {
  const rows = (name: string): Tensor =>
    device.scope(() => {
      const { data, shape } = images(golden(name), first, count)
      return cast(device.tensor(data, [data.length / shape.at(-1)!, shape.at(-1)!]), dtype)
    })
  const prompt = rows('encoder_hidden_states')
  const pooled = rows('text_embeds')
  const ids = images(golden('time_ids_2'), first, count).data
  const timeIds = Array.from({ length: count }, (_, i) => [...ids.subarray(6 * i, 6 * i + 6)])
  try {
    return body({ prompt, pooled, timeIds, timesteps })
  } finally {
    prompt.dispose()
    pooled.dispose()
  }
}
