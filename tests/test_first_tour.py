"Odd cases of the tour: names, and a result that is not known, or whose interval is not."

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from llm_lab import first_tour as chapter
from llm_lab.core import LabError
from llm_lab.evaluation import Score
from llm_lab.first_tour import describe_score
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
