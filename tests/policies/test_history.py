"""Policies with a memory of their own: the published vectors, what they remember, and where they end."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim import registry
from kvsim.cache.cache import Cache
from kvsim.cache.demand import Use
from kvsim.cache.tiers import Capacity
from kvsim.errors import ConfigError, PolicyError
from kvsim.policies.classic import uniform
from kvsim.policies.history import layer_shares, tempered
from kvsim.testing import check_policy, tiny_trace
from kvsim.trace.access import DenseSource, dense_trace
from tests.helpers import M1, THETA, by_key, drive, matrix_trace, policy_for, replay
from tests.strategies import budgets, traces

few = settings(max_examples=25, deadline=None)

VECTORS = {
    "lra": (3, "0 1 2|0 2 3|2 3 4|3 4 5", [1, 1, 0.95, 0.41]),
    "lra(theta=0.2)": (3, "0 1 2|0 2 3|2 3 4|3 4 5", [1, 1, 0.95, 0.41]),
    "lfa": (3, "0 1 2|0 1 3|0 1 4|0 1 5", [1, 1, 0.73, 0.78]),
    "scissorhands(window=2, recent=1)": (4, "0 1 2|0 1 2 3|2 3 4|2 3 4 5", [1, 1, 1, 0.41]),
    "roco(exempt=1, recent=1)": (3, "0 1 2|0 1 3|0 3 4|0 3 5", [1, 1, 0.73, 0.36]),
    "corm(window=2, recent=1)": (1, "0 1 2|0 3|0 3 4|3 5", [1, 1, 0.68, 0.36]),
}


def sets(text: str) -> list[list[int]]:
    return [[int(k) for k in part.split()] for part in text.split("|")]


@pytest.mark.parametrize("spec", VECTORS)
def test_vectors(spec):
    budget, kept, mass = VECTORS[spec]
    run = replay(spec, budget)
    assert run.kept() == sets(kept)
    assert run.mass() == mass


@pytest.mark.parametrize(
    "spec",
    [
        "lra(theta=0.1)",
        "scissorhands(window=5, recent=2, drop=0.25)",
        "roco(generated=4, recent=2)",
        "roco(exempt=2, recent=1, sink=1)",
        "corm(window=4, recent=2)",
        "corm(window=4, recent=2, capped=True)",
        "keyformer(every=4)",
        "keyformer(noise=False, steps=10)",
        "evict3r(temp=0.001)",
    ],
)
def test_contract(spec):
    assert check_policy(spec) == []


# -- what they remember, against the definition over the list of all rows ----------------------------------------------


class Spy:
    """Remembers every row as {key: weight} per lane, prompt rows included, and what the policy then thinks."""

    spec_name = "spy"

    def __init__(self, spec, thinks):
        self.inner, self.thinks, self.rows, self.seen = registry.build(spec), thinks, [], []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def observe(self, view):
        self.inner.observe(view)
        lanes = list(np.ndindex(view.shape))
        if view.now == 0:
            self.rows = [
                {lane: {k: row[lane][k] for k in range(i + 1)} for lane in lanes}
                for i, row in enumerate(view.prompt.rows)
            ]
        else:
            self.rows.append({lane: self._by_key(view, view.weights, lane) for lane in lanes})
        values = np.broadcast_to(self.thinks(self.inner, view), view.key.shape)
        self.seen.append((list(self.rows), {lane: self._by_key(view, values, lane) for lane in lanes}))

    def _by_key(self, view, values, lane):
        return {int(k): x for k, x in zip(view.key[lane], values[lane], strict=True) if k >= 0}


def remembered(spec, budget, trace, thinks=lambda policy, view: policy.score(view)):
    """Per access, lane and key: the rows that saw the key (and how many keys each held), and what the policy thinks."""
    spy = Spy(spec, thinks)
    replay(spy, budget, trace)
    for rows, thoughts in spy.seen:
        for lane, found in thoughts.items():
            for key, thought in found.items():
                yield [(r[lane][key], len(r[lane])) if key in r[lane] else None for r in rows], thought


def fair(n):
    return np.float32(1 / n)


@few
@given(traces(windows=False, page_sizes=(1,)), budgets, st.sampled_from((1, 2, 5, 40)))
def test_scissorhands_counts_low_bits_in_the_window(trace, budget, window):
    for rows, score in remembered(f"scissorhands(window={window}, recent=1)", budget, trace):
        assert -score == sum(x[0] < fair(x[1]) for x in rows[-window:] if x)


@few
@given(traces(windows=False, page_sizes=(1,)), st.sampled_from((1, 2, 5, 40)))
def test_corm_wants_what_was_marked_in_the_window(trace, window):
    spec = f"corm(window={window}, recent=2)"
    for rows, wanted in remembered(spec, 1, trace, lambda policy, view: policy.wanted(view)):
        assert wanted == any(x[0] >= fair(x[1]) for x in rows[-window:] if x)


@few
@given(traces(windows=False, page_sizes=(1,)), budgets)
def test_roco_knows_mean_and_deviation(trace, budget):
    def both(policy, view):
        mean, deviation = policy.moments(view)
        return mean + 1j * deviation

    for rows, thought in remembered("roco(recent=1, exempt=1)", budget, trace, both):
        weights = np.array([x[0] for x in rows if x], np.float64)
        assert thought.real == pytest.approx(weights.mean(), abs=1e-6)
        assert thought.imag == pytest.approx(weights.std(), abs=2e-3)  # the root of float32's rounding


@few
@given(traces(windows=False, page_sizes=(1,)), budgets)
def test_evict3r_normalises_by_exposure(trace, budget):
    for rows, score in remembered("evict3r", budget, trace):
        seen = [x for x in rows if x]
        expected = np.inf if len(seen) == len(rows) else np.mean([a * n for a, n in seen])  # the first token stays
        assert score == pytest.approx(expected, rel=1e-4)


@few
@given(traces(windows=False, page_sizes=(1,)), budgets)
def test_keyformer_sums_tempered_rows(trace, budget):
    prompt = trace.requests()[0].prompt_tokens
    spy = Spy("keyformer(noise=False, steps=4, recent=1)", lambda policy, view: policy.score(view))
    replay(spy, budget, trace)
    total: dict = {}
    for i, row in enumerate(spy.rows):
        tau = 1 + min(max(0, i - prompt + 1), 4) / 4
        for lane, weights in row.items():
            powers = {k: float(x) ** (1 / tau) for k, x in weights.items()}
            for k, x in powers.items():
                total[lane, k] = total.get((lane, k), 0) + x / (sum(powers.values()) or 1)
    for lane, scores in spy.seen[-1][1].items():
        for k, score in scores.items():
            assert score == pytest.approx(total[lane, k], abs=1e-4)


def test_a_ring_of_more_than_one_word():
    trace = tiny_trace(prompt=20, steps=160)
    for rows, score in remembered("scissorhands(window=70, recent=1)", 30, trace):
        assert -score == sum(x[0] < fair(x[1]) for x in rows[-70:] if x)
    assert registry.build("scissorhands").columns["ring"] == (np.uint64, (7,))


# -- laws --------------------------------------------------------------------------------------------------------------


@few
@given(traces(), budgets, st.booleans())
def test_lra_is_lru_and_lfa_is_h2o_without_a_window(trace, budget, offload):
    kind = {"offload": "spill", "demand": Use("weight", 0.1)} if offload else {}
    for ours, theirs in (("lra", "lru"), ("lfa", "h2o(recent=1)")):
        runs = [replay(spec, budget, trace, **kind) for spec in (ours, theirs)]
        np.testing.assert_array_equal(runs[0].copies, runs[1].copies)


@few
@given(traces(windows=False, page_sizes=(1,)), budgets)
def test_lra_with_a_threshold_of_its_own_is_the_predicate(trace, budget):
    runs = [replay(spec, budget, trace, use=Use("weight", 0.125)) for spec in ("lra(theta=0.125)", "lru")]
    np.testing.assert_array_equal(runs[0].copies, runs[1].copies)


@few
@given(traces(), budgets, st.sampled_from((1, 2, "'50%'")))
def test_keyformer_without_noise_and_temperature_is_h2o(trace, budget, recent):
    runs = [replay(spec, budget, trace) for spec in (f"keyformer(noise=False, steps=0, recent={recent})",)]
    runs.append(replay(f"h2o(recent={recent})", budget, trace))
    np.testing.assert_array_equal(runs[0].copies, runs[1].copies)


@few
@given(traces(), st.integers(12, 16))
def test_roco_with_nothing_exempt_evicts_the_lowest_mean(trace, budget):
    """With all pages in the set, the deviation says nothing: what leaves has the lowest mean of those not protected."""

    class Means(registry.find("roco")):
        def score(self, view):
            return self.moments(view)[0]

    runs = [replay(p, budget, trace) for p in ("roco(exempt=0, recent=1)", Means(exempt=0, recent=1))]
    np.testing.assert_array_equal(runs[0].copies, runs[1].copies)


@few
@given(traces(), budgets, st.integers(1, 5))
def test_corm_holds_what_it_wants_and_capped_no_more_than_the_budget(trace, budget, window):
    free, capped = (replay(f"corm(window={window}, recent=2{x})", budget, trace) for x in ("", ", capped=True"))
    other = replay(f"corm(window={window}, recent=2)", budget + 1, trace)
    np.testing.assert_array_equal(free.copies, other.copies)  # the budget says nothing
    for out in capped.out:
        assert (out.resident <= budget).all()


@few
@given(traces(), budgets, st.sampled_from(("evict3r", "evict3r(temp=0.01)")))
def test_evict3r_spends_no_more_than_all_layers_have(trace, budget, spec):
    for out in replay(spec, budget, trace).out:
        assert out.resident.sum() <= budget * len(out.resident) + (out.resident == 1).sum()


@few
@given(
    traces(),
    st.sampled_from(
        ("lra(theta=0.1)", "scissorhands(window=4, recent=1)", "roco(recent=1)", "roco(generated=3, recent=1)")
        + ("corm(window=3, recent=1)", "keyformer(recent=1)", "evict3r", "evict3r(temp=0.01)")
    ),
    st.sampled_from(("head", "layer", "token")),
    st.booleans(),
)
def test_at_any_granularity_on_windows_and_pages(trace, spec, granularity, offload):
    """Heads of the same rows decide the same, and the table is sound at every step (the audit)."""
    kind = {"offload": "spill", "demand": Use("weight", 0.1)} if offload else {}
    run = replay(policy_for(spec, granularity=granularity), 3, trace, **kind)
    assert np.isfinite([o.attended for o in run.out]).all()
    source = trace.sources[0]
    same = [np.repeat(x[:, :, :1], x.shape[2], 2) for x in (source._prompt, source._decode)]
    twins = DenseSource(*same)
    twins.__class__, twins._windows = type(source), source._windows
    copies = replay(policy_for(spec.replace("keyformer(", "keyformer(noise=False, "), granularity=granularity), 3,
                    replace(trace, sources=[twins]), **kind).copies  # fmt: skip
    lanes = copies.reshape(len(copies), -1, 1 if granularity != "head" else trace.lanes[1], copies.shape[-1])
    np.testing.assert_array_equal(lanes, np.broadcast_to(lanes[:, :, :1], lanes.shape))


# -- RoCo --------------------------------------------------------------------------------------------------------------


def test_roco_states():
    """Means and deviations after rows t = 3, 4, 5, before the eviction."""
    found = []

    class Noting(registry.find("roco")):
        def score(self, view):
            if view.now not in seen:
                seen.add(view.now)
                found.append({int(k): (m, d) for k, m, d in zip(view.key[0, 0], *self._flat(view), strict=True)})
            return super().score(view)

        def _flat(self, view):
            return (x[0, 0] for x in self.moments(view))

    seen: set[int] = {0, 1}
    run = replay(Noting(exempt=1, recent=1), 3)
    assert run.kept() == sets("0 1 2|0 1 3|0 3 4|0 3 5")
    expected = [
        {0: (0.73, 0.1847), 1: (0.1833, 0.2240), 2: (0.20, 0)},
        {0: (0.6333, 0.2543), 1: (0.1546, 0.2002), 3: (0.2568, 0.1268)},
        {0: (0.5417, 0.3097), 3: (0.3008, 0.1208), 4: (0.2062, 0.0951)},
    ]
    for state, right in zip(found, expected, strict=True):
        for key, (mean, deviation) in right.items():
            assert state[key][0] == pytest.approx(mean, abs=1e-4)
            assert state[key][1] == pytest.approx(deviation, abs=2e-4)


def test_roco_exempts_uneven_pages():
    """Page 1 has the lowest mean and the highest deviation: only with something exempt does it stay."""
    rows = [[1.0], [1.0, 0.0], [0.9, 0.1, 0.0], [0.6, 0.0, 0.2, 0.2], [0.5, 0.0, 0.1, 0.2, 0.2]]
    rows[2:] = [[0.5, 0.3, 0.2], [0.4, 0.0, 0.3, 0.3], [0.35, 0.0, 0.2, 0.2, 0.25]]
    trace = matrix_trace(rows, prompt=3)
    assert replay("roco(exempt=0, recent=1)", 4, trace).kept()[-1] == [0, 2, 3, 4]
    assert replay("roco(exempt=2, recent=1)", 4, trace).kept()[-1] == [0, 1, 3, 4]


def test_roco_cuts_a_long_prompt_to_the_uneven_pages():
    """Three of six must leave, as many as are not exempt: the three lowest deviations of pages 0 to 4 go."""
    run = replay("roco(exempt=1, recent=1)", 3, matrix_trace(prompt=6))
    deviation = run.cache.policy.moments(run.cache.view)
    assert run.kept(start=0)[0] == [0, 1, 5]
    assert deviation[0].shape == run.cache.view.key.shape


def test_roco_with_a_budget_of_generated_tokens_never_evicts_the_prompt():
    """Two generated pages beside a prompt of two, whatever the budget."""
    for budget in (1, 99):
        run = replay("roco(generated=2, exempt=0, recent=1)", budget)
        assert run.kept() == sets("0 1 2|0 1 2 3|0 1 2 4|0 1 2 5")
    offload = replay("roco(generated=2, exempt=0, recent=1)", 1, offload="spill", demand=THETA)
    assert offload.kept() == run.kept()


@few
@given(traces(windows=False), st.integers(1, 6), st.integers(1, 3))
def test_roco_holds_the_prompt_and_what_it_may_generate(trace, generated, recent):
    recent, request = min(recent, generated), trace.requests()[0]
    run = replay(f"roco(generated={generated}, recent={recent})", 1, trace)
    prompt, most = (-(-n // trace.page_size) for n in (request.prompt_tokens, generated))
    for a, out in zip(request.accesses(), run.out, strict=True):
        assert (out.resident == prompt + min(most, a.keys - prompt)).all()
    assert run.copies[-1][:, :prompt].all()


def test_roco_deviation_of_pages():
    """From squares of tokens; without a page's own cross products, all prompt pages would look even."""
    trace = tiny_trace(layers=1, heads=1, prompt=96, steps=0).paged(4)
    rows = trace.requests()[0]._prompt(trace.sources[0].prompt()).rows[:, 0, 0]
    run = replay("roco", 99, trace)
    found = by_key(run.cache, run.cache.policy.moments(run.cache.view)[1], 24, np.nan)[0]
    true = np.array([rows[4 * k :, k].std() for k in range(24)])
    assert np.abs(found / true - 1)[:20].mean() < 0.15 and (found > 0).all()


def test_roco_generates_at_least_what_it_protects():
    for recent in ("10", "'50%'"):
        with pytest.raises(ConfigError, match="recent = "):
            registry.build(f"roco(generated=9, recent={recent})")


# -- Scissorhands and CORM ---------------------------------------------------------------------------------------------


def test_scissorhands_evicts_a_share_of_the_budget_at_once():
    trace = tiny_trace(layers=1, heads=1, prompt=10, steps=14)
    held = [len(k) for k in replay("scissorhands(recent=1)", 12, trace).kept()]
    assert held == [11, 12, 7, 8, 9, 10, 11, 12, 7, 8, 9, 10, 11, 12]
    assert {len(k) for k in replay("scissorhands(recent=1, drop=0)", 12, trace).kept()[2:]} == {12}
    assert len(replay("scissorhands(recent=1)", 99, trace).kept()[-1]) == 24  # nothing leaves a large budget
    assert len(replay("scissorhands(recent=1)", 8, trace).kept(start=0)[0]) == 6  # 4 leave where 2 would do
    assert len(replay("scissorhands(recent=1, drop=0.25)", 8, trace).kept(start=0)[0]) == 8


def test_scissorhands_keeps_the_newest_of_equals():
    """No page is ever below its share: all tie, and the older ones leave."""
    rows = [[1 / n] * n for n in range(1, 7)]
    run = replay("scissorhands(recent=1, drop=0.5)", 4, matrix_trace(rows, prompt=4))
    assert run.kept() == [[2, 3, 4], [2, 3, 4, 5]]


def test_corm_ignores_the_budget_and_capped_evicts_the_oldest_mark():
    """After the last row pages 2, 3, 4 are marked at steps 3, 2, 3 and page 5 is new."""
    rows = [[1.0], [0.5, 0.5], [0.0, 0.0, 1.0], [0.0, 0.0, 0.4, 0.6], [0.0, 0.0, 0.1, 0.5, 0.4]]
    rows += [[0.0, 0.0, 0.5, 0.0, 0.5, 0.0]]
    trace = matrix_trace(rows, prompt=2)
    assert replay("corm(window=2, recent=1)", 1, trace).kept()[-1] == [2, 3, 4, 5]
    assert replay("corm(window=2, recent=1, capped=True)", 3, trace).kept()[-1] == [2, 4, 5]
    assert replay("corm(window=2, recent=1, capped=True)", 9, trace).kept()[-1] == [2, 3, 4, 5]


def test_corm_window_larger_than_the_prompt():
    """Everything that was ever marked is wanted; page 1 never was."""
    rows = [[1.0], [0.8, 0.2], [0.7, 0.1, 0.2], [0.5, 0.1, 0.2, 0.2]]
    run = replay("corm(recent=1)", 9, matrix_trace(rows, prompt=3))
    assert run.kept(start=0) == [[0, 2], [0, 3]]


def test_corm_keeps_a_page_that_is_being_filled():
    rows = [[1.0], [1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0, 0, 0], [1.0, 0, 0, 0, 0]]
    trace = matrix_trace(rows, prompt=2).paged(2)
    assert replay("corm(window=1, recent=0)", 9, trace).kept(start=0) == [[0], [0, 1], [0], [0, 2]]


def test_corm_wants_tokens_to_protect():
    with pytest.raises(ConfigError, match="corm has no budget"):
        registry.build("corm(recent='50%')")


class FewRows(DenseSource):
    """A capture that stored the last `stored` prompt rows only."""

    stored = 2

    def prompt(self):
        p = super().prompt()
        return replace(p, rows=p.rows[-self.stored :], kv_lo=p.kv_lo[-self.stored :])


def few_rows(prompt=4):
    source = matrix_trace(prompt=prompt).sources[0]
    return dense_trace([FewRows(source._prompt, source._decode)])


@pytest.mark.parametrize("name", ["scissorhands", "corm"])
def test_too_few_prompt_rows_are_said(name):
    trace = few_rows()
    for window in (3, 400):  # all 4 rows, where the prompt has no more
        words = rf'the last {min(window, 4)} rows .* stores 2\nin policy "{name}"\ncapture it with --prompt-'
        with pytest.raises(PolicyError, match=words):
            replay(f"{name}(window={window}, recent=1)", 4, trace)
    run = replay(f"{name}(window=2, recent=1)", 4, trace)
    np.testing.assert_array_equal(run.copies, replay(f"{name}(window=2, recent=1)", 4, matrix_trace(prompt=4)).copies)


@pytest.mark.parametrize("spec", ["scissorhands(window=3, recent=1)", "corm(window=3, recent=1)"])
def test_an_equal_share_of_a_page_is_that_of_its_tokens(spec):
    """Of even rows no page is low and every one is marked: the last of five tokens, alone in its page, weighs half."""
    trace = matrix_trace([[1 / n] * n for n in range(1, 8)], prompt=3).paged(2)
    run = replay(spec, 9, trace, offload="spill", demand=THETA)  # full rows, in which equal weights stay equal
    for step, score in enumerate(run.score):
        page = score[0][~np.isnan(score[0])]
        assert (page == (0 if spec.startswith("scissorhands") else step + 3)).all()


# -- Keyformer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zeta", "tau", "expected"),
    [
        (0, 1, [0.64, 0.03, 0.20, 0.13]),
        (0, 2, [0.4492, 0.0973, 0.2511, 0.2024]),
        ([-0.3, 1.2, 0.1, 0.4], 1, [0.4795, 0.1007, 0.2236, 0.1962]),
    ],
)
def test_tempered_weights(zeta, tau, expected):
    weights = np.array([0.64, 0.03, 0.20, 0.13], np.float32)
    assert tempered(weights, np.array(zeta, np.float32), tau) == pytest.approx(expected, abs=5e-5)


def test_tempered_weights_of_nothing():
    found = tempered(np.array([[0.0, 0.0], [0.0, 0.5]], np.float32), 1.0, 2.0)
    assert found.tolist() == [[0, 0], [0, 1]] and found.dtype == np.float32


def test_keyformer_draws_noise_by_seed():
    trace = tiny_trace(layers=1, heads=2, prompt=8, steps=24)
    first, again, other = (replay("keyformer", 6, trace, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.copies, again.copies)
    assert (first.copies != other.copies).any()
    assert (first.copies != replay("keyformer(noise=False)", 6, trace).copies).any()


def test_keyformer_noise_is_gumbel():
    """Its mean is Euler's constant, its variance pi^2 / 6."""
    u = uniform(np.broadcast_to(np.arange(1000), (10, 10, 1000)), 7, 3)
    zeta = -np.log(-np.log(u + 2**-25))
    assert 0 <= u.min() < 1e-3 and 0.999 < u.max() < 1
    assert zeta.mean() == pytest.approx(0.5772, abs=0.02) and zeta.var() == pytest.approx(np.pi**2 / 6, abs=0.04)


def test_keyformer_counts_prompt_rows_that_are_not_stored_plainly():
    """Without noise, at tau 1, it makes no difference how many prompt rows a trace stores."""
    for spec, same in (("keyformer(noise=False, steps=0)", True), ("keyformer(noise=False, tau=3.0)", False)):
        stored, whole = (replay(spec, 5, t).score[0] for t in (few_rows(5), matrix_trace(prompt=5)))
        assert np.allclose(stored, whole, atol=1e-6, equal_nan=True) == same


def test_keyformer_every_other_step():
    held = [len(k) for k in replay("keyformer(every=2, recent=1)", 3).kept()]
    assert held == [3, 3, 4, 3]


# -- Evict3R -----------------------------------------------------------------------------------------------------------


def test_layer_shares():
    shares = layer_shares(np.array([0.02, 0.10, 0.40]).reshape(3, 1, 1), 0.5)
    assert shares.ravel() == pytest.approx([0.4311, 0.3673, 0.2016], abs=5e-5)
    assert layer_shares(np.array([1e9, 0.0]), 1e-9).tolist() == [0, 1]


def layered(prompt=4, steps=8, facts=None):
    """Two layers: rows of the first are even, those of the second have one peak, at the newest token."""
    n = prompt + steps
    rows = np.zeros((n, 2, 1, n), np.float32)
    for t in range(n):
        rows[t, 0, 0, : t + 1] = 1 / (t + 1)
        rows[t, 1, 0, t] = 1
    return dense_trace([DenseSource(rows[:prompt, ..., :prompt], rows[prompt:], facts=facts)])


def with_facts(spec, budget, trace):
    request, policy = trace.requests()[0], registry.build(spec)
    cache = Cache(
        trace.lanes, request.stride, policy, Capacity(budget),
        use=THETA, page_size=trace.page_size, facts=request.facts, audit=True,
    )  # fmt: skip
    return drive(cache, request.accesses(), request.stride)


def test_evict3r_gives_even_layers_more():
    even, peaked = (len(replay("evict3r(temp=0.05)", 5, layered()).kept(lane)[-1]) for lane in (0, 1))
    assert (even, peaked) == (10, 1)  # less than a page is a page
    alike = replay("evict3r(temp=1e6)", 5, layered())
    assert [len(alike.kept(lane)[-1]) for lane in (0, 1)] == [5, 5]


def test_evict3r_frames():
    """Frames of 3, 3, 4 and 2 tokens: the first one stays, and so does the leading token of every other."""
    frames = np.repeat(np.arange(4), (3, 3, 4, 2))
    run = with_facts("evict3r(temp=1e6, special=1)", 6, layered(facts={"frame": frames}))
    for lane in (0, 1):
        assert {0, 1, 2, 3, 6, 10} == set(run.kept(lane)[-1])
    plain = replay("evict3r(temp=1e6)", 6, layered())  # one token per frame: the first token stays
    assert all(0 in kept for kept in plain.kept()) and 1 not in plain.kept()[-1]


def test_evict3r_shares_follow_the_last_frame():
    """Of frames of 4 tokens, the budgets of layers change with the first token of the next one, and only then."""
    budgets = []

    class Noting(registry.find("evict3r")):
        def split(self, view):
            budgets.append(super().split(view).ravel().tolist())
            return super().split(view)

    trace = layered(steps=12, facts={"frame": np.repeat(np.arange(4), 4)})
    cache = Cache(
        trace.lanes, 16, Noting(temp=0.05, special=1), Capacity(6), use=THETA, facts=trace.requests()[0].facts
    )  # fmt: skip
    drive(cache, trace.requests()[0].accesses(), 16)
    changes = [i for i in range(1, len(budgets)) if budgets[i] != budgets[i - 1]]
    assert set(changes) <= {1, 5, 9} and changes
    assert all(sum(b) == 12 for b in budgets)


def test_evict3r_exposure_is_in_frames():
    """A frame of two tokens counts once: the score is the sum of weight * tokens over the frames seen."""
    frames = np.repeat(np.arange(6), 2)
    run = with_facts("evict3r(special=0)", 12, layered(facts={"frame": frames}))
    scores = run.score[-1][0]  # of the even layer, where each row gives weight * tokens = 1
    assert scores.tolist() == pytest.approx([np.inf, np.inf, 2, 9 / 5, 2, 7 / 4, 2, 5 / 3, 2, 3 / 2, 2, 1])


def test_evict3r_with_few_prompt_rows():
    """Page 1: rows of 2, 3 and 4 tokens are not stored and count as (1/2 + 1/3 + 1/4) * 3; two more as 1 each."""
    rows = [[1 / n] * n for n in range(1, 9)]
    source = matrix_trace(rows, prompt=6).sources[0]
    stored = replay("evict3r", 9, dense_trace([FewRows(source._prompt, source._decode)])).score[0][0]
    whole = replay("evict3r", 9, matrix_trace(rows, prompt=6)).score[0][0]
    assert whole[1:6] == pytest.approx([1] * 5)
    assert stored[1:6] == pytest.approx([5.25 / 5, (7 / 12 * 3.5 + 2) / 4, 1, 1, 1])


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("lra(theta=-1)", "theta = -1"),
        ("roco(generated=-1)", "generated = -1"),
        ("scissorhands(window=0)", "window = 0"),
        ("corm(window=0)", "window = 0"),
        ("keyformer(every=0)", "every = 0"),
        ("keyformer(steps=-1)", "steps = -1"),
        ("keyformer(tau=0)", "tau = 0"),
        ("evict3r(temp=0)", "temp = 0"),
        ("evict3r(special=-1)", "special = -1"),
    ],
)
def test_parameters_out_of_range(spec, words):
    with pytest.raises(ConfigError, match=words):
        registry.build(spec)


def test_evict3r_begins_a_frame_with_its_first_row():
    """Frames of two tokens: of a prompt of four the newest frame has rows 2 and 3, and no other."""
    source = matrix_trace(M1, prompt=4).sources[0]
    source.facts["frame"] = np.arange(6) // 2
    request = dense_trace([source]).requests()[0]
    policy = registry.build("evict3r")
    cache = Cache((1, 1), 6, policy, Capacity(6), facts=request.facts)
    cache.access(next(request.accesses()))
    newest = np.array([*M1[2], 0]) + np.array(M1[3])
    assert cache.view["frame"][0, 0, :4] == pytest.approx(newest, abs=1e-6)
