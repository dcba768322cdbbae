import { execFileSync, spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
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

/** Runs `body` against a driver in a fresh process, one line an outcome. */
function run(library: string, body: string): string[] {
  const code = `
    const native = require(${JSON.stringify(addon)})
    const op = name => native.opTable().findIndex(o => o.name === name)
    const say = async f => {
      try { console.log('ok ' + (await f())) } catch (error) { console.log(error.code + ' ' + error.message) }
    }
    const open = () => native.openCuda({ index: 0, memoryLimit: 0 })
    ;(async () => { ${body} })()`
  const env = { ...process.env, MGM_LIBCUDA: library }
  return execFileSync(process.execPath, ['-e', code], { env, encoding: 'utf8', timeout: 30_000 })
    .trim()
    .split('\n')
}

const hasCuda = hasCompiler && !/without nvcc/.test(run('/nowhere', 'await say(open)')[0]!)

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
    const [said] = run(stub(bend as unknown as Record<string, number>), 'await say(open)')
    expect(said).toMatch(/^DEVICE_UNAVAILABLE /)
    expect(said).toMatch(message)
  })

  it('says which image the driver refused, with the JIT log', () => {
    const [said] = run(
      stub(),
      `const d = open(); const x = d.empty([2, 2], 'f32')
       await say(() => native.call(op('cast'), [x, 'bf16']))`,
    )
    expect(said).toMatch(/^DEVICE_UNAVAILABLE no embedded image of the copy kernels runs on Test GPU \(sm_80/)
    expect(said).toMatch(/sm_80 cubin: CUDA_ERROR_OF_THIS_TEST \(222\).*PTX 7\.0: .*line 7: odd/)
  })

  it('names the bytes needed and free when memory runs out, and goes on', () => {
    const said = run(
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
    const said = run(
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
