"""What is chosen by a measurement: kernels, precision, threads.

What was chosen is written down and obeyed."""

import json
import math
import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from cases import ALL
from torch.nn import functional as F

from llm_lab import efficient, hardware, onednn, optim, runs
from llm_lab.config import RunConfig, TrainConfig, config_from_dict, check_resumable, read_config
from llm_lab.self_attention import Attention
from llm_lab.gpt import GPTConfig, MiniGPT
from llm_lab.onednn import onednn_linears
from llm_lab.self_attention import scaled_dot_product
from llm_lab.parts import part
from llm_lab.core import LabError, home, rng
from llm_lab.onednn import with_onednn, onednn_is_exact, onednn_is_faster
from llm_lab.hardware import fastest_threads, race
from llm_lab.optim import Muon, adamw, muon, short_precision
from llm_lab.efficient import StepRunner, step_memory
from llm_lab.runs import SingleProcess, set_batch_size, set_precision, set_threads, train_run
from llm_lab.train import next_token_loss, train_step

pytestmark = pytest.mark.usefixtures('one_thread')
TINY = (
    'data.corpus=own.txt',
    'length=16',
    'd_model=16',
    'n_layers=1',
    'n_heads=2',
    'train.steps=4',
    'batch_size=4',
    'eval.every=2',
    'eval.tokens=100',
    'eval.sample_tokens=5',
    'log.every=1',
    'checkpoint_every=2',
)
needs_onednn = pytest.mark.skipif(
    not onednn_is_exact(), reason="oneDNN's other way is not there, or is not float32's"
)


@pytest.fixture
def fresh():
    "Measured answers are forgotten, before and after"
    measured = onednn_is_exact, onednn_is_faster, short_precision
    for f in measured:
        f.cache_clear()
    yield
    for f in measured:
        f.cache_clear()


class Clock:
    "Time as a test wants it: `now` moves when a way is called"

    now = 0.0

    def __call__(self):
        return self.now

    def way(self, seconds):
        def work():
            self.now += seconds

        return work


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(hardware.time, 'perf_counter', clock)
    return clock


# --- kernels


def took(usual, quick):
    "`least_seconds` of a processor on which products take so long"
    return lambda ways, rounds=30: dict(zip(ways, (usual, quick)))


@pytest.mark.usefixtures('fresh')
@pytest.mark.parametrize(
    'usual, quick, exact, chosen',
    [
        (2.03, 1.0, True, True),  # 512 bits wide, and PyTorch's choice does not use them
        (1.07, 1.0, True, False),  # the same maker, the same name: nothing to gain
        (1.0, 1.02, True, False),
        (5.0, 1.0, False, False),
    ],
)  # fast, but with shorter numbers
def test_the_library_for_products_is_chosen_by_what_was_measured(
    monkeypatch, usual, quick, exact, chosen
):
    monkeypatch.setattr(onednn, 'onednn_is_exact', lambda: exact)
    monkeypatch.setattr(onednn, 'least_seconds', took(usual, quick))
    assert onednn_is_faster() is chosen


@pytest.mark.usefixtures('fresh')
@pytest.mark.parametrize(
    'bf16, amx, chosen', [(True, False, 'bf16'), (False, True, 'bf16'), (False, False, 'float32')]
)
def test_short_numbers_are_those_of_the_hardware(monkeypatch, bf16, amx, chosen):
    "By the instructions that there are: a clock would not say the same in every process"
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: bf16)
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx)
    monkeypatch.setattr(onednn, 'least_seconds', lambda *args, **kw: pytest.fail('measured'))
    assert short_precision() == chosen


def test_no_kernel_is_chosen_by_a_makers_name():
    for module in (hardware, onednn, optim, efficient, runs):
        assert not {'AuthenticAMD', 'GenuineIntel', 'vendor_id'} & set(
            open(module.__file__).read().split("'")
        )


@pytest.mark.usefixtures('fresh')
def test_what_is_measured_is_real_whatever_mode_the_caller_is_in(monkeypatch):
    """On shapes without content, in short numbers, while operations are counted: the answers of a
    plain caller"""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    seen = []

    def look(ways, rounds=30):
        seen.extend(type(work()) for work in ways.values())
        return dict.fromkeys(ways, 1.0)

    monkeypatch.setattr(onednn, 'least_seconds', look)
    plain = onednn_is_exact()
    onednn_is_exact.cache_clear()
    with (
        FakeTensorMode(),
        FlopCounterMode(display=False) as counter,
        torch.autocast('cpu', torch.bfloat16),
    ):
        assert onednn_is_exact() == plain
        onednn_is_faster(), short_precision()
    assert {*seen} == {torch.Tensor} and counter.get_total_flops() == 0


def test_least_seconds_are_the_least(clock):
    slow, n = clock.way(3.0), iter(range(99))

    def jumpy():
        clock.now += 1.0 if next(n) == 7 else 9.0  # other programs, all but once

    assert hardware.least_seconds(dict(slow=slow, jumpy=jumpy)) == dict(slow=3.0, jumpy=1.0)


@needs_onednn
@pytest.mark.parametrize('compile', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_by_onednn_is_the_model(monkeypatch, compile):
    """Where this processor would not choose it, too: gradients of the whole model, and the layers
    are as they were"""
    model = MiniGPT(GPTConfig(vocab_size=20, max_len=16, d_model=32, n_layers=2, tie=True))
    rows = torch.randint(20, (3, 17), generator=rng(0, 'r'))
    loss = torch.compile(next_token_loss) if compile else next_token_loss

    def gradients(quick):
        monkeypatch.setattr(onednn, 'onednn_is_faster', lambda: quick)
        model.zero_grad()
        with onednn_linears(model):
            assert ('forward' in vars(model.blocks[0].mlp.up)) is quick
            loss(model, rows).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    plain, quick = gradients(False), gradients(True)
    assert (plain - quick).norm() < 1e-5 * plain.norm() and 'forward' not in vars(
        model.blocks[0].mlp.up
    )


@needs_onednn
def test_the_setting_of_everybody_is_left_as_it_was():
    a, got = torch.randn(40, 50, generator=rng(0, 'a')), []

    def many():
        got.extend(with_onednn(torch.mm)(a, a.T) for _ in range(30))

    threads = [threading.Thread(target=many) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(got) == 90 and all(torch.equal(g, got[0]) for g in got)
    assert torch.backends.mkldnn.matmul.fp32_precision == 'none'


# --- attention where short numbers are asked for


def exactly(q, k, v, seen):
    "Attention in float64"
    i = torch.arange(k.shape[2])
    rep = q.shape[1] // k.shape[1]
    scores = q.double() @ k.double().repeat_interleave(rep, 1).mT * q.shape[-1] ** -0.5
    if seen is None:
        seen = i <= i[:, None]
    scores = (
        scores.masked_fill(~seen, -math.inf) if seen.dtype == torch.bool else scores + seen.double()
    )
    return scores.softmax(-1) @ v.double().repeat_interleave(rep, 1)


@pytest.mark.parametrize('asked', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('heads', [4, 2])
@pytest.mark.parametrize('mask', [None, 'bool', 'numbers'])
def test_attention_to_a_short_text_keeps_its_digits(asked, heads, mask):
    q = torch.randn(2, 4, 40, 8, generator=rng(0, 'q')).to(asked)
    k, v = torch.randn(2, 2, heads, 40, 8, generator=rng(0, 'kv')).to(asked)
    seen = None if mask is None else torch.ones(40, 40).tril(-3).bool() | torch.eye(40).bool()
    if mask == 'numbers':
        seen = torch.zeros(40, 40, dtype=asked).masked_fill(~seen, -math.inf)
    with torch.autocast('cpu', asked):
        found = scaled_dot_product(q, k, v, seen)
    assert found.dtype == torch.float32 and (found - exactly(q, k, v, seen)).abs().max() < 1e-5


def test_attention_to_a_long_text_and_in_other_numbers_is_as_it_is_asked():
    long = torch.randn(3, 1, 1, 600, 8, generator=rng(0, 'long'))
    with torch.autocast('cpu', torch.bfloat16):
        assert scaled_dot_product(*long).dtype == torch.bfloat16
        assert scaled_dot_product(*long[..., :30, :].double()).dtype == torch.float64
        assert torch.is_autocast_enabled('cpu')
    assert (
        scaled_dot_product(*long[..., :30, :]).dtype == torch.float32
        and scaled_dot_product(*long[..., :30, :].bfloat16()).dtype == torch.bfloat16
    )


# --- Muon


def test_muon_counts_in_what_the_processor_is_quick_at(monkeypatch):
    def moved(dtype, best='bf16'):
        monkeypatch.setattr(optim, 'short_precision', lambda device: best)
        w = torch.randn(32, 64, generator=rng(0, 'w')).requires_grad_()
        opt = Muon([w], lr=0.1, dtype=dtype) if dtype else Muon([w], lr=0.1)
        w.grad = torch.randn(32, 64, generator=rng(0, 'g'))
        opt.step()
        return w.detach()

    short, full = moved(torch.bfloat16), moved(torch.float32)
    assert torch.equal(moved(None, 'bf16'), short) and not torch.equal(short, full)
    for other in ('float32', 'fp16'):
        assert torch.equal(moved(None, other), full)


def test_a_plan_of_muons_memory_measures_nothing_that_is_not_there(fresh):
    assert (
        step_memory(GPTConfig(vocab_size=20, max_len=16, d_model=32, n_layers=1), 2, optimizer=muon)
        > 0
    )
    assert short_precision() in ('bf16', 'float32')


# --- races


def test_a_race_tells_the_median_of_each_and_leaves_out_who_is_far_behind(clock):
    calls = dict(slow=0, quick=0)

    def counted(name, work):
        def f():
            calls[name] += 1
            work()

        return f

    taken = race({n: counted(n, clock.way(s)) for n, s in dict(slow=0.4, quick=0.1).items()}, 0.2)
    assert taken == pytest.approx(dict(slow=0.4, quick=0.1))
    # a call to warm up and two, once and three times
    assert calls['slow'] == 3 and calls['quick'] == 9


def test_each_way_of_a_race_stands_in_its_own_context():
    inside = []

    @contextmanager
    def within(name):
        inside.append(name)
        yield
        inside.pop()

    seen = {1: set(), 2: set()}
    race({n: lambda n=n: seen[n].add(inside[-1]) for n in seen}, 0.0, within)
    assert seen == {1: {1}, 2: {2}} and not inside


# --- the keys


@pytest.mark.parametrize(
    'key, value',
    [
        ('threads', 'all'),
        ('threads', 0),
        ('threads', 2000),
        ('threads', 1.5),
        ('threads', True),
        ('batch_size', 'all'),
        ('batch_size', None),
        ('precision', 'fp8'),
        ('precision', None),
        ('precision', 16),
        ('steps', 'auto'),
        ('lr', 'auto'),
    ],
)
def test_a_wrong_choice_is_one_line(key, value):
    with pytest.raises(LabError, match=rf'^train\.{key}=') as e:
        config_from_dict(dict(train={key: value}))
    assert '\n' not in str(e.value) and ('auto' in str(e.value).partition(': ')[2]) == (
        key in ('threads', 'precision', 'batch_size')
    )


@pytest.mark.parametrize('way', ['file', 'line'])
def test_auto_can_be_given_in_a_file_and_on_the_command_line(way, tmp_path):
    (tmp_path / 'c.yaml').write_text(
        'train: {threads: auto, precision: auto}\n' if way == 'file' else 'train: {}\n'
    )
    cfg = read_config(
        tmp_path / 'c.yaml', () if way == 'file' else ('train.threads=auto', 'precision=auto')
    )
    assert (cfg.train.threads, cfg.train.precision) == ('auto', 'auto')
    assert read_config(
        tmp_path / 'c.yaml', ('threads=null', 'precision=bf16')
    ).train == TrainConfig(precision='bf16')


def test_it_is_off_unless_asked_for():
    assert (TrainConfig().threads, TrainConfig().precision) == (None, 'float32')
    with pytest.raises(LabError, match='choose from float32, bf16, fp16'):
        StepRunner(precision='auto')


def test_who_goes_on_keeps_what_was_chosen():
    old = RunConfig('x', train=TrainConfig(threads=3, precision='bf16'))
    asked = RunConfig('x', train=TrainConfig(threads='auto', precision='auto', steps=2000))
    assert check_resumable(old, asked).train == TrainConfig(threads=3, precision='bf16', steps=2000)
    with pytest.raises(LabError, match="^train.precision='float32': it was 'bf16'"):
        check_resumable(old, RunConfig('x'))


# --- precision

ASKED = dict(
    data=dict(length=16),
    model=dict(d_model=16, n_layers=1, n_heads=2),
    train=dict(precision='auto', batch_size=4),
)


def raced(monkeypatch, float32, bf16):
    "A processor on which a step takes so long"
    monkeypatch.setattr(runs, 'short_precision', lambda device='cpu': 'bf16')
    monkeypatch.setattr(runs, 'race', lambda ways, *rest: dict(float32=float32, bf16=bf16))


@pytest.mark.parametrize(
    'float32, bf16, chosen',
    [(1.0, 0.5, 'bf16'), (1.21, 1.0, 'bf16'), (1.1, 1.0, 'float32'), (1.0, 1.2, 'float32')],
)
def test_short_numbers_are_chosen_where_a_step_is_faster_by_a_margin(
    monkeypatch, float32, bf16, chosen
):
    raced(monkeypatch, float32, bf16)
    cfg, why = set_precision(config_from_dict(ASKED), 65, SingleProcess())
    assert cfg.train.precision == chosen and f'{float32 / bf16:.2f} times as fast' in why


@pytest.mark.parametrize('what', ['another loss', 'another gradient', 'no number', 'an error'])
def test_short_numbers_that_make_another_step_are_not_chosen(monkeypatch, what):
    raced(monkeypatch, 9.0, 1.0)
    said = {
        'another loss': [4.4, 1.0],
        'another gradient': [4.2, 3.0],
        'no number': [math.nan, 1.0],
    }

    @contextmanager
    def trial(cfg, vocab_size, precision):
        def work():
            if precision == 'bf16' and what == 'an error':
                raise RuntimeError('expected scalar type Float\nbut found BFloat16')
            return [4.2, 1.0] if precision == 'float32' else said[what]

        yield work

    monkeypatch.setattr(runs, '_trial', trial)
    cfg, why = set_precision(config_from_dict(ASKED), 65, SingleProcess())
    assert cfg.train.precision == 'float32' and 'in bf16' in why and '\n' not in why


def test_dropout_does_not_look_like_a_difference(monkeypatch):
    raced(monkeypatch, 9.0, 1.0)
    before = torch.get_rng_state()
    for seed in range(4):
        torch.manual_seed(seed)
        kind = dict(
            ASKED, model=dict(ASKED['model'], dropout=0.9), train=dict(ASKED['train'], batch_size=1)
        )
        assert (
            set_precision(config_from_dict(kind), 20, SingleProcess())[0].train.precision == 'bf16'
        )
    torch.set_rng_state(before)


def test_without_hardware_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(runs, 'short_precision', lambda device='cpu': 'float32')
    monkeypatch.setattr(runs, '_trial', None)
    cfg, why = set_precision(config_from_dict(ASKED), 65, SingleProcess())
    assert cfg.train.precision == 'float32' and 'no hardware' in why


@pytest.mark.parametrize('best', ['bf16', 'fp16', 'float32'])
def test_another_device_is_asked_and_not_raced(monkeypatch, best):
    monkeypatch.setattr(runs, 'short_precision', lambda device: best)
    monkeypatch.setattr(runs, 'race', None)
    monkeypatch.setattr(runs, 'all_gather_json', lambda engine, x: [x])
    engine = SingleProcess()
    engine.device = torch.device('meta')
    cfg, why = set_precision(config_from_dict(ASKED), 65, engine)
    assert cfg.train.precision == best and 'meta' in why


def test_one_process_chooses_for_all(monkeypatch):
    "The second one hears it, though it would have found another answer"

    class Second(SingleProcess):
        is_main_process, process_index, num_processes = False, 1, 2

        def gather(self, x):
            first = torch.frombuffer(
                bytearray(json.dumps(['bf16', 'twice as fast']).encode().ljust(1024)),
                dtype=torch.uint8,
            )
            return torch.cat([first[None], x])

    monkeypatch.setattr(runs, '_measured_precision', None)
    cfg, why = set_precision(config_from_dict(ASKED), 65, Second())
    assert (cfg.train.precision, why) == ('bf16', 'twice as fast')


def test_a_trial_is_the_step_of_the_run_and_leaves_no_trace():
    """Same loss and gradient as the first step of a run; the streams, the model's layers and the
    weights of others stay"""
    cfg = config_from_dict(
        dict(
            data=dict(length=16),
            model=dict(d_model=16, n_layers=1, n_heads=2, dropout=0.5),
            train=dict(batch_size=4),
        )
    )
    before = torch.get_rng_state()
    with runs._trial(cfg, 20, 'float32') as work:
        found = [work() for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(math.isfinite(x) for pair in found for x in pair)
    with runs._trial(cfg, 20, 'bf16') as work:
        short = work()
    assert short[0] == pytest.approx(found[0][0], rel=0.3)
    model = MiniGPT(runs.model_config(cfg, 20), cfg.train.seed)
    rows = torch.randint(20, (4, 17), generator=rng(0, 'trial'))
    loss, length = train_step(model.eval(), adamw(model), rows)
    assert found[0][0] == pytest.approx(loss.item(), rel=0.2)


# --- threads


def test_auto_threads_are_raced_and_null_are_those_there_are(monkeypatch):
    monkeypatch.setattr(runs, 'fastest_threads', lambda work: work() and 3)
    old = torch.get_num_threads()

    def of(said, tune=False, engine=SingleProcess()):
        cfg = config_from_dict(
            dict(
                data=dict(length=8),
                model=dict(d_model=8, n_layers=1, n_heads=1),
                train=dict(said, batch_size=2),
            )
        )
        try:
            return set_threads(cfg, 20, engine, tune).train.threads, torch.get_num_threads()
        finally:
            torch.set_num_threads(old)

    assert (
        of(dict(threads='auto'))
        == of({}, tune=True)
        == of(dict(threads='auto', precision='auto'))
        == (3, 3)
    )
    assert of({}) == (old, old) and of(dict(threads=2), tune=True) == (2, 2)
    two = SingleProcess()
    two.num_processes = 2
    assert of(dict(threads='auto'), engine=two) == (old, old)  # the others would be measured, too


# --- the batch


def test_a_batch_is_searched_for_on_cuda_alone(home):
    (home / 'own.txt').write_text('the cat sat on the mat. ' * 200)
    with pytest.raises(LabError, match='^train.batch_size=auto: .* on CUDA .* is cpu; give a num'):
        train_run(None, *TINY, 'batch_size=auto')
    assert sorted(p.name for p in home.rglob('*')) == ['own.txt']  # before anything is packed


@pytest.mark.parametrize('masked', [False, True])
def test_the_batch_is_the_largest_power_of_2_for_each_part_and_process(masked, monkeypatch):
    "On a device that is none: what is searched with makes its steps, of shapes alone"
    needed = []

    def fits(cfg, device, **how):
        needed.extend(step_memory(cfg, n, **how) for n in (1, 2))
        return 21

    monkeypatch.setattr(runs, 'largest_batch', fits)
    monkeypatch.setattr(runs, 'preserve_rng', lambda device: nullcontext())
    engine = SimpleNamespace(device=torch.device('cuda'), num_processes=2)
    monkeypatch.setattr(runs, 'all_gather_json', lambda engine, rows: [rows, rows - 3])
    train = dict(batch_size='auto', accumulate=3, recompute=True, precision='bf16')
    train |= dict(start_from='x', lora=dict(rank=2))
    asked = dict(ASKED, data=dict(length=16, mask_documents=masked), train=train)
    cfg = set_batch_size(config_from_dict(asked), 65, engine, end=(3,))
    assert cfg.train.batch_size == 16 * 3 * 2 and 0 < needed[0] < needed[1]
    assert set_batch_size(cfg, 65, SingleProcess()) is cfg  # a number is left alone


def test_the_batch_that_was_found_is_written_down_and_kept(home, monkeypatch):
    (home / 'own.txt').write_text('the cat sat on the mat. ' * 200)
    monkeypatch.setattr(runs, '_require_cuda', lambda cfg, engine: None)
    monkeypatch.setattr(runs, 'largest_batch', lambda *a, **kw: 3)
    words = [word for word in TINY if not word.startswith('batch_size')] + ['batch_size=auto']
    job = train_run(None, *words, run='a')
    assert job.cfg.train.batch_size == 2 and 'plan    4 steps of 2 × 16' in repr(job)
    assert read_config(job.folder / 'config.yaml').train.batch_size == 2
    monkeypatch.setattr(runs, 'largest_batch', None)  # nobody searches again
    again = train_run(None, *words, 'train.steps=6', run='a', resume='')
    assert again.run.step == 6 and again.cfg.train.batch_size == 2


def test_whoever_sets_the_variable_decides(monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setattr(hardware, 'race', None)
    assert fastest_threads(lambda: None) == torch.get_num_threads()


# --- a whole run


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.setenv('LLM_LAB_HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'own.txt').write_text(
        '\n\n'.join(f'{n} sheep and {n + 1} goats went home.' for n in range(300))
    )
    return tmp_path


def weights(job):
    return torch.cat([p.detach().flatten() for p in job.run.model.parameters()])


@pytest.mark.parametrize('float32, bf16', [(1.0, 1.1), (2.0, 1.0)])
def test_a_run_says_what_it_chose_writes_it_down_and_goes_on_with_it(
    desk, monkeypatch, capsys, float32, bf16
):
    raced(monkeypatch, float32, bf16)
    chosen = 'bf16' if bf16 < float32 else 'float32'
    auto = (*TINY, 'train.precision=auto', 'train.threads=auto')
    whole = train_run('smoke', *auto, run='whole')
    said = capsys.readouterr().out
    assert f'1 threads, {chosen}' in said and 'times as fast' in said
    text = (whole.folder / 'config.yaml').read_text()
    assert f'precision: {chosen}\n' in text and 'threads: 1\n' in text and 'auto' not in text
    assert whole.step.precision == chosen
    half = train_run('smoke', *auto, 'train.steps=2', run='half')
    raced(monkeypatch, bf16, float32)  # another measurement would say the opposite
    again = train_run(
        'smoke', 'train.steps=4', 'train.precision=auto', 'train.threads=auto', resume=half.folder
    )
    assert again.run.step == 4 and again.cfg.train.precision == chosen == again.step.precision
    assert 'times as fast' not in capsys.readouterr().out.partition('half')[2].partition('half')[2]
    bare = train_run('smoke', 'train.steps=4', resume=again.folder)
    assert bare.cfg.train == again.cfg.train
    # a schedule is made for its steps, so the whole run is not the half one: the same steps again
    # from the start are
    other = train_run('smoke', *TINY, f'train.precision={chosen}', run='named')
    assert torch.equal(weights(other), weights(whole))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['golden', 'smoke'])
def test_a_command_with_auto_ends_well(name, desk):
    "Slow: a real measurement in a process of its own"
    command = [
        sys.executable,
        '-m',
        'llm_lab.cli',
        'train',
        'smoke',
        'train.precision=auto',
        'train.threads=auto',
        'train.steps=20',
        *(
            ()
            if name == 'smoke'
            else ('optimizer=adamw', 'accumulate=2', 'recompute=true', 'dropout=.1', 'preset=llama')
        ),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = next((home() / 'experiments' / 'smoke' / 'runs').glob('*/config.yaml')).parent
    train = read_config(folder).train
    assert (
        train.precision in ('float32', 'bf16')
        and f'{train.threads} threads, {train.precision}' in done.stdout
    )


def reference_step(model, rows):
    "The gradient of autocast alone"
    with torch.autocast('cpu', torch.bfloat16):
        loss = next_token_loss(model, rows)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize('pattern', [None, 'near'] if ALL else [None])
def test_a_step_in_bf16_is_near_the_step_in_float32(pattern):
    "Nearer than with attention in bf16, too"

    def near(i, j, size=5):
        return (j <= i) & (i - j < size)

    attn = part(Attention, mask=part(near)) if pattern else GPTConfig().attn
    model = MiniGPT(
        GPTConfig(vocab_size=20, max_len=32, d_model=32, n_layers=2, n_heads=4, attn=attn)
    )
    rows = torch.randint(20, (4, 33), generator=rng(1, 'r'))
    next_token_loss(model, rows).backward()
    full = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    short = reference_step(model, rows)
    assert 0 < (short - full).norm() < 0.02 * full.norm()
    assert F.cosine_similarity(short, full, 0) > 0.999


@pytest.mark.slow
def test_a_compiled_step_in_bf16_keeps_attention_in_float32(capsys):
    "Slow: a compiler makes half a minute of C++. In one piece, and it is the plain step"
    rows = torch.randint(20, (4, 17), generator=rng(2, 'r'))

    def after(compile):
        model = MiniGPT(GPTConfig(vocab_size=20, max_len=16, d_model=32, n_layers=1, n_heads=2))
        opt = adamw(model, lr=1e-3)
        step = StepRunner(precision='bf16', compile=compile)
        losses = [step(model, opt, rows)[0].item() for _ in range(3)]
        return losses, torch.cat([p.detach().flatten() for p in model.parameters()])

    breaks = torch._dynamo.utils.counters['graph_break']
    breaks.clear()
    (plain, a), (fast, b) = after(False), after(True)
    assert 'not compiled' not in capsys.readouterr().out and not breaks, breaks
    assert fast == pytest.approx(plain, abs=2e-3) and (a - b).norm() < 0.02 * a.norm()
