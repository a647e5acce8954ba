"""`sparse` and `kernels`: what skips work gives the same as what does all of it, for every pattern,
shape, backward pass and model.

The oracle is a softmax over all pairs in float64, masked by the pattern asked pair by pair. No
kernel of PyTorch and no plan is in it."""

import math
import random

import pytest
import torch
from cases import cases, some
from helpers import shake

from llm_lab.kv_cache import with_kv_cache, lookback, sliding_window
from llm_lab.corpora import Corpus
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.package import config_from, to_data
from llm_lab.self_attention import scaled_dot_product, causal, dense_mask
from llm_lab.parts import part
from llm_lab.gqa import GQA, kv_heads
from llm_lab.kernels import (
    Plan,
    SparseAttention,
    attention_stats,
    sparse_attention,
    block_mask,
    cover,
    masked_attention,
    flex_kernel,
    tiled_attention,
    get_plan,
    choose_kernel,
)
from llm_lab.core import LabError, rng
from llm_lab.hardware import flops
from llm_lab.llama_block import QKNorm, llama
from llm_lab.positions import RoPE
from llm_lab.looking import attention_maps, intervene
from llm_lab.efficient import apply_activation_checkpointing
from llm_lab.package import load, save
from llm_lab.chars import CharTokenizer
from llm_lab.sampling import DecodingState, generate
from llm_lab.sparse import (
    and_masks,
    alternate,
    same_document,
    or_masks,
    expander_links,
    polynomial_links,
    power_links,
    attention_sinks,
    strided,
)
from llm_lab.train import next_token_loss

pytestmark = pytest.mark.usefixtures('one_thread')


def near(size):
    return part(sliding_window, size=size)


TOK = CharTokenizer.train('abcdefghijklmnopqrstuvwxyz .,\n')


def far(size, degree=6, seed=0):
    return part(
        or_masks, of=(near(size), part(expander_links, degree=degree, seed=seed, beyond=size))
    )


def any_of(*of):
    return part(or_masks, of=of)


def all_of(*of):
    return part(and_masks, of=of)


def fade(i, j, h):
    return (j <= i) & (i - j < 3 + 4 * h)


fade.lookback = lambda: 40


PATTERNS = {
    'window 1': near(1),
    'window 2': near(2),
    'window 7': near(7),
    'window 16': near(16),
    'window 17': near(17),
    'window 64': near(64),
    'window 400': near(400),
    'links': far(16),
    'more links': far(5, 11, 3),
    'a link': far(40, 1),
    'links alone': part(expander_links, degree=4),
    'links from 1': any_of(near(16), part(expander_links, degree=6)),
    'sinks': any_of(near(9), part(attention_sinks, n=4)),
    'sinks alone': part(attention_sinks, n=3),
    'strided': part(strided, stride=10),
    'window, strided': any_of(near(9), part(strided, stride=13)),
    'powers': any_of(near(8), part(power_links, beyond=8)),
    'powers alone': part(power_links),
    'polynomial': any_of(near(12), part(polynomial_links, degree=5)),
    'thinned': all_of(near(50), part(strided, stride=3)),
    'three': any_of(near(6), part(attention_sinks, n=2), part(expander_links, degree=3, beyond=6)),
    'by head': part(fade),
    'some read nothing': all_of(near(3), part(attention_sinks, n=1)),
    'links of a window': all_of(far(9), near(70)),
    'nested': any_of(all_of(near(30), part(strided, stride=2)), part(attention_sinks, n=1)),
}
each = pytest.mark.parametrize('kind', PATTERNS)


def exact(q, k, v, mask, layer=0, sink=None, **ctx):
    "All pairs, one softmax, float64"
    H = q.shape[1]
    G = k.shape[1]
    D = q.shape[3]
    i = torch.arange(q.shape[2])
    seen = dense_mask(mask, i, i, H, layer, **ctx)
    q, k, v = (
        x.double() for x in (q, k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1))
    )
    w = (q @ k.mT / math.sqrt(D)).masked_fill(~seen, -math.inf).exp()
    total = w.sum(-1, keepdim=True) + (0 if sink is None else sink.double()[:, None, None].exp())
    return (w / total.clamp_min(1e-300)) @ v


def grads(f, inputs, g):
    out = f(*inputs)
    return [out, *torch.autograd.grad(out, [x for x in inputs if x is not None], g.to(out.dtype))]


def drawn(B, H, G, T, D, seed=0, sink=False):
    r = rng(seed, 'qkv')
    q, k, v, g = (torch.randn(B, h, T, D, generator=r) for h in (H, G, G, H))
    return [
        *(x.requires_grad_() for x in (q, k, v)),
        torch.randn(H, generator=r).requires_grad_() if sink else None,
    ], g


def agree(plan, inputs, g, tolerance=3e-6, **ctx):
    want = grads(lambda q, k, v, s: exact(q, k, v, plan.mask, plan.layer, s, **ctx), inputs, g)
    got = grads(lambda q, k, v, s: tiled_attention(q, k, v, plan, s), inputs, g)
    for a, b in zip(got, want):
        assert (a - b).abs().max() <= tolerance * max(1, b.abs().max()), (a - b).abs().max()


@each
def test_the_kernel_says_what_all_pairs_say_and_so_do_its_gradients(kind):
    r = random.Random(kind)
    for n in range(cases(6, 2)):
        G = r.choice([1, 2, 3])
        sizes = (
            r.choice([1, 2]),
            G * r.choice([1, 1, 2]),
            G,
            r.choice([1, 2, 4, 8, 15, 16, 33, 64, 100, 130, 257]),
            r.choice([8, 16]),
        )
        plan = Plan(
            PATTERNS[kind],
            sizes[3],
            sizes[1],
            r.randrange(3),
            block=r.choice([None, None, 16, 48, 128]),
        )
        agree(plan, *drawn(*sizes, n, sink=r.random() < 0.4))


@each
def test_the_keys_of_the_plan_are_those_of_the_pattern(kind):
    for T, H, layer in some([(300, 3, 2), (1, 1, 0), (47, 2, 1)], 1):
        i = torch.arange(T)
        plan = Plan(PATTERNS[kind], T, H, layer).make()
        want = dense_mask(PATTERNS[kind], i, i, H, layer).expand(1, H, T, T).sum(-1)
        assert plan.keys().expand(1, H, T).equal(want)
        assert int(want.max()) <= plan.touched  # and never more than it multiplies


@each
def test_nothing_is_read_from_the_future_and_everything_from_the_pattern(kind):
    T, pattern = 60, PATTERNS[kind]
    inputs, _ = drawn(1, 2, 2, T, 8)
    out = tiled_attention(*inputs[:3], Plan(pattern, T, 2))
    seen = dense_mask(pattern, torch.arange(T), torch.arange(T), 2).expand(1, 2, T, T)[0]
    for t in some((31, 0, 7, 59), 2):
        gv = (
            torch.autograd.grad(out[0, :, t].sum(), inputs[2], retain_graph=True)[0][0]
            .abs()
            .sum(-1)
            > 0
        )
        assert gv.equal(seen[:, t])


@pytest.mark.parametrize(
    'kind',
    [
        'window 7',
        'links',
        'sinks',
        'thinned',
        'three',
        'by head',
        'strided',
        'polynomial',
        'powers',
    ],
)
def test_one_plan_says_the_same_to_every_kernel(kind):
    for T, H, G, sink in ((100, 2, 1, False), (300, 2, 2, True)):
        (q, k, v, s), _ = drawn(1, H, G, T, 16, sink=sink)
        plan = Plan(PATTERNS[kind], T, H, 1)
        assert (
            masked_attention(q, k, v, plan.dense_mask(), s) - exact(q, k, v, PATTERNS[kind], 1, s)
        ).abs().max() < 3e-6
        assert plan.flops(16) == 4 * 16 * int(plan.dense_mask().expand(1, H, T, T).sum())
        with torch.no_grad():
            got = flex_kernel(*(x if x is None else x.detach() for x in (q, k, v)), plan, s)
        want = exact(q, k, v, PATTERNS[kind], 1, s)
        assert (got - want).abs().max() < 3e-6
    blocks = block_mask(Plan(near(100), 1024))
    assert blocks.sparsity() > 70  # 64 blocks, of which 15 are read


def test_documents_in_one_row_do_not_read_each_other():
    T, r = 120, rng(0, 'docs')
    docs = (torch.rand(2, T, generator=r) < 0.05).cumsum(1)
    for pattern in (all_of(near(30), part(same_document)), all_of(far(8), part(same_document))):
        inputs, g = drawn(2, 4, 2, T, 8)
        plan = Plan(pattern, T, 4, doc=docs)
        agree(plan, inputs, g, doc=docs)
        one = [x[:1] for x in inputs[:3]] + [None]
        agree(Plan(pattern, T, 4, doc=docs[0]), one, g[:1], doc=docs[0])
        i = torch.arange(T)
        assert (
            plan.make()
            .keys()
            .expand(2, 4, T)
            .equal(dense_mask(pattern, i, i, 4, doc=docs).expand(2, 4, T, T).sum(-1))
        )
        with torch.no_grad():
            got = flex_kernel(*(x.detach() for x in inputs[:3]), Plan(pattern, T, 4, doc=docs))
        assert (got - exact(*inputs[:3], pattern, doc=docs)).abs().max() < 3e-6
    # window and document: as if the second text stood alone
    alone = [x[:, :, docs[0] == 1][:1] for x in inputs[:3]]
    whole = exact(*inputs[:3], all_of(near(30), part(same_document)), doc=docs)[0][:, docs[0] == 1]
    assert (exact(*alone, near(30))[0] - whole).abs().max() < 1e-12


def test_double_precision_and_numerical_derivatives():
    for pattern, sink in ((near(5), True), (far(4, 2), True), (part(strided, stride=4), False)):
        (q, k, v, s), _ = drawn(1, 2, 1, 20, 4, sink=sink)
        plan = Plan(pattern, 20, 2)
        inputs = [x.detach().double().requires_grad_() for x in (q, k, v, s) if x is not None]
        assert torch.autograd.gradcheck(
            lambda q, k, v, s=None: tiled_attention(q, k, v, plan, s), inputs
        )


def test_low_precision_stays_close_and_keeps_its_kind():
    (q, k, v, _), g = drawn(1, 2, 2, 100, 16)
    for kind in (torch.bfloat16, torch.float16):
        got = tiled_attention(*(x.to(kind) for x in (q, k, v)), Plan(far(16), 100, 2))
        assert got.dtype == kind and (got.float() - exact(q, k, v, far(16))).abs().max() < 0.03


def test_long_texts_are_read_in_pieces():
    T = 4500  # several pieces of folds, and a last one that is not full
    (q, k, v, _), g = drawn(1, 2, 1, T, 8)
    for pattern in (near(40), far(33)):
        seen = dense_mask(pattern, torch.arange(T), torch.arange(T), 2)
        want = grads(lambda q, k, v: scaled_dot_product(q, k, v, seen), (q, k, v), g)
        got = grads(lambda q, k, v: tiled_attention(q, k, v, Plan(pattern, T, 2)), (q, k, v), g)
        for a, b in zip(got, want):
            assert (a - b).abs().max() < 1e-5 * max(1, b.abs().max())


@pytest.mark.parametrize('T', [40, 200])
def test_both_ways_know_double_precision_and_queries_that_read_nothing(T):
    for pattern in (near(7), far(9), PATTERNS['some read nothing']):
        (q, k, v, _), g = drawn(1, 2, 2, T, 8)
        inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
        want = grads(lambda q, k, v: exact(q, k, v, pattern), inputs, g.double())
        for a, b in zip(
            grads(lambda q, k, v: sparse_attention(q, k, v, pattern), inputs, g.double()), want
        ):
            assert (a - b).abs().max() < 1e-12


def test_threads_may_share_a_new_plan():
    from concurrent.futures import ThreadPoolExecutor

    (q, k, v, _), _ = drawn(1, 2, 2, 300, 8)
    want = exact(q, k, v, far(16)).float()
    with ThreadPoolExecutor(6) as pool, torch.no_grad():
        for _ in range(10):
            plan = Plan(far(16), 300, 2)
            for out in pool.map(lambda _, plan=plan: tiled_attention(q, k, v, plan), range(6)):
                assert (out - want).abs().max() < 1e-5


def test_compiled_models_know_other_lengths():
    model = shake(models(far(16)))
    torch._dynamo.reset()
    quick = torch.compile(model, backend='eager')  # what the compiler sees; nothing is generated
    for T in (200, 150, 40, 200):
        ids = torch.randint(30, (1, T), generator=rng(T, 'ids'))
        with torch.no_grad():
            assert (quick(ids) - model(ids)).abs().max() < 1e-5
    quick.eval()
    before = torch._dynamo.utils.counters['stats']['unique_graphs']
    for _ in range(6):
        quick(ids)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] - before <= 8
    torch._dynamo.reset()


def test_gauges_are_of_the_texts_that_are_asked_about():
    model = shake(models(far(16))).eval()
    ids = torch.randint(30, (1, 200), generator=rng(1, 'ids'))
    with torch.no_grad():
        model(ids)
        want = model.metrics()
        assert model.metrics() == {}
        assert set(want) == {
            f'attn{l}_{k}' for l in range(3) for k in ('entropy', 'far', 'max_logit', 'collapsed')
        }
        for _ in range(40):
            model(ids)
    assert len(model.blocks[0].attn.noted) == 16 and model.metrics() == pytest.approx(
        want, abs=1e-6
    )
    odd = shake(models(PATTERNS['some read nothing'])).eval()
    with torch.no_grad():
        odd(ids)
    assert all(math.isfinite(x) for x in odd.metrics().values())


def test_a_run_reads_its_gauges_in_validation_only(tmp_path):
    from llm_lab.runs import TrainingRun

    class Here:  # what `validate` asks of a job
        asks = dict(sample_every=1, prompt='a', sample_tokens=30, at_once=None)
        cfg = type('', (), dict(eval=type('', (), asks), train=type('', (), dict(seed=0))))
        ids = torch.randint(29, (500,), generator=rng(0, 'val'))
        starts = answers = None
        texts = dict(tokenizer=TOK, val=None)
        metrics = type('', (), dict(keep=staticmethod(lambda row: None)))

    run = type('', (), dict(step=1, steps=2, notes=[], model=shake(models(far(16))).eval()))
    Here.texts['val'] = type('', (), dict(meta=dict(tokenizer=dict(end=[0])), tokenizer=TOK))
    Here.texts['corpus'] = Corpus('some', dict(val=['a']))
    said = [TrainingRun.validate(Here, run) for _ in range(2)]
    assert said[0] == said[1] and 'attn0_far' in said[0]


def test_the_statistics_are_those_of_the_weights():
    (q, k, _, _), _ = drawn(2, 4, 2, 300, 16)
    i, rows = torch.arange(300), torch.arange(49, 300, 50)
    seen = dense_mask(near(64), rows, i)
    far_keys = rows[:, None] - i >= 32
    with torch.no_grad():
        # values that are the unit vectors: what is read are the weights themselves
        w = scaled_dot_product(q[:, :, rows], k, torch.eye(300).expand(2, 2, -1, -1), seen)
    read = attention_stats(q[:, :, rows], k, seen, far_keys)
    share = -(w * w.clamp_min(1e-30).log()).sum(-1) / seen.sum(-1).log()
    close = dict(atol=1e-5, rtol=0)
    torch.testing.assert_close(read['far'], (w * far_keys).sum(-1).mean((0, 2)), **close)
    torch.testing.assert_close(read['entropy'], share.mean((0, 2)), **close)
    # all alike: the most
    even = attention_stats(torch.zeros(1, 2, 6, 8), k[:1, :, :, :8], seen, seen)
    torch.testing.assert_close(even['entropy'], torch.ones(2), **close)


def test_a_sink_takes_nothing_some_or_all():
    attn = SparseAttention(GPTConfig(d_model=64, n_heads=4), mask=near(64), sink=True).eval()
    i = torch.arange(300)
    seen = dense_mask(near(64), i, i)
    with torch.no_grad():
        attn.sink.copy_(torch.tensor([-99.0, 0.0, 2.0, 99.0]))
        q, k, v = attn.project(torch.randn(1, 300, 64, generator=rng(1, 'x')))
        got = attn.attend_heads(q, k, v, i, i, contiguous=True)
        plain = scaled_dot_product(q, k, v, seen)
        one_more_key = masked_attention(q, k, v, seen, attn.sink)
    close = dict(atol=1e-5, rtol=0)
    torch.testing.assert_close(got[:, 0], plain[:, 0], **close)  # no sink
    torch.testing.assert_close(got[:, 3], torch.zeros_like(plain[:, 3]), **close)  # nothing else
    torch.testing.assert_close(got, one_more_key, **close)


def test_large_scores_do_not_overflow():
    (q, k, v, _), g = drawn(1, 2, 2, 90, 16)
    agree(
        Plan(far(16), 90, 2),
        [(x * s).detach().requires_grad_() for x, s in zip((q, k, v), (9, 9, 1))] + [None],
        g,
        2e-4,
    )


def test_slips_are_seen():
    "Each is a plan that is a little wrong; the tolerance of this file must know it"
    T, pattern = 130, far(16)
    inputs, g = drawn(1, 2, 2, T, 16)

    def wrong(change):
        plan = Plan(pattern, T, 2).make()
        change(plan)
        with pytest.raises(AssertionError):
            agree(plan, inputs, g)

    wrong(lambda p: setattr(p, 'bias', p.bias.roll(1, -1)))
    # the first query of each fold does not read itself
    wrong(lambda p: p.bias[..., 0, -p.block].fill_(-math.inf))
    wrong(lambda p: p.far.fill_(-math.inf))
    wrong(lambda p: setattr(p, 'far', torch.zeros_like(p.far)))  # links that are not there are read
    wrong(lambda p: p.idx[:, 1].copy_(p.idx[:, 0]))  # a head takes the links of another
    wrong(lambda p: p.idx.sub_((p.idx > 20).long()))


# ---- which kernel, and what it does


def test_the_choice_is_told():
    assert choose_kernel(part(causal), 4096) == ('dense', 'the mask may read all of the past')
    assert choose_kernel(near(256), 4096) == (
        'folds',
        '32 folds of 128 queries, 384 keys a query instead of 4,096',
    )
    assert choose_kernel(near(256), 256)[0] == 'dense' and choose_kernel(near(64), 4096, 'mps') == (
        'dense',
        'no sparse kernel for mps',
    )
    assert (
        choose_kernel(near(64), 4096, dropout=0.1)[0] == 'dense'
        and choose_kernel(far(64), 4096, 'cuda')[0] == 'flex'
    )
    assert choose_kernel(part(same_document), 4096)[0] == 'dense' and cover(
        all_of(part(same_document), near(9))
    ) == (
        9,
        [],
    )
    with pytest.raises(LabError, match='nothing to skip'):
        Plan(part(causal), 100)


def test_work_does_not_grow_with_the_text():
    for pattern in (near(256), far(64)):
        assert len({Plan(pattern, T).touched for T in (1024, 4096, 2**16)}) == 1
    assert Plan(near(256), 4096).touched <= 256 + 128 and Plan(far(64), 4096).touched <= 64 + 32 + 6
    assert cover(any_of(near(8), part(causal))) is None  # no dense pattern is called sparse


def models(mask, sparse=True, n_kv=2, steps=(part(QKNorm), part(RoPE)), T=200, sink=False, **kw):
    attn = (
        part(
            SparseAttention,
            n_kv_heads=n_kv,
            transforms=steps,
            mask=mask,
            **dict(sink=sink) if sink else {},
        )
        if sparse
        else part(GQA, n_kv_heads=n_kv, transforms=steps, mask=mask)
    )
    return MiniGPT(llama(30, d_model=32, n_heads=4, n_layers=3, max_len=T, attn=attn, **kw))


MODELS = {k: PATTERNS[k] for k in ('window 7', 'links', 'sinks', 'thinned', 'three', 'polynomial')}


@pytest.mark.parametrize('kind', MODELS)
def test_a_model_is_the_same_with_and_without(kind):
    plain = shake(models(MODELS[kind], False))
    ids = torch.randint(30, (2, 200), generator=rng(1, 'ids'))
    sparse = models(MODELS[kind])
    sparse.load_state_dict(plain.state_dict())
    assert choose_kernel(MODELS[kind], 199)[0] == 'folds'
    for model in (plain, sparse):
        next_token_loss(model, ids).backward()
    big = max(p.grad.abs().max() for p in plain.parameters())
    for a, b in zip(plain.parameters(), sparse.parameters()):
        assert (a.grad - b.grad).abs().max() < 1e-5 * big
    with torch.no_grad():
        a, b = plain(ids), sparse(ids)
        assert (a - b).abs().max() < 1e-5 * a.abs().max()


@pytest.mark.parametrize('sink', [False, True])
@pytest.mark.parametrize('kind', ['window 7', 'links', 'sinks'])
def test_writing_with_a_cache_is_writing_without(kind, sink):
    model = shake(models(PATTERNS[kind], sink=sink)).eval()
    ids = torch.randint(30, (1, 150), generator=rng(2, 'ids'))
    assert lookback(PATTERNS[kind]) == (7 if kind == 'window 7' else None)
    with torch.no_grad():
        want = model(ids)
    for pieces in ([140, 1, 1, 1, 1, 6], [1] * 20 + [130], [150]):
        reader = DecodingState(with_kv_cache(model), 150)
        got = torch.cat([reader(piece)[:, None] for piece in ids.split(pieces, 1)], 1)
        ends = torch.tensor(pieces).cumsum(0) - 1
        assert (got - want[:, ends]).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize('kind', ['window 7', 'links', 'sinks'])
def test_a_map_leaves_out_what_the_sink_takes(kind):
    model = shake(models(PATTERNS[kind], sink=True))
    ids = torch.randint(30, (60,), generator=rng(4, 'ids'))
    notes, i = [], torch.arange(60)
    for b in model.blocks:
        b.attn.sink.data.copy_(torch.tensor([-30.0, -1.0, 1.0, 3.0]))
    maps = attention_maps(model, ids).double()
    with (
        intervene(
            model, lambda attn, q, k, v, *at, **ctx: notes.append((attn, q, k)) or (q, k, v, *at)
        ),
        torch.no_grad(),
    ):
        model(ids[None])
    for weights, (attn, q, k) in zip(maps, notes, strict=True):
        scores = (q[0].double() @ k[0].repeat_interleave(2, 0).double().mT) / 8**0.5
        seen = dense_mask(PATTERNS[kind], i, i, 4, attn.layer).expand(1, 4, 60, 60)[0]
        taken = (attn.sink[:, None] - scores.masked_fill(~seen, -math.inf).logsumexp(-1)).sigmoid()
        assert (
            ((1 - weights.sum(-1)) - taken).abs().max() < 1e-6
            and taken[0].max() < 1e-6
            and taken[3].min() > 0.1
        )
    for b in model.blocks:
        b.attn.sink.data.fill_(-math.inf)  # nothing is taken
    assert (attention_maps(model, ids).sum(-1) - 1).abs().max() < 1e-6


def test_plans_are_kept_by_layer_and_length():
    a = get_plan(far(16), 200, 2, 0)
    b = get_plan(far(16), 200, 2, 1)
    assert a is get_plan(far(16), 200, 2, 0) and not a.idx.equal(b.idx) and a.bias is b.bias


def test_gradient_checkpointing_counting_and_files(tmp_path):
    model = shake(models(far(16)))
    ids = torch.randint(30, (2, 200), generator=rng(3, 'ids'))
    next_token_loss(model, ids).backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    next_token_loss(apply_activation_checkpointing(model), ids).backward()
    for a, p in zip(want, model.parameters()):
        assert a.equal(p.grad)
    save(tmp_path / 'm', model, TOK, {})
    with torch.no_grad():
        assert load(tmp_path / 'm').model(ids[:, :-1]).equal(model.eval()(ids[:, :-1]))
    assert str(config_from(to_data(model.cfg))) == str(model.cfg)


def test_operations_are_counted_as_they_are_done():
    from torch._subclasses.fake_tensor import FakeTensorMode

    def count(pattern, T):
        with FakeTensorMode():
            model = models(pattern, n_kv=4, T=T)
            ids = torch.zeros(1, T, dtype=torch.int64)
            return flops(lambda: model(ids))

    a, b = count(near(64), 1024), count(near(64), 2048)
    assert 1.9 < b / a < 2.1  # and not four times as many
    # 3 layers, 4·T·keys·C
    assert (
        count(part(causal), 2048) - b == 3 * 4 * 2048 * (2048 - Plan(near(64), 2048).touched) * 32
    )
    # real numbers stay real
    assert get_plan(near(64), 1024, 4, 0).keys()[0, 0].equal(torch.arange(1, 1025).clamp_max(64))


def test_layers_take_turns():
    kinds = part(SparseAttention, mask=near(8)), part(GQA, n_kv_heads=2)
    cfg = llama(30, d_model=32, n_heads=4, n_layers=5, max_len=64, attn=part(alternate, of=kinds))
    model = MiniGPT(cfg)
    assert [type(b.attn).__name__ for b in model.blocks] == ['SparseAttention', 'GQA'] * 2 + [
        'SparseAttention'
    ]
    assert all(
        len(b.attn.transforms) == 1 and b.attn.qkv.bias is None for b in model.blocks
    ) and str(config_from(to_data(cfg))) == str(cfg)
    ids = torch.randint(30, (1, 12), generator=rng(0, 'ids'))
    plain = torch.cat(list(generate(shake(model).eval(), ids, 40, temperature=0)))
    kept = with_kv_cache(model)
    assert [c.length for c in kept.cache(1, 64).values()] == [8, 64, 8, 64, 8]
    assert torch.cat(list(generate(kept, ids, 40, temperature=0))).equal(plain)
    for bad in ((), ('x',)):
        with pytest.raises(LabError, match='give recipes'):
            GPTConfig(attn=part(alternate, of=bad))


def test_wrong_recipes_are_told():
    wrong = {
        'size=0': near(0),
        'n=0': part(attention_sinks, n=0),
        'stride=1.5': part(strided, stride=1.5),
        'degree=0': part(expander_links, degree=0),
        'beyond=0': part(expander_links, beyond=0),
        'beyond=-1': part(power_links, beyond=-1),
        'degree=-1': part(polynomial_links, degree=-1),
        r'of=\(\)': part(or_masks, of=()),
        'of=part': part(or_masks, of=near(3)),
        'stride=None': part(strided),
        'mask=None': None,
        'off': part(and_masks, off=(near(3),)),
        'layers': part(or_masks, of=(near(3),), layers=3),
    }
    for said, recipe in wrong.items():
        with pytest.raises(LabError, match=said):
            GPTConfig(attn=part(SparseAttention, mask=recipe))
    with pytest.raises(LabError, match='n_kv_heads=3'):
        GPTConfig(attn=part(SparseAttention, mask=near(3), n_kv_heads=3))
    model = MiniGPT(
        GPTConfig(attn=part(SparseAttention, mask=all_of(near(8), part(same_document))))
    )
    with pytest.raises(LabError, match="needs the keyword 'doc'"):
        model(torch.zeros(1, 9, dtype=torch.int64))
    assert kv_heads(GPTConfig(attn=part(SparseAttention, mask=near(3), n_kv_heads=2))) == 2


def test_a_window_is_no_shorter_road_than_it_was():
    """`inference`'s fast form knows SparseAttention by a window, and refuses to cut corners with
    sinks"""
    from llm_lab.inference import for_inference

    ids = torch.randint(30, (1, 20), generator=rng(0, 'ids'))
    for sink, simple in ((False, True), (True, False)):
        model = shake(models(near(7), sink=sink)).eval()
        quick = for_inference(model)
        assert quick.simple == simple
        assert torch.cat(list(generate(quick, ids, 60, temperature=0))).equal(
            torch.cat(list(generate(model, ids, 60, temperature=0)))
        )
