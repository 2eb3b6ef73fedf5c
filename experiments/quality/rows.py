"""Rows of points: one JSON object per line, of `python -m experiments.quality run` or of the GPU campaign."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvsim.errors import ConfigError

Row = dict[str, Any]
PHASE = "closed-loop"  # of the campaign, whose rows hold ours as their parameters
NEEDED = ("key", "device", "model", "weights", "policy", "budget", "closed", "open")


def read(paths: Iterable[Path]) -> list[Row]:
    """The points in these files, in order, each device's and key's first. A last line that was cut off is left out.

    Raises ConfigError, naming file and line, for what is no row.
    """
    found: dict[tuple[str, str], Row] = {}
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read rows: {error}", where=str(path)) from None
        for number, line in enumerate(text.splitlines()[: text.count("\n")], 1):
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"not a JSON line: {error.msg}", where=where) from None
            if not isinstance(row, dict):
                raise ConfigError("not a row", where=where)
            if "phase" in row:
                if row["phase"] != PHASE or "error" in row:
                    continue
                row = row["params"]
            if missing := [name for name in NEEDED if name not in row]:
                raise ConfigError(f'not a row of a closed loop: "{missing[0]}" is missing', where=where)
            found.setdefault((row["device"], row["key"]), row)
    return list(found.values())
