"""What no notebook can see: whole processes that are killed, interrupted, cut off from the network,
or out of disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from cases import HANG, cases
from helpers import ended, in_a_process as llm_lab, tiny_model

from llm_lab.chars import CharTokenizer
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.package import load, save

SMALL = ['length=32', 'd_model=32', 'n_layers=1', 'n_heads=2']
RUN = [sys.executable, '-m', 'llm_lab.cli']


def env(home, **more):
    return {
        **{k: v for k, v in os.environ.items() if k != 'LLM_LAB_DATA'},
        'LLM_LAB_HOME': str(home),
        **more,
    }


@pytest.fixture
def poem(tmp_path):
    path = tmp_path / 'poem.txt'
    path.write_text('the cat sat on the mat. the dog sat on the log.\n' * 200, encoding='utf-8')
    return path


def test_a_tour_leaves_a_package_and_nothing_else(tmp_path, poem):
    r = llm_lab(tmp_path, 'tour', '--corpus', str(poem), '--minutes', '0.05', *SMALL)
    assert r.returncode == 0, r.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ['artifacts', 'poem.txt']
    assert [p.name for p in (tmp_path / 'artifacts').iterdir()] == ['tour']
    result = json.loads((tmp_path / 'artifacts' / 'tour' / 'result.json').read_text())
    assert result['val_loss'] < 2.5 and result['steps'] >= 20
    assert (tmp_path / 'artifacts' / 'tour' / 'loss.png').read_bytes()[1:4] == b'PNG'
    s = llm_lab(tmp_path, 'sample', 'artifacts/tour', '--prompt', 'the cat', '--tokens', '20')
    assert s.returncode == 0 and s.stdout.startswith('the cat') and len(s.stdout) == 28


@pytest.mark.slow  # by day `.ci/run` cuts the network and makes a tour
def test_the_default_tour_needs_no_network(tmp_path):
    "Every attempt to open a connection ends the process"
    code = (
        "import os, socket\n"
        "def no(*a, **k): print('asked for the network', a, flush=True); os._exit(77)\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = no\n"
        "from llm_lab.cli import main; raise SystemExit(main(['tour', '--minutes', '0.05', *%r]))"
        % SMALL
    )
    r = subprocess.run(
        [sys.executable, '-c', code],
        env=env(tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert r.returncode == 0, r.stdout + r.stderr
    assert 'corpus  tiny_tales' in r.stdout and 'above perfect' in r.stdout


TELLING = """
from llm_lab import cli, train
real, taken = train.update, []
def update(*args, **kw):
    taken.append(1)
    if len(taken) % 20 == 0: print('a step', flush=True)
    return real(*args, **kw)
train.update = update
raise SystemExit(cli.main({argv!r}))
"""


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no SIGINT for one process')
def test_ctrl_c_stops_and_keeps_what_was_learned(tmp_path, poem):
    "Sent when it has told of a step after its plan, however long that takes"
    argv = ['tour', '--corpus', str(poem), '--minutes', '9', *SMALL]
    p = subprocess.Popen(
        [sys.executable, '-c', TELLING.format(argv=argv)],
        env=env(tmp_path),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def until(word):
        while not (line := p.stdout.readline()).startswith(word):
            assert line, f'the tour ended before it said {word}'
        return line

    planned = int(until('plan').split(' ms: ')[1].split()[0].replace(',', ''))
    until('a step')
    p.send_signal(signal.SIGINT)
    said = p.communicate(timeout=HANG)[0]
    assert p.returncode == 0 and 'stopped by hand, what was learned is kept' in said, said
    assert (
        0
        < json.loads((tmp_path / 'artifacts' / 'tour' / 'result.json').read_text())['steps']
        < planned
    )
    load(tmp_path / 'artifacts' / 'tour')


@pytest.mark.skipif(os.name == 'nt', reason='needs a limit on file sizes')
def test_a_write_that_fails_is_one_line_and_leaves_nothing(tmp_path, poem):
    "No file may grow past 20 kB, so the weights cannot be written"
    import resource

    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    r = llm_lab(
        tmp_path, 'tour', '--corpus', str(poem), '--minutes', '0.05', *SMALL, preexec_fn=limit
    )
    assert r.returncode == 1 and r.stderr.count('\n') == 1, r.stderr
    assert 'File too large' in r.stderr and 'free some space' in r.stderr
    assert list((tmp_path / 'artifacts').iterdir()) == []


@pytest.fixture
def tiny_disk(tmp_path):
    "A disk of 300 kB"
    disk = tmp_path / 'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=300k', 'tmpfs', str(disk)]
    if shutil.which('mount') is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('mounting a small disk needs Linux and its administrator')
    yield disk
    subprocess.run(['umount', str(disk)], check=True)


def test_a_full_disk_keeps_the_old_package(tiny_disk):
    tok = CharTokenizer('abc')
    save(tiny_disk / 'model', tiny_model(d_model=16), tok)
    with pytest.raises(OSError, match='No space left'):
        save(tiny_disk / 'model', tiny_model(d_model=128), tok)
    assert load(tiny_disk / 'model').model.cfg.d_model == 16
    assert [p.name for p in tiny_disk.iterdir()] == ['model']


def test_a_tour_looks_for_room_before_it_trains(tiny_disk, poem):
    r = llm_lab(tiny_disk, 'tour', '--corpus', str(poem), '--minutes', '5')
    assert (
        r.returncode == 1
        and r.stderr.count('\n') == 1
        and 'set LLM_LAB_HOME to another disk' in r.stderr
    ), r.stderr
    assert r.stdout == '' and not [*tiny_disk.rglob('*.safetensors')], 'it has begun'


def life(run):
    """The pid of a child that is a fork of this process, has PyTorch already, and does `run`; what
    it calculates with must be there before"""
    if pid := os.fork():
        return pid
    try:
        run()
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no SIGKILL')
def test_sigkill_before_every_rename_of_an_overwrite(tmp_path):
    """Killed before the first, second, … rename: what opens afterwards is the old package or the
    new one, every hash right"""
    old, new = (tiny_model(d_model=width) for width in (16, 32))

    def killed(renames):
        real, left = os.replace, [renames]

        def replace(*args):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        os.replace = replace  # in the child alone
        save(tmp_path / 'model', new, CharTokenizer('abc'))

    widths = []
    for renames in range(20):
        save(tmp_path / 'model', old, CharTokenizer('abc'))
        code = ended(life(lambda renames=renames: killed(renames)))
        assert code in (0, -signal.SIGKILL)
        widths.append(load(tmp_path / 'model').model.cfg.d_model)
        if code == 0:
            break
    assert (
        code == 0
        and widths[-1] == 32
        and widths[:-1] == [16] * (len(widths) - 1)
        and len(widths) >= 3
    ), widths
    # and what a kill after the renames leaves is cleared by the next writer
    (tmp_path / '.model.1.old').mkdir()
    save(tmp_path / 'model', old, CharTokenizer('abc'))
    assert [d.name for d in tmp_path.iterdir() if d.name.endswith('.old')] == []


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no SIGKILL')
def test_sigkill_at_random_moments_of_an_overwrite(tmp_path):
    model = MiniGPT(GPTConfig(vocab_size=3, d_model=256, n_layers=4))
    tok = CharTokenizer('abc')

    def saves(first):
        save(tmp_path / 'model', model, tok)
        first.touch()
        while True:
            save(tmp_path / 'model', model, tok)

    for n in range(cases(10, 5)):
        first = tmp_path / f'first-{n}'
        pid = life(lambda first=first: saves(first))
        while not first.exists():
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), 'it ended by itself'
            time.sleep(0.001)
        time.sleep(0.02 + 0.013 * n)  # whatever it is doing then
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL  # it was alive, and in the middle of a save
        load(tmp_path / 'model')


def test_an_error_between_the_renames_keeps_the_old_package(tmp_path, monkeypatch):
    old, new = (tiny_model(d_model=width) for width in (16, 32))
    save(tmp_path / 'model', old, CharTokenizer('abc'))
    real = os.replace

    def replace(a, b):
        if str(a).endswith('.new') and str(b).endswith('model'):
            raise KeyboardInterrupt
        return real(a, b)

    monkeypatch.setattr(os, 'replace', replace)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / 'model', new, CharTokenizer('abc'))
    assert load(tmp_path / 'model').model.cfg.d_model == 16
    assert [d.name for d in tmp_path.iterdir()] == ['model']


def test_a_wrong_hash_is_one_line(tmp_path):
    (tmp_path / 'local').mkdir()
    (tmp_path / 'local' / 'tiny_shakespeare.txt').write_text('First Citizen:\nNot the real one.\n')
    r = llm_lab(
        tmp_path,
        'tour',
        '--corpus',
        'tiny_shakespeare',
        env=dict(LLM_LAB_DATA=str(tmp_path / 'local')),
    )
    assert (
        r.returncode == 1
        and r.stderr.count('\n') == 1
        and 'has SHA-256' in r.stderr
        and 'delete it' in r.stderr
    ), r.stderr


def test_a_closed_pipe_is_no_traceback(tmp_path):
    save(
        tmp_path / 'm',
        tiny_model(d_model=16),
        CharTokenizer('ab\n'),
    )
    p = subprocess.Popen(
        [*RUN, 'sample', 'm', '--tokens', '5000'],
        cwd=tmp_path,
        env=env(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    p.stdout.read(1)
    p.stdout.close()
    assert 'Traceback' not in p.stderr.read()
    p.wait(HANG)


@pytest.mark.skipif(os.name == 'nt', reason='the kernel is interrupted by a signal')
def test_the_notebooks_interrupt_button_stops_training(tmp_path):
    """A live kernel, a long training, an interrupt: the cell ends without an error and the model is
    there"""
    from queue import Empty

    manager = pytest.importorskip('jupyter_client', reason='pip install jupyter_client').manager
    pytest.importorskip('ipykernel', reason='pip install ipykernel')
    kernel, client = manager.start_new_kernel(
        kernel_name='python3', env=env(tmp_path), cwd=str(tmp_path), startup_timeout=HANG
    )
    said = []
    try:
        client.execute(
            'import torch\nfrom llm_lab.gpt import GPTConfig, MiniGPT\nfrom llm_lab.train '
            'import fit, random_crops\n'
            'print("ready")\nrun = fit(MiniGPT(GPTConfig(vocab_size=9, d_model=32, n_layers=1)), '
            'random_crops(torch.randint(9, (5000,)), 4, 32), 1_000_000, callbacks={(20,): lambda '
            'run: print("under way")})\n'
            'print("steps", run.step, run.stopped)'
        )
        while True:
            try:
                message = client.get_iopub_msg(timeout=HANG)
            except Empty:
                pytest.fail(f'the kernel says nothing more: {said}')
            kind, content = message['msg_type'], message['content']
            if kind == 'stream':
                said.append(content['text'])
            if kind == 'error':
                pytest.fail(content['evalue'])
            if kind == 'stream' and 'under way' in content['text']:
                kernel.interrupt_kernel()
            if (
                kind == 'status'
                and content['execution_state'] == 'idle'
                and 'steps' in ''.join(said)
            ):
                break
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
    steps, stopped = ''.join(said).split('steps ')[1].strip().split(maxsplit=1)
    assert 0 < int(steps) < 1_000_000 and stopped == 'by hand'
