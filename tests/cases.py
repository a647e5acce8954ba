"""How many cases a test with many of them tries: a tenth in `make test`, all of them in `make nightly`.

`make nightly` sets LLM_LAB_EXAMPLES; `pytest -m ''` (slow tests too) counts as nightly, see conftest.py.
"""
import os

ALL = 'LLM_LAB_EXAMPLES' in os.environ
EXAMPLES = int(os.environ.get('LLM_LAB_EXAMPLES', 50))        # of hypothesis, for each property
HANG = 1800  # seconds: no result hangs on it, a machine may be as slow as it likes; only what never ends meets it


def cases(n, least=3):
    "How many of n random cases are tried: n, or a tenth and at least a few"
    return n if ALL else min(n, max(least, n//10))


def some(kinds, least=3):
    "All of these kinds, or a tenth, spread evenly over them"
    kinds = list(kinds)
    n = cases(len(kinds), least)
    return [kinds[i*len(kinds)//n] for i in range(n)]
