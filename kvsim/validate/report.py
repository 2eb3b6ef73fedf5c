"""Validations in Markdown, generated: every table says what was measured on what, and the noise beside the error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvsim.measure.rows import Row
from kvsim.units import format_seconds
from kvsim.validate.judge import PREDICTORS, TERMS, Judged, Summary, knees_of, summarise
from kvsim.validate.registered import REGISTERED, Registered

if TYPE_CHECKING:
    from kvsim.validate.rows import Validation
    from kvsim.validate.twin import TwinValidation

WORST = 10  # rows that the report names
_OWN_NOISE = (
    "*Own noise*: median over the rows of (p90 - p10) / median of the samples. *Noise exact*: a prediction between p10 "
    "and p90 counts as exact. *Calibrated max*: MAPE of max(compute, bytes / bandwidth) with the calibrated rates. "
    "*Roofline*: of the same at peak, {peaks}."
)
_ORDER = (
    "*tau*: Kendall's tau-b of measured and predicted times within the same model, batch and context (pairs). *Knee*: "
    "error of the resident fraction from which on fetching shows, mean over curves (their number). *Stall*: error of "
    "what moving pages adds to the resident step, mean (mean absolute). *In the band*: measured medians inside the "
    "prediction's 90 % band, which comes from the bands of the constants."
)
_REGISTERED = (
    "*Registered*: predicted from public numbers, before any of these rows was measured. *Fitted*: predicted from what "
    "was fitted to this device's calibration rows; empty for groups that a fit may see. *Signed*: mean error, positive "
    "where the prediction is too long."
)
_TERMS = (
    "Parts that sum to the error, signed (absolute): *layers* as if everything were resident, what *moving* adds to "
    "them, and the *head* with sampling and the host's answer."
)


def of_rows(v: Validation) -> list[str]:
    """The report of a validation of rows."""
    return [
        "# Predicted against measured",
        "",
        *(f"- {line}" for line in [*heading(v.facts), evidence(v.facts)]),
        *(f"- **warning:** {text}" for text in v.warnings),
        "",
        "## Errors of rows held out",
        "",
        *errors(v),
        "",
        *order(v),
        "",
        "## The terms to blame",
        "",
        *(terms(v) or ["The rows do not say when their layers ended."]),
        "",
        "## Knees",
        "",
        *(knees(v.rows) or ["No curve over the resident fraction has a knee."]),
        "",
        "## Worst rows",
        "",
        *worst(v.rows),
    ]


def errors(v: Validation) -> list[str]:
    """Errors by group, beside the noise and the simpler models."""
    lines = []
    for name in v.groups:
        s, simple, peak = (v.summary(name, p) for p in PREDICTORS)
        mine = s.noise, s.mape, s.mape_beyond_noise
        cells = *map(_share, mine), _signed(s.signed), *map(_share, (s.p90, s.worst, s.inside_noise))
        lines.append((name, s.n, *cells, _share(simple.mape), _share(peak.mape)))
    head = "group|rows|own noise|MAPE|MAPE, noise exact|signed|p90|worst|inside noise|calibrated max|roofline"
    return [*table(head, lines), "", _OWN_NOISE.format(peaks=v.facts["peaks"]["source"])]


def order(v: Validation) -> list[str]:
    """Order of the points, knees and stalls by group, and what the bands cover."""
    lines = []
    for name in v.groups:
        each = [v.summary(name, p) for p in PREDICTORS]
        s = each[0]
        stall = (
            "" if math.isnan(s.stall_error_s) else f"{1e3 * s.stall_error_s:+.3f} ({1e3 * s.stall_abs_error_s:.3f}) ms"
        )
        lines.append((name, *map(_tau, each), *map(_knee, each), stall, _share(s.band_coverage), s.outside))
    head = "group|tau|tau, max|tau, roofline|knee|knee, max|knee, roofline|stall|in the band|extrapolated"
    return [*table(head, lines), "", _ORDER]


def registered(entry: Registered, rows: Sequence[Row], v: Validation | None) -> list[str]:
    """Errors of what was registered, by group, beside those of what was fitted since.

    `v`: the held-out rows judged, by a fit to this device, or by other hardware, of which nothing is said then; None
    where there are none.
    """
    lines = []
    for o in entry.outcomes(rows):
        members = [row for row in v.groups.get(o.group, ()) if entry.ms(row.case.key) is not None] if v else []
        s = summarise(o.group, list(map(entry.judged, members)), REGISTERED) if members else None
        f = v.summary(o.group) if v and members and v.facts["hardware"]["fit"] else None
        cells = *map(_share, (o.mape, o.p90, o.worst)), _signed(o.signed), *((_tau(s), _knee(s)) if s else ("", ""))
        since = (*map(_share, (f.mape, f.p90, f.worst)), _signed(f.signed)) if f else ("",) * 4
        lines.append((o.group, f"{o.n} of {o.registered}", *cells, *since))
    head = "group|measured|registered: MAPE|p90|worst|signed|tau|knee|fitted: MAPE|p90|worst|signed"
    return [*table(head, lines), "", _REGISTERED]


def terms(v: Validation) -> list[str]:
    """Which part of a step the errors come from; nothing where no row tells."""
    lines = []
    for name, members in v.groups.items():
        parts = np.array([[row.terms[t] for t in TERMS] for row in members])
        parts = parts[np.isfinite(parts).all(1)]
        if len(parts):
            size = np.abs(parts).mean(0)
            cells = [f"{_signed(a)} ({_share(b)})" for a, b in zip(parts.mean(0), size, strict=True)]
            lines.append((name, len(parts), *cells, TERMS[int(size.argmax())]))
    return [*table("group|rows|layers|moving|head|most", lines), "", _TERMS] if lines else []


def knees(rows: Sequence[Judged]) -> list[str]:
    """Measured and predicted knee of each curve; nothing where there is none."""
    lines = [
        (title_of(first), f"{measured:.2f}", f"{predicted:.2f}", f"{predicted - measured:+.2f}")
        for first, measured, predicted in knees_of(rows)
    ]
    return table("curve|measured|predicted|error", lines) if lines else []


def worst(rows: Sequence[Judged]) -> list[str]:
    """The rows with the largest errors, and the part that is to blame."""
    lines = []
    for row in sorted(rows, key=lambda row: (-abs(row.error()), row.case.key))[:WORST]:
        measured, predicted = format_seconds(row.case.median_s), format_seconds(row.prediction.seconds)
        name = f"`{row.case.key.partition('/')[2]}`"
        lines.append((name, measured, _share(row.case.noise), predicted, _signed(row.error()), _blamed(row)))
    return table("row|measured|own noise|predicted|error|most of it", lines)


def _blamed(row: Judged) -> str:
    parts = {name: value for name, value in row.terms.items() if math.isfinite(value)}
    name = max(parts, key=lambda t: abs(parts[t]), default="")
    return f"{name} {_signed(parts[name])}" if name else ""


def title_of(row: Judged) -> str:
    """A curve in words: model, batch, context, and what is not as usual."""
    c = row.case
    unusual = {
        "SSD": c.tier == "ssd",
        "page by page": c.method == "page",
        "known layer by layer": c.known == "layer",
        f"depth {c.depth}": c.depth != 2,
        "scattered": c.clustered is False,
    }
    return ", ".join([f"{c.shape.name} {c.sequences}x{c.context}", *(name for name, so in unusual.items() if so)])


def heading(facts: Mapping[str, Any]) -> list[str]:
    """Which device, when, with what; and what was fitted on what."""
    known = [f"{name} {', '.join(facts[name])}" for name in ("driver", "torch", "transformers") if facts.get(name)]
    points, hardware = facts["points"], facts["hardware"]
    fit = hardware["fit"]
    seen = f"fitted to {', '.join(f['file'] for f in fit['rows'])} on {fit['date']}" if fit else "not calibrated"
    return [
        "; ".join([f"measured on {facts['device']}, {', '.join(facts['date']) or 'date unknown'}", *known]),
        f"hardware {hardware['name']}, {seen}; of {points['all']} rows {points['fit']} are for fitting and "
        f"{points['held_out']} are judged here; split {facts['split']['fingerprint'][:12]}",
    ]


def evidence(facts: Mapping[str, Any]) -> str:
    """What the numbers are."""
    return f"measured on {facts['device']}; predicted by kvsim {facts['kvsim']} from {facts['hardware']['name']}"


# --- a trace's own steps -------------------------------------------------------------------------------------


def of_twin(v: TwinValidation) -> list[str]:
    """The report of a validation of a trace's own steps."""
    return [
        "# A captured run against its simulation",
        "",
        *(f"- {line}" for line in [*twin_heading(v.facts), evidence(v.facts)]),
        *(f"- **warning:** {text}" for text in v.warnings),
        "",
        *batches(v),
    ]


def batches(v: TwinValidation) -> list[str]:
    """Measured and predicted steps of each batch that was run together."""
    lines = []
    for b in v.batches:
        s = b.summary()
        times = format_seconds(s["measured_s"]), format_seconds(s["predicted_s"])
        cells = _signed(s["median_error"]), _share(s["mape"]), _signed(s["signed"]), _share(s["noise"])
        drift = [f"{1e6 * s[f'drift_{who}']:+.3g}" for who in ("measured", "predicted")]
        lines.append((b.title, s["steps"], *times, *cells, *drift))
    head = (
        "batch|steps|measured, median|predicted, median|error of the median|MAPE of steps|signed|own noise|"
        "drift, measured (µs per token)|drift, predicted"
    )
    return [
        *table(head, lines),
        "",
        "The steps are those of the run's twin without capture. *Own noise*: (p90 - p10) / median of the steps. "
        "*Drift*: how much longer a step takes per token of context, from the medians of the first and last quarter.",
    ]


def twin_heading(facts: Mapping[str, Any]) -> list[str]:
    """Which trace, run by what on what."""
    run = facts["run"]
    said = [f"{name} {run[name]}" for name in ("torch", "transformers", "threads", "dtype") if run.get(name)]
    return [
        "; ".join([f"trace {facts['trace']['name']} ({facts['trace']['fingerprint'][:12]})", f"model {run['model']}"]),
        "; ".join([f"run on {facts['device']}, {run['date'] or 'date unknown'}", *said]),
    ]


# --- cells ---------------------------------------------------------------------------------------------------


def table(head: str, lines: Iterable[Sequence[Any]]) -> list[str]:
    """A Markdown table; the columns of `head` are parted by |, and all but the first lean to the right."""
    names = head.split("|")
    rule = ["---", *["---:"] * (len(names) - 1)]
    return ["| " + " | ".join(map(str, cells)) + " |" for cells in [names, rule, *lines]]


def _share(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.1f} %"


def _signed(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:+.1f} %"


def _tau(s: Summary) -> str:
    return "" if math.isnan(s.tau) else f"{s.tau:.2f} ({s.pairs})"


def _knee(s: Summary) -> str:
    return f"{s.knee_error:.2f} ({s.knees})" if s.knees else ""
