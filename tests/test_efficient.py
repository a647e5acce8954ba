"""`efficient`: the odd cases: devices that are not here, compilers that fail, settings that are
refused. Whole runs are in `test_optim`."""

import sys

import pytest
import torch

from llm_lab.core import LabError
from llm_lab.efficient import StepRunner, _runs, free_memory, largest_batch, try_compile
from llm_lab.gpt import GPTConfig
from llm_lab.optim import short_precision

SMALL = GPTConfig(vocab_size=40, d_model=64, n_layers=2, n_heads=4, max_len=64)


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
