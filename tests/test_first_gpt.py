"""The page `10_first_gpt`: its exercises, what it says of its text, and its model beside the
library's own pieces."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from answers import first_gpt as answers
from torch import nn
from torch.nn import functional as F

from llm_lab.core import check

NOTEBOOK = Path(__file__).parent.parent / 'nbs' / '10_first_gpt.ipynb'
CELLS = [
    (''.join(c['source']), c['cell_type'])
    for c in json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']
]


def ready():
    "Names that the definitions of the page need"
    return dict(math=math, re=re, torch=torch, nn=nn, F=F)


def definition(name):
    "The source of a class of the page"
    (source,) = [text for text, _ in CELLS if text.startswith(f'class {name}(')]
    return re.match(r'class .*?(?=\n\n\S|\Z)', source, re.S)[0]


# ---- the text


def test_a_name_or_thing_that_returns_is_never_drawn():
    "So the best possible probability is 1, as *What it has not learned* says"
    from llm_lab.tales import POOLS, parse_tale, write_tale

    returned = 0
    for seed in range(100):
        seen = set()
        for piece in parse_tale(write_tale(seed)):
            words = re.findall(r'\w+', piece.text)
            if piece.text in seen and piece.text in POOLS['name'] + POOLS['thing']:
                assert piece.bits == 0, (seed, piece)
                returned += 1
            seen.update(words)
    assert returned > 100


# ---- the exercises


@pytest.fixture(scope='module')
def exercise():
    space = ready()
    torch.manual_seed(0)
    for name in ('causal_head', 'missing_idea'):
        (source,) = [text for text, _ in CELLS if f'def {name}(' in text]
        exec(source.partition('print(check(')[0], space)
    return space


@pytest.mark.parametrize('answer', answers.RIGHT)
def test_a_right_answer_is_told_so(answer, exercise):
    said = check(answer, exercise['causal_head_spec'], *exercise['cases'])
    assert said == f'{answer.__name__}: right on 4 cases'


@pytest.mark.parametrize('answer', answers.RIGHT)
def test_a_right_answer_misses_no_idea(answer, exercise):
    assert exercise['missing_idea'](answer) == ''


@pytest.mark.parametrize('answer, idea', answers.WRONG.items())
def test_a_wrong_answer_meets_a_counter_example_and_the_idea(answer, idea, exercise):
    assert 'expected' in check(answer, exercise['causal_head_spec'], *exercise['cases'])
    assert exercise['missing_idea'](answer).startswith(idea)


def test_no_answer_yet_misses_no_idea(exercise):
    assert exercise['missing_idea'](exercise['causal_head']) == ''


@pytest.mark.parametrize('start', ['class Head(', 'changed = '])
def test_without_its_mask_the_assertions_of_the_page_turn_red(start):
    "The third exercise: the line is there to be deleted, and these two cells see it"

    def run(change):
        space = ready()
        torch.manual_seed(0)
        for name in ('Head', 'Attention', 'Block', 'GPT'):
            exec(change(definition(name)), space)
        space.update(V=11, model=space['GPT'](V=11, T=6), inputs=torch.randint(11, (2, 6)))
        far = [' ring', *['word'] * 43, ' Suddenly']  # as the first tale has it
        space.update(tales=[''], split_tokens=lambda tale: far)
        (source,) = [text for text, _ in CELLS if text.startswith(start)]
        exec(change(source), space)

    run(lambda source: source)
    with pytest.raises(AssertionError):
        run(lambda source: re.sub(r'.*masked_fill.*\n', '', source))


# ---- the model


@pytest.fixture(scope='module')
def page():
    "The classes of the page, without its text and its training"
    space = ready()
    for name in ('Head', 'Attention', 'Block', 'GPT'):
        exec(definition(name), space)
    torch.manual_seed(0)
    return space


def test_a_head_is_pytorchs_attention(page):
    head, x = page['Head'](12, 5), torch.randn(2, 7, 12)
    want = F.scaled_dot_product_attention(head.query(x), head.key(x), head.value(x), is_causal=True)
    torch.testing.assert_close(head(x), want)


def test_the_block_is_the_librarys(page):
    "With the same weights, the block of the page computes what `Block` of 22_gpt computes"
    from llm_lab.gpt import Block, GPTConfig

    ours = Block(GPTConfig(vocab_size=9, d_model=12, n_layers=1, n_heads=3, max_len=8))
    block = page['Block'](12, 3)
    block.mlp[1] = nn.GELU('tanh')  # as GPT-2 computes it
    heads = block.attention.heads
    maps = [h.query for h in heads] + [h.key for h in heads] + [h.value for h in heads]
    with torch.no_grad():
        ours.attn.qkv.weight.copy_(torch.cat([one.weight for one in maps]))
        ours.attn.qkv.bias.zero_()
        ours.attn.out.load_state_dict(block.attention.out.state_dict())
        linear = [m for m in ours.mlp.modules() if isinstance(m, nn.Linear)]
        for theirs, mine in zip(linear, (block.mlp[0], block.mlp[2]), strict=True):
            theirs.load_state_dict(mine.state_dict())
    x = torch.randn(2, 8, 12)
    got = block(x)
    want = ours(x, i=torch.arange(8))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_no_token_sees_a_later_one(page):
    model = page['GPT'](V=11, T=9, C=8, n_layers=2, n_heads=2)
    ids = torch.randint(11, (3, 9))
    for at in (1, 4, 8):
        changed = ids.clone()
        changed[:, at] = (changed[:, at] + 1) % 11
        before, after = model(ids), model(changed)
        assert torch.equal(before[:, :at], after[:, :at])
        assert not torch.equal(before[:, at], after[:, at])


def test_no_import_of_ours_but_the_corpus():
    visible = [t for t, kind in CELLS if kind == 'code' and not re.match(r'#\| (hide|echo)', t)]
    imported = re.findall(r'(?:from|import) (llm_lab\S*)', '\n'.join(visible))
    assert imported == ['llm_lab.corpora']
    assert len(visible) <= 35
