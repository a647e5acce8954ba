"""Slips with parts and objectives of one's own, each answered in one line that names the part."""

import inspect
import math
import textwrap
import warnings

import pytest
import torch
from helpers import one_line, tiny_model
from torch import nn

import llm_lab as lab
from llm_lab.core import REGISTERED, rng
from llm_lab.gpt import check_causal
from llm_lab.parts import Part, part
from llm_lab.sampling import next_logits
from llm_lab.train import token_losses

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


def test_a_cache_that_cannot_pick_goes_on_with_all_of_its_rows():
    from llm_lab.kv_cache import select_rows
    from llm_lab.sampling import DecodingState

    reader = DecodingState(model_of(Sums), 8)
    reader(rows_of(0)[:, :3])
    select_rows(reader, [0, 1, 2, 3])
    assert reader.cache
    select_rows(reader, [0, 2])
    assert reader.cache is None and len(reader.ids) == 2


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


def test_what_a_part_notes_of_the_check_is_not_of_the_run():
    class Counts(Plain):
        n = 0

        def forward(self, x, i, **ctx):
            self.n += len(x)
            return x

        def metrics(self):
            n, self.n = self.n, 0
            return dict(n=n)

    callbacks = {2: lambda state: state.model.metrics()}
    state = lab.fit(model_of(Counts), rows_of, steps=2, callbacks=callbacks)
    assert state.notes[-1]['n'] == 2 * 4


# ---- objectives


class Skip(lab.Objective):
    "Predicts the token after the next one; a token without one before the last costs ln V"

    unit = 'of Skip'

    def loss(self, model, rows, number):
        logits = model(rows[:, :-2])
        return nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 2:])

    def score(self, model, ids, windows, batch_size=None, live=None):
        out = torch.full((len(ids),), torch.nan)
        for _, first, end in windows.tolist():
            out[first:end] = math.log(self.cfg.vocab_size)
        return out


def skipping(**methods):
    kind = type('Skip', (Skip,), methods)
    return tiny_model(vocab_size=5, objective=part(kind))


IDS = torch.arange(20) % 5
WINDOWS = torch.tensor([[0, 1, 9], [8, 9, 17]])


def test_what_an_objective_lacks_is_told():
    model, tok = skipping(), lab.CharTokenizer('abcde')
    bare = tiny_model(vocab_size=5, objective=part(type('Bare', (lab.Objective,), {})))
    one_line(fitted(bare), 'Bare has no loss', 'loss(self, model, rows, number)')
    one_line(lambda: token_losses(bare, IDS, WINDOWS), 'Bare has no score')
    one_line(lambda: lab.sample(model, tok, 'ab'), 'Skip has no generate', 'writes no text')
    one_line(lambda: next_logits(model, IDS[None]), 'Skip has no next_logits')
    # no remedy that would fail as well
    assert 'use sample' not in one_line(lambda: lab.complete(model, tok, 'ab'), 'no generate')
    assert not token_losses(model, IDS, WINDOWS)[1:17].isnan().any()


def test_a_wrong_loss_is_told():
    one_line(
        lambda: skipping(loss=lambda self, model, rows: 0.0),
        'Skip.loss(model, rows)',
        'called as loss(model, rows, number)',
    )
    rows = skipping(loss=lambda self, model, rows, number: model(rows[:, :-1]).mean((1, 2)))
    one_line(fitted(rows), 'Skip.loss gives a tensor of shape (4,)', 'scalar')
    one_line(fitted(skipping(loss=lambda *args: 0.5)), 'Skip.loss gives a float', 'scalar')
    one_line(
        lambda: tiny_model(objective=part(type('No', (nn.Identity,), {}))), 'makes a', 'Objective'
    )


def test_a_token_without_a_score_is_told():
    def without_seven(self, *args):
        out = Skip.score(self, *args)
        out[7] = torch.nan
        return out

    model = skipping(score=without_seven)
    one_line(lambda: token_losses(model, IDS, WINDOWS), 'Skip.score', 'NaN', 'token 7')
    short = skipping(score=lambda self, *args: Skip.score(self, *args)[1:])
    one_line(lambda: token_losses(short, IDS, WINDOWS), '(19,)', '(20,)')


def test_a_loss_of_something_else_bears_its_name():
    state = lab.fit(skipping(), rows_of, steps=1)
    assert state.unit == 'of Skip' and 'of Skip' in repr(state)


def test_the_help_of_parts_and_objectives_says_their_contract():
    said = inspect.getdoc(Part)
    for word in ('forward(x, i, **ctx)', 'needs', 'sizes', 'share', 'cache[self]', 'register'):
        assert word in said, word
    assert 'model.objective' in lab.register.__doc__
    for word in ('begin', 'first', 'end', 'NaN'):
        assert word in lab.Objective.score.__doc__, word
    # the example is one that runs
    code = said[said.index('    class ') : said.index('    lab.register')]
    space = dict(lab=lab, nn=nn)
    exec(textwrap.dedent(code), space)
    model = model_of(space['Sums'])
    assert model.cache(1, 8) and check_causal(model) is model


def test_a_mixer_of_ones_own_learns_how_it_becomes_visible():
    one_line(
        lambda: lab.attention_of(model_of(Plain), lab.CharTokenizer('abcde'), 'abc'),
        'Plain',
        'inherits from Attention',
    )


# ---- files


@pytest.fixture
def registered(tmp_path):
    "A package of a model with a part that this program has registered, and a file that has it"
    before = dict(REGISTERED)
    lab.register(Plain, 'OwnMixer')
    lab.save(tmp_path / 'own', model_of(Plain), lab.CharTokenizer('abcde'))
    (tmp_path / 'mine.py').write_text(
        'import llm_lab as lab\nfrom test_own_slips import Plain\nlab.register(Plain, "OwnMixer")\n'
    )
    yield tmp_path
    REGISTERED.clear()
    REGISTERED.update(before)


def test_a_package_whose_part_is_not_registered_says_how_it_is_given(registered):
    REGISTERED.clear()
    one_line(lambda: lab.load(registered / 'own'), "'OwnMixer'", "load(path, parts='mine.py')")
    assert lab.load(registered / 'own', parts=registered / 'mine.py').model.cfg.n_layers == 1


def test_a_name_where_a_recipe_belongs_is_told_where_it_goes(registered):
    for key, name in (('attn', 'OwnMixer'), ('attn', 'Attention'), ('mlp', 'SwiGLU')):
        said = f'did you mean model.{key}.part={name}?'
        one_line(lambda k=key, n=name: lab.read_config('golden', [f'model.{k}={n}']), said)
        assert getattr(lab.read_config('golden', [f'model.{key}.part={name}']).model, key)
    one_line(lambda: lab.read_config('golden', ['model.attn=Nothing']), 'give a recipe such as')
