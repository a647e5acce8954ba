"Answers to the exercises of `21_self_attention`, right and wrong; for `test_self_attention.py`"

import math

import torch

# ---- 1, build it: many heads


def _split(t, H):
    "(T, C) → (H, T, D)"
    return t.unflatten(1, (H, -1)).transpose(0, 1)


def _attend(q, k, v, scale):
    scores = q @ k.mT * scale
    future = torch.ones_like(scores).triu(1).bool()
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


def _join(t):
    "(H, T, D) → (T, C)"
    return t.transpose(0, 1).flatten(1)


def by_unflatten(x, w_qkv, w_out, H):
    "Right: the heads become the first dimension"
    q, k, v = (_split(t, H) for t in (x @ w_qkv).chunk(3, dim=1))
    return _join(_attend(q, k, v, q.shape[-1] ** -0.5)) @ w_out


def by_einsum(x, w_qkv, w_out, H):
    "Right: the same, with the sums named"
    T, C = x.shape
    q, k, v = (x @ w_qkv).view(T, 3, H, C // H).unbind(1)  # (T, H, D) each
    scores = torch.einsum('thd,shd->hts', q, k) / math.sqrt(C // H)
    weights = (scores.exp()).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum('hts,shd->thd', weights, v).flatten(1) @ w_out


def no_mask(x, w_qkv, w_out, H):
    "Wrong: reads the future"
    q, k, v = (_split(t, H) for t in (x @ w_qkv).chunk(3, dim=1))
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    return _join(weights @ v) @ w_out


def scaled_by_all_channels(x, w_qkv, w_out, H):
    "Wrong: divides by √C, where a head has D = C/H channels"
    q, k, v = (_split(t, H) for t in (x @ w_qkv).chunk(3, dim=1))
    return _join(_attend(q, k, v, x.shape[1] ** -0.5)) @ w_out


def viewed_without_transpose(x, w_qkv, w_out, H):
    "Wrong: the shapes are right, but a head holds a few positions instead of a few channels"
    T, C = x.shape
    q, k, v = (t.reshape(H, T, C // H) for t in (x @ w_qkv).chunk(3, dim=1))
    return _join(_attend(q, k, v, q.shape[-1] ** -0.5)) @ w_out


def joined_without_transpose(x, w_qkv, w_out, H):
    "Wrong: the heads are split rightly, and joined in the order of memory"
    q, k, v = (_split(t, H) for t in (x @ w_qkv).chunk(3, dim=1))
    return _attend(q, k, v, q.shape[-1] ** -0.5).reshape(x.shape) @ w_out


def one_head_of_all(x, w_qkv, w_out, H):
    "Wrong: one wide head, whatever H says"
    q, k, v = (x @ w_qkv).chunk(3, dim=1)
    return _attend(q, k, v, (x.shape[1] // H) ** -0.5) @ w_out


def not_projected(x, w_qkv, w_out, H):
    "Wrong: the heads are joined, and not mixed"
    q, k, v = (_split(t, H) for t in (x @ w_qkv).chunk(3, dim=1))
    return _join(_attend(q, k, v, q.shape[-1] ** -0.5))


RIGHT_HEADS = [by_unflatten, by_einsum]
WRONG_HEADS = [
    no_mask,
    scaled_by_all_channels,
    viewed_without_transpose,
    joined_without_transpose,
    one_head_of_all,
    not_projected,
]


# ---- 2, build it: a mask with sinks


def near_or_early(i, j, size, n):
    "Right"
    return (j <= i) & ((i - j < size) | (j < n))


def future_of_the_early(i, j, size, n):
    "Wrong: the first n keys are read even by queries before them"
    return (j <= i) & (i - j < size) | (j < n)


def near_and_early(i, j, size, n):
    "Wrong: both are asked of a key"
    return (j <= i) & (i - j < size) & (j < n)


def one_too_many(i, j, size, n):
    "Wrong: a key at distance `size` is one more than asked for"
    return (j <= i) & ((i - j <= size) | (j < n))


RIGHT_SINKS = [near_or_early]
WRONG_SINKS = [future_of_the_early, near_and_early, one_too_many]


# ---- 4, break it: the heads split without a transpose


def viewed(t, H):
    "(B, T, C) → (B, H, T, D), in the wrong order"
    B, T, C = t.shape
    return t.reshape(B, H, T, C // H)


def floor(r, h, T, H):
    "Right: memory is read row by row, and a position fills H slices"
    return (h * T + r) // H


def by_loops(r, h, T, H):
    "Right: the slices counted one by one"
    slices = [position for position in range(T) for _ in range(H)]
    return slices[h * T : (h + 1) * T][r]


def its_own(r, h, T, H):
    "Wrong: as if heads had been moved before positions"
    return r


def slices_of_heads(r, h, T, H):
    "Wrong: the slice, and not the position that it belongs to"
    return h * T + r


def head_by_head(r, h, T, H):
    "Wrong: the rows of a head lie T apart only in a split with a transpose"
    return (r * H + h) // T


RIGHT_POSITIONS = [floor, by_loops]
WRONG_POSITIONS = [its_own, slices_of_heads, head_by_head]
