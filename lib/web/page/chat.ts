import type { WireEvent, WireImage, WireMessage, WireTimings } from '../wire.ts'
import * as api from './api.ts'
import { get, make } from './dom.ts'
import type { Picture } from './pictures.ts'

/** Pixels from the end that still count as there. */
const NEAR = 32

/** What the conversation asks of the page around it. */
export interface Surroundings {
  readonly pictures: () => readonly Picture[]
  /** Puts a drawing where the pictures are. */
  readonly lookAt: (picture: Picture) => void
  readonly onBusy: (busy: boolean) => void
}

type Drawn = Extract<WireEvent, { type: 'drawn' }>

/** The conversation: what was said, the answer that is coming, and drawings. */
export class Chat {
  readonly #around: Surroundings
  readonly #log = get('log')
  readonly #form = get('ask')
  /** What the model has been told since the pictures changed. Drawings are not part of it: each stands for itself. */
  #history: WireMessage[] = []
  #running: AbortController | undefined
  /** Whether the end was in view when the reader last scrolled or asked: what is added is then scrolled to. */
  #atEnd = true

  constructor(around: Surroundings) {
    this.#around = around
    // The log scrolls by itself where the window is wide, and with the page on a phone.
    for (const scroller of [this.#log, document]) {
      scroller.addEventListener('scroll', () => {
        this.#atEnd = this.#endInView()
      })
    }
    this.restart()
  }

  get busy(): boolean {
    return this.#running !== undefined
  }

  stop(): void {
    this.#running?.abort()
  }

  restart(): void {
    this.stop()
    this.#history = []
    this.#log.replaceChildren(
      make('p', { class: 'empty' }, 'Ask about the picture, or tell the model what to draw.'),
    )
  }

  /** The pictures are others now, so what was said before is about something else. */
  picturesChanged(): void {
    if (this.#history.length === 0 && !this.busy) return
    this.stop()
    this.#history = []
    this.#append(make('p', { class: 'divider' }, 'Other pictures: the model starts afresh.'))
  }

  /** Asks, or where `drawing` is set asks for a drawing. */
  async say(text: string, drawing: boolean): Promise<void> {
    this.#log.querySelector('.empty')?.remove()
    this.#append(make('p', { class: 'own' }, make('span', { class: 'visually-hidden' }, 'You: '), text))
    if (drawing) return this.#draw(text)
    const history = this.#history
    const pictures = this.#around.pictures()
    const question: WireMessage = { role: 'user', content: text }
    const messages = withPictures([...history, question], pictures)
    await this.#answer(async (answer, signal) => {
      const words = answer.appendChild(make('p', { class: 'words' }))
      for await (const event of api.chat({ messages }, signal)) {
        if (event.type === 'text') words.append(event.delta)
        if (event.type !== 'done') continue
        words.textContent = event.text || '(no words)'
        answer.append(timings(event.timings))
        history.push(question, { role: 'assistant', content: event.text })
      }
    })
  }

  /** A drawing is asked for alone; with the pictures only where the words point at them. */
  #draw(text: string): Promise<void> {
    const pictures = /\b(this|same)\b/i.test(text) ? this.#around.pictures() : []
    const messages = withPictures([{ role: 'user', content: text }], pictures)
    return this.#answer(async (answer, signal) => {
      const words = answer.appendChild(make('p', { class: 'words' }))
      await this.#follow(answer, words, api.chat({ messages, draw: {} }, signal), text)
    })
  }

  #redraw(prompt: string): Promise<void> {
    return this.#answer((answer, signal) => {
      const words = answer.appendChild(make('p', { class: 'words' }, drawingWords(prompt)))
      return this.#follow(answer, words, api.draw({ prompt }, signal), prompt)
    })
  }

  async #follow(
    answer: HTMLElement,
    words: HTMLElement,
    events: AsyncGenerator<WireEvent>,
    asked: string,
  ): Promise<void> {
    let canvas: Canvas | undefined
    try {
      for await (const event of events) {
        if (event.type === 'text') words.append(event.delta)
        if (event.type === 'prompt') words.textContent = drawingWords(event.prompt)
        if (event.type === 'step') {
          canvas ??= this.#canvas(answer)
          canvas.step(event)
        }
        if (event.type !== 'drawn') continue
        const image = event.images[0]
        if (event.prompt !== null && image) this.#finish(canvas ?? this.#canvas(answer), event, image)
        else this.#nothingDrawn(answer, words, event, asked)
      }
    } finally {
      canvas?.end()
    }
  }

  #finish(canvas: Canvas, { prompt, timings: said }: Drawn, image: WireImage): void {
    const { url, seed, drawMs } = image
    canvas.show(url, `Drawing: ${prompt}`)
    canvas.end()
    const name = `Drawing of ${prompt}`
    canvas.figure.append(
      make('figcaption', { class: 'timings' }, `Seed ${seed} · drawn in ${seconds(drawMs)}`),
      make(
        'div',
        { class: 'actions' },
        make('button', { type: 'button', click: () => this.#start(prompt!) }, 'Draw again with another seed'),
        make('button', { type: 'button', click: () => this.#around.lookAt({ url, name }) }, 'Look at it'),
      ),
    )
    if (said) canvas.figure.after(timings(said))
  }

  #nothingDrawn(
    answer: HTMLElement,
    words: HTMLElement,
    { text, timings: said }: Drawn,
    asked: string,
  ): void {
    words.textContent = text || '(no words)'
    answer.append(
      make('p', { class: 'hint' }, 'The model named nothing to draw.'),
      make('button', { type: 'button', click: () => this.#start(asked) }, 'Draw my words as they are'),
    )
    if (said) answer.append(timings(said))
  }

  #start(prompt: string): void {
    if (!this.busy) void this.#redraw(prompt)
  }

  #canvas(answer: HTMLElement): Canvas {
    const canvas = new Canvas()
    answer.append(canvas.figure)
    return canvas
  }

  /** Runs the work of an answer, which shows there how it ended. */
  async #answer(work: (answer: HTMLElement, signal: AbortSignal) => Promise<void>): Promise<void> {
    this.stop()
    const running = new AbortController()
    this.#running = running
    this.#around.onBusy(true)
    this.#atEnd = true
    // Read out once it is whole, not word by word.
    const answer = make('div', { class: 'answer', 'aria-busy': 'true' })
    answer.append(make('span', { class: 'visually-hidden' }, 'Model: '))
    this.#append(answer)
    const following = new MutationObserver(() => this.#keepUp())
    following.observe(answer, { childList: true, subtree: true })
    try {
      await work(answer, running.signal)
    } catch (error) {
      if (running.signal.aborted) answer.append(make('p', { class: 'hint' }, 'Stopped.'))
      else answer.append(make('p', { class: 'error' }, errorWords(error)))
    } finally {
      following.disconnect()
      answer.setAttribute('aria-busy', 'false')
      if (this.#running === running) {
        this.#running = undefined
        this.#around.onBusy(false)
      }
      this.#keepUp()
    }
  }

  #append(element: HTMLElement): void {
    this.#log.append(element)
    this.#keepUp()
  }

  /** Scrolls to what was added, unless the reader went back to what was said before. */
  #keepUp(): void {
    if (!this.#atEnd) return
    this.#log.scrollTop = this.#log.scrollHeight
    this.#form.scrollIntoView({ block: 'nearest' })
  }

  #endInView(): boolean {
    const { scrollHeight, scrollTop, clientHeight } = this.#log
    const below = scrollHeight - scrollTop - clientHeight
    return below < NEAR && this.#log.getBoundingClientRect().bottom < window.innerHeight + NEAR
  }
}

/** A drawing that is being made. */
class Canvas {
  readonly figure: HTMLElement
  readonly #image = make('img', { alt: 'The drawing so far' })
  readonly #bar = make('progress', { value: '0', max: '1', 'aria-label': 'Steps drawn' })
  readonly #count = make('p', { class: 'timings' })

  constructor() {
    this.figure = make('figure', { class: 'drawing' }, this.#image, this.#bar, this.#count)
  }

  step({ step, steps, preview }: Extract<WireEvent, { type: 'step' }>): void {
    if (preview) this.#image.src = preview
    this.#bar.max = steps
    this.#bar.value = step
    this.#count.textContent = `Step ${step} of ${steps}`
  }

  show(url: string, alt: string): void {
    this.#image.src = url
    this.#image.alt = alt
  }

  end(): void {
    this.#bar.remove()
    this.#count.remove()
  }
}

/** The pictures stand in front of the first question. */
function withPictures(messages: readonly WireMessage[], pictures: readonly Picture[]): WireMessage[] {
  const [first, ...rest] = messages
  const images = pictures.map(({ url }) => ({ type: 'image' as const, image: url }))
  const text = { type: 'text' as const, text: first!.content as string }
  return images.length > 0 ? [{ ...first!, content: [...images, text] }, ...rest] : [...messages]
}

function drawingWords(prompt: string): string {
  return `Drawing “${prompt}”`
}

function errorWords(error: unknown): string {
  return error instanceof api.ApiError ? `${error.code}: ${error.message}` : `The page failed: ${error}`
}

function timings({ timeToFirstTokenMs, tokensPerSecond, visionMs, totalMs }: WireTimings): HTMLElement {
  const parts = [
    `first token ${Math.round(timeToFirstTokenMs)} ms`,
    `${tokensPerSecond.toFixed(0)} tokens/s`,
    // Nothing where there was no picture, or one seen before.
    ...(visionMs >= 1 ? [`vision ${Math.round(visionMs)} ms`] : []),
    `total ${seconds(totalMs)}`,
  ]
  return make('p', { class: 'timings' }, parts.join(' · '))
}

function seconds(ms: number): string {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`
}
