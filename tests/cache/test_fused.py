"""A policy's text compiled: what is, what is not, and that both ways decide the same to the last bit."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim import registry, threads
from kvsim.cache import fused, kernels
from kvsim.cache.cache import Cache
from kvsim.cache.demand import Use
from kvsim.cache.table import COLUMNS, Table
from kvsim.cache.tiers import Capacity
from kvsim.cache.view import View
from kvsim.errors import PolicyError
from kvsim.testing import ReferenceCache, tiny_trace
from kvsim.testing.nested import compare_sizes
from tests.helpers import matrix_trace, policy_for
from tests.strategies import traces

LAGGED = "lazy-eviction(window=3, alpha=0.05)"
WHOLE = ("full", "fifo", "lru", "streaming-llm(sink=1)", "h2o", "h2o(recent=2)", "tova", LAGGED)
PARTS = ("lfu", "sieve")  # observe, score
LAZY = "lazy-eviction(window=2, alpha=0.1, dtype='fp16', tie='oldest')"


def compiled(policy) -> set[str]:
    found = set()
    for hook in ("observe", "score"):
        try:
            fused.translate(policy, hook)
            found.add(hook)
        except fused.Refused:
            pass
    return found


def test_one_number_or_another_array_into_some_pages():
    """NumPy takes only the former, so the latter is left to NumPy, to say so."""

    class Some(EveryForm):
        def observe(self, view):
            view["c0"][view.key > 1] = view.mass

    assert compiled(Some()) == {"score"}


@pytest.mark.parametrize("spec", WHOLE)
def test_what_needs_one_page_alone_is_compiled(spec):
    policy = registry.build(spec)
    assert compiled(policy) == {hook for hook in ("observe", "score") if hasattr(policy, hook)}


def test_what_could_differ_stays_numpys():
    assert compiled(registry.build("lazy-eviction(tie='oldest')")) == {"observe"}  # its score sorts
    assert compiled(registry.build("lfu")) == {"observe"}  # its score calls a function
    assert compiled(registry.build(LAZY)) == set()  # half precision
    assert compiled(registry.build("sieve")) == {"score"}
    assert compiled(registry.build("random")) == compiled(registry.build("belady")) == set()


# -- both ways ---------------------------------------------------------------------------------------------------


def run(trace, policy, budget, fusing, check=True, **regime):
    """Everything that a step leaves behind, by step: of the table, what a policy or the engine may look at."""
    request = trace.requests()[0]
    cache = Cache(
        trace.lanes, request.stride, policy, Capacity(budget), page_size=trace.page_size, audit=True, **regime
    )
    cache.fusing = fusing
    text = policy.policy if getattr(policy, "passes_on", False) else policy
    kept = {*COLUMNS} if regime.get("offload") else {"key", "copies", *fused.columns_read(text)}
    if not regime.get("offload") and "score" in compiled(text):
        kept.discard("weights")  # of this step alone: if nothing else looks, they are nowhere but in the pass
    for a in request.accesses():
        out = cache.access(a)
        t = cache.table
        columns = [getattr(t, name) for name in COLUMNS if name in kept] + list(t.private.values())
        numbers = [getattr(out, n) for n in ("total", "hit", "attended", "used", "found", "held", "resident", "read")]
        yield [x.copy() for x in columns + numbers] + [np.array(out.dropped), np.array(cache.view.state_bytes)]
    assert not check or (cache.fused is not None) == fusing


@st.composite
def policies(draw):
    spec = draw(st.sampled_from((*WHOLE, *PARTS)))
    attributes = {"granularity": draw(st.sampled_from(("head", "layer", "token")))}
    attributes["rows"] = draw(st.sampled_from(("visible", "full")))
    if "lazy" not in spec:
        attributes |= {"lag": draw(st.integers(1, 3)), "batch": draw(st.integers(1, 3))}
    attributes |= {n: draw(st.sampled_from((0.0, 0.34))) for n in ("protect_head", "protect_tail")}
    return spec, attributes


def compare(trace, spec, attributes, budget, **regime):
    one, two = (
        run(trace, policy_for(spec, **attributes), budget, fusing, **{n: make() for n, make in regime.items()})
        for fusing in (False, True)
    )
    for step, (left, right) in enumerate(zip(one, two, strict=True)):
        for x, y in zip(left, right, strict=True):
            assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), f"step {step}"


@settings(deadline=None, max_examples=150)
@given(traces(page_sizes=(1, 1, 4, 16)), policies(), st.integers(5, 9))
def test_lossy(trace, policy, budget):
    compare(trace, *policy, budget, use=lambda: Use("weight", 0.1))


@settings(deadline=None, max_examples=30)
@given(traces(page_sizes=(1, 4)), st.sampled_from(("lru", "h2o", "tova", LAGGED, "lfu")), st.integers(5, 9))
def test_a_wrapper_that_passes_its_hooks_on(trace, inner, budget):
    compare(trace, f"lag(inner={inner!r}, every=2)", {}, budget)


@settings(deadline=None, max_examples=50)
@given(traces(), policies(), st.integers(5, 9))
def test_offload(trace, policy, budget):
    demand = Use("topk", 3)
    compare(trace, *policy, budget, offload=lambda: registry.build("spill", "offload"), demand=lambda: demand)


# -- types go by NumPy's rules -------------------------------------------------------------------------------------


@dataclass
class EveryForm:
    """All forms and mixtures of types that are translated, one column each."""

    factor: float = 0.1
    shift: int = 3
    mode: str = "on"
    columns = {f"c{i}": kind for i, kind in enumerate(
        ("f4", "f4", "f4", "f4", "f8", "f8", "f8", "i4", "i4", "i4", "i8", "i8", "u4",
         "u1", "?", "?", "f4", "i4", "f4", "f8", "f4", "i4", "i4", "f4", "f8", "f4", "f4", "i8", "?", "?")
    )}  # fmt: skip

    def observe(self, view):
        if view.now == 0:
            return
        view["c0"][:] = view.mass * self.factor + view.weights
        view["c1"][:] = view.mass / (view.uses + 1)  # float32 by int32 is float64
        view["c2"][:] = np.float32(0.1) * view.mass - 0.3
        view["c3"][:] = view.uses / 7
        view["c4"][:] = view.mass * self.factor
        view["c5"][:] = view.mass * np.float64(0.1)
        view["c6"][:] = view.key.astype(np.float64) / (view.now + 1) * np.float64(1e300) * 1e300
        view["c7"][:] = view.key * np.int32(2147483647) + view.born  # wraps
        view["c8"][:] = np.where(view.mass > self.factor, view.now, view.born - self.shift)
        view["c9"][:] = -view.key ^ view.uses
        view["c10"][:] = view.key.astype(np.int64) * 100000000
        view["c11"][:] = np.maximum(view.last, view.now - 1) | np.int64(1)
        view["c12"][:] = view.key.astype(np.uint32) * np.uint32(0x9E3779B1)
        view["c13"][:] = view["c13"] + np.uint8(200)
        view["c14"][:] = (view.mass >= 0.25) & ~(view.key == view.newest) | (view.uses != 1)
        view["c15"][:] = view["c15"] | view["c14"]
        view["c3"][view.key < self.shift] = self.factor - 1
        mass = view["c16"]
        with np.errstate(all="ignore"):
            mass += view.weights * view["c14"]
        np.minimum(view["c22"], view.uses, out=view["c21"])
        if self.mode == "on":
            view["c17"][:] += view.born == view.now
        else:
            view["c17"][:] = 5
        one, two = view["c18"], np.where(view["c14"], 1.5, view.key)
        one[:] = two * view.page_size
        one[view["c15"]] = np.float64(0.1)
        view["c19"][:] = np.where(view["c15"], view.mass, view.key)
        view["c20"][:] = np.float32(view.key) * view.tokens
        view["c21"][:] *= self.shift
        view["c22"][:] = view.keys - view.key
        view["c23"][:] = 2.5
        view["c24"][:] = (view.now - 1) / (view.keys + 0.5) + view.key
        before, single = view["c25"].astype(np.float32), np.float32(view["c25"])  # a copy, and the column itself
        view["c25"][:] = view.weights
        view["c26"][:] = (view["c25"] - before) * single
        wide = view["c27"] * np.int64(6364136223846793005) - view.key  # wraps, and is compared
        view["c27"][:] = wide
        view["c28"][:] = wide < view["c27"] - np.int64(9223372036854775807)
        view["c29"][:] = -wide < 0

    def score(self, view):
        low = np.float32(view["c24"]) - view["c1"]
        return np.where(view["c14"], low, -view["c6"]) + view["c16"]


def test_every_form_as_numpy_computes_it():
    """The loops against the text itself, on columns drawn at random."""
    policy = EveryForm()
    table = Table(6, 40, policy.columns)
    rng = np.random.default_rng(0)
    for x in (*(getattr(table, n) for n in COLUMNS[2:]), *table.private.values()):
        x[:] = rng.integers(0, 6, x.shape) if x.dtype.kind != "f" else rng.normal(size=x.shape)
    table.key[:] = rng.permuted(np.tile(np.arange(-1, 39, dtype=np.int32), (6, 1)), axis=1)
    table.copies[:] = table.key >= 0
    table.uses[:, ::7] = 2**31 - 1
    view = View(table, (2, 3), 4, 0)
    view.now, view.keys, view.tokens = 5, 39, 153
    loops = fused.fuse(policy, np.inf)
    before = {n: x.copy() for n, x in table.private.items()}
    with np.errstate(all="ignore"):
        policy.observe(view)
        score = np.broadcast_to(policy.score(view), (2, 3, 40)).reshape(6, 40).astype(np.float32)
    right = {n: x.copy() for n, x in table.private.items()}
    for n, x in table.private.items():
        x[:] = before[n]
    loops.observes(0, 6, *loops.arguments(table, view))
    for n, x in table.private.items():
        assert x.tobytes() == right[n].tobytes(), n
    out, counts = np.empty((6, 39), np.int32), np.empty(6, np.int64)
    most = table.copies, 0, np.arange(1, 7), np.zeros(6, np.int64), np.full(6, 99), -1, out, counts
    loops.victims(0, 6, *most, *loops.arguments(table, view))
    scores = np.empty((6, 40), np.float32)
    loops.scores(0, 6, scores, *loops.arguments(table, view))
    assert scores.tobytes() == score.tobytes()
    for lane in range(6):
        there = np.flatnonzero(table.key[lane] >= 0)
        order = there[np.lexsort((table.key[lane][there], score[lane][there]))]
        assert set(out[lane, : counts[lane]]) == set(order[: lane + 1])


@pytest.mark.parametrize(
    "score",
    [
        lambda self, view: view.key,  # no text of its own
        "return np.exp(view.mass)",
        "return view.mass.sum(-1, keepdims=True)",
        "return view.mass[..., ::-1]",
        "return np.where(view.mass, 1, 0)",
        "return view.key // 2",
        "return view.mass.astype(np.int32)",  # a float as an integer
        "return view.mass.astype(np.float16)",
        "return view.key if view.now == 1 else view.mass",
        "for _ in (1, 2): pass\nreturn view.key",
        "if view.now == 0:\n    return view.key",  # no return in other steps
        "return view.key * self.unheard_of",
        "return view.fact('size')",
        "view.now = 3\nreturn view.key",
        "view['heat'][:] = 1\nreturn view.key",  # score may not write, so it is left to say so
        "np = view\nreturn np.key",
        "return view.prompt",
        "return (view.now * 2**40) + view.key",
        "return view.mass * LIMIT",  # a module's variable may change while it runs
        "return view['my-heat']",  # no name for a loop's array
        "return view['\\ufb01']",  # Python reads it as fi
        "return np.maximum(view.mass, 0.0)",  # of two zeros either may be the larger
        "return view.key * (view.now + 2147483647)",  # a whole number that a column cannot hold
        "with np.errstate(divide='raise'):\n    return 1 / view.mass",
        "return view['swapped']",
    ],
)
def test_any_other_text_is_refused(score, tmp_path):
    policy = policy_for("lru")
    if isinstance(score, str):
        body = score.replace("\n", "\n        ")
        text = "import numpy as np\nfrom kvsim.registry import policy\n\nLIMIT = 2.5\n\n@policy('own')\nclass Own:\n"
        text += "    columns = dict.fromkeys(('heat', 'my-heat', '\\ufb01'), np.float32) | {'swapped': '>f4'}\n"
        text += f"    def score(self, view):\n        {body}\n"
        (tmp_path / "own.py").write_text(text)
        policy = registry.build(str(tmp_path / "own.py"))
    else:
        policy.score = score
    with pytest.raises(fused.Refused):
        fused.translate(policy, "score")


@dataclass
class TakesNoItems:
    """A view has columns, but none can be put in their place."""

    columns = {"a": np.float32}

    def observe(self, view):
        if view.now:
            view["a"] += view.weights


def test_what_a_view_refuses_is_refused():
    with pytest.raises(fused.Refused):
        fused.translate(TakesNoItems(), "observe")


COUNTS = "    def observe(self, view):\n        view['a'][:] = view['a'] + 1\n"  # something that is compiled


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("    def score(self, view):\n        return view.mass * 2\n", {"mass"}),
        (COUNTS + "    def score(self, view):\n        return np.sqrt(view.mass) + view.key\n", {"mass", "key"}),
        ("    def score(self, view, /):\n        return view.mass\n", None),
        (COUNTS + "    def score(self, *views):\n        return views[0].mass\n", None),
        (COUNTS + "    def score(*both):\n        return both[1].mass\n", None),
        (COUNTS + "    def score(self, view, **more):\n        return np.sqrt(view.mass)\n", None),
        (COUNTS + "    def score(self, view):\n        return eval('view.mass')\n", None),
        (COUNTS + "    def score(self, view):\n        return locals()['view'].mass\n", None),
        (COUNTS + "    def score(self, view):\n        return view.gather.__self__.mass\n", None),
        (COUNTS + "    def score(self, view):\n        return getattr(view, 'ma' + 'ss')\n", None),
        (
            COUNTS
            + "    def score(self, view):\n        return self.of(view)\n    def of(self, v):\n        return v.mass\n",
            None,
        ),
        (COUNTS + "    make = lambda: lambda self, view: view.mass\n    score = make()\n", None),
        ("    observe = None\n    def score(self, view):\n        return view.mass\n", {"mass"}),
    ],
)
def test_a_column_that_is_read_is_kept(text, read, tmp_path):
    """Whatever way a text has to it, by name or round a corner (None: all are kept): the same pages leave."""
    head = "import numpy as np\nfrom kvsim.registry import policy\n\n@policy('own')\nclass Own:\n    rows = 'full'\n"
    (path := tmp_path / "own.py").write_text(f"{head}    budget_free = True\n    columns = {{'a': np.int32}}\n{text}")
    assert fused.columns_read(registry.build(str(path))) == (fused._COLUMNS.keys() if read is None else read)
    trace = tiny_trace(steps=30)
    one, two = (list(run(trace, registry.build(str(path)), 6, f, check=False)) for f in (False, True))
    assert all(
        np.array_equal(x, y) for left, right in zip(one, two, strict=True) for x, y in zip(left, right, strict=True)
    )
    for fusing in (False, True):
        text, sizes = compare_sizes(trace, lambda: registry.build(str(path)), fusing=fusing)
        assert text is None and sizes > 10


def test_a_users_file_is_compiled_too(tmp_path):
    (tmp_path / "own.py").write_text(
        "from kvsim.registry import policy\n\n@policy('own')\nclass Own:\n    heat: float = 0.5\n"
        "    def score(self, view):\n        return view.mass * self.heat - view.last\n"
    )
    for heat in (0.5, 0.25):  # a parameter is no part of the text
        compare(tiny_trace(), f"{tmp_path}/own.py(heat={heat})", {}, 5, use=lambda: Use("weight", 0.1))
    assert len({fused.fuse(registry.build(f"{tmp_path}/own.py(heat={h})"), np.inf).victims for h in (0.5, 0.25)}) == 1


OWN = (
    "import numpy as np\nfrom kvsim.registry import policy\n\n@policy('own')\nclass Own:\n"
    "    def score(self, view):\n        return {}\n"
)


@pytest.mark.parametrize(
    "edited",
    [
        OWN.format("-view.key"),
        OWN.format("view.key * 1.0"),  # 1 == 1.0, but not to NumPy
        OWN.format("np.abs(view.key)"),
        OWN.replace("score", "other").format("view.key * 1"),
        OWN.replace("import numpy as np", "import numpy as np\nimport re").format("view.key * 1"),
        "",
        "no Python at all: (",
    ],
)
def test_a_file_that_was_edited_since_is_not_what_runs(edited, tmp_path):
    (path := tmp_path / "own.py").write_text(OWN.format("view.key * 1"))
    early, late = registry.build(str(path)), registry.build(str(path))
    assert compiled(early) == {"score"}
    fused._text.cache_clear()
    path.write_text(edited)
    with pytest.raises(fused.Refused):
        fused.translate(late, "score")
    path.unlink()
    with pytest.raises(fused.Refused):
        fused.translate(late, "score")


def test_a_text_that_was_read_once_is_still_what_runs(tmp_path):
    (path := tmp_path / "own.py").write_text(OWN.format("view.key * 1"))
    policy = registry.build(str(path))
    first = fused.translate(policy, "score")
    path.write_text(OWN.format("-view.key"))
    assert fused.translate(policy, "score") == first != fused.translate(registry.build(str(path)), "score")


def test_a_loop_that_does_not_load_leaves_no_module():
    name = "fused_of_no_policy"
    for _ in range(2):
        try:
            with pytest.raises(SyntaxError):
                fused._load(name, "no Python at all: (")
        finally:
            (Path(kernels.touch.stats.cache_path) / f"{name}.py").unlink()
        assert name not in sys.modules


# -- when, and how -------------------------------------------------------------------------------------------------


def test_it_is_compiled_only_where_that_pays():
    policy = registry.build("h2o")
    assert fused.fuse(policy, fused.LOADING - 1) is None
    assert fused.fuse(policy, fused.COMPILING) is not None
    list(run(tiny_trace(), policy, 5, True))
    assert fused.fuse(policy, fused.LOADING) is not None  # it is there now
    assert fused.fuse(registry.build("random"), np.inf) is None


@pytest.mark.parametrize("bad", ["np.nan", "1e39", "-1e300"])
def test_a_score_that_is_no_number_is_named(tmp_path, bad):
    (tmp_path / "own.py").write_text(
        "import numpy as np\nfrom kvsim.registry import policy\n\n@policy('own')\nclass Own:\n"
        f"    def score(self, view):\n        return np.where((view.key == 14) & (view.now == 4), {bad}, view.key)\n"
    )
    said = []
    for fusing in (False, True):
        with pytest.raises(PolicyError, match=r"NaN at step 4, lane \(0, 0\)") as caught:
            list(run(tiny_trace(), registry.build(str(tmp_path / "own.py")), 5, fusing))
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_loops_older_than_their_helpers_are_forgotten(tmp_path):
    """numba would go on with what it compiled before the helpers of another file changed."""
    loop = SimpleNamespace(py_func=of_this_file, stats=SimpleNamespace(cache_path=tmp_path))
    stem, changed = Path(__file__).stem, Path(kernels.__file__).stat().st_mtime
    for name, age in ((f"{stem}.a-1.py311.nbi", 1), (f"{stem}.b-2.py311.nbi", -1), ("other.c-3.py311.nbi", 1)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (changed - age, changed - age))
    kernels.forget_older(loop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.c-3.py311.nbi", f"{stem}.b-2.py311.nbi"]


def of_this_file():
    """Stands for a loop."""


def test_threads_share_out_all_lanes_once(monkeypatch):
    monkeypatch.setattr(threads, "cores", lambda: 3)
    seen, who = np.zeros(50, int), set()
    lock = threading.Barrier(3)

    def loop(begin, end):
        seen[begin:end] += 1
        if threading.current_thread() not in who:
            who.add(threading.current_thread())
            lock.wait(10)  # so each of the three takes at least one part

    threads.each(loop, 50, threads.THREADED)
    assert (seen == 1).all() and len(who) == 3

    def fails(begin, end):
        raise ValueError(begin)

    with pytest.raises(ValueError):
        threads.each(fails, 50, threads.THREADED)


@pytest.mark.parametrize("spec", ["h2o(recent=2)", "lfu", "lazy-eviction(window=3, alpha=0.05)", "tova"])
def test_threads_change_no_number(spec, monkeypatch):
    found = []
    for cores in (1, 3):
        monkeypatch.setattr(threads, "cores", lambda cores=cores: cores)
        monkeypatch.setattr(threads, "THREADED", 1)
        found.append([x.tobytes() for step in run(tiny_trace(heads=5), policy_for(spec), 6, True) for x in step])
    assert found[0] == found[1]


@pytest.mark.parametrize("spec", ["tova(recent=1)", "h2o(recent=1)", "lru", "lfu"])
def test_visible_mass_too_small_to_divide_by_is_none(spec):
    """Of a sink outside the cache: 1 / 2**-131 would be infinite, and weights with it."""
    trace = matrix_trace([[1.0], [0.5, 0.5], *([2.0**-133] * n for n in range(3, 9))])
    request = trace.requests()[0]
    slow, fast = (list(run(trace, registry.build(spec), 3, fusing, check=False)) for fusing in (False, True))
    for x, y in zip(slow, fast, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(x, y, strict=True))
    for kind in (Cache, ReferenceCache):
        cache = kind(trace.lanes, request.stride, registry.build(spec), Capacity(3), seed=0)
        for a in request.accesses():
            cache.access(a)
        view = cache.view if kind is Cache else cache.v
        assert not view.weights.any() and view.mass.max() <= 1.5


def test_where_all_weights_are_the_same_all_are_used():
    """Whatever a sum of a few thirds or sevenths is rounded to."""
    trace = matrix_trace([[1 / n] * n for n in range(1, 60)])
    request = trace.requests()[0]
    for budget in (3, 7, 22, 49):
        for kind, fusing in ((Cache, False), (Cache, True), (ReferenceCache, False)):
            cache = kind(trace.lanes, request.stride, registry.build("lru"), Capacity(budget), seed=0)
            cache.fusing = fusing
            for a in request.accesses():
                cache.access(a)
                assert Use().used(a.row[0], a.keys, a.visible, a.first).all()
                key, last = (cache.table.key, cache.table.last) if kind is Cache else (cache.v.key, cache.v.last)
                assert (last[key >= 0] == a.step).all(), (budget, a.step)
