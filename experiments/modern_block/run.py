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

import argparse
import hashlib
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import mean, median, stdev

import torch
from torch import nn

from llm_lab.gpt import MLP, LearnedPositions, MiniGPT
from llm_lab.onednn import onednn_linears
from llm_lab.self_attention import Attention
from llm_lab.parts import part
from llm_lab.gqa import GQA
from llm_lab.hardware import keep_freed_memory, machine
from llm_lab.core import progress, rng
from llm_lab.files import atomic_write
from llm_lab.llama_block import SoftcapHead, QKNorm, ReLU2, SwiGLU, llama
from llm_lab.positions import RoPE, SinusoidalPositions
from llm_lab.init import scaled_init, spectral_init
from llm_lab.optim import muon
from llm_lab.train import Recipe, fit, prepare, train_step

HERE = Path(__file__).parent
SEEDS = (1, 2, 3, 4, 5)
TUNING = 100
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
    'softcap 15': dict(lm_lm_head=part(SoftcapHead, cap=15.0)),
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
    if file.exists():
        return json.loads(file.read_text())
    torch.set_num_threads(1)
    setup = prepare(
        Recipe(
            corpus, n_steps, 4, SIZE['max_len'], seed=seed, model=(('d_model', 8), ('n_layers', 1))
        )
    )
    setup.model = MiniGPT(replace(made_of, vocab_size=setup.tokenizer.vocab_size), seed)
    run = fit(setup.model, setup.batch, n_steps, optimizer=muon(setup.model, lr=lr), seed=seed)
    said = dict(
        loss=setup.loss(max_tokens=60_000) / math.log(2),
        params=setup.model.n_params,
        training=[x / math.log(2) for x in run.losses[::20]],
        floor=setup.corpus.floor,
    )
    with atomic_write(file) as f:
        f.write_text(json.dumps(said))
    return said


def paces(names, rounds=15, turn=4):
    """Time of a training step beside the base's: all in turn, one thread; the median of the ratios
    within a round"""
    torch.set_num_threads(1)
    keep_freed_memory()
    models = {n: MiniGPT(replace(BASE, **CHOICES[n])) for n in names}
    opts = {n: muon(m) for n, m in models.items()}
    took = {n: [] for n in names}
    rows = torch.randint(BASE.vocab_size, (4, SIZE['max_len'] + 1), generator=rng(0, 'rows'))
    for _ in progress(range(rounds + 1), 'times'):
        for n, m in models.items():
            start = time.perf_counter()
            with onednn_linears(m):
                for _ in range(turn):
                    train_step(m, opts[n], rows)
            took[n].append((time.perf_counter() - start) / turn)
    base = took['the base'][1:]  # the first round warms up
    return {
        n: (1000 * median(t[1:]), median(a / b for a, b in zip(t[1:], base)))
        for n, t in took.items()
    }


def interval(values):
    "Mean and half of the 95 % interval, by Student's t with 4 degrees of freedom"
    return dict(
        mean=round(mean(values), 5),
        plus_minus=round(2.776 * stdev(values) / math.sqrt(len(values)), 5),
    )


def main(corpus, n_steps, jobs, only):
    names = ['the base', *(n for n in CHOICES if n != 'the base' and (not only or n in only))]
    with ProcessPoolExecutor(jobs) as pool:
        tried = dict(
            zip(
                RATES,
                progress(
                    pool.map(
                        cell, *zip(*[('the base', r, TUNING, corpus, n_steps) for r in RATES])
                    ),
                    'rates',
                    len(RATES),
                ),
            )
        )
        lr = min(RATES, key=lambda r: tried[r]['loss'])
        grid = [(n, lr, seed, corpus, n_steps) for seed in SEEDS for n in names]
        runs = dict(
            zip(
                [(n, s) for n, _, s, *_ in grid],
                progress(pool.map(cell, *zip(*grid)), 'runs', len(grid)),
            )
        )
    pace = paces(names)
    of = lambda name, what: [runs[name, s][what] for s in SEEDS]
    rows = {
        n: dict(
            loss=interval(of(n, 'loss')),
            change=interval([a - b for a, b in zip(of(n, 'loss'), of('the base', 'loss'))]),
            params=of(n, 'params')[0],
            ms=round(pace[n][0], 2),
            time=round(pace[n][1], 3),
            losses=[round(v, 5) for v in of(n, 'loss')],
        )
        for n in names
    }
    floor = runs['the base', 1]['floor']
    print(
        f'{"one choice switched":34}{"bits/char":>10}{"change, paired, 95 %":>25}'
        f'{"weights":>10}{"time":>7}'
    )
    for n, r in sorted(rows.items(), key=lambda item: item[1]['loss']['mean']):
        c = r['change']
        sure = abs(r['change']['mean']) > r['change']['plus_minus']
        print(
            f'{n:34}{r["loss"]["mean"]:10.4f}'
            + (
                f'{c["mean"]:+14.4f} ± {c["plus_minus"]:.4f} {"*" if sure else " "}'
                if n != 'the base'
                else ' ' * 25
            )
            + f'{r["params"]:10,}{r["time"]:6.2f}×'
        )
    if floor:
        print(f'floor of {corpus}: {floor:.4f}')
    return dict(
        corpus=corpus,
        steps=n_steps,
        characters=n_steps * 4 * SIZE['max_len'],
        rate=lr,
        floor=floor,
        rows=rows,
        tried={str(r): round(v['loss'], 4) for r, v in tried.items()},
        jobs=jobs,
        **{**machine(), 'threads': 1},
    )


if __name__ == '__main__':
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument('--corpus', default='tiny_tales')
    ap.add_argument('--steps', type=int, default=600)
    ap.add_argument('--jobs', type=int, default=2, help='runs at a time, one thread each')
    ap.add_argument('--only', nargs='*', choices=CHOICES, help='these choices beside the base')
    ap.add_argument('--save', action='store_true', help='keep the last line in result.json')
    a = ap.parse_args()
    if a.only and a.save:
        ap.error('--save keeps the whole grid: leave --only out')
    line = json.dumps(main(a.corpus, a.steps, a.jobs, a.only))
    if a.save:
        (HERE / 'result.json').write_text(line + '\n', encoding='utf-8')
    print(line)
