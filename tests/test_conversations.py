"""A conversation with a cache: equal to one that is read anew, at every turn."""

import functools
import json
import random
import re
import warnings
from functools import partial

import pytest
import torch
from answers import conversations as answers
from helpers import cells_of, near, run_cell
from test_chat import CHATML, GEMMA, QWEN, byte_tokenizer, tiny

from llm_lab import conversations as module
from llm_lab.bpe import BPETokenizer
from llm_lab.conversations import Chat, end_of_turn
from llm_lab.core import LabError, check
from llm_lab.gpt import MiniGPT
from llm_lab.kv_cache import KVCache, sliding_window, with_kv_cache
from llm_lab.parts import part
from llm_lab.self_attention import Attention
from llm_lab.sparse import alternate
from llm_lab.templates import CHAT, ChatTemplate, with_marks

# ---- a conversation


SOURCES = dict(CHAT=CHAT, CHATML=CHATML, GEMMA=GEMMA, QWEN=QWEN)


@pytest.mark.parametrize('cache', [True, False])
@pytest.mark.parametrize('name', SOURCES)
def test_turns_with_a_cache_are_those_that_are_read_anew(name, cache):
    tokenizer = byte_tokenizer()
    model = tiny(tokenizer, max_len=600)
    if cache:
        model = with_kv_cache(model)
    template = ChatTemplate(SOURCES[name], tokenizer)
    chat = Chat(model, tokenizer, template, system=None if name == 'GEMMA' else 'Say ab.')
    for text in ('one', 'two </think>', 'a red ball', '<|im_end|>', 'five'):
        answer = ''.join(chat.send(text, max_new_tokens=12, temperature=0))
        again = Chat(model, tokenizer, template)
        again.messages = chat.messages[:-2]
        assert ''.join(again.send(text, max_new_tokens=12, temperature=0)) == answer
        assert chat.messages[-1] == dict(role='assistant', content=answer)
        ids = chat.prompt()
        known = len(chat.reader.ids[0])
        near(chat.read(ids), model(torch.tensor([ids]))[:, -1], 1e-5)
        if cache and name == 'CHAT':
            assert known > 20 and chat.reader.cache  # and it was not read anew


def test_a_cache_of_what_is_near_reads_all_anew_after_undo():
    "It has thrown away what stood before, so it cannot forget the last tokens"
    tokenizer = byte_tokenizer()
    attn = part(Attention, mask=part(sliding_window, size=8))
    model = tiny(tokenizer, attn=attn)
    chat = Chat(with_kv_cache(model), tokenizer)
    for text in ('one', 'two'):
        ''.join(chat.send(text, 12, temperature=0))
        ids = chat.prompt()
        near(chat.read(ids), model(torch.tensor([ids]))[:, -1], 1e-5)
    assert not any(type(cache) is KVCache for cache in chat.reader.cache.values())
    chat.undo()
    answer = ''.join(chat.send('and three', 12, temperature=0))
    again = Chat(model, tokenizer)
    again.messages = chat.messages[:-2]
    assert ''.join(again.send('and three', 12, temperature=0)) == answer


def test_what_was_read_is_not_read_again(monkeypatch):
    tokenizer = byte_tokenizer()
    model = with_kv_cache(tiny(tokenizer, max_len=900))
    chat = Chat(model, tokenizer, system='Long ' * 40)
    ''.join(chat.send('one', 5, temperature=0))
    read = []
    features = type(model).features
    monkeypatch.setattr(
        type(model),
        'features',
        lambda self, ids, *a, **k: read.append(ids.shape[1]) or features(self, ids, *a, **k),
    )
    ''.join(chat.send('two', 5, temperature=0))
    assert sum(read) < 30  # the system's 200 are in the cache


def test_undo_reset_save(tmp_path):
    tokenizer = byte_tokenizer()
    chat = Chat(with_kv_cache(tiny(tokenizer)), tokenizer, system='S')
    first = ''.join(chat.send('one', 5, temperature=0))
    ''.join(chat.send('two', 5, temperature=0))
    assert chat.undo() == 'two' and len(chat.messages) == 3
    second = ''.join(chat.send('two', 5, temperature=0))
    chat.save(tmp_path / 'h.jsonl')
    chat.reset()
    assert chat.messages == [dict(role='system', content='S')] and chat.undo() is None
    assert ''.join(chat.send('one', 5, temperature=0)) == first
    assert ''.join(chat.send('two', 5, temperature=0)) == second
    chat.save(tmp_path / 'h.jsonl')
    records = [json.loads(line) for line in (tmp_path / 'h.jsonl').read_text().splitlines()]
    assert [len(x['messages']) for x in records] == [5, 5] and records[1][
        'messages'
    ] == chat.messages


def test_the_oldest_turns_leave_and_the_system_stays():
    tokenizer = byte_tokenizer()
    chat = Chat(with_kv_cache(tiny(tokenizer, max_len=96)), tokenizer, system='System')
    with pytest.warns(UserWarning, match='oldest turns are left out') as warned:
        for n in range(6):
            ''.join(chat.send(f'question {n}', 12, temperature=0))
    assert len(warned) == 1 and len(chat.messages) == 13
    assert warned[0].filename == __file__  # it points at whoever iterates
    read = chat.visible_messages()
    assert read[0]['role'] == 'system' and read[1]['role'] == 'user' and len(read) < 13
    with pytest.raises(LabError, match='send a shorter one'):
        next(chat.send('x' * 200))
    assert len(chat.messages) == 13


def test_a_message_that_is_refused_crowds_out_no_other():
    tokenizer = byte_tokenizer()
    chat = Chat(tiny(tokenizer, max_len=96), tokenizer)
    for n in range(2):
        ''.join(chat.send(f'question {n}', 4, temperature=0))
    assert chat.left_out == 0
    before = chat.prompt()
    with pytest.raises(LabError, match='send a shorter one'):
        next(chat.send('x' * 200))
    assert chat.left_out == 0 and chat.prompt() == before


@pytest.mark.parametrize('longest,room', [(1, 16), (8, 16), (20, 40), (32, 64), (90, 64)])
def test_old_turns_leave_as_much_as_the_longest_answer_so_far_lets_expect(longest, room):
    "Neither more nor less of them: with one turn more there would not be `room`, of 256 ids"
    tokenizer = byte_tokenizer()
    chat = Chat(tiny(tokenizer, max_len=256), tokenizer)
    turns = []
    for n in range(40):
        question = dict(role='user', content=f'{n}?')
        turns += [question, dict(role='assistant', content='b' * (longest if n == 20 else 1))]
    chat.messages = turns
    pieces = chat.send('and?', temperature=0)
    with pytest.warns(UserWarning, match='oldest turns are left out'):
        next(pieces, None)
    assert chat.left_out and len(chat.prompt()) + room <= 256
    chat.left_out -= 2
    assert len(chat.prompt()) + room > 256
    assert chat._answer_room(5) == 5  # no more than may be written
    chat.messages.append(dict(role='assistant', content=None))  # as where a tool is called
    assert chat._answer_room(500) == room


def test_a_broken_off_answer_leaves_a_conversation_that_goes_on(monkeypatch):
    tokenizer = byte_tokenizer()
    chat = Chat(with_kv_cache(tiny(tokenizer)), tokenizer)
    pieces = chat.send('one', 20, temperature=0)
    begun = next(pieces)
    pieces.close()
    assert chat.messages[-1] == dict(role='assistant', content=begun)
    features = type(chat.model).features
    calls = []

    def interrupted(self, *a, **k):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return features(self, *a, **k)

    monkeypatch.setattr(type(chat.model), 'features', interrupted)
    with pytest.raises(KeyboardInterrupt):
        ''.join(chat.send('two', 20, temperature=0))
    monkeypatch.undo()
    assert len(chat.messages) == 4 and chat.messages[-1]['role'] == 'assistant'
    answer = ''.join(chat.send('three', 10, temperature=0))
    again = Chat(chat.model, tokenizer)
    again.messages = chat.messages[:-2]
    assert ''.join(again.send('three', 10, temperature=0)) == answer


def test_an_answer_ends_at_the_end_mark():
    tokenizer = byte_tokenizer()
    model = tiny(tokenizer)
    end = tokenizer.special_tokens['<|end|>']
    model.lm_head.weight.data[end] += 0  # a model that says only this
    chat = Chat(model, tokenizer)
    chat.read = lambda ids, spare=0: torch.nn.functional.one_hot(
        torch.tensor([end]), tokenizer.vocab_size
    ).float()
    chat.reader = type('Reader', (), dict(ids=torch.zeros(1, 1, dtype=torch.int64)))
    assert ''.join(chat.send('one', temperature=0)) == ''
    assert chat.messages[-1] == dict(role='assistant', content='')


def count_tokens(model, action):
    "How many tokens go through the model while `action` runs"
    passed = []
    with model.tok.register_forward_hook(lambda tok, args, x: passed.append(args[0].numel())):
        action()
    return sum(passed)


def test_that_turns_are_left_out_is_said_once_in_a_conversation():
    tokenizer = byte_tokenizer()
    chat = Chat(with_kv_cache(tiny(tokenizer, max_len=96)), tokenizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for n in range(6):
            ''.join(chat.send(f'question {n}', 12, temperature=0))
        for _ in range(3):
            chat.undo()
            ''.join(chat.send('and this?', 12, temperature=0))
        assert chat.left_out and len(caught) == 1
        chat.reset()  # another conversation
        for n in range(6):
            ''.join(chat.send(f'question {n}', 12, temperature=0))
    assert len(caught) == 2


def windowed(size=8):
    return part(Attention, mask=part(sliding_window, size=size))


@pytest.mark.parametrize('kind', ['all keys', 'window', 'both'])
def test_a_cache_that_grows_reads_nothing_again(kind):
    tokenizer = byte_tokenizer()
    attn = {'all keys': {}, 'window': dict(attn=windowed())}.get(kind)
    if attn is None:
        attn = dict(attn=part(alternate, of=(part(Attention), windowed())))
    model = tiny(tokenizer, max_len=2000, **attn)
    cached = with_kv_cache(model)
    chat = Chat(cached, tokenizer)
    lengths = set()

    def talk():
        for n in range(12):
            # no special token: only then is what was written encoded to the same ids
            chat.messages += [
                dict(role='user', content=f'question {n}'),
                dict(role='assistant', content='an answer'),
            ]
            chat.read(chat.prompt()[:-1], spare=5)
            lengths.add(chat.reader.length)

    computed = count_tokens(cached, talk)
    ids = chat.prompt()
    assert len(lengths) > 2  # it has grown, and the last of each prompt is the next one's
    assert computed == chat.reader.ids.shape[1] == len(ids) - 1
    near(chat.read(ids), model(torch.tensor([ids]))[:, -1], 1e-5)


class Stubborn(KVCache):
    "A cache of the reader's own: nobody knows what it may forget"


def test_a_cache_of_an_unknown_kind_reads_all_anew(monkeypatch):
    from llm_lab import kv_cache

    monkeypatch.setattr(kv_cache, 'KVCache', Stubborn)
    tokenizer = byte_tokenizer()
    model = tiny(tokenizer, max_len=600)
    cached = with_kv_cache(model)
    chat = Chat(cached, tokenizer)
    ''.join(chat.send('one', 5, temperature=0))
    chat.undo()
    chat.messages.append(dict(role='user', content='two'))
    ids = chat.prompt()
    assert count_tokens(cached, lambda: chat.read(ids, 5)) == len(ids)  # nothing is taken back
    longer = ids + [5] * 90
    assert count_tokens(cached, lambda: chat.read(longer, 5)) == len(longer)  # nor copied
    near(chat.read(longer), model(torch.tensor([longer]))[:, -1], 1e-5)


@pytest.mark.parametrize('max_len,room', [(64, 16), (65, 16), (7, 1), (400, 16)])
def test_the_room_for_an_answer_is_a_whole_number(max_len, room):
    tokenizer = byte_tokenizer()
    found = Chat(tiny(tokenizer, max_len=max_len), tokenizer)._answer_room(500)
    assert type(found) is int and found == room


def test_the_room_for_an_answer_of_a_model_without_an_end():
    tokenizer = byte_tokenizer()
    model = with_kv_cache(tiny(tokenizer, attn=windowed()))
    chat = Chat(model, tokenizer)
    chat.messages = [dict(role='assistant', content='b' * 300)]
    assert chat._answer_room(500) == 500 and chat._answer_room(700) == 600


def stops_at(chat, id):
    "From now on, the model draws this id"
    head = chat.model.lm_head
    head.forward = lambda x: (
        type(head).forward(head, x).scatter(-1, torch.full((*x.shape[:-1], 1), id), 1e4)
    )


def test_whoever_asks_can_tell_an_end_from_a_cut():
    tokenizer = byte_tokenizer()
    chat = Chat(with_kv_cache(tiny(tokenizer, max_len=64)), tokenizer)
    assert chat.finish_reason is None
    stops_at(chat, tokenizer.encode('b')[0])
    assert ''.join(chat.send('one', 5)) == 'bbbbb' and chat.finish_reason == 'length'
    room = 64 - len(chat.prompt()) - 5  # `<|user|>two<|end|>`, of five tokens
    assert len(''.join(chat.send('two'))) == room and chat.finish_reason == 'length'
    chat.reset()
    assert chat.finish_reason is None
    pieces = chat.send('one')
    next(pieces)
    pieces.close()
    assert chat.finish_reason is None
    stops_at(chat, tokenizer.special_tokens['<|end|>'])
    assert ''.join(chat.send('one')) == '' and chat.finish_reason == 'stop'


def test_ctrl_c_before_the_first_piece_crowds_out_no_turn(monkeypatch):
    tokenizer = byte_tokenizer()
    chat = Chat(with_kv_cache(tiny(tokenizer, max_len=96)), tokenizer)
    for n in range(2):
        ''.join(chat.send(f'question {n}', 4, temperature=0))
    before = [*chat.messages]

    def interrupted(self, *a, **k):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(chat.model), 'features', interrupted)
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match='left out'):
        next(chat.send('x' * 50))
    monkeypatch.undo()
    assert chat.messages == before and chat.left_out == 0


@pytest.mark.parametrize('system', [None, 'S'])
def test_a_greeting_leaves_with_the_first_turn(system):
    tokenizer = byte_tokenizer()
    chat = Chat(with_kv_cache(tiny(tokenizer, max_len=96)), tokenizer, system=system)
    first = len(chat.messages)
    chat.messages.append(dict(role='assistant', content='hello'))
    with pytest.warns(UserWarning, match='oldest turns are left out'):
        for n in range(7):
            ''.join(chat.send(f'question {n}', 4, temperature=0))
            roles = [message['role'] for message in chat.visible_messages()[first:]]
            if chat.left_out:  # whole turns
                assert chat.left_out % 2 == 1 and roles == ['user', 'assistant'] * (len(roles) // 2)


def test_a_restored_conversation_goes_on_as_the_first_one_would(tmp_path):
    tokenizer = byte_tokenizer()
    model = with_kv_cache(tiny(tokenizer, max_len=96))
    chat = Chat(model, tokenizer, system='S')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for n in range(6):
            ''.join(chat.send(f'question {n}', 12, temperature=0))
        chat.save(tmp_path / 'h.jsonl')
        again = Chat(model, tokenizer, system='another')
        again.restore(json.loads((tmp_path / 'h.jsonl').read_text())['messages'])
        assert again.messages == chat.messages and again.messages is not chat.messages
        for question in ('one', 'two'):
            want = ''.join(chat.send(question, 12, temperature=0))
            assert ''.join(again.send(question, 12, temperature=0)) == want
    assert again.left_out == chat.left_out > 0
    again.reset()
    assert again.messages == [dict(role='system', content='S')]
    again.restore([dict(role='user', content='one'), dict(role='assistant', content='two')])
    assert again.system is None
    with pytest.raises(LabError, match='no list of messages'):
        again.restore([])


def test_an_answer_of_other_tokens_than_its_text_has_is_read_again():
    "What was drawn need not be what the tokenizer makes of the text: the logits are right anyway"
    tokenizer = byte_tokenizer()
    model = tiny(tokenizer)
    cached = with_kv_cache(model)
    chat = Chat(cached, tokenizer)
    chat.messages = [dict(role='user', content='one')]
    ids = chat.prompt()
    drawn = [tokenizer.encode('a')[0], tokenizer.encode('n')[0]]
    chat.read(ids + drawn)
    chat.messages += [dict(role='assistant', content='an'), dict(role='user', content='two')]
    longer = chat.prompt()
    assert len(tokenizer.encode('an')) == 1
    computed = count_tokens(cached, lambda: near(chat.read(longer), anew(model, longer), 1e-5))
    assert computed == len(longer) - len(ids)


def anew(model, ids):
    return model(torch.tensor([ids]))[:, -1]


def test_from_the_second_layer_on_a_key_depends_on_what_stood_before():
    "So a token after a change is read again, even where its position is the old one"
    model = with_kv_cache(tiny(byte_tokenizer()))
    keys = []
    for ids in ([5, 6, 7], [9, 6, 7]):
        caches = model.cache(1, 3)
        model(torch.tensor([ids]), cache=caches)
        keys.append([cache.k[:, :, 1:3] for cache in caches.values()])
    (first, second), (first_of_other, second_of_other) = keys
    near(first, first_of_other, 1e-6)
    assert (second - second_of_other).abs().max() > 1e-3


def test_an_answer_ends_at_the_longest_mark_after_the_last_probe():
    tokenizer = byte_tokenizer(marks=('<end>', '<end>>'))
    after = "{% for m in messages %}{{ 'Yes' + m['content'] + ' \\n' + MARK }}{% endfor %}"
    for mark, want in (('<end>', '<end>'), ('<end>>', '<end>>'), ('<other>', None)):
        template = ChatTemplate(after.replace('MARK', repr(mark)), tokenizer)
        ends = {tokenizer.eos_id}
        if want:
            ends.add(tokenizer.special_tokens[want])
        assert {*end_of_turn(template, tokenizer)} == ends
    refuses = ChatTemplate("{{ raise_exception('three, please') }}", tokenizer)
    assert end_of_turn(refuses, tokenizer) == [tokenizer.eos_id]


def test_a_model_of_blanks_is_refused():
    from llm_lab.diffusion import diffusion_llama

    tokenizer = byte_tokenizer()
    model = MiniGPT(diffusion_llama(tokenizer.vocab_size, d_model=16, n_layers=1, n_heads=2))
    with pytest.raises(LabError, match='is not read token by token'):
        Chat(model, tokenizer)


# ---- the exercises of the lesson


lesson = functools.partial(cells_of, '64_conversations')
run = functools.partial(run_cell, '64_conversations')


@functools.cache
def small_world():
    "The chapter's own tokenizer, and a model that has learned nothing: ids are all that counts"
    space = dict(vars(module), random=random, BPETokenizer=BPETokenizer, with_marks=with_marks)
    run('NAMES =', space)
    model = tiny(space['tokenizer'])
    return space | dict(model=model, cached_model=with_kv_cache(model))


def exercises(**stubs):
    "What `check` says of these answers in the chapter, {name: verdict}; and what its cells defined"
    said = {}

    def noted(f, spec, *cases):
        stub = dict(rule_spec='my_rule', measured='my_guess', failures_spec='my_failures')
        said[stub[spec.__name__]] = check(f, spec, *cases)

    space = dict(small_world(), check=noted)
    for cell in ('def my_rule', 'print([tokenizer.decode', 'def my_failures'):
        run(cell, space, **stubs)
    return said, space


def each(answers):
    return [pytest.param(name, f, id=f.__name__) for name in answers for f in answers[name]]


@pytest.mark.parametrize('name,answer', each(answers.RIGHT))
def test_a_right_answer_is_told_so(name, answer):
    said, _ = exercises(**{name: answer})
    assert re.fullmatch(rf'{answer.__name__}: right on \d+ cases', said.pop(name))
    assert all(verdict.endswith(': not yet') for verdict in said.values())


@pytest.mark.parametrize('name,answer', each(answers.WRONG))
def test_a_wrong_answer_meets_a_counter_example(name, answer):
    said, _ = exercises(**{name: answer})
    assert 'expected' in said[name]


def test_half_at_once_reads_less_than_one_turn_at_a_time():
    "As exercise 1 says: with half of them gone, the cache is good for the next turns"

    def read(rule, turns=40, each=9, most=60):
        lengths = []
        gone = computed = 0
        for _ in range(turns):
            lengths.append(each)
            leave = rule(lengths[gone:], most)
            gone += leave
            computed += sum(lengths[gone:]) if leave else each
        return computed

    def one_at_a_time(lengths, most):
        leave = 0
        while sum(lengths[leave:]) > most:
            leave += 1
        return leave

    (half,) = answers.RIGHT['my_rule']
    assert read(half) < 0.5 * read(one_at_a_time)


def test_a_chat_reads_less_by_the_right_answer_to_exercise_1():
    "With a model that always ends its answer at once, which makes turns of one length"
    space = small_world() | dict(test_eq=lambda a, b: None)
    model = with_kv_cache(tiny(space['tokenizer'], max_len=64))
    space |= dict(model=model, cached_model=model, tale='Ben has a red ball. ')
    end = space['tokenizer'].special_tokens['<|end|>']
    model.lm_head.forward = lambda x: torch.nn.functional.one_hot(
        torch.full(x.shape[:-1], end), space['tokenizer'].vocab_size
    ).float()
    run('def long_chat', space)
    run('def one_at_a_time', space)
    (half,) = answers.RIGHT['my_rule']
    read = space['tokens_read']
    assert read(half) < 0.6 * read(space['one_at_a_time'])


def test_what_the_third_exercise_breaks_is_a_question_asked_again():
    "Without its `min`, `read_new` has nothing to read where all of a conversation is in the cache"
    source = next(cell for cell in lesson() if cell.startswith('def read_new'))
    line = (
        '        kept = min(kept, len(ids) - 1)  # one is read in any case: its logits are needed\n'
    )
    assert source.count(line) == 1
    for text, fails in ((source, False), (source.replace(line, ''), True)):
        space = dict(small_world(), partial=partial, test_eq=lambda a, b: None)
        exec(text, space)
        state = space['DecodingState'](space['cached_model'], 64)
        for ids in ([5, 6, 7], [5, 6, 7, 8], [5, 6, 9]):
            space['read_new'](state, ids)
        if fails:
            with pytest.raises(LabError, match='an empty text'):
                space['read_new'](state, [5, 6])
        else:
            want = space['model'](torch.tensor([[5, 6]]))[:, -1]
            near(space['read_new'](state, [5, 6]), want, 1e-5)
