// Holds the library against PyTorch: npx tsx tools/train-demo/parity.mts <checkpoint> <parity>, both written by export.py.
// Exits with 1 if anything differs.
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { openDiffusion } from '../../lib/checkpoint/diffusers.ts'
import { openCheckpoint } from '../../lib/checkpoint/weights.ts'
import { Device } from '../../lib/device.ts'
import { MiniGemini } from '../../lib/mini-gemini.ts'
import type { Observe } from '../../lib/models/loader.ts'
import { MgmModel } from '../../lib/models/mgm.ts'
import { Sdxl } from '../../lib/models/sdxl.ts'
import { ClipTokenizer } from '../../lib/processing/clip-tokenizer.ts'
import { buildPrompt, tokenizePrompt } from '../../lib/processing/prompt.ts'
import { loadTokenizer } from '../../lib/processing/tokenizer.ts'
import { scope, type Tensor } from '../../lib/tensor.ts'
import { type Golden, readSafetensors, toNhwc } from '../../test/helpers/safetensors.ts'
import { greedy } from '../../test/models/support.ts'

// Both sides sum in f32, in other orders; a formula that differs is wrong by far more.
const LIMIT = 1e-3

interface Parity {
  readonly question: string
  readonly ids: readonly number[]
  readonly generated: readonly number[]
  readonly answers: readonly {
    readonly pictures: readonly string[]
    readonly question: string
    readonly generated: readonly number[]
  }[]
  readonly prompts: readonly string[]
  readonly clipIds: readonly (readonly (readonly number[])[])[]
  readonly timestep: number
  readonly timeIds: readonly number[]
}

const [folder, parityFolder] = parseArgs({ allowPositionals: true }).positionals
if (!folder || !parityFolder) throw new Error('expected a checkpoint folder and a parity folder')
const parity = JSON.parse(readFileSync(join(parityFolder, 'parity.json'), 'utf8')) as Parity
const goldens = readSafetensors(join(parityFolder, 'tensors.safetensors'))
const golden = (name: string): Golden => {
  const tensor = goldens.get(name)!
  return tensor.shape.length === 4 ? toNhwc(tensor) : tensor
}

let failures = 0
function report(name: string, passed: boolean, text: string): void {
  if (!passed) failures++
  console.log(`${passed ? 'same  ' : 'DIFFER'} ${name.padEnd(16)} ${text}`)
}

/** The greatest difference, in root mean squares of what PyTorch has. */
function compare(name: string, actual: Float32Array): void {
  const { data } = golden(name)
  const rms = Math.sqrt(data.reduce((sum, value) => sum + value * value, 0) / data.length)
  const worst = data.reduce((most, value, i) => Math.max(most, Math.abs(value - actual[i]!)), 0) / rms
  report(
    name,
    actual.length === data.length && worst <= LIMIT,
    `${worst.toExponential(1)} of an RMS of ${rms.toPrecision(3)}`,
  )
}

function same(name: string, actual: unknown, wanted: unknown): void {
  const [received, expected] = [actual, wanted].map(value => JSON.stringify(value)) as [string, string]
  report(
    name,
    received === expected,
    received === expected ? '' : `received ${received} expected ${expected}`,
  )
}

const device = Device.open('cpu')
const upload = ({ data, shape }: Golden, ...as: number[]) => device.tensor(data, as.length > 0 ? as : shape)
const read = async (x: Tensor) => {
  const data = await x.readF32()
  x.dispose()
  return data
}

async function understanding(): Promise<void> {
  const tokenizer = await loadTokenizer(folder!, { family: 'gemma' })
  const content = [
    { type: 'image', image: 'picture' } as const,
    { type: 'text', text: parity.question } as const,
  ]
  const prompt = buildPrompt([{ role: 'user', content }], { conversation: 'gemma' })
  same('prompt ids', tokenizePrompt(tokenizer, prompt), parity.ids)

  const model = await MgmModel.load(device, openCheckpoint(folder!), { vocabSize: tokenizer.size })
  const seen = new Map<string, Promise<Float32Array>>()
  const observe: Observe = (name, x) => void seen.set(name, x.readF32())
  const features = device.scope(() => model.encodeImages(upload(golden('pixels')), observe))
  for (const name of [
    'stage_0',
    'stage_1',
    'stage_2',
    'stage_3',
    'clip_feat',
    'embed_feat',
    'image_features',
  ])
    compare(name, (await seen.get(name))!)
  const embeds = await read(device.scope(() => model.splice(Int32Array.from(parity.ids), [features])))
  const [{ ids, logits }] = (await greedy(model, [embeds], parity.generated.length)) as [
    Awaited<ReturnType<typeof greedy>>[0],
  ]
  compare('logits', logits[0]!)
  same('generated ids', ids, parity.generated)
  features.dispose()
  model.dispose()
}

async function drawing(): Promise<void> {
  const files = openDiffusion(join(folder!, 'sdxl'))
  for (const [i, { tokenizer }] of files.textEncoders.entries()) {
    const clip = await ClipTokenizer.load(tokenizer)
    same(
      `CLIP ids ${i + 1}`,
      parity.prompts.map(text => [...clip.encode(text).ids]),
      parity.clipIds[i],
    )
  }
  const sdxl = await Sdxl.load(device, files)
  const { prompt, pooled } = sdxl.encodePrompts(parity.prompts)
  compare('prompt', await prompt.readF32())
  compare('pooled', await pooled.readF32())
  const condition = sdxl.unet.condition({
    prompt,
    pooled,
    timeIds: parity.prompts.map(() => parity.timeIds),
    timesteps: [parity.timestep],
  })
  compare('noise', await read(scope(() => sdxl.unet.forward(upload(golden('latents')), condition, 0))))
  condition.dispose()
  compare('encoded', await read(scope(() => sdxl.vae.encode(upload(golden('drawing'))))))
  const { data, shape } = golden('latents')
  const one = data.slice(0, data.length / shape[0]!).map(value => value / files.vae.config.scaling_factor)
  compare('decoded', await read(scope(() => sdxl.vae.decode(device.tensor(one, [1, ...shape.slice(1)])))))
  for (const tensor of [prompt, pooled]) tensor.dispose()
  sdxl.dispose()
}

/** The public way, from a file to tokens and to an image. */
async function whole(): Promise<void> {
  const mgm = await MiniGemini.load(folder!, { device: 'cpu', diffusion: join(folder!, 'sdxl') })
  const content = [
    { type: 'image', image: join(parityFolder!, 'picture.png') } as const,
    { type: 'text', text: parity.question } as const,
  ]
  const { tokens } = await mgm.chat({
    messages: [{ role: 'user', content }],
    maxTokens: parity.generated.length,
    temperature: 0,
  })
  same('chat', tokens, parity.generated)

  const equal = await Promise.all(
    parity.answers.map(async ({ pictures, question, generated }) => {
      const content = [
        ...pictures.map(name => ({ type: 'image', image: join(parityFolder!, name) }) as const),
        { type: 'text', text: question } as const,
      ]
      const { tokens } = await mgm.chat({
        messages: [{ role: 'user', content }],
        maxTokens: generated.length,
        temperature: 0,
      })
      return tokens.join() === generated.join()
    }),
  )
  // Where two tokens are equally likely to six digits, either may win.
  const count = equal.filter(Boolean).length
  report('answers', count >= 0.99 * equal.length, `${count} of ${equal.length} equal`)

  const { images } = await mgm.imagine({ prompt: parity.prompts[0]!, steps: 2, seed: 1, format: 'raw' })
  same('imagine', images[0]!.data.length, 3 * mgm.info.diffusion!.size ** 2)
  await mgm.close()
}

await understanding()
await drawing()
await device.close()
await whole()
if (failures > 0) {
  console.error(`${failures} of the above differ`)
  process.exitCode = 1
}
