"""Learning from rewards: every loss beside a slow one written out, every estimate beside the exact
value, and a small game that can only be won by learning."""

import json
import math
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from answers import reward as answers
from helpers import near, one_line, shaken

from llm_lab.core import check, rng
from llm_lab.gpt import MiniGPT
from llm_lab.kv_cache import with_kv_cache
from llm_lab.llama_block import llama
from llm_lab.reward import (
    DPO,
    answer_logprobs,
    dpo_loss,
    group_advantages,
    grpo,
    grpo_loss,
    kl_from,
    sample_answers,
    token_logprobs,
)
from llm_lab.train import fit

CFG = llama(7, d_model=16, n_layers=2, n_heads=2, max_len=16)
END = 0


@pytest.fixture
def model():
    "A model whose answers are far from even"
    return shaken(CFG, by=0.6)


# ---- log-probabilities


def test_the_log_probability_of_an_answer_is_that_of_its_tokens_one_by_one(model):
    ids = torch.tensor([[1, 2, 3, 4, 0], [2, 2, 5, 0, 0]])
    is_answer = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 1, 0]]).bool()
    with torch.no_grad():
        got = answer_logprobs(model, ids, is_answer)
        for row, where in enumerate(is_answer):
            want = 0.0
            for t in where.nonzero()[:, 0].tolist():
                logits = model(ids[row : row + 1, :t])[0, -1]
                want += logits.log_softmax(-1)[ids[row, t]].item()
            assert got[row].item() == pytest.approx(want, abs=1e-5)


# ---- answers


def test_a_question_beside_longer_ones_gets_the_answer_that_it_gets_alone(model):
    prompts = [[1, 2, 3, 4, 5], [6, 1], [2, 5, 3]]
    together = sample_answers(model, prompts, 1, 6, END, temperature=0)
    for prompt, text in zip(prompts, together.texts):
        assert sample_answers(model, [prompt], 1, 6, END, temperature=0).texts == [text]
    for prompt, ids, where, text in zip(
        prompts, together.ids.tolist(), together.is_answer, together.texts
    ):
        n = len(prompt)
        assert ids[:n] == prompt and ids[n : n + len(text)] == text
        assert where.nonzero()[:, 0].tolist() == list(range(n, n + len(text)))
        assert set(ids[n + len(text) :]) <= {END}


def test_an_answer_ends_with_its_end_mark_or_where_there_is_no_more_room(model):
    found = sample_answers(model, [[1], [2]], 50, 5, END)
    assert {len(text) for text in found.texts} <= set(range(1, 6))
    for text in found.texts:
        assert END not in text[:-1]
        assert len(text) == 5 or text[-1] == END
    assert any(text[-1] != END for text in found.texts)
    assert any(text[-1] == END for text in found.texts)


def test_the_seed_decides_and_the_cache_changes_nothing(model):
    texts = [sample_answers(model, [[1, 2]], 20, 4, END, seed).texts for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    cached = with_kv_cache(model)
    assert sample_answers(cached, [[1, 2]], 20, 4, END, 0).texts == texts[0]


def test_drawn_answers_come_as_often_as_the_model_says(model):
    found = sample_answers(model, [[3, 1]], 4000, 1, END)
    with torch.no_grad():
        p = model(torch.tensor([[3, 1]]))[0, -1].softmax(-1)
    count = torch.bincount(torch.tensor([text[0] for text in found.texts]), minlength=7)
    chi2 = ((count - 4000 * p) ** 2 / (4000 * p)).sum().item()
    assert chi2 < 30, (count, p)  # 6 degrees of freedom: 22.5 in one of a thousand runs


# ---- preferences


def test_dpo_is_the_formula_of_its_paper():
    given = torch.tensor([-3.0, -5.0]), torch.tensor([-4.0, -2.5])
    before = torch.tensor([-3.5, -5.5]), torch.tensor([-3.5, -3.5])
    want = 0.0
    for c, r, rc, rr in zip(*(x.tolist() for x in (*given, *before))):
        margin = 0.3 * (c - rc) - 0.3 * (r - rr)
        want -= math.log(1 / (1 + math.exp(-margin))) / 2
    assert dpo_loss(*given, *before, beta=0.3).item() == pytest.approx(want, abs=1e-6)


def last(rows):
    where = torch.zeros_like(rows, dtype=torch.bool)
    where[:, -1] = True
    return where


def test_dpo_makes_the_chosen_answer_likelier_and_leaves_the_reference(model):
    rows = torch.tensor([[1, 2, 3], [4, 5, 6], [1, 2, 5], [4, 5, 1]])  # two chosen, two rejected
    reference = deepcopy(model)
    kept = deepcopy(reference.state_dict())
    loss = DPO(reference, last)
    assert loss(model, rows).item() == pytest.approx(math.log(2))
    fit(model.train(), lambda step: rows, 30, lr=1e-2, loss_fn=loss)
    before, after = (answer_logprobs(m, rows, last(rows)) for m in (reference, model.eval()))
    gained = (after - before).view(2, 2)
    assert (gained[0] > gained[1] + 1).all()
    assert all(torch.equal(v, reference.state_dict()[k]) for k, v in kept.items())


def test_an_odd_batch_holds_no_pairs(model):
    one_line(lambda: DPO(model, last)(model, torch.ones(3, 4).long()), '3 rows', 'pairs')


# ---- rewards


def test_grpo_is_its_formula_token_by_token():
    draw = rng(0, 'grpo')
    logp, old, ref = (-2 * torch.rand(5, 4, generator=draw).double() for _ in range(3))
    where = torch.rand(5, 4, generator=draw) < 0.7
    where[:, 0] = True
    advantage = torch.randn(5, generator=draw).double()
    total = 0.0
    for row in range(5):
        tokens = where[row].nonzero()[:, 0].tolist()
        for t in tokens:
            ratio = math.exp(logp[row, t] - old[row, t])
            gain = min(
                ratio * advantage[row].item(),
                min(max(ratio, 0.8), 1.2) * advantage[row].item(),
            )
            d = (ref[row, t] - logp[row, t]).item()
            total += (gain - 0.04 * (math.exp(d) - d - 1)) / len(tokens) / 5
    loss = grpo_loss(logp, old, ref, advantage, where)
    assert loss.item() == pytest.approx(-total, abs=1e-9)
    # tokens that are no answer change nothing
    other = logp.masked_fill(~where, -9.0)
    near(grpo_loss(other, old, ref, advantage, where), loss, 1e-9)


def test_the_first_gradient_is_the_policy_gradient():
    "Where the model is still the one that has drawn, the gradient is −A / tokens for each token"
    logp = (-torch.ones(2, 3)).double().requires_grad_()
    where = torch.tensor([[True, True, True], [True, False, False]])
    advantage = torch.tensor([0.6, -2.0]).double()
    grpo_loss(logp, logp.detach(), logp.detach(), advantage, where).backward()
    want = -advantage[:, None] * where / where.sum(1, keepdim=True) / 2
    near(logp.grad, want, 1e-12)


def test_what_is_beyond_the_clip_has_no_gradient():
    logp = torch.zeros(2, 1).requires_grad_()
    old = torch.tensor([[-1.0], [1.0]])  # ratios e and 1/e
    advantage = torch.tensor([1.0, -1.0])  # better and likelier, worse and less likely
    grpo_loss(logp, old, logp.detach(), advantage, torch.ones(2, 1).bool()).backward()
    assert not logp.grad.any()


def test_the_pull_of_the_brake_is_that_of_the_other_divergence():
    """Drawn in the proportions of the model, x − 1 − ln x has on average the value of
    KL(model ‖ reference), and the gradient of KL(reference ‖ model)"""
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    q = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
    drawn = torch.tensor([0, 0, 1, 2])  # each as often as the model says
    where = torch.ones(4, 1).bool()

    def brake(logits):
        logp = logits.log_softmax(0)[drawn, None]
        return grpo_loss(logp, logp.detach(), q.log()[drawn, None], torch.zeros(4), where, beta=1.0)

    logits = p.log().requires_grad_()
    value = brake(logits)
    near(value.detach(), (p * (p / q).log()).sum(), 1e-12)
    value.backward()
    near(logits.grad, p - q, 1e-12)  # of −Σ q ln p, with respect to the logits


def test_advantages_have_mean_zero_and_an_even_group_has_none():
    found = group_advantages(torch.tensor([[0.0, 1, 1, 0], [2, 2, 2, 2]]))
    near(found.mean(1), torch.zeros(2))
    assert not found[1].any()
    assert found[0].std().item() == pytest.approx(1, abs=1e-3)


def wins(model, token=3):
    "How likely a model answers with one token, then the end"
    with torch.no_grad():
        first = model(torch.tensor([[1]]))[0, -1].softmax(-1)[token]
        then = model(torch.tensor([[1, token]]))[0, -1].softmax(-1)[END]
    return (first * then).item()


def test_a_game_is_won_by_its_rewards_alone(model):
    before = wins(model)
    notes = grpo(
        model,
        deepcopy(model),
        lambda step: [[1]] * 8,
        lambda ids, text: float(text == [3, END]),
        80,
        END,
        max_new_tokens=3,
        lr=1e-2,
        beta=0.0,
    )
    assert before < 0.3 and wins(model) > 0.9
    assert notes[-1]['reward'] > 0.9 and [o['step'] for o in notes] == list(range(80))


def test_equal_rewards_teach_nothing_and_a_run_can_be_repeated(model):
    kept = deepcopy(model.state_dict())

    def play(reward, start):
        learner = deepcopy(start)
        sgd = torch.optim.SGD(learner.parameters(), 0.1)
        prompts = lambda step: [[1], [2, 5]]
        grpo(learner, start, prompts, reward, 3, END, optimizer=sgd, updates=2)
        return learner.state_dict()

    same = play(lambda ids, text: 2.5, model)
    for k in kept:
        near(same[k], kept[k], 1e-6)
    first, second = (play(lambda ids, text: len(text) / 2, model) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in kept)
    assert any(not torch.equal(first[k], kept[k]) for k in kept)


def test_what_cannot_be_learned_from_is_one_line(model):
    ask = lambda step: [[1]]
    start = deepcopy(model)

    def play(reward=1.0, reference=start, steps=1, **how):
        grpo(model, reference, ask, lambda ids, text: reward, steps, END, **how)

    one_line(lambda: play(math.nan), 'NaN', 'finite number')
    one_line(lambda: play(group_size=1), 'group_size=1', 'give 2')
    one_line(lambda: play(steps=0), 'steps=0', 'give 1')
    one_line(lambda: play(updates=0), 'updates=0', 'give 1')
    one_line(lambda: play(reference=model), 'the model itself', 'deepcopy')


def test_how_far_a_model_has_strayed_is_the_kl_divergence(model):
    other = shaken(CFG, seed=1, by=0.6)
    ids = torch.tensor([[2, 4]])
    with torch.no_grad():
        p, q = (m(ids)[0, -1].log_softmax(-1) for m in (model, other))
    exact = (p.exp() * (p - q)).sum().item()
    answers = sample_answers(model, [[2, 4]], 4000, 1, END)
    error = (p - q)[answers.ids[:, 2]].std().item() / 4000**0.5
    assert kl_from(model, other, answers) == pytest.approx(exact, abs=4 * error + 1e-5)
    assert kl_from(model, model, answers) == 0


def test_a_run_notes_how_far_its_model_had_strayed(model):
    other = shaken(CFG, seed=1, by=0.6)
    before = deepcopy(model)
    ask = lambda step: [[2, 4], [1]]
    notes = grpo(model, other, ask, lambda ids, text: len(text), 2, END, max_new_tokens=4)
    found = sample_answers(before, ask(0), 8, 4, END, seed='0/0')
    assert notes[0]['kl'] == pytest.approx(kl_from(before, other, found), abs=1e-5)
    assert notes[0]['length'] == sum(map(len, found.texts)) / 16
    notes = grpo(before, deepcopy(before), ask, lambda ids, text: len(text), 2, END, lr=1e-2)
    assert notes[0]['kl'] == 0 != notes[1]['kl']


def test_log_probabilities_have_the_shape_of_what_is_predicted(model):
    assert token_logprobs(model, torch.ones(3, 6).long()).shape == (3, 5)


def test_a_model_of_several_experts_learns_from_rewards_too():
    from llm_lab.moe import MoE
    from llm_lab.parts import part

    cfg = llama(7, d_model=16, n_layers=1, n_heads=2, max_len=8, mlp=part(MoE, n_experts=4))
    learner = MiniGPT(cfg)
    before = wins(learner)
    reward = lambda ids, text: float(text == [3, END])
    grpo(learner, deepcopy(learner), lambda step: [[1]] * 8, reward, 60, END, lr=1e-2, beta=0.0)
    assert wins(learner) > max(0.8, before)


# ---- the exercises of the lesson


@pytest.fixture(scope='module')
def lesson():
    "What the notebook's own cells define for its exercises"
    notebook = Path(__file__).parent.parent / 'nbs' / '63_reward.ipynb'
    found = [''.join(c['source']) for c in json.loads(notebook.read_text())['cells']]
    space = dict(torch=torch, group_advantages=group_advantages)
    exec('from random import Random\nfrom fastcore.test import test_eq', space)
    for begin in ('NAMES = ', 'def my_loss', 'def repaired'):
        cell = next(c for c in found if c.startswith(begin))
        exec(cell.rpartition('check(')[0] if begin[0] == 'd' else cell, space)
    return space


def said_of(answer, lesson):
    "What the lesson says of a loss"
    lesson['my_loss'] = answer
    return check(lesson['my_gradient'], lesson['gradient_spec'], *lesson['loss_cases'])


@pytest.mark.parametrize('answer', answers.RIGHT)
def test_a_right_answer_is_told_so(answer, lesson):
    assert said_of(answer, lesson) == f'my_gradient: right on {len(lesson["loss_cases"])} cases'


@pytest.mark.parametrize('answer', answers.WRONG)
def test_a_wrong_answer_meets_a_counter_example(answer, lesson):
    said = said_of(answer, lesson)
    assert 'expected' in said or 'does not require grad' in said


def test_what_the_exercise_asks_for_is_the_loss_of_the_library(lesson):
    for logits, drawn, rewards in lesson['loss_cases']:
        logits = torch.tensor(logits, requires_grad=True)
        T = len(logits)
        words = torch.tensor([answer + [0] * (T - len(answer)) for answer in drawn])
        where = torch.tensor([[t < len(answer) for t in range(T)] for answer in drawn])
        logp = logits.log_softmax(1)[range(T), words]  # (N, T)
        advantage = group_advantages(torch.tensor([rewards]))[0]
        grpo_loss(logp, logp.detach(), logp.detach(), advantage, where, beta=0.0).backward()
        near(logits.grad, lesson['gradient_spec'](logits.tolist(), drawn, rewards), 1e-6)


@pytest.mark.parametrize('answer', answers.REPAIRED + answers.NOT_REPAIRED)
def test_a_reward_is_repaired_or_not(answer, lesson):
    lesson['repaired'] = partial(answer, solve=lesson['solve'], end=lesson['END'])
    said = check(lesson['earnings'], lesson['earnings_spec'], *lesson['repair_cases'])
    assert said.startswith('earnings: right on') == (answer in answers.REPAIRED)
    assert 'expected' in said or answer in answers.REPAIRED
