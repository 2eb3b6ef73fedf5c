"""What Belady is told of the future: every use and the next one, in memory or on disk."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.cache import future
from kvsim.cache.demand import Use
from kvsim.cache.future import NEVER, Future
from kvsim.testing import tiny_trace
from tests.helpers import replay
from tests.strategies import DEMANDS, traces


@settings(deadline=None, max_examples=30)
@given(traces(), st.sampled_from(DEMANDS))
def test_uses(trace, use):
    """Against a search through the whole table of uses."""
    request = trace.requests()[0]
    lanes = trace.lanes[0] * trace.lanes[1]
    used = np.zeros((request.output_tokens + 1, lanes, request.stride), bool)
    for a in request.accesses():
        if not a.prefill:
            seen = (np.repeat(x, trace.lanes[1]) for x in (a.visible, a.first))
            used[a.step, :, : a.keys] = use.used(a.peak.reshape(lanes, -1), a.keys, *seen)
    uses = Future(request, use).uses()
    assert (uses.lanes, uses.stride) == used.shape[1:]
    flat = used.reshape(len(used), -1)

    def after(step, address):
        return np.array([next(iter(step + 1 + np.flatnonzero(flat[step + 1 :, x])), NEVER) for x in address])

    np.testing.assert_array_equal(uses.first, after(0, range(flat.shape[1])))
    for step in range(len(flat)):
        address, following = uses.at(step)
        np.testing.assert_array_equal(address, np.flatnonzero(flat[step]))
        np.testing.assert_array_equal(following, after(step, address))


def test_uses_on_disk_are_the_same(monkeypatch):
    trace = tiny_trace()
    kept = replay("belady", 5, trace).copies
    monkeypatch.setattr(future, "_SPOOL", 1)
    uses = Future(trace.requests()[0], Use()).uses()
    assert uses._address._rolled and uses._next._rolled
    np.testing.assert_array_equal(replay("belady", 5, trace).copies, kept)


def test_a_request_without_steps():
    uses = Future(tiny_trace(steps=0).requests()[0], Use()).uses()
    assert (uses.first == NEVER).all() and [len(x) for x in uses.at(0)] == [0, 0]
    for spec in ("belady", "mass-oracle", "optimal"):
        assert replay(spec, 5, tiny_trace(steps=0)).out[0].resident == pytest.approx(5)
