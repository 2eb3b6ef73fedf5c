"""Policies that act once after prefill: published vectors, edge cases by hand, and the laws they share."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim import registry
from kvsim.errors import ConfigError, PolicyError
from kvsim.testing import check_policy, contract
from kvsim.testing.traces import tiny_trace
from kvsim.trace.access import DenseSource, PromptRows, dense_trace
from tests.helpers import M1, matrix_trace, replay

INF = np.inf
ALL = matrix_trace(M1, prompt=6)
# small enough for the vectors and for random traces of a dozen tokens
SMALL = {
    "snapkv": "snapkv(window=2)",
    "pyramidkv": "pyramidkv(window=2)",
    "pyramidinfer": "pyramidinfer(sink=1, shortest=0)",
    "observed-attention": "observed-attention",
    "h2o-prefill": "h2o-prefill(window=2)",
    "tova-prefill": "tova-prefill",
    "nacl": "nacl(sink=1)",
    "simlayerkv": "simlayerkv(sink=1, threshold=0.3)",
}


def kept(spec, budget, trace=ALL, lane=0):
    return replay(spec, budget, trace).kept(lane, start=0)[0]


def votes(spec, budget=4, trace=ALL):
    return replay(spec, budget, trace).cache.view


def layers_trace(rows, layers: int):
    """The same rows, all of them the prompt, in several layers."""
    full = np.zeros((len(rows), layers, 1, len(rows)), np.float32)
    for i, row in enumerate(rows):
        full[i, :, 0, : len(row)] = row
    return dense_trace([DenseSource(full, np.zeros((0, layers, 1, len(rows)), np.float32))])


@pytest.mark.parametrize(
    ("spec", "budget", "expected"),
    [
        ("h2o-prefill(window=2)", 4, [0, 1, 4, 5]),
        ("observed-attention", 3, [0, 1, 2]),
        ("tova-prefill", 3, [1, 3, 5]),
        ("snapkv(window=2, kernel=1)", 4, [1, 3, 4, 5]),
        ("snapkv(window=2, kernel=3)", 4, [1, 2, 4, 5]),
        ("snapkv(window=2, kernel=3, pooling='max')", 4, [1, 2, 4, 5]),  # 0, 1 and 2 tie: the newer
        ("pyramidinfer(share=0.2, weight=1.2, sink=1)", 5, [0, 1, 3, 4, 5]),
    ],
)
def test_published_vectors(spec, budget, expected):
    assert kept(spec, budget) == expected


@pytest.mark.parametrize(
    ("spec", "scores"),
    [
        ("snapkv(window=2, kernel=1)", [0.21, 0.61, 0.35, 0.42]),
        ("snapkv(window=2, kernel=3)", [0.2733, 0.39, 0.46, 0.2567]),
        ("snapkv(window=2, kernel=3, pooling='max')", [0.61, 0.61, 0.61, 0.42]),
        ("observed-attention", [0.5217, 0.2320, 0.1875, 0.1833, 0.13, 0.15]),
        ("h2o-prefill(window=2)", [3.13, 1.16, 0.75, 0.55, 0.26, 0.15]),
        ("pyramidinfer(sink=1)", [INF, 0.361, 0.183, 0.224, INF, INF]),
    ],
)
def test_published_scores(spec, scores):
    run = replay(spec, 6, ALL)  # nothing leaves, so every page has its score
    assert run.score[0][0][: len(scores)] == pytest.approx(scores, abs=5e-5)


def test_pyramidinfer_holds_what_the_code_does():
    """Three layers with rho = 0: ratios 1, 0.75, 0.25. Each layer holds what those before it passed on."""
    trace = layers_trace(M1, 3)
    spec = "pyramidinfer(rho=0.0, sink=1, shortest=0, scaled=False)"
    assert [kept(spec, 2, trace, layer) for layer in range(3)] == [[*range(6)], [*range(6)], [0, 1, 3, 4, 5]]
    every_other = "pyramidinfer(rho=0.0, sink=1, shortest=0, interval=2, scaled=False)"
    assert kept(every_other, 2, trace, 2) == [*range(6)]  # the second layer passes everything on
    too_short = "pyramidinfer(rho=0.0, sink=1, shortest=3, scaled=False)"
    assert kept(too_short, 2, trace, 2) == [*range(6)]  # 3 are not above 3, so none leaves


def test_pyramidinfer_scaled_to_the_budget():
    """Counts 6, 6 and 5 for a mean of 4: 4.2, 4.2 and 3.5, cut to whole pages; deeper layers hold no other page."""
    trace = layers_trace(M1, 3)
    sets = [kept("pyramidinfer(rho=0.0, sink=1, shortest=0)", 4, trace, layer) for layer in range(3)]
    assert [len(s) for s in sets] == [4, 4, 3]
    assert set(sets[2]) <= set(sets[1]) <= set(sets[0])


def test_pyramidkv_budgets():
    """Four layers, 72 pages, window 8, a prompt of 1,000: the schedule, and then its edge rules."""

    def budgets(cap, prompt, layers=4, **parameters):
        p = registry.find("pyramidkv")(**{"window": 8, **parameters})
        v = type("V", (), {"now": 0, "page_size": 1, "shape": (layers, 1), "keys": prompt})()
        v.budget = np.full((layers, 1, 1), cap)
        return np.broadcast_to(p.split(v), v.budget.shape)[:, 0, 0].tolist()

    assert budgets(72, 1000) == [125 + 8, 85 + 8, 45 + 8, 5 + 8]
    assert budgets(72, 130) == [122 + 8, 84 + 8, 46 + 8, 8 + 8]  # 125 would be more than the 122 before the window
    assert budgets(72, 127) == [72] * 4  # below 2 * 64
    assert budgets(72, 60) == [72] * 4  # shorter than the budget
    assert budgets(10, 12) == [
        4 + 8,
        3 + 8,
        2 + 8,
        1 + 8,
    ]  # all 4 before the window, so min is 0
    assert budgets(72, 1000, layers=1) == [72]
    assert budgets(72, 1000, beta=2) == [96 + 8, 75 + 8, 54 + 8, 33 + 8]


def test_pyramidkv_keeps_its_budgets():
    rng = np.random.default_rng(0)
    rows = np.tril(rng.random((40, 40))) + 1e-3 * np.tri(40)
    rows /= rows.sum(1, keepdims=True)
    trace = layers_trace([r[: i + 1] for i, r in enumerate(rows)], 4)
    run = replay("pyramidkv(window=2, kernel=3, beta=4)", 10, trace)
    assert [len(run.kept(lane, start=0)[0]) for lane in range(4)] == [16, 12, 8, 4]
    snap = replay("snapkv(window=2, kernel=3)", 16, trace)
    assert run.kept(0, start=0) == snap.kept(0, start=0)


def test_snapkv_pools_only_before_the_window():
    """Zeros beyond both edges count in the mean, and the window's own columns do not leak in."""
    view = votes("snapkv(window=1, kernel=5)", 6)
    row = M1[5]
    expected = [sum(row[max(0, j - 2) : min(5, j + 3)]) / 5 for j in range(5)]
    assert view["vote"][0, 0, :5] == pytest.approx(expected, abs=1e-6)


def test_simlayerkv_cuts_lazy_layers_alone():
    """Three pages are one sink and two newest; the last row's weight on the sink and on the three before it decides."""
    near = 0.03 + 0.08 + 0.14 + 0.04
    assert kept(f"simlayerkv(sink=1, threshold={near + 0.01})", 3) == [*range(6)]
    assert kept(f"simlayerkv(sink=1, threshold={near - 0.01})", 3) == [0, 4, 5]


def test_nacl_draws():
    """One sink, the newest, the best, and one of 2, 3, 4 drawn with softmax of .08, .14, .04."""
    counts = dict.fromkeys((2, 3, 4), 0)
    for seed in range(400):
        first = replay("nacl(sink=1, keep=0.5, draw=0.5)", 4, ALL, seed=seed, audit=False).kept(start=0)[0]
        assert set(first) >= {0, 1, 5} and len(first) == 4
        counts[(set(first) - {0, 1, 5}).pop()] += 1
        if seed < 5:
            assert replay("nacl(sink=1, keep=0.5, draw=0.5)", 4, ALL, seed=seed).kept(start=0)[0] == first
    p = np.array([0.3308, 0.3513, 0.3179])
    assert sum((np.array([*counts.values()]) - 400 * p) ** 2 / (400 * p)) < 13.8  # chi-square, 2 degrees, 0.1 %


def test_nacl_distribution():
    """Gumbel noise draws with softmax: the published probabilities, over 300,000 lanes at once."""
    view = type("V", (), {"now": 0, "page_size": 1, "keys": 6, "tokens": 6, "budget": np.full((1, 1, 1), 4)})()
    view.rng, lanes = np.random.default_rng(1), 300_000
    view.prompt = type("P", (), {"rows": np.tile(np.array(M1[5]), (1, 1, lanes, 1))})
    v = registry.build("nacl(sink=1, keep=0.5, draw=0.5)").votes(view)[0]
    assert np.isinf(v[:, 1]).all()
    shares = np.bincount(v[:, 2:5].argmax(-1), minlength=3) / lanes
    assert shares == pytest.approx([0.3308, 0.3513, 0.3179], abs=0.004)


def test_nacl_larger_budgets_draw_supersets():
    trace = tiny_trace(prompt=40, steps=1)
    runs = [replay("nacl(sink=2)", b, trace, seed=3) for b in range(4, 40)]
    for small, large in zip(runs, runs[1:], strict=False):
        assert set(small.kept(start=0)[0]) <= set(large.kept(start=0)[0])


def test_nacl_protects_the_newest_of_long_prompts():
    """int(0.5 * 6) - 1 sink: the newest two stay even without `recent`."""
    for seed in range(20):
        assert {0, 4, 5} <= set(replay("nacl(sink=1, recent=0, protect=0.5)", 4, ALL, seed=seed).kept(start=0)[0])


def test_nacl_counts_its_sinks_among_the_newest_share():
    """int(0.5 * 12) - 4 = 2 newest are certain to stay; with no page kept by rank all others are drawn."""
    view = replay("nacl(sink=4, recent=0, protect=0.5, keep=0)", 12, tiny_trace(prompt=12, steps=0)).cache.view
    assert np.isinf(view["vote"][..., :12]).tolist() == [[[False] * 10 + [True] * 2] * 2] * 2


@pytest.mark.parametrize(("page_size", "reach"), [(1, 2), (2, 1), (4, 0)])
def test_snapkv_pools_over_the_whole_pages_within_its_kernel(page_size, reach):
    """Two tokens on either side are two pages, one, or none; what lies beyond an edge counts as nothing."""
    trace = tiny_trace(layers=1, heads=1, prompt=16, steps=0).paged(page_size)
    view = replay("snapkv(window=4, kernel=5)", 16, trace).cache.view
    rows = trace.sources[0].prompt().rows[-4:].sum(0)[0, 0].reshape(-1, page_size).sum(1)
    before = len(rows) - 4 // page_size
    padded = np.pad(rows[:before], reach)
    pooled = [padded[i : i + 2 * reach + 1].mean() for i in range(before)]
    assert view["vote"][0, 0, : len(rows)] == pytest.approx([*pooled, *rows[before:]], abs=1e-6)


@pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL)
def test_nothing_leaves_after_prefill(spec):
    trace = tiny_trace(prompt=12, steps=6)
    run = replay(spec, 7, trace)
    for lane in range(run.copies.shape[1]):
        first = run.kept(lane, start=0)
        for step, now in enumerate(first):
            assert now == first[0] + list(range(12, 12 + step))


@pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL)
def test_a_budget_above_the_prompt_keeps_all(spec):
    run = replay(spec, 18, tiny_trace(prompt=12, steps=6))
    assert run.kept(start=0)[0] == list(range(12))


@pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL)
def test_contract_where_prompts_are_cut(spec, monkeypatch):
    """The shared check uses prompts within the smallest budget; here they are longer."""
    monkeypatch.setattr(contract, "tiny_trace", lambda prompt=12, steps=24: tiny_trace(prompt=40, steps=steps))
    assert check_policy(spec) == []


def exact(spec):
    """Do `budget` pages stay? PyramidKV, PyramidInfer and SimLayerKV have budgets of their own."""
    return not spec.startswith(("pyramid", "simlayer"))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    budget=st.integers(4, 14),
    size=st.sampled_from([1, 3, 4]),
    spec=st.sampled_from([*SMALL.values()]),
)
def test_laws(seed, budget, size, spec):
    """As many pages stay as the budget says, the protected ones among them; the same whatever the layout of slots."""
    trace = tiny_trace(seed, prompt=14, steps=3).paged(size)
    run = replay(spec, budget, trace)
    keys = -(-14 // size)
    for lane in range(run.copies.shape[1]):
        now = run.kept(lane, start=0)[0]
        if exact(spec):
            assert len(now) == min(budget, keys)
        if spec != "observed-attention":
            assert keys - 1 in now


@pytest.mark.parametrize("spec", ["snapkv(window=2, kernel=1)", "h2o-prefill(window=2)", "observed-attention"])
def test_pages_are_sums(spec):
    """Two pages of three tokens: the first gathers more, in every one of these, and the newest stays."""
    assert kept(spec, 1, ALL.paged(3)) == ([1] if "window" in spec else [0])


def test_lanes_decide_for_themselves_and_layers_together():
    rng = np.random.default_rng(3)
    rows = np.tril(rng.random((12, 1, 4, 12)).swapaxes(0, 2)).swapaxes(0, 2).astype(np.float32)
    rows /= rows.sum(-1, keepdims=True)
    trace = dense_trace([DenseSource(rows, np.zeros((0, 1, 4, 12), np.float32))])
    run = replay("snapkv(window=2, kernel=1)", 6, trace)
    for head in range(4):
        best = np.argsort(rows[-2:, 0, head, :10].sum(0))[-4:]
        assert run.kept(head, start=0)[0] == sorted([*best, 10, 11])
    best = np.argsort(rows[-1, 0].mean(0)[:11])[-5:]
    assert replay("tova-prefill", 6, trace).kept(start=0)[0] == sorted([*best, 11])


class Cut(DenseSource):
    """A source that stored its last two prompt rows alone."""

    def prompt(self):
        p = super().prompt()
        return PromptRows(p.colsum, p.colsq, p.colmax, p.rows[-2:], p.kv_lo[-2:])


def test_too_few_rows_are_named():
    full = np.zeros((6, 1, 1, 6), np.float32)
    for i, row in enumerate(M1):
        full[i, 0, 0, : len(row)] = row
    trace = dense_trace([Cut(full, np.zeros((0, 1, 1, 6), np.float32))])
    assert kept("snapkv(window=2, kernel=1)", 4, trace) == [1, 3, 4, 5]
    with pytest.raises(PolicyError, match="the last 3 rows of the prompt are needed, of which the trace holds 2"):
        kept("snapkv(window=3)", 4, trace)
    with pytest.raises(PolicyError, match="--prompt-rows 6"):
        kept("pyramidinfer(share=0.9)", 5, trace)
    assert kept("h2o-prefill(window=3)", 4, trace) == [0, 3, 4, 5]  # column sums need no rows


def test_a_prompt_shorter_than_the_window():
    """Fewer rows than the window: nothing has to leave, for the budget must hold the window."""
    assert kept("snapkv(window=8)", 8) == [*range(6)]
    with pytest.raises(ConfigError, match="below the 8 that snapkv protects"):
        replay("snapkv(window=8)", 7, matrix_trace([*M1, *([[1 / n] * n for n in range(7, 11)])], prompt=10))


@pytest.mark.parametrize(
    "spec",
    ["snapkv(window=0)", "snapkv(kernel=2)", "snapkv(pooling='sum')", "snapkv(recent='50%')", "pyramidkv(kernel=0)"],
)
def test_refused_parameters(spec):
    with pytest.raises(ConfigError):
        registry.build(spec)


def test_recent_may_be_more_than_the_window():
    assert registry.build("snapkv(window=2, recent=3)").recent == 3
    assert kept("snapkv(window=2, kernel=1, recent=3)", 4) == [1, 3, 4, 5]
    assert kept("snapkv(window=2, kernel=1, recent=4)", 5) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL)
def test_lossy_alone(spec):
    assert registry.build(spec).regimes == ("lossy",) and registry.build(spec).once
