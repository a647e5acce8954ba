"Answers to the exercises of `62_chat`, right and wrong ones; `test_chat.py` runs them."

import torch

# ---- 1. Build it: which positions predict a token of the last answer?


def _last(found):
    "The last position so far at which something was found; −1 where nothing was"
    return torch.arange(len(found)).where(found, -1).cummax(0).values


def _next(found):
    "How far from the row's end the next such position is; −1 where none comes"
    return _last(found.flip(0)).flip(0)


def _inside(row, header, end):
    "After this token, an answer goes on"
    return _last(row == header) > _last(row == end)


def by_next_position(row, header, end, document):
    """Right: inside an answer, and the next document comes before the next header.

    The header itself is a position, so what follows it is looked at from one position later"""
    row = torch.tensor(row)
    another = _next(row == header) > _next(row == document)  # larger: farther from the end
    return (_inside(row, header, end)[:-1] & ~another[1:]).tolist()


def every_answer(row, header, end, document):
    "Wrong: all answers count, as in the chapter"
    return _inside(torch.tensor(row), header, end)[:-1].tolist()


def last_of_the_row(row, header, end, document):
    "Wrong: a row may hold several conversations, and each has a last answer"
    row = torch.tensor(row)
    return (_inside(row, header, end)[:-1] & (_next(row == header)[1:] < 0)).tolist()


def without_end_marks(row, header, end, document):
    "Wrong: the model would not learn when to stop"
    found = by_next_position(row, header, end, document)
    return [inside and id != end for inside, id in zip(found, row[1:])]


def from_the_header_itself(row, header, end, document):
    "Wrong: a header's own position has that header as the next one, so the first token is lost"
    row = torch.tensor(row)
    another = _next(row == header) > _next(row == document)
    return (_inside(row, header, end) & ~another)[:-1].tolist()


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

    Red are, in the order of the chapter: both tests of `answer_targets` on the conversation of the
    picture, because it begins with `<|user|>` (its targets differ from the slow loop's, and in the
    row that is cut 22 count for 4); both counts of rows that are cut anywhere, with our rule and
    without it (4,440 answers for 3,586, and 4,783 for 3,929); and the comparison of `answer_loss`
    with the plain loss (6.31 for 10.63). Had that plain loss taken its targets from
    `answer_targets`, both sides would be wrong alike, and green: an oracle must not be made of what
    it tests.

    Green are both counts of complete conversations, and all that is tuned: complete rows begin with
    the tokenizer's end mark, so nothing stands before the first mark, and in rows that are cut the
    few targets more change no score by a point. No training would have told."""
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


RIGHT = dict(my_targets=[by_next_position], my_guess=[up_to_the_limit], too_many=[before_any_mark])
WRONG = dict(
    my_targets=[every_answer, last_of_the_row, without_end_marks, from_the_header_itself],
    my_guess=[one_word, nothing, as_long_as_a_question],
    too_many=[none, before_the_header, one_too_late],
)
