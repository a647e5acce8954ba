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


def the_answer_waits():
    "Right: the answer stays where it is until the induction head fetches it"
    return 6, 6, 17


def the_old_path():
    "Wrong: the path of the letter that is compared"
    return 5, 6, 17


def one_further():
    "Wrong: takes a step to the right, as the note does"
    return 6, 7, 17


def at_the_end_at_once():
    "Wrong: layer 0 cannot know yet that this letter will be wanted"
    return 6, 17, 17


# {the function of the exercise: (right answers, wrong ones)}
ANSWERS = {
    'induction_map': (
        [by_comparison, by_one_hot],
        [looks_at_the_copy, sees_the_future, sums_to_more, rests_nowhere],
    ),
    'my_path': ([the_answer_waits], [the_old_path, one_further, at_the_end_at_once]),
}
