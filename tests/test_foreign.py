"""Tokenizers of others: each kind of tokenizer.json is read with the ids and texts of the
`tokenizers` library, or refused by name.

The oracle is the library itself, on random texts. A tenth of the texts in `make test`, all of
them in `make nightly` (see cases.py)."""

import copy
import json
import pickle
import random
import shutil
import warnings

import pytest
from cases import cases, crossed
from helpers import one_line
from texts import random_string
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

transformers = pytest.importorskip('transformers', reason='pip install transformers')
torch = pytest.importorskip('torch')
from safetensors.torch import load_file, save_file

from llm_lab.bpe import BPETokenizer
from llm_lab.kv_cache import with_kv_cache, complete
from llm_lab.chars import CharTokenizer, load_tokenizer, tokenizer_from_json
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.parts import part
from llm_lab.gqa import GQA
from llm_lab.hub import from_hf, to_hf
from llm_lab.core import LabError, rng
from llm_lab.llama_block import llama
from llm_lab.sampling import DecodeStream, prompt_ids, sample

SAID = (
    'The cat sat on the mat.\nA café, 12 naïve cats — and 家! Hello, hello  wörld\t"it\'s" '
    'ﬁne ½ <s>x</s> [MASK]. '
) * 3
BYTES = pre_tokenizers.ByteLevel.alphabet()


def trained(model, trainer, pre=None, decoder=None, normalizer=None):
    t = Tokenizer(model)
    if normalizer:
        t.normalizer = normalizer
    if pre:
        t.pre_tokenizer = pre
    if decoder:
        t.decoder = decoder
    t.train_from_iterator([SAID], trainer)
    return t


def words(pre=pre_tokenizers.Whitespace, unk='[UNK]', **kw):
    special = [unk] if unk else []
    return trained(
        models.WordLevel(unk_token=unk) if unk else models.WordLevel(),
        trainers.WordLevelTrainer(show_progress=False, special_tokens=special),
        pre(),
        **kw,
    )


def pieces(**kw):
    trainer = trainers.WordPieceTrainer(
        vocab_size=90, show_progress=False, special_tokens=['[UNK]', '[CLS]', '[MASK]']
    )
    return trained(
        models.WordPiece(unk_token='[UNK]'),
        trainer,
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
        normalizers.BertNormalizer(**kw),
    )


def unigram(byte_fallback=False, normalizer=None):
    t = trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=80, show_progress=False, unk_token='<unk>', special_tokens=['<unk>', '<s>']
        ),
        pre_tokenizers.Metaspace(),
        decoders.Metaspace(),
        normalizer or normalizers.NFKC(),
    )
    if not byte_fallback:
        return t
    data = json.loads(t.to_str())
    data['model'] |= dict(
        byte_fallback=True,
        vocab=data['model']['vocab'] + [[f'<0x{b:02X}>', -9.0] for b in range(256)],
    )
    data['decoder'] = dict(
        type='Sequence',
        decoders=[
            dict(type='ByteFallback'),
            dict(type='Metaspace', replacement='▁', prepend_scheme='always', split=True),
        ],
    )
    return Tokenizer.from_str(json.dumps(data))


def llama2(fallback=True, **kw):
    "BPE over characters, as SentencePiece's: the space is a letter, bytes are the last resort"
    t = trained(
        models.BPE(unk_token='<unk>', fuse_unk=True),
        trainers.BpeTrainer(
            vocab_size=100, show_progress=False, special_tokens=['<unk>', '<s>', '</s>']
        ),
        normalizer=normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]),
    )
    data = json.loads(t.to_str())
    vocab = data['model']['vocab']
    for b in range(256) if fallback else ():
        vocab.setdefault(f'<0x{b:02X}>', len(vocab))
    data['model'] |= dict(byte_fallback=fallback) | kw
    data['decoder'] = json.loads(
        decoders.Sequence(
            [
                decoders.Replace('▁', ' '),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(' ', 1, 0),
            ]
        ).__getstate__()
    )
    return Tokenizer.from_str(json.dumps(data))


def octets(pre=None, decoder=True, normalizer=None, alphabet=BYTES, **kw):
    "Byte-level BPE"
    t = trained(
        models.BPE(**kw),
        trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=alphabet),
        pre or pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel() if decoder else None,
        normalizer,
    )
    return t


def changed(t, change):
    data = json.loads(t.to_str())
    change(data)
    return Tokenizer.from_str(json.dumps(data))


def added(make, *tokens):
    "With these tokens, (text, special, flags of the library)"
    t = make()
    for text, special, flags in tokens:
        token = AddedToken(text, special=special, **flags)
        (t.add_special_tokens if special else t.add_tokens)([token])
    return t


def letters(unk='<unknown>', **parts):
    "Each character is a word, cut off by itself"
    t = Tokenizer(
        models.WordLevel({c: i for i, c in enumerate(sorted({*SAID, '?'}))}, unk_token=unk)
    )
    t.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
    t.decoder = decoders.Fuse()
    for k, v in parts.items():
        if v is None:
            t = changed(t, lambda d, k=k: d.update({k: None}))
        else:
            setattr(t, k, v)
    return t


def merged(merges):
    "Byte-level BPE with these merges and no others"
    vocab = {c: i for i, c in enumerate(sorted(BYTES))}
    for x in sorted({x for m in merges for x in (*m, ''.join(m))} - vocab.keys()):
        vocab[x] = len(vocab)
    t = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    return t


def out_of_order():
    "Each way to split a token stands among the merges, also before its parts are made"
    return merged([('h', 'e'), ('hel', 'lo'), ('he', 'l'), ('l', 'o'), ('ab', 'a'), ('a', 'b')])


def cut(pattern, behavior='isolated', invert=False):
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior, invert), level])


NFC = normalizers.NFC
KINDS = {
    'words by white space': lambda: words(),
    'words, no unknown token': lambda: words(unk=None),
    'words, cut at spaces': lambda: words(pre_tokenizers.WhitespaceSplit),
    'words by punctuation': lambda: words(pre_tokenizers.Punctuation),
    'words in lower case': lambda: words(normalizer=normalizers.Lowercase()),
    'single characters, no cuts': lambda: words(lambda: None),
    'characters, as ours': lambda: letters(),
    'characters with an unknown one': lambda: letters(unk='?'),
    'characters in lower case': lambda: letters(normalizer=normalizers.Lowercase()),
    'characters, not cut': lambda: letters(pre_tokenizer=None),
    'characters, cut at spaces': lambda: letters(pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
    'characters, joined by spaces': lambda: letters(decoder=None),
    'characters and a word': lambda: added(letters, ('cat', False, {})),
    'characters and a mark': lambda: added(letters, ('<s>', True, {})),
    'characters, padded': lambda: padded(letters()),
    'wordpiece': lambda: pieces(),
    'wordpiece, accents kept': lambda: pieces(lowercase=False, strip_accents=False),
    'wordpiece, short words': lambda: changed(
        pieces(), lambda d: d['model'].update(max_input_chars_per_word=3)
    ),
    'unigram': lambda: unigram(),
    'unigram with bytes': lambda: unigram(True),
    'unigram, spaces by rule': lambda: unigram(
        normalizer=normalizers.Sequence(
            [normalizers.Nmt(), normalizers.Replace(Regex(' {2,}'), ' ')]
        )
    ),
    'llama 2': llama2,
    'characters without bytes': lambda: llama2(False),
    'unknown ones apart': lambda: llama2(False, fuse_unk=False),
    'no unknown one and no bytes': lambda: llama2(False, unk_token=None),
    'bytes': octets,
    'bytes, not all of them': lambda: octets(alphabet=[]),
    'bytes, prefix space': lambda: octets(pre_tokenizers.ByteLevel()),
    'bytes, no decoder': lambda: octets(decoder=False),
    'an empty normalizer': lambda: octets(normalizer=normalizers.Sequence([])),
    'one normal form in a sequence': lambda: octets(normalizer=normalizers.Sequence([NFC()])),
    'two normal forms': lambda: octets(
        normalizer=normalizers.Sequence([normalizers.NFKD(), NFC()])
    ),
    'lower case': lambda: octets(normalizer=normalizers.Lowercase()),
    'stripped': lambda: octets(normalizer=normalizers.Strip()),
    'accents off': lambda: octets(
        normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    ),
    'replaced': lambda: octets(normalizer=normalizers.Replace('a', 'oo')),
    **{
        f'split, {b}{", inverted" * i}': (lambda b=b, i=i: octets(cut(r'\p{L}+|\d', b, i)))
        for b in ('removed', 'isolated', 'merged_with_previous', 'merged_with_next', 'contiguous')
        for i in (False, True)
    },
    'an inverted split that finds all': lambda: octets(cut(r'\p{L}+|\P{L}+', 'removed', True)),
    'words of Onig': lambda: octets(cut(r'\w+')),
    'hexadecimal in Onig': lambda: octets(cut(r'\h+')),
    'lines in Ruby': lambda: octets(cut('^.')),
    **{
        f'a cut of nothing, {p}': (lambda p=p: octets(cut(p)))
        for p in (r'\s*', r'(?=a)|b', r' ?', r'a|(?!b)', r'(?:\p{L}|(?=\p{N}))')
    },
    'a cut at an empty text': lambda: changed(
        octets(cut('x')),
        lambda d: d['pre_tokenizer']['pretokenizers'][0].update(pattern=dict(String='')),
    ),
    'digits': lambda: octets(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    ),
    'scripts': lambda: octets(
        pre_tokenizers.Sequence([pre_tokenizers.UnicodeScripts(), pre_tokenizers.ByteLevel(False)])
    ),
    'merges out of order': out_of_order,
    'a suffix ends words': lambda: octets(end_of_word_suffix='</w>'),
    'a prefix within words': lambda: octets(continuing_subword_prefix='##'),
    'whole chunks': lambda: octets(ignore_merges=True),
    **{
        f'only a mark, {flag}': (
            lambda flag=flag: added(
                lambda: octets(normalizer=NFC() if flag == 'normalized' else None),
                ('<|e\u0301|>', True, {flag: True}),
            )
        )
        for flag in ('lstrip', 'rstrip', 'single_word', 'normalized')
    },
    'padded to the longest': lambda: padded(octets()),
    'a word is added': lambda: added(octets, ('hello', False, {})),
    'a common word is special': lambda: added(octets, ('hello', True, {})),
    'a mark is added': lambda: added(
        octets, ('<s>', True, {}), ('</s>', True, {}), ('cat', False, {})
    ),
    'a mark of umlauts': lambda: added(octets, ('<é>', True, {})),
    'a mark of another script': lambda: added(octets, ('<｜end▁｜>', True, {})),
    **{
        f'added to {name}, {", ".join(flags)}': (
            lambda make=make, flags=flags: added(
                make, ('cat', False, flags), ('<s>', True, flags), ('hello', True, flags)
            )
        )
        for name, make in dict(
            bytes=octets,
            pieces=pieces,
            words=words,
            llama=llama2,
            forms=lambda: octets(normalizer=NFC()),
            small=lambda: octets(normalizer=normalizers.Lowercase()),
        ).items()
        for flags in (
            dict(lstrip=True),
            dict(rstrip=True),
            dict(single_word=True),
            dict(normalized=True),
            dict(normalized=False),
            dict(lstrip=True, rstrip=True, single_word=True),
        )
    },
}


def padded(t):
    t.enable_padding()
    return t


def some_texts(rnd, n, marks=()):
    "Random texts, many of them of the words that the tokenizers were trained on"
    parts = [
        *SAID.split(' '),
        'hello',
        'cats',
        'concatenate',
        'abc',
        'aba',
        'ab',
        ' ',
        '  ',
        '\n',
        '\t',
        'ü',
        'é',
        'e\u0301',
        'Ａ',
        '１',
        '٣',
        '…',
        '<',
        '>',
        '\u200b',
        'x' * 200,
        *marks,
    ]
    return [
        '',
        ' ',
        'hello hello',
        *(
            random_string(rnd)
            if k % 3 == 0
            else ''.join(
                rnd.choice(parts) + rnd.choice(['', ' ']) for _ in range(rnd.randint(0, 12))
            )
            for k in range(n)
        ),
    ]


def answer(f, *args, **kw):
    "What is answered, or that it is refused; the library panics on what it cannot do"
    try:
        return f(*args, **kw)
    except LabError as e:
        assert '\n' not in str(e) and len(str(e)) < 500
        return LabError
    except Exception:
        return Exception


@pytest.fixture(scope='module', autouse=True)
def quiet():
    "Warnings of the library's trainers are not ours"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


@pytest.mark.parametrize('name', KINDS)
def test_each_kind_has_the_ids_and_texts_of_its_library(name, tmp_path):
    theirs = KINDS[name]()
    theirs.save(str(tmp_path / 'tokenizer.json'))
    theirs = Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
    ours, rnd = load_tokenizer(tmp_path), random.Random(name)
    ours.save(tmp_path / 'again')
    same = [
        ours,
        load_tokenizer(tmp_path / 'again'),
        pickle.loads(pickle.dumps(ours)),
        copy.deepcopy(ours),
    ]
    marks = [*getattr(ours, 'special_tokens', ())]
    said = 0
    for n, text in enumerate(some_texts(rnd, cases(400), marks)):
        allowed = n % 2
        theirs.encode_special_tokens = not allowed
        want = answer(lambda: theirs.encode(text, add_special_tokens=False).ids)
        got = answer(lambda: ours.encode(text, 'all' if allowed else ()))
        if want is Exception:
            assert got is LabError, text
        elif got is LabError:  # typed text that would be special
            special = {*ours.special_tokens.values()}
            assert not allowed and special & {*want}, text
        else:
            assert got == want, text
            assert ours.decode(got) == theirs.decode(want, skip_special_tokens=False), text
            said += len(got)
            if n % 20 == 0 and not allowed:
                for other in same:
                    assert other.encode(text) == got and other.decode(got) == ours.decode(got)
    strict = {'words, no unknown token', 'characters, not cut', 'characters, cut at spaces'}
    assert said > 30 or name in strict  # these refuse nearly all
    assert ours.vocab_size == 1 + max(theirs.get_vocab().values())


# ---- what is refused, and says why


def broken(change, make=octets):
    data = json.loads(make().to_str())
    change(data)
    return data


def processor(kind, **kw):
    return lambda d: d.update(post_processor=dict(type=kind, **kw))


BEHIND = [dict(Sequence=dict(id='A', type_id=0)), dict(SpecialToken=dict(id='</s>', type_id=0))]
MARK = {'</s>': dict(id='</s>', ids=[1], tokens=['</s>'])}
BERT = dict(sep=['b', 1], cls=['a', 0])
CUT = dict(max_length=2, strategy='LongestFirst', stride=0, direction='Right')
FILL = dict(
    strategy='BatchLongest',
    direction='Right',
    pad_to_multiple_of=None,
    pad_id=0,
    pad_type_id=0,
    pad_token='a',
)
REFUSED = {
    'dropout=0.1': lambda d: d['model'].update(dropout=0.1),
    "truncation={'": lambda d: d.update(truncation=CUT),
    "padding={'direction'": lambda d: d.update(padding=FILL | dict(strategy=dict(Fixed=9))),
    "'pad_to_multiple_of': 8": lambda d: d.update(padding=FILL | dict(pad_to_multiple_of=8)),
    "'BertProcessing' puts marks behind": processor('BertProcessing', **BERT),
    "'RobertaProcessing' puts marks behind": processor(
        'RobertaProcessing', **BERT, trim_offsets=True, add_prefix_space=False
    ),
    "'TemplateProcessing' puts marks behind": processor(
        'TemplateProcessing', single=BEHIND, pair=BEHIND, special_tokens=MARK
    ),
    "'Lua' puts marks behind": processor('Lua'),
    'the normalizer': lambda d: d.update(normalizer=dict(type='Lua')),
    'the library of such files cannot read it': lambda d: d.update(pre_tokenizer=dict(type='Lua')),
    'has id 999 in the file': lambda d: d.update(
        added_tokens=[
            dict(
                id=999,
                content='zz',
                special=True,
                normalized=False,
                lstrip=False,
                rstrip=False,
                single_word=False,
            )
        ]
    ),
    'two tokens have one id': lambda d: d['model']['vocab'].update(zz=5),
    'no whole number below': lambda d: d['model']['vocab'].update(zz=-1),
    'max_input_chars_per_word=': lambda d: d['model'].update(
        max_input_chars_per_word=10**9, type='WordPiece'
    ),
    'may make': lambda d: d.update(
        normalizer=dict(
            type='Sequence',
            normalizers=[dict(type='Replace', pattern=dict(String='a'), content='a' * 40)] * 3,
        )
    ),
    'repeats too much': lambda d: d.update(
        pre_tokenizer=dict(
            type='Split', pattern=dict(Regex='((a{99}){99}){99}'), behavior='Isolated', invert=False
        )
    ),
}


@pytest.mark.parametrize('words', REFUSED)
def test_what_no_one_can_follow_exactly_is_refused_by_name(words, tmp_path):
    (tmp_path / 'tokenizer.json').write_text(json.dumps(broken(REFUSED[words])))
    for load in (load_tokenizer, BPETokenizer.load):
        one_line(lambda: load(tmp_path), words, longest=500)


@pytest.mark.parametrize('depth', [30, 100, 130, 400, 900])
def test_rules_within_rules_are_followed_or_are_a_line(depth, tmp_path):
    data = json.loads(octets().to_str())
    inner = '{"type": "Lowercase"}'
    outer = '{"type": "Sequence", "normalizers": ['
    text = json.dumps(data | dict(normalizer='HERE'))
    text = text.replace('"HERE"', outer * depth + inner + ']}' * depth)
    (tmp_path / 'tokenizer.json').write_text(text)
    theirs = answer(lambda: Tokenizer.from_str(text).encode('The CAT').ids)
    ours = answer(lambda: load_tokenizer(tmp_path).encode('The CAT'))
    assert ours == theirs or (theirs, ours) == (Exception, LabError)


def test_a_pattern_that_finds_nothing_is_refused_where_it_is_ours():
    for pattern in (r'\s*', '', 'a?'):
        with pytest.raises(LabError, match='finds nothing, too'):
            BPETokenizer(dict(enumerate(bytes([b]) for b in range(256))), [], patterns=[pattern])


def test_a_pattern_that_never_ends_is_a_line(tmp_path):
    octets(cut('(a|aa)+$')).save(str(tmp_path / 'tokenizer.json'))
    with pytest.raises(LabError, match='cannot write this text'):
        load_tokenizer(tmp_path).encode('a' * 60 + 'b')


def test_ours_and_the_common_kinds_are_read_by_ourselves(tmp_path):
    "The library is asked only for what is not this book's"
    ours = BPETokenizer.train(SAID, 300, ['<s>', '</s>'])
    other = BPETokenizer(
        ours.vocab, ours.merges, ours.special_tokens, [r'\p{N}{1,3}', r' ?\p{L}+'], form='NFC'
    )
    for n, tok in enumerate((ours, other, CharTokenizer('abc\n'))):
        for begin in (None, [], [0], [1, 0]):
            tok.begin = begin
            tok.save(tmp_path / f'{n}')
            back = load_tokenizer(tmp_path / f'{n}')
            assert (
                type(back) is type(tok)
                and back.begin == begin
                and back.encode('abc') == tok.encode('abc')
            )
            theirs = Tokenizer.from_file(str(tmp_path / f'{n}' / 'tokenizer.json'))
            assert theirs.encode('cab').ids == (begin or []) + tok.encode('cab')
    octets().save(str(tmp_path / 'tokenizer.json'))
    assert type(load_tokenizer(tmp_path)) is BPETokenizer
    with pytest.raises(LabError, match='not read alike by all libraries'):
        BPETokenizer(ours.vocab, ours.merges, ours.special_tokens, [r'\h+']).save(tmp_path / 'h')


def test_bert_is_no_bpe_and_unknown_ids_are_named(tmp_path):
    pieces().save(str(tmp_path / 'tokenizer.json'))
    with pytest.raises(LabError, match='holds WordPiece, not BPE: use load_tokenizer'):
        BPETokenizer.load(tmp_path)
    tok = load_tokenizer(tmp_path)
    for wrong in ([tok.vocab_size], [-1], ['a'], [None]):
        with pytest.raises(LabError, match='is not in this vocabulary'):
            tok.decode(wrong)
    with pytest.raises(LabError, match='half a character'):
        tok.encode('a \ud83c')
    with pytest.raises(LabError, match="'<x>' is no special token here"):
        tok.encode('a', '<x>')
    with pytest.raises(
        LabError, match=r"holds '\[MASK\]', which this tokenizer takes for a special token"
    ):
        added(words, ('[MASK]', True, {})).save(str(tmp_path / 'tokenizer.json'))
        data = json.loads((tmp_path / 'tokenizer.json').read_text())
        data['model']['vocab']['[MASK]'] = data['added_tokens'][-1]['id']
        data['pre_tokenizer'] = dict(type='WhitespaceSplit')
        tokenizer_from_json(data).encode('The [MASK] sat')


def test_the_later_of_two_equal_merges_counts(tmp_path):
    "As in the library, which writes it once when it saves"
    data = json.loads(merged([('a', 'b'), ('b', 'c')]).to_str())
    for more, want in (([], ['ab', 'c']), ([['a', 'b']], ['a', 'bc']), (['a b'], None)):
        text = json.dumps(
            data | dict(model=data['model'] | dict(merges=data['model']['merges'] + more))
        )
        (tmp_path / 'tokenizer.json').write_text(text)
        theirs = answer(lambda: Tokenizer.from_str(text).encode('abc').ids)
        ours = answer(lambda: load_tokenizer(tmp_path).encode('abc'))
        assert ours == theirs or (theirs, ours) == (Exception, LabError)
        if want:
            assert [load_tokenizer(tmp_path).decode([n]) for n in ours] == want


def test_special_tokens_are_allowed_by_name():
    tok = tokenizer_from_json(
        json.loads(
            added(
                lambda: octets(pre_tokenizers.ByteLevel()), ('<a>', True, {}), ('<b>', True, {})
            ).to_str()
        )
    )
    a, b = tok.special_tokens['<a>'], tok.special_tokens['<b>']
    assert not {a, b} & {*tok.encode('x<a>y<b>')}
    for names, found in (('<a>', {a}), (['<b>'], {b}), ('all', {a, b}), ((), set())):
        assert (
            {a, b} & {*tok.encode('x<a>y<b>', names)}
            == found
            == {a, b} & {*tok.encode_batch(['x<a>y<b>'], names)[0]}
        )
        assert [*tok.encode_iterable(['x<', 'a>y', '<b>'], names)] == tok.encode('x<a>y<b>', names)


@pytest.mark.parametrize(
    'name', ['llama 2', 'unigram with bytes', 'bytes, prefix space', 'wordpiece', 'unigram']
)
def test_text_that_comes_token_by_token_is_the_text(name):
    tok = tokenizer_from_json(json.loads(KINDS[name]().to_str()))
    rnd = random.Random(name)
    for text in ['Où est ☕? 😀 «ça va»', 'ééé 家家', *some_texts(rnd, 30)]:
        ids = answer(tok.encode, text)
        if ids is LabError:
            continue  # a mark was typed
        for at in {0, min(1, len(ids)), min(5, len(ids))}:
            decoder = DecodeStream(tok, ids[:at])
            whole = tok.decode(ids)
            if not whole.endswith('\ufffd'):
                assert tok.decode(ids[:at]) + ''.join(
                    map(decoder, ids[at:])
                ) == whole or '\ufffd' in tok.decode(ids[:at])


# ---- models that leave, and the same text there

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def mine(*special, **kw):
    tok = BPETokenizer.train(SAID * 3, 300, special)
    return BPETokenizer(tok.vocab, tok.merges, special, **kw)


def foreign(t):
    return tokenizer_from_json(json.loads(t.to_str()))


TOKENIZERS = {
    'chars': lambda: CharTokenizer.train(SAID + '$'),
    'chars without a new line': lambda: CharTokenizer('abc $'),
    'bytes': lambda: BPETokenizer(dict(enumerate(bytes([b]) for b in range(256))), []),
    'bpe': mine,
    'bpe with an end': lambda: mine('<|endoftext|>'),
    'bpe with both marks': lambda: mine('<s>', '</s>', '<pad>'),
    'bpe in forms': lambda: mine(
        '<|begin_of_text|>', '<|end_of_text|>', patterns=[r'\p{N}', r' ?\p{L}+|\s+'], form='NFC'
    ),
    'llama 2': lambda: foreign(llama2()),
    'another with marks': lambda: foreign(
        added(octets, ('<s>', True, {}), ('</s>', True, {}), ('cat', False, {}))
    ),
}


def loud(model, seed):
    "First weights that say something, so that the likeliest token is far ahead"
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=rng(seed, n)) * 0.3 + (p.dim() == 1))
    return model.eval()


def gpt(V):
    return GPTConfig(vocab_size=V, d_model=32, n_heads=4, n_layers=2, max_len=64)


def lama(V):
    return llama(
        vocab_size=V, d_model=32, n_heads=4, n_layers=2, max_len=64, attn=part(GQA, n_kv_heads=2)
    )


def left(folder):
    "Their model and tokenizer"
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder
    ).eval(), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize('name,make', crossed(TOKENIZERS, [gpt, lama]))
def test_the_same_text_goes_on_the_same_way_in_transformers(name, make, tmp_path):
    tok = TOKENIZERS[name]()
    model = loud(MiniGPT(make(tok.vocab_size)), 3)
    opened = from_hf(to_hf(tmp_path / 'x', model, tok))
    theirs, cut = left(tmp_path / 'x')
    texts = [
        'ab c',
        'The cat sat',
        'caba',
        '\nabc',
        'Hello <s>x</s>, hello',
        'it is <|endoftext|> ÿ 家 é',
        'a  b\n\n',
        'ÿĊĠ',
    ]
    for t in some_texts(random.Random(name), 60):
        texts.append(t[:60])
    said, kept = [], 0
    for text in texts:
        try:
            ids = prompt_ids(model, tok, text)[0].tolist()
        except LabError:
            continue
        if not text or len(ids) > 40:
            continue
        kept += 1
        assert (
            cut(text).input_ids
            == ids
            == prompt_ids(opened.model, opened.tokenizer, text)[0].tolist()
        ), text
        assert opened.tokenizer.decode(ids) == tok.decode(ids)
        if len(said) < 5:
            said.append(text)
    assert kept > 2 and cut.model_max_length == theirs.config.max_position_embeddings == 64
    assert (
        cut.pad_token_id is not None
        and cut.padding_side == 'left'
        and cut.pad_token_id < tok.vocab_size
    )
    # in a batch, filled at the left; ended where ours end
    batch = cut(said, return_tensors='pt', padding=True)
    assert (
        batch.attention_mask.sum(1).tolist() == [len(cut(t).input_ids) for t in said]
        and len({*batch.attention_mask.sum(1).tolist()}) > 1
    )
    with torch.no_grad():
        out = theirs.generate(**batch, max_new_tokens=20, do_sample=False)[
            :, batch.input_ids.shape[1] :
        ].tolist()
    for text, row in zip(said, out):
        ours = complete(with_kv_cache(model), tok, text, 20, temperature=0)[0][0]
        assert row[: len(ours.ids)] == ours.ids and (
            len(ours.ids) == 20 or row[len(ours.ids)] == tok.eos_id
        )
        assert (
            sample(model, tok, text, 20, temperature=0)
            == sample(opened.model, opened.tokenizer, text, 20, temperature=0)
            == text + ours.text
        )
        with torch.no_grad():
            alone = theirs.generate(
                **cut(text, return_tensors='pt'), max_new_tokens=20, do_sample=False
            )[0].tolist()
        assert alone[len(cut(text).input_ids) :][: len(ours.ids)] == ours.ids


def test_a_second_journey_is_the_same_folder(tmp_path):
    for n, make in enumerate(TOKENIZERS.values()):
        tok = make()
        opened = from_hf(to_hf(tmp_path / f'{n}a', loud(MiniGPT(lama(tok.vocab_size)), n), tok))
        to_hf(tmp_path / f'{n}b', opened.model, opened.tokenizer)
        for f in (tmp_path / f'{n}a').iterdir():
            if f.suffix == '.json' and f.name != 'llm_lab_files.json':
                assert f.read_bytes() == (tmp_path / f'{n}b' / f.name).read_bytes(), f.name


def test_a_folder_of_the_world_begins_as_its_file_says(tmp_path):
    model = MiniGPT(gpt(310))
    to_hf(tmp_path / 'x', model)
    (tmp_path / 'x' / 'llm_lab_files.json').unlink()
    t = added(octets, ('<s>', True, {}), ('</s>', True, {}))
    for post, want in (
        (None, []),
        (processors.ByteLevel(), []),
        (
            processors.TemplateProcessing('<s> $A', special_tokens=[('<s>', t.token_to_id('<s>'))]),
            ['<s>'],
        ),
    ):
        if post:
            t.post_processor = post
        t.save(str(tmp_path / 'x' / 'tokenizer.json'))
        opened = from_hf(tmp_path / 'x')
        theirs = Tokenizer.from_file(str(tmp_path / 'x' / 'tokenizer.json'))
        for text in ('hello', '\nhello'):
            assert (
                prompt_ids(opened.model, opened.tokenizer, text)[0].tolist()
                == theirs.encode(text).ids
            )
            assert theirs.encode(text).tokens[: len(want)] == want
        # something must be there
        assert prompt_ids(opened.model, opened.tokenizer, '')[0].tolist() == [t.token_to_id('<s>')]


def test_a_model_without_a_tokenizer_says_so(tmp_path):
    to_hf(tmp_path / 'x', MiniGPT(gpt(70)))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        opened = from_hf(tmp_path / 'x')  # there is none to follow
    assert opened.tokenizer is None
    for f in (sample, complete):
        with pytest.raises(LabError, match='this model has no tokenizer, so it cannot read'):
            f(opened.model, None, 'a')
    octets().save(str(tmp_path / 'x' / 'tokenizer.json'))
    with pytest.warns(UserWarning, match='has 300 ids, the model 70: it is another'):
        assert from_hf(tmp_path / 'x').tokenizer is None
    (tmp_path / 'x' / 'tokenizer.json').rename(tmp_path / 'x' / 'vocab.json')
    with pytest.warns(UserWarning, match='vocab.json alone is not read'):
        assert from_hf(tmp_path / 'x').tokenizer is None
    with pytest.raises(LabError, match='the tokenizer has 256 ids, the model 70'):
        to_hf(tmp_path / 'y', opened.model, TOKENIZERS['bytes']())
    assert not (tmp_path / 'y').exists()


# ---- an index of any shape

SHARDS = 'a.safetensors', 'b.safetensors'


@pytest.fixture(scope='module')
def sharded(tmp_path_factory):
    "A model in two files and an index"
    folder = tmp_path_factory.mktemp('shards') / 'x'
    to_hf(folder, MiniGPT(gpt(20)))
    state = load_file(folder / 'model.safetensors')
    (folder / 'model.safetensors').unlink()
    place = {n: SHARDS[k % 2] for k, n in enumerate(sorted(state))}
    for f in SHARDS:
        save_file({n: w for n, w in state.items() if place[n] == f}, folder / f)
    return folder, place, state


def shapes(place):
    "Indexes of wrong shapes, and words of their refusal"
    some, other = [*place][:2]
    yield from (
        (x, 'tells no weight_map')
        for x in (
            [],
            5,
            None,
            'x',
            {},
            [place],
            dict(metadata={}),
            dict(weight_map=None),
            dict(weight_map=[]),
            dict(weight_map={}),
            dict(weight_map='x'),
            dict(weight_map=[some]),
        )
    )
    for odd in (
        None,
        5,
        [],
        {},
        True,
        1.5,
        '',
        '.',
        '..',
        'a',
        'a.bin',
        'pytorch_model.bin',
        'x' * 300 + '.safetensors',
        'nul\0.safetensors',
    ):
        yield dict(weight_map=place | {some: odd}), 'which is no .safetensors file'
    for out in (
        '../a.safetensors',
        '/etc/a.safetensors',
        'x/a.safetensors',
        '..\\a.safetensors',
        './a.safetensors',
    ):
        yield dict(weight_map=place | {some: out}), 'points out of its folder'
    yield (
        dict(weight_map=place | {some: 'none.safetensors'}),
        'none.safetensors cannot be read (FileNotFoundError)',
    )
    yield (
        dict(weight_map=dict.fromkeys(place, 'none.safetensors')),
        'none.safetensors cannot be read (FileNotFoundError)',
    )
    yield dict(weight_map=place | {some: place[other]}), f'which the index places in {place[other]}'
    yield dict(weight_map=place | {'more': SHARDS[0]}), "lacks 'more' of the index"
    yield (
        dict(weight_map={n: f for n, f in place.items() if n != some}),
        'which the index does not name',
    )
    yield dict(weight_map={n: f for n, f in place.items() if f == SHARDS[0]}), ' lacks '
    yield (
        dict(weight_map=place | {f'{k}': f'{k}.safetensors' for k in range(1001)}),
        'more than any model has',
    )


def test_an_index_of_any_shape_is_read_or_is_one_line(sharded, tmp_path):
    folder, place, state = sharded
    shutil.copytree(folder, tmp_path / 'x')
    index = tmp_path / 'x' / 'model.safetensors.index.json'

    def says(data, words):
        index.write_text(data if isinstance(data, str) else json.dumps(data))
        one_line(lambda: from_hf(tmp_path / 'x'), words, longest=600)

    index.write_text(json.dumps(dict(metadata=dict(total_size=1), weight_map=place)))
    for n, w in from_hf(tmp_path / 'x').model.state_dict().items():
        assert n and torch.isfinite(w).all()
    for data, words in shapes(place):
        says(json.dumps(data), words)
    right = json.dumps(dict(weight_map=place))
    for text in ('', '{', '\x00', right[:-3], '[' * 5000):
        says(text, 'is not JSON')
    some = next(iter(place))
    says(
        right.replace('{"weight_map"', '{"weight_map": {}, "weight_map"'), "says 'weight_map' twice"
    )
    says(
        right.replace('"weight_map": {', f'"weight_map": {{"{some}": "b.safetensors", '),
        f"says '{some}' twice",
    )
    index.write_text(right)
    mine = {n: w for n, w in state.items() if place[n] == SHARDS[0]}
    # a tensor in two files
    save_file(
        mine | {next(n for n in place if place[n] == SHARDS[1]): torch.ones(2)},
        tmp_path / 'x' / SHARDS[0],
    )
    says(right, 'which the index places in b.safetensors')
    (tmp_path / 'x' / SHARDS[0]).unlink()
    (tmp_path / 'x' / SHARDS[0]).mkdir()
    says(right, 'is no plain file')
    (tmp_path / 'x' / SHARDS[0]).rmdir()
    (tmp_path / 'x' / SHARDS[0]).symlink_to(folder / SHARDS[0])
    says(right, 'is a link out of its folder')


def test_random_indexes_are_read_or_are_one_line(sharded, tmp_path):
    folder, place, _ = sharded
    shutil.copytree(folder, tmp_path / 'x')
    rnd = random.Random(0)
    odd = [
        None,
        0,
        -1,
        1.5,
        True,
        [],
        {},
        'x',
        '',
        [[]],
        {'a': 1},
        '../x',
        'a.safetensors',
        'b.safetensors',
    ]
    for _ in range(cases(500, 50)):
        data = dict(weight_map=dict(place))
        for _ in range(rnd.randint(1, 3)):
            at = rnd.choice([data] + [x for x in data.values() if isinstance(x, dict)])
            at[rnd.choice([*at, 'weight_map', 'more'])] = copy.deepcopy(rnd.choice(odd))
        if rnd.random() < 0.2:
            data = copy.deepcopy(rnd.choice(odd))
        (tmp_path / 'x' / 'model.safetensors.index.json').write_text(json.dumps(data))
        try:
            from_hf(tmp_path / 'x')
        except LabError as e:
            assert '\n' not in str(e)
        else:
            assert data['weight_map'] == place


def test_a_tokenizer_of_another_kind_is_packed_and_scored(tmp_path):
    "In files of tokens, in a package, in evaluation"
    from llm_lab.evaluation import evaluate
    from llm_lab.packing import PackedTokens, pack
    from llm_lab.package import load, save
    from llm_lab.tales import tiny_tales

    tales = tiny_tales(20)
    tok = foreign(llama2())
    packed = pack(tales, tok, tmp_path / 'packed')
    val = PackedTokens(packed.folder, 'val')
    first = tok.encode(tales.documents('val')[0])
    assert val.ids[: len(first)].tolist() == first and val.tokenizer.kind == 'foreign'
    model = MiniGPT(gpt(tok.vocab_size)).eval()
    back = load(save(tmp_path / 'm', model, tok))
    assert back.tokenizer.kind == 'foreign'
    for t in ('The cat', '家'):
        assert back.tokenizer.encode(t) == tok.encode(t)
    one, two = (evaluate(m, t, tales, 'val') for m, t in ((model, tok), back[:2]))
    assert one.loss == two.loss and 3 < one.loss < 8
