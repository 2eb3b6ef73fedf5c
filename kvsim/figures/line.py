"""A measured column of many runs against one of their settings, one line per policy.

What a reader must not confuse looks different: the bound is dash-dotted under a shaded region nobody reaches,
references that know the future are grey and dashed, the full cache is a plain black line, and each policy has a
colour and a marker of its own, the same in every figure, with its family told by the kind of line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kvsim import registry
from kvsim.errors import ResultError
from kvsim.figures import columns, page
from kvsim.results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that stay apart in the common kinds of colour blindness (after Okabe and Ito, and Tol), best contrasts first.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#332288", "#56B4E9", "#882255", "#999933", "#44AA99",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "p", ">", "h")
_KNOWN = ("h2o", "tova", "lru", "streaming-llm", "lfu", "lazy-eviction", "h2o-mask", "random", "fifo")
_SLOTS = {name: i for i, name in enumerate(_KNOWN)}
_FAMILY_LINES: dict[str, Any] = {
    "classic": (0, (1.2, 1.2)),
    "window": (0, (7, 1.8)),
    "recurrence": (0, (7, 1.2, 1.2, 1.2, 1.2, 1.2)),
}
_ORACLES: dict[str, tuple[str, str]] = {
    "belady": ("#555555", "d"),
    "mass-oracle": ("#8c8c8c", "*"),
    "optimal": ("#333333", "p"),
}
_DASHES, _DASH_DOT = (0, (4, 2)), (0, (6, 2, 1, 2))
_MARKS = {"markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.6}
_MARKED = 10  # marks on a line of many points
_TURNED = 60  # letters of the names on an axis from which they are turned
_MOVED_BY_BUDGET = ("budget", "budget_bytes")


@dataclass
class Line:
    """One line of the figure. `points`: (x, y) in axis units, in the order they are joined."""

    key: tuple[str, ...]  # value of hue, then of the other settings in which lines differ
    name: str
    group: str  # "reference" or "policy"
    points: list[tuple[float, float]]
    look: dict[str, Any] = field(default_factory=dict)

    @property
    def end(self) -> float:
        return self.points[-1][1]


def draw(runs: Sequence[Result], rows: Sequence[Mapping[str, Any]], x: str, y: str, hue: str) -> Figure:
    """Raises ConfigError for a column nobody has, ResultError when no run has a value to draw."""
    known = list(dict.fromkeys(k for row in rows for k in row))
    for column, role in ((x, "x"), (y, "y"), (hue, "hue")):
        columns.check(column, known, role)
    rows = [{k: row.get(k) for k in known} for row in rows if math.isfinite(columns.number(row, y))]
    if not rows:
        raise ResultError(
            f'no run has a value of "{y}"', hint="the column is empty for these runs; choose another with --y"
        )
    across = columns.axis(x, _highest_first(rows, x, y))
    factor, unit = columns.unit(y, [columns.number(row, y) for row in rows])
    lines = _lines(runs, rows, x, y, hue, across, factor)
    names = sum(map(len, across.ticks.values())) > _TURNED
    longest = max(len(line.name) for line in lines)  # the legend stands beside the axes, whatever it needs
    figure = page.sheet(max(7.6, 5.4 + 0.066 * longest), max(4.6 + 1.2 * names, 1.6 + 0.215 * (len(lines) + 6)))
    ax = figure.add_subplot()
    _plot(ax, lines, across, flat=x in _MOVED_BY_BUDGET)
    entries = _bound(ax, rows, x, across) if y == "recall" else []
    _axes(ax, across, columns.label(y, unit, lines=2), y, lines)
    _legend(ax, lines, entries, hue)
    predicted = columns.is_time(y) or columns.is_time(x) or y == "stall_share"
    words = ("predicted " if predicted else "") + f"{columns.title(y)} by {columns.title(x)}"
    foot = page.CAVEAT + (f"; {page.PREDICTED}" if predicted else "")
    page.head(figure, words[0].upper() + words[1:], page.facts(runs, hide=(x, hue)), foot)
    return figure


def _highest_first(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> list[Any]:
    """The values of x, in the order that names on the axis take."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(str(row[x]), []).append(columns.number(row, y))
    return sorted((row[x] for row in rows), key=lambda v: (-sum(found[str(v)]) / len(found[str(v)]), str(v)))


def _lines(
    runs: Sequence[Result],
    rows: Sequence[Mapping[str, Any]],
    x: str,
    y: str,
    hue: str,
    across: columns.Axis,
    factor: float,
) -> list[Line]:
    """Rows that differ in nothing but x (or, where x is measured, the budget) make a line."""
    measured = {k for k in rows[0] if k not in runs[0].manifest["config"] and not k.startswith("hardware.")}
    along = "budget" if x in measured else x
    step = columns.axis(along, [row[along] for row in rows])
    settings = [k for k in rows[0] if k not in (*measured, x, hue, along) and len({str(r[k]) for r in rows}) > 1]
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((str(row[hue]), *(str(row[k]) for k in settings)), []).append(row)
    lines = []
    for key, members in groups.items():
        members = sorted(members, key=lambda row: step.place(row[along]))
        reference = hue == "policy" and (key[0] == "full" or bool(members[0]["oracle"]))
        name = ", ".join(
            [_name(key[0], reference), *map(" ".join, zip(map(columns.title, settings), key[1:], strict=True))]
        )
        name += columns.more(members) if hue == "policy" and not reference else ""
        points = [(across.place(row[x]), columns.number(row, y) * factor) for row in members]
        lines.append(Line(key, name, "reference" if reference else "policy", points))
    if hue == "policy" and y in columns.LOSSLESS and not any(line.key[0] == "full" for line in lines):
        places = [across.place(row[x]) for row in rows]
        whole = [(p, columns.LOSSLESS[y]) for p in (min(places), max(places))]
        lines.append(Line(("full",), _name("full", True), "reference", whole))
    _dress(lines, hue)
    return lines


def _name(value: str, reference: bool) -> str:
    if not reference or "oracle" in value:
        return value
    return "full cache" if value == "full" else f"{value} (oracle)"


def _dress(lines: list[Line], hue: str) -> None:
    """Give each line its looks: colour by policy, along a scale for numbers, or in order of their names; the marker
    likewise, or by whatever else the lines differ in."""
    variants = sorted({line.key[1:] for line in lines})
    scale = _scale(hue, sorted({line.key[0] for line in lines})) if hue != "policy" else {}
    slots = _choose([line.key[0] for line in lines if line.group == "policy"], hue)
    for line in lines:
        base = registry.parse_spec(line.key[0]).name if hue == "policy" else line.key[0]
        if line.group == "reference" and base == "full":
            line.look = {"color": page.INK, "linestyle": "-", "linewidth": 1.0}
        elif line.group == "reference":
            colour, marker = _ORACLES.get(base, ("#777777", "d"))
            line.look = {
                "color": colour,
                "linestyle": _DASHES,
                "marker": marker,
                "linewidth": 1.3,
                "markersize": 8 if marker == "*" else 5,
            }
        else:
            slot = slots[line.key[0]]
            line.look = {
                "color": scale.get(line.key[0], COLOURS[slot % len(COLOURS)]),
                "marker": MARKERS[slot % len(MARKERS)],
                "linewidth": 1.6,
                "linestyle": _FAMILY_LINES.get(_family(base), "-") if hue == "policy" else "-",
            }
        if len(variants) > 1 and "marker" in line.look:
            line.look["marker"] = MARKERS[variants.index(line.key[1:]) % len(MARKERS)]


def _choose(values: Sequence[str], hue: str) -> dict[str, int]:
    """A slot of colour and marker for each value: a policy's own where it is free, else the next free one."""
    slots: dict[str, int] = {}
    for value in sorted(set(values)):
        slot = _SLOTS.get(registry.parse_spec(value).name, len(_SLOTS)) if hue == "policy" else 0
        while slot in slots.values():
            slot += 1
        slots[value] = slot
    return slots


def _family(name: str) -> str:
    return getattr(registry.find(name), "family", "") if name in registry.names() else ""


def _scale(hue: str, values: list[str]) -> dict[str, str]:
    """Dark to light in the order of the numbers; nothing where the values are names."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    axis = columns.axis(hue, values)
    if axis.words or len(values) < 2:
        return {}
    ordered = sorted(values, key=axis.place)
    return {v: to_hex(colormaps["viridis"](0.88 * i / (len(ordered) - 1))) for i, v in enumerate(ordered)}


def _plot(ax: Axes, lines: Sequence[Line], across: columns.Axis, flat: bool) -> None:
    """`flat`: the full cache does not depend on x, so its line crosses the whole figure."""
    for line in lines:
        xs, ys = zip(*line.points, strict=True)
        if "marker" not in line.look and flat:
            ax.axhline(sum(ys) / len(ys), zorder=1.5, **line.look)
            continue
        if across.words or len(set(xs)) == 1:  # nothing to join
            line.look = {"markersize": 7, "marker": "o", **line.look, "linestyle": ""}
        marked = _spread(xs, across.log) if len(xs) > 2 * _MARKED else None  # a mark on each would be a band
        ax.plot(xs, ys, zorder=2 if line.group == "reference" else 3, markevery=marked, **{**_MARKS, **line.look})


def _spread(xs: Sequence[float], log: bool) -> list[int]:
    """Indices of points that lie about evenly along the axis, the ends among them."""
    places = np.log(xs) if log else np.array(xs)
    return sorted({int(np.abs(places - p).argmin()) for p in np.linspace(places[0], places[-1], _MARKED)})


def _bound(ax: Axes, rows: Sequence[Mapping[str, Any]], x: str, across: columns.Axis) -> list[tuple[Any, str]]:
    """Draw the step ceiling of bounded lossy runs where x decides it; returns its legend entry.

    Runs that see the same pages have the same one; of different pages the highest counts.
    """
    alike: dict[tuple[float, str], float] = {}
    for row in rows:
        value = row.get("even_ceiling", float("nan"))
        if row["regime"] == "lossy" and row["policy"] != "full" and math.isfinite(value) and not across.words:
            key = across.place(row[x]), f"{row['page_size']} {row['requests']}"
            alike[key] = min(alike.get(key, value), value)
    found: dict[float, float] = {}
    for (place, _), value in alike.items():
        found[place] = max(found.get(place, 0.0), value)
    if not found or x not in _MOVED_BY_BUDGET:
        return []
    xs = sorted(found)
    ys = [found[p] for p in xs]
    look = {"color": page.INK, "linestyle": _DASH_DOT, "linewidth": 1.1}
    (line,) = ax.plot(xs, ys, zorder=1.8, marker="" if len(xs) > 1 else "_", **look)  # type: ignore[arg-type]
    region = ax.fill_between(
        xs, ys, 1.0, facecolor="#ececec", edgecolor="#c4c4c4", hatch="////", linewidth=0, zorder=0.5
    )
    return [(line, "step ceiling"), (region, "out of reach at this size")]


def _axes(ax: Axes, across: columns.Axis, y_label: str, y: str, lines: Sequence[Line]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    if across.log:
        ax.set_xscale("log")
    if across.ticks:
        ax.xaxis.set_major_locator(FixedLocator(sorted(across.ticks)))
        turned: dict[str, Any] = (
            {"rotation": 30 if len(across.ticks) < 9 else 90, "ha": "right", "va": "center", "rotation_mode": "anchor"}
            if sum(map(len, across.ticks.values())) > _TURNED
            else {}
        )
        ax.set_xticks(sorted(across.ticks), [across.ticks[p] for p in sorted(across.ticks)], **turned)
        ax.xaxis.set_minor_locator(NullLocator())
    values = [v for line in lines for _, v in line.points]
    if columns.is_time(y) and min(values) > 0 and max(values) > 20 * min(values):
        ax.set_yscale("log")
    elif y in columns.LOSSLESS:
        low, high = min(values), max(values)
        room = 0.04 * max(high - low, 1e-3)
        ax.set_ylim(max(0.0, low - 2 * room) if low > 0 else -room, min(high + room, 1 + room))
    elif min(values) >= 0:  # sizes and times from zero: a difference looks as large as it is
        ax.set_ylim(0, 1.06 * max(values) or 1.0)
    ax.set_xlabel(across.label)
    ax.set_ylabel(y_label)
    ax.grid(axis="y")


def _legend(ax: Axes, lines: Sequence[Line], bound: list[tuple[Any, str]], hue: str) -> None:
    """Outside, to the right; each group from the highest to the lowest line at the right end."""
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

    class Heading:
        def legend_artist(self, legend: Any, handle: Any, fontsize: Any, box: Any) -> Any:
            text = Text(0, 0, handle, fontsize=fontsize, fontweight="bold")
            box.add_artist(text)
            return text

    handles: list[tuple[Any, str]] = [("bound", ""), *bound] if bound else []
    for group, words in (
        ("reference", "references"),
        ("policy", "policies" if hue == "policy" else columns.title(hue)),
    ):
        members = sorted((line for line in lines if line.group == group), key=lambda line: (-line.end, line.name))
        handles += [(words, " " * 2 * (len(words) - 6))] * bool(members)
        handles += [(Line2D([], [], **{**_MARKS, **m.look}), m.name) for m in members]
    ax.legend(
        [h for h, _ in handles],
        [t for _, t in handles],
        loc="upper left",
        bbox_to_anchor=(1.01, 1.02),
        frameon=False,
        handlelength=3.4,
        labelspacing=0.45,
        borderaxespad=0.2,
        handler_map={str: Heading()},
    )
