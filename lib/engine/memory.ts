import { readFileSync } from 'node:fs'
import { freemem } from 'node:os'
import { join } from 'node:path'
import { type DiffusionCheckpoint, textIgnored, vaeIgnored } from '../checkpoint/diffusers.ts'
import type { Checkpoint } from '../checkpoint/weights.ts'
import { CONVNEXT_IGNORED, clipIgnored, languageIgnored } from '../checkpoint/weights.ts'
import { MgmError } from '../errors.ts'

/** Bytes that this process may still take: what the machine has free, or its control groups allow if that is less. */
export function availableMemory(): number {
  return Math.min(freemem(), cgroupAvailable())
}

/**
 * Room left in the control group and those above it (cgroup v2; v1 at its root). File pages count as room: the kernel
 * drops them before it runs out. Infinity where there is no limit.
 */
function cgroupAvailable(): number {
  const path = /^0::(\/.*)$/m.exec(readText('/proc/self/cgroup') ?? '')?.[1]
  let available = Number.POSITIVE_INFINITY
  if (path !== undefined) {
    const parts = path.split('/').filter(part => part !== '' && part !== '..')
    for (let depth = parts.length; depth >= 0; depth--) {
      const folder = join('/sys/fs/cgroup', ...parts.slice(0, depth))
      available = Math.min(available, room(folder, 'memory.max', 'memory.current', 'file'))
    }
  }
  const v1 = '/sys/fs/cgroup/memory'
  return Math.min(available, room(v1, 'memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_cache'))
}

function room(folder: string, limitFile: string, usageFile: string, cacheKey: string): number {
  const limit = Number(readText(join(folder, limitFile)) || Number.NaN)
  const usage = Number(readText(join(folder, usageFile)) || Number.NaN)
  if (!Number.isFinite(limit) || !Number.isFinite(usage)) return Number.POSITIVE_INFINITY
  const stat = readText(join(folder, 'memory.stat')) ?? ''
  const cache = Number(new RegExp(`^${cacheKey} (\\d+)$`, 'm').exec(stat)?.[1] ?? 0)
  return Math.max(0, limit - Math.max(0, usage - cache))
}

function readText(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8').trim()
  } catch {
    return undefined
  }
}

const BITS = { f32: 32, bf16: 16, f16: 16, int8: 8.5, int4: 5 } as const

export interface WeightBytes {
  total: number
  /** Of each layer of the decoder. */
  layers: number[]
}

/** Bytes of the weights in the device's form, by the same rules as `MgmModel.load`. */
export function weightBytes(
  checkpoint: Checkpoint,
  options: {
    dtype?: 'f32' | 'bf16' | 'f16' | undefined
    quantize?: 'int8' | 'int4' | undefined
  },
): WeightBytes {
  const { config, clipConfig } = checkpoint
  const parts = [
    {
      map: checkpoint.language,
      ignored: languageIgnored(config),
      quantize: options.quantize,
    },
    {
      map: checkpoint.clip,
      ignored: clipIgnored(clipConfig, config.mm_vision_select_layer),
    },
    { map: checkpoint.convnext, ignored: CONVNEXT_IGNORED },
    { map: checkpoint.mining, ignored: [] },
    { map: checkpoint.projector, ignored: [] },
  ]
  let total = 0
  const layers = Array<number>(config.num_hidden_layers).fill(0)
  for (const { map, ignored, quantize } of parts) {
    for (const { name, dtype, shape } of map.entries()) {
      if (ignored.some(pattern => pattern.test(name))) continue
      const bytes = bytesAs(dtype, shape, quantize ?? options.dtype)
      total += bytes
      const layer = map === checkpoint.language ? /^model\.layers\.(\d+)\./.exec(name)?.[1] : undefined
      if (layer !== undefined && Number(layer) < layers.length) layers[Number(layer)]! += bytes
    }
  }
  return { total, layers }
}

/** Bytes of an image generator's weights in the device's form, by the same rules as `Sdxl.load`. */
export function diffusionBytes(checkpoint: DiffusionCheckpoint, dtype?: 'f32' | 'bf16' | 'f16'): number {
  const { textEncoders, unet, vae } = checkpoint
  const parts = [
    ...textEncoders.map(files => ({ map: files.weights, ignored: textIgnored(files) })),
    { map: unet.weights, ignored: [] },
    { map: vae.weights, ignored: vaeIgnored({ encoder: true }) },
  ]
  let total = 0
  for (const { map, ignored } of parts)
    for (const entry of map.entries())
      if (!ignored.some(pattern => pattern.test(entry.name)))
        total += bytesAs(entry.dtype, entry.shape, dtype)
  return total
}

/** Bytes of a tensor once loaded: vectors as f32, matrices as `type`, or as they are stored. */
function bytesAs(dtype: string, shape: readonly number[], type: keyof typeof BITS | undefined): number {
  const size = shape.reduce((a, b) => a * b, 1)
  const stored = dtype === 'bf16' || dtype === 'f16' ? dtype : 'f32'
  return (size * BITS[shape.length < 2 ? 'f32' : (type ?? stored)]) / 8
}

/**
 * Which device each layer of the decoder goes to: in order, shares of all bytes by what is free on each. The first
 * device has the rest of the model too. Throws OUT_OF_MEMORY where a device would be overfull.
 */
export function placeLayers(plan: {
  /** Bytes of each layer, its part of the KV cache included. */
  layers: readonly number[]
  /** Bytes of everything else. */
  rest: number
  /** Bytes that each device has for them. */
  available: readonly number[]
}): number[] {
  const { layers, rest, available } = plan
  const sum = (numbers: readonly number[]) => numbers.reduce((a, b) => a + b, 0)
  const share = (rest + sum(layers)) / sum(available)
  const used = available.map(() => 0)
  used[0] = rest
  let device = 0
  const placed = layers.map(bytes => {
    // Over its share by more than half a layer: the next one's turn.
    while (device + 1 < available.length && used[device]! + bytes / 2 > share * available[device]!) device++
    used[device]! += bytes
    return device
  })
  const overfull = used.findIndex((bytes, i) => bytes > available[i]!)
  if (overfull >= 0)
    throw new MgmError(
      'OUT_OF_MEMORY',
      `the model's part for GPU ${overfull} of ${available.length} needs ${formatBytes(used[overfull]!)} but ` +
        `${formatBytes(available[overfull]!)} are available there; use quantize: 'int8' or 'int4', or less kvMemory, or free memory`,
    )
  return placed
}

export interface MemoryPlan {
  /** Bytes of the weights. */
  weights: number
  /** Bytes of activations in the largest step. */
  work: number
  /** Bytes of a KV page, all layers. */
  bytesPerPage: number
  pageSize: number
  /** Pages that make one sequence as long as the context. */
  pagesPerSequence: number
  maxSequences: number
  /** Most bytes for the KV cache; undefined: what fits, at most half of what is left. */
  kvMemory?: number | undefined
  /** Bytes there are. */
  available: number
}

/**
 * How many KV pages to have: enough for every sequence at full length where memory allows, at least for one.
 * Throws OUT_OF_MEMORY, naming what is needed and what there is, before anything is loaded.
 */
export function planPages(plan: MemoryPlan): number {
  const { weights, work, bytesPerPage, pagesPerSequence, available } = plan
  const wanted = pagesPerSequence * plan.maxSequences
  const left = available - weights - work
  let pages: number
  if (plan.kvMemory !== undefined) {
    pages = Math.min(wanted, Math.floor(plan.kvMemory / bytesPerPage))
    if (pages < 1)
      throw new MgmError(
        'OUT_OF_MEMORY',
        `expected at least ${bytesPerPage} bytes (one page of ${plan.pageSize} positions) for kvMemory but received ${plan.kvMemory}`,
      )
  } else {
    pages = Math.max(pagesPerSequence, Math.min(wanted, Math.floor(left / 2 / bytesPerPage)))
  }
  const cache = pages * bytesPerPage
  if (weights + work + cache > available)
    throw new MgmError(
      'OUT_OF_MEMORY',
      `the model needs ${formatBytes(weights + work + cache)} (weights ${formatBytes(weights)}, KV cache ${formatBytes(cache)}, ` +
        `work ${formatBytes(work)}) but ${formatBytes(available)} are available; use a smaller dtype, quantize: 'int8' or 'int4', ` +
        'or less kvMemory, or free memory',
    )
  return pages
}

/** 1610612736 as `1.5 GiB`. */
export function formatBytes(bytes: number): string {
  if (bytes < 1024) return `${Math.round(bytes)} B`
  const units = ['KiB', 'MiB', 'GiB', 'TiB']
  let value = bytes
  let unit = -1
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024
    unit++
  }
  return `${value.toFixed(1)} ${units[unit]}`
}
