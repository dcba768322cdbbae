import { describe, expect, it } from 'vitest'
import {
  type ImageModel,
  ImageQueue,
  type ImageRequest,
  type ImageRun,
  type ImageStep,
} from '../../lib/engine/image-queue.ts'
import { MgmError } from '../../lib/errors.ts'
import { cast, toUint8 } from '../../lib/ops.ts'
import type { Tensor } from '../../lib/tensor.ts'
import { reasonOf } from '../helpers/failure.ts'
import { openDevice } from '../ops/helpers.ts'

const device = openDevice({ threads: 1 })

/** Latents are the seed; a step adds one; the picture's bytes are the latents. Notes what it is asked to do. */
class CountingModel implements ImageModel {
  readonly log: string[] = []
  readonly runs = new Set<ImageRun>()
  fail: ((what: string, seeds: readonly number[]) => void) | undefined

  denoise(
    plan: { height: number; width: number; schedule: { timesteps: readonly number[] } },
    items: readonly { seed: bigint }[],
  ) {
    const steps = plan.schedule.timesteps.length
    const note = (what: string, seeds: readonly number[]) => {
      this.log.push(`${what} ${seeds.join(',')}`)
      this.fail?.(what, seeds)
    }
    let seeds = items.map(item => Number(item.seed))
    note('begin', seeds)
    let done = 0
    const value = (seed: number) => (seed === Number.MAX_SAFE_INTEGER ? Number.NaN : seed + done)
    const make = () => device.tensor(Float32Array.from(seeds, value), [seeds.length, 1, 1, 1])
    let latents: Tensor = make()
    const replace = () => {
      latents.dispose()
      latents = make()
    }
    const run: ImageRun = {
      get length() {
        return seeds.length
      },
      get stepsDone() {
        return done
      },
      steps,
      get done() {
        return done === steps
      },
      get latents() {
        return latents
      },
      predicted: undefined,
      step: () => {
        note('step', seeds)
        done++
        replace()
      },
      keep: images => {
        seeds = images.map(i => seeds[i]!)
        note('keep', seeds)
        replace()
      },
      dispose: () => {
        latents.dispose()
        this.runs.delete(run)
      },
    }
    this.runs.add(run)
    return run
  }
  decode(latents: Tensor): Tensor {
    this.log.push('decode')
    return toUint8(latents, { scale: 1, offset: 0 })
  }
  preview(latents: Tensor): Tensor {
    return toUint8(cast(latents, 'f32'), { scale: 1, offset: 100 })
  }
}

interface Ask {
  seeds: number[]
  steps?: number
  key?: string
  signal?: AbortSignal
  onStep?: (step: ImageStep) => void
  previews?: boolean
  together?: number
}

function start(options: { maxImages?: number; maxQueue?: number } = {}) {
  const model = new CountingModel()
  let working = false
  const work = async () => {
    if (working) return
    working = true
    await Promise.resolve()
    while (queue.hasWork) await queue.step()
    working = false
  }
  const queue = new ImageQueue(device, model, {
    maxImages: options.maxImages ?? 4,
    maxQueue: options.maxQueue ?? 100,
    onWork: () => void work(),
  })
  const draw = ({ seeds, steps = 2, key = `${steps}`, signal, ...rest }: Ask) => {
    const schedule = { timesteps: Array(steps).fill(0) }
    return queue.draw({
      plan: { height: 8, width: 8, guided: false, schedule } as unknown as ImageRequest['plan'],
      key,
      items: seeds.map(seed => ({ prompt: '', negativePrompt: null, guidance: 1, seed: BigInt(seed) })),
      signal: signal ?? new AbortController().signal,
      ...rest,
    })
  }
  return { model, queue, draw }
}

const values = (images: readonly { data: Uint8Array }[]) => images.map(image => image.data[0])

describe('ImageQueue', () => {
  it('denoises equal requests together, others after them', async () => {
    const { model, queue, draw } = start()
    const results = await Promise.all([
      draw({ seeds: [1, 2] }),
      draw({ seeds: [5], steps: 3 }),
      draw({ seeds: [3] }),
    ])
    expect(results.map(values)).toEqual([[3, 4], [8], [5]])
    expect(model.log.filter(line => line !== 'decode')).toEqual([
      'begin 1,2,3',
      'step 1,2,3',
      'step 1,2,3',
      'begin 5',
      'step 5',
      'step 5',
      'step 5',
    ])
    expect(queue.metrics).toEqual({ running: 0, waiting: 0, steps: 5, imageSteps: 9, finished: 4, failed: 0 })
    expect(model.runs.size).toBe(0)
  })

  it('never puts more than maxImages together', async () => {
    const { model, draw } = start({ maxImages: 2 })
    expect(values(await draw({ seeds: [1, 2, 3, 4, 5], steps: 1 }))).toEqual([2, 3, 4, 5, 6])
    const begins = () => model.log.splice(0).filter(line => line.startsWith('begin'))
    expect(begins()).toEqual(['begin 1,2', 'begin 3,4', 'begin 5'])
    await draw({ seeds: [6, 7], together: 1 })
    expect(begins()).toEqual(['begin 6', 'begin 7'])
  })

  it('reports each step, with previews where asked for', async () => {
    const { draw } = start()
    const steps: ImageStep[] = []
    await Promise.all([
      draw({ seeds: [1, 2], onStep: step => steps.push(step), previews: true }),
      draw({ seeds: [3] }),
    ])
    expect(steps.map(({ image, step, steps }) => [image, step, steps])).toEqual([
      [0, 1, 2],
      [1, 1, 2],
      [0, 2, 2],
      [1, 2, 2],
    ])
    expect(steps.map(({ preview }) => preview && [preview.width, preview.height, preview.data[0]])).toEqual([
      [1, 1, 102],
      [1, 1, 103],
      [1, 1, 103],
      [1, 1, 104],
    ])
  })

  it('drops an aborted image before the next step; the others go on', async () => {
    const { model, queue, draw } = start()
    const stop = new AbortController()
    const aborted = reasonOf(
      draw({
        seeds: [1],
        steps: 4,
        signal: stop.signal,
        onStep: ({ step }) => step === 2 && stop.abort(new MgmError('ABORTED', 'stopped')),
      }),
    )
    const other = draw({ seeds: [7], steps: 4 })
    expect(await aborted).toMatchObject({ code: 'ABORTED' })
    expect(values(await other)).toEqual([11])
    expect(model.log.filter(line => line !== 'decode')).toEqual([
      'begin 1,7',
      'step 1,7',
      'step 1,7',
      'keep 7',
      'step 7',
      'step 7',
    ])
    expect(queue.metrics).toMatchObject({ finished: 1, failed: 1, running: 0, waiting: 0 })
  })

  it('stops at once when nobody is left, and when a request is aborted before its turn', async () => {
    const { model, queue, draw } = start({ maxImages: 1 })
    const stop = new AbortController()
    const reason = new MgmError('ABORTED', 'stopped')
    const results = [
      reasonOf(
        draw({
          seeds: [1],
          steps: 100,
          signal: stop.signal,
          onStep: ({ step }) => step === 1 && stop.abort(reason),
        }),
      ),
      reasonOf(draw({ seeds: [2], steps: 100, signal: stop.signal })),
      draw({ seeds: [3] }),
    ]
    expect(await results[0]).toBe(reason)
    expect(await results[1]).toBe(reason)
    expect(await results[2]).toHaveLength(1)
    expect(model.log.filter(line => line.startsWith('begin'))).toEqual(['begin 1', 'begin 3'])
    expect(model.log.filter(line => line === 'step 1')).toHaveLength(1)
    expect(queue.hasWork).toBe(false)
    expect(await reasonOf(draw({ seeds: [4], signal: stop.signal }))).toBe(reason)
  })

  it('after a failure in company, each image stands or falls by itself', async () => {
    const { model, queue, draw } = start()
    model.fail = (what, seeds) => {
      if (what === 'step' && seeds.includes(13)) throw new MgmError('OUT_OF_MEMORY', 'thirteen')
    }
    const [a, b, c] = [draw({ seeds: [1] }), reasonOf(draw({ seeds: [13] })), draw({ seeds: [3] })]
    expect(values(await a)).toEqual([3])
    expect(await b).toMatchObject({ code: 'OUT_OF_MEMORY' })
    expect(values(await c)).toEqual([5])
    expect(queue.metrics).toMatchObject({ finished: 2, failed: 1 })
    expect(model.runs.size).toBe(0)
  })

  it('says so where numbers have been lost, and draws the others', async () => {
    const { draw } = start()
    const lost = reasonOf(draw({ seeds: [Number.MAX_SAFE_INTEGER] }))
    const good = draw({ seeds: [3] })
    expect(await lost).toMatchObject({ code: 'NUMERIC' })
    expect(values(await good)).toEqual([5])
  })

  it('a watcher that throws ends its own request only', async () => {
    const { draw } = start()
    const oops = new Error('oops')
    const bad = reasonOf(
      draw({
        seeds: [1, 2],
        onStep: () => {
          throw oops
        },
      }),
    )
    const good = draw({ seeds: [3] })
    expect(await bad).toBe(oops)
    expect(values(await good)).toEqual([5])
  })

  it('refuses what the queue has no room for', async () => {
    const { draw } = start({ maxImages: 2, maxQueue: 1 })
    const first = draw({ seeds: [1, 2] })
    const second = draw({ seeds: [3] })
    expect(await reasonOf(draw({ seeds: [4] }))).toMatchObject({ code: 'QUEUE_FULL' })
    expect(values(await first)).toEqual([3, 4])
    expect(values(await second)).toEqual([5])
    expect(values(await draw({ seeds: [4] }))).toEqual([6])
  })
})
