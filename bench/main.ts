import { mkdirSync, writeFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { Device } from '../lib/device.ts'
import { decode } from './decode.ts'
import { diffusion } from './diffusion.ts'
import { gemm } from './gemm.ts'
import { bandwidthLimit, fmaLimit, machine, type Row, type Settings, table } from './harness.ts'
import { mining } from './mining.ts'
import { vision } from './vision.ts'

const BENCHES = { mining, gemm, decode, vision, diffusion }

const USAGE = `usage: npm run bench -- [--only ${Object.keys(BENCHES).join(',')}] [--quick] [--threads N] [--peers | --no-peers]
  --quick     small sizes and few rounds, to see that everything runs; its ratios mean nothing
  --peers     a peer that is not installed is an error (default: it is left out, with a note)
  --no-peers  ours alone
Environment: see bench/README.md.`

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      only: { type: 'string' },
      quick: { type: 'boolean', default: false },
      threads: { type: 'string' },
      peers: { type: 'boolean' },
      help: { type: 'boolean', default: false },
    },
    allowNegative: true,
  })
  if (values.help) return console.log(USAGE)
  const names = values.only?.split(',') ?? Object.keys(BENCHES)
  for (const name of names)
    if (!Object.hasOwn(BENCHES, name))
      throw new Error(`expected ${Object.keys(BENCHES)} for --only but received ${name}`)

  const device = Device.open('cpu', values.threads ? { threads: Number(values.threads) } : {})
  const settings: Settings = {
    device,
    quick: values.quick,
    peers: values.peers === undefined ? 'auto' : values.peers ? 'all' : 'none',
    log: line => console.error(line),
  }
  const about = machine(device)
  console.log(
    `${about.cpu}, ${about.cores} cores, ${about.threads} threads, ${about.isa}, ${about.memoryGiB} GiB, ` +
      `Node ${about.node}, load ${about.loadAverage.join(' ')}`,
  )
  const limits = {
    fmaFlopPerSecond: await fmaLimit(device).sample(),
    readBytesPerSecond: await bandwidthLimit(device).sample(),
  }
  console.log(
    `now: FMA ${(limits.fmaFlopPerSecond / 1e9).toFixed(0)} GFLOP/s, read ${(limits.readBytesPerSecond / 1e9).toFixed(1)} GB/s`,
  )

  const rows: Row[] = []
  for (const name of names) {
    settings.log(`${name} …`)
    rows.push(...(await BENCHES[name as keyof typeof BENCHES](settings)))
  }
  await device.close()
  console.log(table(rows))

  const folder = fileURLToPath(new URL('./results/', import.meta.url))
  mkdirSync(folder, { recursive: true })
  const file = `${folder}${about.date.replaceAll(':', '-').slice(0, 19)}.json`
  writeFileSync(
    file,
    `${JSON.stringify({ machine: about, quick: settings.quick, limits, rows }, undefined, 2)}\n`,
  )
  console.log(`written to ${file}`)
}

await main()
