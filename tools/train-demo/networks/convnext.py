"""The trunk of OpenCLIP's ConvNeXt, as lib/models/convnext.ts runs it. Maps are [B, H, W, C]."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


def _conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    # The permuted view is what PyTorch calls channels-last, so nothing is copied.
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, EPS)
        self.mlp = nn.ModuleDict({'fc1': nn.Linear(width, 4 * width), 'fc2': nn.Linear(4 * width, width)})
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.mlp['fc1'](self.norm(_conv(self.conv_dw, x))))
        return x + self.mlp['fc2'](inner) * self.gamma


class _Stage(nn.Module):
    def __init__(self, before: int | None, width: int, depth: int):
        super().__init__()
        if before is not None:
            self.downsample = nn.Sequential(nn.LayerNorm(before, EPS), nn.Conv2d(before, width, 2, 2))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))


class ConvNext(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        dims, depths = config['dims'], config['depths']
        self.stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, 4), nn.LayerNorm(dims[0], EPS))
        self.stages = nn.ModuleList(
            _Stage(before, width, depth) for before, width, depth in zip([None, *dims], dims, depths)
        )
        # The 0.02 of large models would leave layers this narrow nearly silent.
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
                nn.init.zeros_(layer.bias)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """pixels [B, 3, S, S], normalised -> four maps, [B, S/4, S/4, dims[0]] to [B, S/32, S/32, dims[3]]."""
        x = self.stem[1](_conv(self.stem[0], pixels.permute(0, 2, 3, 1)))
        maps = []
        for stage in self.stages:
            if maps:
                norm, conv = stage.downsample
                x = _conv(conv, norm(x))
            for block in stage.blocks:
                x = block(x)
            maps.append(x)
        return maps


def concatenated(maps: list[Tensor]) -> Tensor:
    """All maps at the size of the first, [B, H, W, sum of channels]."""
    size = maps[0].shape[1:3]
    resized = [
        F.interpolate(x.permute(0, 3, 1, 2), size=size, mode='bilinear', align_corners=False).permute(0, 2, 3, 1)
        for x in maps[1:]
    ]
    return torch.cat([maps[0], *resized], -1)
