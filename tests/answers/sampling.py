"Answers to the exercises of `26_sampling`, right and wrong ones; `test_sampling.py` runs them."


def by_product(p, share):
    "Right: booleans set to zero what goes"
    kept = p * (p >= share * p.max())
    return kept / kept.sum()


def by_filling(p, share):
    "Right: the same with a mask"
    kept = p.masked_fill(p < share * p.max(), 0)
    return kept / kept.sum()


def not_scaled(p, share):
    "Wrong: the rest does not sum to 1"
    return p * (p >= share * p.max())


def of_all(p, share):
    "Wrong: a share of the whole probability, not of the likeliest one's"
    kept = p * (p >= share)
    return kept / kept.sum()


def strictly_more(p, share):
    "Wrong: what has exactly the share goes, too"
    kept = p * (p > share * p.max())
    return kept / kept.sum()


def as_top_p(p, share):
    "Wrong: that is the nucleus"
    ranked, order = p.sort(descending=True)
    ranked[ranked.cumsum(0) - ranked >= share] = 0
    return p.new_zeros(len(p)).scatter(0, order, ranked / ranked.sum())


RIGHT = [by_product, by_filling]
WRONG = [not_scaled, of_all, strictly_more, as_top_p]


def what_stands_before():
    "Right: top-p asks what stands before a token"
    return 2, 2, 2, 1


def with_the_token_itself():
    "Wrong: counts the token itself, so the one that reaches p is lost"
    return 2, 1, 1, 1


def cold_changes_nothing():
    "Wrong: the temperature comes before the cut"
    return 2, 2, 2, 2


RIGHT_GUESSES = [what_stands_before]
WRONG_GUESSES = [with_the_token_itself, cold_changes_nothing]

ANSWERS = dict(
    min_p=(RIGHT, WRONG),
    my_guess=(RIGHT_GUESSES, WRONG_GUESSES),
)
