"""`inference`: the odd cases. That the fast form writes what the model writes stands in
test_fast.py."""

import copy

import pytest
import torch
from test_cache import KINDS, SIZE, T, ids_of, near, plain, shaken
from torch import nn

from llm_lab.core import LabError, rng
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.inference import (
    Int8Linear,
    bandwidth,
    bytes_per_token,
    for_inference,
    tokens_per_second,
)
from llm_lab.llama_block import llama
from llm_lab.positions import RoPE
from llm_lab.sampling import DecodingState

pytestmark = pytest.mark.usefixtures('one_thread')


def test_weights_that_there_are_not():
    with pytest.raises(LabError, match="weights='int4': choose from float32, int8"):
        for_inference(MiniGPT(GPTConfig(**SIZE)), 'int4')


def test_what_is_no_plain_model_is_refused():
    class Own(MiniGPT):
        def forward(self, ids, i=None, **ctx):
            return super().forward(ids, i, **ctx)

    with pytest.raises(LabError, match='a Linear is given: a MiniGPT is needed'):
        for_inference(nn.Linear(2, 2))
    with pytest.raises(LabError, match='Own has a forward of its own'):
        for_inference(Own(GPTConfig(**SIZE)))


def test_a_part_of_which_a_token_uses_a_share():
    model = MiniGPT(llama(**SIZE))
    some_of = copy.deepcopy(model)
    some_of.blocks[0].mlp.out.share = 0.25
    # three quarters of 4 bytes each are not read
    less = 3 * sum(p.numel() for p in model.blocks[0].mlp.out.parameters())
    assert bytes_per_token(model) - bytes_per_token(some_of) == less
    assert bytes_per_token(for_inference(model)) == bytes_per_token(model)


@pytest.mark.parametrize('K,N', [(40, 25), (8, 3), (88, 64)])
def test_eight_bits_of_rows_that_end_within_a_piece(K, N):
    layer = nn.Linear(K, N)
    x = torch.randn(5, 1, K, generator=rng(0, 'x'))
    want = plain(layer, x)
    assert (plain(Int8Linear(layer), x) - want).norm() < 0.02 * want.norm()


def test_layers_that_rotate_alike_share_a_rope():
    quick = for_inference(MiniGPT(llama(**SIZE)))
    ropes = [m for m in quick.modules() if isinstance(m, RoPE)]  # each module once
    assert len(ropes) == 1
    assert len({id(block.attn.transforms[0]) for block in quick.blocks}) == 1


@pytest.mark.parametrize('kind', ['GPT-2', '2 heads', 'window of 5', '1 head, QK-norm'])
def test_the_short_road_is_taken_for_single_tokens_only(kind):
    "One token after a cache that has begun, without padding: then, and only then"
    model, ids = shaken(KINDS[kind]), ids_of(0, 2)
    quick = for_inference(model)
    taken = []
    step = quick.step
    quick.step = lambda ids, *rest: (taken.append(len(ids)), step(ids, *rest))[1]
    reader = DecodingState(quick, T)
    reader(ids[:, :1])  # nothing is kept yet
    reader(ids[:, 1:5])  # several at once
    assert taken == []
    near(reader(ids[:, 5:6]), plain(model, ids[:, :6])[:, -1])
    assert taken == [2]
    padded = DecodingState(quick, T, torch.tensor([0, 3]))
    padded(ids[:, :9])
    padded(ids[:, 9:10])
    assert taken == [2]


def test_speed_is_measured_within_the_context():
    model = for_inference(MiniGPT(llama(**SIZE)))
    assert tokens_per_second(model, prompt=4, n=4, rounds=1) > 0
    assert bandwidth(2**12) > 0
    for bad in (dict(n=0), dict(rounds=0), dict(prompt=0), dict(prompt=T, n=1)):
        with pytest.raises(LabError, match='give at least 1 of each, and no more tokens than'):
            tokens_per_second(model, **bad)
