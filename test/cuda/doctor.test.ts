import { describe, expect, it } from 'vitest'
import { diagnose, renderDiagnosis } from '../../lib/cli/doctor.ts'
import { testDriver } from './helpers.ts'

const library = testDriver({ MGM_EMULATOR_DEVICES: '80:1G,120', MGM_EMULATOR_DRIVER_VERSION: '12.4' })

describe.skipIf(library === null || !library.includes('emulator'))('mgm doctor on the emulator', () => {
  it('shows driver, devices, memory and image, and that none of it is real', () => {
    const found = diagnose('1.2.3')
    expect(found.gpu.cuda).toMatchObject({ error: null, library, driverVersion: 12040, emulated: true })
    expect(found.backend.name).toBe('cuda')
    const lines = renderDiagnosis(found)
      .split('\n')
      .map(line => line.trim())
    expect(lines).toContainEqual(
      expect.stringMatching(/^cuda +CUDA 12\.4 through .*libcuda\.so\.1, emulated: there is no real GPU/),
    )
    expect(lines).toContainEqual(
      expect.stringMatching(
        /^cuda:0 .*emulated sm_80, compute capability 8\.0, 1\.0 GiB, kernels: PTX 7\.0$/,
      ),
    )
    expect(lines).toContainEqual(
      expect.stringMatching(
        /^cuda:1 .*emulated sm_120, compute capability 12\.0, .* GiB, kernels: PTX 7\.0$/,
      ),
    )
  })
})
