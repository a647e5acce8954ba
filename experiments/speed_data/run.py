"""What does a batch cost beside a training step, and how fast is a text packed?

python experiments/speed_data/run.py [--rounds 40] [--save]

A batch of nanoGPT's CPU shape, 12 × 64 tokens, from a packed text of four million tokens, made
in two ways: one look-up (`BatchStream`), and slices cut from the memory map and stacked, row by
row. They take turns with a training step of the model of that shape (4 layers, width 128,
float32), in one process; the medians go into the table. The last line is JSON; `--save` keeps it
in result.json with date and machine."""

import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench

from llm_lab.chars import CharTokenizer
from llm_lab.corpora import Corpus
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.hardware import machine
from llm_lab.core import progress, rng
from llm_lab.batching import BatchStream
from llm_lab.packing import PackedTokens, pack
from llm_lab.train import adamw, train_step

B, T, V, C, L, H = 12, 64, 65, 128, 4, 4


def packed(folder, documents=4000, letters=1000):
    "Four million characters, as random as they come, packed"
    tok = CharTokenizer(map(chr, range(60, 60 + V)))
    ids = torch.randint(1, V, (documents, letters), generator=rng(0, 'text'))
    text = chr(60).join(tok.decode(row.tolist()) for row in ids)
    corpus = Corpus('noise', dict(train=text), separator=chr(60))
    return PackedTokens(pack(corpus, tok, folder).folder)


def stacked(tokens, stream):
    "The way everybody writes it, over a memory map, with the same blocks"
    array = np.memmap(tokens.folder / 'train.bin', '<i4', 'r')

    def cut(k):
        row = array[k : k + T + 1]
        if len(row) <= T:
            # over the end, into the beginning
            row = np.concatenate([row, array[: T + 1 - len(row)]])
        return torch.from_numpy(row.astype(np.int64))

    def batch(step):
        return torch.stack([cut(k) for k in stream.blocks_of(step).tolist()])

    return batch


def main(rounds):
    with tempfile.TemporaryDirectory() as folder:
        tokens = packed(Path(folder) / 'noise')
        stream = BatchStream(tokens, B, T)
        cfg = GPTConfig(vocab_size=V, max_len=T, d_model=C, n_layers=L, n_heads=H)
        model = MiniGPT(cfg).train()
        opt = adamw(model, 1e-3)
        fixed = stream(0)
        slices = stacked(tokens, stream)
        assert (slices(5) == stream(5)).all()
        ways = {'BatchStream': stream, 'slices stacked': slices}
        times = {'training step': [], **{name: [] for name in ways}}
        for n in progress(range(rounds * 10), 'steps'):
            for name, way in ways.items():  # each right after a step, as in a training run
                of_step = bench.seconds_of(lambda: train_step(model, opt, fixed))
                of_batch = bench.seconds_of(lambda: way(n))
                if n >= 20:  # the first steps warm up
                    times['training step'].append(of_step)
                    times[name].append(of_batch)
        # with nothing between, the caches stay warm
        alone = [bench.seconds_of(lambda: stream(n)) for n in range(2000)]
    us = {name: 1e6 * median(t) for name, t in times.items()}
    us['BatchStream, nothing between'] = 1e6 * median(alone)
    mean = 1e6 * sum(alone) / len(alone)
    for name in us:
        print(f'{name:30}{us[name]:10.1f} µs{us[name] / us["training step"]:10.3%} of a step')
    print(f'mean of a BatchStream batch, the working out of the order included: {mean:.1f} µs')
    return dict(
        us={k: round(v, 2) for k, v in us.items()},
        mean_us=round(mean, 2),
        share_of_step=round(us['BatchStream'] / us['training step'], 6),
        faster_than_slices=round(us['slices stacked'] / us['BatchStream'], 2),
        tokens=B * T,
        **machine(),
    )


if __name__ == '__main__':
    ap = bench.parser(__doc__)
    ap.add_argument('--rounds', type=int, default=40, help='ten steps in a round')
    a = ap.parse_args()
    bench.report(__file__, main(a.rounds), a.save)
