"""Downloads that go wrong, from a server on this machine: never a wrong byte used, never a half
file left."""

import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from llm_lab.corpora import fetch, load_corpus
from llm_lab.core import LabError

pooch = pytest.importorskip('pooch', reason='pooch is not installed: pip install pooch')
GOOD = b'Now is the winter of our discontent\n' * 3000
SHA = hashlib.sha256(GOOD).hexdigest()


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """serve(answer, …): a server that gives each answer in turn, the last one for ever; an answer
    is (status, promised length, body)"""
    monkeypatch.setenv('LLM_LAB_HOME', str(tmp_path))
    monkeypatch.delenv('LLM_LAB_DATA', raising=False)
    # pooch waits between its tries
    monkeypatch.setattr(pooch.core.time, 'sleep', lambda seconds: None)
    servers = []

    def start(*answers):
        left, asked = list(answers), []

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self):
                status, length, body = left.pop(0) if len(left) > 1 else left[0]
                asked.append(self.path)
                self.send_response(status)
                if length is not None:
                    self.send_header('Content-Length', str(length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        s = ThreadingHTTPServer(('127.0.0.1', 0), Answer)
        s.handle_error = lambda *a: None  # a client that hangs up is what we test
        Thread(target=s.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(s)
        return f'http://127.0.0.1:{s.server_port}/text', asked

    yield start
    for s in servers:
        s.shutdown()
        s.server_close()


def whole(data=GOOD, status=200):
    return status, len(data), data


@pytest.mark.parametrize(
    'fault',
    [
        pytest.param((200, len(GOOD), GOOD[:5000]), id='cut off'),
        pytest.param((200, None, GOOD[:5000]), id='cut off, length not promised'),
        pytest.param(whole(b'<html>We are busy</html>'), id='a friendly page'),
        pytest.param(whole(b'gone', 503), id='an error'),
        pytest.param(whole(GOOD[:-1] + b'!'), id='one wrong byte'),
    ],
)
class TestFaults:
    def test_is_one_line_and_leaves_nothing(self, serve, tmp_path, fault):
        url, asked = serve(fault)
        with pytest.raises(LabError, match='cannot download text.txt') as e:
            fetch('text.txt', url, SHA, len(GOOD))
        assert '\n' not in str(e.value) and len(asked) == 4  # one try and three more
        assert not (tmp_path / 'data').exists() or list((tmp_path / 'data').iterdir()) == []

    def test_is_forgiven_once(self, serve, tmp_path, fault):
        url, asked = serve(fault, whole())
        assert fetch('text.txt', url, SHA, len(GOOD)) == GOOD and len(asked) == 2
        assert [p.name for p in (tmp_path / 'data').iterdir()] == ['text.txt']


def test_too_long_stops_early(serve, tmp_path):
    url, asked = serve((200, None, GOOD * 50))
    with pytest.raises(LabError, match='sends more than the'):
        fetch('text.txt', url, SHA, len(GOOD))
    assert len(asked) == 1 and list((tmp_path / 'data').iterdir()) == []


def test_nobody_answers(serve, tmp_path):
    with pytest.raises(LabError, match='cannot download text.txt') as e:
        fetch('text.txt', 'http://127.0.0.1:9/text', SHA, 10)
    assert '\n' not in str(e.value)


def test_local_copies_come_first_and_are_checked(serve, tmp_path, monkeypatch):
    url, asked = serve(whole())
    local = tmp_path / 'copies'
    local.mkdir()
    monkeypatch.setenv('LLM_LAB_DATA', str(local))
    (local / 'text.txt').write_bytes(GOOD)
    assert fetch('text.txt', url, SHA, len(GOOD)) == GOOD and asked == []
    (local / 'text.txt').write_bytes(GOOD[1:])
    with pytest.raises(LabError, match='has SHA-256'):
        fetch('text.txt', url, SHA, len(GOOD))
    assert asked == []  # a wrong file is not passed over in silence


def test_an_explicit_corpus_never_becomes_another(serve, monkeypatch):
    monkeypatch.setattr(
        pooch.HTTPDownloader,
        '__call__',
        lambda *a, **k: (_ for _ in ()).throw(OSError('no network')),
    )
    with pytest.raises(LabError, match='cannot download tiny_shakespeare.txt'):
        load_corpus('tiny_shakespeare')
