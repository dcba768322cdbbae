import {
  cpSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  unlinkSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { afterAll, describe, expect, it } from 'vitest'
import { inspectCheckpoint } from '../../lib/checkpoint/inspect.ts'
import type { TensorEntry } from '../../lib/checkpoint/source.ts'
import {
  type Checkpoint,
  CONVNEXT_IGNORED,
  clipIgnored,
  clipLayersUsed,
  convNextGeometry,
  languageIgnored,
  openCheckpoint,
  PARTS,
  TensorMap,
} from '../../lib/checkpoint/weights.ts'
import { failure } from '../helpers/failure.ts'

const FIXTURES = join(import.meta.dirname, '../fixtures')
const CASES = ['gemma', 'vicuna', 'llama3', 'mixtral', 'yi', 'hd']
const CLIP = 'model_zoo/OpenAI/clip-vit-large-patch14-336'
const CONVNEXT = 'model_zoo/OpenAI/openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup'

const scratch = mkdtempSync(join(tmpdir(), 'mgm-weights-'))
afterAll(() => rmSync(scratch, { recursive: true }))

function checkpointOf(caseFolder: string): string {
  return join(caseFolder, readdirSync(caseFolder).find(name => name.startsWith('MGM-'))!)
}
const fixture = (name: string) => checkpointOf(join(FIXTURES, `mgm-${name}-tiny`))

let copies = 0
/** A writable copy of a case without its goldens; returns the checkpoint folder. */
function copy(name: string): string {
  const from = join(FIXTURES, `mgm-${name}-tiny`)
  const to = join(scratch, `copy-${copies++}`, `mgm-${name}-tiny`)
  mkdirSync(to, { recursive: true })
  for (const folder of ['model_zoo', checkpointOf(from).slice(from.length + 1)])
    cpSync(join(from, folder), join(to, folder), { recursive: true })
  return checkpointOf(to)
}

function editJson(file: string, edit: (json: Record<string, unknown>) => void): void {
  const json = JSON.parse(readFileSync(file, 'utf8'))
  edit(json)
  writeFileSync(file, JSON.stringify(json))
}

/** The first two floats of a tensor of f32 or bf16. */
function head(entry: TensorEntry): number[] {
  const bytes = readFileSync(entry.file).subarray(entry.offset)
  return [0, 1].map(i =>
    entry.dtype === 'bf16'
      ? new Float32Array(Uint32Array.of(bytes.readUInt16LE(2 * i) << 16).buffer)[0]!
      : bytes.readFloatLE(4 * i),
  )
}

/** Takes every tensor the config calls for, written out from the architecture, and checks that none is left. */
function takeAll({ config: c, clipConfig, language, clip, convnext, mining, projector }: Checkpoint): void {
  const h = c.hidden_size
  language.take('model.embed_tokens.weight', [null, h])
  language.take('model.norm.weight', [h])
  if (!c.tie_word_embeddings) language.take('lm_head.weight', [null, h])
  for (let i = 0; i < c.num_hidden_layers; i++) {
    const layer = `model.layers.${i}`
    language.take(`${layer}.input_layernorm.weight`, [h])
    language.take(`${layer}.post_attention_layernorm.weight`, [h])
    language.take(`${layer}.self_attn.q_proj.weight`, [c.num_attention_heads * c.head_dim, h])
    for (const kv of ['k', 'v'])
      language.take(`${layer}.self_attn.${kv}_proj.weight`, [c.num_key_value_heads * c.head_dim, h])
    language.take(`${layer}.self_attn.o_proj.weight`, [h, c.num_attention_heads * c.head_dim])
    if (c.family === 'mixtral') {
      language.take(`${layer}.block_sparse_moe.gate.weight`, [c.num_local_experts!, h])
      for (let e = 0; e < c.num_local_experts!; e++) {
        const expert = `${layer}.block_sparse_moe.experts.${e}`
        for (const [w, shape] of [
          ['w1', [c.intermediate_size, h]],
          ['w2', [h, c.intermediate_size]],
          ['w3', [c.intermediate_size, h]],
        ] as const)
          language.take(`${expert}.${w}.weight`, shape)
      }
    } else {
      for (const up of ['gate', 'up'])
        language.take(`${layer}.mlp.${up}_proj.weight`, [c.intermediate_size, h])
      language.take(`${layer}.mlp.down_proj.weight`, [h, c.intermediate_size])
    }
  }
  language.finish(languageIgnored(c))

  const w = clipConfig.hidden_size
  const both = (map: TensorMap, name: string, weight: number[]) => {
    map.take(`${name}.weight`, weight)
    map.take(`${name}.bias`, [weight[0]!])
  }
  clip.take('vision_model.embeddings.class_embedding', [w])
  clip.take('vision_model.embeddings.patch_embedding.weight', [
    w,
    3,
    clipConfig.patch_size,
    clipConfig.patch_size,
  ])
  clip.take('vision_model.embeddings.position_embedding.weight', [
    (clipConfig.image_size / clipConfig.patch_size) ** 2 + 1,
    w,
  ])
  both(clip, 'vision_model.pre_layrnorm', [w])
  for (let i = 0; i < clipConfig.num_hidden_layers - 1; i++) {
    const layer = `vision_model.encoder.layers.${i}`
    for (const norm of ['layer_norm1', 'layer_norm2']) both(clip, `${layer}.${norm}`, [w])
    for (const p of ['q_proj', 'k_proj', 'v_proj', 'out_proj']) both(clip, `${layer}.self_attn.${p}`, [w, w])
    both(clip, `${layer}.mlp.fc1`, [clipConfig.intermediate_size, w])
    both(clip, `${layer}.mlp.fc2`, [w, clipConfig.intermediate_size])
  }
  clip.finish(clipIgnored(clipConfig, c.mm_vision_select_layer))

  const { dims, depths } = convNextGeometry(convnext)
  both(convnext, 'stem.0', [dims[0]!, 3, 4, 4])
  both(convnext, 'stem.1', [dims[0]!])
  dims.forEach((d, s) => {
    if (s > 0) {
      both(convnext, `stages.${s}.downsample.0`, [dims[s - 1]!])
      both(convnext, `stages.${s}.downsample.1`, [d, dims[s - 1]!, 2, 2])
    }
    for (let b = 0; b < depths[s]!; b++) {
      const block = `stages.${s}.blocks.${b}`
      both(convnext, `${block}.conv_dw`, [d, 1, 7, 7])
      both(convnext, `${block}.norm`, [d])
      both(convnext, `${block}.mlp.fc1`, [4 * d, d])
      both(convnext, `${block}.mlp.fc2`, [d, 4 * d])
      convnext.take(`${block}.gamma`, [d])
    }
  })
  convnext.finish(CONVNEXT_IGNORED)

  for (const [name, inner] of [
    ['query', w],
    ['aux', c.mm_hidden_size_aux],
    ['val', c.mm_hidden_size_aux],
  ] as const) {
    both(mining, `vlm_uni_${name}_projector.0`, [inner])
    both(mining, `vlm_uni_${name}_projector.1`, [w, inner])
  }
  mining.finish()
  both(projector, 'mm_projector.0', [h, w])
  both(projector, 'mm_projector.2', [h, h])
  projector.finish()
}

describe('openCheckpoint', () => {
  it.each(CASES)('finds exactly the tensors of %s', name => {
    const checkpoint = openCheckpoint(fixture(name))
    takeAll(checkpoint)
    expect(convNextGeometry(checkpoint.convnext)).toEqual({ dims: [12, 24, 48, 96], depths: [1, 1, 2, 1] })
    expect(checkpoint.openClip).toEqual({ timm_model_name: 'convnext_large', image_size: 320 })
    for (const part of PARTS)
      for (const e of checkpoint[part].entries())
        expect(e.offset + e.byteLength).toBeLessThanOrEqual(statSync(e.file).size)
    expect(checkpoint.totalBytes).toBe(
      PARTS.flatMap(part => checkpoint[part].entries()).reduce((n, e) => n + e.byteLength, 0),
    )
  })

  it('takes both towers of an HD checkpoint from the checkpoint', () => {
    const folder = fixture('hd')
    const { clip, convnext, files } = openCheckpoint(folder)
    for (const map of [clip, convnext]) {
      for (const e of map
        .entries()
        .filter(e => /^(vision_model|stem|stages)\./.test(e.name) && !e.name.endsWith('position_ids')))
        expect([e.name, dirname(e.file), e.dtype]).toEqual([e.name, folder, 'bf16'])
    }
    expect(new Set(files.map(file => dirname(file)))).toEqual(
      new Set([folder, join(folder, '..', CLIP), join(folder, '..', CONVNEXT)]),
    )
    const names = [
      'vision_model.encoder.layers.0.mlp.fc1.weight',
      'stages.1.blocks.0.mlp.fc1.weight',
    ] as const
    const other = openCheckpoint(fixture('vicuna'))
    expect(other.clip.peek(names[0])!.file).toContain(CLIP)
    expect(other.convnext.peek(names[1])!.file).toContain(CONVNEXT)
    expect(head(clip.peek(names[0])!)).not.toEqual(head(other.clip.peek(names[0])!))
  })

  it('takes ConvNeXt from its folder unless optimize_vision_tower_aux is set, CLIP from the checkpoint either way', () => {
    const folder = copy('hd')
    editJson(join(folder, 'config.json'), config => {
      config.optimize_vision_tower = false
      config.optimize_vision_tower_aux = false
    })
    const checkpoint = openCheckpoint(folder)
    expect(checkpoint.convnext.peek('stem.0.weight')!.file).toContain(CONVNEXT)
    expect(checkpoint.convnext.peek('stages.0.blocks.0.gamma')!.dtype).toBe('f32')
    expect(checkpoint.clip.peek('vision_model.pre_layrnorm.weight')!.file).toContain(folder)
    takeAll(checkpoint)
  })

  it('does not need the ConvNeXt folder of a checkpoint that brings its own', () => {
    const folder = copy('hd')
    rmSync(join(folder, '..', CONVNEXT), { recursive: true })
    const checkpoint = openCheckpoint(folder)
    expect(checkpoint.openClip).toBeNull()
    takeAll(checkpoint)
    expect(inspectCheckpoint(folder).missing).toEqual([])
  })

  it('reads the towers from PyTorch archives where there is no safetensors file', () => {
    const folder = copy('gemma')
    const before = openCheckpoint(fixture('gemma'))
    rmSync(join(folder, '..', CLIP, 'model.safetensors'))
    rmSync(join(folder, '..', CONVNEXT, 'open_clip_pytorch_model.safetensors'))
    const after = openCheckpoint(folder)
    expect(after.files.filter(file => file.endsWith('.bin'))).toHaveLength(2)
    for (const [part, name] of [
      ['clip', 'vision_model.encoder.layers.2.mlp.fc2.bias'],
      ['convnext', 'stages.3.downsample.1.weight'],
    ] as const)
      expect(head(after[part].peek(name)!)).toEqual(head(before[part].peek(name)!))
    takeAll(after)
  })

  it('reads a language model from PyTorch shards and their index', () => {
    const folder = copy('vicuna')
    for (const name of readdirSync(folder)) if (name.includes('safetensors')) rmSync(join(folder, name))
    // Three archives whose names and shapes do not matter to the opening: it must find, merge and sort them.
    const archives = join(FIXTURES, 'torch-archive')
    cpSync(join(archives, 'parameters.bin'), join(folder, 'pytorch_model-00001-of-00002.bin'))
    cpSync(join(archives, 'proto.bin'), join(folder, 'pytorch_model-00002-of-00002.bin'))
    const weight_map: Record<string, string> = { constructor: 'pytorch_model-00002-of-00002.bin' }
    for (const name of ['0.weight', '0.bias', '1.weight', '1.bias'])
      weight_map[name] = 'pytorch_model-00001-of-00002.bin'
    const text = JSON.stringify({ weight_map }).replace(
      '{"constructor"',
      '{"__proto__":"pytorch_model-00002-of-00002.bin","constructor"',
    )
    writeFileSync(join(folder, 'pytorch_model.bin.index.json'), text)
    const { language } = openCheckpoint(folder)
    expect(language.names().sort()).toEqual([
      '0.bias',
      '0.weight',
      '1.bias',
      '1.weight',
      '__proto__',
      'constructor',
    ])
    expect(head(language.take('0.weight', [3, 2]))).toEqual([1, 1])
  })

  it('finds towers beside the checkpoint, by absolute path and by option, through links', () => {
    const folder = copy('llama3')
    const moved = join(scratch, 'towers')
    mkdirSync(moved)
    renameSync(join(folder, '..', CLIP), join(moved, 'clip'))
    renameSync(join(folder, '..', CONVNEXT), join(moved, 'convnext'))
    const text = failure(() => openCheckpoint(folder))
    expect(text).toMatch(
      /^CHECKPOINT_INVALID: expected the folder of mm_vision_tower "model_zoo\/OpenAI\/clip/,
    )
    for (const place of [join(folder, CLIP), join(folder, '..', CLIP), join(process.cwd(), CLIP)])
      expect(text).toContain(place)
    expect(text).toContain('option visionTower')
    expect(failure(() => openCheckpoint(folder, { visionTower: join(moved, 'clip') }))).toMatch(
      /mm_vision_tower_aux .*option visionTowerAux/,
    )
    expect(failure(() => openCheckpoint(folder, { visionTower: join(moved, 'none') }))).toMatch(
      /none at .*towers\/none;/,
    )
    takeAll(
      openCheckpoint(folder, { visionTower: join(moved, 'clip'), visionTowerAux: join(moved, 'convnext') }),
    )

    symlinkSync(join(moved, 'clip'), join(folder, '..', 'clip-link'))
    editJson(join(folder, 'config.json'), config => {
      config.mm_vision_tower = 'somewhere/else/clip-link'
      config.mm_vision_tower_aux = join(moved, 'convnext')
    })
    takeAll(openCheckpoint(folder))
  })

  it.each<[string, (folder: string) => void, RegExp]>([
    ['no folder', folder => rmSync(folder, { recursive: true }), /expected a checkpoint folder at/],
    ['no config', folder => unlinkSync(join(folder, 'config.json')), /config\.json but ENOENT/],
    [
      'a broken config',
      folder => writeFileSync(join(folder, 'config.json'), '{'),
      /expected UTF-8 JSON in .*config\.json/,
    ],
    [
      'a missing shard',
      folder => unlinkSync(join(folder, 'model-00002-of-00002.safetensors')),
      /1 of them are missing: model-00002-of-00002/,
    ],
    [
      'a CLIP of another width',
      folder =>
        editJson(join(folder, '..', CLIP, 'config.json'), c =>
          Object.assign(c.vision_config as object, { hidden_size: 32 }),
        ),
      /CLIP tower of width 64 .* received 32/,
    ],
    [
      'a ConvNeXt of another width',
      folder => editJson(join(folder, 'config.json'), c => Object.assign(c, { mm_hidden_size_aux: 2880 })),
      /2880 channels .* 12 \+ 24 \+ 48 \+ 96 = 180/,
    ],
    [
      'a folder for a weight file',
      folder => {
        unlinkSync(join(folder, 'model-00001-of-00002.safetensors'))
        mkdirSync(join(folder, 'model-00001-of-00002.safetensors'))
      },
      /expected a regular file/,
    ],
    [
      'no tower in the config',
      folder => editJson(join(folder, 'config.json'), c => Object.assign(c, { mm_vision_tower: null })),
      /"mm_vision_tower" in .*option visionTower/,
    ],
  ])('refuses %s', (_, damage, message) => {
    const folder = copy('mixtral')
    damage(folder)
    const text = failure(() => openCheckpoint(folder))
    expect(text).toMatch(/^CHECKPOINT_INVALID: /)
    expect(text).toMatch(message)
  })
})

const entry = (name: string, shape: number[], more: Partial<TensorEntry> = {}): [string, TensorEntry] => [
  name,
  { name, dtype: 'f32', shape, offset: 0, byteLength: 4, file: '/x/model.safetensors', ...more },
]

describe('TensorMap', () => {
  const map = () =>
    new TensorMap('/x', [
      entry('w', [2, 3]),
      entry('ids', [1], { dtype: 'i64' }),
      entry('f8', [1], { dtype: 'f8_e4m3' }),
      entry('t', [2, 3], { strides: [1, 2] }),
      entry('gaps', [2, 3], { strides: [6, 2] }),
    ])

  it('checks shapes, with null for any size', () => {
    expect(map().take('w', [2, 3]).shape).toEqual([2, 3])
    expect(map().take('w', [null, 3]).dtype).toBe('f32')
    expect(failure(() => map().take('w', [3, 2]))).toBe(
      'CHECKPOINT_INVALID: expected tensor "w" of shape [3, 2] in /x/model.safetensors but found [2, 3]',
    )
    expect(failure(() => map().take('w', [null, 4]))).toMatch(/of shape \[\*, 4\]/)
    expect(failure(() => map().take('w', [6]))).toMatch(/of shape \[6\] .* \[2, 3\]/)
    expect(failure(() => map().take('v', [2]))).toBe(
      'CHECKPOINT_INVALID: expected tensor "v" of shape [2] in /x but found none',
    )
  })

  it('refuses dtypes it cannot run, when they are used', () => {
    expect(failure(() => map().take('ids', [1]))).toMatch(/^CHECKPOINT_UNSUPPORTED: .*"ids" .* found i64/)
    expect(failure(() => map().take('f8', [1]))).toMatch(/^CHECKPOINT_UNSUPPORTED: .*f8_e4m3/)
  })

  it('refuses strides unless they are asked for and permute an axis order', () => {
    expect(failure(() => map().take('t', [2, 3]))).toMatch(
      /^CHECKPOINT_UNSUPPORTED: .*strides \[1, 2\].*contiguous/,
    )
    expect(map().take('t', [2, 3], { permuted: true }).strides).toEqual([1, 2])
    expect(failure(() => map().take('gaps', [2, 3], { permuted: true }))).toMatch(/^CHECKPOINT_UNSUPPORTED/)
  })

  it('names what is left over', () => {
    const m = map()
    m.take('w', [2, 3])
    expect(failure(() => m.finish([/^f8$/, /^t$/]))).toBe(
      'CHECKPOINT_INVALID: expected only the tensors of the config in /x but found also "ids", "gaps"',
    )
    expect(() => m.finish([/^f8$/, /^t$/, /^ids/, /gaps/])).not.toThrow()
  })
})

describe('geometry', () => {
  const conv = (s: number, b: number, c: number) =>
    entry(`stages.${s}.blocks.${b}.conv_dw.weight`, [c, 1, 7, 7])
  it('of ConvNeXt comes from the weights', () => {
    expect(convNextGeometry(new TensorMap('x', [conv(1, 0, 6), conv(0, 1, 3), conv(0, 0, 3)]))).toEqual({
      dims: [3, 6],
      depths: [2, 1],
    })
  })
  it.each([
    ['no stages', [], /stages in x but found none/],
    ['a missing stage', [conv(1, 0, 6)], /stage 0 of x/],
    ['a missing block', [conv(0, 1, 6)], /stage 0 of x/],
    ['uneven widths', [conv(0, 0, 6), conv(0, 1, 7)], /widths 6, 7/],
  ])('refuses %s', (_, entries, message) => {
    expect(failure(() => convNextGeometry(new TensorMap('x', entries)))).toMatch(message)
  })

  it('counts CLIP layers as hidden_states does', () => {
    const clip = openCheckpoint(fixture('yi')).clipConfig
    expect([-1, -2, -5, 0, 4].map(select => clipLayersUsed(clip, select))).toEqual([4, 3, 0, 0, 4])
    expect(failure(() => clipLayersUsed(clip, -6))).toMatch(
      /CHECKPOINT_INVALID: .*"mm_vision_select_layer" but received -6/,
    )
  })
})

describe('inspectCheckpoint', () => {
  it('counts what the model uses', () => {
    const summary = inspectCheckpoint(fixture('vicuna'))
    // hidden 64, intermediate 176, 3 layers, vocabulary 480.
    const language = 2 * 480 * 64 + 64 + 3 * (2 * 64 + 4 * 64 * 64 + 3 * 64 * 176)
    expect(summary.parts.language).toEqual({
      tensors: 3 + 3 * 9,
      parameters: language,
      bytes: 2 * language,
      dtypes: { bf16: 30 },
    })
    expect(summary.parts.projector.parameters).toBe(2 * (64 * 64 + 64))
    expect(summary.parts.mining.parameters).toBe(64 * 2 + 64 * 64 + 64 + 2 * (180 * 2 + 64 * 180 + 64))
    const clipLayer = 4 * (64 * 64 + 64) + 2 * 128 * 64 + 128 + 64 + 4 * 64
    expect(summary.parts.clip.parameters).toBe(64 + 64 * 3 * 14 * 14 + 17 * 64 + 2 * 64 + 3 * clipLayer)
    expect(summary).toMatchObject({
      family: 'llama',
      embeddingRows: 480,
      imageTokens: 16,
      missing: [],
      convnext: { depths: [1, 1, 2, 1] },
    })
    const { total, bytesNeeded } = summary
    expect(total.parameters).toBe(PARTS.reduce((n, part) => n + summary.parts[part].parameters, 0))
    expect(bytesNeeded).toMatchObject({
      f32: 4 * total.parameters,
      bf16: 2 * total.parameters,
      f16: 2 * total.parameters,
    })
    // 11 bits is what int4 saves on each weight of a matrix, 7.5 what int8 does.
    const matrixWeights = (8 * (bytesNeeded.bf16 - bytesNeeded.int4)) / 11
    expect((8 * (bytesNeeded.bf16 - bytesNeeded.int8)) / 7.5).toBeCloseTo(matrixWeights, -1)
    expect(inspectCheckpoint(fixture('hd')).imageTokens).toBe(5 * 16)
  })

  it('lists what is missing instead of failing', () => {
    const folder = copy('vicuna')
    rmSync(join(folder, '..', 'model_zoo'), { recursive: true })
    const towers = inspectCheckpoint(folder)
    expect(towers.missing).toHaveLength(2)
    expect(towers.missing.join('\n')).toMatch(/no folder for mm_vision_tower at .*\n.*mm_vision_tower_aux/)
    expect(towers).toMatchObject({
      clip: null,
      convnext: null,
      imageTokens: null,
      parts: { clip: { tensors: 0 }, language: { tensors: 30 } },
    })

    unlinkSync(join(folder, 'model-00001-of-00002.safetensors'))
    expect(inspectCheckpoint(folder).missing.join('\n')).toMatch(/model-00001-of-00002\.safetensors/)
    unlinkSync(join(folder, 'config.json'))
    expect(failure(() => inspectCheckpoint(folder))).toMatch(/^CHECKPOINT_INVALID/)
  })
})
