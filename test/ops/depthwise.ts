import type { Random } from './helpers.ts'

/** Shapes of a depthwise convolution, [B, H, W, C] and [kh, kw]. */
export interface Case {
  shape: [number, number, number, number]
  kernel: [number, number]
}

export interface Inputs extends Case {
  x: Float32Array
  w: Float32Array
  bias: Float32Array
  normWeight: Float32Array
  normBias: Float32Array
}

export function inputs({ shape, kernel }: Case, random: Random): Inputs {
  const [b, h, width, c] = shape
  return {
    shape,
    kernel,
    x: random.normals(b * h * width * c),
    w: random.normals(kernel[0] * kernel[1] * c),
    bias: random.normals(c),
    normWeight: random.normals(c),
    normBias: random.normals(c),
  }
}
