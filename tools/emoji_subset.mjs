// Takes the emoji of the demo world out of two icon packages and writes lib/demo/kinds.ts and lib/demo/emoji.ts.
//
//   npm pack @iconify-json/noto @iconify-json/fluent-emoji-flat      (then unpack both)
//   npx tsx tools/emoji_subset.mjs <noto>/package <fluent>/package [--sheet sheet.png]
//
// --sheet draws every kind in both styles at 56 px on white, to look for twins and for icons nobody would name alike.
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import sharp from 'sharp'
import { COLOURS } from '../lib/demo/colours.ts'

// name, or name=icon where the icon is called otherwise; name|plural where the plural is not name + s.
const CHOSEN = `
  airplane alien ambulance anchor apple=red-apple avocado axe backpack balloon banana basketball bed
  bee=honeybee bell bicycle boat=sailboat bomb bone book=closed-book boot=womans-boot bucket bus|buses
  butterfly|butterflies cactus|cactuses cake=birthday-cake camera candle car=automobile carrot castle
  cat=cat-face chair chick=front-facing-baby-chick clock=alarm-clock cloud clover=four-leaf-clover cookie
  cow crab crown cup=hot-beverage cupcake diamond=gem-stone dinosaur=t-rex dog=dog-face donut=doughnut door
  dress|dresses drum duck fried_egg=cooking eggplant elephant envelope eye ferris_wheel=ferris-wheel
  fire_truck=fire-engine flame=fire flamingo fox|foxes frog gear ghost gift=wrapped-gift giraffe
  globe=globe-showing-americas guitar hamburger heart=red-heart helicopter hot_dog=hot-dog
  hourglass|hourglasses=hourglass-done house ice_cream=soft-ice-cream kangaroo key=old-key kite koala
  ladybug=lady-beetle laptop leaf|leaves=maple-leaf lemon light_bulb=light-bulb lightning_bolt=high-voltage
  lion lock=locked lollipop magnet microphone=studio-microphone monkey moon=crescent-moon mushroom
  octopus|octopuses owl palm_tree=palm-tree panda paperclip parrot pear pencil penguin phone=mobile-phone
  piano=musical-keyboard pig pine_tree=evergreen-tree pineapple pizza planet=ringed-planet pretzel
  puzzle_piece=puzzle-piece rabbit rainbow ring robot rocket rooster rose saw=carpentry-saw saxophone shark
  shirt=t-shirt shoe=running-shoe skateboard skull snail snake snowflake snowman|snowmen=snowman-without-snow
  soccer_ball=soccer-ball spider star strawberry|strawberries sun sunflower swan taco teapot
  teddy_bear=teddy-bear television tent=circus-tent top_hat=top-hat traffic_light=vertical-traffic-light
  train=locomotive tree=deciduous-tree trophy|trophies turtle ufo=flying-saucer umbrella unicorn volcano
  watermelon whale=spouting-whale wine_glass|wine_glasses=wine-glass
`

/** The least distance in RGB at which a pixel stands out from its background. */
const STANDS_OUT = 60
/** The side of the squares on which the visibility of an emoji is judged, in pixels. */
const PROBE = 48

const { values, positionals } = parseArgs({ allowPositionals: true, options: { sheet: { type: 'string' } } })
if (positionals.length !== 2)
  throw new Error('expected the folders of two unpacked packages: noto, fluent-emoji-flat')
const [noto, fluent] = positionals.map(folder => ({
  ...JSON.parse(readFileSync(join(folder, 'icons.json'), 'utf8')),
  version: JSON.parse(readFileSync(join(folder, 'package.json'), 'utf8')).version,
}))

const kinds = []
for (const word of CHOSEN.trim().split(/\s+/)) {
  const [, name, plural, id = name.replaceAll('_', '-')] = /^([^|=]+)(?:\|([^=]+))?(?:=(.+))?$/.exec(word)
  kinds.push({
    name: name.replaceAll('_', ' '),
    plural: plural?.replaceAll('_', ' ') ?? `${name.replaceAll('_', ' ')}s`,
    noto: extract(noto, id, `n-${name}`),
    fluent: extract(fluent, id, `f-${name}`),
  })
}
kinds.sort((a, b) => (a.name < b.name ? -1 : 1))

/** An icon with the ids of its gradients and clips made unique, so that many icons can stand in one document. */
function extract(set, id, prefix) {
  const icon = set.icons[id]
  if (!icon) throw new Error(`${set.prefix} has no icon ${id}`)
  const ids = [...new Set([...icon.body.matchAll(/ id="([^"]+)"/g)].map(([, found]) => found))]
  let body = icon.body
  for (const [i, found] of ids.entries())
    body = body
      .replaceAll(`"${found}"`, `"${prefix}-${i}"`)
      .replaceAll(`#${found})`, `#${prefix}-${i})`)
      .replaceAll(`"#${found}"`, `"#${prefix}-${i}"`)
  return { size: icon.width ?? set.width, body }
}

const svg = ({ size, body }, pixels) =>
  Buffer.from(
    `<svg xmlns="http://www.w3.org/2000/svg" width="${pixels}" height="${pixels}" viewBox="0 0 ${size} ${size}">${body}</svg>`,
  )

/** The colours on which less than half of the icon's pixels stand out. */
async function hiddenOn(icon) {
  const pixels = await sharp(svg(icon, PROBE)).raw().toBuffer()
  return Object.keys(COLOURS).filter(colour => {
    let solid = 0
    let seen = 0
    for (let i = 0; i < pixels.length; i += 4) {
      if (pixels[i + 3] < 128) continue
      solid += 1
      if (Math.hypot(...COLOURS[colour].map((value, channel) => value - pixels[i + channel])) > STANDS_OUT)
        seen += 1
    }
    return seen < solid / 2
  })
}

const licences = readFileSync(new URL('../lib/demo/EMOJI-LICENSES.md', import.meta.url), 'utf8')
  .trim()
  .split('\n')
  .map(line => `// ${line}`.trim())
  .join('\n')
const lines = []
for (const kind of kinds) {
  const hidden = JSON.stringify({ noto: await hiddenOn(kind.noto), fluent: await hiddenOn(kind.fluent) })
  lines.push(
    `  { name: ${JSON.stringify(kind.name)}, plural: ${JSON.stringify(kind.plural)}, hiddenOn: ${hidden} },`,
  )
}
writeFileSync(
  new URL('../lib/demo/kinds.ts', import.meta.url),
  `// Written by tools/emoji_subset.mjs.
import type { Colour } from './colours.ts'

/** A kind of emoji: its names, and for each style the backgrounds on which most of it would vanish. */
export interface Kind {
  readonly name: string
  readonly plural: string
  readonly hiddenOn: { readonly noto: readonly Colour[]; readonly fluent: readonly Colour[] }
}

/** ${kinds.length} kinds, in the order of their names. */
export const KINDS: readonly Kind[] = [
${lines.join('\n')}
]
`,
)
writeFileSync(
  new URL('../lib/demo/emoji.ts', import.meta.url),
  `// Written by tools/emoji_subset.mjs.
//
// From @iconify-json/noto ${noto.version} and @iconify-json/fluent-emoji-flat ${fluent.version}. EMOJI-LICENSES.md, which goes with every copy:
//
${licences}

/** The side of an icon's square, in the units of its body. */
export const EMOJI_SIZE = { noto: ${noto.width}, fluent: ${fluent.width} } as const

/** SVG of every kind of kinds.ts, in its two styles, without the \`svg\` element around it. */
export const EMOJI: Readonly<Record<string, { readonly noto: string; readonly fluent: string }>> = {
${kinds.map(kind => `  ${JSON.stringify(kind.name)}: {\n    noto: ${quote(kind.noto.body)},\n    fluent: ${quote(kind.fluent.body)},\n  },`).join('\n')}
}
`,
)

function quote(body) {
  if (/['\\\n]/.test(body)) throw new Error(`a body with quotes: ${body}`)
  return `'${body}'`
}

if (values.sheet) {
  const columns = 12
  const cell = 124
  const tiles = []
  for (const [i, kind] of kinds.entries()) {
    const left = (i % columns) * cell
    const top = Math.floor(i / columns) * 76
    const label = Buffer.from(
      `<svg width="${cell}" height="16"><text x="2" y="12" font-size="12" font-family="sans-serif">${kind.name}</text></svg>`,
    )
    tiles.push(
      { input: svg(kind.noto, 56), left, top },
      { input: svg(kind.fluent, 56), left: left + 60, top },
      { input: label, left, top: top + 58 },
    )
  }
  const height = Math.ceil(kinds.length / columns) * 76
  await sharp({ create: { width: columns * cell, height, channels: 3, background: 'white' } })
    .composite(tiles)
    .png()
    .toFile(values.sheet)
}
