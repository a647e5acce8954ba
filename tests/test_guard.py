"A save loses nothing: what others wrote stays, whatever is killed and whatever a name says."

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ended, one_line, tiny_model

from llm_lab import files as guard
from llm_lab.bpe import BPETokenizer
from llm_lab.chars import CharTokenizer
from llm_lab.checkpoint import COLUMNS, CheckpointManager, MetricsLog
from llm_lab.config import read_config, write_config
from llm_lab.corpora import Corpus, fetch
from llm_lab.hubdata import HubData
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.hub import to_hf
from llm_lab.core import LabError, pyplot, require_inside, require_name
from llm_lab.files import list_files, locked, replaceable
from llm_lab.files import recover, save_picture, snapshot, unused, atomic_write
from llm_lab.llama_block import llama
from llm_lab.packing import pack
from llm_lab.package import load, save
from llm_lab.runs import run_lock, train_run
from llm_lab.train import TrainState

pytestmark = [
    pytest.mark.usefixtures('one_thread'),
    pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs forks, links and signals'),
]
ROOT = Path(__file__).resolve().parent.parent
TOK = CharTokenizer('abc')
CORPUS = Corpus('c', dict(train='abacab', val='bab'), separator='c')
BPE = BPETokenizer.train('the cat sat on the mat. ' * 30, 270)


def model(width=8):
    return tiny_model(d_model=width)


def for_others():
    return MiniGPT(llama(vocab_size=3, d_model=8, n_layers=1, n_heads=1, max_len=8))


def keep_model(path, width=8):
    return save(path, model(width), TOK)


def export(path):
    return to_hf(path, for_others(), TOK)


def files(root):
    "{path: all that a user could miss} of each file and link below"
    found = {}
    for at, folders, names in os.walk(root):
        for name in [*folders, *names]:
            path = Path(at, name)
            if path.is_symlink():
                found[path] = os.readlink(path)
            elif path.is_file():
                found[path] = path.read_bytes(), path.stat().st_mtime_ns
            else:
                found[path] = 'folder'
    return found


def refused(call, root, *words):
    "The call ends with one line that holds these words, and nothing below `root` is touched"
    before = files(root)
    said = one_line(call, *words, longest=600)
    assert files(root) == before
    return said


def written_by(path, **files):
    "A folder with these files"
    for name, text in files.items():
        place = path / name.replace('__', '.')
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return path


def killed_at(n):
    "From now on, this process is killed when it asks the file system for the n-th time"
    left = [n]

    def hook(event, args):
        if event in ('open', 'import') or event.startswith(('os.', 'shutil.')):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def begin_in_a_child(call, at=0):
    """Call this in a fork, which is killed at its at-th request to the file system; it ends with 0,
    with 3 after an error of one line, with 1 after any other"""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        if at:
            killed_at(at)
        call()
        code = 0
    except (LabError, OSError):
        code = 3
    finally:
        os._exit(code)


# ---- what others wrote


@pytest.mark.parametrize('kind', ['docs', 'web project', 'model clone'])
@pytest.mark.parametrize('write', [keep_model, export, 'here'])
def test_a_folder_of_somebody_else_is_not_replaced(kind, write, tmp_path, monkeypatch):
    extra = {
        'docs': {},
        'web project': {'config__json': '{"port": 80}', 'package__json': '{"files": ["a"]}'},
        'model clone': {
            'config__json': '{"model_type": "llama"}',
            'LICENSE': 'x',
            'model__safetensors': 'x',
        },
    }
    folder = written_by(tmp_path / kind, thesis__tex='years', **extra[kind])
    written_by(folder / 'sub', data__csv='1')
    if write == 'here':
        monkeypatch.chdir(folder)
        for path in ('.', '', folder.name and '../' + folder.name, '..', folder, folder.parent):
            refused(lambda: keep_model(path), tmp_path, 'is the working folder, or lies above it')
    else:
        refused(lambda: write(folder), tmp_path, f'{folder} holds ')


CHANGES = {
    'an extra file': (lambda p: (p / 'notes.txt').write_text('seed 3'), 'holds notes.txt, so'),
    'a hidden file': (lambda p: (p / '.notes').write_text('seed 3'), 'holds .notes, so'),
    'a better card': (
        lambda p: (p / 'README.md').write_text('# Better'),
        'README.md, which was changed since',
    ),
    'another weight': (
        lambda p: (p / 'model.safetensors').write_bytes(b'x'),
        'model.safetensors, which was changed since',
    ),
    'its list': (lambda p: (p / 'package.json').write_text('{}'), 'holds README.md, so'),
    'an empty folder': (lambda p: (p / 'plots').mkdir(), 'holds plots, so'),
    'a link': (lambda p: (p / 'data').symlink_to(p.parent), 'holds data, a link'),
    'a link for a file': (
        lambda p: (
            shutil.move(p / 'README.md', p.parent) and (p / 'README.md').symlink_to('../README.md')
        ),
        'README.md, a link',
    ),
    'a pipe': (
        lambda p: ((p / 'README.md').unlink(), os.mkfifo(p / 'README.md')),
        'holds README.md, so',
    ),
    'version control': (lambda p: (p / '.git').mkdir(), 'is under version control'),
}


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('write', [keep_model, export])
def test_what_a_user_adds_or_changes_stays(change, write, tmp_path):
    write(tmp_path / 'm')
    write(tmp_path / 'm')
    do, words = CHANGES[change]
    name = 'package.json' if write is keep_model else 'llm_lab_files.json'
    if write is export:
        if change == 'its list':
            return
        (tmp_path / 'm' / 'README.md').write_text('a card of our own')
        list_files(tmp_path / 'm', 'README.md')
        write(tmp_path / 'm')  # it was listed, so it was ours
        (tmp_path / 'm' / 'README.md').write_text('a card of our own')
        list_files(tmp_path / 'm', 'README.md')
    assert (tmp_path / 'm' / name).is_file()
    do(tmp_path / 'm')
    before = files(tmp_path / 'm')
    one_line(lambda: write(tmp_path / 'm'), words)
    assert before == files(tmp_path / 'm') and not list(tmp_path.glob('.*'))


def test_what_is_missing_or_left_by_a_finder_is_no_obstacle(tmp_path):
    keep_model(tmp_path / 'm')
    (tmp_path / 'm' / 'README.md').unlink()
    (tmp_path / 'm' / '.DS_Store').write_text('icons')
    keep_model(tmp_path / 'm', 16)
    (tmp_path / 'empty').mkdir()
    keep_model(tmp_path / 'empty')
    assert load(tmp_path / 'm').model.cfg.d_model == 16


def test_the_name_of_a_folder_need_not_be_utf8(tmp_path):
    for _ in range(2):
        keep_model(tmp_path / os.fsdecode(b'\xff\xfe'))
    assert load(tmp_path / os.fsdecode(b'\xff\xfe'))


def test_an_improved_card_still_opens(tmp_path):
    keep_model(tmp_path / 'm')
    (tmp_path / 'm' / 'README.md').write_text('# A cat among models')
    load(tmp_path / 'm')


def older(folder, tokenizer=TOK, **beside):
    "A package as the first edition wrote it: three files in its list, others beside"
    save(folder, model(), tokenizer, dict(corpus='none', loss=1.5, interval=[1, 2]))
    said = json.loads((folder / 'package.json').read_text())
    said['files'] = {
        n: said['files'][n] for n in ('llm_lab.json', 'tokenizer.json', 'model.safetensors')
    }
    del said['sha256']
    seal = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    (folder / 'package.json').write_text(json.dumps({**said, 'sha256': seal}, indent=1))
    card = (folder / 'README.md').read_text(encoding='utf-8').replace('GPTConfig(', 'Config(')
    card = card.replace('import load\n', 'import open_model\n').replace('= load(', '= open_model(')
    (folder / 'README.md').write_text(card, encoding='utf-8')
    return written_by(folder, **beside)


@pytest.mark.parametrize('tokenizer', [TOK, BPE], ids=['chars', 'bpe'])
def test_a_package_of_the_first_edition_is_replaced_if_its_card_is_as_it_was(tokenizer, tmp_path):
    keep_model(older(tmp_path / 'm', tokenizer))
    card = older(tmp_path / 'n', tokenizer) / 'README.md'
    card.write_text(card.read_text().replace('- loss: 1.5', '- loss: 1.5 (seed 3 was better)'))
    refused(lambda: keep_model(tmp_path / 'n'), tmp_path, 'holds README.md, so')
    for name in ('loss__png', 'result__json'):
        folder = older(tmp_path / name, tokenizer, **{name: 'a picture'})
        refused(lambda: keep_model(folder), tmp_path, 'holds ' + name.replace('__', '.'))


def test_a_folder_is_replaced_by_its_like(tmp_path):
    "A checkpoint, a package, a folder for others, packed tokens: none takes the place of another"
    saves = CheckpointManager(tmp_path / 'run', TOK)
    saves(at_step(begun(), 1))
    makers = dict(package=keep_model, hf=export, packed=lambda p: pack(CORPUS, TOK, p, force=True))
    places = {n: tmp_path / n for n in makers}
    for name, make in makers.items():
        make(places[name])
    for name, make in makers.items():
        make(places[name])
        for other, place in (*places.items(), ('checkpoint', saves.folder_of(1))):
            if other != name:
                refused(lambda: make(place), place)


def test_a_stranger_that_comes_while_a_save_is_written_stays(tmp_path):
    keep_model(tmp_path / 'm')
    with pytest.raises(LabError, match='holds notes.txt'), atomic_write(tmp_path / 'm') as new:
        new.mkdir()
        (tmp_path / 'm' / 'notes.txt').write_text('mine')
    assert (tmp_path / 'm' / 'notes.txt').read_text() == 'mine' and load(tmp_path / 'm')
    with (
        pytest.raises(LabError, match='is there already'),
        atomic_write(tmp_path / 'late', replace=False) as new,
    ):
        new.mkdir()
        shutil.copytree(
            tmp_path / 'm', tmp_path / 'late', ignore=shutil.ignore_patterns('notes.txt')
        )
    assert load(tmp_path / 'late')


def test_a_name_that_is_not_taken(tmp_path):
    assert unused(tmp_path / 'tour') == tmp_path / 'tour'
    keep_model(tmp_path / 'tour')
    (tmp_path / 'tour-2').symlink_to('nowhere')
    (tmp_path / 'tour-3').write_text('')
    assert unused(tmp_path / 'tour') == tmp_path / 'tour-4'


# ---- places


def odd_places(tmp_path):
    "{what: (a path that is no place for a folder, a word of the answer)}"
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'circle').symlink_to('circle')
    os.mkfifo(tmp_path / 'pipe')
    return {
        'a file': (tmp_path / 'file', 'is a file'),
        'a file with a slash': (f'{tmp_path}/file/', 'is a file'),
        'below a file': (tmp_path / 'file' / 'm', 'is no folder'),
        'deep below a file': (tmp_path / 'file' / 'a' / 'm', 'is no folder'),
        'a circle': (tmp_path / 'circle', 'circle'),
        'a pipe': (tmp_path / 'pipe', 'neither a file nor a folder'),
        'nothing': ('', 'working folder'),
        'home': ('~', '~'),
        'below home': ('~/m', '~'),
        'NUL': ('a\0b', 'names no file'),
        'the root': ('/', 'working folder, or lies above|root'),
        'long': (tmp_path / ('x' * 220), 'longer than 200 bytes'),
        'the home': (Path.home(), 'home folder|holds|version control|working folder'),
    }


@pytest.mark.parametrize('write', [keep_model, export])
def test_an_odd_place_is_one_line(write, tmp_path, monkeypatch):
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    for what, (path, words) in odd_places(tmp_path).items():
        with pytest.raises(LabError) as e:
            write(path)
        assert any(w in str(e.value) for w in words.split('|')) and '\n' not in str(e.value), (
            what,
            e.value,
        )
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ['circle', 'file', 'here', 'pipe']
        and (tmp_path / 'file').read_text() == 'mine'
    )
    assert not list((tmp_path / 'here').iterdir())


def test_homes_and_disks_are_never_replaced(tmp_path, monkeypatch):
    "Not even when they are empty"
    for name in ('lab', 'user', 'disk', 'above/work'):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv('LLM_LAB_HOME', str(tmp_path / 'lab'))
    monkeypatch.setenv('HOME', str(tmp_path / 'user'))
    monkeypatch.chdir(tmp_path / 'above' / 'work')
    monkeypatch.setattr(os.path, 'ismount', lambda p: str(p) == str(tmp_path / 'disk'))
    for name, word in dict(
        lab='home', user='home', disk='is a disk', above='working folder'
    ).items():
        refused(lambda: keep_model(tmp_path / name), tmp_path, word)


def test_where_one_may_not_write(tmp_path, monkeypatch):
    "The rights are asked of the system; the administrator, who may everything, is told so here"
    (tmp_path / 'locked').mkdir()
    monkeypatch.setattr(os, 'access', lambda path, how: Path(path) != tmp_path / 'locked')
    refused(lambda: keep_model(tmp_path / 'locked' / 'm'), tmp_path, 'you may not write into')

    def mkdir(path, *a):
        raise PermissionError(errno.EACCES, 'Permission denied', str(path))

    monkeypatch.setattr(os, 'mkdir', mkdir)
    refused(lambda: keep_model(tmp_path / 'new' / 'm'), tmp_path, 'you may not make')


def test_a_link_stays_a_link(tmp_path):
    "To a folder, to one that is not there yet, to a link; also after a kill between the renames"
    (tmp_path / 'disk').mkdir()
    keep_model(tmp_path / 'disk' / 'm')
    for name, to in dict(
        full=tmp_path / 'disk' / 'm', dangling=Path('disk') / 'new', twice=Path('dangling')
    ).items():
        (tmp_path / name).symlink_to(to)
        for width in (16, 8):
            keep_model(tmp_path / name, width)
        assert (tmp_path / name).is_symlink() and load(tmp_path / name).model.cfg.d_model == 8
    assert sorted(p.name for p in (tmp_path / 'disk').iterdir()) == ['m', 'new']
    os.replace(tmp_path / 'disk' / 'm', tmp_path / 'disk' / f'.m.{guard._mark()}.old')
    assert load(tmp_path / 'full') and (tmp_path / 'full').is_symlink()
    written_by(tmp_path / 'theirs', thesis__tex='years')
    (tmp_path / 'out').symlink_to('theirs')
    refused(lambda: keep_model(tmp_path / 'out'), tmp_path, 'holds thesis.tex')


# ---- names

BAD = [
    '',
    '.',
    '..',
    '../x',
    '/abs',
    'a/b',
    'a\\b',
    'C:x',
    '.hidden',
    'con',
    'NUL.txt',
    'com1',
    'Lpt9',
    'a\nb',
    'a\0',
    'a ',
    ' a',
    'a.',
    'a\u202eb',
    'x' * 151,
    '\udc80',
    'a*',
    'a?',
    '"',
    '<b>',
    'a|b',
    '~/x',
    None,
    5,
]
GOOD = [
    'a',
    'night 2',
    'ü',
    'Zürich-1.5_b',
    'console',
    'com',
    '2026-11-29',
    'a.b',
    '日本',
    'x' * 150,
]


def test_names():
    for name in BAD:
        with pytest.raises(LabError) as e:
            require_name(name, '--run')
        assert str(e.value).startswith(f'--run {name!r} ') and '\n' not in str(e.value)
    for name in GOOD:
        assert require_name(name) == name
    for path in (
        '../x',
        '/x',
        'a//b',
        'a/../b',
        'a/./b',
        'a\\..\\x',
        'C:/x',
        '',
        'a/',
        'a/con/b',
        'a/.git/config',
    ):
        with pytest.raises(LabError):
            require_inside(path)
    assert (
        require_inside('data/train-00000-of-00002.parquet') == 'data/train-00000-of-00002.parquet'
    )


def test_no_name_leads_out_of_its_folder(tmp_path, monkeypatch):
    "Of a run, of a config, of a download, of a data set, of a file that the hub lists"
    home = tmp_path / 'home'
    home.mkdir()
    monkeypatch.setenv('LLM_LAB_HOME', str(home))
    monkeypatch.delenv('LLM_LAB_DATA', raising=False)
    for name in [n for n in BAD if isinstance(n, str)]:
        refused(lambda: train_run('smoke', run=name), tmp_path, '--run')
        refused(lambda: train_run('smoke', run=name, resume=''), tmp_path, '--run')
        refused(lambda: fetch(name, 'file:///nowhere', '0' * 64, 1), tmp_path, 'the file')
        data = HubData(name, 'a/b', dict(train='*.parquet'), {}, '', '')
        refused(data, tmp_path, 'the data set')
    (home / 'data' / 'd').mkdir(parents=True)
    for path in ('/etc/x.parquet', '../x.parquet', 'a/../../x.parquet', 'a\\x.parquet'):
        (home / 'data' / 'd' / 'hub.json').write_text(
            json.dumps(
                dict(repo='a/b', revision='main', commit='c', files=[dict(path=path, size=1)])
            )
        )
        refused(
            HubData('d', 'a/b', dict(train='*.parquet'), {}, '', ''),
            tmp_path,
            'hub.json',
            repr(path),
        )
    for stem in ('con', '.x', 'a*b'):
        (tmp_path / f'{stem}.yaml').write_text('train: {steps: 1}\n')
        refused(lambda: train_run(tmp_path / f'{stem}.yaml'), tmp_path, 'the config')
    monkeypatch.chdir(tmp_path)
    for name in ('../../x', 'con', 'ü' * 300, '..'):  # of a corpus: made harmless, or one line
        try:
            place = pack(Corpus(name, dict(train='abacab', val='bab'), separator='c'), TOK).folder
        except LabError as e:
            assert '\n' not in str(e)
            continue
        assert place.parent == home / 'data' / 'packed'
    assert [p.name for p in tmp_path.iterdir() if p.suffix != '.yaml'] == ['home']


# ---- single files


def test_a_tokenizer_replaces_its_own_files_only(tmp_path):
    for tok in (TOK, BPE):
        for name in ('tokenizer.json', 'meta.json'):
            if tok is TOK and name == 'meta.json':
                continue
            for text in (
                '{}',
                '{"kind": "mine"}',
                '{\n  "kind": "x"\n}',
                '[]',
                'x',
                '',
                json.dumps(dict(version='1.0', model={}), indent=2),
            ):
                place = tmp_path / f'{len(list(tmp_path.iterdir()))}'
                written_by(place)
                place.mkdir()
                (place / name).write_text(text)
                refused(lambda: tok.save(place), tmp_path, f'{name} is not by this library')
        tok.save(tmp_path / tok.kind)
        tok.save(tmp_path / tok.kind)
    TOK.save(tmp_path / 'bpe')  # one of another kind


def test_a_config_with_a_comment_stays(tmp_path):
    path = tmp_path / 'x.yaml'
    write_config(read_config('smoke'), path)
    write_config(read_config('golden'), path)
    text = path.read_text()
    for other in (
        f'# the best one\n{text}',
        text + '\n',
        '',
        'a: 1\n',
        '[',
        text.replace('lr: 0.004', 'lr: 4e-3'),
        '\0',
        '- a\n',
        '7',
        'data:\n',
        '"data"',
    ):
        path.write_text(other)
        refused(
            lambda: write_config(read_config('smoke'), path),
            tmp_path,
            'x.yaml is not by this library',
        )
    path.write_bytes(b'\xff')
    refused(lambda: write_config(read_config('smoke'), path), tmp_path)


def test_a_picture_replaces_a_picture_of_ours_only(tmp_path):
    fig = pyplot().figure()
    for kind, head in dict(png=b'\x89PNG', svg=b'<?xml', pdf=b'%PDF').items():
        path = tmp_path / f'c.{kind}'
        for _ in range(2):
            save_picture(fig, path)
        assert path.read_bytes().startswith(head)
        fig.savefig(tmp_path / f'own.{kind}')
        for name in (f'own.{kind}', f'notes.{kind}'):
            if name[:5] == 'notes':
                (tmp_path / name).write_text('mine')
            refused(
                lambda: save_picture(fig, tmp_path / name),
                tmp_path,
                f'{name} is not by this library',
            )
    for name in ('thesis.tex', 'a.py', 'b.xyz'):
        refused(lambda: save_picture(fig, tmp_path / name), tmp_path, 'a picture is')
    assert save_picture(fig, tmp_path / 'plain') == tmp_path / 'plain.png'
    pyplot().close(fig)


def begun():
    a_model = model()
    return TrainState(a_model, 99, optimizer=torch.optim.SGD(a_model.parameters(), 1.0))


def at_step(run, step):
    "The run, as if it had come to this step"
    run.step = step
    run.history[:, :step] = torch.ones(2, step)
    return run


ROW = dict(step=1, loss=2.5)
HEAD = ','.join(COLUMNS) + '\n'
THEIRS = {
    'metrics.jsonl': [
        'notes',
        '{"a": 1}',
        '{"step": 1}\nnotes\n',
        '{"loss":1,"step":2}\n',
        '[]\n',
        '{"step": 1}\n\n{"a": 1}\n',
    ],
    'samples.jsonl': ['', 'notes\n', '{"text": "a"}\n'],
    'metrics.csv': [
        '',
        'a,b\n1,2\n',
        HEAD + 'notes\n',
        HEAD + ','.join(['x'] * len(COLUMNS)) + '\n',
        'step',
        HEAD + '1,my note',
        ';'.join(COLUMNS),
    ],
}


@pytest.mark.parametrize('name', THEIRS)
def test_rows_go_into_files_of_a_run_only(name, tmp_path):
    for n, text in enumerate(THEIRS[name]):
        if text == 'step':
            continue  # a head that a kill has torn
        folder = written_by(tmp_path / f'{n}', **{name.replace('.', '__'): text})
        write = MetricsLog(folder).keep if name[0] == 's' else MetricsLog(folder).write
        refused(lambda: write(ROW), tmp_path, name)
        refused(lambda: MetricsLog(folder).truncate(0), tmp_path, name)
    table = written_by(
        tmp_path / 'table', metrics__csv=HEAD + ','.join(['1'] * len(COLUMNS)) + '\n'
    )
    # rows, and nothing to make them anew from
    refused(lambda: MetricsLog(table).truncate(0), tmp_path, 'metrics.csv')


def test_checkpoints_leave_alone_what_is_not_theirs(tmp_path):
    for name in ('latest', 'best'):
        for text in ('v1.2\n', 'step-000010', ''):
            written_by(tmp_path / name, **{name: text})
            refused(
                lambda: CheckpointManager(tmp_path / name, TOK)(at_step(begun(), 1)), tmp_path, name
            )
    saves = CheckpointManager(tmp_path / 'run', TOK, keep=1)
    run = begun()
    mine = [
        tmp_path / 'run' / n
        for n in ('.latest.notes.new', 'checkpoints/.step-by-step.txt', 'checkpoints/.my-step-1')
    ]
    saves(at_step(run, 1))
    for path in mine:
        path.write_text('mine')
    for path in (place := saves.folder_of(1)) / 'notes.txt', saves.folder_of(1) / 'README.md':
        path.write_text('my notes')
    (place / 'README.md').write_text('better')
    with warnings.catch_warnings(record=True, action='always', category=UserWarning) as said:
        for step in (2, 3, 4):
            saves(at_step(run, step))
    assert (
        saves.steps() == [1, 4]
        and (place / 'notes.txt').read_text() == 'my notes'
        and (place / 'README.md').read_text() == 'better'
    )
    assert all(p.read_text() == 'mine' for p in mine)
    assert len([w for w in said if 'It stays' in str(w.message)]) == 1


# ---- runs that only try


@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty home, and a text that a run can learn from"
    from llm_lab import runs

    monkeypatch.setenv('LLM_LAB_HOME', str(tmp_path / 'home'))
    monkeypatch.delenv('LLM_LAB_DATA', raising=False)
    monkeypatch.setattr(runs, 'peak_flops', lambda *a: 1e9)
    (tmp_path / 'home').mkdir()
    (tmp_path / 'poem.txt').write_text('the cat sat on the mat.\n' * 200)
    return tmp_path / 'home'


def settings(poem, *more):
    "Of a run of a smallest model on this text"
    return [f'data.corpus={poem}', 'data.length=16', 'model.d_model=8', 'model.n_heads=1', *more]


def tiny(home, *more, **kw):
    words = settings(home.parent / 'poem.txt', 'eval.tokens=100', *more)
    return train_run('smoke', *words, **kw)


def test_a_run_called_smoke_survives(home, capsys):
    mine = tiny(home, 'steps=3', run='smoke')
    before = files(mine.folder)
    for _ in range(2):
        assert tiny(home, smoke=True).folder.name == 'smoke-2'
    assert files(mine.folder) == before
    (
        notes := home
        / 'experiments'
        / 'smoke'
        / 'runs'
        / 'smoke-2'
        / 'checkpoints'
        / 'step-000020'
        / 'notes.txt'
    ).write_text('mine')
    assert tiny(home, smoke=True).folder.name == 'smoke-3' and notes.read_text() == 'mine'


@pytest.mark.parametrize(
    'files_',
    [
        dict(notes__txt='mine'),
        dict(metrics__csv='a,b\n'),
        {'__lock': '', 'notes__txt': 'mine'},
        dict(result__json='{}'),
        {'__lock': '', 'metrics__csv': 'a,b\n'},
    ],
)
def test_a_new_run_begins_in_an_empty_folder(files_, home, capsys):
    folder = written_by(home / 'experiments' / 'smoke' / 'runs' / 'x', **files_)
    before = files(folder)
    with pytest.raises(LabError) as e:
        tiny(home, run='x')
    assert (
        '\n' not in str(e.value)
        and {k: v for k, v in files(folder).items() if k in before} == before
    )


def test_what_a_user_changes_in_a_run_is_told_before_it_goes_on(home, capsys):
    job = tiny(home, 'steps=3', run='x')
    for name in ('config.yaml', 'run.json', 'result.json', 'metrics.csv', 'latest', '../latest'):
        text = (job.folder / name).read_text()
        (job.folder / name).write_text(text + '# notes\n')
        before = {
            p: p.read_text()
            for p in job.folder.iterdir()
            if p.is_file() and p.name not in ('.lock', '.pid')
        }
        if name == 'config.yaml':  # one that says the same stays as it is
            tiny(home, resume=job.folder)
            assert (job.folder / name).read_text() == text + '# notes\n'
            with pytest.raises(LabError, match='config.yaml is not by'):
                tiny(home, 'steps=4', resume=job.folder)
        else:
            with pytest.raises(LabError, match=f'{Path(name).name} is not by'):
                tiny(home, 'steps=4', resume=job.folder)
            assert before == {p: p.read_text() for p in job.folder.iterdir() if p in before}
        (job.folder / name).write_text(text)
    assert tiny(home, 'steps=4', resume=job.folder).run.step == 4


def test_a_folder_with_a_config_is_no_run(home, capsys):
    folder = written_by(home / 'mine', notes__txt='mine')
    write_config(read_config('smoke'), folder / 'config.yaml')
    refused(lambda: train_run(resume=folder), folder, 'is neither a run')
    (folder / '.pid').write_text('a process of mine')
    with pytest.raises(LabError, match='.pid is not by'):
        run_lock(folder)
    assert (folder / '.pid').read_text() == 'a process of mine'


# ---- what killed writers leave

WRITER = """
import os, signal, sys
from functools import partial
from pathlib import Path
from llm_lab.files import atomic_write
with atomic_write('m') as new:
    new.mkdir()
    (new/'big.bin').write_bytes(bytes(100_000))
    print(new.name, flush=True)
    if sys.argv[1] == 'die': os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.readline()
print('done', flush=True)
"""


def writer(folder, how):
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    p = subprocess.Popen(
        [sys.executable, '-c', WRITER, how],
        cwd=folder,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return p, p.stdout.readline().strip()


def hidden(folder):
    return sorted(p.name for p in folder.iterdir() if p.name[0] == '.')


def test_the_next_writer_sweeps_what_a_killed_one_left_and_not_what_a_live_one_writes(tmp_path):
    dead, left = writer(tmp_path, 'die')
    live, its = writer(tmp_path, 'wait')  # which sweeps as well
    assert dead.wait(60) == -signal.SIGKILL and hidden(tmp_path) == [its] != [left]
    keep_model(tmp_path / 'other')
    keep_model(tmp_path / 'm')
    assert hidden(tmp_path) == [its] and (tmp_path / its / 'big.bin').stat().st_size == 100_000
    (tmp_path / 'm').rename(tmp_path / 'n')
    live.stdin.write('\n')
    live.stdin.flush()
    assert live.stdout.readline() == 'done\n' and live.wait(60) == 0 and hidden(tmp_path) == []


def marks():
    "{what: (mark of a writer, is it dead?)}"
    own, ended = guard._mark(), subprocess.Popen(['true'])
    began, kernel = int(own[16:28]), own[:6]
    zombie = subprocess.Popen([sys.executable, '-c', ''])
    ended.wait()
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet waited for
    mark = lambda kernel, pid, began: f'{kernel}{pid:010d}{began:012d}0000'
    return {
        'this process, done': (own, True),
        'a number that is used again': (mark(kernel, os.getppid(), began + 10**6), True),
        'number 1, before a new start of a container': (mark(kernel, 1, began + 10**6), True),
        'ended': (mark(kernel, ended.pid, began), True),
        'a zombie': (mark(kernel, zombie.pid, guard._began(os.getpid())), True),
        'alive': (mark(kernel, os.getppid(), guard._began(os.getppid())), False),
        'of another machine': (mark(f'{(int(kernel) + 1) % 10**6:06d}', os.getpid(), began), False),
    }, zombie


@pytest.mark.skipif(
    not Path('/proc/self/stat').exists(), reason='needs the list of processes of Linux'
)
def test_whose_writer_is_dead(tmp_path):
    cases, zombie = marks()
    for what, (mark, dead) in cases.items():
        for end in ('new', 'old'):
            left = written_by(tmp_path / what / f'.m.{mark}.{end}', half='half')
            written_by(tmp_path / what / 'm').mkdir()
            keep_model(tmp_path / what / 'm')
            assert left.exists() != dead, (what, end)
            shutil.rmtree(tmp_path / what)
    zombie.wait()
    left = written_by(tmp_path / f'.m.{cases["of another machine"][0]}.new', half='half')
    long_ago = time.time() - 2 * 24 * 60 * 60
    os.utime(left, (long_ago, long_ago))
    keep_model(tmp_path / 'm')
    assert left.exists()  # something in it is younger than a day
    for path in (left / 'half', left):
        os.utime(path, (long_ago, long_ago))
    keep_model(tmp_path / 'm')
    assert not left.exists()


def test_remains_of_the_first_edition_go_if_they_are_ours(tmp_path):
    "Its marks were bare process numbers; number 1 is always alive"
    gone = subprocess.Popen(['true'])
    gone.wait()
    ours = [
        written_by(tmp_path / f'.m.{gone.pid}.new', model__safetensors='half', package__json='{'),
        older(tmp_path / f'.m.{gone.pid}.old'),
    ]
    (ours[1] / 'README.md').unlink()
    stay = [
        written_by(tmp_path / f'.m.{gone.pid + 1}.new', notes__txt='mine'),
        written_by(tmp_path / '.m.2.old', notes__txt='mine'),
        written_by(tmp_path / '.m.1.new', model__safetensors='x'),
        written_by(tmp_path / '.m.new', a='x'),
        written_by(tmp_path / '.m.7.8.new', a='x'),
        written_by(tmp_path / '.mm.7.new', model__safetensors='x'),
    ]
    # where capitals count, it is another's
    stay += [written_by(tmp_path / '.M.7.new', model__safetensors='x')]
    keep_model(tmp_path / 'm')
    assert [p for p in ours if p.exists()] == [] and [p for p in stay if not p.exists()] == []
    os.utime(stay[2], (1, 1))
    os.utime(stay[2] / 'model.safetensors', (1, 1))
    keep_model(tmp_path / 'm')
    assert not stay[2].exists()


def test_a_folder_of_a_user_is_not_brought_back(tmp_path):
    mine = written_by(tmp_path / '.m.7.old', notes__txt='mine')
    assert not recover(tmp_path / 'm').exists()
    keep_model(tmp_path / 'm')
    assert (mine / 'notes.txt').read_text() == 'mine'


def test_where_capitals_do_not_count_a_name_is_one_in_any_of_them(tmp_path):
    "Emulated: such a file system finds each file under its name with other capitals, too"
    mark = guard._mark()
    left = written_by(tmp_path / f'.Model.{mark}.new', half='half')
    (tmp_path / f'.mODEL.{mark}.NEW').symlink_to(left.name)
    keep_model(tmp_path / 'model')
    assert not left.exists()


def saves_often(folder):
    for _ in range(25):
        keep_model(folder / 'm')


def test_two_who_save_at_the_same_time_do_not_hurt_each_other(tmp_path):
    both = [begin_in_a_child(partial(saves_often, tmp_path)) for _ in range(2)]
    saves_often(tmp_path)  # a third one, which also brings back what is missing
    assert [ended(pid) for pid in both] == [0, 0]
    assert load(tmp_path / 'm') and [p.name for p in tmp_path.iterdir()] == ['m']


@pytest.mark.parametrize('when', range(8))
def test_a_view_across_two_writers_is_looked_at_again(when, tmp_path, monkeypatch):
    "Emulated: the folder was away while its lists were read, and is back when its files are"
    keep_model(tmp_path / 'm')
    real, calls = guard._sealed, []

    def sealed(path):
        if path.parent == tmp_path / 'm':
            calls.append(path)
            if len(calls) == when + 1:
                return None
        return real(path)

    monkeypatch.setattr(guard, '_sealed', sealed)
    keep_model(tmp_path / 'm', 16)
    assert len(calls) > when and [p.name for p in tmp_path.iterdir()] == ['m']


def test_the_only_whole_copy_is_never_removed(tmp_path, monkeypatch):
    """The new folder vanishes between the two renames: the old one comes back, or stays beside its
    place"""
    keep_model(tmp_path / 'm')
    before, real = files(tmp_path / 'm'), os.replace

    def replace(a, b):
        if str(a).endswith('.new') and Path(a).parent == tmp_path:
            shutil.rmtree(a)
        return real(a, b)

    monkeypatch.setattr(os, 'replace', replace)
    with pytest.raises(FileNotFoundError):
        keep_model(tmp_path / 'm', 16)
    assert files(tmp_path / 'm') == before
    monkeypatch.setattr(guard, 'recover', lambda path: path)  # as if bringing it back failed, too
    with pytest.raises(FileNotFoundError):
        keep_model(tmp_path / 'm', 16)
    monkeypatch.undo()
    guard._sweep(tmp_path / 'm')
    assert files(recover(tmp_path / 'm')) == before


@pytest.mark.parametrize('theirs', ['a package', 'the old one', 'thesis'])
def test_what_comes_between_the_two_renames_is_seen(theirs, tmp_path, monkeypatch):
    "Another writer's package is the old one then; a reader may bring back ours; a stranger stays"
    keep_model(tmp_path / 'm')
    keep_model(tmp_path / 'other', 16)
    written_by(tmp_path / 'thesis', chapter1__tex='years')
    real, left = os.replace, [1]

    def replace(a, b):
        if str(a).endswith('.new') and str(b) == str(tmp_path / 'm') and left[0]:
            left[0] = 0
            if theirs == 'the old one':
                recover(tmp_path / 'm')
            else:
                real(tmp_path / ('other' if theirs == 'a package' else theirs), b)
        return real(a, b)

    monkeypatch.setattr(os, 'replace', replace)
    if theirs == 'thesis':
        with pytest.raises(LabError, match='holds chapter1.tex'):
            keep_model(tmp_path / 'm', 8)
        assert (tmp_path / 'm' / 'chapter1.tex').read_text() == 'years'
    else:
        keep_model(tmp_path / 'm', 8)
        assert load(tmp_path / 'm').model.cfg.d_model == 8
    assert not left[0] and hidden(tmp_path) == []


# ---- file systems that promise less


@pytest.fixture
def silent(monkeypatch):
    monkeypatch.setattr(guard, '_said', set())


def failing(real, when, code):
    def call(*args, **kw):
        if when(*args):
            raise OSError(code, os.strerror(code))
        return real(*args, **kw)

    return call


def all_writers(folder):
    "Whatever waits for the disk"
    checkpoints(folder / 'run')
    rows = MetricsLog(folder / 'run')
    rows.write(ROW)
    rows.keep(ROW)
    rows.sync()
    rows.truncate(1)
    for _ in range(2):
        keep_model(folder / 'm')
        export(folder / 'hf')
        write_config(read_config('smoke'), folder / 'c.yaml')
        BPE.save(folder / 'tok')
        pack(CORPUS, TOK, folder / 'packed', force=True)


@pytest.mark.parametrize('code', ['EINVAL', 'ENOTSUP', 'EBADF', 'EACCES', 'ENOSYS'])
def test_a_folder_that_cannot_be_synced_is_no_obstacle_and_said_once(
    code, tmp_path, monkeypatch, silent
):
    code = getattr(errno, code)
    is_folder = lambda handle: stat.S_ISDIR(os.fstat(handle).st_mode)
    monkeypatch.setattr(os, 'fsync', failing(os.fsync, is_folder, code))
    with warnings.catch_warnings(record=True, action='always', category=UserWarning) as said:
        all_writers(tmp_path)
    assert len(said) == 1 and 'does not confirm that a save is on the disk' in str(
        said[0].message
    ), [str(w.message) for w in said]
    monkeypatch.undo()
    no_open = failing(
        os.open,
        lambda path, how, *a: (
            not isinstance(path, int) and os.path.isdir(path) and not how & os.O_DIRECTORY
        ),
        code,
    )
    monkeypatch.setattr(guard, '_said', set())
    monkeypatch.setattr(guard.os, 'open', no_open)
    with warnings.catch_warnings(record=True, action='always', category=UserWarning) as said:
        keep_model(tmp_path / 'm')
    assert len(said) == 1


@pytest.mark.parametrize('code', ['EIO', 'ENOSPC', 'EDQUOT'])
def test_an_error_that_means_lost_bytes_is_raised(code, tmp_path, monkeypatch, silent):
    code = getattr(errno, code)
    keep_model(tmp_path / 'm')
    for folders in (True, False):
        with monkeypatch.context() as m:
            m.setattr(
                os,
                'fsync',
                failing(os.fsync, lambda h: stat.S_ISDIR(os.fstat(h).st_mode) == folders, code),
            )
            with pytest.raises(OSError) as e:
                keep_model(tmp_path / 'm')
            assert e.value.errno == code
        assert load(tmp_path / 'm') and hidden(tmp_path) == []
    with monkeypatch.context() as m:  # a file that cannot say is another thing than a folder
        m.setattr(
            os, 'fsync', failing(os.fsync, lambda h: stat.S_ISREG(os.fstat(h).st_mode), errno.EBADF)
        )
        with pytest.raises(OSError):
            keep_model(tmp_path / 'm')


@pytest.mark.parametrize('code', ['ENOLCK', 'ENOSYS', 'EOPNOTSUPP', 'ENOTSUP'])
def test_without_locks_it_works_and_is_said_once(code, tmp_path, monkeypatch, silent):
    import fcntl

    monkeypatch.setattr(fcntl, 'flock', failing(fcntl.flock, lambda *a: True, getattr(errno, code)))
    with warnings.catch_warnings(record=True, action='always', category=UserWarning) as said:
        for _ in range(2):
            run_lock(tmp_path / 'run').release()
        for force in (False, True):
            pack(CORPUS, TOK, tmp_path / 'run' / 'p', force=force)
    assert len(said) == 1 and 'has no locks' in str(said[0].message), [str(w.message) for w in said]
    monkeypatch.setattr(fcntl, 'flock', failing(fcntl.flock, lambda *a: True, errno.EIO))
    with pytest.raises(OSError):
        locked(tmp_path / 'x.lock', None)


@pytest.mark.parametrize('code', ['EXDEV', 'EPERM', 'ENOSYS', 'EINVAL'])
def test_where_folders_cannot_be_renamed_they_are_copied(code, tmp_path, monkeypatch, silent):
    real, fill = os.replace, [0]

    def replace(a, b):
        if os.path.isdir(a):
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
        return real(a, b)

    monkeypatch.setattr(os, 'replace', replace)
    with warnings.catch_warnings(record=True, action='always', category=UserWarning) as said:
        for width in (8, 16, 8):
            keep_model(tmp_path / 'm', width)
    assert len(said) == 1 and 'cannot rename folders' in str(said[0].message)
    assert load(tmp_path / 'm').model.cfg.d_model == 8 and hidden(tmp_path) == []
    copy = shutil.copyfile

    def copyfile(a, b, **kw):  # the disk is full in the middle of a copy
        fill[0] += 1
        if fill[0] == when:
            raise OSError(errno.ENOSPC, 'No space left on device')
        return copy(a, b, **kw)

    monkeypatch.setattr(shutil, 'copyfile', copyfile)
    for when in range(1, 99):  # noqa: B007
        fill[0] = 0
        try:
            keep_model(tmp_path / 'm', 16)
        except OSError:
            assert load(tmp_path / 'm').model.cfg.d_model == 8 and hidden(tmp_path) == []
        else:
            break
    assert when > 8 and load(tmp_path / 'm').model.cfg.d_model == 16


# ---- a folder of a thousand files


def home_of_a_user(root, luck):
    "1,000 files: sub folders, links, hidden and odd names, a repository, and names that we use"
    names = [
        'config.json',
        'package.json',
        'manifest.json',
        'meta.json',
        'llm_lab_files.json',
        'README.md',
        'tokenizer.json',
        'result.json',
        'run.json',
        'metrics.csv',
        'metrics.jsonl',
        'samples.jsonl',
        'latest',
        'best',
        'config.yaml',
        'loss.png',
        'model.safetensors',
        'train.bin',
        '.lock',
        '.pid',
        '.m.7.new',
        '.m.7.old',
        '.tour.12.new',
        '.step-by-step',
        'curve.png',
        'hub.json',
        'state.json',
    ]
    odd = [
        'a b',
        '-rf',
        'ü',
        '日本',
        'x' * 200,
        'new\nline',
        '*',
        '~',
        "it's",
        '.hidden',
        'con',
        os.fsdecode(b'\xff\xfe'),
    ]
    folders = [
        '',
        'artifacts/tour',
        'artifacts/m',
        'experiments/smoke/runs/x',
        'experiments/smoke/runs/smoke',
        'experiments/smoke/runs',
        'experiments/smoke',
        'data',
        'data/packed/c-chars3',
        'data/packed/c-chars3/tokenizer',
        '.git',
        '.git/objects',
        'notes',
        'notes/checkpoints',
        'notes/checkpoints/step-000001',
        'notes/checkpoints/.step-000001.gone',
        'web',
        'web/sub/deep/deeper',
    ]
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for n in range(1000):
        folder = root / luck.choice(folders)
        name = luck.choice(names) if n % 3 == 0 else luck.choice(odd) if n % 3 == 1 else f'{n}.txt'
        path = folder / name
        if os.path.lexists(path):
            path = folder / f'{n}.md'
        if n % 50 == 49:
            path.symlink_to(luck.choice(['nowhere', '..', '/etc', '../notes', root / 'web']))
        else:
            path.write_bytes(
                luck.choice(
                    [
                        b'{"files": {}}',
                        b'mine',
                        b'{}',
                        b'',
                        b'7',
                        b'{\n "kind": 1\n}',
                        luck.randbytes(99),
                    ]
                )
            )
        if not path.is_symlink():
            os.utime(path, (n + 10**9, n + 10**9))
    (root / 'experiments/smoke/runs/x' / '.lock').touch()
    (root / 'c.yaml').write_text('# mine\ntrain: {steps: 5}\n')


def keep(path, name='tour'):
    "What the tour does at its end"
    with atomic_write(unused(path), replace=False) as new:
        save(new, model(), TOK)
        (new / 'result.json').write_text('{}')


def checkpoints(path):
    saves, run = CheckpointManager(path, TOK, keep=1), begun()
    for step in (1, 2, 3):
        saves(at_step(run, step))


def rows(path):
    log = MetricsLog(path)
    log.write(ROW)
    log.keep(ROW)
    log.sync()
    log.truncate(0)


def plot(path):
    fig = pyplot().figure()
    try:
        save_picture(fig, path)
    finally:
        pyplot().close(fig)


def small_run(name, **kw):
    from llm_lab import runs

    runs.peak_flops = lambda *a: 1e9
    words = settings(f'{os.environ["LLM_LAB_HOME"]}/../poem.txt', 'steps=3')
    train_run('smoke', *words, **kw, **({} if name is None else dict(run=name)))


WRITERS = {
    'package': keep_model,
    'package of bpe': lambda p: save(p, model(), BPE),
    'hf': export,
    'chars': TOK.save,
    'bpe': BPE.save,
    'config': lambda p: write_config(read_config('smoke'), p),
    'checkpoints': checkpoints,
    'metrics': rows,
    'picture': plot,
    'tour': keep,
    'pack': lambda p: pack(CORPUS, TOK, p),
    'pack anew': lambda p: pack(CORPUS, TOK, p, force=True),
    'pack at its place': lambda p: pack(CORPUS, TOK, force=True),
    'run': lambda p: small_run(p.name),
    'try': lambda p: small_run(None, smoke=True),
    'resume': lambda p: small_run(None, resume=p),
    'fetch': lambda p: fetch(p.name, 'file:///nowhere', '0' * 64, 9),
    'lock': lambda p: run_lock(p).release(),
}


def survives(root, calls, seed, monkeypatch):
    "How calls end of random writers at random places of a user's folder, most of them killed"
    luck = random.Random(seed)
    home = root / 'home'
    home_of_a_user(home, luck)
    (root / 'poem.txt').write_text('the cat sat on the mat.\n' * 200)
    monkeypatch.setenv('LLM_LAB_HOME', str(home))
    monkeypatch.delenv('LLM_LAB_DATA', raising=False)
    monkeypatch.chdir(home / 'web')
    before, codes = files(home), []
    assert sum(v != 'folder' for v in before.values()) >= 1000
    places = sorted(before)
    for n in range(calls):
        name = [*WRITERS][n % len(WRITERS)] if n < len(WRITERS) else luck.choice([*WRITERS])
        new = luck.choice(places) / 'new', home / 'artifacts' / 'new'
        at = luck.choice([home, *places, *places, *new, Path('.'), Path('..'), Path('m')])
        kill = luck.choice([0, luck.randint(1, 40), luck.randint(1, 40), luck.randint(1, 400)])
        codes.append((name, ended(begin_in_a_child(lambda: WRITERS[name](at), kill))))
        now = files(home)
        assert {p: v for p, v in before.items() if now.get(p) != v} == {}, (n, name, at, kill)
    assert [c for c in codes if c[1] not in (0, 3, -signal.SIGKILL)] == []
    for name in ('package', 'hf', 'tour', 'pack', 'checkpoints'):  # in their own places, they work
        for _ in range(1 + (name in ('package', 'hf'))):
            WRITERS[name](home / 'artifacts' / f'fresh-{name}')
    return [code for _, code in codes]


def test_a_thousand_files_survive_twenty_calls(tmp_path, monkeypatch):
    codes = survives(tmp_path, 20, 1, monkeypatch)
    assert {3, -signal.SIGKILL} <= {*codes}


@pytest.mark.slow
@pytest.mark.parametrize('seed', [2, 3])
def test_a_thousand_files_survive_two_hundred_calls(seed, tmp_path, monkeypatch):
    codes = survives(tmp_path, 200, seed, monkeypatch)
    assert {*codes} == {0, 3, -signal.SIGKILL}
    assert codes.count(-signal.SIGKILL) > 20 and codes.count(0) >= 5


def test_the_guard_of_a_package_reads_each_file_once(tmp_path, monkeypatch):
    "So a save costs about what it did: the old package is hashed, and not copied"
    keep_model(tmp_path / 'm')
    read, real = [], guard._hash_of
    monkeypatch.setattr(guard, '_hash_of', lambda path: read.append(path.name) or real(path))
    keep_model(tmp_path / 'm')
    assert sorted(read) == ['README.md', 'llm_lab.json', 'model.safetensors', 'tokenizer.json']
    assert replaceable(tmp_path / 'm') == tmp_path / 'm'
    assert snapshot(tmp_path / 'm').keys() == {p.name for p in (tmp_path / 'm').iterdir()}
