"""Every system call of a save made to fail, one at a time:

`python tests/faults.py FOLDER EVERY SHARE SHARES`.

A committed checkpoint of step 10 is there, and a run stands ready to save step 20 with keep=1:
it commits, names the newest and the best, and prunes. This process trains once and forks a child
for each case. strace lets the child's K-th call of one name be its last (SIGKILL) or fail (no
space, input/output error). Then a newcomer looks at the folder, and saves step 30. EVERY takes
only each so manieth call of a name, SHARE of SHARES divides the work. Prints a JSON line on a
save without a fault, then one for each case."""

import ctypes
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

import torch

from llm_lab.chars import CharTokenizer
from llm_lab.checkpoint import CheckpointManager
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.core import LabError
from llm_lab.efficient import StepRunner
from llm_lab.optim import muon
from llm_lab.batching import BatchStream
from llm_lab.package import load
from llm_lab.train import TrainState, fit

FAULTS = dict(SIGKILL='signal=SIGKILL', ENOSPC='error=ENOSPC', EIO='error=EIO')
TEXT = 'the cat sat on the mat. the dog sat on the log.\n' * 20
TOK = CharTokenizer.train(TEXT)
BATCH = BatchStream(torch.tensor(TOK.encode(TEXT)), 4, 16)


def begin():
    model = MiniGPT(
        GPTConfig(
            vocab_size=TOK.vocab_size, max_len=16, d_model=16, n_layers=1, n_heads=2, dropout=0.1
        )
    )
    return TrainState(model, 30, optimizer=muon(model))


def trained(steps):
    "A run that has done so many of its 30 steps; its validation loss falls"
    run = begin()
    calls = {10: lambda run: dict(val=3 - run.step / 10), (steps,): lambda run: run.stop('here')}
    with redirect_stdout(sys.stderr):
        return fit(
            run.model, BATCH, 30, state=run, step_fn=StepRunner(accumulate=2), callbacks=calls
        )


def keeper(folder, *mine):
    saves = CheckpointManager(folder, TOK, keep=1, data=BATCH)
    saves.mine |= {*mine}
    return saves


def digests(folder, step):
    place = keeper(folder).folder_of(step)
    return [
        hashlib.sha256((place / f).read_bytes()).hexdigest()
        for f in ('model.safetensors', 'optimizer.safetensors')
    ]


def waiting(save, run):
    """(process, pipe) of a child that saves when SIGUSR1 says so.

    It ends with 0, or with 3 after an error of one line, else with 1"""
    read, write = os.pipe()
    if pid := os.fork():
        os.close(write)
        return pid, read
    try:
        # Ubuntu: others may trace this process
        ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)
        signal.alarm(1800)  # nobody waits for ever
        signal.sigwait({signal.SIGUSR1})
        save(run)
        code = 0
    except (OSError, LabError) as e:
        code = 3
        os.write(write, str(e).encode())
    except BaseException:
        code = 1
        os.write(write, traceback.format_exc().encode())
    os._exit(code)


def traced(folder, run, *options):
    "(how a save under strace ended, what it said, the calls that strace saw)"
    (pid, pipe), log = waiting(keeper(folder, 10), run), folder.with_suffix('.log')
    strace = subprocess.Popen(
        ['strace', '-f', '-p', str(pid), '-o', log, *options], stderr=subprocess.PIPE, text=True
    )
    if 'attached' not in (line := strace.stderr.readline()):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        print(json.dumps(dict(cannot=line + strace.communicate()[1])))
        raise SystemExit
    os.kill(pid, signal.SIGUSR1)
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    strace.communicate()
    with open(pipe, encoding='utf-8') as f:
        return ended, f.read(), re.findall(r'^\d+ +((\w+)\(.*)', log.read_text(), re.M)


def judged(folder, ended, said, thirty, right):
    "(the newest checkpoint after a save of step 20 that ended so, what is not as it should be)"
    if ended == 1 or '\n' in said:
        return 0, f'it says {said}'
    saves = keeper(folder)
    run = begin()
    model = load(folder)
    step = saves.load(run)['step']
    if step not in (10, 20) or (ended == 0 and step != 20):
        return step, 'the checkpoint that was reported is not there'
    if digests(folder, step) != right[step]:
        return step, 'it has other bits'
    if model.about['step'] not in (10, step):
        return step, 'another model is opened'
    saves(thirty)
    hidden = [f.name for f in folder.rglob('.*')]
    if saves.steps() != [30] or digests(folder, 30) != right[30] or hidden:
        return step, f'the next save leaves {saves.steps()}, {hidden}'
    return step, ''


def main(folder, every, share, shares):
    torch.set_num_threads(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # until a child waits for it
    folder = Path(folder)
    runs = {n: trained(n) for n in (10, 20, 30)}
    right = {}
    for n, run in runs.items():
        keeper(folder / f'only{n}')(run)
        right[n] = digests(folder / f'only{n}', n)

    def tried(*options):
        shutil.rmtree(folder / 'run', ignore_errors=True)
        ended, said, calls = traced(
            shutil.copytree(folder / 'only10', folder / 'run'), runs[20], *options
        )
        try:
            return ended, said, calls, *judged(folder / 'run', ended, said, runs[30], right)
        except Exception:
            return ended, said, calls, 0, traceback.format_exc()

    ended, said, calls, newest, wrong = tried('-y', '-e', 'trace=%file,%desc')
    if ended or wrong:
        raise SystemExit(f'without a fault: {ended} {said} {wrong}')
    counts = Counter(name for _, name in calls if name != 'mmap')  # memory: not always as often
    print(
        json.dumps(
            dict(
                counts=counts,
                trace=[
                    line
                    for line, name in calls
                    if name in ('fsync', 'fdatasync') or 'rename' in name
                ],
            )
        )
    )
    cases = [
        (name, k, fault)
        for name, n in counts.items()
        for j, fault in enumerate(FAULTS)
        for k in range(1 + j % min(n, every), n + 1, every)
    ]
    for name, k, fault in cases[share::shares]:
        ended, said, calls, newest, wrong = tried(
            '-e', f'trace={name},fsync', '-e', f'inject={name}:{FAULTS[fault]}:when={k}'
        )
        came = (
            ended == -signal.SIGKILL
            if fault == 'SIGKILL'
            else any('(INJECTED)' in line for line, _ in calls)
        )
        if not came:
            wrong = f'the fault did not come: {ended} {calls[-1:]}'
        if ended == 0 and [n for _, n in calls].count('fsync') < counts['fsync']:
            wrong = 'it reports success and has not synced all'
        print(
            json.dumps(dict(call=name, k=k, fault=fault, ended=ended, newest=newest, wrong=wrong)),
            flush=True,
        )


if __name__ == '__main__':
    main(sys.argv[1], *map(int, sys.argv[2:]))
