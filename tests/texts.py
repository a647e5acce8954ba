"""Texts in many scripts, made up here: no language, no source, no licence.

The same for the same seed, on any machine.

`many_scripts` is for training (its words come back, as words do), `random_string` for everything
a person would not type."""

import random
import unicodedata
from functools import cache


def span(first, last):
    return [chr(c) for c in range(ord(first), ord(last) + 1)]


VOWELS = list('aeiouyàáâäæèéêëìíîïòóôöøùúûüāēīőű')
LATIN = list('bcdfghjklmnpqrstvwxzçčðğłñřšßþžđ')
GREEK = [*span('α', 'ω'), *'άέήίόύώ']
CYRILLIC = [*span('а', 'я'), *'ёїєґћ']
ARABIC = [*span('ا', 'غ'), *span('ف', 'ي')]
HEBREW = span('א', 'ת')
DEVANAGARI = span('क', 'ह')
MATRAS = [*span('ा', 'ौ'), '्', 'ं', '']
THAI, THAI_MARKS = span('ก', 'ฮ'), [*'ะาิีึืุู่้เแโ', '']
HANGUL, HAN = span('가', '힣'), span('一', '鿋')
HIRAGANA, KATAKANA = span('ぁ', 'ゖ'), span('ァ', 'ヺ')
FACES = ['🏠', '😀', '👍🏽', '👩‍🚀', '👨‍👩‍👧‍👦', '🇪🇺', '🏳️‍🌈', '❤️', '1️⃣', '🤷🏿‍♀️']
SPACES = [' '] * 60 + [
    '  ',
    '   ',
    '\n',
    '\n\n',
    '\r\n',
    '\t',
    ' \n ',
    '\r\n\r\n',
    '\u00a0',
    '\u2003',
    '\u3000',
    '\u2028',
    '\x0b',
    '\x85',
    '\u200b',
    ' \t',
]
SIGNS = [
    '.',
    ',',
    '!',
    '?',
    '…',
    ' – ',
    ': ',
    ';',
    '"',
    "'s",
    "'ll",
    "'T",
    '’s',
    '(',
    ')',
    '。',
    '、',
    '؟',
    '।',
    '¿',
    '--',
    '***',
    '=>',
    '€',
    '%',
    '\\',
]


@cache
def words(n):
    "n invented words of each script; few letters are common, as in any language"
    rnd = random.Random('words')

    def some(letters, least, most):
        return ''.join(
            letters[int(len(letters) * rnd.random() ** 2)] for _ in range(rnd.randint(least, most))
        )

    def syllables(a, b):
        return ''.join(some(a, 1, 2) + some(b, 1, 1) for _ in range(rnd.randint(1, 4)))

    def cased(w):
        return w if rnd.random() < 0.8 else w.capitalize() if rnd.random() < 0.8 else w.upper()

    kinds = [
        lambda: cased(syllables(LATIN, VOWELS)),
        lambda: unicodedata.normalize('NFD', syllables(LATIN, VOWELS)),
        lambda: cased(some(GREEK, 2, 9)),
        lambda: cased(some(CYRILLIC, 2, 9)),
        lambda: some(ARABIC, 2, 7),
        lambda: some(HEBREW, 2, 6),
        lambda: syllables(DEVANAGARI, MATRAS),
        lambda: syllables(THAI, THAI_MARKS),
        lambda: some(HANGUL, 1, 4),
        lambda: some(HAN, 1, 4),
        lambda: some(HIRAGANA, 1, 6),
        lambda: some(KATAKANA, 2, 7),
        lambda: (
            str(rnd.randint(0, 10 ** rnd.randint(1, 7)))
            + rnd.choice(['', '', '½', '²', '٣', '४', 'Ⅷ'])
        ),
        lambda: rnd.choice(FACES) * rnd.choice([1, 1, 1, 3]),
    ]
    return [[kind() for _ in range(n)] for kind in kinds]


def many_scripts(seed=0, size=600_000, vocabulary=700):
    """About `size` characters: runs of words in one script after another, with signs and odd white
    space between"""
    rnd, out, n = random.Random(f'many scripts {seed}'), [], 0
    while n < size:
        script = rnd.choice(words(vocabulary))
        for _ in range(rnd.randint(3, 30)):
            w = script[int(len(script) * rnd.random() ** 3)]  # some words are common, most are rare
            if rnd.random() < 0.12:
                w += rnd.choice(SIGNS)
            out += [w, rnd.choice(SPACES)]
            n += len(w) + 1
        if rnd.random() < 0.1:
            out.append('abc' * rnd.randint(1, 5) + ' xyz zyx ' * rnd.randint(1, 3))  # ties
    return ''.join(out)


def documents(seed=0, n=1000, size=2000, vocabulary=700):
    "n texts of `size` characters each; their words are the same for every seed"
    text = many_scripts(seed, n * size, vocabulary)
    return [text[k * size : (k + 1) * size] for k in range(n)]


# Every character of Unicode 3.2 (2002), and later faces and joiners. Younger characters are left
# out where libraries are compared: each
# is built with its own edition of Unicode, and what one calls a letter is unassigned, so a sign,
# for another.
OLD = [
    chr(c)
    for c in range(0x110000)
    if unicodedata.ucd_3_2_0.category(chr(c)) not in ('Cn', 'Cs', 'Co')
]
COMMON = [
    *(' ' * 6),
    *'\n\r\t\'\'"..,,-',
    *'aaeeiinnttsdmlrvE019',
    '\u00a0',
    '\u200d',
    '\ufe0f',
    '\u3000',
    '\u0301',
    '²',
    "'ll",
    "'S",
    '  ',
    '\r\n',
    *FACES,
]


def random_string(rnd, longest=60, letters=OLD):
    "Characters from anywhere in Unicode among common ones, in runs of one kind"
    out = []
    for _ in range(rnd.randint(0, longest // 4)):
        kind, n = rnd.random(), rnd.randint(1, 8)
        if kind < 0.45:
            out += rnd.choices(COMMON, k=n)
        elif kind < 0.75:
            out += rnd.choices(letters, k=n)
        elif kind < 0.9:
            at = rnd.randrange(len(letters))
            out += rnd.choices(letters[at : at + 40], k=n)  # neighbours: mostly one script
        else:
            out += [rnd.choice(COMMON + letters[:300])] * rnd.randint(1, 20)
    return ''.join(out)[:longest]
