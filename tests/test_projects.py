"The projects: right hand-ins get every point, and each wrong one loses the rows that it should"

import re
from dataclasses import replace

import pytest
from answers import projects as answers
from helpers import cells_of

from llm_lab.core import LabError


@pytest.fixture(scope='module')
def page():
    "What the page defines, without its pictures"
    space = {}
    for source in cells_of('projects'):
        if not source.startswith('#|'):
            exec(compile(source.replace('Markdown(', 'str('), 'projects', 'exec'), space)
    return space


def lost(marked):
    "Rows of the machine that did not give their points"
    return {mark.row.name for mark in marked if mark.points == 0}


# ---- part 1


@pytest.mark.parametrize('hand_in', answers.RIGHT_TEXT)
def test_a_right_text_project_gets_every_point(hand_in, page):
    marked = page['marks'](page['TEXT'], hand_in)
    assert lost(marked) == set(), [mark.message for mark in marked]
    assert page['earned'](marked) == 15


@pytest.mark.parametrize('hand_in', answers.WRONG_TEXT)
def test_a_wrong_text_project_loses_its_row(hand_in, page):
    marked = page['marks'](page['TEXT'], hand_in)
    assert lost(marked) == answers.WRONG_TEXT[hand_in], [mark.message for mark in marked]


def test_each_row_of_text_is_lost_by_somebody(page):
    rows = {row.name for row in page['TEXT'].rows if row.test}
    assert set().union(*answers.WRONG_TEXT.values()) == rows


# ---- part 2


@pytest.fixture(scope='module')
def right_model(page, tmp_path_factory):
    return answers.right_model(page['chain'], tmp_path_factory.mktemp('packages'))


@pytest.fixture(scope='module')
def wrong_models(page, right_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp('wrong')
    return answers.wrong_models(right_model, page['chain'], folder)


def test_a_right_model_project_gets_every_point(right_model, page):
    marked = page['marks'](page['MODEL'], right_model, page['chain'])
    assert lost(marked) == set(), [mark.message for mark in marked]
    assert page['earned'](marked) == 16


def test_wrong_model_projects_lose_their_rows(wrong_models, page):
    for name, (hand_in, rows) in wrong_models.items():
        marked = page['marks'](page['MODEL'], hand_in, page['chain'])
        assert lost(marked) == rows, (name, [mark.message for mark in marked])


def test_each_row_of_model_is_lost_by_somebody(wrong_models, page):
    rows = {row.name for row in page['MODEL'].rows if row.test}
    assert set().union(*(rows for _, rows in wrong_models.values())) == rows


def test_a_model_below_the_floor_is_told_why(wrong_models, page):
    hand_in, _ = wrong_models['sees the future']
    messages = {m.row.name: m.message for m in page['marks'](page['MODEL'], hand_in, page['chain'])}
    assert 'look for a leak' in messages['floor']


# ---- the grader


def raises(error):
    def f(*args, **keywords):
        raise error

    return f


class Liar(Exception):
    def __str__(self):
        return 'right, 0 is at most 1'


HOSTILE = [
    object(),
    None,
    type('Nothing', (), dict.fromkeys(['train', 'cost', 'stream', 'package', 'claim', 'steps'])),
    *(
        type('Raises', (), dict.fromkeys(['train', 'cost', 'stream'], staticmethod(raises(e))))
        for e in (SystemExit(1), StopIteration(), RecursionError(), LabError('no'), Liar())
    ),
]


@pytest.mark.parametrize('hand_in', HOSTILE)
@pytest.mark.parametrize('project', ['TEXT', 'MODEL'])
def test_marks_never_throws_and_gives_nothing_for_nothing(project, hand_in, page):
    marked = page['marks'](page[project], hand_in, page['tales' if project == 'TEXT' else 'chain'])
    assert [mark.row for mark in marked] == page[project].rows
    assert page['earned'](marked) == 0
    assert all(mark.message for mark in marked)


def test_a_message_of_the_hand_in_earns_nothing(page):
    "Nor does an empty one, or one that is right further on"
    row = page['Row']('compression', 3, 'cheap', lambda hand_in, corpus: hand_in)
    for said, points in (
        ('share: right, 0.7 is at most 0.8', 3),
        ('f: on (1,) expected 2, got f: right on 3 cases', 0),
        ('f: rightly so', 0),
        ('', 0),
    ):
        assert page['mark_row'](row, said, None).points == points


def test_a_limit_is_kept_and_nan_is_above_it(page):
    for value, right in ((1.0, True), (1.01, False), (float('nan'), False)):
        assert (': right' in page['at_most']('x', value, 1.0)) == right


def test_the_rubrics_are_on_the_page_as_the_grader_has_them(page):
    (parts,) = [
        text for text in cells_of('projects', 'markdown') if text.startswith('## Further parts')
    ]
    points = [int(p) for p in re.findall(r'^\| [\w ]+ \| (\d+) \| reader', parts, re.M)]
    assert sum(points) == 10
    for project in ('TEXT', 'MODEL'):
        table = page['rubric'](page[project]).splitlines()[2:]
        assert len(table) == len(page[project].rows)
        assert sum(int(line.split(' | ')[1]) for line in table) == 20


def test_the_grader_takes_a_text_of_the_students_own(page):
    "A running text in another language, one document and no tales"
    words = [f'Wörter{k % 37}x und {k % 11} Zahlen über Flüsse.' for k in range(900)]
    text = {'train': [' '.join(words)], 'val': [' '.join(words[:40])], 'test': ['ü']}
    corpus = replace(page['tales'], splits=text, independent=False)
    assert lost(page['marks'](page['TEXT'], answers.BookText, corpus)) == set()


def test_the_floor_of_the_chain_is_that_of_its_documents(page):
    "−log₂ P of the documents themselves, summed letter by letter, is near the floor"
    import math

    chain = page['chain_corpus'](4000)
    bits, characters = 0.0, 0
    for document in chain.documents('train'):
        bits += 2
        characters += len(document) + 2
        for a, b in zip(document, document[1:]):
            follows = ('abcd'.index(b) - 'abcd'.index(a)) % 4 == 1
            bits -= math.log2(0.7 if follows else 0.1)
    assert abs(bits / characters - chain.floor) < 0.02
