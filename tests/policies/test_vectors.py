"""The published test vectors: small cases worked out by hand, one policy after another."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from kvsim import registry
from kvsim.cache.demand import Use
from kvsim.errors import ConfigError
from tests.helpers import M1, THETA, matrix_trace, refer, replay

LOSSY = {
    "full": ("0 1 2|0 1 2 3|0 1 2 3 4|0 1 2 3 4 5", [1, 1, 1, 1]),
    "fifo": ("0 1 2|1 2 3|2 3 4|3 4 5", [1, 1, 0.82, 0.41]),
    "streaming-llm(sink=1)": ("0 1 2|0 2 3|0 3 4|0 4 5", [1, 1, 0.95, 0.36]),
    "lru": ("0 1 2|0 2 3|2 3 4|3 4 5", [1, 1, 0.95, 0.41]),
    "lfu": ("0 1 2|0 2 3|0 2 4|0 2 5", [1, 1, 0.95, 0.30]),
    "h2o(recent=1)": ("0 1 2|0 1 3|0 1 4|0 1 5", [1, 1, 0.73, 0.78]),
    "tova": ("0 1 2|0 2 3|2 3 4|2 3 5", [1, 1, 0.95, 0.41]),
    "lazy-eviction(window=2, alpha=0.15)": ("0 1 2|0 2 3|0 2 3 4|2 4 5", [1, 1, 0.95, 0.44]),
    "belady": ("0 1 2|1 2 3|1 3 4|3 4 5", [1, 1, 0.82, 0.89]),
    "mass-oracle": ("0 1 2|1 2 3|1 2 3|2 3 5", [1, 1, 0.82, 0.93]),
}


def sets(text: str) -> list[list[int]]:
    return [[int(k) for k in part.split()] for part in text.split("|")]


@pytest.mark.parametrize("spec", LOSSY)
def test_lossy(spec):
    kept, mass = LOSSY[spec]
    run = replay(spec, 3)
    assert run.kept() == sets(kept)
    assert run.mass() == mass


def test_h2o_sums_before_eviction():
    """The victim still counts in the step it leaves after, so sums are taken from a score made before `settle`."""
    seen = []

    class Spy:
        spec_name = "spy"

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def observe(self, view):
            lane = view.key[0, 0] >= 0
            seen.append(
                {int(k): round(float(m), 4) for k, m in zip(view.key[0, 0][lane], view.mass[0, 0][lane], strict=True)}
            )

    spy = Spy()
    spy.inner = registry.build("h2o(recent=1)")
    replay(spy, 3)
    expected = [
        {0: 2.92, 1: 0.55, 2: 0.40, 3: 0.13},
        {0: 3.1666, 1: 0.6185, 3: 0.5136, 4: 0.3014},
        {0: 3.2050, 1: 1.3364, 4: 0.3527, 5: 0.1923},
    ]
    for found, right in zip(seen[2:], expected, strict=True):
        assert found == pytest.approx(right, abs=1e-4)


def test_h2o_mask_hides_pages_that_return():
    """Read sets at each step, the incoming token included; token 3 is hidden at t = 4 although its score survives."""
    run = replay("h2o-mask(recent=1)", 3, matrix_trace([*M1, [1 / 7] * 7]))
    assert run.mass() == [1, 1, 0.45, 0.74, pytest.approx(3 / 7, abs=1e-3)]
    rows = [np.array(r) for r in M1[3:]]
    for row, visible, mass in zip(rows, sets("0 1 2 3|0 1 4|0 1 5"), (1, 0.45, 0.74), strict=True):
        assert row[visible].sum() == pytest.approx(mass)
    assert run.kept()[-1] == list(range(7))  # nothing is dropped


def test_h2o_mask_forgets_what_was_hidden_but_not_what_left_the_window():
    """Four pages, half of them the window: page 3, heavy, leaves it at t = 5, is hidden then, and back at t = 6."""
    rows = [[1.0], [0.5, 0.5], [0.4, 0.3, 0.3], [0.1, 0.1, 0.1, 0.7], [0.1, 0.1, 0.1, 0.6, 0.1]]
    rows += [[0.2, 0.2, 0.1, 0.0, 0.25, 0.25], [1 / 7] * 7]
    run, seen = None, []
    for end in (6, 7):
        run = replay("h2o-mask(recent=2)", 4, matrix_trace(rows[:end]))
        seen.append(np.flatnonzero(run.cache.seen[0] >= 0).tolist())
    assert seen == [[0, 1, 4, 5], [0, 3, 5, 6]]


def test_h2o_mask_protects_sinks():
    """Three pages: the sink, the newest and one heavy hitter between them."""
    rows = [[1.0], [0, 1.0], [0, 0.5, 0.5], [0, 0.3, 0.6, 0.1], [0, 0.3, 0.2, 0.1, 0.4], [0.1, 0.1, 0.2, 0.2, 0.1, 0.3]]
    trace = matrix_trace(rows, prompt=3)
    assert replay("h2o-mask(recent=1)", 3, trace).mass() == [1, pytest.approx(0.9), pytest.approx(0.6)]
    for spec in ("h2o-mask(recent=1, sink=1)", "h2o-mask(recent=1, protect_head=0.34)"):
        assert replay(spec, 3, trace).mass() == [1, pytest.approx(0.7), pytest.approx(0.5)]
    with pytest.raises(ConfigError, match="below the 4 that h2o-mask protects"):
        replay("h2o-mask(recent=1, sink=3)", 3, trace)


def test_lazy_eviction_keeps_at_least_its_window():
    recent = [registry.build(f"lazy-eviction(window=5{more})").recent for more in ("", ", recent=3", ", recent=100")]
    assert recent == [5, 5, 100]
    kept = replay("lazy-eviction(window=1, recent=3, alpha=0.15)", 3).kept()
    assert kept == sets("0 1 2|1 2 3|2 3 4|3 4 5")
    for text in ("recent='50%'", "recent=-1", "recent=1.5"):
        with pytest.raises(ConfigError, match="recent = "):
            registry.build(f"lazy-eviction({text})")


def test_lazy_eviction_states():
    run = replay("lazy-eviction(window=2, alpha=0.15)", 3)
    view = run.cache.view
    state = {
        int(k): (int(ts), int(mri), round(float(score), 4))
        for k, ts, mri, score in zip(
            view.key[0, 0], view["ts"][0, 0], view["mri"][0, 0], run.cache.policy.score(view)[0, 0], strict=True
        )
        if k >= 0
    }
    assert state == {2: (4, 1, 1.5379), 4: (3, 1, 1.2384), 5: (4, 1, 1.5379)}
    assert max(len(k) for k in run.kept()) == 4  # budget + window - 1
    assert run.score[2][0][[0, 2]] == pytest.approx([1.5379, 1.5379], abs=1e-4)


@pytest.mark.parametrize("dtype", ["int32", "fp16"])
def test_lazy_eviction_counts_steps_exactly_or_in_half_precision(dtype):
    """5,001 is stored as 5,000 in half precision, as in the published code."""
    p = registry.build(f"lazy-eviction(window=2, alpha=0.5, dtype='{dtype}')")
    state = {n: np.zeros((1, 1, 1), t) for n, t in p.columns.items()}

    class View(SimpleNamespace):
        def __getitem__(self, name):
            return state[name]

    p.observe(View(now=5001, born=np.ones((1, 1, 1)), weights=np.ones((1, 1, 1), np.float32)))
    assert int(state["ts"][0, 0, 0]) == {"int32": 5001, "fp16": 5000}[dtype]


def test_lazy_eviction_ties():
    """Equal states: the newest, the oldest or the heaviest page stays."""
    rows = [[1.0], *([1 / n] * n for n in range(2, 6)), [0.3, 0.25, 0.2, 0.15, 0.05, 0.05]]
    kept = {}
    for tie in ("newest", "oldest", "last_weight"):
        run = replay(f"lazy-eviction(window=1, alpha=0.9, tie='{tie}')", 3, matrix_trace(rows, prompt=5))
        kept[tie] = run.kept()[-1]
    assert kept == {"newest": [3, 4, 5], "oldest": [0, 1, 5], "last_weight": [0, 1, 5]}


def test_gqa_reduction_is_part_of_the_policy():
    """A group's mean evicts page 1 and its largest weight evicts page 2; rows reach a policy as means."""
    groups = np.array([[0.46, 0.04, 0.26, 0.24], [0.10, 0.34, 0.26, 0.30]])
    rows = [[1.0], [0.5, 0.5], [0.4, 0.3, 0.3], groups.mean(0).tolist()]
    assert groups.mean(0).argmin() == 1 and groups.max(0).argmin() == 2
    run = replay("tova", 3, matrix_trace(rows, prompt=3))
    assert run.kept() == [[0, 2, 3]]


@pytest.mark.parametrize(
    ("spec", "kept", "fetched"),
    [("lru", "0 1 2|0 2 3|2 3 4|1 4 5", [0, 0, 0, 1]), ("belady", "0 1 2|1 2 3|1 3 4|3 4 5", [0, 0, 0, 0])],
)
def test_offload(spec, kept, fetched):
    run = replay(spec, 3, offload="spill", demand=THETA)
    assert run.kept() == sets(kept)
    assert [int(o.fetched.sum()) for o in run.out[1:]] == fetched


def test_offload_counts_what_a_step_needs():
    """t = 5 needs page 1, which is not on the GPU; attention reads it beside the four that are."""
    out = replay("lru", 3, offload="spill", demand=THETA).out[-1]
    assert (int(out.used[0]), int(out.found[0]), int(out.read.sum())) == (1, 0, 5)
    assert float(out.hit[0]) == pytest.approx(0.08 + 0.14 + 0.04 + 0.15)
    assert float(out.attended[0]) == pytest.approx(0.97)


class Admitting(registry.find("belady")):
    """An object cache admits what it has just been asked for; Belady alone may refuse it."""

    def score(self, view):
        return np.where(view.last == view.now, np.inf, super().score(view))


@pytest.mark.parametrize(
    ("spec", "contents", "hits"),
    [
        ("fifo(recent=0)", "a ab abc abc bcd acd ade abe bce abc acf acf abf bcf bcd bcd", 3),
        ("lru(recent=0)", "a ab abc abc acd acd ade abe bce abc acf acf abf abc bcd bcd", 4),
        ("lfu(recent=0)", "a ab abc abc acd acd ade abe abc abc acf acf abf abc acd abd", 4),
        (Admitting(recent=0), "a ab abc abc abd abd abe abe abc abc abf abf abf bcf bdf bdf", 7),
    ],
)
def test_object_caches(spec, contents, hits):
    names = "abcadaebcafabcdb"
    run = refer(spec, names, 3)
    assert ["".join(sorted("abcdef"[k] for k in kept)) for kept in run.kept(start=0)] == contents.split()
    births = len(set(names))
    assert len(names) - births - run.misses() == hits


def test_random_is_a_function_of_seed_and_nothing_else():
    first, again, other = (replay("random", 3, seed=s).kept() for s in (1, 1, 2))
    assert first == again
    assert any(replay("random", 3, seed=s).kept() != first for s in range(2, 8)), other


def test_use_as_a_share_of_the_visible_tokens():
    """Share 1 of four tokens is 0.25: at t = 3 only page 0 is used; of the renormalised row too."""
    out = replay("full", 9, use=Use("share", 1.0)).out
    assert [int(o.used[0]) for o in out[1:]] == [1, 1, 3, 1]
    assert [int(o.found[0]) for o in out[1:]] == [1, 1, 3, 1]
