"""Every stage for a few steps, a stop and a resume, the export, its parity with the library and the way back: one to three minutes.

    npx tsx lib/demo/make-dataset.ts data/smoke --count 200 --drawnPixels 96
    python tools/train-demo/smoke.py --data data/smoke

Weights are random but for those few steps: this shows that the tool works, not that the model learns.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
STAGES = ('convnext', 'vision', 'text', 'mining', 'joint', 'features', 'answers', 'vae', 'latents', 'draw')


def call(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT)


def python(script: str, *arguments: object) -> None:
    call(sys.executable, HERE / script, *arguments)


def last_step(run: Path, stage: str) -> int:
    return json.loads((run / 'logs' / f'{stage}.jsonl').read_text().splitlines()[-1])['step']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True)
    data = parser.parse_args().data.resolve()
    with tempfile.TemporaryDirectory() as folder:
        run, out, parity, again = (Path(folder) / name for name in ('run', 'demo', 'parity', 'again'))
        python('vocabulary.py', '--data', data, '--run', run)

        def train(stage: str, steps: int, *options: str) -> None:
            places = ('--data', data, '--held-out', data, '--run', run)
            python('train.py', stage, *places, '--steps', steps, '--batch', 4, *options)
            if stage not in ('features', 'latents'):
                assert last_step(run, stage) == steps, f'{stage} ended at step {last_step(run, stage)}, not {steps}'

        for stage in STAGES:
            train(stage, 2)
        train('text', 3)  # goes on from its checkpoint
        train('mining', 1, '--restart', '--freeze-towers')
        train('joint', 4, '--workers', '2')
        train('features', 0, '--workers', '2')

        export = lambda out, *options: python('export.py', '--run', run, '--out', out, *options)
        export(out, '--parity', parity, '--data', data)
        call('npx', 'tsx', HERE / 'parity.mts', out, parity)

        shutil.rmtree(run / 'weights')
        python('restore.py', '--checkpoint', out, '--run', run)
        export(again)
        call('diff', '--recursive', '--brief', out, again)
    print('smoke: all stages, resuming, export, parity and restoring')


if __name__ == '__main__':
    main()
