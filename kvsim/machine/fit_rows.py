"""From measured rows to constants: which rows decide which constants, how, and how sure that is.

Rows are those of `kvsim.measure.rows`, as plain dictionaries. Values are in seconds, bytes and FLOP per second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvsim.machine import fit_moves as moves
from kvsim.machine.fit import DECODE, GEMM, PREFILL, Fitted, Form, fit_small
from kvsim.machine.hardware import Gpu

DRAWS, BAND = 200, (5.0, 95.0)  # bootstrap; percentiles of its draws
LEAST = 4  # observations below which there is no band
WAYS = ("h2d", "d2h")

Row = dict[str, Any]
Columns = dict[str, np.ndarray]
Found = dict[str, float]


@dataclass(frozen=True)
class Part:
    """Constants that some observations decide together.

    `find` gives {dotted key: value} for columns of observations; `predict`, where there is a form, what it makes of
    them, to compare with the column `measured`.
    """

    method: str
    columns: Columns
    find: Callable[[Columns], Found]
    predict: Callable[[Found, Columns], np.ndarray] | None = None

    @property
    def size(self) -> int:
        """How many observations there are."""
        return len(next(iter(self.columns.values())))

    def bands(self, values: Found, draws: int = DRAWS) -> dict[str, tuple[float, float]]:
        """5th and 95th percentile of fits to observations drawn anew, widened to the value where all lie beside it.

        Where there is a form, its relative errors are drawn and the sizes stay: few rows never lose a size without
        which nothing could be told.
        """
        if self.size < LEAST or self.size <= len(values):
            return {}
        draw = np.random.default_rng(0)
        found = [self.find(columns) for columns in self._drawn(values, draw, draws)]
        edges = {key: [f[key] for f in found if math.isfinite(f.get(key, math.inf))] for key in values}
        spans = {key: np.percentile(some, BAND) for key, some in edges.items() if some}
        return {key: (min(low, values[key]), max(high, values[key])) for key, (low, high) in spans.items()}

    def _drawn(self, values: Found, draw: np.random.Generator, draws: int) -> Iterator[Columns]:
        n = self.size
        if self.predict is None:
            for _ in range(draws):
                taken = draw.integers(0, n, n)
                yield {name: column[taken] for name, column in self.columns.items()}
            return
        form = self.predict(values, self.columns)
        off = np.log(self.columns["measured"] / form) * math.sqrt(n / (n - len(values)))  # fits hide some of it
        for _ in range(draws):
            yield self.columns | {"measured": form * np.exp(draw.choice(off, n))}

    def residual(self, values: Found) -> float | None:
        """Mean relative error on its own observations, where there is a form, and more of them than constants."""
        if self.predict is None or self.size <= len(values):
            return None
        off = np.abs(self.predict(values, self.columns) / self.columns["measured"] - 1.0)
        return float(f"{off.mean():.3g}")


def parts(rows: Sequence[Row], gpu: Gpu, draws: int = DRAWS, tiles: bool = True) -> Iterator[Part]:
    """What the rows can decide; a later part replaces an earlier one's.

    `gpu`: what the operators' forms take where rows say nothing. `draws`: fits behind the bands of those forms.
    `tiles`: does the device work in tiles and rounds of blocks, as GPUs do?
    """
    yield from _compute_parts(rows, gpu, draws, tiles)
    for way in WAYS:
        yield from _link_parts(rows, way)
    yield from _host_parts(rows)
    yield from _ssd_parts(rows)
    yield from _launch_parts(rows)
    yield from _ratio_parts(rows)


def pick(rows: Sequence[Row], kind: str, /, **wanted: Any) -> list[Row]:
    """Rows of a kind whose parameters are as wanted."""
    return [r for r in rows if r["kind"] == kind and all(r["params"].get(k) == v for k, v in wanted.items())]


def _columns(rows: Sequence[Row], *names: str) -> Columns:
    """Parameters of the rows, and the median seconds as `measured`."""
    return {
        **{name: np.array([float(r["params"][name]) for r in rows]) for name in names},
        "measured": np.array([median(r) for r in rows]),
    }


def median(row: Row, times: str = "ms") -> float:
    return 1e-3 * float(np.median(row[times]))


def samples(rows: Sequence[Row], each: Callable[[Row], Iterable[float]]) -> Columns:
    """All samples of all rows as observations of one number."""
    return {"x": np.array([x for row in rows for x in each(row)], float)}


def middle(key: str, least: float = 0.0, most: float = math.inf) -> Callable[[Columns], Found]:
    return lambda c: {key: float(np.clip(np.median(c["x"]), least, most))}


def _prefixed(prefix: str, find: Callable[[Columns], Found]) -> Callable[[Columns], Found]:
    return lambda c: {prefix + name: value for name, value in find(c).items()}


def _plain(prefix: str, found: Found) -> Found:
    return {key.removeprefix(prefix): value for key, value in found.items()}


# --- compute -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operator(Part):
    """Constants of an operator's form, whose fit brings its own bands and error."""

    fitted: Fitted = Fitted({})

    def bands(self, values: Found, draws: int = DRAWS) -> dict[str, tuple[float, float]]:
        return {f"gpu.{key}": band for key, band in self.fitted.bands.items()}

    def residual(self, values: Found) -> float | None:
        return float(f"{self.fitted.error:.3g}")


def _operator(method: str, rows: Sequence[Row], fitted: Fitted) -> Operator:
    values = {f"gpu.{key}": value for key, value in fitted.values.items()}
    return Operator(method, {"rows": np.arange(len(rows))}, lambda c: values, lambda f, c: c["rows"], fitted)


def _compute_parts(rows: Sequence[Row], gpu: Gpu, draws: int, tiles: bool) -> Iterator[Part]:
    """Each operator with its form in `kvsim.machine.compute`; a loss that explains next to nothing is left at 0."""
    if alone := [r for r in pick(rows, "small") if r["params"]["kind"] != "sample"]:
        found = fit_small(gpu, [median(r) for r in alone], draws)
        gpu = replace(gpu, **found.values)
        yield _operator("median of kernels that do next to nothing", alone, found)
    for kind, form, names, smooth in _OPERATORS:
        if len(measured := pick(rows, kind)) > LEAST:
            c = _columns(measured, *names)
            c["seconds"] = c.pop("measured")
            if kind == "prefill":
                c["context"] = c["queries"]
            found = (form if tiles else replace(form, losses=smooth)).fit(gpu, c, draws=draws)
            yield _operator(f"form of {kind}, robust in logarithms", measured, _seen(kind, c, found))


# Kind, form, what its rows count, and the losses that a machine without tiles and rounds of blocks can have.
_OPERATORS: tuple[tuple[str, Form, tuple[str, ...], tuple[str, ...]], ...] = (
    ("gemm", GEMM, ("out", "inp", "rows", "value_bytes"), ("gemm_knee",)),
    ("attention", DECODE, ("sequences", "context", "kv_heads", "head_dim", "value_bytes"), ("attention_per_sequence",)),
    ("prefill", PREFILL, ("heads", "kv_heads", "head_dim", "sequences", "queries"), ("attention_row_keys",)),
)
_UNSEEN = 3.0  # a rate this many times as fast as anything measured was not measured


def _seen(kind: str, c: Columns, found: Fitted) -> Fitted:
    """Without a rate of matrix products that no row came near, and what the rows cannot tell without it."""
    if kind != "gemm":
        return found
    weights = c["out"] * c["inp"] * c["value_bytes"]
    best = {"weight_bandwidth": weights, "gemm_flops": 2.0 * c["out"] * c["inp"] * c["rows"]}
    unseen = {key for key, amount in best.items() if found.values[key] > _UNSEEN * (amount / c["seconds"]).max()}
    if "gemm_flops" in unseen:
        unseen |= {key for key in found.values if key.startswith("gemm_")}
    return replace(found, values={key: value for key, value in found.values.items() if key not in unseen})


def kv_bytes(p: dict[str, Any]) -> float:
    """Bytes of keys and values that an attention row reads."""
    return 2.0 * p["sequences"] * p["context"] * p["kv_heads"] * p["head_dim"] * p["value_bytes"]


# --- links, host memory, SSD, launches -----------------------------------------------------------------------


def _link_parts(rows: Sequence[Row], way: str) -> Iterator[Part]:
    pinned, pageable, table = f"{way}-pinned", f"{way}-pageable", f"link.{way}."
    single, many = pick(rows, "copy", path=pinned), pick(rows, "chunks", path=pinned)
    if len(single) >= 2 and len(many) >= 2:
        a, b = _columns(single, "bytes"), _columns(many, "chunk", "n")
        both: Columns = {
            "copies": np.concatenate([np.ones(len(single)), b["n"]]),
            "bytes": np.concatenate([a["bytes"], b["n"] * b["chunk"]]),
            "measured": np.concatenate([a["measured"], b["measured"]]),
        }
        yield Part(
            "latency + copies per_copy + bytes / bandwidth, robust relative least squares",
            both,
            _prefixed(table, lambda c: moves.link_fit(c["copies"], c["bytes"], c["measured"])),
            lambda f, c: moves.link_form(_plain(table, f), c["copies"], c["bytes"]),
        )
        submit = {"n": b["n"], "seconds": np.array([median(r, "submit_ms") for r in many])}
        find = _prefixed(table, lambda c: {"submit": moves.slope_fit(c["n"], c["seconds"])})
        yield Part("fixed + copies submit, robust relative least squares", submit, find)
    if len(unpinned := pick(rows, "copy", path=pageable)) >= 2:
        yield Part(
            "fixed + bytes / bandwidth, robust relative least squares",
            _columns(unpinned, "bytes"),
            _prefixed(
                table, lambda c: {"pageable_bandwidth": moves.inverse(moves.slope_fit(c["bytes"], c["measured"]))}
            ),
        )


def _host_parts(rows: Sequence[Row]) -> Iterator[Part]:
    if found := pick(rows, "host_copy"):
        c = _columns(found, "threads", "bytes")
        yield Part(
            "bytes / min(threads thread_bandwidth, bandwidth / 2), least absolute logarithm",
            c,
            _prefixed("host.", lambda c: moves.host_fit(c["threads"], c["bytes"], c["measured"])),
            lambda f, c: moves.host_form(_plain("host.", f), c["threads"], c["bytes"]),
        )
        ones = np.ones(len(found))
        enough = moves.enough_depth(ones, c["threads"], c["bytes"] / c["measured"])
        yield Part("fewest threads at 95 % of the best rate", {"x": np.array([enough])}, middle("host.copy_threads"))


def _ssd_parts(rows: Sequence[Row]) -> Iterator[Part]:
    def columns(some: Sequence[Row]) -> Columns:
        return _columns(some, "block", "depth") | {"measured": np.array([1e9 * r["gb_per_s"] for r in some])}

    for rw in ("read", "write"):
        if len(found := pick(rows, "ssd", rw=rw)) >= 2:
            names = {f"ssd.{rw}_{name}": name for name in ("bandwidth", "iops", "latency")}

            def find(c: Columns, names: dict[str, str] = names) -> Found:
                fitted = moves.ssd_fit(c["block"], c["depth"], c["measured"])
                return {key: fitted[name] for key, name in names.items()}

            def predict(f: Found, c: Columns, names: dict[str, str] = names) -> np.ndarray:
                return moves.ssd_form({name: f[key] for key, name in names.items()}, c["block"], c["depth"])

            how = "direct I/O" if found[0]["params"]["direct"] else "through the page cache, which was dropped before"
            method = f"min(bandwidth, iops block, depth block / (latency + block / bandwidth)), {how}"
            yield Part(f"{method}, least absolute logarithm", columns(found), find, predict)
    if reads := pick(rows, "ssd", rw="read"):
        c = columns(reads)
        enough = moves.enough_depth(c["block"], c["depth"], c["measured"])
        yield Part("least depth at 95 % of the best rate", {"x": np.array([enough])}, middle("ssd.queue_depth"))
    shares = []
    for rw, mixed in (("read", "read-beside-write"), ("write", "write-beside-read")):
        for row in pick(rows, "ssd", rw=mixed):
            p = row["params"]
            alone = pick(rows, "ssd", rw=rw, block=p["block"], depth=p["depth"])
            shares += [row["gb_per_s"] / other["gb_per_s"] for other in alone]
    if shares:
        how = "rate beside the other direction over the rate alone"
        yield Part(how, {"x": np.array(shares)}, middle("ssd.mixed", 1e-3, 1.0))


def _launch_parts(rows: Sequence[Row]) -> Iterator[Part]:
    def per_launch(row: Row) -> np.ndarray:
        return 1e-3 * np.array(row["ms"]) / row["params"]["n"]

    graphs, events = pick(rows, "launch", kind="graph"), pick(rows, "launch", kind="event")
    if graphs and events:
        event = float(np.median(np.concatenate([per_launch(r) for r in events])))
        layers = samples(graphs, lambda r: per_launch(r) + event)
        yield Part("submitting one layer's graph and one event", layers, middle("cpu.layer_submit"))
    if gaps := pick(rows, "launch", kind="gap"):
        apart = samples(gaps, lambda r: per_launch(r) - median(r, "alone_ms") / r["params"]["n"])
        yield Part("layers launched one by one, less all in one launch", apart, middle("gpu.layer_gap"))
    if ends := pick(rows, "small", kind="sample"):
        sync = samples(ends, lambda r: 1e-3 * np.array(r["ms"]))
        yield Part("choice of a token, until the host has it", sync, middle("gpu.step_sync"))


def _ratio_parts(rows: Sequence[Row]) -> Iterator[Part]:
    """What is left of a speed while something else runs."""

    def slower(row: Row) -> np.ndarray:
        return np.array(row["ms"]) * 1e-3 / median(row, "alone_ms")

    for way in WAYS:
        if both := pick(rows, "duplex", path=f"{way}-pinned"):
            share = samples(both, lambda r: 1.0 / slower(r))
            how = "time alone over time beside the other direction"
            yield Part(how, share, middle(f"link.{way}.duplex", 1e-3, 1.0))
    if beside := pick(rows, "contention"):
        excess = samples(beside, lambda r: slower(r) - 1.0)
        yield Part("compute beside copies over compute alone", excess, middle("gpu.copy_slowdown"))
