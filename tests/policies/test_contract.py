"""`check_policy` over everything registered, and over policies that break one clause each."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest

from kvsim import registry
from kvsim.cache import fused
from kvsim.cache.view import _PUBLIC
from kvsim.errors import PolicyError
from kvsim.simulate import run
from kvsim.testing import check_policy, contract, tiny_trace
from tests.helpers import replay

EXAMPLE = Path(__file__).parents[2] / "examples" / "my_policy.py"


@pytest.mark.parametrize("spec", registry.names("policy"))
def test_every_policy_keeps_the_contract(spec):
    assert check_policy(spec) == []


@pytest.mark.parametrize("spec", registry.names("offload"))
def test_every_offload_policy_keeps_the_contract(spec):
    assert check_policy(spec) == []


def test_the_example():
    assert check_policy(f"{EXAMPLE}(half_life=16)") == []
    assert len([n for n in EXAMPLE.read_text().split('"""\n', 1)[1].splitlines() if n.strip()]) <= 15
    run = replay(f"{EXAMPLE}:HalfLife(half_life=1.0, sink=0)", 3)  # halved at each step, by hand
    assert run.kept() == [[0, 1, 2], [0, 2, 3], [0, 2, 4], [0, 2, 5]]
    assert run.score[-1][0][[0, 2, 5]] == pytest.approx([0.4835, 0.4838, 0.5], abs=1e-4)


def lru(**body) -> str:
    """A policy file: LRU, with some of its parts replaced."""
    parts = {"doc": "'''Mine.'''", "fields": "", "observe": "pass", "score": "return view.last"} | body
    text = """
    import numpy as np
    from kvsim.registry import policy

    @policy("broken")
    class Broken:
        {doc}
        {fields}

        def observe(self, view):
            {observe}

        def score(self, view):
            {score}
    """
    return textwrap.dedent(text).format(**parts)


SIDE_DOOR = "view._table.last[:] = 0; return view.key"
UNLOCK = "a = view.mass; a.flags.writeable = True; a[:] = 0"
OWN_STATE = "self.heat = getattr(self, 'heat', np.zeros(view.key.shape)) * 0.5 + view.weights"
BY_SLOT = "self.heat = getattr(self, 'heat', np.zeros((2, 2, 999))); self.heat[..., :view.key.shape[2]] += view.weights"
CLAUSES = {
    "fine": (lru(), None),
    "shape": (lru(score="return view.last.sum(-1)"), "returned scores of shape (2, 2)"),
    "dtype": (lru(score="return view.last.astype(object)"), "returned scores of type object"),
    "nothing": (lru(score="pass"), "is a return missing?"),
    "nan": (lru(score="return np.where(view.key == 3, np.nan, view.last)"), "score returned NaN for a resident page"),
    "nan off the gpu is allowed": (lru(score="return np.where(view.resident, view.last, np.nan)"), None),
    "raises": (lru(score="return view.nothing"), "failed in score"),
    "writes": (lru(observe="view.mass[:] = 0"), "read-only"),
    "writes the budget": (lru(observe="view.budget[:] = 0"), "read-only"),
    "unlocks": (lru(observe=UNLOCK), "observe changed mass"),
    "side door": (lru(score=SIDE_DOOR), "score changed last"),
    "the clock": (lru(observe="view.now = 3"), "observe changed the view"),
    "another table": (lru(observe="import copy; view._table = copy.copy(view._table)"), "observe changed the view"),
    "random": (lru(score="return np.random.random(view.key.shape)"), "two runs with the same seed differ"),
    "slots": (lru(score="return np.arange(view.key.shape[-1])"), "pages moved to other slots"),
    "state of another size": (lru(observe=OWN_STATE, score="return self.heat"), "a table that grew"),
    "state by slot": (
        lru(observe=BY_SLOT, score="return self.heat[..., :view.key.shape[2]]"),
        "pages moved to other slots",
    ),
    "generator": (lru(score="return view.rng.random(view.key.shape)"), "pages moved to other slots"),
    "private column": (
        lru(
            fields="columns = {'heat': np.float32}",
            observe="view['heat'][:] = view['heat'] / 2 + view.weights",
            score="return view['heat']",
        ),
        None,
    ),
    "no default": (lru(fields="size: int"), 'parameter "size" of policy "broken" has no default'),
    "no docstring": (lru(doc=""), "no docstring"),
    "granularity": (lru(fields="granularity = 'lane'"), "granularity is 'lane'"),
    "rows": (lru(fields="rows = 'some'"), "rows is 'some'"),
    "clock": (lru(fields="clock = 'year'"), "clock is 'year'"),
    "batch": (lru(fields="batch = 0"), "batch is 0"),
    "batch below zero": (lru(fields="batch = -1"), "batch is -1"),
    "lag": (lru(fields="lag = 1.5"), "lag is 1.5"),
    "no lag": (lru(fields="lag = 0"), "lag is 0"),
    "a lag longer than any run": (lru(fields="lag = 100000"), None),
    "all is protected": (lru(fields="sink: int = 10**9"), "protect 1000000001 tokens"),
    "regimes": (lru(fields="regimes = 'lossy'"), "regimes is 'lossy'"),
    "needs": (lru(fields="needs = 'k'"), "needs is 'k'"),
    "needs what there is not": (lru(fields="needs = {'banana'}", score="1 / 0"), "observe, score: not run"),
    "needs what there is": (lru(fields="needs = {'tokens', 'k'}", score="return view.fact('tokens')"), None),
    "column": (lru(fields="columns = {'x': 'many'}"), "not of a NumPy type"),
    "column of objects": (lru(fields="columns = {'x': object}"), "not of a NumPy type"),
    "column of the engine's": (lru(fields="columns = {'mass': np.float32}"), 'column "mass" has the name'),
    "finer than float32": (lru(score="return view.last + view.key * 1e-9"), "in which they are the same"),
    "finer by rounding": (lru(score="return view.last * (1 + 2.0**-50 * (view.key % 3))"), None),
    "large whole numbers": (lru(score="return 2**40 - view.key.astype(np.int64)"), "in which they are the same"),
    "beyond float32": (lru(score="return view.key * 1e300"), "score returned 1e+300: scores are float32"),
    "state in the class": (lru(fields="seen = []", observe="self.seen.append(1)"), "Broken.seen changed in a run"),
    "state in the module": (lru(observe="global N; N = globals().get('N', 0) + 1"), "N changed in a run"),
    "both regimes": (
        lru(score="return 1 / (view.now if view.resident.sum() == (view.key >= 0).sum() else 0)"),
        "failed in score",
    ),
    "select": (lru(fields="def select(self, view): return view.key % 2 == 0"), None),
    "select nothing": (lru(fields="def select(self, view): return view.key > 99"), "select chose no page in some lane"),
    "select weights": (
        lru(fields="def select(self, view): return view.weights + 1"),
        "select returned float32, expected a bool mask",
    ),
    "select shape": (lru(fields="def select(self, view): return np.ones(7, bool)"), "a read set of shape (7,)"),
    "split": (lru(fields="def split(self, view): return np.full((2, 2, 1), 5)"), None),
    "split shares what the run gave": (lru(fields="def split(self, view): return view.budget * 0.75"), None),
    "split nan": (lru(fields="def split(self, view): return view.budget * np.nan"), "a budget of nan pages at step 0"),
    "split below zero": (lru(fields="def split(self, view): return 4 - view.budget"), "a budget of -5 pages at step 0"),
    "split shape": (lru(fields="def split(self, view): return np.full(7, 5)"), "budgets of shape (7,)"),
}


@pytest.mark.parametrize("clause", CLAUSES)
def test_each_clause(tmp_path, clause):
    text, words = CLAUSES[clause]
    (path := tmp_path / "broken.py").write_text(text)
    problems = check_policy(str(path))
    assert problems == [] if words is None else any(words in p for p in problems), problems


@pytest.mark.parametrize(
    "clause",
    ["granularity", "clock", "batch below zero", "no lag", "needs", "column of objects", "column of the engine's"],
)
def test_a_run_says_the_same_of_attributes(tmp_path, clause):
    (path := tmp_path / "broken.py").write_text(CLAUSES[clause][0])
    with pytest.raises(PolicyError) as caught:
        run(tiny_trace(), policy=str(path), budget="8", model="llama-3.1-8b")
    assert [str(caught.value)] == check_policy(str(path))


def test_the_names_of_columns_that_are_taken():
    assert (*_PUBLIC, "resident", "pins", "size", "wanted") == registry._TAKEN


def test_every_built_in_policy_is_run():
    """There is nothing that one of them needs and the traces do not have."""
    for spec in registry.names("policy"):
        assert registry.build(spec).needs <= contract._trace(12, 24).provides, spec


@pytest.mark.parametrize("clause", ["shape", "nothing", "raises", "nan", "state of another size", "split shape"])
def test_each_clause_is_said_once(tmp_path, clause):
    """Both regimes break it, with other shapes and at other steps."""
    (path := tmp_path / "broken.py").write_text(CLAUSES[clause][0])
    problems = check_policy(str(path))
    assert len(problems) == len({re.sub("[0-9]+", "", p) for p in problems}) > 0, problems
    assert clause != "nan" or problems == ["score returned NaN for a resident page"]


def test_compiled_it_has_to_decide_the_same(tmp_path, monkeypatch):
    (path := tmp_path / "broken.py").write_text(lru(score="return view.last - 2 * view.key"))
    assert check_policy(str(path)) == []
    monkeypatch.setitem(fused._UFUNCS, ast.Sub, (np.subtract, "+"))
    assert [p for p in check_policy(str(path)) if "compiled, it gives other victims" in p]


OFFLOAD = """
import numpy as np
from kvsim.registry import offload

@offload("broken")
class Broken:
    {doc}

    def place(self, view, victims):
        {place}
"""


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("return 1", None),
        ("return np.where(view.uses > 1, 1, 2)", None),
        ("return np.where(view.uses > 1, 1, -1)", None),
        ("return 3", "named a tier that does not exist"),
        ("return 0", "named a tier that does not exist"),
        ("return 1.0", "place returned float64, expected whole numbers"),
        ("pass", "returned tiers of type object"),
        ("return np.ones(3, int)", "tiers of shape (3,)"),
        ("victims[:] = False; return 1", "failed in place"),
        ("view._table.copies[:] = 0; return 1", "place changed copies"),
        ("return np.random.choice([1, 2], victims.shape)", "two runs with the same seed differ"),
        ("return 1 + np.arange(victims.shape[-1]) % 2", "pages moved to other slots"),
    ],
)
def test_each_clause_of_offload(tmp_path, place, words):
    (path := tmp_path / "broken.py").write_text(OFFLOAD.format(doc="'''Mine.'''", place=place))
    problems = check_policy(str(path))
    assert problems == [] if words is None else any(words in p for p in problems), problems


def test_names_that_are_not_known():
    assert 'unknown policy "h20"' in check_policy("h20")[0]
    assert "cannot read" in check_policy("h2o(3)")[0]
    assert "no parameter" in check_policy("h2o(size=3)")[0]
    assert 'no file "nowhere.py"' in check_policy("nowhere.py")[0]
