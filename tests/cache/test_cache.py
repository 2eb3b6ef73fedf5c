"""The table, the view and one step of the cache: what a policy sees, what is refused and in which words."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvsim.cache.cache import Cache
from kvsim.cache.demand import Use, parse_demand, parse_use
from kvsim.cache.table import Table
from kvsim.cache.tiers import Capacity
from kvsim.cache.view import keep, share_of, window
from kvsim.errors import ConfigError, PolicyError
from kvsim.testing import moved, tiny_trace
from kvsim.trace.access import DenseSource, dense_trace
from tests.helpers import THETA, policy_for, replay

# -- the table ---------------------------------------------------------------------------------------------------


def test_slots_are_reused_and_private_columns_start_at_zero():
    t = Table(2, 3, {"heat": np.float32})
    t.fill(2)
    t.private["heat"][:] = 5
    t.release(np.zeros((2, 1), np.int32), np.array([1, 0]))  # key 0 of lane 0
    t.insert(2, now=4)
    t.audit()
    assert t.key.tolist() == [[2, 1, -1], [0, 1, 2]]
    assert t.private["heat"].tolist() == [[0, 5, 5], [5, 5, 0]]
    assert t.born.tolist() == [[4, 0, 0], [0, 0, 4]]
    assert t.resident().tolist() == [2, 3]


@pytest.mark.parametrize("slots", [3, 9])
def test_resizing_keeps_every_page_and_its_columns(slots):
    t = Table(1, 6, {"heat": np.int16})
    t.fill(5)
    t.private["heat"][0, :5] = 10 * np.arange(5)
    t.release_where(np.isin(t.key, (0, 3)))
    t = moved(t, np.random.default_rng(1)).resized(slots)
    t.audit()
    assert t.key[0, :3].tolist() == [1, 2, 4]
    assert t.private["heat"][0, :3].tolist() == [10, 20, 40] and t.private["heat"].dtype == np.int16
    assert t.free_count.tolist() == [slots - 3]


def test_table_is_as_wide_as_the_budget_once_the_prompt_is_cut():
    run = replay("lru", 3, tiny_trace(prompt=40, steps=4))
    assert run.cache.table.slots == 5  # budget, a newcomer, and one more


# -- the view ----------------------------------------------------------------------------------------------------


def view_after(spec="lru", budget=4, **kw):
    return replay(spec, budget, tiny_trace(prompt=6, steps=3), **kw).cache.view


def test_view_is_read_only():
    view = view_after("lfu")
    for name in ("key", "born", "arrived", "last", "uses", "mass", "weights", "budget"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(view, name)[:] = 0
    view["count"][:] = 3  # private
    assert view.newest == 8 and view.now == 3 and view.budget.shape == (2, 2, 1)
    assert view.resident.sum(-1).tolist() == [[4, 4], [4, 4]]


def test_prompt_statistics_are_shown_at_prefill_only_and_cannot_be_changed():
    seen = {}
    policy = policy_for("lru", granularity="layer")
    policy.observe = lambda view: seen.setdefault(view.now, view.prompt)
    replay(policy, 4, tiny_trace(prompt=6, steps=2))
    assert seen[1] is None and seen[0].colsum.shape == (2, 1, 6) and seen[0].rows.shape == (6, 2, 1, 6)
    for array in (seen[0].colsum, seen[0].rows, seen[0].peaks):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0


def test_keep_guards_sinks_and_the_newest():
    view = view_after("full")
    assert keep(view, view.mass * 0, sink=2, recent=1)[0, 0, :9].tolist() == [np.inf] * 2 + [0] * 6 + [np.inf]


@pytest.mark.parametrize("rows", ["visible", "full"])
@pytest.mark.parametrize("granularity", ["head", "layer", "token"])
def test_weights_are_renormalised_over_what_is_visible(rows, granularity):
    policy, sums = policy_for("fifo", rows=rows, granularity=granularity), []
    policy.observe = lambda view: sums.append(np.where(view.key >= 0, view.weights, 0).sum(-1).ravel())
    run = replay(policy, 4, tiny_trace(prompt=6, steps=9))
    for total, out in zip(sums[1:], run.out[1:], strict=True):
        found = out.hit.reshape(len(total), -1)
        assert total == pytest.approx((found > 0).mean(1) if rows == "visible" else found.mean(1), abs=1e-6)


# -- words for what is wrong -------------------------------------------------------------------------------------


def broken(**methods):
    policy = policy_for("lru")
    for name, function in methods.items():
        setattr(policy, name, function)
    return policy


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ({"score": lambda v: v.key.sum(-1)}, r"scores of shape \(2, 2\), expected one broadcastable to \(2, 2, \d+\)"),
        ({"score": lambda v: None}, "scores of type object"),
        ({"score": lambda v: np.array(["a"])}, "scores of type <U1"),
        ({"score": lambda v: np.where(v.key == 2, np.nan, 0)}, r"NaN at step 0, lane \(0, 0\)"),
        ({"score": lambda v: 1 / 0}, "failed in score at step 0"),
        ({"observe": lambda v: v.mass.fill(0)}, "failed in observe at step 0"),
        ({"score": lambda v: v.key * 1e300}, r"more than float32 holds, or NaN at step 0, lane \(0, 0\)"),
        ({"split": lambda v: np.ones(7)}, r"budgets of shape \(7,\)"),
        ({"split": lambda v: v.budget * np.nan}, "a budget of nan pages at step 0"),
        ({"split": lambda v: v.budget - 5 * (v.now == 2)}, "a budget of -1 pages at step 2"),
        ({"select": lambda v: np.ones((5, 5, 5), bool)}, r"a read set of shape \(5, 5, 5\)"),
    ],
)
def test_a_broken_policy_is_named(methods, words):
    with pytest.raises(PolicyError, match=words) as caught:
        replay(broken(**methods), 4, tiny_trace())
    assert 'policy "lru"' in str(caught.value) and "Lru." in caught.value.where


def test_split_shares_out_the_budget_of_the_run_at_every_step():
    """Other hooks see what is in force."""
    shown = {"split": [], "score": []}
    policy = policy_for("fifo")
    half = np.array([0.5, 1.5])[:, None]
    policy.split = lambda v: shown["split"].append(v.budget.copy()) or v.budget * half
    policy.score = lambda v: shown["score"].append(v.budget.copy()) or v.key
    run = replay(policy, 4, tiny_trace(prompt=8, steps=4))
    assert len(shown["split"]) == len(shown["score"]) / 2 == 5  # the tests' helper asks for each score again
    assert all((b == 4).all() for b in shown["split"])
    assert all(b[:, :, 0].tolist() == [[2, 6], [2, 6]] for b in shown["score"])
    assert all((c & 1).sum(-1).tolist() == [2, 6, 2, 6] for c in run.copies)


@pytest.mark.parametrize(
    ("tier", "words"), [(0, "tier that does not exist"), (3, "tier that does not exist"), ([1, 2, 3], "tiers of shape")]
)
def test_a_broken_offload_policy_is_named(tier, words):
    from kvsim import registry

    offload = registry.build("spill", "offload")
    offload.place = lambda view, victims: np.array(tier)
    trace = tiny_trace()
    cache = Cache(trace.lanes, 36, policy_for("lru"), Capacity(4), offload=offload, use=THETA, demand=THETA)
    with pytest.raises(PolicyError, match=words) as caught:
        for a in trace.requests()[0].accesses():
            cache.access(a)
    assert 'policy "spill"' in str(caught.value)


@pytest.mark.parametrize(
    ("policy", "budget", "words"),
    [
        ("lru", 0, "budget of 0 pages is below the 1 that lru protects"),
        ("tova", 0, "budget of 0 pages"),  # it protects nothing, but nothing cannot be kept
        ("streaming-llm(sink=4)", 4, "below the 5 that streaming-llm protects"),
        ("lazy-eviction(window=9)", 8, "below the 9"),
        ("lru(protect_head=0.5, protect_tail=0.6)", 10, "below the 11"),
        ("lru(protect_head=2)", 10, "protect_head = 2"),
        ("lru(protect_tail='x')", 10, "protect_tail = 'x'"),
        ("lru(sink=-1)", 10, "sink = -1"),
        ("lru(recent='50')", 10, "recent = '50'"),
        ("lru(recent='many%')", 10, "recent = 'many%'"),
        ("lru(recent='150%')", 10, "recent = '150%'"),
    ],
)
def test_budgets_that_make_no_sense(policy, budget, words):
    with pytest.raises(ConfigError, match=words):
        replay(policy, budget, tiny_trace())


def test_a_full_cache_needs_no_budget_and_a_large_one_protects_what_it_likes():
    assert replay("full(sink=9)", 1, tiny_trace()).out[-1].resident.tolist() == [36] * 4
    assert replay("streaming-llm(sink=50)", 36, tiny_trace()).out[-1].resident.tolist() == [36] * 4


def test_shares_are_whole_pages():
    """29 % of 100 is 29 although 0.29 * 100 is a little less in binary."""
    budget = np.array([100, 7])
    assert share_of(0.29, budget).tolist() == window("29%", budget, 1).tolist() == [29, 2]
    assert window(17, budget, 16).tolist() == [2, 2]


# -- use and demand ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "use"),
    [(1.0, Use()), ("0.5", Use("share", 0.5)), ("share(2)", Use("share", 2.0)), ("weight(1e-4)", Use("weight", 1e-4))],
)
def test_parse_use(text, use):
    assert parse_use(text) == use


@pytest.mark.parametrize(
    ("text", "use"),
    [
        ("dense", Use("all")),
        ("theta", THETA),
        ("theta(0.01)", Use("weight", 0.01)),
        ("topk(64)", Use("topk", 64.0)),
        ("select", None),
    ],
)
def test_parse_demand(text, use):
    assert parse_demand(text, THETA) == use


@pytest.mark.parametrize(
    "text",
    ["topk", "topk(1.5)", "dense(3)", "theta(x)", "everything", "", "theta(0)", "topk(-1)", "theta(nan)", "topk(inf)"],
)
def test_demands_that_are_refused(text):
    with pytest.raises(ConfigError):
        parse_demand(text, THETA)


@pytest.mark.parametrize("text", ["", "weight", "weight(0)", -1, "share(x)", "often", "nan"])
def test_uses_that_are_refused(text):
    with pytest.raises(ConfigError):
        parse_use(text)


@pytest.mark.parametrize(("lag", "once", "page"), [(1, False, 1), (3, False, 1), (1, True, 1), (1, False, 4)])
def test_pages_of_other_sizes_may_be_over_the_budget_by_as_many(lag, once, page):
    """Between decisions, and where a single page is larger than it: the audit lets that pass."""
    trace = tiny_trace(0, 1, 1, 12, 12).paged(page)
    request, policy = trace.requests()[0], policy_for("lru", lag=lag, once=once)
    facts = {"size": np.full(request.stride, 7.0, np.float32)}
    cache = Cache(trace.lanes, request.stride, policy, Capacity(6), page_size=page, facts=lambda: facts, audit=True)
    for a in request.accesses():
        cache.access(a)


@pytest.mark.parametrize(
    ("use", "limit", "key"),
    [
        (Use("share", 2), 0.5, 0),
        (Use("weight", 0.1), 0.1, 0),
        (Use("topk", 1), 0.5, 1),
        (Use("topk", 2), 0.2, 4),  # three pages tie for the second place: the newest has it
        (Use("topk", 3), 0.2, 3),
        (Use("topk", 4), 0.2, 2),
        (Use("topk", 5), 0.0, 1),  # no more than that are visible
        (Use("topk", 9), 0.0, 1),
        (Use("all"), 0.0, 1),
    ],
)
def test_limits(use, limit, key):
    peak = np.array([[0.9, 0.5, 0.2, 0.2, 0.2, 0.9]], np.float32)  # page 0 has left the window, page 5 is not born
    need, need_key = use.limits(peak, 5, np.array([4]), np.array([1]))
    assert need.tolist() == pytest.approx([limit]) and need_key.tolist() == [key]
    assert (need.dtype, need_key.dtype) == (np.float32, np.int32)


@given(
    hnp.arrays(np.float32, (3, 12), elements=st.integers(0, 3).map(lambda n: n / 4)),
    st.integers(1, 12), st.integers(1, 14), st.data(),
)  # fmt: skip
def test_topk_is_exact(peak, keys, k, data):
    """Against a sort by weight and key: exactly k pages of a row, or all of its visible ones."""
    first = np.array(data.draw(st.lists(st.integers(0, keys - 1), min_size=3, max_size=3)))
    peak[:, :keys][np.arange(keys) < first[:, None]] = 0
    used = Use("topk", k).used(peak, keys, np.ones(3), first)
    for lane in range(3):
        right = sorted(range(first[lane], keys), key=lambda j: (peak[lane, j], j))[-k:]
        assert np.flatnonzero(used[lane]).tolist() == sorted(right)


@pytest.mark.parametrize("demand", [Use("topk", 2), Use("weight", 0.2), Use("all")])
def test_need_of_a_page_is_its_largest_token(demand):
    """A page of many small weights is not needed where one large weight is."""
    trace = tiny_trace(layers=1, heads=1, prompt=8, steps=1).paged(4)
    trace.sources[0]._decode[0, 0, 0] = [0.15, 0.15, 0.15, 0.15, 0.4, 0, 0, 0, 0]
    out = replay("lru", 9, trace, offload="spill", demand=demand).out[1]
    assert int(out.used[0]) == {"topk": 2, "weight": 1, "all": 3}[demand.kind]


@pytest.mark.parametrize("page_size", [1, 2])
@pytest.mark.parametrize("windows", [(0, 0), (0, 6)])
def test_a_step_needs_exactly_k_pages_of_a_row(windows, page_size):
    """The used pages, as the whole row and as the demand counts them; the prompt's rows see no page that is not yet."""
    trace, k = tiny_trace(windows=windows).paged(page_size), 5
    run = replay("lru", 4, trace, offload="spill", demand=Use("topk", k))
    for a, out in zip(trace.requests()[0].accesses(), run.out, strict=True):
        assert out.used.tolist() == np.repeat(np.minimum(a.keys - a.first, k), 2).tolist()


@pytest.mark.parametrize("page_size", [1, 2])
def test_rows_of_the_prompt_use_only_what_they_see(page_size):
    """Row i of 12 sees i + 1 tokens; with k pages, the newest k of equal ones."""
    trace, uses = tiny_trace(prompt=12, steps=1, windows=(0, 6)).paged(page_size), {}
    for demand in (Use("all"), Use("topk", 2)):
        policy = policy_for("full")
        policy.observe = lambda view: uses.setdefault(demand.kind, view.uses[:, 0, : 12 // page_size].copy())  # noqa: B023
        replay(policy, 4, trace, offload="spill", demand=demand)
    rows = 12 - np.arange(0, 12, page_size)
    assert uses["all"].tolist() == [rows.tolist(), np.minimum(rows, 5 + page_size).tolist()]
    once = page_size  # rows that see one page only
    assert uses["topk"].sum(1).tolist() == [2 * 12 - once] * 2


def test_nothing_at_all_cannot_be_needed():
    """A weight of zero would be every page's, none of the largest none."""
    for text, says in (("topk(0)", "no row would need a page"), ("theta(0)", "every row would use every page")):
        with pytest.raises(ConfigError, match="above zero") as caught:
            parse_demand(text, THETA)
        assert says in caught.value.hint


def test_demand_select_needs_a_read_set():
    with pytest.raises(ConfigError, match="has none"):
        replay("lru", 4, tiny_trace(), offload="spill", demand=None)


class SelectOnly:
    """A policy that reads, and never says what may leave."""

    def select(self, view):
        return view.key >= 0


def test_a_read_set_alone_cannot_say_what_leaves_the_gpu(registered):
    policy = registered("reader", SelectOnly)
    assert replay(policy, 3, tiny_trace()).out[-1].read.sum() == 4 * 36
    with pytest.raises(PolicyError, match='"reader" has no score') as caught:
        replay(policy, 3, tiny_trace(), offload="spill", demand=None)
    assert "what leaves the GPU" in caught.value.hint and "SelectOnly.score" in caught.value.where


@pytest.fixture
def registered(monkeypatch):
    """Registers a class for one test, and builds it."""
    from kvsim import registry

    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))
    return lambda name, cls: registry.policy(name)(cls)()


# -- what an access says -----------------------------------------------------------------------------------------


def test_held_is_what_is_on_the_gpu_while_attention_runs():
    """After a page has entered and others were fetched, before any leaves; at prefill the whole prompt."""
    trace = tiny_trace(prompt=6, steps=3)
    held = [o.held.tolist() for o in replay("lru", 4, trace).out]
    assert held == [[6] * 4, [5] * 4, [5] * 4, [5] * 4]
    assert [o.held.tolist() for o in replay("lru", 4, trace, offload="spill", demand=Use("all")).out] == [
        [n] * 4 for n in (6, 7, 8, 9)
    ]
    assert replay("h2o-mask", 4, trace).out[-1].held.tolist() == [9] * 4  # hidden pages are held too
    assert replay(policy_for("lru", lag=3), 4, trace).out[-1].held.tolist() == [7] * 4
    windows = tiny_trace(prompt=6, steps=3, windows=(0, 2))
    assert [o.held.tolist() for o in replay("full", 4, windows).out[:2]] == [[6] * 4, [7, 7, 2, 2]]


def test_a_page_read_back_from_the_ssd_is_not_written_again():
    """Its copy below is clean, on whichever tier: evicted again, it only leaves the GPU."""
    run = replay("lru", 2, tiny_trace(layers=1, heads=1), offload="spill", demand=Use("all"), host=0, ssd=None)
    for a, out in zip(tiny_trace(layers=1, heads=1).requests()[0].accesses(), run.out, strict=True):
        assert out.spilled[1:].sum(1).tolist() == ([10, 10] if a.prefill else [1, 1])  # the page that is new below
        assert out.fetched.sum(1).tolist() == [0, 0, 0 if a.prefill else a.keys - 1 - 2]


def test_a_request_that_writes_nothing():
    """Only a prompt: every policy, oracles too."""
    for spec in ("lru", "belady", "mass-oracle"):
        assert replay(spec, 4, tiny_trace(prompt=6, steps=0)).out[0].resident.tolist() == [4] * 4


# -- what prefill counts -----------------------------------------------------------------------------------------


def uses(trace, policy, use):
    """What a policy sees of `uses` at prefill, [layers, kv_heads, keys]."""
    seen = []
    policy.observe = lambda view: seen.append(view.uses[..., : view.keys].copy())
    replay(policy, 9, trace, use=use)
    return seen[0].tolist()


def test_heads_that_share_a_lane_count_as_often_as_the_one_that_used_a_page_most():
    """At prefill; of the means of these heads, as decode steps compare them, page 1 would have been used once."""
    rows = np.zeros((3, 1, 2, 3), np.float32)
    rows[:, 0, 0] = [[1, 0, 0], [1, 0, 0], [1, 0, 0]]
    rows[:, 0, 1] = [[1, 0, 0], [0.1, 0.9, 0], [0, 0.3, 0.7]]
    trace = dense_trace([DenseSource(rows, np.zeros((0, 1, 2, 3), np.float32))])
    assert uses(trace, policy_for("lfu"), THETA) == [[[3, 0, 0], [1, 2, 1]]]
    assert uses(trace, policy_for("lfu", granularity="layer"), THETA) == [[[3, 2, 1]]]


def test_a_page_that_a_window_has_left_in_part_is_still_seen():
    """Pages of two tokens, a window of three: the fourth row sees token 1, and so page 0."""
    trace = tiny_trace(layers=1, heads=1, prompt=4, steps=1, windows=(3,)).paged(2)
    trace.sources[0]._prompt[:, 0, 0] = np.eye(4)
    assert uses(trace, policy_for("full"), Use("all")) == [[[4, 2]]]


def test_state_is_every_column_in_full():
    """An array of five per page counts five times, and `arrived` since FIFO looks at it."""
    policy = policy_for("fifo", columns={"ring": (np.float32, 5), "bit": np.bool_})
    assert replay(policy, 4, tiny_trace(prompt=6, steps=3)).cache.view.state_bytes == 4 * 5 + 1 + 4
