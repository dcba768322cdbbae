"""Tokenizers of the demo model, made of the words of a data set, and its prompts.

    python vocabulary.py --data data/train --run run

Both kinds give a known word as one token and spell any other. Files are the release's: `tokenizer.json` of Gemma,
`vocab.json` and `merges.txt` of CLIP.
"""

import argparse
import json
import re
from pathlib import Path

from tokenizers import Tokenizer

from config import TEXT
from lessons import Labels, Lessons

SPACE = '\u2581'
PAD, EOS, BOS, UNK, START, END = '<pad>', '<eos>', '<bos>', '<unk>', '<start_of_turn>', '<end_of_turn>'
SPECIAL = (PAD, EOS, BOS, UNK, START, END)
IMAGE = -200  # where a picture's embeddings go

# A word with the space before it; of all else, what signs say included, each character.
PIECE = f'{SPACE}?[A-Z]?[a-z]+|[^a-z]'


def added_token(content: str) -> dict:
    flags = dict.fromkeys(('lstrip', 'normalized', 'rstrip', 'single_word'), False)
    return {'content': content, **flags, 'special': True}


def gemma_tokenizer(texts: list[str]) -> dict:
    """`tokenizer.json`: each word of `texts` is a token."""
    words = sorted({piece for text in texts for piece in re.findall(PIECE, text.replace(' ', SPACE))})
    characters = [chr(code) for code in range(32, 127)] + ['\n', SPACE]
    pieces = dict.fromkeys([*SPECIAL, *characters, *words])
    return {
        'version': '1.0',
        'truncation': None,
        'padding': None,
        'added_tokens': [{'id': i, **added_token(token)} for i, token in enumerate(SPECIAL)],
        'normalizer': {'type': 'Replace', 'pattern': {'String': ' '}, 'content': SPACE},
        'pre_tokenizer': {'type': 'Split', 'pattern': {'Regex': PIECE}, 'behavior': 'Isolated', 'invert': False},
        'post_processor': {
            'type': 'TemplateProcessing',
            'single': [{'SpecialToken': {'id': BOS, 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}],
            'pair': [
                {part: {'id': name, 'type_id': type_id}}
                for type_id, sequence in enumerate('AB')
                for part, name in (('SpecialToken', BOS), ('Sequence', sequence))
            ],
            'special_tokens': {BOS: {'id': BOS, 'ids': [SPECIAL.index(BOS)], 'tokens': [BOS]}},
        },
        'decoder': {
            'type': 'Sequence',
            'decoders': [{'type': 'Replace', 'pattern': {'String': SPACE}, 'content': ' '}, {'type': 'Fuse'}],
        },
        'model': {
            'type': 'BPE',
            'dropout': None,
            'unk_token': UNK,
            'continuing_subword_prefix': None,
            'end_of_word_suffix': None,
            'fuse_unk': False,
            'byte_fallback': False,
            # A piece that is in the vocabulary is one token; there are no merges, so any other is its characters.
            'ignore_merges': True,
            'vocab': {piece: i for i, piece in enumerate(pieces)},
            'merges': [],
        },
    }


def gemma_tokenizer_config() -> dict:
    return {
        'add_bos_token': True,
        'add_eos_token': False,
        'added_tokens_decoder': {str(i): added_token(token) for i, token in enumerate(SPECIAL)},
        'additional_special_tokens': [START, END],
        'bos_token': BOS,
        'eos_token': EOS,
        'pad_token': PAD,
        'unk_token': UNK,
        'clean_up_tokenization_spaces': False,
        'model_max_length': 2048,
        'padding_side': 'right',
        'tokenizer_class': 'GemmaTokenizer',
    }


CLIP_START, CLIP_END = '<|startoftext|>', '<|endoftext|>'
CLIP_PADS = (CLIP_END, '!')  # of the first and the second text encoder
CLIP_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+"  # of CLIP's pattern, what concerns ASCII


def clip_tokenizer(texts: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """`vocab.json` and the merges of `merges.txt`: each word of `texts` is a token.

    Words grow from their end, where `</w>` marks them, so that no merge of one can break another.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_ins = [chr(256 + i) for i in range(256 - len(printable))]
    characters = [chr(code) for code in printable] + stand_ins
    merges: dict[tuple[str, str], None] = {}
    for word in sorted({word for text in texts for word in re.findall(CLIP_WORD, text.lower())}):
        tail = f'{word[-1]}</w>'
        for character in word[-2::-1]:
            merges[character, tail] = None
            tail = character + tail
    pieces = [*characters, *(f'{c}</w>' for c in characters), *(a + b for a, b in merges), CLIP_START, CLIP_END]
    return {piece: i for i, piece in enumerate(pieces)}, list(merges)


def clip_tokenizer_config(pad: str) -> dict:
    return {
        'add_prefix_space': False,
        'bos_token': CLIP_START,
        'clean_up_tokenization_spaces': False,
        'do_lower_case': True,
        'eos_token': CLIP_END,
        'errors': 'replace',
        'model_max_length': TEXT['max_position_embeddings'],
        'pad_token': pad,
        'tokenizer_class': 'CLIPTokenizer',
        'unk_token': CLIP_END,
    }


class Vocabulary:
    """What `main` wrote to a run: the tokenizers, and the labels of scenes."""

    def __init__(self, run: Path):
        folder = run / 'vocabulary'
        if not (folder / 'labels.json').exists():
            raise SystemExit(f'expected {folder}/labels.json but found none: run vocabulary.py first')
        self.folder = folder
        self.labels = Labels(**json.loads((folder / 'labels.json').read_text()))
        self.tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
        self.size = self.tokenizer.get_vocab_size()
        self.clip_vocab = json.loads((folder / 'vocab.json').read_text())
        self.eos_id = SPECIAL.index(EOS)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def words_of(self, kind: str) -> set[int]:
        """The tokens of a kind's name, of one and of several."""
        plurals = [f'{kind}s', f'{kind}es', f'{kind[:-1]}ies', f'{kind[:-1]}ves', f'{kind[:-2]}ves']
        known = self.tokenizer.token_to_id
        return {
            id
            for name in (kind, *plurals)
            if all(known(f'{SPACE}{word}') is not None for word in name.split(' '))
            for id in self.encode(f' {name}')
        }

    def conversation(self, turns: list[dict], pictures: int) -> tuple[list[int], list[bool]]:
        """Ids of a conversation in Gemma's template with `IMAGE` for each picture, and which of them are to be learnt.

        A last turn without `answer` leaves it open. Source: lib/processing/prompt.ts.
        """
        ids, learnt = [SPECIAL.index(BOS)], [False]

        def add(text: str, learn: bool = False) -> None:
            new = self.encode(text)
            ids.extend(new)
            learnt.extend([learn] * len(new))

        for i, turn in enumerate(turns):
            add(f'{START}user\n')
            for picture in range(pictures if i == 0 else 0):
                if pictures > 1:
                    add(f'Image {picture + 1}:')
                ids.append(IMAGE)
                learnt.append(False)
                add('\n')
            suffix = ' <GEN>' if turn.get('task') == 'draw' else ''
            add(f'{turn["question"]}{suffix}{END}\n{START}model\n')
            if 'answer' in turn:
                add(f'{turn["answer"]}{END}\n{EOS}', learn=True)
        return ids, learnt

    def clip_ids(self, text: str, pad: str) -> list[int]:
        """[77] ids of a prompt of ASCII. The token `pad` fills up, and stands for itself where the text has it."""
        body = []
        for i, section in enumerate(text.lower().split(pad)):
            if i > 0:
                body.append(self.clip_vocab[pad])
            for word in re.findall(CLIP_WORD, section):
                pieces = [*word[:-1], f'{word[-1]}</w>']
                while len(pieces) > 1 and pieces[-2] + pieces[-1] in self.clip_vocab:
                    pieces[-2:] = [pieces[-2] + pieces[-1]]
                body += [self.clip_vocab[piece] for piece in pieces]
        length = TEXT['max_position_embeddings']
        ids = [self.clip_vocab[CLIP_START], *body[: length - 2], self.clip_vocab[CLIP_END]]
        return ids + [self.clip_vocab[pad]] * (length - len(ids))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True, help='shards; a few thousand lessons have every word')
    parser.add_argument('--run', type=Path, required=True)
    arguments = parser.parse_args()

    lessons = Lessons(arguments.data)
    turns = [turn for i in range(len(lessons)) for example in lessons[i]['examples'] for turn in example['turns']]
    texts = [text for turn in turns for text in (f'user\n{turn["question"]} <GEN>', f'model\n{turn["answer"]}')]
    drawn = [text for turn in turns if turn['task'] == 'draw' for text in (turn['question'], turn['answer'])]
    labels = Labels.of(lessons)
    vocab, merges = clip_tokenizer(drawn)

    folder = arguments.run / 'vocabulary'
    folder.mkdir(parents=True, exist_ok=True)
    write = lambda name, value: (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=1) + '\n')
    write('tokenizer.json', gemma_tokenizer([*texts, 'Image 1:']))
    write('labels.json', {'kinds': labels.kinds, 'colours': labels.colours})
    write('vocab.json', vocab)
    (folder / 'merges.txt').write_text('\n'.join(['#version: 0.2', *(f'{a} {b}' for a, b in merges), '']))
    print(
        f'{len(lessons)} lessons: {Vocabulary(arguments.run).size} tokens, {len(vocab)} of CLIP, '
        f'{len(labels.kinds)} kinds, {len(labels.colours)} colours'
    )


if __name__ == '__main__':
    main()
