"""Begins a run with the weights of an exported checkpoint, to teach it more: what export.py wrote, read back.

    python vocabulary.py --data data/train --run run
    python restore.py --checkpoint demo --run run

Networks that only training has (heads, `oracle`) are not in a checkpoint, so `joint` and `mining` cannot go on from it;
`features`, `answers`, `vae`, `latents` and `draw` can.
"""

import argparse
import json
from pathlib import Path

from safetensors.torch import load_file

import drawing
import understanding
from export import FILES
from trainer import save_weights
from vocabulary import Vocabulary

VOCABULARY = {'tokenizer.json': 'tokenizer.json', 'vocab.json': 'sdxl/tokenizer/vocab.json'}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--checkpoint', type=Path, required=True)
    parser.add_argument('--run', type=Path, required=True)
    arguments = parser.parse_args()

    vocabulary = Vocabulary(arguments.run)
    for name, exported in VOCABULARY.items():
        own, other = vocabulary.folder / name, arguments.checkpoint / exported
        if json.loads(own.read_text()) != json.loads(other.read_text()):
            raise SystemExit(f'expected the words of {other} in {own} but found others: the data has changed')
    networks = understanding.build(vocabulary) | drawing.build(vocabulary)
    for name, network in networks.items():
        file, prefix = FILES[name]
        tensors = load_file(arguments.checkpoint / file)
        network.load_state_dict({key: tensors[f'{prefix}{key}'] for key in network.state_dict()})
    save_weights(arguments.run, networks, None)
    scale = json.loads((arguments.checkpoint / 'sdxl/vae/config.json').read_text())['scaling_factor']
    drawing.save_scale(arguments.run, scale)
    print(f'{arguments.run}: weights of {", ".join(networks)}')


if __name__ == '__main__':
    main()
