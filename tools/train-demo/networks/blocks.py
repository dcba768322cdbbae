"""What UNet and VAE have in common. Images are [B, C, H, W]."""

import torch.nn.functional as F
from torch import Tensor, nn


class Resnet(nn.Module):
    """`ResnetBlock2D` of diffusers; `time` is the width of the time embedding, None in a VAE."""

    def __init__(self, input: int, output: int, groups: int, eps: float, time: int | None = None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, input, eps)
        self.conv1 = nn.Conv2d(input, output, 3, padding=1)
        if time is not None:
            self.time_emb_proj = nn.Linear(time, output)
        self.norm2 = nn.GroupNorm(groups, output, eps)
        self.conv2 = nn.Conv2d(output, output, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(input, output, 1) if input != output else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if time is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Sampler(nn.Module):
    """The convolution that follows doubling, or halves an image; `pad` is (left, right, top, bottom)."""

    def __init__(self, width: int, up: bool, pad: tuple[int, int, int, int] = (1, 1, 1, 1)):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, 1 if up else 2)
        self.up, self.pad = up, pad

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            x = F.interpolate(x, scale_factor=2.0, mode='nearest')
        return self.conv(F.pad(x, self.pad))


class Block(nn.Module):
    """ResNets, each with an attention or none, and what comes after them."""

    def __init__(self, resnets, attentions=(), downsampler: Sampler | None = None, upsampler: Sampler | None = None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        if downsampler:
            self.downsamplers = nn.ModuleList([downsampler])
        if upsampler:
            self.upsamplers = nn.ModuleList([upsampler])
