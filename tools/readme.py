"""Write README.md from nbs/index.ipynb.

python tools/readme.py [--check]

Prose stays prose, code becomes a fenced block, printed text another; a picture that an output
draws is written to nbs/images. `--check` changes nothing and exits 1 when README.md or a picture
is stale."""

import base64
import json
import posixpath
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FROM, TO = 'nbs/index.ipynb', 'README.md'


def link(m):
    "A link as seen from the root: `01_core.ipynb` is `nbs/01_core.ipynb` there"
    to = m[2]
    return (
        m[0] if re.match(r'[a-z]+:|[#/]', to) else f'{m[1]}{posixpath.normpath("nbs/" + to)}{m[3]}'
    )


def prose(text):
    "Markdown with its links moved, code blocks untouched"
    parts = re.split(r'(^```.*?^```)', text, flags=re.M | re.S)
    for i in range(0, len(parts), 2):
        for form in (r'(\]\()([^)\s]+)([^)]*\))', r'((?:src|href)=")([^"]+)(")'):
            parts[i] = re.sub(form, link, parts[i])
    return ''.join(parts)


def pictures(nb):
    "{path: bytes} of what the outputs draw; the cell's id is the name"
    return {
        f'nbs/images/{c["id"]}.png': base64.b64decode(''.join(o['data']['image/png']))
        for c in nb['cells']
        for o in c.get('outputs', [])
        if 'image/png' in o.get('data', {})
    }


def shown(o, name):
    "What an output of the cell `name` says in text"
    if o['output_type'] == 'stream':
        return f'```text\n{"".join(o["text"]).rstrip()}\n```' if o['name'] == 'stdout' else ''
    data = o.get('data', {})
    if 'image/png' in data:
        return f'![{o["metadata"]["image/png"]["alt"]}](nbs/images/{name}.png)'
    if 'text/markdown' in data:
        return prose(''.join(data['text/markdown']).strip())
    return (
        ''
        if set(data) != {'text/plain'}
        else f'```text\n{"".join(data["text/plain"]).rstrip()}\n```'
    )


def readme(nb):
    "README.md for the notebook `nb`"
    out = [f'<!-- Written from {FROM} by `make book`: edit that. -->']
    for c in nb['cells']:
        src = ''.join(c['source']).strip()
        if c['cell_type'] == 'markdown':
            out.append(prose(src))
        if c['cell_type'] != 'code':
            continue
        words = {o.replace(' ', '') for o in re.findall(r'^#\|\s*(.+?)\s*$', src, re.M)}
        if words & {'hide', 'include:false'}:
            continue
        code = '\n'.join(o for o in src.splitlines() if not o.startswith('#|')).strip()
        if code and 'echo:false' not in words:
            out.append(f'```python\n{code}\n```')
        if 'output:false' not in words:
            out += [shown(o, c.get('id')) for o in c.get('outputs', [])]
    return '\n\n'.join(o for o in out if o) + '\n'


def main(check):
    nb = json.loads((ROOT / FROM).read_text(encoding='utf-8'))
    new = {TO: readme(nb).encode(), **pictures(nb)}
    there = {path.relative_to(ROOT).as_posix() for path in ROOT.glob('nbs/images/*.png')}
    stale = [p for p in new if not (ROOT / p).exists() or (ROOT / p).read_bytes() != new[p]]
    stale += sorted(there - new.keys())
    if check and stale:
        print(f'readme: {stale[0]} is not what {FROM} says: run `python tools/readme.py`')
    if check:
        return bool(stale)
    for path in stale:
        if path in new:
            (ROOT / path).parent.mkdir(exist_ok=True)
            (ROOT / path).write_bytes(new[path])
        else:
            (ROOT / path).unlink()
    return 0


if __name__ == '__main__':
    if set(sys.argv[1:]) - {'--check'}:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    sys.exit(main('--check' in sys.argv))
