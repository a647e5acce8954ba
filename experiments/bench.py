"""What the experiments share: options, turns, paired seeds, cells that are kept, the closing line.

An experiment is started from the repository root, `python experiments/NAME/run.py`, and begins with

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import bench

Nothing of llm_lab and no PyTorch is imported before a function needs it: `busy_machine` compares
processes that load the library first with processes that never do."""

import argparse
import json
import math
import random
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median, stdev

# ---- options

OPTIONS = dict(
    rounds='turns of each contender',
    seeds='paired seeds: the same first weights and batches for all',
    steps='steps of each training',
    jobs='runs at a time, one thread each',
)


def parser(doc, **defaults):
    """A parser with `doc` as its help, `--save`, and the common `OPTIONS` that `defaults` names.

    An option of another kind is added by the experiment itself, with `add_argument`."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in defaults.items():
        made.add_argument(f'--{name}', type=int, default=default, help=OPTIONS[name])
    made.add_argument('--save', action='store_true', help='keep the last line in result.json')
    return made


# ---- the closing line


def report(script, result, save=False, name='result.json'):
    "Print a result as one line of JSON; with `save` it is also kept beside the experiment's script"
    line = json.dumps(result)
    if save:
        (Path(script).parent / name).write_text(line + '\n', encoding='utf-8')
    print(line)


def one_thread():
    "What `machine` reports, for an experiment whose cells each have one thread"
    from llm_lab.hardware import machine

    return machine() | dict(threads=1)


# ---- time


def seconds_of(work, calls=1):
    "Wall-clock seconds of a call of `work()`, on average over `calls` of them"
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls


def timed(ways, calls=1):
    "{name: a turn}: each turn returns the seconds of a call of the way, for `take_turns`"
    return {name: lambda work=work: seconds_of(work, calls) for name, work in ways.items()}


def take_turns(ways, rounds, label, warm_up=0, shuffled=False):
    """{name: [what each of its turns returned]}: every way has one turn in each round.

    What slows the machine for a minute, another program or heat, then slows all contenders alike,
    and ratios within a round are fair. The first `warm_up` rounds count for nothing. `shuffled`
    draws a new order each round, so that nobody always follows the same neighbour, whose data are
    still in the processor's caches."""
    from llm_lab.core import progress

    found = {name: [] for name in ways}
    names = list(ways)
    for n in progress(range(warm_up + rounds), label):
        order = random.Random(n).sample(names, len(names)) if shuffled else names
        for name in order:
            answer = ways[name]()
            if n >= warm_up:
                found[name].append(answer)
    return found


def medians(found):
    "{name: median} of what turns returned, if that is numbers"
    return {name: median(values) for name, values in found.items()}


def ratio(over, under):
    "The median of the ratios within a round: `over` and `under` are the turns of two contenders"
    return median(a / b for a, b in zip(over, under))


def ratio_interval(over, under):
    """The 95 % interval of `ratio`, [low, high], from nothing but the order of the ratios.

    None for fewer than six rounds, where no such interval exists.

    Each ratio lies below the true median with probability 1/2, so the number of those that do is
    binomial: the k smallest and the k largest are left out, where k is the largest number that
    leaves 95 % (the interval of the sign test)."""
    ratios = sorted(a / b for a, b in zip(over, under))
    n = len(ratios)
    if n < 6:
        return None
    k = 0
    below = 1 / 2**n  # the probability that at most k ratios are below the median
    while below + math.comb(n, k + 1) / 2**n <= 0.025:
        k += 1
        below += math.comb(n, k) / 2**n
    return [round(ratios[k], 4), round(ratios[n - 1 - k], 4)]


# ---- processes that take turns


class Child:
    """A script in a process of its own, which works when a line comes and answers with JSON.

    Contenders that would disturb each other in one process (other libraries, compilers, threads)
    each get one; while one works, the others wait for their line."""

    def __init__(self, script, *options, env=None):
        self.process = subprocess.Popen(
            [sys.executable, str(Path(script).resolve()), *map(str, options)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def read(self):
        "The next answer"
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f'{self.process.args} ended')
        return json.loads(line)

    def turn(self, line='go'):
        "Let it work, and wait for its answer"
        self.process.stdin.write(f'{line}\n')
        self.process.stdin.flush()
        return self.read()

    def end(self):
        "Its input ends, and so does the process"
        self.process.stdin.close()
        self.process.wait()

    def kill(self):
        "End it at once, whatever it would still do, such as a last checkpoint"
        self.process.kill()
        self.process.wait()


def answers():
    """For the child's side: a function that answers with an object as a line of JSON.

    From here on everything else that is printed goes to stderr, so that it cannot be taken for an
    answer."""
    out = sys.stdout
    sys.stdout = sys.stderr

    def answer(said):
        print(json.dumps(said), file=out, flush=True)

    return answer


def wait_for_turn():
    "For the child's side: the line that lets it work; the process ends where no line will come"
    line = sys.stdin.readline()
    if not line:
        raise SystemExit
    return line


# ---- cells of a grid


def kept(path, make):
    """What `make()` returned, as JSON gives it back; the file `path` keeps it.

    An experiment that was interrupted goes on with the first cell that has no file; remove the
    folder runs/ to measure all anew."""
    from llm_lab.files import atomic_write

    path = Path(path)
    if not path.exists():
        made = make()
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as new:
            new.write_text(json.dumps(made), encoding='utf-8')
    return json.loads(path.read_text(encoding='utf-8'))


def run_cells(cell, grid, jobs, label='runs'):
    """{arguments: cell(*arguments)} for each tuple of the grid, `jobs` at a time.

    Each job is a process that was spawned: a forked one would inherit PyTorch's threads in the
    state in which they happened to be. One job needs no other process."""
    from llm_lab.core import progress

    grid = list(grid)
    if jobs == 1:
        return {arguments: cell(*arguments) for arguments in progress(grid, label)}
    with ProcessPoolExecutor(jobs, mp_context=get_context('spawn')) as pool:
        found = pool.map(cell, *zip(*grid))
        return dict(zip(grid, progress(found, label, len(grid))))


# ---- paired seeds

# Student's t at 97.5 %, by the number of values (one more than the degrees of freedom)
T975 = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
}


def interval(values):
    """Mean of some numbers, and half the width of its 95 % interval (Student's t); NaN for one"""
    if len(values) == 1:
        return values[0], math.nan
    return mean(values), T975[len(values)] * stdev(values) / math.sqrt(len(values))


def summary(values, digits=4):
    "The `interval` as it stands in a result: dict(mean, plus_minus), rounded"
    middle, half = interval(values)
    return dict(mean=round(middle, digits), plus_minus=round(half, digits))


def crops(corpus, tokenizer, batch_size, length, seed):
    """Random crops of a training text, a function of the step: the batches of the kept results.

    Where documents stand alone, a row begins with one, or where a context ends within one"""
    from llm_lab.train import random_crops, read_split, spans

    ids, starts = read_split(corpus, tokenizer, 'train')
    begins = None if starts is None else spans(len(ids), length, starts)[:, 0]
    return random_crops(ids, batch_size, length, seed, starts=begins)


def differences(values, base):
    """`values` minus `base`, seed by seed.

    Both have the same first weights and batches for a seed, so what a seed does to both cancels:
    the interval of the differences is narrower than that of either."""
    return [a - b for a, b in zip(values, base, strict=True)]
