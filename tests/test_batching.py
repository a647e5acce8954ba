"Batches: what is refused, and a position that is of another stream."

import json
from types import SimpleNamespace

import pytest
import torch

from llm_lab.batching import BatchStream
from llm_lab.core import LabError

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
