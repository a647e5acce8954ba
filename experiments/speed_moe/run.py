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

import argparse
import json
import random
import time
from pathlib import Path
from statistics import median

import torch

from llm_lab.gpt import GPTConfig
from llm_lab.onednn import onednn_linears
from llm_lab.parts import part
from llm_lab.hardware import keep_freed_memory, machine
from llm_lab.core import require, rng
from llm_lab.llama_block import SwiGLU
from llm_lab.moe import MoE, Router

E, K, C, F, N = 8, 2, 256, 512, 2048


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
    return x + skewed * 3 * torch.nn.functional.normalize(router[:2].detach().sum(0), dim=0).to(
        dtype
    )


def race(ways, rounds, device, dtype, skewed=False):
    wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
    names = [*ways] + ['dense, quick'] * (device == 'cpu')
    took = {}
    g = torch.randn(1, N, C, generator=rng(0, 'g')).to(device, dtype)
    for n in range(-3, rounds):  # three turns to warm up
        x = tokens(n + 3, ways['ours'].router.weight, device, dtype, skewed)
        for name in random.Random(n).sample(names, len(names)):
            if name == 'dense, quick':
                with onednn_linears(ways['dense']):
                    t = turn(ways['dense'], x, g, wait)
            else:
                t = turn(ways[name], x, g, wait)
            if n >= 0:
                took.setdefault(name, []).append(t)
    return {name: median(t) for name, t in took.items()}


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
            if (far := ((got - want).abs().max() / want.abs().max()).item()) > most:
                raise SystemExit(f'{name} is {far:.1e} from Mixtral: not the same function')


def main(rounds, device):
    if device == 'cpu':
        keep_freed_memory()
    dtype = torch.float32 if device == 'cpu' else torch.bfloat16
    ways, out = contenders(device, dtype), {}
    same(ways, device, dtype, 1e-5 if device == 'cpu' else 5e-2)
    for kind in ('even', 'skewed'):
        seconds = race(ways, rounds, device, dtype, kind == 'skewed')
        load = (
            ways['ours'].router(
                tokens(3, ways['ours'].router.weight, device, dtype, kind == 'skewed')[0]
            )[2]
            / N
            / K
            * E
        )
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
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument('--rounds', type=int, default=81)
    ap.add_argument('--save', action='store_true', help='keep the last line in result.json')
    ap.add_argument('--gpu', action='store_true', help='on a CUDA device, in bf16')
    a = ap.parse_args()
    line = json.dumps(main(a.rounds, 'cuda' if a.gpu else 'cpu'))
    if a.save:
        (Path(__file__).parent / ('result_gpu.json' if a.gpu else 'result.json')).write_text(
            line + '\n', encoding='utf-8'
        )
    print(line)
