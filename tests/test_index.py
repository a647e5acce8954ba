"The first page: its tables, its map and its numbers are those of the chapters and of the tour"

import json
import re

import pytest
from helpers import NOTEBOOKS, cells_of

from llm_lab.core import show


@pytest.fixture(scope='module')
def page():
    "The page's names, after all of its code ran, and what its cells showed when it was saved"
    space = {}
    for source in cells_of('index'):
        exec(source, space)
    notebook = json.loads((NOTEBOOKS / 'index.ipynb').read_text(encoding='utf-8'))
    space['outputs'] = [o for c in notebook['cells'] for o in c.get('outputs', [])]
    return space


def test_the_tables_are_those_of_the_chapters(page):
    saved = [
        o['data']['text/markdown'] for o in page['outputs'] if 'text/markdown' in o.get('data', {})
    ]
    now = '\n'.join(page['table'](n, page['PARTS'][n]) for n in page['ORDER'])
    assert [''.join(text) for text in saved] == [now], 'run python tools/book.py nbs/index.ipynb'
    assert {row[:2] for row in re.findall(r'\[(\d\d_\w+)\]\(\1\.ipynb\)', now)} == {
        path.stem[:2] for path in NOTEBOOKS.glob('[0-9][0-9]_*.ipynb')
    }


def test_the_map_is_that_of_the_heads(page):
    alt = [
        o['metadata']['image/png']['alt']
        for o in page['outputs']
        if 'image/png' in o.get('data', {})
    ]
    assert alt[1].endswith(': ' + '; '.join(f'{a} before {b}' for a, b in page['arrows']()))
    assert alt[1].startswith(f'{len(page["lessons"])} lessons, {page["hours"]:.0f} hours')


def test_every_lesson_is_read_after_some_other_but_the_first_two(page):
    first = {n for n, said in page['lessons'].items() if not page['earlier'](n)}
    assert first == {'10', '20'} and all(n not in page['earlier'](n) for n in page['lessons'])


def test_an_arrow_that_follows_from_others_is_left_out(page):
    arrows = page['arrows']()
    assert ('10', '22') not in arrows and ('21', '22') in arrows
    for start, end in arrows:
        others = [n for n in page['lessons'][end]['before'] if n != start and n in page['lessons']]
        assert not any(start in page['earlier'](n) for n in others)


def test_the_first_picture_is_that_of_the_tour(page):
    told = page['told']
    fig = page['first_screen']()
    (curve,) = [line for line in fig.axes[0].lines if line.get_marker() == 'o']
    assert curve.get_ydata()[-1] == pytest.approx(told['looks'][-1]['val'] * 1.442695, rel=1e-4)
    title = fig.axes[0].get_title('left')
    show(fig)
    assert f'{told["bits"]:.2f} bits' in title and f'{told["above_floor"]:.0%}' in title


def test_the_reading_paths_lead_to_chapters_that_are_there():
    prose = '\n'.join(cells_of('index', 'markdown'))
    links = set(re.findall(r'\]\(([\w-]+)\.ipynb\)', prose))
    assert len(links) > 30 and all((NOTEBOOKS / f'{name}.ipynb').is_file() for name in links)


@pytest.mark.parametrize('path, left_out', [('A term', '16 33 64'), ('A weekend.', None)])
def test_a_reading_path_has_nothing_before_what_it_needs(page, path, left_out):
    prose = '\n'.join(cells_of('index', 'markdown'))
    line = prose.partition(f'**{path}**')[2].partition('\n')[0].partition('Nothing comes')[0]
    read = re.findall(r'\]\((\d\d)_\w+\.ipynb\)', line)
    for k, n in enumerate(read):
        needs = {m for m in page['lessons'][n]['before'] if m in page['lessons']}
        assert needs <= {*read[:k]}, f'{n} needs {needs}'
    if left_out:
        assert len(re.findall(r'(?:·|:) \d+ \[', line)) == 14
        assert {*page['lessons']} - {*read} == {*left_out.split()}
