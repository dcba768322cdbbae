"""The autoencoder, as lib/models/vae.ts runs it. Source: `AutoencoderKL` of diffusers."""

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attention
from .blocks import Block, Resnet, Sampler

EPS = 1e-6


class MidAttention(nn.Module):
    """One head over all pixels."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (project(h).unsqueeze(1) for project in (self.to_q, self.to_k, self.to_v))
        return x + self.to_out[0](attention(q, k, v).squeeze(1)).transpose(1, 2).unflatten(2, x.shape[2:])


def _mid(width: int, groups: int) -> Block:
    return Block([Resnet(width, width, groups, EPS) for _ in range(2)], [MidAttention(width, groups)])


def _through_mid(mid: Block, x: Tensor) -> Tensor:
    return mid.resnets[1](mid.attentions[0](mid.resnets[0](x)))


class Encoder(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        widths, layers, groups = (config[key] for key in ('block_out_channels', 'layers_per_block', 'norm_num_groups'))
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Block(
                [Resnet(before if i == 0 else width, width, groups, EPS) for i in range(layers)],
                downsampler=None if level == len(widths) - 1 else Sampler(width, up=False, pad=(0, 1, 0, 1)),
            )
            for level, (before, width) in enumerate(zip([widths[0], *widths], widths))
        )
        self.mid_block = _mid(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config['latent_channels'], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            for resnet in block.resnets:
                x = resnet(x)
            if hasattr(block, 'downsamplers'):
                x = block.downsamplers[0](x)
        return self.conv_out(F.silu(self.conv_norm_out(_through_mid(self.mid_block, x))))


class Decoder(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        layers, groups = config['layers_per_block'], config['norm_num_groups']
        widths = config['block_out_channels'][::-1]
        self.conv_in = nn.Conv2d(config['latent_channels'], widths[0], 3, padding=1)
        self.mid_block = _mid(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            Block(
                [Resnet(before if i == 0 else width, width, groups, EPS) for i in range(layers + 1)],
                upsampler=None if level == len(widths) - 1 else Sampler(width, up=True),
            )
            for level, (before, width) in enumerate(zip([widths[0], *widths], widths))
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = _through_mid(self.mid_block, self.conv_in(x))
        for block in self.up_blocks:
            for resnet in block.resnets:
                x = resnet(x)
            if hasattr(block, 'upsamplers'):
                x = block.upsamplers[0](x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Vae(nn.Module):
    """`vae/config.json`. Latents are unscaled."""

    def __init__(self, config: dict):
        super().__init__()
        channels = config['latent_channels']
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [B, 3, H, W] in -1..1 -> mean and log-variance of the latents, each [B, 4, H/s, W/s]."""
        mean, log_variance = self.quant_conv(self.encoder(pixels)).chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, 4, h, w] -> pixels [B, 3, s h, s w], about -1..1."""
        return self.decoder(self.post_quant_conv(latents))
