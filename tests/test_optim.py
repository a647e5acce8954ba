"""What `optim` and `efficient` promise and no notebook shows: definitions in float64, watchers,
names in a config, compilers, fresh processes, low precision in whole runs; the exercises."""

import copy
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from answers import optim as answers
from cases import ALL, HANG
from fastcore.test import test_close as close
from fastcore.test import test_eq as equal
from helpers import code_cell, exercise_tests
from torch import nn
from torch.nn import functional as F

from llm_lab import onednn
from llm_lab import optim as chapter
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.onednn import _QuickLinear, onednn_linears
from llm_lab.core import LabError, check, rng
from llm_lab.onednn import onednn_is_exact
from llm_lab.optim import (
    OPTIMIZERS,
    SCHEDULES,
    CombinedOptimizer,
    DivergenceMonitor,
    EarlyStop,
    Muon,
    adamw,
    diverged,
    find_spikes,
    make_optimizer,
    make_schedule,
    muon,
    newton_schulz,
    step_decay,
    steps_for,
    warmup_stable_decay,
)
from llm_lab.efficient import (
    StepRunner,
    apply_activation_checkpointing,
    try_compile,
    largest_batch,
    step_memory,
)
from llm_lab.train import fit, next_token_loss, random_crops, train_step, update, warmup_cosine

SMALL = GPTConfig(vocab_size=20, max_len=16, d_model=32, n_layers=2, n_heads=2)
IDS = torch.randint(20, (4000,), generator=rng(0, 'ids'))
BATCH = random_crops(IDS, 6, 16)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(step=train_step, optimizer=adamw, steps=6, cfg=SMALL, prepare=lambda m: m, **kw):
    model = prepare(MiniGPT(cfg))
    run = fit(model, BATCH, steps, optimizer=optimizer(model, lr=2e-3), step_fn=step, **kw)
    return flat(model), run


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_every_optimizer_learns_under_every_way_of_stepping(name):
    "In float32 the ways agree; in short numbers they come near"
    torch.manual_seed(0)
    text = torch.arange(4000) % 7  # can be learned at once

    def loss_after(step, prepare=lambda m: m):
        model = prepare(MiniGPT(SMALL))
        opt = OPTIMIZERS[name](model, lr=dict(adamw=0.01, muon=0.01, sgd=0.3)[name])
        fit(model, random_crops(text, 6, 16), 60, optimizer=opt, step_fn=step)
        return next_token_loss(model.eval(), text[:17][None]).item()

    ways = [
        loss_after(train_step),
        loss_after(StepRunner(accumulate=3)),
        loss_after(train_step, apply_activation_checkpointing),
        loss_after(StepRunner(precision='bf16')),
        loss_after(StepRunner(precision='fp16', accumulate=2)),
    ]
    assert all(w < 0.3 for w in ways), ways


@pytest.mark.parametrize('opt', OPTIMIZERS.values())
def test_parts_and_checkpoints_give_the_weights_of_the_whole(opt):
    whole, run = trained(optimizer=opt)
    way = (whole - flat(MiniGPT(SMALL))).norm()
    for step, prepare in (
        (StepRunner(accumulate=2), lambda m: m),
        (StepRunner(accumulate=4), lambda m: m),
        (train_step, apply_activation_checkpointing),
    ):
        parts, again = trained(step, opt, prepare=prepare)
        # AdamW enlarges the smallest gradients, Muon counts in bf16
        assert (parts - whole).norm() < (0.02 if opt is muon else 2e-3) * way
        assert again.losses == pytest.approx(run.losses, abs=1e-3 if opt is muon else 1e-5)


def test_checkpointing_is_bitwise_also_with_dropout():
    cfg = GPTConfig(vocab_size=20, max_len=16, d_model=32, n_layers=2, n_heads=2, dropout=0.3)
    assert torch.equal(
        trained(cfg=cfg)[0], trained(cfg=cfg, prepare=apply_activation_checkpointing)[0]
    )
    assert not torch.equal(trained(cfg=cfg, seed=1)[0], trained(cfg=cfg)[0])


class Nothing(nn.Module):
    def forward(self, x, **context):
        return torch.zeros_like(x)


def without_norms_and_mlp(model):
    """They are PyTorch's own, and more than half of what there is to compile: 7 kernels are left of
    16"""
    for block in model.blocks:
        block.norm1, block.norm2, block.mlp = nn.Identity(), nn.Identity(), Nothing()
    model.norm = nn.Identity()
    return model


def test_a_compiled_step_is_the_same_step(capsys, monkeypatch):
    "Also with the quick linear layers, which are operations of our own, and with checkpoints"
    monkeypatch.setattr(onednn, 'onednn_is_faster', onednn_is_exact)
    # a second block takes as long again to compile
    cfg = SMALL if ALL else replace(SMALL, n_layers=1)
    parts = (lambda model: model) if ALL else without_norms_and_mlp

    def one(step, prepare=lambda m: m):
        model = prepare(parts(MiniGPT(cfg)))
        opt = adamw(model, lr=1e-3)
        with onednn_linears(model):
            losses = [step(model, opt, BATCH(n))[0].item() for n in range(3)]
        return flat(model), losses

    plain = one(train_step)
    way = (plain[0] - flat(parts(MiniGPT(cfg)))).norm()
    for prepare in (
        (apply_activation_checkpointing, lambda m: m) if ALL else (apply_activation_checkpointing,)
    ):
        fast = one(StepRunner(compile=True), prepare)
        assert 'not compiled' not in capsys.readouterr().out
        assert (fast[0] - plain[0]).norm() < 2e-3 * way and fast[1] == pytest.approx(
            plain[1], abs=1e-5
        )


def test_without_a_compiler_the_run_goes_on_and_says_so_once(tmp_path):
    "A fresh process whose C++ compiler does not exist"
    code = (
        "import torch\nfrom llm_lab.gpt import GPTConfig, MiniGPT\nfrom llm_lab.train import *\n"
        "from llm_lab.efficient import *\n"
        "m = MiniGPT(GPTConfig(vocab_size=20, max_len=16, d_model=32, n_layers=1, n_heads=2))\n"
        "run = fit(m, random_crops(torch.arange(400) % 20, 4, 16), 3, "
        "step_fn=StepRunner(compile=True))\nprint(run.step)"
    )
    env = dict(
        os.environ, CXX=str(tmp_path / 'none'), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / 'cache')
    )
    r = subprocess.run(
        [sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=HANG
    )
    assert r.returncode == 0, r.stderr[-2000:]
    said = [line for line in r.stdout.splitlines() if 'not compiled' in line]
    assert len(said) == 1 and r.stdout.splitlines()[-1] == '3', r.stdout


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='only glibc can be asked')
def test_keep_memory_ends_the_handing_out_of_pages():
    "With tensors that glibc would else always give back: more than 32 MB"
    code = (
        "import json, sys, torch\nfrom resource import getrusage, RUSAGE_SELF\nfrom "
        "llm_lab.hardware import keep_freed_memory\n"
        "if sys.argv[1] == 'keep': assert keep_freed_memory()\n"
        "def many(): return [torch.ones(10_000_000) for n in range(2)]\n"
        "for n in range(6): many()\n"
        "a = getrusage(RUSAGE_SELF).ru_minflt\nmany()\nprint(getrusage(RUSAGE_SELF).ru_minflt - a)"
    )

    def told(word):
        return int(
            subprocess.run(
                [sys.executable, '-c', code, word], capture_output=True, text=True, check=True
            ).stdout
        )

    pages = {w: told(w) for w in ('keep', 'lose')}
    assert pages['keep'] < 100 < 5000 < pages['lose'], pages


def test_muon_is_pytorchs_muon():
    "In a whole model: ours against `torch.optim.Muon` beside AdamW for the rest, clipped alike"

    def theirs(model):
        hidden = [p for p in model.blocks.parameters() if p.dim() >= 2]
        rest = adamw(model, 5e-3)
        for g in rest.param_groups:
            g['params'] = [p for p in g['params'] if not any(p is h for h in hidden)]
        rest.param_groups = [g for g in rest.param_groups if g['params']]
        return torch.optim.Muon(
            hidden, lr=5e-3, weight_decay=0.1, adjust_lr_fn='match_rms_adamw'
        ), rest

    a, b = MiniGPT(SMALL), MiniGPT(SMALL)
    opt, (m, rest) = muon(a, 5e-3), theirs(b)
    for n in range(3):
        next_token_loss(a, BATCH(n)).backward()
        next_token_loss(b, BATCH(n)).backward()
        update(a, opt, clip=1e9)
        for o in (m, rest):
            o.step()
            o.zero_grad()
        assert (flat(a) - flat(b)).abs().max() < 1e-5
        b.load_state_dict(a.state_dict())  # a rounding that falls the other way must not grow


def test_clipping_inside_muon_is_clipping_before_it():
    def after(clip_first):
        w = torch.ones(8, 4, requires_grad=True)
        opt = Muon([w], lr=0.1, dtype=torch.float32)
        for n in range(3):
            w.grad = torch.randn(8, 4, generator=rng(n, 'g')) * 10
            if clip_first:
                torch.nn.utils.clip_grad_norm_([w], 0.5)
                opt.step()
            else:
                opt.grad_scale = (w.grad.norm() / 0.5).clamp_min(1.0)
                opt.found_inf = torch.tensor(0.0)
                opt.step()
        return w.detach()

    assert (after(True) - after(False)).abs().max() < 1e-6


def test_a_state_is_saved_and_loaded_as_one(tmp_path):
    "Through plain data, as a checkpoint will do it; the loaded optimizer goes on bit by bit"
    model = MiniGPT(SMALL)
    opt = muon(model)
    for n in range(3):
        train_step(model, opt, BATCH(n))
    other = MiniGPT(SMALL)
    other.load_state_dict(model.state_dict())
    again = muon(other)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for n in range(3, 6):
        train_step(model, opt, BATCH(n))
        train_step(other, again, BATCH(n))
    assert torch.equal(flat(model), flat(other))
    assert isinstance(again, torch.optim.Optimizer) and len(again.state_dict()['state']) == len(
        [*model.parameters()]
    )
    assert isinstance(again, CombinedOptimizer)


def test_nothing_of_a_clipped_step_stays_in_the_optimizer():
    "Who calls `step` by hand afterwards gets a whole step"
    for make in OPTIMIZERS.values():
        model = MiniGPT(SMALL)
        opt = make(model)
        train_step(model, opt, BATCH(0), clip=1e-9)
        assert opt.grad_scale is None and opt.found_inf is None
        before = flat(model)
        next_token_loss(model, BATCH(1)).backward()
        opt.step()
        assert (flat(model) - before).norm() > 1e-3


def test_frozen_weights_stay():
    "A part that asks for no gradient is not moved, not even by decay"
    for make in OPTIMIZERS.values():
        model = MiniGPT(SMALL)
        for p in model.blocks[0].parameters():
            p.requires_grad_(False)
        before = [p.clone() for p in model.blocks[0].parameters()]
        opt = make(model)
        for n in range(2):
            train_step(model, opt, BATCH(n))
        assert all(torch.equal(p, b) for p, b in zip(model.blocks[0].parameters(), before))


def test_fit_multiplies_each_groups_own_rate():
    model = MiniGPT(SMALL)
    opt = muon(model, lr=0.02, rest_lr=0.004)
    fit(model, BATCH, 4, optimizer=opt, schedule=lambda step, steps: 0.5**step)
    assert [g['lr'] for g in opt.param_groups] == pytest.approx([0.0025, 0.0005, 0.0005])


@pytest.mark.parametrize('name', SCHEDULES)
@pytest.mark.parametrize('steps', [1, 2, 7, 10_000])
def test_schedules_stay_between_nothing_and_one(name, steps):
    factors = [SCHEDULES[name](s, steps) for s in range(steps)]
    assert all(0 <= f <= 1 for f in factors) and factors[0] > 0


@pytest.mark.parametrize('schedule', SCHEDULES.values())
def test_the_warm_up_that_is_given_is_obeyed(schedule):
    factors = [schedule(s, 1000, 400) for s in (0, 199, 399)]
    assert factors == pytest.approx([1 / 400, 0.5, 1.0])
    assert schedule(0, 1000, 0) == 1.0  # and 0 is no warm-up
    assert schedule(0, 1) > 0  # also a run of one step moves


def test_a_budget_of_tokens_is_a_number_of_steps():
    assert steps_for(1_536_000, random_crops(IDS, 12, 64)) == 2000
    with pytest.raises(LabError, match='does not allow one step of 512'):
        steps_for(100, random_crops(IDS, 8, 64))


def test_early_stopping_without_any_progress_has_no_weights_to_bring_back():
    "A loss that is NaN from the first look on is never the best"
    stop = EarlyStop(lambda run: math.nan)
    run = fit(MiniGPT(SMALL), BATCH, 60, callbacks={2: stop})
    assert (run.step, run.stopped) == (6, 'after 3 looks without progress')


def test_a_loss_that_is_no_number_is_traced(capsys):
    "To the weights, when they are broken"
    model = MiniGPT(SMALL)

    def break_it(run):
        with torch.no_grad():
            run.model.blocks[1].mlp.up.weight[3, 4] = math.inf

    with pytest.raises(
        LabError,
        match=(
            r'the loss of step 5 is nan \(row 0 of its batch, weights of '
            r'blocks\.1\.mlp\.up\.weight\): lower'
        ),
    ):
        fit(model, BATCH, 200, callbacks={5: break_it})


def test_fp16_scaling_of_a_run_can_be_seen_and_goes_on():
    step = StepRunner(precision='fp16')
    weights, run = trained(step, steps=4)
    assert (
        weights.isfinite().all()
        and all(map(math.isfinite, run.losses))
        and step.scaler.get_scale() > 0
    )


@pytest.mark.slow  # it measures the memory of five trainings
def test_memory_is_a_line_in_the_batch_and_the_search_finds_its_end():
    sizes = [step_memory(SMALL, n) for n in (16, 32, 48)]
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1] > 0
    slope = (sizes[1] - sizes[0]) / 16
    room = sizes[2] + 50 * slope
    assert largest_batch(SMALL, memory=int(room)) == 48 + 50
    with pytest.raises(LabError, match='one row takes'):
        largest_batch(SMALL, memory=10)
    # one average instead of two
    assert step_memory(SMALL, 32, optimizer=muon) < step_memory(SMALL, 32, optimizer=adamw)
    assert step_memory(SMALL, 32, step=StepRunner(accumulate=8)) < step_memory(SMALL, 32)


def test_the_finder_backs_off_where_the_device_says_no(monkeypatch):
    "An accelerator that refuses more than seven rows, played by the processor"
    from llm_lab import efficient

    asked = []

    def runs(cfg, n, device, **kw):
        asked.append(n)
        return n <= 7

    monkeypatch.setattr(efficient, '_runs', runs)
    cfg = replace(SMALL, n_layers=1)
    assert largest_batch(cfg, memory=step_memory(cfg, 10), device='cuda') == 7
    assert asked == [10, 9, 8, 7]


@pytest.mark.skipif(
    not onednn_is_exact(), reason="oneDNN's other way is not there, or is not float32's"
)
@pytest.mark.parametrize('shape', [(1, 5, 3), (2, 1, 16), (7, 33, 64)])
@pytest.mark.parametrize('bias', [True, False])
def test_the_quick_layer_is_a_linear_layer(shape, bias):
    x = torch.randn(shape, generator=rng(0, 'x'), dtype=torch.float64).float().requires_grad_()
    w = torch.randn(9, shape[-1], requires_grad=True)
    b = torch.randn(9, requires_grad=True) if bias else None
    inputs = [t for t in (x, w, b) if t is not None]

    def parts(f):
        y = f(x, w, b)
        return y, *torch.autograd.grad(y.sin().sum(), inputs)

    for a, c in zip(parts(_QuickLinear.apply), parts(F.linear)):
        assert a.shape == c.shape and (a - c).abs().max() < 1e-4
    assert torch.library.opcheck(
        torch.ops.llm_lab.mm.default, (torch.randn(3, 4), torch.randn(4, 5))
    )


def test_quick_layers_leave_shorter_numbers_alone():
    model = MiniGPT(SMALL)
    with onednn_linears(model), torch.autocast('cpu', torch.bfloat16):
        assert model(BATCH(0)[:, :-1]).dtype == torch.bfloat16
    half = MiniGPT(SMALL).double()
    with onednn_linears(half):
        assert half(BATCH(0)[:, :-1]).dtype == torch.float64


def test_a_mistake_of_the_caller_is_told_by_the_function_itself():
    def f(x):
        raise LabError('give me something else')

    with pytest.raises(LabError, match='something else'):
        try_compile(f)(torch.ones(2))


def test_early_stopping_reads_a_score_and_notes_its_numbers():
    class TwoNumbers:
        def as_note(self, name='val'):
            return {name: 2.0, f'{name}_bits_per_byte': 3.0}

    stop = EarlyStop(lambda run: TwoNumbers(), patience=1)
    run = fit(MiniGPT(SMALL), BATCH, 9, callbacks={2: stop})
    assert run.notes == [dict(step=n, val=2.0, val_bits_per_byte=3.0) for n in (2, 4)]


# ---- Newton–Schulz and Muon, by their definition


def orthogonalized_spec(g):
    "By a full decomposition in float64"
    u, s, v = torch.linalg.svd(g.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize('shape', [(5, 5), (64, 256), (256, 64)])
def test_newton_schulz_is_its_polynomial_on_singular_values(shape):
    g = torch.randn(shape, generator=rng(0, f'{shape}'))
    close(newton_schulz(g), orthogonalized_spec(g).float(), eps=1e-5)
    close(newton_schulz(g.double()), orthogonalized_spec(g), eps=1e-9)
    # stacks, and any length
    close(newton_schulz(torch.stack([g, 9 * g]))[1], newton_schulz(g), eps=1e-5)
    u = torch.linalg.qr(torch.randn(shape[0], shape[0], generator=rng(0, 'turn')))[0]
    close(newton_schulz(u @ g), u @ newton_schulz(g), eps=1e-5)  # rotations pass through
    assert newton_schulz(g, dtype=torch.bfloat16).dtype == g.dtype


def test_zeros_stay_zeros():
    equal(newton_schulz(torch.zeros(3, 4)), torch.zeros(3, 4))


def steps(make, n=4, shapes=((64, 64), (64, 256), (256, 64), (64, 64)), dtype=torch.float32):
    "Weights after `n` steps along the same random gradients"
    draw = rng(0, 'muon')
    weights = [torch.randn(s, generator=draw).to(dtype).requires_grad_() for s in shapes]
    opt = make(weights)
    for _ in range(n):
        for w in weights:
            w.grad = torch.randn(w.shape, generator=draw).to(dtype)
        opt.step()
    return [w.detach() for w in weights]


def test_muon_in_bf16_is_pytorchs_muon():
    theirs = partial(torch.optim.Muon, lr=0.02, adjust_lr_fn='match_rms_adamw')
    for a, b in zip(steps(partial(Muon, lr=0.02, dtype=torch.bfloat16)), steps(theirs)):
        close(a, b, eps=1e-5)


class MuonSpec(torch.optim.SGD):
    "Its definition, one matrix at a time, with a full decomposition; lr 0.02, weight decay 0.1"

    def step(self):
        for p in self.param_groups[0]['params']:
            v = 0.95 * self.state[p].get('v', 0) + 0.05 * p.grad
            self.state[p]['v'] = v
            move = orthogonalized_spec(0.05 * p.grad + 0.95 * v)
            p.data = p.data * (1 - 0.02 * 0.1) - 0.02 * 0.2 * max(p.shape) ** 0.5 * move


def test_muon_is_its_definition_in_float64():
    wide = steps(partial(MuonSpec, lr=0.02), dtype=torch.float64)
    for a, b in zip(steps(partial(Muon, lr=0.02, dtype=None)), wide):
        close(a, b.float(), eps=1e-5)


def weights_after(make, factors, saved_at=None):
    """The weights after steps whose losses are multiplied by these factors; saved and loaded once
    on the way"""
    model = MiniGPT(replace(SMALL, n_layers=1))
    opt = make(model)
    for n, x in enumerate(factors):
        if n == saved_at:
            kept, opt = opt.state_dict(), make(model)
            opt.load_state_dict(kept)
        train_step(model, opt, BATCH(n % 2), loss_fn=lambda *args: next_token_loss(*args) * x)
    return flat(model)


@pytest.mark.parametrize('make', OPTIMIZERS.values())
def test_every_optimizer_keeps_the_promises_of_update(make):
    "Each weight in one group, nothing moves along NaN or ∞, a saved state goes on"
    model = MiniGPT(replace(SMALL, tie=True))
    equal(sum(p.numel() for g in make(model).param_groups for p in g['params']), model.n_params)
    good = weights_after(make, [1, 1, 1])
    equal(weights_after(make, [1, 1, math.nan, math.inf, 1]), good)
    equal(weights_after(make, [1, 1, 1], saved_at=2), good)


def test_an_embedding_does_not_decay_and_matrices_do():
    model = MiniGPT(SMALL)
    decays, rest = adamw(model).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    equal({names[id(p)].split('.')[-2] for p in decays['params']}, {'qkv', 'out', 'up', 'lm_head'})
    tables = {names[id(p)] for p in rest['params'] if p.dim() == 2}
    equal(tables, {'tok.weight', 'pos.table.weight'})


# ---- schedules, and their names in a config


@pytest.mark.parametrize('f', SCHEDULES.values())
def test_a_schedule_climbs_once_and_never_again(f):
    curve = [f(s, 1000) for s in range(1000)]
    close(curve[:100], [(s + 1) / 100 for s in range(100)])
    assert all(a >= b for a, b in zip(curve[100:], curve[101:]))
    assert 0 <= curve[-1] <= max(curve) == 1


def test_schedules_at_some_steps():
    equal([warmup_stable_decay(s, 1000) for s in (0, 99, 799)], [0.01, 1.0, 1.0])
    equal([warmup_stable_decay(s, 1000) for s in (800, 900, 999)], [1.0, 0.5, 0.005])
    close([step_decay(s, 1000) for s in (499, 500, 750)], [1.0, 0.1, 0.01])


@pytest.mark.parametrize('f', [warmup_cosine, warmup_stable_decay, step_decay])
def test_a_schedule_comes_down_to_its_end_and_not_below(f):
    curve = [f(s, 1000, end=0.1) for s in range(1000)]
    close([max(curve), curve[0]], [1.0, 0.01])
    close(curve[-1], 0.1, eps=0.005)
    assert min(curve[100:]) >= 0.1


def test_a_schedule_that_a_config_names():
    short_run = make_schedule({'part': 'wsd', 'decay': 0.5}, warmup=2, end=0.1)
    equal(
        [round(short_run(s, 10), 3) for s in (0, 1, 5, 10)],
        [warmup_stable_decay(s, 10, 2, 0.1, 0.5) for s in (0, 1, 5, 10)],
    )


@pytest.mark.parametrize(
    'wrong, says',
    [('adamwx', "did you mean 'adamw'?"), (dict(part='sgd', momentun=1), "'momentum'?")],
)
def test_a_slip_in_the_name_of_an_optimizer_is_told(wrong, says):
    with pytest.raises(LabError) as e:
        make_optimizer(wrong, MiniGPT(SMALL), lr=0.02)
    assert says in str(e.value)


# ---- early stopping and divergence


def test_early_stopping_brings_the_best_weights_back():
    seen = []  # weights at each look
    planned = iter([3.0, 2.0, 1.99, 2.5, 2.4, 9.0])  # the losses that the looks are told

    def look(run):
        seen.append(run.model.tok.weight.detach().clone())
        return next(planned)

    stop = EarlyStop(look, patience=3, min_delta=0.1)
    run = fit(MiniGPT(SMALL), BATCH, 60, callbacks={2: stop})
    equal((run.step, [n['val'] for n in run.notes]), (10, [3.0, 2.0, 1.99, 2.5, 2.4]))
    equal(run.stopped, 'after 3 looks without progress')
    equal(run.model.tok.weight.detach(), seen[1])  # those of the look that saw 2.0


def test_spikes_stand_above_their_neighbours():
    noisy = 2 + 0.1 * torch.randn(400, generator=rng(0, 'noise'))
    noisy[[123, 300]] += 3
    equal(find_spikes(noisy), [123, 300])
    equal(find_spikes(torch.linspace(4, 1, 400)), [])  # a falling curve is no spike
    equal(find_spikes([1.0] * 50), [])


def test_a_run_has_diverged_when_half_is_lost():
    means = ([4.0], [4.0, 2.0, 2.9], [4.0, 2.0, 3.1], [2.0, 2.01])
    equal([diverged(m) for m in means], [False, False, True, False])


def test_a_run_whose_rate_explodes_is_ended():
    run = fit(
        MiniGPT(SMALL),
        random_crops(torch.arange(4000) % 7, 6, 16),
        200,
        lr=0.05,
        clip=1e9,
        callbacks={50: DivergenceMonitor()},
        schedule=lambda step, steps: 0.1 if step < 100 else 20.0,
    )
    assert run.stopped.startswith('because it diverged') and run.step < 200


# ---- the exercises

cell = partial(code_cell, '28_optim')


@pytest.fixture(scope='module')
def lesson():
    "The names of the chapter that its exercises use, and the cell of each exercise"
    names = dict(vars(chapter), check=check, rng=rng, test_close=close, test_eq=equal)
    for text in ('def sgd_step(', 'def momentum_step(', 'def rmsprop_step('):
        exec(cell(text).partition('\n\n\noptim =')[0].partition('\n\n\nsame_as')[0], names)
    source = cell('def naive_newton_schulz(')
    exec(source.partition('\n\n\nfor s in')[0], names)
    for name in answers.ANSWERS:
        exec(cell(f'def {name}('), names)
    return names


(
    test_a_right_answer_is_told_so,
    test_a_wrong_answer_meets_a_counter_example,
    test_an_exercise_that_nobody_has_done_says_so,
) = exercise_tests(
    answers.ANSWERS,
    dict(
        my_newton_schulz=('newton_schulz_spec', 'schulz_cases'),
        guess=('measured', None),
    ),
)


def test_what_the_third_exercise_breaks_turns_red(lesson):
    right = cell('def newton_schulz(')
    broken = right.replace(
        'x.flatten(-2).norm(dim=-1)[..., None, None]', 'x.abs().amax((-2, -1), keepdim=True)'
    )
    assert broken != right
    red = cell('for shape in ((5, 5), (64, 256)').partition('after =')[0]
    exec(red, lesson | vars(chapter))
    names = dict(lesson)
    exec(broken, names)
    with pytest.raises(AssertionError):
        exec(red, names)
    assert names['newton_schulz'](torch.randn(64, 256, generator=rng(0, 'g'))).isnan().any()
