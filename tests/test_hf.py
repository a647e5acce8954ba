"""`families` and `hub` against published models: weights, logits, gradients, texts and defaults of
transformers.

Five random models of each family, drawn by seed (one of each in `make test`, see cases.py). Each
is made by transformers, saved, opened by us, saved by us and opened by transformers."""

import json
import random
import shutil
from dataclasses import replace
from functools import cache

import pytest
import torch
from cases import ALL, crossed, some
from helpers import one_line
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from llm_lab.bpe import BPETokenizer
from llm_lab.kv_cache import CacheTransform, RollingCache, with_kv_cache, sliding_window
from llm_lab.chars import CharTokenizer
from llm_lab.families import (
    HF_ACTIVATIONS,
    DEFAULTS,
    TENSOR_NAMES,
    config_from_hf,
    hf_config,
    canonical,
    hf_views,
)
from llm_lab.inference import for_inference
from llm_lab.gpt import MLP, GPTConfig, MiniGPT
from llm_lab.self_attention import Attention, causal
from llm_lab.parts import Aux, part
from llm_lab.gqa import GQA
from llm_lab.hub import from_hf, to_hf
from llm_lab.kernels import SparseAttention, choose_kernel
from llm_lab.core import LabError, rng
from llm_lab.llama_block import QKNorm, RMSNorm, SwiGLU, llama
from llm_lab.positions import RoPE, half_split, linear_scaling, llama3_scaling
from llm_lab.moe import MoE, Router, balance_loss, softmax_top_k, top_k_softmax
from llm_lab.sampling import generate
from llm_lab.sparse import alternate

transformers = pytest.importorskip('transformers', reason='pip install transformers')
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

FAMILIES, SEEDS, T, NEW = list(TENSOR_NAMES), range(5), 24, 50
SCALED = dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
EVERY = [(f, s) for f in FAMILIES for s in SEEDS]
KINDS = crossed(FAMILIES, SEEDS)
LENGTH = T + NEW


def drawn(family, seed):
    """Settings of a random configuration of theirs; among the five seeds of a family every switch
    stands both ways"""
    r = random.Random(f'{family}/{seed}')
    H = r.choice([2, 3, 4, 6])
    C = H * r.choice([4, 6, 8, 10])
    tie = seed % 2 == 0
    if family == 'gpt2':
        return dict(
            vocab_size=r.randint(20, 90),
            n_positions=r.randint(LENGTH, 100),
            n_embd=C,
            n_layer=r.randint(1, 3),
            n_head=H,
            n_inner=[None, 4 * C, 3 * C + 1, 50, None][seed],
            layer_norm_epsilon=r.choice([1e-5, 1e-3]),
            tie_word_embeddings=tie,
            activation_function=['gelu_new', 'gelu', 'relu', 'gelu_pytorch_tanh', 'silu'][seed],
            resid_pdrop=0.1,
            embd_pdrop=0.1,
            attn_pdrop=0.1,
        )
    fewer = [n for n in range(1, H) if H % n == 0][-1]
    out = dict(
        vocab_size=r.randint(20, 90),
        hidden_size=C,
        intermediate_size=r.choice([2 * C, 50, 33]),
        num_hidden_layers=r.randint(1, 3),
        num_attention_heads=H,
        num_key_value_heads=[H, 1, fewer, fewer, H][seed],
        max_position_embeddings=r.randint(LENGTH, 100),
        rms_norm_eps=r.choice([1e-6, 1e-5, 1e-3]),
        tie_word_embeddings=tie,
    )
    rope = dict(rope_type='default', rope_theta=r.choice([100.0, 10_000.0, 500_000.0]))
    if family != 'phi3':
        out['head_dim'] = [C // H, 4, 14, 8, 16][seed] if C // H % 2 == 0 else 12
    if family in ('llama', 'qwen3', 'qwen3_moe'):
        out['attention_bias'] = seed in (1, 2)
    experts = dict(
        num_experts_per_tok=[2, 1, 3, 2, 1][seed], router_aux_loss_coef=r.choice([0.0, 0.001, 0.02])
    )
    if family == 'mixtral':
        out |= experts | dict(num_local_experts=[4, 8, 4, 8, 5][seed])
    if family == 'qwen3_moe':
        out |= experts | dict(
            num_experts=[4, 8, 4, 8, 5][seed],
            moe_intermediate_size=r.choice([C, 20, 11]),
            norm_topk_prob=seed in (1, 3),
        )
        out |= [
            {},
            dict(num_hidden_layers=3, decoder_sparse_step=2),
            {},
            dict(num_hidden_layers=3, mlp_only_layers=[1, 2]),
            {},
        ][seed]
    if family in ('mistral', 'mixtral'):
        out['sliding_window'] = [None, 200, None, LENGTH + 40, None][seed]
    if family == 'llama':
        out['mlp_bias'] = seed in (2, 3)
        if seed == 3:
            rope |= dict(rope_type='linear', factor=4.0)
        if seed == 4:
            rope |= SCALED | dict(original_max_position_embeddings=32)
    if family == 'phi3':
        if (C // H) % 4 == 0:
            rope['partial_rotary_factor'] = r.choice([0.5, 1.0])
        if seed == 1:
            out['hidden_size'], rope['partial_rotary_factor'] = H * 8, 0.75
    return out | dict(rope_parameters=rope)


def loud(model, seed):
    "First weights that hide no mistake: no norm is 1, no bias is 0"
    with torch.no_grad():
        for n, p in model.named_parameters():
            norm = p.dim() == 1 and ('norm' in n or 'ln_' in n) and 'bias' not in n
            p.copy_(torch.randn(p.shape, generator=rng(seed, n)) * 0.15 + norm)
    return model.eval()


def theirs_of(family, **settings):
    ids = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return slow(
        transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(family, **ids | settings)
        )
    )


def slow(model):
    "Their experts one after the other; their quick way wants widths that are multiples of 4"
    if model.config.model_type in ('mixtral', 'qwen3_moe'):
        model.set_experts_implementation('eager')
    return model


def load(folder):
    "Their model, and their report of how loading went"
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype='auto'
    )
    return slow(model).eval(), info


@cache
def made(root, family, seed):
    "(their model, its folder, ours)"
    theirs = loud(theirs_of(family, **drawn(family, seed)), seed)
    theirs.save_pretrained(folder := root / f'{family}-{seed}')
    return theirs, folder, from_hf(folder).model


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp('hf')
    yield lambda family, seed: made(root, family, seed)
    made.cache_clear()


def same_file(a, b):
    with (
        safe_open(a / 'model.safetensors', 'pt') as x,
        safe_open(b / 'model.safetensors', 'pt') as y,
    ):
        assert sorted(x.keys()) == sorted(y.keys())
        for n in x.keys():
            a, b = x.get_tensor(n), y.get_tensor(n)
            assert a.dtype == b.dtype and torch.equal(a, b), n


# ---- the same function


def test_the_draw_covers_what_it_should():
    said = [(f, drawn(f, s)) for f, s in EVERY]
    heads = {
        (f, 'all' if d['num_key_value_heads'] == d['num_attention_heads'] else 'fewer')
        for f, d in said
        if f != 'gpt2'
    }
    assert len(heads) == 2 * len(FAMILIES) - 2 and len(
        {(f, d['tie_word_embeddings']) for f, d in said}
    ) == 2 * len(FAMILIES)
    odd = {
        f
        for f, d in said
        if f != 'gpt2'
        and d.get('head_dim', 0) * d['num_attention_heads'] not in (0, d['hidden_size'])
    }
    assert odd == {*FAMILIES} - {'gpt2', 'phi3'}
    assert {d['rope_parameters']['rope_type'] for f, d in said if f == 'llama'} == {
        'default',
        'linear',
        'llama3',
    }
    assert {
        d['rope_parameters'].get('partial_rotary_factor', 1.0) for f, d in said if f == 'phi3'
    } > {1.0}


def filed(family, tensors):
    """Their tensors in memory, where the experts of a layer are fused, under the names and in the
    shapes of their file"""
    out, old = {}, family == 'mixtral'
    gate, up, down = ('w1', 'w3', 'w2') if old else ('gate_proj', 'up_proj', 'down_proj')
    for n, w in tensors.items():
        n = n.replace('.mlp.', '.block_sparse_moe.') if old else n
        where, _, kind = n.partition('.experts.')
        if not kind:
            out[n] = w
        for e, one in enumerate(w if kind else ()):
            pieces = zip((gate, up), one.chunk(2)) if kind == 'gate_up_proj' else [(down, one)]
            out |= {f'{where}.experts.{e}.{name}.weight': piece for name, piece in pieces}
    return out


def both_ways(theirs, ours, family, ids):
    "Logits of both, and {their name: gradient} of both"
    logits = ours(ids), theirs(ids).logits
    for model, out in zip((ours, theirs), logits):
        model.zero_grad()
        F.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    mine = hf_views(ours, family, {n: p.grad for n, p in ours.named_parameters()})
    other = filed(family, {n: p.grad for n, p in theirs.named_parameters()})
    assert mine.keys() == other.keys()  # no weight is forgotten on either side
    return *logits, mine, other


def greedy(model, ids):
    return torch.stack(list(generate(model, ids, NEW, temperature=0)), 1).tolist()


def their_greedy(theirs, ids, **kw):
    out = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **kw,
    )
    return out[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize('family,seed', KINDS)
def test_logits_and_gradients_equal_theirs(pair, family, seed):
    theirs, _, ours = pair(family, seed)
    ids = torch.randint(ours.cfg.vocab_size, (2, T), generator=rng(seed, 'ids'))
    got, want, mine, other = both_ways(theirs, ours, family, ids)
    assert want.abs().max() > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    for n in other:
        torch.testing.assert_close(mine[n], other[n], rtol=0, atol=1e-5, msg=lambda m: f'{n}: {m}')


@pytest.mark.parametrize('family,seed', KINDS)
def test_fifty_tokens_are_theirs(pair, family, seed):
    theirs, _, ours = pair(family, seed)
    ids = torch.randint(ours.cfg.vocab_size, (2, 6), generator=rng(seed, 'prompt'))
    assert greedy(ours, ids) == their_greedy(theirs, ids)


@pytest.mark.parametrize('base', [10_000.0, 500_000.0, 1e6])
def test_the_hands_stand_at_the_same_bits_far_out(base):
    """At position 100,000, speeds that differ in the last bit would turn the first hands to other
    places"""
    far = torch.tensor([0, 1, 8191, 99_999])
    for rope, scale in (
        (dict(rope_type='default'), None),
        (dict(rope_type='linear', factor=4.0), part(linear_scaling, factor=4.0)),
        (SCALED | dict(original_max_position_embeddings=8192), part(llama3_scaling)),
    ):
        cfg = transformers.LlamaConfig(
            head_dim=128,
            num_attention_heads=1,
            max_position_embeddings=131_072,
            rope_parameters=rope | dict(rope_theta=base),
        )
        theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(cfg)
        ours = RoPE(GPTConfig(d_model=128, n_heads=1), base=base, scale=scale)
        # there the formula is rewritten
        same = dict(rtol=0, atol=0) if rope['rope_type'] != 'llama3' else dict(rtol=2e-7, atol=0)
        torch.testing.assert_close(ours.freq[64:], theirs.inv_freq, **same)
        if rope['rope_type'] != 'llama3':
            c, s = ours.cos_sin(far, torch.ones(()))
            x = torch.ones(1, len(far), 1)
            assert torch.equal(c, theirs(x, far[None])[0][0]) and torch.equal(
                s[:, 64:], theirs(x, far[None])[1][0, :, 64:]
            )


@pytest.mark.parametrize('family,seed', KINDS)
def test_there_and_back_is_the_same_file(pair, tmp_path, family, seed):
    theirs, folder, ours = pair(family, seed)
    to_hf(tmp_path / 'back', ours, family=family)
    same_file(folder, tmp_path / 'back')
    with safe_open(tmp_path / 'back' / 'model.safetensors', 'pt') as f:
        assert f.metadata() == {'format': 'pt'}  # older readers ask for it
    back, info = load(tmp_path / 'back')
    assert {k: list(v) for k, v in info.items()} == dict.fromkeys(info, []) and len(info) >= 4
    want, got = theirs.config.to_dict(), back.config.to_dict()
    window = got.pop('sliding_window', None), want.pop('sliding_window', None)
    assert window[0] is None
    names = (DEFAULTS[family].keys() | {'rope_parameters', 'model_type'}) - {
        'sliding_window',
        'n_inner',
    }
    if family == 'qwen3_moe':  # their word in memory; a width that may be nobody's
        names = names - {'num_experts'} | {'num_local_experts'}
        if all(hasattr(o.mlp, 'experts') for o in back.model.layers):
            names -= {'intermediate_size'}
        assert [hasattr(o.mlp, 'experts') for o in back.model.layers] == [
            hasattr(o.mlp, 'experts') for o in theirs.model.layers
        ]
    if family == 'phi3':
        want['head_dim'] = want['hidden_size'] // want['num_attention_heads']  # it may stay unsaid
    act = 'activation_function' if family == 'gpt2' else 'hidden_act'
    assert HF_ACTIVATIONS[got[act]] == HF_ACTIVATIONS[want.pop(act)]  # some have two names
    assert {k: got.get(k) for k in names - {act}} == {k: want.get(k) for k in names - {act}}
    ids = torch.randint(ours.cfg.vocab_size, (2, T), generator=rng(seed, 'ids'))
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, theirs(ids).logits, rtol=0, atol=5e-6)


# ---- windows shorter than the text

WINDOWS = [
    (f, size, seed)
    for f, (seed, size) in crossed(
        ('mistral', 'phi3', 'mixtral', 'qwen3_moe'), enumerate((1, 7, 16, 40))
    )
]
windowed = pytest.mark.parametrize('family,size,seed', WINDOWS)


@pytest.fixture(scope='module')
def narrow(tmp_path_factory):
    root = tmp_path_factory.mktemp('windows')

    @cache
    def made(family, size, seed):
        said = drawn(family, seed) | dict(sliding_window=size, max_position_embeddings=128)
        if family == 'qwen3_moe':
            said['use_sliding_window'] = True
        theirs = loud(theirs_of(family, **said), seed)
        theirs.save_pretrained(root / f'{family}-{size}')
        return theirs, root / f'{family}-{size}', from_hf(root / f'{family}-{size}').model

    return made


def near(size):
    return part(sliding_window, size=size)


def text(model, T, seed=0):
    return torch.randint(model.cfg.vocab_size, (2, T), generator=rng(seed, 'text'))


def changed(model, **kw):
    "The same weights; other keywords of the attention"
    other = MiniGPT(replace(model.cfg, attn=part(model.cfg.attn, **kw))).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_both_kernels_are_asked():
    assert [choose_kernel(near(size), 100)[0] for size in (1, 7, 16, 40)] == ['folds'] * 3 + [
        'dense'
    ]


@windowed
def test_a_window_is_theirs(narrow, family, size, seed):
    theirs, _, ours = narrow(family, size, seed)
    assert ours.cfg.attn.func is SparseAttention and ours.cfg.attn.keywords['mask'] == near(size)
    got, want, mine, other = both_ways(theirs, ours, family, text(ours, 100))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())
    big = max(g.abs().max() for g in other.values()).item()
    for n in other:
        torch.testing.assert_close(
            mine[n], other[n], rtol=0, atol=1e-5 * big, msg=lambda m: f'{n}: {m}'
        )
    with torch.no_grad():  # which key is read: the last is size − 1 back
        for wrong in (size + 1, size - 1 or 2):
            assert (changed(ours, mask=near(wrong))(text(ours, 100)) - want).abs().max() > 1e-4


@windowed
@pytest.mark.parametrize('prompt', [3, 60] if ALL else [60])
def test_fifty_tokens_through_a_window_are_theirs(narrow, family, size, seed, prompt):
    theirs, _, ours = narrow(family, size, seed)
    ids, kept = text(ours, prompt, 1), with_kv_cache(ours)
    with torch.no_grad():
        sliding = theirs(ids, use_cache=True).past_key_values
    assert all(layer.is_sliding for layer in sliding.layers)  # theirs forgets, too
    # at 1, their cache keeps all keys (−1 + 1 is not the end)
    want = their_greedy(theirs, ids, use_cache=size > 1)
    assert {(type(c), c.length) for c in kept.cache(2, 128).values()} == {(RollingCache, size)}
    assert for_inference(ours).simple
    for model in (ours, kept, for_inference(ours)):
        assert greedy(model, ids) == want


@windowed
def test_a_window_goes_there_and_back(narrow, tmp_path, family, size, seed):
    theirs, folder, ours = narrow(family, size, seed)
    to_hf(tmp_path / 'back', ours, family=family)
    same_file(folder, tmp_path / 'back')
    back, info = load(tmp_path / 'back')
    assert {k: list(v) for k, v in info.items()} == dict.fromkeys(info, []) and len(info) >= 4
    assert back.config.sliding_window == size and from_hf(tmp_path / 'back').model.cfg == ours.cfg
    ids = text(ours, 100)
    with torch.no_grad():
        assert torch.equal(back(ids).logits, theirs(ids).logits)
    for attn in (
        part(GQA, **{'n_kv_heads': ours.cfg.n_heads} | ours.cfg.attn.keywords),
        part(ours.cfg.attn, n_kv_heads=None),
    ):
        if attn.func is GQA or 'n_kv_heads' not in ours.cfg.attn.keywords:
            assert hf_config(replace(ours.cfg, attn=attn), family) == hf_config(ours.cfg, family)


def test_a_shorter_context_may_end_the_window(narrow):
    theirs, folder, ours = narrow('mistral', 16, 2)
    plain = from_hf(folder, max_len=16).model
    assert plain.cfg == replace(
        ours.cfg,
        max_len=16,
        attn=part(GQA, **{k: v for k, v in ours.cfg.attn.keywords.items() if k != 'mask'}),
    )
    assert from_hf(folder, max_len=17).model.cfg == replace(ours.cfg, max_len=17)
    ids = text(ours, 17)
    with torch.no_grad():
        want = theirs(ids).logits
        torch.testing.assert_close(plain(ids[:, :16]), want[:, :16], rtol=0, atol=1e-5)
        assert (plain(ids) - want).abs().max() > 1e-3  # one token more, and the window is felt


def test_words_that_a_family_does_not_read(narrow):
    _, _, ours = narrow('mistral', 7, 1)
    said = hf_config(ours.cfg)
    assert config_from_hf(said | dict(use_sliding_window=False)) == ours.cfg  # a word of Qwen's
    theirs = loud(
        theirs_of(
            'mistral', **drawn('mistral', 1) | dict(sliding_window=7, use_sliding_window=False)
        ),
        1,
    )
    other = loud(theirs_of('mistral', **drawn('mistral', 1) | dict(sliding_window=7)), 1)
    with torch.no_grad():
        assert torch.equal(theirs(ids := text(ours, 60)).logits, other(ids).logits)
    assert config_from_hf(hf_config(MiniGPT(llama()).cfg) | dict(sliding_window=8)) == canonical(
        llama()
    )


# ---- experts

GRID = [('mixtral', E, k, True) for E in (4, 8) for k in (1, 2, 3)] + [
    ('qwen3_moe', E, k, norm) for E in (4, 8) for k in (1, 2, 3) for norm in (False, True)
]
if not ALL:
    GRID = [
        ('mixtral', 4, 2, True),
        ('mixtral', 8, 1, True),
        ('qwen3_moe', 4, 1, True),
        ('qwen3_moe', 4, 3, False),
        ('qwen3_moe', 8, 2, True),
    ]
mixtures = pytest.mark.parametrize('family,E,k,norm', GRID)


@pytest.fixture(scope='module')
def mixture(tmp_path_factory):
    root = tmp_path_factory.mktemp('experts')

    @cache
    def made(family, E, k, norm, layers=3):
        own = (
            dict(num_local_experts=E)
            if family == 'mixtral'
            else dict(
                num_experts=E,
                norm_topk_prob=norm,
                moe_intermediate_size=20,
                decoder_sparse_step=1 + (E == 8 and layers > 1),
                head_dim=12,
            )
        )
        sizes = dict(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=44,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            num_experts_per_tok=k,
            router_aux_loss_coef=0.03,
        )
        theirs = loud(theirs_of(family, **sizes | own), k)
        if E == 8:
            theirs.set_experts_implementation('grouped_mm')  # both of their ways
        theirs.save_pretrained(folder := root / f'{family}-{E}-{k}-{norm}-{layers}')
        return theirs, folder, from_hf(folder).model

    return made


def test_the_grid_covers_what_it_should(mixture):
    mlps = [mixture(*case)[2].cfg.mlp for case in GRID]
    assert {m.func for m in mlps} == {MoE, alternate} and len({repr(m) for m in mlps}) == len(GRID)


@mixtures
def test_experts_are_theirs(mixture, family, E, k, norm):
    theirs, _, ours = mixture(family, E, k, norm)
    got, want, mine, other = both_ways(theirs, ours, family, text(ours, 60))
    assert want.abs().max() > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    for n, g in other.items():
        if n.endswith('.gate.weight'):
            assert (g.abs().max() > 1e-5) != (k == 1 and norm)  # always 1: nothing to learn
        torch.testing.assert_close(
            mine[n],
            g,
            rtol=0,
            atol=1e-5 * max(g.abs().max().item(), 1e-3),
            msg=lambda m: f'{n}: {m}',
        )


@mixtures
def test_experts_lie_in_files_as_theirs(mixture, tmp_path, family, E, k, norm):
    theirs, folder, ours = mixture(family, E, k, norm)
    to_hf(tmp_path / 'back', ours, family=family)
    # names, shapes and bits are what their save_pretrained wrote
    same_file(folder, tmp_path / 'back')
    at = {
        n: [int(w.untyped_storage().data_ptr()), tuple(w.shape)]
        for n, w in hf_views(ours, family).items()
    }
    assert {n: tuple(s) for n, (_, s) in at.items()} == {
        n: tuple(w.shape) for n, w in load_file(folder / 'model.safetensors').items()
    }
    # views, no copies
    assert {p for p, _ in at.values()} == {
        p.untyped_storage().data_ptr() for p in ours.parameters()
    }
    back, info = load(tmp_path / 'back')
    assert {k: list(v) for k, v in info.items()} == dict.fromkeys(info, []) and len(info) >= 4
    again = from_hf(tmp_path / 'back').model
    assert again.cfg == ours.cfg and all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values())
    )
    with torch.no_grad():
        torch.testing.assert_close(back(ids := text(ours, 60)).logits, ours(ids), rtol=0, atol=1e-5)


@mixtures
def test_experts_write_what_theirs_write(mixture, family, E, k, norm):
    theirs, _, ours = mixture(family, E, k, norm)
    ids = text(ours, 7, 2)
    got = torch.stack(list(generate(with_kv_cache(ours), ids, 20, temperature=0)), 1).tolist()
    want = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=0,
        use_cache=True,
    )
    assert got == want[:, 7:].tolist()


@mixtures
def test_the_balance_loss_is_theirs(mixture, family, E, k, norm):
    """Theirs pools all layers before the product and counts choices, ours takes shares of choices:
    a factor of k"""
    theirs, _, ours = mixture(family, E, k, norm)
    ids, aux = text(ours, 40), Aux()
    with torch.no_grad():
        logits = ours(ids, aux=aux)
        out = theirs(ids, labels=ids, output_router_logits=True)
    said = list(aux.terms.values())
    assert len(said) == len(out.router_logits) == (1 if family == 'qwen3_moe' and E == 8 else 3)
    for mine, other in zip(said, out.router_logits):
        assert torch.equal(mine['chosen'].sort(1).values, other.topk(k).indices.sort(1).values)
        torch.testing.assert_close(mine['share'], other.softmax(1), rtol=0, atol=1e-6)
    loads = torch.stack([o['load'] for o in said])
    shares = torch.stack([o['share'].mean(0) for o in said])
    pooled = k * balance_loss(loads.mean(0), shares.mean(0))
    torch.testing.assert_close(pooled, out.aux_loss, rtol=1e-6, atol=0)
    whole = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) + 0.03 * pooled
    torch.testing.assert_close(whole, out.loss, rtol=1e-6, atol=0)
    # ours: a sum over layers
    torch.testing.assert_close(
        aux.loss(), 0.03 * balance_loss(loads, shares).sum(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize('family,k', crossed(['mixtral', 'qwen3_moe'], [1, 2, 3]))
def test_the_balance_loss_of_one_layer(mixture, family, k):
    theirs, _, ours = mixture(family, 8, k, True, layers=1)
    ids, aux = text(ours, 40), Aux()
    with torch.no_grad():
        ours(ids, aux=aux)
        want = theirs(ids, output_router_logits=True).aux_loss
    torch.testing.assert_close(aux.loss(), 0.03 * want / k, rtol=1e-6, atol=0)


def test_either_way_to_choose_leaves_as_either_family(tmp_path):
    "Softmax then the best, or the best then softmax: one function, which both families can say"
    attn = part(Attention, transforms=(part(QKNorm), part(RoPE)))
    for choose in (part(softmax_top_k), part(top_k_softmax)):
        for family, kw in (('mixtral', {}), ('qwen3_moe', dict(attn=attn))):
            mlp = part(MoE, n_experts=4, top_k=3, router=part(Router, choose=choose, z=0.0))
            model = loud(
                MiniGPT(llama(d_model=24, n_heads=2, n_layers=2, max_len=40, mlp=mlp, **kw)), 3
            )
            folder = to_hf(tmp_path / 'x', model)
            assert json.loads((folder / 'config.json').read_text())['model_type'] == family
            theirs, info = load(folder)
            assert not any(info.values())
            with torch.no_grad():
                ids = text(model, 40)
                torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=1e-5)
                torch.testing.assert_close(
                    model(ids), from_hf(folder).model(ids), rtol=0, atol=1e-5
                )


def test_what_only_training_feels_stands_in_the_way_until_it_is_taken_out(tmp_path):
    model = loud(
        MiniGPT(llama(d_model=24, n_heads=2, n_layers=1, mlp=part(MoE, n_experts=4, capacity=1.5))),
        0,
    )
    want = {n: w.clone() for n, w in model.state_dict().items()}
    for words, mlp in (
        (
            'capacity=1.5 has no word in a mixtral file: it matters in training only',
            part(MoE, n_experts=4),
        ),
        (
            'router.z=0.001 has no word in a mixtral file: it matters in training only',
            part(MoE, n_experts=4, router=part(Router, z=0.0)),
        ),
    ):
        with pytest.raises(LabError, match=words):
            to_hf(tmp_path / 'x', model)
        model.cfg = replace(model.cfg, mlp=mlp)
    opened = from_hf(to_hf(tmp_path / 'x', model)).model
    assert all(torch.equal(w, want[n]) for n, w in opened.state_dict().items())
    assert json.loads((tmp_path / 'x' / 'config.json').read_text())['router_aux_loss_coef'] == 0.01


# ---- gpt-oss: a sink in every softmax, a window in every other layer


def oss_with(size=16, T=400):
    from transformers.models.gpt_oss import modeling_gpt_oss

    cfg = transformers.GptOssConfig(
        vocab_size=50,
        hidden_size=32,
        head_dim=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        sliding_window=size,
        intermediate_size=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        max_position_embeddings=T,
        attn_implementation='eager',
        rope_parameters=dict(rope_type='default', rope_theta=150_000.0),
        **dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id')),
    )
    model = loud(modeling_gpt_oss.GptOssModel(cfg), 0)
    with torch.no_grad():
        for layer in model.layers:
            # weak, as any key, strong
            layer.self_attn.sinks.copy_(torch.tensor([-30.0, -1.5, 1.5, 4.0]))
    return model


def ours_for(attn, size, sink=lambda s, D: s, last=()):
    "Our reader with the weights of theirs"
    H, D = len(attn.sinks), attn.head_dim
    cfg = GPTConfig(d_model=32, n_heads=H, d_head=D, max_len=400, pos=None)
    new = SparseAttention(
        cfg,
        attn.layer_idx,
        n_kv_heads=2,
        sink=True,
        mask=near(size) if size else part(causal),
        transforms=(part(RoPE, base=150_000.0), *last),
    )
    maps = [attn.q_proj, attn.k_proj, attn.v_proj]
    new.load_state_dict(
        {
            'sink': sink(attn.sinks, D),
            'qkv.weight': torch.cat([m.weight for m in maps]),
            'out.weight': attn.o_proj.weight,
            'qkv.bias': torch.cat([m.bias for m in maps]),
            'out.bias': attn.o_proj.bias,
        }
    )
    return new


def asked(model, **words):
    "What each attention was asked and what it answered: [(words, answer), …]"
    notes = []

    def note(module, args, kwargs, out):
        notes.append((kwargs, out))

    hooks = [
        layer.self_attn.register_forward_hook(note, with_kwargs=True) for layer in model.layers
    ]
    with torch.no_grad():
        model(**words)
    for h in hooks:
        h.remove()
    return notes


def compared(theirs, ours, words, x, g):
    "(largest number, largest difference) of outputs and of all gradients, by name"
    x = x.clone().requires_grad_()

    def grads(f, named):
        out = f(x)
        return dict(
            zip(['out', 'x', *named], [out, *torch.autograd.grad(out, [x, *named.values()], g)])
        )

    want = grads(
        lambda x: theirs(**words | dict(hidden_states=x, past_key_values=None))[0],
        dict(theirs.named_parameters()),
    )
    got = grads(
        lambda x: ours(x, torch.arange(x.shape[1]), contiguous=True), dict(ours.named_parameters())
    )
    for kind in ('weight', 'bias'):
        got |= dict(
            zip([f'{o}_proj.{kind}' for o in 'qkv'], got.pop(f'qkv.{kind}').split(ours.sizes))
        )
    got = {n.replace('out.', 'o_proj.').replace('sink', 'sinks'): t for n, t in got.items()}
    assert got.keys() == want.keys()
    return {n: (want[n].abs().max().item(), (got[n] - want[n]).abs().max().item()) for n in want}


def differs(**kw):
    return max(off / max(1.0, big) for big, off in compared(**kw).values())


OSS = crossed((1, 16, 40), (1, 30, 64, 300))


@pytest.mark.parametrize('size,T', OSS)
def test_sinks_are_those_of_gpt_oss(size, T):
    model = oss_with(size)
    notes = asked(model, input_ids=torch.randint(50, (2, T), generator=rng(T, 'ids')))
    assert [o.self_attn.sliding_window for o in model.layers] == [size, None]
    for layer, (words, _) in zip(model.layers, notes):
        theirs = layer.self_attn
        g = torch.randn(2, T, 32, generator=rng(T, 'g'))
        ours = ours_for(theirs, theirs.sliding_window)
        found = compared(theirs, ours, words, words['hidden_states'], g)
        assert found['sinks'][0] > 0.01 or T == 1
        for n, (big, off) in found.items():
            assert off < 1e-5 * max(1, big), (n, big, off)


def test_both_kernels_are_asked_for_sinks():
    assert [choose_kernel(near(16), T)[0] for T in (30, 64, 300)] == [
        'dense',
        'dense',
        'folds',
    ] and choose_kernel(part(causal), 300)[0] == 'dense'
    assert choose_kernel(near(40), 300)[0] == choose_kernel(near(1), 64)[0] == 'folds'


@pytest.mark.parametrize('T', [40, 300])
def test_a_wrong_sink_or_window_is_seen(T):
    model = oss_with(16)
    words, _ = asked(model, input_ids=torch.randint(50, (2, T), generator=rng(T, 'ids')))[0]
    theirs = model.layers[0].self_attn
    x = words['hidden_states']
    g = torch.randn(2, T, 32, generator=rng(T, 'g'))
    off = lambda *a, **kw: differs(
        theirs=theirs, ours=ours_for(theirs, *a, **kw), words=words, x=x, g=g
    )
    assert off(16) < 1e-5
    for wrong in (
        off(15),
        off(17),
        off(16, lambda s, D: -s),
        off(16, lambda s, D: s * D**-0.5),
        off(16, lambda s, D: s * 0 - 1e4),
        off(16, lambda s, D: s.flip(0)),
    ):
        assert wrong > 1e-3, wrong


def test_sinks_while_writing():
    "Token by token, and in pieces, with the caches of both"
    model = oss_with(16)
    ids = torch.randint(50, (2, 60), generator=rng(0, 'ids'))
    size = 16
    kinds = dict(last=(part(CacheTransform, size=size),)), dict(last=(part(CacheTransform),))
    ours = [
        ours_for(o.self_attn, o.self_attn.sliding_window, **kw).eval()
        for o, kw in zip(model.layers, kinds)
    ]
    whole = asked(model, input_ids=ids)
    for pieces in ([1] * 60, [40] + [1] * 20, [5, 30, 1, 24]):
        kept = transformers.DynamicCache(config=model.config)
        keepers = [o.transforms[-1] for o in ours]
        caches = {keeper: keeper.cache(2, 60) for keeper in keepers}
        at = 0
        for n in pieces:
            notes = asked(
                model, input_ids=ids[:, at : at + n], past_key_values=kept, use_cache=True
            )
            i = torch.arange(at, at + n)
            for l, (words, (want, _)) in enumerate(notes):
                with torch.no_grad():
                    got = ours[l](words['hidden_states'], i, cache=caches)
                torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
                torch.testing.assert_close(got, whole[l][1][0][:, at : at + n], rtol=0, atol=1e-5)
            at += n
        assert [layer.is_sliding for layer in kept.layers] == [True, False]
        assert caches[keepers[0]].length == size


# ---- the oracle can tell a difference


def step(n=0, **kw):
    "A change of one step of the attention"

    def change(cfg):
        steps = list(cfg.attn.keywords['transforms'])
        steps[n] = part(steps[n], **kw)
        return replace(cfg, attn=part(cfg.attn, transforms=steps))

    return change


DETAILS = {
    'eps': ('llama', 2, lambda c: replace(c, norm=part(RMSNorm, eps=3e-4))),
    'base': ('mistral', 0, step(base=20_000.0)),
    'neighbours': ('llama', 0, step(interleaved=True)),
    'no scaling': ('llama', 4, step(scale=None)),
    'all channels turn': ('phi3', 1, step(partial=0.5)),
    'eps of the transforms': ('qwen3', 0, step(eps=0.01)),
    'order of transforms': (
        'qwen3',
        0,
        lambda c: replace(c, attn=part(c.attn, transforms=c.attn.keywords['transforms'][::-1])),
    ),
    'GELU': ('gpt2', 0, lambda c: replace(c, mlp=part(c.mlp, act=part(nn.GELU)))),
    'weights of experts': (
        'qwen3_moe',
        3,
        lambda c: replace(
            c,
            mlp=part(
                c.mlp,
                of=(
                    part(
                        c.mlp.keywords['of'][0],
                        router=part(Router, choose=part(softmax_top_k, renormalize=False)),
                    ),
                    *c.mlp.keywords['of'][1:],
                ),
            ),
        ),
    ),
    'top-k': ('mixtral', 0, lambda c: replace(c, mlp=part(c.mlp, top_k=1))),
    'gate': ('llama', 1, lambda c: replace(c, mlp=part(c.mlp, act=part(nn.GELU)))),
}


@pytest.mark.parametrize('name', DETAILS)
def test_one_wrong_detail_is_seen(pair, name):
    family, seed, change = DETAILS[name]
    theirs, _, ours = pair(family, seed)
    other = MiniGPT(change(ours.cfg)).eval()
    state = ours.state_dict()
    if name == 'order of transforms':
        state = {n.replace('transforms.0', 'transforms.1'): w for n, w in state.items()}
    other.load_state_dict(state)
    ids = torch.randint(ours.cfg.vocab_size, (2, T), generator=rng(seed, 'ids'))
    with torch.no_grad():
        assert (other(ids) - theirs(ids).logits).abs().max() > 2e-5


# ---- ours, there and back


def our_draws():
    for seed in range(12):
        r = random.Random(f'ours/{seed}')
        size = dict(
            vocab_size=r.randint(5, 80),
            max_len=r.randint(4, 40),
            d_model=24,
            n_heads=r.choice([2, 3, 4]),
            n_layers=r.randint(1, 3),
            tie=r.random() < 0.5,
        )
        if seed < 3:
            mlp = part(MLP, d_ff=r.randint(8, 60), act=r.choice([*HF_ACTIVATIONS.values()]))
            yield GPTConfig(
                **size, dropout=r.choice([0.0, 0.2]), mlp=mlp, norm=part(nn.LayerNorm, eps=1e-4)
            )
            continue
        scale = (
            [None, part(linear_scaling, factor=2.0), part(llama3_scaling, original=16)][seed % 3]
            if seed < 8
            else None
        )
        eps = r.choice([1e-6, 1e-5])
        rope = part(
            RoPE, base=r.choice([50.0, 10_000.0]), partial=0.5 if seed > 9 else 1.0, scale=scale
        )
        steps = (part(QKNorm, eps=eps), rope) if seed in (6, 7, 8) else (rope,)
        attn = (
            part(GQA, n_kv_heads=r.choice([1, size['n_heads']]))
            if r.random() < 0.7
            else part(Attention)
        )
        yield llama(
            **size,
            d_head=r.choice([None, 8, 20]),
            attn=part(attn, transforms=steps, bias=seed in (3, 4)),
            norm=part(RMSNorm, eps=eps),
            mlp=part(SwiGLU, d_ff=r.randint(8, 60)),
        )


@pytest.mark.parametrize('seed,cfg', some(enumerate(map(canonical, our_draws())), 6))
def test_ours_comes_back_bit_by_bit(tmp_path, seed, cfg):
    model = loud(MiniGPT(cfg), seed)
    opened = from_hf(to_hf(tmp_path / 'x', model))
    assert opened.model.cfg == cfg and not opened.model.training and opened.tokenizer is None
    a, b = model.state_dict(), opened.model.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    theirs, info = load(tmp_path / 'x')
    assert not any(info.values())
    old = {k: v for k, v in hf_config(cfg).items() if k != 'rope_parameters'}
    assert config_from_hf(old) == cfg  # readers of the older words find all they need
    ids = torch.randint(cfg.vocab_size, (2, cfg.max_len), generator=rng(seed, 'ids'))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=1e-5)


def test_an_interleaved_model_leaves_as_halves(tmp_path):
    attn = part(GQA, n_kv_heads=1, transforms=(part(QKNorm), part(RoPE, interleaved=True)))
    model = loud(MiniGPT(llama(d_model=24, n_heads=3, n_layers=2, max_len=30, attn=attn)), 1)
    with pytest.raises(LabError, match=r'half_split\(model\)'):
        to_hf(tmp_path / 'x', model)
    theirs, info = load(to_hf(tmp_path / 'x', half_split(model)))
    ids = torch.randint(65, (2, 30), generator=rng(0, 'ids'))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=1e-5)


def test_a_shorter_context(pair):
    _, folder, ours = pair('llama', 1)
    assert from_hf(folder, max_len=7).model.cfg == replace(ours.cfg, max_len=7)
    for n in (0, 101):
        with pytest.raises(LabError, match='give a number up to that'):
            from_hf(folder, max_len=n)
    with pytest.raises(LabError, match='they are a table, leave max_len out'):
        from_hf(pair('gpt2', 1)[1], max_len=7)


def test_bfloat16_and_a_mixture_of_types(tmp_path, pair):
    theirs, folder, _ = pair('llama', 1)
    to_hf(tmp_path / 'half', from_hf(folder).model.bfloat16(), family='llama')
    assert (
        from_hf(tmp_path / 'half').model.tok.weight.dtype
        == load(tmp_path / 'half')[0].dtype
        == torch.bfloat16
    )
    shutil.copytree(folder, tmp_path / 'mixed')
    state = {
        n: w if 'norm' in n else w.bfloat16()
        for n, w in load_file(folder / 'model.safetensors').items()
    }
    save_file(state, tmp_path / 'mixed' / 'model.safetensors')
    mixed = hf_views(from_hf(tmp_path / 'mixed').model, 'llama')
    for n, w in state.items():
        assert mixed[n].dtype == torch.float32 and torch.equal(mixed[n], w.float()), n


# ---- what a configuration leaves out

CLASSES = {f: type(transformers.AutoConfig.for_model(f)) for f in FAMILIES}


@pytest.mark.parametrize('family', FAMILIES)
def test_defaults_are_theirs(family):
    theirs = {
        k: CLASSES[family].__dataclass_fields__[k].default
        for k in DEFAULTS[family]
        if k != 'head_dim' or family not in ('phi3', 'qwen3_moe')
    }
    assert {k: DEFAULTS[family][k] for k in theirs} == theirs


@pytest.mark.parametrize('family', FAMILIES)
def test_every_key_can_be_left_out(family):
    full = theirs_of(family, **drawn(family, 1)).config.to_dict()
    full = {
        k: v
        for k, v in full.items()
        if k in DEFAULTS[family] or k in ('model_type', 'rope_parameters')
    }
    seen = 0
    for k in [*full.keys() - {'model_type'}, None]:
        partial = {n: v for n, v in full.items() if n != k}
        try:
            theirs = CLASSES[family](**partial).to_dict() | {'model_type': family}
        except Exception:
            continue  # what they refuse has no meaning to compare
        try:
            want = config_from_hf(theirs)
        except LabError as e:
            with pytest.raises(LabError) as again:
                config_from_hf(partial)
            assert str(again.value) == str(e)
        else:
            assert config_from_hf(partial) == want, k
            seen += 1
    assert seen > 8


ROPES = {
    'new': dict(rope_parameters=dict(rope_type='default', rope_theta=5e5)),
    'old': dict(rope_theta=5e5),
    'nothing': {},
    'old, null': dict(rope_theta=5e5, rope_scaling=None),
    'oldest': dict(rope_theta=777, rope_scaling=dict(type='linear', factor=2.0)),
    'half new': dict(rope_theta=5e5, rope_parameters=dict(rope_type='linear', factor=2.0)),
    'both': dict(
        rope_theta=5e5,
        rope_scaling=SCALED | dict(original_max_position_embeddings=16),
        rope_parameters=dict(rope_type='default', rope_theta=100.0),
    ),
    'no length': dict(rope_scaling=SCALED),
    'a length outside': dict(
        original_max_position_embeddings=16,
        rope_parameters=SCALED | dict(rope_theta=5e5, original_max_position_embeddings=32),
    ),
}


@pytest.mark.parametrize('name', ROPES)
def test_old_and_new_words_for_rope(tmp_path, name):
    said = {k: v for k, v in drawn('llama', 4).items() if k != 'rope_parameters'} | json.loads(
        json.dumps(ROPES[name])
    )
    (tmp_path / 'x').mkdir()
    (tmp_path / 'x' / 'config.json').write_text(
        json.dumps(said | dict(model_type='llama', architectures=['LlamaForCausalLM']))
    )
    theirs = loud(
        transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(tmp_path / 'x')), 0
    )
    save_file(
        {n: w for n, w in theirs.state_dict().items() if n != 'lm_head.weight'},
        tmp_path / 'x' / 'model.safetensors',
    )
    ours = from_hf(tmp_path / 'x').model
    speeds = theirs.model.rotary_emb.inv_freq
    torch.testing.assert_close(
        ours.blocks[0].attn.transforms[0].freq[len(speeds) :], speeds, rtol=1e-6, atol=0
    )
    ids = torch.randint(ours.cfg.vocab_size, (2, 60), generator=rng(0, 'ids'))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-5)


def test_partial_rotary_of_phi3_in_the_old_place():
    old = dict(
        model_type='phi3',
        hidden_size=32,
        num_attention_heads=4,
        partial_rotary_factor=0.5,
        rope_theta=500.0,
    )
    assert config_from_hf(old) == config_from_hf(
        CLASSES['phi3'](**old).to_dict() | {'model_type': 'phi3'}
    )
    assert config_from_hf(old).attn.keywords['transforms'] == (part(RoPE, base=500.0, partial=0.5),)


def test_every_activation_is_theirs():
    from transformers.activations import ACT2FN

    x = torch.linspace(-5, 5, 101)
    for name, ours in HF_ACTIVATIONS.items():
        torch.testing.assert_close(ours()(x), ACT2FN[name](x), rtol=0, atol=1e-6, msg=name)


# ---- files as they come


def test_files_of_the_hub_without_prefix_and_with_buffers(tmp_path, pair):
    theirs, folder, ours = pair('gpt2', 0)
    shutil.copytree(folder, tmp_path / 'x')
    state = {
        n.removeprefix('transformer.'): w
        for n, w in load_file(folder / 'model.safetensors').items()
    }
    buffers = {
        f'h.{n}.attn.{k}': torch.ones(1, 1, 9, 9).byte()
        for n in range(ours.cfg.n_layers)
        for k in ('bias', 'masked_bias')
    }
    save_file(state | buffers, tmp_path / 'x' / 'model.safetensors')
    got = from_hf(tmp_path / 'x').model.state_dict()
    for n, w in ours.state_dict().items():
        assert torch.equal(got[n], w), n
    theirs, folder, ours = pair('llama', 1)
    shutil.copytree(folder, tmp_path / 'y')
    state = load_file(folder / 'model.safetensors') | {
        'model.layers.0.self_attn.rotary_emb.inv_freq': torch.ones(2)
    }
    save_file(state, tmp_path / 'y' / 'model.safetensors')
    assert torch.equal(from_hf(tmp_path / 'y').model.lm_head.weight, ours.lm_head.weight)


def test_several_files_with_an_index(tmp_path, pair):
    theirs, folder, ours = pair('qwen3', 1)
    theirs.save_pretrained(tmp_path / 'x', max_shard_size='8KB')
    shards = sorted((tmp_path / 'x').glob('*.safetensors'))
    assert len(shards) > 2 and not (tmp_path / 'x' / 'model.safetensors').exists()
    for n, w in from_hf(tmp_path / 'x').model.state_dict().items():
        assert torch.equal(w, ours.state_dict()[n]), n
    index = json.loads((tmp_path / 'x' / 'model.safetensors.index.json').read_text())
    for place, words in (
        ('../secret.safetensors', 'points out of its folder'),
        ('none.safetensors', 'none.safetensors cannot be read'),
        (shards[-1].name, 'which the index places in'),
    ):
        bad = index | dict(weight_map=index['weight_map'] | {'model.embed_tokens.weight': place})
        (tmp_path / 'x' / 'model.safetensors.index.json').write_text(json.dumps(bad))
        with pytest.raises(LabError, match=words):
            from_hf(tmp_path / 'x')
    (tmp_path / 'x' / 'model.safetensors.index.json').write_text(json.dumps(index))
    shards[1].unlink()
    with pytest.raises(LabError, match='cannot be read'):
        from_hf(tmp_path / 'x')


def test_a_tied_table_may_be_written_twice(tmp_path, pair):
    _, folder, ours = pair('llama', 0)
    assert ours.cfg.tie
    shutil.copytree(folder, tmp_path / 'x')
    state = load_file(folder / 'model.safetensors')
    save_file(
        state | {'lm_head.weight': state['model.embed_tokens.weight'].clone()},
        tmp_path / 'x' / 'model.safetensors',
    )
    assert torch.equal(from_hf(tmp_path / 'x').model.lm_head.weight, ours.lm_head.weight)
    save_file(
        state | {'lm_head.weight': state['model.embed_tokens.weight'] + 1},
        tmp_path / 'x' / 'model.safetensors',
    )
    with pytest.raises(LabError, match='lm_head.weight is not the table of tokens'):
        from_hf(tmp_path / 'x')


@pytest.mark.parametrize('family', FAMILIES)
def test_no_tensor_can_be_renamed_lost_or_added(tmp_path, pair, family):
    _, folder, _ = pair(family, 1)
    state = load_file(folder / 'model.safetensors')
    (tmp_path / 'x').mkdir()
    shutil.copy(folder / 'config.json', tmp_path / 'x')
    # one expert speaks for all
    for n in [n for n in state if '.experts.' not in n or '.experts.1.' in n]:
        for change, words in (
            ({n + 'x': state[n]}, 'lacks'),
            ({}, 'lacks'),
            ({n: state[n], n + '.more': state[n].clone()}, 'holds .*more'),
            ({n: torch.cat([state[n], state[n]])}, 'config.json asks for'),
        ):
            save_file(
                {k: w for k, w in state.items() if k != n} | change,
                tmp_path / 'x' / 'model.safetensors',
            )
            with pytest.raises(LabError, match=words) as e:
                from_hf(tmp_path / 'x')
            assert n in str(e.value) and '\n' not in str(e.value)


REFUSED = [
    ('llama', dict(model_type='gemma3_text'), "model_type='gemma3_text'"),
    ('llama', dict(hidden_act='quick_gelu'), "hidden_act='quick_gelu'"),
    ('llama', dict(hidden_act=['silu']), "hidden_act=['silu']"),
    *(
        (
            'llama',
            dict(rope_parameters=dict(rope_type=t, rope_theta=1e4, factor=2.0)),
            f"rope_type='{t}'",
        )
        for t in ('yarn', 'longrope', 'dynamic', 'proportional')
    ),
    (
        'phi3',
        dict(rope_scaling=dict(type='su', short_factor=[1.0], long_factor=[1.0])),
        "rope_type='su'",
    ),
    (
        'phi3',
        dict(rope_scaling=dict(type='linear', factor=2.0)),
        "rope_type='linear': phi3 is read with default",
    ),
    (
        'llama',
        dict(rope_parameters=dict(full_attention=dict(rope_theta=1e4))),
        'one set of numbers',
    ),
    ('llama', dict(rope_parameters=dict(rope_type='linear')), 'factor=None'),
    ('llama', dict(rope_parameters=None, rope_theta='big'), "rope_theta='big'"),
    ('llama', dict(rope_scaling=[1]), 'rope_parameters='),
    ('llama', dict(partial_rotary_factor=0.5), 'partial_rotary_factor=0.5'),
    (
        'qwen3',
        dict(use_sliding_window=True, sliding_window=8),
        'sliding_window=8: not in all layers',
    ),
    *(
        (f, dict(sliding_window=n), f'sliding_window={n!r}: a whole number above 0')
        for f in ('mistral', 'phi3')
        for n in (0, 8.5, '8', True)
    ),
    ('llama', dict(quantization_config=dict(quant_method='gptq')), 'quantization_config='),
    ('llama', dict(attn_logit_softcapping=50.0), 'attn_logit_softcapping=50.0'),
    ('llama', dict(final_logit_softcapping=30.0), 'final_logit_softcapping=30.0'),
    ('gpt2', dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse_layer_idx=True'),
    ('gpt2', dict(scale_attn_weights=False), 'scale_attn_weights=False'),
    ('gpt2', dict(add_cross_attention=True), 'add_cross_attention=True'),
    ('gpt2', dict(attn_pdrop=0.2), 'dropout=[0.1, 0.1, 0.2]'),
    ('gpt2', dict(n_inner=0), 'n_inner=0'),
    ('gpt2', dict(n_embd='64'), "n_embd='64'"),
    ('llama', dict(attention_dropout=0.1), 'dropout=[0.1]'),
    ('llama', dict(num_hidden_layers=2.5), 'num_hidden_layers=2.5'),
    ('llama', dict(rms_norm_eps=None), 'rms_norm_eps=None'),
    ('llama', dict(intermediate_size=True), 'intermediate_size=True'),
    ('llama', dict(tie_word_embeddings='yes'), "tie_word_embeddings='yes'"),
    ('llama', dict(attention_bias='no'), "attention_bias='no'"),
    ('llama', dict(num_key_value_heads=7), 'n_kv_heads=7'),
    (
        'mixtral',
        dict(router_jitter_noise=0.1),
        'router_jitter_noise=0.1: it matters in training only; write 0',
    ),
    ('mixtral', dict(num_local_experts=1), 'top_k=2: there are 1 experts; give at most that'),
    ('mixtral', dict(num_experts=8), 'num_experts=[8, 4]: the two words contradict each other'),
    *(
        (
            'mixtral',
            dict(num_experts_per_tok=n),
            f'num_experts_per_tok={n!r}: a whole number above 0',
        )
        for n in (0, 2.5, '2', None)
    ),
    *(
        ('qwen3_moe', dict(router_aux_loss_coef=n), f'balance={n!r}: give 0 or a little more')
        for n in (-1, '1', None, True)
    ),
    ('qwen3_moe', dict(norm_topk_prob=None), 'norm_topk_prob=None: true or false'),
    ('qwen3_moe', dict(decoder_sparse_step=0), 'decoder_sparse_step=0: a whole number above 0'),
    ('qwen3_moe', dict(mlp_only_layers='0'), "mlp_only_layers='0': a list of layers"),
    ('llama', dict(hidden_size=25), 'hidden_size=25: it must be a multiple'),
]


@pytest.mark.parametrize('family,change,words', REFUSED)
def test_what_cannot_be_said_exactly_is_refused_in_a_line(family, change, words):
    good = theirs_of(family, **drawn(family, 0)).config.to_dict() | dict(model_type=family)
    config_from_hf(good)
    one_line(lambda: config_from_hf(good | change), words)


ODD = ['x', [], {}, -1, 0, None, True, float('nan'), float('inf'), 10**12, [[1]], {'a': 1}, 1.5]


@pytest.mark.parametrize('family', FAMILIES)
def test_odd_values_are_an_answer_or_a_line(family):
    rope = dict(rope_theta=1e4, original_max_position_embeddings=64) | (
        SCALED if family != 'phi3' else {}
    )
    base = dict(
        model_type=family,
        **DEFAULTS[family]
        | ({} if family == 'gpt2' else dict(rope_parameters=rope, sliding_window=None)),
    )
    config_from_hf(base)
    for change in [{k: odd} for k in base for odd in ODD] + [
        dict(rope_parameters=rope | {k: odd}) for k in rope for odd in ODD
    ]:
        try:
            config_from_hf(base | change)
        except LabError as e:
            assert '\n' not in str(e)


@pytest.mark.parametrize('text', ['', '[]', '{"model_type": ["llama"]}', 'null', '{', '\x80'])
def test_a_config_that_is_none(tmp_path, text):
    (tmp_path / 'config.json').write_text(text, encoding='latin-1')
    with pytest.raises(LabError):
        from_hf(tmp_path)


def test_pickles_stay_closed(tmp_path, pair):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / 'boom'), 'w'))

    _, folder, _ = pair('llama', 0)
    for name in ('pytorch_model.bin', 'model.safetensors'):
        shutil.rmtree(tmp_path / 'x', ignore_errors=True)
        shutil.copytree(folder, tmp_path / 'x')
        (tmp_path / 'x' / 'model.safetensors').unlink()
        (tmp_path / 'x' / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(LabError):
            from_hf(tmp_path / 'x')
    assert not (tmp_path / 'boom').exists()


@pytest.mark.parametrize('make', [GPTConfig, llama])
def test_a_tokenizer_goes_along(tmp_path, make):
    tok = CharTokenizer('\n abcdefg')
    model = MiniGPT(make(vocab_size=tok.vocab_size, d_model=16, n_heads=2, n_layers=1))
    opened = from_hf(to_hf(tmp_path / 'x', model, tok))
    assert opened.tokenizer.chars == tok.chars
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'x')
    # after what begins a prompt
    assert theirs('bad cafe\n').input_ids == tok.encode('\nbad cafe\n')
    assert theirs('bad cafe\n', add_special_tokens=False).input_ids == tok.encode('bad cafe\n')
    assert theirs.decode(tok.encode('a  bad')) == 'a  bad'


def test_marks_for_begin_and_end_go_along(tmp_path):
    tok = BPETokenizer.train(
        ['once upon a time there was a cat '] * 9, 270, special_tokens=['<s>', '</s>']
    )
    model = MiniGPT(llama(vocab_size=tok.vocab_size, d_model=16, n_heads=2, n_layers=1))
    opened = from_hf(to_hf(tmp_path / 'x', model, tok))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'x')
    said = json.loads((tmp_path / 'x' / 'config.json').read_text())
    for t in ('once upon a cat', 'é\n\n  x', '<s>'):
        assert opened.tokenizer.encode(t) == tok.encode(t) and theirs(t).input_ids == [
            tok.bos_id,
            *tok.encode(t),
        ]
    assert tok.bos_id is not None and tok.eos_id is not None
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tok.bos_id, tok.eos_id)
    assert (said['bos_token_id'], said['eos_token_id']) == (tok.bos_id, tok.eos_id)


def test_a_tokenizer_that_is_not_ours_is_none_with_a_reason(tmp_path):
    to_hf(tmp_path / 'x', MiniGPT(llama(d_model=16, n_heads=2, n_layers=1)))
    (tmp_path / 'x' / 'tokenizer.json').write_text(
        json.dumps(dict(model=dict(type='BPE', vocab={'a': 0}, merges=[], dropout=0.1)))
    )
    with pytest.warns(UserWarning, match='the model comes without its tokenizer: .*dropout=0.1'):
        opened = from_hf(tmp_path / 'x')
    assert (
        opened.tokenizer is None
        and 'dropout=0.1 cannot be followed exactly' in opened.about['tokenizer']
    )


def test_a_save_that_fails_leaves_the_old_folder(tmp_path):
    model = MiniGPT(llama(d_model=16, n_heads=2, n_layers=1))
    to_hf(tmp_path / 'x', model)

    class Full(CharTokenizer):
        def save(self, folder):
            raise OSError(28, 'No space left on device')

    before = {p.name: p.read_bytes() for p in (tmp_path / 'x').iterdir()}
    with pytest.raises(OSError):
        to_hf(tmp_path / 'x', model, Full('ab'))
    assert {p.name: p.read_bytes() for p in (tmp_path / 'x').iterdir()} == before and len(
        list(tmp_path.iterdir())
    ) == 1
