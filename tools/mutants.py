"""Break the promises of a run on purpose, one at a time: each break must turn a named test red.

python tools/mutants.py [NAME …] [--list]

A copy of the project is changed in one place, and the test that should notice runs on it. First
all these tests must be green as things are. Exit code 1 if a break stays unnoticed."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESUME = 'test_checkpoint.py::test_a_run_ends_with_the_same_bits_wherever_it_is_resumed'
ONLOOKERS = 'test_checkpoint.py::test_evaluating_or_sampling_during_a_run_changes_no_weight'
FAULTS = (
    'test_checkpoint.py::test_no_checkpoint_is_lost_when_any_system_call_of_a_save_kills_or_fails'
)
RUN = 'test_run.py::test_'
KILLED = RUN + 'a_run_that_is_killed_at_every_place_ends_with_the_same_bits'
CHANGES = 'test_changes.py::test_nothing_that_is_changed_is_passed_over_in_silence'
DAMAGE = (
    'test_checkpoint.py::test_a_thousand_flipped_bits_and_a_thousand_cut_files_are_refused_by_name'
)

MUTANTS = {  # name: (module, what stands there, what it becomes, the test that must turn red)
    'no RNG restore': (
        'train',
        '        restore_rng_state(self.random or {})\n',
        '',
        RESUME,
    ),
    'no cursor': (
        'checkpoint',
        "for k in ('step', 'tokens', 'seconds', 'notes')",
        "for k in ('tokens', 'seconds', 'notes')",
        RESUME,
    ),
    'manifest unchecked': (
        'package',
        "if _sha(data) != manifest['files'].get(name):",
        'if False:',
        DAMAGE,
    ),
    'in-place write': (
        'checkpoint',
        'with atomic_write(self.folder_of(run.step)) as new:',
        'if new := self.folder_of(run.step):',
        FAULTS,
    ),
    'prune before commit': (
        'checkpoint',
        'self.save(run, random)',
        '[remove(self.folder_of(s)) for s in self.steps()[: 1 - self.keep or None]]\n'
        '            self.save(run, random)',
        FAULTS,
    ),
    'eval on the global RNG': (
        'train',
        'with preserve_rng(self.state.history.device):\n            said',
        'if True:\n            said',
        ONLOOKERS,
    ),
    'rows not cut': (
        'runs',
        'job.metrics.truncate(job.run.step, source)',
        'pass',
        KILLED,
    ),
    'one dropout for all': (
        'checkpoint',
        "_states(state['random'][self.rank])",
        "_states(state['random'][0])",
        RUN + 'when_one_of_two_is_killed_the_other_ends_and_both_go_on',
    ),
    'every process reads all': (
        'batching',
        'self.rank :: self.world_size',
        '::1',
        RUN + 'two_processes_learn_what_one_learns',
    ),
    'no lock': (
        'files',
        'lock.acquire(blocking=False)',
        'pass',
        RUN + 'two_do_not_write_into_one_folder',
    ),
    'nobody is asked': (
        'runs',
        'float(self.asked == r) for r in reasons',
        '0. for r in reasons',
        RUN + 'when_one_of_two_is_asked_to_end_both_end_at_the_same_step',
    ),
    'environment in a config': (
        'config',
        "any(re.search(r'(?s)\\$\\{.*:', text)",
        "any(re.search(r'nothing', text)",
        RUN + 'every_slip_is_answered_by_one_line_that_names_the_key',
    ),
    'config not kept': (
        'runs',
        "known = state.get('facts', {}).get('config') or decided",
        'known = None',
        CHANGES,
    ),
    'edits not seen': (
        'config',
        'other = [p for p in (then | now) if then.get(p, ...) != now.get(p, ...)]',
        'other = []',
        CHANGES,
    ),
    'log cleared': (
        'runs',
        'if named or went_on or beyond:',
        'if False:',
        CHANGES,
    ),
    'any text': ('runs', 'if sha256 and corpus.sha256 != sha256:', 'if False:', CHANGES),
    'any config of the name': (
        'runs',
        "if 'source' not in record or same_config(record, config)",
        'if True',
        CHANGES,
    ),
    'NaN saved': (
        'checkpoint',
        'if not p.isfinite().all():',
        'if False:',
        'test_changes.py::test_a_model_that_has_diverged_is_not_saved',
    ),
}


def wrong(root=ROOT):
    "What does not fit any more: a text that is not there once, a test that is gone"
    for name, (module, old, _, test) in MUTANTS.items():
        if (n := (root / 'llm_lab' / f'{module}.py').read_text(encoding='utf-8').count(old)) != 1:
            yield f'{name}: llm_lab/{module}.py holds its text {n} times'
        file, _, function = test.partition('::')
        if f'def {function}(' not in (root / 'tests' / file).read_text(encoding='utf-8'):
            yield f'{name}: there is no {test}'


def outcome(folder, tests):
    "'green', 'red' (the tests ran, and at least one failed), or what pytest said instead"
    env = {**os.environ, 'PYTHONPATH': str(folder), 'OMP_NUM_THREADS': '1'}
    p = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-x', '-p', 'no:cacheprovider', '-rfs', *tests],
        cwd=folder / 'tests',
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    failed = any(
        line.startswith('FAILED ') and any(t.partition('::')[2] in line for t in tests)
        for line in p.stdout.splitlines()
    )
    if p.returncode == 0 and 'skipped' not in p.stdout:
        return 'green'
    return 'red' if p.returncode == 1 and failed else p.stdout[-1500:] + p.stderr[-500:]


def copied(folder):
    for name in ('llm_lab', 'tests', 'tools', 'nbs'):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('settings.ini', 'setup.py', 'pyproject.toml'):
        shutil.copy(ROOT / name, folder / name)
    return folder


def main(names):
    if bad := list(wrong()):
        return print('\n'.join(bad)) or 1
    chosen = {n: m for n, m in MUTANTS.items() if not names or n in names}
    with tempfile.TemporaryDirectory() as t:
        base = copied(Path(t) / 'base')
        said = outcome(base, sorted({m[3] for m in chosen.values()}))
        print(f'as things are: {said}', flush=True)
        if said != 'green':
            return 1
        alive = []
        for name, (module, old, new, test) in chosen.items():
            start, path = time.time(), base / 'llm_lab' / f'{module}.py'
            text = path.read_text(encoding='utf-8')
            path.write_text(text.replace(old, new), encoding='utf-8')
            said = outcome(base, [test])
            path.write_text(text, encoding='utf-8')
            if said != 'red':
                alive.append(name)
            print(
                (
                    f'{"red  " if said == "red" else "ALIVE"} {time.time() - start:5.0f} s  '
                    f'{name}: {test.partition("::")[2]}'
                ),
                flush=True,
            )
            if said not in ('red', 'green'):
                print(said)
    print(f'{len(chosen) - len(alive)} breaks noticed, {len(alive)} not')
    return 1 if alive else 0


if __name__ == '__main__':
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument('names', nargs='*', metavar='NAME', help='only these; all if none')
    ap.add_argument('--list', action='store_true', help='print the names')
    a = ap.parse_args()
    if unknown := [n for n in a.names if n not in MUTANTS]:
        ap.error(f'no break is called {unknown[0]!r}: --list shows them')
    if a.list:
        print('\n'.join(MUTANTS))
    else:
        sys.exit(main(a.names))
