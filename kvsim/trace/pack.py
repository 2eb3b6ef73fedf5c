"""Rows of one request on their way to a Parquet file: byte planes that grow, cut into row groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kvsim.errors import TraceError
from kvsim.trace.layout import GROUP_BYTES, KEYS, PARQUET, VECTOR_TOKENS


class Pending:
    """Encoded rows of one request that wait for their row group."""

    def __init__(self, heads: int, kinds: Mapping[str, Any]):
        self.heads = heads
        self.planes: dict[str, np.ndarray] = {name: np.empty(1 << 16, kind) for name, kind in kinds.items()}
        self.clear()

    def clear(self) -> None:
        self.keys: list[tuple[int, int, int, int]] = []  # step, layer, kv_lo, kv_hi
        self.ends = [0]
        self.kept: list[np.ndarray] = []
        self.mass: list[np.ndarray] = []
        self.sink: list[bytes | None] = []

    def room(self, entries: int) -> None:
        need = self.ends[-1] + entries
        for name, plane in self.planes.items():
            if plane.size < need:
                self.planes[name] = np.concatenate([plane, np.empty(max(need - plane.size, plane.size), plane.dtype)])

    @property
    def bytes(self) -> int:
        return self.ends[-1] * sum(plane.itemsize for plane in self.planes.values()) + len(self.keys) * 10 * self.heads

    def sort(self) -> None:
        """Into (step, layer) order: prefill hands over all rows of one layer, then of the next."""
        order = sorted(range(len(self.keys)), key=self.keys.__getitem__)
        if order == list(range(len(order))):
            return
        ends = self.ends
        for name, plane in self.planes.items():
            self.planes[name] = np.concatenate([plane[ends[i] : ends[i + 1]] for i in order])
        sizes = [ends[i + 1] - ends[i] for i in order]
        self.ends = [0, *np.cumsum(sizes).tolist()]
        for name in ("keys", "kept", "mass", "sink"):
            column = getattr(self, name)
            setattr(self, name, [column[i] for i in order] if column else column)

    def tables(self, request: int, schema: pa.Schema) -> Iterator[pa.Table]:
        """One table per row group, cut between steps."""
        begin, width = 0, max(self.bytes // max(len(self.keys), 1), 1)
        for row in range(1, len(self.keys) + 1):
            last = row == len(self.keys)
            full = (row - begin) * width >= GROUP_BYTES
            if last or (full and self.keys[row][0] != self.keys[row - 1][0]):
                yield self._table(request, schema, begin, row)
                begin = row

    def _table(self, request: int, schema: pa.Schema, begin: int, end: int) -> pa.Table:
        keys = np.array(self.keys[begin:end], np.int32)
        columns: dict[str, Any] = dict(zip(KEYS[1:], keys.T, strict=True))
        columns["request"] = np.full(end - begin, request, np.int32)
        if any(sink is not None for sink in self.sink):  # layers without one have a sink of nothing
            none = bytes(4 * self.heads)
            columns["sink"] = [sink or none for sink in self.sink[begin:end]]
        else:
            columns["sink"] = [None] * (end - begin)
        if self.kept:
            columns["n"] = _fixed(np.array(self.kept[begin:end], "<u4"))
            columns["mass"] = _fixed(np.array(self.mass[begin:end]).astype("<f2"))
        ends = np.array(self.ends[begin : end + 1], np.int64)
        for name, plane in self.planes.items():
            offsets = ((ends - ends[0]) * plane.itemsize).astype(np.int32)
            data = pa.py_buffer(plane[ends[0] : ends[-1]].tobytes())
            columns[name] = pa.BinaryArray.from_buffers(pa.binary(), end - begin, [None, pa.py_buffer(offsets), data])
        return pa.table([pa.array(columns[f.name], f.type) for f in schema], schema=schema)


def _fixed(rows: np.ndarray) -> pa.Array:
    width = rows.shape[1] * rows.itemsize
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(rows.tobytes())])


class RequestFile:
    """The growing `attn-<request>.parquet`."""

    def __init__(self, path: Path, request: int, schema: pa.Schema, pending: Pending):
        self.request, self.schema, self.pending = request, schema, pending
        self.parquet = pq.ParquetWriter(path, schema, use_dictionary=list(KEYS), **PARQUET)
        self.seen: set[tuple[int, int]] = set()  # (step, layer) of the prompt rows
        self.last = (0, -1)  # (step, layer) of the newest decode row; these come in order
        self.prompts: set[int] = set()  # prompt lengths the rows' ends speak of: one, if all is well

    def flush(self) -> None:
        self.pending.sort()
        for table in self.pending.tables(self.request, self.schema):
            self.parquet.write_table(table, row_group_size=table.num_rows)
        self.pending.clear()


class VectorFile:
    """The growing `vectors-<request>.parquet`: at most VECTOR_TOKENS tokens per line."""

    SCHEMA = pa.schema(
        [
            ("request", pa.int32()),
            ("step", pa.int32()),
            ("layer", pa.int16()),
            ("tokens", pa.int32()),
            ("head_dim", pa.int32()),
        ]
        + [(name, pa.binary()) for name in ("position", "q", "k", "v")]
    )

    def __init__(self, path: Path, request: int, meta: Mapping[str, str]):
        self.request = request
        self.parquet = pq.ParquetWriter(path, self.SCHEMA.with_metadata(meta), use_dictionary=False, **PARQUET)
        self.lines: list[tuple] = []
        self.bytes = 0

    def add(self, step: int, layer: int, positions: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        halves = [np.asarray(a).astype(np.float16) for a in (q, k, v)]
        if not all(np.isfinite(a).all() for a in halves):
            raise TraceError(f"request {self.request}, step {step}, layer {layer}: vectors beyond float16")
        positions = np.asarray(positions, np.int32)
        for i in range(0, len(positions), VECTOR_TOKENS):
            part = slice(i, i + VECTOR_TOKENS)
            blobs = [positions[part].tobytes(), *(np.ascontiguousarray(a[:, part]).tobytes() for a in halves)]
            self.lines.append((self.request, step, layer, len(positions[part]), halves[0].shape[-1], *blobs))
            self.bytes += sum(map(len, blobs))
            if self.bytes >= GROUP_BYTES:
                self.flush()

    def flush(self) -> None:
        if self.lines:
            schema = self.parquet.schema
            table = pa.table(
                [pa.array(c, f.type) for c, f in zip(zip(*self.lines, strict=True), schema, strict=True)], schema=schema
            )
            self.parquet.write_table(table, row_group_size=len(self.lines))
        self.lines, self.bytes = [], 0

    def close(self) -> None:
        self.flush()
        self.parquet.close()
