"""How fast is attention that reads few keys, beside dense attention, and does it read the keys it
says?

python experiments/speed_attention/run.py [--rounds 9] [--longest 16384] [--save] [--gpu]

One text, 8 heads of 64 channels, float32, forward and backward. The contenders take turns, and
the clock runs over both ways. Dense is PyTorch's own causal kernel. `masked` is the same kernel
with the window as a mask, which is how models with windows are run on a CPU by default;
`local-attention` (PyPI) cuts the text into blocks, as sparse attention is often done. Ours is
`kernels`: the kernel is chosen by length. For each pattern and length the keys of every query,
counted from what the kernel is given, are compared with the definition. A process of its own
measures the most memory that a call adds. The exponent is the slope of log time over log length
from 1,024 tokens on. `--gpu` compares with dense in bf16 from 4,096 to 32,768 tokens on a CUDA
device. The last line is JSON; `--save` keeps it in result.json."""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.nn import functional as F

from llm_lab.kv_cache import sliding_window
from llm_lab.parts import part
from llm_lab.self_attention import dense_mask
from llm_lab.kernels import Plan, sparse_attention, get_plan, choose_kernel
from llm_lab.hardware import keep_freed_memory, machine
from llm_lab.core import require, progress, rng
from llm_lab.sparse import or_masks, expander_links

H, D = 8, 64
PATTERNS = {
    'window 256': part(sliding_window, size=256),
    'window 64': part(sliding_window, size=64),
    'window 64 + 6 links': part(
        or_masks, of=(part(sliding_window, size=64), part(expander_links, degree=6, beyond=64))
    ),
}
# the others are not asked for more
LENGTHS = (128, 256, 384, 512, 1024, 2048, 4096, 8192, 16384)
OTHERS = 8192


def qkvg(T, device='cpu', dtype=torch.float32):
    draw = rng(0, 'qkv')
    q, k, v, g = (torch.randn(1, H, T, D, generator=draw).to(device, dtype) for _ in range(4))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), g


def local(size):
    return require('local_attention', 'local-attention').LocalAttention(
        window_size=size,
        causal=True,
        look_backward=1,
        exact_windowsize=True,
        use_rotary_pos_emb=False,
        autopad=True,
        dim=D,
    )


def contenders(T):
    "{name: a function of q, k, v}"
    ways = {'dense': lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)}
    i = torch.arange(T)
    if T <= OTHERS:
        seen = dense_mask(PATTERNS['window 256'], i, i)
        ways['masked, window 256'] = lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen
        )
        other = local(256)
        ways['local-attention, window 256'] = lambda q, k, v: other(q, k, v)
    return ways | {
        name: lambda q, k, v, p=p: sparse_attention(q, k, v, p) for name, p in PATTERNS.items()
    }


def turn(f, q, k, v, g):
    start = time.perf_counter()
    f(q, k, v).backward(g)
    took = time.perf_counter() - start
    q.grad = k.grad = v.grad = None
    return took


def speed(T, rounds):
    ways, inputs = contenders(T), qkvg(T)
    for f in ways.values():
        turn(f, *inputs)  # plans are made
    took = {name: [] for name in ways}
    for n in range(rounds):
        # nobody always follows the same one
        for name in random.Random(n).sample([*ways], len(ways)):
            took[name].append(turn(ways[name], *inputs))
    return {name: median(t) for name, t in took.items()}


def keys_are_true(T, pieces=512):
    """The plan's keys of every query, beside the definition asked pair by pair; their mean and what
    is multiplied"""
    out = {}
    for name, pattern in PATTERNS.items():
        if choose_kernel(pattern, T)[0] == 'dense':
            continue
        plan, i = Plan(pattern, T, H).make(), torch.arange(T)
        want = torch.cat(
            [
                dense_mask(pattern, some, i, H).expand(1, H, -1, -1).sum(-1)
                for some in i.split(pieces)
            ],
            -1,
        )
        got = plan.keys().expand(1, H, T)
        if not got.equal(want):
            raise SystemExit(f'{name} at {T}: the plan reads other keys than the pattern')
        out[name] = dict(
            mean=round(got.double().mean().item(), 2), most=int(got.max()), touched=plan.touched
        )
    return out


def resident(what='VmRSS'):
    return (
        next(
            int(line.split()[1])
            for line in Path('/proc/self/status').read_text().splitlines()
            if line.startswith(what)
        )
        * 1024
    )


def memory(name, T):
    """Bytes that one call, both ways, adds at its height, and those of the plan, which is made
    once; in a process of its own"""
    f, few, inputs = contenders(T)[name], qkvg(512), qkvg(T)
    # the libraries are loaded
    turn(lambda q, k, v: sparse_attention(q, k, v, PATTERNS['window 64']), *few)
    before = resident()
    if name in PATTERNS and (plan := get_plan(PATTERNS[name], T, H)).linked:
        plan.links(1, H)
    made = resident()
    Path('/proc/self/clear_refs').write_text('5')  # the height is counted from here
    turn(f, *inputs)
    print(json.dumps(dict(call=resident('VmHWM') - made, plan=made - before)))


def slope(lengths, out, name):
    "By which power of the length time grows, from 1,024 tokens on"
    points = [(T, out[T]['ms'][name]) for T in lengths if T >= 1024]
    return round(float(np.polyfit(*np.log(points).T, 1)[0]), 3) if len(points) > 1 else None


def on_cpu(rounds, longest):
    keep_freed_memory()
    lengths = [T for T in LENGTHS if T <= longest]
    out = {}
    for T in progress(lengths, 'lengths'):
        seconds = speed(T, rounds * (12 if T <= 512 else 4 if T <= 1024 else 1))
        ratio = {n: round(seconds['dense'] / s, 2) for n, s in seconds.items()}
        out[T] = dict(
            ms={n: round(1000 * s, 2) for n, s in seconds.items()},
            ratio=ratio,
            kernel={n: choose_kernel(p, T)[0] for n, p in PATTERNS.items()},
            keys=keys_are_true(T),
        )
        print(f'\nT = {T:,}')
        for n, s in seconds.items():
            k = out[T]['keys'].get(n)
            said = 'by the dense kernel' if n in PATTERNS else ''
            if k:
                said = f'{k["mean"]} keys a query on average, {k["touched"]} multiplied'
            print(f'  {n:28}{1000 * s:9.1f} ms{ratio[n]:8.2f} ×   {said}')
    exponent = {n: slope(lengths, out, n) for n in ['dense', *PATTERNS]}
    print('\nexponent of time from 1,024 tokens on:', exponent)
    env = dict(os.environ, MALLOC_MMAP_THRESHOLD_='100000')  # what is freed goes back at once
    me = [sys.executable, __file__, '--memory']
    ask = lambda n, T: (
        subprocess.run([*me, n, str(T)], capture_output=True, text=True, check=True, env=env).stdout
    )
    mb = {
        T: {
            n: {k: round(b / 1e6) for k, b in json.loads(ask(n, T)).items()}
            for n in ['dense', *PATTERNS]
        }
        for T in (4096, 8192)
        if sys.platform == 'linux' and T <= longest
    }
    print('the most memory that a call adds, MB:', mb)
    return dict(lengths=out, exponent=exponent, memory_mb=mb, rounds=rounds, **machine())


def on_gpu(rounds):
    out = {}
    for T in (4096, 8192, 16384, 32768):
        *qkv, g = qkvg(T, 'cuda', torch.bfloat16)
        row = {}
        for name, f in {
            'dense': lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            **{n: lambda q, k, v, p=p: sparse_attention(q, k, v, p) for n, p in PATTERNS.items()},
        }.items():
            turn(f, *qkv, g)  # compiled
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, took = torch.cuda.memory_allocated(), []
            for _ in range(rounds):
                start = time.perf_counter()
                turn(f, *qkv, g)
                torch.cuda.synchronize()
                took.append(time.perf_counter() - start)
            row[name] = dict(
                ms=round(1000 * median(took), 2),
                mb=round((torch.cuda.max_memory_allocated() - before) / 1e6),
            )
        out[T] = row
        print(
            T,
            {
                n: f'{r["ms"]} ms, {r["mb"]} MB, {row["dense"]["ms"] / r["ms"]:.2f} ×'
                for n, r in row.items()
            },
        )
    return dict(gpu=out, device=torch.cuda.get_device_name(), rounds=rounds, **machine())


if __name__ == '__main__':
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument(
        '--rounds',
        type=int,
        default=9,
        help='turns of each contender; four times as many at 1,024 tokens, twelve times below',
    )
    ap.add_argument('--longest', type=int, default=16384, help='tokens of the longest text')
    ap.add_argument('--save', action='store_true', help='keep the last line in result.json')
    ap.add_argument('--gpu', action='store_true', help='on a CUDA device, in bf16')
    ap.add_argument('--memory', nargs=2, help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.memory:
        memory(a.memory[0], int(a.memory[1]))
    else:
        line = json.dumps(on_gpu(a.rounds) if a.gpu else on_cpu(a.rounds, a.longest))
        if a.save:
            (Path(__file__).parent / ('result_gpu.json' if a.gpu else 'result.json')).write_text(
                line + '\n', encoding='utf-8'
            )
        print(line)
