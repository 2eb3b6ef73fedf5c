"""Closed forms that the cache engine must meet; those of the time model are in tests/machine."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim import registry
from kvsim.cache.demand import Use
from kvsim.machine import closed
from kvsim.trace.synthetic import synthetic_trace
from tests.helpers import refer, replay
from tests.policies.test_sieve import Queue

STABLE_HEADS = '''
import numpy as np
from kvsim.registry import policy

@policy("stable-heads")
class StableHeads:
    """The first `unstable` heads of a layer keep everything, the others the `kept` pages with the largest weights."""

    unstable: int = 1
    kept: int = 8

    def split(self, view):
        heads = np.arange(view.budget.shape[1])[:, None]
        return np.where(heads < self.unstable, view.keys, self.kept)

    def score(self, view):
        return view.weights
'''


@pytest.mark.parametrize("unstable", [0, 1, 2, 4])
def test_what_stable_and_unstable_heads_hold(tmp_path, unstable):
    """FlexiCache's split, as a plug-in: bytes on the GPU after every step, while the context grows past what is kept.

    The engine holds no page summaries: their share is the form's alone.
    """
    page, kept, heads = 4, 8, 4
    (path := tmp_path / "stable_heads.py").write_text(STABLE_HEADS)
    policy = registry.build(f"{path}(unstable={unstable}, kept={kept})")
    trace = synthetic_trace(prompt=16, steps=80, layers=2, kv_heads=heads, seed=3).paged(page)
    run = replay(policy, 99, trace, offload="spill", demand=Use("topk", kept))
    width, value = trace.geometry.head_dim, trace.geometry.kv_bytes
    shares = []
    for a, out in zip(trace.requests()[0].accesses(), run.out, strict=True):
        tokens = a.keys * page  # whole pages
        shares.append(closed.stable_heads_share(unstable / heads, kept * page, tokens))
        held = closed.kv_bytes(out.resident.sum(), page, width, value)
        assert held == pytest.approx(shares[-1] * closed.kv_bytes(run.cache.lanes, tokens, width, value), rel=1e-12)
    assert shares[0] == 1.0 and shares[-1] == pytest.approx(unstable / heads + (1 - unstable / heads) * 32 / 96)
    assert (run.misses() > 0) == (unstable < heads)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 9), min_size=12, max_size=60), st.integers(2, 5))
def test_sieve_and_lfu_evict_alike_until_the_hand_wraps(names, capacity):
    """And while a page is held that was never hit: then both evict the one of these that came first.

    LFU breaks ties by arrival, the law by the last use: the same thing among pages that were never hit.
    """
    run = {spec: refer(f"{spec}(recent=0)", names, capacity).kept(start=0) for spec in ("sieve", "lfu")}
    keys = {name: i for i, name in enumerate(dict.fromkeys(names))}
    queue = Queue()
    for name, sieve, lfu in zip(names, run["sieve"], run["lfu"], strict=True):
        full = len(queue.pages) == capacity and keys[name] not in queue.pages
        if queue.wrapped or (full and set(queue.pages) <= queue.hit):
            break
        queue.step([keys[name]], capacity)
        assert sieve == lfu


def test_beyond_the_law_they_differ():
    """c was the newest, so the hand is back at the oldest; d was never hit."""
    for spec, left in (("sieve", "bde"), ("lfu", "abe")):
        kept = refer(f"{spec}(recent=0)", "abbcade", 3).kept(start=0)
        assert "".join("abcde"[k] for k in kept[-1]) == left
