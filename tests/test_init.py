"""`init`: projections wherever they stand, what a configuration refuses, spectral weights in
recomputation, low precision and files."""

import json
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llm_lab.core import LabError, rng
from llm_lab.efficient import apply_activation_checkpointing
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.init import merge_spectral, projections, scaled_init, spectral_init
from llm_lab.llama_block import SwiGLU
from llm_lab.package import config_from, to_data
from llm_lab.parts import part
from llm_lab.positions import RoPE, half_split
from llm_lab.self_attention import Attention

CFG = GPTConfig(d_model=64, mlp=part(SwiGLU))
IDS = torch.randint(65, (2, 40), generator=rng(0, 'ids'))


def refused(words):
    "A `LabError` with these words in it"
    return pytest.raises(LabError, match=re.escape(words))


class Twins(SwiGLU):
    "Two gated MLPs, their weights side by side, as experts have them"

    def __init__(self, cfg, layer=0):
        super().__init__(cfg, d_ff=8)
        for m in (self.up, self.out):
            m.weight = nn.Parameter(m.weight.detach().repeat(2, 1, 1))


def test_projections_side_by_side_are_named_one_by_one():
    twins = MiniGPT(GPTConfig(d_model=48, n_heads=4, n_layers=1, mlp=part(Twins)))
    assert [name for name in projections(twins) if 'mlp' in name] == [
        'blocks.0.mlp.0.up.0',
        'blocks.0.mlp.0.up.1',
        'blocks.0.mlp.1.up.0',
        'blocks.0.mlp.1.up.1',
        'blocks.0.mlp.0.out',
        'blocks.0.mlp.1.out',
    ]


def test_out_is_one_projection_even_with_as_many_rows_as_a_stack():
    odd = GPTConfig(
        d_model=96,
        n_heads=4,
        d_head=8,
        n_layers=1,
        mlp=part(SwiGLU, d_ff=48),
        init=part(scaled_init, out='zero'),
    )
    found = projections(MiniGPT(odd))
    for name in ('attn', 'mlp'):
        assert not found[f'blocks.0.{name}.out'].any()


def test_what_a_configuration_refuses():
    with refused('std=0.0: give a size above 0'):
        GPTConfig(init=part(scaled_init, std=0.0))
    with refused("out='loud': choose from depth, plain, zero"):
        GPTConfig(init=part(scaled_init, out='loud'))


def test_what_cannot_be_bound_is_refused():
    silent = part(spectral_init, first=part(scaled_init, out='zero'))
    with refused('begins at zero'):
        MiniGPT(replace(CFG, init=silent))
    with refused('projections side by side'):
        MiniGPT(replace(CFG, mlp=part(Twins), init=part(spectral_init)))
    with refused('no weights are bound; use the model'):
        merge_spectral(MiniGPT())


def gradients_after_a_nudge(model):
    "All weights are moved, so that there is a direction to follow"
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=rng(0, 'nudge')))
    model(IDS).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_blocks_that_run_twice_have_the_same_gradient():
    once, twice = (MiniGPT(replace(CFG, init=part(spectral_init))) for _ in range(2))
    want = gradients_after_a_nudge(once)
    got = gradients_after_a_nudge(apply_activation_checkpointing(twice))
    assert_close(got, want, atol=1e-6, rtol=0)


def test_low_precision_stays_outside():
    held = MiniGPT(replace(CFG, init=part(spectral_init, gain=2.0))).train()
    with torch.autocast('cpu', torch.bfloat16):
        held(IDS)
    assert held.blocks[0].attn.qkv.parametrizations.weight[0].u.dtype == torch.float32


def test_there_and_back_through_a_file():
    held = MiniGPT(replace(CFG, init=part(spectral_init, gain=2.0))).eval()
    saved = MiniGPT(config_from(json.loads(json.dumps(to_data(held.cfg)))), seed=1)
    saved.load_state_dict(held.state_dict())
    assert torch.equal(saved.eval()(IDS), held(IDS))


def test_merged_it_is_a_plain_model():
    held = MiniGPT(replace(CFG, init=part(spectral_init, gain=2.0)))
    merged = merge_spectral(held)
    assert merged.cfg == replace(held.cfg, init=part(scaled_init))
    assert_close(merged(IDS), held.eval()(IDS), atol=1e-6, rtol=0)


def test_bound_weights_are_reordered_for_half_split_pairs():
    attn = part(Attention, transforms=(part(RoPE, interleaved=True),))
    both = MiniGPT(replace(CFG, attn=attn, init=part(spectral_init))).eval()
    assert_close(half_split(both)(IDS), both(IDS), atol=1e-5, rtol=0)
