"""`families`: the odd cases: settings of config.json that are refused, recipes that no file has a
word for, and the helpers that bring a recipe into its normal form."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from llm_lab.core import LabError
from llm_lab.families import (
    _at,
    _context,
    _d_ff,
    _in_turn,
    _layers,
    _mask_of,
    _narrow,
    _reader,
    _rope,
    _unlike,
    canonical,
    config_from_hf,
    hf_config,
    hf_views,
)
from llm_lab.gpt import GPTConfig, MLP, MiniGPT
from llm_lab.gqa import GQA
from llm_lab.kernels import SparseAttention
from llm_lab.kv_cache import sliding_window
from llm_lab.llama_block import QKNorm, RMSNorm, SoftcapHead, SwiGLU, llama
from llm_lab.moe import MoE, Router, sigmoid_top_k, softmax_top_k
from llm_lab.parts import part
from llm_lab.positions import RoPE, SinusoidalPositions, linear_scaling
from llm_lab.self_attention import Attention, causal
from llm_lab.sparse import alternate, attention_sinks

pytestmark = pytest.mark.usefixtures('one_thread')

SMALL = llama(d_model=32, n_heads=4, n_layers=2, max_len=64, attn=part(GQA, n_kv_heads=2))
MIXTURE = part(MoE, n_experts=4, expert=part(SwiGLU, d_ff=24), router=part(Router, z=0.0))
MOE = replace(SMALL, mlp=MIXTURE)
TINY = dict(
    model_type='llama',
    vocab_size=65,
    hidden_size=32,
    intermediate_size=88,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
MIXTRAL = TINY | dict(
    model_type='mixtral',
    intermediate_size=24,
    num_local_experts=4,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
)
QWEN = TINY | dict(
    model_type='qwen3_moe',
    num_experts=4,
    num_experts_per_tok=1,
    moe_intermediate_size=24,
    num_hidden_layers=6,
)


def looks(size, **kw):
    "The small Llama, each of its queries reading the last `size` keys"
    mask = part(sliding_window, size=size)
    return replace(SMALL, attn=part(SparseAttention, **SMALL.attn.keywords, **kw, mask=mask))


def refused(f, words):
    with pytest.raises(LabError) as e:
        f()
    assert words in str(e.value), str(e.value)


# ---- tensors


def test_a_tensor_without_a_name_is_refused():
    refused(
        lambda: hf_views(MiniGPT(GPTConfig(d_model=32, n_layers=1)), 'llama'),
        'pos.table.weight has no name in a llama file: save it with llm_lab.package.save',
    )
    biased = MiniGPT(replace(MOE, mlp=part(MIXTURE, expert=part(SwiGLU, bias=True))))
    refused(lambda: hf_views(biased, 'mixtral'), 'experts.up.bias has no name in a mixtral file')


# ---- from config.json


def test_rope_of_new_files_and_old_ones():
    size = dict(max_position_embeddings=64)
    assert _rope(size | dict(rope_theta=500), 'llama') == part(
        RoPE, base=500, partial=1.0, scale=None
    )
    scaled = _rope(size | dict(rope_scaling=dict(type='linear', factor=2.0)), 'llama')
    assert scaled.keywords['scale'] == part(linear_scaling, factor=2.0)
    half = dict(partial_rotary_factor=0.5, **size)
    refused(lambda: _rope(half, 'llama'), 'llama rotates all channels')
    assert _rope(half, 'phi3').keywords['partial'] == 0.5


def test_the_context():
    assert [_context('llama', 64, n) for n in (None, 9)] == [64, 9]
    refused(
        lambda: _context('llama', 64, 65),
        'this file has 64 positions: give a number up to that',
    )


def test_the_window_of_each_family():
    nine = dict(sliding_window=9)
    window = part(sliding_window, size=9)
    assert [_mask_of(nine, f, 64) for f in ('phi3', 'mistral')] == [window] * 2
    # a key that is not read, or not used
    assert [_mask_of(nine, f, 64) for f in ('llama', 'qwen3')] == [part(causal)] * 2
    refused(
        lambda: _mask_of(nine | dict(use_sliding_window=True), 'qwen3', 64),
        'of 64; give max_len=9',
    )


@pytest.mark.parametrize(
    'wrong,words',
    [
        (dict(model_type='gemma2'), "model_type='gemma2': this library reads gpt2, llama, mistral"),
        (dict(hidden_act='quick_gelu'), "hidden_act='quick_gelu': only gelu_new, gelu_pytorch_tan"),
        (
            dict(rope_scaling=dict(type='yarn')),
            "rope_type='yarn': llama is read with default, linear",
        ),
        (dict(quantization_config=dict(bits=4)), "config={'bits': 4}: only None can be read"),
        (dict(attn_logit_softcapping=50.0), 'attn_logit_softcapping=50.0: only None can be read'),
        (dict(model_type='mistral', sliding_window=0), 'sliding_window=0: a whole number above 0'),
        (dict(hidden_size='32'), "hidden_size='32': a whole number above 0 belongs there"),
    ],
)
def test_settings_that_are_refused(wrong, words):
    refused(lambda: config_from_hf(TINY | wrong), words)


@pytest.mark.parametrize(
    'base,wrong,words',
    [
        (QWEN, dict(num_local_experts=5), 'num_experts=[4, 5]: the two words contradict each'),
        (QWEN, dict(num_experts_per_tok=5), 'top_k=5: there are 4 experts; give at most that'),
        (QWEN, dict(norm_topk_prob=1), 'norm_topk_prob=1: true or false belongs there'),
        (QWEN, dict(mlp_only_layers=3), 'mlp_only_layers=3: a list of layers belongs there'),
        (QWEN, dict(router_aux_loss_coef=-1), 'balance=-1: give 0 or a little more'),
        (
            MIXTRAL,
            dict(router_jitter_noise=0.1),
            'jitter_noise=0.1: it matters in training only; write 0',
        ),
    ],
)
def test_settings_of_experts_that_are_refused(base, wrong, words):
    refused(lambda: config_from_hf(base | wrong), words)


def test_the_number_of_experts_under_either_key():
    other = {k: v for k, v in QWEN.items() if k != 'num_experts'}
    assert config_from_hf(other | dict(num_local_experts=4)) == config_from_hf(QWEN)


# ---- the normal form


def test_one_recipe_for_each_attention():
    eight = GPTConfig(max_len=8)

    def of(f, size, **kw):
        return _reader(part(f, mask=part(sliding_window, size=size), **kw), eight)

    assert [of(GQA, 8, n_kv_heads=4), of(SparseAttention, 9)] == [part(Attention)] * 2
    assert [of(GQA, 7, n_kv_heads=4), of(Attention, 7)] == [of(SparseAttention, 7)] * 2
    assert of(SparseAttention, 8, n_kv_heads=2) == part(GQA, n_kv_heads=2)
    # a sink is felt in every sequence
    assert of(SparseAttention, 8, sink=True).func is SparseAttention


def test_layers_in_turn():
    a = part(SwiGLU)
    b = part(MLP)
    c = part(MoE)

    def turns(*of, n=6):
        return _in_turn(_layers(GPTConfig(n_layers=n, mlp=part(alternate, of=of))))

    assert turns(a) == turns(a, a) == a
    assert turns(a, b) == turns(a, b, a, b) == part(alternate, of=(a, b))
    assert turns(a, b, n=1) == a
    assert turns(a, part(alternate, of=(b, c)), n=4) == part(alternate, of=(a, c))
    assert turns(a, b, n=3) == part(alternate, of=(a, b))  # the third is the first again
    assert _at(part(alternate, of=(a, b), d_ff=8), 1) == part(MLP, d_ff=8)


def test_a_width_that_goes_without_saying():
    # a mixture has no width of its own
    assert [_d_ff(SMALL, part(f)) for f in (SwiGLU, MLP, MoE)] == [88, 128, None]
    assert _narrow(SMALL, part(SwiGLU, d_ff=88)) == part(SwiGLU)
    assert _narrow(SMALL, part(SwiGLU, d_ff=80)) == part(SwiGLU, d_ff=80)


def test_where_two_recipes_differ():
    def rotated(**kw):
        return part(Attention, transforms=(part(QKNorm), part(RoPE, **kw)))

    a = rotated(base=5.0, partial=0.5)
    assert [*_unlike(a, rotated(partial=0.25), 'attn')] == [
        ('attn.transforms[1].base', 5.0),
        ('attn.transforms[1].partial', 0.5),
    ]
    assert [*_unlike(rotated(partial=1.0), rotated(), 'attn')] == []


# ---- into config.json


def near(i, j):
    return (j <= i) & (i - j < 8)


@pytest.mark.parametrize(
    'cfg,words',
    [
        (
            llama(mlp=part(SwiGLU, act=part(nn.Tanh))),
            'mlp.act=part(nn.Tanh) has no word in a llama',
        ),
        (llama(lm_head=part(SoftcapHead)), 'lm_head=part(SoftcapHead) has no word in a llama file'),
        (
            replace(SMALL, pos=part(SinusoidalPositions)),
            'pos=part(SinusoidalPositions) has no word in a llama file',
        ),
        (
            GPTConfig(attn=part(Attention, mask=part(near))),
            'attn.mask=part(near) has no word in a',
        ),
        (looks(9, sink=True), 'attn.sink=True has no word in a mistral file'),
        (
            llama(attn=part(SparseAttention, mask=part(attention_sinks))),
            'mask=part(attention_sinks) has no word in a',
        ),
        (GPTConfig(norm=part(RMSNorm)), 'norm=part(RMSNorm) has no word in a gpt2 file'),
        (
            replace(SMALL, dropout=0.1),
            'dropout=0.1 has no word in a llama file: it matters in training',
        ),
        (
            llama(rope=part(RoPE, interleaved=True)),
            'interleaved=True has no word in a llama file: convert the model with half_split(mode',
        ),
    ],
)
def test_what_no_file_can_say(cfg, words):
    refused(lambda: hf_config(cfg), words)


def test_an_unknown_family():
    refused(lambda: hf_config(SMALL, 'phi4'), "family='phi4': choose from gpt2")


def with_router(**kw):
    return part(MIXTURE, router=part(MIXTURE.keywords['router'], **kw))


@pytest.mark.parametrize(
    'mlp,words',
    [
        (
            part(MoE),
            'mlp.router.z=0.001 has no word in a mixtral file: it matters in training only; set '
            'it to 0',
        ),
        (
            part(MIXTURE, capacity=1.25),
            'mlp.capacity=1.25 has no word in a mixtral file: it matters in training only',
        ),
        (
            part(MIXTURE, shared=1),
            'mlp.shared=1 has no word in a mixtral file: change it, or save with '
            'llm_lab.package.save',
        ),
        (
            with_router(bias_rate=0.001),
            'mlp.router.bias_rate=0.001 has no word in a mixtral file: change it',
        ),
        (
            with_router(choose=part(sigmoid_top_k)),
            'mlp.router.choose=part(sigmoid_top_k) has no word in a mixtral',
        ),
        (
            with_router(importance=True),
            'mlp.router.importance=True has no word in a mixtral file: it matters',
        ),
        (
            part(MIXTURE, expert=part(MLP)),
            'mlp.expert=part(MLP) has no word in a mixtral file: change it',
        ),
    ],
)
def test_what_no_file_can_say_about_experts(mlp, words):
    refused(lambda: hf_config(replace(MOE, mlp=mlp)), words)


def test_the_words_of_a_configuration_come_back():
    assert config_from_hf(TINY) == SMALL
    assert config_from_hf(hf_config(MOE)) == canonical(MOE)
    choose = part(softmax_top_k, renormalize=False)
    kept = replace(MOE, mlp=with_router(choose=choose))
    refused(lambda: hf_config(kept, 'mixtral'), 'mlp.router.choose')
    assert next(iter(hf_views(MiniGPT(MOE), 'mixtral').values())).dtype == torch.float32
