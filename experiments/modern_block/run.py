"""What does each part of the modern block bring?

One choice is switched at a time, five paired seeds, the same budget of characters.

python experiments/modern_block/run.py [--corpus tiny_tales] [--steps 600] [--jobs 2] [--only
NAME …] [--save]

The base is Llama's block: RoPE, RMSNorm, SwiGLU, no biases, first weights scaled by depth; three
layers of width 64, four heads, rows of 4 × 288 characters that begin where stories do. Every
choice has the same first draws and the same batches as the base, so differences are paired; all
run at the same learning rate, the one of four at which the base does best on a seed of its own.
Each cell of the grid is kept in runs/ when it is done, and is not run again. Every run has one
thread; `--jobs` run at a time. At the end all choices take turns of a few steps, for the time
that each takes beside the base. The last line is JSON; `--save` keeps it in result.json with
date and machine. About 30 minutes on two cores."""

import hashlib
import math
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench

from llm_lab.chars import CharTokenizer
from llm_lab.corpora import letters_of, load_corpus
from llm_lab.evaluation import evaluate
from llm_lab.gpt import MLP, LearnedPositions, MiniGPT
from llm_lab.onednn import onednn_linears
from llm_lab.self_attention import Attention
from llm_lab.parts import part
from llm_lab.gqa import GQA
from llm_lab.hardware import keep_freed_memory
from llm_lab.core import rng
from llm_lab.llama_block import SoftcapHead, QKNorm, ReLU2, SwiGLU, llama
from llm_lab.positions import RoPE, SinusoidalPositions
from llm_lab.init import scaled_init, spectral_init
from llm_lab.optim import muon
from llm_lab.train import fit, train_step

HERE = Path(__file__).parent
SEEDS = (1, 2, 3, 4, 5)
TUNING = 100  # the seed at which the base chooses among the rates
RATES = (0.005, 0.01, 0.02, 0.04)
SIZE = dict(d_model=64, n_layers=3, n_heads=4, max_len=288)
BASE = llama(**SIZE, init=part(scaled_init))
steps = lambda *s: part(Attention, transforms=s, bias=False)
CHOICES = {
    'the base': {},
    'positions: none': dict(attn=steps()),
    'positions: learned': dict(attn=steps(), pos=part(LearnedPositions)),
    'positions: sines, added': dict(attn=steps(), pos=part(SinusoidalPositions)),
    'RoPE on half of the channels': dict(attn=steps(part(RoPE, partial=0.5))),
    'RoPE, base 500 instead of 10,000': dict(attn=steps(part(RoPE, base=500.0))),
    'LayerNorm': dict(norm=part(nn.LayerNorm)),
    'MLP with GELU': dict(mlp=part(MLP, bias=False)),
    'MLP with ReLU²': dict(mlp=part(MLP, act=part(ReLU2), bias=False)),
    'biases': dict(attn=part(Attention, transforms=(part(RoPE),)), mlp=part(SwiGLU, bias=True)),
    'QK-norm': dict(attn=steps(part(QKNorm), part(RoPE))),
    'softcap 15': dict(lm_head=part(SoftcapHead, cap=15.0)),
    '2 key heads for 4': dict(attn=part(GQA, n_kv_heads=2, transforms=(part(RoPE),), bias=False)),
    '1 key head for 4': dict(attn=part(GQA, n_kv_heads=1, transforms=(part(RoPE),), bias=False)),
    'head and token table shared': dict(tie=True),
    'init: not scaled by depth': dict(init=part(scaled_init, out='plain')),
    'init: blocks begin silent': dict(init=part(scaled_init, out='zero')),
    'init: orthogonal': dict(init=part(scaled_init, orthogonal=True)),
    'init: 0.02 whatever the width': dict(init=part(scaled_init, std=0.02)),
    'spectral, learned gains': dict(init=part(spectral_init)),
    'spectral, gain 3': dict(init=part(spectral_init, gain=3.0)),
    'biases, QK-norm and learned gains': dict(
        attn=part(Attention, transforms=(part(QKNorm), part(RoPE))),
        mlp=part(SwiGLU, bias=True),
        init=part(spectral_init),
    ),
    "GPT-2's block, all of it": dict(
        attn=part(Attention), mlp=part(MLP), norm=part(nn.LayerNorm), pos=part(LearnedPositions)
    ),
}


def cell(name, lr, seed, corpus, n_steps):
    "One run: its loss on validation text in bits per character; kept in a file"
    made_of = replace(BASE, **CHOICES[name])
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:8]
    plain = ''.join(c if c.isalnum() else '-' for c in name)
    file = HERE / 'runs' / f'{corpus}-{plain}-{key}-{lr:g}-{seed}-{n_steps}.json'
    return bench.kept(file, lambda: train(made_of, lr, seed, corpus, n_steps))


def train(made_of, lr, seed, corpus, n_steps):
    "The run of a cell, on one thread"
    torch.set_num_threads(1)
    text = load_corpus(corpus)
    tok = CharTokenizer.train(letters_of(text))
    model = MiniGPT(replace(made_of, vocab_size=tok.vocab_size), seed)
    rows = bench.crops(text, tok, batch_size=4, length=SIZE['max_len'], seed=seed)
    run = fit(model, rows, n_steps, optimizer=muon(model, lr=lr), seed=seed)
    return dict(
        loss=evaluate(model, tok, text, max_tokens=60_000).bits,
        params=model.n_params,
        training=[x / math.log(2) for x in run.losses[::20]],
        floor=text.floor,
    )


def paces(names, rounds=15, turn=4):
    """Time of a training step beside the base's: all in turn, one thread; the median of the ratios
    within a round"""
    torch.set_num_threads(1)
    keep_freed_memory()
    models = {n: MiniGPT(replace(BASE, **CHOICES[n])) for n in names}
    opts = {n: muon(m) for n, m in models.items()}
    rows = torch.randint(BASE.vocab_size, (4, SIZE['max_len'] + 1), generator=rng(0, 'rows'))

    def steps_of(n):
        with onednn_linears(models[n]):
            for _ in range(turn):
                train_step(models[n], opts[n], rows)

    ways = bench.timed({n: lambda n=n: steps_of(n) for n in names})
    took = bench.take_turns(ways, rounds, 'times', warm_up=1)
    base = took['the base']
    return {n: (1000 * median(t) / turn, bench.ratio(t, base)) for n, t in took.items()}


def rate_of(corpus, n_steps, jobs):
    "The rate at which the base does best on a seed of its own, and {rate: its cell}"
    grid = [('the base', r, TUNING, corpus, n_steps) for r in RATES]
    found = bench.run_cells(cell, grid, jobs, 'rates')
    tried = {r: found['the base', r, TUNING, corpus, n_steps] for r in RATES}
    return min(RATES, key=lambda r: tried[r]['loss']), tried


def table_of(rows, corpus, floor):
    "The choices, the best first, for people; a star where the interval of the change leaves out 0"
    print(
        f'{"one choice switched":34}{"bits/char":>10}{"change, paired, 95 %":>25}'
        f'{"weights":>10}{"time":>7}'
    )
    for n, r in sorted(rows.items(), key=lambda item: item[1]['loss']['mean']):
        c = r['change']
        star = '*' if abs(c['mean']) > c['plus_minus'] else ' '
        change = f'{c["mean"]:+14.4f} ± {c["plus_minus"]:.4f} {star}'
        if n == 'the base':
            change = ' ' * 25
        print(f'{n:34}{r["loss"]["mean"]:10.4f}{change}{r["params"]:10,}{r["time"]:6.2f}×')
    if floor:
        print(f'floor of {corpus}: {floor:.4f}')


def main(corpus, n_steps, jobs, only):
    names = ['the base', *(n for n in CHOICES if n != 'the base' and (not only or n in only))]
    lr, tried = rate_of(corpus, n_steps, jobs)
    grid = [(n, lr, seed, corpus, n_steps) for seed in SEEDS for n in names]
    found = bench.run_cells(cell, grid, jobs)
    runs = {(n, seed): said for (n, _, seed, *_), said in found.items()}
    pace = paces(names)
    base = [runs['the base', s]['loss'] for s in SEEDS]
    rows = {}
    for n in names:
        losses = [runs[n, s]['loss'] for s in SEEDS]
        rows[n] = dict(
            loss=bench.summary(losses, 5),
            change=bench.summary(bench.differences(losses, base), 5),
            params=runs[n, SEEDS[0]]['params'],
            ms=round(pace[n][0], 2),
            time=round(pace[n][1], 3),
            losses=[round(v, 5) for v in losses],
        )
    floor = runs['the base', 1]['floor']
    table_of(rows, corpus, floor)
    return dict(
        corpus=corpus,
        steps=n_steps,
        characters=n_steps * 4 * SIZE['max_len'],
        rate=lr,
        floor=floor,
        rows=rows,
        tried={str(r): round(v['loss'], 4) for r, v in tried.items()},
        jobs=jobs,
        **bench.one_thread(),
    )


if __name__ == '__main__':
    ap = bench.parser(__doc__, steps=600, jobs=2)
    ap.add_argument('--corpus', default='tiny_tales')
    ap.add_argument('--only', nargs='*', choices=CHOICES, help='these choices beside the base')
    a = ap.parse_args()
    if a.only and a.save:
        ap.error('--save keeps the whole grid: leave --only out')
    bench.report(__file__, main(a.corpus, a.steps, a.jobs, a.only), a.save)
