"""Calibration: fits find the constants that made the rows, bands hold them, and the file says what it rests on."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace

import numpy as np
import pytest

from kvsim.calibrate import calibrate, chosen, fit, notes, rows_beside, summary
from kvsim.errors import ConfigError
from kvsim.machine import Hardware
from kvsim.machine.compute import (
    ModelShape,
    decode_attention_seconds,
    gemm_seconds,
    head_seconds,
    prefill_attention_seconds,
)
from kvsim.machine.fit import LINEAR
from kvsim.machine.fit_moves import enough_depth, host_fit, host_form, link_fit, link_form, robust_terms, ssd_form
from kvsim.machine.hardware import KINDS
from kvsim.measure.rows import read_rows
from kvsim.validate.split import Split

BASE = Hardware.load("h100-pcie5")
TRUE = {
    "gpu.weight_bandwidth": 2.5e12, "gpu.gemm_flops": 7e14, "gpu.kernel_time": 3e-6,
    "gpu.kv_bandwidth": 2.1e12, "gpu.attention_fixed": 9e-6, "gpu.attention_per_sequence": 2e-7,
    "gpu.attention_flops": 4e14, "gpu.attention_row_keys": 500,
    "gpu.layer_gap": 8e-6, "gpu.step_sync": 35e-6, "gpu.copy_slowdown": 0.05, "cpu.layer_submit": 7e-6,
    "link.h2d.bandwidth": 52e9, "link.h2d.latency": 9e-6, "link.h2d.per_copy": 1.5e-6, "link.h2d.submit": 3e-6,
    "link.h2d.pageable_bandwidth": 11e9, "link.h2d.duplex": 0.85,
    "link.d2h.bandwidth": 48e9, "link.d2h.latency": 11e-6, "link.d2h.per_copy": 1.2e-6, "link.d2h.submit": 4e-6,
    "link.d2h.pageable_bandwidth": 9e9, "link.d2h.duplex": 0.9,
    "host.bandwidth": 150e9, "host.thread_bandwidth": 11e9, "host.copy_threads": 8,
    "ssd.read_bandwidth": 6e9, "ssd.read_iops": 3e5, "ssd.read_latency": 80e-6,
    "ssd.write_bandwidth": 4e9, "ssd.write_iops": 1.5e5, "ssd.write_latency": 30e-6,
    "ssd.queue_depth": 32, "ssd.mixed": 0.6,
}  # fmt: skip
RATES = ("gpu.weight_bandwidth", "gpu.gemm_flops", "gpu.kv_bandwidth", "gpu.attention_flops", "gpu.kernel_time")
LOSSES = ("gpu.attention_fixed", "gpu.attention_per_sequence", "gpu.attention_row_keys")
SHAPE = ModelShape("1b", 16, 2048, 32, 8, 64, 8192, 128256)


class Machine:
    """A machine with known constants that "measures" rows, with noise, and a slow outlier now and then."""

    def __init__(self, noise: float = 0.0, outliers: float = 0.0, device: str = "gpu-x"):
        self.draw, self.noise, self.outliers, self.device = np.random.default_rng(1), noise, outliers, device
        self.rows: list[dict] = []
        known = {k.removeprefix("gpu."): v for k, v in TRUE.items() if k.startswith("gpu.")}
        self.gpu = replace(BASE.gpu, **{**LINEAR, "prefill_tile_rows": BASE.gpu.prefill_tile_rows, **known})

    def disturbed(self, seconds: float, samples: int) -> list[float]:
        slow = np.where(self.draw.random(samples) < self.outliers, 2.0, 1.0)
        return (1e3 * seconds * slow * np.exp(self.noise * self.draw.normal(size=samples))).tolist()

    def add(self, kind: str, params: dict, seconds: float, samples: int = 1, phase: str = "calibrate", **more: float):
        extra = {k: self.disturbed(v, 9) if k.endswith("_ms") else v for k, v in more.items()}
        key = f"{self.device}/{phase}/{kind}/" + "/".join(map(str, params.values()))
        row = {"key": key, "phase": phase, "kind": kind, "params": params, "t": 1.0}
        self.rows.append({**row, "ms": self.disturbed(seconds, samples), **extra})

    def measure(self) -> list[dict]:
        self.compute()
        for way in ("h2d", "d2h"):
            self.link(way)
        self.rest()
        return self.rows

    def compute(self) -> None:
        for out, inp in ((3072, 2048), (16384, 2048), (2048, 8192), (28672, 4096)):
            for n in (1, 4, 16, 64, 1024, 2048, 4096, 8192):
                params = {"out": out, "inp": inp, "rows": n, "value_bytes": 2}
                self.add("gemm", params, gemm_seconds(self.gpu, out * inp, n))
        for kind in ("norm", "add", "silu"):
            self.add("small", {"kind": kind}, TRUE["gpu.kernel_time"])
        size = {"heads": 32, "kv_heads": 8, "head_dim": 128}
        for sequences in (1, 4, 32):
            for context in (512, 8192, 65536):
                params = {**size, "sequences": sequences, "context": context, "value_bytes": 2}
                kv = 4096.0 * sequences * context
                self.add("attention", params, float(decode_attention_seconds(self.gpu, sequences, kv)))
            for queries in (512, 2048, 8192, 32768):
                shape = ModelShape("", 1, 1, 32, 8, 128, 1, 0)
                seconds = float(prefill_attention_seconds(self.gpu, shape, queries, sequences, queries))
                self.add("prefill", {**size, "sequences": sequences, "queries": queries, "value_bytes": 2}, seconds)

    def link(self, way: str) -> None:
        c = {k.rpartition(".")[2]: v for k, v in TRUE.items() if k.startswith(f"link.{way}.")}
        for nbytes in 4096 * 4 ** np.arange(10):
            pinned = float(link_form(c, 1, nbytes))
            self.add("copy", {"path": f"{way}-pinned", "bytes": int(nbytes)}, pinned)
            unpinned = {"path": f"{way}-pageable", "bytes": int(nbytes)}
            self.add("copy", unpinned, 2e-5 + nbytes / c["pageable_bandwidth"])
        for chunk in (8192, 65536, 1 << 20):
            for n in (16, 128, 512):
                params = {"path": f"{way}-pinned", "chunk": chunk, "n": n}
                self.add("chunks", params, float(link_form(c, n, n * chunk)), submit_ms=1e-5 + n * c["submit"])
        self.add("duplex", {"path": f"{way}-pinned", "bytes": 1}, 1.0 / c["duplex"], 20, alone_ms=1.0)

    def rest(self) -> None:
        self.add("contention", {"of": "gemm"}, 1.05, 20, alone_ms=1.0)
        self.add("launch", {"kind": "graph", "n": 100}, 100 * 6e-6, 8)
        self.add("launch", {"kind": "event", "n": 100}, 100 * 1e-6, 8)
        self.add("launch", {"kind": "gap", "n": 100}, 100 * 10e-6, 8, alone_ms=100 * 2e-6)
        self.add("small", {"kind": "sample"}, TRUE["gpu.step_sync"], 20)
        host = {k.rpartition(".")[2]: v for k, v in TRUE.items() if k.startswith("host.")}
        for threads in (1, 2, 4, 8, 16):
            self.add("host_copy", {"threads": threads, "bytes": 1 << 28}, float(host_form(host, threads, 1 << 28)))
        for rw in ("read", "write"):
            c = {name: TRUE[f"ssd.{rw}_{name}"] for name in ("bandwidth", "iops", "latency")}
            for block in (4096, 16384, 65536, 262144, 1048576):
                for depth in (1, 4, 16, 32):
                    rate = float(ssd_form(c, block, depth) * np.exp(self.noise * self.draw.normal())) / 1e9
                    self.ssd(rw, block, depth, rate)
            self.ssd(f"{rw}-beside-" + ("write" if rw == "read" else "read"), 1048576, 16, 0.6 * c["bandwidth"] / 1e9)

    def ssd(self, rw: str, block: int, depth: int, rate: float) -> None:
        self.add("ssd", {"rw": rw, "block": block, "depth": depth, "direct": True}, 1e-4, gb_per_s=rate, p50_us=1.0)


def quickly(rows, *more, **given) -> Hardware:
    """The fit, its bands from a few draws."""
    return fit(rows, BASE, *more, **given, draws=4)


def value(hw: Hardware, key: str) -> float:
    table, _, name = key.rpartition(".")
    return getattr(getattr(hw, table.rpartition(".")[2]), name)


def edges(hw: Hardware, key: str) -> tuple[float, float]:
    return tuple(hw._value(key, part) for part in ("low", "high"))


def test_constants_come_back_without_noise():
    """Rates and everything that is told by a measurement of its own; small losses may stand in for one another."""
    m = Machine()
    hw = quickly(m.measure())
    for key, true in TRUE.items():
        if key not in LOSSES:
            assert value(hw, key) == pytest.approx(true, rel=0.02 if key in RATES else 2e-3), key
        assert hw.constants[key].evidence in ("fitted", "measured") and hw.constants[key].method
    for row in (row for row in m.rows if row["kind"] == "attention"):
        p = row["params"]
        kv = 4096.0 * p["sequences"] * p["context"]
        found = float(decode_attention_seconds(hw.gpu, p["sequences"], kv, p["kv_heads"], 512.0))
        assert found == pytest.approx(1e-3 * row["ms"][0], rel=0.01)


def test_constants_come_back_from_noisy_rows_with_outliers():
    hw = quickly(Machine(noise=0.03, outliers=0.06).measure())
    near = {
        "gpu.copy_slowdown": 0.3,
        "ssd.read_latency": 0.1,
        "ssd.write_latency": 0.1,
        "host.copy_threads": 1.0,
    }
    for key, true in TRUE.items():
        if key not in LOSSES:
            assert value(hw, key) == pytest.approx(true, rel=near.get(key, 0.06)), key
    residuals = [c.residual for c in hw.constants.values() if c.residual is not None]
    assert min(residuals) > 0.01 and max(residuals) < 0.2


def test_bands_hold_the_truth():
    """90 % bands: of the constants that have one, nearly all hold the truth (give or take the digits written)."""
    hw = fit(Machine(noise=0.03).measure(), BASE)
    inside = {}
    for key, true in TRUE.items():
        if hw.constants[key].low is not None:
            low, high = edges(hw, key)
            assert low <= value(hw, key) <= high
            inside[key] = low * 0.995 <= true <= high * 1.005
    assert len(inside) >= 25 and sum(inside.values()) >= 0.8 * len(inside), [k for k, ok in inside.items() if not ok]


def test_one_outlier_moves_nothing():
    copies, nbytes = np.repeat([1.0, 64.0], 8), np.tile(4096.0 * 4 ** np.arange(8), 2)
    true = {"latency": 9e-6, "per_copy": 2e-6, "bandwidth": 50e9}
    seconds = link_form(true, copies, nbytes) * np.exp(0.01 * np.random.default_rng(0).normal(size=16))
    seconds[3] *= 5
    assert link_fit(copies, nbytes, seconds) == pytest.approx(true, rel=0.05)


def test_terms_below_zero_are_dropped():
    x = np.arange(1.0, 9.0)
    assert robust_terms([np.ones(8), x], 3 * x - 0.5) == pytest.approx([0.0, 2.9], rel=0.05)


def test_threads_that_never_saturate_bound_the_bandwidth_from_below():
    threads = np.array([1.0, 2.0, 4.0])
    found = host_fit(threads, np.full(3, 8e9), 8e9 / (threads * 10e9))
    assert found == pytest.approx({"thread_bandwidth": 10e9, "bandwidth": 80e9}, rel=1e-3)


def test_enough_depth_is_the_least_that_suffices_for_every_block():
    block, depth = np.repeat([1.0, 2.0], 3), np.tile([1.0, 4.0, 16.0], 2)
    assert enough_depth(block, depth, np.array([1, 9.6, 10, 5, 5, 5.0])) == 4.0


# --- what the file says -----------------------------------------------------------------------------------------


def test_the_file_says_what_it_rests_on(tmp_path):
    rows = Machine().measure()
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    hw = quickly(rows, files=[path])
    again = Hardware.from_table(tomllib.loads(hw.to_toml()))
    assert again == hw and again.fit.device == "gpu-x" and again.fit.rows[0][0] == "rows.jsonl"
    assert all(again.fit.covers(row["key"]) for row in rows) and not again.fit.covers("gpu-x/offload/executor/1")
    assert again.ranges["gemm"] == {"parameters": (3072 * 2048, 28672 * 4096), "rows": (1, 8192)}
    assert again.ranges["copy"]["copies"] == (1, 512) and again.ranges["ssd"]["depth"] == (1, 32)
    assert again.outside("attention", sequences=33, kv_bytes=1e9) != [] == again.outside("attention", sequences=32)


def test_what_was_not_measured_keeps_the_evidence_of_the_base():
    rows = [r for r in Machine().measure() if r["kind"] not in ("ssd", "duplex")]
    hw = quickly(rows)
    for key in ("ssd.read_bandwidth", "link.h2d.duplex", "gpu.staging_layers", "host.copies"):
        c = hw.constants[key]
        assert (c.value, c.evidence) == (BASE.constants[key].value, BASE.constants[key].evidence)
        assert c.source.startswith("not measured here; h100-pcie5: ") and c.method is None
    assert "ssd.read_bandwidth" in notes(hw)[0] and "gpu.kernel_time" not in notes(hw)[0]
    assert {line[0] for line in summary(hw)} == set(KINDS)


def test_drift_is_noted():
    m = Machine()
    rows = m.measure()
    for at, seconds in (("start", 1.0), ("end", 1.2)):
        m.add("sentinel", {"phase": "calibrate", "run": 1, "at": at, "of": "gemm"}, seconds, phase="sentinel")
    hw = quickly(rows)
    assert hw.fit.drift == {"calibrate": pytest.approx(0.2)} and "drifted by 20 %" in notes(hw)[-1]


def test_rows_without_contrast_leave_constants_alone():
    rows = [r for r in Machine().measure() if r["kind"] in ("gemm", "small") and r["params"].get("rows", 1) <= 16]
    hw = quickly(rows)
    assert hw.constants["gpu.gemm_flops"].source.startswith("not measured here")
    assert hw.gpu.kernel_time == pytest.approx(TRUE["gpu.kernel_time"], rel=2e-3)  # of kernels alone


# --- splits and steps of the executor ----------------------------------------------------------------------------


SPLIT = Split(
    device="gpu-*",
    fit=("*/calibrate/*", "*/resident/executor/executor/1b/*", "*/resident/hf/hf-decode/1b/*"),
    held_out=("*/resident/executor/executor/8b/*", "*/offload/*"),
    groups={},
)


def step(m: Machine, model: str, graph: str, phase: str = "resident") -> None:
    layers, layer = 16, 100e-6 + (TRUE["gpu.layer_gap"] if graph == "layer" else 0.0)
    shape = {name: value for name, value in vars(SHAPE).items() if name not in ("name", "kv_bytes", "gated")}
    params = {"impl": "executor", "model": model, "graph": graph, "sequences": 1, "context": 512, "shape": shape}
    end = head_seconds(replace(m.gpu, step_sync=50e-6), SHAPE, 1)
    m.add("executor", params, layers * layer + end, phase=phase, gpu_ms=layers * layer + 1e-4)
    m.rows[-1]["layer_ms"] = [1e3 * layer * (i + 1) for i in range(layers)] if graph == "layer" else []


def test_executor_steps_are_fitted_where_the_split_says_so():
    m = Machine()
    for model in ("1b", "8b"):
        for graph in ("layer", "step"):
            step(m, model, graph)
    rows = m.measure()
    without, hw = quickly(rows), quickly(rows, SPLIT)
    assert without.gpu.step_sync == pytest.approx(TRUE["gpu.step_sync"], rel=2e-3)
    assert hw.gpu.step_sync == pytest.approx(50e-6, rel=2e-3) and hw.gpu.layer_gap == pytest.approx(8e-6, rel=2e-3)
    assert hw.fit.split == SPLIT.fingerprint and hw.fit.covers("gpu-x/resident/executor/executor/1b/layer")
    assert {r["params"]["model"] for r in chosen(rows, SPLIT) if r["kind"] == "executor"} == {"1b"}
    assert without.fit.keys != hw.fit.keys


def test_an_eager_framework_is_timed_by_its_shortest_step():
    m = Machine()
    for context, seconds in ((512, 16 * 700e-6), (32768, 0.1)):
        params = {"impl": "hf-decode", "model": "1b", "sequences": 1, "context": context, "shape": {"layers": 16}}
        m.add("hf", params, seconds, 9, phase="resident")
    assert quickly(m.measure(), SPLIT).cpu.eager_submit == pytest.approx(700e-6, rel=1e-3)
    assert quickly(m.rows).constants["cpu.eager_submit"].source.startswith("not measured here")


def test_a_split_for_another_device_is_refused():
    with pytest.raises(ConfigError, match="does not hold for gpu-x"):
        fit(Machine().measure(), BASE, replace(SPLIT, device="gpu-y"))


def test_rows_of_another_device_are_refused():
    rows = Machine().measure() + Machine(device="cpu-y").measure()
    with pytest.raises(ConfigError, match="several devices: cpu-y, gpu-x"):
        quickly(rows)


def test_nothing_to_fit_is_an_error():
    m = Machine()
    step(m, "1b", "layer", phase="offload")
    with pytest.raises(ConfigError, match="none of the rows may be fitted"):
        fit(m.rows, BASE)


# --- end to end, on this CPU ------------------------------------------------------------------------------------


def test_a_quick_calibration_writes_a_file_that_loads(tmp_path):
    pytest.importorskip("torch")
    told = []
    out = calibrate(
        "cpu",
        tmp_path / "mine.toml",
        ssd=tmp_path,
        quick=True,
        progress=lambda done, total, what: told.append((done, total)),
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.rows.jsonl", "mine.toml"]
    hw = Hardware.load(out)
    assert hw.name == "mine" and hw.fit.device.startswith("cpu-") and "RAM stands for device memory" in hw.description
    assert told[0][0] == 0 and told[-1][0] == told[-1][1] > 20
    measured = {k for k, c in hw.constants.items() if not c.source.startswith("not measured here")}
    assert measured >= {"link.h2d.bandwidth", "gpu.kernel_time", "host.thread_bandwidth", "ssd.read_bandwidth"}
    count = len(read_rows([rows_beside(out)]))
    calibrate("cpu", out, ssd=tmp_path, quick=True)
    rows = read_rows([rows_beside(out)])
    assert {r["phase"] for r in rows[count:]} == {"info", "sentinel"}, "the rest was there"
    assert calibrate("cpu", tmp_path / "fitted.toml", rows=[rows_beside(out)], quick=True).is_file()
    assert not rows_beside(tmp_path / "fitted.toml").exists()


def test_rows_of_another_machine_beside_the_file_are_not_gone_on_with(tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "mine.rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in Machine().rows or Machine().measure()))
    before = path.read_text()
    with pytest.raises(ConfigError, match="the rows there are of gpu-x, this is cpu-"):
        calibrate("cpu", tmp_path / "mine.toml", quick=True)
    assert path.read_text() == before and not (tmp_path / "mine.toml").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"device": "tpu"}, "unknown device"),
        ({"out": "mine.txt"}, "NAME.toml"),
        ({"base": "h100-pcie6"}, "h100-pcie5"),
        ({"ssd": "nowhere"}, "not a folder"),
        ({"rows": ["nowhere.jsonl"]}, "cannot read rows"),
    ],
)
def test_bad_requests(tmp_path, monkeypatch, change, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=says):
        calibrate(**{"device": "cpu", "out": "mine.toml", "quick": True, **change})
    assert list(tmp_path.iterdir()) == []
