import { describe, expect, it } from 'vitest'
import { type Activation, conv2d } from '../../../lib/ops.ts'
import { Random } from '../../ops/helpers.ts'
import { cudaTests, floats, HALVES, type Inputs } from '../helpers.ts'

interface Case {
  batch: number
  height: number
  width: number
  channels: number
  outputs: number
  kernel: [number, number]
  stride: number
  pad: number | [number, number]
  resize?: [number, number]
}

const base = { batch: 1, height: 9, width: 11, channels: 5, outputs: 7, stride: 1, pad: 0 }
/** How a patch comes to the tile: in pieces of 16 bytes, pairs of elements, or one by one. */
const cases: Record<'pieces' | 'pairs' | 'elements', Record<string, Case>> = {
  pieces: {
    'downsampling by 2': { ...base, batch: 2, channels: 72, outputs: 40, kernel: [2, 2], stride: 2 },
    '3x3 with padding': { ...base, channels: 40, outputs: 65, kernel: [3, 3], pad: 1 },
    '3x3 with stride 2': { ...base, batch: 3, channels: 32, kernel: [3, 3], stride: 2, pad: 1 },
    '1x1': { ...base, channels: 64, outputs: 136, kernel: [1, 1] },
    'runs of several pixels': { ...base, width: 16, channels: 4, kernel: [2, 8], stride: 4 },
    'only padding under most taps': { ...base, height: 1, width: 1, channels: 40, kernel: [3, 3], pad: 3 },
    'several pixels in a slice': { ...base, batch: 2, channels: 8, kernel: [3, 3], stride: 2, pad: 1 },
    'zeros on one side': { ...base, channels: 16, outputs: 20, kernel: [3, 3], stride: 2, pad: [0, 1] },
    'zeros on the other side': { ...base, channels: 96, kernel: [2, 2], pad: [2, 0] },
    'many channels': { ...base, height: 6, width: 5, channels: 320, outputs: 4, kernel: [3, 3], pad: 1 },
    'nearest 2x': {
      ...base,
      batch: 2,
      height: 4,
      width: 5,
      channels: 48,
      outputs: 64,
      kernel: [3, 3],
      pad: 1,
      resize: [8, 10],
    },
    'nearest 3 → 5 and 4 → 7': {
      ...base,
      batch: 3,
      height: 3,
      width: 4,
      channels: 32,
      outputs: 3,
      kernel: [3, 3],
      pad: 1,
      resize: [5, 7],
    },
    'nearest, smaller, without padding': { ...base, channels: 24, kernel: [2, 2], stride: 2, resize: [7, 6] },
    'nearest in one direction': { ...base, channels: 64, kernel: [1, 1], resize: [9, 23] },
  },
  pairs: {
    'CLIP patches': {
      ...base,
      height: 42,
      width: 42,
      channels: 3,
      outputs: 72,
      kernel: [14, 14],
      stride: 14,
    },
    'ConvNeXt stem': {
      ...base,
      batch: 2,
      height: 16,
      width: 36,
      channels: 3,
      outputs: 48,
      kernel: [4, 4],
      stride: 4,
    },
    'padded pairs': { ...base, channels: 6, kernel: [3, 3], pad: 1 },
    latents: { ...base, batch: 2, channels: 4, outputs: 20, kernel: [3, 3], pad: 1 },
  },
  elements: {
    'CLIP patches of an odd picture': {
      ...base,
      height: 29,
      width: 31,
      channels: 3,
      kernel: [14, 14],
      stride: 14,
    },
    'an uneven kernel': { ...base, kernel: [5, 2], stride: 3, pad: 2 },
    'a kernel wider than the image': { ...base, height: 2, width: 1, kernel: [4, 5], pad: 2 },
    'one channel': { ...base, channels: 1, kernel: [3, 3], pad: 1 },
    '1x1': { ...base, channels: 33, kernel: [1, 1] },
    'nearest 4 → 7 and 3 → 5': {
      ...base,
      batch: 2,
      height: 4,
      width: 3,
      channels: 4,
      kernel: [3, 3],
      pad: [0, 1],
      resize: [7, 5],
    },
    'nearest 3 → 5 and 5 → 13': {
      ...base,
      batch: 2,
      height: 3,
      width: 5,
      channels: 3,
      kernel: [3, 2],
      stride: 2,
      pad: [1, 0],
      resize: [5, 13],
    },
  },
}

function draw(c: Case, random: Random) {
  const k = c.kernel[0] * c.kernel[1] * c.channels
  return {
    k,
    x: random.normals(c.batch * c.height * c.width * c.channels),
    w: random.normals(c.outputs * k, 1 / Math.sqrt(k)),
  }
}

function run(t: Inputs, c: Case, data: { k: number; x: Float32Array; w: Float32Array }, options = {}) {
  const x = t.a(data.x, [c.batch, c.height, c.width, c.channels])
  return conv2d(x, t.packed(data.w, [c.outputs, data.k]), { ...c, ...options })
}

/** f32 sums of k products about 1/√k in another order. */
const limitOf = (k: number) => ({ absolute: 2e-6 * Math.sqrt(k), relative: 1e-5 })

function withTile<R>(tile: string, body: () => R): R {
  process.env.MGM_CUDA_TILE = tile
  try {
    return body()
  } finally {
    delete process.env.MGM_CUDA_TILE
  }
}

cudaTests('conv2d on the GPU', cuda => {
  for (const [way, some] of Object.entries(cases))
    for (const [name, c] of Object.entries(some))
      it(`agrees with the CPU: ${name}, in ${way}`, async () => {
        const random = new Random()
        const data = draw(c, random)
        for (const dtype of HALVES)
          for (const tile of way === 'pieces' ? ['large', 'small', 'thin'] : ['small'])
            await cuda.same({ dtype, limit: limitOf(data.k), what: `${tile}, seed ${random.seed}` }, t =>
              withTile(tile, () => run(t, c, data)),
            )
      })

  it.each(HALVES)(
    'fuses bias, activation, scale and a residual that repeats over the batch, %s',
    async dtype => {
      const random = new Random()
      const c: Case = { ...base, batch: 3, channels: 8, outputs: 24, kernel: [3, 3], pad: 1 }
      const data = draw(c, random)
      const [bias, scale] = [random.normals(c.outputs), random.normals(c.outputs)]
      const residual = random.normals(99 * c.outputs) // one image's positions: CLIP's position embedding
      for (const activation of ['none', 'gelu', 'gelu_tanh', 'quick_gelu', 'silu'] satisfies Activation[])
        await cuda.same(
          { dtype, limit: { absolute: 1e-4, relative: 1e-5 }, what: `${activation}, seed ${random.seed}` },
          t =>
            run(t, c, data, {
              bias: t.plain(bias, [c.outputs]),
              scale: t.plain(scale, [c.outputs]),
              residual: t.a(residual, [99, c.outputs]),
              activation,
            }),
        )
    },
  )

  it('adds to each image its own row of a bias', async () => {
    const random = new Random()
    for (const outputs of [40, 20, 4])
      for (const shared of [{}, { activation: 'silu' }] satisfies { activation?: Activation }[]) {
        // 15 positions: a tile holds several images, and an image lies in two tiles.
        const c: Case = {
          ...base,
          batch: 6,
          height: 3,
          width: 5,
          channels: 8,
          outputs,
          kernel: [3, 3],
          pad: 1,
        }
        const data = draw(c, random)
        const [bias, residual] = [random.normals(6 * 72), random.normals(90 * outputs)]
        for (const [from, dtype] of [
          [0, 'bf16'],
          [24, 'f16'],
          [3, 'f16'],
        ] as const)
          for (const tile of ['large', 'small', 'thin'])
            await cuda.same(
              {
                dtype,
                limit: { absolute: 1e-4, relative: 1e-5 },
                what: `${outputs} outputs, bias from ${from}, ${tile}, seed ${random.seed}`,
              },
              t =>
                withTile(tile, () =>
                  run(t, c, data, {
                    bias: t.plain(bias, [6, 72]).narrow(1, from, outputs),
                    residual: t.a(residual, [90, outputs]),
                    ...shared,
                  }),
                ),
            )
      }
  })

  it.each([
    [2 ** 20, 999_983],
    [999_983, 2 ** 20],
    [2 ** 20 - 1, 2 ** 20],
    [7, 2 ** 20],
  ])('finds the nearest of %i pixels for %i', async (width, resized) => {
    const random = new Random()
    const x = Float32Array.from({ length: width * 2 }, () => random.integer(-8, 8))
    const w = Float32Array.of(1, 16)
    await cuda.same({ dtype: 'f16', limit: 'exact', what: `seed ${random.seed}` }, t =>
      conv2d(t.a(x, [1, 1, width, 2]), t.packed(w, [1, 2]), {
        kernel: [1, 1],
        stride: 997,
        resize: [1, resized],
      }),
    )
  })

  // From 64×64 results on, an exact doubling goes over weights that are summed first, and rounded once more.
  describe('an image twice as large', () => {
    const doubled: Case = {
      batch: 2,
      height: 33,
      width: 32,
      channels: 32,
      outputs: 40,
      kernel: [3, 3],
      stride: 1,
      pad: 1,
      resize: [66, 64],
    }

    it.each(HALVES)('is convolved as on the CPU where sums of weights are exact, %s', async dtype => {
      const random = new Random()
      const { x, k } = draw(doubled, random)
      // Sums of four stay below 2^6 of the smallest.
      const w = Float32Array.from({ length: doubled.outputs * k }, () => random.integer(-15, 15) / 256)
      const [bias, residual] = [random.normals(2 * 40), random.normals(66 * 64 * 40)]
      for (const tile of ['large', 'small', 'thin'])
        await cuda.same({ dtype, limit: limitOf(k), what: `${tile}, seed ${random.seed}` }, t =>
          withTile(tile, () =>
            run(
              t,
              doubled,
              { x, w, k },
              {
                bias: t.plain(bias, [2, 40]),
                residual: t.a(residual, [66 * 64, 40]),
                activation: 'silu',
              },
            ),
          ),
        )
    })

    it.each([
      ['bf16', 2 ** -8],
      ['f16', 2 ** -11],
    ] as const)('is convolved within the rounding of those sums, %s', async (dtype, roundoff) => {
      const random = new Random()
      const c: Case = { ...doubled, outputs: 4 }
      const data = draw(c, random)
      // |Σ x (w + w′ − fl(w + w′))| ≤ roundoff Σ |x| (|w| + |w′|)
      const sizes = { k: data.k, x: data.x.map(Math.abs), w: data.w.map(Math.abs) }
      const largest = Math.max(...(await floats(run(cuda.inputs(cuda.cpu, dtype), c, sizes))))
      const { absolute, relative } = limitOf(data.k)
      const limit = { absolute: absolute + roundoff * largest, relative }
      await cuda.same({ dtype, limit, what: `seed ${random.seed}` }, t => run(t, c, data))
    })

    it('has the same bits in every batch and tile, however it is copied', async () => {
      const random = new Random()
      const c: Case = { ...doubled, outputs: 8 }
      const data = draw(c, random)
      const t = cuda.inputs(cuda.gpu, 'bf16')
      const x = t.a(data.x, [2, 33, 32, 32])
      const w = t.packed(data.w, [c.outputs, data.k])
      const all = await floats(withTile('large', () => conv2d(x, w, c)))
      for (const [b, tile] of [
        [0, 'small'],
        [1, 'thin'],
      ] as const) {
        const one = await floats(withTile(tile, () => conv2d(x.narrow(0, b, 1), w, c)))
        expect(one, `seed ${random.seed}`).toEqual(all.slice(b * one.length, (b + 1) * one.length))
      }
      for (const offset of [2, 1]) {
        const moved = t.a([...new Float32Array(offset), ...data.x], [data.x.length + offset])
        const one = moved.narrow(0, offset, data.x.length / 2).reshape(1, 33, 32, 32)
        const bits = await floats(conv2d(one, w, c))
        expect(bits, `seed ${random.seed}`).toEqual(all.slice(0, bits.length))
      }
    })
  })

  it('refuses to resize what its indices cannot reach', () => {
    const t = cuda.inputs(cuda.gpu, 'f16')
    const x = cuda.gpu.zeros([1, 1, 2 ** 20 + 1, 1], 'f16')
    const w = t.packed([1], [1, 1])
    expect(() => conv2d(x, w, { kernel: [1, 1], resize: [1, 1] })).toThrow(
      /\[conv2d\] expected at most 1048576 .* but received f16 \[1, 1, 1048577, 1\]/,
    )
  })

  it('gives an image the same bits in every batch and tile, however its patches are copied', async () => {
    const random = new Random()
    const c: Case = {
      ...base,
      batch: 4,
      height: 12,
      width: 12,
      channels: 32,
      outputs: 40,
      kernel: [3, 3],
      pad: 1,
    }
    const data = draw(c, random)
    const t = cuda.inputs(cuda.gpu, 'bf16')
    const w = t.packed(data.w, [c.outputs, data.k])
    const shape = [c.batch, c.height, c.width, c.channels]
    const size = data.x.length
    const all = await floats(withTile('large', () => conv2d(t.a(data.x, shape), w, c)))
    const what = `seed ${random.seed}`
    for (let b = 0; b < c.batch; b++) {
      const one = t.a(data.x, shape).narrow(0, b, 1)
      const out = await floats(withTile(b % 2 ? 'small' : 'thin', () => conv2d(one, w, c)))
      expect(out, what).toEqual(all.slice(b * out.length, (b + 1) * out.length))
    }
    // At an address of 4 bytes, then of 2: pairs and single elements.
    for (const offset of [2, 1]) {
      const moved = t.a([...new Float32Array(offset), ...data.x], [size + offset]).narrow(0, offset, size)
      expect(await floats(conv2d(moved.reshape(...shape), w, c)), what).toEqual(all)
    }
  })

  it('keeps what is not a number to the patches that see it', async () => {
    const random = new Random()
    const c: Case = { ...base, channels: 32, outputs: 16, kernel: [3, 3], pad: 1 }
    const data = draw(c, random)
    data.x[3 * 8 + 1] = Number.POSITIVE_INFINITY
    data.x[98 * 8 + 7] = Number.NaN
    await cuda.same({ dtype: 'f16', limit: limitOf(data.k), what: `seed ${random.seed}` }, t =>
      run(t, c, data),
    )
  })
})
