import { expected } from '../errors.ts'
import { readImage } from '../processing/image.ts'
import type { ChatMessage } from '../request.ts'
import { HttpError } from './errors.ts'

/** Most pictures of a conversation. */
const MOST_PICTURES = 4

/**
 * Messages with the bytes of their pictures in place of the `data:` URLs. Of any other address nothing is read, and of a
 * picture no more than its header.
 *
 * @throws MgmError INVALID_ARGUMENT, IMAGE_INVALID; HttpError TOO_LARGE
 */
export async function takePictures(
  messages: readonly ChatMessage[],
  maxPixels: number,
): Promise<ChatMessage[]> {
  let pictures = 0
  return Promise.all(
    messages.map(async (message, m) => {
      if (typeof message.content === 'string') return message
      const parts = message.content.map(async (part, p) => {
        if (part.type === 'text') return part
        const name = `messages[${m}].content[${p}].image`
        if (++pictures > MOST_PICTURES)
          throw expected(`at most ${MOST_PICTURES} pictures`, 'messages', pictures)
        if (typeof part.image !== 'string' || !/^data:/i.test(part.image))
          throw expected('a data: URL', name, part.image)
        const { bytes, width, height } = await readImage(part.image, { sources: ['data'] })
        if (width * height > maxPixels)
          throw new HttpError(
            'TOO_LARGE',
            `expected at most ${maxPixels} pixels for ${name} but received ${width} x ${height}`,
          )
        return { type: 'image' as const, image: bytes }
      })
      return { ...message, content: await Promise.all(parts) }
    }),
  )
}
