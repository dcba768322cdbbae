import type { Device } from '../device.ts'
import { addTile, cast } from '../ops.ts'
import { scope, type Tensor } from '../tensor.ts'

/** The share of a tile's side that it has in common with its neighbour. */
const OVERLAP = 1 / 4

/** A piece of one side of an image, in units that are never cut. */
export interface Tile {
  readonly start: number
  readonly length: number
}

/**
 * The fewest tiles of at most `limit` that cover `length`, neighbours having at least a quarter of `limit` in common. They
 * are made equally long, so that none is a mere strip, and no place belongs to three.
 */
export function tilesAlong(length: number, limit: number): Tile[] {
  if (length <= limit) return [{ start: 0, length }]
  const overlap = Math.floor(limit * OVERLAP)
  const count = Math.ceil((length - overlap) / (limit - overlap))
  const size = Math.ceil((length + (count - 1) * overlap) / count)
  return Array.from({ length: count }, (_, i) => ({
    start: Math.floor((i * (length - size)) / (count - 1)),
    length: size,
  }))
}

/**
 * How much of each of its pixels tile `index` gives, `scale` of them to a unit: rises and falls linearly where it meets a
 * neighbour, so that the weights of all tiles add up to one.
 */
export function tileWeights(tiles: readonly Tile[], index: number, scale: number): Float32Array {
  const { start, length } = tiles[index]!
  const [before, after] = [tiles[index - 1], tiles[index + 1]]
  const rise = before ? (before.start + before.length - start) * scale : 0
  const fall = after ? (start + length - after.start) * scale : 0
  const pixels = length * scale
  return Float32Array.from({ length: pixels }, (_, i) => {
    if (i < rise) return (i + 0.5) / rise
    if (i >= pixels - fall) return (pixels - i - 0.5) / fall
    return 1
  })
}

/**
 * `body` of overlapping tiles of x, one after the other, blended: memory is that of one tile. x [B, from·H, from·W, C] is cut
 * into tiles of at most `tile` × `tile` units, of `from` pixels each; body: A [B, from·h, from·w, C] → [B, to·h, to·w, C'];
 * result f32 [B, to·H, to·W, C'].
 */
export function blendTiles(
  device: Device,
  x: Tensor,
  { tile, from, to, channels }: { tile: number; from: number; to: number; channels: number },
  body: (piece: Tensor) => Tensor,
): Tensor {
  return scope(() => {
    const [batch, height, width] = x.shape as [number, number, number, number]
    const [rows, columns] = [tilesAlong(height / from, tile), tilesAlong(width / from, tile)]
    const canvas = device.zeros([batch, (height / from) * to, (width / from) * to, channels])
    const weights = (tiles: readonly Tile[]) =>
      tiles.map(({ length }, i) => device.tensor(tileWeights(tiles, i, to), [length * to]))
    const [rowWeights, columnWeights] = [weights(rows), weights(columns)]

    for (const [r, row] of rows.entries())
      for (const [c, column] of columns.entries())
        scope(() => {
          const piece = x
            .narrow(1, row.start * from, row.length * from)
            .narrow(2, column.start * from, column.length * from)
          addTile(canvas, body(cast(piece, x.dtype)), {
            rows: rowWeights[r]!,
            columns: columnWeights[c]!,
            y: row.start * to,
            x: column.start * to,
          })
        })
    return canvas
  })
}
