// Takes pictures of the web page answering and drawing, for docs/images. Needs `npm run build` and a Chromium.
// usage: node scripts/screenshots.mjs <checkpoint> [--out <folder>] [--diffusion <folder>]
import { mkdir } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { chromium } from 'playwright-core'
import { MiniGemini } from '../dist/index.js'
import { serve } from '../dist/web/index.js'
import { findChromium } from './chromium.mjs'

const root = join(dirname(fileURLToPath(import.meta.url)), '..')
const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    out: { type: 'string', default: join(root, 'docs', 'images') },
    diffusion: { type: 'string' },
  },
})
const [checkpoint] = positionals
if (checkpoint === undefined) {
  console.error('usage: node scripts/screenshots.mjs <checkpoint> [--out <folder>] [--diffusion <folder>]')
  process.exit(2)
}

const views = [
  { name: 'desktop-light', width: 1120, height: 800, colorScheme: 'light' },
  { name: 'desktop-dark', width: 1120, height: 800, colorScheme: 'dark' },
  { name: 'phone-light', width: 360, height: 740, colorScheme: 'light' },
  { name: 'phone-dark', width: 360, height: 740, colorScheme: 'dark' },
]

await mkdir(values.out, { recursive: true })
const mgm = await MiniGemini.load(checkpoint, { diffusion: values.diffusion ?? join(checkpoint, 'sdxl') })
const server = await serve(mgm)
const browser = await chromium.launch({
  executablePath: findChromium(),
  args: ['--no-sandbox'],
})
try {
  for (const { name, width, height, colorScheme } of views) {
    const page = await browser.newPage({ viewport: { width, height }, colorScheme, deviceScaleFactor: 2 })
    const shoot = what =>
      page.screenshot({ path: join(values.out, `web-${what}-${name}.png`), fullPage: width < 500 })
    const idle = () =>
      page.getByRole('button', { name: 'Stop' }).waitFor({ state: 'hidden', timeout: 120_000 })
    const ask = async text => {
      await page.getByLabel('Question, or what to draw').fill(text)
      await page.keyboard.press('Enter')
      await page.locator('.answer').last().waitFor()
      await idle()
    }
    await page.goto(server.url)
    await page.locator('.slots img').waitFor()
    await ask('What is in the picture?')
    await ask('What color is the background?')
    await shoot('answer')
    await ask('Draw a fox next to a boat on green.')
    const direct = page.getByRole('button', { name: 'Draw my words as they are' })
    if (await direct.isVisible()) {
      await direct.click()
      await idle()
    }
    await shoot('drawing')
    await page.getByRole('button', { name: 'Compose …' }).click()
    await page.getByLabel('Text', { exact: true }).fill('42')
    await shoot('composer')
    await page.close()
  }
} finally {
  await browser.close()
  await server.close()
  await mgm.close()
}
console.log(`wrote ${values.out}`)
