"Answers to the exercises of `12_bpe`, right and wrong ones; `test_bpe.py` runs them."

from collections import Counter

import regex

from llm_lab.bpe import GPT2


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


def ids_by(merge_chunk, cut=regex.compile(GPT2).findall, single=single_bytes):
    "An encoder that cuts the text, merges in each chunk, and looks the ids up"

    def encode(text, merges):
        ids = {bytes([b]): b for b in range(256)}
        ids |= {a + b: 256 + n for n, (a, b) in enumerate(merges)}
        return [ids.get(t, -1) for chunk in cut(text) for t in merge_chunk(single(chunk), merges)]

    return encode


def lowest_rank(parts, merges):
    "Of the pairs that are there, the one learned first, until there is none"
    while known := [p for p in merges if p in set(zip(parts, parts[1:]))]:
        parts = join_pairs(parts, known[0])
    return parts


def each_merge_once(parts, merges):
    "The list of merges from its beginning to its end"
    for pair in merges:
        parts = join_pairs(parts, pair)
    return parts


def first_that_fits(parts, merges):
    "The pair that stands first in the text, if it was ever learned"
    while known := [p for p in zip(parts, parts[1:]) if p in merges]:
        parts = join_pairs(parts, known[0])
    return parts


def longest_token(parts, merges):
    "At each place the longest token of the vocabulary"
    chunk = b''.join(parts)
    made = {a + b for a, b in merges}
    out = []
    while chunk:
        n = max(n for n in range(1, len(chunk) + 1) if n == 1 or chunk[:n] in made)
        out.append(chunk[:n])
        chunk = chunk[n:]
    return out


def learned_last(parts, merges):
    "Of the pairs that are there, the one learned last"
    return lowest_rank(parts, merges[::-1])


def by_rank(text, merges):
    "Right: the pair of the lowest rank, again and again"
    return ids_by(lowest_rank)(text, merges)


def merge_by_merge(text, merges):
    "Right: a merge can only use tokens of earlier ones, so one walk through the list is enough"
    return ids_by(each_merge_once)(text, merges)


def from_left_to_right(text, merges):
    "Wrong: in 'abc' it finds 'ab' before 'bc'"
    return ids_by(first_that_fits)(text, merges)


def the_longest(text, merges):
    "Wrong: merges are not a dictionary of words"
    return ids_by(longest_token)(text, merges)


def the_last_learned(text, merges):
    "Wrong: the order is upside down"
    return ids_by(learned_last)(text, merges)


def without_chunks(text, merges):
    "Wrong: merges cross a space"
    return ids_by(lowest_rank, cut=lambda text: [text])(text, merges)


def by_character(text, merges):
    "Wrong: a character that is no byte has no id"
    single = lambda chunk: [c.encode() for c in chunk]
    return ids_by(lowest_rank, single=single)(text, merges)


RIGHT_ENCODERS = [by_rank, merge_by_merge]
WRONG_ENCODERS = [from_left_to_right, the_longest, the_last_learned, without_chunks, by_character]

ANSWERS = dict(
    my_train=(RIGHT, WRONG),
    my_guess=(RIGHT_GUESSES, WRONG_GUESSES),
    my_encode=(RIGHT_ENCODERS, WRONG_ENCODERS),
)
