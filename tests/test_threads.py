"How OpenMP's threads wait, and how many there are."

import os
import subprocess
import sys
import time

import pytest
import torch

from llm_lab.hardware import fastest_threads

CHOICES = ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'OMP_NUM_THREADS')


def seen_by_a_child(**chosen):
    "What a process that imports the package leaves in its environment"
    env = {k: v for k, v in os.environ.items() if k not in CHOICES} | chosen
    code = f'import llm_lab, os; print({{k: os.environ.get(k) for k in {CHOICES[:2]}}})'
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return eval(done.stdout)


def test_the_package_asks_for_a_short_spin_unless_the_user_has_chosen():
    assert seen_by_a_child() == {'OMP_WAIT_POLICY': None, 'GOMP_SPINCOUNT': '2000'}
    assert seen_by_a_child(GOMP_SPINCOUNT='7')['GOMP_SPINCOUNT'] == '7'
    assert seen_by_a_child(OMP_WAIT_POLICY='active')['GOMP_SPINCOUNT'] is None


@pytest.fixture
def four(monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    old = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    assert torch.get_num_threads() == 4, 'the setting is left as it was'
    torch.set_num_threads(old)


@pytest.mark.usefixtures('four')
@pytest.mark.parametrize(
    'cost, best',
    [
        (lambda n: 0.02 * n, 1),  # each thread makes it slower
        (lambda n: 0.08 / n, 4),  # each thread takes its share
        (lambda n: 0.02, 1),  # they bring nothing, so the others may have the cores
        (lambda n: 0.02 * abs(n - 2) + 0.02, 2),
    ],
)
def test_the_fastest_number_of_threads_is_found(monkeypatch, cost, best):
    clock = [0.0]
    monkeypatch.setattr(time, 'perf_counter', lambda: clock[0])

    def work():
        clock[0] += cost(torch.get_num_threads())

    assert fastest_threads(work) == best


@pytest.mark.usefixtures('four')
def test_who_sets_the_threads_is_obeyed_and_an_error_leaves_them(monkeypatch):
    def broken():
        raise KeyError('work')

    with pytest.raises(KeyError):
        fastest_threads(broken)
    monkeypatch.setenv('OMP_NUM_THREADS', '3')
    assert fastest_threads(broken) == 4  # nothing is tried
