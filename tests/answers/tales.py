"Answers to the exercises of `13_tales`, right and wrong ones; `test_tales.py` runs them."

import math


def share_bits(options, weights, word):
    "Right: what is left before and after each character"
    left = list(zip(options, weights))
    bits = []
    for n in range(1, len(word) + 1):
        fits = [(option, weight) for option, weight in left if option[:n] == word[:n]]
        bits.append(math.log2(sum(w for _, w in left) / sum(w for _, w in fits)))
        left = fits
    return bits


def evenly(options, weights, word):
    "Wrong: the sum is right, but each character gets the same"
    bits = math.log2(sum(weights) / weights[options.index(word)])
    return [bits / len(word)] * len(word)


def all_at_once(options, weights, word):
    "Wrong: the sum is right, but the first character gets all of it"
    bits = math.log2(sum(weights) / weights[options.index(word)])
    return [bits] + [0.0] * (len(word) - 1)


def without_weights(options, weights, word):
    "Wrong: as if all options were equally likely"
    return share_bits(options, [1] * len(options), word)


def from_the_whole(options, weights, word):
    "Wrong: each character is held against all options, not against those that are left"

    def fits(n):
        return sum(weight for option, weight in zip(options, weights) if option[:n] == word[:n])

    return [math.log2(sum(weights) / fits(n)) for n in range(1, len(word) + 1)]


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
    share_bits=([share_bits], [evenly, all_at_once, without_weights, from_the_whole]),
    predicted=([predicted], [longer_is_harder, recalls_cost, likely_is_all_the_same]),
    still_true=([still_true], [all_breaks, shares_hold]),
)
