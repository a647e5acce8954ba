"""Any parts together: whatever recipes a model is made of, it learns, keeps the future out, and
comes back from its folder."""

import random
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from answers import parts as answers
from cases import covering
from helpers import code_cell, exercise_tests, one_line
from torch import nn

from llm_lab import parts
from llm_lab.chars import CharTokenizer
from llm_lab.core import LabError, check, rng
from llm_lab.efficient import StepRunner, apply_activation_checkpointing
from llm_lab.gpt import MLP, GPTConfig, LearnedPositions, MiniGPT
from llm_lab.gqa import GQA
from llm_lab.init import projections, scaled_init, spectral_init
from llm_lab.llama_block import QKNorm, ReLU2, RMSNorm, SoftcapHead, SwiGLU, llama
from llm_lab.looking import attention_maps
from llm_lab.onednn import onednn_linears
from llm_lab.optim import muon
from llm_lab.package import config_from, load, save, to_data
from llm_lab.parts import Aux, Part, has_hook, hook, mask_hook, part
from llm_lab.positions import RoPE, SinusoidalPositions, linear_scaling, llama3_scaling
from llm_lab.sampling import generate
from llm_lab.self_attention import Attention, causal, dense_mask
from llm_lab.train import next_token_loss, train_step

T = 12
TOK = CharTokenizer.train('abcdefghijklmno\n')


pytestmark = pytest.mark.usefixtures('one_thread')


def drawn(seed):
    "A configuration of parts drawn at random, all that fit together"
    r = random.Random(seed)
    heads = r.choice([1, 2, 4])
    size = r.choice([None, None, 4, 8])
    rope = part(
        RoPE,
        base=r.choice([100.0, 10_000.0]),
        partial=r.choice([1.0, 0.5]),
        interleaved=r.choice([True, False]),
        scale=r.choice([None, part(linear_scaling, factor=4.0), part(llama3_scaling, original=16)]),
    )
    steps = r.choice([(), (rope,), (part(QKNorm), rope), (rope, part(QKNorm, eps=1e-5))])
    how = dict(transforms=steps, bias=r.choice([True, False]), mask=part(causal))
    attn = r.choice(
        [
            part(Attention, **how),
            part(GQA, n_kv_heads=r.choice([n for n in (1, 2, 4) if heads % n == 0]), **how),
        ]
    )
    first = part(scaled_init, out=r.choice(['depth', 'plain']), orthogonal=r.choice([True, False]))
    return GPTConfig(
        vocab_size=TOK.vocab_size,
        max_len=T,
        d_model=16,
        n_layers=2,
        n_heads=heads,
        d_head=size,
        tie=r.choice([True, False]),
        attn=attn,
        norm=r.choice([part(RMSNorm), part(nn.LayerNorm)]),
        pos=r.choice([None, part(LearnedPositions), part(SinusoidalPositions)]),
        mlp=r.choice(
            [
                part(MLP),
                part(MLP, act=part(ReLU2)),
                part(SwiGLU),
                part(SwiGLU, act=part(nn.GELU), d_ff=20),
            ]
        ),
        lm_head=r.choice([part(nn.Linear, bias=False), part(SoftcapHead, cap=20.0)]),
        init=r.choice([first, part(spectral_init, first=first), part(spectral_init, gain=2.0)]),
    )


def features(seed):
    "What this draw has, choice by choice: the names and the numbers of its recipes"
    cfg = drawn(seed)
    return {
        *re.findall(r'[\w.]+=?[\w.]*', str(cfg)),
        f'{len(cfg.attn.keywords["transforms"])} steps',
    }


SEEDS = covering(range(40), features)


def ids_of(seed, B=2):
    return torch.randint(TOK.vocab_size, (B, T), generator=rng(seed, 'ids'))


@pytest.mark.parametrize('seed', SEEDS)
def test_parts_of_any_kind_make_a_model(seed, tmp_path):
    cfg, ids = drawn(seed), ids_of(seed)
    assert config_from(to_data(cfg)) == cfg
    model = MiniGPT(cfg, seed)
    for name, w in projections(model).items():
        assert w.dim() == 2 and w.isfinite().all(), name

    x = model.tok(ids).detach().requires_grad_()  # no future
    hook = model.tok.register_forward_hook(lambda *args: x)
    for t in (0, T // 2):
        (g,) = torch.autograd.grad(model(ids)[:, t].square().sum(), x, retain_graph=True)
        assert (g[:, t + 1 :] == 0).all() and (g[:, : t + 1].abs().sum(-1) > 0).all()
    hook.remove()

    # every weight learns, the same with blocks that run twice
    next_token_loss(model, ids).backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert [
        n
        for n, g in plain.items()
        if not g.isfinite().all() or (g == 0).all() and 'qkv.bias' not in n
    ] == []
    model.zero_grad()
    with onednn_linears(model):
        next_token_loss(apply_activation_checkpointing(model), ids).backward()
    apply_activation_checkpointing(model, False)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[n], rtol=1e-4, atol=1e-6, msg=n)
    model.zero_grad()

    opt, losses = muon(model, lr=0.02), []
    for _ in range(15):
        losses.append(train_step(model, opt, ids)[0].item())
    assert losses[-1] < 0.8 * losses[0]

    save(tmp_path / 'model', model.eval(), TOK)
    again = load(tmp_path / 'model').model
    assert again.cfg == cfg and torch.equal(again(ids), model(ids))
    assert len(list(generate(again, ids[:1, :3], 3, temperature=0))) == 3
    maps = attention_maps(again, ids[0])
    assert maps.shape == (2, cfg.n_heads, T, T) and (maps.triu(1) == 0).all()
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, cfg.n_heads, T))


@pytest.mark.parametrize('seed', SEEDS)
def test_positions_may_be_given_in_any_order_or_by_text(seed):
    cfg, ids = drawn(seed), ids_of(seed)
    model = MiniGPT(cfg, seed).eval()
    order = torch.randperm(T, generator=rng(seed, 'order'))
    torch.testing.assert_close(
        model(ids[:, order], i=order), model(ids)[:, order], atol=2e-5, rtol=1e-4
    )
    each = torch.stack([torch.arange(T), torch.arange(T)])
    torch.testing.assert_close(model(ids, i=each), model(ids), atol=2e-5, rtol=1e-4)


def test_a_model_that_turns_reads_the_same_at_any_place_and_one_that_adds_does_not():
    ids = ids_of(0)
    for pos, same in (
        (None, True),
        (part(LearnedPositions), False),
        (part(SinusoidalPositions), False),
    ):
        model = MiniGPT(
            llama(TOK.vocab_size, d_model=16, n_layers=2, n_heads=2, max_len=99, pos=pos)
        ).eval()
        moved = (model(ids, i=torch.arange(40, 40 + T)) - model(ids)).abs().max()
        assert (moved < 1e-4) == same, (pos, moved)


def test_speeds_stay_exact_in_low_precision():
    """The hands are no buffer: a model in bfloat16 turns by the same angles, far from the beginning
    of the text, too"""
    rope = RoPE(GPTConfig(d_model=16, n_heads=1)).to(torch.bfloat16)
    assert rope.freq.dtype == torch.float32 and not list(rope.buffers())
    q = torch.ones(1, 1, 1, 16, dtype=torch.bfloat16)
    far = torch.tensor([5001])
    exact = RoPE(GPTConfig(d_model=16, n_heads=1))(q.float(), q.float(), q.float(), far, far)[0]
    torch.testing.assert_close(rope(q, q, q, far, far)[0].float(), exact, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    'init', [part(scaled_init), part(spectral_init), part(spectral_init, gain=2.0)]
)
def test_the_modern_block_learns_in_low_precision_and_is_judged_in_full(init):
    model = MiniGPT(
        llama(
            TOK.vocab_size,
            d_model=32,
            n_layers=2,
            n_heads=4,
            max_len=T,
            init=init,
            attn=part(GQA, n_kv_heads=2, transforms=(part(QKNorm), part(RoPE))),
        )
    )
    ids = ids_of(0)
    step = StepRunner(precision='bf16')
    opt = muon(model, lr=0.02)
    full = model(ids)
    with torch.autocast('cpu', torch.bfloat16):
        low = model(ids)
    assert (
        low.dtype == torch.bfloat16 and (low.float() - full).abs().max() < 0.02 * full.abs().max()
    )
    losses = [step(model, opt, ids)[0].item() for _ in range(15)]
    assert losses[-1] < 0.8 * losses[0]
    assert next_token_loss(model.eval(), ids) < 0.8 * losses[0]  # outside of autocast
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}


def near(i, j, size):
    return (j <= i) & (i - j < size)


def fade(i, j, h):
    return (j <= i) & (i - j <= 2**h)


def first_of(i, j, of, **words):
    return of[0](i, j, **words)  # a mask that holds masks


def test_lists_and_tuples_are_one_thing_in_a_recipe():
    assert part(near, size=[[1], 2]) == part(near, size=((1,), 2))


@pytest.mark.parametrize(
    'make, words',
    [
        (
            lambda: part('near'),
            "part('near'): 'near' cannot be called; give a class or a function",
        ),
        (
            lambda: part(nn.GELU()),
            'part(GELU): GELU(…) is made already; give a class or a function',
        ),
    ],
)
def test_a_recipe_is_of_what_can_be_made(make, words):
    with pytest.raises(LabError, match=re.escape(words)):
        make()


def test_a_mask_that_holds_masks_is_given_what_they_need():
    i = torch.arange(5)
    assert torch.equal(dense_mask(causal, i, i), torch.ones(5, 5).tril().bool())
    holding = partial(first_of, of=(partial(fade), causal))
    assert torch.equal(dense_mask(holding, i, i, n_heads=3), dense_mask(fade, i, i, n_heads=3))


CALLED = []


class EveryHook(MLP):
    "An MLP that has every hook, and notes which was called"

    needs = ('aux', 'cache')

    def __init__(self, cfg, layer=0):
        super().__init__(cfg)
        self.layer = layer
        CALLED.append('made')

    @staticmethod
    def check(cfg, **keywords):
        CALLED.append('check')

    def forward(self, x, aux=None, cache=None, **ctx):
        CALLED.append('forward')
        y = super().forward(x)
        if aux is not None:
            aux.add(self.layer, loss=y.square().mean())
        return y

    def cache(self, batch, length):
        CALLED.append('cache')

    def metrics(self):
        CALLED.append('metrics')
        return {'seen': 1.0}

    def after_step(self):
        CALLED.append('after_step')


def called_by(f):
    "Which hooks `f` calls, in order, and what it returns"
    CALLED.clear()
    result = f()
    return CALLED[:], result


def test_each_hook_is_called_when_the_page_of_hooks_says():
    sizes = dict(vocab_size=20, d_model=16, n_layers=1, n_heads=2, max_len=8)
    called, cfg = called_by(lambda: GPTConfig(**sizes, mlp=part(EveryHook)))
    assert called == ['check']
    called, model = called_by(lambda: MiniGPT(cfg))
    assert called == ['made']
    assert model.needs == {'aux', 'cache'}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = torch.randint(20, (2, 9), generator=rng(0, 'rows'))
    called, _ = called_by(lambda: train_step(model, optimizer, rows))
    assert called == ['forward', 'after_step']
    assert called_by(model.metrics) == (['metrics'], {'seen': 1.0})
    called, kept = called_by(lambda: model.cache(1, 8))
    assert (called, kept) == (['cache'], None)  # its attention keeps nothing


class Bare(nn.Module):
    "No `Part`: one hook of its own, and a store that only bears the name of one"

    needs = ('cache',)

    def __init__(self):
        super().__init__()
        self.metrics = {}


def test_a_hook_is_ones_own_or_the_default():
    bare = Bare()
    assert hook(bare, 'needs') == ('cache',) and hook(Bare, 'needs') == ('cache',)
    assert hook(bare, 'metrics')() == {} and hook(bare, 'cache')(2, 8) is None
    assert hook(nn.GELU, 'check')(None, approximate='tanh') is None
    assert hook(nn.Linear(2, 2), 'share') == 1 and hook(nn.Linear(2, 2), 'sizes') == ()
    assert not has_hook(bare, 'cache') and not has_hook(Part(), 'cache')
    assert not has_hook(Part, 'cache') and has_hook(EveryHook, 'cache')
    one_line(lambda: hook(bare, 'chache'), "'chache' is no hook of a part: did you mean 'cache'?")
    one_line(
        lambda: mask_hook(causal, 'link'), "'link' is no hook of a mask: did you mean 'links'?"
    )


def test_nothing_is_found_by_a_name_that_is_written_nowhere():
    "The library asks for hooks by `hook` and `mask_hook` alone, and each is on the page"
    names = [name for name in vars(Part) if not name.startswith('_')]
    assert names == ['needs', 'sizes', 'share', 'check', 'cache', 'metrics', 'after_step']
    asked = re.compile(rf"(getattr|hasattr)\([^)]*'({'|'.join(names)}|links|lookback|by_mask)'")
    root = Path(__file__).resolve().parent.parent
    for path in (root / 'llm_lab').glob('*.py'):
        assert not asked.search(path.read_text()), path.name
    page = (root / 'nbs' / '20_parts.ipynb').read_text()
    assert [
        name for name in names if f'| **{name}**' not in page and f'| `{name}`' not in page
    ] == []


NOTED = []  # which part was called


def noting(name, base=nn.Identity):
    "A part that notes its calls, under a name"

    class Noting(base):
        def forward(self, *args, **kw):
            NOTED.append(name)
            return super().forward(*args, **kw)

    return Noting


class NotedRoPE(noting('transforms', RoPE)):
    pass


class NotedNorm(noting('norm', nn.LayerNorm)):
    pass


class NotedMLP(noting('mlp', MLP)):
    pass


class NotedPos(noting('pos', LearnedPositions)):
    pass


class NotedHead(noting('lm_head', nn.Linear)):
    pass


def noted_mask(i, j):
    NOTED.append('mask')
    return causal(i, j)


def noted_init(model, generator):
    NOTED.append('init')


def test_the_parts_of_a_forward_pass_are_called_in_the_order_of_the_picture():
    cfg = GPTConfig(
        vocab_size=20,
        d_model=16,
        n_layers=2,
        n_heads=2,
        max_len=8,
        pos=part(NotedPos),
        norm=part(NotedNorm),
        attn=part(Attention, transforms=(part(NotedRoPE),), mask=part(noted_mask)),
        mlp=part(NotedMLP),
        lm_head=part(NotedHead, bias=False),
        init=part(noted_init),
    )
    NOTED.clear()
    model = MiniGPT(cfg)
    assert NOTED == ['init']
    NOTED.clear()
    model(torch.zeros(1, 4, dtype=torch.long))
    block = ['norm', 'transforms', 'mask', 'norm', 'mlp']
    assert NOTED == ['pos', *block, *block, 'norm', 'lm_head']


def window(i, j, size):
    return i - j < size


def test_a_recipe_is_equal_by_value_and_prints_as_typed():
    assert repr(part(window, size=3)) == 'part(window, size=3)'
    assert part(window, size=3) == part(window, size=3) != part(window, size=4)


def test_a_second_run_of_a_layer_replaces_its_first():
    aux = Aux()
    assert aux.loss() == 0
    for layer in (0, 1, 0):
        aux.add(layer, loss=torch.tensor(1.0), busy=3)
    assert aux.loss() == 2 and aux.terms[0]['busy'] == 3


# ---- the exercises


cell = partial(code_cell, '20_parts')


def chapter():
    "What the exercises find when they are reached"
    space = dict(vars(parts), check=check)
    exec('from fastcore.test import test_eq, test_fail', space)
    exec(cell('def near(').partition('\n\n\n')[0], space)
    return space


@pytest.fixture(scope='module')
def exercises():
    space = chapter()
    for text in ('def replaced(', 'def my_guess('):
        exec(cell(text).rpartition('check(')[0], space)
    return space


(
    test_a_right_answer_is_told_so,
    test_a_wrong_answer_meets_a_counter_example,
    test_an_exercise_that_nobody_has_done_says_so,
) = exercise_tests(
    answers.ANSWERS,
    dict(
        replaced=('replaced_spec', 'cases'),
        my_guess=('measured', None),
    ),
    fixture='exercises',
    counter_example='expected|LabError|TypeError',
)


def test_what_the_third_exercise_breaks_turns_red():
    space = chapter()
    right = cell('class part(partial):')
    broken = right.replace('_lists_to_tuples(v)', 'v')
    assert broken != right
    red = cell('part(near, size=[3, 4])')
    exec(right, space)
    exec(red, space)
    exec(broken, space)
    with pytest.raises(AssertionError, match=r'size=\[3, 4\]'):
        exec(red, space)
