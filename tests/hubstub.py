"""A Hugging Face hub on this machine, with data sets of our own in the publishers' formats.

Its faults are switched on by name."""

import hashlib
import io
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from urllib.parse import unquote, urlsplit

COMMIT = '0123456789abcdef0123456789abcdef01234567'


def parquet(rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), out := io.BytesIO(), row_group_size=7)
    return out.getvalue()


def story(n):
    return (
        f'Story {n} is about a pear.\n\nIt has a blank line inside.\n\n"Eat {n} pears!" '
        'said the ant.'
    )


def book(n):
    return f'BOOK {n}\r\n\r\n' + '\r\n'.join(f'Line {i} of book {n}.' for i in range(50))


def ask(n):
    context = f'A number.\n\nIt is {n}.' if n % 3 else ''
    return dict(instruction=f'What is {n}?', context=context, response=f'It is {n}.', category='qa')


def shelf():
    "{repo: {path: bytes}}, as the publishers lay it out"
    extra = ['Two in one.\n<|endoftext|>\nHere is the other.', '  \n ', story(3)]
    tales = [story(n) for n in range(600)] + extra
    return {
        'roneneldan/TinyStories': {
            'README.md': b'---\nlicense: cdla-sharing-1.0\n---\n',
            'TinyStories-train.txt': b'not asked for',
            'data/train-00000-of-00002-2d5a.parquet': parquet([dict(text=t) for t in tales[:300]]),
            'data/train-00001-of-00002-5852.parquet': parquet([dict(text=t) for t in tales[300:]]),
            'data/validation-00000-of-00001-869c.parquet': parquet(
                [dict(text=story(n)) for n in range(1000, 1020)]
            ),
        },
        'databricks/databricks-dolly-15k': {
            'databricks-dolly-15k.jsonl': ''.join(
                json.dumps(ask(n)) + '\n' for n in range(400)
            ).encode()
        },
        'emozilla/pg19': {
            f'data/{s}-00000-of-00001-3f.parquet': parquet(
                [
                    dict(
                        short_book_title=f'Book {n}',
                        publication_date=1850 + n,
                        url='',
                        text=book(n),
                    )
                    for n in range(a, b)
                ]
            )
            for s, a, b in (('train', 0, 20), ('validation', 50, 52), ('test', 60, 63))
        },
    }


class Hub:
    """What the stub answers: `files` by repository, `fault` on or off, `log` of what it was asked;
    'slow' is so many seconds late"""

    def __init__(self):
        self.files = shelf()
        self.fault = ''
        self.times = 10**9
        self.log = []
        self.delay = 1
        self.over = Event()

    def entry(self, path, data, tree=False):
        blob = hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()
        lfs = dict(sha256=hashlib.sha256(data).hexdigest(), size=len(data), pointerSize=130)
        large = path.endswith('.parquet')
        if tree:
            return dict(type='file', path=path, size=len(data), oid=blob) | (
                dict(lfs=dict(lfs, oid=lfs['sha256'])) if large else {}
            )
        return dict(rfilename=path, size=len(data), blobId=blob) | (dict(lfs=lfs) if large else {})

    def faulty(self, *names):
        "Is one of these faults due now? Counts down"
        if self.fault not in names or self.times < 1:
            return False
        self.times -= 1
        return True


class Answer(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def send(self, data=b'', status=200, kind='application/json', length=None, **headers):
        if not isinstance(data, bytes):
            data = json.dumps(data).encode()
        self.send_response(status)
        for k, v in headers.items():
            self.send_header(k.replace('_', '-'), v)
        self.send_header('Content-Type', kind)
        self.send_header('Content-Length', str(len(data) if length is None else length))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def do_GET(self):
        hub, url = self.server.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        hub.log.append(f'{self.command} {url}')
        if hub.faulty('page'):
            return self.send(b'<html>Please wait', kind='text/html')
        if hub.faulty('busy'):
            return self.send(b'busy', 503)
        if hub.faulty('gated'):
            return self.send(b'{}', 403, X_Error_Code='GatedRepo', X_Error_Message='Ask the owner')
        if hub.faulty('private'):
            return self.send(b'{}', 401, X_Error_Code='RepoNotFound')
        m = re.match(
            r'/(?:api/)?datasets/(\w+/[\w-]+)'
            r'(?:/(revision|tree|paths-info|resolve)/([^/]+))?(?:/(.*))?$',
            url,
        )
        files = hub.files.get(m[1]) if m else None
        if files is None or hub.faulty('gone'):
            return self.send(b'{}', 404, X_Error_Code='RepoNotFound')
        if m[3] not in (None, 'main', COMMIT):
            return self.send(b'{}', 404, X_Error_Code='RevisionNotFound')
        if m[2] == 'resolve':
            return self.file(hub, files, m[4])
        if m[2] == 'tree':
            under = [hub.entry(p, d, True) for p, d in files.items() if p.startswith(m[4] or '')]
            return (
                self.send(under) if under else self.send(b'{}', 404, X_Error_Code='EntryNotFound')
            )
        if m[2] == 'paths-info':
            return self.send(
                [hub.entry(p, files[p], True) for p in json.loads(body)['paths'] if p in files]
            )
        self.send(
            dict(
                id=m[1],
                sha=COMMIT,
                siblings=[hub.entry(p, d) for p, d in files.items()],
                private=False,
                tags=[],
                downloads=0,
            )
        )

    do_HEAD = do_POST = do_GET

    def file(self, hub, files, path):
        if path not in files or hub.faulty('lost'):
            return self.send(b'{}', 404, X_Error_Code='EntryNotFound')
        if hub.faulty('slow'):
            hub.over.wait(hub.delay)
        data, etag = files[path], hub.entry(path, files[path], True)
        head = dict(
            X_Repo_Commit=COMMIT,
            ETag=f'"{(etag.get("lfs") or etag)["oid"]}"',
            Accept_Ranges='bytes',
        )
        if self.command == 'HEAD':
            return self.send(data, **head)
        if hub.faulty('file page'):
            return self.send(b'<html>Please wait', kind='text/html', **head)
        if hub.faulty('flipped'):
            data = (
                data[: len(data) // 2]
                + bytes([data[len(data) // 2] ^ 1])
                + data[len(data) // 2 + 1 :]
            )
        part = re.match(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        if part:
            a = int(part[1])
            b = min(int(part[2] or len(data)), len(data) - 1)
            head = head | dict(Content_Range=f'bytes {a}-{b}/{len(data)}')
            data = data[a : b + 1]
            status = 206
        else:
            status = 200
        if hub.faulty('short'):
            return self.send(data[: len(data) // 2], status, **head)
        if hub.faulty('reset'):
            self.send(data[: len(data) // 2], status, length=len(data), **head)
            self.close_connection = True
            return
        self.send(data, status, kind='application/octet-stream', **head)


@contextmanager
def serve():
    "Yields the hub and its address"
    s = ThreadingHTTPServer(('127.0.0.1', 0), Answer)
    s.hub = Hub()
    s.daemon_threads = True
    s.handle_error = lambda *a: None
    Thread(target=s.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield s.hub, f'http://127.0.0.1:{s.server_port}'
    finally:
        s.hub.over.set()
        s.shutdown()
        s.server_close()
