import { execFileSync, spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, it } from 'vitest'
import { root } from './helpers.ts'

const addon = join(root, 'build', 'native', 'Release', 'mgm.node')
const folder = mkdtempSync(join(tmpdir(), 'mgm-driver-'))
afterAll(() => rmSync(folder, { recursive: true }))
const hasCompiler = spawnSync('cc', ['--version']).error === undefined

/** Every symbol that the addon resolves, as native/cuda/driver.h lists them. */
const symbols = [
  ...readFileSync(join(root, 'native', 'cuda', 'driver.h'), 'utf8').matchAll(/^ {2}X\((cu\w+), /gm),
].map(([, name]) => name!)

/** A GPU that computes nothing; each macro bends one answer. */
const answers: Record<string, string> = {
  cuInit: 'int cuInit(unsigned f) { return INIT; }',
  cuDriverGetVersion: 'int cuDriverGetVersion(int* v) { *v = VERSION; return 0; }',
  cuGetErrorName: 'int cuGetErrorName(int e, const char** s) { *s = "CUDA_ERROR_OF_THIS_TEST"; return 0; }',
  cuGetErrorString: 'int cuGetErrorString(int e, const char** s) { *s = "as asked for"; return 0; }',
  cuDeviceGetCount: 'int cuDeviceGetCount(int* n) { *n = COUNT; return 0; }',
  cuDeviceGetName: 'int cuDeviceGetName(char* s, int n, int d) { strncpy(s, "Test GPU", n); return 0; }',
  cuDeviceGetAttribute:
    'int cuDeviceGetAttribute(int* v, int a, int d) { *v = a == 75 ? MAJOR : a == 115 ? POOLS : 0; return 0; }',
  cuDeviceTotalMem_v2: 'int cuDeviceTotalMem_v2(size_t* n, int d) { *n = 1 << 20; return 0; }',
  cuMemGetInfo_v2: 'int cuMemGetInfo_v2(size_t* f, size_t* t) { *f = 4321; *t = 1 << 20; return 0; }',
  cuMemHostAlloc: 'int cuMemHostAlloc(void** p, size_t n, unsigned f) { *p = calloc(1, n); return 0; }',
  cuMemAllocAsync:
    'int cuMemAllocAsync(size_t* p, size_t n, void* s) { *p = 1 << 20; return n > (1 << 20) ? 2 : 0; }',
  cuModuleLoadDataEx:
    'int cuModuleLoadDataEx(void** m, const void* i, unsigned n, int* o, void** v) { strcpy(v[0], "line 7: odd"); return LOAD; }',
  cuEventCreate: 'int cuEventCreate(void** e, unsigned f) { *e = malloc(1); return 0; }',
  cuEventSynchronize: 'int cuEventSynchronize(void* e) { return SYNC; }',
}

function stub(bend: Record<string, number> = {}): string {
  const values = { INIT: 0, VERSION: 12040, COUNT: 1, MAJOR: 8, POOLS: 1, SYNC: 0, LOAD: 222, ...bend }
  const name = Object.entries(bend).flat().join('-') || 'plain'
  const [source, library] = [join(folder, `${name}.c`), join(folder, `${name}.so`)]
  const defines = Object.entries(values).map(([macro, value]) => `#define ${macro} ${value}`)
  const functions = symbols.map(symbol => answers[symbol] ?? `int ${symbol}() { return 0; }`)
  writeFileSync(source, ['#include <stdlib.h>', '#include <string.h>', ...defines, ...functions].join('\n'))
  execFileSync('cc', ['-shared', '-fPIC', '-w', '-o', library, source])
  return library
}

/** Runs `body` against a driver in a fresh process, one line an outcome. What else the process says goes to stderr. */
function run(library: string, body: string, settings: Record<string, string> = {}) {
  const code = `
    const native = require(${JSON.stringify(addon)})
    const call = (name, ...args) => native.call(native.opTable().findIndex(o => o.name === name), args)[0]
    const say = async f => {
      try { console.log('ok ' + (await f())) } catch (error) { console.log(error.code + ' ' + error.message) }
    }
    const open = (index = 0) => native.openCuda({ index, memoryLimit: 0 })
    ;(async () => { ${body} })()`
  const env = { ...process.env, MGM_LIBCUDA: library, ...settings }
  const { status, stdout, stderr } = spawnSync(process.execPath, ['-e', code], {
    env,
    encoding: 'utf8',
    timeout: 30_000,
  })
  expect(status, stderr).toBe(0)
  return { said: stdout.trim().split('\n'), log: stderr }
}

const hasCuda = hasCompiler && !/without nvcc/.test(run('/nowhere', 'await say(open)').said[0]!)

describe.skipIf(!hasCuda)('the driver layer', () => {
  it.each([
    [
      { INIT: 999 },
      /the NVIDIA driver \(CUDA 12\.4\) did not start: CUDA_ERROR_OF_THIS_TEST \(999\): as asked for/,
    ],
    [{ VERSION: 11020 }, /expected a driver for CUDA 11\.4 or newer but found CUDA 11\.2/],
    [{ COUNT: 0 }, /the driver sees no GPU/],
    [{ MAJOR: 7 }, /expected a GPU of compute capability 8\.0 or newer but found Test GPU with 7\.0/],
    [{ POOLS: 0 }, /expected stream-ordered memory pools but Test GPU \(driver 12\.4\) has none/],
  ])('refuses %o with what was found and what is required', (bend, message) => {
    const { said } = run(stub(bend as unknown as Record<string, number>), 'await say(open)')
    expect(said[0]).toMatch(/^DEVICE_UNAVAILABLE /)
    expect(said[0]).toMatch(message)
  })

  it('says which image the driver refused, with the JIT log', () => {
    const { said } = run(
      stub(),
      `const d = open(); const x = d.empty([2, 2], 'f32')
       await say(() => call('cast', x, 'bf16'))`,
    )
    expect(said[0]).toMatch(
      /^DEVICE_UNAVAILABLE no embedded image of the copy kernels runs on Test GPU \(sm_80/,
    )
    expect(said[0]).toMatch(/sm_80 cubin: CUDA_ERROR_OF_THIS_TEST \(222\).*PTX 7\.0: .*line 7: odd/)
  })

  it('names the bytes needed and free when memory runs out, and goes on', () => {
    const { said } = run(
      stub(),
      `const d = open()
       await say(() => d.empty([1 << 20], 'f32')); await say(() => d.empty([4], 'f32').byteLength)`,
    )
    expect(said).toEqual([
      expect.stringMatching(/^OUT_OF_MEMORY expected 4194304 free bytes for a tensor but received 4321/),
      'ok 16',
    ])
  })

  it('reports a dead context once it is seen, to every later call, and still closes', () => {
    const { said } = run(
      stub({ SYNC: 700 }),
      `const d = open(); const x = d.empty([4], 'f32')
       await say(() => x.read()); await say(() => d.empty([4], 'f32')); await say(() => x.write(new Float32Array(4)))
       await say(() => d.synchronize()); await say(() => d.close())`,
    )
    expect(said[0]).toMatch(/^DEVICE_LOST the GPU's work failed: CUDA_ERROR_OF_THIS_TEST \(700\)/)
    for (const line of said.slice(1, 4))
      expect(line).toMatch(/^DEVICE_LOST the GPU's context died of .*; close the device and open it again/)
    expect(said[4]).toBe('ok undefined')
  })
})

const emulator = join(root, 'build', 'emulator', 'libcuda.so.1')
const hasEmulator = hasCuda && existsSync(emulator)

describe.skipIf(!hasEmulator)('calls that the driver refuses', () => {
  const opening = 'await say(() => open().close()); await say(() => open().close())'
  const reading = `
    const d = open()
    const x = d.empty([4], 'f32')
    const step = () => { x.write(new Float32Array(4)); return call('cast', x, 'bf16').read() }
    await say(step); await say(step); await say(() => d.close())`
  const capturing = `
    const d = open()
    const x = d.empty([4], 'f32')
    const step = () => {
      x.write(new Float32Array(4))
      d.beginCapture()
      try {
        const y = call('cast', x, 'bf16')
        d.endCapture().replay()
        return y.read()
      } catch (error) {
        d.abortCapture()
        throw error
      }
    }
    await say(step); await say(step); await say(() => d.close())`
  it.each([
    [
      'cuDevicePrimaryCtxRetain=101',
      opening,
      /^DEVICE_UNAVAILABLE MGM emulated sm_80 could not be opened: .*INVALID_DEVICE \(101\)/,
    ],
    [
      'cuDevicePrimaryCtxRetain=2',
      opening,
      /^OUT_OF_MEMORY CUDA_ERROR_OUT_OF_MEMORY \(2\).*in context\.cpp:\d+$/,
    ],
    ['cuDevicePrimaryCtxRetain=719', opening, /^DEVICE_LOST CUDA_ERROR_LAUNCH_FAILED/],
    [
      'cuMemPoolSetAttribute=1',
      opening,
      /^INTERNAL .*\(1\): invalid argument, from cuMemPoolSetAttribute in context\.cpp:\d+$/,
    ],
    ['cuStreamCreate:2=304', opening, /^INTERNAL .*\(304\).*, from cuStreamCreate in device\.cpp:\d+$/],
    ['cuModuleLoadDataEx=2', reading, /^OUT_OF_MEMORY .* from cuModuleLoadDataEx/],
    ['cuModuleGetFunction=500', reading, /^INTERNAL .*\(500\).* from cuModuleGetFunction/],
    [
      'cuLaunchKernel=701',
      reading,
      /^INTERNAL .*\(701\): too many resources requested for launch, from cast\w* in/,
    ],
    ['cuEventCreate=2', reading, /^OUT_OF_MEMORY .* from cuEventCreate/],
    ['cuMemHostAlloc=2', reading, /^OUT_OF_MEMORY .* from cuMemHostAlloc/],
    ['cuMemcpyDtoHAsync_v2=1', reading, /^INTERNAL .* from cuMemcpyDtoHAsync/],
    ['cuEventSynchronize:2=1', reading, /^INTERNAL the GPU's work failed: CUDA_ERROR_INVALID_VALUE/],
    ['cuStreamBeginCapture_v2=900', capturing, /^INTERNAL .* from cuStreamBeginCapture/],
    ['cuLaunchKernel=701', capturing, /^INTERNAL .* from cast/],
    ['cuGraphInstantiateWithFlags=2', capturing, /^OUT_OF_MEMORY .* from cuGraphInstantiateWithFlags/],
    ['cuGraphLaunch=1', capturing, /^INTERNAL .* from cuGraphLaunch/],
  ])('%s: a typed error, and the next try works', (failure, body, message) => {
    const { said } = run(emulator, body, { MGM_EMULATOR_FAIL: failure })
    expect(said[0]).toMatch(message)
    expect(said.length).toBeGreaterThan(1)
    for (const line of said.slice(1)) expect(line).toMatch(/^ok /)
  })

  it.each([
    'cuLaunchKernel',
    'cuMemcpyHtoDAsync_v2:2',
    'cuEventRecord:2',
    'cuEventSynchronize:2',
    'cuMemAllocAsync:3',
  ])('%s=700: the device is lost, and its successor works', failure => {
    const again = `${reading}
        const e = open()
        const y = e.empty([4], 'f32')
        y.write(new Float32Array(4))
        await say(() => call('cast', y, 'bf16').read()); await say(() => e.close())`
    const { said } = run(emulator, again, { MGM_EMULATOR_FAIL: `${failure}=700` })
    expect(said.slice(0, -2).join('\n')).toMatch(/DEVICE_LOST .*ILLEGAL_ADDRESS \(700\)/)
    expect(said.slice(-3)).toEqual(['ok undefined', 'ok 0,0,0,0', 'ok undefined'])
  })

  it('copies between GPUs directly where they can, through the host elsewhere', () => {
    const body = `const [a, b] = [open(0), open(1)]
      const [x, y] = [a.empty([3], 'f32'), b.empty([3], 'f32')]
      x.write(Float32Array.of(1, 2, 3)); native.copyBetween(x, y); native.copyBetween(x, y)
      await say(() => y.read()); await a.close(); await b.close()`
    for (const peers of ['1', '0']) {
      const { said, log } = run(emulator, body, {
        MGM_EMULATOR_DEVICES: '80,80',
        MGM_EMULATOR_PEERS: peers,
        MGM_EMULATOR_TRACE: '1',
      })
      expect(said).toEqual(['ok 1,2,3'])
      const calls = (name: string) => log.split(`mgm-emulator: ${name} -> CUDA_SUCCESS`).length - 1
      expect(calls('cuDeviceCanAccessPeer')).toBe(1)
      expect(calls('cuCtxEnablePeerAccess')).toBe(Number(peers))
      expect(calls('cuMemPoolSetAccess')).toBe(Number(peers))
      expect(calls('cuMemcpyPeerAsync')).toBe(2)
      expect(log).not.toMatch(/api_misuse/)
    }
  })

  it('refuses what only a mistake inside the addon can ask for', () => {
    const library = join(root, 'build', 'native', 'libmgm_core.a')
    const program = join(folder, 'refusals')
    const source = join(root, 'native', 'cuda', 'test', 'refusals.cpp')
    execFileSync('c++', ['-std=c++20', '-o', program, source, library, '-ldl', '-pthread'])
    const said = execFileSync(program, { env: { ...process.env, MGM_LIBCUDA: emulator }, encoding: 'utf8' })
    expect(said.trim().split('\n')).toEqual([
      expect.stringMatching(/^INTERNAL the kernel nobody of \w+ was not compiled$/),
      expect.stringMatching(
        /^INTERNAL the kernel \w+ takes \d+ bytes of parameters but its launcher has \d+$/,
      ),
      expect.stringMatching(
        /^UNSUPPORTED the kernel \w+ needs \d+ bytes of shared memory but .* has 166912$/,
      ),
      expect.stringMatching(
        /^INVALID_ARGUMENT expected a grid that fits a GPU for \w+ but received 1 x 65536 x 1$/,
      ),
      expect.stringMatching(/^INVALID_ARGUMENT expected a grid .* -1 x 1 x 1$/),
      'ok',
      'INVALID_ARGUMENT expected a capture to end but received none',
      'ok',
      "INVALID_ARGUMENT expected a graph of this device for replay but received another's",
    ])
  })
})
