"""The files of a trace, opened with suspicion: manifest, geometry, Parquet. What is wrong is a TraceError."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kvsim import threads
from kvsim.errors import TraceError
from kvsim.trace.access import Geometry
from kvsim.trace.layout import FORMAT, TIMES, VERSION

MANIFEST = "manifest.json"
STEPS = "steps.parquet"
AGAIN = "capture it again, or copy it again from where it came"


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, once its format, version and the sizes of all files are as they must be."""
    if not (path / MANIFEST).is_file():
        what = "not a trace: it holds no manifest.json" if path.is_dir() else "no such trace"
        raise TraceError(what, where=str(path), hint="a trace is a .kvtrace directory, written by kvsim capture")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        name, major = manifest["format"], int(str(manifest["version"]).split(".")[0])
        files, lanes = manifest["files"], (int(manifest["layers"]), int(manifest["kv_heads"]))
        _ = (
            manifest["fingerprint"],
            manifest["encoding"]["keep"],
            [entry["bytes"] for entry in files.values()],
        )  # are there
        if min(lanes) < 1:
            raise ValueError(f"{lanes[0]} layers of {lanes[1]} KV heads")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TraceError(f"the manifest cannot be read: {error!r}", where=str(path / MANIFEST), hint=AGAIN) from error
    if name != FORMAT:
        raise TraceError(f'the format is "{name}"', where=str(path / MANIFEST), hint=f'kvsim reads "{FORMAT}"')
    if major != int(VERSION.split(".")[0]):
        newer = major > int(VERSION.split(".")[0])
        age = "newer" if newer else "older"
        raise TraceError(
            f"format version {manifest['version']} is {age} than this kvsim reads ({VERSION})",
            where=str(path / MANIFEST),
            hint="update kvsim" if newer else "capture it again: smaller weights are kept now",
        )
    for file, entry in files.items():
        size = (path / file).stat().st_size if (path / file).is_file() else None
        if size != entry["bytes"]:
            what = "the file is missing" if size is None else f"{size} bytes, the manifest says {entry['bytes']}"
            raise TraceError(what, where=str(path / file), hint=AGAIN)
    return manifest


def fingerprint(path: Path, hashes: Mapping[str, str]) -> str:
    """SHA-256 over the names and hashes of a trace's files. What counts of steps.parquet is what its columns hold, but
    for the step times: a clock is not content. Raises TraceError where it cannot be read.
    """
    known = {**hashes, STEPS: _columns_hash(path / STEPS)} if STEPS in hashes else hashes
    return hashlib.sha256("".join(f"{name} {known[name]}\n" for name in sorted(known)).encode()).hexdigest()


def _columns_hash(path: Path) -> str:
    table, digest = read_table(path, ()), hashlib.sha256()
    for name in sorted(name for name in table.column_names if not name.endswith(TIMES)):
        column = table.column(name)
        digest.update(f"{name} {column.type} {column.to_pylist()!r}\n".encode())
    return digest.hexdigest()


def geometry(manifest: Mapping[str, Any]) -> Geometry:
    """The model's shape from `manifest["model"]`: Geometry's field names, or those of a Hugging Face config.

    With `heads = "query"` a lane is a query head and owns its share of the KV head's bytes.
    """
    model = manifest.get("model") or {}
    known = {**(model.get("config") or {}), **model} if isinstance(model, Mapping) else {}

    def first(*names: str, default: Any) -> Any:
        return next((known[name] for name in names if known.get(name) is not None), default)

    lanes = manifest["kv_heads"]
    query_heads = first("num_attention_heads", "query_heads", default=lanes)
    hidden = first("hidden", "hidden_size", default=0)
    kv_heads = first("kv_heads", "num_key_value_heads", default=query_heads)
    group = first("group", default=max(query_heads // kv_heads, 1))
    by_query = manifest.get("heads") == "query"
    width = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0}
    kv_bytes = first("kv_bytes", default=width.get(str(first("cache_dtype", default="")).removeprefix("torch."), 2.0))
    return Geometry(
        layers=manifest["layers"],
        kv_heads=lanes,
        group=1 if by_query else group,
        head_dim=first("head_dim", default=hidden // query_heads or 64),
        kv_bytes=kv_bytes / group if by_query else kv_bytes,
        hidden=hidden,
        intermediate=first("intermediate", "intermediate_size", default=0),
        vocab=first("vocab", "vocab_size", default=0),
        name=str(first("name", default=manifest.get("name", "unnamed"))),
    )


def open_parquet(path: Path, columns: tuple[str, ...]) -> pq.ParquetFile:
    """The Parquet file, once it is known to be one and to hold `columns`."""
    try:
        file = pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise TraceError(f"not a readable Parquet file: {_first_line(error)}", where=str(path), hint=AGAIN) from error
    if missing := [name for name in columns if name not in file.schema_arrow.names]:
        found = ", ".join(file.schema_arrow.names)
        raise TraceError(f'the column "{missing[0]}" is missing', where=str(path), hint=f"the file holds {found}"[:200])
    return file


def read_table(path: Path, columns: tuple[str, ...], request: int | None = None) -> pa.Table:
    """All lines of a small file, or those of one request."""
    with open_parquet(path, columns) as file:
        groups = [i for i in range(file.num_row_groups) if request is None or _may_hold(file, i, request)]
        table = read_groups(file, path, groups)
    if request is None:
        return table
    # In plain Python: pyarrow's compute functions import pandas, for which a first look need not wait.
    lines = [i for i, held in enumerate(table.column("request").to_pylist()) if held == request]
    if not lines or lines[-1] - lines[0] + 1 == len(lines):
        return table.slice(lines[0] if lines else 0, len(lines))
    return pa.concat_tables([table.slice(i, 1) for i in lines])


def _may_hold(file: pq.ParquetFile, group: int, request: int) -> bool:
    stats = file.metadata.row_group(group).column(file.schema_arrow.names.index("request")).statistics
    return stats is None or not stats.has_min_max or stats.min <= request <= stats.max


def read_groups(
    file: pq.ParquetFile, path: Path, groups: Sequence[int], columns: Sequence[str] | None = None
) -> pa.Table:
    """Some row groups; what Parquet says about a corrupt one becomes a TraceError."""
    try:
        return file.read_row_groups(groups, columns=columns and list(columns), use_threads=threads.cores() > 1)
    except (OSError, pa.ArrowException) as error:
        raise TraceError(f"the rows cannot be read: {_first_line(error)}", where=str(path), hint=AGAIN) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:160]


def group_steps(file: pq.ParquetFile, path: Path) -> list[tuple[int, int]]:
    """First and last step of each row group, from the statistics in the file's footer."""
    index = file.schema_arrow.names.index("step")
    spans = []
    for i in range(file.num_row_groups):
        stats = file.metadata.row_group(i).column(index).statistics
        if stats is None or not stats.has_min_max:
            raise TraceError("the column step has no statistics", where=str(path), hint="kvsim capture writes them")
        spans.append((stats.min, stats.max))
    return spans
