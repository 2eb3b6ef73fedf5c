"""What is lost beyond mass: needed sources, attention's output, memory that stays with a block."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim import registry
from kvsim.cache.cache import Cache
from kvsim.cache.quality import BLOCK, Quality, _holds, stranded
from kvsim.cache.tiers import Capacity
from kvsim.simulate import run
from kvsim.trace.access import DenseSource, dense_trace
from kvsim.trace.synthetic import synthetic_trace
from tests.helpers import M1


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def vector_trace(seed=0, layers=2, heads=2, group=2, prompt=6, steps=8, size=4, need=None, scale=None):
    """Random q, k and v, and the rows that they give: means over the query heads of a group."""
    rng, n = np.random.default_rng(seed), prompt + steps
    q = rng.normal(size=(layers, heads * group, n, size)).astype(np.float32) * 2
    k, v = (rng.normal(size=(layers, heads, n, size)).astype(np.float32) for _ in range(2))
    z = np.einsum("lhgtd,lhsd->lhgts", q.reshape(layers, heads, group, n, size), k) * (scale or size**-0.5)
    weights = softmax(np.where(np.tril(np.ones((n, n), bool)), z, -np.inf))
    rows = weights.mean(2).transpose(2, 0, 1, 3).astype(np.float32)  # [queries, layers, heads, keys]
    facts = {} if need is None else {"need": need}
    source = DenseSource(rows[:prompt, ..., :prompt], rows[prompt:], facts=facts, vectors=(q, k, v))
    return dense_trace([source]), weights, v


def watch(trace, policy, budget):
    request = trace.requests()[0]
    cache = Cache(trace.lanes, request.stride, registry.build(policy), Capacity(budget), page_size=trace.page_size)
    quality, found = Quality(cache, request.source.facts), []
    for a in request.accesses(vectors=True):
        cache.access(a)
        found.append((quality.gold_needed, quality.gold_lost, quality.gold_gone, quality.output_error))
    return found[1:]


def test_output_error_is_that_of_the_renormalised_rows():
    trace, weights, v = vector_trace()
    found = watch(trace, "fifo", 4)
    for step, (*_, error) in enumerate(found, 6):
        seen = np.arange(step + 1) >= step - 4  # four that stayed, and the newcomer
        a = weights[..., step, : step + 1]
        o = np.einsum("lhgs,lhsd->lhgd", a, v[..., : step + 1, :])
        less = np.where(seen, a, 0)
        less = np.einsum("lhgs,lhsd->lhgd", less / less.sum(-1, keepdims=True), v[..., : step + 1, :])
        expected = np.mean(np.linalg.norm(o - less, axis=-1) / np.linalg.norm(o, axis=-1))
        assert error == pytest.approx(expected, rel=1e-4)


def test_the_full_cache_has_no_error():
    assert [e for *_, e in watch(vector_trace()[0], "full", 4)] == pytest.approx([0.0] * 8, abs=1e-6)


@pytest.mark.parametrize("policy", ["fifo", "tova"])  # decisions by head and by layer
def test_error_in_pages(policy):
    """The newest page is one of several tokens; whatever stays, an error is a share between none and a few."""
    errors = [e for *_, e in watch(vector_trace(prompt=7, steps=9)[0].paged(4), policy, 2)]
    assert all(0 <= e < 5 for e in errors) and max(errors) > 0


def test_rows_that_are_not_the_softmax_of_q_and_k_have_no_known_error():
    assert np.isnan([e for *_, e in watch(vector_trace(scale=1.5)[0], "fifo", 4)]).all()


def test_gold_sources_by_hand():
    """M1 with a window of three: at the third step tokens 0 and 2 are needed, of which 0 is gone."""
    rows = np.zeros((6, 1, 1, 6), np.float32)
    for i, row in enumerate(M1):
        rows[i, 0, 0, : len(row)] = row
    need = [np.array(x, np.int32) for x in ([0], [1, 3], [0, 2], [])]
    trace = dense_trace([DenseSource(rows[:2, ..., :2], rows[2:], facts={"need": need})])
    request = trace.requests()[0]
    cache = Cache((1, 1), 6, registry.build("fifo"), Capacity(2))  # two that stayed, and the newcomer
    quality, found = Quality(cache, request.source.facts), []
    for a in request.accesses():
        cache.access(a)
        found.append((quality.gold_needed, quality.gold_lost, quality.gold_gone))
    assert found == [(0, 0, 0), (1, 0, 0), (2, 0, 0), (2, 1, 1), (0, 0, 0)]


def test_a_source_is_gone_only_when_no_lane_has_it():
    """Two heads: one looks at token 0 alone, the other at token 1; each keeps what it looks at."""
    rows = np.zeros((5, 1, 2, 5), np.float32)
    for i in range(5):
        rows[i, 0, 0, 0] = rows[i, 0, 1, min(i, 1)] = 1
    need = [np.array([0, 1], np.int32)] * 3
    trace = dense_trace([DenseSource(rows[:2, ..., :2], rows[2:], facts={"need": need})])
    found = watch_without_vectors(trace, "lfu(recent=1)", 2)
    assert found == [(4, 0, 0), (4, 2, 0), (4, 2, 0)]


def watch_without_vectors(trace, policy, budget):
    request = trace.requests()[0]
    cache = Cache(trace.lanes, request.stride, registry.build(policy), Capacity(budget))
    quality, found = Quality(cache, request.source.facts), []
    for a in request.accesses():
        cache.access(a)
        found.append((quality.gold_needed, quality.gold_lost, quality.gold_gone))
    return found[1:]


@settings(deadline=None)
@given(
    st.permutations([-1, -1, *range(8)]), st.lists(st.booleans(), min_size=10, max_size=10), st.sets(st.integers(0, 9))
)
def test_pages_held_are_those_that_are_read(key, hidden, pages):
    lanes = np.array([key, key[::-1]], np.int32)
    read = (lanes >= 0) & ~np.array([hidden, hidden])
    right = [[p in lanes[t][read[t]] for p in sorted(pages)] for t in range(2)]
    found = _holds(lanes, read, np.array(sorted(pages), np.int64))
    np.testing.assert_array_equal(found, np.array(right, bool).reshape(2, -1))


def test_stranded_tokens_by_hand():
    """Blocks of 16, 40 tokens: of the first block two stay, of the second none, of the last, half born, one."""
    key = np.array([[0, 15, 39, -1], [16, 17, 18, 19]], np.int32)
    assert stranded(key, 40) == (14 + 7) + 12
    assert stranded(np.full((1, 3), -1, np.int32), 40) == 0


@settings(deadline=None)
@given(st.integers(1, 100), st.data())
def test_stranded_tokens_are_the_rest_of_the_blocks_that_are_held(tokens, data):
    kept = data.draw(st.sets(st.integers(0, tokens - 1)))
    rest = {k for k in range(tokens) if k // BLOCK in {h // BLOCK for h in kept}} - kept
    assert stranded(np.array([[-1, *kept, -1]] * 2, np.int32), tokens) == 2 * len(rest)


def test_a_run_says_what_was_lost():
    need = [np.array([0], np.int32)] * 8
    trace = vector_trace(need=need)[0]
    trace = replace(trace, geometry=replace(trace.geometry, hidden=64, intermediate=128, vocab=100))
    full, window = (run(trace, policy=p, budget="5", model="llama-3.1-8b") for p in ("full", "fifo"))
    assert (full.gold_loss, full.output_error, full.stranded_share) == pytest.approx((0.0, 0.0, 0.0), abs=1e-6)
    assert window.gold_loss == 1.0 and window.gold_gone == 8 and window.output_error > 0 and window.stranded_share > 0
    steps = window.steps
    assert steps.gold_needed.tolist() == [0, *[4] * 8] and np.isnan(steps.output_error[0])
    assert (window.state_bytes_per_page, full.state_bytes_per_page) == (4, 0)


def test_what_was_not_counted_is_not_zero():
    """Stranded tokens are those of pages of one token, in the lossy regime, where somebody looks."""
    trace = synthetic_trace(prompt=20, steps=6)
    keys = {"policy": "lru", "budget": "30%", "model": "llama-3.2-1b"}
    assert run(trace, **keys).stranded_share > 0
    for other in ({"page_size": 2}, {"regime": "offload", "page_size": 1}, {"ceiling": False}):
        assert np.isnan(run(trace, **(keys | other)).stranded_share), other
