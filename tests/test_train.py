"""What the loop promises and its notebook does not show: auxiliary losses and hooks, gradients that
are not finite, a real interrupt, wrong arguments, and that no step waits for a number."""

import math
import re
import signal
import sys
import warnings
from dataclasses import replace
from functools import partial

import matplotlib
import numpy as np
import pytest
import torch
from answers import train as answers
from fastcore.test import test_close as close
from fastcore.test import test_eq as equal
from helpers import cells_of, exercise_tests
from torch.utils._python_dispatch import TorchDispatchMode

import llm_lab.files
from llm_lab import train as chapter
from llm_lab.bpe import BPETokenizer
from llm_lab.chars import CharTokenizer
from llm_lab.core import LabError, check, rng
from llm_lab.corpora import Corpus, load_corpus
from llm_lab.gpt import MLP, GPTConfig, MiniGPT
from llm_lab.hardware import flops, keep_freed_memory
from llm_lab.parts import part
from llm_lab.positions import SinusoidalPositions
from llm_lab.train import (
    TrainState,
    _due_callbacks,
    adamw,
    batches,
    document_starts,
    fit,
    mean_loss,
    moving_average,
    next_token_loss,
    plot_loss,
    random_crops,
    read_split,
    spans,
    train_step,
    warmup_cosine,
    warmup_steps,
    windows_at_once,
)

pytestmark = pytest.mark.usefixtures('one_thread')
TALES = load_corpus('tiny_tales')
TEXT = TALES.text('val')[:20_000]
TOK = CharTokenizer.train(TEXT)
SOME = replace(TALES, splits=dict(train=TALES.documents('val')[:50]))
IDS = torch.tensor(TOK.encode(TEXT))
SMALL = GPTConfig(vocab_size=TOK.vocab_size, d_model=64, n_layers=2, n_heads=4, max_len=64)
BATCH = random_crops(IDS, 8, 64, seed=1)


def weights_of(model):
    return {name: p.tolist() for name, p in model.named_parameters()}


def refuses(f, words):
    with pytest.raises(LabError, match=re.escape(words)):
        f()


# ---- evaluation


def test_how_many_windows_fit_into_memory():
    gpt2 = GPTConfig(vocab_size=50_257, d_model=768, n_layers=1, n_heads=12, max_len=1024)
    with torch.device('meta'):
        shapes = MiniGPT(gpt2)
    shapes.parameters = lambda: iter([torch.zeros(1)])  # only the sizes are looked at
    assert [windows_at_once(shapes, T) for T in (8, 128, 1024)] == [64, 8, 1]
    assert windows_at_once(MiniGPT(SMALL), 64) == 64
    refuses(
        lambda: windows_at_once(shapes, 10**12),
        'a window of 1,000,000,000,000 tokens, 50,257 numbers',
    )


def test_the_loss_does_not_depend_on_how_many_windows_are_read_together():
    model = MiniGPT(SMALL)
    text = IDS[:3000]
    losses = [mean_loss(model, text, batch_size=b) for b in (None, 1, 7, 47)]
    close(losses, losses[:1] * 4, eps=1e-6)
    refuses(lambda: mean_loss(model, IDS[:1]), 'a text of 1 tokens has no next token')


@torch.no_grad()
@pytest.mark.parametrize('n', [2, 64, 65, 66, 129, 150])
def test_the_loss_of_a_text_is_that_of_its_positions_one_by_one(n):
    model = MiniGPT(SMALL)
    total = 0.0
    for t in range(1, n):
        start = (t - 1) // 64 * 64
        total -= model(IDS[None, start:t]).log_softmax(-1)[0, -1, IDS[t]].item()
    close(mean_loss(model, IDS[:n], batch_size=2), total / (n - 1), eps=1e-5)


@torch.no_grad()
def test_the_loss_of_documents_is_that_of_their_positions_one_by_one():
    model = MiniGPT(SMALL)
    starts = [3, 10, 90, 91, 140]
    total = 0.0
    for t in range(4, 150):
        start = max(s for s in starts if s < t)
        start += (t - 1 - start) // 64 * 64
        total -= model(IDS[None, start:t]).log_softmax(-1)[0, -1, IDS[t]].item()
    close(mean_loss(model, IDS[:150], batch_size=3, starts=starts), total / 146, eps=1e-5)


@pytest.mark.parametrize('case', [(2, 5, None), (50, 7, None), (50, 7, [0, 3, 20, 21, 40])])
def test_spans_score_every_token_but_the_first_once(case):
    scored = torch.cat([torch.arange(first, end) for _, first, end in spans(*case)])
    equal(scored, torch.arange(1, case[0]))


def test_spans_leave_nothing_over():
    equal(spans(7, 3), [[0, 1, 4], [3, 4, 7]])


# ---- batches and schedule


def test_random_crops_are_pieces_of_the_text_by_seed_and_step():
    equal(BATCH(7), random_crops(IDS, 8, 64, seed=1)(7))
    assert not BATCH(7).equal(BATCH(8))
    assert not BATCH(7).equal(random_crops(IDS, 8, 64, seed=2)(7))
    assert all(TOK.decode(row.tolist()) in TEXT for row in BATCH(0))


MARK = TOK.encode(TALES.separator)


def test_rows_may_begin_where_documents_do():
    starts = document_starts(IDS, MARK)
    texts = TEXT.split(TALES.separator)
    equal(len(starts), len(texts) - 1)  # the first document has no mark before it
    rows = random_crops(IDS, 8, 64, starts=starts)(0)
    spec = {TEXT[s + 1 :][:64] for s in starts.tolist()}
    assert all(TOK.decode(row[1:].tolist()) in spec for row in rows)


def test_rows_from_the_start_of_a_document_teach_more_than_rows_from_anywhere():
    text = TALES.text('train')[:1_000_000]
    tok = CharTokenizer.train(text + TEXT)
    mark = tok.encode(TALES.separator)
    train_ids = torch.tensor(tok.encode(text))
    ids = torch.tensor(tok.encode(TEXT))
    starts = document_starts(train_ids, mark)
    begins = document_starts(ids, mark)
    cfg = replace(SMALL, vocab_size=tok.vocab_size, n_layers=1, max_len=288)

    def loss_of_rows_from(starts):
        "The better of reading on, and document by document"
        model = MiniGPT(cfg)
        fit(model, random_crops(train_ids, 4, 288, starts=starts), 150, lr=8e-3)
        return min(mean_loss(model, ids), mean_loss(model, ids, starts=begins))

    assert loss_of_rows_from(starts) < 0.95 * loss_of_rows_from(None)


def test_the_schedule_never_rises_again_and_may_end_above_zero():
    factors = [warmup_cosine(step, 1000) for step in range(1000)]
    assert all(a > b for a, b in zip(factors[100:], factors[101:]))
    assert factors[-1] < 1e-5
    slow = [warmup_cosine(step, 1000, warmup=500, end=0.1) for step in range(1000)]
    close([slow[249], slow[499], slow[750]], [0.5, 1.0, 0.55])
    close(slow[-1], 0.1, eps=1e-4)


def test_a_text_of_one_window_and_a_shorter_one():
    equal(random_crops(IDS[:9], 2, 8)(0)[1], IDS[:9])
    refuses(lambda: random_crops(IDS[:8], 2, 8), 'the text has 8 tokens, a window needs 9')


def test_warmup_is_as_long_as_it_is_said_to_be():
    lengths = [warmup_steps(1000), warmup_steps(50), warmup_steps(50, 40), warmup_steps(50, 0)]
    assert lengths == [100, 5, 40, 0]


# ---- one step


def test_the_first_step_of_adamw_is_its_rate_times_the_sign_and_only_matrices_decay():
    model = MiniGPT(SMALL)
    next_token_loss(model, BATCH(0)).backward()
    block = model.blocks[0]
    decays = [(block.mlp.up.weight, 0.1), (block.norm1.weight, 0), (model.tok.weight, 0)]

    def one_step(p, lr, decay):
        "The moments of one gradient, corrected, are that gradient and its square"
        return p * (1 - lr * decay) - lr * p.grad / (p.grad.abs() + 1e-8)

    want = [one_step(p, 0.01, decay).detach() for p, decay in decays]
    adamw(model, lr=0.01).step()
    for (p, _), new in zip(decays, want):
        close(p, new, eps=1e-6)


class WeightPenalty(MLP):
    "An MLP that adds the size of its weights to the auxiliary loss"

    needs = ('aux',)

    def __init__(self, cfg, layer=0):
        super().__init__(cfg)
        self.layer = layer

    def forward(self, x, aux=None, **ctx):
        if aux is not None:
            aux.add(self.layer, loss=self.out.weight.square().sum())
        return super().forward(x)


def test_an_auxiliary_loss_counts_for_the_gradient_alone():
    def loss_and_gradient(model):
        loss = next_token_loss(model, BATCH(0))
        weight = model.blocks[0].mlp.out.weight
        return loss.item(), torch.autograd.grad(loss, weight)[0], weight.detach()

    with_penalty = MiniGPT(replace(SMALL, mlp=part(WeightPenalty)))
    loss, gradient, weight = loss_and_gradient(with_penalty)
    plain_loss, plain_gradient, _ = loss_and_gradient(MiniGPT(SMALL))
    assert loss == plain_loss  # to the last bit
    close(gradient - plain_gradient, 2 * weight, eps=1e-5)


def test_the_operations_of_a_step_are_those_of_palms_formula():
    "Chowdhery et al. 2022, appendix B"
    model = MiniGPT(GPTConfig(max_len=64))
    rows = torch.randint(65, (12, 65), generator=rng(0, 'rows'))
    work = flops(lambda: next_token_loss(model, rows).backward())
    weights = model.n_params - model.tok.weight.numel() - model.pos.table.weight.numel()
    close(work, rows[:, 1:].numel() * (6 * weights + 12 * 64 * 128 * 4), eps=0.01 * work)


class Counting(WeightPenalty):
    "It counts the steps, too"

    steps = 0

    def after_step(self):
        self.steps += 1


def test_after_a_step_each_part_that_has_an_after_step_is_called():
    model = MiniGPT(replace(SMALL, mlp=part(Counting)))
    train_step(model, adamw(model), BATCH(0))
    assert [block.mlp.steps for block in model.blocks] == [1, 1]


@pytest.mark.parametrize('fused', [True, False])
def test_a_plain_step_is_as_long_as_the_clipped_gradient(fused):
    def moved(clip, lr=0.1):
        model = MiniGPT(SMALL)
        before = [p.detach().clone() for p in model.parameters()]
        plain = torch.optim.SGD(model.parameters(), lr=lr, fused=fused)
        _, grad_norm = train_step(model, plain, BATCH(0), clip)
        # nothing is left over for the next step
        assert all(p.grad is None for p in model.parameters())
        squares = [(p.detach() - b).square().sum() for p, b in zip(model.parameters(), before)]
        distance = sum(squares).sqrt().item() / lr
        close(distance, min(clip, grad_norm.item()), eps=1e-3)
        return distance

    close([moved(0.01), moved(0.1)], [0.01, 0.1], eps=1e-3)  # a long gradient is cut
    close(moved(1e6), moved(1e9), eps=1e-4)  # a short one is left alone
    assert moved(1e6) > 0.1


def plain_sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def weights_after(factors, optimizer):
    "The weights after steps with these factors on the loss"
    model = MiniGPT(SMALL)
    opt = optimizer(model)
    for n, factor in enumerate(factors):
        train_step(
            model,
            opt,
            BATCH(n % 2),
            loss_fn=lambda *args: next_token_loss(*args) * factor,
        )
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize('optimizer, bad', [(adamw, [math.nan, math.inf]), (plain_sgd, [math.nan])])
def test_a_gradient_that_is_not_finite_moves_nothing(optimizer, bad):
    for p, q in zip(weights_after([1, 1], optimizer), weights_after([1, 1, *bad], optimizer)):
        equal(p, q)


class Waits(TorchDispatchMode):
    "Collects the operations for which the processor must wait until a value is known"

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket.__name__ in ('_local_scalar_dense', 'nonzero', 'equal', 'is_nonzero'):
            self.seen.append(op)
        return op(*args, **(kwargs or {}))


def test_a_step_waits_for_no_number():
    model = MiniGPT(GPTConfig(max_len=64))
    rows = torch.randint(65, (12, 65), generator=rng(0, 'rows'))
    opt = adamw(model)
    with Waits() as waits:
        train_step(model, opt, rows)
    assert waits.seen == []
    with Waits() as waits:
        model.lm_head.weight.sum().item()  # and it would have seen one
    assert len(waits.seen) == 1


@pytest.mark.skipif(sys.platform != 'linux', reason='counts the page faults of Linux')
def test_a_step_fetches_no_memory_anew():
    from resource import RUSAGE_SELF, getrusage

    if not keep_freed_memory():
        pytest.skip('this C library gives freed memory back')
    model = MiniGPT(GPTConfig(max_len=64))
    rows = torch.randint(65, (12, 65), generator=rng(0, 'rows'))
    opt = adamw(model)
    for n in range(15):
        if n == 5:
            before = getrusage(RUSAGE_SELF).ru_minflt
        train_step(model, opt, rows)
    # pages of 4 kB, in a step that uses 20 MB
    assert (getrusage(RUSAGE_SELF).ru_minflt - before) / 10 < 400


# ---- the loop


def test_which_callbacks_are_due():
    callbacks = {20: print, (1, 30): print}
    due = [len(_due_callbacks(callbacks, step)) for step in (1, 20, 30, 40, 60, 61)]
    assert due == [1, 1, 1, 1, 1, 0]


def test_fit_leaves_the_common_generator_as_it_was():
    before = torch.get_rng_state()
    model = MiniGPT(replace(SMALL, dropout=0.1))
    fit(model, BATCH, 3, callbacks={1: lambda run: dict(drawn=str(torch.rand(1)))})
    equal(torch.get_rng_state(), before)


def test_ctrl_c_ends_the_loop_and_keeps_what_was_learned(monkeypatch):
    # a job in the background has no handler of its own
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        press = {30: lambda run: signal.raise_signal(signal.SIGINT)}
        run = fit(MiniGPT(SMALL), BATCH, 1000, callbacks=press)
    finally:
        signal.signal(signal.SIGINT, old)
    assert (run.step, run.stopped, len(run.losses)) == (30, 'by hand', 30)


def test_a_run_notes_what_it_did():
    start = mean_loss(MiniGPT(SMALL), IDS[:5000])
    callbacks = {20: lambda state: dict(val=mean_loss(state.model, IDS[:5000]))}
    run = fit(MiniGPT(SMALL), BATCH, 100, callbacks=callbacks)
    assert (run.step, run.tokens, len(run.losses)) == (100, 100 * 8 * 64, 100)
    assert [note['step'] for note in run.notes] == [20, 40, 60, 80, 100]
    assert run.notes[-1]['val'] < run.notes[0]['val'] < start


def test_another_seed_is_another_dropout():
    def trained(seed):
        return weights_of(fit(MiniGPT(replace(SMALL, dropout=0.1)), BATCH, 5, seed=seed).model)

    assert trained(0) == trained(0)
    assert trained(0) != trained(1)


def test_a_loss_that_is_not_finite_is_found_in_its_row_and_spoils_nothing():
    def spoilt_loss(model, rows):
        "NaN for a row that holds token 1"
        spoil = torch.where(rows == 1, math.nan, 0.0).sum()
        return next_token_loss(model, rows) + spoil * model.norm.bias.sum()

    def one_bad(step):
        "Rows of token 2; in step 7, the second row holds a token 1"
        rows = torch.full((3, 9), 2)
        if step == 7:
            rows[1, 4] = 1
        return rows

    model = MiniGPT(SMALL)
    words = 'the loss of step 7 is nan (row 1 of its batch, gradient of norm.bias): lower'
    refuses(lambda: fit(model, one_bad, 40, loss_fn=spoilt_loss), words)
    assert all(p.isfinite().all() for p in model.parameters())


def test_no_steps_do_no_harm():
    assert fit(MiniGPT(SMALL), BATCH, 0).losses == []


def test_what_fit_cannot_follow_is_refused():
    model = MiniGPT(SMALL)
    refuses(lambda: fit(model, BATCH, 20, warmup=21), 'warmup=21: give 0 to 20 steps')
    refuses(
        lambda: fit(model, BATCH, 20, lr=0.01, min_lr=0.02),
        'min_lr=0.02: give 0 to the learning rate, 0.01',
    )
    run = TrainState(model, 15)
    refuses(lambda: fit(model, BATCH, 20, state=run), 'steps=20: this run is planned for 15')
    for steps in (-1, 2.5, None):
        refuses(lambda: fit(model, BATCH, steps), f'steps={steps}: give a whole number')
    for wrong in (dict(lr=math.nan), dict(lr=-0.1), dict(weight_decay=-1), dict(lr=math.inf)):
        (name, value), *_ = wrong.items()
        refuses(lambda: fit(model, BATCH, 20, **wrong), f'{name}={value}: give a number')


# ---- batches of a corpus


def test_batches_of_what_cannot_be_cut_are_refused():
    refuses(lambda: batches('tiny_tails', TOK), "did you mean 'tiny_tales'?")
    no_training = replace(TALES, splits=dict(val=TALES.documents('val')))
    refuses(lambda: batches(no_training, TOK), "has no split 'train'")
    refuses(lambda: batches(Corpus('note', dict(train='Once.')), TOK), 'a block needs 129')
    for wrong in (dict(batch_size=2.5), dict(batch_size=0), dict(length=0)):
        (name, value), *_ = wrong.items()
        refuses(lambda: batches(SOME, TOK, **wrong), f'{name}={value}: give a whole number')


def test_rows_begin_where_documents_do_or_go_on_within_one():
    ids, starts = read_split(SOME, TOK, 'train')
    rows = batches(SOME, TOK, batch_size=8, length=32)
    windows = ids.unfold(0, 33, 1)
    at_starts = {tuple(w) for w in windows[starts[starts < len(windows)]].tolist()}
    seen = [tuple(r) for n in range(-(-rows.per_epoch // 8)) for r in rows(n).tolist()]
    begun = len({r for r in seen if r in at_starts})
    # an epoch meets the beginning of each; the last tale's row goes on at the first one
    assert len(starts) - 1 <= begun <= len(starts)


def test_a_running_text_is_cut_anywhere():
    running = replace(TALES, independent=False, splits=dict(train=TEXT))
    ids, starts = read_split(running, TOK, 'train')
    assert starts is None
    first = batches(running, TOK, batch_size=8, length=32, seed=1)
    assert not first(0).equal(batches(running, TOK, batch_size=8, length=32, seed=2)(0))
    ring = torch.cat([ids, ids[:32]]).unfold(0, 33, 1)
    assert all((ring == row).all(1).any() for row in first(0))


def test_each_document_of_a_split_has_its_mark():
    ids, starts = read_split(SOME, TOK, 'train')
    stories = [TOK.decode(ids[a + 1 : b + 1].tolist()) for a, b in zip(starts, starts[1:])]
    equal(stories, [d + TALES.separator for d in SOME.documents('train')[:-1]])
    spec = torch.tensor(TOK.encode(TALES.separator + SOME.text('train') + TALES.separator))
    equal(ids, spec)
    equal(starts, document_starts(spec, MARK)[:-1])  # as by search
    running = read_split(replace(SOME, independent=False), TOK, 'train')
    equal(running[0], torch.tensor(TOK.encode(SOME.text('train'))))
    assert running[1] is None


def test_byte_pairs_have_a_mark_that_no_text_can_form():
    few = replace(TALES, splits=dict(val=['One.\n', '', '\nTwo <|endoftext|> three.']))
    pairs = BPETokenizer.train(TALES.documents('val')[:50], 300, special_tokens=['<|endoftext|>'])
    ids, starts = read_split(few, pairs, 'val')
    equal(starts, (ids == pairs.eos_id).nonzero()[:-1, 0])
    ends = [*starts[1:], -1]
    texts = [pairs.decode(ids[a + 1 : b].tolist()) for a, b in zip(starts, ends)]
    equal(texts, few.documents('val'))


# ---- the curve


def test_a_curve_has_steps_and_one_unit(monkeypatch):
    assert moving_average([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]
    model = MiniGPT(SMALL)
    refuses(lambda: plot_loss(TrainState(model, 5)), 'no step was made')
    run = fit(model, BATCH, 4, callbacks={2: lambda run: dict(val=3.0)})
    refuses(lambda: plot_loss(run, floor=0.26, token='token'), 'the floor is known per character')
    fig = plot_loss(run, token='token')
    assert fig.axes[0].get_ylabel() == 'loss (nats per token)'
    matplotlib.pyplot.close(fig)


def test_a_curve_knows_what_a_token_is():
    def label(run, **more):
        fig = plot_loss(run, **more)
        matplotlib.pyplot.close(fig)
        return fig.axes[0].get_ylabel()

    pairs = BPETokenizer.train(SOME.documents('train'), 300)
    of_chars = fit(MiniGPT(SMALL), batches(SOME, TOK, batch_size=4, length=32), 2)
    cfg = replace(SMALL, vocab_size=pairs.vocab_size)
    of_pairs = fit(MiniGPT(cfg), batches(SOME, pairs, batch_size=4, length=32), 2)
    unknown = fit(MiniGPT(SMALL), BATCH, 2)
    assert label(of_chars) == 'loss (nats per character)'
    assert label(of_pairs) == label(unknown) == 'loss (nats per token)'
    assert label(unknown, floor=0.26) == 'loss (bits per character)'
    refuses(lambda: plot_loss(of_pairs, floor=0.26), 'the floor is known per character')


def test_a_path_is_no_floor():
    run = fit(MiniGPT(SMALL), BATCH, 2)
    with pytest.raises(TypeError, match='positional'):
        plot_loss(run, 'loss.png')
    refuses(lambda: plot_loss(run, floor='loss.png'), ".savefig('loss.png')")
    refuses(lambda: plot_loss('x'), "run='x': give what `fit` returned")
    assert ".savefig('loss.png')" in plot_loss.__doc__


# ---- what a guess gets wrong is told in one line


@pytest.fixture
def anew(monkeypatch):
    "Each warning that comes once in a process comes anew"
    monkeypatch.setattr(llm_lab.files, '_said', set())


def test_batches_of_another_tokenizer_are_refused_before_the_first_step():
    abc = CharTokenizer('abc')
    small = MiniGPT(replace(SMALL, vocab_size=3))
    want = weights_of(small)
    refuses(
        lambda: fit(small, batches(SOME, TOK, 4, 16), 2),
        f'the tokenizer has {TOK.vocab_size} ids, the model 3: give the tokenizer of this model',
    )
    # of rows alone, what is seen
    most = int(BATCH(0).max())
    refuses(lambda: fit(small, BATCH, 2), f'a batch holds the id {most}, the model has ids 0 to 2')
    assert weights_of(small) == want
    rows = torch.tensor(abc.encode('abcabcabcabc'))[None]
    assert fit(small, lambda step: rows, 2).step == 2


def test_a_loss_of_ones_own_may_mark_what_it_likes():
    marked = BATCH(0).clone()
    marked[:, 0] = 999  # not for the table

    def loss(model, rows):
        return next_token_loss(model, rows[:, 1:])

    assert fit(MiniGPT(SMALL), lambda step: marked, 2, loss_fn=loss).step == 2


@pytest.mark.parametrize('pos', [None, part(SinusoidalPositions)])
def test_rows_longer_than_the_context_are_warned_of_once(pos, anew):
    model = MiniGPT(replace(SMALL, pos=pos, max_len=16))
    with warnings.catch_warnings(record=True, action='always') as notes:
        fit(model, random_crops(IDS, 4, 16), 3)
        assert not notes
        fit(model, random_crops(IDS, 4, 40), 3)
    (note,) = [str(n.message) for n in notes]
    assert note.startswith('the rows have 40 tokens, max_len of the model is 16:')
    assert 'max_len=40' in note and 'length=16' in note


def test_where_positions_are_learned_longer_rows_are_refused(anew):
    with warnings.catch_warnings(action='error'):
        refuses(
            lambda: fit(MiniGPT(replace(SMALL, max_len=16)), random_crops(IDS, 4, 40), 3),
            'the text has 40 tokens, max_len is 16',
        )


def test_a_rate_beside_an_optimizer_is_refused():
    model = MiniGPT(SMALL)
    opt = adamw(model, lr=0.001)
    for wrong in (dict(lr=0.004), dict(lr=0.0), dict(weight_decay=0.2)):
        (name, value), *_ = wrong.items()
        words = f'{name}={value} beside optimizer=AdamW(…) has no effect: give it to the optimizer'
        refuses(lambda: fit(model, BATCH, 2, optimizer=opt, **wrong), words)
    for wrong in (dict(warmup=1), dict(min_lr=0.001)):
        (name, value), *_ = wrong.items()
        words = f'{name}={value} beside schedule=… has no effect'
        refuses(lambda: fit(model, BATCH, 2, schedule=lambda *_: 1.0, **wrong), words)
    # a run that goes on is called as it was begun
    run = fit(model, BATCH, 2, lr=0.002)
    run.stopped, run.step = '', 1
    assert fit(model, BATCH, 2, lr=0.002, state=run).step == 2


def test_the_smallest_rate_is_that_of_the_optimizers_own_rate():
    model = MiniGPT(SMALL)
    opt = adamw(model, lr=0.5)
    fit(model, BATCH, 20, optimizer=opt, min_lr=0.25, warmup=0, clip=1e-9)
    (rate,) = {g['lr'] for g in opt.param_groups}
    assert 0.25 < rate < 0.26  # half of its own at the last step, not 62 times that
    refuses(lambda: fit(model, BATCH, 20, optimizer=opt, min_lr=0.6), 'min_lr=0.6: give 0 to')


@pytest.mark.parametrize(
    ('said', 'words'),
    [
        (
            dict(callbacks=[print]),
            'callbacks=[<built-in function print>]: say when, as in {100: f}',
        ),
        (dict(callbacks=print), 'say when, as in {100: f}'),
        (dict(callbacks={0: print}), 'callbacks: 0 is no number of steps: give {100: f}'),
        (dict(callbacks={'end': print}), "callbacks: 'end' is no number of steps"),
        (dict(callbacks={5: 'save'}), "callbacks: 5: 'save' is no function: give f(state)"),
        (dict(optimizer='muon'), "optimizer='muon': give one that is made, such as muon(model"),
        (dict(optimizer=adamw), 'optimizer=adamw: give one that is made, such as muon(model'),
        (dict(schedule='cosine'), "schedule='cosine': give a function (step, steps) → factor"),
        (dict(schedule=0.5), 'schedule=0.5: give a function (step, steps)'),
    ],
)
def test_what_is_no_callback_optimizer_or_schedule_is_refused(said, words):
    model = MiniGPT(SMALL)
    refuses(lambda: fit(model, BATCH, 2, **said), words)


def test_callbacks_of_all_kinds_of_numbers_are_called():
    seen = []
    note = lambda run: seen.append(run.step)  # noqa: E731
    fit(MiniGPT(SMALL), BATCH, 4, callbacks={np.int64(2): note, (1, 4): note})
    assert sorted(seen) == [1, 2, 4, 4]


class TwoNumbers:
    "As a `Score`: it says what is to be noted of it"

    def as_note(self, name='val'):
        return {name: 2.0, f'{name}_bits_per_byte': 3.0}


def test_what_callbacks_return_is_noted_as_plain_numbers(anew):
    returned = [
        (TwoNumbers(), dict(val=2.0, val_bits_per_byte=3.0)),
        (dict(test=TwoNumbers()), dict(test=2.0, test_bits_per_byte=3.0)),
        (dict(val=torch.tensor(1.5)), dict(val=1.5)),
        (dict(word='x'), dict(word='x')),
        ({}, {}),
    ]
    for said, noted in returned:
        run = fit(MiniGPT(SMALL), BATCH, 1, callbacks={1: lambda run: said})
        assert run.notes == [dict(step=1, **noted)]
        assert not any(isinstance(v, torch.Tensor) for v in run.notes[0].values())
    with pytest.warns(UserWarning, match='a number, which is not noted: return dict'):
        run = fit(MiniGPT(SMALL), BATCH, 1, callbacks={1: lambda run: 2.5})
    assert run.notes == []


def test_a_run_prints_in_one_line():
    model = MiniGPT(SMALL)
    assert repr(TrainState(model, 50)) == 'TrainState: no step of 50 is made'
    run = fit(model, BATCH, 4, callbacks={3: lambda run: run.stop('by hand')})
    mean = sum(run.losses) / 3
    assert repr(run).startswith(f'TrainState: step 3 of 4 | loss {mean:.3f} nats/token | ')
    assert repr(run).endswith(' left | stopped by hand') and '\n' not in str(run)
    assert run == run


def squared(model, rows):
    return next_token_loss(model, rows) ** 2


def test_a_loss_of_ones_own_is_named_and_no_curve_of_it_is_in_nats():
    score = TwoNumbers()
    run = fit(MiniGPT(SMALL), BATCH, 4, loss_fn=squared, callbacks={2: lambda run: score})
    assert ' of squared | val 2.000 nats/token | val_bits_per_byte 3.000 | ' in repr(run)
    for loss_fn in (lambda *a: squared(*a), partial(partial(squared))):
        named = fit(MiniGPT(SMALL), BATCH, 1, loss_fn=loss_fn).unit
        assert named in ('of the loss_fn', 'of squared')

    def said(run):
        fig = plot_loss(run, token='token')
        matplotlib.pyplot.close(fig)
        (ax,) = fig.axes
        names = [t.get_text() for t in ax.get_legend().get_texts()]
        return ax.get_ylabel(), names, ax.get_title(loc='left') or ax.get_title()

    axis, names, title = said(run)
    assert (axis, names) == ('loss', ['training, of squared', 'validation, nats per token'])
    assert title == 'the loss falls to 2.00 nats per token'
    run.notes = [dict(step=2, val=9.0)]  # the reader's own number: in no unit that we know
    axis, names, title = said(run)
    assert (axis, names) == ('loss', ['training, of squared', 'validation'])
    assert title == 'the loss falls to 9.00'


# ---- the exercises


@pytest.fixture(scope='module')
def lesson():
    "The names of the chapter that its exercises use, and the cell of each exercise"
    sources = cells_of('23_train')
    names = dict(vars(chapter), check=check, MiniGPT=MiniGPT, read=BATCH)
    names['tiny'] = replace(SMALL, d_model=32, n_layers=1, n_heads=2)
    (helpers,) = [source for source in sources if 'def sgd(' in source]
    exec(helpers[helpers.index('def sgd(') :], names)
    for name in answers.ANSWERS:
        (source,) = [source for source in sources if source.startswith(f'def {name}(')]
        exec(source, names)
    return names


(
    test_a_right_answer_is_told_so,
    test_a_wrong_answer_meets_a_counter_example,
    test_an_exercise_that_nobody_has_done_says_so,
) = exercise_tests(
    answers.ANSWERS,
    dict(
        adamw_step=('adamw_step_spec', 'step_cases'),
        wsd=('wsd_spec', 'cases'),
        guess=('factors_spec', None),
    ),
)
