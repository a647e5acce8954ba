"""What does sparse attention buy on long texts?

Recall of a pair, and a language whose facts return, by how long ago they were told.

python experiments/long_context/run.py [--jobs 2] [--save] [--dry] [--full]

Models differ only in who may read whom: `masked_attention` reads all of the past, `sliding_window`
the last 64 tokens, `expander_links` these and 6 links drawn for each query, head and layer from
all of the past beyond; in `mixed` layers take turns, a window, all of the past, a window, and in
`global_first` they begin with all of the past. They have the same first weights and see the same
rows, in three paired seeds; they learn on texts of 512 tokens and are tested on 512 to 4,096.
None is told positions: neither task needs any, and RoPE trained at 512 is lost beyond (LOG.md).

First they learn `recall`: 32 pairs of a key and one of 8 values, one token each, lie among
random words; later each key is asked, and its value comes next. In training the distance is
drawn log-uniformly, and only answers count. A guess is right 1 time in 8. Then the same models
learn a language, `facts`: words that follow each other by known odds, and keys as common as
1/rank^1.5; when a key comes first it is a pair, whose value is drawn; after that it is asked and
the value comes next. All odds are known, so the entropy is exact: a value that returns costs
nothing to who has it, and log2(8) = 3 bits to who has not; its distance is to its last mention.

Beside the recall stands whether the pair could be read directly, in which layers a link of any
head joins it to its question; and what share of the past `receptive_field` finds after each
layer. Each cell is kept in runs/ when it is done, and is not run again; every run has one
thread. The last line is JSON; `--save` keeps it in result.json. `--dry` builds every model and a
batch and trains nothing. `--full` is for a GPU: 12 layers of width 512, longer texts, more
pairs, RoPE on half of the channels where layers are not global, and books of PG-19 as a third
lesson. About 25 minutes on two cores."""

import hashlib
import math
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from random import Random
from statistics import mean

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench

from llm_lab.kv_cache import sliding_window
from llm_lab.gpt import MiniGPT
from llm_lab.self_attention import causal, dense_mask
from llm_lab.parts import part
from llm_lab.kernels import SparseAttention
from llm_lab.hardware import device
from llm_lab.files import atomic_write
from llm_lab.positions import RoPE
from llm_lab.llama_block import llama
from llm_lab.optim import muon
from llm_lab.sparse import alternate, or_masks, expander_links, receptive_field
from llm_lab.train import fit, next_token_loss
from texts import (
    FULL,
    Size,
    bin_of,
    bins,
    books,
    books_batch,
    facts_batch,
    facts_row,
    recall_batch,
    recall_loss,
    recall_row,
)

HERE = Path(__file__).parent
SEEDS = (1, 2, 3)
NEAR = part(sliding_window, size=64)
LINKED = part(or_masks, of=(NEAR, part(expander_links, degree=6, beyond=64)))
PATTERNS = dict(
    dense=(part(causal),),
    window=(NEAR,),
    expander=(LINKED,),
    mixed=(NEAR, part(causal)),
    global_first=(part(causal), NEAR),
)


def layers(name, size):
    "The pattern of each layer"
    return [PATTERNS[name][n % len(PATTERNS[name])] for n in range(size.n_layers)]


def model(name, size, seed):
    "The model whose layers take turns with the patterns of this name"
    steps = lambda p: (part(RoPE, partial=0.5),) if size.full and p != part(causal) else ()
    attn = part(
        alternate, of=[part(SparseAttention, mask=p, transforms=steps(p)) for p in PATTERNS[name]]
    )
    return MiniGPT(
        llama(
            max(size.asks + size.keys, 256 * size.full),
            attn=attn,
            d_model=size.d_model,
            n_layers=size.n_layers,
            n_heads=size.n_heads,
            max_len=size.T,
        ),
        seed,
    )


def direct(name, size, asked):
    "For each question: which layers let it read its pair itself, by any head, as '010'"
    i = torch.tensor([i for i, _ in asked])
    distances = torch.tensor([d for _, d in asked])
    by_layer = []
    for n, pattern in enumerate(layers(name, size)):
        seen = dense_mask(pattern, i, i - distances, size.n_heads, n)
        # may question a see pair b, by each head: the diagonal is each question with its own pair
        seen = seen.expand(1, size.n_heads, len(i), len(i))[0]
        by_layer.append(seen.any(0).diagonal().int().tolist())
    return [''.join(map(str, one)) for one in zip(*by_layer)]


def recall_test(net, name, size, T):
    """{distance: [right, asked, linked in any layer]}, and of far ones {layers that have a link:
    [right, asked]}"""
    by = {d: [0, 0, 0] for d in bins(T)}
    links = {}
    for n in range(size.texts):
        r = Random(f'test/{T}/{n}')
        # each text begins with another bin, so that all bins are asked about equally often
        some_bins = (bins(T) * size.keys)[n : n + size.keys]
        distances = [r.randint(d * 3 // 4, d - 4) for d in some_bins]
        ids, asked = recall_row(T, distances, size, n)
        ids = torch.tensor(ids, device=device())
        right = (net(ids[None, :-1])[0].argmax(-1) == ids[1:]).tolist()
        for (i, d), seen in zip(asked, direct(name, size, asked)):
            counts = by[bin_of(d)]
            counts[0] += right[i]
            counts[1] += 1
            counts[2] += '1' in seen
            if d >= 64:  # beyond the window
                far = links.setdefault(seen, [0, 0])
                far[0] += right[i]
                far[1] += 1
    return dict(by=by, links=links)


def bits_test(net, texts):
    "{kind or bin of the distance: [bits of the model, exact bits, tokens]}"
    by = {}
    for ids, exact, kinds in texts:
        ids = torch.tensor(ids, device=device()).long()
        nats = F.cross_entropy(net(ids[None, :-1])[0], ids[1:], reduction='none')
        bits = (nats.double() / math.log(2)).tolist()
        for got, wanted, kind in zip(bits, exact[1:], kinds[1:]):
            key = kind if isinstance(kind, str) else str(bin_of(kind))
            sums = by.setdefault(key, [0.0, 0.0, 0])
            sums[0] += got
            sums[1] += wanted
            sums[2] += 1
    return by


def facts_test(net, name, size, T):
    "What `bits_test` gives on texts of the language"
    return bits_test(net, [facts_row(T, size, f'test/{T}/{n}') for n in range(size.texts)])


def books_test(net, name, size, T):
    "By the position in a book: does more past help?"
    cut = books('val', 50)[: size.texts * (T + 1)].view(-1, T + 1).tolist()
    return bits_test(net, [(ids, [0.0] * (T + 1), range(T + 1)) for ids in cut])


LESSONS = dict(
    # one after the other: batches, loss, test, and the shares of the steps and of the rate
    recall=(recall_batch, recall_loss, recall_test, 1, 1),
    facts=(facts_batch, next_token_loss, facts_test, 1, 0.4),
    books=(books_batch, next_token_loss, books_test, 1, 0.5),
)


def cell(kind, name, seed, size):
    """One lesson and its tests on all lengths; kept in a file, with the weights that the next
    lesson goes on from"""

    file = path_of(kind, name, seed, size, 'json')
    return bench.kept(file, lambda: learn(kind, name, seed, size))


def path_of(kind, name, seed, size, end):
    "Where a cell is kept: what it depends on is in the name"
    made_of = repr((size, PATTERNS[name], LESSONS[kind][3:]))
    key = hashlib.sha256(made_of.encode()).hexdigest()[:8]
    return HERE / 'runs' / f'{kind}-{name}-{key}-{seed}.{end}'


def learn(kind, name, seed, size):
    "The run of a cell, on one thread; the weights are written before its figures"
    torch.set_num_threads(1)
    net = model(name, size, seed)
    if kind == 'facts':
        net.load_state_dict(load_file(path_of('recall', name, seed, size, 'safetensors')))
    batch, loss, test, steps, lr = LESSONS[kind]
    run = fit(
        net.to(device()),
        batch(size, seed),
        int(steps * size.steps),
        optimizer=muon(net, lr=lr * size.lr),
        seed=seed,
        loss_fn=partial(loss, size) if kind == 'recall' else loss,
    )
    with torch.no_grad():
        tests = {T: test(net.eval(), name, size, T) for T in size.lengths}
    with atomic_write(path_of(kind, name, seed, size, 'safetensors')) as f:
        save_file(net.state_dict(), f)
    return dict(
        tests=tests,
        losses=run.losses[::10],
        params=net.n_params,
        train_s=round(run.seconds, 1),
    )


def reach_table(name, size, T):
    """Share of the past that is in the last token's receptive field after each layer, in all and by
    distance"""
    found = receptive_field(layers(name, size), T, n_heads=size.n_heads).flip(1)  # by distance
    return dict(
        all=[round(x, 4) for x in found.float().mean(1).tolist()],
        by={
            d: [round(x, 4) for x in found[1:, 3 * d // 4 : d].float().mean(1).tolist()]
            for d in bins(T)
        },
    )


def rows_of(cells, name, size):
    """What one pattern did: means over seeds with half of the 95 % interval (Student's t), and what
    can be reached"""
    one = cells['recall'][0]
    interval = lambda values: [round(x, 4) for x in bench.interval(values)]
    said = dict(
        params=one['params'],
        train_s={k: round(mean(c['train_s'] for c in cs), 1) for k, cs in cells.items()},
        losses={k: [c['losses'] for c in cs] for k, cs in cells.items()},
        recall={},
        asked={},
        linked={},
        links={},
        **{k: {} for k in cells if k != 'recall'},
    )
    for T in map(str, size.lengths):
        by = [c['tests'][T]['by'] for c in cells['recall']]
        links = [c['tests'][T]['links'] for c in cells['recall']]
        said['recall'][T] = {d: interval([b[d][0] / b[d][1] for b in by]) for d in by[0]}
        said['asked'][T] = {d: b[1] for d, b in by[0].items()}
        said['linked'][T] = {d: round(b[2] / b[1], 4) for d, b in by[0].items()}
        said['links'][T] = {
            k: [sum(l[k][n] for l in links) for n in (0, 1)] for k in sorted(links[0])
        }
        for kind in cells.keys() - {'recall'}:  # mean, ±, exact bits, tokens
            tests = [c['tests'][T] for c in cells[kind]]
            said[kind][T] = {
                k: [*interval([t[k][0] / v[2] for t in tests]), round(v[1] / v[2], 4), v[2]]
                for k, v in tests[0].items()
            }
    said['reach'] = {T: reach_table(name, size, T) for T in size.lengths if T <= 4096}
    return said


def show(rows):
    "Tables for people"
    for name, r in rows.items():
        print(
            f'\n{name}: right answers by distance, 95 % over seeds ({r["params"]:,} weights, '
            f'{r["train_s"]} s a training)'
        )
        for T, by in r['recall'].items():
            print(f'{T:>6}' + ''.join(f'{d:>6}: {m:.2f}±{pm:.2f}' for d, (m, pm) in by.items()))
        print('  bits of values that return, by distance; of the rest, with its exact entropy')
        for T, by in r['facts'].items():
            print(
                f'{T:>6}'
                + ''.join(f'{k:>6}: {m:.2f}±{pm:.2f}' for k, (m, pm, *_) in by.items())
                + f' ({by["rest"][2]:.2f})'
            )
        print(
            '  the last of 4,096 tokens has heard of',
            ', '.join(f'{x:.1%}' for x in r['reach'][4096]['all']),
            'after 0, 1, 2, … layers',
        )
    for T, by in rows.get('expander', {}).get('links', {}).items():
        print(
            f'expander at {T}, far pairs by layers that link them: '
            + ', '.join(f'{k} {a}/{n}' for k, (a, n) in by.items())
        )


def dry(size):
    "Every model and a batch of both lessons, and nothing more"
    rows = [LESSONS[k][0](size, 1)(0) for k in ('recall', 'facts')]
    print(*(f'batch {tuple(r.shape)}, ids below {size.asks + size.keys}' for r in rows))
    for name in PATTERNS:
        net = model(name, size, 1).to(device())
        with torch.no_grad():
            print(
                f'{name}: {net.n_params:,} weights, first loss '
                f'{recall_loss(size, net, rows[0][:1, :513]):.2f}'
            )


def main(jobs, size):
    cells = {}
    kinds = list(LESSONS) if size.full else ['recall', 'facts']
    for kind in kinds:  # one after the other: a lesson goes on from the weights of the one before
        grid = [(kind, n, s, size) for s in SEEDS for n in PATTERNS]
        cells |= bench.run_cells(cell, grid, jobs, kind)
    rows = {}
    for n in PATTERNS:
        mine = {k: [cells[k, n, s, size] for s in SEEDS] for k in kinds}
        rows[n] = rows_of(mine, n, size)
    show(rows)
    return dict(
        chance=1 / size.values,
        size=asdict(size),
        seeds=SEEDS,
        rows=rows,
        jobs=jobs,
        **bench.one_thread(),
    )


if __name__ == '__main__':
    ap = bench.parser(__doc__, jobs=2)
    ap.add_argument('--full', action='store_true', help='sizes for a GPU, and PG-19')
    ap.add_argument(
        '--dry', action='store_true', help='build every model and a batch, train nothing'
    )
    a = ap.parse_args()
    size = FULL if a.full else Size()
    if a.dry:
        dry(size)
    else:
        bench.report(__file__, main(1 if a.full else a.jobs, size), a.save)
