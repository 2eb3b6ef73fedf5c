"""Shared fixtures: a small trace with every size the timed model needs."""

import numpy as np
import pytest

from kvsim.trace.access import DenseSource, Geometry, dense_trace

SIZES = {"hidden": 64, "intermediate": 192, "vocab": 256}


def random_source(seed, prompt=24, steps=20, layers=2, heads=2):
    """Rows with a heavy tail: few large weights, many small ones."""
    rng = np.random.default_rng(seed)
    total = prompt + steps

    def rows(n, first):
        w = rng.gamma(0.3, size=(n, layers, heads, total)) + 1e-9
        w *= np.arange(total) < first + np.arange(n)[:, None, None, None] + 1
        return (w / w.sum(-1, keepdims=True)).astype(np.float32)

    return DenseSource(rows(prompt, 0)[..., :prompt], rows(steps, prompt), id=seed)


@pytest.fixture(scope="session")
def trace():
    return dense_trace([random_source(i) for i in range(3)], Geometry(2, 2, 2, 16, name="toy", **SIZES), name="toy")
