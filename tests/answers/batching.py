"Answers to the exercises of `14_batching`, right and wrong ones; `test_batching.py` runs them."


def last_round_first(left, right, a, b):
    "Right: the second line of `forth` is undone first"
    right = (right - 5 * left**3 - 1) % b
    return (left - 7 * right * right - 3) % a, right


def by_search(left, right, a, b):
    "Right, and slow: tries all of each half"
    before = next(r for r in range(b) if (r + 5 * left**3 + 1) % b == right)
    return next(l for l in range(a) if (l + 7 * before * before + 3) % a == left), before


def in_the_order_of_forth(left, right, a, b):
    "Wrong: undoes the first line first, with a `right` that was not there yet"
    left = (left - 7 * right * right - 3) % a
    return left, (right - 5 * left**3 - 1) % b


def only_one_round(left, right, a, b):
    "Wrong: one of two rounds"
    return left, (right - 5 * left**3 - 1) % b


def not_wrapped(left, right, a, b):
    "Wrong: leaves the rectangle"
    right = right - 5 * left**3 - 1
    return left - 7 * right * right - 3, right


RIGHT = [last_round_first, by_search]
WRONG = [in_the_order_of_forth, only_one_round, not_wrapped]


def three_left_over():
    "Right: ⌊15/4⌋ spans, 15 − 12 tokens, and 3 + 2 sequences of documents"
    return 3, 3, 5


def the_last_one_padded():
    "Wrong: as if the last span were filled up"
    return 4, 0, 5


def documents_share():
    "Wrong: as if a sequence held the end of one document and the beginning of the next"
    return 3, 3, 4


RIGHT_GUESSES = [three_left_over]
WRONG_GUESSES = [the_last_one_padded, documents_share]

ANSWERS = dict(
    back=(RIGHT, WRONG),
    my_guess=(RIGHT_GUESSES, WRONG_GUESSES),
)
