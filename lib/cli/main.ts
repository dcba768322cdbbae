#!/usr/bin/env node
import { createRequire } from 'node:module'
import { Command, CommanderError, InvalidArgumentError, Option } from 'commander'
import { SAMPLERS, type Sampler } from '../checkpoint/diffusers.ts'
import { resolveCheckpoint, SDXL_REPOSITORY } from '../checkpoint/hub.ts'
import { type ChatCommand, chat } from './chat.ts'
import { diagnose, renderDiagnosis } from './doctor.ts'
import { type GenerateCommand, generate } from './generate.ts'
import { info } from './info.ts'
import { EXIT, errorText, exitCodeOf, LoadProgress } from './terminal.ts'

const { version } = createRequire(import.meta.url)('../../package.json') as { version: string }

/** Of every command that runs a model. */
interface ModelFlags {
  maxTokens?: number
  temperature?: number
  topP?: number
  topK?: number
  minP?: number
  repetitionPenalty?: number
  seed?: number
  device?: string
  deviceMap?: 'auto'
  dtype?: 'f32' | 'bf16' | 'f16'
  quantize?: 'int8' | 'int4'
  threads?: number
  memoryLimit?: number
  visionTower?: string
  visionTowerAux?: string
  revision?: string
  offline?: boolean
}

interface ChatFlags extends ModelFlags {
  image: string[]
  prompt?: string
  system?: string
  stop?: string[]
  conversation?: string
  ocr?: string[]
  gen?: boolean
  json?: boolean
  quiet?: boolean
}

interface GenerateFlags extends ModelFlags {
  image: string[]
  prompt: string
  diffusion?: string
  output: string
  direct?: boolean
  negativePrompt?: string
  width?: number
  height?: number
  steps?: number
  guidance?: number
  sampler?: Sampler
  karras?: boolean
  count?: number
  initImage?: string
  strength?: number
  json?: boolean
  quiet?: boolean
}

const CHECKPOINT =
  'folder of an MGM checkpoint, or its id on the Hugging Face hub; without one, the demo model of the package'

function number(text: string): number {
  const value = Number(text)
  if (text.trim() === '' || !Number.isFinite(value)) throw new InvalidArgumentError('expected a number.')
  return value
}

function integer(text: string): number {
  const value = number(text)
  if (!Number.isSafeInteger(value)) throw new InvalidArgumentError('expected an integer.')
  return value
}

/** `8GB`, `512MiB` or plain bytes. */
function byteCount(text: string): number {
  const match = /^(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)$/i.exec(text.trim())
  if (!match) throw new InvalidArgumentError('expected a size such as 8GB.')
  return Math.floor(Number(match[1]) * 1024 ** ' kmgt'.indexOf(match[2]!.toLowerCase() || ' '))
}

const collect = (value: string, previous: string[] = []): string[] => [...previous, value]

/** The entries of an object that are not undefined: options not given must be absent, not undefined. */
function given<T extends object>(object: T): { [K in keyof T]?: Exclude<T[K], undefined> } {
  return Object.fromEntries(Object.entries(object).filter(([, value]) => value !== undefined)) as {
    [K in keyof T]?: Exclude<T[K], undefined>
  }
}

function loadOptions(flags: ModelFlags): ChatCommand['load'] {
  return given({
    device: flags.device,
    deviceMap: flags.deviceMap,
    dtype: flags.dtype,
    quantize: flags.quantize,
    threads: flags.threads,
    memoryLimit: flags.memoryLimit,
    visionTower: flags.visionTower,
    visionTowerAux: flags.visionTowerAux,
    revision: flags.revision,
    offline: flags.offline,
  })
}

function chatOptions(flags: ModelFlags & Partial<ChatFlags>): ChatCommand['request'] {
  return given({
    maxTokens: flags.maxTokens,
    temperature: flags.temperature,
    topP: flags.topP,
    topK: flags.topK,
    minP: flags.minP,
    repetitionPenalty: flags.repetitionPenalty,
    seed: flags.seed,
    stop: flags.stop,
    conversation: flags.conversation as ChatCommand['request']['conversation'],
    ocrHint: flags.ocr,
  })
}

function program(finish: (code: number) => void): Command {
  const mgm = new Command('mgm')
    .description('Mini-Gemini vision-language models, on your own machine')
    .version(version)
    .option('--verbose', 'print the stack and the causes of an error')
    .exitOverride()
    .configureOutput({
      outputError: (text, write) => write(text.replace(/^error: /, 'mgm: INVALID_ARGUMENT: ')),
    })
    .showHelpAfterError('(mgm --help shows how it is used)')
    .addHelpText(
      'after',
      `
Examples:
  $ mgm chat ./MGM-2B --image photo.jpg --prompt "What does the sign say?"
  $ mgm chat ./MGM-2B --image photo.jpg            # asks for questions
  $ mgm generate ./MGM-2B --diffusion ./sdxl -p "A quiet harbour at dawn"
  $ mgm info ./MGM-2B                              # what is in a checkpoint, and the memory it needs
  $ mgm doctor                                     # what this machine offers

Exit codes: 0 fine, 1 failed, 2 wrong usage, 130 ended by Ctrl-C.`,
    )
  const sampling = (command: Command): Command =>
    command
      .option('-n, --max-tokens <n>', 'most tokens of an answer', integer)
      .option('-t, --temperature <x>', '0 (default): always the likeliest token', number)
      .option('--top-p <x>', 'sample among the likeliest tokens that make up this probability', number)
      .option('--top-k <n>', 'sample among this many tokens', integer)
      .option('--min-p <x>', 'sample among tokens at least this likely, relative to the likeliest', number)
      .option('--repetition-penalty <x>', 'above 1: makes tokens that occurred less likely', number)
      .option('--seed <n>', 'makes drawing lots repeatable', integer)
  const machine = (command: Command): Command =>
    command
      .option('--device <name>', 'auto (default: the GPU if there is a usable one), cpu, cuda or cuda:N')
      .addOption(
        new Option('--device-map <how>', 'spread the language model over all GPUs').choices(['auto']),
      )
      .addOption(new Option('--dtype <name>', 'how weights are held').choices(['f32', 'bf16', 'f16']))
      .addOption(
        new Option('--quantize <name>', "how the language model's matrices are held").choices([
          'int8',
          'int4',
        ]),
      )
      .option('--threads <n>', 'threads that compute', integer)
      .option('--memory-limit <size>', 'most memory for tensors, e.g. 8GB', byteCount)
  const sources = (command: Command): Command =>
    command
      .option('--vision-tower <checkpoint>', 'CLIP tower, instead of the one that config.json names')
      .option('--vision-tower-aux <checkpoint>', 'ConvNeXt tower, instead of the one that config.json names')
      .option('--revision <name>', 'branch, tag or commit on the hub')
      .option('--offline', 'use what the hub cache holds, download nothing')

  /** What every command that runs a model takes, in the order of the help text. */
  const model = (command: Command): Command => sources(machine(sampling(command)))

  model(
    mgm
      .command('chat')
      .description('Ask about pictures; without --prompt, a conversation')
      .argument('[checkpoint]', CHECKPOINT)
      .option('-i, --image <file>', 'picture: a file or a URL; may be repeated', collect, [])
      .option('-p, --prompt <text>', 'ask this and end')
      .option('--system <text>', 'system message')
      .option('--stop <text>', 'end the answer before this text; may be repeated', collect)
      .option('--conversation <name>', 'template, instead of the one of the model family')
      .option('--ocr <word>', 'word read in the picture, as a hint; may be repeated', collect)
      .option('--gen', 'ask for the prompt of a picture to be drawn (<GEN>)')
      .option('--json', 'print each answer as a line of JSON')
      .option('-q, --quiet', 'print the answer only'),
  )
    .addHelpText(
      'after',
      `
In a conversation: /image <file> adds a picture, /reset starts again, /exit ends. Ctrl-C aborts the answer, twice quits.

Examples:
  $ mgm chat -i emoji.png -p "What is in the picture?"   # the demo model
  $ mgm chat ./MGM-2B -i a.jpg -i b.jpg -p "What changed between the two?"
  $ mgm chat ./MGM-7B -i form.png -p "Read it" --quantize int8 -n 512
  $ echo "Describe the picture" | mgm chat ./MGM-2B -i photo.jpg --json`,
    )
    .action(async (checkpoint: string | undefined, flags: ChatFlags) => {
      const command: ChatCommand = {
        checkpoint,
        load: loadOptions(flags),
        request: { ...chatOptions(flags), ...given({ gen: flags.gen }) },
        system: flags.system,
        images: flags.image,
        prompt: flags.prompt,
        json: flags.json === true,
        quiet: flags.quiet === true,
        verbose: mgm.opts<{ verbose?: boolean }>().verbose === true,
      }
      finish(await chat(command))
    })

  model(
    mgm
      .command('generate')
      .description('Let the model write a prompt for a picture, and draw it with SDXL')
      .argument('[checkpoint]', CHECKPOINT)
      .requiredOption('-p, --prompt <text>', 'what to draw, in your words')
      .option(
        '--diffusion <checkpoint>',
        `SDXL: folder in the layout of diffusers, or hub id (default: ${SDXL_REPOSITORY})`,
      )
      .option('-o, --output <file>', 'PNG, JPEG or WebP, by its ending', 'image.png')
      .option('-i, --image <file>', 'picture that the model sees; may be repeated', collect, [])
      .option('--direct', 'draw the prompt as it is, without asking the model')
      .option('--negative-prompt <text>', "what not to draw, instead of MGM's own list")
      .option('--width <pixels>', 'a multiple of 8; default: what the model was trained for', integer)
      .option('--height <pixels>', 'the same', integer)
      .option('--steps <n>', 'default 50', integer)
      .option('--guidance <x>', 'weight of the prompt, default 5; 1 or less: half the work', number)
      .addOption(new Option('--sampler <name>', "instead of the checkpoint's own").choices(SAMPLERS))
      .option('--karras', 'noise levels after Karras et al.')
      .option('--count <n>', 'number of pictures', integer)
      .option('--init-image <file>', 'picture to start from')
      .option('--strength <x>', 'how far to depart from it: above 0, up to 1; default 0.3', number)
      .option('--json', 'print the result as a line of JSON')
      .option('-q, --quiet', 'print nothing but errors'),
  )
    .addHelpText(
      'after',
      `
Examples:
  $ mgm generate ./MGM-2B --diffusion ./sdxl -p "A quiet harbour at dawn" -o harbour.png
  $ mgm generate ./MGM-2B --diffusion ./sdxl -i photo.jpg -p "The same place in winter" --seed 7
  $ mgm generate ./MGM-2B --diffusion ./sdxl --direct -p "A red fox, oil on canvas" --steps 30 --count 4

Exit code 1 if the model's answer holds no prompt.`,
    )
    .action(async (checkpoint: string | undefined, flags: GenerateFlags) => {
      // The demo model brings its own generator.
      const diffusion = flags.diffusion ?? (checkpoint === undefined ? undefined : SDXL_REPOSITORY)
      const command: GenerateCommand = {
        checkpoint,
        load: { ...loadOptions(flags), ...given({ diffusion }) },
        chat: chatOptions(flags),
        draw: given({
          negativePrompt: flags.negativePrompt,
          width: flags.width,
          height: flags.height,
          steps: flags.steps,
          guidance: flags.guidance,
          sampler: flags.sampler,
          karras: flags.karras,
          seed: flags.seed,
          count: flags.count,
          image: flags.initImage,
          strength: flags.strength,
        }),
        images: flags.image,
        prompt: flags.prompt,
        direct: flags.direct === true,
        output: flags.output,
        json: flags.json === true,
        quiet: flags.quiet === true,
      }
      finish(await generate(command))
    })

  sources(
    mgm
      .command('info')
      .description('What is in a checkpoint, the memory it needs, and what is missing')
      .argument('<checkpoint>', 'folder of an MGM or SDXL checkpoint, or its id on the Hugging Face hub')
      .option('--json', 'print JSON'),
  )
    .addHelpText(
      'after',
      `
Examples:
  $ mgm info ./MGM-2B
  $ mgm info stabilityai/stable-diffusion-xl-base-1.0
  $ mgm info ./MGM-2B --json | jq .bytesNeeded.int8`,
    )
    .action(async (checkpoint: string, flags: ChatFlags) => {
      const progress = new LoadProgress()
      const stop = new AbortController()
      const interrupt = (): void => stop.abort()
      process.once('SIGINT', interrupt)
      const hub = given({ revision: flags.revision, offline: flags.offline })
      const common = { onProgress: progress.update, signal: stop.signal }
      // The revision is the checkpoint's; towers are other repositories.
      const tower = async (id: string | undefined): Promise<string | undefined> =>
        id === undefined
          ? undefined
          : resolveCheckpoint(id, { ...common, ...given({ offline: flags.offline }) })
      try {
        const folder = await resolveCheckpoint(checkpoint, { ...common, ...hub })
        const towers = given({
          visionTower: await tower(flags.visionTower),
          visionTowerAux: await tower(flags.visionTowerAux),
        })
        progress.stop()
        process.stdout.write(`${info(folder, towers, flags.json === true)}\n`)
      } finally {
        progress.stop()
        process.off('SIGINT', interrupt)
      }
      finish(EXIT.ok)
    })

  mgm
    .command('doctor')
    .description(
      'What this machine offers: processor, threads, memory, GPU, and which backend is used and why',
    )
    .option('--json', 'print JSON')
    .addHelpText(
      'after',
      `
Examples:
  $ mgm doctor
  $ mgm doctor --json | jq -r .backend.reason

Exit code 1 if the addon does not load.`,
    )
    .action((flags: { json?: boolean }) => {
      const found = diagnose(version)
      process.stdout.write(`${flags.json ? JSON.stringify(found, null, 2) : renderDiagnosis(found)}\n`)
      finish(found.addon.error === null ? EXIT.ok : EXIT.failed)
    })
  return mgm
}

async function main(argv: string[]): Promise<void> {
  // `mgm chat … | head` closes the pipe early, which is no error.
  process.stdout.on('error', error => {
    if ((error as NodeJS.ErrnoException).code === 'EPIPE') process.exit(EXIT.ok)
    throw error
  })
  const mgm = program(code => {
    process.exitCode = code
  })
  try {
    await mgm.parseAsync(argv)
  } catch (error) {
    if (error instanceof CommanderError) {
      process.exitCode = error.exitCode === 0 || error.code === 'commander.help' ? EXIT.ok : EXIT.usage
      return
    }
    process.stderr.write(`${errorText(error, mgm.opts<{ verbose?: boolean }>().verbose === true)}\n`)
    process.exitCode = exitCodeOf(error)
  }
}

void main(process.argv)
