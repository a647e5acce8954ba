"""Hand-ins of the projects, right ones, and wrong ones with the rows that each must lose;
`test_projects.py` runs them through the grader of the page."""

import random
import re
from collections import Counter
from dataclasses import replace

import torch

from llm_lab.batching import BatchStream
from llm_lab.bpe import BPETokenizer
from llm_lab.chars import CharTokenizer
from llm_lab.corpora import letters_of
from llm_lab.diffusion import block_causal
from llm_lab.evaluation import evaluate
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.package import save
from llm_lab.parts import part
from llm_lab.self_attention import Attention
from llm_lab.train import batches, fit

# ---- part 1: text becomes numbers


class BookText:
    "Right: the book's own parts"

    def train(corpus, vocab_size):
        return BPETokenizer.train(corpus.documents('train'), vocab_size)

    def cost(tokenizer, documents):
        tokens = sum(len(tokenizer.encode(document)) for document in documents)
        return tokens / sum(len(document.encode()) for document in documents)

    def stream(ids, batch_size, length, seed):
        return BatchStream(ids, batch_size, length, seed)


class WordTokenizer:
    "256 bytes and the most frequent words, each with the space before it"

    def __init__(self, documents, vocab_size):
        counts = Counter(word for d in documents for word in re.findall(r' ?\w+', d))
        words = [w for w in counts if len(w.encode()) > 1]
        words = sorted(words, key=counts.__getitem__, reverse=True)[: vocab_size - 256]
        self.pieces = [bytes([n]) for n in range(256)] + [word.encode() for word in words]
        self.id_of = {piece: n for n, piece in enumerate(self.pieces)}
        self.vocab_size = len(self.pieces)

    def encode(self, text):
        ids = []
        for word in re.findall(r' ?\w+|[^\w]', text):
            data = word.encode()
            ids += [self.id_of[data]] if data in self.id_of else list(data)
        return ids

    def decode(self, ids):
        return b''.join(self.pieces[n] for n in ids).decode()


class OwnStream:
    "Spans of the text, shuffled anew in each epoch by a function of seed and epoch"

    spans_left_out = 0

    def __init__(self, ids, batch_size, length, seed):
        self.ids = ids
        self.batch_size = batch_size
        self.length = length
        self.seed = seed
        self.read = 0  # batches

    def order(self, epoch):
        spans = list(range((len(self.ids) - 1) // self.length - self.spans_left_out))
        random.Random(f'{self.seed}/{epoch}').shuffle(spans)
        return spans

    def __next__(self):
        rows = []
        for k in range(self.batch_size):
            number = self.read * self.batch_size + k
            spans = len(self.order(0))
            start = self.order(number // spans)[number % spans] * self.length
            rows.append(self.ids[start : start + self.length + 1])
        self.read += 1
        return torch.stack(rows)

    def state_dict(self):
        return dict(read=self.read)

    def load_state_dict(self, state):
        self.read = state['read']


class OwnText(BookText):
    "Right: words, and a stream in plain Python"

    def train(corpus, vocab_size):
        return WordTokenizer(corpus.documents('train'), vocab_size)

    stream = OwnStream


class Bytes(OwnText):
    "Too dear: one byte a token"

    def train(corpus, vocab_size):
        return WordTokenizer([], vocab_size)


class Larger(BookText):
    "Buys its compression with a larger vocabulary"

    def train(corpus, vocab_size):
        return BPETokenizer.train(corpus.documents('train'), vocab_size + 100)


class ReadsHeldBack(BookText):
    "Learns from the held-back documents, too"

    def train(corpus, vocab_size):
        texts = [*corpus.documents('train'), *corpus.documents('val')]
        return BPETokenizer.train(texts, vocab_size)


class ReadsTest(BookText):
    "Learns from the test documents, too"

    def train(corpus, vocab_size):
        texts = [*corpus.documents('train'), *corpus.documents('test')]
        return BPETokenizer.train(texts, vocab_size)


class LosesBytes(WordTokenizer):
    def encode(self, text):
        return super().encode(text.encode('ascii', 'ignore').decode())


class Ascii(OwnText):
    "Loses every character beyond ASCII"

    def train(corpus, vocab_size):
        return LosesBytes(corpus.documents('train'), vocab_size)


class Lowered(WordTokenizer):
    def encode(self, text):
        return super().encode(text.lower())


class LowerCase(OwnText):
    "Loses capitals, which saves tokens"

    def train(corpus, vocab_size):
        return Lowered([d.lower() for d in corpus.documents('train')], vocab_size)


class PerCharacter(BookText):
    "Counts characters, not bytes"

    def cost(tokenizer, documents):
        return sum(len(tokenizer.encode(d)) for d in documents) / sum(map(len, documents))


class MeanOfRatios(BookText):
    "Averages over documents, as if all were of one length"

    def cost(tokenizer, documents):
        ratios = [len(tokenizer.encode(d)) / len(d.encode()) for d in documents]
        return sum(ratios) / len(ratios)


class OneSpanShort(OwnStream):
    spans_left_out = 1


class Skips(OwnText):
    "Never reads the last span"

    stream = OneSpanShort


class Crops(OwnStream):
    def order(self, epoch):
        draw = random.Random(f'{self.seed}/{epoch}')
        spans = (len(self.ids) - 1) // self.length
        return [draw.randrange(spans) for _ in range(spans)]


class RandomSpans(OwnText):
    "Draws spans with replacement"

    stream = Crops


class Shifted(OwnStream):
    def __next__(self):
        rows = super().__next__()
        return torch.cat([rows[:, :1], rows[:, :-1]], 1)


class RepeatsFirst(OwnText):
    "Each row begins with its first token twice"

    stream = Shifted


class Seedless(OwnStream):
    def __init__(self, ids, batch_size, length, seed):
        super().__init__(ids, batch_size, length, 0)


class ForgetsSeed(OwnText):
    "The same order for every seed"

    stream = Seedless


class OneOrder(OwnStream):
    def order(self, epoch):
        return super().order(0)


class SameEachEpoch(OwnText):
    "The same order in every epoch"

    stream = OneOrder


class InOrder(OwnStream):
    def order(self, epoch):
        return sorted(super().order(epoch))


class NotShuffled(OwnText):
    "The order of the text"

    stream = InOrder


class Global(OwnStream):
    def __init__(self, *given):
        super().__init__(*given)
        self.orders = {}

    def order(self, epoch):
        if epoch not in self.orders:
            spans = super().order(epoch)
            random.shuffle(spans)
            self.orders[epoch] = spans
        return self.orders[epoch]


class GlobalChance(OwnText):
    "Shuffles by the generator that all of Python shares"

    stream = Global


class WithinEpoch(OwnStream):
    def state_dict(self):
        spans = (len(self.ids) - 1) // self.length
        return dict(read=self.read % (spans // self.batch_size))


class ForgetsEpoch(OwnText):
    "Saves the position within the epoch, not the epoch"

    stream = WithinEpoch


class Restarts(OwnStream):
    def load_state_dict(self, state):
        pass


class BeginsAgain(OwnText):
    "Saves a state and does not use it"

    stream = Restarts


class TensorState(OwnStream):
    def state_dict(self):
        return dict(read=torch.tensor(self.read))


class NotPlain(OwnText):
    "Its state is no plain data"

    stream = TensorState


RIGHT_TEXT = [BookText, OwnText]
WRONG_TEXT = {
    Bytes: {'compression'},
    Larger: {'ids'},
    ReadsHeldBack: {'no leak'},
    ReadsTest: {'no leak'},
    Ascii: {'round trip'},
    LowerCase: {'round trip'},
    PerCharacter: {'cost'},
    MeanOfRatios: {'cost'},
    Skips: {'once'},
    RandomSpans: {'once'},
    RepeatsFirst: {'once'},
    ForgetsSeed: {'seed'},
    SameEachEpoch: {'seed'},
    NotShuffled: {'seed'},
    GlobalChance: {'seed', 'resume'},
    ForgetsEpoch: {'resume'},
    BeginsAgain: {'resume'},
    NotPlain: {'resume'},
}


# ---- part 2: a language model, on the page's text of four letters

SEEDS = [0, 1, 2]
STEPS = 60  # of each run of the claim


def train_small(corpus, seed, steps, part=True, noise=0.0, **more):
    "A tiny GPT; without the part it has no positions"
    tokenizer = CharTokenizer.train(letters_of(corpus))
    sizes = dict(d_model=16, n_layers=1, n_heads=2, max_len=17)
    cfg = GPTConfig(vocab_size=tokenizer.vocab_size, **sizes, **more)
    if not part:
        cfg = replace(cfg, pos=None)
    model = MiniGPT(cfg, seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn(p.shape))  # of the generator that all share
    if steps:
        rows = batches(corpus, tokenizer, batch_size=16, length=17, seed=seed)
        fit(model, rows, steps, lr=0.02, seed=seed)
    return model, tokenizer


def interval_of(with_part, without_part, t=4.303):
    "(low, high) of the mean of without − with, over three seeds"
    d = [b - a for a, b in zip(with_part, without_part)]
    mean = sum(d) / len(d)
    s = (sum((x - mean) ** 2 for x in d) / (len(d) - 1)) ** 0.5
    half = t * s / len(d) ** 0.5
    return mean - half, mean + half


def unpaired_interval(with_part, without_part):
    "(low, high) as if the runs of one seed had nothing in common"
    low, high = interval_of(with_part, without_part)
    mean = (low + high) / 2
    rows = torch.tensor([with_part, without_part], dtype=torch.float64)
    half = 2.776 * (rows.var(1).sum() / 3).sqrt().item()
    return mean - half, mean + half


def right_model(corpus, folder):
    "Right: a class to be handed in, its package in `folder`"
    best, tokenizer = train_small(corpus, 0, 200)
    save(folder / 'right', best, tokenizer)
    arms = {True: [], False: []}
    for arm, bits in arms.items():
        for seed in SEEDS:
            model, _ = train_small(corpus, seed, STEPS, arm)
            bits.append(evaluate(model, tokenizer, corpus).bits)
    found = interval_of(arms[True], arms[False])

    class Right:
        package = folder / 'right'
        steps = 200
        train = staticmethod(train_small)
        claim = dict(
            part='positions',
            steps=STEPS,
            seeds=SEEDS,
            with_part=arms[True],
            without_part=arms[False],
            interval=found,
            conclusion='helps',
        )

    return Right


def wrong_models(right, corpus, folder):
    "{name: (hand-in, the rows it loses)}"

    def but(**changes):
        return type('Wrong', (right,), changes)

    def claims(**changes):
        return but(claim={**right.claim, **changes})

    def trains_by(train):
        "Another way to train, and a claim whose last pair was trained so"
        arms = []
        for arm, key in ((True, 'with_part'), (False, 'without_part')):
            bits = evaluate(*train(corpus, SEEDS[-1], STEPS, arm), corpus).bits
            arms.append([*right.claim[key][:-1], bits])
        claim = dict(with_part=arms[0], without_part=arms[1], interval=interval_of(*arms))
        return but(train=staticmethod(train), claim={**right.claim, **claim})

    def package(name, steps, **more):
        model, tokenizer = train_small(corpus, 0, steps, **more)
        save(folder / name, model, tokenizer)
        return but(package=folder / name)

    def reads_held_back(corpus, *given):
        texts = [*corpus.documents('train'), *corpus.documents('val')]
        return train_small(replace(corpus, splits=dict(corpus.splits, train=texts)), *given)

    def chooses_seed_on_val(corpus, seed, steps, part=True):
        tries = [train_small(corpus, 10 * seed + k, steps, part) for k in range(3)]
        return min(tries, key=lambda pair: evaluate(*pair, corpus).nats)

    def forgets_seed(corpus, seed, *given):
        return train_small(corpus, 0, *given)

    def global_chance(corpus, *given):
        return train_small(corpus, *given, noise=1e-4)

    a, b = right.claim['with_part'], right.claim['without_part']
    better = [bits - 0.05 for bits in a]
    without_interval = {k: v for k, v in right.claim.items() if k != 'interval'}
    sees_future = part(Attention, mask=part(block_causal, size=8))
    first_two = dict(seeds=SEEDS[:2], with_part=a[:2], without_part=b[:2])
    return {
        'not trained': (package('fresh', 0), {'floor'}),
        'sees the future': (package('future', 300, attn=sees_future), {'floor', 'causal'}),
        'no package': (but(package=folder / 'none'), {'floor', 'causal'}),
        'reads held-back documents': (trains_by(reads_held_back), {'no leak'}),
        'chooses by held-back documents': (trains_by(chooses_seed_on_val), {'no leak'}),
        'forgets the seed': (trains_by(forgets_seed), {'seed'}),
        'global chance': (trains_by(global_chance), {'seed'}),
        'too dear': (but(steps=10**7), {'budget'}),
        'two seeds': (claims(**first_two), {'pairs', 'interval', 'conclusion'}),
        'one seed three times': (claims(seeds=[2, 2, 2]), {'pairs'}),
        'a run is missing': (claims(seeds=[0, 1, 5, 2]), {'pairs'}),
        'embellished': (claims(with_part=better, interval=interval_of(better, b)), {'rerun'}),
        'no interval': (but(claim=without_interval), {'interval'}),
        'interval of many seeds': (claims(interval=interval_of(a, b, 1.96)), {'interval'}),
        'interval of no pairs': (claims(interval=unpaired_interval(a, b)), {'interval'}),
        'with minus without': (claims(interval=interval_of(b, a)), {'interval'}),
        'concludes the contrary': (claims(conclusion='hurts'), {'conclusion'}),
        'concludes too little': (claims(conclusion='not shown'), {'conclusion'}),
    }
