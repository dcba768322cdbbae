import { execFileSync, spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { readElf } from '../packaging/elf.ts'
import { root } from './helpers.ts'

const addon = join(root, 'build', 'native', 'Release', 'mgm.node')
const hasNvcc = spawnSync('nvcc', ['--version']).error === undefined
const folder = mkdtempSync(join(tmpdir(), 'mgm-cuda-'))
afterAll(() => rmSync(folder, { recursive: true }))

/** { family: { kernel: { 'sm_80 sm_86': '40 registers, 512 bytes shared' } } } */
type Table = Record<string, Record<string, Record<string, string>>>

describe.skipIf(!hasNvcc)('the kernels', () => {
  let built: Table
  beforeAll(() => {
    // ptxas assembles the shipped PTX for all five targets, or this throws.
    const { MGM_CUDA_ARCHS: _, ...env } = process.env
    execFileSync(process.execPath, [join(root, 'scripts', 'build-kernels.mjs'), '--out', folder], { env })
    built = JSON.parse(readFileSync(join(folder, 'registers.json'), 'utf8'))
  }, 1_800_000)

  it('assemble for every target, with the registers and memory that the table says', () => {
    const table = JSON.parse(readFileSync(join(root, 'native', 'cuda', 'registers.json'), 'utf8'))
    // On purpose only: node scripts/build-kernels.mjs --update-registers
    expect(built).toEqual(table)
    for (const kernels of Object.values(built))
      for (const usage of Object.values(kernels))
        expect(Object.keys(usage).join(' ').split(' ').sort()).toEqual(
          ['sm_80', 'sm_86', 'sm_90', 'sm_100', 'sm_120'].sort(),
        )
  })

  it('spill nothing', () => {
    const spilling = Object.values(built)
      .flatMap(Object.entries)
      .flatMap(([kernel, usage]) =>
        Object.entries(usage as Record<string, string>)
          .filter(([, said]) => said.includes('spills'))
          .map(([targets]) => `${kernel} on ${targets}`),
      )
    expect(spilling).toEqual([])
  })

  it('are PTX 7.0 for sm_80, which every driver of CUDA 11.4 and later loads', () => {
    const images = readFileSync(join(folder, 'images.cpp'), 'utf8')
    const versions = [...images.matchAll(/\{"(\w+)", 0, (\d+),/g)].map(([, family, version]) => [
      family,
      version,
    ])
    expect(versions.length).toBe(Object.keys(built).length)
    expect(versions.filter(([, version]) => version !== '70')).toEqual([])
  })
})

describe.skipIf(spawnSync('cmake', ['--version']).error !== undefined)('a build folder', () => {
  it('follows nvcc as it comes and goes', () => {
    const [home, build] = [join(folder, 'toolkit'), join(folder, 'configured')]
    mkdirSync(join(home, 'bin'), { recursive: true })
    const env = { PATH: '/usr/bin:/bin', CUDA_HOME: home }
    // Neither what CMake knows of the system nor the PATH may name the machine's own nvcc.
    const configure = (...more: string[]) => {
      const settings = ['-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF', `-DMGM_NODE=${process.execPath}`, ...more]
      return spawnSync('cmake', ['-S', root, '-B', build, ...settings], { env, encoding: 'utf8' })
    }
    const compiled = () => {
      const rules = ['build.ninja', join('CMakeFiles', 'mgm_core.dir', 'build.make')]
        .filter(name => existsSync(join(build, name)))
        .map(name => readFileSync(join(build, name), 'utf8'))
        .join()
      return {
        cuda: rules.includes('native/cuda/context.cpp'),
        standIn: rules.includes('native/no_cuda/device.cpp'),
      }
    }
    expect(configure().stdout).toMatch(/nvcc was not found: building the CPU backend only/)
    expect(compiled()).toEqual({ cuda: false, standIn: true })
    writeFileSync(join(home, 'bin', 'nvcc'), '#!/bin/sh\n', { mode: 0o755 })
    expect(configure().status).toBe(0)
    expect(compiled()).toEqual({ cuda: true, standIn: false })
    expect(configure('-DMGM_CUDA=OFF').status).toBe(0)
    expect(compiled()).toEqual({ cuda: false, standIn: true })
    rmSync(join(home, 'bin', 'nvcc'))
    const { status, stderr } = configure('-DMGM_CUDA=ON')
    expect(status).not.toBe(0)
    expect(stderr).toMatch(/MGM_CUDA=ON needs nvcc on the PATH or under CUDA_HOME/)
  })

  it('without nvcc gives an addon that says so', () => {
    const [source, program] = [join(folder, 'without.cpp'), join(folder, 'without')]
    writeFileSync(
      source,
      `#include "cuda/device.h"
       #include "runtime/error.h"
       int main() {
         try { mgm::cuda::open_device(0, 0); } catch (const mgm::Error& error) {
           std::printf("%s %s\\n", error.code().c_str(), error.what());
         }
         std::puts(mgm::cuda::survey().error.c_str());
       }`,
    )
    const standIn = join(root, 'native', 'no_cuda', 'device.cpp')
    execFileSync('c++', ['-std=c++20', '-I', join(root, 'native'), '-o', program, source, standIn])
    const why =
      "this build has only the CPU backend (it was compiled without nvcc); use device: 'cpu' or 'auto'"
    expect(execFileSync(program, { encoding: 'utf8' })).toBe(`DEVICE_UNAVAILABLE ${why}\n${why}\n`)
  })
})

describe('the addon', () => {
  it('links no CUDA library', () => {
    expect(readElf(addon).needed.filter(name => /cuda|nv/i.test(name))).toEqual([])
  })

  /** What opening a GPU says in a fresh process with this driver library. */
  const openWith = (library: string) =>
    execFileSync(
      process.execPath,
      [
        '-e',
        `const native = require(${JSON.stringify(addon)})
         try { native.openCuda({ index: 0, memoryLimit: 0 }); console.log('opened') }
         catch (error) { console.log(error.code + ' ' + error.message) }`,
      ],
      { env: { ...process.env, MGM_LIBCUDA: library }, encoding: 'utf8' },
    )
  const hasCuda = !/compiled without nvcc/.test(openWith('/nowhere/libcuda.so.1'))

  it.skipIf(!hasCuda)('says that there is no driver', () => {
    expect(openWith('/nowhere/libcuda.so.1')).toMatch(
      /^DEVICE_UNAVAILABLE the NVIDIA driver's library could not be opened \(.*nowhere.*MGM_LIBCUDA/,
    )
    expect(openWith('libm.so.6')).toMatch(/^DEVICE_UNAVAILABLE libm.so.6 is not a CUDA driver/)
  })

  it.skipIf(!hasCuda || spawnSync('cc', ['--version']).error !== undefined)(
    'says which driver it found and which it needs',
    () => {
      const compile = (name: string, code: string) => {
        const [source, library] = [join(folder, `${name}.c`), join(folder, `${name}.so`)]
        writeFileSync(source, code)
        execFileSync('cc', ['-shared', '-fPIC', '-o', library, source])
        return library
      }
      expect(openWith(compile('old', 'int cuDriverGetVersion(int* v) { *v = 11020; return 0; }'))).toMatch(
        /^DEVICE_UNAVAILABLE expected a driver for CUDA 11\.4 or newer but found CUDA 11\.2/,
      )
      expect(
        openWith(compile('partial', 'int cuDriverGetVersion(int* v) { *v = 12040; return 0; }')),
      ).toMatch(/^DEVICE_UNAVAILABLE .*partial\.so \(CUDA 12\.4\) lacks cuInit/)
    },
  )
})
