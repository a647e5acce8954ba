"""How fast does our BPE learn, encode and pack, beside the Rust and C++ of this world, and in how
much memory?

python experiments/speed_bpe/run.py [--rounds 3] [--full] [--save]

Ours, Hugging Face's `tokenizers`, `tiktoken` and, where it is installed, `rustbpe` take turns in
one process; the medians go into the table, and every result is compared with ours before its
time counts. Training: 1,024 and 8,192 merges of tiny_shakespeare and of a made-up text in many
scripts. The obvious trainer, which counts every pair of the whole text anew for each merge, runs
for a few merges here; `--full` runs all 512. Encoding: one string, and its paragraphs as a
batch. Packing: `pack` against the library's bare `encode_batch` on the same documents, ids
equal. `--full` also trains on and packs a file of 1 GB and measures the memory of all processes
(take 15 minutes). The last line is JSON; `--save` keeps it in result.json."""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'tests'))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench
import texts

import tiktoken
import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from llm_lab.bpe import GPT2, BPETokenizer, printable_to_bytes
from llm_lab.corpora import Corpus, load_corpus
from llm_lab.core import LabError
from llm_lab.hardware import machine
from llm_lab.packing import PackedTokens, pack
from llm_lab.tales import tiny_tales, write_tale

try:
    import rustbpe
except ImportError:
    rustbpe = None
RESULTS = {}


def turns(ways, rounds):
    "{name: median seconds} of functions that take turns"
    return bench.medians(bench.take_turns(bench.timed(ways), rounds, 'rounds'))


def table(title, seconds, megabytes, base='llm_lab'):
    print(f'\n{title} ({megabytes:.1f} MB)')
    for name, s in seconds.items():
        print(
            f'  {name:32}{s:9.3f} s{megabytes / s:9.1f} MB/s{s / seconds[base]:8.2f} × the '
            f'time of {base}'
        )
    RESULTS[title] = {name: round(s, 4) for name, s in seconds.items()}


# ---- training


def theirs_trained(text, vocab_size):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=0,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return t


def merges_of(theirs):
    return [
        tuple(map(printable_to_bytes, m)) for m in json.loads(theirs.to_str())['model']['merges']
    ]


def obvious(text, n):
    """Count all pairs of all bytes, merge the commonest everywhere; again.

    Yields the seconds since the start after each merge"""
    ids, start = list(text.encode()), time.perf_counter()
    for new in range(256, 256 + n):
        pairs = Counter(zip(ids, ids[1:]))
        pair, out, i = max(pairs, key=pairs.get), [], 0
        while i < len(ids):
            hit = i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair
            out.append(new if hit else ids[i])
            i += 2 if hit else 1
        ids = out
        yield time.perf_counter() - start


def training(texts_of, rounds, full):
    for name, text in texts_of.items():
        for n in (1024, 8192):
            ways = {
                'llm_lab': lambda: BPETokenizer.train(text, 256 + n, min_frequency=1),
                'tokenizers': lambda: theirs_trained(text, 256 + n),
            }
            if rustbpe:
                ways['rustbpe'] = lambda: rustbpe.Tokenizer().train_from_iterator(
                    [text], 256 + n, pattern=GPT2
                )
            assert ways['llm_lab']().merges == merges_of(ways['tokenizers']()), (name, n)
            times = turns(ways, rounds)
            table(f'train {n:,} merges, {name}', times, len(text.encode()) / 1e6)
            RESULTS[f'train_ratio_{n}_{name}'] = round(times['llm_lab'] / times['tokenizers'], 3)
    name, text = next(iter(texts_of.items()))
    ours = turns({'llm_lab': lambda: BPETokenizer.train(text, 256 + 512, min_frequency=1)}, rounds)[
        'llm_lab'
    ]
    n = 512 if full else 16
    took = [*obvious(text, n)]
    print(
        f'\nthe obvious trainer, {name}: {n} merges in {took[-1]:.1f} s; ours 512 in {ours:.3f} s'
    )
    if full:
        print(
            f'  its first 16 merges took {took[15]:.1f} s; ours is {took[-1] / ours:,.0f} '
            'times as fast'
        )
    else:
        print(
            f'  512 would take longer: at this pace {took[-1] * 512 / n / ours:,.0f} times '
            'as long as ours (--full: all of them)'
        )
    RESULTS.update(
        obvious_merges=n,
        obvious_s=round(took[-1], 2),
        ours_512_s=round(ours, 4),
        obvious_ratio_at_least=round(took[-1] / ours, 1),
        obvious_ratio_at_this_pace=round(took[-1] * 512 / n / ours, 1),
    )
    if full:
        RESULTS['obvious_16_s'] = round(took[15], 2)


# ---- encoding


def encoding(texts_of, rounds, folder):
    for name, text in texts_of.items():
        tok = BPETokenizer.train(text, 8192, ['<|endoftext|>'])
        size = len(text.encode()) / 1e6
        tok.save(folder / name)
        hf = Tokenizer.from_file(str(folder / name / 'tokenizer.json'))
        ranks = {t: n for n, t in tok.vocab.items() if n < 8191}
        tt = tiktoken.Encoding('speed', pat_str=GPT2, mergeable_ranks=ranks, special_tokens={})
        want = tok.encode(text)
        assert want == hf.encode(text).ids == tt.encode_ordinary(text)

        def cold():
            tok._chunks.clear()
            tok.encode(text)

        times = turns(
            {
                'llm_lab, nothing in its cache': cold,
                'llm_lab': lambda: tok.encode(text),
                'tokenizers.encode': lambda: hf.encode(text).ids,
                'tiktoken': lambda: tt.encode_ordinary(text),
            },
            rounds,
        )
        table(f'encode one string, {name}', times, size)
        RESULTS[f'encode_ratio_{name}'] = round(times['tokenizers.encode'] / times['llm_lab'], 3)
        RESULTS[f'encode_cold_ratio_{name}'] = round(
            times['tokenizers.encode'] / times['llm_lab, nothing in its cache'], 3
        )
        docs = [text[k : k + 1500] for k in range(0, len(text), 1500)]
        plain = BPETokenizer.load(folder / name)
        plain._rust = ()  # as where tiktoken is not installed
        want = [e.ids for e in hf.encode_batch(docs)]
        assert tok.encode_batch(docs) == plain.encode_batch(docs) == want
        times = turns(
            {
                'llm_lab': lambda: tok.encode_batch(docs),
                'llm_lab without tiktoken': lambda: plain.encode_batch(docs),
                'tokenizers.encode_batch': lambda: [e.ids for e in hf.encode_batch(docs)],
                'tokenizers.encode_batch_fast': lambda: [e.ids for e in hf.encode_batch_fast(docs)],
                'tiktoken batch, all cores': lambda: tt.encode_ordinary_batch(
                    docs, num_threads=os.cpu_count()
                ),
            },
            rounds,
        )
        table(f'encode {len(docs)} documents, {name}', times, size)


# ---- packing


@cache
def word(k):
    "The k-th commonest word of a made-up language"
    rnd = random.Random(k)
    return ''.join(
        rnd.choices(
            'etaoinshrdlucmfwypvbgk', weights=range(22, 0, -1), k=rnd.randint(2, 3 + len(str(k)))
        )
    )


class Made:
    "A corpus that is made while it is read, and never whole in memory"

    name = 'varied'
    licence = 'ours'
    source = 'made up by seed'
    sha256 = ''
    separator = '\n\n'
    independent = True

    def __init__(self, megabytes):
        self.splits = dict(train=None)
        self.bytes = int(megabytes * 1e6)

    def documents(self, split):
        """Tales, texts in many scripts, and sentences of a million words, common and rare as Zipf
        (1949) says; no two alike"""
        n, at = 0, 0
        while n < self.bytes:
            rnd = random.Random(at)
            if at % 4 == 0:
                block = [write_tale(f'{at}/{k}') for k in range(700)]
            elif at % 4 == 1:
                block = texts.documents(at, 150, 1500, vocabulary=20_000)
            else:
                block = [
                    ' '.join(word(int(1e6 ** rnd.random())) for _ in range(250)).capitalize()
                    + '.\n'
                    for _ in range(150)
                ]
            for d in block:
                n += len(d.encode())
                yield d
            at += 1

    def digest(self, split):
        return Corpus.digest(self, split)


def packing(megabytes, rounds, folder):
    docs = [*Made(megabytes).documents('train')]
    size = sum(len(d.encode()) for d in docs) / 1e6
    words = {w for d in docs for w in d.split()}
    print(
        f'\nto pack: {len(docs):,} documents, {len(set(docs)):,} different ones, '
        f'{len(words):,} different words'
    )
    corpus = Made(megabytes)
    corpus.documents = lambda split: docs
    tok = BPETokenizer.train(docs[::20], 8192, ['<|endoftext|>'])
    tok.save(folder / 'tok')
    hf = Tokenizer.from_file(str(folder / 'tok' / 'tokenizer.json'))
    raw, n, packed = [], [0], {}

    def ours(processes=None):
        n[0] += 1
        packed[processes] = pack(corpus, tok, folder / f'p{n[0]}', processes=processes).folder

    def theirs(way):
        raw[:] = getattr(hf, way)(docs)

    times = turns(
        {
            'llm_lab pack, to disk, hashed': ours,
            'llm_lab pack, one process': lambda: ours(1),
            'tokenizers.encode_batch': lambda: theirs('encode_batch'),
            'tokenizers.encode_batch_fast': lambda: theirs('encode_batch_fast'),
        },
        rounds,
    )
    want = np.array([i for e in raw for i in (*e.ids, tok.eos_id)], dtype=np.int32)
    for p in packed.values():
        assert (PackedTokens(p).ids.numpy() == want).all()
    table('pack', times, size, 'llm_lab pack, to disk, hashed')
    for way in ('encode_batch', 'encode_batch_fast'):
        RESULTS[f'pack_ratio_{way}'] = round(
            times[f'tokenizers.{way}'] / times['llm_lab pack, to disk, hashed'], 3
        )


# ---- memory


def memory_child(file, folder):
    "Train on a file, then pack its documents, read one by one"

    class Lines(Made):
        def documents(self, split):
            with open(file, encoding='utf-8', newline='\n') as f:
                for line in f:
                    yield line

    start = time.perf_counter()
    tok = BPETokenizer.train(Path(file), 8192, ['<|endoftext|>'])
    print('trained', time.perf_counter() - start, flush=True)
    start = time.perf_counter()
    pack(Lines(0), tok, folder)
    print('packed', time.perf_counter() - start, flush=True)


def memory(megabytes, folder):
    "Peak memory of the parent, and of the parent and its workers together, in MB"
    import psutil

    file = folder / 'large.txt'
    with open(file, 'w', encoding='utf-8', newline='\n') as f:
        for d in Made(megabytes).documents('train'):
            f.write(d.replace('\n', ' ') + '\n')
    size = file.stat().st_size / 1e6
    child = subprocess.Popen(
        [sys.executable, __file__, '--child', str(file), str(folder / 'large')],
        stdout=subprocess.PIPE,
        text=True,
    )
    peaks = dict(train_mb=0, parent_mb=0, all_mb=0)
    while child.poll() is None:
        try:
            parent = psutil.Process(child.pid)
            used, workers = parent.memory_info().rss / 1e6, 0
            for w in parent.children(recursive=True):
                try:
                    workers += w.memory_info().rss / 1e6
                except psutil.Error:
                    pass
        except psutil.Error:
            break
        if not workers and peaks['parent_mb'] == 0:
            peaks['train_mb'] = max(peaks['train_mb'], used)
        if workers:
            peaks['parent_mb'] = max(peaks['parent_mb'], used)
        peaks['all_mb'] = max(peaks['all_mb'], used + workers)
        time.sleep(0.1)
    said = dict(
        words for line in child.stdout.read().splitlines() if len(words := line.split()) == 2
    )
    assert child.wait() == 0
    print(
        f'\n{size:,.0f} MB of text: trained in {float(said["trained"]):.0f} s, packed in '
        f'{float(said["packed"]):.0f} s'
    )
    train, parent, everything = peaks.values()
    print(
        f'  memory: {train:.0f} MB while it trains, {parent:.0f} MB while it packs, '
        f'{everything:.0f} MB with its workers'
    )
    RESULTS['large'] = dict(
        text_mb=round(size),
        trained_s=round(float(said['trained']), 1),
        packed_s=round(float(said['packed']), 1),
        **{k: round(v) for k, v in peaks.items()},
    )


def main(rounds, full, megabytes, parts):
    try:
        plays = load_corpus('tiny_shakespeare')
    except LabError as e:
        print(e)
        plays = tiny_tales(3000)
    texts_of = {
        plays.name: plays.text('train') + plays.text('val'),
        'many_scripts': texts.many_scripts(),
    }
    with tempfile.TemporaryDirectory() as t:
        folder = Path(t)
        if 'train' in parts:
            training(texts_of, rounds, full)
        if 'encode' in parts:
            encoding(texts_of, rounds, folder)
        if 'pack' in parts:
            packing(32, rounds, folder)
        if 'memory' in parts and full:
            memory(megabytes, folder)
    versions = dict(tokenizers=tokenizers.__version__, tiktoken=tiktoken.__version__)
    return dict(**RESULTS, **versions, **machine())


if __name__ == '__main__':
    ap = bench.parser(__doc__, rounds=3)
    ap.add_argument(
        '--full', action='store_true', help='512 obvious merges, and 1 GB in little memory'
    )
    ap.add_argument('--megabytes', type=float, default=1000, help='of text for --full')
    ap.add_argument('--parts', default='train,encode,pack,memory', help='what to measure')
    ap.add_argument('--child', nargs=2, help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.child:
        memory_child(*a.child)
    else:
        result = main(a.rounds, a.full, a.megabytes, a.parts.split(','))
        bench.report(__file__, result, a.save)
