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

# words, steps to the next one, share of keys, how unlike they are
WORDS = 24
NEXT = (1, 2, 3, 7)
OFTEN = 0.4
ODDS = 1.5


@dataclass(frozen=True)
class Size:
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
        return WORDS + self.values  # the first pair; before it the values, before them the words

    @property
    def asks(self):
        return self.pairs + self.keys * self.values  # the first question


FULL = Size(
    2048,
    (2048, 4096, 8192, 16384, 32768),
    512,
    12,
    8,
    6000,
    32,
    muon_lr(llama(depth=8)),
    128,
    32,
    32,
    True,
)


def bins(T):
    return [2**n for n in range(4, 20) if 2**n <= T]


def bin_of(d):
    # a distance belongs to the first bin that is not smaller
    return max(16, 2 ** math.ceil(math.log2(d)))


def recall_row(T, distances, size, seed):
    "ids (T + 1); [(place of a question, distance of its pair)]"
    r, asked = Random(seed), []
    ids = [r.randrange(WORDS) for _ in range(T + 1)]
    free = [True] * (T + 1)
    for k, d in zip(r.sample(range(size.keys), size.keys), distances):
        for _ in range(50):
            i = r.randrange(d, T)
            if free[i] and free[i + 1] and free[i - d]:
                break
        else:
            continue  # no room: this key is left out
        v = r.randrange(size.values)
        ids[i - d], ids[i], ids[i + 1] = size.pairs + k * size.values + v, size.asks + k, WORDS + v
        free[i - d] = free[i] = free[i + 1] = False
        asked.append((i, d))
    return ids, asked


def facts_row(T, size, seed):
    """ids (T + 1), the exact surprisal of each in bits, and its kind: 'rest', or the distance to
    its last mention"""
    r, V, told, word = Random(seed), size.values, {}, 0
    odds = list(accumulate((n + 1) ** -ODDS for n in range(size.keys)))
    ids, bits, kinds = [], [], []
    while len(ids) <= T:
        if r.random() < OFTEN:
            k = r.choices(range(size.keys), cum_weights=odds)[0]
            first = k not in told
            cost = -math.log2(OFTEN * (k + 1) ** -ODDS / odds[-1])
            if first:
                told[k] = r.randrange(V), len(ids)
                ids.append(size.pairs + k * V + told[k][0])
                bits.append(cost + math.log2(V))
                kinds.append('rest')
            else:
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
    def batch(step):
        r = Random(f'recall/{seed}/{step}')
        far = lambda: [int((size.T - 2) ** r.random()) for _ in range(size.keys)]
        return torch.tensor(
            [recall_row(size.T, far(), size, r.random())[0] for _ in range(size.batch)]
        ).to(device())

    return batch


def recall_loss(size, net, rows):
    "Only answers count"
    asks = rows[:, :-1] >= size.asks
    return F.cross_entropy(net.lm_head(net.features(rows[:, :-1])[asks]), rows[:, 1:][asks])


def facts_batch(size, seed):
    return lambda step: torch.tensor(
        [facts_row(size.T, size, f'{seed}/{step}/{n}')[0] for n in range(size.batch)]
    ).to(device())


@cache
def books(split, n):
    "Bytes of the first `n` books of PG-19"
    text = '\n\n'.join(islice(pg19(stream=True).documents(split), n))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def books_batch(size, seed):
    return random_crops(books('train', 500), size.batch, size.T, seed, device())
