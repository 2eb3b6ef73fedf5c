"""Closed forms against published or hand-made numbers; those the pipeline must meet are in test_pipeline."""

from __future__ import annotations

import pytest

from kvsim.machine import SHAPES, closed

FLOPS, LINK = 0.6 * 312e12, 32e9


@pytest.mark.parametrize(
    ("hidden", "alone", "overlapped"), [(4096, 0.59, 0.83), (5120, 0.53, 0.73), (7168, 0.45, 0.58)]
)
def test_recompute_share(hidden, alone, overlapped):
    ratio = hidden * LINK / FLOPS
    assert closed.recompute_share(ratio) == pytest.approx(alone, abs=0.006)
    assert closed.recompute_share(ratio, overlapped=True) == pytest.approx(overlapped, abs=0.006)
    s, share = 1000, closed.recompute_share(ratio)  # where both branches of the max meet
    assert 4 * hidden**2 * share * s / FLOPS == pytest.approx(4 * hidden * (1 - share) * s / LINK)


def test_recomputing_pays_only_without_groups():
    for shape in SHAPES.values():
        assert not closed.recompute_pays(shape.hidden * 2, shape.kv_token_bytes)
    assert closed.recompute_pays(4096 * 2, 2 * 4096 * 2)


def test_offloaded_cache_is_bound_by_the_write_back():
    assert closed.offloaded_cache_step(10, 1.0, 3.0, 3.0, 0.5) == 45.0
    assert closed.offloaded_cache_step(10, 1.0, 9.0, 3.0, 0.5) == 90.0
    assert closed.offloaded_cache_step(10, 1.0, 3.0, 3.0, 0.5, submit=20.0) == 200.0


def test_stall_free_gap():
    assert closed.stall_free_gap(6e9, 6e9, 3e9) == 3.0


def test_quantised_bytes():
    assert closed.quantised_bytes(100, 128, 16, 64, 0) == 100 * 128 * 2
    long = closed.quantised_bytes(10**6, 128, 4, 64, 32, kept=128)
    assert 10**6 * 128 * 2 / long == pytest.approx(16 / 4.5, rel=1e-3)


def test_split_over_paths():
    assert closed.split_seconds(90.0, (10.0, 20.0)) == pytest.approx(3.0)
    for share in (0.1, 0.3, 0.4, 0.9):
        assert closed.split_seconds(90.0, (10.0, 20.0), (share, 1 - share)) > 3.0
