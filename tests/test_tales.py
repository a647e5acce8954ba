"""`tales`: the odd cases: settings, texts that are no tales, chance, edges of spans, exercises."""

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
from answers import tales as answers
from helpers import cells_of, exercise_tests

from llm_lab import tales as chapter
from llm_lab.core import LabError, check
from llm_lab.tales import (
    ATTRIBUTES,
    END,
    POOLS,
    Piece,
    TalesConfig,
    Teller,
    _story,
    _Writer,
    char_surprisal,
    entropy_of,
    entropy_rate,
    parse,
    parse_tale,
    recall_question,
    split_excess,
    tale_bits,
    tiny_tales,
    valid_prefix,
    write_tale,
)


def test_settings_stand_in_this_order():
    assert TalesConfig() == TalesConfig(16, 1, 1, 0)


@pytest.mark.parametrize(
    'wrong', [dict(richness=1), dict(distance=-1), dict(recall=4), dict(questions=0.5)]
)
def test_settings_that_no_tale_can_have(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(LabError, match=f'{name}={value}: give a whole number'):
        TalesConfig(**wrong)


def test_a_template_of_nothing_but_a_head():
    assert parse(' The end.') == (' The end.', [])
    assert parse('{it}') == ('', [('recall', 'it', '')])


def test_a_template_is_read_slot_by_slot():
    head, slots = parse('Once {hero=name} took {hero.his} {*size} {pet=animal}s.')
    assert head == 'Once '
    assert slots == [
        ('draw', 'hero', 'name'),
        ('say', ' took ', None),
        ('recall', 'hero', 'his'),
        ('say', ' ', None),
        ('draw', '', 'size'),
        ('say', ' ', None),
        ('draw', 'pet', 'animal'),
        ('say', 's.', None),
    ]


def test_the_entropy_of_words():
    assert entropy_of(tuple(POOLS['name'])) == 4
    assert entropy_of(tuple(ATTRIBUTES['he'].values())) == 1


class First(Teller):
    "Always takes the first option"

    def pick(self, options, weights):
        return 0


def test_a_distance_is_counted_from_the_last_mention():
    t = First(TalesConfig())
    assert t.tell('Once {hero=name} met {friend=name}.', 'The end.') == 0
    t.tell(' Soon {hero.he} went home.')
    t.tell(' What did {hero.he} see?')
    assert t.pieces[-2].distance == len(' went home. What did ')


def test_nobody_meets_himself():
    t = First(TalesConfig())
    t.tell('Once {hero=name} met {friend=name}.', 'The end.')
    t.tell(' Soon {hero.he} went home.')
    assert ''.join(p.text for p in t.pieces) == 'Once Mia met Tom. Soon she went home.'
    assert [p.label for p in t.pieces if p.kind == 'choice'] == ['way', 'name', 'name']
    she = next(p for p in t.pieces if p.kind == 'recall')
    assert (she.text, she.worth, she.distance) == ('she', 1, len(' met Tom. Soon '))


@pytest.mark.parametrize('weights,limit', [((1, 1, 1, 1), 16), ((3, 1, 4), 14)])
def test_the_writer_draws_as_often_as_it_should(weights, limit, n=20_000):
    writer = _Writer(TalesConfig(), 'fair')
    seen = Counter(writer.pick(weights, weights) for _ in range(n))
    expected = [n * weight / sum(weights) for weight in weights]
    chi_squared = sum((seen[k] - e) ** 2 / e for k, e in enumerate(expected))
    assert chi_squared < limit  # at one in a thousand


SETTINGS = [TalesConfig(*k) for k in product((2, 8), (0, 5), (0, 3), (0, 4))]


@pytest.mark.parametrize('cfg', SETTINGS)
def test_tales_of_all_settings_are_read_back(cfg):
    for seed in range(20):
        assert parse_tale(write_tale(seed, cfg), cfg) == _story(_Writer(cfg, seed)), seed


def test_what_is_no_tale():
    with pytest.raises(LabError, match="nothing fits 'Long ago' at 0"):
        parse_tale('Long ago')
    with pytest.raises(LabError, match="nothing fits '!'"):
        parse_tale(write_tale(1) + '!')
    with pytest.raises(LabError, match="nothing fits ''"):
        parse_tale(write_tale(1)[:-1])
    assert valid_prefix('Hello') == 0


def test_a_mistake_is_found_at_its_piece():
    tale = next(t for t in map(write_tale, range(99)) if ' Soon she saw ' in t)
    assert valid_prefix(tale) == len(tale)
    wrong = tale.replace('Soon she', 'Soon he')
    assert valid_prefix(wrong) == tale.index(' Soon she') + len(' Soon ')


def test_the_bits_of_a_tale_are_those_of_its_probability():
    chosen = [p for p in parse_tale(write_tale(27)) if p.options]
    probabilities = [p.weights[p.options.index(p.text)] / sum(p.weights) for p in chosen]
    assert 2 ** -tale_bits(write_tale(27)) == pytest.approx(math.prod(probabilities))


def test_surprisal_is_there_for_each_character():
    tale = write_tale(27)
    a = char_surprisal(tale)
    assert [len(x) for x in a] == [len(tale)] * 3
    assert (a.distance[a.kind != 'recall'] == 0).all()


def test_the_floor_counts_end_marks(n=6_000):
    tales = [_story(_Writer(TalesConfig(), f'check/{seed}')) for seed in range(n)]
    bits = [sum(piece.bits for piece in pieces) for pieces in tales]
    chars = [sum(len(piece.text) for piece in pieces) for pieces in tales]
    text = ''.join(piece.text for pieces in tales for piece in [*pieces, Piece('', '', END)])
    error = np.std(bits) / n**0.5 / np.mean(chars)
    assert abs(sum(bits) / len(text) - entropy_rate()) < 3 * error
    # the sample is large enough to see the difference: without end marks it is outside
    assert abs(sum(bits) / sum(chars) - entropy_rate()) > 3 * error


def test_a_question_must_be_asked_for():
    with pytest.raises(LabError, match='questions=0: give a config with at least 1'):
        recall_question(1, TalesConfig())


def test_a_recall_at_the_edge_of_a_span_belongs_to_it():
    tales = tiny_tales(2_000).documents('train')[:600]
    truths = [char_surprisal(tale) for tale in tales]
    for distance, kind in ((64, 'recall ≤64'), (65, 'recall ≤128'), (129, 'recall >128')):
        at_the_edge = []
        losses = []
        for tale, truth in zip(tales, truths):
            worse = truth.distance == distance
            # a tale without such a recall, at its floor, would add zeros: twenty of them are enough
            if worse.any() or len(at_the_edge) < 20:
                at_the_edge.append(tale)
                losses.append(np.append(truth.bits + worse, [0, 0]))
        parts = split_excess(at_the_edge, losses)
        assert {k for k, bits in parts.items() if bits} == {kind}


def test_each_character_needs_a_loss():
    with pytest.raises(LabError, match='1 losses for a tale of 3 characters'):
        split_excess(['x'], [[1.0]])


# ---- the exercises


@pytest.fixture(scope='module')
def lesson():
    "The names that the exercises use: the small language, its entropy, and their own cells"
    sources = cells_of('13_tales')
    names = dict(vars(chapter), check=check, product=product)
    (language,) = [source for source in sources if 'def all_tales(' in source]
    exec(language[: language.index('\n\ntiny = ')], names)
    (entropy,) = [source for source in sources if 'def entropy(' in source]
    exec(entropy[: entropy.index('\ntest_close')], names)
    for name in answers.ANSWERS:
        (spec,) = [source for source in sources if f'def {name}_spec(' in source]
        exec(spec, names)
        (stub,) = [source for source in sources if source.startswith(f'def {name}(')]
        exec(stub, names)
    return names


(
    test_a_right_answer_is_told_so,
    test_a_wrong_answer_meets_a_counter_example,
    test_an_exercise_that_nobody_has_done_says_so,
) = exercise_tests(
    answers.ANSWERS,
    {
        name: (f'{name}_spec', 'left_cases' if name == 'bits_left' else None)
        for name in answers.ANSWERS
    },
)
