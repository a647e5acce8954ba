"""`runs`: the odd cases of its parts: what goes to stderr, engines, models that a file describes,
choices that are measured, and folders with their locks."""

import json
import math
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import llm_lab as lab
from llm_lab.config import PRESETS, as_data, config_from_dict, read_config
from llm_lab.core import LabError, require
from llm_lab.gpt import MiniGPT
from llm_lab.package import find_runs
from llm_lab.runs import (
    SingleProcess,
    TrainingRun,
    _hash,
    _new_folder,
    _no_better,
    _without_lookups,
    all_gather_json,
    differing_keys,
    find_model,
    make_engine,
    model_config,
    run_lock,
    run_to_go_on,
    runs_of,
    set_precision,
    set_threads,
)

pytestmark = pytest.mark.usefixtures('one_thread')


def test_every_verb_of_a_single_process_is_accelerates():
    verbs = [name for name in vars(SingleProcess) if not name.startswith('_')]
    accelerator = require('accelerate').Accelerator
    assert [verb for verb in verbs if not hasattr(accelerator, verb)] == []


def test_only_the_line_about_host_names_is_left_out():
    with tempfile.TemporaryFile() as told:
        before = os.dup(2)
        os.dup2(told.fileno(), 2)  # this process writes into a file now
        try:
            with _without_lookups():
                os.write(
                    2,
                    b'[W1129 17:20:16 socket.cpp:207] [c10d] The hostname of the client socket '
                    b'cannot be retrieved. err=-3\nmine\n',
                )
            os.write(2, b'later\n')
        finally:
            os.dup2(before, 2)
            os.close(before)
        told.seek(0)
        assert told.read() == b'mine\nlater\n'


def test_one_process_gathers_from_itself(home):
    assert all_gather_json(SingleProcess(), dict(a=[1, 'ü'])) == [dict(a=[1, 'ü'])]
    engine = make_engine()
    assert (engine.num_processes, engine.process_index, engine.is_main_process) == (1, 0, True)
    assert all_gather_json(engine, 'x') == ['x']
    assert engine.reduce(torch.tensor(3.0), 'mean') == 3.0


def test_a_file_names_its_parts():
    modern = model_config(config_from_dict(dict(model=dict(preset='llama', n_kv_heads=2))), 65)
    # `init` and `gqa`, named in a file
    assert MiniGPT(modern).blocks[0].attn.qkv.weight.shape == (128 + 64 + 64, 128)


@pytest.mark.parametrize(
    'model, says',
    [
        (
            dict(mlp=dict(part='MLP', d_fff=3)),
            "model.mlp: MLP takes no 'd_fff': did you mean 'd_ff'?",
        ),
        (
            dict(attn=dict(part='llm_lab.gpt:Nothing')),
            "model.attn='llm_lab.gpt:Nothing' names no part that can be mixer",
        ),
    ],
)
def test_a_part_that_cannot_be_is_named_with_its_path(model, says):
    with pytest.raises(LabError) as e:
        model_config(config_from_dict(dict(model=model)), 65)
    assert says in str(e.value)


def test_threads_are_measured_once_and_then_obeyed():
    resolved = set_threads(read_config('smoke'), 65, SingleProcess())
    assert resolved.train.threads == torch.get_num_threads()
    asked = set_threads(read_config('smoke', ['threads=auto']), 65, SingleProcess())
    assert 1 <= asked.train.threads <= torch.get_num_threads()
    # what is written down is obeyed, not measured again
    resolved = set_threads(resolved, 65, SingleProcess(), tune=True)
    assert resolved.train.threads == torch.get_num_threads()


def test_precision_is_measured_once_and_then_obeyed():
    resolved, why = set_precision(read_config('smoke', ['precision=auto']), 65, SingleProcess())
    assert resolved.train.precision in ('float32', 'bf16') and why
    # what is written down is obeyed
    assert set_precision(resolved, 65, SingleProcess()) == (resolved, '')


def test_patience_counts_validations_on_the_same_tokens():
    losses = [(10, 2.0), (20, 1.6), (30, 1.7), (40, math.nan)]
    noted = [dict(step=n, val=v, of=100) for n, v in losses]
    assert _no_better(noted[:3], 2) == ''  # one look without progress
    assert '2 validations were no better than that of step 20' in _no_better(noted, 2)
    # on other texts: not comparable
    assert _no_better([*noted, dict(step=50, val=1.8, of=500)], 2) == ''


def test_a_prompt_that_cannot_be_encoded_is_found_before_the_first_step(home):
    odd = TrainingRun(read_config('smoke', ['eval.prompt=漢']), home / 'odd', SingleProcess())
    with pytest.raises(LabError, match="eval.prompt='漢': the character '漢'"):
        odd.foresee()


def test_a_new_run_is_named_by_date_time_and_config(home):
    cfg = read_config('smoke')
    assert _new_folder(cfg, 'night') == home / 'experiments' / 'smoke' / 'runs' / 'night'
    names = [_new_folder(c).name for c in (cfg, replace(cfg, name='other'))]
    assert names[0][:6] == time.strftime('%y%m%d') and names[0][-6:] != names[1][-6:]


def test_a_lock_is_held_once_and_can_be_had_again(home):
    lock = run_lock(home / 'mine')
    with pytest.raises(
        LabError, match=f'mine is held by process {os.getpid()}: wait until it ends'
    ):
        run_lock(home / 'mine')
    lock.release()
    run_lock(home / 'mine').release()  # free again


def test_where_nothing_was_run_yet(home):
    folder, says = run_to_go_on('smoke')
    assert (runs_of('smoke'), folder) == ([], None) and says
    assert find_model('nowhere') == Path('nowhere')


# ---- a run is described by a path, a dict or a config

SHORT = dict(
    data=dict(length=16),
    model=dict(d_model=16, n_layers=1, n_heads=2),
    train=dict(steps=4, batch_size=2, threads=1),
    eval=dict(every=4, tokens=64, sample_tokens=2),
    log=dict(every=2, checkpoint_every=2),
)


def weights(job):
    return [p.detach().clone() for p in job.run.model.parameters()]


def test_a_dict_and_a_config_train_as_their_file_does(home):
    import yaml

    from llm_lab.config import RunConfig
    from llm_lab.runs import train_run

    path = home / 'run.yaml'
    path.write_text(yaml.safe_dump(SHORT))
    made = config_from_dict(SHORT)
    jobs = [train_run(x, run=f'r{n}') for n, x in enumerate((path, SHORT, made))]
    one, two, three = map(weights, jobs)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, three))
    assert {job.folder.parent.parent.name for job in jobs} == {'run'}
    # each goes on by the same call, further, and a change that reaches back is refused
    longer = replace(made, train=replace(made.train, steps=6))
    job = train_run(longer, resume='', run='r2')
    assert (job.run.step, job.folder) == (6, jobs[2].folder)
    wilder = replace(made, train=replace(made.train, lr=0.02))
    with pytest.raises(LabError, match='train.lr=0.02: it was 0.01'):
        train_run(wilder, resume='', run='r2')
    named = RunConfig('mine', made.data, made.model, made.train, made.eval, made.log)
    assert train_run(named, 'steps=2').folder.parent.parent.name == 'mine'


# ---- one way to name a thing on disk


def small_run(home, run, *overrides):
    from llm_lab.runs import train_run

    return train_run(SHORT, *overrides, run=run)


def test_every_name_of_a_model_opens_the_same_model(home, monkeypatch, tmp_path_factory):
    from helpers import one_line, printed
    from llm_lab.hub import to_hf
    from llm_lab.package import load, save

    job = small_run(home, 'one')
    step = job.folder / 'checkpoints' / 'step-000004'
    model, tokenizer, _ = load(job.folder)
    save(home / 'artifacts' / 'kept', model, tokenizer)
    to_hf(home / 'artifacts' / 'hf', model, tokenizer)
    inside = 'experiments/run/runs/one'
    names = ['one', 'run', 'run/one', inside, f'{inside}/checkpoints/step-000004']
    names += ['artifacts/kept', 'kept', 'artifacts/hf', 'hf']
    for place in (home, tmp_path_factory.mktemp('elsewhere')):
        monkeypatch.chdir(place)
        for name in (*names, job.folder, step):
            for a, b in zip(load(name).model.parameters(), model.parameters()):
                assert torch.equal(a, b), name
        one_line(lambda: load('artifacts/none'), 'no model at artifacts/none')
        said = [printed('sample', name, '--tokens', '9')[0] for name in names]
        assert {*said} == {said[0]}
        printed('eval', 'artifacts/hf', code=1)
        scores = [printed('eval', n, '--corpus', 'tiny_tales')[0] for n in ('run', 'artifacts/hf')]
        assert scores[0].splitlines()[-1] == scores[1].splitlines()[-1]


def test_a_folder_here_wins_over_a_run_of_that_name(home, monkeypatch):
    from llm_lab.package import load, save

    job = small_run(home, 'one')
    model, tokenizer, _ = load(job.folder)
    with torch.no_grad():
        model.tok.weight.zero_()
    monkeypatch.chdir(home)
    save('run', model, tokenizer)  # as the config is called
    assert not load('run').model.tok.weight.any()
    assert load('run/one').model.tok.weight.any()


def test_runs_takes_patterns_and_says_what_differs(home, monkeypatch):
    from helpers import printed

    small_run(home, 'one')
    small_run(home, 'two', 'lr=0.02', 'model.mlp={part: MLP, d_ff: 24}')
    (home / 'experiments' / 'run' / 'runs' / 'notes.txt').write_text('a stray file')
    (home / 'experiments' / 'run' / 'runs' / 'folder').mkdir()
    monkeypatch.chdir(home / 'data')
    out, err = printed('runs', 'experiments/*/runs/*')
    assert err == '' and '\n  train.lr: 0.01 (one); 0.02 (two)\n' in out
    assert 'pieces of the same text' in out  # `result.json` keeps the sums of the documents
    assert "model.mlp: {} (one); {'d_ff': 24, 'part': 'MLP'} (two)" in out
    assert 'train.steps' not in out and '\n\n' in out
    assert 'what differs' not in printed('runs', 'one')[0]
    # as a shell has expanded it
    there = home / 'experiments' / 'run' / 'runs'
    out, err = printed('runs', *sorted(there.iterdir()))
    assert out.count('finished') == 2 and 'left out' in err
    assert 'no run is at nothing/*' in printed('runs', 'nothing/*', code=1)[1]
    # a config is all of its runs, by its name, by a pattern, and by its folder
    for named in ('run', 'run/*', 'ru?', 'experiments/run'):
        out, err = printed('runs', named)
        assert err == '' and out.count('finished') == 2, named
    assert [*map(Path, find_runs('run'))] == [there / 'one', there / 'two']
    for named in (['run'], ['run/one', 'run/two'], ['run/*']):
        assert {line['name'] for line in lab.compare(named).lines} == {'one', 'two'}
    out = printed('runs', 'run', '--plot', 'both.png')[0]
    assert out.endswith('their curves are in both.png\n') and Path('both.png').exists()


def as_run(folder, **sections):
    "The folder of a run that was decided so"
    decided = as_data(config_from_dict(sections))
    told = dict(starts=[], config=dict(decided=decided))
    folder.mkdir(parents=True)
    (folder / 'run.json').write_text(json.dumps(told | dict(sha256=_hash(told))))
    return folder


@pytest.mark.parametrize(
    'one, two, keys',
    [
        (dict(preset='llama'), dict(preset='gpt2', **PRESETS['llama']), []),
        (dict(mlp=dict(part='MLP')), {}, []),
        (dict(mlp=dict(part='MLP', bias=True)), {}, []),
        (dict(mlp=dict(part='MLP', bias=False)), {}, ['model.mlp']),
        (dict(d_head=32), {}, []),
        (dict(n_heads=2), {}, ['model.n_heads']),
        (dict(preset='llama'), {}, ['model.preset']),
        (dict(preset='llama', d_model=64), dict(**PRESETS['llama']), ['model.d_model']),
        (dict(mlp=dict(part='MLP', d_ff=24)), {}, ['model.mlp']),
        (dict(n_kv_heads=2), {}, ['model.n_kv_heads']),
        (
            dict(preset='llama', norm=dict(part='LayerNorm')),
            dict(preset='gpt2', **PRESETS['llama']),
            ['model.norm'],
        ),
    ],
)
def test_only_what_differs_is_said_to_differ(tmp_path, one, two, keys):
    runs = dict(a=as_run(tmp_path / 'a', model=one), b=as_run(tmp_path / 'b', model=two))
    assert [*differing_keys(runs)] == keys


def test_what_is_left_out_is_the_default_that_is_written_down(tmp_path):
    def differ(one, two):
        folder = tmp_path / f'{len([*tmp_path.iterdir()])}'
        runs = dict(a=as_run(folder / 'a', train=one), b=as_run(folder / 'b', train=two))
        return [*differing_keys(runs)]

    assert differ(dict(optimizer=dict(part='muon')), dict(optimizer='muon')) == []
    assert differ(dict(steps=3000, warmup=100), dict(steps=3000)) == []
    assert differ(dict(steps=3000, warmup=90), dict(steps=3000)) == ['train.warmup']
    assert differ(dict(optimizer='adamw'), dict(optimizer='muon')) == ['train.optimizer']


# ---- what a failed beginning leaves


def test_a_run_that_cannot_begin_leaves_nothing(home, monkeypatch):
    from helpers import one_line

    monkeypatch.chdir(home)

    def left():
        return sorted(p for p in home.rglob('*') if 'experiments' in p.parts)

    wrong = dict(data=dict(corpus='nowhere.txt')), dict(eval=dict(prompt='ж'), train=dict(steps=2))
    before = left()
    for said in wrong:
        one_line(lambda: lab.train_run(said, run='first'), '')
    assert left() == before
    small_run(home, 'one')
    before = left()
    one_line(lambda: small_run(home, 'two', 'eval.prompt=ж'), 'eval.prompt')
    assert left() == before


def test_an_empty_folder_is_no_second_meaning_of_a_name(home, monkeypatch):
    from helpers import one_line

    monkeypatch.chdir(home)
    job = small_run(home, 'first')
    (home / 'experiments' / 'other' / 'runs' / 'first').mkdir(parents=True)
    (home / 'experiments' / 'other' / 'runs' / 'first' / '.lock').touch()
    assert find_model('first') == job.folder
    # a package is meant, where the run beside it has no checkpoint yet
    model, tokenizer, _ = lab.load('first')
    lab.save('artifacts/run', model, tokenizer)
    one_line(lambda: find_model('run'), 'is the name of 2 models')
    for name in ('best', 'latest'):
        (job.folder / name).unlink()
    assert find_model('run') == Path('artifacts/run')


def test_the_help_says_where_the_model_of_a_run_is():
    for said in (lab.train_run.__doc__, TrainingRun.__doc__):
        assert '`job.run.model`' in said and "load('CONFIG/RUN')" in said


# ---- the printed plan


def test_the_plan_shows_the_model_and_the_memory_of_a_step(home):
    from llm_lab.efficient import step_memory
    from llm_lab.optim import muon

    small = TrainingRun(config_from_dict(SHORT), home / 'x', SingleProcess())
    assert 'memory' not in repr(small)  # it fits everywhere
    large = SHORT | dict(model=dict(d_model=256, n_layers=8))
    job = TrainingRun(config_from_dict(large), home / 'x', SingleProcess())
    said = repr(job)
    assert ''.join(repr(job.run.model.cfg).split()) in ''.join(said.split())
    assert f'{job.run.model.n_params:,} parameters' in said
    need = step_memory(job.run.model.cfg, 2, lambda m: muon(m, 0.01, 0.1))
    assert f'memory  {need / 1e6:,.0f} MB for a step' in said and need > 16 * job.run.model.n_params
    assert max(map(len, said.splitlines())) < 130  # no line is a screen long


def test_minutes_are_expected_from_measured_steps(capsys):
    from types import SimpleNamespace

    from llm_lab.runs import _Expectation

    look = _Expectation(3, 10)
    look(SimpleNamespace(step=3, steps=1010, seconds=5.0))
    look(SimpleNamespace(step=10, steps=1010, seconds=5.0 + 7 * 0.3))  # 0.3 s × 1,000 = 5 min
    assert 'expect  5 minutes for 1,000 more steps, 300 ms each' in capsys.readouterr().out
    for quick in (_Expectation(3, 10), look):  # taken up at step 10; a run of a second
        quick(SimpleNamespace(step=10, steps=20, seconds=6.0))
        assert capsys.readouterr().out == ''
