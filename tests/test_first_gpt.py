"""The page `10_first_gpt`: its exercise, and its model beside the library's own pieces."""

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


# ---- the exercise


@pytest.fixture(scope='module')
def exercise():
    (source,) = [text for text, kind in CELLS if text.startswith('def causal_head(')]
    space = ready()
    torch.manual_seed(0)
    exec(source.rpartition('check(')[0], space)
    return space


@pytest.mark.parametrize('answer', answers.RIGHT)
def test_a_right_answer_is_told_so(answer, exercise):
    said = check(answer, exercise['causal_head_spec'], *exercise['cases'])
    assert said == f'{answer.__name__}: right on 4 cases'


@pytest.mark.parametrize('answer', answers.WRONG)
def test_a_wrong_answer_meets_a_counter_example(answer, exercise):
    assert 'expected' in check(answer, exercise['causal_head_spec'], *exercise['cases'])


# ---- the model


@pytest.fixture(scope='module')
def page():
    "The classes of the page, without its text and its training"
    space = ready()
    for name in ('Head', 'Attention', 'Block', 'GPT'):
        (source,) = [text for text, _ in CELLS if text.startswith(f'class {name}(')]
        exec(re.match(r'class .*?(?=\n\n\S|\Z)', source, re.S)[0], space)
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
