"""A window of decode steps of one run on the clock: what the GPU did, what the links carried, and what was found.

Inside a step only totals are recorded. A bar therefore starts with its step and is as long as the total; a link's bar
is its bytes at the rate the link had while it was busy, behind what it still had to carry.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvsim.errors import ConfigError, ResultError
from kvsim.figures import columns, page
from kvsim.results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WINDOW = 40  # decode iterations shown unless `steps` says otherwise
_TOTALS = "inside a step only totals are recorded: bars start with it, a link's bar is its bytes at its mean busy rate"
_COMPUTE, _STALL, _PREFILL, _OTHER = "#0072B2", "#D55E00", "#332288", "#ececec"
# link, direction, label, colour, the columns whose bytes it carries
_HOST, _SSD = ("fetched_host_bytes", "prefetched_host_bytes"), ("fetched_ssd_bytes", "prefetched_ssd_bytes")
_LINKS = (
    ("pcie", "h2d", "host to GPU", "#009E73", _HOST + _SSD),
    ("pcie", "d2h", "GPU to host", "#E69F00", ("spilled_host_bytes",)),
    ("ssd", "read", "SSD read", "#882255", _SSD),
    ("ssd", "write", "SSD write", "#CC79A7", ("spilled_ssd_bytes",)),
)
_MOVES = (
    ("fetched_host_bytes", "fetched from host", "#009E73", 1),
    ("fetched_ssd_bytes", "fetched from SSD", "#882255", 1),
    ("prefetched_host_bytes", "ahead from host", "#56B4E9", 1),
    ("prefetched_ssd_bytes", "ahead from SSD", "#AA4499", 1),
    ("spilled_host_bytes", "spilled to host", "#E69F00", -1),
    ("spilled_ssd_bytes", "spilled to SSD", "#CC79A7", -1),
)

_BESIDE: dict[str, Any] = {
    "loc": "upper left",
    "bbox_to_anchor": (1.005, 1.05),
    "frameon": False,
    "handlelength": 1.2,
    "borderaxespad": 0.2,
}


@dataclass(frozen=True)
class Iterations:
    """The run's steps on the machine, added up over the requests that stepped together.

    `number`: the decode iteration, from 1; 0 at prefill.
    """

    number: np.ndarray
    columns: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def between(self, first: int, last: int) -> Iterations:
        """Decode iterations first .. last - 1, and the prefills between them."""
        inside = np.flatnonzero((self.number >= first) & (self.number < last))
        chosen = slice(inside[0], inside[-1] + 1)
        return Iterations(self.number[chosen], {n: c[chosen] for n, c in self.columns.items()})


def draw(result: Result, steps: str | None = None) -> Figure:
    """Raises ConfigError for a window the run does not have, ResultError when it has no decode step."""
    every = _iterations(result)
    first, last = _window(every, steps)
    shown = every.between(first, last)
    factor, unit = columns.unit("_s", [shown["end_s"][-1] - shown["start_s"][0]])
    start = (shown["start_s"] - shown["start_s"][0]) * factor
    end = (shown["end_s"] - shown["start_s"][0]) * factor
    links = [link for link in _LINKS if _bytes(shown, link[4]).any()]
    figure = page.sheet(9.0, 4.7 + 0.3 * len(links))
    lanes, moved, found = figure.subplots(
        3, 1, sharex=True, gridspec_kw={"height_ratios": [0.9 + 0.55 * len(links), 1.3, 1.1]}
    )
    _lanes(lanes, result, shown, links, start, end, factor)
    _moved(moved, shown, start, end)
    _found(found, shown, start, end, lossy=result.manifest["config"]["regime"] == "lossy")
    found.set_xlabel(f"time since decode step {first} began ({unit}, predicted)")
    lanes.set_xlim(0, end[-1])
    for ax in (lanes, moved, found):
        edges = start if len(start) <= 80 else start[:0]
        ax.vlines(edges, 0, 1, transform=ax.get_xaxis_transform(), color=page.FAINT, linewidth=0.5, zorder=0)
    _step_numbers(lanes, shown, start, end)
    title = f"Predicted timeline, decode steps {first} to {last - 1}"
    page.head(figure, title, page.facts([result]), "; ".join((_TOTALS, page.PREDICTED, page.CAVEAT)))
    figure.align_ylabels()
    return figure


def _iterations(result: Result) -> Iterations:
    """Add up what the requests of one iteration moved; they share its start."""
    steps = result.tables["steps"]
    if not (steps["step"] > 0).any():
        raise ResultError("the run has no decode step", hint="draw the timeline of a run that generates tokens")
    _, first, group = np.unique(steps["start_s"], return_index=True, return_inverse=True)
    own = ("start_s", "end_s", "compute_s", "stall_s")  # the iteration's, the same in each of its rows
    sums = [n for n in steps if n not in (*own, "request", "step")]
    table = {n: steps[n][first] for n in own} | {n: np.bincount(group, weights=steps[n]) for n in sums}
    decode = steps["step"][first] > 0
    return Iterations(np.where(decode, np.cumsum(decode), 0), table)


def _window(every: Iterations, steps: str | None) -> tuple[int, int]:
    """First and one past the last decode iteration to show: as asked, or from where pages first have to leave."""
    count = int(every.number.max())
    if steps is None:
        left = every["dropped_pages"] + every["spilled_host_bytes"] + every["spilled_ssd_bytes"]
        busy = every.number[(left > 0) & (every.number > 0)]
        first = min(int(busy[0]) if len(busy) else 1, max(1, count - WINDOW + 1))
        return first, min(count + 1, first + WINDOW)
    try:
        first, last = (int(part) for part in steps.split(":"))
    except ValueError:
        raise ConfigError(
            f'cannot read steps "{steps}"', hint='write first and one past the last, such as "100:140"'
        ) from None
    if not 1 <= first < last or first > count:
        raise ConfigError(f'steps "{steps}" are not in the run', hint=f"it has decode steps 1 to {count}")
    return first, min(last, count + 1)


def _bytes(shown: Iterations, names: Iterable[str]) -> np.ndarray:
    return np.sum([shown[n] for n in names], axis=0)


def _lanes(
    ax: Axes,
    result: Result,
    shown: Iterations,
    links: Sequence[tuple],
    start: np.ndarray,
    end: np.ndarray,
    factor: float,
) -> None:
    """The Gantt chart: the GPU's lane on top, one lane per link that carried something."""
    names = ["GPU", *(link[2] for link in links)]
    compute, stall = shown["compute_s"] * factor, shown["stall_s"] * factor
    decode = shown.number > 0
    bars: dict[str, Any] = {"align": "center", "height": 0.62, "linewidth": 0}
    if (end - start).sum() > 1.01 * (compute + stall).sum():
        ax.barh(np.zeros(len(start)), end - start, left=start, color=_OTHER, label="launch, queue", **bars)
    for kind, chosen, colour in (("compute", decode, _COMPUTE), ("prefill", ~decode, _PREFILL)):
        if chosen.any():
            ax.barh(np.zeros(chosen.sum()), compute[chosen], left=start[chosen], color=colour, label=kind, **bars)
    if stall.any():
        ax.barh(
            np.zeros(len(start)), stall, left=start + compute, color=_STALL, label="stall: waiting for pages", **bars
        )
    ax.vlines(start[1:], -0.31, 0.31, color="white", linewidth=0.7)
    table = result.tables["links"]
    for lane, (link, direction, _, colour, names_of) in enumerate(links, start=1):
        row = np.flatnonzero((table["link"] == link) & (table["direction"] == direction))[0]
        busy = _bytes(shown, names_of) * (table["busy_s"][row] / table["bytes"][row]) * factor
        ax.barh(np.full(len(start), lane), busy, left=_queued(start, busy), color=colour, **bars)
    share = f"GPU\n{compute.sum() / (end - start).sum():.0%} busy"
    ax.set_yticks(range(len(names)), [share, *names[1:]])
    ax.set_ylim(len(names) - 0.5, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.legend(**_BESIDE)


def _queued(start: np.ndarray, busy: np.ndarray) -> np.ndarray:
    """When each bar begins on a link that carries one after the other."""
    begin, free = np.empty_like(start), -np.inf
    for i in range(len(start)):
        begin[i] = max(start[i], free)
        free = begin[i] + busy[i]
    return begin


def _moved(ax: Axes, shown: Iterations, start: np.ndarray, end: np.ndarray) -> None:
    """Bytes of each step: fetched, waited for or ahead, upwards, spilled downwards; where nothing moves, what attention
    read on the GPU."""
    moves = [m for m in _MOVES if shown[m[0]].any()] or [("read_bytes", "KV read by attention", _COMPUTE, 1)]
    factor, unit = columns.unit("_bytes", [float(shown[m[0]].max()) for m in moves])
    base = {1: np.zeros(len(start)), -1: np.zeros(len(start))}
    for name, words, colour, sign in moves:
        height = sign * shown[name] * factor
        ax.bar(
            start,
            height,
            end - start,
            base[sign],
            align="edge",
            color=colour,
            label=words,
            edgecolor="white",
            linewidth=0.3,
        )
        base[sign] = base[sign] + height
    ax.use_sticky_edges = False
    ax.axhline(0, color=page.GREY, linewidth=0.8)
    ax.yaxis.set_major_formatter(lambda v, _: f"{abs(v):g}")
    ax.set_ylabel(f"per step ({unit})")
    ax.legend(**_BESIDE)


def _found(ax: Axes, shown: Iterations, start: np.ndarray, end: np.ndarray, lossy: bool) -> None:
    """What each decode step found: recall under its ceiling, or the share of needed pages that were on the GPU."""
    decode = shown.number > 0
    whole = shown["weight"] if lossy else shown["used_pages"]
    part = shown["attended"] if lossy else shown["found_pages"]
    middle = (start + end) / 2
    if lossy and np.isfinite(shown["ceiling"][decode]).all():
        bound = shown["ceiling"][decode] / whole[decode]
        ax.plot(
            middle[decode],
            bound,
            color=page.INK,
            linestyle=(0, (6, 2, 1, 2)),
            linewidth=1.0,
            label="step ceiling (bound)",
        )
    value = np.divide(part, whole, out=np.ones_like(whole, dtype=float), where=whole > 0)[decode]
    ax.plot(
        middle[decode],
        value,
        color=_COMPUTE,
        marker="o",
        markersize=3,
        linewidth=1.2,
        label="recall" if lossy else "page hit rate",
    )
    ax.set_ylim(0, 1.05)
    ax.set_ylabel("recall (share)" if lossy else "pages found\n(share)")
    ax.grid(axis="y")
    ax.legend(**_BESIDE)


def _step_numbers(ax: Axes, shown: Iterations, start: np.ndarray, end: np.ndarray) -> None:
    """Decode step numbers above the lanes, as many as fit."""
    decode = np.flatnonzero(shown.number > 0)
    every = max(1, -(-len(decode) // 14))
    chosen = decode[::every]
    above = ax.secondary_xaxis("top")
    above.set_xticks((start + end)[chosen] / 2, [str(n) for n in shown.number[chosen]])
    above.tick_params(length=0, labelsize=7.5, labelcolor=page.GREY, pad=0)
    above.spines["top"].set_visible(False)
    above.set_xlabel("decode step", fontsize=7.5, color=page.GREY, labelpad=5)
