"Answers to the exercises of `11_chars`, right and wrong ones; `test_chars.py` runs them."


def by_get(text, chars):
    "Right: `get` has a second argument for what is not there"
    table = {c: n for n, c in enumerate(chars)}
    return [table.get(c, len(chars)) for c in text]


def by_zip(text, chars):
    "Right: every character of the text is unknown at first"
    table = dict.fromkeys(text, len(chars)) | dict(zip(chars, range(len(chars))))
    return [table[c] for c in text]


def not_found(text, chars):
    "Wrong: `find` gives −1, which is the last row of an embedding"
    return [chars.find(c) for c in text]


def the_first(text, chars):
    "Wrong: the unknown shares the id of the first character"
    table = {c: n for n, c in enumerate(chars)}
    return [table.get(c, 0) for c in text]


def left_out(text, chars):
    "Wrong: the text grows shorter"
    table = {c: n for n, c in enumerate(chars)}
    return [table[c] for c in text if c in table]


def an_id_each(text, chars):
    "Wrong: each unknown character gets an id of its own, beyond the vocabulary"
    table = {c: n for n, c in enumerate(chars)}
    return [table.setdefault(c, len(table)) for c in text]


def code_points(text, chars):
    "Wrong: that is Unicode's list, not this one"
    return [ord(c) if c in chars else len(chars) for c in text]


RIGHT = [by_get, by_zip]
WRONG = [not_found, the_first, left_out, an_id_each, code_points]


def with_the_space():
    "Right: the space is a character, and `c` moves what follows it"
    return 5, 4, 5, 5


def without_the_space():
    "Wrong: the space counts"
    return 4, 3, 4, 4


def nothing_moves():
    "Wrong: ids are places in a sorted list"
    return 5, 4, 5, 4


RIGHT_GUESSES = [with_the_space]
WRONG_GUESSES = [without_the_space, nothing_moves]

ANSWERS = dict(
    with_unknown=(RIGHT, WRONG),
    my_guess=(RIGHT_GUESSES, WRONG_GUESSES),
)
