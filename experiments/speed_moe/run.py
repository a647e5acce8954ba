"""How fast is a mixture of experts, beside transformers' Mixtral and beside a dense MLP that works
as much for each token?

python experiments/speed_moe/run.py [--rounds 81] [--save] [--gpu]

8 experts, 2 for each token, width 256, experts of width 512, 2,048 tokens, float32, forward and
backward, gradients of the weights and of the input. Ours is `moe`; it multiplies by oneDNN
where that is quicker, as a training run does. Mixtral is transformers' block as it comes
(`eager`) and its grouped form (`grouped_mm`), with the same weights; before the clock runs, all
three must give the same outputs and gradients. Dense is one SwiGLU of width 1,024, the same
number of multiplications, plainly and as a training run has it (`onednn_linears`, `gpt`).
Contenders take turns in random order; each turn has new tokens, so the experts' shares differ
from turn to turn, as they do in training. Medians. `even` shares the tokens out evenly; `skewed`
lets a quarter of the experts have most of them. `--gpu` compares in bf16 on a CUDA device. The
last line is JSON; `--save` keeps it."""

import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench

from llm_lab.gpt import GPTConfig
from llm_lab.onednn import onednn_linears
from llm_lab.parts import part
from llm_lab.hardware import keep_freed_memory, machine
from llm_lab.core import require, rng
from llm_lab.llama_block import SwiGLU
from llm_lab.moe import MoE, Router

E, K, C, F, N = 8, 2, 256, 512, 2048  # experts, each token's, d_model, d_ff, tokens


def mixtral(moe, kind, device):
    "transformers' block with our weights"
    require('transformers')
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    cfg = MixtralConfig(
        hidden_size=C, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K
    )
    cfg._experts_implementation = kind
    block = MixtralSparseMoeBlock(cfg).to(device)
    with torch.no_grad():
        block.gate.weight.copy_(moe.router.weight)
        block.experts.gate_up_proj.copy_(moe.experts.up.weight)
        block.experts.down_proj.copy_(moe.experts.out.weight)
    return block


def contenders(device='cpu', dtype=torch.float32):
    "{name: module}, the first three with the same weights"
    torch.manual_seed(0)
    cfg = GPTConfig(d_model=C)
    ours = MoE(
        cfg,
        n_experts=E,
        top_k=K,
        expert=part(SwiGLU, d_ff=F),
        router=part(Router, balance=0.0, z=0.0),
    ).to(device)
    with torch.no_grad():
        for m in (ours.experts.up, ours.experts.out):
            m.weight.normal_(0, 0.04)
    ours.to(dtype)
    dense = SwiGLU(cfg, d_ff=K * F).to(device, dtype)
    return dict(
        ours=ours,
        eager=mixtral(ours, 'eager', device).to(dtype),
        grouped=mixtral(ours, 'grouped_mm', device).to(dtype),
        dense=dense,
    )


def turn(module, x, g, wait=lambda: None):
    "Seconds of a forward and a backward pass; `wait` is until the device has done its work"
    x = x.clone().requires_grad_()
    wait()
    start = time.perf_counter()
    module(x).backward(g)
    wait()
    took = time.perf_counter() - start
    module.zero_grad()
    return took


def tokens(n, router, device, dtype, skewed):
    "New tokens; skewed ones lean toward what the first two experts like"
    x = torch.randn(1, N, C, generator=rng(n, 'tokens')).to(device, dtype)
    if not skewed:
        return x
    liked = normalize(router[:2].detach().sum(0), dim=0).to(dtype)
    return x + 3 * liked


def race(ways, rounds, device, dtype, skewed=False):
    "{name: median seconds of a turn}"
    wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
    g = torch.randn(1, N, C, generator=rng(0, 'g')).to(device, dtype)

    def one(module):
        "A turn: each round has tokens of its own, the same for all, that no clock waits for"
        n = 0

        def go():
            nonlocal n
            x = tokens(n, ways['ours'].router.weight, device, dtype, skewed)
            n += 1
            return turn(module, x, g, wait)

        return go

    turns = {name: one(module) for name, module in ways.items()}
    if device == 'cpu':
        quick = one(ways['dense'])

        def by_onednn():
            with onednn_linears(ways['dense']):
                return quick()

        turns['dense, quick'] = by_onednn
    return bench.medians(bench.take_turns(turns, rounds, 'rounds', warm_up=3, shuffled=True))


def same(ways, device, dtype, most):
    "The same function: outputs, and gradients of the input and of both matrices"
    x = tokens(0, ways['ours'].router.weight, device, dtype, False).requires_grad_()
    found = {}
    theirs = 'gate_up_proj', 'down_proj'
    for name, at in dict(eager=theirs, grouped=theirs, ours=('up.weight', 'out.weight')).items():
        weights = [ways[name].experts.get_parameter(n) for n in at]
        y = ways[name](x)
        found[name] = (y, *torch.autograd.grad(y.float().sin().sum(), (x, *weights)))
    for name in ('ours', 'grouped'):
        for got, want in zip(found[name], found['eager']):
            far = ((got - want).abs().max() / want.abs().max()).item()
            if far > most:
                raise SystemExit(f'{name} is {far:.1e} from Mixtral: not the same function')


def main(rounds, device):
    if device == 'cpu':
        keep_freed_memory()
    dtype = torch.float32 if device == 'cpu' else torch.bfloat16
    ways = contenders(device, dtype)
    out = {}
    same(ways, device, dtype, 1e-5 if device == 'cpu' else 5e-2)
    for kind in ('even', 'skewed'):
        seconds = race(ways, rounds, device, dtype, kind == 'skewed')
        x = tokens(3, ways['ours'].router.weight, device, dtype, kind == 'skewed')
        # tokens of each expert, as multiples of an even share
        load = ways['ours'].router(x[0])[2] / N / K * E
        out[kind] = dict(
            ms={n: round(1000 * s, 2) for n, s in seconds.items()},
            busiest=round(load.max().item(), 2),
            ratio={n: round(s / seconds['ours'], 3) for n, s in seconds.items()},
        )
        print(f'\n{kind}: the busiest expert has {load.max().item():.2f} times its share')
        for n, s in seconds.items():
            print(f'  {n:14}{1000 * s:8.1f} ms{s / seconds["ours"]:8.2f} × ours')
    return dict(out, rounds=rounds, **machine())


if __name__ == '__main__':
    ap = bench.parser(__doc__, rounds=81)
    ap.add_argument('--gpu', action='store_true', help='on a CUDA device, in bf16')
    a = ap.parse_args()
    result = main(a.rounds, 'cuda' if a.gpu else 'cpu')
    bench.report(__file__, result, a.save, 'result_gpu.json' if a.gpu else 'result.json')
