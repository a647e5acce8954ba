"""A nursery of runs: `python tests/lives.py`.

PyTorch is imported once; each life is a fork of this process that runs `llm-lab`.

Reads an order a line, answers with a line. `{"start": {"argv", "log", "env", "fate"}}` →
{"pid"}; `{"wait": {"pid", "within"}}` → {"code", "ran", "met", "read"}: how it ended (−9: by
SIGKILL), the seconds it took, how often it came to each place, the blocks it read. A fate sends
a signal: {"place": …, "when": "before", "k": 3, "signal": 9} at the third call there, {"after":
seconds, …} at that time."""

import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
import torch._dynamo
import torch.distributed
import accelerate  # noqa: F401 so that no child has to
import filelock  # noqa: F401
import omegaconf  # noqa: F401

from llm_lab import batching, checkpoint, cli, efficient, evaluation, packing, runs, sampling, train
from llm_lab.checkpoint import CheckpointManager, MetricsLog
from llm_lab.gpt import GPTConfig

torch.set_num_threads(1)


def to(pattern):
    return lambda a, b, *_: re.search(pattern, str(b)) is not None


# where a life can end: who is called there, and with what
PLACES = dict(
    packing=(packing, '_write'),
    packed=(os, 'replace', to(r'/packed/[^/]+$')),
    cutting_rows=(MetricsLog, 'truncate'),
    describing=(runs, '_describe'),
    noting=(os, 'replace', to(r'/(config\.yaml|run\.json|runs/latest)$')),
    rewriting=(os, 'replace', to(r'/(metrics|samples)\.\w+$')),
    taking_up=(CheckpointManager, 'load'),
    stepping=(efficient, 'update'),
    validating=(train, 'token_losses'),
    sampling=(sampling, 'sample_next'),
    writing_rows=(MetricsLog, '_add'),
    tearing_rows=(MetricsLog, '_add'),
    syncing=(MetricsLog, 'sync'),
    saving=(checkpoint, 'write_package'),
    sealing=(checkpoint, 'write_manifest'),
    committing=(os, 'replace', to(r'/step-\d+$')),
    naming=(os, 'replace', to(r'/runs/[^/]+/(latest|best)$')),
    pruning=(os, 'replace', to(r'\.gone$')),
    half_pruning=(shutil, 'rmtree', lambda path, *_: str(path).endswith('.gone')),
    judging=(evaluation, 'token_losses'),
    concluding=(os, 'replace', to(r'/result\.json$')),
)


def torn(metrics, name, line):
    metrics.folder.mkdir(parents=True, exist_ok=True)
    with open(metrics.folder / name, 'a', encoding='utf-8') as f:
        f.write(line[: len(line) // 2])


def half_removed(path, *_):
    min(Path(path).iterdir()).unlink()


# what is done before a signal in the middle of it
HALF = dict(tearing_rows=torn, half_pruning=half_removed)


class Fate:
    """Counts how often each place is met, and sends the signal when its time has come;

    `careless` validation draws from the common stream"""

    def __init__(
        self, place=None, when='before', k=1, signal=signal.SIGKILL, after=None, careless=False
    ):
        self.place = place
        self.when = when
        self.k = k
        self.signal = signal
        self.careless = careless
        self.met = Counter()
        self.read = []

    def meet(self, place, when, args):
        self.met[f'{place}/{when}'] += 1
        if (place, when) != (self.place, self.when) or self.met[f'{place}/{when}'] != self.k:
            return
        if place in HALF:
            HALF[place](*args)
        os.kill(os.getpid(), self.signal)

    def wrapped(self, place, real, here=lambda *a: True):
        def call(*args, **kw):
            if not here(*args):
                return real(*args, **kw)
            self.meet(place, 'before', args)
            out = real(*args, **kw)
            self.meet(place, 'after', args)
            return out

        return call

    def watch(self):
        for place, (owner, name, *here) in PLACES.items():
            setattr(owner, name, self.wrapped(place, getattr(owner, name), *here))
        blocks = batching.BatchStream.blocks_of
        validate = runs.TrainingRun.validate

        def blocks_of(stream, step):
            found = blocks(stream, step)
            self.read.append([step, found.tolist()])
            return found

        def careless(job, state):
            torch.rand(7)
            torch.manual_seed(1)
            return validate(job, state)

        batching.BatchStream.blocks_of = blocks_of
        if self.careless:
            runs.TrainingRun.validate = careless


def live(argv, log, env=(), fate=None, path=()):
    "The life of a child, to its end"
    for n, end in enumerate(('.out', '.err'), 1):
        os.dup2(os.open(log + end, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), n)
    # whoever began all this may have been in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(env)
    os.chdir(os.environ['LLM_LAB_HOME'])
    sys.argv, sys.path[:0] = ['llm-lab'], path
    peak, fate = runs.peak_flops, Fate(**fate or {})
    # it takes a third of a second, and only `mfu` needs it
    runs.peak_flops = lambda *a: peak(*a, size=64, seconds=0)
    fate.watch()
    try:
        code = cli.main(argv)
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
        code = 99
    Path(log + '.met').write_text(json.dumps(dict(met=fate.met, read=fate.read)))
    for f in (sys.stdout, sys.stderr):
        f.flush()
    os._exit(code or 0)


class Nursery:
    def __init__(self):
        self.born = {}

    def start(self, **order):
        sys.stdout.flush()
        if not (pid := os.fork()):
            live(**order)
        fate = order.get('fate') or {}
        self.born[pid] = dict(
            log=order['log'],
            start=time.monotonic(),
            after=fate.get('after'),
            signal=fate.get('signal', signal.SIGKILL),
        )
        return dict(pid=pid)

    def wait(self, pid, within=1800):
        b, code = self.born.pop(pid), None
        while code is None:
            done, status = os.waitpid(pid, os.WNOHANG)
            ran = time.monotonic() - b['start']
            if done:
                code = os.waitstatus_to_exitcode(status)
            elif b['after'] is not None and ran > b['after']:
                os.kill(pid, b['signal'])
                b['after'] = None
            elif ran > within:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                code = f'still there after {within} s'
            else:
                time.sleep(0.002)
        ended = isinstance(code, int) and code >= 0  # who was killed may have written half of it
        return dict(
            code=code,
            ran=ran,
            **(json.loads(Path(b['log'] + '.met').read_text()) if ended else dict(met={}, read=[])),
        )


def warm_up():
    """Count the operations of a small model once: PyTorch then knows the shapes of what a step
    does, and each child need not find them out again. No number is drawn"""
    before = torch.get_rng_state()
    sizes = dict(vocab_size=40, max_len=16, d_model=16, n_layers=1, n_heads=2, dropout=0.2)
    runs._work(GPTConfig(**sizes), 16)
    assert torch.equal(torch.get_rng_state(), before)


def main():
    warm_up()
    nursery = Nursery()
    print(json.dumps(dict(ready=sorted(PLACES))), flush=True)
    for line in sys.stdin:
        ((what, order),) = json.loads(line).items()
        print(json.dumps(getattr(nursery, what)(**order)), flush=True)
    for pid in nursery.born:
        os.kill(pid, signal.SIGKILL)  # a test that failed has left them


if __name__ == '__main__':
    main()
