"Answers to the exercises of `63_reward`, right and wrong ones; `test_reward.py` runs them."

import torch


def _advantages(rewards):
    "How much better each reward is than the mean, in standard deviations"
    r = torch.tensor(rewards)
    return (r - r.mean()) / (r.std() + 1e-4)


def with_a_ratio(logits, drawn, rewards):
    "Right: the ratio is 1, but not its gradient"
    logp = logits.log_softmax(0)[drawn]
    return -(_advantages(rewards) * (logp - logp.detach()).exp()).mean()


def with_logarithms(logits, drawn, rewards):
    "Right: −A ln π, word by word"
    total = torch.zeros(())
    for word, advantage in zip(drawn, _advantages(rewards)):
        total = total - advantage * (logits[word] - logits.logsumexp(0))
    return total / len(drawn)


def without_detach(logits, drawn, rewards):
    "Wrong: 1 for all weights, so the gradient is 0"
    logp = logits.log_softmax(0)[drawn]
    return -(_advantages(rewards) * (logp - logp).exp()).mean()


def all_detached(logits, drawn, rewards):
    "Wrong: a number without a gradient"
    logp = logits.log_softmax(0)[drawn].detach()
    return -(_advantages(rewards) * logp).mean()


def with_probabilities(logits, drawn, rewards):
    "Wrong: A ∇π counts a likely word twice, once because it is drawn often"
    return -(_advantages(rewards) * logits.softmax(0)[drawn]).mean()


def without_baseline(logits, drawn, rewards):
    "Wrong: with few draws, a reward for all is noise"
    r = torch.tensor(rewards)
    return -(r / (r.std() + 1e-4) * logits.log_softmax(0)[drawn]).mean()


def without_deviation(logits, drawn, rewards):
    "Wrong: these advantages are not in standard deviations"
    r = torch.tensor(rewards)
    return -((r - r.mean()) * logits.log_softmax(0)[drawn]).mean()


def without_the_small_number(logits, drawn, rewards):
    "Wrong: where all rewards are the same, 0 / 0"
    r = torch.tensor(rewards)
    return -((r - r.mean()) / r.std() * logits.log_softmax(0)[drawn]).mean()


def the_wrong_way_round(logits, drawn, rewards):
    "Wrong: it makes good answers less likely"
    return -with_a_ratio(logits, drawn, rewards)


def sum_of_words(logits, drawn, rewards):
    "Wrong: a larger group would take larger steps"
    return with_a_ratio(logits, drawn, rewards) * len(drawn)


RIGHT = [with_a_ratio, with_logarithms]
WRONG = [
    without_detach,
    all_detached,
    with_probabilities,
    without_baseline,
    without_deviation,
    without_the_small_number,
    the_wrong_way_round,
    sum_of_words,
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
