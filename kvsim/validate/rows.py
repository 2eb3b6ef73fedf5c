"""`validate_rows`: measured rows that no fit has seen, against what a hardware file says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvsim import __version__
from kvsim.errors import ConfigError
from kvsim.machine import Hardware
from kvsim.measure.machine_info import slug
from kvsim.measure.rows import DRIFT, Row, device_of, drifts, read_rows
from kvsim.results import digest
from kvsim.trace.layout import file_hash
from kvsim.validate.cases import cases
from kvsim.validate.judge import PREDICTORS, Judged, Summary, judge, summarise
from kvsim.validate.predict import peaks
from kvsim.validate.split import Split, read_split

ALL = "all held out"  # the group of every row, where there are several
JUDGED = ("resident", "offload", "ssd")  # phases whose rows a split has to place
_VERSIONS = ("driver", "torch", "transformers", "python", "kvsim", "commit", "cpu", "date")


@dataclass(frozen=True)
class Validation:
    """Predicted against measured: the held-out rows by group, summaries by group and predictor, and where from."""

    groups: dict[str, list[Judged]]
    summaries: list[Summary]
    facts: dict[str, Any]
    warnings: list[str]

    @property
    def rows(self) -> list[Judged]:
        """All of them, by key."""
        each = {row.case.key: row for members in self.groups.values() for row in members}
        return [each[key] for key in sorted(each)]

    @property
    def id(self) -> str:
        """A name made of everything that decides the result."""
        return digest({name: self.facts[name] for name in ("rows", "hardware", "split", "kvsim")})[:16]

    def groups_of(self, row: Judged) -> list[str]:
        return [name for name, members in self.groups.items() if row in members and name != ALL]

    def summary(self, group: str, predictor: str = "kvsim") -> Summary:
        return next(s for s in self.summaries if (s.group, s.predictor) == (group, predictor))

    def save(self, folder: str | Path) -> Path:
        """Write errors.parquet, groups.parquet, report.md, figures and manifest.json, whole or not at all."""
        from kvsim.validate.files import save_rows

        return save_rows(self, Path(folder))


def validate_rows(
    files: Iterable[str | Path],
    hardware: Hardware,
    split: str | Path | Split,
    *,
    any_device: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Validation:
    """Judge the rows of `files` that `split` holds out, and the two simpler models beside kvsim's.

    `any_device`: hardware of another device than the rows' is a warning, not an error. Raises ConfigError for files
    that are no rows, rows of several devices or of another one, rows the hardware was fitted to, and where nothing is
    held out.
    """
    paths = [Path(file) for file in files]
    rows = read_rows(paths)
    split = split if isinstance(split, Split) else read_split(split)
    device = device_of(rows)
    if not split.holds_for(device):
        hint = "every device has a split of its own"
        raise ConfigError(f"the split is of {split.device}, the rows are of {device}", hint=hint)
    warnings = check_device(hardware, device, any_device)
    kept = [row for row in rows if split.is_held_out(row["key"])]
    warnings += _check_unseen(hardware, kept, split)
    lost = [
        r["key"] for r in rows if r["phase"] in JUDGED and not (split.is_fit(r["key"]) or split.is_held_out(r["key"]))
    ]
    if lost:
        warnings.append(f"the split names neither side for {len(lost)} rows, {lost[0]} among them: they are left out")
    measured = cases(rows)
    counted = {case.key for case in cases(kept)}
    if not counted:
        hint = "held_out globs match keys of resident, offload and ssd rows"
        raise ConfigError("the split holds out none of these rows", hint=hint)
    peak = peaks(device, rows, hardware)
    judged = judge(measured, hardware, peak, lambda case: case.key in counted, progress)
    facts = {
        "device": device,
        **provenance(rows),
        "rows": [{"file": path.name, "sha256": file_hash(path)} for path in paths],
        "points": {"fit": sum(split.is_fit(row["key"]) for row in rows), "held_out": len(counted), "all": len(rows)},
        "hardware": described(hardware),
        "split": {"fingerprint": split.fingerprint, **asdict(split)},
        "peaks": asdict(peak),
        "kvsim": __version__,
    }
    groups = _grouped(judged, split)
    summaries = [summarise(name, members, p) for name, members in groups.items() for p in PREDICTORS]
    return Validation(groups, summaries, facts, warnings + _caveats(rows, judged))


def check_device(hardware: Hardware, device: str, any_device: bool) -> list[str]:
    """Is the hardware file of this device? A calibrated one says so; another is known by its description.

    Returns warnings. Raises ConfigError for another device, unless `any_device`.
    """
    fit = hardware.fit
    if fit is None and slug(hardware.description).startswith(device):
        return [f"{hardware.name} was not calibrated: its constants are {_evidence(hardware)}"]
    if fit is not None and fit.device == device:
        return []
    whose = fit.device if fit else f'"{hardware.description}"'
    what = f"the hardware {hardware.name} is of {whose}, the measurements are of {device}"
    if not any_device:
        hint = "calibrate this device with kvsim calibrate, or say that any device will do"
        raise ConfigError(what, where=hardware.where, hint=hint)
    return [f"{what}: the errors say how far one machine is from another"]


def described(hardware: Hardware) -> dict[str, Any]:
    """Name, constants with their evidence, and what they were fitted to."""
    constants = {key: [c.value, c.evidence, c.source] for key, c in hardware.constants.items()}
    fit = None
    if hardware.fit:
        files = [{"file": name, "sha256": sha256} for name, sha256 in hardware.fit.rows]
        fit = asdict(hardware.fit) | {"rows": files}
    return {"name": hardware.name, "description": hardware.description, "constants": constants, "fit": fit}


def provenance(rows: Sequence[Row]) -> dict[str, Any]:
    """Driver, versions, commit and dates of the runs, each as the list of what was found."""
    infos = [row["params"] for row in rows if row["phase"] == "info"]
    return {name: sorted({str(info[name]) for info in infos if info.get(name)}) for name in _VERSIONS}


def _check_unseen(hardware: Hardware, held_out: Sequence[Row], split: Split) -> list[str]:
    """Raise ConfigError for rows that the hardware may have been fitted to."""
    fit = hardware.fit
    if fit is None:
        return []
    if seen := [row["key"] for row in held_out if fit.covers(row["key"])]:
        raise ConfigError(
            f"{hardware.name} was fitted to {len(seen)} of the rows it is to be judged by, {seen[0]} first",
            where=hardware.where,
            hint="fit and hold out by the same split, written before the first fit",
        )
    if fit.split != split.fingerprint:
        return [f"{hardware.name} was fitted under another split; it has seen none of the rows held out here"]
    return []


def _grouped(judged: Sequence[Judged], split: Split) -> dict[str, list[Judged]]:
    """Groups in the order of the split, then all together."""
    groups: dict[str, list[Judged]] = {name: [] for name in (*split.groups, "other")}
    for row in judged:
        for name in split.groups_of(row.case.key):
            groups[name].append(row)
    groups = {name: members for name, members in groups.items() if members}
    return {**groups, ALL: list(judged)} if len(groups) > 1 else groups


def _caveats(rows: Sequence[Row], judged: Sequence[Judged]) -> list[str]:
    """What a reader of the errors has to know."""
    found = [
        f"the sentinels of phase {phase} lie {100 * apart:.1f} % apart: the device did not keep its speed"
        for phase, apart in sorted(drifts(rows).items())
        if apart > DRIFT
    ]
    beyond = [reason for row in judged for reason in row.outside]
    if beyond:
        count, kinds = sum(bool(row.outside) for row in judged), sorted({x.partition(":")[0] for x in beyond})
        found.append(
            f"{count} of {len(judged)} predictions extrapolate beyond the measured range of {', '.join(kinds)}; "
            "errors.parquet names them"
        )
    if failed := sum("error" in row for row in rows):
        found.append(f"{failed} points failed when they were measured")
    if few := sum(len(row.case.seconds) < 3 for row in judged):
        found.append(f"{few} rows have fewer than three samples: their noise is not known")
    return found


def _evidence(hardware: Hardware) -> str:
    kinds = [c.evidence for c in hardware.constants.values()]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
