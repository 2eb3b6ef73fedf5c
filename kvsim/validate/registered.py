"""Predictions that were written down before anything was measured, and how far off they were.

A file of them is JSON: per device the hardware file they come from, the milliseconds of every row by group, and why
the other rows have none. It is committed before the rows; its hash says that it has not changed since.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from kvsim.errors import ConfigError
from kvsim.measure.rows import Row, device_of
from kvsim.results import file_beside
from kvsim.validate.judge import Judged

FORMAT, VERSION = "kvsim-registered-predictions", 1
REGISTERED = "registered"  # the predictor's name beside those of `judge`


@dataclass(frozen=True)
class Registered:
    """What one device's rows should take, in milliseconds: `groups` by group and by key behind the device.

    `hardware`: name and SHA-256 of the file they were predicted from; `split`: the split's fingerprint; `reasons`: why
    rows whose keys match a glob have no prediction.
    """

    device: str
    hardware: Mapping[str, str]
    split: str
    groups: Mapping[str, Mapping[str, float]]
    reasons: Mapping[str, str]
    by_key: Mapping[str, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_key", {k: ms for members in self.groups.values() for k, ms in members.items()})

    def ms(self, key: str) -> float | None:
        """The prediction of a row, by its whole key."""
        return self.by_key.get(key.partition("/")[2])

    def reason(self, key: str) -> str | None:
        """Why a row without prediction has none; nothing where it should have one."""
        point = key.partition("/")[2]
        return next((why for glob, why in self.reasons.items() if fnmatchcase(point, glob)), None)

    def check_complete(self, rows: Iterable[Row]) -> None:
        """Raise ConfigError for rows that have neither a prediction nor a reason: the campaign is not the registered
        one."""
        lost = [row["key"] for row in rows if self.ms(row["key"]) is None and self.reason(row["key"]) is None]
        if lost:
            what = f"{len(lost)} measured rows have no registered prediction and no reason for that, {lost[0]} first"
            hint = "judge them by a split and a registration of their own, written before they are measured"
            raise ConfigError(what, where=f"the predictions registered for {self.device}", hint=hint)

    def outcomes(self, rows: Iterable[Row]) -> list[Outcome]:
        """What came of each group that was registered, in the order of the file."""
        measured = {row["key"].partition("/")[2]: float(np.median(row["ms"])) for row in rows if "ms" in row}
        return [Outcome.of(name, members, measured) for name, members in self.groups.items()]

    def judged(self, row: Judged) -> Judged:
        """The row with what was registered among its predictions, and so its twin; nan where nothing was."""
        ms = self.ms(row.case.key)
        seconds = {**row.seconds, REGISTERED: float("nan") if ms is None else 1e-3 * ms}
        return replace(row, seconds=seconds, twin=self.judged(row.twin) if row.twin else None)


@dataclass(frozen=True)
class Outcome:
    """Relative errors of what was registered for a group: `n` of `registered` rows were measured. nan: none was."""

    group: str
    registered: int
    n: int
    mape: float
    p90: float
    worst: float
    signed: float

    @classmethod
    def of(cls, group: str, predicted: Mapping[str, float], measured: Mapping[str, float]) -> Outcome:
        error = np.array([ms / measured[key] - 1.0 for key, ms in predicted.items() if key in measured])
        size = np.abs(error)
        found = (size.mean(), np.quantile(size, 0.9), size.max(), error.mean()) if len(size) else (np.nan,) * 4
        return cls(group, len(predicted), len(size), *map(float, found))


@dataclass(frozen=True)
class Registration:
    """All that is registered, by device."""

    devices: Mapping[str, Registered]

    def of(self, device: str) -> Registered | None:
        """What is registered for a device."""
        return self.devices.get(device)

    def of_rows(self, rows: Sequence[Row]) -> Registered | None:
        """What is registered for the device of some rows. Raises ConfigError as `Registered.check_complete`."""
        found = self.of(device_of(rows))
        if found is not None:
            found.check_complete(rows)
        return found

    def save(self, path: Path) -> None:
        """Write the file: the same predictions give the same bytes."""
        table = {"format": FORMAT, "version": VERSION, "unit": "ms", "devices": dict(self._tables())}
        with file_beside(path) as partial:
            partial.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    def _tables(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for device, entry in self.devices.items():
            table = asdict(entry)
            yield device, {name: table[name] for name in ("hardware", "split", "groups", "reasons")}


def read_registration(path: Path) -> Registration:
    """Raises ConfigError for a file that is not there, or is none."""
    hint = "python -m experiments.gpu_predictions writes it"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if (table["format"], table["version"]) != (FORMAT, VERSION):
            raise ValueError
        devices = {device: Registered(device, **entry) for device, entry in table["devices"].items()}
    except OSError as error:
        raise ConfigError(f"cannot read: {error.strerror}", where=str(path), hint=hint) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError("this is no file of registered predictions", where=str(path), hint=hint) from None
    return Registration(devices)
