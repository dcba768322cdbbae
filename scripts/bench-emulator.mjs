// `npm run bench:emulator`: how fast the emulated GPU of the tests is. Builds what is missing, then runs native/emulator/test/speed.cpp.
import { spawnSync } from 'node:child_process'
import { readdirSync } from 'node:fs'
import { cpus } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = join(dirname(fileURLToPath(import.meta.url)), '..')

function run(command, ...args) {
  const { status, error } = spawnSync(command, args, { cwd: root, stdio: ['ignore', 'inherit', 'inherit'] })
  if (status !== 0) {
    console.error(`${command} ${args.join(' ')} failed${error ? `: ${error.message}` : ''}`)
    process.exit(status ?? 1)
  }
}

run('cmake', '-S', 'native/emulator', '-B', 'build/emulator')
run('cmake', '--build', 'build/emulator', '-j2')
// The script of the kernels needs nvcc; what it writes is named in images.cpp, one PTX a family.
run(process.execPath, 'scripts/build-kernels.mjs')
const cache = join(root, 'build', 'kernels', 'cache')
const newest = new Map()
for (const name of readdirSync(cache).filter(file => file.endsWith('.ptx')))
  newest.set(name.slice(0, name.lastIndexOf('-')), join(cache, name))
const others = [...newest].filter(([family]) => family !== 'linear').map(([, file]) => file)
console.log(
  `${cpus()[0]?.model.trim()}, ${cpus().length} cores; an emulated device: these are no times of a GPU`,
)
run('build/emulator/speed', 'build/emulator/libcuda.so.1', newest.get('linear'), ...others)
