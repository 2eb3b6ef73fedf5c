"""Our windows against those of transformers: a model's own sliding window, its cache, and a mask of sinks and a window.

The trace is the same model's without a window. In the first layer both see the same keys and queries, so that weights
must be equal; in later layers what was dropped has changed the queries (closed loop), and what is visible must be.
With several query heads per KV head a trace holds their mean row: what is left of it, renormalised, is not the mean of
rows renormalised one by one, and by how much goes into the table.
"""

from __future__ import annotations

import pytest

pytest.importorskip("kvpress")  # the environment of `make peers`: another transformers is not what the table names
torch = pytest.importorskip("torch")
tf = pytest.importorskip("transformers")

import numpy as np  # noqa: E402

from kvsim import registry  # noqa: E402
from kvsim.cache.cache import Cache  # noqa: E402
from kvsim.cache.tiers import Capacity  # noqa: E402
from tests.peers.models import observe, tiny, tokens  # noqa: E402

PROMPT, STEPS, LAYERS = 24, 16, 3
WINDOW, SINK, BUDGET = 10, 4, 12


@torch.no_grad()
def decode(model, mask=None):
    """Prefill, then one token at a time: step, cache, and mean row of each KV head. `mask`: bool [tokens, tokens]."""
    ids, cache = tokens(0, PROMPT + STEPS), tf.DynamicCache(config=model.config)
    for step in range(STEPS + 1):
        rows = slice(PROMPT + step - 1, PROMPT + step) if step else slice(0, PROMPT)
        given = {}
        if mask is not None:
            hidden = torch.finfo(torch.float32).min
            given["attention_mask"] = torch.where(mask[rows, : rows.stop], 0.0, hidden)[None, None]
        out = model(
            input_ids=ids[:, rows], past_key_values=cache, use_cache=True, output_attentions=True,
            position_ids=torch.arange(rows.start, rows.stop)[None], **given,
        )  # fmt: skip
        heads = model.config.num_key_value_heads
        yield step, cache, [a[0, :, -1].unflatten(0, (heads, -1)).mean(1).numpy() for a in out.attentions]


def ours(spec, budget, trace):
    """By step: for each lane, weights by key as attention saw them, and the keys left afterwards."""
    request = trace.requests()[0]
    cache = Cache(trace.lanes, request.stride, registry.build(spec), Capacity(budget))
    before: list[np.ndarray] = []
    cache.watch = lambda access, read: before.append(np.where(read, cache.table.key, -1))
    for a in request.accesses():
        slots = cache.table.slots
        cache.access(a)
        keys, weights = before.pop(), cache.table.weights
        if a.prefill or slots != cache.table.slots:
            weights = np.zeros_like(keys, float)  # prefill: the table was cut
        lanes = [dict(zip(k[k >= 0].tolist(), w[k >= 0], strict=True)) for k, w in zip(keys, weights, strict=True)]
        yield lanes, [set(k[k >= 0].tolist()) for k in cache.table.key]


def compare(model, spec, budget, trace, visible, mask=None, cached=None):
    """Largest difference of a weight in the first layer, and how many entries were compared."""
    heads, worst, compared = model.config.num_key_value_heads, 0.0, 0
    full = trace.requests()[0].source._vectors[1][0]  # keys of the first layer
    for (step, cache, rows), (lanes, left) in zip(decode(model, mask), ours(spec, budget, trace), strict=True):
        if cached is not None:
            for head, kept in enumerate(cache.layers[0].keys[0]):
                near = (kept[:, None] - torch.from_numpy(full[head])).abs().amax(-1)
                assert near.min(-1).values.max() < 1e-5  # one pass over all tokens rounds otherwise
                assert set(near.argmin(-1).tolist()) == left[head] and len(kept) == cached
        if step == 0:
            continue
        for layer, row in enumerate(rows):
            for head, theirs in enumerate(row):
                first = PROMPT + step - len(theirs)  # a sliding cache gives attention no more than the window
                mine = lanes[layer * heads + head]
                assert {j + first for j in np.flatnonzero(theirs).tolist()} == set(mine) and len(mine) == visible
                compared += visible
                if layer == 0:
                    worst = max(worst, max(abs(w - theirs[j - first]) for j, w in mine.items()))
    return worst, compared


def check(agreement, kv_heads, worst, compared, theirs, spec, budget):
    group = 4 // kv_heads
    assert worst < 1e-6 if group == 1 else 1e-6 < worst < 0.1
    agreement(
        "transformers", transformers=theirs, kvsim=f"`{spec}`", budget=budget, **{
            "query heads per KV head": group, "compared": compared,
            "largest difference of a weight": f"{worst:.1g}",
        },
    )  # fmt: skip


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_sliding_window(kv_heads, agreement):
    """A sliding window of W sees W keys and caches W - 1: `fifo` with a budget of W - 1."""
    heads = {"num_key_value_heads": kv_heads}
    seen = observe(tiny(tf.MistralConfig, sliding_window=None, **heads), tokens(0, PROMPT + STEPS), PROMPT)
    model = tiny(tf.MistralConfig, sliding_window=WINDOW, **heads)
    worst, compared = compare(model, "fifo", WINDOW - 1, seen.trace, WINDOW, cached=WINDOW - 1)
    theirs = f"`sliding_window={WINDOW}` of Mistral with DynamicCache"
    check(agreement, kv_heads, worst, compared, theirs, "fifo", WINDOW - 1)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_sinks_and_window(kv_heads, agreement):
    """A 4-D mask of sinks and the newest: `streaming-llm`, positions as they were."""
    model = tiny(tf.MistralConfig, sliding_window=None, num_key_value_heads=kv_heads)
    seen = observe(model, tokens(0, PROMPT + STEPS), PROMPT)
    i = torch.arange(PROMPT + STEPS)
    near = i[:, None] - i <= BUDGET - SINK  # the newest of the budget, and the one that has just come
    mask = (i[:, None] >= i) & (near | (i < SINK) | (i[:, None] < PROMPT))  # the prompt sees all of itself
    worst, compared = compare(model, f"streaming-llm(sink={SINK})", BUDGET, seen.trace, BUDGET + 1, mask)
    theirs = f"4-D mask of {SINK} sinks and the newest {BUDGET - SINK}"
    check(agreement, kv_heads, worst, compared, theirs, f"streaming-llm(sink={SINK})", BUDGET)
