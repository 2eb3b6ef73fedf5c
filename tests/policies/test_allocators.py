"""Allocators: the published vectors, budgets by hand, and what holds for any of them: the run's total."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim import registry
from kvsim.errors import ConfigError, PolicyError
from kvsim.policies.allocators import whole
from kvsim.testing import check_policy
from kvsim.testing.traces import tiny_trace
from kvsim.trace.access import DenseSource, Geometry, dense_trace
from tests.helpers import replay

TINY = tiny_trace(seed=5, layers=3, prompt=14, steps=16)
NESTED = [
    "ada-kv(inner='snapkv(window=4)')",
    "ada-kv(inner='tova', alpha=0)",
    "ada-kv(inner='lag(every=3)')",
    """ada-kv(inner="pyramid(inner='h2o')")""",
    "pyramid(inner='snapkv(window=4)')",
    "pyramid(inner='lazy-eviction(window=3)', beta=5)",
    "layer-budgets(budgets=[3, 1])",
    "layer-budgets(inner='tova', budgets=[0, 1])",
    "duo-attention(inner='h2o', heads=[[0, 1], [1, 0], [1, 1]], stream=5)",
    "duo-attention(inner='lfu', retrieval=0)",
    """whitelist(inner="ada-kv(inner='lfu')", positions=[4])""",
    """pageify(inner="ada-kv(inner='lfu')", size=3)""",
]
KEEP_TOTAL = [s for s in NESTED if not s.startswith(("pageify", "duo"))]  # which may leave some of it unused


def votes(*heads) -> DenseSource:
    """One layer; the last prompt row of each head as given, all others empty, so that it is the column sum too."""
    n = len(heads[0])
    prompt = np.zeros((n, 1, len(heads), n), np.float32)
    prompt[-1, 0] = heads
    return DenseSource(prompt, np.zeros((0, 1, len(heads), n), np.float32))


def budgets(spec, layers, even, keys, heads=1, **more):
    """What an allocator says at the end of a prompt of `keys`, of which it has looked at no row."""
    p = registry.build(spec)
    budget = np.full((layers, heads, 1), even)
    view = SimpleNamespace(now=0, budget=budget, keys=keys, tokens=keys, page_size=1, shape=(layers, heads), **more)
    p.observe(view)
    return np.broadcast_to(p.split(view), budget.shape)[..., 0]


@pytest.mark.parametrize("spec", [*NESTED, "duo-attention(full=True)"])
def test_the_contract_holds_in_other_shapes_than_the_default(spec):
    assert check_policy(spec) == []


@pytest.mark.parametrize("spec", KEEP_TOTAL)
@given(budget=st.integers(6, 24), seed=st.integers(0, 9))
@settings(max_examples=5, deadline=None)
def test_the_run_keeps_its_total(spec, budget, seed):
    """At every decision the lanes' budgets add up to the run's, and no lane holds more than its own."""
    run = replay(spec, budget, tiny_trace(seed=seed, layers=3, prompt=14, steps=16))
    c = run.cache
    assert c.budget.sum() == budget * c.lanes
    late = c.policy.lag - 1 if not c.policy.once else 16
    assert (c.table.resident() <= c.budget + late).all()


@pytest.mark.parametrize("inner", ["h2o", "tova", "snapkv(window=4)", "lfu"])
@pytest.mark.parametrize(
    "spec",
    ["ada-kv(alpha=1, inner={!r})", "pyramid(beta=1, inner={!r})", "layer-budgets(budgets=[2, 2, 2], inner={!r})"],
)
def test_even_budgets_are_the_policy_itself(spec, inner):
    one, other = replay(spec.format(inner), 8, TINY), replay(inner, 8, TINY)
    assert (one.copies == other.copies).all()


# -- Ada-KV ---------------------------------------------------------------------------------------------------------


def test_ada_kv_vector():
    """Safe: 1 of 2; of the rest .25 and .20 stay, so h0 keeps one page and h1 three."""
    trace = dense_trace([votes([0.90, 0.04, 0.03, 0.02, 0.01], [0.30, 0.25, 0.20, 0.15, 0.10])])
    run = replay("ada-kv(inner='h2o(recent=0)', alpha=0.5)", 2, trace)
    assert [run.kept(lane, start=0)[0] for lane in (0, 1)] == [[0], [0, 1, 2]]


def test_ada_kv_counts_protected_pages_and_breaks_ties_by_age():
    """Safe are .30 (h0: its newest, protected .01) and h1's .30; then .90, and of three equal .20 the newest."""
    trace = dense_trace([votes([0.90, 0.04, 0.03, 0.02, 0.01], [0.20, 0.20, 0.20, 0.10, 0.30])])
    run = replay("ada-kv(inner='h2o(recent=1)', alpha=0.5)", 2, trace)
    assert [run.kept(lane, start=0)[0] for lane in (0, 1)] == [[0, 4], [2, 4]]


def test_ada_kv_keeps_a_page_in_every_head():
    trace = dense_trace([votes([0.01, 0.01, 0.01, 0.01], [0.30, 0.25, 0.25, 0.20])])
    run = replay("ada-kv(inner='h2o(recent=0)', alpha=0)", 2, trace)
    assert run.cache.budget.tolist() == [1, 3]
    assert [run.kept(lane, start=0)[0] for lane in (0, 1)] == [[3], [0, 1, 2]]


def test_ada_kv_of_a_prompt_below_the_budget_spares_it():
    run = replay("ada-kv(inner='snapkv(window=2)')", 20, TINY)
    assert all(run.kept(lane)[-1] == list(range(30)) for lane in range(run.cache.lanes))


@given(st.integers(2, 12), st.floats(0, 1), st.integers(0, 20))
@settings(max_examples=30, deadline=None)
def test_ada_kv_keeps_more_score_than_even_budgets(budget, alpha, seed):
    """The best pages of a layer under a floor per head: no even allocation has a larger sum."""
    rng = np.random.default_rng(seed)
    trace = dense_trace([votes(*rng.integers(1, 1000, (3, 12)).astype(np.float32))])
    mass = trace.sources[0].prompt().colsum[0]
    total = {}
    for spec in (f"ada-kv(inner='h2o(recent=0)', alpha={alpha})", "h2o(recent=0)"):
        run = replay(spec, budget, trace)
        kept = run.copies[0] & 1 > 0
        assert kept.sum() == 3 * min(budget, 12) and (kept.sum(1) >= max(1, int(alpha * budget))).all()
        total[spec] = float(mass[kept].sum())
    first, second = total.values()
    assert first >= second


# -- layers ---------------------------------------------------------------------------------------------------------


def test_pyramid_beside_the_published_steps():
    """64 beside a window of 8: from 124.8 to 3.2 on a line; the published integer steps are [125, 85, 45, 5] + 8."""
    got = budgets("pyramid(inner='h2o(recent=8)', beta=20)", 4, 72, 1000)[:, 0]
    assert got.tolist() == [133, 92, 52, 11] and got.sum() == 4 * 72
    assert np.abs(got - (np.array([125, 85, 45, 5]) + 8)).max() <= 2


def test_pyramid_never_gives_more_than_exists():
    assert budgets("pyramid(inner='h2o(recent=0)')", 3, 20, 30)[:, 0].tolist() == [30, 20, 10]
    assert budgets("pyramid(inner='h2o(recent=0)')", 3, 20, 20)[:, 0].tolist() == [20, 20, 20]


@given(st.integers(1, 12), st.integers(1, 200), st.floats(1, 40), st.integers(0, 6), st.integers(1, 400))
def test_pyramid_law(layers, even, beta, recent, keys):
    """It falls, keeps the total, and never falls below what is protected."""
    got = budgets(f"pyramid(inner='h2o(recent={recent})', beta={beta!r})", layers, even, keys)[:, 0]
    assert got.sum() == layers * even and (np.diff(got) <= 1).all()
    assert got.min() >= min(even, max(1, recent))


def test_layer_budgets_are_shares():
    inner = "inner='h2o(recent=1)'"
    assert budgets(f"layer-budgets({inner}, budgets=[3, 1, 2])", 3, 10, 99)[:, 0].tolist() == [15, 5, 10]
    assert budgets(f"layer-budgets({inner}, budgets=[3, 1])", 4, 10, 99)[:, 0].tolist() == [15, 15, 5, 5]
    assert budgets(f"layer-budgets({inner}, budgets=[1, 0])", 2, 10, 99)[:, 0].tolist() == [19, 1]
    assert budgets(f"layer-budgets({inner}, budgets=[9, 1])", 2, 10, 12)[:, 0].tolist() == [12, 8]
    run = replay(f"layer-budgets({inner}, budgets=[3, 1, 2])", 4, TINY)
    assert [len(run.kept(lane)[-1]) for lane in range(6)] == [6, 6, 2, 2, 4, 4]


@given(st.lists(st.floats(0, 5), min_size=1, max_size=9).filter(lambda x: max(x) > 0.01), st.integers(1, 60), st.data())
def test_whole_numbers_law(wanted, even, data):
    total, count = even * len(wanted), len(wanted)
    least, most = data.draw(st.integers(0, even)), data.draw(st.integers(even, 200))
    got = whole(np.array(wanted), total, least, most)
    assert got.sum() == total and got.min() >= least and got.max() <= most
    order = np.argsort(wanted, kind="stable")
    assert (np.diff(got[order]) >= -1).all()  # who wants more gets no less, but for a remainder
    at = data.draw(st.integers(0, count - 1))
    more = whole(np.array(wanted) + np.eye(count)[at], total, least, most)
    assert more[at] >= got[at] - 1


def test_layer_budgets_from_a_file(tmp_path):
    path = tmp_path / "shares.json"
    path.write_text(json.dumps([3, 1, 2]))
    spec = f"layer-budgets(inner='h2o(recent=1)', budgets='{path}')"
    assert budgets(spec, 3, 10, 99)[:, 0].tolist() == [15, 5, 10]
    first = registry.source_hash(registry.build(spec))
    path.write_text(json.dumps([1, 1, 1]))
    assert registry.source_hash(registry.build(spec)) != first  # the file is part of a run's identity


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("layer-budgets(budgets=[])", "budgets ="),
        ("layer-budgets(budgets=[0, 0])", "budgets ="),
        ("layer-budgets(budgets=[1, -1])", "budgets ="),
        ("layer-budgets(budgets='nowhere.json')", "cannot read the list"),
        ("pyramid(beta=0.5)", "beta = 0.5"),
        ("pyramid(inner='ada-kv')", "splits the budget itself"),
        ("ada-kv(alpha=1.5)", "alpha = 1.5"),
        ("duo-attention(retrieval=2)", "retrieval = 2"),
        ("duo-attention(stream='many')", "stream = 'many'"),
        ("layer-budgets(budgets=[True, 1])", "budgets = "),
        ("ada-kv(inner='quest')", "chooses what is read"),
    ],
)
def test_what_cannot_work_is_said(spec, words):
    with pytest.raises((ConfigError, PolicyError), match=words):
        registry.build(spec)


def test_more_budgets_than_layers():
    with pytest.raises(PolicyError, match="4 budgets for 3 layers"):
        replay("layer-budgets(budgets=[1, 2, 3, 4])", 5, TINY)


# -- DuoAttention ---------------------------------------------------------------------------------------------------


def test_duo_attention_finds_the_heads_that_look_far():
    """Eight tokens, sink 1, budget 4 of which a streaming head keeps 3: far is neither 0 nor the newest two."""
    far, near = [0.1, 0, 0.8, 0, 0, 0, 0, 0.1], [0.5, 0, 0, 0, 0, 0.1, 0.2, 0.2]
    run = replay("duo-attention(sink=1, stream=3)", 4, dense_trace([votes(near, far)]))
    assert run.cache.policy._retrieves[0, :, 0].tolist() == [False, True]
    assert run.cache.budget.tolist() == [3, 5]
    assert [run.kept(lane, start=0)[0] for lane in (0, 1)] == [[0, 6, 7], [0, 4, 5, 6, 7]]


def test_duo_attention_counts_the_first_token_that_a_streaming_head_lacks():
    """Sink 1 and the newest two: of eight tokens 5 is the first that is far; the other head looks at 6 alone."""
    near, edge = [0, 0, 0, 0, 0, 0, 1.0, 0], [0, 0, 0, 0, 0, 1.0, 0, 0]
    run = replay("duo-attention(sink=1, stream=3)", 4, dense_trace([votes(near, edge)]))
    assert run.cache.policy._retrieves[0, :, 0].tolist() == [False, True]


def test_what_is_left_of_an_even_share_goes_to_the_first_ones():
    """Ten pages for three, of at most three each: the first has the tenth."""
    assert whole(np.ones(3), 10, 1, 3).tolist() == [4, 3, 3]


def test_no_layer_gets_less_than_is_protected():
    """Four sinks and the newest of ten pages on average: a layer that should have nothing has these five."""
    run = replay("layer-budgets(inner='streaming-llm(sink=4)', budgets=[1, 0])", 10, tiny_trace(prompt=20, steps=1))
    assert run.cache.budget.tolist() == [15, 15, 5, 5]


def test_duo_attention_with_listed_heads(tmp_path):
    (path := tmp_path / "heads.json").write_text("[[0, 1], [2, 0]]")
    for heads in ([[0, 1], [2, 0]], str(path)):
        run = replay(f"duo-attention(inner='lfu', stream='50%', heads={heads!r})", 8, TINY)
        assert run.cache.budget.tolist() == [5, 14, 5, 5, 14, 5]  # four sinks and the newest
        assert run.kept(0)[-1] == [0, 1, 2, 3, 29] and len(run.kept(1)[-1]) == 14
    with pytest.raises(PolicyError, match=r"no head \[3, 0\]"):
        replay("duo-attention(heads=[[3, 0]])", 8, TINY)


def test_duo_attention_as_published_keeps_everything_in_retrieval_heads():
    run = replay("duo-attention(heads=[[1, 1]], full=True, stream=6, sink=2)", 6, TINY)
    kept = [run.kept(lane)[-1] for lane in range(6)]
    assert kept[3] == list(range(30))
    assert all(kept[lane] == [0, 1, 26, 27, 28, 29] for lane in (0, 1, 2, 4, 5))


@given(st.floats(0, 1), st.integers(6, 20))
@settings(max_examples=15, deadline=None)
def test_duo_attention_law(share, budget):
    """So many retrieval heads as the share says; the total is used unless these hold everything."""
    run = replay(f"duo-attention(retrieval={share!r})", budget, TINY)
    mask, found = run.cache.policy._retrieves.reshape(-1), run.cache.budget
    assert mask.sum() == round(share * 6)
    assert found.sum() == 6 * budget or (found.sum() < 6 * budget and (found[mask] == 30).all())
    assert mask.all() or not mask.any() or (found[~mask] == max(5, budget // 4)).all()


# -- EvolKV ---------------------------------------------------------------------------------------------------------


def timed(sources):
    """A trace of a model whose sizes are known, which a run asks for."""
    layers, heads = sources[0]._decode.shape[1:3]
    return dense_trace(sources, Geometry(layers, heads, head_dim=4, hidden=8, intermediate=8, vocab=8))


def two_layers(prompt=16, steps=12):
    """The first layer looks at the newest token alone, the second at all of them alike."""
    n = prompt + steps
    rows = np.zeros((n, 2, 1, n), np.float32)
    for i in range(n):
        rows[i, 0, 0, i], rows[i, 1, 0, : i + 1] = 1, 1 / (i + 1)
    return timed([DenseSource(rows[:prompt, ..., :prompt], rows[prompt:], id=i) for i in range(2)])


@pytest.mark.parametrize("size", [1, 2])
def test_evolkv_finds_the_layer_that_needs_pages(size):
    pytest.importorskip("cma")
    from experiments.evolkv.search import study

    how = {"size": size, "evaluations": 6, "seed": 1}
    found = study(two_layers(), [0], [1], "h2o(recent=1)", "8", **how)
    assert size == 1 or found == study(two_layers(), [0], [1], "h2o(recent=1)", "8", **how)
    assert found["shares"][1] > 1.2 and found["shape"] == "rises"
    for side in ("train", "test"):
        mean = found["mean"][side]
        assert mean["evolkv"] > mean["even"] > mean["pyramid"]
    values = [step["value"] for step in found["log"]]
    assert values == sorted(values) and values[-1] == pytest.approx(found["mean"]["train"]["evolkv"], abs=1e-5)


def test_evolkv_by_hand():
    from experiments.evolkv.search import Problem, groups, rescale, shape, table

    assert list(groups(5, 2)) == [[0, 1], [2, 3], [4]] and list(groups(3, 8)) == [[0, 1, 2]]
    assert rescale(np.array([1.0, 3.0])).tolist() == [0.5, 1.5]
    assert [shape(x) for x in ([1, 1], [2, 1, 1], [1, 1, 2], [1, 2, 1])] == [
        "even", "falls", "rises", "neither falls nor rises"
    ]  # fmt: skip
    problem = Problem(two_layers(), "h2o(recent=1)", "8")
    assert problem.spec([0.5, 1.5]) == "layer-budgets(inner='h2o(recent=1)', budgets=[0.5, 1.5])"
    # the first layer needs the newest alone; the second sees budget + 1 of the 17 to 28 tokens alike
    rest = np.mean([13 / n for n in range(17, 29)])
    assert problem.value([0.5, 1.5]) == pytest.approx((1 + rest) / 2, abs=1e-6) and len(problem.tried) == 1
    mean = {"test": {"even": 0.5, "pyramid": 0.4, "evolkv": 0.6}, "train": {"even": 0.5, "pyramid": 0.4, "evolkv": 0.7}}
    text = table([{"inner": "h2o", "budget": "5%", "mean": mean, "shares": [0.5, 1.5], "shape": "rises"}])
    assert "| h2o | 5% | 0.5000 (0.5000) | 0.4000 (0.4000) | 0.6000 (0.7000) | 0.50, 1.50 | rises |" in text


def test_evolkv_on_output_error():
    from experiments.evolkv.search import Problem

    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 1, 12, 4)).astype(np.float32) for _ in range(3))
    z = np.where(np.tri(12, dtype=bool), q[0, 0] @ k[0, 0].T / 2, -np.inf)
    rows = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    rows = rows[:, None, None].astype(np.float32)
    trace = timed([DenseSource(rows[:8, ..., :8], rows[8:], vectors=(q, k, v))])
    errors = [-Problem(trace, "fifo", budget, "output-error").values("fifo")[0] for budget in ("3", "6", "12")]
    assert errors[0] > errors[1] > errors[2] == pytest.approx(0, abs=1e-6)
