"A text of one's own: its splits, and training on it from the command line."

import json
import random

import pytest
from helpers import one_line, printed

import llm_lab as lab
from llm_lab.core import LabError

pytestmark = pytest.mark.usefixtures('one_thread')

DOCS = [f'story {n} of {n * n}' for n in range(2000)]
CUTS = dict(val=0.1, test=0.05)


def records(path, docs):
    path.write_text(''.join(json.dumps(dict(text=d)) + '\n' for d in docs))
    return path


# ---- splits


def test_documents_are_drawn_by_what_they_are(home):
    corpus = lab.load_corpus(records(home / 'a.jsonl', DOCS), splits=CUTS)
    held = {s: corpus.documents(s) for s in ('train', 'val', 'test')}
    assert sorted(d for docs in held.values() for d in docs) == sorted(DOCS)
    for split, share in CUTS.items():  # four standard deviations
        assert abs(len(held[split]) - share * 2000) < 4 * (share * (1 - share) * 2000) ** 0.5
    mixed = random.Random(0).sample(DOCS, 1500)  # another order, and documents that are gone
    fewer = lab.load_corpus(records(home / 'b.jsonl', mixed), splits=CUTS, seed=7)
    for split in held:
        assert fewer.documents(split) == [d for d in mixed if d in {*held[split]}]
    twice = lab.load_corpus(records(home / 'c.jsonl', DOCS + DOCS), splits=CUTS)
    assert not {*twice.documents('train')} & {*twice.documents('val'), *twice.documents('test')}


def test_a_running_text_is_cut_by_position(home):
    text = 'a line of it\n' * 77
    (home / 'a.txt').write_text(text)
    for cuts in (CUTS, dict(test=0.3), dict(val=0.005), dict(val=1 / 3, test=1 / 3)):
        corpus = lab.load_corpus('a.txt', splits=cuts)
        assert (
            ''.join(corpus.splits[s] for s in ('train', 'val', 'test') if s in corpus.splits)
            == text
        )
        for split, share in (dict(val=0.1) | cuts).items():
            assert abs(len(corpus.splits[split]) - share * len(text)) <= 1


def test_a_file_is_a_split_as_it_stands(home):
    (home / 'a.txt').write_text('train\n' * 50)
    (home / 'v.txt').write_text('a text to be judged on\n')
    corpus = lab.load_corpus('a.txt', splits=dict(val='v.txt'))
    assert corpus.splits == dict(train='train\n' * 50, val='a text to be judged on\n')
    both = lab.load_corpus('a.txt', splits=dict(val=0.5, test=home / 'v.txt'))
    assert both.splits['train'] == both.splits['val'] == 'train\n' * 25
    assert both.splits['test'] == 'a text to be judged on\n'
    (home / 'v.txt').write_text('another\n')
    assert lab.load_corpus('a.txt', splits=dict(val='v.txt')).sha256 != corpus.sha256
    train = records(home / 'a.jsonl', DOCS)
    val = records(home / 'v.jsonl', ['one', 'two'])
    corpus = lab.load_corpus(train, splits=dict(val=val))
    assert (corpus.documents('train'), corpus.documents('val')) == (DOCS, ['one', 'two'])


WRONG = [
    ('x', "splits='x': give shares, as in"),
    (dict(dev=0.1), 'splits.dev=0.1: give shares'),
    (dict(train=0.1), 'splits.train=0.1: give shares'),
    (dict(val=0), 'splits.val=0: give shares'),
    (dict(val=1.0), 'splits.val=1.0: give shares'),
    (dict(val=True), 'splits.val=True: give shares'),
    (dict(val=float('nan')), 'splits.val=nan: give shares'),
    (dict(val=[0.1]), 'splits.val=[0.1]: give shares'),
    (dict(val=0.6, test=0.4), 'leaves nothing for training: give less'),
]


@pytest.mark.parametrize('splits, says', WRONG)
def test_splits_that_cannot_be_are_one_line_here_and_in_a_config(home, splits, says):
    (home / 'a.txt').write_text('some text\n' * 50)
    one_line(lambda: lab.load_corpus('a.txt', splits=splits), says)
    config = dict(data=dict(corpus='a.txt', splits=splits))
    one_line(lambda: lab.read_config(config), 'data.' + says if says.startswith('splits') else says)


def test_splits_that_do_not_fit_the_text_are_one_line(home):
    (home / 'a.txt').write_text('some text\n' * 50)
    records(home / 'few.jsonl', DOCS[:3])
    (home / 'f').mkdir()
    for name in ('train', 'val'):
        (home / 'f' / f'{name}.txt').write_text('some text\n')
    for path, splits, says in (
        ('tiny_tales', CUTS, 'tiny_tales is a corpus with splits of its own: leave splits'),
        ('f', CUTS, 'f has a val part of its own: leave splits.val out'),
        ('a.txt', dict(val='none.txt'), "no corpus and no file is called 'none.txt'"),
        ('a.txt', dict(val='f'), 'splits.val=f has splits itself: name one file of it'),
        ('a.txt', dict(val='few.jsonl'), 'holds records, the other running text'),
        ('a.txt', dict(test=0.95), 'leaves nothing for training'),  # val has a tenth
        ('few.jsonl', dict(val=0.001), 'leaves nothing for val: give other shares, or files'),
    ):
        one_line(lambda: lab.load_corpus(path, splits=splits), says)


SHORT = dict(
    model=dict(d_model=16, n_layers=1, n_heads=2),
    train=dict(steps=6, batch_size=4, threads=1, warmup=0),
    eval=dict(every=3, tokens=200, sample_every=99),
    log=dict(every=3, checkpoint_every=3),
)


def test_a_run_keeps_its_splits_and_goes_on_with_them_alone(home):
    from llm_lab.corpora import corpus_of

    (home / 'a.txt').write_text(''.join(f'line {n} of the text\n' for n in range(400)))
    (home / 'v.txt').write_text('line 7 of the text\n' * 30)
    splits = dict(val='v.txt', test=0.25)
    config = SHORT | dict(data=dict(corpus='a.txt', length=16, splits=splits))
    whole = lab.train_run(config, run='whole')
    begun = lab.train_run(config, 'train.steps=3', 'train.schedule=constant', run='begun')
    assert json.loads((begun.folder / 'run.json').read_text())['config']['decided']['data'][
        'splits'
    ] == dict(val='v.txt', test=0.25)
    one_line(
        lambda: lab.train_run(None, 'data.splits.test=0.3', resume=begun.folder),
        "data.splits={'test': 0.3, 'val': 'v.txt'}: it was {'test': 0.25, 'val': 'v.txt'}",
    )
    on = lab.train_run(None, 'train.steps=6', resume=begun.folder)
    other = lab.train_run(config, 'train.schedule=constant', run='other')
    for a, b in zip(on.run.model.parameters(), other.run.model.parameters()):
        assert a.equal(b)
    about = lab.load(whole.folder).about
    again = corpus_of(about)
    assert len(again.text('test')) == pytest.approx(0.25 * len((home / 'a.txt').read_text()), abs=1)
    assert again.text('val') == 'line 7 of the text\n' * 30
    assert 'test loss' in printed('eval', 'run/whole', '--split', 'test')[0]
    (home / 'v.txt').write_text('line 8 of the text\n' * 30)
    one_line(
        lambda: lab.train_run(None, 'train.steps=9', resume=begun.folder),
        'is not the text that this run has read, or was changed since',
    )
    with pytest.raises(LabError, match='is not the text that this model was trained on'):
        corpus_of(about)


def test_a_config_says_splits_with_keys_of_their_own(home):
    cfg = lab.read_config(
        'smoke', ['data.corpus=a.txt', 'data.splits.val=0.2', 'data.splits.test=t.txt']
    )
    assert cfg.data.splits == dict(val=0.2, test='t.txt')


def test_a_config_file_from_before_there_were_splits_is_still_ours(home):
    from llm_lab.config import write_config

    cfg = lab.read_config('smoke')
    write_config(cfg, home / 'config.yaml')
    text = (home / 'config.yaml').read_text()
    (home / 'config.yaml').write_text(text.replace('  splits: {}\n', ''))
    assert 'splits' not in (home / 'config.yaml').read_text()
    write_config(cfg, home / 'config.yaml')
    assert (home / 'config.yaml').read_text() == text
    (home / 'config.yaml').write_text('data:\n  corpus: tiny_tales\n')  # by hand
    one_line(lambda: write_config(cfg, home / 'config.yaml'), 'config.yaml')


# ---- a text in the place of a config


def lines(n):
    return ''.join(f'line {i} of {n}\n' for i in range(n))


SMALL = ['model.d_model=16', 'model.n_layers=1', 'model.n_heads=2', 'train.batch_size=4']
FEW = ['train.steps=4', 'eval.every=2', 'eval.tokens=200', 'train.threads=1']


def test_a_text_is_trained_on_by_its_path_alone(home, monkeypatch):
    (home / 'book.txt').write_text(lines(400))
    said = printed('train', 'book.txt', *SMALL, *FEW)[0]
    assert 'kept in experiments/book/runs/' in said.replace(str(home) + '/', '')
    golden = lab.read_config('golden')
    for name in ('book.txt', home / 'book.txt'):
        cfg = lab.read_config(name)
        assert cfg.name == 'book' and cfg.data.corpus == 'book.txt'
        assert (cfg.model, cfg.train, cfg.eval) == (golden.model, golden.train, golden.eval)
    printed('sample', 'book', '--tokens', '3')
    assert 'val loss' in printed('eval', 'book')[0]
    (home / 'elsewhere').mkdir()
    monkeypatch.chdir(home / 'elsewhere')  # the same text by another path: the same run goes on
    said = printed('train', '../book.txt', '--resume', 'train.steps=6')[0]
    assert 'step 6 of 6' in said and 'a new one begins' not in said
    assert len([*(home / 'experiments' / 'book' / 'runs').iterdir()]) == 2  # it, and `latest`


def test_a_folder_and_records_are_trained_on_as_well(home):
    (home / 'notes' / 'sub').mkdir(parents=True)
    (home / 'notes' / 'sub' / 'a.md').write_text(lines(300))
    records(home / 'd.jsonl', DOCS[:300])
    for path in ('notes', 'd.jsonl'):
        printed('train', path, *SMALL, *FEW, '--run', 'one')
    assert lab.load('notes/one').about['data'] == 'notes'
    assert lab.load('d/one').about['field'] == 'text'


def test_what_a_start_has_is_kept_where_a_text_is_named_alone(home):
    (home / 'book.txt').write_text(lines(400))
    tok = lab.CharTokenizer.train(lines(400))
    cfg = lab.GPTConfig(vocab_size=tok.vocab_size, d_model=16, n_layers=1, n_heads=2, max_len=20)
    lab.save('artifacts/begun', lab.MiniGPT(cfg), tok)
    printed('train', 'book.txt', *FEW, 'train.start_from=begun', '--run', 'one')
    assert lab.load('one').model.cfg.max_len == 20


def test_what_is_no_text_is_no_config(home):
    model = lab.MiniGPT(lab.GPTConfig(vocab_size=3, d_model=8, n_layers=1, n_heads=1, max_len=8))
    lab.save('artifacts/m', model, lab.CharTokenizer('ab\n'))
    (home / 'empty').mkdir()
    (home / 'experiments' / 'x' / 'runs' / 'one').mkdir(parents=True)
    (home / 'experiments' / 'x' / 'runs' / 'one' / 'metrics.csv').write_text('step\n')
    for path, says in (
        ('artifacts/m', "no config is called 'artifacts/m'"),
        ('empty', "no config is called 'empty'"),
        ('experiments/x', "no config is called 'experiments/x'"),
        ('bok.txt', 'bok.txt: there is no such file, neither here nor in'),
        ('none.yaml', "no config is called 'none.yaml'"),
    ):
        one_line(lambda: lab.read_config(path), says)
        printed('train', path, code=1)


def test_the_help_of_train_says_that_a_text_will_do():
    said = ' '.join(printed('train', '--help')[0].split())
    assert 'a text of your own (.txt, .md, .jsonl, .csv, .parquet or a folder' in said
