"""Set the lab up once in .venv, then do one thing.

python3 tools/start.py tour [arguments]    train a small GPT and read what it writes
python3 tools/start.py lab                 open the chapters in JupyterLab
python3 tools/start.py test [arguments]    run every chapter and every test, as many at a time as
                                           there are cores; arguments go to pytest:
                                           `test -k cache` runs what has the word in its name
python3 tools/start.py nightly             the same, slow tests too, and 20,000 examples where
                                           hypothesis makes them up
python3 tools/start.py dev                 only set up
python3 tools/start.py run COMMAND …       any tool of .venv, as `run ruff check`
"""

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / '.venv'
BIN = VENV / ('Scripts' if os.name == 'nt' else 'bin')
PYTHON = BIN / ('python.exe' if os.name == 'nt' else 'python')
OLDEST = (3, 11)
EXTRAS = {'tour': 'lab,train,data', 'dev': 'dev'}


def stop(words):
    sys.exit('start: ' + words)


def key():
    "A hash of all that decides what .venv should hold"
    parts = [str(ROOT)] + [
        (ROOT / o).read_text(encoding='utf-8')
        for o in ('settings.ini', 'setup.py', 'pyproject.toml', 'constraints.txt')
    ]
    cfg = VENV / 'pyvenv.cfg'
    return hashlib.sha256(
        '\0'.join(parts + [cfg.read_text(encoding='utf-8') if cfg.exists() else '']).encode()
    ).hexdigest()


def stamp(kind):
    return VENV / ('llm-lab-' + kind)


def ready(kind):
    "Is .venv set up for `kind`? What is enough for dev is enough for the tour."
    return PYTHON.exists() and any(
        stamp(o).exists() and stamp(o).read_text() == key() for o in {kind, 'dev'}
    )


@contextlib.contextmanager
def lock():
    "One set-up at a time; the system lets go when the process ends, however it ends"
    with open(ROOT / '.venv.lock', 'w') as f:
        if os.name == 'nt':
            import msvcrt

            while True:
                try:
                    msvcrt.locking(f.fileno(), msvcrt.LK_LOCK, 1)  # gives up after 10 s
                except OSError:
                    continue
                break
        else:
            import fcntl

            with contextlib.suppress(OSError):
                fcntl.flock(f, fcntl.LOCK_EX)  # some network disks have no locks
        yield


def make_venv():
    "Make .venv, anew where it was made for another place"
    if not all(map(importlib.util.find_spec, ('venv', 'ensurepip'))):
        stop(
            'this Python cannot make a virtual environment: `apt install python3-venv` '
            '(Debian, Ubuntu), then run this again'
        )
    ours = (VENV / 'llm-lab-root').exists()
    if PYTHON.exists() and not (
        ours and (VENV / 'llm-lab-root').read_text(encoding='utf-8') != str(ROOT)
    ):
        return
    if subprocess.run(
        [sys.executable, '-m', 'venv', '--clear', str(VENV)], stdout=subprocess.DEVNULL
    ).returncode:
        stop(
            'could not make .venv: see the lines above; `rm -r .venv` and a disk with 5 GB '
            'free often help'
        )
    (VENV / 'llm-lab-root').write_text(str(ROOT), encoding='utf-8')


def install(kind):
    "Set up .venv for `kind`, unless that is done"
    if ready(kind):
        return
    with lock():
        if ready(kind):
            return
        make_venv()
        extras = EXTRAS[kind]
        if stamp('dev').exists():
            kind, extras = 'dev', EXTRAS['dev']  # what was dev stays dev
        for o in EXTRAS:
            stamp(o).unlink(missing_ok=True)
        print(
            f'start: installing llm_lab[{extras}] into .venv (this takes a few minutes, once)',
            flush=True,
        )
        pip = [str(PYTHON), '-m', 'pip']
        if subprocess.run(
            [*pip, '--version'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ).returncode:
            stop('.venv has no pip: `rm -r .venv`, then run this again')
        pip += [
            'install',
            '-qq',
            '--no-input',
            '--disable-pip-version-check',
            '-c',
            'constraints.txt',
            '-e',
            f'.[{extras}]',
        ]
        if subprocess.run(pip, cwd=ROOT).returncode:
            stop(
                'pip could not install the packages: see the lines above, check the network '
                'and the free space, then run this again'
            )
        stamp(kind).write_text(key())


def call(*cmd, cwd=None):
    "The exit status of a command of .venv; Ctrl-C goes to the command, which answers for both"
    proc = subprocess.Popen([str(o) for o in cmd], cwd=cwd)
    while True:
        try:
            return proc.wait()
        except KeyboardInterrupt:
            pass


def main(args):
    if sys.version_info < OLDEST:
        stop(
            (
                'Python %d.%d is too old, the lab needs %d.%d or newer: `make PYTHON=python3.12 '
                '…` names another'
            )
            % (*sys.version_info[:2], *OLDEST)
        )
    do, *rest = args or ['']
    if do not in ('tour', 'lab', 'test', 'nightly', 'dev', 'run') or (do == 'run' and not rest):
        print(__doc__, file=sys.stderr)
        return 2
    install('tour' if do in ('tour', 'lab') else 'dev')
    os.environ['PATH'] = str(BIN) + os.pathsep + os.environ.get('PATH', '')
    if do == 'dev':
        print('start: .venv is ready')
        return 0
    if do == 'tour':
        if ROOT not in (Path.cwd(), *Path.cwd().parents):
            os.environ.setdefault('LLM_LAB_HOME', str(ROOT))
        return call(BIN / 'llm-lab', 'tour', *rest)
    if do == 'lab':
        return call(PYTHON, '-m', 'jupyterlab', 'nbs', *rest, cwd=ROOT)
    if do == 'run':
        return call(shutil.which(rest[0]) or stop(f'.venv has no command {rest[0]!r}'), *rest[1:])
    return call(PYTHON, '-m', 'pytest', *tests_of(do), *rest, cwd=ROOT)


def tests_of(do):
    "Arguments of pytest for `test` or `nightly`, and what the tests find in the environment"
    # a worker has one core, and the saved outputs are made so
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    if do == 'nightly':
        os.environ.setdefault('LLM_LAB_EXAMPLES', '20000')
        os.environ.setdefault('LLM_LAB_NOTEBOOK_FLAGS', 'slow')
    from run_notebooks import workers

    # one more than there are cores: a tenth of a worker's time is waiting, for a browser or a
    # killed run
    # see tools/plan.py
    beside = [
        '-n',
        workers() + 1,
        '--dist',
        'loadgroup',
        '--no-loadscope-reorder',
    ]
    return beside + (['-m', ''] if do == 'nightly' else [])


if __name__ == '__main__':
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
