"""`moe`: a mixture of experts says what each expert says by itself, weighted, and so do its
gradients, whatever carries it.

The oracle asks every expert about every token and weighs what it was not asked for by zero: no
sorting, no groups, no places."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import ALL, HANG, cases, crossed
from helpers import json_lines, one_line
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn import functional as F

from llm_lab.kv_cache import with_kv_cache
from llm_lab.chars import CharTokenizer
from llm_lab.checkpoint import CheckpointManager, optimizer_state
from llm_lab.inference import for_inference
from llm_lab.gpt import MLP, GPTConfig, MiniGPT
from llm_lab.package import config_from, to_data
from llm_lab.onednn import onednn_linears
from llm_lab.parts import Aux, part, register
from llm_lab.core import LabError, rng
from llm_lab.onednn import onednn_is_exact
from llm_lab.hardware import flops
from llm_lab.llama_block import RMSNorm, SwiGLU, llama
from llm_lab.moe import (
    PAD,
    ExpertLinear,
    MoE,
    Router,
    balance_loss,
    grouped_mm,
    moe_reference,
    sort_by_expert,
    sigmoid_top_k,
    softmax_top_k,
    top_k_softmax,
    z_loss,
)
from llm_lab.optim import OPTIMIZERS
from llm_lab.efficient import StepRunner, apply_activation_checkpointing, step_memory
from llm_lab.batching import BatchStream
from llm_lab.package import load, save
from llm_lab.sampling import generate
from llm_lab.sparse import alternate
from llm_lab.train import TrainState, adamw, fit, mean_loss, next_token_loss, train_step

ROOT = Path(__file__).resolve().parent.parent
CHOICES = {
    'softmax, top k': part(softmax_top_k),
    'softmax, top k, as it is': part(softmax_top_k, renormalize=False),
    'top k, softmax': part(top_k_softmax),
    'sigmoid': part(sigmoid_top_k, scale=2.5),
}
EXPERTS = {
    'SwiGLU': part(SwiGLU),
    'SwiGLU with bias': part(SwiGLU, bias=True),
    'MLP': part(MLP),
    'MLP without bias': part(MLP, bias=False),
}
TEXT = ''.join(random.Random(0).choices('abcdefgh .\n', k=1200))
TOK = CharTokenizer.train(TEXT)
IDS = torch.tensor(TOK.encode(TEXT))
ROWS = IDS[: 8 * 17].view(8, 17)

pytestmark = pytest.mark.usefixtures('one_thread')


def shaken(model, seed=0):
    "All weights drawn, biases and gains too"
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(
                torch.randn(p.shape, generator=rng(seed, name))
                * (p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3)
            )
    return model


def mixture(seed=0, E=4, k=2, C=8, router=part(Router), dtype=torch.float64, **kw):
    return shaken(
        MoE(GPTConfig(d_model=C, n_heads=1), 0, n_experts=E, top_k=k, router=router, **kw), seed
    ).to(dtype)


def tokens(N, C=8, seed=0, dtype=torch.float64):
    return torch.randn(1, N, C, generator=rng(seed, 'x')).to(dtype).requires_grad_()


def chosen_by(moe, x):
    "(weights, choices), (N, k), as the router's recipe says"
    r = moe.router
    logits = F.linear(x.flatten(0, -2), r.weight)
    if r.off:
        logits = logits.index_fill(1, torch.tensor(r.off), -math.inf)
    return r.choose(logits, r.top_k, 0.0 if r.bias is None else r.bias)[:2]


def dense(moe, x, kept=True):
    "Each expert, a plain MLP, is asked about each token; `kept` (N, k): which choices count"
    flat, (w, chosen), E = x.flatten(0, -2), chosen_by(moe, x), moe.n_experts
    d_ff = moe.experts.out.weight.shape[2]
    plain = type(moe.experts)(
        GPTConfig(d_model=x.shape[-1], n_heads=1), 0, d_ff, bias=moe.experts.up.bias is not None
    )
    y = sum(s(flat) for s in moe.shared)
    for e in range(E):
        mine = {
            n: p[e] if p.dim() == 3 else p.view(E, -1)[e] for n, p in moe.experts.named_parameters()
        }
        y = y + functional_call(plain, mine, (flat,)) * (w * ((chosen == e) & kept)).sum(
            1, keepdim=True
        )
    return y.view_as(x)


def grads(f, moe, x):
    "What comes out, and the gradients of x and of all weights, by name"
    names, wanted = zip(*moe.named_parameters())
    out = f(x)
    g = torch.randn(out.shape, generator=rng(1, 'g'), dtype=torch.float64).to(out.dtype)
    got = torch.autograd.grad(out, [x, *wanted], g, allow_unused=True)
    return {
        'out': out.detach(),
        **{
            n: torch.zeros_like(p) if d is None else d
            for n, p, d in zip(('x', *names), (x, *wanted), got)
        },
    }


def agree(got, want, tolerance):
    assert got.keys() == want.keys()
    for k, v in want.items():
        assert got[k].shape == v.shape
        assert v.numel() == 0 or (got[k] - v).abs().max() <= tolerance * max(1, v.abs().max()), (
            k,
            (got[k] - v).abs().max(),
        )


def small(make=GPTConfig, **kw):
    "A model whose MLPs are mixtures"
    layers = kw.pop('n_layers', 2)
    router = part(
        Router,
        **{
            k: kw.pop(k)
            for k in [*kw]
            if k in ('choose', 'balance', 'z', 'importance', 'bias_rate')
        },
    )
    mlp = part(MoE, router=router, **dict(n_experts=4, top_k=2, expert=part(SwiGLU, d_ff=16)) | kw)
    return make(
        vocab_size=TOK.vocab_size, max_len=16, d_model=16, n_layers=layers, n_heads=2, mlp=mlp
    )


def mixtures(model):
    return [m for m in model.modules() if isinstance(m, MoE)]


def listened(model):
    "What the routers give out from now on: a list of (layer, chosen)"
    said = []
    for m in mixtures(model):
        m.router.register_forward_hook(lambda r, args, out: said.append((r.layer, out[1])))
    return said


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def fails(f, *words):
    "One line, which says where and, after a colon, what"
    one_line(f, ': ', *words)


# ---- in groups, and one by one


@pytest.mark.parametrize('choose', CHOICES)
def test_the_groups_say_what_each_expert_says_and_so_do_all_gradients(choose):
    "50 random shapes of each kind (see cases.py), in float64 and float32"
    idle = 0
    for seed in range(cases(50, 8)):
        r = random.Random(f'{choose}/{seed}')
        E = r.randint(1, 16)
        N = r.choice([1, 1, 2, 3, 5, 8, 17, 40, 90])
        C = r.choice([4, 8, 12])
        expert = part(EXPERTS[r.choice([*EXPERTS])], d_ff=r.choice([1, 5, 8, 16]))
        how = dict(
            E=E,
            k=r.randint(1, E),
            C=C,
            expert=expert,
            shared=r.choice([0, 0, 1, 2]),
            router=part(Router, choose=CHOICES[choose]),
        )
        moe, x = mixture(seed, **how), tokens(N, C, seed)
        got = grads(moe, moe, x)
        agree(got, grads(lambda x: dense(moe, x), moe, x), 1e-11)
        if N < 6:
            agree(got, grads(lambda x: moe_reference(moe, x), moe, x), 1e-11)
        asked = chosen_by(moe, x)[1].unique()
        asleep = [e for e in range(E) if e not in asked]
        idle += len(asleep)
        for n, _ in moe.experts.named_parameters(prefix='experts'):
            assert not got[n].view(E, -1)[asleep].any(), n
        moe, x = moe.float(), x.detach().float().requires_grad_()
        agree(grads(moe, moe, x), grads(lambda x: dense(moe, x), moe, x), 2e-5)
    assert idle > (20 if ALL else 0)


@pytest.mark.parametrize('expert,k', crossed(EXPERTS, [1, 3]))
def test_all_tokens_may_want_the_same_experts(k, expert):
    "The other experts say nothing and learn nothing"
    E, wanted = 5, [3, 0, 4][:k]
    moe, x = mixture(E=E, k=k, expert=EXPERTS[expert]), tokens(70)
    moe.router.off = tuple(e for e in range(E) if e not in wanted)
    got = grads(moe, moe, x)
    assert sorted(chosen_by(moe, x)[1].unique().tolist()) == sorted(wanted)
    agree(got, grads(lambda x: dense(moe, x), moe, x), 1e-11)
    for n, _ in moe.experts.named_parameters(prefix='experts'):
        assert [e for e, g in enumerate(got[n].view(E, -1)) if g.any()] == sorted(wanted), n


@pytest.mark.parametrize('choose,expert', crossed(CHOICES, ['SwiGLU', 'MLP']))
def test_the_gradients_are_those_of_small_steps(choose, expert):
    moe = mixture(
        E=3,
        C=4,
        k=2,
        expert=part(EXPERTS[expert], d_ff=3),
        router=part(Router, choose=CHOICES[choose]),
        shared=1,
        capacity=0.9,
    )
    weights = dict(moe.named_parameters())
    f = lambda x, *w: functional_call(moe, dict(zip(weights, w)), (x,))
    assert torch.autograd.gradcheck(f, (tokens(4, 4), *weights.values()))


def test_no_token_at_all():
    for how in (dict(), dict(k=1), dict(expert=part(MLP), shared=1), dict(capacity=1.0)):
        moe, x = mixture(**how), tokens(0)
        got = grads(moe, moe, x)
        assert got.pop('out').shape == got.pop('x').shape == (1, 0, 8) and not any(
            g.any() for g in got.values()
        )


def test_one_expert_is_the_mlp_and_k_of_k_experts_that_are_alike_are_it_too():
    cfg, x = GPTConfig(d_model=8, n_heads=1), tokens(20)
    for expert in EXPERTS.values():
        plain = shaken(expert(cfg)).double()
        for E, k in ((1, 1), (4, 2), (4, 4)):
            moe = mixture(E=E, k=k, expert=expert)
            with torch.no_grad():
                for n, p in moe.experts.named_parameters():
                    p.copy_(plain.get_parameter(n).repeat(E, *[1] * (p.dim() - 1)))
            torch.testing.assert_close(moe(x), plain(x), rtol=0, atol=1e-12)


def test_products_of_groups_are_products_and_what_lies_behind_them_is_zero():
    "Also where there was no number, and in a table that has no free rows"
    for seed in range(cases(30)):
        r = random.Random(seed)
        E, F_, C = r.randint(1, 6), r.randint(1, 9), r.randint(1, 9)
        sizes = [r.choice([0, 1, 5, 32]) for _ in range(E)]
        tail, rows = r.choice([0, 1, 40]), torch.tensor(sizes)
        x, w, g = (
            torch.randn(*s, generator=rng(seed, n), dtype=torch.float64, requires_grad=n != 'g')
            for n, s in dict(
                x=(sum(sizes) + tail, C), w=(E, F_, C), g=(sum(sizes) + tail, F_)
            ).items()
        )
        want = torch.cat(
            [a @ m.T for a, m in zip(x[: sum(sizes)].split(sizes), w)] + [x.new_zeros(tail, F_)]
        )
        x2 = x.detach().clone()
        x2[sum(sizes) :] = math.nan
        got = grouped_mm(x2.requires_grad_(), w, rows)
        assert got.shape == want.shape and (got[sum(sizes) :] == 0).all()
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        back = torch.autograd.grad(got, (x2, w), g)
        real = torch.autograd.grad(want, (x, w), g)
        assert (back[0][sum(sizes) :] == 0).all()
        for a, b in zip(back, real):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_places_are_distinct_and_each_expert_has_its_own_side_by_side():
    for seed in range(cases(60)):
        r = random.Random(seed)
        E, N = r.randint(1, 9), r.choice([1, 2, 7, 40, 100])
        k, most = r.randint(1, E), r.choice([None, None, 1, 4, 33])
        chosen = torch.rand(N, E, generator=rng(seed, 'e')).topk(k).indices
        place, rows, filled, M = sort_by_expert(chosen, E, most)
        # few pairs are not filled up
        last = M - 1
        who = chosen.t().flatten()
        pad = PAD if N * k > E * PAD else 1
        count = Counter(who.tolist())
        assert filled.tolist() == [min(count[e], N * k if most is None else most) for e in range(E)]
        # the last row is nobody's
        assert (
            rows.tolist() == [-(-n // pad) * pad for n in filled.tolist()]
            and int(rows.sum()) <= last
        )
        start = rows.cumsum(0) - rows
        for e in range(E):
            mine = place[(who == e) & (place != last)]
            # in the order in which they came
            assert mine.tolist() == [*range(int(start[e]), int(start[e] + filled[e]))]


# ---- places are few


def served(chosen, E, most):
    "Who finds a place: all first choices, in the order of the tokens, then all second ones, …"
    free = [most] * E
    yes = torch.zeros_like(chosen, dtype=torch.bool)
    for rank in range(chosen.shape[1]):
        for n, e in enumerate(chosen[:, rank].tolist()):
            if free[e]:
                free[e] -= 1
                yes[n, rank] = True
    return yes


def test_who_comes_too_late_is_not_heard_and_learns_nothing():
    "First choices before second ones, then by position; ⌈capacity·N·k/E⌉ places"
    dropped = silent = 0
    for seed in range(cases(80)):
        r = random.Random(seed)
        E = r.randint(1, 8)
        N = r.choice([1, 2, 5, 9, 20, 50])
        capacity = r.choice([0.1, 0.25, 0.5, 0.75, 1, 1.25, 2])
        k = r.randint(1, E)
        moe = mixture(
            seed,
            E=E,
            k=k,
            capacity=capacity,
            expert=EXPERTS[r.choice([*EXPERTS])],
            shared=r.choice([0, 0, 1]),
            router=part(Router, choose=CHOICES[r.choice([*CHOICES])]),
        )
        x = tokens(N, seed=seed)
        kept = served(chosen_by(moe, x)[1], E, math.ceil(capacity * N * k / E))
        got = grads(moe, moe, x)
        agree(got, grads(lambda x: dense(moe, x, kept), moe, x), 1e-11)
        dropped += int((~kept).sum())
        if moe.shared:
            continue
        mute = ~kept.any(1)
        # exactly: also the bias of an expert is not heard
        assert (got['out'][0, mute] == 0).all() and (got['x'][0, mute] == 0).all()
        silent += int(mute.sum())
    assert dropped > (500 if ALL else 50) and silent > (100 if ALL else 0)


def test_the_weight_of_a_dropped_choice_is_not_given_to_the_others():
    moe = mixture(E=2, k=2, capacity=0.5, router=part(Router, choose=part(top_k_softmax)))
    x = tokens(6)
    w, chosen = chosen_by(moe, x)
    kept = served(chosen, 2, 3)
    assert kept.sum() == 6 and (kept.sum(1) == 1).any()
    for n in range(6):
        want = sum(
            w[n, j] * dense_one(moe, int(chosen[n, j]), x[0, n]) for j in range(2) if kept[n, j]
        )
        torch.testing.assert_close(
            moe(x)[0, n], want + torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-12
        )


def dense_one(moe, e, row):  # one SwiGLU, written out
    gate, value = (moe.experts.up.weight[e] @ row).chunk(2)
    return moe.experts.out.weight[e] @ (F.silu(gate) * value)


def test_in_eval_mode_nobody_is_dropped_and_a_token_does_not_know_its_batch():
    "Alone, in another batch, in another order: the same choices exactly, the same values to 1e-6"
    for seed in range(cases(10)):
        r = random.Random(seed)
        E = r.randint(2, 12)
        moe = mixture(
            seed,
            E=E,
            k=r.randint(1, E),
            C=16,
            dtype=torch.float32,
            capacity=0.1,
            expert=EXPERTS[r.choice([*EXPERTS])],
            router=part(Router, choose=CHOICES[r.choice([*CHOICES])], bias_rate=0.1),
        )
        moe.router.bias.uniform_(-0.2, 0.2, generator=rng(seed, 'bias'))

        def told(x):
            with torch.no_grad():
                y = moe(x, aux := Aux())
            return aux.terms[0]['chosen'], y.flatten(0, -2)

        x = tokens(30, 16, seed, torch.float32)[0].detach()
        other = tokens(77, 16, seed + 99, torch.float32)[0].detach()
        assert (told(x[None])[1] == 0).all(-1).any()  # in training, many are
        moe.eval()
        chosen, y = told(x[None])
        torch.testing.assert_close(y, dense(moe, x[None])[0].detach(), rtol=0, atol=1e-5)
        order = torch.randperm(30, generator=rng(seed, 'order'))
        alone = [told(row[None, None]) for row in x]
        for c, out in (
            (torch.cat([c for c, _ in alone]), torch.cat([out for _, out in alone])),
            (z[:30] for z in told(torch.cat([x, other])[None])),
            (z[77:] for z in told(torch.cat([other, x])[None])),
            (z[order.argsort()] for z in told(x[order][None])),
            told(x.view(5, 6, 16)),
        ):
            assert torch.equal(c, chosen)
            torch.testing.assert_close(out, y, rtol=1e-6, atol=1e-6)


# ---- how to choose


def test_a_choice_before_the_softmax_is_the_choice_after_it_renormalized():
    for seed in range(cases(20)):
        logits = 3 * torch.randn(50, 8, generator=rng(seed, 'logits'), dtype=torch.float64)
        for k in (1, 2, 5, 8):
            (w, e, p), (w2, e2, p2) = softmax_top_k(logits, k), top_k_softmax(logits, k)
            assert torch.equal(e, e2)
            torch.testing.assert_close(w, w2, rtol=0, atol=1e-12)
            torch.testing.assert_close(p, p2, rtol=0, atol=0)


@pytest.mark.parametrize('choose', CHOICES)
def test_weights_are_in_order_sum_to_one_and_do_not_feel_the_bias(choose):
    f = CHOICES[choose]
    scale = f.keywords.get('scale', 1.0)
    whole = f.keywords.get('renormalize', True)
    logits = 2 * torch.randn(200, 6, generator=rng(0, 'logits'), dtype=torch.float64)
    for k in range(1, 7):
        w, e, p = f(logits, k)
        assert w.shape == e.shape == (200, k) and (w > 0).all() and (w.diff() <= 0).all()
        assert all(len(set(row)) == k for row in e.tolist())
        torch.testing.assert_close(p.sum(1), torch.ones(200, dtype=torch.float64))
        if whole:
            torch.testing.assert_close(w.sum(1), torch.full((200,), scale, dtype=torch.float64))
        else:
            torch.testing.assert_close(w, p.gather(1, e))
    bias = torch.tensor([0, 0, 30.0, 0, 0, -30.0], dtype=torch.float64)
    w, e, p = f(logits, 2, bias)
    assert (e[:, 0] == 2).all() and (e != 5).all() and torch.equal(p, f(logits, 2)[2])
    own = f(logits.gather(1, e), 2)  # the same two experts, chosen without a bias
    again = own[0].gather(1, own[1].argsort(1))
    if whole:
        torch.testing.assert_close(w, again)
    else:
        torch.testing.assert_close(w, p.gather(1, e))
    same = f(logits, 3, torch.full((6,), 0.7, dtype=torch.float64))
    # what all have moves nobody
    assert torch.equal(same[0], f(logits, 3)[0]) and torch.equal(same[1], f(logits, 3)[1])


def test_choices_are_those_of_mixtral_qwen3_and_deepseek():
    "The routers of transformers, weights and all, where the groups of DeepSeek-V3 are one"
    pytest.importorskip('transformers', reason='pip install transformers')
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        DeepseekV3Config,
        DeepseekV3TopkRouter,
    )
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralTopKRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeTopKRouter

    sizes = dict(hidden_size=16, num_experts_per_tok=3)
    x = tokens(200, 16, dtype=torch.float32)
    correction = 0.3 * torch.randn(10, generator=rng(0, 'bias'))
    deepseek = DeepseekV3TopkRouter(
        DeepseekV3Config(
            **sizes,
            n_routed_experts=10,
            n_group=1,
            topk_group=1,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        )
    )
    deepseek.e_score_correction_bias.copy_(correction)
    for theirs, choose, bias in (
        (
            MixtralTopKRouter(MixtralConfig(**sizes, num_local_experts=10)),
            part(top_k_softmax),
            None,
        ),
        (
            Qwen3MoeTopKRouter(Qwen3MoeConfig(**sizes, num_experts=10, norm_topk_prob=True)),
            part(softmax_top_k),
            None,
        ),
        (
            Qwen3MoeTopKRouter(Qwen3MoeConfig(**sizes, num_experts=10, norm_topk_prob=False)),
            part(softmax_top_k, renormalize=False),
            None,
        ),
        (deepseek, part(sigmoid_top_k, scale=2.5), correction),
    ):
        ours = Router(
            GPTConfig(d_model=16, n_heads=1),
            n_experts=10,
            top_k=3,
            choose=choose,
            bias_rate=0.0 if bias is None else 0.1,
        )
        if bias is not None:
            ours.bias.copy_(bias)
        theirs.load_state_dict(
            {
                k: v
                for k, v in dict(weight=ours.weight.data, e_score_correction_bias=bias).items()
                if v is not None
            }
        )
        w, chosen, _ = ours(x[0])
        _, scores, index = theirs(x)
        table = lambda w, e: torch.zeros(200, 10).scatter(1, e, w)
        assert torch.equal(table(torch.ones_like(w), chosen), table(torch.ones_like(w), index))
        torch.testing.assert_close(table(w, chosen), table(scores, index), rtol=0, atol=1e-6)
        if bias is not None:
            assert not torch.equal(chosen, sigmoid_top_k(x[0] @ ours.weight.T, 3)[1])


# ---- balance


def test_balance_costs_one_where_loads_are_even_and_the_number_of_experts_where_one_takes_all():
    for E in (1, 2, 8, 64):
        even, one = torch.full((E,), 1 / E), torch.eye(E)[0]
        assert balance_loss(even, even).item() == pytest.approx(1) and balance_loss(
            one, one
        ).item() == pytest.approx(E)
    torch.testing.assert_close(
        balance_loss(torch.stack([even, one]), torch.stack([even, one])), torch.tensor([1.0, 64.0])
    )


def test_balance_pushes_from_the_busy_to_the_idle():
    logits = (torch.tensor([3.0, 1.0, 0.0, -1.0]) + torch.zeros(50, 4)).requires_grad_()
    _, chosen, p = softmax_top_k(logits, 1)
    balance_loss(torch.bincount(chosen.flatten(), minlength=4) / 50, p.mean(0)).backward()
    # a step goes against it
    assert (chosen == 0).all() and (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()
    moe = mixture(E=6, k=1, router=part(Router, balance=1.0, z=0.0))
    x = tokens(300)
    with torch.no_grad():
        moe.router.weight[0] += 3 * x[0].mean(0) / x[0].mean(0).norm()
        x += x[0].mean(0) * 9
    opt = torch.optim.SGD(moe.router.parameters(), lr=0.3)
    seen = []
    for _ in range(100):
        opt.zero_grad()
        moe(x, aux := Aux())
        aux.loss().backward()
        opt.step()
        seen.append(aux.terms[0]['load'].max().item())
    assert seen[0] > 0.7 and seen[-1] < 0.4


@pytest.mark.parametrize('choose,importance', crossed(CHOICES, [False, True]))
def test_what_is_said_is_what_the_papers_write(importance, choose):
    """Fedus et al. eq. 4, Zoph et al. eq. 5, Shazeer et al. eq.

    6 with the weights that were chosen; value and gradient"""
    moe = mixture(
        E=5,
        k=2,
        router=part(Router, choose=CHOICES[choose], balance=0.3, z=0.07, importance=importance),
    )
    x = tokens(40)
    moe(x, aux := Aux())
    logits = x[0] @ moe.router.weight.T
    e = chosen_by(moe, x)[1]
    score = logits.sigmoid() if choose == 'sigmoid' else logits.exp()
    f = torch.tensor([(e == n).sum() / 80 for n in range(5)])
    share = score / score.sum(1, keepdim=True)
    if importance:
        gate = torch.stack([(e == n).any(1) for n in range(5)], 1) * share
        if 'as it is' not in choose:
            gate = gate / gate.sum(1, keepdim=True)
        share = 40 * gate / gate.sum()  # importance: what the gates of a batch sum up to
    want = (
        0.3 * 5 * sum(f[n] * share[:, n].sum() / 40 for n in range(5))
        + 0.07 * sum(row.exp().sum().log() ** 2 for row in logits) / 40
    )
    assert aux.loss().item() == pytest.approx(want.item(), rel=1e-6)
    for a, b in zip(
        torch.autograd.grad(aux.loss(), (moe.router.weight, x)),
        torch.autograd.grad(want, (moe.router.weight, x)),
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    said = aux.terms[0]
    assert (
        torch.equal(said['chosen'], e)
        and not said['weights'].requires_grad
        and not said['share'].requires_grad
    )
    torch.testing.assert_close(said['load'].float(), f)
    assert z_loss(logits).item() == pytest.approx(logits.logsumexp(1).square().mean().item())


def test_without_weights_nothing_is_said_and_without_a_listener_nothing_is_lost():
    moe = mixture(router=part(Router, balance=0, z=0))
    x = tokens(9)
    y = moe(x, aux := Aux())
    assert aux.loss() == 0 and not aux.loss().requires_grad and torch.equal(moe(x), y)


@pytest.mark.parametrize(
    'kw',
    [
        {},
        dict(bias_rate=0.01, capacity=0.7),
        dict(importance=True, choose=part(sigmoid_top_k), shared=1),
    ],
    ids=['plain', 'bias and capacity', 'importance'],
)
def test_the_loss_is_the_bits_of_the_cross_entropy_and_the_gradient_that_of_all_that_is_said(kw):
    "Gradient checkpointing runs a block twice: what it says is neither lost nor doubled"
    model = shaken(MiniGPT(small(llama, balance=0.5, z=0.1, **kw)))
    loss = next_token_loss(model, ROWS)
    loss.backward()
    got = gradients(model)
    model.zero_grad()
    logits = model(ROWS[:, :-1], aux=(aux := Aux()))
    pure = F.cross_entropy(logits.flatten(0, 1), ROWS[:, 1:].flatten())
    assert loss.item() == pure.item() and [*aux.terms] == [0, 1]
    (pure + sum(said['loss'] for said in aux.terms.values())).backward()
    agree(got, gradients(model), 1e-6)
    model.zero_grad()
    next_token_loss(apply_activation_checkpointing(model), ROWS).backward()
    agree(gradients(model), got, 1e-6)
    model.zero_grad()
    F.cross_entropy(
        apply_activation_checkpointing(model, False)(ROWS[:, :-1]).flatten(0, 1),
        ROWS[:, 1:].flatten(),
    ).backward()
    router = 'blocks.0.mlp.router.weight'
    assert (gradients(model)[router] - got[router]).norm() > 0.01  # so this can fail


# ---- balance without a loss


@pytest.mark.parametrize(
    'way', ['plain', 'three parts', 'checkpoints', 'three parts, checkpoints', 'bf16', 'Muon']
)
def test_the_bias_moves_once_a_step_by_its_rate_toward_balance(way):
    model = shaken(MiniGPT(small(bias_rate=0.01, balance=0, z=0)))
    if 'checkpoints' in way:
        apply_activation_checkpointing(model)
    opt = OPTIMIZERS['muon' if way == 'Muon' else 'adamw'](model)
    step = StepRunner(
        accumulate=3 if 'three' in way else 1, precision='bf16' if way == 'bf16' else 'float32'
    )
    want = [torch.zeros(4) for _ in range(2)]
    said = listened(model)
    for _ in range(6):
        said.clear()
        step(model, opt, ROWS)
        for layer, bias in enumerate(want):
            counts = Counter(torch.cat([e.flatten() for l, e in said if l == layer]).tolist())
            mean = sum(counts.values()) / 4
            bias += 0.01 * torch.tensor(
                [float((counts[e] < mean) - (counts[e] > mean)) for e in range(4)]
            )
            assert torch.equal(model.blocks[layer].mlp.router.bias, bias)
    assert any(b.any() for b in want)


def test_looking_moves_no_bias_and_a_layer_without_one_has_none():
    model = shaken(MiniGPT(small(bias_rate=0.01)))
    router = model.blocks[0].mlp.router
    mean_loss(model, IDS[:200])
    router.after_step()
    assert not router.bias.any()
    model.train()(ROWS[:, :-1])
    router.after_step()
    assert router.bias.any()
    bias = router.bias.clone()
    router.after_step()
    assert torch.equal(router.bias, bias)  # nothing new was read
    assert [k for k in MiniGPT(small()).state_dict() if 'router' in k] == [
        f'blocks.{n}.mlp.router.weight' for n in range(2)
    ]


def test_a_bias_that_follows_the_load_evens_it():
    moe = mixture(E=6, k=2, router=part(Router, bias_rate=0.02, balance=0, z=0))
    x = tokens(300)
    with torch.no_grad():
        moe.router.weight[0] += 2 * x[0].mean(0) / x[0].mean(0).norm()
        x += x[0].mean(0) * 9

    def busiest():
        return torch.bincount(chosen_by(moe, x)[1].flatten(), minlength=6).max().item() / 100

    first = busiest()
    for _ in range(150):
        moe(x)
        moe.router.after_step()
    assert first > 2 and busiest() < 1.3


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_a_run_that_is_resumed_ends_with_the_same_bits(name, tmp_path):
    "Bias, capacity, dropout, three parts a batch; metrics are read on the way"

    def begin():
        model = MiniGPT(replace(small(llama, bias_rate=0.01, capacity=0.8), dropout=0.2))
        return TrainState(model, 12, optimizer=OPTIMIZERS[name](model)), BatchStream(
            IDS, 6, 16, seed=1
        )

    def go(run, batch, callbacks=()):
        return fit(
            run.model,
            batch,
            12,
            state=run,
            step_fn=StepRunner(accumulate=3),
            callbacks={2: lambda run: run.model.metrics(), **dict(callbacks)},
        )

    def bits(run):
        tensors = {
            **run.model.state_dict(),
            **optimizer_state(run.model, run.optimizer)[0],
            'history': run.history,
        }
        return {k: v.numpy().tobytes() for k, v in tensors.items()}

    run, batch = begin()
    saves = CheckpointManager(tmp_path, TOK, keep=99, data=batch)
    whole = bits(go(run, batch, callbacks={1: saves}))
    bias = run.model.state_dict()['blocks.0.mlp.router.bias']
    noted = {
        f'moe{layer}_{k}' for layer in (0, 1) for k in ('load_max', 'load_min', 'entropy', 'drops')
    }
    assert bias.any() and run.notes[0].keys() == {'step', *noted}
    for at in (1, 6, 11):
        for forget in (False, True):
            again, batch = begin()
            CheckpointManager(tmp_path, TOK, data=batch).load(again, saves.folder_of(at))
            if forget:
                again.model.blocks[0].mlp.router.bias.zero_()
            assert (bits(go(again, batch)) == whole) != forget, at
            if not forget:
                assert [n for n in again.notes if n['step'] > at] == [
                    n for n in run.notes if n['step'] > at
                ]
    assert torch.equal(load(saves.folder_of(12)).model.blocks[0].mlp.router.bias, bias)


@pytest.mark.parametrize('choose', CHOICES)
def test_who_is_left_out_stays_out_whatever_the_bias_says(choose):
    from llm_lab.experts import without_experts

    model = shaken(MiniGPT(small(n_layers=1, choose=CHOICES[choose], bias_rate=0.1))).eval()
    router = model.blocks[0].mlp.router
    x = torch.randn(50, 16, generator=rng(0, 'x'))
    router.bias.copy_(torch.tensor([9.0, 0, 0, 0]))

    def asked():
        return set(router(x)[1].flatten().tolist())

    assert 0 in asked()
    with without_experts(model, 0, 0):
        assert asked() == {1, 2, 3}
        with without_experts(model, 0, 1):
            assert asked() == {2, 3}  # one inside the other
        assert asked() == {1, 2, 3}
    assert 0 in asked()


def test_places_are_counted_as_on_paper():
    "⌈capacity·N·k/E⌉, where floating point would say a little more; and never none"
    for capacity, places in ((1.1, 11), (1e-9, 1)):
        moe = mixture(E=10, k=1, capacity=capacity)
        chosen = chosen_by(moe, x := tokens(100))[1]
        late = sum(
            max(0, n - places) for n in torch.bincount(chosen.flatten(), minlength=10).tolist()
        )
        moe(x)
        assert late and moe.metrics()['moe0_drops'] == pytest.approx(late / 100)


# ---- what is noted


def test_metrics_are_a_count_by_hand_of_the_last_batch():
    """Of that batch alone: what was noted before a kill is gone, and a run that goes on must say
    the same"""
    model = shaken(MiniGPT(small(capacity=0.8, n_layers=1, expert=part(MLP, d_ff=8))))
    assert model.metrics() == {}
    said = listened(model)
    for start in (0, 40, 90):
        model(IDS[start : start + 48].view(3, 16), aux=(aux := Aux()))
    chosen, p = said[-1][1], aux.terms[0]['share']
    counts = [int((chosen == n).sum()) for n in range(4)]
    late = int((~served(chosen, 4, math.ceil(0.8 * 48 * 2 / 4))).sum())
    entropy = sum(-float(q) * math.log(float(q)) for q in p.flatten()) / len(p) / math.log(4)
    mean = sum(counts) / 4
    assert late and sum(counts) == 48 * 2
    want = dict(
        moe0_load_max=max(counts) / mean,
        moe0_load_min=min(counts) / mean,
        moe0_entropy=entropy,
        moe0_drops=late / sum(counts),
    )
    assert model.metrics() == pytest.approx(want, rel=1e-5) and [*want] == [
        'moe0_load_max',
        'moe0_load_min',
        'moe0_entropy',
        'moe0_drops',
    ]
    assert model.metrics() == {}  # it starts anew
    mean_loss(model, IDS[:200])
    model.eval()(ROWS[:, :-1])
    assert model.metrics() == {}  # only training counts
    model.train()(ROWS[:, :-1], aux=Aux())
    chosen = said[-1][1]
    assert model.metrics()['moe0_load_max'] == pytest.approx(
        torch.bincount(chosen.flatten()).max().item() * 4 / chosen.numel()
    )


def test_a_block_that_runs_twice_is_counted_as_one_that_runs_once():
    cfg, told = small(capacity=0.8), []
    for prepare in (lambda m: m, apply_activation_checkpointing):
        model = prepare(MiniGPT(cfg))
        train_step(model, adamw(model), ROWS)
        told.append(model.metrics())
    assert told[0] == told[1] and len(told[0]) == 8 and told[0]['moe0_drops'] > 0


def test_a_run_writes_load_entropy_and_drops_beside_each_validation(tmp_path, monkeypatch):
    from llm_lab.runs import train_run

    monkeypatch.setenv('LLM_LAB_HOME', str(tmp_path))
    job = train_run(
        'smoke',
        'model.mlp={part: "MoE", n_experts: 4, capacity: 1}',
        'train.steps=20',
        'eval.every=10',
    )
    rows = json_lines(job.folder / 'metrics.jsonl')
    told = [{k[5:]: v for k, v in r.items() if k.startswith('moe0_')} for r in rows if 'val' in r]
    assert len(told) == 2 and all(
        [*t] == ['load_max', 'load_min', 'entropy', 'drops'] for t in told
    )
    for t in told:
        assert (
            0 <= t['load_min'] <= 1 <= t['load_max'] <= 4
            and 0 < t['entropy'] <= 1
            and 0 <= t['drops'] < 1
        )
    assert any(t['drops'] for t in told)


# ---- what carries it


@pytest.mark.parametrize('choose', CHOICES)
def test_a_choice_keeps_its_digits_in_low_precision(choose):
    """Under autocast, and in a model whose weights are bfloat16, logits and weights are made in
    float32"""
    moe = mixture(
        E=8,
        C=16,
        dtype=torch.float32,
        router=part(Router, choose=CHOICES[choose], bias_rate=0.1),
        shared=1,
    )
    x, kinds = tokens(64, 16, dtype=torch.float32), []
    real = moe.router.choose
    moe.router.choose = lambda logits, *a: kinds.append(logits.dtype) or real(logits, *a)
    full, chosen = moe(x, a := Aux()), a.terms[0]['chosen']
    with torch.autocast('cpu', torch.bfloat16):
        low = moe(x, b := Aux())
    assert (
        torch.equal(b.terms[0]['chosen'], chosen)
        and b.terms[0]['loss'].item() == a.terms[0]['loss'].item()
    )
    assert (low - full).abs().max() < 0.03 * full.abs().max() and not torch.equal(low, full)
    low.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in moe.parameters())
    assert (
        moe.to(torch.bfloat16)(x.bfloat16(), c := Aux()).dtype == torch.bfloat16
        and c.terms[0]['loss'].dtype == torch.float32
    )
    assert kinds == [torch.float32] * 3


def test_low_precision_learns():
    for precision in ('float32', 'bf16', 'fp16'):
        model = MiniGPT(small(llama, bias_rate=0.001, capacity=1.25))
        step = StepRunner(precision=precision)
        opt = adamw(model, lr=0.01)
        losses = [step(model, opt, ROWS)[0].item() for _ in range(15)]
        assert losses[-1] < 0.8 * losses[0], precision


def test_operations_are_those_of_a_dense_mlp_k_times_as_wide_and_the_router():
    for k, F_, E in ((1, 16, 4), (2, 24, 8), (3, 8, 3)):
        mixed = small(n_experts=E, top_k=k, expert=part(SwiGLU, d_ff=F_))
        plain = replace(mixed, mlp=part(SwiGLU, d_ff=k * F_))

        def count(cfg, way):
            model = MiniGPT(cfg)
            return flops(lambda: way(model))

        router = 2 * 2 * ROWS[:, 1:].numel() * 16 * E  # two layers, two operations for each of C·E
        assert (
            count(mixed, lambda m: m(ROWS[:, 1:]))
            == count(plain, lambda m: m(ROWS[:, 1:])) + router
        )
        back = lambda m: next_token_loss(m, ROWS).backward()
        assert count(mixed, back) == count(plain, back) + 3 * router


def test_nothing_is_calculated_to_plan_a_step():
    for kw in ({}, dict(capacity=1.25, bias_rate=0.01, shared=1, expert=part(MLP))):
        cfg = small(n_experts=16, **kw)
        with FakeTensorMode():
            model = MiniGPT(cfg)
            assert model(torch.zeros(3, 9, dtype=torch.int64)).shape == (3, 9, TOK.vocab_size)
            train_step(model, adamw(model), torch.zeros(3, 10, dtype=torch.int64))
        memory = step_memory(cfg, 4)
        weights = 4 * MiniGPT(cfg).n_params
        assert 4 * weights < memory and step_memory(
            cfg, 64, prepare=apply_activation_checkpointing
        ) < step_memory(cfg, 64)


def test_what_the_compiler_sees_is_the_same_step():
    """Nothing is generated: the graph, forth and back, is run as it was traced, and no piece of it
    is left to Python"""
    for kw in (
        {},
        dict(
            capacity=0.7,
            bias_rate=0.01,
            choose=part(sigmoid_top_k),
            expert=part(MLP, d_ff=8),
            shared=1,
        ),
    ):
        cfg, told = small(n_layers=1, **kw), []
        for loss in (
            next_token_loss,
            torch.compile(next_token_loss, backend='aot_eager', fullgraph=True),
        ):
            model = shaken(MiniGPT(cfg))
            opt = adamw(model)
            losses = [train_step(model, opt, ROWS, loss_fn=loss)[0].item() for _ in range(3)]
            told.append(
                (losses, {k: v.clone() for k, v in model.state_dict().items()}, model.metrics())
            )
        assert told[0][0] == pytest.approx(told[1][0], abs=1e-5) and told[0][2] == pytest.approx(
            told[1][2], abs=1e-5
        )
        agree(told[1][1], told[0][1], 1e-4)


def compiled_gradients(moe):
    "All gradients of a mixture with everything that it says, from Python and from the compiler"

    def f(x):
        return moe(x, aux := Aux()).square().mean() + aux.loss()

    torch._dynamo.reset()
    return [grads(g, moe, tokens(128)) for g in (torch.compile(f), f)]


needs_compiler = pytest.mark.skipif(
    not (shutil.which('g++') or shutil.which('clang++')),
    reason='torch.compile needs a C++ compiler',
)


@needs_compiler
def test_the_compiler_loses_no_part_of_a_gradient():
    """PyTorch 2.13 reads what a scatter should have written before it is: the router then learned
    from the balance alone"""
    agree(*compiled_gradients(mixture(expert=part(SwiGLU, d_ff=8))), 1e-12)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize('kw', [{}, dict(importance=True)], ids=['shares', 'importance'])
@pytest.mark.parametrize('choose', CHOICES)
def test_the_compiler_loses_nothing_whatever_the_choice(choose, kw):
    "Slow: a compiler makes ten seconds of C++ for each"
    router = part(Router, choose=CHOICES[choose], bias_rate=0.1, **kw)
    agree(
        *compiled_gradients(
            mixture(expert=part(MLP, d_ff=8), router=router, shared=1, capacity=0.8 if kw else None)
        ),
        1e-12,
    )


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    'prepare', [lambda m: m, apply_activation_checkpointing], ids=['plain', 'checkpoints']
)
@pytest.mark.parametrize('precision', ['float32', 'bf16'])
def test_a_compiled_step_is_the_same_step(precision, prepare, capsys, monkeypatch):
    "Slow: a compiler makes half a minute of C++ for each"
    for module in ('onednn', 'moe'):
        monkeypatch.setattr(f'llm_lab.{module}.onednn_is_faster', onednn_is_exact)
    told = []
    for compile in (False, True):
        model = prepare(shaken(MiniGPT(small(bias_rate=0.01, capacity=1.25))))
        opt = adamw(model, lr=1e-3)
        step = StepRunner(compile=compile, precision=precision)
        with onednn_linears(model):
            losses = [step(model, opt, ROWS)[0].item() for _ in range(3)]
        told.append(
            (losses, torch.cat([t.flatten() for t in model.state_dict().values()]), model.metrics())
        )
    assert 'not compiled' not in capsys.readouterr().out
    loose = 1 if precision == 'float32' else 100
    assert told[0][0] == pytest.approx(told[1][0], abs=1e-5 * loose) and told[0][
        2
    ] == pytest.approx(told[1][2], abs=1e-3 * loose)
    assert (told[0][1] - told[1][1]).norm() < 1e-4 * loose * told[0][1].norm()


def test_a_copy_is_a_model_of_its_own():
    model = shaken(MiniGPT(small(bias_rate=0.01, capacity=1.0)))
    next_token_loss(model, ROWS).backward()  # also in the middle of a step
    copy = deepcopy(model)
    assert torch.equal(copy(ROWS[:, :-1]), model(ROWS[:, :-1]))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train_step(copy, adamw(copy), ROWS)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not torch.equal(copy.blocks[0].mlp.router.bias, model.blocks[0].mlp.router.bias)


KINDS = dict(
    all=small(
        llama, bias_rate=0.01, choose=part(sigmoid_top_k, scale=2.5), shared=1, capacity=1.25
    ),
    GPT2=small(expert=part(MLP), n_layers=1),
    every_other=small(llama, n_layers=4),
)
KINDS['every_other'] = replace(
    KINDS['every_other'], mlp=part(alternate, of=(part(SwiGLU), KINDS['every_other'].mlp))
)


@pytest.mark.parametrize('kind', KINDS)
def test_a_model_comes_back_from_its_folder_and_writes_the_same_in_its_fast_form(kind, tmp_path):
    cfg = KINDS[kind]
    assert config_from(json.loads(json.dumps(to_data(cfg)))) == cfg
    model = MiniGPT(cfg)
    opt = adamw(model, lr=0.01)
    for _ in range(10):
        train_step(model, opt, ROWS)
    assert len(mixtures(model)) == (cfg.n_layers if kind != 'every_other' else 2)
    assert {m.layer for m in mixtures(model)} == (
        {1, 3} if kind == 'every_other' else {*range(cfg.n_layers)}
    )
    save(tmp_path / 'model', model.eval(), TOK)
    again = load(tmp_path / 'model').model
    assert again.cfg == cfg and torch.equal(again(ROWS[:, :-1]), model(ROWS[:, :-1]))

    def text(m):
        return torch.stack([*generate(m, ROWS[:2, :4], 12, temperature=0)], 1)

    assert torch.equal(text(for_inference(model)), text(with_kv_cache(model))) and torch.equal(
        text(with_kv_cache(model)), text(model)
    )
    logits = for_inference(model)(ROWS[:1, :9])
    torch.testing.assert_close(logits, model(ROWS[:1, :9]), rtol=1e-4, atol=1e-4)


# ---- several processes

TEAM = """
import json
import sys
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from llm_lab.gpt import MiniGPT
from test_moe import ROWS, shaken, small
from llm_lab.efficient import apply_activation_checkpointing
from llm_lab.train import next_token_loss

torch.set_num_threads(1)
rank, store, job = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
mine = ROWS[:4] if job['same'] else ROWS.chunk(2)[rank]


def whole(t):
    return (t.full_tensor() if hasattr(t, 'full_tensor') else t).detach().clone()


def step(model, rows):
    "Loss, gradients, weights and biases after one step of plain SGD"
    loss = next_token_loss(model, rows)
    loss.backward()
    core = getattr(model, 'module', model)
    g = {n: whole(p.grad) for n, p in core.named_parameters()}
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for m in model.modules():
        getattr(m, 'settle', int)()
    return loss.item(), g, {n: whole(t) for n, t in core.state_dict().items()}


def make():
    return shaken(MiniGPT(small(bias_rate=0.01, balance=job['balance'], z=0)))


def far(a, b):
    "The largest relative distance of a tensor"
    return max(
        ((a[n].float() - b[n]).norm() / b[n].norm().clamp_min(1e-3)).item()
        for n in b
        if 'bias' not in n or 'router' in n
    )


team = apply_activation_checkpointing(make(), job['checkpoints'])
if job['kind'] == 'DDP':
    team = DistributedDataParallel(team)
else:
    shard = fully_shard
    if job['kind'] == 'bf16':
        shard = partial(shard, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    for b in team.blocks:
        shard(b)
    shard(team)
loss, grads, weights = step(team, mine)
mean = torch.tensor(loss)
dist.all_reduce(mean)
dist.destroy_process_group()  # who is alone has no team to settle with
loss_alone, grads_alone, weights_alone = step(make(), ROWS[:4] if job['same'] else ROWS)
biases = [n for n in weights_alone if n.endswith('router.bias')]
found = dict(
    loss=abs(mean.item() / 2 - loss_alone),
    grad=far(grads, grads_alone),
    weights=far(weights, weights_alone),
    bias=all(torch.equal(weights[n], weights_alone[n]) for n in biases),
    moved=any(bool(weights_alone[n].any()) for n in biases),
    router=grads['blocks.0.mlp.router.weight'].float().norm().item(),
)
print(json.dumps(found))
"""


def team(folder, checkpoints=False, **job):
    "What two processes find; one that waits for ever fails"
    path = os.pathsep.join(map(str, (ROOT, ROOT / 'tests', os.environ.get('PYTHONPATH', ''))))
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path}
    if sys.platform == 'linux':
        env['GLOO_SOCKET_IFNAME'] = 'lo'  # the name of a machine may be one that nobody can look up
    store = folder / f'store{len([*folder.iterdir()])}'
    argv = [sys.executable, '-c', TEAM]
    job = json.dumps(dict(job, checkpoints=checkpoints))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    both = [
        subprocess.Popen([*argv, str(r), str(store), job], env=env, text=True, **pipes)
        for r in range(2)
    ]
    try:
        said = [p.communicate(timeout=HANG) for p in both]
    finally:
        [p.kill() for p in both]
    assert [p.returncode for p in both] == [0, 0], [err[-2000:] for _, err in said]
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.distributed.is_available(), reason='this PyTorch has no processes that talk'
)
@pytest.mark.parametrize('kind', ['DDP', 'FSDP'])
def test_two_processes_make_the_step_of_one(kind, tmp_path):
    """Slow: two processes start PyTorch twice.

    The loss of balance is of the rows of one process, so it is compared where both have the same"""
    for same, balance in ((False, 0.0), (True, 0.5)):
        for r in team(tmp_path, checkpoints=same, kind=kind, same=same, balance=balance):
            assert (
                r['loss'] < 1e-5
                and r['grad'] < 1e-4
                and r['weights'] < 1e-5
                and r['bias']
                and r['moved']
            ), (same, balance, r)
    lone = team(tmp_path, kind=kind, same=True, balance=0.0)[0]
    assert abs(lone['router'] - r['router']) > 0.01 * r['router'], (
        'what the router says to aux is lost'
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not torch.distributed.is_available(), reason='this PyTorch has no processes that talk'
)
def test_low_precision_of_two_processes_keeps_what_is_said(tmp_path):
    "Slow: two processes start PyTorch. Weights and activations are bfloat16 there"
    for balance in (0.0, 0.5):
        r = team(tmp_path, kind='bf16', same=True, balance=balance)[0]
        assert r['loss'] < 0.05 and r['grad'] < 0.2 and r['weights'] < 0.05, (balance, r)
        if not balance:
            lone = r['router']
    assert abs(lone - r['router']) > 0.01 * r['router'], 'what the router says to aux is lost'


# ---- what is refused


def test_wrong_settings_are_refused_in_one_line():
    mixed = lambda **kw: lambda: small(**kw)
    for kw, words in (
        (dict(n_experts=0), ['n_experts=0', 'whole number of at least 1']),
        (dict(top_k=0), ['top_k=0']),
        (dict(n_experts=2.0), ['n_experts=2.0']),
        (dict(top_k=True), ['top_k=True']),
        (dict(top_k=5), ['top_k=5', '4 exp']),
        (dict(shared=-1), ['shared=-1', 'at least 0']),
        (dict(capacity=0), ['capacity=0', '1.25']),
        (dict(capacity=-1.0), ['capacity=-1.0']),
        (dict(capacity=math.nan), ['capacity=nan']),
        (dict(capacity=math.inf), ['capacity=inf']),
        (dict(capacity='1'), ["capacity='1'"]),
        (dict(capacity=True), ['capacity=True']),
        (dict(expert=SwiGLU), ['expert=', 'part(SwiGLU)']),
        (dict(expert=None), ['expert=None']),
        (dict(choose=top_k_softmax), ['choose=', 'part(softmax_top_k)']),
        (dict(balance=-1), ['balance=-1', '0.001']),
        (dict(z=math.nan), ['z=nan']),
        (dict(bias_rate='a'), ["bias_rate='a'"]),
        (dict(balance=math.inf), ['balance=inf']),
        (dict(expert=part(SwiGLU, d_ff=0)), ['d_ff=0']),
    ):
        fails(mixed(**kw), *words)
    fails(lambda: part(MoE, n_expert=3), 'n_experts')
    fails(lambda: part(Router, ballance=3), 'balance')
    fails(lambda: replace(small(), mlp=part(MoE, router=Router)), 'router=', 'part(Router)')
    with pytest.raises(LabError, match="reads 'aus'; it reads .'aux'"):
        MiniGPT(small())(ROWS, aus=Aux())


class Normed(nn.Module):
    "An MLP with a norm inside"

    def __init__(self, cfg, layer=0):
        super().__init__()
        self.up = nn.Linear(cfg.d_model, 8)
        self.norm = RMSNorm(8)
        self.out = nn.Linear(8, cfg.d_model)


class Scaled(SwiGLU):
    "An MLP with a number of its own"

    def __init__(self, cfg, layer=0):
        super().__init__(cfg, layer)
        self.scale = nn.Parameter(torch.ones(()))


def test_an_expert_is_made_of_linear_maps_alone():
    for kind, name in ((Normed, 'norm.weight'), (Scaled, 'scale')):
        fails(lambda: MiniGPT(small(expert=part(kind))), kind.__name__, name, 'MLP or SwiGLU')
    fails(lambda: MiniGPT(small(expert=part(MoE))), 'MoE', 'router.weight')
    fails(lambda: to_data(small(expert=part(Normed))), 'Normed', 'register')
    register(Normed)
    assert to_data(small(expert=part(Normed)))['mlp']['expert'] == {'part': 'Normed'}


def test_a_mixture_that_cannot_be_is_refused():
    fails(lambda: GPTConfig(mlp=part(MoE, n_experts=4, top_k=5)), 'top_k=5: there are 4 experts')
    fails(lambda: GPTConfig(mlp=part(MoE, capacity=0)), 'capacity=0: give a factor')
    fails(lambda: GPTConfig(mlp=part(MoE, expert=part(SwiGLU, d_ff=0))), 'd_ff=0')
    fails(lambda: MiniGPT(GPTConfig(mlp=part(MoE, expert=part(MoE)))), 'give MLP or SwiGLU')
    fails(lambda: part(Router, blance=0.1), "did you mean 'balance'")


def test_each_row_goes_through_its_own_experts_map():
    linear = nn.Linear(5, 3)
    maps = ExpertLinear(linear, n_experts=2, top_k=1)
    with torch.no_grad():
        maps.weight[1].zero_()
        maps.bias[3:] = 7.0
    maps.rows = torch.tensor([1, 2])
    x = torch.randn(4, 5, generator=rng(4, 'maps'))
    want = torch.stack([linear(x[0]), *torch.full((2, 3), 7.0)])
    torch.testing.assert_close(maps(x)[:3], want, rtol=0, atol=1e-6)


def test_weights_that_are_not_divided_by_their_sum():
    logits = torch.randn(100, 8, generator=rng(1, 'logits'))
    got = softmax_top_k(logits, 2, renormalize=False)[0]
    torch.testing.assert_close(got, logits.softmax(-1).topk(2).values, rtol=0, atol=1e-6)


def test_what_a_router_adds_stands_under_its_layer():
    aux = Aux()
    router = Router(GPTConfig(d_model=32), layer=5, n_experts=4, top_k=2)
    load = router(torch.randn(64, 32, generator=rng(4, 'x')), aux)[2]
    assert load.sum() == 128
    assert list(aux.terms) == [5]


def test_metrics_are_asked_once_and_then_begin_anew():
    moe = MoE(GPTConfig(d_model=16), n_experts=4, top_k=2, capacity=0.5)
    moe(torch.randn(3, 20, 16, generator=rng(5, 'x')))
    assert moe.metrics()['moe0_drops'] >= 0.5
    moe.eval()(torch.randn(3, 20, 16))
    assert moe.metrics() == {}


def test_what_a_step_sums_up_is_not_what_metrics_tell():
    "The sum over processes is made in place: the load of this process must be another tensor"
    router = Router(small(), 0, n_experts=4, top_k=1, bias_rate=0.1)
    router.note(torch.tensor([3.0, 1, 0, 0]), torch.full((4, 4), 0.25))
    router.since += 9  # as all_reduce does
    assert router.noted['load'].tolist() == [3, 1, 0, 0]
