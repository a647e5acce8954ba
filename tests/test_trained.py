"""A model is built once, however many ask for it at once, and anew where what decides it is
another"""

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from llm_lab.chars import CharTokenizer
from llm_lab.core import LabError
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.package import _build_key, load, load_or_train, tales_model, to_data

ROOT = Path(__file__).resolve().parent.parent
ASK = """
import sys
import time
from pathlib import Path

from llm_lab.package import load_or_train
from llm_lab.chars import CharTokenizer
from llm_lab.gpt import GPTConfig, MiniGPT

here = Path(sys.argv[1])


def build():
    "Note that it began, and give the others time to come"
    (here / f'built-{sys.argv[2]}').touch()
    while len([*here.glob('came-*')]) < 2:
        time.sleep(0.05)
    time.sleep(1)
    return MiniGPT(GPTConfig(vocab_size=2, d_model=8, n_layers=1)), CharTokenizer('ab'), {}


(here / f'came-{sys.argv[2]}').touch()
load_or_train('tiny', build)
"""


def tiny(seed=3, **about):
    sizes = dict(vocab_size=2, d_model=8, n_layers=1)
    return MiniGPT(GPTConfig(**sizes), seed), CharTokenizer('ab'), about


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('LLM_LAB_HOME', str(tmp_path))
    return tmp_path


def test_two_that_ask_at_once_build_once(tmp_path):
    env = {**os.environ, 'LLM_LAB_HOME': str(tmp_path), 'PYTHONPATH': str(ROOT)}
    (tmp_path / 'ask.py').write_text(ASK)  # a file, because the source of `build` is hashed
    asking = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / 'ask.py'), str(tmp_path), name],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in 'ab'
    ]
    said = [p.communicate()[1] for p in asking]
    assert [p.returncode for p in asking] == [0, 0], said
    assert len([*tmp_path.glob('built-*')]) == 1
    assert len([*(tmp_path / 'artifacts').glob('tiny-*')]) == 1


def test_where_the_disk_has_no_locks_it_is_built_all_the_same(home, monkeypatch):
    import filelock

    def none(*args, **kw):
        raise NotImplementedError

    monkeypatch.setattr(filelock.FileLock, '_acquire', none)
    built = []

    def build():
        built.append(1)
        return tiny(steps=3)

    assert [load_or_train('tiny', build).about['steps'] for _ in range(2)] == [3, 3]
    assert built == [1]


def test_a_build_that_is_interrupted_leaves_nothing(home):
    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_or_train('tiny', stopped)
    assert [*(home / 'artifacts').glob('tiny-*')] == []
    # and the lock is free again
    load_or_train('tiny', tiny)


def test_the_name_of_a_folder(home):
    "A bare name stands in artifacts/, a path where it is; the key is a hash, or what is given"
    load_or_train('one', tiny, key='a')
    load_or_train(home / 'elsewhere' / 'two', tiny, key='b')
    load_or_train('three', tiny)
    assert load(home / 'artifacts' / 'one-a').about == load(home / 'elsewhere' / 'two-b').about
    assert (home / 'artifacts' / f'three-{_build_key(tiny)}' / 'package.json').exists()


def keys_of(text, outside='', name='build'):
    "The key of a function that is written in a module of its own"
    import importlib.util
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f'm{abs(hash((text, outside)))}.py'
        path.write_text(f'{outside}\n{text}')
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return _build_key(getattr(module, name))


def test_the_key_is_another_where_the_build_is_another():
    first = keys_of('def build(lr=0.1):\n    return lr * STEPS\n', 'STEPS = 3')
    assert first == keys_of('def build(lr=0.1):\n    return lr * STEPS\n', 'STEPS = 3\nOTHER = 4')
    others = [
        keys_of('def build(lr=0.1):\n    return STEPS * lr\n', 'STEPS = 3'),  # the source
        keys_of('def build(lr=0.1):\n    return lr * STEPS\n', 'STEPS = 4'),  # a value from outside
        keys_of('def build(lr=LR):\n    return lr * STEPS\n', 'STEPS = 3\nLR = 0.1'),
        keys_of('def build(lr=LR):\n    return lr * STEPS\n', 'STEPS = 3\nLR = 0.2'),  # a default
    ]
    assert len({first, *others}) == 5


def test_functions_of_a_loop_are_not_taken_for_one(home):
    "All have the same source; the seed comes from outside"
    models = [load_or_train('tiny', lambda: tiny(seed)).model for seed in (1, 2)]
    assert not models[0].tok.weight.equal(models[1].tok.weight)


def test_another_version_or_default_of_a_config_is_another_model(monkeypatch):
    from llm_lab import package

    before = _build_key(tiny)
    with monkeypatch.context() as m:
        m.setattr(package, '__version__', 'another')
        other = _build_key(tiny)
    with monkeypatch.context() as m:
        m.setattr(package, 'to_data', lambda cfg: dict(to_data(cfg), n_layers=9))
        third = _build_key(tiny)
    assert len({before, other, third}) == 3


@pytest.mark.parametrize(
    'build', [partial(tiny), len, eval('lambda: 1')], ids=['partial', 'built-in', 'typed']
)
def test_what_has_no_source_needs_a_key(build, home):
    with pytest.raises(LabError, match='has no source to compare: give key= with a text'):
        load_or_train('tiny', build)
    if isinstance(build, partial):
        assert load_or_train('tiny', build, key='1').about == {}


def test_the_chapter_and_the_library_name_the_same_folder():
    "The notebook has a `tales_model` of its own: if its source differed, it would be trained twice"
    from inspect import getsource

    cells = json.loads((ROOT / 'nbs' / '24_package.ipynb').read_text(encoding='utf-8'))['cells']
    sources = [''.join(c['source']) for c in cells]
    (cell,) = [s for s in sources if 'def tales_model(' in s]
    assert cell.removeprefix('#| export\n').strip() == getsource(tales_model).strip()


def test_half_a_tales_model_is_not_kept(home, monkeypatch):
    "Ctrl-C ends `fit` without an error, and what was learned so far must not be kept as the model"
    from llm_lab import package

    fit = package.fit

    def stopped(*args, **kw):
        return fit(*args, **kw, callbacks={2: lambda run: run.stop('by hand')})

    monkeypatch.setattr(package, 'fit', stopped)
    with pytest.raises(KeyboardInterrupt):
        load_or_train('tales', tales_model)
    assert [*(home / 'artifacts').glob('tales-*')] == []


def test_the_tales_model_says_where_it_comes_from(home, monkeypatch):
    "Two steps of it are enough to see what it is made of"
    from llm_lab import package
    from llm_lab.tales import tiny_tales

    fit = package.fit
    monkeypatch.setattr(package, 'fit', lambda m, rows, steps, **kw: fit(m, rows, 2, **kw))
    model, tok, about = load_or_train('tales', tales_model)
    tales = tiny_tales()
    assert about['corpus_sha256'] == tales.sha256 and about['tokens'] == 2 * 2 * 288
    assert set(tok.decode([*range(tok.vocab_size)])) >= set(tales.text('val'))
    assert tales.floor * math.log(2) < about['val_loss'] < 1.1 * math.log(tok.vocab_size)
