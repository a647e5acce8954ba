"""How fast is a training step beside a plain loop, how near to the machine's peak, and how soon
does the first token come?

python experiments/speed_step/run.py [--rounds 40] [--save]

nanoGPT's CPU shape: 12 × 64 tokens, 4 layers, width 128, float32. Loops with the same sizes take
turns, ten steps at a time, each in a process of its own, as a user would have it: ours is `fit`
itself, eager and compiled, with AdamW; a plain eager GPT-2 with `torch.optim.AdamW` as it comes;
`transformers`' GPT-2 with the same AdamW. Beside them, ours without oneDNN's products (as on
processors that gain nothing by it), in bf16, and with Muon; and Llama's block with two key
heads, ours and `transformers`'. While one runs, the others wait. The median of each goes into
the table. The last line is JSON; `--save` keeps it in result.json with date and machine."""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench

from llm_lab import onednn
from llm_lab.chars import CharTokenizer
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.parts import part
from llm_lab.gqa import GQA
from llm_lab.hardware import flops, machine
from llm_lab.onednn import peak_flops
from llm_lab.core import progress, rng
from llm_lab.llama_block import SwiGLU, llama
from llm_lab.efficient import StepRunner
from llm_lab.optim import muon
from llm_lab.package import save
from llm_lab.train import fit, next_token_loss, random_crops, train_step

B, T, V, C, L, H = 12, 64, 65, 128, 4, 4
CHUNK = 10  # steps in a turn


class PlainBlock(nn.Module):
    "A GPT-2 block as one would write it without a library"

    def __init__(self):
        super().__init__()
        self.n1 = nn.LayerNorm(C)
        self.n2 = nn.LayerNorm(C)
        self.qkv = nn.Linear(C, 3 * C)
        self.proj = nn.Linear(C, C)
        self.up = nn.Linear(C, 4 * C)
        self.down = nn.Linear(4 * C, C)

    def forward(self, x):  # (B, T, C)
        q, k, v = self.qkv(self.n1(x)).split(C, dim=2)
        # (B, T, C) to (B, H, T, D)
        q, k, v = (t.view(*x.shape[:2], H, C // H).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).contiguous().view(*x.shape))
        return x + self.down(F.gelu(self.up(self.n2(x)), approximate='tanh'))


class PlainGPT(nn.Module):
    "The model of these blocks"

    def __init__(self):
        super().__init__()
        self.tok = nn.Embedding(V, C)
        self.pos = nn.Embedding(T, C)
        self.norm = nn.LayerNorm(C)
        self.lm_head = nn.Linear(C, V, bias=False)
        self.blocks = nn.ModuleList(PlainBlock() for _ in range(L))

    def forward(self, ids):
        x = self.tok(ids) + self.pos(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


def text():
    "A million random ids: what is read does not change how long a step takes"
    return torch.randint(V, (1_000_000,), generator=rng(0, 'text'))


def plain_loop(model, logits_of, turn):
    "The loop everybody writes"
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    ids = text()
    for n in range(1_000_000):
        turn(n)
        starts = torch.randint(len(ids) - T - 1, (B,))
        x = torch.stack([ids[s : s + T] for s in starts])
        y = torch.stack([ids[s + 1 : s + T + 1] for s in starts])
        loss = F.cross_entropy(logits_of(model(x)).view(-1, V), y.view(-1))
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()


def small():
    return MiniGPT(GPTConfig(vocab_size=V, max_len=T, d_model=C, n_layers=L, n_heads=H))


def small_llama():
    size = dict(max_len=T, d_model=C, n_layers=L, n_heads=H)
    return MiniGPT(llama(V, **size, attn=part(GQA, n_kv_heads=2), mlp=part(SwiGLU, d_ff=344)))


def our_loop(turn, step=train_step, optimizer=None, use_onednn=True, make=small):
    "`fit`, which asks for a batch before each step: there a turn begins and ends"
    if not use_onednn:
        # for this whole process, which runs nothing else
        onednn.onednn_is_faster = lambda: False
    rows = random_crops(text(), B, T)
    model = make()

    def batch(n):
        turn(n)
        return rows(n)

    rates = dict(optimizer=optimizer(model)) if optimizer else dict(lr=1e-3)
    fit(model, batch, 1_000_000, step_fn=step, **rates)


def transformers_loop(turn):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V,
            n_positions=T,
            n_embd=C,
            n_layer=L,
            n_head=H,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=False,
        )
    )
    plain_loop(model.train(), lambda out: out.logits, turn)


def transformers_llama(turn):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            max_position_embeddings=T,
            hidden_size=C,
            intermediate_size=344,
            num_hidden_layers=L,
            num_attention_heads=H,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )
    plain_loop(model.train(), lambda out: out.logits, turn)


LOOPS = {
    'llm_lab': our_loop,
    'llm_lab, compiled': lambda turn: our_loop(turn, StepRunner(compile=True)),
    'plain eager GPT-2': lambda turn: plain_loop(PlainGPT().train(), lambda out: out, turn),
    'transformers GPT-2': transformers_loop,
    'llm_lab, no oneDNN': lambda turn: our_loop(turn, use_onednn=False),
    'llm_lab, bf16': lambda turn: our_loop(turn, StepRunner(precision='bf16')),
    'llm_lab, Muon': lambda turn: our_loop(turn, optimizer=muon),
    'llm_lab Llama': lambda turn: our_loop(turn, make=small_llama),
    'transformers Llama': transformers_llama,
}


def child(name):
    """Run a loop; before each CHUNK steps answer how long the last ones took, and wait until it is
    our turn"""
    answer = bench.answers()
    times = []
    start = 0.0

    def turn(n):
        nonlocal start
        now = time.perf_counter()
        if n:
            times.append(now - start)
        if n % CHUNK == 0:
            answer(times[-CHUNK:])
            bench.wait_for_turn()
        start = time.perf_counter()  # the wait is not counted

    LOOPS[name](turn)


def first_token(rounds=5):
    """Seconds from 'imports done' to the first token of a saved model, each in a fresh process; the
    median"""
    code = (
        "import sys, time, torch\nfrom llm_lab.package import load\n"
        "from llm_lab.sampling import stream\nstart = time.perf_counter()\n"
        "model, tok, _ = load(sys.argv[1]); next(stream(model, tok, 'ab')); "
        "print(time.perf_counter() - start)"
    )
    tour_size = GPTConfig(vocab_size=65, max_len=128, d_model=160, n_heads=5)
    letters = CharTokenizer(map(chr, range(60, 125)))
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / 'm', MiniGPT(tour_size), letters)
        return median(
            float(subprocess.check_output([sys.executable, '-c', code, f'{folder}/m']))
            for _ in range(rounds)
        )


def measure(rounds):
    "{loop: seconds of each step}, and of this machine the peak in FLOP/s, measured in each round"
    kids = {name: bench.Child(__file__, '--loop', name) for name in LOOPS}
    for name in progress(LOOPS, 'set-up, compiling'):
        if kids[name].read() != []:
            raise RuntimeError(f'{name}: its first word should be an empty list')
        for _ in range(3):
            kids[name].turn()  # the first steps warm up
    peak_name = 'peak'
    ways = {name: kid.turn for name, kid in kids.items()}
    ways[peak_name] = lambda: peak_flops(seconds=0.05)
    found = bench.take_turns(ways, rounds, 'rounds')
    for kid in kids.values():
        kid.end()
    peak = median(found.pop(peak_name))
    times = {name: [t for ten in tens for t in ten] for name, tens in found.items()}
    return times, peak


def work_of(model):
    "Operations of a step"
    rows = torch.zeros(B, T + 1, dtype=torch.int64)
    return flops(lambda: next_token_loss(model, rows).backward())


def main(rounds):
    times, peak = measure(rounds)
    gpt2_work = work_of(small())
    llama_work = work_of(small_llama())
    ms = {name: 1000 * median(t) for name, t in times.items()}
    base = ms['plain eager GPT-2']
    mfu = {}
    for name, t in ms.items():
        work = llama_work if 'Llama' in name else gpt2_work
        mfu[name] = work / (t / 1000) / peak
    for name, t in ms.items():
        print(
            f'{name:20}{t:7.2f} ms a step{B * T / t * 1000:9,.0f} tokens/s{base / t:7.3f}× '
            f'the plain loop   MFU {mfu[name]:.0%}'
        )
    print(
        f'{gpt2_work / 1e9:.2f} GFLOP a step, Llama {llama_work / 1e9:.2f}; the best matrix '
        f'product here makes {peak / 1e9:.0f} GFLOP/s'
    )
    token = first_token()
    print(f'first token of a saved model after imports: {token:.2f} s')
    return dict(
        step_ms={k: round(v, 3) for k, v in ms.items()},
        speed_vs_plain=round(base / ms['llm_lab'], 3),
        compiled_vs_plain=round(base / ms['llm_lab, compiled'], 3),
        speed_vs_transformers=round(ms['transformers GPT-2'] / ms['llm_lab'], 3),
        compiled_vs_transformers=round(ms['transformers GPT-2'] / ms['llm_lab, compiled'], 3),
        llama_vs_transformers=round(ms['transformers Llama'] / ms['llm_lab Llama'], 3),
        mfu={k: round(v, 3) for k, v in mfu.items()},
        gflop_a_step=round(gpt2_work / 1e9, 3),
        peak_gflops=round(peak / 1e9, 1),
        first_token_s=round(token, 3),
        tokens=B * T,
        **machine(),
    )


if __name__ == '__main__':
    ap = bench.parser(__doc__, rounds=40)
    ap.add_argument('--loop', choices=LOOPS, help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.loop:
        child(a.loop)
    else:
        bench.report(__file__, main(a.rounds), a.save)
