"""What a run leaves behind: a manifest and four Parquet tables, one unit per column and the unit in its name.

The engine stores events, never averages; `summarise` computes the averages from the tables. A result folder is written
beside its final name and renamed, so it is whole or it is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvsim.errors import ResultError

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
MORE = 1.02  # times the budget from which a run is not comparable with those that keep to it


def _schema(text: str) -> dict[str, str]:
    """Columns from "name kind, name kind": NumPy kinds, O for text."""
    columns = (column.split() for column in text.split(","))
    return {name: kind for name, kind in columns}  # noqa: C416


STEPS = _schema(
    "request i4, step i4, start_s f8, end_s f8, compute_s f8, stall_s f8, submit_s f8, weight f8, attended f8, hit f8, "
    "ceiling f8, even_ceiling f8, used_pages i8, found_pages i8, resident_pages i8, resident_bytes f8, held_bytes f8, "
    "read_bytes f8, "
    "fetched_host_bytes f8, fetched_ssd_bytes f8, prefetched_host_bytes f8, prefetched_ssd_bytes f8, rebuilt_pages i8, "
    "spilled_host_bytes f8, spilled_ssd_bytes f8, dropped_pages i8, gold_needed i8, gold_lost i8, gold_gone i8, "
    "output_error f8, stranded_tokens f8"
)
REQUESTS = _schema(
    "request i4, prompt_tokens i4, output_tokens i4, admitted_s f8, first_token_s f8, finish_s f8, ttft_s f8, "
    "tpot_s f8, recall f8, page_hit_rate f8, budget_pages i8, request_pages i8, peak_bytes f8"
)
LANES = _schema("layer i2, kv_head i2, weight f8, attended f8, hit f8, used_pages i8, found_pages i8")
LINKS = _schema("link O, direction O, bytes f8, transfers i8, busy_s f8, waited_s f8, utilisation f8")
TABLES: dict[str, dict[str, str]] = {"steps": STEPS, "requests": REQUESTS, "lanes": LANES, "links": LINKS}


class Recorder:
    """Rows of one table, as columns. `add` takes exactly the table's columns."""

    def __init__(self, schema: Mapping[str, Any]):
        self.schema = schema
        self.columns: dict[str, list[Any]] = {name: [] for name in schema}

    def add(self, **row: Any) -> None:
        assert row.keys() == self.columns.keys(), row.keys() ^ self.columns.keys()
        for name, value in row.items():
            self.columns[name].append(value)

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: np.array(values, dtype=self.schema[name]) for name, values in self.columns.items()}


class Result:
    """One run. `steps`, `requests`, `lanes`, `links` are DataFrames; `summary` is a flat dict.

    `manifest` says how it was made.
    """

    def __init__(
        self,
        tables: Mapping[str, Mapping[str, np.ndarray]],
        manifest: dict[str, Any],
        timing: dict[str, Any] | None = None,
    ):
        self.tables, self.manifest, self.timing = tables, manifest, dict(timing or {})

    def __getattr__(self, name: str) -> Any:
        if name in TABLES:
            return self.frame(name)
        summary = self.__dict__.get("manifest", {}).get("summary", {})
        if name in summary:
            return summary[name]
        raise AttributeError(name)

    def frame(self, table: str) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame(dict(self.tables[table]))

    @property
    def summary(self) -> dict[str, Any]:
        return self.manifest["summary"]

    @property
    def id(self) -> str:
        return self.manifest["id"]

    def save(self, folder: str | Path) -> Path:
        """Write the folder whole or not at all; the same run is replaced.

        Raises ResultError when it cannot be written, or when another run or something else is there.
        """
        folder = Path(folder)
        check_free(folder, self.id)
        with beside(folder) as partial:
            write_json(partial / "manifest.json", self.manifest)
            write_json(partial / "timing.json", self.timing)
            for name, columns in self.tables.items():
                write_table(partial / f"{name}.parquet", columns)
        return folder


def open_result(folder: str | Path) -> Result:
    """Read a result folder. Raises ResultError for one that is not a whole result."""
    import pyarrow.parquet as pq

    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        timing = json.loads((folder / "timing.json").read_text(encoding="utf-8"))
        tables = {
            name: {c: column.to_numpy() for c, column in zip(t.column_names, t.columns, strict=True)}
            for name in TABLES
            for t in [pq.read_table(folder / f"{name}.parquet")]
        }
    except (OSError, ValueError) as error:
        raise ResultError(
            f"not a result folder: {error}", where=str(folder), hint="give a folder that `kvsim run -o` wrote"
        ) from None
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise ResultError(f"result schema {schema}, this kvsim reads {SCHEMA}", where=str(folder))
    return Result(tables, manifest, timing)


def run_id(identity: Mapping[str, Any]) -> str:
    """A name made of everything that decides the result."""
    return digest({"schema": SCHEMA, **identity})[:16]


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def summarise(tables: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, float]:
    """The numbers a person asks for first, from the tables of one run.

    Over decode steps, all weighted alike; bytes that moved are those of the whole run, prefill included.
    """
    s, r = tables["steps"], tables["requests"]
    d = s["step"] > 0
    weight, used = s["weight"][d].sum(), s["used_pages"][d].sum()
    gaps, waits = _token_gaps(s)
    span = (s["end_s"] - s["start_s"])[d].sum()
    out = {
        "recall": ratio(s["attended"][d].sum(), weight),
        "mass_hit_rate": ratio(s["hit"][d].sum(), weight),
        "page_hit_rate": ratio(s["found_pages"][d].sum(), used),
        "recurrence_loss": 1 - ratio(s["found_pages"][d].sum(), used),
        "lost_pages": int(used - s["found_pages"][d].sum()),
        "gold_loss": share(s["gold_lost"][d].sum(), s["gold_needed"][d].sum()),
        "gold_gone": int(s["gold_gone"][d].sum()),
        "output_error": mean(s["output_error"][d]),
        "stranded_share": share(s["stranded_tokens"][d].sum(), (s["stranded_tokens"] + s["resident_pages"])[d].sum()),
        "ceiling": ratio(s["ceiling"][d].sum(), weight),
        "even_ceiling": ratio(s["even_ceiling"][d].sum(), weight),
        "tpot_p50_s": _quantile(gaps, 0.5),
        "tpot_p90_s": _quantile(gaps, 0.9),
        "tpot_p99_s": _quantile(gaps, 0.99),
        "ttft_mean_s": float(r["ttft_s"].mean()),
        "stall_share": ratio(s["stall_s"][d].sum(), span) if span else 0.0,
        "submit_share": ratio(s["submit_s"][d].sum(), span) if span else 0.0,
        "held_mean_bytes": mean(s["held_bytes"][d]),
        "read_mean_bytes": mean(s["read_bytes"][d]),
        "decode_steps": int(d.sum()),
        "end_s": (end := float(s["end_s"].max())),
        "throughput": float(d.sum()) / end if end else 0.0,
        "prefill_gaps": mean(waits),
    }
    for name in ("fetched_host", "fetched_ssd", "prefetched_host", "prefetched_ssd", "spilled_host", "spilled_ssd"):
        out[f"{name}_bytes"] = float(s[f"{name}_bytes"].sum())
    return out


def _token_gaps(s: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Seconds between one token of a request and the next; and did the request wait for others' prefill in between?"""
    order = np.lexsort((s["step"], s["request"]))
    start, end, request = (s[name][order] for name in ("start_s", "end_s", "request"))
    same = request[1:] == request[:-1]
    return np.diff(end)[same], (start[1:] > end[:-1])[same]


def ratio(a: float, b: float) -> float:
    """a / b; 1 where there was nothing to find."""
    return float(a / b) if b else 1.0


def share(a: float, b: float) -> float:
    """a / b; NaN where there was nothing to count."""
    return float(a / b) if b else float("nan")


def mean(values: np.ndarray) -> float:
    """The mean of the numbers among `values`; NaN where there is none."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _quantile(values: np.ndarray, q: float) -> float:
    return float(np.quantile(values, q)) if len(values) else float("nan")


def check_free(folder: Path, run: str) -> None:
    """Raise ResultError unless `folder` can take the result of `run`: asked before the work and before writing."""
    try:
        held = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["id"]
    except (OSError, ValueError, LookupError, TypeError):
        held = None
    hint = "choose another folder with -o"
    if held not in (None, run):
        raise ResultError(f"the folder holds another run ({held})", where=str(folder), hint=hint)
    if held is None and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ResultError("the name is taken by something that is not a kvsim result", where=str(folder), hint=hint)
    parent = next((p for p in folder.absolute().parents if p.exists()), Path("/"))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ResultError(f"cannot write below {parent}", where=str(folder), hint=hint)


@contextmanager
def beside(final: Path) -> Iterator[Path]:
    """A folder to write into that takes its final name only when the block succeeds; an earlier result is replaced."""
    partial = final.with_name(final.name + ".partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        yield partial
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
    except OSError as error:
        what = f"cannot write: {error.strerror or error}"
        raise ResultError(what, where=str(final), hint="choose another folder with -o") from None
    finally:
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def file_beside(final: Path) -> Iterator[Path]:
    """As `beside`, for one file. The suffix is kept, since writers choose the format by it."""
    partial = final.with_name(f".partial-{final.name}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, final)
    except OSError as error:
        raise ResultError(
            f"cannot write: {error.strerror or error}", where=str(final), hint="choose another place with -o"
        ) from None
    finally:
        with suppress(OSError):  # where the folder itself is none
            partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, default=_plain) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)


def write_table(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def plain(c: np.ndarray) -> Any:  # by their buffers, since pa.array would import pandas
        if c.dtype == object and all(isinstance(x, str) for x in c):
            text = [x.encode() for x in c]
            ends = np.cumsum([0, *map(len, text)], dtype=np.int32)
            return pa.StringArray.from_buffers(len(c), pa.py_buffer(ends), pa.py_buffer(b"".join(text)))
        if c.dtype.kind not in "if":
            return pa.array(c)
        return pa.Array.from_buffers(
            pa.from_numpy_dtype(c.dtype), len(c), [None, pa.py_buffer(np.ascontiguousarray(c))]
        )

    pq.write_table(pa.table({n: plain(c) for n, c in columns.items()}), path, compression="zstd")
