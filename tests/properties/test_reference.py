"""The engine against the reference of `kvsim.testing`: same pages in the same tiers after every step."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim import registry
from kvsim.cache.cache import Cache
from kvsim.cache.demand import Use
from kvsim.cache.future import Future
from kvsim.cache.tiers import Capacity
from kvsim.errors import ConfigError
from kvsim.testing import ReferenceCache
from tests.helpers import policy_for
from tests.strategies import DEMANDS, LAGGED, ONLINE, ORACLES, traces

PYRAMID = "fifo"  # with a split that changes from step to step and from lane to lane


def pyramid(view):
    lanes = np.arange(view.budget.size).reshape(view.budget.shape)
    return 4 + (lanes + view.now) % 3


@st.composite
def settings_of(draw, regime):
    policies = (*ONLINE, *ORACLES, *LAGGED, "h2o-mask", "full", "split")
    spec = draw(st.sampled_from(policies))
    attributes = {"granularity": draw(st.sampled_from(("head", "head", "layer", "token")))}
    if spec not in ORACLES:
        attributes["rows"] = draw(st.sampled_from(("visible", "full")))
    if spec in ORACLES:
        attributes["granularity"] = "head"
    if spec not in LAGGED:
        attributes |= {"lag": draw(st.integers(1, 3)), "batch": draw(st.integers(1, 4))}
    for name in ("protect_head", "protect_tail"):
        attributes[name] = draw(st.sampled_from((0.0, 0.0, 0.34)))
    policy = policy_for(PYRAMID if spec == "split" else spec, **attributes)
    if spec == "split":
        policy.split = pyramid
    return policy


def both(trace, policy, capacity, **regime):
    """Engine and reference side by side; oracles look ahead once for both."""
    request = trace.requests()[0]
    if hasattr(policy, "foresee"):
        policy.foresee(Future(request, regime.get("demand") or regime["use"]))
    a, b = (
        kind(trace.lanes, request.stride, policy, capacity, page_size=trace.page_size, seed=3, **regime)
        for kind in (Cache, ReferenceCache)
    )
    a.auditing = True
    yield from ((a, b, access, a.access(access), b.access(access)) for access in request.accesses())


def same(cache, reference):
    """Copies by key, from slots."""
    copies = np.zeros((cache.lanes, reference.v.key.shape[-1] + 1), np.uint8)
    np.put_along_axis(copies, cache.table.key.astype(np.intp), cache.table.copies, 1)
    np.testing.assert_array_equal(copies[:, :-1], reference.v.copies.reshape(cache.lanes, -1))


@settings(deadline=None, max_examples=120)
@given(traces(), settings_of("lossy"), st.integers(4, 9), st.sampled_from(DEMANDS[:2]))
def test_lossy(trace, policy, budget, use):
    try:
        for cache, reference, _, out, right in both(trace, policy, Capacity(budget), use=use):
            same(cache, reference)
            np.testing.assert_array_equal(out.hit, right.hit)
            assert out.dropped == right.dropped
    except ConfigError:
        assert_protects_more_than(budget, policy)


@settings(deadline=None, max_examples=120)
@given(
    traces(), settings_of("offload"), st.integers(4, 9), st.sampled_from((*DEMANDS, None)),
    st.sampled_from(((None, 0), (3, None), (0, None))),
)  # fmt: skip
def test_offload(trace, policy, budget, demand, below):
    if demand is None and not hasattr(policy, "select"):
        demand = DEMANDS[0]
    offload = registry.build("spill", "offload")
    try:
        steps = both(trace, policy, Capacity(budget, *below), offload=offload, use=Use(), demand=demand)
        for cache, reference, _, out, right in steps:
            same(cache, reference)
            np.testing.assert_array_equal(out.hit, right.hit)
            assert out.fetched.sum() == right.missing.sum()
            assert out.spilled.sum(1).tolist() == right.spilled
    except ConfigError:
        assert_protects_more_than(budget, policy)


def assert_protects_more_than(budget, policy):
    """A refusal is right only if what is protected does not fit."""
    shares = budget * (policy.protect_head + policy.protect_tail)
    tokens = sum(budget if isinstance(n, str) else n for n in (policy.sink, policy.recent))
    assert shares + tokens > budget
