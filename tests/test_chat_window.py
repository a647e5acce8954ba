"""The chat window: what its buttons and knobs call; `test_browser.py` presses the real ones."""

import html
import time
import warnings

import pytest
import torch

from helpers import chat_model, one_line
from llm_lab import play
from llm_lab.conversations import Chat
from llm_lab.inference import for_inference
from llm_lab.play import ChatWindow, chat_html, chat_window


@pytest.fixture
def window():
    "Each answer has at most 12 tokens, so that none takes long"
    made = ChatWindow(*chat_model())
    made.length.min = 1
    made.length.value = 12
    made.seed.value = 3
    yield made
    made.finish()


@pytest.fixture(scope='module')
def endless():
    "A model and its tokenizer; its greedy answer to 'who' is long"
    for seed in range(40):
        model, tokenizer = chat_model(4000, seed=seed)
        answer = ''.join(Chat(model, tokenizer).send('who', 1000, temperature=0))
        if len(answer) == 1000:
            return model, tokenizer, answer
    pytest.fail('each of these models comes to an end')


@pytest.fixture
def slow(endless):
    "A window in whose greedy answers there is time to press something: each token takes 10 ms"
    model, tokenizer, _ = endless
    made = ChatWindow(model, tokenizer)
    made.length.value = 1000
    made.knobs['temperature'].value = 0
    yield made
    made.finish()


def ask(window, question):
    "Type a question, press Send, and wait; the answer"
    window.question.value = question
    window.send()
    window.thread.join()
    return window.chat.messages[-1]['content'] if window.chat.messages else None


def begun(window):
    "Wait until the beginning of an answer is shown"
    end = time.monotonic() + 60
    while window.status.value != '<i>writing</i>' or window.text.value.count('▌') != 1:
        assert time.monotonic() < end and window.thread.is_alive(), window.status.value
        time.sleep(0.001)


def contents(window):
    return [message['content'] for message in window.chat.messages]


def test_answers_are_those_of_chat(window):
    window.knobs['temperature'].value = 1.1
    window.knobs['top_k'].value = 10
    got = [ask(window, question) for question in ('who', '  where ')]
    chat = Chat(*chat_model(), seed=3)
    want = [
        ''.join(chat.send(question, 12, temperature=1.1, top_k=10, top_p=0.95))
        for question in ('who', 'where')
    ]
    assert got == want and window.chat.messages == chat.messages
    assert window.text.value == chat_html(chat.messages)
    assert window.status.value == '<i>done</i>' and window.question.value == ''


def test_nothing_is_html_but_what_is_ours():
    evil = '<script>alert(1)</script>&"'
    shown = chat_html([dict(role=evil, content=evil), dict(role='user', content=[evil])])
    assert '<script' not in shown and shown.count(html.escape(evil)) >= 2
    assert 'nothing' in chat_html([dict(role='assistant', content='')])


def test_stop_keeps_the_beginning_and_the_chat_goes_on(slow, endless):
    slow.question.value = 'who'
    slow.send()
    begun(slow)
    slow.stop()
    slow.thread.join()
    question, answer = contents(slow)
    assert question == 'who' and 0 < len(answer) < 1000 and endless[2].startswith(answer)
    assert slow.status.value == '<i>stopped</i>'
    slow.length.value = 10
    after = ask(slow, 'where')
    chat = Chat(*endless[:2])
    chat.messages = slow.chat.messages[:2]
    assert after == ''.join(chat.send('where', 10, temperature=0, top_p=0.95))


def test_a_second_send_ends_the_first_answer(slow):
    slow.question.value = 'who'
    slow.send()
    begun(slow)
    slow.length.value = 10
    ask(slow, 'where')
    assert contents(slow)[::2] == ['who', 'where'] and len(contents(slow)[3]) <= 10
    assert slow.status.value == '<i>done</i>'


def test_a_press_without_a_question_lets_the_answer_go_on(slow):
    slow.question.value = 'who'
    slow.send()
    begun(slow)
    slow.send()
    assert slow.thread.is_alive() and not slow.halt.is_set()


@pytest.mark.parametrize('press', ['undo', 'reset'])
def test_undo_and_reset_end_an_answer_that_is_being_written(slow, press):
    slow.question.value = 'who'
    slow.send()
    begun(slow)
    getattr(slow, press)()
    assert not slow.thread.is_alive() and contents(slow) == []
    assert slow.text.value == chat_html([])
    assert slow.question.value == ('who' if press == 'undo' else '')


def test_undo_gives_the_question_back(window):
    first = ask(window, 'who')
    ask(window, 'where')
    window.undo()
    assert contents(window) == ['who', first] and window.question.value == 'where'
    window.question.value = 'when'
    window.undo()
    assert contents(window) == [] and window.question.value == 'when'  # what is typed stays
    window.undo()
    assert 'nothing was asked yet' in window.status.value


def test_again_is_another_answer(window):
    window.again()
    assert 'nothing was asked yet' in window.status.value
    first = ask(window, 'who')
    window.again()
    window.thread.join()
    assert contents(window)[0] == 'who' and contents(window)[1] != first
    window.seed.value = 5
    window.again()
    window.thread.join()
    window.reset()
    assert contents(window) == []
    window.seed.value = 3
    assert ask(window, 'who') == first  # the same seed, the same answer


@pytest.mark.parametrize('how', ['error', 'stop'])
def test_another_answer_that_does_not_come_leaves_the_first(window, monkeypatch, how):
    ask(window, 'who')
    before = list(window.chat.messages)

    def features(*args, **keywords):
        raise RuntimeError('<out of memory>')

    if how == 'error':
        monkeypatch.setattr(type(window.chat.model), 'features', features)
        window.again()
    else:  # Stop comes before the first token
        monkeypatch.setattr(window.chat, 'send', lambda *a, **k: iter_closed())
        window.again()
    window.thread.join()
    assert window.chat.messages == before and window.text.value == chat_html(before)
    said = '&lt;out of memory&gt;' if how == 'error' else 'the answer is the old one'
    assert said in window.status.value, window.status.value


def iter_closed():
    "The pieces of an answer that is ended before it begins"
    yield from ()


def test_errors_stand_in_the_status_line_and_the_question_in_its_field(window):
    window.send()
    assert 'type a question first' in window.status.value
    for question, words in (('w€', 'is not among the'), ('x' * 500, 'send a shorter one')):
        ask(window, question)
        assert words in window.status.value and window.question.value == question
        assert contents(window) == [] and window.text.value == chat_html([])
    window.question.value = 'who'
    ask(window, 'who')
    assert len(contents(window)) == 2


def test_turns_that_are_left_out_are_told_in_the_status_line():
    window = ChatWindow(*chat_model(max_len=64))
    window.length.min = 1
    window.length.value = 8
    said = []
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for question in ('one', 'two', 'three', 'four', 'five', 'six', 'seven'):
            ask(window, question)
            said.append(window.status.value)
    assert {*said[:1], *said[-1:]} == {'<i>done</i>'} and len(contents(window)) == 14
    [note] = {*said} - {'<i>done</i>'}
    assert note.startswith('<i>done; ') and 'oldest turns are left out' in note
    for _ in range(6):
        window.undo()
    ask(window, 'two')  # what did not fit is read again
    assert contents(window)[::2] == ['one', 'two'] and window.chat.left_out == 0


def test_enter_sends_the_text_that_comes_after_it(window):
    window.enter(window.question, dict(event='other'), [])
    window.enter(window.question, dict(event='submit'), [])
    window.question.value = 'who'
    end = time.monotonic() + 60
    while len(contents(window)) < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert contents(window)[0] == 'who'


def test_a_model_without_a_template_is_refused_and_one_of_another_size():
    one_line(lambda: ChatWindow(*chat_model(marks=False)), 'no chat template')
    model, _ = chat_model(marks=False)
    _, tokenizer = chat_model()
    one_line(lambda: ChatWindow(model, tokenizer), str(tokenizer.vocab_size))


def test_the_fast_form_of_a_model_talks_too():
    model, tokenizer = chat_model()
    window = ChatWindow(for_inference(model), tokenizer, system='be kind')
    window.length.min = 1
    window.length.value = 12
    window.knobs['temperature'].value = 0
    chat = Chat(model, tokenizer, system='be kind')
    assert ask(window, 'who') == ''.join(chat.send('who', 12, temperature=0))


def test_where_nothing_is_alive_there_is_a_still(monkeypatch):
    model, tokenizer = chat_model()
    with torch.no_grad():
        still = chat_window(model, tokenizer, question='who').data
    assert still.count('user') == 1 and still.count('assistant') == 1 and '<script' not in still
    assert 'user' not in chat_window(model, tokenizer).data
    monkeypatch.setattr(play, 'widgets_live', lambda: True)
    view = chat_window(model, tokenizer, question='who')
    assert [b.description for b in view.children[2].children] == [
        *('Send', 'Stop', 'Undo', 'Again', 'Reset')
    ]
