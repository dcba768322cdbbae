import { describe, expect, it } from 'vitest'
import { AnswerText, StopStrings } from '../../lib/engine/text.ts'
import type { IncrementalDecoder } from '../../lib/processing/tokenizer.ts'
import { random } from '../helpers/random.ts'

/** Ids are indices into pieces; the last piece comes with the flush. */
function decoder(pieces: readonly string[], last = ''): IncrementalDecoder {
  return { push: id => pieces[id]!, flush: () => last }
}

function run(pieces: readonly string[], stops: readonly string[], last = '') {
  const answer = new AnswerText(decoder(pieces, last), stops)
  const deltas: string[] = []
  for (let i = 0; i < pieces.length && !answer.isStopped; i++) deltas.push(answer.push(i))
  deltas.push(answer.finish())
  expect(deltas.join('')).toBe(answer.text)
  return { text: answer.text, stopped: answer.isStopped, deltas }
}

describe('AnswerText', () => {
  it('ends before the stop string and holds back what may become one', () => {
    expect(run(['Hello E', 'N', 'D of'], ['END'])).toEqual({
      text: 'Hello',
      stopped: true,
      deltas: ['Hello', '', '', ''],
    })
    expect(run(['Hello E', 'N', 'Z of'], ['END']).deltas).toEqual(['Hello', '', ' ENZ of', ''])
  })

  it('gives what was held back when nothing more comes', () => {
    expect(run(['a', ' <e'], ['<end>']).text).toBe('a <e')
    expect(run(['a', ' <en'], ['<end>'], 'd> b')).toMatchObject({ text: 'a', stopped: true })
  })

  it('takes the stop that ends first, of those the longest', () => {
    expect(run(['xabcd'], ['abcd', 'bc']).text).toBe('xa')
    expect(run(['xabcd'], ['bc', 'abc']).text).toBe('x')
    expect(run(['aaab'], ['aab']).text).toBe('a')
  })

  it('strips as Python does, and only at the ends', () => {
    expect(run([' \t', '\x1c a', ' \n', ' b \u2003', '\x85\xa0'], []).text).toBe('a \n b')
    expect(run(['\uFEFFa\u200b'], []).text).toBe('\uFEFFa\u200b')
    expect(run([' ', '\n'], []).text).toBe('')
  })

  it('is empty for no ids', () => {
    expect(run([], ['x']).text).toBe('')
  })

  it('does not depend on how the text is cut, and agrees with a plain search', () => {
    const rng = random(3)
    for (let round = 0; round < 3000; round++) {
      const text = Array.from({ length: rng(14) }, () => 'ab '[rng(3)]).join('')
      const stops = Array.from({ length: rng(4) }, () =>
        Array.from({ length: 1 + rng(4) }, () => 'ab '[rng(3)]).join(''),
      )
      const pieces: string[] = []
      for (let at = 0; at < text.length; ) {
        const length = 1 + rng(4)
        pieces.push(text.slice(at, at + length))
        at += length
      }
      // Letter by letter: the first prefix that ends in a stop string.
      let expected = text
      for (let end = 1; end <= text.length; end++) {
        const hits = stops.filter(stop => text.slice(0, end).endsWith(stop))
        if (hits.length === 0) continue
        expected = text.slice(0, end - Math.max(...hits.map(stop => stop.length)))
        break
      }
      const strip = (value: string) => value.replace(/^ +/, '').replace(/ +$/, '')
      expect(run(pieces, stops).text).toBe(strip(expected))
    }
  })
})

describe('StopStrings', () => {
  it('lets text go as soon as it cannot be part of a stop string', () => {
    const stops = new StopStrings(['ababac'])
    expect(['ab', 'ab', 'ab', 'x'].map(piece => stops.push(piece))).toEqual(['', '', 'ab', 'ababx'])
  })
})
