"""A trace in another form: one Parquet line per stored weight (`export`), or a trace directory (`save`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kvsim.errors import TraceError
from kvsim.trace.access import Source, Trace
from kvsim.trace.format import TraceWriter
from kvsim.trace.layout import writing

SCHEMA = pa.schema(
    [
        ("request", pa.int32()),
        ("step", pa.int32()),
        ("layer", pa.int16()),
        ("head", pa.int16()),
        ("position", pa.int32()),
        ("weight", pa.float32()),
    ]
)
GROUP_LINES = 1 << 20


def export(trace: Trace, path: str | os.PathLike) -> int:
    """Write the stored weights of all decode rows to one Parquet file; returns the number of lines.

    Same columns and lines as `trace.to_pandas()`, one step and a row group in memory at a time. The
    residual of a row, spread over the positions not stored when a trace is replayed, is not written.
    """
    path = Path(path)
    if path.exists():
        raise TraceError("the output exists already", where=str(path), hint="remove it or choose another name")
    partial = path.with_name(path.name + ".partial")
    try:
        with writing(path):
            lines = _write(trace, partial)
            os.rename(partial, path)
    finally:
        if partial.is_file():
            partial.unlink()
    return lines


def _write(trace: Trace, path: Path) -> int:
    pending: list[tuple[np.ndarray, ...]] = []
    waiting = lines = 0
    with pq.ParquetWriter(
        path, SCHEMA, compression="zstd", use_dictionary=["request", "step", "layer", "head"]
    ) as file:

        def flush() -> None:
            if pending:
                columns = [np.concatenate(parts) for parts in zip(*pending, strict=True)]
                arrays = [pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)]
                file.write_table(pa.table(arrays, schema=SCHEMA), row_group_size=len(columns[0]))
            pending.clear()

        for source in trace.sources:
            for step, layer, head, position, weight in source.entries():
                pending.append(
                    (np.full(layer.size, source.id), np.full(layer.size, step), layer, head, position, weight)
                )
                waiting, lines = waiting + layer.size, lines + layer.size
                if waiting >= GROUP_LINES:
                    flush()
                    waiting = 0
        flush()
    return lines


def save(trace: Trace, path: str | os.PathLike, *, manifest: Mapping[str, Any] | None = None, **encoding: Any) -> None:
    """Write any trace, a synthetic one for instance, as a trace directory; `encoding` as in TraceWriter.

    Of the facts only "tokens" and "need" are kept, and neither q, k and v nor spans. Token ids that are not known are
    written as 0.
    """
    g = trace.geometry
    model = {
        name: getattr(g, name) for name in ("name", "group", "head_dim", "kv_bytes", "hidden", "intermediate", "vocab")
    }
    with TraceWriter(
        path, layers=g.layers, kv_heads=g.kv_heads, manifest={"model": model, **(manifest or {})}, **encoding
    ) as writer:
        for source in trace.sources:
            _save(writer, source, g.layers)


def _save(writer: TraceWriter, source: Source, layers: int) -> None:
    stats, prompt, steps = source.prompt(), source.prompt_tokens, source.output_tokens
    for layer in range(layers):
        squares, largest = (None if a is None else a[layer] for a in (stats.colsq, stats.colmax))
        writer.prompt(source.id, layer, stats.colsum[layer], squares, largest)
    kept = len(stats.rows)
    for i in range(kept):
        for layer in range(layers):
            lo = int(stats.kv_lo[i, layer])
            writer.row(source.id, i - kept, layer, lo, stats.rows[i, layer, :, lo : prompt - kept + i + 1])
    for t in source.token_rows():
        for layer in range(layers):
            lo = int(t.kv_lo[layer])
            writer.row(source.id, t.step, layer, lo, t.row[layer, :, lo : t.kv_hi])
    if "need" in source.facts:
        writer.steps(source.id, {"need": source.facts["need"]})
    tokens = source.facts.get("tokens", np.zeros(prompt + steps, np.int32))
    writer.finish_request(source.id, tokens=tokens, prompt_len=prompt, n_steps=steps)
