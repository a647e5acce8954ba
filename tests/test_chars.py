"The tokenizer of characters: what it refuses, its file beside their library, texts in parts"

from functools import partial

import pytest
from answers import chars as answers
from helpers import code_cell, exercise_tests, one_line
from tokenizers import Tokenizer as TheirTokenizer

from llm_lab import chars
from llm_lab.chars import (
    CharTokenizer,
    begin_of,
    begins,
    iter_text,
    load_tokenizer,
    template,
    tokenizer_from_json,
    tokens_html,
)
from llm_lab.core import check
from llm_lab.corpora import load_corpus


@pytest.fixture(scope='module')
def corpus():
    return load_corpus('tiny_tales')


@pytest.fixture(scope='module')
def tok(corpus):
    return CharTokenizer.train(corpus.text('train'))


def test_texts_come_back_and_an_empty_one_has_no_ids(tok):
    assert tok.encode('') == [] and tok.decode([]) == ''
    wide = CharTokenizer('aé😀')
    assert wide.decode(wide.encode('😀éa')) == '😀éa'


def test_a_character_outside_is_refused_also_far_outside_the_table(tok):
    one_line(lambda: tok.encode('a €'), "the character '€' at place 2 is not among the")
    one_line(lambda: tok.encode('\U0010ffff'), 'is not among the')


def test_a_vocabulary_has_distinct_characters_and_ids_lie_within():
    one_line(lambda: CharTokenizer('aa'), 'distinct')
    one_line(lambda: CharTokenizer('ab').decode([0, -1]), 'ids run from -1 to 0')


def test_special_tokens_follow_and_only_the_caller_allows_them():
    tok = CharTokenizer('<ab>', ['<a>', '<b>'])
    assert tok.encode('<a>') == [0, 1, 3] and tok.encode('<a>', 'all') == [4]
    assert tok.encode('<a><b>', '<b>') == [0, 1, 3, 5]
    one_line(lambda: tok.encode('a', ['<c>']), "'<c>' is no special token here")


def test_a_file_is_read_back_by_its_folder_or_its_name(tok, tmp_path):
    tok.save(tmp_path)
    assert load_tokenizer(tmp_path).chars == tok.chars
    assert load_tokenizer(tmp_path / 'tokenizer.json').chars == tok.chars


def test_a_torn_or_missing_file_is_one_line(tmp_path):
    (tmp_path / 'tokenizer.json').write_text('{"model": ')
    said = 'is not JSON (JSONDecodeError): save the tokenizer again'
    one_line(lambda: load_tokenizer(tmp_path), said)
    missing = tmp_path / 'nowhere'
    one_line(lambda: load_tokenizer(missing), 'give a folder with a saved tokenizer')


@pytest.mark.parametrize('data', [{}, []])
def test_what_describes_no_tokenizer_is_refused(data):
    one_line(lambda: tokenizer_from_json(data), 'holds no tokenizer')


@pytest.mark.parametrize(
    'model',
    [
        'BPE',
        {'type': 'BPE', 'vocab': {'ab': 0}},
        {'type': 'WordLevel', 'vocab': {'a': 'x', 'b': 1}},
        {'type': 'WordLevel', 'vocab': {'a': 0, 'b': 10**9}},
    ],
    ids=str,
)
def test_a_torn_tokenizer_is_refused_in_the_name_of_its_file(model):
    one_line(lambda: tokenizer_from_json({'model': model}), 'this file')


def test_their_library_reads_our_file_alike(corpus, tok, tmp_path):
    tok.save(tmp_path)
    theirs = TheirTokenizer.from_file(str(tmp_path / 'tokenizer.json'))
    text = corpus.text('test')[:5000]
    assert theirs.encode(text).ids == tok.encode(text)
    assert theirs.decode(tok.encode(text)) == text
    assert theirs.get_vocab_size() == tok.vocab_size


def test_what_stands_before_a_text_is_in_the_file(tok, tmp_path):
    assert begins(tok) == tok.encode('\n') and begins(CharTokenizer('ab')) == []
    told = CharTokenizer(tok.chars)
    told.begin = tok.encode('\n')
    told.save(tmp_path)  # now its file says it, and both libraries know it
    assert load_tokenizer(tmp_path).begin == tok.encode('\n')
    theirs = TheirTokenizer.from_file(str(tmp_path / 'tokenizer.json'))
    assert theirs.encode('The').ids == tok.encode('\nThe')


def test_marks_behind_a_text_are_refused():
    end = {'SpecialToken': {'id': '</s>', 'type_id': 0}}
    bert = dict(post_processor=dict(type='BertProcessing'))
    one_line(lambda: begin_of(bert), "'BertProcessing' puts marks behind")
    behind = dict(post_processor=template([], {}) | dict(single=[end]))
    one_line(lambda: begin_of(behind), 'puts marks behind a text')


def test_a_file_in_parts_is_its_text_with_plain_line_ends(corpus, tok, tmp_path):
    story = corpus.text('val')[:999]
    path = tmp_path / 'lines.txt'
    path.write_bytes(b'\xef\xbb\xbf' + story.replace('\n', '\r\n').encode())
    parts = [*iter_text(path, 100)]
    assert ''.join(parts) == story and max(map(len, parts)) == 100
    assert sum([tok.encode(p) for p in parts], []) == tok.encode(story)


def test_what_is_no_text_is_refused_in_one_line(tmp_path):
    (tmp_path / 'old.txt').write_bytes(b'caf\xe9')
    old, none = tmp_path / 'old.txt', tmp_path / 'none.txt'
    one_line(lambda: [*iter_text(old)], 'old.txt is not UTF-8: it holds the byte 0xe9')
    one_line(lambda: [*iter_text(none)], 'none.txt: No such file or directory; check the path')
    one_line(lambda: [*iter_text(b'bytes')], 'not bytes: wrap it in one')


def test_chips_show_white_space_and_no_markup_of_the_text(tok):
    words = 'Once upon a time\nSam met a cat.'
    page = tokens_html(tok, words)
    assert page.count('<span') == len(words) and page.count('<br>') == 1
    assert '␣' in page and '↵' in page
    assert '3 more' in tokens_html(tok, 'aaaaa', max_tokens=2)
    marked = tokens_html(CharTokenizer('<b>'), '<b>')
    assert '&lt;' in marked and '<b>' not in marked


# ---- the exercises


@pytest.fixture(scope='module')
def exercises():
    space = dict(vars(chars))
    for text in ('def with_unknown(', 'def my_guess('):
        exec(code_cell('11_chars', text).rpartition('check(')[0], space)
    return space


(
    test_a_right_answer_is_told_so,
    test_a_wrong_answer_meets_a_counter_example,
    test_an_exercise_that_nobody_has_done_says_so,
) = exercise_tests(
    answers.ANSWERS,
    dict(
        with_unknown=('with_unknown_spec', 'cases'),
        my_guess=('measured', None),
    ),
    fixture='exercises',
)


def test_what_the_third_exercise_breaks_turns_red(corpus, tok, monkeypatch):
    cell = partial(code_cell, '11_chars')
    right = cell('def _ordinary(')
    broken = right.replace(
        'self.table[np.minimum(points, len(self.table) - 1)]', 'self.table[points]'
    )
    assert broken != right
    kept = CharTokenizer._ordinary, CharTokenizer.decode
    for name, method in zip(('_ordinary', 'decode'), kept):
        monkeypatch.setattr(CharTokenizer, name, method)  # put back at the end
    exec(broken, dict(vars(chars)))
    assert tok.encode('abc') == [tok.chars.index(c) for c in 'abc']
    with pytest.raises(IndexError):
        tok.encode('a €')
