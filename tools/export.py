"""Writes llm_lab/ from the notebooks, as every editor and `help()` can read it.

nbdev_export turns each chapter into a module. Two things that a reader of the notebook sees are
lost there, so this tool adds them to each module:

- The note beside an argument is a comment, which neither `help(lab.fit)` nor an editor shows. It
  becomes a line of the docstring, under `Args:`.
- A method that a later cell adds with `@patch` is found when the program runs, and by no type
  checker. It is declared in the body of its class, under `if TYPE_CHECKING:`, where nothing runs.

Usage: python tools/export.py
"""

import ast
import io
import subprocess
import sys
import textwrap
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 100
BY_HAND = '__init__.py', '__main__.py'


# ---- the notes beside arguments


def comments(text):
    "{line: (the comment on it, does the line hold nothing else?)}"
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            alone = token.line[: token.start[1]].strip() == ''
            found[token.start[0]] = token.string.lstrip('# ').rstrip(), alone
    return found


def note_of(node, first, said):
    """The note of an argument or a field: behind it, or in lines of their own above it.

    `first` is the first line that can belong to it."""
    line, alone = said.get(node.end_lineno, ('', True))
    if line and not alone:
        return line
    above = []
    n = node.lineno - 1
    while n >= first and said.get(n, ('', False))[1] and n in said:
        above.insert(0, said[n][0])
        n -= 1
    return ' '.join(above)


class _Argument:
    "An argument with its default: from where to where it stands"

    def __init__(self, arg, default):
        self.name = arg.arg
        self.lineno = arg.lineno
        self.end_lineno = max(arg.end_lineno, default.end_lineno if default else 0)


def arguments(f):
    "The arguments of a function, in order, each with its default"
    a = f.args
    ordered = a.posonlyargs + a.args
    defaults = [None] * (len(ordered) - len(a.defaults)) + a.defaults
    pairs = [*zip(ordered, defaults), (a.vararg, None), *zip(a.kwonlyargs, a.kw_defaults)]
    pairs.append((a.kwarg, None))
    return [_Argument(arg, default) for arg, default in pairs if arg]


def signature_notes(f, said):
    "({argument: note}, the note on what it returns) of a function"
    notes = {}
    args = arguments(f)
    lines = [arg.end_lineno for arg in args]
    for arg in args:
        # of several on one line, a comment speaks of none in particular, and on the line of the
        # body it speaks of what is returned
        if lines.count(arg.end_lineno) == 1 and arg.end_lineno > f.lineno:
            notes[arg.name] = note_of(arg, f.lineno + 1, said)
    # what it returns stands behind the colon: on the line of `def`, or on that of the bracket
    begin = f.returns.end_lineno if f.returns else max([f.lineno, *lines])
    behind = []
    for line in range(begin, f.body[0].lineno):
        text, alone = said.get(line, ('', True))
        # a comment in a line of its own belongs to the arguments, unless it follows the colon
        of_arguments = line in lines and line != f.lineno
        if text and not of_arguments and (not alone or line > begin):
            behind.append(text)
        if behind and not alone:
            break  # it is said; what stands below is a reason for the first line
    returned = ' '.join(behind).removeprefix('→').lstrip()
    return {name: note for name, note in notes.items() if note}, returned


def field_notes(cls, said):
    "{field: note} of a data class"
    fields = [n for n in cls.body if isinstance(n, ast.AnnAssign) and n.simple]
    notes = {n.target.id: note_of(n, cls.lineno + 1, said) for n in fields}
    return {name: note for name, note in notes.items() if note}


# ---- docstrings


def docstring(node):
    "The statement that is the docstring, or None"
    first = node.body[0]
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return first if is_text and isinstance(first.value.value, str) else None


def with_notes(doc, notes, returned):
    "A docstring's text with what its arguments are"
    if not doc and not notes:
        return returned
    lines = [doc] if doc else []
    entries = [('Args:', [f'{name}: {note}' for name, note in notes.items()])]
    entries.append(('Returns:', [returned] if returned else []))
    for head, items in entries:
        if items:
            lines += ['', head] if lines else [head]
        for item in items:
            lines += textwrap.wrap(
                item, WIDTH - 12, initial_indent='    ', subsequent_indent='        '
            )
    return '\n'.join(lines)


def written(doc, indent):
    "A docstring as it stands in a module"
    raw = 'r' if '\\' in doc else ''
    quotes = "'''" if '"""' in doc else '"""'
    body = textwrap.indent(doc, indent).lstrip()
    if doc.startswith('Args:'):
        body = f'\n{indent}{body}'  # the first line would lose its indent, and the others theirs
    end = f'\n{indent}' if '\n' in body else ''
    return f'{indent}{raw}{quotes}{body}{end}{quotes}'


def is_dataclass(cls):
    return any('dataclass' in ast.unparse(d) for d in cls.decorator_list)


def documented(node, said):
    "(notes, what is returned) of a function or class"
    if isinstance(node, ast.ClassDef):
        made = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == '__init__']
        notes = signature_notes(made[0], said)[0] if made else {}
        return notes | (field_notes(node, said) if is_dataclass(node) else {}), ''
    return signature_notes(node, said)


def public(tree):
    "The public functions and classes of a module, and the public methods of these"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != '_':
            yield node
            if isinstance(node, ast.ClassDef):
                methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
                yield from (n for n in methods if n.name[0] != '_')


def add_docstrings(text):
    "The source of a module whose docstrings say what the arguments are"
    tree = ast.parse(text)
    said = comments(text)
    lines = text.split('\n')
    for node in sorted(public(tree), key=lambda n: n.lineno, reverse=True):
        notes, returned = documented(node, said)
        if not notes and not returned:
            continue
        old = docstring(node)
        indent = ' ' * (node.col_offset + 4)
        doc = with_notes(ast.get_docstring(node) or '', notes, returned)
        if old:
            lines[old.lineno - 1 : old.end_lineno] = [written(doc, indent)]
        elif node.body[0].lineno > node.lineno:
            first = node.body[0]
            decorators = getattr(first, 'decorator_list', [])
            at = min([first.lineno, *(d.lineno for d in decorators)]) - 1
            lines[at:at] = [written(doc, indent)]
    return '\n'.join(lines)


# ---- what @patch adds


def patched(tree):
    "{class: [(function, is it a class method?, is it a property?)]} of what @patch adds"
    found = {}
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef):
            continue
        for decorator in node.decorator_list:
            call = ast.unparse(decorator)
            is_patch = call.split('(')[0] == 'patch' and node.args.args[0].annotation
            is_private = node.name[0] == '_' and not node.name.startswith('__')
            if is_patch and not is_private:
                owner = ast.unparse(node.args.args[0].annotation)
                kind = 'cls_method' in call, 'as_prop' in call
                found.setdefault(owner, []).append((node, *kind))
    return found


def declaration(f, is_class_method, is_property):
    "A method as it is declared in its class: its signature and its docstring"
    stub = ast.FunctionDef(
        name=f.name,
        args=f.args,
        body=[],
        decorator_list=[],
        returns=f.returns,
        type_params=[],
    )
    stub.args.args[0].annotation = None
    for node in ast.walk(stub.args):
        # in quotes, as a class is not known yet in its own body
        if isinstance(node, ast.arg) and node.annotation:
            node.annotation = ast.Constant(ast.unparse(node.annotation))
    if stub.returns:
        stub.returns = ast.Constant(ast.unparse(stub.returns))
    if is_class_method:
        stub.args.args[0].arg = 'cls'
        stub.decorator_list = [ast.Name('classmethod')]
    if is_property:
        stub.decorator_list = [ast.Name('property')]
    doc = ast.get_docstring(f)
    stub.body = [ast.Expr(ast.Constant(doc))] if doc else []
    stub.body.append(ast.Expr(ast.Constant(...)))
    return ast.unparse(ast.fix_missing_locations(stub))


def formatted(code):
    "Code that will stand eight columns in, laid out as the notebooks are"
    done = subprocess.run(
        ['ruff', 'format', '-', '--config', f'line-length={WIDTH - 8}'],
        input=code,
        capture_output=True,
        text=True,
        encoding='utf-8',
        cwd=ROOT,
        check=True,
    )
    return done.stdout.rstrip().replace('\n\n\n', '\n\n')


def add_declarations(text):
    "The source of a module whose classes declare the methods that @patch adds to them"
    tree = ast.parse(text)
    added = patched(tree)
    lines = text.split('\n')
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name in added]
    for cls in reversed(classes):
        methods = formatted('\n\n'.join(declaration(*one) for one in added[cls.name]))
        body = textwrap.indent(methods, ' ' * 8)
        lines[cls.end_lineno : cls.end_lineno] = [f'\n    if TYPE_CHECKING:\n{body}']
    text = '\n'.join(lines)
    if not classes:
        return text
    first = next(n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)))
    marker = text.split('\n')
    marker[first.lineno - 1 : first.lineno - 1] = [
        'TYPE_CHECKING = False  # a type checker takes it for True'
    ]
    return '\n'.join(marker)


def export(root=ROOT):
    "llm_lab/ from nbs/"
    modules = root / 'llm_lab'
    for path in modules.glob('*.py'):
        if path.name not in BY_HAND:
            path.unlink()
    subprocess.run(['nbdev_export'], cwd=root, check=True)
    for path in sorted(modules.glob('[a-z]*.py')):
        text = path.read_text(encoding='utf-8')
        text = add_declarations(add_docstrings(text))
        path.write_text(text, encoding='utf-8', newline='\n')


if __name__ == '__main__':
    if len(sys.argv) > 1:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    export()
