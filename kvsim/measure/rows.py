"""Measured rows: one JSON line per point, written as it is measured, so that a run cut short can go on.

A row is {"key", "phase", "kind", "params", "ms", "t", ...}; `ms` are samples in milliseconds, `t` seconds since the
log was opened. A point that failed has "error" instead of "ms". A key begins with the slug of its device.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvsim.errors import ConfigError

PHASES = (
    "info", "sentinel", "calibrate", "resident", "offload", "ssd", "capture-cost", "train", "text", "closed-loop",
    "error",
)  # fmt: skip
REQUIRED = ("key", "phase", "kind", "params", "t")
TIMES = ("ms", "gpu_ms", "layer_ms", "submit_ms", "alone_ms")  # lists of milliseconds
MORE = (*TIMES, "gb_per_s", "p50_us", "error")
UNTIMED = ("info", "train", "text", "closed-loop")  # phases whose rows need no "ms"
DRIFT = 0.03  # sentinels further apart than this mark their phase

Row = dict[str, Any]


class RowLog:
    """Appends rows to `path`; knows what was measured there and in the files of `resume`.

    `deadline`: seconds after opening at which no further point is begun. Raises ConfigError for files that are no rows.
    """

    def __init__(self, path: str | Path, resume: Iterable[str | Path] = (), deadline: float = math.inf):
        self.path, self.deadline, self.started = Path(path), deadline, time.perf_counter()
        self.skipped = 0  # points for which no time was left
        earlier = [Path(p) for p in resume if Path(p).resolve() != self.path.resolve()]
        self.rows = read_rows([*earlier, *([self.path] if self.path.exists() else [])])
        self.done = {row["key"] for row in self.rows if "error" not in row}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
            self._file.truncate(_whole_lines(self.path))
        except OSError as error:
            what = f"cannot write: {error.strerror or error}"
            raise ConfigError(what, where=str(self.path), hint="choose another place with -o") from None

    def __enter__(self) -> RowLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    @property
    def elapsed(self) -> float:
        """Seconds since the log was opened."""
        return time.perf_counter() - self.started

    def wants(self, key: str, need_s: float = 0.0) -> bool:
        """Is this point still to be measured, and are the seconds it needs left? An earlier error is tried again."""
        if key in self.done:
            return False
        in_time = self.elapsed + need_s <= self.deadline
        self.skipped += not in_time
        return in_time

    def add(
        self, key: str, phase: str, kind: str, params: Mapping[str, Any], ms: Sequence[float] | None = None, **more: Any
    ) -> Row:
        """Write one row at once; `more` are further top-level entries."""
        row: Row = {"key": key, "phase": phase, "kind": kind, "params": dict(params), "t": round(self.elapsed, 3)}
        timed = {"ms": ms, **more} if ms is not None else more
        row |= {k: _rounded(v) if k in TIMES else v for k, v in timed.items()}
        _check(row, str(self.path))
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self.rows.append(row)
        if "error" not in row:
            self.done.add(key)
        return row

    def measure(
        self,
        key: str,
        phase: str,
        kind: str,
        params: Mapping[str, Any],
        fn: Callable[[], Mapping[str, Any]],
        need_s: float = 1.0,
    ) -> Row | None:
        """Run `fn`, which returns {"ms": samples, ...}, unless the row exists or time is short.

        An exception becomes a row with "error", and the next point can go on.
        """
        if not self.wants(key, need_s):
            return None
        try:
            return self.add(key, phase, kind, params, **fn())
        except Exception as error:
            return self.add(key, phase, kind, params, error=f"{type(error).__name__}: {error}"[:500])


def read_rows(paths: Iterable[str | Path]) -> list[Row]:
    """Rows of several files in order, each key once: a measured row replaces an error, identical copies are one.

    Raises ConfigError, naming file and line, for what is no row, and for two different measurements of one key.
    """
    found: dict[str, Row] = {}
    for path in map(Path, paths):
        for number, line in enumerate(_lines(path), 1):
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as bad:
                raise ConfigError(f"not a JSON line: {bad.msg}", where=where, hint="give rows kvsim measured") from None
            _check(row, where)
            held = found.get(row["key"])
            if held is None or "error" in held:
                found[row["key"]] = row
            elif row != held and "error" not in row:
                what = f'"{row["key"]}" was measured twice'
                raise ConfigError(what, where=where, hint="give the rows of one campaign")
    return list(found.values())


def device_of(rows: Iterable[Row]) -> str:
    """The one device all rows come from. Raises ConfigError for several, or for none."""
    devices = sorted({row["key"].partition("/")[0] for row in rows})
    if not devices:
        raise ConfigError("there are no measured rows")
    if len(devices) > 1:
        hint = "fit the rows of each device apart"
        raise ConfigError(f"the rows come from several devices: {', '.join(devices)}", hint=hint)
    return devices[0]


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """p10, p50, p90 and n of some samples."""
    p10, p50, p90 = np.quantile(np.asarray(samples, float), [0.1, 0.5, 0.9]).tolist()
    return {"p10": p10, "p50": p50, "p90": p90, "n": len(samples)}


def drifts(rows: Iterable[Row]) -> dict[str, float]:
    """Per phase, how far its sentinels at the start and at the end lie apart, at worst; above DRIFT it is marked.

    Sentinel rows have params {phase, run, at, of}: the same work `of`, timed `at` "start" and "end" of each `run`.
    """
    ends: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row["phase"] == "sentinel" and "ms" in row:
            p = row["params"]
            ends.setdefault((p["phase"], p["run"], p["of"]), {})[p["at"]] = quantiles(row["ms"])["p50"]
    found: dict[str, float] = {}
    for (phase, *_), at in ends.items():
        if {"start", "end"} <= at.keys():
            found[phase] = max(found.get(phase, 0.0), abs(at["end"] / at["start"] - 1.0))
    return found


def _rounded(ms: Sequence[float]) -> list[float]:
    return [float(f"{x:.6g}") for x in ms]


def _lines(path: Path) -> list[str]:
    """The lines of a file; a last one that was cut off while being written is left out."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as bad:
        reason = getattr(bad, "strerror", None) or "not text"
        raise ConfigError(f"cannot read rows: {reason}", where=str(path)) from None
    return text.splitlines()[: text.count("\n")]


def _whole_lines(path: Path) -> int:
    """Bytes up to and with the last end of a line."""
    return path.read_bytes().rfind(b"\n") + 1


def _check(row: Any, where: str) -> None:
    """Raise ConfigError unless `row` is one."""
    problem = _problem(row)
    if problem:
        raise ConfigError(f"not a measured row: {problem}", where=where, hint=f"rows hold {', '.join(REQUIRED)} and ms")


def _problem(row: Any) -> str | None:
    if not isinstance(row, dict):
        return "not an object"
    if missing := [k for k in REQUIRED if k not in row]:
        return f'"{missing[0]}" is missing'
    if unknown := sorted(row.keys() - {*REQUIRED, *MORE}):
        return f'unknown key "{unknown[0]}"'
    if not isinstance(row["key"], str) or row["key"].count("/") < 2:
        return f"the key {row['key']!r} is not <device>/<phase>/..."
    if row["phase"] not in PHASES:
        return f"unknown phase {row['phase']!r}"
    if not isinstance(row["params"], dict):
        return '"params" is not an object'
    if "ms" in row and "error" in row or not {"ms", "error"} & row.keys() and row["phase"] not in UNTIMED:
        return 'it needs either "ms" or "error"'
    return next((p for k in TIMES if k in row for p in [_bad_times(k, row[k])] if p), None)


def _bad_times(name: str, times: Any) -> str | None:
    if not isinstance(times, list) or not all(isinstance(x, (int, float)) for x in times):
        return f'"{name}" is not a list of numbers'
    if not all(math.isfinite(x) and x >= 0 for x in times):
        return f'"{name}" holds a time that is negative or not finite'
    return f'"{name}" is empty' if name == "ms" and not times else None
