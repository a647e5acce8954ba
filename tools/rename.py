"""Give names other names, in notebooks, tests, tools and experiments: identifiers only.

    python tools/rename.py NAMES.json [ROOT]

NAMES.json says {"files.written": "atomic_write", …}: the module, the name today, the name from now
on. A name is changed where it is this name: where its module defines it, where it was imported,
where a module's attribute is asked for; not a variable, a parameter, a keyword or a method that
happens to be called so. In prose, comments and docstrings it is changed where it stands in
backticks. Code in strings is read as code if it imports the package.

Where NAMES.json is a list, it holds rules for members, keywords and parameters: see members.py.

What a program cannot decide is printed: a chapter or test that already has the new name, or one
that binds the old name a second time at its top level.
"""

import ast
import re
import sys

from members import rename_members
from notebooks import PACKAGE, main, put, read, scripts, source, tree, write, write_notebook

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


# ---- who binds a name


def stores(node):
    "Names that a statement or expression binds in its own scope"
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
        return
    if isinstance(node, (ast.Lambda, *COMPREHENSIONS)):
        # `:=` inside a comprehension binds outside of it
        yield from (o.target.id for o in ast.walk(node) if isinstance(o, ast.NamedExpr))
        return
    if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
        yield node.id
    if isinstance(node, ast.ExceptHandler) and node.name:
        yield node.name
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        # what comes from the package keeps its meaning, also where a function imports it
        ours = (getattr(node, 'module', None) or '').startswith(f'{PACKAGE}.')
        yield from ((a.asname or a.name).split('.')[0] for a in node.names if a.asname or not ours)
    for child in ast.iter_child_nodes(node):
        yield from stores(child)


def own(scope):
    "Names that a function, lambda or comprehension has for itself"
    if isinstance(scope, COMPREHENSIONS):
        return {n for g in scope.generators for n in stores(g.target)}
    a = scope.args
    names = {x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if x}
    if isinstance(scope, ast.Lambda):
        return names
    given = {n for o in ast.walk(scope) if isinstance(o, ast.Global) for n in o.names}
    return (names | {n for s in scope.body for n in stores(s)}) - given


def globals_in(node, names, hidden=frozenset()):
    "(node, name, names that are hidden there) of all that means a global of `names` below a node"
    if isinstance(node, ast.Name) and node.id in names and node.id not in hidden:
        yield node, node.id, hidden
    if isinstance(node, ast.ClassDef):  # its own names are seen by its lines, not by its methods
        mine = hidden | {n for s in node.body for n in stores(s)}
        for o in ast.iter_child_nodes(node):
            inside = o in node.body and not isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef))
            yield from globals_in(o, names, mine if inside else hidden)
        return
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, *COMPREHENSIONS)):
        outer = hidden
        hidden = hidden | own(node)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            # defaults, decorators and annotations are read outside
            a = node.args
            outside = [*node.decorator_list, *a.defaults, *filter(None, a.kw_defaults)]
            every = (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg)
            outside += [x.annotation for x in every if x and x.annotation]
            outside += [node.returns] if node.returns else []
            for o in outside:
                yield from globals_in(o, names, outer)
            for o in node.body:
                yield from globals_in(o, names, hidden)
            return
        if isinstance(node, COMPREHENSIONS):
            yield from globals_in(node.generators[0].iter, names, outer)
            for o in ast.iter_child_nodes(node):
                if o is node.generators[0]:
                    for x in (o.target, *o.ifs):
                        yield from globals_in(x, names, hidden)
                else:
                    yield from globals_in(o, names, hidden)
            return
    for o in ast.iter_child_nodes(node):
        yield from globals_in(o, names, hidden)


# ---- one file


class File:
    "A module, a test, or all code cells of a notebook: texts that share their global names"

    def __init__(self, texts, names, stem='', where=''):
        self.texts = texts
        self.names = names
        self.stem = stem
        self.where = where
        self.notes = []
        self.trees = [tree(t) for t in texts]
        self.here = self.meant()

    def meant(self):
        "{global name: new name} of what this file defines or imports, and {alias: module}"
        found = {n: new for (module, n), new in self.names.items() if module == self.stem}
        self.modules = {}
        for t in filter(None, self.trees):
            for o in ast.walk(t):
                if isinstance(o, ast.ImportFrom) and (o.module or '').startswith(f'{PACKAGE}.'):
                    for a in o.names:
                        new = self.names.get((o.module.split('.')[1], a.name))
                        if new and not a.asname:
                            found[a.name] = new
                if isinstance(o, ast.ImportFrom) and o.module == PACKAGE:
                    self.modules |= {a.asname or a.name: a.name for a in o.names}
                if isinstance(o, ast.Import):
                    for a in o.names:
                        if a.name.startswith(f'{PACKAGE}.') and a.asname:
                            self.modules[a.asname] = a.name.split('.')[1]
        top = [n for t in filter(None, self.trees) for s in t.body for n in stores(s)]
        for old, new in found.items():
            if new in top:
                self.notes.append(f'{self.where}: {new} is there already, {old} would be called so')
            if top.count(old) > ((self.stem, old) in self.names):
                self.notes.append(f'{self.where}: {old} is bound {top.count(old)} times')
        return found

    def renamed(self):
        return [self.text(t, tree_) for t, tree_ in zip(self.texts, self.trees)]

    def text(self, text, parsed):
        if parsed is not None:
            text = self.code(text, parsed)
        for (module, old), new in self.names.items():
            address = rf'\b({PACKAGE}\.{module}[.:]){old}\b'
            text = re.sub(address, rf'\g<1>{new}', text)
            for alias, named in self.modules.items():
                if named == module:
                    # setattr(files, 'written', …)
                    text = re.sub(rf"\b({alias}, ')({old})'", rf"\g<1>{new}'", text)
            text = backticks(text, module, old, new)
        return text

    def code(self, text, parsed):
        edits = []  # (line, column in bytes, length in bytes, new)
        lines = text.split('\n')

        def edit(line, column, old, new):
            edits.append((line, column, len(old.encode()), new))

        strings = [o for o in ast.walk(parsed) if isinstance(o, ast.JoinedStr)]
        inside = {id(x): s for s in strings for x in ast.walk(s)}
        formatted = {}
        for node, name, hidden in globals_in(parsed, self.here):
            if (new := self.here[name]) in hidden:
                self.notes.append(f'{self.where}: {new} is a variable where {name} is called')
            if id(node) in inside:
                formatted.setdefault(id(inside[id(node)]), (inside[id(node)], set()))[1].add(name)
            else:
                edit(node.lineno, node.col_offset, name, self.here[name])
        for o in ast.walk(parsed):
            if isinstance(o, ast.ImportFrom) and (o.module or '').startswith(f'{PACKAGE}.'):
                for a in o.names:
                    if new := self.names.get((o.module.split('.')[1], a.name)):
                        edit(a.lineno, a.col_offset, a.name, new)
            if isinstance(o, ast.Attribute) and isinstance(o.value, ast.Name):
                module = self.modules.get(o.value.id)
                if (new := self.names.get((module, o.attr))) and id(o) not in inside:
                    end = o.end_col_offset - len(o.attr.encode())
                    edit(o.end_lineno, end, o.attr, new)
        if self.stem:
            for o in parsed.body:
                if isinstance(o, (ast.FunctionDef, ast.ClassDef)) and o.name in self.here:
                    patched = any(ast.unparse(d).startswith('patch') for d in o.decorator_list)
                    if not patched:
                        word = 'class ' if isinstance(o, ast.ClassDef) else 'def '
                        edit(o.lineno, o.col_offset + len(word), o.name, self.here[o.name])
        for line, column, length, new in sorted(set(edits), reverse=True):
            raw = lines[line - 1].encode()
            lines[line - 1] = (raw[:column] + new.encode() + raw[column + length :]).decode()
        text = '\n'.join(lines)
        for s, names in formatted.values():
            text = self.in_fstring(text, s, names)
        return self.in_strings(text)

    def in_fstring(self, text, node, names):
        "Python 3.11 does not tell where a name stands in an f-string: it is looked for in braces"
        lines = text.split('\n')
        part = '\n'.join(lines[node.lineno - 1 : node.end_lineno])
        for name in names:
            part = re.sub(
                r'\{[^{}]*\}',
                lambda m: re.sub(rf'(?<![\w.\'"]){name}\b(?!\s*=[^=])', self.here[name], m[0]),
                part,
            )
        lines[node.lineno - 1 : node.end_lineno] = part.split('\n')
        return '\n'.join(lines)

    def in_strings(self, text):
        "Scripts in strings: what they import from the package is renamed in them"

        def script(m):
            body = m[2]
            if f'from {PACKAGE}.' not in body and f'import {PACKAGE}' not in body:
                return m[0]
            parsed = tree(body.replace('{{', '(').replace('}}', ')'))
            if parsed is None:
                self.notes.append(f'{self.where}: a script in a string could not be read')
                return m[0]
            return m[1] + File([body], self.names).renamed()[0] + m[1]

        return re.sub(r'("""|\'\'\')(.*?)\1', script, text, flags=re.S)


def backticks(text, module, old, new):
    "`old`, `old(…)` and `old.x` in prose, comments and docstrings"
    return re.sub(rf'(`(?:{module}\.)?){old}(?=[`(.])', rf'\g<1>{new}', text)


# ---- all files


def rename(root, names):
    "Do it; returns what has to be looked at by hand"
    if isinstance(names, list):
        return rename_members(root, names)
    names = {tuple(k.split('.')): v for k, v in names.items()}
    notes = []
    for p in sorted((root / 'nbs').glob('*.ipynb')):
        nb = read(p)
        code = [c for c in nb['cells'] if c['cell_type'] == 'code']
        stem = p.stem[3:] if re.match(r'\d\d_', p.stem) else ''
        f = File([source(c) for c in code], names, stem, p.name)
        for c, text in zip(code, f.renamed()):
            put(c, text)
        for c in nb['cells']:
            if c['cell_type'] == 'markdown':
                text = source(c)
                for (module, old), new in names.items():
                    text = backticks(text, module, old, new)
                for block in re.findall(r'```python\n(.*?)```', text, re.S):
                    text = text.replace(block, File([block], names, '', p.name).renamed()[0])
                put(c, text)
        notes += f.notes
        write_notebook(p, nb)
    for p in scripts(root):
        f = File([p.read_text(encoding='utf-8')], names, '', str(p.relative_to(root)))
        write(p, f.renamed()[0])
        notes += f.notes
    for p in (root / 'SECURITY.md', root / 'README.md'):  # a diary keeps the names of its day
        if p.exists():
            text = p.read_text(encoding='utf-8')
            for (module, old), new in names.items():
                text = backticks(text, module, old, new)
            write(p, text)
    return notes


if __name__ == '__main__':
    sys.exit(main(__doc__, rename))
