"""`llama_block`: what `llama` fills in and what it leaves alone; what a configuration refuses."""

import re
from dataclasses import fields, replace
from typing import get_type_hints

import pytest
import torch
from helpers import near, one_line, shaken
from torch import nn

from llm_lab.chars import CharTokenizer
from llm_lab.config import ModelConfig, model_data, read_config
from llm_lab.core import LabError, rng
from llm_lab.efficient import apply_activation_checkpointing
from llm_lab.gpt import MLP, Block, GPTConfig, MiniGPT
from llm_lab.hub import to_hf
from llm_lab.inference import for_inference
from llm_lab.kernels import SparseAttention
from llm_lab.kv_cache import sliding_window, with_kv_cache
from llm_lab.llama_block import (
    LlamaSettings,
    ParallelBlock,
    SandwichBlock,
    SoftcapHead,
    SwiGLU,
    llama,
)
from llm_lab.moe import MoE
from llm_lab.package import check_parts, config_from, load, save, to_data
from llm_lab.parts import part
from llm_lab.positions import RoPE
from llm_lab.runs import model_config
from llm_lab.sampling import DecodingState
from llm_lab.self_attention import Attention
from llm_lab.train import adamw, next_token_loss, train_step

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


def test_its_settings_are_those_of_a_configuration_with_their_types():
    of_config = {f.name: get_type_hints(GPTConfig)[f.name] for f in fields(GPTConfig)}
    own = {'vocab_size', 'attn'}  # parameters of `llama` itself
    assert get_type_hints(LlamaSettings) == {k: v for k, v in of_config.items() if k not in own}


def test_what_is_given_stays():
    given = llama(attn=part(Attention, bias=True)).attn
    assert given == part(Attention, bias=True, transforms=ROPE)
    base = part(RoPE, base=5e5)
    assert llama(rope=base).attn.keywords['transforms'] == (base,)


def test_it_is_the_block_of_a_run_description():
    described = config_from(model_data(ModelConfig(preset='llama')))
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


# ---- blocks that are wired otherwise

BLOCKS = [part(ParallelBlock), part(SandwichBlock)]
TOK = CharTokenizer('abcdefghijklmno \n')
each_block = pytest.mark.parametrize('block', BLOCKS, ids=str)


def small(block, **settings):
    sizes = dict(vocab_size=17, d_model=16, n_layers=2, n_heads=2, max_len=24)
    return shaken(llama(**sizes | settings, block=block))


def ids_of(B=2, T=24):
    return torch.randint(17, (B, T), generator=rng(0, 'ids'))


@each_block
def test_a_block_writes_the_same_with_a_cache_and_in_its_fast_form(block):
    model = small(block)
    want = model(ids_of()).detach()
    for form in (with_kv_cache(model), for_inference(model), for_inference(model, 'int8')):
        assert form.cache(1, 9)
        reader = DecodingState(form, 24)
        eps = 1e-5 if form.blocks[0].attn.qkv.weight.dtype == torch.float32 else 0.2
        near(reader(ids_of()[:, :9]), want[:, 8], eps)
        for t in range(9, 24):
            near(reader(ids_of()[:, t : t + 1]), want[:, t], eps)


@each_block
def test_a_block_is_saved_and_another_wiring_is_not_taken_for_it(block, tmp_path):
    model = small(block)
    assert config_from(to_data(model.cfg)) == model.cfg
    save(tmp_path / 'p', model, TOK)
    again = load(tmp_path / 'p').model
    assert again.cfg == model.cfg and torch.equal(again(ids_of()), model(ids_of()))
    plain = MiniGPT(replace(model.cfg, block=part(Block)))
    plain.load_state_dict(model.state_dict(), strict=False)
    assert not torch.allclose(plain(ids_of()), model(ids_of()), atol=1e-3)
    one_line(lambda: to_hf(tmp_path / 'hf', model, TOK), f'block={block!r} has no word in a')


@each_block
def test_a_block_learns_the_same_where_it_is_calculated_twice(block):
    moe = dict(mlp=part(MoE, n_experts=2, top_k=1))  # a part that adds to the loss
    mask = part(sliding_window, size=5)
    sparse = dict(attn=part(SparseAttention, mask=mask, transforms=(part(RoPE),)))
    for settings in ({}, moe, sparse):
        model = small(block, **settings).train()
        next_token_loss(model, ids_of()).backward()
        want = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        next_token_loss(apply_activation_checkpointing(model), ids_of()).backward()
        for p, g in zip(model.parameters(), want):
            torch.testing.assert_close(p.grad, g)
        optimizer = adamw(model, lr=0.01)
        losses = [train_step(model, optimizer, ids_of())[0].item() for _ in range(20)]
        assert losses[-1] < 0.9 * losses[0]


def test_a_block_in_a_config_and_in_data_that_have_none():
    run = read_config('smoke', ['model.preset=llama', 'model.block={part: ParallelBlock}'])
    assert model_config(run, 17).block == part(ParallelBlock)
    assert model_config(read_config('smoke'), 17).block == part(Block)
    data = to_data(GPTConfig())
    del data['block']  # as it was saved before the block was a recipe
    assert config_from(data) == GPTConfig()
    one_line(lambda: read_config('smoke', ['model.block=llama']), 'write model.preset=llama')
    one_line(
        lambda: read_config('smoke', ['model.block=ParallelBlock']),
        "model.block='ParallelBlock': did you mean model.block.part=ParallelBlock?",
    )
    one_line(lambda: GPTConfig(block=part(MLP)), 'MLP can be mlp, not block')


class NoPositions(Block):
    "A block of the reader's own that forgets what it is called with"

    def forward(self, x):
        return x


def test_a_block_that_cannot_read_is_named():
    one_line(
        lambda: check_parts(GPTConfig(block=part(NoPositions))),
        'block=part(NoPositions) cannot read',
        'it is called with (x, i, **ctx)',
    )


def test_a_wrong_keyword_is_told_by_llama():
    for wrong, remedy in (
        ('n_layer', "did you mean 'n_layers'?"),
        ('vocabulary_size', "did you mean 'vocab_size'?"),
        ('ropes', "did you mean 'rope'?"),
        ('xyz', 'choose from attn, block, d_head, d_model, depth, dropout'),
    ):
        with refused(f'llama takes no {wrong!r}: {remedy}'):
            llama(**{wrong: 2})
