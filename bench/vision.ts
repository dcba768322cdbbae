import type { ClipConfig } from '../lib/checkpoint/config.ts'
import type { Device } from '../lib/device.ts'
import { ClipVision } from '../lib/models/clip-vision.ts'
import { ConvNext } from '../lib/models/convnext.ts'
import { Loader } from '../lib/models/loader.ts'
import { scope, type Tensor } from '../lib/tensor.ts'
import {
  assertFinite,
  CACHE,
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

const CLIP: ClipConfig = {
  hidden_size: 1024,
  intermediate_size: 4096,
  num_hidden_layers: 24,
  num_attention_heads: 16,
  image_size: 336,
  patch_size: 14,
  num_channels: 3,
  hidden_act: 'quick_gelu',
  layer_norm_eps: 1e-5,
}

const CONVNEXT = { dims: [192, 384, 768, 1536], depths: [3, 3, 27, 3], eps: 1e-6 }

/** Multiply-adds of CLIP up to the second-last layer, twice. */
function clipFlop(batch: number): number {
  const patches = Math.floor(CLIP.image_size / CLIP.patch_size) ** 2
  const [tokens, c] = [patches + 1, CLIP.hidden_size]
  const layer = tokens * (4 * c * c + 2 * c * CLIP.intermediate_size) + 2 * tokens * tokens * c
  return 2 * batch * (patches * c * 3 * CLIP.patch_size ** 2 + (CLIP.num_hidden_layers - 1) * layer)
}

/** Multiply-adds of the four stages, twice. */
function convNextFlop(size: number): number {
  let total = (size / 4) ** 2 * CONVNEXT.dims[0]! * 48
  for (const [s, c] of CONVNEXT.dims.entries()) {
    const positions = (size / (4 << s)) ** 2
    if (s > 0) total += positions * c * 4 * CONVNEXT.dims[s - 1]!
    total += CONVNEXT.depths[s]! * positions * (8 * c * c + 49 * c)
  }
  return 2 * total
}

interface Tower {
  name: string
  flop: number
  pixels: readonly number[]
  forward(pixels: Tensor): Tensor | Tensor[]
  /** Scripts and arguments. */
  peers: [string, string[]][]
}

/** The two image encoders in f32, against the faster of PyTorch and ONNX Runtime. */
export async function vision(settings: Settings): Promise<Row[]> {
  const { device, quick } = settings
  using weights = new RandomWeights('f32', Math.max(4 * 1536 * 1536, 4 * 768 * 1536))
  const rows: Row[] = []

  for (const batch of quick ? [1] : [1, 4]) {
    const loader = new Loader(device)
    const clip = await ClipVision.load(loader, weights, CLIP, { layer: -2, feature: 'patch' })
    await loader.finish()
    rows.push(
      ...(await compare(settings, {
        name: `CLIP-L/336 batch ${batch}`,
        flop: clipFlop(batch),
        pixels: [batch, 336, 336, 3],
        forward: pixels => clip.forward(pixels),
        peers: [
          ['torch_peer.py', ['clip', String(device.threads), String(batch)]],
          ['ort_peer.py', ['clip', String(device.threads), String(batch), CACHE]],
        ],
      })),
    )
    release(device, loader)
  }

  const size = quick ? 256 : 768
  const loader = new Loader(device)
  const convnext = await ConvNext.load(loader, weights, CONVNEXT)
  await loader.finish()
  rows.push(
    ...(await compare(settings, {
      name: `ConvNeXt-L ${size}`,
      flop: convNextFlop(size),
      pixels: [1, size, size, 3],
      forward: pixels => convnext.forward(pixels),
      peers: [
        ['torch_peer.py', ['convnext', String(device.threads), String(size)]],
        ['torch_peer.py', ['convnext-channels-last', String(device.threads), String(size)]],
        ['ort_peer.py', ['convnext', String(device.threads), String(size), CACHE]],
      ],
    })),
  )
  release(device, loader)
  return rows
}

async function compare(settings: Settings, tower: Tower): Promise<Row[]> {
  const { device, quick } = settings
  const pixels = randomTensor(device, tower.pixels)
  const checked = scope(() => {
    const out = tower.forward(pixels)
    return Array.isArray(out) ? out.at(-1)! : out
  })
  await assertFinite(tower.name, checked)
  checked.dispose()
  const ours = {
    name: 'mgm',
    run: async () => {
      scope(() => void tower.forward(pixels))
      await device.synchronize()
      return undefined
    },
  }
  const peers: Peer[] = []
  for (const [script, args] of tower.peers) {
    const peer = await Peer.start(settings, script, args)
    if (peer) peers.push(peer)
  }
  const limit = fmaLimit(device)
  const { timings, limits } = await race([ours, ...peers], {
    rounds: quick ? 2 : 5,
    limits: [limit],
    budget: 60,
  })
  for (const peer of peers) peer.stop()
  pixels.dispose()
  const timing = timings.get('mgm')!
  const rates = limits.get(limit.name)!
  const best = Math.min(...peers.map(peer => timings.get(peer.name)!.seconds.min))
  return [
    versusLimit(
      'vision',
      tower.name,
      timing,
      tower.flop,
      { name: limit.name, rates, threads: device.threads },
      'GFLOP/s',
    ),
    ...peers.map(peer => {
      const theirs = { name: peer.name, timing: timings.get(peer.name)! }
      const target = theirs.timing.seconds.min === best ? { target: 1 } : {}
      return versusPeer('vision', tower.name, timing, theirs, { work: tower.flop, ...target })
    }),
  ]
}

function release(device: Device, loader: Loader): void {
  loader.dispose()
  device.trim()
}
