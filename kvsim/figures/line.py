"""A measured column of many runs against one of their settings, one line per policy.

What a reader must not confuse looks different: the bound is dash-dotted under a shaded region nobody reaches, references that
know the future are grey and dashed, the full cache is a plain black line, and each policy has a colour and a marker of its own,
the same in every figure, with its family told by the kind of line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvsim import registry
from kvsim.errors import ConfigError, ResultError
from kvsim.figures import columns, page
from kvsim.results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that stay apart in the common kinds of colour blindness (after Okabe and Ito, and Tol), darkest contrasts first.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#332288", "#56B4E9", "#882255", "#999933", "#44AA99")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "p", ">", "h")
_SLOTS = {
    "h2o": 0, "tova": 1, "lru": 2, "streaming-llm": 3, "lfu": 4, "lazy-eviction": 5, "h2o-mask": 6, "random": 7, "fifo": 8,
}  # fmt: skip
_FAMILY_LINES: dict[str, Any] = {"classic": (0, (1.2, 1.2)), "window": (0, (7, 1.8)), "recurrence": (0, (7, 1.2, 1.2, 1.2, 1.2, 1.2))}
_ORACLES: dict[str, tuple[str, str]] = {"belady": ("#555555", "d"), "mass-oracle": ("#8c8c8c", "*")}
_DASHES, _DASH_DOT = (0, (4, 2)), (0, (6, 2, 1, 2))
_GROUPS = ("bound", "reference", "policy")
_MOVED_BY_BUDGET = ("budget", "budget_bytes")


@dataclass
class Line:
    """One line of the figure. `points`: (x, y) in axis units, in the order they are joined."""

    name: str
    group: str  # "reference" or "policy"
    points: list[tuple[float, float]]
    look: dict[str, Any] = field(default_factory=dict)

    @property
    def end(self) -> float:
        return self.points[-1][1]


def draw(runs: Sequence[Result], rows: Sequence[Mapping[str, Any]], x: str, y: str, hue: str) -> Figure:
    """Raises ConfigError for a column nobody has, ResultError when no run has a value to draw."""
    known = {k for row in rows for k in row}
    for column, role in ((x, "x"), (y, "y"), (hue, "hue")):
        columns.check(column, known, role)
    rows = [row for row in rows if math.isfinite(columns.number(row, y))]
    if not rows:
        raise ResultError(f'no run has a value of "{y}"', hint="the column is empty for these runs; choose another with --y")
    across = columns.axis(x, [row[x] for row in rows])
    factor, unit = columns.unit(y, [columns.number(row, y) for row in rows])
    lines = _lines(runs, rows, x, y, hue, across, factor)
    figure = page.sheet(7.6, 4.6)
    ax = figure.add_subplot()
    _plot(ax, lines, across, flat=x in _MOVED_BY_BUDGET)
    entries = _bound(ax, rows, x, across) if y == "recall" else []
    _axes(ax, across, columns.label(y, unit), y, lines)
    _legend(ax, lines, entries, hue)
    many = sum(line.group == "policy" for line in lines) > 1
    words = columns.title(y).replace("Attention recall", "Attention recall" if many else "Attention recall")
    foot = "; ".join([page.CAVEAT, *([page.PREDICTED] if columns.is_time(y) or columns.is_time(x) or y == "stall_share" else [])])
    page.head(figure, f"{words} by {columns.title(x)}", page.facts(runs, hide=(x, hue)), foot)
    return figure


def _lines(
    runs: Sequence[Result], rows: Sequence[Mapping[str, Any]], x: str, y: str, hue: str, across: columns.Axis, factor: float
) -> list[Line]:
    """Rows that differ in nothing but x (or, where x is measured, the budget) make a line."""
    measured = {"id", "oracle", "budget_bytes", *runs[0].summary}
    along = "budget" if x in measured else x
    step = columns.axis(along, [row[along] for row in rows])
    settings = [k for k in rows[0] if k not in measured and k not in (x, hue, along) and len({str(r.get(k)) for r in rows}) > 1]
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((str(row[hue]), *(str(row.get(k)) for k in settings)), []).append(row)
    lines = []
    for key, members in groups.items():
        members = sorted(members, key=lambda row: step.place(row[along]))
        name = ", ".join([key[0], *(f"{columns.title(k)} {v}" for k, v in zip(settings, key[1:], strict=True))])
        special = hue == "policy" and (bool(members[0]["oracle"]) or key[0] == "full")
        points = [(across.place(row[x]), columns.number(row, y) * factor) for row in members]
        lines.append(Line(name, "reference" if special else "policy", points))
    if hue == "policy" and y in columns.LOSSLESS and not any(line.name.startswith("full") for line in lines):
        places = [across.place(row[x]) for row in rows]
        lines.append(Line("full", "reference", [(p, columns.LOSSLESS[y]) for p in (min(places), max(places))]))
    _dress(lines, list(groups), hue)
    return lines


def _dress(lines: list[Line], keys: list[tuple[str, ...]], hue: str) -> None:
    """Give each line its looks: by policy, along a colour scale for numbers, or in order of appearance."""
    taken: set[int] = set()
    scale = _scale(sorted({key[0] for key in keys})) if hue != "policy" else {}
    for i, line in enumerate(lines):
        base = line.name.split(",")[0] if hue != "policy" else registry.parse_spec(keys[i][0]).name if i < len(keys) else "full"
        if line.group == "reference" and base == "full":
            line.look = {"color": page.INK, "linestyle": "-", "linewidth": 1.0}
            line.name = line.name.replace("full", "full cache", 1)
            continue
        if line.group == "reference":
            colour, marker = _ORACLES.get(base, ("#777777", "d"))
            line.look = {"color": colour, "linestyle": _DASHES, "marker": marker, "linewidth": 1.3}
            line.name += " (oracle)"
            continue
        slot = _SLOTS.get(base, len(_SLOTS)) if hue == "policy" else 0
        while slot in taken:
            slot += 1
        taken.add(slot)
        line.look = {
            "color": scale.get(keys[i][0], _COLOURS[slot % len(_COLOURS)]), "marker": _MARKERS[slot % len(_MARKERS)],
            "linestyle": _FAMILY_LINES.get(_family(base), "-") if hue == "policy" else "-", "linewidth": 1.6,
        }  # fmt: skip


def _family(name: str) -> str:
    return getattr(registry.find(name), "family", "") if name in registry.names() else ""


def _scale(values: list[str]) -> dict[str, str]:
    """Dark to light in the order of the numbers; nothing where the values are names."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    axis = columns.axis("", values)
    if axis.words or len(values) < 2:
        return {}
    ordered = sorted(values, key=axis.place)
    return {v: to_hex(colormaps["viridis"](0.88 * i / (len(ordered) - 1))) for i, v in enumerate(ordered)}


def _plot(ax: Axes, lines: Sequence[Line], across: columns.Axis, flat: bool) -> None:
    """`flat`: the full cache does not depend on x, so its line crosses the whole figure."""
    common = {"markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.6}
    for line in lines:
        xs, ys = zip(*line.points, strict=True)
        if "marker" not in line.look and flat:
            ax.axhline(sum(ys) / len(ys), zorder=1.5, **line.look)
            continue
        look = {**common, **line.look}
        if len(set(xs)) == 1:
            look |= {"marker": look.get("marker", "|"), "markersize": 7}
        if across.words:
            look |= {"linestyle": "", "marker": look.get("marker", "_"), "markersize": 7}
        ax.plot(xs, ys, zorder=2 if line.group == "reference" else 3, **look)


def _bound(ax: Axes, rows: Sequence[Mapping[str, Any]], x: str, across: columns.Axis) -> list[tuple[Any, str]]:
    """Draw the step ceiling of bounded lossy runs where x decides it; returns its legend entry."""
    found: dict[float, float] = {}
    for row in rows:
        value = row.get("ceiling", float("nan"))
        if row["regime"] == "lossy" and row["policy"] != "full" and math.isfinite(value) and not across.words:
            place = across.place(row[x])
            found[place] = max(found.get(place, 0.0), value)
    if not found or x not in ("budget", "budget_bytes"):
        return []
    xs = sorted(found)
    ys = [found[p] for p in xs]
    look = {"color": page.INK, "linestyle": _DASH_DOT, "linewidth": 1.1}
    (line,) = ax.plot(xs, ys, zorder=1.8, marker="" if len(xs) > 1 else "_", **look)  # type: ignore[arg-type]
    region = ax.fill_between(xs, ys, 1.0, facecolor="#ececec", edgecolor="#c4c4c4", hatch="////", linewidth=0, zorder=0.5)
    return [(line, "step ceiling"), (region, "out of reach at this size")]


def _axes(ax: Axes, across: columns.Axis, y_label: str, y: str, lines: Sequence[Line]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    if across.log:
        ax.set_xscale("log")
    if across.ticks:
        ax.xaxis.set_major_locator(FixedLocator(sorted(across.ticks)))
        ax.set_xticks(sorted(across.ticks), [across.ticks[p] for p in sorted(across.ticks)])
        ax.xaxis.set_minor_locator(NullLocator())
    values = [v for line in lines for _, v in line.points]
    if columns.is_time(y) and min(values) > 0 and max(values) > 20 * min(values):
        ax.set_yscale("log")
    elif y in columns.LOSSLESS:
        low, high = min(values), max(values)
        room = 0.04 * max(high - low, 1e-3)
        ax.set_ylim(max(0.0, low - 2 * room) if low > 0 else -room, min(high + room, 1 + room))
    elif min(values) >= 0 and min(values) < 0.5 * max(values):
        ax.set_ylim(bottom=0)
    ax.set_xlabel(across.label)
    ax.set_ylabel(y_label)
    ax.grid(axis="y")


def _legend(ax: Axes, lines: Sequence[Line], bound: list[tuple[Any, str]], hue: str) -> None:
    """Outside, to the right; each group from the highest to the lowest line at the right end."""
    from matplotlib.lines import Line2D

    blank = Line2D([], [], linestyle="")
    handles: list[tuple[Any, str]] = []
    heads = {"reference": "references", "policy": "policies" if hue == "policy" else columns.title(hue)}
    if bound:
        handles += [(blank, "bound"), *bound]
    for group, words in heads.items():
        members = sorted((line for line in lines if line.group == group), key=lambda line: (-line.end, line.name))
        if members:
            handles.append((blank, words))
            handles += [(Line2D([], [], markersize=5, markeredgecolor="white", markeredgewidth=0.6, **m.look), m.name) for m in members]
    legend = ax.legend(
        [h for h, _ in handles], [t for _, t in handles], loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False,
        handlelength=3.4, labelspacing=0.45, borderaxespad=0.2,
    )  # fmt: skip
    for text, (handle, _) in zip(legend.get_texts(), handles, strict=True):
        if handle is blank:
            text.set_fontweight("bold")
            text.set_x(-42)
