"""What is typed means what it says, and what is printed is in the unit it names.

Texts on the command line, schedules, closed streams, half a launch; the loss per token, per
character and per byte, the price of an end mark, which model is judged, one mark between
paragraphs, validations that fit into the memory."""

import io
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import HANG, cases, some
import helpers
from helpers import json_lines, one_line, typed
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from llm_lab import cli
from llm_lab.bpe import BPETokenizer
from llm_lab.chars import CharTokenizer
from llm_lab.config import _PATHS, config_from_dict, read_config, smoke_config, write_config
from llm_lab.corpora import END_OF_TEXT, Corpus
from llm_lab.evaluation import UNITS, Score, compare, evaluate, evaluate_file
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.core import LabError
from llm_lab.optim import SCHEDULES
from llm_lab.packing import PackedTokens, document_end_ids, pack
from llm_lab.runs import _check_launch, _require_device, schedule_of, train_run
from llm_lab.first_tour import describe_score
from llm_lab.train import fit, mean_loss, read_split, token_losses, windows_at_once

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures('one_thread')
TEXT_KEYS = [p for p, f in _PATHS.items() if f.type is str and not f.metadata.get('of')]


# ---- texts are texts

SIGNS = ' :#-[]{}&*!|>%@`"\'\\,?~=.$\t\n0159eExX_nulltrueyesоß漢🙂'


def odd_texts(n):
    luck = random.Random(5)
    known = (
        'ROMEO:',
        'my #1.txt',
        'null',
        '~',
        'true',
        'no',
        '1984',
        '1e3',
        '0x10',
        '2024-01-01',
        '???',
        '- x',
        '[',
        '{a: b}',
        '!!str 5',
        '&a',
        '*a',
        '"',
        "it's",
        ' a ',
        '',
        '=',
        'a=b',
        '$HOME',
        '\\n',
        'a\nb',
        '#',
        ': ',
        '<<',
        '|',
        '>',
        '1_000',
        '.inf',
        '12:30:45',
    )
    return [*known, *(''.join(luck.choices(SIGNS, k=luck.randint(1, 12))) for _ in range(n))]


def test_there_are_text_keys():
    assert {'data.corpus', 'eval.prompt'} <= {*TEXT_KEYS}


@pytest.mark.parametrize('key', TEXT_KEYS)
def test_a_text_that_is_typed_arrives_letter_by_letter(key, tmp_path):
    """On the command line, by the long and the short name; and again when the config was written
    and read"""
    section, _, name = key.partition('.')
    for text in odd_texts(cases(300)):
        if '${' in text:
            continue  # a reference, by design
        for word in (key, name):
            cfg = read_config('smoke', [f'{word}={text}'])
            assert getattr(getattr(cfg, section), name) == text, text
        write_config(cfg, tmp_path / 'x.yaml')
        assert read_config(tmp_path / 'x.yaml') == replace(cfg, name='x'), text


def test_the_name_of_a_part_is_a_text_too():
    for text in ('[]', '{a: b}', 'null', '5', 'x: y', 'GQA:'):
        with pytest.raises(LabError, match=r'^model\.mlp'):
            read_config('smoke', [f'model.mlp.part={text}'])
    assert read_config('smoke', ['model.mlp.part=MLP']).model.mlp == dict(part='MLP')


def test_numbers_and_recipes_are_still_read():
    cfg = read_config(
        'smoke',
        [
            'steps=7',
            'lr=1e-3',
            'model.mlp={part: MLP, d_ff: 8}',
            'vocab_size=null',
            'tie=true',
            'min_lr=0',
        ],
    )
    assert (cfg.train.steps, cfg.train.lr, cfg.data.vocab_size, cfg.model.tie) == (
        7,
        0.001,
        None,
        True,
    )
    assert cfg.model.mlp == dict(part='MLP', d_ff=8)


@pytest.mark.parametrize(
    'text, words',
    [
        ('data:\n  corpus: my #1.txt\n', ["line 2: corpus would be 'my'", 'in quotes']),
        ('data: {corpus: my #1.txt\n}\n', ["line 1: corpus would be 'my'"]),
        ('eval:\n  prompt: ROMEO: yes\n', ['line 2', 'in quotes']),
        ('eval: {prompt: ROMEO:}\n', ['line 1', 'in quotes']),
        ('data: {corpus: 1984}\n', ['data.corpus=1984', 'in quotes']),
        ('eval: {prompt: yes}\n', ['eval.prompt=True', 'in quotes']),
        ('eval: {prompt: }\n', ['eval.prompt=None', 'in quotes']),
    ],
)
def test_a_text_that_a_file_would_lose_is_told(tmp_path, text, words):
    (tmp_path / 'c.yaml').write_text(text)
    one_line(lambda: read_config(tmp_path / 'c.yaml'), *words)


def test_another_tokenizer_forgets_the_size_and_only_a_size_that_was_not_typed():
    data = dict(data=dict(tokenizer='bpe', vocab_size=300))
    assert read_config(data, ['data.tokenizer=chars']).data.vocab_size is None
    assert read_config(data).data.vocab_size == 300
    for typed_size in (
        ['vocab_size=400', 'tokenizer=chars'],
        ['tokenizer=chars', 'data.vocab_size=400'],
    ):
        with pytest.raises(LabError, match='^data.vocab_size=400: characters decide it'):
            read_config(data, typed_size)
    assert read_config(data, ['tokenizer=bpe', 'vocab_size=500']).data.vocab_size == 500


def test_comments_and_quoted_signs_stay(tmp_path):
    (tmp_path / 'c.yaml').write_text(
        'data:\n  corpus: de.txt # the German one\n  length: 8 #short\neval:\n  prompt: '
        '"a #1: b"   #x\n'
    )
    cfg = read_config(tmp_path / 'c.yaml')
    assert (cfg.data.corpus, cfg.data.length, cfg.eval.prompt) == ('de.txt', 8, 'a #1: b')


DEEP = """
import sys

from llm_lab import cli

for x in ('[', '{a: ', '- '):
    for n in (41, 3000, 60_000, 100_000):
        open('deep.yaml', 'w').write(x * n)
        ways = [['deep.yaml']]
        if n < 1e5 or x != '{a: ':
            ways = [[f'model.attn={x * n}'], *ways]
        for words in ways:
            name = [] if words == ['deep.yaml'] else ['smoke']
            print(cli.main(['train', *name, *words]), flush=True)
"""


def test_nested_without_end_is_one_line(tmp_path):
    "Its own process: what goes wrong here kills it"
    env = dict(os.environ, PYTHONPATH=str(ROOT), LLM_LAB_HOME=str(tmp_path))
    done = subprocess.run(
        [sys.executable, '-c', DEEP],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    codes, lines = done.stdout.split(), done.stderr.splitlines()
    assert done.returncode == 0 and len(codes) == 23 and {*codes} == {'1'}, (
        done.returncode,
        done.stderr[-500:],
    )
    assert len(lines) == 23 and all(
        line.startswith('llm-lab: ') and len(line) < 400 for line in lines
    )


# ---- options whose value looks like another thing


def options():
    "(command, words that it needs, option) for each option with a value"
    commands = next(a for a in cli._parser()._actions if a.choices and a.dest == 'command').choices
    for name, parser in commands.items():
        needs = ['x'] * sum(not a.option_strings and a.nargs is None for a in parser._actions)
        for a in parser._actions:
            if a.option_strings and a.nargs in (None, '?'):
                yield name, needs, a.option_strings[-1]


def test_two_dashes_after_the_sign_of_equality_are_a_value():
    texts = numbers = 0
    for command, needs, option in options():
        with redirect_stderr(io.StringIO()) as err:
            try:
                args = cli._parser().parse_args([command, *needs, f'{option}=--'])
            except SystemExit as e:
                said = err.getvalue()
                assert e.code == 2 and said.count('\n') == 1 and "'--' will not do" in said, (
                    command,
                    option,
                    said,
                )
                numbers += 1
                continue
        got = [v for v in vars(args).values() if v in ('--', ['--'])]
        assert len(got) == 1, (command, option, args)
        texts += 1
    assert texts >= 8 and numbers >= 8
    assert typed('sample', 'x', '--tokens=--')[0] == 2


# ---- streams that nobody reads


def gone():
    "A text stream into a pipe whose reader has gone"
    r, w = os.pipe()
    os.close(r)
    return open(w, 'w', encoding='utf-8')


def full():
    if not os.path.exists('/dev/full'):
        pytest.skip('this system has no /dev/full')
    return open('/dev/full', 'w', encoding='utf-8')


@pytest.mark.parametrize('stream', [gone, full])
def test_whoever_prints_to_nobody_ends_with_one(stream, tmp_path, monkeypatch, capfd):
    "No traceback, nothing left in the buffer for the exit to trip over; a full disk is told"
    monkeypatch.setenv('LLM_LAB_HOME', str(tmp_path))
    for argv in (['runs'], ['--help'], ['--version'], ['sample', '--help']):
        err = io.StringIO()
        with monkeypatch.context() as m, stream() as out:
            m.setattr(sys, 'stdout', out)
            m.setattr(sys, 'stderr', err)
            try:
                code = cli.main(argv)
            except SystemExit as e:
                code = e.code
            out.flush()  # as Python does at exit
        assert code == 1, argv
        assert (
            err.getvalue().count('\n') <= (stream is full) and 'Traceback' not in err.getvalue()
        ), err.getvalue()
    assert capfd.readouterr().err == ''


def test_an_error_that_nobody_reads_keeps_its_code(tmp_path, monkeypatch):
    monkeypatch.setenv('LLM_LAB_HOME', str(tmp_path))
    for argv, want in (
        (['toru'], 2),
        (['sample', 'x', '--top-p', '0'], 2),
        (['sample', 'nowhere'], 1),
        (['train', 'smok'], 1),
    ):
        for stream in (gone, lambda: None):
            with monkeypatch.context() as m:
                m.setattr(sys, 'stderr', stream())
                m.setattr(sys, 'stdout', io.StringIO() if stream is gone else None)
                try:
                    code = cli.main(argv)
                except SystemExit as e:
                    code = e.code
            assert code == want, (argv, code)


def test_a_closed_pipe_in_a_real_process(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONUNBUFFERED'} | dict(
        PYTHONPATH=str(ROOT), LLM_LAB_HOME=str(tmp_path)
    )
    for argv in ([], ['--help']):
        r, w = os.pipe()
        os.close(r)
        with os.fdopen(w, 'wb') as out:
            done = subprocess.run(
                [sys.executable, '-m', 'llm_lab.cli', *argv],
                stdout=out,
                stderr=subprocess.PIPE,
                text=True,
                env=env,
                timeout=HANG,
            )
        assert done.returncode == (1 if argv else 2) and done.stderr.count('\n') == (not argv), (
            done.stderr
        )


# ---- the device, and other processes


@pytest.mark.parametrize(
    'name', ['CPU', 'toaster', 'cuda1', 'cpu:', ' cpu', '0', 'gpu', 'cpu;rm', 'cuda:-1']
)
def test_a_device_that_cannot_be_is_refused_by_every_command(name, tmp_path, monkeypatch):
    monkeypatch.setenv('LLM_LAB_HOME', str(tmp_path))
    monkeypatch.setenv('LLM_LAB_DEVICE', name)
    for argv in (
        ['runs'],
        ['prepare', 'tiny_tales'],
        ['train', 'smoke'],
        ['eval', 'x'],
        ['sample', 'x'],
        ['tour', '--minutes', '.01'],
    ):
        code, out, err = typed(*argv)
        assert (
            code == 1
            and err.count('\n') == 1
            and f'the device {name!r} cannot be used' in err
            and out == ''
        ), (argv, out, err)
    assert [*tmp_path.iterdir()] == []


def test_an_engine_on_another_device_is_refused(monkeypatch):
    from types import SimpleNamespace as Has

    def judged(name, device, n=1):
        if name:
            monkeypatch.setenv('LLM_LAB_DEVICE', name)
        else:
            monkeypatch.delenv('LLM_LAB_DEVICE', raising=False)
        try:
            _require_device(Has(device=torch.device(device), num_processes=n))
        except LabError as e:
            return str(e)
        return 'obeyed'

    for name, device, n in (
        (None, 'cuda:3', 1),
        (None, 'cpu:0', 2),
        ('cpu', 'cpu', 1),
        ('cpu', 'cpu', 2),
        ('cuda', 'cuda:1', 2),
        ('cuda:1', 'cuda:1', 1),
        ('cuda:0', 'cuda', 1),
    ):
        assert judged(name, device, n) == 'obeyed', (name, device)
    for name, device, n in (
        ('cpu', 'cuda', 1),
        ('cuda', 'cpu', 1),
        ('cuda:1', 'cuda:0', 1),
        ('cuda:1', 'cuda', 1),
        ('cuda:1', 'cuda:1', 2),
        ('mps', 'cpu', 1),
    ):
        said = judged(name, device, n)
        assert f'LLM_LAB_DEVICE={name} cannot be obeyed' in said and '\n' not in said


def test_half_a_launch_is_refused(monkeypatch):
    "Every part of what torchrun sets; whole, it is taken"
    whole = dict(
        RANK='1', LOCAL_RANK='1', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT='29500'
    )

    def judged(env):
        for k in whole:
            monkeypatch.delenv(k, raising=False)
        for k, v in env.items():
            monkeypatch.setenv(k, v)
        try:
            _check_launch()
        except LabError as e:
            return str(e)
        return 'taken'

    taken = []
    for n in range(6):
        for keys in itertools.combinations(whole, n):
            said = judged({k: whole[k] for k in keys})
            if said == 'taken':
                taken.append({*keys})
            else:
                assert re.fullmatch(
                    (
                        r'(WORLD_SIZE|RANK|LOCAL_RANK)=\d is set, \w+ is not: start with '
                        r'torchrun, or unset \1'
                    ),
                    said,
                ), said
    assert taken == [
        s
        for s in map(
            set, [(), ('MASTER_ADDR',), ('MASTER_PORT',), ('MASTER_ADDR', 'MASTER_PORT'), whole]
        )
    ]
    assert judged(dict(WORLD_SIZE='1')) == 'taken' and "WORLD_SIZE='' is no whole number" in judged(
        dict(WORLD_SIZE='')
    )
    for key, value in (
        ('WORLD_SIZE', 'two'),
        ('WORLD_SIZE', '-1'),
        ('RANK', '1.0'),
        ('MASTER_PORT', 'x'),
        ('RANK', '2'),
    ):
        assert judged(whole | {key: value}).startswith(f'{key}='), (key, value)
    assert judged(dict(WORLD_SIZE='two')).startswith("WORLD_SIZE='two' is no whole number")


def test_a_world_size_alone_ends_the_command_with_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv('LLM_LAB_HOME', str(tmp_path))
    for k in ('RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv('WORLD_SIZE', '2')
    code, out, err = typed('train', 'smoke')
    assert (
        code == 1
        and out == ''
        and err
        == 'llm-lab: WORLD_SIZE=2 is set, RANK is not: start with torchrun, or unset WORLD_SIZE\n'
    )
    assert not (tmp_path / 'experiments').exists()


# ---- schedules


def by_torch(steps, warmup, lr, min_lr):
    "The rates of PyTorch's own schedulers: a line, then half a cosine"
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    parts = (
        [
            LinearLR(opt, 1 / warmup, 1.0, warmup - 1),
            CosineAnnealingLR(opt, steps - warmup, eta_min=min_lr),
        ]
        if warmup > 1
        else [CosineAnnealingLR(opt, steps - warmup, eta_min=min_lr)]
    )
    both = SequentialLR(opt, parts, [warmup] if warmup > 1 else [])
    rates = []
    for _ in range(steps):
        rates.append(opt.param_groups[0]['lr'])
        opt.step()
        both.step()
    return rates


@pytest.mark.filterwarnings('ignore:The epoch parameter')
@pytest.mark.parametrize('warmup, min_lr', [(2, 0.0), (30, 0.001), (99, 0.0005), (50, 0.004)])
def test_the_rates_of_a_run_are_those_of_torch(warmup, min_lr):
    cfg = read_config('smoke', ['steps=100', 'lr=0.004', f'warmup={warmup}', f'min_lr={min_lr}'])
    factor = schedule_of(cfg.train)
    mine = [0.004 * factor(s, 100) for s in range(100)]
    assert mine == pytest.approx(by_torch(100, warmup, 0.004, min_lr), rel=1e-6, abs=1e-9)


tiny_model = partial(helpers.tiny_model, vocab_size=9)


def test_fit_obeys_warmup_and_min_lr():
    rates, rows = [], torch.randint(9, (2, 9))

    def step(model, opt, rows, clip, loss):
        rates.append(opt.param_groups[0]['lr'])
        return torch.zeros(()), torch.zeros(())

    fit(tiny_model(), lambda n: rows, 50, lr=0.01, warmup=40, min_lr=0.002, step_fn=step)
    assert (
        rates[:40] == pytest.approx([0.01 * (s + 1) / 40 for s in range(40)])
        and min(rates[40:]) >= 0.002
        and max(rates) == pytest.approx(0.01)
    )
    rates.clear()
    fit(tiny_model(), lambda n: rows, 50, lr=0.01, step_fn=step)
    # none is given: a tenth of all
    assert rates[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01])
    for wrong in (dict(warmup=51), dict(warmup=-1), dict(min_lr=0.02), dict(min_lr=-1.0)):
        with pytest.raises(LabError, match=[*wrong][0]):
            fit(tiny_model(), lambda n: rows, 50, lr=0.01, **wrong)


def test_every_schedule_obeys_and_ends_where_it_should():
    for name, f in SCHEDULES.items():
        for steps in (10, 100, 1000):
            for warmup in (0, 1, steps // 2, steps):
                curve = [f(s, steps, warmup) for s in range(steps)]
                climb = min(warmup, steps // 2)  # from half-way on, some come down already
                assert curve[:climb] == pytest.approx([(s + 1) / warmup for s in range(climb)]), (
                    name
                )
                if name != 'constant':
                    low = [f(s, steps, warmup, end=0.25) for s in range(steps)]
                    assert (
                        all(b >= a - 1e-12 for a, b in zip(curve, low))
                        and min(low[warmup:], default=1) >= 0.25 - 1e-12
                    )


def test_a_smoke_run_of_a_long_warmup_is_possible():
    cfg = smoke_config(read_config('tinystories_baseline'))
    assert (cfg.train.steps, cfg.train.warmup) == (20, None)
    with pytest.raises(LabError, match='^train.warmup=500: the run is over after train.steps=20'):
        read_config('tinystories_baseline', ['steps=20'])


# ---- corpora and models for what follows


def stories(n, seed=0):
    luck = random.Random(seed)
    return [
        ' '.join(
            luck.choices(
                'der die das Haus grün über Straße neu liegt'.split(), k=luck.randint(3, 9)
            )
        )
        + '.'
        for _ in range(n)
    ]


def tales(n=40):
    return Corpus(
        'tales',
        {s: stories(n, k) for k, s in enumerate(('train', 'val'))},
        f'\n{END_OF_TEXT}\n',
        independent=True,
    )


def play(n=40):
    return Corpus('play', {s: '\n\n'.join(stories(n, k)) for k, s in enumerate(('train', 'val'))})


def letters_of(corpus):
    return CharTokenizer.train(corpus.separator + ''.join(map(corpus.text, corpus.splits)))


def pairs_of(corpus, n=290):
    return BPETokenizer.train(corpus.documents('train'), n, special_tokens=['<|endoftext|>'])


def model_for(tok, seed=0, **more):
    cfg = GPTConfig(
        **{**dict(vocab_size=tok.vocab_size, d_model=16, n_layers=1, n_heads=2, max_len=16), **more}
    )
    return MiniGPT(cfg, seed=seed).eval()


@pytest.fixture(scope='module')
def many():
    return [(make(), tok) for make in (tales, play) for tok in (letters_of, pairs_of)]


# ---- per what


@torch.no_grad()
def slow_score(model, tok, corpus, split='val'):
    """By the definition, one token at a time: nats and tokens in all; nats of end marks; bits per
    byte of the documents"""
    docs = [*corpus.documents(split)]
    mark = document_end_ids(corpus, tok)
    T = model.cfg.max_len
    total = 0.0
    n = 0
    ends = 0.0
    bare = 0.0
    size = 0
    if corpus.independent:
        texts = [(mark[-1:], tok.encode(d), mark) for d in docs]
    else:
        ids = [i for k, d in enumerate(docs) for i in [*(mark if k else []), *tok.encode(d)]]
        texts = [(ids[:1], ids[1:], [])]
    for before, ids, end in texts:
        whole = [*before, *ids, *end]
        for t in range(1, len(whole)):
            start = (t - 1) // T * T
            nats = -model(torch.tensor([whole[start:t]])).log_softmax(-1)[0, -1, whole[t]].item()
            total += nats
            n += 1
            if t > len(ids):
                ends += nats
            else:
                bare += nats
        size += len(tok.decode(ids).encode())
    return total, n, ends, bare / math.log(2) / size


def test_a_score_is_what_its_definition_says(many):
    for corpus, make in many:
        tok = make(corpus)
        model = model_for(tok)
        docs = corpus.documents('val')[:8]
        few = replace(
            corpus,
            splits={**corpus.splits, 'val': docs if corpus.independent else '\n\n'.join(docs)},
        )
        total, n, ends, per_byte = slow_score(model, tok, few)
        score = evaluate(model, tok, few)
        assert (score.nats, score.tokens, score.end_nats, score.bits_per_byte) == pytest.approx(
            (total, n, ends, per_byte), rel=1e-5
        )
        assert (
            score.n_ends == (8 if corpus.independent else 0)
            and (score.end_bits is None) != corpus.independent
        )


def test_bytes_are_those_of_the_documents_whatever_the_tokenizer(many):
    for corpus, make in many:
        tok = make(corpus)
        score = evaluate(model_for(tok), tok, corpus)
        docs = [len(d.encode()) for d in corpus.documents('val')]
        first = (
            0
            if corpus.independent
            else len(tok.decode(tok.encode(corpus.text('val'))[:1]).encode())
        )
        assert score.bytes == (
            sum(docs) if corpus.independent else len(corpus.text('val').encode()) - first
        )


def test_a_model_that_knows_nothing_pays_the_same_for_a_byte_whatever_the_end_mark(many):
    """A uniform guess: bits per byte are tokens of the documents × log₂ V / bytes; the marks stand
    beside it"""
    corpus = tales()
    for sep in ('\n\n', f'\n{END_OF_TEXT}\n', '\n'):
        for make in (letters_of, pairs_of):
            c = replace(corpus, separator=sep)
            tok = make(c)
            model = model_for(tok)
            for p in model.parameters():
                p.data.zero_()
            n = sum(len(tok.encode(d)) for d in c.documents('val'))
            each = len(document_end_ids(c, tok))
            score = evaluate(model, tok, c)
            bits = math.log2(tok.vocab_size)
            assert score.bits_per_byte == pytest.approx(n * bits / score.bytes, rel=1e-5)
            assert score.end_bits == pytest.approx(each * bits, rel=1e-5)


def test_a_verdict_names_the_unit_of_its_number(many):
    for corpus, make in many:
        tok = make(corpus)
        score = evaluate(model_for(tok), tok, corpus)
        said = describe_score(score)
        loss, unit, bits = re.match(
            r'validation loss ([\d.]+) nats per (token|character) = ([\d.]+) bits', said
        ).groups()
        assert (
            unit == ('character' if tok.kind == 'chars' else 'token')
            and f'every {unit} scored once' in said
        )
        assert float(loss) == pytest.approx(score.nats / score.tokens, abs=6e-4)
        assert float(bits) == pytest.approx(score.nats / math.log(2) / score.chars, abs=6e-4)
        assert ('bits per character' in said) == (unit == 'token')


def test_what_is_kept_tells_its_units():
    said = Score(10.0, 9, 9, 9, 1.0).as_dict()
    assert said['units'] == UNITS and {*UNITS} < {*said} and json.loads(json.dumps(said)) == said


@pytest.mark.parametrize('text', ['Das Haus.', 'der die'])
def test_one_document_has_no_interval_and_says_so(tmp_path, text):
    corpus = play()
    tok = CharTokenizer.train(text + '\n')
    (tmp_path / 'one.txt').write_text(text)
    score = evaluate_file(model_for(tok), tok, tmp_path / 'one.txt')
    assert (score.interval, score.interval_per_byte, score.as_dict()['interval']) == (
        None,
        None,
        None,
    )
    assert (
        'no 95 % interval' in describe_score(score)
        and 'inf' not in describe_score(score)
        and 'nan' not in describe_score(score)
    )
    two = evaluate(
        model_for(tok), tok, replace(corpus, splits=dict(val=[text, text]), independent=True)
    )
    assert (
        two.interval is not None
        and '95 % interval' in describe_score(two)
        and 'no 95' not in describe_score(two)
    )


# ---- who is best


def kept(folder, score, hashes='a', **more):
    folder.mkdir(parents=True)
    (folder / 'metrics.jsonl').write_text(
        json.dumps(dict(step=1, tokens=10.0, loss=1.0, val=1.0, val_bits_per_byte=9.0)) + '\n'
    )
    (folder / 'run.json').write_text(json.dumps(dict(hashes=dict(tokenizer=hashes))))
    (folder / 'result.json').write_text(
        json.dumps(dict(steps=1, scores=dict(val=score.as_dict()), **more))
    )
    return folder


def test_the_price_of_end_marks_does_not_choose_the_winner(tmp_path):
    """Two models with equal bits for the documents' bytes, but for a little; the worse one ends its
    documents for nothing"""
    ln2 = math.log(2)
    good = Score(
        1000 * ln2 + 300 * ln2, 600, 1100, 1000, 1.0, n_ends=100, end_nats=300 * ln2, bare_error=1.0
    )
    poor = Score(
        1100 * ln2 + 1 * ln2, 900, 2300, 1000, 1.0, n_ends=100, end_nats=1 * ln2, bare_error=1.0
    )
    table = compare([kept(tmp_path / 'good', good, 'a'), kept(tmp_path / 'poor', poor, 'b')])
    assert table.lines[0]['name'] == 'good' and table.remarks[0].startswith(
        'good is lowest: 1.000 bits per byte'
    )
    assert any('the tokenizers differ' in r for r in table.remarks)
    same = compare([kept(tmp_path / 'one', good, 'a'), kept(tmp_path / 'two', poor, 'a')])
    assert not any('the tokenizers differ' in r for r in same.remarks)  # their hash is one


def test_intervals_that_decide_are_in_the_unit_that_decides(tmp_path):
    "Per character the intervals lie apart; per byte of the documents they overlap"
    ln2 = math.log(2)
    one = Score(1000 * ln2, 600, 1100, 1000, 5.0, n_ends=100, end_nats=1 * ln2, bare_error=100.0)
    two = Score(1400 * ln2, 600, 1100, 1000, 5.0, n_ends=100, end_nats=300 * ln2, bare_error=100.0)
    assert one.interval[1] < two.interval[0]
    assert (
        'are not told apart'
        in compare([kept(tmp_path / 'one', one), kept(tmp_path / 'two', two)]).remarks[0]
    )


def test_older_results_are_told(tmp_path):
    old = kept(tmp_path / 'old', Score(10.0, 9, 9, 9, 1.0))
    said = json.loads((old / 'result.json').read_text())
    del said['scores']['val']['n_ends']
    (old / 'result.json').write_text(json.dumps(said))
    assert any('older results' in r for r in compare([old]).remarks)
    for broken in ('{"scores": 5}', '{"scores": {"val": [1]}}'):
        (old / 'result.json').write_text(broken)
        assert compare([old]).lines[0]['loss'] == 1.0  # what was noted on the way is left
    (old / 'result.json').write_text('[' * 100_000)
    with pytest.raises(LabError, match='result.json is no JSON object'):
        compare([old])


# ---- one mark between paragraphs


def gpt2_like():
    "Two line ends are one token, as 628 of GPT-2; between words its pattern keeps them apart"
    return BPETokenizer(
        {n: bytes([n]) for n in range(256)} | {256: b'\n\n', 257: b'er'},
        [(b'\n', b'\n'), (b'e', b'r')],
    )


def test_training_and_verdict_read_the_same_ids(many, tmp_path):
    texts = [(play(), gpt2_like()), *((corpus, make(corpus)) for corpus, make in many)]
    for k, (corpus, tok) in enumerate(texts):
        packed = PackedTokens(
            pack(corpus, tok, tmp_path / str(k), processes=1).folder, 'val'
        ).ids.tolist()
        ids, _ = read_split(corpus, tok, 'val')
        mark = document_end_ids(corpus, tok)
        if corpus.independent:
            assert ids.tolist() == [*mark, *packed]
        else:
            assert [*ids.tolist(), *mark] == packed and ids.tolist() == tok.encode(
                corpus.text('val')
            )
    assert gpt2_like().encode('\n\n') == [256] and document_end_ids(play(), gpt2_like()) == [10, 10]


def test_a_folder_that_was_packed_with_another_mark_is_not_used(tmp_path, monkeypatch):
    corpus = play()
    with monkeypatch.context() as m:
        m.setattr('llm_lab.packing.document_end_ids', lambda corpus, tok: tok.encode('x'))
        pack(corpus, 300, tmp_path / 'p', processes=1)
    with pytest.raises(LabError, match='the end mark in .* pack it again'):
        pack(corpus, 300, tmp_path / 'p', processes=1)


# ---- a validation that fits


def test_the_loss_does_not_depend_on_how_many_windows_go_together(many):
    for corpus, make in many:
        tok = make(corpus)
        model = model_for(tok)
        want = evaluate(model, tok, corpus)
        for size in some((1, 2, 7, 64, 1000)):
            got = evaluate(model, tok, corpus, batch_size=size)
            assert got.nats == pytest.approx(want.nats, rel=1e-6) and replace(
                got, nats=0, end_nats=0, error=0, bare_error=0
            ) == replace(want, nats=0, end_nats=0, error=0, bare_error=0)
        ids, starts = read_split(corpus, tok, 'val')
        assert mean_loss(model, ids, batch_size=3, starts=starts) == pytest.approx(
            want.loss, rel=1e-6
        )


def test_a_large_vocabulary_is_asked_window_by_window(monkeypatch):
    """GPT-2's: no table of logits has more than 300 MB, and a small model still takes 64 windows at
    once"""
    sizes, real = [], F.cross_entropy

    def noted(logits, *args, **kw):
        sizes.append(logits.numel() * 4)
        return real(logits, *args, **kw)

    monkeypatch.setattr('llm_lab.train.F.cross_entropy', noted)
    large = model_for(pairs_of(tales()), vocab_size=50_257, d_model=8, max_len=1024)
    ids = torch.randint(50_257, (2 * 1024 + 1,), generator=torch.Generator().manual_seed(0))
    mean_loss(large, ids)
    assert len(sizes) == 2 and max(sizes) < 3e8
    small = tiny_model(max_len=8)
    sizes.clear()
    mean_loss(small, torch.randint(9, (64 * 8 + 1,)))
    assert len(sizes) == 1


def test_less_memory_means_fewer_windows_and_none_is_a_line(monkeypatch):
    model, seen = model_for(pairs_of(tales()), max_len=256), []
    for left in (math.inf, 1e9, 1e7, 3e6, 1e6):
        monkeypatch.setattr('llm_lab.train.memory_left', lambda: left)
        monkeypatch.setattr('llm_lab.hardware.memory_left', lambda: left)
        seen.append(windows_at_once(model, 256))
    assert (
        seen[0] == 64 and seen[-1] == 1 and seen == sorted(seen, reverse=True) and len({*seen}) > 2
    )
    monkeypatch.setattr('llm_lab.hardware.memory_left', lambda: 1000.0)
    with pytest.raises(LabError, match=r'a window of 256 tokens, \d+ numbers for each, needs'):
        windows_at_once(model, 256)
    chosen = token_losses(model, torch.randint(250, (9,)), torch.tensor([[0, 1, 9]]), batch_size=2)
    assert chosen[1:].isfinite().all()  # who chooses is obeyed


# ---- which model, which text

SMALL = (
    'data.length=16',
    'model.d_model=16',
    'model.n_layers=1',
    'model.n_heads=2',
    'train.batch_size=4',
    'train.steps=20',
    'train.lr=0.001',
    'eval.every=10',
    'eval.tokens=400',
    'eval.sample_tokens=3',
    'log.checkpoint_every=10',
    'train.threads=1',
)


@pytest.fixture(scope='module')
def trained_home(tmp_path_factory):
    "A home with the run of a BPE model, of documents that stand alone"
    home = tmp_path_factory.mktemp('home')
    (home / 'de.txt').write_text(f'\n{END_OF_TEXT}\n'.join(stories(600)), encoding='utf-8')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('LLM_LAB_HOME', str(home))
        m.setattr('llm_lab.runs.peak_flops', lambda *a: 1.0)
        with redirect_stdout(io.StringIO()):
            job = train_run(
                'smoke',
                f'data.corpus={home / "de.txt"}',
                'data.tokenizer=bpe',
                'data.vocab_size=300',
                *SMALL,
                'train.min_lr=0.0005',
                run='a',
            )
    return home, job


@pytest.fixture
def at_home(trained_home, monkeypatch):
    monkeypatch.setenv('LLM_LAB_HOME', str(trained_home[0]))
    return trained_home


def rows_of(job):
    return json_lines(job.folder / 'metrics.jsonl')


def test_a_run_notes_bits_per_byte_by_the_definition(at_home):
    "What is noted on the way is in the unit of result.json: bits of the documents' bytes"
    _, job = at_home
    ids, tok = job.ids, job.texts['tokenizer']
    ends = (ids == tok.eos_id).nonzero()[:, 0]
    places = [*ends[ends < len(ids) - 1].tolist(), len(ids) - 1]
    windows = [
        [k, k + 1, min(k + 17, b + 1)]
        for a, b in itertools.pairwise(places)
        for k in range(a, b, 16)
    ]
    losses = token_losses(job.run.model, ids, torch.tensor(windows)).double()
    asked = ~losses.isnan() & (ids != tok.eos_id)
    docs = tok.decode(ids[asked].tolist())
    last = rows_of(job)[-1]
    assert last['val'] == pytest.approx(losses[~losses.isnan()].mean().item(), rel=1e-6)
    assert last['val_bits_per_byte'] == pytest.approx(
        losses[asked].sum().item() / math.log(2) / len(docs.encode()), rel=1e-6
    )
    assert last['lr'] == pytest.approx(0.0005, rel=0.02)  # min_lr


def test_eval_prints_what_result_json_keeps(at_home):
    home, job = at_home
    kept = json.loads((job.folder / 'result.json').read_text())
    score = kept['scores']['val']
    assert kept['judged'] == 'the last model' and kept['best_step'] in (10, 20)
    code, out, err = typed('eval', job.folder / 'checkpoints' / 'step-000020')
    assert code == 0 and err == ''
    assert (
        f'val loss {score["loss"]:.3f} nats per token = {score["bits"]:.3f} bits per character'
        in out
    )
    assert 'every token scored once' in out
    assert (
        f'perplexity {score["perplexity"]:.3f} per token, {score["bits_per_byte"]:.3f} bits '
        'per byte of the documents'
    ) in out
    assert f'{score["end_bits"]:.3f} bits for each end mark' in out
    assert (
        typed('eval', job.folder / 'checkpoints' / 'step-000020', '--batch-size', 3)[
            1
        ].splitlines()[-2:]
        == out.splitlines()[-2:]
    )


def test_best_and_last_are_told_where_they_differ(at_home):
    home, job = at_home
    best = job.folder / 'best'
    was = best.read_text()
    try:
        best.write_text('step-000010\n')
        code, out, err = typed('eval', job.folder)
        assert (
            code == 0
            and ('step 10: the best; the last is step 20, which result.json judges\n') in out
        )
        at_ten = typed('eval', job.folder / 'checkpoints' / 'step-000010')[1]
        assert out.splitlines()[-2:] == at_ten.splitlines()[-2:]
        code, out, err = typed('sample', job.folder, '--tokens', 3)
        assert code == 0 and err.endswith(
            f'/{job.folder.name}, step 10: the best; the last is step 20\n'
        )
        (job.folder / 'result.json').rename(job.folder / 'aside')
        with redirect_stdout(io.StringIO()) as said:
            job.finish()
        kept = json.loads((job.folder / 'result.json').read_text())
        assert (kept['steps'], kept['best_step'], kept['judged']) == (20, 10, 'the last model')
        assert 'take the best, of step 10' in said.getvalue()
        best.write_text('step-000020\n')
        which = f'{job.folder.parent.parent.name}/{job.folder.name}, step 20\n'
        assert typed('sample', job.folder, '--tokens', 3)[2] == which
        assert which in typed('eval', job.folder)[1]
    finally:
        best.write_text(was)
        if (job.folder / 'aside').exists():
            (job.folder / 'aside').replace(job.folder / 'result.json')


def test_eval_says_when_the_text_has_changed(at_home):
    home, job = at_home
    text = home / 'de.txt'
    was = text.read_bytes()
    try:
        text.write_bytes(was.replace(b'Haus', b'Maus'))
        code, out, err = typed('eval', job.folder)
        assert (
            code == 1
            and err.count('\n') == 1
            and 'de.txt' in err
            and 'is not the text that this model was trained on' in err
        )
        code, out, err = typed('eval', job.folder, '--corpus', text)
        assert (
            code == 0 and 'nats per token' in out and 'has changed' in err and err.count('\n') == 1
        )
    finally:
        text.write_bytes(was)
    assert typed('eval', job.folder, '--corpus', text)[::2] == (0, '')


def test_a_prompt_that_cannot_be_read_ends_before_step_1(at_home, monkeypatch):
    home, _ = at_home
    monkeypatch.setattr('llm_lab.runs.fit', lambda *a, **kw: pytest.fail('it was not found out'))
    for prompt in ('漢', 'ROMEO: 漢', '[漢]'):
        code, _, err = typed(
            'train', 'smoke', f'data.corpus={home / "de.txt"}', *SMALL, f'eval.prompt={prompt}'
        )
        assert (
            code == 1
            and err.count('\n') == 1
            and err.startswith(f'llm-lab: eval.prompt={prompt!r}: ')
        ), err


def test_work_goes_on_when_nobody_reads(at_home, monkeypatch):
    "A packing is worth more than its words"
    home, _ = at_home
    (home / 'other.txt').write_text('\n\n'.join(stories(90, 7)), encoding='utf-8')
    with monkeypatch.context() as m:
        m.setattr(sys, 'stdout', gone())
        assert cli.main(['prepare', str(home / 'other.txt'), '--vocab-size', '300']) == 0
    assert [*(home / 'data' / 'packed').glob('other*/meta.json')]


def test_sample_ends_with_its_reader(at_home, monkeypatch):
    _, job = at_home
    with monkeypatch.context() as m, gone() as out:
        m.setattr(sys, 'stdout', out)
        assert cli.main(['sample', str(job.folder), '--tokens', '5']) == 1
        out.flush()


def test_a_key_of_a_config_may_be_left_out_of_an_older_file(tmp_path):
    "A file of before has no min_lr and no at_once"
    cfg = config_from_dict(dict(train=dict(warmup=100)))
    assert (cfg.train.warmup, cfg.train.min_lr, cfg.eval.at_once) == (100, 0.0, None)


def test_a_text_of_one_paragraph_needs_no_line_end():
    corpus = Corpus('line', dict(train='to be or not to be', val='to be or not'))
    tok = CharTokenizer.train(corpus.text('train'))
    score = evaluate(model_for(tok), tok, corpus)
    assert (score.tokens, score.chars, score.bytes, score.n_ends) == (11, 11, 11, 0)
