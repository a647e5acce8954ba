"""What `checkpoint`, `config` and `runs` promise and no notebook shows: runs killed everywhere, in
one process and in two; slips of the finger."""

import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from cases import ALL, HANG
from helpers import file_hash, json_lines

from llm_lab.config import _PATHS, CONFIGS, SECTIONS, config_from_dict, read_config, write_config
from llm_lab.core import LabError

pytestmark = pytest.mark.skipif(
    not hasattr(os, 'fork'), reason='lives are forks, and end by signals that Windows does not have'
)
ROOT = Path(__file__).resolve().parent.parent
# all that may differ between two runs of a config
CLOCKS = {
    'seconds',
    'tokens_per_s',
    'mfu',
    'peak_memory',
}
ENV = {k: v for k, v in os.environ.items() if k not in ('LLM_LAB_DATA', 'LLM_LAB_HOME')} | dict(
    OMP_NUM_THREADS='1',
    PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])),
)
WORDS = ['the', 'cat', 'dog', 'sat', 'on', 'mat', 'log', 'a', 'and', 'then', 'it', 'ran']


class Nursery:
    "lives.py: forks of a process that has PyTorch already"

    def __init__(self, desk):
        self.desk, self.n = desk, 0
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / 'tests' / 'lives.py')],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=ENV,
            text=True,
        )
        self.places = json.loads(self.process.stdout.readline())['ready']

    def ask(self, **order):
        self.process.stdin.write(json.dumps(order) + '\n')
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, home, *argv, env=(), **order):
        self.n += 1
        self.log = str(self.desk / f'life-{self.n}')
        env = {**dict(env), 'LLM_LAB_HOME': str(home)}
        return self.ask(start=dict(argv=[str(a) for a in argv], log=self.log, env=env, **order))[
            'pid'
        ], self.log

    def wait(self, life):
        "How it ended; `out` and `err` are what it said"
        pid, log = life
        return dict(
            self.ask(wait=dict(pid=pid, within=HANG)),
            **{k: Path(f'{log}.{k}').read_text() for k in ('out', 'err')},
        )

    def live(self, home, *argv, **order):
        return self.wait(self.start(home, *argv, **order))

    def end(self):
        self.process.stdin.close()
        assert self.process.wait(HANG) == 0


@pytest.fixture(scope='module')
def desk(tmp_path_factory):
    "A folder in memory where there is one: what is killed here are processes, not disks"
    memory = Path('/dev/shm')
    desk = tmp_path_factory.mktemp('runs')
    if os.access(memory, os.W_OK):
        (desk := memory / f'llm-lab-test-{os.getpid()}').mkdir()
    yield desk
    shutil.rmtree(desk, ignore_errors=True)


@pytest.fixture(scope='module')
def nursery(desk):
    n = Nursery(desk)
    yield n
    n.end()


@pytest.fixture(scope='module')
def text(desk):
    "120 short stories, each of which stands alone"
    luck, path = random.Random(0), desk / 'stories.txt'
    stories = [' '.join(luck.choices(WORDS, k=luck.randint(3, 25))) + '.' for _ in range(120)]
    path.write_text('\n<|endoftext|>\n'.join(stories) + '\n', encoding='utf-8')
    return path


@pytest.fixture(scope='module')
def talk(desk):
    "90 conversations of a word or two, which a row of 16 tokens holds"
    luck, path = random.Random(1), desk / 'talk.jsonl'
    short = [word for word in WORDS if len(word) < 4]
    with open(path, 'w', encoding='utf-8') as file:
        for _ in range(90):
            asked, answer = luck.choices(short, k=2)
            turns = [dict(role='user', content=asked), dict(role='assistant', content=answer)]
            file.write(json.dumps(dict(messages=turns)) + '\n')
    return path


@pytest.fixture
def home(desk):
    "An empty home"
    path = desk / f'home-{time.monotonic_ns()}'
    path.mkdir()
    return path


def settings(text, **change):
    """A tiny run in which everything happens often: dropout, three parts a batch, Muon, rows that
    begin where stories do"""
    own = {
        'data.corpus': text,
        'data.length': 16,
        'data.rows': 'documents',
        'model.d_model': 16,
        'model.n_heads': 2,
        'model.dropout': 0.2,
        'train.steps': 30,
        'train.batch_size': 6,
        'train.accumulate': 3,
        'eval.every': 4,
        'eval.tokens': 300,
        'eval.sample_every': 8,
        'eval.sample_tokens': 5,
        'log.every': 1,
        'log.checkpoint_every': 3,
        'log.keep': 2,
    }
    return [
        'smoke',
        *(
            f'{k}={v}'
            for k, v in {**own, **{k.replace('__', '.'): v for k, v in change.items()}}.items()
        ),
    ]


def folder_of(home, name='x'):
    return home / 'experiments' / 'smoke' / 'runs' / name


def rows_of(folder):
    return json_lines(folder / 'metrics.jsonl')


def timeless(x):
    return {k: v for k, v in x.items() if k not in CLOCKS}


def steps_of(folder):
    return sorted(int(p.name[5:]) for p in (folder / 'checkpoints').glob('step-*'))


def bits(folder):
    """All that a run has left, but for its clocks: weights, optimizer and losses bit by bit, and
    every line that it wrote"""
    place = folder / 'checkpoints' / f'step-{max(steps_of(folder)):06d}'
    rows = rows_of(folder)
    csv = (folder / 'metrics.csv').read_text().splitlines()
    assert [(line.split(',')[0], line.split(',')[3]) for line in csv[1:]] == [
        (str(r['step']), str(r.get('loss', ''))) for r in rows
    ]
    state = json.loads((place / 'state.json').read_text())
    state['facts'].pop('config')  # how many checkpoints stay is no bit of a run
    found = dict(
        files={p.name: file_hash(p) for p in place.glob('*.safetensors')},
        state=timeless(state),
        rows=[*map(timeless, rows)],
        samples=(folder / 'samples.jsonl').read_text(),
        step=place.name,
        names=[(folder / k).read_text() for k in ('latest', 'best')],
    )
    assert {'model.safetensors', 'optimizer.safetensors'} <= found['files'].keys()
    result = json.loads((folder / 'result.json').read_text())
    return dict(found, result={k: v for k, v in timeless(result).items() if k != 'run'})


def assert_same(folder, whole):
    mine = bits(folder)
    assert [k for k in whole if mine[k] != whole[k]] == [], folder


@pytest.fixture(scope='module')
def whole(desk, nursery, text):
    """(the bits of a run that nothing interrupts, how often it came to each place, the seconds it
    took, its checkpoints)"""
    (home := desk / 'whole').mkdir()
    life = nursery.live(home, 'train', *settings(text), '--run', 'x')
    assert life['code'] == 0, life
    return bits(folder_of(home)), life['met'], life['ran'], steps_of(folder_of(home))


# ---- killed everywhere

FIRST = ('packing', 'packed')
LATER = ('taking_up', 'rewriting')
LAST = ('judging', 'concluding')


def deaths_to_die(nursery, met, seconds, luck, kills):
    """Fates by threes: each place before and after, then random moments; in the order in which they
    can come"""

    def order(fate):
        return (
            (fate.get('place') not in FIRST)
            + (fate.get('place') in LATER)
            + 3 * (fate.get('place') in LAST)
        )

    half = ('tearing_rows', 'half_pruning')  # 'before' is in the middle of it
    fates = [
        dict(place=p, when=w)
        for p in nursery.places
        for w in ('before', 'after')
        if w == 'before' or p not in half
    ]
    if kills < len(fates):
        fates = [
            dict(place=p, when='before' if p in half else luck.choice(['before', 'after']))
            for p in nursery.places
        ]
    while len(fates) < kills:
        fates.append(
            dict(after=luck.uniform(0, seconds))
            if luck.random() < 0.6
            else dict(luck.choice(fates))
        )
    luck.shuffle(fates)
    for f in fates:
        if 'place' in f:
            f['k'] = luck.randint(
                1,
                max(
                    1,
                    met.get(f'{f["place"]}/{f["when"]}', dict(rewriting=9).get(f['place'], 1)) // 3,
                ),
            )
    return [sorted(fates[n : n + 3], key=order) for n in range(0, len(fates), 3)]


@pytest.mark.parametrize(
    'place,when,k',
    [
        ('tearing_rows', 'before', 1),
        ('committing', 'after', -1),
        ('pruning', 'before', -1),
        *([('tearing_rows', 'before', k) for k in (2, 3)] if ALL else []),
    ],
)
def test_the_first_lines_and_the_last_names_are_right_after_a_kill(
    place, when, k, nursery, home, text, whole
):
    """A torn head of the table, its first row, the first row of the other file; a last checkpoint
    that is not named, an old one not pruned"""
    k = k if k > 0 else whole[1][f'{place}/{when}']
    for fate, code in ((dict(place=place, when=when, k=k), -signal.SIGKILL), (None, 0)):
        assert (
            nursery.live(home, 'train', *settings(text), '--run', 'x', '--resume', fate=fate)[
                'code'
            ]
            == code
        )
    assert_same(folder_of(home), whole[0])
    assert steps_of(folder_of(home)) == whole[3]


def survive(nursery, desk, text, whole, kills, seed):
    """Runs that die of each chain of fates and go on;

    (deaths by place, lives that were not ended, seconds)"""
    from llm_lab.package import load

    (same, met, seconds, kept), luck, died, escaped, start = (
        whole,
        random.Random(seed),
        Counter(),
        0,
        time.monotonic(),
    )
    chains = deaths_to_die(nursery, met, seconds, luck, kills)
    for n in range(3 * len(chains)):
        if not chains:
            break
        (home := desk / f'killed-{seed}-{n}').mkdir()
        fates, code = chains.pop(), None
        if fates[0].get('place') in LATER:
            fates.insert(0, dict(place='stepping', k=luck.randint(8, 20)))
        while code != 0:
            fate = fates[0] if fates else None
            life = nursery.live(home, 'train', *settings(text), '--run', 'x', '--resume', fate=fate)
            code = life['code']
            assert code == 0 or (fate and code == -signal.SIGKILL), (fate, life)
            if (folder_of(home) / 'latest').exists():
                load(folder_of(home))  # whatever happened, it can be opened
            if code:
                died[fate.get('place', 'a random moment')] += 1
                fates.pop(0)
        assert_same(folder_of(home), same)
        assert sorted(p.name for p in folder_of(home).rglob('.*')) == ['.lock', '.pid']
        assert steps_of(folder_of(home)) == kept
        if fates:
            escaped += 1
            chains.insert(0, fates)  # it was too late for these: another run begins with them
        for f in fates:
            if 'after' in f:
                f['after'] /= 2  # and does not wait as long: a machine may be faster than it was
        shutil.rmtree(home)
    assert not chains and {*died} >= {*nursery.places}, (chains, died)
    return died, escaped, time.monotonic() - start


def test_a_run_that_is_killed_at_every_place_ends_with_the_same_bits(
    nursery, desk, text, whole, record_property
):
    """SIGKILL in packing, steps, validation, sampling, rows, saves, pruning, the last judgement,
    and at any moment"""
    died, escaped, seconds = survive(nursery, desk, text, whole, kills=25, seed=1)
    assert sum(died.values()) >= 25 and died['a random moment'] >= 1, died
    record_property('kills', f'{sum(died.values())} kills in {seconds:.0f} s, {escaped} too late')


@pytest.mark.slow
def test_a_hundred_kills_leave_the_same_bits(nursery, desk, text, whole):
    "Before and after each place, and 60 random ones"
    died, *_ = survive(nursery, desk, text, whole, kills=100, seed=2)
    assert sum(died.values()) >= 100 and died['a random moment'] >= 20, died


# ---- asked to end


def asked(home, settings, number, *more):
    """A run through the real command line, sent this signal after ten steps;

    (exit code, what it said, its folder)"""
    out = home / 'said.txt'
    with open(out, 'w') as f:
        p = subprocess.Popen(
            [sys.executable, '-m', 'llm_lab.cli', 'train', *settings, *more],
            env=dict(ENV, LLM_LAB_HOME=str(home)),
            cwd=home,
            stdout=f,
            stderr=f,
        )
    until(
        lambda: (
            (folder_of(home) / 'metrics.jsonl').is_file() and len(rows_of(folder_of(home))) > 10
        ),
        p,
    )
    p.send_signal(number)
    return p.wait(HANG), out.read_text()


def until(true, process, seconds=HANG):
    end = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, 'it ended too early'
        assert time.monotonic() < end, 'it does nothing'
        time.sleep(0.01)


def python(home, *words, **env):
    return subprocess.run(
        [sys.executable, *words],
        env=dict(ENV, LLM_LAB_HOME=str(home), **env),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=HANG,
    )


LONG = dict(
    train__steps=400,
    log__every=5,
    eval__every=100,
    log__checkpoint_every=50,
    eval__sample_every=200,
)


@pytest.fixture(scope='module')
def long_whole(desk, nursery, text):
    "The bits of a long run that nothing interrupts"
    (home := desk / 'long').mkdir()
    life = nursery.live(home, 'train', *settings(text, **LONG), '--run', 'x')
    assert life['code'] == 0, life
    return bits(folder_of(home))


@pytest.mark.parametrize(
    'number,code,word',
    [
        (signal.SIGTERM, 143, 'by SIGTERM'),
        # by day Ctrl-C ends a tour (test_process)
        pytest.param(signal.SIGINT, 130, 'by hand', marks=pytest.mark.slow),
    ],
)
def test_who_asks_for_an_end_gets_a_checkpoint_and_a_line_that_goes_on(
    number, code, word, home, text, nursery, long_whole
):
    "The real command line; the line that it prints is typed, and the bits are those of one run"
    ended, said = asked(home, settings(text, **LONG), number, '--run', 'x')
    assert ended == code, said
    line = said.splitlines()[-1]
    step = int(line.split(f'stopped {word} at step ')[1].split(';')[0])
    assert steps_of(folder_of(home))[-1] == step < 400 and 'Traceback' not in said
    words = line.split('go on with: python -m llm_lab.cli ')[1].split()
    assert words == ['train', '--resume', str(folder_of(home))]
    assert nursery.live(home, *words)['code'] == 0
    assert_same(folder_of(home), long_whole)


def test_an_end_is_asked_for_in_the_middle_of_everything(home, text, nursery, whole):
    "One life after the other is sent SIGTERM or Ctrl-C: the step is ended, kept, and gone on from"
    last = 0
    for n, place in enumerate(
        (
            'stepping',
            'validating',
            'sampling',
            'writing_rows',
            'saving',
            'committing',
            'naming',
            'half_pruning',
        )
    ):
        number, code, word = [(signal.SIGTERM, 143, 'by SIGTERM'), (signal.SIGINT, 130, 'by hand')][
            n % 2
        ]
        when = 'before' if place == 'half_pruning' or n % 3 else 'after'
        life = nursery.live(
            home,
            'train',
            *settings(text),
            '--run',
            'x',
            '--resume',
            fate=dict(place=place, when=when, signal=number),
        )
        step = steps_of(folder_of(home))[-1]
        assert (
            life['code'] == code
            and life['err'] == ''
            and f'stopped {word} at step {step};' in life['out']
        ), (place, life)
        assert step > last and life['met'][f'{place}/{when}']
        last = step
    assert nursery.live(home, 'train', *settings(text), '--run', 'x', '--resume')['code'] == 0
    assert_same(folder_of(home), whole[0])


def test_ctrl_c_outside_of_training_ends_at_once_and_loses_nothing(home, text, nursery, whole):
    "While it packs, and while it judges"
    for place in ('packing', 'judging'):
        life = nursery.live(
            home,
            'train',
            *settings(text),
            '--run',
            'x',
            '--resume',
            fate=dict(place=place, signal=signal.SIGINT),
        )
        assert life['code'] == 130 and life['out'].endswith('\nstopped\n') and life['err'] == '', (
            place,
            life,
        )
    assert nursery.live(home, 'train', *settings(text), '--run', 'x', '--resume')['code'] == 0
    assert_same(folder_of(home), whole[0])


def test_two_do_not_write_into_one_folder(home, text, nursery):
    """The second one ends with a line that names the first, which does not notice; a finished or
    killed one holds nothing"""
    first = nursery.start(home, 'train', *settings(text, **LONG), '--run', 'x')
    end = time.monotonic() + HANG
    while not (folder_of(home) / 'metrics.jsonl').exists() and time.monotonic() < end:
        time.sleep(0.01)
    for words in (
        ['--resume', folder_of(home)],
        [*settings(text, **LONG), '--run', 'x', '--resume'],
    ):
        second = nursery.live(home, 'train', *words)
        assert (
            second['code'] == 1
            and second['err'].count('\n') == 1
            and f'is held by process {first[0]}:' in second['err']
        ), second
    new = nursery.live(home, 'train', *settings(text, **LONG), '--run', 'x')
    assert (
        new['code'] == 1
        and new['err'].count('\n') == 1
        and 'is there already: go on with --resume' in new['err']
    )
    assert nursery.wait(first)['code'] == 0 and rows_of(folder_of(home))[-1]['step'] == 400
    assert nursery.live(home, 'train', '--resume', folder_of(home))['code'] == 0


# ---- two processes


def free_port():
    """A port below those that systems give away by themselves; tests that run side by side begin at
    different ones"""
    for n in range(10_000):
        port = 20_000 + (7 * os.getpid() + time.monotonic_ns() + n) % 10_000
        with socket.socket() as s:
            try:
                s.bind(('127.0.0.1', port))
            except OSError:
                continue
            return port
    raise OSError('no port is free')


def two(nursery, home, *argv, fates=(None, None), **env):
    "Two lives that train together, as `torchrun` starts them"
    port = str(free_port())
    shared = dict(
        WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port, **env
    )
    return [
        nursery.start(
            home, 'train', *argv, env=dict(shared, RANK=str(r), LOCAL_RANK=str(r)), fate=fates[r]
        )
        for r in (0, 1)
    ]


def ended(nursery, lives):
    return [nursery.wait(life) for life in lives]


ADAMW = dict(
    train__optimizer='adamw',
    train__steps=50,
    train__batch_size=12,
    train__accumulate=2,
    model__dropout=0.0,
)


@pytest.fixture(scope='module')
def whole_by_two(desk, nursery, text):
    "(bits of a run of two processes that nothing interrupts; what became of the two)"
    (home := desk / 'two').mkdir()
    lives = ended(nursery, two(nursery, home, *settings(text), '--run', 'x'))
    assert [o['code'] for o in lives] == [0, 0], lives
    return bits(folder_of(home)), lives


@pytest.mark.parametrize('rows', ['blocks', 'documents'] if ALL else ['documents'])
def test_two_processes_learn_what_one_learns(rows, nursery, home, text):
    "The same global batch: 50 losses within 1e-5, each block read once, by one of the two"
    (alone := home / 'alone').mkdir()
    (both := home / 'both').mkdir()
    config = settings(text, **ADAMW, data__rows=rows)
    one = nursery.live(alone, 'train', *config, '--run', 'x')
    lives = ended(nursery, two(nursery, both, *config, '--run', 'x'))
    assert [one['code'], *(o['code'] for o in lives)] == [0, 0, 0], lives
    a, b = ([r['loss'] for r in rows_of(folder_of(h)) if 'loss' in r] for h in (alone, both))
    assert len(a) == len(b) == 50 and max(abs(x - y) for x, y in zip(a, b)) < 1e-5
    assert all(len(blocks) == 6 for o in lives for _, blocks in o['read'])
    each = [[*x, *y] for (_, x), (_, y) in zip(*(o['read'] for o in lives))]
    assert [sorted(x) for x in each] == [sorted(x) for _, x in one['read']]
    assert [step for step, _ in lives[1]['read']] == [*range(50)]
    # the first one speaks
    assert lives[1]['out'] == lives[1]['err'] == '' and 'on 2 × cpu' in lives[0]['out']
    vals = [[r['val'] for r in rows_of(folder_of(h)) if 'val' in r] for h in (alone, both)]
    assert len(vals[0]) == 13 and vals[1] == pytest.approx(vals[0], abs=1e-5)


@pytest.mark.parametrize('rows', ['blocks', 'documents'])
def test_over_an_epoch_two_processes_read_each_block_once(rows, text, home, monkeypatch):
    "Epoch after epoch, also where an epoch ends in the middle of a batch"
    from llm_lab.runs import _starts, make_batches, load_data

    monkeypatch.setenv('LLM_LAB_HOME', str(home))
    cfg = read_config(
        'smoke', settings(text, train__batch_size=8, train__accumulate=2, data__rows=rows)[1:]
    )
    texts = load_data(cfg)
    ranks = [make_batches(cfg, texts['corpus'], texts['train'], r, 2) for r in (0, 1)]
    n = ranks[0].per_epoch
    assert n % 8 and n > 100
    order = [
        b
        for step in range(3 * n // 8 + 1)
        for pair in zip(*(r.blocks_of(step).tolist() for r in ranks))
        for b in pair
    ]
    tokens = len(texts['train'])
    begins = _starts(texts['corpus'], texts['train']).tolist() if rows == 'documents' else []
    for epoch in range(3):
        read = order[epoch * n : (epoch + 1) * n]
        assert len({*read}) == n and {*begins} <= {*read}
        asked = [(b + k) % tokens for b in read for k in range(1, 17)]
        assert len({*asked}) == (tokens if begins else len(asked))  # each token; or none twice
        assert tokens - len({*asked}) < 16
    assert order[:n] != order[n : 2 * n]


@pytest.mark.parametrize(
    'killed,place,k',
    [
        (1, 'stepping', 14),
        (0, 'committing', 5),
        (0, 'packing', 1),
        *([(0, 'validating', 3), (1, 'taking_up', 1)] if ALL else []),
    ],
)
def test_when_one_of_two_is_killed_the_other_ends_and_both_go_on(
    killed, place, k, nursery, home, text, whole_by_two, record_property
):
    """By itself, hours before the team gives up waiting, and with one line

    Resumed, the bits are those of two that nothing interrupts: each has its own dropout."""
    config = [*settings(text), '--run', 'x', '--resume']
    if place == 'taking_up':
        ended(
            nursery,
            two(
                nursery,
                home,
                *config,
                fates=(dict(place='stepping', k=9, signal=signal.SIGTERM), None),
            ),
        )
    lives = two(
        nursery,
        home,
        *config,
        fates=[dict(place=place, k=k) if r == killed else None for r in (0, 1)],
    )
    assert nursery.wait(lives[killed])['code'] == -signal.SIGKILL
    start = time.monotonic()
    other = nursery.wait(lives[1 - killed])
    record_property('seconds', time.monotonic() - start)
    assert other['code'] == 1 and other['err'].count('\n') == 1, other
    then = 'begin again' if place == 'packing' else f'go on with --resume {folder_of(home)}'
    assert (
        f'llm-lab: process {1 - killed} lost the others: see what they said, and {then}\n'
        == other['err']
    )
    lives = ended(nursery, two(nursery, home, *config))
    assert [o['code'] for o in lives] == [0, 0], lives
    assert (
        lives[0]['met'].get('taking_up/after')
        == lives[1]['met'].get('taking_up/after')
        == (None if place == 'packing' else 1)
    )
    assert_same(folder_of(home), whole_by_two[0])


@pytest.mark.parametrize('told', [0, 1] if ALL else [1])
def test_when_one_of_two_is_asked_to_end_both_end_at_the_same_step(
    told, nursery, home, text, whole_by_two
):
    fates = [
        dict(place='stepping', k=11, signal=signal.SIGTERM) if r == told else None for r in (0, 1)
    ]
    lives = ended(nursery, two(nursery, home, *settings(text), '--run', 'x', fates=fates))
    (step,) = {len(o['read']) for o in lives}
    assert (
        lives[0]['code'] == 143
        and lives[1]['code'] in (0, 143)
        and steps_of(folder_of(home))[-1] == step == 11
    )
    assert f'stopped by SIGTERM at step {step};' in lives[0]['out']
    assert [
        o['code']
        for o in ended(nursery, two(nursery, home, *settings(text), '--run', 'x', '--resume'))
    ] == [0, 0]
    assert_same(folder_of(home), whole_by_two[0])


def test_one_process_goes_on_with_what_two_have_begun(nursery, home, text):
    "It says that the bits will differ; without dropout the losses do not"
    (alone := home / 'alone').mkdir()
    one = nursery.start(alone, 'train', *settings(text, **ADAMW), '--run', 'x')
    fates = [None, dict(place='stepping', k=20, signal=signal.SIGTERM)]
    ended(nursery, two(nursery, home, *settings(text, **ADAMW), '--run', 'x', fates=fates))
    life = nursery.live(home, 'train', '--resume', folder_of(home))
    assert life['code'] == 0 and 'processes was 2, is 1' in life['err'] and len(life['read']) == 30
    assert nursery.wait(one)['code'] == 0
    a, b = ([r['loss'] for r in rows_of(folder_of(h)) if 'loss' in r] for h in (alone, home))
    assert len(b) == 50 and b == pytest.approx(a, abs=1e-5)


def test_torchrun_starts_two(home, text, nursery, whole_by_two):
    "The same bits as two that are started by hand"
    launch = [
        '-m',
        'torch.distributed.run',
        '--nproc_per_node',
        '2',
        '--master_port',
        str(free_port()),
        '-m',
        'llm_lab.cli',
    ]
    said = python(home, *launch, 'train', *settings(text))
    assert said.returncode == 0 and 'on 2 × cpu' in said.stdout, said.stderr
    assert_same(folder_of(home, folder_of(home, 'latest').read_text().strip()), whole_by_two[0])


# ---- a run that trains adapters


@pytest.fixture(scope='module')
def base(desk, nursery, text):
    "The folder of a finished run, whose weights others adapt"
    (home := desk / 'base').mkdir()
    life = nursery.live(home, 'train', *settings(text, train__steps=12), '--run', 'x')
    assert life['code'] == 0, life
    return folder_of(home)


def adapting(text, base, **change):
    "Settings of a run that trains adapters, with dropout, on the weights of another run"
    lora = '{rank: 3, alpha: 6, dropout: 0.1, targets: [qkv, mlp]}'
    return settings(text, train__start_from=base, train__lora=lora, **change)


CHATTING = dict(data__template='chat', data__rows='whole', train__loss='answers', eval__every=3)


def tuning(base):
    "Settings of a run that learns answers, in rows of whole conversations, from another run"
    return dict(CHATTING, data__tokenizer=base)


def calm_and_killed(nursery, home, words):
    """Whether a run with these settings that is killed at four places leaves the same bits as one
    that is not; (how the latter ended, its home)"""
    (calm := home / 'calm').mkdir()
    (killed := home / 'killed').mkdir()
    words = [*words, '--run', 'x', '--resume']
    whole = nursery.live(calm, 'train', *words)
    assert whole['code'] == 0, whole
    for fate in (
        dict(place='stepping', when='before', k=2),  # before its first checkpoint
        dict(place='saving', when='after', k=3),
        dict(place='stepping', when='after', k=7),
        dict(place='committing', when='after', k=2),
    ):
        life = nursery.live(killed, 'train', *words, fate=fate)
        assert life['code'] == -signal.SIGKILL, life
    assert nursery.live(killed, 'train', *words)['code'] == 0
    assert_same(folder_of(killed), bits(folder_of(calm)))
    return whole, calm


@pytest.mark.slow  # by day, the run of adapters below learns answers
def test_a_run_that_learns_answers_in_whole_rows_ends_with_the_same_bits_wherever_it_is_killed(
    nursery, home, talk
):
    _, calm = calm_and_killed(nursery, home, settings(talk, **CHATTING))
    result = json.loads((folder_of(calm) / 'result.json').read_text())
    assert result['scores']['val']['only'] == 'answers'


@pytest.mark.parametrize('of', ['stories', 'talk'] if ALL else ['talk'])
def test_a_run_of_adapters_ends_with_the_same_bits_wherever_it_is_killed(
    of, nursery, home, text, talk, base
):
    from llm_lab.chars import load_tokenizer
    from llm_lab.package import load, require_faithful

    words = adapting(text, base) if of == 'stories' else adapting(talk, base, **tuning(base))
    life, calm = calm_and_killed(nursery, home, words)
    assert ('rows of 5 new marks' in life['out']) == (of == 'talk'), life
    assert 'adapters.safetensors' in bits(folder_of(calm))['files']
    # whoever opens the run has one plain model, other than that which it began with
    opened = load(folder_of(calm)).model
    require_faithful(opened)
    start = load(base).model.state_dict()
    tables = {'tok', 'lm_head'} if of == 'talk' else set()
    moved = {
        n
        for n, t in opened.state_dict().items()
        if t.shape != start[n].shape or (t != start[n]).any()
    }
    assert {n.split('.')[-2] for n in moved} == {'qkv', 'up', 'out'} | tables
    assert not any('attn.out' in n or n.endswith('bias') for n in moved)
    for n in (n for n in moved if n.split('.')[-2] in tables):  # the rows of before stay
        assert (opened.state_dict()[n][: len(start[n])] == start[n]).all(), n
    life = nursery.live(calm, 'eval', folder_of(calm))
    assert life['code'] == 0 and 'bits' in life['out'], life


def test_adapters_go_on_only_over_the_weights_that_they_began_with(nursery, home, text, base):
    mine = home / 'mine'
    shutil.copytree(base, mine)
    words = [*adapting(text, mine, train__steps=9), '--run', 'x', '--resume']
    fate = dict(place='stepping', when='before', k=8)
    assert nursery.live(home, 'train', *words, fate=fate)['code'] == -signal.SIGKILL
    (mine / 'best').write_text('step-000003\n')
    if not (mine / 'checkpoints' / 'step-000003').exists():
        first = min((mine / 'checkpoints').glob('step-*')).name
        (mine / 'best').write_text(f'{first}\n')
    life = nursery.live(home, 'train', *words)
    assert life['code'] == 1 and 'has other weights than when this run began' in life['err'], life
    shutil.rmtree(mine)
    assert nursery.live(home, 'train', *words)['code'] == 1
    shutil.copytree(base, mine)
    assert nursery.live(home, 'train', *words)['code'] == 0
    other = [*words[:-1], 'train.lora.rank=4', '--resume']
    life = nursery.live(home, 'train', *other)
    assert life['code'] == 1 and 'train.lora=' in life['err'] and 'it was' in life['err'], life


def test_two_processes_adapt_as_one(nursery, home, talk, base):
    "Their adapters and the rows of new marks; each answer counts alike, in whichever part it is"
    (alone := home / 'alone').mkdir()
    (both := home / 'both').mkdir()
    words = [*adapting(talk, base, **ADAMW | tuning(base) | dict(train__steps=10)), '--run', 'x']
    words = [w.replace(', dropout: 0.1', '') for w in words]
    one = nursery.live(alone, 'train', *words)
    lives = ended(nursery, two(nursery, both, *words))
    assert [one['code'], *(o['code'] for o in lives)] == [0, 0, 0], (one, lives)
    a, b = ([r['loss'] for r in rows_of(folder_of(h)) if 'loss' in r] for h in (alone, both))
    assert len(a) == len(b) == 10 and max(abs(x - y) for x, y in zip(a, b)) < 1e-5


# ---- a run that gets no better ends early

EARLY = dict(
    train__steps=400,
    train__lr=0.1,
    train__schedule='constant',
    model__dropout=0.0,
    eval__every=4,
    eval__patience=2,
    log__keep=1,
)


def assert_ended_early(folder):
    """By a slow reading of its rows: it ended at the first step at which two looks were no better;
    its best is what counts"""
    vals = [(r['val'], r['step']) for r in rows_of(folder) if 'val' in r]
    due = [n for n in range(3, len(vals) + 1) if min(vals[: n - 2]) <= min(vals[n - 2 : n])]
    assert due[0] == len(vals) and rows_of(folder)[-1]['step'] == vals[-1][1] < 400
    best = min(vals)[1]
    assert (folder / 'best').read_text() == f'step-{best:06d}\n' and best == vals[-3][1]
    result = json.loads((folder / 'result.json').read_text())
    assert (result['judged'], result['best_step'], result['steps']) == (
        'the best model',
        best,
        vals[-1][1],
    )
    return best, vals[-1][1]


def test_a_run_that_gets_no_better_ends_and_its_best_model_counts(nursery, home, text):
    (alone := home / 'alone').mkdir()
    one = nursery.live(alone, 'train', *settings(text, **EARLY), '--run', 'x')
    assert one['code'] == 0 and one['err'] == '', one
    best, last = assert_ended_early(folder_of(alone))
    assert (
        f'stopped early: eval.patience=2 validations were no better than that of step {best:,}'
        in one['out']
    )
    assert f'the best model, of step {best:,}' in one['out'] and one['out'].endswith(
        f'kept in {folder_of(alone)}\n'
    )

    said = python(alone, '-m', 'llm_lab.cli', 'eval', folder_of(alone))
    loss = json.loads((folder_of(alone) / 'result.json').read_text())['scores']['val']['loss']
    assert (
        said.returncode == 0
        and 'judges the last' not in said.stdout
        and f'loss {loss:.3f}' in said.stdout
    ), said.stdout

    before = bits(folder_of(alone))
    again = nursery.live(alone, 'train', '--resume', folder_of(alone))
    assert (
        again['code'] == 0
        and again['read'] == []
        and 'stopped early: eval.patience=2' in again['out']
    ), again
    assert_same(folder_of(alone), before)
    on = nursery.live(
        alone,
        'train',
        '--resume',
        folder_of(alone),
        'eval.patience=null',
        f'train.steps={last + 4}',
    )
    assert (
        on['code'] == 0 and len(on['read']) == 4 and 'eval.patience=None (it was 2)' in on['out']
    ), on

    # between the best look and the last one
    fates = dict(place='stepping', k=best + 2, signal=signal.SIGTERM)
    assert (
        nursery.live(home, 'train', *settings(text, **EARLY), '--run', 'x', fate=fates)['code']
        == 143
    )
    assert nursery.live(home, 'train', '--resume', folder_of(home))['code'] == 0
    assert_same(folder_of(home), before)


def test_two_processes_end_early_together(nursery, home, text):
    lives = ended(nursery, two(nursery, home, *settings(text, **EARLY), '--run', 'x'))
    assert [o['code'] for o in lives] == [0, 0], lives
    _, last = assert_ended_early(folder_of(home))
    assert [len(o['read']) for o in lives] == [last, last]


# ---- those who look on


def test_evaluating_and_sampling_during_a_run_change_no_weight(nursery, desk, text):
    "Often or only at the end, also where validation draws from the common stream, and sets it"
    found = []
    last = {'eval.every': 30, 'eval.sample_every': 30, 'log.every': 30, 'log.checkpoint_every': 30}
    for change, fate in [
        ({}, {}),
        ({'eval.every': 5, 'eval.sample_every': 5}, {}),
        (last, {}),
        ({'eval.every': 3}, dict(careless=True)),
    ]:
        (home := desk / f'looked-{len(found)}').mkdir()
        life = nursery.live(home, 'train', *settings(text, **change), '--run', 'x', fate=fate)
        assert life['code'] == 0, life
        found.append(
            (
                json.dumps(bits(folder_of(home))['files']),
                sum('val' in r for r in rows_of(folder_of(home))),
            )
        )
    assert len({files for files, _ in found}) == 1 and [n for _, n in found] == [8, 6, 1, 10]


def events(folder):
    "{tag: [(step, value)]} of the event files below a folder, as TensorBoard reads them"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (place,) = {p.parent for p in folder.rglob('*tfevents*')}
    reader = EventAccumulator(str(place))
    reader.Reload()
    return {
        tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()['scalars']
    }


def test_tensorboard_reads_the_same_numbers_at_the_same_steps(nursery, home, text):
    "Also after a kill and after a stop: no step comes twice"
    config = [
        *settings(text, log__tracker='tensorboard', log__checkpoint_every=5, eval__every=10),
        '--run',
        'x',
        '--resume',
    ]
    for fate in (
        dict(place='stepping', k=9),
        dict(place='stepping', k=9, signal=signal.SIGTERM),
        None,
    ):
        life = nursery.live(home, 'train', *config, fate=fate)
        assert life['code'] == (0 if not fate else 143 if 'signal' in fate else -signal.SIGKILL), (
            life
        )
        seen, rows = events(folder_of(home)), rows_of(folder_of(home))
    assert len([*folder_of(home).rglob('*tfevents*')]) == 3
    for tag in ('loss', 'val', 'lr', 'grad_norm', 'bits_per_byte'):
        assert seen[tag] == [
            (r['step'], pytest.approx(r[tag], rel=1e-6)) for r in rows if tag in r
        ], tag
    assert [step for step, _ in seen['loss']] == [*range(1, 31)] and [
        step for step, _ in seen['val']
    ] == [10, 20, 30]


FAKE = """
import json
import os
import pathlib


def init(**kw):
    assert os.environ['WANDB_API_KEY'] == %r
    return Run(pathlib.Path(kw['dir']), kw)


class Run:
    def __init__(self, dir, kw):
        self.file = dir / 'sent.jsonl'
        self.send(init={k: str(v) for k, v in kw.items()})

    def send(self, **kw):
        with open(self.file, 'a') as f:
            f.write(json.dumps(kw) + chr(10))

    def log(self, values, step=None):
        self.send(step=step, **values)

    def finish(self):
        self.send(finished=True)
"""
SECRET = 'k3y-0123456789abcdef'


@pytest.fixture
def fake_wandb(home):
    "A module called wandb that writes down what it is told; (what to put into PYTHONPATH)"
    for name, content in {
        'wandb/__init__.py': FAKE % SECRET,
        'wandb-9.dist-info/METADATA': 'Name: wandb\nVersion: 9\n',
    }.items():
        (path := home / 'packages' / name).parent.mkdir(parents=True)
        path.write_text(content)
    return os.pathsep.join([str(home / 'packages'), ENV['PYTHONPATH']])


def test_the_key_of_wandb_comes_from_a_file_and_is_written_nowhere(home, text, fake_wandb):
    (home / '.env').write_text(f'WANDB_API_KEY={SECRET}\n')
    said = python(
        home,
        '-m',
        'llm_lab.cli',
        'train',
        *settings(text, log__tracker='wandb'),
        '--run',
        'x',
        PYTHONPATH=fake_wandb,
    )
    assert said.returncode == 0, said.stderr
    (first, *sent), rows = (
        [json.loads(line) for line in (folder_of(home) / 'sent.jsonl').read_text().splitlines()],
        rows_of(folder_of(home)),
    )
    assert first['init'] == dict(project='smoke', id='x', resume='allow', dir=str(folder_of(home)))
    assert sent == [
        *({k: v for k, v in r.items() if k not in ('tokens', 'seconds')} for r in rows),
        dict(finished=True),
    ]
    with_it = [
        p
        for p in home.rglob('*')
        if p.is_file() and SECRET.encode() in p.read_bytes() and 'packages' not in p.parts
    ]
    assert with_it == [home / '.env'] and SECRET not in said.stdout + said.stderr


def test_a_tracker_that_is_missing_or_has_no_key_is_one_line(home, text, fake_wandb, nursery):
    "One line, not a run that tells nobody"
    if find_spec('wandb') is None:
        life = nursery.live(home, 'train', *settings(text, log__tracker='wandb'))
        assert (
            life['code'] == 1
            and life['err']
            == 'llm-lab: wandb is not installed, and this needs it: pip install wandb\n'
        )
    (home / '.env').write_text('WANDB_API_KEY=another\n')
    (home / 'packages' / 'wandb' / '__init__.py').write_text(
        'def init(**kw): raise RuntimeError("No API key configured.\\nSee there.")\n'
    )
    said = python(
        home,
        '-m',
        'llm_lab.cli',
        'train',
        *settings(text, log__tracker='wandb'),
        '--run',
        'x',
        PYTHONPATH=fake_wandb,
    )
    assert said.returncode == 1 and said.stderr.count('\n') == 1, said.stderr
    assert (
        'log.tracker=wandb: No API key configured. Write its key into' in said.stderr
        and str(home / '.env') in said.stderr
    )


# ---- a full disk


@pytest.fixture
def disk(tmp_path):
    "A function that makes a disk of so many kB, or changes its size"
    place = tmp_path / 'disk'

    def size(kb):
        how = f'size={kb}k' if not place.exists() else f'remount,size={kb}k'
        place.mkdir(exist_ok=True)
        mount = ['mount', '-t', 'tmpfs', '-o', how, 'tmpfs', str(place)]
        if shutil.which('mount') is None or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip('mounting a small disk needs Linux and its administrator')
        return place

    yield size
    if os.path.ismount(place):
        subprocess.run(['umount', place], check=True)


def test_a_disk_that_fills_up_ends_the_run_and_room_lets_it_go_on(disk, nursery, text, whole):
    """At any moment, again and again: one line, the last checkpoint can be opened, and the bits are
    those of one run"""
    from llm_lab.package import load

    steps, ended, kb, home = [], [], 60, None
    while not ended or ended[-1] != 0:
        home = disk(kb)
        life = nursery.live(home, 'train', *settings(text, log__keep=99), '--run', 'x', '--resume')
        ended.append(life['code'])
        assert (
            life['code'] in (0, 1)
            and life['err'].count('\n') == life['code']
            and 'Traceback' not in life['out']
        ), life
        if life['code']:
            assert 'No space left on device' in life['err'] and 'free some space' in life['err'], (
                life['err']
            )
        if (folder_of(home) / 'checkpoints').exists() and (found := steps_of(folder_of(home))):
            assert (
                load(folder_of(home) / 'checkpoints' / f'step-{found[-1]:06d}').about['step']
                == found[-1]
            )
            if (folder_of(home) / 'latest').exists():
                load(folder_of(home))
            steps.append(found[-1])
        kb += 60 if ALL else 120
        assert kb < 6000
    assert steps == sorted(steps) and steps[0] < 30 and len({*steps}) > 3 and len(ended) > 5, (
        steps,
        ended,
    )
    assert_same(folder_of(home), whole[0])


def test_a_run_that_has_diverged_is_judged_like_any_other(nursery, home, text):
    "Its loss is a number, however large"
    wild = dict(train__lr=10, train__optimizer='sgd', train__clip=1e9, model__dropout=0)
    life = nursery.live(home, 'train', *settings(text, **wild), '--run', 'x')
    assert life['code'] == 0 and life['err'] == '', life
    assert json.loads((folder_of(home) / 'result.json').read_text())['scores']['val']['loss'] > 1000
    assert (
        nursery.live(home, 'eval', folder_of(home))['code']
        == nursery.live(home, 'runs')['code']
        == 0
    )


# ---- what can be done with a run


def test_every_command_takes_a_run(nursery, desk, text, whole, home):
    from llm_lab.package import load

    run = folder_of(desk / 'whole')
    model, tokenizer, about = load(run)
    assert not model.training and (about['data'], about['run']) == (str(text), 'x')
    assert tokenizer.decode(tokenizer.encode('the cat')) == 'the cat'

    def said(*words):
        life = nursery.live(desk / 'whole', *words)
        assert life['code'] == 0 and life['err'] in ('', 'smoke/x, step 30\n'), life
        return life['out']

    for path in (run, 'experiments/smoke/runs/x', run / 'checkpoints' / 'step-000030'):
        assert len(said('sample', path, '--prompt', 'the ', '--tokens', '20')) == 25
    result = json.loads((run / 'result.json').read_text())['scores']['val']
    assert f'{result["bits_per_byte"]:.3f} bits per byte' in said(
        'eval', run / 'checkpoints' / 'step-000030'
    )
    train, val = (said('eval', run, '--split', split) for split in ('train', 'val'))
    assert train != val and 'perplexity' in train
    (home / 'mine.txt').write_text('the cat sat on the mat.\n' * 5)
    assert 'bits per byte' in said('eval', run, '--text', home / 'mine.txt')
    head, line = said('runs').splitlines()[:2]
    assert (
        'bits/byte' in head
        and line.split()[0] == 'x'
        and line.endswith('finished')
        and f'{result["bits_per_byte"]:.3f}' in line
    )
    assert (
        said('runs', run, '--plot', home / 'curves.png')
        and (home / 'curves.png').read_bytes()[1:4] == b'PNG'
    )
    for words in (
        ['eval', run, '--split', 'test'],
        ['eval', run, '--text', home / 'none.txt'],
        ['sample', home / 'none'],
        ['eval', text],
    ):
        life = nursery.live(desk / 'whole', *words)
        assert (
            life['code'] == 1
            and life['err'].count('\n') == 1
            and life['err'].startswith('llm-lab: ')
        ), life


# ---- slips of the finger

HUGE = 10**400
ODD = [
    None,
    True,
    False,
    0,
    -1,
    1,
    7,
    1.5,
    -0.5,
    math.inf,
    -math.inf,
    math.nan,
    HUGE,
    -HUGE,
    10**30,
    '',
    'abc',
    ' ',
    'true',
    '1',
    '1.5',
    'adamv',
    [],
    [1],
    [[]],
    {},
    {'a': 1},
    {'part': 5},
    {'part': ''},
    {'part': 'os:system'},
    {'part': 'MLP; import os'},
    {'part': None},
]


def fits(f, value):
    "Does the key `f` take this value? Written from the table of `config` and from nothing else"
    least, most, of = (f.metadata.get(k) for k in ('least', 'most', 'of'))
    kind = (
        str(f.type)
        .replace('|None', '')
        .replace(' | None', '')
        .replace("<class '", '')
        .replace("'>", '')
    )
    none = 'None' in str(f.type)
    if value is None:
        return none
    if of:
        return isinstance(value, str) and value in of
    if kind == 'bool':
        return isinstance(value, bool)
    if kind == 'str':
        return isinstance(value, str)
    if kind == 'dict':
        if value == {}:
            return True  # as the block has it
        part = value.get('part') if isinstance(value, dict) else None
        return (
            isinstance(part, str)
            and re.fullmatch(r'((llm_lab[.]\w+|torch[.]nn):)?\w+', part) is not None
        )
    number = isinstance(value, int) if kind == 'int' else isinstance(value, (int, float))
    if (
        not number
        or isinstance(value, bool)
        or isinstance(value, float)
        and not math.isfinite(value)
    ):
        return False
    if kind == 'float' and abs(value) > 1e300:
        return False
    return (least is None or value >= least) and (most is None or value <= most)


def values_of(f):
    "Odd values, and those at the border"
    least, most = f.metadata.get('least'), f.metadata.get('most')
    step = 1 if 'int' in str(f.type) else 1e-9
    borders = [
        v
        for v in (least, most, least is not None and least - step, most and most + 0.1)
        if v not in (None, False)
    ]
    return [*ODD, *(f.metadata.get('of') or ()), *borders]


def misspelt(word, luck):
    n = luck.randrange(len(word))
    return luck.choice(
        [
            word[:n] + word[n + 1 :],
            word[:n] + word[n] * 2 + word[n + 1 :],
            word + 's',
            word[:n] + 'q' + word[n + 1 :],
        ]
    )


# what a file can be, and the words that its line must hold
FILES = {
    'train:\n\tsteps: 5\n': ['line 2'],
    'train:\n  steps: 5\n lr: 1\n': ['line 3'],
    'train: {steps: 5\n': ['line 2'],
    'train: [}\n': ['line 1'],
    '[' * 3000: ['slip.yaml'],
    'train:\n  steps: 5\n  steps: 6\n': ['duplicate key steps', 'line 3'],
    'train: {steps: 5}\ntrain: {lr: .1}\n': ['duplicate key train', 'line 2'],
    '- train\n- data\n': ['list'],
    '[]\n': ['list'],
    '5\n': ['keys and values'],
    'true': ['keys and values'],
    'steps\n': ['steps'],
    'x': ['x'],
    'train: {steps: *a}\n': ['line 1'],
    'train: &a\n  steps: *a\n': ['line 1'],
    'a: b: c\n': ['line 1'],
    'train: "steps\n': ['line 2'],
    '--- {}\n--- {}\n': ['line 2'],
    'train: {steps: !x 5}\n': ['line 1'],
    'train: {steps: ${nope}}\n': ['line 1'],
    'train: {steps: "${nope}"}\n': ['nope'],
    'train: {steps: "${train.stepz}"}\n': ['stepz'],
    'train: {steps: "${train.steps}"}\n': ['steps'],
    'train: {steps: "???"}\n': ['train.steps'],
    'data: {corpus: "${oc.env:HOME}"}\n': ['environment'],
    'eval: {prompt: oc}\ndata: {corpus: "${${eval.prompt}.env:HOME}"}\n': ['environment'],
    'train: {steps: !!python/object/apply:os.system [ls]}\n': ['line 1'],
    '!!python/name:os.system {}\n': ['line 1'],
    'train: {steps: !!binary aGk=}\n': ['train.steps'],
    'train: {steps: 2024-01-01}\n': ['train.steps'],
    'train: {steps: ' + '9' * 5000 + '}\n': ['slip.yaml'],
    'train: {lr: ' + '9' * 400 + '}\n': ['train.lr'],
    'train: {lr: 1e999}\n': ['train.lr'],
    'train: {lr: .inf}\n': ['train.lr'],
    'train: {lr: .nan}\n': ['train.lr'],
    'train: {1: 2}\n': ['train.1'],
    '1: {steps: 2}\n': ['1'],
    'true: {}\n': ['True'],
    'null: {steps: 2}\n': ['slip.yaml'],
    'train: {null: 2}\n': ['slip.yaml'],
    'train: {? [a] : 1}\n': ['slip.yaml'],
    'train:\n  steps: 5\n  model:\n    d_model: 5\n': ['train.model'],
    'train: {steps: {steps: 5}}\n': ['train.steps'],
    'model: {attn: {part: "os:system"}}\n': ['model.attn'],
    'model: {attn: GQA}\n': ['model.attn'],
    'model: {attn: []}\n': ['model.attn'],
    'model: {n_heads: 3}\n': ['model.n_heads', 'model.d_model'],
    'train: {accumulate: 5}\n': ['train.accumulate', 'train.batch_size'],
    'data: {length: 30000}\n': ['eval.tokens', 'data.length'],
    'data: {vocab_size: 300}\n': ['data.vocab_size'],
    'train: {seed: 99999999999999999999}\n': ['train.seed'],
    'train: {steps: 1000000000000}\n': ['train.steps'],
    'Train: {steps: 5}\n': ['Train'],
    'data: {corpus: 5}\n': ['data.corpus'],
    'train: {"st\\nps": 5}\n': ['train.st ps'],
    '"tr\\nain": {steps: 5}\n': ['tr ain'],
    b'train: {steps: \xff}\n': ['slip.yaml'],
    b'\x00': ['slip.yaml'],
    b'\xff\xfe\x00': ['slip.yaml'],
    b'train: {steps: 5}\x07': ['slip.yaml'],
}
WORDS_TYPED = [
    '',
    '=',
    '=5',
    'steps',
    'steps=',
    'train.=5',
    '.steps=5',
    'train..steps=5',
    'every=5',
    'train=5',
    'train=[]',
    'train.steps.x=5',
    'steps=[',
    'steps={',
    'steps=${',
    'steps=${nope}',
    'a\nb=5',
    'a b=5',
    'train.steps[0]=5',
    'steps=5=6',
    'model.attn.part=',
    'model.attn.part=[]',
    'model.attn.n=5',
    'steps=!!python/object/apply:os.system [ls]',
    'lr=1e999',
    'steps=' + '9' * 5000,
    'lr=' + '9' * 400,
]


def slips(folder):
    """Name, call and the words that the answer must hold: for each key wrong values, wrong names,
    sections of another kind, damaged files"""
    import yaml

    luck, yml = random.Random(3), folder / 'slip.yaml'
    dump = lambda x: yaml.safe_dump(x, allow_unicode=True)

    def file(data):
        yml.write_bytes(data if isinstance(data, bytes) else data.encode())
        return lambda: read_config(yml)

    for path, f in _PATHS.items():
        section, _, key = path.partition('.')
        wrong = [v for v in values_of(f) if not fits(f, v)]
        assert len(wrong) > 8, path
        for v in luck.sample(wrong, 6):
            yield f'{path}: {v!r:.40} in a file', file(dump({section: {key: v}})), [path]
            yield (
                f'{path}: {v!r:.40} as data',
                lambda p=section, k=key, v=v: read_config({p: {k: v}}),
                [path],
            )
            # typed, anything is a text: see test_units.py
            free = f.type is str and not f.metadata.get('of')
            if not free and (not isinstance(v, str) or v.strip()):
                text = (
                    dump({'v': v})[3:].strip() if not isinstance(v, (dict, list)) else json.dumps(v)
                )
                yield (
                    f'{path}={text:.40}',
                    lambda text=text, path=path: read_config('smoke', [f'{path}={text}']),
                    [path],
                )
        bad = misspelt(key, luck)
        if f'{section}.{bad}' not in _PATHS:
            near = 'did you mean' if len(key) > 4 else ''
            yield (
                f'{section}.{bad} in a file',
                file(dump({section: {bad: 1}})),
                [f'{section}.{bad}', near],
            )
            yield (
                f'{section}.{bad}=1',
                lambda p=f'{section}.{bad}': read_config('smoke', [f'{p}=1']),
                [f'{section}.{bad}'],
            )
    for s in SECTIONS:
        for v in (None, [], [1], 'abc', '', 5, 1.5, True):
            yield f'{s}: {v!r} in a file', file(dump({s: v})), [s]
            yield f'{s}: {v!r} as data', lambda s=s, v=v: read_config({s: v}), [s]
        bad = misspelt(s, luck)
        yield f'{bad}: {{}}', file(dump({bad: {}})), [bad]
    for text, words in FILES.items():
        yield f'{text[:40]!r}', file(text), words
    for word in WORDS_TYPED:
        key = re.split(r'[=\n\[]', word)[0].strip('.').rpartition('.')[2]
        yield f'{word[:40]!r}', lambda word=word: read_config('smoke', [word]), [key]
    for name in ('smok', '', 'no/such', 'x.yaml', 'smoke.yml', '.', str(folder)):
        yield f'config {name!r}', lambda name=name: read_config(name), [name]


def check_slips(folder):
    """Prints [slip, answer] for each that is not answered by one line that holds the words, and how
    many were answered"""
    answered, wrong = Counter(), []
    for name, call, words in slips(Path(folder)):
        try:
            wrong.append([name, f'taken: {call()}'[:200]])
        except LabError as e:
            good = '\n' not in str(e) and len(str(e)) < 1000 and all(w in str(e) for w in words)
            if good:
                answered[name.rpartition(' ')[2]] += 1
            else:
                wrong.append([name, f'{words} not in {e}'[:300]])
        except BaseException as e:
            wrong.append([name, f'{type(e).__name__}: {e}'[:200]])
    from llm_lab import cli

    codes = [cli.main(['train', 'smoke', slip]) for slip in ('lr=fast', 'stebs=5', 'train=5')]
    print(
        json.dumps(
            dict(
                wrong=wrong,
                answered=sum(answered.values()),
                codes=codes,
                torch='torch' in sys.modules,
            )
        )
    )


def test_every_slip_is_answered_by_one_line_that_names_the_key(home):
    """Wrong values, types, names and sections of every key, damaged files, odd words: all in one
    process, without PyTorch"""
    code = (
        f'import sys; sys.path.insert(0, {str(ROOT / "tests")!r}); import test_run; '
        f'test_run.check_slips({str(home)!r})'
    )
    done = python(home, '-c', code)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert (
        said['wrong'] == []
        and said['answered'] >= 200
        and said['codes'] == [1, 1, 1]
        and not said['torch']
    ), said
    assert done.stderr.count('\n') == 3 and all(
        line.startswith('llm-lab: ') for line in done.stderr.splitlines()
    )


def test_what_is_odd_but_right_is_taken(home):
    """So the test above can fail: all values at the border, each word of a choice, null where it
    may be, and what is written is read again"""
    taken = 0
    # None: as many
    besides = {
        'data.vocab_size': {'data.tokenizer': 'bpe'},
        'train.accumulate': {'train.batch_size': None},
        'eval.tokens': {'data.length': 1},
        'model.n_heads': {'model.d_head': 8},
        'model.d_model': {'model.n_heads': 1},
        'model.n_kv_heads': {'model.n_heads': None, 'model.d_head': 8},
        'train.min_lr': {'train.lr': None},
        'train.warmup': {'train.steps': None},
        'data.length': {'eval.tokens': 10**9},
        'train.lora': {'train.start_from': 'x'},
    }
    for path, f in _PATHS.items():
        section, _, key = path.partition('.')
        for v in values_of(f):
            if not fits(f, v) or isinstance(v, int) and v >= 10**30:
                continue
            data = {section: {key: v}}
            for other, w in besides.get(path, {}).items():
                part, _, word = other.partition('.')
                data.setdefault(part, {})[word] = (v or 1) if w is None else w
            cfg = config_from_dict(data, 'x')
            got = getattr(getattr(cfg, section), key)
            if f.type is list:
                (got,) = got  # one is a list of one
            assert got == v and type(got) in (type(v), float)
            write_config(cfg, home / 'x.yaml')
            assert read_config(home / 'x.yaml') == cfg, (path, v)
            taken += 1
    assert taken > 100
    for name in CONFIGS:
        assert read_config(name).name == name
    (home / 'empty.yaml').write_text('# nothing yet\n')
    assert read_config(home / 'empty.yaml') == config_from_dict({}, 'empty')
