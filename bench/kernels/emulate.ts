// Runs cases on the emulated GPU and prints the counters of their launches, a line of JSON a case. A child process of
// `npm run bench:kernels`, which sets the emulator's environment: it holds for a process.
import { existsSync, readFileSync, statSync } from 'node:fs'
import { Device } from '../../lib/device.ts'
import { MgmError } from '../../lib/errors.ts'
import { scope } from '../../lib/tensor.ts'
import { CASES, caseKey, Make } from './cases.ts'
import type { Launch, Outcome } from './counters.ts'

const file = process.env.MGM_EMULATOR_LAUNCHES
if (!file) throw new Error('expected a file for MGM_EMULATOR_LAUNCHES')

function position(): number {
  return existsSync(file!) ? statSync(file!).size : 0
}

const device = Device.open('cuda')
for (const key of process.argv.slice(2)) {
  const kernelCase = CASES.find(one => caseKey(one) === key)
  if (!kernelCase) throw new Error(`expected a case but received ${key}`)
  const outcome: Outcome = { key, launches: [] }
  let fatal = false
  const began = performance.now()
  try {
    const run = kernelCase.prepare(new Make(device))
    await device.synchronize()
    const before = position()
    scope(() => void run())
    await device.synchronize()
    outcome.launches = readFileSync(file)
      .subarray(before)
      .toString()
      .split('\n')
      .filter(line => line !== '')
      .map(line => JSON.parse(line) as Launch)
  } catch (error) {
    const unsupported = error instanceof MgmError && error.code === 'UNSUPPORTED'
    outcome.error = error instanceof Error ? error.message : String(error)
    outcome.unsupported = unsupported
    fatal = !unsupported
  }
  outcome.seconds = (performance.now() - began) / 1000
  console.log(JSON.stringify(outcome))
  // The device may be lost: the parent goes on with another process.
  if (fatal) process.exit(3)
}
await device.close()
