"""Attention maps of any recipe and with any cache, views that a hostile text cannot break, scores
against plain loops: the cases that the notebook leaves out."""

import importlib.util
import math
import re
import sys
from base64 import b64decode
from functools import partial
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import torch
from answers import looking as answers
from fastcore.test import test_close as close
from fastcore.test import test_eq as equal
from helpers import code_cell, exercise_tests
from torch import nn
from torch.nn import functional as F

from llm_lab import looking as chapter
from llm_lab.chars import CharTokenizer
from llm_lab.core import LabError, check, pyplot, rng
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.looking import (
    _INK,
    _by_position,
    _live,
    _png,
    _shared,
    ablate_head,
    attention_html,
    attention_map,
    attention_maps,
    attention_of,
    describe_row,
    head_outputs,
    head_scores,
    heads_html,
    hidden_states,
    intervene,
    lens_html,
    logit_lens,
    mean_distance,
    patched,
    patched_head,
    plot_attention,
    plot_heads,
    plot_scores,
    repeated_ids,
    static,
    uniform_attention,
    visible_token,
)
from llm_lab.parts import part
from llm_lab.self_attention import Attention

pytestmark = pytest.mark.usefixtures('one_thread')
TOY = torch.tensor([[1.0, 0, 0], [0.75, 0.25, 0], [0.2, 0.3, 0.5]])
HOSTILE = ['<script>alert(1)</script>', '" onmouseover="x', "'><svg>"]
TEXT = 'Once Mia found a red ball.\n'
TOK = CharTokenizer.train(TEXT)
IDS = torch.randint(65, (2, 12), generator=rng(0, 'ids'))


def refuses(f, words):
    with pytest.raises(LabError, match=re.escape(words)):
        f()


@torch.no_grad()
def logits(model, *args, **ctx):
    return model(*args, **ctx)


@pytest.fixture(scope='module')
def model():
    sizes = dict(vocab_size=TOK.vocab_size, d_model=32, n_layers=2, n_heads=4, max_len=64)
    return MiniGPT(GPTConfig(**sizes), seed=0).eval()


@pytest.fixture
def ids():
    return torch.tensor([TOK.encode('Once Mia found a ')])


@pytest.fixture
def maps_of_text(model):
    return attention_of(model, TOK, TEXT)


# ---- interventions


def equally(attn, q, k, v, i, j, **ctx):
    return q * 0, k, v, i, j  # all keys count the same


def n_transforms(model):
    return sum(len(b.attn.transforms) for b in model.blocks)


def test_an_error_within_leaves_nothing_behind(model, ids):
    plain = logits(model, ids)

    def stumble():
        with intervene(model, equally):
            model(ids.repeat(1, 99))

    refuses(stumble, 'max_len is')
    equal(n_transforms(model), 0)
    equal(logits(model, ids), plain)
    refuses(intervene(nn.Linear(2, 2), equally).__enter__, 'no attention to look at')


def test_an_intervention_changes_the_answer_while_it_lasts(model, ids):
    plain = logits(model, ids)
    with intervene(model, equally):
        assert (logits(model, ids) != plain).any()
        maps = attention_maps(model, ids)
    equal(n_transforms(model), 0)
    equal(logits(model, ids), plain)
    close(maps[0], uniform_attention(17).expand(2, 4, 17, 17), eps=1e-6)


def test_an_ablated_head_adds_nothing_and_the_others_are_as_ever(model, ids):
    plain, outputs = logits(model, ids), head_outputs(model, ids)
    with ablate_head(model, 1, 2):
        assert (logits(model, ids) != plain).any()
        without = head_outputs(model, ids)
    equal(logits(model, ids), plain)  # the head is back
    assert (without[:, 1, 2] == 0).all()
    others = [0, 1, 3]
    equal(without[:, 1, others], outputs[:, 1, others])
    equal(without[:, 0], outputs[:, 0])


def test_a_head_that_is_not_there_cannot_be_ablated(model):
    refuses(lambda: ablate_head(model, 0, 4), 'head=4: choose from 0 to 3')


def test_outputs_of_heads_are_weights_times_values(model, ids):
    outputs = head_outputs(model, ids)
    equal(outputs.shape, (1, 2, 4, 17, 8))
    equal(head_outputs(model, ids[0]), outputs[0])
    # the stream after a layer is the one before, the heads' outputs projected, and the MLP's answer
    block, before = model.blocks[0], hidden_states(model, ids)[:, 0]
    with torch.no_grad():
        x = before + block.attn.out(outputs[:, 0].transpose(1, 2).flatten(2))
        close(hidden_states(model, ids)[:, 1], x + block.mlp(block.norm2(x)), eps=1e-5)


def test_a_patch_from_the_same_run_changes_no_bit(model, ids):
    plain, states, outputs = logits(model, ids), hidden_states(model, ids), head_outputs(model, ids)
    for layer in range(3):
        with patched(model, states, layer, 5):
            equal(logits(model, ids), plain)
    with patched_head(model, outputs, 1, 3, 5):
        equal(logits(model, ids), plain)


def test_the_whole_stream_of_another_run_is_the_other_run():
    model = MiniGPT(GPTConfig(n_layers=2))
    one, other = IDS[:1], IDS[1:]
    for layer in range(3):
        with patched(model, hidden_states(model, other), layer, slice(None)):
            close(logits(model, one), logits(model, other), eps=1e-5)
    with patched(model, hidden_states(model, other[0]), 1, 4):  # no dimension of the batch
        changed = logits(model, one)
    equal(changed[:, :4], logits(model, one)[:, :4])  # nothing reaches earlier positions
    assert (changed[:, 4:] != logits(model, one)[:, 4:]).any(-1).all()


def test_a_patched_head_gives_what_it_is_given_and_zero_is_an_ablation():
    model = MiniGPT(GPTConfig(n_layers=2))
    outputs = head_outputs(model, IDS)
    with patched_head(model, outputs.roll(1, 0), 0, 2, 7):
        seen = head_outputs(model, IDS)
    want = outputs.clone()
    want[:, 0, 2, 7] = outputs[:, 0, 2, 7].roll(1, 0)
    equal(seen[:, 0], want[:, 0])
    with patched_head(model, outputs.mean(0), 0, 2):  # one mean for all sequences
        seen = head_outputs(model, IDS)
    close(seen[:, 0, 2], outputs[:, 0, 2].mean(0).expand(2, -1, -1), eps=1e-6)
    with ablate_head(model, 1, 0):
        ablated = logits(model, IDS)
    with patched_head(model, outputs * 0, 1, 0):
        close(logits(model, IDS), ablated, eps=1e-5)


def test_what_cannot_be_patched_is_refused_and_leaves_nothing_behind(model, ids):
    states, outputs = hidden_states(model, ids), head_outputs(model, ids)
    refuses(patched(model, states, 3, 0).__enter__, 'layer=3: choose from 0 to 2')
    refuses(patched_head(model, outputs, 2, 0).__enter__, 'layer=2: choose from 0 to 1')
    refuses(patched_head(model, outputs, 0, -1).__enter__, 'head=-1: choose from 0 to 3')
    for patch in (patched(model, states, 1, 99), patched_head(model, outputs, 0, 0, 99)):
        with pytest.raises(IndexError), patch:
            model(ids)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---- attention maps


def as_used(model, ids, **ctx):
    "What attention returned, and our weights applied to its values: twice (B, L, T, C)"
    returned, values, hooks = [], [], []
    for block in model.blocks:
        read_out = lambda m, args: returned.append(args[0])
        read_values = lambda m, args, out: values.append(out.chunk(3, -1)[2])
        hooks.append(block.attn.out.register_forward_pre_hook(read_out))
        hooks.append(block.attn.qkv.register_forward_hook(read_values))
    maps = attention_maps(model, ids, **ctx)
    for hook in hooks:
        hook.remove()
    v = torch.stack(values, 1).unflatten(-1, (model.cfg.n_heads, -1)).transpose(2, 3)
    return torch.stack(returned, 1), (maps @ v).transpose(2, 3).flatten(3)


def test_weights_stand_in_the_column_of_their_keys_position():
    w = torch.tensor([[0.5, 0.9, 0.1, 0.4]]).expand(2, 1, 1, 4)  # one query, four keys
    j = torch.tensor([[3, -1, 0, 2], [0, 1, 2, 3]])
    want = torch.tensor([[0.1, 0, 0.4, 0.5, 0], [0.5, 0.9, 0.1, 0.4, 0]])
    equal(_by_position(w, j, 5)[:, 0, 0], want)
    equal(_by_position(w, j[1], 4), w)  # keys in order: nothing moves


def test_one_sequence_or_several_and_the_mode_stays(model, ids):
    maps = attention_maps(model, ids)
    equal(maps.shape, (1, 2, 4, 17, 17))
    equal(attention_maps(model, ids[0]), maps[0])
    attention_maps(model.train(), ids)
    assert model.training
    model.eval()
    refuses(lambda: attention_maps(model, ids[0].repeat(99)), 'max_len is')
    assert not model.training and not n_transforms(model)


def test_being_watched_changes_no_bit(model, ids):
    seen = []
    hook = model.register_forward_hook(lambda m, args, out: seen.append(out))
    attention_maps(model, ids)
    hook.remove()
    equal(seen[0], logits(model, ids))
    close(*as_used(model, ids), eps=1e-5)


def near(i, j, size):
    return (j <= i) & (i - j < size)


def upto(i, j, limit):
    return (j <= i) & (j < limit)


class Scaled(nn.Module):
    "A transform: q three times as long, or the keys of the first head for all"

    def __init__(self, cfg, layer=0, share=False):
        super().__init__()
        self.share = share

    def forward(self, q, k, v, i, j, **ctx):
        return (q, k[:, :1], v, i, j) if self.share else (3 * q, k, v, i, j)


def proven(ctx=None, **recipe):
    "Maps of a model with such an attention, after they were compared with what it used"
    ctx = ctx or {}
    model = MiniGPT(GPTConfig(attn=part(Attention, **recipe)))
    close(*as_used(model, IDS, **ctx), eps=1e-5)
    return attention_maps(model, IDS, **ctx)


def test_maps_are_those_that_the_model_used_whatever_the_recipe():
    equal((proven(mask=part(near, size=3)) > 0).sum(-1).max(), 3)
    assert (proven(dict(limit=5), mask=part(upto))[..., 5:] == 0).all()
    refuses(lambda: proven(mask=part(upto)), "needs the keyword 'limit'")
    for share in (False, True):
        assert (proven(transforms=(part(Scaled, share=share),)) - proven()).abs().max() > 0.01


class Kept(nn.Module):
    """A toy cache: keeps the last `room` keys of its layer, and hands them over mixed, with
    padding in front"""

    needs = ('cache',)

    def __init__(self, cfg, layer=0, room=(99,)):
        super().__init__()
        self.layer = layer
        self.room = room[layer % len(room)]

    def forward(self, q, k, v, i, j, cache=None, **ctx):
        if cache is None:
            return q, k, v, i, j
        old = cache.get(self, (k[:, :, :0], v[:, :, :0], j[..., :0]))
        k = torch.cat([old[0], k], 2)[:, :, -self.room :]
        v = torch.cat([old[1], v], 2)[:, :, -self.room :]
        j = torch.cat([old[2], j], -1)[..., -self.room :]
        cache[self] = k, v, j
        mix = torch.randperm(k.shape[2], generator=rng(0, 'mix'))
        k, v = (F.pad(t[:, :, mix], (0, 0, 1, 0), value=9.0) for t in (k, v))
        return q, k, v, i, F.pad(j[..., mix], (1, 0), value=-1)


def keeps(*room):
    return MiniGPT(GPTConfig(attn=part(Attention, transforms=(part(Kept, room=room),))))


def in_pieces(model, ids, i, ends):
    "Maps of a text read piece by piece with a cache, put together"
    kept = {}
    maps = []
    for a, b in zip([0, *ends], [*ends, ids.shape[1]]):
        maps.append(attention_maps(model, ids[:, a:b], i[..., a:b], cache=kept))
    return torch.cat([F.pad(m, (0, maps[-1].shape[-1] - m.shape[-1])) for m in maps], -2)


def test_maps_are_right_with_a_cache_in_any_order():
    i = torch.arange(12)
    one_by_one = range(1, 12)
    whole = attention_maps(MiniGPT(GPTConfig()), IDS)
    equal(attention_maps(keeps(99), IDS[:, :5], i[:5], cache={}).shape[-2:], (5, 5))
    close(in_pieces(keeps(99), IDS, i, [5, 6, 9]), whole, eps=1e-6)
    # room for five keys: the map of a window of five
    close(in_pieces(keeps(5), IDS, i, one_by_one), proven(mask=part(near, size=5)), eps=1e-6)
    mixed = in_pieces(keeps(99, 5), IDS, i, one_by_one)  # every second layer forgets
    close(mixed[:, 0], whole[:, 0], eps=1e-6)
    equal((mixed > 0).sum(-1)[0, :2, 0], torch.stack([i + 1, (i + 1).clamp_max(5)]))
    close(mixed.sum(-1), torch.ones(2, 4, 4, 12), eps=1e-5)  # no weight is lost


def test_padding_reads_nothing_and_is_read_by_no_query():
    i = torch.arange(12)
    whole = attention_maps(MiniGPT(GPTConfig()), IDS)
    padded = (i - torch.tensor([[0], [3]])).clamp_min(-1)  # the second sequence has nine tokens
    for left in (
        attention_maps(MiniGPT(GPTConfig()), IDS, padded),
        in_pieces(keeps(99), IDS, padded, [5, 9]),
    ):
        close(left[0], whole[0], eps=1e-6)
        close(left[1, ..., 3:, :9], attention_maps(MiniGPT(GPTConfig()), IDS[1, 3:]), eps=1e-6)
        assert (left[1, ..., :3, :] == 0).all() and (left[1, ..., 9:] == 0).all()


# ---- views


def test_tokens_and_rows_in_words(model):
    weights, tokens = attention_of(model, TOK, 'Once Mia\n')
    equal((weights.shape[2:], ''.join(tokens)), ((9, 9), 'Once Mia\n'))
    equal(describe_row(TOY, 'abc', 0), '“a” looks at “a” 1.00')  # there is nothing else to see
    want = '“↵” looks at “↵” 0.50, “␣” 0.30, “a” 0.20'
    equal(describe_row(TOY, ['a', ' ', '\n']), want)


def test_a_choice_that_is_not_there_is_refused(maps_of_text):
    weights, tokens = maps_of_text
    L, H, T = weights.shape[:3]
    refuses(lambda: plot_attention(weights, tokens[1:]), f'do not fit {T - 1} tokens')
    refuses(lambda: plot_attention(weights[:, :, -2:], tokens), 'do not fit')
    refuses(
        lambda: plot_attention(weights, tokens, layer=L), f'layer={L}: choose from 0 to {L - 1}'
    )
    refuses(
        lambda: plot_attention(weights, tokens, query=T), f'query={T}: choose from 0 to {T - 1}'
    )
    fig = plot_attention(weights, tokens, -1, query=3)
    said = fig.axes[0].get_title('left') + fig.axes[0].get_title()
    assert describe_row(weights[-1, 0], tokens, 3) in said
    pyplot().close(fig)


def test_heads_of_a_slice_and_of_the_last_row(maps_of_text):
    before = torch.eye(5)[[0, 0, 1, 2, 3]]  # each looks at the one before
    close(mean_distance(torch.stack([torch.eye(5), before])), torch.tensor([0, 0.8]))
    close(mean_distance(before[-1:]), torch.tensor(1.0))  # of a text read in pieces, the last row
    fig = plot_heads(maps_of_text[0][:1, :2])
    equal(len(fig.axes), 2)
    pyplot().close(fig)


class Page(HTMLParser):
    "What a browser finds: elements, tool tips, text"

    def __init__(self, page):
        super().__init__()
        self.tags, self.tips, self.bold, self.text = [], [], [], ''
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.tips += [v for k, v in attrs if k == 'title']
        assert tag in 'details summary div span table tr td b br img'.split()
        allowed = {'title', 'style', 'open'}
        if tag == 'img':
            allowed |= {'src', 'alt', 'width', 'height'}
        assert {k for k, _ in attrs} <= allowed
        self.now_bold = 'bold' in dict(attrs).get('style', '')

    def handle_data(self, text):
        self.text += text
        if self.now_bold:
            self.bold.append(text)


def test_the_page_of_a_map_shows_the_text_of_each_head(maps_of_text):
    weights, tokens = maps_of_text
    n = weights.shape[0] * weights.shape[1]
    page = Page(attention_html(weights, tokens, layer=1))
    equal((page.tags.count('details'), page.text.count(TEXT[:-1])), (n, n))


def test_a_hostile_token_is_shown_as_it_is():
    page = Page(attention_html(TOY[None, None], HOSTILE))  # no other element, no other attribute
    equal(page.tips, [f'{visible_token(t)} {w:.2f}' for t, w in zip(HOSTILE, (0.2, 0.3, 0.5))])
    assert page.text.endswith(''.join(HOSTILE))
    assert '<script>' not in heads_html(TOY[None, None], HOSTILE)
    refuses(
        lambda: attention_html(torch.ones(1, 1, 300, 300), 'a' * 300),
        'a text of 300 tokens is too long',
    )


def test_the_page_of_all_heads(maps_of_text):
    weights, tokens = maps_of_text
    L, H = weights.shape[:2]
    page = Page(heads_html(weights, tokens))
    equal([page.tags.count(t) for t in ('tr', 'details', 'img')], [L, L * H, 2 * L * H])
    names = [f'layer {layer}, head {head}' for layer in range(L) for head in range(H)]
    equal([t.partition(':')[0] for t in page.tips], names)
    for layer, head in ((0, 0), (L - 1, H - 1)):
        assert describe_row(weights[layer, head], tokens) in page.text
    assert len(heads_html(weights, tokens)) < 2e5


def test_a_small_map_has_one_square_for_each_weight():
    plt = pyplot()
    png = plt.imread(BytesIO(b64decode(_png(TOY).partition(',')[2])))
    equal(png.shape, (240, 240, 4))
    shades = (TOY.sqrt() * 31).round() / 31
    close(png[::80, ::80], plt.get_cmap('viridis')(shades), eps=0.01)


def test_the_page_with_the_program_and_the_one_without_are_one_blue(monkeypatch):
    ink = re.search(r'const INK = \[(.*)\];', static('look.js'))[1]
    equal(ink.replace(' ', ''), _INK)
    _live.cache_clear()
    monkeypatch.setitem(sys.modules, 'anywidget', None)
    refuses(_live, 'pip install anywidget')


def test_what_the_widget_and_python_share(maps_of_text, monkeypatch):
    weights, tokens = maps_of_text
    L, H, T = weights.shape[:3]
    shared = _shared(weights, tokens, layer=1, head=2)
    # not a bit is lost
    equal(np.frombuffer(shared['data'], '<f4').reshape(weights.shape), weights.numpy())
    chosen = [shared[k] for k in ('shape', 'layer', 'head', 'query')]
    equal(chosen, [[L, H, T], 1, 2, T - 1])
    if importlib.util.find_spec('anywidget'):
        widget = _live()(**shared)
        equal((widget.data, widget.layer, widget.head), (shared['data'], 1, 2))
    monkeypatch.setenv('LLM_LAB_STILL', '1')
    still = attention_map(weights, tokens, 1)
    equal(getattr(still, 'data', still), attention_html(weights, tokens, 1))
    refuses(lambda: attention_map(weights, tokens, head=H), f'head={H}: choose from')


# ---- scores of heads


def test_repeated_ids_are_all_different_and_come_twice():
    twice = repeated_ids(54, 6, 100)
    equal((twice.shape, twice[:, :6].tolist()), ((100, 12), twice[:, 6:].tolist()))
    assert all(len(set(row)) == 6 for row in twice.tolist())
    assert len(twice.unique()) == 54 and twice.max() == 53
    equal(repeated_ids(54, 6, 2), repeated_ids(54, 6, 2))
    assert (repeated_ids(54, 6, 2, seed=1) != twice[:2]).any()
    refuses(lambda: repeated_ids(54, 55), 'length=55: choose from 2 to 54')


def scores_reference(maps, ids):
    "Slow and obvious: the scores of one head, sequences (B, T)"
    found = dict(previous=[], induction=[], duplicate=[])
    for w, row in zip(maps.tolist(), ids.tolist()):
        for t in range(len(row)):
            copies = [s for s in range(t) if row[s] == row[t]]
            if t:
                found['previous'].append(w[t][t - 1])
            if copies:
                found['induction'].append(sum(w[t][s + 1] for s in copies))
                found['duplicate'].append(sum(w[t][s] for s in copies))
    return {name: sum(each) / len(each) for name, each in found.items()}


def test_scores_are_those_of_plain_loops():
    noise = torch.rand(3, 2, 2, 9, 9, generator=rng(0, 'noise')).tril()
    noise = noise / noise.sum(-1, keepdim=True)
    few = torch.randint(4, (3, 9), generator=rng(1, 'noise'))
    for layer, head in ((0, 1), (1, 0)):
        close(
            [s[layer, head].item() for s in head_scores(noise, few).values()],
            [*scores_reference(noise[:, layer, head], few).values()],
            eps=1e-6,
        )
    refuses(lambda: head_scores(noise, few[0]), 'do not fit ids of shape (9,)')
    refuses(lambda: head_scores(noise[0], torch.arange(9)), 'no token of this text comes twice')


def test_a_uniform_head_has_the_scores_that_can_be_written_down():
    equal(uniform_attention(3), torch.tensor([[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3] * 3]))
    found = head_scores(uniform_attention(12)[None, None], repeated_ids(54, 6, 1)[0])
    close(found['induction'].item(), sum(1 / (t + 1) for t in range(6, 12)) / 6, eps=1e-6)
    close(found['previous'].item(), sum(1 / (t + 1) for t in range(1, 12)) / 11, eps=1e-6)


def test_the_picture_of_scores_names_the_highest():
    looks_at = [[0, *range(11)], [5] * 6 + [*range(1, 7)], [5] * 6 + [*range(6)]]
    pure = torch.stack([torch.eye(12)[at] for at in looks_at] + [uniform_attention(12)])[None]
    twice = repeated_ids(54, 6, 1)
    found = head_scores(pure, twice[0])
    fig = plot_scores(found, head_scores(uniform_attention(12)[None, None], twice[0]))
    equal(
        [ax.get_title('left').splitlines()[0] for ax in fig.axes],
        ['previous: 1.00, head 0.0', 'induction: 1.00, head 0.1', 'duplicate: 1.00, head 0.2'],
    )
    numbers = [t.get_text() for t in fig.axes[1].texts]
    equal(numbers, [f'{x:.2f}' for x in found['induction'][0].tolist()])
    pyplot().close(fig)


# ---- the logit lens


def test_the_lens_ends_in_the_models_own_answer_for_any_recipe(model, ids):
    equal(logit_lens(model, ids)[0], logit_lens(model, ids[0]))
    attn = part(Attention, mask=part(upto))
    odd = MiniGPT(GPTConfig(tie=True, norm=part(nn.RMSNorm), dropout=0.5, attn=attn)).train()
    ctx = dict(i=torch.arange(3, 15), limit=9)
    seen = logit_lens(odd, IDS, **ctx)
    assert odd.training  # in evaluation mode only while it was read
    equal(seen[:, -1], logits(odd.eval(), IDS, **ctx))
    assert (seen[:, :-1] != seen[:, -1:]).any(-1).all()
    assert (seen != logit_lens(odd, IDS, limit=9)).any()


def test_the_lens_reads_what_the_parts_give_when_run_by_hand(model, ids):
    lens, i = logit_lens(model, ids), torch.arange(17)
    equal(lens.shape, (1, 3, 17, TOK.vocab_size))
    equal(lens[:, -1], logits(model, ids))
    with torch.no_grad():
        x = model.pos(model.tok(ids), i)
        equal(lens[:, 0], model.lm_head(model.norm(x)))
        equal(lens[:, 1], model.lm_head(model.norm(model.blocks[0](x, i, contiguous=True))))


def test_the_lens_leaves_no_hook_behind_after_an_error(model, ids):
    refuses(lambda: logit_lens(model, ids.repeat(1, 99)), 'max_len is')
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class HostileTokenizer:
    decode = staticmethod(lambda ids: HOSTILE[ids[0]])


def test_the_page_of_the_lens():
    sure = torch.full((2, 3, 3), -9.0)
    sure[0, :, 0] = sure[1, :, 2] = 9.0
    page = Page(lens_html(sure, HOSTILE, HostileTokenizer))
    equal([page.tags.count(t) for t in ('tr', 'td')], [3, 12])
    equal(page.bold, [visible_token(HOSTILE[2])])  # what then really came
    rows = page.text.split('read')[0]
    assert rows.index('layer 0') < rows.index('embedding')  # the last on top
    equal(
        page.tips[1].splitlines()[:2],
        ['layer 0, after “<script>alert(1)</script>”:', f'{visible_token(HOSTILE[2])} 1.00'],
    )
    refuses(lambda: lens_html(sure, 'ab', HostileTokenizer), '(2, 3, 3) do not fit 2 tokens')


def test_a_page_prints_one_line_and_is_kept_as_a_file(maps_of_text, monkeypatch, tmp_path):
    weights, tokens = maps_of_text
    monkeypatch.setenv('LLM_LAB_STILL', '1')
    page = attention_map(weights, tokens, 1)
    said = str(page)
    assert said.startswith(f'attention maps of 2 layers, 4 heads and {len(tokens)} tokens: ')
    assert ".save('map.html')" in said and '<' not in said and '\n' not in said
    equal(page._repr_html_(), attention_html(weights, tokens, 1))
    path = page.save(tmp_path / 'new' / 'map.html')
    written = path.read_text(encoding='utf-8')
    assert written.startswith('<!doctype html><meta charset="utf-8">')
    assert page.data in written and written.count('<body>') == 1


def test_maps_of_another_models_tokenizer_are_refused(model):
    more = CharTokenizer(TOK.chars + 'äö')
    refuses(
        lambda: attention_of(model, more, 'On'),
        f'the tokenizer has {more.vocab_size} ids, the model {TOK.vocab_size}: give',
    )


def test_a_text_in_the_place_of_ids_is_told_in_one_line():
    model = MiniGPT(GPTConfig(vocab_size=TOK.vocab_size, d_model=16, n_layers=1, n_heads=2))
    for call in (
        lambda: logit_lens(model, TOK, TEXT),
        lambda: logit_lens(model, TEXT),
        lambda: hidden_states(model, TOK, TEXT),
        lambda: attention_maps(model, TEXT),
    ):
        refuses(call, 'give the ids of a text, as in logit_lens(model, tok.encode(text))')
    refuses(lambda: attention_of(model, TOK, [TEXT]), 'give one text; the maps of several are')


# ---- the exercises

cell = partial(code_cell, '27_looking')


@pytest.fixture(scope='module')
def lesson():
    "One run of the chapter's model, and the cells of the exercises"
    names = dict(vars(chapter), check=check, math=math, F=F, show=lambda fig: None)
    for text in ('from string import', 'tok = CharTokenizer', 'def train_copier('):
        exec(cell(text).replace('for seed in range(3)', 'for seed in range(1)'), names)
    for text in ('def logit_difference(', 'def trace(model', 'def induction_map(', 'def my_path('):
        exec(cell(text), names)
    return names


(
    test_a_right_answer_is_told_so,
    test_a_wrong_answer_meets_a_counter_example,
    test_an_exercise_that_nobody_has_done_says_so,
) = exercise_tests(
    answers.ANSWERS,
    dict(
        induction_map=('induction_map_spec', 'cases'),
        my_path=('measured_path', None),
    ),
)


def test_what_the_third_exercise_breaks_turns_red(lesson):
    "The first assertion, those that follow, and nothing else than assertions"
    names = dict(lesson, test_close=close, plot_scores=lambda *scores: None)
    exec(cell('def bits_by_block('), names)
    red = [cell(text) for text in ('pure = torch.stack(', 'uniform = head_scores(')]
    red.append(cell('def first_step('))
    right = cell('def head_scores(')
    for source in red:
        exec(source, names)
    broken = right.replace('same.roll(1, -1)', 'same')
    assert broken != right
    exec(broken, names)
    for source in red:
        with pytest.raises(AssertionError):
            exec(source, names)
    equal(names['halfway'][0][1], math.inf)
