"""What a measured row says was done, and how long it took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvsim.errors import ConfigError
from kvsim.machine import ModelShape

IMPLS = ("executor", "hf-decode", "hf-prefill", "hf-offloaded")
PHASES = ("resident", "offload", "ssd")  # of the rows that are predicted
_KINDS = {"number": (int, float), "text": (str,), "table": (dict,), "list": (list,)}
_SIZES = ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "value_bytes")


@dataclass(frozen=True, eq=False)
class Case:
    """One measured point. Arrays over layers are float64 [layers]; pages are those of all KV heads of a layer.

    `seconds`: samples of a step; `layer_end_s`: medians since the start of a step, nan where they were not measured.
    `host_pages`, `ssd_pages`: fetched per step; `copies`: to the GPU; `stored_pages`: written back. `whole`: the step
    was submitted in one piece.
    """

    key: str
    impl: str
    shape: ModelShape
    sequences: int
    context: int
    seconds: np.ndarray
    layer_end_s: np.ndarray
    page: int
    tier: str | None
    method: str
    known: str
    depth: int
    resident: float
    clustered: bool | None
    host_pages: np.ndarray
    ssd_pages: np.ndarray
    copies: np.ndarray
    stored_pages: np.ndarray
    plan: str | None
    policy: str | None
    whole: bool

    @property
    def device(self) -> str:
        """The slug of its device."""
        return self.key.partition("/")[0]

    @property
    def in_line(self) -> bool:
        """Does one thread submit the kernels and run them, as on a CPU?"""
        return self.device == "cpu" or self.device.startswith("cpu-")

    @property
    def median_s(self) -> float:
        return float(np.median(self.seconds))

    @property
    def spread_s(self) -> tuple[float, float]:
        """p10 and p90 of the samples."""
        low, high = np.quantile(self.seconds, [0.1, 0.9]).tolist()
        return low, high

    @property
    def noise(self) -> float:
        """(p90 - p10) / median of the samples."""
        low, high = self.spread_s
        return (high - low) / self.median_s

    @property
    def moves(self) -> bool:
        """Does a step fetch anything?"""
        return bool(self.host_pages.any() or self.ssd_pages.any())

    @property
    def page_bytes(self) -> float:
        return self.page * self.shape.kv_token_bytes

    @property
    def kv_bytes(self) -> float:
        """Bytes of keys and values of one layer."""
        return self.sequences * self.context * self.shape.kv_token_bytes

    @property
    def work(self) -> tuple[Any, ...]:
        """What is computed; cases that share it may be compared with each other."""
        return self.impl, self.shape, self.sequences, self.context

    @property
    def series(self) -> tuple[Any, ...]:
        """What cases have in common that differ in their resident share alone."""
        return *self.work, self.tier, self.method, self.known, self.depth, self.clustered


def cases(rows: Iterable[Mapping[str, Any]]) -> list[Case]:
    """The cases among measured rows: those of executor and framework steps that did not fail.

    Raises ConfigError, naming the row, where one does not say what was done.
    """
    return [case_of(row) for row in rows if row["phase"] in PHASES and "error" not in row]


def case_of(row: Mapping[str, Any]) -> Case:
    """The case of one row. Raises ConfigError, naming the row, for parameters that are missing or make no sense."""
    p = _Parameters(row)
    impl = p.one_of("impl", IMPLS)
    sizes = p.get("shape", "table")
    if set(sizes) != set(_SIZES) or not all(_is_number(v) and v > 0 for v in sizes.values()):
        raise p.wrong("shape", f"a shape has the positive numbers {', '.join(_SIZES)}")
    shape = ModelShape(p.get("model", "text"), **sizes, kv_bytes=sizes["value_bytes"])
    moved = impl == "executor"
    fetched, copies = (p.per_layer(name, shape.layers, required=moved) for name in ("fetched_pages", "copies"))
    ssd = p.per_layer("ssd_pages", shape.layers)
    ends = np.array(row.get("layer_ms") or [np.nan] * shape.layers) * 1e-3
    if len(ends) != shape.layers:
        raise ConfigError(f"layer_ms of {len(ends)} layers, the model has {shape.layers}", where=p.where)
    return Case(
        key=row["key"],
        impl=impl,
        shape=shape,
        sequences=int(p.positive("sequences")),
        context=int(p.positive("context")),
        seconds=np.array(row["ms"]) * 1e-3,
        layer_end_s=ends,
        page=int(p.positive("page")) if moved else 1,
        tier=p.get("tier", "text", None),
        method=p.one_of("method", ("runs", "page"), "runs"),
        known=p.one_of("known", ("start", "layer"), "start"),
        depth=int(p.positive("depth", 1)),
        resident=float(p.get("resident", "number", 1.0)),
        clustered=p.values.get("clustered"),
        host_pages=fetched - ssd,
        ssd_pages=ssd,
        copies=copies,
        stored_pages=p.per_layer("stored_pages", shape.layers),
        plan=p.get("plan", "text", None),
        policy=p.get("policy", "text", None),
        whole=p.values.get("graph") == "step",
    )


_REQUIRED = object()


class _Parameters:
    """The parameters of a row, with errors that name it."""

    def __init__(self, row: Mapping[str, Any]):
        self.values, self.where = row["params"], f'the row "{row["key"]}"'

    def wrong(self, name: str, hint: str) -> ConfigError:
        value = self.values.get(name, "missing")
        return ConfigError(f'parameter "{name}" is {value!r}', where=self.where, hint=hint)

    def get(self, name: str, kind: str, default: Any = _REQUIRED) -> Any:
        value = self.values.get(name)
        if value is None and default is not _REQUIRED:
            return default
        if not isinstance(value, _KINDS[kind]) or isinstance(value, bool):
            raise self.wrong(name, f"it must be a {kind}")
        return value

    def one_of(self, name: str, choices: tuple[str, ...], default: Any = _REQUIRED) -> str:
        value = self.get(name, "text", default)
        if value not in choices:
            raise self.wrong(name, f"use one of {', '.join(choices)}")
        return value

    def positive(self, name: str, default: Any = _REQUIRED) -> float:
        value = self.get(name, "number", default)
        if not value >= 1:
            raise self.wrong(name, "it counts from 1")
        return value

    def per_layer(self, name: str, layers: int, required: bool = False) -> np.ndarray:
        """Numbers of 0 or more, one per layer; zeros where the row has none."""
        values = self.get(name, "list", _REQUIRED if required else [0.0] * layers)
        if len(values) != layers or not all(_is_number(v) and v >= 0 for v in values):
            raise self.wrong(name, f"it must be a list of {layers} numbers, one per layer")
        return np.array(values, float)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
