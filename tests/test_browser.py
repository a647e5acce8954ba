"A chapter runs to its last cell in a real browser. LLM_LAB_BROWSER_NOTEBOOK names others, separated by spaces."
import os, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import shot  # noqa: E402

NOTEBOOKS = os.environ.get('LLM_LAB_BROWSER_NOTEBOOK', 'nbs/06_gpt.ipynb').split()
OUT = ROOT/'artifacts'/'browser'


@pytest.fixture
def browser():
    "Skips where no browser is, with the reason; fails on CI"
    if why := shot.lacks(): (pytest.fail if os.environ.get('CI') == 'true' else pytest.skip)(why)


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_a_chapter_runs_to_its_last_cell(browser, name):
    path = ROOT/name
    with shot.opened(path, OUT) as page:
        try: shot.run_all(page)
        finally: page.screenshot(path=str(OUT/f'{path.stem}.png'))
        assert shot.seen(page)['error'] == []
        assert page.locator('.jp-OutputArea-output img').count() >= 1, 'no picture was drawn'
        assert 'Error displaying widget' not in page.content()
        assert sum(number is not None for _, number in shot.seen(page)['code']) >= 3, 'fewer than three cells ran'


def test_the_check_sees_an_error(browser, tmp_path):
    "The run above can fail: a cell that raises is seen, and the run does not wait for the cells after it"
    import nbformat
    sources = '1 + 1', 'raise ValueError("on purpose")', 'print("never")'
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(o) for o in sources])
    nb.metadata['kernelspec'] = dict(name='python3', display_name='python3', language='python')
    nbformat.write(nb, tmp_path/'bad.ipynb')
    with shot.opened(tmp_path/'bad.ipynb', tmp_path, timeout=90) as page:
        shot.run_all(page, 60)
        assert 'on purpose' in shot.seen(page)['error'][0]


def test_a_knob_redraws_its_picture(browser):
    "`explore` in a live notebook: the real slider is moved, the kernel answers with another picture, and pictures have words"
    with shot.opened(ROOT/'nbs'/'00_lab.ipynb', OUT) as page:
        shot.run_all(page)
        area = '.jupyter-widgets img[src^="data:image/png"], .widget-output img[src^="data:image/png"]'
        page.wait_for_selector(area)
        before = page.locator(area).last.get_attribute('src')
        page.locator('.noUi-handle').first.focus()
        page.locator('.noUi-handle').first.press('ArrowRight')
        page.wait_for_function('([area, old]) => [...document.querySelectorAll(area)].pop()?.src !== old', arg=[area, before])
        assert page.locator('.widget-readout').first.inner_text() == '0.2'
        page.screenshot(path=str(OUT/'00_lab.knob.png'))
        assert shot.seen(page)['error'] == []
