import { COLOUR_NAMES, COLOURS, type Colour, luma } from '../../demo/colours.ts'
import { KINDS } from '../../demo/kinds.ts'
import {
  areApart,
  type Box,
  isInside,
  kindOf,
  MOST_OBJECTS,
  objectBox,
  PATTERNS,
  type Pattern,
  SCENE_VERSION,
  type Scene,
  type SceneObject,
  type Sign,
  signBox,
} from '../../demo/scene.ts'
import { WORLD } from '../../demo/world.ts'
import { get, make } from './dom.ts'
import { sceneUrl } from './pictures.ts'

/** Where emoji come to stand when they are added. */
const PLACES = [
  [0.3, 0.3],
  [0.7, 0.65],
  [0.72, 0.25],
  [0.28, 0.72],
] as const
/** The height of letters: in the middle of what training has. */
const SIGN_SIZE = (WORLD.signSize[0] + WORLD.signSize[1]) / 2

type Mutable<T> = { -readonly [K in keyof T]: T[K] }

/** A dialog in which a scene is put together. */
export class Composer {
  readonly #dialog = get<HTMLDialogElement>('composer')
  readonly #stage = get('stage')
  readonly #image = get<HTMLImageElement>('stage-image')
  readonly #objects: Mutable<SceneObject>[] = []
  #colour: Colour = 'cyan'
  #pattern: Pattern = 'plain'
  #text = ''
  #signAt = { x: 0.5, y: 0.5 }
  #handles: { readonly element: HTMLElement; readonly box: () => Box }[] = []

  /** `onUse` gets the scene, and whether it is to stand beside the first picture. */
  constructor(onUse: (scene: Scene, second: boolean) => void) {
    get('kinds').append(...KINDS.map(({ name }) => make('option', { value: name })))
    get('pattern').append(...PATTERNS.map(name => make('option', {}, name)))
    get('colours').append(...COLOUR_NAMES.map(name => this.#swatch(name)))
    get('pattern').addEventListener('change', event => {
      this.#pattern = (event.target as HTMLSelectElement).value as Pattern
      this.#draw()
    })
    const sign = get<HTMLInputElement>('sign')
    sign.addEventListener('input', () => {
      this.#text = sign.value.toUpperCase().replace(/[^A-Z0-9]/g, '')
      this.#layOut()
    })
    for (const axis of ['x', 'y'] as const)
      get<HTMLInputElement>(`sign-${axis}`).addEventListener('input', event => {
        this.#signAt[axis] = clamp((event.target as HTMLInputElement).valueAsNumber / 100, 0, 1)
        this.#draw()
      })
    get('add').addEventListener('click', () => {
      this.#add()
      get('objects').lastElementChild!.querySelector('input')!.select()
    })
    get('cancel').addEventListener('click', () => this.#dialog.close())
    get('scene').addEventListener('submit', event =>
      onUse(this.#scene(), event.submitter?.id === 'use-second'),
    )
    this.#add('fox')
    this.#add('boat')
  }

  /** `beside`: there is a picture that the scene may stand beside. */
  open(beside: boolean): void {
    get('use-second').hidden = !beside
    this.#dialog.showModal()
    this.#layOut()
  }

  #add(kind = KINDS[Math.floor(Math.random() * KINDS.length)]!.name): void {
    const free = PLACES.find(([x, y]) =>
      this.#objects.every(other => Math.hypot(x - other.x, y - other.y) > 0.2),
    )
    const [x, y] = free ?? [0.5, 0.5]
    this.#objects.push({ kind, style: 'noto', x, y, size: 0.28, rotation: 0, flip: false })
    this.#layOut()
  }

  #scene(): Scene {
    const byPlace = (a: { x: number }, b: { x: number }) => a.x - b.x
    return {
      version: SCENE_VERSION,
      background: { colour: this.#colour, pattern: this.#pattern, repeat: 8, shade: 0 },
      objects: this.#objects.map(object => ({ ...object })).sort(byPlace),
      signs: this.#text ? [this.#sign()] : [],
    }
  }

  #sign(): Sign {
    const onWhite = luma(COLOURS[this.#colour]) < 0.75
    const [plate, colour] = onWhite ? (['white', 'black'] as const) : (['black', 'white'] as const)
    return { text: this.#text, font: 'plain', colour, ...this.#signAt, size: SIGN_SIZE, plate, post: false }
  }

  /** Rows and handles anew, where there are others than before. */
  #layOut(): void {
    get('objects').replaceChildren(...this.#objects.map((object, i) => this.#row(object, i)))
    get<HTMLButtonElement>('add').disabled = this.#objects.length >= MOST_OBJECTS
    for (const { element } of this.#handles) element.remove()
    this.#handles = this.#objects.map(object => ({
      element: this.#handle(object.kind, object, change => this.#resize(object, change)),
      box: () => objectBox(object),
    }))
    if (this.#text)
      this.#handles.push({
        element: this.#handle(`sign ${this.#text}`, this.#signAt, () => {}),
        box: () => signBox(this.#sign()),
      })
    this.#stage.append(...this.#handles.map(({ element }) => element))
    this.#draw()
  }

  /** The picture, the places of handles, the numbers, and what is odd about the scene. */
  #draw(): void {
    this.#image.src = sceneUrl(this.#scene())
    for (const { element, box } of this.#handles) {
      const { left, top, right, bottom } = box()
      const style = { left, top, width: right - left, height: bottom - top }
      for (const [name, value] of Object.entries(style)) element.style.setProperty(name, `${value * 100}%`)
    }
    for (const [i, object] of this.#objects.entries())
      for (const name of ['x', 'y', 'size'] as const) setNumber(`object-${i}-${name}`, object[name])
    setNumber('sign-x', this.#signAt.x)
    setNumber('sign-y', this.#signAt.y)
    get('scene-hint').textContent = this.#oddity()
    for (const id of ['use', 'use-second']) get<HTMLButtonElement>(id).disabled = this.#objects.length === 0
  }

  /** What the scenes of the training never are. */
  #oddity(): string {
    const boxes = this.#handles.map(({ box }) => box())
    const hidden = this.#objects.find(({ kind, style }) =>
      kindOf(kind)!.hiddenOn[style].includes(this.#colour),
    )
    if (hidden) return `A ${hidden.kind} can hardly be seen on ${this.#colour}.`
    if (!boxes.every(isInside)) return 'Something reaches over the edge: the model has never seen that.'
    if (boxes.some((a, i) => boxes.slice(i + 1).some(b => !areApart(a, b))))
      return 'Things touch each other: the model has never seen that.'
    return ''
  }

  #row(object: Mutable<SceneObject>, i: number): HTMLElement {
    const kind = make('input', { type: 'text', list: 'kinds', value: object.kind, autocomplete: 'off' })
    kind.addEventListener('change', () => {
      const known = kindOf(kind.value.trim().toLowerCase())
      kind.setCustomValidity(known ? '' : 'There is no such emoji: choose one from the list.')
      kind.reportValidity()
      if (!known) return
      object.kind = known.name
      this.#layOut()
      get('objects').children[i]!.querySelector('input')!.focus()
    })
    const number = (label: string, name: 'x' | 'y' | 'size') => {
      const [min, max] = name === 'size' ? [10, 80] : [0, 100]
      const input = make('input', {
        id: `object-${i}-${name}`,
        type: 'number',
        min: String(min),
        max: String(max),
        input: event => {
          const { valueAsNumber } = event.target as HTMLInputElement
          if (Number.isNaN(valueAsNumber)) return
          object[name] = clamp(valueAsNumber / 100, min / 100, max / 100)
          this.#draw()
        },
      })
      return make('label', {}, label, input)
    }
    const remove = () => {
      this.#objects.splice(i, 1)
      this.#layOut()
      get('add').focus()
    }
    return make(
      'li',
      {},
      make('label', {}, `Emoji ${i + 1}`, kind),
      number('Across', 'x'),
      number('Down', 'y'),
      number('Size', 'size'),
      make('button', { type: 'button', 'aria-label': `Remove emoji ${i + 1}`, click: remove }, '×'),
    )
  }

  #resize(object: Mutable<SceneObject>, change: number): void {
    object.size = clamp(object.size + change, 0.1, 0.8)
  }

  /** A button over a thing on the stage, to be dragged or moved by keys. */
  #handle(name: string, at: { x: number; y: number }, resize: (change: number) => void): HTMLElement {
    const move = (x: number, y: number) => {
      at.x = clamp(x, 0, 1)
      at.y = clamp(y, 0, 1)
      this.#draw()
    }
    const handle = make('button', { type: 'button', 'aria-label': `Move ${name}` })
    handle.addEventListener('pointerdown', down => {
      handle.setPointerCapture(down.pointerId)
      const { x, y } = at
      const side = this.#stage.clientWidth
      const drag = (event: PointerEvent) =>
        move(x + (event.clientX - down.clientX) / side, y + (event.clientY - down.clientY) / side)
      handle.addEventListener('pointermove', drag)
      handle.addEventListener('lostpointercapture', () => handle.removeEventListener('pointermove', drag), {
        once: true,
      })
    })
    handle.addEventListener('keydown', event => {
      const step = event.shiftKey ? 0.1 : 0.02
      const keys: Record<string, () => void> = {
        ArrowLeft: () => move(at.x - step, at.y),
        ArrowRight: () => move(at.x + step, at.y),
        ArrowUp: () => move(at.x, at.y - step),
        ArrowDown: () => move(at.x, at.y + step),
        '+': () => resize(0.02),
        '=': () => resize(0.02),
        '-': () => resize(-0.02),
      }
      const act = keys[event.key]
      if (!act) return
      event.preventDefault()
      act()
      this.#draw()
    })
    return handle
  }

  #swatch(colour: Colour): HTMLElement {
    const choose = () => {
      this.#colour = colour
      this.#draw()
    }
    const radio = make('input', {
      type: 'radio',
      name: 'colour',
      value: colour,
      class: 'visually-hidden',
      'aria-label': colour,
      checked: colour === this.#colour,
      change: choose,
    })
    const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg')
    svg.setAttribute('fill', `rgb(${COLOURS[colour].join(' ')})`)
    svg.setAttribute('aria-hidden', 'true')
    const disc = document.createElementNS(svg.namespaceURI, 'rect')
    disc.setAttribute('width', '100%')
    disc.setAttribute('height', '100%')
    svg.append(disc)
    return make('label', { title: colour }, radio, svg)
  }
}

function clamp(value: number, least: number, most: number): number {
  return Number.isNaN(value) ? least : Math.min(most, Math.max(least, Math.round(value * 1000) / 1000))
}

/** Shows a share as a percentage, unless it is being typed. */
function setNumber(id: string, value: number): void {
  const input = get<HTMLInputElement>(id)
  if (input !== document.activeElement) input.value = String(Math.round(value * 100))
}
