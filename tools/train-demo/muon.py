"""Muon: momentum whose steps are orthogonalised (kellerjordan.github.io/posts/muon; rates as in arXiv 2502.16982)."""

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def matrices_of(network: nn.Module) -> list[nn.Parameter]:
    """Weights of linear layers and of convolutions over channels: no embeddings, nothing depthwise."""
    layers = (layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    return [layer.weight for layer in layers if layer.weight.shape[1] > 1]


def orthogonalised(x: Tensor) -> Tensor:
    """About U V^T of x = U S V^T, by Newton-Schulz iterations; singular values end between 0.7 and 1.2."""
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / (x.norm() + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    """Convolutions count as matrices [out, in * kernel]. `lr` is one that would suit AdamW. `bf16` iterates in it, as the
    source does: in f32 that took a third of a step's time."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0, bf16: bool = False):
        super().__init__(params, {'lr': lr, 'momentum': momentum, 'weight_decay': weight_decay})
        self.dtype = torch.bfloat16 if bf16 else torch.float32

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            rate, momentum = group['lr'], group['momentum']
            for weight in group['params']:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state['mean'] = torch.zeros_like(weight)
                mean = state['mean'].lerp_(weight.grad, 1 - momentum)
                update = orthogonalised(weight.grad.lerp(mean, momentum).flatten(1).to(self.dtype))
                # Of the root mean square that AdamW's steps have.
                scale = 0.2 * max(update.shape) ** 0.5
                weight.mul_(1 - rate * group['weight_decay']).add_(update.reshape(weight.shape), alpha=-rate * scale)
