"""Parts from one file outside the package, tests/own/parts.py: each trains, writes the same with a
cache as without, is opened in a fresh process, and is the same in its fast form."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import near, one_line, shake
from torch.nn import functional as F

import llm_lab as lab
from llm_lab.core import REGISTERED, rng
from llm_lab.sampling import DecodingState

OWN = Path(__file__).resolve().parent / 'own'
T = 24
TOK = lab.CharTokenizer('abcdefghijklmno \n')
# what a fresh process does: it imports the file, opens each package, and prints what it writes
OPENS = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import parts, llm_lab as lab
torch.set_num_threads(1)
for folder in sys.argv[2:]:
    model, tok, _ = lab.load(folder)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    logits = model(ids)[0, -1].double().sum().item()
    print(json.dumps([lab.sample(model, tok, 'ab', max_new_tokens=12, seed=1), logits]))
"""

pytestmark = pytest.mark.usefixtures('one_thread')


def read_own():
    "The file as a module, its parts registered; what others have registered comes back later"
    sys.path.insert(0, str(OWN))
    try:
        import parts
    finally:
        sys.path.remove(str(OWN))
    return parts


BEFORE = dict(REGISTERED)
parts = read_own()
NAMES = {k: f for k, f in REGISTERED.items() if k not in BEFORE}
REGISTERED.clear()
REGISTERED.update(BEFORE)


@pytest.fixture(autouse=True)
def registered():
    before = dict(REGISTERED)
    REGISTERED.update(NAMES)
    yield
    REGISTERED.clear()
    REGISTERED.update(before)


def ids_of(B=2, n=T):
    return torch.randint(17, (B, n), generator=rng(0, 'ids'))


def shaken(name):
    "A model of a case, moved well away from its first weights"
    return shake(lab.MiniGPT(parts.CASES[name]).eval())


each = pytest.mark.parametrize('name', parts.CASES)


@each
def test_it_learns(name):
    model = lab.MiniGPT(parts.CASES[name])
    loss_fn = parts.LOSSES.get(name, lab.next_token_loss)
    before = {n: p.clone() for n, p in model.named_parameters()}
    first = loss_fn(model, ids_of(4, 13)).item()
    lab.fit(model, lambda step: ids_of(4, 13), steps=60, lr=0.01, loss_fn=loss_fn)
    assert loss_fn(model, ids_of(4, 13)).item() < 0.6 * first
    assert [n for n, p in model.named_parameters() if torch.equal(p, before[n])] == []


@each
def test_a_text_in_pieces_with_a_cache_is_the_text_at_once(name):
    model, ids = shaken(name), ids_of(3)
    with torch.no_grad():
        want = model(ids)
    quick = lab.with_kv_cache(model)
    assert len(quick.cache(1, 9)) >= model.cfg.n_layers
    for cut in ([1] * T, [7, 1, 1, 9, 1, 1, 1, 1, 2]):
        reader, at = DecodingState(quick, T), 0
        for piece in ids.split(cut, 1):
            at += piece.shape[1]
            near(reader(piece), want[:, at - 1], 2e-5)
        assert reader.cache
    texts = lab.complete(quick, TOK, ['a', 'hold me'], 9, temperature=0)
    alone = [lab.complete(model, TOK, [p], 9, temperature=0)[0] for p in ('a', 'hold me')]
    assert [c.text for (c,) in texts] == [c.text for (c,) in alone]


@each
def test_a_padded_text_is_the_text_alone(name):
    model, ids = shaken(name), ids_of(2)
    for form in (lab.with_kv_cache(model), model):
        reader = DecodingState(form, T, pad=torch.tensor([5, 0]))
        for end, piece in zip((9, 10, 14), ids[:, :14].split([9, 1, 4], 1)):
            got = reader(piece)
            for row, begin in ((0, 5), (1, 0)):
                with torch.no_grad():
                    near(got[row], model(ids[row : row + 1, begin:end])[0, -1], 2e-5)


@each
def test_no_future_is_read(name):
    model, ids = shaken(name), ids_of(1)
    other = ids.clone()
    other[:, 12:] = (other[:, 12:] + 1) % 17
    with torch.no_grad():
        near(model(ids)[:, :12], model(other)[:, :12])


@each
def test_its_fast_form_is_the_same(name):
    model, ids = shaken(name), ids_of(2)
    quick = lab.for_inference(model)
    reader = DecodingState(quick, T)
    with torch.no_grad():
        want = model(ids)
        near(quick(ids), want, 2e-5)
    near(reader(ids[:, :9]), want[:, 8], 2e-5)
    for t in range(9, T):
        near(reader(ids[:, t : t + 1]), want[:, t], 2e-5)


def test_what_is_saved_is_opened_in_a_fresh_process(tmp_path):
    folders, want = [], []
    for n, name in enumerate(parts.CASES):
        model = lab.with_kv_cache(shaken(name))
        folders.append(str(tmp_path / str(n)))
        lab.save(folders[-1], model, TOK)
        with torch.no_grad():
            logits = model(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]]))[0, -1].double().sum().item()
        want.append([lab.sample(model, TOK, 'ab', max_new_tokens=12, seed=1), logits])
    command = [sys.executable, '-c', OPENS, str(OWN), *folders]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == want
    REGISTERED.clear()
    one_line(lambda: lab.load(folders[1]), 'MLA')


def test_a_state_has_no_end():
    "Sums do not grow with the text, so a model of linear attention alone writes beyond max_len"
    model = shaken('linear attention')
    ids = ids_of(1, 3 * T)
    with torch.no_grad():
        want = model(ids)
    reader = DecodingState(lab.with_kv_cache(model), 3 * T)
    for t, piece in enumerate(ids.split(1, 1)):
        near(reader(piece), want[:, t], 2e-5)
    assert reader.cache


# ---- oracles: the parts are what they say


def test_alibi_is_a_bias_on_the_scores():
    attn = lab.MiniGPT(parts.CASES['ALiBi']).blocks[0].attn
    x = torch.randn(1, T, 32, generator=rng(0, 'x'))
    i = torch.arange(T)
    q, k, v = attn.project(x)
    slopes = torch.tensor([2**-2, 2**-4, 2**-6, 2**-8])[:, None, None]
    scores = q @ k.mT / 8**0.5 - slopes * (i[:, None] - i)
    scores = scores.masked_fill(i > i[:, None], -torch.inf)
    want = attn.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    near(attn(x, i), want)


def test_linear_attention_is_its_sum():
    mixer = lab.MiniGPT(parts.CASES['linear attention']).blocks[0].attn
    x = torch.randn(1, 5, 32, generator=rng(0, 'x'))
    q, k, v = (t.view(5, 4, 8) for t in mixer.qkv(x)[0].split(mixer.sizes, -1))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    weights = torch.einsum('thd,shd->hts', q, k).tril()
    want = (weights / weights.sum(-1, keepdim=True)) @ v.transpose(0, 1)
    near(mixer(x, torch.arange(5))[0], mixer.out(want.transpose(0, 1).flatten(1)))


def test_experts_choose_in_training_and_tokens_when_a_text_is_written():
    logits = torch.randn(12, 4, generator=rng(0, 'logits'))
    w, chosen, _ = parts.expert_choice(logits, 2, torch.zeros(4), training=True)
    assert ((w > 0).sum(0) == 6).all()  # N·k/E = 6 tokens each: balanced by construction
    w, chosen, _ = parts.expert_choice(logits, 2, torch.zeros(4))
    assert chosen.shape == (12, 2)
    model = shaken('expert choice')
    seen = {}
    for training in (True, False):
        aux = lab.Aux()
        model.train(training)(ids_of(1), aux=aux)
        seen[training] = aux.terms[0]['chosen'].shape[1]
    assert seen == {True: 4, False: 2}
