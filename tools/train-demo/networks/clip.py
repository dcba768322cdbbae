"""CLIP's two encoders, as lib/models/clip-vision.ts and clip-text.ts run them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attention

ACTIVATIONS = {'gelu': F.gelu, 'quick_gelu': lambda x: x * torch.sigmoid(1.702 * x)}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """x [B, T, C] -> [B, T, C]."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = attention(q, k, v, causal)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int, act: str):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.act = ACTIVATIONS[act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        width = config['hidden_size']
        self.self_attn = Attention(width, config['num_attention_heads'])
        self.layer_norm1 = nn.LayerNorm(width, config['layer_norm_eps'])
        self.mlp = Mlp(width, config['intermediate_size'], config['hidden_act'])
        self.layer_norm2 = nn.LayerNorm(width, config['layer_norm_eps'])

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


def _layers(config: dict) -> nn.ModuleDict:
    return nn.ModuleDict({'layers': nn.ModuleList(Layer(config) for _ in range(config['num_hidden_layers']))})


class _VisionEmbeddings(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        width, patch = config['hidden_size'], config['patch_size']
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.patch_embedding = nn.Conv2d(3, width, patch, patch, bias=False)
        self.position_embedding = nn.Embedding((config['image_size'] // patch) ** 2 + 1, width)
        nn.init.normal_(self.position_embedding.weight, std=0.02)


class ClipVision(nn.Module):
    """`vision_config` of a CLIP checkpoint; the selected state is the last layer's (`mm_vision_select_layer` -1)."""

    def __init__(self, config: dict):
        super().__init__()
        norm = lambda: nn.LayerNorm(config['hidden_size'], config['layer_norm_eps'])
        self.vision_model = nn.ModuleDict(
            {
                'embeddings': _VisionEmbeddings(config),
                'pre_layrnorm': norm(),
                'encoder': _layers(config),
                'post_layernorm': norm(),
            }
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, S, S], normalised -> [B, N, C], row-major patches without the class token."""
        model = self.vision_model
        embeddings = model['embeddings']
        patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([embeddings.class_embedding.expand(len(pixels), 1, -1), patches], 1)
        x = model['pre_layrnorm'](x + embeddings.position_embedding.weight)
        for layer in model['encoder']['layers']:
            x = layer(x, causal=False)
        return x[:, 1:]


class ClipText(nn.Module):
    """One of SDXL's text encoders; with `projection` it also gives the pooled output."""

    def __init__(self, config: dict, projection: bool):
        super().__init__()
        width = config['hidden_size']
        self.text_model = nn.ModuleDict(
            {
                'embeddings': nn.ModuleDict(
                    {
                        'token_embedding': nn.Embedding(config['vocab_size'], width),
                        'position_embedding': nn.Embedding(config['max_position_embeddings'], width),
                    }
                ),
                'encoder': _layers(config),
                'final_layer_norm': nn.LayerNorm(width, config['layer_norm_eps']),
            }
        )
        for table in self.text_model['embeddings'].values():
            nn.init.normal_(table.weight, std=0.02)
        if projection:
            self.text_projection = nn.Linear(width, config['projection_dim'], bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """ids [B, 77] -> the input of the last layer [B, 77, C], and the projected state of the end token [B, P]."""
        model = self.text_model
        embeddings = model['embeddings']
        x = embeddings['token_embedding'](ids) + embeddings['position_embedding'].weight
        *layers, last = model['encoder']['layers']
        for layer in layers:
            x = layer(x, causal=True)
        if not hasattr(self, 'text_projection'):
            return x, None
        # The end token has the largest id; `argmax` takes the first of several.
        ends = last(x, causal=True)[torch.arange(len(ids)), ids.argmax(1)]
        return x, self.text_projection(model['final_layer_norm'](ends))
