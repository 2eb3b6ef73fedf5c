"""Grids: what is compared with what."""

from __future__ import annotations

import numpy as np
import pytest

from kvsim.results import MORE
from kvsim.sweeps import sweep
from kvsim.testing import tiny_trace


@pytest.fixture(scope="module")
def grid():
    policies = ["full", "fifo", "belady", "mass-oracle"]
    return sweep(tiny_trace(), policy=policies, budget=["20%", "40%"], model="llama-3.1-8b")


def test_regret_is_measured_within_a_budget(grid):
    rows = {(row["policy"], row["budget"]): row for row in grid.rows()}
    for (policy, budget), row in rows.items():
        for name in ("belady", "mass-oracle"):
            expected = rows[name, budget]["recall"] - row["recall"]
            assert row[f"regret_{name.replace('-', '_')}"] == pytest.approx(expected), (policy, budget)
        assert row["regret_ceiling"] == pytest.approx(row["even_ceiling"] - row["recall"])
        assert row["regret_ceiling"] > -1e-6 or policy == "full"
    assert rows["belady", "20%"]["regret_belady"] == 0 < rows["fifo", "20%"]["regret_belady"]


def test_regret_to_a_reference_that_is_not_there_is_unknown(grid):
    assert all(np.isnan(row["regret_optimal"]) for row in grid.rows())


def test_regret_where_pages_come_back_is_that_of_hits():
    grid = sweep(
        tiny_trace(), policy=["lru", "belady"], budget="8", regime="offload", demand="theta", page_size=1,
        model="llama-3.1-8b",
    )  # fmt: skip
    lru, belady = grid.rows()
    assert (
        lru["regret_belady"] == pytest.approx(belady["page_hit_rate"] - lru["page_hit_rate"])
        and lru["regret_belady"] > 0
    )
    assert np.isnan(lru["regret_ceiling"])


def test_who_takes_more_than_the_budget_is_not_judged():
    """SnapKV keeps what is generated beside its budget; an allocator moves the budget between layers, which is fair."""
    policies = ["fifo", "snapkv(window=4)", "pyramid(inner='fifo')", "lazy-eviction(window=4)"]
    grid = sweep(tiny_trace(prompt=10, steps=24), policy=policies, budget="8", model="llama-3.1-8b")
    rows = {row["policy"]: row for row in grid.rows()}
    over = {policy for policy, row in rows.items() if row["over_budget"] > MORE}
    assert over == {"snapkv(window=4)"}
    assert len({row["even_ceiling"] for row in rows.values()}) == 1
    best, left = grid.verdicts()
    assert "best online policy" in best and "snapkv" not in best and left.endswith(": snapkv(window=4)")
    notes = {r.manifest["config"]["policy"]: " ".join(r.manifest["notes"]) for r in grid.runs}
    assert [p for p in policies if "times the budget" in notes[p]] == ["snapkv(window=4)"]


def test_the_bound_is_that_of_the_budget_whoever_is_in_the_grid():
    """A split lowers its own ceiling, a lag raises it; neither is the bound of the others."""
    trace = tiny_trace(prompt=24, steps=24)
    alone, beside = (
        sweep(trace, policy=policies, budget="8", model="llama-3.1-8b")
        for policies in (["fifo", "lru"], ["fifo", "lru", "pyramid(inner='fifo')", "lazy-eviction(window=4)"])
    )
    assert [r for r in beside.table_lines() if "bound" in r[0]] == [r for r in alone.table_lines() if "bound" in r[0]]
