"""Grids: what is compared with what."""

from __future__ import annotations

import numpy as np
import pytest

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
        assert row["regret_ceiling"] == pytest.approx(row["ceiling"] - row["recall"])
        assert row["regret_ceiling"] > -1e-6
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
