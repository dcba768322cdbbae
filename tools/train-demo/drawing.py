"""What the stages of the image generator learn from."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from config import DRAWN_PIXELS, SCHEDULER, TEXT, TEXT_ACTS, UNET, VAE, VAE_SCALE
from lessons import DRAWN, Lessons, prompt_of
from networks.clip import ClipText
from networks.unet import Unet
from networks.vae import Vae
from trainer import Metrics
from vocabulary import CLIP_PADS, Vocabulary

PATCH = 64  # the VAE learns on squares of that many pixels

# What mgm-node draws with unless told otherwise: `NEGATIVE_PROMPT` of lib/processing/image-prompt.ts.
NEGATIVE_PROMPT = (
    'out of frame, lowres, text, error, cropped, worst quality, low quality, jpeg artifacts, ugly, duplicate, morbid, '
    'mutilated, out of frame, extra fingers, mutated hands, poorly drawn hands, poorly drawn face, mutation, deformed, '
    'blurry, dehydrated, bad anatomy, bad proportions, extra limbs, cloned face, disfigured, gross proportions, '
    'malformed limbs, missing arms, missing legs, extra arms, extra legs, fused fingers, too many fingers, long neck, '
    'username, watermark, signature'
)


def save_scale(run: Path, scale: float) -> None:
    """The `scaling_factor` of latents, which the latents stage measures."""
    (run / 'latents').mkdir(exist_ok=True)
    (run / 'latents' / 'scale.json').write_text(json.dumps({'scaling_factor': scale}) + '\n')


def load_scale(run: Path) -> float | None:
    path = run / 'latents' / 'scale.json'
    return json.loads(path.read_text())['scaling_factor'] if path.exists() else None


def text_config(vocabulary: Vocabulary, which: int) -> dict:
    return TEXT | {'vocab_size': len(vocabulary.clip_vocab), 'hidden_act': TEXT_ACTS[which]}


def build(vocabulary: Vocabulary) -> dict[str, nn.Module]:
    """The networks that are shipped."""
    return {
        'text_1': ClipText(text_config(vocabulary, 0), projection=False),
        'text_2': ClipText(text_config(vocabulary, 1), projection=True),
        'unet': Unet(UNET),
        'vae': Vae(VAE),
    }


def centred(pictures: list[np.ndarray]) -> Tensor:
    """Bytes [S, S, 3] each -> [B, 3, S, S] in -1..1."""
    # Copied because PyTorch's GroupNorm loses three digits on channels-last images of flat colours.
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1


def drawn(lessons: Lessons, lesson: dict) -> np.ndarray:
    picture = lessons.picture(lesson, DRAWN)
    if len(picture) != DRAWN_PIXELS:
        raise SystemExit(
            f'expected drawings of {DRAWN_PIXELS} pixels but found {len(picture)}: '
            f'make the data with --drawnPixels {DRAWN_PIXELS}'
        )
    return picture


class Pictures:
    """Squares cut out of drawings."""

    def __init__(self, lessons: Lessons, held_out: Lessons, batch: int):
        self.lessons, self.held_out, self.batch = lessons, held_out, batch

    def __call__(self, seed: int, held_out: bool, done: float) -> Tensor:
        random, lessons = np.random.default_rng(seed), self.held_out if held_out else self.lessons
        pictures = []
        for _ in range(self.batch):
            picture = drawn(lessons, lessons[random.integers(len(lessons))])
            left, top = random.integers(DRAWN_PIXELS - PATCH + 1, size=2)
            pictures.append(picture[top : top + PATCH, left : left + PATCH])
        return centred(pictures)


def vae_loss(vae: Vae, pixels: Tensor) -> Metrics:
    """Absolute error of colours and of their differences between neighbours, which keeps edges sharp."""
    mean, log_variance = vae.encode(pixels)
    made = vae.decode(mean + (0.5 * log_variance).exp() * torch.randn_like(mean))
    colour = (made - pixels).abs().mean()
    edges = sum((torch.diff(made, dim=d) - torch.diff(pixels, dim=d)).abs().mean() for d in (2, 3))
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return {'loss': colour + edges + 1e-4 * divergence, 'colour': colour, 'edges': edges, 'divergence': divergence}


@torch.no_grad()
def write_latents(vae: Vae, lessons: Lessons, folder: Path, batch: int = 32) -> float:
    """Encodes all drawings once: `latents.npy` f16 [N, 4, h, w], unscaled means. Returns the `scaling_factor`."""
    folder.mkdir(parents=True, exist_ok=True)
    side = DRAWN_PIXELS // VAE_SCALE
    shape = (len(lessons), VAE['latent_channels'], side, side)
    latents = np.lib.format.open_memmap(folder / 'latents.npy', 'w+', np.float16, shape)
    for start in range(0, len(lessons), batch):
        indices = range(start, min(start + batch, len(lessons)))
        latents[start : indices.stop] = vae.encode(centred([drawn(lessons, lessons[i]) for i in indices]))[0].numpy()
    latents.flush()
    return float(1 / latents[:2000].astype(np.float32).std())


class Drawings:
    """Latents, ids of their prompts for both text encoders, and which prompts are left out."""

    def __init__(
        self,
        lessons: Lessons,
        held_out: Lessons,
        latents: tuple[Path, Path],
        vocabulary: Vocabulary,
        batch: int,
        scale: float,
    ):
        self.lessons = {False: lessons, True: held_out}
        self.latents = {held: np.load(path, mmap_mode='r') for held, path in zip((False, True), latents)}
        self.vocabulary, self.batch, self.scale = vocabulary, batch, scale
        for held, data in self.lessons.items():
            if len(data) != len(self.latents[held]):
                raise SystemExit(
                    f'expected latents of {len(data)} drawings but found {len(self.latents[held])}: '
                    'run the latents stage again'
                )

    def __call__(self, seed: int, held_out: bool, done: float) -> dict[str, Tensor]:
        random, lessons = np.random.default_rng(seed), self.lessons[held_out]
        indices = random.integers(len(lessons), size=self.batch)
        # Guidance needs both kinds of the unconditional: nothing at all, and the negative prompt.
        kinds = random.choice(3, size=self.batch, p=[0.9, 0.05, 0.05])
        prompts = [NEGATIVE_PROMPT if kind == 1 else prompt_of(lessons[i]) for i, kind in zip(indices, kinds)]
        first, second = (
            torch.tensor([self.vocabulary.clip_ids(prompt, pad) for prompt in prompts]) for pad in CLIP_PADS
        )
        latents = torch.from_numpy(self.latents[held_out][indices].astype(np.float32)) * self.scale
        return {'latents': latents, 'first': first, 'second': second, 'empty': torch.from_numpy(kinds == 2)}


def alphas() -> Tensor:
    """Products of 1 - beta up to each of the timesteps, `scaled_linear`."""
    ends = (SCHEDULER['beta_start'] ** 0.5, SCHEDULER['beta_end'] ** 0.5)
    betas = torch.linspace(*ends, SCHEDULER['num_train_timesteps'], dtype=torch.float64).square()
    return (1 - betas).cumprod(0).float()


def time_ids(batch: int) -> Tensor:
    """Original size, corner of the crop, target size: always the same."""
    return torch.tensor([DRAWN_PIXELS, DRAWN_PIXELS, 0, 0, DRAWN_PIXELS, DRAWN_PIXELS]).expand(batch, 6)


def condition(networks: dict[str, nn.Module], batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Both encoders' states side by side [B, 77, D], and the pooled ones [B, P]; zeros where there is no prompt."""
    first, _ = networks['text_1'](batch['first'])
    second, pooled = networks['text_2'](batch['second'])
    keep = ~batch['empty'][:, None]
    return torch.cat([first, second], -1) * keep[..., None], pooled * keep


def denoising_loss(networks: dict[str, nn.Module], batch: dict[str, Tensor]) -> Metrics:
    """The error of the predicted noise, weighted by min-SNR (arXiv 2303.09556, gamma 5), and more where there is hardly
    anything but noise: up to ten times, because there the colours of large areas are made out."""
    latents, count = batch['latents'], len(batch['latents'])
    steps = torch.randint(SCHEDULER['num_train_timesteps'], (count,))
    alpha = alphas()[steps][:, None, None, None]
    noise = torch.randn_like(latents)
    context, pooled = condition(networks, batch)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    predicted = networks['unet'](noisy, steps, context, pooled, time_ids(count))
    error = (predicted - noise).square().mean((1, 2, 3))
    ratio = (alpha / (1 - alpha)).flatten()
    weight = (ratio.clamp(max=5) + 0.1) / (ratio + 0.01)
    return {'loss': (error * weight).mean(), 'noise': error.mean()}
