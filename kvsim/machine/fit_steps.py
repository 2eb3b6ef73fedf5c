"""What whole steps show better than their pieces do: gaps, the end of a step, eager frameworks.

Rows are those of `kvsim.measure.rows`. A constant is what is left of a measured step when the machine, as far as its
pieces are known, has explained its part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kvsim.machine import fit_moves as moves
from kvsim.machine.compute import ModelShape, head_seconds, layer_seconds
from kvsim.machine.fit_rows import Columns, Found, Part, Row, median, middle, samples
from kvsim.machine.hardware import Hardware


def step_parts(rows: Sequence[Row], hardware: Hardware, in_line: bool) -> Iterator[Part]:
    """What whole steps take beside what `hardware` knows of them.

    `in_line`: the thread that submits a kernel also runs it, so that an eager framework's own time adds to the compute.
    """
    yield from _gaps(rows)
    yield from _ends(rows, hardware)
    yield from _eager(rows, hardware, in_line)


def _gaps(rows: Sequence[Row]) -> Iterator[Part]:
    steps = _executor(rows, "resident")
    whole = {_point(r): r for r in steps if r["params"].get("graph") == "step"}
    if pairs := [(r, whole[_point(r)]) for r in _by_layer(steps) if _point(r) in whole]:
        gaps = [(median(a, "gpu_ms") - median(b, "gpu_ms")) / a["params"]["shape"]["layers"] for a, b in pairs]
        how = "resident steps with a launch per layer, less those in one launch"
        yield Part(how, {"x": np.array(gaps)}, middle("gpu.layer_gap"))


def _ends(rows: Sequence[Row], hardware: Hardware) -> Iterator[Part]:
    if layered := _by_layer(_executor(rows, "resident")):
        rest = [median(r) - 1e-3 * r["layer_ms"][-1] - _head(hardware, r["params"]) for r in layered]
        how = "resident steps, from the end of the last layer, less the head's matrix product"
        yield Part(how, {"x": np.array(rest)}, middle("gpu.step_sync"))


def _eager(rows: Sequence[Row], hardware: Hardware, in_line: bool) -> Iterator[Part]:
    """A step of transformers over its layers.

    On a GPU the shortest one is bound by submission. In line, sizes tell a fixed part from the passes over the cache.
    """

    def per_layer(row: Row) -> np.ndarray:
        return 1e-3 * np.array(row["ms"]) / row["params"]["shape"]["layers"]

    steps = [r for r in rows if r["params"].get("impl") == "hf-decode"]
    if steps and not in_line:
        least = min(steps, key=lambda r: r["params"]["sequences"] * r["params"]["context"])
        how = "step of transformers over its layers, shortest context"
        yield Part(how, samples([least], per_layer), middle("cpu.eager_submit"))
    if not in_line or len(steps) < 2:
        return
    pass_s = np.array([_cache(r["params"]) / hardware.gpu.kv_bandwidth for r in steps])
    known = np.array([_compute(hardware, r["params"], 0.0) + _share(hardware, r["params"]) for r in steps])
    measured = np.array([float(np.median(per_layer(r))) for r in steps])

    def find(c: Columns) -> Found:
        each, passes = moves.robust_terms([np.ones(len(c["pass"])), c["pass"]], np.maximum(c["rest"], 1e-9))
        return {"cpu.eager_submit": float(each), "gpu.eager_kv_passes": float(passes)}

    columns = {"pass": pass_s, "rest": measured - known}
    yield Part(
        "steps of transformers over their layers, less matrix products: fixed + passes over the cache", columns, find
    )


def _executor(rows: Sequence[Row], phase: str) -> list[Row]:
    return [r for r in rows if r["params"].get("impl") == "executor" and r["phase"] == phase]


def _by_layer(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if r["params"].get("graph") == "layer"]


def _point(row: Row) -> tuple:
    return tuple(row["params"][name] for name in ("model", "sequences", "context"))


def _cache(p: dict[str, Any]) -> float:
    """Bytes of a layer's keys and values."""
    return p["context"] * p["sequences"] * _shape(p).kv_token_bytes


def _compute(hardware: Hardware, p: dict[str, Any], passes: float) -> float:
    kv = np.array([_cache(p)])
    return float(layer_seconds(hardware.gpu, _shape(p), p["sequences"], p["sequences"], False, kv, passes)[0])


def _share(hardware: Hardware, p: dict[str, Any]) -> float:
    """A layer's share of the head."""
    return _head(hardware, p) / p["shape"]["layers"]


def _head(hardware: Hardware, p: dict[str, Any]) -> float:
    """Seconds of the vocabulary's matrix product."""
    return float(head_seconds(replace(hardware.gpu, step_sync=0.0), _shape(p), p["sequences"]))


def _shape(p: dict[str, Any]) -> ModelShape:
    return ModelShape(p["model"], **p["shape"], kv_bytes=p["shape"]["value_bytes"])
