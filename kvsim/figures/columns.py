"""What a column of a result is called on an axis, and the unit its numbers are printed in."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvsim.errors import ConfigError
from kvsim.units import format_bytes, parse_bandwidth, parse_budget, parse_bytes, parse_seconds

NAMES = {
    "recall": "recall (attention mass still read, share)",
    "mass_hit_rate": "mass hit rate (attention mass found on the GPU, share)",
    "page_hit_rate": "page hit rate (needed pages found on the GPU, share)",
    "recurrence_loss": "recurrence loss (uses of an evicted page, share of all uses)",
    "ceiling": "step ceiling (bound on recall, share)",
    "even_ceiling": "step ceiling of the budget (bound on recall, share)",
    "gold_loss": "gold-source loss (needed tokens that are gone, share of tokens and lanes)",
    "output_error": "output error (of attention's output, relative)",
    "stranded_share": "stranded tokens (gone, but in a block that is still held, share)",
    "state_bytes_per_page": "policy state (bytes per page and lane)",
    "stall_share": "stall share (GPU waiting for pages, share of decode time)",
    "tpot_p50_s": "median time per output token",
    "tpot_p90_s": "p90 time per output token",
    "tpot_p99_s": "p99 time per output token",
    "ttft_mean_s": "mean time to first token",
    "end_s": "time until the last token",
    "throughput": "predicted throughput (output tokens per second, all requests)",
    "prefill_gaps": "gaps between tokens with another request's prefill (share)",
    "peak_bytes": "peak KV cache on the GPU, all that run together",
    "budget_bytes": "budget, mean per request over all lanes",
    "held_mean_bytes": "KV cache held, mean of decode steps",
    "read_mean_bytes": "KV cache read, mean of decode steps",
    "fetched_host_bytes": "fetched from host memory",
    "fetched_ssd_bytes": "fetched from SSD",
    "prefetched_host_bytes": "fetched ahead from host memory",
    "prefetched_ssd_bytes": "fetched ahead from SSD",
    "spilled_host_bytes": "spilled to host memory",
    "spilled_ssd_bytes": "spilled to SSD",
    "lost_pages": "uses of a page that was not there",
    "decode_steps": "decode steps",
    "page_size": "page size (tokens)",
    "host": "host memory for the pages of all requests",
    "ssd": "SSD space for the pages of all requests",
    "concurrency": "requests replayed together",
}
TITLES = {
    "recall": "attention recall",
    "mass_hit_rate": "attention mass hit rate",
    "ceiling": "step ceiling",
    "tpot_p50_s": "median TPOT",
    "tpot_p90_s": "p90 TPOT",
    "tpot_p99_s": "p99 TPOT",
    "ttft_mean_s": "mean TTFT",
    "peak_bytes": "peak KV cache",
    "budget": "cache budget",
    "budget_bytes": "cache budget",
    "held_mean_bytes": "KV cache held",
    "read_mean_bytes": "KV cache read",
    "gold_loss": "gold-source loss",
    "stranded_share": "stranded tokens",
    "page_size": "page size",
    "host": "host memory",
    "ssd": "SSD space",
}
# What the full cache has by definition: it loses nothing.
LOSSLESS = {"recall": 1.0, "mass_hit_rate": 1.0, "page_hit_rate": 1.0, "recurrence_loss": 0.0}
LOSSLESS |= {"gold_loss": 0.0, "output_error": 0.0}
_BASES = {
    "fraction": "budget (% of each request's final length)",
    "pages": "budget (pages per lane)",
    "bytes": "budget (over all lanes)",
}
_MANY = 24  # budgets from which not each has a tick
_LOG_FROM = 8.0  # largest over smallest value from which an axis of settings is logarithmic


def more(rows: Iterable[Mapping[str, Any]]) -> str:
    """What a policy's name is followed by where its runs take more than the budget."""
    most = max((number(row, "times_budget") for row in rows if not row.get("within_budget", True)), default=0.0)
    return f" ({most:.2f}x the budget)" if most else ""


def title(column: str) -> str:
    """The column as the words of a title."""
    return TITLES.get(column, _plain(column.removesuffix("_bytes")))


def _plain(column: str) -> str:
    return column.removeprefix("hardware.").removesuffix("_s").replace("_", " ").replace(".", " ")


def check(column: str, known: Iterable[str], role: str) -> None:
    """Raises ConfigError when no run has the column."""
    known = sorted(known)
    if column not in known:
        close = difflib.get_close_matches(column, known, n=1)
        guess = f'did you mean "{close[0]}"? ' if close else ""
        raise ConfigError(f'no column "{column}" to draw as {role}', hint=f"{guess}the columns are {', '.join(known)}")


def is_time(column: str) -> bool:
    return column.endswith("_s")


def unit(column: str, values: Sequence[float]) -> tuple[float, str]:
    """Factor and unit that bring the largest of `values` between 1 and 1000; (1, "") for a pure number."""
    top = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    if is_time(column):
        steps = [(1.0, "s"), (1e3, "ms"), (1e6, "µs")]
        return next((s for s in steps if top * s[0] >= 1), steps[-1]) if top else steps[0]
    if column.endswith("_bytes"):
        power = min(4, max(0, int(math.log(top, 1024)))) if top > 0 else 0
        return 1024.0**-power, ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return 1.0, ""


def label(column: str, unit_name: str, lines: int = 1) -> str:
    """Axis label: the column in words, its unit, "predicted" for times; on two lines what it means comes second."""
    words = NAMES.get(column, _plain(column))
    said = ", ".join(x for x in (unit_name, "predicted" if is_time(column) else "") if x)
    text = f"{words} ({said})" if said else words
    return text.replace(" (", "\n(", 1) if lines == 2 and len(text) > 40 and not said else text


def number(row: Mapping[str, Any], column: str) -> float:
    """The row's value. Raises ConfigError when it is no number."""
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(
            f'column "{column}" holds "{value}", which is not a number',
            hint="choose a measured column for y, such as recall",
        )
    return float(value)


@dataclass(frozen=True)
class Axis:
    """How the values of a column lie on the x axis. `place`: value -> position; `ticks`: position -> text."""

    label: str
    place: Callable[[Any], float]
    ticks: dict[float, str] = field(default_factory=dict)
    log: bool = False
    words: bool = False  # the values are names: positions mean nothing


def axis(column: str, values: Sequence[Any]) -> Axis:
    """How to lay the values of a column out. Raises ConfigError for budgets that cannot be compared."""
    if column == "budget":
        return _budgets([str(v) for v in values])
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        factor, name = unit(column, values)
        positions = sorted({float(v) * factor for v in values})
        return Axis(
            label(column, name), lambda v: float(v) * factor, _few(positions, lambda p: f"{p:.4g}"), _is_log(positions)
        )
    for parse in (parse_bytes, parse_bandwidth, parse_seconds):
        try:
            return _at(label(column, ""), {str(v): parse(v) for v in values})
        except ConfigError:
            continue
    names = {str(v): float(i) for i, v in enumerate(dict.fromkeys(map(str, values)))}
    ticks = {p: "default" if name == "None" else name for name, p in names.items()}
    return Axis(label(column, ""), lambda v: names[str(v)], ticks, words=True)


def _at(label: str, places: Mapping[str, float]) -> Axis:
    """An axis with a tick at every value, as it was written."""
    ticks = {p: text for text, p in places.items()}
    return Axis(label, lambda v: places[str(v)], ticks, _is_log(sorted(ticks)))


def _budgets(values: list[str]) -> Axis:
    parsed = {v: parse_budget(v) for v in values}
    bases = sorted({basis for _, basis in parsed.values()})
    if len(bases) > 1:
        raise ConfigError(
            f"budgets in {' and in '.join(bases)} do not share an axis",
            hint="draw them against budget_bytes: --x budget_bytes",
        )
    factor, text = {
        "fraction": (100.0, lambda p: f"{p:g}%"),
        "pages": (1.0, lambda p: f"{p:,.0f}"),
        "bytes": (1.0, format_bytes),
    }[bases[0]]
    positions = sorted({v * factor for v, _ in parsed.values()})
    ticks = {p: text(p) for p in (positions if len(positions) <= _MANY else _round(positions))}
    return Axis(_BASES[bases[0]], lambda v: parsed[str(v)][0] * factor, ticks, _is_log(positions))


def _round(positions: list[float]) -> list[float]:
    """Those that are 1, 2 or 5 times a power of ten: what a long curve is read at."""
    return [p for p in positions if f"{p:e}".split("e")[0].rstrip("0.") in ("1", "2", "5")]


def _few(positions: list[float], text: Callable[[float], str]) -> dict[float, str]:
    return {p: text(p) for p in positions} if len(positions) <= 8 else {}


def _is_log(positions: list[float]) -> bool:
    return bool(positions) and positions[0] > 0 and positions[-1] >= _LOG_FROM * positions[0]
