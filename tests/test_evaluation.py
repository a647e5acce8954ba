"""What an evaluation promises and its notebook does not show: windows of all kinds, units, files,
run folders that are torn or broken, and how a comparison is worded and drawn."""

import json
import math
import re
from dataclasses import replace
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from answers import evaluation as answers
from fastcore.test import test_close as close
from fastcore.test import test_eq as equal
from helpers import cells_of, exercise_tests

import llm_lab.evaluation as chapter
from llm_lab.bpe import BPETokenizer
from llm_lab.chars import CharTokenizer
from llm_lab.core import LabError, check
from llm_lab.corpora import END_OF_TEXT, Corpus, load_corpus
from llm_lab.evaluation import (
    UNITS,
    Comparison,
    DocumentSums,
    Score,
    _line,
    _remarks,
    compare,
    distinct,
    evaluate,
    evaluate_file,
    excess_by_kind,
    ratio_error,
    read_metrics,
    repetition,
    score as scored,
    strided_spans,
)
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.package import save
from llm_lab.tales import tiny_tales
from llm_lab.train import (
    fit,
    next_token_loss,
    plot_loss,
    random_crops,
    spans,
    token_losses,
)

pytestmark = pytest.mark.usefixtures('one_thread')
BIT = math.log(2)


# made when the first test asks: each worker reads this file, and one of them runs its tests
@cache
def the_tales():
    return load_corpus('tiny_tales')


@cache
def char_tok():
    return CharTokenizer.train(the_tales().text('val'))


@cache
def pair_tok():
    some = the_tales().documents('val')[:100]
    return BPETokenizer.train(some, 300, special_tokens=['<|endoftext|>'])


def fresh(tokenizer, length=64):
    sizes = dict(d_model=16, n_layers=1, n_heads=2)
    return MiniGPT(GPTConfig(vocab_size=tokenizer.vocab_size, max_len=length, **sizes))


def refuses(f, words):
    with pytest.raises(LabError, match=re.escape(words)):
        f()


# ---- windows


@pytest.mark.parametrize('starts', [None, [0, 3, 20, 21, 40]])
@pytest.mark.parametrize('stride', [1, 3, 7])
def test_each_token_is_scored_once_and_none_sees_more_than_the_context(starts, stride):
    windows = strided_spans(50, 7, stride, starts)
    scored = torch.cat([torch.arange(first, end) for _, first, end in windows])
    equal(scored, torch.arange(1, 50))
    assert (windows[:, 2] - 1 - windows[:, 0] <= 7).all()
    equal(strided_spans(50, 7, 7), spans(50, 7))  # as wide a stride as the context: blocks
    words = 'stride=8: give a whole number from 1 to the context, 7'
    refuses(lambda: strided_spans(50, 7, 8, starts), words)


def test_with_a_stride_of_one_each_token_sees_all_that_the_context_holds():
    model = fresh(char_tok(), 8)
    ids = torch.tensor(char_tok().encode(the_tales().text('val')[:60]))
    got = token_losses(model, ids, strided_spans(60, 8, 1))
    assert got[0].isnan()  # nothing stands before the first
    for t in range(1, 60):
        with torch.no_grad():
            logits = model(ids[None, max(0, t - 8) : t])[0, -1]
        close(got[t], -logits.log_softmax(-1)[ids[t]], eps=1e-5)


# ---- standard errors


def test_easy_and_hard_documents_are_covered_over_documents_only():
    g = np.random.default_rng(0)
    level = g.choice([0.5, 1.5], (300, 40))  # nats per token, a level for each document
    made = level[..., None] + g.normal(0, 0.5, (300, 40, 200))  # and 200 tokens in each
    off = np.array([abs(m.sum() - m.size) for m in made])
    errors = np.array([[ratio_error(m.sum(1), [200] * 40), m.std() * m.size**0.5] for m in made])
    over_documents, over_tokens = (off[:, None] < 1.96 * errors).mean(0)
    assert over_documents > 0.9 > 3 * over_tokens


# ---- units


def test_units_by_hand():
    s = Score(nats=200 * BIT, tokens=50, chars=100, bytes=125, error=10 * BIT, floor=1.6)
    close([s.loss, s.perplexity, s.bits, s.bits_per_byte, s.above], [4 * BIT, 16, 2, 1.6, 0.25])
    intervals = [2 - 0.196, 2 + 0.196, 1.6 - 0.1568, 1.6 + 0.1568]
    close([*s.interval, *s.interval_per_byte], intervals)
    # five end marks of 4 bits each: they count per character, and not per byte
    ended = replace(s, n_ends=5, end_nats=20 * BIT, bare_error=5 * BIT)
    close([ended.bits_per_byte, ended.end_bits, ended.bits], [180 / 125, 4, 2])


@pytest.mark.parametrize('made', ['characters', 'pairs'])
def test_a_model_that_knows_nothing_costs_the_same_for_each_token(made):
    some = tiny_tales(300)
    tokenizer = char_tok() if made == 'characters' else pair_tok()
    nothing = fresh(tokenizer)
    with torch.no_grad():
        for p in nothing.parameters():
            p.zero_()  # all tokens alike
    s = evaluate(nothing, tokenizer, some)
    uniform = math.log2(tokenizer.vocab_size)
    per_end = 2 if made == 'characters' else 1  # two line ends, or one mark
    close(s.bits, s.tokens * uniform / s.chars, eps=1e-5)
    close(s.end_bits, per_end * uniform, eps=1e-4)
    close(s.bits_per_byte, (s.tokens - per_end * s.n_ends) * uniform / s.bytes, eps=1e-4)
    # whatever the tokenizer is, the text is the same
    equal(s.chars, len(some.text('val') + some.separator))
    equal(s.bytes, sum(len(d.encode()) for d in some.documents('val')))
    if made == 'characters':
        equal(s.tokens, s.chars)
        equal(s.bytes, s.chars - 2 * s.n_ends)


def test_a_whole_split_is_scored_and_shows_how_far_it_is():
    seen = []
    model = fresh(char_tok())
    for split in ('val', 'test'):
        score = evaluate(model, char_tok(), the_tales(), split, live=seen.append)
        equal(score.chars, len(the_tales().text(split) + the_tales().separator))
    assert seen[0].startswith('validating: 0 of ') and len(seen) > 10


def test_a_text_of_other_characters_wants_byte_pairs():
    refuses(lambda: char_tok().encode('Größe'), 'byte pairs, which write any text: tokenizer=bpe')
    refuses(lambda: char_tok().encode('Größe'), "the character 'ö' at place 2")


def test_a_score_as_plain_data():
    s = Score(nats=200 * BIT, tokens=50, chars=100, bytes=125, error=10 * BIT, floor=1.6)
    assert replace(s, floor=None).above is None  # on most texts nobody knows
    ended = replace(s, n_ends=5, end_nats=20 * BIT, bare_error=5 * BIT)
    close(ended.interval_per_byte, (1.44 - 0.0784, 1.44 + 0.0784))
    data = json.loads(json.dumps(s.as_dict()))
    assert data.pop('units') == UNITS
    assert data == dict(
        loss=s.loss,
        perplexity=s.perplexity,
        bits=2.0,
        bits_per_byte=1.6,
        end_bits=None,
        interval=[*s.interval],
        interval_per_byte=[*s.interval_per_byte],
        floor=1.6,
        above=s.above,
        tokens=50,
        chars=100,
        bytes=125,
        n_ends=0,
        is_bound=False,
        only='',
    )
    alone = replace(s, error=math.inf)  # one document shows nothing of others
    assert [alone.interval, alone.interval_per_byte, alone.as_dict()['interval']] == [None] * 3


def test_a_little_below_the_floor_is_chance_and_more_is_a_leak():
    near = dict(tokens=100, chars=100, bytes=100, error=3.0, floor=1.0)
    close(Score(nats=100 * BIT - 8.9, **near).above, -8.9 / 100 / BIT)
    refuses(lambda: Score(nats=100 * BIT - 9.1, **near), '3 standard errors below the floor, 1.000')


def test_letters_of_two_bytes():
    accents = Corpus('wide', dict(val='ééé\n\nééé\n\n' * 40), floor=None)
    letters = CharTokenizer.train(accents.text('val'))
    model = fresh(letters, 128)
    wide = evaluate(model, letters, accents)
    assert (wide.tokens, wide.chars, wide.bytes) == (399, 399, 638)  # é has two bytes in UTF-8
    close(wide.bits_per_byte * wide.bytes, wide.bits * wide.chars)
    close(wide.loss, math.log(3), eps=0.5)
    refuses(
        lambda: evaluate(model, letters, accents, 'test'),
        "corpus 'wide' has no split 'test': choose",
    )
    for n in (0, 1):
        refuses(
            lambda: evaluate(model, letters, accents, max_tokens=n),
            f'wide: its val text of {n} tokens has',
        )
    refuses(
        lambda: evaluate(fresh(char_tok()), char_tok(), the_tales(), max_tokens=2),
        'tiny_tales: its val text of 2 tokens has no next',
    )


@pytest.mark.parametrize('made', ['characters', 'pairs'])
def test_some_tokens_alone_may_be_scored(made):
    tokenizer = char_tok() if made == 'characters' else pair_tok()
    model = fresh(tokenizer)
    text = dict(max_tokens=2000)
    whole = evaluate(model, tokenizer, the_tales(), **text)
    picked = torch.rand(2000, generator=torch.Generator().manual_seed(0)) < 0.3

    def odd(ids):
        return picked[: len(ids)]

    def even(ids):
        return ~picked[: len(ids)]

    one, two = (evaluate(model, tokenizer, the_tales(), **text, only=f) for f in (odd, even))
    assert (one.only, two.only, whole.only) == ('odd', 'even', '') and whole.floor and not one.floor
    for name in ('nats', 'tokens', 'chars', 'end_nats', 'n_ends', 'bytes'):  # two halves of a whole
        close(getattr(one, name) + getattr(two, name), getattr(whole, name), eps=1e-6)
    assert one.tokens == picked[1:].sum() and str(one).startswith('odd: loss ')
    assert 0 < one.error < whole.error  # of fewer tokens

    def none(ids):
        return torch.zeros(len(ids), dtype=torch.bool)

    refuses(
        lambda: evaluate(model, tokenizer, the_tales(), **text, only=none),
        'tiny_tales: its val text has no none',
    )


def test_the_loss_does_not_depend_on_how_many_windows_are_read_together():
    model = fresh(char_tok())
    want = evaluate(model, char_tok(), the_tales(), max_tokens=3000).nats
    for size in (1, 5, 200):
        close(
            evaluate(model, char_tok(), the_tales(), max_tokens=3000, batch_size=size).nats,
            want,
            eps=1e-3,
        )


# ---- a file


@pytest.mark.parametrize('made', ['characters', 'pairs'])
def test_a_file_with_marks_is_a_split_without_a_floor(made, tmp_path):
    tokenizer = char_tok() if made == 'characters' else pair_tok()
    model = fresh(tokenizer)
    few = the_tales().documents('test')[:30]
    split = replace(the_tales(), splits=dict(test='\n\n'.join(few)), floor=None)
    as_split = evaluate(model, tokenizer, split, 'test')
    mine = tmp_path / 'my.txt'
    mine.write_text(f'\n{END_OF_TEXT}\n'.join(few) + f'\n{END_OF_TEXT}\n', encoding='utf-8')
    as_file = evaluate_file(model, tokenizer, mine)
    assert replace(as_file, chars=0) == replace(as_split, chars=0)
    # a mark that is written counts as it is written
    mark_too = 0 if made == 'characters' else 13 * len(few)
    assert as_file.chars == as_split.chars + mark_too


def test_a_running_file_is_scored_but_for_its_first_character(tmp_path):
    model = fresh(char_tok())
    text = '\n\n'.join(the_tales().documents('test')[:30])
    mine = tmp_path / 'my.txt'
    mine.write_text(text, encoding='utf-8')
    one = evaluate_file(model, char_tok(), mine, stride=20)
    assert (one.chars, one.floor) == (len(text) - 1, None)
    ids = torch.tensor(char_tok().encode(text))
    want = token_losses(model, ids, strided_spans(len(ids), 64, 20)).nanmean().item()
    close(one.loss, want, eps=1e-6)
    mine.write_text('Once upon a time Zoe met Tom.', encoding='utf-8')
    assert evaluate_file(model, char_tok(), mine).as_dict()['interval'] is None


@pytest.mark.parametrize(
    'text, words',
    [
        ('One day,\nZoe paid 5 €.', "line 2: the model does not know the character '5': leave it"),
        ('Größe', '(tokenizer=bpe)'),
        ('Z', 'my.txt: its whole text of 1 tokens has'),
        (f'{END_OF_TEXT}\n{END_OF_TEXT}', 'my.txt: its whole text of 2 tokens has'),
        (None, 'my.txt: No such file or directory; check'),
    ],
)
def test_a_file_that_cannot_be_scored(text, words, tmp_path):
    if text is not None:
        (tmp_path / 'my.txt').write_text(text, encoding='utf-8')
    refuses(lambda: evaluate_file(fresh(char_tok()), char_tok(), tmp_path / 'my.txt'), words)


# ---- runs in folders


ROWS = [
    dict(step=n, tokens=100 * n, loss=9 / n, bits_per_byte=9 / n, val=None) for n in range(1, 8)
]


def write_run(folder, rows, torn='', result=None, **about):
    "By hand what a run of `runs` writes"
    folder.mkdir(parents=True, exist_ok=True)
    lines = ''.join(json.dumps(row) + '\n' for row in rows)
    (folder / 'metrics.jsonl').write_text(lines + torn)
    for name, content in (('run.json', about), ('result.json', result)):
        if content:
            (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture
def steps(tmp_path):
    "The steps that `read_metrics` finds in such a folder"

    def read(*args):
        folder = write_run(tmp_path / 'torn', *args)
        return [row['step'] for row in read_metrics(folder / 'metrics.jsonl')]

    return read


def test_each_step_is_read_once(steps):
    assert steps(ROWS) == [1, 2, 3, 4, 5, 6, 7]
    assert steps(ROWS, '{"step": 8, "los') == [1, 2, 3, 4, 5, 6, 7]  # torn by a kill
    assert steps(ROWS[:5] + ROWS[2:4]) == [1, 2, 3, 4]  # killed after step 5, resumed after 2


@pytest.mark.parametrize('wrong', ['{"step": 8, "los\n{}', '17\n{}', '\n{}'])
def test_a_broken_line_in_the_middle_is_an_error(wrong, steps):
    words = 'metrics.jsonl, line 8, is no JSON object: mend or delete it'
    refuses(lambda: steps(ROWS, wrong), words)


@pytest.fixture(scope='module')
def trained():
    "A short run with byte pairs in memory, and the score of its model"
    some = tiny_tales(300)
    ids = torch.tensor(pair_tok().encode(some.text('train')))

    def note(run):
        s = evaluate(run.model, pair_tok(), some)
        return dict(val=s.loss, val_bits_per_byte=s.bits_per_byte)

    run = fit(fresh(pair_tok()), random_crops(ids, 4, 64), 20, callbacks={3: note})
    return run, evaluate(run.model, pair_tok(), some)


def test_a_run_in_memory_and_in_a_folder_are_the_same_line(trained, tmp_path):
    run, score = trained
    note = run.notes[-1]
    line = _line('x', run)
    sizes = {k: line[k] for k in ('params', 'steps', 'tokens', 'seconds')}
    assert [*sizes.values()] == [run.model.n_params, 20, run.tokens, run.seconds]
    assert line['state'] == 'finished'
    got = [line[k] for k in ('loss', 'bits_per_byte', 'final')]
    assert got == [note['val'], note['val_bits_per_byte'], False]
    noted_at = [row['tokens'] for row in line['rows'] if 'val' in row]
    assert noted_at == [n['step'] / 20 * run.tokens for n in run.notes]
    assert _line('x', write_run(tmp_path / 'one', line['rows'], result=sizes)) == line
    result = sizes | dict(scores=dict(val=score.as_dict()))
    scored = _line('x', write_run(tmp_path / 'one', line['rows'], result=result))
    got = [scored[k] for k in ('final', 'loss', 'interval')]
    assert got == [True, score.loss, [*score.interval]]
    assert scored['interval_per_byte'] == [*score.interval_per_byte]


def test_a_run_that_was_killed_is_as_far_as_its_last_whole_line(trained, tmp_path):
    run, _ = trained
    rows = _line('x', run)['rows']
    killed = _line('x', write_run(tmp_path / 'two', rows[:13], '{"st', params=7))
    got = [killed[k] for k in ('params', 'steps', 'state', 'time')]
    assert got == [7, 13, 'step 13', None]
    assert (killed['loss'], killed['final']) == (run.notes[3]['val'], False)  # noted at step 12
    alone = str(Comparison([killed], 'loss', []))  # one alone is not the best
    assert [alone.count(sign) for sign in '*~–'] == [0, 2, 2]


# ---- runs side by side


@pytest.fixture
def made(tmp_path):
    """A function that makes the folder of a run which ended with this loss; a token holds `size`
    times the text of another"""

    def make(name, loss, size=1.0, **more):
        score = dict(
            loss=loss,
            bits_per_byte=size and loss / size,
            bits=loss,
            bytes=100,
            chars=100,
            n_ends=0,
            floor=0.5,
        )
        result = dict(steps=7, tokens=7e5, seconds=61.4, scores=dict(val=score | more))
        return write_run(tmp_path / name, ROWS, params=1000, result=result)

    return make


def remarks(*folders, unit='bits_per_byte'):
    return _remarks([_line(f.name, f) for f in folders], unit)


def test_the_remarks(made, tmp_path):
    a = made('a', 1.0, interval_per_byte=(0.95, 1.05))
    b = made('b', 1.1, interval_per_byte=(1.04, 1.16))
    assert remarks(a, b) == ['a and b are not told apart: their intervals overlap']
    b = made('b', 1.1, interval_per_byte=(1.06, 1.2))
    assert remarks(a, b) == ['a is lowest: 1.000 bits per byte, 9.1% below b']
    assert remarks(a) == ['a has 1.000 bits per byte']
    assert remarks(write_run(tmp_path / 'c', ROWS)) == ['no run has a validation loss yet']
    assert remarks(a, made('b', 4.0, 3.0))[1].startswith('the tokenizers differ:')
    unknown = remarks(a, made('b', 4.0, None), unit='loss')[1]
    assert unknown.startswith('bits per byte are not known of a')
    older = remarks(a, made('b', 1.1, n_ends=None))[1]
    assert older.startswith('older results count end marks as text')
    other = remarks(a, made('b', 4.0, bytes=90))[1]
    assert other == 'the validation texts differ in length: is it the same text?'


def test_a_comparison_as_text_and_as_html(made):
    a = made('a', 1.0, interval_per_byte=(0.95, 1.05))
    b = made('b', 2.0, interval_per_byte=[1.8, 2.2])
    page = Comparison([_line('<i>&', a), _line('b', b)], 'bits_per_byte', ['a < b'])
    table = str(page).split('\n')
    row = 'b 1,000 7 700,000 0:01:01 2.000 2.000 1.800 to 2.200 finished'
    assert table[2].split() == row.split()
    assert table[1].startswith('*  <i>&  ')
    assert table[3:] == ['', 'a < b']
    assert len(set(map(len, table[:3]))) == 1  # the columns stand under their heads
    html = page._repr_html_()
    assert '&lt;i&gt;&amp;' in html and 'a &lt; b' in html and '<i>' not in html
    assert html.count('bold') == 10  # the best row


def test_the_order_and_the_names(made, tmp_path):
    def order(*runs):
        return [line['name'] for line in compare(runs).lines]

    # two bits per byte are less than three
    assert order(made('a', 4.0, 2.0), made('b', 3.0)) == ['a', 'b']
    # one does not know its own
    assert order(made('a', 4.0, 2.0), made('b', 3.0, None)) == ['b', 'a']
    c = write_run(tmp_path / 'c', ROWS)
    d = write_run(tmp_path / 'd', ROWS)
    assert order(c, d, made('b', 3.0), made('a', 4.0, 2.0)) == ['a', 'b', 'c', 'd']
    twins = order(made('x/a', 1.0), made('y/a', 2.0), str(made('b', 3.0)))
    assert twins == ['x/a', 'y/a', 'b']
    assert compare([tmp_path / 'a', c]).remarks[0] == 'a has 2.000 bits per byte'


def test_two_kept_models_are_compared_by_their_scores():
    some = tiny_tales(300)
    a, b = (evaluate(fresh(tok), tok, some) for tok in (char_tok(), pair_tok()))
    table = compare({'chars': a, 'pairs': b})
    assert {line['name']: line['loss'] for line in table.lines} == {
        'chars': a.loss,
        'pairs': b.loss,
    }
    assert 'scored' in str(table) and 'so far' not in table.remarks[0]
    assert any('the tokenizers differ' in r for r in table.remarks)
    refuses(lambda: compare([a]).picture(), 'scores alone have no curve')


@pytest.mark.parametrize('independent', [True, False])
@pytest.mark.parametrize('made', [char_tok, pair_tok])
def test_the_sums_of_the_documents_are_the_score(independent, made):
    some = replace(tiny_tales(300), independent=independent)
    score = evaluate(fresh(made()), made(), some)
    sums = score.documents
    close(sum(sums.nats), score.nats - score.end_nats, eps=1e-6)
    # of a running text the separators are between the documents, so they count as its text
    assert sum(sums.bytes) == score.bytes
    again = DocumentSums.from_dict(json.loads(json.dumps(sums.as_dict())))
    assert (again.sha256, again.bytes) == (sums.sha256, sums.bytes)
    close(again.nats, sums.nats, eps=1e-5)
    assert DocumentSums.from_dict(dict(sha256='x', nats='1 2', bytes='1')) is None


def documents_of(nats, sizes, sha256='same'):
    "A score of some documents, as `tally` makes it"
    error = ratio_error(nats, sizes)
    n = int(sum(sizes))
    sums = DocumentSums(sha256, tuple(map(float, nats)), tuple(map(int, sizes)))
    return Score(float(sum(nats)), n, n, n, error, documents=sums)


def test_a_paired_difference_is_sharper_than_two_intervals(tmp_path):
    g = np.random.default_rng(0)
    sizes = g.integers(50, 150, 200)
    hard = sizes * g.normal(1.0, 0.3, 200)  # what a document costs any model

    def remark(shift, **more):
        b = hard + sizes * g.normal(shift, 0.02, 200)
        scores = dict(a=documents_of(hard, sizes), b=documents_of(b, sizes, **more))
        return b, compare(scores).remarks[0], scores

    b, said, scores = remark(0.01)
    assert said.startswith('a is lowest') and 'b needs 0.01' in said
    assert remark(0.01, sha256='other')[1].endswith('their intervals overlap')
    # the interval, by resampling documents
    drawn = g.integers(0, 200, (4000, 200))
    apart = (b - hard)[drawn].sum(1) / sizes[drawn].sum(1) / BIT
    half = float(re.search(r'± ([\d.]+)', said)[1])
    assert half == pytest.approx(1.96 * apart.std(), rel=0.1)
    nothing = remark(0.0)[1]
    assert 'not told apart: paired, over 200 pieces' in nothing
    same = compare(dict(a=scores['a'], b=scores['a'])).remarks[0]
    assert '0.0000 ± 0.0000' in same and 'not told apart' in same
    # a run keeps them, unless they are many
    kept = [
        write_run(tmp_path / name, ROWS, result=dict(steps=7, scores=dict(val=score.as_dict())))
        for name, score in scores.items()
    ]
    assert compare(kept).remarks[0] == said
    many = documents_of([1.0] * 5000, [1] * 5000)
    assert 'documents' not in many.as_dict() and many.documents


def test_the_best_of_runs_under_way_is_best_so_far(made, trained, tmp_path):
    rows = _line('x', trained[0])['rows']
    killed = write_run(tmp_path / 'two', rows[:13], '{"st', params=7)
    found = compare([made('a', 1.0), killed]).remarks[0]
    assert found.startswith('a is lowest so far')


def test_what_cannot_be_compared(made, tmp_path):
    refuses(lambda: compare([]), 'there is no run to compare: give the folder of at least one')
    empty = write_run(tmp_path / 'empty', [])
    refuses(
        lambda: compare([empty]), 'empty has no metrics: give the folder of a run that has made'
    )
    for named in ([tmp_path / 'nowhere'], ['nowhere/base'], {'a': 'nowhere'}):
        refuses(lambda: compare(named), 'does not exist: give the folder or the name of a run')
    save(tmp_path / 'book', fresh(char_tok()), char_tok())
    refuses(
        lambda: compare([tmp_path / 'book']), 'is a saved model, which keeps no losses: evaluate'
    )
    broken = made('a', 1.0)
    (broken / 'result.json').write_text('{"na')
    refuses(lambda: compare([broken]), 'result.json is no JSON object: mend or delete it')


def test_what_the_picture_names(made, tmp_path):
    def legend(*runs):
        fig = compare(runs).picture()
        plt.close(fig)
        return [t.get_text() for t in fig.axes[0].get_legend().get_texts()]

    assert legend(made('a', 1.0), made('b', 2.0)) == ['a, training', 'b, training', 'floor']
    for other in (None, 0.7):  # not known of b, or another one
        named = legend(made('a', 1.0), made('b', 2.0, floor=other))
        assert named == ['a, training', 'b, training']
    # a run that noted validation losses is drawn by them, and called by its name alone
    noted = [dict(row, val=row['loss'], val_bits_per_byte=row['loss']) for row in ROWS]
    folders = [write_run(tmp_path / name, noted) for name in ('c', 'd')]
    assert legend(*folders) == ['c', 'd']
    only = compare([made('a', 1.0)]).picture()
    plt.close(only)
    # smoothed
    close(only.axes[0].lines[0].get_ydata()[-1], np.mean([9 / n for n in range(1, 8)]))


# ---- what is written


def test_texts_without_an_ngram():
    assert [distinct(['a'], 2), repetition('')] == [0.0, 0.0]


# ---- the log-likelihood of single texts


@pytest.fixture(scope='module')
def small():
    return MiniGPT(GPTConfig(char_tok().vocab_size, 24, d_model=16, n_layers=1, n_heads=2))


def log_p(model, given, ids):
    "The sum of log P(token | all before it), one token after the other"
    row = torch.tensor([*given, *ids])
    total = 0.0
    for n in range(len(given), len(row)):
        with torch.no_grad():
            total += model(row[None, :n])[0, -1].double().log_softmax(-1)[row[n]].item()
    return total


def test_a_text_is_scored_as_one_would_write_it_down(small):
    texts = ['Mia', 'a red cat. ', 'T']
    want = [log_p(small, char_tok().encode('\n'), char_tok().encode(t)) for t in texts]
    close(scored(small, char_tok(), texts), torch.tensor(want, dtype=torch.float64), eps=1e-4)
    # the order and the company of texts change nothing
    close(
        scored(small, char_tok(), texts[::-1]).flip(0),
        scored(small, char_tok(), texts, batch_size=1),
        eps=1e-4,
    )


def test_a_prompt_is_read_and_not_scored(small):
    prompts, texts = ['Once ', 'A '], ['upon', 'time']
    want = [
        log_p(small, char_tok().encode(p), char_tok().encode(t)) for p, t in zip(prompts, texts)
    ]
    close(
        scored(small, char_tok(), texts, prompts), torch.tensor(want, dtype=torch.float64), eps=1e-4
    )


def test_a_text_longer_than_the_context_goes_through_in_windows(small):
    text = the_tales().documents('val')[0][:60]
    ids = torch.tensor([*char_tok().encode('\n'), *char_tok().encode(text)])
    for stride in (None, 5):
        windows = strided_spans(len(ids), 24, stride) if stride else spans(len(ids), 24)
        want = -token_losses(small, ids, windows).double().nansum()
        close(scored(small, char_tok(), [text, 'Mia'], stride=stride)[0], want, eps=1e-4)


def test_one_text_may_stand_without_a_list(small):
    assert torch.equal(scored(small, char_tok(), 'Mia'), scored(small, char_tok(), ['Mia']))
    assert torch.equal(
        scored(small, char_tok(), 'cat', 'A red '), scored(small, char_tok(), ['cat'], ['A red '])
    )


def test_what_cannot_be_scored_is_one_line(small):
    with pytest.raises(LabError, match='1 prompts for 2 texts: give one for each'):
        scored(small, char_tok(), ['a', 'b'], ['c'])
    with pytest.raises(LabError, match='text 1 is empty: leave it out'):
        scored(small, char_tok(), ['a', ''])
    with pytest.raises(LabError, match='text 0 has nothing before its first token.*give prompts'):
        scored(small, CharTokenizer('ab'), ['a'])
    assert scored(small, char_tok(), []).shape == (0,)


def test_a_score_prints_its_units_interval_and_floor():
    with_floor = Score(50 * math.log(2), 50, 100, 100, 3.0, floor=0.4)
    assert str(with_floor) == (
        'loss 0.693 nats per token, perplexity 2.00, 0.500 bits per byte '
        '(95 % 0.415 to 0.585); 25% above the floor of 0.400 bits per character'
    )
    assert str(replace(with_floor, error=math.inf, floor=None)).endswith(
        '0.500 bits per byte (no interval: one document tells none)'
    )


def test_a_corpus_may_be_given_by_its_name():
    model = fresh(char_tok())
    by_name = evaluate(model, char_tok(), 'tiny_tales', max_tokens=2000)
    assert by_name == evaluate(model, char_tok(), the_tales(), max_tokens=2000)
    with pytest.raises(LabError, match="did you mean 'tiny_tales'"):
        evaluate(model, char_tok(), 'tiny_tails')


# ---- what a guess gets wrong


def test_another_models_tokenizer_is_one_line_wherever_a_text_is_read():
    few = fresh(CharTokenizer('abc'))
    n = char_tok().vocab_size
    words = f'the tokenizer has {n} ids, the model 3: give the tokenizer of this model'
    refuses(lambda: evaluate(few, char_tok(), the_tales()), words)
    refuses(lambda: scored(few, char_tok(), 'a'), words)
    refuses(lambda: excess_by_kind(few, char_tok(), the_tales()), words)
    with pytest.warns(
        UserWarning, match=f'has {char_tok().vocab_size} ids, the model 300: if it belongs'
    ):
        evaluate(fresh(pair_tok()), char_tok(), the_tales(), max_tokens=500)


def test_a_callback_may_return_a_score(tmp_path):
    some = tiny_tales(300)
    ids = torch.tensor(pair_tok().encode(some.text('train')))
    run = fit(
        fresh(pair_tok()),
        random_crops(ids, 4, 64),
        6,
        callbacks={3: lambda s: evaluate(s.model, pair_tok(), some)},
    )
    score = evaluate(run.model, pair_tok(), some)
    assert run.notes[-1] == dict(step=6, val=score.loss, val_bits_per_byte=score.bits_per_byte)
    line = _line('x', run)
    assert (line['loss'], line['bits_per_byte']) == (score.loss, score.bits_per_byte)
    json.dumps(run.notes)  # plain numbers
    fig = plot_loss(run, token='token')
    plt.close(fig)
    assert fig.axes[0].lines[1].get_ydata()[-1] == score.loss


def test_runs_in_memory_may_stand_in_a_list(trained, made):
    run, _ = trained
    two = compare([run, run])
    assert sorted(line['name'] for line in two.lines) == ['model 1', 'model 2']
    assert [line['name'] for line in compare(run).lines] == ['model 1']
    folder = made('a', 1.0)
    mixed = compare(iter([folder, run]))
    assert {line['name'] for line in mixed.lines} == {'a', 'model 2'}
    assert [line['name'] for line in compare(str(folder)).lines] == ['a']
    for wrong in (run.model, [run.model], dict(a=run.model)):
        refuses(
            lambda: compare(wrong), 'a MiniGPT is no run: give the folder of one, or what `fit`'
        )


def squared(model, rows):
    return next_token_loss(model, rows) ** 2


def test_the_axis_is_called_by_what_is_drawn(trained, made):
    def axis(runs):
        fig = compare(runs).picture()
        plt.close(fig)
        names = [t.get_text() for t in fig.axes[0].get_legend().get_texts()]
        return fig.axes[0].get_ylabel(), names

    run, _ = trained
    bare = replace(run, notes=[])
    bare.history = run.history
    assert axis([run, run]) == ('validation loss (bits per byte)', ['model 1', 'model 2'])
    assert axis([bare]) == ('training loss (nats per token)', ['model 1, training'])
    noted = replace(run, notes=[dict(step=n['step'], val=n['val']) for n in run.notes])
    noted.history = run.history
    assert axis(dict(a=noted, b=bare)) == ('loss (nats per token)', ['a', 'b, training'])
    own = fit(fresh(pair_tok()), random_crops(torch.arange(300), 2, 64), 3, loss_fn=squared)
    assert axis([own]) == ('training of squared loss', ['model 1, training of squared'])


def test_runs_are_compared_one_after_the_other_or_in_a_list(made):
    a, b = made('a', 1.0), made('b', 2.0)
    names = [line['name'] for line in compare(a, b).lines]
    assert names == [line['name'] for line in compare([a, b]).lines] == ['a', 'b']


def test_three_runs_in_folders_one_of_them_torn(tmp_path):
    some = tiny_tales(300)

    def run(tokenizer, seed, lr=8e-3):
        model = MiniGPT(fresh(tokenizer).cfg, seed)
        ids = torch.tensor(tokenizer.encode(some.text('train')))
        note = lambda state: evaluate(state.model, tokenizer, some)
        made = fit(model, random_crops(ids, 4, 64, seed), 30, lr=lr, callbacks={10: note})
        return made, evaluate(made.model, tokenizer, some)

    def folder(name, made, score):
        facts = chapter._read_run(made)[1] | dict(scores=dict(val=score.as_dict()))
        return write_run(tmp_path / name, _line('x', made)['rows'], result=facts)

    one, two = run(char_tok(), 0), run(char_tok(), 1)
    slow = run(char_tok(), 0, lr=1e-4)[0]
    torn = write_run(tmp_path / 'low rate', _line('x', slow)['rows'][:20], torn='{"step": 21, "t')
    three = compare([torn, folder('seed 0', *one), folder('seed 1', *two)])
    equal((three.lines[2]['name'], three.lines[2]['state']), ('low rate', 'step 20'))
    assert 'paired, over ' in three.remarks[0]
    fig = three.picture()
    plt.close(fig)
    equal(len(fig.axes[0].lines), 3 + 2)  # three curves, two final scores
    both = compare({'chars': one[0], 'bpe': run(pair_tok(), 0)[0]})
    assert both.remarks[1].startswith('the tokenizers differ')


# ---- the exercises


@pytest.fixture(scope='module')
def lesson():
    "The names that the exercises use, and the cell of each of them"
    names = dict(vars(chapter), check=check, np=np, spans=spans)
    for name in answers.ANSWERS:
        (source,) = [s for s in cells_of('25_evaluation') if s.startswith(f'def {name}(')]
        exec(source, names)
    return names


(
    test_a_right_answer_is_told_so,
    test_a_wrong_answer_meets_a_counter_example,
    test_an_exercise_that_nobody_has_done_says_so,
) = exercise_tests(
    answers.ANSWERS,
    dict(
        windows=('windows_spec', 'window_cases'),
        paired=('paired_spec', 'paired_cases'),
        my_guess=('measured', None),
        turns_red=('turns_red_spec', None),
    ),
)
