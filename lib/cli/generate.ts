import { statSync } from 'node:fs'
import { writeFile } from 'node:fs/promises'
import { basename, dirname, extname, join } from 'node:path'
import type { SingleBar } from 'cli-progress'
import type { ImageStep } from '../engine/image-queue.ts'
import { expected, MgmError } from '../errors.ts'
import { type GenerateResult, type ImagineResult, MiniGemini } from '../mini-gemini.ts'
import type { ImageFormat } from '../processing/encode.ts'
import { type ChatRequest, type DrawOptions, type LoadOptions, userMessage } from '../request.ts'
import { checkImage, EXIT, Interrupts, LoadProgress, printable, progressBar } from './terminal.ts'

export interface GenerateCommand {
  /** Without one: the demo model. */
  checkpoint: string | undefined
  load: Omit<LoadOptions, 'onProgress' | 'signal'>
  chat: Omit<ChatRequest, 'messages' | 'signal'>
  draw: Omit<DrawOptions, 'format' | 'onStep' | 'signal'>
  /** Pictures that the model sees. */
  images: string[]
  prompt: string
  /** Draws the prompt as it is, without asking the model. */
  direct: boolean
  /** Of several images the second is `name-2.ext`, and so on. */
  output: string
  json: boolean
  quiet: boolean
}

const FORMATS: Record<string, ImageFormat> = {
  '.png': 'png',
  '.jpg': 'jpeg',
  '.jpeg': 'jpeg',
  '.webp': 'webp',
}

/** Asks the model what to draw, draws it and writes files. Returns the exit code: 1 where the model gave no prompt. */
export async function generate(command: GenerateCommand): Promise<number> {
  for (const image of command.images) checkImage(image, '--image')
  if (typeof command.draw.image === 'string') checkImage(command.draw.image, '--init-image')
  const format = FORMATS[extname(command.output).toLowerCase()]
  if (!format) throw expected('a file name ending in .png, .jpg or .webp', '--output', command.output)
  if (!statSync(dirname(command.output), { throwIfNoEntry: false })?.isDirectory())
    throw expected('a file in a folder that exists', '--output', command.output)

  const stop = new AbortController()
  const visible = !command.quiet && process.stderr.isTTY === true
  const loading = new LoadProgress(visible)
  const drawing = new StepProgress(visible)
  const interrupts = new Interrupts(
    () => {
      stop.abort()
      return true
    },
    () => process.exit(EXIT.interrupted),
  )
  let mgm: MiniGemini | undefined
  try {
    mgm = await MiniGemini.load(command.checkpoint, {
      ...command.load,
      onProgress: loading.update,
      signal: stop.signal,
    }).finally(() => loading.stop())
    if (!command.quiet) for (const note of mgm.notes) process.stderr.write(`note: ${note}\n`)
    const draw = { ...command.draw, format, onStep: drawing.update, signal: stop.signal }
    const result = command.direct
      ? await mgm.imagine({ prompt: command.prompt, ...draw })
      : await ask(mgm, command, draw)
    drawing.stop()
    return await report(command, result)
  } finally {
    drawing.stop()
    interrupts.stop()
    await mgm?.close()
  }
}

async function ask(mgm: MiniGemini, command: GenerateCommand, draw: DrawOptions): Promise<GenerateResult> {
  const request = { ...command.chat, ...draw, messages: [userMessage(command.images, command.prompt)] }
  for await (const event of mgm.streamGenerate(request)) {
    if (event.type === 'text' && !command.json && !command.quiet) process.stdout.write(printable(event.delta))
    if (event.type === 'prompt' && !command.json && !command.quiet) process.stdout.write('\n')
    if (event.type === 'done') return event.result
  }
  throw new MgmError('INTERNAL', 'the request ended without its last event')
}

async function report(command: GenerateCommand, result: GenerateResult | ImagineResult): Promise<number> {
  const files = result.images.map((_, i) => fileName(command.output, i))
  for (const [i, image] of result.images.entries()) await writeFile(files[i]!, image.data)
  if (command.json) {
    const images = result.images.map(({ data: _, seed, ...image }, i) => ({
      file: files[i],
      seed: String(seed),
      ...image,
    }))
    process.stdout.write(`${JSON.stringify({ ...result, images })}\n`)
  } else if (!command.quiet) {
    for (const warning of result.warnings) process.stderr.write(`warning: ${warning}\n`)
    for (const [i, { width, height, seed, timings }] of result.images.entries()) {
      const seconds = ((timings.denoiseMs + timings.decodeMs) / 1000).toFixed(1)
      process.stderr.write(`[${files[i]}: ${width} x ${height}, seed ${seed}, ${seconds} s]\n`)
    }
  }
  if (result.prompt !== null) return EXIT.ok
  const { reason } = result as GenerateResult
  process.stderr.write(
    `mgm: the answer holds no prompt between <h> and </h> (${reason}); nothing was drawn\n`,
  )
  return EXIT.failed
}

function fileName(output: string, index: number): string {
  if (index === 0) return output
  const extension = extname(output)
  return join(dirname(output), `${basename(output, extension)}-${index + 1}${extension}`)
}

/** A bar over the steps of all images. */
class StepProgress {
  readonly #enabled: boolean
  readonly #steps = new Map<number, number>()
  #bar: SingleBar | undefined

  constructor(enabled: boolean) {
    this.#enabled = enabled
  }

  readonly update = ({ image, step, steps }: ImageStep): void => {
    if (!this.#enabled) return
    this.#steps.set(image, step)
    const done = [...this.#steps.values()].reduce((a, b) => a + b, 0)
    const total = this.#steps.size * steps
    if (!this.#bar) {
      this.#bar = progressBar('drawing [{bar}] {value}/{total} {eta_formatted}')
      this.#bar.start(total, 0)
    }
    this.#bar.setTotal(total)
    this.#bar.update(done)
  }

  stop(): void {
    this.#bar?.stop()
    this.#bar = undefined
  }
}
