"""How fast is one token, beside `generate` of transformers and beside what this machine's memory
allows?

python experiments/speed_decode/run.py [--rounds 12] [--save]

One text, float32, the likeliest token each time, and the same random Llama weights for all: 15M
(width 288, 6 layers, 6 heads) and 110M (width 768, 12 layers, 12 heads), both with a vocabulary
of 32,000 and a shared table. The contenders take turns, each in a process of its own:
transformers' `generate`; ours with a cache (`kv_cache`); ours fast (`inference`), with 32 and
with 8 bits, as it is and compiled. A turn is 64 tokens after a prompt of 16, and the clock runs
over all of it. While one runs, the others wait. The medians go into the table, with the time to
the first token after a prompt of 256, and what each process has in memory more than before it
opened the model. The ids must be those of transformers. (With 8 bits some differ; on random
weights, where all tokens are about equally likely, that says nothing. `inference` asks a trained
model.) The last line is JSON; `--save` keeps it in result.json."""

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench

from llm_lab.kv_cache import with_kv_cache
from llm_lab.inference import bandwidth, for_inference, bytes_per_token
from llm_lab.gpt import MiniGPT
from llm_lab.parts import part
from llm_lab.hub import from_hf, to_hf
from llm_lab.hardware import machine
from llm_lab.core import progress, rng
from llm_lab.llama_block import SwiGLU, llama
from llm_lab.sampling import generate

V = 32_000
PROMPT = 16  # tokens
LONG = 256  # tokens of the prompt whose first answer is timed
N = 64  # tokens to write
SHAPES = {
    '15M': dict(d_model=288, n_layers=6, n_heads=6, mlp=part(SwiGLU, d_ff=768)),
    '110M': dict(d_model=768, n_layers=12, n_heads=12, mlp=part(SwiGLU, d_ff=2048)),
}
OURS = {
    'cached': with_kv_cache,
    'fast': for_inference,
    'compiled': lambda m: for_inference(m, compile=True),
    'int8': lambda m: for_inference(m, 'int8'),
    'int8_compiled': lambda m: for_inference(m, 'int8', compile=True),
}


def prompt(n):
    "Random ids, (1, n), the same for all contenders"
    return torch.randint(V, (1, n), generator=rng(0, 'prompt'))


def resident():
    "Bytes of this process in memory"
    gc.collect()
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    return pages * 4096


def theirs(folder):
    """What was in memory before the model, and a function that writes n ids after a prompt of a
    length, by transformers"""
    from transformers import AutoModelForCausalLM

    before = resident()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def write(n, length):
        ids = prompt(length)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[0, length:].tolist()

    return before, write


def ours(folder, make):
    "As `theirs`, by a form of our model"
    before = resident()
    model = make(from_hf(folder).model)

    def write(n, length):
        return torch.cat(list(generate(model, prompt(length), n, temperature=0))).tolist()

    return before, write


def child(name, folder):
    "Write when it is our turn, and answer how it went"
    answer = bench.answers()
    before, write = theirs(folder) if name == 'transformers' else ours(folder, OURS[name])

    def turn(n, length):
        start = time.perf_counter()
        ids = write(n, length)
        return time.perf_counter() - start, ids

    for _ in range(3):
        turn(N, PROMPT)  # warm, and compiled
    turn(1, LONG)
    answer(dict(memory=resident() - before))
    while True:
        bench.wait_for_turn()
        seconds, ids = turn(N, PROMPT)
        first, _ = turn(1, LONG)
        answer(dict(seconds=seconds, first=first, ids=ids))


def turns_of(model, shape, rounds):
    "{name: its answers}, one a round, and {name: bytes that its model holds in memory}"
    memory = {}
    kids = {}
    with tempfile.TemporaryDirectory() as folder:
        to_hf(f'{folder}/m', model)
        for name in progress(['transformers', *OURS], f'{shape}: opening, compiling'):
            kids[name] = bench.Child(__file__, '--child', name, f'{folder}/m')
            # one after the other: each compiles on an idle machine
            memory[name] = kids[name].read()['memory']
        ways = {name: kid.turn for name, kid in kids.items()}
        turns = bench.take_turns(ways, rounds, f'{shape}: rounds')
        for kid in kids.values():
            kid.end()
    return turns, memory


def measure(shape, rounds):
    "The row of a shape in the table, printed and returned"
    model = MiniGPT(llama(V, max_len=512, tie=True, **SHAPES[shape])).eval()
    turns, memory = turns_of(model, shape, rounds)
    want = turns['transformers'][0]['ids']
    rate = {n: N / median(t['seconds'] for t in ts) for n, ts in turns.items()}
    first = {n: 1000 * median(t['first'] for t in ts) for n, ts in turns.items()}
    out = dict(
        params=model.n_params,
        tokens_per_s={n: round(r, 1) for n, r in rate.items()},
        ratio={n: round(r / rate['transformers'], 2) for n, r in rate.items()},
        first_token_ms={n: round(ms, 1) for n, ms in first.items()},
        memory_mb={n: round(b / 1e6) for n, b in memory.items()},
        same_ids={
            n: all(t['ids'] == want for t in ts) for n, ts in turns.items() if 'int8' not in n
        },
        limit=round(bandwidth() / bytes_per_token(model), 1),
        limit_int8=round(bandwidth() / bytes_per_token(for_inference(model, 'int8')), 1),
    )
    print(
        f'\n{shape}: {model.n_params / 1e6:.1f}M weights; memory allows {out["limit"]:.0f} '
        f'tokens/s, in 8 bits {out["limit_int8"]:.0f}'
    )
    print(f'{"":16}tokens/s      ×   first token   memory   same ids')
    for n in turns:
        print(
            f'{n:16}{rate[n]:8.1f}{out["ratio"][n]:7.2f}{out["first_token_ms"][n]:11.1f} ms'
            f'{out["memory_mb"][n]:6} MB   {out["same_ids"].get(n, "not asked")}'
        )
    for n in ('cached', 'fast', 'compiled'):
        if not out['same_ids'][n]:
            raise SystemExit(f'{shape}: {n} wrote other ids than transformers')
    return out


def main(rounds):
    out = {shape: measure(shape, rounds) for shape in SHAPES}
    return dict(
        **out,
        prompt=PROMPT,
        long_prompt=LONG,
        tokens=N,
        rounds=rounds,
        bandwidth_gb_s=round(bandwidth() / 1e9, 1),
        **machine(),
    )


if __name__ == '__main__':
    ap = bench.parser(__doc__, rounds=12)
    ap.add_argument('--child', nargs=2, help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.child:
        child(*a.child)
    else:
        bench.report(__file__, main(a.rounds), a.save)
