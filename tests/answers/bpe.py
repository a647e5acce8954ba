"Answers to the exercises of `12_bpe`, right and wrong ones; `test_bpe.py` runs them."

from collections import Counter


def join_pairs(parts, pair):
    "The pair joined wherever it stands, from left to right"
    out = []
    rest = list(parts)
    while rest:
        first = rest.pop(0)
        if rest and (first, rest[0]) == pair:
            first += rest.pop(0)
        out.append(first)
    return out


def learn(parts, n, choose, least=2):
    "Merges of these parts; `choose` takes the pair from its counts"
    merges = []
    while len(merges) < n:
        pairs = Counter(zip(parts, parts[1:]))
        if not pairs or max(pairs.values()) < least:
            break
        pair = choose(pairs)
        merges.append(pair)
        parts = join_pairs(parts, pair)
    return merges


def single_bytes(text):
    "The bytes of a text, each by itself"
    return [bytes([b]) for b in text.encode()]


def by_max(text, n):
    "Right: `max` takes the pair met first"
    return learn(single_bytes(text), n, lambda pairs: max(pairs, key=pairs.get))


def by_most_common(text, n):
    "Right: so does `most_common`"
    return learn(single_bytes(text), n, lambda pairs: pairs.most_common(1)[0][0])


def greater_pair(text, n):
    "Wrong: of equals the greater pair"
    return learn(single_bytes(text), n, lambda pairs: max(pairs, key=lambda p: (pairs[p], p)))


def last_met(text, n):
    "Wrong: of equals the one met last"
    return learn(single_bytes(text), n, lambda pairs: max(reversed(pairs), key=pairs.get))


def never_stops(text, n):
    "Wrong: joins pairs that occur once"
    choose = lambda pairs: max(pairs, key=pairs.get)
    return learn(single_bytes(text), n, choose, least=1)


def characters(text, n):
    "Wrong: begins with characters, so 家 is never joined from its bytes"
    merges = learn(list(text), n, lambda pairs: max(pairs, key=pairs.get))
    return [(a.encode(), b.encode()) for a, b in merges]


def overlapping(text, n):
    "Wrong: joins at every place, so the middle of 'aaa' is used twice"
    parts = single_bytes(text)
    merges = []
    while len(merges) < n:
        pairs = Counter(zip(parts, parts[1:]))
        if not pairs or max(pairs.values()) < 2:
            break
        pair = max(pairs, key=pairs.get)
        merges.append(pair)
        following = [*parts[1:], b'']
        parts = [a + b if (a, b) == pair else a for a, b in zip(parts, following)]
    return merges


RIGHT = [by_max, by_most_common]
WRONG = [greater_pair, last_met, never_stops, characters, overlapping]


def in_binary():
    "Right: aa, aaaa, aaaaaaaa; 6 = 4 + 2, 7 = 4 + 2 + 1; b's stay bytes"
    return 3, 2, 3, 8


def one_more_each_time():
    "Wrong: the token does not grow by one a, because pairs of `aa` are joined next"
    return 7, 1, 1, 8


def unknown_token():
    "Wrong: nothing is unknown to a byte-level tokenizer"
    return 3, 2, 3, 1


RIGHT_GUESSES = [in_binary]
WRONG_GUESSES = [one_more_each_time, unknown_token]
