// Bundles lib/web/page. `node scripts/build-page.mjs` writes it where the compiled server looks for it: dist/web/page.
import { mkdir, readFile, writeFile } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { build } from 'esbuild'

const root = join(dirname(fileURLToPath(import.meta.url)), '..')
const page = join(root, 'lib', 'web', 'page')

/** The files of the page by name. */
export async function pageFiles() {
  const { outputFiles } = await build({
    entryPoints: [join(page, 'main.ts')],
    bundle: true,
    minify: true,
    format: 'esm',
    target: 'es2022',
    write: false,
    logLevel: 'warning',
  })
  return {
    'index.html': await readFile(join(page, 'index.html')),
    'style.css': await readFile(join(page, 'style.css')),
    'main.js': outputFiles[0].contents,
    'licences.txt': await readFile(join(root, 'lib', 'demo', 'EMOJI-LICENSES.md')),
  }
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const folder = join(root, 'dist', 'web', 'page')
  await mkdir(folder, { recursive: true })
  for (const [name, contents] of Object.entries(await pageFiles()))
    await writeFile(join(folder, name), contents)
}
