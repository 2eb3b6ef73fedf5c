"""Many policies at once: one panel per family, the other families' lines faint behind, bounds and references in each.

A policy and the same policy with protected tokens are one colour; the protected one is dashed, with an open marker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvsim import registry
from kvsim.errors import ResultError
from kvsim.figures import columns, page
from kvsim.figures.line import COLOURS, MARKERS
from kvsim.results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROTECTION = ("sink", "recent", "protect_head", "protect_tail")
_REFERENCES = {"belady": "-.", "mass-oracle": ":", "optimal": "--"}
_ACROSS = 4  # panels in a row
Points = list[tuple[float, float]]


def draw(runs: Sequence[Result], rows: Sequence[Mapping[str, Any]], x: str, y: str) -> Figure:
    """Column `y` against column `x`. Raises ConfigError for a column nobody has, ResultError where none has a value."""
    known = list(dict.fromkeys(k for row in rows for k in row))
    for column, role in ((x, "x"), (y, "y")):
        columns.check(column, known, role)
    rows = [row for row in rows if math.isfinite(columns.number(row, y))]
    if not rows:
        raise ResultError(f'no run has a value of "{y}"', hint="choose another column with --y")
    across = columns.axis(x, [row[x] for row in rows])
    factor, unit = columns.unit(y, [columns.number(row, y) for row in rows])
    lines: dict[str, Points] = {}
    for row in rows:
        lines.setdefault(row["policy"], []).append((across.place(row[x]), columns.number(row, y) * factor))
    lines = {policy: sorted(points) for policy, points in lines.items()}
    families = _families(lines)
    down = -(-len(families) // _ACROSS)
    figure = page.sheet(3.1 * min(_ACROSS, len(families)) + 0.4, 2.75 * down + 1.0)
    panels = figure.subplots(down, min(_ACROSS, len(families)), sharex=True, sharey=True, squeeze=False).ravel()
    ceiling = _ceiling(rows, x, across) if y == "recall" else []
    more = {p: " *" if columns.more(row for row in rows if row["policy"] == p) else "" for p in lines}
    for i, (ax, (family, members)) in enumerate(zip(panels, families.items(), strict=False)):
        _panel(ax, family, members, lines, more, ceiling, named=i == 0)
        last = i + _ACROSS >= len(families)  # with nothing below it
        ax.set_xlabel(across.label if last else "", fontsize=8)
        ax.tick_params(labelbottom=last)
        ax.set_ylabel(columns.title(y) + (f" ({unit})" if unit else "") if i % _ACROSS == 0 else "", fontsize=8)
        if x == "budget":
            ax.set_xticks(sorted(across.ticks), [across.ticks[p] for p in sorted(across.ticks)])
    for ax in panels[len(families) :]:
        ax.set_visible(False)
    words = f"{columns.title(y)} by {columns.title(x)}, family by family"
    marks = "dashed with open markers: with protected tokens; grey: policies of other families"
    marks += "; *: holds or reads more than 1.1 times the budget" if any(more.values()) else ""
    foot = f"{columns.label(y, unit)}; {marks}; {page.CAVEAT}"
    page.head(figure, words[0].upper() + words[1:], page.facts(runs, hide=(x, "policy", "budget")), foot)
    return figure


def label(policy: str) -> str:
    """A spec as a legend says it: the name, what it wraps, and protection that is turned off."""
    spec = registry.parse_spec(policy)
    off = [f"{name}=0" for name in PROTECTION if spec.parameters.get(name, 1) == 0]
    inner = spec.parameters.get("inner")
    inside = ", ".join([*([label(str(inner))] if inner else []), *off])
    return f"{spec.name}({inside})" if inside else spec.name


def is_protected(policy: str) -> bool:
    """Is more protected than by default?"""
    spec = registry.parse_spec(policy)
    own: Any = registry.find(spec.name)
    given = {name: spec.parameters[name] for name in PROTECTION if name in spec.parameters}
    return any(isinstance(x, str) or x > (getattr(own, name) or 0) for name, x in given.items())


def _families(lines: Mapping[str, Points]) -> dict[str, list[str]]:
    """Family -> its policies that do not know the future, in the order of their names."""
    found: dict[str, list[str]] = {}
    for policy in sorted(lines):
        cls: Any = registry.find(registry.parse_spec(policy).name)
        if not hasattr(cls, "foresee") and label(policy) != "full":
            found.setdefault(getattr(cls, "family", "") or "others", []).append(policy)
    return dict(sorted(found.items()))


def _panel(
    ax: Axes,
    family: str,
    members: Sequence[str],
    lines: Mapping[str, Points],
    more: Mapping[str, str],
    ceiling: Points,
    named: bool,
) -> None:
    for policy, points in lines.items():
        xs, ys = zip(*points, strict=True)
        if (base := label(policy)) in _REFERENCES:
            ax.plot(xs, ys, _REFERENCES[base], color=page.INK, linewidth=1.0, label=base if named else None, zorder=2)
        elif base == "full":
            ax.plot(xs, ys, "x", color=page.INK, markersize=5, label="full cache" if named else None, zorder=2)
        elif policy not in members:
            ax.plot(xs, ys, color=page.FAINT, linewidth=0.7, zorder=1)
    if ceiling:
        xs, ys = zip(*ceiling, strict=True)
        ax.plot(xs, ys, color=page.INK, linewidth=1.4, label="step ceiling" if named else None, zorder=2)
    names = sorted({label(policy) for policy in members})
    for policy in members:
        i = names.index(label(policy))
        xs, ys = zip(*lines[policy], strict=True)
        open_ = is_protected(policy)
        ax.plot(
            xs, ys, "--" if open_ else "-", color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)],
            markerfacecolor="white" if open_ else None, markersize=4, linewidth=1.3, zorder=3,
            label=None if open_ and any(p != policy and label(p) == label(policy) for p in members)
            else label(policy) + more[policy],
        )  # fmt: skip
    ax.set_title(family, loc="left", fontweight="bold", fontsize=9)
    ax.grid(axis="y")
    ax.legend(fontsize=6.2, frameon=False, handlelength=2.2, labelspacing=0.25, ncols=1 + (len(names) > 6))


def _ceiling(rows: Sequence[Mapping[str, Any]], x: str, across: columns.Axis) -> Points:
    """The bound of each budget at the place of a policy that holds the budget and no more, where one did (LRU)."""
    rows = [row for row in rows if row["policy"] == "lru" and math.isfinite(row["even_ceiling"])]
    return sorted((across.place(row[x]), row["even_ceiling"]) for row in rows)
