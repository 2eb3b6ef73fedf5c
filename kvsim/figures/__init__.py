"""Figures of results: `plot` for a notebook, `draw` for a file, `draw_plan` for the [[plot]] tables of a sweep.

matplotlib is imported when something is drawn, never its global state: no window, no pyplot, no settings left behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kvsim.errors import ConfigError, ResultError, nearest
from kvsim.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("line", "families", "timeline", "lanes")
_PLOT_KEYS = ("file", "kind", "x", "y", "hue")


class Table(Protocol):
    """What a Grid is to this module: the runs, and one flat mapping of settings and numbers for each."""

    @property
    def runs(self) -> list[Result]: ...

    def rows(self) -> list[dict[str, Any]]: ...


class Plan(Protocol):
    """What a sweep file asks to be drawn."""

    @property
    def plots(self) -> list[dict[str, Any]]: ...

    @property
    def where(self) -> str | None: ...


def plot(grid: Table, x: str = "budget", y: str | None = None, hue: str = "policy") -> Figure:
    """Column `y` of every run against column `x`, one line per value of `hue` (and of whatever else differs); one run
    of each policy against x = "policy": a bar for each, best first.

    `y` is recall in the lossy regime and the page hit rate where evicted pages come back, unless you say otherwise.
    Raises ConfigError for an unknown column, ResultError when there is nothing to draw.
    """
    from kvsim.figures import line, page, ranking

    runs, rows = _some(grid.runs), grid.rows()
    with page.style():
        if ranking.fits(rows, x, hue):
            return ranking.draw(runs, rows, y or _metric(runs))
        return line.draw(runs, rows, x, y or _metric(runs), hue)


def draw(
    grid: Table,
    output: Path,
    *,
    kind: str = "line",
    x: str = "budget",
    y: str | None = None,
    hue: str = "policy",
    steps: str | None = None,
) -> Path:
    """Draw into a .png, .svg or .pdf file, the same bytes each time.

    `kind`: "line" over many runs, or "families" with a panel for each family of policies; of one run, "timeline" of
    its decode steps `steps` ("100:140") or "lanes". Raises ConfigError for what cannot be drawn, ResultError for what
    is empty or cannot be written.
    """
    from kvsim.figures import families, lanes, page, timeline

    if kind not in KINDS:
        raise ConfigError(f'cannot draw a "{kind}"', hint=nearest(kind, KINDS, f"{', '.join(KINDS)}:"))
    page.check_name(output)
    if kind == "line":
        return page.save(plot(grid, x, y, hue), output)
    runs = _some(grid.runs)
    if kind == "families":
        with page.style():
            figure = families.draw(runs, grid.rows(), x, y or _metric(runs))
        return page.save(figure, output)
    if len(runs) > 1:
        raise ConfigError(f"{kind} draws one run, here are {len(runs)}", hint="give the folder of one of them")
    with page.style():
        figure = timeline.draw(runs[0], steps) if kind == "timeline" else lanes.draw(runs[0], y or _metric(runs))
    return page.save(figure, output)


def draw_plan(grid: Table, plan: Plan, folder: Path) -> list[Path]:
    """Draw each [[plot]] table of a sweep file into its folder."""
    for table in plan.plots:
        if not isinstance(table, dict) or "file" not in table or not set(table) <= set(_PLOT_KEYS):
            hint = f"it needs file, and may have {', '.join(_PLOT_KEYS[1:])}"
            raise ConfigError(f"[[plot]] {table} is not a plot", where=plan.where, hint=hint)
    return [draw(grid, folder / t["file"], **{k: v for k, v in t.items() if k != "file"}) for t in plan.plots]


def _some(runs: Sequence[Result]) -> Sequence[Result]:
    if not runs:
        raise ResultError("there is no run to draw", hint="give a folder that `kvsim run` or `kvsim sweep` wrote")
    return runs


def _metric(runs: Sequence[Result]) -> str:
    return "recall" if all(r.manifest["config"]["regime"] == "lossy" for r in runs) else "page_hit_rate"
