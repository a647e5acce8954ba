"Answers to the exercises of `28_optim`, right and wrong ones; `test_optim.py` runs them."

A, B, C = 3.4445, -4.7750, 2.0315


def _size(g):
    return g.norm(dim=(-2, -1), keepdim=True)


def _rounds(x, steps, c=C):
    for _ in range(steps):
        xxt = x @ x.mT
        x = A * x + (B * xxt + c * xxt @ xxt) @ x
    return x


def my_newton_schulz(g, steps):
    "Right: as in the chapter, and zeros stay zeros"
    return _rounds(g / _size(g).clamp_min(1e-7), steps)


def on_the_smaller_side(g, steps):
    "Right: the same on the transposed matrices where they are tall"
    tall = g.shape[-2] > g.shape[-1]
    return my_newton_schulz(g.mT, steps).mT if tall else my_newton_schulz(g, steps)


def one_norm_for_the_stack(g, steps):
    "Wrong: the small matrices of the stack start too small"
    return _rounds(g / g.norm().clamp_min(1e-7), steps)


def not_divided(g, steps):
    "Wrong: singular values above 1 run away"
    return _rounds(g, steps)


def by_the_largest_entry(g, steps):
    "Wrong: a singular value may be larger than every entry"
    return _rounds(g / g.abs().amax((-2, -1), keepdim=True).clamp_min(1e-7), steps)


def no_fifth_power(g, steps):
    "Wrong: only two of the three terms"
    return _rounds(g / _size(g).clamp_min(1e-7), steps, c=0.0)


def one_round_too_many(g, steps):
    "Wrong"
    return my_newton_schulz(g, steps + 1)


def zeros_are_lost(g, steps):
    "Wrong: 0/0 is NaN"
    return _rounds(g / _size(g), steps)


def agreement():
    "Right: rate · g; ten times that; a whole rate; a rate · (1 − β)/(1 + β)"
    return [0.001, 0.01, 0.1, 0.005]


def adam_is_small_too():
    "Wrong: Adam divides the size of the gradient away"
    return [0.001, 0.01, 0.001, 0.0]


def alternating_is_nothing():
    "Wrong: the latest gradient counts a little more than the one before"
    return [0.001, 0.01, 0.1, 0.0]


# {the function of the exercise: (right answers, wrong ones)}
ANSWERS = {
    'my_newton_schulz': (
        [my_newton_schulz, on_the_smaller_side],
        [
            not_divided,
            one_norm_for_the_stack,
            by_the_largest_entry,
            no_fifth_power,
            one_round_too_many,
            zeros_are_lost,
        ],
    ),
    'guess': ([agreement], [adam_is_small_too, alternating_is_nothing]),
}
