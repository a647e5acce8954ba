"What several files of tests share."
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'tools'))
pytest_plugins = ['plan']       # tools/plan.py: the order of the tests, and how far they are


@pytest.fixture(scope='module')
def one_thread():
    "PyTorch on one thread: tiny models are faster so, and their sums always go in one order. `pytestmark = usefixtures('one_thread')`"
    import torch
    old = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(old)
