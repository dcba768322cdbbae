import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import {
  type MgmConfig,
  parseClipConfig,
  parseGenerationConfig,
  parseMgmConfig,
  parseOpenClipConfig,
  parsePreprocessorConfig,
} from '../../lib/checkpoint/config.ts'
import { failure } from '../helpers/failure.ts'

const FIXTURES = join(import.meta.dirname, '../fixtures')
const json = (file: string) => JSON.parse(readFileSync(file, 'utf8'))

describe('parseMgmConfig', () => {
  const cases: [string, Partial<MgmConfig>][] = [
    [
      'mgm-gemma-tiny/MGM-2B',
      {
        family: 'gemma',
        head_dim: 32,
        num_key_value_heads: 1,
        hidden_act: 'gelu_pytorch_tanh',
        tie_word_embeddings: true,
        rms_norm_eps: 1e-6,
      },
    ],
    [
      'mgm-vicuna-tiny/MGM-7B',
      {
        family: 'llama',
        head_dim: 16,
        num_key_value_heads: 4,
        hidden_act: 'silu',
        tie_word_embeddings: false,
        sliding_window: null,
      },
    ],
    [
      'mgm-llama3-tiny/MGM-8B',
      { family: 'llama', head_dim: 16, num_key_value_heads: 2, rope_theta: 5e5, vocab_size: 490 },
    ],
    [
      'mgm-mixtral-tiny/MGM-8x7B',
      {
        family: 'mixtral',
        num_local_experts: 8,
        num_experts_per_tok: 2,
        rope_theta: 1e6,
        sliding_window: null,
      },
    ],
    [
      'mgm-yi-tiny/MGM-34B',
      { family: 'llama', head_dim: 8, num_hidden_layers: 4, rope_theta: 5e6, image_aspect_ratio: null },
    ],
    [
      'mgm-hd-tiny/MGM-7B-HD',
      {
        image_grid: 2,
        image_global: true,
        image_size_aux: 256,
        optimize_vision_tower_aux: true,
        tokenizer_model_max_length: 4096,
      },
    ],
  ]
  it.each(cases)('reads %s', (folder, expected) => {
    const file = join(FIXTURES, folder, 'config.json')
    const raw = json(file)
    const config = parseMgmConfig(raw, file)
    expect(config).toMatchObject({
      mm_hidden_size: 64,
      mm_hidden_size_aux: 180,
      mm_vision_select_layer: -2,
      ...expected,
    })
    // Whatever the file states is what comes out.
    for (const [key, value] of Object.entries(config))
      if (key in raw) expect([key, value]).toEqual([key, raw[key]])
    expect('num_local_experts' in config).toBe(config.family === 'mixtral')
  })

  // The signatures of LlamaConfig, GemmaConfig, MixtralConfig and MistralConfig in transformers 4.57.6.
  const llama = {
    vocab_size: 32000,
    hidden_size: 4096,
    intermediate_size: 11008,
    num_hidden_layers: 32,
    num_attention_heads: 32,
    num_key_value_heads: 32,
    head_dim: 128,
    hidden_act: 'silu',
    max_position_embeddings: 2048,
    rms_norm_eps: 1e-6,
    pad_token_id: null,
    bos_token_id: 1,
    eos_token_id: 2,
    tie_word_embeddings: false,
    rope_theta: 1e4,
    rope_scaling: null,
    sliding_window: null,
  }
  const gemma = {
    ...llama,
    vocab_size: 256000,
    hidden_size: 3072,
    intermediate_size: 24576,
    num_hidden_layers: 28,
    num_attention_heads: 16,
    num_key_value_heads: 16,
    head_dim: 256,
    hidden_act: 'gelu_pytorch_tanh',
    max_position_embeddings: 8192,
    pad_token_id: 0,
    eos_token_id: 1,
    bos_token_id: 2,
    tie_word_embeddings: true,
  }
  const mistral = {
    ...llama,
    intermediate_size: 14336,
    num_key_value_heads: 8,
    max_position_embeddings: 131072,
    sliding_window: 4096,
  }
  const mixtral = {
    ...mistral,
    rms_norm_eps: 1e-5,
    rope_theta: 1e6,
    sliding_window: null,
    num_experts_per_tok: 2,
    num_local_experts: 8,
  }
  it.each([
    ['mgm', llama],
    ['mgm_gemma', gemma],
    ['mgm_mistral', mistral],
    ['mgm_mixtral', mixtral],
    ['mini_gemini', llama],
  ])('fills in the defaults of %s', (model_type, expected) => {
    const config = parseMgmConfig({ model_type }, 'config.json')
    expect(config).toMatchObject(expected)
    expect(config).toMatchObject({
      mm_vision_tower: null,
      mm_use_im_patch_token: true,
      mm_use_im_start_end: false,
      optimize_vision_tower_aux: false,
      image_grid: 1,
      image_global: false,
      image_size_aux: 320,
      image_aspect_ratio: null,
      tokenizer_model_max_length: 2048,
    })
  })

  it('derives head_dim and key-value heads', () => {
    const config = parseMgmConfig(
      { model_type: 'mgm', hidden_size: 96, num_attention_heads: 6, num_key_value_heads: null },
      'f',
    )
    expect(config).toMatchObject({ head_dim: 16, num_key_value_heads: 6 })
    expect(parseMgmConfig({ model_type: 'mgm', head_dim: 64 }, 'f').head_dim).toBe(64)
    expect(parseMgmConfig({ model_type: 'mgm_mistral', sliding_window: null }, 'f').sliding_window).toBeNull()
  })

  it('accepts linear rope scaling in its spellings', () => {
    const scaling = (rope: object) => parseMgmConfig({ model_type: 'mgm', ...rope }, 'f')
    expect(scaling({ rope_scaling: { type: 'linear', factor: 2 } }).rope_scaling).toEqual({
      type: 'linear',
      factor: 2,
    })
    expect(scaling({ rope_scaling: { rope_type: 'linear', factor: 4.5 } }).rope_scaling).toEqual({
      type: 'linear',
      factor: 4.5,
    })
    expect(scaling({ rope_scaling: { rope_type: 'default' } }).rope_scaling).toBeNull()
    expect(scaling({ rope_parameters: { rope_type: 'linear', factor: 2, rope_theta: 7 } })).toMatchObject({
      rope_theta: 7,
      rope_scaling: { factor: 2 },
    })
  })

  it.each<[string, unknown, RegExp]>([
    [
      'another model',
      { model_type: 'llava' },
      /UNSUPPORTED: expected one of mgm, mgm_gemma, .* for "model_type" in f\.json but received "llava"/,
    ],
    ['a name of Object', { model_type: 'constructor' }, /UNSUPPORTED: .*"model_type"/],
    [
      'no model_type',
      {},
      /INVALID: expected a value of type string for "model_type" in f\.json but received undefined/,
    ],
    ['no object', [], /INVALID: expected a value of type object for the file/],
    ['null', null, /INVALID: .* received null/],
    [
      'text for a number',
      { hidden_size: '64' },
      /INVALID: expected .* number for "hidden_size" in f\.json but received "64"/,
    ],
    [
      'a fraction',
      { num_hidden_layers: 2.5 },
      /INVALID: expected an integer for "num_hidden_layers" .* 2\.5/,
    ],
    ['zero layers', { num_hidden_layers: 0 }, /INVALID: expected at least 1 for "num_hidden_layers" .* 0/],
    ['absurd sizes', { hidden_size: 2 ** 30 }, /INVALID: expected at most 131072 for "hidden_size"/],
    ['a negative epsilon', { rms_norm_eps: -1 }, /INVALID: expected more than 0 for "rms_norm_eps"/],
    [
      'an unknown activation',
      { hidden_act: 'relu' },
      /INVALID: expected one of "silu", .* for "hidden_act" .* "relu"/,
    ],
    [
      'heads that do not divide',
      { hidden_size: 100, num_attention_heads: 3 },
      /INVALID: .*multiple of num_attention_heads \(3\) for "hidden_size"/,
    ],
    [
      'kv heads that do not divide',
      { num_attention_heads: 32, num_key_value_heads: 5 },
      /INVALID: .*divisor of .*\(32\) for "num_key_value_heads" .* 5/,
    ],
    ['an odd head', { head_dim: 15 }, /INVALID: expected an even number/],
    ['a grid too fine', { image_grid: 1000 }, /INVALID: expected at most 16 for "image_grid"/],
    [
      'dynamic rope',
      { rope_scaling: { type: 'dynamic', factor: 2 } },
      /UNSUPPORTED: expected linear or no rope scaling .* "dynamic"/,
    ],
    [
      'a rope factor of text',
      { rope_scaling: { type: 'linear', factor: '2' } },
      /INVALID: .*"rope_scaling\.factor".* "2"/,
    ],
    ['biases', { attention_bias: true }, /UNSUPPORTED: expected no attention_bias/],
    ['quantized weights', { quantization_config: { bits: 4 } }, /UNSUPPORTED: expected unquantized/],
    [
      'another projector',
      { mm_projector_type: 'resampler' },
      /UNSUPPORTED: .*"mm_projector_type" .* "resampler"/,
    ],
    [
      'more experts a token than there are',
      { model_type: 'mgm_mixtral', num_local_experts: 2, num_experts_per_tok: 3 },
      /INVALID: expected at most num_local_experts \(2\)/,
    ],
  ])('refuses %s', (_, value, message) => {
    const whole = value === null || Array.isArray(value) || Object.keys(value as object).length === 0
    expect(
      failure(() => parseMgmConfig(whole ? value : { model_type: 'mgm', ...(value as object) }, 'f.json')),
    ).toMatch(message)
  })
})

describe('parseClipConfig', () => {
  it('takes the vision part of a whole CLIP', () => {
    const file = join(FIXTURES, 'mgm-gemma-tiny/model_zoo/OpenAI/clip-vit-large-patch14-336/config.json')
    expect(parseClipConfig(json(file), file)).toEqual({
      hidden_size: 64,
      intermediate_size: 128,
      num_hidden_layers: 4,
      num_attention_heads: 4,
      num_channels: 3,
      image_size: 56,
      patch_size: 14,
      hidden_act: 'quick_gelu',
      layer_norm_eps: 1e-5,
    })
  })

  it('takes a bare vision config, and fills in the defaults', () => {
    const base = {
      hidden_size: 768,
      intermediate_size: 3072,
      num_hidden_layers: 12,
      num_attention_heads: 12,
      num_channels: 3,
      image_size: 224,
      patch_size: 32,
      hidden_act: 'quick_gelu',
      layer_norm_eps: 1e-5,
    }
    expect(parseClipConfig({ model_type: 'clip_vision_model' }, 'f')).toEqual(base)
    expect(parseClipConfig({ patch_size: 14, hidden_size: 24, hidden_act: 'gelu' }, 'f')).toEqual({
      ...base,
      patch_size: 14,
      hidden_size: 24,
      hidden_act: 'gelu',
    })
    expect(parseClipConfig({ model_type: 'clip', hidden_size: 1 }, 'f')).toEqual(base) // A whole CLIP's own numbers are not the tower's.
    expect(
      parseClipConfig({ vision_config: { patch_size: 16 }, vision_config_dict: { patch_size: 14 } }, 'f')
        .patch_size,
    ).toBe(14)
  })

  it('refuses what is no CLIP', () => {
    expect(failure(() => parseClipConfig({ model_type: 'siglip' }, 'f'))).toMatch(/UNSUPPORTED: .*"siglip"/)
    expect(failure(() => parseClipConfig({ hidden_size: 10, num_attention_heads: 3 }, 'f'))).toMatch(
      /INVALID: .*"num_attention_heads"/,
    )
    expect(failure(() => parseClipConfig({ vision_config: { image_size: 8 } }, 'f'))).toMatch(
      /INVALID: expected at most image_size \(8\)/,
    )
    expect(failure(() => parseClipConfig({ vision_config: 3 }, 'f'))).toMatch(/INVALID: .*"vision_config"/)
  })
})

describe('parsePreprocessorConfig', () => {
  it('reads sizes as numbers and as objects alike', () => {
    const folder = (name: string) =>
      join(FIXTURES, name, 'model_zoo/OpenAI/clip-vit-large-patch14-336/preprocessor_config.json')
    const numbers = parsePreprocessorConfig(json(folder('mgm-gemma-tiny')), 'f')
    const objects = parsePreprocessorConfig(json(folder('mgm-llama3-tiny')), 'f')
    expect(objects).toEqual(numbers)
    expect(numbers).toMatchObject({
      size: { shortest_edge: 56 },
      crop_size: { height: 56, width: 56 },
      resample: 3,
      image_mean: [0.48145466, 0.4578275, 0.40821073],
      rescale_factor: 1 / 255,
    })
    expect(parsePreprocessorConfig({ size: { height: 5, width: 6 } }, 'f').size).toEqual({
      height: 5,
      width: 6,
    })
  })

  it('refuses impossible numbers', () => {
    expect(failure(() => parsePreprocessorConfig({ image_std: [1, 0, 1] }, 'f'))).toMatch(
      /INVALID: expected at least .* for "image_std\.1" in f but received 0/,
    )
    expect(failure(() => parsePreprocessorConfig({ image_mean: [1, 0] }, 'f'))).toMatch(
      /INVALID: .*image_mean/,
    )
    expect(failure(() => parsePreprocessorConfig({ size: { longest_edge: 3 } }, 'f'))).toMatch(
      /INVALID: .*"size"/,
    )
    expect(failure(() => parsePreprocessorConfig({ resample: 9 }, 'f'))).toMatch(
      /INVALID: expected at most 5 for "resample"/,
    )
  })
})

describe('the other configs', () => {
  it('read open_clip_config.json', () => {
    const aux = join(FIXTURES, 'mgm-yi-tiny/model_zoo/OpenAI')
    const folder = readdirSync(aux).find(name => name.includes('convnext'))!
    expect(parseOpenClipConfig(json(join(aux, folder, 'open_clip_config.json')), 'f')).toEqual({
      timm_model_name: 'convnext_large',
      image_size: 320,
    })
    expect(parseOpenClipConfig({}, 'f')).toEqual({ timm_model_name: null, image_size: null })
  })

  it('read generation_config.json', () => {
    expect(
      parseGenerationConfig(json(join(FIXTURES, 'mgm-yi-tiny/MGM-34B/generation_config.json')), 'f'),
    ).toMatchObject({ eos_token_id: 7, bos_token_id: 1, do_sample: false, top_p: null })
    expect(parseGenerationConfig({ eos_token_id: [1, 2] }, 'f').eos_token_id).toEqual([1, 2])
    expect(failure(() => parseGenerationConfig({ eos_token_id: 'x' }, 'f'))).toMatch(
      /INVALID: .*"eos_token_id" in f but received "x"/,
    )
  })
})
