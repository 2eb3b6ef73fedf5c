"""Attention traces: what they are (`access`), their files (`format`, `reader`), made-up ones (`synthetic`).

Names are loaded on first use: pyarrow and numba come in only with a file.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Access": "access",
    "DenseSource": "access",
    "Geometry": "access",
    "Prompt": "access",
    "PromptRows": "access",
    "Request": "access",
    "Source": "access",
    "TokenRow": "access",
    "Trace": "access",
    "dense_trace": "access",
    "TraceWriter": "format",
    "open_trace": "reader",
    "synthetic_trace": "synthetic",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
