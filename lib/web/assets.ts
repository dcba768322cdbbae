import { readFile } from 'node:fs/promises'
import { fileURLToPath } from 'node:url'

/** Files of the page and their kinds. */
const TYPES = {
  'index.html': 'text/html; charset=utf-8',
  'style.css': 'text/css; charset=utf-8',
  'main.js': 'text/javascript; charset=utf-8',
  'licences.txt': 'text/plain; charset=utf-8',
} as const
export type AssetName = keyof typeof TYPES

export interface Asset {
  readonly type: string
  readonly body: Uint8Array<ArrayBuffer>
}

/** The files of the page by name, from the folder `page` beside this module; made on the spot where sources are run. */
export async function loadAssets(): Promise<Record<AssetName, Asset>> {
  const files = await pageFiles()
  const entries = Object.entries(TYPES).map(([name, type]) => [
    name,
    { type, body: new Uint8Array(files[name as AssetName]) },
  ])
  return Object.fromEntries(entries)
}

async function pageFiles(): Promise<Record<AssetName, Uint8Array>> {
  if (import.meta.url.endsWith('.ts')) {
    const { pageFiles } = await import(new URL('../../scripts/build-page.mjs', import.meta.url).href)
    return pageFiles()
  }
  const folder = new URL('./page/', import.meta.url)
  const read = async (name: string) => [name, await readFile(fileURLToPath(new URL(name, folder)))]
  return Object.fromEntries(await Promise.all(Object.keys(TYPES).map(read)))
}
