// Writes prebuilds/<platform>-<arch>/mgm-node.<libc>.node, the binary that the npm package carries and that
// node-gyp-build finds.
import { readdirSync, rmSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'

const root = join(dirname(fileURLToPath(import.meta.url)), '..')
const require = createRequire(import.meta.url)
const folder = join(root, 'prebuilds', `${process.platform}-${process.arch}`)

rmSync(folder, { recursive: true, force: true })
await promisify(require('prebuildify'))({
  cwd: root,
  napi: true,
  tagLibc: process.platform === 'linux',
  strip: true,
  nodeGyp: join(root, 'scripts', 'node-gyp-shim.mjs'),
})
// node-gyp-build prefers build/Release to prebuilds/.
rmSync(join(root, 'build', 'Release'), { recursive: true, force: true })
console.log(`prebuilds/${process.platform}-${process.arch}: ${readdirSync(folder).join(', ')}`)
