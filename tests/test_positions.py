"""`positions`: what a configuration refuses, positions of a batch, frequencies at their limits."""

import re

import pytest
import torch
from torch.testing import assert_close

from llm_lab.core import LabError, rng
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.parts import part
from llm_lab.positions import (
    RoPE,
    SinusoidalPositions,
    half_split,
    linear_scaling,
    llama3_scaling,
    rope_frequencies,
    to_half_split,
)
from llm_lab.self_attention import Attention


def refused(words):
    "A `LabError` with these words in it"
    return pytest.raises(LabError, match=re.escape(words))


def attention(**kw):
    return part(Attention, transforms=(part(RoPE, **kw),))


def test_sines_need_an_even_number_of_channels():
    with refused('d_model=33: sines and cosines need'):
        GPTConfig(d_model=33, n_heads=3, pos=part(SinusoidalPositions))


def test_positions_may_differ_from_sequence_to_sequence():
    rope = RoPE(GPTConfig(d_model=64, n_heads=4))
    x = torch.randn(2, 3, 50, 16, generator=rng(0, 'x'))
    t = torch.arange(50)

    def rotated(x, positions):
        return rope(x, x, x, positions, positions)[0]

    both = rotated(x, torch.stack([t, t + 9]))
    one_by_one = torch.cat([rotated(x[:1], t), rotated(x[1:], t + 9)])
    assert_close(both, one_by_one, atol=1e-5, rtol=0)


@pytest.mark.parametrize('interleaved', [False, True])
@pytest.mark.parametrize('partial', [1.0, 0.5])
def test_queries_and_keys_may_stand_at_other_positions(interleaved, partial):
    "One query behind a cache is rotated as it was in the whole sequence"
    rope = RoPE(GPTConfig(d_model=64, n_heads=4), interleaved=interleaved, partial=partial)
    q, k = torch.randn(2, 2, 3, 50, 16, generator=rng(0, 'x'))
    t = torch.arange(50)
    whole_q, whole_k, *_ = rope(q, k, k, t, t)
    last_q, all_k, *_ = rope(q[:, :, -1:], k, k, t[-1:], t)
    assert torch.equal(last_q, whole_q[:, :, -1:]) and torch.equal(all_k, whole_k)


def test_a_head_must_have_pairs():
    with refused('3 of 3 channels of a head would be rotated: pairs are needed'):
        GPTConfig(d_model=12, n_heads=4, attn=attention())


@pytest.mark.parametrize(
    'name, value',
    [
        ('partial', 0),
        ('partial', 1.5),
        ('partial', 'x'),
        ('base', 0),
        ('base', -1.0),
        ('base', True),
    ],
)
def test_a_wrong_number_is_named(name, value):
    limit = ' and up to 1' if name == 'partial' else ''
    with pytest.raises(LabError) as error:
        GPTConfig(attn=attention(**{name: value}))
    assert str(error.value).endswith(f'{name}={value!r}: give a number above 0{limit}')


@pytest.mark.parametrize('scale', [part(linear_scaling), part(linear_scaling, factor=0.0)])
def test_a_scaling_without_numbers_is_refused(scale):
    with refused('gives no frequencies: fill in its numbers, all above 0'):
        GPTConfig(attn=attention(scale=scale))


def test_llama_scaling():
    with refused('low=4.0, high=4.0'):
        GPTConfig(attn=attention(scale=part(llama3_scaling, low=4.0)))
    f = rope_frequencies(64, 500_000.0)
    with refused('low=4.0, high=4.0: low must be below high'):
        llama3_scaling(f, low=4.0, high=4.0)
    assert_close(llama3_scaling(f, factor=1.0), f)  # a factor of 1 changes nothing


def test_rows_must_divide_among_the_heads():
    with refused('10 rows are not those of 3 heads'):
        to_half_split(torch.ones(10, 3), 3)


def test_a_model_without_an_interleaved_rope_is_refused():
    with refused('0 interleaved RoPEs'):
        half_split(MiniGPT())
