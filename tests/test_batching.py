"Batches: what is refused, and a position that is of another stream."

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from answers import batching as answers
from fastcore.test import test_eq as equal
from helpers import cells_of, code_cell, exercise_tests

from llm_lab import batching
from llm_lab.batching import BatchStream, permuted_index
from llm_lab.core import LabError, check

# fifty blocks of 64 tokens, and nine tokens more; each id is its own position
IDS = torch.arange(64 * 50 + 9, dtype=torch.int32)


@pytest.mark.parametrize(
    ('said', 'n', 'given'),
    [
        ('the text has 64 tokens, a block needs 65', 64, dict(batch_size=2)),
        ('give a multiple of world_size=5', None, dict(world_size=5)),
        ('a rank below', None, dict(rank=2, world_size=2)),
        ('batch_size=0: give a whole number above 0', None, dict(batch_size=0)),
    ],
)
def test_sizes_of_which_no_batch_can_be_made_are_refused(said, n, given):
    with pytest.raises(LabError, match=said):
        BatchStream(IDS[:n], **{**dict(batch_size=12, length=64), **given})


@pytest.fixture
def saved():
    stream = BatchStream(IDS, 12, 64)
    for _ in range(7):
        next(stream)
    return json.loads(json.dumps(stream.state_dict()))  # plain data


@pytest.mark.parametrize('wrong', [dict(seed=1), dict(batch_size=6), dict(length=32)])
def test_a_position_of_another_stream_is_refused_and_both_sides_are_named(saved, wrong):
    other = BatchStream(IDS, **{**dict(batch_size=12, length=64), **wrong})
    ((key, value),) = wrong.items()
    said = f"{key} of the saved position is {saved[key]}, this stream's {value}:"
    with pytest.raises(LabError, match=said):
        other.load_state_dict(saved)


def test_a_step_below_0_is_refused(saved):
    with pytest.raises(LabError, match='step of the saved position is -1'):
        BatchStream(IDS, 12, 64).load_state_dict({**saved, 'step': -1})


def test_a_stream_knows_the_size_of_its_tokenizer_and_does_not_save_it():
    packed = SimpleNamespace(ids=IDS, tokenizer=SimpleNamespace(vocab_size=7))
    assert BatchStream(packed, 2, 64).vocab_size == 7
    assert BatchStream(IDS, 2, 64).vocab_size is None
    named = BatchStream(IDS, 2, 64, vocab_size=9)
    assert named.vocab_size == 9
    # streams of older checkpoints go on
    assert named.state_dict() == BatchStream(IDS, 2, 64).state_dict()


def test_epochs_and_seeds_have_orders_of_their_own():
    first, second = permuted_index(np.arange(2000), 1000).reshape(2, 1000)
    assert (first != second).any()
    assert (first != permuted_index(np.arange(1000), 1000, seed=1)).any()
    equal([permuted_index(k, 1000).item() for k in range(5)], first[:5])


def test_sequences_are_pieces_of_the_ring_and_others_are_left_over_in_each_epoch():
    stream = BatchStream(IDS, batch_size=12, length=64)
    batches = [next(stream) for _ in range(25)]  # 25 × 12 sequences: six epochs
    assert (batches[0].shape, batches[0].dtype) == ((12, 65), torch.int64)
    rows = torch.cat(batches)
    equal(rows, (rows[:, :1] + torch.arange(65)) % len(IDS))
    left = set()
    for epoch in rows.view(6, 50, 65):
        predicted = epoch[:, 1:].unique()
        assert len(predicted) == 50 * 64  # none twice
        left.add(tuple(sorted({*range(len(IDS))} - {*predicted.tolist()})))
    assert len(left) == 6


# ---- the exercises


cell = partial(code_cell, '14_batching')


@pytest.fixture(scope='module')
def exercises():
    space = dict(vars(batching), torch=torch)
    for text in ('def back(', 'def my_guess('):
        exec(cell(text).rpartition('check(')[0], space)
    return space


(
    test_a_right_answer_is_told_so,
    test_a_wrong_answer_meets_a_counter_example,
    test_an_exercise_that_nobody_has_done_says_so,
) = exercise_tests(
    answers.ANSWERS,
    dict(
        back=('back_spec', 'cases'),
        my_guess=('measured', None),
    ),
    fixture='exercises',
)


def test_what_the_third_exercise_breaks():
    "Two rounds: each span still once, 16 of 24 orders, 18 neighbours"
    right = cell('def _feistel(')
    broken = right.replace('range(8)', 'range(2)')
    assert broken != right
    space = dict(vars(batching))
    exec(broken, space)
    index = space['permuted_index']
    for n in (1, 2, 3, 10, 97, 1000):
        equal(np.sort(index(np.arange(n), n)), np.arange(n))
    assert index(range(9), 3).tolist() != [0, 1, 2, 0, 2, 1, 1, 2, 0]  # the first assertion
    drawn = index(np.arange(4 * 24_000), 4, seed=3).reshape(-1, 4)
    orders = len(np.unique(drawn, axis=0))
    neighbours = (np.abs(np.diff(index(np.arange(300), 300, 0))) == 1).sum()
    (told,) = [text for text in cells_of('14_batching', 'markdown') if 'range(2)' in text]
    assert f'only {orders} ever' in told and f'and {neighbours} spans' in told
