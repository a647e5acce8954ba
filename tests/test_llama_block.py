"""`llama_block`: what `llama` fills in and what it leaves alone; what a configuration refuses."""

import re

import pytest
import torch
from torch import nn

from llm_lab.config import ModelConfig, model_data
from llm_lab.core import LabError
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.llama_block import SoftcapHead, SwiGLU, llama
from llm_lab.package import config_from
from llm_lab.parts import part
from llm_lab.positions import RoPE
from llm_lab.self_attention import Attention

ROPE = (part(RoPE),)


def refused(words):
    "A `LabError` with these words in it"
    return pytest.raises(LabError, match=re.escape(words))


def alternating(cfg, layer, of):
    return of[layer % len(of)](cfg, layer)


class MeanOfThePast(nn.Module):
    "A mixer of the reader's own"

    def __init__(self, cfg, layer=0):
        super().__init__()

    def forward(self, x, i, **ctx):
        return x.cumsum(1) / torch.arange(1.0, x.shape[1] + 1)[:, None]


def test_a_wrong_width_or_cap_is_refused():
    with refused('d_ff=-8: give a whole number'):
        GPTConfig(mlp=part(SwiGLU, d_ff=-8))
    with refused('cap=0: give a number above 0'):
        GPTConfig(lm_head=part(SoftcapHead, cap=0))


@pytest.mark.parametrize('depth', [0, 1.5, '4', True])
def test_a_wrong_depth_is_refused(depth):
    with refused(f'depth={depth!r}: give a whole number of at least 1'):
        llama(depth=depth)


def test_what_is_given_stays():
    given = llama(attn=part(Attention, bias=True)).attn
    assert given == part(Attention, bias=True, transforms=ROPE)
    base = part(RoPE, base=5e5)
    assert llama(rope=base).attn.keywords['transforms'] == (base,)


def test_it_is_the_block_of_a_run_description():
    described = config_from(model_data(ModelConfig(block='llama')))
    assert str(described) == str(llama(d_model=128, n_layers=4, n_heads=4))


def test_each_of_several_attentions_is_filled():
    of = (part(Attention), part(Attention, bias=True))
    filled = llama(attn=part(alternating, of=of)).attn.keywords['of']
    assert filled == (
        part(Attention, bias=False, transforms=ROPE),
        part(Attention, bias=True, transforms=ROPE),
    )


def test_a_rope_beside_transforms_is_refused():
    with refused('beside transforms of attn'):
        llama(rope=part(RoPE, base=5e5), attn=part(Attention, transforms=ROPE))


def test_a_mixer_of_ones_own_gets_nothing():
    own = part(MeanOfThePast)
    assert llama(attn=own).attn == own
    mixed = llama(n_layers=2, attn=part(alternating, of=(own, part(Attention))))
    assert mixed.attn.keywords['of'] == (own, llama().attn)
    MiniGPT(mixed)
    with refused('rope=part(RoPE): attn=part(MeanOfThePast) takes no transforms; leave rope out'):
        llama(attn=own, rope=part(RoPE))
