"""What the tools that edit the whole book share: cells read and written, files found, `main`.

Used by rename.py, members.py and move.py."""

import ast
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = 'llm_lab'
TOOLS = (
    'rename.py',
    'members.py',
    'move.py',
)  # names stand in them as examples: they do not edit themselves


def source(cell):
    "The text of a cell"
    return ''.join(cell['source'])


def put(cell, text):
    "Give a cell another text, a line an entry, as Jupyter writes it"
    cell['source'] = text.splitlines(keepends=True)


def tree(text):
    "The syntax tree of a text; None if it holds IPython's own lines"
    try:
        return ast.parse(text)
    except SyntaxError:
        return None


def read(path):
    "A notebook"
    return json.loads(path.read_text(encoding='utf-8'))


def write(path, text):
    path.write_text(text, encoding='utf-8', newline='\n')


def write_notebook(path, nb):
    "As nbdev_clean leaves it, so that only cells that were edited are in the diff"
    write(path, json.dumps(nb, indent=1, ensure_ascii=False) + '\n')


def scripts(root):
    "Tests, tools and experiments, in order"
    for folder in ('tests', 'tools', 'experiments'):
        for path in sorted((root / folder).rglob('*.py')):
            if 'runs' not in path.parts and not (folder == 'tools' and path.name in TOOLS):
                yield path


def main(doc, edit):
    "`python tools/TOOL.py PLAN.json [ROOT]`: `edit(root, plan)` returns what is left to a person"
    if not 2 <= len(sys.argv) <= 3:
        print(doc, file=sys.stderr)
        return 2
    plan = json.loads(Path(sys.argv[1]).read_text(encoding='utf-8'))
    root = Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT
    for note in dict.fromkeys(edit(root, plan)):
        print(f'by hand: {note}')
    return 0
