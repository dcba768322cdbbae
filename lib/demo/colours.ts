export type Rgb = readonly [red: number, green: number, blue: number]

/** The colours of backgrounds, plates and letters, in sRGB, far enough apart to be named by eye. */
export const COLOURS = {
  red: [205, 50, 50],
  orange: [240, 140, 40],
  yellow: [245, 215, 70],
  green: [70, 160, 80],
  cyan: [100, 215, 220],
  blue: [55, 95, 205],
  purple: [130, 75, 170],
  pink: [245, 160, 195],
  brown: [125, 80, 50],
  gray: [145, 145, 145],
  black: [28, 28, 28],
  white: [245, 245, 245],
} as const satisfies Record<string, Rgb>

export type Colour = keyof typeof COLOURS

export const COLOUR_NAMES = Object.keys(COLOURS) as Colour[]

/** Relative luminance, 0 (black) to 1 (white), of gamma-encoded values: close enough to choose letters that stand out. */
export function luma([red, green, blue]: Rgb): number {
  return (0.299 * red + 0.587 * green + 0.114 * blue) / 255
}
