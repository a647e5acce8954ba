"""Run chapters from the first cell to the last in a fresh kernel, and save what they show.

python tools/book.py [nbs/22_gpt.ipynb …] [--jobs 2] [--timeout 0]

As many run at a time as there are cores, each on one thread, as the tests run them. Widgets show
their still picture (LLM_LAB_STILL=1). Cells marked by a word of `tst_flags` keep what they
showed. A notebook is written only when all its cells ran and nothing in it names a folder of
this machine."""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from clean import ROOT, clean
from run_notebooks import all_notebooks, longest_first, workers

ANSI = re.compile(r'\x1b\[[0-9;]*m')


def skip(source, flags):
    "Is this code cell left alone?"
    words = re.findall(r'^#\|\s*(.+?)\s*$', source, re.M)
    return 'nbdev_export(' in source or any(
        w.split()[0].rstrip(':') in flags or w.replace(' ', '') == 'eval:false' for w in words
    )


def local_names(outputs):
    "Folders of this machine that the outputs name"
    text = json.dumps(
        [
            [o.get('text', ''), *(v for k, v in o.get('data', {}).items() if k.startswith('text/'))]
            for o in outputs
        ]
    )
    places = {str(ROOT), sys.prefix, str(Path.home()), tempfile.gettempdir()} - {'/'}
    return sorted(o for o in places if json.dumps(o)[1:-1] in text)


def execute(path, flags, timeout):
    "The notebook with fresh outputs, as text"
    import nbformat
    from nbclient import NotebookClient

    raw = json.loads(path.read_text(encoding='utf-8'))
    sources = {c['id']: ''.join(c['source']) for c in raw['cells'] if c['cell_type'] == 'code'}
    cells = [
        c
        for c in raw['cells']
        if sources.get(c['id'], '').strip() and not skip(sources[c['id']], flags)
    ]
    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(sources[c['id']]) for c in cells]
    )
    NotebookClient(
        nb,
        timeout=timeout,
        kernel_name='python3',
        coalesce_streams=True,
        extra_arguments=['--IPKernelApp.log_level=ERROR'],
        resources={'metadata': {'path': str(path.parent)}},
    ).execute()
    for old, new in zip(cells, nb.cells):
        old['outputs'] = new.outputs
        if names := local_names(new.outputs):
            raise ValueError(f'an output names {", ".join(names)}:\n{"".join(old["source"])}')
    raw['metadata'].setdefault(
        'kernelspec', {'name': 'python3', 'display_name': 'python3', 'language': 'python'}
    )
    # long strings become lists of lines, as Jupyter saves them
    lines = json.loads(nbformat.writes(nbformat.from_dict(raw)))
    return clean(json.dumps(lines))


def save(path, flags, timeout):
    "Run one notebook, save what it shows, tell in a line; was it good?"
    start = time.time()
    try:
        new = execute(path.resolve(), flags, timeout)
    except Exception as e:
        print(
            f'FAIL {time.time() - start:6.1f} s  {path.name}\n{ANSI.sub("", str(e)).strip()}',
            flush=True,
        )
        return False
    changed = new != path.read_text(encoding='utf-8')
    if changed:
        path.write_text(new, encoding='utf-8', newline='\n')
    print(
        f'ok   {time.time() - start:6.1f} s  {path.name}{" (changed)" if changed else ""}',
        flush=True,
    )
    return True


def main():
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument(
        'notebooks',
        nargs='*',
        type=Path,
        help='default: all of nbs/, but for names that begin with _',
    )
    ap.add_argument('--jobs', type=int, default=workers(), help='notebooks at a time')
    ap.add_argument('--timeout', type=int, default=0, help='seconds for one cell; 0 is no limit')
    a = ap.parse_args()
    from nbdev.config import get_config

    os.environ.update(LLM_LAB_STILL='1', PYTHONUTF8='1', PYTHONPATH=str(ROOT))
    os.environ.setdefault('JUPYTER_PLATFORM_DIRS', '1')
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    flags = set(get_config(path=ROOT).tst_flags.split())
    nbs = a.notebooks or all_notebooks()
    if a.jobs == 1 or len(nbs) == 1:
        return 0 if all([save(p, flags, a.timeout or None) for p in nbs]) else 1

    def one(nb):  # in a process of its own: a kernel client wants the main thread
        cmd = [sys.executable, __file__, str(nb), '--timeout', str(a.timeout)]
        p = subprocess.run(cmd, capture_output=True, text=True, encoding='utf-8')
        print(p.stdout + p.stderr, end='', flush=True)
        return p.returncode == 0

    with ThreadPoolExecutor(a.jobs) as pool:
        return 0 if all(list(pool.map(one, longest_first(nbs)))) else 1


if __name__ == '__main__':
    sys.exit(main())
