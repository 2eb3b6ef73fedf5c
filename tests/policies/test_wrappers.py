"""Wrappers: the published vectors of fair eviction, cases by hand, and what holds around any policy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim import registry
from kvsim.cache.cache import Cache
from kvsim.cache.tiers import Capacity
from kvsim.errors import ConfigError, PolicyError
from kvsim.testing import check_policy
from kvsim.testing.traces import tiny_trace
from kvsim.trace.access import DenseSource, dense_trace
from tests.helpers import M1, drive, matrix_trace, replay

TINY = tiny_trace(seed=3, prompt=14, steps=20)


def rows(matrix, lanes=(1, 1)) -> np.ndarray:
    out = np.zeros((len(matrix), *lanes, len(matrix)), np.float32)
    for i, row in enumerate(matrix):
        out[i, ..., : len(row)] = row
    return out


def source(matrix, prompt, **more) -> DenseSource:
    full = rows(matrix)
    return DenseSource(full[:prompt, ..., :prompt], full[prompt:], **more)


def with_facts(spec, budget, trace, page_size=1):
    request = trace.paged(page_size).requests()[0]
    policy = registry.build(spec)
    cache = Cache(trace.lanes, request.stride, policy, Capacity(budget), page_size=page_size, facts=request.facts)
    return drive(cache, request.accesses(), request.stride)


# -- all of them ----------------------------------------------------------------------------------------------------

NESTED = [
    "whitelist(inner='snapkv(window=4)', positions=[0, 3])",
    "whitelist(inner='belady', positions=[2])",
    "fair(spans=[0, 5])",
    "fair(inner='observed-attention', spans=[0, 5])",
    "fair(inner='snapkv(window=4)', spans=[0, 4, 7])",
    "fair(inner='tova-prefill', spans=[0, 4, 7])",
    "fair(inner='pyramidkv(window=4)', spans=[0, 5])",
    "lag(inner='snapkv(window=4)', every=5, shown=6)",
    "lag(inner='knorm', every=3)",
    "pageify(size=4)",
    "pageify(inner='tova', size=3, reduce='mean')",
    "pageify(inner='roco', size=4)",
    "pageify(inner='lag(every=3)', size=3)",
    """whitelist(inner="pageify(inner='h2o', size=2)", positions=[5])""",
]


@pytest.mark.parametrize("spec", NESTED)
def test_the_contract_holds_in_other_shapes_than_the_default(spec):
    assert check_policy(spec) == []


def test_a_wrapper_is_its_inner_policy_where_it_says_nothing():
    p = registry.build("whitelist(inner='snapkv(window=8)')")
    assert (p.once, p.regimes, p.recent, p.granularity, p.evidence) == (True, ("lossy",), 8, "head", "code")
    assert p.needs == {"window_rows"} and list(p.columns) == ["vote"] and p.wraps == (p.policy,)
    assert registry.build("whitelist(inner='random', positions=[1])").evidence == "own"  # the weaker of the two
    belady = registry.build("lag(inner='belady')")
    assert callable(belady.foresee) and belady.rows == "full" and not hasattr(belady, "split")


def test_protection_goes_to_the_inner_policy():
    p = registry.build("whitelist(inner='h2o(recent=3)', sink=2, protect_tail=0.5)")
    assert (p.sink, p.recent, p.protect_head, p.protect_tail) == (2, 3, 0.0, 0.5)
    assert (p.policy.sink, p.policy.protect_tail) == (2, 0.5)
    assert registry.build("lag(inner='lazy-eviction(window=9)', recent=4)").recent == 9


def test_identity_knows_the_inner_policy():
    one, other = (registry.build(f"lag(inner='{inner}')") for inner in ("tova", "fifo"))
    assert registry.source_hash(one) != registry.source_hash(other)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("lag(inner='h2o-mask')", "chooses what is read"),
        ("lag(inner='h2o', size=3)", "no parameter"),
        ("lag(inner='nothing')", "unknown policy"),
        ("lag(every=0)", "every = 0"),
        ("lag(inner='observed-attention')", "needs colsum of a whole prompt"),
        ("pageify(reduce='min')", "reduce"),
        ("""fair(inner="fair(inner='snapkv')")""", "already keeps the column local"),
    ],
)
def test_what_cannot_work_is_said(spec, words):
    with pytest.raises((ConfigError, PolicyError), match=words):
        registry.build(spec)


# -- whitelist ------------------------------------------------------------------------------------------------------


def test_whitelist_pays_from_the_same_budget():
    assert replay("whitelist(inner='streaming-llm(sink=1)', positions=[1])", 3).kept() == [
        [0, 1, 2],
        [0, 1, 3],
        [0, 1, 4],
        [0, 1, 5],
    ]
    # more than fit beside the newest, which the engine protects: the older leave first
    late = replay("whitelist(inner='fifo', positions=[0, 1, 2])", 3).kept()
    assert late == [[0, 1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 5]]


def test_whitelist_of_spans():
    facts = {"span": np.array([0, 0, 1, -1, -1, -1])}
    trace = dense_trace([source(M1, 3, facts=facts)])
    assert registry.build("whitelist(spans=[1])").needs == {"span"}
    assert with_facts("whitelist(inner='fifo', spans=[1])", 2, trace).kept() == [[2, 3], [2, 4], [2, 5]]
    assert with_facts("whitelist(inner='fifo', spans=[0])", 3, trace).kept() == [[0, 1, 3], [0, 1, 4], [0, 1, 5]]


def test_whitelist_keeps_the_page_that_holds_a_listed_token():
    trace = matrix_trace(prompt=4).paged(2)
    kept = replay("whitelist(inner='fifo', positions=[3])", 2, trace).kept()
    assert kept == [[1, 2], [1, 2]]


def test_whitelisted_positions_are_tokens_of_whatever_page():
    """Token 5 of twelve, in pages of two, is in page 2, which FIFO would let go of."""
    trace = tiny_trace(layers=1, heads=1, prompt=12, steps=2).paged(2)
    assert replay("whitelist(inner='fifo', positions=[5])", 3, trace).kept(start=0)[0] == [2, 4, 5]
    assert replay("whitelist(inner='fifo', positions=[2])", 3, trace).kept(start=0)[0] == [1, 4, 5]


# -- fair -----------------------------------------------------------------------------------------------------------


def test_fair_observed_attention():
    """Quotas 1 + 2; scores by the span's own queries; the biased ones keep 0 1 2."""
    expected = [0.76, 0.26, 0.20, 0.1833, 0.13, 0.15]
    spans = dense_trace([source(M1, 6, spans=[(0, 3), (3, 6)])])
    for spec, trace in (
        ("fair(inner='observed-attention', spans=[])", spans),
        ("fair(inner='observed-attention', spans=[0, 3])", matrix_trace(prompt=6)),
    ):
        run = replay(spec, 3, trace)
        assert run.kept(start=0) == [[0, 3, 5]]
        view = run.cache.view
        local = dict(zip(view.key[0, 0].tolist(), view["local"][0, 0].tolist(), strict=True))
        assert [local[k] for k in (0, 3, 5)] == pytest.approx([expected[k] for k in (0, 3, 5)], abs=1e-4)
        assert registry.build(spec).needs == ({"colsum", "spans"} if spec.endswith("[])") else {"colsum"})
    assert replay("observed-attention", 3, matrix_trace(prompt=6)).kept(start=0) == [[0, 1, 2]]
    whole = replay("fair(inner='observed-attention', spans=[0, 3])", 6, matrix_trace(prompt=6)).cache.view
    assert whole["local"][0, 0, :6] == pytest.approx(expected, abs=1e-4)


def test_fair_without_the_local_queries_has_quotas_alone():
    """The last two rows give .21 .61 .35 | .42 and stay themselves; two per span."""
    spec = "fair(inner='snapkv(window=2, kernel=1)', spans=[0, 3], local=False)"
    assert replay(spec, 4, matrix_trace(prompt=6)).kept(start=0) == [[1, 2, 4, 5]]


def test_fair_snapkv_splits_its_window():
    """Window 2: row 2 votes on 0, 1 and stays; row 5 votes on 3, 4 and stays."""
    run = replay("fair(inner='snapkv(window=2, kernel=1)', spans=[0, 3])", 4, matrix_trace(prompt=6))
    assert run.kept(start=0) == [[0, 2, 3, 5]]
    assert run.cache.policy.recent == 1
    full = replay("fair(inner='snapkv(window=2, kernel=3)', spans=[0, 3])", 6, matrix_trace(prompt=6)).cache.view
    third = [0.8 / 3, 0.8 / 3, np.inf, 0.18 / 3, 0.18 / 3, np.inf]  # the row's part in the span, zeros beyond it
    assert full["local"][0, 0, :6] == pytest.approx(third, abs=1e-6)


def test_fair_shares_an_odd_window_as_published():
    """3 rows over two spans: one for the earlier, two for the later."""
    view = replay("fair(inner='snapkv(window=3, kernel=1)', spans=[0, 3])", 6, matrix_trace(prompt=6)).cache.view
    assert view["local"][0, 0, :6] == pytest.approx([0.78, 0.02, np.inf, 0.28 + 0.14, np.inf, np.inf], abs=1e-6)


def test_fair_tova_anchors_each_span():
    """Anchors 2 and 5 stay; row 2 prefers 0 to 1, row 5 prefers 3 to 4."""
    kept = replay("fair(inner='tova-prefill', spans=[0, 3])", 4, matrix_trace(prompt=6)).kept(start=0)
    assert kept == [[0, 2, 3, 5]]


def test_fair_streaming_llm_is_a_ramp_per_span():
    kept = replay("fair(inner='streaming-llm(sink=1)', spans=[0, 3])", 4, matrix_trace(prompt=6)).kept(start=0)
    assert kept == [[0, 2, 4, 5]]


def test_fair_over_many_spans_and_generated_text():
    """At each decision a span of the prompt keeps its share to a page; what rounding leaves goes to generated text."""
    run = replay("fair(inner='lfu', spans=[0, 3, 7])", 9, TINY)
    for lane in range(4):
        for step, kept in enumerate(run.kept(lane)):
            total = 15 + step
            edges = np.array([0, 3, 7, 14, total])
            over = np.histogram(kept, bins=edges)[0] - 9 * np.diff(edges) / total
            assert (np.abs(over[:3]) <= 1).all() and -1 <= over[3] <= 3


@given(st.integers(1, 14), st.lists(st.integers(1, 13), max_size=4))
@settings(max_examples=25, deadline=None)
def test_fair_law(budget, cuts):
    """Retention by span is even to a page, where the plain policy's is not; a span alone is the plain policy."""
    starts = sorted({0, *cuts})
    run = replay(f"fair(inner='observed-attention', spans={starts})", budget, TINY)
    shares = np.diff([budget * e // 14 for e in [*starts, 14]])
    for lane in range(4):
        kept = run.kept(lane, start=0)[0]
        assert np.histogram(kept, bins=[*starts, 14])[0].tolist() == shares.tolist()
    if len(starts) == 1:
        assert run.kept(start=0)[0] == replay("observed-attention", budget, TINY).kept(start=0)[0]


def test_fair_in_pages_rounds_spans_up():
    kept = replay("fair(inner='observed-attention', spans=[0, 3])", 2, matrix_trace(prompt=6).paged(2)).kept(start=0)
    assert kept == [[0, 2]]  # spans of two pages and one: floor(2 * 2 / 3) and the rest


def test_fair_takes_spans_in_any_order_and_joins_those_that_begin_in_one_page():
    for spans in ([(3, 6), (0, 3)], [(0, 3), (3, 6)]):
        trace = dense_trace([source(M1, 6, spans=spans)])
        assert replay("fair(inner='observed-attention', spans=[])", 3, trace).kept(start=0) == [[0, 3, 5]]
    trace = dense_trace([source(M1, 6, spans=[(0, 3), (3, 4), (4, 6)])]).paged(2)  # 3 and 4 begin in page 2
    view = replay("fair(inner='observed-attention', spans=[])", 3, trace).cache.view
    # page 1 holds token 2 of the first span (and 3, which its rows do not see), page 2 tokens 4 and 5
    assert view["local"][0, 0, [1, 2]] == pytest.approx([0.20 / (2 + 1), 0.41 / (2 + 1)], abs=1e-6)


def test_fair_says_what_the_trace_lacks():
    class Few(DenseSource):
        def prompt(self):
            p = super().prompt()
            return type(p)(p.colsum, p.colsq, p.colmax, p.rows[-2:], p.kv_lo[-2:], p.spans, p.span_sums)

    full = rows(M1)
    few = dense_trace([Few(full, full[6:], spans=[(0, 3), (3, 6)])])
    for spec, need in (("tova-prefill", 4), ("observed-attention", 6)):
        with pytest.raises(PolicyError, match="prompt's rows from token") as error:
            replay(f"fair(inner='{spec}', spans=[0, 3])", 3, few)
        assert error.value.hint == f"capture it with --prompt-rows {need}"
    assert replay("fair(inner='observed-attention', spans=[])", 3, few).kept(start=0) == [[0, 3, 5]]
    with pytest.raises(PolicyError, match="a span begins at token 6"):
        replay("fair(spans=[0, 6])", 3, matrix_trace(prompt=6))


# -- lag ------------------------------------------------------------------------------------------------------------


def test_lag_decides_every_so_many_steps():
    assert replay("lag(inner='tova', every=2)", 3).kept() == [[0, 1, 2], [0, 2, 3], [0, 2, 3, 4], [2, 3, 5]]
    for inner in ("tova", "h2o", "streaming-llm"):
        assert replay(f"lag(inner='{inner}', every=1)", 5, TINY).kept() == replay(inner, 5, TINY).kept()


def test_lag_makes_a_prefill_vote_a_policy_for_decoding():
    """By hand: at t = 3 and 5 the last two rows vote, renormalised over what is left; the window stays."""
    kept = replay("lag(inner='snapkv(window=2, kernel=1)', every=2, shown=2)", 3).kept()
    # t=3 rows 2, 3 vote on 0 (.78 + .64), 1 (.05), window 2, 3; t=5 rows 4, 5 over 0 2 3 4 5: 0 has .18/.95 + .03/.44
    # = .258, 2 has .27/.95 + .08/.44 = .466, 3 has .28/.95 + .14/.44 = .613
    assert kept == [[0, 1, 2], [0, 2, 3], [0, 2, 3, 4], [3, 4, 5]]
    once = replay("snapkv(window=2, kernel=1)", 3, matrix_trace(prompt=4)).kept(start=0)
    assert once == [[0, 2, 3], [0, 2, 3, 4], [0, 2, 3, 4, 5]]


def test_lagged_votes_use_prompt_rows_while_there_are_few_others():
    """Window 2 at t = 4, the first step after a prompt of 4: rows 3 and 4."""
    run = replay("lag(inner='snapkv(window=2, kernel=1)', every=1, shown=8)", 3, matrix_trace(prompt=4))
    # prefill keeps 0 2 3; t=4: rows 3, 4 over 0 2 3 4: 0 .64/.97 + .18/.95, 2 .20/.97 + .27/.95
    assert run.kept(start=0)[:2] == [[0, 2, 3], [0, 3, 4]]
    assert run.score[1][0][0] == pytest.approx(0.64 / 0.97 + 0.18 / 0.95, abs=1e-3)


def test_a_lagged_vote_is_shown_no_more_rows_than_it_says():
    policy = registry.build("lag(inner='snapkv(window=2, kernel=1)', every=2, shown=3)")
    shown, inner = [], policy.policy.observe
    policy.policy.observe = lambda view: (shown.append(view.prompt.rows[:]), inner(view))
    replay(policy, 3)
    assert [len(rows) for rows in shown] == [2, 3, 3]  # the prompt's; then those of the last three queries


# -- pageify --------------------------------------------------------------------------------------------------------


def in_pages(kept, size, tokens):
    """Every page of the kept tokens is there as far as it exists."""
    return all(set(range(k // size * size, min((k // size + 1) * size, tokens))) <= set(kept) for k in kept)


@pytest.mark.parametrize(
    "inner", ["h2o", "tova", "roco(recent=1)", "streaming-llm(sink=1)", "random", "lag(inner='fifo', every=3)"]
)
@pytest.mark.parametrize("reduce", ["max", "mean"])
@given(budget=st.integers(9, 24), size=st.integers(2, 4))
@settings(max_examples=6, deadline=None)
def test_pages_leave_whole(inner, reduce, budget, size):
    """Where the budget holds the protected pages and one more; never over it, and short of it by less than a page."""
    spec = registry.Spec("pageify", {"inner": inner, "size": size, "reduce": reduce})
    run = replay(str(spec), budget, TINY)
    lag = run.cache.policy.lag
    for lane in range(run.cache.lanes):
        for step, kept in enumerate(run.kept(lane, start=0)):
            tokens = 14 + step
            assert in_pages(kept, size, tokens), (step, kept)
            assert min(budget, tokens) - size < len(kept) <= budget + lag - 1


def test_pages_of_one_token_are_the_policy_itself():
    for inner in ("h2o", "tova", "lfu"):
        assert replay(f"pageify(inner='{inner}', size=1)", 7, TINY).kept() == replay(inner, 7, TINY).kept()


def test_page_scores_by_hand():
    """Column sums .9 .1 | .4 .4 | .1 .1: the largest keeps page 0, the mean page 1."""
    last = [0.9, 0.1, 0.55, 0.55, 0.1, 0.1]
    trace = matrix_trace([*([0.0] * (i + 1) for i in range(5)), last], prompt=6)
    for reduce, page in (("max", 0), ("mean", 1)):
        kept = replay(f"pageify(inner='h2o(recent=2)', size=2, reduce='{reduce}')", 4, trace).kept(start=0)
        assert kept == [[2 * page, 2 * page + 1, 4, 5]]
    assert replay("pageify(inner='h2o(recent=2)', size=2)", 5, trace).kept(start=0) == [[0, 1, 4, 5]]  # not 5 of 5


def test_a_budget_below_a_page_keeps_tokens():
    run = replay("pageify(inner='fifo', size=16)", 3)
    assert run.kept() == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]


def test_the_only_page_leaves_token_by_token():
    """Nothing is protected and the page is full: were it to leave whole, nothing would be left."""
    run = replay("pageify(inner='h2o(recent=0)', size=4)", 3, matrix_trace(M1[:4], prompt=4))
    assert len(run.kept(start=0)[0]) == 3


def test_pageify_wants_tokens():
    with pytest.raises(PolicyError, match="groups tokens"):
        replay("pageify", 2, matrix_trace(prompt=4).paged(2))
