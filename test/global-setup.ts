import { spawnSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'

/** Builds the emulated GPU once, before any test file looks for it (test/cuda, test/emulator). Without CMake those are skipped. */
export default function buildEmulator(): void {
  const root = fileURLToPath(new URL('..', import.meta.url))
  const cmake = (...args: string[]) => spawnSync('cmake', args, { cwd: root, encoding: 'utf8' })
  if (cmake('--version').error) return
  const steps = [
    ['-S', 'native/emulator', '-B', 'build/emulator'],
    ['--build', 'build/emulator', '-j2'],
  ]
  for (const step of steps) {
    const { status, stdout, stderr } = cmake(...step)
    if (status !== 0)
      throw new Error(`the emulator did not build (cmake ${step.join(' ')}):\n${stdout}\n${stderr}`)
  }
}
