"The small model that chapters and tests share is trained by one of them, however many ask at once"

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_lab import package
from llm_lab.train import Recipe
from llm_lab.package import load_or_train

ROOT = Path(__file__).resolve().parent.parent
ASK = """
import sys
import time
from pathlib import Path

from llm_lab import package
from llm_lab.train import Recipe
from llm_lab.package import load_or_train

sizes = ('d_model', 16), ('n_layers', 1), ('n_heads', 1)
package.RECIPES['tiny'] = Recipe(
    f'{sys.argv[1]}/text.txt', steps=3, batch_size=2, length=32, model=sizes
)
fit, here = package.fit, Path(sys.argv[1])


def told(*args, **kw):
    "Note that the training began, and give the others time to come"
    (here / f'trained-{sys.argv[2]}').touch()
    while len([*here.glob('came-*')]) < 2:
        time.sleep(0.05)
    time.sleep(1)
    return fit(*args, **kw)


package.fit = told
(here / f'came-{sys.argv[2]}').touch()
load_or_train('tiny')
"""


@pytest.fixture
def text(tmp_path):
    "A short text to learn from"
    (tmp_path / 'text.txt').write_text(
        '\n\n'.join(f'{n} sheep jump over {n * n} fences.' for n in range(400)), encoding='utf-8'
    )
    return tmp_path / 'text.txt'


def test_two_that_ask_at_once_train_once(text, tmp_path):
    env = {**os.environ, 'LLM_LAB_HOME': str(tmp_path), 'PYTHONPATH': str(ROOT)}
    asking = [
        subprocess.Popen(
            [sys.executable, '-c', ASK, str(tmp_path), name],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in 'ab'
    ]
    said = [p.communicate()[1] for p in asking]
    assert [p.returncode for p in asking] == [0, 0], said
    assert len([*tmp_path.glob('trained-*')]) == 1


def test_where_the_disk_has_no_locks_it_is_trained_all_the_same(text, tmp_path, monkeypatch):
    import filelock

    def none(*args, **kw):
        raise NotImplementedError

    monkeypatch.setenv('LLM_LAB_HOME', str(tmp_path))
    monkeypatch.setattr(filelock.FileLock, '_acquire', none)
    sizes = (('d_model', 16), ('n_layers', 1), ('n_heads', 1))
    monkeypatch.setitem(
        package.RECIPES, 'tiny', Recipe(str(text), steps=3, batch_size=2, length=32, model=sizes)
    )
    assert load_or_train('tiny')[2]['steps'] == 3
    monkeypatch.setattr(package, 'fit', lambda *args, **kw: pytest.fail('it was trained again'))
    assert load_or_train('tiny')[2]['steps'] == 3
