"""A config says what a script can: an optimizer, a schedule, a loss, callbacks and a mixer of the
reader's own, a tokenizer and start weights from the disk, documents that do not read each other.

The oracle is the same thing by hand: `fit` with these functions, a model of each document alone."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from helpers import one_line
from llm_lab.config import config_from_dict, read_config
from llm_lab.core import REGISTERED, LabError
from llm_lab.parts import register
from llm_lab.runs import SingleProcess, TrainingRun, train_run

pytestmark = pytest.mark.usefixtures('one_thread')

SHORT = dict(
    data=dict(length=16),
    model=dict(d_model=16, n_layers=1, n_heads=2),
    train=dict(steps=6, batch_size=2, threads=1),
    eval=dict(every=6, tokens=64, sample_tokens=2),
    log=dict(every=2, checkpoint_every=2),
)


def short(**more):
    "The short config, with these keys of its sections changed"
    return {s: {**SHORT.get(s, {}), **more.get(s, {})} for s in {**SHORT, **more}}


# ---- by name


class Signs(torch.optim.Optimizer):
    "Steps along the signs of a running sum of gradients"

    def __init__(self, params, lr, beta=0.5):
        super().__init__(params, dict(lr=lr, beta=beta))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is None:
                    continue
                v = self.state[p].setdefault('v', torch.zeros_like(p))
                v.mul_(group['beta']).add_(p.grad)
                p.sub_(group['lr'] * v.sign())


def halving(step, steps, every=2):
    return 0.5 ** (step // every)


def smoothed(model, rows, by=0.0):
    logits = model(rows[:, :-1]).flatten(0, 1)
    return F.cross_entropy(logits, rows[:, 1:].flatten(), label_smoothing=by)


class Largest:
    "The largest weight so far, which a checkpoint keeps"

    def __init__(self, scale=1.0):
        self.scale = scale
        self.seen = []

    def __call__(self, run):
        self.seen.append(run.step)
        return dict(largest=self.scale * max(p.abs().max().item() for p in run.model.parameters()))

    def state_dict(self):
        return dict(seen=self.seen)

    def load_state_dict(self, state):
        self.seen = state['seen']


@pytest.fixture
def own():
    for f in (Signs, halving, smoothed, Largest):
        register(f)
    yield
    for f in (Signs, halving, smoothed, Largest):
        REGISTERED.pop(f.__name__, None)


OWN = dict(
    optimizer=dict(part='Signs', beta=0.8),
    schedule=dict(part='halving', every=3),
    loss=dict(part='smoothed', by=0.1),
    callbacks=[dict(part='Largest', every=3, scale=2.0)],
)


def test_what_a_config_names_is_what_fit_is_given(home, own):
    from llm_lab.train import fit

    job = train_run(short(train=OWN))
    fresh = TrainingRun(config_from_dict(short(train=OWN)), home / 'other', SingleProcess())
    model = fresh.run.model
    fit(
        model,
        fresh.stream,
        6,
        optimizer=Signs(model.parameters(), 0.01, beta=0.8),
        schedule=lambda step, steps: 0.5 ** (step // 3),
        loss_fn=lambda model, rows: smoothed(model, rows, by=0.1),
    )
    for a, b in zip(job.run.model.parameters(), model.parameters()):
        assert torch.equal(a, b)
    # the callback was called at steps 3 and 6; a checkpoint has it, and so have the notes
    noted = {n['step']: n['largest'] for n in job.run.notes if 'largest' in n}
    assert [*noted] == [3, 6] and job.callbacks[0][1].seen == [3, 6]
    assert noted[6] == 2 * max(p.abs().max().item() for p in model.parameters())
    # its loss is no nats: there is no perplexity in the log, and the validation is as ever
    from helpers import json_lines

    last = json_lines(job.folder / 'metrics.jsonl')[-1]
    assert 'ppl' not in last and last['val'] > 0 and last['largest'] == noted[6]
    assert 'Signs(beta=0.8)' in repr(job)


def test_a_part_without_keywords_is_its_word():
    plain = read_config('smoke', ['train.optimizer.part=adamw', 'train.schedule={part: wsd}'])
    assert plain.train == replace(read_config('smoke').train, optimizer='adamw', schedule='wsd')


def test_keywords_of_the_books_own_reach_them(home):
    train = dict(optimizer=dict(part='muon', rest_lr=0.003), schedule=dict(part='wsd', decay=0.5))
    job = TrainingRun(config_from_dict(short(train=train)), home / 'x', SingleProcess())
    assert {g['lr'] for g in job.run.optimizer.param_groups} == {0.003, 0.01}


@pytest.mark.parametrize(
    'train, says',
    [
        (
            dict(optimizer='Sings'),
            "train.optimizer='Sings': choose from adamw, muon, sgd, what --p",
        ),
        (dict(optimizer=dict(part='Signs', bete=1)), "Signs takes no 'bete'; did you mean 'beta'?"),
        (dict(optimizer=dict(part='Signs', lr=1)), 'train.optimizer.lr=1: it has a key of its own'),
        (dict(optimizer='halving'), "train.optimizer='halving'"),
        (dict(optimizer=7), 'train.optimizer=7: choose from adamw'),
        (dict(optimizer={'beta': 1}), "train.optimizer={'beta': 1}: choose from"),
        (dict(optimizer=dict(part='Signs', beta=dict(a=1))), 'train.optimizer.beta='),
        (dict(schedule='halving', warmup=3), "takes no 'warmup'; leave train.warmup out"),
        (dict(schedule='halving', min_lr=0.001), 'leave train.min_lr out'),
        (dict(callbacks=7), 'train.callbacks=7: choose from DivergenceMonitor'),
        (dict(callbacks=['Largest', 'None']), "train.callbacks[1]='None'"),
        (dict(callbacks=[dict(part='Largest', every=0)]), 'train.callbacks[0].every=0'),
    ],
)
def test_a_slip_in_a_name_is_one_line_before_anything_is_packed(train, says, home, own):
    one_line(lambda: train_run(short(train=train)), says)
    assert not (home / 'data').exists()


# ---- parts from a file of one's own

MINE = '''
import torch
from torch import nn
from llm_lab.parts import register


class Mean(nn.Module):
    "Each position gets the mean of what came before, through one projection"

    def __init__(self, cfg, layer=0, bias=False):
        super().__init__()
        self.out = nn.Linear(cfg.d_model, cfg.d_model, bias)

    def forward(self, x, i, **ctx):
        n = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return self.out(x.cumsum(1) / n)


class Signs(torch.optim.Optimizer):
    def __init__(self, params, lr, beta=0.5):
        super().__init__(params, dict(lr=lr, beta=beta))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group['params']:
                v = self.state[p].setdefault('v', torch.zeros_like(p))
                v.mul_(group['beta']).add_(p.grad)
                p.sub_(group['lr'] * v.sign())


def halving(step, steps, every=2):
    return 0.5 ** (step // every)


def focal(model, rows, power=1.0):
    logp = model(rows[:, :-1]).log_softmax(-1).gather(-1, rows[:, 1:, None])
    return -((1 - logp.exp()) ** power * logp).mean()


for f in (Mean, Signs, halving, focal):
    register(f)
'''
MINE_CONFIG = '''
data: {length: 16}
model: {d_model: 16, n_layers: 2, n_heads: 2, attn: {part: Mean, bias: true}}
train:
  steps: 8
  batch_size: 2
  threads: 1
  optimizer: {part: Signs, beta: 0.8}
  schedule: {part: halving, every: 3}
  loss: {part: focal, power: 2.0}
eval: {every: 8, tokens: 64, sample_tokens: 2}
log: {every: 2, checkpoint_every: 2}
'''
# `llm-lab` with these words, killed before the sixth update of the weights
KILLED = '''
import os, signal, sys
from llm_lab import cli, efficient
real, calls = efficient.update, []
def update(*args):
    calls.append(1)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
efficient.update = update
cli.main(sys.argv[1:])
'''


@pytest.fixture
def mine(home, monkeypatch):
    from llm_lab import parts

    monkeypatch.chdir(home)
    monkeypatch.setattr(parts, '_PARTS_FILES', {})
    before = dict(REGISTERED)
    (home / 'mine.py').write_text(MINE)
    (home / 'mine.yaml').write_text(MINE_CONFIG)
    yield home / 'mine.py'
    REGISTERED.clear()
    REGISTERED.update(before)


def forget(monkeypatch):
    "As a process that has just begun, which knows no part but those of the book"
    from llm_lab import parts

    REGISTERED.clear()
    monkeypatch.setattr(parts, '_PARTS_FILES', {})


def test_own_mixer_optimizer_schedule_and_loss_go_on_bit_for_bit(home, mine, monkeypatch):
    import json
    import subprocess
    import sys

    from helpers import file_hash, printed

    printed('train', 'mine.yaml', '--parts', 'mine.py', '--run', 'whole')
    words = ['train', 'mine.yaml', '--parts', 'mine.py', '--run', 'killed']
    done = subprocess.run(
        [sys.executable, '-c', KILLED, *words], cwd=home, capture_output=True, text=True, timeout=99
    )
    assert done.returncode == -9, done
    runs = home / 'experiments' / 'mine' / 'runs'
    told = json.loads((runs / 'killed' / 'run.json').read_text())['parts']['mine.py']
    assert told['sha256'] == file_hash(mine) == file_hash(runs / 'killed' / 'parts' / 'mine.py')
    assert told['names'] == ['Mean', 'Signs', 'halving', 'focal']

    forget(monkeypatch)
    again = ['train', 'mine.yaml', '--run', 'killed', '--resume']
    for argv in (again, ['train', '--resume', runs / 'killed']):
        said = printed(*argv, code=1)[1]
        assert 'Mean, Signs, halving, focal of mine.py: give --parts mine.py' in said
    # no file was run by itself, and another one is refused
    assert not REGISTERED
    mine.write_text(MINE.replace('0.5 **', '0.6 **'))
    said = printed(*again, '--parts', 'mine.py', code=1)[1]
    assert 'mine.py is not the file that' in said and str(runs / 'killed' / 'parts') in said
    forget(monkeypatch)
    printed(*again, '--parts', runs / 'killed' / 'parts' / 'mine.py')
    for name in ('model', 'optimizer'):
        file = f'checkpoints/step-000008/{name}.safetensors'
        assert file_hash(runs / 'whole' / file) == file_hash(runs / 'killed' / file)

    forget(monkeypatch)
    for command in ('sample', 'eval'):
        said = printed(command, 'mine/killed', code=1)[1]
        assert "'Mean' names no part" in said and 'give --parts mine.py' in said
    more = '--parts', runs / 'whole' / 'parts' / 'mine.py'
    texts = [printed('sample', f'mine/{n}', '--tokens', '9', *more)[0] for n in ('whole', 'killed')]
    assert texts[0] == texts[1] and len(texts[0]) == 10
    assert 'perplexity' in printed('eval', 'mine/killed', *more)[0]
    # a table of both needs no part
    forget(monkeypatch)
    assert printed('runs', 'mine/whole', 'mine/killed')[0].count('finished') == 2


@pytest.mark.parametrize(
    'text, says',
    [
        ('x = 1', 'registers nothing: end it with register(MyPart)'),
        ('import torch\n\nraise ValueError("no")', "line 3: ValueError: 'no'; mend it"),
        ('import torch\nx = (', 'line 2: SyntaxError'),
        ('import nowhere_at_all', 'line 1: ModuleNotFoundError'),
        ('raise SystemExit(3)', 'line 1: SystemExit'),
    ],
)
def test_a_file_of_parts_that_fails_is_one_line(text, says, mine):
    from helpers import printed

    mine.write_text(text)
    assert says in printed('train', 'mine.yaml', '--parts', 'mine.py', code=1)[1]
    assert 'there is no such file' in printed('sample', 'x', '--parts', 'none.py', code=1)[1]


def test_a_file_of_parts_is_run_once(mine):
    from llm_lab.parts import load_parts

    one = load_parts('mine.py')
    mean = REGISTERED['Mean']
    assert load_parts(mine) == one and REGISTERED['Mean'] is mean
    mine.write_text(MINE + '\n')
    assert load_parts(mine).sha256 != one.sha256 and REGISTERED['Mean'] is not mean


# ---- a tokenizer from the disk, and weights to begin with


EVAL = dict(SHORT['eval'], tokens=200)  # more than the default context


@pytest.fixture
def text(home):
    (home / 'own.txt').write_text('The cat sat on the mat. A dog ran to the cat.\n' * 200)
    return 'own.txt'


def test_a_tokenizer_of_the_disk_is_used_and_kept(home, text, monkeypatch):
    import shutil

    from llm_lab.bpe import BPETokenizer
    from llm_lab.package import load

    tok = BPETokenizer.train((home / text).read_text(), vocab_size=270)
    tok.save(home / 'tok')
    for path in ('tok', 'tok/tokenizer.json', str(home / 'tok')):
        cfg = short(data=dict(corpus=text, tokenizer=path))
        job = TrainingRun(config_from_dict(cfg), home / 'x', SingleProcess())
        assert job.texts['tokenizer'].encode('the cat') == tok.encode('the cat')
    job = train_run(short(data=dict(corpus=text, tokenizer='tok')), run='one')
    assert load('one').tokenizer.encode('the mat') == tok.encode('the mat')
    # the run has its own copy: it goes on where the folder is gone, and refuses another one
    shutil.rmtree(home / 'tok')
    longer = train_run(None, 'train.steps=8', resume=job.folder)
    assert longer.run.step == 8 and longer.texts['tokenizer'].encode('mat') == tok.encode('mat')
    # the model of a run has a tokenizer, too
    other = train_run(short(data=dict(corpus=text, tokenizer='run/one')), run='two')
    assert other.texts['tokenizer'].vocab_size == tok.vocab_size
    one_line(
        lambda: train_run(short(data=dict(tokenizer='bpe2'))),
        "data.tokenizer='bpe2': choose from chars, bpe, or the path of one",
    )
    one_line(lambda: train_run(short(data=dict(tokenizer='no/such'))), 'no/such')
    one_line(
        lambda: config_from_dict(dict(data=dict(tokenizer='a/b', vocab_size=300))),
        'data.vocab_size=300: a/b decides it',
    )


def test_training_goes_on_from_a_model_on_another_text(home, text):
    from llm_lab.hub import to_hf
    from llm_lab.package import load, save

    size = dict(d_model=24, n_layers=2, n_heads=2, pos=None)
    first = train_run(short(data=dict(corpus=text, length=20), model=size), run='one')
    model, tokenizer, _ = load('one')
    save(home / 'kept', model, tokenizer)
    (home / 'other.txt').write_text('A dog sat on the cat. The mat ran.\n' * 200)
    data = dict(corpus='other.txt')
    here = dict(eval=EVAL, log=SHORT['log'])
    for start in ('one', 'kept', str(first.folder / 'checkpoints' / 'step-000006')):
        more = dict(here, data=data, train=dict(SHORT['train'], start_from=start, steps=2))
        run = f'from-{start[:3].strip("/")}'
        job = train_run(more, run=run)
        # the model, its context and its tokenizer are those of the start
        assert job.run.model.cfg == model.cfg
        assert job.texts['tokenizer'].encode('The cat') == tokenizer.encode('The cat')
        fresh = TrainingRun(job.cfg, home / 'fresh', SingleProcess())
        for a, b in zip(fresh.run.model.parameters(), model.parameters()):
            assert torch.equal(a, b)
        assert any(
            not torch.equal(a, b) for a, b in zip(job.run.model.parameters(), model.parameters())
        )
    # a run that goes on takes its own checkpoint, and does not begin again
    longer = train_run(None, 'train.steps=4', resume=job.folder)
    whole = train_run(dict(more, train=dict(more['train'], steps=4, schedule='constant')), run='w')
    assert longer.run.step == whole.run.step == 4 and longer.start == job.start == whole.start


def test_a_hugging_face_folder_is_a_start(home, text):
    from llm_lab.gpt import GPTConfig, MiniGPT
    from llm_lab.chars import CharTokenizer
    from llm_lab.hub import to_hf

    tok = CharTokenizer.train((home / text).read_text())
    model = MiniGPT(GPTConfig(tok.vocab_size, d_model=16, n_layers=1, n_heads=2, max_len=20), 3)
    to_hf(home / 'hf', model, tok)
    more = dict(eval=EVAL, log=SHORT['log'])
    train = dict(SHORT['train'], start_from='hf')
    job = train_run(dict(more, data=dict(corpus=text), train=train, model={}))
    fresh = TrainingRun(job.cfg, home / 'fresh', SingleProcess())
    assert torch.equal(fresh.run.model.tok.weight, model.tok.weight)
    assert fresh.run.model.cfg.max_len == 20


def test_weights_that_do_not_fit_are_one_line(home, text):
    train_run(short(data=dict(corpus=text)), run='one')
    train = dict(SHORT['train'], start_from='one')
    for more, says in (
        (dict(model=dict(d_model=32)), ' × 16 there and '),
        (dict(model=dict(n_layers=2)), 'is nothing there and'),
        (dict(data=dict(corpus=text, length=32)), 'pos.table.weight is 16 × 16 there and 32 × 16'),
    ):
        cfg = dict(data=dict(corpus=text), train=train, eval=EVAL, log=SHORT['log'])
        one_line(lambda: train_run(cfg | more), 'train.start_from=', says)
    one_line(lambda: train_run(cfg | dict(train=dict(start_from='none'))), 'no model at none')


# ---- documents that do not read each other


@pytest.mark.parametrize(
    'model',
    [
        dict(),  # learned positions
        dict(pos=None, attn=dict(part='Attention', transforms=[dict(part='RoPE')])),
        dict(attn=dict(part='GQA', n_kv_heads=1, mask=dict(part='sliding_window', size=3))),
        dict(
            attn=dict(part='alternate', of=[dict(part='Attention'), dict(part='SparseAttention')])
        ),
    ],
    ids=['learned', 'rope', 'window', 'alternate'],
)
@pytest.mark.parametrize('end', [[2], [2, 3]], ids=['one', 'two'])
def test_a_row_of_documents_is_each_document_alone(model, end):
    "Loss and gradient are those of the plain model on every document by itself"
    from llm_lab.runs import model_config, within_documents
    from llm_lab.train import document_starts, next_token_loss
    from llm_lab.gpt import MiniGPT
    from helpers import shake

    cfg = model_config(config_from_dict(short(model=dict(model, n_layers=2))), 9)
    plain = shake(MiniGPT(cfg))
    form = within_documents(plain, end)
    draw = torch.Generator().manual_seed(1)
    rows = torch.randint(4, 9, (3, 17), generator=draw)
    for row, at in zip(rows, ((4, 9), (0, 6, 14), ())):
        for t in at:
            row[t : t + len(end)] = torch.tensor(end)
    total = torch.zeros(())
    for row in rows:
        cuts = [0, *document_starts(row[:-1], end).tolist(), 16]
        for a, b in zip(cuts, cuts[1:]):
            if b > a:  # document: reads a … b−1, predicts a+1 … b
                total = total + next_token_loss(plain, row[None, a : b + 1]) * (b - a)
    total = total / (3 * 16)
    total.backward()
    alone = [p.grad.clone() for p in plain.parameters()]
    plain.zero_grad()
    loss = next_token_loss(form, rows)
    loss.backward()
    assert {id(p) for p in form.parameters()} == {id(p) for p in plain.parameters()}
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-6)
    for p, want in zip(plain.parameters(), alone):
        torch.testing.assert_close(p.grad, want, rtol=1e-4, atol=1e-5)
    # it can fail: without the mask, the loss is another one
    assert (next_token_loss(plain, rows) - total).abs() > 1e-4


def test_a_run_with_masked_documents_trains_and_is_an_ordinary_model(home, text):
    from llm_lab.package import load

    job = train_run(short(data=dict(mask_documents=True, corpus='tiny_tales')), run='one')
    other = train_run(short(data=dict(corpus='tiny_tales')), run='two')
    assert not torch.equal(job.run.model.lm_head.weight, other.run.model.lm_head.weight)
    model, _, _ = load('one')
    assert model.cfg == job.run.model.cfg and 'doc' not in model.needs
    assert torch.equal(model.lm_head.weight, job.run.model.lm_head.weight)
    one_line(
        lambda: train_run(short(data=dict(mask_documents=True, corpus=text))),
        'data.mask_documents=true: own is one running text, in which nothing says',
        'put a line <|endoftext|> between its documents, give records',
        'or leave it out',
    )


def test_a_smoke_run_with_parts_of_ones_own_blocks_no_later_one(home, own):
    "Its config.yaml names what is not registered then: it is still ours, and is replaced"
    train_run('smoke', 'train.steps=20', 'train.loss=smoothed', smoke=True)
    del REGISTERED['smoothed']
    train_run('smoke', 'train.steps=20', smoke=True)
    said = (home / 'experiments/smoke/runs/smoke/config.yaml').read_text()
    assert 'smoothed' not in said
    # a hand has been at it: it is not replaced
    (home / 'experiments/smoke/runs/smoke/config.yaml').write_text(
        '# mine\n' + said.replace('loss: next_token', 'loss: smoothed')
    )
    with pytest.raises(LabError, match='config.yaml'):
        train_run('smoke', smoke=True)
