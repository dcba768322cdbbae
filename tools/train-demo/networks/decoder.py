"""A Gemma decoder, as lib/models/decoder.ts runs it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attention


class RmsNorm(nn.Module):
    """Gemma's: multiplies by 1 + weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], 1 + self.weight, self.eps)


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary positions 0, 1, ... of x [B, heads, T, D]: the halves of D are turned against each other."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = torch.arange(x.shape[-2], dtype=torch.float32)[:, None] * frequencies
    a, b = x.split(half, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


class Attention(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        width, self.head_dim = config['hidden_size'], config['head_dim']
        self.theta = config['rope_theta']
        queries, keys = (config[key] * self.head_dim for key in ('num_attention_heads', 'num_key_value_heads'))
        self.q_proj = nn.Linear(width, queries, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, keys, bias=False)
        self.o_proj = nn.Linear(queries, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, self.theta), rotate(k, self.theta)
        attended = attention(q, k, v, causal=True)
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        width, inner = config['hidden_size'], config['intermediate_size']
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate='tanh') * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        norm = lambda: RmsNorm(config['hidden_size'], config['rms_norm_eps'])
        self.self_attn, self.mlp = Attention(config), Mlp(config)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """`config.json` of an `mgm_gemma` checkpoint; the head is the embedding table."""

    def __init__(self, config: dict):
        super().__init__()
        width, depth = config['hidden_size'], config['num_hidden_layers']
        self.scale = width**0.5
        self.model = nn.ModuleDict(
            {
                'embed_tokens': nn.Embedding(config['vocab_size'], width),
                'layers': nn.ModuleList(Layer(config) for _ in range(depth)),
                'norm': RmsNorm(width, config['rms_norm_eps']),
            }
        )
        nn.init.normal_(self.model['embed_tokens'].weight, std=width**-0.5)
        for name, weight in self.model['layers'].named_parameters():
            if weight.dim() == 2:
                # What is added to the residual is smaller the more there is of it (GPT-2).
                adds = name.endswith(('o_proj.weight', 'down_proj.weight'))
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5 / ((2 * depth) ** 0.5 if adds else 1))

    def embed(self, ids: Tensor) -> Tensor:
        return self.model['embed_tokens'](ids)

    def forward(self, embeds: Tensor) -> Tensor:
        """embeds [B, T, C], as `embed` and the projector give them (Gemma scales both) -> normed states [B, T, C]."""
        x = embeds * self.scale
        for layer in self.model['layers']:
            x = layer(x)
        return self.model['norm'](x)

    def logits(self, states: Tensor) -> Tensor:
        return states @ self.model['embed_tokens'].weight.T
