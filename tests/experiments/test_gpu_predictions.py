"""Predictions registered before a GPU is measured: whole, not stale, made as rows are judged, and frozen afterwards."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from experiments import gpu_campaign as campaign  # noqa: E402
from experiments import gpu_predictions as registering  # noqa: E402
from experiments import validation  # noqa: E402
from kvsim.errors import ConfigError  # noqa: E402
from kvsim.machine import Hardware, ModelShape  # noqa: E402
from kvsim.machine.compute import gemm_seconds  # noqa: E402
from kvsim.machine.hardware import Fit  # noqa: E402
from kvsim.measure import probes  # noqa: E402
from kvsim.measure.rows import device_of, quantiles, read_rows  # noqa: E402
from kvsim.trace.layout import file_hash  # noqa: E402
from kvsim.validate import read_split  # noqa: E402
from kvsim.validate.cases import PHASES, case_of  # noqa: E402
from kvsim.validate.predict import predict  # noqa: E402
from kvsim.validate.registered import Outcome, Registration, read_registration  # noqa: E402
from tests.experiments.test_gpu_campaign import EIGHT, a_plan  # noqa: E402

PATH = registering.HERE / "predictions.json"
AGAIN = """the file is not what `python -m experiments.gpu_predictions` makes now: the model, a shipped hardware file,
the campaign or its plans have changed. Register again with that command, then run `python -m experiments.validation`.
That is right only while {device} has no rows in experiments/gpu/results; from then on the command leaves it alone."""


@pytest.fixture(scope="module")
def book():
    return read_registration(PATH)


@pytest.fixture(scope="module")
def frozen():
    """Devices that are measured: what was registered for them is history."""
    return registering.measured_devices(registering.HERE / "results")


def test_what_is_registered_is_what_the_shipped_files_say_now(book, frozen):
    for device, made in registering.predictions([d for d in registering.DEVICES if d not in frozen]).devices.items():
        assert book.of(device) == made, AGAIN.format(device=device)


def test_the_file_is_written_in_one_way_and_is_small(book, tmp_path):
    book.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == PATH.read_bytes()
    assert PATH.stat().st_size < 600_000


def test_the_report_names_the_file_that_is_there():
    assert file_hash(PATH) in (validation.DOCS / "validation.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("device", registering.DEVICES)
def test_every_point_that_is_listed_has_a_prediction_or_a_reason(book, device, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probes, "check_disk", lambda folder, nbytes: None)  # nothing is written
    assert campaign.main(["--list", device, "--disk", str(tmp_path), "--resume"]) == 0
    listed = [line.split(" s  ")[1] for line in capsys.readouterr().out.splitlines() if " s  " in line]
    keys = [f"{device}/{key}" for key in listed]
    entry = book.of(device)
    assert [key for key in keys if entry.ms(key) is None and entry.reason(key) is None] == []
    assert len(set(keys)) == len(keys) and set(listed) >= entry.by_key.keys()
    steps = [key for key in keys if key.split("/")[1] in PHASES]
    assert len(steps) > 200 and all(entry.ms(key) for key in steps)  # no reason excuses a step


def test_each_device_is_predicted_from_the_one_shipped_file_that_describes_it():
    found = [registering.hardware_of(device).name for device in registering.DEVICES]
    assert found == ["h100-pcie5.toml", "h200-pcie5.toml"]
    with pytest.raises(ConfigError, match="0 shipped hardware files describe nvidia-b300"):
        registering.hardware_of("nvidia-b300")


def test_operators_are_predicted_by_hand_and_as_steps_are():
    h = Hardware.load("h100-pcie5")
    gib, latency = 1 << 30, h.h2d.latency + h.h2d.per_copy
    seconds = registering.constant_seconds
    assert seconds("copy", {"path": "h2d-pinned", "bytes": gib}, h) == pytest.approx(latency + gib / 50e9)
    assert seconds("copy", {"path": "d2h-pageable", "bytes": gib}, h) == pytest.approx(latency + gib / 12e9)
    chunks = {"path": "h2d-pinned", "chunk": 65536, "n": 16}
    assert seconds("chunks", chunks, h) == pytest.approx(10e-6 + 16 * 1.5e-6 + 16 * 65536 / 50e9)
    assert seconds("host_copy", {"threads": 2, "bytes": 10**9}, h) == pytest.approx(0.05)
    up = ModelShape("8b", 32, 4096, 32, 8, 128, 14336, 128256).gemms[2]
    p = {"out": 28672, "inp": 4096, "rows": 8, "value_bytes": 2}
    assert seconds("gemm", p, h) == pytest.approx(gemm_seconds(h.gpu, up, 8))
    assert seconds("memory", {"bytes": gib}, h) is None


def test_errors_of_a_group_by_hand():
    """Errors -1/2, 0 and 1/4 of what was measured; one of four was not."""
    o = Outcome.of("g", {"a": 1.0, "b": 2.0, "c": 5.0, "d": 9.0}, {"a": 2.0, "b": 2.0, "c": 4.0, "other": 1.0})
    assert (o.registered, o.n) == (4, 3)
    assert (o.mape, o.worst, o.signed) == (pytest.approx(0.25), pytest.approx(0.5), pytest.approx(-0.25 / 3))
    assert o.p90 == pytest.approx(0.45)


# -- a dry campaign, registered before and judged after --------------------------------------------------------------


def asked(folder, *more):
    where = ["--out", str(folder / "out"), "--disk", str(folder), "--plans", str(folder / "plans"), "--resume"]
    return ["--dry", "--models", EIGHT, *more, *where]


def of_dry(folder, hardware, sha256="0" * 64):
    """What is registered for the dry campaign's device, and its rows as they are expected, by key."""
    with campaign.ExitStack() as stack:
        c = campaign.Campaign(campaign.arguments(asked(folder, "--list")))
        c.open(stack)
        expected = {
            c.key(p.key): registering.row_of(p) for phase in registering.STEPS for p in campaign.PHASES[phase](c)
        }
        return registering.registered(c, hardware, sha256, read_split(folder / "split.toml")), expected


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """Folder, what was registered, expected rows, and the rows that were measured then."""
    folder = tmp_path_factory.mktemp("registered")
    a_plan(folder / "plans" / "lru.parquet")
    text = (registering.HERE / "split.toml").read_text(encoding="utf-8")
    (folder / "split.toml").write_text(text.replace("nvidia-*", "dry-*"), encoding="utf-8")
    entry, expected = of_dry(folder, Hardware.load("h100-pcie5"))
    Registration({entry.device: entry}).save(folder / "predictions.json")
    assert campaign.main(asked(folder, "--phase", "info,calibrate,resident,offload,ssd")) == 0
    return folder, entry, expected, read_rows([folder / "out" / "results.jsonl"])


def machine(folder, *more):
    rows = (folder / "out" / "results.jsonl", *more)
    return validation.Machine(device_of(read_rows(rows)), folder / "split.toml", rows, None)


def test_a_row_is_expected_as_it_is_measured(dry):
    """All it says was done, the copies among it, but for what only doing it tells."""
    *_, expected, rows = dry
    told_by_doing = {"checked_pages", "checked_steps", "same_steps", "worst_difference", "waiting", "mode", "direct"}
    measured = [row for row in rows if row["phase"] in PHASES and "ms" in row]
    assert len(measured) == 7 + 2 * 3 + 1 + 12 + 2
    for row in measured:
        wanted = expected[row["key"]]["params"]
        assert {k: v for k, v in row["params"].items() if k not in told_by_doing} == {
            k: v for k, v in wanted.items() if k not in told_by_doing
        }, row["key"]


def test_it_is_predicted_as_the_measured_row_is_judged(dry):
    _, entry, _, rows = dry
    hardware, seen = Hardware.load("h100-pcie5"), 0
    for row in rows:
        if row["phase"] in PHASES and "ms" in row:
            assert entry.ms(row["key"]) == pytest.approx(1e3 * predict(case_of(row), hardware).seconds, rel=1e-4)
            seen += 1
    assert seen == 28


def test_the_report_sets_what_was_registered_beside_what_came_out(dry):
    folder, entry, _, rows = dry
    lines = list(validation.registered(folder / "predictions.json", [machine(folder)], {}))
    text = "\n".join(lines)
    assert f"Registered: {len(entry.by_key)} rows on 1 devices" in text
    assert file_hash(folder / "predictions.json") in text and "No GPU" not in text
    medians = {r["key"].partition("/")[2]: quantiles(r["ms"])["p50"] for r in rows if "ms" in r}
    for group, members in entry.groups.items():
        off = [ms / medians[key] - 1 for key, ms in members.items() if key in medians]
        (line,) = (line for line in lines if line.startswith(f"| {group} |"))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1] == f"{len(off)} of {len(members)}"
        if off:
            mape, worst, signed = sum(map(abs, off)) / len(off), max(map(abs, off)), sum(off) / len(off)
            assert (cells[2], cells[4], cells[5]) == (
                f"{100 * mape:.1f} %", f"{100 * worst:.1f} %", f"{100 * signed:+.1f} %",
            )  # fmt: skip
    assert cells[8:] == [""] * 4  # nothing is fitted
    half = f"offload/executor/{EIGHT}/1x64/r50"
    (curve,) = (line for line in lines if line.startswith(f"| {EIGHT} 1x64 |"))
    assert f"{entry.by_key[half]:.3g} / {medians[half]:.3g}" in curve


def test_what_is_fitted_since_stands_beside_what_was_registered(book, tmp_path):
    """An H100 on which every step of 8B at 8,192 tokens takes 1.1 times what was registered: the order is right, the
    knee is, and each error is 1 / 1.1 - 1."""
    device = registering.DEVICES[0]
    with campaign.ExitStack() as stack:
        c = campaign.Campaign(campaign.arguments(["--list", device, "--resume"]))
        c.open(stack)
        points = [p for phase in ("resident", "offload") for p in campaign.PHASES[phase](c)]
        steps = {p.key: registering.row_of(p) for p in points if f"/{EIGHT}/1x8192" in p.key}
    rows = [
        {"key": f"{device}/{key}", "phase": key.split("/")[0], "kind": "executor", "params": row["params"],
         "ms": [1.1 * book.of(device).ms(f"{device}/{key}")] * 3, "t": 0.0}
        for key, row in steps.items()
    ]  # fmt: skip
    (tmp_path / "1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    split = registering.HERE / "split.toml"
    shipped, fingerprint = Hardware.load("h100-pcie5"), read_split(split).fingerprint
    known = shipped.with_constants({key: replace(k, low=None, high=None) for key, k in shipped.constants.items()})
    fit = Fit(device, (("1.jsonl", "0" * 64),), "0" * 64, ("*/calibrate/*",), "0.1.0", "2026-11-21", fingerprint)
    (tmp_path / "fitted.toml").write_text(replace(known, fit=fit).to_toml(), encoding="utf-8")
    fitted = validation.Machine(device, split, (tmp_path / "1.jsonl",), tmp_path / "fitted.toml")
    v = fitted.validate()
    lines = list(validation.registered(PATH, [fitted], {fitted: v}))
    (line,) = (line for line in lines if line.startswith("| executor-host |"))
    s = v.summary("executor-host")
    since = [f"{100 * x:.1f} %" for x in (s.mape, s.p90, s.worst)] + [f"{100 * s.signed:+.1f} %"]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "executor-host", "7 of 63", "9.1 %", "9.1 %", "9.1 %", "-9.1 %", "1.00 (21)", "0.00 (1)", *since,
    ]  # fmt: skip
    assert any(line.startswith("| ablation | 16 of 16 |") for line in lines)
    assert any(line.startswith("| plans | 4 of 12 |") for line in lines)


def test_a_campaign_cut_off_after_its_calibration_has_a_report_too(dry, tmp_path):
    """Nothing that is held out was measured: no order and no knee, and 0 of the rows that judge."""
    folder, entry, _, rows = dry
    known = [row for row in rows if row["phase"] in ("info", "sentinel", "calibrate")]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in known), encoding="utf-8")
    (tmp_path / "split.toml").write_bytes((folder / "split.toml").read_bytes())
    lines = list(validation.registered(folder / "predictions.json", [machine(tmp_path)], {}))
    (line,) = (line for line in lines if line.startswith("| executor-host |"))
    assert line.split("|")[2].strip() == f"0 of {len(entry.groups['executor-host'])}"
    (copies,) = (line for line in lines if line.startswith("| calibrate/copy |"))
    assert "0 of" not in copies and " %" in copies


def test_a_row_that_was_not_registered_is_an_error_in_words(dry, tmp_path):
    folder, entry, _, rows = dry
    row = next(row for row in rows if row["key"].endswith("/r50"))
    more = {**row, "key": f"{entry.device}/offload/executor/{EIGHT}/1x64/r55"}
    (tmp_path / "more.jsonl").write_text(json.dumps(more) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"1 measured rows have no registered prediction .*/r55 first"):
        list(validation.registered(folder / "predictions.json", [machine(folder, tmp_path / "more.jsonl")], {}))


def test_a_device_of_which_nothing_was_registered_is_said_to_be_one(dry, tmp_path):
    folder = dry[0]
    Registration({}).save(tmp_path / "none.json")
    lines = list(validation.registered(tmp_path / "none.json", [machine(folder)], {}))
    assert lines[-1] == "Nothing was registered for this device before it was measured."


def test_a_change_of_the_hardware_shows(dry):
    folder, entry, *_ = dry
    slow, _ = of_dry(folder, Hardware.load("h100-pcie5").with_overrides({"link.h2d.bandwidth": 1e9}))
    assert slow.groups["resident"] == entry.groups["resident"]
    assert slow.groups["executor-host"] != entry.groups["executor-host"] and slow != entry


# -- when it may be written ------------------------------------------------------------------------------------------


def registered_again(monkeypatch, folder, before, made, measured=()):
    """Exit code and file of the command, where `made` is what it would register, and `measured` devices have rows."""
    monkeypatch.setattr(registering, "predictions", lambda devices: Registration({d: made[d] for d in devices}))
    if before is not None:
        Registration(before).save(folder / "predictions.json")
    (folder / "results").mkdir()
    for device in measured:
        row = {"key": f"{device}/info/1", "phase": "info", "kind": "info", "params": {}, "t": 0.0}
        (folder / "results" / f"{device}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    code = registering.main(["--out", str(folder / "predictions.json"), "--results", str(folder / "results")])
    return code, read_registration(folder / "predictions.json").devices


def test_a_measured_device_keeps_what_was_registered_and_the_others_are_written_again(book, tmp_path, monkeypatch):
    h100, h200 = registering.DEVICES
    old = {device: replace(book.of(device), split="of that time") for device in registering.DEVICES}
    code, now = registered_again(monkeypatch, tmp_path, old, dict(book.devices), [h200])
    assert code == 0 and now[h200] == old[h200] and now[h100] == book.of(h100) != old[h100]


def test_a_measured_device_that_was_not_registered_cannot_be_any_more(book, tmp_path, monkeypatch, capsys):
    h100, h200 = registering.DEVICES
    _, now = registered_again(monkeypatch, tmp_path, None, dict(book.devices), [h200])
    assert set(now) == {h100} and f"{h200} is measured: too late to register" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[]", '{"format": "other", "version": 1, "devices": {}}', '{"devices": 3}'])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "predictions.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="no file of registered predictions"):
        read_registration(tmp_path / "predictions.json")
    with pytest.raises(ConfigError, match="cannot read"):
        read_registration(tmp_path / "absent.json")
