"""Trains the demo model stage by stage.

    python train.py convnext --data data/train --held-out data/validation --run run

Stages, in their order: convnext, vision, text, mining, joint, features, answers; vae, latents, draw. Each goes on where it was stopped,
and starts from the newest weights of what earlier ones trained. README.md says how long they take and what to look at.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import ProcessExitedException, start_processes

import drawing
import understanding
from config import DECODER, VISION
from lessons import Lessons
from trainer import Trainer, load_weights, workers
from understanding import Answers, Features, PatchHeads
from vocabulary import Vocabulary


@dataclass
class Context:
    """What a stage is built from."""

    run: Path
    lessons: Lessons
    held_out: Lessons
    vocabulary: Vocabulary
    batch: int
    rate: float
    bf16: bool
    freeze_towers: bool

    def load(self, networks: dict[str, nn.Module], needed: set[str]) -> None:
        """Loads what there is; `needed` are networks that an earlier stage must have trained."""
        missing = needed & set(load_weights(self.run, networks))
        if missing:
            names = ', '.join(sorted(missing))
            raise SystemExit(f'expected weights of {names} in {self.run} but found none: train earlier stages first')

    def scenes(self, kind: type[understanding.Scenes] = understanding.Scenes) -> understanding.Scenes:
        return kind(self.lessons, self.held_out, self.vocabulary.labels, self.batch)

    def conversations(self, pictures: bool) -> understanding.Conversations:
        return understanding.Conversations(self.lessons, self.held_out, self.vocabulary, self.batch, pictures)

    def folders(self, name: str) -> tuple[Path, Path]:
        """Where a stage writes down what it makes of the lessons and of those held out."""
        return self.run / name / 'train', self.run / name / 'held_out'

    def trainer(self, stage: str, networks: dict[str, nn.Module], make, loss, **options) -> Trainer:
        return Trainer(stage, self.run, networks, make, loss, rate=self.rate, bf16=self.bf16, **options)


def chosen(networks: dict[str, nn.Module], *names: str) -> dict[str, nn.Module]:
    return {name: networks[name] for name in names}


def convnext(context: Context) -> Trainer:
    networks = chosen(understanding.build(context.vocabulary), 'convnext')
    networks['convnext_heads'] = understanding.CropHeads(context.vocabulary.labels)
    context.load(networks, set())
    loss = lambda batch: networks['convnext_heads'](networks['convnext'], batch)
    return context.trainer('convnext', networks, context.scenes(understanding.Crops), loss, muon=True)


def vision(context: Context) -> Trainer:
    networks = chosen(understanding.build(context.vocabulary), 'vision')
    networks['vision_heads'] = PatchHeads(VISION['hidden_size'], context.vocabulary.labels, characters=False)
    context.load(networks, set())
    loss = lambda batch: networks['vision_heads'](networks['vision'](understanding.low_resolution(batch[0])), batch[1])
    return context.trainer('vision', networks, context.scenes(), loss, muon=True)


def text(context: Context) -> Trainer:
    networks = chosen(understanding.build(context.vocabulary), 'decoder')
    networks['oracle'] = understanding.Oracle(context.vocabulary)
    context.load(networks, set())

    def loss(batch: dict) -> dict:
        features = networks['oracle'](batch['labels'], networks['decoder']) if 'labels' in batch else None
        return understanding.language_loss(networks['decoder'], batch, features)

    return context.trainer('text', networks, context.conversations(pictures=False), loss, decay=0.05, muon=True)


def mining(context: Context) -> Trainer:
    labels = context.vocabulary.labels
    everything = understanding.build(context.vocabulary) | {'oracle': understanding.Oracle(context.vocabulary)}
    heads = {'mining_heads': PatchHeads(DECODER['hidden_size'], labels, characters=True)}
    context.load(everything | heads, {'convnext', 'vision', 'oracle', 'decoder'})
    oracle, decoder = (everything[name].requires_grad_(False) for name in ('oracle', 'decoder'))
    towers = chosen(everything, 'convnext', 'vision')
    trained = chosen(everything, 'mining', 'projector') | heads
    make = context.scenes()
    if context.freeze_towers:
        for tower in towers.values():
            tower.requires_grad_(False)
    else:
        crops = {'convnext_heads': understanding.CropHeads(labels)}
        context.load(crops, {*crops})
        trained |= towers | crops
        scenes, signs = make, context.scenes(understanding.Signs)
        make = lambda *which: (*scenes(*which), signs(*which))

    def loss(batch: tuple) -> dict:
        pixels, targets, *signs = batch
        features = understanding.encode(everything, pixels)
        metrics = heads['mining_heads'](features, targets)
        wanted = oracle(targets, decoder)
        # Relative to how far the wanted embeddings are from each other.
        distance = (features - wanted).square().mean() / wanted.var()
        total = metrics['loss'] + distance
        for crops in signs:
            read = trained['convnext_heads'].read(everything['convnext'], crops)
            total = total + read['loss']
            metrics['text'] = read['text']
        return metrics | {'loss': total, 'distance': distance}

    rates = {'convnext': 0.7, 'vision': 0.5}
    return context.trainer('mining', trained, make, loss, rates=rates, muon=True)


def joint(context: Context) -> Trainer:
    networks = understanding.build(context.vocabulary)
    heads = {'mining_heads': PatchHeads(DECODER['hidden_size'], context.vocabulary.labels, characters=True)}
    context.load(networks | heads, {*networks, *heads})
    trained = networks | heads
    if context.freeze_towers:
        for tower in ('convnext', 'vision'):
            trained.pop(tower).requires_grad_(False)

    def loss(batch: dict) -> dict:
        if 'pixels' not in batch:
            return understanding.language_loss(networks['decoder'], batch, None)
        features = understanding.encode(networks, batch['pixels'])
        metrics = understanding.language_loss(networks['decoder'], batch, features)
        seen = heads['mining_heads'](features, batch['labels'])
        return seen | metrics | {'loss': metrics['loss'] + 0.2 * seen['loss'], 'language': metrics['loss']}

    return context.trainer('joint', trained, context.conversations(pictures=True), loss, average=0.999, muon=True)


def features(context: Context) -> None:
    networks = chosen(understanding.build(context.vocabulary), 'convnext', 'vision', 'mining')
    context.load(networks, {*networks})
    worker, count = workers()
    for folder, lessons in zip(context.folders('features'), (context.lessons, context.held_out)):
        if worker == 0:
            folder.mkdir(parents=True, exist_ok=True)
            Features(folder, lessons, 'w+')
        if count > 1:
            dist.barrier()
        part = range(worker * len(lessons) // count, (worker + 1) * len(lessons) // count)
        with torch.autocast('cpu', torch.bfloat16, enabled=context.bf16):
            Features(folder, lessons, 'r+').write(networks, lessons, part)


def answers(context: Context) -> Trainer:
    networks = chosen(understanding.build(context.vocabulary), 'projector', 'decoder')
    context.load(networks, {*networks})
    lessons = context.lessons, context.held_out
    mined = tuple(Features(folder, some) for folder, some in zip(context.folders('features'), lessons))
    make = Answers(*lessons, context.vocabulary, context.batch, mined)

    def loss(batch: dict) -> dict:
        seen = networks['projector'](batch['mined']) if 'mined' in batch else None
        return understanding.language_loss(networks['decoder'], batch, seen)

    return context.trainer('answers', networks, make, loss, average=0.999, muon=True)


def vae(context: Context) -> Trainer:
    networks = chosen(drawing.build(context.vocabulary), 'vae')
    context.load(networks, set())
    make = drawing.Pictures(context.lessons, context.held_out, context.batch)
    loss = lambda pixels: drawing.vae_loss(networks['vae'], pixels)
    return context.trainer('vae', networks, make, loss, average=0.999)


def latents(context: Context) -> None:
    networks = chosen(drawing.build(context.vocabulary), 'vae')
    context.load(networks, {'vae'})
    train, held_out = context.folders('latents')
    scale = drawing.write_latents(networks['vae'].eval(), context.lessons, train)
    drawing.write_latents(networks['vae'], context.held_out, held_out)
    drawing.save_scale(context.run, scale)
    print(f'latents: {len(context.lessons)} drawings, scaling factor {scale:.4f}')


def draw(context: Context) -> Trainer:
    networks = chosen(drawing.build(context.vocabulary), 'text_1', 'text_2', 'unet')
    context.load(networks, set())
    scale = drawing.load_scale(context.run)
    if scale is None:
        raise SystemExit(f'expected latents in {context.run} but found none: run the latents stage first')
    files = tuple(folder / 'latents.npy' for folder in context.folders('latents'))
    make = drawing.Drawings(context.lessons, context.held_out, files, context.vocabulary, context.batch, scale)
    loss = lambda batch: drawing.denoising_loss(networks, batch)
    return context.trainer('draw', networks, make, loss, average=0.999, muon=True)


@dataclass
class Stage:
    build: Callable[[Context], Trainer | None]
    steps: int = 0
    batch: int = 0
    rate: float = 0


STAGES = {
    'convnext': Stage(convnext, 6000, 96, 2e-3),
    'vision': Stage(vision, 8000, 32, 1e-3),
    'text': Stage(text, 5000, 16, 1e-3),
    'mining': Stage(mining, 6000, 16, 1e-3),
    'joint': Stage(joint, 8000, 16, 3e-4),
    'features': Stage(features),
    'answers': Stage(answers, 6000, 48, 8e-4),
    'vae': Stage(vae, 6000, 16, 1e-3),
    'latents': Stage(latents),
    'draw': Stage(draw, 20000, 32, 5e-4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('stage', choices=STAGES)
    parser.add_argument('--data', type=Path, required=True, help='shards of the training split')
    parser.add_argument('--held-out', type=Path, required=True, help='shards of the validation split')
    parser.add_argument('--run', type=Path, required=True)
    parser.add_argument('--steps', type=int, help='of the whole stage, what is done included')
    parser.add_argument('--batch', type=int)
    parser.add_argument('--rate', type=float, help='greatest learning rate')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--threads', type=int, default=1, help='two chains of stages side by side use two cores better')
    parser.add_argument('--bf16', action='store_true', help='multiply in bf16; faster where the CPU can')
    parser.add_argument('--freeze-towers', action='store_true', help='mining, joint: train neither ConvNeXt nor ViT')
    parser.add_argument('--restart', action='store_true', help='begin the stage anew, from the newest weights')
    parser.add_argument('--workers', type=int, default=1, help='processes that share the stage, with --batch examples each')
    arguments = parser.parse_args()
    if arguments.workers == 1:
        return work(0, arguments)
    with tempfile.TemporaryDirectory() as folder:
        arguments.meeting = Path(folder, 'meeting')
        try:
            start_processes(work, (arguments,), arguments.workers, start_method='fork')
        except ProcessExitedException as error:
            raise SystemExit(error.exit_code) from None


def work(worker: int, arguments: argparse.Namespace) -> None:
    if arguments.workers > 1:
        dist.init_process_group(
            'gloo', init_method=f'file://{arguments.meeting}', rank=worker, world_size=arguments.workers
        )
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    stage = STAGES[arguments.stage]
    context = Context(
        arguments.run,
        Lessons(arguments.data),
        Lessons(arguments.held_out),
        Vocabulary(arguments.run),
        arguments.batch or stage.batch,
        arguments.rate or stage.rate,
        arguments.bf16,
        arguments.freeze_towers,
    )
    trainer = stage.build(context)
    if trainer:
        trainer.train(arguments.steps or stage.steps, context.batch, arguments.seed, arguments.restart)


if __name__ == '__main__':
    main()
