"""The configuration refuses what cannot be a model, and the model keeps what its hooks promise: the
cases that the notebook leaves out."""

import re
import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fastcore.test import test_close as close
from fastcore.test import test_eq as equal
from torch import nn

import llm_lab.files
from llm_lab.core import LabError, rng
from llm_lab.gpt import MLP, GPTConfig, MiniGPT, caches_of, check_vocabulary
from llm_lab.parts import part
from llm_lab.self_attention import Attention, causal

pytestmark = pytest.mark.usefixtures('one_thread')
IDS = torch.randint(65, (2, 12), generator=rng(0, 'ids'))


def near(i, j, size):
    return (j <= i) & (i - j < size)


def past(i, j):
    return i - j >= 0  # causal in other words, so it is computed densely


def refuses(make, words):
    with pytest.raises(LabError, match=re.escape(words)):
        make()


@torch.no_grad()
def logits(model, *args, **ctx):
    return model(*args, **ctx)


def wide(cfg, layer, by):
    return MLP(cfg, d_ff=by * cfg.d_model)


@pytest.mark.parametrize(
    'settings, words',
    [
        (dict(d_head=1.5), 'head_dim=1.5: give a whole number'),
        (dict(n_layers=0), 'n_layers=0: give a whole number of at least 1'),
        (dict(dropout=1.5), 'dropout=1.5'),
        (dict(mlp=MLP), 'mlp=MLP is no recipe: write mlp=part(MLP)'),
        (dict(attn='gqa'), "attn='gqa' is no recipe: write attn=part(GQA)"),
        (dict(mlp=None), 'mlp=None is no recipe: write mlp=part(MLP)'),
        (
            dict(attn=partial(Attention)),
            'attn=Attention is no recipe: write attn=part(Attention)',
        ),
        (dict(mlp=nn.Linear(2, 2)), 'mlp=Linear(…) is no recipe: write mlp=part(Linear)'),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_one_line(settings, words):
    refuses(lambda: GPTConfig(**settings), words)


@pytest.mark.parametrize('d_ff', [0, -8, 1.5])
def test_a_width_of_the_mlp_is_a_whole_number(d_ff):
    refuses(lambda: GPTConfig(mlp=part(MLP, d_ff=d_ff)), f'd_ff={d_ff}: give a whole number')


def test_a_recipe_in_the_wrong_place_is_refused():
    refuses(lambda: GPTConfig(attn=part(Attention, mask=causal)), 'write mask=part(causal)')
    refuses(
        lambda: GPTConfig(norm=part(nn.GELU)),
        'norm=part(nn.GELU): GELU can be mlp.act, not norm; choose from',
    )
    refuses(
        lambda: GPTConfig(norm=part(nn.GroupNorm, num_groups=4)),
        'GroupNorm would mix positions or texts; choose from',
    )
    refuses(
        lambda: GPTConfig(mlp=part(wide)),
        "mlp=part(wide): missing a required argument: 'by'; write part(wide, by=…)",
    )


def test_heads_may_have_a_size_of_their_own_and_lm_head_a_bias():
    cfg = GPTConfig(d_model=64, n_heads=2, attn=part(Attention, mask=part(near, size=8)))
    equal(replace(cfg, d_model=128).head_dim, 64)
    equal(GPTConfig(n_heads=3, d_head=20).head_dim, 20)
    model = MiniGPT(GPTConfig(n_heads=3, d_head=20, lm_head=part(nn.Linear, bias=True)))
    equal(model.blocks[0].attn.out.weight.shape, (128, 60))
    equal(logits(model, IDS).shape, (2, 12, 65))


def test_logits_of_the_last_position_alone_are_those_of_the_whole():
    model = MiniGPT(GPTConfig(), seed=0)
    last = model.lm_head(model.features(IDS)[:, -1:]).detach()
    close(last, logits(model, IDS)[:, -1:], eps=1e-6)


def test_a_text_longer_than_the_table_of_positions_is_refused():
    model = MiniGPT(GPTConfig(), seed=0)
    refuses(lambda: model(IDS.repeat(1, 99)), 'the text has 1188 tokens, max_len is 256')
    far = torch.arange(250, 262)  # few tokens, at positions beyond the table
    refuses(lambda: model(IDS, i=far), 'a position is beyond max_len=256')


class FirstIsPadding(nn.Module):
    "A transform: the first position of the second sequence is padding"

    def __init__(self, cfg, layer=0):
        super().__init__()

    def forward(self, q, k, v, i, j, **ctx):
        return q, k, v, i, torch.stack([j, j.masked_fill(j == 0, -1)])


def test_a_sequence_that_begins_with_padding_is_the_sequence_without_it():
    model = MiniGPT(GPTConfig(), seed=0)
    attn = part(Attention, transforms=(part(FirstIsPadding),), mask=part(past))
    padded = MiniGPT(GPTConfig(attn=attn))
    close(logits(padded, IDS)[0], logits(model, IDS)[0], eps=1e-5)  # the first sequence is as ever
    without = logits(model, IDS[1:, 1:], i=torch.arange(1, 12))  # the second, from its second token
    close(logits(padded, IDS)[1, 1:], without[0], eps=1e-5)


class Keeps(nn.Module):
    "A mixer that keeps something"

    needs = ('cache',)

    def __init__(self, cfg, layer=0):
        super().__init__()

    def cache(self, batch, length):
        return {}

    def forward(self, x, i, cache=None, **ctx):
        return x


def why_no_cache(attn):
    return caches_of(MiniGPT(GPTConfig(n_layers=2, attn=attn)), 1, 8)[1]


def test_why_a_model_keeps_nothing_is_told():
    equal(why_no_cache(part(Keeps)), '')
    equal(why_no_cache(part(Attention)), 'Attention of layer 0 keeps nothing')


@pytest.mark.parametrize(
    ('ids', 'rows', 'padded'),
    [(54, 54, True), (65, 128, True), (50_257, 50_304, True), (151_665, 151_936, True)]
    + [(54, 65, False), (300, 1024, False), (2, 160, False)],
)
def test_fewer_ids_than_rows_are_padding_or_a_warning(ids, rows, padded, monkeypatch):
    monkeypatch.setattr(llm_lab.files, '_said', set())
    model = SimpleNamespace(cfg=GPTConfig(vocab_size=rows))
    with warnings.catch_warnings(record=True, action='always') as notes:
        for _ in range(2):
            check_vocabulary(model, SimpleNamespace(vocab_size=ids))
    words = [
        f'the tokenizer has {ids:,} ids, the model {rows:,}: if it belongs' in str(n.message)
        for n in notes
    ]
    assert words == ([] if padded else [True])  # once


def test_more_ids_than_rows_are_refused_and_what_is_not_known_is_let_pass():
    model = SimpleNamespace(cfg=GPTConfig(vocab_size=64))
    with pytest.raises(LabError, match='the tokenizer has 65 ids, the model 64: .*vocab_size=65'):
        check_vocabulary(model, SimpleNamespace(vocab_size=65))
    check_vocabulary(model, SimpleNamespace(vocab_size=None))  # batches of nobody knows what
    check_vocabulary(torch.nn.Linear(1, 1), SimpleNamespace(vocab_size=65))
