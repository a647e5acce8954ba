"What a type checker knows of the root. It takes half a minute: `.ci/run` calls it by itself."

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_root import readme_blocks

import llm_lab as lab

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def checked(tmp_path_factory):
    "A function: what mypy says of some code"
    folder = tmp_path_factory.mktemp('types')

    def run(code, **beside):
        for module, text in beside.items():
            (folder / f'{module}.py').write_text(text, encoding='utf-8')
        # a name of its own: mypy takes a file of the same second and size for the one it knows
        name = f'script{len([*folder.glob("script*.py")])}.py'
        (folder / name).write_text(code, encoding='utf-8')
        words = ['-m', 'mypy', '--cache-dir', str(folder / 'cache'), name]
        done = subprocess.run(
            [sys.executable, *words],
            capture_output=True,
            text=True,
            cwd=folder,
            env={**os.environ, 'MYPYPATH': str(ROOT)},
        )
        assert not done.stderr, done.stderr
        # what is said of the package itself is no business of the script's
        return [line for line in done.stdout.splitlines() if line.startswith(name)]

    return run


def test_the_readmes_scripts_have_no_error(checked):
    blocks = readme_blocks()
    # one of them is the reader's own file, which the next one imports
    (mine,) = (block for block in blocks if 'class AFT(lab.Part)' in block)
    blocks.remove(mine)
    assert checked('\n'.join(blocks), mine=mine) == []


def test_no_name_of_the_root_is_any(checked):
    names = '\n'.join(f'reveal_type(lab.{name})' for name in lab._HOME)
    said = checked(f'import llm_lab as lab\n{names}\n')
    kinds = [re.search('Revealed type is "(.*)"', line)[1] for line in said]
    assert len(kinds) == len(lab._HOME)
    assert [name for name, kind in zip(lab._HOME, kinds) if kind == 'Any'] == []


def test_a_misspelt_keyword_is_an_error(checked):
    block = readme_blocks()[0]
    slips = {
        'lr=4e-3': ('rate=4e-3', 'Unexpected keyword argument "rate" for "fit"'),
        'batch_size=16': ('batchsize=16', 'Unexpected keyword argument "batchsize" for "batches"'),
        'vocab_size=1024': ("vocab_size='1024'", 'incompatible type "str"; expected "int"'),
        'd_model=128': ('dmodel=128', 'Unexpected keyword argument "dmodel" for "llama"'),
        'temperature=0.8': ('temprature=0.8', 'argument "temprature" for "sample"'),
        'lab.evaluate': ('lab.evalute', 'has no attribute "evalute"'),
    }
    for right, (wrong, said) in slips.items():
        found = [o for o in checked(block.replace(right, wrong)) if ' error: ' in o]
        assert len(found) == 1 and said in found[0], (wrong, found)
