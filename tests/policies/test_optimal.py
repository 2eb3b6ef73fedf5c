"""The exact lossy optimum against exhaustive search, against every other policy, and against its own bound."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import kvsim
from kvsim import registry
from kvsim.cache import kernels
from kvsim.errors import ConfigError, KvsimError
from kvsim.policies.optimal import hold
from kvsim.testing import tiny_trace
from tests.helpers import matrix_trace, policy_for, replay
from tests.strategies import budgets, traces

some = settings(deadline=None, max_examples=60)
few = settings(deadline=None, max_examples=15)
PROTECTION = st.fixed_dictionaries(
    {
        "sink": st.integers(0, 2),
        "recent": st.sampled_from((0, 0, 1, 2, "50%")),
        "protect_tail": st.sampled_from((0, 0.4)),
    }
)


def best_by_search(accesses, budget: int, page_size: int, head: int, tail: int) -> float:
    """The most that one lane can attend to in decode steps: every choice of victims at every step."""
    states: dict[frozenset, float] = {frozenset(): 0.0}
    for a in accesses:
        after: dict[frozenset, float] = {}
        new = range(a.keys - a.fresh, a.keys)
        held = {k for k in range(a.keys) if k < head or k >= a.keys - tail}
        pinned = {a.keys - 1} if a.tokens % page_size else set()
        for kept, value in states.items():
            seen = sorted(k for k in kept.union(new) if k >= a.first[0])
            value += 0 if a.prefill else float(a.row[0, 0, seen].astype(np.float64).sum())
            over = max(0, len(seen) - budget)
            leaving = [k for k in seen if k not in held | pinned]
            assert len(leaving) >= over
            for victims in itertools.combinations(leaving, over):
                rest = frozenset(seen).difference(victims)
                after[rest] = max(after.get(rest, 0.0), value)
        states = after
    return max(states.values())


def one_lane(trace, layer: int, head: int):
    """The accesses of one lane."""
    for a in trace.requests()[0].accesses():
        yield replace(a, row=a.row[layer : layer + 1, head : head + 1].copy(), first=a.first[layer : layer + 1])


def attended(run) -> np.ndarray:
    """Per row lane, the mass seen in decode steps."""
    return sum((o.attended.astype(np.float64) for o in run.out[1:]), np.zeros(len(run.out[0].attended)))


# -- by hand and by search -----------------------------------------------------------------------------------------


def test_the_published_matrix():
    """Three slots. Page 1 is worth waiting for, 0.56 in the last row; page 2 gives more than page 0."""
    run = replay("optimal", 3)
    assert (run.kept()[:-1], run.mass()) == ([[0, 1, 2], [1, 2, 3], [1, 2, 3]], [1, 1, 0.82, 0.93])


def test_a_slot_is_worth_what_else_it_could_hold():
    """One slot. Page 0 has 0.6 to give and page 1 only 0.5, but 0.4 of that at once, before page 2 is better still."""
    rows = [[1.0], [0.5, 0.5], [0.1, 0.4, 0.5], [0, 0.1, 0.5, 0.4], [0.5, 0, 0.2, 0.1, 0.2]]
    trace = matrix_trace(rows, prompt=2)
    greedy, best = replay("mass-oracle", 1, trace), replay("optimal", 1, trace)
    assert (greedy.kept(start=0)[:-1], greedy.mass()) == ([[0], [2], [2]], [0.6, 0.9, 0.4])
    assert (best.kept(start=0)[:-1], best.mass()) == ([[1], [2], [2]], [0.9, 0.9, 0.4])


@some
@given(traces(), st.integers(1, 3))
def test_no_choice_of_victims_is_better(trace, budget):
    """Several lanes, pages of several tokens, layers with sliding windows, prompts longer than the budget."""
    run = attended(replay("optimal", budget, trace))
    for i, (layer, head) in enumerate(np.ndindex(trace.lanes)):
        assert run[i] == pytest.approx(best_by_search(one_lane(trace, layer, head), budget, trace.page_size, 0, 0))


@some
@given(traces(page_sizes=(1, 2)), st.integers(2, 4), PROTECTION)
def test_no_choice_is_better_where_pages_are_protected(trace, budget, protection):
    spec = f"optimal({', '.join(f'{k}={v!r}' for k, v in protection.items())})"
    try:
        run = replay(spec, budget, trace)
    except ConfigError:
        run = None
    assume(run)
    head, tail = (int(x.max()) for x in run.cache.protected())
    for i, (layer, kv_head) in enumerate(np.ndindex(trace.lanes)):
        best = best_by_search(one_lane(trace, layer, kv_head), budget, trace.page_size, head, tail)
        assert attended(run)[i] == pytest.approx(best)


@some
@given(st.data())
def test_the_programme_alone(data):
    """`hold` against every combination of moments, with room that changes; its plan is worth what it says."""
    moments, pages = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    number = st.integers(0, 8)
    gains = np.array(
        data.draw(st.lists(st.lists(number, min_size=pages, max_size=pages), min_size=moments, max_size=moments))
    )
    start = np.array(data.draw(st.lists(st.integers(0, moments), min_size=pages, max_size=pages)))
    room = np.array(data.draw(st.lists(st.integers(0, 3), min_size=moments, max_size=moments)))
    until, value = hold(gains.astype(np.float32), start, room)

    def worth(plan):
        held = np.array([[start[p] <= t < plan[p] for p in range(pages)] for t in range(moments)])
        return gains[held].sum() if (held.sum(1) <= room).all() else -1

    assert value == pytest.approx(max(worth(plan) for plan in itertools.product(range(moments + 1), repeat=pages)))
    assert (until >= start).all() and worth(until) == pytest.approx(value)


# -- against everything else ---------------------------------------------------------------------------------------


@few
@given(traces(), budgets)
def test_no_policy_attends_to_more(trace, budget):
    """Everything registered that holds no more than the budget, each at its own granularity."""
    best: dict[str, np.ndarray] = {}
    for spec in registry.names("policy"):
        other = registry.build(spec)
        if "lossy" not in other.regimes or other.needs - trace.provides:
            continue
        try:
            run = replay(other, budget, trace, audit=False)
        except KvsimError:  # it protects more than the budget, or wants more rows of the prompt
            continue
        if any((o.resident > budget).any() for o in run.out):
            continue
        scale = other.granularity
        if scale not in best:
            best[scale] = attended(replay(policy_for("optimal", granularity=scale), budget, trace))
        found = attended(run)
        assert found.sum() <= best[scale].sum() + 1e-5, spec
        assert scale != "head" or (found <= best[scale] + 1e-5).all(), spec
    assert {"head", "layer"} <= set(best)


@few
@given(traces(windows=False), budgets)
def test_between_the_references_and_the_step_ceiling(trace, budget):
    best, ceiling = attended(replay("optimal", budget, trace)), 0
    one = np.empty(len(best), np.float32)
    for a in trace.requests()[0].accesses():
        if not a.prefill:
            row, count = a.row.reshape(len(one), -1), np.full(len(one), budget + 1)
            kernels.largest_sum(0, len(one), row, a.keys, count, one)
            ceiling = ceiling + one
    assert (best <= ceiling + 1e-5).all()
    for spec in ("belady", "mass-oracle"):
        assert (best >= attended(replay(spec, budget, trace)) - 1e-5).all()


@few
@given(traces(windows=False), st.integers(1, 6))
def test_more_room_is_never_worse(trace, budget):
    less, more = (attended(replay("optimal", b, trace)) for b in (budget, budget + 1))
    assert (less <= more + 1e-6).all()


# -- edges ---------------------------------------------------------------------------------------------------------


def test_everything_fits():
    for budget in (6, 100):
        assert replay("optimal(limit=0)", budget).kept()[-1] == list(range(6))


def test_layers_share_a_decision():
    """The mean of two heads' rows decides."""
    trace = tiny_trace(heads=2, layers=1)
    both = attended(replay(policy_for("optimal", granularity="layer"), 4, trace)).sum()
    alone = attended(replay("optimal", 4, trace)).sum()
    pooled = attended(replay("optimal", 4, trace.pooled("layer")))
    assert both == pytest.approx(2 * pooled[0]) and both <= alone


def test_blocks_of_lanes_are_read_one_after_another(monkeypatch):
    trace = tiny_trace(seed=3, layers=2, heads=2)
    whole = replay("optimal", 4, trace)
    monkeypatch.setattr("kvsim.policies.optimal._BLOCK", 1)
    np.testing.assert_array_equal(replay("optimal", 4, trace).copies, whole.copies)


def test_too_large_a_lane_is_refused():
    with pytest.raises(ConfigError, match=r"36 pages times 24 steps are above its limit of 500") as error:
        replay("optimal(limit=500)", 4, tiny_trace())
    assert "optimal(limit=864)" in error.value.hint
    replay("optimal(limit=864)", 4, tiny_trace())


def test_too_much_is_protected():
    trace = tiny_trace(steps=5).paged(4)
    with pytest.raises(ConfigError, match="3 pages are protected or still being filled, the budget is 2"):
        replay("optimal(sink=8)", 2, trace)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "highspy", None)
    with pytest.raises(ConfigError) as error:
        replay("optimal", 3)
    assert "highspy" in error.value.what and "kvsim[optimal]" in error.value.hint


def test_only_where_pages_are_gone():
    with pytest.raises(kvsim.errors.PolicyError, match="does not work in the offload regime"):
        kvsim.run(tiny_trace(), policy="optimal", budget="8", regime="offload", model="llama-3.2-1b")


def test_recall_of_a_run():
    """As the command line says it: the sum of the lanes' optima over the weight of all rows."""
    trace = tiny_trace(seed=1, prompt=6, steps=10)
    result = kvsim.run(trace, policy="optimal", budget="3", model="llama-3.2-1b")
    best = sum(best_by_search(one_lane(trace, *lane), 3, 1, 0, 0) for lane in np.ndindex(trace.lanes))
    assert result.recall == pytest.approx(best / result.steps.weight[1:].sum())
    assert result.recall <= result.ceiling
