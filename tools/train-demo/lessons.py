"""Data sets of the demo world, as lib/demo/make-dataset.ts writes them, and what is learnt from a scene."""

import io
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from config import MEAN, STD, VISION

GRID = VISION['image_size'] // VISION['patch_size']
SLOTS = 4  # characters that a patch can hold: all of a sign
CHARACTERS = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'
DRAWN = 2  # the scene of a lesson that is to be drawn
# Letters stand this far apart, in heights of a letter: lib/demo/glyphs.ts has 0.80 to 0.90.
PITCH = 0.85


class Lessons:
    """The lessons of a folder of shards. Threads may share it."""

    def __init__(self, folder: str | Path):
        self.lines: list[tuple[Path, int, int]] = []
        for path in sorted(Path(folder).glob('*.jsonl')):
            offset = 0
            with path.open('rb') as file:
                for line in file:
                    self.lines.append((path, offset, len(line)))
                    offset += len(line)
        if not self.lines:
            raise SystemExit(f'expected shards (*.jsonl, *.images) in {folder} but found none: see README.md, "Data"')
        self.files = threading.local()

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict:
        """`seed`, `scenes`, `images`, `examples`: `DatasetLine` of lib/demo/dataset.ts."""
        path, offset, length = self.lines[index]
        return json.loads(self._read(path, offset, length)) | {'path': path.with_suffix('.images')}

    def picture(self, lesson: dict, scene: int) -> np.ndarray:
        """The picture of a lesson's scene, [side, side, 3] bytes."""
        image = lesson['images'][scene]
        data = self._read(lesson['path'], image['offset'], image['bytes'])
        side = image['pixels']
        if len(data) == side * side * 3:
            return np.frombuffer(data, np.uint8).reshape(side, side, 3)
        return np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))

    def _read(self, path: Path, offset: int, length: int) -> bytes:
        files = self.files.__dict__
        if path not in files:
            files[path] = path.open('rb')
        files[path].seek(offset)
        return files[path].read(length)


def prompt_of(lesson: dict) -> str:
    """The prompt of a lesson's drawing, as the language model is taught to write it."""
    answers = (turn['answer'] for example in lesson['examples'] if not example['pictures'] for turn in example['turns'])
    return next(answer for answer in answers if answer.startswith('<h>')).removeprefix('<h>').removesuffix('</h>')


def normalised(pictures: list[np.ndarray]) -> Tensor:
    """Bytes [S, S, 3] each -> what CLIP's preprocessor makes of them, [B, 3, S, S]."""
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


class Labels:
    """Names to numbers. 0 stands for nothing in `kinds` and characters."""

    def __init__(self, kinds: list[str], colours: list[str]):
        self.kinds, self.colours = kinds, colours
        self.kind_of = {kind: i + 1 for i, kind in enumerate(kinds)}
        self.character_of = {character: i + 1 for i, character in enumerate(CHARACTERS)}

    @staticmethod
    def of(lessons: Lessons) -> 'Labels':
        kinds, colours = set(), set()
        for i in range(len(lessons)):
            for scene in lessons[i]['scenes']:
                colours.add(scene['background']['colour'])
                kinds.update(thing['kind'] for thing in scene['objects'])
        return Labels(sorted(kinds), sorted(colours))

    def text_of(self, sign: dict) -> np.ndarray:
        """The sign's characters, [SLOTS], empty ones 0."""
        numbers = [self.character_of[character] for character in sign['text']]
        return np.array(numbers + [0] * (SLOTS - len(numbers)))

    def patches(self, scene: dict) -> dict[str, np.ndarray]:
        """What each of the N patches shows.

        `kind` [N]: what covers most of the patch's middle; `centre` [N]: whose centre lies in it; `characters`
        [N, SLOTS]: of the sign whose centre lies in it; `offset` [N, 2]: of that centre, object's or sign's, from the
        patch's, x then y in -1..1; `colour` []: of the background.
        """
        kind, centre = np.zeros((2, GRID, GRID), np.int64)
        characters = np.zeros((GRID, GRID, SLOTS), np.int64)
        offset = np.zeros((GRID, GRID, 2), np.float32)
        middles = (np.arange(GRID) + 0.5) / GRID
        for sign in scene['signs']:
            place = patch_of(sign['y']), patch_of(sign['x'])
            characters[place] = self.text_of(sign)
            offset[place] = offset_of(sign)
        for thing in scene['objects']:
            number = self.kind_of[thing['kind']]
            distance = np.hypot(middles[None, :] - thing['x'], middles[:, None] - thing['y'])
            kind[distance < 0.45 * thing['size']] = number
            place = patch_of(thing['y']), patch_of(thing['x'])
            centre[place] = number
            offset[place] = offset_of(thing)
        return {
            'kind': kind.reshape(-1),
            'centre': centre.reshape(-1),
            'characters': characters.reshape(-1, SLOTS),
            'offset': offset.reshape(-1, 2),
            'colour': np.array(self.colours.index(scene['background']['colour'])),
        }


def offset_of(thing: dict) -> tuple[float, float]:
    """Where the centre of an object or a sign lies in its patch, x then y in -1..1."""
    x, y = (2 * (thing[axis] * GRID - patch_of(thing[axis])) - 1 for axis in 'xy')
    return x, y


def patch_of(position: float) -> int:
    return min(int(position * GRID), GRID - 1)


def stacked(rows: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    return {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}


def prefetched(make: Callable[[int], object], first: int, last: int, threads: int = 2, ahead: int = 4) -> Iterator:
    """`make(first)` to `make(last - 1)`, made ahead of their use; decoding pictures leaves Python's lock free."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = [pool.submit(make, step) for step in range(first, min(first + ahead, last))]
        try:
            for step in range(first, last):
                if step + ahead < last:
                    waiting.append(pool.submit(make, step + ahead))
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()
