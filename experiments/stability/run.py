"""What keeps attention from breaking when the step is too large?

QK-norm, orthogonal first weights, bound singular values.

python experiments/stability/run.py [--seeds 2] [--steps 150] [--save]

Llama's block, 3 layers of width 64, 4 heads, a window of 64 with 6 links, 256 characters of Tiny
Tales, 8 rows a step, AdamW, gradients clipped to 1. The learning rate of `train` (0.004), and
8 and 32 times that. Each of the 2³ models sees the same batches. At the end: the validation loss
in bits per character (the floor is known), the largest attention score, the lowest entropy of a
layer as a share of the most that is possible, and how many heads look at one key only (chapter
21's gauges, read on validation text). A model is broken if its loss is not finite, or above that
of the counts of single characters, or if half of its heads look at one key only. One line of
JSON at the end; `--save` keeps it. Cells resume."""

import math
import sys
from itertools import product
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench

from llm_lab.chars import CharTokenizer
from llm_lab.corpora import load_corpus
from llm_lab.gpt import MiniGPT
from llm_lab.parts import part
from llm_lab.kernels import SparseAttention
from llm_lab.core import LabError, progress
from llm_lab.hardware import machine
from llm_lab.llama_block import QKNorm, llama
from llm_lab.positions import RoPE
from llm_lab.init import scaled_init, spectral_init
from llm_lab.kv_cache import sliding_window
from llm_lab.sparse import or_masks, expander_links
from llm_lab.train import fit, mean_loss, random_crops

HERE = Path(__file__).parent
T = 256
RATES = (0.004, 0.032, 0.128)
NAMES = ('QK-norm', 'orthogonal', 'spectral')
MODELS = list(product((0, 1), repeat=3))  # which of these it has
GAUGES = ('loss', 'max_logit', 'entropy', 'collapsed', 'far')
PATTERN = part(
    or_masks, of=(part(sliding_window, size=64), part(expander_links, degree=6, beyond=64))
)


def text():
    "The corpus, its tokenizer, and {split: ids}"
    corpus = load_corpus('tiny_tales')
    tok = CharTokenizer.train(corpus.text('train')[:100_000])
    ids = {
        s: torch.tensor(tok.encode(corpus.text(s)[:n]))
        for s, n in (('train', 1_000_000), ('val', 20_000))
    }
    return corpus, tok, ids


def cell(tok, ids, qk, orthogonal, spectral, lr, seed, steps):
    "One run: its loss, its worst moment, and the gauges; loss None where it was not finite"
    init = part(scaled_init, orthogonal=bool(orthogonal))
    attn = part(SparseAttention, mask=PATTERN, transforms=(part(QKNorm),) * qk + (part(RoPE),))
    model = MiniGPT(
        llama(
            tok.vocab_size,
            d_model=64,
            n_heads=4,
            n_layers=3,
            max_len=T,
            attn=attn,
            init=part(spectral_init, first=init) if spectral else init,
        ),
        seed,
    )
    try:
        run = fit(model, random_crops(ids['train'], 8, T, seed), steps, lr=lr)
    except LabError as e:
        return dict(loss=None, why=str(e)[:80])
    loss = mean_loss(model.eval(), ids['val']) / math.log(2)
    said = model.metrics()

    def each(name):
        "A gauge of each layer"
        return [v for k, v in said.items() if k.endswith(name)]

    return dict(
        loss=loss if math.isfinite(loss) else None,
        worst=max(run.losses[min(20, steps - 1) :]) / math.log(2),
        max_logit=max(each('max_logit')),
        entropy=min(each('entropy')),
        collapsed=mean(each('collapsed')),
        far=mean(each('far')),
    )


def single_characters(ids):
    "Bits per character of a model that knows how frequent each character is, and nothing else"
    share = torch.bincount(ids).double() / len(ids)
    return -(share * share.clamp_min(1e-30).log2()).sum().item()


def row_of(on, lr, runs, single):
    "One row of the result: how many of the seeds broke, and the gauges' means over the others"
    good = [r for r in runs if r['loss'] is not None]
    broken = sum(r['loss'] is None or r['loss'] > single or r['collapsed'] >= 0.5 for r in runs)
    gauges = {k: round(mean(r[k] for r in good), 4) for k in GAUGES} if good else {}
    return dict(
        rate=lr,
        **dict(zip(NAMES, on)),
        broken=broken,
        seeds=len(runs),
        losses=[r['loss'] for r in runs],
        **gauges,
    )


def show(row):
    "One line for people"
    name = ', '.join(n for n in NAMES if row[n]) or 'plain'
    gauges = ''
    if 'loss' in row:
        gauges = f'{row["max_logit"]:12.1f}{row["entropy"]:9.3f}{row["collapsed"]:9.0%}'
    print(
        f'{row["rate"]:6}  {name:32}{row.get("loss", math.nan):7.3f}{row["broken"]:5} of '
        f'{row["seeds"]}{gauges}'
    )


def main(seeds, steps):
    corpus, tok, ids = text()
    single = single_characters(ids['train'])
    cells = [(*on, lr, seed) for lr in RATES for seed in range(seeds) for on in MODELS]
    done = {}
    for c in progress(cells, 'cells'):
        file = HERE / 'runs' / f'{"-".join(map(str, c))}-{steps}.json'
        done[c] = bench.kept(file, lambda: cell(tok, ids, *c, steps))
    out = []
    print(
        f'floor {corpus.floor:.3f}, single characters {single:.3f} bits per character; '
        f'{steps} steps, {seeds} seeds'
    )
    print(
        f'{"rate":>6}  '
        f'{"":32}{"loss":>7}{"broken":>8}{"largest score":>15}{"entropy":>9}{"one key":>9}'
    )
    for lr in RATES:
        for on in MODELS:
            runs = [done[*on, lr, seed] for seed in range(seeds)]
            out.append(row_of(on, lr, runs, single))
            show(out[-1])
    return dict(cells=out, floor=corpus.floor, single=round(single, 4), steps=steps, **machine())


if __name__ == '__main__':
    a = bench.parser(__doc__, seeds=2, steps=150).parse_args()
    bench.report(__file__, main(a.seeds, a.steps), a.save)
