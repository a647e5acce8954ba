"""Slips with parts and objectives of one's own, each answered in one line that names the part."""

import warnings

import pytest
import torch
from helpers import one_line, tiny_model
from torch import nn

import llm_lab as lab
from llm_lab.core import rng
from llm_lab.gpt import check_causal
from llm_lab.parts import Part, part

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(autouse=True)
def nothing_said():
    "Each promise is said once in a process: here, once in a test"
    from llm_lab.files import _said

    before = set(_said)
    _said.clear()
    yield
    _said.clear()
    _said.update(before)


def warned(call) -> list:
    "What a call warns of"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        call()
    return [str(w.message) for w in said]


def rows_of(step):
    return torch.randint(5, (4, 9), generator=rng(step, 'rows'))


def model_of(attn, **more):
    return tiny_model(vocab_size=5, attn=part(attn), **more)


class Sums(Part):
    "A mixer that adds up the past, and keeps the sum so far"

    needs = ('cache',)

    def __init__(self, cfg, layer=0):
        super().__init__()
        self.value = nn.Linear(cfg.d_model, cfg.d_model)

    def cache(self, batch, length):
        return {}

    def forward(self, x, i, cache=None, **ctx):
        y = self.value(x).cumsum(1)
        if cache is not None:
            y = y + cache[self].get('sum', 0.0)
            cache[self]['sum'] = y[:, -1:]
        return y


class Deaf(Sums):
    needs = ()


class Forgets(Sums):
    def forward(self, x, i, cache=None, **ctx):
        return self.value(x).cumsum(1)


class Breaks(Sums):
    def forward(self, x, i, cache=None, **ctx):
        return super().forward(x, i) if cache is None else cache['sum']


class Plain(Part):
    "A mixer that keeps nothing"

    def __init__(self, cfg, layer=0):
        super().__init__()

    def forward(self, x, i, **ctx):
        return x


class Means(Plain):
    "Reads the future"

    def forward(self, x, i, **ctx):
        return x.mean(1, keepdim=True).expand_as(x)


class Wide(Plain):
    def forward(self, x, i, **ctx):
        return torch.cat([x, x], -1)


class Short(Plain):
    def forward(self, x):
        return x


# ---- caches


def test_a_cache_that_would_never_be_given_is_told():
    one_line(
        lambda: model_of(Deaf),
        "Deaf has a cache(…), but needs=() lacks 'cache': write needs = ('cache',)",
    )
    assert model_of(Sums).cache(1, 8)
    inner = type('Outer', (Sums,), dict(needs=('aux',)))
    one_line(lambda: model_of(inner), "needs=('aux',) lacks", "write needs = ('aux', 'cache')")
    text = type('Text', (Sums,), dict(needs='cache'))
    one_line(lambda: model_of(text), "Text: needs='cache'", "write needs = ('cache',)")


def test_a_misspelt_need_is_told_and_a_word_of_ones_own_is_not():
    wrong = type('Wrong', (Plain,), dict(needs=('chache',)))
    (said,) = warned(lambda: model_of(wrong))
    assert "Wrong needs 'chache'" in said and "did you mean 'cache'?" in said
    own = type('Own', (Plain,), dict(needs=('speaker', 'doc', 'cache', 'gate')))
    assert warned(lambda: model_of(own)) == []


@pytest.mark.parametrize('kind, why', [(Forgets, 'other values'), (Breaks, 'KeyError')])
def test_a_cache_that_is_not_used_is_told_once(kind, why):
    model = model_of(kind)
    found = []
    said = warned(lambda: found.extend(model.cache(1, 8) for _ in range(2)))
    assert found == [None, None]
    (line,) = said
    assert kind.__name__ in line and why in line and 'reads the text anew' in line
    assert '\n' not in line


def test_the_part_that_departs_is_named_though_another_is_there():
    attn = part(in_turns, of=(part(Sums), part(Forgets)))
    (line,) = warned(lambda: tiny_model(vocab_size=5, n_layers=2, attn=attn).cache(1, 8))
    assert 'Forgets of layer 1' in line


def in_turns(cfg, layer, of):
    return of[layer % len(of)](cfg, layer)


def test_a_mixer_without_a_cache_learns_what_it_lacks():
    one_line(
        lambda: lab.with_kv_cache(model_of(Plain)),
        'Plain of layer 0 keeps nothing',
        'cache(batch, length)',
        "needs = ('cache',)",
    )


# ---- shapes, signatures and the future, before the first step


def fitted(model, **more):
    return lambda: lab.fit(model, rows_of, steps=2, **more)


def test_a_part_that_cannot_be_used_is_named_before_the_first_step():
    one_line(fitted(model_of(Wide)), 'attn=part(Wide)', 'makes (2, 8, 16) of (2, 8, 8)')
    one_line(fitted(model_of(Short)), 'attn=part(Short)', 'cannot read', '(x, i, **ctx)')
    mlp = tiny_model(vocab_size=5, mlp=part(Short))
    one_line(fitted(mlp), 'mlp=part(Short)', 'cannot read', '(x, i=i, **ctx)')
    head = type('Head', (nn.Linear,), dict(forward=lambda self, x: x))
    one_line(fitted(tiny_model(vocab_size=5, lm_head=part(head))), 'lm_head=', 'makes (2, 8, 8)')


def test_a_part_that_reads_the_future_is_named():
    words = 'Means of layer 0', 'reads the future'
    one_line(lambda: check_causal(model_of(Means)), *words)
    (line,) = warned(fitted(model_of(Means)))
    assert all(word in line for word in words)
    for good in (model_of(Sums), model_of(Plain), tiny_model(vocab_size=5)):
        assert check_causal(good) is good
        assert warned(fitted(good)) == []
    slip = part(lab.Attention, mask=part(ahead))
    one_line(lambda: check_causal(tiny_model(vocab_size=5, attn=slip)), 'Attention of layer 0')


def ahead(i, j):
    return j <= i + 1


def test_whoever_wants_both_sides_is_not_warned():
    def masked_loss(model, rows):
        return model(rows[:, :-1]).square().mean()

    assert warned(fitted(model_of(Means), loss_fn=masked_loss)) == []


def test_the_check_leaves_no_trace():
    first, second = model_of(Sums, dropout=0.5), model_of(Sums, dropout=0.5)
    check_causal(first)
    assert first.training
    a, b = (lab.fit(m, rows_of, steps=3).losses for m in (first, second))
    assert a == b
