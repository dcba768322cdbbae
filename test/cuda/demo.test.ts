import { describe, expect, it } from 'vitest'
import { renderPng } from '../../lib/demo/render.ts'
import { generateLesson } from '../../lib/demo/tasks.ts'
import { sceneSeed } from '../../lib/demo/world.ts'
import { MiniGemini } from '../../lib/index.ts'
import { cudaTests, HALVES } from './helpers.ts'

// A level is 1/255. Three steps with guidance 4, which amplifies rounding, measured in root mean square from f32 on the CPU:
// 4.7 levels in bf16, 0.7 in f16; drawings of other seeds and prompts differ by 45 to 98.
const LEVELS = { bf16: 10, f16: 2 }

cudaTests('the demo model on a GPU', () => {
  describe.each(HALVES)('in %s', dtype => {
    it('describes a picture and draws one as on the CPU', { timeout: 300_000 }, async () => {
      const lesson = generateLesson(sceneSeed('test', 0))
      const image = await renderPng(lesson.scenes[0], 256)
      const run = async (device: 'cpu' | 'cuda') => {
        const mgm = await MiniGemini.load(undefined, {
          device,
          maxSequences: 1,
          kvMemory: 2 ** 22,
          ...(device === 'cuda' && { dtype }),
        })
        try {
          const { text } = await mgm.chat({
            messages: [
              {
                role: 'user',
                content: [
                  { type: 'image', image },
                  { type: 'text', text: 'What is in the picture?' },
                ],
              },
            ],
            maxTokens: 48,
          })
          const { images } = await mgm.imagine({
            prompt: 'a fox on a blue background',
            steps: 3,
            guidance: 4,
            seed: 3,
            format: 'raw',
          })
          return { text, pixels: images[0]!.data }
        } finally {
          await mgm.close()
        }
      }
      const [cpu, cuda] = [await run('cpu'), await run('cuda')]
      expect(cuda.text).toBe(cpu.text)
      expect(cuda.pixels.length).toBe(96 * 96 * 3)
      const squares = cpu.pixels.reduce((sum, value, i) => sum + (value - cuda.pixels[i]!) ** 2, 0)
      expect(Math.sqrt(squares / cpu.pixels.length)).toBeLessThan(LEVELS[dtype])
    })
  })
})
