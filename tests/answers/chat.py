"Answers to the exercises of `62_chat`, right and wrong ones; `test_chat.py` runs them."

import torch

# ---- 1. Build it: which positions predict a token of an answer?


def _last(found):
    "The last position so far at which something was found; −1 where nothing was"
    return torch.arange(len(found)).where(found, -1).cummax(0).values


def by_last_position(row, header, end):
    "Right: inside where the last header came after the last end mark"
    row = torch.tensor(row)
    return (_last(row == header) > _last(row == end))[:-1].tolist()


def by_counting(row, header, end):
    "Wrong: users end their turns with the same mark, so ends are more than headers"
    row = torch.tensor(row)
    return ((row == header).cumsum(0) > (row == end).cumsum(0))[:-1].tolist()


def without_end_marks(row, header, end):
    "Wrong: the model would not learn when to stop"
    found = by_last_position(row, header, end)
    return [inside and id != end for inside, id in zip(found, row[1:])]


def with_headers(row, header, end):
    "Wrong: the header is written by the template, never by the model"
    found = by_last_position(row, header, end)
    return [inside or id == header for inside, id in zip(found, row[1:])]


# ---- 2. Predict, run, explain: the loss leaves the end marks out; how long is an answer?


def up_to_the_limit(limit):
    """Right: the answer never ends by itself.

    The end mark is never a target, so no step makes it more likely; and each step that makes a word
    more likely takes from all other tokens, the end mark among them. The first word is learned as
    before. Of what comes after it the loss says nothing, so the model goes on with words that it
    knows from answers, until somebody stops it."""
    return limit


def one_word(limit):
    "Wrong: that an answer is one word was told by the end mark behind it, and by nothing else"
    return 1


def nothing(limit):
    "Wrong: the first word is still a target"
    return 0


def as_long_as_a_question(limit):
    "Wrong: the questions do not count, so their length is not learned either"
    return min(limit, 5)


# ---- 3. Break it: `headers >= closed`; which targets count now that must not?


def before_any_mark(row, header, end):
    """Right: all up to the first header or end mark, where both positions are −1.

    In the chapter the comparisons of `answer_targets` and of `answer_loss` with the slow loop turn
    red, because that conversation begins with `<|user|>`. Had the loss been compared with one that
    takes its targets from `answer_targets`, both sides would be wrong alike, and green: an oracle
    must not be made of what it tests. The count of answers turns red in rows that are cut anywhere:
    there are more than 4,000 now. And no training with rows of complete conversations tells: each
    begins with the tokenizer's end mark, so nothing stands before the first mark. Such a slip waits
    until somebody changes the rows."""
    seen = False
    wrong = []
    for id in row[:-1]:
        seen = seen or id in (header, end)
        wrong.append(not seen)
    return wrong


def none(row, header, end):
    "Wrong: no token is a header and an end mark, but both are missing at the beginning"
    return [False] * (len(row) - 1)


def before_the_header(row, header, end):
    "Wrong: after an end mark its position is 0 or more, and that of no header is −1"
    return [header not in row[: t + 1] for t in range(len(row) - 1)]


def one_too_late(row, header, end):
    "Wrong: a mark counts at its own position already"
    return [not {header, end} & {*row[:t]} for t in range(len(row) - 1)]


RIGHT = dict(my_targets=[by_last_position], my_guess=[up_to_the_limit], too_many=[before_any_mark])
WRONG = dict(
    my_targets=[by_counting, without_end_marks, with_headers],
    my_guess=[one_word, nothing, as_long_as_a_question],
    too_many=[none, before_the_header, one_too_late],
)
