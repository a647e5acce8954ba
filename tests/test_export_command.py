"""`llm-lab export`, and what `eval --json` and `sample --no-cache` print."""

import json

import pytest
import torch
from helpers import printed

from llm_lab.chars import CharTokenizer
from llm_lab.evaluation import evaluate
from llm_lab.corpora import load_corpus
from llm_lab.gpt import MiniGPT
from llm_lab.llama_block import llama
from llm_lab.package import load, save
from llm_lab.parts import part
from llm_lab.positions import SinusoidalPositions

LETTERS = 'abcdefgh .\n'


def fresh(pos=None):
    "A tiny model of these letters"
    return MiniGPT(llama(len(LETTERS), d_model=16, n_layers=2, n_heads=2, max_len=32, pos=pos))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('LLM_LAB_HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def kept(home):
    "A small model of a text of eleven characters, and the text"
    tok = CharTokenizer(LETTERS)
    (home / 'text.txt').write_text('a bad cab. a fed hag. ' * 40)
    model = fresh()
    corpus = load_corpus('text.txt')
    about = dict(corpus=corpus.name, data='text.txt', corpus_sha256=corpus.sha256)
    save(home / 'artifacts' / 'one', model, tok, about)
    return model.eval()


def test_an_exported_folder_holds_the_same_model(kept, home):
    out, _ = printed('export', 'one', 'one_hf')
    assert 'one_hf' in out and "from_pretrained('one_hf')" in out
    ids = torch.randint(len(LETTERS), (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(load('one_hf').model.eval()(ids), kept(ids))
    assert (home / 'one_hf' / 'README.md').is_file()


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(home):
    tok = CharTokenizer(LETTERS)
    save(home / 'odd', fresh(part(SinusoidalPositions)), tok)
    _, err = printed('export', 'odd', 'odd_hf', code=1)
    assert 'pos' in err and not (home / 'odd_hf').exists()
    _, err = printed('export', 'nowhere', 'x', code=1)
    assert 'no model at nowhere' in err


def test_a_score_as_json_is_the_score(kept, home):
    values = json.loads(printed('eval', 'one', '--json')[0])
    want = evaluate(kept, CharTokenizer(LETTERS), load_corpus('text.txt'))
    assert values['loss'] == pytest.approx(want.loss, rel=1e-6)
    assert values['of'] == 'val' and 'documents' not in values
    of_text = json.loads(printed('eval', 'one', '--json', '--text', 'text.txt')[0])
    assert of_text['of'] == 'text.txt' and of_text['tokens'] > values['tokens']


def test_without_the_cache_the_same_text_is_written(kept, monkeypatch):
    from llm_lab import sampling

    caches = []
    init = sampling.DecodingState.__init__

    def watched(self, *args, **kw):
        init(self, *args, **kw)
        caches.append(self.may_cache and bool(self.model.cache(1, 1)))

    monkeypatch.setattr(sampling.DecodingState, '__init__', watched)
    words = 'sample', 'one', '--prompt', 'a b', '--tokens', 20, '--seed', 3
    with_cache = printed(*words)[0]
    assert printed(*words, '--no-cache')[0] == with_cache
    assert caches == [True, False]
