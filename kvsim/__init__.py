"""kvsim: a trace-driven simulator of KV-cache management.

The public names below load what they need on first use, so that `import kvsim` stays light.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "open_trace": "kvsim.trace",
    "Trace": "kvsim.trace.access",
    "run": "kvsim.simulate",
    "compare": "kvsim.report",
    "curve": "kvsim.curves",
    "sweep": "kvsim.sweeps",
    "open_results": "kvsim.sweeps",
    "plot": "kvsim.figures",
    "policy": "kvsim.registry",
    "offload": "kvsim.registry",
    "keep": "kvsim.cache.view",
    "exp": "kvsim.cache.elementwise",
    "KvsimError": "kvsim.errors",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kvsim' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
