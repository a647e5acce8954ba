"What a package promises and no notebook shows: its card is true, also that of the first edition."

import re
import subprocess
import sys

import pytest
from cases import HANG

from llm_lab.chars import CharTokenizer
from llm_lab.core import LabError
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.package import save

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
    import json

    from llm_lab.package import write_manifest

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
