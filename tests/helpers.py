"""What several files of tests do: models that hide no mistake, numbers compared, errors of one
line, files and folders compared, the command line.

How many cases a test tries is in `cases`; fixtures that several files share are in `conftest`."""

import ast
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from cases import HANG

from llm_lab.core import LabError, check

# ---- the cells of a chapter, for the tests of its exercises

NOTEBOOKS = Path(__file__).resolve().parent.parent / 'nbs'


def cells_of(chapter, kind='code'):
    "The sources of a kind of cells, code or markdown, of a chapter such as '26_sampling'"
    notebook = json.loads((NOTEBOOKS / f'{chapter}.ipynb').read_text(encoding='utf-8'))
    return [''.join(c['source']) for c in notebook['cells'] if c['cell_type'] == kind]


def manual():
    "What a user reads: the README, and the guide behind it"
    readme = (NOTEBOOKS.parent / 'README.md').read_text(encoding='utf-8')
    return '\n\n'.join([readme, *cells_of('guide', 'markdown')])


def code_cell(chapter, text):
    "The one code cell of a chapter that holds a text"
    (found,) = [source for source in cells_of(chapter) if text in source]
    return found


def run_cell(chapter, start, space, **answers):
    "Run the cell that begins so, with these answers in place of the stubs of their names"
    source = next(source for source in cells_of(chapter) if source.startswith(start))
    for node in ast.parse(source).body:
        name = getattr(node, 'name', None)
        if name in answers:
            space[name] = answers[name]
        else:
            exec(compile(ast.Module([node], []), chapter, 'exec'), space)


def exercise_tests(answers, specs, fixture='lesson', counter_example='expected'):
    """Three tests of a chapter's exercises: right answers, wrong ones, and the stubs themselves

    Args:
        answers: {exercise: (right answers, wrong ones)}
        specs: {exercise: (name of what is right, name of its cases; None where it takes nothing)}
        fixture: the module's, with what the chapter's cells define
        counter_example: a pattern of what `check` says of a wrong answer
    """

    def said(name, answer, lesson):
        spec, cases = specs[name]
        cases = lesson[cases] if cases else [()]
        return check(answer, lesson[spec], *cases), len(cases)

    right = [(name, f) for name, (some, _) in answers.items() for f in some]
    wrong = [(name, f) for name, (_, some) in answers.items() for f in some]

    @pytest.mark.parametrize('name, answer', right)
    def is_told_so(name, answer, request):
        told, n = said(name, answer, request.getfixturevalue(fixture))
        assert told == f'{answer.__name__}: right on {n} cases'

    @pytest.mark.parametrize('name, answer', wrong)
    def meets_a_counter_example(name, answer, request):
        told, _ = said(name, answer, request.getfixturevalue(fixture))
        assert re.search(counter_example, told)

    @pytest.mark.parametrize('name', answers)
    def says_so(name, request):
        lesson = request.getfixturevalue(fixture)
        assert said(name, lesson[name], lesson)[0] == f'{name}: not yet'

    return is_told_so, meets_a_counter_example, says_so


# ---- models and numbers


def tiny_model(vocab_size=3, d_model=8, max_len=8, **more):
    "A GPT of one layer and one head, for tests that only keep and open it"
    from llm_lab.gpt import GPTConfig, MiniGPT

    size = dict(vocab_size=vocab_size, d_model=d_model, n_layers=1, n_heads=1, max_len=max_len)
    return MiniGPT(GPTConfig(**size | more))


def shake(model, seed=0, by=0.15):
    """The same model, its weights moved by large random numbers, biases and gains of norms too.

    Fresh models have biases of 0 and gains of 1, and all their outputs are near each other: what
    is wrong would be within the tolerance."""
    import torch

    from llm_lab.core import rng

    draw = rng(seed, 'shaken')
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn(p.shape, generator=draw))
    return model


def shaken(cfg, seed=0, by=0.15):
    "A model of this config, evaluated and shaken"
    from llm_lab.gpt import MiniGPT

    return shake(MiniGPT(cfg, seed).eval(), seed, by)


def chat_model(max_len=400, marks=True, seed=0):
    "A model that has learned nothing, and a tokenizer of letters, with the marks of a chat"
    from llm_lab.chars import CharTokenizer
    from llm_lab.llama_block import llama
    from llm_lab.templates import with_marks

    tokenizer = CharTokenizer('abcdefghijklmnopqrstuvwxyz .?/[]\n', ['<|endoftext|>'])
    if marks:
        tokenizer = with_marks(tokenizer)
    size = dict(d_model=16, n_layers=2, n_heads=2, max_len=max_len)
    return shaken(llama(vocab_size=tokenizer.vocab_size, **size), seed), tokenizer


def near(a, b, eps=1e-5):
    "The largest difference is small beside the largest value of `b`, or beside 1"
    worst = (a - b).abs().max().item()
    assert worst <= eps * max(1.0, b.abs().max().item()), worst


# ---- errors


def one_line(call, *words, longest=700):
    "What the `LabError` of a call says: one line, not too long, with all these words"
    with pytest.raises(LabError) as e:
        call()
    said = str(e.value)
    assert '\n' not in said and len(said) < longest, said
    for word in words:
        assert word in said, said
    return said


# ---- files and folders


def file_hash(path):
    "SHA-256 of a file"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(folder):
    "{path inside: bytes} of each file of a folder"
    files = (p for p in sorted(folder.rglob('*')) if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def json_lines(path):
    "The lines of a .jsonl file"
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- the command line


def typed(*argv):
    """(exit code, stdout, stderr) of `llm-lab` with these words, in this process: PyTorch is there
    already"""
    from llm_lab.cli import main

    with redirect_stderr(io.StringIO()) as err, redirect_stdout(io.StringIO()) as out:
        try:
            code = main([str(a) for a in argv])
        except SystemExit as e:
            code = e.code
    return code, out.getvalue(), err.getvalue()


def printed(*argv, code=0):
    "(stdout, stderr) of `llm-lab`, which ends with this code; an error is one line"
    ended, out, err = typed(*argv)
    assert (ended or 0) == code, out + err
    assert not code or (err.startswith('llm-lab') and err.count('\n') == 1), out + err
    return out, err


def in_a_process(home, *argv, env=(), **how):
    "`llm-lab` with these words as a process of its own, which stands in `home`"
    clean = {k: v for k, v in os.environ.items() if k != 'LLM_LAB_DATA'}
    return subprocess.run(
        [sys.executable, '-m', 'llm_lab.cli', *map(str, argv)],
        env={**clean, 'LLM_LAB_HOME': str(home), **dict(env)},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=HANG,
        **how,
    )


def ended(pid):
    "How a child process has ended: its exit code, or minus the signal that ended it"
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
