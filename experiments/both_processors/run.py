"""What does this processor gain by each of the ways of the lab?

All ratios side by side, in one run of less than four minutes.

python experiments/both_processors/run.py [--rounds 6] [--only products,rows,muon,step,decode]
[--save]

Processors differ in what they are quick at: some multiply bf16 several times as fast as float32,
some lose half of their speed in the library that PyTorch takes for float32, some read memory as
fast as they can with any kernel. So nothing here is compared between machines but ratios, each
measured in turns and in a new random order every round; medians.

- products: of matrices as a training step has them, in billions of operations a second, by
  PyTorch's choice, by oneDNN, in bf16
- rows: one row and a matrix, as writing a token has them, in billions of weights a second, by each
  kernel there is
- muon: the rounds of `newton_schulz` for the matrices of the step, beside float32
- step: nanoGPT's shape of `speed_step`, beside the plain loop; each loop in a process of its own
- decode: the shapes of `speed_decode`, beside `generate` of transformers; each way in a process of
  its own

The last line is JSON; `--save` keeps it in result.json with date and machine."""

import importlib.util
import platform
import re
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench

from llm_lab.gpt import MiniGPT
from llm_lab.hub import to_hf
from llm_lab.onednn import with_onednn, onednn_is_faster
from llm_lab.hardware import keep_freed_memory, machine
from llm_lab.core import progress, rng
from llm_lab.llama_block import llama
from llm_lab.efficient import PRECISIONS
from llm_lab.optim import newton_schulz, short_precision

HERE = Path(__file__).resolve().parent
STEP = HERE.parent / 'speed_step' / 'run.py'
DECODE = HERE.parent / 'speed_decode' / 'run.py'
LOOPS = {
    'plain': 'plain eager GPT-2',
    'ours': 'llm_lab',
    'compiled': 'llm_lab, compiled',
    'bf16': 'llm_lab, bf16',
    'Muon': 'llm_lab, Muon',
    'no oneDNN': 'llm_lab, no oneDNN',
}
WAYS = {
    '15M': ('transformers', 'fast', 'compiled', 'int8', 'int8_compiled'),
    '110M': ('transformers', 'fast', 'compiled', 'int8'),
}


def processor():
    "Its name, and what it says it can do that matters to products"
    info = Path('/proc/cpuinfo')
    found = re.search(r'^flags\s*:(.*)$', info.read_text(), re.M) if info.exists() else None
    flags = found[1].split() if found else []
    known = sorted(f for f in flags if re.match(r'avx|amx|fma', f))
    return dict(
        capability=torch.backends.cpu.get_cpu_capability(), machine=platform.machine(), flags=known
    )


def in_turns(ways, rounds, label):
    "{name: median seconds of a call}; every way is called once before"
    turns = bench.timed(ways)
    return bench.medians(bench.take_turns(turns, rounds, label, warm_up=1, shuffled=True))


def table(title, rows, unit):
    "Print {row: {way: number}} with the ratio of each number to the first of its row"
    print(f'\n{title} ({unit}, and beside the first)')
    for row, found in rows.items():
        first = next(iter(found.values()))
        print(
            f'  {row:18}'
            + ''.join(f'  {way} {x:.4g} ({x / first:.2f}×)' for way, x in found.items())
        )


def products(rounds):
    "{shape: {way: billions of operations a second}}"
    out = {}
    for m, k, n in ((768, 128, 384), (768, 512, 128), (2048, 256, 1024), (1024, 1024, 1024)):
        a = torch.randn(m, k)
        b = torch.randn(k, n)
        short = a.bfloat16()
        turned = b.bfloat16()
        ways = {
            'PyTorch': lambda a=a, b=b: a @ b,
            'oneDNN': lambda a=a, b=b: with_onednn(torch.mm)(a, b),
            'bf16': lambda a=short, b=turned: a @ b,
        }
        took = in_turns(ways, 6 * rounds, 'products')
        out[f'{m} × {k} × {n}'] = {
            way: round(2 * m * k * n / s / 1e9, 1) for way, s in took.items()
        }
    table('products', out, 'billions of operations a second')
    return out


def rows(rounds):
    """{shape: {way: billions of weights a second}}; many copies, so that no weight waits in a
    nearby memory"""
    out = {}
    for k, n in ((288, 864), (768, 2304), (2048, 768), (288, 32_000)):
        x = torch.randn(1, k)
        many = max(2, 30_000_000 // (k * n))
        by_out = [torch.randn(n, k) for _ in range(many)]
        by_in = [w.T.contiguous() for w in by_out]
        eight = [(30 * w).round().clamp(-127, 127).to(torch.int8) for w in by_out]
        short = x.bfloat16()
        half = [w.bfloat16() for w in by_out]
        scale = torch.ones(n).bfloat16()
        kinds = {
            'linear': (lambda w, x=x: F.linear(x, w), by_out),
            'turned': (lambda w, x=x: torch.mm(x, w), by_in),
            'turned, oneDNN': (lambda w, x=x: with_onednn(torch.mm)(x, w), by_in),
            'bf16': (lambda w, x=short: F.linear(x, w), half),
            'int8': (lambda w, x=short, s=scale: torch._weight_int8pack_mm(x, w, s), eight),
        }
        ways = {name: lambda f=f, ws=ws: [f(w) for w in ws] for name, (f, ws) in kinds.items()}
        took = in_turns(ways, rounds, 'rows')
        out[f'{k} → {n}'] = {name: round(many * k * n / s / 1e9, 2) for name, s in took.items()}
    table('one row', out, 'billions of weights a second')
    return out


def muon(rounds):
    "{way: milliseconds} for the matrices of four blocks of width 128"
    shapes = ((384, 128), (128, 128), (512, 128), (128, 512))
    stacks = [torch.randn(4, *s, generator=rng(0, f'{s}')) for s in shapes]
    of = lambda **how: [newton_schulz(g, **how) for g in stacks]
    ways = {
        'float32': lambda: of(),
        'bf16': lambda: of(dtype=torch.bfloat16),
        'as Muon has it': lambda: of(dtype=PRECISIONS[short_precision()]),
    }
    took = in_turns(ways, 4 * rounds, 'muon')
    out = {way: round(1000 * s, 2) for way, s in took.items()}
    table('orthogonalized', {'four blocks': out}, 'ms')
    return out


def in_child_turns(kids, rounds, label, warm_up=0):
    "[what each child answered], by name; they open together, then one works while the others wait"
    for kid in progress(kids.values(), f'{label}: opening, compiling'):
        kid.read()
    turns = {name: kid.turn for name, kid in kids.items()}
    told = bench.take_turns(turns, rounds, label, warm_up=warm_up, shuffled=True)
    for kid in kids.values():
        kid.end()
    return told


def step(rounds):
    "{loop: milliseconds of a step}"
    kids = {name: bench.Child(STEP, '--loop', loop) for name, loop in LOOPS.items()}
    told = in_child_turns(kids, rounds, 'step', warm_up=3)
    ms = {}
    for name, tens in told.items():
        ms[name] = round(1000 * median(t for ten in tens for t in ten), 2)
    a_second = {name: 1000 / t for name, t in ms.items()}
    table('a step of training', {'12 × 64 tokens': a_second}, 'a second')
    return ms


def decode(rounds):
    "{shape: {way: tokens a second}}"
    out = {}
    spec = importlib.util.spec_from_file_location('speed_decode', DECODE)
    shapes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shapes)
    for shape, ways in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            model = MiniGPT(llama(shapes.V, max_len=512, tie=True, **shapes.SHAPES[shape]))
            to_hf(f'{folder}/m', model.eval())
            kids = {way: bench.Child(DECODE, '--child', way, f'{folder}/m') for way in ways}
            fewer = rounds // 2 if shape == '15M' else rounds // 4
            told = in_child_turns(kids, max(2, fewer), shape)
        out[shape] = {}
        for way, turns in told.items():
            out[shape][way] = round(shapes.N / median(t['seconds'] for t in turns), 1)
    table('writing', out, 'tokens a second')
    return out


PARTS = dict(products=products, rows=rows, muon=muon, step=step, decode=decode)


def main():
    ap = bench.parser(__doc__, rounds=6)
    ap.add_argument(
        '--only',
        default=','.join(PARTS),
        help='parts to measure, with commas between (default all)',
    )
    a = ap.parse_args()
    keep_freed_memory()
    start = time.time()
    about = dict(processor(), quick_products=onednn_is_faster(), short_precision=short_precision())
    print(f'{machine()["cpu"]}, {torch.get_num_threads()} threads; ' + ' '.join(about['flags']))
    print(
        f'products by oneDNN: {about["quick_products"]}; Muon counts in {about["short_precision"]}'
    )
    found = {name: PARTS[name](a.rounds) for name in a.only.split(',')}
    took = round(time.time() - start)
    result = dict(found, **about, rounds=a.rounds, seconds=took, **machine())
    bench.report(__file__, result, a.save)


if __name__ == '__main__':
    main()
