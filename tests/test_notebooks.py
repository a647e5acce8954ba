"""Every chapter runs from its first cell to its last, in a process of its own (`make test` runs
them beside the other tests)"""

import math
import os
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


@pytest.mark.parametrize('path', [*chapters()])
def test_a_chapter_runs(path):
    ok, _, log = run_notebooks.run(path, FLAGS)
    if not ok:
        pytest.fail(log, pytrace=False)
