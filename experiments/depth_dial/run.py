"""Does the learning rate follow the dial?

`llama(depth=1, 2, 3)`, six rates each, two seeds, the same batches for all.

python experiments/depth_dial/run.py [--steps 300] [--jobs 2] [--save]

Tiny Tales, rows of 4 × 288 characters, Muon for the blocks and AdamW for the rest. For each
depth the mean losses are drawn as a parabola over the logarithm of the rate, through the best
rate and its two neighbours; its lowest point is the rate that suits the depth. It is compared
with `llm_lab.llama_block.muon_lr`. Each cell of the grid is kept in runs/ and is not run again.
Every run has one thread; `--jobs` run at a time. The last line is JSON; `--save` keeps it in
result.json with date and machine. About ten minutes on two cores."""

import sys
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench

from llm_lab.chars import CharTokenizer
from llm_lab.corpora import letters_of, load_corpus
from llm_lab.evaluation import evaluate
from llm_lab.gpt import MiniGPT
from llm_lab.llama_block import llama, muon_lr
from llm_lab.optim import muon
from llm_lab.train import fit

HERE = Path(__file__).parent
DEPTHS = (1, 2, 3)
RATES = tuple(0.00125 * 2**k for k in range(6))
SEEDS = (1, 2)


def cell(depth, lr, seed, steps):
    "The loss of one run in bits per character; kept in a file"
    file = HERE / 'runs' / f'{depth}-{lr:g}-{seed}-{steps}.json'
    return bench.kept(file, lambda: train(depth, lr, seed, steps))


def train(depth, lr, seed, steps):
    "One run, on one thread, and its validation loss in bits per character"
    torch.set_num_threads(1)
    corpus = load_corpus('tiny_tales')
    tok = CharTokenizer.train(letters_of(corpus))
    model = MiniGPT(llama(tok.vocab_size, depth=depth, max_len=288), seed)
    rows = bench.crops(corpus, tok, batch_size=4, length=288, seed=seed)
    fit(model, rows, steps, optimizer=muon(model, lr=lr), seed=seed)
    return evaluate(model, tok, corpus, max_tokens=40_000).bits


def lowest(losses):
    """The rate at the lowest point of the parabola through the best rate and its neighbours; the
    best itself at an end"""
    best = min(losses, key=losses.get)
    n = RATES.index(best)
    if n in (0, len(RATES) - 1):
        return best
    a, b, c = (losses[r] for r in RATES[n - 1 : n + 2])
    # of the parabola through (-1, a), (0, b), (1, c); one step to the right doubles the rate
    return best * 2 ** (0.5 * (a - c) / (a - 2 * b + c))


def main(steps, jobs):
    grid = [(d, lr, s, steps) for d in DEPTHS for lr in RATES for s in SEEDS]
    runs = bench.run_cells(cell, grid, jobs)
    losses = {}
    for d in DEPTHS:
        losses[d] = {lr: mean(runs[d, lr, s, steps] for s in SEEDS) for lr in RATES}
    print('depth ', *(f'{lr:>9g}' for lr in RATES), '   suits  the rule says')
    said = {}
    for d, row in losses.items():
        said[d] = dict(
            losses={f'{lr:g}': round(v, 4) for lr, v in row.items()},
            suits=round(lowest(row), 5),
            rule=round(muon_lr(llama(depth=d)), 5),
        )
        print(
            f'{d:5} ',
            *(f'{v:9.4f}' for v in row.values()),
            f'{said[d]["suits"]:8.4f} {said[d]["rule"]:8.4f}',
        )
    return dict(steps=steps, depths=said, jobs=jobs, **bench.one_thread())


if __name__ == '__main__':
    a = bench.parser(__doc__, steps=300, jobs=2).parse_args()
    bench.report(__file__, main(a.steps, a.jobs), a.save)
