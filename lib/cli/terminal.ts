import { statSync } from 'node:fs'
import cliProgress from 'cli-progress'
import { formatBytes } from '../engine/memory.ts'
import { MgmError } from '../errors.ts'

/** Exit codes of `mgm`. 130 is what shells use for a program ended by Ctrl-C. */
export const EXIT = { ok: 0, failed: 1, usage: 2, interrupted: 130 } as const

export function exitCodeOf(error: unknown): number {
  if (!(error instanceof MgmError)) return EXIT.failed
  if (error.code === 'ABORTED') return EXIT.interrupted
  return error.code === 'INVALID_ARGUMENT' ? EXIT.usage : EXIT.failed
}

/** One line for people: code and message; the stack and causes only where asked for. */
export function errorText(error: unknown, verbose: boolean): string {
  const known = error instanceof Error ? error : new Error(String(error))
  const code = error instanceof MgmError ? error.code : 'INTERNAL'
  const line = `mgm: ${code}: ${known.message.replace(/\s*\n\s*/g, ' ')}`
  if (!verbose) return line
  let text = `${line}\n${known.stack ?? ''}`
  for (let cause = known.cause; cause !== undefined; cause = cause instanceof Error ? cause.cause : undefined)
    text += `\ncaused by: ${cause instanceof Error ? (cause.stack ?? cause.message) : String(cause)}`
  return text
}

/** 1234567 as `1.23 M`. */
export function formatCount(count: number): string {
  for (const [scale, suffix] of [
    [1e9, 'B'],
    [1e6, 'M'],
    [1e3, 'K'],
  ] as const)
    if (count >= scale) return `${(count / scale).toFixed(2)} ${suffix}`
  return String(count)
}

/** Left column padded to one width. */
export function table(rows: readonly (readonly [string, string])[], indent = ''): string {
  const width = Math.max(...rows.map(([name]) => name.length))
  return rows
    .map(([name, value]) =>
      `${indent}${name.padEnd(width)}  ${value.replaceAll('\n', `\n${indent}${' '.repeat(width + 2)}`)}`.trimEnd(),
    )
    .join('\n')
}

export interface ProgressEvent {
  phase: string
  loaded: number
  total: number
  file?: string
}

/** A bar on stderr, not started yet. */
export function progressBar(format: string): cliProgress.SingleBar {
  return new cliProgress.SingleBar({
    format,
    barsize: 30,
    barCompleteChar: '=',
    barIncompleteChar: ' ',
    hideCursor: false,
    stream: process.stderr,
    stopOnComplete: false,
  })
}

/** A progress bar on stderr for each phase (and file) of loading; silent where stderr is no terminal. */
export class LoadProgress {
  #bar: cliProgress.SingleBar | undefined
  #title: string | undefined
  readonly #enabled: boolean

  constructor(enabled = process.stderr.isTTY === true) {
    this.#enabled = enabled
  }

  readonly update = (event: ProgressEvent): void => {
    if (!this.#enabled || event.total <= 0) return
    const title = event.file === undefined ? event.phase : `${event.phase} ${event.file}`
    if (title !== this.#title) {
      this.stop()
      this.#title = title
      this.#bar = progressBar('{title} [{bar}] {percentage}% {size} {eta_formatted}')
      this.#bar.start(event.total, event.loaded, { title, size: formatBytes(event.total) })
    }
    this.#bar?.setTotal(event.total)
    this.#bar?.update(event.loaded)
  }

  stop(): void {
    this.#bar?.stop()
    this.#bar = undefined
    this.#title = undefined
  }
}

/**
 * Ctrl-C, counted: the first aborts what runs (`abort` returns true if there was something), a second one without a
 * new start in between calls `quit`.
 */
export class Interrupts {
  #pressed = false
  readonly #abort: () => boolean
  readonly #quit: () => void
  readonly press = (): void => {
    if (this.#pressed) this.#quit()
    const first = !this.#pressed
    this.#pressed = true
    if (first && !this.#abort()) process.stderr.write('\n(press Ctrl-C again to quit)\n')
  }

  constructor(abort: () => boolean, quit: () => void) {
    this.#abort = abort
    this.#quit = quit
    process.on('SIGINT', this.press)
  }

  /** Something new was asked: the next Ctrl-C is a first one again. */
  reset(): void {
    this.#pressed = false
  }

  stop(): void {
    process.off('SIGINT', this.press)
  }
}

/** A model may write anything; what would steer a terminal (escape sequences) is not passed on to one. */
export function printable(text: string): string {
  // biome-ignore lint/suspicious/noControlCharactersInRegex: these are the ones meant
  return process.stdout.isTTY ? text.replace(/[\x00-\x08\x0b-\x1f\x7f-\x9f]/g, '\uFFFD') : text
}

/** Fails before a long load over a mistyped file name. */
export function checkImage(image: string, name: string): void {
  if (/^(https?|data|file):/.test(image)) return
  if (statSync(image, { throwIfNoEntry: false })?.isFile() !== true)
    throw new MgmError(
      'IMAGE_INVALID',
      `expected a picture file or an https: or data: URL for ${name} but received ${JSON.stringify(image)}, which is no file`,
    )
}
