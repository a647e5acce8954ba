"Odd cases of the tour: names, and a result that is not known, or whose interval is not."

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from llm_lab import first_tour as chapter
from llm_lab.core import LabError
from llm_lab.evaluation import Score
from llm_lab.first_tour import describe_score
from llm_lab.config import RunConfig, as_data, read_config
from llm_lab.corpora import Corpus
from llm_lab.tales import tiny_tales

GOOD = Score(nats=30 * math.log(2), tokens=100, chars=100, bytes=100, error=1.0, floor=0.25)


@pytest.mark.parametrize('bad', ['', '.', '..', '../x', 'a/b', 'aux', 'a.', '-v'])
def test_what_cannot_be_a_folder_everywhere_is_no_name(home, bad):
    with pytest.raises(LabError, match='will not do'):
        chapter._check_name(bad)


def test_what_a_package_says_of_its_text_never_reads_like_a_corpus_if_it_is_a_path():
    assert chapter._data_of('tiny_tales') == 'tiny_tales'
    assert Path(chapter._data_of(Path('tiny_tales'))).name == 'tiny_tales'
    assert chapter._data_of('../a.txt') == '../a.txt'


@pytest.mark.parametrize(
    ('score', 'then', 'known'),
    [
        (KeyboardInterrupt, None, (None, None)),
        (LabError('below the floor'), None, (None, None)),  # the model of three minutes is not lost
        (GOOD, MemoryError('no room'), (GOOD, None)),
        (GOOD, KeyboardInterrupt, (GOOD, None)),
    ],
)
def test_a_validation_that_ends_early_leaves_what_is_known(score, then, known, monkeypatch):
    def answer(with_what):
        def call(*args, **kw):
            if isinstance(with_what, Score):
                return with_what
            raise with_what

        return call

    monkeypatch.setattr('llm_lab.evaluation.evaluate', answer(score))
    monkeypatch.setattr('llm_lab.evaluation.excess_by_kind', answer(then))
    fake = SimpleNamespace(model=None, tokenizer=None, corpus=tiny_tales())
    assert chapter._validate(fake) == known


def test_a_score_of_one_piece_has_no_interval():
    assert describe_score(Score(20 * math.log(2), 10, 10, 10, math.inf)) == (
        'validation loss 1.386 nats per character = 2.000 bits '
        '(no 95 % interval: one piece of text tells none), every character scored once'
    )


def test_a_token_of_several_characters_has_bits_per_character():
    assert describe_score(Score(20 * math.log(2), 10, 40, 40, 5 * math.log(2))) == (
        'validation loss 1.386 nats per token = '
        '0.500 bits per character (95 % interval 0.255 to 0.745), every token scored once'
    )


def test_no_floor_and_no_score_are_said_in_words():
    assert 'floor' not in describe_score(Score(10.0, 9, 9, 9, 1.0), None)
    assert describe_score(None, None)[-9:] == 'not known'


# ---- the config of a tour

PROSE = Corpus('prose', dict(train='one long text ' * 999, val='one long text ' * 99))


@pytest.mark.parametrize(
    'settings',
    [
        (),
        [('d_model', 192)],
        [('model.d_model', 192), ('train.lr', 0.01), ('length', 64), ('seed', 3), ('tie', True)],
        [('n_kv_heads', 1), ('d_head', 8), ('clip', 2), ('min_lr', 0.001), ('batch_size', 3)],
    ],
    ids=str,
)
def test_the_keys_of_a_tour_are_those_of_train(settings):
    "`llm-lab train` reads the same words as the same values, on top of what a tour begins with"
    cfg = chapter._tour_config(settings, PROSE)
    assert isinstance(cfg, RunConfig)
    start = as_data(chapter._tour_config((), PROSE))
    words = [f'{k}={str(v).lower()}' for k, v in settings]
    if 'd_model' in str(settings):
        words.append(f'n_heads={cfg.model.n_heads}')  # which a tour derives from the width
    assert as_data(read_config(start, words)) == as_data(cfg)


@pytest.mark.parametrize(
    'key', ['data.lengths', 'train.lrr', 'model.d_modl', 'n_head', 'stepz', 'every', 'data.lr', 'x']
)
def test_a_wrong_key_is_answered_as_train_answers_it(key):
    with pytest.raises(LabError) as theirs:
        read_config('smoke', [f'{key}=1'])
    with pytest.raises(LabError) as mine:
        chapter._tour_config([(key, 1)], PROSE)
    assert str(mine.value) == str(theirs.value)


def test_a_wrong_value_is_refused_with_its_path():
    for key, value, words in (
        ('lr', math.nan, 'train.lr=nan: give a number'),
        ('model.tie', 0.5, 'model.tie=0.5: give true or false'),
        ('d_model', 0, 'model.d_model=0: give a whole number'),
        ('d_model', '64', "model.d_model='64': give a whole number"),
        ('n_heads', 7, 'model.n_heads=7 does not divide model.d_model=160'),
        ('length', '64', "data.length='64': give a whole number"),
        ('seed', -1, 'train.seed=-1: give a whole number'),
        ('batch_size', 'auto', 'train.batch_size=auto: the tour does not search for one'),
    ):
        with pytest.raises(LabError) as e:
            chapter._tour_config([(key, value)], PROSE)
        assert words in str(e.value)


def test_what_would_change_nothing_is_refused():
    "Each key of a config is obeyed, or refused: none is read and forgotten"
    from llm_lab.config import SECTIONS

    start = as_data(chapter._tour_config((), PROSE))
    for section, keys in start.items():
        for key, value in keys.items():
            path = f'{section}.{key}'
            if path.startswith(chapter._OBEYED):
                chapter._tour_config([(path, value)], PROSE)
                continue
            with pytest.raises(LabError, match=f'{path}: the tour decides this itself'):
                chapter._tour_config([(path, value)], PROSE)
    assert start.keys() == SECTIONS.keys()


def test_what_is_obeyed_reaches_the_training(home, monkeypatch):
    "Rate, decay, clipping and seed arrive at `fit`, sizes at the model, rows at the batches"
    from llm_lab import train

    got = {}

    def fit(model, batches, steps, lr, weight_decay, **kw):
        got.update(kw, lr=lr, weight_decay=weight_decay, rows=batches(0).shape, cfg=model.cfg)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, 'fit', fit)
    monkeypatch.setattr(chapter, '_time_step', lambda setup: (0.001, 1))
    (home / 'prose.txt').write_text('one long text ' * 999)
    said = dict(lr=0.02, weight_decay=0.3, min_lr=0.001, clip=3.0, seed=5)
    sizes = dict(d_model=12, n_layers=1, n_heads=3, n_kv_heads=1, tie=True)
    with pytest.raises(KeyboardInterrupt):
        settings = {**said, **sizes, 'length': 16, 'batch_size': 3}
        chapter.tour(str(home / 'prose.txt'), 1, settings.items())
    assert {k: got[k] for k in said} == said
    assert tuple(got['rows']) == (3, 17) and got['cfg'].max_len == 16
    assert got['cfg'].attn.keywords['n_kv_heads'] == 1 and got['cfg'].tie


def test_a_context_longer_than_a_look_is_no_mistake():
    long = Corpus('long', dict(train='a b ' * 99_999, val='a b ' * 9999))
    assert chapter._tour_config([('length', 30_000)], long).data.length == 30_000


def test_where_documents_stand_alone_rows_begin_there():
    tales = chapter._tour_config((), tiny_tales())
    assert (tales.data.rows, chapter._tour_config((), PROSE).data.rows) == ('documents', 'blocks')


def test_a_tour_needs_no_omegaconf(tmp_path):
    "It runs from the base install: neither OmegaConf nor YAML is imported"
    import os
    import subprocess
    import sys

    code = """
import sys
for name in ('omegaconf', 'yaml'):
    sys.modules[name] = None  # an import of it raises
from llm_lab import first_tour as chapter
chapter._time_step = lambda setup: (0.001, 1)
chapter._budget = lambda *a: (3, 100)
chapter.tour('prose.txt', 1, [('model.d_model', 16), ('n_layers', 1), ('length', 16)])
"""
    (tmp_path / 'prose.txt').write_text('one long text ' * 999)
    root = str(Path(chapter.__file__).resolve().parents[1])
    env = {**os.environ, 'LLM_LAB_HOME': str(tmp_path), 'PYTHONPATH': root}
    r = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert r.returncode == 0, r.stderr
    assert (tmp_path / 'artifacts' / 'tour' / 'result.json').exists()
