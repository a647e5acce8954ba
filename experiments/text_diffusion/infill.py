"""Holes in stories: who reads both sides, and what does a text cost in time?

python experiments/text_diffusion/infill.py [--save]

Two models of Tiny Tales, of equal size (3 layers of width 96, 4 heads, 256 characters, 16 rows a
step, Muon at 0.02, one seed): one predicts the next character, one is text diffusion in one block,
which learns more slowly and is trained for longer (`LEGS`; each leg warms up and comes down anew).
They are kept in runs/.

Holes: in unseen tales one word that was drawn (a name, a colour, a thing, a size, an animal) is
blank. The program that tells the tales knows which words could stand there, of the same length,
and how likely each of them makes the whole tale: the best answer. Only holes count whose answer is
determined by the rest of the tale, because the word is mentioned again. Beside diffusion: the
other model writing on from the left side, the best that any reader of the left side can do, and
the other model scoring the whole tale with each candidate, which costs a pass for each.

Writing: tales of 200 characters, 8 side by side, by diffusion in 4, 16, 64, 200 steps, and by the
next character with a cache: seconds, and how far the tales are tales (`valid_prefix`, as a share
of their characters). One line of JSON at the end; `--save` keeps it in infill.json."""

import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench

from llm_lab.chars import CharTokenizer
from llm_lab.core import LabError, progress
from llm_lab.corpora import letters_of, load_corpus
from llm_lab.diffusion import diffusion_llama, fill_blanks
from llm_lab.gpt import MiniGPT
from llm_lab.hardware import keep_freed_memory
from llm_lab.kv_cache import with_kv_cache
from llm_lab.llama_block import llama
from llm_lab.optim import muon
from llm_lab.package import load, save
from llm_lab.sampling import generate
from llm_lab.tales import parse_tale, tale_bits, valid_prefix
from llm_lab.train import batches, fit

HERE = Path(__file__).parent
SIZE = dict(d_model=96, n_layers=3, n_heads=4, max_len=256)
LEGS = dict(next=(2000,), diffusion=(2000, 5000))  # steps; the first legs have equal batches
DRAWN = 'name', 'colour', 'thing', 'size', 'animal'


def trained(name, cfg, tok, corpus):
    "A model of tales, trained once; after each leg it is kept"
    model = MiniGPT(cfg)
    for leg, steps in enumerate(LEGS[name]):
        place = HERE / 'runs' / f'infill-{name}-{sum(LEGS[name][: leg + 1])}'
        if not place.exists():
            rows = batches(corpus, tok, 16, 256, seed=leg)
            fit(model.train(), rows, steps, optimizer=muon(model, 0.02))
            save(place, model, tok)
        model = load(place).model
    return model.eval()


def holes(tale):
    """(begin, end, the probability of each word that could stand there) of each drawn word of a
    tale whose rest determines it"""
    at = 0
    for piece in parse_tale(tale):
        begin, at = at, at + len(piece.text)
        if piece.kind != 'choice' or piece.label not in DRAWN:
            continue
        chances = {}
        for word in piece.options:
            if len(word) != len(piece.text):
                continue
            try:
                chances[word] = 2.0 ** -tale_bits(tale[:begin] + word + tale[at:])
            except LabError:  # with this word it is no tale
                chances[word] = 0.0
        total = sum(chances.values())
        if len(chances) > 1 and chances[piece.text] / total > 0.99:
            yield begin, at, [*chances]


@torch.no_grad()
def left_to_right(model, ids, n):
    "The likeliest n characters after some ids (1, T), one after the other"
    return torch.stack([*generate(model, ids, n, temperature=0)], 1)[0].tolist()


@torch.no_grad()
def by_scores(model, rows):
    "Which of some rows (N, T) is the likeliest: one pass for each"
    logits = model(rows[:, :-1]).log_softmax(-1)
    return logits.gather(-1, rows[:, 1:, None]).sum((1, 2)).argmax().item()


def fill_holes(models, tok, tales):
    "Shares of the holes that are filled rightly"
    mark = tok.encode('\n\n')[-1:]
    right = dict(diffusion=0, left=0, scores=0)
    best_left = 0.0
    n = 0
    for tale in progress(tales, 'holes'):
        for begin, end, words in holes(tale):
            ids = torch.tensor([mark + tok.encode(tale)])
            if ids.shape[1] > SIZE['max_len']:
                continue
            hole = slice(1 + begin, 1 + end)
            truth = ids[0, hole].tolist()
            blank = ids.clone()
            blank[0, hole] = models['diffusion'].objective.mask_id
            filled = fill_blanks(models['diffusion'], blank, order='confident', temperature=0)
            right['diffusion'] += filled[0, hole].tolist() == truth
            left = left_to_right(models['next'], ids[:, : 1 + begin], end - begin)
            right['left'] += left == truth
            rows = ids.repeat(len(words), 1)
            rows[:, hole] = torch.tensor([tok.encode(word) for word in words])
            chosen = by_scores(models['next'], rows)
            right['scores'] += rows[chosen, hole].tolist() == truth
            best_left += 1 / len(words)
            n += 1
    return {k: v / n for k, v in right.items()} | dict(best_left=best_left / n, holes=n)


def writing(models, tok, rounds=3):
    "Seconds and validity of tales, by the number of steps, and by the next character"
    mark = tok.encode('\n\n')[-1]

    def told(rows):
        texts = [tok.decode(row).split('\n\n')[0] for row in rows]
        return [valid_prefix(text) / max(1, len(text)) for text in texts]

    found = {}
    for steps in (4, 16, 64, 200):
        blank = torch.full((8, 201), models['diffusion'].objective.mask_id)
        blank[:, 0] = mark
        seconds, valid = [], []
        for k in range(rounds):
            start = time.perf_counter()
            rows = fill_blanks(models['diffusion'], blank, steps=steps, seed=k)
            seconds.append(time.perf_counter() - start)
            valid += told(rows[:, 1:].tolist())
        found[str(steps)] = dict(seconds=min(seconds), valid=sum(valid) / len(valid))
    cached = with_kv_cache(models['next'])
    seconds, valid = [], []
    for k in range(rounds):
        start = time.perf_counter()
        rows = torch.stack([*generate(cached, torch.full((8, 1), mark), 200, seed=k)], 1)
        seconds.append(time.perf_counter() - start)
        valid += told(rows.tolist())
    found['next, with a cache'] = dict(seconds=min(seconds), valid=sum(valid) / len(valid))
    return found


def main():
    torch.set_num_threads(1)
    keep_freed_memory()
    corpus = load_corpus('tiny_tales')
    tok = CharTokenizer.train(letters_of(corpus))
    configs = {
        'next': llama(tok.vocab_size, **SIZE),
        'diffusion': diffusion_llama(tok.vocab_size, **SIZE),
    }
    models = {k: trained(k, cfg, tok, corpus) for k, cfg in configs.items()}
    shares = fill_holes(models, tok, corpus.documents('val')[:150])
    for name, share in shares.items():
        print(f'{name:12}{share:8.3f}')
    written = writing(models, tok)
    for name, said in written.items():
        print(f'{name:20}{said["seconds"]:8.2f} s{said["valid"]:8.1%} of the characters are a tale')
    assert math.isfinite(shares['diffusion'])
    return dict(shares=shares, writing=written, legs=LEGS, **bench.one_thread())


if __name__ == '__main__':
    ap = bench.parser(__doc__)
    a = ap.parse_args()
    bench.report(__file__, main(), a.save, 'infill.json')
