import { readFileSync } from 'node:fs'
import { expect, it } from 'vitest'

/** The modules that a module imports, and those import, apart from types. */
function modulesOf(start: URL): { files: Set<string>; packages: Set<string> } {
  const files = new Set<string>()
  const packages = new Set<string>()
  const visit = (url: URL) => {
    if (files.has(url.href)) return
    files.add(url.href)
    for (const [, name] of readFileSync(url, 'utf8').matchAll(
      /^(?:import|export)\b(?! type)[^'"]*?from '([^']+)'/gm,
    ))
      if (name!.startsWith('.')) visit(new URL(name!, url))
      else packages.add(name!)
  }
  visit(start)
  return { files, packages }
}

it.each(['world', 'tasks', 'svg'])('%s runs in a browser: it needs no package and nothing of Node', name => {
  const { files, packages } = modulesOf(new URL(`../../lib/demo/${name}.ts`, import.meta.url))
  expect(files.size).toBeGreaterThan(4)
  expect([...packages]).toEqual([])
})

it('drawing pixels does need one', () => {
  expect([...modulesOf(new URL('../../lib/demo/render.ts', import.meta.url)).packages]).toEqual(['sharp'])
})
