import { execFileSync, spawnSync } from 'node:child_process'
import {
  chmodSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  realpathSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { delimiter, dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { readElf } from './elf.ts'

const root = join(dirname(fileURLToPath(import.meta.url)), '..', '..')
const manifest = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'))
const fixture = join(root, 'test', 'fixtures', 'mgm-gemma-tiny')
const platform = `${process.platform}-${process.arch}`
const prebuild = `prebuilds/${platform}/mgm-node.glibc.node`

let folder: string
/** Paths inside the tarball. */
let packed: string[]
let tarball: string
/** An environment whose PATH holds node and nothing else. */
let bare: NodeJS.ProcessEnv

/** npm's own program, so that npm runs without a shell or a PATH. */
function npmCli(): string {
  const fromNpm = process.env.npm_execpath
  if (fromNpm?.endsWith('npm-cli.js')) return fromNpm
  for (const entry of process.env.PATH!.split(delimiter)) {
    try {
      return realpathSync(join(entry, 'npm'))
    } catch {}
  }
  throw new Error('npm is not on the PATH')
}

function node(args: string[], env: NodeJS.ProcessEnv, cwd: string): string {
  const { status, stdout, stderr, error } = spawnSync(process.execPath, args, { cwd, env, encoding: 'utf8' })
  if (error) throw error
  if (status !== 0) throw new Error(`node ${args.join(' ')} ended with ${status}\n${stdout}\n${stderr}`)
  return stdout
}

beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'mgm-package-'))
  const options = { cwd: root, stdio: 'pipe', encoding: 'utf8' } as const
  execFileSync(process.execPath, [join(root, 'scripts', 'prebuilds.mjs')], options)
  execFileSync(process.execPath, [npmCli(), 'run', 'build:ts'], options)
  const report = execFileSync(
    process.execPath,
    [npmCli(), 'pack', '--ignore-scripts', '--json', '--pack-destination', folder],
    options,
  )
  // npm 11 prints a list, npm 12 a map by package name.
  const [pack] = Object.values(JSON.parse(report.slice(report.search(/^[[{]/m)))) as [
    { filename: string; files: { path: string }[] },
  ]
  packed = pack.files.map(file => file.path)
  tarball = join(folder, pack.filename)

  const bin = join(folder, 'bin')
  mkdirSync(bin)
  symlinkSync(process.execPath, join(bin, 'node'))
  bare = { ...process.env, PATH: bin }
  for (const name of Object.keys(bare)) if (/^(npm_|NODE_|VITEST|MGM_|LD_)/.test(name)) delete bare[name]
  for (const compiler of ['cc', 'gcc', 'g++', 'c++', 'clang', 'cmake', 'make', 'ninja'])
    expect(spawnSync(compiler, ['--version'], { env: bare }).error, compiler).toBeDefined()

  const consumer = join(folder, 'consumer')
  mkdirSync(consumer)
  writeFileSync(join(consumer, 'package.json'), '{ "private": true }')
  node(
    [npmCli(), 'install', tarball, '--ignore-scripts', '--prefer-offline', '--no-audit', '--no-fund'],
    bare,
    consumer,
  )
}, 900_000)

afterAll(() => {
  if (folder) rmSync(folder, { recursive: true, force: true })
})

describe('the tarball', () => {
  it('holds compiled code, types, the binary and the papers, and nothing else', () => {
    const allowed = [
      /^package\.json$/,
      /^(README|CHANGELOG)\.md$/,
      /^LICENSE$/,
      /^dist\/[a-z0-9/-]+\.(js|d\.ts)$/,
      /^demo\/[\w./-]+\.(json|safetensors|txt)$/,
      /^dist\/web\/page\/(index\.html|style\.css|licences\.txt)$/,
      new RegExp(`^${prebuild.replaceAll('.', '\\.')}$`),
    ]
    expect(packed.filter(path => !allowed.some(pattern => pattern.test(path)))).toEqual([])
    expect(packed).toEqual(expect.arrayContaining(['README.md', 'CHANGELOG.md', 'LICENSE', prebuild]))
  })

  it('holds every file that package.json points to', () => {
    const targets = [
      manifest.main,
      manifest.types,
      manifest.exports['.'].types,
      ...Object.values(manifest.exports['./web']),
      './dist/web/page/main.js',
      './dist/web/page/index.html',
      ...Object.values(manifest.bin),
    ]
    for (const target of targets) expect(packed).toContain((target as string).replace(/^\.\//, ''))
  })

  it('runs no script and no node-gyp when it is installed', () => {
    const { scripts, gypfile } = JSON.parse(
      readFileSync(join(folder, 'consumer', 'node_modules', 'mgm-node', 'package.json'), 'utf8'),
    )
    expect(Object.keys(scripts)).not.toEqual(expect.arrayContaining(['install']))
    for (const name of ['preinstall', 'install', 'postinstall', 'prebuild'])
      expect(scripts).not.toHaveProperty(name)
    expect(gypfile).toBe(false)
    expect(packed).not.toContain('binding.gyp')
  })
})

describe('the binary', () => {
  const elf = () => readElf(join(root, prebuild))

  it('asks for no glibc newer than the one package.json declares', () => {
    const declared = /^>=2\.(\d+)$/.exec(manifest.config.glibc)![1]
    const asked = elf().symbols.flatMap(({ name, version }) => {
      const minor = /^GLIBC_2\.(\d+)/.exec(version ?? '')?.[1]
      return minor === undefined ? [] : [{ name, minor: Number(minor) }]
    })
    expect(asked.length).toBeGreaterThan(10)
    expect(asked.filter(({ minor }) => minor > Number(declared))).toEqual([])
    // Nor for symbol versions of any other library.
    expect(
      elf().symbols.filter(({ version }) => version !== undefined && !version.startsWith('GLIBC_2.')),
    ).toEqual([])
  })

  it('exports the two functions that Node looks up and nothing else', () => {
    const exported = elf().symbols.filter(symbol => symbol.defined)
    expect(exported.map(symbol => symbol.name).sort()).toEqual([
      'napi_register_module_v1',
      'node_api_module_get_api_version_v1',
    ])
  })

  it('needs glibc only, and of Node its C interface only', () => {
    expect(elf().needed.filter(name => !/^(lib(c|m|pthread|dl|rt)|ld-linux.*)\.so\.\d+$/.test(name))).toEqual(
      [],
    )
    const unversioned = elf().symbols.filter(
      symbol => !symbol.defined && !symbol.weak && symbol.version === undefined,
    )
    expect(unversioned.filter(symbol => !/^(napi|node_api)_/.test(symbol.name))).toEqual([])
    expect(unversioned.length).toBeGreaterThan(10)
  })
})

describe('installed with --ignore-scripts where there is no compiler', () => {
  const sample = JSON.parse(readFileSync(join(fixture, 'samples.json'), 'utf8')).samples[0]
  const body = `
    const mgm = await MiniGemini.load(process.argv[2], { device: 'cpu' })
    const { text, tokens } = await mgm.chat({
      messages: [{ role: 'user', content: [
        { type: 'image', image: process.argv[3] }, { type: 'text', text: process.argv[4] } ] }],
      maxTokens: 24,
    })
    await mgm.close()
    console.log(JSON.stringify({ text, tokens }))`
  const ask = (file: string, source: string): { text: string; tokens: number[] } => {
    const consumer = join(folder, 'consumer')
    writeFileSync(join(consumer, file), source)
    const args = [join(fixture, 'MGM-2B'), join(fixture, sample.images[0]), sample.turns[0]]
    return JSON.parse(node([join(consumer, file), ...args], bare, consumer))
  }

  it('answers about a picture from an ES module', () => {
    const answer = ask('esm.mjs', `import { MiniGemini } from 'mgm-node'\n${body}`)
    expect(answer).toEqual({ text: sample.text, tokens: sample.generated_ids })
  })

  it('answers about a picture from CommonJS through require', () => {
    const answer = ask(
      'cjs.cjs',
      `const { MiniGemini } = require('mgm-node')\nmain()\nasync function main() {${body}}`,
    )
    expect(answer.tokens).toEqual(sample.generated_ids)
  })

  it('answers about a picture from CommonJS through import()', () => {
    const answer = ask('dyn.cjs', `import('mgm-node').then(async ({ MiniGemini }) => {${body}})`)
    expect(answer.tokens).toEqual(sample.generated_ids)
  })

  it('brings types that a strict TypeScript project accepts', () => {
    const consumer = join(folder, 'consumer')
    writeFileSync(
      join(consumer, 'types.mts'),
      `import { MgmError, MiniGemini } from 'mgm-node'
       const mgm: MiniGemini = await MiniGemini.load('folder')
       const { text, tokens, usage } = await mgm.chat({ messages: [{ role: 'user', content: 'hello' }] })
       const joined: [string, readonly number[], number] = [text, tokens, usage.promptTokens]
       // @ts-expect-error a role that does not exist
       await mgm.chat({ messages: [{ role: 'robot', content: 'hello' }] })
       console.log(joined, new MgmError('CLOSED', 'closed').code)`,
    )
    const tsc = join(root, 'node_modules', 'typescript', 'bin', 'tsc')
    const flags = [
      '--noEmit',
      '--strict',
      '--module',
      'nodenext',
      '--target',
      'es2023',
      '--lib',
      'es2023,esnext.disposable',
    ]
    const types = ['--types', 'node', '--typeRoots', join(root, 'node_modules', '@types')]
    expect(
      node([tsc, ...flags, ...types, '--skipLibCheck', 'false', 'types.mts'], process.env, consumer),
    ).toBe('')
  })

  it('puts mgm on the path, which finds the binary inside the package', () => {
    const consumer = join(folder, 'consumer')
    const mgm = join(consumer, 'node_modules', '.bin', 'mgm')
    expect(execFileSync(mgm, ['--version'], { env: bare, encoding: 'utf8' }).trim()).toBe(manifest.version)
    const doctor = JSON.parse(execFileSync(mgm, ['doctor', '--json'], { env: bare, encoding: 'utf8' }))
    expect(doctor.addon.path).toBe(realpathSync(join(consumer, 'node_modules', 'mgm-node', prebuild)))
    expect(doctor.backend.name).toBe('cpu')
  })

  it('says what is wrong and what would help when the binary does not load', () => {
    const consumer = join(folder, 'consumer')
    const binary = join(consumer, 'node_modules', 'mgm-node', prebuild)
    const intact = readFileSync(binary)
    chmodSync(binary, 0o644)
    try {
      writeFileSync(binary, 'not a library')
      const source = `import { MiniGemini } from 'mgm-node'
        MiniGemini.load(process.argv[2], { device: 'cpu' }).then(
          () => console.log('loaded'), error => console.log(error.code + ' ' + error.message))`
      writeFileSync(join(consumer, 'broken.mjs'), source)
      const said = node([join(consumer, 'broken.mjs'), join(fixture, 'MGM-2B')], bare, consumer)
      expect(said).toMatch(/^NATIVE_UNAVAILABLE .*could not be loaded on linux-.*glibc/s)
    } finally {
      writeFileSync(binary, intact)
    }
  })
})
