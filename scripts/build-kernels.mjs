// Compiles native/cuda/kernels/*.cu to PTX (compute_80, relabelled to the lowest .version that ptxas accepts) and
// that same PTX to cubins, and writes build/kernels/images.cpp, which embeds them deflated, and images.json, which says
// where they lie. A kernel that passes its tests as PTX on the emulator is therefore the kernel in every cubin.
//
// Results are kept in build/kernels/cache under the hash of everything that went into them. ptxas's registers, spills
// and shared memory are in build/kernels/registers.json; native/cuda/registers.json is the table they are held to.
//
// usage: node scripts/build-kernels.mjs [--nvcc PATH] [--out FOLDER] [--update-registers]
// MGM_CUDA_ARCHS: 'all' (default), 'ci' (PTX and sm_80 only) or a list such as '80,90'.
import { execFile, execFileSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs'
import { availableParallelism } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs, promisify } from 'node:util'
import { deflateRaw } from 'node:zlib'
import { parseUsage } from './ptxas.mjs'

const run = promisify(execFile)
const root = join(dirname(fileURLToPath(import.meta.url)), '..')
const sources = join(root, 'native', 'cuda', 'kernels')
const cache = join(root, 'build', 'kernels', 'cache')
const table = join(root, 'native', 'cuda', 'registers.json')
// 8.9 runs sm_86's: ptxas makes the same code for both, byte for byte.
const ALL = [80, 86, 90, 100, 120]
// compute_80 needs 7.0. nvcc itself always writes its newest.
const PTX_VERSIONS = [
  '7.0',
  '7.1',
  '7.2',
  '7.3',
  '7.4',
  '7.5',
  '7.6',
  '7.7',
  '7.8',
  '8.0',
  '8.4',
  '8.7',
  '9.0',
]
// A cubin for a target needs a .version that knows the target; the code stays the same.
const VERSION_OF_TARGET = { 90: '7.8', 100: '8.6', 120: '8.7' }

const { values } = parseArgs({
  options: {
    nvcc: { type: 'string', default: 'nvcc' },
    out: { type: 'string', default: join(root, 'build', 'kernels') },
    'update-registers': { type: 'boolean', default: false },
  },
})
const output = values.out
const asked = process.env.MGM_CUDA_ARCHS || 'all'
const targets = asked === 'all' ? ALL : asked === 'ci' ? [80] : asked.split(',').map(Number)
if (targets.length === 0 || targets.some(target => !ALL.includes(target)))
  fail(
    `expected 'all', 'ci' or some of ${ALL.join(',')} for MGM_CUDA_ARCHS but received ${JSON.stringify(asked)}`,
  )

const ptxas = values.nvcc.includes('/') ? sibling(values.nvcc, 'ptxas') : 'ptxas'
// What this script does to a source counts as a part of the compiler.
const rules = [compile, lowestVersion, assemble, PTX_VERSIONS, JSON.stringify(VERSION_OF_TARGET)]
const compiler = [tool(values.nvcc), tool(ptxas), ...rules].join('\0')
const families = readdirSync(sources)
  .filter(name => name.endsWith('.cu'))
  .map(name => name.slice(0, -3))
mkdirSync(cache, { recursive: true })

const limit = gate(availableParallelism())
const modules = await Promise.all(families.map(family => compile(family)))
write(join(output, 'images.cpp'), await embed(modules))
const index = modules.map(({ family, ptx, cubins }) => ({
  family,
  ptx,
  cubins: Object.fromEntries(cubins.map(({ target, file }) => [`sm_${target}`, file])),
}))
write(join(output, 'images.json'), `${JSON.stringify(index, null, 2)}\n`)
const registers = Object.fromEntries(modules.map(module => [module.family, module.usage]))
write(join(output, 'registers.json'), `${JSON.stringify(registers, null, 2)}\n`)
if (values['update-registers']) {
  if (targets.length !== ALL.length)
    fail('the table of registers is made of all targets: unset MGM_CUDA_ARCHS')
  writeFileSync(table, `${JSON.stringify(registers, null, 2)}\n`)
}

/** PTX, cubins and what ptxas said of one .cu file. */
async function compile(family) {
  const source = join(sources, `${family}.cu`)
  const flags = ['-std=c++17', '-O3', '-ptx', '-arch=compute_80']
  const key = hash(compiler, ...includes(source).map(file => readFileSync(file, 'utf8')))
  const ptx = join(cache, `${family}-${key}.ptx`)
  if (!existsSync(ptx)) {
    const raw = `${ptx}.${process.pid}.raw`
    await limit(() => run(values.nvcc, [...flags, source, '-o', raw], { maxBuffer: 1 << 26 }))
    const text = readFileSync(raw, 'utf8')
    rmSync(raw)
    // A hint to the optimizer, which only PTX 8.3 knows.
    const plain = text.replace(/^\s*\.pragma "used_bytes_mask [^"]*";\n/gm, '')
    write(ptx, relabel(plain, await lowestVersion(plain, ptx)))
  }
  const text = readFileSync(ptx, 'utf8')
  const version = /^\.version (\d+)\.(\d+)$/m.exec(text)
  const cubins = await Promise.all(
    targets.map(async target => {
      const cubin = join(cache, `${family}-${hash(compiler, text)}.sm_${target}.cubin`)
      if (!existsSync(cubin) || !existsSync(`${cubin}.txt`)) {
        const labelled = relabel(text, newer(`${version[1]}.${version[2]}`, VERSION_OF_TARGET[target]))
        write(`${cubin}.txt`, await assemble(labelled, target, cubin))
      }
      return { target, file: cubin, said: readFileSync(`${cubin}.txt`, 'utf8') }
    }),
  )
  const [major, minor] = [Number(version[1]), Number(version[2])]
  return {
    family,
    ptx,
    version: major * 10 + minor,
    cubins,
    usage: tabulate(cubins),
    entries: entriesOf(text),
  }
}

/** { kernel: { 'sm_80 sm_86': usage } }: targets that use the same share a line. */
function tabulate(cubins) {
  const kernels = {}
  for (const { target, said } of cubins)
    for (const [kernel, used] of parseUsage(said)) {
      const usage = inWords(used)
      kernels[kernel] ??= {}
      kernels[kernel][usage] = [...(kernels[kernel][usage] ?? []), `sm_${target}`]
    }
  return Object.fromEntries(
    Object.keys(kernels)
      .sort()
      .map(kernel => [
        kernel,
        Object.fromEntries(Object.entries(kernels[kernel]).map(([usage, names]) => [names.join(' '), usage])),
      ]),
  )
}

/** A source and all of our headers that it includes, directly or not. */
function includes(file, found = []) {
  if (found.includes(file)) return found
  found.push(file)
  for (const [, name] of readFileSync(file, 'utf8').matchAll(/^#include "(.+)"$/gm))
    includes(join(dirname(file), name), found)
  return found
}

async function lowestVersion(text, ptx) {
  let refusal
  for (const version of PTX_VERSIONS) {
    try {
      await assemble(relabel(text, version), 80, `${ptx}.probe`)
      rmSync(`${ptx}.probe`, { force: true })
      return version
    } catch (error) {
      refusal = error
    }
  }
  throw refusal
}

/** Assembles PTX and returns what ptxas reports. */
async function assemble(text, target, file) {
  const input = `${file}.${process.pid}.ptx`
  writeFileSync(input, text)
  try {
    const args = ['-v', '-O3', `-arch=sm_${target}`, input, '-o', `${file}.${process.pid}`]
    const { stdout, stderr } = await limit(() => run(ptxas, args, { maxBuffer: 1 << 26 }))
    renameSync(`${file}.${process.pid}`, file)
    return stdout + stderr
  } finally {
    rmSync(input, { force: true })
  }
}

/** '40 registers, 512 bytes shared': stack and spills only where there are any. */
function inWords({ registers, ...bytes }) {
  const used = Object.entries(bytes).filter(([, count]) => count > 0)
  return [`${registers} registers`, ...used.map(([what, count]) => `${count} bytes ${what}`)].join(', ')
}

/** [{ name, bytes }]: each kernel takes one struct, whose size PTX declares. */
function entriesOf(text) {
  return [...text.matchAll(/^\.visible \.entry (\w+)\(([^)]*)\)/gm)].map(([, name, params]) => {
    const sizes = [...params.matchAll(/\.param \.align \d+ \.b8 \w+\[(\d+)\]/g)]
    if (sizes.length !== 1 || params.split('.param').length !== 2)
      fail(`expected one struct as the parameter of kernel ${name} but found (${params.trim()})`)
    return { name, bytes: Number(sizes[0][1]) }
  })
}

/** A translation unit that holds every image as deflated bytes, and the tables over them. */
async function embed(modules) {
  const blobs = []
  const rows = []
  const entries = []
  for (const { family, ptx, version, cubins, entries: kernels } of modules) {
    const images = [...cubins.map(({ target, file }) => [target, file]), [0, ptx]]
    const deflated = await Promise.all(images.map(([, file]) => deflate(file)))
    images.forEach(([target, file], i) => {
      const symbol = `mgm_image_${family}_${target || 'ptx'}`
      blobs.push(
        `asm(".pushsection .rodata\\n.global ${symbol}, ${symbol}_end\\n.hidden ${symbol}, ${symbol}_end\\n"`,
        `    "${symbol}:\\n.incbin \\"${deflated[i]}\\"\\n${symbol}_end:\\n.popsection\\n");`,
        `extern "C" const unsigned char ${symbol}[], ${symbol}_end[];`,
      )
      rows.push(`    {"${family}", ${target}, ${version}, ${statSync(file).size}, ${symbol}, ${symbol}_end},`)
    })
    for (const { name, bytes } of kernels) entries.push(`    {"${family}", "${name}", ${bytes}},`)
  }
  return [
    '// Written by scripts/build-kernels.mjs.',
    '#include "cuda/images.h"',
    ...blobs,
    'namespace mgm::cuda {',
    `static const Image kImages[] = {`,
    ...rows,
    '};',
    'static const KernelEntry kEntries[] = {',
    ...entries,
    '};',
    'std::span<const Image> images() { return kImages; }',
    'std::span<const KernelEntry> kernel_entries() { return kEntries; }',
    '}  // namespace mgm::cuda',
    '',
  ].join('\n')
}

/** The file beside `file` that holds it deflated. */
async function deflate(file) {
  const deflated = `${file}.deflate`
  if (!existsSync(deflated)) {
    writeFileSync(`${deflated}.${process.pid}`, await promisify(deflateRaw)(readFileSync(file), { level: 9 }))
    renameSync(`${deflated}.${process.pid}`, deflated)
  }
  return deflated
}

function relabel(text, version) {
  return text.replace(/^\.version .*$/m, `.version ${version}`)
}

function newer(a, b) {
  return b !== undefined && Number(b) > Number(a) ? b : a
}

function hash(...parts) {
  return createHash('sha256').update(parts.join('\0')).digest('hex').slice(0, 20)
}

/** Writes only what differs, so that make sees no change where there is none; readers never see half a file. */
function write(file, text) {
  if (existsSync(file) && readFileSync(file, 'utf8') === text) return
  writeFileSync(`${file}.${process.pid}`, text)
  renameSync(`${file}.${process.pid}`, file)
}

function tool(name) {
  try {
    return execFileSync(name, ['--version'], { encoding: 'utf8' })
  } catch (error) {
    return fail(`${name} does not run: ${error.message}`)
  }
}

/** `name` beside `file`, else the one on the PATH. */
function sibling(file, name) {
  const beside = join(dirname(file), name)
  return existsSync(beside) ? beside : name
}

/** Runs at most `count` of the functions given to it at once. */
function gate(count) {
  let running = 0
  const queue = []
  return async body => {
    if (running >= count) await new Promise(resolve => queue.push(resolve))
    running++
    try {
      return await body()
    } finally {
      running--
      queue.shift()?.()
    }
  }
}

function fail(message) {
  console.error(`build-kernels: ${message}`)
  process.exit(1)
}
