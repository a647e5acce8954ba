"""Texts of one's own, from a path typed to a model that goes on: files, folders, records, splits,
strange alphabets, other folders.

And the stream over a small text: it is cut anew in each epoch, each token is read once, and a
position says it all."""

import csv
import io
import json
import os
import random
import sys
import warnings

import numpy as np
import pytest
import torch
from cases import ALL, EXAMPLES, cases, some
from helpers import printed

from llm_lab.cli import main
from llm_lab.corpora import END_OF_TEXT, corpus_of, from_path, kept_path, load_corpus
from llm_lab.core import LabError
from llm_lab.batching import BatchStream
from llm_lab.packing import PackedTokens, pack

hypothesis = pytest.importorskip('hypothesis')
from hypothesis import HealthCheck, given, settings, strategies as st

many = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
pytestmark = pytest.mark.usefixtures('one_thread')
TINY = (
    'length=16',
    'model.d_model=16',
    'model.n_layers=1',
    'model.n_heads=2',
    'train.batch_size=4',
    'eval.every=4',
    'eval.tokens=200',
    'eval.sample_every=4',
    'eval.sample_tokens=5',
    'log.every=2',
    'log.checkpoint_every=4',
)


@pytest.fixture
def typed(home, monkeypatch):
    "What a command prints, (stdout, stderr); an error is one line"
    from llm_lab import runs

    peak = runs.peak_flops
    # only `mfu` needs it
    monkeypatch.setattr(runs, 'peak_flops', lambda *a: peak(*a, size=64, seconds=0))
    return printed


def write(path, text, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8', **how)
    return path


# ---- ten strange collections


def sentences(n, seed=0):
    luck = random.Random(seed)
    words = 'the cat dog tree sat stood ran by under near a red old small river house'.split()
    return [
        ' '.join(luck.choices(words, k=luck.randint(4, 12))).capitalize() + '.' for _ in range(n)
    ]


def text8(home):
    return write(
        home / 'text8', ' '.join(sentences(250)).lower().replace('.', '').replace('\n', ' ')
    ), ()


def dna(home):
    return write(home / 'dna.txt', ''.join(random.Random(1).choices('0123', k=9000))), ()


def cjk(home):
    luck = random.Random(2)
    return write(
        home / '漢字.txt',
        ''.join(luck.choice([*map(chr, range(0x4E00, 0x4E00 + 90)), '。']) for _ in range(9000)),
    ), ()


def names(home):
    luck = random.Random(3)
    return write(
        home / 'names.txt',
        '\n'.join(''.join(luck.choices('abeiklmnorst', k=luck.randint(3, 9))) for _ in range(1500))
        + '\n',
    ), ()


def gutenberg(home):
    law = '\n'.join(
        'This licence says at length what may be done with the work, clause by clause.'
        for _ in range(60)
    )
    book = '\n\n'.join(sentences(200))
    text = (
        (
            'The Project Gutenberg eBook of Cats\n\n*** START OF THE PROJECT GUTENBERG EBOOK '
            'CATS ***\n\n'
        )
        + book
        + '\n\n*** END OF THE PROJECT GUTENBERG EBOOK CATS ***\n\n'
        + law
    )
    return write(home / 'pg1.txt', '\ufeff' + text, newline='\r\n'), ()


def markdown(home):
    for n in range(12):
        write(
            home / 'notes' / f'{n % 3}' / f'{n}.md',
            f'# Note {n}\n\n' + '\n'.join(sentences(25, n)) + '\n',
        )
    write(home / 'notes' / '.ipynb_checkpoints' / '0-checkpoint.md', 'SECRET' * 99)
    write(home / 'notes' / '.draft.md', 'SECRET' * 99)
    return home / 'notes', ()


def jsonl(home):
    return write(
        home / 'd.jsonl',
        ''.join(json.dumps(dict(text=s, id=n)) + '\n' for n, s in enumerate(sentences(300))),
    ), ()


def csv_file(home):
    out = io.StringIO()
    csv.writer(out).writerows(
        [('id', 'body'), *((n, f'{s}\n"And," said he.') for n, s in enumerate(sentences(250)))]
    )
    return write(home / 'd.csv', out.getvalue()), ('field', 'body')


def parquet(home):
    pq = pytest.importorskip(
        'pyarrow.parquet', reason='pyarrow is not installed: pip install pyarrow'
    )
    import pyarrow

    pq.write_table(pyarrow.table(dict(text=sentences(300), n=[*range(300)])), home / 'd.parquet')
    return home / 'd.parquet', ()


def saved(home):
    datasets = pytest.importorskip(
        'datasets', reason='datasets is not installed: pip install datasets'
    )
    parts = dict(train=sentences(250), validation=sentences(40, 1), test=sentences(40, 2))
    datasets.DatasetDict(
        {s: datasets.Dataset.from_dict(dict(text=t)) for s, t in parts.items()}
    ).save_to_disk(home / 'hf')
    return home / 'hf', ()


COLLECTIONS = [text8, names, cjk, gutenberg, markdown, dna, jsonl, csv_file, parquet, saved]


@pytest.mark.parametrize('kind', some(COLLECTIONS))
def test_a_strange_collection_is_prepared_trained_judged_and_goes_on_from_elsewhere(
    kind, home, typed, monkeypatch
):
    path, field = kind(home)
    option, key = (('--field', field[1]), (f'data.field={field[1]}',)) if field else ((), ())
    name = path.relative_to(home)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        corpus = load_corpus(path, field=field[1] if field else 'text')
    assert {'train', 'val'} <= corpus.splits.keys() and 'SECRET' not in ''.join(
        map(corpus.text, corpus.splits)
    )
    assert all(corpus.text(s) for s in corpus.splits)
    out, err = typed('prepare', name, '--vocab-size', 300, *option)
    assert 'packed in' in out and ('Project Gutenberg' in err) == (kind is gutenberg), err
    for tokenizer in ('chars', 'bpe')[: 1 + ALL]:
        more = ('vocab_size=300',) if tokenizer == 'bpe' else ()
        monkeypatch.chdir(home)
        out, err = typed(
            'train',
            'smoke',
            f'corpus={name}',
            f'tokenizer={tokenizer}',
            *more,
            *key,
            *TINY,
            'steps=8',
            '--run',
            tokenizer,
        )
        run = home / 'experiments' / 'smoke' / 'runs' / tokenizer
        here = typed('eval', run, *(('--split', 'test') if 'test' in corpus.splits else ()))[0]
        (home / 'else' / 'where').mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(home / 'else' / 'where')  # nothing of that name is here
        assert (
            typed('eval', run, *(('--split', 'test') if 'test' in corpus.splits else ()))[0] == here
        )
        out, err = typed('train', '--resume', run, 'steps=12')
        assert json.loads((run / 'result.json').read_text())['steps'] == 12, out
        assert 'nats' in typed('eval', run)[0]


# ---- records


def as_records(folder, docs, field='text'):
    "The same documents as each kind of file"
    row = [{field: d, 'n': n} for n, d in enumerate(docs)]
    out = io.StringIO()
    csv.DictWriter(out, [field, 'n']).writerows([{field: field, 'n': 'n'}, *row])
    yield write(
        folder / 'a.jsonl',
        ''.join(json.dumps(r, ensure_ascii=n % 2) + '\n' for n, r in enumerate(row)),
    )
    yield write(folder / 'a.json', json.dumps(row, indent=1))
    yield write(folder / 'a.csv', out.getvalue(), newline='')
    yield write(
        folder / 'a.tsv',
        '\ufeff' + out.getvalue()
        if '\t' in out.getvalue()
        else '\n'.join(
            [
                'n\t' + field,
                *(f'{n}\t' + '"' + d.replace('"', '""') + '"' for n, d in enumerate(docs)),
            ]
        ),
        newline='',
    )
    pq = pytest.importorskip(
        'pyarrow.parquet', reason='pyarrow is not installed: pip install pyarrow'
    )
    import pyarrow

    pq.write_table(
        pyarrow.table({'n': [*range(len(docs))], field: docs}),
        folder / 'a.parquet',
        row_group_size=3,
    )
    yield folder / 'a.parquet'


documents = st.lists(
    st.text(
        st.characters(exclude_categories=['Cs'], exclude_characters='\0'), min_size=1, max_size=40
    )
    .map(lambda t: t.replace('\r', '\n').strip())
    .filter(bool)
    .filter(lambda t: END_OF_TEXT not in t),
    min_size=2,
    max_size=9,
)


@many
@given(docs=documents, field=st.sampled_from(['text', 'body', 'a,b', 'Füllung']))
def test_the_same_documents_make_the_same_corpus_as_every_kind_of_file(
    docs, field, tmp_path_factory
):
    folder = tmp_path_factory.getbasetemp() / 'kinds'
    want = from_path(write(folder / 'a.txt', f'\n{END_OF_TEXT}\n'.join([*docs, ''])))
    assert [*want.documents('train'), *want.documents('val')] == docs and want.independent
    for path in as_records(folder, docs, field):
        got = from_path(path, field)
        assert (got.splits, got.sha256, got.independent, got.field) == (
            want.splits,
            want.sha256,
            True,
            field,
        ), path


def test_a_field_that_is_not_there_is_told_with_those_that_are(home, typed):
    for path in as_records(home, ['one', 'two', 'three'], 'body'):
        _, err = typed('prepare', path.name, code=1)
        assert (
            "no field 'text': it has" in err
            and 'body' in err
            and '--field' in err
            and path.name in err
        ), err
        assert (
            'a, licence: your own'
            in typed('prepare', path.name, '--field', 'body', '--vocab-size', 300)[0]
        )
        if path.suffix in ('.csv', '.tsv'):
            continue  # there all is text
        assert 'which is no text' in typed('prepare', path.name, '--field', 'n', code=1)[1]
    write(home / 'plain.txt', 'one two three ' * 99)
    assert (
        'leave data.field (--field) out'
        in typed('prepare', 'plain.txt', '--field', 'body', code=1)[1]
    )
    assert (
        'leave data.field (--field) out'
        in typed('prepare', 'tiny_tales', '--field', 'body', code=1)[1]
    )


@pytest.mark.parametrize(
    'name, text, said',
    [
        ('a.jsonl', '{"text": "one"}\n{"text": "tw', 'line 2, is no JSON'),
        ('a.jsonl', '["one"]\n', 'is no record'),
        ('a.jsonl', '{"text": null}\n{"text": ""}\n', "no text in its field 'text'"),
        ('a.jsonl', '{"text": ["one"]}', 'which is no text'),
        ('a.jsonl', '{"text": "\\ud800"}', 'half a character'),
        ('a.jsonl', '[' * 100_000, 'is no JSON'),
        ('a.jsonl', '\n \n', 'holds no text'),
        ('a.json', '{"data": 1}', "no field 'text': it has data"),
        ('a.json', '{\n"text": "one"}', 'is no JSON'),
        ('a.csv', 'just one line of prose\n', "no field 'text': it has just one line"),
        ('a.csv', 'a,b\n1,2\n', "no field 'text': it has a, b"),
        ('a.parquet', 'PAR1 not really', 'cannot read'),
        ('a.csv', 'text\n"' + 'x' * 300_000 + '"\nb\n', ''),
    ],
)
def test_a_damaged_file_of_records_is_one_line(name, text, said, home, typed):
    write(home / name, text)
    _, err = typed('prepare', name, '--vocab-size', 300, code=1 if said else 0)
    assert said in err and (name in err or not said), err


def test_without_pyarrow_the_remedy_is_named(home, typed, monkeypatch):
    write(home / 'a.parquet', 'x')
    for module in [m for m in sys.modules if m.split('.')[0] == 'pyarrow']:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)
    assert 'pip install pyarrow' in typed('prepare', 'a.parquet', code=1)[1]


def test_line_ends_of_records_are_plain(tmp_path):
    for kind in ('a.jsonl', 'a.json'):
        write(
            tmp_path / kind,
            json.dumps([dict(text='one\r\ntwo\rthree'), dict(text='four')])
            .replace('}, {', '}\n{')
            .strip('[]')
            if kind == 'a.jsonl'
            else json.dumps([dict(text='one\r\ntwo\rthree'), dict(text='four')]),
        )
        assert [*from_path(tmp_path / kind).documents('train')] == ['one\ntwo\nthree'], kind


def test_a_verdict_on_a_file_of_records_reads_its_documents(home):
    from llm_lab.chars import CharTokenizer
    from llm_lab.evaluation import evaluate_file
    from llm_lab.gpt import GPTConfig, MiniGPT

    docs = sentences(20)
    tok = CharTokenizer.train(f'\n{END_OF_TEXT}\n'.join(docs))
    model = MiniGPT(
        GPTConfig(vocab_size=tok.vocab_size, max_len=16, d_model=16, n_layers=1, n_heads=2)
    )
    want = evaluate_file(model, tok, write(home / 'a.txt', f'\n{END_OF_TEXT}\n'.join([*docs, ''])))
    for path in as_records(home, docs, 'body'):
        got = evaluate_file(model, tok, path, field='body')
        assert (got.loss, got.chars) == (want.loss, want.chars), path
        with pytest.raises(LabError, match="no field 'text'"):
            evaluate_file(model, tok, path)


def test_one_record_alone_is_cut_by_place(home):
    corpus = from_path(write(home / 'a.jsonl', json.dumps(dict(text='one ' * 50))))
    assert not corpus.independent and [len(t) for t in corpus.splits.values()] == [179, 20]


# ---- folders


def parts_of(folder):
    with warnings.catch_warnings(record=True, action='always') as notes:
        corpus = from_path(folder)
    return {s: corpus.text(s) for s in corpus.splits}, [str(n.message) for n in notes]


WORDS = dict(
    train=['train', 'Training'],
    val=['val', 'valid', 'validation', 'dev', 'VAL'],
    test=['test', 'testing'],
)


@pytest.mark.parametrize(
    'shape',
    [
        '{}.txt',
        '{}.md',
        '{}.jsonl',
        '{}/1.txt',
        'deep/{}/x/1.jsonl',
        'wiki.{}.txt',
        '{}_1.txt',
        '{}.json',
        'data/{}-00000-of-00001.jsonl',
        'data/{}-00000-of-00001-0123456789abcdef.jsonl',
    ],
)
def test_files_called_train_val_and_test_are_the_splits(shape, tmp_path):
    luck = random.Random(shape)
    names = {s: luck.choice(words) for s, words in WORDS.items()}

    def put(folder, splits):
        for s in splits:
            text = f'{s} one. ' * 30
            if '.json' in shape:
                text = json.dumps([dict(text=f'{s} one.'), dict(text=f'{s} two.')])
            if '.jsonl' in shape:
                text = '\n'.join(json.dumps(r) for r in json.loads(text))
            write(folder / shape.format(names[s]), text)

    put(tmp_path / 'three', ('train', 'val', 'test'))
    texts, notes = parts_of(tmp_path / 'three')
    assert [*texts] == ['train', 'val', 'test'] and not notes
    assert all(t.count(s) == t.count('one') + t.count('two') for s, t in texts.items())
    put(tmp_path / 'two', ('train', 'test'))
    again, notes = parts_of(tmp_path / 'two')
    assert (
        again['test'] == texts['test']
        and again['val']
        and texts['train'].startswith(again['train'])
        and not notes
    )
    assert 'test' not in again['val'] + again['train']
    # a lone train part is cut; a lone test part is no training text
    if '.json' not in shape or '.jsonl' in shape:
        put(tmp_path / 'one', ('train',))
        assert [*parts_of(tmp_path / 'one')[0]] == ['train', 'val']
    put(tmp_path / 'none', ('val', 'test'))
    with pytest.raises(LabError, match='are named like splits'):
        from_path(tmp_path / 'none')
    shas = {from_path(tmp_path / k).sha256 for k in ('three', 'two')}
    assert len(shas) == 2, 'another division is another corpus'


def test_hidden_files_are_no_text(tmp_path):
    for name in ('a.txt', 'b/c.txt'):
        write(tmp_path / name, 'seen ' * 20)
    before = from_path(tmp_path)
    for name in (
        '.a.txt',
        '.ipynb_checkpoints/a-checkpoint.txt',
        'b/.ipynb_checkpoints/c.txt',
        '.git/x/y.txt',
        'b/._c.txt',
        '.cache/train.jsonl',
    ):
        write(tmp_path / name, 'hidden ' * 20)
    after = from_path(tmp_path)
    assert (before.splits, before.sha256) == (after.splits, after.sha256)


def test_what_is_left_out_is_said_and_what_is_unclear_is_asked(tmp_path):
    write(tmp_path / 'books' / 'a.txt', 'a book ' * 30)
    write(tmp_path / 'books' / 'about.csv', 'id,title\n1,A\n')
    texts, (note,) = parts_of(tmp_path / 'books')
    assert (
        'left out: about.csv' in note
        and '\n' not in note
        and 'title' not in ''.join(texts.values())
    )
    for name in ('train.jsonl', 'test.jsonl', 'more.jsonl'):
        write(tmp_path / 'split' / name, '{"text": "one"}\n{"text": "two"}\n')
    write(tmp_path / 'split' / 'README.md', '# about')
    texts, (note,) = parts_of(tmp_path / 'split')
    assert note.endswith('left out: more.jsonl') and '#' not in ''.join(texts.values())
    write(tmp_path / 'split' / 'terms.txt', 'terms of use')
    (tmp_path / 'split' / 'more.jsonl').unlink()
    texts, (note,) = parts_of(tmp_path / 'split')
    assert note.endswith('left out: terms.txt') and 'terms' not in ''.join(texts.values())
    for name in ('a.jsonl', 'b.csv'):
        write(tmp_path / 'both' / name, 'text\none\n')
    with pytest.raises(LabError, match='holds .jsonl and .csv files: name one of them'):
        from_path(tmp_path / 'both')
    for name in ('en/train.txt', 'en/val.txt', 'de/train.txt', 'de/val.txt'):
        write(tmp_path / 'tongues' / name, 'text ' * 9)
    with pytest.raises(LabError, match='are named like splits'):
        from_path(tmp_path / 'tongues')
    assert [*parts_of(tmp_path / 'tongues' / 'en')[0]] == ['train', 'val']
    (tmp_path / 'bare').mkdir()
    with pytest.raises(LabError, match='holds no .txt file'):
        from_path(tmp_path / 'bare')


def test_a_folder_that_cannot_be_read_is_named(home, typed, monkeypatch):
    for name in ('a/1.txt', 'b/2.txt'):
        write(home / 'texts' / name, 'some text ' * 20)
    real = os.scandir

    def scandir(path='.'):
        if str(path).endswith('b'):
            raise PermissionError(13, 'Permission denied', str(path))
        return real(path)

    monkeypatch.setattr(os, 'scandir', scandir)
    _, err = typed('prepare', 'texts', code=1)
    assert f'cannot read texts{os.sep}b: Permission denied; check its rights' in err


@pytest.mark.skipif(
    os.name == 'nt' or not hasattr(os, 'geteuid') or os.geteuid() == 0,
    reason='an administrator may read everything',
)
def test_a_folder_without_rights_is_named(tmp_path):
    write(tmp_path / 'texts' / 'a' / '1.txt', 'some text ' * 20)
    (tmp_path / 'texts' / 'a').chmod(0)
    try:
        with pytest.raises(LabError, match='cannot read .*a: Permission denied'):
            from_path(tmp_path / 'texts')
    finally:
        (tmp_path / 'texts' / 'a').chmod(0o700)


def test_a_licence_is_hinted_at_only_where_it_is_most_of_the_validation_text(tmp_path):
    end = '*** END OF THIS PROJECT GUTENBERG EBOOK X ***\n'
    law = 'law and order. ' * 40 + '\n'
    book = (
        '*** START OF THIS PROJECT GUTENBERG EBOOK X ***\n'
        + 'It was a dark and stormy night. ' * 400
        + '\n'
    )
    for name, text, said in (
        ('whole', book + end + law * 4, True),
        ('a little', book * 9 + end + law, False),
        ('none', book, False),
        ('two books', (book + end + law) * 2 + book, False),
        ('quoted', 'END OF THE PROJECT GUTENBERG ' * 500, False),
    ):
        notes = parts_of(write(tmp_path / f'{name}.txt', text))[1]
        assert [('Project Gutenberg' in n and '\n' not in n) for n in notes] == [True] * said, (
            name,
            notes,
        )
    write(tmp_path / 'split' / 'train.txt', book)
    write(tmp_path / 'split' / 'val.txt', 'title\n' * 400 + book[:200])
    assert 'header or licence' in parts_of(tmp_path / 'split')[1][0]


# ---- places


def test_an_edited_text_and_a_second_of_its_name_are_packed_beside_the_first(home, typed):
    a = write(home / 'a' / 'text.txt', 'one two three. ' * 80)
    b = write(home / 'b' / 'text.txt', 'vier fünf sechs. ' * 80)

    def packed(path):
        folder = pack(from_path(path), 300).folder
        tokens = PackedTokens(folder, verify=True)
        assert tokens.tokenizer.decode(tokens.ids.tolist()).startswith(
            path.read_text(encoding='utf-8')[:900]
        )
        return folder

    first, second = packed(a), packed(b)
    assert (
        first.name == 'text-bpe300'
        and second.name.startswith('text-bpe300-')
        and second.parent == first.parent
    )
    write(a, 'seven eight nine. ' * 80)
    third = packed(a)
    assert len({first, second, third}) == 3 and packed(b) == second
    write(a, 'one two three. ' * 80)
    assert packed(a) == first and not pack(from_path(a), 300).built  # as it was
    for force in ((), ('--force',)):
        assert (
            'packed in' in typed('prepare', b, '--vocab-size', 301, *force)[0]
            and packed(a) == first
        )
    (first / 'train.bin').write_bytes(b'damaged')
    with pytest.raises(LabError, match='pack it again, with force'):
        pack(from_path(a), 300, verify=True)
    from llm_lab.chars import CharTokenizer

    one, other = (
        pack(from_path(a), CharTokenizer(letters)).folder for letters in ('. ehnortw', 'wtrohne. ')
    )
    assert one != other  # as many characters, in another order


def test_a_run_keeps_a_path_that_holds_from_anywhere(home, typed, monkeypatch, tmp_path_factory):
    away = write(tmp_path_factory.mktemp('away') / 'text.txt', 'the cat sat on the mat. ' * 200)
    write(home / 'sub' / 'text.txt', 'the dog sat on the log. ' * 200)
    monkeypatch.chdir(home / 'sub')
    typed('train', 'smoke', 'corpus=text.txt', *TINY, 'steps=4', '--run', 'in')
    typed('train', 'smoke', f'corpus={os.path.relpath(away)}', *TINY, 'steps=4', '--run', 'out')
    runs = home / 'experiments' / 'smoke' / 'runs'
    kept = {
        n: (runs / n / 'config.yaml').read_text().split('corpus: ')[1].split('\n')[0]
        for n in ('in', 'out')
    }
    assert kept == dict({'in': 'sub/text.txt'}, out=str(away))
    elsewhere = home / 'elsewhere'
    write(elsewhere / 'sub' / 'text.txt', 'something else. ' * 200)  # a decoy
    monkeypatch.chdir(elsewhere)
    for n in kept:
        typed('eval', runs / n)
        typed('train', '--resume', runs / n, 'steps=8')
        typed(
            'train',
            '--resume',
            runs / n,
            'steps=10',
            f'data.corpus={dict(out=away).get(n, "../sub/text.txt")}',
        )
    away.unlink()
    (home / 'sub' / 'text.txt').unlink()
    (elsewhere / 'sub' / 'text.txt').unlink()
    for n in kept:
        assert 'is gone' in typed('eval', runs / n, code=1)[1]
        err = typed('train', '--resume', runs / n, 'steps=12', code=1)[1]
        assert 'data.corpus=' in err and 'is gone' in err and 'text.txt' in err
    assert 'no corpus and no file' in typed('train', 'smoke', 'corpus=text.txt', code=1)[1]


def test_a_home_that_moves_takes_its_runs_along(tmp_path, typed, monkeypatch):
    for n in (1, 2):
        (tmp_path / f'home{n}').mkdir()
    monkeypatch.setenv('LLM_LAB_HOME', str(tmp_path / 'home1' / 'lab'))
    write(
        tmp_path / 'home1' / 'lab' / 'my.jsonl',
        ''.join(json.dumps(dict(body=s)) + '\n' for s in sentences(200)),
    )
    monkeypatch.chdir(tmp_path / 'home1' / 'lab')
    typed('train', 'smoke', 'corpus=my.jsonl', 'data.field=body', *TINY, 'steps=4', '--run', 'x')
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'home1' / 'lab').rename(tmp_path / 'home2' / 'lab')
    monkeypatch.setenv('LLM_LAB_HOME', str(tmp_path / 'home2' / 'lab'))
    run = tmp_path / 'home2' / 'lab' / 'experiments' / 'smoke' / 'runs' / 'x'
    assert 'nats' in typed('eval', run)[0]
    typed('train', '--resume', run, 'steps=8')
    assert json.loads((run / 'result.json').read_text())['steps'] == 8


def test_a_tour_tells_where_its_text_is(home, typed, monkeypatch):
    write(home / 'sub' / 'my.csv', 'body\n' + '\n'.join(sentences(300)) + '\n')
    monkeypatch.chdir(home / 'sub')
    typed(
        'tour',
        '--corpus',
        'my.csv',
        '--field',
        'body',
        '--minutes',
        '.02',
        'length=16',
        'd_model=16',
        'n_layers=1',
        'n_heads=2',
    )
    from llm_lab.package import load

    about = load(home / 'artifacts' / 'tour').about
    assert (about['data'], about['field']) == ('sub/my.csv', 'body')
    monkeypatch.chdir(home)
    assert 'nats' in typed('eval', 'artifacts/tour')[0]


def test_a_path_is_kept_and_found_again(home, monkeypatch):
    write(home / 'dolly', 'a file that is called as a corpus is')
    write(home / 'a b' / 'ü.txt', 'text')
    (home / 'elsewhere').mkdir()
    for name, kept in (
        ('dolly', 'dolly'),
        ('./dolly', './dolly'),
        ('a b/ü.txt', 'a b/ü.txt'),
        ('elsewhere/../a b/ü.txt', 'a b/ü.txt'),
        ('no/such', 'no/such'),
        ('', ''),
        (str(home / 'a b'), 'a b'),
    ):
        assert kept_path(name) == kept, name
    monkeypatch.chdir(home / 'elsewhere')
    assert load_corpus('a b/ü.txt').text('train') == 'tex'  # from here, then from home
    write(home / 'elsewhere' / 'a b' / 'ü.txt', 'other')
    assert load_corpus('a b/ü.txt').text('train') == 'othe'
    sha = load_corpus(home / 'a b' / 'ü.txt').sha256
    # by its hash
    assert corpus_of(dict(data='a b/ü.txt', corpus_sha256=sha)).text('train') == 'tex'
    for wrong in (5, ['text'], {}):
        about = dict(data='a b/ü.txt', corpus_sha256=sha, field=wrong)
        if wrong:
            with pytest.raises(LabError, match='as its field'):
                corpus_of(about)


# ---- the stream


@many
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    first=st.integers(0, 30),
    T=st.integers(1, 20),
    seed=st.integers(0, 5),
)
def test_rows_of_documents_begin_with_them_and_every_token_is_asked(lengths, first, T, seed):
    n = sum(lengths)
    starts = [(first + s) % n for s in np.cumsum([0, *lengths[:-1]]).tolist()]
    if n <= T:
        return
    s = BatchStream(torch.arange(n), 1, T, seed, starts=sorted(starts))
    count = sum(-(-length // T) for length in lengths)
    assert s.per_epoch == count
    owner = {(a + k) % n: (a, k) for a, length in zip(starts, lengths) for k in range(length)}
    for epoch in range(3):
        rows = torch.cat([s(epoch * count + k) for k in range(count)])
        assert (rows == (rows[:, :1] + torch.arange(T + 1)) % n).all()
        begins = [owner[b] for b in rows[:, 0].tolist()]
        for a, length in zip(starts, lengths):
            mine = sorted(k for doc, k in begins if doc == a)
            # the beginning, and as many rows as ever
            assert mine[0] == 0 and len(mine) == -(-length // T)
            # without a gap, to its end
            assert all(y - x <= T for x, y in zip(mine, mine[1:])) and mine[-1] + T >= length


@many
@given(
    n=st.integers(20, 400),
    T=st.integers(1, 19),
    B=st.sampled_from([1, 4, 12]),
    stop=st.integers(0, 300),
    worlds=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])),
    docs=st.booleans(),
)
def test_a_stream_goes_on_exactly_over_the_borders_of_epochs_and_ranks_share_no_row(
    n, T, B, stop, worlds, docs
):
    starts = sorted(random.Random(n).sample(range(n), 3)) if docs else None
    ids, (old, new) = torch.arange(n), worlds
    if B % old or B % new:
        return
    one = BatchStream(ids, B, T, 3, starts=starts)
    before = BatchStream(ids, B, T, 3, old - 1, old, starts=starts)
    before.step = stop
    state = json.loads(json.dumps(before.state_dict()))
    ranks = [BatchStream(ids, B, T, 3, r, new, starts=starts) for r in range(new)]
    for r in ranks:
        r.load_state_dict(state)
    for step in range(stop, stop + 4):
        assert (torch.stack([next(r) for r in ranks], 1).flatten(0, 1) == one(step)).all()
    per_epoch = one.per_epoch
    order = torch.cat([one.blocks_of(k) for k in range(3 * per_epoch // B + 1)]).tolist()
    for epoch in range(3):
        read = order[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert len({*read}) == per_epoch  # none by two ranks, none twice


def test_the_cut_moves_from_epoch_to_epoch_and_every_token_is_left_out_alike():
    n, T = 1000, 64
    s = BatchStream(torch.arange(n), 1, T)
    left, phases = np.zeros(n), []
    for epoch in range(cases(2000, 400)):
        begins = torch.stack([s.blocks_of(epoch * 15 + k) for k in range(15)])[:, 0]
        asked = (begins[:, None] + torch.arange(1, T + 1)) % n
        out = np.setdiff1d(np.arange(n), asked)
        assert len(out) == n - 15 * T
        left[out] += 1
        phases.append(int(begins.min()) % T)
    epochs, share = len(phases), (n - 15 * T) / n
    assert abs(left - epochs * share).max() < 6 * (epochs * share) ** 0.5  # no token is forgotten
    counts = np.bincount(phases, minlength=T)
    assert (
        counts.min() > 0
        and ((counts - epochs / T) ** 2 / (epochs / T)).sum() < 64 + 6 * (2 * 64) ** 0.5
    )
    other = [BatchStream(torch.arange(n), 1, T, seed)(0)[0, 0].item() for seed in range(20)]
    assert len({*other}) > 15  # by the seed, too


def test_a_position_of_blocks_that_stood_still_is_refused():
    ids = torch.arange(500)
    s = BatchStream(ids, 4, 16)
    state = s.state_dict()
    del state['starts']
    with pytest.raises(LabError, match='they move now: start a new run') as e:
        s.load_state_dict(state)
    assert '\n' not in str(e.value)
    docs = BatchStream(ids, 4, 16, starts=[0, 100])
    for a, b in ((docs, s), (s, docs), (docs, BatchStream(ids, 4, 16, starts=[0, 101]))):
        with pytest.raises(LabError, match='starts of the saved position'):
            a.load_state_dict(b.state_dict())


@pytest.mark.slow
def test_a_small_text_is_learned_and_not_its_blocks():
    """A model that reads 18,000 characters twenty times over: the blocks that move leave it the
    better reader"""
    from functools import partial

    from llm_lab.gpt import GPTConfig, MiniGPT
    from llm_lab.optim import SCHEDULES, muon
    from llm_lab.tales import tiny_tales
    from llm_lab.chars import CharTokenizer
    from llm_lab.train import TrainState, fit, mean_loss

    text = tiny_tales(400).text('train')[:20_000]
    tok = CharTokenizer.train(text)
    ids = torch.tensor(tok.encode(text))
    train, val, losses = ids[:18_000], ids[18_000:], []
    # of documents of one block each, rows stand still
    for starts in (None, np.arange(0, len(train), 64)):
        model = MiniGPT(
            GPTConfig(vocab_size=tok.vocab_size, max_len=64, d_model=64, n_layers=2, n_heads=4)
        )
        run = TrainState(model, 500, optimizer=muon(model, lr=0.004))
        fit(
            model,
            BatchStream(train, 12, 64, starts=starts),
            500,
            state=run,
            schedule=partial(SCHEDULES['cosine'], warmup=50),
        )
        losses.append(mean_loss(model, val))
    assert losses[0] < losses[1] - 0.1, losses
