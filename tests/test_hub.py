"""Corpora from the Hugging Face hub: the real client libraries against a hub on this machine, in
order and out of order."""

import json
import os
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

pytest.importorskip('datasets', reason='datasets is not installed: pip install datasets')
import datasets
import hubstub
import huggingface_hub as hf
from cases import HANG

from llm_lab import hubdata
from llm_lab.corpora import END_OF_TEXT, digest, from_path, load_corpus
from llm_lab.hubdata import dolly
from llm_lab.core import LabError

NAMES = 'tinystories', 'dolly', 'pg19'


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A hub that the client libraries take for the real one"
    with hubstub.serve() as (hub, url):
        monkeypatch.setattr(hf.constants, 'ENDPOINT', url)
        monkeypatch.setattr(
            hf.constants,
            'HUGGINGFACE_CO_URL_TEMPLATE',
            url + '/{repo_id}/resolve/{revision}/{filename}',
        )
        monkeypatch.setattr(hf.constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
        monkeypatch.setattr(datasets.config, 'HF_ENDPOINT', url)

        def patience(seconds):
            "How long the client waits for an answer"
            for name in ('HF_HUB_DOWNLOAD_TIMEOUT', 'HF_HUB_ETAG_TIMEOUT'):
                monkeypatch.setattr(hf.constants, name, seconds)

        hub.patience = patience
        patience(HANG)  # a busy machine is no fault; 'slow' sets less
        monkeypatch.setattr(datasets.config, 'STREAMING_READ_MAX_RETRIES', 2)
        # the libraries wait between their tries
        monkeypatch.setattr(time, 'sleep', lambda seconds: None)
        monkeypatch.setenv('LLM_LAB_HOME', str(tmp_path / 'home'))
        monkeypatch.delenv('LLM_LAB_DATA', raising=False)
        hf.HfFileSystem.clear_instance_cache()
        yield hub


def kept(tmp_path, name):
    "The files under home()/data/name, without hub.json"
    root = tmp_path / 'home' / 'data' / name
    return sorted(
        str(p.relative_to(root))
        for p in root.rglob('*')
        if p.is_file() and p.name != 'hub.json' and '.part' not in p.parts
    )


def contents(corpus):
    return {s: list(corpus.documents(s)) for s in corpus.splits}


# ---- what comes


@pytest.mark.parametrize('name', NAMES)
def test_whole_and_streamed_are_one_corpus(hub, tmp_path, name):
    streamed = load_corpus(name, stream=True)
    told = contents(streamed)
    assert kept(tmp_path, name) == [], 'a stream keeps nothing'
    whole = load_corpus(name)
    assert contents(whole) == told and contents(whole) == told, 'twice the same'
    assert (
        whole.sha256 == streamed.sha256
        and whole.source == streamed.source
        and hubstub.COMMIT in whole.source
    )
    assert {s: whole.digest(s) for s in whole.splits} == {s: digest(d) for s, d in told.items()}
    assert list(told) == ['train', 'val', 'test'] and all(told.values())
    assert (
        whole.independent
        and whole.separator.strip() == END_OF_TEXT
        and whole.text('val').split(whole.separator) == told['val']
    )


def test_stories_are_whole_and_the_publishers_validation_is_ours(hub):
    told = contents(load_corpus('tinystories'))
    assert told['val'] == [hubstub.story(n) for n in range(1000, 1020)] and '\n\n' in told['val'][0]
    mine = [hubstub.story(n) for n in range(600)] + ['Two in one.', 'Here is the other.']
    assert sorted(told['train'] + told['test']) == sorted([*mine, mine[3]]), (
        'split at the mark, the empty one dropped'
    )
    assert not set(told['train']) & set(told['test']), 'two copies of a story are on one side'
    order = [mine.index(t) for t in told['train']]
    assert order[:-1] == sorted(order[:-1]), "in the publisher's order"


def test_the_cut_does_not_move_when_the_publisher_does(hub, tmp_path):
    corpus = load_corpus('tinystories')
    before = contents(corpus)
    data = hub.files['roneneldan/TinyStories']
    path = min(p for p in data if 'train-00000' in p)
    data[path] = hubstub.parquet([dict(text=hubstub.story(n)) for n in reversed(range(10, 300))])
    assert contents(load_corpus('tinystories')) == before, 'what was fetched stays'
    (tmp_path / 'home' / 'data' / 'tinystories' / 'hub.json').unlink()
    with pytest.raises(LabError, match='delete it to have it fetched again'):
        load_corpus('tinystories')
    (tmp_path / 'home' / 'data' / 'tinystories' / path).unlink()
    moved = load_corpus('tinystories')
    after = contents(moved)
    assert moved.sha256 != corpus.sha256, 'other data, another hash'
    assert len(after['train']) < len(before['train']) and not set(after['train']) & set(
        before['test']
    )


def test_dolly_and_its_records(hub):
    corpus = load_corpus('dolly')
    told = contents(corpus)
    assert sorted(sum(told.values(), [])) == sorted(dolly.text(hubstub.ask(n)) for n in range(400))
    assert 8 < len(told['val']) < 36 and 8 < len(told['test']) < 36
    for stream in (False, True):
        records = list(dolly.records('val', stream=stream))
        assert [dolly.text(r) for r in records] == told['val'] and set(records[0]) == {
            'instruction',
            'context',
            'response',
            'category',
        }
    assert 'What is 1?\n\nA number.\n\nIt is 1.\n\nIt is 1.' in sum(told.values(), [])


def test_pg19_has_the_publishers_three_parts_and_plain_line_ends(hub):
    told = contents(load_corpus('pg19'))
    assert [len(told[s]) for s in ('train', 'val', 'test')] == [20, 2, 3]
    assert told['test'][0] == hubstub.book(60).replace('\r\n', '\n')


@pytest.mark.parametrize('name', NAMES)
def test_licence_and_citation_are_shown_and_nothing_is_read_for_it(hub, name):
    corpus = load_corpus(name, stream=True)
    asked = len(hub.log)
    shown = repr(corpus)
    assert (
        corpus.licence in shown
        and corpus.citation in shown
        and '\n' not in shown
        and len(hub.log) == asked
    )


def test_draws_are_nested_seeded_and_the_same_in_a_stream(hub):
    small, large = (load_corpus('tinystories', limit=n) for n in (5, 50))
    other = load_corpus('tinystories', limit=5, seed=1)
    stream = load_corpus('tinystories', limit=5, stream=True)
    assert len(small.documents('train')) == 5 and set(small.documents('train')) < set(
        large.documents('train')
    )
    assert small.documents('train') == stream.documents('train') != other.documents('train')
    whole = list(load_corpus('tinystories').documents('train'))
    assert large.documents('train') == [t for t in whole if t in large.documents('train')], (
        'in their old order'
    )
    assert (
        small.digest('test') == other.digest('test') == load_corpus('tinystories').digest('test')
    ), 'the seed moves no border'
    with pytest.raises(LabError, match='400|36[0-9] training documents'):
        load_corpus('dolly', limit=401)


# ---- where it comes from


def test_the_second_time_no_hub_is_asked(hub):
    told = contents(load_corpus('dolly'))
    hub.log.clear()
    assert contents(load_corpus('dolly')) == told and hub.log == []
    load_corpus('dolly', stream=True).text('val')
    assert hub.log and all(hubstub.COMMIT in line for line in hub.log), (
        'a stream, too, stays at its commit'
    )


def test_a_class_brings_its_own_copies(hub, tmp_path, monkeypatch):
    told = contents(load_corpus('tinystories'))
    (tmp_path / 'home' / 'data').rename(tmp_path / 'copies')
    monkeypatch.setenv('LLM_LAB_DATA', str(tmp_path / 'copies'))
    hub.log.clear()
    assert contents(load_corpus('tinystories')) == told and hub.log == []
    path = min((tmp_path / 'copies' / 'tinystories').rglob('train-*'))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LabError, match='bytes, expected .*delete it to have it fetched again'):
        load_corpus('tinystories')
    path.unlink()
    assert (
        contents(load_corpus('tinystories')) == told and len(kept(tmp_path, 'tinystories')) == 1
    ), 'only what is missing is fetched'


def test_only_what_is_wanted_is_fetched(hub, tmp_path):
    load_corpus('tinystories')
    assert [p.split('-0')[0] for p in kept(tmp_path, 'tinystories')] == [
        'data/train',
        'data/train',
        'data/validation',
    ]
    assert not (tmp_path / 'home' / 'data' / 'tinystories' / '.part').exists()
    assert all(hubstub.COMMIT in line for line in hub.log if 'resolve' in line), (
        'the files are those of the listed commit'
    )


def test_the_environment_variable_is_enough(tmp_path):
    "A fresh process, nothing patched: HF_ENDPOINT leads the libraries here"
    with hubstub.serve() as (hub, url):
        env = dict(
            os.environ,
            HF_ENDPOINT=url,
            HF_HOME=str(tmp_path / 'hf'),
            LLM_LAB_HOME=str(tmp_path),
            HF_HUB_DOWNLOAD_TIMEOUT='600',
            HF_HUB_ETAG_TIMEOUT='600',
        )
        env.pop('LLM_LAB_DATA', None)
        code = (
            "from llm_lab.corpora import *\nfor s in (True, False): "
            "print(load_corpus('pg19', stream=s).digest('train'))"
        )
        out = subprocess.run(
            [sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=HANG
        )
    assert out.returncode == 0, out.stderr
    assert (
        out.stdout.split() == [digest(hubstub.book(n).replace('\r\n', '\n') for n in range(20))] * 2
    )


# ---- what goes wrong

FAULTS = [
    ('page', 'its answer is no JSON'),
    ('busy', '503'),
    ('slow', 'timed out'),
    ('gated', 'accept the terms'),
    ('private', 'no such data set'),
    ('gone', 'no such data set'),
    ('lost', 'no such data set, revision or file'),
    ('file page', 'size'),
    ('flipped', 'has hash'),
    ('short', 'size'),
    ('reset', 'closed connection'),
]
PASSING = 'page', 'busy', 'slow', 'file page', 'flipped', 'short', 'reset'


@pytest.mark.parametrize('fault,words', FAULTS)
def test_a_fault_is_one_line_and_leaves_nothing_to_stumble_over(hub, tmp_path, fault, words):
    hub.fault = fault
    hub.patience(0.3 if fault == 'slow' else HANG)
    with pytest.raises(LabError, match='cannot get tinystories from the hub: ') as e:
        load_corpus('tinystories')
    hub.patience(HANG)
    assert words in str(e.value) and '\n' not in str(e.value) and e.value.__suppress_context__
    assert kept(tmp_path, 'tinystories') == []
    hub.fault = ''
    assert (
        len(contents(load_corpus('tinystories'))['val']) == 20
        and len(kept(tmp_path, 'tinystories')) == 3
    )


@pytest.mark.parametrize('fault', PASSING)
def test_a_fault_that_passes_is_not_seen(hub, tmp_path, fault):
    told = contents(load_corpus('dolly', stream=True))
    (tmp_path / 'home' / 'data' / 'dolly' / 'hub.json').unlink()
    hub.fault, hub.times = fault, 1
    hub.delay = None  # it never comes
    hub.patience(2 if fault == 'slow' else HANG)  # enough for the answers that are not slow
    assert contents(load_corpus('dolly')) == told and hub.times == 0


@pytest.mark.parametrize('fault', ['busy', 'gated', 'gone', 'slow', 'file page', 'short', 'reset'])
def test_a_stream_that_breaks_is_one_line_and_the_next_try_is_free(hub, fault):
    corpus = load_corpus('tinystories', stream=True)
    hub.fault = fault
    hub.patience(0.3 if fault == 'slow' else HANG)
    with pytest.raises(LabError, match='cannot read tinystories: ') as e:
        list(corpus.documents('train'))
    hub.patience(HANG)
    assert '\n' not in str(e.value) and 'without stream' in str(e.value)
    hub.fault = ''
    assert len(list(corpus.documents('val'))) == 20


def test_a_stream_that_breaks_midway_does_not_end_quietly(hub):
    "Whoever counts on the end of a stream must not take a fault for it"
    corpus, seen = load_corpus('tinystories', stream=True), []
    with pytest.raises(LabError, match='cannot read tinystories'):
        for d in corpus.documents('train'):
            seen.append(d)
            if len(seen) == 3:
                hub.fault = 'gone'
    assert 3 <= len(seen) < 600


def test_nobody_answers(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hf.constants, 'ENDPOINT', 'http://127.0.0.1:9')
    with pytest.raises(LabError, match='cannot get dolly from the hub: .*put a copy into') as e:
        load_corpus('dolly')
    assert '\n' not in str(e.value) and 'refused' in str(e.value)


def test_what_a_killed_download_leaves_is_checked_too(hub, tmp_path, monkeypatch):
    "Killed after the bytes came and before they were checked; then the disk spoils them"

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(hubdata, '_wrong', killed)
        with pytest.raises(KeyboardInterrupt):
            load_corpus('dolly')
    assert kept(tmp_path, 'dolly') == []
    part = tmp_path / 'home' / 'data' / 'dolly' / '.part' / 'databricks-dolly-15k.jsonl'
    part.write_bytes(part.read_bytes()[::-1])
    hub.log.clear()
    assert (
        len(contents(load_corpus('dolly'))['train']) > 300
        and sum('GET /datasets' in line for line in hub.log) == 1
    )
    assert not part.parent.exists()


def test_no_room_on_the_disk(hub, monkeypatch):
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(hubdata.shutil, 'disk_usage', lambda path: usage(1, 1, 1000))
    with pytest.raises(
        LabError, match='tinystories needs .* GB, .* free in .*make room, or use stream=True'
    ):
        load_corpus('tinystories')
    assert not any('resolve' in line for line in hub.log)


def test_a_full_disk_in_the_middle(hub, tmp_path, monkeypatch):
    replace = os.replace

    def full(old, new):
        if str(new).endswith('.jsonl'):
            raise OSError(28, 'No space left on device')
        replace(old, new)

    with monkeypatch.context() as m:
        m.setattr(hubdata.os, 'replace', full)
        with pytest.raises(LabError, match='No space left on device'):
            load_corpus('dolly')
    assert kept(tmp_path, 'dolly') == [] and len(contents(load_corpus('dolly'))['train']) > 300


def test_a_damaged_list_is_told(hub, tmp_path):
    load_corpus('dolly', stream=True)
    path = tmp_path / 'home' / 'data' / 'dolly' / 'hub.json'
    for text in (path.read_text()[:100], '[]x', '7'):
        path.write_text(text)
        with pytest.raises(LabError, match='hub.json is damaged: delete it'):
            load_corpus('dolly')


def test_the_list_of_another_revision_is_not_used(hub, tmp_path):
    load_corpus('dolly', stream=True)
    path = tmp_path / 'home' / 'data' / 'dolly' / 'hub.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(revision='old', files=[])))
    assert len(contents(load_corpus('dolly'))['train']) > 300


def test_files_that_were_moved_are_missed_at_once(hub):
    del hub.files['roneneldan/TinyStories']['data/validation-00000-of-00001-869c.parquet']
    with pytest.raises(
        LabError, match=r'holds no data/validation-\*.parquet at commit 0123456789ab'
    ):
        load_corpus('tinystories')


def test_a_name_that_leads_out_of_the_folder_is_left_alone(hub, tmp_path):
    data = hub.files['roneneldan/TinyStories']
    data['data/train-/../../../../out.parquet'] = hubstub.parquet([dict(text='out')])
    assert 'out' not in contents(load_corpus('tinystories'))['train'] and not list(
        tmp_path.rglob('out.parquet')
    )


def test_without_the_library_one_line_says_so(hub, monkeypatch):
    load_corpus('dolly')
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(LabError, match='datasets is not installed'):
        load_corpus('dolly').text('val')


@pytest.mark.data
def test_the_real_sample_file():
    path = Path(os.environ.get('LLM_LAB_DATA', '')) / 'tinystories_sample.txt'
    if not path.is_file():
        pytest.skip('no tinystories_sample.txt in $LLM_LAB_DATA')
    corpus = from_path(path)
    told = contents(corpus)
    assert [len(told[s]) for s in ('train', 'val')] == [4, 1] and corpus.independent
    assert all(
        t == t.strip() and END_OF_TEXT not in t and '\n' in t for t in sum(told.values(), [])
    )
