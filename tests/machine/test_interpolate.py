"""Tables of measured times: between points, never beyond them, never for another geometry."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.errors import ConfigError
from kvsim.machine.interpolate import Table

LAYOUT = (32, 8, 128)


def table(log: bool = False) -> Table:
    rows = [(1, 10, 2.0), (1, 30, 4.0), (4, 10, 5.0), (4, 30, 11.0), (4, 50, 13.0)]
    line, x, seconds = zip(*rows, strict=True)
    return Table([LAYOUT] * len(rows), line, x, seconds, log=log, name="rows.csv")


def test_by_hand():
    t = table()
    assert t.seconds(LAYOUT, 1, 10) == 2.0
    assert t.seconds(LAYOUT, 1, 20) == pytest.approx(3.0)  # halfway along a line
    assert t.seconds(LAYOUT, 4, 40) == pytest.approx(12.0)
    assert t.seconds(LAYOUT, 2, 20) == pytest.approx(3.0 + (8.0 - 3.0) / 3)  # a third of the way to the other line
    assert table(log=True).seconds(LAYOUT, 1, np.sqrt(300)) == pytest.approx(np.sqrt(8.0))


def test_repeated_points_count_as_their_median():
    t = Table(["a"] * 4, [1] * 4, [10, 10, 10, 20], [1.0, 2.0, 9.0, 4.0])
    assert t.seconds("a", 1, 15) == pytest.approx(3.0)


@pytest.mark.parametrize(("line", "x"), [(1, 9), (1, 31), (4, 51), (2, 40), (5, 20), (0, 20)])
def test_outside_the_measured_range_is_refused(line, x):
    t = table()
    assert not t.covers(LAYOUT, line, x)
    with pytest.raises(ConfigError, match="outside the measured range") as refused:
        t.seconds(LAYOUT, line, x)
    assert refused.value.where == "rows.csv"


def test_other_geometries_are_refused():
    with pytest.raises(ConfigError, match="was not measured"):
        table().seconds((32, 4, 128), 1, 20)


@given(st.floats(1, 1e3), st.floats(0, 1e2), st.floats(1, 8), st.floats(10, 90))
def test_linear_times_are_met_exactly(fixed, slope, line, x):
    lines, xs = np.meshgrid([1.0, 3.0, 8.0], [10.0, 40.0, 90.0])
    t = Table(["a"] * lines.size, lines.ravel(), xs.ravel(), (fixed + slope * lines * xs).ravel())
    assert t.seconds("a", line, x) == pytest.approx(fixed + slope * line * x)
