"""Does a mixture of experts beat the dense model that works as much for each token?

python experiments/moe/run.py [--seeds 5] [--steps 700] [--text tiny_tales] [--save] [--full]

Llama's block, 3 layers of width 64, 4 heads, 256 characters, 8 rows a step, AdamW at 0.004 for
all. Dense has a SwiGLU of width 176; with k experts for each token, each has width 176/k, so
every model multiplies as much for a token, but for the router, whose share is printed. 4, 8 and
16 experts, one or two for each token, kept in balance by losses (0.01, and z at 0.001); with 8
and two also without both losses, and with sigmoid scores and a bias in their place
(DeepSeek-V3's way). One expert for each token keeps its softmax share as its weight, two are
renormalized. Seeds are paired: the same batches, from windows that are cut anywhere, in training
and in judging; so a story's beginning may be missing, and the corpus's floor cannot be reached.
At the end: the validation loss in bits per character, its difference to the dense model of the
same seed with a 95 % interval (Student's t), and the loads on validation text, as multiples of
an even share. Two cells run side by side, one thread each, and cells resume. `--full` is for a
GPU: 6 layers of width 256, 4,000 steps of 64 rows. One line of JSON at the end; `--save` keeps
it in result.json."""

import math
import sys
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench

from llm_lab.chars import CharTokenizer
from llm_lab.corpora import load_corpus
from llm_lab.parts import Aux, part
from llm_lab.gpt import MiniGPT
from llm_lab.hardware import device, flops, keep_freed_memory, machine
from llm_lab.llama_block import SwiGLU, llama
from llm_lab.moe import MoE, Router, sigmoid_top_k, softmax_top_k, top_k_softmax
from llm_lab.train import fit, mean_loss, next_token_loss, random_crops

HERE = Path(__file__).parent
SIZES = dict(
    small=dict(d_model=64, n_layers=3, rows=8, width=176),
    full=dict(d_model=256, n_layers=6, rows=64, width=688),
)
CELLS = {
    'dense': None,
    **{f'{e} experts, {k} each': dict(e=e, k=k) for k in (1, 2) for e in (4, 8, 16)},
    '8 experts, 2 each, no balance': dict(e=8, k=2, balance=0.0, z=0.0),
    '8 experts, 2 each, bias': dict(e=8, k=2, balance=0.0, z=0.0, bias_rate=0.001),
}


def mlp(width, e, k, **router):
    "A recipe of experts that together are as wide, for each token, as one MLP of `width`"
    if 'bias_rate' in router:
        choose = part(sigmoid_top_k)
    elif k > 1:
        choose = part(top_k_softmax)
    else:
        choose = part(softmax_top_k, renormalize=False)
    return part(
        MoE,
        n_experts=e,
        top_k=k,
        expert=part(SwiGLU, d_ff=width // k),
        router=part(Router, choose=choose, **router),
    )


def build(name, size, vocab_size, seed=0):
    "The model of a cell"
    s = SIZES[size]
    how = CELLS[name]
    recipe = part(SwiGLU, d_ff=s['width']) if how is None else mlp(s['width'], **how)
    return MiniGPT(
        llama(
            vocab_size,
            d_model=s['d_model'],
            n_layers=s['n_layers'],
            n_heads=4,
            max_len=256,
            mlp=recipe,
        ),
        seed,
    )


@torch.no_grad()
def loads(model, ids):
    "Each layer's loads on a text, as multiples of an even share, (L, E)"
    aux = Aux()
    rows = ids[: 16 * 256].view(-1, 256)
    model.eval()(rows.to(next(model.parameters()).device), aux=aux)
    return [(x['load'] * len(x['load'])).tolist() for x in aux.terms.values()]


def cell(*job):
    "One run, kept under its name in runs/"
    name = '-'.join(map(str, job)).replace(' ', '_').replace(',', '')
    return bench.kept(HERE / 'runs' / f'{name}.json', lambda: train(*job))


def train(text, name, size, seed, steps):
    "The run of a cell: loss, speed, loads at the end and on the way"
    where = device() if size == 'full' else 'cpu'
    if where == 'cpu':
        torch.set_num_threads(1)
        keep_freed_memory()
    corpus = load_corpus(text)
    tok = CharTokenizer.train(''.join(map(corpus.text, corpus.splits)))
    ids = {
        s: torch.tensor(tok.encode(corpus.text(s)[:n]))
        for s, n in (('train', 4_000_000), ('val', 40_000))
    }
    model = build(name, size, tok.vocab_size, seed).to(where)
    seen = []
    batch = random_crops(ids['train'], SIZES[size]['rows'], 256, seed, where)
    run = fit(model, batch, steps, callbacks={50: lambda run: seen.append(model.metrics())})
    out = dict(
        bits=mean_loss(model.eval(), ids['val']) / math.log(2),
        params=model.n_params,
        seconds=run.seconds,
    )
    if CELLS[name]:
        out |= dict(loads=loads(model, ids['val']), seen=seen)
    return out


def work(name, size):
    "Operations that a token takes, forward and backward"
    model = build(name, size, 64)
    rows = torch.zeros(1, 257, dtype=torch.int64)
    return flops(lambda: next_token_loss(model, rows).backward()) / 256


def main(text, seeds, steps, size, names):
    jobs = [(text, name, size, seed, steps) for seed in range(seeds) for name in names]
    found = bench.run_cells(cell, jobs, 1 if size == 'full' else 2, 'cells')
    rows = {name: [found[text, name, size, seed, steps] for seed in range(seeds)] for name in names}
    base = [r['bits'] for r in rows['dense']]
    out = []
    print(f'{text}, {seeds} seeds, {steps} steps')
    print(f'{"":32}{"parameters":>11}{"work":>7}{"bits":>8}{"less than dense":>22}{"loads":>16}')
    for name, r in rows.items():
        bits = [x['bits'] for x in r]
        gain, half = bench.interval(bench.differences(base, bits))
        all_loads = [v for x in r for layer in x.get('loads', []) for v in layer] or [1.0]
        o = dict(
            name=name,
            params=r[0]['params'],
            work=round(work(name, size) / work('dense', size), 4),
            bits=bits,
            gain=gain,
            half=half,
            load_min=min(all_loads),
            load_max=max(all_loads),
            seconds=mean(x['seconds'] for x in r),
        )
        out.append(o)
        print(
            f'{name:32}{o["params"]:11,}{o["work"]:7.3f}{mean(bits):8.4f}{gain:14.4f} ± {half:.4f}'
            f'{o["load_min"]:9.2f}–{o["load_max"]:.2f}'
        )
    seen = {n: rows[n][0]['seen'] for n in names if n.startswith('8 experts, 2')}
    loads = {n: rows[n][0]['loads'] for n in names if n.startswith('8 experts, 2')}
    return dict(text=text, cells=out, steps=steps, seeds=seeds, seen=seen, loads=loads, **machine())


if __name__ == '__main__':
    ap = bench.parser(__doc__, seeds=5)
    ap.add_argument('--steps', type=int, help='700, or 4,000 with --full')
    ap.add_argument('--text', default='tiny_tales')
    ap.add_argument('--only', nargs='*', help='names of cells, beside dense')
    ap.add_argument('--full', action='store_true', help='on a GPU')
    a = ap.parse_args()
    names = [n for n in CELLS if n == 'dense' or not a.only or n in a.only]
    size = 'full' if a.full else 'small'
    result = main(a.text, a.seeds, a.steps or (4000 if a.full else 700), size, names)
    name = 'result'
    if a.full:
        name += '_full'
    if a.text != 'tiny_tales':
        name += f'_{a.text}'
    bench.report(__file__, result, a.save, f'{name}.json')
