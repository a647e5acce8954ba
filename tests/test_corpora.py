"Odd cases of texts and where they come from: splits, files, folders, records, downloads, names."

import hashlib
import warnings
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from llm_lab import corpora
from llm_lab.core import LabError
from llm_lab.corpora import (
    END_OF_TEXT,
    KINDS,
    Corpus,
    Reiterable,
    assign_split,
    corpus_of,
    digest,
    fetch,
    from_path,
    hash_fraction,
    letters_of,
    load_corpus,
    read_text,
    subsample,
)


def refused(call, *words):
    "The call raises a `LabError` with these words"
    with pytest.raises(LabError) as e:
        call()
    for word in words:
        assert word in str(e.value), str(e.value)


# ---- a corpus

TOY = Corpus('toy', dict(train='one\n\ntwo', val='three'))


def test_an_iterable_is_read_again_for_each_for():
    count = Reiterable(lambda n: (str(i) for i in range(n)), 3)
    assert list(count) == list(count) == ['0', '1', '2']
    assert digest(count) == digest(['0', '1', '2'])


def test_a_split_on_demand_is_the_same_as_one_in_memory():
    splits = dict(train=Reiterable(iter, ['one', 'two']), val=['three'])
    lazy = replace(TOY, splits=splits, citation='nobody (2026)')
    for split in ('train', 'val'):
        assert list(lazy.documents(split)) == TOY.documents(split)
    assert repr(lazy) == (
        "Corpus('toy': train on demand, val 1 documents; licence: unknown; cite: nobody (2026))"
    )
    refused(lambda: TOY.text('test'), "corpus 'toy' has no split 'test': choose from train, val")
    refused(lambda: lazy.text('test'), "has no split 'test'")


def test_the_separator_of_lone_documents_is_among_the_characters():
    corpus = Corpus('two', dict(train=['a'], val=['b']), '|', independent=True)
    assert letters_of(corpus) == 'ab|'


# ---- files and folders


def test_a_file_without_text_or_that_is_not_there_is_refused(tmp_path):
    (tmp_path / 'empty.txt').write_text(' \n')
    refused(lambda: read_text(tmp_path / 'empty.txt'), 'empty.txt holds no text')
    refused(
        lambda: read_text(tmp_path / 'none.txt'),
        'none.txt: No such file or directory; check the path',
    )


def names(folder, *paths):
    "What is read of a folder with these files: {split: names}, or what is said against it"
    for p in paths:
        (folder / p).parent.mkdir(parents=True, exist_ok=True)
        (folder / p).touch()
    with warnings.catch_warnings(record=True, action='always') as notes:
        try:
            _, parts = corpora._chosen(folder)
        except LabError as e:
            return str(e).replace(str(folder), '…')
    found = {s: [f.relative_to(folder).as_posix() for f in fs] for s, fs in parts.items()}
    if notes:
        found['left'] = [str(note.message).rpartition('left out: ')[2] for note in notes]
    return found


SHARDS = [f'data/train-0000{k}-of-00002.parquet' for k in (0, 1)]


@pytest.mark.parametrize(
    ('paths', 'found'),
    [
        (['train.txt', 'val.txt', 'test.txt'], {s: [f'{s}.txt'] for s in ('test', 'train', 'val')}),
        (
            ['train/2.md', 'train/1.md', 'dev/x.md'],
            {'val': ['dev/x.md'], 'train': ['train/1.md', 'train/2.md']},
        ),
        (
            [*SHARDS, 'data/test-00000-of-00001.parquet', 'README.md'],
            {'test': ['data/test-00000-of-00001.parquet'], 'train': SHARDS},
        ),
        (['train.txt', 'notes.txt'], {'': ['notes.txt', 'train.txt']}),  # a story of a train
        (
            ['train.txt', 'test.txt', 'notes.txt'],
            {'test': ['test.txt'], 'train': ['train.txt'], 'left': ['notes.txt']},
        ),
        (['a.txt', 'a.csv', 'b.csv'], {'': ['a.txt'], 'left': ['a.csv, b.csv']}),
        (
            ['a.csv', 'b.jsonl'],
            '… holds .jsonl and .csv files: name one of them, or a folder with one kind',
        ),
    ],
)
def test_names_of_files_say_which_splits_they_are(tmp_path, paths, found):
    assert names(tmp_path, *paths) == found


@pytest.mark.parametrize(
    'paths',
    [
        ['en/train.csv', 'en/test.csv', 'de/train.csv', 'de/test.csv'],
        ['val.txt', 'test.txt'],
        ['a-train.txt', 'b-test.txt'],
    ],
)
def test_names_of_splits_that_do_not_fit_together_are_refused(tmp_path, paths):
    assert 'are named like splits' in names(tmp_path, *paths)


def test_a_folder_gives_all_its_texts(tmp_path):
    book = tmp_path / 'book'
    (book / 'part2').mkdir(parents=True)
    (book / 'b.txt').write_text('bbbbb\n')
    (book / 'a.txt').write_text('aaaaa')
    (book / 'part2' / 'c.txt').write_text('ccccccc')
    (book / 'note.pdf').write_text('not text')
    corpus = from_path(book)
    assert ''.join(corpus.splits.values()) == 'aaaaa\n\nbbbbb\n\nccccccc'
    assert [len(t) for t in corpus.splits.values()] == [18, 3]
    (book / 'c.txt').write_text(f'no line of its own: {END_OF_TEXT} is only mentioned')
    assert not from_path(book).independent
    refused(lambda: from_path(book / 'nothing'), 'cannot read')
    (tmp_path / 'bare').mkdir()
    refused(lambda: from_path(tmp_path / 'bare'), 'holds no .txt file')


def test_stories_with_marks_are_cut_between_stories(tmp_path):
    tales = [f'Story {n}.\n\nIt goes on{" and on" * n}.' for n in range(9)]
    (tmp_path / 'tales.txt').write_text(f'\n{END_OF_TEXT}\n'.join(tales) + f'\n{END_OF_TEXT}\n')
    marked = from_path(tmp_path / 'tales.txt')
    assert marked.independent and len(marked.documents('val')) == 1


def test_a_cut_that_somebody_has_made_is_kept_and_val_is_cut_from_train_only_where_it_lacks(
    tmp_path,
):
    for split, text in (('train', 'one\n' * 9), ('valid', 'two\n')):
        (tmp_path / f'{split}.txt').write_text(text)
    assert from_path(tmp_path).splits == dict(train='one\n' * 9, val='two\n')
    (tmp_path / 'test.txt').write_text('three\n')
    (tmp_path / 'valid.txt').unlink()
    assert [len(t) for t in from_path(tmp_path).splits.values()] == [32, 4, 6]


def test_a_single_line_is_cut_by_place(tmp_path):
    (tmp_path / 'line.txt').write_text('01' * 50)
    assert [len(t) for t in from_path(tmp_path / 'line.txt').splits.values()] == [90, 10]
    refused(lambda: from_path(tmp_path / 'line.txt', 'body'), "has no field 'body'")


def test_records_that_hold_no_text_are_told_with_their_line(tmp_path):
    (tmp_path / 'r.jsonl').write_text('{"text": "one", "id": 1}\n\n{"id": 2, "text": null}\n')
    (tmp_path / 'bad.jsonl').write_text('{"text": "one"}\n{"text": \n')

    def texts_of(name, field='text'):
        path = tmp_path / name
        return corpora._texts_of(corpora._ROWS[KINDS[path.suffix]](path, field), field)

    refused(
        lambda: texts_of('r.jsonl', 'id'),
        'line 1: id is 1, which is no text: name another field',
    )
    refused(lambda: texts_of('bad.jsonl'), 'line 2, is no JSON')


def test_the_share_of_a_licence_in_a_text():
    front = '*** START OF THE PROJECT GUTENBERG EBOOK X ***\n'
    end = '*** END OF THE PROJECT GUTENBERG EBOOK X ***\n'
    book = 'title\n' + front + 'a book\n'
    assert corpora._legal_share('the book goes on', front + 'a book\n') == 0.0
    assert corpora._legal_share(book) == 6 / len(book)
    assert 0.7 < corpora._legal_share('book\n' + end, front) < 0.95
    assert corpora._legal_share('no such thing', 'at all') == 0.0


# ---- downloads


@pytest.fixture
def address():
    "Where a web server on this machine answers everything with 1000 bytes"

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header('Content-Length', 1000)
            self.end_headers()
            self.wfile.write(b'x' * 1000)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Answer)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()
    server.server_close()


def test_no_more_bytes_than_expected_are_taken(home, address, monkeypatch):
    pooch = pytest.importorskip('pooch')
    monkeypatch.setattr(pooch.core.time, 'sleep', lambda seconds: None)  # between its tries
    sha = hashlib.sha256(b'x').hexdigest()
    refused(
        lambda: fetch('long.txt', address, sha, 100),
        'cannot download long.txt: the server sends more than the 100 bytes',
    )
    assert [*(home / 'data').iterdir()] == []  # nothing half-written, no rubbish


def test_a_kept_file_with_a_wrong_hash_is_refused(home):
    (home / 'data').mkdir()
    (home / 'data' / 'hamlet.txt').write_bytes(b'To be, or not to bee')
    sha = hashlib.sha256(b'To be, or not to be').hexdigest()
    refused(
        lambda: fetch('hamlet.txt', 'http://nowhere.invalid', sha, 100),
        'delete it to have it fetched again',
    )


# ---- splits by hash, draws

TEXTS = [f'story {n}' for n in range(20_000)]
MANY = Corpus('many', dict(train=TEXTS, val=['v']), sha256='x', independent=True)


def test_shares_of_a_split_are_those_that_are_wanted():
    sides = Counter(assign_split(t, dict(val=0.05, test=0.01)) for t in TEXTS)
    # four standard deviations
    assert abs(sides['val'] - 1000) < 4 * 31 and abs(sides['test'] - 200) < 4 * 15
    assert assign_split('story 1', dict(test=1.0)) == 'test'
    assert assign_split('story 1', {}) == 'train'
    assert f'{hash_fraction("story 1"):.6f}' == '0.790035'  # the same tomorrow
    assert f'{hash_fraction("story 1", seed=1):.6f}' == '0.838969'


def test_a_draw_is_a_corpus_of_its_own():
    joined = replace(MANY, splits=dict(MANY.splits, train=MANY.separator.join(TEXTS)))
    assert subsample(joined, 100).digest('train') == subsample(MANY, 100).digest('train')
    draws = MANY, subsample(MANY, 9), subsample(MANY, 8), subsample(MANY, 9, 1)
    assert [c.name for c in draws] == ['many', 'many-9-seed0', 'many-8-seed0', 'many-9-seed1']
    assert len({c.sha256 for c in draws}) == 4


def test_a_draw_that_cannot_be_made_is_refused(tmp_path):
    refused(
        lambda: subsample(MANY, 20_001),
        '20,000 training documents, limit=20,001: ask for fewer',
    )
    refused(lambda: subsample(MANY, 0), 'limit=0 should be a whole number')
    (tmp_path / 'win.txt').write_text('one\ntwo\n')
    refused(
        lambda: load_corpus(tmp_path / 'win.txt', limit=1),
        'one running text and cannot be drawn from',
    )


# ---- names and paths


def test_a_text_is_used_again_only_where_its_hash_is_known(tmp_path):
    (tmp_path / 'own.txt').write_text('To be or not to be.\n' * 50)
    for sha in (None, '0' * 64):
        refused(
            lambda: corpus_of(dict(data=str(tmp_path / 'own.txt'), corpus_sha256=sha)),
            'is not the text that this model was trained on',
        )


@pytest.mark.parametrize('wrong', ['no/such.txt', '', 'x' * 999])
def test_what_leads_nowhere_is_answered_with_what_there_is(wrong):
    names = 'tiny_tales, tale_stories, tale_questions, tale_states, tale_drills, tinystories, dolly'
    refused(lambda: load_corpus(wrong), f'{names}, pg19, or give a path')


def test_a_path_loads_and_a_corpus_of_ours_is_not_streamed(tmp_path):
    (tmp_path / 'win.txt').write_text('one\ntwo\n')
    assert load_corpus(tmp_path / 'win.txt').text('train') == 'one\ntwo'[:7]
    refused(lambda: load_corpus('tiny_tales', stream=True), 'does not come from the hub')
