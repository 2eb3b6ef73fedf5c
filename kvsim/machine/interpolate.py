"""Operator times looked up between measured ones: right where the GPU was measured, and silent elsewhere.

The forms of `compute` serve every geometry; a table serves only those that it holds, within what was measured.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np

from kvsim.errors import ConfigError


class Table:
    """Times over lines of measured points: per geometry and `line` (sequences, say), seconds over `x` (context, say).

    Between two points of a line time is linear in x, or with `log` the logarithm of time is in that of x; between two
    lines that both cover x it is linear in `line`. Points measured more than once count as their median.
    """

    def __init__(
        self, geometry: Iterable[Hashable], line: Any, x: Any, seconds: Any, *, log: bool = False, name: str = "table"
    ):
        self.log, self.name = log, name
        points: dict[Hashable, dict[float, dict[float, list[float]]]] = {}
        rows = (np.asarray(column, float).tolist() for column in (line, x, seconds))
        for shape, at, where, time in zip(geometry, *rows, strict=True):
            points.setdefault(shape, {}).setdefault(at, {}).setdefault(where, []).append(time)
        self.lines = {
            shape: {at: _line(of, log) for at, of in sorted(lines.items())} for shape, lines in points.items()
        }

    def covers(self, geometry: Hashable, line: float, x: float) -> bool:
        """Was enough measured around this point to look it up?"""
        return bool(self._around(geometry, line, x))

    def seconds(self, geometry: Hashable, line: float, x: float) -> float:
        """Time at one point. Raises ConfigError for a geometry that was not measured and outside the measured range."""
        around = self._around(geometry, line, x)
        if not around:
            known = geometry in self.lines
            what = f"{line:g} x {x:g} lies outside the measured range" if known else "was not measured"
            raise ConfigError(f"{geometry}: {what}", where=self.name, hint="use the fitted form, which says so")
        times = [self._at(geometry, at, x) for at in around]
        return float(np.interp(line, around, times))

    def _around(self, geometry: Hashable, line: float, x: float) -> list[float]:
        """The measured line, or the nearest two about it that cover x; none where there are no such."""
        lines = self.lines.get(geometry, {})
        covering = [at for at, (xs, _) in lines.items() if xs[0] <= x <= xs[-1]]
        if line in covering:
            return [line]
        below, above = [at for at in covering if at < line], [at for at in covering if at > line]
        return [below[-1], above[0]] if below and above else []

    def _at(self, geometry: Hashable, line: float, x: float) -> float:
        xs, times = self.lines[geometry][line]
        if self.log:
            return float(np.exp(np.interp(np.log(x), np.log(xs), np.log(times))))
        return float(np.interp(x, xs, times))


def _line(points: dict[float, list[float]], log: bool) -> tuple[np.ndarray, np.ndarray]:
    xs = np.array(sorted(points))
    times = np.array([np.median(points[x]) for x in xs])
    assert (times > 0).all() and (not log or (xs > 0).all()), "times, and places on a logarithmic line, are above 0"
    return xs, times
