"""`kv_cache`: the odd cases and the wording of its refusals. That decoding with a cache is decoding
without stands in test_cache.py."""

from dataclasses import replace

import pytest
import torch
from test_cache import KINDS, SIZE, TOK, ids_of, modern, plain, shaken

from llm_lab.core import LabError
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.kv_cache import (
    CacheTransform,
    Completion,
    KVCache,
    RollingCache,
    complete,
    select_rows,
    sliding_window,
    with_kv_cache,
)
from llm_lab.llama_block import llama
from llm_lab.parts import part
from llm_lab.positions import RoPE
from llm_lab.sampling import DecodingState, sample
from llm_lab.self_attention import Attention

pytestmark = pytest.mark.usefixtures('one_thread')


class Gate(torch.nn.Module):
    "A mixer that mixes nothing, and keeps nothing"

    def __init__(self, cfg, layer=0):
        super().__init__()

    def forward(self, x, i, **ctx):
        return x


def in_turns(cfg, layer, of):
    return of[layer % len(of)](cfg, layer)


class Deaf(Attention):
    "An attention that takes no transforms"

    def __init__(self, cfg, layer=0):
        super().__init__(cfg, layer)


def test_a_model_has_a_cache_for_each_layer_or_none():
    model = shaken(KINDS['GPT-2'])
    quick = with_kv_cache(model)
    assert model.cache(1, 9) is None
    assert len(quick.cache(1, 9)) == model.cfg.n_layers
    assert with_kv_cache(quick) is quick


def test_a_mixer_that_keeps_nothing():
    attn = part(in_turns, of=(part(Gate), part(Attention)))
    hybrid = MiniGPT(GPTConfig(n_layers=2, attn=attn))
    with pytest.raises(
        LabError, match='this model can have no cache: Gate of layer 0 keeps nothing'
    ):
        with_kv_cache(hybrid)
    assert with_kv_cache(hybrid, strict=False) is hybrid


def test_what_cannot_have_a_cache_is_refused():
    with pytest.raises(LabError, match='a Linear is given: a MiniGPT is needed'):
        with_kv_cache(torch.nn.Linear(2, 2))
    with pytest.raises(LabError, match='Deaf takes no transforms: give it a `cache'):
        with_kv_cache(MiniGPT(GPTConfig(attn=part(Deaf))))


def test_the_tokens_before_are_not_forgotten():
    quick = with_kv_cache(shaken(KINDS['GPT-2']))
    cache = quick.cache(1, 35)
    ids = ids_of(0, 1)
    plain(quick, ids[:, :30], cache=cache)
    with pytest.raises(LabError, match='holds 30 tokens already: say where the next ones stand'):
        quick(ids[:, 30:31], cache=cache)
    with pytest.raises(LabError, match='holds 1 texts, 2 are given'):
        quick(ids[:, 30:31].repeat(2, 1), torch.tensor([30]), cache=cache)


@pytest.mark.parametrize('size', [0, -1, 2.0, True, None])
def test_a_window_has_a_whole_size(size):
    with pytest.raises(LabError, match=f'size={size}: give a whole number of at least 1'):
        modern(2, mask=part(sliding_window, size=size))


@pytest.mark.parametrize('mask', [dict(), dict(mask=part(sliding_window, size=8))])
def test_a_ring_smaller_than_its_window_is_refused(mask):
    from llm_lab.kv_cache import CacheTransform

    transforms = (part(RoPE), part(CacheTransform, size=7))
    with pytest.raises(LabError, match='size=7 is too small a cache'):
        llama(**SIZE, attn=part(Attention, transforms=transforms, **mask))


def test_a_ring_goes_round():
    ring = RollingCache(5)
    for n in range(10):
        k, v, j = ring.add(*torch.full((2, 1, 1, 1, 1), float(n)), torch.tensor([n]))
    assert j.tolist() == [5, 6, 7, 8, 9]
    assert k.flatten().tolist() == v.flatten().tolist() == j.tolist()
    for n in (10, 11):
        ring.add(*torch.full((2, 1, 1, 1, 1), float(n)), torch.tensor([n]))
    assert ring.j.tolist() == [10, 11, 7, 8, 9]
    assert ring.k.flatten().tolist() == ring.j.tolist()


@pytest.mark.parametrize('kind', [KVCache, RollingCache])
def test_the_first_tokens_come_back_as_they_are(kind):
    "Attention sees by `j is i` that it needs no mask"
    k, v = torch.randn(2, 2, 3, 7, 4)
    j = torch.arange(7)
    got = kind(9).add(k, v, j)
    assert all(a is b for a, b in zip(got, (k, v, j)))


def test_a_cache_of_another_kind_is_read_anew():
    model = with_kv_cache(shaken(KINDS['GPT-2']))
    reader = DecodingState(model, 20)
    reader(ids_of(0, 2, 9))
    reader.cache = {0: object()}
    select_rows(reader, [1])
    assert reader.cache is None and len(reader.ids) == 1


def test_a_completion_ends_where_the_first_stop_string_begins():
    model = with_kv_cache(shaken(KINDS['GPT-2']))
    prompts = ['once mia ', 'tom', 'once there was a fox who ', '']
    free = complete(model, TOK, prompts, max_new_tokens=30, seed=3, temperature=0.8)
    end = free[0][0].text[5]  # a character that comes
    ends = complete(
        model, TOK, prompts, max_new_tokens=30, seed=3, temperature=0.8, stop=[end, 'zzzz']
    )
    for (short,), (long,) in zip(ends, free):
        if end in long.text:
            assert (short.text, short.ended) == (long.text[: long.text.index(end)], 'stop')
        else:
            assert short == long


def test_the_earlier_of_two_stop_strings_in_one_token_ends_the_text():
    c = Completion()
    assert c.take(1, -0.5, lambda id: 'ab', ['zz'], eos_id=9)
    assert not c.take(2, -0.25, lambda id: 'cdef', ['e', 'd'], eos_id=9)
    assert c == Completion('abc', [1, 2], [-0.5, -0.25], 'stop')
    c = Completion()
    assert not c.take(9, -0.5, lambda id: 'ab', [], eos_id=9)
    assert c == Completion('', [], [], 'eos')


def test_settings_of_complete():
    model = with_kv_cache(shaken(KINDS['GPT-2']))
    prompts = ['once mia ', 'tom', '']
    assert complete(model, TOK, [], 5) == []
    assert complete(model, TOK, 'tom', 0) == [[Completion()]]
    again = complete(model, TOK, prompts, 25, temperature=0.8, repetition_penalty=1.3)
    for prompt, (c,) in zip(prompts, again):
        alone = sample(model, TOK, prompt, 25, temperature=0.8, repetition_penalty=1.3)
        assert prompt + c.text == alone
    for bad, why in (
        (dict(top_k=0), 'top_k=0'),
        (dict(temprature=1), "complete takes no 'temprature': did you mean 'temperature'"),
        (dict(samples=0), 'give a whole number'),
        (dict(max_new_tokens=2.5), 'give a whole number'),
        (dict(stop=''), 'give a text to end at'),
    ):
        with pytest.raises(LabError, match=why):
            complete(model, TOK, 'tom', **bad)


def test_a_model_may_write_without_the_cache_that_it_has(monkeypatch):
    model = with_kv_cache(shaken(KINDS['GPT-2']))
    want = sample(model, TOK, 'once mia ', 25, temperature=0.8)
    asked = []

    def refuse(*sizes):
        asked.append(sizes)
        raise AssertionError('a cache was asked for')

    monkeypatch.setattr(model, 'cache', refuse)
    assert sample(model, TOK, 'once mia ', 25, cache=False, temperature=0.8) == want
    ((c,),) = complete(model, TOK, 'once mia ', 25, cache=False, temperature=0.8)
    assert 'once mia ' + c.text == want
    assert asked == []
    for write in (sample, complete):
        with pytest.raises(AssertionError, match='a cache was asked for'):
            write(model, TOK, 'once mia ', 25)


class Near(Attention):
    "An attention of the reader's own: its class has the mask and the transforms"

    def __init__(
        self,
        cfg,
        layer=0,
        transforms=(part(RoPE),),
        mask=part(sliding_window, size=3),
        **kwargs,
    ):
        super().__init__(cfg, layer, transforms, mask, **kwargs)


def test_what_stands_in_the_class_counts_as_if_it_stood_in_the_recipe():
    cfg = GPTConfig(vocab_size=9, max_len=16, d_model=16, n_heads=2, n_layers=1, pos=None)
    model = MiniGPT(replace(cfg, attn=part(Near))).eval()
    quick = with_kv_cache(model)
    transforms = quick.cfg.attn.keywords['transforms']
    assert transforms == (part(RoPE), part(CacheTransform, size=3))
    # the model is what its configuration says
    kinds = [type(t) for t in quick.blocks[0].attn.transforms]
    assert kinds == [t.func for t in transforms]


def test_an_attention_that_takes_any_keyword_takes_transforms():
    class Any(Attention):
        def __init__(self, cfg, layer=0, **kwargs):
            super().__init__(cfg, layer, **kwargs)

    cfg = GPTConfig(vocab_size=9, max_len=16, d_model=16, n_heads=2, n_layers=1, attn=part(Any))
    assert with_kv_cache(MiniGPT(cfg).eval()).cache(1, 4) is not None
