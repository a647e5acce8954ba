"""Which test runs when, and how far we are: a plugin of pytest that `tests/conftest.py` registers.

With `-n 2 --dist loadgroup --no-loadscope-reorder`, as `make test` calls it, two workers take
chapters and tests from one queue. Tests that share a dear fixture stay together, so that it is
made once; then the longest come first, so that no core idles at the end. Whatever opens the model
that chapters share is left in the queue until the test that trains it has ended: a worker that
took it before would only wait. How long each took is kept in .pytest_cache; for the first run on a
machine, `tools/seconds.json` says it roughly. Only its order matters.

    python tools/plan.py      write what the last run measured into tools/seconds.json
"""

import inspect
import json
import re
import threading
import time
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HINTS = ROOT / 'tools' / 'seconds.json'
KEPT, GROUPS, NEED = 'llm_lab/seconds', 'llm_lab/groups', 'llm_lab/need'  # in pytest's cache
UNKNOWN = 1.0  # seconds for a test that nobody has measured
FIRST = 'test_notebooks.py::test_the_model_that_chapters_share_is_trained'
SHARED = re.compile(r'\btales_model\b')  # who names it in code opens that model, or trains it
QUOTED = re.compile(r"""['"](\w+)['"]""")


def short(nodeid):
    """The name of a test as the tables have it: without the folder, and without the group that
    xdist appends"""
    if nodeid.rfind('@') > nodeid.rfind(']'):
        nodeid = nodeid.rpartition('@')[0]
    return nodeid.rpartition('tests/')[2]


def hints():
    return json.loads(HINTS.read_text(encoding='utf-8')) if HINTS.exists() else {}


def shared(item):
    "The dear fixtures of a test: of its own file, made once for several tests"
    for name in item.fixturenames:
        for made in item._fixtureinfo.name2fixturedefs.get(name, ())[-1:]:
            if made.scope != 'function' and made.baseid.endswith('.py'):
                yield f'{made.baseid}::{name}'


def groups(items):
    """The items in lists, one for those that share a fixture or a mark `xdist_group`, directly or
    through others"""
    parent = {}

    def root(key):
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    for item in items:
        marks = [f'mark::{m.args[0]}' for m in item.iter_markers('xdist_group')]
        for key in (*shared(item), *marks):
            parent[root(key)] = root(item.nodeid)
    found = defaultdict(list)
    for item in items:
        found[root(item.nodeid)].append(item)
    return [*found.values()]


source_of = cache(inspect.getsource)  # a test with parameters is one function, and many items


@cache
def opens_shared(notebook):
    "Does a code cell of the notebook name the model that chapters share?"
    cells = json.loads(Path(notebook).read_text(encoding='utf-8'))['cells']
    return any(SHARED.search(''.join(c['source'])) for c in cells if c['cell_type'] == 'code')


@cache
def chapters(folder):
    "{stem: does it open the shared model?} of the notebooks in `folder`"
    return {p.stem: opens_shared(p) for p in sorted(folder.glob('*.ipynb'))}


def needs_shared(item, folder=ROOT / 'nbs'):
    """Does the test open the model that chapters share? It names the model, or it is given, or
    names in quotes, a chapter that opens it"""
    if short(item.nodeid) == FIRST:
        return False
    if SHARED.search(source := source_of(item.function)):
        return True
    given = [*getattr(getattr(item, 'callspec', None), 'params', {}).values()]
    if any(isinstance(o, Path) and o.suffix == '.ipynb' and opens_shared(o) for o in given):
        return True
    stems = {o for o in given if isinstance(o, str)} | {*QUOTED.findall(source)}
    return any(opens for stem, opens in chapters(folder).items() if stem in stems)


def in_order(items, seconds):
    "The items, group by group: first what others wait for, then the longest group"

    def rank(group):
        cost = sum(seconds.get(short(o.nodeid), UNKNOWN) for o in group)
        return not any(short(o.nodeid) == FIRST for o in group), -cost

    return [item for group in sorted(groups(items), key=rank) for item in group]


def scheduler(config, log):
    """Hands out whole groups, and those that need the shared model when it is there. xdist's own
    way to tell groups, a suffix of a test's name, does nothing since pytest 9.2"""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def schedule(self):
            if self.collection is None:
                # all workers have collected, and so have written the same
                kept = getattr(config, 'cache', None)
                self.known = kept.get(GROUPS, {}) if kept else {}
                self.need = {*kept.get(NEED, [])} if kept else set()
            super().schedule()

        def _split_scope(self, nodeid):
            return str(self.known.get(nodeid, nodeid))

        def in_training(self):
            "Has a worker the test that trains the shared model, and has it not ended?"
            return any(
                short(nodeid) == FIRST and not ended
                for units in self.assigned_work.values()
                for unit in units.values()
                for nodeid, ended in unit.items()
            )

        def _assign_work_unit(self, node):
            if self.need and self.in_training():
                # the first that can begin now; where all need the model, they wait
                ready = (o for o, unit in self.workqueue.items() if not self.need & unit.keys())
                if (scope := next(ready, None)) is not None:
                    self.workqueue.move_to_end(scope, last=False)
            super()._assign_work_unit(node)

    return Groups(config, log)


def minutes(seconds):
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


class Plan:
    "Orders the tests, tells how far they are, and keeps how long each took"

    def __init__(self, config, every=20.0):
        self.config, self.every = config, every
        self.seconds = {
            **hints(),
            **(config.cache.get(KEPT, {}) if getattr(config, 'cache', None) else {}),
        }
        self.took = defaultdict(float)
        self.running = {}
        self.names = []
        self.begun, self.ended = time.monotonic(), threading.Event()

    # ---- the order

    @pytest.hookimpl(wrapper=True)
    def pytest_collection_modifyitems(self, config, items):
        done = yield  # first -m and -k have their say
        if not config.getoption('loadgroup', False):
            return done  # xdist sets it in a worker
        items[:] = in_order(items, self.seconds)
        if getattr(config, 'cache', None):
            config.cache.set(
                GROUPS, {o.nodeid: n for n, group in enumerate(groups(items)) for o in group}
            )
            config.cache.set(NEED, [o.nodeid for o in items if needs_shared(o)])
        return done

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config, log):
        if config.getoption('dist') == 'loadgroup':
            return scheduler(config, log)

    # ---- how far we are; these are called where the workers report to

    def left(self, now):
        "Seconds to the end, if the rest is as much slower than the table says as what is done was"
        if not self.names:
            return None
        said = {n: self.seconds.get(n, UNKNOWN) for n in self.names}
        done = [n for n in self.took if n not in self.running and n in said]
        spent = sum(self.took[n] for n in done)
        # at first, the table is all we know
        slower = (spent + 30) / (sum(said[n] for n in done) + 30)
        rest = sum(slower * said[n] for n in said.keys() - {*done} - self.running.keys())
        rest += sum(
            max(0.0, slower * said.get(n, UNKNOWN) - (now - t))
            for n, t in list(self.running.items())
        )
        return rest / max(1, len(self.running))  # each worker runs one of them

    def line(self):
        now = time.monotonic()
        left = self.left(now)
        slow = sorted(((now - t, n) for n, t in list(self.running.items())), reverse=True)
        done = (
            f'{len(self.took.keys() - self.running.keys())} of {len(self.names)} tests in '
            f'{minutes(now - self.begun)}'
        )
        rest = f', about {minutes(left)} left' if left is not None else ''
        return f'{done}{rest}; still running: ' + (
            ', '.join(f'{n}, {t:.0f} s' for t, n in slow) or 'nothing yet'
        )

    def tell(self):
        out = self.config.pluginmanager.get_plugin('terminalreporter')
        while not self.ended.wait(self.every):
            out.ensure_newline()
            out.write_line(self.line())

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        if self.names:
            return
        self.names = [*map(short, ids)]
        threading.Thread(target=self.tell, daemon=True).start()

    def pytest_runtest_logstart(self, nodeid):
        self.running[short(nodeid)] = time.monotonic()

    def pytest_runtest_logreport(self, report):
        name = short(report.nodeid)
        self.took[name] += report.duration
        if report.when == 'teardown':
            self.running.pop(name, None)

    def pytest_sessionfinish(self):
        self.ended.set()
        if (
            hasattr(self.config, 'workerinput')
            or not self.took
            or not getattr(self.config, 'cache', None)
        ):
            return
        old = self.config.cache.get(KEPT, {})
        self.config.cache.set(KEPT, {**old, **{k: round(v, 2) for k, v in self.took.items()}})


def pytest_configure(config):
    config.pluginmanager.register(Plan(config))


if __name__ == '__main__':
    kept = json.loads((ROOT / '.pytest_cache' / 'v' / KEPT).read_text(encoding='utf-8'))
    lines = [
        f'  {json.dumps(k)}: {round(v)}'
        for k, v in sorted(kept.items(), key=lambda o: (-round(o[1]), o[0]))
        if v >= 2
    ]
    HINTS.write_text('{\n' + ',\n'.join(lines) + '\n}\n', encoding='utf-8', newline='\n')
    print(f'{HINTS.relative_to(ROOT)}: {len(lines)} tests of two seconds and more')
