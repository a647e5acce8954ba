"""Run a notebook in JupyterLab, in a real browser, and take pictures of the page.

python tools/shot.py nbs/22_gpt.ipynb [OUT_FOLDER] [--width 1200] [--height 1900] [--keep]

Writes OUT_FOLDER/NAME-01.png, -02.png …: the whole notebook, cut between cells. Default folder:
artifacts/browser. The notebook itself is not touched: a copy runs. `--keep` shows the saved
outputs and runs nothing. Exits 1 when a cell raised an error."""

import argparse
import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from book import ANSI, ROOT, skip

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable', 'chrome')
PLACES = (
    '/Applications/Google Chrome.app/Contents/MacOS/Google Chrome',
    'C:/Program Files/Google/Chrome/Application/chrome.exe',
)
FLAGS = [
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-sync',
    '--disable-component-update',
    '--disable-dev-shm-usage',
    '--force-color-profile=srgb',
    '--hide-scrollbars',
]
# {code: [[source, number or null]], error: [text], stderr: [text]} as the notebook's own model has
# it: the page shows both in red
SEEN = """() => {
    const cells = window.jupyterapp.shell.currentWidget.context.model.cells;
    const seen = {code: [], error: [], stderr: []};
    for (let i = 0; i < cells.length; i++) {
        const c = cells.get(i);
        if (c.type !== 'code') continue;
        seen.code.push([c.sharedModel.getSource(), c.executionCount]);
        for (let k = 0; k < c.outputs.length; k++) {
            const o = c.outputs.get(k);
            const said = o.toJSON();
            if (o.type === 'error') seen.error.push(said.traceback.join('\\n'));
            if (o.type === 'stream' && said.name === 'stderr')
                seen.stderr.push([].concat(said.text).join(''));
        }
    }
    return seen;
}"""


def chromium():
    "Where a Chromium or Chrome is, or None"
    own = os.environ.get('LLM_LAB_CHROMIUM')
    return own or next(
        (o for o in (*map(shutil.which, NAMES), *PLACES) if o and Path(o).exists()), None
    )


def lacks():
    "What is missing for a browser run, in one line, or ''"
    for o in ('playwright', 'jupyterlab', 'ipykernel'):
        try:
            __import__(o)
        except ImportError:
            return f'no {o}: run `make dev`'
    return (
        '' if chromium() else 'no Chromium: `apt install chromium`, or name one in LLM_LAB_CHROMIUM'
    )


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def settle(home):
    """Settings of a quiet JupyterLab: no news, no update check, and all cells in the page, also
    those off the screen"""
    notes = {'fetchNews': 'false', 'checkForUpdates': False, 'doNotDisturbMode': True}
    for name, value in {
        'notebook-extension/tracker': {'windowingMode': 'none', 'kernelShutdown': True},
        'apputils-extension/notification': notes,
    }.items():
        p = home / 'settings' / '@jupyterlab' / f'{name}.jupyterlab-settings'
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_text(json.dumps(value))


@contextlib.contextmanager
def jupyter(folder, log):
    "A JupyterLab of its own on a free local port, for `folder`; yields (address, token)"
    home = folder / '.jupyter'
    port = free_port()
    token = secrets.token_hex(16)
    settle(home)
    own = {
        o: str(home / o[8:].lower())
        for o in ('JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR')
    }
    env = dict(
        os.environ,
        **own,
        JUPYTERLAB_SETTINGS_DIR=str(home / 'settings'),
        JUPYTERLAB_WORKSPACES_DIR=str(home / 'workspaces'),
        IPYTHONDIR=str(home / 'ipython'),
        JUPYTER_PLATFORM_DIRS='1',
        PYTHONUTF8='1',
        PYTHONPATH=str(ROOT),
    )
    # the copy finds data and trained models where the chapter does
    env.setdefault('LLM_LAB_HOME', str(ROOT))
    cmd = [
        sys.executable,
        '-m',
        'jupyterlab',
        '--no-browser',
        '--allow-root',
        f'--IdentityProvider.token={token}',
        *(
            f'--ServerApp.{k}={v}'
            for k, v in dict(root_dir=folder, ip='127.0.0.1', port=port, port_retries=0).items()
        ),
        *(
            f'--LabApp.{k}={v}'
            for k, v in dict(
                news_url=None,
                extension_manager='readonly',
                expose_app_in_browser=True,
                check_for_updates_class='jupyterlab.NeverCheckForUpdate',
            ).items()
        ),
    ]
    address = f'http://127.0.0.1:{port}'
    with open(log, 'w') as f:
        proc = subprocess.Popen(cmd, env=env, cwd=folder, stdout=f, stderr=subprocess.STDOUT)
    try:
        for _ in range(480):
            if proc.poll() is not None:
                raise RuntimeError(f'JupyterLab ended at once: see {log}')
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f'{address}/api/status?token={token}', timeout=2).read()
                break
            time.sleep(0.25)
        else:
            raise RuntimeError(f'JupyterLab did not answer in two minutes: see {log}')
        yield address, token
    finally:
        proc.terminate()  # the server ends its kernels
        try:
            proc.wait(20)
        except subprocess.TimeoutExpired:
            proc.kill()


def copy_without_slow(notebook, to):
    "A copy without the cells that the tests leave out"
    from nbdev.config import get_config

    flags = set(get_config(path=ROOT).tst_flags.split())
    nb = json.loads(notebook.read_text(encoding='utf-8'))
    nb['cells'] = [
        c for c in nb['cells'] if c['cell_type'] != 'code' or not skip(''.join(c['source']), flags)
    ]
    to.write_text(json.dumps(nb), encoding='utf-8')


class Lab:
    """A JupyterLab server and a browser, for as many notebooks as are `opened` in it, one after
    another"""

    def __init__(self, folder, address, token, browser):
        self.folder = folder
        self.address = address
        self.token = token
        self.browser = browser
        self.count = 0

    def ask(self, path, method='GET'):
        "The server's answer"
        asked = urllib.request.Request(
            f'{self.address}/api/{path}',
            method=method,
            headers={'Authorization': f'token {self.token}'},
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return json.loads(answer.read() or 'null')

    def end_kernels(self):
        for session in self.ask('sessions'):
            self.ask(f'sessions/{session["id"]}', 'DELETE')

    def copy(self, notebook):
        "A copy without slow cells, in a folder of its own; its address"
        self.count += 1
        place = f'{self.count}/{notebook.name}'
        (self.folder / place).parent.mkdir()
        copy_without_slow(notebook, self.folder / place)
        # one document, no side bars
        return f'{self.address}/doc/tree/{place}?token={self.token}&reset'


@contextlib.contextmanager
def lab(log):
    "A `Lab`; what the server says goes to the file `log`"
    from playwright.sync_api import sync_playwright

    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='shot-', ignore_cleanup_errors=True) as tmp:
        work = Path(tmp) / 'work'
        work.mkdir()
        with jupyter(work, log) as (address, token), sync_playwright() as p:
            browser = p.chromium.launch(executable_path=chromium(), args=FLAGS)
            try:
                yield Lab(work, address, token, browser)
            finally:
                browser.close()


@contextlib.contextmanager
def opened(notebook, out, width=1200, height=1900, timeout=300, within=None):
    """The page of a copy of `notebook`, its kernel ready, in the Lab `within` or one of its own;
    the page's complaints go to `out`"""
    notebook, out, ms = Path(notebook), Path(out), timeout * 1000
    out.mkdir(parents=True, exist_ok=True)
    complaints = []
    with (
        contextlib.nullcontext(within)
        if within
        else lab(out / f'{notebook.stem}.server.log') as here
    ):
        # with a context of its own
        page = here.browser.new_page(viewport=dict(width=width, height=height))
        page.set_default_timeout(ms)
        page.on('pageerror', lambda e: complaints.append(str(e)))
        page.on('console', lambda m: complaints.append(m.text) if m.type == 'error' else None)
        try:
            page.goto(here.copy(notebook))
            page.wait_for_selector('.jp-Notebook .jp-Cell')
            # The page says 'idle' before the kernel listens, and drops a Run All then: wait until
            # the kernel itself has answered.
            page.wait_for_function(
                """() => {
                    const w = window.jupyterapp && window.jupyterapp.shell.currentWidget;
                    const s = w && w.sessionContext;
                    window.session_ = s;
                    return !!(s && s.session && s.session.kernel);
                }""",
                polling=250,
            )
            page.evaluate("""async () => {
                await window.session_.ready;
                await window.session_.session.kernel.info;
            }""")
            for b in page.query_selector_all('.jp-Dialog .jp-mod-accept'):
                b.click()
            yield page
        finally:
            (out / f'{notebook.stem}.console.txt').write_text(
                '\n'.join(complaints), encoding='utf-8'
            )
            page.close()
            here.end_kernels()


def seen(page):
    "What the notebook on the page has run and said: code, error, stderr"
    now = page.evaluate(SEEN)
    return now | {o: [ANSI.sub('', t).strip() for t in now[o]] for o in ('error', 'stderr')}


def run_all(page, timeout=300):
    "Run every cell by JupyterLab's own menu, until each has a number or one has failed"
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_text('Run All Cells', exact=True).click()
    end = time.time() + timeout
    while True:
        page.wait_for_timeout(500)
        now = seen(page)
        if now['error'] or all(number for source, number in now['code'] if source.strip()):
            break
        if time.time() > end:
            raise TimeoutError(f'the notebook did not end in {timeout:g} s')
    page.wait_for_selector(
        '.jp-Notebook-ExecutionIndicator[data-status=idle]', timeout=timeout * 1000
    )
    page.wait_for_timeout(1000)  # the last pictures and widgets arrive


def shots(page, folder, name):
    "Pictures of the whole notebook, cut between cells; returns their paths"
    hide = '.jp-Toolbar, .jp-Cell-toolbar, .jp-cell-menu, .jp-toast-container, .jp-Notebook-footer'
    page.add_style_tag(content=hide + ' {display: none !important}')
    page.evaluate("() => { document.activeElement && document.activeElement.blur() }")
    page.wait_for_timeout(300)
    box = page.evaluate("""() => {
        const panel = document.querySelector('.jp-NotebookPanel-notebook');
        const all = [panel, ...panel.querySelectorAll('*')];
        const longer = e => e.scrollHeight > e.clientHeight + 1;
        const scrolls = e => longer(e) && /auto|scroll/.test(getComputedStyle(e).overflowY);
        const s = all.find(e => e.querySelector('.jp-Cell') && scrolls(e)) || panel;
        window.scroller_ = s;
        const r = s.getBoundingClientRect();
        const y = r.top - s.scrollTop;
        const found = [...document.querySelectorAll('.jp-Notebook .jp-Cell')];
        const cells = found.map(c => c.getBoundingClientRect());
        return {
            x: r.left,
            y: r.top,
            width: r.width,
            height: s.clientHeight,
            end: Math.ceil(Math.max(...cells.map(c => c.bottom - y))) + 8,
            cuts: cells.map(c => Math.floor(c.top - y)),
        };
    }""")
    spans, at = [], 0
    while at < box['end']:
        reach = at + int(box['height'])
        cut = (
            box['end']
            if reach >= box['end']
            else max([c for c in box['cuts'] if at + 200 < c <= reach], default=reach)
        )
        spans.append((at, cut))
        at = cut
    folder, paths = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f'{name}-[0-9][0-9].png'):
        old.unlink()
    for n, (at, cut) in enumerate(spans, 1):
        top = page.evaluate(
            """y => {
                window.scroller_.scrollTop = y;
                return window.scroller_.scrollTop;
            }""",
            at,
        )
        page.wait_for_timeout(150)
        clip = dict(x=box['x'], y=box['y'] + at - top, width=box['width'], height=cut - at)
        paths.append(folder / f'{name}-{n:02}.png')
        page.screenshot(path=str(paths[-1]), clip=clip)
    return paths


def main():
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument('notebook', type=Path)
    ap.add_argument('out', type=Path, nargs='?', default=ROOT / 'artifacts' / 'browser')
    ap.add_argument('--width', type=int, default=1200)
    ap.add_argument('--height', type=int, default=1900, help='of one picture, at most')
    ap.add_argument('--timeout', type=float, default=300, help='seconds for the whole run')
    ap.add_argument('--keep', action='store_true', help='show the saved outputs, run nothing')
    a = ap.parse_args()
    if not a.notebook.is_file():
        sys.exit(f'shot: no such notebook: {a.notebook}')
    if why := lacks():
        sys.exit(f'shot: {why}')
    with opened(a.notebook, a.out, a.width, a.height, a.timeout) as page:
        if not a.keep:
            run_all(page, a.timeout)
        bad, noise = seen(page)['error'], seen(page)['stderr']
        for p in shots(page, a.out, a.notebook.stem):
            print(p)
        if 'Error displaying widget' in page.content():
            bad.append('Error displaying widget')
    for o in noise:
        print('stderr:', o[:500])
    for o in bad:
        print('error:', o[-2000:])
    return 1 if bad else 0


if __name__ == '__main__':
    sys.exit(main())
