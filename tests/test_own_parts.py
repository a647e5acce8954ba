"Parts of one's own, and models that were changed: caches that are whole or not used, saves that come back as the same function, slips told in one line."
import json
from copy import deepcopy
from dataclasses import replace
from types import MethodType

import pytest
import torch
from cases import some
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, parametrizations, prune

import llm_lab.run as run_module
from llm_lab.cache import Cached, KVCache, RollingCache, cached, complete, picked, window
from llm_lab.chars import CharTokenizer
from llm_lab.checkpoint import Checkpoints
from llm_lab.config import BLOCKS, ModelKeys, config_of, model_data, read_config, write_config
from llm_lab.fast import fast
from llm_lab.gpt import (MLP, Attention, Block, Config, Learned, MiniGPT, config_from, own_in, part, quick_linear,
                         register, require_as_said, sketch, to_data, tried)
from llm_lab.gqa import GQA, grouped
from llm_lab.hub import from_hf, to_hf
from llm_lab.lab import REGISTERED, LabError, flops, rng
from llm_lab.llama import RMSNorm, Rope, SwiGLU, freed, half_split, llama, spectral_init
from llm_lab.moe import MoE, Router, routes
from llm_lab.optim import Step, checkpointed, step_memory
from llm_lab.package import open_model, save_package
from llm_lab.run import model_config, train_config
from llm_lab.sample import Reader, generate
from llm_lab.sparse import cycle
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


def ids_of(B=1, n=T, seed=0): return torch.randint(17, (B, n), generator=rng(seed, 'ids'))


def shaken(cfg, seed=0):
    "A model with large weights, so that what is wrong is far off"
    model, draw = MiniGPT(cfg, seed).eval(), rng(seed, 'shaken')
    with torch.no_grad():
        for p in model.parameters(): p.add_(.2*torch.randn(p.shape, generator=draw))
    return model


def near(a, b, eps=2e-5): assert (worst := (a - b).abs().max().item()) <= eps*max(1., b.abs().max().item()), worst


def one_line(call, *words):
    with pytest.raises(LabError) as e: call()
    said = str(e.value)
    assert '\n' not in said and len(said) < 700, said
    for w in words: assert w in said, said
    return said


# ---- caches

class Plain(nn.Module):
    "A mixer that mixes nothing and keeps nothing"
    def __init__(self, cfg, layer=0):
        super().__init__()
        self.f = nn.Linear(cfg.d_model, cfg.d_model)

    def forward(self, x, i, **ctx): return self.f(x)


class Before(nn.Module):
    "Looks at the token before, and keeps nothing; a mixer or an MLP"
    def __init__(self, cfg, layer=0):
        super().__init__()
        self.f = nn.Linear(cfg.d_model, cfg.d_model)

    def forward(self, x, i=None, **ctx): return self.f(F.pad(x, (0, 0, 1, 0))[:, :-1])


class Remembers(nn.Module):
    "The same with a memory of its own, a list under its layer; a mixer or an MLP"
    reads = ('cache',)
    def __init__(self, cfg, layer=0):
        super().__init__()
        self.layer, self.f = layer, nn.Linear(cfg.d_model, cfg.d_model)

    def cache(self, batch, length): return []

    def forward(self, x, i=None, cache=None, **ctx):
        kept = [] if cache is None else cache[getattr(self, 'key', self.layer)]
        old = kept[0] if kept else x.new_zeros(len(x), 1, x.shape[2])
        kept[:] = [x[:, -1:]]
        return self.f(torch.cat([old, x[:, :-1]], 1))


class Keyed(Remembers):
    "The same under a key that no other part has"
    def __init__(self, cfg, layer=0):
        super().__init__(cfg, layer)
        self.key = (layer, 'before')


class Forgets(Attention):
    "An attention of one's own that hands its steps no cache"
    def forward(self, x, i, rising=False, cache=None, **ctx): return super().forward(x, i, rising, **ctx)


class Pair(nn.Module):
    "Two attentions side by side, of which one keeps"
    def __init__(self, cfg, layer=0, *, one, two):
        super().__init__()
        self.one, self.two = one(cfg, layer), two(cfg, layer)

    def forward(self, x, i, **ctx): return self.one(x, i, **ctx) + self.two(x, i, **ctx)


class Nameless(nn.Module):
    "A step that keeps and does not say where"
    def __init__(self, cfg, layer=0): super().__init__()
    def cache(self, batch, length): return KVCache(length)
    def forward(self, q, k, v, i, j, **ctx): return q, k, v, i, j


rope, keeps, bare = part(Rope), part(Attention, steps=(part(Rope), part(Cached))), part(Attention, steps=(part(Rope),))
near_by = part(window, size=5)
rolls = part(GQA, n_kv_heads=1, pattern=near_by, steps=(rope, part(Cached, size=5)))
turns = lambda *of, **kw: llama(**SIZE | kw, attn=part(cycle, of=of))
both = lambda *steps: part(Attention, steps=steps)
# {what: (configuration, has it a cache?)}
CACHES = {
    'none': (turns(bare), False), 'all': (turns(keeps), True), 'the first': (turns(keeps, bare), False), 'the last': (turns(bare, keeps), False),
    'a ring and none': (turns(rolls, bare), False), 'a ring and all': (turns(rolls, keeps), True), 'a ring': (turns(rolls), True),
    'GQA in one': (turns(keeps, part(GQA, n_kv_heads=1, steps=(rope, part(Cached)))), True),
    'GQA without': (turns(keeps, part(GQA, n_kv_heads=1, steps=(rope,))), False),
    'own without': (turns(keeps, part(Plain)), False), 'own that looks back': (turns(part(Before), keeps), False),
    'own with': (turns(keeps, part(Remembers)), True), 'own alone': (turns(part(Remembers)), True), 'own and bare': (turns(bare, part(Remembers)), False),
    'MLP looks back': (llama(**SIZE, attn=keeps, mlp=part(Before)), False), 'MLP with, same key': (llama(**SIZE, attn=keeps, mlp=part(Remembers)), False),
    'MLP with, own key': (llama(**SIZE, attn=keeps, mlp=part(Keyed)), True), 'only the MLP': (llama(**SIZE, attn=bare, mlp=part(Keyed)), False),
    'two caches in one': (llama(**SIZE, attn=both(rope, part(Cached), part(Cached))), False),
    'a slip in a forward': (turns(part(Forgets, steps=(rope, part(Cached)), bias=False)), False),
    'half of a pair': (turns(part(Pair, one=keeps, two=bare)), False),
    'a pair under one key': (turns(part(Pair, one=keeps, two=keeps)), False),
    'no name': (turns(both(rope, part(Nameless))), False)}


@pytest.mark.parametrize('kind', CACHES)
def test_a_cache_is_whole_or_not_used(kind):
    "Read in pieces, the logits are those of one forward pass, whatever a part keeps or forgets"
    cfg, has = CACHES[kind]
    model, ids = shaken(cfg), ids_of(2)
    want = model(ids).detach()
    assert (model.cache(2, T) is not None) == has
    for cut in ([1]*T, [7, 1, 1, 9, 1, 1, 1, 1, 2]):
        reader, at = Reader(model, T), 0
        for piece in ids.split(cut, 1):
            at += piece.shape[1]
            near(reader(piece), want[:, at - 1])
    assert bool(reader.cache) == has


@pytest.mark.parametrize('kind', some(CACHES, 8))
def test_what_is_written_is_the_same_in_every_form(kind):
    "`cached` and `fast` write the letters of the plain model, or refuse in one line; rows that are picked go on"
    cfg, has = CACHES[kind]
    model = shaken(cfg, 1)
    text = lambda m, **kw: torch.stack(list(generate(m, ids_of(2, 5), 30, **kw)), 1)     # past max_len, too
    want = [text(model, temperature=0), text(model, seed=3, top_k=5)]
    forms = [fast(model), cached(model, strict=False)]
    try: forms.append(cached(model))
    except LabError as e: assert '\n' not in str(e) and not has
    for m in forms:
        for a, b in zip(want, (text(m, temperature=0), text(m, seed=3, top_k=5))): assert torch.equal(a, b)
    reader, ids = Reader(forms[1], T), ids_of(3)
    reader(ids[:, :9])
    picked(reader, [2, 0])
    near(reader(ids[[2, 0], 9:10]), model(ids[[2, 0], :10])[:, -1])
    texts = [c.text for c, in complete(model, TOK, ['a', 'fine'], 9, temperature=0)]
    assert texts == [c.text for c, in complete(forms[1], TOK, ['a', 'fine'], 9, temperature=0)]


def test_a_mixer_without_a_cache_is_named():
    one_line(lambda: cached(shaken(turns(part(Plain), bare))), 'can have no cache', 'Plain of layer 0 keeps nothing')
    one_line(lambda: cached(shaken(llama(**SIZE, attn=bare, mlp=part(Remembers)))), 'keeps under 0', 'give it a `key`')
    one_line(lambda: cached(shaken(llama(**SIZE, attn=bare, mlp=part(Before)))), 'one by one otherwise')
    good = cached(shaken(llama(**SIZE, attn=bare, mlp=part(Keyed))))
    assert sorted(map(str, good.cache(1, 9))) == sorted(map(str, [0, 1, (0, 'before'), (1, 'before')]))
    assert isinstance(cached(shaken(turns(rolls))).cache(1, 9)[0], RollingCache)


def test_the_proof_disturbs_nothing():
    "Dropout's stream, the modes of the parts and the gradients are as they were"
    model = MiniGPT(llama(**SIZE, attn=keeps, mlp=part(Keyed), dropout=.5))
    model.blocks[0].eval()
    before, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    assert model.cache(1, 9)
    assert torch.equal(torch.get_rng_state(), before) and modes == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())


class Folded(nn.Module):
    "A mixer that does other things with its linear layer than to call it"
    def __init__(self, cfg, layer=0):
        super().__init__()
        self.f = nn.Linear(cfg.d_model, 2*cfg.d_model)

    def forward(self, x, i, **ctx): return F.linear(x, self.f.weight[:x.shape[2]])


def test_fast_takes_any_mixer():
    for attn in (part(Plain), part(Folded), part(cycle, of=(part(Folded), bare)), part(Pair, one=keeps, two=part(Folded))):
        model = shaken(llama(**SIZE, attn=attn))
        quick, reader = fast(model), Reader(fast(model), T)
        near(quick(ids_of(2)).detach(), model(ids_of(2)).detach())
        for t in range(9): near(reader(ids_of()[:, t:t + 1]), model(ids_of()[:, :t + 1])[:, -1])
    watched = shaken(llama(**SIZE))
    watched.blocks[0].attn.register_forward_hook(lambda m, args, y: 2*y)
    reader = Reader(fast(watched), T)
    for t in range(9): near(reader(ids_of()[:, t:t + 1]), watched(ids_of()[:, :t + 1])[:, -1])

    class Loud(MiniGPT):
        def forward(self, ids, i=None, **ctx): return 2*super().forward(ids, i, **ctx)
    one_line(lambda: fast(Loud(llama(**SIZE))), 'Loud has a forward of its own')


def test_llama_adds_nothing_to_a_mixer_of_ones_own():
    class Mine(Attention): pass
    assert llama(attn=part(Plain)).attn == part(Plain)
    with pytest.warns(UserWarning, match='Mine is your own, so llama gives it no RoPE'): assert llama(attn=part(Mine)).attn == part(Mine)
    assert llama(attn=part(Mine), rope=part(Rope, base=9.)).attn == part(Mine, steps=(part(Rope, base=9.),))
    full = part(Attention, steps=(rope,), bias=False)
    assert llama(attn=part(cycle, of=(part(Plain), part(Attention)))).attn == part(cycle, of=(part(Plain), full))
    one_line(lambda: llama(attn=part(Plain), rope=rope), 'rope=part(Rope)', 'takes no steps')
    register(Mine)
    for attn in (dict(part='Mine'), dict(part='Mine', bias=True)):
        said = model_data(ModelKeys(block='llama', attn=attn))
        assert said['attn'] == attn and said['mlp'] == BLOCKS['llama']['mlp']
    said = model_data(ModelKeys(block='llama', attn=dict(part='sparse:cycle', of=[dict(part='Mine'), dict(part='Attention')])))
    assert config_from({**said, 'attn': said['attn'] | {'part': 'llm_lab.sparse:cycle'}}).attn == part(cycle, of=(part(Mine), full))


# ---- a model that is not what its configuration says

class ParallelBlock(Block):
    "GPT-J: attention and MLP read the same norm"
    def forward(self, x, i, **ctx):
        h = self.norm1(x)
        return x + self.attn(h, i, **ctx) + self.mlp(h, **ctx)


class Parallel(MiniGPT):
    def __init__(self, cfg, seed=0):
        super().__init__(cfg, seed)
        for b in self.blocks: b.__class__ = ParallelBlock


class Scaled(nn.Module):
    "A layer with something around it"
    def __init__(self, layer):
        super().__init__()
        self.layer, self.by = layer, nn.Parameter(torch.ones(()))

    def forward(self, x): return self.by*self.layer(x)


class Louder(nn.Module):
    def forward(self, w): return 1.5*w


def set_at(path, make):
    def change(m):
        owner, _, name = path.rpartition('.')
        owner = m.get_submodule(owner)
        setattr(owner, name, make(getattr(owner, name)))
    return change


def swapped(m): m.blocks = nn.ModuleList([m.blocks[1], m.blocks[0]])
def shorter(m): m.blocks = m.blocks[:1]
def longer(m): m.blocks.append(deepcopy(m.blocks[0]))
def shared(m): m.blocks[1].mlp = m.blocks[0].mlp
def one_weight(m): m.blocks[1].mlp.up.weight = m.blocks[0].mlp.up.weight
def tied(m): m.head.weight = m.tok.weight
def hook(path, f): return lambda m: m.get_submodule(path).register_forward_hook(f)
def early(path, f): return lambda m: m.get_submodule(path).register_forward_pre_hook(f)
def slower(m): m.blocks[0].attn.steps[0].freq = m.blocks[0].attn.steps[0].freq/2
def prefix(m): m.register_forward_pre_hook(lambda m, args: (args[0].flip(1),))


CHANGES = {                                                    # {what: (change, words of the refusal)}
    'another MLP': (set_at('blocks.0.mlp', lambda old: MLP(Config(**SIZE))), 'blocks.0.mlp is a MLP, it should be a SwiGLU'),
    'another bend': (set_at('blocks.1.mlp.act', lambda old: nn.ReLU()), 'blocks.1.mlp.act is a ReLU, it should be a SiLU'),
    'another norm': (set_at('norm', lambda old: nn.LayerNorm(16)), 'norm is a LayerNorm'),
    'a wrapped layer': (set_at('blocks.0.attn.out', Scaled), 'blocks.0.attn.out is a Scaled'),
    'a wrapped head': (set_at('head', lambda old: nn.Sequential(old, nn.Tanh())), 'head is a Sequential'),
    'a wider layer': (set_at('blocks.0.mlp.up', lambda old: nn.Linear(16, 99, False)), 'blocks.0.mlp.up.out_features is 99'),
    'a bias more': (set_at('blocks.0.mlp.out', lambda old: nn.Linear(*old.weight.shape[::-1])), 'blocks.0.mlp.out.bias was added'),
    'a step more': (lambda m: m.blocks[0].attn.steps.append(Rope(m.cfg)), 'blocks.0.attn.steps.1 (Rope) was added'),
    'a step less': (lambda m: m.blocks[0].attn.steps.pop(-1), 'blocks.0.attn.steps.0 was taken out'),
    'a changed class': (lambda m: setattr(m.blocks[1], '__class__', ParallelBlock), 'blocks.1 is a ParallelBlock, it should be a Block'),
    'a changed forward': (lambda m: setattr(m.blocks[0], 'forward', MethodType(ParallelBlock.forward, m.blocks[0])), 'blocks.0.forward was replaced'),
    'changed features': (lambda m: setattr(m, 'features', lambda ids, **kw: m.norm(m.tok(ids))), 'the model.features was replaced'),
    'another through': (lambda m: setattr(m, 'through', lambda block, x, i, **ctx: x), 'the model.through was replaced'),
    'a hook': (hook('blocks.0.mlp', lambda m, args, y: 2*y), 'blocks.0.mlp has a hook that changes it'),
    'a hook before': (early('blocks.1.attn.qkv', lambda m, args: (2*args[0],)), 'blocks.1.attn.qkv has a hook that changes it'),
    'a hook of all': (prefix, 'the model has a hook that changes it'),
    'a parametrization': (lambda m: parametrize.register_parametrization(m.blocks[0].mlp.up, 'weight', Louder()), 'parametrizations'),
    'weight norm': (lambda m: parametrizations.weight_norm(m.blocks[0].mlp.out), 'parametrizations'),
    'pruned': (lambda m: prune.l1_unstructured(m.blocks[0].mlp.out, 'weight', .5), 'blocks.0.mlp.out'),
    'a block less': (shorter, 'blocks.1 was taken out'), 'a block more': (longer, 'blocks.2 (Block) was added'),
    'blocks swapped': (swapped, 'blocks.0.attn.layer is 1, it should be 0'), 'one MLP twice': (shared, 'blocks.1.mlp is shared'),
    'one weight twice': (one_weight, 'blocks.1.mlp.up.weight is shared'), 'tied by hand': (tied, 'head.weight is shared'),
    'another pattern': (set_at('blocks.0.attn.pattern', lambda old: near_by), 'blocks.0.attn.pattern is part(window, size=5)'),
    'another eps': (set_at('blocks.0.norm1.eps', lambda old: .1), 'blocks.0.norm1.eps is 0.1'), 'slower hands': (slower, 'freq was changed'),
    'a buffer more': (lambda m: m.blocks[0].register_buffer('more', torch.zeros(3)), 'blocks.0.more was added'),
    'a module more': (lambda m: m.add_module('probe', nn.Linear(2, 2)), 'probe (Linear) was added'),
    'an adapter': (lambda m: setattr(m.blocks[0].mlp, 'extra', nn.Parameter(torch.zeros(2))), 'blocks.0.mlp.extra was added')}


@pytest.mark.parametrize('what', CHANGES)
def test_a_model_that_was_changed_is_refused_by_every_save(what, tmp_path):
    "Before a byte is written, in one line; a conversion that would drop the change refuses as well"
    change, words = CHANGES[what]
    model = MiniGPT(llama(**SIZE))
    require_as_said(model)
    change(model)
    saves = [lambda: save_package(tmp_path/'p', model, TOK), lambda: to_hf(tmp_path/'h', model, TOK), lambda: grouped(model, 1)]
    for save in saves: one_line(save, 'not what its configuration says', words)
    assert list(tmp_path.iterdir()) == []


def test_a_subclass_is_refused_where_it_does_something_else(tmp_path):
    one_line(lambda: save_package(tmp_path/'p', Parallel(llama(**SIZE)), TOK), 'blocks.0 is a ParallelBlock, it should be a Block')

    class Doubled(MiniGPT):
        def forward(self, ids, i=None, **ctx): return 2*super().forward(ids, i, **ctx)

    class Talks(MiniGPT):
        def hello(self): return 'hello'
    one_line(lambda: to_hf(tmp_path/'p', Doubled(llama(**SIZE))), 'the model is a Doubled, it should be a MiniGPT')
    model = Talks(llama(**SIZE))
    again = open_model(save_package(tmp_path/'p', model, TOK)).model
    assert torch.equal(again(ids_of()), model.eval()(ids_of()))


def test_a_changed_class_of_this_library_is_seen(tmp_path, monkeypatch):
    "Another process would not have the change"
    model = MiniGPT(llama(**SIZE))
    monkeypatch.setattr(SwiGLU, 'forward', lambda self, x, **ctx: x)
    one_line(lambda: save_package(tmp_path/'p', model, TOK), 'blocks.0.mlp.forward was replaced')


def test_an_untied_table_is_not_lost(tmp_path):
    model = MiniGPT(llama(**SIZE, tie=True))
    save_package(tmp_path/'p', model, TOK)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    one_line(lambda: save_package(tmp_path/'q', model, TOK), 'head.weight is not shared')


def test_checkpoints_ask_too(tmp_path):
    model = MiniGPT(llama(**SIZE))
    model.blocks[0].mlp.act = nn.ReLU()
    batch = random_crops(torch.randint(17, (200,)), 2, T - 1)
    saved = Checkpoints(tmp_path/'run', TOK)
    one_line(lambda: fit(model, batch, 4, every={2: saved}), 'blocks.0.mlp.act is a ReLU')
    assert [p for p in tmp_path.rglob('*') if p.is_file()] == []


def test_conversions_ask_too():
    turned, bound = llama(**SIZE, attn=both(part(Rope, interleaved=True))), llama(**SIZE, init=part(spectral_init))
    for make, cfg in ((half_split, turned), (freed, bound)):
        model = MiniGPT(cfg)
        make(model)
        model.blocks[0].mlp.act = nn.ReLU()
        one_line(lambda: make(model), 'blocks.0.mlp.act is a ReLU')


def test_what_changes_no_function_is_saved(tmp_path):
    "Recomputing, quick products, who only looks on, bound weights, low precision, what training changes, frozen weights"
    seen = []

    def watched(m):
        m.blocks[0].mlp.register_forward_hook(lambda m, args, y: seen.append(y.shape))
        m.register_full_backward_hook(lambda *args: None)

    def trained(m):
        opt = adamw(m)
        for _ in range(2): train_step(m, opt, ids_of(4, T))
        m.metrics()
    ways = [(llama(**SIZE), checkpointed), (llama(**SIZE), watched), (llama(**SIZE, init=part(spectral_init)), trained),
            (llama(**SIZE, mlp=part(MoE, n_experts=3, shared=1, router=part(Router, bias_rate=.1))), trained), (llama(**SIZE, tie=True), trained),
            (Config(**SIZE, dropout=.5), trained), (llama(**SIZE), lambda m: m.requires_grad_(False)), (llama(**SIZE), lambda m: m.bfloat16()),
            (Config(**SIZE), lambda m: m.eval()), (turns(rolls, keeps), trained)]
    for cfg, change in ways:
        model = MiniGPT(cfg, seed=3)
        change(model)
        with quick_linear(model): save_package(tmp_path/'p', model, TOK)
        again = open_model(tmp_path/'p').model
        with torch.no_grad(): assert torch.equal(again(ids_of()), model.eval()(ids_of())), cfg
    assert seen


class Fixed(nn.Module):
    "An MLP with numbers that are no parameters and no buffers"
    def __init__(self, cfg, layer=0):
        super().__init__()
        self.f, self.kept = nn.Linear(cfg.d_model, cfg.d_model), torch.linspace(0, 1, cfg.d_model)

    def forward(self, x, **ctx): return self.f(x)*self.kept


def test_numbers_of_an_own_part_that_no_file_holds_are_missed(tmp_path):
    register(Fixed)
    model = MiniGPT(llama(**SIZE, mlp=part(Fixed)), seed=5)
    again = open_model(save_package(tmp_path/'p', model, TOK)).model
    assert torch.equal(again(ids_of()), model.eval()(ids_of()))
    model.blocks[0].mlp.kept = torch.ones(16)
    said = one_line(lambda: save_package(tmp_path/'q', model, TOK), 'no parameters and no buffers')
    assert said and not (tmp_path/'q').exists()
    model.blocks[0].mlp.kept = torch.linspace(0, 1, 16)
    hidden = MiniGPT(llama(**SIZE, mlp=part(Fixed)))
    hidden.blocks[1].mlp.forward = lambda x, **ctx: x
    one_line(lambda: save_package(tmp_path/'q', hidden, TOK), 'blocks.1.mlp.forward was replaced')
