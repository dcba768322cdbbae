// Builds the addon into build/native/Release/mgm.node: the one way in, for npm, for binding.gyp and for prebuilds.
// usage: node scripts/build-native.mjs [--debug] [--clean]
// MGM_CUDA: 'AUTO' (default: the CUDA backend where there is nvcc), 'ON' (fails without nvcc) or 'OFF'.
import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { createRequire } from 'node:module'
import { availableParallelism, totalmem } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'

const root = join(dirname(fileURLToPath(import.meta.url)), '..')
const { values } = parseArgs({
  options: { debug: { type: 'boolean', default: false }, clean: { type: 'boolean', default: false } },
})

if (spawnSync('cmake', ['--version']).error) {
  console.error(
    'CMake 3.22 or newer and a C++20 compiler are needed to build the addon, but `cmake` is not on the PATH.',
  )
  console.error('On Debian or Ubuntu: apt-get install cmake g++ ninja-build')
  process.exit(1)
}

// A template-heavy kernel file takes up to 1 GB to compile.
const jobs = Math.max(1, Math.min(availableParallelism(), Math.floor(totalmem() / 2 ** 30)))
const cmakeJs = join(
  dirname(createRequire(import.meta.url).resolve('cmake-js/package.json')),
  'bin',
  'cmake-js',
)
const cuda = process.env.MGM_CUDA || 'AUTO'
// cmake-js configures a folder once; nvcc may have come or gone since.
if (!values.clean && existsSync(join(root, 'build', 'native', 'CMakeCache.txt'))) {
  const { status } = spawnSync('cmake', [`-DMGM_CUDA=${cuda}`, join('build', 'native')], {
    cwd: root,
    stdio: ['ignore', 'ignore', 'inherit'],
  })
  if (status !== 0) process.exit(status ?? 1)
}
const args = [
  values.clean ? 'rebuild' : 'build',
  '--out',
  'build/native',
  '--parallel',
  String(jobs),
  `--CDMGM_CUDA=${cuda}`,
]
if (values.debug) args.push('--debug')
const { status } = spawnSync(process.execPath, [cmakeJs, ...args], { cwd: root, stdio: 'inherit' })
process.exit(status ?? 1)
