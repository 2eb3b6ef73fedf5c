"""Where a run does well and where it does not: a heat map of layers by KV heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvsim.errors import ResultError
from kvsim.figures import columns, page
from kvsim.results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# column of the figure -> numerator and denominator in the lanes table
SHARES = {
    "recall": ("attended", "weight"),
    "mass_hit_rate": ("hit", "weight"),
    "page_hit_rate": ("found_pages", "used_pages"),
    "recurrence_loss": ("found_pages", "used_pages"),
}
_ROOM_FOR_NUMBERS = 64  # lanes


def draw(result: Result, y: str) -> Figure:
    """`y` of every lane over all decode steps. Raises ConfigError for a column that lanes do not have, ResultError
    when there is no lane."""
    columns.check(y, SHARES, "a heat map of lanes")
    values = _values(result, y)
    heads, layers = values.shape
    figure = page.sheet(*_size(layers, heads))
    ax = figure.add_subplot()
    top = None if y == "recurrence_loss" else 1.0
    image = ax.imshow(values, cmap="viridis", aspect="auto", interpolation="nearest", vmin=_floor(values), vmax=top)
    _write(ax, values, image)
    for axis, count in ((ax.xaxis, layers), (ax.yaxis, heads)):
        axis.set_ticks(range(0, count, max(1, -(-count // 16))))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("layer")
    ax.set_ylabel("KV head")
    bar = figure.colorbar(image, ax=ax, pad=0.02)
    bar.set_label(f"{columns.title(y)} (share)")
    bar.outline.set_visible(False)
    ends = [divmod(int(find(values)), layers) for find in (np.nanargmin, np.nanargmax)]
    span = "; ".join(
        f"{word} {values[h, n]:.3f} in layer {n}, head {h}"
        for word, (h, n) in zip(("lowest", "highest"), ends, strict=True)
    )
    title = f"{columns.title(y).capitalize()} by layer and KV head"
    page.head(figure, title, [*page.facts([result]), span], page.CAVEAT)
    return figure


def _values(result: Result, y: str) -> np.ndarray:
    """float64 [KV heads, layers]; NaN where a lane was never asked for anything."""
    table = result.tables["lanes"]
    if not len(table["layer"]):
        raise ResultError("the run has no lane", hint="draw the lanes of a run that generates tokens")
    part, whole = (np.asarray(table[name], np.float64) for name in SHARES[y])
    share = np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
    values = np.full((int(table["kv_head"].max()) + 1, int(table["layer"].max()) + 1), np.nan)
    values[table["kv_head"], table["layer"]] = 1 - share if y == "recurrence_loss" else share
    if np.isnan(values).all():
        raise ResultError(f'no lane has a value of "{y}"', hint="choose another column with --y")
    return values


def _floor(values: np.ndarray) -> float:
    """Colours start at the lowest tenth, so that they mean round numbers."""
    return float(np.floor(np.nanmin(values) * 10) / 10)


def _size(layers: int, heads: int) -> tuple[float, float]:
    """Inches: square cells while there is room for them, between 5 and 10 wide."""
    cell = min(0.55, 8.2 / layers)
    return float(np.clip(cell * layers + 2.2, 5.6, 10.5)), float(np.clip(max(cell, 0.26) * heads + 1.9, 2.9, 8.0))


def _write(ax: Axes, values: np.ndarray, image: AxesImage) -> None:
    """Numbers in the cells of a small map, dark on light and light on dark."""
    if values.size > _ROOM_FOR_NUMBERS:
        return
    low, high = image.get_clim()
    middle = low + 0.6 * (high - low)  # type: ignore[operator]
    for (head, layer), value in np.ndenumerate(values):
        ink = page.INK if value > middle else "white"
        ax.text(layer, head, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
