"""What a model is trained for is a part of its configuration: training, evaluation, sampling, runs
and what is kept on disk ask it. The example is `tests/own/objective.py`, which writes from right to
left: the oracle is the usual model on texts that were turned around by hand."""

from pathlib import Path

import pytest
import torch

import llm_lab as lab
from helpers import near, one_line, tiny_model
from llm_lab.batching import BatchStream
from llm_lab.core import rng
from llm_lab.corpora import Corpus, letters_of
from llm_lab.kv_cache import complete
from llm_lab.parts import load_parts, part
from llm_lab.runs import train_run
from llm_lab.sampling import generate, next_logits

pytestmark = pytest.mark.usefixtures('one_thread')
OWN = Path(__file__).parent / 'own' / 'objective.py'


@pytest.fixture
def turned_part():
    "The recipe that the reader's file registers"
    load_parts(OWN)
    from llm_lab.core import REGISTERED

    return part(REGISTERED['RightToLeft'])


def rows_of(step):
    return torch.randint(5, (4, 9), generator=rng(step, 'rows'))


def turned(rows):
    return torch.cat([rows[:, :1], rows[:, 1:].flip(1)], 1)


def test_an_objective_of_ones_own_is_the_usual_model_on_turned_texts(turned_part, tmp_path):
    usual = tiny_model(vocab_size=5)
    own = tiny_model(vocab_size=5, objective=turned_part)
    by_hand = lab.fit(usual, lambda step: turned(rows_of(step)), steps=5)
    state = lab.fit(own, rows_of, steps=5)
    assert state.unit == 'nats/token' and state.tokens == 5 * 4 * 8
    # the means are taken in another order, and AdamW makes a whole step of the smallest gradient
    near(torch.tensor(state.losses), torch.tensor(by_hand.losses), 1e-4)
    own.load_state_dict(usual.state_dict())
    # a text is as likely as the turned one is for the usual model
    corpus = Corpus('c', dict(val='abcdeedc' * 10), independent=False)
    tok = lab.CharTokenizer.train(letters_of(corpus))
    ids = torch.tensor(tok.encode(corpus.text('val')))
    found = lab.evaluate(own, tok, corpus)
    want = 0.0
    for begin in range(0, len(ids) - 1, 8):
        window = turned(ids[None, begin : begin + 9])
        logits = usual.eval()(window[:, :-1])
        want += torch.nn.functional.cross_entropy(logits[0], window[0, 1:], reduction='sum').item()
    assert found.nats == pytest.approx(want, rel=1e-5) and not found.is_bound
    # it is kept by name, and comes back
    lab.save(tmp_path / 'own', own, tok)
    again = lab.load(tmp_path / 'own').model
    assert again.cfg == own.cfg and type(again.objective).__name__ == 'RightToLeft'
    text = lab.sample(again, tok, 'ab', max_new_tokens=6, seed=1)
    assert len(text) == 8 and text != lab.sample(again, tok, 'ab', max_new_tokens=6, seed=2)
    assert next_logits(again, ids[None, :3]).shape == (1, 5)


SHORT = [
    'data.length=16',
    'model.d_model=16',
    'model.n_layers=1',
    'model.n_heads=2',
    'train.batch_size=2',
    'train.threads=1',
    'eval.every=4',
    'eval.tokens=64',
    'eval.sample_tokens=5',
    'log.every=2',
    'log.checkpoint_every=2',
]


def weights(job):
    return torch.cat([p.detach().flatten() for p in job.run.model.parameters()])


@pytest.mark.slow  # by day a run of parts of one's own, and one of diffusion, go on bit for bit
def test_a_run_with_an_objective_of_ones_own_goes_on_bit_for_bit(home):
    own = ['model.objective.part=RightToLeft', *SHORT]
    whole = train_run('smoke', *own, 'train.steps=8', run='whole', parts=OWN)
    assert type(whole.run.model.objective).__name__ == 'RightToLeft'
    assert whole.result['scores']['val']['is_bound'] is False
    train_run('smoke', *own, 'train.steps=4', 'train.schedule=constant', run='a', parts=OWN)
    long = 'train.steps=8', 'train.schedule=constant'
    want = train_run('smoke', *own, *long, run='b', parts=OWN)
    went_on = train_run(None, 'train.steps=8', resume='experiments/smoke/runs/a', parts=OWN)
    assert torch.equal(weights(want), weights(went_on))
    usual = train_run('smoke', *SHORT, *long, run='usual')
    assert not torch.equal(weights(want), weights(usual))  # it did learn something else


def test_what_reads_from_left_to_right_says_so(turned_part, home):
    own = tiny_model(vocab_size=5, objective=turned_part)
    tok = lab.CharTokenizer('abcde')
    one_line(lambda: lab.next_token_loss(own, rows_of(0)), 'trained for RightToLeft', 'use fit')
    one_line(lambda: lab.for_inference(own), 'trained for RightToLeft', 'use sample')
    one_line(lambda: complete(own, tok, 'ab'), 'trained for RightToLeft', 'use sample')
    one_line(lambda: lab.to_hf(home / 'hf', own, tok), 'trained for RightToLeft')
    assert not (home / 'hf').exists()


def test_what_is_no_objective_is_refused():
    one_line(lambda: tiny_model(objective=3), 'objective=3 is no recipe')
    one_line(lambda: tiny_model(objective=part(lab.MLP)), 'MLP can be mlp, not objective')


def test_rows_have_numbers_of_their_own():
    ids = torch.arange(500) % 7
    whole = BatchStream(ids, 6, 8, seed=3)
    shares = [BatchStream(ids, 6, 8, seed=3, rank=r, world_size=2) for r in (0, 1)]
    seen = []
    for step in range(20):
        numbers = whole.row_numbers(step)
        seen += numbers.tolist()
        # each process has the numbers of its own rows
        for r, share in enumerate(shares):
            assert torch.equal(share.row_numbers(step), numbers[r::2])
            assert torch.equal(share(step), whole(step)[r::2])
    seen += BatchStream(ids, 6, 8, seed=4).row_numbers(0).tolist()
    assert len(set(seen)) == len(seen)


def test_a_run_without_texts_and_with_a_loss_of_its_own_says_so(home):
    little = ['model.objective.part=LastToken', *SHORT, 'train.steps=4']
    job = train_run('smoke', *little, run='last', parts=OWN)
    assert not (job.folder / 'samples.jsonl').exists()  # it has no `generate`
    assert 'its losses are of the last token' in repr(lab.compare({'last': job.folder}))
    usual = train_run('smoke', *SHORT, 'train.steps=4', run='usual')
    assert (usual.folder / 'samples.jsonl').exists()
    assert 'its losses are' not in repr(lab.compare({'usual': usual.folder}))
