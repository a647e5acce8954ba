"""Whatever a stranger sends, opening it runs nothing.

Three hundred hostile packages, configs, checkpoints, tokenizers and Hugging Face folders. Each is
made by a generator with a fixed seed and sealed as its author would seal it, so that no hash gives
it away. A child process tries them one after the other under an audit hook: each must be refused by
one `LabError` of one line, with nothing imported, written or started, in at most five seconds of
processor time and 300 MB. The fast tests take every tenth.
"""

import ast
import importlib
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import tiny_model
import torch
from torch import nn

from llm_lab import core
from llm_lab.core import HOLDS, SLOTS, LabError, _NO_PARTS, address, check_recipe, lookup

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted(p.stem for p in (ROOT / 'llm_lab').glob('*.py') if p.stem[0] != '_')
SECONDS, BYTES = 5, 300e6


def public(stem):
    "The names of a chapter, read from its text: nothing is imported"
    body = ast.parse((ROOT / 'llm_lab' / f'{stem}.py').read_text(encoding='utf-8')).body
    return next(
        ast.literal_eval(o.value)
        for o in body
        if isinstance(o, ast.Assign) and getattr(o.targets[0], 'id', '') == '__all__'
    )


# ---- the generator: each maker gets a folder to fill, a source of chance, and the honest things to
# copy


def names(r):
    "A word that nobody may say in any place, or not in this one"
    module = r.choice(CHAPTERS)
    return r.choice(
        [
            lambda: f'llm_lab.{module}:{r.choice(public(module))}',
            lambda: f'llm_lab.{module}:{r.choice(public(module))}',
            lambda: r.choice(public(module)),
            lambda: f'torch.nn:{r.choice([n for n in dir(nn) if n[0] != "_"])}',
            lambda: f'builtins:{r.choice(["eval", "exec", "open", "__import__"])}',
            lambda: r.choice(
                [
                    'os:system',
                    'subprocess:Popen',
                    'importlib:import_module',
                    'model_code:run',
                    'gift.model_code:run',
                    'os',
                    'system',
                    '',
                    'llm_lab.core:os',
                    'llm_lab.core:os.system',
                    'llm_lab.gpt:MLP.__init__',
                    'llm_lab.gpt:__builtins__',
                    'llm_lab..gpt:MLP',
                    'llm_lab.gpt:MLP ',
                    ' MLP',
                    'llm_lab:gpt',
                    'torch.nn.modules:GELU',
                    'torch.nn:functional',
                    'torch.nn.functional:gelu',
                    'torch:load',
                    'torch.hub:load',
                    'llm_lab.gpt:\u041cLP',
                    'LLM_LAB.GPT:MLP',
                    '../model_code:run',
                    'llm_lab.gpt:MLP\n',
                    'llm_lab.core:require',
                    'llm_lab.hubdata:dolly',
                    'tiny_tales',
                    'CharTokenizer',
                    'llm_lab.cli:main',
                ]
            ),
            lambda: r.choice([None, 5, [], {}, True, ['MLP'], 'x' * 10_000]),
        ]
    )()


def places(word, **kw):
    """A recipe of that word in each place of a model, those inside other recipes too: {slot:
    configuration}"""
    x = dict(part=word, **kw)
    of = lambda name, **kw: dict(part=name, **kw)
    return [
        ('mixer', dict(attn=x)),
        ('mlp', dict(mlp=x)),
        ('norm', dict(norm=x)),
        ('pos', dict(pos=x)),
        ('lm_head', dict(lm_head=x)),
        ('init', dict(init=x)),
        ('block', dict(block=x)),
        ('objective', dict(objective=x)),
        ('act', dict(mlp=of('MLP', act=x))),
        ('act', dict(mlp=of('llm_lab.llama_block:SwiGLU', act=x))),
        ('mask', dict(attn=of('Attention', mask=x))),
        ('transform', dict(attn=of('Attention', transforms=[of('RoPE'), x]))),
        ('scaling', dict(attn=of('Attention', transforms=[of('RoPE', scale=x)]))),
        ('init', dict(init=of('spectral_init', first=x))),
        ('mlp', dict(mlp=of('MoE', expert=x))),
        ('router', dict(mlp=of('MoE', router=x))),
        ('choice', dict(mlp=of('MoE', router=of('Router', choose=x)))),
        ('mask', dict(attn=of('SparseAttention', mask=of('or_masks', of=[of('causal'), x])))),
        ('mixer', dict(attn=of('alternate', of=[of('Attention'), x]))),
        ('mlp', dict(mlp=of('alternate', of=[x]))),
        ('act', dict(mlp=of('alternate', of=[of('MLP')], act=x))),
        # where no recipe may stand at all
        (None, dict(mlp=of('MLP', bias=x))),
        (None, dict(attn=of('Attention', bias=[x]))),
        (None, dict(d_model=x)),
        (None, dict(norm=of('RMSNorm', eps=x))),
        (None, dict(mlp=of('MoE', router=of('Router', choose=of('sigmoid_top_k', scale=x))))),
        (None, dict(tie=x)),
        (None, dict(lm_head=of('SoftcapHead', cap=x))),
    ]


KEYWORDS = [
    {},
    dict(module='model_code'),
    dict(argv=['--help']),
    dict(path='it_ran'),
    dict(folder='.'),
    dict(name='x', url='http://127.0.0.1:9/x'),
]


def wrong_name(r):
    while True:
        word, kw = names(r), r.choice(KEYWORDS)
        slot, told = r.choice(places(word, **kw))
        if (
            slot is None
            or not isinstance(word, str)
            or word not in SLOTS[slot]
            and word not in SLOTS[slot].values()
        ):
            return told


def wrong_size(r):
    huge = r.choice(
        [
            10**9,
            10**12,
            2**62,
            10**30,
            10**400,
            -1,
            -(10**9),
            0,
            1.5,
            '8',
            True,
            None,
            [8],
            float('nan'),
            float('inf'),
        ]
    )
    of = lambda name, **kw: dict(part=name, **kw)
    rope = lambda **kw: dict(attn=of('Attention', transforms=[of('RoPE', **kw)]))
    big = huge if isinstance(huge, int) and huge > 10**8 else 10**9
    return r.choice(
        [
            lambda: {r.choice(['vocab_size', 'd_model', 'n_layers', 'n_heads', 'max_len']): huge},
            lambda: dict(d_head=big),
            lambda: dict(d_head=-1),
            lambda: dict(d_head=65_536, n_layers=1000, n_heads=1),
            lambda: dict(dropout=r.choice(['x', 2, -1, [0], float('nan'), big])),
            lambda: dict(d_model=2**20, n_heads=1),
            lambda: dict(d_model=2**20, n_heads=1, n_layers=2048),
            lambda: dict(vocab_size=2**27),
            lambda: dict(tie=r.choice([1, 'yes', None, []])),
            lambda: dict(mlp=of(r.choice(['MLP', 'SwiGLU']), d_ff=r.choice([big, -3, '9', 2.5]))),
            lambda: dict(mlp=of('MoE', n_experts=big)),
            lambda: dict(mlp=of('MoE', shared=10**6)),
            lambda: dict(mlp=of('MoE', top_k=r.choice([99, -1, 'x']))),
            lambda: dict(mlp=of('MoE', capacity=r.choice(['x', -1, 0]))),
            lambda: dict(
                attn=of(
                    'SparseAttention', mask=of('expander_links', degree=r.choice([10**9, -1, 'x']))
                )
            ),
            lambda: dict(
                attn=of(
                    'SparseAttention', mask=of('attention_sinks', n=r.choice([10**9, 10**15, -1]))
                )
            ),
            lambda: dict(attn=of('SparseAttention', mask=of('polynomial_links', degree=10**9))),
            lambda: dict(
                attn=of('Attention', mask=of('sliding_window', size=r.choice([0, -5, 'x', 10**30])))
            ),
            lambda: dict(attn=of('Attention', mask=of('sliding_window'))),
            lambda: dict(attn=of('GQA', n_kv_heads=r.choice([0, 10**9, 'x', None]))),
            lambda: dict(
                attn=of(
                    'Attention',
                    transforms=[of('RoPE')] * 1_000_000
                    if r.random() < 0.1
                    else [of('RoPE')] * 12_000,
                )
            ),
            lambda: dict(attn=of('Attention', transforms=of('RoPE'))),
            lambda: dict(attn=of('Attention', transforms='RoPE')),
            lambda: dict(attn=of('Attention', mask=None)),
            lambda: rope(base=r.choice([0, -1, 'x', True, float('inf')])),
            lambda: rope(partial=r.choice([2, 0, 'x'])),
            lambda: rope(interleaved='yes'),
            lambda: rope(scale=of('linear_scaling', factor=r.choice([0, 'x', None]))),
            lambda: rope(scale=of('linear_scaling')),
            lambda: rope(scale=4),
            lambda: dict(lm_head=of('Linear', bias='x')),
            lambda: dict(lm_head=of('Linear', device='meta')),
            lambda: dict(lm_head=of('Linear', in_features=3)),
            lambda: dict(lm_head=of('SoftcapHead', cap='x')),
            lambda: dict(norm=of('LayerNorm', normalized_shape=10**9)),
            lambda: dict(norm=of('LayerNorm', dtype='float64')),
            lambda: dict(mlp=of('MLP', cfg=5)),
            lambda: dict(mlp=of('MLP', layer=5)),
            lambda: dict(attn=of('Attention', mask=of('causal', i=3))),
            lambda: dict(attn=of('Attention', mask=of('same_document', doc=3))),
            lambda: dict(mlp=of('MLP', act=of('GELU', approximate='x'))),
            lambda: dict(mlp=of('MLP', act=of('ReLU', inplace=True))),
            lambda: dict(init=of('gpt2_init', model=5)),
            lambda: dict(init=of('scaled_init', out='x')),
            lambda: dict(init=of('scaled_init', std='x')),
            lambda: dict(mlp=of('MoE', router=of('Router', top_k=3))),
            lambda: dict(mlp=of('MoE', router=of('Router', choose=of('softmax_top_k', logits=1)))),
            lambda: dict(attn=nested('alternate', 'Attention', r.choice([20, 400, 3000]))),
            lambda: dict(attn=of('SparseAttention', mask=nested('or_masks', 'causal', 300))),
            lambda: dict(mlp=of('MLP', d_fff=3)),
            lambda: dict(colour='red'),
            lambda: dict(attn=of('Attention', bias=2**60)),
            lambda: dict(mlp=None),
            lambda: dict(init=None),
            lambda: dict(attn=5),
            lambda: dict(mlp=of('MLP', bias=1)),
            lambda: dict(norm=of('Identity', junk='x' * 2000)),
        ]
    )()


def nested(name, last, deep):
    x = dict(part=last)
    for _ in range(deep):
        x = dict(part=name, of=[x])
    return x


def with_config(folder, told):
    "The honest package with another configuration, sealed"
    data = json.loads((folder / 'llm_lab.json').read_text()) | told
    (folder / 'llm_lab.json').write_text(deep_dumps(data))
    sealed(folder)


def deep_dumps(x):
    old = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)
    try:
        return json.dumps(x)
    finally:
        sys.setrecursionlimit(old)


def sealed(folder, **about):
    from llm_lab.package import write_manifest

    write_manifest(
        folder, 'package.json', ('llm_lab.json', 'tokenizer.json', 'model.safetensors'), about=about
    )


def said_by_name(folder, r):
    with_config(folder, wrong_name(r))


def said_by_size(folder, r):
    with_config(folder, wrong_size(r))


def sha(data):
    import hashlib

    return hashlib.sha256(
        data if isinstance(data, bytes) else json.dumps(data, sort_keys=True).encode()
    ).hexdigest()


class Payload:
    def __reduce__(self):
        return open, ('it_ran', 'w')


JUNK = [
    lambda r: b'',
    lambda r: b'{',
    lambda r: b'[]',
    lambda r: b'null',
    lambda r: b'\x00' * 999,
    lambda r: b'[' * 200_000 + b']' * 200_000,
    lambda r: b'{"a":' * 200_000,
    lambda r: b'[' + b'[],' * 9_000_000 + b'1]',
    lambda r: b'{"a": ' + b'9' * 5000 + b'}',
    lambda r: b'\xff\xfe' + b'{' * 99,
    lambda r: pickle.dumps(Payload()),
    lambda r: b'"' + b'x' * (70 << 20) + b'"',
    lambda r: r.randbytes(999),
    lambda r: b'1e999',
]


def damaged(folder, r):
    "A file of another kind, sealed or not"
    f = r.choice(['llm_lab.json', 'tokenizer.json', 'model.safetensors', 'package.json'])
    (folder / f).write_bytes(r.choice(JUNK)(r))
    if f != 'package.json':
        sealed(folder)


def headed(folder, r):
    "Weights whose head lies"
    path = folder / 'model.safetensors'
    old = path.read_bytes()
    n = int.from_bytes(old[:8], 'little')
    head, data = json.loads(old[8 : 8 + n]), old[8 + n :]
    first = next(k for k in head if k != '__metadata__')

    def write(head, n=None, data=data):
        text = json.dumps(head).encode() if not isinstance(head, bytes) else head
        path.write_bytes((len(text) if n is None else n).to_bytes(8, 'little') + text + data)

    change = lambda **kw: write(head | {first: head[first] | kw})
    r.choice(
        [
            lambda: write(head, n=2**63),
            lambda: write(head, n=10**9),
            lambda: path.write_bytes(b'\xff' * 8),
            lambda: change(shape=[10**9, 10**9]),
            lambda: change(shape=[-1, 5]),
            lambda: change(shape='x'),
            lambda: change(dtype='I64'),
            lambda: change(dtype='F8_E4M3'),
            lambda: change(dtype=5),
            lambda: change(data_offsets=[0, 10**12]),
            lambda: change(data_offsets=[8, 0]),
            lambda: write({k: v for k, v in head.items() if k != first}),
            lambda: write(head | {'more.weight': head[first]}),
            lambda: write({}),
            lambda: write({k: 5 for k in head}),
            lambda: write(b'[' * 200_000),
            lambda: write(b'{' + b' ' * 999),
            lambda: write(head, data=b''),
            lambda: write(head, data=data + b'\0' * 999),
            lambda: write(
                {
                    f'blocks.0.attn.qkv.parametrizations.weight.{k}': head[first]
                    for k in ('original', '0.u')
                }
            ),
            lambda: write(
                {
                    f't{n}': dict(dtype='F32', shape=[0], data_offsets=[0, 0])
                    for n in range(300_000)
                },
                data=b'',
            ),
            lambda: write({k if k != first else first + '\n': v for k, v in head.items()}),
        ]
    )()
    sealed(folder)


def pointing(folder, r):
    "Links, pipes, and names that lead out of the folder"
    f = r.choice(['llm_lab.json', 'tokenizer.json', 'model.safetensors'])

    def link(to):
        (folder / f).unlink()
        (folder / f).symlink_to(to)

    def outside():
        (folder.parent / f'{folder.name}.{f}').write_bytes((folder / f).read_bytes())
        link(folder.parent / f'{folder.name}.{f}')

    def pipe():
        (folder / f).unlink()
        os.mkfifo(folder / f)

    def sparse():
        with open(folder / f, 'wb') as o:
            o.truncate(50 << 30)

    def listed(change):
        said = json.loads((folder / 'package.json').read_text())
        said.pop('sha256')
        change(said)
        (folder / 'package.json').write_text(json.dumps({**said, 'sha256': sha(said)}))

    r.choice(
        [
            lambda: link('/dev/zero'),
            lambda: link('/etc/passwd'),
            outside,
            pipe,
            sparse,
            lambda: link(f),
            lambda: link('.'),
            lambda: ((folder / f).unlink(), (folder / f).mkdir()),
            lambda: listed(lambda s: s.pop('files')),
            lambda: listed(lambda s: s.update(files=[f])),
            lambda: listed(lambda s: s.pop('about')),
            lambda: listed(lambda s: s.update(about='x')),
            lambda: listed(lambda s: s.update(format='x' * 999)),
            lambda: listed(lambda s: s['files'].clear()),
            lambda: listed(lambda s: s.update(files={f: 5})),
        ]
    )()


def as_run(folder, r):
    "The folder of a run whose `latest` or `best` names something else"
    package = folder / 'checkpoints' / 'step-000001'
    name = r.choice(['best', 'latest'])
    package.mkdir(parents=True)
    for p in [p for p in folder.iterdir() if p.is_file()]:
        p.rename(package / p.name)
    shutil.copytree(package, folder.parent / f'{folder.name}.outside')
    text = r.choice(
        [
            f'../../{folder.name}.outside',
            str(folder.parent / f'{folder.name}.outside'),
            '..',
            '',
            '\x00',
            b'\xff\xfe',
            'a/b',
            'step-000001/../..',
            'x' * 9999,
            '\\\\host\\share',
            'C:x',
            'step\n..',
        ]
    )
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


# ---- tokenizers


def tokenizer(folder, r):
    path = folder / 'tokenizer.json'
    level = dict(type='ByteLevel', add_prefix_space=False, use_regex=True)
    from llm_lab.bpe import _LETTER

    letters = {c: n for n, c in enumerate(_LETTER.values())}

    def bpe(vocab=letters, merges=(), pre=level, **kw):
        return (
            dict(
                model=dict(type='BPE', vocab=dict(vocab), merges=list(merges)),
                pre_tokenizer=pre,
                decoder=level,
                added_tokens=[],
            )
            | kw
        )

    split = lambda p: dict(
        type='Sequence',
        pretokenizers=[
            dict(type='Split', pattern=dict(Regex=p), behavior='Isolated', invert=False),
            level,
        ],
    )
    words = lambda vocab: dict(model=dict(type='WordLevel', vocab=vocab))
    odd = r.choice([10**9, 2**40, -1, 1.5, '7', None, [], True, 2**22])
    data = r.choice(
        [
            lambda: bpe(letters | {'th': odd}),
            lambda: bpe(added_tokens=[dict(id=odd, content='<x>')]),
            lambda: bpe(pre=split('(?:(?:a{1000}){1000}){1000}')),
            lambda: bpe(pre=split('(?:a{99}){99}')),
            lambda: bpe(pre=split('(' * 500 + 'a' + ')' * 500)),
            lambda: bpe(pre=split('a)|(b')),
            lambda: bpe(pre=split('x' * 5000)),
            lambda: bpe(pre=split('a{999999999999}')),
            lambda: bpe(pre=split('[')),
            lambda: bpe(pre=split('a(?R)?b')),
            lambda: bpe(pre=split('(?:foo){e<=30}')),
            lambda: bpe(
                pre=dict(type='Sequence', pretokenizers=[*[dict(type='Digits')] * 5000, level])
            ),
            lambda: bpe(merges=[['q', 'qq']]),
            lambda: bpe(merges=[5]),
            lambda: bpe(merges=['a b c']),
            lambda: bpe(merges='x'),
            lambda: bpe({}),
            lambda: bpe(letters | {'\u6f22': 300}),
            lambda: bpe(added_tokens=5),
            lambda: bpe(added_tokens=[dict(id=300)]),
            lambda: bpe(normalizer=dict(type='Lua', code='os.exit()')),
            lambda: bpe(added_tokens=[dict(id=300, content='')]),
            lambda: words({'a': 0, 'b': 10**9}),
            lambda: words({'a': 'x'}),
            lambda: words({'a': -1}),
            lambda: words({'a': 0, 'b': 0}),
            lambda: words({}),
            lambda: dict(model=5),
            lambda: dict(model=dict(type='Unigram', vocab=[])),
            lambda: [],
            lambda: dict(model=dict(type='WordPiece', vocab={})),
        ]
    )()
    path.write_text(json.dumps(data))
    sealed(folder)


# ---- configs

YAML = [
    'train: {steps: !!python/object/apply:os.system ["touch it_ran"]}',
    '!!python/object/new:subprocess.Popen [["touch", "it_ran"]]',
    'data: {corpus: "${oc.env:HOME}"}',
    'eval: {prompt: "${oc.decode:x}"}',
    'a: &a [x,x,x,x,x,x,x,x,x]\n'
    + ''.join(
        f'{c}: &{c} [*{p},*{p},*{p},*{p},*{p},*{p},*{p},*{p},*{p}]\n'
        for p, c in zip('abcdefgh', 'bcdefghi')
    ),
    'eval: {prompt: "${data.corpus}${data.corpus}"}\ndata: {corpus: "${a}${a}"}\na: '
    + '"${b}${b}"\nb: '
    + '"${c}${c}"\nc: xxxxxxxx',
    'model: {attn: ' + '[' * 5000 + ']' * 5000 + '}',
    '[' * 60_000,
    'a: "' + 'x' * 70_000 + '"',
    'model: {mlp: {part: "llm_lab.gpt:MLP", act: {part: "${x}"}}}\nx: "os:system"',
    'model: {n_layers: 1000000000}',
    'model: {d_model: 1000000000}',
    'model: {d_model: 131072, n_layers: 1024, n_heads: 128}',
    'data: {vocab_size: 1000000000, tokenizer: bpe}',
    'data: {length: 100000000000}\neval: {tokens: 1000000000000}',
    'train: {batch_size: 1000000000000}',
    'log: {tracker: model_code}',
    'train: {optimizer: "os:system"}',
    'model: {block: "llm_lab.cli:main"}',
    'model: {attn: {part: GQA, n_kv_heads: 1000000000}}',
    'model: {mlp: {part: MoE, n_experts: 1000000000}}',
    'model: {mlp: {part: MoE, shared: 1000000}}',
    '? {a: b}\n: c',
    'model: {mlp: {part: MLP, act: gelu}}',
    'model: {mlp: {part: MLP, 5: 5}}',
    'train: {steps: 1e400}',
    '\x00',
    '%YAML 9.9\n---\na: b',
    'model: {pos: {part: LearnedPositions, cfg: 5}}',
    'model: {init: {part: "llm_lab.package:load", path: x}}',
]


def config(folder, r):
    for p in folder.iterdir():
        p.unlink()
    if r.random() < 0.5:
        text = r.choice(YAML)
    else:
        text = 'model: ' + json.dumps(
            {k: v for k, v in wrong_name(r).items() if k not in ('d_model', 'tie')}
            or dict(mlp=dict(part='os:system'))
        )
    (folder / 'config.yaml').write_text(text)


# ---- checkpoints


def checkpoint(folder, r, base):
    "A whole checkpoint of the honest run, changed and sealed again"
    from llm_lab.package import write_manifest

    for p in folder.iterdir():
        p.unlink()
    for p in base.iterdir():
        shutil.copy(p, folder / p.name)
    state = json.loads((folder / 'state.json').read_text())
    odd = r.choice([10**9, -5, 'x', None, [], {}, 1.5, True, [5]])

    def told(**kw):
        (folder / 'state.json').write_text(json.dumps(state | kw))

    def junk(f):
        (folder / f).write_bytes(r.choice(JUNK)(r))

    extra = []
    r.choice(
        [
            lambda: told(step=odd),
            lambda: told(parts=odd or 5),
            lambda: told(parts={'evil': {}}),
            lambda: told(groups=r.choice([5, [5], [{}], 'x'])),
            lambda: told(notes='x'),
            lambda: told(random=[{'cpu': 'AAAA'}]),
            lambda: told(random=[5]),
            lambda: told(random=[{'cpu': '%%%'}]),
            lambda: told(made=5),
            lambda: junk('state.json'),
            lambda: junk('optimizer.safetensors'),
            lambda: junk('model.safetensors'),
            lambda: (folder / 'state.json').unlink(),
            lambda: extra.append('../../../etc/passwd'),
            lambda: extra.append('/dev/zero'),
        ]
    )()
    write_manifest(
        folder,
        'manifest.json',
        sorted(p.name for p in folder.iterdir() if p.name != 'manifest.json'),
    )
    if extra:
        said = json.loads((folder / 'manifest.json').read_text())
        said.pop('sha256')
        said['files'][extra[0]] = '0' * 64
        (folder / 'manifest.json').write_text(json.dumps({**said, 'sha256': sha(said)}))


# ---- Hugging Face's folders


def hub(folder, r, base):
    for p in folder.iterdir():
        p.unlink()
    kind = r.choice(sorted(p.name for p in base.iterdir()))
    for p in (base / kind).iterdir():
        shutil.copy(p, folder / p.name)
    said = json.loads((folder / 'config.json').read_text())
    deep, layers = ('n_layer', 'n_embd') if kind == 'gpt2' else ('num_hidden_layers', 'hidden_size')
    odd = r.choice([10**6, 10**9, 10**30, -1, 0, 'x', None, [], {}, 1.5, True])

    def told(**kw):
        (folder / 'config.json').write_text(json.dumps(said | kw))

    def index(place):
        (folder / 'model.safetensors').rename(folder / 'a.safetensors')
        (folder / 'model.safetensors.index.json').write_text(json.dumps(place))

    def link(to):
        (folder / 'model.safetensors').unlink()
        (folder / 'model.safetensors').symlink_to(to)

    def lying_head():
        old = (folder / 'model.safetensors').read_bytes()
        n = int.from_bytes(old[:8], 'little')
        head = old[8 : 8 + n].replace(b'"F32"', b'"I32"', 1)
        (folder / 'model.safetensors').write_bytes(old[:8] + head + old[8 + n :])

    def outside():
        (folder / 'model.safetensors').rename(folder.parent / f'{folder.name}.out')
        (folder / 'model.safetensors').symlink_to(folder.parent / f'{folder.name}.out')

    bad = [deep, layers, 'vocab_size'] + dict(
        mixtral=['num_local_experts', 'num_experts_per_tok', 'head_dim'],
        qwen3_moe=['num_experts', 'moe_intermediate_size', 'head_dim'],
    ).get(kind, [])
    r.choice(
        [
            lambda: told(**{r.choice(bad): odd if odd is not None else 'x'}),
            lambda: told(**{r.choice(bad): odd if odd is not None else 'x'}),
            lambda: told(**{deep: 10**7}),
            lambda: told(model_type=r.choice(['evil', None, [], {}, '../x'])),
            lambda: told(hidden_act='os:system', activation_function='os:system'),
            lambda: told(rope_parameters='x', rope_scaling='x', layer_norm_epsilon='x'),
            lambda: told(head_dim=10**8, n_head=10**8),
            lambda: told(mlp_only_layers=5, activation_function=[], hidden_act=[]),
            lambda: told(num_local_experts=50_000, num_experts=50_000, **{deep: 900}),
            lambda: (folder / 'config.json').write_bytes(r.choice(JUNK)(r)),
            lambda: index(dict(weight_map={'x': '../../../etc/passwd'})),
            lambda: index(dict(weight_map={'x': '/etc/passwd'})),
            lambda: index(dict(weight_map={'x': 5})),
            lambda: index(5),
            lambda: index(dict(weight_map={'x': 'none.safetensors'})),
            lambda: index(dict(weight_map={f'{n}': f'{n}.safetensors' for n in range(5000)})),
            lambda: link('/dev/zero'),
            lambda: link('/etc/passwd'),
            outside,
            lying_head,
            lambda: (folder / 'model.safetensors').write_bytes(b'\xff' * 99),
            lambda: (folder / 'model.safetensors').write_bytes(
                (2**24).to_bytes(8, 'little') + b'[],' * 6_000_000
            ),
            lambda: (
                (folder / 'model.safetensors').unlink(),
                (folder / 'pytorch_model.bin').write_bytes(pickle.dumps(Payload())),
            ),
            lambda: (
                (folder / 'model.safetensors').unlink(),
                os.mkfifo(folder / 'model.safetensors'),
            ),
        ]
    )()


# ---- packed folders, and what a saved model says about its text


def packed(folder, r, base):
    from llm_lab.packing import _seal

    shutil.rmtree(folder)
    shutil.copytree(base, folder)
    meta = json.loads((folder / 'meta.json').read_text())

    def told(**kw):
        m = meta | kw
        m['sha256'] = _seal(m)
        (folder / 'meta.json').write_text(json.dumps(m))

    files = meta['files']
    r.choice(
        [
            lambda: told(files=files | {'../../x': dict(size=0, sha256='')}),
            lambda: told(files=files | {'/dev/zero': dict(size=0, sha256='')}),
            lambda: told(files=5),
            lambda: told(splits={'train': 5}),
            lambda: told(splits={}),
            lambda: told(tokenizer={}),
            lambda: told(tokenizer=meta['tokenizer'] | dict(vocab_size='x')),
            lambda: told(files={k: v | dict(size=10**12) for k, v in files.items()}),
            lambda: (folder / 'meta.json').write_bytes(r.choice(JUNK)(r)),
            lambda: (
                (folder / 'train.bin').unlink(),
                (folder / 'train.bin').symlink_to('/dev/zero'),
            ),
            lambda: (
                (folder / 'meta.json').unlink(),
                (folder / 'meta.json').symlink_to('/dev/zero'),
            ),
        ]
    )()


def about(folder, r):
    "A package that names a text of the reader's"
    (folder / 'secret.txt').write_text('the password is swordfish\n' * 9)
    told = dict(
        data=r.choice(
            [
                str(folder / 'secret.txt'),
                '/dev/zero',
                '/etc/passwd',
                '../secret.txt',
                5,
                ['x'],
                {'part': 'os:system'},
                'os:system',
            ]
        ),
        corpus_sha256=r.choice(['0' * 64, None, 5]),
    )
    (folder / 'about.json').write_text(json.dumps(told))


MAKERS = [
    (said_by_name, 110),
    (said_by_size, 60),
    (damaged, 10),
    (headed, 20),
    (pointing, 10),
    (as_run, 10),
    (tokenizer, 20),
    (config, 20),
    (checkpoint, 10),
    (hub, 20),
    (packed, 5),
    (about, 5),
]
CASES = [(maker, seed) for maker, n in MAKERS for seed in range(n)]
# a tenth, of each kind
FEW = [n for n, (maker, seed) in enumerate(CASES) if seed % 10 == 1 and seed < 100]
assert len(CASES) == 300 and len(FEW) == 30


# ---- the honest things


def honest(folder):
    """A package, a checkpoint, Hugging Face folders and packed tokens of tiny models, to be copied
    and changed"""
    from llm_lab.checkpoint import CheckpointManager
    from llm_lab.chars import CharTokenizer
    from llm_lab.corpora import Corpus
    from llm_lab.gpt import GPTConfig, MiniGPT
    from llm_lab.parts import part
    from llm_lab.hub import to_hf
    from llm_lab.llama_block import QKNorm, SwiGLU, llama
    from llm_lab.positions import RoPE
    from llm_lab.moe import MoE, Router, softmax_top_k
    from llm_lab.packing import pack
    from llm_lab.package import save
    from llm_lab.train import TrainState, adamw

    size = dict(vocab_size=4, max_len=8, d_model=8, n_layers=2, n_heads=2)
    tok = CharTokenizer('abc\n')
    model = MiniGPT(GPTConfig(**size))
    save(folder / 'package', model, tok, {})
    run = TrainState(model, 10, optimizer=adamw(model))
    run.step = 2
    saves = CheckpointManager(folder / 'run', tok)
    saves(run)
    moe = part(
        MoE,
        n_experts=2,
        top_k=1,
        expert=part(SwiGLU, d_ff=8),
        router=part(Router, z=0.0, choose=part(softmax_top_k)),
    )
    from llm_lab.self_attention import Attention

    qk = part(Attention, transforms=(part(QKNorm), part(RoPE)), bias=False)
    for name, cfg in dict(
        gpt2=GPTConfig(**size),
        llama=llama(**size),
        mixtral=llama(**size, mlp=moe),
        qwen3_moe=llama(**size, mlp=moe, attn=qk),
    ).items():
        to_hf(folder / 'hub' / name, MiniGPT(cfg), tok, family=name)
    text = 'abc\n' * 99
    pack(Corpus('tiny', dict(train=text, val=text)), tok, folder / 'packed', processes=1)
    return run


def made(folder, numbers):
    "{number: folder} of the cases, beside what is honest"
    base, out = folder / 'honest', {}
    for n in numbers:
        maker, seed = CASES[n]
        place = folder / f'case{n}'
        shutil.copytree(base / 'package', place)
        (place / 'model_code.py').write_text(
            "open('it_ran', 'w').write('yes')\ndef run(**kw): open('it_ran', 'w')\n"
        )
        if maker is config:
            (place / 'model_code.py').unlink()
        more = {
            checkpoint: base / 'run' / 'checkpoints' / 'step-000002',
            hub: base / 'hub',
            packed: base / 'packed',
        }.get(maker)
        maker(place, random.Random(f'{maker.__name__}/{seed}'), *([more] if more else ()))
        out[n] = place
    return out


# ---- the child: it tries them, and tells

WRITES = {
    'os.remove',
    'os.rename',
    'os.mkdir',
    'os.rmdir',
    'os.chmod',
    'os.chown',
    'os.truncate',
    'os.link',
    'os.symlink',
    'os.utime',
    'os.putenv',
    'os.system',
    'os.exec',
    'os.fork',
    'os.posix_spawn',
    'os.spawn',
    'os.startfile',
    'subprocess.Popen',
    'shutil.rmtree',
    'shutil.copyfile',
    'shutil.move',
    'socket.connect',
    'socket.bind',
    'socket.getaddrinfo',
    'socket.__new__',
    'urllib.Request',
    'ctypes.dlopen',
    'pty.spawn',
    'tempfile.mkstemp',
    'tempfile.mkdtemp',
    'marshal.loads',
    'pickle.find_class',
    'webbrowser.open',
    'signal.pthread_kill',
    'sqlite3.connect',
}
OURS = {
    'llm_lab',
    'torch',
    'numpy',
    'regex',
    'yaml',
    'omegaconf',
    'antlr4',
    'safetensors',
    'tokenizers',
    'fastcore',
    'tqdm',
    'sympy',
    'mpmath',
    'typing_extensions',
    'filelock',
}


def watch(seen, on):
    "Note in `seen` whatever a file must not bring about, while `on` holds something"

    def hook(event, args):
        if not on:
            return
        if event == 'open':
            path, mode, flags = args
            if (
                isinstance(mode, str)
                and set(mode) & set('wax+')
                or isinstance(flags, int)
                and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            ):
                seen.append(f'open {path} {mode} {flags}')
        elif event == 'import':
            if args[0].partition('.')[0] not in OURS | sys.stdlib_module_names:
                seen.append(f'import {args[0]}')
        elif event in WRITES and not (event == 'marshal.loads'):
            seen.append(f'{event} {str(args)[:80]}')

    sys.addaudithook(hook)


def rss(word):
    return next(
        1024 * int(l.split()[1])
        for l in Path('/proc/self/status').read_text().splitlines()
        if l.startswith(word)
    )


def attempt(maker, place, run):
    "Open it as a user would"
    from llm_lab.chars import load_tokenizer
    from llm_lab.checkpoint import CheckpointManager
    from llm_lab.config import read_config
    from llm_lab.corpora import corpus_of
    from llm_lab.hub import from_hf
    from llm_lab.packing import PackedTokens
    from llm_lab.package import load
    from llm_lab.runs import _affordable, model_config

    if maker is config:
        return _affordable(model_config(read_config(place), 65))
    if maker is checkpoint:
        return CheckpointManager(place.parent / 'run', None).load(run, place)
    if maker is hub:
        return from_hf(place)
    if maker is packed:
        return PackedTokens(place)
    if maker is about:
        return corpus_of(json.loads((place / 'about.json').read_text()))
    if maker is tokenizer:
        load_tokenizer(place)
    return load(place)


def child(folder, numbers):
    "What came of each case, as a line of JSON"
    import resource
    import warnings

    warnings.simplefilter('ignore')
    run = honest(folder / 'honest')
    for stem in CHAPTERS:
        importlib.import_module(f'llm_lab.{stem}')
    cases = made(folder, numbers)
    for maker, place in (
        (said_by_name, 'package'),
        (hub, 'hub/mixtral'),
        (packed, 'packed'),
        (checkpoint, 'run/checkpoints/step-000002'),
    ):
        attempt(maker, folder / 'honest' / place, run)  # lazily imported things are there
    calm = folder / 'calm'
    calm.mkdir()
    (calm / 'config.yaml').write_text('model: {d_model: 32}')
    attempt(config, calm, run)
    # a fault of ours must not take the machine down
    resource.setrlimit(resource.RLIMIT_AS, (rss('VmSize') + (6 << 30),) * 2)
    seen, on = [], []
    watch(seen, on)
    sys.path.insert(0, '')
    for n, place in cases.items():
        os.chdir(place.parent if CASES[n][0] is config else place)
        try:
            Path('/proc/self/clear_refs').write_text('5')  # the peak begins anew
        except OSError:
            pass
        before, start = rss('VmRSS'), time.process_time()
        seen.clear()
        why = ''
        on.append(1)
        try:
            attempt(CASES[n][0], place, run)
            said = 'TAKEN'
        except LabError as e:
            said = 'refused' if '\n' not in str(e) and 0 < len(str(e)) < 2000 else 'NOT ONE LINE'
            why = str(e)
        except BaseException as e:
            said, why = type(e).__name__, str(e)
        finally:
            on.clear()
        print(
            json.dumps(
                dict(
                    n=n,
                    said=said,
                    why=why[:300],
                    seen=seen,
                    seconds=time.process_time() - start,
                    grown=rss('VmHWM') - before,
                )
            ),
            flush=True,
        )
        if list(folder.rglob('it_ran')):
            print(json.dumps(dict(n=n, said='IT RAN', seen=[], seconds=0, grown=0)), flush=True)


def tried(folder, numbers):
    "What is wrong, a line for each case"
    env = {
        **os.environ,
        'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT / 'tests')]),
        'OMP_NUM_THREADS': '1',
        'LLM_LAB_HOME': str(folder / 'home'),
    }
    out = subprocess.run(
        [sys.executable, __file__, str(folder), *map(str, numbers)],
        capture_output=True,
        text=True,
        env=env,
        cwd=folder,
    )
    rows = [json.loads(line) for line in out.stdout.splitlines() if line.startswith('{')]
    wrong = [
        r
        for r in rows
        if r['said'] != 'refused' or r['seen'] or r['seconds'] > SECONDS or r['grown'] > BYTES
    ]
    wrong += [
        dict(n=n, said='no answer', err=out.stderr[-800:])
        for n in {*numbers} - {r['n'] for r in rows}
    ]
    return [f'{CASES[w["n"]][0].__name__}/{CASES[w["n"]][1]}: {w}' for w in wrong]


needs_linux = pytest.mark.skipif(
    not sys.platform.startswith('linux'), reason='/proc tells how much memory a process has taken'
)


@needs_linux
def test_thirty_hostile_things_are_refused_and_nothing_runs(tmp_path):
    assert {CASES[n][0] for n in FEW} == {maker for maker, _ in MAKERS}
    assert tried(tmp_path, FEW) == []


@needs_linux
@pytest.mark.slow
def test_three_hundred_hostile_things_are_refused_and_nothing_runs(tmp_path):
    assert tried(tmp_path, range(len(CASES))) == []


def test_the_watch_sees(tmp_path, monkeypatch):
    "The hook that found nothing would have found it"
    code = (
        "import sys, os; sys.path.insert(0, sys.argv[1]); from test_hostile import "
        "watch\nseen, on = [], [1]; watch(seen, on)\n"
        "open('x', 'w'); os.mkdir('d')\n"
        "try: import model_code_x\nexcept ImportError: pass\n"
        "on.clear(); print(len(seen), 'import model_code_x' in seen)"
    )
    out = subprocess.run(
        [sys.executable, '-c', code, str(ROOT / 'tests')],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )
    assert out.stdout.split() == ['3', 'True'], out.stdout + out.stderr


# ---- the table, and honest things


def entries():
    return [(slot, name, a) for slot, place in SLOTS.items() for name, a in place.items()]


@pytest.mark.parametrize('slot', SLOTS)
def test_what_the_table_declares_is_there_and_public(slot):
    for name, a in SLOTS[slot].items():
        module, _, word = a.partition(':')
        found = lookup(a, slot)
        assert found is lookup(name, slot) and word in getattr(
            importlib.import_module(module), '__all__', dir(nn)
        ), a
        if module == 'torch.nn':
            assert isinstance(found, type) and issubclass(found, nn.Module)


def test_a_name_means_one_thing_in_all_places():
    known = {}
    for _, name, a in entries():
        assert known.setdefault(name, a) == a


def test_every_part_that_a_chapter_makes_public_is_declared():
    "A new layer, norm or pattern must stand in the table, or here with a reason"
    # the whole, its frame, what parts are made of, or turned into
    apart = {
        'MiniGPT',
        'Part',  # the base class of all
        'ExpertLinear',
        'Spectral',
        'TransposedLinear',
        'Fast',
        'Int8Linear',
        # put on a model that is built, and taken off again
        'Adapter',
        'LoRALinear',
        'LoRAExperts',
        'TrainedRows',
    }
    declared = {a for _, _, a in entries()}
    for stem in CHAPTERS:
        module = importlib.import_module(f'llm_lab.{stem}')
        for name in public(stem):
            f = getattr(module, name)
            pattern = (
                callable(f)
                and not isinstance(f, type)
                and list(getattr(getattr(f, '__code__', None), 'co_varnames', ()))[:2] == ['i', 'j']
            )
            if (
                pattern
                or isinstance(f, type)
                and issubclass(f, nn.Module)
                and f.__module__ == f'llm_lab.{stem}'
            ):
                assert name in apart or f'llm_lab.{stem}:{name}' in declared, f'{stem}:{name}'


def test_every_keyword_that_holds_recipes_is_declared():
    "A default that is a recipe, or a keyword whose prose says so"
    from inspect import signature
    from llm_lab.parts import part

    for slot, _, a in entries():
        if slot in _NO_PARTS:
            continue
        for k, p in signature(lookup(a, slot)).parameters.items():
            if isinstance(p.default, part):
                assert k in HOLDS.get(slot, {}), (a, k)
    assert {s for held in HOLDS.values() for s in held.values()} <= {*SLOTS}


def test_what_the_repository_names_can_be_named():
    files = [*ROOT.glob('experiments/*/config.yaml'), ROOT / 'README.md', *ROOT.glob('nbs/*.ipynb')]
    # examples of what is refused
    wrong = {
        'llm_lab.core:require',
        'llm_lab.gpt:Nothing',
        'torch.nn:Embedding',
        'torch.nn:NAME',
        'llm_lab.CHAPTER:NAME',
        'llm_lab.gpt:Attention',  # format 1
    }
    for path in files:
        text = path.read_text(encoding='utf-8')
        for word in {*re.findall(r'\b(?:llm_lab\.[a-z]\w*|torch\.nn):[A-Za-z]\w*', text)} - wrong:
            assert any(word in place.values() for place in SLOTS.values()), (path.name, word)


def test_the_configs_of_the_repository_are_read():
    from llm_lab.config import CONFIGS, read_config

    for config in [*CONFIGS, *ROOT.glob('experiments/*/config.yaml')]:
        read_config(config)


def everything():
    "Configurations that name each entry of the table at least once"
    from llm_lab.gpt import GPTConfig
    from llm_lab.package import config_from

    more = {
        'alternate': dict(of=[dict(part='Attention'), dict(part='GQA', n_kv_heads=1)]),
        'GQA': dict(n_kv_heads=1),
        'sliding_window': dict(size=4),
        'strided': dict(stride=2),
        'or_masks': dict(of=[dict(part='sliding_window', size=2), dict(part='strided', stride=2)]),
        'and_masks': dict(of=[dict(part='sliding_window', size=6), dict(part='causal')]),
        'linear_scaling': dict(factor=4.0),
    }
    size = dict(vocab_size=4, max_len=8, d_model=8, n_layers=2, n_heads=2)
    for slot, name, a in entries():
        if slot in _NO_PARTS or name == 'same_document':
            continue  # a pattern that asks for a word
        x = dict(part=a, **more.get(name, {}))
        if (slot, name) == ('mlp', 'alternate'):
            x = dict(part=a, of=[dict(part='MLP'), dict(part='MoE', n_experts=2)])
        if name == 'CacheTransform':
            told = dict(attn=dict(part='Attention', transforms=[x]))
        elif slot == 'objective':
            whole = dict(part='Attention', mask=dict(part='block_causal'))
            told = dict(objective=x, attn=whole, pos=None)
        else:
            told = next(told for s, told in places('?') if s == slot)
        yield (
            name,
            config_from(
                size | json.loads(json.dumps(told).replace('{"part": "?"}', json.dumps(x)))
            ),
        )
    assert GPTConfig is not None


def test_honest_packages_of_all_parts_open(tmp_path):
    from llm_lab.chars import CharTokenizer
    from llm_lab.gpt import MiniGPT
    from llm_lab.package import load, save

    tok = CharTokenizer('abc\n')
    ids = torch.tensor([[0, 1, 2, 3, 1, 1]])
    seen = 0
    for n, (name, cfg) in enumerate(everything()):
        model = MiniGPT(cfg, seed=n).eval()
        again = load(save(tmp_path / f'p{n}', model, tok)).model
        assert again.cfg == cfg, name
        assert torch.equal(again(ids), model(ids)), name
        seen += 1
    assert seen > 50


def test_what_the_reader_registers_may_stand_anywhere_and_hold_anything(tmp_path):
    from llm_lab.chars import CharTokenizer
    from llm_lab.gpt import MLP, GPTConfig, MiniGPT
    from llm_lab.package import config_from, to_data
    from llm_lab.parts import part, register
    from llm_lab.llama_block import ReLU2
    from llm_lab.package import load, save

    class Twice(nn.Module):
        "An MLP of one's own that holds another, and a number that is no parameter"

        def __init__(self, cfg, layer=0, inner=part(MLP), scale=2.0):
            super().__init__()
            self.inner = inner(cfg, layer)
            self.scale = torch.full((1,), scale)

        def forward(self, x, **ctx):
            return self.scale * self.inner(x)

    cfg = GPTConfig(
        vocab_size=4,
        max_len=8,
        d_model=8,
        n_layers=1,
        n_heads=2,
        mlp=part(Twice, inner=part(MLP, act=part(ReLU2)), scale=3.0),
    )
    with pytest.raises(LabError, match='call register.Twice. first'):
        to_data(cfg)
    try:
        register(Twice)
        assert config_from(to_data(cfg)) == cfg
        model, ids = MiniGPT(cfg).eval(), torch.tensor([[0, 1, 2, 3]])
        assert torch.equal(
            load(save(tmp_path / 'p', model, CharTokenizer('abc\n'))).model(ids),
            model(ids),
        )
        for bad in (
            dict(part='Twice', inner=dict(part='os:system')),
            dict(part='Twice', inner=dict(part='dolly')),
            dict(part='Twice', inner=[dict(part='eval')]),
        ):
            with pytest.raises(LabError, match='names no part'):
                config_from(dict(mlp=bad))
    finally:
        core.REGISTERED.pop('Twice', None)
    with pytest.raises(LabError, match="'Twice' names no part"):
        config_from(dict(mlp=dict(part='Twice')))


def test_a_safe_pattern_is_fast_and_an_unsafe_one_comes_to_an_end():
    from llm_lab.bpe import _finder

    assert _finder(r'\p{L}+')('ab 12') == ['ab', ' 12']
    slow = _finder(r'(?:a|aa)+$')
    import llm_lab.bpe as bpe

    assert slow('ab') == ['ab']

    class Late:
        groups = 0

        def fullmatch(self, text):
            return None

        def finditer(self, text, timeout):
            assert timeout > 0
            raise TimeoutError

    old = bpe.regex
    bpe.regex = type(
        'R',
        (),
        dict(
            compile=staticmethod(lambda p: Late()),
            error=bpe.regex.error,
            findall=staticmethod(bpe.regex.findall),
            search=staticmethod(bpe.regex.search),
        ),
    )
    try:
        find = _finder('(a|aa)+$')
    finally:
        bpe.regex = old
    with pytest.raises(LabError, match='does not come to an end on a text of 60 characters'):
        find('a' * 60)


def test_the_case_that_began_it(tmp_path):
    "A package names a public function and all its keywords; so do its siblings in other places"
    from llm_lab.chars import CharTokenizer
    from llm_lab.gpt import GPTConfig, MiniGPT
    from llm_lab.package import load, save

    gift = save(
        tmp_path / 'gift',
        tiny_model(vocab_size=4),
        CharTokenizer('abc\n'),
        {},
    )
    honest = (gift / 'llm_lab.json').read_text()
    for slot, told in places('llm_lab.core:require', module='gift.model_code'):
        (gift / 'llm_lab.json').write_text(honest)
        with_config(gift, told)
        with pytest.raises(LabError) as e:
            load(gift)
        assert '\n' not in str(e.value) and str(gift / 'llm_lab.json') in str(e.value), told
        if slot:
            assert f"'llm_lab.core:require' names no part that can be {slot}" in str(e.value), told


@needs_linux
def test_links_into_the_cache_of_hugging_face_are_followed_and_no_others(tmp_path):
    from llm_lab.gpt import GPTConfig, MiniGPT
    from llm_lab.hub import from_hf, to_hf

    model = MiniGPT(GPTConfig(vocab_size=4, max_len=8, d_model=8, n_layers=1, n_heads=2)).eval()
    ids = torch.tensor([[0, 1, 2]])
    snapshot = tmp_path / 'models--x' / 'snapshots' / 'abc'
    blobs = tmp_path / 'models--x' / 'blobs'
    to_hf(tmp_path / 'plain', model)
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for n, p in enumerate(sorted((tmp_path / 'plain').iterdir())):
        p.rename(blobs / str(n))
        (snapshot / p.name).symlink_to(f'../../blobs/{n}')
    assert torch.equal(from_hf(snapshot).model(ids), model(ids))
    blobs.rename(tmp_path / 'elsewhere')
    for p in snapshot.iterdir():
        to = tmp_path / 'elsewhere' / Path(os.readlink(p)).name
        p.unlink()
        p.symlink_to(to)
    with pytest.raises(LabError, match='is a link out of its folder'):
        from_hf(snapshot)


@pytest.mark.slow
def test_the_largest_configuration_that_is_looked_at_takes_seconds():
    from llm_lab.package import config_from, meta_model

    start = time.process_time()
    steps = [dict(part='RoPE'), dict(part='QKNorm')]
    meta_model(
        config_from(
            dict(
                d_model=16,
                n_heads=2,
                n_layers=1024,
                attn=dict(part='Attention', steps=steps),
                mlp=dict(part='MoE'),
            )
        )
    )
    assert time.process_time() - start < SECONDS


@pytest.mark.parametrize('slot', SLOTS)
def test_a_name_may_stand_in_its_own_place_only(slot):
    "Every name of the table in every other place, bare and with its module"
    for _, name, a in entries():
        for word in (name, a):
            if a in SLOTS[slot].values():
                assert address(word, slot) == a
            else:
                with pytest.raises(LabError, match=f'names no part that can be {slot}'):
                    address(word, slot)


def test_a_config_is_refused_when_it_is_read_before_any_data():
    from llm_lab.config import read_config

    for slot, told in places('llm_lab.core:require', module='x'):
        if {'d_model', 'tie'} & set(told):
            continue
        with pytest.raises(LabError, match=r'^model\.') as e:
            read_config(dict(model=told))
        if slot:
            assert f'names no part that can be {slot}' in str(e.value)


def test_a_text_counts_only_with_the_hash_that_was_saved(tmp_path):
    from llm_lab.corpora import corpus_of, load_corpus

    path = tmp_path / 'own.txt'
    path.write_text('the password is swordfish\n' * 9)
    sha = load_corpus(path).sha256
    assert corpus_of(dict(data=str(path), corpus_sha256=sha)).sha256 == sha
    assert corpus_of(dict(data='tiny_tales', corpus_sha256='0')).name == 'tiny_tales'
    for wrong in ('0' * 64, None, '', 5, [sha]):
        with pytest.raises(LabError, match='is not the text that this model was trained on'):
            corpus_of(dict(data=str(path), corpus_sha256=wrong))


def test_no_memory_is_taken_for_a_model_that_is_not_in_the_file(tmp_path, monkeypatch):
    from llm_lab import package
    from llm_lab.chars import CharTokenizer
    from llm_lab.gpt import GPTConfig, MiniGPT

    place = package.save(
        tmp_path / 'p',
        tiny_model(vocab_size=4),
        CharTokenizer('abc\n'),
        {},
    )
    package.load(place)

    def taken(*args):
        raise AssertionError('memory was taken')

    monkeypatch.setattr(package, '_in_memory', taken)
    honest = (place / 'llm_lab.json').read_text()
    for lie in (
        dict(d_model=4096),
        dict(max_len=10**9),
        dict(n_layers=900),
        dict(mlp=dict(part='MoE', n_experts=10**6)),
        dict(vocab_size=5),
        dict(lm_head=dict(part='Linear', bias=True)),
    ):
        (place / 'llm_lab.json').write_text(honest)
        with_config(place, lie)
        with pytest.raises(LabError, match='the weights do not fit the configuration'):
            package.load(place)


def test_check_recipe_counts_and_address_is_static():
    assert check_recipe(dict(part='MoE', shared=3, expert=dict(part='SwiGLU')), 'mlp') == 8
    before = set(sys.modules)
    for name in ('os:system', 'wave', 'wave:open', 'llm_lab.wave:x'):
        with pytest.raises(LabError):
            address(name, 'mlp')
    assert set(sys.modules) == before


if __name__ == '__main__':
    child(Path(sys.argv[1]), [int(n) for n in sys.argv[2:]])
