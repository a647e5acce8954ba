"""What does a model learn from a small text that it reads many times?

Blocks that stand still, blocks that move, random crops.

python experiments/small_text/run.py [--steps 1000] [--only WAY] [--save]

The model and the optimizer of the config `golden` on the first 60,000 characters of
tiny_shakespeare: 54,000 to learn from, read 14 times in 1,000 steps of 12 × 64 tokens; 6,000 to
judge by. The same steps three times, with other batches: blocks cut at the same places in each
epoch; `BatchStream`, which cuts at others each time; rows from random places. Written down are
the training loss of the last 50 steps, the validation loss at the end, and the lowest validation
loss on the way, looked at every 250 steps. The last line is JSON; `--save` keeps it. Ways that
are done are kept, and not done again."""

import sys
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench

from llm_lab.chars import CharTokenizer
from llm_lab.config import read_config
from llm_lab.corpora import split_text, load_corpus
from llm_lab.gpt import MiniGPT
from llm_lab.hardware import machine
from llm_lab.optim import OPTIMIZERS, SCHEDULES
from llm_lab.batching import BatchStream
from llm_lab.runs import model_config
from llm_lab.train import TrainState, fit, mean_loss, random_crops

HERE = Path(__file__).parent
WAYS = {
    # documents of one block each: their rows begin with them, and stay
    'blocks, the same each epoch': lambda ids, B, T: BatchStream(
        ids, B, T, starts=np.arange(0, len(ids), T)
    ),
    'blocks, the cut moves': BatchStream,
    'random crops': random_crops,
}


def learned(way, steps, threads=1):
    "The losses of a model that reads the text in one of the `WAYS`"
    torch.set_num_threads(threads)
    cfg = read_config('golden')
    t = cfg.train
    text = split_text(load_corpus('tiny_shakespeare').text('train')[:60_000])
    tok = CharTokenizer.train(''.join(text.values()))
    train, val = (torch.tensor(tok.encode(text[s])) for s in ('train', 'val'))
    model = MiniGPT(model_config(cfg, tok.vocab_size), t.seed)
    optimizer = OPTIMIZERS[t.optimizer](model, lr=t.lr, weight_decay=t.weight_decay)
    run = TrainState(model, steps, optimizer=optimizer)
    vals = {}

    def look(run):
        vals[run.step] = mean_loss(model, val)

    fit(
        model,
        WAYS[way](train, t.batch_size, cfg.data.length),
        steps,
        clip=t.clip,
        state=run,
        schedule=partial(SCHEDULES[t.schedule], warmup=t.warmup),
        callbacks={250: look, (steps,): look},
    )
    best = min(vals, key=vals.get)
    return dict(
        train=round(mean(run.losses[-50:]), 4),
        val=round(vals[steps], 4),
        best=round(vals[best], 4),
        best_step=best,
    )


def main(steps, only=None):
    done = {}
    for way in WAYS:
        file = HERE / 'runs' / f'{way.replace(", ", "-").replace(" ", "-")}-{steps}.json'
        # a way that was measured before is in the table, also where only another is asked for
        if way == only or only is None or file.exists():
            done[way] = bench.kept(file, lambda: learned(way, steps))
    print(f'{"":28}{"training":>10}{"at the end":>12}{"lowest":>8}{"at step":>9}')
    for way, told in done.items():
        print(
            f'{way:28}{told["train"]:10.2f}{told["val"]:12.2f}'
            f'{told["best"]:8.2f}{told["best_step"]:9,}'
        )
    return dict(nats=done, steps=steps, **machine())


if __name__ == '__main__':
    ap = bench.parser(__doc__, steps=1000)
    ap.add_argument('--only', choices=WAYS, help='one way only')
    a = ap.parse_args()
    bench.report(__file__, main(a.steps, a.only), a.save)
