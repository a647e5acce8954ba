"What several files of tests share."

import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'tools'))
pytest.register_assert_rewrite('helpers')  # its assertions tell what they saw, too
pytest_plugins = ['plan']  # tools/plan.py: the order of the tests, and how far they are


def pytest_configure(config):
    if config.option.markexpr == '':
        os.environ.setdefault('LLM_LAB_EXAMPLES', '500')  # nightly: see cases.py
    # Whoever is started with `&` in a script, or by nohup, ignores these signals, and so would all
    # that it starts: a
    # run that a test sends Ctrl-C would never end. A handler of Python's is not inherited; we still
    # ignore them ourselves.
    for name in ('SIGINT', 'SIGHUP'):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *said: None)


@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty home, in which we stand; no text of this machine is known to it"
    monkeypatch.setenv('LLM_LAB_HOME', str(tmp_path))
    monkeypatch.delenv('LLM_LAB_DATA', raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope='module')
def one_thread():
    """PyTorch on one thread: tiny models are faster so, and their sums always go in one order.

    `pytestmark = usefixtures('one_thread')`"""
    import torch

    old = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(old)
