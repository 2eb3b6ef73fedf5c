"""One row group of attention rows: its Parquet bytes seen as flat arrays, and their way into dense rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kvsim import threads
from kvsim.errors import TraceError
from kvsim.trace import kernels
from kvsim.trace.files import AGAIN
from kvsim.trace.layout import KEYS, planes


class Lines:
    """The key columns of one row group; lines are (step, layer) in order."""

    def __init__(self, table: pa.Table, manifest: Mapping[str, Any], path: Path):
        self.path, self.layers, self.rows = path, manifest["layers"], table.num_rows
        self.request, self.step, self.layer, self.kv_lo, self.kv_hi = (_plain(table, key) for key in KEYS)

    def fail(self, row: int, what: str, head: int | None = None) -> None:
        place = f"request {self.request[row]}, step {self.step[row]}, layer {self.layer[row]}"
        lane = "" if head is None else f", head {head}"
        raise TraceError(f"{place}{lane}: {what}", where=str(self.path), hint=AGAIN)

    def expect(self, request: int, prompt: int) -> None:
        """All layers of whole steps, in order, of this request, ending where their step must end."""
        index = np.arange(self.rows)
        end = prompt + self.step + (self.step < 0)
        for what, wrong in (
            ("a foreign request", self.request != request),
            ("layers missing or out of order", self.layer != index % self.layers),
            ("step 0", self.step == 0),
            ("layers of different steps", self.step != self.step[index // self.layers * self.layers]),
            (f"kv_hi is not the end of the step (prompt of {prompt})", self.kv_hi != end),
            ("kv_lo outside the row", (self.kv_lo < 0) | (self.kv_lo >= self.kv_hi)),
        ):
            if wrong.any():
                self.fail(int(np.argmax(wrong)), what)
        if self.rows % self.layers:
            self.fail(self.rows - 1, "the last step lacks layers")


class Group(Lines):
    """One row group as flat arrays over the Parquet bytes."""

    def __init__(self, table: pa.Table, manifest: Mapping[str, Any], path: Path):
        super().__init__(table, manifest, path)
        heads = manifest["kv_heads"]
        self.lossless = manifest["encoding"]["keep"] == "all"
        no_sink = table.column("sink").null_count == self.rows
        self.sink = np.zeros((self.rows, heads), np.float32) if no_sink else _fixed(table, "sink", "<f4", heads, path)
        kinds = planes(self.lossless, bool(manifest["encoding"].get("max")))
        self.planes, ends = {}, {}
        for name, kind in kinds.items():
            self.planes[name], ends[name] = _blobs(table, name, kind, path)
        if self.lossless:
            sizes = (self.kv_hi - self.kv_lo).astype(np.int64) * heads
        else:
            self.n = _fixed(table, "n", "<u4", heads, path)
            self.mass = _fixed(table, "mass", "<f2", heads, path).astype(np.float32)
            sizes = self.n.sum(1, dtype=np.int64)
        self.start = np.cumsum(sizes) - sizes
        for name, end in ends.items():
            if wrong := np.flatnonzero(np.diff(end) != sizes).tolist():
                self.fail(wrong[0], f'counts that disagree with the length of the column "{name}"')

    def decode(self, begin: int, end: int, out: np.ndarray, peaks: bool = False, spread: bool = True) -> None:
        """Lines begin .. end-1 into out, float32 [end - begin, kv_heads, tokens]."""
        part, p = slice(begin, end), self.planes
        lo, hi, start, sink = self.kv_lo[part], self.kv_hi[part], self.start[part], self.sink[part]
        status, head = np.zeros((2, end - begin), np.int64)
        lines, answer = (end - begin, out.shape[1] * out.shape[2]), (out, status, head)
        if self.lossless:
            values = p["max32" if peaks else "w32"]
            threads.each(kernels.copy_rows, *lines, values, sink, lo, hi, start, not peaks, *answer)
        else:
            entries = p["gap_lo"], p["gap_hi"], p["w"], p["dmax"] if peaks else p["w"][:0]
            given = self.n[part], self.mass[part], sink, lo, hi, start, *entries, spread
            threads.each(kernels.decode_rows, *lines, *given, *answer)
        if status.any():
            row = int(np.argmax(status > 0))
            self.fail(begin + row, kernels.MEANING[status[row]], int(head[row]))


def _plain(table: pa.Table, name: str) -> np.ndarray:
    column = table.column(name).combine_chunks()
    kind = np.dtype(str(column.type))
    values = np.frombuffer(column.buffers()[1], kind, len(column), column.offset * kind.itemsize)
    return values.astype(np.int32, copy=False)


def _one(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name).combine_chunks()
    return column.chunk(0) if isinstance(column, pa.ChunkedArray) else column


def _fixed(table: pa.Table, name: str, kind: str, heads: int, path: Path) -> np.ndarray:
    """A fixed binary column as [rows, heads]."""
    column = _one(table, name)
    dtype = np.dtype(kind)
    if column.null_count or column.type != pa.binary(dtype.itemsize * heads):
        raise TraceError(
            f'the column "{name}" holds {column.type}', where=str(path), hint=f"expected {heads} x {dtype.name}"
        )
    values = np.frombuffer(column.buffers()[1], dtype, len(column) * heads, column.offset * heads * dtype.itemsize)
    return values.reshape(len(column), heads)


def _blobs(table: pa.Table, name: str, kind: type, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A binary column as one flat array without copying, and where each line's items begin (and the last end)."""
    column = _one(table, name)
    if column.type != pa.binary() or column.null_count:
        raise TraceError(
            f'the column "{name}" holds {column.type}', where=str(path), hint="expected binary without nulls"
        )
    size = np.dtype(kind).itemsize
    ends = np.frombuffer(column.buffers()[1], np.int32, len(column) + 1, column.offset * 4)
    if (ends % size).any():
        raise TraceError(f'the column "{name}" holds broken numbers', where=str(path), hint=AGAIN)
    data = column.buffers()[2]
    flat = np.frombuffer(data, np.uint8)[ends[0] : ends[-1]] if data is not None else np.empty(0, np.uint8)
    return flat.view(kind), ends // size
