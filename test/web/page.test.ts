import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { type Browser, chromium, type Locator, type Page } from 'playwright-core'
import sharp from 'sharp'
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import type { MiniGemini } from '../../lib/index.ts'
import { serve, type WebServer } from '../../lib/web/index.ts'
import { findChromium } from '../../scripts/chromium.mjs'
import { sample, vicuna } from '../e2e/cases.ts'
import { linger, loadTiny, say } from './planted.ts'

const executablePath = findChromium()
const picture = readFileSync(join(vicuna.root, sample(vicuna, 'single').images[0]!))

it.runIf(process.env.CI === 'true')('there is a Chromium to run the page in', () => {
  expect(executablePath, 'install chromium, or say where one is in CHROMIUM_PATH').toBeDefined()
})

describe.skipIf(!executablePath)('the page, in Chromium', () => {
  let mgm: MiniGemini
  let server: WebServer
  let browser: Browser
  let page: Page
  let complaints: string[]
  beforeAll(async () => {
    mgm = await loadTiny()
    server = await serve(mgm)
    browser = await chromium.launch({ executablePath: executablePath!, args: ['--no-sandbox'] })
  })
  afterAll(async () => {
    await browser?.close()
    await server?.close()
    await mgm?.close()
  })

  beforeEach(async () => {
    await say(null)
    linger(0)
    await open()
    return async () => {
      await page.close()
      expect(complaints).toEqual([])
    }
  })

  async function open(width = 1100, height = 800): Promise<void> {
    await page?.close()
    complaints = []
    page = await browser.newPage({ viewport: { width, height } })
    page.setDefaultTimeout(30_000)
    // Violations of the content security policy are errors of the console.
    page.on('console', message => {
      if (message.type() === 'error') complaints.push(message.text())
    })
    page.on('pageerror', error => complaints.push(String(error)))
    await page.goto(server.url)
    await slot('A random scene').waitFor()
  }

  const slot = (name: string) => page.getByRole('img', { name, exact: true })
  const button = (name: string) => page.getByRole('button', { name, exact: true })
  const question = () => page.getByRole('textbox', { name: 'Question, or what to draw' })
  const answer = () => page.locator('.answer').last()
  const ask = async (text: string) => {
    await question().fill(text)
    await question().press('Enter')
  }
  const answered = () => page.locator('.answer[aria-busy=false] .timings').last().waitFor()

  it('answers about a random scene, in several turns', async () => {
    const sent: string[] = []
    page.on('request', request => {
      if (request.url().endsWith('/api/chat')) sent.push(request.postData()!)
    })
    expect(await page.locator('#about').textContent()).toMatch(
      'small demo model of about 22 million parameters',
    )
    const shown = await slot('A random scene').getAttribute('src')
    await say('A fox on a red background.')
    await page.getByRole('list', { name: 'Suggestions' }).getByRole('button').first().click()
    await answered()
    expect(await answer().textContent()).toMatch(
      /A fox on a red background\.first token \d+ ms · .*vision \d+ ms · total/,
    )

    await say('Red.')
    await ask('And the background?')
    await page.locator('.answer[aria-busy=false]').nth(1).waitFor()
    expect(await answer().locator('.words').textContent()).toBe('Red.')
    const { messages } = JSON.parse(sent[1]!)
    expect(messages.map((message: { role: string }) => message.role)).toEqual(['user', 'assistant', 'user'])
    const { type, image } = messages[0].content[0]
    expect(type).toBe('image')
    const { info } = await sharp(Buffer.from(image.split(',')[1], 'base64')).toBuffer({
      resolveWithObject: true,
    })
    expect(info).toMatchObject({ format: 'png', width: 256, height: 256 })
    expect(messages[1].content).toBe('A fox on a red background.')

    await button('Surprise me').click()
    await page.getByText('Other pictures: the model starts afresh.').waitFor()
    expect(await slot('A random scene').getAttribute('src')).not.toBe(shown)
    await ask('And now?')
    await page.locator('.answer[aria-busy=false]').nth(2).waitFor()
    expect(JSON.parse(sent[2]!).messages).toHaveLength(1)

    await button('New conversation').click()
    expect(await page.locator('.answer').count()).toBe(0)
  })

  it('streams, and stops', async () => {
    linger(100)
    await ask('Tell me everything.')
    await page.locator('.answer[aria-busy=true] .words:not(:empty)').waitFor()
    await button('Stop').click()
    await page.getByText('Stopped.').waitFor()
    expect(await button('Ask').isVisible()).toBe(true)
    expect(await question().evaluate(element => element === document.activeElement)).toBe(true)
    await expect.poll(() => mgm.metrics.running).toBe(0)
  })

  it('takes pictures that are dropped, pasted or chosen, two at most', async () => {
    const give = (event: 'drop' | 'paste', names: string[], type: string, bytes: Buffer) =>
      page.evaluate(
        ([event, names, type, base64]) => {
          const data = new DataTransfer()
          for (const name of names)
            data.items.add(new File([Uint8Array.from(atob(base64), c => c.charCodeAt(0))], name, { type }))
          const given =
            event === 'drop'
              ? new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true })
              : new ClipboardEvent('paste', { clipboardData: data, bubbles: true })
          document.querySelector('#pictures')!.dispatchEvent(given)
        },
        [event, names, type, bytes.toString('base64')] as const,
      )
    // The scene that the page begins with makes room.
    await give('drop', ['land.png'], 'image/png', picture)
    await slot('land.png').waitFor()
    expect(await page.locator('.slots img').count()).toBe(1)
    await give('paste', ['pasted.png'], 'image/png', picture)
    await slot('First: land.png').waitFor()
    await slot('Second: pasted.png').waitFor()
    await page
      .getByLabel('Choose a file …')
      .setInputFiles({ name: 'third.png', mimeType: 'image/png', buffer: picture })
    await slot('Second: third.png').waitFor()
    expect(await page.locator('.slots img').count()).toBe(2)
    await say('Yes.')
    await ask('Do both pictures have the same background?')
    await answered()
    expect(await answer().locator('.words').textContent()).toBe('Yes.')

    await give('drop', ['notes.txt'], 'text/plain', Buffer.from('hello'))
    expect(await page.getByRole('alert').textContent()).toBe(
      'notes.txt is not a picture that this browser can read.',
    )
    expect(await page.locator('.slots img').count()).toBe(2)

    await button('Remove First: land.png').click()
    await button('Add a second').click()
    await slot('Second: Another scene').waitFor()
    await give('drop', ['own.png'], 'image/png', picture)
    await slot('First: third.png').waitFor()
    await slot('Second: own.png').waitFor()
    await give('drop', ['one.png', 'two.png', 'three.png'], 'image/png', picture)
    await slot('First: one.png').waitFor()
    await slot('Second: two.png').waitFor()
    await button('Remove First: one.png').click()
    await button('Remove two.png').click()
    expect(await page.locator('.slots img').count()).toBe(0)
  })

  it('draws step by step, again, and looks at what it drew', async () => {
    await say('<h>a fox on a blue background</h>')
    const steps = await page.evaluateHandle(() => {
      const seen = new Set<string>()
      new MutationObserver(() => {
        const bar = document.querySelector('progress')
        const image = document.querySelector<HTMLImageElement>('figure img')
        if (bar && image?.src.startsWith('data:image/png')) seen.add(`${bar.value} of ${bar.max}`)
      }).observe(document.body, { childList: true, subtree: true, attributes: true })
      return seen
    })
    await ask('Draw a fox on blue.')
    await slot('Drawing: a fox on a blue background').waitFor()
    expect(await answer().locator('.words').textContent()).toBe('Drawing “a fox on a blue background”')
    expect(await steps.evaluate(seen => [...seen].at(-1))).toBe('16 of 16')
    expect(await steps.evaluate(seen => seen.size)).toBeGreaterThan(4)
    expect(await page.getByRole('progressbar').count()).toBe(0)

    const first = await answer().textContent()
    await button('Draw again with another seed').click()
    await page.locator('.answer[aria-busy=false]').nth(1).waitFor()
    const seeds = [first!, (await answer().textContent())!].map(text => /Seed (\d+)/.exec(text)![1])
    expect(new Set(seeds).size).toBe(2)

    await button('Look at it').last().click()
    await slot('Drawing of a fox on a blue background').waitFor()
    await say('A fox.')
    await ask('What is this?')
    await page.locator('.answer[aria-busy=false]').nth(2).waitFor()
    expect(await answer().locator('.words').textContent()).toBe('A fox.')
  })

  it.each([
    ['Draw a fox.', 'Draw'],
    ['please paint a fox', 'Draw'],
    ['A picture of a fox on blue, please.', 'Draw'],
    ['Is there a fox?', 'Ask'],
    ['What is drawn in the picture?', 'Ask'],
  ])('%j is a request to %s', async (text, name) => {
    await question().fill(text)
    expect(await page.locator('#send').textContent()).toBe(name)
  })

  it('offers to draw the words where the model named nothing', async () => {
    await say('I would rather not.')
    await page.getByRole('checkbox', { name: 'Draw' }).check()
    await question().fill('a house')
    await button('Draw').click()
    await page.getByText('The model named nothing to draw.').waitFor()
    await button('Draw my words as they are').click()
    await slot('Drawing: a house').waitFor()
  })

  it('shows errors in place, and the conversation goes on', async () => {
    await ask('What is </s>?')
    await page.locator('.answer .error').waitFor()
    expect(await answer().textContent()).toMatch(/INVALID_ARGUMENT: .*special token/)
    await say('Fine.')
    await ask('And now?')
    await answered()
    expect(await answer().locator('.words').textContent()).toBe('Fine.')
    // The browser logs every refused request.
    expect(complaints.splice(0)).toEqual([expect.stringContaining('400')])
  })

  it('composes a scene with the keyboard alone', async () => {
    await button('Compose …').focus()
    await page.keyboard.press('Enter')
    const dialog = page.getByRole('dialog', { name: 'Compose a scene' })
    await dialog.getByRole('combobox', { name: 'Emoji 1' }).fill('rocket')
    await page.keyboard.press('Tab')
    const handle = dialog.getByRole('button', { name: 'Move rocket' })
    const [across, size] = [0, 1].map(i => dialog.getByLabel(['Across', 'Size'][i]!).first())
    expect(await across!.inputValue()).toBe('30')
    await handle.focus()
    await page.keyboard.press('ArrowRight')
    await page.keyboard.press('Shift+ArrowRight')
    await page.keyboard.press('+')
    expect([await across!.inputValue(), await size!.inputValue()]).toEqual(['42', '30'])
    await dialog.getByRole('radio', { name: 'red' }).focus()
    await page.keyboard.press('Space')
    expect(await dialog.getByRole('status').textContent()).toBe('')
    await dialog.getByLabel('Text', { exact: true }).fill('go')
    await dialog.getByLabel('Down').last().fill('90')
    const posted = page.waitForRequest(request => request.url().endsWith('/api/scene'))
    await button('Use this picture').focus()
    await page.keyboard.press('Enter')
    expect((await posted).postDataJSON()).toMatchObject({
      background: { colour: 'red' },
      objects: [{ kind: 'rocket', x: 0.42, size: 0.3 }, { kind: 'boat' }],
      signs: [{ text: 'GO', y: 0.9 }],
    })
    await slot('Your scene').waitFor()
    expect(await dialog.isVisible()).toBe(false)

    await button('Compose …').press('Enter')
    await button('Use as the second').press('Enter')
    await slot('Second: Your scene').waitFor()
    await button('Enlarge Second: Your scene').press('Enter')
    await page.getByRole('dialog', { name: 'Your scene' }).getByText('Sent as 256 × 256 pixels.').waitFor()
    await page.keyboard.press('Escape')
    expect(await page.getByRole('dialog').count()).toBe(0)
  })

  it('composes a scene by dragging, and says what the model has never seen', async () => {
    await button('Compose …').click()
    const from = (await button('Move fox').boundingBox())!
    const to = (await button('Move boat').boundingBox())!
    await page.mouse.move(from.x + from.width / 2, from.y + from.height / 2)
    await page.mouse.down()
    await page.mouse.move(to.x + to.width / 2, to.y + to.height / 2, { steps: 4 })
    await page.mouse.up()
    expect(await page.getByRole('dialog').getByRole('status').textContent()).toMatch('touch each other')
    expect(await page.getByLabel('Across').first().inputValue()).toBe('70')
    await button('Add an emoji').click()
    await page.getByRole('combobox', { name: 'Emoji 3' }).fill('dragon')
    await page.keyboard.press('Tab')
    expect(
      await page
        .getByRole('combobox', { name: 'Emoji 3' })
        .evaluate((input: HTMLInputElement) => input.validity.valid),
    ).toBe(false)
  })

  it('can be used from the keyboard alone', async () => {
    await say('A fox.')
    const focused = () =>
      page.evaluate(() => document.activeElement?.id || document.activeElement?.textContent)
    await page.keyboard.press('Tab')
    expect(await focused()).toBe('Skip to the question')
    await page.keyboard.press('Enter')
    expect(await focused()).toBe('question')
    await page.keyboard.type('What is it?')
    await page.keyboard.press('Enter')
    await answered()
    expect(await focused()).toBe('question')
    const reached = new Set<unknown>()
    for (let i = 0; i < 30; i++) {
      reached.add(await focused())
      await page.keyboard.press('Tab')
    }
    for (const id of ['surprise', 'second', 'compose', 'file', 'restart', 'draw', 'send'])
      expect(reached, id).toContain(id)
  })

  it('tells assistive technology what everything is', async () => {
    await say('A fox.')
    await ask('What is it?')
    await answered()
    expect(await page.locator('html').getAttribute('lang')).toBe('en')
    const tree = await page.locator('body').ariaSnapshot()
    for (const part of [
      'banner',
      'heading "Mini-Gemini in Node" [level=1]',
      'main',
      'region "Pictures"',
      'region "Conversation"',
      'log "Conversation"',
      'img "A random scene"',
      'textbox "Question, or what to draw"',
      'checkbox "Draw"',
      'contentinfo',
    ])
      expect(tree).toContain(part)
    await button('Compose …').click()
    // Nothing that one can act on is without a name.
    expect(await page.locator('body').ariaSnapshot()).not.toMatch(
      /- (button|textbox|checkbox|radio|combobox|spinbutton|img|link|dialog)( \[[^\]]*\])*:?$/m,
    )
    expect(await page.locator('[role=log]').getAttribute('aria-live')).toBe('polite')
  })

  it.each(['light', 'dark'] as const)('has enough contrast, %s', async colorScheme => {
    // Colours change at once.
    await page.emulateMedia({ colorScheme, reducedMotion: 'reduce' })
    await ask('What is </s>?')
    await page.locator('.answer .error').waitFor()
    complaints.length = 0
    expect(await page.evaluate(lowContrast)).toEqual([])
  })

  it.each([
    ['a wide window, whose log scrolls', 1100, 500],
    ['a phone, whose page scrolls', 360, 600],
  ])(
    'keeps the newest answer and the field in view, unless one scrolled back: %s',
    async (_, width, height) => {
      await open(width, height)
      await say('A fox, a boat, a cup, a moon, a house and a lion on a red background.')
      const inView = (locator: Locator) =>
        locator.evaluate(element => {
          const { top, bottom } = element.getBoundingClientRect()
          const log = element.closest('#log')?.getBoundingClientRect()
          const [first, last] = [
            Math.max(0, log?.top ?? 0),
            Math.min(window.innerHeight, log?.bottom ?? Infinity),
          ]
          // Half a pixel: positions are fractions.
          return bottom > first && top >= first - 0.5 && bottom <= last + 0.5
        })
      const lastLine = () => answer().locator('.timings')
      for (let turn = 1; turn <= 5; turn++) {
        await ask('What is in the picture?')
        await page
          .locator('.answer[aria-busy=false]')
          .nth(turn - 1)
          .waitFor()
      }
      await expect.poll(() => inView(lastLine())).toBe(true)
      expect(await inView(question())).toBe(true)

      linger(30)
      await ask('And now?')
      await page.locator('.answer[aria-busy=true] .words:not(:empty)').waitFor()
      await page.evaluate(() => {
        document.getElementById('log')!.scrollTop = 0
        window.scrollTo(0, 0)
      })
      await page.locator('.answer[aria-busy=false]').nth(5).waitFor()
      expect(await inView(lastLine())).toBe(false)
      expect(await page.evaluate(() => document.getElementById('log')!.scrollTop + window.scrollY)).toBe(0)
    },
  )

  it('fits a phone', async () => {
    await open(360, 700)
    await say('A fox and a boat on a red background.')
    await ask('What is in the picture?')
    await answered()
    const overflow = () => page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth)
    expect(await overflow()).toBeLessThanOrEqual(0)
    await button('Compose …').click()
    expect(
      await page.locator('#composer').evaluate(dialog => dialog.scrollWidth - dialog.clientWidth),
    ).toBeLessThanOrEqual(0)
    await button('Use this picture').click()
    await slot('Your scene').waitFor()
    expect(await overflow()).toBeLessThanOrEqual(0)
  })
})

/** Texts of the page whose contrast with what is behind them is below 4.5 (WCAG 2, AA). Runs in the page. */
function lowContrast(): string[] {
  const luminance = (css: string) => {
    const [r, g, b] = css
      .match(/[\d.]+/g)!
      .map(Number)
      .map(value => value / 255)
    const linear = (value: number) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    return 0.2126 * linear(r!) + 0.7152 * linear(g!) + 0.0722 * linear(b!)
  }
  const ground = (element: Element | null): string => {
    if (!element) return 'rgb(255, 255, 255)'
    const { backgroundColor } = getComputedStyle(element)
    return /, 0\)$/.test(backgroundColor) ? ground(element.parentElement) : backgroundColor
  }
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  const low: string[] = []
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement!
    if (walker.currentNode.textContent!.trim() === '' || element.getClientRects().length === 0) continue
    const [light, dark] = [getComputedStyle(element).color, ground(element)]
      .map(luminance)
      .sort((a, b) => b - a)
    const contrast = (light! + 0.05) / (dark! + 0.05)
    if (contrast < 4.5) low.push(`${contrast.toFixed(2)}: ${walker.currentNode.textContent}`)
  }
  return low
}
