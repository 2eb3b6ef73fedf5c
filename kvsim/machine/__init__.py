"""The clock: what an iteration costs on a GPU with a host link and an SSD.

`hardware` and `compute` are arithmetic and load no SimPy, so measuring code may use them where only NumPy
is installed; `Machine` is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvsim.machine.compute import SHAPES, ModelShape, shape_from_config, shape_from_geometry
from kvsim.machine.hardware import Constant, Hardware
from kvsim.machine.work import Record, Work

if TYPE_CHECKING:
    from kvsim.machine.pipeline import Machine

__all__ = [
    "SHAPES",
    "Constant",
    "Hardware",
    "Machine",
    "ModelShape",
    "Record",
    "Work",
    "shape_from_config",
    "shape_from_geometry",
]


def __getattr__(name: str) -> Any:
    if name == "Machine":
        from kvsim.machine.pipeline import Machine

        return Machine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
