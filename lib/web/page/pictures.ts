import type { Scene } from '../../demo/scene.ts'
import { sceneSvg } from '../../demo/svg.ts'
import type { SceneReply } from '../wire.ts'
import * as api from './api.ts'
import { get, make } from './dom.ts'

export interface Picture {
  /** A data: URL: what the model gets. */
  readonly url: string
  /** What it is, for those who do not see it. */
  readonly name: string
  /** The same for eyes, where it can be had sharper. */
  readonly shown?: string
  /** Nobody chose it. */
  readonly random?: boolean
}

const MOST = 2
/** Files beyond this many bytes or pixels along a side are made smaller before they are sent. */
const LARGE = 2 ** 20
const LONGEST_SIDE = 1024
const SHOWN_PIXELS = 768

/** The pictures that the conversation is about. */
export class Pictures {
  #pictures: Picture[] = []
  #lesson: SceneReply | undefined
  readonly #onChange: () => void
  readonly #area = get('pictures')
  readonly #error = get('picture-error')

  constructor(onChange: () => void) {
    this.#onChange = onChange
    const file = get<HTMLInputElement>('file')
    file.addEventListener('change', () => {
      void this.addFiles([...(file.files ?? [])])
      file.value = ''
    })
    get('large-close').addEventListener('click', () => get<HTMLDialogElement>('large').close())
    get('surprise').addEventListener('click', () => void this.surprise())
    get('second').addEventListener('click', () => void this.#addSecond())
    document.addEventListener('dragover', event => {
      event.preventDefault()
      this.#area.classList.add('dropping')
    })
    document.addEventListener('dragleave', event => {
      if (!event.relatedTarget) this.#area.classList.remove('dropping')
    })
    document.addEventListener('drop', event => {
      event.preventDefault()
      this.#area.classList.remove('dropping')
      void this.addFiles([...(event.dataTransfer?.files ?? [])])
    })
    document.addEventListener('paste', event => {
      const files = [...(event.clipboardData?.files ?? [])]
      if (files.length > 0) void this.addFiles(files)
    })
    this.#show()
  }

  get all(): readonly Picture[] {
    return this.#pictures
  }

  /** The scenes that are shown, and what one may ask about them; undefined for other pictures. */
  get lesson(): SceneReply | undefined {
    return this.#lesson
  }

  /** Shows files. Random scenes make room for them; a third picture takes the place of the second. */
  addFiles(files: readonly File[]): Promise<void> {
    return this.#trying(async () => {
      const read = files.slice(0, MOST).map(async file => ({ url: await readPicture(file), name: file.name }))
      const given = await Promise.all(read)
      if (given.length === 0) return
      const own = this.#pictures.filter(({ random }) => !random)
      this.#set([...own.slice(0, MOST - given.length), ...given])
    })
  }

  add(picture: Picture): void {
    this.#set([...this.#pictures.slice(0, MOST - 1), picture])
  }

  /** In place of all others. */
  show(picture: Picture): void {
    this.#set([picture])
  }

  /** Shows a scene that nobody has seen. */
  surprise(): Promise<void> {
    return this.#trying(async () => {
      const lesson = await api.getScene()
      this.#set([{ ...(await scenePicture(lesson.scenes[0], 'A random scene')), random: true }], lesson)
    })
  }

  /** Shows a scene that somebody put together, alone or beside the first picture. */
  addScene(scene: Scene, second: boolean): Promise<void> {
    return this.#trying(async () => {
      const picture = await scenePicture(scene, 'Your scene')
      if (second) this.add(picture)
      else this.show(picture)
    })
  }

  #addSecond(): Promise<void> {
    return this.#trying(async () => {
      const lesson = this.#lesson ?? (await api.getScene())
      const second = await scenePicture(lesson.scenes[1], 'Another scene')
      this.#set([...this.#pictures.slice(0, MOST - 1), { ...second, random: true }], this.#lesson)
    })
  }

  async #trying(work: () => Promise<void>): Promise<void> {
    this.#error.hidden = true
    try {
      await work()
    } catch (error) {
      this.#error.textContent = (error as Error).message
      this.#error.hidden = false
    }
  }

  #set(pictures: Picture[], lesson?: SceneReply): void {
    this.#pictures = pictures
    this.#lesson = lesson
    this.#show()
    this.#onChange()
  }

  #show(): void {
    const slots = this.#pictures.map((picture, i) => {
      const title = this.#pictures.length > 1 ? `${['First', 'Second'][i]}: ${picture.name}` : picture.name
      const remove = () => {
        this.#set(this.#pictures.filter(other => other !== picture))
        get('surprise').focus()
      }
      return make(
        'li',
        {},
        make('img', { src: picture.shown ?? picture.url, alt: title }),
        make(
          'div',
          { class: 'caption' },
          make('p', {}, title),
          make(
            'button',
            { type: 'button', 'aria-label': `Enlarge ${title}`, click: () => enlarge(picture) },
            '⤢',
          ),
          make('button', { type: 'button', 'aria-label': `Remove ${title}`, click: remove }, '×'),
        ),
      )
    })
    get('slots').replaceChildren(...slots)
    this.#area.classList.toggle('filled', slots.length > 0)
    get<HTMLButtonElement>('second').disabled = slots.length !== 1
  }
}

/** The picture of a scene: pixels for the model, as the server draws them; lines for eyes. */
async function scenePicture(scene: Scene, name: string): Promise<Picture> {
  return { url: await dataUrl(await api.renderScene(scene)), name, shown: sceneUrl(scene) }
}

/** A scene as the browser draws it. */
export function sceneUrl(scene: Scene): string {
  return `data:image/svg+xml,${encodeURIComponent(sceneSvg(scene, SHOWN_PIXELS))}`
}

function enlarge({ url, shown, name }: Picture): void {
  const image = get<HTMLImageElement>('large-image')
  image.src = shown ?? url
  image.alt = name
  get('large-title').textContent = name
  const pixels = new Image()
  pixels.src = url
  void pixels.decode().then(() => {
    get('large-note').textContent = `Sent as ${pixels.width} × ${pixels.height} pixels.`
  })
  get<HTMLDialogElement>('large').showModal()
}

async function readPicture(file: File): Promise<string> {
  let bitmap: ImageBitmap
  try {
    bitmap = await createImageBitmap(file)
  } catch {
    throw new Error(`${file.name} is not a picture that this browser can read.`)
  }
  const { width, height } = bitmap
  const scale = Math.min(1, LONGEST_SIDE / Math.max(width, height))
  if (file.size <= LARGE && scale === 1) return dataUrl(file)
  const canvas = make('canvas', {
    width: String(Math.max(1, Math.round(width * scale))),
    height: String(Math.max(1, Math.round(height * scale))),
  })
  canvas.getContext('2d')!.drawImage(bitmap, 0, 0, canvas.width, canvas.height)
  return canvas.toDataURL('image/jpeg', 0.92)
}

function dataUrl(blob: Blob): Promise<string> {
  return new Promise((resolve, reject) => {
    const reader = new FileReader()
    reader.addEventListener('load', () => resolve(reader.result as string))
    reader.addEventListener('error', () => reject(reader.error))
    reader.readAsDataURL(blob)
  })
}
