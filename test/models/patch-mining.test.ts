import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, describe, expect, test } from 'vitest'
import { Device } from '../../lib/device.ts'
import { Loader } from '../../lib/models/loader.ts'
import { PatchMining } from '../../lib/models/patch-mining.ts'
import { assertClose, FIXTURES, toNhwc } from '../helpers/safetensors.ts'
import { operatorCase, upload } from './support.ts'

interface MiningCase {
  file: string
  kind: string
  channels: number
  patches_per_side: number
  stage_channels: number[]
}
const index = JSON.parse(readFileSync(join(FIXTURES, 'mining/index.json'), 'utf8')) as MiningCase[]
const device = Device.open('cpu')
afterAll(() => device.close())

async function open(file: string) {
  const operator = operatorCase(`mining/${file}`)
  const query = operator.golden('query')
  const [batch, tokens, channels] = query.shape as [number, number, number]
  const stages = [0, 1, 2, 3].map(s => toNhwc(operator.golden(`stage_${s}`)))
  const mapChannels = stages.reduce((sum, stage) => sum + stage.shape[3]!, 0)
  const loader = new Loader(device)
  const mining = await PatchMining.load(loader, operator.weights, channels, mapChannels)
  return { ...operator, query, batch, tokens, channels, stages, loader, mining, grid: Math.sqrt(tokens) }
}

// The oracle is the official unified_resampler, which projects every position of the concatenated map.
describe('PatchMining', () => {
  test.each(index)('$file ($kind)', async ({ file }) => {
    const c = await open(file)
    const output = device.scope(() =>
      c.mining.forward(
        upload(device, c.query).reshape(c.batch * c.tokens, c.channels),
        c.stages.map(stage => upload(device, stage)),
        { grid: c.grid },
      ),
    )
    expect(output.shape).toEqual([c.batch * c.tokens, c.channels])
    assertClose('embed_feat', await output.readF32(), c.golden('embed_feat').data, 1e-4, 1e-5)
    c.weights.finish([/^(query|stage_\d|embed_feat(_f64)?|aux_cat)$/])
    output.dispose()
    c.loader.dispose()
  })

  test('the residual is added to the mined features', async () => {
    const c = await open('tiny.safetensors')
    const output = device.scope(() => {
      const query = upload(device, c.query).reshape(c.batch * c.tokens, c.channels)
      const stages = c.stages.map(stage => upload(device, stage))
      return c.mining.forward(query, stages, { grid: c.grid, residual: query })
    })
    const expected = c.golden('embed_feat').data.map((x, i) => x + c.query.data[i]!)
    assertClose('projector_in', await output.readF32(), expected, 1e-4)
    output.dispose()
    c.loader.dispose()
  })

  test('refuses a grid that does not divide the map', async () => {
    const c = await open('tiny.safetensors')
    expect(() =>
      device.scope(() =>
        c.mining.forward(
          upload(device, c.query).reshape(-1, c.channels),
          c.stages.map(stage => upload(device, stage)),
          { grid: 5 },
        ),
      ),
    ).toThrow('expected a multiple of the 5 × 5 queries for the side of the map to mine but received 32')
    c.loader.dispose()
  })
})
