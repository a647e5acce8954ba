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
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench

from llm_lab.config import read_config
from llm_lab.hardware import machine
from llm_lab.core import progress
from llm_lab.runs import SingleProcess, TrainingRun, make_engine
from llm_lab.train import fit

NEVER = 10**9
TURN = 100  # steps
WAYS = ('fit alone', 'job, one process', 'job on accelerate', 'with checkpoints')


def child(way, rounds):
    "Make a hundred steps each time a line comes in; answer the seconds they took"
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
    answer = bench.answers()
    job = TrainingRun(
        cfg,
        Path(os.environ['LLM_LAB_HOME']) / 'experiments' / 'cost' / 'runs' / way,
        make_engine() if way in WAYS[2:] else SingleProcess(),
    )
    step = job.step
    steps = 0
    start = 0.0

    def waiting(*args):
        "A step; before each hundred of them the answer, and the wait, which is not counted"
        nonlocal steps, start
        if steps % TURN == 0:
            answer(time.perf_counter() - start)
            bench.wait_for_turn()
            start = time.perf_counter()
        steps += 1
        return step(*args)

    job.step = waiting
    if way == WAYS[0]:
        run = job.run
        fit(run.model, job.stream, cfg.train.steps, optimizer=run.optimizer, step_fn=waiting)
    else:
        job.go()


def measure(rounds):
    "{way: seconds of a step, on average over each turn}"
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, 'LLM_LAB_HOME': folder}
        kids = {}
        for way in progress(WAYS, 'set-up'):
            kids[way] = bench.Child(__file__, '--way', way, '--rounds', rounds + 1, env=env)
            kids[way].read()  # ready
        turns = {way: kid.turn for way, kid in kids.items()}
        found = bench.take_turns(turns, rounds, 'rounds', warm_up=1, shuffled=True)
        for kid in kids.values():
            kid.kill()
    return {way: [seconds / TURN for seconds in v] for way, v in found.items()}


def main(rounds):
    took = measure(rounds)
    ratios = {way: bench.ratio(took[way], took[WAYS[0]]) for way in WAYS}
    saves = bench.ratio(took[WAYS[3]], took[WAYS[2]])
    for way, v in took.items():
        print(f'{way:20}{1000 * median(v):8.2f} ms a step  {100 * (ratios[way] - 1):+.1f} %')
    print(f'a checkpoint every {TURN} steps: {100 * (saves - 1):+.1f} %')
    return dict(
        rounds=rounds,
        ms={k: round(1000 * median(v), 3) for k, v in took.items()},
        ratio={k: round(v, 4) for k, v in ratios.items()},
        ratio_95={k: bench.ratio_interval(took[k], took[WAYS[0]]) for k in WAYS[1:]},
        checkpoint=round(saves, 4),
        **machine(),
    )


if __name__ == '__main__':
    ap = bench.parser(__doc__, rounds=12)
    ap.add_argument('--way', choices=WAYS, help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.way:
        child(a.way, a.rounds)
    else:
        bench.report(__file__, main(a.rounds), a.save)
