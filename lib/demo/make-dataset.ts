// Writes a data set of the demo world: npx tsx lib/demo/make-dataset.ts <folder> [--split train] [--first 0] [--count 1000]
// [--pixels 256] [--drawnPixels 128] [--format png|raw] [--shard 1000]
import { parseArgs } from 'node:util'
import { expected } from '../errors.ts'
import { DATASET, makeDataset } from './dataset.ts'
import { SPLITS } from './world.ts'

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    split: { type: 'string', default: DATASET.split },
    first: { type: 'string', default: String(DATASET.first) },
    count: { type: 'string', default: String(DATASET.count) },
    pixels: { type: 'string', default: String(DATASET.pixels) },
    drawnPixels: { type: 'string', default: String(DATASET.drawnPixels) },
    format: { type: 'string', default: DATASET.format },
    shard: { type: 'string', default: String(DATASET.shard) },
  },
})

const folder = positionals[0]
if (folder === undefined || positionals.length > 1)
  throw expected('one folder', 'arguments', positionals.join(' '))
const whole = (name: 'first' | 'count' | 'pixels' | 'drawnPixels' | 'shard', least: number) => {
  const value = Number(values[name])
  if (!Number.isSafeInteger(value) || value < least)
    throw expected(`an integer of at least ${least}`, name, values[name])
  return value
}
const oneOf = <T extends string>(name: 'split' | 'format', choices: readonly T[]) => {
  const value = choices.find(choice => choice === values[name])
  if (value === undefined) throw expected(`one of ${choices.join(', ')}`, name, values[name])
  return value
}

await makeDataset(
  folder,
  {
    split: oneOf('split', SPLITS),
    first: whole('first', 0),
    count: whole('count', 1),
    pixels: whole('pixels', 8),
    drawnPixels: whole('drawnPixels', 8),
    format: oneOf('format', ['raw', 'png']),
    shard: whole('shard', 1),
  },
  (done, shards) => console.log(`shard ${done} of ${shards}`),
)
