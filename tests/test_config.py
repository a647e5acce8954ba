"""What a config may say is what there is: the words of optimizers, schedules, the keys of a model.
And the wrong values, keys and files that the notebook leaves out, each refused in one line."""

from dataclasses import MISSING, fields, replace

import pytest
from helpers import one_line

from llm_lab.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    PRESETS,
    RunConfig,
    TrainConfig,
    _checked,
    check_resumable,
    model_data,
    read_config,
    smoke_config,
)
from llm_lab.core import REGISTERED
from llm_lab.efficient import PRECISIONS
from llm_lab.gpt import GPTConfig
from llm_lab.optim import OPTIMIZERS, SCHEDULES

BRIEFLY = ('preset', 'n_kv_heads')  # short for recipes
DECIDED = ('vocab_size', 'max_len')  # by the data


def test_the_words_of_the_keys_are_those_that_exist():
    words = {f.name: f.metadata.get('of') for f in fields(TrainConfig)}
    assert {*words['optimizer']} == {*OPTIMIZERS}
    assert {*words['schedule']} == {*SCHEDULES}
    assert {*words['precision']} == {*PRECISIONS, 'auto'}


def test_the_keys_of_a_model_are_those_of_its_configuration():
    mine = [f.name for f in fields(ModelConfig) if f.name not in BRIEFLY]
    assert mine == [f.name for f in fields(GPTConfig) if f.name not in DECIDED]


def test_sizes_have_the_same_defaults():
    sizes = {
        f.name: f.default
        for f in fields(ModelConfig)
        if f.default not in (None, MISSING) and f.name not in BRIEFLY
    }
    assert sizes == {k: getattr(GPTConfig(), k) for k in sizes}
    assert {'d_model', 'n_layers', 'n_heads', 'dropout', 'tie'} == {*sizes}


FIELDS = {f.name: f for kind in (TrainConfig, ModelConfig, DataConfig) for f in fields(kind)}


@pytest.mark.parametrize(
    'name, value, says',
    [
        ('threads', 'all', 'give a whole number from 1 to 1,024, or auto, or null'),
        ('dropout', 1.0, 'give a number from 0 to 0.99'),
        ('tie', 1, 'give true or false'),
        ('attn', {}, 'give a recipe'),
        ('corpus', 7, 'give a text'),
        ('limit', 0, 'give a whole number of at least 1, or null'),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(name, value, says):
    one_line(lambda: _checked(f'a.{name}', FIELDS[name], value), f'a.{name}={value!r}: {says}')


@pytest.mark.parametrize(
    'recipe, says',
    [
        ({'part': 'MLP', 'act': 'gelu'}, "a.mlp.act='gelu': give a recipe such as"),
        (
            {'part': 'MLP', 'act': {'part': 'llm_lab.core:require', 'module': 'evil'}},
            "a.mlp.act='llm_lab.core:require' names no part that can be act",
        ),
    ],
)
def test_a_recipe_names_only_parts_and_each_where_it_belongs(recipe, says):
    one_line(lambda: _checked('a.mlp', FIELDS['mlp'], recipe), says)


@pytest.mark.parametrize(
    'sections, says',
    [
        (
            dict(model=ModelConfig(n_kv_heads=3)),
            'model.n_kv_heads=3 does not divide model.n_heads=4',
        ),
        (
            dict(model=ModelConfig(n_kv_heads=2, attn=dict(part='Attention'))),
            'leave one of them out',
        ),
        (
            dict(model=ModelConfig(n_kv_heads=2, attn=dict(part='GQA', n_kv_heads=4))),
            'model.attn says 4',
        ),
        (dict(train=TrainConfig(accumulate=3)), 'train.accumulate=3 does not divide'),
        (dict(train=TrainConfig(min_lr=0.02)), 'train.min_lr=0.02: it is above train.lr=0.01'),
        (
            dict(train=TrainConfig(min_lr=0.001, schedule='constant')),
            'train.min_lr=0.001: train.schedule=constant never comes down',
        ),
        (dict(eval=EvalConfig(tokens=9)), 'eval.tokens=9: give more than data.length=128'),
    ],
)
def test_keys_that_do_not_go_together_are_refused(sections, says):
    one_line(lambda: RunConfig('run', **sections), says)


def test_a_preset_completes_the_attention_and_leaves_a_mixer_of_ones_own_alone():
    assert model_data(ModelConfig(n_kv_heads=2))['attn'] == dict(part='GQA', n_kv_heads=2)
    pos = [model_data(ModelConfig(pos=p)).get('pos', 'as the preset') for p in (None, {})]
    assert pos == [None, 'as the preset']
    of_llama = lambda attn: model_data(ModelConfig(preset='llama', attn=attn))['attn']
    turns = [dict(part='Attention'), dict(part='Attention', transforms=None)]
    both = of_llama(dict(part='alternate', of=turns))
    transforms = PRESETS['llama']['attn']['transforms']
    assert [o['transforms'] for o in both['of']] == [transforms, None]
    REGISTERED['Mine'] = lambda cfg, layer=0: None  # as `register` does
    try:
        assert of_llama(dict(part='Mine')) == dict(part='Mine')
    finally:
        del REGISTERED['Mine']
    assert PRESETS['llama']['attn']['part'] == 'Attention'  # nothing shared was changed


def test_a_file_or_an_override_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv('LLM_LAB_HOME', str(tmp_path))
    monkeypatch.setenv('SECRET', 'swordfish')
    (tmp_path / 'bad.yaml').write_text('train: {steps: 3\nlog: 4')
    (tmp_path / 'colon.yaml').write_text('eval:\n  prompt: ROMEO: yes')
    for config, item, says in (
        ('smoke', 'lr', "'lr' will not do: write key=value"),
        (tmp_path / 'bad.yaml', 'lr=1', 'bad.yaml, line 2'),
        (tmp_path / 'colon.yaml', 'lr=1', 'in quotes'),
        ('smoke', 'prompt=${nowhere}', 'nowhere'),
        ('smoke', 'vocab_size=300', 'characters decide it'),
        ('smoke', 'attn=' + '[' * 60_000, 'too deep'),
        ('smoke', 'attn=[&a x, *a]', 'names such as &a'),
        ('smoke', 'train=3', 'train=3: give keys and values'),
        ('smoke', 'lr=[1', 'lr=[1: while parsing'),
        ('smoke', 'data.length.deep=3', 'length'),
    ):
        said = one_line(lambda: read_config(config, [item]), says)
        assert 'swordfish' not in said


def test_a_run_goes_on_with_what_auto_has_chosen_and_keeps_its_text():
    old = read_config('smoke')
    three = replace(old, train=replace(old.train, threads=3))
    went = check_resumable(three, read_config('smoke', ['threads=auto', 'precision=auto']))
    assert (went.train.threads, went.train.precision) == (3, 'float32')
    other = read_config('smoke', ['corpus=a.txt'])
    one_line(lambda: check_resumable(old, other), "data.corpus='a.txt': it was 'tiny_tales'")


def test_a_smoke_run_is_short_and_else_the_same():
    golden = smoke_config(read_config('golden')).train
    assert (golden.steps, golden.batch_size) == (20, 12)
    # 500 steps of warmup do not fit into 20
    assert smoke_config(read_config('tinystories_baseline')).train.warmup is None


def test_every_key_is_explained_once_and_help_says_it():
    "The oracle is the source: the comment beside a field is what help, `--help` and hover print"
    import inspect
    import re

    from llm_lab.config import SECTIONS, describe_keys, section_keys

    said = describe_keys()
    for section, kind in SECTIONS.items():
        source = ' '.join(re.sub(r'#', ' ', inspect.getsource(kind)).split())
        rows = section_keys(section)
        assert [row[0] for row in rows] == [f.name for f in fields(kind)]
        for key, default, takes, note in rows:
            assert note and ' '.join(note.split()) in source, (section, key, note)
            assert f'  {section}.{key}={default}\n      {note}; {takes}' in said
    assert said in (read_config.__doc__ or said)
    assert 'train.lr=0.01' in said and 'train.tracker' not in said


def test_a_run_is_described_by_a_path_a_dict_or_a_config(tmp_path, monkeypatch):
    from llm_lab.config import as_data, origin, same_config, stated

    monkeypatch.setenv('LLM_LAB_HOME', str(tmp_path))
    path = tmp_path / 'run.yaml'
    path.write_text('train: {steps: 7}\nmodel: {pos: null}')
    data = dict(train=dict(steps=7), model=dict(pos=None))
    made = RunConfig('run', model=ModelConfig(pos=None), train=TrainConfig(steps=7))
    assert read_config(path) == read_config(str(path)) == read_config(data) == read_config(made)
    changed = [read_config(x, ['lr=0.02', 'pos={}']) for x in (path, data, made)]
    assert changed[0] == changed[1] == changed[2] != made
    assert changed[0].model.pos == {} and changed[0].train.lr == 0.02
    assert origin(replace(made, name='mine')) == ('mine', '')
    record = dict(source='', stated=stated(made))
    assert same_config(record, made) and stated(data) == {'train.steps': 7, 'model.pos': None}
    assert as_data(read_config(as_data(made))) == as_data(made)


def test_the_help_of_train_lists_every_key_without_pytorch():
    import subprocess
    import sys

    from llm_lab.config import _PATHS

    code = (
        "import sys; from llm_lab.cli import main\ntry: main(['train', '--help'])\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith('False\n'), done
    for path in _PATHS:
        assert f'\n  {path}=' in done.stdout, path
