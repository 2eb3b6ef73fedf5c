"""Predicted against measured: all rows in one square, where the errors come from, curves with their knees, and steps.

The functions take plain columns, as `kvsim.validate` writes them, and write one file each, the same bytes every time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvsim.figures import columns, page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Columns = Mapping[str, np.ndarray]
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#332288", "#56B4E9", "#882255", "#999933")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_MEASURED, _PREDICTED, _SIMPLE = page.INK, "#0072B2", "#8c8c8c"
_TERMS = {"layers": "#0072B2", "moving": "#D55E00", "head": "#009E73"}
_MOST = 9  # curves in one figure
_LEGEND: dict[str, Any] = {"frameon": False, "loc": "upper left", "bbox_to_anchor": (1.01, 1.02), "borderaxespad": 0.2}


def predicted_against_measured(errors: Columns, lines: Sequence[str], foot: str, path: Path) -> Path:
    """Every row of errors.parquet, with the p10 to p90 of its samples and the prediction's band."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    with page.style():
        figure = page.sheet(7.4, 5.2)
        ax = figure.add_subplot()
        factor, unit = columns.unit("_s", [*errors["measured_s"], *errors["predicted_s"]])
        for i, group in enumerate(dict.fromkeys(errors["groups"])):
            _cloud(ax, {n: c[errors["groups"] == group] for n, c in errors.items()}, factor, group, i)
        ends = np.array([*ax.get_xlim(), *ax.get_ylim()])
        span = np.array([min(ends), max(ends)])
        ax.fill_between(span, span / 1.1, span * 1.1, color="#f0f0f0", linewidth=0, zorder=0.4)
        ax.plot(span, span, color=page.GREY, linewidth=0.8, zorder=1, label="equal; shaded: within 10 %")
        ax.set(xlim=span, ylim=span, aspect="equal")
        for axis in (ax.xaxis, ax.yaxis):  # 10, 20, 50, 100: what fits without overlap
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
        ax.set_xlabel(f"measured time per step ({unit})")
        ax.set_ylabel(f"predicted time per step ({unit})")
        ax.legend(**_LEGEND)
        foot += "; horizontal bars: p10 to p90 of the samples, vertical: 90 % band of the prediction"
        page.head(figure, "Predicted against measured", lines, foot)
    return page.save(figure, path)


def _cloud(ax: Axes, rows: Columns, factor: float, group: str, index: int) -> None:
    colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
    x, y = rows["measured_s"] * factor, rows["predicted_s"] * factor
    noise = np.abs(np.array([rows["p10_s"], rows["p90_s"]]) * factor - x)
    band = np.abs(np.nan_to_num(np.array([rows["band_low_s"], rows["band_high_s"]]) * factor - y))
    ax.errorbar(x, y, yerr=band, xerr=noise, fmt="none", ecolor=colour, elinewidth=0.7, alpha=0.5, zorder=2)
    ax.loglog(x, y, marker, color=colour, markersize=5, markeredgecolor="white", markeredgewidth=0.5, label=group)


def error_by_term(errors: Columns, lines: Sequence[str], foot: str, path: Path) -> Path:
    """Per group the mean of each part of the error, stacked, and the mean of the whole."""
    names = list(dict.fromkeys(errors["groups"]))
    known = np.isfinite(errors["error_layers"])
    names = [name for name in names if (known & (errors["groups"] == name)).any()]
    with page.style():
        figure = page.sheet(7.4, 1.9 + 0.42 * len(names))
        ax = figure.add_subplot()
        places = np.arange(len(names))[::-1]
        members = [known & (errors["groups"] == name) for name in names]
        above, below = np.zeros(len(names)), np.zeros(len(names))
        for term, colour in _TERMS.items():
            mean = np.array([100 * errors[f"error_{term}"][m].mean() for m in members])
            left = np.where(mean > 0, above, below)
            ax.barh(places, mean, left=left, height=0.6, color=colour, label=term)
            above, below = above + np.maximum(mean, 0), below + np.minimum(mean, 0)
        whole = [100 * errors["error"][m].mean() for m in members]
        ax.plot(whole, places, "D", color=page.INK, markersize=5, markeredgecolor="white", label="whole error")
        ax.axvline(0, color=page.GREY, linewidth=0.8)
        ax.set_yticks(places, [f"{name} ({m.sum()})" for name, m in zip(names, members, strict=True)])
        ax.set_xlabel("mean signed error (% of the measured step)")
        ax.grid(axis="x")
        ax.legend(**_LEGEND)
        page.head(figure, "Where the errors come from", lines, foot + "; in brackets the number of rows")
    return page.save(figure, path)


def knees(curves: Sequence[Mapping[str, Any]], lines: Sequence[str], foot: str, path: Path) -> Path:
    """Step time against the resident share, one panel per curve, the first _MOST; knees are the vertical lines."""
    shown = list(curves)[:_MOST]
    across = min(3, len(shown))
    down = math.ceil(len(shown) / across)
    with page.style():
        figure = page.sheet(2.2 + 2.7 * across, 1.9 + 2.1 * down)
        panels = figure.subplots(down, across, squeeze=False).ravel()
        for ax, curve in zip(panels, shown, strict=False):
            _curve(ax, curve)
        for ax in panels[len(shown) :]:
            ax.set_visible(False)
        panels[across - 1].legend(**_LEGEND)
        foot += (
            "; bars: p10 to p90 of the samples; dashed: the knee, where the link-bound line meets the resident level"
        )
        if len(shown) < len(curves):
            foot += f"; {len(curves) - len(shown)} more curves are not drawn"
        page.head(figure, "Step time against the GPU's share of the cache", lines, foot)
    return page.save(figure, path)


def _curve(ax: Axes, curve: Mapping[str, Any]) -> None:
    factor, unit = columns.unit("_s", curve["measured_s"])
    share, measured = 100 * curve["resident"], curve["measured_s"] * factor
    noise = np.abs(np.array([curve["p10_s"], curve["p90_s"]]) * factor - measured)
    ax.plot(share, curve["calibrated_max_s"] * factor, ":", color=_SIMPLE, linewidth=1.2, label="calibrated max")
    ax.plot(share, curve["predicted_s"] * factor, "-", color=_PREDICTED, linewidth=1.4, label="predicted")
    look: dict[str, Any] = {"color": _MEASURED, "markersize": 4, "elinewidth": 0.8, "capsize": 2}
    ax.errorbar(share, measured, yerr=noise, fmt="o", label="measured", **look)
    for knee, colour in ((curve["knee_measured"], _MEASURED), (curve["knee_predicted"], _PREDICTED)):
        if math.isfinite(knee):
            ax.axvline(100 * knee, color=colour, linewidth=0.8, linestyle=(0, (4, 2)))
    ax.set_title(curve["title"], loc="left")
    ax.set_xlabel("resident pages (%)")
    ax.set_ylabel(f"time per step ({unit})")
    ax.set_ylim(bottom=0)
    ax.grid(axis="y")


def steps(
    batches: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]], lines: Sequence[str], foot: str, path: Path
) -> Path:
    """(title, context, measured seconds, predicted seconds) of each batch of a captured run, step by step."""
    with page.style():
        figure = page.sheet(7.4, 4.2)
        ax = figure.add_subplot()
        factor, unit = columns.unit("_s", [np.median(np.concatenate([b[2] for b in batches]))])
        for i, (title, context, measured, predicted) in enumerate(batches):
            colour = _COLOURS[i % len(_COLOURS)]
            ax.plot(context, measured * factor, ".", color=colour, markersize=3, alpha=0.6, label=f"{title}, measured")
            ax.plot(context, predicted * factor, "-", color=colour, linewidth=1.6, label=f"{title}, predicted")
        every = np.concatenate([np.concatenate(b[2:]) for b in batches]) * factor
        ax.set_ylim(0, 1.15 * float(np.quantile(every, 0.99)))  # a step that the system interrupted is off the scale
        ax.set_xlabel("context (tokens)")
        ax.set_ylabel(f"time per step ({unit})")
        ax.grid(axis="y")
        ax.legend(**_LEGEND)
        page.head(figure, "A captured run's own steps against their simulation", lines, foot)
    return page.save(figure, path)
