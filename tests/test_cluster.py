"A job that is started again by the very same command, and what stands around it on a cluster."

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from cases import HANG
from helpers import manual, one_line, printed

import llm_lab as lab
from llm_lab.runs import resolve_resume

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures('one_thread')

SHORT = dict(
    model=dict(d_model=16, n_layers=1, n_heads=2),
    train=dict(steps=2, batch_size=4, threads=1, warmup=0),
    eval=dict(every=2, tokens=200, sample_every=99),
    log=dict(every=2, checkpoint_every=2),
)
TEXT = 'The cat sat on the mat. A dog ran to the cat.\n' * 60


def records(path, bodies, field='body'):
    "A file of records at `path`, one for each body"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps({field: b}) + '\n' for b in bodies))


# ---- the very same command


@pytest.fixture(scope='module')
def begun(tmp_path_factory):
    "A home with a package `first`, a run of it `small/one`, and a run `plant/main` that uses all"
    home = tmp_path_factory.mktemp('begun')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LLM_LAB_HOME', str(home))
        patch.chdir(home)
        (home / 'own.txt').write_text(TEXT)
        (home / 'val.txt').write_text(TEXT[:400])
        data = dict(corpus='own.txt', length=16, splits=dict(val='val.txt'))
        small = lab.read_config(SHORT | dict(data=data))
        lab.train_run(replace(small, name='small'), run='one')
        opened = lab.load('small/one')
        lab.save('artifacts/first', opened.model, opened.tokenizer)
        more = dict(data=data, train=SHORT['train'], eval=SHORT['eval'], log=SHORT['log'])
        cfg = lab.read_config(more, ['data.tokenizer=first', 'train.start_from=small'])
        lab.train_run(replace(cfg, name='plant'), run='main')
    return home


@pytest.fixture
def there(begun, monkeypatch):
    "In that home"
    monkeypatch.setenv('LLM_LAB_HOME', str(begun))
    monkeypatch.chdir(begun)
    return begun


SPELLED = {
    'data.corpus': ['own.txt', './own.txt', '{home}/own.txt', '{home}/artifacts/../own.txt'],
    'data.splits.val': ['val.txt', './val.txt', '{home}/val.txt', 'link/val.txt'],
    'data.tokenizer': [
        'first',
        'artifacts/first',
        './artifacts/first/',
        '{home}/artifacts/first',
        'artifacts/first/tokenizer.json',
        'link/artifacts/first',
    ],
    'train.start_from': [
        'small',
        'small/one',
        './experiments/small/runs/one/',
        '{home}/experiments/small/runs/one',
        'experiments/small/runs/latest',
        'link/experiments/small/runs/one',
    ],
}


@pytest.mark.parametrize('path, said', [(p, s) for p, many in SPELLED.items() for s in many])
def test_the_same_thing_on_disk_is_no_change_however_it_is_spelled(there, path, said):
    if not (there / 'link').exists():
        (there / 'link').symlink_to(there)
    run = there / 'experiments/plant/runs/main'
    before = resolve_resume(run)
    on = resolve_resume(run, [f'{path}={said.format(home=there)}'])
    assert on.cfg == before.cfg and not on.changes and on.folder == run
    kept = before.cfg
    assert (kept.data.corpus, kept.data.splits) == ('own.txt', dict(val='val.txt'))
    assert kept.data.tokenizer == 'artifacts/first'
    assert kept.train.start_from == 'experiments/small/runs/one'


def test_another_thing_on_disk_is_a_change(there):
    run = there / 'experiments/plant/runs/main'
    (there / 'other.txt').write_text(TEXT[:300])
    for said in (
        'data.splits.val=other.txt',
        'data.tokenizer=small/one',
        'train.start_from=first',
        'train.start_from=small/one/checkpoints/step-000002',
        'train.start_from=gone/one',
    ):
        key = said.partition('=')[0].removesuffix('.val')
        one_line(lambda: resolve_resume(run, [said]), f'{key}=', ': it was ', 'leave it out')


def test_the_very_same_command_goes_on_also_where_its_name_means_another_run_by_now(home):
    (home / 'own.txt').write_text(TEXT)
    few = [f'{s}.{k}={v}' for s in ('train', 'eval', 'log') for k, v in SHORT[s].items()]
    sizes = [f'model.{k}={v}' for k, v in SHORT['model'].items()]
    printed('train', 'own.txt', *sizes, *few, '--run', 'one')
    (home / 'more.txt').write_text(TEXT[:2000])
    (home / 'plant.yaml').write_text('data: {corpus: more.txt}\n')
    again = ['train', 'plant.yaml', *few, 'train.start_from=own', '--run', 'main', '--resume']
    assert 'a new one begins' in printed(*again)[0]
    printed('train', 'own.txt', *sizes, *few, 'train.seed=1', '--run', 'two')  # `own` is this now
    for _ in range(2):  # each start keeps what the first one meant
        assert 'nothing is left to do' in printed(*again)[0]
    decided = json.loads((home / 'experiments/plant/runs/main/run.json').read_text())['config']
    assert decided['decided']['train']['start_from'] == 'experiments/own/runs/one'


# ---- a folder with texts and records


def test_of_texts_and_records_in_one_folder_a_field_says_that_the_records_are_meant(home):
    records(home / 'corpus/a.jsonl', ['one of them', 'two of them', 'three of them'])
    records(home / 'corpus/b.jsonl', ['four of them'])
    (home / 'corpus/note.txt').write_text('a note ' * 20)
    (home / 'corpus/README.md').write_text('# about')
    with pytest.warns(UserWarning) as notes:
        corpus = lab.load_corpus('corpus', field='body')
    (note,) = (str(n.message) for n in notes)
    assert 'the text is 2 .jsonl files' in note and '1 .txt' in note and 'one kind' in note
    assert note.endswith('left out: note.txt')
    held = [d for s in corpus.splits for d in corpus.documents(s)]
    assert held == ['one of them', 'two of them', 'three of them', 'four of them']
    with pytest.warns(UserWarning) as notes:
        assert 'a note' in lab.load_corpus('corpus').text('train')
    (note,) = (str(n.message) for n in notes)
    assert 'the text is 1 .txt files' in note and '2 .jsonl' in note and '\n' not in note
    assert 'data.field=body takes the records instead, or make one kind of all' in note


@pytest.mark.parametrize('name', ['train', 'val'])
def test_where_records_are_meant_the_names_of_texts_tell_no_splits(home, name):
    records(home / 'corpus/a.jsonl', ['one of them', 'two of them'])
    for split in ('train', 'val'):
        (home / f'corpus/{split}.txt').write_text(f'{split} ' * 20)
    with pytest.warns(UserWarning):
        assert 'of them' in lab.load_corpus('corpus', field='body').text(name)


@pytest.mark.parametrize('field', ['text', ''])
def test_a_field_that_is_the_default_or_unknown_has_a_remedy_that_works(home, field):
    records(home / 'corpus/a.jsonl', ['one', 'two'] if field else [3, 4], field or 'n')
    (home / 'corpus/note.txt').write_text('a note ' * 20)
    with pytest.warns(UserWarning) as notes:
        lab.load_corpus('corpus')
    said = 'a folder of their own' if field else 'data.field=NAME'
    assert said in str(notes[0].message)


def test_a_pattern_is_no_text_and_says_what_to_give(home):
    records(home / 'corpus/a.jsonl', ['one', 'two'])
    one_line(lambda: lab.load_corpus('corpus/*.jsonl'), 'a pattern', 'give the folder, corpus;')
    said = printed('train', 'smoke', 'data.corpus=corpus/*.jsonl', code=1)[1]
    assert 'give the folder, corpus' in said and 'data.field=NAME' in said
    assert 'give the folder, corpus' in printed('train', 'corpus/*.jsonl', code=1)[1]
    assert 'their folder' in printed('train', 'corpus/a.jsonl', 'corpus/b.jsonl', code=1)[1]


# ---- documents, starts, and what a line of help says


def train_words(**more):
    "The words of a command that make a run one of seconds"
    said = {f'{s}.{k}': v for s, keys in SHORT.items() for k, v in keys.items()} | more
    return [f'{k}={v}' for k, v in said.items()]


def help_of(command):
    "What `--help` says, as one line"
    return ' '.join(printed(command, '--help')[0].split())


def test_a_running_text_says_how_it_gets_documents_and_help_says_what_one_is(home):
    (home / 'own.txt').write_text(TEXT)
    short = train_words(**{'data.length': 16})
    for key in ('data.mask_documents=true', 'data.rows=documents'):
        said = printed('train', 'own.txt', *short, key, code=1)[1]
        assert f'{key}: own is one running text' in said and 'or leave it out' in said
        assert 'a line <|endoftext|>' in said and '.jsonl' in said
    # the remedy is one
    (home / 'own.txt').write_text(TEXT.replace('. ', '.\n<|endoftext|>\n'))
    said = printed('train', 'own.txt', *short, 'data.mask_documents=true', '--run', 'masked')[0]
    assert 'documents in one row do not attend to each other' in said
    assert 'attend to each other' not in printed('train', 'own.txt', *short)[0]
    said = help_of('train')
    assert 'A document is a record, or what stands between two lines <|endoftext|>' in said


def test_the_plan_says_what_a_start_gives_and_what_is_left_to_the_config(there):
    few = [w for w in train_words() if not w.startswith('model.')]
    words = ['own.txt', *few, 'train.start_from=first', 'train.batch_size=2']
    lines = printed('train', *words, '--run', 'taken')[0].splitlines()
    (line,) = (line for line in lines if line.startswith('starts with the weights of'))
    assert 'artifacts/first; as there: model, data.length, data.tokenizer; all else is' in line
    assert 'data.mask_documents=false' in line and 'train.batch_size=2' in line
    more = 'model.dropout=0.1', 'data.length=16'
    lines = printed('train', *words, *more, '--run', 'given')[0].splitlines()
    (line,) = (line for line in lines if line.startswith('starts with the weights of'))
    assert 'as there: model (but for model.dropout), data.tokenizer;' in line
    assert 'and all else as this config says' in help_of('train')


def test_resume_starts_or_goes_on_and_says_so(home):
    assert 'starts, or goes on' in help_of('train')
    (home / 'own.txt').write_text(TEXT)
    (home / 'plant.yaml').write_text('data: {corpus: own.txt, length: 16}\n')
    again = ['train', 'plant.yaml', *train_words(), '--run', 'main', '--resume']
    assert 'a new one begins' in printed(*again)[0]
    assert 'nothing is left to do' in printed(*again)[0]
    # what the newest run refuses names it, and how to have another one; a run that was named, no
    said = printed('train', 'plant.yaml', '--resume', 'train.lr=0.5', code=1)[1]
    assert 'train.lr=0.5: it was' in said and 'plant/main' in said and '--run NAME --resume' in said
    said = printed(*again, 'train.lr=0.5', code=1)[1]
    assert 'train.lr=0.5: it was' in said and 'newest' not in said
    # the flag takes the word after it
    for word in ('plant.yaml', 'own.txt', 'gone.yaml', 'golden'):
        said = printed('train', '--resume', word, code=1)[1]
        assert 'write the config first, as in' in said and f'train {word} --resume' in said
    assert 'write the config first' in printed('train', 'smoke', '--resume', 'own.txt', code=1)[1]
    latest = home / 'experiments/plant/runs/latest'
    assert 'nothing is left to do' in printed('train', '--resume', latest)[0]


def test_eval_and_sample_say_which_run_they_took(there):
    out, err = printed('sample', 'plant', '--prompt', 'The cat', '--tokens', '3')
    newest = (
        there / 'experiments/plant/runs' / (there / 'experiments/plant/runs/latest').read_text()
    )
    assert err == f'plant/{newest.name.strip()}, step 2\n' and out.startswith('The cat')
    assert '\nplant/main, step 2\n' in printed('eval', 'plant/main')[0]
    assert printed('sample', 'first', '--tokens', '3')[1] == ''  # a package is what was named


def test_prepare_prepares_what_train_uses(home):
    records(home / 'd.jsonl', [f'story {n} of {n * n} cats' for n in range(200)], 'text')
    printed(
        'prepare', 'd.jsonl', '--vocab-size', 270, '--splits', 'val=0.2', '--splits', 'test=0.1'
    )
    said = printed('prepare', 'd.jsonl', '--vocab-size', 270, '--splits', '{val: 0.2, test: 0.1}')[
        0
    ]
    assert 'already there' in said
    words = ['data.tokenizer=bpe', 'data.vocab_size=270', 'data.length=16']
    cut = ['data.splits={val: 0.2, test: 0.1}']
    assert 'packed' not in printed('train', 'd.jsonl', *train_words(), *words, *cut)[0]
    assert 'packed' in printed('train', 'd.jsonl', *train_words(), *words)[0]  # another cut
    said = printed('prepare', 'd.jsonl', '--splits', 'dev=0.2', code=1)[1]
    assert 'data.splits.dev=0.2: give shares' in said


def test_from_another_folder_the_home_and_its_variable_are_named(begun, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('LLM_LAB_HOME', str(tmp_path))
    run = begun / 'experiments/small/runs/one'
    said = printed('train', '--resume', run, code=1)[1]
    assert 'the text of this run is gone' in said and f'set LLM_LAB_HOME={begun}' in said
    assert 'set LLM_LAB_HOME to the home' in printed('eval', run, code=1)[1]
    monkeypatch.setenv('LLM_LAB_HOME', str(begun))
    assert 'nothing is left to do' in printed('train', '--resume', run)[0]


# ---- several processes


def by_torchrun(home, *words):
    "What `torchrun` leaves of `llm-lab` with these words on two processes"
    clean = {k: v for k, v in os.environ.items() if k != 'LLM_LAB_DATA'}
    launch = 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m', 'llm_lab', '--'
    return subprocess.run(
        [sys.executable, '-m', *launch, *map(str, words)],
        env=clean | dict(LLM_LAB_HOME=str(home), PYTHONPATH=str(ROOT)),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=HANG,
    )


@pytest.mark.parametrize('words', [['train', 'smoke', 'stepz=1'], ['train', '--lr']])
def test_a_mistake_under_torchrun_is_told_once(home, words):
    said = by_torchrun(home, *words)
    told = [line for line in said.stderr.splitlines() if line.startswith('llm-lab')]
    assert said.returncode and len(told) == 1, said.stderr


def test_who_is_not_the_first_process_tells_an_error_of_its_own(home, monkeypatch):
    from llm_lab import cli

    waited = []
    monkeypatch.setattr(cli.time, 'sleep', waited.append)
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'x')
    for rank in '01':
        monkeypatch.setenv('LOCAL_RANK', rank)
        assert 'did you mean train.steps?' in printed('train', 'smoke', 'stepz=1', code=1)[1]
    assert waited == [cli._WAIT]  # the second one alone, and then it spoke


# ---- the guide's section


def cluster_lines():
    "The commands of the guide's section, as words behind `.venv/bin/`"
    section = manual().partition('## On a cluster')[2]
    code = section.partition('\n## ')[0].partition('```sh\n')[2].partition('```')[0]
    return [shlex.split(line.removeprefix('.venv/bin/')) for line in code.splitlines()]


def started(home, words):
    "`llm-lab` with these words as a process that runs while we look"
    return subprocess.Popen(
        [sys.executable, '-m', 'llm_lab', *words],
        env=os.environ | dict(LLM_LAB_HOME=str(home), PYTHONPATH=str(ROOT)),
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path, process):
    "Until a file or folder is there"
    end = time.monotonic() + HANG
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, process.stdout.read()
        time.sleep(0.005)


@pytest.mark.slow  # half a minute of starts; test_run kills runs at every place by day
def test_the_readmes_line_survives_kills_and_refuses_a_second_start(home):
    records(home / 'corpus/a.jsonl', [f'story {n} of {n * n} cats' for n in range(300)])
    steps = dict(train=SHORT['train'] | dict(steps=600), eval=SHORT['eval'] | dict(every=600))
    config = SHORT | steps | dict(log=dict(every=20, checkpoint_every=20))
    config['data'] = dict(corpus='corpus', field='body', length=16, mask_documents=True)
    (home / 'plant.yaml').write_text(json.dumps(config))
    (program, *words), torchrun = cluster_lines()
    assert program == 'llm-lab' and '--resume' in words
    runs = home / 'experiments/plant/runs'
    job = started(home, words)
    wait_for(runs / 'main/checkpoints/step-000020', job)
    assert f'is held by process {job.pid}' in printed(*words, code=1)[1]
    job.send_signal(signal.SIGKILL)
    assert job.wait(HANG) == -signal.SIGKILL
    # however far it came before the kill, the next one is a step of this start
    newest = max(int(p.name[5:]) for p in (runs / 'main/checkpoints').glob('step-*'))
    job = started(home, words)
    wait_for(runs / f'main/checkpoints/step-{newest + 20:06d}', job)
    job.send_signal(signal.SIGTERM)
    said, _ = job.communicate(timeout=HANG)
    assert job.returncode == 143 and 'goes on from step' in said and 'stopped by SIGTERM' in said
    assert 'goes on from step' in printed(*words)[0]  # to its end
    printed('train', 'plant.yaml', '--run', 'whole')
    a, b = (lab.load(f'plant/{run}').model.state_dict() for run in ('main', 'whole'))
    assert all(a[name].equal(b[name]) for name in a)
    told = json.loads((runs / 'main/run.json').read_text())
    assert [s['step'] for s in told['starts']][0] == 0 and len(told['starts']) == 3
    # the other line, as far as one machine can
    assert torchrun[0] == 'torchrun' and torchrun[torchrun.index('--') - 1] == 'llm_lab'
    said = by_torchrun(home, *torchrun[torchrun.index('--') + 1 :], 'train.steps=8')
    assert said.returncode == 0 and 'on 2 × cpu' in said.stdout, said.stderr
    assert (runs / 'two/checkpoints/step-000008').is_dir()


def test_the_exit_codes_are_those_of_the_help_and_the_readme():
    from llm_lab.cli import STOPPED

    assert STOPPED == {'by hand': 130, 'by SIGTERM': 143, 'by SIGHUP': 129}
    assert '130, 143 and 129 where Ctrl-C, SIGTERM or SIGHUP' in help_of('train')
    assert (
        'SIGTERM, SIGHUP and Ctrl-C end the step, write a checkpoint and end with 143, 129'
        in manual()
    )


def test_the_card_of_an_exported_model_opens_it_in_both_ways(home):
    transformers = pytest.importorskip('transformers')
    import torch

    tok = lab.BPETokenizer.train([TEXT], vocab_size=270)
    cfg = lab.llama(vocab_size=tok.vocab_size, d_model=16, n_layers=1, n_heads=2, max_len=16)
    model = lab.MiniGPT(cfg)
    lab.to_hf('mine_hf', model, tok, dict(corpus='own'))
    card = (home / 'mine_hf/README.md').read_text()
    ours, theirs = re.findall(r'^```python\n(.*?)^```', card, re.M | re.S)
    assert 'llm_lab' in ours and 'transformers' in theirs and card.index('own') < card.index(ours)
    os.chdir(home / 'mine_hf')
    spaces = {}, {}
    for code, space in zip((ours, theirs), spaces):
        exec(code, space)
    assert isinstance(spaces[1]['model'], transformers.PreTrainedModel)
    ids = torch.tensor([tok.encode('The cat sat')])
    plain = spaces[1]['tokenizer'].encode('The cat sat', add_special_tokens=False)
    assert plain == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(spaces[1]['model'](ids).logits, spaces[0]['model'](ids))
    os.chdir(home)
    lab.to_hf('bare_hf', model, None, dict(corpus='own'))
    assert 'AutoTokenizer' not in (home / 'bare_hf/README.md').read_text()


def test_eval_says_that_its_two_units_count_different_texts(home):
    records(home / 'd.jsonl', [f'story {n} of {n * n} cats' for n in range(200)], 'text')
    printed('train', 'd.jsonl', *train_words(), 'data.length=16')
    clause = '(characters are counted with what separates documents, bytes without)'
    assert clause in printed('eval', 'd')[0]
    (home / 'own.txt').write_text(TEXT)
    printed('train', 'own.txt', *train_words(), 'data.length=16')
    assert clause not in printed('eval', 'own')[0]
