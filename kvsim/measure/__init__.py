"""What touches real models and real hardware: capture, calibration, the executor.

Importing this package loads neither torch nor transformers; each module loads what it needs when it runs.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from kvsim.errors import ConfigError


class CaptureError(ConfigError):
    """A model, or the way it is run, whose attention cannot be captured rightly."""


def require(name: str) -> ModuleType:
    """The module `name`, or a ConfigError that names the extra which installs it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name is None or e.name.split(".")[0] != name.split(".")[0]:
            raise  # installed but broken: the original error says more
        raise ConfigError(f"this needs {name}, which is not installed", hint='pip install "kvsim[capture]"') from e
