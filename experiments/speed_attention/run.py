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
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench

from llm_lab.kv_cache import sliding_window
from llm_lab.parts import part
from llm_lab.self_attention import dense_mask
from llm_lab.kernels import Plan, sparse_attention, get_plan, choose_kernel
from llm_lab.hardware import keep_freed_memory, machine
from llm_lab.core import require, progress, rng
from llm_lab.sparse import or_masks, expander_links

H = 8  # heads
D = 64  # channels of a head
PATTERNS = {
    'window 256': part(sliding_window, size=256),
    'window 64': part(sliding_window, size=64),
    'window 64 + 6 links': part(
        or_masks, of=(part(sliding_window, size=64), part(expander_links, degree=6, beyond=64))
    ),
}
LENGTHS = (128, 256, 384, 512, 1024, 2048, 4096, 8192, 16384)
OTHERS = 8192  # the longest text of `masked` and `local-attention`


def qkvg(T, device='cpu', dtype=torch.float32):
    "q, k, v and the gradient of the output, each (1, H, T, D)"
    draw = rng(0, 'qkv')
    q, k, v, g = (torch.randn(1, H, T, D, generator=draw).to(device, dtype) for _ in range(4))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), g


def local(size):
    "A window by the package local-attention"
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
    if T <= OTHERS:
        i = torch.arange(T)
        seen = dense_mask(PATTERNS['window 256'], i, i)
        ways['masked, window 256'] = lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen
        )
        other = local(256)
        ways['local-attention, window 256'] = lambda q, k, v: other(q, k, v)
    return ways | sparse()


def sparse():
    "{name of a pattern: our attention with it}"
    return {n: lambda q, k, v, p=p: sparse_attention(q, k, v, p) for n, p in PATTERNS.items()}


def turn(f, q, k, v, g):
    "Seconds of a forward and a backward pass"
    start = time.perf_counter()
    f(q, k, v).backward(g)
    took = time.perf_counter() - start
    q.grad = k.grad = v.grad = None
    return took


def speed(T, rounds):
    "{name: median seconds of a turn}; in the round that warms up, plans are made"
    inputs = qkvg(T)
    ways = {name: lambda f=f: turn(f, *inputs) for name, f in contenders(T).items()}
    return bench.medians(bench.take_turns(ways, rounds, f'{T} tokens', warm_up=1, shuffled=True))


def keys_are_true(T, pieces=512):
    """The plan's keys of every query, beside the definition asked pair by pair; their mean and what
    is multiplied"""
    out = {}
    for name, pattern in PATTERNS.items():
        if choose_kernel(pattern, T)[0] == 'dense':
            continue
        plan = Plan(pattern, T, H).make()
        i = torch.arange(T)
        # piece by piece: the whole mask of a long text would not fit
        counts = [
            dense_mask(pattern, some, i, H).expand(1, H, -1, -1).sum(-1) for some in i.split(pieces)
        ]
        got = plan.keys().expand(1, H, T)
        if not got.equal(torch.cat(counts, -1)):
            raise SystemExit(f'{name} at {T}: the plan reads other keys than the pattern')
        out[name] = dict(
            mean=round(got.double().mean().item(), 2), most=int(got.max()), touched=plan.touched
        )
    return out


def resident(what='VmRSS'):
    "Bytes of this process in memory, now or (VmHWM) at their height"
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024


def memory(name, T):
    """Bytes that one call, both ways, adds at its height, and those of the plan, which is made
    once; in a process of its own"""
    f = contenders(T)[name]
    inputs = qkvg(T)
    # a small call first: the libraries are loaded
    turn(lambda q, k, v: sparse_attention(q, k, v, PATTERNS['window 64']), *qkvg(512))
    before = resident()
    if name in PATTERNS:
        plan = get_plan(PATTERNS[name], T, H)
        if plan.linked:
            plan.links(1, H)
    made = resident()
    Path('/proc/self/clear_refs').write_text('5')  # the height is counted from here
    turn(f, *inputs)
    print(json.dumps(dict(call=resident('VmHWM') - made, plan=made - before)))


def slope(lengths, out, name):
    "By which power of the length time grows, from 1,024 tokens on"
    points = [(T, out[T]['ms'][name]) for T in lengths if T >= 1024]
    if len(points) < 2:
        return None
    return round(float(np.polyfit(*np.log(points).T, 1)[0]), 3)


def turns_at(T, rounds):
    "Short texts are quick, and noisy: they have more turns"
    if T <= 512:
        return 12 * rounds
    if T <= 1024:
        return 4 * rounds
    return rounds


def memory_of(name, T):
    "What `memory` prints, of a process of its own, in MB"
    env = dict(os.environ, MALLOC_MMAP_THRESHOLD_='100000')  # what is freed goes back at once
    me = [sys.executable, __file__, '--memory', name, str(T)]
    said = subprocess.run(me, capture_output=True, text=True, check=True, env=env).stdout
    return {what: round(b / 1e6) for what, b in json.loads(said).items()}


def on_cpu(rounds, longest):
    keep_freed_memory()
    lengths = [T for T in LENGTHS if T <= longest]
    out = {}
    for T in progress(lengths, 'lengths'):
        seconds = speed(T, turns_at(T, rounds))
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
    mb = {}
    for T in (4096, 8192):
        if sys.platform == 'linux' and T <= longest:
            mb[T] = {n: memory_of(n, T) for n in ['dense', *PATTERNS]}
    print('the most memory that a call adds, MB:', mb)
    return dict(lengths=out, exponent=exponent, memory_mb=mb, rounds=rounds, **machine())


def on_gpu_of(f, q, k, v, g, rounds):
    "Milliseconds of a turn (the median), and the most memory that it adds in MB"
    turn(f, q, k, v, g)  # compiled
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    took = []
    for _ in range(rounds):
        start = time.perf_counter()
        turn(f, q, k, v, g)
        torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    most = torch.cuda.max_memory_allocated() - before
    return dict(ms=round(1000 * median(took), 2), mb=round(most / 1e6))


def on_gpu(rounds):
    "Of dense attention and each pattern, from 4,096 tokens on, what `on_gpu_of` measures"
    ways = {'dense': contenders(OTHERS + 1)['dense'], **sparse()}
    out = {}
    for T in (4096, 8192, 16384, 32768):
        inputs = qkvg(T, 'cuda', torch.bfloat16)
        row = {name: on_gpu_of(f, *inputs, rounds) for name, f in ways.items()}
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
    ap = bench.parser(__doc__)
    ap.add_argument(
        '--rounds',
        type=int,
        default=9,
        help='turns of each contender; four times as many at 1,024 tokens, twelve times below',
    )
    ap.add_argument('--longest', type=int, default=16384, help='tokens of the longest text')
    ap.add_argument('--gpu', action='store_true', help='on a CUDA device, in bf16')
    ap.add_argument('--memory', nargs=2, help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.memory:
        memory(a.memory[0], int(a.memory[1]))
    elif a.gpu:
        bench.report(__file__, on_gpu(a.rounds), a.save, 'result_gpu.json')
    else:
        bench.report(__file__, on_cpu(a.rounds, a.longest), a.save)
