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

import math
import sys
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench

from llm_lab.chars import CharTokenizer
from llm_lab.corpora import letters_of, load_corpus
from llm_lab.evaluation import evaluate
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.optim import OPTIMIZERS
from llm_lab.train import fit

HERE = Path(__file__).parent
START = dict(adamw=4e-3, muon=8e-3, sgd=0.4)  # where the search begins
TUNING = 100  # the seed of the search: the seeds that are compared had no part in it
SEEDS = (1, 2, 3, 4, 5)
NANOGPT = 1.898  # nanoGPT's own loop and model, the same shape, budget and validation


def cell(optimizer, lr, seed, steps):
    "One run: its loss on the whole validation text in nats per character; kept in a file"
    file = HERE / 'runs' / f'{optimizer}-{lr:.6g}-{seed}-{steps}.json'
    return bench.kept(file, lambda: train(optimizer, lr, seed, steps))


def train(optimizer, lr, seed, steps):
    "The run of a cell, on one thread"
    torch.set_num_threads(1)
    corpus = load_corpus('tiny_shakespeare')
    tok = CharTokenizer.train(letters_of(corpus))
    model = MiniGPT(GPTConfig(vocab_size=tok.vocab_size, max_len=64), seed)
    rows = bench.crops(corpus, tok, batch_size=12, length=64, seed=seed)
    run = fit(model, rows, steps, optimizer=OPTIMIZERS[optimizer](model, lr=lr), seed=seed)
    loss = evaluate(model, tok, corpus).loss
    return dict(optimizer=optimizer, lr=lr, seed=seed, loss=loss, training=run.losses[::20])


def search(optimizer, steps):
    """The best learning rate in factors of two, with a worse one on both sides, and the losses of
    all that were tried"""
    start = START[optimizer]
    seen = {}

    def loss(k):
        "Of the rate that is k doublings from the start"
        if k not in seen:
            seen[k] = cell(optimizer, start * 2.0**k, TUNING, steps)['loss']
        return seen[k] if math.isfinite(seen[k]) else math.inf

    best = 0
    while True:
        step = min((-1, 0, 1), key=lambda d: loss(best + d))
        if step == 0:
            break
        best += step
    tried = {f'{start * 2.0**k:.6g}': round(v, 4) for k, v in sorted(seen.items())}
    return start * 2.0**best, tried


def main(steps, jobs):
    searches = bench.run_cells(search, [(o, steps) for o in OPTIMIZERS], jobs, 'tuning')
    found = {o: searches[o, steps] for o in OPTIMIZERS}
    grid = [(o, found[o][0], seed, steps) for seed in SEEDS for o in OPTIMIZERS]
    runs = bench.run_cells(cell, grid, jobs).values()
    losses = {}
    curves = {}
    for o in OPTIMIZERS:
        mine = [r for r in runs if r['optimizer'] == o]
        losses[o] = [r['loss'] for r in mine]
        # the mean over seeds at each step that was written down
        curves[o] = [round(mean(v), 4) for v in zip(*(r['training'] for r in mine))]
    print(f'{"optimizer":10}{"rate":>8}  validation loss, nats per character')
    for o, values in losses.items():
        half = bench.summary(values)['plus_minus']
        print(
            f'{o:10}{found[o][0]:8.4g}  {mean(values):.4f} ± {half:.4f}   ',
            *(f'{v:.4f}' for v in values),
        )
    pairs = {}
    for o in OPTIMIZERS:
        if o != 'adamw':
            pairs[f'{o} − adamw'] = bench.summary(bench.differences(losses[o], losses['adamw']))
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
        summary={o: bench.summary(v) for o, v in losses.items()},
        paired=pairs,
        curves=curves,
        nanogpt=NANOGPT,
        jobs=jobs,
        **bench.one_thread(),
    )


if __name__ == '__main__':
    a = bench.parser(__doc__, steps=2000, jobs=2).parse_args()
    bench.report(__file__, main(a.steps, a.jobs), a.save)
