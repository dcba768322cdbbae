"""The loop of every stage: seeded, stopped and resumed at will, logged.

A run is a folder. `weights/<network>.safetensors` is the newest of each network, which every stage starts from and
export.py reads; `<stage>.ckpt` is what a stopped stage goes on from; `logs/<stage>.jsonl` and `.png` say how it went.
"""

import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lessons import prefetched
from muon import Muon, matrices_of

# oneDNN keeps what it compiled for each shape, and rows have many lengths: of 1024, which is its default, two workers
# came to 23 GB within twenty minutes. It reads this when it first multiplies.
os.environ.setdefault('ONEDNN_PRIMITIVE_CACHE_CAPACITY', '32')

Metrics = dict[str, Tensor]
SAVE_SECONDS = 300
LOG_STEPS = 20


def workers() -> tuple[int, int]:
    """Which of how many processes this is, that train the same weights on batches of their own."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def seed_of(*parts: object) -> int:
    """One stream of random numbers for each stage and step, whatever was done before."""
    state = 14695981039346656037
    for byte in '/'.join(map(str, parts)).encode():
        state = (state ^ byte) * 1099511628211 % 2**64
    return state % 2**63


def load_weights(run: Path, networks: dict[str, nn.Module]) -> list[str]:
    """Loads the newest weights of networks; the names of those that have none yet."""
    missing = []
    for name, network in networks.items():
        path = run / 'weights' / f'{name}.safetensors'
        if path.exists():
            network.load_state_dict(load_file(path))
        else:
            missing.append(name)
    return missing


def save_weights(run: Path, networks: dict[str, nn.Module], average: dict[str, Tensor] | None) -> None:
    (run / 'weights').mkdir(exist_ok=True)
    for name, network in networks.items():
        state = network.state_dict()
        if average is not None:
            state |= {key: average[f'{name}.{key}'] for key in state if f'{name}.{key}' in average}
        path = run / 'weights' / f'{name}.safetensors'
        save_file({key: value.contiguous() for key, value in state.items()}, f'{path}.partial')
        os.replace(f'{path}.partial', path)


class Trainer:
    """Trains `networks` together.

    `loss(batch)` gives metrics, of which `loss` is descended; `make(seed, held_out, done)` makes a batch, on another
    thread; `done` is the part of the stage that is over, 1 for held-out batches.
    `rates` multiply the learning rate of networks, 1 by default. `average` is the decay of the moving average of
    weights that is saved in their place, None for none. `bf16` multiplies matrices in bf16; weights and sums stay f32.
    `muon`: Muon trains the matrices inside of networks, AdamW the rest; AdamW all of them without it.
    """

    def __init__(
        self,
        stage: str,
        run: Path,
        networks: dict[str, nn.Module],
        make: Callable[[int, bool, float], object],
        loss: Callable[[object], Metrics],
        *,
        rate: float,
        rates: dict[str, float] | None = None,
        decay: float = 0.02,
        average: float | None = None,
        bf16: bool = False,
        muon: bool = False,
    ):
        self.stage, self.run, self.networks, self.make, self.loss = stage, run, networks, make, loss
        self.decay_of_average, self.bf16 = average, bf16
        orthogonal, matrices, vectors = [], [], []
        for name, network in networks.items():
            inner = {id(p) for p in matrices_of(network)} if muon and not name.endswith('_heads') else set()
            trained = [p for p in network.parameters() if p.requires_grad]
            group = {'rate': rate * (rates or {}).get(name, 1)}
            orthogonal.append(group | {'params': [p for p in trained if id(p) in inner]})
            matrices.append(group | {'params': [p for p in trained if p.dim() > 1 and id(p) not in inner]})
            vectors.append(group | {'params': [p for p in trained if p.dim() <= 1], 'weight_decay': 0.0})
        filled = lambda groups: [group for group in groups if group['params']]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(filled(matrices + vectors), lr=rate, betas=(0.9, 0.98), weight_decay=decay)
        ]
        if filled(orthogonal):
            self.optimizers.append(Muon(filled(orthogonal), lr=rate, weight_decay=decay, bf16=bf16))
        self.worker, self.workers = workers()
        self.step = self.round = 0
        self.averages = None if average is None else {k: v.clone() for k, v in self._parameters()}
        (run / 'logs').mkdir(parents=True, exist_ok=True)
        self.checkpoint, self.log = run / f'{stage}.ckpt', run / 'logs' / f'{stage}.jsonl'

    def train(self, steps: int, batch: int, seed: int, restart: bool = False) -> None:
        """Goes on to `steps` of `batch` examples each. SIGINT and SIGTERM save, and end the program."""
        if self.checkpoint.exists():
            self._resume(restart)
        if restart and self.worker == 0:
            self.log.unlink(missing_ok=True)
        if self.step >= steps:
            print(f'{self.stage}: {self.step} steps are done; --steps for more, --restart to begin anew')
            return
        count = sum(p.numel() for network in self.networks.values() for p in network.parameters())
        if self.worker == 0:
            print(f'{self.stage}: steps {self.step} to {steps} of {batch * self.workers}, {count / 1e6:.2f} M parameters')

        stopped = []
        handlers = {s: signal.signal(s, lambda *_: stopped.append(True)) for s in (signal.SIGINT, signal.SIGTERM)}
        started = logged = saved = time.monotonic()
        first, sums = self.step, {}
        stream = (seed, self.stage, self.round, self.worker)
        make = lambda step: self.make(seed_of(*stream, step), False, step / steps)
        try:
            for data in prefetched(make, self.step, steps):
                torch.manual_seed(seed_of(*stream, self.step, 'loss'))
                metrics = self._descend(data, steps)
                if self._any(stopped):
                    stopped.append(True)
                for key, value in metrics.items():
                    sums[key] = sums.get(key, 0.0) + float(value)
                self.step += 1
                now = time.monotonic()
                if self.step % LOG_STEPS == 0 or self.step == steps:
                    ran = self.step % LOG_STEPS or LOG_STEPS
                    ran = min(ran, self.step - first)
                    line = {'step': self.step, **{key: value / ran for key, value in sums.items()}}
                    line['examples_per_second'] = ran * batch * self.workers / (now - logged)
                    line['hours_left'] = (steps - self.step) * (now - started) / (self.step - first) / 3600
                    logged, sums = now, {}
                    self._write(line)
                if now - saved > SAVE_SECONDS or self.step == steps or stopped:
                    self._save(seed)
                    saved = now
                if stopped:
                    raise SystemExit(f'{self.stage}: stopped after step {self.step}; the same command goes on')
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _descend(self, data: object, steps: int) -> Metrics:
        warm = min(1.0, (self.step + 1) / min(200, max(1, steps // 10)))
        # A cosine down to a twentieth.
        factor = warm * (0.525 + 0.475 * math.cos(math.pi * self.step / steps))
        for group in self._groups():
            group['lr'] = group['rate'] * factor
        for network in self.networks.values():
            network.train()
        metrics = self._loss(data)
        if not torch.isfinite(metrics['loss']):
            loss = float(metrics['loss'])
            raise SystemExit(f'{self.stage}: the loss of step {self.step} is {loss}; resume with a lower --rate')
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        metrics['loss'].backward()
        self._share_gradients()
        torch.nn.utils.clip_grad_norm_([p for group in self._groups() for p in group['params']], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.averages is not None:
            decay = min(self.decay_of_average, (self.step + 1) / (self.step + 10))
            for name, parameter in self._parameters():
                self.averages[name].lerp_(parameter.detach(), 1 - decay)
        return {key: value.detach() for key, value in metrics.items()}

    def _share_gradients(self) -> None:
        """Each worker's become the mean of all of theirs."""
        if self.workers == 1:
            return
        parameters = [p for group in self._groups() for p in group['params']]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        mean = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(mean)
        mean /= self.workers
        for parameter, gradient in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)

    def _any(self, stopped: list[bool]) -> bool:
        """Whether a worker is to stop, so that all stop after the same step."""
        flag = torch.tensor(float(len(stopped)))
        if self.workers > 1:
            dist.all_reduce(flag)
        return bool(flag > 0)

    def _loss(self, data: object) -> Metrics:
        with torch.autocast('cpu', torch.bfloat16, enabled=self.bf16):
            return self.loss(data)

    def _groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def _parameters(self):
        for name, network in self.networks.items():
            for key, parameter in network.named_parameters():
                yield f'{name}.{key}', parameter.detach()

    @torch.no_grad()
    def _held_out(self, seed: int, batches: int = 4) -> dict[str, float]:
        sums: dict[str, float] = {}
        for i in range(batches):
            torch.manual_seed(i)
            for key, value in self._loss(self.make(seed_of(seed, self.stage, 'held out', i), True, 1)).items():
                sums[f'held_out_{key}'] = sums.get(f'held_out_{key}', 0.0) + float(value) / batches
        return sums

    def _save(self, seed: int) -> None:
        if self.worker > 0:
            return
        state = {
            'step': self.step,
            'round': self.round,
            'networks': {name: network.state_dict() for name, network in self.networks.items()},
            'optimizers': [optimizer.state_dict() for optimizer in self.optimizers],
            'averages': self.averages,
        }
        torch.save(state, f'{self.checkpoint}.partial')
        os.replace(f'{self.checkpoint}.partial', self.checkpoint)
        save_weights(self.run, self.networks, self.averages)
        self._write({'step': self.step, **self._held_out(seed)})
        draw_curves(self.log)

    def _resume(self, anew: bool) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        if anew:
            # Batches that it has not had yet: on those of the last time it only seems to learn.
            self.round = state['round'] + 1
            return
        self.step, self.round, self.averages = state['step'], state['round'], state['averages']
        for name, network in self.networks.items():
            network.load_state_dict(state['networks'][name])
        rates = [group['rate'] for group in self._groups()]
        for optimizer, saved in zip(self.optimizers, state['optimizers'], strict=True):
            optimizer.load_state_dict(saved)
        for group, rate in zip(self._groups(), rates, strict=True):
            group['rate'] = rate

    def _write(self, line: dict[str, float]) -> None:
        if self.worker > 0:
            return
        rounded = {key: float(f'{value:.5g}') if isinstance(value, float) else value for key, value in line.items()}
        with self.log.open('a') as file:
            file.write(json.dumps(rounded) + '\n')
        print(self.stage, ' '.join(f'{key} {value:g}' for key, value in rounded.items()), flush=True)


def draw_curves(log: Path) -> None:
    """Every metric of a log over its steps, one under the other: `<stage>.png`."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    series: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for key, value in line.items():
            if key not in ('step', 'hours_left'):
                series.setdefault(key, []).append((line['step'], value))
    width, height, margin = 640, 90, 6
    picture = Image.new('RGB', (width, height * len(series)), 'white')
    draw = ImageDraw.Draw(picture)
    last = max(line['step'] for line in lines)
    for row, (key, points) in enumerate(series.items()):
        values = [value for _, value in points]
        low, high = min(values), max(values)
        place = lambda step, value: (
            margin + (width - 2 * margin) * step / last,
            (row + 1) * height - margin - (height - 30) * (value - low) / ((high - low) or 1),
        )
        draw.line([place(*point) for point in points], fill=(30, 90, 200))
        draw.text((margin, row * height + 4), f'{key}: {values[-1]:.4g} (from {low:.4g} to {high:.4g})', fill='black')
        draw.line([(0, (row + 1) * height - 1), (width, (row + 1) * height - 1)], fill=(200, 200, 200))
    picture.save(log.with_suffix('.png'))
