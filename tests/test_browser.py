"""Chapters in a real browser, their knobs turned and their buttons pressed.

LLM_LAB_BROWSER_NOTEBOOK names chapters to run to the end.

One JupyterLab server and one browser serve all tests; each notebook gets a page and a kernel of
its own."""

import ast
import json
import os
import re
import symtable
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tools'))
import shot  # noqa: E402

SHORT, LONG = 'nbs/11_chars.ipynb', 'nbs/22_gpt.ipynb'
NOTEBOOKS = os.environ.get('LLM_LAB_BROWSER_NOTEBOOK', '').split() or [
    SHORT,
    pytest.param(LONG, marks=pytest.mark.slow),
]
OUT = ROOT / 'artifacts' / 'browser'
WAIT = 1800  # seconds before a run counts as stuck; a busy machine is slow, not wrong
pytestmark = pytest.mark.xdist_group('browser')


@pytest.fixture(scope='module')
def lab():
    "A server and a browser for all; skips where no browser is, with the reason, and fails on CI"
    if why := shot.lacks():
        (pytest.fail if os.environ.get('CI') == 'true' else pytest.skip)(why)
    with shot.lab(OUT / 'server.log') as made:
        yield made


@pytest.fixture
def opened(lab):
    "Opens a notebook in the one server"

    def open_it(path, out=OUT, **how):
        return shot.opened(path, out, within=lab, **{'timeout': WAIT, **how})

    return open_it


def uses(source):
    """(names that a cell binds, names that it reads), those of its functions' and comprehensions'
    own left out"""

    def all_within(table):
        return [table, *(t for child in table.get_children() for t in all_within(child))]

    top, *inner = all_within(symtable.symtable(source, 'cell', 'exec'))
    bound = {o.get_name() for o in top.get_symbols() if o.is_assigned() or o.is_imported()}
    changed = {
        n.target.id
        for n in ast.walk(ast.parse(source))
        if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name)
    }
    read = {o.get_name() for o in top.get_symbols() if o.is_referenced()} | changed
    return bound, read | {
        o.get_name() for table in inner for o in table.get_symbols() if o.is_global()
    }


def upto(name, words, folder, less=None, shows=''):
    """A copy of chapter `name` that ends with the first cell in which a line begins with `words`.

    Of the cells before it, it has those of the module, those that the last one needs, and one
    that begins with `shows`; `test_notebooks.py` runs them all. `less` is (old, new)"""
    nb = json.loads((ROOT / 'nbs' / f'{name}.ipynb').read_text(encoding='utf-8'))
    cells = [''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'code']

    def begins(source, words):  # a call may be laid out on several lines
        text = re.sub(r'\(\n +', '(', source)
        return any(line.startswith(words) for line in text.splitlines())

    last = next(n for n, c in enumerate(cells) if begins(c, words))
    kept, (_, needed) = [cells[last]], uses(cells[last])
    for source in reversed(cells[:last]):
        bound, read = uses(source)
        shown = shows and begins(source, shows)
        if not shown and not bound & needed and not re.search(r'^#\| ?(export|hide)', source, re.M):
            continue
        kept.insert(0, source)
        needed = needed - bound | read
    if less:
        assert sum(less[0] in source for source in kept) == 1, less
        kept = [source.replace(*less) for source in kept]
    return notebook(folder / f'{name}.ipynb', kept)


def notebook(path, sources):
    "Write a notebook of these code cells. (To import nbformat would cost each worker seconds.)"
    cells = [
        dict(cell_type='code', source=s, metadata={}, outputs=[], execution_count=None, id=f'c{n}')
        for n, s in enumerate(sources)
    ]
    kernel = dict(name='python3', display_name='python3', language='python')
    nb = dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    path.write_text(json.dumps(nb), encoding='utf-8')
    return path


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_a_chapter_runs_to_its_last_cell(opened, name):
    path = ROOT / name
    with opened(path) as page:
        try:
            shot.run_all(page, WAIT)
        finally:
            page.screenshot(path=str(OUT / f'{path.stem}.png'))
        assert shot.seen(page)['error'] == []
        assert page.locator('.jp-OutputArea-output img').count() >= 1, 'no picture was drawn'
        assert 'Error displaying widget' not in page.content()
        assert sum(number is not None for _, number in shot.seen(page)['code']) >= 3, (
            'fewer than three cells ran'
        )


def test_the_check_sees_an_error(opened, tmp_path):
    """The run above can fail: a cell that raises is seen, and the run does not wait for the cells
    after it"""
    sources = '1 + 1', 'raise ValueError("on purpose")', 'print("never")'
    with opened(notebook(tmp_path / 'bad.ipynb', sources), tmp_path) as page:
        shot.run_all(page, WAIT)
        assert 'on purpose' in shot.seen(page)['error'][0]


PICTURE = '.jupyter-widgets img[src^="data:image/png"], .widget-output img[src^="data:image/png"]'


def redrawn(page):
    "Move the first slider by a step, and wait until its picture is another one"
    page.wait_for_selector(PICTURE)
    before = page.locator(PICTURE).last.get_attribute('src')
    handle = page.locator('.noUi-handle').first
    handle.focus()
    handle.press('ArrowRight')
    page.wait_for_function(
        '([area, old]) => [...document.querySelectorAll(area)].pop()?.src !== old',
        arg=[PICTURE, before],
    )


def test_a_knob_redraws_its_picture(opened, tmp_path):
    """`explore` in a live notebook: the real slider is moved, the kernel answers with another
    picture, and pictures have words"""
    with opened(upto('01_core', 'explore(picture', tmp_path)) as page:
        shot.run_all(page, WAIT)
        redrawn(page)
        assert page.locator('.widget-readout').first.inner_text() == '0.2'
        page.screenshot(path=str(OUT / '01_core.knob.png'))
        assert shot.seen(page)['error'] == []


@pytest.mark.data
@pytest.mark.slow  # by day a knob is turned, and a text typed into the playground
def test_merges_can_be_scrubbed_and_texts_typed(opened, tmp_path):
    "`bpe`: the slider cuts the words anew, and what is typed is shown under four tokenizers"
    from playwright.sync_api import expect

    short = upto('12_bpe', 'explore(compare', tmp_path, shows='explore(scrub')
    with opened(short, width=1000, height=1000) as page:
        shot.run_all(page, WAIT)
        assert shot.seen(page)['error'] == []
        said = page.locator('.widget-output p', has_text='bytes a token').last
        expect(said).to_contain_text('merge 200:')
        handle = page.locator('.noUi-handle').last
        handle.scroll_into_view_if_needed()
        handle.focus()
        handle.press('ArrowRight')
        expect(said).to_contain_text('merge 300:')
        handle.press('Home')
        expect(said).to_contain_text('merge 0: bytes alone')
        fields = page.locator('.widget-text input')
        fields.nth(0).fill('the <b>the</b> 家')
        fields.nth(0).press('Tab')
        expect(said).to_contain_text('18 tokens for 18 bytes')
        fields.nth(1).fill('where € is')
        fields.nth(1).press('Tab')
        table = page.locator('.widget-output table').last
        expect(table).to_contain_text('is not among the')  # characters refuse, bytes do not
        expect(table.locator('tr').nth(2)).to_contain_text('12')
        said.scroll_into_view_if_needed()
        page.screenshot(path=str(OUT / '12_bpe.typed.png'))
        assert shot.seen(page)['error'] == []


@pytest.mark.slow  # by day the live map of `looking` is touched, another widget of the same kind
def test_a_clicked_token_shows_its_receptive_field(opened, tmp_path):
    """The live graph of `sparse`: a click on a token, or into the graph, changes lines and words;
    the numbers are those of `receptive_field`"""
    from playwright.sync_api import expect
    from llm_lab.kv_cache import sliding_window
    from llm_lab.parts import part
    from llm_lab.sparse import or_masks, expander_links, receptive_field, describe_receptive_field

    patterns = [
        part(or_masks, of=(part(sliding_window, size=4), part(expander_links, degree=2, beyond=4)))
    ] * 3
    with opened(
        upto('41_sparse', 'receptive_field_map(small', tmp_path), width=900, height=900
    ) as page:
        shot.run_all(page, WAIT)
        assert shot.seen(page)['error'] == []
        box = page.locator('.reach')
        words, tokens, lines = (
            box.locator(o) for o in ('.reach-words', '.reach-token', 'svg line')
        )
        expect(words).to_have_text(describe_receptive_field(receptive_field(patterns, 32, 26), 26))
        box.scroll_into_view_if_needed()
        page.screenshot(path=str(OUT / '41_sparse.reach.png'))
        for t in (9, 0, 31):
            tokens.nth(t).click()
            expect(words).to_have_text(
                describe_receptive_field(receptive_field(patterns, 32, t), t)
            )
            assert tokens.nth(t).get_attribute('aria-pressed') == 'true'
            if t == 0:
                expect(lines).to_have_count(3)
        graph = box.locator('svg').bounding_box()
        page.mouse.click(graph['x'] + graph['width'] * 12.5 / 32, graph['y'] + 20)
        expect(words).to_have_text(describe_receptive_field(receptive_field(patterns, 32, 12), 12))
        assert box.locator('canvas').count() == 3


@pytest.mark.slow  # its knobs are made by the function that `test_a_knob_redraws_its_picture` tries
def test_an_expert_is_left_out_and_a_text_typed(opened, tmp_path):
    """The microscope of `experts`: a layer's expert is forbidden and nobody goes there, then
    another text is typed"""
    from playwright.sync_api import expect

    with opened(
        upto('52_experts', 'explore(microscope', tmp_path, less=('steps=650', 'steps=40')),
        width=1000,
        height=900,
    ) as page:
        shot.run_all(page, WAIT)
        assert shot.seen(page)['error'] == []
        area = page.locator('.widget-output').last
        chips = lambda: [o.get_attribute('title') for o in area.locator('span[title]').all()]
        expect(area).to_contain_text('bits per character, without nobody')
        busy = max(range(8), key=lambda e: sum(t.startswith(f'expert {e}:') for t in chips()))
        page.locator('.widget-dropdown select').last.select_option(str(busy))
        expect(area).to_contain_text(f'bits per character, without {busy}')
        assert chips() and not any(f'expert {busy}:' in t for t in chips())
        area.scroll_into_view_if_needed()
        page.screenshot(path=str(OUT / '52_experts.left_out.png'))
        field = page.locator('.widget-text input').last
        field.fill('Mia <b>')
        field.press('Tab')
        # a character that the tales do not have is said in a line
        expect(area).to_contain_text('is not among the')
        field.fill('Mia')
        field.press('Tab')
        expect(area.locator('span[title]')).to_have_count(3)
        assert shot.seen(page)['error'] == []


# ---- from here on chapters open the model that they share; by now somebody has trained it


@pytest.mark.parametrize(
    'name,knobs',
    [
        # one function makes the knobs of all chapters: by day those of 01_core are pressed
        pytest.param('31_positions', 'explore(clock', marks=pytest.mark.slow),
        pytest.param('34_gqa', 'explore(sharing', marks=pytest.mark.slow),
        pytest.param('35_kv_cache', 'explore(bytes_picture', marks=pytest.mark.slow),
        pytest.param('61_diffusion', 'explore(film_strip', marks=pytest.mark.slow),
    ],
)
def test_the_knobs_of_a_chapter_redraw_its_picture(opened, name, knobs, tmp_path):
    """The chapter up to its knobs, in a live notebook: the first slider is moved, and another
    picture comes"""
    with opened(upto(name, knobs, tmp_path)) as page:
        shot.run_all(page, WAIT)
        redrawn(page)
        page.locator(PICTURE).last.scroll_into_view_if_needed()
        page.screenshot(path=str(OUT / f'{name}.knob.png'))
        assert shot.seen(page)['error'] == []


# the chapter's last map, from layer 0 on, and before it the small maps that need no program
MAPS = """from IPython.display import HTML

display(HTML(heads_html(weights, tokens, query)))
attention_map(weights, tokens, query=query)"""


def test_a_touched_token_says_where_it_looks(opened, tmp_path):
    """The live map of `looking`: mouse, keys and buttons change the words, the kernel's own words
    agree, and nothing comes from outside"""
    from playwright.sync_api import expect

    sys.path.insert(0, str(ROOT))
    asked = []
    with opened(
        upto(
            '27_looking',
            'attention_map(weights, tokens',
            tmp_path,
            less=('attention_map(weights, tokens, layer=1, query=query)', MAPS),
        ),
        width=700,
        height=900,
    ) as page:
        page.on('request', lambda r: asked.append(r.url))
        shot.run_all(page, WAIT)
        assert shot.seen(page)['error'] == []
        box = page.locator('.look')
        words, tokens, knobs = (box.locator(f'.look-{o}') for o in ('words', 'token', 'knob'))
        box.scroll_into_view_if_needed()

        from llm_lab.looking import attention_of, describe_row, mean_distance
        from llm_lab.package import load_or_train, tales_model

        model, tokenizer, _ = load_or_train('tales', tales_model)  # kept by the run above
        text = ''.join(tokens.all_text_contents()).replace('↵\n', '\n')
        weights, names = attention_of(model, tokenizer, text)
        says = lambda layer, head, query: expect(words).to_have_text(
            describe_row(weights[layer, head], names, query)
        )

        kept = int(
            box.locator('.look-token[tabindex="0"]').evaluate(
                'e => [...e.parentNode.children].indexOf(e)'
            )
        )
        says(0, 0, kept)
        tokens.nth(5).hover()
        says(0, 0, 5)
        # the future is pale
        assert tokens.nth(6).evaluate('e => getComputedStyle(e).opacity') == '0.5'
        page.mouse.move(1, 1)
        says(0, 0, kept)  # whoever leaves finds what was kept
        tokens.nth(9).click()
        page.mouse.move(1, 1)
        says(0, 0, 9)
        box.get_by_role('button', name='head 2', exact=True).click()
        says(0, 2, 9)
        box.get_by_role('button', name='layer 1', exact=True).click()
        says(1, 2, 9)
        assert [
            o.inner_text() for o in knobs.all() if o.get_attribute('aria-pressed') == 'true'
        ] == ['1', '2']
        page.screenshot(path=str(OUT / '27_looking.light.png'))

        # the small maps: each a button that chooses layer and head; the large one follows, and can
        # be touched too
        thumbs = box.locator('.look-thumb')
        large = box.locator('.look-big canvas')
        row = box.locator('.look-row')
        L, H, T = weights.shape[:3]
        drawn = lambda canvas: canvas.evaluate(
            'e => [...e.getContext("2d").getImageData(0, 0, e.width, e.height).data]'
            '.filter((_, n) => n % 4 == 3)'
        )
        pressed = lambda among: [
            n for n, o in enumerate(among.all()) if o.get_attribute('aria-pressed') == 'true'
        ]
        far = mean_distance(weights)
        assert [o.get_attribute('title') for o in thumbs.all()] == [
            f'layer {l}, head {h}: {far[l, h]:.1f} back' for l in range(L) for h in range(H)
        ]
        assert pressed(thumbs) == [H + 2]
        thumbs.nth(3).click()
        says(0, 3, 9)
        assert (pressed(thumbs), pressed(knobs)) == ([3], [0, L + 3])
        # a pixel a weight, its strength √weight
        for canvas in (thumbs.nth(3).locator('canvas'), large):
            shades = weights[0, 3].sqrt().mul(255).flatten().tolist()
            assert max(abs(a - b) for a, b in zip(drawn(canvas), shades, strict=True)) < 1
        thumbs.nth(H).focus()
        page.keyboard.press('Enter')
        says(1, 0, 9)
        large.scroll_into_view_if_needed()
        size = large.bounding_box()['height']
        large.hover(position=dict(x=20, y=size * 20.5 / T))
        says(1, 0, 20)
        assert abs(row.bounding_box()['y'] - large.bounding_box()['y'] - size * 20 / T) < 2
        large.click(position=dict(x=20, y=size * 30.5 / T))
        page.mouse.move(1, 1)
        says(1, 0, 30)
        page.screenshot(path=str(OUT / '27_looking.maps.png'))
        thumbs.nth(H + 2).click()
        tokens.nth(9).click()
        says(1, 2, 9)

        knobs.last.focus()
        for key, query in (('Tab', 9), ('ArrowRight', 10), ('ArrowRight', 11), ('ArrowLeft', 10)):
            page.keyboard.press(key)
            says(1, 2, query)
        assert page.evaluate('getComputedStyle(document.activeElement).outlineStyle') == 'solid'
        page.keyboard.press('Enter')
        page.keyboard.press('Shift+Tab')
        says(1, 2, 10)  # kept, although the focus is gone
        tokens.nth(10).focus()
        assert box.evaluate(
            'e => [...e.querySelectorAll("*"), e].every(o => o.scrollWidth <= o.clientWidth '
            '+ 1 || !o.clientWidth)'
        )
        assert box.evaluate('e => e.getBoundingClientRect().right <= innerWidth')
        page.evaluate(
            "window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab "
            "Dark'})"
        )
        page.wait_for_selector('body[data-jp-theme-light=false]', state='attached')
        page.wait_for_timeout(500)
        page.screenshot(path=str(OUT / '27_looking.dark.png'))
        small = page.locator('td details', has=page.locator('summary[title^="layer 1, head 3:"]'))
        assert not small.locator('img').nth(1).is_visible()
        small.locator('summary').click()
        expect(small.locator('img').nth(1)).to_be_visible()
        assert (
            small.locator('img')
            .nth(1)
            .evaluate('e => e.naturalWidth >= e.width - 40 && e.width > 200')
        )
        expect(small).to_contain_text(' looks at ')
        page.screenshot(path=str(OUT / '27_looking.heads.png'))
        ink, ground = (
            page.evaluate(f'getComputedStyle(document.querySelector("{o}")).{p}')
            for o, p in (('.look', 'color'), ('.jp-Notebook', 'backgroundColor'))
        )
        light = lambda colour: sum(map(int, re.findall(r'\d+', colour)[:3])) / 765
        assert light(ink) - light(ground) > 0.6, (ink, ground)
        # the server keeps it
        page.evaluate(
            "window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab "
            "Light'})"
        )
        page.wait_for_selector('body[data-jp-theme-light=true]', state='attached')
        assert shot.seen(page)['error'] == [] and 'Error displaying widget' not in page.content()
    assert [o for o in asked if not re.match(r'(https?|ws)://127\.0\.0\.1:|data:|blob:', o)] == []
    assert not re.search(
        'TypeError|ReferenceError|anywidget',
        (OUT / '27_looking.console.txt').read_text(encoding='utf-8'),
    )


# the second one is the same widget on another form of the model
@pytest.mark.parametrize(
    'words', ['playground(model', pytest.param('playground(for_inference(', marks=pytest.mark.slow)]
)
def test_the_playground_writes_stops_and_tells(opened, words, tmp_path):
    """The real widget of `play`: a slider moves the bars, Generate writes, Stop stops, the
    mouse over a token tells its odds"""
    with opened(upto('85_play', words, tmp_path)) as page:
        shot.run_all(page, WAIT)
        box = page.locator(
            '.jp-OutputArea-output .widget-vbox', has=page.get_by_role('button', name='Generate')
        ).first
        box.scroll_into_view_if_needed()
        text = box.locator('.widget-html', has=page.locator('b')).last
        bars = box.locator('table')
        length = lambda: len(text.inner_text())

        def turn(name, key, times=1):
            "Move the slider of this name by its handle; what it says then"
            row = box.locator('.widget-inline-hbox', has_text=name)
            for _ in range(times):
                row.locator('.noUi-handle').press(key)
            return row.locator('.widget-readout').inner_text()

        before = bars.inner_text()
        assert turn('temperature', 'ArrowRight', 8) == '1.20'
        page.wait_for_function(
            '([table, old]) => table.innerText !== old', arg=[bars.element_handle(), before]
        )
        page.wait_for_timeout(500)
        old, new = (
            [row.split('\t') for row in rows.split('\n')] for rows in (before, bars.inner_text())
        )
        assert [row[:2] for row in old] == [row[:2] for row in new], (
            'what the model says has changed'
        )
        assert old != new, 'the filters show nothing'
        assert turn('length', 'End') == '1000'

        empty = length()
        box.get_by_role('button', name='Generate').click()
        page.wait_for_function(
            '([e, n]) => e.innerText.length > n', arg=[text.element_handle(), empty]
        )
        sizes = [length()]
        while len(sizes) < 4:  # it grows, little by little
            page.wait_for_function(
                '([e, n]) => e.innerText.length > n', arg=[text.element_handle(), sizes[-1]]
            )
            sizes.append(length())
        box.screenshot(path=str(OUT / '85_play.writing.png'))
        box.get_by_role('button', name='Stop').click()
        box.get_by_text('stopped after').wait_for()
        page.wait_for_timeout(500)
        stopped = length()
        assert empty < sizes[0] < sizes[1] < sizes[2] < sizes[3] <= stopped < 1000, (
            empty,
            sizes,
            stopped,
        )
        page.wait_for_timeout(1500)
        assert length() == stopped, 'it wrote on after Stop'

        token = text.locator('span[title]').nth(3)
        node = token.element_handle()
        token.hover()
        page.wait_for_timeout(1000)
        first, word, *rivals, legend = token.get_attribute('title').split('\n')
        assert (
            '% → ' in first
            and word == 'rivals:'
            and len(rivals) == 5
            and all(' → ' in r for r in rivals)
        ), first
        assert turn('top-p', 'ArrowLeft', 30) == '0.65'
        page.wait_for_timeout(500)
        assert node.evaluate('e => e.isConnected'), 'a knob has redrawn the text under the mouse'
        box.screenshot(path=str(OUT / '85_play.stopped.png'))

        turn('length', 'Home')
        box.get_by_role('button', name='Generate').click()
        box.get_by_text('done: 10 tokens').wait_for()
        assert text.locator('span[title]').count() == 10
        box.locator('textarea').fill('€')
        box.get_by_text("the character '€' at place 0 is not among").wait_for()
        assert shot.seen(page)['error'] == [] and shot.seen(page)['stderr'] == []
        assert 'Error displaying widget' not in page.content()


@pytest.mark.slow
def test_the_chat_window_answers_and_takes_back(opened, tmp_path):
    """The real chat window of `play`: a question is typed, Send answers it, Enter another one,
    Undo gives it back, Again asks once more, an error stands in the status line"""
    from playwright.sync_api import expect

    with opened(upto('85_play', 'chat_window(talker', tmp_path), width=760, height=900) as page:
        shot.run_all(page, WAIT)
        box = page.locator(
            '.jp-OutputArea-output .widget-vbox', has=page.get_by_role('button', name='Send')
        ).first
        box.scroll_into_view_if_needed()
        field = box.locator('input[type=text]')
        text = box.locator('.widget-html').first
        press = lambda name: box.get_by_role('button', name=name).click()
        expect(field).to_have_value('What colour is snow?')

        field.fill('What colour is grass?')
        press('Send')
        expect(text).to_contain_text('Grass is green.')
        box.get_by_text('done').wait_for()
        expect(field).to_have_value('')
        field.fill('What colour is coal?')
        field.press('Enter')
        expect(text).to_contain_text('Coal is black.')
        box.get_by_text('done').wait_for()
        box.screenshot(path=str(OUT / '85_play.chat.png'))

        press('Undo')
        expect(text).not_to_contain_text('coal')
        expect(text).to_contain_text('Grass is green.')
        expect(field).to_have_value('What colour is coal?')
        press('Again')
        expect(text).to_contain_text('Grass is green.')
        box.get_by_text('done').wait_for()
        field.fill('€ <b>')
        press('Send')
        box.get_by_text("the character '€' at place 0 is not among").wait_for()
        expect(field).to_have_value('€ <b>')
        press('Reset')
        expect(text).to_have_text('')
        assert shot.seen(page)['error'] == [] and shot.seen(page)['stderr'] == []
        assert 'Error displaying widget' not in page.content()
