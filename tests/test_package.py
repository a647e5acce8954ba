"""What a package promises and its notebook does not show: the card is true, also that of the first
edition; what no file may ask for; which changed models are refused; which damage is found."""

import hashlib
import json
import re
import subprocess
import sys

import pytest
from answers import package as answers
from cases import HANG
from helpers import code_cell, exercise_tests
from safetensors.torch import save as tensor_bytes
from torch import nn

from llm_lab.chars import CharTokenizer
from llm_lab.core import LabError, check
from llm_lab.gpt import MLP, Block, GPTConfig, MiniGPT
from llm_lab.package import (
    check_parts,
    config_from,
    load,
    load_weights,
    parse_json,
    require_faithful,
    resolve,
    save,
    to_data,
    write_manifest,
)
from llm_lab.parts import _saved_name, part

TOK = CharTokenizer.train('abc')


def model(width=8):
    sizes = dict(vocab_size=TOK.vocab_size, n_layers=1, n_heads=1, max_len=8)
    return MiniGPT(GPTConfig(d_model=width, **sizes))


def code_of(folder):
    "The lines of Python on a package's card"
    text = (folder / 'README.md').read_text(encoding='utf-8')
    return re.search(r'```python\n(.*?)```', text, re.S)[1]


def test_the_lines_on_a_card_open_the_model(tmp_path):
    folder = save(tmp_path / 'm', model(), TOK, dict(corpus='abc'))
    code = code_of(folder) + 'print(model.n_params, tokenizer.vocab_size, about["corpus"])'
    out = subprocess.run(
        [sys.executable, '-c', code], cwd=folder, capture_output=True, text=True, timeout=HANG
    )
    assert out.stdout == f'{model().n_params} {TOK.vocab_size} abc\n', out.stderr


def first_edition(folder):
    "Make a package what the first edition wrote: another card, which its list does not hold"
    said = json.loads((folder / 'package.json').read_text())
    card = folder / 'README.md'
    text = card.read_text(encoding='utf-8').replace('GPTConfig(', 'Config(')
    text = text.replace('import load\n', 'import open_model\n').replace('= load(', '= open_model(')
    card.write_text(text, encoding='utf-8')
    files = [f for f in said['files'] if f != 'README.md']
    write_manifest(folder, 'package.json', files, about=said['about'], torch=said['torch'])
    return folder


def test_a_card_of_the_first_edition_is_ours_until_somebody_changes_it(tmp_path):
    folder = first_edition(save(tmp_path / 'm', model(), TOK))
    save(folder, model(16), TOK)  # replaced: nobody has changed anything
    assert 'import load\n' in code_of(folder)
    changed = first_edition(save(tmp_path / 'n', model(), TOK))
    with open(changed / 'README.md', 'a', encoding='utf-8') as f:
        f.write('mine\n')
    with pytest.raises(LabError, match=r'holds README\.md'):
        save(changed, model(16), TOK)


def refuses(f, words):
    with pytest.raises(LabError, match=re.escape(words)):
        f()


def slip(i, j):
    return j <= i + 1


def test_only_parts_with_a_name_are_saved():
    assert _saved_name(nn.GELU, 'act') == 'GELU'
    refuses(
        lambda: _saved_name(nn.Embedding, 'act'),
        'Embedding of torch.nn has no name to save as act: call register(Embedding)',
    )
    refuses(lambda: to_data(part(slip)), 'call register(slip) first')
    refuses(lambda: to_data(part(MLP, d_ff={1: 2})), 'cannot be saved in a configuration')


@pytest.mark.parametrize('name', ['os:system', 'torch.nn:Linear', 'llm_lab.core:require', 'Router'])
def test_a_file_names_no_part_outside_its_slot(name):
    data = dict(mlp=dict(part=name))
    refuses(lambda: config_from(data), f'mlp={name!r} names no part that can be mlp')


def test_a_file_asks_for_nothing_unknown_misplaced_or_huge():
    refuses(
        lambda: config_from(dict(n_head=4)),
        "a model has no setting 'n_head': did you mean 'n_heads'?",
    )
    within = dict(part='SwiGLU', act=dict(part='SwiGLU'))
    refuses(lambda: config_from(dict(mlp=within)), "mlp.act='SwiGLU' names no part that can be act")
    refuses(lambda: config_from(dict(d_model=10**9)), 'd_model=1000000000: give 1,048,576 at most')


class Above(nn.Module):
    "Doubles the positions whose first dimension is above zero: how many, only the values decide"

    def __init__(self, cfg, layer=0):
        super().__init__()

    def forward(self, x, **ctx):
        y = x.clone()
        y[x[..., 0] > 0] *= 2
        return y


class WithoutPositions(nn.Module):
    "A mixer that takes no positions"

    def __init__(self, cfg, layer=0):
        super().__init__()

    def forward(self, x):
        return x


def test_parts_are_tried_with_values_where_shapes_are_not_enough():
    for good in (GPTConfig(mlp=part(Above)), GPTConfig(pos=None, tie=True)):
        assert check_parts(good) == good
    refuses(
        lambda: check_parts(GPTConfig(attn=part(WithoutPositions))),
        'attn=part(WithoutPositions) cannot read: TypeError',
    )


class Parallel(Block):
    "Both parts read the same norm"

    def forward(self, x, i, **ctx):
        h = self.norm1(x)
        return x + self.attn(h, i, **ctx) + self.mlp(h, **ctx)


CHANGES = {
    'blocks.1 is a Parallel, it should be a Block': lambda m: setattr(
        m.blocks[1], '__class__', Parallel
    ),
    'blocks.0.mlp.act is a ReLU, it should be a GELU': lambda m: setattr(
        m.blocks[0].mlp, 'act', nn.ReLU()
    ),
    'blocks.0.mlp.up is a Sequential': lambda m: setattr(
        m.blocks[0].mlp, 'up', nn.Sequential(m.blocks[0].mlp.up)
    ),
    'blocks.0.forward was replaced': lambda m: setattr(
        m.blocks[0], 'forward', lambda x, i, **ctx: x
    ),
    'blocks.0.mlp has a hook that changes it': lambda m: m.blocks[0].mlp.register_forward_hook(
        lambda m, args, y: 2 * y
    ),
    'blocks.1.mlp is shared with another place': lambda m: setattr(
        m.blocks[1], 'mlp', m.blocks[0].mlp
    ),
    'lm_head.weight is shared with another place': lambda m: setattr(
        m.lm_head, 'weight', m.tok.weight
    ),
    'blocks.1.norm1.eps is 1.0, it should be 1e-05': lambda m: setattr(
        m.blocks[1].norm1, 'eps', 1.0
    ),
    'blocks.1 was taken out': lambda m: setattr(m, 'blocks', m.blocks[:1]),
}


@pytest.mark.parametrize('words', CHANGES)
def test_a_model_that_was_changed_is_refused(words):
    m = require_faithful(MiniGPT(GPTConfig(d_model=16, n_layers=2, n_heads=2)))
    CHANGES[words](m)
    refuses(lambda: require_faithful(m), words)


class Named(MiniGPT):
    "The same model with one method more"

    def shout(self):
        return 'hello'


def test_a_hook_that_only_looks_and_a_method_more_may_stay():
    watched = MiniGPT(GPTConfig(d_model=16, n_layers=1, n_heads=2))
    watched.blocks[0].register_forward_hook(lambda m, args, y: None)
    require_faithful(watched)
    require_faithful(Named())


def test_which_folder_of_a_run_is_meant(tmp_path):
    run = tmp_path / 'run'
    save(run / 'checkpoints' / 'step-2', model(), TOK)
    (run / 'latest').write_text('step-2\n')
    assert resolve(run).name == 'step-2'
    (run / 'best').write_text('step-1\n')
    refuses(lambda: resolve(run), "names 'step-1', and no checkpoint is called so: delete it")
    (run / 'checkpoints' / 'step-1').mkdir(parents=True)
    assert resolve(run).name == 'step-1'  # `best` comes before `latest`
    refuses(lambda: resolve(run / 'best'), 'best is a file: give the folder')
    refuses(lambda: resolve(tmp_path / 'nowhere'), 'no model at')
    refuses(lambda: load(tmp_path / 'nowhere'), 'no model at')


def test_bytes_of_another_kind_and_weights_of_another_model_are_refused():
    assert parse_json(b'{"a": 1}', 'x') == dict(a=1)
    refuses(lambda: parse_json(b'\x80\x04]', 'x.json'), 'x.json is not JSON')
    weights = tensor_bytes(model().state_dict())
    refuses(lambda: load_weights(model(16), weights), 'the weights do not fit the configuration')
    refuses(lambda: load_weights(model(16), tensor_bytes({})), 'there are none')


def rewrite(name, text):
    return lambda folder: (folder / name).write_text(text)


DAMAGE = [
    (
        lambda p: (p / 'model.safetensors').write_bytes(b'x' * 100),
        'model.safetensors is not the file that was saved',
    ),
    (lambda p: (p / 'package.json').unlink(), 'is not a package: it has no package.json'),
    (rewrite('package.json', '{'), 'package.json is not JSON'),
    (rewrite('package.json', '{"format": 99}'), 'has package format 99, this library reads 2'),
    (rewrite('package.json', '[]'), 'package.json is damaged'),
]


@pytest.mark.parametrize('damage, words', DAMAGE)
def test_a_damaged_package_is_refused_in_one_line(damage, words, tmp_path):
    folder = save(tmp_path / 'm', model(), TOK)
    damage(folder)
    refuses(lambda: load(folder), words)


def test_right_hashes_do_not_make_a_huge_model_acceptable(tmp_path):
    folder = save(tmp_path / 'm', model(), TOK)
    config = json.loads((folder / 'llm_lab.json').read_text()) | dict(n_layers=10**9)
    (folder / 'llm_lab.json').write_text(json.dumps(config))
    files = ('llm_lab.json', 'tokenizer.json', 'model.safetensors')
    write_manifest(folder, 'package.json', files, about={})
    refuses(lambda: load(folder), 'n_layers=1000000000: give 1,024 at most')


def test_nothing_is_written_of_a_model_that_was_changed(tmp_path):
    changed = model()
    changed.blocks[0].mlp.act = nn.ReLU()
    refuses(
        lambda: save(tmp_path / 'm', changed, TOK),
        'blocks.0.mlp.act is a ReLU, it should be a GELU',
    )
    assert not (tmp_path / 'm').exists()


def test_a_folder_with_notes_is_not_replaced(tmp_path):
    folder = save(tmp_path / 'm', model(), TOK)
    save(folder, model(16), TOK)  # a package may be replaced
    (folder / 'notes.txt').write_text('seed 3 was the best')
    refuses(lambda: save(folder, model(), TOK), 'holds notes.txt')


# ---- the exercises


@pytest.fixture
def exercises(tmp_path):
    "The chapter's cells, on a toy package of this test"
    tok = CharTokenizer('ab')
    save(tmp_path / 'toy', MiniGPT(GPTConfig(vocab_size=2, d_model=32, n_layers=1)), tok)
    space = dict(hashlib=hashlib, desk=tmp_path, load=load, LabError=LabError)
    for text in ('def suspects(', 'def my_guess('):
        exec(code_cell('24_package', text).rpartition('check(')[0], space)
    return space


(
    test_a_right_answer_is_told_so,
    test_a_wrong_answer_meets_a_counter_example,
    test_an_exercise_that_nobody_has_done_says_so,
) = exercise_tests(
    answers.ANSWERS,
    dict(
        suspects=('suspects_spec', 'cases'),
        my_guess=('measured', None),
    ),
    fixture='exercises',
)
