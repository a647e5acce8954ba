"Answers to the exercises of `20_parts`, right and wrong ones; `test_parts.py` runs them."

from functools import partial

from llm_lab.parts import part


def by_recursion(recipe, path, value):
    "Right: the inner recipe is changed first, then the one that holds it"
    first, *rest = path
    if rest:
        value = by_recursion(recipe.keywords[first], rest, value)
    return part(recipe, **{first: value})


def from_the_inside(recipe, path, value):
    "Right: a loop, from the end of the path"
    held = [recipe]
    for name in path[:-1]:
        held.append(held[-1].keywords[name])
    for one, name in zip(reversed(held), reversed(path)):
        value = part(one, **{name: value})
    return value


def only_the_top(recipe, path, value):
    "Wrong: the last name of the path becomes a keyword of the whole recipe"
    return part(recipe, **{path[-1]: value})


def the_inner_one(recipe, path, value):
    "Wrong: gives the changed inner recipe, and not the tree that holds it"
    first, *rest = path
    if rest:
        return the_inner_one(recipe.keywords[first], rest, value)
    return part(recipe, **{first: value})


def forgets_the_others(recipe, path, value):
    "Wrong: a new recipe, without the other keywords"
    first, *rest = path
    if rest:
        value = forgets_the_others(recipe.keywords[first], rest, value)
    return part(recipe.func, **{first: value})


def bare_partial(recipe, path, value):
    "Wrong: what it makes is no `part`, and equal to none"
    first, *rest = path
    if rest:
        value = bare_partial(recipe.keywords[first], rest, value)
    return partial(recipe.func, **{**recipe.keywords, first: value})


RIGHT = [by_recursion, from_the_inside]
WRONG = [only_the_top, the_inner_one, forgets_the_others, bare_partial]


def hashes_collide():
    "Right: the hash reads names only"
    return False, True, 2


def hashes_tell_values_apart():
    "Wrong: what most people guess"
    return False, False, 2


def a_collision_costs_an_element():
    "Wrong: a set compares what collides"
    return False, True, 1


RIGHT_GUESSES = [hashes_collide]
WRONG_GUESSES = [hashes_tell_values_apart, a_collision_costs_an_element]

ANSWERS = dict(
    replaced=(RIGHT, WRONG),
    my_guess=(RIGHT_GUESSES, WRONG_GUESSES),
)
