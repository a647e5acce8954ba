"One way to name a thing on disk: packages, runs, checkpoints and folders of Hugging Face."

import json
import warnings

import pytest
import torch
from helpers import one_line, printed, tiny_model

import llm_lab as lab
from llm_lab.core import REGISTERED, SLOTS, address, lookup

pytestmark = pytest.mark.usefixtures('one_thread')
TOK = lab.CharTokenizer('ab\n')


def same(a, b):
    "Have two models the same weights?"
    there, here = a.state_dict(), b.state_dict()
    return there.keys() == here.keys() and all(torch.equal(there[k], here[k]) for k in here)


def test_a_bare_name_is_a_package_in_artifacts_from_here_then_from_home(
    home, monkeypatch, tmp_path_factory
):
    mine, other = tiny_model(), tiny_model()
    lab.save('artifacts/mine', mine, TOK)
    elsewhere = tmp_path_factory.mktemp('elsewhere')
    monkeypatch.chdir(elsewhere)
    assert same(lab.load('mine').model, mine)
    lab.save('artifacts/mine', other, TOK)  # here, and no longer at home
    assert same(lab.load('mine').model, other)
    lab.save('mine', mine, TOK)  # a path is meant before any name
    assert same(lab.load('mine').model, mine)
    one_line(lambda: lab.load('min'), 'no model at min')


def test_a_name_that_is_a_package_and_a_run_is_refused(home):
    lab.save('artifacts/mine', tiny_model(), TOK)
    run = home / 'experiments' / 'mine' / 'runs' / 'one'
    lab.save(run / 'checkpoints' / 'step-000001', tiny_model(), TOK)
    for name, text in (('run.json', '{}'), ('latest', 'step-000001\n')):
        (run / name).write_text(text)
    said = one_line(lambda: lab.load('mine'), 'mine is the name of 2 models: write mine/one or ')
    assert said.endswith('artifacts/mine')
    lab.load('mine/one')
    lab.load('artifacts/mine')


def test_load_opens_a_folder_of_hugging_face(home):
    model = tiny_model()
    lab.to_hf('artifacts/theirs', model, TOK)
    for name in ('artifacts/theirs', 'theirs', home / 'artifacts' / 'theirs'):
        opened = lab.load(name)
        assert same(opened.model, model) and opened.tokenizer.chars == TOK.chars
    lab.to_hf('bare', model)
    one_line(lambda: lab.load('bare'), 'no tokenizer', "from_hf('bare') opens the model alone")
    assert same(lab.from_hf('bare').model, model)


def test_what_is_opened_can_be_written_by_to_hf(home):
    model = tiny_model()
    lab.save('artifacts/mine', model, TOK, about=dict(licence='mine alone'))
    lab.to_hf('theirs', *lab.load('mine'))
    assert same(lab.from_hf('theirs').model, model)
    assert 'licence: mine alone' in (home / 'theirs' / 'README.md').read_text(encoding='utf-8')
    lab.to_hf('theirs', *lab.load('theirs'))  # what we have written is replaced
    lab.to_hf('again', model, TOK, family='gpt2')
    one_line(lambda: lab.to_hf('no', model, TOK, 'gpt2'), "about='gpt2' is no dict", 'family=')
    assert not (home / 'again' / 'README.md').exists()


def test_a_reader_of_folders_is_no_part_of_a_model():
    assert lookup('from_hf', 'format') is lab.from_hf and len(SLOTS['format']) == 1
    one_line(lambda: address('from_hf'), 'names no part', longest=999)
    one_line(lambda: lookup('llm_lab.hub:from_hf'), 'names no part', longest=999)
    one_line(lambda: lookup('to_hf', 'format'), 'names no part that can be format')


# ---- parts of the reader's own


MINE = '''
import llm_lab as lab

class Scaled(lab.MLP):
    def forward(self, x, **ctx):
        return FACTOR * super().forward(x, **ctx)

lab.register(Scaled)
'''


@pytest.fixture
def own(home):
    "A package with a part of mine.py; afterwards the part is forgotten"
    (home / 'mine.py').write_text(MINE.replace('FACTOR', '2'))
    lab.load_parts('mine.py')
    model = tiny_model(mlp=lab.part(REGISTERED['Scaled']))
    lab.save('artifacts/scaled', model, TOK)
    del REGISTERED['Scaled']
    yield model
    REGISTERED.pop('Scaled', None)


def test_a_package_names_the_file_of_its_parts_and_load_takes_it(home, own):
    one_line(lambda: lab.load('scaled'), 'Scaled', "give --parts mine.py, or load(path, parts=file")
    card = (home / 'artifacts' / 'scaled' / 'README.md').read_text(encoding='utf-8')
    assert 'It needs `Scaled` of `mine.py` (SHA-256 ' in card
    assert "load('.', parts='mine.py')" in card and '- parts:' not in card
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert same(lab.load('scaled', parts='mine.py').model, own)


def test_a_file_of_parts_that_was_changed_is_told_in_one_line(home, own):
    good = printed('sample', 'scaled', '--parts', 'mine.py', '--tokens', '3')
    assert good[1] == ''
    (home / 'mine.py').write_text(MINE.replace('FACTOR', '3'))
    with pytest.warns(UserWarning, match='is not the .mine.py. that this model was made with'):
        lab.load('scaled', parts=['mine.py'])
    (home / 'text.txt').write_text('abab\n' * 9)
    for command in (
        ['sample', 'scaled', '--tokens', '3'],
        ['eval', 'scaled', '--text', 'text.txt'],
    ):
        said = printed(*command, '--parts', 'mine.py')[1].splitlines()
        assert sum('that this model was made with' in line for line in said) == 1, said


def test_a_part_without_a_file_is_named_on_the_card(home):
    class Halved(lab.MLP):
        pass

    lab.register(Halved)
    try:
        lab.save('x', tiny_model(mlp=lab.part(Halved)), TOK)
    finally:
        del REGISTERED['Halved']
    assert 'register `Halved` before it is opened' in (home / 'x' / 'README.md').read_text()
    assert 'parts' not in json.loads((home / 'x' / 'package.json').read_text())['about']


# ---- eval and runs


def test_a_package_without_a_corpus_says_what_to_type(home):
    lab.save('artifacts/mine', tiny_model(vocab_size=TOK.vocab_size), TOK)
    (home / 'a.txt').write_text('abab\n' * 99)
    said = printed('eval', 'artifacts/mine', code=1)[1]
    assert 'eval artifacts/mine --corpus NAME`' in said
    words = said.partition('`')[2].partition('`')[0].split()
    typed = [w.replace('NAME', 'a.txt') for w in words[words.index('eval') :]]
    score = printed(*typed)[0].splitlines()[-2:]
    corpus = lab.load_corpus('a.txt')
    about = dict(data='a.txt', corpus=corpus.name, corpus_sha256=corpus.sha256)
    lab.save('artifacts/mine', lab.load('mine').model, TOK, about)
    assert printed('eval', 'mine')[0].splitlines()[-2:] == score


def test_runs_that_differ_in_nothing_or_in_their_seed_are_told_in_one_line(home):
    (home / 'a.txt').write_text('abab\nbaba\n' * 99)
    config = dict(
        data=dict(corpus='a.txt', length=8),
        model=dict(d_model=8, n_layers=1, n_heads=1),
        train=dict(steps=2, batch_size=2, threads=1),
        eval=dict(every=2, tokens=40, sample_every=9),
    )
    for name, *more in (('one',), ('two',), ('three', 'seed=3'), ('four', 'seed=4', 'lr=0.02')):
        lab.train_run(config, *more, run=name)

    def told(*names):
        return printed('runs', *names)[0].rpartition('\n\n')[2].strip().splitlines()

    alone = printed('runs', 'one')[0]
    assert 'differ' not in alone and 'same' not in alone
    assert told('one', 'two') == ['their configs are the same; text and parts are the same, too']
    assert told('one', 'three') == [
        'they differ in their seed alone:',
        '  train.seed: 0 (one); 3 (three)',
    ]
    assert (
        told('one', 'four')[0] == 'what differs in their configs:' and len(told('one', 'four')) == 3
    )
    (home / 'a.txt').write_text('abab\nbbbb\n' * 99)
    lab.train_run(config, run='five')
    assert told('one', 'five') == ['their configs are the same; the text or the parts are not']
