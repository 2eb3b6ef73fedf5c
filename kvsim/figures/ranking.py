"""Policies at one point, a bar each, best first: what a table says, to be seen at a glance.

References that know the future are grey; the step ceiling and the full cache are lines across all bars.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvsim.errors import ResultError
from kvsim.figures import columns, page
from kvsim.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BAR, _REFERENCE = "#0072B2", "#9a9a9a"


def fits(rows: Sequence[Mapping[str, Any]], x: str, hue: str) -> bool:
    """Is policy against policy asked for, with one run of each?"""
    return x == hue == "policy" and len({row["policy"] for row in rows}) == len(rows)


def draw(runs: Sequence[Result], rows: Sequence[Mapping[str, Any]], y: str) -> Figure:
    """Column `y` of one run per policy. Raises ConfigError for a column nobody has, ResultError where all is empty."""
    columns.check(y, list(dict.fromkeys(k for row in rows for k in row)), "y")
    factor, unit = columns.unit(y, [columns.number(row, y) for row in rows])
    values = {row["policy"]: columns.number(row, y) * factor for row in rows}
    kept = [row for row in rows if math.isfinite(values[row["policy"]])]
    if not kept:
        raise ResultError(f'no run has a value of "{y}"', hint="choose another column with --y")
    lowest_first = columns.LOSSLESS.get(y) != 1.0  # losses, times and bytes: less is better
    kept.sort(key=lambda row: (values[row["policy"]] * (1 if lowest_first else -1), row["policy"]))
    lengths = [values[row["policy"]] for row in kept]
    references = [bool(row["oracle"]) or row["policy"] == "full" for row in kept]
    names = [
        row["policy"] + ("" if known else columns.more([row])) for row, known in zip(kept, references, strict=True)
    ]
    figure = page.sheet(7.6, 1.9 + 0.235 * len(names))
    ax = figure.add_subplot()
    bars = ax.barh(names, lengths, height=0.68, color=[_REFERENCE if known else _BAR for known in references])
    ax.bar_label(bars, [f"{v:.3f}" if unit == "" else f"{v:.3g}" for v in lengths], padding=3, fontsize=8)
    ax.invert_yaxis()
    ax.margins(y=0.01)
    ends = [*lengths]
    for at, name, style in _lines(kept, y):
        ax.axvline(at, color=page.INK, linewidth=1.0, linestyle=style, label=name)
        ends.append(at)
    ax.set_xlim(min(0.0, *ends), max(ends) * 1.09 or 1.0)
    ax.set_xlabel(columns.label(y, unit))
    ax.grid(axis="x")
    if len(ends) > len(lengths):
        ax.legend(loc="lower right", frameon=True, framealpha=0.9, edgecolor=page.FAINT)
    predicted = columns.is_time(y) or y == "stall_share"
    title = ("predicted " if predicted else "") + f"{columns.title(y)} by policy, best first"
    foot = "grey: knows the future, or loses nothing; " + page.CAVEAT + (f"; {page.PREDICTED}" if predicted else "")
    page.head(figure, title[0].upper() + title[1:], page.facts(runs, hide=("policy",)), foot)
    return figure


def _lines(rows: Sequence[Mapping[str, Any]], y: str) -> list[tuple[float, str, Any]]:
    """(where, what, how) of the lines across: the bound, and what the full cache has by definition."""
    found: list[tuple[float, str, Any]] = []
    ceilings = [row["even_ceiling"] for row in rows if row["regime"] == "lossy" and row["policy"] != "full"]
    known = [value for value in ceilings if math.isfinite(value)]
    if y == "recall" and known:
        found.append((min(known), "step ceiling (bound)", (0, (6, 2, 1, 2))))
    if y in columns.LOSSLESS:
        found.append((columns.LOSSLESS[y], "full cache", "-"))
    return found
