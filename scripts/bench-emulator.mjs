// `npm run bench:emulator`: how fast the emulated GPU of the tests is, never how fast a GPU is. Builds what is missing;
// then parses all PTX that is shipped (native/emulator/test/speed.cpp) and multiplies 256 x 256 by 256 x 256 in bf16
// through the addon, on one core, without and with checks.
import { spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { cpus, tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = join(dirname(fileURLToPath(import.meta.url)), '..')
const emulator = join(root, 'build', 'emulator', 'libcuda.so.1')
const addon = join(root, 'build', 'native', 'Release', 'mgm.node')

function run(command, args, options = {}) {
  const { status, stdout, stderr, error } = spawnSync(command, args, {
    cwd: root,
    encoding: 'utf8',
    maxBuffer: 1 << 26,
    ...options,
  })
  if (status === 0) return stdout
  console.error(`${command} failed: ${error?.message ?? stdout + stderr}`)
  return process.exit(status ?? 1)
}

/** Runs in a process of its own: prints the best of three times in seconds. */
function multiply(path) {
  const native = require(path)
  const table = native.opTable()
  const call = (name, ...args) =>
    native.call(
      table.findIndex(op => op.name === name),
      args,
    )[0]
  const device = native.openCuda({ index: 0, memoryLimit: 0 })
  const ones = device.empty([256, 256], 'f32')
  ones.write(new Float32Array(256 * 256).fill(1))
  const x = call('cast', ones, 'bf16')
  const w = call('packLinear', [x], 'bf16', false)
  const round = async () => {
    await device.synchronize()
    const start = process.hrtime.bigint()
    const y = call('linear', x, w, undefined, undefined, undefined, 'none', 'f32')
    await device.synchronize()
    const seconds = Number(process.hrtime.bigint() - start) / 1e9
    if ((await y.read()).some(value => value !== 256)) throw new Error('expected 256 everywhere')
    return seconds
  }
  round().then(async first => console.log(Math.min(first, await round(), await round())))
}

run('cmake', ['-S', 'native/emulator', '-B', 'build/emulator'])
run('cmake', ['--build', 'build/emulator', '-j2'])
run(process.execPath, ['scripts/build-native.mjs'])
console.log(
  `${cpus()[0]?.model.trim()}, ${cpus().length} cores; an emulated device: these are no times of a GPU`,
)

const images = JSON.parse(readFileSync(join(root, 'build', 'kernels', 'images.json'), 'utf8'))
const shipped = images.map(({ ptx }) => ptx)
process.stdout.write(run(join(root, 'build', 'emulator', 'speed'), [emulator, ...shipped]))

const folder = mkdtempSync(join(tmpdir(), 'mgm-bench-'))
const launches = join(folder, 'launches.jsonl')
const measure = settings =>
  Number(
    run(process.execPath, ['-e', `(${multiply})(${JSON.stringify(addon)})`], {
      env: {
        ...process.env,
        MGM_LIBCUDA: emulator,
        MGM_EMULATOR_THREADS: '1',
        MGM_EMULATOR_ORDER: 'eager',
        ...settings,
      },
    }),
  )
try {
  measure({ MGM_EMULATOR_COUNTERS: '1', MGM_EMULATOR_LAUNCHES: launches })
  const last = JSON.parse(readFileSync(launches, 'utf8').trim().split('\n').at(-1))
  for (const checks of ['0', '1']) {
    const seconds = measure({ MGM_EMULATOR_CHECKS: checks })
    const rate = last.warpInstructions / seconds / 1e6
    console.log(
      `gemm     256 x 256 x 256 bf16 (${last.kernel}), one thread, checks ${checks === '1' ? 'on ' : 'off'}: ` +
        `${seconds.toFixed(3)} s, ${rate.toFixed(1)} million warp instructions/s (${last.warpInstructions})`,
    )
  }
} finally {
  rmSync(folder, { recursive: true })
}
