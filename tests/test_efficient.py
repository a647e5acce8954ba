"""`efficient`: the odd cases: devices that are not here, compilers that fail, settings that are
refused. Whole runs are in `test_optim`."""

import sys
from copy import deepcopy

import pytest
import torch
from fastcore.test import test_close as close
from fastcore.test import test_eq as equal

from llm_lab.core import LabError, rng
from llm_lab.efficient import (
    StepRunner,
    _Alive,
    _runs,
    apply_activation_checkpointing,
    free_memory,
    largest_batch,
    step_memory,
    try_compile,
)
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.optim import short_precision
from llm_lab.train import adamw, next_token_loss, random_crops, train_step

SMALL = GPTConfig(vocab_size=40, d_model=64, n_layers=2, n_heads=4, max_len=64)
ROWS = random_crops(torch.randint(40, (4000,), generator=rng(0, 'ids')), 10, 64)


def test_bytes_are_counted_while_a_tensor_lives_and_a_view_takes_none():
    with _Alive() as alive:
        a = torch.zeros(1000)
        b = a * 2
        del a
        c = b + 1
        d = c.view(10, 100)
    equal((alive.now, alive.most), (8000, 8000))
    del b, c, d
    equal(alive.now, 0)


@pytest.mark.parametrize('rows', [1, 8])
def test_a_planned_step_takes_what_a_real_one_does(rows):
    with _Alive() as alive:
        model = MiniGPT(SMALL)
        opt = adamw(model)
        for _ in range(2):
            train_step(model, opt, torch.zeros(rows, SMALL.max_len + 1, dtype=torch.int64))
    equal(step_memory(SMALL, rows), alive.most)
    assert alive.most > 4 * 4 * model.n_params  # weights, gradients, two means, 4 bytes each


def test_checkpointing_can_be_taken_off():
    model = apply_activation_checkpointing(MiniGPT(SMALL))
    assert 'run_block' in vars(model)
    assert 'run_block' not in vars(apply_activation_checkpointing(model, on=False))


def gradient_of(step):
    "The gradient that a step hands to the update, with its loss and its norm"
    seen = []

    class Look(torch.optim.SGD):
        def step(self):
            parameters = [p for g in self.param_groups for p in g['params']]
            seen.append(torch.cat([p.grad.flatten() for p in parameters]))

    model = MiniGPT(SMALL)
    value, norm = step(model, Look(model.parameters(), lr=0.1), ROWS(0), 1e9, next_token_loss)
    return seen[0], value.item(), norm.item()


@pytest.mark.parametrize('parts', [2, 3, 10])  # ten rows: also parts that are not alike
def test_the_gradient_of_parts_is_that_of_the_whole(parts):
    whole, loss, norm = gradient_of(train_step)
    summed, total, far = gradient_of(StepRunner(accumulate=parts))
    close(summed, whole, eps=1e-6)
    close((total, far), (loss, norm), eps=1e-5)


@pytest.mark.parametrize('precision, eps', [('bf16', 0.05), ('fp16', 0.01)])
def test_the_gradient_of_short_numbers_is_near(precision, eps):
    whole, loss, _ = gradient_of(train_step)
    near, value, _ = gradient_of(StepRunner(precision=precision))
    assert 0 < (near - whole).norm() < eps * whole.norm()
    assert abs(value - loss) < 0.01


def test_fp16_halves_its_scale_until_a_step_fits():
    def big(model, rows):
        return next_token_loss(model, rows) * 1e4

    step = StepRunner(precision='fp16')
    model = MiniGPT(SMALL)
    opt = adamw(model)
    before = deepcopy(model.state_dict())
    scales = [step.scaler.get_scale()]
    for _ in range(8):
        step(model, opt, ROWS(0), loss_fn=big)
        scales.append(step.scaler.get_scale())
    moved = any((before[k] != v).any() for k, v in model.state_dict().items())
    equal(scales[1], scales[0] / 2)
    equal(moved, scales[-1] == scales[-2])
    assert all(v.isfinite().all() for v in model.state_dict().values())


@pytest.mark.skipif(sys.platform != 'linux', reason='read from /proc/meminfo')
def test_free_memory_is_a_number_of_bytes():
    assert 1e7 < free_memory() < 1e14


def test_a_batch_that_a_device_refuses_does_not_run():
    def greedy(model, opt, rows, **kw):
        if len(rows) > 2:
            raise torch.OutOfMemoryError('no')

    assert [_runs(SMALL, n, 'cpu', step=greedy) for n in (2, 3)] == [True, False]


@pytest.mark.parametrize('few', [0, 1000])
def test_a_memory_without_room_for_one_row_is_refused(few):
    with pytest.raises(LabError, match='one row takes'):
        largest_batch(SMALL, memory=few)


def test_a_batch_is_never_larger_than_allowed():
    assert largest_batch(SMALL, max_size=5) == 5


@pytest.fixture
def no_compiler(monkeypatch):
    def compile(f):
        def fast(*args):
            raise RuntimeError('no compiler found\nand forty lines more')

        return fast

    monkeypatch.setattr('torch.compile', compile)


def test_without_a_compiler_the_function_runs_as_it_is(no_compiler, capsys):
    double = try_compile(lambda x: 2 * x)
    assert [double(3), double(4)] == [6, 8]
    # once, one line
    said = 'not compiled, as fast as before: RuntimeError: no compiler found\n'
    assert capsys.readouterr().out == said


def test_a_mistake_in_the_function_is_raised_as_its_own(no_compiler):
    with pytest.raises(ZeroDivisionError):
        try_compile(lambda x: x / 0)(1)


@pytest.mark.parametrize('wrong', [dict(accumulate=0), dict(precision='fp8')])
def test_a_step_that_cannot_be_is_refused_by_name(wrong):
    ((name, _),) = wrong.items()
    with pytest.raises(LabError, match=f'{name}='):
        StepRunner(**wrong)


@pytest.mark.parametrize(
    'bf16, capability, best',
    [(True, (9, 0), 'bf16'), (False, (7, 5), 'fp16'), (False, (6, 1), 'float32')],
)
def test_the_precision_of_gpus_that_are_not_here(monkeypatch, bf16, capability, best):
    monkeypatch.setattr('torch.cuda.is_bf16_supported', lambda **kw: bf16)
    monkeypatch.setattr('torch.cuda.get_device_capability', lambda device: capability)
    assert short_precision.__wrapped__('cuda') == best
