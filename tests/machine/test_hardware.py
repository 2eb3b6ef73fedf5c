"""Hardware files: the shipped ones, overrides, and every way a file can be wrong."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tomllib
from dataclasses import replace

import pytest

from kvsim.errors import ConfigError
from kvsim.machine import SHAPES, Constant, Hardware, Work
from kvsim.machine.compute import work_seconds
from kvsim.machine.hardware import EVIDENCE, FOLDER, KINDS, Fit, shipped

NAMES = {"h100-pcie5", "h200-pcie5", "a100-pcie4", "rtx4090-pcie4", "rtxpro6000-pcie5"}
PLAIN = {"count", "share", "excess", "choice", "flag"}


def test_shipped_files():
    assert set(shipped()) >= NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_constant_has_unit_and_evidence(name):
    hw = Hardware.load(name)
    assert hw.name == name and set(hw.constants) == set(KINDS)
    for key, constant in hw.constants.items():
        assert constant.evidence in EVIDENCE and constant.source, key
        assert (KINDS[key] in PLAIN) or str(constant.value)[-1].isalpha(), key


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_file_survives_a_round_trip(name):
    hw = Hardware.load(name)
    assert hw.to_toml() == (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    assert Hardware.from_table(tomllib.loads(hw.to_toml()), hw.where) == hw


def test_measured_gpus_are_fitted():
    for name in ("h100-pcie5", "rtx4090-pcie4", "rtxpro6000-pcie5"):
        constants = Hardware.load(name).constants
        for key in ("weight_bandwidth", "kv_bandwidth", "gemm_flops", "attention_flops", "kernel_time"):
            assert constants[f"gpu.{key}"].evidence == "fitted"


def test_the_same_chip_with_faster_memory_is_nowhere_slower():
    h100, h200, shape = Hardware.load("h100-pcie5").gpu, Hardware.load("h200-pcie5").gpu, SHAPES["llama-3.1-8b"]
    for prefill, context, sequences in itertools.product((False, True), (512, 8192, 32768), (1, 16)):
        queries = sequences * context if prefill else sequences
        kv_read = context * sequences * shape.kv_token_bytes
        work = Work.idle(shape.layers, queries=queries, sequences=sequences, prefill=prefill, kv_read=kv_read)
        there, here = (work_seconds(gpu, shape, work).sum() for gpu in (h200, h100))
        assert there <= here, (prefill, context, sequences)
        assert prefill or context < 8192 or there < 0.8 * here, (context, sequences)


def test_a_file_by_path(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(Hardware.load("h100-pcie5").to_toml().replace('"h100-pcie5"', '"mine"'))
    assert Hardware.load(path).name == "mine" == Hardware.load(str(path)).name


def test_overrides():
    hw = Hardware.load("h100-pcie5")
    changed = hw.with_overrides({"link.h2d.bandwidth": "12GB/s", "gpu.staging_layers": 4, "link.d2h.latency": 5e-6})
    assert (changed.h2d.bandwidth, changed.gpu.staging_layers, changed.d2h.latency) == (12e9, 4, 5e-6)
    assert changed.constants["link.h2d.bandwidth"].source == "override"
    assert hw.h2d.bandwidth == 50e9
    assert hw.with_overrides({"link.h2d.bandwidth": float("inf")}).h2d.bandwidth == float("inf")
    measured = hw.with_constants({"gpu.kernel_time": Constant("2us", "measured", "this machine")})
    assert measured.gpu.kernel_time == 2e-6 and measured.constants["gpu.kernel_time"].evidence == "measured"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ({"link.h2d.bandwith": "1GB/s"}, 'did you mean "link.h2d.bandwidth"'),
        ({"link.h2d.bandwidth": "-1GB/s"}, "link.h2d.bandwidth"),
        ({"link.h2d.bandwidth": "0GB/s"}, "not positive"),
        ({"link.h2d.bandwidth": "25"}, "no unit"),
        ({"link.h2d.bandwidth": "25GB"}, "GB/s"),
        ({"gpu.kernel_time": "-1us"}, "gpu.kernel_time"),
        ({"gpu.staging_layers": 1.5}, "whole number"),
        ({"gpu.staging_layers": -1}, "whole number"),
        ({"link.h2d.duplex": 1.5}, "at most 1"),
        ({"gpu.copy_slowdown": -0.1}, "0 or more"),
        ({"host.merge": 1}, "true or false"),
        ({"host.copies": "magic"}, "staged"),
    ],
)
def test_bad_overrides(override, says):
    with pytest.raises(ConfigError, match=says):
        Hardware.load("h100-pcie5").with_overrides(override)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('name = "h100-pcie5"\n', "", '"name" is missing'),
        ("[cpu]", "[cpus]", "cpus"),
        ("kernel_time", "kernel_tim", "gpu.kernel_tim"),
        ("[host]\n", "[host]\ncolour = 3\n", "host.colour"),
        ('{value = "81559MiB", ', '{value = "81559MiB", note = "x", ', "note"),
        ('{value = "81559MiB", ', "{", '"value" is missing'),
        ('{value = "81559MiB", ', "{value = 80, ", "gpu.memory: 80 has no unit"),
        ('{value = "81559MiB", ', '{value = "80", ', "no unit"),
        ('{value = "81559MiB", ', '{value = "80GX", ', "unknown unit"),
        ('evidence = "datasheet"', 'evidence = "hearsay"', "hearsay"),
        ('source = "pinned host cache"', 'source = ""', "source is empty"),
        ('{value = "50GB/s"', '{value = "-50GB/s"', "link.h2d.bandwidth"),
        ("[gpu]", "[gpu", "not TOML"),
        ("[ssd]", "[ssd]\n[ssd.raid]", "ssd.raid"),
    ],
)
def test_bad_files_name_file_and_key(tmp_path, old, new, says):
    text = Hardware.load("h100-pcie5").to_toml()
    assert old in text
    path = tmp_path / "bad.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=says) as caught:
        Hardware.load(path)
    assert "bad.toml" in str(caught.value)


# --- what a calibrated file holds beside ----------------------------------------------------------------------


def calibrated() -> Hardware:
    hw = Hardware.load("h100-pcie5").with_constants(
        {
            "gpu.kernel_time": Constant(
                "2us", "fitted", "here", "1.5us", "2500ns", "median of 9", "2026-11-21", residual=0.02
            ),
            "ssd.queue_depth": Constant(16, "measured", "here", 4, 32),
        }
    )
    fit = Fit(
        device="nvidia-h100",
        rows=(("a.jsonl", "0" * 64), ("b.jsonl", "1" * 64)),
        keys="f" * 64,
        patterns=("nvidia-h100/calibrate/*", "nvidia-h100/resident/*/1b/*"),
        kvsim="0.1.0",
        date="2026-11-21",
        split="abc",
        drift={"calibrate": 0.01},
    )
    return replace(hw, fit=fit, ranges={"gemm": {"rows": (1, 4096)}, "copy": {"bytes": (4096, 1e9)}})


def test_a_calibrated_file_survives_a_round_trip(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(calibrated().to_toml())
    loaded = Hardware.load(path)
    assert replace(loaded, where=None) == replace(calibrated(), where=None)
    assert loaded.constants["gpu.kernel_time"].high == "2500ns" and loaded.gpu.kernel_time == 2e-6
    assert loaded.with_overrides({"gpu.kernel_time": "9us"}).constants["gpu.kernel_time"].low is None


def test_a_file_knows_the_rows_it_was_fitted_to():
    fit = calibrated().fit
    assert fit.covers("nvidia-h100/calibrate/gemm/1") and fit.covers("nvidia-h100/resident/bare/1b/4/512")
    assert not fit.covers("nvidia-h100/resident/bare/8b/4/512") and not fit.covers("cpu-x/calibrate/gemm/1")


def test_what_lies_outside_of_the_measured_range_is_said():
    hw = calibrated()
    assert hw.outside("gemm", rows=1, parameters=1e12) == hw.outside("attention", sequences=1e9) == []
    assert hw.outside("copy", bytes=1e9, copies=7) == []
    (said,) = hw.outside("gemm", rows=8192)
    assert said == "gemm: rows 8192 lies outside of the measured 1 to 4096"
    assert Hardware.load("h100-pcie5").outside("gemm", rows=8192) == []


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('low = "1.5us"', 'low = "3us"', "gpu.kernel_time: .low. is 3us, above"),
        ('low = "1.5us"', 'low = "2100ns"', "2us lies outside of its band, 2100ns to 2500ns"),
        ('low = "1.5us"', 'low = "-1us"', 'gpu.kernel_time: "low"'),
        ('low = "1.5us"', 'low = "1.5"', "no unit"),
        ('low = "1.5us"', "low = 1.5", "no unit"),
        ('low = "1.5us", ', "", "half a band"),
        ('low = "1.5us"', "low = true", "low = True will not do"),
        ('date = "2026-11-21", residual', 'date = "yesterday", residual', "2026-11-21"),
        ("residual = 0.02", "residual = -0.02", "residual = -0.02"),
        ("residual = 0.02", 'residual = "2 %"', "a share"),
        ('method = "median of 9"', 'method = ""', "method"),
        ('method = "median of 9"', "sigma = 1", "sigma"),
        ('device = "nvidia-h100"', 'gpu = "nvidia-h100"', '"gpu" is not understood'),
        ('device = "nvidia-h100"', "device = 3", "not what kvsim calibrate writes"),
        ('device = "nvidia-h100"\n', "", "not what kvsim calibrate writes"),
        ("drift = {calibrate = 0.01}", "drift = 3", "not what kvsim calibrate writes"),
        ("rows = [1, 4096]", "rows = [4096, 1]", "range.gemm.rows"),
        ("rows = [1, 4096]", "rows = 4096", "range.gemm.rows"),
        ("rows = [1, 4096]", "columns = [1, 4096]", 'unknown "range.gemm.columns"'),
        ("[range.gemm]", "[range.gem]", 'unknown "range.gem"'),
    ],
)
def test_bad_calibrated_files_name_file_and_key(tmp_path, old, new, says):
    text = calibrated().to_toml()
    assert old in text
    path = tmp_path / "bad.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=says) as caught:
        Hardware.load(path)
    assert "bad.toml" in str(caught.value)


def test_a_band_is_around_a_number():
    with pytest.raises(ConfigError, match="host.merge.*no number"):
        Hardware.load("h100-pcie5").with_constants({"host.merge": Constant(True, "measured", "here", 0, 1)})


def test_a_missing_constant_is_named(tmp_path):
    lines = Hardware.load("h100-pcie5").to_toml().splitlines()
    path = tmp_path / "bad.toml"
    path.write_text("\n".join(line for line in lines if not line.startswith("kv_bandwidth")))
    with pytest.raises(ConfigError, match='"gpu.kv_bandwidth" is missing'):
        Hardware.load(path)


def test_unknown_name():
    with pytest.raises(ConfigError, match="h100-pcie5"):
        Hardware.load("h100-pcie6")
    with pytest.raises(ConfigError, match="no hardware"):
        Hardware.load("nowhere/else.toml")


def test_hardware_and_compute_load_no_simpy():
    code = (
        "import sys; sys.modules['simpy'] = None; from kvsim.machine import Hardware, Work; Hardware.load('h100-pcie5')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
