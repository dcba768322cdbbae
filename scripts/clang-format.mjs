// Formats the C++ and CUDA sources; with --check, names those that are not formatted and fails.
import { spawnSync } from 'node:child_process'
import { readdirSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = join(dirname(fileURLToPath(import.meta.url)), '..')
const check = process.argv.includes('--check')
const files = readdirSync(join(root, 'native'), { recursive: true, encoding: 'utf8' })
  .filter(name => /\.(c|cc|cpp|h|cu|cuh)$/.test(name))
  .map(name => join('native', name))
  .sort()

const program = createRequire(import.meta.url)('clang-format').getNativeBinary()
const mode = check ? ['--dry-run', '--Werror'] : ['-i']
let failed = false
for (let i = 0; i < files.length; i += 50) {
  const args = [...mode, ...files.slice(i, i + 50)]
  failed = spawnSync(program, args, { cwd: root, stdio: 'inherit' }).status !== 0 || failed
}
if (failed) {
  if (check) console.error('clang-format: run `npm run format`')
  process.exit(1)
}
console.log(`clang-format: ${files.length} files ${check ? 'checked' : 'formatted'}`)
