import { getInfo } from './api.ts'
import { Chat } from './chat.ts'
import { Composer } from './composer.ts'
import { get, make } from './dom.ts'
import { Pictures } from './pictures.ts'

const ABOUT_A_PICTURE = [
  'What is in the picture?',
  'How many emoji are there?',
  'What color is the background?',
  'What does the sign say?',
]
const ABOUT_TWO = [
  'What is in the pictures?',
  'How many emoji are in the second picture?',
  'Do both pictures have the same background?',
]
const TO_DRAW = ['Draw a fox on blue.', 'Draw a rocket and a star on black.']
const MOST_CHIPS = 6

const question = get<HTMLInputElement>('question')
const draw = get<HTMLInputElement>('draw')
const send = get<HTMLButtonElement>('send')
const stop = get<HTMLButtonElement>('stop')
let canDraw = false

const pictures = new Pictures(() => {
  chat.picturesChanged()
  suggest()
})
const chat = new Chat({
  pictures: () => pictures.all,
  lookAt: picture => {
    pictures.show(picture)
    question.focus()
  },
  onBusy: busy => {
    const hadFocus = document.activeElement === (busy ? send : stop)
    send.hidden = busy
    stop.hidden = !busy
    if (hadFocus) (busy ? stop : question).focus()
  },
})
const composer = new Composer((scene, second) => void pictures.addScene(scene, second))

/** "Draw …" and the like are requests to draw, whether or not the box is ticked. */
const DRAW = /^(please |can you )?(draw|paint|make an? (image|picture)|(i would like )?a picture of)\b/i
const asksToDraw = (text: string) => canDraw && (draw.checked || DRAW.test(text.trim()))

function say(text: string): void {
  if (chat.busy || text.trim() === '') return
  question.value = ''
  showMode()
  void chat.say(text.trim(), asksToDraw(text))
}

function showMode(): void {
  send.textContent = asksToDraw(question.value) ? 'Draw' : 'Ask'
  question.placeholder = draw.checked
    ? 'a fox next to a boat on green'
    : pictures.all.length > 0
      ? `Ask about the picture${pictures.all.length > 1 ? 's' : ''}`
      : 'Show me a picture, or say “Draw …”'
}

/** Questions to try: those that the world has about its scenes, or such as suit any picture. */
function suggest(): void {
  const { lesson, all } = pictures
  const both = all.length > 1 ? (lesson?.questions.both ?? ABOUT_TWO) : []
  const first = all.length > 0 ? (lesson?.questions.first ?? ABOUT_A_PICTURE) : []
  const drawings = canDraw ? [...(lesson?.questions.draw ?? []), ...TO_DRAW].slice(0, 2) : []
  // Questions on one picture are ambiguous where there are two.
  const asked = (both.length > 0 ? [...both, ...ABOUT_TWO] : first).slice(0, MOST_CHIPS - drawings.length)
  const chips = [...new Set([...asked, ...drawings])].map(text =>
    make(
      'li',
      {},
      make('button', { type: 'button', click: () => sayChip(text, drawings.includes(text)) }, text),
    ),
  )
  get('chips').replaceChildren(...chips)
  showMode()
}

/** A suggestion knows what it is, whatever the box says. */
function sayChip(text: string, drawing: boolean): void {
  if (!chat.busy) void chat.say(text, drawing)
}

get('ask').addEventListener('submit', event => {
  event.preventDefault()
  say(question.value)
})
question.addEventListener('input', showMode)
draw.addEventListener('change', showMode)
stop.addEventListener('click', () => chat.stop())
get('restart').addEventListener('click', () => {
  chat.restart()
  question.focus()
})
get('compose').addEventListener('click', () => composer.open(pictures.all.length > 0))

getInfo().then(
  ({ about, family, device, threads, weightBytes, canDraw: able }) => {
    get('about').textContent = about
    get('model').textContent =
      `${family}, ${(weightBytes / 1e6).toFixed(0)} MB of weights, on ${device}, ${threads} threads`
    canDraw = able
    get('draw-toggle').hidden = !able
    suggest()
  },
  error => {
    get('about').textContent = `The server does not answer: ${(error as Error).message}`
  },
)
suggest()
void pictures.surprise()
