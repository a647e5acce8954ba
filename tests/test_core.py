"Odd cases of the lab bench: names, recipes, answers and pictures."

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from llm_lab.core import LabError, address, check, check_recipe, lookup, pyplot, show


def test_a_whole_address_stands_for_itself():
    assert address('llm_lab.moe:MoE', 'mlp') == 'llm_lab.moe:MoE'


def test_a_name_of_format_1_is_refused_with_the_way_to_convert_it():
    first_edition = 'llm_lab.gpt:Attention'  # format 1 named the module, too
    with pytest.raises(LabError, match='python tools/migrate.py'):
        address(first_edition, 'mixer')


@pytest.mark.parametrize(
    ('name', 'slot'), [('llm_lab.core:require', 'act'), ('torch.nn:Embedding', 'act')]
)
def test_what_the_table_does_not_list_for_a_slot_cannot_be_named(name, slot):
    with pytest.raises(LabError, match=f"'{name}' names no part that can be {slot}: "):
        lookup(name, slot)


@pytest.mark.parametrize(
    ('said', 'more'),
    [
        ("mlp.act='MLP' names no part that can be act", dict(act=dict(part='MLP'))),
        ('mlp.bias=', dict(bias=dict(part='ReLU2'))),  # a keyword that holds no recipe
    ],
)
def test_a_recipe_stands_only_where_its_slot_allows_it(said, more):
    with pytest.raises(LabError, match=said):
        check_recipe(dict(part='MLP', **more), 'mlp', 'mlp')


def double(x):
    return x + x


def test_an_answer_that_raises_is_told_with_its_case():
    assert check(double, double, (None,)).startswith('double: TypeError on (None,)')


def test_an_answer_that_sorts_its_case_deceives_nobody():
    def spoil(x):
        x.sort()
        return x

    assert 'expected' in check(spoil, lambda x: x, ([2, 1],))


def test_a_wrong_shape_is_a_wrong_answer():
    told = check(lambda x: x[:1], double, (torch.ones(2),))
    assert told.endswith('expected the shape (2,), got (1,)')


def late_slip(x):
    "Right but for one entry far from the first row"
    out = x + x
    out[7, 3] += 0.5
    return out


def test_of_two_tensors_the_entry_that_is_furthest_off_is_told():
    told = check(late_slip, double, (torch.ones(9, 9),))
    assert told.endswith('expected 2 at [7, 3], got 2.5, the largest gap')


@pytest.mark.parametrize(
    ('wrong', 'said'),
    [
        (lambda x: x + float('nan'), 'expected 2 at [0], got nan'),
        (lambda x: x.isnan(), 'expected 2 at [0], got 0'),  # truth values
        (lambda x: (x + x).sum(), 'expected the shape (2,), got ()'),
        (lambda x: [2.0, 3.0], 'got [2.0, 3.0]'),
        (lambda x: None, 'got None'),
        (lambda x: 'ab', "got 'ab'"),
    ],
)
def test_no_odd_answer_makes_check_raise(wrong, said):
    assert said in check(wrong, double, (torch.ones(2),))


def test_two_numbers_in_tensors_are_told():
    told = check(lambda x: x.sum(), lambda x: (x + x).sum(), (torch.ones(2),))
    assert told.endswith('expected 4, got 2')


def test_a_figure_becomes_a_png_with_its_title_as_words():
    pytest.importorskip('IPython.display')
    plt = pyplot()
    fig, ax = plt.subplots()
    ax.set(title='what it shows')
    number = fig.number
    image = show(fig)
    assert image.alt == 'what it shows' and image.data[1:4] == b'PNG'
    assert not plt.fignum_exists(number)  # a figure of another test may be open beside it


def test_what_is_missing_names_the_extra_that_has_it(monkeypatch):
    "The table of extras is that of settings.ini, but for what comes along with these"
    from configparser import ConfigParser

    from llm_lab import core

    config = ConfigParser(delimiters=['='])
    config.read(Path(core.__file__).resolve().parent.parent / 'settings.ini', encoding='utf-8')
    along = {'jupyterlab': 'IPython traitlets', 'omegaconf': 'yaml', 'accelerate': 'psutil'}
    along |= {'datasets': 'huggingface_hub'}
    module_of = {'python-dotenv': 'dotenv'}
    for extra, modules in core._EXTRAS.items():
        packages = [
            re.split('[<>=]', o)[0] for o in shlex.split(config['DEFAULT'][f'{extra}_requirements'])
        ]
        want = {module_of.get(o, o) for o in packages} - {'jupyterlab'}
        for package in packages:
            want |= {*along.get(package, '').split()}
        assert {*modules.split()} == want, extra
    with pytest.raises(LabError, match=r"pip install missing$"):
        core.require('missing')
    assert core._remedy('pyyaml', 'yaml.events').startswith('pip install pyyaml, or ')
    # of what comes with an extra, the error itself names it
    monkeypatch.setitem(sys.modules, 'omegaconf', None)
    with pytest.raises(LabError, match=r"pip install omegaconf, or this book's extra \[train\]"):
        core.require('omegaconf')
    assert '[train]' in core._remedy('omegaconf', 'omegaconf.errors')
