"""A figure with a panel per family: who is in which, protected ones beside the plain, references in each."""

from __future__ import annotations

import numpy as np
import pytest

import kvsim
from kvsim.figures import draw, families, page
from kvsim.trace.synthetic import synthetic_trace

POLICIES = ["full", "lru", "lru(sink=4, recent=8)", "h2o", "tova", "belady", "pyramid(inner='h2o')"]


@pytest.fixture(scope="module")
def grid():
    trace = synthetic_trace(1, 24, 32, 2, 2, seed=1)
    return kvsim.sweep(trace, policy=POLICIES, budget=["30%", "60%"], model="llama-3.2-1b")


@pytest.fixture(scope="module")
def panels(grid):
    with page.style():
        figure = families.draw(grid.runs, grid.rows(), "held_mean_bytes", "recall")
    return {ax.get_title(loc="left"): ax for ax in figure.axes if ax.get_visible()}


def named(ax):
    return [t.get_text() for t in ax.get_legend().get_texts()]


def test_each_family_has_its_panel_and_its_policies(panels):
    assert list(panels) == ["allocator", "classic", "heavy hitter"]
    assert named(panels["heavy hitter"]) == ["h2o", "tova"]
    assert set(named(panels["allocator"])) == {"step ceiling", "belady", "full cache", "pyramid(h2o)"}


def test_the_lines_are_the_runs(grid, panels):
    rows = [row for row in grid.rows() if row["policy"] == "tova"]
    (tova,) = [x for x in panels["heavy hitter"].lines if x.get_label() == "tova"]
    assert tova.get_ydata() == pytest.approx([row["recall"] for row in rows])
    ratio = np.array(tova.get_xdata()) / [row["held_mean_bytes"] for row in rows]
    assert ratio == pytest.approx([ratio[0]] * 2)  # one unit


def test_a_protected_policy_has_the_colour_of_the_plain_one(panels):
    lines = [x for x in panels["classic"].lines if x.get_color() == families.COLOURS[0]]
    assert sorted(x.get_linestyle() for x in lines) == ["-", "--"]
    assert named(panels["classic"]) == ["lru"]


def test_names_of_specs():
    assert families.label('ada-kv(inner="snapkv(window=8)", alpha=0.1)') == "ada-kv(snapkv)"
    assert families.label("streaming-llm(sink=0)") == "streaming-llm(sink=0)"
    assert families.label("lru(sink=4)") == "lru"
    specs = ("h2o(sink=0)", "h2o(sink=4)", "lru(protect_tail=0.1)", "r-kv(every=4)")
    assert [families.is_protected(s) for s in specs] == [False, True, True, False]


def test_it_is_a_kind_of_plot(grid, tmp_path):
    first, second = (draw(grid, tmp_path / f"{i}.png", kind="families", y="recurrence_loss") for i in "ab")
    assert first.read_bytes() == second.read_bytes()
