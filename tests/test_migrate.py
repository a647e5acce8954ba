"""tools/migrate.py: what the first edition saved becomes format 2, to the byte as we save it.

The oracle is the inverse, written here by hand: a run of today is dressed as one of then, and must
come back as the same bytes. (Runs and packages that the first edition itself had written were
converted once, too: equal logits, and the rest of a run with the same bits.)"""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from helpers import file_hash, tree
import yaml
from safetensors.torch import load as tensors_from, save as tensor_bytes

from llm_lab.config import read_config
from llm_lab.core import FORMAT_1, SLOTS, LabError
from llm_lab.package import load
from llm_lab.runs import train_run

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'tools'))
import migrate

CONFIG = """\
# why these: they hold what was renamed
data: {corpus: text.txt, length: 16}
model:
  preset: llama
  d_model: 16
  n_layers: 1
  n_heads: 2
  attn:
    part: "Attention"  # kept
    transforms: [{part: QKNorm}, {part: 'RoPE', base: 500.0}]
    mask: {part: or_masks, of: [{part: sliding_window, size: 8}, {part: attention_sinks, n: 2}]}
  lm_head: {part: SoftcapHead, cap: 20.0}
train: {steps: 4, batch_size: 2, optimizer: adamw, warmup: 1}
eval: {every: 2, tokens: 100, sample_every: 4, sample_tokens: 4}
log: {every: 1, checkpoint_every: 2}
"""
THEN = """\
# why these: they hold what was renamed
data: {corpus: text.txt, block_len: 16}
model:
  block: llama
  d_model: 16
  n_layers: 1
  n_heads: 2
  attn:
    part: "llm_lab.gpt:Attention"  # kept
    steps: [{part: QKNorm}, {part: 'Rope', base: 500.0}]
    pattern: {part: either, of: [{part: window, size: 8}, {part: sinks, n: 2}]}
  head: {part: Capped, cap: 20.0}
train: {steps: 4, batch_size: 2, optimiser: adamw, warmup: 1}
eval: {every: 2, tokens: 100, sample_every: 4, sample_tokens: 4}
log: {every: 1, checkpoint_every: 2}
"""


# ---- the inverse: as the first edition wrote it


def backwards(text):
    "Any text of format 2 as format 1 wrote it: YAML, JSON, names of tensors"
    text = re.sub(r'\.attn\.transforms\.', '.attn.steps.', text)
    text = preset_as_block(text)
    for new, old in dict(
        transforms='steps',
        mask='pattern',
        lm_head='head',
        length='block_len',
        optimizer='optimiser',
    ).items():
        text = re.sub(rf'\b{new}(?="?: |\.weight)', old, text)  # a key, or a tensor
        text = re.sub(rf'(?<=(?:model|train)\.){new}\b', old, text)
        text = re.sub(rf'(?<=data\.){new}\b', old, text)
    for new, old in dict(
        or_masks='either',
        sliding_window='window',
        attention_sinks='sinks',
        SoftcapHead='Capped',
        RoPE='Rope',
    ).items():
        text = re.sub(rf'\b{new}\b', old, text)
    return text


def without_block(text):
    "A text of today without the key of the recipe, which a conversion has no need to add"
    return re.sub(r',?\s*"?block"?: \{\}', '', text)


def preset_as_block(text):
    "As written before `block` was a recipe: it was a word, which is the preset now"
    return re.sub(r'\bpreset(?="?: )|(?<=model\.)preset\b', 'block', without_block(text))


def sealed(said):
    said = {k: v for k, v in said.items() if k != 'sha256'}
    return said | dict(sha256=hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest())


def dressed(folder, text=backwards, format=1):
    "A package or a checkpoint, rewritten in place by a change of its texts"
    for path in sorted(folder.iterdir()):
        if path.suffix == '.safetensors' and format == 1:
            tensors = tensors_from(path.read_bytes())
            path.write_bytes(tensor_bytes({backwards(n): t for n, t in tensors.items()}))
        elif path.name in ('llm_lab.json', 'state.json')[format - 1 :]:
            path.write_text(text(path.read_text()))
    for name in ('package.json', 'manifest.json'):
        path = folder / name
        if path.exists():
            said = json.loads(path.read_text())
            hashes = {f: file_hash(folder / f) for f in said['files']}
            sizes = {f: (folder / f).stat().st_size for f in said.get('sizes', {})}
            said |= dict(format=format, files=hashes) | (dict(sizes=sizes) if sizes else {})
            path.write_text(json.dumps(sealed(said), indent=1))


def dressed_run(run, text=backwards, format=1):
    for step in (run / 'checkpoints').iterdir():
        dressed(step, text, format)
    (run / 'config.yaml').write_text(text((run / 'config.yaml').read_text()))
    told = json.loads(text((run / 'run.json').read_text()))
    (run / 'run.json').write_text(json.dumps(sealed(told), indent=1) + '\n')


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A home with a config and a run of it, made today"
    home = tmp_path_factory.mktemp('home')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('LLM_LAB_HOME', str(home))
        m.chdir(home)
        (home / 'text.txt').write_text('the cat sat on the mat and the dog sat on the log\n\n' * 40)
        (home / 'mine.yaml').write_text(CONFIG)
        train_run('mine.yaml', run='run')
    return home


@pytest.fixture
def then(home, tmp_path, monkeypatch):
    "(the run as it is today, the same run as the first edition would have left it)"
    shutil.copytree(home, tmp_path / 'home')
    monkeypatch.setenv('LLM_LAB_HOME', str(tmp_path / 'home'))
    monkeypatch.chdir(tmp_path / 'home')
    run = tmp_path / 'home' / 'experiments' / 'mine' / 'runs' / 'run'
    dressed_run(run, without_block, format=2)
    today = tree(run)
    dressed_run(run)
    assert tree(run) != today
    return today, run


def test_a_run_of_then_becomes_the_run_of_today_to_the_byte(then):
    today, run = then
    assert migrate.migrate(run)
    now = tree(run)
    assert now.keys() == today.keys()
    assert [f for f in now if now[f] != today[f]] == []
    assert not migrate.migrate(run)  # nothing is left to do


def test_a_run_that_names_its_preset_a_block_is_converted_and_goes_on(then, capsys):
    "Format 2 from before `block` was a recipe: one line names the tool, and the rest is the same"
    today, run = then
    migrate.migrate(run)
    dressed_run(run, preset_as_block, format=2)
    config = run / 'config.yaml'
    assert 'block: llama' in config.read_text() and tree(run) != today
    for action in (lambda: read_config(config), lambda: train_run(resume=run)):
        with pytest.raises(LabError, match='write model.preset=llama, or convert.*migrate.py') as e:
            action()
        assert '\n' not in str(e.value)
    assert migrate.migrate(run) and tree(run) == today
    assert not migrate.migrate(run)
    train_run(None, 'train.steps=6', resume=run)  # steps may grow
    assert migrate.with_preset({'a': ['model.block=gpt2', 'my model.block']}) == (
        {'a': ['model.preset=gpt2', 'my model.block']}
    )
    recipe = dict(model=dict(block=dict(part='ParallelBlock')))
    assert migrate.with_preset(recipe) == recipe


def test_an_interrupted_conversion_is_taken_up(then):
    today, run = then
    assert migrate.migrate(run / 'checkpoints' / 'step-000002')
    assert migrate.migrate(run) and tree(run) == today


@pytest.mark.parametrize('name', ['model.safetensors', 'state.json', 'manifest.json', 'run.json'])
def test_what_was_damaged_is_not_converted(then, name, capsys):
    _, run = then
    step = run / 'checkpoints' / 'step-000004'
    path = run / name if name == 'run.json' else step / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    before = tree(step)
    assert migrate.main([str(run)]) == 1
    assert 'migrate: ' in capsys.readouterr().err
    if name != 'run.json':
        assert tree(step) == before


def test_format_1_is_one_line_that_names_the_tool(then):
    _, run = then
    for action in (
        lambda: load(run),
        lambda: train_run(resume=run),
        lambda: read_config(run / 'config.yaml'),
        lambda: read_config(yaml.safe_load(CONFIG.replace('transforms:', 'steps:'))),
        lambda: read_config(yaml.safe_load(CONFIG.replace("'RoPE'", 'Rope'))),
        lambda: read_config(
            yaml.safe_load(CONFIG.replace('"Attention"', '"llm_lab.gpt:Attention"'))
        ),
    ):
        with pytest.raises(LabError, match='tools/migrate.py') as e:
            action()
        assert '\n' not in str(e.value)


def test_a_config_keeps_its_comments_and_its_order(tmp_path):
    path = tmp_path / 'mine.yaml'
    path.write_text(THEN)
    assert migrate.migrate(path)
    assert path.read_text() == CONFIG.replace('llm_lab.gpt:', '')
    assert not migrate.migrate(path)


def test_only_the_names_of_then_are_other_names_now():
    strange = dict(
        part='os:system', steps=[dict(part='Mine', pattern=dict(part='llm_lab.gone:Mine2'))], n=3
    )
    assert migrate.convert(strange) == dict(
        part='os:system', transforms=[dict(part='Mine', mask=dict(part='Mine2'))], n=3
    )
    assert migrate.convert(
        dict(train=dict(steps=5, optimiser='sgd'), prompt='the head: steps')
    ) == (dict(train=dict(steps=5, optimizer='sgd'), prompt='the head: steps'))
    assert migrate.convert({'train.lr': '${data.block_len}'}) == {'train.lr': '${data.length}'}


def test_the_table_leads_to_names_that_are_there():
    known = {name for parts in SLOTS.values() for name in parts}
    assert {*FORMAT_1['parts'].values()} <= known
    assert not {*FORMAT_1['parts']} & known


def test_what_is_none_of_these_is_one_line(tmp_path, capsys):
    assert migrate.main([str(tmp_path)]) == 1
    assert 'give a .yaml file, or the folder' in capsys.readouterr().err
    assert migrate.main([]) == 2
