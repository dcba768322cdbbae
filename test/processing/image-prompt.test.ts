import { readFileSync } from 'node:fs'
import { describe, expect, it } from 'vitest'
import { imagePromptOf, NEGATIVE_PROMPT } from '../../lib/processing/image-prompt.ts'

describe('imagePromptOf', () => {
  it.each([
    ['Here it is: <h>A red fox.</h>', 'A red fox.'],
    ['<h>  spaces \n around </h> and after', 'spaces \n around'],
    ['<h>first</h> or rather <h>second</h>', 'second'],
    ['<h>whole</h> <h>cut off', 'whole'],
    ['<h>outer <h>inner</h> rest</h>', 'inner'],
    ['<h>one</h> stray </h>', 'one'],
    ['</h> reversed <h>then right</h>', 'then right'],
    ['<h>a < b > c</h>', 'a < b > c'],
  ])('finds the prompt in %j', (text, prompt) => {
    expect(imagePromptOf(text)).toEqual({ prompt })
  })

  it.each([
    ['', 'missing'],
    ['I would rather talk.', 'missing'],
    ['</h> only an end', 'missing'],
    ['<H>marks are lower case</H>', 'missing'],
    ['<h>never ended', 'unclosed'],
    ['</h>the wrong way round<h>', 'unclosed'],
    ['<h></h>', 'empty'],
    ['<h> \n\t</h>', 'empty'],
  ])('says why there is none in %j', (text, reason) => {
    expect(imagePromptOf(text)).toEqual({ prompt: null, reason })
  })

  it('takes time proportional to the text', () => {
    const text = '<h>'.repeat(200_000) + '</h>'.repeat(200_000)
    expect(imagePromptOf(text)).toEqual({ prompt: null, reason: 'empty' })
  })
})

it('the negative prompt is that of the reference', () => {
  const report = new URL('../fixtures/sdxl-tiny/report.json', import.meta.url)
  const { negative_prompt } = JSON.parse(readFileSync(report, 'utf8')) as { negative_prompt: string }
  expect(NEGATIVE_PROMPT).toBe(negative_prompt)
})
