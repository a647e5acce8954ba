"Answers to the exercises of `27_looking`, right and wrong ones; `test_looking.py` runs them."

import torch


def by_comparison(ids):
    "Right: compare all pairs, move one to the right, divide"
    after = (ids[:, None] == ids).tril(-1).roll(1, -1).float()
    after[:, 0] = after.sum(-1) == 0  # without a copy, position 0
    return after / after.sum(-1, keepdim=True)


def by_one_hot(ids):
    "Right: whose token before is mine? The product of one-hot vectors is a comparison"
    one_hot = torch.eye(int(ids.max()) + 1)[ids]
    before = torch.cat([torch.zeros_like(one_hot[:1]), one_hot[:-1]])  # the note of each position
    found = (one_hot @ before.T).tril()
    found[:, 0] += found.sum(-1) == 0
    return found / found.sum(-1, keepdim=True)


def looks_at_the_copy(ids):
    "Wrong: a duplicate-token head, one position too early"
    same = (ids[:, None] == ids).tril(-1).float()
    same[:, 0] += same.sum(-1) == 0
    return same / same.sum(-1, keepdim=True)


def sees_the_future(ids):
    "Wrong: later copies count, too"
    after = (ids[:, None] == ids).fill_diagonal_(False).roll(1, -1).float()
    after[:, 0] = 0
    after[:, 0] = after.sum(-1) == 0
    return after / after.sum(-1, keepdim=True)


def sums_to_more(ids):
    "Wrong: the weights of several copies are not divided"
    after = (ids[:, None] == ids).tril(-1).roll(1, -1).float()
    after[:, 0] = after.sum(-1) == 0
    return after


def rests_nowhere(ids):
    "Wrong: without a copy, 0/0"
    after = (ids[:, None] == ids).tril(-1).roll(1, -1).float()
    return after / after.sum(-1, keepdim=True)


def the_query_stays():
    "Right: what is looked for stands in the last column from the start"
    return 17, 17, 17, 3


def as_a_note():
    "Wrong: the path of the letter that is compared"
    return 17, 18, 18, 3


def from_the_block():
    "Wrong: the last letter, not the third, was replaced"
    return 2, 3, 17, 3


def answers_the_letter_itself():
    "Wrong: what followed the letter is copied, not the letter"
    return 17, 17, 17, 2


def answers_as_before():
    "Wrong: the model answers what it is asked, not what the clean run was"
    return 17, 17, 17, 6


# {the function of the exercise: (right answers, wrong ones)}
ANSWERS = {
    'induction_map': (
        [by_comparison, by_one_hot],
        [looks_at_the_copy, sees_the_future, sums_to_more, rests_nowhere],
    ),
    'my_path': (
        [the_query_stays],
        [as_a_note, from_the_block, answers_the_letter_itself, answers_as_before],
    ),
}
