"Answers to the exercises of `23_train`, right and wrong ones; `test_train.py` runs them."


def _moments(g, m, v, beta1, beta2):
    return beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2


def adamw_step(w, g, m, v, t, lr=0.1, decay=0.1, beta1=0.9, beta2=0.99, eps=1e-8):
    "Right: Loshchilov and Hutter 2019, algorithm 2"
    m, v = _moments(g, m, v, beta1, beta2)
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    return w - lr * decay * w - lr * m_hat / (v_hat**0.5 + eps), m, v


def no_correction(w, g, m, v, t, lr=0.1, decay=0.1, beta1=0.9, beta2=0.99, eps=1e-8):
    "Wrong: the first steps are too long"
    m, v = _moments(g, m, v, beta1, beta2)
    return w - lr * decay * w - lr * m / (v**0.5 + eps), m, v


def decay_in_the_gradient(w, g, m, v, t, lr=0.1, decay=0.1, beta1=0.9, beta2=0.99, eps=1e-8):
    "Wrong: Adam with an L2 penalty, as it was before AdamW"
    return adamw_step(w, g + decay * w, m, v, t, lr, 0.0, beta1, beta2, eps)


def no_root(w, g, m, v, t, lr=0.1, decay=0.1, beta1=0.9, beta2=0.99, eps=1e-8):
    "Wrong: divides by the mean square itself"
    m, v = _moments(g, m, v, beta1, beta2)
    step = m / (1 - beta1**t) / (v / (1 - beta2**t) + eps)
    return w - lr * decay * w - lr * step, m, v


def corrected_moments(w, g, m, v, t, lr=0.1, decay=0.1, beta1=0.9, beta2=0.99, eps=1e-8):
    "Wrong: keeps what should only be used once"
    w, m, v = adamw_step(w, g, m, v, t, lr, decay, beta1, beta2, eps)
    return w, m / (1 - beta1**t), v / (1 - beta2**t)


def decay_without_rate(w, g, m, v, t, lr=0.1, decay=0.1, beta1=0.9, beta2=0.99, eps=1e-8):
    "Wrong: the decay is not multiplied by the learning rate"
    new, m, v = adamw_step(w, g, m, v, t, lr, 0.0, beta1, beta2, eps)
    return new - decay * w, m, v


def stable(step, steps, warmup, down):
    "Right: three bounds, and the lowest holds"
    return min(1.0, (step + 1) / warmup, (steps - step) / down)


def starts_at_zero(step, steps, warmup, down):
    "Wrong: the first step is lost"
    return min(1.0, step / warmup, (steps - step) / down)


def ends_early(step, steps, warmup, down):
    "Wrong: is at 0 one step before the end"
    return min(1.0, (step + 1) / warmup, (steps - 1 - step) / down)


def never_comes_down(step, steps, warmup, down):
    "Wrong: forgets the end"
    return min(1.0, (step + 1) / warmup)


def only_sgd():
    "Right: clipping and AdamW do not notice"
    return 1000, 1, 1


def all_of_them():
    "Wrong"
    return 1000, 1000, 1000


def by_the_root():
    "Wrong: Adam divides by the root of the mean of squares, which grows as the gradient does"
    return 1000, 1, 32


# {the function of the exercise: (right answers, wrong ones)}
ANSWERS = {
    'adamw_step': (
        [adamw_step],
        [no_correction, decay_in_the_gradient, no_root, corrected_moments, decay_without_rate],
    ),
    'wsd': ([stable], [starts_at_zero, ends_early, never_comes_down]),
    'guess': ([only_sgd], [all_of_them, by_the_root]),
}
