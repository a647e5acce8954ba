"The tools of the frame, on small books of their own"

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tools'))
import book
import clean
import readme
import run_notebooks
import start  # noqa: E402, I001


def notebook(path, *sources, **meta):
    "Write a notebook; a source that begins with '# ' or '>' is prose"

    def cell(n, s):
        if s[:2] in ('# ', '> '):
            return dict(cell_type='markdown', source=s, metadata={}, id=f'c{n}')
        return dict(
            cell_type='code', source=s, metadata={}, outputs=[], execution_count=None, id=f'c{n}'
        )

    kernel = dict(name='python3', display_name='python3', language='python')
    js = dict(
        cells=[cell(n, s) for n, s in enumerate(sources)],
        metadata=dict(kernelspec=kernel, **meta),
        nbformat=4,
        nbformat_minor=5,
    )
    path.write_text(clean.clean(json.dumps(js)), encoding='utf-8')
    return path


def tool(name, *args, **env):
    cmd = [sys.executable, str(ROOT / 'tools' / name), *map(str, args)]
    return subprocess.run(cmd, capture_output=True, text=True, env=dict(os.environ, **env))


# ---- run_notebooks


def test_each_notebook_runs_alone_and_is_counted(tmp_path):
    here = 'import os; assert os.environ["IN_TEST"] == "1" and os.path.exists("good.ipynb")'
    good = notebook(tmp_path / 'good.ipynb', here, '#| slow\n1/0')
    bad = notebook(tmp_path / 'bad.ipynb', 'print("seen in the log")', 'assert 1 == 2')
    out = tool('run_notebooks.py', good, bad)
    assert out.returncode == 1 and out.stdout.endswith('1 passed, 1 failed\n'), (
        out.stdout + out.stderr
    )
    assert 'AssertionError' in out.stdout
    assert not run_notebooks.run(good, flags='slow')[0], 'the slow cell runs when it is asked for'


def test_a_notebook_that_hangs_is_ended(tmp_path):
    ok, _, log = run_notebooks.run(
        notebook(tmp_path / 'hangs.ipynb', 'import time; time.sleep(3000)'), timeout=6
    )
    assert not ok and 'ran past 6 s' in log


def test_two_run_at_a_time_and_the_rest_is_told(tmp_path):
    """Each waits until it sees the other, so one after the other they would never end; the line
    names what they cost"""
    meet = """
import pathlib, time
pathlib.Path('{}').touch()
while not pathlib.Path('{}').exists(): time.sleep(.05)
"""
    both = [
        notebook(tmp_path / f'{me}.ipynb', meet.format(me, other)) for me, other in ('ab', 'ba')
    ]
    out = tool('run_notebooks.py', '--jobs', 2, '--timeout', 900, *both)
    assert (
        out.stdout.endswith('2 passed, 0 failed\n')
        and 'core-s' in out.stdout
        and '(2 of 2, about 0 s left)' in out.stdout
    ), out.stdout


def test_nothing_to_run_is_no_success(tmp_path):
    assert tool('run_notebooks.py', tmp_path / 'none.ipynb').returncode == 1


# ---- plan

TESTS = """
import os, time, pytest
WORKER = os.environ['PYTEST_XDIST_WORKER']
def note(words): open('notes', 'a').write(words + chr(10))
@pytest.fixture(scope='module')
def dear(): note('made'); yield
@pytest.mark.parametrize('n', range(6))
def test_shares(dear, n): note('shares ' + WORKER)
@pytest.mark.parametrize('n', range(6))
def test_alone(n): note(f'alone {n} {WORKER}')
def test_long(): note('long ' + WORKER); time.sleep(3)
"""
# as in test_notebooks.py: one test trains the model that others open
SHARING = """
import time, pytest
from pathlib import Path
from test_a import WORKER, note
def test_the_model_that_chapters_share_is_trained(): time.sleep(1); note('trained ' + WORKER)
@pytest.mark.parametrize('path', sorted(Path('chapters').glob('*.ipynb')), ids=lambda p: p.stem)
def test_a_chapter_runs(path): note(f'chapter {path.stem} {WORKER}')
"""


def test_time_left_is_the_table_until_more_is_known():
    "Two workers; the rest takes as much longer than the table says as what is done did"
    import plan

    p = plan.Plan(SimpleNamespace(cache=None))
    p.names = ['a', 'b', 'c', 'd']
    p.seconds = dict(a=60, b=60, c=60, d=60)
    assert p.left(now=100) == 240  # nobody has begun, so one worker is as far as we know
    p.running = dict(a=100, b=100)
    assert p.left(now=110) == (50 + 50 + 120) / 2
    # twice as slow as the table says, less a start of thirty seconds
    p.took['a'], p.running = (
        150,
        dict(b=100, c=250),
    )
    assert p.left(now=250) == (0 + 120 + 120) / 2


def opens_it_by_name():
    return tales_model()  # noqa: F821


def opens_a_chapter():
    return 'code', 'prose'


def opens_nothing():
    return 'prose', "my_tales_model"


def test_what_opens_the_shared_model_is_found_in_its_source(tmp_path):
    "A chapter by its code, not by its prose; a test by its words, or by the chapter it is given"
    import plan

    code = notebook(tmp_path / 'code.ipynb', 'model = load_or_train("tales", tales_model)')
    prose = notebook(tmp_path / 'prose.ipynb', '# About `tales_model`', 'my_tales_model = 1')
    assert plan.chapters(tmp_path) == dict(code=True, prose=False)

    def needs(function, name='test_x.py::test_x', **params):
        call = SimpleNamespace(params=params)
        item = SimpleNamespace(nodeid=name, function=function, callspec=call)
        return plan.needs_shared(item, tmp_path)

    assert needs(opens_it_by_name) and needs(opens_a_chapter)
    assert not needs(opens_it_by_name, plan.FIRST)  # it makes the model
    assert needs(opens_nothing, path=code) and needs(opens_nothing, chapter='code')
    assert not needs(opens_nothing, path=prose, chapter='prose')


def test_the_chapters_that_open_the_shared_model_are_found():
    "Those of the book in whose syntax tree the name stands"
    import plan

    for stem, opens in plan.chapters(ROOT / 'nbs').items():
        cells = json.loads((ROOT / 'nbs' / f'{stem}.ipynb').read_text(encoding='utf-8'))['cells']
        sources = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
        nodes = [o for s in sources if 'tales_model' in s for o in ast.walk(ast.parse(s))]
        named = {o.id for o in nodes if isinstance(o, ast.Name)}
        assert opens == ('tales_model' in named), stem


@pytest.mark.slow  # a suite within the suite
def test_the_longest_runs_first_and_a_dear_fixture_is_made_once(tmp_path):
    """And what opens the shared model is not begun before it is trained, although the table says
    that it takes longest"""
    (tmp_path / 'conftest.py').write_text(
        f'import sys\nsys.path.insert(0, {str(ROOT / "tools")!r})\nimport plan\n'
        'plan.hints = lambda: {"test_a.py::test_long": 9, "test_a.py::test_alone[3]": 8,'
        ' "test_notebooks.py::test_a_chapter_runs[opens]": 99}\n'
        'def pytest_configure(config): config.pluginmanager.register(plan.Plan(config, every=.5))\n'
    )
    (tmp_path / 'test_a.py').write_text(TESTS)
    (tmp_path / 'test_notebooks.py').write_text(SHARING)
    (tmp_path / 'chapters').mkdir()
    notebook(tmp_path / 'chapters' / 'opens.ipynb', 'tales_model()')
    notebook(tmp_path / 'chapters' / 'plain.ipynb', '1')
    (tmp_path / 'pytest.ini').write_text('[pytest]\n')
    run = lambda *args: subprocess.run(
        [
            sys.executable,
            '-m',
            'pytest',
            '-n',
            '2',
            '--dist',
            'loadgroup',
            '--no-loadscope-reorder',
            *args,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    out = run()
    notes = (tmp_path / 'notes').read_text().splitlines()
    assert out.returncode == 0 and '16 passed' in out.stdout, out.stdout + out.stderr
    assert notes.count('made') == 1 and len({o for o in notes if o.startswith('shares')}) == 1
    # what each worker ran first, and what the one that trained ran next
    told = [o.rsplit(' ', 1) for o in notes if o != 'made']
    by_worker = {who: [what for what, w in told if w == who] for _, who in told}
    assert {names[0] for names in by_worker.values()} == {'trained', 'long'}, notes
    assert ['trained', 'alone 3'] in [names[:2] for names in by_worker.values()], notes
    order = [what for what, _ in told]
    assert order.index('trained') < order.index('chapter opens'), notes
    assert 'of 16 tests in 0:' in out.stdout and 'still running: test_a.py::test_long' in out.stdout
    kept = json.loads((tmp_path / '.pytest_cache' / 'v' / 'llm_lab' / 'seconds').read_text())
    assert len(kept) == 16 and kept['test_a.py::test_long'] >= 3
    assert '1 passed' in run('-k', 'long').stdout


# ---- clean


def test_clean_drops_saved_widgets_and_keeps_ids(tmp_path):
    nb = json.loads(notebook(tmp_path / 'a.ipynb', 'x', 'y').read_text())
    nb['metadata']['widgets'] = {'state': 1}
    view = {
        'output_type': 'display_data',
        'metadata': {},
        'data': {clean.WIDGET: {}, 'text/plain': ['IntSlider()']},
    }
    nb['cells'][0].update(
        outputs=[view], execution_count=7, metadata={'scrolled': True, 'tags': ['t']}
    )
    nb['cells'][1]['outputs'] = [
        {**view, 'data': {clean.WIDGET: {}, 'image/png': 'AAAA\n', 'text/plain': ['x']}}
    ]
    (tmp_path / 'a.ipynb').write_text(json.dumps(nb))
    assert tool('clean.py', '--check', tmp_path / 'a.ipynb').returncode == 1
    assert tool('clean.py', tmp_path / 'a.ipynb').returncode == 0
    assert tool('clean.py', '--check', tmp_path / 'a.ipynb').returncode == 0
    a, b = json.loads((tmp_path / 'a.ipynb').read_text())['cells']
    assert (a['id'], b['id'], a['outputs'], a['execution_count'], a['metadata']) == (
        'c0',
        'c1',
        [],
        None,
        {'tags': ['t']},
    )
    assert b['outputs'][0]['data'] == {'image/png': 'AAAA', 'text/plain': ['x']}


# ---- book


def test_book_saves_what_cells_show(tmp_path):
    p = notebook(
        tmp_path / 'a.ipynb',
        '# A',
        'import os; print(os.environ["LLM_LAB_STILL"], "x", end="")',
        '#| slow\n1/0',
        'print("y")\n1+1',
    )
    out = tool('book.py', p)
    assert out.returncode == 0 and '(changed)' in out.stdout, out.stdout + out.stderr
    once = p.read_text()
    cells = json.loads(p.read_text())['cells']
    assert (
        [c['id'] for c in cells] == ['c0', 'c1', 'c2', 'c3']
        and cells[1]['outputs'][0]['text'] == ['1 x']
        and cells[2]['outputs'] == []
    )
    assert cells[3]['outputs'][1]['data']['text/plain'] == ['2'] and clean.clean(once) == once
    assert '(changed)' not in tool('book.py', p).stdout and p.read_text() == once


def test_book_leaves_a_notebook_that_fails(tmp_path):
    bad = notebook(tmp_path / 'bad.ipynb', 'print(1)', '1/0')
    told = notebook(tmp_path / 'told.ipynb', 'import sys; print(sys.prefix)')
    old = bad.read_text(), told.read_text()
    out = tool('book.py', bad, told)
    assert (
        out.returncode == 1
        and 'ZeroDivisionError' in out.stdout
        and 'an output names' in out.stdout
    )
    assert (bad.read_text(), told.read_text()) == old


def test_book_skips_marked_cells():
    flags = {'slow', 'gpu'}
    assert all(
        book.skip(o, flags)
        for o in ('#| slow\nx', '#| eval: false\nx', 'import nbdev; nbdev.nbdev_export()')
    )
    assert not book.skip('#| export\n#| hide\nslow = 1', flags)


# ---- readme


def test_readme_moves_links_and_shows_code():
    code = dict(
        cell_type='code',
        source=['#| eval: false\n', 'f(1)'],
        outputs=[dict(output_type='stream', name='stdout', text=['one\n'])],
    )
    prose = (
        '# T\n[a](01_core.ipynb) [b](https://x.y/z) [c](#d) [e](../LICENSE) '
        '![p](images/p.png "t")\n```sh\n[k](v)\n```'
    )
    hidden = dict(cell_type='code', source='#| hide\nx', outputs=[])
    text = readme.readme(dict(cells=[dict(cell_type='markdown', source=prose), code, hidden]))
    for words in (
        '[a](nbs/01_core.ipynb)',
        '[b](https://x.y/z)',
        '[c](#d)',
        '[e](LICENSE)',
        '![p](nbs/images/p.png "t")',
        '\n[k](v)\n',
        '```python\nf(1)\n```\n\n```text\none\n```',
    ):
        assert words in text
    assert 'x\n' not in text


# ---- start


@pytest.fixture
def empty(tmp_path, monkeypatch):
    "start.py in a folder of its own, without .venv"
    for o in ('settings.ini', 'setup.py', 'pyproject.toml', 'constraints.txt'):
        (tmp_path / o).write_text(o)
    venv = tmp_path / '.venv'
    for name, value in dict(
        ROOT=tmp_path, VENV=venv, BIN=venv / 'bin', PYTHON=venv / 'bin' / 'python'
    ).items():
        monkeypatch.setattr(start, name, value)
    return tmp_path


def test_an_old_python_is_named(monkeypatch):
    monkeypatch.setattr(start.sys, 'version_info', (3, 9, 2))
    with pytest.raises(SystemExit, match=r'Python 3\.9 is too old, the lab needs 3\.11'):
        start.main(['tour'])


def test_a_missing_venv_module_is_named(empty, monkeypatch):
    monkeypatch.setattr(
        start.importlib.util, 'find_spec', lambda o: None if o == 'ensurepip' else 1
    )
    with pytest.raises(SystemExit, match='apt install python3-venv'):
        start.main(['dev'])
    assert not (empty / '.venv').exists()


class Pip:
    "Stands in for subprocess.run: `venv` makes a folder, `pip` answers as told"

    def __init__(self):
        self.codes, self.calls = {}, []

    def __call__(self, cmd, **kw):
        what = 'venv' if 'venv' in cmd else 'version' if '--version' in cmd else 'install'
        self.calls.append(what)
        if what == 'venv' and not self.codes.get(what):
            start.BIN.mkdir(parents=True, exist_ok=True)
            start.PYTHON.touch()
        return subprocess.CompletedProcess(cmd, self.codes.get(what, 0))


@pytest.fixture
def pip(monkeypatch):
    p = Pip()
    monkeypatch.setattr(start.subprocess, 'run', p)
    return p


def test_set_up_happens_once(empty, pip):
    start.install('tour')
    assert (
        pip.calls == ['venv', 'version', 'install']
        and start.ready('tour')
        and not start.ready('dev')
    )
    start.install('tour')
    assert len(pip.calls) == 3
    start.install('dev')
    assert pip.calls[3:] == ['version', 'install'] and start.ready('tour')
    (empty / 'constraints.txt').write_text('torch==0')
    assert not start.ready('tour')
    start.install('tour')
    assert start.ready('dev'), 'what was dev stays dev'


@pytest.mark.parametrize(
    'what,words',
    [
        ('venv', r'could not make \.venv'),
        ('version', 'no pip'),
        ('install', 'pip could not install'),
    ],
)
def test_a_failed_set_up_leaves_no_stamp(empty, pip, what, words):
    pip.codes[what] = 1
    with pytest.raises(SystemExit, match=words):
        start.install('tour')
    assert not start.ready('tour')
    pip.codes.clear()
    start.install('tour')
    assert start.ready('tour')


def test_a_moved_folder_gets_a_new_venv(empty, pip):
    start.install('tour')
    (empty / '.venv' / 'llm-lab-root').write_text('/elsewhere')
    (empty / '.venv' / 'llm-lab-tour').write_text('of another place')
    start.install('tour')
    assert pip.calls.count('venv') == 2


@pytest.fixture
def called(empty, monkeypatch):
    """What start.py calls, with the environment of that moment; nothing is installed, and the
    environment is put back"""
    for name in ('LLM_LAB_EXAMPLES', 'LLM_LAB_NOTEBOOK_FLAGS', 'OMP_NUM_THREADS'):
        monkeypatch.setenv(name, 'put back later')
        os.environ.pop(name)
    monkeypatch.setenv('PATH', os.environ['PATH'])
    monkeypatch.setattr(start, 'install', lambda kind: None)
    seen = []
    monkeypatch.setattr(
        start, 'call', lambda *cmd, cwd: seen.append(([*map(str, cmd)], dict(os.environ))) or 0
    )
    return seen


@pytest.mark.parametrize(
    'do,before,examples',
    [
        ('test', None, None),
        ('nightly', None, '20000'),
        ('nightly', '70', '70'),
        ('test', '70', '70'),
    ],
)
def test_nightly_asks_for_more_examples(called, do, before, examples):
    "Slow tests, slow cells and 20,000 examples, unless somebody has asked for another number"
    if before:
        os.environ['LLM_LAB_EXAMPLES'] = before
    assert start.main([do]) == 0
    ((cmd, env),) = called
    slow = do == 'nightly'
    assert env.get('LLM_LAB_EXAMPLES') == examples and env.get('LLM_LAB_NOTEBOOK_FLAGS') == (
        'slow' if slow else None
    )
    assert ('-m' in cmd[3:]) == slow


def test_tests_run_side_by_side_on_one_thread_each_and_arguments_go_to_pytest(called):
    start.main(['test', '-k', 'cache'])
    os.environ['OMP_NUM_THREADS'] = '3'
    start.main(['test'])
    (cmd, env), (_, given) = called
    assert cmd[1:3] == ['-m', 'pytest'] and cmd[-2:] == ['-k', 'cache']
    assert (
        cmd[cmd.index('-n') + 1] == str(run_notebooks.workers() + 1)
        and env['OMP_NUM_THREADS'] == '1'
    )
    assert given['OMP_NUM_THREADS'] == '3', 'what the user has set stays'


def test_what_experiments_import_is_in_an_extra():
    "Their own comparisons are in `[experiments]`; nothing of it is needed by the others"
    config = ConfigParser(delimiters=['='])
    config.read(ROOT / 'settings.ini', encoding='utf-8')
    groups = {
        k: {re.match(r'[\w-]+', o)[0].replace('-', '_') for o in shlex.split(v)}
        for k, v in config['DEFAULT'].items()
        if k.endswith('requirements')
    }
    here, wanted = {'llm_lab', *sys.stdlib_module_names}, set()
    scripts = (ROOT / 'experiments').rglob('*.py')  # bench.py, which they share, too
    for path in scripts:
        here.add(path.stem)  # a module beside run.py
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import):
                wanted |= {o.name.partition('.')[0] for o in node.names}
            if isinstance(node, ast.ImportFrom) and not node.level:
                wanted.add(node.module.partition('.')[0])
            if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'require':
                wanted.add(node.args[0].value.partition('.')[0])
    assert {'torch', 'rustbpe', 'local_attention'} <= wanted
    assert wanted - here <= groups['requirements'] | groups['experiments_requirements'], (
        'not in an extra'
    )


def test_without_network_loopback_is_up_and_nothing_else_is_reached(tmp_path):
    probe = tmp_path / 'probe.py'
    probe.write_text("""
import socket
with socket.create_server(('127.0.0.1', 0)) as server:
    socket.create_connection(server.getsockname()).close()
try:
    socket.create_connection(('192.0.2.1', 80), 30)
except OSError as e:
    print(e.errno, socket.if_nameindex())
""")
    cmd = [sys.executable, str(ROOT / '.ci' / 'offline.py')]
    out = subprocess.run([*cmd, sys.executable, str(probe)], capture_output=True, text=True)
    if out.returncode == 125:
        pytest.skip(out.stderr.strip())
    # 101: the network is unreachable
    assert out.stdout == "101 [(1, 'lo')]\n", out.stdout + out.stderr
    assert subprocess.run([*cmd, 'sh', '-c', 'exit 7']).returncode == 7


def test_where_no_namespace_can_be_made_a_line_says_so(tmp_path):
    cmd = [sys.executable, str(ROOT / '.ci' / 'offline.py'), 'true']
    out = subprocess.run(cmd, capture_output=True, text=True, env={'PATH': str(tmp_path)})
    assert out.returncode == 125 and 'no network namespace' in out.stderr


@pytest.mark.skipif(not shutil.which('bash'), reason='no bash')
def test_the_script_of_all_checks_can_be_read_by_bash():
    assert subprocess.run(['bash', '-n', str(ROOT / '.ci' / 'run')]).returncode == 0


def test_a_wrong_word_shows_the_usage(capsys):
    assert start.main(['turn']) == 2 and 'start.py tour' in capsys.readouterr().err


def test_every_break_of_make_mutants_still_fits():
    "Its text stands in its module once, and the test that should notice it exists"
    import mutants

    assert len(mutants.MUTANTS) >= 6 and list(mutants.wrong()) == []


def test_a_break_that_fits_no_more_is_told(tmp_path):
    import mutants

    for name in ('llm_lab', 'tests'):
        (tmp_path / name).mkdir()
    for module, *_, test in mutants.MUTANTS.values():
        (tmp_path / 'llm_lab' / f'{module}.py').write_text('')
        (tmp_path / 'tests' / test.partition('::')[0]).write_text('')
    assert len(list(mutants.wrong(tmp_path))) == 2 * len(mutants.MUTANTS)


# ---- moving chapters and cells


def book_to_move(root):
    "Two chapters: 01_old with two functions, 02_user that needs both; and a test that does, too"

    def chapter(name, *cells):
        made = [dict(cell_type='markdown', id=f'{name}-t', metadata={}, source='# T\n\n> why')]
        for n, text in enumerate([f'#| default_exp {name[3:]}', '#| hide\nimport sys', *cells]):
            cell = dict(cell_type='code', id=f'{name}-{n}', metadata={}, outputs=[], source=text)
            made.append(cell | dict(execution_count=None))
        nb = dict(metadata={}, nbformat=4, nbformat_minor=5, cells=made)
        (root / 'nbs' / f'{name}.ipynb').write_text(json.dumps(nb))

    (root / 'nbs').mkdir()
    (root / 'tests').mkdir()
    chapter(
        '01_old',
        '#| export\nimport math\nfrom pathlib import Path',
        '#| export\ndef low(size):\n    path = size\n    return math.sqrt(path)',
        '#| export\ndef high(x):\n    return low(x), Path(x)',
    )
    use = 'from llm_lab.old import high, low as l\nassert "llm_lab.old.high" and "llm_lab.old:low"'
    chapter('02_user', f'#| export\n{use}', 'SCRIPT = "from llm_lab.old import low; low(1)"')
    (root / 'tests' / 'test_a.py').write_text('def f():\n    from llm_lab.old import high\n')
    return {
        '11_first': {'from': '01_old', 'cells': [f'01_old-{n}' for n in ('t', 0, 1, 2, 3)]},
        '12_second': {'from': '01_old', 'cells': ['01_old-4'], 'title': '# S\n\n> so'},
        '21_reader': '02_user',
    }


def moved(root, plan):
    plan['11_first']['main'] = True
    (root / 'plan.json').write_text(json.dumps(plan))
    out = tool('move.py', root / 'plan.json', root)
    cells = {}
    for p in sorted((root / 'nbs').glob('*.ipynb')):
        cells[p.stem] = [''.join(c['source']) for c in json.loads(p.read_text())['cells']]
    return out, cells


def test_a_chapter_is_taken_apart_and_its_imports_follow(tmp_path):
    out, cells = moved(tmp_path, book_to_move(tmp_path))
    assert out.returncode == 0 and out.stdout == '', out.stdout + out.stderr
    assert [*cells] == ['11_first', '12_second', '21_reader']
    assert '#| export\nimport math' in cells['11_first']  # and not Path, which it does not need
    second = cells['12_second']
    assert second[:2] == ['# S\n\n> so', '#| default_exp second'] and second[2].startswith(
        '#| hide'
    )
    assert '#| export\nfrom pathlib import Path\nfrom llm_lab.first import low' in second
    text = '\n'.join(cells['21_reader'])
    assert 'from llm_lab.second import high\nfrom llm_lab.first import low as l\n' in text
    assert '"llm_lab.second.high" and "llm_lab.first:low"' in text
    assert '"from llm_lab.first import low; low(1)"' in text and 'default_exp reader' in text
    said = (tmp_path / 'tests' / 'test_a.py').read_text()
    assert said == 'def f():\n    from llm_lab.second import high\n'


def test_a_plan_that_forgets_a_cell_is_refused_and_nothing_is_moved(tmp_path):
    plan = book_to_move(tmp_path)
    plan['11_first']['cells'].pop()
    out, cells = moved(tmp_path, plan)
    assert out.returncode == 1 and "01_old: missing {'01_old-3'}" in out.stderr
    assert [*cells] == ['01_old', '02_user']


def test_what_a_program_cannot_decide_is_told(tmp_path):
    plan = book_to_move(tmp_path)
    (tmp_path / 'tests' / 'test_a.py').write_text('from llm_lab import old\n')
    out, _ = moved(tmp_path, plan)
    assert out.stdout == 'by hand: tests/test_a.py: from llm_lab import old\n'


# ---- giving names other names


def renamed(root, names, module, test='', prose='', second='pass'):
    "What a book of one chapter `files` and one test is after the renaming"
    (root / 'nbs').mkdir()
    (root / 'tests').mkdir()
    sources = ['# T\n\n> why\n\n' + prose, '#| default_exp files', '#| export\n' + module, second]
    path = notebook(root / 'nbs' / '02_files.ipynb', *sources)
    (root / 'tests' / 'test_a.py').write_text(test)
    (root / 'names.json').write_text(json.dumps(names))
    out = tool('rename.py', root / 'names.json', root)
    assert out.returncode == 0, out.stderr
    texts = [''.join(c['source']) for c in json.loads(path.read_text())['cells']]
    return out.stdout, texts, (root / 'tests' / 'test_a.py').read_text()


NAMES = {'files.cut': 'split_text', 'files.Live': 'StatusLine'}


def test_a_name_is_changed_where_it_is_that_name_and_nowhere_else(tmp_path):
    module = '''class Live:
    cut = 1  # a name of its own

    def Live(self, cut=2):
        return self.cut + cut


def cut(text, Live=None):
    "`split_text` makes pieces"
    cut.said = [cut for cut in text] or [cut(x) for x in text]
    return lambda cut: Live


def other(x):
    cut = x
    return f'{cut} {x.cut} {Live(cut=3)}', dict(cut=4)


def another(x: Live = cut) -> Live:
    return f'{cut(x)} and {x!r}'
'''
    said, cells, _ = renamed(
        tmp_path, NAMES, module, prose='As `split_text(x)` and `files.StatusLine`, not cut.'
    )
    assert said == ''
    assert (
        cells[2]
        == '#| export\n'
        + '''class StatusLine:
    cut = 1  # a name of its own

    def Live(self, cut=2):
        return self.cut + cut


def split_text(text, Live=None):
    "`split_text` makes pieces"
    split_text.said = [cut for cut in text] or [split_text(x) for x in text]
    return lambda cut: Live


def other(x):
    cut = x
    return f'{cut} {x.cut} {StatusLine(cut=3)}', dict(cut=4)


def another(x: StatusLine = split_text) -> StatusLine:
    return f'{split_text(x)} and {x!r}'
'''
    )
    assert cells[0].endswith('As `split_text(x)` and `files.StatusLine`, not cut.')


def test_imports_modules_strings_and_scripts_follow(tmp_path):
    test = '''from llm_lab import files as f
from llm_lab.files import Live, cut as c

SCRIPT = """
from llm_lab.files import cut
print(cut('a'), "cut")
"""


def test_it(monkeypatch):
    from llm_lab.files import cut

    monkeypatch.setattr(f, 'cut', c)
    monkeypatch.setattr('llm_lab.files.cut', cut)
    assert f.cut is f.Live and Live and 'cut'
'''
    said, _, got = renamed(tmp_path, NAMES, 'def cut(): pass\n\n\nclass Live: pass', test)
    assert said == ''
    assert got == test.replace(
        'import Live, cut as c', 'import StatusLine, split_text as c'
    ).replace('import cut', 'import split_text').replace(
        "print(cut('a')", "print(split_text('a')"
    ).replace("f, 'cut'", "f, 'split_text'").replace(
        'llm_lab.files.cut', 'llm_lab.files.split_text'
    ).replace(', cut)', ', split_text)').replace('f.cut', 'f.split_text').replace(
        'f.Live and Live', 'f.StatusLine and StatusLine'
    )


def test_a_new_name_that_is_taken_is_told(tmp_path):
    test = 'from llm_lab.files import cut\n\n\ndef split_text():\n    return cut\n'
    said, _, _ = renamed(tmp_path, NAMES, 'def cut(): pass', test)
    assert said == (
        'by hand: tests/test_a.py: split_text is there already, cut would be called so\n'
    )


# ---- members, keywords and parameters

RULES = [
    {
        'old': 'steps',
        'new': 'transforms',
        'attr': r'self|(.*\.)?attn',
        'attr_not': r'self@(?!files\.Attention\.).*',
        'kw': 'part|Attention',
        'param': r'files\.Attention\.__init__',
        'defs': r'files\.Attention\.steps',
        'field': r'files\.Attention',
        'text': [['takes no steps', 'takes no transforms']],
    }
]


def test_a_member_is_renamed_where_a_rule_says_whose_it_is(tmp_path):
    module = '''class Attention:
    steps: tuple = ()

    def __init__(self, steps=()):
        "ä"
        self.steps = [s for s in steps]  # an optimizer's steps stay
        inner = lambda steps: steps

    def steps(self):
        return f'{self.steps} and {len(self.steps)} steps'


class Run:
    steps = 9

    def left(self):
        return self.steps


def train(steps, model):
    return steps + len(model.attn.steps)'''
    second = "%time part(1)\npart(steps=2); train(steps=3); raise ValueError('takes no steps')"
    said, cells, test = renamed(
        tmp_path,
        RULES,
        module,
        'part(steps=train(steps=1, model=model))\n',
        'It takes no steps.',
        second,
    )
    assert said == ''
    want = module.replace('    steps: tuple', '    transforms: tuple')
    want = want.replace('__init__(self, steps=', '__init__(self, transforms=')
    want = want.replace(
        'self.steps = [s for s in steps]', 'self.transforms = [s for s in transforms]'
    )
    want = want.replace('def steps', 'def transforms').replace('attn.steps', 'attn.transforms')
    want = want.replace(
        "f'{self.steps} and {len(self.steps)} steps'",
        "f'{self.transforms} and {len(self.transforms)} steps'",
    )
    assert cells[2] == '#| export\n' + want
    assert cells[3] == second.replace('part(steps', 'part(transforms').replace(
        'no steps', 'no transforms'
    )
    assert cells[0].endswith('It takes no transforms.')
    assert test == 'part(transforms=train(steps=1, model=model))\n'


def test_a_rule_that_finds_no_parameter_is_told(tmp_path):
    rules = [dict(old='a', new='b', param=r'files\.f')]
    said, _, _ = renamed(tmp_path, rules, 'def f(x): pass')
    assert said == 'by hand: 02_files.ipynb: files.f has no parameter or variable a\n'
