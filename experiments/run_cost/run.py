"""What does a run cost beside the bare loop? The engine, the log, and a checkpoint every hundred steps.

    python experiments/run_cost/run.py [--steps 300] [--rounds 7] [--save]

nanoGPT's CPU shape (4 layers, width 128, 12 × 64 characters), AdamW. Four ways to make the same steps: `fit` alone; a `Job` on one
process without accelerate; a `Job` on accelerate; the same with a checkpoint every hundred steps. They take turns, and each turn is
timed from its first step to its last, all that is due in between included. Medians of the rounds; the last line is JSON.
"""
import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median

from llm_lab.config import read_config
from llm_lab.lab import machine, progress
from llm_lab.run import Alone, Job, engine_of
from llm_lab.train import fit

HERE = Path(__file__).parent
NEVER = 10**9


def config(steps, every=NEVER):
    "The shape of nanoGPT's example; nothing but the log is due, and a checkpoint after every so many steps"
    keys = ['corpus=tiny_tales', f'train.steps={steps}', 'optimiser=adamw', 'lr=0.004', f'eval.every={NEVER}',
            f'sample_every={NEVER}', f'checkpoint_every={every}', 'log.every=10']
    return read_config('golden', keys)


def seconds(job, bare=False):
    "Seconds a step takes, what is due in between included"
    told, step = [], job.step

    def clocked(*args):
        told.append(time.perf_counter())
        return step(*args)
    job.step = clocked
    if bare: fit(job.run.model, job.stream, job.cfg.train.steps, opt=job.run.opt, step=clocked)
    else: job.go()
    return (told[-1] - told[0])/(len(told) - 1)


def main(steps, rounds):
    plain, saving = config(steps), config(steps, 100)
    ways = {'fit alone': lambda at: seconds(Job(plain, at, Alone()), bare=True),
            'job, one process': lambda at: seconds(Job(plain, at, Alone())),
            'job on accelerate': lambda at: seconds(Job(plain, at, engine_of())),
            'and a checkpoint every 100 steps': lambda at: seconds(Job(saving, at, engine_of()))}
    took = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        os.environ['LLM_LAB_HOME'] = folder
        for n in progress(range(rounds + 1), 'rounds'):
            for k, (name, way) in enumerate(ways.items()):
                s = way(Path(folder)/'experiments'/'cost'/'runs'/f'{n}-{k}')
                if n: took[name].append(s)                     # the first round warms up
    ratio = {name: median(a/b for a, b in zip(v, took['fit alone'])) for name, v in took.items()}
    saves = median(a/b for a, b in zip(took['and a checkpoint every 100 steps'], took['job on accelerate']))
    for name, v in took.items(): print(f'{name:34}{1000*median(v):8.2f} ms a step  {100*(ratio[name] - 1):+.1f} %')
    print(f'a checkpoint every 100 steps alone {100*(saves - 1):+.1f} %')
    return dict(steps=steps, rounds=rounds, ms={k: round(1000*median(v), 3) for k, v in took.items()},
                ratio={k: round(v, 4) for k, v in ratio.items()}, checkpoint=round(saves, 4), **machine())


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--steps', type=int, default=300)
    ap.add_argument('--rounds', type=int, default=7)
    ap.add_argument('--save', action='store_true', help='keep the last line in result.json')
    a = ap.parse_args()
    line = json.dumps(main(a.steps, a.rounds))
    if a.save: (HERE/'result.json').write_text(line + '\n', encoding='utf-8')
    print(line)
