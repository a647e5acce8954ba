"The glossary: each term is explained in bold in the chapter that it links to"

import json
import re
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parent.parent / 'nbs'
# what a reader of papers must find here
WANTED = """
cross-entropy, self-attention, causal mask, residual connection, feed-forward network, activation,
backpropagation, optimizer, learning-rate schedule, hyperparameter, overfitting, padding, prefill,
decode, quantization, memory-bound, latency, throughput, ablation, auxiliary loss,
activation checkpointing, gradient checkpointing, perplexity, nucleus sampling, fine-tuning,
gradient, backward pass, matmul, activation function, NaN, parameter, sequence, document,
projection, residual stream, receptive field, context, random generator, frequency,
Hugging Face checkpoint, step, head, cache, mask, sliding window
"""
SHAPES = 'B T S C H G D V L F E'


def prose(stem):
    "The text of a notebook's prose cells"
    cells = json.loads((NBS / f'{stem}.ipynb').read_text(encoding='utf-8'))['cells']
    return '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')


def glossary(text):
    "[(names of a term, sentence, stem of its chapter, paper)] of the page's rows"
    row = r'^\| \*\*(.+?)\*\*(.*?) \| (.+?) \| \[[^\]]+\]\((\w+)\.ipynb\) \| (.*?) ?\|$'
    return [
        ([name, *re.findall(r'[^,]+', more.replace(', ', ','))], sentence, stem, paper)
        for name, more, sentence, stem, paper in re.findall(row, text, re.M)
    ]


def bold(text):
    "What stands in bold, in lower case"
    return [words.lower() for words in re.findall(r'\*\*(?=\S)(.+?)(?<=\S)\*\*', text)]


def is_bold(name, found):
    "Does the term, or its plural, stand in one of the bold texts?"
    stem = re.escape(name.lower())
    stem = stem[:-1] + '(y|ies)' if stem.endswith('y') else stem + '(s|es)?'
    return any(re.search(rf'(?<![\w-]){stem}(?![\w-])', words) for words in found)


def not_explained(rows, text_of):
    "Terms none of whose names is bold in the chapter that the row links to"
    return {
        names[0]: stem
        for names, _, stem, _ in rows
        if not any(is_bold(name, bold(text_of(stem))) for name in names)
    }


@pytest.fixture(scope='module')
def rows():
    return glossary(prose('notation'))


def test_each_row_of_the_page_is_read(rows):
    text = prose('notation')
    assert len(rows) == len(re.findall(r'^\| \*\*', text, re.M)) > 100
    names = [name.lower() for row in rows for name in row[0]]
    assert sorted(set(names)) == sorted(names)  # each is explained once
    for names, sentence, *_ in rows:
        assert sentence.endswith('.') and len(sentence.split()) <= 25, names


def test_a_term_is_bold_in_the_chapter_that_explains_it(rows):
    missing = not_explained(rows, prose)
    assert missing == {}


def test_what_every_chapter_uses_is_there(rows):
    names = {name.lower() for row in rows for name in row[0]}
    wanted = {term.strip().lower() for term in WANTED.split(',')}
    assert wanted - names == set()
    shapes = re.findall(r'^\| `(\w)` \|', prose('notation').partition('## Names')[0], re.M)
    assert shapes == SHAPES.split()


def test_the_checker_can_fail():
    page = '| **head**, attention head | One. | [A](10_a.ipynb) |  |\n'
    page += '| **policy** | Two. | [B](11_b.ipynb) | Someone 2000 |'
    rows = glossary(page)
    assert rows == [
        (['head', 'attention head'], 'One.', '10_a', ''),
        (['policy'], 'Two.', '11_b', 'Someone 2000'),
    ]
    texts = {'10_a': 'Two **heads**', '11_b': 'two **policies**'}
    assert not_explained(rows, texts.get) == {}
    texts = {'10_a': 'a head, **ahead**, **two-head**', '11_b': '*policy*'}
    assert not_explained(rows, texts.get) == {'head': '10_a', 'policy': '11_b'}
