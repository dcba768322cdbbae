"""Patch info mining and the projector, as lib/models/patch-mining.ts and projector.ts compute them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convnext import concatenated


class Mining(nn.Module):
    """Each token attends to the positions of its own window of the maps; keys and values are never formed.

    Both projections of the reference move to the query's side (docs/architecture.md, "Patch mining"): a window has 64
    positions and one query, so this is 1/60 of the arithmetic, and the gradients are the same.
    """

    def __init__(self, width: int, map_width: int):
        super().__init__()
        part = lambda input: nn.Sequential(nn.LayerNorm(input), nn.Linear(input, width))
        self.vlm_uni_query_projector = part(width)
        self.vlm_uni_aux_projector = part(map_width)
        self.vlm_uni_val_projector = part(map_width)

    def forward(self, tokens: Tensor, maps: list[Tensor]) -> Tensor:
        """tokens [B, N, C] over a square grid, maps of `ConvNext` -> what each token mined, [B, N, C]."""
        batch, count, width = tokens.shape
        grid = round(count**0.5)
        if torch.is_autocast_enabled('cpu'):
            # Most of the time here is reading and writing these.
            maps = [x.to(torch.get_autocast_dtype('cpu')) for x in maps]
        x = concatenated(maps)
        window = x.shape[1] // grid
        # [B, grid, window, grid, window, M] -> [B * N, window * window, M]
        x = x.unflatten(2, (grid, window)).unflatten(1, (grid, window)).transpose(2, 3)
        x = x.reshape(batch * count, window * window, -1)
        with torch.autocast('cpu', enabled=False):
            x = F.layer_norm(x, x.shape[-1:])

        key_norm, key = self.vlm_uni_aux_projector
        value_norm, value = self.vlm_uni_val_projector
        query = self.vlm_uni_query_projector(tokens).reshape(batch * count, width)
        g = query @ key.weight * key_norm.weight  # [B * N, M]; what biases add to a score is equal for all positions
        scores = (x @ g.unsqueeze(-1)).squeeze(-1) * width**-0.5  # [B * N, window * window]
        mined = (scores.softmax(-1).unsqueeze(1) @ x).squeeze(1)  # [B * N, M]
        return value(mined * value_norm.weight + value_norm.bias).view(batch, count, width)


class Projector(nn.Module):
    """`mlp2x_gelu`."""

    def __init__(self, input: int, output: int):
        super().__init__()
        self.mm_projector = nn.Sequential(nn.Linear(input, output), nn.GELU(), nn.Linear(output, output))

    def forward(self, x: Tensor) -> Tensor:
        return self.mm_projector(x)
