"""Test the notebooks: each in a process of its own, as many at a time as there are cores, and a
count at the end.

python tools/run_notebooks.py [nbs/22_gpt.ipynb …] [--flags slow] [--timeout 0] [--jobs 2]

The cells run as `nbdev_test` runs them: in the notebook's folder, with IN_TEST=1, without the
cells marked by `tst_flags`. There is no time limit unless one is given, because a slow machine
is no error; a line a minute says what is still running."""

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CELLS = """
import os
import sys
from pathlib import Path

from nbdev.config import get_config
from nbdev.test import test_nb

nb, flags, root = sys.argv[1:]
skipped = get_config(path=root).tst_flags.split()
ok, _ = test_nb(Path(nb), skip_flags=skipped, force_flags=flags.split(), basepath=root)
print(f'core-seconds: {sum(os.times()[:4]):.1f}', flush=True)
sys.exit(0 if ok else 1)
"""
PROCS = set()  # what runs now, so that Ctrl-C ends it


def quota():
    "The cores that a container may use, where it has a limit"
    try:
        most, period = Path('/sys/fs/cgroup/cpu.max').read_text().split()
    except (OSError, ValueError):
        return None
    return None if most == 'max' else max(1, int(most) // int(period))


def cores():
    "The cores this process may use"
    mine = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return min(mine, quota() or mine)


def workers():
    "How many notebooks or tests run at a time: one a core, but each wants a gigabyte of memory"
    return min(cores(), 8)


def all_notebooks():
    return sorted(p for p in (ROOT / 'nbs').glob('*.ipynb') if p.name[0] not in '._')


def kill(proc):
    "End the process and what it started"
    try:
        os.killpg(proc.pid, signal.SIGKILL)
    except AttributeError:
        proc.kill()  # Windows has no groups
    except ProcessLookupError:
        pass


def run(nb, flags='', timeout=None, threads=1):
    "(passed, core-seconds, what it printed) for one notebook; no limit of time if none is given"
    env = dict(os.environ, PYTHONUTF8='1', MPLBACKEND='module://matplotlib_inline.backend_inline')
    env.setdefault('OMP_NUM_THREADS', str(threads))
    late = ''
    proc = subprocess.Popen(
        [sys.executable, '-c', CELLS, str(nb.resolve()), flags, str(ROOT)],
        cwd=nb.parent,
        env=env,
        text=True,
        encoding='utf-8',
        errors='replace',
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    PROCS.add(proc)
    try:
        log, _ = proc.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(proc)
        log = proc.communicate()[0]
        late = f'ended: it ran past {timeout:g} s\n'
    except BaseException:
        kill(proc)
        raise
    finally:
        PROCS.discard(proc)
    used = re.findall(r'^core-seconds: ([\d.]+)$', log, re.M)
    return proc.returncode == 0 and not late, float(used[-1]) if used else 0.0, log + late


class Progress:
    "A line for each notebook that ends, and once a minute one for what is still running"

    def __init__(self, count):
        self.count = count
        self.done = 0
        self.running = {}
        self.begun = time.monotonic()
        self.ended = threading.Event()
        threading.Thread(target=self.tell, daemon=True).start()

    def tell(self):
        while not self.ended.wait(60):
            now = time.monotonic()
            for nb, start in list(self.running.items()):
                print(f'still running: {nb.name}, {now - start:.0f} s', flush=True)

    def end(self, nb, ok, used, log):
        now = time.monotonic()
        self.done += 1
        left = (now - self.begun) / self.done * (self.count - self.done)
        print(
            f'{"ok  " if ok else "FAIL"} {now - self.running.pop(nb):6.1f} s, {used:6.1f} '
            f'core-s  {nb.name}'
            f'  ({self.done} of {self.count}, about {left:.0f} s left)'
            + ('' if ok else '\n' + log),
            flush=True,
        )


def longest_first(nbs):
    "The notebooks, the longest first as far as it is known: then no core idles at the end"
    import plan

    known = plan.hints()
    return sorted(
        nbs, key=lambda nb: -known.get(f'test_notebooks.py::test_a_chapter_runs[{nb.stem}]', 5)
    )


def main():
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument(
        'notebooks',
        nargs='*',
        type=Path,
        help='default: all of nbs/, but for names that begin with _',
    )
    ap.add_argument('--flags', default='', help='run cells marked with these words, too')
    ap.add_argument(
        '--timeout', type=float, default=0, help='seconds for one notebook; 0 is no limit'
    )
    ap.add_argument('--jobs', type=int, default=workers(), help='notebooks at a time')
    ap.add_argument('--threads', type=int, default=1, help='threads for each')
    a = ap.parse_args()
    if missing := [str(o) for o in a.notebooks if not o.is_file()]:
        sys.exit(f'run_notebooks: no such notebook: {", ".join(missing)}')
    nbs = longest_first(a.notebooks or all_notebooks())
    print(
        (
            f'{len(nbs)} notebooks, {a.jobs} at a time, '
            f'{os.environ.get("OMP_NUM_THREADS", a.threads)} threads each'
        ),
        flush=True,
    )
    progress = Progress(len(nbs))

    def one(nb):
        progress.running[nb] = time.monotonic()
        ok, used, log = run(nb, a.flags, a.timeout or None, a.threads)
        progress.end(nb, ok, used, log)
        return ok

    pool = ThreadPoolExecutor(a.jobs)
    try:
        done = list(pool.map(one, nbs))
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        for proc in list(PROCS):
            kill(proc)
        return 130
    finally:
        progress.ended.set()
    print(f'{sum(done)} passed, {len(done) - sum(done)} failed')
    return 0 if done and all(done) else 1


if __name__ == '__main__':
    sys.exit(main())
