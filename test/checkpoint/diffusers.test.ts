import { cpSync, mkdtempSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'
import { afterAll, describe, expect, test } from 'vitest'
import { openDiffusion } from '../../lib/checkpoint/diffusers.ts'
import {
  parseClipTextConfig,
  parseSchedulerConfig,
  parseUnetConfig,
  parseVaeConfig,
} from '../../lib/checkpoint/diffusers-config.ts'
import { inspectDiffusion } from '../../lib/checkpoint/inspect.ts'
import { failure } from '../helpers/failure.ts'
import { FIXTURES } from '../helpers/safetensors.ts'

const PIPELINE = join(FIXTURES, 'sdxl-tiny/pipeline')
const json = (name: string) => JSON.parse(readFileSync(join(PIPELINE, name), 'utf8'))

const scratch = mkdtempSync(join(tmpdir(), 'mgm-diffusers-'))
afterAll(() => rmSync(scratch, { recursive: true }))

let copies = 0
/** A writable copy of the pipeline. */
function copy(): string {
  const folder = join(scratch, `copy-${copies++}`)
  cpSync(PIPELINE, folder, { recursive: true })
  return folder
}

function editJson(file: string, edit: (json: Record<string, unknown>) => void): void {
  const json = JSON.parse(readFileSync(file, 'utf8'))
  edit(json)
  writeFileSync(file, JSON.stringify(json))
}

interface StoredTensor {
  dtype: string
  shape: number[]
  data_offsets: [number, number]
}

/** The tensors of a safetensors file, and the data that their offsets count in. */
function readStored(file: string): { tensors: [string, StoredTensor][]; data: Buffer } {
  const bytes = readFileSync(file)
  const end = 8 + Number(bytes.readBigUInt64LE(0))
  const { __metadata__: _, ...tensors } = JSON.parse(bytes.toString('utf8', 8, end))
  return { tensors: Object.entries<StoredTensor>(tensors), data: bytes.subarray(end) }
}

function writeStored(file: string, tensors: [string, StoredTensor][], data: Buffer): void {
  const header = Buffer.from(JSON.stringify(Object.fromEntries(tensors)))
  const length = Buffer.alloc(8)
  length.writeBigUInt64LE(BigInt(header.length))
  writeFileSync(file, Buffer.concat([length, header, data]))
}

/** Halves a weight file of `folder` into `shards` with the index `index`. */
function shard(folder: string, file: string, shards: [string, string], index: string): void {
  const { tensors, data } = readStored(join(folder, file))
  tensors.sort(([, a], [, b]) => a.data_offsets[0] - b.data_offsets[0])
  const middle = tensors.length >> 1
  const cut = tensors[middle]![1].data_offsets[0]
  const second = tensors
    .slice(middle)
    .map(([name, { data_offsets, ...rest }]): [string, StoredTensor] => [
      name,
      { ...rest, data_offsets: [data_offsets[0] - cut, data_offsets[1] - cut] },
    ])
  writeStored(join(folder, shards[0]), tensors.slice(0, middle), data.subarray(0, cut))
  writeStored(join(folder, shards[1]), second, data.subarray(cut))
  const map = tensors.map(([name], i) => [name, shards[i < middle ? 0 : 1]])
  writeFileSync(join(folder, index), JSON.stringify({ metadata: {}, weight_map: Object.fromEntries(map) }))
  rmSync(join(folder, file))
}

describe('openDiffusion', () => {
  test('finds every part of a pipeline', () => {
    const found = openDiffusion(PIPELINE)
    const { textEncoders, unet, vae } = found
    expect(found.files.map(file => file.slice(PIPELINE.length + 1))).toEqual([
      'text_encoder/model.fp16.safetensors',
      'text_encoder_2/model.fp16.safetensors',
      'unet/diffusion_pytorch_model.fp16.safetensors',
      'vae/diffusion_pytorch_model.fp16.safetensors',
    ])
    expect(textEncoders.map(({ projection, tokenizer }) => [projection, basename(tokenizer)])).toEqual([
      [false, 'tokenizer'],
      [true, 'tokenizer_2'],
    ])
    expect(found.forceZerosForEmptyPrompt).toBe(true)
    expect(unet.config).toEqual({
      in_channels: 4,
      out_channels: 4,
      block_out_channels: [16, 32, 64],
      down_block_types: ['DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'],
      up_block_types: ['CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'],
      layers_per_block: [2, 2, 2],
      transformer_layers_per_block: [1, 2, 3],
      attention_heads: [2, 4, 4],
      cross_attention_dim: 80,
      norm_num_groups: 8,
      norm_eps: 1e-5,
      addition_time_embed_dim: 8,
      projection_class_embeddings_input_dim: 96,
      time_cond_proj_dim: null,
      flip_sin_to_cos: true,
      freq_shift: 0,
      sample_size: 16,
    })
    expect(vae.config).toEqual({
      in_channels: 3,
      out_channels: 3,
      latent_channels: 4,
      block_out_channels: [16, 32, 48, 48],
      layers_per_block: 2,
      norm_num_groups: 8,
      sample_size: 128,
      scaling_factor: 0.13025,
      shift_factor: 0,
      force_upcast: true,
      use_quant_conv: true,
      use_post_quant_conv: true,
      mid_block_add_attention: true,
    })
    expect(found.scheduler).toEqual({
      sampler: 'euler',
      num_train_timesteps: 1000,
      beta_start: 0.00085,
      beta_end: 0.012,
      beta_schedule: 'scaled_linear',
      prediction_type: 'epsilon',
      timestep_spacing: 'leading',
      steps_offset: 1,
      use_karras_sigmas: false,
      rescale_betas_zero_snr: false,
      set_alpha_to_one: true,
      original_inference_steps: 50,
    })
    expect(textEncoders[1].config).toEqual({
      vocab_size: 813,
      hidden_size: 48,
      intermediate_size: 96,
      num_hidden_layers: 4,
      num_attention_heads: 6,
      max_position_embeddings: 77,
      layer_norm_eps: 1e-5,
      hidden_act: 'gelu',
      eos_token_id: 2,
      projection_dim: 48,
    })
    const parameters = [...textEncoders, unet, vae].flatMap(part => part.weights.entries())
    expect(found.totalBytes).toBe(
      2 * parameters.reduce((sum, { shape }) => sum + shape.reduce((a, b) => a * b, 1), 0),
    )
  })

  test('takes the variant asked for, and plain weights where a component lacks it', () => {
    const folder = copy()
    const plain = join(folder, 'unet/diffusion_pytorch_model.safetensors')
    cpSync(join(folder, 'unet/diffusion_pytorch_model.fp16.safetensors'), plain)
    renameSync(
      join(folder, 'vae/diffusion_pytorch_model.fp16.safetensors'),
      join(folder, 'vae/diffusion_pytorch_model.safetensors'),
    )
    const names = (variant?: string | null) =>
      openDiffusion(folder, { variant })
        .files.slice(2)
        .map(file => basename(file))
    const fp16 = 'diffusion_pytorch_model.fp16.safetensors'
    expect(names()).toEqual([fp16, basename(plain)])
    expect(names('fp16')).toEqual([fp16, basename(plain)])
    expect(failure(() => openDiffusion(folder, { variant: 'ema' }))).toMatch(
      /^CHECKPOINT_INVALID: expected one of model\.ema\.safetensors, model\.safetensors, .*text_encoder/,
    )
    for (const name of ['text_encoder', 'text_encoder_2'])
      renameSync(join(folder, name, 'model.fp16.safetensors'), join(folder, name, 'model.safetensors'))
    expect(names(null)).toEqual([basename(plain), basename(plain)])
    expect(failure(() => openDiffusion(folder, { variant: 'ema' }))).toBe(
      `CHECKPOINT_INVALID: expected weights of the variant "ema" in ${folder} but found none`,
    )
  })

  test.each([
    [
      'diffusion_pytorch_model.fp16-00001-of-00002.safetensors',
      'diffusion_pytorch_model.fp16.safetensors.index.json',
    ],
    [
      'diffusion_pytorch_model-00001-of-00002.fp16.safetensors',
      'diffusion_pytorch_model.safetensors.index.fp16.json',
    ],
    ['diffusion_pytorch_model-00001-of-00002.safetensors', 'diffusion_pytorch_model.safetensors.index.json'],
  ])('reads shards %s', (first, index) => {
    const folder = copy()
    const whole = openDiffusion(folder).unet.weights
    shard(
      join(folder, 'unet'),
      'diffusion_pytorch_model.fp16.safetensors',
      [first, first.replace('00001-', '00002-')],
      index,
    )
    const { unet, files } = openDiffusion(folder)
    expect(files).toContain(join(folder, 'unet', first))
    expect(unet.weights.names().sort()).toEqual(whole.names().sort())
    expect(unet.weights.byteLength).toBe(whole.byteLength)
  })

  test('reads PyTorch archives where there is no safetensors file, of the variant first', () => {
    const folder = copy()
    const archive = join(FIXTURES, 'torch-archive/parameters.bin')
    const files = () => openDiffusion(folder).files.map(file => basename(file))
    for (const name of ['pytorch_model.bin', 'pytorch_model.fp16.bin'])
      cpSync(archive, join(folder, 'text_encoder', name))
    expect(files()).toContain('model.fp16.safetensors')
    rmSync(join(folder, 'text_encoder/model.fp16.safetensors'))
    expect(files()[0]).toBe('pytorch_model.fp16.bin')
    expect(openDiffusion(folder).textEncoders[0].weights.has('0.weight')).toBe(true)
    rmSync(join(folder, 'text_encoder/pytorch_model.fp16.bin'))
    expect(files()[0]).toBe('pytorch_model.bin')
  })

  test("gives a VAE's attention today's names and shapes", () => {
    const folder = copy()
    const today = openDiffusion(folder).vae.weights
    const file = join(folder, 'vae/diffusion_pytorch_model.fp16.safetensors')
    const old = { to_q: 'query', to_k: 'key', to_v: 'value', 'to_out.0': 'proj_attn' }
    const { tensors, data } = readStored(file)
    const renamed = tensors.map(([name, tensor]): [string, StoredTensor] => {
      const now = Object.keys(old).find(part => name.includes(`.attentions.0.${part}.`)) as keyof typeof old
      if (!now) return [name, tensor]
      const shape = tensor.shape.length === 2 ? [...tensor.shape, 1, 1] : tensor.shape
      return [name.replace(now, old[now]), { ...tensor, shape }]
    })
    writeStored(file, renamed, data)
    expect(readFileSync(file).includes('attentions.0.proj_attn.weight')).toBe(true)
    const { weights } = openDiffusion(folder).vae
    const bare = (map: typeof weights) =>
      map
        .entries()
        .map(({ name, shape, dtype }) => [name, shape, dtype])
        .sort()
    expect(bare(weights)).toEqual(bare(today))
    expect(weights.take('decoder.mid_block.attentions.0.to_out.0.weight', [48, 48]).name).toBe(
      'decoder.mid_block.attentions.0.to_out.0.weight',
    )
  })

  const refused: [string, (index: Record<string, unknown>) => void, string][] = [
    [
      'another pipeline',
      index => {
        index._class_name = 'StableDiffusionPipeline'
      },
      'CHECKPOINT_UNSUPPORTED: expected StableDiffusionXLPipeline or StableDiffusionXLImg2ImgPipeline for "_class_name" in * but received "StableDiffusionPipeline"',
    ],
    [
      'a refiner',
      index => {
        index.text_encoder = [null, null]
      },
      'CHECKPOINT_UNSUPPORTED: expected a base model in * but received a refiner, which is not run',
    ],
    [
      'another VAE',
      index => {
        index.vae = ['diffusers', 'AutoencoderTiny']
      },
      'CHECKPOINT_UNSUPPORTED: expected AutoencoderKL for "vae" in * but received "AutoencoderTiny"',
    ],
    [
      'another scheduler',
      index => {
        index.scheduler = ['diffusers', 'HeunDiscreteScheduler']
      },
      'CHECKPOINT_UNSUPPORTED: expected one of EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler, DDIMScheduler, LCMScheduler for the scheduler of * but received "HeunDiscreteScheduler"',
    ],
    [
      'a missing component',
      index => {
        delete index.unet
      },
      'CHECKPOINT_INVALID: expected a library and a class for "unet" in * but received undefined',
    ],
  ]
  test.each(refused)('refuses %s', (_, edit, message) => {
    const folder = copy()
    editJson(join(folder, 'model_index.json'), edit)
    expect(failure(() => openDiffusion(folder)).replace(/\/\S+\.json/, '*')).toBe(message)
  })

  test('refuses components of different models', () => {
    const folder = copy()
    const edit = (key: string, value: unknown) => {
      cpSync(join(PIPELINE, 'unet/config.json'), join(folder, 'unet/config.json'))
      editJson(join(folder, 'unet/config.json'), config => {
        config[key] = value
      })
      return failure(() => openDiffusion(folder))
    }
    expect(edit('in_channels', 9)).toMatch(
      /^CHECKPOINT_UNSUPPORTED: expected 4, .* "in_channels" .* received 9/,
    )
    expect(edit('cross_attention_dim', 96)).toMatch(/^CHECKPOINT_INVALID: expected 80, .* received 96/)
    expect(edit('projection_class_embeddings_input_dim', 88)).toMatch(/^CHECKPOINT_INVALID: expected 96, /)
  })

  test('names a folder that is not there', () => {
    expect(failure(() => openDiffusion(join(scratch, 'none')))).toMatch(
      /^CHECKPOINT_INVALID: expected a pipeline folder at .*none but found none$/,
    )
    const folder = copy()
    rmSync(join(folder, 'vae/diffusion_pytorch_model.fp16.safetensors'))
    expect(failure(() => openDiffusion(folder))).toMatch(
      /^CHECKPOINT_INVALID: expected one of diffusion_pytorch_model\.fp16\.safetensors, .* in .*vae but found only config\.json$/,
    )
  })
})

describe('inspectDiffusion', () => {
  test('counts what image generation uses', () => {
    const { pipeline, parts, total, bytesNeeded, missing } = inspectDiffusion(PIPELINE)
    const layer = (c: number, inner: number) => 4 * (c * c + c) + 2 * c * inner + inner + c + 4 * c
    // Of the first encoder all but the last of three layers and the last norm; of the second all four, norm and projection.
    const first = (813 + 77) * 32 + 2 * layer(32, 64)
    const second = (813 + 77) * 48 + 4 * layer(48, 96) + 2 * 48 + 48 * 48
    expect(parts.text_encoder).toEqual({
      tensors: 2 + 2 * 16,
      parameters: first,
      bytes: 2 * first,
      dtypes: { f16: 34 },
    })
    expect(parts.text_encoder_2.parameters).toBe(second)
    const { unet, vae } = openDiffusion(PIPELINE)
    expect(parts.unet.bytes).toBe(unet.weights.byteLength)
    expect(parts.vae.bytes).toBe(vae.weights.byteLength)
    expect({ pipeline, missing }).toEqual({ pipeline: 'StableDiffusionXLPipeline', missing: [] })
    expect(bytesNeeded).toEqual({
      f32: 4 * total.parameters,
      bf16: 2 * total.parameters,
      f16: 2 * total.parameters,
    })
  })

  test('lists what is missing or not run', () => {
    const folder = copy()
    rmSync(join(folder, 'vae'), { recursive: true })
    rmSync(join(folder, 'tokenizer/merges.txt'))
    rmSync(join(folder, 'text_encoder_2/model.fp16.safetensors'))
    editJson(join(folder, 'unet/config.json'), config => {
      config.class_embed_type = 'timestep'
    })
    const summary = inspectDiffusion(folder)
    expect(summary.missing).toEqual([
      expect.stringMatching(
        /^expected null for "class_embed_type" in .*unet.config\.json but received "timestep"$/,
      ),
      expect.stringMatching(/vae.config\.json/),
      expect.stringMatching(/^no vocab\.json and merges\.txt, nor tokenizer\.json, in .*tokenizer$/),
      expect.stringMatching(/^expected one of model\.fp16\.safetensors, .*text_encoder_2/),
      expect.stringMatching(/^expected one of diffusion_pytorch_model\.fp16\.safetensors, .*vae/),
    ])
    expect(summary.configs).toMatchObject({ unet: null, vae: null, text_encoder: { hidden_size: 32 } })
    expect(summary.parts.unet.tensors).toBeGreaterThan(0)
  })

  test('notices components of different models', () => {
    const folder = copy()
    editJson(join(folder, 'unet/config.json'), config => {
      config.cross_attention_dim = 96
    })
    expect(inspectDiffusion(folder).missing).toEqual([
      expect.stringMatching(/"cross_attention_dim".*received 96$/),
    ])
  })
})

describe('configs of diffusers', () => {
  // What the released files hold; the sizes are those of stabilityai/stable-diffusion-xl-base-1.0.
  test('reads the UNet of the release, by number or by list', () => {
    const raw = {
      ...json('unet/config.json'),
      block_out_channels: [320, 640, 1280],
      attention_head_dim: [5, 10, 20],
      transformer_layers_per_block: [1, 2, 10],
      cross_attention_dim: 2048,
      norm_num_groups: 32,
      addition_time_embed_dim: 256,
      projection_class_embeddings_input_dim: 2816,
      sample_size: 128,
    }
    const config = parseUnetConfig(raw, 'config.json')
    expect(config).toMatchObject({
      attention_heads: [5, 10, 20],
      transformer_layers_per_block: [1, 2, 10],
      layers_per_block: [2, 2, 2],
      cross_attention_dim: 2048,
    })
    expect(
      parseUnetConfig(
        {
          ...raw,
          attention_head_dim: 8,
          layers_per_block: [1, 2, 3],
          transformer_layers_per_block: 4,
          cross_attention_dim: [2048, 2048, 2048],
          only_cross_attention: [false, false, false],
          time_cond_proj_dim: 256,
          sample_size: null,
        },
        'config.json',
      ),
    ).toMatchObject({
      attention_heads: [8, 8, 8],
      layers_per_block: [1, 2, 3],
      transformer_layers_per_block: [4, 4, 4],
      cross_attention_dim: 2048,
      time_cond_proj_dim: 256,
      sample_size: 128,
    })
    expect(parseUnetConfig({ ...raw, num_attention_heads: 16 }, 'config.json').attention_heads).toEqual([
      16, 16, 16,
    ])
  })

  test.each([
    ['addition_embed_type', 'text'],
    ['class_embed_type', 'timestep'],
    ['num_class_embeds', 10],
    ['encoder_hid_dim', 768],
    ['encoder_hid_dim_type', 'image_proj'],
    ['attention_type', 'gated'],
    ['use_linear_projection', false],
    ['only_cross_attention', [true, false, false]],
    ['mid_block_only_cross_attention', true],
    ['dual_cross_attention', true],
    ['cross_attention_norm', 'layer_norm'],
    ['reverse_transformer_layers_per_block', [3, 2, 1]],
    ['cross_attention_dim', [80, 80, 64]],
    ['time_embedding_type', 'fourier'],
    ['time_embedding_dim', 64],
    ['time_embedding_act_fn', 'silu'],
    ['timestep_post_act', 'silu'],
    ['act_fn', 'gelu'],
    ['mid_block_type', 'UNetMidBlock2DSimpleCrossAttn'],
    ['resnet_time_scale_shift', 'scale_shift'],
    ['resnet_skip_time_act', true],
    ['resnet_out_scale_factor', 1.5],
    ['mid_block_scale_factor', 2],
    ['downsample_padding', 0],
    ['conv_in_kernel', 1],
    ['conv_out_kernel', 1],
    ['center_input_sample', true],
    ['down_block_types', ['DownBlock2D', 'AttnDownBlock2D', 'CrossAttnDownBlock2D']],
    ['up_block_types', ['CrossAttnUpBlock2D', 'SkipUpBlock2D', 'UpBlock2D']],
  ])('refuses a UNet with another %s', (key, value) => {
    const message = failure(() =>
      parseUnetConfig({ ...json('unet/config.json'), [key]: value }, 'config.json'),
    )
    expect(message).toMatch(/^CHECKPOINT_UNSUPPORTED: expected .* in config\.json but received /)
    expect(message).toContain(`"${key}"`)
  })

  test('takes an absent key for what diffusers takes it for', () => {
    const without = (name: string, ...keys: string[]) =>
      Object.fromEntries(Object.entries(json(name)).filter(([key]) => !keys.includes(key)))
    expect(failure(() => parseUnetConfig(without('unet/config.json', 'use_linear_projection'), 'c'))).toBe(
      'CHECKPOINT_UNSUPPORTED: expected true for "use_linear_projection" in c but received false',
    )
    expect(
      parseVaeConfig(
        without(
          'vae/config.json',
          'force_upcast',
          'latents_mean',
          'latents_std',
          'mid_block_add_attention',
          'scaling_factor',
          'shift_factor',
          'use_post_quant_conv',
          'use_quant_conv',
        ),
        'c',
      ),
    ).toMatchObject({
      force_upcast: true,
      use_quant_conv: true,
      use_post_quant_conv: true,
      mid_block_add_attention: true,
      scaling_factor: 0.18215,
      shift_factor: 0,
    })
  })

  test.each([
    [
      'unet',
      'norm_num_groups',
      7,
      'expected a divisor of block_out_channels (16) for "norm_num_groups" in c but received 7',
    ],
    [
      'unet',
      'attention_head_dim',
      [2, 4],
      'expected 3 entries, as "block_out_channels" has, for "attention_head_dim" in c but received [2, 4]',
    ],
    [
      'unet',
      'attention_head_dim',
      [2, 4, 5],
      'expected a divisor of block_out_channels (64) for "attention_head_dim" in c but received 5',
    ],
    [
      'unet',
      'addition_time_embed_dim',
      7,
      'expected an even number for "addition_time_embed_dim" in c but received 7',
    ],
    [
      'unet',
      'addition_time_embed_dim',
      null,
      'expected a value of type number for "addition_time_embed_dim" in c but received null',
    ],
    [
      'vae',
      'norm_num_groups',
      5,
      'expected a divisor of block_out_channels (16) for "norm_num_groups" in c but received 5',
    ],
    ['vae', 'scaling_factor', 0, 'expected more than 0 for "scaling_factor" in c but received 0'],
    [
      'text_encoder',
      'num_attention_heads',
      5,
      'expected a divisor of hidden_size (32) for "num_attention_heads" in c but received 5',
    ],
    [
      'text_encoder',
      'num_hidden_layers',
      1,
      'expected at least 2 for "num_hidden_layers" in c but received 1',
    ],
  ])('refuses a %s with %s %j', (part, key, value, message) => {
    const parse = { unet: parseUnetConfig, vae: parseVaeConfig, text_encoder: parseClipTextConfig }[part]!
    expect(failure(() => parse({ ...json(`${part}/config.json`), [key]: value }, 'c'))).toBe(
      `CHECKPOINT_INVALID: ${message}`,
    )
  })

  const parsers = [
    [
      'scheduler/scheduler_config.json',
      (json: unknown, file: string) => parseSchedulerConfig(json, file, 'LCMScheduler'),
    ],
    ['text_encoder/config.json', parseClipTextConfig],
    ['unet/config.json', parseUnetConfig],
    ['vae/config.json', parseVaeConfig],
  ] as const
  test.each(parsers)('answers junk in %s with its own errors only', (file, parse) => {
    const junk = [null, -1, 0, 0.5, 1e300, '', 'x', [], {}, [[1, 2], [3]], [0, 0, 0], ['x', null], true]
    const known = json(file)
    const whole = [
      ...junk,
      ...Object.keys(known).flatMap(key => junk.map(value => ({ ...known, [key]: value }))),
    ]
    const answers = whole.map(value => failure(() => parse(value, file)).replace(/:.*/s, ''))
    expect([...new Set(answers)].sort()).toEqual(['CHECKPOINT_INVALID', 'CHECKPOINT_UNSUPPORTED', 'no error'])
  })

  test.each([
    ['latents_mean', [0, 0, 0, 0]],
    ['latents_std', [1, 1, 1, 1]],
    ['down_block_types', ['DownEncoderBlock2D', 'AttnDownEncoderBlock2D']],
    ['up_block_types', ['AttnUpDecoderBlock2D']],
  ])('refuses a VAE with %s %j', (key, value) => {
    expect(failure(() => parseVaeConfig({ ...json('vae/config.json'), [key]: value }, 'c'))).toMatch(
      new RegExp(`^CHECKPOINT_UNSUPPORTED: .*"${key}"`),
    )
  })

  test('refuses a text encoder of another length', () => {
    const raw = { ...json('text_encoder/config.json'), max_position_embeddings: 248 }
    expect(failure(() => parseClipTextConfig(raw, 'c'))).toBe(
      'CHECKPOINT_UNSUPPORTED: expected 77 for "max_position_embeddings" in c but received 248',
    )
  })

  // The release's file holds this key of DDIM too.
  const scheduler = { ...json('scheduler/scheduler_config.json'), clip_sample: false }

  test.each([
    ['EulerDiscreteScheduler', 'euler', {}],
    ['EulerAncestralDiscreteScheduler', 'euler_ancestral', {}],
    ['DPMSolverMultistepScheduler', 'dpmpp_2m', { use_karras_sigmas: true }],
    ['DDIMScheduler', 'ddim', { set_alpha_to_one: false }],
    ['LCMScheduler', 'lcm', { original_inference_steps: 40 }],
  ])('reads a %s', (name, sampler, keys) => {
    expect(parseSchedulerConfig({ ...scheduler, ...keys }, 'c', name)).toMatchObject({ sampler, ...keys })
  })

  test('defaults are those of the class', () => {
    expect(parseSchedulerConfig({}, 'c', 'EulerDiscreteScheduler')).toMatchObject({
      beta_start: 0.0001,
      beta_schedule: 'linear',
      timestep_spacing: 'linspace',
      steps_offset: 0,
    })
    expect(parseSchedulerConfig({}, 'c', 'LCMScheduler')).toMatchObject({
      beta_start: 0.00085,
      beta_schedule: 'scaled_linear',
      timestep_spacing: 'leading',
    })
  })

  test.each([
    ['EulerDiscreteScheduler', 'interpolation_type', 'log_linear'],
    ['EulerDiscreteScheduler', 'timestep_type', 'continuous'],
    ['EulerDiscreteScheduler', 'sigma_min', 0.03],
    ['EulerDiscreteScheduler', 'final_sigmas_type', 'sigma_min'],
    ['EulerDiscreteScheduler', 'use_exponential_sigmas', true],
    ['EulerDiscreteScheduler', 'use_beta_sigmas', true],
    ['EulerAncestralDiscreteScheduler', 'trained_betas', [0.1]],
    ['DPMSolverMultistepScheduler', 'algorithm_type', 'sde-dpmsolver++'],
    ['DPMSolverMultistepScheduler', 'solver_order', 3],
    ['DPMSolverMultistepScheduler', 'solver_type', 'heun'],
    ['DPMSolverMultistepScheduler', 'thresholding', true],
    ['DPMSolverMultistepScheduler', 'lower_order_final', false],
    ['DPMSolverMultistepScheduler', 'use_lu_lambdas', true],
    ['DPMSolverMultistepScheduler', 'use_flow_sigmas', true],
    ['DPMSolverMultistepScheduler', 'variance_type', 'learned'],
    ['DDIMScheduler', 'clip_sample', undefined],
    ['LCMScheduler', 'clip_sample', true],
    ['LCMScheduler', 'timestep_scaling', 1],
  ])('refuses a %s with %s %j', (name, key, value) => {
    expect(failure(() => parseSchedulerConfig({ ...scheduler, [key]: value }, 'c', name))).toMatch(
      new RegExp(`^CHECKPOINT_UNSUPPORTED: .*"${key}"`),
    )
  })
})
