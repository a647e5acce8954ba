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
