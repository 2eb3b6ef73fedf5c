"""From measured operator times to compute constants: the forms of `compute`, fitted to plain arrays.

Each fit takes one number per measured call and gives constants with their bands, for calls of this machine
(`kvsim calibrate`) and of public tables (`experiments/hardware`) alike. What a call does not fix comes from `gpu`:
multiprocessors, the rows of a prefill tile, and, where nothing else is said, where the search starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from kvsim.machine.compute import decode_attention_seconds, gemm_times, prefill_times
from kvsim.machine.hardware import Gpu

Values = dict[str, float]
Columns = Mapping[str, np.ndarray]

LINEAR: Values = {
    "kv_ramp": 0.0, "gemm_knee": 0.0, "gemm_depth": 0.0, "gemm_edge": 0.0, "gemm_wave": 0.0, "attention_batch": 0.0,
    "attention_wave": 0.0, "attention_tile_keys": 0.0, "prefill_tile_rows": 0.0, "prefill_score_dims": 0.0,
    "prefill_tail": 0.0, "prefill_split": 0.0, "prefill_token": 0.0,
}  # fmt: skip
"""Constants of `Gpu` at which the forms lose nothing: linear in bytes, FLOP and sequences."""

ROBUST = 0.05  # relative errors beyond it count linearly, not squared: slow outliers do not pull
WORTH = 0.02  # share of the fit's loss that a constant must save, or it is left at 0
DRAWS, BAND = 200, (5.0, 95.0)  # bootstrap over whole groups; percentiles of its draws


@dataclass(frozen=True)
class Fitted:
    """Constants (names of `Gpu`), the 5th and 95th percentile of each, and the mean relative error on their rows."""

    values: Values
    bands: dict[str, tuple[float, float]] = field(default_factory=dict)
    error: float = 0.0


@dataclass(frozen=True)
class Form:
    """An operator's time as a function of the machine and what was counted; `losses` may be left at 0."""

    seconds: Callable[[Gpu, Columns], np.ndarray]
    rates: tuple[str, ...]
    losses: tuple[str, ...]
    start: Callable[[Columns], Values]

    def predict(self, gpu: Gpu, columns: Columns) -> np.ndarray:
        """Seconds of each row, float64 [rows]."""
        return np.asarray(self.seconds(gpu, columns), float)

    def fit(
        self, gpu: Gpu, columns: Columns, groups: np.ndarray | None = None, draws: int = 0, seed: int = 0
    ) -> Fitted:
        """Constants that make the form's relative errors least; `columns` holds `seconds` too.

        A loss that saves less than `WORTH` is left at 0. `draws` > 0 adds bands from fits to groups drawn anew with
        replacement (rows, where no groups are given).
        """
        names = (*self.rates, *self.losses)
        values, _ = self._search(gpu, columns, {k: v for k, v in self.start(columns).items() if k in names})
        values = self._thrifty(gpu, columns, values)
        bands = {}
        if draws:
            bands = self._bands(gpu, columns, values, groups, draws, np.random.default_rng(seed))
        error = np.abs(self.predict(replace(gpu, **self._all(values)), columns) / columns["seconds"] - 1.0).mean()
        return Fitted(self._all(values), bands, float(error))

    def _all(self, values: Values) -> Values:
        return dict.fromkeys(self.losses, 0.0) | values

    def _thrifty(self, gpu: Gpu, columns: Columns, values: Values) -> Values:
        """Without the losses that save least, one after the other, as long as none of them is worth its constant."""
        _, loss = self._search(gpu, columns, values, steps=0)
        while some := [name for name in self.losses if name in values]:
            without = [self._search(gpu, columns, {k: v for k, v in values.items() if k != name}) for name in some]
            fewer, more = min(without, key=lambda found: found[1])
            if more > loss * (1.0 + WORTH):
                break
            values = fewer
        return values

    def _bands(
        self, gpu: Gpu, columns: Columns, values: Values, groups: np.ndarray | None, draws: int, draw: Any
    ) -> dict[str, tuple[float, float]]:
        count = len(columns["seconds"])
        names = np.arange(count) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
        members = np.split(np.argsort(names, kind="stable"), np.cumsum(np.bincount(names))[:-1])
        found: dict[str, list[float]] = {key: [] for key in values}
        for _ in range(draws if len(members) > 1 else 0):
            rows = np.concatenate([members[i] for i in draw.integers(0, len(members), len(members))])
            drawn, _ = self._search(gpu, {name: column[rows] for name, column in columns.items()}, values, steps=8)
            for key, value in drawn.items():
                found[key].append(value)
        spans = {key: np.percentile(some, BAND) for key, some in found.items() if some}
        return {k: (float(min(low, values[k])), float(max(high, values[k]))) for k, (low, high) in spans.items()}

    def _search(self, gpu: Gpu, columns: Columns, start: Values, steps: int = 60) -> tuple[Values, float]:
        """Levenberg-Marquardt on the logarithms of constants and of times: (constants, loss)."""
        names, measured = list(start), np.log(columns["seconds"])
        absent = self._all({})

        def off(x: np.ndarray) -> np.ndarray:
            trial = replace(gpu, **absent | dict(zip(names, np.exp(x).tolist(), strict=True)))
            with np.errstate(all="ignore"):
                return np.log(self.predict(trial, columns)) - measured

        x = np.log(np.maximum(np.array([start[name] for name in names]), 1e-15))
        r = off(x)
        loss, damping = _loss(r), 1e-3
        for _ in range(steps):
            slope = np.stack([(off(x + step) - r) / 1e-4 for step in 1e-4 * np.eye(len(x))], 1)
            slope = np.nan_to_num(slope, nan=0.0, posinf=0.0, neginf=0.0)
            weighted = slope * (1.0 / np.maximum(1.0, np.abs(r) / ROBUST))[:, None]
            square, downhill = weighted.T @ slope, -weighted.T @ r
            for _ in range(8):
                step = np.linalg.solve(square + damping * np.diag(np.diag(square)) + 1e-12 * np.eye(len(x)), downhill)
                step = np.clip(step, -1.5, 1.5)
                tried = off(x + step)
                better = _loss(tried)
                if better < loss:
                    break
                damping *= 5.0
            else:
                break
            done = np.abs(step).max() < 1e-5 or loss - better < 1e-7 * loss
            x, r, loss, damping = x + step, tried, better, max(damping / 5.0, 1e-9)
            if done:
                break
        return dict(zip(names, np.exp(x).tolist(), strict=True)), loss


def _loss(off: np.ndarray) -> float:
    """Huber's loss of relative errors; infinite where a prediction is no number."""
    size = np.abs(off)
    if not np.isfinite(size).all():
        return np.inf
    return float(np.where(size < ROBUST, size**2, 2.0 * ROBUST * size - ROBUST**2).sum())


def _fastest(amount: np.ndarray, seconds: np.ndarray) -> float:
    return float(np.percentile(amount / seconds, 98))


# --- GEMM ------------------------------------------------------------------------------------------------------


def _gemm_start(c: Columns) -> Values:
    weights = c["out"] * c["inp"] * c["value_bytes"]
    flop = 2.0 * c["out"] * c["inp"] * c["rows"]
    losses = {"gemm_knee": 0.3, "gemm_depth": 300.0, "gemm_edge": 5.0, "gemm_wave": 0.3}
    return {
        "weight_bandwidth": _fastest(weights, c["seconds"]),
        "gemm_flops": 1.1 * _fastest(flop, c["seconds"]),
        "kernel_time": 3e-6,
        **losses,
    }


def _gemm_form(rates: tuple[str, ...]) -> Form:
    return Form(
        lambda gpu, c: gemm_times(gpu, c["out"], c["inp"], c["rows"], c["value_bytes"]),
        rates,
        ("gemm_knee", "gemm_depth", "gemm_edge", "gemm_wave"),
        _gemm_start,
    )


GEMM = _gemm_form(("weight_bandwidth", "gemm_flops"))
GEMM_ALONE = _gemm_form(("weight_bandwidth", "gemm_flops", "kernel_time"))


def fit_small(gpu: Gpu, seconds: Sequence[float] | np.ndarray, draws: int = 0, seed: int = 0) -> Fitted:
    """`kernel_time`: the median of kernels that do next to nothing."""
    times = np.asarray(seconds, float)
    middle = float(np.median(times))
    draw = np.random.default_rng(seed)
    found = [np.median(draw.choice(times, len(times))) for _ in range(draws)]
    bands = {"kernel_time": tuple(np.percentile(found, BAND).tolist())} if draws else {}
    return Fitted({"kernel_time": middle}, bands, float(np.abs(middle / times - 1.0).mean()))


def fit_gemm(
    gpu: Gpu, out: Any, inp: Any, rows: Any, seconds: Any, value_bytes: Any = 2.0, *, alone: bool = False, **band: Any
) -> Fitted:
    """Constants of GEMMs `rows x inp` times `inp x out`; `alone`: `kernel_time` too, else it is `gpu`'s.

    `band`: groups, draws, seed of `Form.fit`.
    """
    columns = _columns(out=out, inp=inp, rows=rows, value_bytes=value_bytes, seconds=seconds)
    return (GEMM_ALONE if alone else GEMM).fit(gpu, columns, **band)


# --- decode attention ------------------------------------------------------------------------------------------


def _decode_seconds(gpu: Gpu, c: Columns) -> np.ndarray:
    key = 2.0 * c["head_dim"] * c["value_bytes"]
    kv = c["sequences"] * c["kv_heads"] * c["context"] * key
    return decode_attention_seconds(gpu, c["sequences"], kv, c["kv_heads"], key)


def _decode_start(c: Columns) -> Values:
    kv = 2.0 * c["sequences"] * c["kv_heads"] * c["context"] * c["head_dim"] * c["value_bytes"]
    return {
        "kv_bandwidth": _fastest(kv, c["seconds"]),
        "attention_fixed": 0.9 * float(c["seconds"].min()),
        "kv_ramp": 5e-6,
        "attention_batch": 1e-6,
        "attention_per_sequence": 3e-8,
        "attention_wave": 1e-6,
        "attention_tile_keys": 100.0,
    }


DECODE = Form(
    _decode_seconds,
    ("kv_bandwidth", "attention_fixed"),
    ("kv_ramp", "attention_batch", "attention_per_sequence", "attention_wave", "attention_tile_keys"),
    _decode_start,
)


def fit_decode(
    gpu: Gpu, sequences: Any, context: Any, kv_heads: Any, head_dim: Any, seconds: Any, value_bytes: Any = 2.0,
    **band: Any,
) -> Fitted:  # fmt: skip
    """Constants of attention with one query per sequence. `band`: groups, draws, seed of `Form.fit`."""
    counts = {"sequences": sequences, "context": context, "kv_heads": kv_heads, "head_dim": head_dim}
    return DECODE.fit(gpu, _columns(**counts, value_bytes=value_bytes, seconds=seconds), **band)


# --- prefill attention -----------------------------------------------------------------------------------------


def _prefill_seconds(gpu: Gpu, c: Columns) -> np.ndarray:
    return prefill_times(gpu, *(c[k] for k in ("heads", "kv_heads", "head_dim", "sequences", "queries", "context")))


def _prefill_start(c: Columns) -> Values:
    pairs = c["sequences"] * c["queries"] * (c["context"] - c["queries"] / 2.0)
    return {
        "attention_flops": 1.1 * _fastest(4.0 * c["heads"] * c["head_dim"] * pairs, c["seconds"]),
        "attention_row_keys": 200.0,
        "prefill_fixed": 0.5 * float(c["seconds"].min()),
        "prefill_score_dims": 30.0,
        "prefill_tail": 0.5,
        "prefill_split": 0.3,
        "prefill_token": 3e-9,
    }


PREFILL = Form(
    _prefill_seconds,
    ("attention_flops",),
    ("attention_row_keys", "prefill_fixed", "prefill_score_dims", "prefill_tail", "prefill_split", "prefill_token"),
    _prefill_start,
)


def fit_prefill(
    gpu: Gpu, heads: Any, kv_heads: Any, head_dim: Any, sequences: Any, queries: Any, context: Any, seconds: Any,
    **band: Any,
) -> Fitted:  # fmt: skip
    """Constants of causal attention in tiles of `gpu.prefill_tile_rows`. `band`: groups, draws, seed of `Form.fit`."""
    counts = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "sequences": sequences}
    return PREFILL.fit(gpu, _columns(**counts, queries=queries, context=context, seconds=seconds), **band)


def _columns(**columns: Any) -> dict[str, np.ndarray]:
    """Float columns as long as `seconds`; numbers are repeated."""
    long = np.asarray(columns["seconds"], float)
    return {name: np.broadcast_to(np.asarray(column, float), long.shape) for name, column in columns.items()}
