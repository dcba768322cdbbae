import { createInterface, type Interface } from 'node:readline'
import type { Answer } from '../engine/answer.ts'
import { MgmError } from '../errors.ts'
import { MiniGemini } from '../mini-gemini.ts'
import { type ChatMessage, type ChatRequest, type LoadOptions, userMessage } from '../request.ts'
import { checkImage, EXIT, errorText, exitCodeOf, Interrupts, LoadProgress, printable } from './terminal.ts'

export interface ChatCommand {
  /** Without one: the demo model. */
  checkpoint: string | undefined
  load: Omit<LoadOptions, 'onProgress' | 'signal'>
  /** Sampling and template options of every request. */
  request: Omit<ChatRequest, 'messages' | 'signal'>
  system: string | undefined
  images: string[]
  /** Asks once and returns; without it questions are read from stdin. */
  prompt: string | undefined
  json: boolean
  quiet: boolean
  verbose: boolean
}

const HELP = `/image <file or URL>  adds a picture to the next question (all pictures stand before the first question)
/reset                forgets the conversation
/help, /exit`

/** Loads a checkpoint, then answers `--prompt`, or each line of stdin. Returns the exit code. */
export async function chat(command: ChatCommand): Promise<number> {
  for (const image of command.images) checkImage(image, '--image')
  let running: AbortController | undefined = new AbortController()
  const progress = new LoadProgress(!command.quiet && process.stderr.isTTY === true)
  const interrupts = new Interrupts(
    () => {
      running?.abort()
      return running !== undefined
    },
    () => {
      progress.stop()
      process.exit(EXIT.interrupted)
    },
  )
  let mgm: MiniGemini | undefined
  try {
    mgm = await MiniGemini.load(command.checkpoint, {
      ...command.load,
      onProgress: progress.update,
      signal: running.signal,
    }).finally(() => progress.stop())
    if (!command.quiet) for (const note of mgm.notes) process.stderr.write(`note: ${note}\n`)

    const ask = async (messages: ChatMessage[]): Promise<Answer> => {
      running = new AbortController()
      interrupts.reset()
      try {
        return await answer(mgm!, command, { ...command.request, messages, signal: running.signal })
      } finally {
        running = undefined
      }
    }

    running = undefined
    if (command.prompt === undefined) return await converse(command, interrupts, ask)
    await ask([...systemOf(command), userMessage(command.images, command.prompt)])
    return EXIT.ok
  } finally {
    interrupts.stop()
    await mgm?.close()
  }
}

async function converse(
  command: ChatCommand,
  interrupts: Interrupts,
  ask: (messages: ChatMessage[]) => Promise<Answer>,
): Promise<number> {
  const interactive = process.stdin.isTTY === true
  const lines = createInterface({
    input: process.stdin,
    output: interactive ? process.stderr : undefined,
    prompt: '> ',
    terminal: interactive,
  } as Parameters<typeof createInterface>[0])
  // A terminal in raw mode hands Ctrl-C to readline instead of raising SIGINT.
  lines.on('SIGINT', interrupts.press)
  if (interactive && !command.quiet) process.stderr.write(`${HELP}\n`)

  let messages: ChatMessage[] = systemOf(command)
  let pictures = [...command.images]
  let code: number = EXIT.ok
  for await (const line of questions(lines)) {
    const text = line.trim()
    if (text === '') continue
    if (text.startsWith('/')) {
      const [name, ...rest] = text.split(/\s+/)
      if (name === '/exit' || name === '/quit') break
      if (name === '/reset') {
        messages = systemOf(command)
        pictures = []
      } else if (name === '/image' && rest.length > 0) {
        try {
          const image = text.slice(name.length).trim()
          checkImage(image, '/image')
          pictures.push(image)
        } catch (error) {
          process.stderr.write(`${errorText(error, command.verbose)}\n`)
        }
      } else process.stderr.write(`${HELP}\n`)
      continue
    }
    const question = userMessage(pictures, text)
    try {
      const { text: reply } = await ask([...messages, question])
      messages.push(question, { role: 'assistant', content: reply })
      pictures = []
    } catch (error) {
      process.stderr.write(`${errorText(error, command.verbose)}\n`)
      // Piped questions report how they went; a person at a terminal has seen it.
      if (!interactive) code = exitCodeOf(error)
    }
  }
  lines.close()
  return code
}

async function* questions(lines: Interface): AsyncGenerator<string> {
  const iterator = lines[Symbol.asyncIterator]()
  for (;;) {
    if (process.stdin.isTTY) lines.prompt()
    const next = await iterator.next()
    if (next.done) return
    yield next.value
  }
}

async function answer(mgm: MiniGemini, command: ChatCommand, request: ChatRequest): Promise<Answer> {
  if (command.json) {
    const whole = await mgm.chat(request)
    process.stdout.write(`${JSON.stringify(whole)}\n`)
    return whole
  }
  let done: Answer | undefined
  try {
    for await (const event of mgm.stream(request)) {
      if (event.type === 'text') process.stdout.write(printable(event.delta))
      else if (event.type === 'done') done = event.answer
    }
  } finally {
    process.stdout.write('\n')
  }
  if (!done) throw new MgmError('INTERNAL', 'the answer ended without its last event')
  if (!command.quiet) process.stderr.write(`${statistics(done)}\n`)
  return done
}

/** One line about an answer: tokens, speed and the time of each stage. */
export function statistics({ usage, timings, finishReason }: Answer): string {
  const ms = (value: number): string => `${value.toFixed(value < 10 ? 1 : 0)} ms`
  return (
    `[${usage.promptTokens} prompt tokens (${usage.imageTokens} image), ${usage.completionTokens} generated, ` +
    `${timings.tokensPerSecond.toFixed(1)} tokens/s, ended by ${finishReason}; image ${ms(timings.imageMs)}, ` +
    `vision ${ms(timings.visionMs)}, prefill ${ms(timings.prefillMs)}, decode ${ms(timings.decodeMs)}, ` +
    `first token after ${ms(timings.timeToFirstTokenMs)}, total ${ms(timings.totalMs)}]`
  )
}

function systemOf(command: ChatCommand): ChatMessage[] {
  return command.system === undefined ? [] : [{ role: 'system', content: command.system }]
}
