"""The texts of run.py: pairs among random words, a language whose facts return, books; how large
all is."""

import math
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, islice
from random import Random

import torch
from torch.nn import functional as F

from llm_lab.hubdata import pg19
from llm_lab.hardware import device
from llm_lab.llama_block import llama, muon_lr
from llm_lab.train import random_crops

WORDS = 24
NEXT = (1, 2, 3, 7)  # how far one of them is drawn from the next word, on the circle of words
OFTEN = 0.4  # the share of keys among what is told
ODDS = 1.5  # key k is as common as 1 / (k + 1)^ODDS


@dataclass(frozen=True)
class Size:
    """How large all is. Ids stand in this order: words, values, pairs of a key and a value,
    questions."""

    T: int = 512
    lengths: tuple = (512, 1024, 2048, 4096)
    d_model: int = 64
    n_layers: int = 3
    n_heads: int = 4
    steps: int = 140
    batch: int = 8
    lr: float = 0.015
    keys: int = 32
    values: int = 8
    texts: int = 32  # of a test
    full: bool = False  # the sizes for a GPU, with RoPE and books?

    @property
    def pairs(self):
        "The first pair's id"
        return WORDS + self.values

    @property
    def asks(self):
        "The first question's id"
        return self.pairs + self.keys * self.values


FULL = Size(
    T=2048,
    lengths=(2048, 4096, 8192, 16384, 32768),
    d_model=512,
    n_layers=12,
    n_heads=8,
    steps=6000,
    batch=32,
    lr=muon_lr(llama(depth=8)),
    keys=128,
    values=32,
    full=True,
)


def bins(T):
    "The distances by which results are told, up to T"
    return [2**n for n in range(4, 20) if 2**n <= T]


def bin_of(d):
    "The first of the `bins` that is not smaller than this distance"
    return max(16, 2 ** math.ceil(math.log2(d)))


def recall_row(T, distances, size, seed):
    """ids (T + 1); [(position of a question, distance of its pair)].

    A pair is one token (a key with its value); its question is the key alone, and the answer, the
    value alone, comes next. All other tokens are random words."""
    r = Random(seed)
    asked = []
    ids = [r.randrange(WORDS) for _ in range(T + 1)]
    free = [True] * (T + 1)  # nothing but a word stands there
    for k, d in zip(r.sample(range(size.keys), size.keys), distances):
        for _ in range(50):
            i = r.randrange(d, T)
            if free[i] and free[i + 1] and free[i - d]:
                break
        else:
            continue  # no room: this key is left out
        v = r.randrange(size.values)
        ids[i - d] = size.pairs + k * size.values + v
        ids[i] = size.asks + k
        ids[i + 1] = WORDS + v
        free[i - d] = free[i] = free[i + 1] = False
        asked.append((i, d))
    return ids, asked


def facts_row(T, size, seed):
    """ids (T + 1), the exact surprisal of each in bits, and its kind: 'rest', or the distance to
    its last mention"""
    r = Random(seed)
    V = size.values
    told = {}  # {key: (its value, the position of its last mention)}
    word = 0
    odds = list(accumulate((n + 1) ** -ODDS for n in range(size.keys)))
    ids = []
    bits = []
    kinds = []
    while len(ids) <= T:
        if r.random() < OFTEN:
            k = r.choices(range(size.keys), cum_weights=odds)[0]
            cost = -math.log2(OFTEN * (k + 1) ** -ODDS / odds[-1])  # that this key comes now
            if k not in told:
                # its value is drawn: log2(V) bits, which nobody can know
                told[k] = r.randrange(V), len(ids)
                ids.append(size.pairs + k * V + told[k][0])
                bits.append(cost + math.log2(V))
                kinds.append('rest')
            else:
                # asked, and answered: whoever has the value still in reach pays 0 bits for it
                kinds += ['rest', len(ids) - told[k][1]]
                bits += [cost, 0.0]
                told[k] = told[k][0], len(ids) + 1
                ids += [size.asks + k, WORDS + told[k][0]]
        else:
            word = (5 * word + r.choice(NEXT)) % WORDS
            ids.append(word)
            bits.append(math.log2(len(NEXT) / (1 - OFTEN)))
            kinds.append('rest')
    return ids[: T + 1], bits[: T + 1], kinds[: T + 1]


def recall_batch(size, seed):
    "A function of the step: ids (batch, T + 1), the distances of pairs drawn log-uniformly"

    def batch(step):
        r = Random(f'recall/{seed}/{step}')
        rows = []
        for _ in range(size.batch):
            distances = [int((size.T - 2) ** r.random()) for _ in range(size.keys)]
            rows.append(recall_row(size.T, distances, size, r.random())[0])
        return torch.tensor(rows).to(device())

    return batch


def recall_loss(size, net, rows):
    "Cross-entropy of the answers: nothing else in these texts can be known"
    asks = rows[:, :-1] >= size.asks
    return F.cross_entropy(net.lm_head(net.features(rows[:, :-1])[asks]), rows[:, 1:][asks])


def facts_batch(size, seed):
    "A function of the step: ids (batch, T + 1)"

    def batch(step):
        rows = [facts_row(size.T, size, f'{seed}/{step}/{n}')[0] for n in range(size.batch)]
        return torch.tensor(rows).to(device())

    return batch


@cache
def books(split, n):
    "Bytes of the first `n` books of PG-19"
    text = '\n\n'.join(islice(pg19(stream=True).documents(split), n))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def books_batch(size, seed):
    "A function of the step: bytes (batch, T + 1) from random positions"
    return random_crops(books('train', 500), size.batch, size.T, seed, device())
