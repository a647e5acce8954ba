"""From a name typed to a model that takes steps: hub, corpus, sub-sample, tokenizer, packed folder,
batches.

The command runs as its own process, against the hub of `hubstub`; what it left is then read
here."""

import json
import math

import pytest
import torch
from helpers import in_a_process, printed

from llm_lab.bpe import BPETokenizer
from llm_lab.corpora import load_corpus
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.batching import BatchStream
from llm_lab.packing import PackedTokens, pack
from llm_lab.tales import tiny_tales
from llm_lab.train import batches, fit, read_split

END = '<|endoftext|>'


def prepare(home, *argv, code=0, **env):
    "What `llm-lab prepare` prints; an error is one line"
    patience = dict.fromkeys(('HF_HUB_DOWNLOAD_TIMEOUT', 'HF_HUB_ETAG_TIMEOUT'), '600')
    env = {'HF_HOME': str(home / 'hf'), 'OMP_NUM_THREADS': '1', **patience, **env}
    r = in_a_process(home, 'prepare', *argv, env=env)
    assert r.returncode == code, r.stdout + r.stderr
    assert not code or (
        r.stderr.startswith('llm-lab') and r.stderr.count('\n') == 1 and not r.stdout
    ), r.stdout + r.stderr
    return r.stderr if code else r.stdout


@pytest.fixture
def typed(home):
    "The same as `prepare`, in this process: PyTorch is there already"

    def call(*argv, code=0):
        out, err = printed('prepare', *argv, code=code)
        assert not code or not out, out + err
        return err if code else out

    return call


def back(tokens):
    "The documents that a packed split holds"
    *documents, rest = tokens.tokenizer.decode(tokens.ids.tolist()).split(END)
    assert rest == ''
    return documents


# ---- the hub


def test_from_the_hub_to_three_steps(home):
    pytest.importorskip('datasets', reason='datasets is not installed: pip install datasets')
    import hubstub

    words = 'tinystories', '--vocab-size', 512, '--limit', 40
    with hubstub.serve() as (hub, url):
        said = prepare(home, *words, HF_ENDPOINT=url)
        assert (
            'tinystories-40-seed0, licence: CDLA-Sharing-1.0' in said
            and 'packed in' in said
            and hub.log
        )
        hub.log.clear()
        assert 'already there' in prepare(home, *words, HF_ENDPOINT=url) and hub.log == [], (
            'nothing is asked twice'
        )
        assert 'already there' in prepare(
            home, *words, '--verify', HF_ENDPOINT='http://127.0.0.1:9'
        ), 'nor is a hub needed'
    folder = home / 'data' / 'packed' / 'tinystories-40-seed0-bpe512'
    corpus = load_corpus('tinystories', limit=40)
    for split in ('train', 'val', 'test'):
        stories = back(PackedTokens(folder, split))
        assert stories == list(corpus.documents(split)) and '\n\n' in stories[0], (
            'blank lines and all'
        )
    assert len(back(PackedTokens(folder))) == 40 and back(PackedTokens(folder, 'val')) == [
        hubstub.story(n) for n in range(1000, 1020)
    ]
    tokens = PackedTokens(folder)
    assert tokens.meta['tokenizer']['trained_on'] == corpus.digest('train'), (
        'the draw, and no other story'
    )
    model = MiniGPT(
        GPTConfig(
            vocab_size=tokens.tokenizer.vocab_size, max_len=32, d_model=32, n_layers=1, n_heads=2
        )
    )
    run = fit(model, BatchStream(tokens, batch_size=4, length=32), 3)
    assert run.step == 3 and run.tokens == 3 * 4 * 32 and all(map(math.isfinite, run.losses))


# one corpus by day: they differ in their layout only, which test_hub knows
@pytest.mark.parametrize('name', ['dolly', pytest.param('pg19', marks=pytest.mark.slow)])
def test_other_corpora_of_the_hub(home, name):
    pytest.importorskip('datasets', reason='datasets is not installed: pip install datasets')
    import hubstub

    with hubstub.serve() as (hub, url):
        hub.fault, hub.times = 'gone', 1
        assert f'cannot get {name} from the hub' in prepare(home, name, code=1, HF_ENDPOINT=url)
        assert not (home / 'data' / 'packed').exists()
        assert 'packed in' in prepare(home, name, '--vocab-size', 300, HF_ENDPOINT=url)
    corpus = load_corpus(name)
    for split in corpus.splits:
        assert back(PackedTokens(home / 'data' / 'packed' / f'{name}-bpe300', split)) == list(
            corpus.documents(split)
        )


# ---- texts of one's own


def test_draws_of_every_size_and_seed_have_folders_of_their_own(home):
    draws = [
        tiny_tales(300),
        *(load_corpus('tiny_tales', limit=n, seed=s) for n, s in ((100, 0), (50, 0), (100, 1))),
    ]
    packed = [pack(c, 300) for c in draws]
    assert len({p.folder for p in packed}) == 4 and all(p.built for p in packed)
    for c, p in zip(draws, packed):
        assert (
            not pack(c, 300).built
            and back(PackedTokens(p.folder)) == c.documents('train')
            and c.name in p.folder.name
        )
    assert len({p.meta['splits']['val']['sha256'] for p in packed[1:]}) == 1, (
        'one validation text for all'
    )


def test_a_running_text_comes_back_as_it_was(home, typed):
    "Blank lines of a play are text; an end mark between two speeches would be an invention"
    text = 'ANNA:\nIs it late?\n\nBEN:\n\n\nIt is.\n\n' * 40
    (home / 'play.txt').write_text(text)
    typed('play.txt', '--vocab-size', 280)
    folder = home / 'data' / 'packed' / 'play-bpe280'
    corpus = load_corpus(home / 'play.txt')
    for split in ('train', 'val'):
        tokens = PackedTokens(folder, split)
        assert tokens.tokenizer.decode(tokens.ids.tolist()) == corpus.text(split) + corpus.separator
        assert tokens.tokenizer.eos_id not in tokens.ids.tolist()


def test_every_mistake_is_one_line(home, typed):
    (home / 'a.txt').write_text('one two three. ' * 50)
    (home / 'old.txt').write_bytes(b'caf\xe9' * 99)
    for words, code, said in [
        ((), 2, 'the following arguments are required: corpus'),
        (('a.txt', '--vocab-size', 256), 2, 'give a whole number above 256'),
        (('a.txt', '--limit', 0), 2, 'give a whole number above 0'),
        (('none.txt',), 1, 'no corpus and no file'),
        (('old.txt',), 1, 'is not UTF-8'),
        (('a.txt', '--limit', 3), 1, 'one running text and cannot be drawn from'),
        (('tiny_tales', '--limit', 10**9), 1, 'ask for fewer'),
    ]:
        assert said in typed(*words, code=code), words
    assert not (home / 'data' / 'packed').exists()
    # bytes and the end mark, nothing to learn
    assert 'vocabulary' not in typed('a.txt', '--vocab-size', 257)
    # the text ends first, and that is no error
    assert '257 ids' not in typed('a.txt', '--vocab-size', 9999)
    (home / 'a.txt').write_text('another text. ' * 50)
    assert 'packed in' in typed('a.txt', '--vocab-size', 257)  # edited: beside the first one
    assert 'packed in' in typed('a.txt', '--vocab-size', 257, '--force')
    assert len([*(home / 'data' / 'packed').iterdir()]) >= 3


# ---- the same split, in memory


def test_batches_take_the_tokenizer_of_a_packed_folder(home):
    "`train` reads a split as `packing` has packed it, with one mark more at its beginning"
    tales = tiny_tales(200)
    tokens = PackedTokens(pack(tales, 400).folder)
    tok = tokens.tokenizer
    ids, starts = read_split(tales, tok, 'train')
    assert torch.equal(ids, torch.cat([torch.tensor([tok.eos_id]), tokens.ids]).long())
    assert starts.tolist() == [i for i, t in enumerate(ids[:-1].tolist()) if t == tok.eos_id]
    model = MiniGPT(GPTConfig(vocab_size=tok.vocab_size, d_model=32, n_layers=1, max_len=32))
    rows = batches(tales, tok, batch_size=8, length=32)
    assert math.isfinite(fit(model, rows, 3).losses[-1])


@pytest.mark.parametrize(
    'training', [('one two', ' three', ' four five\n'), ('a\n\n', '\n\nb', 'c')]
)
def test_no_token_lies_across_two_documents(training):
    """A tokenizer that would gladly merge a document's end with the separator and with what comes
    next"""
    from dataclasses import replace

    from llm_lab.train import read_split

    corpus = replace(
        tiny_tales(200),
        splits=dict(
            train='\n\n'.join(training) if '\n\n' not in ''.join(training) else [*training]
        ),
    )
    # no end mark: the separator does it
    bpe = BPETokenizer.train(['e two\n\n three\n\n four' * 50, 'a\n\n\n\nb\n\nc' * 50], 300)
    assert bpe.eos_id is None
    ids, starts = read_split(corpus, bpe, 'train')
    mark = bpe.encode('\n\n')
    cut = [
        bpe.decode(ids[a + 1 : b + 1 - len(mark)].tolist())
        for a, b in zip(starts, [*starts[1:].tolist(), len(ids) - 1])
    ]
    assert cut == list(corpus.documents('train')) and ids[: len(mark)].tolist() == mark
    json.dumps(cut)
