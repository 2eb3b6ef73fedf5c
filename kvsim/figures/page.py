"""The sheet every figure is drawn on: type sizes, heading, caveat, and files that come out the same twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from kvsim.errors import ConfigError
from kvsim.results import Result, file_beside

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, GREY, FAINT = "#1a1a1a", "#6b6b6b", "#d9d9d9"
CAVEAT = "open loop: attention was recorded with a full cache, so recall is a proxy for quality"
PREDICTED = "latencies are predicted by the machine model"
# Kinds of file, and what keeps the clock out of each.
FORMATS: dict[str, dict[str, Any]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
_DPI = 160
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 8,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.5,
    "svg.hashsalt": "kvsim",
    "figure.dpi": 100,
    "savefig.dpi": _DPI,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
}


@contextmanager
def style() -> Iterator[None]:
    """Our looks while a figure is made or written; the caller's settings are back afterwards."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def sheet(width: float, height: float) -> Figure:
    """An empty figure in inches, off the screen and outside pyplot's books."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def head(figure: Figure, title: str, lines: Sequence[str], foot: str) -> None:
    """Title, what was run, and at the foot what the numbers may not be taken for; the axes get the room between."""
    width, height = figure.get_size_inches()
    per_line = int(width * 15.5)
    below = [part for line in lines for part in wrap(line, per_line, break_on_hyphens=False)]
    feet = wrap(foot, int(width * 17.5))
    above, under = 0.38 + 0.155 * len(below), 0.1 + 0.135 * len(feet)
    grey: dict[str, Any] = {"ha": "left", "color": GREY, "linespacing": 1.35}
    figure.text(0.1 / width, 1 - 0.08 / height, title, ha="left", va="top", fontsize=11, fontweight="bold")
    figure.text(0.1 / width, 1 - 0.33 / height, "\n".join(below), va="top", fontsize=8, **grey)
    figure.text(0.1 / width, 0.07 / height, "\n".join(feet), va="bottom", fontsize=7, **grey)
    room: Any = figure.get_layout_engine()
    room.set(rect=(0, under / height, 1, 1 - (above + under) / height), w_pad=0.08)


def facts(runs: Sequence[Result], hide: Sequence[str] = ()) -> list[str]:
    """What all the runs have in common, in two lines: where the attention comes from, and how it was replayed."""
    config = [r.manifest["config"] for r in runs]

    def same(values: list[Any]) -> Any:
        return values[0] if len({str(v) for v in values}) == 1 else None

    def setting(key: str, text: str) -> str | None:
        value = same([c.get(key) for c in config])
        return None if value is None or key in hide else text.format(value)

    trace = same([r.manifest["trace"]["name"] for r in runs])
    requests = same([r.manifest["trace"]["requests"] for r in runs])
    many = f" ({requests} request{'s' * (requests != 1)})" if requests else ""
    model = same([r.manifest["model"].get("name") for r in runs])
    hardware = same([r.manifest["hardware"]["name"] for r in runs])
    regime = same([c["regime"] for c in config])
    source = [trace and f"trace {trace}{many}", model and f"model {model}", hardware and f"hardware {hardware}"]
    replay = [
        setting("regime", "{} regime"),
        setting("demand", "demand {}") if regime == "offload" else None,
        setting("policy", "policy {}"),
        setting("budget", "budget {}"),
        setting("rows", "{} rows seen"),
        setting("page_size", "page size {} token" + "s" * (config[0]["page_size"] != 1)),
        setting("concurrency", "concurrency {}") if any(c["concurrency"] > 1 for c in config) else None,
    ]
    return [" · ".join(x for x in line if x) for line in (source, replay)]


def check_name(path: Path) -> None:
    """Raises ConfigError for a kind of file we do not write."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f'cannot draw into "{path.name}"', hint=f"end the name in {', '.join(FORMATS)}")


def save(figure: Figure, path: Path) -> Path:
    """Write the figure beside `path` and rename it: the same bytes each time. Raises ResultError when that fails."""
    with file_beside(path) as partial, style():
        figure.savefig(partial, metadata=FORMATS[path.suffix.lower()])
    return path
