"Answers to the exercises of `63_reward`, right and wrong ones; `test_reward.py` runs them."

import torch


def _advantages(rewards):
    "How much better each reward is than the mean, in standard deviations"
    r = torch.tensor(rewards)
    return (r - r.mean()) / (r.std() + 1e-4)


def _logps(logits, answer):
    "ln P of each word of an answer"
    return logits.log_softmax(1)[range(len(answer)), answer]


def _mean(of_answer, logits, drawn, rewards):
    "The mean over the group of what each answer adds"
    pairs = zip(drawn, _advantages(rewards))
    return sum(of_answer(_logps(logits, answer), a) for answer, a in pairs) / len(drawn)


def with_a_ratio(logits, drawn, rewards):
    "Right: the ratios are 1, but not their gradients"
    return _mean(lambda logp, a: -a * (logp - logp.detach()).exp().mean(), logits, drawn, rewards)


def with_logarithms(logits, drawn, rewards):
    "Right: −A ln π, word by word"
    total = torch.zeros(())
    for answer, advantage in zip(drawn, _advantages(rewards)):
        for t, word in enumerate(answer):
            logp = logits[t, word] - logits[t].logsumexp(0)
            total = total - advantage * logp / len(answer)
    return total / len(drawn)


def without_detach(logits, drawn, rewards):
    "Wrong: 1 for all weights, so the gradient is 0"
    return _mean(lambda logp, a: -a * (logp - logp).exp().mean(), logits, drawn, rewards)


def all_detached(logits, drawn, rewards):
    "Wrong: a number without a gradient"
    return with_a_ratio(logits.detach(), drawn, rewards)


def with_probabilities(logits, drawn, rewards):
    "Wrong: A ∇π counts a likely word twice, once because it is drawn often"
    return _mean(lambda logp, a: -a * logp.exp().mean(), logits, drawn, rewards)


def sum_of_an_answer(logits, drawn, rewards):
    "Wrong: the sum over the words of an answer, as DPO takes it"
    return _mean(lambda logp, a: -a * logp.sum(), logits, drawn, rewards)


def mean_of_all_words(logits, drawn, rewards):
    "Wrong: each word counts the same, so a long answer counts more than a short one"
    return sum_of_an_answer(logits, drawn, rewards) * len(drawn) / sum(map(len, drawn))


def first_words(logits, drawn, rewards):
    "Wrong: what follows the first word is left out"
    return with_a_ratio(logits, [answer[:1] for answer in drawn], rewards)


def ratio_of_the_answer(logits, drawn, rewards):
    "Right: one ratio for the answer has the gradients of its words' sum"
    return _mean(
        lambda logp, a: -a * (logp.sum() - logp.sum().detach()).exp() / len(logp),
        logits,
        drawn,
        rewards,
    )


def _with(advantages, logits, drawn):
    "The right loss with other advantages"
    pairs = zip(drawn, advantages)
    return -sum(a * _logps(logits, answer).mean() for answer, a in pairs) / len(drawn)


def without_baseline(logits, drawn, rewards):
    "Wrong: with few draws, a reward for all is noise"
    r = torch.tensor(rewards)
    return _with(r / (r.std() + 1e-4), logits, drawn)


def without_deviation(logits, drawn, rewards):
    "Wrong: these advantages are not in standard deviations"
    r = torch.tensor(rewards)
    return _with(r - r.mean(), logits, drawn)


def without_the_small_number(logits, drawn, rewards):
    "Wrong: where all rewards are the same, 0 / 0"
    r = torch.tensor(rewards)
    return _with((r - r.mean()) / r.std(), logits, drawn)


def the_wrong_way_round(logits, drawn, rewards):
    "Wrong: it makes good answers less likely"
    return -with_a_ratio(logits, drawn, rewards)


def sum_of_the_group(logits, drawn, rewards):
    "Wrong: a larger group would take larger steps"
    return with_a_ratio(logits, drawn, rewards) * len(drawn)


RIGHT = [with_a_ratio, with_logarithms, ratio_of_the_answer]
WRONG = [
    without_detach,
    all_detached,
    with_probabilities,
    without_baseline,
    without_deviation,
    without_the_small_number,
    the_wrong_way_round,
    sum_of_the_group,
    sum_of_an_answer,
    mean_of_all_words,
    first_words,
]

# ---- the reward that is to be repaired; `solve` and END are those of the notebook


def half_and_half(ids, answer, solve, end):
    "Right: ½ for the first word, ½ for being right"
    right = solve(ids)[0]
    return (float(answer[0] == right) + float(answer == [right, end])) / 2


def only_right(ids, answer, solve, end):
    "Wrong: it pays nothing for a good beginning"
    return float(answer == [solve(ids)[0], end])


def capped(ids, answer, solve, end):
    "Wrong: two tokens at most are paid, but a wrong word is paid too"
    return float(answer[0] == solve(ids)[0]) + 0.5 * min(len(answer), 2)


def as_it_was(ids, answer, solve, end):
    "Wrong: eight words earn the most"
    return float(answer[0] == solve(ids)[0]) + 0.5 * len(answer)


REPAIRED = [half_and_half]
NOT_REPAIRED = [only_right, capped, as_it_was]
