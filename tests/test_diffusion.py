"""Text diffusion. The oracles: every order of filling in blanks, enumerated; the mask, written with
loops; a model read block by block; each text scored alone."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from answers import diffusion as answers

import llm_lab as lab
from helpers import near, one_line, shaken
from llm_lab.batching import BatchStream
from llm_lab.core import check, rng
from llm_lab.diffusion import (
    RateBlock,
    WritingOrder,
    block_causal,
    diffusion_llama,
    fill_blanks,
    infill,
    make_blanks,
    mask_rate,
    row_noise,
    spread_noise,
)
from llm_lab.efficient import StepRunner
from llm_lab.kv_cache import with_kv_cache
from llm_lab.parts import part
from llm_lab.sampling import generate, next_logits
from llm_lab.train import loss_and_feed, spans, token_losses

pytestmark = pytest.mark.usefixtures('one_thread')
SIZES = [None, 1, 3, 4]  # tokens of a block; None: the whole text
SMALL = dict(d_model=16, n_layers=1, n_heads=2)


def model_of(block_size, vocab_size=7, seed=0, by=0.4, **more):
    size = dict(d_model=16, n_layers=2, n_heads=2, max_len=12) | more
    return shaken(diffusion_llama(vocab_size, block_size, **size), seed, by)


def some_ids(B=3, S=13, vocab_size=7, seed=0):
    return torch.randint(vocab_size, (B, S), generator=rng(seed, 'ids'))


def all_unknown(ids):
    unknown = torch.ones_like(ids, dtype=torch.bool)
    unknown[:, 0] = False
    return unknown


# ---- the mask


@pytest.mark.parametrize('size', SIZES)
def test_the_mask_is_that_of_the_loops(size):
    S = 11
    block = [-1] + [(t - 1) // (size or S) for t in range(1, S)]
    i = torch.arange(S).repeat(2)
    noisy = torch.arange(2 * S) >= S
    found = block_causal(i[:, None], i, size, noisy=noisy)
    plain = block_causal(i[:S, None], i[:S], size)
    for q in range(2 * S):
        for k in range(2 * S):
            own, other = block[q % S], block[k % S]
            if k >= S:  # a column with blanks: read from the same block of that copy
                want = q >= S and own == other
            else:
                want = other < own if q >= S else other <= own
            assert found[q, k] == want, (q, k)
            if q < S and k < S:
                assert plain[q, k] == want


@pytest.mark.parametrize('size', SIZES)
def test_two_copies_at_once_are_the_blocks_one_by_one(size):
    model = model_of(size)
    ids = some_ids()
    blanks = make_blanks(ids, all_unknown(ids), torch.arange(3), 7, size).ids
    both = model.objective.logits(model, ids, blanks)
    step = size or 12
    for begin in range(1, 13, step):
        end = min(begin + step, 13)
        alone = model(torch.cat([ids[:, :begin], blanks[:, begin:end]], 1), last=end - begin)
        near(alone, both[:, begin:end], 1e-4)


# ---- the noise


def test_noise_belongs_to_its_row():
    numbers = torch.tensor([5, 1 << 45, 7])
    whole = row_noise(numbers, 9)
    for n, number in enumerate(numbers):
        assert torch.equal(row_noise(number[None], 9)[0], whole[n])
    many = row_noise(torch.arange(20_000), 4)
    assert 0 <= many.min() and many.max() < 1
    # uniform, by ten bins of 8,000: χ² with 9 degrees of freedom is above 33 once in 10⁴
    counts = torch.histc(many, 10, 0, 1)
    assert ((counts - 8000) ** 2 / 8000).sum() < 33
    assert torch.corrcoef(many.T).fill_diagonal_(0).abs().max() < 0.04
    # even: the largest gap of n numbers is at most a few n-ths, and of random ones about ln n
    for even in (spread_noise(torch.arange(1000, 2000)), spread_noise(numbers[:1], 1000)):
        assert even.flatten().sort().values.diff().max() < 3 / 1000


@pytest.mark.parametrize('size', SIZES)
def test_each_blank_weighs_so_that_each_token_counts_once(size):
    "E[weight] = 1 for each unknown token; others are never blank"
    S = 13
    n = 30_000
    ids = torch.zeros(1, S, dtype=torch.int64).expand(n, S)
    unknown = torch.ones(S, dtype=torch.bool)
    unknown[[0, 5, 6]] = False
    found = make_blanks(ids, unknown.expand(n, S), torch.arange(n), 7, size)
    assert not found.blank[:, ~unknown].any()
    assert torch.equal(found.ids == 7, found.blank) and torch.equal(found.weight > 0, found.blank)
    mean = found.weight.mean(0)
    error = found.weight.std(0) / n**0.5
    assert ((mean - unknown.float()).abs() <= 4.5 * error + 1e-6).all()
    # in every row and block the weights of the blanks add up to the number of unknown tokens
    for begin in range(1, S, size or S):
        block = slice(begin, min(begin + (size or S), S))
        want = unknown[block].sum().float().expand(n)
        near(found.weight[:, block].sum(1), want)


def orders_bound(model, ids, mask_id, block):
    "−E over all orders of Σ ln P(token | those before it in the order), of one text (S,), by hand"
    total = 0.0
    orders = [*itertools.permutations(block)]
    for order in orders:
        x = ids.clone()
        x[list(block)] = mask_id
        for t in order:
            logits = model(x[None, : max(block) + 1])[0]
            total -= logits.log_softmax(-1)[t, ids[t]].item()
            x[t] = ids[t]
    return total / len(orders)


@pytest.mark.parametrize('size', [None, 1, 2])
def test_the_bound_is_the_mean_over_all_orders(size):
    "(Uria et al. 2014; Hoogeboom et al. 2022): diffusion is an autoregressive model of any order"
    model = model_of(size, vocab_size=3, max_len=4)
    ids = some_ids(1, 5, 3)[0]
    want = 0.0
    for begin in range(1, 5, size or 4):
        want += orders_bound(model, ids, 3, range(begin, min(begin + (size or 4), 5)))
    n = 40_000
    many = ids[None].expand(n, 5)
    with torch.no_grad():
        cost = model.objective.costs(model, many, all_unknown(many), torch.arange(n)).sum(1)
    error = cost.std() / n**0.5
    assert abs(cost.mean() - want) <= 4 * error + 1e-4, (cost.mean(), want, error)
    assert size != 1 or error < 1e-5  # one order only: nothing is drawn


def test_the_schedule_does_not_matter():
    """With a share r of blanks at time t, each token blank by itself, a text of n tokens has the
    weight ∫ r'/r · r^m (1 − r)^(n − m) dt for each set of m blanks, which is 1/(m · C(n, m)),
    whatever r is"""
    n = 6
    t = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    for name in ('log_linear', 'cosine', 'linear'):
        r = torch.as_tensor(mask_rate(t, name), dtype=torch.float64)
        assert r[0] == 0 and abs(r[-1] - 1) < 1e-6 and (r.diff() > 0).all()
        middle = (r[1:] + r[:-1]) / 2
        for m in range(1, n + 1):
            weight = (r.diff() / middle * middle**m * (1 - middle) ** (n - m)).sum()
            assert weight == pytest.approx(1 / (m * math.comb(n, m)), rel=1e-4), (name, m)
    one_line(lambda: mask_rate(0.5, 'sine'), "schedule='sine'", 'log_linear')


# ---- training


@pytest.mark.parametrize('size', SIZES)
def test_a_batch_in_parts_or_over_processes_is_the_batch(size):
    ids = some_ids(1, 400)[0]
    model = model_of(size).train()
    grads = []
    for shares, parts in ((1, 1), (1, 3), (2, 1)):
        total = 0
        for rank in range(shares):
            stream = BatchStream(ids, 6, 12, seed=1, rank=rank, world_size=shares)
            loss_fn, feed = loss_and_feed(model, stream)
            for fed in feed(stream(2), 2).chunk(parts):
                value = loss_fn(model, fed) / (shares * parts)
                value.backward()
                total += value.item()
        grads.append((total, torch.cat([p.grad.flatten() for p in model.parameters()])))
        model.zero_grad()
    for total, grad in grads[1:]:
        assert total == pytest.approx(grads[0][0], rel=1e-5)
        near(grad, grads[0][1], 1e-4)


def test_the_gradient_is_that_of_the_bound():
    "Central differences along a random direction, in float64"
    model = model_of(4).double()
    ids = some_ids()
    number = torch.arange(3)
    loss = model.objective.loss(model, ids, number)
    loss.backward()
    weights = [*model.parameters()]
    way = [torch.randn(p.shape, dtype=torch.float64, generator=rng(0, 'way')) for p in weights]
    along = sum((p.grad * w).sum().item() for p, w in zip(weights, way))
    values = []
    with torch.no_grad():
        for by in (1e-4, -2e-4):
            for p, w in zip(weights, way):
                p += by * w
            values.append(model.objective.loss(model, ids, number).item())
    # the cross-entropy is taken in float32
    assert (values[0] - values[1]) / 2e-4 == pytest.approx(along, rel=2e-2)


def test_it_learns_and_a_step_runner_does_the_same():
    ids = torch.tensor([0, 1, 2, 3, 4, 5] * 100)
    runs = []
    for step_fn in (lab.train_step, StepRunner(accumulate=2)):
        model = lab.MiniGPT(diffusion_llama(7, d_model=32, n_layers=1, n_heads=2, max_len=12))
        state = lab.fit(model, BatchStream(ids, 8, 12), steps=80, step_fn=step_fn)
        runs.append(state.losses)
    assert runs[0][-1] < 0.5 * runs[0][0]
    near(torch.tensor(runs[0][:5]), torch.tensor(runs[1][:5]), 1e-3)


def test_a_block_can_be_told_how_much_is_blank():
    cfg = diffusion_llama(
        7, 4, d_model=16, n_layers=1, n_heads=2, max_len=12, block=part(RateBlock)
    )
    model = shaken(cfg)
    ids = some_ids()
    number = torch.arange(3)
    told = model.objective.loss(model, ids, number)
    for block in model.blocks:
        block.time.weight.data.zero_()
    assert abs(model.objective.loss(model, ids, number) - told) > 1e-4
    x = ids.clone()
    x[:, 6:] = 7
    for kept in (shaken(cfg), with_kv_cache(shaken(cfg))):
        assert (fill_blanks(kept, x) != 7).all()


# ---- scores


@pytest.mark.parametrize('size', SIZES)
def test_texts_of_other_lengths_beside_it_change_no_score(size):
    model = model_of(size)
    ids = some_ids(1, 60)[0]
    windows = torch.cat([spans(60, 12, starts=[0, 5, 9, 33]), torch.tensor([[40, 45, 50]])])
    both = token_losses(model, ids, windows[:-1], batch_size=4)
    again = token_losses(model, ids, windows[:-1], batch_size=1)
    near(both.nan_to_num(), again.nan_to_num(), 1e-4)
    assert both[1:].isfinite().all() and both[0].isnan()
    # tokens that are only read are never blank
    part_of = token_losses(model, ids, windows[-1:])
    assert part_of.isfinite().nonzero()[:, 0].tolist() == [*range(45, 50)]


def test_it_says_what_is_a_bound():
    tok = lab.CharTokenizer('abcdef\n')
    corpus = lab.Corpus('c', dict(val='abc\n\ndef\n\nfab' * 9), independent=False)
    for size, bound in ((None, True), (3, True), (1, False)):
        score = lab.evaluate(model_of(size), tok, corpus)
        assert score.is_bound is bound and str(score).startswith('at most') is bound
        assert score.as_dict()['is_bound'] is bound


# ---- writing

ORDERS = [
    WritingOrder(order, steps, schedule)
    for order in ('ancestral', 'confident')
    for steps in (None, 1, 3, 50)
    for schedule in ('log_linear', 'cosine', 'linear')
]


@pytest.mark.parametrize('size', SIZES)
def test_what_is_given_stays_and_no_blank_is_left(size):
    model = model_of(size)
    ids = some_ids()
    holes = torch.rand(ids.shape, generator=rng(1, 'holes')) < 0.6
    holes[:, 0] = False
    x = ids.masked_fill(holes, 7)
    before = x.clone()
    for order in ORDERS:
        steps = []
        found = fill_blanks(
            model, x, order.steps, order.order, order.schedule, watch=lambda *a: steps.append(a)
        )
        assert torch.equal(x, before)  # the text that was given is not written into
        assert torch.equal(found[~holes], ids[~holes])
        assert (found < 7).all()
        if size is None:
            most = order.steps or int(holes.sum(1).max())
            assert len(steps) <= most
    assert not torch.equal(fill_blanks(model, x, seed=1), fill_blanks(model, x, seed=2))
    assert torch.equal(fill_blanks(model, x, seed=1), fill_blanks(model, x, seed=1))


@pytest.mark.parametrize('size', [1, 3, 4])
def test_with_a_cache_it_writes_the_same(size):
    model = model_of(size)
    kept = with_kv_cache(model)
    ids = some_ids()
    for prompt in (1, 2, 5, 12):
        for n in (1, 7, 30):  # 30: longer than the model reads
            a = torch.stack([*generate(model, ids[:, :prompt], n, seed=3)], 1)
            b = torch.stack([*generate(kept, ids[:, :prompt], n, seed=3)], 1)
            assert a.shape == (3, n) and torch.equal(a, b) and a.max() < 7


def chi_square(counts, p, n):
    "χ² of counts of outcomes against their probabilities, and how much is too much: once in 10⁴"
    seen = sum((counts[x] - n * q) ** 2 / (n * q) for x, q in p.items())
    k = len(p) - 1
    return seen, k + 3.9 * (2 * k) ** 0.5 + 10  # a normal approximation, on the safe side


def write_many(model, n, T, seed=0, **how):
    x = torch.full((n, T + 1), model.objective.mask_id)
    x[:, 0] = 0
    return Counter(map(tuple, fill_blanks(model, x, seed=seed, **how)[:, 1:].tolist()))


def exact(model, T, orders):
    "{text: probability} of writing one token at a time, in each of the orders equally often"
    V = model.cfg.vocab_size
    mask_id = model.objective.mask_id
    size = model.objective.block_size or T
    p = {}
    for text in itertools.product(range(V), repeat=T):
        total = 0.0
        for order in orders:
            x = torch.full((1, T + 1), mask_id)
            x[0, 0] = 0
            chance = 1.0
            for t in order:
                end = min(T + 1, (t // size + 1) * size + 1)  # of its block
                chance *= model(x[:, :end])[0, t + 1].softmax(-1)[text[t]].item()
                x[0, t + 1] = text[t]
            total += chance / len(orders)
        p[text] = total
    return p


def test_blocks_of_one_token_are_the_autoregressive_sampler():
    model = model_of(1, vocab_size=3, max_len=4, by=0.6)
    n = 20_000
    with torch.no_grad():
        p = exact(model, 3, [(0, 1, 2)])
    assert sum(p.values()) == pytest.approx(1, abs=1e-4)
    seen, most = chi_square(write_many(model, n, 3), p, n)
    assert seen < most


def test_one_token_a_step_is_ancestral_sampling():
    "In any order, equally often; and many steps come near it, whatever the schedule"
    model = model_of(None, vocab_size=3, max_len=4, by=0.6)
    n = 3_000
    with torch.no_grad():
        p = exact(model, 3, [*itertools.permutations(range(3))])
        left_to_right = exact(model, 3, [(0, 1, 2)])
    for how in (dict(), dict(steps=80), dict(steps=80, schedule='cosine')):
        counts = write_many(model, n, 3, **how)
        seen, most = chi_square(counts, p, n)
        assert seen < most, how
        assert chi_square(counts, left_to_right, n)[0] > 2 * most  # the test can tell
    # in one step all tokens are drawn on their own, which is another distribution
    assert chi_square(write_many(model, n, 3, steps=1), p, n)[0] > 2 * most


def test_the_likeliest_comes_first():
    model = model_of(None)
    x = some_ids(2, 9).clone()
    x[:, 3:] = 7
    steps = []
    fill_blanks(model, x, order='confident', temperature=0, watch=lambda *a: steps.append(a))
    assert all((new.sum(1) == 1).all() for _, new, *_ in steps)
    new = steps[0][1]
    p = model(x).softmax(-1)[:, :, :7].max(-1).values[:, 1:]
    p[:, :2] = 0  # given
    assert torch.equal(new.int().argmax(1), p.argmax(1))


def test_the_next_token_is_that_of_the_block():
    ids = some_ids(2, 6)
    for size in SIZES:
        model = model_of(size)
        end = 13 if size is None else 6 + size - 5 % size
        x = torch.cat([ids, ids.new_full((2, end - 6), 7)], 1)
        near(next_logits(model, ids), model(x)[:, 6], 1e-4)


def test_blanks_between_two_texts():
    tok = lab.CharTokenizer('abcdef\n')
    model = model_of(None)
    found = infill(model, tok, 'abc', 'fed', 4, seed=1)
    assert len(found) == 4 and found == infill(model, tok, 'abc', 'fed', 4, seed=1)
    assert lab.sample(model, tok, 'abc', 5).startswith('abc')
    one_line(lambda: infill(model, tok, 'abc', 'fed', 40), 'a text of 47', '13 at most')
    usual = lab.MiniGPT(lab.llama(7, d_model=16, n_layers=1, n_heads=2))
    one_line(lambda: infill(usual, tok, 'abc'), 'predicts the next token', 'diffusion_llama')


def test_what_does_not_go_together_is_one_line():
    small = dict(d_model=16, n_layers=1, n_heads=2)
    objective = part(lab.MaskedDiffusion)
    one_line(lambda: lab.llama(7, objective=objective, **small), 'mask=part(block_causal)')
    blocks = part(lab.Attention, mask=part(block_causal, size=3))
    one_line(lambda: lab.llama(7, attn=blocks, objective=objective, **small), 'block_causal')
    whole = part(lab.Attention, mask=part(block_causal))
    learned = dict(attn=whole, objective=objective, **small)
    one_line(lambda: lab.GPTConfig(7, **learned), 'pos=part(LearnedPositions)', 'RoPE')
    one_line(lambda: diffusion_llama(7, block_size=0, **small), 'block_size=0')
    one_line(lambda: diffusion_llama(7, draws=0, **small), 'draws=0')
    one_line(lambda: lab.MiniGPT(diffusion_llama(7, tie=True, **small)), 'tie=True')
    model = model_of(None)
    blank_first = torch.full((1, 4), 7)
    one_line(lambda: fill_blanks(model, blank_first), 'the first token')
    one_line(lambda: fill_blanks(model, some_ids(), order='left'), "order='left'", 'ancestral')
    one_line(lambda: fill_blanks(model, some_ids(), steps=0), 'steps=0')


def test_a_config_says_what_the_function_says(home):
    from llm_lab.config import config_from_dict
    from llm_lab.runs import model_config

    for size in (None, 4):
        blocks = {} if size is None else dict(block_size=size)
        model = dict(preset='diffusion_llama', d_model=16, n_layers=1, n_heads=2)
        if blocks:
            model['objective'] = dict(part='MaskedDiffusion', **blocks)
        cfg = config_from_dict(dict(model=model, data=dict(length=12)))
        assert model_config(cfg, 7) == diffusion_llama(7, size, max_len=12, **SMALL)


def test_a_run_of_it_goes_on_bit_for_bit_and_says_what_is_a_bound(home):
    from llm_lab.runs import train_run

    little = [
        'model.preset=diffusion_llama',
        'model.objective={part: MaskedDiffusion, block_size: 4}',
        'data.length=12',
        'model.d_model=16',
        'model.n_layers=1',
        'eval.sample_tokens=4',
        'train.schedule=constant',
        'train.threads=1',
        'eval.every=4',
        'eval.tokens=64',
        'log.checkpoint_every=2',
    ]
    whole = train_run('smoke', *little, 'train.steps=8', run='whole')
    train_run('smoke', *little, 'train.steps=4', run='a')
    went_on = train_run(None, 'train.steps=8', resume='experiments/smoke/runs/a')
    for a, b in zip(whole.run.model.parameters(), went_on.run.model.parameters()):
        assert torch.equal(a, b)
    assert whole.result['scores']['val']['is_bound']
    table = repr(lab.compare({'whole': whole.folder}))
    assert '≤ ' in table and 'upper bound' in table


def test_the_playground_writes_with_it():
    from llm_lab.play import Playground, _still

    tok = lab.CharTokenizer('abcdef\n')
    model = model_of(3)
    assert 'next' in _still(model, tok, 'abc')
    board = Playground(model, tok, 'abc')
    board.write(board.halt, 'abc', 6, 0, temperature=1.0)
    assert len(board.pieces) == 6 and 'done: 6 tokens' in board.status.value


# ---- the exercises


def cell(beginning):
    "The one code cell of the notebook that begins so"
    notebook = Path(__file__).parent.parent / 'nbs' / '61_diffusion.ipynb'
    cells = [''.join(c['source']) for c in json.loads(notebook.read_text('utf-8'))['cells']]
    (found,) = [c for c in cells if c.startswith(beginning)]
    return found


def verdict(answer):
    "What the notebook's own check says of it"
    space = dict(itertools=itertools, torch=torch, rng=rng, check=check)
    exec(cell('def bound_by_sets'), space)
    return check(answer, space['bound_by_orders'], *space['cases'])


@pytest.mark.parametrize('answer', answers.RIGHT)
def test_the_answer_to_the_first_exercise_is_right(answer):
    assert verdict(answer) == f'{answer.__name__}: right on 5 cases'


@pytest.mark.parametrize('answer', answers.WRONG)
def test_a_wrong_answer_to_it_gets_a_counter_example(answer):
    assert 'expected' in verdict(answer)


def test_the_answer_to_the_second_exercise_is_the_best_of_all_guesses():
    "Every story with words 1 and 10 blank: of each rest, the first name that fits most often"
    space = dict(itertools=itertools)
    exec(cell('NAMES = ').partition('WORDS = ')[0], space)
    stories = space['STORIES']
    fits = {}
    for words in stories:
        assert words[0] == words[9]  # counted from 1 in the notebook, whose rows begin with an end
        rest = tuple(words[1:9] + words[10:])
        fits.setdefault(rest, Counter())[words[0]] += 1
    best = sum(max(counter.values()) for counter in fits.values()) / len(stories)
    for answer in answers.RIGHT_SHARES:
        assert answer(space['NAMES']) == pytest.approx(best)
    for answer in answers.WRONG_SHARES:
        assert abs(answer(space['NAMES']) - best) > 0.01
