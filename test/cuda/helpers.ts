import { existsSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { native } from '../../lib/native.ts'

export const root = fileURLToPath(new URL('../..', import.meta.url))

/**
 * The driver library that the tests of this process run on: MGM_LIBCUDA, else the emulator of this checkout. Null where
 * there is none, or where the build has no CUDA backend. Call it before anything opens a GPU.
 */
export function testDriver(settings: Record<string, string> = {}): string | null {
  const emulator = `${root}build/emulator/libcuda.so.1`
  const library = process.env.MGM_LIBCUDA ?? (existsSync(emulator) ? emulator : null)
  if (library === null) return null
  process.env.MGM_LIBCUDA = library
  Object.assign(process.env, settings)
  return native().cudaSurvey().devices.length > 0 ? library : null
}
