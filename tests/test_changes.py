"""Whatever is changed between a stop and `--resume` is obeyed, refused in one line, or harmless.

Nothing is silent.

A tiny run is stopped after 8 of 12 steps. Beside it lie two decoys, started later: a run of
another config of the same name, and one that only tried. Five hundred times something is
changed: a file of the run is damaged, a checkpoint moved, the config edited, the text replaced,
the environment another. Then a fork of this process runs `llm-lab train … --resume`."""

import json
import os
import re
import random
import shutil
import signal
import sys
import traceback
import warnings
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import accelerate  # noqa: F401 so that no fork has to, nor the next two
import filelock  # noqa: F401
import omegaconf  # noqa: F401
import pytest
import torch
import torch._dynamo
import yaml
from safetensors.torch import load as tensors_from
from safetensors.torch import save as tensor_bytes

from cases import some
from helpers import file_hash, json_lines
from llm_lab import cli, runs
from llm_lab.checkpoint import CLOCKS
from llm_lab.config import SECTIONS, as_data, read_config, write_config
from llm_lab.package import write_manifest

pytestmark = [
    pytest.mark.usefixtures('one_thread'),
    pytest.mark.skipif(not hasattr(os, 'fork'), reason='each life is a fork'),
]
WORDS = 'to be or not that is the question whether nobler in mind'.split()
TYPED = 'train.weight_decay=0.2'  # when the run began; its file does not say so
STOP, END = 8, 12
FILE = dict(
    data=dict(corpus='own.txt', length=16),
    model=dict(d_model=8, n_layers=1, n_heads=2, dropout=0.1),
    train=dict(steps=END, batch_size=4, lr=0.02, optimizer='adamw', warmup=2),
    eval=dict(every=4, tokens=60, sample_every=4, sample_tokens=3, prompt='to be'),
    log=dict(every=2, checkpoint_every=3, keep=2),
)
FREE = ('log.', 'eval.', 'train.steps', 'train.threads')


def text(seed, lines=60):
    luck = random.Random(seed)
    return '\n'.join(' '.join(luck.choices(WORDS, k=6)) for _ in range(lines)) + '\n'


def rows(path):
    "The lines of a .jsonl file, without what the clock says"
    lines = json_lines(path) if path.is_file() else []
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in lines]


class World:
    """A home, a folder to work in and another one; they can be had again as they were when the run
    was stopped"""

    def __init__(self, desk):
        self.desk = desk
        self.here = desk / 'world'
        self.kept = desk / 'kept'
        self.home, self.work, self.other = (self.here / n for n in ('home', 'work', 'else'))
        self.runs = self.home / 'experiments' / 'my' / 'runs'
        self.run = self.runs / 'x'

    def again(self):
        shutil.rmtree(self.here, ignore_errors=True)
        shutil.copytree(self.kept, self.here, symlinks=True)

    def step(self, n):
        return self.run / 'checkpoints' / f'step-{n:06d}'

    def life(self, *argv, cwd=None, env=(), before=lambda: None):
        "(exit code, what it printed, what it said as an error) of `llm-lab` in a fork"
        sys.stdout.flush()
        if not (pid := os.fork()):
            code = 99
            try:
                for n, name in ((1, 'out'), (2, 'err')):
                    os.dup2(
                        os.open(self.desk / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), n
                    )
                sys.stdout, sys.stderr = (open(n, 'w', closefd=False) for n in (1, 2))
                warnings.resetwarnings()
                warnings.simplefilter('ignore', DeprecationWarning)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                for k, v in {
                    'LLM_LAB_HOME': str(self.home),
                    'LLM_LAB_DATA': None,
                    **dict(env),
                }.items():
                    os.environ.update({k: v}) if v is not None else os.environ.pop(k, None)
                os.chdir(cwd or self.work)
                sys.argv = ['llm-lab']
                runs._git = lambda *a: ''
                runs.TrainingRun.measure = lambda job: vars(job).update(work=1, peak=1)
                before()
                code = cli.main([str(a) for a in argv])
            except SystemExit as e:
                code = e.code
            except BaseException:
                traceback.print_exc()
            finally:
                for f in (sys.stdout, sys.stderr):
                    f.flush()
                os._exit(code if isinstance(code, int) else 1)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return code, *((self.desk / name).read_text(errors='replace') for name in ('out', 'err'))

    def make(self):
        "The stopped run, the decoys; then what a life without any change leaves"
        for folder in (self.home, self.work, self.other):
            folder.mkdir(parents=True)
        (self.work / 'own.txt').write_text(text(0))
        (self.work / 'other.txt').write_text(text(1))
        (self.work / 'my.yaml').write_text(yaml.safe_dump(FILE))
        theirs = {
            **FILE,
            'train': {**FILE['train'], 'lr': 0.1},
            'data': {**FILE['data'], 'corpus': '../work/other.txt'},
        }
        (self.other / 'my.yaml').write_text(yaml.safe_dump(theirs))
        for argv, cwd, before, code in (
            (['my.yaml', TYPED, '--run', 'x'], self.work, lambda: stop_at(STOP), 143),
            (['my.yaml', '--run', 'z'], self.other, lambda: stop_at(STOP), 143),
            (['my.yaml', '--smoke'], self.work, lambda: None, 0),
        ):
            done = self.life('train', *argv, cwd=cwd, before=before)
            assert done[0] == code, done
        shutil.move(self.here, self.kept)
        self.again()
        done = self.life('train', '--resume', 'x')
        assert done[0] == 0 and f'goes on from step {STOP} of experiments/my/runs/x\n' in done[1], (
            done
        )
        self.whole = self.left()
        return self

    def left(self, folder=None):
        "(hashes of weights, memory and losses at the last step, rows of the log, samples)"
        folder = folder or self.run
        last = max((folder / 'checkpoints').glob('step-*'), key=lambda p: p.name)
        bits = [file_hash(last / f'{name}.safetensors') for name in ('model', 'optimizer')]
        return last.name, bits, *(rows(folder / f'{name}.jsonl') for name in ('metrics', 'samples'))


def stop_at(step, number=signal.SIGTERM):
    "In a fork: the system asks the run to end after that step, or kills it"
    real = runs.TrainingRun.record

    def record(job, state):
        if state.step == step:
            os.kill(os.getpid(), number)
        return real(job, state)

    runs.TrainingRun.record = record


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    memory = Path('/dev/shm')
    desk = tmp_path_factory.mktemp('changes')
    if os.access(memory, os.W_OK):
        (desk := memory / f'llm-lab-changes-{os.getpid()}').mkdir()
    try:
        yield World(desk.resolve()).make()
    finally:
        shutil.rmtree(desk, ignore_errors=True)


# ---- what a change is, and what has to come of it


class Change:
    "What is done to a world, how the run is gone on with, and what may come of it"

    def __init__(self, name, do, argv=('my.yaml',), names=(), may='any', says='', **how):
        self.name = name
        self.do = do
        self.argv = argv
        self.names = names
        self.may = may
        self.says = says
        self.how = how
        self.key = self.value = (
            None  # a key of the config, and what it is when the change is obeyed
        )


def outcome(w, change):
    "'refused', 'harmless', 'obeyed' or 'said'; an AssertionError for anything else"
    w.again()
    change.do(w)
    before = {
        p: file_hash(p) for p in w.run.rglob('*') if p.is_file() and p.name not in ('.lock', '.pid')
    }
    code, out, err = w.life(
        'train', *change.argv, *([] if '--resume' in change.argv else ['--resume']), **change.how
    )
    told = (change.name, code, out, err)
    assert 'Traceback' not in err and code in (0, 1), told
    if code == 1:
        assert err.count('\n') == 1 and err.startswith('llm-lab: ') and len(err) < 1000, told
        assert any(str(n) in err for n in change.names), (change.names, told)
        assert {p: file_hash(p) for p in before if p.is_file()} == before, (
            told
        )  # nothing was cleared
        return 'refused'
    if change.says == 'new':  # there is nothing to go on with, and it says so
        assert 'there is no run of' in out and 'a new one begins' in out, told
        return 'said'
    assert 'goes on from step ' in out, told
    assert change.says in out + err, (change.says, told)
    folder = w.home / out.partition('kept in ')[2].strip()
    if change.key:
        section, _, key = change.key.partition('.')
        assert (
            getattr(getattr(read_config(folder / 'config.yaml'), section), key) == change.value
        ), told
        assert f'{change.key}=' in out + err, told
    last, bits, *logs = w.left(folder)
    if change.key and change.key not in ('train.threads',):
        if (last, bits) == w.whole[:2] or change.key == 'train.steps':
            return 'obeyed'
    if (last, bits) == w.whole[:2]:
        for name, mine, whole in zip(('metrics', 'samples'), logs, w.whole[2:]):
            assert mine == whole or f'{name}.jsonl' in err, told
        return 'harmless' if 'may differ' not in err else 'said'
    assert 'may differ' in err and any(str(n) in err for n in change.names), (change.names, told)
    return 'said'


# ---- the kinds of change; each is a generator of `Change`s, drawn by a seed


def touched(path, way, luck):
    "Damage a file"
    if path.is_dir():
        shutil.rmtree(path)
        return
    data = path.read_bytes() if path.exists() else b''
    at = luck.randrange(max(1, len(data)))
    new = {
        'flip': data[:at] + bytes([data[at] ^ 1 << luck.randrange(8)]) + data[at + 1 :]
        if data
        else b'\x01',
        'cut': data[:at],
        'empty': b'',
        'append': data + luck.choice([b'#', b'\n{}', b'\xff', b'notes\n']),
        'junk': luck.randbytes(50),
        'digit': bytes(
            luck.choice(b'123456789') if 48 <= c < 58 and luck.random() < 0.2 else c for c in data
        ),
        'zeros': data[:at] + bytes(len(data) - at),
    }
    if way in new:
        path.write_bytes(new[way])
        return
    path.unlink(missing_ok=True)
    if way == 'folder':
        path.mkdir()
    if way == 'bak':
        path.with_name(path.name + '.bak').write_bytes(data)
    if way == 'link':
        path.symlink_to('/dev/null')


WAYS = ('flip', 'digit', 'cut', 'empty', 'append', 'junk', 'zeros', 'gone', 'folder', 'bak', 'link')
SMALL = (
    'config.yaml',
    'run.json',
    'latest',
    'best',
    'metrics.jsonl',
    'metrics.csv',
    'samples.jsonl',
    '../latest',
    '.pid',
    '.lock',
)


def files_of_the_run(n, luck):
    "A small file of the run is damaged, deleted, renamed"
    for k in range(n):
        name = SMALL[k % len(SMALL)]
        way = luck.choice(WAYS)
        by_path = luck.random() < 0.5
        seed = luck.random()
        c = Change(
            f'{way} {name}',
            lambda w, name=name, way=way, seed=seed: touched(
                w.run / name, way, random.Random(seed)
            ),
            ['--resume', 'my/x'] if by_path else ['my.yaml'],
            [Path(name).name, 'metrics.jsonl'] if 'metrics' in name else [Path(name).name],
        )
        if name == 'run.json' and way in ('gone', 'bak', 'folder'):
            c.names += ['train.weight_decay', 'my.yaml']
        yield c


def files_of_a_checkpoint(n, luck):
    "One file of the newest checkpoint, or of an older one"
    for _ in range(n):
        step = luck.choice([STOP, STOP, 6])
        way = luck.choice(WAYS)
        pick = luck.random()

        def do(w, step=step, way=way, pick=pick):
            files = sorted(w.step(step).iterdir())
            touched(files[int(pick * len(files))], way, random.Random(pick))

        yield Change(
            f'{way} in step {step}',
            do,
            luck.choice([['my.yaml'], ['--resume', 'x']]),
            [f'step-{step:06d}'],
        )


def poisoned(w, step, luck):
    "A checkpoint whose weights are not finite, sealed as if all were well"
    place = w.step(step)
    weights = tensors_from((place / 'model.safetensors').read_bytes())
    first = luck.choice(sorted(k for k, v in weights.items() if v.dim() == 2))
    weights[first][0, 0] = luck.choice([float('nan'), float('inf')])
    (place / 'model.safetensors').write_bytes(tensor_bytes(weights))
    said = json.loads((place / 'package.json').read_text())
    write_manifest(
        place,
        'package.json',
        said['files'],
        **{k: v for k, v in said.items() if k not in ('format', 'files', 'sha256')},
    )
    files = [f for f in json.loads((place / 'manifest.json').read_text())['files']]
    write_manifest(
        place, 'manifest.json', files, sizes={f: (place / f).stat().st_size for f in files}
    )


def from_the_decoy(w, step):
    shutil.copytree(w.runs / 'z' / 'checkpoints' / f'step-{STOP:06d}', w.step(step))


def checkpoints(n, luck):
    "Whole checkpoints come, go, are renamed, copied, or hold NaN or infinity"
    newest, all_gone = f'step-{STOP:06d}', ['no checkpoint']

    def gone(w, *more):
        shutil.rmtree(w.run / 'checkpoints')
        for name in more:
            (w.run / name).unlink()

    kinds = [
        (
            'the newest is gone',
            lambda w: shutil.rmtree(w.step(STOP)),
            'harmless',
            'from step 6 of',
            [],
        ),
        ('all are gone', gone, 'refused', '', all_gone),
        (
            'all are gone, and their names',
            lambda w: gone(w, 'latest', 'best'),
            'refused',
            '',
            all_gone,
        ),
        (
            'all are gone, the folder is there',
            lambda w: (gone(w), (w.run / 'checkpoints').mkdir()),
            'refused',
            '',
            all_gone,
        ),
        (
            'all are renamed',
            lambda w: (w.run / 'checkpoints').rename(w.run / 'checkpoints.old'),
            'refused',
            '',
            all_gone,
        ),
        (
            'a copy beside it',
            lambda w: shutil.copytree(w.step(STOP), w.step(STOP).with_name(f'{newest}-backup')),
            'harmless',
            'step 8',
            [],
        ),
        (
            'a copy as a later step',
            lambda w: shutil.copytree(w.step(STOP), w.step(10)),
            'refused',
            '',
            ['step-000010'],
        ),
        (
            'a copy as an earlier step',
            lambda w: shutil.copytree(w.step(STOP), w.step(1)),
            'harmless',
            'step 8',
            [],
        ),
        (
            'renamed to a later step',
            lambda w: w.step(STOP).rename(w.step(11)),
            'refused',
            '',
            ['step-000011'],
        ),
        (
            'renamed to another word',
            lambda w: w.step(STOP).rename(w.step(STOP).with_name('good')),
            'harmless',
            'step 6',
            [],
        ),
        (
            'a file called so',
            lambda w: w.step(20).write_text('mine'),
            'refused',
            '',
            ['step-000020'],
        ),
        ('an empty folder called so', lambda w: w.step(20).mkdir(), 'refused', '', ['step-000020']),
        ('not finite', lambda w: poisoned(w, STOP, luck), 'harmless', 'is left out', []),
        ('not finite in an older one', lambda w: poisoned(w, 6, luck), 'harmless', 'step 8', []),
        (
            "another run's",
            lambda w: (shutil.rmtree(w.step(STOP)), from_the_decoy(w, STOP)),
            'refused',
            '',
            ['train.lr', 'data.corpus'],
        ),
        (
            "a hidden folder, a reader's notes",
            lambda w: (w.step(3).with_name('.mine').mkdir(), (w.run / 'notes.txt').write_text('x')),
            'harmless',
            '',
            [],
        ),
    ]
    for k in range(n):
        name, do, may, says, names = kinds[k % len(kinds)]
        argv = [['my.yaml'], ['--resume', 'my/x'], ['--resume', 'x']][k // len(kinds) % 3]
        yield Change(name, do, argv, names, may, says)


def folders(n, luck):
    """The run, its experiment, its home, the working folder: renamed, copied, linked, called by
    another path"""

    def moved(a, b):
        return lambda w: (b(w).parent.mkdir(parents=True, exist_ok=True), a(w).rename(b(w)))

    def the_run(w):
        return w.run

    def later_smoke(w):
        os.utime(w.runs / 'smoke' / 'run.json')
        (w.runs / 'latest').write_text('smoke\n')

    def authors(w):
        folder = w.home / 'experiments' / 'mine'
        folder.mkdir()
        (folder / 'config.yaml').write_text('# my notes\n' + yaml.safe_dump(FILE))

    def relinked(w):
        w.run.rename(w.here / 'far')
        w.run.symlink_to(w.here / 'far')

    x = 'experiments/my/runs/x'
    kinds = [
        (
            'renamed, by its name',
            moved(the_run, lambda w: w.runs / 'y2'),
            ['--resume', 'y2'],
            'harmless',
            [],
            {},
        ),
        (
            'renamed, by its config',
            moved(the_run, lambda w: w.runs / 'y2'),
            ['my.yaml'],
            'harmless',
            [],
            {},
        ),
        (
            'renamed, by its old name',
            moved(the_run, lambda w: w.runs / 'y2'),
            ['--resume', 'x'],
            'refused',
            ['x is neither'],
            {},
        ),
        (
            'the experiment renamed',
            moved(lambda w: w.runs.parent, lambda w: w.runs.parent.with_name('our')),
            ['--resume', 'our/x'],
            'harmless',
            [],
            {},
        ),
        (
            'moved out of its home',
            moved(the_run, lambda w: w.here / 'far' / 'x'),
            ['--resume', '../far/x'],
            'harmless',
            [],
            {},
        ),
        ('linked', relinked, ['--resume', 'my/x'], 'harmless', [], {}),
        (
            'a copy in the same folder',
            lambda w: shutil.copytree(w.run, w.runs / 'x2'),
            ['--resume', 'x'],
            'harmless',
            [],
            {},
        ),
        ('by its path from the home', lambda w: None, ['--resume', x], 'harmless', [], {}),
        ('by its whole path', lambda w: None, ['--resume', 'HOME/' + x], 'harmless', [], {}),
        (
            'by a path with dots',
            lambda w: None,
            ['--resume', f'../home/{x}/../x/'],
            'harmless',
            [],
            {},
        ),
        (
            'by its newest checkpoint',
            lambda w: None,
            ['--resume', f'{x}/checkpoints/step-000008'],
            'harmless',
            [],
            {},
        ),
        (
            'by an older checkpoint',
            lambda w: None,
            ['--resume', f'{x}/checkpoints/step-000006'],
            'harmless',
            [],
            {},
        ),
        (
            'by its config and its name',
            lambda w: None,
            ['my.yaml', '--run', 'x'],
            'harmless',
            [],
            {},
        ),
        (
            'by its config and its path',
            lambda w: None,
            ['my.yaml', '--resume', 'my/x'],
            'harmless',
            [],
            {},
        ),
        (
            "as another config's",
            lambda w: None,
            ['../else/my.yaml', '--resume', 'my/x'],
            'refused',
            ['my.yaml'],
            {},
        ),
        (
            "by another config's name and its own",
            lambda w: None,
            ['my.yaml', '--run', 'z'],
            'refused',
            ['my.yaml'],
            {},
        ),
        (
            'from another folder',
            lambda w: None,
            ['--resume', 'my/x'],
            'harmless or refused',
            ['own.txt'],
            dict(cwd='else'),
        ),
        (
            'its config from another folder',
            lambda w: None,
            ['../work/my.yaml'],
            'harmless or refused',
            ['own.txt'],
            dict(cwd='else'),
        ),
        (
            'the config is moved',
            moved(lambda w: w.work / 'my.yaml', lambda w: w.work / 'sub' / 'my.yaml'),
            ['sub/my.yaml'],
            'harmless',
            [],
            {},
        ),
        (
            'the config is copied',
            lambda w: shutil.copytree(w.work, w.here / 'copy'),
            ['my.yaml'],
            'new',
            [],
            dict(cwd='copy'),
        ),
        ('a smoke run is the latest', later_smoke, ['my.yaml'], 'harmless', [], {}),
        (
            'a smoke run by its name',
            lambda w: None,
            ['--resume', 'my/smoke'],
            'refused',
            ['smoke'],
            {},
        ),
        (
            "an author's folder",
            authors,
            ['--resume', 'experiments/mine'],
            'refused',
            ['experiments/mine'],
            {},
        ),
        (
            'the folder of all runs',
            lambda w: None,
            ['--resume', 'experiments/my/runs'],
            'refused',
            ['runs'],
            {},
        ),
        (
            'the latest is gone',
            lambda w: (w.runs / 'latest').unlink(),
            ['my.yaml'],
            'harmless',
            [],
            {},
        ),
        (
            'the latest names one that is gone',
            lambda w: (w.runs / 'latest').write_text('gone\n'),
            ['my.yaml'],
            'harmless',
            [],
            {},
        ),
        (
            'two runs of one name',
            lambda w: shutil.copytree(w.runs.parent, w.runs.parent.with_name('our')),
            ['--resume', 'x'],
            'refused',
            ['my/x'],
            {},
        ),
    ]
    for k in range(n):
        name, do, argv, may, names, how = kinds[k % len(kinds)]
        says = 'new' if may == 'new' else ''
        yield Change(name, do, argv, names, 'said' if may == 'new' else may, says, **how)


def another(path, f, now, luck):
    "Another value of a key that it may have; None where none is known"
    words, kind = f.metadata.get('of'), str(f.type)
    if path == 'data.corpus':
        return 'other.txt'
    if path == 'data.splits':
        return {'val': 0.2}
    if path == 'train.lora':
        return {'rank': 2}
    if words:
        others = [w for w in words if w not in (now, 'auto')]
        return luck.choice(others or ['Mine'])  # that nobody has registered
    if 'dict' in kind:
        part = dict(
            mlp='MLP',
            attn='Attention',
            norm='torch.nn:RMSNorm',
            pos='SinusoidalPositions',
            lm_head='SoftcapHead',
            init='gpt2_init',
            block='ParallelBlock',
            objective='MaskedDiffusion',
        )
        return {'part': part[path.partition('.')[2]]}
    if 'bool' in kind:
        return not now
    if kind in ('str', "<class 'str'>"):
        return luck.choice(['the question', 'or', ''])
    if 'float' in kind:
        return luck.choice([round(now * 1.5 + 0.01, 4), round(now / 2 + 0.001, 4)])
    if path == 'train.steps':
        return luck.choice([END + 2, END - 2, STOP, 5])
    if path in ('train.threads', 'model.n_heads', 'model.n_kv_heads'):
        return {'train.threads': 2, 'model.n_heads': 4, 'model.n_kv_heads': 1}[path]
    return luck.choice([now + 1, now * 2]) if now else 7


def edits(luck):
    "(path, another value, the value that the run has) of every key, for ever"
    cfg = read_config({**FILE, 'train': {**FILE['train'], 'weight_decay': 0.2, 'threads': 1}})
    paths = [(s, f) for s, kind in SECTIONS.items() for f in fields(kind)]
    while True:
        luck.shuffle(paths)
        for s, f in paths:
            now = getattr(getattr(cfg, s), f.name)
            if f'{s}.{f.name}' == 'log.tracker':
                continue  # another package
            value = another(f'{s}.{f.name}', f, now, luck)
            if value != now:
                yield f'{s}.{f.name}', value, now


def judged(change, path, value):
    """What has to come of another value: obeyed where it does not reach back, else refused by the
    name of the key"""
    change.names = [path, path.partition('.')[2]]
    if path == 'train.steps' and value < STOP or not path.startswith(FREE):
        change.may = 'refused'
    else:
        change.key, change.value = path, value
        change.may = 'obeyed or said'
    return change


def rewritten(path, key, value=..., drop=False):
    "Change one key of a .yaml file"
    said = yaml.safe_load(path.read_text())
    section, _, word = key.partition('.')
    if drop:
        said[section].pop(word)
    else:
        said.setdefault(section, {})[word] = value
    path.write_text(yaml.safe_dump(said))


def the_file_is_edited(n, luck):
    """A key of my.yaml says something else now, or what the run has anyway; or the file cannot be
    read any more"""
    draws, default = edits(luck), read_config({})
    for k in range(n):
        path, value, now = next(draws)
        section, _, key = path.partition('.')
        if k % 10 == 9:
            wrong = luck.choice(
                [
                    'train: {stepz: 5}',
                    'train: {lr: fast}',
                    'train: [',
                    'nothing',
                    '[1, 2]',
                    'train: 5',
                    'trian: {}',
                ]
            )
            names = ['train', 'my.yaml', 'trian', 'nothing', 'my']
            yield Change(
                f'the file says {wrong}',
                lambda w, wrong=wrong: (w.work / 'my.yaml').write_text(wrong),
                names=names,
                may='refused',
            )
        elif k % 10 == 8 and key in FILE[section]:
            default_value = getattr(getattr(default, section), key)
            c = Change(
                f'{path} is left out',
                lambda w, path=path: rewritten(w.work / 'my.yaml', path, drop=True),
            )
            if default_value == now:
                c.may = 'harmless'
                yield c
            elif path not in ('train.steps', 'eval.tokens', 'eval.every', 'log.every'):
                yield judged(c, path, default_value)
        elif k % 10 == 7:
            yield Change(
                f'{path}={now} is what it is',
                lambda w, path=path, now=now: rewritten(w.work / 'my.yaml', path, now),
                may='harmless',
            )
        else:
            c = Change(
                f'{path}: {value} in the file',
                lambda w, path=path, value=value: rewritten(w.work / 'my.yaml', path, value),
            )
            if luck.random() < 0.3:
                c.argv = ['my.yaml', '--resume', 'my/x']
            yield judged(c, path, value)


def typed(path, value):
    if value is None:
        value = 'null'
    elif isinstance(value, (dict, bool)):
        value = json.dumps(value)
    return f'{path}={value}'


def something_is_typed(n, luck):
    "key=value on the command line, with the config or with the run"
    draws = edits(luck)
    for k in range(n):
        path, value, now = next(draws)
        argv = luck.choice([['my.yaml'], ['--resume', 'x'], ['my.yaml', '--resume', 'my/x']])
        if k % 10 == 9:
            wrong = luck.choice(['stepz=5', 'train.lr=fast', 'every=3', 'steps=0', 'lr', 'train=5'])
            yield Change(
                f'{wrong} is typed',
                lambda w: None,
                [*argv, wrong],
                [wrong.partition('=')[0], 'train', 'lr'],
                'refused',
            )
        elif k % 10 == 8:
            if now == '' or isinstance(now, str) and path != 'data.corpus' and ' ' in now:
                continue
            yield Change(
                f'{path}={now} is typed, as it is',
                lambda w: None,
                [*argv, typed(path, now)],
                may='harmless',
            )
        else:
            yield judged(
                Change(f'{path}={value} is typed', lambda w: None, [*argv, typed(path, value)]),
                path,
                value,
            )


def the_run_s_config_is_edited(n, luck):
    "A key of the config.yaml that the run has written"
    draws = edits(luck)
    for _ in range(n):
        path, value, _now = next(draws)

        def do(w, path=path, value=value):
            cfg = read_config(w.run / 'config.yaml')
            section, _, key = path.partition('.')
            data = as_data(cfg)
            data[section][key] = value
            (w.run / 'config.yaml').write_text(yaml.safe_dump(data))
            try:
                made = replace(cfg, **{section: replace(getattr(cfg, section), **{key: value})})
            except ValueError:
                return  # not together: the plain text above is refused
            (w.run / 'config.yaml').unlink()
            write_config(made, w.run / 'config.yaml')

        argv = luck.choice([['my.yaml'], ['--resume', 'x']])
        yield judged(Change(f'{path}: {value} in config.yaml', do, argv), path, value)


def packed_of(w):
    return next(p for p in sorted((w.home / 'data' / 'packed').glob('own*')) if p.is_dir())


def the_text(n, luck):
    "The text is edited, replaced, moved, saved in another way; its tokens are damaged or gone"

    def edit(change):
        def do(w):
            path = w.work / 'own.txt'
            path.write_bytes(change(path.read_bytes()))

        return do

    def moved(w):
        (w.work / 'texts').mkdir()
        (w.work / 'own.txt').rename(w.work / 'texts' / 'mine.txt')

    at = luck.randrange(200, 900)
    named = ['data.corpus', 'own.txt']
    kinds = [
        ('one letter more', edit(lambda d: d[:at] + b'e' + d[at:]), ['my.yaml'], 'refused', named),
        ('a line more', edit(lambda d: d + b'to be or not\n'), ['--resume', 'x'], 'refused', named),
        ('cut in half', edit(lambda d: d[: len(d) // 2]), ['my.yaml'], 'refused', named),
        (
            'another text',
            lambda w: (w.work / 'other.txt').replace(w.work / 'own.txt'),
            ['my.yaml'],
            'refused',
            named,
        ),
        ('empty', edit(lambda d: b''), ['my.yaml'], 'refused', named),
        ('no UTF-8', edit(lambda d: b'\xff' + d), ['--resume', 'x'], 'refused', named),
        ('gone', lambda w: (w.work / 'own.txt').unlink(), ['my.yaml'], 'refused', named),
        (
            'a folder',
            lambda w: ((w.work / 'own.txt').unlink(), (w.work / 'own.txt').mkdir()),
            ['my.yaml'],
            'refused',
            named,
        ),
        ('moved, and said so', moved, ['my.yaml', 'data.corpus=texts/mine.txt'], 'moved', named),
        (
            'moved, and said so to the run',
            moved,
            ['--resume', 'x', 'data.corpus=texts/mine.txt'],
            'moved',
            named,
        ),
        (
            'moved, and the file says so',
            lambda w: (moved(w), rewritten(w.work / 'my.yaml', 'data.corpus', 'texts/mine.txt')),
            ['my.yaml'],
            'moved',
            named,
        ),
        (
            'line ends of Windows',
            edit(lambda d: d.replace(b'\n', b'\r\n')),
            ['my.yaml'],
            'harmless',
            [],
        ),
        ('a mark of order', edit(lambda d: b'\xef\xbb\xbf' + d), ['my.yaml'], 'harmless', []),
        (
            'only its time',
            lambda w: os.utime(w.work / 'own.txt', (0, 0)),
            ['my.yaml'],
            'harmless',
            [],
        ),
        ('tokens gone', lambda w: shutil.rmtree(packed_of(w)), ['my.yaml'], 'harmless', []),
        (
            'all data gone',
            lambda w: shutil.rmtree(w.home / 'data'),
            ['--resume', 'x'],
            'harmless',
            [],
        ),
        (
            'tokens damaged',
            lambda w: touched(packed_of(w) / 'train.bin', 'flip', luck),
            ['my.yaml'],
            'refused',
            ['train.bin'],
        ),
        (
            'tokens cut',
            lambda w: touched(packed_of(w) / 'val.bin', 'cut', luck),
            ['my.yaml'],
            'refused',
            ['val.bin'],
        ),
        (
            'tokenizer damaged',
            lambda w: touched(packed_of(w) / 'tokenizer' / 'tokenizer.json', 'flip', luck),
            ['my.yaml'],
            'refused',
            ['tokenizer.json'],
        ),
        (
            'what the folder says of itself',
            lambda w: touched(packed_of(w) / 'meta.json', 'cut', luck),
            ['my.yaml'],
            'refused',
            ['meta.json'],
        ),
    ]
    for k in range(n):
        name, do, argv, may, names = kinds[k % len(kinds)]
        c = Change(name, do, argv, names, 'harmless' if may == 'moved' else may)
        if may == 'moved':
            c.says = 'data.corpus='
        yield c


def the_environment(n, luck):
    "Threads, device, home, precision, language; what PyTorch was told before"

    def said(what, **env):
        return f'{what} {env}', ['my.yaml'], dict(env=env), 'said', [*env]

    def quiet(**env):
        return f'{env}', ['my.yaml'], dict(env=env), 'harmless', [*env]

    kinds = [
        quiet(OMP_NUM_THREADS='3'),
        quiet(OMP_NUM_THREADS=None),
        quiet(MKL_NUM_THREADS='2'),
        quiet(LLM_LAB_DEVICE='cpu'),
        (
            'a device that is none',
            ['my.yaml'],
            dict(env={'LLM_LAB_DEVICE': 'toaster'}),
            'refused',
            ['LLM_LAB_DEVICE'],
        ),
        (
            'a device without numbers',
            ['--resume', 'x'],
            dict(env={'LLM_LAB_DEVICE': 'meta'}),
            'refused',
            ['LLM_LAB_DEVICE'],
        ),
        (
            'another home, by its config',
            ['my.yaml'],
            dict(env={'LLM_LAB_HOME': 'HERE/new'}),
            'new',
            [],
        ),
        (
            'another home, by its path',
            ['--resume', '../home/experiments/my/runs/x'],
            dict(env={'LLM_LAB_HOME': 'HERE/new'}),
            'harmless',
            [],
        ),
        (
            'another home, by its name',
            ['--resume', 'x'],
            dict(env={'LLM_LAB_HOME': 'HERE/new'}),
            'refused',
            ['x is neither'],
        ),
        said('precision', ONEDNN_DEFAULT_FPMATH_MODE='BF16'),
        said('precision', DNNL_DEFAULT_FPMATH_MODE='ANY'),
        said('precision', NVIDIA_TF32_OVERRIDE='1'),
        said('instructions', ONEDNN_MAX_CPU_ISA='AVX2'),
        said('instructions', ATEN_CPU_CAPABILITY='default'),
        said('instructions', MKL_ENABLE_INSTRUCTIONS='SSE4_2'),
        said('order', MKL_CBWR='COMPATIBLE'),
        quiet(ACCELERATE_MIXED_PRECISION='bf16'),
        quiet(ACCELERATE_GRADIENT_ACCUMULATION_STEPS='4'),
        quiet(PYTHONHASHSEED='7'),
        quiet(LANG='C'),
        quiet(LC_ALL='tr_TR.UTF-8'),
        quiet(TZ='Asia/Tokyo'),
        quiet(LLM_LAB_STILL='1'),
        quiet(LLM_LAB_DATA='/nowhere'),
        quiet(HOME='/nowhere'),
        quiet(COLUMNS='20'),
        (
            'threads in this process',
            ['my.yaml'],
            dict(before=lambda: torch.set_num_threads(2)),
            'harmless',
            [],
        ),
        (
            'precision in this process',
            ['my.yaml'],
            dict(before=lambda: torch.set_float32_matmul_precision('medium')),
            'said',
            ['matmul'],
        ),
        (
            'chance in this process',
            ['my.yaml'],
            dict(before=lambda: (torch.manual_seed(9), torch.rand(5), random.seed(3))),
            'harmless',
            [],
        ),
        ('threads are typed', ['my.yaml', 'train.threads=2'], {}, 'said', ['threads']),
    ]
    for k in range(n):
        name, argv, how, may, names = kinds[k % len(kinds)]
        c = Change(
            name,
            lambda w: None,
            argv,
            names,
            'said' if may == 'new' else may,
            'new' if may == 'new' else '',
            **how,
        )
        yield c


KINDS = {
    files_of_the_run: 110,
    files_of_a_checkpoint: 70,
    checkpoints: 48,
    folders: 54,
    the_file_is_edited: 96,
    something_is_typed: 60,
    the_run_s_config_is_edited: 40,
    the_text: 24,
    the_environment: 34,
}


def drawn(kind):
    "All changes of a kind"
    n, luck, found = KINDS[kind], random.Random(kind.__name__), []
    made = kind(2 * n, luck)
    while len(found) < n:
        found.append(next(made))
    return found


def test_there_are_five_hundred_changes_and_no_key_is_forgotten():
    assert sum(KINDS.values()) >= 500
    names = ' '.join(c.name for k in KINDS for c in drawn(k))
    keys = [f'{s}.{f.name}' for s, kind in SECTIONS.items() for f in fields(kind)]
    assert [k for k in keys if k not in names] == ['log.tracker']


@pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind.__name__)
def test_nothing_that_is_changed_is_passed_over_in_silence(kind, world, record_property):
    tally, wrong = Counter(), []
    for change in some(drawn(kind)):
        how = {k: world.here / v if k == 'cwd' else v for k, v in change.how.items()}
        if 'env' in how:
            how['env'] = {
                k: v and v.replace('HERE', str(world.here)) for k, v in how['env'].items()
            }
        change.how = how
        change.argv = [str(a).replace('HOME', str(world.home)) for a in change.argv]
        try:
            came = outcome(world, change)
            assert change.may == 'any' or came in change.may, (change.name, came, change.may)
            tally[came] += 1
        except AssertionError as e:
            wrong.append(str(e)[:1500])
    assert wrong == []
    record_property('tally', dict(tally))
    print(f'{kind.__name__}: {dict(tally)}')


# ---- where a run begins that goes on


def killed(step):
    return lambda: stop_at(step, signal.SIGKILL)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_at_0_and_says_so(world):
    world.again()
    shutil.rmtree(world.run)
    # what was typed at first is not forgotten
    for more in ([TYPED, '--run', 'x'], ['--run', 'x', '--resume']):
        assert world.life('train', 'my.yaml', *more, before=killed(2))[0] == -signal.SIGKILL
    code, out, err = world.life('train', 'my.yaml', '--resume')
    assert code == 0 and 'goes on from step 0 of experiments/my/runs/x\n' in out, (out, err)
    assert world.left() == world.whole


def test_a_branch_that_was_killed_before_its_first_checkpoint_begins_where_it_began(world):
    world.again()
    at = f'my/x/checkpoints/{world.step(6).name}'
    words = 'goes on from step 6 of experiments/my/runs/x in a branch'
    assert (
        world.life('train', '--resume', f'experiments/my/runs/{at[3:]}', before=killed(STOP))[0]
        == -signal.SIGKILL
    )
    (branch,) = {*world.runs.iterdir()} - {world.runs / n for n in ('x', 'z', 'smoke', 'latest')}
    assert not list((branch / 'checkpoints').glob('*')) and (branch / 'metrics.jsonl').is_file()
    shutil.copytree(branch, world.here / 'branch')
    code, out, err = world.life('train', '--resume', branch.name)
    assert code == 0 and words in out, (out, err)
    assert world.left(branch) == world.whole
    shutil.rmtree(branch)
    shutil.move(world.here / 'branch', branch)
    shutil.rmtree(world.step(6))
    code, out, err = world.life('train', '--resume', branch.name)
    assert (
        code == 1 and err.count('\n') == 1 and 'is a branch of' in err and world.step(6).name in err
    ), err
    assert rows(branch / 'metrics.jsonl')  # its log is as it was


def test_a_run_of_an_older_version_goes_on(world):
    "Its checkpoints keep no config, its run.json no hash and no file"
    world.again()
    for place in (world.run / 'checkpoints').iterdir():
        state = json.loads((place / 'state.json').read_text())
        del state['facts']
        (place / 'state.json').write_text(json.dumps(state))
        said = json.loads((place / 'manifest.json').read_text())
        write_manifest(place, 'manifest.json', said['files'], sizes=said['sizes'])
    told = json.loads((world.run / 'run.json').read_text())
    for key in ('config', 'sha256'):
        del told[key]
    (world.run / 'run.json').write_text(json.dumps(told, indent=1) + '\n')
    kept = world.here / 'kept'
    shutil.copytree(world.run, kept)
    for argv in (['--resume', 'x'], ['my.yaml', '--resume']):
        shutil.rmtree(world.run)
        shutil.copytree(kept, world.run)
        (world.runs / 'latest').write_text('x\n')
        code, out, err = world.life('train', *argv)
        assert code == 0 and 'goes on from step 8 of experiments/my/runs/x\n' in out, (out, err)
        assert world.left()[:3] == world.whole[:3]


@pytest.mark.parametrize('steps', [60, 600, 6000])
def test_a_warm_up_of_an_older_version_is_as_long_as_it_was(steps, tmp_path):
    """Its config.yaml says 100, of which runs of fewer than 1,000 steps took a tenth: that is what
    none means now"""
    from llm_lab.runs import _own_config

    cfg = read_config('smoke', [f'train.steps={steps}', 'train.warmup=null'])
    path = tmp_path / 'config.yaml'
    write_config(cfg, path)
    text, n = re.subn(r'  min_lr: .*\n', '', path.read_text())
    text, m = re.subn('warmup: null', 'warmup: 100', text)
    path.write_text(text)
    assert (n, m) == (1, 1) and _own_config(path).train == cfg.train


def test_what_was_edited_is_remembered(world):
    "An edit counts once; what was typed counts until something else is said"
    world.again()
    rewritten(world.work / 'my.yaml', 'train.steps', 14)
    code, out, _ = world.life('train', 'my.yaml', '--resume')
    assert (
        code == 0 and 'with train.steps=14 (it was 12)' in out and world.left()[0] == 'step-000014'
    )
    code, out, _ = world.life('train', '--resume', 'x', 'train.steps=16')
    assert code == 0 and world.left()[0] == 'step-000016'
    # the file says 14, as it did when it was last read
    code, out, _ = world.life('train', 'my.yaml', '--resume')
    assert code == 0 and 'goes on from step 16 of experiments/my/runs/x, its last one' in out, out
    rewritten(world.work / 'my.yaml', 'train.weight_decay', 0.3)
    code, _, err = world.life('train', 'my.yaml', '--resume')
    assert code == 1 and 'train.weight_decay=0.3: it was 0.2' in err
    rewritten(world.work / 'my.yaml', 'train.weight_decay', 0.2)
    rewritten(world.work / 'my.yaml', 'train.steps', 18)
    assert world.life('train', 'my.yaml', '--resume')[0] == 0 and world.left()[0] == 'step-000018'


def test_a_model_that_has_diverged_is_not_saved(world):
    "The run ends with one line, and the newest checkpoint is the one before"
    world.again()

    def poison():
        real = runs.TrainingRun.save

        def save(job, state):
            if state.step == 6:
                with torch.no_grad():
                    state.model.lm_head.weight[0, 0] = torch.nan
            real(job, state)

        runs.TrainingRun.save = save

    code, out, err = world.life('train', 'my.yaml', '--run', 'wild', before=poison)
    assert code == 1 and err.count('\n') == 1, err
    assert 'head.weight is not finite after step 6' in err
    assert max(p.name for p in (world.runs / 'wild' / 'checkpoints').iterdir()) == 'step-000004'
    code, out, err = world.life('train', '--resume', 'wild')
    assert code == 0 and 'goes on from step 4 of experiments/my/runs/wild\n' in out, (out, err)


# ---- the name of a run is its address


def test_every_command_knows_a_run_by_its_name(world):
    world.again()
    said = {}
    for path in ('x', 'my/x', 'experiments/my/runs/x', world.run, '../home/experiments/my/runs/x'):
        for argv in (['sample', path, '--tokens', '5'], ['eval', path], ['runs', path]):
            code, out, err = world.life(*argv)
            # `sample` says on stderr which run it took
            as_it_should = err.startswith('my/x, step ') if argv[0] == 'sample' else err == ''
            assert code == 0 and as_it_should and err.count('\n') < 2, (argv, err)
            said.setdefault(argv[0], set()).add(out.split('in ')[0])
    assert all(len(outs) == 1 for outs in said.values()), said
    code, out, err = world.life('runs', 'my/x', 'my/z')
    assert code == 0 and {line.strip('* ').split()[0] for line in out.splitlines()[1:3]} == {
        'x',
        'z',
    }, out
    (world.runs / 'begun').mkdir()
    (world.runs / 'begun' / 'metrics.jsonl').touch()
    for argv in (['runs'], ['runs', *sorted(world.runs.iterdir())]):
        code, out, err = world.life(*argv)
        table = out.split('\n\n')[0]
        assert code == 0 and all(f' {name} ' in table for name in ('x', 'z', 'smoke')), (out, err)
        assert err.count('\n') == 1 and 'begun has no metrics' in err, err
    shutil.copytree(world.runs.parent, world.runs.parent.with_name('our'))
    for argv in (['sample', 'x'], ['eval', 'x'], ['runs', 'x'], ['train', '--resume', 'x']):
        code, out, err = world.life(*argv)
        assert code == 1 and err == 'llm-lab: x is the name of 2 models: write my/x or our/x\n', err
    assert world.life('sample', 'our/x', '--tokens', '3')[0] == 0
    code, out, err = world.life('sample', 'our/y')
    assert code == 1 and err.count('\n') == 1 and 'our/y' in err


def test_the_newest_run_of_a_config_is_the_one_that_was_started_last(world):
    world.again()
    assert [p.name for p in run_folders(world)] == ['z', 'x']
    world.life('train', 'my.yaml', '--resume')
    assert [p.name for p in run_folders(world)] == ['x', 'z']


def run_folders(w):
    old = os.environ.get('LLM_LAB_HOME')
    os.environ['LLM_LAB_HOME'] = str(w.home)
    try:
        return runs.runs_of('my')
    finally:
        os.environ.pop('LLM_LAB_HOME') if old is None else os.environ.update(LLM_LAB_HOME=old)


def test_a_path_to_a_run_is_no_config(world):
    "`train RUN --resume` goes on with it"
    world.again()
    code, out, err = world.life('train', '../home/experiments/my/runs/x', '--resume')
    assert code == 0 and 'goes on from step 8 of experiments/my/runs/x\n' in out, (out, err)
    assert world.left() == world.whole
