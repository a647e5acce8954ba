"""falcon, condor and tinystories_baseline in one table: parameters, active ones, operations, and
what a short run learns.

python experiments/three_configs/run.py [--steps 300] [--text tiny_shakespeare] [--save] [--full]

The configurations as they are but for the text, the context (128 tokens), the batch (8 rows) and
the optimizer (AdamW at 0.001): a look on a laptop, not a verdict; at full length they train for
20,000 steps on TinyStories (`--full`: on a GPU, with nothing changed). All three read the same
tokens (BPE of 8,192) in the same order. The loss is that of the validation split in bits per
byte; loads and drops are of the last training batch. Each is an ordinary run of the lab, kept
under its config's name as `three-…`; a finished one is not repeated. One line of JSON at the
end; `--save` keeps it."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench

from llm_lab.config import model_data, read_config
from llm_lab.experts import active_params
from llm_lab.gpt import MiniGPT
from llm_lab.package import config_from
from llm_lab.hardware import flops, machine
from llm_lab.core import home
from llm_lab.runs import train_run

NAMES = ('condor', 'tinystories_baseline', 'falcon')
SHORT = (
    'data.length=128',
    'train.batch_size=8',
    'train.optimizer=adamw',
    'train.lr=.001',
    'train.warmup=30',
    'eval.every=100',
    'eval.tokens=20_000',
    'eval.sample_every=1000',
    'log.checkpoint_every=100',
)


def one(name, run, changes):
    "The run's last row and its result, trained if need be"
    folder = home() / 'experiments' / name / 'runs' / run
    if not folder.exists():
        train_run(name, *changes, run=run)
    elif not (folder / 'result.json').exists():
        train_run(name, *changes, resume=str(folder))
    rows = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    last = next(r for r in reversed(rows) if 'val' in r)
    return last, json.loads((folder / 'result.json').read_text())


def main(steps, text, full):
    changes = (f'data.corpus={text}', f'train.steps={steps}', *SHORT) if not full else ()
    out = []
    print(
        f'{"":22}{"parameters":>12}{"active":>12}{"Mflop a token":>15}{"bits per byte":>15}'
        f'{"loads":>14}{"drops":>8}'
    )
    for name in NAMES:
        cfg = read_config(name, changes)
        length = cfg.data.length
        size = dict(vocab_size=cfg.data.vocab_size, max_len=length)
        model = MiniGPT(config_from(model_data(cfg.model) | size))
        ids = torch.zeros(1, length, dtype=torch.int64)
        work = flops(lambda: model(ids)) / length / 1e6
        row, result = one(name, f'three-{text}-{steps}' if changes else 'three-full', changes)
        each = lambda kind: [v for k, v in row.items() if k.startswith('moe') and k.endswith(kind)]
        o = dict(
            name=name,
            params=model.n_params,
            active=active_params(model),
            mflop=round(work, 2),
            bits_per_byte=result['scores']['val']['bits_per_byte'],
            load_min=min(each('load_min'), default=None),
            load_max=max(each('load_max'), default=None),
            drops=max(each('drops'), default=None),
        )
        out.append(o)
        loads = ''
        if o['load_min'] is not None:
            loads = f'{o["load_min"]:9.2f}–{o["load_max"]:.2f}{o["drops"]:8.1%}'
        print(
            f'{name:22}{o["params"]:12,}{o["active"]:12,}{work:15.1f}{o["bits_per_byte"]:15.3f}'
            + loads,
            flush=True,
        )
    return dict(configs=out, steps=steps, text=text, **machine())


if __name__ == '__main__':
    ap = bench.parser(__doc__, steps=300)
    ap.add_argument('--text', default='tiny_shakespeare')
    ap.add_argument('--full', action='store_true', help='the configurations as they are, on a GPU')
    a = ap.parse_args()
    name = 'result_full.json' if a.full else 'result.json'
    bench.report(__file__, main(a.steps, a.text, a.full), a.save, name)
