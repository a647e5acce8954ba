"Chapter 6 against the model that the world uses: the same weights give the same logits, gradients and texts as transformers' GPT-2."
import pytest
import torch
from torch.nn import functional as F

from llm_lab.gpt import Config, MiniGPT
from llm_lab.lab import rng
from llm_lab.sample import generate

transformers = pytest.importorskip('transformers', reason='pip install transformers')

SHAPES = [dict(vocab_size=65, max_len=32, d_model=48, n_layers=2, n_heads=4),
          dict(vocab_size=17, max_len=9, d_model=8, n_layers=1, n_heads=1),
          dict(vocab_size=300, max_len=64, d_model=128, n_layers=4, n_heads=4, tie=True),
          dict(vocab_size=101, max_len=16, d_model=30, n_layers=3, n_heads=5),
          dict(vocab_size=50, max_len=24, d_model=64, n_layers=2, n_heads=8, tie=True)]


def names(n_layers, tie):
    "(our parameter, theirs, is theirs stored transposed?)"
    yield 'tok.weight', 'transformer.wte.weight', False
    yield 'pos.table.weight', 'transformer.wpe.weight', False
    for n in range(n_layers):
        for ours, theirs, turned in [('norm1', 'ln_1', False), ('attn.qkv', 'attn.c_attn', True), ('attn.out', 'attn.c_proj', True),
                                     ('norm2', 'ln_2', False), ('mlp.up', 'mlp.c_fc', True), ('mlp.out', 'mlp.c_proj', True)]:
            yield f'blocks.{n}.{ours}.weight', f'transformer.h.{n}.{theirs}.weight', turned
            yield f'blocks.{n}.{ours}.bias', f'transformer.h.{n}.{theirs}.bias', False
    for end in ('weight', 'bias'): yield f'norm.{end}', f'transformer.ln_f.{end}', False
    if not tie: yield 'head.weight', 'lm_head.weight', False


def pair(shape, seed):
    "Our model and theirs with the same random weights, and the list of names"
    ours = MiniGPT(Config(**shape), seed=seed)
    cfg = transformers.GPT2Config(
        vocab_size=shape['vocab_size'], n_positions=shape['max_len'], n_embd=shape['d_model'], n_layer=shape['n_layers'],
        n_head=shape['n_heads'], resid_pdrop=0., embd_pdrop=0., attn_pdrop=0., tie_word_embeddings=shape.get('tie', False),
        bos_token_id=0, eos_token_id=0)
    theirs = transformers.GPT2LMHeadModel(cfg)
    a, b, table = dict(ours.named_parameters()), dict(theirs.named_parameters()), list(names(shape['n_layers'], shape.get('tie', False)))
    assert {n for n, _, _ in table} == a.keys() and {n for _, n, _ in table} == b.keys()  # no weight is forgotten on either side
    draw = rng(seed, 'weights')
    with torch.no_grad():
        for mine, other, turned in table:
            a[mine].copy_(torch.randn(a[mine].shape, generator=draw)*.15 + (mine.endswith('weight') and 'norm' in mine))
            b[other].copy_(a[mine].T if turned else a[mine])
    return ours, theirs, [(mine, a[mine], b[other], turned) for mine, other, turned in table]


@pytest.mark.parametrize('seed', range(len(SHAPES)))
def test_logits_and_gradients_equal_gpt2(seed):
    shape = SHAPES[seed]
    ours, theirs, weights = pair(shape, seed)
    ids = torch.randint(shape['vocab_size'], (3, shape['max_len']), generator=rng(seed, 'ids'))
    got, want = ours(ids), theirs(ids).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    for logits in (got, want): F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, mine, other, turned in weights:
        torch.testing.assert_close(mine.grad, other.grad.T if turned else other.grad, rtol=0, atol=1e-5, msg=lambda m: f'{name}: {m}')


def test_greedy_text_equals_gpt2():
    ours, theirs, _ = pair(SHAPES[0], 7)
    ids = torch.randint(65, (2, 4), generator=rng(7, 'prompt'))
    got = torch.stack(list(generate(ours, ids, 20, temperature=0)), 1)
    want = theirs.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, min_new_tokens=20, do_sample=False,
                                  eos_token_id=None, pad_token_id=0)
    assert got.tolist() == want[:, 4:].tolist()


def test_the_oracle_can_tell_a_difference():
    "The exact GELU instead of the tanh form is another model, and the tolerance above sees it"
    from torch import nn
    from llm_lab.gpt import MLP, part
    ours, theirs, weights = pair(SHAPES[0], 0)
    other = MiniGPT(Config(**SHAPES[0], mlp=part(MLP, act=part(nn.GELU))))
    other.load_state_dict(ours.state_dict())
    ids = torch.randint(65, (3, 32), generator=rng(0, 'ids'))
    assert (other(ids) - theirs(ids).logits).abs().max() > 1e-5
