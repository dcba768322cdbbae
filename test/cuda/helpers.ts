import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, describe, expect, it } from 'vitest'
import { Device } from '../../lib/device.ts'
import { native } from '../../lib/native.ts'
import { type ActivationType, cast, type PackOptions, packLinear } from '../../lib/ops.ts'
import type { DType, Tensor } from '../../lib/tensor.ts'
import { expectClose, floats } from '../ops/helpers.ts'

export { floats } from '../ops/helpers.ts'

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

/** The types that a GPU's matrix ops compute in. */
export const HALVES = ['bf16', 'f16'] as const
/** The types that its other ops compute in. */
export const ACTIVATIONS = ['f32', ...HALVES] as const

/** Half the distance of neighbouring numbers, relative to them, and the same below the normal ones. */
const ROUNDOFF: Record<ActivationType, { relative: number; absolute: number }> = {
  f32: { relative: 2 ** -24, absolute: 2 ** -150 },
  bf16: { relative: 2 ** -8, absolute: 2 ** -134 },
  f16: { relative: 2 ** -11, absolute: 2 ** -25 },
}

/** Makes the inputs of a comparison on one of its devices. */
export interface Inputs {
  readonly device: Device
  /** An activation. On the CPU it is f32, of numbers already rounded to the GPU's type. */
  a(data: ArrayLike<number>, shape: number[]): Tensor
  /** As an f32, i32, u8 or half tensor, the same on both devices. */
  plain(data: Float32Array | Int32Array | Uint8Array | Uint16Array, shape: number[]): Tensor
  /** A packed matrix of numbers rounded to the activations' type; stored in it unless `pack.dtype` says otherwise. */
  packed(data: ArrayLike<number>, shape: number[], pack?: PackOptions): Tensor
  /** The `out` of an op that is told what its activations are. */
  readonly out: ActivationType
}

export interface Comparison {
  dtype?: ActivationType
  /**
   * Allowed beside the rounding of each result to its own type: |actual − expected| ≤ absolute + relative·|expected|.
   * 'exact': the same numbers, rounded.
   */
  limit: { absolute: number; relative?: number } | 'exact'
  /** Says which case failed: sizes, seed. */
  what: string
}

export interface Cuda {
  readonly cpu: Device
  readonly gpu: Device
  /** Runs `body` on the CPU's backend and on the GPU; floats agree within the limit, everything else exactly. */
  same(comparison: Comparison, body: (inputs: Inputs) => Tensor | Tensor[]): Promise<void>
  /** The inputs of `same` for a test of its own; f32 by default. */
  inputs(device: Device, dtype?: ActivationType): Inputs
}

function isFloat(dtype: DType): dtype is ActivationType {
  return dtype === 'f32' || dtype === 'bf16' || dtype === 'f16'
}

function inputs(device: Device, dtype: ActivationType): Inputs {
  const onCpu = device.name === 'cpu'
  const round = (data: ArrayLike<number>, shape: number[]) => {
    const x = device.tensor(Float32Array.from(data), shape)
    return dtype === 'f32' ? x : cast(x, dtype)
  }
  return {
    device,
    out: onCpu ? 'f32' : dtype,
    a: (data, shape) => device.scope(() => (onCpu ? cast(round(data, shape), 'f32') : round(data, shape))),
    plain: (data, shape) => device.tensor(data, shape),
    packed: (data, shape, pack) => device.scope(() => packLinear(round(data, shape), { dtype, ...pack })),
  }
}

/**
 * Tests of the CUDA backend, on the emulator or on a GPU. vitest.config.ts runs the files of test/cuda/ops under
 * several of the emulator's schedules, with its checks of memory, races, initialization and barriers on; the last test
 * is that it found nothing. Skipped where there is neither.
 */
export function cudaTests(title: string, body: (cuda: Cuda) => void): void {
  const folder = mkdtempSync(join(tmpdir(), 'mgm-emulator-'))
  afterAll(() => rmSync(folder, { recursive: true }))
  const findings = join(folder, 'findings.jsonl')
  const library = testDriver({
    MGM_EMULATOR_DEVICES: process.env.MGM_EMULATOR_DEVICES ?? '80:1G,90:1G',
    MGM_EMULATOR_REPORT: findings,
  })
  describe.skipIf(library === null)(title, () => {
    const cpu = Device.open('cpu', { threads: 1 })
    let opened: Device | undefined
    afterAll(async () => {
      await opened?.close()
      await cpu.close()
    })
    const cuda: Cuda = {
      cpu,
      get gpu() {
        opened ??= Device.open('cuda')
        return opened
      },
      inputs: (device, dtype = 'f32') => inputs(device, dtype),
      async same({ dtype = 'f32', limit, what }, body) {
        const run = (device: Device) => device.scope(() => [body(inputs(device, dtype))].flat())
        const made = run(cuda.gpu)
        // Rounded as the GPU's are: what rounds to infinity there does so here.
        const reference = cpu.scope(() =>
          run(cpu).map((tensor, i) => {
            const type = made[i]?.dtype
            return type !== undefined && isFloat(type) ? cast(cast(tensor, type), 'f32') : tensor
          }),
        )
        expect(made.length).toBe(reference.length)
        for (const [i, tensor] of made.entries()) {
          const name = `${dtype}, ${what}, result ${i}`
          const expected = reference[i]!
          expect(tensor.shape, name).toEqual(expected.shape)
          if (limit === 'exact')
            expect([...(await floats(tensor))], name).toEqual([...(await floats(expected))])
          else if (isFloat(tensor.dtype)) {
            const roundoff = ROUNDOFF[tensor.dtype]
            const bound = {
              absolute: limit.absolute + 2 * roundoff.absolute,
              relative: (limit.relative ?? 0) + 2 * roundoff.relative,
            }
            expectClose(await floats(tensor), await floats(expected), bound, name)
          } else expect([...(await tensor.read())], name).toEqual([...(await expected.read())])
          tensor.dispose()
          expected.dispose()
        }
      },
    }
    body(cuda)

    it('leaves the emulator nothing to report', async () => {
      await cuda.gpu.synchronize()
      await cuda.gpu.close()
      opened = undefined
      expect(existsSync(findings) ? readFileSync(findings, 'utf8') : '').toBe('')
    })
  })
}
