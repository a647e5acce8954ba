"""Lessons of the first two parts keep the shape that readers were promised: a picture early, few
visible cells, prose that one reads in a sitting, and a head that tells the minutes truly."""

import json
import re

import pytest
from helpers import NOTEBOOKS

LESSONS = [
    path.stem
    for path in sorted(NOTEBOOKS.glob('[12][0-9]_*.ipynb'))
    if 'eference' not in json.loads(path.read_text(encoding='utf-8'))['cells'][0]['source'][0]
]


TOO_LONG = {'27_looking'}  # wants a cut, or a second chapter


def is_folded(cell):
    "Is a code cell hidden, or folded?"
    hidden = re.search(r'^#\| *(hide|echo: *false)\b', ''.join(cell['source']), re.M)
    return bool(hidden) or 'hide-input' in cell['metadata'].get('tags', [])


@pytest.fixture(params=LESSONS)
def lesson(request):
    "(name, cells, those of code that are visible, prose)"
    cells = json.loads((NOTEBOOKS / f'{request.param}.ipynb').read_text(encoding='utf-8'))['cells']
    visible = [c for c in cells if c['cell_type'] == 'code' and not is_folded(c)]
    prose = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    return request.param, cells, visible, prose


def test_a_picture_stands_in_the_first_quarter(lesson):
    name, cells, _, _ = lesson
    pictures = [
        n
        for n, cell in enumerate(cells)
        if any(
            {'image/png', 'text/html'} & o.get('data', {}).keys() for o in cell.get('outputs', [])
        )
    ]
    assert pictures[0] <= len(cells) / 4


def test_few_cells_of_code_are_visible(lesson):
    _, _, visible, _ = lesson
    assert len(visible) <= 36


def test_the_prose_is_read_in_a_sitting(lesson):
    "What is told before the exercises, without tables"
    name, _, _, prose = lesson
    told = re.sub(r'^\|.*$', '', prose.partition('## Exercises')[0], flags=re.M)
    assert 700 <= len(told.split()) <= (3700 if name in TOO_LONG else 3500)


def test_the_head_tells_the_minutes_of_reading(lesson):
    "250 words a minute, and five seconds for each visible line of code; to a fifth"
    _, cells, visible, prose = lesson
    lines = sum(bool(line.strip()) for cell in visible for line in cell['source'])
    minutes = len(prose.split()) / 250 + lines * 5 / 60
    head = ' '.join(''.join(c['source']) for c in cells[:4] if c['cell_type'] == 'markdown')
    said = int(re.search(r'Reading: (\d+) minutes', head)[1])
    assert minutes / 1.2 <= said <= minutes * 1.2, f'{minutes:.0f} minutes by the rule'
