import { readFileSync } from 'node:fs'
import { describe, expect, it } from 'vitest'
import { native } from '../../lib/native.ts'
import { OPS } from '../../lib/ops.ts'

describe('the op table', () => {
  it('is the same in lib/ops.ts and in the addon, in order', () => {
    const table = native().opTable()
    expect(table.map(op => op.name)).toEqual(Object.keys(OPS))
    for (const op of table)
      expect(op.params.map(p => `${p.name}:${p.type}`).join(' '), op.name).toBe(
        OPS[op.name as keyof typeof OPS],
      )
  })

  it('names every op of native/ops.h, in order', () => {
    const header = readFileSync(new URL('../../native/ops.h', import.meta.url), 'utf8')
    const contract = [...header.matchAll(/^ {2}X\((\w+), \w+\)/gm)].map(m =>
      m[1]!.replace(/_(\w)/g, (_, c: string) => c.toUpperCase()),
    )
    expect(contract.length).toBeGreaterThan(10)
    expect(
      native()
        .opTable()
        .map(op => op.name),
    ).toEqual(contract)
  })
})
