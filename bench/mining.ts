import { Loader } from '../lib/models/loader.ts'
import { PatchMining } from '../lib/models/patch-mining.ts'
import {
  assertFinite,
  type Lap,
  lap,
  Peer,
  RandomWeights,
  type Row,
  race,
  randomTensor,
  type Settings,
  time,
  versusPeer,
} from './harness.ts'

const CHANNELS = [192, 384, 768, 1536]

/**
 * Patch info mining of one picture at MGM's size, norms and projections included, against the reference formula: keys
 * and values of all 36,864 positions.
 */
export async function mining(settings: Settings): Promise<Row[]> {
  const { device, quick } = settings
  const [grid, side, width] = quick ? [12, 96, 1024] : [24, 192, 1024]
  const mapChannels = CHANNELS.reduce((a, b) => a + b, 0)
  using weights = new RandomWeights('f32', width * mapChannels)
  const loader = new Loader(device)
  const model = await PatchMining.load(loader, weights, width, mapChannels)
  await loader.finish()
  const query = randomTensor(device, [grid * grid, width])
  const stages = CHANNELS.map((channels, i) => randomTensor(device, [1, side >> i, side >> i, channels]))
  const first = model.forward(query, stages, { grid })
  await assertFinite('mining', first)
  first.dispose()

  const name = `${grid}×${grid} over ${side}×${side}×${mapChannels}`
  const run = async () => {
    const out = model.forward(query, stages, { grid })
    await device.synchronize()
    out.dispose()
  }
  const args = ['mining', String(device.threads), String(grid), String(side)]
  const peer = await Peer.start(settings, 'torch_peer.py', args)
  // Ours is short next to the peer's: several runs a round, or its best is a matter of luck.
  const ours = {
    name: 'mgm',
    run: async () => {
      const laps: Lap[] = []
      for (let i = 0; i < 9; i++) laps.push((await lap(run))[1])
      return laps.sort((a, b) => a.seconds - b.seconds)[4]
    },
  }
  const { timings } = await race(peer ? [ours, peer] : [ours], { rounds: quick ? 2 : 5 })
  peer?.stop()
  const timing = timings.get('mgm')!
  // What must be read at least: the maps, and the three projections' weights.
  const bytes =
    4 * (stages.reduce((sum, stage) => sum + stage.size, 0) + width * width + 2 * width * mapChannels)
  settings.log(`  ${time(timing.seconds.min)}; the maps and weights are ${(bytes / 1e6).toFixed(0)} MB`)
  for (const tensor of [query, ...stages]) tensor.dispose()
  loader.dispose()
  if (!peer) return [{ bench: 'mining', case: name, timing }]
  const theirs = { name: peer.name, timing: timings.get(peer.name)! }
  return [versusPeer('mining', name, timing, theirs, { target: 40 })]
}
