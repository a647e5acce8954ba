"""`sparse`: what a configuration refuses, sequences that are packed, links that differ, what is
written about a receptive field. That masks and kernels agree stands in tests/test_kernels.py."""

import re

import pytest
import torch

from llm_lab.core import LabError, pyplot
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.gqa import GQA
from llm_lab.kv_cache import lookback, sliding_window
from llm_lab.llama_block import llama
from llm_lab.parts import part
from llm_lab.self_attention import Attention, causal, dense_mask
from llm_lab.sparse import (
    alternate,
    and_masks,
    attention_sinks,
    cover,
    describe_receptive_field,
    expander_links,
    mask_hooks,
    or_masks,
    plot_receptive_field,
    receptive_field,
    receptive_field_map,
    same_document,
    strided,
)

NEAR = part(sliding_window, size=5)
SMALL = [
    part(or_masks, of=(part(sliding_window, size=4), part(expander_links, degree=2, beyond=4)))
] * 3


def refused(words):
    "A `LabError` with these words in it"
    return pytest.raises(LabError, match=re.escape(words))


def asked(p, T, H=1, layer=0):
    "The mask pair by pair, (H, T, T)"
    return dense_mask(p, torch.arange(T), torch.arange(T), H, layer).expand(1, H, T, T)[0]


def test_hooks_are_attributes_of_the_mask_and_only_those_that_are_given():
    @mask_hooks(lookback=lambda size: size)
    def mine(i, j, size):
        return (j <= i) & (i - j < size)

    assert lookback(part(mine, size=7)) == 7 and cover(part(mine, size=7)) == (7, [])
    assert not hasattr(mine, 'links') and not hasattr(mine, 'check')


def test_sinks_are_the_first_keys():
    assert asked(part(attention_sinks, n=2), 5)[0].sum(1).tolist() == [1, 2, 2, 2, 2]


def test_documents_of_one_sequence():
    doc = torch.tensor([0, 1, 1, 1, 2])
    i = torch.arange(5)
    assert dense_mask(same_document, i, i, doc=doc).sum(-1).tolist() == [1, 1, 2, 3, 1]


def test_what_a_configuration_refuses():
    with refused('stride=0: give a whole number of at least 1'):
        GPTConfig(attn=part(Attention, mask=part(strided, stride=0)))
    with refused('of=(): give recipes'):
        GPTConfig(attn=part(Attention, mask=part(or_masks, of=())))
    with refused("'masks' is no keyword"):
        GPTConfig(attn=part(Attention, mask=part(and_masks, masks=(NEAR,))))
    with refused('of=(): give recipes'):
        GPTConfig(attn=part(alternate, of=()))


def test_both_of_equal_masks_is_the_smaller_one():
    assert asked(part(and_masks, of=(NEAR, part(causal))), 40).equal(asked(NEAR, 40))


def test_links_differ_by_head_layer_and_seed():
    links = part(expander_links, degree=6)
    heads = asked(links, 200, 2)
    assert not heads[0].equal(heads[1])
    assert not asked(links, 200, layer=0).equal(asked(links, 200, layer=1))
    assert not asked(links, 200).equal(asked(part(expander_links, degree=6, seed=1), 200))


def test_there_is_no_cover_where_all_of_the_past_may_be_read():
    assert cover(part(causal)) is None
    assert cover(part(same_document)) is None
    assert cover(part(or_masks, of=(NEAR, part(causal)))) is None


def test_layers_that_take_turns_are_llamas():
    local = part(GQA, n_kv_heads=2, mask=part(sliding_window, size=8))
    by_turns = part(alternate, of=(local, local, part(GQA, n_kv_heads=2)))
    model = MiniGPT(llama(d_model=32, n_heads=4, n_layers=4, attn=by_turns))
    assert [str(b.attn.mask) for b in model.blocks] == [
        'part(sliding_window, size=8)',
        'part(sliding_window, size=8)',
        'part(causal)',
        'part(sliding_window, size=8)',
    ]
    # RoPE, and no biases, for all
    assert all(len(b.attn.transforms) == 1 and b.attn.qkv.bias is None for b in model.blocks)


def test_a_receptive_field_in_words_and_as_a_picture():
    words = describe_receptive_field(receptive_field(SMALL[:1], 40, 2), 2)
    assert words == 'token 2 has 3 of 3 tokens in its receptive field after 1 layers'
    with refused('T=999: give 1 to 64 tokens'):
        receptive_field_map(SMALL, T=999)
    fig = plot_receptive_field(SMALL, T=20, query=7)
    assert len(fig.axes) == 4
    pyplot().close(fig)
