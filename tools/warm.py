"""A process that has loaded the slow libraries once, and lends itself to one notebook after the
other: each runs in a fork of it, so it finds the libraries, and nothing of another notebook.

python tools/warm.py reads lines of JSON, {"notebook": …, "flags": …, "log": …}, and answers each
with {"code": …, "seconds": …}, in core-seconds. It ends when its input does. Only where a process
can be forked (not on Windows); tests/test_notebooks.py uses it, and goes without elsewhere."""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load():
    "What nearly every notebook loads, and the tales that half of them read"
    import llm_lab  # noqa: F401  before PyTorch: how its threads wait
    import matplotlib.pyplot  # noqa: F401
    import nbdev.test  # noqa: F401
    import safetensors.torch  # noqa: F401
    import tokenizers  # noqa: F401
    import torch  # noqa: F401
    from llm_lab.corpora import load_corpus

    load_corpus('tiny_tales')


def run(notebook, flags, log):
    "Run a notebook as `nbdev_test` does, all that it prints in a file; ends this process"
    from nbdev.config import get_config
    from nbdev.test import test_nb

    code = 1
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (out, 2)):
            os.dup2(descriptor, target)
        os.chdir(notebook.parent)
        skipped = get_config(path=ROOT).tst_flags.split()
        ok, _ = test_nb(notebook, skip_flags=skipped, force_flags=flags.split(), basepath=ROOT)
        code = 0 if ok else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # what follows in this file belongs to the process that was forked


def main():
    load()
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if not pid:
            run(Path(job['notebook']), job['flags'], job['log'])
        _, status, used = os.wait4(pid, 0)
        answer = dict(code=os.waitstatus_to_exitcode(status), seconds=used.ru_utime + used.ru_stime)
        print(json.dumps(answer), flush=True)


if __name__ == '__main__':
    main()
