import { type CheckpointSummary, inspectCheckpoint } from '../checkpoint/inspect.ts'
import { PARTS } from '../checkpoint/weights.ts'
import { formatBytes } from '../engine/memory.ts'
import { formatCount, table } from './terminal.ts'

const NAMES = { llama: 'Llama (Vicuna, Llama 3, Yi)', gemma: 'Gemma', mixtral: 'Mixtral', mistral: 'Mistral' }

/** The summary of a checkpoint folder; `json` for programs. Reads headers only. */
export function info(
  folder: string,
  towers: { visionTower?: string; visionTowerAux?: string },
  json: boolean,
): string {
  const summary = inspectCheckpoint(folder, towers)
  return json ? JSON.stringify(summary, null, 2) : render(summary)
}

function render(summary: CheckpointSummary): string {
  const { config, clip, convnext, parts, total } = summary
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
    '',
    'weights',
    table(
      [...PARTS.map(part => [part, parts[part]] as const), ['total', total] as const].map(([name, part]) => [
        name,
        `${formatCount(part.parameters)} parameters in ${part.tensors} tensors, ${formatBytes(part.bytes)} ` +
          `(${Object.keys(part.dtypes).join(', ') || 'none'})`,
      ]),
      '  ',
    ),
    '',
    'memory needed for the weights',
    table(
      Object.entries(summary.bytesNeeded).map(([dtype, bytes]) => [dtype, formatBytes(bytes)]),
      '  ',
    ),
    '',
    summary.missing.length === 0
      ? 'complete: nothing is missing'
      : `missing\n${summary.missing.map(line => `  ${line}`).join('\n')}`,
  ]
  return lines.join('\n')
}
