"""What holds for every trace: budgets, bounds, nesting, independence of lanes and slots."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvsim.cache import kernels
from kvsim.cache.cache import Cache
from kvsim.cache.demand import Use
from kvsim.errors import ConfigError
from kvsim.testing import moved
from kvsim.trace.access import DenseSource
from tests.helpers import policy_for, refer, replay
from tests.strategies import DEMANDS, LAGGED, ONLINE, ORACLES, budgets, traces

few = settings(deadline=None, max_examples=40)
bounded = st.sampled_from((*ONLINE, *ORACLES))
needs = st.sampled_from(DEMANDS)


# -- budgets -----------------------------------------------------------------------------------------------------


@few
@given(traces(), bounded, budgets, st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_budget_is_kept(trace, spec, budget, batch, lag, offload):
    """A batch never exceeds the budget; a lag does, by at most `lag - 1` and only where pages are gone for good."""
    policy = policy_for(spec, batch=batch, lag=lag)
    run = replay(policy, budget, trace, offload="spill" if offload else None, demand=Use("weight", 0.1))
    resident = (run.copies & 1).sum(-1)
    assert (resident <= budget + (0 if offload else lag - 1)).all()
    assert (resident[-1] == run.out[-1].resident).all()
    decided = [i for i in range(len(resident)) if i % lag == 0]
    assert (resident[decided] <= budget).all()


@few
@given(traces(windows=False, page_sizes=(1,)), st.integers(3, 6), st.integers(2, 4))
def test_batch_evicts_several_at_once_when_full(trace, budget, batch):
    assume(trace.requests()[0].prompt_tokens <= budget)
    for out in replay(policy_for("fifo", batch=batch), budget, trace).out:
        assert out.dropped in (0, min(batch, budget) * trace.lanes[0] * trace.lanes[1])


@few
@given(traces(), st.sampled_from((*ONLINE, *ORACLES, "h2o-mask", "full")), st.booleans())
def test_full_budget_loses_and_moves_nothing(trace, spec, offload):
    request = trace.requests()[0]
    run = replay(
        policy_for(spec), request.stride, trace, offload="spill" if offload else None, demand=Use("share", 1.0)
    )
    for out in run.out:
        np.testing.assert_array_equal(out.hit, out.total)
        np.testing.assert_array_equal(out.attended, out.total)
        np.testing.assert_array_equal(out.found, out.used)
        assert out.dropped == out.fetched.sum() == out.spilled.sum() == 0


@few
@given(traces(windows=False), bounded, budgets)
def test_prompt_beyond_the_budget_is_cut_at_prefill(trace, spec, budget):
    run = replay(spec, budget, trace)
    pages = -(-trace.requests()[0].prompt_tokens // trace.page_size)
    assert (run.out[0].resident == min(pages, budget)).all()
    assert run.out[0].dropped == max(0, pages - budget) * run.cache.lanes
    assert (run.out[0].hit == 1).all()  # attention of the prompt saw all of it


# -- bounds ------------------------------------------------------------------------------------------------------


@few
@given(traces(windows=False), st.sampled_from((*ONLINE, *ORACLES, "h2o-mask")), budgets)
def test_no_policy_is_above_the_step_ceiling(trace, spec, budget):
    policy, request = policy_for(spec, granularity="head"), trace.requests()[0]
    ceiling = np.empty(trace.lanes[0] * trace.lanes[1])
    run = replay(policy, budget, trace)
    for a, out in zip(request.accesses(), run.out, strict=True):
        if not a.prefill:
            row, count = a.row.reshape(len(ceiling), -1), np.full(len(ceiling), budget + 1)
            kernels.largest_sum(0, len(ceiling), row, a.keys, count, ceiling)
            assert (out.attended <= ceiling + 1e-6).all()


@few
@given(traces(page_sizes=(1,)), budgets, st.sampled_from(DEMANDS[:3]))
def test_no_policy_misses_less_than_belady(trace, budget, demand):
    best = replay("belady", budget, trace, offload="spill", demand=demand).misses()
    for spec in (*ONLINE, "mass-oracle"):
        policy = policy_for(spec, granularity="head")
        assert best <= replay(policy, budget, trace, offload="spill", demand=demand).misses(), spec


@few
@given(traces(), st.sampled_from(DEMANDS[:3]), st.sampled_from(("lru(recent=0)", "lru(sink=1)")))
def test_lru_misses_fall_with_the_budget(trace, demand, spec):
    """Inclusion: a larger LRU cache holds what a smaller one holds."""
    smaller = None
    for budget in range(2, 9):
        run = replay(spec, budget, trace, offload="spill", demand=demand)
        if smaller is not None:
            assert run.misses() <= smaller.misses()
            assert (run.copies & smaller.copies & 1 == smaller.copies & 1).all()
        smaller = run


@few
@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=60), st.integers(1, 6))
def test_references_are_rows_of_zeros_and_ones(names, capacity):
    """A block trace rewritten as attention rows leaves what an ordered dictionary leaves, after every request."""
    held, keys = OrderedDict(), {n: i for i, n in enumerate(dict.fromkeys(names))}
    run = refer("lru(recent=0)", names, capacity)
    for name, kept in zip(names, run.kept(start=0), strict=True):
        held[keys[name]] = True
        held.move_to_end(keys[name])
        if len(held) > capacity:
            held.popitem(last=False)
        assert kept == sorted(held)


# -- independence ------------------------------------------------------------------------------------------------


@few
@given(traces(), st.sampled_from([s for s in ONLINE if s not in ("random", "tova")]), budgets, st.randoms())
def test_permuting_kv_heads_permutes_victims(trace, spec, budget, random):
    heads = list(range(trace.lanes[1]))
    random.shuffle(heads)
    source = trace.sources[0]
    other = DenseSource(source._prompt[:, :, heads], source._decode[:, :, heads])
    other.__class__, other._windows = type(source), source._windows
    run, shuffled = (replay(spec, budget, t) for t in (trace, replace(trace, sources=[other])))
    lanes = np.arange(run.cache.lanes).reshape(trace.lanes)[:, heads].ravel()
    np.testing.assert_array_equal(run.copies[:, lanes], shuffled.copies)


class Shuffling(Cache):
    """Pages change their slots after every step, and the table grows now and then."""

    def access(self, a):
        out = super().access(a)
        if a.step % 3 == 2:
            self.resize(self.table.slots + 4)
        self.table = moved(self.table, np.random.default_rng(a.step))
        self.view.bind(self.table)
        return out


@few
@given(traces(), st.sampled_from((*ONLINE, *ORACLES, *LAGGED, "h2o-mask")), budgets, st.booleans())
def test_slots_do_not_matter(trace, spec, budget, offload):
    """Private columns move with their page, through growth and shrinking."""
    assume(budget > 3 or spec not in LAGGED)
    kind = {"offload": "spill", "demand": Use("weight", 0.1)} if offload else {}
    plain, shuffled = (replay(spec, budget, trace, kind=c, **kind) for c in (Cache, Shuffling))
    np.testing.assert_array_equal(plain.copies, shuffled.copies)


# -- tiers -------------------------------------------------------------------------------------------------------


@few
@given(traces(windows=False), bounded, budgets, needs, st.integers(0, 4), st.booleans())
def test_pages_are_conserved(trace, spec, budget, demand, host, ssd):
    """Every page that was born is somewhere; what arrives in a tier and does not leave is there."""
    stride = trace.requests()[0].stride
    host = host if ssd else max(host, stride)
    run = replay(spec, budget, trace, offload="spill", demand=demand, host=host, ssd=None if ssd else 0, record=True)
    to_host, to_ssd, before = 0, 0, np.zeros_like(run.copies[0])
    for a, copies, out in zip(trace.requests()[0].accesses(), run.copies, run.out, strict=True):
        assert (copies[:, : a.keys] > 0).all() and (copies[:, a.keys :] == 0).all() and out.dropped == 0
        entered = a.fresh * run.cache.lanes + out.fetched.sum()
        left = sum(len(move.page) for move in out.moved if move.action == "drop")
        assert (copies & 1).sum() == (before & 1).sum() + entered - left
        to_host, to_ssd = to_host + out.spilled[1].sum(), to_ssd + out.spilled[2].sum()
        assert out.spilled[1].sum() == (((before >> 1) == 0) & ((copies >> 1) > 0)).sum()  # new below: all that crosses
        assert out.spilled[2].sum() == (((before >> 2) == 0) & ((copies >> 2) > 0)).sum()
        assert out.held.sum() == (before & 1).sum() + entered
        assert ((copies >> 1) & 1).sum(-1).max() <= host
        if host >= stride:
            assert ((copies >> 1) & 1).sum() == to_host  # written once, never given up
            assert to_ssd == 0
        else:
            assert ((copies >> 2) & 1).sum() == to_ssd
        before = copies


@few
@given(traces(windows=False), bounded, budgets, st.integers(0, 4), needs)
def test_tiers_that_just_fit_lose_nothing(trace, spec, budget, host, demand):
    """GPU, host and SSD together hold exactly the request."""
    stride = trace.requests()[0].stride
    assume(stride > budget + host)
    ssd = stride - budget - host
    run = replay(spec, budget, trace, offload="spill", demand=demand, host=host, ssd=ssd)
    for bit, limit in ((0, budget), (1, host), (2, ssd)):
        assert ((run.copies >> bit) & 1).sum(-1).max() <= limit
    assert (run.copies[-1] > 0).all()


def test_a_full_host_first_gives_up_what_the_gpu_has_too():
    """Sinks are protected on the GPU only: their copy on the host is as redundant as any other."""
    run = replay("streaming-llm(sink=1)", 3, offload="spill", demand=Use("all"), host=2, ssd=None)
    for copies in run.copies:
        on_host = (copies & 2) > 0
        assert on_host.sum() < 2 or not (on_host & ((copies & 1) > 0)).any()


@pytest.mark.parametrize("host", [0, 1])
def test_tiers_too_small_are_refused(host):
    with pytest.raises(ConfigError, match="GPU, host and SSD hold"):
        replay("lru", 3, offload="spill", demand=Use("all"), host=host, ssd=1)


# -- what is protected, hidden or unfinished ---------------------------------------------------------------------


@few
@given(traces(), bounded, budgets, st.booleans())
def test_windows_keep_and_need_only_what_is_visible(trace, spec, budget, offload):
    run = replay(
        policy_for(spec, granularity="head"), budget, trace, offload="spill" if offload else None, demand=Use("all")
    )
    for a, copies, out in zip(trace.requests()[0].accesses(), run.copies, run.out, strict=True):
        hidden = np.repeat(a.first, trace.lanes[1])[:, None] > np.arange(copies.shape[1])
        assert not (copies > 0)[hidden].any()
        assert (out.used <= a.keys - np.repeat(a.first, trace.lanes[1])).all()


@few
@given(traces(page_sizes=(2, 4)), bounded, st.integers(1, 5), st.booleans(), st.integers(1, 4))
def test_a_page_still_being_filled_stays(trace, spec, budget, offload, batch):
    policy = policy_for(spec, recent=0, sink=0, batch=batch)
    run = replay(policy, budget, trace, offload="spill" if offload else None, demand=Use("all"))
    for a, copies in zip(trace.requests()[0].accesses(), run.copies, strict=True):
        if a.tokens % trace.page_size:
            assert (copies[:, a.keys - 1] & 1).all()


@few
@given(
    traces(windows=False),
    st.integers(1, 9),
    st.integers(0, 4),
    st.sampled_from((0, 1, 3, "25%", "50%")),
    st.integers(1, 4),
)
def test_protection_keeps_what_it_says(trace, budget, sink, recent, batch):
    """A policy that hates exactly what is protected cannot remove it, not even in batches."""
    policy = policy_for("fifo", sink=sink, recent=recent, batch=batch)
    policy.score = lambda view: -np.minimum(view.key, view.newest - view.key)
    head = -(-sink // trace.page_size)
    tail = budget * int(recent[:-1]) // 100 if isinstance(recent, str) else -(-recent // trace.page_size)
    assume(head + tail + (trace.page_size > 1) <= budget)  # one more for the page that is being filled
    run = replay(policy, budget, trace)
    for a, kept in zip(trace.requests()[0].accesses(), run.copies, strict=True):
        keys = np.arange(a.keys)
        protected = (keys < head) | (keys >= a.keys - tail)
        assert (kept[:, : a.keys][:, protected] & 1).all()


@few
@given(
    traces(windows=False), st.integers(4, 9), st.sampled_from((0.0, 0.1, 0.29, 0.5)), st.sampled_from((0.0, 0.25, 0.5))
)
def test_protection_in_shares_of_the_budget(trace, budget, head, tail):
    policy = policy_for("fifo", recent=0, protect_head=head, protect_tail=tail)
    policy.score = lambda view: np.where(view.key % 2, -view.key, view.key)
    head, tail = int(round(100 * head) * budget // 100), int(round(100 * tail) * budget // 100)
    run = replay(policy, budget, trace)
    for a, kept in zip(trace.requests()[0].accesses(), run.copies, strict=True):
        assert (kept[:, :head][:, : a.keys] & 1).all()
        assert (kept[:, max(0, a.keys - tail) : a.keys] & 1).all()


@few
@given(traces(windows=False), budgets, st.integers(0, 3))
def test_streaming_llm_keeps_sinks_and_the_newest(trace, budget, sink):
    pages = -(-sink // trace.page_size)
    assume(pages < budget)
    run = replay(f"streaming-llm(sink={sink})", budget, trace)
    for a, kept in zip(trace.requests()[0].accesses(), run.kept(start=0), strict=True):
        newest = range(max(0, a.keys - (budget - pages)), a.keys) if a.keys > budget else range(a.keys)
        assert kept == sorted({*range(min(pages, a.keys)), *newest})


@few
@given(traces(windows=False, page_sizes=(1,)), budgets)
def test_infinite_scores_leave_last_and_not_never(trace, budget):
    policy = policy_for("fifo", recent=0)
    policy.score = lambda view: np.where(view.key < budget + 2, np.inf, view.key)
    run = replay(policy, budget, trace)
    for a, kept in zip(trace.requests()[0].accesses(), run.kept(start=0), strict=True):
        assert len(kept) == min(a.keys, budget)
        if a.keys >= budget + 2:
            assert kept == list(range(2, budget + 2))  # all of them infinite: among equals the older left


@few
@given(traces(windows=False), budgets, st.integers(0, 3), st.sampled_from((0, 1, 3, "25%", "50%")), st.booleans())
def test_a_read_set_holds_what_is_protected(trace, budget, sink, recent, offload):
    """The mask of H2O reads `budget` pages, sinks and the newest among them; any other read set has these as well."""
    budget = min(budget, trace.requests()[0].stride)
    head = -(-sink // trace.page_size)
    tail = budget * int(recent[:-1]) // 100 if isinstance(recent, str) else -(-recent // trace.page_size)
    other = policy_for("lru", sink=sink, recent=recent)
    other.select = lambda view: view.key == view.newest
    assume(head + max(tail, 1) <= budget)
    read = []
    for policy in (policy_for("h2o-mask", sink=sink, recent=recent), other):
        policy.seen = []
        replay(policy, budget, trace, kind=Reading, offload="spill" if offload else None, demand=None)
        read.append(policy.seen)
    for a, mask, plain in zip(trace.requests()[0].accesses(), *read, strict=True):
        keys = np.arange(trace.requests()[0].stride)
        protected = (keys < a.keys) & ((keys < head) | (keys >= a.keys - max(tail, 1)))
        assert (plain == protected).all()
        pages = a.keys if a.prefill or a.keys - 1 <= budget else budget
        assert mask[:, protected].all() and (mask.sum(-1) == pages).all()


class Reading(Cache):
    """Notes the read set of every step, by key, with its policy."""

    def _read_set(self):
        seen = super()._read_set()
        found = np.zeros((self.lanes, self.stride + 1), bool)
        np.put_along_axis(found, self.table.key.astype(np.intp), seen >= 0, 1)
        self.policy.seen.append(found[:, :-1])
        return seen


# -- hooks -------------------------------------------------------------------------------------------------------


@few
@given(traces(windows=False), st.integers(2, 8), st.integers(1, 3))
def test_split_gives_every_lane_its_own_budget(trace, budget, step):
    policy = policy_for("fifo")
    lanes = np.arange(trace.lanes[0] * trace.lanes[1]).reshape(*trace.lanes, 1)
    policy.split = lambda view: np.maximum(0, budget + step * lanes - view.now // 4)
    run = replay(policy, budget, trace)
    for a, kept in zip(trace.requests()[0].accesses(), run.copies, strict=True):
        wanted = np.clip(budget + step * lanes.ravel() - a.step // 4, 1, trace.requests()[0].stride)
        assert ((kept & 1).sum(-1) <= wanted).all()
        if a.step % 4 == 0:
            assert ((kept & 1).sum(-1) <= np.minimum(wanted, a.keys)).all()


@few
@given(traces(windows=False, page_sizes=(1,)), st.integers(3, 6))
def test_select_in_both_regimes(trace, budget):
    """A read set hides pages without dropping them; with demand "select" it is also what must be on the GPU."""

    def select(view):
        return (view.key >= 0) & ((view.key % 3 == view.now % 3) | (view.key == view.newest))

    lossy, tiered = policy_for("lru"), policy_for("lru")
    lossy.select = tiered.select = select
    request = trace.requests()[0]
    for regime, policy in ((None, lossy), ("spill", tiered)):
        run = replay(policy, budget, trace, offload=regime, demand=None)
        for a, copies, out in zip(request.accesses(), run.copies, run.out, strict=True):
            keys = np.arange(a.keys)
            chosen = (keys % 3 == a.step % 3) | (keys == a.keys - 1)
            assert a.prefill or out.attended == pytest.approx(a.row[..., : a.keys][..., chosen].sum(-1).ravel())
            assert (copies[:, : a.keys] > 0).all()
            assert regime is None or (copies & 1).sum(-1).max() <= budget
            assert a.prefill or out.read.sum() == chosen.sum() * run.cache.lanes
