"""Attention from plain products.

On CPUs, PyTorch's fused one is slower for short sequences in bf16, its backward above all: it took a third of the time
of a step of `text` and of `draw`.
"""

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """q [B, heads, T, D], k and v [B, K, S, D] where K divides heads -> [B, heads, T, D].

    Head h reads the keys of h // (heads / K), as in grouped queries; `causal` needs T = S.
    """
    heads, length = q.shape[1:3]
    groups = heads // k.shape[1]
    # The heads that share keys make one longer list of queries.
    rows = q.reshape(len(q), k.shape[1], groups * length, q.shape[-1])
    scores = (rows * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        later = torch.full((length, length), float('-inf'), dtype=scores.dtype).triu(1)
        scores = (scores.unflatten(2, (groups, length)) + later).flatten(2, 3)
    return (scores.softmax(-1) @ v).reshape(q.shape)
