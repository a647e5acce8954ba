"""The tool that writes llm_lab/: notes become docstrings, patched methods are declared."""

import ast
import inspect
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'tools'))
import export  # noqa: E402

SOURCE = '''"A module"
from dataclasses import dataclass
from fastcore.basics import patch


def shape(
    n: int,  # rows
    # columns; above its line,
    # and of two lines
    m=3,
    *rest,
    key=None,  # of the `lock`
) -> tuple:  # rows
    "The shape"
    return n, m


def one_line(a, b):  # → their sum
    return a + b


def none(a, b):
    return a  # no note


def no_text(
    a,  # first
):
    return a


def below(a, b):
    # of both,
    # in two lines
    "Sum"
    return a + b


@dataclass
class Point:
    "A point"

    x: float  # to the right
    y: float = 0.0  # up


class Counter:
    "Counts"

    def __init__(
        self,
        start=0,  # the first number
    ):
        self.n = start


@patch
def add(
    self: Counter,
    by: int = 1,  # steps
) -> Counter:
    "Go on"
    self.n += by
    return self


@patch(cls_method=True)
def zero(cls: Counter):
    return cls(0)


@patch(as_prop=True)
def double(self: Counter):
    return 2 * self.n


@patch
def _hidden(self: Counter):
    pass
'''


def made(text):
    names = {}
    exec(compile(text, 'made', 'exec'), names)
    return names


def test_a_note_beside_an_argument_is_a_line_of_the_docstring():
    names = made(export.add_docstrings(SOURCE))
    said = inspect.getdoc(names['shape'])
    assert said == (
        'The shape\n\nArgs:\n    n: rows\n    m: columns; above its line, and of two lines\n'
        '    key: of the `lock`\n\nReturns:\n    rows'
    )
    assert inspect.getdoc(names['one_line']) == 'their sum'
    assert inspect.getdoc(names['no_text']) == 'Args:\n    a: first'
    assert inspect.getdoc(names['below']) == 'Sum\n\nReturns:\n    of both, in two lines'
    assert names['none'].__doc__ is None
    assert inspect.getdoc(names['Point']) == 'A point\n\nArgs:\n    x: to the right\n    y: up'
    assert inspect.getdoc(names['Counter']) == 'Counts\n\nArgs:\n    start: the first number'


def test_nothing_else_changes():
    def bare(text):
        tree = ast.parse(text)
        for node in ast.walk(tree):
            body = getattr(node, 'body', None)
            if isinstance(body, list) and body and export.docstring(node):
                del body[0]
        return ast.unparse(tree)

    assert bare(export.add_docstrings(SOURCE)) == bare(SOURCE)


def test_what_patch_adds_is_declared_in_the_class_and_never_runs():
    text = export.add_declarations(export.add_docstrings(SOURCE))
    names = made(text)
    assert names['Counter'](3).add(2).double == 10 and names['Counter'].zero().n == 0
    cls = next(n for n in ast.parse(text).body if getattr(n, 'name', '') == 'Counter')
    block = cls.body[-1]
    assert ast.unparse(block.test) == 'TYPE_CHECKING'
    said = {f.name: ast.unparse(f).splitlines()[:2] for f in block.body}
    assert said == {
        'add': ["def add(self, by: 'int'=1) -> 'Counter':", '    """Go on'],
        'zero': ['@classmethod', 'def zero(cls):'],
        'double': ['@property', 'def double(self):'],
    }
