"""`gqa`: the odd cases: head counts that do not fit, other attentions, and models that are not what
their configuration says."""

import pytest
import torch
from torch import nn

from llm_lab.core import LabError, rng
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.gqa import GQA, kv_heads, planned_cache_bytes, to_gqa
from llm_lab.init import spectral_init
from llm_lab.llama_block import llama
from llm_lab.moe import MoE
from llm_lab.package import config_from, to_data
from llm_lab.parts import part
from llm_lab.positions import RoPE
from llm_lab.self_attention import Attention

pytestmark = pytest.mark.usefixtures('one_thread')

SIZED = dict(d_model=64, n_heads=8, n_layers=2)


def modern(n_kv_heads, **kw):
    attn = part(GQA, n_kv_heads=n_kv_heads, transforms=(part(RoPE),))
    return llama(**SIZED, **kw, attn=attn)


class Other(Attention):
    pass


@pytest.mark.parametrize('n', [3, 0, 16, 2.0])
def test_head_counts_that_do_not_divide(n):
    with pytest.raises(
        LabError, match=f'n_kv_heads={n} does not divide n_heads=8: choose from 1, 2, 4, 8$'
    ):
        modern(n)


def test_head_counts_that_are_missing():
    with pytest.raises(LabError, match='n_kv_heads=None does not divide n_heads=4'):
        llama(attn=part(GQA))
    with pytest.raises(LabError, match='n_heads=4 does not divide d_model=33'):
        GPTConfig(d_model=33, attn=part(GQA, n_kv_heads=2))


def test_a_recipe_is_saved_and_compared():
    assert config_from(to_data(modern(2))) == modern(2)
    assert modern(2) != modern(4)


def test_what_another_attention_keeps_is_not_known():
    cfg = GPTConfig(attn=part(Other))
    for call in (kv_heads, planned_cache_bytes, lambda cfg: to_gqa(MiniGPT(cfg), 2)):
        with pytest.raises(LabError, match=r'attn=part\(Other\): what it keeps is not known'):
            call(cfg)


def fade(i, j, h, layer):
    return (j <= i) & (i - j <= 2**h + layer)


def test_a_mask_by_head_counts_query_heads():
    model = MiniGPT(llama(**SIZED, attn=part(GQA, n_kv_heads=2, mask=part(fade))))
    where = torch.arange(40)
    assert model.blocks[0].attn.dense_mask(where, where).shape[0] == 8


def test_as_many_groups_as_heads_is_no_change():
    model = MiniGPT(GPTConfig(**SIZED))
    same = to_gqa(model, 8)
    assert kv_heads(same.cfg) == 8
    for name, weight in same.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_a_copy_keeps_mode_recipe_and_dtype():
    model = MiniGPT(GPTConfig(**SIZED)).eval()
    few = to_gqa(model, 2)
    assert not few.training and model.cfg.attn == part(Attention)
    assert to_gqa(model.train(), 2).training
    assert next(to_gqa(MiniGPT(few.cfg).double(), 1).parameters()).dtype == torch.float64


def test_heads_of_a_group_are_pooled_in_their_order():
    model = MiniGPT(GPTConfig(**SIZED))
    draw = rng(0, 'shaken')
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=draw))
    few = to_gqa(model, 2, pool=lambda heads: heads[:, 0])
    for old, new in zip(model.blocks, few.blocks):
        for name in ('weight', 'bias'):
            q, k, v = getattr(old.attn.qkv, name).split(old.attn.sizes)
            new_q, new_k, new_v = getattr(new.attn.qkv, name).split(new.attn.sizes)
            assert torch.equal(q, new_q)
            for whole, chosen in ((k, new_k), (v, new_v)):
                heads = whole.unflatten(0, (8, 8))
                assert torch.equal(chosen.unflatten(0, (2, 8)), heads[[0, 4]])


@pytest.mark.parametrize('n', [4, 3, 0])
def test_groups_that_do_not_divide_the_heads_there_are(n):
    few = to_gqa(MiniGPT(GPTConfig(**SIZED)), 2)
    with pytest.raises(
        LabError, match=f'n_kv_heads={n} does not divide the 2 key and value heads of the model'
    ):
        to_gqa(few, n)


def test_a_model_that_is_not_its_configuration_is_refused():
    model = MiniGPT(GPTConfig(**SIZED))
    nn.utils.parametrize.register_parametrization(model.blocks[0].attn.qkv, 'weight', nn.Identity())
    with pytest.raises(
        LabError, match=r'blocks.0.attn.qkv.parametrizations \(ModuleDict\) was added'
    ):
        to_gqa(model, 2)
    spectral = MiniGPT(GPTConfig(**SIZED, init=part(spectral_init)))
    with pytest.raises(LabError, match='blocks.0.attn.qkv is not the plain linear layer'):
        to_gqa(spectral, 2)


def test_a_more_precise_router_stays_so():
    "A router in float32 within a model in bfloat16: its digits are not cut by the conversion"
    mixture = part(MoE, n_experts=2, top_k=1)
    model = MiniGPT(
        GPTConfig(vocab_size=9, max_len=8, d_model=16, n_heads=4, n_layers=1, mlp=mixture)
    )
    model = model.bfloat16()
    model.blocks[0].mlp.router.float()
    router = to_gqa(model, 2).blocks[0].mlp.router.weight
    assert router.dtype == torch.float32
    assert torch.equal(router, model.blocks[0].mlp.router.weight)
