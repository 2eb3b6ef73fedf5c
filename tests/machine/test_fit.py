"""Fits of operator times find the constants that made the rows; what rows do not show stays 0."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kvsim.machine import Hardware
from kvsim.machine.fit import (
    DECODE,
    GEMM,
    LINEAR,
    PREFILL,
    Form,
    fit_decode,
    fit_gemm,
    fit_prefill,
    fit_small,
)

PATH = Path(__file__).parents[2] / "experiments" / "hardware" / "fit_public.py"
GPU = replace(Hardware.load("h100-pcie5").gpu, **LINEAR, sms=100)
RATES = {
    "kernel_time": 3e-6, "weight_bandwidth": 1.7e12, "gemm_flops": 250e12, "attention_fixed": 9e-6,
    "kv_bandwidth": 1.3e12, "attention_flops": 180e12, "prefill_fixed": 8e-6,
}  # fmt: skip
LOSSES = {
    "gemm_knee": 0.35, "gemm_depth": 400.0, "gemm_edge": 20.0, "gemm_wave": 0.5, "kv_ramp": 6e-6,
    "attention_batch": 3e-6, "attention_per_sequence": 5e-8, "attention_wave": 1.5e-6, "attention_tile_keys": 90.0,
    "attention_row_keys": 300.0,
    "prefill_score_dims": 50.0, "prefill_tail": 0.6, "prefill_split": 0.4, "prefill_token": 6e-9,
}  # fmt: skip
TRUE = replace(GPU, **RATES, **LOSSES, prefill_tile_rows=128)


def grid(**columns) -> dict[str, np.ndarray]:
    rows = np.array(list(itertools.product(*columns.values())), float)
    return dict(zip(columns, rows.T, strict=True))


def gemms() -> dict[str, np.ndarray]:
    rows = [1, 8, 32, 64, 100, 128, 200, 256, 300, 512, 700, 1024, 2048]
    sides = grid(out=[1536, 4096, 6144, 28672], inp=[2048, 4096, 14336], rows=rows)
    return sides | {"value_bytes": np.full(len(sides["rows"]), 2.0)}


def decodes() -> dict[str, np.ndarray]:
    c = grid(
        sequences=[1, 2, 8, 32, 128, 512], context=[16, 128, 1024, 8192, 65536], kv_heads=[2, 8], head_dim=[64, 128]
    )
    return c | {"value_bytes": np.full(len(c["context"]), 2.0)}


def prefills() -> dict[str, np.ndarray]:
    c = grid(
        heads=[8, 32], kv_heads=[1, 8], head_dim=[64, 128, 256], sequences=[1, 4, 16],
        queries=[64, 512, 1024, 3000, 8192], context=[0, 4096],
    )  # fmt: skip
    return c | {"context": c["context"] + c["queries"]}


def noisy(form: Form, columns: dict[str, np.ndarray], noise: float, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    times = form.predict(TRUE, columns)
    return times * np.exp(noise * draw.normal(size=len(times)))


@pytest.mark.parametrize(("noise", "rel"), [(0.0, 1e-2), (0.01, 0.12)])
@pytest.mark.parametrize(
    ("form", "fit", "columns", "fitted"),
    [
        (GEMM, fit_gemm, gemms(), (*GEMM.rates, *GEMM.losses)),
        (DECODE, fit_decode, decodes(), (*DECODE.rates, *DECODE.losses)),
        (PREFILL, fit_prefill, prefills(), (*PREFILL.rates, *PREFILL.losses)),
    ],
    ids=["gemm", "decode", "prefill"],
)
def test_constants_come_back(form, fit, columns, fitted, noise, rel):
    known = replace(GPU, kernel_time=TRUE.kernel_time, prefill_tile_rows=128)
    found = fit(known, **columns, seconds=noisy(form, columns, noise))
    assert set(found.values) == set(fitted)
    for name in fitted:
        assert found.values[name] == pytest.approx(getattr(TRUE, name), rel=rel), name
    assert found.error <= noise + 1e-3


def test_slow_outliers_do_not_pull():
    columns = decodes()
    seconds = noisy(DECODE, columns, 0.01)
    seconds[::20] *= 2.0
    found = fit_decode(GPU, **columns, seconds=seconds)
    assert found.values["kv_bandwidth"] == pytest.approx(TRUE.kv_bandwidth, rel=0.02)


def test_a_loss_that_rows_do_not_show_is_left_at_0():
    columns = decodes()
    plain = replace(TRUE, **LINEAR)
    found = fit_decode(GPU, **columns, seconds=DECODE.predict(plain, columns))
    gone = {"kv_ramp", "attention_batch", "attention_wave", "attention_tile_keys"}
    assert {name for name in gone if found.values[name]} == set()
    assert found.values["attention_per_sequence"] == pytest.approx(TRUE.attention_per_sequence, rel=1e-3)
    assert found.values["kv_bandwidth"] == pytest.approx(TRUE.kv_bandwidth, rel=1e-3)


def test_one_head_size_cannot_tell_softmax_from_the_rate():
    columns = {name: c[prefills()["head_dim"] == 128] for name, c in prefills().items()}
    found = fit_prefill(replace(GPU, prefill_tile_rows=128), **columns, seconds=noisy(PREFILL, columns, 0.0))
    assert found.values["prefill_score_dims"] == 0
    assert found.values["attention_flops"] == pytest.approx(TRUE.attention_flops * 128 / (128 + 50), rel=0.01)


def test_bands_are_of_whole_groups_hold_the_truth_and_repeat():
    columns = decodes()
    groups = columns["context"] * 1000 + columns["sequences"]
    off = dict(zip(np.unique(groups), np.exp(0.05 * np.random.default_rng(3).normal(size=30)), strict=True))
    seconds = noisy(DECODE, columns, 0.01) * np.array([off[g] for g in groups])  # rows of a group are off together
    whole = fit_decode(GPU, **columns, seconds=seconds, groups=groups, draws=40)
    again = fit_decode(GPU, **columns, seconds=seconds, groups=groups, draws=40)
    single = fit_decode(GPU, **columns, seconds=seconds, draws=40)
    assert whole == again
    for name, (low, high) in whole.bands.items():
        assert low <= whole.values[name] <= high
    low, high = whole.bands["kv_bandwidth"]
    assert low <= TRUE.kv_bandwidth <= high
    assert high - low > single.bands["kv_bandwidth"][1] - single.bands["kv_bandwidth"][0]


def test_small_kernels_are_a_median():
    found = fit_small(GPU, [1e-6, 3e-6, 50e-6], draws=20)
    assert found.values == {"kernel_time": 3e-6}
    assert found.bands["kernel_time"] == (1e-6, 50e-6)


def test_gemms_can_give_the_kernel_time_too():
    columns = gemms()
    found = fit_gemm(replace(GPU, kernel_time=0.0), **columns, seconds=noisy(GEMM, columns, 0.0), alone=True)
    assert found.values["kernel_time"] == pytest.approx(3e-6, rel=0.05)


# --- the public tables' script ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fit_public():
    spec = importlib.util.spec_from_file_location("fit_public", PATH)
    module = sys.modules["fit_public"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def operator(fit_public, noise: float = 0.0):
    c = decodes()
    t = pd.DataFrame(c).assign(seconds=noisy(DECODE, c, noise), regime="", line=c["sequences"], x=c["context"])
    t["group"] = t["geometry"] = t.head_dim * 100 + t.kv_heads
    t.loc[t.context == 16, "regime"] = "small"
    return fit_public.Operator(t, DECODE, "all", "layouts, one at a time", 0.05, {"small": "short"}, ("small",))


def test_rows_left_out_are_predicted_from_the_others(fit_public):
    op = operator(fit_public)
    found, fitted = fit_public.judge("h100-pcie5", "decode", op, GPU, 0)
    assert found["physical"]["mape"] < 1e-3 and found["physical"]["rows"] == 6 * 4 * 4
    assert found["physical, excluded: small"]["rows"] == 6 * 4
    assert found["excluded"]["small"] == "short (24 rows)" and "blame" not in found
    assert fitted.values["kv_bandwidth"] == pytest.approx(TRUE.kv_bandwidth, rel=1e-2)
    op.table.loc[op.table.group == 6402, "seconds"] *= 1.3  # a layout that is another machine's
    assert fit_public.judge("h100-pcie5", "decode", op, GPU, 0)[0]["physical"]["mape"] > 0.05


def test_a_table_is_judged_between_what_it_holds(fit_public):
    op = operator(fit_public)
    kept = op.table[op.table.regime == ""].reset_index(drop=True)
    found = fit_public.interpolated(op, kept)  # holds contexts 128 and 8,192: 1,024 lies between, 65,536 beyond
    assert (found["rows"], found["refused"]) == (6 * 4, 6 * 4)


def test_errors_by_hand(fit_public):
    rows = pd.DataFrame({"seconds": [1.0, 2.0, 4.0], "group": [1, 1, 2]})
    found = fit_public.errors(np.array([1.1, 2.0, 3.0]), rows)
    assert found == {"mape": 0.1167, "p90": 0.22, "worst": 0.25, "signed": -0.05, "rows": 3, "groups": 2}


def test_written_constants_have_units(fit_public):
    assert fit_public.text("weight_bandwidth", 2.8571e12) == "2.86TB/s"
    assert fit_public.text("kernel_time", 3.0e-6) == "3us"
    assert fit_public.text("attention_row_keys", 655.4) == 655
    assert fit_public.text("gemm_knee", 0.36421) == 0.364


def test_every_published_constant_can_be_written(fit_public):
    names = {name for form in (GEMM, DECODE, PREFILL) for name in (*form.rates, *form.losses)}
    assert names | {"kernel_time"} == set(RATES) | set(LOSSES)
    assert all(fit_public.text(name, 1.0) for name in names)
