import { describe, expect, it } from 'vitest'
import { follow } from '../../lib/engine/follow.ts'
import { reasonOf } from '../helpers/failure.ts'

const turn = () => new Promise(resolve => setTimeout(resolve, 1))

describe('follow', () => {
  it('yields events in order, the last one at the end', async () => {
    const seen: number[] = []
    const events = follow<number>(undefined, async emit => {
      emit(1)
      await turn()
      emit(2)
      emit(3)
      return 4
    })
    for await (const event of events) seen.push(event)
    expect(seen).toEqual([1, 2, 3, 4])
  })

  it('joins what a slow reader has not taken yet', async () => {
    const events = follow<string>(
      undefined,
      async emit => {
        for (const letter of 'abc') emit(letter)
        await turn()
        emit('D')
        return 'E'
      },
      (last, next) => (next === next.toLowerCase() ? last + next : undefined),
    )
    const seen: string[] = []
    for await (const event of events) {
      seen.push(event)
      await turn()
    }
    expect(seen).toEqual(['abc', 'D', 'E'])
  })

  it('yields what came before an error, then throws it', async () => {
    const seen: number[] = []
    const events = follow<number>(undefined, async emit => {
      emit(1)
      throw new RangeError('no more')
    })
    const reading = (async () => {
      for await (const event of events) seen.push(event)
    })()
    expect(await reasonOf(reading)).toBeInstanceOf(RangeError)
    expect(seen).toEqual([1])
  })

  it('aborts when the reader leaves, and waits for the end', async () => {
    let ended = false
    const events = follow<number>(undefined, async (emit, signal) => {
      emit(1)
      await new Promise(resolve => signal.addEventListener('abort', resolve))
      await turn()
      ended = true
      return 2
    })
    for await (const _ of events) break
    expect(ended).toBe(true)
  })

  it('passes an outer abort on, with its reason', async () => {
    const outer = new AbortController()
    const events = follow<number>(outer.signal, async (_, signal) => {
      setTimeout(() => outer.abort('enough'), 1)
      await new Promise(resolve => signal.addEventListener('abort', resolve))
      throw signal.reason
    })
    expect(await reasonOf(events.next())).toBe('enough')
  })
})
