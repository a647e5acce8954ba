"""How many cases a test with many of them tries: a tenth in `make test`, all of them in `make
nightly`.

`make nightly` sets LLM_LAB_EXAMPLES; `pytest -m ''` (slow tests too) counts as nightly, see
conftest.py."""

import os

ALL = 'LLM_LAB_EXAMPLES' in os.environ
EXAMPLES = int(os.environ.get('LLM_LAB_EXAMPLES', 50))  # of hypothesis, for each property
# seconds: no result hangs on it, a machine may be as slow as it likes; only what never ends meets
# it
HANG = 1800


def cases(n, least=3):
    "How many of n random cases are tried: n, or a tenth and at least a few"
    return n if ALL else min(n, max(least, n // 10))


def some(kinds, least=3):
    "All of these kinds, or a tenth, spread evenly over them; the first is always there"
    kinds = list(kinds)
    n = cases(len(kinds), least)
    return [kinds[i * len(kinds) // n] for i in range(n)]


def crossed(kinds, ways):
    "Each kind in each way; or each kind in one way, taken in turn, so that every way comes as well"
    kinds, ways = list(kinds), list(ways)
    if ALL:
        return [(k, w) for k in kinds for w in ways]
    n = max(len(kinds), len(ways))
    return [(kinds[i % len(kinds)], ways[i % len(ways)]) for i in range(n)]


def covering(draws, features):
    "All of these draws; or a few that have, together, every feature that any of them has"
    draws = list(draws)
    if ALL:
        return draws
    chosen, missing = [], set().union(*map(features, draws))
    while missing:
        best = max(draws, key=lambda draw: len(missing & features(draw)))
        chosen.append(best)
        missing -= features(best)
    return chosen
