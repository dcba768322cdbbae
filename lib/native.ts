import { existsSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { MgmError } from './errors.ts'
import type { DType, Layout, TensorData } from './tensor.ts'

/** A tensor as the addon knows it. */
export interface NativeTensor {
  readonly shape: readonly number[]
  readonly dtype: DType
  readonly layout: Layout
  readonly byteLength: number
  narrow(dim: number, start: number, length: number): NativeTensor
  reshape(shape: number[]): NativeTensor
  read(): Promise<TensorData>
  write(data: TensorData): void
  dispose(): void
}

export interface NativeMappedFile {
  readonly size: number
  close(): void
}

export interface NativeGraph {
  readonly length: number
  replay(): void
  dispose(): void
}

/** Bytes. */
export interface NativeMemory {
  /** Handed out to tensors, and the most that ever was. */
  used: number
  peak: number
  /** Held by the pool beyond that. */
  reserved: number
  /** 0: none. */
  limit: number
  /** What tensors may still get: on a GPU its free memory within the limit, on the CPU what the limit leaves. */
  available: number
}

export interface NativeDevice {
  readonly threads: number
  readonly isa: string
  empty(shape: number[], dtype: DType): NativeTensor
  fromFile(file: NativeMappedFile, offset: number, shape: number[], dtype: DType): NativeTensor
  beginCapture(): void
  endCapture(): NativeGraph
  abortCapture(): void
  synchronize(): Promise<void>
  memory(): NativeMemory
  trim(): void
  close(): Promise<void>
}

/** Geometry of a Pillow-exact bicubic resize: padding to a square, the whole resized size, the part that is made. */
export interface NativeResize {
  width: number
  height: number
  cropX: number
  cropY: number
  cropWidth: number
  cropHeight: number
  /** Colour of the square that the picture is first centred on; none: no padding. */
  pad?: readonly number[] | undefined
}

/** What there is of CUDA on this machine and in this build. */
export interface CudaSurvey {
  /** Why no GPU can be used; null if one can. */
  error: string | null
  library: string | null
  /** 12040 = CUDA 12.4; 0: no driver. */
  driverVersion: number
  /** The driver is the test emulator. */
  emulated: boolean
  /** capability: 80 = 8.0; memory in bytes; image: which of the embedded ones would run. */
  devices: { name: string; capability: number; memory: number; image: string }[]
}

export interface NativeOp {
  name: string
  params: { name: string; type: string }[]
}

/** The face of the addon; the only description of it in TypeScript. */
export interface Native {
  setErrorClass(errorClass: typeof MgmError): void
  openCpu(options: { threads: number; memoryLimit: number }): NativeDevice
  openCuda(options: { index: number; memoryLimit: number }): NativeDevice
  /** Copies a contiguous tensor to one of the same size on another GPU, in order with the work of both. */
  copyBetween(source: NativeTensor, destination: NativeTensor): void
  cudaSurvey(): CudaSurvey
  mapFile(path: string): NativeMappedFile
  opTable(): NativeOp[]
  call(op: number, args: unknown[]): NativeTensor[]
  cpuFeatures(): { isa: string; best: string; available: string[] }
  /** Floating point operations a second of fused multiply-adds on `threads` threads for about `seconds`. */
  fmaPeak(threads: number, seconds: number): Promise<number>
  /** Bytes a second read from main memory by `threads` threads for about `seconds`. */
  readBandwidth(threads: number, seconds: number): Promise<number>
  /** The three image functions run on libuv's threads and read `data` in place: leave it alone until they settle. */
  resizeBicubic(
    data: Uint8Array,
    width: number,
    height: number,
    resize: NativeResize,
  ): Promise<Uint8Array<ArrayBuffer>>
  /** Resized, cropped, /255, minus mean, over std: [cropHeight, cropWidth, 3]. */
  preprocessImage(
    data: Uint8Array,
    width: number,
    height: number,
    resize: NativeResize,
    mean: readonly number[],
    std: readonly number[],
  ): Promise<Float32Array<ArrayBuffer>>
  cmykToRgb(data: Uint8Array, width: number, height: number): Promise<Uint8Array<ArrayBuffer>>
}

let loaded: Native | undefined

/** The addon's file: `build/` of a checkout, else what node-gyp-build finds in `prebuilds/`. Throws if there is none. */
export function addonPath(): string {
  const root = join(dirname(fileURLToPath(import.meta.url)), '..')
  const checkout = join(root, 'build', 'native', 'Release', 'mgm.node')
  if (existsSync(checkout)) return checkout
  const find = createRequire(import.meta.url)('node-gyp-build') as { path(folder: string): string }
  return find.path(root)
}

/** Loads the addon: `prebuilds/` of the package, or `build/` of a checkout. Throws NATIVE_UNAVAILABLE with causes and cures. */
export function native(): Native {
  if (loaded) return loaded
  try {
    const addon = createRequire(import.meta.url)(addonPath()) as Native
    addon.setErrorClass(MgmError)
    loaded = addon
    return addon
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause)
    throw new MgmError(
      'NATIVE_UNAVAILABLE',
      `the native addon could not be loaded on ${process.platform}-${process.arch} (Node ${process.version}): ${reason}. ` +
        'Prebuilt binaries exist for linux-x64 with glibc; in a checkout run `npm run build:native` (needs a C++ compiler and CMake).',
      { cause },
    )
  }
}
