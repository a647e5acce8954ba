"""How fast is a training step beside a plain loop, and how soon does the first token come?

    python experiments/speed_step/run.py [--rounds 40] [--save]

nanoGPT's CPU shape: 12 × 64 tokens, 4 layers, width 128, float32. Three models with the same sizes take turns, step by step, in one
process: ours with `fit`'s loop body; a plain eager GPT-2 with `torch.optim.AdamW` as it comes; `transformers`' GPT-2 with the same
AdamW. The median of each goes into the table. The last line is JSON; `--save` keeps it in result.json with date and machine.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F

from llm_lab.gpt import Config, MiniGPT
from llm_lab.chars import CharTokenizer
from llm_lab.lab import machine, progress, rng
from llm_lab.package import save_package
from llm_lab.train import adamw, random_crops, train_step, warmup_cosine

B, T, V, C, L, H = 12, 64, 65, 128, 4, 4


class PlainBlock(nn.Module):
    "A GPT-2 block as one would write it without a library"

    def __init__(self):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.proj, self.up, self.down = nn.Linear(C, 3*C), nn.Linear(C, C), nn.Linear(C, 4*C), nn.Linear(4*C, C)

    def forward(self, x):
        q, k, v = self.qkv(self.n1(x)).split(C, dim=2)
        q, k, v = (t.view(*x.shape[:2], H, C//H).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous().view(*x.shape)
        x = x + self.proj(y)
        return x + self.down(F.gelu(self.up(self.n2(x)), approximate='tanh'))


class PlainGPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok, self.pos, self.norm, self.head = nn.Embedding(V, C), nn.Embedding(T, C), nn.LayerNorm(C), nn.Linear(C, V, bias=False)
        self.blocks = nn.ModuleList(PlainBlock() for _ in range(L))

    def forward(self, ids):
        x = self.tok(ids) + self.pos(torch.arange(ids.shape[1]))
        for block in self.blocks: x = block(x)
        return self.head(self.norm(x))


def plain_loop(model, logits_of):
    "One step of the loop everybody writes"
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(.9, .99), weight_decay=.1)
    ids = torch.randint(V, (1_000_000,), generator=rng(0, 'text'))

    def step(n):
        starts = torch.randint(len(ids) - T - 1, (B,))
        x = torch.stack([ids[s:s + T] for s in starts])
        y = torch.stack([ids[s + 1:s + T + 1] for s in starts])
        loss = F.cross_entropy(logits_of(model(x)).view(-1, V), y.view(-1))
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
    return step


def our_loop(model):
    "What `fit` does in a step"
    opt, batch = adamw(model, 1e-3), random_crops(torch.randint(V, (1_000_000,), generator=rng(0, 'text')), B, T)

    def step(n):
        for group in opt.param_groups: group['lr'] = 1e-3*warmup_cosine(n, 1000)
        train_step(model, opt, batch(n))
    return step


def first_token(rounds=5):
    "Seconds from 'imports done' to the first token of a saved model, each in a fresh process; the median"
    code = ("import sys, time, torch\nfrom llm_lab.package import open_model\n"
            "from llm_lab.sample import stream\nstart = time.perf_counter()\n"
            "model, tok, _ = open_model(sys.argv[1]); next(stream(model, tok, 'ab')); print(time.perf_counter() - start)")
    tour_size, letters = Config(vocab_size=65, max_len=128, d_model=160, n_heads=5), CharTokenizer(map(chr, range(60, 125)))
    with tempfile.TemporaryDirectory() as folder:
        save_package(Path(folder)/'m', MiniGPT(tour_size), letters)
        return median(float(subprocess.check_output([sys.executable, '-c', code, f'{folder}/m'])) for _ in range(rounds))


def main(rounds):
    from transformers import GPT2Config, GPT2LMHeadModel
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=T, n_embd=C, n_layer=L, n_head=H, resid_pdrop=0., embd_pdrop=0.,
                                        attn_pdrop=0., bos_token_id=0, eos_token_id=0, tie_word_embeddings=False))
    ours = MiniGPT(Config(vocab_size=V, max_len=T, d_model=C, n_layers=L, n_heads=H))
    loops = {'llm_lab': our_loop(ours.train()),
             'plain eager GPT-2': plain_loop(PlainGPT().train(), lambda out: out),
             'transformers GPT-2': plain_loop(theirs.train(), lambda out: out.logits)}
    times = {name: [] for name in loops}
    for n in progress(range(rounds*10), 'steps'):
        for name, step in loops.items():
            start = time.perf_counter()
            step(n)
            if n >= 20: times[name].append(time.perf_counter() - start)  # the first steps warm up
    ms = {name: 1000*median(t) for name, t in times.items()}
    base = ms['plain eager GPT-2']
    for name in ms: print(f'{name:20}{ms[name]:7.2f} ms a step{B*T/ms[name]*1000:9,.0f} tokens/s{base/ms[name]:6.2f}× the plain loop')
    token = first_token()
    print(f'first token of a saved model after imports: {token:.2f} s')
    return dict(step_ms={k: round(v, 3) for k, v in ms.items()}, speed_vs_plain=round(base/ms['llm_lab'], 3),
                speed_vs_transformers=round(ms['transformers GPT-2']/ms['llm_lab'], 3), first_token_s=round(token, 3),
                tokens=B*T, **machine())


if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--rounds', type=int, default=40, help='ten steps of each model in a round')
    ap.add_argument('--save', action='store_true', help='keep the last line in result.json')
    a = ap.parse_args()
    line = json.dumps(main(a.rounds))
    if a.save: (Path(__file__).parent/'result.json').write_text(line + '\n', encoding='utf-8')
    print(line)
