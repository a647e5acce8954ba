"""`llm-lab chat`: questions that are typed or come from a pipe, commands while chatting, Ctrl-C."""

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from cases import HANG
from helpers import chat_model, in_a_process, json_lines, one_line, printed, typed
from llm_lab import cli
from llm_lab.conversations import Chat
from llm_lab.cli import ChatSession, open_chat, run_chat, run_chat_command, take_line
from llm_lab.core import LabError
from llm_lab.hub import to_hf
from llm_lab.package import load, save
from llm_lab.templates import CHAT

CHATML = (
    '{% for message in messages %}'
    "{{ '[' + message['role'] + ']' + message['content'] + '.' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}a"


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder with models: `artifacts/talker`, and one without marks"
    home = tmp_path_factory.mktemp('home')
    save(home / 'artifacts' / 'talker', *chat_model())
    save(home / 'artifacts' / 'plain', *chat_model(marks=False))
    return home


@pytest.fixture
def at_home(place, monkeypatch):
    monkeypatch.setenv('LLM_LAB_HOME', str(place))
    return place


@pytest.fixture
def session(at_home, tmp_path):
    return ChatSession(open_chat('talker', seed=3), tokens=12, save=tmp_path / 'h.jsonl')


def answers(questions, system=None, seed=3, tokens=12, **sampling):
    "What the library's own `Chat` answers, without a cache"
    chat = Chat(*chat_model(), system=system, seed=seed)
    return [''.join(chat.send(q, tokens, **dict(temperature=0.8) | sampling)) for q in questions]


def piped(text, *argv, monkeypatch, code=0):
    "(stdout, stderr) of `llm-lab chat` that reads this text"
    monkeypatch.setattr(sys, 'stdin', io.StringIO(text))
    return printed('chat', *argv, code=code)


# ---- from a pipe


@pytest.mark.parametrize('more', [[], ['--no-cache']])
def test_each_line_of_a_pipe_is_answered_as_chat_answers(at_home, monkeypatch, more):
    argv = ('talker', '--tokens', '12', '--seed', '3', '--system', 'be kind', *more)
    out, err = piped('who\n\n  where is it\n//x', *argv, monkeypatch=monkeypatch)
    want = answers(['who', 'where is it', '/x'], 'be kind')
    assert out == ''.join(f'{answer}\n' for answer in want) and err == ''


def test_options_reach_the_sampler(at_home, monkeypatch):
    argv = ('talker', '--tokens', '9', '--temperature', '1.5', '--top-k', '4', '--top-p', '0.9')
    out, _ = piped('who', *argv, monkeypatch=monkeypatch)
    assert out == answers(['who'], None, 0, 9, temperature=1.5, top_k=4, top_p=0.9)[0] + '\n'


def test_a_line_that_cannot_be_answered_is_told_and_the_others_are_answered(at_home, monkeypatch):
    lines = 'who', 'w\u00f6', '/nothing', 'b\ufffd', 'x' * 500, 'where'
    argv = ('talker', '--tokens', '12', '--seed', '3')
    monkeypatch.setattr(sys, 'stdin', io.StringIO('\n'.join(lines)))
    code, out, err = typed('chat', *argv)
    assert code == 1 and out == ''.join(f'{answer}\n' for answer in answers(['who', 'where']))
    told = err.splitlines()
    for line, words in zip(
        told, ('is not among the', "no command '/nothing'", 'not UTF-8', 'send a shorter one')
    ):
        assert line.startswith('llm-lab: ') and words in line
    assert len(told) == 4


def test_commands_come_from_a_pipe_too(at_home, monkeypatch):
    text = 'who\n/temperature 0\nwho\n/quit\nnever'
    out, err = piped(text, 'talker', '--tokens', '12', '--seed', '3', monkeypatch=monkeypatch)
    assert len(re.findall('never', out + err)) == 0
    chat = Chat(*chat_model(), seed=3)
    want = [''.join(chat.send('who', 12, temperature=t)) for t in (0.8, 0)]
    assert out == ''.join(f'{answer}\n' for answer in want) and err == '/temperature 0.0\n'


def test_mistakes_are_one_line_and_have_their_code(at_home, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, 'stdin', io.StringIO('who'))
    mistakes = [
        (2, 'give a share above 0', 'talker', '--top-p', '0'),
        (2, 'give a whole number above 0', 'talker', '--tokens', '0'),
        (2, 'the following arguments are required: path'),
        (2, 'unrecognized', 'talker', '--prompt', 'x'),
        (1, 'no model at', 'nowhere'),
        (1, 'or give --template FILE.jinja', 'plain'),
        (1, 'give FILE.jsonl', 'talker', '--save', tmp_path / 'x.txt'),
        (1, 'is no folder; make it first', 'talker', '--save', tmp_path / 'no' / 'x.jsonl'),
        (1, 'has no chat template', 'talker', '--template', tmp_path / 'none.jinja'),
    ]
    for code, words, *argv in mistakes:
        _, err = printed('chat', *argv, code=code)
        assert words in err, err


# ---- templates and end marks


def test_a_template_may_be_given_and_may_refuse_a_system_message(at_home, monkeypatch, tmp_path):
    file = tmp_path / 'mine.jinja'
    file.write_text(CHATML)
    chat = open_chat('plain', file)
    assert chat.template.source == CHATML
    # as a document of this tokenizer begins
    assert chat.tokenizer.decode(chat_prompt(chat, 'who')) == '<|endoftext|>[user]who.[assistant]'
    file.write_text(NO_SYSTEM)
    one_line(lambda: open_chat('plain', file, 'be kind'), 'no system')
    chat = open_chat('plain', file)
    one_line(lambda: cli.set_system(chat, 'be kind'), 'no system')
    assert chat.system is None and chat.messages == []


def chat_prompt(chat, question):
    "The ids that the model reads before its first answer"
    chat.messages.append(dict(role='user', content=question))
    return chat.prompt()


def test_a_hugging_face_folder_brings_its_template_and_its_end_marks(tmp_path):
    model, tokenizer = chat_model()
    folder = tmp_path / 'hf'
    to_hf(folder, model, tokenizer)
    ours = open_chat(folder)
    assert ours.template.source.endswith(CHAT)
    saved = Chat(model, tokenizer)
    assert chat_prompt(ours, 'who') == chat_prompt(saved, 'who') and ours.stops == saved.stops
    (folder / 'chat_template.jinja').write_text('{{ bos_token }}' + CHATML)
    ends = [tokenizer.special_tokens['<|user|>'], 4]
    generation = json.loads((folder / 'generation_config.json').read_text())
    (folder / 'generation_config.json').write_text(json.dumps(generation | dict(eos_token_id=ends)))
    chat = open_chat(folder)
    text = chat.tokenizer.decode(chat_prompt(chat, 'who'))
    assert text == '<|endoftext|>[user]who.[assistant]'
    assert {*ends, tokenizer.eos_id} == {*chat.stops}


# ---- commands


def test_settings_change_while_chatting(session, capsys):
    for line, name, value in [
        ('/temperature 0.3', 'temperature', 0.3),
        ('/top-k 5', 'top_k', 5),
        ('/top-k all', 'top_k', None),
        ('/top-p 0.5', 'top_p', 0.5),
        ('/top-p   all ', 'top_p', None),
        ('/tokens 7', 'tokens', 7),
    ]:
        assert line.split()[0] in run_chat_command(session, line)
        assert session.settings[name] == value
    assert '(now 0.3)' in run_chat_command(session, '/help')
    take_line(session, 'who')
    assert capsys.readouterr().out == answers(['who'], tokens=7, temperature=0.3)[0] + '\n'


def test_mistakes_in_commands(session):
    for line, words in [
        ('/temprature 1', "did you mean '/temperature'?"),
        ('/qiut', "did you mean '/quit'?"),
        ('/', 'choose from /again'),
        ('/temperature', "'' will not do: give 0 (greedy) or more"),
        ('/temperature -1', 'give 0 (greedy) or more'),
        ('/temperature all', 'give 0 (greedy) or more'),
        ('/top-k 0', '/top-k '),
        ('/top-p 1.5', 'give a share above 0 and up to 1'),
        ('/tokens many', 'give a whole number above 0'),
        ('/undo', 'nothing was asked yet'),
        ('/again', 'nothing was asked yet'),
        ('/undo 2', 'type /undo alone'),
        ('/save x.txt', 'give FILE.jsonl'),
    ]:
        before = dict(session.settings)
        one_line(lambda line=line: take_line(session, line), words)
        assert session.settings == before and not session.over
    session.history = None
    one_line(lambda: take_line(session, '/save'), '/save FILE.jsonl')


def test_every_command_is_listed(session):
    told = run_chat_command(session, '/help')
    lines = [line.split()[0] for line in told.splitlines()]
    assert lines[:-1] == [*cli.CHAT_COMMANDS]
    out, _ = printed('chat', '--help')
    assert all(name in out for name in cli.CHAT_COMMANDS)


def test_undo_again_reset_and_the_history(session, capsys):
    path = session.history.path
    kept = lambda: [record['messages'] for record in json_lines(path)]
    chat = session.chat
    take_line(session, 'one')
    take_line(session, 'two')
    assert kept() == [chat.messages] and len(chat.messages) == 4
    first = chat.messages[-1]['content']
    assert run_chat_command(session, '/again') is None
    assert [m['content'] for m in chat.messages[::2]] == ['one', 'two']
    assert chat.messages[-1]['content'] != first and kept() == [chat.messages]
    assert "'two'" in run_chat_command(session, '/undo')
    assert len(chat.messages) == 2 and kept() == [chat.messages]
    whole = list(chat.messages)
    take_line(session, '/reset')
    assert chat.messages == [] and kept() == [whole]
    take_line(session, 'three')
    assert kept() == [whole, chat.messages]
    take_line(session, '/temperature 0')
    assert 'always the same' in run_chat_command(session, '/again')
    # another program writes into the file: its line stays, and ours comes once more after it
    with open(path, 'a') as file:
        file.write('{"messages": []}\n')
    take_line(session, 'four')
    assert len(kept()) == 4 and kept()[2] == [] and kept()[-1] == chat.messages
    other = path.with_name('other.jsonl')
    other.write_text('{}')  # an editor has left out the end of the line
    take_line(session, f'/save {other}')
    assert json_lines(other) == [{}, dict(messages=chat.messages)]
    run_chat_command(session, '/undo')
    assert json_lines(other)[1:] == [dict(messages=chat.messages)]


def test_turns_that_do_not_fit_are_told_once_and_read_again_after_undo(
    at_home, tmp_path, recwarn, capsys
):
    save(tmp_path / 'short', *chat_model(max_len=64))
    session = ChatSession(open_chat(tmp_path / 'short'), tokens=8, temperature=0)
    asked = ['one', 'two', 'three', 'four', 'five', 'six', 'seven']
    before = 0
    for question in asked:
        take_line(session, question)
        said = capsys.readouterr().err
        left_out = session.chat.left_out
        if left_out > before == 0:  # it is said when it happens, and once
            gone = ', '.join(map(repr, asked[: left_out // 2]))
            assert said.count('\n') == 1 and f'left out, so far {gone}; /reset' in said
        else:
            assert not said
        before = left_out
    assert before and not recwarn.list  # what `Chat` warns of is not said once more
    for _ in range(6):
        take_line(session, '/undo')
    assert session.chat.visible_messages() == session.chat.messages != []
    take_line(session, 'two')
    assert len(session.chat.messages) == 4
    for question in ['/reset', *asked]:
        take_line(session, question)
    assert capsys.readouterr().err.count('are left out') == 1  # of a new conversation, too


def test_a_system_message_changes_and_what_was_said_stays(session):
    chat = session.chat
    take_line(session, 'one')
    said = list(chat.messages)
    for text in ('be kind', 'be brief', ''):
        take_line(session, f'/system {text}')
        system = [dict(role='system', content=text)] if text else []
        assert chat.messages == system + said
    take_line(session, '/system be kind')
    take_line(session, '/reset')
    take_line(session, 'two')
    assert chat.messages[-1]['content'] == answers(['two'], 'be kind')[0]


# ---- Ctrl-C


def interrupt(session, monkeypatch, after):
    "Ctrl-C comes when so many pieces of an answer are printed"
    printed = []

    class Out(io.StringIO):
        def write(self, text):
            printed.append(text)
            if len(printed) == after:
                raise KeyboardInterrupt
            return super().write(text)

    out = Out()
    monkeypatch.setattr(sys, 'stdout', out)
    return out


def test_ctrl_c_ends_an_answer_and_the_conversation_goes_on(session, monkeypatch, capsys):
    session.interactive = True
    session.settings['temperature'] = 0
    want = answers(['who'], temperature=0)[0]
    assert len(want) >= 4
    with monkeypatch.context() as m:
        interrupt(session, m, 5)  # print() writes a text and its end, each by itself
        take_line(session, 'who')
    assert 'stopped' in capsys.readouterr().err
    written = session.chat.messages[-1]
    assert written['role'] == 'assistant' and want.startswith(written['content'])
    assert 0 < len(written['content']) < len(want)
    assert json_lines(session.history.path)[-1]['messages'] == session.chat.messages
    take_line(session, 'where')
    again = Chat(*chat_model(), seed=3)
    again.messages = session.chat.messages[:-2]
    assert ''.join(again.send('where', 12, temperature=0)) == session.chat.messages[-1]['content']


def test_another_answer_that_does_not_come_leaves_the_first(session, monkeypatch):
    session.interactive = True
    take_line(session, 'one')
    before = list(session.chat.messages)

    def send(*args, **keywords):
        raise LabError('on purpose')

    monkeypatch.setattr(session.chat, 'send', send)
    one_line(lambda: take_line(session, '/again'), 'on purpose')
    assert session.chat.messages == before
    assert json_lines(session.history.path) == [dict(messages=before)]


def test_ctrl_c_in_a_pipe_ends_all(session, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'stdin', io.StringIO('who\nwhere\n'))
    with monkeypatch.context() as m:
        interrupt(session, m, 5)
        assert run_chat(session) == 130
    assert len(session.chat.messages) == 2 and capsys.readouterr().err == 'stopped\n'


# ---- whole processes


def test_a_pipe_in_a_process(place):
    history = place / 'h.jsonl'
    argv = ('chat', 'talker', '--tokens', '12', '--seed', '3', '--save', history)
    done = in_a_process(place, *argv, input='who\nwhere\n')
    assert done.returncode == 0 and done.stderr == '', done.stderr
    want = answers(['who', 'where'])
    assert done.stdout == ''.join(f'{answer}\n' for answer in want)
    [record] = json_lines(history)
    assert [m['content'] for m in record['messages'] if m['role'] == 'assistant'] == want


class Terminal:
    "`llm-lab` in a terminal of its own, as somebody types in it"

    def __init__(self, home, *argv):
        ours, theirs = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'llm_lab.cli', *map(str, argv)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, 'LLM_LAB_HOME': str(home), 'TERM': 'dumb'},
            cwd=home,
            start_new_session=True,
            # the terminal sends Ctrl-C to those whose own it is
            preexec_fn=lambda: __import__('fcntl').ioctl(0, __import__('termios').TIOCSCTTY, 0),
        )
        os.close(theirs)
        self.fd = ours
        self.said = ''

    def type(self, text):
        self.said = ''
        os.write(self.fd, text.encode())

    def read(self, seconds):
        "What it says within this time; None when it has closed its terminal"
        if not select.select([self.fd], [], [], seconds)[0]:
            return ''
        try:
            new = os.read(self.fd, 4096)
        except OSError:
            new = b''
        return new.decode().replace('\r\n', '\n') if new else None

    def until(self, found):
        "Read until `found` is true of what was said since the last text was typed"
        end = time.monotonic() + HANG
        while not found(self.said):
            new = self.read(1)
            assert new is not None and time.monotonic() < end, f'it said no more: {self.said!r}'
            self.said += new
        return self.said

    def ended(self):
        """Its exit code after Ctrl-C at the prompt.

        Python misses one that comes between the prompt and the wait for a key, as no hand is quick
        enough to do it; then it is pressed again"""
        end = time.monotonic() + HANG
        self.type('\x03')
        due = time.monotonic() + 5
        while (new := self.read(1)) is not None:
            self.said += new
            assert time.monotonic() < end, f'it does not end: {self.said!r}'
            if '\n' not in self.said and time.monotonic() > due:  # it has not heard of it
                self.type('\x03')
                due = time.monotonic() + 5
        return self.process.wait(HANG)


@pytest.fixture(scope='module')
def endless(place):
    "A model whose greedy answer to 'who' is long"
    for seed in range(40):
        model, tokenizer = chat_model(60_000, seed=seed)
        answer = ''.join(Chat(model, tokenizer).send('who', 300, temperature=0))
        if len(answer) == 300:
            save(place / 'artifacts' / 'endless', model, tokenizer)
            return answer
    pytest.fail('each of these models comes to an end')


@pytest.mark.slow  # a terminal and its waits; by day the pipe is stopped in the same way
@pytest.mark.skipif(os.name == 'nt', reason='Windows has no terminals of this kind')
def test_ctrl_c_in_a_terminal(place, endless, tmp_path):
    "It ends an answer, then a question is answered, then it ends the conversation at the prompt"
    history = tmp_path / 'h.jsonl'
    argv = ('chat', 'endless', '--temperature', '0', '--tokens', '50000', '--save', history)
    shell = Terminal(place, *argv)
    try:
        shell.until(lambda said: said.endswith('> '))
        shell.type('who\n')
        shell.until(lambda said: endless[:40] in said)
        shell.type('\x03')
        shell.until(lambda said: 'stopped' in said and said.endswith('> '))
        shell.type('/tokens 5\n')
        shell.until(lambda said: said.endswith('/tokens 5\n> '))
        shell.type('where\n')
        shell.until(lambda said: said.endswith('> '))
        [record] = json_lines(history)
        assert [m['content'] for m in record['messages'][::2]] == ['who', 'where']
        first, second = (m['content'] for m in record['messages'][1::2])
        assert first.startswith(endless[:40]) and len(first) < 50_000 and len(second) <= 5
        assert shell.ended() == 0
    finally:
        shell.process.kill()
        os.close(shell.fd)


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no SIGINT for one process')
def test_ctrl_c_while_a_pipe_is_answered(place, endless):
    process = subprocess.Popen(
        [sys.executable, '-m', 'llm_lab.cli', 'chat', 'endless', '--temperature', '0']
        + ['--tokens', '50000'],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, 'LLM_LAB_HOME': str(place)},
        text=True,
    )
    process.stdin.write('who\nwhere\n')
    process.stdin.flush()
    begun = process.stdout.read(40)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=HANG)
    assert begun == endless[:40] and process.returncode == 130 and err == 'stopped\n', err


def test_help_needs_no_pytorch_and_no_standard_input_is_an_end(place):
    code = (
        'import sys; from llm_lab.cli import main\n'
        "try: main(['chat', '--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout
    assert '--no-cache' in shown and shown.endswith('False\n')
    done = in_a_process(place, 'chat', 'talker', stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


def test_a_loaded_model_is_the_one_that_was_saved(at_home):
    "The oracle of these tests, `answers`, asks the model itself"
    model, _, _ = load(at_home / 'artifacts' / 'talker')
    kept = model.state_dict()
    assert all(kept[name].equal(tensor) for name, tensor in chat_model()[0].state_dict().items())
