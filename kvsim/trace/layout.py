"""The file format `kvsim-attention-trace`: a directory of Parquet files and a manifest.

    manifest.json            model, capture settings, sizes and hashes of the files, fingerprint
    attn-<request>.parquet   one line per (step, layer): the kept weights of every KV head
    prefill.parquet          one line per (request, layer, head): prompt statistics
    requests.parquet         one line per request
    steps.parquet            optional, one line per decode step: token, logprob, step_us, need, ...
    vectors-<request>.parquet  optional: q and k as attention receives them, v; float16

Steps below zero are the last prompt rows (-1 belongs to the last prompt token); decode step t >= 1 is the
one whose query is token prompt + t - 1, so its `kv_hi` is prompt + t. Positions count the request's own
tokens, padding removed. The directory appears under its name only once it is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kvsim.errors import TraceError

FORMAT = "kvsim-attention-trace"
VERSION = "2.0"  # readers refuse another major number and ignore columns they do not know
GROUP_BYTES = 8 << 20  # of one row group, uncompressed; a reader holds one
VECTOR_TOKENS = 512  # tokens per line of a vectors file
KEYS = ("request", "step", "layer", "kv_lo", "kv_hi")
TIMES = "step_us"  # how the names of columns of steps.parquet end that hold times

PARQUET = {
    "compression": "zstd",
    "compression_level": 3,
    "write_statistics": ["request", "step", "layer"],
    "write_page_checksum": True,  # damage is met as an error, not as other weights
}


def attention_schema(heads: int, lossless: bool, with_max: bool, meta: Mapping[str, Any]) -> pa.Schema:
    """Columns of `attn-*.parquet`. Per-head columns are fixed binary: little-endian u32, f16, f32."""
    fields = [(key, pa.int16() if key == "layer" else pa.int32()) for key in KEYS]
    blobs = planes(lossless, with_max)
    if not lossless:
        fields += [("n", pa.binary(4 * heads)), ("mass", pa.binary(2 * heads))]
    columns = [pa.field(name, kind, nullable=False) for name, kind in fields]
    columns.append(pa.field("sink", pa.binary(4 * heads)))  # null where the model has no learned sinks
    columns += [pa.field(name, pa.binary(), nullable=False) for name in blobs]
    return pa.schema(columns, metadata={"kvsim": json.dumps(meta, sort_keys=True)})


def planes(lossless: bool, with_max: bool) -> dict[str, Any]:
    """Names and element types of the blob columns; heads lie one after another in a blob."""
    if lossless:
        return {"w32": np.float32} | ({"max32": np.float32} if with_max else {})
    names = ("gap_lo", "gap_hi", "w", "dmax") if with_max else ("gap_lo", "gap_hi", "w")
    return dict.fromkeys(names, np.uint8)


def attention_name(request: int) -> str:
    return f"attn-{request}.parquet"


def spans_name(request: int) -> str:
    return f"spans-{request}.parquet"


def vectors_name(request: int) -> str:
    return f"vectors-{request}.parquet"


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk or a forbidden place into a TraceError."""
    try:
        yield
    except OSError as error:
        raise TraceError(
            f"cannot write the trace: {os.strerror(error.errno) if error.errno else error}",
            where=str(path),
            hint="free some space or choose another place; nothing was left under the final name",
        ) from error
