"""Which optimizer learns most from the same text?

AdamW, Muon and SGD, each at its own best learning rate, five paired seeds.

python experiments/optimizers/run.py [--steps 2000] [--jobs 2] [--save]

nanoGPT's CPU shape and budget on tiny_shakespeare: 4 layers, width 128, 2,000 steps of 12 × 64
characters. For each optimizer the learning rate is searched on a seed of its own, in factors of
two, until the best has a worse one on both sides. Then it runs with five other seeds: the same
first weights and the same batches for all optimizers, so differences are paired. Each cell of
the grid is kept in runs/ when it is done, and is not run again. Every run has one thread;
`--jobs` run at a time. The last line is JSON; `--save` keeps it in result.json with date and
machine. About 30 minutes on two cores."""

import argparse
import json
import math
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import torch

from llm_lab.hardware import machine
from llm_lab.core import progress
from llm_lab.files import atomic_write
from llm_lab.optim import OPTIMIZERS
from llm_lab.train import Recipe, fit, prepare

HERE = Path(__file__).parent
START = dict(adamw=4e-3, muon=8e-3, sgd=0.4)  # where the search begins
TUNING, SEEDS = 100, (1, 2, 3, 4, 5)
NANOGPT = 1.898  # nanoGPT's own loop and model, the same shape, budget and validation


def cell(optimizer, lr, seed, steps):
    "One run: its loss on the whole validation text in nats per character; kept in a file"
    file = HERE / 'runs' / f'{optimizer}-{lr:.6g}-{seed}-{steps}.json'
    if file.exists():
        return json.loads(file.read_text())
    torch.set_num_threads(1)
    setup = prepare(Recipe('tiny_shakespeare', steps, 12, 64, seed=seed))
    run = fit(
        setup.model,
        setup.batch,
        steps,
        optimizer=OPTIMIZERS[optimizer](setup.model, lr=lr),
        seed=seed,
    )
    said = dict(optimizer=optimizer, lr=lr, seed=seed, loss=setup.loss(), training=run.losses[::20])
    with atomic_write(file) as f:
        f.write_text(json.dumps(said))
    return said


def tuned(optimizer, steps, run):
    """The best learning rate in factors of two, with a worse one on both sides, and all that were
    tried"""
    seen = {}

    def loss(k):
        if k not in seen:
            seen[k] = run(optimizer, START[optimizer] * 2.0**k, TUNING, steps)['loss']
        return seen[k] if math.isfinite(seen[k]) else math.inf

    best = 0
    while step := min((-1, 0, 1), key=lambda d: loss(best + d)):
        best += step
    return START[optimizer] * 2.0**best, {
        f'{START[optimizer] * 2.0**k:.6g}': round(v, 4) for k, v in sorted(seen.items())
    }


def interval(values):
    "Mean and half of the 95 % interval, by Student's t with 4 degrees of freedom"
    return dict(
        mean=round(mean(values), 4),
        plus_minus=round(2.776 * stdev(values) / math.sqrt(len(values)), 4),
    )


def search(job):
    optimizer, steps = job
    return optimizer, *tuned(optimizer, steps, cell)


def main(steps, jobs):
    with ProcessPoolExecutor(jobs) as pool:
        searches = pool.map(search, [(o, steps) for o in OPTIMIZERS])
        found = {
            name: (lr, tried) for name, lr, tried in progress(searches, 'tuning', len(OPTIMIZERS))
        }
        grid = [(o, found[o][0], seed, steps) for seed in SEEDS for o in OPTIMIZERS]
        runs = list(progress(pool.map(cell, *zip(*grid)), 'runs', len(grid)))
    losses = {o: [r['loss'] for r in runs if r['optimizer'] == o] for o in OPTIMIZERS}
    curves = {
        o: [round(mean(v), 4) for v in zip(*(r['training'] for r in runs if r['optimizer'] == o))]
        for o in OPTIMIZERS
    }
    print(f'{"optimizer":10}{"rate":>8}  validation loss, nats per character')
    for o, values in losses.items():
        print(
            (
                f'{o:10}{found[o][0]:8.4g}  {mean(values):.4f} ± '
                f'{interval(values)["plus_minus"]:.4f}   '
            ),
            *(f'{v:.4f}' for v in values),
        )
    pairs = {
        f'{o} − adamw': interval([a - b for a, b in zip(losses[o], losses['adamw'])])
        for o in OPTIMIZERS
        if o != 'adamw'
    }
    for name, p in pairs.items():
        print(f'{name:16} {p["mean"]:+.4f} ± {p["plus_minus"]:.4f}, paired')
    best = min(losses, key=lambda o: mean(losses[o]))
    print(f'best: {best} {mean(losses[best]):.4f}; nanoGPT with the same budget {NANOGPT}')
    return dict(
        steps=steps,
        tokens=steps * 12 * 64,
        rates={o: lr for o, (lr, _) in found.items()},
        tried={o: t for o, (_, t) in found.items()},
        losses={o: [round(v, 4) for v in values] for o, values in losses.items()},
        summary={o: interval(v) for o, v in losses.items()},
        paired=pairs,
        curves=curves,
        nanogpt=NANOGPT,
        jobs=jobs,
        **{**machine(), 'threads': 1},
    )


if __name__ == '__main__':
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument('--steps', type=int, default=2000)
    ap.add_argument('--jobs', type=int, default=2, help='runs at a time, one thread each')
    ap.add_argument('--save', action='store_true', help='keep the last line in result.json')
    a = ap.parse_args()
    line = json.dumps(main(a.steps, a.jobs))
    if a.save:
        (HERE / 'result.json').write_text(line + '\n', encoding='utf-8')
    print(line)
