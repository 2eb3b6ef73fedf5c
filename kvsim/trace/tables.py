"""The small tables of a trace: one line per request, one line per decode step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from kvsim.errors import TraceError


def request_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Columns are all names that any request has; null where one has none."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    typed = {"request": pa.int32(), "prompt_len": pa.int32(), "n_steps": pa.int32(), "tokens": pa.list_(pa.int32())}
    columns = [pa.array([row.get(name) for row in rows], typed.get(name)) for name in names]
    return pa.table(columns, names=names)


def step_tables(steps: Mapping[int, Mapping[str, Any]], lengths: Mapping[int, int]) -> list[pa.Table]:
    """One table per request, in the order of their numbers, all with the same columns."""
    tables = [_step_table(request, lengths.get(request), steps[request]) for request in sorted(steps)]
    schema = pa.unify_schemas([t.schema for t in tables], promote_options="permissive")
    return [_conform(t, schema) for t in tables]


def _step_table(request: int, n_steps: int | None, columns: Mapping[str, Any]) -> pa.Table:
    if n_steps is None or any(len(column) != n_steps for column in columns.values()):
        lengths = sorted({len(column) for column in columns.values()})
        raise TraceError(f"request {request}: step columns of {lengths} lines for {n_steps} decode steps")
    need = {"need": pa.list_(pa.int32())}
    keys = {"request": np.full(n_steps, request, np.int32), "step": np.arange(1, n_steps + 1, dtype=np.int32)}
    arrays = {name: pa.array(column, need.get(name)) for name, column in (keys | dict(columns)).items()}
    return pa.table(arrays)


def _conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with all columns of `schema`, nulls where it has none."""
    columns = [
        table.column(f.name).cast(f.type) if f.name in table.column_names else pa.nulls(table.num_rows, f.type)
        for f in schema
    ]
    return pa.table(columns, schema=schema)
