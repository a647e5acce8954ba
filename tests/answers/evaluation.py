"Answers to the exercises of `25_evaluation`, right and wrong ones; `test_evaluation.py` runs them."

from llm_lab.evaluation import ratio_error


def by_loop(n, T, stride):
    "Right: window after window"
    found = []
    for first in range(1, n, stride):
        end = min(first + stride, n)
        found.append((max(0, end - 1 - T), first, end))
    return found


def from_the_last_token(n, T, stride):
    "Right: the same, counted from the last token that is scored"
    lasts = [min(first + stride - 1, n - 1) for first in range(1, n, stride)]
    firsts = range(1, n, stride)
    return [[max(last - T, 0), first, last + 1] for first, last in zip(firsts, lasts)]


def one_token_too_many(n, T, stride):
    "Wrong: reads T + 1 tokens, because the last one is only predicted"
    return [(max(0, begin - 1), first, end) for begin, first, end in by_loop(n, T, stride)]


def one_token_too_few(n, T, stride):
    "Wrong: counts the token that is only predicted as read"
    found = []
    for first in range(1, n, stride):
        end = min(first + stride, n)
        found.append((max(0, end - T), first, end))
    return found


def without_context(n, T, stride):
    "Wrong: the naive evaluation, with windows as short as the stride"
    return [(first - 1, first, end) for _, first, end in by_loop(n, T, stride)]


def before_the_text(n, T, stride):
    "Wrong: the first windows begin before the text"
    return [(end - 1 - T, first, end) for _, first, end in by_loop(n, T, stride)]


def beyond_the_text(n, T, stride):
    "Wrong: the last window scores tokens that are not there"
    return [
        (max(0, first + stride - 1 - T), first, first + stride) for first in range(1, n, stride)
    ]


def scores_the_first(n, T, stride):
    "Wrong: nothing stands before the first token, so it cannot be predicted"
    return [(begin, first - 1, end) for begin, first, end in by_loop(n, T, stride)]


def difference_first(sums, others, counts):
    "Right: what is common drops out of each document"
    return ratio_error(sums - others, counts)


def other_sign(sums, others, counts):
    "Right: an error has no sign"
    return ratio_error(others - sums, counts)


def as_if_independent(sums, others, counts):
    "Wrong: what is hard for both counts twice"
    return (ratio_error(sums, counts) ** 2 + ratio_error(others, counts) ** 2) ** 0.5


def difference_of_the_errors(sums, others, counts):
    "Wrong: two models with the same spread may differ in every document"
    return abs(ratio_error(sums, counts) - ratio_error(others, counts))


def per_token(sums, others, counts):
    "Wrong: the error of the mean, not of the total"
    return ratio_error(sums - others, counts) / counts.sum()


def bits_of_a_token():
    "Right: 4 and 8 bits a token; copies are taken for independent documents"
    return 16, 256, 0.7


def twice_the_bits():
    "Wrong: the perplexity is squared, not doubled"
    return 16, 32, 0.7


def in_nats():
    "Wrong: takes the bits of a token for nats"
    return 55, 2981, 0.7


def half_as_wide():
    "Wrong: four copies would do that"
    return 16, 256, 0.5


def copies_tell_nothing():
    "Wrong: true of what was measured, but the formula does not know it"
    return 16, 256, 1.0


def read_and_predicted():
    "Right: `begin` decides what is read, never what is scored"
    return 'past', 'past', 'fits'


def wasted_is_harmless():
    "Wrong: with `− 0` a token of context is lost, which does not break the model"
    return 'past', 'fits', 'fits'


def scored_twice():
    "Wrong: no token is scored twice"
    return 'once', 'past', 'fits'


# exercise: (right answers, wrong answers)
ANSWERS = dict(
    windows=(
        [by_loop, from_the_last_token],
        [
            one_token_too_many,
            one_token_too_few,
            without_context,
            before_the_text,
            beyond_the_text,
            scores_the_first,
        ],
    ),
    paired=(
        [difference_first, other_sign],
        [as_if_independent, difference_of_the_errors, per_token],
    ),
    my_guess=(
        [bits_of_a_token],
        [twice_the_bits, in_nats, half_as_wide, copies_tell_nothing],
    ),
    turns_red=([read_and_predicted], [wasted_is_harmless, scored_twice]),
)
