"""Make format 2 of what the first edition saved: a package, a checkpoint, a run, or a config.

    python tools/migrate.py PATH …

Names, keywords and keys change by one table (`FORMAT_1` in `llm_lab.core`), and the names of the
tensors with them; no number changes. In configs of either format, `model.block: llama` becomes
`model.preset: llama`. Nothing that a file names is imported or run. Each file and
folder is converted whole or not at all, and only if every hash in it is right; what is format 2
already is left alone, so a run that was interrupted is simply converted again.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

from safetensors.torch import load as tensors_from, save as tensor_bytes

from llm_lab.config import PRESETS
from llm_lab.core import FORMAT_1, LabError
from llm_lab.files import atomic_write, bytes_in, json_of
from llm_lab.package import config_from, meta_model
from llm_lab.package import FORMAT, model_card, write_manifest

PARTS, KEYWORDS, KEYS = (FORMAT_1[k] for k in ('parts', 'keywords', 'keys'))
BARE_KEYS = {old.partition('.')[2]: new.partition('.')[2] for old, new in KEYS.items()}


# ---- plain data: a recipe, a model, a config, what a checkpoint and a run keep of it


def part_name(word):
    "'llm_lab.llama:Rope' → 'RoPE'; a name of the reader's own, or of PyTorch, as it is"
    bare = re.sub(r'^llm_lab\.\w+:', '', word)
    return PARTS.get(bare, bare)


def dotted(text):
    "The keys with their section in a text: 'train.optimiser=sgd', '${data.block_len}'"
    for old, new in KEYS.items():
        text = re.sub(rf'\b{re.escape(old)}\b', new, text)
    return text


def with_preset(x):
    """Plain data in which `block: llama`, a word, is `preset: llama`; a recipe of a block stays.

    Also where the key stands with its section: 'model.block=llama', '${model.block}'"""
    if isinstance(x, list):
        return [with_preset(v) for v in x]
    if isinstance(x, str):
        return re.sub(rf'\bmodel\.block(?=}}|=({"|".join(PRESETS)})$)', 'model.preset', x)
    if not isinstance(x, dict):
        return x
    new = {}
    for k, v in x.items():
        preset = k in ('block', 'model.block') and isinstance(v, str) and v in PRESETS
        new[k.replace('block', 'preset') if preset else k] = with_preset(v)
    return new


def convert(x):
    "Plain data of format 1 → of format 2"
    return with_preset(_renamed(x))


def _renamed(x):
    if isinstance(x, list):
        return [_renamed(v) for v in x]
    if isinstance(x, str):
        return dotted(x)
    if not isinstance(x, dict):
        return x
    names = KEYWORDS if 'part' in x else BARE_KEYS
    new = {names.get(dotted(k), dotted(k)): _renamed(v) for k, v in x.items()}
    if isinstance(x.get('part'), str):
        new['part'] = part_name(x['part'])
    return new


def tensor_name(name):
    "'blocks.0.attn.steps.1.q.weight/exp_avg' → 'blocks.0.attn.transforms.1.q.weight/exp_avg'"
    name = re.sub(r'^head\.', 'lm_head.', name)
    return re.sub(r'\.attn\.steps\.', '.attn.transforms.', name)


def convert_tensors(data: bytes) -> bytes:
    return tensor_bytes({tensor_name(n): t for n, t in tensors_from(data).items()})


# ---- a config: the text itself changes, so that comments and order stay


def convert_yaml(text, where):
    "Raises `LabError` where the new text would say something else than the old one, converted"
    import yaml

    words = [r'llm_lab\.\w+:(\w+)', *(rf'({old})' for old in PARTS)]
    new = text
    for word in words:
        new = re.sub(
            rf'''(\bpart["']?\s*:\s*["']?){word}(?!\w)''',
            lambda m: m[1] + part_name(m[2]),
            new,
        )
    for old, now in {**BARE_KEYS, **KEYWORDS}.items():
        # `steps` of an attention is a list; `steps` of a training is a number
        value = r'(?=\s*(\[|\n\s*-|null))' if old == 'steps' else ''
        new = re.sub(rf'''(?<![\w.]){old}(["']?\s*:){value}''', rf'{now}\1', new)
    new = dotted(new)
    words = '|'.join(PRESETS)
    new = re.sub(rf'''(?<![\w.])block(["']?\s*:\s*["']?({words})\b)''', r'preset\1', new)
    new = re.sub(r'\$\{model\.block\}', '${model.preset}', new)
    if yaml.safe_load(new) != convert(yaml.safe_load(text)):
        raise LabError(f'{where}: this file is laid out in a way that is not understood: edit it')
    return new


def migrate_config(path):
    text = path.read_text(encoding='utf-8')
    new = convert_yaml(text, path)
    if new == text:
        return False
    with atomic_write(path) as f:
        f.write_text(new, encoding='utf-8')
    return True


# ---- a sealed folder: every hash is checked before, and made anew after


def sha(data):
    data = data if isinstance(data, bytes) else json.dumps(data, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


def listed(folder, name):
    "What a list of files says, and these files; raises `LabError` unless every hash is right"
    said = json_of(bytes_in(folder, name), folder / name)
    own = said.pop('sha256', None)
    if own != sha(said):
        raise LabError(f'{folder / name} was changed (wrong hash): copy the folder again')
    files = {f: bytes_in(folder, f, 1 << 40) for f in said['files']}
    for f, data in files.items():
        if sha(data) != said['files'][f]:
            raise LabError(f'{folder / f} is not the file that was saved (wrong hash)')
    return said, files


def card(name, config, about, old):
    "The model card made anew; the old one where a part of the reader's own would be needed"
    try:
        return model_card(name, meta_model(config_from(config)), about).encode()
    except LabError:
        return old


def convert_json(data: bytes, **layout) -> bytes:
    return json.dumps(convert(json.loads(data)), **layout).encode()


def migrate_folder(folder):
    "A package or a checkpoint"
    said, files = listed(folder, 'package.json')
    whole = None
    if (folder / 'manifest.json').exists():
        whole, files = listed(folder, 'manifest.json')
    if said['format'] == FORMAT:
        return migrate_preset(folder, files, whole)
    for name in ('README.md', 'meta.json'):  # the first packages did not list them
        if name not in files and (folder / name).is_file():
            files[name] = (folder / name).read_bytes()
    about = convert(said['about'])
    files['llm_lab.json'] = convert_json(files['llm_lab.json'], indent=1)
    for name in ('model.safetensors', 'optimizer.safetensors'):
        if name in files:
            files[name] = convert_tensors(files[name])
    if 'state.json' in files:
        state = convert(json.loads(files['state.json']))
        for group in state['groups']:
            group['params'] = [tensor_name(n) for n in group['params']]
        files['state.json'] = json.dumps(state).encode()
    if 'README.md' in files:
        title = files['README.md'].split(b'\n')[0].decode(errors='replace').lstrip('# ')
        config = json.loads(files['llm_lab.json'])
        files['README.md'] = card(title, config, about, files['README.md'])
    files.pop('package.json', None)
    everything = lambda folder, known: {f.name: None for f in folder.iterdir()}  # all was checked
    with atomic_write(folder, more=everything) as new:
        new.mkdir()
        for name, data in files.items():
            (new / name).write_bytes(data)
        first = [f for f in ('llm_lab.json', 'tokenizer.json', 'model.safetensors') if f in files]
        of_package = [f for f in said['files'] if f not in first]
        beside = sorted({*of_package, *({'README.md', 'meta.json'} & {*files})})
        write_manifest(new, 'package.json', [*first, *beside], about=about, torch=said['torch'])
        if whole:
            names = sorted(f.name for f in new.iterdir())
            sizes = {f: (new / f).stat().st_size for f in names}
            write_manifest(new, 'manifest.json', names, sizes=sizes)
    return True


def migrate_preset(folder, files, whole):
    "A checkpoint of format 2 that still says `block: llama`"
    data = files.get('state.json')
    state = json.loads(data) if data and whole else None
    if state == with_preset(state):
        return False
    everything = lambda folder, known: {f.name: None for f in folder.iterdir()}  # all was checked
    with atomic_write(folder, more=everything) as new:
        new.mkdir()
        for path in folder.iterdir():
            if path.name != 'manifest.json':
                (new / path.name).write_bytes(path.read_bytes())
        (new / 'state.json').write_text(json.dumps(with_preset(state)))
        names = sorted(f.name for f in new.iterdir())
        sizes = {f: (new / f).stat().st_size for f in names}
        write_manifest(new, 'manifest.json', names, sizes=sizes)
    return True


def migrate_run(folder):
    "The folder of a run, checkpoints first: config.yaml tells what is done"
    done = [migrate_folder(p) for p in sorted((folder / 'checkpoints').glob('step-*'))]
    path = folder / 'run.json'
    if path.exists():
        told = json.loads(path.read_bytes())
        own = told.pop('sha256', None)
        if own not in (None, sha(told)):
            raise LabError(f'{path} was changed (wrong hash): copy it again')
        new = convert(told)
        if new != told:
            sealed = {**new, 'sha256': sha(new)} if own else new
            with atomic_write(path) as f:
                f.write_text(json.dumps(sealed, indent=1) + '\n', encoding='utf-8')
            done.append(True)
    if (folder / 'config.yaml').exists():
        done.append(migrate_config(folder / 'config.yaml'))
    return any(done)


def migrate(path) -> bool:  # was there something to do?
    "Convert what lies at a path; raises `LabError` where it is none of these"
    path = Path(path)
    if path.is_file() and path.suffix in ('.yaml', '.yml'):
        return migrate_config(path)
    if (path / 'package.json').exists():
        return migrate_folder(path)
    if (path / 'checkpoints').is_dir() or (path / 'run.json').exists():
        return migrate_run(path)
    if path.is_dir() and ((path / 'runs').is_dir() or (path / 'config.yaml').exists()):
        runs = [migrate(p) for p in sorted((path / 'runs').glob('*')) if p.is_dir()]
        own = path / 'config.yaml'
        return any([*runs, own.exists() and migrate_config(own)])
    raise LabError(f'{path}: give a .yaml file, or the folder of a package, a checkpoint or a run')


def main(paths):
    if not paths or any(p.startswith('-') for p in paths):
        print(__doc__, file=sys.stderr)
        return 2
    for path in paths:
        try:
            print(f'{path}: {"format 2 now" if migrate(path) else "nothing to do"}')
        except (LabError, OSError, ValueError, KeyError) as e:
            print(f'migrate: {path}: {e}', file=sys.stderr)
            return 1
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
