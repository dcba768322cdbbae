import * as z from 'zod'
import { integer, message, number, object, parse, string } from '../request.ts'

// A stranger may ask for less than the library can do. Defaults: as the demo checkpoint was trained to be used.
const drawShape = {
  steps: integer(1, 50).default(16),
  guidance: number(0, 20).default(4),
  seed: integer(0).optional(),
}
const chatBody = object({
  messages: z
    .array(message, { error: 'a non-empty array of messages' })
    .min(1, { error: 'a non-empty array of messages' })
    .max(200, { error: 'at most 200 messages' }),
  maxTokens: integer(1, 512).default(128),
  temperature: number(0, 2).optional(),
  seed: integer(0).optional(),
  draw: object(drawShape).optional(),
})
const drawBody = object({ prompt: string(), ...drawShape })

/** Checks the body of `POST /api/chat` and fills in what it leaves open. Throws INVALID_ARGUMENT. */
export function parseChatBody(value: unknown): z.infer<typeof chatBody> {
  return parse(chatBody, value, 'request')
}

/** Checks the body of `POST /api/draw`. Throws INVALID_ARGUMENT. */
export function parseDrawBody(value: unknown): z.infer<typeof drawBody> {
  return parse(drawBody, value, 'request')
}
