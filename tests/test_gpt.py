"""The configuration refuses what cannot be a model, and the model keeps what its hooks promise: the
cases that the notebook leaves out, and the answers to its exercises."""

import math
import re
import warnings
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from answers import gpt as answers
from fastcore.test import test_close as close
from fastcore.test import test_eq as equal
from helpers import code_cell
from torch import nn
from torch.nn import functional as F

import llm_lab.files
from llm_lab.chars import CharTokenizer
from llm_lab.core import LabError, check, rng
from llm_lab.gpt import MLP, Block, GPTConfig, MiniGPT, caches_of, check_causal, check_vocabulary
from llm_lab.parts import Aux, part
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


def test_a_tokenizer_of_the_models_size_or_of_a_padded_one_passes():
    ab = CharTokenizer('ab')
    check_vocabulary(MiniGPT(GPTConfig(vocab_size=2)), ab)
    check_vocabulary(MiniGPT(GPTConfig(vocab_size=32)), ab)  # padded to a round size
    refuses(
        lambda: check_vocabulary(MiniGPT(GPTConfig(vocab_size=1)), ab),
        'the tokenizer has 2 ids, the model 1: give the tokenizer of this model',
    )


# ---- the model: seeds, first weights, dropout, what is called in between


def test_configurations_compare_by_value():
    equal(GPTConfig(d_model=64), GPTConfig(d_model=64))
    assert GPTConfig(mlp=part(MLP, d_ff=99)) != GPTConfig()


def test_the_weights_depend_on_the_seed_alone():
    before = torch.get_rng_state()
    model = MiniGPT(GPTConfig(), seed=0)
    equal(torch.get_rng_state(), before)  # nothing drawn from the global generator
    equal(logits(MiniGPT(GPTConfig(), seed=0), IDS), logits(model, IDS))
    assert (logits(MiniGPT(GPTConfig(), seed=1), IDS) != logits(model, IDS)).all()


def test_at_gpt2s_width_the_first_weights_have_gpt2s_standard_deviations():
    model = MiniGPT(GPTConfig(d_model=768, n_layers=2, n_heads=12))
    attn = model.blocks[0].attn
    spread = [attn.qkv.weight.std().item(), attn.out.weight.std().item()]
    close(spread, [0.02, 0.02 / 4**0.5], eps=1e-3)
    assert not any(p.any() for n, p in model.named_parameters() if n.endswith('bias'))


def test_in_evaluation_mode_dropout_is_off():
    dropped = MiniGPT(GPTConfig(dropout=0.5))
    assert (logits(dropped, IDS) != logits(dropped, IDS)).any()  # in training mode, chance
    equal(logits(dropped.eval(), IDS), logits(MiniGPT(GPTConfig()), IDS))


def test_how_a_block_is_called_may_be_replaced():
    model = MiniGPT(GPTConfig())
    passed = []

    def watched(block, x, i, **ctx):
        passed.append(block.attn.layer)
        return block(x, i, **ctx)

    model.run_block = watched
    equal(logits(model, IDS), logits(MiniGPT(GPTConfig()), IDS))
    equal(passed, [0, 1, 2, 3])


def test_a_tied_model_counts_its_table_once_and_learns_by_both_uses():
    plain, tied = MiniGPT(GPTConfig()), MiniGPT(GPTConfig(tie=True))
    equal(plain.n_params - tied.n_params, 65 * 128)
    assert tied.lm_head.weight is tied.tok.weight
    lookup = tied.tok(IDS).detach()
    tied(IDS).square().mean().backward()
    both = tied.tok.weight.grad.clone()
    tied.zero_grad()
    hook = tied.tok.register_forward_hook(lambda *args: lookup)  # the table is not looked up
    tied(IDS).square().mean().backward()
    hook.remove()
    assert (both != tied.tok.weight.grad).any()


def test_tying_is_refused_where_there_is_no_weight_to_share():
    class Bare(nn.Module):
        def __init__(self, d_model, vocab_size):
            super().__init__()

    cfg = GPTConfig(tie=True, lm_head=part(Bare))
    refuses(lambda: MiniGPT(cfg), 'has no weight to share; leave tie out')


# ---- the hooks


class Unit(nn.Module):
    "A transform: q and k of length √D"

    def __init__(self, cfg, layer=0):
        super().__init__()

    def forward(self, q, k, v, i, j, **ctx):
        def unit(t):
            return F.normalize(t, dim=-1) * t.shape[-1] ** 0.5

        return unit(q), unit(k), v, i, j


def test_a_transform_from_outside_changes_the_answer_and_no_weight():
    model = MiniGPT(GPTConfig())
    normalized = MiniGPT(GPTConfig(attn=part(Attention, transforms=(part(Unit),))))
    equal(str(normalized.cfg.attn), 'part(Attention, transforms=(part(Unit),))')
    assert (logits(normalized, IDS)[:, 1:] != logits(model, IDS)[:, 1:]).any()
    equal(
        {n: p.shape for n, p in normalized.named_parameters()},
        {n: p.shape for n, p in model.named_parameters()},
    )


def test_a_dense_mask_that_means_the_same_gives_the_same():
    model, dense = MiniGPT(GPTConfig()), MiniGPT(GPTConfig(attn=part(Attention, mask=part(past))))
    close(logits(dense, IDS), logits(model, IDS), eps=1e-5)


def test_positions_may_come_in_any_order():
    model = MiniGPT(GPTConfig())
    order = torch.randperm(12, generator=rng(0, 'order'))
    close(model(IDS[:, order], i=order).detach(), logits(model, IDS)[:, order], eps=1e-5)


def upto(i, j, limit):
    return (j <= i) & (j < limit)


def test_a_keyword_reaches_the_mask_that_needs_it_and_no_other_is_accepted():
    model = MiniGPT(GPTConfig())
    limited = MiniGPT(GPTConfig(attn=part(Attention, mask=part(upto))))
    close(logits(limited, IDS, limit=99), logits(model, IDS), eps=1e-5)
    assert (logits(limited, IDS, limit=3) != logits(model, IDS)).any()
    refuses(lambda: model(IDS, limit=3), "no part of this model reads 'limit'; it reads nothing")
    refuses(lambda: limited(IDS), "needs the keyword 'limit': call model(ids, limit=…)")


class Counting(MLP):
    "An MLP that counts the sequences it saw"

    def __init__(self, cfg, layer=0):
        super().__init__(cfg)
        self.layer = layer
        self.n = 0

    def forward(self, x, **ctx):
        self.n += len(x)
        return super().forward(x)

    def metrics(self):
        n = self.n
        self.n = 0
        return {f'sequences {self.layer}': n}


def test_what_parts_have_noted_is_told_once():
    counting = MiniGPT(GPTConfig(n_layers=2, mlp=part(Counting)))
    logits(counting, torch.zeros(3, 5, dtype=torch.int64))
    equal(counting.metrics(), {'sequences 0': 3, 'sequences 1': 3})
    equal(counting.metrics(), {'sequences 0': 0, 'sequences 1': 0})
    equal(MiniGPT(GPTConfig()).metrics(), {})


class Small(MLP):
    "An MLP whose output should be small: it adds its mean square to the loss"

    needs = ('aux',)

    def __init__(self, cfg, layer=0):
        super().__init__(cfg)
        self.layer = layer

    def forward(self, x, aux=None, **ctx):
        y = super().forward(x)
        if aux is not None:
            aux.add(self.layer, loss=y.square().mean(), size=y.norm())
        return y


def test_an_auxiliary_loss_is_collected_once_a_layer():
    small = MiniGPT(GPTConfig(n_layers=3, mlp=part(Small)))
    zeros = torch.zeros(1, 5, dtype=torch.int64)
    aux = Aux()
    for _ in range(2):
        small(zeros, aux=aux)  # twice is once
    equal(list(aux.terms), [0, 1, 2])
    close(aux.loss(), sum(x['size'] ** 2 for x in aux.terms.values()) / (5 * 128), eps=1e-6)
    model = MiniGPT(GPTConfig())
    refuses(lambda: model(zeros, aux=aux), "no part of this model reads 'aux'")


# ---- caches, and parts that read the future


class Sums(nn.Module):
    "A mixer that adds up the past, and keeps the sum so far"

    needs = ('cache',)

    def __init__(self, cfg, layer=0):
        super().__init__()

    def cache(self, batch, length):
        return {}

    def forward(self, x, i, cache=None, **ctx):
        if cache is None:
            return x.cumsum(1)
        mine = cache[self]
        y = x.cumsum(1) + mine.get('sum', 0.0)
        mine['sum'] = y[:, -1:]
        return y


class Forgets(Sums):
    "The same with a slip: the sum is lost"

    def forward(self, x, i, **ctx):
        return x.cumsum(1)


def in_turns(cfg, layer, of):
    return of[layer % len(of)](cfg, layer)


def kept_by(*mixers):
    return MiniGPT(GPTConfig(n_layers=2, attn=part(in_turns, of=mixers))).cache(1, 64)


def test_a_model_has_a_cache_only_if_every_layer_keeps_one():
    equal(MiniGPT(GPTConfig()).cache(1, 64), None)  # none of its parts remembers
    equal([*kept_by(part(Sums)).values()], [{}, {}])  # one for each of the two parts
    equal(kept_by(part(Sums), part(Attention)), None)  # one layer without: no cache at all


def test_a_part_that_forgets_is_named_and_the_model_has_no_cache(monkeypatch):
    monkeypatch.setattr(llm_lab.files, '_said', set())
    with warnings.catch_warnings(record=True, action='always') as said:
        equal(kept_by(part(Forgets)), None)  # it would say something else
    assert 'Forgets of layer 0' in str(said[0].message)


class Average(nn.Module):
    "A mixer that gives each position the mean of all: the later ones, too"

    def __init__(self, cfg, layer=0):
        super().__init__()

    def forward(self, x, i, **ctx):
        return x.mean(1, keepdim=True).expand_as(x)


def test_a_part_that_reads_the_future_is_named():
    refuses(
        lambda: check_causal(MiniGPT(GPTConfig(attn=part(Average)))),
        'Average of layer 0 reads the future',
    )
    model = MiniGPT(GPTConfig())
    assert check_causal(model) is model


# ---- the chapter: what it says of gradients, and its exercises

cell = partial(code_cell, '22_gpt')


@cache
def space():
    "What the cells of the exercises, and of the plain model, define"
    names = dict(torch=torch, nn=nn, F=F, rng=rng, check=check, part=part, ids=IDS, causal=causal)
    names |= dict(Block=Block, GPTConfig=GPTConfig, MiniGPT=MiniGPT, Attention=Attention)
    names |= dict(math=math, test_eq=equal)
    exec(cell('class PlainBlock('), names)
    exec(cell('class PlainGPT('), names)
    exec(cell('def influences(').partition('influence = ')[0], names)
    exec(cell('def my_block_spec('), names)
    exec(cell('def my_block('), names)
    exec(cell('def my_guess('), names)
    return names


def verdict_block(answer):
    return check(answer, space()['my_block_spec'], *space()['block_cases'])


def verdict_guess(answer):
    return check(answer, space()['measured'], ())


@pytest.mark.parametrize('answer', answers.RIGHT)
def test_a_right_block_is_told_so(answer):
    assert verdict_block(answer) == f'{answer.__name__}: right on 3 cases'


@pytest.mark.parametrize('answer', answers.WRONG)
def test_a_wrong_block_gets_a_counter_example(answer):
    assert 'expected' in verdict_block(answer)


@pytest.mark.parametrize('answer', answers.RIGHT_GUESSES)
def test_a_right_guess_is_told_so(answer):
    assert verdict_guess(answer) == f'{answer.__name__}: right on 1 cases'


@pytest.mark.parametrize('answer', answers.WRONG_GUESSES)
def test_a_wrong_guess_gets_a_counter_example(answer):
    assert 'expected' in verdict_guess(answer)


def test_the_stubs_of_the_exercises_say_not_yet():
    assert verdict_block(space()['my_block']) == 'my_block: not yet'
    assert verdict_guess(space()['my_guess']) == 'my_guess: not yet'


@pytest.mark.parametrize('sizes', [(1, 8, 1, 1), (65, 16, 3, 4), (9, 12, 2, 3)])
def test_the_plain_model_is_minigpt(sizes):
    V, C, L, H = sizes
    model = MiniGPT(GPTConfig(vocab_size=V, max_len=12, d_model=C, n_layers=L, n_heads=H))
    plain = space()['PlainGPT'](V=V, T=12, C=C, L=L, H=H)
    with torch.no_grad():
        for p in model.parameters():  # biases and norms, too
            p.add_(0.1 * torch.randn(p.shape, generator=rng(0, f'{p.shape}')))
    weights = model.state_dict().values()
    plain.load_state_dict(dict(zip(plain.state_dict(), weights, strict=True)))
    close(logits(model, IDS % V), logits(plain, IDS % V), eps=1e-4)


class TimeNormBlock(Block):
    "The edit of the exercise *break it*"

    def forward(self, x, i, **ctx):
        x = x + self.drop(self.attn(x - x.mean(1, keepdim=True), i, **ctx))
        return x + self.drop(self.mlp(self.norm2(x), i=i, **ctx))


def test_a_norm_over_time_leaks_and_only_the_gradients_tell():
    broken = MiniGPT(GPTConfig(block=part(TimeNormBlock)))
    equal(logits(broken, IDS).shape, (2, 12, 65))
    loss = F.cross_entropy(logits(broken, IDS).flatten(0, 1), IDS.flatten())
    close(loss.item(), 4.17, eps=0.4)  # the first loss is as ever
    i = torch.arange(12)
    equal(broken.blocks[0].attn.dense_mask(i, i), causal(i[:, None], i))  # and so is the mask
    influences = space()['influences']
    assert (influences(broken).triu(1) > 0).sum() == 66
    # seen by the logits of every earlier position; the model as it is has none
    assert (influences(MiniGPT(GPTConfig())).triu(1) > 0).sum() == 0
    assert (logits(broken, IDS) - logits(MiniGPT(GPTConfig()), IDS)).abs().max() > 1e-3


def slip(i, j):
    return j <= i + 1


@pytest.mark.parametrize('L', [1, 2, 3])
def test_a_slip_of_the_mask_looks_one_position_further_ahead_with_every_block(L):
    model = MiniGPT(GPTConfig(n_layers=L, attn=part(Attention, mask=part(slip))))
    influence = space()['influences'](model)
    assert (influence.diagonal(L) > 0).all()
    assert (influence.triu(L + 1) == 0).all()
