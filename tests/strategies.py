"""Hypothesis strategies: small traces with exact sums, and settings of a cache."""

from __future__ import annotations

from hypothesis import strategies as st

from kvsim.cache.demand import Use
from kvsim.testing import tiny_trace

ONLINE = ("random", "fifo", "lru", "lfu", "sieve", "streaming-llm(sink=1)", "h2o", "h2o(recent=2)", "tova")
ORACLES = ("belady", "mass-oracle")
LAGGED = ("lazy-eviction(window=3, alpha=0.05)", "lazy-eviction(window=2, alpha=0.1, dtype='fp16', tie='oldest')")
DEMANDS = (Use("weight", 0.1), Use("share", 1.0), Use("topk", 3), Use("all"))


@st.composite
def traces(draw, windows: bool = True, page_sizes=(1, 1, 2, 4), max_layers: int = 2):
    layers = draw(st.integers(1, max_layers))
    seen = draw(st.lists(st.sampled_from((0, 0, 3, 7)), min_size=layers, max_size=layers)) if windows else ()
    trace = tiny_trace(
        seed=draw(st.integers(0, 10**6)),
        layers=layers,
        heads=draw(st.integers(1, 3)),
        prompt=draw(st.integers(1, 12)),
        steps=draw(st.integers(1, 16)),
        windows=seen,
    )
    return trace.paged(draw(st.sampled_from(page_sizes)))


budgets = st.integers(3, 9)
