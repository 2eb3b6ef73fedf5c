"""Judging: metrics against hand and brute force, refusals, a campaign whose truth is known, the files that are left."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.errors import ConfigError, ResultError, TraceError
from kvsim.machine import Hardware, ModelShape, Work
from kvsim.machine.hardware import Fit
from kvsim.trace import open_trace
from kvsim.validate import Split, read_split, validate_rows, validate_trace
from kvsim.validate.cases import case_of
from kvsim.validate.judge import Judged, judge, kendall_tau, knee, prediction_band
from kvsim.validate.predict import Peaks, Prediction, eager, predict, simulate

TRACE = Path(__file__).parent.parent / "traces" / "reasoner.kvtrace"
DEVICE = "nvidia-h100-80gb-hbm3"
SHAPE = {
    "layers": 4, "hidden": 2048, "heads": 32, "kv_heads": 8, "head_dim": 64, "intermediate": 8192, "vocab": 32000,
    "value_bytes": 2,
}  # fmt: skip
PAGE_BYTES = 16 * 2 * 8 * 64 * 2


# --- metrics -------------------------------------------------------------------------------------------------


def test_tau_by_hand():
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == (1.0, 3)
    assert kendall_tau([1, 2, 3], [30, 20, 10]) == (-1.0, 3)
    tau, pairs = kendall_tau([1, 2, 3, 4], [1, 3, 2, 4])  # one of six pairs the wrong way round
    assert tau == pytest.approx(4 / 6) and pairs == 6
    tied, _ = kendall_tau([1, 1, 2], [1, 2, 3])  # two pairs agree, one is tied in x: 2 / sqrt(2 * 3)
    assert tied == pytest.approx(2 / math.sqrt(6))
    within, pairs = kendall_tau([1, 2, 3, 4], [2, 1, 10, 9], [0, 0, 1, 1])  # across blocks it would be right
    assert within == -1.0 and pairs == 2
    assert math.isnan(kendall_tau([1, 1], [1, 2])[0]) and math.isnan(kendall_tau([1], [1])[0])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=8))
def test_tau_is_its_definition(points):
    agree = disagree = only_x = only_y = 0
    for (a, b), (c, d) in itertools.combinations(points, 2):
        agree += (a - c) * (b - d) > 0
        disagree += (a - c) * (b - d) < 0
        only_x += a == c and b != d
        only_y += a != c and b == d
    root = math.sqrt((agree + disagree + only_x) * (agree + disagree + only_y))
    found = kendall_tau(*zip(*points, strict=True))[0]
    assert found == pytest.approx((agree - disagree) / root) if root else math.isnan(found)


def test_the_knee_is_where_the_link_bound_line_meets_the_resident_level():
    share = [0.0, 0.25, 0.5, 0.75, 1.0]
    assert knee(share, [5.0, 4.0, 3.0, 2.0, 2.0]) == pytest.approx(0.75)
    assert knee(share, [5.0, 4.0, 3.0, 2.1, 2.0]) == pytest.approx(0.75)  # what is near the level is not on the line
    assert math.isnan(knee(share, [2.0] * 5)) and math.isnan(knee(share, [5.0, 2.0, 2.0, 2.0, 2.0]))
    assert math.isnan(knee([0.0, 0.1, 1.0], [4.0, 5.0, 1.0]))  # no line that falls
    assert knee(share, [6.0, 5.5, 5.0, 4.5, 2.0]) == 1.0  # the line would meet the level beyond the end: nothing hides


@given(st.floats(0.1, 0.9), st.floats(0.5, 20.0), st.floats(0.1, 10.0))
def test_a_bent_line_has_its_knee_where_it_bends(at, slope, level):
    share = np.linspace(0, 1, 21)
    assert knee(share, level + slope * np.maximum(at - share, 0)) == pytest.approx(at, abs=1e-6)


def judged(measured, predicted, seconds=None):
    case = case_of(row("x/resident/1", resident=1.0))
    case = replace(case, seconds=np.array(measured), layer_end_s=np.array([0.2, 0.4, 0.6, 0.8]))
    found = Prediction(predicted, predicted, 0.0, 0.0, np.array([0.25, 0.5, 0.75, 0.9]) * predicted)
    return Judged(case, found, {"kvsim": predicted}, None, [])


def test_a_prediction_inside_the_samples_is_exact():
    samples = [0.9, 1.0, 1.0, 1.0, 1.1]
    assert judged(samples, 1.05).exact() and not judged(samples, 1.2).exact()
    assert judged(samples, 1.2).error() == pytest.approx(0.2)


def test_terms_sum_to_the_error():
    resident = judged([1.0], 1.2)
    assert resident.terms == pytest.approx({"layers": 1.08 - 0.8, "moving": 0.0, "head": 0.12 - 0.2})
    moves = case_of(row("x/offload/1", pages=100))
    moves = replace(moves, seconds=np.array([3.0]), layer_end_s=np.array([1.0, 1.5, 2.0, 2.7]))
    found = Prediction(2.4, 1.0, 1.4, 0.0, np.array([1.0, 1.4, 1.8, 2.2]))
    row_ = Judged(moves, found, {"kvsim": 2.4}, None, [], twin=resident)
    assert row_.terms == pytest.approx({"layers": 0.28 / 3, "moving": (2.2 - 1.08 - 1.9) / 3, "head": (0.2 - 0.3) / 3})
    assert sum(row_.terms.values()) == pytest.approx(row_.error())
    assert row_.stall_error_s() == pytest.approx((2.4 - 1.2) - (3.0 - 1.0))
    assert math.isnan(replace(row_, twin=None).stall_error_s()) and math.isnan(resident.stall_error_s())


# --- a campaign on a machine that is known -------------------------------------------------------------------


def row(key, pages=0, ms=(1.0,), **params):
    """A row of an executor that loads `pages` in every layer, in runs of eight."""
    given = {
        "impl": "executor", "model": "toy", "shape": SHAPE, "sequences": 1, "context": 8192, "page": 16,
        "tier": "host" if pages else None, "method": "runs", "known": "start", "depth": 2, "resident": 1.0,
        "clustered": True, "fetched_pages": [float(pages)] * 4, "copies": [math.ceil(pages / 8)] * 4, "plan": None,
        "policy": None, "graph": "layer",
    }  # fmt: skip
    return {
        "key": key,
        "phase": key.split("/")[1],
        "kind": "executor",
        "params": given | params,
        "ms": list(ms),
        "t": 0.0,
    }


def measured(row, truth, rng, noise=0.01):
    """The row as a machine with these constants would have measured it."""
    found = predict(case_of(row), truth)
    samples = found.seconds * 1e3 * (1 + noise * rng.standard_normal(20))
    extra = {} if np.isnan(found.layer_end_s).any() else {"layer_ms": (found.layer_end_s * 1e3).tolist()}
    return row | {"ms": samples.tolist()} | extra


def campaign():
    """What is measured: resident and offload grids of two models, a few plans, transformers."""
    rows = []
    for model, context in itertools.product(("small", "large"), (8192, 32768)):
        shape = SHAPE | {"hidden": 2048 if model == "small" else 4096, "layers": 4}
        work = {"model": model, "shape": shape, "context": context}
        at = f"{model}/1x{context}"
        rows.append(row(f"{DEVICE}/resident/executor/{at}/layer", **work))
        for share in (75, 50, 25, 0):
            pages = round(context / 16 * (1 - share / 100))
            rows.append(
                row(f"{DEVICE}/offload/executor/{model}/1x{context}/r{share}", pages, resident=share / 100, **work)
            )
        for i, pages in enumerate((10, 40, 90)):
            rows.append(
                row(f"{DEVICE}/offload/plan/{model}/1x{context}/{i}", pages, plan=f"p{i}", policy="lru", **work)
            )
    rows.append(row(f"{DEVICE}/resident/hf-decode/large/1x8192", impl="hf-decode", model="large"))
    return rows


INFO = {
    "key": f"{DEVICE}/info/1", "phase": "info", "kind": "info", "t": 0.0, "ms": [1.0],
    "params": {"device": "H100", "driver": "555.1", "torch": "2.11.0", "transformers": "5.17", "date": "2026-11-21"},
}  # fmt: skip
SPLIT = Split(
    DEVICE,
    ("*/calibrate/*", "*/resident/executor/small/*"),
    ("*/resident/*/large/*", "*/offload/*"),
    {"resident": ("*/resident/*",), "host": ("*/offload/executor/*",), "plans": ("*/offload/plan/*",)},
)


def truth():
    """The shipped machine as if every constant were known exactly."""
    shipped = Hardware.load("h100-pcie5")
    return shipped.with_constants({k: replace(c, low=None, high=None) for k, c in shipped.constants.items()})


def calibrated(off=1.0, split=SPLIT):
    """The truth with a wrong link and memory, and the mark of a fit."""
    constants = {
        key: replace(c, value=f"{getattr(table, name) * off}B/s", low=f"{getattr(table, name) * off * 0.9}B/s",
                     high=f"{getattr(table, name) * off * 1.1}B/s")
        for key, table, name, c in (
            ("link.h2d.bandwidth", truth().h2d, "bandwidth", truth().constants["link.h2d.bandwidth"]),
            ("gpu.kv_bandwidth", truth().gpu, "kv_bandwidth", truth().constants["gpu.kv_bandwidth"]),
        )
    }  # fmt: skip
    fit = Fit(DEVICE, (("rows.jsonl", "0" * 64),), "0" * 64, split.fit, "0.1.0", "2026-11-21", split.fingerprint)
    return replace(truth().with_constants(constants), name="calibrated", fit=fit)


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    rng = np.random.default_rng(0)
    done = [INFO, *(measured(r, truth(), rng) for r in campaign())]
    return write(tmp_path_factory.mktemp("campaign") / "rows.jsonl", done)


@pytest.fixture(scope="module")
def found(rows):
    return validate_rows([rows], calibrated(), SPLIT)


def test_a_true_machine_is_judged_with_the_noise_alone_and_the_simple_ones_are_not(found):
    for group in ("resident", "host", "plans", "all held out"):
        s, simple, peak = (found.summary(group, p) for p in ("kvsim", "calibrated max", "roofline"))
        assert s.mape < 0.006 and s.mape_beyond_noise <= s.mape and s.worst < 0.02 and abs(s.signed) < 0.006
        assert 0.015 < s.noise < 0.03 and s.inside_noise > 0.9
        assert simple.mape > 0.05 > s.mape and peak.mape > simple.mape
    host = found.summary("host")
    assert host.n == 16 and host.knees == 4 and host.knee_error < 0.02 and host.tau > 0.95 and host.pairs == 4 * 6
    assert host.knee_error < found.summary("host", "calibrated max").knee_error
    assert host.stall_abs_error_s < 2e-4 and host.band_coverage == 1.0
    assert found.summary("plans").pairs == 4 * 3


def test_a_wrong_link_is_found_in_what_moves(rows):
    wrong = validate_rows([rows], calibrated(0.8), SPLIT)
    host = wrong.summary("host")
    assert host.signed > 0.1 and host.band_coverage < 1.0 and host.stall_error_s > 4e-4
    terms = np.array([list(r.terms.values()) for r in wrong.groups["host"]])
    assert np.abs(terms).mean(0).argmax() == 1  # moving


@pytest.mark.parametrize("order", [1, -1])
def test_the_resident_level_is_that_of_every_row_of_it(order):
    """A row called r100 and one called layer did the same work: the level lies between, whatever their names."""
    names, times = ("offload/executor/toy/r100", "resident/executor/toy/layer"), (1.0, 2.0)
    resident = [
        row(f"{DEVICE}/{name}", ms=[t] * 4) | {"layer_ms": [t] * 4}
        for name, t in zip(names, times[::order], strict=True)
    ]
    moved = row(f"{DEVICE}/offload/executor/toy/r50", 256, ms=[3.0])
    cases, peak = [case_of(r) for r in (moved, *resident)], Peaks(3e12, 1e15, 6e10, 7e9, "datasheet")
    (found,) = judge(cases, truth(), peak, lambda case: case.moves)
    assert found.twin.case.median_s == pytest.approx(1.5e-3)
    assert found.twin.case.layer_end_s == pytest.approx([1.5e-3] * 4)


def test_only_what_is_held_out_is_judged_and_each_row_once(found):
    keys = [r.case.key for r in found.rows]
    assert len(keys) == len(set(keys)) == 3 + 16 + 12 and not any(
        "/executor/small/" in k and "/resident/" in k for k in keys
    )
    assert found.facts["points"] == {"fit": 2, "held_out": 31, "all": 34}


def test_a_row_that_was_fitted_is_not_judged(rows):
    seen = calibrated(split=replace(SPLIT, fit=("*/offload/executor/*",)))
    with pytest.raises(ConfigError, match="was fitted to 16 of the rows") as refused:
        validate_rows([rows], seen, SPLIT)
    assert refused.value.hint


def test_another_split_is_said(rows):
    other = calibrated(split=replace(SPLIT, fit=("*/calibrate/*",)))
    assert any("another split" in w for w in validate_rows([rows], other, SPLIT).warnings)


def test_rows_of_another_device_are_refused_or_marked(rows):
    elsewhere = replace(calibrated(), fit=replace(calibrated().fit, device="nvidia-a100"))
    with pytest.raises(ConfigError, match="is of nvidia-a100, the measurements are of nvidia-h100"):
        validate_rows([rows], elsewhere, SPLIT)
    with pytest.raises(ConfigError, match="NVIDIA A100"):
        validate_rows([rows], Hardware.load("a100-pcie4"), SPLIT)
    marked = validate_rows([rows], elsewhere, SPLIT, any_device=True)
    assert "one machine is from another" in marked.warnings[0]
    with pytest.raises(ConfigError, match="the split is of cpu-x"):
        validate_rows([rows], calibrated(), replace(SPLIT, device="cpu-x"))


def test_a_shipped_machine_is_known_by_its_description(rows):
    assert "was not calibrated" in validate_rows([rows], truth(), SPLIT).warnings[0]


def test_nothing_held_out_is_an_error(rows):
    with pytest.raises(ConfigError, match="holds out none"):
        validate_rows([rows], calibrated(), replace(SPLIT, held_out=("*/ssd/*",)))


def test_extrapolation_drift_and_few_samples_are_said(rows, tmp_path):
    narrow = replace(calibrated(), ranges={"attention": {"kv_bytes": (0.0, 17e6)}, "copy": {"bytes": (1e5, 1e8)}})
    work = {"phase": "offload", "run": 1, "of": "gemm"}
    sentinel = {"phase": "sentinel", "kind": "sentinel", "t": 0.0}
    sentinels = [
        sentinel | {"key": f"{DEVICE}/sentinel/{at}", "params": work | {"at": at}, "ms": [ms]}
        for at, ms in (("start", 1.0), ("end", 1.1))
    ]
    few = row(f"{DEVICE}/offload/executor/other/1x8192/r50", 100, ms=(1.0, 1.1), model="other")
    failed = {k: v for k, v in few.items() if k != "ms"} | {"key": f"{DEVICE}/offload/bad/1", "error": "out of memory"}
    more = write(tmp_path / "more.jsonl", [*sentinels, few, failed])
    said = " ".join(validate_rows([rows, more], narrow, SPLIT).warnings)
    assert "15 of 32 predictions extrapolate beyond the measured range of attention" in said
    assert "sentinels of phase offload lie 10.0 % apart" in said
    assert "1 points failed" in said and "1 rows have fewer than three samples" in said


def test_the_band_is_that_of_the_constants():
    case = case_of(row("x/resident/1", context=32768))
    plain = predict(case, truth()).seconds
    assert prediction_band(case, truth(), plain) is None
    low, high = prediction_band(case, calibrated(), plain)
    ends = [
        predict(case, truth().with_overrides({"gpu.kv_bandwidth": truth().gpu.kv_bandwidth * f})).seconds
        for f in (1.1, 0.9)
    ]
    assert (low, high) == pytest.approx(ends)  # the link's band is of no consequence here


# --- splits --------------------------------------------------------------------------------------------------


def test_a_split_is_read_and_named_by_what_it_says(tmp_path):
    text = 'device = "x"\nfit = ["*/calibrate/*"]\nheld_out = ["*/offload/*"]\n[groups]\nhost = ["*/offload/*"]\n'
    path = tmp_path / "split.toml"
    path.write_text(text)
    split = read_split(path)
    assert split.is_fit("x/calibrate/1") and split.is_held_out("x/offload/1") and not split.is_held_out("x/ssd/1")
    assert split.groups_of("x/offload/1") == ("host",) and split.groups_of("x/ssd/1") == ("other",)
    path.write_text("# a remark changes nothing\n" + text)
    assert read_split(path).fingerprint == split.fingerprint
    path.write_text(text.replace("calibrate", "info"))
    assert read_split(path).fingerprint != split.fingerprint


def test_a_key_is_fitted_or_held_out():
    both = Split("x", ("*",), ("*/offload/*",), {})
    assert both.is_fit("x/calibrate/1")
    with pytest.raises(ConfigError, match='"x/offload/1" is both'):
        both.is_held_out("x/offload/1")


@pytest.mark.parametrize(
    "text, problem",
    [
        ('fit = []\nheld_out = []', "names no device"),
        ('device = "x"\nfit = "*"\nheld_out = []', '"fit" is no list'),
        ('device = "x"\nfit = []', '"held_out" is no list'),
        ('device = "x"\nfit = []\nheld_out = []\ngroups = 3', "not a table"),
        ('device = "x"\nfit = []\nheld_out = []\n[groups]\na = [1]', '"groups.a" is no list'),
        ('device = "x"\nfit = []\nheld_out = []\nheldout = []', 'unknown key "heldout"'),
        ("device = ", "not a TOML file"),
    ],
)  # fmt: skip
def test_what_is_no_split_is_refused(tmp_path, text, problem):
    path = tmp_path / "split.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem) as refused:
        read_split(path)
    assert refused.value.where == str(path)


# --- files ---------------------------------------------------------------------------------------------------


def test_a_validation_leaves_tables_a_report_and_figures(found, tmp_path):
    folder = found.save(tmp_path / "out")
    names = {
        "manifest.json",
        "errors.parquet",
        "groups.parquet",
        "report.md",
        "predicted.png",
        "terms.png",
        "knees.png",
    }
    assert {p.name for p in folder.iterdir()} == names
    errors = pq.read_table(folder / "errors.parquet").to_pylist()
    assert len(errors) == 31
    for line in errors:
        assert line["error"] == pytest.approx(line["predicted_s"] / line["measured_s"] - 1)
        assert line["p10_s"] <= line["measured_s"] <= line["p90_s"] and line["band_low_s"] < line["band_high_s"]
        assert line["predicted_s"] == pytest.approx(line["compute_s"] + line["stall_s"] + line["submit_s"])
    groups = pq.read_table(folder / "groups.parquet").to_pylist()
    assert [(g["group"], g["predictor"]) for g in groups[:3]] == [
        ("resident", "kvsim"), ("resident", "calibrated max"), ("resident", "roofline"),
    ]  # fmt: skip
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["device"] == DEVICE and manifest["driver"] == ["555.1"] and manifest["date"] == ["2026-11-21"]
    assert manifest["rows"][0]["file"] == "rows.jsonl" and len(manifest["rows"][0]["sha256"]) == 64
    assert manifest["split"]["fingerprint"] == SPLIT.fingerprint and manifest["hardware"]["fit"]["device"] == DEVICE
    report = (folder / "report.md").read_text()
    assert f"measured on {DEVICE}, 2026-11-21; driver 555.1" in report and "| all held out | 31 |" in report
    assert "NVIDIA H100 datasheet (SXM)" in report and "small 1x32768" in report


def test_the_same_rows_give_the_same_bytes(found, rows, tmp_path):
    again = validate_rows([rows], calibrated(), SPLIT)
    first, second = found.save(tmp_path / "a"), again.save(tmp_path / "b")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_a_folder_of_something_else_is_not_overwritten(found, rows, tmp_path):
    folder = found.save(tmp_path / "out")
    with pytest.raises(ResultError, match="another run"):
        validate_rows([rows], calibrated(0.9), SPLIT).save(folder)
    assert found.save(folder) == folder


def test_the_page_of_all_errors_is_written_from_what_is_committed(rows, tmp_path, monkeypatch):
    from experiments import validation as page

    for name, path in (("ROOT", ""), ("HERE", "experiments"), ("DOCS", "docs")):
        monkeypatch.setattr(page, name, tmp_path / path)
    gpu, public = tmp_path / "experiments/gpu", tmp_path / "experiments/hardware/public_errors.json"
    for folder in (gpu / "results", public.parent, tmp_path / "docs/figures"):
        folder.mkdir(parents=True)
    page.main()
    assert "No GPU run of our own" in (tmp_path / "docs/validation.md").read_text()
    entry = {"mape": 0.061, "p90": 0.12, "worst": 0.3, "signed": -0.01, "rows": 99, "groups": 5}
    public.write_text(json.dumps({"h100-pcie5": {"gemm": {"max": entry}, "source": {"url": "x"}}}))
    (gpu / "results/1.jsonl").write_text(rows.read_text())
    write(gpu / "results/dry.jsonl", [INFO | {"key": "dry-cpu-x/info/1"}])
    (gpu / "fitted.toml").write_text(calibrated().to_toml())
    globs = {"fit": SPLIT.fit, "held_out": SPLIT.held_out} | {f"groups.{k}": v for k, v in SPLIT.groups.items()}
    split = ['device = "nvidia-*"', *(f"{name} = {json.dumps(each)}" for name, each in globs.items())]
    (gpu / "split.toml").write_text("\n".join(split))
    page.main()
    text = (tmp_path / "docs/validation.md").read_text()
    assert "| h100-pcie5 | gemm | max | 6.1 % | 12.0 % | 30.0 % | -1.0 % | 99 | 5 |" in text
    assert f"| `{DEVICE}` | 2026-11-21 | 555.1 |" in text and "| all held out | 31 |" in text
    assert "kvsim validate --rows experiments/gpu/results/1.jsonl --split experiments/gpu/split.toml" in text
    assert {p.name for p in (tmp_path / "docs/figures").iterdir()} == {
        f"validation-{DEVICE}-{name}.png" for name in ("predicted", "knees", "terms")
    }
    page.main()
    assert (tmp_path / "docs/validation.md").read_text() == text
    (tmp_path / "traces/hurt.kvtrace").mkdir(parents=True)
    page.main()
    assert "- **not read:** hurt.kvtrace: not a trace" in (tmp_path / "docs/validation.md").read_text()


# --- a trace's own steps -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trace():
    return open_trace(TRACE)


def cpu(**constants):
    """A CPU in constants, marked as fitted on the device of the shipped trace."""
    fit = Fit("cpu-amd-epyc", (), "0" * 64, ("*/calibrate/*",), "0.1.0", "2026-11-21")
    return replace(Hardware.load("h100-pcie5").with_overrides(constants), name="cpu", fit=fit)


def test_a_trace_is_compared_with_its_own_twin(trace, tmp_path):
    found = validate_trace(trace, cpu(**{"cpu.eager_submit": "1ms"}))
    (batch,) = found.batches
    assert batch.requests == list(range(8)) and len(batch.context) == 309 and batch.context[0] == 204
    assert batch.measured_s == pytest.approx(np.asarray(trace.sources[0].facts["step_seconds"]))
    s = batch.summary()
    assert s["measured_s"] == pytest.approx(np.median(batch.measured_s)) and s["sequences"] == 8
    assert s["predicted_s"] > 3 * 1e-3 and s["median_error"] == pytest.approx(s["predicted_s"] / s["measured_s"] - 1)
    assert found.facts["trace"]["fingerprint"] == trace.fingerprint and found.facts["run"]["transformers"] == "5.23.0"
    folder = found.save(tmp_path / "twin")
    assert {p.name for p in folder.iterdir()} == {
        "manifest.json", "steps.parquet", "batches.parquet", "report.md", "steps.png",
    }  # fmt: skip
    steps = pq.read_table(folder / "steps.parquet").to_pylist()
    assert len(steps) == 309 and steps[0]["step"] == 1 and steps[0]["sequences"] == 8
    assert "requests 0 to 7" in (folder / "report.md").read_text()
    assert found.save(folder) == folder


def test_the_twins_batch_is_simulated_in_line_on_a_cpu(trace):
    machine = cpu(**{"cpu.eager_submit": "1ms"})
    found = validate_trace(trace, machine).batches[0]
    shape = ModelShape("reasoner", 3, 128, 8, 4, 32, 384, 734, 4.0, 4.0)
    work = Work.idle(3, queries=8, sequences=8, kv_read=8 * 204 * shape.kv_token_bytes)
    record = simulate(eager(machine, in_line=True), shape, [work], 3.0)[0]
    assert found.predicted_s[0] == pytest.approx(record.end_s)


def test_a_trace_of_another_device_is_refused_or_marked(trace):
    with pytest.raises(ConfigError, match="the measurements are of cpu-amd-epyc"):
        validate_trace(trace, Hardware.load("h100-pcie5"))
    assert (
        "one machine is from another" in validate_trace(trace, Hardware.load("h100-pcie5"), any_device=True).warnings[0]
    )


def test_batches_and_missing_times(trace):
    def source(i, slot, **facts):
        plain = type(trace.sources[0])(TRACE, trace.manifest, {"request": i, "prompt_len": 5 + i, "n_steps": 2 + i})
        plain.__dict__["facts"] = {"batch_slot": slot, "step_seconds": np.full(2 + i, 0.004)} | facts
        return plain

    apart = replace(trace, sources=[source(0, 0), source(1, 1), source(2, 0)])
    found = validate_trace(apart, cpu()).batches
    assert [b.requests for b in found] == [[0, 1], [2]] and [b.context.tolist() for b in found] == [
        [7, 8, 9],
        [8, 9, 10, 11],
    ]
    assert validate_trace(apart, cpu()).warnings[1:] == []
    uneven = replace(trace, sources=[source(0, 0, step_seconds=np.array([0.001, 0.009]))])
    assert validate_trace(uneven, cpu()).id != validate_trace(replace(trace, sources=[source(0, 0)]), cpu()).id
    warning = validate_trace(uneven, cpu()).warnings[-1]
    assert warning == "request 0: measured steps spread over 128% of their median: they judge no model"
    assert np.isnan(found[0].captured_s).all() and math.isnan(found[0].summary()["drift_measured"])
    untimed = source(0, 0)
    del untimed.facts["step_seconds"]
    with pytest.raises(TraceError, match="no step times"):
        validate_trace(replace(trace, sources=[untimed]), cpu())
    unnamed = replace(trace, manifest={k: v for k, v in trace.manifest.items() if k != "hardware"})
    with pytest.raises(TraceError, match="which device and framework"):
        validate_trace(unnamed, cpu())


def test_ranges_are_heeded_for_traces_too(trace):
    narrow = replace(cpu(), ranges={"gemm": {"parameters": (1e6, 1e9), "rows": (1, 4)}})
    said = " ".join(validate_trace(trace, narrow).warnings)
    assert "extrapolated: gemm: parameters 65536" in said and "rows 8" in said
