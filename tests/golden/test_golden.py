"""Frozen runs still give their numbers: to the digit where they are counts, to rounding where they are sums of
floats."""

import json

import pytest

from .make import FOLDER, RUNS, results


@pytest.fixture(scope="module")
def now():
    return results()


@pytest.mark.parametrize("name", RUNS)
def test_frozen_run(now, name):
    frozen = json.loads((FOLDER / f"{name}.json").read_text())
    assert now[name].keys() == frozen.keys()
    for key, value in frozen.items():
        expected = value if isinstance(value, int) else pytest.approx(value, rel=1e-6, nan_ok=True)
        assert now[name][key] == expected, f"{name}.{key}: `make golden` if this was meant, and say why in CHANGELOG.md"
