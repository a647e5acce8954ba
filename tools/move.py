"""Move chapters and cells to other notebooks; imports and addresses follow, everywhere.

    python tools/move.py PLAN.json [ROOT]

The plan says for each new notebook where its cells come from:

    {"34_gqa": "17_gqa",
     "22_gpt": {"from": "06_gpt", "cells": ["1544b87d", …], "main": true},
     "20_parts": {"from": "06_gpt", "cells": ["a9acbb67", …], "title": "# Parts\\n\\n> why"}, …}

A text renames a notebook. Cells are named by their ids, in order; a notebook that is taken apart
must name each cell once. Of its parts, the one with `main` keeps the first cells and stands for
the old name where nothing else decides; others begin with their `title`. "names" may say for
single names, `{"train.trained": "package"}`, that their cell was taken to another notebook before.
In notebooks, tests, tools and experiments (also in code that stands in strings)

- `from llm_lab.OLD import a, b` asks each name's new home,
- 'llm_lab.OLD:NAME', 'llm_lab.OLD.NAME' and OLD_NUMBER_stem.ipynb follow,
- a part gets the imports that its exported cells need, generated from what they use.

What a program cannot decide is printed: modules that are imported whole, names without a home.
"""

import ast
import builtins
import json
import re
import symtable
import sys

from notebooks import PACKAGE, main, put, read, scripts, source, tree, write, write_notebook

EXPORT = re.compile(r'^#\|\s*export\b', re.M)
FROM = re.compile(rf'from {PACKAGE}\.(\w+) import (\([^)]*\)|[^\n\\;\'"#]+)')
WIDTH = 100


def top_level(text):
    "The statements of a cell; none if it holds IPython's own lines"
    parsed = tree(text)
    return parsed.body if parsed else []


def defined(text):
    "Names that the top level of a cell gives"
    for node in top_level(text):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            if not any(ast.unparse(d).startswith('patch') for d in node.decorator_list):
                yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))


def imported(text):
    "Names that the top level of a cell imports"
    for node in top_level(text):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((a.asname or a.name).split('.')[0] for a in node.names)


def used(text):
    "Names that a cell reads and that are none of a function's own"

    def of(table):
        top = table.get_type() == 'module'
        for s in table.get_symbols():
            if s.is_referenced() and (top or s.is_global()):
                yield s.get_name()
        for inner in table.get_children():
            yield from of(inner)

    try:
        return set(of(symtable.symtable(text, 'cell', 'exec')))
    except SyntaxError:
        return set()


class Book:
    "The notebooks before the move, and what the plan makes of them"

    def __init__(self, root, plan):
        plan = dict(plan)
        self.taken = {tuple(k.split('.')): new for k, new in plan.pop('names', {}).items()}
        self.root, self.plan = root, plan
        self.notes = []
        names = {p if isinstance(p, str) else p['from'] for p in plan.values()}
        self.old = {n: read(root / 'nbs' / f'{n}.ipynb') for n in names}
        self.parts = {n: [new for new, p in plan.items() if self.origin(p) == n] for n in names}
        self.check()
        self.new = {new: self.cells_of(p) for new, p in plan.items()}
        self.homes = {**dict(self.find_homes()), **self.taken}
        self.imports = dict(self.find_imports())

    @staticmethod
    def origin(p):
        return p if isinstance(p, str) else p['from']

    def check(self):
        for old, parts in self.parts.items():
            if len(parts) == 1:
                continue
            ids = [i for new in parts for i in self.plan[new]['cells']]
            there = [c['id'] for c in self.old[old]['cells']]
            missing = set(there) - set(ids)
            twice = {i for i in ids if ids.count(i) > 1}
            unknown = set(ids) - set(there)
            if missing or twice or unknown:
                raise SystemExit(f'{old}: missing {missing}, twice {twice}, unknown {unknown}')

    def cells_of(self, p):
        cells = {c['id']: c for c in self.old[self.origin(p)]['cells']}
        return [cells[i] for i in (cells if isinstance(p, str) else p['cells'])]

    def find_homes(self):
        "((old stem, name), new stem) for each name of an exported cell"
        for new, p in self.plan.items():
            for cell in self.new[new]:
                if cell['cell_type'] == 'code' and EXPORT.search(source(cell)):
                    for name in defined(source(cell)):
                        yield (self.origin(p)[3:], name), new[3:]

    def find_imports(self):
        "((old notebook, name), statement) for each name that a notebook imports at its top level"
        for old, nb in self.old.items():
            for cell in nb['cells']:
                if cell['cell_type'] != 'code':
                    continue
                for node in top_level(source(cell)):
                    if isinstance(node, (ast.Import, ast.ImportFrom)):
                        for a in node.names:
                            module = getattr(node, 'module', None)
                            yield (
                                (old, (a.asname or a.name).split('.')[0]),
                                (module, a.name, a.asname),
                            )

    def main(self, old_stem):
        "The new stem that stands for an old one"
        for old, parts in self.parts.items():
            if old[3:] == old_stem:
                chosen = [
                    n for n in parts if isinstance(self.plan[n], str) or self.plan[n].get('main')
                ]
                return chosen[0][3:]
        return None

    def home(self, old_stem, name, where):
        "The new stem of a name; where it was only imported, the part that uses it"
        if (old_stem, name) in self.homes:
            return self.homes[old_stem, name]
        users = [
            new[3:]
            for new, p in self.plan.items()
            if self.origin(p)[3:] == old_stem
            and any(name in used(source(c)) for c in self.new[new])
        ]
        if len(users) != 1 and len(self.parts_of(old_stem)) > 1:
            self.notes.append(f'{where}: {old_stem}.{name} is defined nowhere; used in {users}')
        return users[0] if len(users) == 1 else self.main(old_stem)

    def parts_of(self, old_stem):
        return next((parts for old, parts in self.parts.items() if old[3:] == old_stem), [])

    # ---- texts

    def statement(self, m, here, where):
        "The import statements that take the place of one"
        old = m[1]
        if self.main(old) is None:
            return m[0]
        groups = {}
        for item in filter(
            None, (x.strip() for x in m[2].strip('() \n').replace('\n', ' ').split(','))
        ):
            item = ' '.join(item.split())
            new = self.home(old, item.partition(' as ')[0], where)
            groups.setdefault(new, []).append(item)
        line = m.string[m.string.rfind('\n', 0, m.start()) + 1 : m.start()]
        indent = line if not line.strip() else None
        said = [
            from_import(new, names, indent or '') for new, names in groups.items() if new != here
        ]
        if indent is None:  # in the middle of a line, as in `python -c`
            return '; '.join(s.replace('\n', ' ') for s in said) or 'pass'
        return f'\n{indent}'.join(said) or 'pass'

    def text(self, text, here='', where=''):
        "A text with its imports and addresses moved; `here` is the module that it belongs to"
        text = FROM.sub(lambda m: self.statement(m, here, where), text)

        def address(m):
            if self.main(m[1]) is None:
                return m[0]
            return f'{PACKAGE}.{self.home(m[1], m[3], where)}{m[2]}{m[3]}'

        text = re.sub(rf'\b{PACKAGE}\.(\w+)([.:])([A-Za-z_]\w*)', address, text)
        for m in re.finditer(rf'^.*(from {PACKAGE} import|import {PACKAGE}\.).*$', text, re.M):
            if f'from {PACKAGE} import __version__' not in m[0]:
                self.notes.append(f'{where}: {m[0].strip()}')
        for old in self.old:
            stem = self.main(old[3:])
            new = next(n for n in self.plan if n[3:] == stem)
            text = re.sub(rf'\b{old}\b', new, text)
        return text

    # ---- notebooks

    def notebook(self, new):
        "The new notebook: its cells, and the imports that they need"
        p, nb = self.plan[new], self.old[self.origin(self.plan[new])]
        made = json.loads(json.dumps({**nb, 'cells': self.new[new]}))
        for cell in made['cells']:
            put(
                cell,
                re.sub(rf'(default_exp ){self.origin(p)[3:]}\b', rf'\g<1>{new[3:]}', source(cell)),
            )
        if len(self.parts[self.origin(p)]) > 1:
            if 'title' in p:
                self.begin(new, made)
            self.give_imports(new, made)
        for cell in made['cells']:
            where = f'{new}:{cell["id"]}'
            exported = bool(EXPORT.search(source(cell)))
            moved = self.text(source(cell), new[3:] if exported else '', where)
            if cell['cell_type'] == 'code':
                moved = re.sub(r'^pass\n', '', moved)
            put(cell, moved)
        return made

    def begin(self, new, nb):
        "Give a part its first cells: title, name of the module (if it exports), set-up"
        first = [dict(cell_type='markdown', id=fresh_id(new, 'title'), metadata={}, source=[])]
        put(first[0], self.plan[new]['title'])
        exports = any(EXPORT.search(source(c)) for c in nb['cells'] if c['cell_type'] == 'code')
        said = [f'#| default_exp {new[3:]}'] * exports
        there = (source(c) for c in self.old[self.origin(self.plan[new])]['cells'])
        said += [next(s for s in there if s.startswith('#| hide'))]
        for text in said:
            cell = dict(cell_type='code', execution_count=None, id=fresh_id(new, text))
            first.append(cell | dict(metadata={}, outputs=[], source=[]))
            put(first[-1], text)
        nb['cells'][:0] = first

    def give_imports(self, new, nb):
        "Give a part one cell with the imports that its exported cells need"
        origin = self.origin(self.plan[new])
        old = self.origin(self.plan[new])[3:]
        code = [c for c in nb['cells'] if c['cell_type'] == 'code']
        groups = {True: [], False: []}
        for cell in code:
            groups[bool(EXPORT.search(source(cell)))].append(cell)
        known = set(dir(builtins))
        for exported in (True, False):
            cells = groups[exported]
            for cell in cells:
                if exported:
                    put(cell, without_imports(source(cell)))
            own = {n for c in cells for n in (*defined(source(c)), *imported(source(c)))}
            needs = {n for c in cells for n in used(source(c))} - own - known
            known |= own
            lines = set()
            for name in needs:
                known.add(name)
                if (old, name) in self.homes and self.homes[old, name] != new[3:]:
                    lines.add((f'{PACKAGE}.{self.homes[old, name]}', name, None))
                elif (origin, name) in self.imports:
                    lines.add(self.imports[origin, name])
            if not lines:
                continue
            text = statements(lines)
            bare = (c for c in cells if not source(c).replace('#| export', '').strip())
            place = next(bare, None)
            if exported and place:
                put(place, '#| export\n' + text)
            else:
                cell = dict(cell_type='code', execution_count=None, metadata={}, outputs=[])
                cell |= dict(id=fresh_id(new, exported), source=[])
                put(cell, ('#| export\n' if exported else '') + text)
                at = nb['cells'].index(groups[True][0]) if groups[True] else 2
                nb['cells'].insert(at if exported else at + 1, cell)
        nb['cells'] = [
            c for c in nb['cells'] if c['cell_type'] != 'code' or source(c).strip() != '#| export'
        ]


def fresh_id(*of):
    import hashlib

    return hashlib.sha256(repr(of).encode()).hexdigest()[:8]


def without_imports(text):
    "A cell without the imports of its top level"
    lines = text.split('\n')
    for node in reversed(top_level(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            del lines[node.lineno - 1 : node.end_lineno]
    return '\n'.join(lines)


def from_import(stem, names, indent=''):
    line = f'from {PACKAGE}.{stem} import {", ".join(names)}'
    if len(indent + line) <= WIDTH:
        return line
    inner = ''.join(f'\n{indent}    {n},' for n in names)
    return f'from {PACKAGE}.{stem} import ({inner}\n{indent})'


def statements(lines):
    "Import statements for (module, name, other name): plain ones first, ours last"
    plain = sorted(f'import {n}' + (f' as {a}' if a else '') for m, n, a in lines if m is None)
    modules = {}
    for m, n, a in sorted((x for x in lines if x[0]), key=lambda x: (x[0], x[1])):
        modules.setdefault(m, []).append(n + (f' as {a}' if a else ''))
    ours = [m for m in modules if m.split('.')[0] == PACKAGE]
    said = []
    for m in [m for m in modules if m not in ours] + ours:
        line = f'from {m} import {", ".join(modules[m])}'
        if len(line) > WIDTH:
            line = f'from {m} import (' + ''.join(f'\n    {n},' for n in modules[m]) + '\n)'
        said.append(line)
    return '\n'.join([*plain, *said])


def move(root, plan):
    "Do it; returns what has to be looked at by hand"
    book = Book(root, plan)
    made = {new: book.notebook(new) for new in book.plan}
    for old in book.old:
        (root / 'nbs' / f'{old}.ipynb').unlink()
    for new, nb in made.items():
        write_notebook(root / 'nbs' / f'{new}.ipynb', nb)
    for p in sorted((root / 'nbs').glob('*.ipynb')):
        if p.stem in made:
            continue
        nb = read(p)
        for cell in nb['cells']:
            put(cell, book.text(source(cell), '', f'{p.name}:{cell["id"]}'))
        write_notebook(p, nb)
    others = ('setup.py', 'settings.ini', 'Makefile', 'SECURITY.md', 'nbs/_quarto.yml')
    for p in [*scripts(root), *(root / f for f in others)]:
        if p.exists():
            write(p, book.text(p.read_text(encoding='utf-8'), '', str(p.relative_to(root))))
    return book.notes


if __name__ == '__main__':
    sys.exit(main(__doc__, move))
