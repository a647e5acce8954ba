"The tour's promise, on real text: slow, so only `make nightly` keeps it."
import torch
import pytest

from llm_lab.cli import TOUR, _plan
from llm_lab.corpora import load_corpus
from llm_lab.lab import LabError
from llm_lab.train import fit, mean_loss, prepare


@pytest.mark.slow
def test_three_million_characters_of_shakespeare_end_below_1_80():
    "nanoGPT's recipe for a CPU ends at 1.898 nats per character after 1.5 million"
    try: corpus = load_corpus('tiny_shakespeare')
    except LabError as e: pytest.skip(f'the text is not at hand: {e}')
    setup = prepare(_plan(()), corpus)
    run = fit(setup.model, setup.batch, 3_000_000//(TOUR['batch_size']*TOUR['block_len']), setup.recipe.lr, setup.recipe.weight_decay)
    assert run.tokens <= 3_000_000
    assert mean_loss(setup.model, setup.ids['val']) <= 1.80


def test_the_tour_learns():
    "The same recipe, 150 steps: far below an even guess already"
    setup = prepare(_plan(()))
    fit(setup.model, setup.batch, 150, setup.recipe.lr)
    assert mean_loss(setup.model, setup.ids['val'][:10_000]) < .6*torch.tensor(setup.tokenizer.vocab_size).log().item()
