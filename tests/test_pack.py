"""Packing seen from outside: many orders, many kinds of damage, killed builders, two builders at
once, memory.

`LLM_LAB_EXAMPLES=20000` asks hypothesis for so many examples; `make nightly` does (see
cases.py)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import ALL, EXAMPLES, HANG, some
from helpers import tree

from llm_lab import packing as P
from llm_lab.bpe import BPETokenizer
from llm_lab.chars import CharTokenizer
from llm_lab.corpora import Corpus
from llm_lab.core import LabError
from llm_lab.batching import BatchStream, permuted_index
from llm_lab.packing import PackedTokens, pack
from llm_lab.tales import tiny_tales

hypothesis = pytest.importorskip('hypothesis')
from hypothesis import HealthCheck, given, settings, strategies as st

many = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
posix = pytest.mark.skipif(os.name == 'nt', reason='needs signals')


@pytest.fixture(scope='module')
def tales():
    return tiny_tales(300)


@pytest.fixture(scope='module')
def whole(tales, tmp_path_factory):
    "A packed folder; copy it before you hurt it"
    return pack(tales, 400, tmp_path_factory.mktemp('whole') / 'tales').folder


# ---- the order


def test_every_n_up_to_300_is_read_once_an_epoch():
    for n in some(range(1, 301)):
        order = permuted_index(np.arange(3 * n), n, seed=n).reshape(3, n)
        assert (np.sort(order, 1) == np.arange(n)).all(), n


@many
@given(
    n=st.integers(1, 2**40), seed=st.integers(), at=st.integers(0, 2**20), size=st.integers(1, 400)
)
def test_the_order_is_one_to_one_anywhere(n, seed, at, size):
    places = np.arange(at, at + size)
    blocks = permuted_index(places, n, seed)
    assert blocks.min() >= 0 and blocks.max() < n
    epochs = places // n
    # within an epoch, no block comes twice
    assert len({*zip(epochs.tolist(), blocks.tolist())}) == size
    k = size // 2
    assert permuted_index(at + k, n, seed) == blocks[k]  # each place alone says the same


def test_seeds_and_epochs_differ():
    one, two = permuted_index(np.arange(2000), 1000, seed=0).reshape(2, 1000)
    assert (one == two).mean() < 0.02 and (
        one == permuted_index(np.arange(1000), 1000, seed=1)
    ).mean() < 0.02


@pytest.mark.parametrize('n', some([3, 5, 16, 100]))
def test_every_block_is_equally_likely_at_every_place(n):
    epochs = 400 * n
    seen = permuted_index(np.arange(epochs * n), n, seed=7).reshape(epochs, n)
    counts = np.stack([np.bincount(seen[:, k], minlength=n) for k in range(n)])  # (place, block)
    chi2, free = ((counts - 400) ** 2 / 400).sum(), (n - 1) ** 2
    assert abs(chi2 - free) < 5 * (2 * free) ** 0.5, (chi2, free)


@pytest.mark.parametrize('n', [64, 1000])
def test_neighbours_in_the_order_are_no_neighbours_in_the_text(n):
    jumps = np.diff(permuted_index(np.arange(500 * n), n, seed=3).reshape(500, n), axis=1) % n
    counts = np.bincount(jumps.ravel(), minlength=n)[1:]
    expected = counts.sum() / (n - 1)
    assert ((counts - expected) ** 2 / expected).sum() < n + 6 * (2 * n) ** 0.5


# ---- the stream


@many
@given(
    n=st.integers(2, 400),
    T=st.integers(1, 50),
    B=st.integers(1, 12),
    steps=st.integers(1, 30),
    seed=st.integers(0, 9),
)
def test_the_stream_reads_each_block_once_an_epoch(n, T, B, steps, seed):
    if n <= T:
        return
    ids = torch.arange(n, dtype=torch.int32)
    s = BatchStream(ids, B, T, seed)
    rows = torch.cat([next(s) for _ in range(steps)])
    assert rows.shape == (steps * B, T + 1) and rows.dtype == torch.int64
    assert (rows == (rows[:, :1] + torch.arange(T + 1)) % n).all()  # pieces of the ring
    N = n // T
    for k in range(0, len(rows) - N + 1, N):
        asked = rows[k : k + N, 1:].flatten().tolist()
        assert len({*asked}) == len(asked) == N * T > n - T  # none twice, fewer than T left over
        assert len({*((rows[k : k + N, 0] - rows[k, 0]) % n).tolist()}) == N  # one cut for an epoch
    assert (BatchStream(ids, B, T, seed).batch(steps - 1) == rows[-B:]).all()  # any step, at once


@many
@given(world=st.integers(1, 6), then=st.integers(1, 6), stop=st.integers(0, 400), B=st.just(60))
def test_another_world_goes_on_with_the_same_rows(world, then, stop, B):
    ids = torch.arange(5000, dtype=torch.int32)
    one = BatchStream(ids, B, 7)
    rank = BatchStream(ids, B, 7, rank=world - 1, world_size=world)
    rank.step = stop
    state = json.loads(json.dumps(rank.state_dict()))
    ranks = [BatchStream(ids, B, 7, rank=r, world_size=then) for r in range(then)]
    for r in ranks:
        r.load_state_dict(state)
    assert (torch.stack([next(r) for r in ranks], 1).flatten(0, 1) == one(stop)).all()


def test_a_long_run_back_and_forth_is_the_same_as_steps_alone():
    ids = torch.arange(3000, dtype=torch.int32)
    s = BatchStream(ids, 12, 8)
    for step in (0, 340, 341, 342, 5, 1000, 682, 681, 0):
        assert (s(step) == BatchStream(ids, 12, 8)(step)).all(), step
    # 64 epochs, over many borders of what is worked out ahead
    begins = torch.cat([next(s)[:, 0] for _ in range(2000)]).tolist()
    N = 3000 // 8
    for k in range(0, len(begins) - N + 1, N):
        assert len({(b + j) % 3000 for b in begins[k : k + N] for j in range(8)}) == N * 8


def test_memory_does_not_grow_with_the_text():
    import tracemalloc

    peaks = []
    for n in (10**5, 10**8):
        s = BatchStream(torch.zeros(1, dtype=torch.int32).expand(n), 12, 64)
        tracemalloc.start()
        for _ in range(400):
            next(s)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 100_000, peaks


def test_a_position_elsewhere_is_refused_with_both_sides(whole):
    state = BatchStream(PackedTokens(whole), 4, 16).state_dict()
    with pytest.raises(
        LabError, match="tokens of the saved position is [0-9a-f]+, this stream's [0-9a-f]+"
    ):
        BatchStream(PackedTokens(whole, 'val'), 4, 16).load_state_dict(state)
    for wrong in ({}, {**state, 'step': 1.5}, {**state, 'step': None}):
        with pytest.raises(LabError):
            BatchStream(PackedTokens(whole), 4, 16).load_state_dict(wrong)


# ---- damage: no wrong byte is used


@many
@given(
    at=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
    split=st.sampled_from(['train', 'val', 'test']),
)
def test_one_flipped_bit_is_seen(whole, tmp_path_factory, at, bit, split):
    folder = tmp_path_factory.getbasetemp() / 'flip'
    if not folder.exists():
        shutil.copytree(whole, folder)
    good = (whole / f'{split}.bin').read_bytes()
    bad = bytearray(good)
    bad[int(at * len(bad))] ^= 1 << bit
    (folder / f'{split}.bin').write_bytes(bad)
    with pytest.raises(LabError, match='SHA-256 of'):
        PackedTokens(folder, split)
    (folder / f'{split}.bin').write_bytes(good)
    PackedTokens(folder, split)


@many
@given(cut=st.integers(1, 400), more=st.booleans())
def test_a_file_of_another_length_is_seen_without_reading_it(whole, tmp_path_factory, cut, more):
    folder = tmp_path_factory.getbasetemp() / 'cut'
    if not folder.exists():
        shutil.copytree(whole, folder)
    good = (whole / 'train.bin').read_bytes()
    (folder / 'train.bin').write_bytes(good + bytes(4 * cut) if more else good[: -4 * cut])
    with pytest.raises(LabError, match=f'is [0-9,]+, meta.json says {len(good):,}'):
        PackedTokens(folder, verify=False)


@many
@given(at=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_a_changed_byte_in_meta_json_is_seen_or_changes_nothing(whole, tmp_path_factory, at, byte):
    folder = tmp_path_factory.getbasetemp() / 'meta'
    if not folder.exists():
        shutil.copytree(whole, folder)
    good = (whole / 'meta.json').read_bytes()
    bad = bytearray(good)
    bad[int(at * len(bad))] = byte
    (folder / 'meta.json').write_bytes(bad)
    try:
        meta = PackedTokens(folder).meta
    except LabError:
        return
    assert meta == json.loads(good)  # white space


def reseal(folder, **more):
    meta = {**json.loads((folder / 'meta.json').read_text()), **more}
    (folder / 'meta.json').write_text(json.dumps({**meta, 'sha256': P._seal(meta)}))


@pytest.mark.parametrize(
    'kind, words',
    [
        ('gone', 'train.bin: No such file'),
        ('meta gone', 'cannot read'),
        ('meta empty', 'it is damaged'),
        ('meta list', 'it is damaged|format'),
        ('dtype', "dtype in .* is int16, this library reads int32"),
        ('format', 'format in .* is 99, this library reads 1'),
        ('seal', 'sha256 in .*, the rest of it gives'),
        ('tokenizer', 'SHA-256 of .*tokenizer.json'),
        ('no tokenizer', 'tokenizer.json: No such'),
        ('swapped', 'the size of|SHA-256 of'),
        ('id', 'holds the id 400, its tokenizer has 400 ids'),
        ('negative', 'holds the id 4,294,967,295'),
    ],
)
def test_damage(whole, tmp_path, tales, kind, words):
    folder = tmp_path / 'f'
    shutil.copytree(whole, folder)
    train = folder / 'train.bin'
    meta = folder / 'meta.json'
    tok = folder / 'tokenizer' / 'tokenizer.json'
    if kind == 'gone':
        train.unlink()
    if kind == 'meta gone':
        meta.unlink()
    if kind == 'meta empty':
        meta.write_text('')
    if kind == 'meta list':
        meta.write_text('[1]')
    if kind == 'dtype':
        reseal(folder, dtype='int16')
    if kind == 'format':
        reseal(folder, format=99)
    if kind == 'seal':
        meta.write_text(meta.read_text().replace('"tiny_tales"', '"tiny_tails"'))
    if kind == 'tokenizer':
        tok.write_text(tok.read_text().replace('"e"', '"E"', 1))
    if kind == 'no tokenizer':
        tok.unlink()
    if kind in ('id', 'negative'):
        data = train.read_bytes()[:-4] + (400 if kind == 'id' else 2**32 - 1).to_bytes(4, 'little')
        train.write_bytes(data)
        files = {
            **json.loads(meta.read_text())['files'],
            'train.bin': dict(size=len(data), sha256=P._sha(data)),
        }
        reseal(folder, files=files)
    if kind == 'swapped':
        (folder / 'val.bin').replace(train)
    before = tree(folder)
    with pytest.raises(LabError, match=words):
        PackedTokens(folder)
    with pytest.raises(LabError):
        pack(tales, 400, folder, verify=True)  # nothing is rebuilt unasked
    assert before == tree(folder)
    if kind == 'no tokenizer':
        return
    again = pack(tales, 400, folder, force=True)
    assert again.built and again.meta == json.loads((whole / 'meta.json').read_text())
    PackedTokens(folder)


def test_a_valid_folder_is_never_rebuilt(whole, tales, monkeypatch):
    stamps = {f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in whole.rglob('*')}
    monkeypatch.setattr(P, '_build', None)
    for kw in ({}, dict(verify=True), dict(processes=7)):
        assert not pack(tales, 400, whole, **kw).built
    tok = BPETokenizer.load(whole / 'tokenizer')
    assert not pack(tales, tok, whole).built  # the same tokenizer, given
    assert {f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in whole.rglob('*')} == stamps


@pytest.mark.parametrize(
    'corpus, tokenizer, words',
    [
        (tiny_tales(299), 400, 'train of tiny_tales in .*, train of tiny_tales'),
        (None, 401, 'tokenizer asked in .* is 400, asked for 401'),
        (None, 'chars', 'tokenizer sha256 in'),
        ('less', 400, 'test of tiny_tales'),
    ],
)
def test_another_corpus_or_tokenizer_is_refused(whole, tales, corpus, tokenizer, words):
    if tokenizer == 'chars':
        tokenizer = CharTokenizer.train(tales.text('train'))
    if corpus == 'less':
        corpus = Corpus(
            'tiny_tales', {s: tales.splits[s] for s in ('train', 'val')}, tales.separator
        )
    for kw in ({}, dict(verify=True)):
        with pytest.raises(LabError, match=words):
            pack(corpus or tales, tokenizer, whole, **kw)


@pytest.mark.parametrize(
    'files',
    [
        ['thesis.tex'],
        ['meta.json'],
        ['train.bin', 'val.bin', 'meta.pkl'],
        ['train.bin', 'val.bin'],
        ['tokenizer/tokenizer.json', 'tokenizer/notes.txt'],
        None,
    ],
)
def test_what_packing_did_not_write_is_never_touched(tmp_path, tales, files):
    place = tmp_path / 'mine'
    if files is None:
        place.write_text('a file')
    else:
        for f in files:
            (place / f).parent.mkdir(parents=True, exist_ok=True)
            (place / f).write_text('{"years": "of work"}')
    before = tree(tmp_path)
    for force in (False, True):
        with pytest.raises(LabError):
            pack(tales, 400, place, force=force)
    assert before.items() <= tree(tmp_path).items()
    assert {f.name for f in tmp_path.iterdir()} <= {'mine', '.mine.lock'}


def test_a_link_to_another_disk_stays_a_link(tmp_path, tales):
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'here').symlink_to(tmp_path / 'disk')
    for _ in range(2):
        pack(tales, 300, tmp_path / 'here', force=True)
    assert (tmp_path / 'here').is_symlink() and (tmp_path / 'disk' / 'train.bin').exists()


# ---- what is packed

documents = st.lists(
    st.text(st.characters(exclude_categories=['Cs']), max_size=60) | st.just('<|endoftext|>'),
    min_size=1,
    max_size=12,
)


@many
@given(train=documents, val=documents, piece=st.integers(1, 50))
def test_any_documents_come_back(whole, train, val, piece):
    "Of any text, cut anywhere into pieces, with end marks spelled out in it"
    tok = BPETokenizer.load(whole / 'tokenizer')
    for docs in (train, val):
        pieces = [docs[i : i + piece] for i in range(0, len(docs), piece)]
        ids = np.concatenate([*P._encode(pieces, whole / 'tokenizer', [tok.eos_id], 1)])
        borders = np.flatnonzero(ids == tok.eos_id)
        assert len(borders) == len(docs)
        assert [tok.decode(part[:-1]) for part in np.split(ids, borders + 1)[:-1]] == docs


def test_the_number_of_workers_changes_nothing(whole, tales, tmp_path, monkeypatch):
    monkeypatch.setattr(P, 'PIECE', 700)
    for n in (1, 2, 5):
        pack(tales, 400, tmp_path / f'{n}', processes=n)
        for f in ('train.bin', 'val.bin', 'meta.json', 'tokenizer/tokenizer.json'):
            assert (tmp_path / f'{n}' / f).read_bytes() == (whole / f).read_bytes(), (n, f)


def test_few_pieces_are_on_their_way_at_a_time(whole, tales):
    "A reader that is slow must not fill the memory"
    asked = []

    def pieces():
        for d in tales.documents('train')[:40]:
            asked.append(d)
            yield [d]

    for done, _ in enumerate(P._encode(pieces(), whole / 'tokenizer', [0], 2)):
        assert len(asked) - done <= 2 * 2 + 1
    assert done == 39


def test_a_document_that_cannot_be_encoded_ends_it_in_one_line(tmp_path):
    CharTokenizer('ab').save(tmp_path)
    with pytest.raises(LabError, match="the character 'c' at place 1"):
        [*P._encode([['ab']] * 20 + [['bc']] + [['ab']] * 20, tmp_path, [0], 2)]


def test_an_empty_split_and_a_broken_name(tmp_path, monkeypatch):
    monkeypatch.setenv('LLM_LAB_HOME', str(tmp_path))
    corpus = Corpus('../my: tëxt', dict(train='one two\n\none two three', val=''))
    r = pack(corpus, 260)
    assert r.folder.parent == tmp_path / 'data' / 'packed'
    assert len(PackedTokens(r.folder, 'val')) == r.meta['splits']['val']['tokens']
    with pytest.raises(LabError, match='has no split .nothing.: choose from train, val'):
        PackedTokens(r.folder, 'nothing')
    assert len(PackedTokens(r.folder / 'val.bin')) == len(PackedTokens(r.folder, 'val'))


def test_a_text_that_changes_while_it_is_read(tmp_path):
    class Moving:
        name = 'moving'
        licence = ''
        source = ''
        sha256 = ''
        separator = '\n\n'
        splits = {'train': None}
        reads, independent, marks = 0, False, ()

        def documents(self, split):
            self.reads += 1
            return ['the cat', 'sat'] if self.reads < 2 else ['the cat', 'sits']

        def digest(self, split):
            return Corpus.digest(self, split)

    with pytest.raises(LabError, match='train of moving is [0-9a-f]+, a minute ago [0-9a-f]+'):
        pack(Moving(), CharTokenizer('abcdefghijklmnopqrstuvwxyz \n'), tmp_path / 'm')
    assert not (tmp_path / 'm').exists()


def test_an_opened_file_is_not_copied_and_not_changed(whole):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter('error')
        tokens = PackedTokens(whole)
    before = (whole / 'train.bin').read_bytes()
    assert tokens.ids.dtype == torch.int32 and len(tokens) * 4 == len(before)
    tokens.ids[:50] = 1
    assert (whole / 'train.bin').read_bytes() == before and not (
        PackedTokens(whole).ids[:50] == 1
    ).all()


# ---- processes

BUILD = """
import sys
import time
from pathlib import Path

from llm_lab import packing as P
from llm_lab.corpora import Corpus

P.PIECE = 2000
text = '\\n\\n'.join(
    f'story {n}: the cat number {n} sat on mat {n * n} and slept.'
    for n in range(int(sys.argv[2]))
)
corpus = Corpus('story', dict(train=text, val='the cat sat on the mat'))
r = P.pack(corpus, 400, sys.argv[1], processes=2)
print('built' if r.built else 'read', r.meta['sha256'], flush=True)
"""


ENDLESS = """
class Slow(Corpus):
    "Its training text never comes to an end: whoever packs it is in the middle of it"

    def documents(self, split):
        yield from super().documents(split)
        if split != 'train':
            return
        beside = Path(sys.argv[1]).parent
        packed = [*beside.glob('.f.*.new/tokenizer/tokenizer.json')]
        while packed:
            time.sleep(0.01)
            yield 'the cat sat on the mat'


corpus = Slow('story', dict(train=text, val='the cat sat on the mat'))
r = """


def build(tmp_path, folder, n=3000, endless=False, **kw):
    "A script without `if __name__ == '__main__'`"
    script = tmp_path / 'script.py'
    script.write_text(BUILD.replace('r = ', ENDLESS.lstrip()) if endless else BUILD)
    env = {**os.environ, 'PYTHONPATH': str(Path(P.__file__).parent.parent)}
    return subprocess.Popen(
        [sys.executable, str(script), str(folder), str(n)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        cwd=tmp_path,
        **kw,
    )


def workers_of(pid):
    psutil = pytest.importorskip('psutil')
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def test_a_plain_script_may_pack(tmp_path):
    p = build(tmp_path, tmp_path / 'f')
    out, err = p.communicate(timeout=HANG)
    assert p.returncode == 0 and 'built' in out and err == '', err
    assert sorted(f.name for f in tmp_path.iterdir()) == ['.f.lock', 'f', 'script.py']


def test_of_many_builders_one_builds(tmp_path):
    crowd = [build(tmp_path, tmp_path / 'f', 20_000) for _ in range(4 if ALL else 3)]
    said = [p.communicate(timeout=HANG) for p in crowd]
    assert [p.returncode for p in crowd] == [0] * len(crowd), said
    last = [out.splitlines()[-1].split() for out, _ in said]
    assert (
        sorted(w for w, _ in last) == ['built', *['read'] * (len(crowd) - 1)]
        and len({h for _, h in last}) == 1
    )
    assert any('waiting for it' in out for out, _ in said)


@posix
@pytest.mark.parametrize('who', ['builder', 'worker'])
def test_a_kill_leaves_no_folder(tmp_path, who):
    p = build(tmp_path, tmp_path / 'f', endless=True)
    while not list(tmp_path.glob('.f.*.new/train.bin')) or len(workers_of(p.pid)) < 2:
        assert p.poll() is None, p.communicate()
        time.sleep(0.01)
    team = workers_of(p.pid)
    (p if who == 'builder' else team[0]).send_signal(signal.SIGKILL)
    out, err = p.communicate(timeout=HANG)
    assert not (tmp_path / 'f').exists()
    if who == 'builder':
        assert p.returncode == -9 and list(tmp_path.glob('.f.*.new'))
        until = time.monotonic() + HANG
        while any(w.is_running() and w.status() != 'zombie' for w in team):
            assert time.monotonic() < until, 'workers live on'
            time.sleep(0.05)
    else:
        assert (
            p.returncode == 1
            and 'a worker ended with code -9' in err
            and not list(tmp_path.glob('.f.*.new'))
        ), err
    out, err = build(tmp_path, tmp_path / 'f', 3000).communicate(timeout=HANG)
    assert 'built' in out, err
    # and the remains are swept away
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        '.f.lock',
        'f',
        'script.py',
    ]


def test_ctrl_c_while_workers_start_ends_those_that_have_started(whole, monkeypatch):
    started, popen = [], P.Popen

    def interrupted(*args, **kw):
        if started:
            raise KeyboardInterrupt
        started.append(popen(*args, **kw))
        return started[0]

    monkeypatch.setattr(P, 'Popen', interrupted)
    with pytest.raises(KeyboardInterrupt), P._workers(whole / 'tokenizer', [0], 2):
        pass
    assert started[0].returncode not in (None, 0)


def test_a_worker_whose_folder_is_gone_ends_without_noise(tmp_path, capfd):
    with (
        P._workers(tmp_path / 'gone', [0], 1) as ask,
        pytest.raises(LabError, match='a worker ended with code'),
    ):
        ask(['the cat']).result()
    assert capfd.readouterr() == ('', '')


@posix
def test_ctrl_c_leaves_no_folder_and_no_noise_from_workers(tmp_path):
    p = build(tmp_path, tmp_path / 'f', endless=True, start_new_session=True)
    # Ctrl-C in the terminal does not reach the workers: each has a session of its own
    while len([w for w in workers_of(p.pid) if os.getsid(w.pid) == w.pid]) < 2:
        time.sleep(0.01)
        assert p.poll() is None
    while not list(tmp_path.glob('.f.*.new/train.bin')):
        time.sleep(0.01)
        assert p.poll() is None
    os.killpg(p.pid, signal.SIGINT)  # as a terminal does it
    out, err = p.communicate(timeout=HANG)
    assert (
        p.returncode != 0
        and err.count('Traceback') == 1
        and err.strip().endswith('KeyboardInterrupt')
    ), err
    assert sorted(f.name for f in tmp_path.iterdir()) == ['.f.lock', 'script.py']


def test_the_command(tmp_path):
    env = {**os.environ, 'LLM_LAB_HOME': str(tmp_path)}
    (tmp_path / 'poem.txt').write_text(
        'the cat sat on the mat.\n\nthe dog sat on the log.\n\n' * 50
    )

    def prepare(*argv):
        call = [sys.executable, '-m', 'llm_lab.cli', 'prepare', *argv]
        return subprocess.run(call, env=env, cwd=tmp_path, capture_output=True, text=True)

    r = prepare('poem.txt', '--vocab-size', '270')
    assert (
        r.returncode == 0 and 'packed in' in r.stdout and 'trained on its train split' in r.stdout
    ), r.stderr
    assert 'already there' in prepare('poem.txt', '--vocab-size', '270', '--verify').stdout
    folder = tmp_path / 'data' / 'packed' / 'poem-bpe270'
    (folder / 'train.bin').write_bytes((folder / 'train.bin').read_bytes()[:-4])
    r = prepare('poem.txt', '--vocab-size', '270')
    assert r.returncode == 1 and r.stderr.count('\n') == 1 and 'meta.json says' in r.stderr, (
        r.stderr
    )
    assert 'packed in' in prepare('poem.txt', '--vocab-size', '270', '--force').stdout
    assert (
        prepare('poem.txt', '--vocab-size', '9').returncode == 2
        and prepare('poem.txt', '--limit', 'x').returncode == 2
    )


@posix
@pytest.mark.slow
def test_memory_stays_small_for_a_big_text(tmp_path):
    "200 MB, master and workers together; what is in flight does not depend on the size of the text"
    code = (
        BUILD.replace('P.PIECE = 2000', '')
        .replace('text = ', 'text = 0 and ')
        .replace(
            "corpus = Corpus('story', dict(train=text, val='the cat sat on the mat'))",
            """
class Stories:
    def __iter__(self):
        for n in range(int(sys.argv[2])):
            yield f'story {n}: the cat number {n} sat on mat {n * n} and slept. ' * 20


class Big(Corpus):
    def documents(self, split):
        return Stories() if split == 'train' else ['the cat']


corpus = Big('big', dict(train='', val='the cat'))""",
        )
        .replace('400,', "__import__('llm_lab.chars').chars.load_tokenizer(sys.argv[3]),")
    )
    letters = CharTokenizer('abcdefghijklmnopqrstuvwxyz0123456789:. \n')
    letters.save(tmp_path / 'letters')
    (tmp_path / 'big.py').write_text(code)
    psutil = pytest.importorskip('psutil')
    p = subprocess.Popen(
        [
            sys.executable,
            str(tmp_path / 'big.py'),
            str(tmp_path / 'f'),
            '180000',
            str(tmp_path / 'letters'),
        ],
        env={**os.environ, 'PYTHONPATH': str(Path(P.__file__).parent.parent)},
    )
    peak = 0
    while p.poll() is None:
        try:
            peak = max(
                peak, sum(q.memory_info().rss for q in [psutil.Process(p.pid), *workers_of(p.pid)])
            )
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.05)
    assert p.returncode == 0 and peak < 500e6, f'{peak / 1e6:.0f} MB'
