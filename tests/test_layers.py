"""The laws of the book, read from the notebooks and the syntax trees.

Every checker takes a root and returns what is wrong, one line each."""

import ast
import base64
import io
import json
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from cases import HANG

ROOT = Path(__file__).resolve().parent.parent
EXPORT = re.compile(r'^#\|\s*export[is]?\b[ \t]*(\S*)', re.M)


# ---- the notebooks, read


def chapters(root):
    "{stem: path} of the chapters, in the book's order"
    return {p.stem[3:]: p for p in sorted((root / 'nbs').glob('[0-9][0-9]_*.ipynb'))}


def read(path):
    return json.loads(path.read_text(encoding='utf-8'))


def cells(path, kind='code'):
    return [''.join(c['source']) for c in read(path)['cells'] if c['cell_type'] == kind]


def plain(source):
    "Python without IPython's own lines, as a syntax tree"
    try:
        return ast.parse(source)
    except SyntaxError:
        pass
    if source.lstrip().startswith('%%'):
        return ast.parse('')
    return ast.parse(re.sub(r'^([ \t]*)([%!].*|[\w.]+\?+[ \t]*)$', r'\1pass', source, flags=re.M))


def modules(root):
    return {
        p.stem: p
        for p in sorted((root / 'llm_lab').glob('*.py'))
        if p.stem not in ('__init__', '__main__', '_modidx')  # by hand, and nbdev's index
    }


def tree_of(path):
    return ast.parse(path.read_text(encoding='utf-8'))


# ---- law 1: one chapter, one notebook, one module of the same stem


def at_import(body):
    """The statements that run when a module is imported: not those of a function, nor those under
    TYPE_CHECKING, which only a type checker reads"""
    for node in body:
        if isinstance(node, ast.FunctionDef):
            continue
        yield node
        if isinstance(node, ast.If):
            only_checked = ast.unparse(node.test) == 'TYPE_CHECKING'
            yield from at_import([] if only_checked else node.body)
            yield from at_import(node.orelse)


def one_to_one(root):
    bad, nbs, mods = [], chapters(root), modules(root)
    if not nbs:
        return ['no chapter found']
    for p in sorted((root / 'nbs').glob('*.ipynb')):
        numbers = [q.name for q in nbs.values() if q.name[:2] == p.name[:2]]
        if p in nbs.values() and len(numbers) > 1:
            bad.append(f'{p.name}: its number is taken twice')
        if (
            p not in nbs.values()
            and p.name[0] != '_'
            and any(re.search(r'^#\|\s*(default_exp|export)', o, re.M) for o in cells(p))
        ):
            bad.append(f'{p.name}: exports, but is no chapter')
    for stem, p in nbs.items():
        names = [o for c in cells(p) for o in re.findall(r'^#\|\s*default_exp\s+(\S+)', c, re.M)]
        if not names and not any(EXPORT.search(c) for c in cells(p)):
            continue  # a page: it exports nothing, and has no module
        if names != [stem]:
            bad.append(f'{p.name}: default_exp should be {stem}, once; it is {names}')
        if stem not in mods:
            bad.append(f'{p.name}: llm_lab/{stem}.py is missing')
        bad += [f'{p.name}: exports to {o}' for c in cells(p) for o in EXPORT.findall(c) if o]
    bad += [f'llm_lab/{o}.py: no chapter writes it' for o in mods if o not in nbs]
    init = root / 'llm_lab' / '__init__.py'
    body = tree_of(init).body if init.exists() else []
    if not any(ast.unparse(o).startswith('__version__ =') for o in body):
        bad.append('llm_lab/__init__.py: has no __version__')
    imports = [
        ast.unparse(o) for o in at_import(body) if isinstance(o, (ast.Import, ast.ImportFrom))
    ]
    bad += [
        f'llm_lab/__init__.py: {o}, and it should cost nothing' for o in imports if o != 'import os'
    ]
    return bad


# ---- law 2: imports by name, from earlier chapters


def imported(tree, package='llm_lab'):
    """(module, names) for each import of the package:

    ('gpt', ['MiniGPT']), ('gpt', ['*']), ('gpt', []) for `import llm_lab.gpt`"""
    for o in ast.walk(tree):
        if isinstance(o, ast.Import):
            for a in o.names:
                if a.name.split('.')[0] == package:
                    yield (a.name.split('.') + [''])[1], []
        if isinstance(o, ast.ImportFrom):
            path = (o.module or '').split('.')
            if o.level:
                path = [package] + [p for p in path if p]
            if path[0] != package:
                continue
            names = [a.name for a in o.names]
            if len(path) > 1:
                yield path[1], names
            else:
                yield from ((n, []) for n in names)
        if (
            isinstance(o, ast.Call)
            and o.args
            and isinstance(o.args[0], ast.Constant)
            and isinstance(o.args[0].value, str)
        ):
            name = o.func.attr if isinstance(o.func, ast.Attribute) else getattr(o.func, 'id', '')
            value = re.sub(r'^\.', package + '.', o.args[0].value)
            if name in ('import_module', '__import__') and value.split('.')[0] == package:
                yield (value.split('.') + [''])[1], []


def imports(root):
    bad, nbs, mods = [], chapters(root), modules(root)
    order = {stem: n for n, stem in enumerate(nbs)}

    def check(where, here, tree, exported):
        for name, names in imported(tree):
            if name in ('__version__', ''):
                continue
            if name not in order:
                bad.append(f'{where}: imports llm_lab.{name}, which is no chapter')
            elif order[name] > order[here] or (exported and name == here):
                bad.append(f'{where}: imports {name}, which is not earlier')
            if exported and '*' in names:
                bad.append(f'{where}: imports * from {name}')

    for stem, p in nbs.items():
        if stem in mods:
            check(f'llm_lab/{stem}.py', stem, tree_of(mods[stem]), True)
        for c in cells(p):
            check(p.name, stem, plain(c), bool(EXPORT.search(c)))
            if EXPORT.search(c) and any(
                isinstance(o, ast.ImportFrom) and o.names[0].name == '*' for o in ast.walk(plain(c))
            ):
                bad.append(f'{p.name}: an exported cell imports *')
    return list(dict.fromkeys(bad))


# ---- law 3: a public name has one home


def public_names(path):
    "What a module lists in `__all__`"
    for o in tree_of(path).body:
        if isinstance(o, ast.Assign) and getattr(o.targets[0], 'id', '') == '__all__':
            yield from ast.literal_eval(o.value)


def homes(root):
    bad, home = [], {}
    for stem, p in modules(root).items():
        body = tree_of(p).body
        for n in public_names(p):
            if n in modules(root):
                bad.append(f'{n}: is public in {stem}, and the stem of a module')
            if n in home:
                bad.append(f'{n}: defined in {home[n]} and in {stem}')
            home.setdefault(n, stem)
        seen = set()
        for o in body:
            if (
                not isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
                or o.decorator_list
            ):
                continue
            if o.name in seen:
                bad.append(f'{o.name}: defined twice in {stem}')
            seen.add(o.name)
    return bad


# words that the field has other names for, or that had two meanings
RETIRED = set(
    """
    ACTS Afresh Alarm Alone Checkpoints Config DataKeys Decoder EvalKeys GPT2_WORDS Grouped
    Int8 Job Knobs Live LogKeys MARK Metrics ModelKeys NAMES OPTIMISERS Reader Run SCALES
    SIGNED Step Together TrainKeys WEIGHTS WORDS Wide anatomy attend attended
    attention_picture batches_of bits blind block_losses blocks cached card checkpointed
    chips_html choices chosen compiled config_of cut cut_whole dense drawn end_mark ends
    engine_of excess expect fast fetched fill flexed floor folded freed frequencies
    from_letters gathered gauges going_on gone_on grouped heads_picture held keep_memory
    kept_bytes kept_streams kv_bytes label left_out look looks_at loss_picture makes_sense
    moe_spec need normal open_model optimiser_state orthogonalized parsed picked place
    placed planned question rate reach_picture reached read read_parts read_rows
    restore_optimiser restored room routes save_package scores_picture seal seeded
    set_streams shuffled side single sliding smaller smoothed speed spikes split stepped
    stoppable stories streams texts_of to_letters together tokenizer_from too_long
    train_config trained until upcycled verified views visible way without_head write
    written
    """.split()
)


def retired(root):
    "No module offers a name of the first edition again"
    return [
        f'llm_lab/{stem}.py: {n} is retired'
        for stem, p in modules(root).items()
        for n in public_names(p)
        if n in RETIRED
    ]


# what methods, keywords and fields were called
RETIRED_MEMBERS = set(
    """
    block_len choice ear hands join knobs most opt optimiser pattern reads renormalise rising
    room seen settle through until words_of
    """.split()
)


def members(path):
    "(owner, name) of each method, field and keyword that a module offers"

    def signature(owner, f):
        a = f.args
        for x in (*a.posonlyargs, *a.args, *a.kwonlyargs):
            yield owner or f.name, x.arg

    for node in tree_of(path).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith('_'):
            if any(ast.unparse(d).startswith('patch') for d in node.decorator_list):
                yield '', node.name
            yield from signature('', node)
        if isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
            for o in node.body:
                if isinstance(o, ast.AnnAssign) and isinstance(o.target, ast.Name):
                    yield node.name, o.target.id
                if isinstance(o, ast.FunctionDef) and not re.match('_(?!_init__)', o.name):
                    yield node.name, o.name
                    yield from signature(node.name, o)


def retired_members(root):
    "No method, field or keyword has a name of the first edition again"
    return [
        f'llm_lab/{stem}.py: {owner}.{name} is retired'.replace(': .', ': ')
        for stem, p in modules(root).items()
        for owner, name in members(p)
        if name in RETIRED_MEMBERS
    ]


# ---- law 6: code is made to be read

COLUMNS = 100


def texts(root):
    "(where, code, is it exported) of every code cell, test, tool and experiment"
    for p in sorted((root / 'nbs').glob('*.ipynb')):
        for c in read(p)['cells']:
            if c['cell_type'] == 'code':
                text = ''.join(c['source'])
                yield f'{p.name}, cell {c.get("id")}', text, bool(EXPORT.search(text))
    for folder in ('tests', 'tools', 'experiments'):
        for p in sorted((root / folder).rglob('*.py')):
            if 'runs' not in p.parts:
                yield str(p.relative_to(root)), p.read_text(encoding='utf-8'), False


def columns(root):
    return [
        f'{where}, line {n}: {len(line)} columns'
        for where, text, _ in texts(root)
        for n, line in enumerate(text.split('\n'), 1)
        if len(line) > COLUMNS
    ]


def statements(root):
    "No `;` in exported code, not even in its strings' own line: it is one statement a line"
    bad = []
    for where, text, exported in texts(root):
        if not exported:
            continue
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.OP and token.string == ';':
                bad.append(f'{where}, line {token.start[0]}: two statements in one line')
    return bad


# ---- law 7: chapters are referred to by linked title


def links(root):
    "No chapter is called by its number, and each link to a notebook is followed"
    bad = []
    for p in sorted((root / 'nbs').glob('*.ipynb')):
        for text in (*cells(p, 'markdown'), *cells(p)):
            for said in re.findall(r'\b[Cc]hapters? \d+', text):
                bad.append(f'{p.name}: {said} is a number, give the title with a link')
        for text in cells(p, 'markdown'):
            for target in re.findall(r'\]\(([^)#:]+\.ipynb)', text):
                if not (p.parent / target).is_file():
                    bad.append(f'{p.name}: links to {target}, which is not there')
    return bad


# ---- the page itself


def cut(png):
    "Is something of a picture beyond its edge? Its outermost pixels have one colour then not"
    image = pytest.importorskip('PIL.Image').open(io.BytesIO(png)).convert('RGB')
    (w, h), at = image.size, image.load()
    edge = [at[x, y] for x in range(w) for y in (0, h - 1)]
    edge += [at[x, y] for y in range(h) for x in (0, w - 1)]
    return any(max(abs(a - b) for a, b in zip(p, edge[0])) > 24 for p in edge)


def pictures(root):
    bad = []
    for p in sorted((root / 'nbs').glob('*.ipynb')):
        for c in read(p)['cells']:
            for out in c.get('outputs', []):
                data = out.get('data', {}).get('image/png')
                if data and cut(base64.b64decode(''.join(data))):
                    bad.append(f'{p.name}, cell {c["id"]}: the picture is cut at its edge')
    return bad


def pages(root):
    bad = []
    for p in sorted((root / 'nbs').glob('*.ipynb')):
        nb = read(p)
        ids = [c.get('id') for c in nb['cells']]
        if None in ids or len(set(ids)) != len(ids):
            bad.append(f'{p.name}: cell ids are missing or not unique')
        if 'widgets' in nb['metadata']:
            bad.append(f'{p.name}: holds saved widgets')
    for p in chapters(root).values():
        first = (cells(p, 'markdown') or [''])[0]
        if not re.match(r'# \S.*\n+> \S', first):
            bad.append(f'{p.name}: the first prose cell should be `# Title`, then `> purpose`')
    return bad


LAWS = [
    one_to_one,
    imports,
    homes,
    retired,
    retired_members,
    columns,
    statements,
    links,
    pages,
    pictures,
]


@pytest.mark.parametrize('law', LAWS)
def test_the_book_keeps(law):
    assert law(ROOT) == []


# ---- the checkers can fail


def toy(
    root,
    stem='02_b',
    code='#| export\nfrom llm_lab.a import x\ny = x',
    module='from .a import x\n__all__ = ["y"]\ny = x\n',
    **first,
):
    "A book of two chapters; the second as asked for"

    def chapter(name, code, head='# A title\n> why', meta=None, ids=True):
        sources = [head, f'#| default_exp {name[3:]}', code]
        cs = [
            dict(cell_type='code' if n else 'markdown', source=s, id=f'c{n if ids else 0}')
            for n, s in enumerate(sources)
        ]
        (root / 'nbs' / f'{name}.ipynb').write_text(json.dumps(dict(metadata=meta or {}, cells=cs)))

    for o in ('nbs', 'llm_lab'):
        (root / o).mkdir()
    (root / 'llm_lab' / '__init__.py').write_text('__version__ = "1"\n')
    chapter('01_a', '#| export\nx = 1')
    (root / 'llm_lab' / 'a.py').write_text('__all__ = ["x"]\nx = 1\n')
    chapter(stem, code, **first)
    (root / 'llm_lab' / 'b.py').write_text(module)
    return root


def test_a_good_toy_book_passes(tmp_path):
    root = toy(tmp_path)
    assert [o for law in LAWS for o in law(root)] == []


@pytest.mark.parametrize(
    'code,words',
    [
        ('#| export\nfrom llm_lab.c import z', 'no chapter'),
        ('#| export\nfrom llm_lab.b import z', 'not earlier'),
        ('#| export\nfrom llm_lab.a import *', r'imports \*'),
        ('#| export\nfrom math import *', r'imports \*'),
        ('#| export\ndef f():\n    import llm_lab.c', 'no chapter'),
        ('#| export\nfrom llm_lab import c', 'no chapter'),
        ('#| export\ndef f(): return import_module("llm_lab.c")', 'no chapter'),
        ('%time 1\nfrom llm_lab.c import z', 'no chapter'),
    ],
)
def test_a_wrong_import_in_a_notebook_is_seen(tmp_path, code, words):
    assert re.search(words, '\n'.join(imports(toy(tmp_path, code=code))))


@pytest.mark.parametrize(
    'module',
    [
        'from .b import z',
        'def f():\n    from llm_lab.zz import y',
        'from . import zz',
        'from .a import *',
    ],
)
def test_a_wrong_import_in_a_module_is_seen(tmp_path, module):
    assert len(imports(toy(tmp_path, module=module))) == 1


def test_an_earlier_chapter_cannot_import_a_later_one(tmp_path):
    root = toy(tmp_path)
    (root / 'llm_lab' / 'a.py').write_text('def f():\n    from .b import y\n    return y\n')
    assert imports(root) == ['llm_lab/a.py: imports b, which is not earlier']


def test_a_missing_an_orphaned_and_a_misnamed_module_are_seen(tmp_path):
    root = toy(tmp_path, stem='01_z')
    (root / 'llm_lab' / '__init__.py').write_text('__version__ = "1"\nfrom .a import x\n')
    (root / 'nbs' / 'notes.ipynb').write_text(
        json.dumps(
            dict(metadata={}, cells=[dict(cell_type='code', source='#| export\nq = 1', id='q')])
        )
    )
    said = '\n'.join(one_to_one(root))
    for words in (
        'taken twice',
        'z.py is missing',
        'b.py: no chapter',
        'from .a import x, and it should',
        'is no chapter',
    ):
        assert words in said
    (root / 'llm_lab' / '__init__.py').write_text('')
    assert 'has no __version__' in '\n'.join(one_to_one(root))


def test_a_name_with_two_homes_is_seen(tmp_path):
    said = homes(toy(tmp_path, module='__all__ = ["x"]\ndef x(): pass\ndef x(): pass\n'))
    assert said == ['x: defined in a and in b', 'x: defined twice in b']


def test_a_poor_page_is_seen(tmp_path):
    said = '\n'.join(pages(toy(tmp_path, head='# no purpose', meta={'widgets': {}}, ids=False)))
    for words in ('> purpose', 'saved widgets', 'not unique'):
        assert words in said


def test_a_public_name_that_is_a_stem_is_seen(tmp_path):
    said = homes(toy(tmp_path, module='__all__ = ["a"]\na = 1\n'))
    assert said == ['a: is public in b, and the stem of a module']


def test_a_retired_name_is_seen(tmp_path):
    said = retired(toy(tmp_path, module='__all__ = ["written"]\ndef written(): pass\n'))
    assert said == ['llm_lab/b.py: written is retired']
    code = 'class A:\n    rising: int\n\n    def settle(self, opt): pass\n\n\ndef f(most): pass\n'
    (tmp_path / 'b').mkdir()
    said = retired_members(toy(tmp_path / 'b', module=code))
    assert said == [
        f'llm_lab/b.py: {what} is retired' for what in ('A.rising', 'A.settle', 'A.opt', 'f.most')
    ]


def test_a_page_needs_no_module(tmp_path):
    root = toy(tmp_path)
    page = [dict(cell_type='markdown', source='# A page\n> why', id='a')]
    page.append(dict(cell_type='code', source='from llm_lab.b import y', id='b'))
    path = root / 'nbs' / '03_c.ipynb'
    path.write_text(json.dumps(dict(metadata={}, cells=page)))
    assert [o for law in LAWS for o in law(root)] == []
    page[1]['source'] = '#| export\nx = 3'
    path.write_text(json.dumps(dict(metadata={}, cells=page)))
    assert '03_c.ipynb: default_exp should be c, once; it is []' in one_to_one(root)


def test_a_long_line_and_two_statements_in_one_are_seen(tmp_path):
    long = f'#| export\nx = {"1" * 97}\nif x: y = "a; b"; z = 2  # c; d'
    root = toy(tmp_path, code=long)
    (root / 'tests').mkdir()
    (root / 'tests' / 'test_a.py').write_text(f'# {"x" * 99}\n')
    assert columns(root) == [
        '02_b.ipynb, cell c2, line 2: 101 columns',
        'tests/test_a.py, line 1: 101 columns',
    ]
    assert statements(root) == ['02_b.ipynb, cell c2, line 3: two statements in one line']


def test_a_dead_link_is_seen(tmp_path):
    head = (
        '# A title\n> why\n\n[one](01_a.ipynb#part), [two](02_z.ipynb), [web](https://x.y/z.ipynb)'
    )
    root = toy(tmp_path, head=head)
    assert links(root) == ['02_b.ipynb: links to 02_z.ipynb, which is not there']


def test_a_chapter_that_is_called_by_its_number_is_seen(tmp_path):
    root = toy(
        tmp_path, head='# A title\n> why\n\nAs chapter 3 told', code='x = 1  # see Chapters 4 to 6'
    )
    assert [o.partition(': ')[2].partition(' is')[0] for o in links(root)] == [
        'chapter 3',
        'Chapters 4',
    ]


@pytest.mark.parametrize('inside', [True, False])
def test_a_picture_that_is_cut_is_seen(tmp_path, inside):
    image = pytest.importorskip('PIL.Image').new('RGB', (40, 30), 'white')
    image.putpixel((20, 15 if inside else 0), (200, 0, 0))
    image.save(png := io.BytesIO(), 'PNG')
    root = toy(tmp_path)
    path = root / 'nbs' / '02_b.ipynb'
    nb = json.loads(path.read_text())
    data = {'image/png': base64.b64encode(png.getvalue()).decode()}
    nb['cells'][2]['outputs'] = [dict(output_type='display_data', data=data)]
    path.write_text(json.dumps(nb))
    assert (
        pictures(root) == [] if inside else ['02_b.ipynb, cell c2: the picture is cut at its edge']
    )


# ---- light imports

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}: raise ImportError('blocked: ' + name)
sys.meta_path.insert(0, Block())
"""


def python(code):
    return subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=HANG
    )


def test_every_module_imports_without_the_extras():
    extras = {
        'matplotlib',
        'ipywidgets',
        'anywidget',
        'accelerate',
        'transformers',
        'pooch',
        'datasets',
        'pyarrow',
        'tiktoken',
    }
    out = python(
        BLOCK.format(blocked=extras) + ''.join(f'import llm_lab.{o}\n' for o in modules(ROOT))
    )
    assert out.returncode == 0, out.stderr


def test_the_block_blocks():
    out = python(BLOCK.format(blocked={'json'}) + 'import json')
    assert out.returncode == 1 and 'blocked: json' in out.stderr


def test_help_imports_no_torch():
    out = python(
        "import sys; sys.argv = ['llm-lab', '--help']\nfrom llm_lab.cli import main\n"
        "try: main()\nexcept SystemExit as e: assert not e.code, e.code\n"
        "print('heavy:', sorted({'torch', 'tokenizers', 'matplotlib'} & set(sys.modules)))"
    )
    assert out.returncode == 0 and out.stdout.rstrip().endswith('heavy: []'), (
        out.stdout[-500:] + out.stderr
    )
