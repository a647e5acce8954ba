"Answers to the exercises of `28_optim`, right and wrong ones; `test_optim.py` runs them."

A, B, C = 3.4445, -4.7750, 2.0315


def _rounds(x, steps, c=C):
    for _ in range(steps):
        xxt = x @ x.mT
        x = A * x + (B * xxt + c * xxt @ xxt) @ x
    return x


def my_newton_schulz(g, steps):
    "Right: as in the chapter, and zeros stay zeros"
    return _rounds(g / g.norm().clamp_min(1e-7), steps)


def on_the_smaller_side(g, steps):
    "Right: the same on the transposed matrix"
    return my_newton_schulz(g.mT, steps).mT


def not_divided(g, steps):
    "Wrong: singular values above 1 run away"
    return _rounds(g, steps)


def by_the_largest_entry(g, steps):
    "Wrong: a singular value may be larger than every entry"
    return _rounds(g / g.abs().max().clamp_min(1e-7), steps)


def no_fifth_power(g, steps):
    "Wrong: only two of the three terms"
    return _rounds(g / g.norm().clamp_min(1e-7), steps, c=0.0)


def one_round_too_many(g, steps):
    "Wrong"
    return my_newton_schulz(g, steps + 1)


def zeros_are_lost(g, steps):
    "Wrong: 0/0 is NaN"
    return _rounds(g / g.norm(), steps)


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
        [not_divided, by_the_largest_entry, no_fifth_power, one_round_too_many, zeros_are_lost],
    ),
    'guess': ([agreement], [adam_is_small_too, alternating_is_nothing]),
}
