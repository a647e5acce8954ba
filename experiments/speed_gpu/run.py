"""How near to its peak does a GPU train GPT-2's 85 million weights in bf16, compiled?

python experiments/speed_gpu/run.py [--batch 32] [--steps 100] [--save]

12 layers of width 768, 12 heads, contexts of 1,024 bytes; `fit` with `StepRunner(precision='bf16',
compile=True)` and without compilation, and the same for Muon. Time is taken over `--steps` steps
after 20 for warming up; work is counted as products of matrices in float32 shapes (`flops`), the
peak is the best product of 8,192 × 8,192 matrices in bf16 on this machine. The last line is
JSON; `--save` keeps it. `--small` runs a tiny model of the same kind anywhere, to try the
script."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench

from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.hardware import device, flops, machine
from llm_lab.onednn import peak_flops
from llm_lab.core import rng
from llm_lab.optim import OPTIMIZERS
from llm_lab.efficient import StepRunner
from llm_lab.train import fit, next_token_loss, random_crops

WARM = 20


def seconds(cfg, batch_size, steps, where, step, optimizer):
    "Of one step; the loop reads a loss, and so waits for the device, at both ends"
    ids = torch.randint(cfg.vocab_size, (2_000_000,), generator=rng(0, 'ids'))
    model = MiniGPT(cfg).to(where)
    batch = random_crops(ids, batch_size, cfg.max_len, device=where)
    run = fit(
        model,
        batch,
        WARM + steps,
        optimizer=OPTIMIZERS[optimizer](model, lr=1e-4),
        step_fn=step,
        callbacks={(WARM, WARM + steps): lambda run: dict(at=run.seconds)},
    )
    return (run.notes[1]['at'] - run.notes[0]['at']) / steps


def main(batch_size, steps, small):
    where = device()
    cfg = GPTConfig(256, 64, 64, 2, 2) if small else GPTConfig(256, 1024, 768, 12, 12)
    model = MiniGPT(cfg)
    row = torch.zeros(1, cfg.max_len + 1, dtype=torch.int64)
    work = batch_size * flops(lambda: next_token_loss(model, row).backward())
    peak = peak_flops(where, torch.bfloat16)
    result = dict(
        params=model.n_params,
        batch=batch_size,
        context=cfg.max_len,
        tflop_a_step=round(work / 1e12, 4),
        peak_tflops=round(peak / 1e12, 2),
    )
    for name, step, optimizer in (
        ('eager', StepRunner(precision='bf16'), 'adamw'),
        ('compiled', StepRunner(precision='bf16', compile=True), 'adamw'),
        ('compiled, Muon', StepRunner(precision='bf16', compile=True), 'muon'),
    ):
        s = seconds(cfg, batch_size, steps, where, step, optimizer)
        result[name] = dict(
            step_ms=round(1000 * s, 2),
            tokens_per_s=round(batch_size * cfg.max_len / s),
            mfu=round(work / s / peak, 3),
        )
        print(
            f'{name:16}{1000 * s:8.1f} ms a step {batch_size * cfg.max_len / s:12,.0f} '
            f'tokens/s   MFU {work / s / peak:.1%}'
        )
    gpu = torch.cuda.get_device_name() if where == 'cuda' else None
    return {**result, **machine(), 'gpu': gpu}


if __name__ == '__main__':
    ap = bench.parser(__doc__, steps=100)
    ap.add_argument('--batch', type=int, default=32, help='sequences in a batch')
    ap.add_argument('--small', action='store_true', help='a tiny model, to try the script anywhere')
    a = ap.parse_args()
    bench.report(__file__, main(a.batch, a.steps, a.small), a.save)
