"""The half of rename.py for members, keywords and parameters, whose names alone do not say whose
they are: each rule says so.

A rule is {"old": "steps", "new": "transforms"} and what is meant, in regular expressions that match
from end to end. A place in the code is written 'module.Class.method', of a test 'test_x.function',
of an experiment 'NAME.function'.

- "attr": the expression before the dot: 'self|(.*\\.)?attn' for `self.steps`, `block.attn.steps`
- "attr_not": but not these, as 'expression@place': 'self@(?!gqa\\.GQA).*'
- "kw": the function that is called with this keyword, as it stands there
- "param": the place of a function whose parameter or variable it is, with its uses in there
- "defs": the place of the method itself, 'gqa.GQA.steps'
- "field": the place of a class whose field it is
- "files": nothing outside of these modules
- "text": [[regular expression, replacement], …] for what is no code: prose, strings, YAML
"""

import ast
import re

from notebooks import put, read, scripts, source, tree, write, write_notebook

MAGIC = re.compile(r'^([ \t]*)([%!].*|[\w.]+\?+[ \t]*)$', re.M)


def without_magics(text):
    "The text with IPython's own lines replaced by `pass`: all other code stands where it stood"
    if tree(text) is not None or text.lstrip().startswith('%%'):
        return text
    return MAGIC.sub(r'\1pass', text)


def scoped(node, place):
    "(node, place) of all nodes below; a function or class is a place of its own"
    for child in ast.iter_child_nodes(node):
        inner = place
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inner = f'{place}.{child.name}'
        yield child, inner
        yield from scoped(child, inner)


def arguments(function):
    a = function.args
    every = (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg)
    return [x for x in every if x]


def uses(node, name):
    "The names below a node that mean the function's own variable, not one of an inner function"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            if name in [x.arg for x in arguments(child)]:
                continue
        if isinstance(child, ast.Name) and child.id == name:
            yield child
        yield from uses(child, name)


class Members:
    "Rules for one module; `notes` is what has to be looked at by hand"

    def __init__(self, rules, module, where=''):
        fitting = lambda r: 'files' not in r or re.fullmatch(r['files'], module)
        self.rules = [r for r in rules if fitting(r)]
        self.module = module
        self.where = where or module
        self.notes = []

    def prose(self, text):
        "A text with the replacements that rules make anywhere"
        for rule in self.rules:
            for old, new in rule.get('text', ()):
                text = re.sub(old, new, text)
        return text

    def code(self, text):
        "Python, or a cell, with its members, keywords and parameters renamed"
        parsed = tree(without_magics(text))
        if parsed is None:
            return self.prose(text)
        strings = [o for o in ast.walk(parsed) if isinstance(o, ast.JoinedStr)]
        inside = {id(x): s for s in strings for x in ast.walk(s)}
        lines = text.split('\n')
        edits = set()
        formatted = []
        for rule in self.rules:
            for node, line, column, kind in self.meant(rule, parsed, lines):
                if id(node) in inside:
                    formatted.append((inside[id(node)], rule, kind))
                else:
                    edits.add((line, column, rule['old'], rule['new']))
        # from the end to the beginning: what is edited moves nothing that still has to be edited
        for line, column, old, new in sorted(edits, reverse=True):
            raw = lines[line - 1].encode()
            end = column + len(old.encode())
            if raw[column:end].decode() != old:
                self.notes.append(f'{self.where}: line {line} has no {old} at its place')
                continue
            lines[line - 1] = (raw[:column] + new.encode() + raw[end:]).decode()
        for string, rule, kind in formatted:
            self.in_fstring(lines, string, rule, kind)
        return self.prose('\n'.join(lines))

    def in_fstring(self, lines, string, rule, kind):
        "Python 3.11 does not tell where a name stands in an f-string: it is looked for in braces"
        before = dict(attr=r'(?<=\.)', kw=r'(?<![\w.])', name=r'(?<![\w.\'"])')[kind]
        after = r'(?==)' if kind == 'kw' else r'\b'
        name = re.compile(before + re.escape(rule['old']) + after)
        part = '\n'.join(lines[string.lineno - 1 : string.end_lineno])
        part = re.sub(r'\{[^{}]*\}', lambda m: name.sub(rule['new'], m[0]), part)
        lines[string.lineno - 1 : string.end_lineno] = part.split('\n')

    def meant(self, rule, parsed, lines):
        "(node, line, column in bytes, kind) of each place where a rule's old name is that name"
        fits = lambda key, said: key in rule and re.fullmatch(rule[key], said)
        old = rule['old']
        for node, place in scoped(parsed, self.module):
            if isinstance(node, ast.Attribute) and node.attr == old:
                owner = ast.unparse(node.value)
                if fits('attr', owner) and not fits('attr_not', f'{owner}@{place}'):
                    yield node, node.end_lineno, node.end_col_offset - len(old.encode()), 'attr'
            if isinstance(node, ast.Call) and fits('kw', ast.unparse(node.func)):
                for keyword in node.keywords:
                    if keyword.arg == old:
                        yield keyword, keyword.lineno, keyword.col_offset, 'kw'
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if node.name == old and fits('defs', place):
                    line = lines[node.lineno - 1].encode()
                    yield node, node.lineno, line.index(b'def ') + len(b'def '), 'name'
                if fits('param', place):
                    yield from self.parameter(node, old, place)
            if isinstance(node, ast.ClassDef) and fits('field', place):
                for name in fields(node, old):
                    yield name, name.lineno, name.col_offset, 'name'

    def parameter(self, function, old, place):
        "The places of a function's parameter or variable, as `meant` gives them"
        found = [x for x in arguments(function) if x.arg == old]
        for statement in function.body:
            found += uses(ast.Module([statement], []), old)
        if not found:
            self.notes.append(f'{self.where}: {place} has no parameter or variable {old}')
        for node in found:
            yield node, node.lineno, node.col_offset, 'name'


def fields(cls, name):
    "The targets of this name in the body of a class"
    for statement in cls.body:
        if isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        elif isinstance(statement, ast.Assign):
            targets = statement.targets
        else:
            continue
        for target in targets:
            if isinstance(target, ast.Name) and target.id == name:
                yield target


def module_of(path):
    "What a place in this file begins with"
    if path.name == 'run.py':
        return path.parent.name
    return re.sub(r'^\d\d_', '', path.stem)


def rename_members(root, rules):
    "Do it, in notebooks, tests, tools, experiments and their configurations; returns the notes"
    notes = []
    for path in sorted((root / 'nbs').glob('*.ipynb')):
        nb = read(path)
        members = Members(rules, module_of(path), path.name)
        for cell in nb['cells']:
            change = members.code if cell['cell_type'] == 'code' else members.prose
            put(cell, change(source(cell)))
        write_notebook(path, nb)
        notes += members.notes
    for path in scripts(root):
        members = Members(rules, module_of(path), str(path.relative_to(root)))
        write(path, members.code(path.read_text(encoding='utf-8')))
        notes += members.notes
    for path in sorted((root / 'experiments').glob('*/*.yaml')):
        members = Members(rules, path.parent.name)
        write(path, members.prose(path.read_text(encoding='utf-8')))
    return notes
