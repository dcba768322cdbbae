import { existsSync } from 'node:fs'
import { join } from 'node:path'
import type { Component } from '../checkpoint/diffusers.ts'
import {
  type CheckpointSummary,
  type DiffusionSummary,
  inspectCheckpoint,
  inspectDiffusion,
  type PartSummary,
} from '../checkpoint/inspect.ts'
import { PARTS } from '../checkpoint/weights.ts'
import { formatBytes } from '../engine/memory.ts'
import { formatCount, table } from './terminal.ts'

const NAMES = { llama: 'Llama (Vicuna, Llama 3, Yi)', gemma: 'Gemma', mixtral: 'Mixtral', mistral: 'Mistral' }

/** The summary of a checkpoint folder, MGM's or an SDXL pipeline's; `json` for programs. Reads headers only. */
export function info(
  folder: string,
  towers: { visionTower?: string; visionTowerAux?: string },
  json: boolean,
): string {
  if (existsSync(join(folder, 'model_index.json'))) {
    const summary = inspectDiffusion(folder)
    return json ? JSON.stringify(summary, null, 2) : renderDiffusion(summary)
  }
  const summary = inspectCheckpoint(folder, towers)
  return json ? JSON.stringify(summary, null, 2) : render(summary)
}

function render(summary: CheckpointSummary): string {
  const { config, clip, convnext } = summary
  const experts =
    config.num_local_experts === undefined
      ? ''
      : `, ${config.num_local_experts} experts (${config.num_experts_per_tok} a token)`
  const crops = config.image_grid > 1 ? `, ${config.image_grid} x ${config.image_grid} crops` : ''
  const lines = [
    table([
      ['checkpoint', summary.folder],
      ['family', `${NAMES[summary.family]} (${config.model_type})`],
      [
        'language model',
        `${config.num_hidden_layers} layers of ${config.hidden_size}, ${config.num_attention_heads} heads ` +
          `(${config.num_key_value_heads} KV) of ${config.head_dim}, MLP ${config.intermediate_size}${experts}`,
      ],
      [
        'vocabulary',
        `${config.vocab_size}${summary.embeddingRows === null ? '' : `, ${summary.embeddingRows} embedding rows`}`,
      ],
      ['context', `${Math.min(config.tokenizer_model_max_length, config.max_position_embeddings)} tokens`],
      [
        'CLIP',
        clip === null
          ? 'missing'
          : `${clip.num_hidden_layers} layers of ${clip.hidden_size}, patches of ${clip.patch_size} at ${clip.image_size} x ${clip.image_size}`,
      ],
      [
        'ConvNeXt',
        convnext === null
          ? 'missing'
          : `depths ${convnext.depths.join('-')}, widths ${convnext.dims.join('-')}, at ${config.image_size_aux} x ${config.image_size_aux}${crops}`,
      ],
      ['projector', config.mm_projector_type],
      ['picture', summary.imageTokens === null ? 'unknown' : `${summary.imageTokens} tokens`],
    ]),
    ...renderWeights(summary, PARTS),
  ]
  return lines.join('\n')
}

function renderDiffusion(summary: DiffusionSummary): string {
  const { scheduler, configs } = summary
  const { unet, vae } = configs
  const encoder = (name: 'text_encoder' | 'text_encoder_2') => {
    const config = configs[name]
    return config === null
      ? 'missing'
      : `${config.num_hidden_layers} layers of ${config.hidden_size}, ${config.num_attention_heads} heads, ${config.hidden_act}`
  }
  // A block without attention has no transformers, whatever its config says of their depth.
  const depths = unet?.down_block_types.map((type, i) =>
    type === 'DownBlock2D' ? 0 : unet.transformer_layers_per_block[i],
  )
  const scale = vae === null ? null : 2 ** (vae.block_out_channels.length - 1)
  const side = unet && scale ? unet.sample_size * scale : null
  const lines = [
    table([
      ['checkpoint', summary.folder],
      ['pipeline', summary.pipeline],
      ['text encoder', encoder('text_encoder')],
      ['text encoder 2', encoder('text_encoder_2')],
      [
        'UNet',
        unet === null
          ? 'missing'
          : `channels ${unet.block_out_channels.join('-')}, transformers ${depths!.join('-')}, heads ${unet.attention_heads.join('-')}, prompt ${unet.cross_attention_dim}`,
      ],
      [
        'VAE',
        vae === null
          ? 'missing'
          : `channels ${vae.block_out_channels.join('-')}, ${scale} x ${scale} pixels a latent of ${vae.latent_channels}`,
      ],
      [
        'scheduler',
        scheduler === null
          ? 'missing'
          : `${scheduler.sampler}, ${scheduler.prediction_type}, ${scheduler.timestep_spacing} spacing`,
      ],
      ['picture', side === null ? 'unknown' : `${side} x ${side}`],
    ]),
    ...renderWeights(summary, Object.keys(summary.parts) as Component[]),
  ]
  return lines.join('\n')
}

interface WeightSummary<P extends string> {
  parts: Record<P, PartSummary>
  total: PartSummary
  bytesNeeded: Partial<Record<string, number>>
  missing: string[]
}

/** What both kinds of checkpoints have: weights by part, the memory they need, and what is missing. */
function renderWeights<P extends string>(
  { parts, total, bytesNeeded, missing }: WeightSummary<P>,
  order: readonly P[],
): string[] {
  return [
    '',
    'weights',
    table(
      [...order.map(part => [part, parts[part]] as const), ['total', total] as const].map(([name, part]) => [
        name,
        `${formatCount(part.parameters)} parameters in ${part.tensors} tensors, ${formatBytes(part.bytes)} ` +
          `(${Object.keys(part.dtypes).join(', ') || 'none'})`,
      ]),
      '  ',
    ),
    '',
    'memory needed for the weights',
    table(
      Object.entries(bytesNeeded).map(([dtype, bytes]) => [dtype, formatBytes(bytes!)]),
      '  ',
    ),
    '',
    missing.length === 0
      ? 'complete: nothing is missing'
      : `missing\n${missing.map(line => `  ${line}`).join('\n')}`,
  ]
}
