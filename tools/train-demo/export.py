"""Writes a run's weights as a released checkpoint, and what the networks compute with them, for parity.mts.

    python export.py --run run --out demo --parity parity --data data/validation
    npx tsx tools/train-demo/parity.mts demo parity

`demo` is the folder of the language model, as of the Gemma release; `model_zoo`, with the vision towers, and `sdxl` lie
in it.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import drawing
import understanding
from config import CONVNEXT, DECODER, DRAWN_PIXELS, MEAN, PIXELS, SCHEDULER, STD, UNET, VAE, VISION
from lessons import Lessons, normalised
from trainer import load_weights
from vocabulary import (
    BOS,
    CLIP_END,
    CLIP_PADS,
    CLIP_START,
    END,
    EOS,
    PAD,
    SPECIAL,
    START,
    UNK,
    Vocabulary,
    clip_tokenizer_config,
    gemma_tokenizer_config,
)

CLIP_FOLDER = 'model_zoo/OpenAI/clip-vit-demo-patch14-112'
CONVNEXT_FOLDER = 'model_zoo/OpenAI/openclip-convnext-demo-d-256'
LANGUAGE_FILE = 'model-00001-of-00001.safetensors'

# Where the weights of each network are in a checkpoint, and what stands in front of their names.
FILES = {
    'decoder': (LANGUAGE_FILE, ''),
    'mining': (LANGUAGE_FILE, 'model.'),
    'projector': (LANGUAGE_FILE, 'model.'),
    'vision': (f'{CLIP_FOLDER}/model.safetensors', ''),
    'convnext': (f'{CONVNEXT_FOLDER}/open_clip_pytorch_model.safetensors', 'visual.trunk.'),
    'text_1': ('sdxl/text_encoder/model.fp16.safetensors', ''),
    'text_2': ('sdxl/text_encoder_2/model.fp16.safetensors', ''),
    'unet': ('sdxl/unet/diffusion_pytorch_model.fp16.safetensors', ''),
    'vae': ('sdxl/vae/diffusion_pytorch_model.fp16.safetensors', ''),
}


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + '\n')


def write_weights(out: Path, networks: dict[str, nn.Module]) -> dict[str, list[str]]:
    """As f16; the names of the tensors of each file."""
    files: dict[str, dict[str, Tensor]] = {}
    for network, (file, prefix) in FILES.items():
        state = networks[network].state_dict()
        files.setdefault(file, {}).update({f'{prefix}{key}': value for key, value in state.items()})
    for file, tensors in files.items():
        write_tensors(out / file, tensors)
    return {file: [*tensors] for file, tensors in files.items()}


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    half = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
    for name, tensor in half.items():
        if not torch.isfinite(tensor).all():
            raise SystemExit(f'expected {name} to fit f16 but its largest value is {tensors[name].abs().max():g}')
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(half, path, metadata={'format': 'pt'})
    path.chmod(0o644)


def mgm_config(vocabulary: Vocabulary) -> dict:
    return {
        'architectures': ['MGMGemmaForCausalLM'],
        'model_type': 'mgm_gemma',
        **DECODER,
        'vocab_size': vocabulary.size,
        'tie_word_embeddings': True,
        'attention_bias': False,
        'rope_scaling': None,
        **{f'{name}_token_id': SPECIAL.index(token) for name, token in (('bos', BOS), ('eos', EOS), ('pad', PAD))},
        'image_aspect_ratio': 'pad',
        'image_global': False,
        'image_grid': 1,
        'image_size_aux': PIXELS,
        'mm_hidden_size': VISION['hidden_size'],
        'mm_hidden_size_aux': sum(CONVNEXT['dims']),
        'mm_projector_type': 'mlp2x_gelu',
        'mm_use_im_patch_token': False,
        'mm_use_im_start_end': False,
        'mm_vision_select_feature': 'patch',
        # The release takes the last layer but one of a tower that was trained for something else; this one was not.
        'mm_vision_select_layer': -1,
        'mm_vision_tower': CLIP_FOLDER,
        'mm_vision_tower_aux': CONVNEXT_FOLDER,
        'optimize_vision_tower': False,
        'optimize_vision_tower_aux': False,
        'tokenizer_model_max_length': DECODER['max_position_embeddings'],
        'tokenizer_padding_side': 'right',
        'torch_dtype': 'float16',
        'use_cache': True,
        'use_mm_proj': True,
    }


def export_language(out: Path, vocabulary: Vocabulary, tensors: list[str]) -> None:
    config = mgm_config(vocabulary)
    write_json(out / 'config.json', config)
    ids = ('bos_token_id', 'eos_token_id', 'pad_token_id')
    write_json(out / 'generation_config.json', {key: config[key] for key in ids})
    shutil.copyfile(vocabulary.folder / 'tokenizer.json', out / 'tokenizer.json')
    write_json(out / 'tokenizer_config.json', gemma_tokenizer_config())
    roles = {'bos_token': BOS, 'eos_token': EOS, 'pad_token': PAD, 'unk_token': UNK}
    write_json(out / 'special_tokens_map.json', {'additional_special_tokens': [START, END], **roles})

    size = (out / LANGUAGE_FILE).stat().st_size
    index = {'metadata': {'total_size': size}, 'weight_map': dict.fromkeys(tensors, LANGUAGE_FILE)}
    write_json(out / 'model.safetensors.index.json', index)


def export_towers(out: Path) -> None:
    clip, convnext = out / CLIP_FOLDER, out / CONVNEXT_FOLDER
    vision = {'model_type': 'clip_vision_model', 'num_channels': 3, **VISION}
    write_json(clip / 'config.json', {'architectures': ['CLIPModel'], 'model_type': 'clip', 'vision_config': vision})
    write_json(
        clip / 'preprocessor_config.json',
        {
            'crop_size': VISION['image_size'],
            'do_center_crop': True,
            'do_normalize': True,
            'do_resize': True,
            'feature_extractor_type': 'CLIPFeatureExtractor',
            'image_mean': MEAN,
            'image_std': STD,
            'resample': 3,
            'size': VISION['image_size'],
        },
    )
    tower = {'timm_model_name': 'convnext', 'timm_model_pretrained': False, 'image_size': PIXELS, **CONVNEXT}
    write_json(
        convnext / 'open_clip_config.json',
        {'model_cfg': {'vision_cfg': tower}, 'preprocess_cfg': {'mean': MEAN, 'std': STD}},
    )


def export_generator(out: Path, vocabulary: Vocabulary, scaling_factor: float) -> None:
    classes = {
        'scheduler': ['diffusers', 'EulerDiscreteScheduler'],
        'text_encoder': ['transformers', 'CLIPTextModel'],
        'text_encoder_2': ['transformers', 'CLIPTextModelWithProjection'],
        'tokenizer': ['transformers', 'CLIPTokenizer'],
        'tokenizer_2': ['transformers', 'CLIPTokenizer'],
        'unet': ['diffusers', 'UNet2DConditionModel'],
        'vae': ['diffusers', 'AutoencoderKL'],
    }
    pipeline = {'_class_name': 'StableDiffusionXLPipeline', 'force_zeros_for_empty_prompt': True}
    write_json(out / 'model_index.json', pipeline | classes)
    write_json(
        out / 'scheduler/scheduler_config.json',
        {
            '_class_name': 'EulerDiscreteScheduler',
            **SCHEDULER,
            'prediction_type': 'epsilon',
            'interpolation_type': 'linear',
            # Few steps lose less where the first one is at the very end of the noise.
            'timestep_spacing': 'trailing',
            'steps_offset': 1,
            'use_karras_sigmas': False,
        },
    )
    unet = {
        '_class_name': 'UNet2DConditionModel',
        **UNET,
        'addition_embed_type': 'text_time',
        'use_linear_projection': True,
        'act_fn': 'silu',
        'flip_sin_to_cos': True,
        'freq_shift': 0,
    }
    write_json(out / 'unet/config.json', unet)
    vae = {
        '_class_name': 'AutoencoderKL',
        **VAE,
        'act_fn': 'silu',
        'down_block_types': ['DownEncoderBlock2D'] * len(VAE['block_out_channels']),
        'up_block_types': ['UpDecoderBlock2D'] * len(VAE['block_out_channels']),
        'force_upcast': True,
        'sample_size': DRAWN_PIXELS,
        'scaling_factor': scaling_factor,
    }
    write_json(out / 'vae/config.json', vae)
    for which, (suffix, pad) in enumerate(zip(('', '_2'), CLIP_PADS)):
        config = {
            'architectures': [classes[f'text_encoder{suffix}'][1]],
            'model_type': 'clip_text_model',
            **drawing.text_config(vocabulary, which),
            # What old configs say, and mean the largest id.
            'eos_token_id': 2,
            'torch_dtype': 'float16',
        }
        write_json(out / f'text_encoder{suffix}/config.json', config)
        tokenizer = out / f'tokenizer{suffix}'
        write_json(tokenizer / 'tokenizer_config.json', clip_tokenizer_config(pad))
        roles = {'bos_token': CLIP_START, 'eos_token': CLIP_END, 'pad_token': pad, 'unk_token': CLIP_END}
        write_json(tokenizer / 'special_tokens_map.json', roles)
        for file in ('vocab.json', 'merges.txt'):
            shutil.copyfile(vocabulary.folder / file, tokenizer / file)


GREEDY = 12  # tokens
ANSWERED = 24  # lessons
PROMPTS = ('a fox and two boats on a blue background', 'An unknownword, 42 zebras!', '')


def greedy(
    networks: dict[str, nn.Module], vocabulary: Vocabulary, ids: list[int], features: Tensor, most: int
) -> tuple[list[int], Tensor]:
    """Up to `most` ids of an answer, and the logits of the first."""
    decoder, generated, first = networks['decoder'], [], None
    while len(generated) < most and (not generated or generated[-1] != vocabulary.eos_id):
        prompt = understanding.spread([*ids, *generated])
        states = decoder(understanding.embedded(decoder, torch.tensor([prompt]), features))
        logits = decoder.logits(states[0, -1])
        first = logits if first is None else first
        generated.append(int(logits.argmax()))
    return generated, first


@torch.no_grad()
def write_parity(
    folder: Path, vocabulary: Vocabulary, networks: dict[str, nn.Module], lessons: Lessons, scale: float
) -> None:
    """Inputs, and what the networks make of them with the weights as exported."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    lesson = lessons[0]
    picture = lessons.picture(lesson, 0)
    Image.fromarray(picture).save(folder / 'picture.png')
    tensors: dict[str, Tensor] = {'pixels': normalised([picture])}

    tokens = networks['vision'](understanding.low_resolution(tensors['pixels']))
    for i, stage in enumerate(networks['convnext'](tensors['pixels'])):
        tensors[f'stage_{i}'] = stage.permute(0, 3, 1, 2)
    tensors['clip_feat'] = tokens
    tensors['embed_feat'] = networks['mining'](tokens, networks['convnext'](tensors['pixels']))
    features = understanding.encode(networks, tensors['pixels'])
    tensors['image_features'] = features

    asked = lambda turn, pictures: vocabulary.conversation([{k: turn[k] for k in ('task', 'question')}], pictures)[0]
    turns = next(example['turns'] for example in lesson['examples'] if example['pictures'] == [0])
    ids = asked(turns[0], 1)
    generated, tensors['logits'] = greedy(networks, vocabulary, ids, features, GREEDY)

    answers = []
    for i in range(min(ANSWERED, len(lessons))):
        for scene in range(2):
            Image.fromarray(lessons.picture(lessons[i], scene)).save(folder / f'{i}-{scene}.png')
        for example in lessons[i]['examples']:
            pictures, turn = example['pictures'], example['turns'][0]
            if not pictures or turn['task'] == 'draw':
                continue
            pixels = normalised([lessons.picture(lessons[i], scene) for scene in pictures])
            features = understanding.encode(networks, pixels)
            said, _ = greedy(networks, vocabulary, asked(turn, len(pictures)), features, 2 * GREEDY)
            files = [f'{i}-{scene}.png' for scene in pictures]
            answers.append({'pictures': files, 'question': turn['question'], 'generated': said})

    batch = {
        key: torch.tensor([vocabulary.clip_ids(prompt, pad) for prompt in PROMPTS])
        for key, pad in zip(('first', 'second'), CLIP_PADS)
    } | {'empty': torch.zeros(len(PROMPTS), dtype=torch.bool)}
    tensors['prompt'], tensors['pooled'] = drawing.condition(networks, batch)
    side = UNET['sample_size']
    tensors['latents'] = torch.randn(len(PROMPTS), UNET['in_channels'], side, side)
    timesteps = torch.tensor([741] * len(PROMPTS))
    tensors['noise'] = networks['unet'](
        tensors['latents'], timesteps, tensors['prompt'], tensors['pooled'], drawing.time_ids(len(PROMPTS))
    )
    tensors['drawing'] = drawing.centred([drawing.drawn(lessons, lesson)])
    tensors['encoded'] = networks['vae'].encode(tensors['drawing'])[0]
    tensors['decoded'] = networks['vae'].decode(tensors['latents'][:1] / scale)
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, folder / 'tensors.safetensors')
    write_json(
        folder / 'parity.json',
        {
            'question': turns[0]['question'],
            'ids': ids,
            'generated': generated,
            'answers': answers,
            'prompts': PROMPTS,
            'clipIds': [batch['first'].tolist(), batch['second'].tolist()],
            'timestep': int(timesteps[0]),
            'timeIds': drawing.time_ids(1)[0].tolist(),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--run', type=Path, required=True)
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--parity', type=Path, help='also writes what parity.mts compares')
    parser.add_argument('--data', type=Path, help='shards, of which --parity takes lessons')
    parser.add_argument('--random', action='store_true', help='random weights where a stage has not been trained')
    arguments = parser.parse_args()
    if arguments.parity and not arguments.data:
        parser.error('expected --data beside --parity')

    vocabulary = Vocabulary(arguments.run)
    torch.manual_seed(0)
    networks = understanding.build(vocabulary) | drawing.build(vocabulary)
    missing = load_weights(arguments.run, networks)
    if missing and not arguments.random:
        raise SystemExit(
            f'expected weights of {", ".join(missing)} in {arguments.run} but found none; --random leaves them random'
        )
    if 'unet' in missing:
        # Its last layer begins as zeros, which would agree with anything.
        nn.init.normal_(networks['unet'].conv_out.weight, std=0.05)
    for network in networks.values():
        network.eval().requires_grad_(False)
        network.load_state_dict({key: value.half().float() for key, value in network.state_dict().items()})
    scale = drawing.load_scale(arguments.run)
    if scale is None:
        scale = 1.0

    files = write_weights(arguments.out, networks)
    export_language(arguments.out, vocabulary, files[LANGUAGE_FILE])
    export_towers(arguments.out)
    export_generator(arguments.out / 'sdxl', vocabulary, scale)
    sizes = {file: (arguments.out / file).stat().st_size for file in files}
    for name, size in {**sizes, 'together': sum(sizes.values())}.items():
        print(f'{size / 1e6:6.2f} MB {name}')
    if arguments.parity:
        write_parity(arguments.parity, vocabulary, networks, Lessons(arguments.data), scale)


if __name__ == '__main__':
    main()
