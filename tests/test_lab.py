"""Tools of `hardware` where a plain run of the chapter cannot see a slip: other devices, notebooks,
containers, large files"""

from pathlib import Path

import pytest
import torch

from llm_lab import core, files, hardware
from llm_lab.core import LabError, progress, seeded_rng
from llm_lab.files import check_size, json_of
from llm_lab.hardware import memory_left


def test_a_seed_for_the_processor_moves_no_other_device(monkeypatch):
    "`torch.manual_seed` would: it reaches every GPU, whose stream is not put back afterwards"
    monkeypatch.setattr(torch, 'manual_seed', lambda seed: pytest.fail('all devices were moved'))
    before = torch.get_rng_state()
    with seeded_rng(0, 'dropout'):
        first = torch.rand(3)
    with seeded_rng(0, 'dropout'):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize('notebook', [True, False])
def test_progress_needs_no_length(notebook, monkeypatch):
    told = []

    class Live:
        def __call__(self, text):
            told.append(text)

        def close(self, text):
            told.append(text)

    monkeypatch.setattr(core, 'in_notebook', lambda: notebook)
    monkeypatch.setattr(core, 'StatusLine', Live)
    assert [*progress((n for n in range(3)), 'count')] == [0, 1, 2]
    assert not notebook or told[-1] == 'count: 3'
    assert [*progress([7, 8], 'count')] == [7, 8] and (not notebook or told[-1] == 'count: 2 of 2')


def test_files_that_were_read_are_no_used_memory(tmp_path, monkeypatch):
    "A container of 1,000 bytes, 900 of them used, 600 of those for files that can go"
    group = tmp_path / 'cgroup'
    group.mkdir()
    for name, text in (
        ('memory.max', '1000'),
        ('memory.current', '900'),
        ('memory.stat', 'anon 300\ninactive_file 600\n'),
    ):
        (group / name).write_text(text)
    monkeypatch.setattr(hardware, 'Path', lambda p: group if p == '/sys/fs/cgroup' else Path(p))
    assert memory_left() == 700
    (group / 'memory.max').write_text('max')
    assert memory_left() > 1000


NUMBERS = b'[' + b'999,' * 9_000_000 + b'9]'
# one such letter: four bytes for each
WIDE = '["' + 'x' * 60_000_000 + '\U0001f600"' + ',""' * 2_000_000 + ']'


@pytest.mark.parametrize('data', [NUMBERS, WIDE.encode()], ids=['numbers', 'wide letters'])
def test_what_json_would_take_is_known_before_it_is_read(data):
    """Both are smaller than the largest file that is read, and would take more than five times as
    much"""
    assert len(data) < files.MOST_JSON
    with pytest.raises(LabError, match='more than any file of its kind'):
        check_size(data)


def test_json_that_takes_less_is_read():
    check_size(WIDE.replace('\U0001f600', 'x').encode())
    check_size(NUMBERS[: len(NUMBERS) // 2])


def test_a_reader_of_json_keeps_its_own_remedy():
    def read(data):
        raise LabError('a twin: take one away')

    with pytest.raises(LabError, match='^a twin: take one away$'):
        json_of(b'{}', read=read)
