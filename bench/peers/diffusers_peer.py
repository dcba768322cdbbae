"""Peer: diffusers' SDXL networks on PyTorch eager, f32, random weights.

usage: diffusers_peer.py WORK THREADS SIDE
  unet   one pass over latents SIDE x SIDE, one image, 77 tokens
  vae    decodes latents SIDE x SIDE
In NCHW or NHWC memory, whichever is faster in a trial. DIFFUSERS: folder of the diffusers package if it is not
installed. Protocol as in torch_peer.py.
"""
import json
import os
import sys
import time

# A torchvision built for another torch must not be imported; nothing here needs it.
sys.modules["torchvision"] = None
if "DIFFUSERS" in os.environ:
    sys.path.insert(0, os.environ["DIFFUSERS"])

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, __version__

work, threads, side = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
torch.manual_seed(0)


def randomized(make):
    """Without diffusers' own initialization, which takes minutes."""
    with torch.device("meta"):
        model = make()
    model = model.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        parameter.uniform_(-0.03, 0.03)
    return model


def unet():
    model = randomized(lambda: UNet2DConditionModel(
        sample_size=128, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2, transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816))
    latents, prompt = torch.randn(1, 4, side, side), torch.randn(1, 77, 2048)
    sizes = torch.tensor([[8.0 * side, 8.0 * side, 0, 0, 8.0 * side, 8.0 * side]])
    added = {"text_embeds": torch.randn(1, 1280), "time_ids": sizes}
    return model, latents, lambda x: model(x, torch.tensor(500), prompt, added_cond_kwargs=added)


def vae():
    model = randomized(lambda: AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2, norm_num_groups=32, sample_size=1024))
    return model, torch.randn(1, 4, side, side), model.decode


with torch.inference_mode():
    model, latents, forward = {"unet": unet, "vae": vae}[work]()

    def seconds(memory_format):
        model.to(memory_format=memory_format)
        x = latents.to(memory_format=memory_format)
        begin = time.perf_counter()
        forward(x)
        return time.perf_counter() - begin

    forward(latents)
    layouts = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
    label = min(layouts, key=lambda name: seconds(layouts[name]))
    model.to(memory_format=layouts[label])
    latents = latents.to(memory_format=layouts[label])
    name = f"diffusers {__version__}, PyTorch {torch.__version__.split('+')[0]} {label}"
    print(json.dumps({"name": name}), flush=True)
    for _ in sys.stdin:
        begin, cpu = time.perf_counter(), time.process_time()
        forward(latents)
        lap = {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - cpu}
        print(json.dumps(lap), flush=True)
