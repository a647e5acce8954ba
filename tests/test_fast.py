"""`inference`: the fast form of a model writes the same, whatever the parts, and eight bits cost
what they are said to cost."""

import shutil
import threading
from dataclasses import replace

import pytest
import torch
from cases import crossed
from torch import nn
from helpers import near, shaken
from test_cache import KINDS, SIZE, T, TOK, ids_of, plain

from llm_lab.kv_cache import CacheTransform, with_kv_cache, complete, sliding_window
from llm_lab.inference import (
    Int8Linear,
    TransposedLinear,
    for_inference,
    bytes_per_token,
    benchmark_decode,
)
from llm_lab.self_attention import Attention
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.parts import part
from llm_lab.gqa import GQA
from llm_lab.core import LabError, rng
from llm_lab.onednn import onednn_is_exact
from llm_lab.llama_block import QKNorm, llama
from llm_lab.positions import RoPE
from llm_lab.init import spectral_init
from llm_lab.looking import attention_maps, logit_lens, ablate_head
from llm_lab.package import save
from llm_lab.sampling import DecodingState, generate, sample

each = pytest.mark.parametrize('kind', KINDS)
OLD_ROAD = {'heads look apart'}  # a pattern that only the old road knows


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.parametrize('kind,pad', crossed(KINDS, [None, (0, 5, 2)]))
def test_every_token_is_that_of_the_plain_model(kind, pad):
    model, ids = shaken(KINDS[kind]), ids_of(0, 3)
    quick, pad = for_inference(model), pad and torch.tensor(pad)
    assert quick.simple == (kind not in OLD_ROAD)
    for cut in ([7] + [1] * (T - 7), [1] * T, [20, 1, 1, 5, 1, 1, 11]):
        reader = DecodingState(quick, T, pad)
        slow = DecodingState(model, T, pad)
        for piece in ids.split(cut, 1):
            near(reader(piece), slow(piece))


@each
def test_the_text_is_the_same(kind):
    model, prompt = shaken(KINDS[kind], 1), ids_of(1, 2, 9)

    def write(m, **kw):
        return torch.stack(list(generate(m, prompt, 50, **kw)), 1).tolist()  # past max_len, too

    for kw in (dict(temperature=0), dict(seed=3, top_k=9)):
        assert write(for_inference(model), **kw) == write(with_kv_cache(model), **kw)
    prompts = ['a', 'more words']
    assert [
        p + c.text for p, (c,) in zip(prompts, complete(for_inference(model), TOK, prompts, 20))
    ] == [sample(model, TOK, p, 20) for p in prompts]


@pytest.mark.parametrize(
    'shape,bias',
    crossed([(300, 1024), (512, 512), (1000, 300), (64, 30), (256, 1536)], [True, False]),
)
def test_wide_layers_of_all_sizes(shape, bias):
    "Above and below the size at which oneDNN multiplies, with and without columns that nobody uses"
    K, N = shape
    layer = nn.Linear(K, N, bias)
    for rows in ((1, 1), (3, 1), (2, 17), (130, 1)):
        x = torch.randn(*rows, K, generator=rng(0, 'x'))
        near(plain(TransposedLinear(layer), x), plain(layer, x))
    assert plain(TransposedLinear(layer), x).shape == (130, 1, N)


def test_a_model_as_wide_as_real_ones():
    attn = part(GQA, n_kv_heads=2, transforms=(part(QKNorm), part(RoPE)))
    cfg = llama(2048, max_len=64, d_model=512, n_layers=2, n_heads=8, attn=attn, tie=True)
    model = MiniGPT(cfg).eval()
    ids = torch.randint(2048, (1, 40), generator=rng(0, 'ids'))
    reader = DecodingState(for_inference(model), 40)
    want = plain(model, ids)
    for t, piece in zip((9, *range(10, 40)), ids.split([10] + [1] * 30, 1)):
        near(reader(piece), want[:, t])


def test_the_short_road_is_not_taken_where_it_is_wrong():
    """A ring larger than the window, a cache that keeps all for a window, a step behind the cache:
    all need the mask or the order"""
    rope, far = part(RoPE), part(sliding_window, size=5)
    for steps, pattern in (
        ((rope, part(CacheTransform, size=9)), far),
        ((rope, part(CacheTransform)), far),
        ((part(CacheTransform), rope), None),
    ):
        cfg = llama(
            **SIZE,
            attn=part(Attention, transforms=steps, **(dict(mask=pattern) if pattern else {})),
        )
        model, ids = shaken(cfg), ids_of(2, 2)
        quick = for_inference(model)
        quick = quick if quick.model.cfg == cfg else type(quick)(model, lambda old, head: old)
        reader, want = DecodingState(quick, T), plain(model, ids)
        for t, piece in zip((9, *range(10, T)), ids.split([10] + [1] * 30, 1)):
            near(reader(piece), want[:, t])
        assert quick.simple == (pattern is None and quick.model.cfg != cfg)


def comb(i, j, size):
    return (j <= i) & (i - j < size) & ((i - j) % 2 == 0)


def apart(i, j, h, size):
    return (j <= i) & (i - j < size - h)


for f in (comb, apart):
    f.lookback = lambda size: size


@pytest.mark.parametrize('mask', [comb, apart])
def test_a_mask_with_holes_takes_the_old_road(mask):
    model = shaken(
        llama(**SIZE, attn=part(Attention, transforms=(part(RoPE),), mask=part(mask, size=7)))
    )
    ids = ids_of(2, 2)
    quick, want = for_inference(model), plain(model, ids)
    reader = DecodingState(quick, T)
    for t, piece in zip((9, *range(10, T)), ids.split([10] + [1] * 30, 1)):
        near(reader(piece), want[:, t])
    assert not quick.simple and all(c.endless for c in quick.cache(1, 9).values())


def test_who_looks_on_is_asked():
    "The watching steps of `looking` work on the fast form, also while it writes"
    model, ids = shaken(KINDS['2 heads']), ids_of(6, 1)
    quick = for_inference(model)
    with ablate_head(model, 1, 1):
        want = plain(model, ids)
    with ablate_head(quick, 1, 1):
        reader = DecodingState(quick, T)
        for t, piece in zip((9, *range(10, T)), ids.split([10] + [1] * 30, 1)):
            near(reader(piece), want[:, t])
    cache = quick.cache(1, T)
    plain(quick, ids[:, :9], cache=cache)
    maps = attention_maps(quick, ids[0, 9:10], torch.tensor([9]), cache=cache)
    near(maps[:, :, 0], attention_maps(model, ids[0, :10])[:, :, -1])
    near(logit_lens(quick, ids[0]), logit_lens(model, ids[0]))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_dropout_training_and_low_precision(dtype):
    model = shaken(replace(KINDS['2 heads'], dropout=0.5))
    ids = ids_of(7, 2)
    want, model = plain(model, ids), model.to(dtype).train()
    noise = (plain(model.eval(), ids).float() - want).abs().max() + 1e-5
    reader = DecodingState(for_inference(model.train()), T)
    for t, piece in zip((9, *range(10, T)), ids.split([10] + [1] * 30, 1)):
        assert (reader(piece).float() - want[:, t]).abs().max() < 2 * noise
    assert model.training


def test_layers_with_rings_of_different_sizes():
    near_by = part(
        Attention, mask=part(sliding_window, size=5), transforms=(part(RoPE),), bias=False
    )
    far = part(GQA, n_kv_heads=2, transforms=(part(RoPE, base=100.0),))
    model = shaken(replace(llama(**SIZE), attn=part(mixed, near=near_by, far=far)))
    ids = ids_of(8, 2)
    quick, want = for_inference(model), plain(model, ids)
    assert quick.simple and [c.length for c in quick.cache(1, 9).values()] == [5, 9, 5]
    reader = DecodingState(quick, T)
    for t, piece in zip((9, *range(10, T)), ids.split([10] + [1] * 30, 1)):
        near(reader(piece), want[:, t])


def mixed(cfg, layer=0, *, near, far):
    return (far if layer % 2 else near)(cfg, layer)


@pytest.mark.skipif(
    not onednn_is_exact(), reason="oneDNN's other way is not there, or is not float32's"
)
def test_threads_leave_the_settings_of_torch_as_they_were(monkeypatch):
    monkeypatch.setattr('llm_lab.inference.onednn_is_faster', lambda: True)
    quick = for_inference(MiniGPT(llama(2000, d_model=512, n_layers=1, n_heads=4, max_len=64)))
    prompt = torch.randint(2000, (1, 5), generator=rng(0, 'prompt'))
    want = torch.cat(list(generate(quick, prompt, 20))).tolist()
    got = []
    threads = [
        threading.Thread(
            target=lambda: got.append(torch.cat(list(generate(quick, prompt, 20))).tolist())
        )
        for _ in range(3)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert got == [want] * 3 and torch.backends.mkldnn.matmul.fp32_precision == 'none'


def test_what_a_fast_model_is_not_for(tmp_path):
    quick = for_inference(MiniGPT(GPTConfig(**SIZE)))
    with pytest.raises(LabError, match='fast already'):
        for_inference(quick)
    with pytest.raises(LabError, match='a Fast is not saved'):
        save(tmp_path / 'p', quick, TOK)
    with pytest.raises(LabError, match="no part of this model reads 'doc'"):
        quick(ids_of(0, 1), doc=1)
    with pytest.raises(LabError, match='no more tokens than the model sees'):
        benchmark_decode(quick, prompt=30, n=30)
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_left_alone_and_bound_weights_are_read():
    for cfg in (
        KINDS['tied'],
        replace(KINDS['Llama'], init=part(spectral_init)),
        KINDS['soft cap'],
    ):
        model, ids = MiniGPT(cfg).eval(), ids_of(3, 1)
        before, said = str(model), plain(model, ids)
        quick = for_inference(model)
        assert str(model) == before and torch.equal(plain(model, ids), said) and not quick.training
        near(plain(quick, ids), said)
        assert next(quick.parameters()).device.type == 'cpu'


def test_a_full_cache_is_told_of():
    quick = for_inference(shaken(KINDS['Llama']))
    cache = quick.cache(1, 3)
    plain(quick, ids_of(0, 1, 2), cache=cache)
    plain(quick, ids_of(0, 1, 1), torch.tensor([2]), cache=cache)
    with pytest.raises(LabError, match='3 places, all are taken'):
        plain(quick, ids_of(0, 1, 1), torch.tensor([3]), cache=cache)


def test_eight_bits_are_the_nearest_of_255():
    layer = nn.Linear(40, 25)
    with torch.no_grad():
        layer.weight[3] = 0
        layer.weight[4] *= 1e4
    small = Int8Linear(layer)
    off = (small.weight[:, :40] * small.scale.float()[:, None] - layer.weight).abs()
    assert (off <= 0.505 * small.scale.float()[:, None]).all() and small.weight.dtype == torch.int8
    x = torch.randn(5, 1, 40, generator=rng(0, 'x'))
    assert (plain(small, x)[..., 3] == layer.bias[3]).all()
    exact = (
        x.bfloat16().double() @ (small.weight[:, :40] * small.scale.double()[:, None]).T
        + layer.bias.double()
    )
    assert (
        (plain(small, x) - exact).abs() <= 0.004 * exact.abs() + 0.01 * small.scale.float() * 127
    ).all()


@pytest.mark.parametrize('K,N', crossed([1, 8, 15, 16, 17, 40, 88, 100], [1, 7, 32, 65]))
def test_eight_bits_of_any_size(K, N):
    "The product underneath reads sixteen inputs at a time, and beyond the end if there are fewer"
    layer = nn.Linear(K, N)
    for rows in (1, 2, 5, 33):
        x = torch.randn(rows, 1, K, generator=rng(rows, 'x'))
        got, want = plain(Int8Linear(layer), x), plain(layer, x)
        assert got.shape == want.shape and (got - want).norm() < 0.03 * want.norm() + 0.01


def test_eight_bits_in_a_model():
    model, ids = MiniGPT(KINDS['2 heads']).eval(), ids_of(4, 4)
    quick = for_inference(model, 'int8')
    assert sum(isinstance(m, Int8Linear) for m in quick.modules()) == 4 * 3 and isinstance(
        quick.model.lm_head, TransposedLinear
    )
    a, b = plain(quick, ids), plain(model, ids)
    assert 1e-4 < (a - b).norm() / b.norm() < 0.03
    reader = DecodingState(quick, T)
    for t, piece in zip((9, *range(10, T)), ids.split([10] + [1] * 30, 1)):
        near(reader(piece), a[:, t], 0.02)


def test_bytes_that_a_token_reads():
    V, C = 300, 32
    for tie in (True, False):
        model = MiniGPT(llama(V, max_len=32, d_model=C, n_layers=2, n_heads=4, tie=tie))
        whole = 4 * (model.n_params - (0 if tie else V * C))
        assert bytes_per_token(model) == bytes_per_token(for_inference(model)) == whole
        blocks = whole - 4 * V * C - 4 * C * 5
        assert whole - blocks < bytes_per_token(for_inference(model, 'int8')) < whole - 0.7 * blocks
    said = benchmark_decode(for_inference(model), n=4, rounds=1)
    assert said['bytes'] == whole and 0 < said['tokens_per_s'] and said['limit'] > 0


def test_wrong_words_are_refused():
    for word in ('int4', None, 8):
        with pytest.raises(LabError, match='choose from float32, int8'):
            for_inference(MiniGPT(GPTConfig(**SIZE)), word)


@pytest.mark.skipif(
    not (shutil.which('g++') or shutil.which('clang++')),
    reason='torch.compile needs a C++ compiler',
)
@pytest.mark.parametrize('kind', ['window of 5', pytest.param('2 heads', marks=pytest.mark.slow)])
def test_compiled_is_the_same(kind):
    model = shaken(replace(KINDS[kind], n_layers=1))
    ids = ids_of(5, 1)
    quick = for_inference(model, compile=True)
    for _ in range(2):
        reader = DecodingState(quick, T)
        slow = DecodingState(model, T)
        for piece in ids.split([5] + [1] * 30 + [5], 1):
            near(reader(piece), slow(piece))
    assert quick.step is not quick.next_features
