"""The compiled loops against NumPy: order of scores, choice of victims, sums and runs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvsim.cache import kernels

TINY = np.float32(1e-45)  # the smallest denormal
ODD = [
    -np.inf,
    np.float32(-3e38),
    -1.5,
    -TINY,
    -0.0,
    0.0,
    TINY,
    2 * TINY,
    1.0,
    np.nextafter(np.float32(1), np.float32(2)),
    3e38,
    np.inf,
]
scores = st.one_of(st.sampled_from([float(x) for x in ODD]), st.floats(width=32, allow_nan=False))


def rank(guard: bool, score: float, key: int) -> int:
    return int(kernels._rank.py_func(guard, np.float32(score), key))


@settings(deadline=None)
@given(
    st.tuples(st.booleans(), scores, st.integers(0, 2**31 - 1)),
    st.tuples(st.booleans(), scores, st.integers(0, 2**31 - 1)),
)
def test_rank_orders_like_the_tuple(a, b):
    assert (rank(*a) < rank(*b)) == (a < b)
    assert (rank(*a) == rank(*b)) == (a == b)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rank_is_strict_over_odd_floats():
    ranks = [rank(False, x, 7) for x in ODD]
    assert ranks[4] == ranks[5]  # -0.0 and 0.0 are one score
    assert sorted(set(ranks)) == [r for i, r in enumerate(ranks) if i != 5]


def choose(score, key, want, *, bit=1, copies=None, head=0, tail=2**30, pinned=-1):
    lanes = len(key)
    copies = (key >= 0).astype(np.uint8) if copies is None else copies
    out, counts = np.empty((lanes, max(1, want)), np.int32), np.empty(lanes, np.int64)
    each = np.full(lanes, want, np.int64)
    kernels.victims(
        0, lanes, np.asarray(score, np.float32), key, copies, bit, each, each * 0 + head, each * 0 + tail, pinned,
        out, counts,
    )  # fmt: skip
    return counts.tolist(), [key[t, out[t, : max(0, counts[t])]].tolist() for t in range(lanes)]


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.float32, (2, 9), elements=scores), st.permutations(range(9)), st.integers(1, 10),
    st.integers(0, 3), st.integers(0, 3), st.sampled_from((-1, 8)), st.lists(st.booleans(), min_size=9, max_size=9),
)  # fmt: skip
def test_victims_are_the_lowest_whatever_the_slots(score, order, want, head, tail, pinned, empty):
    """Against a sort by (guarded, score, key); and with columns permuted the same pages leave."""
    key = np.tile(np.where(empty, -1, np.arange(9)), (2, 1)).astype(np.int32)
    _, chosen = choose(score, key, want, head=head, tail=9 - tail, pinned=pinned)
    for lane in range(2):
        present = [k for k in range(9) if key[lane, k] >= 0 and k != pinned]
        right = sorted(present, key=lambda k: (k < head or k >= 9 - tail, score[lane, k], k))[:want]
        assert sorted(chosen[lane]) == sorted(right)
    _, moved = choose(
        score[:, order], np.ascontiguousarray(key[:, order]), want, head=head, tail=9 - tail, pinned=pinned
    )
    assert [sorted(c) for c in moved] == [sorted(c) for c in chosen]


@pytest.mark.parametrize("want", [1, 2])
def test_victims_report_the_lane_of_a_nan(want):
    key = np.array([[0, 1, 2], [0, 1, -1]], np.int32)
    score = np.array([[1, 2, 3], [1, 2, np.nan]], np.float32)
    assert choose(score, key, want)[0] == [want, want]  # an empty line may hold anything
    score[1, 0] = np.nan
    assert choose(score, key, want)[0] == [want, -1]


def test_victims_have_a_copy_in_the_tier():
    key = np.array([[0, 1, 2, 3]], np.int32)
    copies = np.array([[1, 2, 3, 2]], np.uint8)
    assert choose([[0, 0, 0, 0]], key, 9, bit=2, copies=copies)[1] == [[1, 2, 3]]


weights = st.one_of(st.sampled_from([0.0, float(TINY), 0.25, 1.0]), st.floats(0, 1, width=32))


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.float32, (3, 70), elements=weights), st.integers(1, 70), st.lists(st.integers(0, 72), min_size=3))
def test_largest_sum(row, keys, count):
    """Against a sort, ties, zeros and denormals among the weights; only the lanes asked for, whatever the others do."""
    out = np.full(3, -1.0)
    kernels.largest_sum(1, 3, row, keys, np.array(count), out)
    right = [np.sort(row[m, :keys].astype(np.float64))[::-1][: count[m]].sum() for m in (1, 2)]
    np.testing.assert_allclose(out, [-1, *right], rtol=1e-14, atol=0)


@settings(deadline=None)
@given(hnp.arrays(np.bool_, (2, 10)), st.permutations(range(10)))
def test_runs_of_neighbouring_keys(mask, order):
    key = np.tile(np.array(order, np.int32), (2, 1))
    chosen = [sorted(int(k) for k in key[t][mask[t]]) for t in range(2)]
    runs = [sum(k - 1 not in c for k in c) for c in chosen]
    assert kernels.count_runs(mask, key, 10).tolist() == runs


@settings(deadline=None)
@given(
    hnp.arrays(np.float32, (4, 37), elements=st.integers(0, 64).map(lambda n: n / 64)),
    st.integers(1, 37),
    st.integers(0, 37),
    st.booleans(),
)
def test_row_totals(row, keys, least, paged):
    peak = row / 2 if paged else row
    need, total, used = np.full(4, 0.25, np.float32), np.empty(4, np.float32), np.empty(4, np.int64)
    kernels.row_totals(row, peak, keys, need, np.full(4, least, np.int32), 1 + paged, total, used)
    np.testing.assert_array_equal(total, row[:, :keys].sum(1))
    newer = np.arange(keys) >= least
    np.testing.assert_array_equal(used, ((peak[:, :keys] > 0.25) | ((peak[:, :keys] == 0.25) & newer)).sum(1))
