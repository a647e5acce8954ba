"""Clean notebooks as `nbdev_clean` does, and of saved widgets, too; cell ids stay.

python tools/clean.py [--check] [nbs/22_gpt.ipynb …]

A saved widget is a view without a kernel: it shows nothing, and some readers refuse the whole
page. `--check` changes nothing and exits 1 when a notebook would change."""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDGET = 'application/vnd.jupyter.widget-view+json'


def drop_widgets(nb):
    """`nb` without saved widgets, in place: a view loses its widget form, and is gone when nothing
    but its name is left"""
    nb['metadata'].pop('widgets', None)
    for c in nb['cells']:
        kept = []
        for o in c.get('outputs', []):
            data = o.get('data', {})
            if WIDGET in data:
                del data[WIDGET]
                if not set(data) - {'text/plain'}:
                    continue
            kept.append(o)
        if 'outputs' in c:
            c['outputs'] = kept


def clean(text):
    "The text of a notebook, clean"
    from execnb.nbio import nb2str
    from nbdev.clean import clean_nb
    from nbdev.config import get_config

    cfg, nb = get_config(path=ROOT), json.loads(text)
    drop_widgets(nb)
    clean_nb(
        nb,
        cfg.clear_all,
        cfg.allowed_metadata_keys.split(),
        cfg.allowed_cell_metadata_keys.split(),
        cfg.clean_ids,
    )
    return nb2str(nb)


def main():
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument('notebooks', nargs='*', type=Path)
    ap.add_argument('--check', action='store_true', help='only tell')
    a = ap.parse_args()
    dirty = 0
    for p in a.notebooks or sorted((ROOT / 'nbs').glob('*.ipynb')):
        old = p.read_text(encoding='utf-8')
        new = clean(old)
        if new == old:
            continue
        dirty += 1
        if a.check:
            print(f'clean: {p.name} is not clean: run `make format`')
        else:
            p.write_text(new, encoding='utf-8', newline='\n')
    return 1 if a.check and dirty else 0


if __name__ == '__main__':
    sys.exit(main())
