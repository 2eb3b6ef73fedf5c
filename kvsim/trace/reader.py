"""Opening a trace, and reading it row group by row group: `open_trace(path)` -> `Trace`.

A source keeps only its path; an iteration holds the Parquet bytes of one row group and one dense float32
step. What is wrong with a file is found when its rows are met and raised as a `TraceError`; `kvsim trace
check` looks at everything at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kvsim.errors import TraceError
from kvsim.trace.access import PromptRows, Source, TokenRow, Trace, Vectors
from kvsim.trace.files import AGAIN, geometry, group_steps, open_parquet, read_groups, read_manifest, read_table
from kvsim.trace.group import Group, Lines
from kvsim.trace.layout import KEYS, TIMES, attention_name, planes, spans_name, vectors_name
from kvsim.trace.prompt_rows import Rows

G = TypeVar("G", bound=Lines)
DEMO = Path(__file__).parent.parent / "data" / "demo.kvtrace"


def located(path: str | os.PathLike) -> Path:
    """Where a trace lies: "demo" is the one that comes with kvsim."""
    return DEMO if str(path) == "demo" else Path(path)


def open_trace(path: str | os.PathLike) -> Trace:
    """The trace in the directory `path`, or the one that comes with kvsim for "demo"; rows are read when asked for.

    Raises TraceError when there is no trace, its format is foreign or too new, or a file is missing or
    was cut.
    """
    path = located(path)
    manifest = read_manifest(path)
    requests = read_table(path / "requests.parquet", ("request", "prompt_len", "n_steps", "tokens"))
    sources = [FileSource(path, manifest, row) for row in requests.to_pylist()]
    for source in sources:
        counts = (source.id, source.prompt_tokens, source.output_tokens)
        if None in counts or source.prompt_tokens < 1 or source.output_tokens < 0:
            raise TraceError(
                f"request {source.id}: {source.prompt_tokens} prompt tokens and {source.output_tokens} steps",
                where=str(path / "requests.parquet"),
                hint=AGAIN,
            )
    return Trace(sources, geometry(manifest), manifest["fingerprint"], path.stem, manifest=manifest, path=str(path))


class FileSource(Source):
    """One request of a trace directory."""

    def __init__(self, path: Path, manifest: Mapping[str, Any], row: Mapping[str, Any]):
        self.path, self.manifest = path, manifest
        self.id, self.prompt_tokens, self.output_tokens = row["request"], row["prompt_len"], row["n_steps"]
        self._row = row

    @cached_property
    def facts(self) -> Mapping[str, Any]:  # type: ignore[override]  # read when first asked for
        """Columns of requests.parquet (lists as arrays) and steps.parquet under their names; times in seconds.

        "tokens": int32, prompt and output; "need": one int32 array per decode step; "step_us" becomes
        "step_seconds" (of the run without capture), "captured_step_us" "captured_step_seconds". "span": int32 per
        token, number of the prompt's span that holds it, -1 for none.
        """
        own = ("request", "prompt_len", "n_steps")
        known = {key: value for key, value in self._row.items() if key not in own and value is not None}
        facts = {key: np.array(value) if isinstance(value, list) else value for key, value in known.items()}
        facts["tokens"] = np.array(facts["tokens"], np.int32)
        if "steps.parquet" in self.manifest["files"]:
            table = read_table(self.path / "steps.parquet", ("request", "step"), self.id)
            for name in table.column_names if table.num_rows else ():
                if name not in ("request", "step"):
                    facts |= _step_fact(name, table.column(name))
        if (path := self.path / spans_name(self.id)).is_file():
            facts["span"] = np.full(len(facts["tokens"]), -1, np.int32)
            spans = read_table(path, ("span", "start", "end"))
            for span, start, end in zip(*(spans.column(n).to_pylist() for n in ("span", "start", "end")), strict=True):
                facts["span"][start:end] = span
        return facts

    @cached_property
    def inv_freq(self) -> np.ndarray | None:  # type: ignore[override]
        """None too where layers are rotated in different ways: the manifest does not say which in which."""
        found = {tuple(r["inv_freq"]) for r in self.manifest.get("rotary", ())}
        return np.array(found.pop()) if len(found) == 1 else None

    @cached_property
    def provides(self) -> frozenset[str]:  # type: ignore[override]
        known = dict(zip(("colsum", "colsq", "colmax"), self._statistics(), strict=True))
        names = {"window_rows", *(name for name, x in known.items() if x is not None), *self.facts}
        names |= {"q", "k", "v"} if vectors_name(self.id) in self.manifest["files"] else set()
        names |= set() if self.inv_freq is None else {"inv_freq"}
        return frozenset(names | ({"spans"} if (self.path / spans_name(self.id)).is_file() else set()))

    def prompt(self) -> PromptRows:
        colsum, colsq, colmax = self._statistics()
        if colsum is None:
            raise self._broken("no column sums of the prompt")
        m, file = self.manifest, open_parquet(self._file, self._columns())  # stays open for as long as the rows do
        spans = group_steps(file, self._file)
        kept = -min((first for first, _ in spans), default=0)
        if not 0 < kept <= self.prompt_tokens:
            raise self._broken(f"prompt rows of {max(kept, 0)} tokens in a prompt of {self.prompt_tokens}")
        kv_lo = np.full((kept, m["layers"]), -1, np.int32)
        places = np.zeros((kept, 2), np.int64)  # of each row: the row group and its first line there
        for i, (first, _) in enumerate(spans):
            if first < 0:
                lines = self._group(file, i, Lines, KEYS)
                for at in range(0, lines.rows, lines.layers):
                    if (step := lines.step[at]) < 0:
                        kv_lo[step], places[step] = lines.kv_lo[at : at + lines.layers], (i, at)
        if (kv_lo < 0).any():
            raise self._broken("a prompt row is missing")
        rows = Rows(_PromptRow(self, file, places), (kept, m["layers"], m["kv_heads"], self.prompt_tokens))
        return PromptRows(colsum, colsq, colmax, rows, kv_lo, *self._span_sums())

    def _span_sums(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Bounds int32 [spans, 2] and column sums float32 [spans, layers, kv_heads, prompt], or None twice."""
        path, m = self.path / spans_name(self.id), self.manifest
        if not path.is_file():
            return None, None
        table = read_table(path, ("span", "start", "end", "layer", "head", "colsum"))
        count = 1 + int(np.max(table.column("span").to_numpy(), initial=-1))
        bounds = np.zeros((count, 2), np.int32)
        sums = np.zeros((count, m["layers"], m["kv_heads"], self.prompt_tokens), np.float32)
        for line in table.to_pylist():
            bounds[line["span"]] = line["start"], line["end"]
            sums[line["span"], line["layer"], line["head"]] = np.frombuffer(line["colsum"], "<f4")
        return bounds, sums

    def token_rows(self) -> Iterator[TokenRow]:
        return self._rows()

    def max_rows(self) -> Iterator[TokenRow]:
        """As `token_rows`, with the largest query head of the group; the residual is spread all the same."""
        if not self.manifest["encoding"].get("max"):
            raise TraceError("the trace holds no group maxima", where=str(self.path), hint="capture it with --with-max")
        return self._rows(peaks=True)

    def entries(self) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """The stored weights alone, per step: step, layer, head, position, weight."""
        for t in self._rows(spread=False):
            layer, head, position = np.nonzero(t.row[..., : t.kv_hi])
            yield t.step, layer, head, position, t.row[layer, head, position]

    def vectors(self) -> Iterator[Vectors]:
        """q, k and v as captured: layer by layer for the prompt, then step by step."""
        name = vectors_name(self.id)
        if name not in self.manifest["files"]:
            raise TraceError("the trace holds no q, k and v", where=str(self.path), hint="capture it with --vectors")
        with open_parquet(self.path / name, ("step", "layer", "tokens", "head_dim", "position", "q", "k", "v")) as file:
            for i in range(file.num_row_groups):
                for line in read_groups(file, self.path / name, [i]).to_pylist():
                    yield _vector(line)

    def _broken(self, what: str) -> TraceError:
        return TraceError(f"request {self.id}: {what}", where=str(self._file), hint=AGAIN)

    # -- files ---------------------------------------------------------------------------------------------

    @property
    def _file(self) -> Path:
        return self.path / attention_name(self.id)

    def _columns(self) -> tuple[str, ...]:
        encoding = self.manifest["encoding"]
        kept = () if encoding["keep"] == "all" else ("n", "mass")
        return (*KEYS, "sink", *kept, *planes(encoding["keep"] == "all", bool(encoding.get("max"))))

    def _group(self, file: pq.ParquetFile, i: int, kind: type[G], columns: tuple[str, ...]) -> G:
        group = kind(read_groups(file, self._file, [i], columns), self.manifest, self._file)
        group.expect(self.id, self.prompt_tokens)
        return group

    def _groups(self, wanted: Callable[[int, int], bool]) -> Iterator[Group]:
        """The row groups whose first and last step are wanted; one is held at a time."""
        columns = self._columns()
        with open_parquet(self._file, columns) as file:
            for i, span in enumerate(group_steps(file, self._file)):
                if wanted(*span):
                    yield self._group(file, i, Group, columns)

    def _rows(self, peaks: bool = False, spread: bool = True) -> Iterator[TokenRow]:
        m = self.manifest
        row = np.zeros((m["layers"], m["kv_heads"], self.prompt_tokens + self.output_tokens), np.float32)
        due = 1
        for group in self._groups(lambda first, last: last > 0):
            for at in range(0, group.rows, group.layers):
                step = int(group.step[at])
                if step < 0:
                    continue
                if step != due or step > self.output_tokens:
                    group.fail(at, f"out of order, step {due} of {self.output_tokens} is due")
                end = at + group.layers
                group.decode(at, end, row, peaks, spread)
                yield TokenRow(step, row, group.kv_lo[at:end], int(group.kv_hi[at]))
                due += 1
            del group
        if due <= self.output_tokens:
            raise self._broken(f"step {due} of {self.output_tokens} is missing")

    def _statistics(self) -> list[np.ndarray | None]:
        """colsum, colsq and colmax, float32 [layers, kv_heads, prompt] or None each."""
        m, path = self.manifest, self.path / "prefill.parquet"
        names = ("colsum", "colsq", "colmax")
        table = read_table(path, ("request", "layer", "head", *names), self.id)
        shape = (m["layers"], m["kv_heads"], self.prompt_tokens)
        lanes = [(layer, head) for layer in range(shape[0]) for head in range(shape[1])]
        if list(zip(*(table.column(key).to_pylist() for key in ("layer", "head")), strict=True)) != lanes:
            raise TraceError(f"request {self.id}: prompt statistics are not complete", where=str(path), hint=AGAIN)
        return [self._statistic(table.column(name).to_pylist(), shape, path, name) for name in names]

    def _statistic(self, blobs: list[bytes | None], shape: tuple[int, ...], path: Path, name: str) -> np.ndarray | None:
        if all(blob is None for blob in blobs):
            return None
        found = [blob for blob in blobs if blob is not None and len(blob) == 4 * self.prompt_tokens]
        if len(found) < len(blobs):
            raise TraceError(
                f"request {self.id}: {name} is not {self.prompt_tokens} float32 long", where=str(path), hint=AGAIN
            )
        values = np.frombuffer(b"".join(found), "<f4").reshape(shape)
        if not (values >= 0).all() or not np.isfinite(values).all():
            raise TraceError(f"request {self.id}: {name} is negative or not a number", where=str(path), hint=AGAIN)
        return values


class _PromptRow:
    """A stored prompt row as dense float32 [layers, kv_heads, prompt]; the latest row group stays at hand."""

    def __init__(self, source: FileSource, file: pq.ParquetFile, places: np.ndarray):
        self._source, self._file, self._places = source, file, places
        self._latest: tuple[int, Group] | None = None  # a row group and its number

    def __call__(self, i: int) -> np.ndarray:
        s, (number, at) = self._source, self._places[i].tolist()
        if self._latest is None or self._latest[0] != number:
            self._latest = None  # before the next one is read
            self._latest = number, s._group(self._file, number, Group, s._columns())
        group = self._latest[1]
        row = np.zeros((s.manifest["layers"], s.manifest["kv_heads"], s.prompt_tokens), np.float32)
        group.decode(at, at + group.layers, row)
        return row


def _step_fact(name: str, column: pa.ChunkedArray) -> dict[str, Any]:
    if column.null_count == len(column):
        return {}
    if pa.types.is_list(column.type):
        return {name: [np.array(item or (), np.int32) for item in column.to_pylist()]}
    values = column.to_numpy()
    if name.endswith(TIMES):
        return {name.removesuffix("_us") + "_seconds": values.astype(np.float64) * 1e-6}
    return {name: values}


def _vector(line: Mapping[str, Any]) -> Vectors:
    shape = (-1, line["tokens"], line["head_dim"])
    q, k, v = (np.frombuffer(line[name], "<f2").reshape(shape) for name in "qkv")
    return Vectors(line["step"], line["layer"], np.frombuffer(line["position"], "<i4"), q, k, v)
