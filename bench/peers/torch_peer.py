"""Peer: PyTorch eager, f32, random weights.

usage: torch_peer.py WORK THREADS [SIZE...]
  gemm THREADS N              | x @ W.T with M = N = K
  clip THREADS BATCH          | CLIP-L/336 up to the second-last layer
  convnext THREADS SIZE       | the four stages of ConvNeXt-L; convnext-channels-last: in NHWC memory
  mining THREADS GRID SIDE    | patch info mining by the reference formula
Prints {"name": ...} when ready, then {"seconds": ..., "cpu": ...} for every line read.
"""
import json
import sys
import time

import torch

work, threads, sizes = sys.argv[1], int(sys.argv[2]), [int(a) for a in sys.argv[3:]]
torch.set_num_threads(threads)
torch.manual_seed(0)


# A torchvision built for another torch: declare the ops that its import looks for (none is used).
library = torch.library.Library("torchvision", "DEF")
for op in ("nms", "qnms"):
    try:
        library.define(op + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:
        pass


def gemm(n):
    x, w = torch.randn(n, n), torch.randn(n, n)
    return lambda: x @ w.T


def clip(batch):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                              num_attention_heads=16, image_size=336, patch_size=14)
    model = CLIPVisionModel(config).eval()
    # The last layer is not used by MGM: PyTorch need not run it either.
    encoder = getattr(model, "vision_model", model).encoder
    encoder.layers = encoder.layers[:-1]
    x = torch.randn(batch, 3, 336, 336)
    return lambda: model(x).last_hidden_state


def timm_model():
    import timm

    return timm.create_model("convnext_large", pretrained=False).eval()


def convnext(size, memory_format=torch.contiguous_format):
    model = timm_model().to(memory_format=memory_format)
    x = torch.randn(1, 3, size, size).to(memory_format=memory_format)

    def run():
        y, maps = model.stem(x), []
        for stage in model.stages:
            y = stage(y)
            maps.append(y)
        return maps

    return run


def mining(grid, side):
    import torch.nn as nn
    import torch.nn.functional as F

    channels, width = [192, 384, 768, 1536], 1024
    total, window = sum(channels), side // grid
    stages = [torch.randn(1, c, side >> i, side >> i) for i, c in enumerate(channels)]
    query = torch.randn(1, grid * grid, width)
    project = lambda c: nn.Sequential(nn.LayerNorm(c), nn.Linear(c, width))
    to_q, to_k, to_v = project(width), project(total), project(total)

    def run():
        maps = [stages[0]] + [F.interpolate(s, size=(side, side), mode="bilinear", align_corners=False)
                              for s in stages[1:]]
        x = torch.cat(maps, 1).permute(0, 2, 3, 1).reshape(1, grid, window, grid, window, total)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(1, grid * grid, window * window, total).contiguous()
        q, k, v = to_q(query), to_k(x), to_v(x)
        attention = (q[:, :, None] @ (k.transpose(-1, -2) / width**0.5)).nan_to_num().softmax(-1)
        return (attention @ v).mean(2)

    return run


with torch.inference_mode():
    run = {
        "gemm": gemm,
        "clip": clip,
        "convnext": convnext,
        "convnext-channels-last": lambda size: convnext(size, torch.channels_last),
        "mining": mining,
    }[work](*sizes)
    label = " NHWC" if work == "convnext-channels-last" else ""
    print(json.dumps({"name": f"PyTorch {torch.__version__.split('+')[0]}{label}"}), flush=True)
    for _ in sys.stdin:
        begin, cpu = time.perf_counter(), time.process_time()
        run()
        lap = {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - cpu}
        print(json.dumps(lap), flush=True)
