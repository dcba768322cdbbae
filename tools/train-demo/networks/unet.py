"""SDXL's UNet, as lib/models/unet.ts runs it. Source: `UNet2DConditionModel` of diffusers."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attention
from .blocks import Block, Resnet, Sampler


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of positions at frequencies from 1 to 1/10000; [..., width]."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = positions[..., None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, context: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context, width, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out[0](attention(q, k, v).transpose(1, 2).flatten(2))


class Geglu(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.proj(x).chunk(2, -1)
        return up * F.gelu(gate)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, context: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = Attention(width, heads, width), Attention(width, heads, context)
        self.ff = nn.ModuleDict(
            {'net': nn.ModuleList([Geglu(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])}
        )

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        first, _, last = self.ff['net']
        return x + last(first(self.norm3(x)))


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int, context: int, depth: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, 1e-6)
        self.proj_in, self.proj_out = nn.Linear(width, width), nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(width, heads, context) for _ in range(depth))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h).transpose(1, 2).unflatten(2, x.shape[2:])


class Unet(nn.Module):
    """`unet/config.json`."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        widths, layers = config['block_out_channels'], config['layers_per_block']
        groups, eps, time = config['norm_num_groups'], config['norm_eps'], 4 * widths[0]
        resnet = lambda input, output: Resnet(input, output, groups, eps, time)

        def attentions(kind: str, level: int, count: int):
            if not kind.startswith('CrossAttn'):
                return []
            heads, depth = config['attention_head_dim'][level], config['transformer_layers_per_block'][level]
            width = widths[level]
            return [Transformer(width, heads, config['cross_attention_dim'], depth, groups) for _ in range(count)]

        self.conv_in = nn.Conv2d(config['in_channels'], widths[0], 3, padding=1)
        embedding = lambda input: nn.ModuleDict({'linear_1': nn.Linear(input, time), 'linear_2': nn.Linear(time, time)})
        self.time_embedding = embedding(widths[0])
        self.add_embedding = embedding(config['projection_class_embeddings_input_dim'])

        last = len(widths) - 1
        skips, down = [widths[0]], []
        for level, (kind, width) in enumerate(zip(config['down_block_types'], widths)):
            resnets = [resnet(skips[-1] if i == 0 else width, width) for i in range(layers)]
            sampler = Sampler(width, up=False) if level < last else None
            down.append(Block(resnets, attentions(kind, level, layers), downsampler=sampler))
            skips += [width] * (layers + (level < last))
        self.down_blocks = nn.ModuleList(down)

        bottom = widths[-1]
        self.mid_block = Block(
            [resnet(bottom, bottom) for _ in range(2)], attentions('CrossAttn', last, 1)
        )

        up, before = [], bottom
        for kind, level in zip(config['up_block_types'], range(last, -1, -1)):
            width = widths[level]
            resnets = [
                resnet((before if i == 0 else width) + skips.pop(), width) for i in range(layers + 1)
            ]
            sampler = Sampler(width, up=True) if level else None
            up.append(Block(resnets, attentions(kind, level, layers + 1), upsampler=sampler))
            before = width
        self.up_blocks = nn.ModuleList(up)

        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps)
        self.conv_out = nn.Conv2d(widths[0], config['out_channels'], 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor, pooled: Tensor, time_ids: Tensor) -> Tensor:
        """latents [B, 4, h, w], timesteps [B], context [B, 77, D], pooled [B, P], time_ids [B, 6] -> the noise."""
        sizes = sinusoids(time_ids, self.config['addition_time_embed_dim']).flatten(1)
        embed = lambda layers, x: layers['linear_2'](F.silu(layers['linear_1'](x)))
        time = embed(self.time_embedding, sinusoids(timesteps, self.config['block_out_channels'][0]))
        time = time + embed(self.add_embedding, torch.cat([pooled, sizes], 1))

        def attend(block: Block, i: int, x: Tensor) -> Tensor:
            return block.attentions[i](x, context) if hasattr(block, 'attentions') else x

        x = self.conv_in(latents)
        skips = [x]
        for block in self.down_blocks:
            for i, resnet in enumerate(block.resnets):
                x = attend(block, i, resnet(x, time))
                skips.append(x)
            if hasattr(block, 'downsamplers'):
                x = block.downsamplers[0](x)
                skips.append(x)
        first, last = self.mid_block.resnets
        x = last(attend(self.mid_block, 0, first(x, time)), time)
        for block in self.up_blocks:
            for i, resnet in enumerate(block.resnets):
                x = attend(block, i, resnet(torch.cat([x, skips.pop()], 1), time))
            if hasattr(block, 'upsamplers'):
                x = block.upsamplers[0](x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
