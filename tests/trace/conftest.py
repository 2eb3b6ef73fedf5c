"""Small traces on disk, and ways to damage them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvsim.trace.export import save
from kvsim.trace.files import fingerprint
from kvsim.trace.layout import file_hash
from kvsim.trace.synthetic import synthetic_trace


@pytest.fixture(scope="session")
def memory():
    return synthetic_trace(requests=2, prompt=24, steps=40, layers=2, kv_heads=3, seed=3)


@pytest.fixture(scope="session")
def _stored(memory, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("traces")
    save(memory, folder / "lossy.kvtrace", keep=0.99, min_keep=8)
    save(memory, folder / "whole.kvtrace", lossless=True)
    return {"lossy": folder / "lossy.kvtrace", "whole": folder / "whole.kvtrace"}


@pytest.fixture
def lossy(_stored, tmp_path) -> Path:
    """A fresh copy of the sparse trace."""
    return Path(shutil.copytree(_stored["lossy"], tmp_path / "lossy.kvtrace"))


@pytest.fixture
def whole(_stored, tmp_path) -> Path:
    """A fresh copy of the lossless trace."""
    return Path(shutil.copytree(_stored["whole"], tmp_path / "whole.kvtrace"))


def relabel(trace: Path) -> None:
    """Let the manifest agree with the files again, so that only their content is wrong."""
    manifest = json.loads((trace / "manifest.json").read_text())
    names = [name for name in manifest["files"] if (trace / name).exists()]
    hashes = {name: file_hash(trace / name) for name in names}
    manifest["files"] = {n: {"bytes": (trace / n).stat().st_size, "sha256": hashes[n]} for n in names}
    manifest["fingerprint"] = fingerprint(trace, hashes)
    (trace / "manifest.json").write_text(json.dumps(manifest))


def edit_manifest(trace: Path, **changes: Any) -> None:
    manifest = json.loads((trace / "manifest.json").read_text())
    (trace / "manifest.json").write_text(json.dumps(manifest | changes))


def rewrite(trace: Path, name: str, change: Callable[[dict[str, list]], Mapping[str, list] | None]) -> None:
    """Rewrite one Parquet file with other values in its columns."""
    table = pq.read_table(trace / name)
    columns = {key: table.column(key).to_pylist() for key in table.column_names}
    columns = change(columns) or columns
    arrays = {key: pa.array(values, table.schema.field(key).type) for key, values in columns.items()}
    pq.write_table(pa.table(arrays), trace / name)
    relabel(trace)


def replay(trace) -> None:
    """Everything a run reads."""
    for request in trace.requests():
        for _ in request.accesses():
            pass


def softmax_rows(rng: np.random.Generator, heads: int, size: int, spread: float = 3.0) -> np.ndarray:
    z = np.exp(rng.normal(0, spread, (heads, size)))
    return (z / z.sum(1, keepdims=True)).astype(np.float32)
