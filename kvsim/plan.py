"""The movement plan of a run: which pages of which layer move in which step. A Parquet file, format `kvsim-plan`.

One line per move, sorted by (step, layer, page, tier, action) without repetition: step int32, layer int16, page int32,
tier int8 (1 host, 2 SSD), action "load" (tier -> GPU), "store" (GPU -> tier) or "drop" (the GPU gives the page up; the
tier has a copy). A page holds all KV heads of a layer. What else belongs to it (`PlanInfo`) is JSON under the schema
key "kvsim".
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kvsim.errors import ResultError

FORMAT = "kvsim-plan"
VERSION = "1.0"  # readers refuse a newer major number and ignore columns they do not know
HOST, SSD = 1, 2
ACTIONS = ("load", "store", "drop")
LOAD, STORE, DROP = range(len(ACTIONS))
COLUMNS = {"step": np.int32, "layer": np.int16, "page": np.int32, "tier": np.int8, "action": np.int8}
GROUP_ROWS = 1 << 18
AGAIN = "write it again with kvsim run --export-plan"


@dataclass(frozen=True)
class PlanInfo:
    """What a plan was made from.

    `trace`: fingerprint; `page_size` in tokens; `page_bytes` of a page of one layer, all heads; `context`: tokens at
    the last step; `steps`: one past the last step; `mapped`: None, or how the plan was brought to another geometry.
    """

    trace: str
    trace_name: str
    page_size: int
    page_bytes: int
    layers: int
    kv_heads: int
    head_dim: int
    context: int
    steps: int
    policy: str
    budget: str
    mapped: dict[str, Any] | None = None

    @property
    def pages(self) -> int:
        """Pages of a layer at the last step."""
        return -(-self.context // self.page_size)


@dataclass(frozen=True)
class Moves:
    """What one layer moves in one step: `page` int32, `tier` int8, `action` int8 (index of ACTIONS), equally long."""

    page: np.ndarray
    tier: np.ndarray
    action: np.ndarray

    def pages(self, action: int, tier: int) -> np.ndarray:
        """Pages, ascending, that `action` moves from or to `tier`."""
        return self.page[(self.action == action) & (self.tier == tier)]


def loads(page: np.ndarray | Sequence[int], tier: int = HOST) -> Moves:
    """Moves that load the pages of one layer from one tier."""
    pages = np.unique(np.asarray(page, np.int32))
    return Moves(pages, np.full(len(pages), tier, np.int8), np.full(len(pages), LOAD, np.int8))


class Plan:
    """A movement plan in memory: `info` and one array per column (12 bytes a move).

    Raises ResultError when the moves are not what the format says.
    """

    def __init__(self, info: PlanInfo, columns: dict[str, np.ndarray], where: str | None = None):
        self.info = info
        self.columns = {name: np.ascontiguousarray(columns[name], kind) for name, kind in COLUMNS.items()}
        _check(info, self.columns, where)

    def __len__(self) -> int:
        return len(self.columns["step"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of moves and facts, whatever file they lie in."""
        digest = hashlib.sha256(json.dumps(asdict(self.info), sort_keys=True).encode())
        for column in self.columns.values():
            digest.update(column.tobytes())
        return digest.hexdigest()

    def require(self, fingerprint: str) -> None:
        """Raise ResultError unless the plan was made from the trace with this fingerprint."""
        if self.info.trace != fingerprint:
            what = f"the plan belongs to another trace ({self.info.trace_name}, {self.info.trace[:12]})"
            raise ResultError(what, hint=f"export one from the trace {fingerprint[:12]} with kvsim run --export-plan")

    def step(self, step: int) -> list[Moves]:
        """The moves of each layer in one step."""
        rows = self._rows(step, step + 1)
        layer, rest = self.columns["layer"][rows], [self.columns[c][rows] for c in ("page", "tier", "action")]
        cuts = np.searchsorted(layer, np.arange(self.info.layers + 1))
        return [Moves(*(column[a:z] for column in rest)) for a, z in zip(cuts[:-1], cuts[1:], strict=True)]

    def window(self, first: int, stop: int) -> Plan:
        """The moves of steps first ... stop - 1 alone; the steps keep their numbers."""
        rows = self._rows(first, stop)
        return Plan(self.info, {name: column[rows] for name, column in self.columns.items()})

    def _rows(self, first: int, stop: int) -> slice:
        start, end = np.searchsorted(self.columns["step"], [first, stop])
        return slice(int(start), int(end))

    def save(self, path: str | os.PathLike) -> Path:
        """Write the plan, whole or not at all. Raises ResultError when it cannot be written."""
        with PlanWriter(path, self.info) as writer:
            for number in np.unique(self.columns["step"]).tolist():
                rows = self._rows(number, number + 1)
                writer.add(number, *(self.columns[name][rows] for name in tuple(COLUMNS)[1:]))
        return Path(path)


class PlanWriter:
    """Writes a plan step by step; as a context manager the file appears at the end, or not at all."""

    def __init__(self, path: str | os.PathLike, info: PlanInfo):
        self.path, self.info = Path(path), info
        self.partial = self.path.with_name(f".partial-{self.path.name}")
        self._step, self._rows = -1, 0
        self._now: list[list[np.ndarray]] = []  # moves of the step that is being added
        self._waiting: list[dict[str, np.ndarray]] = []  # whole steps, of the next row group

    def __enter__(self) -> Self:
        with _writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = pq.ParquetWriter(self.partial, _schema(self.info), compression="zstd")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish_step()
                self._flush()
            with _writing(self.path):
                self._file.close()
                if kind is None:
                    os.replace(self.partial, self.path)
        finally:
            self.partial.unlink(missing_ok=True)

    def add(self, step: int, layer: Any, page: Any, tier: Any, action: Any) -> None:
        """Add moves of `step`: arrays of equal length in any order, or one value for all.

        `action`: a name of ACTIONS or its index. Steps come in ascending order; a step may be added in several calls.
        Raises ResultError for moves outside of the plan's layers, pages or steps, or given twice.
        """
        if step < self._step:
            raise ResultError(f"step {step} comes after step {self._step}", where=str(self.path))
        if step > self._step:
            self._finish_step()
            self._step = step
        code = ACTIONS.index(action) if isinstance(action, str) else action
        self._now.append([np.atleast_1d(x) for x in np.broadcast_arrays(layer, page, tier, code)])

    def _finish_step(self) -> None:
        if not self._now:
            return
        arrays = [np.concatenate(parts) for parts in zip(*self._now, strict=True)]
        arrays.insert(0, np.full(len(arrays[0]), self._step))
        columns = dict(zip(COLUMNS, arrays, strict=True))
        _within(self.info, columns, str(self.path))
        order = np.argsort(_order(self.info, columns), kind="stable")
        columns = {name: columns[name][order].astype(kind) for name, kind in COLUMNS.items()}
        _check(self.info, columns, str(self.path))
        self._waiting.append(columns)
        self._rows += len(order)
        self._now = []
        if self._rows >= GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            columns = {name: np.concatenate([c[name] for c in self._waiting]) for name in COLUMNS}
            with _writing(self.path):
                self._file.write_table(_table(columns, self._file.schema))
        self._waiting, self._rows = [], 0


def read_plan(path: str | os.PathLike) -> Plan:
    """The plan in a file. Raises ResultError for a file that is none, is newer, or holds impossible moves."""
    path = Path(path)
    try:
        with pq.ParquetFile(path) as plain:  # a file without the column cannot be opened with it as a dictionary
            _info(plain.schema_arrow.metadata or {}, path)
            whole = "action" in plain.schema_arrow.names
        with pq.ParquetFile(path, read_dictionary=["action"] if whole else None) as file:
            info = _info(file.schema_arrow.metadata or {}, path)
            if missing := [name for name in COLUMNS if name not in file.schema_arrow.names]:
                found = ", ".join(file.schema_arrow.names)
                raise ResultError(f'the column "{missing[0]}" is missing', where=str(path), hint=f"it holds {found}")
            table = file.read(columns=list(COLUMNS), use_threads=False)
    except (OSError, pa.ArrowException) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error).strip().split("\n")[0][:160]
        raise ResultError(f"not a movement plan: {reason}", where=str(path), hint=AGAIN) from None
    columns = {name: _numbers(table.column(name), name, path) for name in tuple(COLUMNS)[:-1]}
    columns["action"] = _codes(table.column("action"), path)
    return Plan(info, columns, str(path))


def mapped(
    plan: Plan, layers: int, kv_heads: int, head_dim: int, context: int, value_bytes: float | None = None
) -> Plan:
    """The plan on another geometry: layer l does what floor(l * Ls / L) of the Ls source layers did.

    The pages are repeated, end to end, until `context` tokens are covered; what lies behind the end is left out.
    `value_bytes` of a cached element (None: as in the source). `info.mapped` says what was done.
    """
    source = plan.info
    width = source.page_bytes / (source.page_size * 2 * source.kv_heads * source.head_dim)
    value_bytes = width if value_bytes is None else value_bytes
    page_bytes = round(source.page_size * 2 * kv_heads * head_dim * value_bytes)
    how = {
        **{name: getattr(source, name) for name in ("layers", "kv_heads", "head_dim", "context", "page_bytes")},
        "layer": "floor(l * source layers / layers)",
        "repeated": context / source.context,
    }
    info = replace(
        source,
        layers=layers, kv_heads=kv_heads, head_dim=head_dim, context=context, page_bytes=page_bytes, mapped=how,
    )  # fmt: skip
    copies = -(-info.pages // source.pages)
    parts = []
    for layer in range(layers):
        rows = plan.columns["layer"] == layer * source.layers // layers
        for copy in range(copies):
            part = {name: column[rows] for name, column in plan.columns.items()}
            part["layer"] = np.full_like(part["layer"], layer)
            part["page"] = part["page"] + copy * source.pages
            parts.append(part)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
    inside = columns["page"] < info.pages
    columns = {name: column[inside] for name, column in columns.items()}
    order = np.argsort(_order(info, columns), kind="stable")
    return Plan(info, {name: column[order] for name, column in columns.items()})


# -- the file ----------------------------------------------------------------------------------------------------


def _schema(info: PlanInfo) -> pa.Schema:
    kinds = {name: pa.from_numpy_dtype(kind) for name, kind in COLUMNS.items()}
    kinds["action"] = pa.dictionary(pa.int8(), pa.string())
    meta = {"format": FORMAT, "version": VERSION, **asdict(info)}
    columns = [pa.field(name, kind, nullable=False) for name, kind in kinds.items()]
    return pa.schema(columns, metadata={"kvsim": json.dumps(meta, sort_keys=True)})


def _table(columns: dict[str, np.ndarray], schema: pa.Schema) -> pa.Table:
    """By the arrays' buffers, since pa.array would import pandas."""
    arrays = [
        pa.Array.from_buffers(pa.from_numpy_dtype(c.dtype), len(c), [None, pa.py_buffer(c)]) for c in columns.values()
    ]
    arrays[-1] = pa.DictionaryArray.from_arrays(arrays[-1], pa.array(list(ACTIONS)))
    return pa.Table.from_arrays(arrays, schema=schema)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"cannot write: {error.strerror or error}"
        raise ResultError(what, where=str(path), hint="choose another place with --export-plan") from None


def _info(metadata: dict[bytes, bytes], path: Path) -> PlanInfo:
    """The facts in the file's metadata, once they are those of a plan this kvsim reads."""
    try:
        meta = json.loads(metadata[b"kvsim"])
        name, version = meta["format"], str(meta["version"])
        major = int(version.split(".")[0])
    except (KeyError, ValueError, TypeError):
        raise ResultError("a Parquet file, but not a movement plan", where=str(path), hint=AGAIN) from None
    if name != FORMAT:
        raise ResultError(f'the format is "{name}"', where=str(path), hint=f'kvsim reads "{FORMAT}" here')
    if major > int(VERSION.split(".")[0]):
        what = f"format version {version} is newer than this kvsim reads ({VERSION})"
        raise ResultError(what, where=str(path), hint="update kvsim")
    try:
        info = PlanInfo(**{f.name: meta[f.name] for f in fields(PlanInfo)})
        sizes = (info.page_size, info.page_bytes, info.layers, info.kv_heads, info.head_dim, info.context, info.steps)
        sound = all(isinstance(size, int) and size > 0 for size in sizes)
    except KeyError as error:
        raise ResultError(f"the metadata lacks {error}", where=str(path), hint=AGAIN) from None
    if not sound:
        raise ResultError("the metadata holds a size that is no positive whole number", where=str(path), hint=AGAIN)
    return info


def _numbers(column: pa.ChunkedArray, name: str, path: Path) -> np.ndarray:
    wanted = pa.from_numpy_dtype(COLUMNS[name])
    if column.type != wanted or column.null_count:
        what = f'the column "{name}" holds {"nulls" if column.null_count else column.type}'
        raise ResultError(what, where=str(path), hint=f"it must hold {wanted}")
    return column.to_numpy()


def _codes(column: pa.ChunkedArray, path: Path) -> np.ndarray:
    """Indices of ACTIONS from the names in the file, whose dictionary may have another order."""
    hint = f"actions are {', '.join(ACTIONS)}"
    if not pa.types.is_dictionary(column.type) or column.null_count:
        raise ResultError('the column "action" holds something other than names', where=str(path), hint=hint)
    parts = [np.empty(0, np.int8)]
    for chunk in column.chunks:
        names = chunk.dictionary.to_pylist()
        if unknown := [name for name in names if name not in ACTIONS]:
            raise ResultError(f'unknown action "{unknown[0]}"', where=str(path), hint=hint)
        codes = np.array([ACTIONS.index(name) for name in names], np.int8)
        parts.append(codes[chunk.indices.to_numpy(zero_copy_only=False)])
    return np.concatenate(parts)


# -- what a plan may hold ----------------------------------------------------------------------------------------


def _limits(info: PlanInfo) -> dict[str, tuple[int, int]]:
    """Least value of each column, and one past the greatest."""
    return {
        "step": (0, info.steps),
        "layer": (0, info.layers),
        "page": (0, info.pages),
        "tier": (HOST, SSD + 1),
        "action": (0, len(ACTIONS)),
    }


def _order(info: PlanInfo, columns: dict[str, np.ndarray]) -> np.ndarray:
    """One int64 per move that sorts as (step, layer, page, tier, action) do."""
    key = np.zeros(len(columns["step"]), np.int64)
    for name, (_, stop) in _limits(info).items():
        key = key * stop + columns[name]
    return key


def _within(info: PlanInfo, columns: dict[str, np.ndarray], where: str | None) -> None:
    for name, (least, stop) in _limits(info).items():
        column = columns[name]
        if len(column) and not least <= (low := int(column.min())) <= (high := int(column.max())) < stop:
            what = f"{name} {low if low < least else high} is outside of {least} ... {stop - 1}"
            raise ResultError(what, where=where, hint=AGAIN)


def _check(info: PlanInfo, columns: dict[str, np.ndarray], where: str | None) -> None:
    _within(info, columns, where)
    gaps = np.diff(_order(info, columns))
    if (gaps <= 0).any():
        at = int(np.argmax(gaps <= 0)) + 1
        step, layer, page = (int(columns[name][at]) for name in ("step", "layer", "page"))
        problem = "given twice" if gaps[at - 1] == 0 else "out of order"
        raise ResultError(f"a move is {problem}: step {step}, layer {layer}, page {page}", where=where, hint=AGAIN)
