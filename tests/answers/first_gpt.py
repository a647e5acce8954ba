"Answers to the exercise of `10_first_gpt`, right and wrong ones; `test_first_gpt.py` runs them."

import math

import torch


def _scores(q, k):
    return q @ k.T / math.sqrt(q.shape[1])


def _future(scores):
    return torch.ones_like(scores).triu(1).bool()


def in_three_lines(q, k, v):
    "Right: as the page does it, for one sequence"
    scores = _scores(q, k)
    weights = scores.masked_fill(_future(scores), -math.inf).softmax(dim=1)
    return weights @ v


def by_exponentials(q, k, v):
    "Right: the softmax written out"
    weights = _scores(q, k).exp().tril()
    return weights / weights.sum(1, keepdim=True) @ v


def no_mask(q, k, v):
    "Wrong: reads the future"
    return _scores(q, k).softmax(dim=1) @ v


def not_scaled(q, k, v):
    "Wrong: without √D"
    scores = q @ k.T
    return scores.masked_fill(_future(scores), -math.inf).softmax(dim=1) @ v


def over_queries(q, k, v):
    "Wrong: the columns sum to 1, and not the rows"
    scores = _scores(q, k)
    return scores.masked_fill(_future(scores), -math.inf).softmax(dim=0) @ v


def masked_afterwards(q, k, v):
    "Wrong: the rows no longer sum to 1"
    return _scores(q, k).softmax(dim=1).tril() @ v


def without_itself(q, k, v):
    "Wrong: a token does not read itself, and the first one reads nothing"
    scores = _scores(q, k)
    past = torch.ones_like(scores).tril(-1).bool()
    return scores.masked_fill(~past, -math.inf).softmax(dim=1) @ v


def zero_for_the_future(q, k, v):
    "Wrong: a score of 0 is no weight of 0"
    return _scores(q, k).tril().softmax(dim=1) @ v


def scaled_by_length(q, k, v):
    "Wrong: divides by the root of T"
    scores = q @ k.T / math.sqrt(len(q))
    return scores.masked_fill(_future(scores), -math.inf).softmax(dim=1) @ v


RIGHT = [in_three_lines, by_exponentials]
WRONG = {  # and the idea that the page says is missing
    no_mask: 'the mask',
    not_scaled: 'the scale',
    over_queries: 'the softmax',
    masked_afterwards: 'the softmax',
    without_itself: 'off by one',
    zero_for_the_future: 'the mask',
    scaled_by_length: 'the scale',
}
