"""Synthetic rows are rows, come from their seed alone, and show what they claim."""

from __future__ import annotations

import numpy as np

from kvsim.trace.synthetic import synthetic_rows, synthetic_trace


def test_rows_are_distributions_over_what_is_visible():
    trace = synthetic_trace(requests=2, prompt=10, steps=20, layers=2, kv_heads=3, seed=1)
    for request in trace.requests():
        for access in request.accesses():
            np.testing.assert_allclose(access.row.sum(-1), 1, atol=1e-5)
            assert (access.row >= 0).all() and not access.row[..., access.keys :].any()


def test_the_seed_decides():
    one, same, other = (synthetic_trace(1, 8, 8, seed=seed) for seed in (5, 5, 6))
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_heavy_tails_and_recurrence_are_there():
    size = 400
    rows = np.zeros((size, 64, size), np.float32)
    for query, row in enumerate(synthetic_rows(size, 8, 8, seed=2)):
        rows[query, :, : query + 1] = row.reshape(64, -1)
    last = np.sort(rows[-1], -1)[:, ::-1]
    needed = (np.cumsum(last, -1) < 0.99).sum(-1)
    assert needed.min() < 0.2 * size and needed.max() > 0.6 * size  # sharp lanes and diffuse ones
    idle = [
        np.diff(np.flatnonzero(rows[key:, lane, key] * size >= 1)) for lane in range(64) for key in range(0, 200, 5)
    ]
    idle = np.concatenate(idle)
    assert np.median(idle) < 8 and np.percentile(idle, 99) > 30
