"""Curves: one pass over caches of all sizes is exactly one replay per budget, and says so where it is not."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim import registry
from kvsim.cache.demand import Use
from kvsim.cache.stack import Stacks, not_nested
from kvsim.cache.tiers import Capacity
from kvsim.config import run_config
from kvsim.curves import EACH, GRID, ONE_PASS, PERCENT, Curves, curve, rehearse
from kvsim.errors import ConfigError, PolicyError, ResultError
from kvsim.figures import draw
from kvsim.simulate import run
from kvsim.testing import check_policy, tiny_trace
from kvsim.testing.nested import compare_sizes
from kvsim.trace.access import dense_trace
from kvsim.trace.synthetic import synthetic_source, synthetic_trace

from .conftest import SIZES
from .helpers import M1, matrix_trace, policy_for, references
from .policies.test_history import FewRows
from .strategies import DEMANDS, traces
from .test_cli import kvsim


def timed(trace):
    """The same trace of a model whose sizes are known."""
    return replace(trace, geometry=replace(trace.geometry, **SIZES))


TINY = timed(tiny_trace())
CLAIMED = [name for name in registry.names() if registry.find(name).budget_free]
VARIANTS = ("lazy-eviction(window=3, alpha=0.05)", "lazy-eviction(window=2, alpha=0.1, dtype='fp16', tie='oldest')")
ORACLES = ("belady", "mass-oracle")


@st.composite
def claimed(draw):
    """A policy that says its scores are the same at every budget, on full rows, with attributes of any kind."""
    spec = draw(st.sampled_from((*CLAIMED, *VARIANTS)))
    attributes = {"rows": "full", "sink": draw(st.sampled_from((0, 0, 2)))}
    policy = registry.build(spec)
    if isinstance(policy.recent, str):
        attributes["recent"] = draw(st.integers(0, 3))
    if not policy.needs and spec not in ORACLES:
        attributes["granularity"] = draw(st.sampled_from(("head", "head", "layer", "token")))
    if spec not in VARIANTS and not policy.once:
        attributes["lag"] = draw(st.integers(1, 3))
        attributes["cut_prompt"] = draw(st.sampled_from((True, True, False)))
        attributes["once"] = draw(st.sampled_from((False, False, False, True)))
    return lambda: policy_for(spec, **attributes)


some = st.one_of(st.none(), st.none(), st.sets(st.integers(1, 24), max_size=4))  # budgets; None: all


@settings(deadline=None, max_examples=300)
@given(traces(), claimed(), st.sampled_from(DEMANDS[:2]), some)
def test_one_pass_is_one_replay_per_budget(trace, policy, use, budgets):
    if policy().needs <= trace.provides:
        assert compare_sizes(trace, policy, use=use, seed=3, budgets=budgets)[0] is None


@settings(deadline=None, max_examples=150)
@given(traces(), claimed(), st.sampled_from(DEMANDS), some)
def test_one_pass_is_one_replay_per_budget_where_pages_come_back(trace, policy, demand, budgets):
    if policy().needs <= trace.provides and "offload" in policy().regimes:
        assert compare_sizes(trace, policy, demand=demand, seed=3, budgets=budgets)[0] is None


@pytest.mark.parametrize("budgets", [None, (3, 9, 20)])
@pytest.mark.parametrize("spec", ["lru", "h2o(recent=3)", "tova", "lfu", "streaming-llm(sink=2)", "random"])
def test_what_is_compiled_counts_and_decides_the_same(spec, budgets):
    for windows in ((0, 0), (9, 0)):
        trace = tiny_trace(layers=2, prompt=20, steps=40, windows=windows)
        text, sizes = compare_sizes(trace, lambda: policy_for(spec, rows="full"), budgets=budgets, fusing=True)
        assert text is None and sizes > 2


@pytest.mark.parametrize("name", CLAIMED)
def test_every_claim_is_compared(name):
    """Else the two tests above would pass for a policy that never gets that far."""
    policy = registry.build(name)
    if policy.needs - tiny_trace().provides:
        pytest.skip("needs a trace of its own kind")
    share = {"recent": 2} if isinstance(policy.recent, str) else {}
    text, sizes = compare_sizes(tiny_trace(steps=32), lambda: policy_for(name, rows="full", **share))
    assert text is None and sizes > 4


def test_published_examples_are_compared_as_they_are():
    """Positions, hashes and the references need no full rows; a share of the budget and renormalised rows are seen."""
    trace = tiny_trace(steps=20)
    for spec in ("fifo", "random", "streaming-llm", "belady", "mass-oracle"):
        assert compare_sizes(trace, lambda spec=spec: registry.build(spec))[1] > 10, spec
    for spec in ("lru", "lfu", "tova", "lazy-eviction", "h2o", "h2o(recent=4)", "sieve"):
        assert compare_sizes(trace, lambda spec=spec: registry.build(spec)) == (None, 0), spec


# -- by hand ------------------------------------------------------------------------------------------------------


def drive(policy, accesses, stride, **kwargs):
    stacks = Stacks((1, 1), stride, registry.build(policy), Capacity(stride, None), **kwargs)
    for a in accesses:
        stacks.access(a)
        yield stacks


def test_lru_stack_distances_by_hand():
    """Distances of a b c a a b d c: new, new, new, 3, 1, 3, new, 4 (Mattson's stack, top first: c d b a at the end)."""
    use, names = Use("weight", 0.5), "abcaabdc"
    spill = registry.build("spill", "offload")
    *_, stacks = drive("lru(recent=0)", references(names), 4, offload=spill, use=use, demand=use)
    assert stacks.found.tolist() == [3, 1, 0, 2, 1]  # b, c, d are born on the GPU, at any size; a is the prompt
    assert stacks.listed(0)[:4].tolist() == [2, 3, 1, 0]
    assert [stacks.held(0, b) for b in (1, 2, 3)] == [{2}, {2, 3}, {1, 2, 3}]


def test_h2o_stack_by_hand():
    """The published rows M1: sums after each row decide, the newest page stays; two pages are the prompt."""
    trace = matrix_trace(M1)
    steps = [s.listed(0)[:5].tolist() for s in drive(  # prompt: 1.50, 0.50; the newest first
        "h2o(recent=1)", trace.requests()[0].accesses(), 6)]  # fmt: skip
    assert steps[0][:2] == [1, 0]
    assert steps[1][:3] == [2, 0, 1]  # 2.28 and 0.52
    assert steps[2][:4] == [3, 0, 1, 2]  # 2.92, 0.55 (against 0.40 of page 2, which went down to the end)


def test_pages_that_never_enter_are_counted_whole():
    """More than an int32 holds: every page that was ever needed is new to a stack that nothing enters."""
    *_, stacks = drive("full", tiny_trace(layers=1, heads=1).requests()[0].accesses(), 40)
    before = stacks.found[0]
    stacks._found_new += 2**31
    assert stacks.found[0] == before + 2**31 and before > 0


def test_requests_of_one_number_are_counted_apart():
    """In memory nobody numbers them."""
    trace = timed(dense_trace([synthetic_source(20, 30, seed=i) for i in range(2)]))
    one = curve(trace, policy="lru", rows="full", budgets=["25%"])
    alone = [
        curve(timed(dense_trace([s])), policy="lru", rows="full", budgets=["25%"]).points[0] for s in trace.sources
    ]
    assert one.points[0]["recall"] == pytest.approx(np.mean([p["recall"] for p in alone]), abs=1e-6)
    assert abs(alone[0]["recall"] - alone[1]["recall"]) > 1e-3


def test_scores_are_asked_where_a_cache_decides(tmp_path):
    """Not while a page is being filled; what they would be then is nobody's concern."""
    text = """import numpy as np
from kvsim import policy

@policy("picky")
class Picky:
    budget_free = True

    def score(self, view):
        return view.key if view.tokens % 4 == 1 or not view.now else np.full(view.key.shape, np.nan)
"""
    (file := tmp_path / "picky.py").write_text(text)
    trace = replace(tiny_trace(prompt=16, steps=24), page_size=4)
    assert compare_sizes(trace, lambda: registry.build(str(file)))[0] is None


def test_places_left_empty_are_taken():
    """A window leaves pages behind in the middle of a stack; what comes down stays there."""
    trace = tiny_trace(seed=1, layers=1, heads=1, prompt=8, steps=6, windows=(5,))
    text, sizes = compare_sizes(trace, lambda: policy_for("lru", rows="full"))
    assert text is None and sizes == 14
    assert compare_sizes(trace, lambda: policy_for("lru", rows="full"), demand=Use("weight", 0.2))[0] is None


# -- where it is not exact ----------------------------------------------------------------------------------------

REASONS = {
    "h2o": "share of the budget",
    "lru(protect_tail=0.5)": "share of the budget",
    "h2o-mask": "read set",
    "sieve": "budget_free",
    "lru": "last of rows renormalised",
    "h2o(recent=4)": "mass of rows renormalised",
    "tova": "weights of rows renormalised",
}


@pytest.mark.parametrize("spec", REASONS)
def test_says_why_not(spec):
    c = curve(TINY, policy=spec, budgets=["50%", "100%"])
    assert c.method == EACH and REASONS[spec] in c.reason


def test_says_why_not_where_pages_come_back():
    offload = {"regime": "offload", "demand": "theta", "page_size": 1, "budgets": ["50%"]}
    for spec in ("fifo", "lfu"):
        c = curve(TINY, policy=spec, **offload)
        assert c.method == EACH and "arrived" in c.reason
    assert curve(TINY, policy="lru", **offload).method == ONE_PASS
    assert curve(TINY, policy="h2o(recent=4)", **offload).method == ONE_PASS


def test_splits_and_batches_are_refused():
    for name, value in (("batch", 2), ("split", lambda view: view.budget)):
        assert not_nested(policy_for("fifo")) is None and not_nested(policy_for("fifo", **{name: value}))


def test_a_false_claim_is_found(tmp_path):
    file = tmp_path / "mine.py"
    text = '''from kvsim import policy

@policy("every-other")
class EveryOther:
    """Leaves first every other page of those that the cache holds."""

    budget_free = True

    def score(self, view):
        older = (view.key[..., None, :] >= 0) & (view.key[..., None, :] < view.key[..., :, None])
        return older.sum(-1) % 2
'''
    file.write_text(text)
    assert any("budget_free is not true" in problem for problem in check_policy(str(file)))
    file.write_text(text.replace("budget_free = True", "budget_free = False"))
    assert check_policy(str(file)) == []


def test_nan_is_named(tmp_path):
    file = tmp_path / "nan.py"
    file.write_text(
        "import numpy as np\nfrom kvsim import policy\n@policy('nan')\nclass P:\n    budget_free = True\n"
        "    def score(self, view):\n        return np.where(view.key == 3, np.nan, view.key)\n"
    )
    with pytest.raises(PolicyError, match="NaN at step 0, lane"):
        curve(TINY, policy=str(file))


# -- the curve ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed():
    """Three requests of different length."""
    sizes = ((20, 30), (40, 25), (6, 50))
    return timed(dense_trace([synthetic_source(p, s, seed=i, id=i) for i, (p, s) in enumerate(sizes)]))


@pytest.mark.parametrize("spec", ["random", "belady", "streaming-llm"])
def test_every_budget_is_that_of_a_run(mixed, spec):
    c = curve(mixed, policy=spec, budgets=["12%", "30%", "77%", "9", "17", "40", "30kB", "100%", "1000"])
    assert c.method == ONE_PASS
    for budget, value in zip(c.budgets, c.values, strict=True):
        right = run(mixed, policy=spec, budget=budget, ceiling=False)
        assert value == pytest.approx(right.recall, abs=1e-6)
        assert c.at(budget)["page_hit_rate"] == right.page_hit_rate
        assert c.at(budget)["pages"] == pytest.approx(np.minimum(right.requests.budget_pages, [50, 65, 56]).mean())


def test_one_run_per_budget_is_that_run_too(mixed):
    c = curve(mixed, policy="h2o", budgets=["30%"])
    right = run(mixed, policy="h2o", budget="30%", ceiling=False)
    assert c.values == pytest.approx([right.recall], abs=1e-12) and c.points[0]["page_hit_rate"] == right.page_hit_rate
    assert c.at("40%")["recall"] > c.values[0]


def test_offload_curve_is_that_of_runs(mixed):
    settings = {"policy": "lru", "regime": "offload", "demand": "topk(4)", "page_size": 2}
    c = curve(mixed, budgets=["20%", "50%"], **settings)
    assert c.method == ONE_PASS and c.metric == "page_hit_rate"
    for point in c.points:
        right = run(mixed, budget=point["budget"], ceiling=False, **settings)
        assert point["page_hit_rate"] == right.page_hit_rate
        assert point["mass_hit_rate"] == pytest.approx(right.mass_hit_rate, abs=1e-6)


def test_default_budgets(mixed):
    assert curve(mixed, policy="random").budgets == list(PERCENT[1:])  # 1 % of 50 is no page
    assert curve(mixed, policy="h2o").budgets == list(GRID)
    assert curve(mixed, policy="random", budgets="all").budgets == [str(n) for n in range(1, 66)]
    assert curve(mixed, policy="h2o", budgets="all").budgets[-2:] == ["59", "65"]
    assert curve(mixed, policy="streaming-llm(recent=8)", budgets="all").budgets[0] == "12"  # what it protects


def test_full_cache_is_flat_and_large_budgets_lose_nothing(mixed):
    assert (curve(mixed, policy="full").values == 1).all()
    c = curve(mixed, policy="lru", rows="full", budgets="all")
    assert c.values[-1] == 1 and (np.diff(c.values) >= 0).all() and c.values[0] < 0.5


def test_full_rows_are_a_variant(mixed):
    published, variant = (curve(mixed, policy="lru", rows=rows, budgets=["30%"]) for rows in (None, "full"))
    assert (published.method, variant.method) == (EACH, ONE_PASS)
    assert not published.full_rows and variant.full_rows
    each = curve(mixed, policy="sieve", rows="full", budgets=["30%"])
    assert each.method == EACH and each.full_rows


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": "20%"}, "runs over budgets"),
        ({"rows": "some"}, 'rows = "some"'),
        ({"budgets": "most"}, 'budgets = "most"'),
        ({"budgets": []}, "no budget"),
        ({"budgets": ["0%"]}, "keeps nothing"),
        ({"policy": "streaming-llm(recent=8)", "budgets": ["10"]}, "below the 12"),
    ],
)
def test_what_cannot_be_is_refused(settings, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        curve(timed(synthetic_trace(prompt=30, steps=70)), **settings)


def test_says_what_is_left_out():
    trace = timed(synthetic_trace(prompt=30, steps=70))
    c = curve(trace, policy="streaming-llm(recent=8)", rows="full")
    assert c.budgets[0] == "12%"
    assert c.reason.endswith("; without 1% to 11%: a budget of 11 pages is below the 12 that streaming-llm protects")
    assert "without" not in curve(trace, policy="lru(recent=1)", rows="full").reason


def test_there_is_no_curve_without_points(tmp_path):
    text = '''from kvsim import policy
from kvsim.errors import ConfigError

@policy("never")
class Never:
    """Refuses everything."""

    def observe(self, view):
        raise ConfigError("not today")

    def score(self, view):
        return view.key
'''
    (file := tmp_path / "never.py").write_text(text)
    with pytest.raises(ConfigError, match='not today\nin policy "never"'):
        curve(timed(synthetic_trace(prompt=30, steps=70)), policy=str(file), budgets="all")


def test_a_rehearsal_finds_what_the_prompt_cannot_serve():
    """Before the long work, and under the policy's name."""
    source = synthetic_trace(prompt=30, steps=4).sources[0]
    whole, few = timed(dense_trace([source])), timed(dense_trace([FewRows(source._prompt, source._decode)]))
    for policy in ("corm", "snapkv(window=8)", "belady"):
        config = run_config({"policy": policy})
        rehearse(whole, config)
        if policy != "belady":
            with pytest.raises(PolicyError, match=f'in policy "{config.policy.partition("(")[0]}"'):
                rehearse(few, config)
    with pytest.raises(ConfigError, match="rows = "):
        rehearse(whole, run_config({"policy": "lru"}), "some")


def test_progress_is_told(mixed):
    for policy, total in (("random", 105), ("h2o", 210)):
        told = []
        curve(mixed, policy=policy, budgets=["40%", "60%"], progress=lambda *x, told=told: told.append(x))
        assert told[-1] == (total, total) and len(told) >= total


# -- what it leaves behind ----------------------------------------------------------------------------------------


def test_saved_as_asked(mixed, tmp_path):
    curves = Curves([curve(mixed, policy="random"), curve(mixed, policy="h2o", budgets=["30%"])])
    table = pq.read_table(curves.save(tmp_path / "c.parquet")).to_pylist()
    lines = list(csv.DictReader(curves.save(tmp_path / "c.csv").open()))
    assert len(table) == len(lines) == len(PERCENT) - 1 + 1
    assert [float(x["recall"]) for x in lines] == [x["recall"] for x in table]
    assert table[-1]["method"] == EACH and table[0]["method"] == ONE_PASS and table[0]["oracle"] in (0, False)
    told = json.loads(curves.save(tmp_path / "c.json").read_text())
    assert told[1]["reason"] == curves[1].reason and told[1]["points"][0]["budget"] == "30%"
    with pytest.raises(ConfigError, match=r"end the name in \.json"):
        curves.save(tmp_path / "c.xlsx")
    with pytest.raises(ResultError):
        curves.save(tmp_path / "c.json" / "c.json")
    assert {p.name for p in tmp_path.iterdir()} == {"c.parquet", "c.csv", "c.json"}


def test_drawn_with_marks_far_apart(mixed, tmp_path):
    curves = Curves([curve(mixed, policy="belady"), curve(mixed, policy="h2o")])
    path = draw(curves, tmp_path / "c.svg")
    text = path.read_text()
    assert "belady" in text and "50%" in text and "37%" not in text
    assert draw(curves, tmp_path / "again.svg").read_bytes() == path.read_bytes()


def test_command(tmp_path):
    done = kvsim(
        "curve", "demo", "--policy", "lru", "--policy", "h2o", "--rows", "full", "--budgets", "10%,60",
        "-o", "out/c.csv", "--plot", "c.png", cwd=tmp_path, check=2,
    )  # fmt: skip
    assert "budgets in" in done.stderr  # shares and pages do not share an axis
    done = kvsim(
        "curve", "demo", "--policy", "lru", "--policy", "h2o", "--rows", "full", "--budgets", "10%,60%",
        "-o", "out/c.csv", "--plot", "c.png", cwd=tmp_path, check=0,
    )  # fmt: skip
    for words in ("lru: one pass", "h2o: one run per budget", "share of the budget", "variant", "open loop"):
        assert words in done.stdout, words
    assert (tmp_path / "out/c.csv").exists() and (tmp_path / "c.png").exists()
    assert "end the name" in kvsim("curve", "demo", "-o", "c.txt", cwd=tmp_path, check=2).stderr
    assert "not a setting" in kvsim("curve", "demo", "--set", "budget=3", cwd=tmp_path, check=2).stderr
