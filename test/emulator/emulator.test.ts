import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { beforeAll, describe, expect, it } from 'vitest'

// Builds the emulator (native/emulator, no CUDA toolkit needed) and runs its own test programs. Each ends with
// "N passed, M failed" and says above that what went wrong.

const root = join(dirname(fileURLToPath(import.meta.url)), '..', '..')
const source = join(root, 'native', 'emulator')
const build = join(root, 'build', 'emulator')
const minutes = 60_000

const cmake = spawnSync('cmake', ['--version']).error === undefined
if (!cmake) console.warn('test/emulator is skipped: expected cmake on the PATH to build native/emulator with')

function run(command: string, args: string[], timeout: number): { status: number | null; output: string } {
  const { status, stdout, stderr, error } = spawnSync(command, args, {
    cwd: root,
    encoding: 'utf8',
    timeout,
    maxBuffer: 1 << 28,
  })
  return {
    status,
    output: `${stdout}\n${error?.message ?? ''}\n${status === 0 ? '' : stderr.slice(-20_000)}`,
  }
}

describe.skipIf(!cmake)('the emulator', () => {
  beforeAll(() => {
    const configured = run('cmake', ['-S', source, '-B', build], minutes)
    expect(configured.status, configured.output).toBe(0)
    const built = run('cmake', ['--build', build, '-j2'], 15 * minutes)
    expect(built.status, built.output).toBe(0)
  }, 16 * minutes)

  // At least so many checks must have run: a program that skips its work passes nothing.
  it.each([
    ['core_test', 7700],
    ['driver_test', 700],
    ['foreign_test', 16],
  ])(
    '%s passes',
    (name, least) => {
      const program = join(build, name)
      expect(existsSync(join(source, 'test', `${name}.cpp`)), `${name}.cpp`).toBe(true)
      const { status, output } = run(program, [join(build, 'libcuda.so.1')], 10 * minutes)
      const counts = /^(\d+) passed, (\d+) failed$/m.exec(output)
      expect(counts, output).not.toBeNull()
      expect(Number(counts?.[2]), output).toBe(0)
      expect(Number(counts?.[1])).toBeGreaterThanOrEqual(least)
      expect(status, output).toBe(0)
    },
    11 * minutes,
  )

  it('exports no symbol but the driver API and its own', () => {
    const { status, output } = run(
      'nm',
      ['-D', '--defined-only', '--format=posix', join(build, 'libcuda.so.1')],
      minutes,
    )
    if (status !== 0) return
    const names = output.split('\n').flatMap(line => line.split(' ')[0] || [])
    expect(names).toContain('cuInit')
    expect(names.filter(name => !/^(cu[A-Z]|mgmEmulator)/.test(name))).toEqual([])
  })
})
