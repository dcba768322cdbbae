import { describe, expect, it } from 'vitest'
import { BlockManager } from '../../lib/engine/block-manager.ts'
import { random } from '../helpers/random.ts'

describe('BlockManager', () => {
  it('hands out each page once and takes all or nothing', () => {
    const blocks = new BlockManager(5, 16)
    const a = blocks.allocate(3)!
    const b = blocks.allocate(2)!
    expect(new Set([...a, ...b]).size).toBe(5)
    expect(blocks.allocate(1)).toBeUndefined()
    blocks.release(a)
    expect(blocks.allocate(4)).toBeUndefined()
    expect(blocks.free).toBe(3)
  })

  it('frees a shared page with its last holder only', () => {
    const blocks = new BlockManager(2, 4)
    const pages = blocks.allocate(1)!
    blocks.retain(pages)
    blocks.release(pages)
    expect(blocks.free).toBe(1)
    blocks.release(pages)
    expect(blocks.free).toBe(2)
    expect(() => blocks.release(pages)).toThrow(/expected a page in use/)
    expect(() => blocks.retain([7])).toThrow(/expected a page in use/)
  })

  it('counts pages at their borders', () => {
    const blocks = new BlockManager(8, 16)
    expect([0, 1, 15, 16, 17, 32, 33].map(n => blocks.pagesFor(n))).toEqual([0, 1, 1, 1, 2, 2, 3])
    expect(blocks.capacity).toBe(128)
  })

  it('refuses impossible sizes', () => {
    expect(() => new BlockManager(0, 16)).toThrow(/expected a positive integer for pages but received 0/)
    expect(() => new BlockManager(4, 1.5)).toThrow(/for pageSize but received 1.5/)
  })

  it('agrees with plain sets over random use', () => {
    const rng = random(7)
    const blocks = new BlockManager(23, 4)
    const holders = new Map<number, number>()
    const held: number[][] = []
    for (let step = 0; step < 4000; step++) {
      const action = rng(3)
      if (action === 0) {
        const count = rng(6)
        const pages = blocks.allocate(count)
        if (holders.size + count > 23) expect(pages).toBeUndefined()
        else {
          for (const page of pages!) {
            expect(holders.has(page)).toBe(false)
            holders.set(page, 1)
          }
          held.push(pages!)
        }
      } else if (held.length > 0) {
        const at = rng(held.length)
        const pages = held[at]!
        if (action === 1) {
          blocks.retain(pages)
          for (const page of pages) holders.set(page, holders.get(page)! + 1)
          held.push(pages)
        } else {
          blocks.release(pages)
          held.splice(at, 1)
          for (const page of pages) {
            const left = holders.get(page)! - 1
            if (left === 0) holders.delete(page)
            else holders.set(page, left)
          }
        }
      }
      expect(blocks.used).toBe(holders.size)
    }
  })
})
