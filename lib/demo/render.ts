import sharp, { type Sharp } from 'sharp'
import type { Scene } from './scene.ts'
import { sceneSvg } from './svg.ts'

/** A scene's pixels, `[pixels, pixels, 3]` bytes of RGB. One version of sharp gives the same bytes on every machine. */
export async function renderScene(scene: Scene, pixels: number): Promise<Buffer> {
  return await picture(scene, pixels).raw().toBuffer()
}

/** A scene as a PNG file of `pixels` by `pixels`. */
export async function renderPng(scene: Scene, pixels: number): Promise<Buffer> {
  return await picture(scene, pixels).png({ compressionLevel: 6 }).toBuffer()
}

function picture(scene: Scene, pixels: number): Sharp {
  return sharp(Buffer.from(sceneSvg(scene, pixels))).removeAlpha()
}
