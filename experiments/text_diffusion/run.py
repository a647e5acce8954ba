"""What does it cost to write in any order? Text diffusion beside the next token, in bits.

python experiments/text_diffusion/run.py [--seeds 3] [--steps 1500] [--jobs 2] [--save]
    [--texts tiny_tales tiny_shakespeare]

Llama's block, 3 layers of width 64, 4 heads, 64 characters, 32 rows a step, Muon at 0.02 for all:
equal parameters (but for the row of the mask in the table) and equal batches. Contenders: the next
token, which gives exact bits, and diffusion in blocks of 1 (exact, too), 4, 16 and all 64
characters, whose bits are an upper bound, from 16 draws of noise. A block that is less than the
text costs two passes through the model in training, one of diffusion in one block one pass, and so
does the next token; the table says how long each took. Seeds are paired. On Tiny Tales what a
model pays above the floor is told by kind (choice, literal, recall). At the end one line of JSON;
`--save` keeps it in result.json. Cells are kept in runs/, and an interrupted experiment goes on."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench

from llm_lab.chars import CharTokenizer
from llm_lab.corpora import letters_of, load_corpus
from llm_lab.diffusion import diffusion_llama
from llm_lab.evaluation import evaluate, excess_by_kind
from llm_lab.gpt import MiniGPT
from llm_lab.hardware import keep_freed_memory
from llm_lab.llama_block import llama
from llm_lab.optim import muon
from llm_lab.train import batches, fit

HERE = Path(__file__).parent
SIZE = dict(d_model=64, n_layers=3, n_heads=4, max_len=64)
# name: tokens of a block; 'next' predicts the next token, and 'all' has one block
WAYS = {'next': None, '1': 1, '4': 4, '16': 16, 'all': None}


def model_of(way, vocab_size, seed=0):
    "A fresh model of a contender"
    if way == 'next':
        return MiniGPT(llama(vocab_size, **SIZE), seed)
    return MiniGPT(diffusion_llama(vocab_size, WAYS[way], draws=16, **SIZE), seed)


def cell(*job):
    "One training, kept under its name in runs/"
    path = HERE / 'runs' / f'{"-".join(map(str, job))}.json'
    return bench.kept(path, lambda: train(*job))


def train(text, way, seed, steps):
    "Bits per character after the training of a cell, the curve on the way, and what costs them"
    torch.set_num_threads(1)
    keep_freed_memory()
    corpus = load_corpus(text)
    tok = CharTokenizer.train(letters_of(corpus))
    model = model_of(way, tok.vocab_size, seed)
    curve = []

    def look(run):
        score = evaluate(model, tok, corpus, max_tokens=6_000)
        curve.append([run.step, round(score.bits, 4)])

    rows = batches(corpus, tok, 32, SIZE['max_len'], seed=seed)
    run = fit(model, rows, steps, optimizer=muon(model, 0.02), callbacks={max(1, steps // 3): look})
    score = evaluate(model.eval(), tok, corpus, max_tokens=30_000)
    found = dict(
        bits=score.bits,
        interval=score.interval,
        is_bound=score.is_bound,
        floor=score.floor,
        curve=curve,
        params=model.n_params,
        seconds=run.seconds,
    )
    if text == 'tiny_tales':
        found['kinds'] = excess_by_kind(model, tok, corpus, n=60)
    return found


def main(texts, seeds, steps, jobs):
    grid = [(t, way, s, steps) for s in range(seeds) for t in texts for way in WAYS]
    found = bench.run_cells(cell, grid, jobs, 'trainings')
    out = {}
    for text in texts:
        base = [found[text, 'next', s, steps]['bits'] for s in range(seeds)]
        print(f'{text}, {seeds} seeds, {steps:,} steps')
        print(f'{"block":8}{"bits/char":>18}{"more than next":>20}{"seconds":>9}')
        out[text] = {}
        for way in WAYS:
            cells = [found[text, way, s, steps] for s in range(seeds)]
            bits = [c['bits'] for c in cells]
            more = bench.summary(bench.differences(bits, base))
            o = dict(
                bits=bench.summary(bits),
                more=more,
                is_bound=cells[0]['is_bound'],
                floor=cells[0]['floor'],
                params=cells[0]['params'],
                seconds=round(sum(c['seconds'] for c in cells) / seeds, 1),
                curve=cells[0]['curve'],
            )
            if 'kinds' in cells[0]:
                names = cells[0]['kinds']
                o['kinds'] = {k: bench.summary([c['kinds'][k] for c in cells]) for k in names}
            out[text][way] = o
            sign = '≤' if o['is_bound'] else ' '
            b = o['bits']
            print(
                f'{way:8}{sign}{b["mean"]:9.3f} ± {b["plus_minus"]:.3f}'
                f'{more["mean"]:13.3f} ± {more["plus_minus"]:.3f}{o["seconds"]:9.0f}'
            )
    return dict(texts=out, steps=steps, seeds=seeds, **bench.one_thread())


if __name__ == '__main__':
    ap = bench.parser(__doc__, seeds=3, steps=1500, jobs=2)
    ap.add_argument('--texts', nargs='*', default=['tiny_tales', 'tiny_shakespeare'])
    a = ap.parse_args()
    bench.report(__file__, main(a.texts, a.seeds, a.steps, a.jobs), a.save)
