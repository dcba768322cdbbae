import { type ChildProcessWithoutNullStreams, spawn } from 'node:child_process'
import { cpSync, mkdtempSync, readdirSync, readFileSync, rmSync, truncateSync } from 'node:fs'
import { createServer } from 'node:http'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'

const root = join(dirname(fileURLToPath(import.meta.url)), '..', '..')
const fixture = join(root, 'test', 'fixtures', 'mgm-gemma-tiny')
const checkpoint = join(fixture, 'MGM-2B')
const picture = join(fixture, 'images', 'a_land.png')
const sdxl = join(root, 'test', 'fixtures', 'sdxl-tiny', 'pipeline')
const { samples } = JSON.parse(readFileSync(join(fixture, 'samples.json'), 'utf8'))
const single = samples.find((sample: { name: string }) => sample.name === 'single')

let folder: string
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'mgm-cli-'))
})
afterAll(() => rmSync(folder, { recursive: true, force: true }))

interface Outcome {
  code: number | null
  stdout: string
  stderr: string
}

function start(args: string[], env: NodeJS.ProcessEnv = {}): ChildProcessWithoutNullStreams {
  const cli = join(root, 'lib', 'cli', 'main.ts')
  const loader = import.meta.resolve('tsx')
  return spawn(process.execPath, ['--import', loader, cli, ...args], {
    cwd: folder,
    env: { ...process.env, HF_HUB_CACHE: join(folder, 'hub'), ...env },
  })
}

function outcome(child: ChildProcessWithoutNullStreams): Promise<Outcome> {
  const result: Outcome = { code: null, stdout: '', stderr: '' }
  child.stdout.setEncoding('utf8').on('data', text => {
    result.stdout += text
  })
  child.stderr.setEncoding('utf8').on('data', text => {
    result.stderr += text
  })
  return new Promise((resolve, reject) => {
    child.on('error', reject)
    child.on('close', code => resolve({ ...result, code }))
  })
}

/** Runs `mgm` to its end; `input` is what it reads from stdin. */
function mgm(args: string[], input = '', env: NodeJS.ProcessEnv = {}): Promise<Outcome> {
  const child = start(args, env)
  child.stdin.end(input)
  return outcome(child)
}

describe('mgm', () => {
  it('explains itself, with examples', async () => {
    const { code, stdout } = await mgm(['--help'])
    expect(code).toBe(0)
    for (const text of ['chat', 'generate', 'info', 'doctor', 'Examples:', 'Exit codes'])
      expect(stdout).toContain(text)
    for (const name of ['chat', 'generate', 'info', 'doctor']) {
      const help = await mgm([name, '--help'])
      expect(help.code).toBe(0)
      expect(help.stdout).toMatch(new RegExp(`Usage: mgm ${name}[^]*Examples:\\n  \\$ mgm ${name}`))
    }
  })

  it('refuses what it does not know, with exit code 2', async () => {
    for (const args of [
      ['draw'],
      ['chat', checkpoint, '--no-such-option'],
      ['chat', checkpoint, '-n', 'many'],
      ['chat', checkpoint, '--quantize', 'int3'],
      ['chat', checkpoint, '--memory-limit', 'lots'],
      ['info'],
      ['generate', checkpoint, '--diffusion', sdxl],
      ['generate', checkpoint, '-p', 'x', '--diffusion', sdxl, '--sampler', 'best'],
    ]) {
      const { code, stdout, stderr } = await mgm(args)
      expect({ args, code, stdout }).toEqual({ args, code: 2, stdout: '' })
      expect(stderr).toMatch(/^mgm: INVALID_ARGUMENT: \S/)
    }
  })
})

describe('mgm chat', () => {
  const ask = [picture, '--prompt', single.turns[0], '-n', '24', '--device', 'cpu']

  it('streams the answer to stdout and statistics to stderr', async () => {
    const { code, stdout, stderr } = await mgm(['chat', checkpoint, '--image', ...ask])
    expect({ code, stdout }).toEqual({ code: 0, stdout: `${single.text}\n` })
    expect(stderr).toMatch(
      /24 generated, [\d.]+ tokens\/s, ended by length; image [\d.]+ ms, vision [\d.]+ ms, prefill/,
    )
  })

  it('prints nothing but the answer with --quiet', async () => {
    const { stdout, stderr } = await mgm(['chat', checkpoint, '--quiet', '--image', ...ask])
    expect({ stdout, stderr }).toEqual({ stdout: `${single.text}\n`, stderr: '' })
  })

  it('prints JSON with --json', async () => {
    const { code, stdout } = await mgm(['chat', checkpoint, '--json', '--image', ...ask])
    expect(code).toBe(0)
    const answer = JSON.parse(stdout)
    expect(answer).toMatchObject({ text: single.text, tokens: single.generated_ids, finishReason: 'length' })
    expect(answer.usage.completionTokens).toBe(24)
  })

  it('takes several pictures, in order', async () => {
    const two = samples.find((sample: { name: string }) => sample.name === 'two_images')
    const images = two.images.flatMap((image: string) => ['-i', join(fixture, image)])
    const { stdout } = await mgm(['chat', checkpoint, '--json', ...images, '-p', two.turns[0], '-n', '24'])
    expect(JSON.parse(stdout).tokens).toEqual(two.generated_ids)
  })

  it('converses: each line of stdin is a question about what was said before', async () => {
    const input = `/image ${picture}\n${single.turns[0]}\n\nAnd now?\n/reset\n/image ${picture}\n${single.turns[0]}\n/exit\nnever asked\n`
    const { code, stdout } = await mgm(['chat', checkpoint, '--json', '-n', '24'], input)
    expect(code).toBe(0)
    const answers = stdout
      .trim()
      .split('\n')
      .map(line => JSON.parse(line))
    expect(answers).toHaveLength(3)
    expect(answers[0].tokens).toEqual(single.generated_ids)
    expect(answers[1].usage.promptTokens).toBeGreaterThan(answers[0].usage.promptTokens + 24)
    expect(answers[2].tokens).toEqual(single.generated_ids)
  })

  it('asks the demo model when no checkpoint is named', async () => {
    const { code, stdout } = await mgm(['chat', '--prompt', 'Who are you?'])
    expect(code).toBe(0)
    expect(stdout).toMatch(/^I am a small demo model\./)
  })

  it('reports an error as one line, with the stack only if asked', async () => {
    const nowhere = join(folder, 'nowhere')
    const brief = await mgm(['chat', nowhere, '-p', 'hello'])
    expect(brief.code).not.toBe(0)
    expect(brief.stdout).toBe('')
    expect(brief.stderr).toMatch(/^mgm: [A-Z_]+: .*nowhere.*\n$/)
    const verbose = await mgm(['--verbose', 'chat', nowhere, '-p', 'hello'])
    expect(verbose.stderr).toMatch(/\n\s+at /)
  })

  it('refuses a picture that is no file before it loads anything', async () => {
    const { code, stderr } = await mgm(['chat', checkpoint, '-i', 'missing.jpg', '-p', 'hello'])
    expect(code).toBe(1)
    expect(stderr).toMatch(/^mgm: IMAGE_INVALID: .*missing\.jpg.*\n$/)
  })

  it('names the damaged file of a checkpoint', async () => {
    const copy = join(folder, 'damaged')
    cpSync(fixture, copy, { recursive: true })
    const shard = readdirSync(join(copy, 'MGM-2B')).find(name => name.startsWith('model-00001'))!
    truncateSync(join(copy, 'MGM-2B', shard), 5000)
    const { code, stderr } = await mgm(['chat', join(copy, 'MGM-2B'), '-p', 'hello'])
    expect(code).toBe(1)
    expect(stderr).toMatch(/^mgm: CHECKPOINT_INVALID: .*model-00001.*\n$/)
  })

  // Ctrl-C must come while an answer is being made: a picture whose download never ends keeps it so.
  const hanging = async (act: (child: ChildProcessWithoutNullStreams) => void): Promise<Outcome> => {
    const server = createServer((_request, response) => {
      response.writeHead(200, { 'content-type': 'image/png' })
      response.write(readFileSync(picture).subarray(0, 20))
      act(child)
    })
    await new Promise<void>(resolve => server.listen(0, '127.0.0.1', resolve))
    const { port } = server.address() as { port: number }
    const child = start(['chat', checkpoint, '-q', '-i', `http://127.0.0.1:${port}/a.png`, '-p', 'hello'])
    try {
      return await outcome(child)
    } finally {
      server.closeAllConnections()
      server.close()
    }
  }

  it('ends an answer at Ctrl-C', async () => {
    const { code, stderr } = await hanging(child => child.kill('SIGINT'))
    expect(code).toBe(130)
    expect(stderr).toMatch(/^mgm: ABORTED: [^\n]*\n$/)
  })

  it('aborts one answer of a conversation at Ctrl-C and goes on', async () => {
    const server = createServer((_request, response) => {
      response.writeHead(200, { 'content-type': 'image/png' })
      response.write(readFileSync(picture).subarray(0, 20))
      child.kill('SIGINT')
    })
    await new Promise<void>(resolve => server.listen(0, '127.0.0.1', resolve))
    const { port } = server.address() as { port: number }
    const child = start(['chat', checkpoint, '--json', '-n', '24'])
    child.stdin.end(
      `/image http://127.0.0.1:${port}/a.png\nhello\n/reset\n/image ${picture}\n${single.turns[0]}\n`,
    )
    const { code, stdout, stderr } = await outcome(child)
    server.closeAllConnections()
    server.close()
    expect(stderr).toMatch(/ABORTED/)
    expect(JSON.parse(stdout).tokens).toEqual(single.generated_ids)
    expect(code).toBe(130)
  })

  it('quits at the second Ctrl-C while it waits for a question', async () => {
    const child = start(['chat', checkpoint, '--json', '-n', '2'])
    child.stdin.write('hello\n')
    child.stdout.once('data', () => child.kill('SIGINT'))
    let said = ''
    child.stderr.on('data', text => {
      const before = said.includes('again to quit')
      said += text
      if (!before && said.includes('again to quit')) child.kill('SIGINT')
    })
    const { code, stdout } = await outcome(child)
    expect(code).toBe(130)
    expect(JSON.parse(stdout).tokens).toHaveLength(2)
  })
})

describe('mgm info', () => {
  it('shows family, sizes, memory by dtype, and that nothing is missing', async () => {
    const { code, stdout } = await mgm(['info', checkpoint])
    expect(code).toBe(0)
    expect(stdout).toMatch(/family\s+Gemma/)
    for (const dtype of ['f32', 'bf16', 'f16', 'int8', 'int4'])
      expect(stdout).toMatch(new RegExp(`^ *${dtype} +[\\d.]+ (B|KiB|MiB|GiB)$`, 'm'))
    expect(stdout).toContain('nothing is missing')
  })

  it('prints JSON that counts the parameters of the weight files', async () => {
    const { stdout } = await mgm(['info', checkpoint, '--json'])
    const summary = JSON.parse(stdout)
    const config = JSON.parse(readFileSync(join(checkpoint, 'config.json'), 'utf8'))
    expect(summary.family).toBe('gemma')
    expect(summary.config.hidden_size).toBe(config.hidden_size)
    expect(summary.missing).toEqual([])
    expect(summary.bytesNeeded.f32).toBe(summary.total.parameters * 4)
    expect(summary.bytesNeeded.int4).toBeLessThan(summary.bytesNeeded.int8)
  })

  it('lists what is missing instead of failing', async () => {
    const copy = join(folder, 'towerless', 'MGM-2B')
    cpSync(checkpoint, copy, { recursive: true })
    const { code, stdout } = await mgm(['info', copy])
    expect(code).toBe(0)
    expect(stdout).toMatch(/missing\n.*mm_vision_tower/)
  })

  it('shows an SDXL pipeline', async () => {
    const pipeline = join(root, 'test', 'fixtures', 'sdxl-tiny', 'pipeline')
    const { code, stdout } = await mgm(['info', pipeline])
    expect(code).toBe(0)
    expect(stdout).toMatch(/^UNet +channels 16-32-64, transformers 0-2-3, heads 2-4-4, prompt 80$/m)
    expect(stdout).toMatch(/^text encoder 2 +4 layers of 48, 6 heads, gelu$/m)
    expect(stdout).toMatch(/^VAE +channels 16-32-48-48, 8 x 8 pixels a latent of 4$/m)
    expect(stdout).toMatch(/^scheduler +euler, epsilon, leading spacing$/m)
    expect(stdout).toMatch(/^picture +128 x 128$/m)
    expect(stdout).toContain('nothing is missing')
    const summary = JSON.parse((await mgm(['info', pipeline, '--json'])).stdout)
    expect(summary.bytesNeeded.f32).toBe(4 * summary.total.parameters)
  })

  it('names a folder that holds no checkpoint', async () => {
    const { code, stderr } = await mgm(['info', folder])
    expect(code).toBe(1)
    expect(stderr).toMatch(/^mgm: CHECKPOINT_INVALID: .*config\.json.*\n$/)
  })
})

describe('mgm doctor', () => {
  it('shows the processor, the memory, the backend and why', async () => {
    const { code, stdout } = await mgm(['doctor'])
    expect(code).toBe(0)
    for (const name of [
      'addon',
      'processor',
      'instruction set',
      'threads',
      'memory',
      'gpu',
      'libcuda',
      'backend',
    ])
      expect(stdout).toMatch(new RegExp(`^${name} +\\S`, 'm'))
  })

  it('prints JSON, and follows MGM_CPU_ISA', async () => {
    const { stdout } = await mgm(['doctor', '--json'], '', { MGM_CPU_ISA: 'portable' })
    const found = JSON.parse(stdout)
    expect(found.cpu.isa).toBe('portable')
    expect(found.cpu.reason).toContain('MGM_CPU_ISA')
    expect(found.cpu.threads).toBeGreaterThan(0)
    expect(found.memory.total).toBeGreaterThan(found.memory.free)
    expect(found.backend).toMatchObject({ name: 'cpu' })
    const flags = readFileSync('/proc/cpuinfo', 'utf8')
    for (const feature of found.cpu.features) expect(flags).toContain(feature)
  })

  it('finds a libcuda where MGM_LIBCUDA says', async () => {
    const { stdout } = await mgm(['doctor', '--json'], '', { MGM_LIBCUDA: picture })
    expect(JSON.parse(stdout).gpu.libcuda).toBe(picture)
  })

  it('still reports when the addon does not load', async () => {
    const { code, stdout } = await mgm(['doctor', '--json'], '', { MGM_CPU_ISA: 'mmx' })
    expect(code).toBe(1)
    const found = JSON.parse(stdout)
    expect(found.addon.error).toContain('mmx')
    expect(found.backend.name).toBe(null)
  })
})

describe('mgm generate', () => {
  const quick = ['--diffusion', sdxl, '--width', '48', '--height', '40', '--steps', '2', '--device', 'cpu']
  const draw = (...args: string[]) => mgm(['generate', checkpoint, ...quick, ...args])

  it('draws a prompt into files, the same for a seed', async () => {
    const first = await draw('--direct', '-p', 'two boats', '--seed', '5', '--count', '2', '-o', 'boats.png')
    expect(first).toMatchObject({ code: 0, stdout: '' })
    expect(first.stderr).toMatch(
      /^\[boats\.png: 48 x 40, seed 5, [\d.]+ s\]\n\[boats-2\.png: 48 x 40, seed 6, [\d.]+ s\]\n$/,
    )
    const again = await draw('--direct', '-p', 'two boats', '--seed', '6', '-o', 'again.png', '--quiet')
    expect(again).toEqual({ code: 0, stdout: '', stderr: '' })
    const [boat, second] = ['again.png', 'boats-2.png'].map(name => readFileSync(join(folder, name)))
    expect(boat!.subarray(1, 4).toString()).toBe('PNG')
    expect(Buffer.compare(boat!, second!)).toBe(0)
  })

  it('says when the answer holds no prompt', async () => {
    const { code, stdout, stderr } = await draw(
      '-i',
      picture,
      '-p',
      single.turns[0],
      '-n',
      '8',
      '-o',
      'none.webp',
    )
    expect(code).toBe(1)
    expect(stdout).not.toBe('')
    expect(stderr).toBe('mgm: the answer holds no prompt between <h> and </h> (missing); nothing was drawn\n')
    expect(readdirSync(folder)).not.toContain('none.webp')
  })

  it('prints JSON with --json', async () => {
    const { code, stdout } = await draw('--direct', '-p', 'a', '--seed', '1', '-o', 'a.jpg', '--json')
    expect(code).toBe(0)
    const { images } = JSON.parse(stdout)
    expect(images).toMatchObject([{ file: 'a.jpg', format: 'jpeg', width: 48, height: 40, seed: '1' }])
  })

  it('refuses before it loads anything', async () => {
    const cases: [string[], string][] = [
      [
        ['-p', 'a', '-o', 'a.bmp'],
        'expected a file name ending in .png, .jpg or .webp for --output but received "a.bmp"',
      ],
      [['-p', 'a', '-o', 'nowhere/a.png'], 'expected a file in a folder that exists for --output'],
      [
        ['-p', 'a', '--init-image', 'nothing.png'],
        'for --init-image but received "nothing.png", which is no file',
      ],
    ]
    for (const [args, message] of cases) {
      const { code, stderr } = await draw(...args)
      expect(code).toBeGreaterThan(0)
      expect(stderr).toContain(message)
    }
  })
})
