import type { UnetConfig, VaeConfig } from '../lib/checkpoint/diffusers.ts'
import { Loader } from '../lib/models/loader.ts'
import { Unet } from '../lib/models/unet.ts'
import { Vae } from '../lib/models/vae.ts'
import { scope, type Tensor } from '../lib/tensor.ts'
import {
  assertFinite,
  fmaLimit,
  Peer,
  RandomWeights,
  type Row,
  race,
  randomTensor,
  type Settings,
  versusLimit,
  versusPeer,
} from './harness.ts'

/** SDXL base. */
const UNET: UnetConfig = {
  in_channels: 4,
  out_channels: 4,
  block_out_channels: [320, 640, 1280],
  down_block_types: ['DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'],
  up_block_types: ['CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'],
  layers_per_block: [2, 2, 2],
  transformer_layers_per_block: [1, 2, 10],
  attention_heads: [5, 10, 20],
  cross_attention_dim: 2048,
  norm_num_groups: 32,
  norm_eps: 1e-5,
  addition_time_embed_dim: 256,
  projection_class_embeddings_input_dim: 2816,
  time_cond_proj_dim: null,
  flip_sin_to_cos: true,
  freq_shift: 0,
  sample_size: 128,
}

const VAE: VaeConfig = {
  in_channels: 3,
  out_channels: 3,
  latent_channels: 4,
  block_out_channels: [128, 256, 512, 512],
  layers_per_block: 2,
  norm_num_groups: 32,
  sample_size: 1024,
  scaling_factor: 0.13025,
  shift_factor: 0,
  force_upcast: true,
  use_quant_conv: true,
  use_post_quant_conv: true,
  mid_block_add_attention: true,
}

const TOKENS = 77

const conv3 = (from: number, to: number) => 9 * from * to
const resnet = (from: number, to: number) => conv3(from, to) + conv3(to, to) + (from === to ? 0 : from * to)

/**
 * Multiply-adds of one pass over latents [side, side, 4], twice; convolutions as direct sums. Without what is computed once for a
 * request: time embeddings, keys and values of the prompt.
 */
function unetFlop(side: number): number {
  const widths = UNET.block_out_channels
  const pixelsAt = (level: number) => (side >> level) ** 2
  const transformer = (level: number) => {
    const [c, n] = [widths[level]!, pixelsAt(level)]
    const depth = UNET.transformer_layers_per_block[level]!
    const layer = n * (4 + 2 + 12) * c * c + 2 * n * n * c + 2 * n * TOKENS * c
    return 2 * n * c * c + depth * layer
  }
  const attends = (types: readonly string[], i: number) => types[i]!.startsWith('CrossAttn')

  let total = pixelsAt(0) * (conv3(UNET.in_channels, widths[0]!) + conv3(widths[0]!, UNET.out_channels))
  const skips = [widths[0]!]
  for (const [level, width] of widths.entries()) {
    for (let i = 0; i < UNET.layers_per_block[level]!; i++) {
      total += pixelsAt(level) * resnet(i === 0 ? skips.at(-1)! : width, width)
      if (attends(UNET.down_block_types, level)) total += transformer(level)
      skips.push(width)
    }
    if (level === widths.length - 1) continue
    total += pixelsAt(level + 1) * conv3(width, width)
    skips.push(width)
  }
  const deepest = widths.length - 1
  let x = widths[deepest]!
  total += 2 * pixelsAt(deepest) * resnet(x, x) + transformer(deepest)
  for (let level = deepest; level >= 0; level--) {
    const width = widths[level]!
    for (let i = 0; i <= UNET.layers_per_block[level]!; i++) {
      total += pixelsAt(level) * resnet(x + skips.pop()!, width)
      if (attends(UNET.up_block_types, deepest - level)) total += transformer(level)
      x = width
    }
    if (level > 0) total += pixelsAt(level - 1) * conv3(width, width)
  }
  return 2 * total
}

/** Multiply-adds of decoding latents [side, side, 4], twice; convolutions as direct sums. */
function vaeFlop(side: number): number {
  const widths = VAE.block_out_channels.toReversed()
  const [deepest, outermost] = [widths[0]!, widths.at(-1)!]
  let pixels = side ** 2
  let total =
    pixels * (VAE.latent_channels ** 2 + conv3(VAE.latent_channels, deepest) + 2 * resnet(deepest, deepest))
  total += pixels * 4 * deepest ** 2 + 2 * pixels ** 2 * deepest
  for (const [i, width] of widths.entries()) {
    total += pixels * (resnet(widths[i - 1] ?? deepest, width) + VAE.layers_per_block * resnet(width, width))
    if (i === widths.length - 1) break
    pixels *= 4
    total += pixels * conv3(width, width)
  }
  return 2 * (total + pixels * conv3(outermost, VAE.out_channels))
}

interface Network {
  name: string
  flop: number
  forward(): Tensor
  /** What the peer is asked for. */
  work: 'unet' | 'vae'
  side: number
  target: number
}

/** One pass of SDXL's UNet and the decoding of one image in f32, against diffusers. */
export async function diffusion(settings: Settings): Promise<Row[]> {
  const { device, quick } = settings
  const pixels = quick ? 128 : 512
  const side = pixels / 8
  using weights = new RandomWeights('f16', conv3(2560, 1280))
  const rows: Row[] = []

  {
    const loader = new Loader(device)
    const vae = await Vae.load(loader, weights, VAE, { encoder: false })
    await loader.finish()
    const latents = randomTensor(device, [1, side, side, VAE.latent_channels])
    const forward = () => vae.decode(latents)
    const name = `VAE decode ${pixels} px`
    rows.push(
      ...(await compare(settings, { name, flop: vaeFlop(side), forward, work: 'vae', side, target: 2 })),
    )
    latents.dispose()
    loader.dispose()
    device.trim()
  }

  const loader = new Loader(device)
  const unet = await Unet.load(loader, weights, UNET)
  await loader.finish()
  const pooled = UNET.projection_class_embeddings_input_dim - 6 * UNET.addition_time_embed_dim
  const inputs = {
    prompt: randomTensor(device, [TOKENS, UNET.cross_attention_dim]),
    pooled: randomTensor(device, [1, pooled]),
    timeIds: [[pixels, pixels, 0, 0, pixels, pixels]],
    timesteps: [500],
  }
  const condition = unet.condition(inputs)
  const latents = randomTensor(device, [1, side, side, UNET.in_channels])
  const forward = () => unet.forward(latents, condition, 0)
  const name = `UNet ${pixels} px`
  rows.push(
    ...(await compare(settings, { name, flop: unetFlop(side), forward, work: 'unet', side, target: 1.2 })),
  )
  for (const made of [latents, condition, inputs.prompt, inputs.pooled]) made.dispose()
  loader.dispose()
  device.trim()
  return rows
}

async function compare(settings: Settings, network: Network): Promise<Row[]> {
  const { device, quick } = settings
  const { name, flop, forward, work, side, target } = network
  const out = forward()
  await assertFinite(name, out)
  out.dispose()
  const ours = {
    name: 'mgm',
    run: async () => {
      scope(() => void forward())
      await device.synchronize()
      return undefined
    },
  }
  const peer = await Peer.start(settings, 'diffusers_peer.py', [work, String(device.threads), String(side)])
  const limit = fmaLimit(device)
  const { timings, limits } = await race(peer ? [ours, peer] : [ours], {
    rounds: quick ? 2 : 5,
    limits: [limit],
    budget: 120,
  })
  peer?.stop()
  const timing = timings.get('mgm')!
  const peak = { name: limit.name, rates: limits.get(limit.name)!, threads: device.threads }
  const rows = [versusLimit('diffusion', name, timing, flop, peak, 'GFLOP/s')]
  if (peer) {
    const theirs = { name: peer.name, timing: timings.get(peer.name)! }
    rows.push(versusPeer('diffusion', name, timing, theirs, { work: flop, target }))
  }
  return rows
}
