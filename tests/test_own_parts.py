"""Parts of one's own, and models that were changed: caches that are whole or not used, saves that
come back, slips told in one line."""

import json
from copy import deepcopy
from dataclasses import replace
from functools import partial
from types import MethodType

import pytest
import torch
from cases import some
import helpers
from helpers import json_lines, one_line
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, parametrizations, prune

import llm_lab.runs as run_module
from llm_lab.kv_cache import (
    CacheTransform,
    KVCache,
    RollingCache,
    with_kv_cache,
    complete,
    select_rows,
    sliding_window,
)
from llm_lab.chars import CharTokenizer
from llm_lab.checkpoint import CheckpointManager
from llm_lab.config import (
    ModelConfig,
    config_from_dict,
    PRESETS,
    model_data,
    read_config,
    write_config,
)
from llm_lab.inference import for_inference
from llm_lab.gpt import MLP, Block, GPTConfig, LearnedPositions, MiniGPT
from llm_lab.package import config_from, own_in, require_faithful, meta_model, to_data, check_parts
from llm_lab.onednn import onednn_linears
from llm_lab.self_attention import Attention
from llm_lab.parts import part, register
from llm_lab.gqa import GQA, to_gqa
from llm_lab.hub import to_hf
from llm_lab.core import REGISTERED, LabError, rng
from llm_lab.hardware import flops
from llm_lab.llama_block import RMSNorm, SwiGLU, llama
from llm_lab.positions import RoPE, half_split
from llm_lab.init import merge_spectral, spectral_init
from llm_lab.moe import MoE, Router, routing
from llm_lab.efficient import StepRunner, apply_activation_checkpointing, step_memory
from llm_lab.package import load, save
from llm_lab.runs import model_config, train_run
from llm_lab.sampling import DecodingState, generate
from llm_lab.sparse import alternate
from llm_lab.train import adamw, fit, next_token_loss, random_crops, train_step

pytestmark = pytest.mark.usefixtures('one_thread')
T = 24
SIZE = dict(vocab_size=17, d_model=16, n_layers=2, n_heads=2, max_len=T)
TOK = CharTokenizer('abcdefghijklmno \n')


@pytest.fixture(autouse=True)
def nothing_stays_registered():
    before = dict(REGISTERED)
    yield
    REGISTERED.clear()
    REGISTERED.update(before)


def ids_of(B=1, n=T, seed=0):
    return torch.randint(17, (B, n), generator=rng(seed, 'ids'))


shaken = partial(helpers.shaken, by=0.2)
near = partial(helpers.near, eps=2e-5)


# ---- caches


class Plain(nn.Module):
    "A mixer that mixes nothing and keeps nothing"

    def __init__(self, cfg, layer=0):
        super().__init__()
        self.f = nn.Linear(cfg.d_model, cfg.d_model)

    def forward(self, x, i, **ctx):
        return self.f(x)


class Before(nn.Module):
    "Looks at the token before, and keeps nothing; a mixer or an MLP"

    def __init__(self, cfg, layer=0):
        super().__init__()
        self.f = nn.Linear(cfg.d_model, cfg.d_model)

    def forward(self, x, i=None, **ctx):
        return self.f(F.pad(x, (0, 0, 1, 0))[:, :-1])


class Remembers(nn.Module):
    "The same with a memory of its own, a list; a mixer or an MLP"

    needs = ('cache',)

    def __init__(self, cfg, layer=0):
        super().__init__()
        self.f = nn.Linear(cfg.d_model, cfg.d_model)

    def cache(self, batch, length):
        return []

    def forward(self, x, i=None, cache=None, **ctx):
        kept = [] if cache is None else cache[self]
        old = kept[0] if kept else x.new_zeros(len(x), 1, x.shape[2])
        kept[:] = [x[:, -1:]]
        return self.f(torch.cat([old, x[:, :-1]], 1))


class Forgets(Attention):
    "An attention of one's own that hands its steps no cache"

    def forward(self, x, i, contiguous=False, cache=None, **ctx):
        return super().forward(x, i, contiguous, **ctx)


class Pair(nn.Module):
    "Two attentions side by side, of which one keeps"

    def __init__(self, cfg, layer=0, *, one, two):
        super().__init__()
        self.one, self.two = one(cfg, layer), two(cfg, layer)

    def forward(self, x, i, **ctx):
        return self.one(x, i, **ctx) + self.two(x, i, **ctx)


class Unread(nn.Module):
    "A step that says it keeps something, and never reads it"

    needs = ('cache',)

    def __init__(self, cfg, layer=0):
        super().__init__()

    def cache(self, batch, length):
        return KVCache(length)

    def forward(self, q, k, v, i, j, **ctx):
        return q, k, v, i, j


def shared(cfg, layer=0):
    "The same attention in both layers, which keeps the keys of both in one place"
    if layer == 0:
        shared.attn = keeps(cfg, layer)
    return shared.attn


rope = part(RoPE)
keeps = part(Attention, transforms=(part(RoPE), part(CacheTransform)))
bare = part(Attention, transforms=(part(RoPE),))
near_by = part(sliding_window, size=5)
rolls = part(GQA, n_kv_heads=1, mask=near_by, transforms=(rope, part(CacheTransform, size=5)))
turns = lambda *of, **kw: llama(**SIZE | kw, attn=part(alternate, of=of))
both = lambda *steps: part(Attention, transforms=steps)
# {what: (configuration, has it a cache?)}
CACHES = {
    'none': (turns(bare), False),
    'all': (turns(keeps), True),
    'the first': (turns(keeps, bare), False),
    'the last': (turns(bare, keeps), False),
    'a ring and none': (turns(rolls, bare), False),
    'a ring and all': (turns(rolls, keeps), True),
    'a ring': (turns(rolls), True),
    'GQA in one': (
        turns(keeps, part(GQA, n_kv_heads=1, transforms=(rope, part(CacheTransform)))),
        True,
    ),
    'GQA without': (turns(keeps, part(GQA, n_kv_heads=1, transforms=(rope,))), False),
    'own without': (turns(keeps, part(Plain)), False),
    'own that looks back': (turns(part(Before), keeps), False),
    'own with': (turns(keeps, part(Remembers)), True),
    'own alone': (turns(part(Remembers)), True),
    'own and bare': (turns(bare, part(Remembers)), False),
    'MLP looks back': (llama(**SIZE, attn=keeps, mlp=part(Before)), False),
    'MLP with': (llama(**SIZE, attn=keeps, mlp=part(Remembers)), True),
    'only the MLP': (llama(**SIZE, attn=bare, mlp=part(Remembers)), False),
    'two caches in one': (
        llama(**SIZE, attn=both(rope, part(CacheTransform), part(CacheTransform))),
        False,
    ),
    'a slip in a forward': (
        turns(part(Forgets, transforms=(rope, part(CacheTransform)), bias=False)),
        False,
    ),
    'half of a pair': (turns(part(Pair, one=keeps, two=bare)), False),
    'a pair, both with': (turns(part(Pair, one=keeps, two=keeps)), True),
    'a pair, one with a ring': (turns(part(Pair, one=rolls, two=keeps)), True),
    'one attention in two layers': (turns(part(shared)), False),
    'never read': (turns(both(rope, part(Unread))), False),
}


@pytest.mark.parametrize('kind', CACHES)
def test_a_cache_is_whole_or_not_used(kind):
    "Read in pieces, the logits are those of one forward pass, whatever a part keeps or forgets"
    cfg, has = CACHES[kind]
    model, ids = shaken(cfg), ids_of(2)
    want = model(ids).detach()
    assert (model.cache(2, T) is not None) == has
    for cut in ([1] * T, [7, 1, 1, 9, 1, 1, 1, 1, 2]):
        reader, at = DecodingState(model, T), 0
        for piece in ids.split(cut, 1):
            at += piece.shape[1]
            near(reader(piece), want[:, at - 1])
    assert bool(reader.cache) == has


@pytest.mark.parametrize('kind', some(CACHES, 8))
def test_what_is_written_is_the_same_in_every_form(kind):
    """`with_kv_cache` and `for_inference` write the letters of the plain model, or refuse in one
    line; rows that are picked go on"""
    cfg, has = CACHES[kind]
    model = shaken(cfg, 1)
    # past max_len, too
    text = lambda m, **kw: torch.stack(list(generate(m, ids_of(2, 5), 30, **kw)), 1)
    want = [text(model, temperature=0), text(model, seed=3, top_k=5)]
    forms = [for_inference(model), with_kv_cache(model, strict=False)]
    try:
        forms.append(with_kv_cache(model))
    except LabError as e:
        assert '\n' not in str(e) and not has
    for m in forms:
        for a, b in zip(want, (text(m, temperature=0), text(m, seed=3, top_k=5))):
            assert torch.equal(a, b)
    reader, ids = DecodingState(forms[1], T), ids_of(3)
    reader(ids[:, :9])
    select_rows(reader, [2, 0])
    near(reader(ids[[2, 0], 9:10]), model(ids[[2, 0], :10])[:, -1])
    texts = [c.text for (c,) in complete(model, TOK, ['a', 'fine'], 9, temperature=0)]
    assert texts == [c.text for (c,) in complete(forms[1], TOK, ['a', 'fine'], 9, temperature=0)]


def test_a_mixer_without_a_cache_is_named():
    one_line(
        lambda: with_kv_cache(shaken(turns(part(Plain), bare))),
        'can have no cache',
        'Plain of layer 0 keeps nothing',
    )
    one_line(
        lambda: with_kv_cache(shaken(llama(**SIZE, attn=bare, mlp=part(Before)))),
        'one by one otherwise',
    )
    good = with_kv_cache(shaken(llama(**SIZE, attn=bare, mlp=part(Remembers))))
    kinds = [type(m) for m in good.cache(1, 9)]
    assert kinds == [CacheTransform, Remembers] * 2  # two in each layer, by the part itself
    ring = with_kv_cache(shaken(turns(rolls))).cache(1, 9)
    assert {type(c) for c in ring.values()} == {RollingCache}


def test_the_cache_of_another_model_is_refused():
    "The parts of a copy are others, so nothing of theirs is taken for one's own"
    model = shaken(turns(bare))
    one, two, fast = with_kv_cache(model), with_kv_cache(model), for_inference(model)
    cache = one.cache(2, T)
    one(ids_of(2, 3), i=torch.arange(3), cache=cache)
    for other in (two, fast):
        one_line(
            lambda: other(ids_of(2, 1), i=torch.tensor([3]), cache=cache),
            'that of another model',
        )


def test_the_proof_disturbs_nothing():
    "Dropout's stream, the modes of the parts and the gradients are as they were"
    model = MiniGPT(llama(**SIZE, attn=keeps, mlp=part(Remembers), dropout=0.5))
    model.blocks[0].eval()
    before = torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    assert model.cache(1, 9)
    assert torch.equal(torch.get_rng_state(), before) and modes == [
        m.training for m in model.modules()
    ]
    assert all(p.grad is None for p in model.parameters())


class Folded(nn.Module):
    "A mixer that does other things with its linear layer than to call it"

    def __init__(self, cfg, layer=0):
        super().__init__()
        self.f = nn.Linear(cfg.d_model, 2 * cfg.d_model)

    def forward(self, x, i, **ctx):
        return F.linear(x, self.f.weight[: x.shape[2]])


def test_fast_takes_any_mixer():
    for attn in (
        part(Plain),
        part(Folded),
        part(alternate, of=(part(Folded), bare)),
        part(Pair, one=keeps, two=part(Folded)),
    ):
        model = shaken(llama(**SIZE, attn=attn))
        quick = for_inference(model)
        reader = DecodingState(for_inference(model), T)
        near(quick(ids_of(2)).detach(), model(ids_of(2)).detach())
        for t in range(9):
            near(reader(ids_of()[:, t : t + 1]), model(ids_of()[:, : t + 1])[:, -1])
    watched = shaken(llama(**SIZE))
    watched.blocks[0].attn.register_forward_hook(lambda m, args, y: 2 * y)
    reader = DecodingState(for_inference(watched), T)
    for t in range(9):
        near(reader(ids_of()[:, t : t + 1]), watched(ids_of()[:, : t + 1])[:, -1])

    class Loud(MiniGPT):
        def forward(self, ids, i=None, **ctx):
            return 2 * super().forward(ids, i, **ctx)

    one_line(lambda: for_inference(Loud(llama(**SIZE))), 'Loud has a forward of its own')


def test_llama_adds_nothing_to_a_mixer_of_ones_own():
    class Mine(Attention):
        pass

    assert llama(attn=part(Plain)).attn == part(Plain)
    with pytest.warns(UserWarning, match='Mine is your own, so llama gives it no RoPE'):
        assert llama(attn=part(Mine)).attn == part(Mine)
    assert llama(attn=part(Mine), rope=part(RoPE, base=9.0)).attn == part(
        Mine, transforms=(part(RoPE, base=9.0),)
    )
    full = part(Attention, transforms=(rope,), bias=False)
    assert llama(attn=part(alternate, of=(part(Plain), part(Attention)))).attn == part(
        alternate, of=(part(Plain), full)
    )
    one_line(lambda: llama(attn=part(Plain), rope=rope), 'rope=part(RoPE)', 'takes no transforms')
    register(Mine)
    for attn in (dict(part='Mine'), dict(part='Mine', bias=True)):
        said = model_data(ModelConfig(preset='llama', attn=attn))
        assert said['attn'] == attn and said['mlp'] == PRESETS['llama']['mlp']
    said = model_data(
        ModelConfig(
            preset='llama',
            attn=dict(part='sparse:alternate', of=[dict(part='Mine'), dict(part='Attention')]),
        )
    )
    assert config_from({**said, 'attn': said['attn'] | {'part': 'alternate'}}).attn == part(
        alternate, of=(part(Mine), full)
    )


# ---- a model that is not what its configuration says


class ParallelBlock(Block):
    "GPT-J: attention and MLP read the same norm"

    def forward(self, x, i, **ctx):
        h = self.norm1(x)
        return x + self.attn(h, i, **ctx) + self.mlp(h, **ctx)


class Parallel(MiniGPT):
    def __init__(self, cfg, seed=0):
        super().__init__(cfg, seed)
        for b in self.blocks:
            b.__class__ = ParallelBlock


class Scaled(nn.Module):
    "A layer with something around it"

    def __init__(self, layer):
        super().__init__()
        self.layer, self.by = layer, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.by * self.layer(x)


class Louder(nn.Module):
    def forward(self, w):
        return 1.5 * w


def set_at(path, make):
    def change(m):
        owner, _, name = path.rpartition('.')
        owner = m.get_submodule(owner)
        setattr(owner, name, make(getattr(owner, name)))

    return change


def swapped(m):
    m.blocks = nn.ModuleList([m.blocks[1], m.blocks[0]])


def shorter(m):
    m.blocks = m.blocks[:1]


def longer(m):
    m.blocks.append(deepcopy(m.blocks[0]))


def shared(m):
    m.blocks[1].mlp = m.blocks[0].mlp


def one_weight(m):
    m.blocks[1].mlp.up.weight = m.blocks[0].mlp.up.weight


def tied(m):
    m.lm_head.weight = m.tok.weight


def hook(path, f):
    return lambda m: m.get_submodule(path).register_forward_hook(f)


def early(path, f):
    return lambda m: m.get_submodule(path).register_forward_pre_hook(f)


def slower(m):
    m.blocks[0].attn.transforms[0].freq = m.blocks[0].attn.transforms[0].freq / 2


def prefix(m):
    m.register_forward_pre_hook(lambda m, args: (args[0].flip(1),))


CHANGES = {  # {what: (change, words of the refusal)}
    'another MLP': (
        set_at('blocks.0.mlp', lambda old: MLP(GPTConfig(**SIZE))),
        'blocks.0.mlp is a MLP, it should be a SwiGLU',
    ),
    'another bend': (
        set_at('blocks.1.mlp.act', lambda old: nn.ReLU()),
        'blocks.1.mlp.act is a ReLU, it should be a SiLU',
    ),
    'another norm': (set_at('norm', lambda old: nn.LayerNorm(16)), 'norm is a LayerNorm'),
    'a wrapped layer': (set_at('blocks.0.attn.out', Scaled), 'blocks.0.attn.out is a Scaled'),
    'a wrapped head': (
        set_at('lm_head', lambda old: nn.Sequential(old, nn.Tanh())),
        'head is a Sequential',
    ),
    'a wider layer': (
        set_at('blocks.0.mlp.up', lambda old: nn.Linear(16, 99, False)),
        'blocks.0.mlp.up.out_features is 99',
    ),
    'a bias more': (
        set_at('blocks.0.mlp.out', lambda old: nn.Linear(*old.weight.shape[::-1])),
        'blocks.0.mlp.out.bias was added',
    ),
    'a step more': (
        lambda m: m.blocks[0].attn.transforms.append(RoPE(m.cfg)),
        'blocks.0.attn.transforms.1 (RoPE) was added',
    ),
    'a step less': (
        lambda m: m.blocks[0].attn.transforms.pop(-1),
        'blocks.0.attn.transforms.0 was taken out',
    ),
    'a changed class': (
        lambda m: setattr(m.blocks[1], '__class__', ParallelBlock),
        'blocks.1 is a ParallelBlock, it should be a Block',
    ),
    'a changed forward': (
        lambda m: setattr(m.blocks[0], 'forward', MethodType(ParallelBlock.forward, m.blocks[0])),
        'blocks.0.forward was replaced',
    ),
    'changed features': (
        lambda m: setattr(m, 'features', lambda ids, **kw: m.norm(m.tok(ids))),
        'the model.features was replaced',
    ),
    'another through': (
        lambda m: setattr(m, 'run_block', lambda block, x, i, **ctx: x),
        'the model.run_block was replaced',
    ),
    'a hook': (
        hook('blocks.0.mlp', lambda m, args, y: 2 * y),
        'blocks.0.mlp has a hook that changes it',
    ),
    'a hook before': (
        early('blocks.1.attn.qkv', lambda m, args: (2 * args[0],)),
        'blocks.1.attn.qkv has a hook that changes it',
    ),
    'a hook of all': (prefix, 'the model has a hook that changes it'),
    'a parametrization': (
        lambda m: parametrize.register_parametrization(m.blocks[0].mlp.up, 'weight', Louder()),
        'parametrizations',
    ),
    'weight norm': (
        lambda m: parametrizations.weight_norm(m.blocks[0].mlp.out),
        'parametrizations',
    ),
    'pruned': (
        lambda m: prune.l1_unstructured(m.blocks[0].mlp.out, 'weight', 0.5),
        'blocks.0.mlp.out',
    ),
    'a block less': (shorter, 'blocks.1 was taken out'),
    'a block more': (longer, 'blocks.2 (Block) was added'),
    'blocks swapped': (swapped, 'blocks.0.attn.layer is 1, it should be 0'),
    'one MLP twice': (shared, 'blocks.1.mlp is shared'),
    'one weight twice': (one_weight, 'blocks.1.mlp.up.weight is shared'),
    'tied by hand': (tied, 'head.weight is shared'),
    'another pattern': (
        set_at('blocks.0.attn.mask', lambda old: near_by),
        'blocks.0.attn.mask is part(sliding_window, size=5)',
    ),
    'another eps': (set_at('blocks.0.norm1.eps', lambda old: 0.1), 'blocks.0.norm1.eps is 0.1'),
    'slower hands': (slower, 'freq was changed'),
    'a buffer more': (
        lambda m: m.blocks[0].register_buffer('more', torch.zeros(3)),
        'blocks.0.more was added',
    ),
    'a module more': (lambda m: m.add_module('probe', nn.Linear(2, 2)), 'probe (Linear) was added'),
    'an adapter': (
        lambda m: setattr(m.blocks[0].mlp, 'extra', nn.Parameter(torch.zeros(2))),
        'blocks.0.mlp.extra was added',
    ),
}


@pytest.mark.parametrize('what', CHANGES)
def test_a_model_that_was_changed_is_refused_by_every_save(what, tmp_path):
    "Before a byte is written, in one line; a conversion that would drop the change refuses as well"
    change, words = CHANGES[what]
    model = MiniGPT(llama(**SIZE))
    require_faithful(model)
    change(model)
    saves = [
        lambda: save(tmp_path / 'deep' / 'p', model, TOK),
        lambda: to_hf(tmp_path / 'h', model, TOK),
        lambda: to_gqa(model, 1),
    ]
    for way in saves:
        one_line(way, 'not what its configuration says', words)
    assert list(tmp_path.iterdir()) == []


def test_a_subclass_is_refused_where_it_does_something_else(tmp_path):
    one_line(
        lambda: save(tmp_path / 'p', Parallel(llama(**SIZE)), TOK),
        'blocks.0 is a ParallelBlock, it should be a Block',
    )

    class Doubled(MiniGPT):
        def forward(self, ids, i=None, **ctx):
            return 2 * super().forward(ids, i, **ctx)

    class Talks(MiniGPT):
        def hello(self):
            return 'hello'

    one_line(
        lambda: to_hf(tmp_path / 'p', Doubled(llama(**SIZE))),
        'the model is a Doubled, it should be a MiniGPT',
    )
    model = Talks(llama(**SIZE))
    again = load(save(tmp_path / 'p', model, TOK)).model
    assert torch.equal(again(ids_of()), model.eval()(ids_of()))


def test_a_changed_class_of_this_library_is_seen(tmp_path, monkeypatch):
    "Another process would not have the change"
    model = MiniGPT(llama(**SIZE))
    monkeypatch.setattr(SwiGLU, 'forward', lambda self, x, **ctx: x)
    one_line(lambda: save(tmp_path / 'p', model, TOK), 'blocks.0.mlp.forward was replaced')


def test_an_untied_table_is_not_lost(tmp_path):
    model = MiniGPT(llama(**SIZE, tie=True))
    save(tmp_path / 'p', model, TOK)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    one_line(lambda: save(tmp_path / 'q', model, TOK), 'head.weight is not shared')


def test_checkpoints_ask_too(tmp_path):
    model = MiniGPT(llama(**SIZE))
    model.blocks[0].mlp.act = nn.ReLU()
    batch = random_crops(torch.randint(17, (200,)), 2, T - 1)
    saved = CheckpointManager(tmp_path / 'run', TOK)
    one_line(lambda: fit(model, batch, 4, callbacks={2: saved}), 'blocks.0.mlp.act is a ReLU')
    assert [p for p in tmp_path.rglob('*') if p.is_file()] == []


def test_conversions_ask_too():
    turned = llama(**SIZE, attn=both(part(RoPE, interleaved=True)))
    bound = llama(**SIZE, init=part(spectral_init))
    for make, cfg in ((half_split, turned), (merge_spectral, bound)):
        model = MiniGPT(cfg)
        make(model)
        model.blocks[0].mlp.act = nn.ReLU()
        one_line(lambda: make(model), 'blocks.0.mlp.act is a ReLU')


def test_what_changes_no_function_is_saved(tmp_path):
    """Recomputing, quick products, who only looks on, bound weights, low precision, what training
    changes, frozen weights"""
    seen = []

    def watched(m):
        m.blocks[0].mlp.register_forward_hook(lambda m, args, y: seen.append(y.shape))
        m.register_full_backward_hook(lambda *args: None)

    def trained(m):
        opt = adamw(m)
        for _ in range(2):
            train_step(m, opt, ids_of(4, T))
        m.metrics()

    ways = [
        (llama(**SIZE), apply_activation_checkpointing),
        (llama(**SIZE), watched),
        (llama(**SIZE, init=part(spectral_init)), trained),
        (llama(**SIZE, tie=True, init=part(spectral_init)), trained),
        (
            llama(**SIZE, mlp=part(MoE, n_experts=3, shared=1, router=part(Router, bias_rate=0.1))),
            trained,
        ),
        (llama(**SIZE, tie=True), trained),
        (GPTConfig(**SIZE, dropout=0.5), trained),
        (llama(**SIZE), lambda m: m.requires_grad_(False)),
        (llama(**SIZE), lambda m: m.bfloat16()),
        (GPTConfig(**SIZE), lambda m: m.eval()),
        (turns(rolls, keeps), trained),
    ]
    for cfg, change in ways:
        model = MiniGPT(cfg, seed=3)
        change(model)
        with onednn_linears(model):
            save(tmp_path / 'p', model, TOK)
        again = load(tmp_path / 'p').model
        with torch.no_grad():
            assert torch.equal(again(ids_of()), model.eval()(ids_of())), cfg
    assert seen


def test_each_tensor_comes_back_with_its_digits(tmp_path):
    "A mixture in bfloat16 whose router and norms have more"
    model = MiniGPT(llama(**SIZE, mlp=part(MoE, n_experts=4))).bfloat16()
    for b in model.blocks:
        b.mlp.router.float()
    model.norm.float()
    again = load(save(tmp_path / 'p', model, TOK)).model
    assert {n: t.dtype for n, t in again.state_dict().items()} == {
        n: t.dtype for n, t in model.state_dict().items()
    }
    want = model.state_dict()
    assert all(torch.equal(w, want[n]) for n, w in again.state_dict().items())


def test_a_forward_of_ones_own_is_heard_in_samples():
    class Loud(MiniGPT):
        def forward(self, ids, i=None, **ctx):
            return super().forward(ids, i, **ctx).flip(-1)

    model, ids = Loud(llama(**SIZE, attn=keeps)).eval(), ids_of()
    reader = DecodingState(model, T)
    for t in range(T):
        near(reader(ids[:, t : t + 1]), model(ids[:, : t + 1])[:, -1])


class Fixed(nn.Module):
    "An MLP with numbers that are no parameters and no buffers"

    def __init__(self, cfg, layer=0):
        super().__init__()
        self.f = nn.Linear(cfg.d_model, cfg.d_model)
        self.kept = torch.linspace(0, 1, cfg.d_model)

    def forward(self, x, **ctx):
        return self.f(x) * self.kept


def test_numbers_of_an_own_part_that_no_file_holds_are_missed(tmp_path):
    register(Fixed)
    model = MiniGPT(llama(**SIZE, mlp=part(Fixed)), seed=5)
    again = load(save(tmp_path / 'p', model, TOK)).model
    assert torch.equal(again(ids_of()), model.eval()(ids_of()))
    model.blocks[0].mlp.kept = torch.ones(16)
    said = one_line(lambda: save(tmp_path / 'q', model, TOK), 'no parameters and no buffers')
    assert said and not (tmp_path / 'q').exists()
    model.blocks[0].mlp.kept = torch.linspace(0, 1, 16)
    hidden = MiniGPT(llama(**SIZE, mlp=part(Fixed)))
    hidden.blocks[1].mlp.forward = lambda x, **ctx: x
    one_line(lambda: save(tmp_path / 'q', hidden, TOK), 'blocks.1.mlp.forward was replaced')


class NeedsLayer(nn.Module):
    "An MLP without defaults, which needs a number to be made"

    def __init__(self, cfg, layer):
        super().__init__()
        self.f = nn.Linear(cfg.d_model, cfg.d_model)
        if torch.ones(3).sum().item() != 3:
            raise ValueError

    def forward(self, x, **ctx):
        return self.f(x)


def test_an_own_part_has_no_word_in_a_strangers_file(tmp_path):
    for kw in (
        dict(mlp=part(NeedsLayer)),
        dict(attn=part(Plain)),
        dict(mlp=part(alternate, of=(part(SwiGLU), part(NeedsLayer)))),
        dict(mlp=part(MoE, n_experts=2, router=part(MLPRouter))),
    ):
        one_line(lambda: to_hf(tmp_path / 'h', MiniGPT(llama(**SIZE, **kw))), 'has no word in a')
    assert list(tmp_path.iterdir()) == []


# ---- parts whose shapes hang on numbers


class MLPRouter(nn.Module):
    "A router that returns what `Router` returns, and says nothing"

    def __init__(self, cfg, layer=0, *, n_experts, top_k):
        super().__init__()
        self.layer, self.top_k = layer, top_k
        self.f = nn.Sequential(nn.Linear(cfg.d_model, 16), nn.GELU(), nn.Linear(16, n_experts))

    def forward(self, x, aux=None):
        w, chosen = self.f(x).softmax(-1).topk(self.top_k)
        return w, chosen, F.one_hot(chosen, self.f[-1].out_features).sum((0, 1)).float()


class CountingRouter(MLPRouter):
    "The same, with counts that only numbers tell"

    def forward(self, x, aux=None):
        w, chosen, _ = super().forward(x, aux)
        return (
            w,
            chosen,
            torch.bincount(chosen.flatten(), minlength=self.f[-1].out_features).float(),
        )


class TokenRouter(MLPRouter):
    "By the sign of a channel: asks for a number in Python"

    def forward(self, x, aux=None):
        w, chosen, load = super().forward(x, aux)
        return (w if x[:, 0].sum().item() > 0 else w.flip(1)), chosen, load


class LoopMoE(nn.Module):
    "A mixture whose shapes depend on the data"

    def __init__(self, cfg, layer=0):
        super().__init__()
        self.r = nn.Linear(cfg.d_model, 4, bias=False)
        self.e = nn.ModuleList(SwiGLU(cfg, d_ff=16) for _ in range(4))

    def forward(self, x, **ctx):
        f = x.flatten(0, 1)
        p = self.r(f).softmax(-1)
        out = torch.zeros_like(f)
        for n, expert in enumerate(self.e):
            mine = p.argmax(-1) == n
            out[mine] = p[mine, n, None] * expert(f[mine])
        return out.view_as(x)


class Picky(nn.Module):
    "A mixer that reads what is far from zero, and needs numbers already when it is made"

    def __init__(self, cfg, layer=0):
        super().__init__()
        if torch.arange(3).max().item() != 2:
            raise ValueError
        w = torch.randn(cfg.d_model, cfg.d_model, generator=rng(layer, 'picky'), device='cpu')
        self.register_buffer(
            'w', w[w.abs().sum(1).sort().indices[: w.gt(0).sum(1).min().item() + 1]]
        )

    def forward(self, x, i, **ctx):
        return (x @ self.w.T) @ self.w


NUMBERS = {
    'MLPRouter': dict(mlp=part(MoE, n_experts=4, router=part(MLPRouter))),
    'LoopMoE': dict(mlp=part(LoopMoE)),
    'CountingRouter': dict(mlp=part(MoE, n_experts=4, router=part(CountingRouter))),
    'Picky': dict(attn=part(Picky)),
    'TokenRouter': dict(mlp=part(MoE, n_experts=4, router=part(TokenRouter))),
}


@pytest.fixture
def home(home):
    "A home with a small corpus"
    (home / 'small.txt').write_text(
        'A bee can dig a hole in a big oak, and a fig can hide.\n' * 400
    )
    return home


SMALL = (
    'data.corpus=small.txt',
    'data.length=16',
    'train.steps=4',
    'train.batch_size=2',
    'eval.tokens=40',
    'eval.sample_tokens=5',
)


@pytest.mark.parametrize('name', NUMBERS)
def test_a_part_whose_shapes_hang_on_numbers_trains_and_comes_back(name, home, monkeypatch):
    monkeypatch.chdir(home)
    for f in (MLPRouter, CountingRouter, TokenRouter, LoopMoE, Picky):
        register(f)
    ((key, recipe),) = [(k, to_data(v)) for k, v in NUMBERS[name].items()]
    job = train_run('smoke', *SMALL, f'model.{key}={json.dumps(recipe)}')
    assert job.run.step == 4 and job.work > 0
    rows = json_lines(job.folder / 'metrics.jsonl')
    if 'Router' in name:
        assert any(r.get('moe0_load_max', 0) >= 1 for r in rows)
    again = load(job.folder).model
    ids = torch.randint(9, (1, 12), generator=rng(0, 'ids'))
    with torch.no_grad():
        assert torch.equal(again(ids), job.run.model.eval()(ids))
    if 'Router' in name:
        said = routing(again, ids)[0]
        assert said['chosen'].shape == (12, 2) and said['load'].sum().item() == pytest.approx(1)


def test_what_is_planned_is_measured_where_it_cannot_be_foretold():
    size = dict(SIZE, max_len=16)
    loop = llama(**size, mlp=part(LoopMoE))
    memory = [step_memory(loop, n) for n in (1, 2, 8)]
    weights = 4 * MiniGPT(loop).n_params
    assert 4 * weights < memory[0] < memory[1] < memory[2] and memory[2] - memory[1] == 6 * (
        memory[1] - memory[0]
    )
    whole = step_memory(llama(**size, mlp=part(SwiGLU, d_ff=16)), 8)
    assert 0.5 * whole < memory[2] < 3 * whole  # about as much as a plain one of that width
    shapes = meta_model(llama(**size, attn=part(Picky), tie=True))
    assert shapes.lm_head.weight is shapes.tok.weight
    require_faithful(MiniGPT(llama(**size, attn=part(Picky), tie=True), seed=4))
    assert (
        run_module._work(loop, 16) > 0
        and meta_model(llama(**size, attn=part(Picky))).tok.weight.device.type == 'meta'
    )
    with pytest.raises(ZeroDivisionError):
        step_memory(llama(**size, mlp=part(Wrong)), 2)


class Wrong(SwiGLU):
    def forward(self, x, **ctx):
        return super().forward(x) / (1 // 0)


def test_the_operations_that_are_counted_are_those_that_are_made():
    "Counted on shapes or measured on numbers, it is one figure"
    cfg = llama(**SIZE, mlp=part(MoE, n_experts=4, router=part(MLPRouter)))
    model, rows = MiniGPT(cfg), ids_of(1, T)
    rows = torch.cat([rows, rows[:, :1]], 1)
    assert run_module._work(cfg, T) == flops(lambda: next_token_loss(model, rows).backward()) / T


# ---- balance, whatever the loss


def own_loss(model, rows):
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def two_readings(model, rows):
    return own_loss(model, rows[:, : T // 2]) + own_loss(model, rows[:, T // 2 :])


MIXED = llama(**SIZE, mlp=part(MoE, n_experts=4, top_k=1, router=part(Router, balance=0.5, z=0.1)))


@pytest.mark.parametrize(
    'step',
    [
        train_step,
        StepRunner(),
        StepRunner(accumulate=2),
        StepRunner(precision='bf16'),
        StepRunner(accumulate=2, precision='fp16'),
    ],
    ids=['plain', 'Step', 'parts', 'bf16', 'fp16'],
)
def test_a_loss_of_ones_own_keeps_the_balance(step):
    """Bit for bit the weights of the library's loss, which is the same number; without balance,
    they are others"""
    ends = []
    for cfg in (
        MIXED,
        replace(MIXED, mlp=part(MIXED.mlp, router=part(Router, balance=0.0, z=0.0))),
    ):
        for loss in (next_token_loss, own_loss):
            model = MiniGPT(cfg)
            run = fit(model, lambda step: ids_of(4, T, step), 3, loss_fn=loss, step_fn=step)
            ends.append((run.losses, torch.cat([p.detach().flatten() for p in model.parameters()])))
    (a, x), (b, y), (c, z), (d, w) = ends
    assert a == b and torch.equal(x, y) and c == d and torch.equal(z, w) and not torch.equal(x, z)


def test_the_balance_is_of_each_row_however_it_is_read():
    model = apply_activation_checkpointing(MiniGPT(MIXED))
    fit(model, lambda step: ids_of(4, T, step), 2, loss_fn=two_readings)
    assert model.default_aux is None

    def broken(model, rows):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train_step(model, adamw(model), ids_of(2), loss_fn=broken)
    assert model.default_aux is None


def test_a_loop_by_hand_is_told(monkeypatch):
    import llm_lab.files

    monkeypatch.setattr(llm_lab.files, '_said', set())
    model = MiniGPT(MIXED)
    model(ids_of())  # who only looks is not
    with pytest.warns(
        UserWarning, match='without what its parts say to aux, such as the balance of experts'
    ):
        own_loss(model, ids_of(2)).backward()


@pytest.mark.slow
def test_a_compiled_loss_of_ones_own_keeps_the_balance(monkeypatch):
    "Slow: the compiler reads the model twice"
    import llm_lab.efficient

    monkeypatch.setattr(
        llm_lab.efficient, 'compiled', lambda f: torch.compile(f, backend='aot_eager')
    )
    ends = []
    for loss in (next_token_loss, own_loss):
        torch._dynamo.reset()
        model = MiniGPT(MIXED)
        fit(
            model,
            lambda step: ids_of(4, T, step),
            3,
            loss_fn=loss,
            step_fn=StepRunner(compile=True),
        )
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends)


# ---- slips in recipes


class NoModule:
    "Not a part: no torch module"

    def __init__(self, cfg, layer=0):
        pass


class Needs(MLP):
    def __init__(self, cfg, layer=0, *, width):
        super().__init__(cfg, d_ff=width)


class GivesTwo(SwiGLU):
    def forward(self, x, **ctx):
        return super().forward(x), None


class Narrow(SwiGLU):
    def forward(self, x, **ctx):
        return super().forward(x)[..., :3]


class NoPlaces(nn.Module):
    def __init__(self, cfg, layer=0):
        super().__init__()

    def forward(self, x):
        return x


class NoLayer(nn.Module):
    def __init__(self, cfg):
        super().__init__()

    def forward(self, x, **ctx):
        return x


class BadName(MLP):
    def __init__(self, cfg, layer=0):
        super().__init__(cfg, d_ff=cfg.hidden_size)


IN_A_FILE = {  # {key=value: words of the answer}
    'model.mlp={part: MLP, act: gelu}': ["model.mlp.act='gelu'", 'torch.nn:GELU'],
    'model.mlp={part: MLP, act: GELU}': ["act='GELU'", 'torch.nn:GELU'],
    'model.mlp={part: MLP, act: {part: gelu}}': ["act='gelu'", "did you mean 'GELU'"],
    'model.mlp={part: MLP, act: null}': ['model.mlp.act=None', 'give a recipe'],
    'model.mlp={part: MLP, act: {part: RMSNorm}}': ["act='RMSNorm'", 'belongs into norm'],
    'model.attn={part: Attention, transforms: [RoPE]}': [
        "model.attn.transforms[0]='RoPE'",
        'RoPE',
    ],
    'model.attn={part: Attention, transforms: RoPE}': [
        "model.attn.transforms='RoPE'",
        'in a list',
        'RoPE',
    ],
    'model.attn={part: Attention, transforms: {part: RoPE}}': [
        'model.attn.transforms=',
        'in a list',
    ],
    'model.attn={part: Attention, transforms: [{part: Ropr}]}': [
        "transforms[0]='Ropr'",
        "did you mean 'RoPE'",
    ],
    'model.attn={part: Attention, transforms: [{part: SwiGLU}]}': [
        'transforms[0]',
        'belongs into mlp',
    ],
    'model.norm={part: GroupNorm}': ["model.norm='GroupNorm'", 'RMSNorm'],
    'model.norm=RMSNorm': ["model.norm='RMSNorm'", 'recipe'],
    'model.norm={part: layernorm}': ["model.norm='layernorm'", "did you mean 'LayerNorm'"],
    'model.attn=GQA': ["model.attn='GQA'", 'recipe'],
    'model.attn={GQA: {n_kv_heads: 1}}': ['model.attn=', 'GQA'],
    'model.attn={part: GQA, n_kv_head: 1}': [
        'model.attn',
        "'n_kv_head'",
        "did you mean 'n_kv_heads'",
    ],
    'model.attn={part: GQA}': ['model.', 'n_kv_heads=None', 'choose from'],
    'model.attn={part: GQA, n_kv_heads: 3}': ['n_kv_heads=3 does not divide n_heads=4'],
    'model.attn={part: SwiGLU}': ["model.attn='SwiGLU'", 'belongs into mlp'],
    'model.mlp={part: Attention}': ["model.mlp='Attention'", 'belongs into attn'],
    'model.n_heads=5': ['model.n_heads=5', 'does not divide'],
    'model.mlp=null': ['model.mlp=None', 'give a recipe'],
    'model.attn=null': ['model.attn=None'],
    'model.norm=null': ['model.norm=None'],
    'model.lm_head=null': ['model.lm_head=None'],
    'model.pos=rope': ["model.pos='rope'", 'recipe'],
    'model.pos={part: RoPE}': ["model.pos='RoPE'", 'belongs into attn.transforms'],
    'model.attn={part: Attention, mask: causal}': [
        "model.attn.mask='causal'",
        'causal',
    ],
    'model.attn={part: Attention, mask: {part: sliding_window}}': ['size=None', 'whole number'],
    'model.attn={part: Attention, mask: {part: sliding_window, size: wide}}': [
        'model.attn.mask.size',
        'wide',
    ],
    'model.mlp={part: MLP, d_ff: 4.5}': ['model.mlp.d_ff=4.5', 'something like int'],
    'model.mlp={part: MLP, d_ff: 4x}': ["model.mlp.d_ff='4x'", 'something like int'],
    'model.mlp={part: MLP, d_ff: 2.5}': ['d_ff=2.5'],
    'model.mlp={part: MoE, n_experts: 4, router: Router}': [
        "model.mlp.router='Router'",
        'Router',
    ],
    'model.mlp={part: MoE, n_experts: 2, top_k: 3}': ['top_k=3', 'there are 2 experts'],
    'model.mlp={part: MoE, experts: 4}': ['model.mlp', "'experts'", 'did you mean'],
    'model.mlp={part: MoE, router: {part: Router, choose: softmax}}': [
        "model.mlp.router.choose='softmax'",
        'top_k_softmax',
    ],
    'model.mlp=[{part: MLP}]': ['model.mlp=', 'recipe'],
    'model.mlp={part: [MLP]}': ['model.mlp=', 'recipe'],
    'model.mlp={}x': ['model.mlp'],
    'model.attn={part: alternate, of: {part: Attention}}': ['model.attn.of=', 'in a list'],
    'model.attn={part: alternate, of: []}': ['of='],
    'model.init={part: gpt2_init, std: big}': ['model.init.std', 'big'],
    'model.lm_head={part: SoftcapHead, cap: 0}': ['cap=0'],
    'model.mlp={part: NoModule}': ['model.mlp=', 'NoModule', 'torch.nn.Module'],
    'model.mlp={part: Needs}': ['model.mlp=', "'width'", 'write part(Needs, width=…)'],
    'model.mlp={part: Needs, widht: 8}': ['model.mlp', "'widht'", "did you mean 'width'"],
    'model.mlp={part: GivesTwo}': ['model.mlp=', 'makes tuple'],
    'model.mlp={part: Narrow}': ['model.mlp=', 'makes (2, 6, 3)', '(2, 6, 32)'],
    'model.attn={part: NoPlaces}': ['model.attn=', 'cannot read', 'called with (x, i'],
    'model.attn={part: NoLayer}': ['model.attn=', 'NoLayer', 'cfg, layer'],
    'model.mlp={part: BadName}': ['model.mlp=', 'hidden_size'],
    'model.attn={part: Remembers, cache: yes}': ['model.attn', "'cache'"],
    'model.mlp={part: MLPRouter}': ['model.mlp=', 'n_experts'],
    'model.mlp={part: MoE, router: {part: LoopMoE}}': ['model.', 'LoopMoE'],
    'model.norm={part: LayerNorm, epz: 1}': ['model.norm', "'epz'", "did you mean 'eps'"],
    'model.mlp={part: Mlpp}': ["model.mlp='Mlpp'", "did you mean 'MLP'"],
}


@pytest.mark.parametrize('item', IN_A_FILE)
def test_a_slip_in_a_file_is_one_line_before_anything_is_packed(item, home, monkeypatch):
    for f in (
        NoModule,
        Needs,
        GivesTwo,
        Narrow,
        NoPlaces,
        NoLayer,
        BadName,
        Remembers,
        MLPRouter,
        LoopMoE,
    ):
        register(f)

    class Reached(Exception):
        "The texts would be packed now"

    def load_data(cfg, sha256):
        raise Reached

    monkeypatch.setattr(run_module, 'load_data', load_data)
    one_line(lambda: train_run('smoke', item), *IN_A_FILE[item])
    with pytest.raises(Reached):
        train_run('smoke', 'model.pos=null')  # so the test can fail: this one goes on to the texts


def make_slips():
    steps = lambda v: GPTConfig(attn=part(Attention, transforms=v))
    pattern = lambda v: GPTConfig(attn=part(Attention, mask=v))
    return [
        (lambda: GPTConfig(mlp=part(MLP, act='gelu')), "act='gelu'", 'act=part(GELU)'),
        (lambda: GPTConfig(mlp=part(MLP, act='GELU')), 'act=part(GELU)'),
        (lambda: GPTConfig(mlp=part(MLP, act=nn.GELU)), 'act=GELU', 'act=part(GELU)'),
        (lambda: GPTConfig(mlp=part(MLP, act=nn.GELU())), 'act=GELU(…)', 'act=part(GELU)'),
        (
            lambda: GPTConfig(mlp=part(MLP, act=lambda x: x)),
            'act=<lambda>',
            'a function with a name',
        ),
        (lambda: GPTConfig(mlp=part(MLP, act=None)), 'act=None'),
        (
            lambda: GPTConfig(mlp=lambda cfg, layer: MLP(cfg)),
            'mlp=<lambda>',
            'a function with a name',
        ),
        (lambda: steps([RoPE]), 'transforms=RoPE', 'transforms=(part(RoPE),)'),
        (lambda: steps(RoPE), 'transforms=RoPE', 'transforms=(part(RoPE),)'),
        (lambda: steps('RoPE'), "transforms='RoPE'", 'transforms=(part(RoPE),)'),
        (lambda: steps(part(RoPE)), 'transforms=RoPE', 'transforms=(part(RoPE),)'),
        (lambda: steps(['RoPE']), "transforms='RoPE'"),
        (lambda: steps(None), 'transforms=None'),
        (lambda: steps((part(SwiGLU),)), 'SwiGLU can be mlp, not attn.transforms'),
        (lambda: GPTConfig(norm=part(nn.GroupNorm, num_groups=2)), 'norm=', 'GroupNorm', 'RMSNorm'),
        (lambda: GPTConfig(norm=part(nn.BatchNorm1d)), 'norm=', 'BatchNorm1d', 'LayerNorm'),
        (lambda: GPTConfig(norm=RMSNorm(128)), 'norm=RMSNorm(…)', 'norm=part(RMSNorm)'),
        (lambda: GPTConfig(attn='GQA'), "attn='GQA'", 'attn=part(GQA)'),
        (lambda: GPTConfig(attn=GQA), 'attn=GQA', 'attn=part(GQA)'),
        (lambda: part(GQA, n_kv_head=2), "'n_kv_head'", 'n_kv_heads'),
        (lambda: GPTConfig(attn=part(SwiGLU)), 'attn=part(SwiGLU)', 'can be mlp, not attn'),
        (lambda: GPTConfig(mlp=part(Attention)), 'mlp=part(Attention)', 'can be attn'),
        (lambda: GPTConfig(pos=part(RoPE)), 'pos=part(RoPE)', 'can be attn.transforms, not pos'),
        (lambda: GPTConfig(pos='rope'), "pos='rope'"),
        (lambda: GPTConfig(pos=LearnedPositions), 'pos=LearnedPositions', 'part(LearnedPositions)'),
        (lambda: GPTConfig(mlp=None), 'mlp=None', 'mlp=part(MLP)'),
        (lambda: GPTConfig(attn=None), 'attn=None'),
        (lambda: GPTConfig(init=None), 'init=None'),
        (lambda: GPTConfig(mlp={'part': 'MLP'}), 'mlp={'),
        (lambda: pattern('causal'), "mask='causal'", 'mask=part(causal)'),
        (lambda: pattern(sliding_window), 'mask=sliding_window', 'part(sliding_window)'),
        (lambda: pattern(None), 'mask=None'),
        (lambda: GPTConfig(n_heads=3), 'n_heads=3 does not divide d_model=128'),
        (lambda: GPTConfig(attn=part(GQA)), 'n_kv_heads=None'),
        (lambda: GPTConfig(mlp=part(Needs)), "'width'", 'width=…'),
        (lambda: MiniGPT(GPTConfig(mlp=part(NoModule))), 'mlp=part(NoModule)', 'torch.nn.Module'),
        (lambda: part('MLP'), "part('MLP')", 'give a class'),
        (lambda: part(MLP(GPTConfig())), 'part(MLP)', 'is made already'),
        (lambda: GPTConfig(attn=part(NoLayer)), 'attn=part(NoLayer)', 'NoLayer(cfg, layer)'),
        (lambda: MiniGPT(GPTConfig(mlp=part(BadName))), 'mlp=part(BadName)', 'hidden_size'),
        (
            lambda: GPTConfig(attn=part(alternate, of=(part(Attention), GQA))),
            'of=',
            'GQA',
            'give recipes',
        ),
        (lambda: check_parts(GPTConfig(mlp=part(GivesTwo))), 'mlp=part(GivesTwo) makes tuple'),
        (lambda: check_parts(GPTConfig(attn=part(NoPlaces))), 'attn=part(NoPlaces) cannot read'),
        (lambda: MiniGPT(GPTConfig(tie=True, lm_head=part(Headless))), 'tie=True', 'has no weight'),
        (
            lambda: to_data(GPTConfig(mlp=part(lambda cfg, layer=0: MLP(cfg)))),
            '<lambda>',
            "register(f, 'a_name')",
        ),
    ]


class Headless(nn.Module):
    def __init__(self, d, vocab_size):
        super().__init__()
        self.f = nn.Linear(d, vocab_size)

    def forward(self, x):
        return self.f(x)


@pytest.mark.parametrize('n', range(len(make_slips())))
def test_a_slip_in_a_program_is_one_line(n):
    call, *words = make_slips()[n]
    one_line(call, *words)


def test_what_is_right_is_tried_in_peace():
    for kind, (cfg, _) in CACHES.items():
        if kind != 'one attention in two layers':  # its layers cannot be made one by one
            assert check_parts(cfg) == cfg
    for kw in NUMBERS.values():
        check_parts(llama(**SIZE, **kw))
    assert own_in(llama(**SIZE, attn=part(Plain))) and not own_in(llama(**SIZE, mlp=part(MoE)))


def test_null_means_none(home, monkeypatch):
    """In a file: no positions, no steps; what is left out is as the block has it; older files are
    read as they were meant"""
    made = lambda *items: model_config(read_config('smoke', items), 9)
    assert made().pos == part(LearnedPositions) and made('model.pos=null').pos is None
    assert made('model.preset=llama').pos is None and made(
        'model.preset=llama', 'model.pos={part: LearnedPositions}'
    ).pos == part(LearnedPositions)
    assert made(
        'model.preset=llama', 'model.attn={part: Attention, transforms: null}'
    ).attn == part(Attention, transforms=(), bias=False)
    assert made('model.preset=llama', 'model.attn={part: Attention}').attn == part(
        Attention, transforms=(part(RoPE),), bias=False
    )
    for item in ('model.tie=true', 'model.pos=null', 'model.preset=llama'):
        cfg = read_config('smoke', [item])
        write_config(cfg, home / 'x.yaml')
        write_config(cfg, home / 'x.yaml')  # it knows its own files
        assert replace(read_config(home / 'x.yaml'), name='smoke') == cfg
    old = dict.fromkeys(('attn', 'mlp', 'norm', 'pos', 'lm_head', 'init'))
    assert config_from_dict(dict(model=old)) == config_from_dict(dict(model={}))
    recipe = dict(part='MLP')
    assert (
        config_from_dict(dict(model=old | dict(mlp=recipe))).model
        == config_from_dict(dict(model=dict(mlp=recipe))).model
    )
    one_line(lambda: config_from_dict(dict(model=dict(mlp=None))), 'model.mlp=None')
