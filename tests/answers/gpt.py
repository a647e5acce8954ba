"Answers to the exercises of `22_gpt`, right and wrong ones; `test_gpt.py` runs them"

import torch
from torch.nn import functional as F

# ---- 1, build it: the block


def _linear(x, w, name):
    return x @ w[f'{name}.weight'].T + w[f'{name}.bias']


def _norm(x, w, name):
    return F.layer_norm(x, x.shape[-1:], w[f'{name}.weight'], w[f'{name}.bias'])


def _attention(x, w, n_heads, causal=True):  # (B, T, C) → (B, T, C)
    q, k, v = (
        t.unflatten(-1, (n_heads, -1)).transpose(1, 2)  # (B, H, T, D)
        for t in _linear(x, w, 'attn.qkv').chunk(3, dim=-1)
    )
    found = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return _linear(found.transpose(1, 2).flatten(2), w, 'attn.out')


def _mlp(x, w, approximate='tanh'):  # (B, T, C) → (B, T, C)
    return _linear(F.gelu(_linear(x, w, 'mlp.up'), approximate=approximate), w, 'mlp.out')


def pre_norm(x, w, n_heads):
    "Right"
    x = x + _attention(_norm(x, w, 'norm1'), w, n_heads)
    return x + _mlp(_norm(x, w, 'norm2'), w)


def by_hand(x, w, n_heads):
    "Right: the norm, the heads and the activation function in plain formulas"

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        size = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / size * w[f'{name}.weight'] + w[f'{name}.bias']

    T, C = x.shape[-2:]
    q, k, v = _linear(norm(x, 'norm1'), w, 'attn.qkv').split(C, dim=-1)
    found = []
    for heads in zip(*(t.chunk(n_heads, dim=-1) for t in (q, k, v))):
        query, key, value = heads  # (B, T, D)
        scores = query @ key.mT / (C // n_heads) ** 0.5
        weights = scores.exp() * torch.ones(T, T).tril()
        found.append(weights / weights.sum(-1, keepdim=True) @ value)
    x = x + _linear(torch.cat(found, -1), w, 'attn.out')
    up = _linear(norm(x, 'norm2'), w, 'mlp.up')
    inner = (2 / torch.pi) ** 0.5 * (up + 0.044715 * up**3)
    return x + _linear(up / 2 * (1 + inner.tanh()), w, 'mlp.out')


def post_norm(x, w, n_heads):
    "Wrong: norms after the additions"
    x = _norm(x + _attention(x, w, n_heads), w, 'norm1')
    return _norm(x + _mlp(x, w), w, 'norm2')


def replaced(x, w, n_heads):
    "Wrong: nothing is added"
    x = _attention(_norm(x, w, 'norm1'), w, n_heads)
    return _mlp(_norm(x, w, 'norm2'), w)


def side_by_side(x, w, n_heads):
    "Wrong: the MLP reads the stream as it was before attention"
    found = _attention(_norm(x, w, 'norm1'), w, n_heads)
    return x + found + _mlp(_norm(x, w, 'norm2'), w)


def stream_is_the_norm(x, w, n_heads):
    "Wrong: adds to the normalized copy instead of the stream"
    x = _norm(x, w, 'norm1')
    x = x + _attention(x, w, n_heads)
    x = _norm(x, w, 'norm2')
    return x + _mlp(x, w)


def reads_the_future(x, w, n_heads):
    "Wrong: no mask"
    x = x + _attention(_norm(x, w, 'norm1'), w, n_heads, causal=False)
    return x + _mlp(_norm(x, w, 'norm2'), w)


def one_head(x, w, n_heads):
    "Wrong: one head, whatever n_heads says"
    return pre_norm(x, w, 1)


def exact_gelu(x, w, n_heads):
    "Wrong: the activation function is not GPT-2's, though nearly"
    x = x + _attention(_norm(x, w, 'norm1'), w, n_heads)
    return x + _mlp(_norm(x, w, 'norm2'), w, approximate='none')


def norm_over_time(x, w, n_heads):
    "Wrong: the edit of the exercise *break it*"
    x = x + _attention(x - x.mean(1, keepdim=True), w, n_heads)
    return x + _mlp(_norm(x, w, 'norm2'), w)


RIGHT = [pre_norm, by_hand]
WRONG = [
    post_norm,
    replaced,
    side_by_side,
    stream_is_the_norm,
    reads_the_future,
    one_head,
    exact_gelu,
    norm_over_time,
]


# ---- 2, predict: does the order matter without positions?


def only_behind_a_mask():
    "Right: the second block reads what the first has gathered, and the mask made that unequal"
    return False, True, False


def always_a_set():
    "Wrong: forgets the second block"
    return False, False, False


def depth_is_enough():
    "Wrong: forgets the mask"
    return False, True, True


def the_mask_is_enough():
    "Wrong: the mask lets the last position read all, so one block sees a set"
    return True, True, False


RIGHT_GUESSES = [only_behind_a_mask]
WRONG_GUESSES = [always_a_set, depth_is_enough, the_mask_is_enough]
