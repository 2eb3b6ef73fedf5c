"""How far predictions are from measurements, and how far measurements are from themselves.

Numbers only: what is fitted and what is held out is decided elsewhere (`split`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvsim.machine import Hardware
from kvsim.validate.cases import Case
from kvsim.validate.predict import Peaks, Prediction, calibrated_max, predict, roofline

PREDICTORS = ("kvsim", "calibrated max", "roofline")
TERMS = ("layers", "moving", "head")
LINK_BOUND = 0.2  # of what the slowest point takes above the resident level: from there on a point is on the line


@dataclass(frozen=True, eq=False)
class Judged:
    """A measured case beside its predictions. `twin`: the same work, all of it resident, where the case moves pages.

    `seconds`: of each of PREDICTORS; `band`: 5 % and 95 % of the prediction, as far as the constants' own bands say;
    `outside`: what of the case lies outside of the range in which the hardware was measured.
    """

    case: Case
    prediction: Prediction
    seconds: dict[str, float]
    band: tuple[float, float] | None
    outside: list[str]
    twin: Judged | None = None

    def error(self, predictor: str = "kvsim") -> float:
        """Signed relative error."""
        return self.seconds[predictor] / self.case.median_s - 1.0

    def exact(self, predictor: str = "kvsim") -> bool:
        """Does the prediction lie between the p10 and the p90 of the measurement's own samples?"""
        low, high = self.case.spread_s
        return low <= self.seconds[predictor] <= high

    @property
    def resident(self) -> Judged | None:
        """The case with everything resident."""
        return self.twin if self.case.moves else self

    def stall_error_s(self, predictor: str = "kvsim") -> float:
        """Error of what moving adds to the step: predicted minus measured, both above the resident step."""
        if not self.case.moves or self.twin is None:
            return float("nan")
        added = self.seconds[predictor] - self.twin.seconds[predictor]
        return added - (self.case.median_s - self.twin.case.median_s)

    @property
    def terms(self) -> dict[str, float]:
        """The error in parts that sum to it: layers as if all were resident, what moving adds to them, the head."""
        base = self.resident
        if base is None:
            return dict.fromkeys(TERMS, float("nan"))
        measured = _parts(self.case.median_s, self.case.layer_end_s[-1], base.case.layer_end_s[-1])
        predicted = _parts(self.prediction.seconds, self.prediction.layer_end_s[-1], base.prediction.layer_end_s[-1])
        pairs = zip(TERMS, predicted, measured, strict=True)
        return {name: (p - m) / self.case.median_s for name, p, m in pairs}


def _parts(step: float, last: float, resident_last: float) -> tuple[float, float, float]:
    """TERMS of a step, from the ends of its last layer and of the resident step's."""
    return float(resident_last), float(last - resident_last), float(step - last)


def judge(
    cases: Sequence[Case],
    hardware: Hardware,
    peak: Peaks,
    counted: Callable[[Case], bool] = lambda case: True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Judged]:
    """The cases for which `counted` holds, in order of their keys; the others are only twins."""
    resident: dict[tuple, list[Case]] = {}
    for case in sorted(filter(_is_twin, cases), key=_key):
        resident.setdefault(case.work, []).append(case)
    whole = {work: _judged(_together(same), hardware, peak) for work, same in resident.items()}
    wanted, found = sorted(filter(counted, cases), key=_key), []
    for done, case in enumerate(wanted):
        progress(done, len(wanted))
        found.append(_judged(case, hardware, peak, whole.get(case.work) if case.moves else None, bands=True))
    progress(len(wanted), len(wanted))
    return found


def _key(case: Case) -> str:
    return case.key


def _is_twin(case: Case) -> bool:
    return case.impl == "executor" and not case.moves and not case.whole


def _together(same: Sequence[Case]) -> Case:
    """One case of the samples of all: which of them is called the resident level must not decide a knee."""
    ends = np.median([case.layer_end_s for case in same], axis=0)
    return replace(same[0], seconds=np.concatenate([case.seconds for case in same]), layer_end_s=ends)


def _judged(case: Case, hardware: Hardware, peak: Peaks, twin: Judged | None = None, bands: bool = False) -> Judged:
    found = predict(case, hardware)
    each = (found.seconds, calibrated_max(case, hardware), roofline(case, peak))
    band = prediction_band(case, hardware, found.seconds) if bands else None
    return Judged(case, found, dict(zip(PREDICTORS, each, strict=True)), band, outside(case, hardware), twin)


def prediction_band(case: Case, hardware: Hardware, seconds: float) -> tuple[float, float] | None:
    """What the bands of the constants make of the prediction: one constant at a time, differences in quadrature.

    None where no constant has a band. Constants fitted together move together, so this is rather too wide.
    """
    below = above = 0.0
    bands = [(key, end) for key, c in hardware.constants.items() for end in (c.low, c.high) if end is not None]
    for key, end in bands:
        moved = predict(case, hardware.with_overrides({key: end})).seconds - seconds
        below, above = math.hypot(below, max(0.0, -moved)), math.hypot(above, max(0.0, moved))
    return (seconds - below, seconds + above) if bands else None


def outside(case: Case, hardware: Hardware) -> list[str]:
    """What of the case lies outside of the range in which the hardware's operators were measured, in words."""
    shape, rows = case.shape, case.sequences
    found = []
    if case.impl == "hf-prefill":
        rows *= case.context
        found += hardware.outside("prefill", sequences=case.sequences, queries=case.context)
    else:
        found += hardware.outside("attention", sequences=case.sequences, kv_bytes=case.kv_bytes)
    for parameters in sorted({*shape.gemms}):
        found += hardware.outside("gemm", parameters=parameters, rows=rows)
    pages = case.host_pages + case.ssd_pages
    if case.moves and case.copies.any():
        layer = int(np.argmax(pages))
        copies = max(1.0, float(case.copies[layer]))
        nbytes = float(pages[layer]) * case.page_bytes
        found += hardware.outside("copy", bytes=nbytes, copies=copies)
        if case.ssd_pages.any():
            found += hardware.outside("ssd", block=nbytes / copies)
    return list(dict.fromkeys(found))


# --- groups --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Errors of one predictor over a group of rows; shares, and seconds where the name ends in _s.

    `mape_beyond_noise`: rows inside their own noise count as exact. `noise`: median of the rows' own. `knee_error`:
    mean |difference| of the resident fraction at the knee, over `knees` curves. `tau`: Kendall's tau-b over `pairs` of
    rows that do the same work. `band_coverage`: share of the measured medians inside the predicted band. `outside`:
    rows that lie outside of the measured range. nan: nothing to say.
    """

    group: str
    predictor: str
    n: int
    signed: float
    mape: float
    mape_beyond_noise: float
    p90: float
    worst: float
    noise: float
    inside_noise: float
    knees: int
    knee_error: float
    tau: float
    pairs: int
    stall_error_s: float
    stall_abs_error_s: float
    band_coverage: float
    outside: int


def summarise(group: str, rows: Sequence[Judged], predictor: str = "kvsim") -> Summary:
    """The errors of a group; at least one row."""
    error = np.array([row.error(predictor) for row in rows])
    size, exact = np.abs(error), np.array([row.exact(predictor) for row in rows])
    knees = [b - a for _, a, b in knees_of(rows, predictor)]
    tau, pairs = tau_of(rows, predictor)
    stalls = np.array([row.stall_error_s(predictor) for row in rows])
    stalls = stalls[np.isfinite(stalls)]
    inside = [row.band[0] <= row.case.median_s <= row.band[1] for row in rows if row.band and predictor == "kvsim"]
    return Summary(
        group=group,
        predictor=predictor,
        n=len(rows),
        signed=float(error.mean()),
        mape=float(size.mean()),
        mape_beyond_noise=float(np.where(exact, 0.0, size).mean()),
        p90=float(np.quantile(size, 0.9)),
        worst=float(size.max()),
        noise=float(np.median([row.case.noise for row in rows])),
        inside_noise=float(exact.mean()),
        knees=len(knees),
        knee_error=_mean(np.abs(knees)),
        tau=tau,
        pairs=pairs,
        stall_error_s=_mean(stalls),
        stall_abs_error_s=_mean(np.abs(stalls)),
        band_coverage=_mean(np.array(inside, float)),
        outside=sum(bool(row.outside) for row in rows),
    )


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


# --- curves over the resident fraction -----------------------------------------------------------------------


def curves(rows: Sequence[Judged]) -> list[list[Judged]]:
    """Rows that differ in their resident fraction alone, ascending; the resident twin is the last point of each."""
    series: dict[tuple, list[Judged]] = {}
    for row in rows:
        if row.case.impl == "executor" and row.case.moves and row.case.plan is None:
            series.setdefault(row.case.series, []).append(row)
    found = []
    for members in series.values():
        twin = members[0].twin
        if twin is not None:
            found.append([*sorted(members, key=lambda row: row.case.resident), twin])
    return found


def knees_of(rows: Sequence[Judged], predictor: str = "kvsim") -> list[tuple[Judged, float, float]]:
    """Per curve that has a knee in both: its first point, the measured and the predicted resident fraction."""
    found = []
    for curve in curves(rows):
        share = [row.case.resident for row in curve]
        measured = knee(share, [row.case.median_s for row in curve])
        predicted = knee(share, [row.seconds[predictor] for row in curve])
        if np.isfinite([measured, predicted]).all():
            found.append((curve[0], measured, predicted))
    return found


def knee(resident: Sequence[float], seconds: Sequence[float]) -> float:
    """Where the line through the link-bound points meets the level of the last, fully resident one; 1 at most.

    Link-bound: at least LINK_BOUND of the way up from that level to the slowest point. At 1 nothing hides. nan with
    fewer than two such points, or where they do not fall with the resident fraction.
    """
    share, time = np.asarray(resident, float), np.asarray(seconds, float)
    level = time[-1]
    bound = time - level >= LINK_BOUND * (time.max() - level)
    bound &= time > level
    if len(set(share[bound])) < 2:
        return float("nan")
    slope, start = np.polyfit(share[bound], time[bound], 1)
    return min(1.0, float((level - start) / slope)) if slope < 0 else float("nan")


# --- order ---------------------------------------------------------------------------------------------------


def tau_of(rows: Sequence[Judged], predictor: str = "kvsim") -> tuple[float, int]:
    """Kendall's tau-b of measured and predicted times over pairs of rows that do the same work, and how many pairs."""
    works = {work: i for i, work in enumerate(dict.fromkeys(row.case.work for row in rows))}
    measured = [row.case.median_s for row in rows]
    predicted = [row.seconds[predictor] for row in rows]
    return kendall_tau(measured, predicted, [works[row.case.work] for row in rows])


def kendall_tau(x: Sequence[float], y: Sequence[float], block: Sequence[int] | None = None) -> tuple[float, int]:
    """Kendall's tau-b over all pairs, or those within a block, and their number (Kendall 1945, ties in both)."""
    a, b = np.asarray(x, float), np.asarray(y, float)
    first, second = np.triu_indices(len(a), 1)
    if block is not None:
        same = np.asarray(block)[first] == np.asarray(block)[second]
        first, second = first[same], second[same]
    dx, dy = np.sign(a[first] - a[second]), np.sign(b[first] - b[second])
    untied = np.sqrt(float(np.abs(dx).sum()) * float(np.abs(dy).sum()))
    return (float((dx * dy).sum() / untied) if untied else float("nan")), len(first)
