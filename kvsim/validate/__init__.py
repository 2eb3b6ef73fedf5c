"""Predicted against measured: how wrong the clock is, on rows and runs that no fit has seen.

`validate_rows` judges measured rows that a split file holds out; `validate_trace` compares the steps a captured run
really took with their simulation. Read `predict` for what is simulated, `judge` for the metrics.
"""

from __future__ import annotations

from kvsim.validate.rows import Validation, validate_rows
from kvsim.validate.split import Split, read_split
from kvsim.validate.twin import TwinValidation, validate_trace

__all__ = ["Split", "TwinValidation", "Validation", "read_split", "validate_rows", "validate_trace"]
