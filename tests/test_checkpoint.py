"""What `checkpoint` promises and no notebook shows: each step resumed, each system call of a save
made to fail, each file damaged."""

import ast
import errno
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from cases import ALL, HANG, cases, crossed, some
from helpers import file_hash, one_line
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from
from test_layers import cells, plain
from torch.nn import functional as F

from llm_lab import checkpoint, package
from llm_lab.chars import CharTokenizer
from llm_lab.checkpoint import (
    CheckpointManager,
    MetricsLog,
    _best,
    optimizer_state,
    restore_optimizer,
)
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.parts import part
from llm_lab.gqa import GQA
from llm_lab.core import LabError
from llm_lab.llama_block import SoftcapHead, QKNorm, llama
from llm_lab.positions import RoPE
from llm_lab.init import spectral_init
from llm_lab.optim import OPTIMIZERS, muon
from llm_lab.efficient import StepRunner
from llm_lab.batching import BatchStream
from llm_lab.package import resolve, load, write_manifest
from llm_lab.sampling import sample
from llm_lab.train import TrainState, fit, mean_loss, next_token_loss

ROOT = Path(__file__).resolve().parent.parent
TEXT = ''.join(random.Random(0).choices('abcdefgh .\n', k=1200))
TOK = CharTokenizer.train(TEXT)
IDS = torch.tensor(TOK.encode(TEXT))
WEIGHTS, MEMORY = 'model.safetensors', 'optimizer.safetensors'


pytestmark = pytest.mark.usefixtures('one_thread')


def begin(opt=muon, steps=40, dropout=0.2, make=GPTConfig, **parts):
    "(a run at its beginning, its batches)"
    model = MiniGPT(
        make(
            vocab_size=TOK.vocab_size,
            max_len=16,
            d_model=16,
            n_layers=2,
            n_heads=2,
            dropout=dropout,
            **parts,
        )
    )
    return TrainState(model, steps, optimizer=opt(model)), BatchStream(IDS, 6, 16, seed=1)


def go(run, batch, *saves, step_fn=None, callbacks=None, **kw):
    callbacks = {**(callbacks or {}), **{(n,): f for n, f in saves}}
    return fit(
        run.model,
        batch,
        run.steps,
        state=run,
        step_fn=step_fn or StepRunner(accumulate=3),
        callbacks=callbacks,
        **kw,
    )


def bits(run):
    "All that a run is, as bytes, by name"
    tensors, groups = optimizer_state(run.model, run.optimizer)
    tensors = {
        **run.model.state_dict(),
        **{f'optimizer/{k}': v for k, v in tensors.items()},
        'history': run.history,
    }
    facts = json.dumps([groups, run.step, run.tokens]).encode()
    return {**{k: v.numpy().tobytes() for k, v in tensors.items()}, 'facts': facts}


def same(a, b):
    return a.keys() == b.keys() and not [k for k in a if a[k] != b[k]]


def digests(place):
    return [file_hash(place / f) for f in (WEIGHTS, MEMORY)]


def resumed(folder, at, *saves, begin=begin, then=lambda run: None, **kw):
    "A fresh run that goes on from the checkpoint of step `at`"
    run, batch = begin()
    CheckpointManager(folder, TOK, data=batch).load(run, folder / 'checkpoints' / f'step-{at:06d}')
    assert run.step == at
    then(run)
    return go(run, batch, *saves, **kw)


# ---- exact resume


@pytest.fixture(scope='module')
def looked():
    return {4: lambda run: dict(val=mean_loss(run.model, IDS[:200]))}


@pytest.fixture(scope='module')
def kept(tmp_path_factory, looked):
    "(folder, the finished run) of 40 steps, a checkpoint of each"
    folder, (run, batch) = tmp_path_factory.mktemp('kept') / 'run', begin()
    go(run, batch, callbacks={**looked, 1: CheckpointManager(folder, TOK, keep=99, data=batch)})
    return folder, run


def test_a_run_ends_with_the_same_bits_wherever_it_is_resumed(kept, looked):
    """Dropout, three parts a batch, more than three times through the text, Muon: weights, memory,
    history and notes"""
    folder, run = kept
    whole = bits(run)
    assert 40 * 6 > 3 * begin()[1].per_epoch and len(run.notes) == 10
    assert same(bits(go(*begin())), whole)  # neither looking nor saving changed it
    assert CheckpointManager(folder, TOK).steps() == [*range(1, 41)]
    for at in some(range(1, 41), 5):
        again = resumed(folder, at, callbacks=looked)
        assert same(bits(again), whole), at
        assert again.notes == run.notes, at


def test_without_the_rng_states_the_bits_differ(kept):
    "So the test above can fail; without dropout nothing is drawn"
    folder, run = kept

    def forget(run):
        run.random = None

    for at in (1, 20, 39):
        again = bits(resumed(folder, at, then=forget))
        assert [k for k in again if k not in ('facts', 'history') and again[k] != bits(run)[k]], at
    calm = lambda: begin(dropout=0.0)
    run, batch = calm()
    go(run, batch, (20, CheckpointManager(folder.parent / 'calm', TOK, data=batch)))
    assert same(bits(resumed(folder.parent / 'calm', 20, begin=calm, then=forget)), bits(run))


def test_a_run_that_is_resumed_again_and_again_ends_with_the_same_files(kept, tmp_path):
    "Each life saves into the folder that it found"
    run, batch = begin()
    first = CheckpointManager(tmp_path, TOK, data=batch)
    go(run, batch, callbacks={(13,): first, 13: lambda run: run.stop('here')})
    for at, until in ((13, 29), (29, 40)):
        run, batch = begin()
        saves = CheckpointManager(tmp_path, TOK, data=batch)
        assert saves.load(run)['step'] == at
        go(run, batch, callbacks={(until,): saves, until: lambda run: run.stop('here')})
    assert same(bits(run), bits(kept[1]))
    assert digests(saves.folder_of(40)) == digests(CheckpointManager(kept[0], TOK).folder_of(40))


@pytest.mark.parametrize('name,precision', crossed(OPTIMIZERS, ['float32', 'bf16']))
def test_every_optimizer_is_resumed_bit_by_bit(name, precision, tmp_path):
    start = lambda: begin(OPTIMIZERS[name], steps=24)
    run, batch = start()
    go(
        run,
        batch,
        callbacks={1: CheckpointManager(tmp_path, TOK, keep=99, data=batch)},
        step_fn=StepRunner(accumulate=3, precision=precision),
    )
    for at in some((1, 11, 23, 2), 2):
        assert same(
            bits(
                resumed(
                    tmp_path, at, begin=start, step_fn=StepRunner(accumulate=3, precision=precision)
                )
            ),
            bits(run),
        ), at


@pytest.mark.parametrize(
    'parts',
    [
        dict(
            attn=part(GQA, n_kv_heads=1, transforms=(part(QKNorm), part(RoPE, partial=0.5))),
            lm_head=part(SoftcapHead, cap=9.0),
            tie=True,
        ),
        dict(init=part(spectral_init)),
        dict(init=part(spectral_init, gain=2.0)),
    ],
    ids=['parts', 'learned gains', 'fixed gains'],
)
def test_the_modern_block_is_resumed_bit_by_bit(parts, tmp_path):
    """Spectral normalisation remembers a direction from step to step: it is in the checkpoint, and
    a package opens to the same logits"""
    start = lambda: begin(steps=12, make=llama, **parts)
    run, batch = start()
    saves = CheckpointManager(tmp_path, TOK, keep=99, data=batch)
    go(run, batch, callbacks={1: saves})
    for at in (1, 5, 11):
        assert same(bits(resumed(tmp_path, at, begin=start)), bits(run)), at
    assert torch.equal(
        load(saves.folder_of(12)).model(IDS[None, :16]), run.model.eval()(IDS[None, :16])
    )


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_the_scale_of_fp16_comes_along_as_a_part(name, tmp_path):
    """It grows every third step until a gradient is too long for fp16: the step that is then left
    out is the same one"""

    def start():
        step = StepRunner(accumulate=2, precision='fp16')
        step.scaler = torch.amp.GradScaler('cpu', init_scale=2.0**14, growth_interval=3)
        return *begin(OPTIMIZERS[name], steps=24), step

    def parts(batch, step):
        return CheckpointManager(tmp_path, TOK, keep=99, data=batch, scaler=step.scaler)

    run, batch, step = start()
    go(run, batch, callbacks={1: parts(batch, step)}, step_fn=step)
    assert not run.history[1].isfinite().all() and run.history[1, -3:].isfinite().any()
    for at in (1, 5, 14, 23):
        for forget in (False, True):
            again, batch, other = start()
            parts(batch, other).load(again, parts(batch, other).folder_of(at))
            if forget:
                other.scaler = start()[2].scaler
            go(again, batch, step_fn=other)
            assert forget or (
                same(bits(again), bits(run))
                and other.scaler.state_dict() == step.scaler.state_dict()
            ), at
            if forget and at == 14:
                assert not same(bits(again), bits(run))


# ---- who looks on changes nothing


def test_evaluating_or_sampling_during_a_run_changes_no_weight(kept, tmp_path):
    "Nor does a callback that draws, seeds, drops out or saves"
    said = []

    def evaluates(run):
        return dict(val=mean_loss(run.model, IDS[:300]))

    def samples(run):
        said.append(sample(run.model, TOK, 'ab', max_new_tokens=6, seed=run.step))

    def draws(run):
        torch.rand(7), torch.randperm(5), F.dropout(torch.ones(9), 0.5), torch.nn.Linear(3, 3)

    def seeds(run):
        torch.manual_seed(1)

    def trains_on_nothing(run):
        run.model.train()(IDS[None, :16])

    careless = dict(zip((1, 2, 3, 4, 5), (evaluates, samples, draws, seeds, trains_on_nothing)))
    run, batch = begin()
    saves = CheckpointManager(tmp_path, TOK, keep=99, data=batch)
    go(run, batch, callbacks={**careless, (12, 20): draws, (12, 20, 40): saves})
    assert same(bits(run), bits(kept[1])) and run.model.training
    assert len(said) == 20 and len(run.notes) == 40 and len({n['val'] for n in run.notes}) > 30
    for at in (12, 20):
        assert same(bits(resumed(tmp_path, at)), bits(kept[1])), at
    assert digests(saves.folder_of(40)) == digests(CheckpointManager(kept[0], TOK).folder_of(40))


def test_a_draw_inside_a_step_does_change_the_weights(kept):
    "So the test above can fail"

    def draws(model, rows):
        torch.rand(1)
        return next_token_loss(model, rows)

    assert not same(bits(go(*begin(), loss_fn=draws)), bits(kept[1]))


# ---- every system call of a save


def grid(folder, every, shares=2):
    """(calls of a save by name, its syncs and renames, cases): see faults.py; two processes divide
    the work"""
    if shutil.which('strace') is None:
        pytest.skip('strace is not installed: apt-get install strace')
    argv = [sys.executable, str(ROOT / 'tests' / 'faults.py')]
    env = {
        **os.environ,
        'OMP_NUM_THREADS': '1',
        'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
    }
    for n in range(shares):
        (folder / str(n)).mkdir()
    workers = [
        subprocess.Popen(
            [*argv, str(folder / str(n)), str(every), str(n), str(shares)],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for n in range(shares)
    ]
    said = [w.communicate(timeout=HANG) for w in workers]
    assert [w.returncode for w in workers] == [0] * shares, [err[-2000:] for _, err in said]
    (plain, *tried), *others = ([json.loads(line) for line in out.splitlines()] for out, _ in said)
    if 'cannot' in plain:
        pytest.skip(f'strace may not trace here: {plain["cannot"].strip()}')
    return plain['counts'], plain['trace'], tried + [c for _, *more in others for c in more]


def in_order(trace):
    """Each file is synced, then comes the commit, then the folder is synced; names are written, and
    only then the old one goes"""

    def first(pattern, start=0):
        return next(n for n in range(start, len(trace)) if re.match(pattern, trace[n]))

    hidden = r'\.step-000020\.\d+\.new'
    commit = first(rf'rename.*/{hidden}", .*/step-000020"')
    synced = {
        m[1]
        for line in trace[:commit]
        if (m := re.match(rf'f\w*sync\(\d+<.*/{hidden}/?([^/>]*)>', line))
    }
    # before it has its own name
    synced = {name for name in synced if not re.fullmatch(r'\.tokenizer\.json\.\d+\.new', name)}
    assert synced == {
        '',
        'llm_lab.json',
        'tokenizer.json',
        WEIGHTS,
        'README.md',
        'package.json',
        MEMORY,
        'state.json',
        'manifest.json',
    }
    at = commit
    for pattern in (
        'f.*/checkpoints>',
        'rename.*/latest"',
        'f.*/run>',
        'rename.*/best"',
        'f.*/run>',
        r'rename.*/step-000010", .*\.gone"',
    ):
        at = first(pattern, at + 1)
    assert at == first(r'rename.*\.gone"')


def no_checkpoint_is_lost(counts, tried, expected):
    assert [c for c in tried if c['wrong']] == []
    assert len({(c['call'], c['k'], c['fault']) for c in tried}) == len(tried) == expected
    assert (
        {c['call'] for c in tried}
        == {*counts}
        >= {'openat', 'read', 'write', 'fsync', 'close', 'mkdir', 'unlinkat', 'rmdir'}
    )
    assert counts['fsync'] >= 9 and any(name.startswith('rename') for name in counts)
    for fault in ('SIGKILL', 'ENOSPC', 'EIO'):  # before the commit and after it
        assert {c['newest'] for c in tried if c['fault'] == fault} == {10, 20}
        assert {c['call'] for c in tried if c['fault'] == fault} == {*counts}
    assert {c['ended'] for c in tried if c['fault'] == 'SIGKILL'} == {-signal.SIGKILL}
    # an error may be of no account: is a file there, a terminal?
    assert {c['ended'] for c in tried if c['fault'] != 'SIGKILL'} == {
        0,
        3,
    }


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='strace is a tool of Linux')
def test_no_checkpoint_is_lost_when_any_system_call_of_a_save_kills_or_fails(tmp_path):
    "Every kind of call of a save meets all three faults, here and there"
    every = 29
    # one process: a second one would train the same runs again
    counts, trace, tried = grid(tmp_path, every, shares=1)
    in_order(trace)
    no_checkpoint_is_lost(
        counts,
        tried,
        sum(
            len(range(1 + j % min(n, every), n + 1, every))
            for n in counts.values()
            for j in range(3)
        ),
    )


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='strace is a tool of Linux')
def test_no_checkpoint_is_lost_when_every_system_call_of_a_save_meets_every_fault(tmp_path):
    counts, _, tried = grid(tmp_path, every=1)
    no_checkpoint_is_lost(counts, tried, 3 * sum(counts.values()))


def at_step(run, step, val=None):
    "The run, as if it had come to this step"
    if val is not None:
        run.notes.append(dict(step=step, val=val))
    run.step = step
    run.history[:, :step] = torch.arange(2.0 * step).view(2, step)
    return run


@pytest.mark.parametrize('name', ['fsync', 'replace', 'open', 'listdir'])
def test_a_run_that_outlives_an_error_of_the_disk_saves_again(name, tmp_path, monkeypatch):
    "The same process, its next checkpoint; also when the error came after the commit"
    real, left = getattr(os, name), [math.inf]

    def failing(*args, **kw):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.EIO, 'Input/output error')
        return real(*args, **kw)

    monkeypatch.setattr(os, name, failing)
    found = []
    for n in range(1, 99, 3 if name == 'fsync' and not ALL else 1):
        run = begin()[0]
        saves = CheckpointManager(tmp_path / str(n), TOK, keep=1)
        saves(at_step(run, 10, 3.0))
        left[0] = n
        try:
            saves(at_step(run, 20, 2.0))
            done = True
        except OSError:
            done = False
        came, left[0] = left[0] <= 0, math.inf
        found.append(CheckpointManager(saves.folder, TOK).load(begin()[0])['step'])
        assert came or done
        if not came:
            break
        saves(at_step(run, 30, 1.0))
        assert saves.steps() == [30] and [*saves.folder.rglob('.*')] == [], n
    assert found == sorted(found) and found[0] == 10 and found[-1] == 20 and len(found) > 3


# ---- the disk lies


@pytest.fixture
def good(kept, tmp_path):
    "A copy of a checkpoint, and a function that loads it"
    place = shutil.copytree(
        kept[0] / 'checkpoints' / 'step-000020', tmp_path / 'checkpoints' / 'step-000020'
    )
    run, batch = begin()
    saves = CheckpointManager(tmp_path, TOK, data=batch)
    return place, lambda: saves.load(run)


@pytest.fixture
def unread(monkeypatch):
    "What was parsed: nothing, as long as this list is empty"
    parsed = []

    def spy(f):
        return lambda *args, **kw: (parsed.append(f), f(*args, **kw))[1]

    for module in (checkpoint, package):
        monkeypatch.setattr(module, 'tensors_from', spy(tensors_from))

    class Json:
        dumps, loads = json.dumps, staticmethod(spy(json.loads))

    monkeypatch.setattr(checkpoint, 'json', Json)  # package reads manifests with its own
    return parsed


def shares(sizes, total, least):
    "`total` divided in proportion to the sizes, none below `least`"
    small = {f for f, s in sizes.items() if total * s < least * sum(sizes.values())}
    rest = sum(s for f, s in sizes.items() if f not in small)
    left = total - least * len(small)
    parts = {f: least if f in small else left * s // rest for f, s in sizes.items()}
    parts[max(sizes, key=sizes.get)] += total - sum(parts.values())
    return parts


def flipped(data, bit):
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def test_a_thousand_flipped_bits_and_a_thousand_cut_files_are_refused_by_name(good, unread):
    """Over all files, each with 30 at least (a tenth of both in `make test`); nothing is parsed,
    and safetensors alone would have taken most"""
    place, load = good
    load()
    assert len(unread) == 3
    luck, taken, refused = random.Random(2), Counter(), Counter()
    sizes = {f.name: f.stat().st_size for f in place.iterdir()}
    total, least = cases(1000), cases(30)
    parts = shares(sizes, total, least)
    assert (
        len(sizes) == 8
        and 'manifest.json' in sizes
        and sum(parts.values()) == total
        and min(parts.values()) >= least
    )
    for f, n in parts.items():
        old = (place / f).read_bytes()
        cuts = [0, len(old) - 1, *(luck.randrange(len(old)) for _ in range(n - 2))]
        damages = dict(
            flip=[flipped(old, luck.randrange(8 * len(old))) for _ in range(n)],
            cut=[old[:cut] for cut in cuts],
        )
        for kind, many in damages.items():
            for damaged in many:
                (place / f).write_bytes(damaged)
                unread.clear()
                said = one_line(load, str(place / f))
                refused[kind] += 1
                assert unread == [] and said.count('.safetensors') == f.count('.safetensors')
                if f.endswith('.safetensors'):
                    try:
                        tensors_from(damaged)
                        taken[f, kind] += 1
                    except SafetensorError:
                        pass
        (place / f).write_bytes(old)
    assert refused == dict(flip=total, cut=total)
    for f in (WEIGHTS, MEMORY):
        assert taken[f, 'flip'] > 0.6 * parts[f] and taken[f, 'cut'] == 0, taken
    load()
    assert len(unread) == 3  # and whole again


def test_every_single_bit_of_the_manifest_matters(good, unread):
    place, load = good
    old = (place / 'manifest.json').read_bytes()
    for bit in some(range(8 * len(old))):
        (place / 'manifest.json').write_bytes(flipped(old, bit))
        one_line(load, str(place / 'manifest.json'))
    assert unread == []


def test_a_checkpoint_without_one_of_its_files_is_refused_by_name(good, unread):
    place, load = good
    for f in sorted(p.name for p in place.iterdir()):
        old = (place / f).read_bytes()
        (place / f).unlink()
        one_line(load, str(place), f)
        (place / f).write_bytes(old)
    assert unread == []


# ---- a pickle is a program


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), 'w')


@pytest.fixture
def evil(tmp_path):
    "(bytes of a pickle that makes a file when it is loaded, that file)"
    data = pickle.dumps(Payload(tmp_path / 'marker'))
    marker = tmp_path / 'marker'
    pickle.loads(data).close()  # it would
    assert marker.exists()
    marker.unlink()
    return data, marker


def resealed(place):
    "What an attacker does after changing a file"
    said = json.loads((place / 'package.json').read_text())
    write_manifest(place, 'package.json', said['files'], about=said['about'], torch=said['torch'])
    files = sorted(f.name for f in place.iterdir() if f.name != 'manifest.json')
    write_manifest(
        place, 'manifest.json', files, sizes={f: (place / f).stat().st_size for f in files}
    )


@pytest.mark.parametrize('suffix', ['.pt', '.pth', '.bin', '.pkl', '.ckpt', '.safetensors', ''])
def test_a_pickle_in_the_place_of_a_folder_is_refused_unread(suffix, evil, tmp_path, good):
    data, marker = evil
    path = tmp_path / f'model{suffix}'
    path.write_bytes(data)
    run = begin()[0]
    for read in (resolve, load, lambda path: CheckpointManager(tmp_path, TOK).load(run, path)):
        # noqa: B023
        said = one_line(lambda: read(path), str(path), 'give the folder of a saved model')
        assert suffix in ('.safetensors', '') or 'may be a pickle' in said
    assert not marker.exists()


def test_a_pickle_in_the_place_of_any_file_of_a_sealed_checkpoint_is_refused(evil, good):
    "Every hash is right: the attacker made them. A pickle that torch.save wrote, and a bare one"
    data, marker = evil
    place, resume = good
    torch.save(Payload(marker), place.parent / 'weights.pt')
    opens = {WEIGHTS, 'llm_lab.json', 'tokenizer.json'}
    for f in (
        WEIGHTS,
        MEMORY,
        'state.json',
        'llm_lab.json',
        'tokenizer.json',
        'manifest.json',
        'package.json',
    ):
        for pickled in (data, (place.parent / 'weights.pt').read_bytes()):
            old = {p: p.read_bytes() for p in place.iterdir()}
            (place / f).write_bytes(pickled)
            if not f.endswith(('manifest.json', 'package.json')):
                resealed(place)
            if f in (WEIGHTS, MEMORY, 'state.json', 'manifest.json'):
                one_line(resume, str(place / f))
            if f in opens | {'package.json'}:
                one_line(lambda: load(place), f)
            for p, content in old.items():
                p.write_bytes(content)
    resume()
    load(place)
    assert not marker.exists()


RUNS_CODE = re.compile(
    r"""(?x) ^(
      (c?[Pp]ickle|_pickle|dill|cloudpickle|joblib|marshal) \. (load|loads|Unpickler|unpickle)
    | shelve\.open
    | torch\.(jit\.|package\.|hub\.)?load\w*
    | torch\.package\.PackageImporter
    | torch\.serialization\.(load|add_safe_globals)
    | torch\.distributed\.checkpoint\.\w*load\w*
    | pandas\.read_pickle
    | yaml\.(load|load_all|unsafe_load|unsafe_load_all|full_load|full_load_all)
    | yaml\.(Loader|UnsafeLoader|FullLoader)
    )$"""
)
IN_A_TEXT = re.compile(
    r"""(?x) \b(
      pickle\.loads? | Unpickler | cloudpickle\.loads? | marshal\.loads? | dill\.loads?
    | torch\.(jit\.)?load
    | yaml\.(unsafe_|full_)?load
    | joblib\.load
    | shelve\.open
    | allow_pickle\s*=\s*True
    )\b"""
)


def that_run_code(tree):
    """What this source reads in a way that can run code: calls and imports by their full names, and
    programs inside of texts"""
    full, found = {}, []
    for o in ast.walk(tree):
        if isinstance(o, ast.Import):
            for a in o.names:
                top = a.name.split('.')[0]
                full[a.asname or top] = a.name if a.asname else top
        if isinstance(o, ast.ImportFrom) and not o.level:
            full |= {a.asname or a.name: f'{o.module}.{a.name}' for a in o.names}

    def name(o):
        if isinstance(o, ast.Attribute):
            return f'{name(o.value)}.{o.attr}'
        imports = isinstance(o, ast.Call) and name(o.func).endswith(
            ('import_module', '__import__', 'require')
        )
        if imports and o.args and isinstance(o.args[0], ast.Constant):
            return str(o.args[0].value)
        return full.get(o.id, o.id) if isinstance(o, ast.Name) else '?'

    for o in ast.walk(tree):
        if isinstance(o, (ast.Attribute, ast.Name)) and RUNS_CODE.match(name(o)):
            found.append(name(o))
        if isinstance(o, ast.ImportFrom) and not o.level:
            found += [n for a in o.names if RUNS_CODE.match(n := f'{o.module}.{a.name}')]
        if (
            isinstance(o, ast.keyword)
            and o.arg == 'allow_pickle'
            and getattr(o.value, 'value', True)
        ):
            found.append('allow_pickle')
        if isinstance(o, ast.Constant) and isinstance(o.value, str):
            found += [m[0] for m in IN_A_TEXT.finditer(o.value)]
    return found


def sources(root):
    "(where, tree) of all Python of this project"
    for folder in ('llm_lab', 'tools', 'tests', 'experiments'):
        for p in sorted((root / folder).rglob('*.py')):
            if 'runs' not in p.parts:
                yield str(p.relative_to(root)), ast.parse(p.read_text(encoding='utf-8'))
    yield 'setup.py', ast.parse((root / 'setup.py').read_text(encoding='utf-8'))
    for p in sorted((root / 'nbs').glob('*.ipynb')):
        yield from ((p.name, plain(c)) for c in cells(p))


def test_nothing_in_this_project_reads_what_can_run_code():
    """But for two tests that send a tokenizer through a pickle of their own, one that watches for
    it, and this file, which makes an evil one"""
    seen = [*sources(ROOT)]
    assert {w.split('/')[0] for w, _ in seen} >= {
        'llm_lab',
        'tools',
        'tests',
        'experiments',
        '81_checkpoint.ipynb',
    }
    found = {(where, f) for where, tree in seen for f in that_run_code(tree)}
    known = {
        ('tests/test_bpe.py', 'pickle.loads'),
        ('tests/test_foreign.py', 'pickle.loads'),
        ('tests/test_hostile.py', 'marshal.loads'),
    }
    assert found - known == {w for w in found if w[0] == 'tests/test_checkpoint.py'}


@pytest.mark.parametrize(
    'source',
    [
        'import pickle\npickle.load(f)',
        'import pickle as p\np.loads(b)',
        'from pickle import load as read',
        'from pickle import Unpickler',
        'import torch\ntorch.load(f)',
        'import torch\ntorch.load(f, weights_only=True)',
        'from torch import load',
        'import torch as t\nt.jit.load(f)',
        'import yaml\nyaml.load(f, Loader=yaml.SafeLoader)',
        'import yaml\nyaml.unsafe_load(f)',
        'from yaml import full_load',
        'import joblib\njoblib.load(f)',
        'import numpy as np\nnp.load(f, allow_pickle=True)',
        'np.load(f, allow_pickle=yes)',
        'import dill\ndill.loads(b)',
        'import cloudpickle\ncloudpickle.load(f)',
        'import shelve\nshelve.open(f)',
        'import marshal\nmarshal.loads(b)',
        'import pandas as pd\npd.read_pickle(f)',
        'def f():\n    import _pickle\n    return _pickle.load',
        'require("torch").load(f)',
        'code = "import torch; torch.load(f)"',
        'import torch.distributed.checkpoint as dcp\ndcp.load(state)',
    ],
)
def test_the_search_for_such_readers_can_fail(source):
    assert that_run_code(ast.parse(source))


@pytest.mark.parametrize(
    'source',
    [
        'import json\njson.load(f)',
        'import yaml\nyaml.safe_load(f)',
        'import numpy as np\nnp.load(f)',
        'np.load(f, allow_pickle=False)',
        'import pickle\npickle.dumps(x)',
        'from safetensors.torch import load\nload(f)',
        'import torch\ntorch.save(x, f)',
        'from llm_lab.core import load',
    ],
)
def test_plain_readers_are_left_alone(source):
    assert that_run_code(ast.parse(source)) == []


# ---- what does not belong together


def test_an_optimizer_is_restored_only_in_the_groups_that_were_saved():
    run = begin()[0]
    saved = optimizer_state(run.model, run.optimizer)
    plain = torch.optim.SGD(run.model.parameters(), lr=0.1)
    one_line(lambda: restore_optimizer(run.model, plain, *saved), 'in other groups')


def test_an_optimizer_that_remembers_more_than_tensors_is_refused():
    model = begin()[0].model
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    plain.state[model.lm_head.weight]['seen'] = {1, 2}
    one_line(lambda: optimizer_state(model, plain), 'head.weight/seen of the optimizer is {1, 2}')


def test_a_folder_without_checkpoints_has_no_steps_and_keep_is_at_least_one(tmp_path):
    assert CheckpointManager(tmp_path / 'none', TOK).steps() == []
    one_line(lambda: CheckpointManager(tmp_path, TOK, keep=0), 'keep=0: give a whole number')


def test_a_checkpoint_that_does_not_fit_the_run_is_refused_in_one_line(kept, tmp_path):
    folder, _ = kept
    run, batch = begin()
    none = CheckpointManager(tmp_path / 'none', TOK)
    one_line(lambda: none.load(run), 'holds no checkpoint')
    bare = CheckpointManager(folder, TOK)
    one_line(lambda: bare.load(run), "'data' is missing on one side")
    saves = CheckpointManager(folder, TOK, data=batch)
    one_line(lambda: saves.load(begin(steps=30)[0]), 'is beyond the 30 steps that are planned')
    other = CheckpointManager(folder, TOK, data=BatchStream(IDS, 6, 16, seed=2))
    one_line(lambda: other.load(run), 'seed of the saved position is 1')
    stranger = TrainState(MiniGPT(GPTConfig(vocab_size=TOK.vocab_size)), 40)
    one_line(lambda: saves.load(stranger), 'the weights do not fit', longest=1000)
    late = CheckpointManager(folder, TOK, data=batch)  # a new run into an old folder
    words = 'step-000040 was not written on the way to step 10'
    one_line(lambda: go(*begin(), callbacks={10: late}), words)


def test_a_checkpoint_of_a_diverged_model_is_not_loaded_by_its_name(tmp_path, monkeypatch):
    "`load` without a path leaves it out; with its path it is refused, as is one under a wrong name"
    saves, run = CheckpointManager(tmp_path, TOK), begin()[0]
    saves(at_step(run, 10))
    with torch.no_grad():
        run.model.lm_head.weight[0, 0] = math.inf
    at_step(run, 20)
    one_line(lambda: saves(run), 'head.weight is not finite after step 20')
    with monkeypatch.context() as m:
        m.setattr(checkpoint, '_diverged', lambda model, tensors: '')
        saves(run)  # as if nobody had looked
    again = CheckpointManager(tmp_path, TOK)
    words = 'head.weight is not finite: go on from another'
    one_line(lambda: again.load(begin()[0], saves.folder_of(20)), words)
    os.replace(saves.folder_of(10), saves.folder_of(15))
    words = 'is the checkpoint of step 10'
    one_line(lambda: again.load(begin()[0], saves.folder_of(15)), words)


# ---- the log


def test_a_log_that_goes_on_elsewhere_or_under_another_clock_is_told_alike(tmp_path):
    texts = lambda log: [p.read_text() for p in sorted(log.folder.iterdir())]
    log = MetricsLog(tmp_path / 'log')
    for step in (10, 20):
        log.write(dict(step=step, loss=1 / step))
        log.keep(dict(step=step, text='a\nb'))
    branch = MetricsLog(tmp_path / 'branch')
    branch.truncate(20, log.folder)
    assert texts(branch) == texts(log) and len(texts(log)) == 3
    assert [n for n, _ in log.told().values()] == [2, 2] and branch.told() == log.told()
    for seconds, one in ((1.0, log), (2.0, branch)):
        one.write(dict(step=30, seconds=seconds))
    assert log.told() == branch.told()
    log.write(dict(step=40, loss=1.0))
    assert log.told() != branch.told()


def test_rows_that_another_process_wrote_are_counted_by_truncate(tmp_path):
    slow = MetricsLog(tmp_path)
    slow.truncate(0)
    MetricsLog(tmp_path).write(dict(step=30, seconds=2.0))
    slow.truncate(30)
    assert slow.told()['metrics.jsonl'][0] == 1


# ---- which ones stay


def test_a_loss_that_is_not_finite_is_never_the_best():
    notes = [dict(step=10, val=math.nan), dict(step=20), dict(step=30, val=1.0)]
    assert _best([10, 20], notes) is None


def test_the_newest_and_the_best_stay_through_any_number_of_lives(tmp_path):
    "Losses that are none, that are missing, that come twice; a new process at any moment"
    luck = random.Random(5)
    for n in range(cases(25, 5)):
        folder = tmp_path / str(n)
        keep = luck.randint(1, 3)
        run = begin()[0]
        saves, vals = CheckpointManager(folder, TOK, keep=keep), {}
        for step in sorted(luck.sample(range(1, 41), 7)):
            vals[step] = luck.choice(
                [None, math.nan, math.inf, -math.inf, 2.0, 2.0, 1.5, luck.random()]
            )
            saves(at_step(run, step, vals[step]))
            known = {s: v for s, v in vals.items() if v is not None and math.isfinite(v)}
            best = [s for s in known if known[s] == min(known.values())][:1]
            assert saves.steps() == sorted({*[*vals][-keep:], *best})
            assert (folder / 'latest').read_text() == f'step-{step:06d}\n'
            assert (
                (folder / 'best').read_text() == f'step-{best[0]:06d}\n'
                if best
                else not (folder / 'best').exists()
            )
            assert (
                resolve(folder) == saves.folder_of(best[0] if best else step)
                and load(folder).about['step'] == (best or [step])[0]
            )
            if luck.random() < 0.4:
                run = begin()[0]
                saves = CheckpointManager(folder, TOK, keep=keep)
                saves.load(run)
        assert [p.name for p in folder.rglob('.*')] == []


def test_remains_of_killed_writers_go_with_the_next_save_and_nothing_else(tmp_path):
    saves = CheckpointManager(tmp_path, TOK, keep=1)
    run = begin()[0]
    saves(at_step(run, 10, 1.0))
    for name in ('.step-000020.77.new', '..step-000020.77.new.77.new', '.step-000005.gone'):
        (tmp_path / 'checkpoints' / name / 'deep').mkdir(parents=True)
        (tmp_path / 'checkpoints' / name / 'deep' / 'half').write_text('half')
    for name in ('.latest.77.new', '.best.77.new'):
        (tmp_path / name).write_text('step-0000')
    others = [
        tmp_path / '.gitignore',
        tmp_path / 'checkpoints' / '.DS_Store',
        tmp_path / 'checkpoints' / 'notes',
    ]
    for p in others:
        p.write_text('mine')
    assert saves.steps() == [10] and saves.load(begin()[0])['step'] == 10
    saves(at_step(run, 20, 2.0))
    assert sorted(
        p for p in tmp_path.rglob('*') if p.name[0] == '.' or p.name == 'notes'
    ) == sorted(others)
    assert saves.steps() == [10, 20]  # the best one stays


def test_a_checkpoint_that_is_half_removed_is_no_checkpoint(tmp_path, monkeypatch):
    """Killed while it prunes, at each file: the half one is never listed, the newest loads, the
    next save clears up"""

    class Killed(BaseException):
        pass

    def removes(so_many):
        def rmtree(path):
            for f in sorted(Path(path).iterdir())[:so_many]:
                f.unlink()
            raise Killed

        return rmtree

    for gone in some(range(9), 4):
        saves = CheckpointManager(tmp_path / str(gone), TOK, keep=1)
        run = begin()[0]
        saves(at_step(run, 10))
        with monkeypatch.context() as m, pytest.raises(Killed):
            m.setattr(shutil, 'rmtree', removes(gone))
            saves(at_step(run, 20))
        assert [p.name for p in saves.folder.rglob('.*')] == [
            '.step-000010.gone'
        ] and saves.steps() == [20]
        again = begin()[0]
        saves = CheckpointManager(tmp_path / str(gone), TOK, keep=1)
        assert saves.load(again)['step'] == 20
        saves(at_step(again, 30))
        assert saves.steps() == [30] and [*saves.folder.rglob('.*')] == []


def test_two_runs_do_not_share_a_folder(tmp_path):
    """Neither a new one, nor a second heir of the same checkpoint; who saves the step that it has
    saved does nothing"""
    first, run = CheckpointManager(tmp_path, TOK), begin()[0]
    first(at_step(run, 10))
    before = digests(first.folder_of(10))
    first(run)
    for step in (5, 10, 20):
        # noqa: B023
        one_line(
            lambda: CheckpointManager(tmp_path, TOK)(at_step(begin()[0], step)),
            'step-000010',
            f'on the way to step {step}',
        )
    heirs = [(CheckpointManager(tmp_path, TOK), begin()[0]) for _ in range(2)]
    for saves, heir in heirs:
        saves.load(heir)
    heirs[0][0](at_step(heirs[0][1], 20))
    taken = digests(first.folder_of(20))
    for step in (15, 20, 30):
        one_line(lambda: heirs[1][0](at_step(heirs[1][1], step)), 'step-000020')  # noqa: B023
    assert (
        first.steps() == [10, 20]
        and digests(first.folder_of(10)) == before
        and digests(first.folder_of(20)) == taken
    )


def test_a_relative_path_names_the_same_run(tmp_path, monkeypatch):
    "Loaded by one spelling of its path, saved by another"
    monkeypatch.chdir(tmp_path)
    CheckpointManager('run', TOK)(at_step(begin()[0], 10))
    saves, run = CheckpointManager('run', TOK), begin()[0]
    saves.load(run, tmp_path / 'run' / 'checkpoints' / 'step-000010')
    saves(at_step(run, 20))
    assert saves.steps() == [10, 20]


# ---- real kills

SURVIVOR = f"""
import random, sys, torch
sys.path.insert(0, {str(ROOT / 'tests')!r})
from test_checkpoint import TOK, CheckpointManager, begin, go
torch.set_num_threads(1)
run, batch = begin(steps=120)
saves = CheckpointManager(sys.argv[1], TOK, keep=2, data=batch)
if saves.steps(): saves.load(run)
def tell(run): print(run.step, flush=True)
go(run, batch, callbacks={{1: tell, 5: saves}})
"""


def life(folder, kill_at=None, moment=0.0):
    """Train in a process of its own, killed a moment after it has told of this step; the first and
    the last step it told"""
    p = subprocess.Popen(
        [sys.executable, '-c', SURVIVOR, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)},
    )
    told = []
    for line in p.stdout:
        if line.strip().isdigit():
            told.append(int(line))
        if kill_at and told and told[-1] >= kill_at:
            time.sleep(moment)
            p.kill()
            break
    told += [
        int(line) for line in p.communicate(timeout=HANG)[0].splitlines() if line.strip().isdigit()
    ]
    assert p.returncode == (-signal.SIGKILL if kill_at else 0)
    return told[0], told[-1]


@pytest.mark.slow  # five times PyTorch; test_run.py kills whole runs at every place
@pytest.mark.skipif(os.name == 'nt', reason='Windows has no SIGKILL')
def test_three_kills_at_random_cost_steps_and_not_one_bit(tmp_path):
    luck = random.Random(6)
    lives = [life(tmp_path / 'killed', at, luck.uniform(0, 0.02)) for at in (12, 44, 81)] + [
        life(tmp_path / 'killed')
    ]
    for (_, died), (born, _) in zip(lives, lives[1:]):
        assert 1 < born <= died + 1 and died - born < 6
    run, batch = begin(steps=120)
    go(run, batch, (120, CheckpointManager(tmp_path / 'calm', TOK, data=batch)))
    assert lives[0][0] == 1 and lives[-1][1] == 120
    assert digests(tmp_path / 'killed' / 'checkpoints' / 'step-000120') == digests(
        tmp_path / 'calm' / 'checkpoints' / 'step-000120'
    )
    assert [*(tmp_path / 'killed').rglob('.*')] == []
