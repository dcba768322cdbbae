#!/usr/bin/env node
// prebuildify calls this as if it were node-gyp (`rebuild --target=… --release`) and then takes the one *.node it finds
// in build/Release. The target is of no interest: a Node-API addon serves them all.
import { spawnSync } from 'node:child_process'
import { copyFileSync, mkdirSync, rmSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const scripts = dirname(fileURLToPath(import.meta.url))
const root = join(scripts, '..')
const { status } = spawnSync(process.execPath, [join(scripts, 'build-native.mjs')], {
  cwd: root,
  stdio: 'inherit',
})
if (status !== 0) process.exit(status ?? 1)

const release = join(root, 'build', 'Release')
rmSync(release, { recursive: true, force: true })
mkdirSync(release, { recursive: true })
copyFileSync(join(root, 'build', 'native', 'Release', 'mgm.node'), join(release, 'mgm.node'))
