"The README and the guide on a book of one's own: the commands, the config, the page of keys."

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from helpers import manual, printed, shake
from test_root import readme_blocks, smaller, write_book

import llm_lab as lab
from llm_lab.config import SECTIONS, section_keys
from llm_lab.core import REGISTERED
from llm_lab.corpora import corpus_of, letters_of
from llm_lab.gpt import check_causal

pytestmark = pytest.mark.usefixtures('one_thread')
ROOT = Path(__file__).resolve().parent.parent
# what makes a run one of seconds; what the README says itself is left as it is
LITTLE = {
    'model.n_layers': 1,
    'model.d_model': 16,
    'train.steps': 4,
    'eval.every': 4,
    'eval.tokens': 300,
    'eval.sample_every': 99,
}


def own_book():
    "The guide's section of that name: [(language, code)]"
    return blocks_of('## Your own book')


def blocks_of(heading):
    "The blocks of one of the guide's sections: [(language, code)]"
    section = manual().partition(heading)[2].partition('\n## ')[0]
    return re.findall(r'^```(\w+)\n(.*?)^```', section, re.M | re.S)


def little(words):
    "The words of a command, and what makes it one of seconds"
    said = {word.partition('=')[0] for word in words if '=' in word}
    if words[0] == 'train':
        start = 'train.start_from' in said
        more = {k: v for k, v in LITTLE.items() if k not in said}
        words = words + [f'{k}={v}' for k, v in more.items() if not (start and 'model.' in k)]
    if words[0] == 'sample':
        words = words + ['--tokens', '5']
    return words


def test_a_book_of_ones_own_goes_from_start_to_end_as_the_readme_says(home):
    write_book(home / 'my_book.txt')
    write_book(home / 'letters.txt')
    space = {}
    outputs = []
    for language, code in own_book():
        if language == 'python':
            exec(smaller(code), space)
        if language == 'sh':
            for line in code.splitlines():
                program, *words = shlex.split(line)
                assert program == '.venv/bin/llm-lab'
                outputs.append(printed(*little(words))[0])
    assert len(outputs) == 6 and 'It was' in outputs[1] and 'val loss' in outputs[2]
    assert 'model.d_model: 16 (first); 192 (wider)' in outputs[4]
    # of the script: the package knows its text, and its test part
    assert 'test loss' in printed('eval', 'book_model', '--split', 'test')[0]
    # it went on where the package stood
    run = lab.find_model('letters')
    assert json.loads((run / 'run.json').read_text())['config']['decided']['train'][
        'start_from'
    ].endswith('artifacts/book_model')
    assert lab.load(run).model.cfg == lab.load('book_model').model.cfg


def test_a_part_of_ones_own_goes_from_its_file_to_a_text_as_the_readme_says(home, monkeypatch):
    (_, mine), (_, script), (_, commands) = blocks_of('## A part of your own')
    (home / 'mine.py').write_text(mine)
    monkeypatch.syspath_prepend(str(home))
    monkeypatch.delitem(sys.modules, 'mine', raising=False)
    before = dict(REGISTERED)
    corpus = lab.load_corpus('tiny_tales')
    space = dict(lab=lab, corpus=corpus, tok=lab.CharTokenizer.train(letters_of(corpus)))
    try:
        exec(smaller(script), space)
        model, tok = space['model'], space['tok']
        assert type(model.blocks[0].attn).__name__ == 'AFT' and model.cache(1, 9)
        assert check_causal(shake(model)) is model
        # with its cache, in a batch with padding, it writes what it writes without
        prompts = ['One day', 'A']
        texts = [
            lab.complete(model, tok, prompts, 9, cache=c, temperature=0) for c in (True, False)
        ]
        assert [c.text for (c,) in texts[0]] == [c.text for (c,) in texts[1]]
        outputs = []
        for line in commands.splitlines():
            words = shlex.split(line.replace('golden', 'smoke'))[1:]
            outputs.append(printed(*little(words))[0])
        assert outputs[1].startswith('ROMEO:')
        run = lab.load('smoke/aft', parts='mine.py')
        assert type(run.model.blocks[0].attn).__name__ == 'AFT' and run.model.cache(1, 9)
    finally:
        REGISTERED.clear()
        REGISTERED.update(before)


def test_the_readmes_config_says_what_its_script_says(home):
    (home / 'my_book.txt').write_text('a book\n' * 9)
    (code,) = (code for language, code in own_book() if language == 'yaml')
    assert 8 <= len(code.splitlines()) <= 12
    (home / 'my_book.yaml').write_text(code)
    cfg = lab.read_config('my_book.yaml')
    assert cfg.name == 'my_book' and cfg.data.splits == dict(val=0.05, test=0.05)
    script = next(code for language, code in own_book() if language == 'python')
    m, d, t = cfg.model, cfg.data, cfg.train
    for said in (
        f"'{d.corpus}', splits=splits",
        f'vocab_size={d.vocab_size}',
        f'd_model={m.d_model}, n_layers={m.n_layers}, n_heads={m.n_heads}, max_len={d.length}',
        f'batch_size={t.batch_size}, length={d.length}), steps={t.steps}, lr=4e-3',
        "special_tokens=[mark]",
    ):
        assert said in script, said
    assert t.lr == 4e-3 and m.preset == 'llama' and t.optimizer == 'adamw'
    assert manual().count('optimizer=lab.muon(model, lr=0.01)') == 2


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_a_config_and_its_script_end_with_the_same_weights(home, optimizer):
    write_book(home / 'my_book.txt')
    (config,) = (code for language, code in own_book() if language == 'yaml')
    script = next(code for language, code in own_book() if language == 'python')
    if optimizer == 'muon':
        config = config.replace('lr: 0.004', 'lr: 0.01').replace('adamw', 'muon')
        script = script.replace('lr=4e-3', 'optimizer=lab.muon(model, lr=0.01)')
    (home / 'my_book.yaml').write_text(config)
    little = ('train.steps=4', 'd_model=32', 'n_layers=1', 'vocab_size=300', 'eval.every=2')
    run = lab.train_run(home / 'my_book.yaml', *little, 'eval.tokens=300').run.model.cpu()
    space = {}
    exec(smaller(script), space)
    mine = space['model'].state_dict()
    assert all(mine[name].equal(weight) for name, weight in run.state_dict().items())


def test_the_first_script_saves_what_eval_needs(home):
    block = next(b for b in readme_blocks() if 'lab.save(' in b)
    said = re.search(r"lab\.save\('artifacts/mine', model, tok, (dict\(.*\))\)\n", block)[1]
    about = eval(said, dict(corpus=lab.load_corpus('tiny_tales')))
    assert corpus_of(about).name == 'tiny_tales'
    # and the help of `save` lists all that may be said
    for key in ('data', 'corpus', 'corpus_sha256', 'field', 'splits'):
        assert f'`{key}`' in lab.save.__doc__, key


def test_the_page_of_keys_is_that_of_the_help():
    nb = json.loads((ROOT / 'nbs' / 'keys.ipynb').read_text(encoding='utf-8'))
    (output,) = (o for c in nb['cells'] for o in c.get('outputs', []))
    shown = ''.join(output['data']['text/markdown'])
    help_page = printed('train', '--help')[0]
    parts = re.split(r'^## (\w+)\n', shown, flags=re.M)[1:]
    assert parts[::2] == [*SECTIONS]
    for section, table in zip(parts[::2], parts[1::2]):
        rows = re.findall(r'^\| `(\w+)` \| (.*) \|$', table, re.M)
        want = [(key, ' | '.join(rest)) for key, *rest in section_keys(section)]
        assert rows == want, f'{section}: run python tools/book.py nbs/keys.ipynb'
        for key, _ in rows:
            assert f'  {section}.{key}=' in help_page
    assert '](nbs/keys.ipynb)' in (ROOT / 'README.md').read_text(encoding='utf-8')
