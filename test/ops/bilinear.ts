/** A picture or map in f64: value(y, x, c) at data[(y·width + x)·channels + c]. */
export interface Grid {
  height: number
  width: number
  channels: number
  data: ArrayLike<number>
}

/**
 * PyTorch's bilinear interpolate (align_corners=false): f32 source coordinates, everything else in f64. `ratio` is the
 * size quotient unless a scale factor was asked for.
 */
export function bilinear(x: Grid, height: number, width: number, ratio?: number): Grid {
  const taps = (out: number, size: number) =>
    Array.from({ length: out }, (_, i) => {
      const scale = Math.fround(ratio ?? size / out)
      const at = Math.max(Math.fround(Math.fround(scale * (i + 0.5)) - 0.5), 0)
      const low = Math.min(Math.floor(at), size - 1)
      return { low, high: Math.min(low + 1, size - 1), lambda: Math.fround(at - low) }
    })
  const rows = taps(height, x.height)
  const columns = taps(width, x.width)
  const data = new Float64Array(height * width * x.channels)
  const at = (y: number, column: number, c: number) => x.data[(y * x.width + column) * x.channels + c]!
  rows.forEach((row, y) => {
    columns.forEach((column, i) => {
      for (let c = 0; c < x.channels; c++) {
        const top =
          at(row.low, column.low, c) * (1 - column.lambda) + at(row.low, column.high, c) * column.lambda
        const bottom =
          at(row.high, column.low, c) * (1 - column.lambda) + at(row.high, column.high, c) * column.lambda
        data[(y * width + i) * x.channels + c] = top * (1 - row.lambda) + bottom * row.lambda
      }
    })
  })
  return { height, width, channels: x.channels, data }
}

/** Picture `b` of a batch [B, H, W, C]. */
export function gridOf(data: Float32Array, b: number, height: number, width: number, channels: number): Grid {
  const size = height * width * channels
  return { height, width, channels, data: data.subarray(b * size, (b + 1) * size) }
}
