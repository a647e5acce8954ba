"""The chapter `21_self_attention`: its exercises, what it says of its small task, and cases of its
functions that are not for its readers."""

import math
import re
from functools import cache, partial

import pytest
import torch
from answers import self_attention as answers
from fastcore.test import test_close as close
from fastcore.test import test_eq as equal
from helpers import cells_of, code_cell
from torch import nn
from torch.nn import functional as F

from llm_lab.core import check, rng
from llm_lab.self_attention import causal, scaled_dot_product

cell = partial(code_cell, '21_self_attention')


@cache
def space():
    "What the ladder's cells define, without the trainings"
    names = dict(math=math, torch=torch, nn=nn, F=F, rng=rng, check=check)
    names['test_close'] = names['test_eq'] = lambda *args, **keywords: None
    names['scaled_dot_product'] = scaled_dot_product
    exec(cell('def draw_hands('), names)
    exec(cell('class Recall('), names)
    exec(cell('def train_recall('), names)
    exec(cell('def read_spec('), names)
    exec(cell('class HeadReader(').partition('head_models,')[0], names)
    exec(cell('def causal_head_spec('), names)
    exec(cell('def causal_head('), names)
    exec(cell('def heads_spec('), names)
    exec(cell('def split_heads('), names)
    exec(cell('class HeadsReader(').partition('one_models,')[0], names)
    exec(cell('def influence(').partition('versions = ')[0], names)
    exec(cell('def many_heads('), names)
    exec(cell('def sink('), names)
    exec(cell('def position_of('), names)
    return names


# ---- the functions


def test_fewer_heads_of_keys_serve_neighbouring_queries():
    q, k, v = torch.randn(3, 2, 4, 6, 8, generator=rng(0, 'heads'))  # (B, H, T, D)
    few_k, few_v = k[:, ::2], v[:, ::2]
    each = [t.repeat_interleave(2, dim=1) for t in (few_k, few_v)]
    got = scaled_dot_product(q, few_k, few_v)
    torch.testing.assert_close(got, scaled_dot_product(q, *each))


@pytest.mark.parametrize('T', [1, 2, 7])
def test_no_mask_is_the_causal_mask(T):
    q, k, v = torch.randn(3, 2, 4, T, 8, generator=rng(T, 'heads'))
    j = torch.arange(T)
    got = scaled_dot_product(q, k, v)
    torch.testing.assert_close(got, scaled_dot_product(q, k, v, causal(j[:, None], j)))


# ---- the ladder


@pytest.mark.parametrize('T, D', [(1, 1), (1, 8), (5, 3), (9, 16)])
def test_the_loops_agree_with_pytorch(T, D):
    q, k, v = torch.randn(3, T, D, generator=rng(0, f'{T}/{D}'))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(space()['causal_head_spec'](q, k, v), want)
    torch.testing.assert_close(space()['causal_head'](q, k, v), want)


def test_equal_scores_are_the_mean_of_the_past():
    names = dict(space())
    exec(cell('def mean_of_past_spec('), names)
    q, k, v = torch.randn(3, 6, 16, generator=rng(0, 'qkv'))
    want = names['mean_of_past_spec'](v)
    torch.testing.assert_close(names['causal_head'](q * 0, k, v), want)


def test_hands_are_what_the_chapter_says():
    letters, digits, asked, answers = space()['draw_hands'](200, rng(0, 'hands'))
    assert all(len(set(hand)) == 8 for hand in letters.tolist())
    assert (asked[:, 0] != asked[:, 1]).all()
    for hand, row, two, said in zip(*(t.tolist() for t in (letters, digits, asked, answers))):
        assert [row[hand.index(letter)] for letter in two] == said


def test_behind_a_deeper_layer_one_head_finds_much_of_both():
    "So many heads are the straight way and not the only one, as the chapter says"

    def one_head():
        return space()['HeadsReader'](H=1)

    def right(deep):
        class Deep(space()['Recall']):
            def __init__(self, reader, C=32, n_asked=1):
                super().__init__(reader, C, n_asked)
                if deep:
                    self.to_logits = nn.Sequential(nn.Linear(C, C), nn.GELU(), self.to_logits)

        names = dict(space(), Recall=Deep)
        exec(cell('def train_recall('), names)
        model = names['train_recall'](one_head, seed=0, n_asked=2, steps=300)
        return names['accuracy'](model, names['test_hands'])

    assert right(deep=False) < 0.3
    assert right(deep=True) > 0.7


def test_one_head_may_also_prefer_the_first_letter():
    "So it is the initial parameters that choose, as the chapter says"
    names = space()
    model = names['train_recall'](lambda: names['HeadsReader'](H=1), seed=7, n_asked=2)
    *shown, digits = names['test_hands']
    with torch.no_grad():
        right = (model(*shown).argmax(-1) == digits).float().mean(0)
    assert right[0] > 0.75
    assert right[1] < 0.35


def make_linear_reader(D):
    class LinearReader(space()['HeadReader']):
        "The scores themselves are the weights"

        def forward(self, x):
            q, k, v = self.query(x[:, -1:]), self.key(x), self.value(x)
            return (q @ k.mT @ v)[:, 0] / x.shape[1]

    return LinearReader(D=D)


def right_shares(make_reader, seeds):
    names = space()
    models = [names['train_recall'](make_reader, seed) for seed in seeds]
    return [names['accuracy'](model, names['test_hands']) for model in models]


def test_scores_as_weights_do_in_a_wide_head():
    assert min(right_shares(lambda: make_linear_reader(D=32), seeds=[0])) > 0.9


def test_a_narrow_head_needs_the_softmax():
    assert min(right_shares(lambda: space()['HeadReader'](D=4), seeds=range(3))) > 0.95
    assert max(right_shares(lambda: make_linear_reader(D=4), seeds=range(3))) < 0.9


# ---- the exercises


def verdict_heads(answer):
    return check(answer, space()['many_heads_spec'], *space()['cases'])


def verdict_sink(answer):
    return check(answer, space()['sink_spec'], *space()['sink_cases'])


@pytest.mark.parametrize('answer', answers.RIGHT_HEADS)
def test_a_right_answer_with_many_heads_is_told_so(answer):
    assert verdict_heads(answer) == f'{answer.__name__}: right on 4 cases'


@pytest.mark.parametrize('answer', answers.WRONG_HEADS)
def test_a_wrong_answer_with_many_heads_gets_a_counter_example(answer):
    assert 'expected' in verdict_heads(answer)


@pytest.mark.parametrize('answer', answers.RIGHT_SINKS)
def test_a_right_sink_is_told_so(answer):
    assert verdict_sink(answer) == f'{answer.__name__}: right on 9 cases'


@pytest.mark.parametrize('answer', answers.WRONG_SINKS)
def test_a_wrong_sink_gets_a_counter_example(answer):
    assert 'expected' in verdict_sink(answer)


def verdict_position(answer):
    return check(answer, space()['position_of_spec'], *space()['split_cases'])


@pytest.mark.parametrize('answer', answers.RIGHT_POSITIONS)
def test_a_right_position_is_told_so(answer):
    assert verdict_position(answer) == f'{answer.__name__}: right on 58 cases'


@pytest.mark.parametrize('answer', answers.WRONG_POSITIONS)
def test_a_wrong_position_gets_a_counter_example(answer):
    assert 'expected' in verdict_position(answer)


def test_a_guess_on_longer_hands_is_marked():
    names = dict(space())
    names['head_model'] = names['train_recall'](names['HeadReader'], seed=0)
    exec(cell('def my_guess('), names)
    verdicts = {g: check(lambda g=g: g, names['measured'], ()) for g in 'abc'}
    assert verdicts['c'] == '<lambda>: right on 1 cases'
    assert all('expected' in verdicts[g] for g in 'ab')


def test_the_split_to_be_pasted_turns_the_comparison_red_and_nothing_else():
    (prose,) = [c for c in cells_of('21_self_attention', 'markdown') if 'Break it' in c]
    (pasted,) = re.findall(r'```python\n(def split_heads.*?)```', prose, re.S)
    source = cell('def split_heads(')
    given = 'def split_heads(t, H):  # (B, T, C) → (B, H, T, D)\n'
    given += '    return t.unflatten(-1, (H, -1)).transpose(1, 2)\n'
    assert given in source
    names = dict(space(), test_eq=equal, test_close=close)
    exec(source, dict(names))
    with pytest.raises(AssertionError) as told:
        exec(source.replace(given, pasted), names)
    assert names['each'].shape == (2, 4, 6, 8)  # the first assertion was passed
    assert 'joined' in names  # and all before the second
    assert 'close' in str(told.value)


def test_heads_that_are_split_without_a_transpose_have_the_shape_and_leak_at_the_join():
    "What the answer to the exercise *break it* says"

    def join(t):  # (B, H, T, D) → (B, T, C)
        return t.transpose(1, 2).flatten(2)

    def attend(split, x, join=join):  # (T, C) → (T, C)
        q = split(x[None], 4)
        return join(scaled_dot_product(q, q, q))[0]

    x = torch.randn(6, 32, generator=rng(0, 'x'))
    right = space()['split_heads']
    assert answers.viewed(x[None], 4).shape == right(x[None], 4).shape
    want = space()['heads_spec'](x, x, x, H=4)
    torch.testing.assert_close(attend(right, x), want)
    assert (attend(answers.viewed, x) - want).abs().max() > 0.1

    def leaks(split, join=join):
        m = space()['influence'](lambda q, k, v: attend(split, q, join), T=6, D=32)
        return (m.triu(1) > 0).sum().item()

    assert leaks(right) == 0
    assert leaks(answers.viewed) > 0
    # rows that go back to the positions they came from leak nothing: inside a head all is well
    assert leaks(answers.viewed, lambda t: t.reshape(1, 6, 32)) == 0
    row_position = [[answers.floor(r, h, 6, 4) for r in range(6)] for h in range(4)]
    assert all(row == sorted(row) for row in row_position)  # never falls
    assert row_position[1][0] == 1  # is written to position 0
