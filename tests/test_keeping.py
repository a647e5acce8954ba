"What was trained is kept before it is evaluated, whatever happens then."

import errno
import io
import json
import math
import multiprocessing
import multiprocessing.util
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from llm_lab import first_tour as chapter
from llm_lab.cli import main
from llm_lab.core import LabError, graceful_interrupt
from llm_lab.package import load
from llm_lab.runs import SingleProcess, TrainingRun, train_run
from llm_lab.first_tour import surviving_output, tour

pytestmark = pytest.mark.usefixtures('one_thread')
SMALL = [('length', 16), ('d_model', 16), ('n_layers', 1), ('n_heads', 2)]
POEM = 'the cat sat on the mat. the dog sat on the log.\n' * 40
STEPS = 12


PICTURE = chapter._picture  # it takes half a second, and few tests look at it


def short_tours(steps=STEPS):
    "What a test replaces in the tour, so that it neither measures nor waits: {name: value}"
    return dict(
        _time_step=lambda setup: (0.001, 1),
        _budget=lambda *a: (steps, 100),
        _picture=lambda *a: None,
        WRITES=8,
    )


@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty home where we stand, short tours, a temporary folder of our own"
    place = tmp_path / 'a home'
    place.mkdir()
    (tmp_path / 'temporary').mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv('LLM_LAB_HOME', str(place))
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'temporary'))
    for name, value in short_tours().items():
        monkeypatch.setattr(chapter, name, value)
    return place


@pytest.fixture
def poem(tmp_path):
    path = tmp_path / 'poem.txt'
    path.write_text(POEM, encoding='utf-8')
    return path


def at_step(n, do):
    "A `_watcher` that does something after that step"
    return lambda *a: {(n,): lambda run: do()}


def raises(error):
    def fail(*args, **kw):
        raise error

    return fail


def opened(folder, steps=STEPS):
    "The model opens, all hashes right, and says that it was trained so long"
    model, tokenizer, about = load(folder)
    assert about['steps'] == steps and all(p.isfinite().all() for p in model.parameters())
    return about


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# ---- what comes afterwards fails

AFTERWARDS = {
    'the evaluation': (
        'llm_lab.evaluation.evaluate',
        RuntimeError('out of\nmemory'),
        'the score is refused',
    ),
    'a score below the floor': (
        'llm_lab.evaluation.evaluate',
        LabError('below the floor'),
        'the score is refused',
    ),
    'what is above the floor': (
        'llm_lab.evaluation.excess_by_kind',
        ValueError('not told'),
        'the score is refused',
    ),
    'the picture': (
        'llm_lab.train.plot_loss',
        ImportError('a broken library'),
        'no loss.png: ImportError',
    ),
    'no matplotlib': (
        'llm_lab.train.pyplot',
        LabError('matplotlib is not installed'),
        'no loss.png: matplotlib',
    ),
    'the card': ('llm_lab.package.model_card', KeyError('licence'), ''),
    'result.json': ('llm_lab.first_tour.json.dumps', TypeError('not plain'), ''),
    'a look': ('llm_lab.sampling.sample', MemoryError('no room'), 'no look at step'),
    'the next steps': (
        'llm_lab.first_tour._what_next',
        FileNotFoundError('no working folder'),
        'kept in',
    ),
}


@pytest.mark.parametrize('what', AFTERWARDS)
def test_whatever_fails_afterwards_the_model_is_there(what, home, poem, monkeypatch, capsys):
    monkeypatch.setattr(chapter, '_picture', PICTURE)
    place, error, words = AFTERWARDS[what]
    if what == 'what is above the floor':
        monkeypatch.setattr(chapter, '_tells_tales', lambda corpus: True)
    if what == 'result.json':
        complete = chapter._complete

        def without(*args):
            with monkeypatch.context() as m:
                m.setattr(place, raises(error))
                complete(*args)

        monkeypatch.setattr(chapter, '_complete', without)
    else:
        monkeypatch.setattr(place, raises(error))
    result = tour(poem, 1, SMALL)
    opened(home / 'artifacts' / 'tour')
    said = capsys.readouterr().out
    assert words in said and 'Traceback' not in said
    if what in ('the evaluation', 'a score below the floor'):
        assert result['val_loss'] is None
    assert names(home / 'artifacts') == ['tour']
    shown = {*names(home / 'artifacts' / 'tour')}
    assert ('loss.png' in shown) == (what not in ('the picture', 'no matplotlib', 'result.json'))
    if what != 'result.json':
        assert json.loads((home / 'artifacts' / 'tour' / 'result.json').read_text()) == result


def test_ctrl_c_in_the_evaluation_leaves_the_package(home, poem, monkeypatch):
    monkeypatch.setattr('llm_lab.evaluation.evaluate', raises(KeyboardInterrupt()))
    assert main(['tour', '--corpus', str(poem), *(f'{k}={v}' for k, v in SMALL)]) == 0
    opened(home / 'artifacts' / 'tour')


def test_an_error_in_training_keeps_what_was_learned(home, poem, monkeypatch, capsys):
    "An error that nobody expects is not hidden"
    monkeypatch.setattr(chapter, '_watcher', at_step(5, raises(RuntimeError('a bug'))))
    with pytest.raises(RuntimeError, match='a bug'):
        tour(poem, 1, SMALL)
    opened(home / 'artifacts' / 'tour', steps=5)
    assert 'the model of step 5' in capsys.readouterr().out


def test_a_model_of_numbers_that_are_none_is_not_kept(home, poem, monkeypatch):
    "What it was before is"
    import torch

    def spoil(run):
        with torch.no_grad():
            next(run.model.parameters()).fill_(math.nan)
        raise LabError('the loss is no number')

    monkeypatch.setattr(chapter, '_watcher', lambda *a: {(5,): spoil})
    with pytest.raises(LabError, match='no number'):
        tour(poem, 1, SMALL)
    assert names(home / 'artifacts') == []
    monkeypatch.setattr(chapter, 'KEEP_EVERY', 0)
    with pytest.raises(LabError, match='no number'):
        tour(poem, 1e-9, SMALL)
    opened(home / 'artifacts' / 'tour', steps=1)


# ---- names


def test_a_file_name_that_is_not_utf8(home, tmp_path, capsys):
    path = os.path.join(os.fsencode(tmp_path), b'po\xe8me \xff.txt')
    try:
        Path(os.fsdecode(path)).write_text(POEM, encoding='utf-8')
    except OSError as e:
        pytest.skip(f'this file system takes no such name: {e}')
    result = tour(os.fsdecode(path), 1, SMALL)
    assert result['corpus'] == 'po�me �'
    about = opened(home / 'artifacts' / 'tour')
    assert 'po�me �' in about['data'] and '# tour' in (
        home / 'artifacts' / 'tour' / 'README.md'
    ).read_text(encoding='utf-8')
    json.loads((home / 'artifacts' / 'tour' / 'result.json').read_bytes().decode('utf-8'))
    capsys.readouterr().out.encode('utf-8')


@pytest.mark.parametrize('name', ['tiny_tales', 'tiny_tales.txt', 'dolly'])
def test_a_file_named_like_a_corpus_is_a_file(name, home, monkeypatch, capsys):
    "Which text it is, its hash decides: it is no Tiny Tales, and `eval` reads the file again"
    (home / name).write_text(POEM, encoding='utf-8')
    taken_for_tales = []
    monkeypatch.setattr(
        'llm_lab.evaluation.excess_by_kind', lambda *a, **kw: taken_for_tales.append(a)
    )
    result = tour(os.path.join('.', name), 1, SMALL)
    assert taken_for_tales == []
    assert (
        result['val_loss'] and 'excess_bits' not in result and result['corpus'] == Path(name).stem
    )
    about = opened(home / 'artifacts' / 'tour')
    assert Path(about['data']) == Path(name) and about['data'] != name
    assert main(['eval', 'artifacts/tour']) == 0
    said = capsys.readouterr()
    assert f'val loss {result["val_loss"]:.3f} nats' in said.out and said.err == ''
    (home / name).write_text(POEM.replace('cat', 'dog'), encoding='utf-8')
    assert (
        main(['eval', 'artifacts/tour']) == 1
        and 'is not the text that this model was trained on' in capsys.readouterr().err
    )


def test_the_next_tour_has_the_next_folder_and_the_printed_commands_work(
    home, poem, monkeypatch, capsys
):
    monkeypatch.setattr(sys, 'argv', ['cli.py'])
    small = [f'{k}={v}' for k, v in SMALL]
    assert main(['tour', '--corpus', str(poem), *small]) == 0
    first = {
        p.name: (p.read_bytes(), p.stat().st_mtime_ns)
        for p in (home / 'artifacts' / 'tour').iterdir()
    }
    # what a killed writer with our number left is not in the way: in a container it is always 1
    (home / 'artifacts' / f'.tour.{os.getpid()}.new').mkdir()
    assert main(['tour', '--corpus', str(poem), *small]) == 0
    (home / 'artifacts' / f'.tour.{os.getpid()}.new').rmdir()
    assert main(['tour', '--corpus', str(poem), '--name', 'my.poem', *small]) == 0
    assert main(['tour', '--corpus', str(poem), '--name', 'my.poem', *small]) == 1
    said = capsys.readouterr()
    assert (
        said.err.count('\n') == 1 and 'my.poem is there already: choose another --name' in said.err
    )
    assert names(home / 'artifacts') == ['my.poem', 'tour', 'tour-2']
    assert first == {
        p.name: (p.read_bytes(), p.stat().st_mtime_ns)
        for p in (home / 'artifacts' / 'tour').iterdir()
    }
    typed = [
        shlex.split(line)
        for line in said.out.splitlines()
        if line.startswith('  python -m llm_lab.cli sample')
    ]
    assert [words[4] for words in typed] == [
        os.path.join('artifacts', n) for n in ('tour', 'tour-2', 'my.poem')
    ]
    for words in typed:
        assert main([*words[3:], '--tokens', '3']) == 0
    assert capsys.readouterr().out.count('the cat') >= 3


def test_a_path_of_another_home_is_quoted(home, poem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path / 'temporary')
    tour(poem, 1, SMALL)
    line = next(o for o in capsys.readouterr().out.splitlines() if ' sample ' in o)
    assert str(home / 'artifacts' / 'tour') in shlex.split(line)


# ---- no room, no right


@pytest.fixture
def disk(home, monkeypatch):
    "A small disk that is the home, and how to mount it"

    def mount(how):
        return subprocess.run(
            ['mount', '-t', 'tmpfs', '-o', how, 'tmpfs', str(home)], capture_output=True
        ).returncode

    if shutil.which('mount') is None or mount('size=3m'):
        pytest.skip('mounting a small disk needs Linux and its administrator')
    monkeypatch.chdir(home.parent)
    yield home, mount
    monkeypatch.chdir(home.parent)
    subprocess.run(['umount', '-l', str(home)], check=True)


def fill(disk):
    "Not a byte is left"
    with open(disk / 'full', 'wb', buffering=0) as f:
        with pytest.raises(OSError, match='No space left'):
            while True:
                f.write(bytes(4096))


def test_a_disk_that_fills_up_meanwhile(disk, poem, monkeypatch, capsys):
    "The place was taken before step 1: the untrained model makes room for the trained one"
    home, _ = disk
    monkeypatch.setattr(chapter, '_watcher', at_step(5, lambda: fill(home)))
    tour(poem, 1, SMALL)
    opened(home / 'artifacts' / 'tour')
    assert names(home / 'artifacts') == ['tour']
    assert 'no result.json, the model is kept: OSError: [Errno 28]' in capsys.readouterr().out


def test_a_disk_that_fills_up_after_a_package_on_the_way(disk, poem, monkeypatch):
    "That one stays, the last one goes to the temporary folder, and the error says where"
    home, _ = disk
    monkeypatch.setattr(chapter, 'KEEP_EVERY', 0)
    monkeypatch.setattr(chapter, '_watcher', at_step(5, lambda: fill(home)))
    with pytest.raises(
        LabError, match='could not be written .*No space left.*the model is in '
    ) as e:
        tour(poem, 1e-9, SMALL)
    opened(home / 'artifacts' / 'tour', steps=1)
    place = Path(str(e.value).rpartition('the model is in ')[2])
    opened(place)
    assert place.is_relative_to(home.parent / 'temporary') and 'result.json' in names(place)


@pytest.mark.parametrize('temporary', ['there', 'gone'])
def test_a_folder_that_becomes_read_only(temporary, disk, poem, monkeypatch, capsys):
    home, mount = disk
    other = home.parent / 'temporary'
    if temporary == 'gone':
        monkeypatch.setattr(tempfile, 'tempdir', str(home))
    monkeypatch.setattr(chapter, '_watcher', at_step(5, lambda: mount('remount,ro')))
    assert main(['tour', '--corpus', str(poem), *(f'{k}={v}' for k, v in SMALL)]) == 1
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'you may not write into' in said
    place = Path(said.strip().rpartition('the model is in ')[2])
    opened(place)
    assert place.parent.parent == (other if temporary == 'there' else Path.cwd())


def test_where_nothing_can_be_written_the_loss_is_said(home, poem, monkeypatch):
    def fails():
        monkeypatch.setattr('llm_lab.package.save', raises(OSError(errno.EIO, 'broken')))

    monkeypatch.setattr(chapter, '_watcher', at_step(5, fails))
    with pytest.raises(LabError, match='the model is lost, no folder takes it: .*broken'):
        tour(poem, 1, SMALL)
    assert names(home.parent / 'temporary') == [] and names(home) == ['artifacts']


# ---- long tours


def test_a_long_tour_is_kept_now_and_then(home, poem, monkeypatch):
    "By a clock of our own: every five minutes or tenth of the time, and for 1 % of it at most"

    class Clock:
        now, cost, saves = 0.0, 0.0, []

    monkeypatch.setattr(chapter.time, 'monotonic', lambda: Clock.now)

    def save(keeper, run, folder=None):
        Clock.now += Clock.cost
        Clock.saves.append(Clock.now)

    monkeypatch.setattr(chapter._Keeper, 'save', save)

    def saves(minutes, cost=0.0):
        Clock.now, Clock.cost = 0.0, 0.0
        keeper = chapter._Keeper(None, '', minutes)
        keeper.begin(None)
        Clock.saves, Clock.cost, start = [], cost, Clock.now
        while Clock.now - start < 60 * minutes:
            keeper.on_the_way(None)
            Clock.now += 5
        return len(Clock.saves)

    assert saves(3) == 0  # it is over before it is time
    assert 4 <= saves(30) <= 6 and 9 <= saves(600) <= 10
    assert saves(600, cost=60) * 60 <= 0.01 * 36_000 + 60  # a large model, a slow disk


def test_a_save_on_the_way_that_fails_is_a_line(home, poem, monkeypatch, capsys):
    monkeypatch.setattr(chapter, 'KEEP_EVERY', 0)
    real = chapter._Keeper.save

    def save(keeper, run, folder=None):
        if run.step in (1, 2):
            raise OSError(errno.ENOSPC, 'full')
        return real(keeper, run, folder)

    monkeypatch.setattr(chapter._Keeper, 'save', save)
    tour(poem, 1e-9, SMALL)
    opened(home / 'artifacts' / 'tour')
    assert 'not kept at step 1: OSError: [Errno 28] full' in capsys.readouterr().out


# ---- before step 1


def wrong(home, tmp_path):
    "(words, arguments) of what is found out before the first step"
    letters = tmp_path / 'letters.txt'
    lone = tmp_path / 'lone.txt'
    letters.write_text(''.join(map(chr, range(0x10000, 0x10000 + 20_500))) + POEM, encoding='utf-8')
    lone.write_text(f'{POEM}\n<|endoftext|>\nx\n<|endoftext|>\n', encoding='utf-8')
    return [
        ('different characters, the tour learns at most 20,000', [str(letters)]),
        ('no corpus and no file', [str(tmp_path / 'none.txt')]),
        ('--name .* will not do', ['POEM', '--name', '../out']),
        ('did you mean model.n_heads', ['POEM', 'n_head=1']),
        ('model.d_model=0.5: give a whole number', ['POEM', 'model.d_model=.5']),
        ('train.steps: the tour decides this itself', ['POEM', 'steps=9']),
        ('eval.tokens: the tour decides this itself', ['POEM', 'eval.tokens=9']),
        ('contexts of 9999 need 100,000', ['POEM', 'length=9999']),
    ]


def test_what_can_be_known_is_known_before_step_1(home, poem, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('llm_lab.train.fit', raises(AssertionError('it was not found out')))
    small = [f'{k}={v}' for k, v in SMALL]

    def refused(words, corpus, *more):
        assert (
            main(['tour', '--corpus', str(corpus).replace('POEM', str(poem)), *small, *more]) == 1
        )
        said = capsys.readouterr().err
        assert said.count('\n') == 1 and re.search(words, said), said
        assert not (home / 'artifacts').is_dir() or names(home / 'artifacts') == []

    for words, (corpus, *more) in wrong(home, tmp_path):
        refused(words, corpus, *more)
    for name, words in (
        ('toaster', "device 'toaster' cannot be used"),
        ('cuda:77', "device 'cuda:77' cannot be used"),
    ):
        monkeypatch.setenv('LLM_LAB_DEVICE', name)
        refused(words, poem)
    monkeypatch.delenv('LLM_LAB_DEVICE')
    monkeypatch.setattr(chapter, '_room', lambda *a: None)
    with monkeypatch.context() as m:
        m.setattr(
            'llm_lab.package.tensor_bytes', raises(OSError(errno.ENOSPC, 'No space left on device'))
        )
        refused('No space left on device', poem)
    with monkeypatch.context() as m:
        m.setattr(chapter, '_time_step', lambda setup: signal.raise_signal(signal.SIGTERM))
        assert (
            main(['tour', '--corpus', str(poem), *small]) == 143 and names(home / 'artifacts') == []
        )
    shutil.rmtree(home / 'artifacts')
    (home / 'artifacts').write_text('a file')
    assert (
        main(['tour', '--corpus', str(poem), *small]) == 1
        and capsys.readouterr().err.count('\n') == 1
    )
    for minutes in (0, math.nan, math.inf):
        with pytest.raises(LabError, match='give a number above 0'):
            tour(poem, minutes, SMALL)


def test_a_validation_text_in_which_nothing_is_predicted():
    import torch

    def check(ids, starts):
        texts = dict(train=(torch.zeros(50), starts), val=(ids, starts))
        chapter._check_texts('odd', 9, texts, 4)

    check(torch.zeros(2), None)
    for ids, starts in ((torch.zeros(1), None), (torch.zeros(3), torch.tensor([2]))):
        with pytest.raises(LabError, match='has a validation text of . characters'):
            check(ids, starts)


# ---- a run: the same kinds


def run_settings(poem, **more):
    own = {
        'data.corpus': poem,
        'data.length': 16,
        'model.d_model': 16,
        'model.n_layers': 1,
        'model.n_heads': 2,
        'train.steps': 4,
        'train.batch_size': 2,
        'eval.every': 4,
        'eval.tokens': 50,
        'eval.sample_tokens': 2,
        'log.checkpoint_every': 4,
        **more,
    }
    return [f'{k}={v}' for k, v in own.items()]


def test_a_run_foresees_what_would_fail_later(home, poem, monkeypatch):
    monkeypatch.setattr('llm_lab.runs.fit', raises(AssertionError('it was not found out')))
    with pytest.raises(LabError, match="^eval.prompt='漢': the character '漢'"):
        train_run('smoke', *run_settings(poem, **{'eval.prompt': '漢'}))
    monkeypatch.setenv('LLM_LAB_DEVICE', 'toaster')
    with pytest.raises(LabError, match="the device 'toaster' cannot be used"):
        train_run('smoke', *run_settings(poem))


def test_a_run_whose_evaluation_fails_says_where_it_is(home, poem, monkeypatch):
    real = sys.modules['llm_lab.runs'].evaluate
    monkeypatch.setattr('llm_lab.runs.evaluate', raises(RuntimeError('below\nthe floor')))
    monkeypatch.setattr('llm_lab.runs.peak_flops', lambda *a: 1.0)
    with pytest.raises(
        LabError, match='runs/x is trained and kept, but its evaluation failed: below; mend that'
    ) as e:
        train_run('smoke', *run_settings(poem), run='x')
    folder = Path(str(e.value).partition(' is trained')[0])
    assert load(folder).about['step'] == 4 and not (folder / 'result.json').exists()
    monkeypatch.setattr('llm_lab.runs.evaluate', real)
    assert train_run(resume=folder).result['steps'] == 4  # and it is evaluated when it can be


def test_a_tracker_that_fails_at_the_end_is_a_warning():
    from llm_lab.runs import _end

    engine = SingleProcess()
    engine.end_training = raises(ConnectionError('no network'))
    with pytest.warns(UserWarning, match='log.tracker=wandb: no network'):
        _end(engine, 'wandb')
    with pytest.raises(ConnectionError):
        _end(engine, 'none')


def test_a_plot_of_no_format_is_one_line_before_anything_is_read(home, capsys):
    for plot, words in (
        ('x.xyz', "no picture format 'xyz'"),
        (os.path.join('none', 'x.png'), 'is no folder'),
    ):
        assert main(['runs', 'nowhere', '--plot', plot]) == 1
        said = capsys.readouterr().err
        assert said.count('\n') == 1 and words in said


# ---- nobody listens


class Broken(io.StringIO):
    "A stream that fails when it is written to, or when it is flushed"

    def __init__(self, error, late):
        super().__init__()
        self.error, self.late = error, late

    def write(self, text):
        if not self.late:
            raise self.error
        return len(text)

    def flush(self):
        if self.late:
            raise self.error


@pytest.mark.parametrize('late', [False, True])
@pytest.mark.parametrize(
    'error',
    [
        OSError(errno.EIO, 'gone'),
        BrokenPipeError(errno.EPIPE, 'gone'),
        OSError(errno.ENOSPC, 'full'),
        ValueError('closed'),
    ],
)
def test_what_cannot_be_printed_is_dropped(error, late, monkeypatch):
    streams = Broken(error, late), Broken(error, late)
    monkeypatch.setattr(sys, 'stdout', streams[0])
    monkeypatch.setattr(sys, 'stderr', streams[1])
    with surviving_output():
        for _ in range(3):
            print('words', flush=True)
            print('words', file=sys.stderr)
    assert (sys.stdout, sys.stderr) == streams


def test_what_is_printed_arrives_as_well_as_it_can(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    monkeypatch.setattr(sys, 'stdout', out)
    monkeypatch.setattr(sys, 'stderr', None)  # it was closed when Python began
    with surviving_output():
        print('3 × 4 \udcff ok')
        print('nobody', file=sys.stderr)
        assert not sys.stdout.isatty()
    assert out.buffer.getvalue() == b'3 ? 4 ? ok\n'
    monkeypatch.undo()
    with pytest.raises(RuntimeError), surviving_output():
        raise RuntimeError('what is wrong is not dropped')


# ---- signals, in processes of their own

CHILDREN = multiprocessing.get_context('spawn' if os.name == 'nt' else 'forkserver')
posix = pytest.mark.skipif(
    os.name == 'nt', reason='Windows has neither these signals nor terminals'
)


def child(home, argv, said, how):
    "One life of the command line: at step 5 it does what `how` says"
    os.environ['LLM_LAB_HOME'] = str(home)
    os.chdir(home)
    if 'terminal' in how:
        import fcntl
        import termios

        os.setsid()
        out = os.open(how['terminal'], os.O_RDWR)
        fcntl.ioctl(out, termios.TIOCSCTTY, 0)
    elif 'closed' in how:
        reader, out = os.pipe()
        os.close(reader)
    else:
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for n in (1, 2):
        os.dup2(out, n)
    # pytest has streams of its own, and whoever started it may have been in the background
    sys.stdout, sys.stderr = (
        os.fdopen(n, 'w', buffering=1, encoding='utf-8', closefd=False) for n in (1, 2)
    )
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        action = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in how.get('ignored', ()) else action)
    import torch

    torch.set_num_threads(1)
    for name, value in short_tours(how.get('steps', 1_000_000)).items():
        setattr(chapter, name, value)
    chapter.KEEP_EVERY = how.get('keep_every', 300)

    def then():
        (home / 'ready').touch()
        for number in how.get('signals', ()):
            os.kill(os.getpid(), number)

    chapter._watcher = at_step(5, then)
    record = TrainingRun.record

    def recorded(job, run):
        then()
        return record(job, run)

    TrainingRun.record = recorded
    code = main(argv)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


@pytest.fixture(scope='module')
def nursery():
    "A server of forks that has PyTorch; made before a test has a temporary folder of its own"
    CHILDREN.set_forkserver_preload(['pytest', 'torch._dynamo', 'llm_lab.runs', 'llm_lab.cli'])
    multiprocessing.util.get_temp_dir()
    first = CHILDREN.Process(target=int)
    first.start()
    first.join()


@pytest.fixture
def born(nursery, home, poem):
    "A function that starts such a life; what is left of them at the end is killed"
    lives, said = [], home.parent / 'said.txt'

    def begin(minutes='1', argv=None, **how):
        argv = argv or [
            'tour',
            '--corpus',
            str(poem),
            '--minutes',
            minutes,
            *(f'{k}={v}' for k, v in SMALL),
        ]
        lives.append(CHILDREN.Process(target=child, args=(home, argv, said, how)))
        lives[-1].start()
        return lives[-1]

    begin.said = said
    yield begin
    for p in lives:
        if p.is_alive():
            p.kill()
        p.join()


@posix
@pytest.mark.parametrize(
    'signals,ignored,code,word',
    [
        ([signal.SIGTERM], [signal.SIGINT], 143, 'by SIGTERM'),  # as `llm-lab tour &` in a script
        # the shell says it, then the system
        ([signal.SIGHUP, signal.SIGHUP], [], 129, 'by SIGHUP'),
        ([signal.SIGINT], [], 0, 'by hand'),
    ]
    if os.name != 'nt'
    else [],
)
def test_who_asks_a_tour_to_end_gets_the_model(signals, ignored, code, word, born, home):
    p = born(signals=signals, ignored=ignored)
    p.join(600)
    assert p.exitcode == code, born.said.read_text()
    about = load(home / 'artifacts' / 'tour').about
    assert 5 <= about['steps'] < about['planned'] == 1_000_000 and about['stopped'] == word
    assert json.loads((home / 'artifacts' / 'tour' / 'result.json').read_text())['stopped'] == word
    assert f'stopped {word}, what was learned is kept' in born.said.read_text()


@posix
def test_nohup_stays_nohup(born, home):
    p = born(signals=[signal.SIGHUP] * 2, ignored=[signal.SIGHUP], steps=20)
    p.join(600)
    assert p.exitcode == 0, born.said.read_text()
    opened(home / 'artifacts' / 'tour', steps=20)


def close_the_terminal(born, home, **how):
    "The life that a pseudoterminal shows is at step 5 when that is closed; its exit code"
    master, slave = os.openpty()
    p = born(terminal=os.ttyname(slave), **how)
    while not (home / 'ready').exists():
        assert p.is_alive()
        if select.select([master], [], [], 0.05)[0]:
            os.read(master, 4096)
    os.close(slave)
    os.close(master)
    p.join(600)
    return p.exitcode


@posix
def test_a_terminal_that_is_closed_leaves_the_model(born, home):
    "The real thing: its end is SIGHUP, and an error for each word from then on"
    assert close_the_terminal(born, home) == 129
    about = load(home / 'artifacts' / 'tour').about
    assert about['steps'] >= 5 and about['stopped'] == 'by SIGHUP'
    assert 'result.json' in names(home / 'artifacts' / 'tour')


@posix
def test_a_terminal_that_is_closed_leaves_the_run(born, home, poem):
    settings = run_settings(
        poem,
        **{
            'train.steps': 100_000,
            'log.every': 1,
            'eval.every': 100_000,
            'log.checkpoint_every': 100_000,
        },
    )
    assert close_the_terminal(born, home, argv=['train', 'smoke', *settings, '--run', 'x']) == 129
    assert load(home / 'experiments' / 'smoke' / 'runs' / 'x').about['step'] >= 1


@posix
def test_a_reader_that_has_gone_does_not_end_a_tour(born, home):
    "As `llm-lab tour | head`, or a lost connection without a terminal"
    p = born(closed=True, steps=20)
    p.join(600)
    assert p.exitcode == 0
    opened(home / 'artifacts' / 'tour', steps=20)


@posix
def test_a_power_cut_in_a_long_tour_takes_what_came_after_the_last_package(born, home):
    p = born(minutes='0.000001', keep_every=0, signals=[signal.SIGKILL])
    p.join(600)
    assert p.exitcode == -signal.SIGKILL, born.said.read_text()
    about = load(home / 'artifacts' / 'tour').about
    assert 1 <= about['steps'] <= 5 and about['planned'] == 1_000_000


@posix
def test_a_hang_up_is_heard_once():
    "It comes again while the work is saved, and is ignored; who had it ignored never hears it"
    before = signal.getsignal(signal.SIGHUP)
    asked = []
    broken = []

    def breaks(*args):
        broken.append(args)  # what would end the process

    try:
        signal.signal(signal.SIGHUP, breaks)
        with graceful_interrupt(lambda why: asked.append(f'outer {why}')):
            with graceful_interrupt(asked.append):
                for _ in range(2):
                    signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert asked == ['by SIGHUP'] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        with graceful_interrupt(asked.append):
            signal.raise_signal(signal.SIGHUP)
        assert asked == ['by SIGHUP'] and broken == []
        signal.signal(signal.SIGHUP, breaks)
        with graceful_interrupt(asked.append):
            pass
        assert signal.getsignal(signal.SIGHUP) is breaks
    finally:
        signal.signal(signal.SIGHUP, before)
