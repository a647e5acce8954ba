"""The root of the package: `from helpers import manual

import llm_lab as lab`, and every name that stands there."""

import ast
import inspect
import os
import random
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from helpers import manual

import llm_lab as lab

ROOT = Path(__file__).resolve().parent.parent
INIT = ROOT / 'llm_lab' / '__init__.py'


def python(code, *flags, **env):
    "What a fresh Python prints"
    done = subprocess.run(
        [sys.executable, *flags, '-c', textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
    )
    assert not done.returncode, done.stderr
    return done.stdout


def declared_names():
    "{name: module} that a type checker sees: the imports under TYPE_CHECKING"
    found = {}
    for node in ast.walk(ast.parse(INIT.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and node.level:
            for alias in node.names:
                assert alias.asname == alias.name, alias.name  # else it is no export (PEP 484)
                found[alias.name] = node.module
    return found


def test_what_a_type_checker_sees_is_what_the_program_finds():
    assert declared_names() == lab._HOME
    for name, module in lab._HOME.items():
        value = getattr(lab, name)
        home = sys.modules[f'llm_lab.{module}']
        assert name in home.__all__, f'{name} is not public in {module}'
        assert value is getattr(home, name)


def test_a_name_is_the_same_before_and_after_all_modules_are_imported():
    said = python("""
        import pkgutil
        from importlib import import_module
        import llm_lab as lab
        before = {name: getattr(lab, name) for name in lab._HOME}
        for module in pkgutil.iter_modules(lab.__path__):
            if module.name != '__main__':
                import_module(f'llm_lab.{module.name}')
        print([name for name in lab._HOME if getattr(lab, name) is not before[name]])
    """)
    assert said.strip() == '[]'


def test_the_root_imports_nothing_before_it_is_asked():
    said = python("""
        import sys
        before = set(sys.modules)
        import llm_lab as lab
        print(sorted(set(sys.modules) - before))
        lab.home()
        print('torch' in sys.modules)
    """)
    # Python's own, and no torch with the names that need none
    assert said.splitlines() == ["['llm_lab']", 'False']


def test_a_name_that_is_not_there_is_one_line():
    with pytest.raises(AttributeError, match="llm_lab has no 'evalute': did you mean 'evaluate'?"):
        getattr(lab, 'evalute')  # noqa: B009
    assert not hasattr(lab, '__wrapped__')
    assert {'fit', 'MiniGPT', '__version__'} <= {*dir(lab)}
    with pytest.raises(ImportError, match="cannot import name 'fot'"):
        from llm_lab import fot  # noqa: F401


def test_help_says_what_each_argument_is():
    said = python("import llm_lab as lab; help(lab.fit)")
    for line in ('clip: largest norm of the whole gradient', 'seed: of dropout'):
        assert line in said, line
    # a method that a later cell adds is documented, too
    assert 'vocab_size: 256 bytes, merges' in inspect.getdoc(lab.BPETokenizer.train)


def test_help_of_the_root_is_a_page():
    said = python("import llm_lab as lab; help(lab)")
    assert 'Training     batches, fit' in said and len(said.splitlines()) < 200


def test_python_m_llm_lab_is_the_command():
    done = subprocess.run(
        [sys.executable, '-m', 'llm_lab', '--help'], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0 and 'tour' in done.stdout and not done.stderr


# ---- the README's script


def readme_blocks():
    "The Python blocks of the README and the guide, in order; the first is the common path"
    blocks = re.findall(r'^```python\n(.*?)^```', manual(), re.M | re.S)
    assert 'lab.to_hf(' in blocks[0] and len(blocks) >= 3
    return blocks


def write_book(path):
    "A text of a few thousand words that a tokenizer has something to learn from"
    words = [f'{a}{b}{c}' for a in 'blmst' for b in ('a', 'ee', 'o') for c in ('t', 'n', 'rd')]
    draw = random.Random(0)
    lines = ['It was ' + ' '.join(draw.choices(words, k=9)) + '.\n' for _ in range(900)]
    path.write_text(''.join(lines))


def smaller(block):
    "The same calls with a model and a run that take a second"
    sizes = {
        'steps=500': 'steps=4',
        'd_model=128, n_layers=4': 'd_model=32, n_layers=1',
        'vocab_size=1024': 'vocab_size=300',
        'max_new_tokens=200': 'max_new_tokens=5',
        'model, tok, corpus)': 'model, tok, corpus, max_tokens=2000)',
    }
    for old, new in sizes.items():
        block = block.replace(old, new)
    return block


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "A folder with what the wheel installs, and nothing of the book beside it"
    place = tmp_path_factory.mktemp('wheel')
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'MANIFEST.in', 'README.md'):
        shutil.copy(ROOT / name, place)
    shutil.copytree(ROOT / 'llm_lab', place / 'llm_lab')
    words = ['pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', 'dist', '.']
    done = subprocess.run([sys.executable, '-m', *words], capture_output=True, text=True, cwd=place)
    assert not done.returncode, done.stderr
    (wheel,) = (place / 'dist').glob('*.whl')
    with zipfile.ZipFile(wheel) as files:
        files.extractall(place / 'installed')
    return place / 'installed'


def test_the_wheel_holds_all_that_is_no_module(installed):
    def held(root):
        paths = [p.relative_to(root) for p in (root / 'llm_lab').rglob('*') if p.is_file()]
        return {p for p in paths if '__pycache__' not in p.parts}

    assert held(installed) == held(ROOT)
    assert {'py.typed', '__main__.py'} <= {p.name for p in held(installed)}


def test_the_readmes_script_runs_where_only_the_wheel_is_installed(installed, tmp_path):
    code = '\n'.join(map(smaller, readme_blocks()))
    assert 'steps=4' in code and 'd_model=32' in code and 'max_tokens=2000' in code
    write_book(tmp_path / 'my_book.txt')
    write_book(tmp_path / 'letters.txt')
    (mine,) = (block for block in readme_blocks() if 'lab.register(' in block)
    (tmp_path / 'mine.py').write_text(mine)
    code += '\nprint(lab.__file__, len(texts), likely.tolist(), type(model).__name__)'
    done = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, 'LLM_LAB_HOME': str(tmp_path), 'PYTHONPATH': str(installed)},
    )
    assert not done.returncode, done.stderr
    lines = done.stdout.strip().splitlines()
    score = next(line for line in lines if line.startswith('loss '))
    last = lines[-1]
    assert re.match(r'loss [\d.]+ nats per token, perplexity [\d.]+, [\d.]+ bits per byte', score)
    assert last.startswith(str(installed))
    assert re.search(r' 2 \[-[\d.]+, -[\d.]+\] MiniGPT$', last)
    assert (tmp_path / 'artifacts' / 'mine_hf' / 'model.safetensors').is_file()
    assert {p.name for p in (tmp_path / 'artifacts').iterdir()} == {
        'mine',
        'mine_hf',
        'book_model',
        'aft',
    }


def test_the_docstring_shows_the_readmes_script():
    shown = lab.__doc__[lab.__doc__.index('    import llm_lab') : lab.__doc__.index('\nText ')]
    assert textwrap.dedent(shown).rstrip() == readme_blocks()[0].rstrip()


# what a reader knows without a note
SELF_EVIDENT = {'self', 'model', 'tokenizer', 'cfg', 'layer', 'seed', 'args', 'kwargs'}


def test_each_argument_of_the_root_has_a_note():
    missing = []
    for name in lab._HOME:
        value = getattr(lab, name)
        if not callable(value) or name in ('part', 'tiny_tales', 'LabError', 'Tokenizer'):
            continue
        said = inspect.getdoc(value) or ''
        for argument in inspect.signature(value).parameters:
            noted = re.search(rf'^\s+{argument}: \S', said, re.M)
            if argument not in SELF_EVIDENT and not noted:
                missing.append(f'{name}({argument})')
    assert missing == []
