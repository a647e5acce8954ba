"""What does a run cost beside the bare loop?

The engine, the log, and a checkpoint every hundred steps.

python experiments/run_cost/run.py [--rounds 12] [--save]

nanoGPT's CPU shape (4 layers, width 128, 12 × 64 characters), AdamW. Four ways to make the same
steps: `fit` alone; a `TrainingRun` on one process without accelerate; a `TrainingRun` on
accelerate; the same with a checkpoint every hundred steps. Each way is a process of its own, and
they take turns of a hundred steps; what is due in between is in the time. Medians of the rounds,
ratios within a round; the last line is JSON, `--save` keeps it in result.json. About four
minutes on two cores."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median

from llm_lab.config import read_config
from llm_lab.hardware import machine
from llm_lab.core import progress
from llm_lab.runs import SingleProcess, TrainingRun, make_engine
from llm_lab.train import fit

HERE, NEVER, TURN = Path(__file__).parent, 10**9, 100
WAYS = ('fit alone', 'job, one process', 'job on accelerate', 'with checkpoints')


def child(way, rounds):
    "Make a hundred steps each time a line comes in; print the seconds they took"
    every = TURN if way == 'with checkpoints' else NEVER
    cfg = read_config(
        'golden',
        [
            'corpus=tiny_tales',
            f'train.steps={rounds * TURN + 1}',
            'optimizer=adamw',
            'lr=0.004',
            'log.every=10',
            f'eval.every={NEVER}',
            f'sample_every={NEVER}',
            f'checkpoint_every={every}',
            'eval.tokens=2000',
        ],
    )
    out = sys.stdout
    with redirect_stdout(sys.stderr):
        job = TrainingRun(
            cfg,
            Path(os.environ['LLM_LAB_HOME']) / 'experiments' / 'cost' / 'runs' / way,
            make_engine() if way in WAYS[2:] else SingleProcess(),
        )
        step, seen = job.step, dict(steps=0, start=0.0)

        def waiting(*args):
            if seen['steps'] % TURN == 0:
                print(time.perf_counter() - seen['start'], file=out, flush=True)
                if not sys.stdin.readline():
                    raise SystemExit
                seen['start'] = time.perf_counter()
            seen['steps'] += 1
            return step(*args)

        job.step = waiting
        if way == WAYS[0]:
            fit(
                job.run.model,
                job.stream,
                cfg.train.steps,
                optimizer=job.run.optimizer,
                step_fn=waiting,
            )
        else:
            job.go()


def main(rounds):
    took = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        kids = {}
        for way in progress(WAYS, 'set-up'):
            kids[way] = subprocess.Popen(
                [sys.executable, __file__, '--way', way, '--rounds', str(rounds + 1)],
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, 'LLM_LAB_HOME': folder},
            )
            kids[way].stdout.readline()  # ready
        for n in progress(range(rounds + 1), 'rounds'):
            for way in WAYS if n % 2 else WAYS[::-1]:
                kids[way].stdin.write('go\n')
                kids[way].stdin.flush()
                seconds = float(kids[way].stdout.readline())
                if n:
                    took[way].append(seconds / TURN)  # the first round warms up
        for kid in kids.values():
            kid.kill()
            kid.wait()
    over = lambda a, b: median(x / y for x, y in zip(took[a], took[b]))
    ratios = {way: over(way, WAYS[0]) for way in WAYS}
    saves = over(WAYS[3], WAYS[2])
    for way, v in took.items():
        print(f'{way:20}{1000 * median(v):8.2f} ms a step  {100 * (ratios[way] - 1):+.1f} %')
    print(f'a checkpoint every {TURN} steps: {100 * (saves - 1):+.1f} %')
    return dict(
        rounds=rounds,
        ms={k: round(1000 * median(v), 3) for k, v in took.items()},
        ratio={k: round(v, 4) for k, v in ratios.items()},
        checkpoint=round(saves, 4),
        **machine(),
    )


if __name__ == '__main__':
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument('--rounds', type=int, default=12)
    ap.add_argument('--save', action='store_true', help='keep the last line in result.json')
    ap.add_argument('--way', choices=WAYS, help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.way:
        child(a.way, a.rounds)
    else:
        line = json.dumps(main(a.rounds))
        if a.save:
            (HERE / 'result.json').write_text(line + '\n', encoding='utf-8')
        print(line)
