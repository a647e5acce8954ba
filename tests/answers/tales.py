"Answers to the exercises of `13_tales`, right and wrong ones; `test_tales.py` runs them."

import math


def _entropy(weights):
    total = sum(weights)
    return sum(w / total * math.log2(total / w) for w in weights)


def bits_left(options, weights, word):
    "Right: the entropy of what still fits, with weights scaled to sum 1"
    left = list(zip(options, weights))
    bits = [_entropy(weights)]
    for n in range(1, len(word) + 1):
        left = [(option, weight) for option, weight in left if option[:n] == word[:n]]
        bits.append(_entropy([weight for _, weight in left]))
    return bits


def yet_to_pay(options, weights, word):
    "Wrong: the surprisal of the rest of this word, and not its mean over all that still fit"
    mine = weights[options.index(word)]
    bits = []
    for n in range(len(word) + 1):
        fits = [weight for option, weight in zip(options, weights) if option[:n] == word[:n]]
        bits.append(math.log2(sum(fits) / mine))
    return bits


def shares(options, weights, word):
    "Wrong: what each character costs, as in `_shares`"
    bits = yet_to_pay(options, weights, word)
    return [before - after for before, after in zip(bits, bits[1:])]


def without_weights(options, weights, word):
    "Wrong: as if all options were equally likely"
    return bits_left(options, [1] * len(options), word)


def not_scaled(options, weights, word):
    "Wrong: the probabilities of what is left no longer sum to 1"
    bits = []
    for n in range(len(word) + 1):
        fits = [weight for option, weight in zip(options, weights) if option[:n] == word[:n]]
        bits.append(sum(w / sum(weights) * math.log2(sum(weights) / w) for w in fits))
    return bits


def without_the_beginning(options, weights, word):
    "Wrong: before the first character, too, something is left"
    return bits_left(options, weights, word)[1:]


def predicted():
    "Right: only (b) and (e) change the bits, (c) and (d) only add characters"
    return ['same', 'up', 'down', 'down', 'up']


def longer_is_harder():
    "Wrong: more characters must cost more"
    return ['same', 'up', 'up', 'up', 'up']


def recalls_cost():
    "Wrong: as if a name that is repeated had to be guessed again"
    return ['same', 'up', 'down', 'up', 'up']


def likely_is_all_the_same():
    "Wrong: as if two verbs were one bit, however likely they are"
    return ['same', 'same', 'down', 'down', 'up']


def still_true():
    "Right: the space after `Ann` tells the texts apart, but it is read after the name"
    return [True, False, False]


def all_breaks():
    "Wrong: no two of the texts are the same, so the entropy is as before"
    return [False, False, False]


def shares_hold():
    "Wrong: the last bit of `Ann` is paid by the space that follows"
    return [True, False, True]


ANSWERS = dict(  # the name of the exercise: (right ones, wrong ones)
    bits_left=(
        [bits_left],
        [yet_to_pay, shares, without_weights, not_scaled, without_the_beginning],
    ),
    predicted=([predicted], [longer_is_harder, recalls_cost, likely_is_all_the_same]),
    still_true=([still_true], [all_breaks, shares_hold]),
)
