"""exp: as near as float32 allows, the same in compiled loops and in NumPy text."""

import warnings

import numpy as np
import pytest

from kvsim.cache import fused
from kvsim.cache.elementwise import exp


def test_within_two_units_in_the_last_place():
    x = np.linspace(-103.9, 88.72, 1_000_003).astype(np.float32)
    right = np.exp(x.astype(np.float64))
    unit = np.spacing(right.astype(np.float32)).astype(np.float64)
    assert (np.abs(exp(x) - right) < 2 * unit).all()
    assert (np.diff(exp(x)) >= 0).all()


def test_edges():
    x = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 1, 89, -104, 1e30, -1e30], np.float32)
    right = np.array([np.nan, np.inf, 0, 1, 1, np.e, np.inf, 0, np.inf, 0], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(exp(x), right)
        assert exp(np.array([1e300, -1e300])).tolist() == [np.inf, 0]


def test_known_bits():
    """On any machine: from exact arithmetic of the series in float32, operation by operation."""
    x = np.array([0.1, -0.25, 3.7, 20.5, -50.0], np.float32)
    ln2 = np.float32(355 / 512), np.float32(np.log(2) - 355 / 512)
    n = np.floor(x * np.float32(1 / np.log(2)) + np.float32(0.5))
    r = (x - n * ln2[0]) - n * ln2[1]
    series = np.float32(1 / 5040)
    for c in (720, 120, 24, 6):
        series = np.float32(1 / c) + r * series
    value = np.float32(1) + (r + r * r * (np.float32(0.5) + r * series))
    np.testing.assert_array_equal(exp(x), np.ldexp(value, n.astype(int)))


@pytest.mark.parametrize("x", [3, 0.5, [[1, 2], [3, 4]], np.arange(6.0).reshape(2, 3)[:, ::2]])
def test_shapes_and_kinds(x):
    assert exp(x).dtype == np.float32 and exp(x).shape == np.shape(x)
    np.testing.assert_allclose(exp(x), np.exp(np.asarray(x, np.float64)), rtol=1e-6)


def test_a_policy_that_uses_it_is_compiled_and_one_of_numpys_is_not(tmp_path):
    from kvsim import registry

    text = """import numpy as np
from kvsim import exp, policy

@policy("fading")
class Fading:
    def score(self, view):
        return exp((view.last - view.now) / np.float32(8))
"""
    for name, function in (("own", "exp("), ("numpys", "np.exp(")):
        (file := tmp_path / f"{name}.py").write_text(text.replace("exp((", f"{function}("))
        policy = registry.build(str(file))
        if name == "own":
            assert any("exp_of" in line for line in fused.translate(policy, "score").lines)
        else:
            with pytest.raises(fused.Refused):
                fused.translate(policy, "score")
