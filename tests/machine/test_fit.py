"""The fit of public operator times finds the constants that made the rows."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from kvsim.machine import Hardware

PATH = Path(__file__).parents[2] / "experiments" / "hardware" / "fit_public.py"
TRUE = {
    "kernel_time": 3e-6, "weight_bandwidth": 1.7e12, "gemm_flops": 250e12, "attention_fixed": 9e-6,
    "attention_per_sequence": 2e-7, "kv_bandwidth": 1.3e12, "attention_flops": 180e12, "attention_row_keys": 300,
}  # fmt: skip


@pytest.fixture(scope="module")
def fit_public():
    spec = importlib.util.spec_from_file_location("fit_public", PATH)
    module = sys.modules["fit_public"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def grid(**columns) -> pd.DataFrame:
    return pd.DataFrame(list(itertools.product(*columns.values())), columns=list(columns))


def test_constants_come_back(fit_public):
    start = Hardware.load("h100-pcie5").gpu
    true = replace(start, **TRUE)
    gemm = grid(parameters=[1.0, 4e7, 1e8, 3e8], rows=[1, 16, 64, 256, 1024, 4096]).assign(
        shape=lambda t: t.parameters, small=lambda t: t.parameters == 1
    )
    decode = grid(sequences=[1, 8, 64], bytes=[1e6, 1e8, 1e9]).assign(shape=lambda t: t.bytes)
    prefill = grid(queries=[512, 1024, 4096], sequences=[1, 4], heads=[16, 32], head_dim=[128])
    prefill = prefill.assign(context=prefill.queries, shape=prefill.heads)
    tables = fit_public._rows(gemm, decode, prefill)
    for rows in tables.values():
        rows.table["seconds"] = rows.form(true, rows.table)
    assert fit_public.fit("h100-pcie5", tables) == pytest.approx(TRUE, rel=1e-6)


def test_written_constants_have_units(fit_public):
    assert fit_public.text("weight_bandwidth", 2.8571e12) == "2.86TB/s"
    assert fit_public.text("kernel_time", 3.0e-6) == "3us"
    assert fit_public.text("attention_row_keys", 655) == 655
