"""Sampling at its edges: settings that leave nothing, texts in pieces and in windows, characters of
several bytes, prompts that are too long. The notebook shows the rest."""

import math
import re
import warnings
from functools import partial

import pytest
import torch
from answers import sampling as answers
from fastcore.test import test_close as close
from fastcore.test import test_eq as equal
from helpers import code_cell, exercise_tests

from llm_lab import sampling
from llm_lab.chars import CharTokenizer
from llm_lab.core import LabError, check, rng
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.sampling import (
    DecodeStream,
    DecodingState,
    check_sampling,
    generate,
    prompt_ids,
    sample,
    sampling_probs,
    stop_at,
    stream,
)

pytestmark = pytest.mark.usefixtures('one_thread')
P = torch.tensor([0.5, 0.1, 0.25, 0.15])
LOGITS = P.log() + 7.0  # logits are known up to a constant
TEXT = '\nOnce Mia found a red ball by the gate.'
TOK = CharTokenizer.train(TEXT)
T = 32


def refuses(f, words):
    with pytest.raises(LabError, match=re.escape(words)):
        f()


@pytest.fixture(scope='module')
def model():
    sizes = dict(vocab_size=TOK.vocab_size, d_model=32, n_layers=2, n_heads=4, max_len=T)
    return MiniGPT(GPTConfig(**sizes), seed=0).eval()


@pytest.mark.parametrize(
    'setting, words',
    [
        (dict(top_p=0), 'top_p=0: give a share above 0 and up to 1'),
        (dict(repetition_penalty=0), 'repetition_penalty=0: give a number from 0.01'),
        (dict(top_k=0), 'top_k=0: give a whole number of at least 1'),
        (dict(top_k=2.5), 'top_k=2.5: give a whole number of at least 1'),
        (dict(temperature=-1), 'temperature=-1: give 0 (greedy) or more'),
        (dict(temperature=float('nan')), 'temperature=nan: give 0 (greedy) or more'),
    ],
)
def test_settings_that_leave_nothing_are_refused(setting, words):
    refuses(lambda: sampling_probs(LOGITS, **setting), words)
    refuses(lambda: check_sampling(**setting), words)


def test_more_than_there_are_is_all():
    equal(sampling_probs(LOGITS[None].repeat(3, 1), top_k=9).shape, (3, 4))
    close(sampling_probs(LOGITS, top_k=9, top_p=1), P, eps=1e-6)


def test_each_sequence_is_penalized_for_its_own_past():
    probs = sampling_probs(
        LOGITS[None].repeat(2, 1),
        repetition_penalty=100.0,
        ids=torch.tensor([[0, 0], [0, 2]]),
        temperature=0,
    )
    close(probs, torch.tensor([[0.0, 0, 1, 0], [0, 0, 0, 1]]))


def random_ids(B, n):
    return torch.randint(TOK.vocab_size, (B, n), generator=rng(0, 'some'))


def read(model, ids, *pieces):
    "Logits after the last of the pieces"
    state = DecodingState(model, 99)
    for piece in ids.split(pieces, 1):
        logits = state(piece)
    return logits


def test_reading_leaves_the_mode_of_the_model(model):
    model.train()
    read(model, random_ids(2, 10), 9, 1)
    assert model.training
    model.eval()


def test_after_an_error_the_text_is_as_it_was(model):
    some = random_ids(3, 6)
    state = DecodingState(model, 20)
    no_token = some[:, 5:6] * 0 + 999
    state(some[:, :5])
    with pytest.raises(IndexError):
        state(no_token)
    close(state(some[:, 5:6]), read(model, some, 6), eps=1e-5)
    refuses(lambda: DecodingState(model, 9)(some[:, :0]), 'an empty text')


def test_generating_draws_nothing_from_the_global_generator(model):
    before = torch.get_rng_state()
    list(generate(model, random_ids(1, 5), 3))
    equal(torch.get_rng_state(), before)


class Bytes:
    "Each byte is a token. Notes the longest list it was asked to decode"

    kind = 'bytes'
    vocab_size = 256
    bos_id = None
    eos_id = None
    most = 0

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        self.most = max(self.most, len(ids))
        return bytes(ids).decode(errors='replace')


def test_bytes_that_are_no_text_come_too_and_the_window_stays_short():
    noise = torch.randint(256, (3000,), generator=rng(0, 'noise')).tolist()
    whole = Bytes().decode(noise)
    tokenizer = Bytes()
    decoder = DecodeStream(tokenizer)
    streamed = ''.join(map(decoder, noise))
    assert whole.startswith(streamed) and len(whole) - len(streamed) <= 1
    equal(tokenizer.most, 5)


def test_a_prompt_begins_after_what_begins_a_text(model):
    for text in ('a', '\na', ''):
        equal(TOK.decode(prompt_ids(model, TOK, text)[0].tolist()), '\n' + text)
    refuses(lambda: prompt_ids(model, None, 'a'), 'this model has no tokenizer')
    # no room: the prompt alone
    equal(prompt_ids(model, TOK, 'O' * T)[0].tolist(), TOK.encode('O' * T))


def test_mistakes_are_reported_when_the_stream_is_made(model):
    equal(sample(model, TOK, 'Once', 9, seed=3), sample(model, TOK, 'Once', 9, seed=3))
    equal(len(sample(model, TOK, '', 7)), 7)  # no prompt: a new line begins a text
    refuses(lambda: stream(model, TOK, 'Onc€'), "the character '€' at place 3 is not among")
    refuses(lambda: stream(model, TOK, stop=''), 'give a text to end at')
    refuses(lambda: stream(model, TOK, top_p=2), 'top_p=2: give a share')


def test_a_prompt_that_is_too_long_is_noted_once(model):
    with warnings.catch_warnings(record=True, action='always') as notes:
        sample(model, TOK, 'On' * T, 5)
        sample(model, TOK, 'On', 5)
    equal(
        [str(o.message) for o in notes],
        [f'the prompt has {2 * T} tokens, the model sees the last {T}'],
    )


class Always(torch.nn.Module):
    "A model with one answer"

    def __init__(self, logits):
        super().__init__()
        self.logits = logits
        self.cfg = GPTConfig(vocab_size=len(logits))
        self.weight = torch.nn.Parameter(torch.zeros(1))  # to be found on a device

    def features(self, ids, i=None):
        return ids[..., None]

    def lm_head(self, x):
        return self.logits.expand(len(x), -1)

    def cache(self, batch, length):
        return None


class EndsAtDot(Bytes):
    eos_id = ord('.')


def test_an_end_mark_ends_the_text():
    # 'a' or '.', half and half
    logits = torch.full((256,), -9.0).index_fill(0, torch.tensor([97, 46]), 1.0)
    written = sample(Always(logits), Bytes(), 'x', 40)
    assert '.' in written[:-1]
    equal(sample(Always(logits), EndsAtDot(), 'x', 40), written[: written.index('.')])


@pytest.mark.parametrize(
    ('wrong', 'remedy'),
    [
        (dict(temprature=1), "did you mean 'temperature'?"),
        (dict(top_K=1), "did you mean 'top_k'?"),
        (dict(max_tokens=5), "did you mean 'max_new_tokens'?"),
        (dict(use_cache=False), "did you mean 'cache'?"),
        (dict(xyz=1), 'choose from cache, max_new_tokens, model, prompt, repetition_penalty'),
    ],
)
def test_a_wrong_keyword_is_told_by_the_function_that_was_called(model, wrong, remedy):
    (name,) = wrong
    for f in (sample, stream):
        refuses(lambda: f(model, TOK, 'Once', **wrong), f'{f.__name__} takes no {name!r}: {remedy}')
    ids = prompt_ids(model, TOK, 'Once')
    refuses(lambda: next(generate(model, ids, 5, **wrong)), f'generate takes no {name!r}: ')


def test_another_models_tokenizer_writes_nothing(model):
    words = (
        f'the tokenizer has 256 ids, the model {TOK.vocab_size}: give the tokenizer of this model'
    )
    more = Bytes()
    refuses(lambda: sample(model, more, 'Once', 5), words)
    refuses(lambda: stream(model, more, 'Once', 5), words)


def test_the_cuts_by_hand():
    close(sampling_probs(LOGITS), P, eps=1e-6)
    close(sampling_probs(LOGITS, top_k=2), torch.tensor([2 / 3, 0, 1 / 3, 0]), eps=1e-6)
    # .5 and .25 are just enough
    close(sampling_probs(LOGITS, top_p=0.75), torch.tensor([2 / 3, 0, 1 / 3, 0]), eps=1e-6)
    # now the third is needed
    want = torch.tensor([5 / 9, 0, 2.5 / 9, 1.5 / 9])
    close(sampling_probs(LOGITS, top_p=0.76), want, eps=1e-6)


def columns(model, ids, n, **kw):
    return torch.stack(list(generate(model, ids, n, **kw)), 1)


def test_another_seed_draws_other_tokens(model):
    assert (
        columns(model, random_ids(1, 5), 20, seed=1) != columns(model, random_ids(1, 5), 20, seed=2)
    ).any()


def test_when_the_window_has_slid_only_the_end_counts(model):
    long = random_ids(1, T + 9)
    equal(columns(model, long, 5), columns(model, long[:, -T:], 5))


def test_the_first_of_several_stops_ends_a_text():
    def given(stops, *pieces):
        return list(filter(None, stop_at(stops, pieces)))

    equal(given(['END', 'Ex'], 'aE', 'N', 'Ex', 'b'), ['a', 'EN'])
    equal(given([], 'a', 'b'), ['a', 'b'])


# ---- the exercises


cell = partial(code_cell, '26_sampling')


@pytest.fixture(scope='module')
def exercises():
    space = dict(vars(sampling))
    for text in ('def min_p(', 'def my_guess('):
        exec(cell(text).rpartition('check(')[0], space)
    return space


(
    test_a_right_answer_is_told_so,
    test_a_wrong_answer_meets_a_counter_example,
    test_an_exercise_that_nobody_has_done_says_so,
) = exercise_tests(
    answers.ANSWERS,
    dict(
        min_p=('min_p_spec', 'cases'),
        my_guess=('measured', None),
    ),
    fixture='exercises',
)


def test_what_the_third_exercise_breaks_turns_red():
    right = cell('def sampling_probs(')
    broken = right.replace('p.cumsum(-1) - p ', 'p.cumsum(-1) ')
    assert broken != right
    space = dict(vars(sampling), rng=rng, math=math, test_close=close, test_eq=equal)
    exec(cell('def choices_spec('), space)
    red = cell('samplers = [')
    exec(right, space)
    exec(red, space)
    exec(broken, space)
    with pytest.raises(AssertionError):
        exec(red, space)
    assert space['kw'] == dict(top_p=0.8)
    assert space['sampling_probs'](LOGITS, top_p=0.4).isnan().any()
