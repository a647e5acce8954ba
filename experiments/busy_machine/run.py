"""What does a training step cost beside other programs, and how should the threads of OpenMP wait?

python experiments/busy_machine/run.py [--rounds 8] [--steps 12] [--save]

A step of a small GPT (8 × 128 characters, 4 layers, width 128, AdamW, float32). Every setting
has a process of its own, because OpenMP reads its environment once, when PyTorch is loaded; the
processes take turns, a few steps at a time, in a new random order each round: idle, beside one
busy program, beside as many as there are cores. The table gives the median step in milliseconds
and its ratio to the default's idle step. The last line is JSON; `--save` keeps it in result.json
with date and machine.

OpenMP's threads meet at a barrier after each operation, and a thread that waits there spins: it
asks again and again, and keeps its core. Alone this is the fastest way to wait. Beside a busy
program the spinning thread holds the very core that the thread it waits for would need.
GOMP_SPINCOUNT says how often a thread of GNU's OpenMP asks before it sleeps;
OMP_WAIT_POLICY=passive is 0."""

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench

CORES = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
SPINS = (100, 500, 1_000, 2_000, 4_000, 10_000, 100_000)
SETTINGS = {
    'as it comes': {},
    'passive': {'OMP_WAIT_POLICY': 'passive'},
    **{f'spin {n:,}': {'GOMP_SPINCOUNT': str(n)} for n in SPINS},
    'as the lab sets it': None,
    'one thread': {'OMP_NUM_THREADS': '1'},
}
BUSY = {'idle': 0, 'beside one': 1, f'beside {CORES}': CORES}
WAITS = ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'OMP_NUM_THREADS', 'KMP_BLOCKTIME')


def worker(lab_first):
    "Makes as many steps as each line of stdin asks for; answers with their seconds"
    answer = bench.answers()
    if lab_first:
        import llm_lab  # noqa: F401 its choice must be there before PyTorch is
    import torch
    from llm_lab.gpt import GPTConfig, MiniGPT
    from llm_lab.onednn import onednn_linears
    from llm_lab.hardware import keep_freed_memory
    from llm_lab.train import adamw, random_crops, train_step

    torch.manual_seed(0)
    keep_freed_memory()
    model = MiniGPT(GPTConfig(vocab_size=65, max_len=128))
    opt = adamw(model)
    batch = random_crops(torch.randint(65, (100_000,)), 8, 128)
    with onednn_linears(model):
        while True:
            times = []
            for step in range(int(bench.wait_for_turn())):
                start = time.perf_counter()
                train_step(model, opt, batch(step))[0].item()
                times.append(time.perf_counter() - start)
            answer(times)


def start_worker(setting):
    "A process with its own environment, that has made its first steps"
    env = {k: v for k, v in os.environ.items() if k not in WAITS} | (setting or {})
    kind = 'plain' if setting is not None else 'lab'
    made = bench.Child(__file__, '--worker', kind, env=env)
    made.turn(3)
    return made


def busy(n):
    "So many programs that do nothing but keep a core"
    return [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(n)]


def measure(rounds, steps):
    "{setting: {state: median seconds of a step}}"
    workers = {name: start_worker(setting) for name, setting in SETTINGS.items()}
    times = {name: {state: [] for state in BUSY} for name in SETTINGS}
    luck = random.Random(0)
    for turn in range(rounds):
        for state, n in luck.sample(sorted(BUSY.items()), len(BUSY)):
            others = busy(n)
            time.sleep(0.3)  # until they run
            for name in luck.sample(sorted(workers), len(workers)):
                # the first step meets what the one before left in the caches
                times[name][state] += workers[name].turn(steps)[1:]
                last = 1000 * median(times[name][state])
                print(
                    f'round {turn + 1} of {rounds}, {state}: {name} {last:.0f} ms', file=sys.stderr
                )
            for other in others:
                other.kill()
                other.wait()
    for kid in workers.values():
        kid.kill()
    return {name: bench.medians(by_state) for name, by_state in times.items()}


def main():
    ap = bench.parser(__doc__, rounds=8)
    ap.add_argument('--steps', type=int, default=12, help='steps of a turn')
    ap.add_argument('--worker', help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.worker:
        worker(a.worker == 'lab')
        return
    found = measure(a.rounds, a.steps)
    base = found['as it comes']['idle']
    print(f'{"":20}' + ''.join(f'{state:>22}' for state in BUSY))
    for name, by_state in found.items():
        print(
            f'{name:20}'
            + ''.join(f'{1000 * t:12.1f} ms {t / base:5.2f} ×' for t in by_state.values())
        )
    from llm_lab.hardware import machine

    result = dict(machine=machine(), rounds=a.rounds, steps=a.steps, seconds=found)
    bench.report(__file__, result, a.save)


if __name__ == '__main__':
    main()
