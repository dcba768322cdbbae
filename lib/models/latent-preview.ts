import type { Device } from '../device.ts'
import { type ActivationType, cast, linear, packLinear, randomNormal, toUint8 } from '../ops.ts'
import { scope, type Tensor } from '../tensor.ts'

/** Latents to be decoded for the fit: this many blocks on a side, each of equal latents. */
const BLOCKS = 8
const BLOCK = 2

/**
 * A linear map from a latent position to the mean colour of the pixels that it stands for: a preview at no cost. It is
 * fitted to the VAE itself, on latents of unit deviation in equal blocks, since colour is what blocks have in common.
 */
export class LatentPreview {
  private readonly weight: Tensor
  private readonly bias: Tensor

  private constructor(weight: Tensor, bias: Tensor) {
    this.weight = weight
    this.bias = bias
  }

  /** `decode`: latents f32 [1, h, w, C] → pixels u8 [1, H, W, 3]. */
  static async fit(
    device: Device,
    channels: number,
    activations: ActivationType,
    decode: (latents: Tensor) => Tensor,
  ): Promise<LatentPreview> {
    const blocks = scope(() =>
      randomNormal(device.tensor(new Int32Array(3), [1, 3]), [BLOCKS ** 2, channels]),
    )
    const colours = await blocks.readF32()
    blocks.dispose()
    const side = BLOCKS * BLOCK
    const latents = new Float32Array(side * side * channels)
    for (let y = 0; y < side; y++)
      for (let x = 0; x < side; x++) {
        const block = Math.floor(y / BLOCK) * BLOCKS + Math.floor(x / BLOCK)
        latents.set(colours.subarray(block * channels, (block + 1) * channels), (y * side + x) * channels)
      }
    const decoded = scope(() => decode(device.tensor(latents, [1, side, side, channels])))
    const pixels = (await decoded.read()) as Uint8Array
    const scale = decoded.shape[1]! / side
    decoded.dispose()

    const rows = Array.from({ length: side * side }, (_, i) => [
      ...latents.subarray(i * channels, (i + 1) * channels),
      1,
    ])
    const targets = rows.map((_, i) => meanColour(pixels, side, scale, i))
    const solved = [0, 1, 2].map(c =>
      leastSquares(
        rows,
        targets.map(target => target[c]!),
      ),
    )
    const weight = Float32Array.from(solved.flatMap(row => row.slice(0, channels)))
    const bias = Float32Array.from(solved.map(row => row[channels]!))
    return new LatentPreview(
      scope(() => packLinear(device.tensor(weight, [3, channels]), { dtype: activations })),
      device.tensor(bias, [3]),
    )
  }

  /** Latents f32 [B, h, w, C] → u8 [B, h, w, 3]. */
  forward(latents: Tensor, activations: ActivationType): Tensor {
    return toUint8(linear(cast(latents, activations), this.weight, { bias: this.bias }), {
      scale: 1,
      offset: 0,
    })
  }

  dispose(): void {
    this.weight.dispose()
    this.bias.dispose()
  }
}

function meanColour(pixels: Uint8Array, side: number, scale: number, position: number): number[] {
  const top = Math.floor(position / side) * scale
  const left = (position % side) * scale
  const sum = [0, 0, 0]
  for (let y = top; y < top + scale; y++)
    for (let x = left; x < left + scale; x++)
      for (let c = 0; c < 3; c++) sum[c]! += pixels[(y * side * scale + x) * 3 + c]!
  return sum.map(value => value / scale ** 2)
}

/** The w that makes rows · w closest to `targets`, by the normal equations; rows are few and far from parallel. */
function leastSquares(rows: readonly (readonly number[])[], targets: readonly number[]): number[] {
  const n = rows[0]!.length
  const system = Array.from({ length: n }, (_, i) => [
    ...Array.from({ length: n }, (_, j) => rows.reduce((sum, row) => sum + row[i]! * row[j]!, 0)),
    rows.reduce((sum, row, r) => sum + row[i]! * targets[r]!, 0),
  ])
  // Gauss-Jordan; the matrix is symmetric and positive definite, so no pivot is near zero.
  for (let i = 0; i < n; i++) {
    const pivot = system[i]!
    const scale = pivot[i]!
    for (let j = 0; j <= n; j++) pivot[j]! /= scale
    for (let k = 0; k < n; k++) {
      const factor = system[k]![i]!
      if (k === i || factor === 0) continue
      for (let j = 0; j <= n; j++) system[k]![j]! -= factor * pivot[j]!
    }
  }
  return system.map(row => row[n]!)
}
