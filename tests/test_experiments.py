"What the experiments share, and that each of them can begin"

import ast
import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parent.parent / 'experiments'
sys.path.insert(0, str(EXPERIMENTS))
import bench

SCRIPTS = sorted(EXPERIMENTS.glob('*/run.py'))


def opened(name):
    "The script of an experiment as a module; nothing is measured"
    spec = importlib.util.spec_from_file_location(f'run_{name}', EXPERIMENTS / name / 'run.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- the scripts


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda p: p.parent.name)
def test_a_script_uses_what_bench_has_and_repeats_nothing_of_it(path):
    text = path.read_text(encoding='utf-8')
    parsed = ast.parse(text)
    for node in ast.walk(parsed):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == 'bench':
            assert hasattr(bench, node.attr), node.attr
    assert 'bench.parser(__doc__' in text and 'bench.report(__file__' in text
    for own in ('ArgumentParser', 'ProcessPoolExecutor', "'result.json').write_text"):
        assert own not in text, own


def test_every_choice_of_the_modern_block_makes_a_model():
    from llm_lab.gpt import MiniGPT

    module = opened('modern_block')
    for name, choice in module.CHOICES.items():
        assert MiniGPT(replace(module.BASE, **choice)).n_params > 100_000, name


def test_the_experts_multiply_as_much_as_the_dense_model():
    module = opened('moe')
    dense = module.work('dense', 'small')
    for name in module.CELLS:
        assert 1 <= module.work(name, 'small') / dense < 1.05, name  # the router's share


def test_bench_imports_neither_torch_nor_the_library():
    "`busy_machine` measures what it is not to have imported the library before PyTorch"
    code = (
        f'import sys; sys.path.insert(0, {str(EXPERIMENTS)!r}); import bench; print(*sys.modules)'
    )
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert not {'torch', 'llm_lab'} & set(said.stdout.split())


# ---- turns


def test_each_round_has_a_turn_of_each_way_and_the_warm_up_is_left_out():
    calls = []
    ways = {name: lambda name=name: calls.append(name) or len(calls) for name in 'abc'}
    found = bench.take_turns(ways, 2, 'test', warm_up=1)
    assert ''.join(calls) == 'abcabcabc' and found == dict(a=[4, 7], b=[5, 8], c=[6, 9])
    assert bench.medians(found) == dict(a=5.5, b=6.5, c=7.5)
    calls.clear()
    bench.take_turns(ways, 20, 'test', shuffled=True)
    rounds = {''.join(calls[k : k + 3]) for k in range(0, 60, 3)}
    assert len(rounds) > 3 and all(sorted(r) == [*'abc'] for r in rounds)


def test_the_interval_of_a_ratio_is_that_of_the_sign_test():
    "The tables have: of 12 values the 3rd and the 10th, of 40 the 14th and the 27th"
    ones = [1.0] * 40
    assert bench.ratio([2, 4, 9], [1, 2, 3]) == 2
    assert bench.ratio_interval(range(1, 6), ones) is None
    assert bench.ratio_interval(range(1, 7), ones) == [1, 6]
    assert bench.ratio_interval(range(1, 13), ones) == [3, 10]
    assert bench.ratio_interval(range(1, 41), ones) == [14, 27]


ECHO = f"""
import sys
sys.path.insert(0, {str(EXPERIMENTS)!r})
import bench
answer = bench.answers()
print('this is no answer')
answer(sys.argv[1:])
while True:
    answer(dict(said=bench.wait_for_turn().strip()))
"""


def test_a_child_answers_when_it_is_its_turn(tmp_path):
    (tmp_path / 'echo.py').write_text(ECHO)
    child = bench.Child(tmp_path / 'echo.py', '--loop', 3)
    assert child.read() == ['--loop', '3']
    assert child.turn() == dict(said='go') and child.turn(12) == dict(said='12')
    child.end()
    assert child.process.returncode == 0
    with pytest.raises(RuntimeError, match='echo.py'):
        child.read()


# ---- cells and seeds


def test_a_cell_is_made_once(tmp_path):
    made = []

    def cell():
        made.append(1)
        return {'a': (1, 2)}

    path = tmp_path / 'runs' / 'a.json'
    assert bench.kept(path, cell) == {'a': [1, 2]} == bench.kept(path, cell)
    assert len(made) == 1 and json.loads(path.read_text()) == {'a': [1, 2]}


def test_one_job_and_two_run_the_same_cells():
    grid = [(9, 2), (8, 3)]
    assert bench.run_cells(divmod, grid, 1) == {(9, 2): (4, 1), (8, 3): (2, 2)}
    assert bench.run_cells(divmod, grid, 2) == bench.run_cells(divmod, grid, 1)


def test_paired_seeds():
    "A table's example: 1, 2, 3, 4, 5 have the mean 3 and the standard deviation 1.5811"
    assert bench.summary([1.0, 2.0, 3.0, 4.0, 5.0]) == dict(mean=3.0, plus_minus=1.9629)
    assert bench.interval([2.5])[0] == 2.5 and math.isnan(bench.interval([2.5])[1])
    assert bench.differences([3, 5], [1, 1]) == [2, 4]
    with pytest.raises(ValueError):
        bench.differences([1, 2], [1])


def test_the_closing_line(tmp_path, capsys):
    script = tmp_path / 'run.py'
    bench.report(script, dict(a=1))
    assert capsys.readouterr().out == '{"a": 1}\n' and not [*tmp_path.iterdir()]
    bench.report(script, dict(a=1), save=True, name='result_full.json')
    assert (tmp_path / 'result_full.json').read_text() == '{"a": 1}\n'


def test_common_options():
    a = bench.parser('what', rounds=3, jobs=2).parse_args(['--jobs', '1', '--save'])
    assert (a.rounds, a.jobs, a.save) == (3, 1, True)
