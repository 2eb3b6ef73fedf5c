"""Functions that NumPy has, but whose last bits differ between processors: here they are the same on all.

So a policy's text that uses them can be compiled (`kvsim.cache.fused`) and decides the same both ways, which it could
not with NumPy's, of which a machine with wider instructions has another version.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

_LOG2_E = np.float32(1 / math.log(2))
_LN2_HIGH = np.float32(355 / 512)  # of few bits: whole multiples of it are exact
_LN2_LOW = np.float32(math.log(2) - 355 / 512)
_C3, _C4, _C5, _C6, _C7 = (np.float32(1 / math.factorial(n)) for n in range(3, 8))
_HALF, _ONE = np.float32(0.5), np.float32(1)
_LEAST, _MOST = np.float32(-104), np.float32(89)  # beyond, it is 0 and infinite


def exp(x: np.ndarray) -> np.ndarray:
    """e to the power of `x`, float32 in the shape of `x`: within 2 units in the last place, the same on every machine.

    Of a NaN it is NaN, beyond float32 infinite or 0, without a warning.
    """
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(x, np.float32).reshape(np.shape(x))
    out = np.empty_like(x)
    _exp_of_all(x.reshape(-1), out.reshape(-1))
    return out


@njit(inline="always")
def exp_of(x):
    """`exp` of one float32: 2**n times the series of what is left, which is at most ln(2) / 2."""
    inside = min(max(x, _LEAST), _MOST)
    n = np.floor(inside * _LOG2_E + _HALF)
    r = (inside - n * _LN2_HIGH) - n * _LN2_LOW
    series = _C3 + r * (_C4 + r * (_C5 + r * (_C6 + r * _C7)))
    value = _ONE + (r + r * r * (_HALF + r * series))
    half = np.int32(np.int32(n) >> np.int32(1))  # 2**n may be out of range where the product is not
    value = value * _power_of_two(half) * _power_of_two(np.int32(np.int32(n) - half))
    return value if x == x else x


@njit(inline="always")
def _power_of_two(n):
    return np.int32(np.int32(n + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(inline="always")
def single_of(x):
    """A score as float32: `kvsim.cache.view.single` of one number."""
    rounded = np.float32(x)
    return np.float32(np.nan) if np.isinf(rounded) and not np.isinf(x) else rounded


@njit(cache=True, nogil=True, error_model="numpy")
def _exp_of_all(x, out):
    for i in range(x.shape[0]):
        out[i] = exp_of(x[i])
