"""Every chapter runs from its first cell to its last, in a process of its own (`make test` runs
them beside the other tests)"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tools'))
import run_notebooks  # noqa: E402

# `make nightly` runs the cells marked `slow`, too
FLAGS = os.environ.get('LLM_LAB_NOTEBOOK_FLAGS', '')
DATA = '04_corpora', '12_bpe'  # what they show is another text where $LLM_LAB_DATA is set


def chapters():
    "A parameter for each notebook; those that read a local corpus carry the mark `data`"
    for path in run_notebooks.all_notebooks():
        marks = [pytest.mark.data] if path.stem in DATA else []
        yield pytest.param(path, id=path.stem, marks=marks)


def test_the_model_that_chapters_share_is_trained():
    "First of all, so that nobody waits for it; it learned what `package` promises"
    from llm_lab.corpora import load_corpus
    from llm_lab.package import load_or_train, tales_model

    about = load_or_train('tales', tales_model)[2]
    floor = load_corpus('tiny_tales').floor * math.log(2)
    assert floor < about['val_loss'] < 2 * floor


@pytest.fixture(scope='session')
def warm():
    "A process that runs notebooks in forks of itself; None where there are no forks"
    if not hasattr(os, 'fork'):
        yield None
        return
    backend = 'module://matplotlib_inline.backend_inline'
    env = dict(os.environ, PYTHONUTF8='1', MPLBACKEND=backend)
    env.setdefault('OMP_NUM_THREADS', '1')
    with subprocess.Popen(
        [sys.executable, ROOT / 'tools' / 'warm.py'],
        env=env,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize('path', [*chapters()])
def test_a_chapter_runs(path, warm, tmp_path):
    if warm is None:
        ok, _, log = run_notebooks.run(path, FLAGS)
    else:
        file = tmp_path / 'log'
        job = dict(notebook=str(path.resolve()), flags=FLAGS, log=str(file))
        print(json.dumps(job), file=warm.stdin, flush=True)
        ok = json.loads(warm.stdout.readline())['code'] == 0
        log = file.read_text(encoding='utf-8', errors='replace')
    if not ok:
        pytest.fail(log, pytrace=False)
