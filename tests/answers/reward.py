"Answers to the exercises of `63_reward`, right and wrong ones; `test_reward.py` runs them."

import math


def _margins(chosen, rejected, reference_chosen, reference_rejected):
    "How much more the model prefers the chosen answers than its reference does, in nats"
    for c, r, rc, rr in zip(chosen, rejected, reference_chosen, reference_rejected):
        yield sum(c) - sum(rc) - sum(r) + sum(rr)


def in_two_halves(chosen, rejected, reference_chosen, reference_rejected, beta):
    "Right: ln(1 + e^−m), written so that e is never raised to a large number"
    total = 0.0
    for margin in _margins(chosen, rejected, reference_chosen, reference_rejected):
        m = beta * margin
        total += max(-m, 0.0) + math.log(1 + math.exp(-abs(m)))
    return total / len(chosen)


def overflowing(chosen, rejected, reference_chosen, reference_rejected, beta):
    "Wrong: e^800 is no number"
    margins = _margins(chosen, rejected, reference_chosen, reference_rejected)
    return sum(math.log(1 + math.exp(-beta * m)) for m in margins) / len(chosen)


def without_reference(chosen, rejected, reference_chosen, reference_rejected, beta):
    "Wrong: an answer that was likely before counts as one that was learned"
    none = [[0.0]] * len(chosen)
    return in_two_halves(chosen, rejected, none, none, beta)


def mean_of_tokens(chosen, rejected, reference_chosen, reference_rejected, beta):
    "Wrong: ln P of an answer is the sum over its tokens"
    four = (chosen, rejected, reference_chosen, reference_rejected)
    means = [[[sum(answer) / len(answer)] for answer in answers] for answers in four]
    return in_two_halves(*means, beta)


def the_wrong_way_round(chosen, rejected, reference_chosen, reference_rejected, beta):
    "Wrong: it makes the rejected answer likelier"
    return in_two_halves(rejected, chosen, reference_rejected, reference_chosen, beta)


def sum_of_pairs(chosen, rejected, reference_chosen, reference_rejected, beta):
    "Wrong: a larger batch would take larger steps"
    loss = in_two_halves(chosen, rejected, reference_chosen, reference_rejected, beta)
    return loss * len(chosen)


RIGHT = [in_two_halves]
WRONG = [overflowing, without_reference, mean_of_tokens, the_wrong_way_round, sum_of_pairs]

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
