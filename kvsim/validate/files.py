"""What a validation leaves behind: tables in Parquet, a report in Markdown, figures, and a manifest of where from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvsim.figures import validation as figures
from kvsim.results import Recorder, beside, check_free, write_json, write_table
from kvsim.validate import report
from kvsim.validate.judge import Judged, Summary, curves, knees_of

if TYPE_CHECKING:
    from kvsim.validate.rows import Validation
    from kvsim.validate.twin import TwinValidation

SCHEMA = 1


def _schema(text: str, whole: str, real: str) -> dict[str, str]:
    kinds = (("O", text), ("i8", whole), ("f8", real))
    return {name: kind for kind, names in kinds for name in names.split()}


ERRORS = _schema(
    "key groups impl model tier method known plan policy outside",
    "sequences context layers page depth samples inside_noise",
    "resident measured_s p10_s p90_s noise predicted_s compute_s stall_s submit_s band_low_s band_high_s error "
    "error_layers error_moving error_head stall_error_s calibrated_max_s calibrated_max_error roofline_s "
    "roofline_error",
)
GROUPS = {name: {"str": "O", "int": "i8", "float": "f8"}[kind] for name, kind in Summary.__annotations__.items()}
STEPS = _schema("", "batch step context sequences", "measured_s captured_s predicted_s error")
BATCHES = _schema(
    "requests",
    "batch sequences first_context last_context steps",
    "measured_s predicted_s signed mape median_error noise drift_measured drift_predicted",
)


def save_rows(v: Validation, folder: Path) -> Path:
    """Write a validation of rows. Raises ResultError when something else is there, or it cannot be written."""
    errors = errors_table(v)
    lines, foot = report.heading(v.facts), report.evidence(v.facts)
    check_free(folder, v.id)
    with beside(folder) as partial:
        write_json(partial / "manifest.json", _manifest(v.id, v.facts, v.warnings))
        write_table(partial / "errors.parquet", errors)
        write_table(partial / "groups.parquet", columns(GROUPS, map(asdict, v.summaries)))
        _write(partial / "report.md", report.of_rows(v))
        figures.predicted_against_measured(errors, lines, foot, partial / "predicted.png")
        if np.isfinite(errors["error_layers"]).any():
            figures.error_by_term(errors, lines, foot, partial / "terms.png")
        if found := curve_tables(v.rows):
            figures.knees(found, lines, foot, partial / "knees.png")
    return folder


def save_twin(v: TwinValidation, folder: Path) -> Path:
    """Write a validation of a trace's own steps. Raises ResultError as `save_rows`."""
    check_free(folder, v.id)
    lines, foot = report.twin_heading(v.facts), report.evidence(v.facts)
    with beside(folder) as partial:
        write_json(partial / "manifest.json", _manifest(v.id, v.facts, v.warnings))
        write_table(partial / "steps.parquet", columns(STEPS, (line for b in v.batches for line in b.lines())))
        write_table(partial / "batches.parquet", columns(BATCHES, (b.summary() for b in v.batches)))
        _write(partial / "report.md", report.of_twin(v))
        steps = [(b.title, b.context, b.measured_s, b.predicted_s) for b in v.batches]
        figures.steps(steps, lines, foot, partial / "steps.png")
    return folder


def _manifest(name: str, facts: Mapping[str, Any], warnings: Sequence[str]) -> dict[str, Any]:
    return {"schema": SCHEMA, "kind": "validation", "id": name, **facts, "warnings": list(warnings)}


def _write(path: Path, lines: Sequence[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def columns(schema: Mapping[str, str], lines: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Mappings of the schema's keys, one per line, as columns."""
    table = Recorder(schema)
    for line in lines:
        table.add(**line)
    return table.arrays()


def errors_table(v: Validation) -> dict[str, np.ndarray]:
    """One line per judged row, as columns; seconds, and shares of the measured time."""
    return columns(ERRORS, (_error_line(row, v.groups_of(row)) for row in v.rows))


def _error_line(row: Judged, groups: Sequence[str]) -> dict[str, Any]:
    c, p, (low, high) = row.case, row.prediction, row.case.spread_s
    band = row.band or (math.nan, math.nan)
    return {
        "key": c.key,
        "groups": ", ".join(groups),
        "impl": c.impl,
        "model": c.shape.name,
        "layers": c.shape.layers,
        "sequences": c.sequences,
        "context": c.context,
        "page": c.page,
        "tier": c.tier or "",
        "method": c.method,
        "known": c.known,
        "depth": c.depth,
        "resident": c.resident,
        "plan": c.plan or "",
        "policy": c.policy or "",
        "samples": len(c.seconds),
        "measured_s": c.median_s,
        "p10_s": low,
        "p90_s": high,
        "noise": c.noise,
        "inside_noise": int(row.exact()),
        "predicted_s": p.seconds,
        "compute_s": p.compute_s,
        "stall_s": p.stall_s,
        "submit_s": p.submit_s,
        "band_low_s": band[0],
        "band_high_s": band[1],
        "error": row.error(),
        **{f"error_{name}": value for name, value in row.terms.items()},
        "stall_error_s": row.stall_error_s(),
        "calibrated_max_s": row.seconds["calibrated max"],
        "calibrated_max_error": row.error("calibrated max"),
        "roofline_s": row.seconds["roofline"],
        "roofline_error": row.error("roofline"),
        "outside": "; ".join(row.outside),
    }


DRAWN = 3  # points of a curve that is worth a panel


def curve_tables(rows: Sequence[Judged]) -> list[dict[str, Any]]:
    """Each curve over the resident fraction: its title, its points, and its knees, nan where there is none."""
    knees = {id(first): (measured, predicted) for first, measured, predicted in knees_of(rows)}
    found = []
    for curve in curves(rows):
        if len(curve) < DRAWN:  # one choice varied at one share: a table's matter
            continue
        measured, predicted = knees.get(id(curve[0]), (math.nan, math.nan))
        spread = np.array([row.case.spread_s for row in curve])
        found.append(
            {
                "title": report.title_of(curve[0]),
                "resident": np.array([row.case.resident for row in curve]),
                "measured_s": np.array([row.case.median_s for row in curve]),
                "p10_s": spread[:, 0],
                "p90_s": spread[:, 1],
                "predicted_s": np.array([row.seconds["kvsim"] for row in curve]),
                "calibrated_max_s": np.array([row.seconds["calibrated max"] for row in curve]),
                "knee_measured": measured,
                "knee_predicted": predicted,
            }
        )
    return found
