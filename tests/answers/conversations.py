"Answers to the exercises of `64_conversations`, right and wrong, for `test_conversations.py`"

import torch

# ---- 1. Build it: half leaves at once


def _from_the_end(lengths):
    "What the last turn takes, the last two, the last three, …"
    return torch.tensor(lengths).flip(0).cumsum(0)


def by_running_sums(lengths, most):
    "Right: of the sums from the end, those within half of `most` are turns that stay"
    taken = _from_the_end(lengths)
    if taken[-1] <= most:
        return 0
    stay = int((taken <= most / 2).sum())
    return len(lengths) - max(1, stay)


def always_half(lengths, most):
    "Wrong: where all fit, none leaves"
    stay = int((_from_the_end(lengths) <= most / 2).sum())
    return len(lengths) - max(1, stay)


def as_few_as_possible(lengths, most):
    "Wrong: that is the rule of the chapter, which reads all again at each turn"
    stay = int((_from_the_end(lengths) <= most).sum())
    return len(lengths) - max(1, stay)


def half_of_the_turns(lengths, most):
    "Wrong: half of the context is meant, and turns differ in length"
    return len(lengths) // 2 if sum(lengths) > most else 0


def not_even_the_last(lengths, most):
    "Wrong: the last turn is the question that is to be answered"
    taken = _from_the_end(lengths)
    return 0 if taken[-1] <= most else len(lengths) - int((taken <= most / 2).sum())


# ---- 2. Predict, run, explain: the message of the system changes at each turn


def up_to_the_number(turn):
    """Right: six ids, at every turn.

    They are the end mark, the mark of the system, `T`, `ur`, `n` and the space. The number after
    them is another one at each turn, so the common beginning ends there, however much behind it is
    the same. All of the conversation is read again at each turn. What changes belongs behind what
    stays, such as into the last message: then only the end is read."""
    return 6


def all_but_the_number(turn):
    "Wrong: what stands behind the number was computed after another one, and moved by nothing"
    return 20 + 9 * (turn - 2)


def nothing(turn):
    "Wrong: what stands before the number is the same"
    return 0


def with_the_number(turn):
    "Wrong: the number is the first id that differs"
    return 7


# ---- 3. Break it: without `min`, when does `read_new` fail?


def is_a_beginning(cached, ids):
    """Right: where the whole conversation is the beginning of what the cache holds.

    The cell that compares the logits turns red: it asks the same turn twice, and the second time
    all of it is in the cache. The error is that of `DecodingState`, 'an empty text: give at least
    one token'. Green stay the conversations that only grow. And after a question was taken back, it
    can be asked again in the same words: that is how a user would meet the error."""
    return cached[: len(ids)] == ids


def is_the_same(cached, ids):
    "Wrong: the cache may hold more, such as the answer to a question that is asked again"
    return cached == ids


def is_shorter(cached, ids):
    "Wrong: a shorter conversation may differ, and then its last ids are read"
    return len(ids) <= len(cached)


def never(cached, ids):
    "Wrong: with nothing to read, there are no logits"
    return False


RIGHT = dict(my_rule=[by_running_sums], my_guess=[up_to_the_number], my_failures=[is_a_beginning])
WRONG = dict(
    my_rule=[always_half, as_few_as_possible, half_of_the_turns, not_even_the_last],
    my_guess=[all_but_the_number, nothing, with_the_number],
    my_failures=[is_the_same, is_shorter, never],
)
