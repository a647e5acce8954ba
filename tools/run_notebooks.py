"""Test the notebooks: each in a process of its own, with a time limit, and a count at the end.

    python tools/run_notebooks.py [nbs/06_gpt.ipynb …] [--flags slow] [--timeout 300] [--jobs 1]

The cells run as `nbdev_test` runs them: in the notebook's folder, with IN_TEST=1, without the cells marked by `tst_flags`.
"""
import argparse, os, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CELLS = """
import sys
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb
nb, flags, root = sys.argv[1:]
ok, _ = test_nb(Path(nb), skip_flags=get_config(path=root).tst_flags.split(), force_flags=flags.split(), basepath=root)
sys.exit(0 if ok else 1)
"""


def cores(): return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def kill(proc):
    "End the process and what it started"
    try: os.killpg(proc.pid, signal.SIGKILL)
    except AttributeError: proc.kill()  # Windows has no groups
    except ProcessLookupError: pass


def run(nb, flags='', timeout=300, threads=1):
    "(passed, seconds, what it printed) for one notebook"
    env = dict(os.environ, PYTHONUTF8='1', MPLBACKEND='module://matplotlib_inline.backend_inline')
    env.setdefault('OMP_NUM_THREADS', str(threads))
    start, late = time.time(), ''
    proc = subprocess.Popen([sys.executable, '-c', CELLS, str(nb.resolve()), flags, str(ROOT)], cwd=nb.parent, env=env, text=True,
                            encoding='utf-8', errors='replace', stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True)
    try: log, _ = proc.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(proc)
        log, late = proc.communicate()[0], f'ended: it ran past {timeout:g} s\n'
    except BaseException:
        kill(proc)
        raise
    return proc.returncode == 0 and not late, time.time() - start, log + late


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('notebooks', nargs='*', type=Path, help='default: all of nbs/, but for names that begin with _')
    ap.add_argument('--flags', default='', help='run cells marked with these words, too')
    ap.add_argument('--timeout', type=float, default=300, help='seconds for one notebook')
    ap.add_argument('--jobs', type=int, default=1, help='notebooks at a time')
    ap.add_argument('--threads', type=int, help='threads for each')
    a = ap.parse_args()
    if missing := [str(o) for o in a.notebooks if not o.is_file()]: sys.exit(f'run_notebooks: no such notebook: {", ".join(missing)}')
    nbs = a.notebooks or sorted(p for p in (ROOT/'nbs').glob('*.ipynb') if p.name[0] not in '._')
    threads = a.threads or max(1, min(4, cores()//a.jobs))
    budget = os.environ.get('OMP_NUM_THREADS', threads)
    print(f'{len(nbs)} notebooks, {a.jobs} at a time, {budget} threads each, {a.timeout:g} s at most', flush=True)

    def one(nb):
        ok, seconds, log = run(nb, a.flags, a.timeout, threads)
        print(f'{"ok  " if ok else "FAIL"} {seconds:6.1f} s  {nb.name}' + ('' if ok else '\n' + log), flush=True)
        return ok

    with ThreadPoolExecutor(a.jobs) as pool: done = list(pool.map(one, nbs))
    print(f'{sum(done)} passed, {len(done) - sum(done)} failed')
    return 0 if done and all(done) else 1


if __name__ == '__main__': sys.exit(main())
