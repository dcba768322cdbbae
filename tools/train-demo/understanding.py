"""What the stages of the vision-language model learn from."""

import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from config import CONVNEXT, DECODER, PIXELS, VISION
from lessons import CHARACTERS, DRAWN, GRID, PITCH, SLOTS, Labels, Lessons, normalised, prefetched, prompt_of, stacked
from networks.clip import ClipVision
from networks.convnext import ConvNext, concatenated
from networks.decoder import Decoder
from networks.mining import Mining, Projector
from trainer import Metrics
from vocabulary import IMAGE, Vocabulary

TOKENS = GRID * GRID
MAP_WIDTH = sum(CONVNEXT['dims'])
CROP = 64
ZOOM = 2.4
SIGN_WIDTH = 34  # pixels of the widest
# How many of the conversations begin so: what is learnt last, and what would else never be first beside pictures.
BEGINNINGS = {'relation': 0.26, 'caption': 0.4, 'sign': 0.06, 'count': 0.1, 'talk': 0.06, 'draw': 0.04}
DRAWINGS_EVERY = 4  # lessons of which the drawing is among the features too
MOST_TEXT = 256  # ids of a conversation, pictures aside


def build(vocabulary: Vocabulary) -> dict[str, nn.Module]:
    """The networks that are shipped."""
    return {
        'convnext': ConvNext(CONVNEXT),
        'vision': ClipVision(VISION),
        'mining': Mining(VISION['hidden_size'], MAP_WIDTH),
        'projector': Projector(VISION['hidden_size'], DECODER['hidden_size']),
        'decoder': Decoder(DECODER | {'vocab_size': vocabulary.size}),
    }


def low_resolution(pixels: Tensor) -> Tensor:
    """What the release makes of the high-resolution view for CLIP."""
    return F.interpolate(pixels, size=VISION['image_size'], mode='bilinear', align_corners=False)


def mine(networks: dict[str, nn.Module], pixels: Tensor) -> Tensor:
    """pixels [B, 3, PIXELS, PIXELS], normalised -> what the projector reads of the patches, [B, TOKENS, VISION's C]."""
    tokens = networks['vision'](low_resolution(pixels))
    return tokens + networks['mining'](tokens, networks['convnext'](pixels))


def encode(networks: dict[str, nn.Module], pixels: Tensor) -> Tensor:
    """pixels [B, 3, PIXELS, PIXELS], normalised -> the decoder's embeddings of the patches, [B, TOKENS, C]."""
    return networks['projector'](mine(networks, pixels))


def accuracy(logits: Tensor, target: Tensor, where: Tensor | None = None) -> Tensor:
    right = (logits.argmax(-1) == target).float()
    return right.mean() if where is None else right[where].mean() if where.any() else torch.ones(())


class PatchHeads(nn.Module):
    """Reads `Labels.patches` off the states of patches. Only there for training."""

    def __init__(self, width: int, labels: Labels, characters: bool):
        super().__init__()
        kinds = len(labels.kinds) + 1
        self.norm = nn.LayerNorm(width)
        self.kind, self.centre = nn.Linear(width, kinds), nn.Linear(width, kinds)
        self.colour = nn.Linear(width, len(labels.colours))
        self.offset = nn.Linear(width, 2)
        self.characters = nn.Linear(width, SLOTS * (len(CHARACTERS) + 1)) if characters else None

    def forward(self, states: Tensor, labels: dict[str, Tensor]) -> Metrics:
        """states [B, TOKENS, C] -> losses, and accuracies where there is something."""
        x = self.norm(states)
        kind, centre, colour = self.kind(x), self.centre(x), self.colour(x.mean(1))
        losses = [
            F.cross_entropy(kind.flatten(0, 1), labels['kind'].flatten()),
            F.cross_entropy(centre.flatten(0, 1), labels['centre'].flatten()),
            F.cross_entropy(colour, labels['colour']),
        ]
        metrics = {
            'kind': accuracy(kind, labels['kind'], labels['kind'] > 0),
            'centre': accuracy(centre, labels['centre'], labels['centre'] > 0),
            'colour': accuracy(colour, labels['colour']),
        }
        placed = labels['centre'] > 0
        if self.characters is not None:
            read = self.characters(x).unflatten(-1, (SLOTS, -1))
            target = labels['characters']
            # Nearly every slot is empty: those that are not weigh ten times as much.
            loss = F.cross_entropy(read.flatten(0, 2), target.flatten(), reduction='none')
            weight = 1 + 9 * (target.flatten() > 0)
            losses.append(3 * (loss * weight).sum() / weight.sum())
            metrics['character'] = accuracy(read, target, target > 0)
            placed |= target[..., 0] > 0
        away = (self.offset(x) - labels['offset'])[placed].float().square().mean()
        losses.append(away)
        metrics['away'] = away.sqrt()
        return {'loss': torch.stack(losses).sum(), **metrics}


def seen(lessons: Lessons, lesson: dict, scene: int) -> np.ndarray:
    """A lesson's picture, at the size that the model looks at; drawings are enlarged as the image processor does it."""
    picture = lessons.picture(lesson, scene)
    if scene == DRAWN:
        return np.asarray(Image.fromarray(picture).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC))
    if len(picture) != PIXELS:
        raise SystemExit(
            f'expected pictures of {PIXELS} pixels but found {len(picture)}: make the data with --pixels {PIXELS}'
        )
    return picture


class Scenes:
    """Whole pictures and what each patch of them shows: of a lesson's two scenes the one with more signs; some are
    drawings, which are to be told apart too."""

    def __init__(self, lessons: Lessons, held_out: Lessons, labels: Labels, batch: int):
        self.lessons, self.held_out, self.labels, self.batch = lessons, held_out, labels, batch

    def __call__(self, seed: int, held_out: bool, done: float) -> tuple[Tensor, dict[str, Tensor]]:
        random, lessons = np.random.default_rng(seed), self.held_out if held_out else self.lessons
        pictures, labels = [], []
        for _ in range(self.batch):
            lesson = lessons[random.integers(len(lessons))]
            # Signs are what takes longest to learn.
            which = DRAWN if random.random() < 0.2 else max(0, 1, key=lambda i: len(lesson['scenes'][i]['signs']))
            pictures.append(seen(lessons, lesson, which))
            labels.append(self.labels.patches(lesson['scenes'][which]))
        return normalised(pictures), stacked(labels)


class Crops(Scenes):
    """Squares of CROP pixels: a third of them of objects, the rest of signs, at first ZOOM times as large.

    Letters of their own size are not learnt from scratch: after 100,000 crops a ConvNeXt, which sees them through
    squares of 4 pixels, was still at chance. Larger ones are, and then smaller and smaller ones.
    """

    side, zoom, share_of_objects = CROP, ZOOM, 1 / 3

    def __call__(self, seed: int, held_out: bool, done: float) -> dict[str, Tensor]:
        random, lessons = np.random.default_rng(seed), self.held_out if held_out else self.lessons
        objects = int(self.batch * self.share_of_objects)
        rows: dict[str, list] = {key: [] for key in ('objects', 'kind', 'signs', 'text', 'at', 'character')}
        while len(rows['objects']) < objects or len(rows['signs']) < self.batch - objects:
            lesson, which = lessons[random.integers(len(lessons))], int(random.integers(2))
            scene = lesson['scenes'][which]
            wants_object = len(rows['objects']) < objects
            if not wants_object and not scene['signs']:
                continue
            picture = seen(lessons, lesson, which)
            if wants_object:
                thing = scene['objects'][random.integers(len(scene['objects']))]
                side = random.uniform(CROP, max(CROP, 1.2 * thing['size'] * PIXELS))
                x, y = (thing[axis] * PIXELS + random.uniform(-8, 8) for axis in 'xy')
                rows['objects'].append(resized(cropped(picture, x, y, round(side))[0], CROP))
                rows['kind'].append(self.labels.kind_of[thing['kind']])
            for sign in scene['signs'][: self.batch - objects - len(rows['signs'])]:
                zoom = max(1, (1 + (self.zoom - 1) * min(1, (0.65 - done) / 0.5)) * random.uniform(0.85, 1))
                side = round(self.side / zoom)
                x, y = (sign[axis] * PIXELS for axis in 'xy')
                free = max(0, side / 2 - SIGN_WIDTH / 2)  # how far off the middle a sign is still whole
                crop, (left, top) = cropped(picture, *(v + random.uniform(-free, free) for v in (x, y)), side)
                text = self.labels.text_of(sign)
                length = len(sign['text'])
                which_character = random.integers(length)
                right = (which_character + 0.5 - length / 2) * PITCH * sign['size'] * PIXELS
                rows['signs'].append(resized(crop, self.side))
                rows['text'].append(text)
                rows['at'].append(
                    (((x - left) / side, (y - top) / side), ((x + right - left) / side, (y - top) / side))
                )
                rows['character'].append(text[which_character])
        return {
            **{key: normalised(rows[key]) for key in ('objects', 'signs') if rows[key]},
            'at': torch.tensor(rows['at'], dtype=torch.float32),
            **{key: torch.from_numpy(np.stack(rows[key])) for key in ('kind', 'text', 'character') if rows[key]},
        }


class Signs(Crops):
    """Squares of twice the side with a sign in each, `batch` times four of them, of their own size.

    What a ConvNeXt reads on a small square it does not yet read in a whole picture, where it sees much more around a
    sign: 91 % of signs became 66 %. Whole pictures would be the other extreme: nearly all of one is not the sign.
    """

    side, zoom, share_of_objects = 2 * CROP, 1, 0

    def __init__(self, lessons: Lessons, held_out: Lessons, labels: Labels, batch: int):
        super().__init__(lessons, held_out, labels, 4 * batch)


def cropped(picture: np.ndarray, x: float, y: float, side: int) -> tuple[np.ndarray, tuple[int, int]]:
    """The square of `side` around x, y, moved to lie in the picture; and its left and top."""
    side = min(side, PIXELS)
    left, top = (int(np.clip(round(v - side / 2), 0, PIXELS - side)) for v in (x, y))
    return picture[top : top + side, left : left + side], (left, top)


def resized(crop: np.ndarray, side: int) -> np.ndarray:
    if len(crop) == side:
        return crop
    return np.asarray(Image.fromarray(crop).resize((side, side), Image.Resampling.BICUBIC))


class Features:
    """What was mined of lessons' pictures, f16: `scenes.npy` [N, 2, TOKENS, C], `drawings.npy` [N / DRAWINGS_EVERY, ...]."""

    def __init__(self, folder: Path, lessons: Lessons, mode: str = 'r'):
        shape = (TOKENS, VISION['hidden_size'])
        wanted = {'scenes': (len(lessons), 2, *shape), 'drawings': (-(-len(lessons) // DRAWINGS_EVERY), *shape)}
        self.maps = {}
        for name, shape in wanted.items():
            path = folder / f'{name}.npy'
            if mode == 'w+':
                self.maps[name] = np.lib.format.open_memmap(path, mode, np.float16, shape)
                continue
            self.maps[name] = np.load(path, mmap_mode=mode) if path.exists() else np.empty(0)
            if self.maps[name].shape != shape:
                raise SystemExit(
                    f'expected {shape} in {path} but found {self.maps[name].shape}: run the features stage with this data'
                )

    def of(self, index: int, scene: int) -> np.ndarray:
        if scene == DRAWN:
            return self.maps['drawings'][index // DRAWINGS_EVERY]
        return self.maps['scenes'][index, scene]

    @torch.no_grad()
    def write(self, networks: dict[str, nn.Module], lessons: Lessons, indices: range) -> None:
        """Of the lessons of `indices`."""
        places = [(i, scene) for i in indices for scene in ((0, 1, DRAWN) if i % DRAWINGS_EVERY == 0 else (0, 1))]
        batches = [places[start : start + 32] for start in range(0, len(places), 32)]
        pictures = lambda step: normalised([seen(lessons, lessons[i], scene) for i, scene in batches[step]])
        for step, pixels in enumerate(prefetched(pictures, 0, len(batches))):
            for (i, scene), mined in zip(batches[step], mine(networks, pixels).float().numpy(), strict=True):
                self.of(i, scene)[:] = mined
            if step % 100 == 99:
                print(f'features: {step + 1} of {len(batches)} batches', flush=True)
        for array in self.maps.values():
            array.flush()


class CropHeads(nn.Module):
    """What is on a crop: its object from the last map; from all maps, as mining reads them, a sign's text at its centre
    and one of its characters at that one's place."""

    def __init__(self, labels: Labels):
        super().__init__()
        width, characters = CONVNEXT['dims'][-1], len(CHARACTERS) + 1
        part = lambda width, count: nn.Sequential(nn.LayerNorm(width), nn.Linear(width, count))
        self.kind = part(width, len(labels.kinds) + 1)
        self.text, self.character = part(MAP_WIDTH, SLOTS * characters), part(MAP_WIDTH, characters)

    def forward(self, convnext: nn.Module, batch: dict[str, Tensor]) -> Metrics:
        kind = self.kind(convnext(batch['objects'])[-1].mean((1, 2)))
        read = self.read(convnext, batch)
        loss = F.cross_entropy(kind, batch['kind']) + read['loss']
        return read | {'loss': loss, 'kind': accuracy(kind, batch['kind'])}

    def read(self, convnext: nn.Module, batch: dict[str, Tensor]) -> Metrics:
        """Of the signs alone."""
        maps = concatenated(convnext(batch['signs'])).permute(0, 3, 1, 2)
        places = (2 * batch['at'] - 1)[:, None].to(maps.dtype)
        at_sign, at_character = F.grid_sample(maps, places, mode='bilinear', align_corners=False)[:, :, 0].unbind(-1)
        text, character = self.text(at_sign).unflatten(-1, (SLOTS, -1)), self.character(at_character)
        loss = F.cross_entropy(text.flatten(0, 1), batch['text'].flatten())
        return {
            'loss': loss + F.cross_entropy(character, batch['character']),
            'character': accuracy(character, batch['character']),
            'text': (text.argmax(-1) == batch['text']).all(-1).float().mean(),
        }


class Oracle(nn.Module):
    """Embeds what patches show, in place of vision: so the decoder learns to talk before there is anything to see with.

    The mining stage then teaches the projector these very embeddings. A kind's are made of those of its words: asked
    for one, the decoder finds its patches because they are alike, which it need not learn for each kind by itself.
    """

    def __init__(self, vocabulary: Vocabulary):
        super().__init__()
        labels, width = vocabulary.labels, DECODER['hidden_size']
        kinds = len(labels.kinds) + 1
        self.kind, self.centre = nn.Embedding(kinds, width), nn.Embedding(kinds, width)
        self.colour = nn.Embedding(len(labels.colours), width)
        self.characters = nn.Embedding(SLOTS * (len(CHARACTERS) + 1), width)
        self.position = nn.Embedding(TOKENS, width)
        self.offset = nn.Linear(2, width, bias=False)
        for table in self.children():
            nn.init.normal_(table.weight, std=0.5 * width**-0.5)
        self.kind_words, self.centre_words = (nn.Linear(width, width, bias=False) for _ in range(2))
        for layer in (self.kind_words, self.centre_words):
            nn.init.eye_(layer.weight)
        words = torch.zeros(kinds, vocabulary.size)
        for kind, number in labels.kind_of.items():
            for id in vocabulary.words_of(kind):
                words[number, id] = 1
        self.register_buffer('words', words, persistent=False)

    def forward(self, labels: dict[str, Tensor], decoder: Decoder) -> Tensor:
        """`Labels.patches` of B pictures -> [B, TOKENS, C]."""
        slots = torch.arange(SLOTS) * (len(CHARACTERS) + 1)
        words = self.words @ decoder.model['embed_tokens'].weight
        return (
            F.embedding(labels['kind'], self.kind.weight + self.kind_words(words))
            + F.embedding(labels['centre'], self.centre.weight + self.centre_words(words))
            + self.colour(labels['colour'])[:, None]
            + self.characters(labels['characters'] + slots).sum(2)
            + self.offset(labels['offset'])
            + self.position.weight
        )


class Conversations(Scenes):
    """Conversations of a lesson, those about one picture joined to longer ones, and the pictures or their labels."""

    captions = captions_of_two = 0.0  # how many batches are of captions alone, and how many of these of two pictures
    of_two, of_none = 0.2, 0.08  # how many of the others are about two pictures, and about none
    # How many pictures in which no kind is there twice are passed over: else "two hearts" remain "a heart and a heart".
    passed_over = 0.5
    drawings_every = 1  # lessons

    def __init__(self, lessons: Lessons, held_out: Lessons, vocabulary: Vocabulary, batch: int, pictures: bool):
        super().__init__(lessons, held_out, vocabulary.labels, batch)
        self.vocabulary, self.pictures = vocabulary, pictures
        if not all('drills' in some[0] for some in (lessons, held_out)):
            raise SystemExit('expected lessons with drills: make the data anew with lib/demo/make-dataset.ts')

    def __call__(self, seed: int, held_out: bool, done: float) -> dict[str, Tensor]:
        random, lessons = np.random.default_rng(seed), self.held_out if held_out else self.lessons
        # All of a batch have as many pictures, so that little is padding; and so have those of all workers at a step,
        # which would wait for the one with the longest rows.
        shared = random if held_out else np.random.default_rng(int(done * 2**40))
        captions = shared.random() < self.captions
        of_two, of_none = (self.captions_of_two, 0) if captions else (self.of_two, self.of_none)
        count = int(shared.choice([1, 2, 0], p=[1 - of_two - of_none, of_two, of_none]))
        rows, shown = [], []
        while len(rows) < self.batch:
            index = int(random.integers(len(lessons)))
            drawing = count == 1 and random.random() < 0.15
            if drawing:
                index -= index % self.drawings_every
            lesson = lessons[index]
            pictures = [self._one_of(lesson, random)] if count == 1 else list(range(count))
            if count == 1 and random.random() < self.passed_over and not repeats(lesson['scenes'][pictures[0]]):
                continue
            fitting = [e for e in lesson['examples'] + lesson['drills'] if e['pictures'] == pictures]
            if drawing:
                fitting = [about_drawing(lesson)]
            if not fitting:
                continue
            chosen = [fitting[i] for i in random.permutation(len(fitting))]
            begin = random.choice(['', *BEGINNINGS], p=[1 - sum(BEGINNINGS.values()), *BEGINNINGS.values()])
            if captions:
                begin = 'caption'
            if begin:
                chosen.sort(key=lambda example: any(turn['task'] != begin for turn in example['turns']))
            elif random.random() < 0.5:
                # Else whatever was named before would be there.
                chosen.sort(key=lambda example: example['turns'][0]['task'] != 'yesno')
            turns = self._fill(chosen[:1] if captions or count == 0 else chosen, count)
            turns = [turn | {'question': typed(turn['question'], random)} for turn in turns]
            rows.append(self.vocabulary.conversation(turns, count))
            shown.extend((index, lesson, scene) for scene in chosen[0]['pictures'])
        return collate(rows) | (self._show(held_out, shown) if shown else {})

    def _show(self, held_out: bool, shown: list[tuple[int, dict, int]]) -> dict[str, Tensor]:
        """What is seen of scenes of lessons: their pictures, and the labels that stand in for them or that heads learn."""
        lessons = self.held_out if held_out else self.lessons
        labels = stacked([self.labels.patches(lesson['scenes'][scene]) for _, lesson, scene in shown])
        if not self.pictures:
            return {'labels': labels}
        return {'labels': labels, 'pixels': normalised([seen(lessons, lesson, scene) for _, lesson, scene in shown])}

    @staticmethod
    def _one_of(lesson: dict, random: np.random.Generator) -> int:
        """One of the two scenes, more often the fuller one: which of several is the nearest is hard to learn."""
        if random.random() < 0.5:
            return int(random.integers(2))
        return max(0, 1, key=lambda i: len(lesson['scenes'][i]['objects']) + len(lesson['scenes'][i]['signs']))

    def _fill(self, examples: list[dict], count: int) -> list[dict]:
        """Turns of as many examples as there is room for, the first one's at least."""
        turns = examples[0]['turns']
        room = MOST_TEXT - len(self.vocabulary.conversation(turns, count)[0])
        for example in examples[1:]:
            # What does not fit makes room for a shorter one: else a third of a batch is padding.
            length = len(self.vocabulary.conversation(example['turns'], 0)[0])
            if length <= room:
                turns, room = turns + example['turns'], room - length
        return turns


class Answers(Conversations):
    """Conversations and what was mined of their pictures before.

    Rows of a caption alone are a third as long as others, so many more of them are learnt.
    """

    captions, captions_of_two, of_two, of_none = 0.55, 0.3, 0.4, 0.12
    passed_over, drawings_every = 0.25, DRAWINGS_EVERY

    def __init__(
        self, lessons: Lessons, held_out: Lessons, vocabulary: Vocabulary, batch: int, mined: tuple[Features, Features]
    ):
        super().__init__(lessons, held_out, vocabulary, batch, pictures=False)
        self.mined = dict(zip((False, True), mined))

    def _show(self, held_out: bool, shown: list[tuple[int, dict, int]]) -> dict[str, Tensor]:
        mined = [self.mined[held_out].of(index, scene) for index, _, scene in shown]
        return {'mined': torch.from_numpy(np.stack(mined)).float()}


def typed(question: str, random: np.random.Generator) -> str:
    """As people type it: some begin with a small letter, leave the mark out or put another."""
    if random.random() < 0.3:
        question = re.sub(r'(^|[.?] )([A-Z])(?![A-Z])', lambda match: match[1] + match[2].lower(), question)
    if random.random() < 0.2:
        question = question[:-1] + ('!' if random.random() < 0.3 else '')
    return question


def repeats(scene: dict) -> bool:
    kinds = [thing['kind'] for thing in scene['objects']]
    return len(set(kinds)) < len(kinds)


def about_drawing(lesson: dict) -> dict:
    """An example that asks what is in the lesson's drawing, in the words of its caption."""
    turns = (turn for example in lesson['examples'] for turn in example['turns'])
    question = next(turn['question'] for turn in turns if turn['task'] == 'caption')
    answer = prompt_of(lesson)
    turn = {'task': 'caption', 'question': question, 'answer': f'{answer[0].upper()}{answer[1:]}.'}
    return {'pictures': [DRAWN], 'turns': [turn]}


def spread(ids: list[int], values: list[int] | None = None) -> list[int]:
    """`values`, or the ids themselves, with those at an `IMAGE` repeated for each of its patches."""
    return [
        value for id, value in zip(ids, ids if values is None else values) for _ in range(TOKENS if id == IMAGE else 1)
    ]


def collate(rows: list[tuple[list[int], list[bool]]]) -> dict[str, Tensor]:
    """`ids` [B, T] padded, `IMAGE` for each patch; `target` [B, T]: the next id where it is to be learnt, else -1."""
    targets = [spread(ids, [id if learn else -1 for id, learn in zip(ids, learnt)]) for ids, learnt in rows]
    length = max(map(len, targets)) - 1
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    target = torch.full((len(rows), length), -1)
    for i, (row, wanted) in enumerate(zip(rows, targets)):
        ids[i, : len(wanted) - 1] = torch.tensor(spread(row[0])[:-1])
        target[i, : len(wanted) - 1] = torch.tensor(wanted[1:])
    return {'ids': ids, 'target': target}


def embedded(decoder: Decoder, ids: Tensor, features: Tensor | None) -> Tensor:
    """ids [B, T], features [pictures, TOKENS, C] in the places of `IMAGE` -> [B, T, C]."""
    embeds = decoder.embed(ids.clamp(min=0))
    if features is None:
        return embeds
    return embeds.masked_scatter((ids == IMAGE)[..., None], features.to(embeds.dtype))


def answers_of(learnt: Tensor) -> Tensor:
    """learnt [B, T] -> for each of its tokens, which of the answers it belongs to."""
    first = learnt & ~F.pad(learnt, (1, 0))[:, :-1]
    return first.flatten().cumsum(0)[learnt.flatten()] - 1


def language_loss(decoder: Decoder, batch: dict[str, Tensor], features: Tensor | None) -> Metrics:
    """`token`, `answer`: how many are right, of an answer all tokens."""
    states = decoder(embedded(decoder, batch['ids'], features))
    where = batch['target'] >= 0
    logits, target = decoder.logits(states[where]), batch['target'][where]
    answers = answers_of(where)
    # One over the fourth root of how many tokens an answer has. By tokens alone, captions would drown yes and no; by
    # answers alone, one of 25 tokens would count as little as a yes.
    weight = answers.bincount().float().pow(-0.25)[answers]
    loss = (F.cross_entropy(logits, target, reduction='none') * weight).sum() / weight.sum()
    right = (logits.argmax(-1) == target).float()
    whole = torch.ones(int(answers.max()) + 1).scatter_reduce(0, answers, right, 'amin')
    return {'loss': loss, 'token': right.mean(), 'answer': whole.mean()}
