/** The negative prompt that MGM draws with. Source: `common_neg_prompt` in mgm/serve/cli.py. */
export const NEGATIVE_PROMPT =
  'out of frame, lowres, text, error, cropped, worst quality, low quality, jpeg artifacts, ugly, duplicate, morbid, ' +
  'mutilated, out of frame, extra fingers, mutated hands, poorly drawn hands, poorly drawn face, mutation, deformed, ' +
  'blurry, dehydrated, bad anatomy, bad proportions, extra limbs, cloned face, disfigured, gross proportions, ' +
  'malformed limbs, missing arms, missing legs, extra arms, extra legs, fused fingers, too many fingers, long neck, ' +
  'username, watermark, signature'

/** Why an answer to ` <GEN>` holds no prompt: no `<h>…</h>` at all, `<h>` without an end, or nothing between them. */
export type MissingPrompt = 'missing' | 'unclosed' | 'empty'

export type ImagePrompt =
  | { readonly prompt: string }
  | { readonly prompt: null; readonly reason: MissingPrompt }

const OPEN = '<h>'
const CLOSE = '</h>'

/**
 * The prompt in a model's answer: what stands between the last `<h>` that has a `</h>` behind it and that `</h>`, so that of
 * nested marks the innermost count. Source: mgm/serve/cli.py, which this follows wherever the marks are in order.
 */
export function imagePromptOf(text: string): ImagePrompt {
  const close = text.lastIndexOf(CLOSE)
  const open = close < 0 ? -1 : text.lastIndexOf(OPEN, close)
  if (open < 0) return { prompt: null, reason: text.includes(OPEN) ? 'unclosed' : 'missing' }
  const start = open + OPEN.length
  const prompt = text.slice(start, text.indexOf(CLOSE, start)).trim()
  return prompt === '' ? { prompt: null, reason: 'empty' } : { prompt }
}
