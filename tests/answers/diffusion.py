"Answers to the exercises of `61_diffusion`, right and wrong ones; `test_diffusion.py` runs them."

import itertools
import math

# ---- 1, build it: the bound of a text, by its sets of blanks


def bound_by_sets(nats, n):
    "Right: of m blanks each set is met once in C(n, m) orders, and each of its blanks is next"
    total = 0.0
    for m in range(1, n + 1):
        for blanks in itertools.combinations(range(n), m):
            known = frozenset(range(n)) - {*blanks}
            total += sum(nats(i, known) for i in blanks) / m / math.comb(n, m)
    return total


def left_to_right(nats, n):
    "Wrong: one order of many"
    return sum(nats(i, frozenset(range(i))) for i in range(n))


def all_blanks_count(nats, n):
    "Wrong: all blanks of a set count in full, but only one of them is the next"
    total = 0.0
    for m in range(1, n + 1):
        for blanks in itertools.combinations(range(n), m):
            known = frozenset(range(n)) - {*blanks}
            total += sum(nats(i, known) for i in blanks) / math.comb(n, m)
    return total


def sets_not_shared(nats, n):
    "Wrong: the sets of m blanks are added up, where their mean is wanted"
    total = 0.0
    for m in range(1, n + 1):
        for blanks in itertools.combinations(range(n), m):
            known = frozenset(range(n)) - {*blanks}
            total += sum(nats(i, known) for i in blanks) / m
    return total


RIGHT = [bound_by_sets]
WRONG = [left_to_right, all_blanks_count, sets_not_shared]


# ---- 2, predict: how often can the first name be found where both of its mentions are blank?


def any_but_the_other(names):
    "Right: all names but that of the other child, which is not blank"
    return 1 / (len(names) - 1)


def any_name(names):
    "Wrong: two children of a story have different names (the model of the chapter errs so, too)"
    return 1 / len(names)


def two_guesses(names):
    "Wrong: the second blank is no second guess, since the first one tells it"
    return 1 / (len(names) - 1) ** 2


RIGHT_SHARES = [any_but_the_other]
WRONG_SHARES = [any_name, two_guesses]
